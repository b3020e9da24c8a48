//! A coordinator's ledger of one run as a pure function of its records: what was promised, whose payloads
//! came, and which models were published.

use std::collections::{BTreeMap, BTreeSet};

use super::account::Fault;
use super::head::SignedHead;
use super::log::{ChainError, Log};
use super::record::{Body, Claim, JobKey, LedgerRole, Participant, Party, Record};
use crate::digest::Digest;
use crate::ids::NodeName;
use crate::privacy::{Event, Unit};

/// Why a coordinator's ledger refuses a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunRefusal {
    /// The ledger has its run.
    #[error("this ledger has its run already: each run has a ledger of its own")]
    Opened,
    /// Nothing was opened yet, or the run is over.
    #[error("the run is not open")]
    NotOpen,
    /// Rounds come one after another.
    #[error("round {found} cannot follow {published} published rounds")]
    Round {
        /// The round.
        found: u32,
        /// Rounds published.
        published: u32,
    },
    /// Attempts come one after another.
    #[error("attempt {found} at round {round} is not later than the last one")]
    Attempt {
        /// The round.
        round: u32,
        /// The attempt.
        found: u32,
    },
    /// A node sent two payloads for one round.
    #[error("{node} sent two payloads for round {round}: {first:?} and {second:?}")]
    SecondPayload {
        /// The node.
        node: NodeName,
        /// The round.
        round: u32,
        /// The payload that came first.
        first: Digest,
        /// The other one.
        second: Digest,
    },
    /// More is noised than was promised.
    #[error("round {0} was noised before")]
    Noised(u32),
    /// The record cannot be written.
    #[error("the record cannot be written: {0}")]
    Value(&'static str),
}

/// What a run was opened with.
#[derive(Debug, Clone, PartialEq)]
pub struct RunOpening {
    /// The run.
    pub key: JobKey,
    /// Digest of the job file.
    pub job: Digest,
    /// Whom it protects; `None` for nobody.
    pub unit: Option<Unit>,
    /// The mechanism's name; `none` for none.
    pub mechanism: String,
    /// Rounds to publish.
    pub rounds: u32,
    /// What one round does; empty without a guarantee.
    pub events: Vec<Event>,
    /// What the job promises.
    pub claim: Option<Claim>,
}

/// The ledger of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct RunLedger {
    log: Log,
    run: Option<RunOpening>,
    published: u32,
    /// The round under way: the one after the published ones and those that were lost under masks.
    current: u32,
    /// The last attempt at it.
    attempt: u32,
    /// Payloads of that round, by node.
    payloads: BTreeMap<NodeName, Digest>,
    noised: BTreeSet<u32>,
    over: bool,
}

impl RunLedger {
    /// The state after `first`, which opens a coordinator's ledger.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn begin(first: &Record) -> Result<Self, Fault> {
        let log = Log::begin(first)?;
        if log.opening().role != LedgerRole::Coordinator {
            return Err(Fault::WrongRole);
        }
        let (payloads, noised) = (BTreeMap::new(), BTreeSet::new());
        Ok(Self { log, run: None, published: 0, current: 1, attempt: 0, payloads, noised, over: false })
    }

    /// The state after all `records`.
    ///
    /// # Errors
    /// The sequence number of the first record that contradicts those before it, and how.
    pub fn replay<'a>(records: impl IntoIterator<Item = &'a Record>) -> Result<Self, (u64, Fault)> {
        let mut records = records.into_iter();
        let first = records.next().ok_or((0, Fault::Chain(ChainError::Opening)))?;
        let mut ledger = Self::begin(first).map_err(|fault| (0, fault))?;
        for record in records {
            ledger.apply(record).map_err(|fault| (record.sequence(), fault))?;
        }
        Ok(ledger)
    }

    /// The chain and its heads.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// What the run was opened with.
    pub fn run(&self) -> Option<&RunOpening> {
        self.run.as_ref()
    }

    /// The payload that a node sent for `round`, if that is the one under way, in an earlier attempt.
    pub fn payload_of(&self, node: &NodeName, round: u32) -> Option<Digest> {
        self.payloads.get(node).filter(|_| round == self.current).copied()
    }

    /// Rounds published.
    pub fn published(&self) -> u32 {
        self.published
    }

    /// The last attempt that is recorded, as round and attempt: after a published round, the next one and 0.
    pub fn last_attempt(&self) -> (u32, u32) {
        (self.current, self.attempt)
    }

    /// Whether the run ended.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Takes a record that was appended.
    ///
    /// # Errors
    /// How it contradicts the records before it.
    pub fn apply(&mut self, record: &Record) -> Result<(), Fault> {
        self.log.push(record)?;
        self.count(record.body())
    }

    /// [`RunLedger::apply`] for a record that is in no chain: an auditor counts on after a damaged one.
    pub(crate) fn count(&mut self, body: &Body) -> Result<(), Fault> {
        let open = self.run.is_some() && !self.over;
        match body {
            Body::RunOpened { key, job, unit, mechanism, rounds, events, claim } => {
                if self.run.is_some() {
                    return Err(Fault::Run("a second run is opened in a ledger of one run"));
                }
                self.run = Some(RunOpening {
                    key: *key,
                    job: *job,
                    unit: *unit,
                    mechanism: mechanism.clone(),
                    rounds: *rounds,
                    events: events.clone(),
                    claim: *claim,
                });
                Ok(())
            }
            Body::HeadWitnessed { head, .. } => head.verify().map_err(|_| Fault::ForgedHead),
            Body::RoundNoised { round, .. } => {
                if self.noised.insert(*round) {
                    in_run(open)
                } else {
                    Err(Fault::Run("a round is noised a second time"))
                }
            }
            Body::RoundPublished { round, attempt, participants, .. } => {
                let fits = self.fits(*round, *attempt, participants);
                self.published = (*round).max(self.published);
                self.current = self.published.saturating_add(1);
                self.attempt = 0;
                self.payloads.clear();
                let rounds = self.run.as_ref().map_or(0, |run| run.rounds);
                if *round > rounds {
                    return Err(Fault::Run("more rounds are published than the job asks for"));
                }
                fits.map_err(fault)
            }
            Body::RoundAbandoned { round, attempt, participants } => {
                let fits = self.fits(*round, *attempt, participants);
                if *round > self.current {
                    self.current = *round;
                    self.payloads.clear();
                }
                self.attempt = (*attempt).max(self.attempt);
                for Participant { node, payload } in participants {
                    self.payloads.extend(payload.map(|payload| (node.clone(), payload)));
                }
                fits.map_err(fault)
            }
            Body::MetricsReceived { .. } => in_run(open),
            Body::RunEnded { rounds } => {
                let right = *rounds == self.published;
                self.over = true;
                in_run(open)?;
                if right { Ok(()) } else { Err(Fault::Run("the run ends with another number of rounds")) }
            }
            _ => Err(Fault::WrongRole),
        }
    }

    /// Opens the run.
    ///
    /// # Errors
    /// [`RunRefusal`].
    pub fn open_run(&self, opening: RunOpening) -> Result<Body, RunRefusal> {
        if self.run.is_some() {
            return Err(RunRefusal::Opened);
        }
        let RunOpening { key, job, unit, mechanism, rounds, events, claim } = opening;
        checked(Body::RunOpened { key, job, unit, mechanism, rounds, events, claim })
    }

    /// Pays for noise that the coordinator adds itself, before the aggregate is published; `None` if the
    /// round's is paid for: the noise is then drawn afresh under the same charge, for nothing of it was
    /// published.
    ///
    /// # Errors
    /// [`RunRefusal`].
    pub fn noise_round(&self, round: u32, events: Vec<Event>) -> Result<Option<Body>, RunRefusal> {
        self.open()?;
        if round != self.current {
            return Err(RunRefusal::Round { found: round, published: self.published });
        }
        if self.noised.contains(&round) {
            return Ok(None);
        }
        checked(Body::RoundNoised { round, events }).map(Some)
    }

    /// Records a model that is committed, and whose payloads are in it.
    ///
    /// # Errors
    /// [`RunRefusal`].
    pub fn publish_round(
        &self,
        round: u32,
        attempt: u32,
        model: Digest,
        participants: Vec<Participant>,
    ) -> Result<Body, RunRefusal> {
        self.fits(round, attempt, &participants)?;
        checked(Body::RoundPublished { round, attempt, model, participants })
    }

    /// Records an attempt that ended without a model, and whose payloads had arrived.
    ///
    /// # Errors
    /// [`RunRefusal`].
    pub fn abandon_round(
        &self,
        round: u32,
        attempt: u32,
        participants: Vec<Participant>,
    ) -> Result<Body, RunRefusal> {
        self.fits(round, attempt, &participants)?;
        checked(Body::RoundAbandoned { round, attempt, participants })
    }

    /// Records noised metrics that arrived.
    ///
    /// # Errors
    /// [`RunRefusal`].
    pub fn receive_metrics(&self, round: u32, participants: Vec<Participant>) -> Result<Body, RunRefusal> {
        self.open()?;
        checked(Body::MetricsReceived { round, participants })
    }

    /// Records a head of a node's ledger; `None` if its signature is false.
    pub fn witness(&self, node: NodeName, head: SignedHead) -> Option<Body> {
        head.verify().ok()?;
        Some(Body::HeadWitnessed { of: Party::Node(node), head })
    }

    /// Ends the run; `None` if it ended before.
    ///
    /// # Errors
    /// [`RunRefusal::NotOpen`] before it was opened.
    pub fn end_run(&self) -> Result<Option<Body>, RunRefusal> {
        if self.run.is_none() {
            return Err(RunRefusal::NotOpen);
        }
        Ok((!self.over).then_some(Body::RunEnded { rounds: self.published }))
    }

    fn open(&self) -> Result<(), RunRefusal> {
        if self.run.is_some() && !self.over { Ok(()) } else { Err(RunRefusal::NotOpen) }
    }

    /// Correction 11: rounds and attempts in order, and one payload per node and round, whatever the attempt.
    fn fits(&self, round: u32, attempt: u32, participants: &[Participant]) -> Result<(), RunRefusal> {
        self.open()?;
        // A masked round that was abandoned is not tried again: the next follows, and counts its attempts on.
        let lost = self.attempt > 0 && round == self.current.saturating_add(1);
        if round != self.current && !lost {
            return Err(RunRefusal::Round { found: round, published: self.published });
        }
        if attempt <= self.attempt {
            return Err(RunRefusal::Attempt { round, found: attempt });
        }
        let mut now: BTreeMap<&NodeName, Digest> = BTreeMap::new();
        for Participant { node, payload } in participants {
            let Some(payload) = payload else { continue };
            let earlier = self.payloads.get(node).filter(|_| !lost);
            let first = earlier.or_else(|| now.get(node)).copied();
            if let Some(first) = first.filter(|first| first != payload) {
                let (node, second) = (node.clone(), *payload);
                return Err(RunRefusal::SecondPayload { node, round, first, second });
            }
            now.insert(node, *payload);
        }
        Ok(())
    }
}

fn in_run(open: bool) -> Result<(), Fault> {
    if open {
        Ok(())
    } else {
        Err(Fault::Run("something is recorded before the run's begin or after its end"))
    }
}

fn fault(refusal: RunRefusal) -> Fault {
    Fault::Run(match refusal {
        RunRefusal::Round { .. } => "rounds are not published one after another",
        RunRefusal::Attempt { .. } => "attempts are not recorded one after another",
        RunRefusal::SecondPayload { .. } => "a node has two payloads for one round",
        _ => "something is recorded before the run's begin or after its end",
    })
}

fn checked(body: Body) -> Result<Body, RunRefusal> {
    body.check().map_err(RunRefusal::Value)?;
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RunId;
    use crate::ledger::book::{BookError, RunBook};
    use crate::ledger::head::{LedgerKey, View};
    use crate::ledger::hex::Hex;
    use crate::ledger::record::CoordinatorId;
    use crate::privacy::accounting::Basis;
    use crate::time::Time;

    const NOW: Time = Time(1_795_562_055_000);

    fn opening() -> RunOpening {
        RunOpening {
            key: JobKey { coordinator: CoordinatorId(Hex([1; 32])), run: RunId(1) },
            job: Digest::of(b"job"),
            unit: Some(Unit::Example),
            mechanism: "dp-sgd".into(),
            rounds: 2,
            events: vec![Event::gaussian(0.05, 1.6, 10)],
            claim: Some(Claim { epsilon: 2.6, delta: 1e-5, basis: Basis::Pld { grid_step: 1e-4 } }),
        }
    }

    fn sent(node: &str, payload: &[u8]) -> Participant {
        Participant { node: node.parse().unwrap(), payload: Some(Digest::of(payload)) }
    }

    fn refused(result: Result<(), BookError>) -> RunRefusal {
        match result.unwrap_err() {
            BookError::Run(refusal) => refusal,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_run_is_recorded_in_order_and_takes_one_payload_per_node_and_round() {
        let key = LedgerKey::from_seed([1; 32]);
        let mut book = RunBook::in_memory(&"coordinator".parse().unwrap(), key.clone(), NOW).unwrap();
        let model = Digest::of(b"model");
        let (a, b) = (sent("a", b"1"), sent("b", b"2"));
        assert_eq!(refused(book.publish_round(1, 1, model, vec![], NOW)), RunRefusal::NotOpen);
        book.open_run(opening(), NOW).unwrap();
        book.open_run(opening(), NOW).unwrap();
        assert_eq!(refused(book.open_run(RunOpening { rounds: 3, ..opening() }, NOW)), RunRefusal::Opened);

        book.abandon_round(1, 1, vec![a.clone()], NOW).unwrap();
        assert_eq!(
            refused(book.abandon_round(1, 1, vec![], NOW)),
            RunRefusal::Attempt { round: 1, found: 1 }
        );
        // Correction 11: retrained bytes for a round whose first bytes arrived are a second release.
        let again = refused(book.publish_round(1, 2, model, vec![sent("a", b"other"), b.clone()], NOW));
        assert!(matches!(again, RunRefusal::SecondPayload { round: 1, .. }), "{again}");
        let events = opening().events;
        book.noise_round(1, events.clone(), NOW).unwrap();
        let size = book.core().log().size();
        book.noise_round(1, events.clone(), NOW).unwrap();
        assert_eq!(book.core().log().size(), size);
        book.publish_round(1, 2, model, vec![a, b], NOW).unwrap();
        assert_eq!(refused(book.noise_round(1, events, NOW)), RunRefusal::Round { found: 1, published: 1 });
        // The next round's payload is another one.
        book.publish_round(2, 1, model, vec![sent("a", b"3")], NOW).unwrap();
        book.receive_metrics(2, vec![sent("a", b"4")], NOW).unwrap();
        let head = key.sign(book.core().log().head(View::Whole));
        assert!(book.witness("a".parse().unwrap(), head, NOW).unwrap());
        let forged = SignedHead { signature: Hex([0; 64]), ..head };
        assert!(!book.witness("a".parse().unwrap(), forged, NOW).unwrap());
        book.end_run(NOW).unwrap();
        book.end_run(NOW).unwrap();
        assert!(book.core().is_over());

        let text = book.export().unwrap();
        let lines: Vec<_> = text.lines().collect();
        let records: Vec<_> =
            lines[1..lines.len() - 1].iter().map(|line| Record::parse(line).unwrap()).collect();
        assert_eq!(&RunLedger::replay(&records).unwrap(), book.core());
    }

    /// A masked round that cannot be opened is lost; the next one has other payloads, paid for anew.
    #[test]
    fn a_lost_round_is_followed_by_the_next_and_by_no_later_one() {
        let key = LedgerKey::from_seed([7; 32]);
        let mut book = RunBook::in_memory(&"coordinator".parse().unwrap(), key, NOW).unwrap();
        book.open_run(RunOpening { rounds: 4, ..opening() }, NOW).unwrap();
        let (a, model) = (sent("a", b"1"), Digest::of(b"model"));
        let skipped = refused(book.publish_round(2, 1, model, vec![a.clone()], NOW));
        assert!(matches!(skipped, RunRefusal::Round { found: 2, .. }), "nothing was lost");
        book.abandon_round(1, 1, vec![a.clone()], NOW).unwrap();
        assert_eq!(book.core().payload_of(&a.node, 1), a.payload);
        assert_eq!(book.core().payload_of(&a.node, 2), None);
        let late = refused(book.publish_round(3, 2, model, vec![a.clone()], NOW));
        assert!(matches!(late, RunRefusal::Round { found: 3, .. }));
        book.abandon_round(2, 2, vec![sent("a", b"2")], NOW).unwrap();
        book.publish_round(3, 3, model, vec![sent("a", b"3")], NOW).unwrap();
        assert_eq!(book.core().published(), 3);
        book.publish_round(4, 1, model, vec![sent("a", b"4")], NOW).unwrap();
    }
}
