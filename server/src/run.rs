//! One run as a whole: the round machine with its store and its sum.
//!
//! [`Run`] performs the effects that stay inside the process (journal, fold, aggregate, commit) in their
//! order and hands out the rest. It is synchronous: the coordinator's driver and the simulator both run it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::num::NonZeroUsize;
use std::sync::Arc;

use tributary_common::aggregate::{
    AddNoise, AggregateError, AggregationRule, ClientLevel, Contribution, check_model, rule_of,
};
use tributary_common::digest::Digest;
use tributary_common::exchange::{Exchange, ExchangeError, Masked, MaskedSum, RoundSupport, Terms};
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::{Job, JobError, Mechanism, MetricsRelease, Privacy};
use tributary_common::ledger::head::SignedHead;
use tributary_common::model::{Layout, Parameters, from_bytes, to_bytes};
use tributary_common::record::{RoundRecord, RunEvent};
use tributary_common::secagg::keys::MaskTerm;
use tributary_common::time::Time;

use crate::ledger::{Ledger, LedgerError};
use crate::round::{Aggregated, Dismissal, Effect, ImposedSets, Input, Masking, RoundMachine, Start};
use crate::store::{RunHead, Store, StoreError, StoredRun};

/// Why a run cannot go on in this process. What was committed is safe; open the run again to resume it.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The stored job is not one that this version can run.
    #[error("run {run}: the stored job cannot be run: {error}")]
    Job {
        /// The run.
        run: RunId,
        /// Why.
        error: JobError,
    },
    /// A stored model has another size than the job's.
    #[error("run {run}: the stored model has {found} parameters, but the job's has {expected}")]
    Model {
        /// The run.
        run: RunId,
        /// Parameters of the stored model.
        found: usize,
        /// Parameters of the job's model.
        expected: usize,
    },
    /// The run's updates cannot travel as its job asks.
    #[error("run {run}: {error}")]
    Exchange {
        /// The run.
        run: RunId,
        /// Why.
        error: ExchangeError,
    },
    /// The operating system gave no random bytes.
    #[error("run {0}: no random bytes for its secure-aggregation sessions")]
    Random(RunId),
    /// The run's ledger.
    #[error(transparent)]
    Ledger(Box<LedgerError>),
    /// A rule of one's own does not keep the job's promise.
    #[error("run {0}: the job's [privacy] needs the coordinator's own aggregation rule, not one of your own")]
    Rule(RunId),
    /// An upload that was verified can no longer be read.
    #[error("the staged update of {node} cannot be read again: {error}")]
    Staged {
        /// Whose.
        node: NodeName,
        /// Why.
        error: std::io::Error,
    },
}

impl From<LedgerError> for RunError {
    fn from(error: LedgerError) -> Self {
        RunError::Ledger(Box::new(error))
    }
}

/// What must be told to others, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Outgoing {
    /// Invite a node.
    Invite {
        /// The node.
        node: NodeName,
        /// The round.
        round: u32,
        /// The attempt.
        attempt: u32,
        /// The model to start from.
        model: Digest,
        /// When the attempt ends.
        deadline: Time,
        /// Under masks with top-k: the coordinates that every update has, encoded.
        support: Option<Arc<[u8]>>,
    },
    /// Say something to a node in an attempt's secure-aggregation session.
    Masking {
        /// The node.
        node: NodeName,
        /// The round.
        round: u32,
        /// The attempt.
        attempt: u32,
        /// The message, encoded.
        message: Vec<u8>,
    },
    /// Tell a node that an attempt is over for it.
    Dismiss {
        /// The node.
        node: NodeName,
        /// The round.
        round: u32,
        /// The attempt.
        attempt: u32,
        /// What became of its update.
        reason: Dismissal,
    },
    /// Ask a node to evaluate the published model.
    Evaluate {
        /// The node.
        node: NodeName,
        /// The round whose model it is.
        round: u32,
        /// The model.
        model: Digest,
    },
    /// Show the run's ledger head to the nodes whose updates are in the last round.
    LedgerHead {
        /// The nodes.
        nodes: Vec<NodeName>,
        /// The head.
        head: SignedHead,
    },
    /// Tell whoever watches.
    Event(Box<RunEvent>),
}

/// The content of an update: in memory as values or bytes, or in a file.
#[derive(Debug)]
pub enum Payload {
    /// The delta itself.
    Values(Arc<Vec<f32>>),
    /// `f32`, little endian.
    Bytes(Vec<u8>),
    /// A file of `f32`, little endian, from its start.
    File(File),
}

impl Payload {
    /// The bytes, if there are no more than `most`: a longer payload is cut there, and is then none of the right length.
    fn into_bytes(self, most: u64) -> std::io::Result<Vec<u8>> {
        Ok(match self {
            Payload::Values(values) => to_bytes(&values),
            Payload::Bytes(bytes) => bytes,
            Payload::File(mut file) => {
                file.seek(SeekFrom::Start(0))?;
                let mut bytes = Vec::new();
                file.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
                bytes
            }
        })
    }

    /// The values; or how many there are, where that is not `parameters`.
    fn into_values(self, parameters: usize) -> std::io::Result<Result<Arc<Vec<f32>>, usize>> {
        const PART_BYTES: usize = 1 << 20;
        let odd = || std::io::Error::new(std::io::ErrorKind::InvalidData, "not a whole number of values");
        let values = match self {
            Payload::Values(values) => values,
            Payload::Bytes(bytes) => Arc::new(from_bytes(&bytes).ok_or_else(odd)?),
            Payload::File(mut file) => {
                file.seek(SeekFrom::Start(0))?;
                let (mut values, mut found) = (Vec::with_capacity(parameters), 0);
                let mut part = Vec::with_capacity(PART_BYTES);
                loop {
                    part.clear();
                    file.by_ref().take(PART_BYTES as u64).read_to_end(&mut part)?;
                    if part.is_empty() {
                        break;
                    }
                    let read = from_bytes(&part).ok_or_else(odd)?;
                    found += read.len();
                    // Whatever is too long is counted, not kept.
                    if found <= parameters {
                        values.extend_from_slice(&read);
                    }
                }
                if found != parameters {
                    return Ok(Err(found));
                }
                Arc::new(values)
            }
        };
        Ok(if values.len() == parameters { Ok(values) } else { Err(values.len()) })
    }
}

/// A client's update, ready to be checked and summed.
#[derive(Debug)]
pub struct Update {
    /// The client.
    pub node: NodeName,
    /// The round that it is for.
    pub round: u32,
    /// Its weight.
    pub examples: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Digest of its bytes, where they crossed a wire and were verified.
    pub digest: Option<Digest>,
    /// Its content.
    pub payload: Payload,
}

/// What makes each round's model of its updates.
pub enum Rule {
    /// The rule that the job asks for: the weighted mean, or with `[privacy] mechanism = "gaussian"` a noised sum,
    /// whose noise is from here.
    OfTheJob(AddNoise),
    /// A rule of one's own. A run that may be resumed needs one that keeps nothing from round to round.
    Own(Box<dyn AggregationRule>),
}

impl Rule {
    fn of(self, id: RunId, job: &Job, head: &RunHead) -> Result<Box<dyn AggregationRule>, RunError> {
        Ok(match (self, noised_here(job)) {
            (Rule::OfTheJob(noise), Some(privacy)) => {
                Box::new(ClientLevel::new(job, privacy, head.clip_norm, noise))
            }
            (Rule::OfTheJob(_), None) => rule_of(job),
            (Rule::Own(_), Some(_)) => return Err(RunError::Rule(id)),
            (Rule::Own(rule), None) => rule,
        })
    }
}

/// The job's `[privacy]` table where the coordinator adds the noise.
fn noised_here(job: &Job) -> Option<&Privacy> {
    job.privacy.as_ref().filter(|privacy| privacy.mechanism == Mechanism::Gaussian)
}

impl Opening {
    /// A run whose models `rule` makes: cohorts are drawn, nothing is written into a ledger, and masks are left out.
    pub fn new(rule: Rule) -> Self {
        Self { imposed: None, rule, ledger: None, coordinator: None }
    }
}

/// One run, open in this process. After an error it must be dropped; opening it again resumes it.
pub struct Run {
    id: RunId,
    store: Arc<dyn Store>,
    machine: RoundMachine,
    layout: Layout,
    model: Parameters,
    exchange: Exchange,
    rule: Box<dyn AggregationRule>,
    /// The sum of masked updates, in place of the rule's.
    sum: Option<MaskedSum>,
    /// The coordinates of the open round's masked updates, where they are not all.
    support: Option<RoundSupport>,
    /// Digest of the support's state, as it is stored.
    support_state: Option<Digest>,
    /// Absent in a simulation without `[privacy]`.
    ledger: Option<Ledger>,
    /// The update that is being taken in, until the machine says whether to fold it.
    arriving: Option<Arriving>,
}

/// An update that was checked.
enum Arriving {
    /// Values.
    Plain(Contribution),
    /// The bytes of a masked one, of the right length.
    Masked(Vec<u8>),
}

/// How a run begins, beside what the store holds of it.
pub struct Opening {
    /// Accepted sets of an earlier run, in place of the drawing of cohorts.
    pub imposed: Option<ImposedSets>,
    /// What makes each round's model.
    pub rule: Rule,
    /// What the run promises and publishes is written into it.
    pub ledger: Option<Ledger>,
    /// Who the coordinator is, for secure-aggregation sessions: a hash of its certificate authority. `None` leaves the
    /// masks out where the job asks for them, which gives the same sums: for a simulation.
    pub coordinator: Option<[u8; 32]>,
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run").field("id", &self.id).field("machine", &self.machine).finish_non_exhaustive()
    }
}

impl Run {
    /// Opens a stored run: starts it, or resumes it where the store says that it stood.
    pub fn open(
        store: Arc<dyn Store>,
        id: RunId,
        now: Time,
        opening: Opening,
    ) -> Result<(Self, Vec<Outgoing>), RunError> {
        let Opening { imposed, rule, mut ledger, coordinator } = opening;
        let StoredRun { job_toml, head, open_attempt, .. } = store.run(id)?;
        let job = Job::parse(&job_toml).map_err(|error| RunError::Job { run: id, error })?;
        let layout = job.layout().map_err(|error| RunError::Job { run: id, error })?;
        let model = store.model(head.model)?;
        if model.len() != layout.parameters() {
            return Err(RunError::Model { run: id, found: model.len(), expected: layout.parameters() });
        }
        let exchange = Exchange::of(&job).map_err(|error| RunError::Exchange { run: id, error })?;
        let mut rule = rule.of(id, &job, &head)?;
        let support_state = head.support;
        let support = match support_state {
            Some(digest) => RoundSupport::stored(&job, &store.state(digest)?).map(Some),
            None => RoundSupport::first(&job),
        };
        let support = support.map_err(|error| RunError::Exchange { run: id, error })?;
        let evaluated = store.evaluations(id)?.iter().any(|record| record.round == head.published);
        let model_bytes = layout.parameters() as u64 * 4;
        let rounds = store.rounds(id)?;
        if let Some(ledger) = &mut ledger {
            ledger.catch_up(&rounds, now)?;
        }
        let is_last = |record: &RoundRecord| record.round == head.published && !record.spent;
        let last = rounds.into_iter().rev().find(is_last);
        let contributors = last.map(|record| record.accepted().cloned().collect()).unwrap_or_default();
        let masking = match (&exchange, coordinator) {
            (Exchange::Masked(masked), Some(server)) => {
                let support = support.as_ref().map(RoundSupport::digest);
                let terms = Terms::of(&job, id).map_err(|error| RunError::Exchange { run: id, error })?;
                let mut secret = [0; 32];
                rand::TryRng::try_fill_bytes(&mut rand::rngs::SysRng, &mut secret)
                    .map_err(|_| RunError::Random(id))?;
                let segments = masked.segment_count();
                Some(Masking { terms, server, support, segments, secret })
            }
            _ => None,
        };
        let session = masking.as_ref().map(|_| store.session(id)).transpose()?.flatten();
        let job = Arc::new(job);
        let start = Start {
            job,
            model_bytes,
            head,
            open_attempt,
            evaluated,
            contributors,
            imposed,
            masking,
            session,
        };
        let (machine, effects) = RoundMachine::new(now, start);
        // An attempt that was under way is not journalled again.
        rule.begin(machine.head().published.saturating_add(1), layout.parameters());
        let sum = exchange.masked().map(Masked::sum);
        let mut run = Self {
            id,
            store,
            machine,
            layout,
            model,
            exchange,
            rule,
            sum,
            support,
            support_state,
            ledger,
            arriving: None,
        };
        let mut outgoing = Vec::new();
        run.perform(now, effects, &mut outgoing)?;
        Ok((run, outgoing))
    }

    /// The run's id.
    pub fn id(&self) -> RunId {
        self.id
    }

    /// The job.
    pub fn job(&self) -> &Arc<Job> {
        self.machine.job()
    }

    /// The layout of the job's model.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where the run stands.
    pub fn head(&self) -> &RunHead {
        self.machine.head()
    }

    /// The last published model, or the initial one.
    pub fn model(&self) -> &Parameters {
        &self.model
    }

    /// Whether nothing more will happen.
    pub fn is_over(&self) -> bool {
        self.machine.is_over()
    }

    /// When [`Input::Tick`] is due, if nothing else happens before.
    pub fn next_tick(&self) -> Option<Time> {
        self.machine.next_tick()
    }

    /// The round and the attempt that are open: updates for them may be taken.
    pub fn open_attempt(&self) -> Option<(u32, u32)> {
        self.machine.open_attempt()
    }

    /// Fewest and most bytes of an update.
    pub fn update_bytes(&self) -> (u64, u64) {
        self.exchange.update_bytes()
    }

    /// Updates that the open attempt still waits for; none without an open attempt.
    pub fn awaited(&self) -> u32 {
        self.machine.awaited()
    }

    /// The open attempt, if an update of `node` for `round` would still be taken.
    pub fn wants(&self, node: &NodeName, round: u32) -> Option<u32> {
        self.machine.wants(node, round)
    }

    /// Whether `node`'s update for `round` is already in the open attempt's sum.
    pub fn has(&self, node: &NodeName, round: u32) -> bool {
        self.machine.has(node, round)
    }

    /// The run's ledger.
    pub fn ledger(&mut self) -> Option<&mut Ledger> {
        self.ledger.as_mut()
    }

    /// Takes one input. Updates go to [`Run::update`] instead.
    pub fn handle(&mut self, now: Time, input: Input) -> Result<Vec<Outgoing>, RunError> {
        let mut outgoing = Vec::new();
        let effects = self.machine.step(now, input);
        self.perform(now, effects, &mut outgoing)?;
        Ok(outgoing)
    }

    /// Takes a client's update: checks all of it, and only then adds it.
    pub fn update(&mut self, now: Time, update: Update) -> Result<Vec<Outgoing>, RunError> {
        let Update { node, round, examples, bytes, digest, payload } = update;
        if self.machine.wants(&node, round).is_none() {
            return Ok(Vec::new());
        }
        let arriving = self.read(&node, examples, payload)?;
        let private = self.job().privacy.is_some();
        let before =
            self.ledger.as_ref().filter(|_| private).and_then(|ledger| ledger.payload_of(&node, round));
        if before.is_some_and(|before| digest.is_some_and(|now| now != before)) {
            let detail = "another payload than in an earlier attempt: one charge pays for one payload".into();
            return self.handle(now, Input::Refused { node, round, bytes, detail });
        }
        // The record may not hold the digest of what was not noised yet.
        let digest = digest.filter(|_| noised_here(self.job()).is_none());
        let input = match arriving {
            Ok(arriving) => {
                self.arriving = Some(arriving);
                Input::Update { node, round, examples, bytes, digest }
            }
            Err(detail) => Input::Refused { node, round, bytes, detail },
        };
        let outgoing = self.handle(now, input);
        self.arriving = None;
        outgoing
    }

    /// An update, checked; or why it is refused, in one line.
    fn read(
        &self,
        node: &NodeName,
        examples: u64,
        payload: Payload,
    ) -> Result<Result<Arriving, String>, RunError> {
        let expected = self.layout.parameters();
        let staged = |error| RunError::Staged { node: node.clone(), error };
        let values = match (&self.exchange, payload) {
            (Exchange::Masked(masked), payload) => {
                let bytes = payload.into_bytes(masked.update_bytes()).map_err(staged)?;
                let checked = masked.check(&bytes).map_err(|error| error.to_string());
                return Ok(checked.map(|()| Arriving::Masked(bytes)));
            }
            (Exchange::Plain(plain), payload) if !plain.is_dense() => {
                let bytes = payload.into_bytes(plain.update_bytes().1).map_err(staged)?;
                plain.decode(&bytes).map(Arc::new).map_err(|error| error.to_string())
            }
            (Exchange::Plain(_), payload) => {
                let values = payload.into_values(expected).map_err(staged)?;
                values.map_err(|found| AggregateError::WrongLength { expected, found }.to_string())
            }
        };
        let contribution = values.and_then(|values| {
            match Contribution::new(node.clone(), examples, values, expected) {
                // A refusal would be on record, and tell what the noise is to hide.
                Err(_) if noised_here(self.job()).is_some() => {
                    Ok(Contribution::nothing(node.clone(), expected))
                }
                contribution => contribution.map_err(|error| error.to_string()),
            }
        });
        Ok(contribution.map(Arriving::Plain))
    }

    fn perform(
        &mut self,
        now: Time,
        effects: Vec<Effect>,
        outgoing: &mut Vec<Outgoing>,
    ) -> Result<(), RunError> {
        for effect in effects {
            match effect {
                Effect::Journal(attempt) => {
                    self.rule.begin(attempt.round, self.layout.parameters());
                    self.sum = self.exchange.masked().map(Masked::sum);
                    self.store.journal_attempt(self.id, &attempt)?;
                }
                Effect::Fold { .. } => match (self.arriving.take(), &mut self.sum) {
                    (Some(Arriving::Plain(contribution)), _) => self.rule.add(contribution),
                    (Some(Arriving::Masked(bytes)), Some(sum)) => {
                        sum.add(&bytes).map_err(|error| RunError::Exchange { run: self.id, error })?
                    }
                    _ => {}
                },
                Effect::Aggregate { unmask } => {
                    let (round, job) = (self.machine.head().published.saturating_add(1), self.machine.job());
                    if let Some(ledger) = &mut self.ledger
                        && noised_here(job).is_some()
                    {
                        ledger.noised(round, job, now)?;
                    }
                    let answer = self.aggregate(unmask.as_deref())?;
                    let effects = self.machine.step(now, Input::Aggregated(answer));
                    self.perform(now, effects, outgoing)?;
                }
                Effect::Commit { record, head } => {
                    let head =
                        RunHead { clip_norm: self.rule.clip_norm(), support: self.support_state, ..head };
                    self.store.commit_round(self.id, &record, &head)?;
                    self.store.collect_garbage()?;
                    if let Some(ledger) = &mut self.ledger {
                        ledger.ended(&record, now)?;
                        let head = ledger.head();
                        let nodes = record.accepted().cloned().collect();
                        outgoing.push(Outgoing::LedgerHead { nodes, head });
                    }
                }
                Effect::RecordEvaluation(record) => {
                    self.store.put_evaluation(self.id, &record)?;
                    let noised = |privacy: &Privacy| privacy.metrics == MetricsRelease::Noised;
                    if let Some(ledger) = &mut self.ledger
                        && self.machine.job().privacy.as_ref().is_some_and(noised)
                    {
                        ledger.evaluated(&record, now)?;
                    }
                }
                Effect::Finish(state) => {
                    self.store.set_state(self.id, &state)?;
                    if let Some(ledger) = &mut self.ledger {
                        ledger.over(now)?;
                    }
                }
                Effect::Invite { node, round, attempt, model, deadline } => {
                    let support = self.support.as_ref().map(RoundSupport::encoded);
                    outgoing.push(Outgoing::Invite { node, round, attempt, model, deadline, support });
                }
                Effect::JournalSession(session) => self.store.journal_session(self.id, &session)?,
                Effect::Masking { node, round, attempt, message } => {
                    outgoing.push(Outgoing::Masking { node, round, attempt, message });
                }
                Effect::Dismiss { node, round, attempt, reason } => {
                    outgoing.push(Outgoing::Dismiss { node, round, attempt, reason });
                }
                Effect::Evaluate { node, round, model } => {
                    outgoing.push(Outgoing::Evaluate { node, round, model })
                }
                Effect::Event(event) => outgoing.push(Outgoing::Event(event)),
            }
        }
        Ok(())
    }

    /// The new model, stored; or why there is none. The masks of `unmask` are taken off the sum first.
    fn aggregate(&mut self, unmask: Option<&[MaskTerm]>) -> Result<Result<Aggregated, String>, RunError> {
        let (parameters, round) = (self.layout.parameters(), self.machine.head().published.saturating_add(1));
        let mut summation = None;
        let next = match (self.exchange.masked(), self.sum.take()) {
            (Some(masked), Some(mut sum)) => {
                let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
                let support = self.support.as_ref();
                let opened =
                    sum.unmask(unmask.unwrap_or_default(), threads).and_then(|()| masked.open(sum, round));
                match opened {
                    Ok(opened) => {
                        let next =
                            masked.next_model(&self.model, &opened, self.machine.job(), round, support);
                        summation = Some(opened);
                        next
                    }
                    Err(error) => Err(AggregateError::Rule(error.to_string())),
                }
            }
            _ => self.rule.finish(&self.model),
        };
        let values = match next.and_then(|next| check_model(&next, parameters).map(|()| next)) {
            Ok(values) => values,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let model = self.store.put_model(&values)?;
        self.model = Arc::new(values);
        if let (Some(support), Some(summation)) = (&self.support, &summation) {
            let next = support
                .next(self.machine.job(), round, summation)
                .map_err(|error| RunError::Exchange { run: self.id, error })?;
            self.support_state = Some(self.store.put_state(&next.state())?);
            self.support = Some(next);
        }
        let support = self.support.as_ref().map(RoundSupport::digest);
        Ok(Ok(Aggregated { model, summed: summation.and_then(|summation| summation.summed), support }))
    }
}

#[cfg(test)]
mod masked_tests;
#[cfg(test)]
mod tests;
