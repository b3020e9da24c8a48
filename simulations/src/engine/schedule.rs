//! Which computation goes to the workers next, and which answers wait for their turn.
//!
//! Answers are wanted in the order of virtual time, but a round ends sooner in real time when its longest
//! computations start first (Graham 1969). So the longest of those that are due next is handed out, out of as many
//! as may be in memory together ([`HELD_UPDATES_BYTES`]) and as the round still waits for: what over-selection or
//! the deadline will leave out is not computed. None of this decides a bit: it decides when a worker does what.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tributary_common::time::Time;

use crate::workers::{Outcome, Pool, Work};

/// Updates that may be computed before their turn: they are in memory until then.
pub const HELD_UPDATES_BYTES: u64 = 64 << 20;
/// Computations at the pool, per worker: one in hand, one waiting for its turn. So many updates may be held, too,
/// where one is larger than [`HELD_UPDATES_BYTES`].
const AHEAD_PER_WORKER: usize = 2;
/// How often a waiting simulation looks whether it is to stop.
const PATIENCE: Duration = Duration::from_millis(100);

/// A training that was not handed out yet.
struct Waiting {
    arrival: Time,
    /// In whatever unit, the same for all.
    cost: u64,
    work: Work,
}

/// The workers, with what they will do, do, and did before its turn. Work is known by its ticket.
pub(super) struct Backlog {
    pool: Pool,
    at_pool: usize,
    most_at_pool: usize,
    /// Updates that may be at the pool or answered, and not taken.
    window: usize,
    tickets: u64,
    /// Evaluations, in parts: before any training, for the run waits for them.
    evaluations: BTreeMap<u64, Work>,
    trainings: BTreeMap<u64, Waiting>,
    /// Trainings within the window, by arrival and by cost.
    near: BTreeSet<(Time, u64)>,
    longest: BTreeSet<(u64, Reverse<u64>)>,
    /// Trainings beyond the window, by arrival.
    far: BTreeSet<(Time, u64)>,
    /// Trainings handed out and not taken, with what stops them.
    held: BTreeMap<u64, Arc<AtomicBool>>,
    /// Answers that wait for their turn.
    answers: BTreeMap<u64, Outcome>,
    /// Work at the pool whose answer nobody waits for.
    cancelled: BTreeSet<u64>,
}

impl Backlog {
    /// Nothing to do for `pool` of `workers`; an update takes `update_bytes`.
    pub(super) fn new(pool: Pool, workers: usize, update_bytes: u64) -> Self {
        let most_at_pool = workers * AHEAD_PER_WORKER;
        let fit = usize::try_from(HELD_UPDATES_BYTES / update_bytes.max(1)).unwrap_or(usize::MAX);
        Self {
            pool,
            at_pool: 0,
            most_at_pool,
            window: fit.max(most_at_pool),
            tickets: 0,
            evaluations: BTreeMap::new(),
            trainings: BTreeMap::new(),
            near: BTreeSet::new(),
            longest: BTreeSet::new(),
            far: BTreeSet::new(),
            held: BTreeMap::new(),
            answers: BTreeMap::new(),
            cancelled: BTreeSet::new(),
        }
    }

    /// Adds a training of length `cost` whose update will arrive at `arrival`. One that is not `timely` will most
    /// likely not be wanted: it is begun only when its turn comes.
    pub(super) fn train(&mut self, work: Work, arrival: Time, cost: u64, timely: bool) -> Range<u64> {
        let tickets = self.issue(1);
        if timely {
            self.far.insert((arrival, tickets.start));
        }
        self.trainings.insert(tickets.start, Waiting { arrival, cost, work });
        tickets
    }

    /// Adds an evaluation in parts: a ticket for each, in order.
    pub(super) fn evaluate(&mut self, parts: Vec<Work>) -> Range<u64> {
        let tickets = self.issue(parts.len() as u64);
        self.evaluations.extend(tickets.clone().zip(parts));
        tickets
    }

    fn issue(&mut self, number: u64) -> Range<u64> {
        let first = self.tickets;
        self.tickets += number;
        first..self.tickets
    }

    /// Whether a ticket is a training's that was not taken.
    pub(super) fn is_training(&self, ticket: u64) -> bool {
        self.trainings.contains_key(&ticket) || self.held.contains_key(&ticket)
    }

    /// Nobody waits for these any more.
    pub(super) fn cancel(&mut self, tickets: Range<u64>) {
        for ticket in tickets {
            let waited = self.withdraw(ticket).is_some() || self.evaluations.remove(&ticket).is_some();
            if waited {
                continue;
            }
            if self.answers.remove(&ticket).is_some() {
                self.held.remove(&ticket);
            } else {
                self.held.get(&ticket).into_iter().for_each(|stop| stop.store(true, Ordering::Relaxed));
                self.cancelled.insert(ticket);
            }
        }
    }

    /// Hands work out while there is room; the round waits for `awaited` more updates.
    pub(super) fn hand_out(&mut self, awaited: u32) {
        while let Some((ticket, outcome)) = self.pool.answered() {
            self.receive(ticket, outcome);
        }
        self.fill(awaited);
    }

    /// Waits for the answers to `tickets` and takes them, in order; `None` when the simulation is to stop.
    pub(super) fn take(
        &mut self,
        tickets: Range<u64>,
        awaited: u32,
        stop: &AtomicBool,
    ) -> Option<Vec<Outcome>> {
        while !tickets.clone().all(|ticket| self.answers.contains_key(&ticket)) {
            self.fill(awaited);
            for ticket in tickets.clone() {
                // Its turn has come although nobody thought so: it goes now, whatever is longer.
                if self.is_beyond_the_window(ticket)
                    && let Some(work) = self.withdraw(ticket)
                {
                    self.assign(ticket, work, true);
                }
            }
            match self.pool.answer(PATIENCE) {
                Some((answered, outcome)) => self.receive(answered, outcome),
                None if stop.load(Ordering::Relaxed) => return None,
                None => {}
            }
        }
        let taken = tickets.map(|ticket| {
            self.held.remove(&ticket);
            self.answers.remove(&ticket)
        });
        taken.collect()
    }

    fn receive(&mut self, ticket: u64, outcome: Outcome) {
        self.at_pool -= 1;
        if self.cancelled.remove(&ticket) {
            self.held.remove(&ticket);
        } else {
            self.answers.insert(ticket, outcome);
        }
    }

    fn is_beyond_the_window(&self, ticket: u64) -> bool {
        self.trainings.get(&ticket).is_some_and(|waiting| !self.near.contains(&(waiting.arrival, ticket)))
    }

    fn fill(&mut self, awaited: u32) {
        let limit = self.window.min(awaited as usize);
        self.move_window(limit.saturating_sub(self.held.len()));
        while self.at_pool < self.most_at_pool {
            if let Some((ticket, work)) = self.evaluations.pop_first() {
                self.assign(ticket, work, false);
                continue;
            }
            self.move_window(limit.saturating_sub(self.held.len()));
            let Some((_, Reverse(ticket))) = self.longest.last().copied() else { return };
            if let Some(work) = self.withdraw(ticket) {
                self.assign(ticket, work, true);
            }
        }
    }

    /// Makes the window hold the `size` trainings that arrive first.
    fn move_window(&mut self, size: usize) {
        while self.near.len() > size {
            self.push_back();
        }
        loop {
            let Some(first) = self.far.first().copied() else { return };
            if self.near.len() >= size {
                if self.near.last().is_none_or(|last| *last < first) {
                    return;
                }
                self.push_back();
            }
            self.far.remove(&first);
            self.near.insert(first);
            if let Some(waiting) = self.trainings.get(&first.1) {
                self.longest.insert((waiting.cost, Reverse(first.1)));
            }
        }
    }

    fn push_back(&mut self) {
        let Some(last) = self.near.pop_last() else { return };
        if let Some(waiting) = self.trainings.get(&last.1) {
            self.longest.remove(&(waiting.cost, Reverse(last.1)));
        }
        self.far.insert(last);
    }

    /// Takes a training out that was not handed out.
    fn withdraw(&mut self, ticket: u64) -> Option<Work> {
        let Waiting { arrival, cost, work } = self.trainings.remove(&ticket)?;
        self.far.remove(&(arrival, ticket));
        self.near.remove(&(arrival, ticket));
        self.longest.remove(&(cost, Reverse(ticket)));
        Some(work)
    }

    fn assign(&mut self, ticket: u64, work: Work, is_training: bool) {
        let stop = Arc::new(AtomicBool::new(false));
        if is_training {
            self.held.insert(ticket, stop.clone());
        }
        self.at_pool += 1;
        self.pool.assign(ticket, work, stop);
    }
}
