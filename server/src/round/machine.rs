//! The states of a run and the transitions between them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tributary_common::digest::Digest;
use tributary_common::ids::NodeName;
use tributary_common::job::Job;
use tributary_common::record::{
    Abandonment, EvaluationRecord, Metrics, Participation, Reason, RoundOutcome, RoundRecord, RunEvent,
    RunState, Summed, one_line,
};
use tributary_common::rng::{Purpose, Stream};
use tributary_common::time::Time;

use super::masked::{Masked, Masking, Step};
use super::{Aggregated, Dismissal, Effect, ImposedSets, Input, Role};
use crate::store::{AttemptRecord, RunHead};

/// What a machine starts from: a new run, or one that a crash interrupted.
#[derive(Debug, Clone)]
pub struct Start {
    /// The job.
    pub job: Arc<Job>,
    /// Bytes of the job's model.
    pub model_bytes: u64,
    /// Where the run stands.
    pub head: RunHead,
    /// The attempt that was under way.
    pub open_attempt: Option<AttemptRecord>,
    /// Whether the last published model was evaluated.
    pub evaluated: bool,
    /// Clients whose updates are in the last published round.
    pub contributors: BTreeSet<NodeName>,
    /// Accepted sets to impose instead of drawing cohorts.
    pub imposed: Option<ImposedSets>,
    /// What the sessions of masked rounds need to know; absent where updates are not masked.
    pub masking: Option<Masking>,
    /// The open attempt's session, as it was journalled last.
    pub session: Option<Vec<u8>>,
}

/// How long masked updates that are still under way are waited for once enough are here.
const STRAGGLER_SECONDS: u32 = 10;

/// One run of one job. See the module for the states.
#[derive(Debug)]
pub struct RoundMachine {
    job: Arc<Job>,
    model_bytes: u64,
    head: RunHead,
    imposed: Option<ImposedSets>,
    masking: Option<Masking>,
    /// The cohort of a masked round that was lost: nobody masks an update to the same model with others.
    again: Option<Vec<NodeName>>,
    trainers: BTreeSet<NodeName>,
    evaluators: BTreeSet<NodeName>,
    /// Clients that cannot serve this job until they connect anew.
    unfit: BTreeSet<NodeName>,
    /// The trainers that are not unfit, sorted, since one of the two sets last changed; for cohorts are drawn from
    /// it, and in a large federation few come and go.
    roster: Option<Vec<NodeName>>,
    /// When a client last came or went, or the selection began.
    last_change: Time,
    /// The last count of clients that was reported while waiting.
    reported: Option<u32>,
    phase: Phase,
    /// Clients whose updates are in the last published round: they evaluate, where the job asks for it.
    contributors: BTreeSet<NodeName>,
}

#[derive(Debug)]
enum Phase {
    Selecting,
    Collecting(Box<Collecting>),
    Evaluating(Evaluating),
    Over,
}

#[derive(Debug)]
struct Collecting {
    attempt: AttemptRecord,
    /// Updates with which the round is complete.
    wanted: u32,
    deadline: Time,
    /// `None` while a member's part is open.
    members: BTreeMap<NodeName, Option<Participation>>,
    /// Open members without a connection, and since when.
    lost: BTreeMap<NodeName, Time>,
    open: u32,
    accepted: u32,
    /// Whether [`Effect::Aggregate`] is out and its answer is not here yet.
    aggregating: bool,
    /// The secure-aggregation session, where updates are masked.
    masked: Option<Masked>,
    /// What came with the sum.
    summed: Option<Summed>,
    bytes_down: u64,
    bytes_up: u64,
}

#[derive(Debug)]
struct Evaluating {
    round: u32,
    until: Time,
    /// Nodes asked, with their answers.
    asked: BTreeMap<NodeName, Option<Metrics>>,
    /// After a restart nobody is connected yet: until when those are waited for who should be asked.
    gather: Option<Time>,
}

impl RoundMachine {
    /// A machine at `start`, and the effects of starting it.
    pub fn new(now: Time, start: Start) -> (Self, Vec<Effect>) {
        let Start {
            job,
            model_bytes,
            head,
            open_attempt,
            evaluated,
            contributors,
            imposed,
            masking,
            session,
        } = start;
        let mut machine = Self {
            job,
            model_bytes,
            head,
            imposed,
            masking,
            again: None,
            trainers: BTreeSet::new(),
            evaluators: BTreeSet::new(),
            unfit: BTreeSet::new(),
            roster: None,
            last_change: now,
            reported: None,
            phase: Phase::Selecting,
            contributors,
        };
        let mut effects = Vec::new();
        if machine.head.state.is_over() {
            machine.phase = Phase::Over;
        } else if let Some(attempt) = open_attempt {
            machine.collect(now, attempt, session.as_deref());
            machine.advance(now, &mut effects);
        } else if machine.head.published > 0 && !evaluated && machine.job.evaluates(machine.head.published) {
            let gather = now.plus_seconds(machine.job.cohort.settle_seconds);
            machine.phase = Phase::Evaluating(Evaluating {
                round: machine.head.published,
                until: gather,
                asked: BTreeMap::new(),
                gather: Some(gather),
            });
        } else {
            machine.select(now, &mut effects);
        }
        (machine, effects)
    }

    /// Where the run stands.
    pub fn head(&self) -> &RunHead {
        &self.head
    }

    /// The job.
    pub fn job(&self) -> &Arc<Job> {
        &self.job
    }

    /// Whether nothing more will happen.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    /// The round and the attempt that are open: updates for them may be taken.
    pub fn open_attempt(&self) -> Option<(u32, u32)> {
        match &self.phase {
            Phase::Collecting(c) => Some((c.attempt.round, c.attempt.attempt)),
            _ => None,
        }
    }

    /// Updates that the open attempt still waits for; none without an open attempt.
    pub fn awaited(&self) -> u32 {
        match &self.phase {
            Phase::Collecting(c) => c.wanted.saturating_sub(c.accepted),
            _ => 0,
        }
    }

    /// The open attempt's (round, attempt) if an update of `node` would still be taken.
    pub fn wants(&self, node: &NodeName, round: u32) -> Option<u32> {
        match &self.phase {
            Phase::Collecting(c)
                if c.attempt.round == round
                    && c.members.get(node).is_some_and(Option::is_none)
                    && c.masked.as_ref().is_none_or(|masked| masked.takes(node)) =>
            {
                Some(c.attempt.attempt)
            }
            _ => None,
        }
    }

    /// Whether `node`'s update is already in the open attempt's sum.
    pub fn has(&self, node: &NodeName, round: u32) -> bool {
        match &self.phase {
            Phase::Collecting(c) if c.attempt.round == round => {
                matches!(c.members.get(node), Some(Some(Participation::Accepted { .. })))
            }
            _ => false,
        }
    }

    /// When [`Input::Tick`] is due, if nothing else happens before.
    pub fn next_tick(&self) -> Option<Time> {
        match &self.phase {
            Phase::Selecting => {
                let settled = self.last_change.plus_seconds(self.job.cohort.settle_seconds);
                let enough = self.eligible() >= self.job.cohort.minimum && self.imposed.is_none();
                if enough { Some(settled) } else { self.asks_again_at() }
            }
            Phase::Collecting(c) => {
                let grace = self.job.cohort.reconnect_seconds;
                let first_lost = c.lost.values().min().map(|since| since.plus_seconds(grace));
                let step = c.masked.as_ref().and_then(Masked::step_ends);
                [first_lost, step].into_iter().flatten().chain([c.deadline]).min()
            }
            Phase::Evaluating(e) => Some(e.gather.map_or(e.until, |gather| gather.min(e.until))),
            Phase::Over => None,
        }
    }

    /// Takes one input and returns what must be done about it.
    pub fn step(&mut self, now: Time, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        match input {
            Input::Connected { node, role } => self.connected(now, node, role, &mut effects),
            Input::Present { nodes } => {
                for (node, role) in nodes {
                    self.connected(now, node, role, &mut effects);
                }
            }
            Input::Disconnected { node } => self.disconnected(now, &node),
            Input::Declined { node, round, attempt, reason } => {
                self.declined(&node, (round, attempt), reason, &mut effects);
            }
            Input::Update { node, round, examples, bytes, digest } => {
                let accepted = Participation::Accepted { digest, examples, bytes };
                self.arrived(&node, round, bytes, accepted, &mut effects);
            }
            Input::Refused { node, round, bytes, detail } => {
                let refused = Participation::Refused { detail: one_line(&detail) };
                self.arrived(&node, round, bytes, refused, &mut effects);
            }
            Input::Masking { node, round, attempt, message } => {
                if let Phase::Collecting(c) = &mut self.phase
                    && (c.attempt.round, c.attempt.attempt) == (round, attempt)
                    && let Some(masked) = &mut c.masked
                {
                    c.bytes_up += message.len() as u64;
                    masked.receive(&node, &message, &mut effects);
                }
            }
            Input::Aggregated(result) => self.aggregated(now, result, &mut effects),
            Input::Evaluated { node, round, metrics } => {
                if let Phase::Evaluating(e) = &mut self.phase
                    && e.round == round
                    && let Some(answer) = e.asked.get_mut(&node)
                {
                    *answer = Some(metrics);
                }
            }
            Input::Stop => self.stop(now, &mut effects),
            Input::Tick => {}
        }
        self.advance(now, &mut effects);
        effects
    }

    /// Goes on as far as the present state allows without another input.
    fn advance(&mut self, now: Time, effects: &mut Vec<Effect>) {
        match &mut self.phase {
            Phase::Selecting => self.select(now, effects),
            Phase::Collecting(_) => self.close_if_decided(now, effects),
            Phase::Evaluating(e) => {
                let federated = self.job.evaluation.federated;
                let here = |node: &NodeName| e.asked.contains_key(node);
                let all_here = !e.asked.is_empty() && (!federated || self.contributors.iter().all(here));
                e.gather = e.gather.filter(|until| now < *until && !all_here);
                let answered = e.asked.values().all(Option::is_some) && e.gather.is_none();
                if answered || now >= e.until {
                    self.evaluated(now, effects);
                }
            }
            Phase::Over => {}
        }
    }

    fn connected(&mut self, now: Time, node: NodeName, role: Role, effects: &mut Vec<Effect>) {
        self.last_change = now;
        self.roster = None;
        self.unfit.remove(&node);
        let (here, other) = match role {
            Role::Trainer => (&mut self.trainers, &mut self.evaluators),
            Role::Evaluator => (&mut self.evaluators, &mut self.trainers),
        };
        other.remove(&node);
        here.insert(node.clone());
        match &mut self.phase {
            // Also when its update is here already: the acknowledgement may have been lost.
            Phase::Collecting(c)
                if matches!(c.members.get(&node), Some(None | Some(Participation::Accepted { .. }))) =>
            {
                c.lost.remove(&node);
                effects.push(c.invitation(node.clone(), self.head.model));
                if let Some(masked) = &mut c.masked {
                    masked.connected(&node, effects);
                }
            }
            Phase::Evaluating(e) => {
                let federated = self.job.evaluation.federated && self.contributors.contains(&node);
                let open = e.asked.get(&node).is_none_or(Option::is_none);
                if open && (role == Role::Evaluator || federated) {
                    e.until = e.until.max(now.plus_seconds(self.job.cohort.deadline_seconds));
                    e.asked.insert(node.clone(), None);
                    effects.push(Effect::Evaluate { node, round: e.round, model: self.head.model });
                }
            }
            _ => {}
        }
    }

    fn disconnected(&mut self, now: Time, node: &NodeName) {
        self.last_change = now;
        self.roster = None;
        self.trainers.remove(node);
        self.evaluators.remove(node);
        match &mut self.phase {
            Phase::Collecting(c) if c.members.get(node).is_some_and(Option::is_none) => {
                c.lost.entry(node.clone()).or_insert(now);
                if let Some(masked) = &mut c.masked {
                    masked.disconnected(node);
                }
            }
            // Its update is here, and its answers are still needed.
            Phase::Collecting(c) => c.masked.iter_mut().for_each(|masked| masked.disconnected(node)),
            Phase::Evaluating(e) if e.asked.get(node).is_some_and(Option::is_none) => {
                e.asked.remove(node);
            }
            _ => {}
        }
    }

    fn declined(&mut self, node: &NodeName, of: (u32, u32), reason: Reason, effects: &mut Vec<Effect>) {
        if let Phase::Collecting(c) = &mut self.phase
            && (c.attempt.round, c.attempt.attempt) == of
            && c.decide(node, Participation::Declined { reason })
        {
            // What it refuses now it will refuse again until something changes at the node.
            if matches!(reason, Reason::Policy | Reason::Budget | Reason::Data | Reason::Unsupported) {
                self.unfit.insert(node.clone());
                self.roster = None;
            }
            effects.push(c.progress());
        }
    }

    fn arrived(
        &mut self,
        node: &NodeName,
        round: u32,
        bytes: u64,
        what: Participation,
        effects: &mut Vec<Effect>,
    ) {
        let Phase::Collecting(c) = &mut self.phase else { return };
        if c.attempt.round != round {
            return;
        }
        let accepted = matches!(what, Participation::Accepted { .. });
        if c.decide(node, what) {
            c.bytes_up += bytes;
            if accepted {
                c.accepted += 1;
                effects.push(Effect::Fold { node: node.clone() });
            }
            effects.push(c.progress());
        }
    }

    fn is_eligible(&self, node: &NodeName) -> bool {
        self.trainers.contains(node) && !self.unfit.contains(node)
    }

    fn eligible(&self) -> u32 {
        let fit = self.trainers.len() - self.trainers.intersection(&self.unfit).count();
        u32::try_from(fit).unwrap_or(u32::MAX)
    }

    /// When those that refused are asked once more, where they alone are what is missing: a run does not wait for good
    /// for nodes that are there. What they refuse then counts as an attempt.
    fn asks_again_at(&self) -> Option<Time> {
        let (here, least) = (self.trainers.len(), self.job.cohort.minimum);
        let refused = here >= least as usize && self.eligible() < least && self.imposed.is_none();
        refused.then(|| self.last_change.plus_seconds(self.job.cohort.deadline_seconds))
    }

    /// Starts the next round if enough clients are there, or have been for long enough.
    fn select(&mut self, now: Time, effects: &mut Vec<Effect>) {
        self.phase = Phase::Selecting;
        if self.head.published >= self.job.rounds {
            return self.over(RunState::Finished, effects);
        }
        if self.asks_again_at().is_some_and(|at| now >= at) {
            self.unfit.clear();
            self.roster = None;
        }
        let round = self.head.published + 1;
        let eligible = self.eligible();
        let imposed = self.imposed.as_ref().map(|sets| sets.get(&round).cloned().unwrap_or_default());
        let (wanted, ready) = match &imposed {
            Some(set) => {
                let ready = !set.is_empty() && set.iter().all(|node| self.trainers.contains(node));
                (u32::try_from(set.len()).unwrap_or(u32::MAX), ready)
            }
            None => {
                let settled = now >= self.last_change.plus_seconds(self.job.cohort.settle_seconds);
                let wanted = self.job.invited();
                (wanted, eligible >= wanted || (eligible >= self.job.cohort.minimum && settled))
            }
        };
        if !ready {
            if self.reported != Some(eligible) {
                self.reported = Some(eligible);
                effects.push(event(RunEvent::Waiting { round, connected: eligible, wanted }));
            }
            return;
        }
        self.reported = None;
        let cohort = match imposed {
            Some(set) => set.into_iter().collect(),
            None => match self.again.clone().filter(|all| all.iter().all(|node| self.is_eligible(node))) {
                Some(cohort) => cohort,
                None => self.draw(round, wanted.min(eligible)),
            },
        };
        let attempt = AttemptRecord { round, attempt: self.head.attempt, started: now, eligible, cohort };
        effects.push(Effect::Journal(attempt.clone()));
        let invited = u32::try_from(attempt.cohort.len()).unwrap_or(u32::MAX);
        effects.push(event(RunEvent::RoundStarted { round, attempt: attempt.attempt, invited }));
        self.collect(now, attempt, None);
        let model = self.head.model;
        if let Phase::Collecting(c) = &mut self.phase {
            c.lost.clear();
            let nodes: Vec<NodeName> = c.members.keys().cloned().collect();
            effects.extend(nodes.into_iter().map(|node| c.invitation(node, model)));
        }
    }

    /// A uniform sample of the eligible clients, without replacement, from the stream that (round, attempt) names.
    fn draw(&mut self, round: u32, members: u32) -> Vec<NodeName> {
        let (trainers, unfit) = (&self.trainers, &self.unfit);
        let eligible = self.roster.get_or_insert_with(|| trainers.difference(unfit).cloned().collect());
        let mut stream = Stream::new(self.job.seed, Purpose::Cohort, round, &self.head.attempt.to_string());
        let picked = rand::seq::index::sample(&mut stream, eligible.len(), members as usize);
        let mut cohort: Vec<NodeName> =
            picked.into_iter().filter_map(|at| eligible.get(at).cloned()).collect();
        cohort.sort();
        cohort
    }

    /// Enters the collecting state with everybody's part open and nobody connected.
    /// `session` is the attempt's journalled session, where it goes on.
    fn collect(&mut self, now: Time, attempt: AttemptRecord, session: Option<&[u8]>) {
        let invited = u32::try_from(attempt.cohort.len()).unwrap_or(u32::MAX);
        let masked = self
            .masking
            .as_ref()
            .map(|masking| Masked::open(now, masking, &self.job, &attempt, self.head.model, session));
        self.phase = Phase::Collecting(Box::new(Collecting {
            wanted: if self.imposed.is_some() { invited } else { self.job.cohort.size.min(invited) },
            deadline: now.plus_seconds(self.job.cohort.deadline_seconds),
            members: attempt.cohort.iter().map(|node| (node.clone(), None)).collect(),
            lost: attempt.cohort.iter().map(|node| (node.clone(), now)).collect(),
            open: invited,
            accepted: 0,
            aggregating: false,
            masked,
            summed: None,
            bytes_down: u64::from(invited) * self.model_bytes,
            bytes_up: 0,
            attempt,
        }));
    }

    fn quorum(&self) -> u32 {
        match (&self.imposed, &self.phase) {
            (Some(_), Phase::Collecting(c)) => c.wanted,
            _ => self.job.cohort.minimum,
        }
    }

    /// Ends the attempt when its outcome can no longer change, or its time is over.
    fn close_if_decided(&mut self, now: Time, effects: &mut Vec<Effect>) {
        let quorum = self.quorum();
        let grace = self.job.cohort.reconnect_seconds;
        let Phase::Collecting(c) = &mut self.phase else { return };
        if c.aggregating {
            return;
        }
        let is_masked = c.masked.is_some();
        let gone: Vec<NodeName> = (c.lost.iter())
            .filter(|(_, since)| now >= since.plus_seconds(grace))
            .map(|(node, _)| node.clone())
            .collect();
        for node in gone {
            c.decide(&node, Participation::Disconnected);
            effects.push(c.progress());
        }
        if is_masked {
            return self.close_masked(now, effects);
        }
        let complete = c.accepted >= c.wanted;
        let hopeless = c.accepted + c.open < quorum;
        if !complete && !hopeless && c.open > 0 && now < c.deadline {
            return;
        }
        c.close(complete);
        let accepted = c.accepted;
        if accepted >= quorum {
            c.aggregating = true;
            effects.push(Effect::Aggregate { unmask: None });
        } else {
            let minimum = quorum;
            self.end_attempt(now, Err(Abandonment::BelowMinimum { accepted, minimum }), effects);
        }
    }

    /// The same for an attempt whose updates are masked: its session goes from step to step until the sum can be opened.
    fn close_masked(&mut self, now: Time, effects: &mut Vec<Effect>) {
        let quorum = self.quorum();
        loop {
            let Phase::Collecting(c) = &mut self.phase else { return };
            let Some(masked) = &mut c.masked else { return };
            let step = masked.step();
            for node in masked.left_out() {
                let lost = c.lost.contains_key(&node);
                if c.decide(&node, if lost { Participation::Disconnected } else { Participation::Late }) {
                    effects.push(c.progress());
                }
            }
            let (accepted, open) = (c.accepted, c.open);
            if matches!(step, Step::Keys | Step::Collecting) && accepted + open < quorum {
                let reason = Abandonment::BelowMinimum { accepted, minimum: quorum };
                return self.end_attempt(now, Err(reason), effects);
            }
            if let Step::Collecting = step {
                if accepted >= c.wanted && open > 0 {
                    // Every masked update that is here is summed; those under way get a moment more.
                    c.deadline = c.deadline.min(now.plus_seconds(STRAGGLER_SECONDS));
                }
                if open > 0 && now < c.deadline {
                    return;
                }
                c.close(false);
            }
            let Some(masked) = &mut c.masked else { return };
            match step {
                // Whoever lost its connection is waited for until the step's time is over.
                Step::Keys | Step::Opening if !masked.is_settled(now, c.lost.is_empty()) => return,
                Step::Keys | Step::Collecting | Step::Opening => masked.close(now, effects),
                Step::Open(terms) => {
                    c.aggregating = true;
                    effects.push(Effect::Aggregate { unmask: Some(terms) });
                    return;
                }
                Step::Failed(detail) => {
                    let reason = Abandonment::SecureAggregation { detail: one_line(&detail) };
                    return self.end_attempt(now, Err(reason), effects);
                }
            }
        }
    }

    fn aggregated(&mut self, now: Time, result: Result<Aggregated, String>, effects: &mut Vec<Effect>) {
        if let Phase::Collecting(c) = &mut self.phase
            && c.aggregating
        {
            if let Ok(Aggregated { summed, support, .. }) = &result {
                c.summed = *summed;
                self.masking.iter_mut().for_each(|masking| masking.support = *support);
            }
            let outcome = match result {
                Ok(aggregated) => Ok(aggregated.model),
                Err(detail) => Err(Abandonment::UnfitModel { detail: one_line(&detail) }),
            };
            self.end_attempt(now, outcome, effects);
        }
    }

    /// Writes the attempt's end down and goes on: to the evaluation, the next round, or the next attempt.
    fn end_attempt(&mut self, now: Time, outcome: Result<Digest, Abandonment>, effects: &mut Vec<Effect>) {
        let Phase::Collecting(c) = std::mem::replace(&mut self.phase, Phase::Selecting) else { return };
        let Collecting { attempt, members, bytes_down, bytes_up, mut masked, summed, accepted, .. } = *c;
        let (round, number) = (attempt.round, attempt.attempt);
        let bytes_down = bytes_down + masked.as_ref().map_or(0, Masked::bytes_sent);
        // A client sends one masked update for a round, whatever became of it: the round is not tried again.
        let spent =
            outcome.is_err() && masked.as_ref().is_some_and(|masked| accepted > 0 || masked.was_resumed());
        match &outcome {
            Ok(model) => {
                self.head = RunHead {
                    published: round,
                    attempt: 1,
                    model: *model,
                    state: RunState::Running,
                    clip_norm: None,
                    support: None,
                };
            }
            Err(Abandonment::Stopped) => self.head.state = RunState::Stopped,
            Err(reason) if number >= self.job.cohort.attempts => {
                self.head.published = if spent { round } else { self.head.published };
                self.head.state = RunState::Failed { reason: reason.clone() };
            }
            Err(_) => {
                self.head.attempt = number + 1;
                self.head.published = if spent { round } else { self.head.published };
            }
        }
        self.again = match (&outcome, spent) {
            (Ok(_), _) => None,
            (Err(_), true) => Some(attempt.cohort.clone()),
            (Err(_), false) => self.again.take(),
        };
        let cohort: BTreeMap<NodeName, Participation> =
            members.into_iter().map(|(node, part)| (node, part.unwrap_or(Participation::Late))).collect();
        let published = outcome.is_ok();
        let record = RoundRecord {
            round,
            attempt: number,
            started: attempt.started,
            ended: now,
            eligible: attempt.eligible,
            cohort,
            bytes_down,
            bytes_up,
            outcome: match outcome {
                Ok(model) => RoundOutcome::Published { model },
                Err(reason) => RoundOutcome::Abandoned { reason },
            },
            spent,
            summed,
        };
        effects.push(Effect::Commit { record: Box::new(record.clone()), head: self.head.clone() });
        if let Some(masked) = masked.as_mut().filter(|_| published) {
            masked.commit(effects);
        }
        for (node, part) in &record.cohort {
            let used = matches!(part, Participation::Accepted { .. });
            let reason = match (published, used) {
                (false, _) => Dismissal::Abandoned,
                (true, true) => Dismissal::Published,
                (true, false) => Dismissal::NotUsed,
            };
            effects.push(Effect::Dismiss { node: node.clone(), round, attempt: number, reason });
        }
        if published {
            self.contributors = record.accepted().cloned().collect();
        }
        effects.push(event(RunEvent::RoundEnded { record }));
        if self.head.state.is_over() {
            self.over(self.head.state.clone(), effects);
        } else if published && self.job.evaluates(round) {
            self.evaluate(now, round, effects);
        } else {
            // After an abandoned attempt nodes get the time to settle before the next.
            self.last_change = if published { self.last_change } else { now };
            self.advance(now, effects);
        }
    }

    fn evaluate(&mut self, now: Time, round: u32, effects: &mut Vec<Effect>) {
        let federated = self.contributors.iter().filter(|node| self.trainers.contains(*node));
        let clients = federated.filter(|_| self.job.evaluation.federated);
        let asked: BTreeMap<NodeName, Option<Metrics>> =
            self.evaluators.iter().chain(clients).map(|node| (node.clone(), None)).collect();
        let model = self.head.model;
        effects.extend(asked.keys().map(|node| Effect::Evaluate { node: node.clone(), round, model }));
        let until = now.plus_seconds(self.job.cohort.deadline_seconds);
        self.phase = Phase::Evaluating(Evaluating { round, until, asked, gather: None });
        self.advance(now, effects);
    }

    fn evaluated(&mut self, now: Time, effects: &mut Vec<Effect>) {
        let Phase::Evaluating(e) = std::mem::replace(&mut self.phase, Phase::Selecting) else { return };
        let mut record = EvaluationRecord { round: e.round, ..Default::default() };
        for (node, metrics) in e.asked {
            let Some(metrics) = metrics else { continue };
            if self.contributors.contains(&node) {
                record.by_client.insert(node, metrics);
            } else {
                record.held_out.get_or_insert_default().add(&metrics);
            }
        }
        if record.held_out.is_some() || !record.by_client.is_empty() {
            effects.push(Effect::RecordEvaluation(Box::new(record.clone())));
            effects.push(event(RunEvent::Evaluated { record }));
        }
        self.advance(now, effects);
    }

    fn stop(&mut self, now: Time, effects: &mut Vec<Effect>) {
        match &mut self.phase {
            Phase::Over => {}
            Phase::Collecting(_) => self.end_attempt(now, Err(Abandonment::Stopped), effects),
            Phase::Selecting | Phase::Evaluating(_) => self.over(RunState::Stopped, effects),
        }
    }

    fn over(&mut self, state: RunState, effects: &mut Vec<Effect>) {
        self.head.state = state.clone();
        self.phase = Phase::Over;
        effects.push(Effect::Finish(state.clone()));
        let RunHead { published, model, .. } = self.head;
        effects.push(event(RunEvent::Ended { state, rounds: published, model }));
    }
}

impl Collecting {
    /// Decides an open member's part; `false` if it was decided before or is not a member.
    fn decide(&mut self, node: &NodeName, part: Participation) -> bool {
        match self.members.get_mut(node) {
            Some(open @ None) => {
                if let Some(masked) = &mut self.masked {
                    masked.decided(node, matches!(part, Participation::Accepted { .. }));
                }
                *open = Some(part);
                self.open -= 1;
                self.lost.remove(node);
                true
            }
            _ => false,
        }
    }

    /// Decides the part of every open member: nothing more is waited for.
    fn close(&mut self, complete: bool) {
        let lost = std::mem::take(&mut self.lost);
        for (node, part) in self.members.iter_mut().filter(|(_, part)| part.is_none()) {
            *part = Some(match (complete, lost.contains_key(node)) {
                (true, _) => Participation::Surplus,
                (false, true) => Participation::Disconnected,
                (false, false) => Participation::Late,
            });
        }
        self.open = 0;
    }

    fn invitation(&self, node: NodeName, model: Digest) -> Effect {
        let AttemptRecord { round, attempt, .. } = self.attempt;
        Effect::Invite { node, round, attempt, model, deadline: self.deadline }
    }

    fn progress(&self) -> Effect {
        let invited = u32::try_from(self.members.len()).unwrap_or(u32::MAX);
        event(RunEvent::Progress { round: self.attempt.round, decided: invited - self.open, invited })
    }
}

fn event(event: RunEvent) -> Effect {
    Effect::Event(Box::new(event))
}
