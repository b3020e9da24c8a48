//! One simulated run: the coordinator's core and the nodes' machines over memory, with a virtual clock.
//!
//! Models and updates travel as shared values; bytes are counted, not made. Each computation ends at a virtual
//! time that the job alone decides ([`STEP_MILLISECONDS`] per SGD step), and answers are delivered in the order of
//! (virtual time, client), whatever thread finishes first: so the number of workers decides no bit and no record.
//! Work is handed out in that same order, a little ahead of what is delivered, so that the updates in memory are
//! bounded by the number of workers and not by the cohort.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tributary_client::data::Split;
use tributary_client::machine::{
    Attempt, Effect, ExampleCounts, Failure, Input, Kept, NodeMachine, Profile, Role, RoundKey, Trained,
};
use tributary_client::partition::{Share, Shift};
use tributary_client::shard::Shard;
use tributary_client::trainer::{ClientUpdate, Task};
use tributary_common::aggregate::{AggregationRule, WeightedMean};
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::{Job, JobError};
use tributary_common::model::Parameters;
use tributary_common::record::{EvaluationRecord, Reason, RoundRecord, RunEvent, RunState};
use tributary_common::time::Time;
use tributary_server::round::{self, ImposedSets};
use tributary_server::run::{Outgoing, Payload, Run, RunError, Update};
use tributary_server::store::{MemoryStore, Store, StoreError};

use crate::scenario::{Federation, Scenario};
use crate::workers::{MakeTrainer, Outcome, Pool, Work};

/// Virtual time of one SGD step.
pub const STEP_MILLISECONDS: u64 = 1;
/// Work handed out and not yet delivered, per worker: one in hand, one waiting for its turn.
const AHEAD_PER_WORKER: usize = 2;
/// The one run of a simulation; it enters no random stream.
const RUN: RunId = RunId(1);
/// How often a waiting simulation looks whether it is to stop.
const PATIENCE: Duration = Duration::from_millis(100);

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

/// What a run left.
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
    /// The record of every attempt, with virtual times.
    pub rounds: Vec<RoundRecord>,
    /// The evaluations, by round.
    pub evaluations: Vec<EvaluationRecord>,
}

/// The parts of a data set as the trainer takes them: the training and the test examples, each in one buffer.
#[derive(Debug, Clone)]
struct Buffers {
    train: Arc<Split>,
    test: Arc<Split>,
}

#[derive(Debug)]
struct Client {
    train: Arc<[u32]>,
    test: Arc<[u32]>,
    /// How it sees its training examples.
    shift: Option<Arc<Shift>>,
    role: Role,
}

/// A computation that a node waits for.
struct Pending {
    key: RoundKey,
    /// Until it is handed out.
    work: Option<Work>,
    ticket: u64,
    stop: Arc<AtomicBool>,
}

/// What is to be done next, in order.
enum Action {
    Node(NodeName, Input),
    Run(round::Input),
    Update(NodeName, Attempt, Update),
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
    let store = Arc::new(MemoryStore::default());
    let initial = settings.initial.unwrap_or_else(|| layout.initial(scenario.job.seed));
    let digest = store.put_model(&initial)?;
    store.create_run(RUN, &scenario.job.to_toml()?, digest, Time(0))?;
    let pool = Pool::start(settings.workers.max(1), &settings.trainer)?;
    let rule = settings.rule.unwrap_or_else(|| Box::new(WeightedMean::default()));
    let (run, outgoing) = Run::open(store.clone(), RUN, Time(0), settings.imposed, rule)?;

    let population = Population::new(scenario, federation);
    let gathered = population.clients.iter().map(|(name, client)| (name.clone(), client.role));
    let gathered = round::Input::Present { nodes: gathered.collect() };
    let mut simulation = Simulation {
        job: run.job().clone(),
        run,
        now: Time(0),
        population,
        nodes: BTreeMap::new(),
        actions: VecDeque::new(),
        pending: BTreeMap::new(),
        due: BTreeMap::new(),
        answers: BTreeMap::new(),
        updates: BTreeMap::new(),
        pool,
        handed_out: BTreeSet::new(),
        cancelled: BTreeSet::new(),
        ahead: settings.workers.max(1) * AHEAD_PER_WORKER,
        tickets: 0,
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
        rounds: store.rounds(RUN)?,
        evaluations: store.evaluations(RUN)?,
    })
}

/// Who there is, with which examples.
struct Population {
    clients: BTreeMap<NodeName, Client>,
    buffers: Buffers,
    trainer: Arc<Profile>,
    evaluator: Arc<Profile>,
}

impl Population {
    fn new(scenario: &Scenario, federation: Federation) -> Self {
        let Federation { dataset, shares } = federation;
        let profile = |role| Profile {
            role,
            policy: scenario.policy.clone(),
            example_shape: dataset.example_shape.clone(),
            classes: dataset.classes,
            drain_seconds: 0,
        };
        let (trainer, evaluator) = (Arc::new(profile(Role::Trainer)), Arc::new(profile(Role::Evaluator)));
        let client = |share: Share| {
            let Share { name, train, test, shift } = share;
            (name, Client { train, test, shift, role: Role::Trainer })
        };
        let mut clients: BTreeMap<NodeName, Client> = shares.into_iter().map(client).collect();
        let buffers = Buffers { train: dataset.train, test: dataset.test };
        let held_out = Shard::whole(buffers.test.clone());
        if !held_out.is_empty() {
            let client =
                Client { train: [].into(), test: held_out.indices, shift: None, role: Role::Evaluator };
            clients.insert(evaluators_name(&clients), client);
        }
        Self { clients, buffers, trainer, evaluator }
    }

    fn shard(&self, name: &NodeName, test: bool) -> Option<Shard> {
        let client = self.clients.get(name)?;
        let (examples, indices, shift) = if test {
            (&self.buffers.test, &client.test, &None)
        } else {
            (&self.buffers.train, &client.train, &client.shift)
        };
        Some(Shard { examples: examples.clone(), indices: indices.clone(), shift: shift.clone() })
    }

    fn machine(&self, name: &NodeName) -> Option<NodeMachine> {
        let client = self.clients.get(name)?;
        let profile = match client.role {
            Role::Trainer => &self.trainer,
            Role::Evaluator => &self.evaluator,
        };
        let examples = ExampleCounts { train: client.train.len() as u64, test: client.test.len() as u64 };
        let mut machine = NodeMachine::new(profile.clone(), examples, []);
        machine.step(Time(0), Input::Connected);
        Some(machine)
    }
}

/// A name for the held-out set's node that no client has.
fn evaluators_name(clients: &BTreeMap<NodeName, Client>) -> NodeName {
    let names = (1..).map(|n| if n == 1 { "evaluator".to_owned() } else { format!("evaluator-{n}") });
    let mut free = names.filter_map(|name| name.parse().ok()).skip_while(|name| clients.contains_key(name));
    loop {
        // The names never end, so there is a free one.
        if let Some(name) = free.next() {
            return name;
        }
    }
}

struct Simulation<'a> {
    run: Run,
    job: Arc<Job>,
    now: Time,
    population: Population,
    /// The nodes that have, or just had, something to do.
    nodes: BTreeMap<NodeName, NodeMachine>,
    actions: VecDeque<Action>,
    /// By when, and for whom, it ends.
    pending: BTreeMap<(Time, NodeName), Pending>,
    /// When each node's computation ends: it has one at a time.
    due: BTreeMap<NodeName, Time>,
    /// Answers that wait for their turn, by ticket.
    answers: BTreeMap<u64, Outcome>,
    /// What training produced, until it is delivered.
    updates: BTreeMap<NodeName, ClientUpdate>,
    pool: Pool,
    /// Tickets at the workers, or answered and not delivered.
    handed_out: BTreeSet<u64>,
    /// Tickets at the workers whose answers nobody waits for.
    cancelled: BTreeSet<u64>,
    ahead: usize,
    tickets: u64,
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
            self.hand_out();
            let first = self.pending.keys().next().cloned();
            match (first, self.run.next_tick()) {
                (Some(at), tick) if tick.is_none_or(|tick| at.0 <= tick) => self.deliver(at, stop),
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

    /// Hands work out in the order in which its answers will be delivered.
    fn hand_out(&mut self) {
        for pending in self.pending.values_mut() {
            if self.handed_out.len() >= self.ahead {
                return;
            }
            if let Some(work) = pending.work.take() {
                self.handed_out.insert(pending.ticket);
                self.pool.assign(pending.ticket, work, pending.stop.clone());
            }
        }
    }

    /// Waits for the answer that is due at `at`, and delivers it; gives up when the simulation is to stop.
    fn deliver(&mut self, at: (Time, NodeName), stop: &AtomicBool) {
        let Some((ticket, key)) = self.pending.get(&at).map(|pending| (pending.ticket, pending.key)) else {
            return;
        };
        while !self.answers.contains_key(&ticket) {
            match self.pool.answer(PATIENCE) {
                Some((answered, outcome)) => {
                    if self.cancelled.remove(&answered) {
                        self.handed_out.remove(&answered);
                        self.hand_out();
                    } else {
                        self.answers.insert(answered, outcome);
                    }
                }
                None if stop.load(Ordering::Relaxed) => return,
                None => {}
            }
        }
        self.pending.remove(&at);
        self.handed_out.remove(&ticket);
        let (time, name) = at;
        self.due.remove(&name);
        self.now = self.now.max(time);
        let input = match self.answers.remove(&ticket) {
            Some(Outcome::Trained(Ok(update))) => {
                let trained = Trained { examples: update.examples, loss: update.loss };
                self.updates.insert(name.clone(), update);
                Input::Trained { key, result: Ok(trained) }
            }
            Some(Outcome::Trained(Err(detail))) => {
                Input::Trained { key, result: Err(training_failed(detail)) }
            }
            Some(Outcome::Evaluated(Ok(metrics))) => Input::Evaluated { key, result: Ok(metrics) },
            Some(Outcome::Evaluated(Err(detail))) => {
                (self.observe)(Observation::EvaluationFailed { client: &name, detail: &detail });
                Input::Evaluated { key, result: Err(training_failed(detail)) }
            }
            None => return,
        };
        self.actions.push_back(Action::Node(name, input));
    }

    fn act(&mut self, action: Action) -> Result<(), SimulationError> {
        match action {
            Action::Run(input) => {
                let outgoing = self.run.handle(self.now, input)?;
                self.send(outgoing);
            }
            Action::Update(name, at, update) => {
                let outgoing = self.run.update(self.now, update)?;
                self.actions.push_back(Action::Node(name, Input::UploadDone { at }));
                self.send(outgoing);
            }
            Action::Node(name, input) => {
                let machine = match self.nodes.remove(&name) {
                    Some(machine) => Some(machine),
                    None => self.population.machine(&name),
                };
                let Some(mut machine) = machine else { return Ok(()) };
                let effects = machine.step(self.now, input);
                self.nodes.insert(name.clone(), machine);
                for effect in effects {
                    self.perform(&name, effect);
                }
            }
        }
        Ok(())
    }

    /// Carries what the coordinator says to the nodes and to whoever follows.
    fn send(&mut self, outgoing: Vec<Outgoing>) {
        for message in outgoing {
            let (node, input) = match message {
                Outgoing::Event(event) => {
                    if matches!(*event, RunEvent::RoundStarted { .. }) {
                        self.nodes.retain(|_, machine| !machine.is_idle());
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
            self.actions.push_back(Action::Node(node, input));
        }
    }

    /// Performs what a node asks for; whatever needs no computation happens at once.
    fn perform(&mut self, name: &NodeName, effect: Effect) {
        let answer = match effect {
            Effect::Fetch { model, .. } if model == self.run.head().model => {
                Input::ModelReady { model, parameters: self.run.model().clone() }
            }
            Effect::Fetch { model, .. } => {
                Input::FetchFailed { model, detail: "the coordinator has a newer model".into() }
            }
            Effect::Train { key, job, model } => {
                let Some(shard) = self.population.shard(name, false) else { return };
                let steps = job.train.steps(shard.len() as u64);
                let task = Task { job, round: key.round, client: name.clone(), model, max_steps: None };
                let end = self.now + steps.saturating_mul(STEP_MILLISECONDS);
                return self.begin(name, end, key, Work::Train { task, shard });
            }
            Effect::Evaluate { key, job, model } => {
                let Some(shard) = self.population.shard(name, true) else { return };
                return self.begin(name, self.now, key, Work::Evaluate { job, model, shard });
            }
            Effect::CancelTraining => {
                let at = self.due.remove(name).map(|end| (end, name.clone()));
                let Some(pending) = at.and_then(|at| self.pending.remove(&at)) else { return };
                pending.stop.store(true, Ordering::Relaxed);
                if self.answers.remove(&pending.ticket).is_some() {
                    self.handed_out.remove(&pending.ticket);
                } else if pending.work.is_none() {
                    self.cancelled.insert(pending.ticket);
                }
                Input::Trained { key: pending.key, result: Err(training_failed("cancelled".into())) }
            }
            Effect::Store { key, model } => {
                let Some(update) = self.updates.get(name) else { return };
                let bytes = update.delta.len() as u64 * 4;
                let kept = Kept { model, digest: None, bytes, examples: update.examples, stored: self.now };
                Input::Stored { key, result: Ok(kept) }
            }
            Effect::Upload { at, update: Kept { bytes, examples, digest, .. } } => {
                match self.updates.remove(name) {
                    // In memory nothing is lost on the way: the values need not be kept for a second upload.
                    Some(update) => {
                        let payload = Payload::Values(Arc::new(update.delta));
                        let update =
                            Update { node: name.clone(), round: at.round, examples, bytes, digest, payload };
                        return self.actions.push_back(Action::Update(name.clone(), at, update));
                    }
                    None => Input::UploadRefused { at, detail: "the update was delivered before".into() },
                }
            }
            Effect::Forget { .. } => {
                self.updates.remove(name);
                return;
            }
            Effect::Decline { at, reason, detail } => {
                (self.observe)(Observation::Declined { client: name, round: at.round, detail: &detail });
                let Attempt { round, attempt, .. } = at;
                let input = round::Input::Declined { node: name.clone(), round, attempt, reason };
                return self.actions.push_back(Action::Run(input));
            }
            Effect::Report { key, metrics } => {
                let input = round::Input::Evaluated { node: name.clone(), round: key.round, metrics };
                return self.actions.push_back(Action::Run(input));
            }
            Effect::Event(_) | Effect::CancelFetch | Effect::Exit => return,
        };
        self.actions.push_back(Action::Node(name.clone(), answer));
    }

    fn begin(&mut self, name: &NodeName, end: Time, key: RoundKey, work: Work) {
        self.tickets += 1;
        let pending = Pending { key, work: Some(work), ticket: self.tickets, stop: Arc::default() };
        self.pending.insert((end, name.clone()), pending);
        self.due.insert(name.clone(), end);
    }
}

fn training_failed(detail: String) -> Failure {
    Failure { reason: Reason::Training, detail }
}
