//! One simulated run: the coordinator's core and the nodes' machines over memory, with a virtual clock.
//!
//! Models and updates travel as shared values; bytes are counted, not made. Each computation ends at a virtual
//! time that the scenario alone decides, and what happens is told to the cores in the order of (virtual time,
//! client), whatever thread finishes first: so the number of workers decides no bit and no record. [`schedule`]
//! decides which computation is done when in real time, and bounds the updates in memory.

mod nodes;
mod schedule;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tributary_client::machine::{Attempt, Effect, Failure, Input, Kept, NodeMachine, RoundKey, Trained};
use tributary_client::trainer::{ClientUpdate, EVALUATION_BATCH, Task, TrainError};
use tributary_common::aggregate::{AggregationRule, WeightedMean};
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::{Job, JobError};
use tributary_common::model::Parameters;
use tributary_common::record::{Metrics, Reason, RunEvent, RunState};
use tributary_common::time::Time;
use tributary_server::round::{self, ImposedSets};
use tributary_server::run::{Outgoing, Payload, Run, RunError, Update};
use tributary_server::store::{MemoryStore, Store, StoreError};

pub use self::schedule::HELD_UPDATES_BYTES;

use self::nodes::{Index, Population};
use self::schedule::Backlog;
use crate::scenario::{Federation, Scenario};
use crate::workers::{MakeTrainer, Outcome, Pool, Work};

/// Virtual time of one SGD step.
pub const STEP_MILLISECONDS: u64 = 1;
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
    /// A rule of one's own that makes each round's model of its updates; absent, [`WeightedMean`].
    pub rule: Option<Box<dyn AggregationRule>>,
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
}

/// A computation that a node waits for.
struct Computation {
    key: RoundKey,
    /// When it ends, and the place of its end among the events.
    ends: (Time, u64),
    tickets: Range<u64>,
}

/// A node that has, or just had, something to do.
struct Node {
    machine: NodeMachine,
    computation: Option<Computation>,
    /// What training produced, until it is delivered.
    update: Option<ClientUpdate>,
    /// When the attempt that it was invited to ends.
    deadline: Time,
}

/// What is to be done next, in order.
enum Action {
    Node(Index, Input),
    Run(round::Input),
    Update(Index, Attempt, Update),
}

/// What is due at a later virtual time.
enum Event {
    /// A node's computation ends.
    Computed,
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
    let pool = Pool::start(workers, &settings.trainer)?;
    let rule = settings.rule.unwrap_or_else(|| Box::new(WeightedMean::default()));
    let (run, outgoing) = Run::open(store, RUN, Time(0), settings.imposed, rule)?;

    let population = Population::new(scenario, federation);
    let gathered = round::Input::Present { nodes: population.roles(|_| true) };
    let mut simulation = Simulation {
        job: run.job().clone(),
        run,
        now: Time(0),
        population,
        nodes: BTreeMap::new(),
        actions: VecDeque::new(),
        events: BTreeMap::new(),
        scheduled: 0,
        backlog: Backlog::new(pool, workers, layout.parameters() as u64 * 4),
        observe,
    };
    simulation.send(outgoing);
    simulation.actions.push_back(Action::Run(gathered));
    let deserted = simulation.until_over(stop)?;
    let Simulation { run, .. } = &simulation;
    Ok(Finished {
        state: run.head().state.clone(),
        deserted,
        published: run.head().published,
        model: run.model().clone(),
    })
}

struct Simulation<'a> {
    run: Run,
    job: Arc<Job>,
    now: Time,
    population: Population,
    nodes: BTreeMap<Index, Node>,
    actions: VecDeque<Action>,
    /// By time, client, and the order in which they were made.
    events: BTreeMap<(Time, Index, u64), Event>,
    scheduled: u64,
    backlog: Backlog,
    observe: &'a mut dyn FnMut(Observation<'_>),
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
        match self.events.get(&at) {
            Some(Event::Computed) => {
                let Some(answer) = self.answer(index, stop) else { return };
                self.now = self.now.max(time);
                self.actions.push_back(Action::Node(index, answer));
            }
            None => return,
        }
        self.events.remove(&at);
    }

    /// Waits for what `index` computes; `None` when the simulation is to stop.
    fn answer(&mut self, index: Index, stop: &AtomicBool) -> Option<Input> {
        let node = self.nodes.get_mut(&index)?;
        let Computation { key, tickets, .. } = node.computation.as_ref()?;
        let key = *key;
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
        let result = sum(outcomes).map_err(|detail| {
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
                let outgoing = self.run.handle(self.now, input)?;
                self.send(outgoing);
            }
            Action::Update(index, at, update) => {
                let outgoing = self.run.update(self.now, update)?;
                self.actions.push_back(Action::Node(index, Input::UploadDone { at }));
                self.send(outgoing);
            }
            Action::Node(index, input) => {
                let now = self.now;
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
                let machine = self.population.machine(index)?;
                Some(entry.insert(Node { machine, computation: None, update: None, deadline: Time(0) }))
            }
        }
    }

    /// Carries what the coordinator says to the nodes and to whoever follows.
    fn send(&mut self, outgoing: Vec<Outgoing>) {
        for message in outgoing {
            let (node, input) = match message {
                Outgoing::Event(event) => {
                    if matches!(*event, RunEvent::RoundStarted { .. }) {
                        self.nodes.retain(|_, node| !node.machine.is_idle());
                    }
                    (self.observe)(Observation::Event(&event));
                    continue;
                }
                Outgoing::Invite { node, round, attempt, model, deadline } => {
                    let at = Attempt { run: RUN, round, attempt };
                    (node, Input::Invited { at, job: Ok(self.job.clone()), model, deadline })
                }
                Outgoing::Dismiss { node, round, attempt, reason } => {
                    (node, Input::Dismissed { at: Attempt { run: RUN, round, attempt }, reason })
                }
                Outgoing::Evaluate { node, round, model } => {
                    let key = RoundKey { run: RUN, round };
                    (node, Input::EvaluationAsked { key, job: Ok(self.job.clone()), model })
                }
            };
            if let Some(index) = self.population.find(&node) {
                self.actions.push_back(Action::Node(index, input));
            }
        }
    }

    /// Performs what a node asks for; whatever needs no computation happens at once.
    fn perform(&mut self, index: Index, effect: Effect) {
        let Some(name) = self.population.name(index).cloned() else { return };
        let answer = match effect {
            Effect::Fetch { model, .. } if model == self.run.head().model => {
                Input::ModelReady { model, parameters: self.run.model().clone() }
            }
            Effect::Fetch { model, .. } => {
                Input::FetchFailed { model, detail: "the coordinator has a newer model".into() }
            }
            Effect::Train { key, job, model } => return self.train(index, name, key, job, model),
            Effect::Evaluate { key, job, model } => {
                let parts = self.population.to_evaluate_on(index, EVALUATION_BATCH);
                let part = |shard| Work::Evaluate { job: job.clone(), model: model.clone(), shard };
                let tickets = self.backlog.evaluate(parts.into_iter().map(part).collect());
                return self.begin(index, self.now, key, tickets);
            }
            Effect::CancelTraining => {
                let computation = self.nodes.get_mut(&index).and_then(|node| node.computation.take());
                let Some(Computation { key, ends: (end, place), tickets }) = computation else { return };
                self.events.remove(&(end, index, place));
                self.backlog.cancel(tickets);
                Input::Trained { key, result: Err(training_failed("cancelled".into())) }
            }
            Effect::Store { key, model } => {
                let Some(update) = self.nodes.get(&index).and_then(|node| node.update.as_ref()) else {
                    return;
                };
                let bytes = update.delta.len() as u64 * 4;
                let kept = Kept { model, digest: None, bytes, examples: update.examples, stored: self.now };
                Input::Stored { key, result: Ok(kept) }
            }
            Effect::Upload { at, update: Kept { bytes, examples, digest, .. } } => {
                match self.nodes.get_mut(&index).and_then(|node| node.update.take()) {
                    // In memory nothing is lost on the way: the values need not be kept for a second upload.
                    Some(update) => {
                        let payload = Payload::Values(Arc::new(update.delta));
                        let update = Update { node: name, round: at.round, examples, bytes, digest, payload };
                        return self.actions.push_back(Action::Update(index, at, update));
                    }
                    None if self.run.has(&name, at.round) => Input::UploadDone { at },
                    None => Input::UploadRefused { at, detail: "the update was delivered before".into() },
                }
            }
            Effect::Forget { .. } => {
                self.nodes.get_mut(&index).into_iter().for_each(|node| node.update = None);
                return;
            }
            Effect::Decline { at, reason, detail } => {
                (self.observe)(Observation::Declined { client: &name, round: at.round, detail: &detail });
                let Attempt { round, attempt, .. } = at;
                let input = round::Input::Declined { node: name, round, attempt, reason };
                return self.actions.push_back(Action::Run(input));
            }
            Effect::Report { key, metrics } => {
                let input = round::Input::Evaluated { node: name, round: key.round, metrics };
                return self.actions.push_back(Action::Run(input));
            }
            Effect::Event(_) | Effect::CancelFetch | Effect::Exit => return,
        };
        self.actions.push_back(Action::Node(index, answer));
    }

    fn train(&mut self, index: Index, name: NodeName, key: RoundKey, job: Arc<Job>, model: Parameters) {
        let Some(shard) = self.population.to_train_on(index) else { return };
        let examples = shard.len() as u64;
        let batch = u64::from(job.train.batch_size).min(examples);
        let task = Task { job, round: key.round, client: name, model, max_steps: None };
        let steps = task.steps(examples);
        let end = self.now + steps.saturating_mul(STEP_MILLISECONDS);
        let timely = self.nodes.get(&index).is_some_and(|node| end <= node.deadline);
        let work = Work::Train { task, shard };
        let tickets = self.backlog.train(work, end, steps.saturating_mul(batch), timely);
        self.begin(index, end, key, tickets);
    }

    fn begin(&mut self, index: Index, end: Time, key: RoundKey, tickets: Range<u64>) {
        let place = self.schedule(end, index, Event::Computed);
        if let Some(node) = self.node(index) {
            node.computation = Some(Computation { key, ends: (end, place), tickets });
        }
    }

    fn schedule(&mut self, at: Time, index: Index, event: Event) -> u64 {
        self.scheduled += 1;
        self.events.insert((at, index, self.scheduled), event);
        self.scheduled
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
