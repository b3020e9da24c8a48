//! One simulated run: the coordinator's core and the nodes' machines over memory, with a virtual clock.
//!
//! Models and updates travel as shared values and bytes are counted, not made, unless [`Transport::Wire`] is asked
//! for; both end in the same model. Each computation ends at a virtual time that the scenario alone decides, and
//! what happens is told to the cores in the order of (virtual time, client), whatever thread finishes first: so the
//! number of workers decides no bit and no record. `schedule` decides which computation is done when in real time,
//! and bounds the updates in memory.
//!
//! Updates that are compressed, noised in shares or masked are real bytes. With masks every client of an attempt has a
//! session with real keys (`sessions`), unless they are left out ([`Masks::Off`]): then the same integers are summed
//! without, which gives the same models in less time.
//!
//! Devices and faults act through the inputs that a real federation has too: messages and transfers that take time,
//! connections that end and begin, updates that are refused or come twice. A client's upload is part of its
//! computation here, so that no update is in memory while it is virtually under way.

mod connections;
mod encoding;
mod nodes;
mod presence;
mod schedule;
mod sessions;
mod timing;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tributary_client::machine::{
    Attempt, Dismissal, Effect, Failure, Input, Kept, NodeMachine, Role, RoundKey, Trained,
};
use tributary_client::trainer::{ClientUpdate, EVALUATION_BATCH, Task, TrainError};
use tributary_common::aggregate::AggregationRule;
use tributary_common::compression::residual::{Outcome as Settled, ResidualJournal};
use tributary_common::digest::Digest;
use tributary_common::exchange::{Exchange, ExchangeError};
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::{Job, JobError};
use tributary_common::model::{self, Parameters};
use tributary_common::privacy::release::{Protection, Release as ReleaseKind};
use tributary_common::privacy::{counts, noise};
use tributary_common::record::{Metrics, Reason, RunEvent, RunState};
use tributary_common::time::Time;
use tributary_server::ledger::{Ledger, LedgerError};
use tributary_server::round::{self, ImposedSets};
use tributary_server::run::{Opening, Outgoing, Payload, Rule, Run, RunError, Update};
use tributary_server::store::{MemoryStore, Store, StoreError};

pub(crate) use self::encoding::expected_update_bytes;
pub use self::schedule::HELD_UPDATES_BYTES;
pub use self::timing::{Timing, duration};

use self::nodes::{Index, Population};
use self::presence::Presence;
use self::schedule::Backlog;
use self::sessions::{COORDINATOR, Joined, Reply, Sessions};
use self::timing::Clock;
use crate::devices::{Device, Devices};
use crate::faults::{Corruption, Dropout, Faults, Straggling};
use crate::scenario::{Federation, Scenario};
use crate::wire::{CrossingError, Wire};
use crate::workers::{MakeTrainer, Outcome, Pool, Work};

/// Longest virtual time without an open attempt: after it too few clients will come.
const LONGEST_WAIT_SECONDS: u32 = 30 * 86_400;
/// Largest cohort whose masks are not left out unless that is asked for.
const MASKED_BY_DEFAULT: u32 = 64;
/// The one run of a simulation; it enters no random stream.
const RUN: RunId = RunId(1);

/// Why a simulation cannot go on. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum SimulationError {
    /// The coordinator's core refused.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The job has no layout, or cannot be written down.
    #[error(transparent)]
    Job(#[from] JobError),
    /// A thread cannot be started.
    #[error("a worker thread cannot be started ({0}): give fewer --workers")]
    Thread(#[from] std::io::Error),
    /// The imposed record does not fit the scenario.
    #[error("the replayed record does not fit: {0}")]
    Replay(String),
    /// The run's ledger.
    #[error(transparent)]
    Ledger(Box<LedgerError>),
    /// The job's updates cannot travel as it asks.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// A rule of one's own needs to see updates.
    #[error(
        "a rule of your own sees single updates, which [secure_aggregation] hides: leave one of them out"
    )]
    Rule,
    /// A message did not survive its encoding.
    #[error("a message did not cross the wire: {0}")]
    Wire(#[from] CrossingError),
}

impl From<LedgerError> for SimulationError {
    fn from(error: LedgerError) -> Self {
        SimulationError::Ledger(Box::new(error))
    }
}

/// How models, updates and messages travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Transport {
    /// As shared values; bytes are counted.
    #[default]
    Memory,
    /// As the chunks and messages of a real federation, encoded, checked and decoded.
    Wire,
}

/// Whether the masks of a job with `[secure_aggregation]` are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Masks {
    /// Each client has a session with real keys, as in a real federation.
    On,
    /// The same integers are summed without masks: same models, less time. No message of a session is sent or counted.
    Off,
}

impl Masks {
    /// What is done where nobody says: masks are made for cohorts of up to 64.
    pub fn by_default(job: &Job) -> Self {
        if job.invited() <= MASKED_BY_DEFAULT { Self::On } else { Self::Off }
    }
}

/// How a simulation runs, beside the scenario.
pub struct Settings {
    /// Worker threads, from 1.
    pub workers: usize,
    /// Makes each worker's trainer.
    pub trainer: MakeTrainer,
    /// The model to start from; absent, the run's own stream draws it.
    pub initial: Option<Vec<f32>>,
    /// Accepted sets of an earlier run to impose.
    pub imposed: Option<ImposedSets>,
    /// How models, updates and messages travel.
    pub transport: Transport,
    /// A rule of one's own that makes each round's model of its updates; absent, the one that the job asks for.
    pub rule: Option<Box<dyn AggregationRule>>,
    /// Whether masks are made, where the job asks for them; absent, [`Masks::by_default`].
    pub masks: Option<Masks>,
    /// Whether the trainer draws a job's noise from secret bits: without it, nothing is private.
    pub has_secret_noise: bool,
}

impl Settings {
    /// The defaults: a model drawn from the run's own stream, cohorts drawn, over memory, the weighted mean.
    pub fn new(workers: usize, trainer: MakeTrainer) -> Self {
        Self {
            workers,
            trainer,
            initial: None,
            imposed: None,
            transport: Transport::Memory,
            rule: None,
            masks: None,
            has_secret_noise: true,
        }
    }
}

/// One thing to tell whoever follows the simulation.
#[derive(Debug)]
pub enum Observation<'a> {
    /// Something happened in the run.
    Event(&'a RunEvent),
    /// A client declined: what its own log would say.
    Declined {
        /// The client.
        client: &'a NodeName,
        /// The round.
        round: u32,
        /// Why, in one line.
        detail: &'a str,
    },
    /// An evaluation failed: what the node's own log would say.
    EvaluationFailed {
        /// The node.
        client: &'a NodeName,
        /// Why, in one line.
        detail: &'a str,
    },
}

/// What a run left; its records were observed as they were made.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub state: RunState,
    /// Whether it was stopped because too few clients are left that can take part in another round.
    pub deserted: bool,
    /// Rounds published.
    pub published: u32,
    /// The last published model, or the initial one.
    pub model: Parameters,
    /// How long the real federation would have taken.
    pub timing: Timing,
    /// The export of the run's privacy ledger, as a coordinator's would be; absent without `[privacy]`.
    pub ledger: Option<String>,
    /// Values of masked updates that were cut to `coordinate_limit`.
    pub values_cut: u64,
}

/// When something ends, and its place among the events; absent while the node is not connected.
type Ends = Option<(Time, u64)>;

/// A computation that a node waits for, with the upload of what it makes.
struct Computation {
    key: RoundKey,
    /// When the update has arrived, or when a fault ends the node's work; `None` also for one that never answers.
    ends: Ends,
    /// When the computation itself is done: a lost connection does not stop it.
    computed: Time,
    /// While the connection is lost: milliseconds of the upload that are left.
    left: Option<u64>,
    /// Empty where nothing is computed, for nobody would see it.
    tickets: Range<u64>,
}

/// A model on its way to a node.
struct Download {
    model: Digest,
    ends: Ends,
    /// While the connection is lost: milliseconds that are left.
    left: u64,
}

/// A node that has, or just had, something to do.
struct Node {
    machine: NodeMachine,
    device: Device,
    download: Option<Download>,
    computation: Option<Computation>,
    /// What training produced, until it is encoded or, if it is sent as it is, delivered.
    update: Option<ClientUpdate>,
    /// The encoded update, until it is delivered.
    encoded: Option<Vec<u8>>,
    /// Its part in the session of the attempt.
    session: Option<Joined>,
    /// When the attempt that it was invited to ends.
    deadline: Time,
}

/// What is to be done next, in order.
#[derive(Debug)]
enum Action {
    Node(Index, Input),
    /// A message of an attempt's session reaches a node.
    Session(Index, Attempt, Vec<u8>),
    Run(round::Input),
    Update {
        index: Index,
        at: Attempt,
        update: Update,
        again: bool,
    },
    /// A client dies once its update is delivered.
    FallSilent(Index),
    /// The client's fault is over.
    Revive(Index),
}

/// What is due at a later virtual time.
#[derive(Debug)]
enum Event {
    /// A node's computation ends, and its update is there.
    Computed,
    /// A node's model is there.
    Downloaded,
    /// A message reaches a node, if it comes over this connection.
    ToNode(u32, Action),
    /// A message reaches the coordinator.
    ToRun(round::Input),
    /// A device comes or goes.
    ComesOrGoes,
    /// A client falls silent until the attempt ends.
    FallsSilent,
    /// A client dies.
    Crashes,
    /// It is there again.
    Rejoins,
}

/// Runs `scenario` over `federation` to its end, or until `stop` is set: then the run is stopped as by its operator.
///
/// # Errors
/// A [`SimulationError`]; a run that fails by its own rules is no error but a [`Finished::state`].
pub fn simulate(
    scenario: &Scenario,
    federation: Federation,
    settings: Settings,
    stop: &AtomicBool,
    observe: &mut dyn FnMut(Observation<'_>),
) -> Result<Finished, SimulationError> {
    let layout = scenario.job.layout()?;
    let store = Arc::new(MemoryStore::keeping_the_last());
    let initial = settings.initial.unwrap_or_else(|| layout.initial(scenario.job.seed));
    let digest = store.put_model(&initial)?;
    drop(initial);
    store.create_run(RUN, &scenario.job.to_toml()?, digest, Time(0))?;
    let workers = settings.workers.max(1);
    let trainer = match &scenario.attacks {
        Some(attacks) => attacks.among(&federation, &scenario.job, settings.trainer),
        None => settings.trainer,
    };
    let pool = Pool::start(workers, &trainer)?;
    let masked = scenario.job.secure_aggregation.is_some();
    if masked && settings.rule.is_some() {
        return Err(SimulationError::Rule);
    }
    let exchange = Exchange::of(&scenario.job)?;
    let of_the_job = || Rule::OfTheJob(Box::new(noise::add_gaussian));
    let rule = settings.rule.map_or_else(of_the_job, Rule::Own);
    // Virtual time has no hours; and without secret noise there is nothing to account for.
    let accounted = scenario.job.privacy.is_some() && settings.has_secret_noise;
    let ledger = accounted
        .then(|| Ledger::in_memory(RUN, &scenario.job, &scenario.job.to_toml()?, Time(0)))
        .transpose()?;
    let masks = settings.masks.unwrap_or_else(|| Masks::by_default(&scenario.job));
    let coordinator = (masks == Masks::On).then_some(COORDINATOR);
    let opening = Opening { imposed: settings.imposed, rule, ledger, coordinator };
    let (run, outgoing) = Run::open(store, RUN, Time(0), opening)?;

    let devices = federation.devices.clone();
    let population = Population::new(scenario, federation);
    let sessions = match exchange.masked() {
        Some(masked) if masks == Masks::On => {
            let names = population.indices().filter_map(|index| Some((index, population.name(index)?)));
            Some(Sessions::new(run.job(), masked, &scenario.policy, names)?)
        }
        _ => None,
    };
    let wire = match settings.transport {
        Transport::Memory => None,
        Transport::Wire => Some(Wire::new(RUN, run.job())?),
    };
    let update_bytes = expected_update_bytes(&scenario.job, &exchange);
    let mut simulation = Simulation {
        job: run.job().clone(),
        wire,
        run,
        now: Time(0),
        population,
        nodes: BTreeMap::new(),
        actions: VecDeque::new(),
        events: BTreeMap::new(),
        scheduled: 0,
        backlog: Backlog::new(pool, workers, layout.parameters() as u64 * 4),
        update_bytes,
        exchange: Arc::new(exchange),
        sessions,
        residuals: BTreeMap::new(),
        values_cut: 0,
        observe,
        devices,
        faults: Faults::new(scenario.job.seed, scenario.faults.clone()),
        presence: Presence::default(),
        changes: BTreeMap::new(),
        roll: Roll::default(),
        idle_since: Time(0),
        clock: Clock::default(),
    };
    simulation.send(outgoing);
    simulation.gather();
    let deserted = simulation.until_over(stop)?;
    let ledger = simulation.run.ledger().map(|ledger| ledger.export()).transpose()?;
    let Simulation { run, .. } = &simulation;
    Ok(Finished {
        ledger,
        state: run.head().state.clone(),
        deserted,
        published: run.head().published,
        model: run.model().clone(),
        timing: simulation.clock.read(simulation.now),
        values_cut: simulation.values_cut,
    })
}

/// The open attempt's members, as far as faults treat them apart.
#[derive(Default)]
struct Roll {
    /// Members not called yet.
    to_call: u32,
    called: usize,
    /// Places in the cohort.
    stragglers: BTreeSet<usize>,
    straggling: BTreeSet<Index>,
    /// Who has crashed: nobody crashes twice in an attempt.
    crashed: BTreeSet<Index>,
}

struct Simulation<'a> {
    run: Run,
    job: Arc<Job>,
    /// Absent, everything travels as shared values.
    wire: Option<Wire>,
    now: Time,
    population: Population,
    nodes: BTreeMap<Index, Node>,
    actions: VecDeque<Action>,
    /// By time, client, and the order in which they were made.
    events: BTreeMap<(Time, Index, u64), Event>,
    scheduled: u64,
    backlog: Backlog,
    exchange: Arc<Exchange>,
    /// How many bytes an update is expected to have: for how long an upload takes.
    update_bytes: u64,
    /// Absent, nothing is masked.
    sessions: Option<Sessions>,
    /// What clients' updates left out; of those that left anything.
    residuals: BTreeMap<Index, ResidualJournal>,
    values_cut: u64,
    observe: &'a mut dyn FnMut(Observation<'_>),
    devices: Devices,
    faults: Faults,
    presence: Presence,
    /// How often each device has come or gone.
    changes: BTreeMap<Index, u32>,
    roll: Roll,
    /// When the last attempt ended.
    idle_since: Time,
    clock: Clock,
}

impl Simulation<'_> {
    /// Goes on until the run is over; whether it had to be stopped because nothing was under way and nothing due.
    fn until_over(&mut self, stop: &AtomicBool) -> Result<bool, SimulationError> {
        let (mut stopping, mut deserted) = (false, false);
        loop {
            while let Some(action) = self.actions.pop_front() {
                self.act(action)?;
            }
            if self.run.is_over() {
                return Ok(deserted);
            }
            if stop.load(Ordering::Relaxed) && !stopping {
                stopping = true;
                self.actions.push_back(Action::Run(round::Input::Stop));
                continue;
            }
            self.backlog.hand_out(self.run.awaited());
            let first = self.events.first_key_value().map(|(at, _)| *at);
            let patience = self.idle_since.plus_seconds(LONGEST_WAIT_SECONDS);
            let first = first.filter(|at| self.run.open_attempt().is_some() || at.0 <= patience);
            match (first, self.run.next_tick()) {
                (Some(at), tick) if tick.is_none_or(|tick| at.0 <= tick) => self.happen(at, stop),
                (_, Some(tick)) => {
                    self.now = self.now.max(tick);
                    self.actions.push_back(Action::Run(round::Input::Tick));
                }
                (_, None) => {
                    (stopping, deserted) = (true, true);
                    self.actions.push_back(Action::Run(round::Input::Stop));
                }
            }
        }
    }

    /// Lets the event at `at` happen; one that waits for an answer stays when the simulation is to stop.
    fn happen(&mut self, at: (Time, Index, u64), stop: &AtomicBool) {
        let (time, index, _) = at;
        let answer = match self.events.get(&at) {
            Some(Event::Computed) => match self.answer(index, stop) {
                Some(answer) => Some(answer),
                None => return,
            },
            _ => None,
        };
        let Some(event) = self.events.remove(&at) else { return };
        self.now = self.now.max(time);
        match event {
            Event::Computed => self.actions.extend(answer.map(|answer| Action::Node(index, answer))),
            Event::Downloaded => {
                let download = self.nodes.get_mut(&index).and_then(|node| node.download.take());
                let input = download.map(|download| self.downloaded(download.model));
                self.actions.extend(input.map(|input| Action::Node(index, input)));
            }
            Event::ToNode(connection, action) => {
                if self.presence.connection(index) == connection {
                    self.actions.push_back(action);
                }
            }
            Event::ToRun(input) => self.actions.push_back(Action::Run(input)),
            Event::ComesOrGoes => {
                let online = !self.presence.is_online(index);
                if self.presence.set_online(index, online) {
                    self.connection_changed(index);
                }
                self.schedule_change(index);
            }
            Event::FallsSilent => self.fall_silent(index, true),
            Event::Crashes => {
                self.roll.crashed.insert(index);
                self.fall_silent(index, false);
                let rejoin = self.now + self.faults.rejoin_milliseconds();
                self.schedule(rejoin, index, Event::Rejoins);
            }
            Event::Rejoins => self.actions.push_back(Action::Revive(index)),
        }
    }

    /// Waits for what `index` computes; `None` when the simulation is to stop.
    fn answer(&mut self, index: Index, stop: &AtomicBool) -> Option<Input> {
        let name = self.population.name(index)?;
        let node = self.nodes.get_mut(&index)?;
        let Computation { key, tickets, .. } = node.computation.as_ref()?;
        let key = *key;
        let is_training = tickets.clone().any(|ticket| self.backlog.is_training(ticket));
        let is_wanted = match &self.sessions {
            None => self.run.wants(name, key.round).is_some(),
            // Updates are taken only once keys are exchanged: it may be trained before.
            Some(_) => self.run.open_attempt().is_some_and(|open| open.0 == key.round),
        };
        if is_training && !is_wanted {
            // Its attempt is over, and the dismissal still under way: what nobody takes need not be computed.
            let at = Attempt { run: RUN, round: key.round, attempt: u32::MAX };
            return Some(Input::Dismissed { at, reason: Dismissal::NotUsed });
        }
        let mut outcomes = self.backlog.take(tickets.clone(), self.run.awaited(), stop)?;
        node.computation = None;
        if let Some(Outcome::Trained(result)) = outcomes.pop_if(|o| matches!(o, Outcome::Trained(_))) {
            let result = result.map_err(training_failed).map(|update| {
                let trained = Trained { examples: update.examples, loss: update.loss };
                node.update = Some(update);
                trained
            });
            return Some(Input::Trained { key, result });
        }
        // As a node does: what is told of a client's own examples is noised where the job says so.
        let noise = match ReleaseKind::Metrics.protection(&self.job, node.machine.public_test()) {
            Protection::Noise => self.job.privacy.as_ref().and_then(|privacy| privacy.metrics_noise),
            _ => None,
        };
        let noised = |metrics: Metrics| match noise {
            Some(deviation) => {
                counts::noised(&metrics, self.job.model.classes, deviation).map_err(|error| error.to_string())
            }
            None => Ok(metrics),
        };
        let result = sum(outcomes).and_then(noised).map_err(|detail| {
            if let Some(client) = self.population.name(index) {
                (self.observe)(Observation::EvaluationFailed { client, detail: &detail });
            }
            training_failed(detail)
        });
        Some(Input::Evaluated { key, result })
    }

    fn act(&mut self, action: Action) -> Result<(), SimulationError> {
        match action {
            Action::Run(input) => {
                let input = match &self.wire {
                    Some(wire) => wire.to_coordinator(input)?,
                    None => input,
                };
                let outgoing = self.run.handle(self.now, input)?;
                self.send(outgoing);
            }
            Action::Update { index, at, update, again } => {
                let name = update.node.clone();
                if self.run.wants(&name, at.round).is_some() {
                    self.clock.arrival(self.now);
                }
                let copy = match &update.payload {
                    Payload::Values(values) if again => Some(Payload::Values(values.clone())),
                    Payload::Bytes(bytes) if again => Some(Payload::Bytes(bytes.clone())),
                    _ => None,
                };
                let Update { round, examples, bytes, digest, .. } = update;
                let mut outgoing = self.run.update(self.now, update)?;
                if let Some(payload) = copy {
                    let update = Update { node: name, round, examples, bytes, digest, payload };
                    outgoing.extend(self.run.update(self.now, update)?);
                }
                self.actions.push_back(Action::Node(index, Input::UploadDone { at }));
                self.send(outgoing);
            }
            Action::FallSilent(index) => self.fall_silent(index, true),
            Action::Revive(index) => {
                if self.presence.revive(index) {
                    self.connection_changed(index);
                }
            }
            Action::Node(index, _) | Action::Session(index, ..) if !self.presence.is_connected(index) => {}
            Action::Session(index, at, message) => {
                let message = match &self.wire {
                    Some(wire) => wire.session_to_node(self.now, at, message)?,
                    None => message,
                };
                self.hear(index, at, &message);
            }
            Action::Node(index, input) => {
                let now = self.now;
                let input = match &self.wire {
                    Some(wire) => wire.to_node(now, input)?,
                    None => input,
                };
                let Some(node) = self.node(index) else { return Ok(()) };
                if let Input::Invited { deadline, .. } = &input {
                    node.deadline = *deadline;
                }
                let effects = node.machine.step(now, input);
                for effect in effects {
                    self.perform(index, effect);
                }
            }
        }
        Ok(())
    }

    /// A node; one that had nothing to do is made anew.
    fn node(&mut self, index: Index) -> Option<&mut Node> {
        match self.nodes.entry(index) {
            Entry::Occupied(entry) => Some(entry.into_mut()),
            Entry::Vacant(entry) => {
                let (machine, name) = (self.population.machine(index)?, self.population.name(index)?);
                let device = match self.population.role(index)? {
                    Role::Trainer => self.devices.of(name, index as usize),
                    Role::Evaluator => Device::IDEAL,
                };
                Some(entry.insert(Node {
                    machine,
                    device,
                    download: None,
                    computation: None,
                    update: None,
                    encoded: None,
                    session: None,
                    deadline: Time(0),
                }))
            }
        }
    }

    /// Carries what the coordinator says to the nodes and to whoever follows.
    fn send(&mut self, outgoing: Vec<Outgoing>) {
        for message in outgoing {
            let (node, input) = match message {
                Outgoing::Masking { node, round, attempt, message } => {
                    let at = Attempt { run: RUN, round, attempt };
                    if let Some(index) = self.population.find(&node)
                        && self.presence.is_connected(index)
                    {
                        self.tell(index, Action::Session(index, at, message));
                    }
                    continue;
                }
                Outgoing::Event(event) => {
                    match &*event {
                        RunEvent::RoundStarted { round, attempt, invited } => {
                            self.nodes.retain(|_, node| !node.machine.is_idle());
                            let stragglers = self.faults.stragglers(*round, *attempt, *invited as usize);
                            self.roll = Roll { to_call: *invited, stragglers, ..Roll::default() };
                        }
                        RunEvent::RoundEnded { record } => self.attempt_ended(record),
                        _ => {}
                    }
                    (self.observe)(Observation::Event(&event));
                    continue;
                }
                Outgoing::LedgerHead { .. } => continue,
                Outgoing::Invite { node, round, attempt, model, deadline, support } => {
                    let at = Attempt { run: RUN, round, attempt };
                    (node, Input::Invited { at, job: Ok(self.job.clone()), model, deadline, support })
                }
                Outgoing::Dismiss { node, round, attempt, reason } => {
                    (node, Input::Dismissed { at: Attempt { run: RUN, round, attempt }, reason })
                }
                Outgoing::Evaluate { node, round, model } => {
                    let key = RoundKey { run: RUN, round };
                    (node, Input::EvaluationAsked { key, job: Ok(self.job.clone()), model })
                }
            };
            let Some(index) = self.population.find(&node) else { continue };
            if matches!(input, Input::Invited { .. }) {
                self.roll.call(index);
            }
            if self.presence.is_connected(index) {
                self.tell(index, Action::Node(index, input));
            }
        }
    }

    /// Sends a message to a connected node: what it is to do when it is there.
    fn tell(&mut self, index: Index, action: Action) {
        match self.node(index).map_or(0, |node| node.device.message()) {
            0 => self.actions.push_back(action),
            latency => {
                let connection = self.presence.connection(index);
                self.schedule(self.now + latency, index, Event::ToNode(connection, action));
            }
        }
    }

    /// A node takes a message of an attempt's session; one of another attempt's says nothing to it.
    fn hear(&mut self, index: Index, at: Attempt, message: &[u8]) {
        let (Some(sessions), Some(node)) = (&mut self.sessions, self.nodes.get_mut(&index)) else { return };
        let Some(joined) = node.session.as_mut().filter(|joined| joined.at() == at) else { return };
        for reply in sessions.receive(index, joined, &self.job, message) {
            match reply {
                Reply::Send(message) => self.say(index, at, message),
                Reply::Keyed => self.actions.push_back(Action::Node(index, Input::Keyed { at })),
                Reply::Failed(failure) => {
                    self.actions.push_back(Action::Node(index, Input::SessionFailed { at, failure }));
                }
            }
        }
    }

    /// Sends a node's message of an attempt's session.
    fn say(&mut self, index: Index, at: Attempt, message: Vec<u8>) {
        let Some(node) = self.population.name(index).cloned() else { return };
        let Attempt { round, attempt, .. } = at;
        self.answer_back(index, round::Input::Masking { node, round, attempt, message });
    }

    /// Begins a node's part in a session, or says again what it said last.
    fn join(&mut self, index: Index, at: Attempt, model: Digest, support: Option<&[u8]>) {
        let Some(sessions) = &mut self.sessions else {
            // Without masks there is nothing to wait for.
            return self.actions.push_back(Action::Node(index, Input::Keyed { at }));
        };
        let (Some(name), Some(node)) = (self.population.name(index), self.nodes.get_mut(&index)) else {
            return;
        };
        if let Some(joined) = node.session.as_ref().filter(|joined| joined.at() == at) {
            if let Some(message) = joined.again() {
                self.say(index, at, message);
            }
            return;
        }
        match sessions.begin(index, name, at, model, support) {
            Ok((joined, message)) => {
                node.session = Some(joined);
                self.say(index, at, message);
            }
            Err(failure) => {
                self.actions.push_back(Action::Node(index, Input::SessionFailed { at, failure }));
            }
        }
    }

    /// Sends a node's message to the coordinator.
    fn answer_back(&mut self, index: Index, input: round::Input) {
        match self.node(index).map_or(0, |node| node.device.message()) {
            0 => self.actions.push_back(Action::Run(input)),
            latency => {
                self.schedule(self.now + latency, index, Event::ToRun(input));
            }
        }
    }

    /// Performs what a node asks for; whatever needs no computation happens at once.
    fn perform(&mut self, index: Index, effect: Effect) {
        let Some(name) = self.population.name(index).cloned() else { return };
        let answer = match effect {
            Effect::Fetch { model, bytes } => {
                self.cancel_download(index);
                match self.node(index).map_or(0, |node| node.device.download(bytes)) {
                    0 => self.downloaded(model),
                    time => {
                        let end = self.now + time;
                        let ends = Some((end, self.schedule(end, index, Event::Downloaded)));
                        if let Some(node) = self.node(index) {
                            node.download = Some(Download { model, ends, left: 0 });
                        }
                        return;
                    }
                }
            }
            Effect::CancelFetch => return self.cancel_download(index),
            // A simulated client has no account: the job's own limit was checked before the run.
            Effect::Charge { key, .. } => Input::Charged { key, result: Ok(()) },
            Effect::Train { key, job, model } => return self.train(index, name, key, job, model),
            Effect::Evaluate { key, job, model } => {
                let parts = self.population.to_evaluate_on(index, EVALUATION_BATCH);
                let part = |shard| Work::Evaluate { job: job.clone(), model: model.clone(), shard };
                let tickets = self.backlog.evaluate(parts.into_iter().map(part).collect());
                let (now, ends) = (self.now, Some((self.now, Event::Computed)));
                return self.begin(index, key, now, ends, tickets);
            }
            Effect::CancelTraining => {
                let computation = self.nodes.get_mut(&index).and_then(|node| node.computation.take());
                let Some(Computation { key, ends, tickets, .. }) = computation else { return };
                self.unschedule(index, ends);
                self.backlog.cancel(tickets);
                Input::Trained { key, result: Err(training_failed("cancelled".into())) }
            }
            Effect::Join { at, model, support, .. } => {
                return self.join(index, at, model, support.as_deref());
            }
            Effect::Leave { at } => {
                if let Some(node) = self.nodes.get_mut(&index) {
                    node.session.take_if(|joined| joined.at() == at);
                }
                return;
            }
            Effect::Store { at, model, support, .. } => {
                let result = self.store(index, &name, at, model, support.as_deref());
                Input::Stored { key: at.key(), result }
            }
            Effect::Upload { at, update: mut kept } => {
                let node = self.nodes.get_mut(&index);
                let encoded = node.and_then(|node| {
                    let encoded = node.encoded.take().map(Payload::Bytes);
                    encoded.or_else(|| Some(Payload::Values(Arc::new(node.update.take()?.delta))))
                });
                match encoded {
                    // Nothing is lost on the way: the update need not be kept for a second upload.
                    Some(mut payload) => {
                        let fate = self.faults.fate(at.round, at.attempt, &name);
                        if let Some(corruption) = fate.corruption {
                            let (damaged, bytes, digest) = damage(payload, corruption, kept.masked);
                            payload = damaged;
                            // The client means what it sends.
                            (kept.bytes, kept.digest) = (bytes, kept.digest.map(|_| digest));
                        }
                        match self.carry(name, at, kept, payload) {
                            Ok(update) => {
                                let again = fate.is_sent_twice;
                                self.actions.push_back(Action::Update { index, at, update, again });
                                if fate.dropout == Some(Dropout::AfterUpload) {
                                    self.actions.push_back(Action::FallSilent(index));
                                }
                                return;
                            }
                            Err(error) => Input::UploadRefused { at, detail: error.to_string() },
                        }
                    }
                    None if self.run.has(&name, at.round) => Input::UploadDone { at },
                    None => Input::UploadRefused { at, detail: "the update was delivered before".into() },
                }
            }
            Effect::Settle { key, outcome } => return self.settle(index, key.round, outcome),
            Effect::Forget { key } => {
                if let Some(node) = self.nodes.get_mut(&index) {
                    (node.update, node.encoded) = (None, None);
                }
                return self.settle(index, key.round, Settled::Unknown);
            }
            Effect::Decline { at, reason, detail } => {
                let Attempt { round, attempt, .. } = at;
                // What concerns an attempt that is over is nobody's news.
                if self.run.open_attempt() == Some((round, attempt)) {
                    (self.observe)(Observation::Declined { client: &name, round, detail: &detail });
                }
                return self
                    .answer_back(index, round::Input::Declined { node: name, round, attempt, reason });
            }
            Effect::Report { key, metrics } => {
                let input = round::Input::Evaluated { node: name, round: key.round, metrics };
                return self.answer_back(index, input);
            }
            Effect::Event(_) | Effect::Exit => return,
        };
        self.actions.push_back(Action::Node(index, answer));
    }

    /// An update as the coordinator's core gets it.
    fn carry(
        &self,
        node: NodeName,
        at: Attempt,
        kept: Kept,
        payload: Payload,
    ) -> Result<Update, CrossingError> {
        if let Some(wire) = &self.wire {
            let bytes = match payload {
                Payload::Values(values) => model::to_bytes(&values),
                Payload::Bytes(bytes) => bytes,
                Payload::File(_) => return Err(CrossingError::Parts("an update is in memory here")),
            };
            return wire.upload(&node, at, &kept, bytes);
        }
        let Kept { bytes, examples, digest, .. } = kept;
        Ok(Update { node, round: at.round, examples, bytes, digest, payload })
    }

    /// The answer to a fetch whose model is there.
    fn downloaded(&mut self, model: Digest) -> Input {
        if model != self.run.head().model {
            return Input::FetchFailed { model, detail: "the coordinator has a newer model".into() };
        }
        let present = self.run.model();
        let fetched = match &mut self.wire {
            Some(wire) => wire.fetch(model, present),
            None => Ok(present.clone()),
        };
        match fetched {
            Ok(parameters) => Input::ModelReady { model, parameters },
            Err(error) => Input::FetchFailed { model, detail: error.to_string() },
        }
    }

    fn cancel_download(&mut self, index: Index) {
        let download = self.nodes.get_mut(&index).and_then(|node| node.download.take());
        self.unschedule(index, download.and_then(|download| download.ends));
    }

    fn train(&mut self, index: Index, name: NodeName, key: RoundKey, job: Arc<Job>, model: Parameters) {
        let Some(shard) = self.population.to_train_on(index) else { return };
        let Some((device, deadline)) = self.node(index).map(|node| (node.device, node.deadline)) else {
            return;
        };
        let examples = shard.len() as u64;
        let attempt = self.run.open_attempt().filter(|open| open.0 == key.round).map_or(1, |open| open.1);
        let fate = self.faults.fate(key.round, attempt, &name);
        if fate.dropout == Some(Dropout::BeforeTraining) {
            return self.fall_silent(index, true);
        }
        let lot = self.roll.straggling.contains(&index);
        let lot = lot.then(|| self.faults.straggling(&fate, &job, examples));
        let max_steps = match lot {
            Some(Straggling::Steps(steps)) => Some(steps),
            _ => None,
        };
        let declared_examples = self.population.declared_examples(index);
        let batch = match job.train.sampling_rate {
            Some(rate) => (rate * examples as f64).ceil() as u64,
            None => u64::from(job.train.batch_size).min(examples),
        };
        let bytes = self.update_bytes;
        let task = Task { job, round: key.round, client: name, model, declared_examples, max_steps };
        let steps = task.steps(examples);
        let computed = self.now + device.training(steps, fate.slowness);
        let crash = fate.crash.filter(|_| !self.roll.crashed.contains(&index));
        let in_vain = if let Some(share) = crash {
            Some(Some((self.now + device.training(steps, fate.slowness * share), Event::Crashes)))
        } else if lot == Some(Straggling::Never) {
            Some(None)
        } else if fate.dropout == Some(Dropout::AfterTraining) {
            Some(Some((computed, Event::FallsSilent)))
        } else {
            None
        };
        if let Some(ends) = in_vain {
            return self.begin(index, key, computed, ends, 0..0);
        }
        let arrival = computed + device.upload(bytes);
        let work = Work::Train { task, shard };
        let cost = steps.saturating_mul(batch);
        let tickets = self.backlog.train(work, arrival, cost, arrival <= deadline);
        self.begin(index, key, computed, Some((arrival, Event::Computed)), tickets);
    }

    /// A node waits for `tickets`, which are computed at `computed` and end with an event, or never.
    fn begin(
        &mut self,
        index: Index,
        key: RoundKey,
        computed: Time,
        ends: Option<(Time, Event)>,
        tickets: Range<u64>,
    ) {
        let ends = ends.map(|(end, event)| (end, self.schedule(end, index, event)));
        if let Some(node) = self.node(index) {
            node.computation = Some(Computation { key, ends, computed, left: None, tickets });
        }
    }

    fn schedule(&mut self, at: Time, index: Index, event: Event) -> u64 {
        self.scheduled += 1;
        self.events.insert((at, index, self.scheduled), event);
        self.scheduled
    }

    fn unschedule(&mut self, index: Index, ends: Ends) {
        if let Some((at, place)) = ends {
            self.events.remove(&(at, index, place));
        }
    }
}

impl Roll {
    /// The attempt's members are invited in the order of their places; later invitations are repeated ones.
    fn call(&mut self, index: Index) {
        if self.to_call > 0 {
            self.to_call -= 1;
            if self.stragglers.contains(&self.called) {
                self.straggling.insert(index);
            }
            self.called += 1;
        }
    }
}

/// An update that is none, with its length and digest. Nobody can see a wrong value under masks: a masked one is short.
fn damage(payload: Payload, corruption: Corruption, masked: bool) -> (Payload, u64, Digest) {
    match payload {
        Payload::Values(mut values) => {
            let delta = Arc::make_mut(&mut values);
            match corruption {
                Corruption::NotFinite => {
                    delta.first_mut().into_iter().for_each(|value| *value = f32::NAN);
                }
                Corruption::TooShort => drop(delta.pop()),
            }
            let (bytes, digest) = (delta.len() as u64 * 4, model::digest(delta));
            (Payload::Values(values), bytes, digest)
        }
        Payload::Bytes(mut bytes) => {
            match corruption {
                Corruption::NotFinite if !masked => {
                    bytes.first_mut().into_iter().for_each(|byte| *byte ^= 0xff);
                }
                _ => drop(bytes.pop()),
            }
            let (length, digest) = (bytes.len() as u64, Digest::of(&bytes));
            (Payload::Bytes(bytes), length, digest)
        }
        file @ Payload::File(_) => (file, 0, Digest::of(&[])),
    }
}

/// The whole evaluation from its parts, added in order as one evaluation adds its batches.
fn sum(parts: Vec<Outcome>) -> Result<Metrics, String> {
    let mut whole = Metrics::default();
    for part in parts {
        match part {
            Outcome::Evaluated(metrics) => whole.add(&metrics?),
            Outcome::Trained(_) => {}
        }
    }
    if whole.loss_sum.is_finite() { Ok(whole) } else { Err(TrainError::LossNotFinite.to_string()) }
}

fn training_failed(detail: String) -> Failure {
    Failure { reason: Reason::Training, detail }
}
