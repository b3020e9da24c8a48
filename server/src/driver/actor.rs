//! The driver's work: what each command does, synchronous, on the one thread that owns it. A fault simulation gives the
//! commands itself, at times of its own.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::Job;
use tributary_common::ledger::head::SignedHead;
use tributary_common::ledger::record::LedgerHash;
use tributary_common::privacy::noise;
use tributary_common::progress::{Line, Progress};
use tributary_common::record::{Metrics, Participation, RoundOutcome, RoundRecord, RunEvent, RunState};
use tributary_common::time::{Clock, Time};

use super::{Attempt, Command, Current, Happened, Standing, StopError, ToNode};
use crate::ledger::Ledgers;
use crate::round::{Dismissal, Input, Role};
use crate::run::{Opening, Outgoing, Rule, Run, RunError, Update};
use crate::store::{Store, StoreError, StoredRun};

/// The thread looks at the clock at least so often, in case it is set.
const CLOCK_CHECK: Duration = Duration::from_secs(60);
/// Runs that ended last, of which a node that comes back is told; their messages fit into its queue.
const ENDED_RUNS: usize = 16;

/// A node with an open control stream.
struct Node {
    role: Role,
    connection: u64,
    /// `None` once it did not read its messages.
    outbox: Option<mpsc::Sender<ToNode>>,
}

struct Active {
    run: Run,
    job_toml: Arc<str>,
    /// Makes the lines that are logged.
    progress: Progress,
    /// The last ended attempt.
    last: Option<RoundRecord>,
}

/// All that the driver's thread owns. After an error it must be dropped, as if the process had ended; what it had stored
/// is where the next one goes on.
pub struct Actor {
    // Dropped before the nodes' queues: a stream whose queue ends then sees that the driver is gone.
    current: watch::Sender<Option<Current>>,
    happened: broadcast::Sender<Arc<Happened>>,
    store: Arc<dyn Store>,
    ledgers: Option<Ledgers>,
    clock: Now,
    nodes: BTreeMap<NodeName, Node>,
    active: Option<Active>,
    queue: VecDeque<RunId>,
    last_submitted: Time,
    /// The runs that ended last: a node that was away is told when it comes back.
    ended: VecDeque<RunId>,
}

/// Tells the time.
pub type Now = Box<dyn Fn() -> Time + Send>;

/// Opens what the store holds and starts the thread. `end` learns how the thread ended.
pub(super) fn start(
    store: Arc<dyn Store>,
    ledgers: Option<Ledgers>,
    clock: Clock,
    current: watch::Sender<Option<Current>>,
    happened: broadcast::Sender<Arc<Happened>>,
    mut commands: mpsc::Receiver<Command>,
    end: oneshot::Sender<Result<(), RunError>>,
) -> Result<(), RunError> {
    let thread_error = |error: std::io::Error| {
        RunError::Store(StoreError::Io { path: "the driver's thread".to_owned(), what: error.to_string() })
    };
    let mut actor = Actor::open(store, ledgers, Box::new(move || clock.now()), current, happened)?;
    let timer = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(thread_error)?;
    let work = move || {
        let result = timer.block_on(actor.work(&mut commands));
        if let Err(error) = &result {
            tracing::error!("the run cannot go on: {error}");
        }
        // First nobody can reach the thread any more, then it says that it is at its end.
        drop((actor, commands));
        let _ = end.send(result);
    };
    std::thread::Builder::new().name("driver".to_owned()).spawn(work).map_err(thread_error)?;
    Ok(())
}

/// Names of the clients whose updates are in the sum; the first ones of many.
fn accepted(record: &RoundRecord) -> String {
    /// More names than these make a line that nobody reads.
    const SHOWN: usize = 16;
    let names: Vec<&str> = record.accepted().map(NodeName::as_str).collect();
    let shown = names.iter().take(SHOWN).copied().collect::<Vec<_>>().join(" ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}

impl Actor {
    /// Takes up what the store holds: the runs that are not over go on, the oldest first, each with its ledger. What the
    /// active run offers is shown in `current`, and what happens in `happened`.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn open(
        store: Arc<dyn Store>,
        ledgers: Option<Ledgers>,
        clock: Now,
        current: watch::Sender<Option<Current>>,
        happened: broadcast::Sender<Arc<Happened>>,
    ) -> Result<Self, RunError> {
        let runs = store.runs()?;
        let last_submitted = runs.iter().map(|run| run.submitted).max().unwrap_or_default();
        let over = runs.iter().rev().filter(|run| run.head.state.is_over()).take(ENDED_RUNS);
        let mut ended: VecDeque<RunId> = over.map(|run| run.run).collect();
        ended.make_contiguous().reverse();
        let queue = runs.into_iter().filter(|run| !run.head.state.is_over()).map(|run| run.run).collect();
        let nodes = BTreeMap::new();
        let mut actor = Self {
            current,
            happened,
            store,
            ledgers,
            clock,
            nodes,
            active: None,
            queue,
            last_submitted,
            ended,
        };
        actor.perform(Vec::new())?;
        Ok(actor)
    }

    /// When [`Actor::tick`] is due, if no command comes before.
    pub fn next_tick(&self) -> Option<Time> {
        self.active.as_ref().and_then(|active| active.run.next_tick())
    }

    /// Time passed.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn tick(&mut self) -> Result<(), RunError> {
        self.input(Input::Tick)
    }

    /// Takes commands until it is told to end.
    async fn work(&mut self, commands: &mut mpsc::Receiver<Command>) -> Result<(), RunError> {
        loop {
            let left =
                self.next_tick().map(|at| Duration::from_millis(at.0.saturating_sub((self.clock)().0)));
            let left = left.unwrap_or(CLOCK_CHECK).min(CLOCK_CHECK);
            match tokio::time::timeout(left, commands.recv()).await {
                Ok(None | Some(Command::Drain)) => return Ok(()),
                Ok(Some(command)) => self.take(command)?,
                Err(_) => self.tick()?,
            }
        }
    }

    /// Does what a command says, and tells whom it concerns.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn take(&mut self, command: Command) -> Result<(), RunError> {
        match command {
            Command::Connected { node, role, connection, outbox } => {
                // Dropping an earlier connection's sender ends that stream.
                self.nodes.insert(node.clone(), Node { role, connection, outbox: Some(outbox) });
                if self.ledgers.is_some() {
                    let known = self.store.ledger_head(&node)?;
                    self.tell(&node, ToNode::KnownHead(known));
                    for run in self.ended.clone() {
                        self.tell(&node, ToNode::RunOver(run));
                    }
                }
                self.input(Input::Connected { node, role })
            }
            Command::Disconnected { node, connection } => {
                if !self.is_of(&node, connection) {
                    return Ok(());
                }
                self.nodes.remove(&node);
                self.input(Input::Disconnected { node })
            }
            Command::Declined { node, connection, attempt, reason } => {
                if !self.is_of(&node, connection) || self.active_run() != Some(attempt.run) {
                    return Ok(());
                }
                let Attempt { round, attempt, .. } = attempt;
                self.input(Input::Declined { node, round, attempt, reason })
            }
            Command::Masking { node, connection, attempt, message } => {
                if !self.is_of(&node, connection) || self.active_run() != Some(attempt.run) {
                    return Ok(());
                }
                let Attempt { round, attempt, .. } = attempt;
                self.input(Input::Masking { node, round, attempt, message })
            }
            Command::Evaluated { node, connection, run, round, metrics } => {
                if !self.is_of(&node, connection) || self.active_run() != Some(run) {
                    return Ok(());
                }
                let metrics = self.checked(&node, metrics);
                self.input(Input::Evaluated { node, round, metrics })
            }
            Command::Head { node, connection, head, proof } => {
                if self.is_of(&node, connection) {
                    self.showed_head(&node, *head, &proof)?;
                }
                self.perform(Vec::new())
            }
            Command::ExportLedger { run, reply } => {
                let _ = reply.send(self.export_ledger(run));
                self.perform(Vec::new())
            }
            Command::Ask { node, attempt, reply } => {
                let standing = self.standing(&node, attempt);
                let _ = reply.send(standing);
                self.perform(Vec::new())
            }
            Command::Update { attempt, update, reply } => self.update(attempt, *update, reply),
            Command::Submit { id, job_toml, values, reply } => {
                let result = self.submit(id, &job_toml, &values);
                let stored = result.is_ok();
                let _ = reply.send(result);
                if stored {
                    self.queue.push_back(id);
                }
                self.perform(Vec::new())
            }
            Command::Stop { run, reply } => self.stop(run, reply),
            Command::Nodes { reply } => {
                let nodes = self.nodes.iter().map(|(name, node)| (name.clone(), node.role)).collect();
                let _ = reply.send(nodes);
                Ok(())
            }
            Command::Drain => Ok(()),
        }
    }

    /// Whether `connection` is the present one of `node`.
    fn is_of(&self, node: &NodeName, connection: u64) -> bool {
        self.nodes.get(node).is_some_and(|known| known.connection == connection)
    }

    fn active_run(&self) -> Option<RunId> {
        self.active.as_ref().map(|active| active.run.id())
    }

    fn input(&mut self, input: Input) -> Result<(), RunError> {
        let now = (self.clock)();
        let outgoing = match &mut self.active {
            Some(active) => active.run.handle(now, input)?,
            None => Vec::new(),
        };
        self.perform(outgoing)
    }

    /// A report whose confusion counts are not the job's classes by classes says nothing.
    fn checked(&self, node: &NodeName, metrics: Metrics) -> Metrics {
        let classes = self.active.as_ref().map_or(0, |active| active.run.job().model.classes);
        if metrics.confusion.is_empty() || metrics.confusion.len() == classes * classes {
            return metrics;
        }
        let cells = metrics.confusion.len();
        tracing::warn!(%node, "ignored an evaluation of {node}: {cells} confusion counts for {classes} classes");
        Metrics::default()
    }

    /// Keeps a head of a node's ledger if it continues the one before; otherwise the node is sent away, and the head
    /// before stays the one that it must continue.
    fn showed_head(
        &mut self,
        node: &NodeName,
        head: SignedHead,
        proof: &[LedgerHash],
    ) -> Result<(), RunError> {
        let kept = self.store.ledger_head(node)?;
        let kept = kept.and_then(|kept| SignedHead::from_bytes(&kept).ok());
        let continues = match &kept {
            // A node that enrolled anew has another key, and may begin another ledger: both heads are on record.
            Some(kept) if kept.key == head.key => head.continues(kept, proof),
            _ => head.verify(),
        };
        if let Err(error) = continues {
            tracing::error!(%node, "node {node} showed a ledger head that is refused: {error}");
            self.tell(
                node,
                ToNode::SentAway("the ledger of this node does not continue the head that it showed before"),
            );
            return Ok(());
        }
        self.store.put_ledger_head(node, &head.to_bytes())?;
        let now = (self.clock)();
        if let Some(ledger) = self.active.as_mut().and_then(|active| active.run.ledger()) {
            ledger.witness(node.clone(), head, now).map_err(RunError::from)?;
        }
        Ok(())
    }

    fn export_ledger(&mut self, run: RunId) -> Result<String, RunError> {
        if let Some(active) = self.active.as_mut().filter(|active| active.run.id() == run)
            && let Some(ledger) = active.run.ledger()
        {
            return Ok(ledger.export()?);
        }
        self.store.run(run)?;
        let ledgers = self.ledgers.as_ref();
        let missing = || StoreError::Missing { what: "the ledger of run", name: run.to_string() };
        Ok(ledgers.ok_or_else(missing)?.export(run, (self.clock)())?)
    }

    /// What is done with an update of `node`; a node whose update is not wanted is dismissed.
    fn standing(&mut self, node: &NodeName, asked: Attempt) -> Standing {
        let active = self.active.as_ref().filter(|active| active.run.id() == asked.run);
        if let Some(Active { run, .. }) = active {
            if run.has(node, asked.round) {
                return Standing::InSum;
            }
            if run.wants(node, asked.round) == Some(asked.attempt) {
                return Standing::Wanted;
            }
        }
        let last = active.and_then(|active| active.last.as_ref()).filter(|last| last.round == asked.round);
        let reason = match last.map(|last| (&last.outcome, last.cohort.get(node))) {
            Some((RoundOutcome::Published { .. }, Some(Participation::Accepted { .. }))) => {
                Dismissal::Published
            }
            Some((RoundOutcome::Abandoned { .. }, _)) => Dismissal::Abandoned,
            _ => Dismissal::NotUsed,
        };
        // An update that is decided in an attempt still open is dismissed when that ends.
        let open = active.and_then(|active| active.run.open_attempt());
        if open != Some((asked.round, asked.attempt)) {
            let Attempt { run, round, attempt } = asked;
            self.tell(node, ToNode::Dismiss { run, round, attempt, reason });
        }
        Standing::Unwanted
    }

    fn update(
        &mut self,
        attempt: Attempt,
        update: Update,
        reply: oneshot::Sender<Standing>,
    ) -> Result<(), RunError> {
        let standing = self.standing(&update.node, attempt);
        if standing != Standing::Wanted {
            let _ = reply.send(standing);
            return self.perform(Vec::new());
        }
        let now = (self.clock)();
        let Some(active) = &mut self.active else { return Ok(()) };
        let outgoing = active.run.update(now, update)?;
        // Taken or refused, it is decided: a refusal is in the record and in the dismissal.
        let _ = reply.send(Standing::InSum);
        self.perform(outgoing)
    }

    fn submit(&mut self, id: RunId, job_toml: &str, values: &[f32]) -> Result<(), StoreError> {
        // One after another, so that the order is the same after a restart.
        let submitted = (self.clock)().max(self.last_submitted + 1);
        let model = self.store.put_model(values)?;
        self.store.create_run(id, job_toml, model, submitted)?;
        self.last_submitted = submitted;
        tracing::info!(run = %id, "run {id} submitted");
        Ok(())
    }

    fn stop(&mut self, run: RunId, reply: oneshot::Sender<Result<(), StopError>>) -> Result<(), RunError> {
        if self.active_run() == Some(run) {
            self.input(Input::Stop)?;
            let _ = reply.send(Ok(()));
            return Ok(());
        }
        let result = self.stop_waiting(run);
        let _ = reply.send(result);
        Ok(())
    }

    /// Stops a run that is not active.
    fn stop_waiting(&mut self, run: RunId) -> Result<(), StopError> {
        let StoredRun { head, .. } = self.store.run(run)?;
        if head.state.is_over() {
            return Err(StopError::Over(run));
        }
        self.store.set_state(run, &RunState::Stopped)?;
        self.queue.retain(|queued| *queued != run);
        tracing::info!(%run, "run {run} stopped before it began or while it could not be run");
        self.over(run);
        let event = RunEvent::Ended { state: RunState::Stopped, rounds: head.published, model: head.model };
        self.announce(run, event);
        Ok(())
    }

    /// Tells everybody what `outgoing` says; then, when the run is over, starts the next one; and so on until
    /// nothing is left to be done.
    fn perform(&mut self, mut outgoing: Vec<Outgoing>) -> Result<(), RunError> {
        loop {
            self.publish();
            for what in std::mem::take(&mut outgoing) {
                self.deliver(what);
            }
            if let Some(active) = self.active.take_if(|active| active.run.is_over()) {
                tracing::debug!(run = %active.run.id(), "closed");
            }
            let lost: Vec<NodeName> = self
                .nodes
                .iter()
                .filter(|(_, node)| node.outbox.is_none())
                .map(|(name, _)| name.clone())
                .collect();
            if let Some(active) = &mut self.active {
                for node in lost {
                    self.nodes.remove(&node);
                    outgoing.extend(active.run.handle((self.clock)(), Input::Disconnected { node })?);
                }
            } else {
                self.nodes.retain(|name, _| !lost.contains(name));
                outgoing = self.begin()?;
            }
            if outgoing.is_empty() {
                self.publish();
                return Ok(());
            }
        }
    }

    /// Opens the next run that can be opened.
    fn begin(&mut self) -> Result<Vec<Outgoing>, RunError> {
        while let Some(id) = self.queue.pop_front() {
            let StoredRun { job_toml, head, open_attempt, .. } = self.store.run(id)?;
            if head.state == RunState::Queued {
                self.store.set_state(id, &RunState::Running)?;
            }
            let now = (self.clock)();
            let rule = Rule::OfTheJob(Box::new(noise::add_gaussian));
            let job = Job::parse(&job_toml).map_err(|error| RunError::Job { run: id, error });
            let ledger = match (&self.ledgers, &job) {
                (Some(ledgers), Ok(job)) => Some(ledgers.open(id, job, &job_toml, now)?),
                _ => None,
            };
            // Without ledgers, in a test, nobody asks who the coordinator is.
            let coordinator =
                Some(self.ledgers.as_ref().map_or([0; 32], |ledgers| ledgers.coordinator().0.0));
            let opening = Opening { imposed: None, rule, ledger, coordinator };
            let opened = job.and_then(|_| Run::open(self.store.clone(), id, now, opening));
            let (mut run, mut outgoing) = match opened {
                Ok(opened) => opened,
                Err(error @ RunError::Job { .. }) => {
                    tracing::error!(run = %id, "{error}; it is skipped: stop it, or start the version that took it");
                    continue;
                }
                Err(error) => return Err(error),
            };
            let (name, rounds) = (&run.job().name, run.job().rounds);
            match open_attempt {
                Some(open) => tracing::info!(
                    run = %id, "run {id} ({name}) goes on: round {} of {rounds}, attempt {} is open", open.round, open.attempt
                ),
                None if head.published > 0 => tracing::info!(
                    run = %id, "run {id} ({name}) goes on: {} of {rounds} rounds are published", head.published
                ),
                None => tracing::info!(run = %id, "run {id} ({name}) begins: {rounds} rounds"),
            }
            let nodes: BTreeMap<NodeName, Role> =
                self.nodes.iter().map(|(name, node)| (name.clone(), node.role)).collect();
            if nodes.values().any(|role| *role == Role::Trainer) {
                // The run waited for clients because it was not told yet who is there.
                let waiting = |event: &RunEvent| matches!(event, RunEvent::Waiting { .. });
                outgoing.retain(|what| !matches!(what, Outgoing::Event(event) if waiting(event)));
            }
            outgoing.extend(run.handle(now, Input::Present { nodes })?);
            let progress = Progress::of(run.job());
            self.active = Some(Active { run, job_toml: job_toml.into(), progress, last: None });
            return Ok(outgoing);
        }
        Ok(Vec::new())
    }

    /// Shows what the active run offers and takes now, if that changed.
    fn publish(&mut self) {
        // A run that is over offers nothing, from before anybody is told of its end.
        let open = self.active.as_ref().filter(|active| !active.run.is_over());
        let current = open.map(|Active { run, .. }| Current {
            run: run.id(),
            digest: run.head().model,
            model: run.model().clone(),
            attempt: run.open_attempt().map(|(round, attempt)| Attempt { run: run.id(), round, attempt }),
            update_bytes: run.update_bytes(),
        });
        let key = |current: &Option<Current>| current.as_ref().map(|c| (c.run, c.digest, c.attempt));
        self.current.send_if_modified(|shown| {
            let changed = key(shown) != key(&current);
            if changed {
                *shown = current;
            }
            changed
        });
    }

    fn deliver(&mut self, what: Outgoing) {
        let Some(active) = &mut self.active else { return };
        let (run, job_toml) = (active.run.id(), active.job_toml.clone());
        match what {
            Outgoing::Invite { node, round, attempt, model, deadline, support } => {
                self.tell(&node, ToNode::Invite { run, round, attempt, job_toml, model, deadline, support });
            }
            Outgoing::Masking { node, round, attempt, message } => {
                self.tell(&node, ToNode::Masking { run, round, attempt, message });
            }
            Outgoing::Dismiss { node, round, attempt, reason } => {
                self.tell(&node, ToNode::Dismiss { run, round, attempt, reason });
            }
            Outgoing::Evaluate { node, round, model } => {
                self.tell(&node, ToNode::Evaluate { run, round, job_toml, model });
            }
            Outgoing::LedgerHead { nodes, head } => {
                for node in nodes {
                    self.tell(&node, ToNode::LedgerHead(Box::new(head)));
                }
            }
            Outgoing::Event(event) => {
                if let RunEvent::Ended { .. } = &*event {
                    self.over(run);
                }
                let Some(active) = &mut self.active else { return };
                if let RunEvent::RoundEnded { record } = &*event {
                    active.last = Some(record.clone());
                }
                let now = (self.clock)();
                if let RunEvent::Waiting { .. } = &*event
                    && let Some(status) = active.progress.status(&event)
                {
                    tracing::info!(%run, "{status}");
                }
                for line in active.progress.take(Some(now), &event) {
                    match (&line, &active.last) {
                        (Line::Abandoned { .. } | Line::Failed { .. }, _) => tracing::warn!(%run, "{line}"),
                        (Line::Round { .. }, Some(last)) => {
                            tracing::info!(%run, accepted = accepted(last), "{line}");
                        }
                        _ => tracing::info!(%run, "{line}"),
                    }
                }
                self.announce(run, *event);
            }
        }
    }

    /// Tells every node that a run is over: what was set aside for its rounds that never started is free.
    fn over(&mut self, run: RunId) {
        self.ended.push_back(run);
        if self.ended.len() > ENDED_RUNS {
            self.ended.pop_front();
        }
        if self.ledgers.is_some() {
            let nodes: Vec<NodeName> = self.nodes.keys().cloned().collect();
            for node in nodes {
                self.tell(&node, ToNode::RunOver(run));
            }
        }
    }

    fn announce(&self, run: RunId, event: RunEvent) {
        // An error means that nobody watches.
        let _ = self.happened.send(Arc::new(Happened { run, at: (self.clock)(), event }));
    }

    /// Queues a message for a node. A node that does not read its messages loses its connection.
    fn tell(&mut self, name: &NodeName, message: ToNode) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if let Some(outbox) = &node.outbox
            && let Err(mpsc::error::TrySendError::Full(_)) = outbox.try_send(message)
        {
            tracing::warn!(node = %name, "disconnected node {name}: it does not read its messages");
            node.outbox = None;
        }
    }
}
