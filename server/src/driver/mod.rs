//! The driver: the one thread that owns the active run, the queue of runs and the list of connected nodes.
//!
//! Everything that may change a run comes to it as a command and is done one after another, so a run has one
//! order of events, and the store's flushes hold up no connection. [`Driver`] is the handle that the edges
//! share.

pub mod actor;
#[cfg(test)]
pub(crate) mod tests;
mod watching;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::{Job, JobError};
use tributary_common::ledger::head::SignedHead;
use tributary_common::ledger::record::LedgerHash;
use tributary_common::model::{ImportError, Parameters, import};
use tributary_common::record::{Metrics, Reason, RunEvent};
use tributary_common::time::{Clock, Time};

use crate::ledger::Ledgers;
use crate::round::{Dismissal, Role};
use crate::run::{RunError, Update};
use crate::store::{Store, StoreError};

/// Commands that may wait for the driver; a sender of one more waits.
const COMMANDS: usize = 1024;
/// Messages that may wait for one node; a node for which one more comes is disconnected.
const OUTBOX: usize = 64;
/// Events that a watcher may lag behind; one that lags further reads the records again.
const EVENTS: usize = 1024;

/// A message to a node, turned into its wire form when it is sent.
#[derive(Debug, Clone, PartialEq)]
pub enum ToNode {
    /// An invitation to an attempt.
    Invite {
        /// The run.
        run: RunId,
        /// The round, from 1.
        round: u32,
        /// The attempt at it, from 1.
        attempt: u32,
        /// The job file as resolved.
        job_toml: Arc<str>,
        /// The model to start from.
        model: Digest,
        /// When the attempt ends.
        deadline: Time,
        /// Under masks with top-k: the coordinates that every update has, encoded.
        support: Option<Arc<[u8]>>,
    },
    /// A message of an attempt's secure-aggregation session.
    Masking {
        /// The run.
        run: RunId,
        /// The round.
        round: u32,
        /// The attempt.
        attempt: u32,
        /// The message, encoded.
        message: Vec<u8>,
    },
    /// An attempt is over for the node.
    Dismiss {
        /// The run.
        run: RunId,
        /// The round.
        round: u32,
        /// The attempt.
        attempt: u32,
        /// What became of its update.
        reason: Dismissal,
    },
    /// A request to evaluate a published model.
    Evaluate {
        /// The run.
        run: RunId,
        /// The round whose model it is.
        round: u32,
        /// The job file as resolved.
        job_toml: Arc<str>,
        /// The model.
        model: Digest,
    },
    /// The last head of the node's own ledger that is kept here, if one is.
    KnownHead(Option<Vec<u8>>),
    /// The head of a run's ledger.
    LedgerHead(Box<SignedHead>),
    /// A run is over.
    RunOver(RunId),
    /// The node is sent away for good.
    SentAway(&'static str),
}

/// An open control stream as the driver knows it.
#[derive(Debug)]
pub struct Connection {
    /// The node.
    pub node: NodeName,
    /// Messages to it. It ends when a newer connection replaces this one, or when it is not read in time.
    pub outbox: mpsc::Receiver<ToNode>,
    id: u64,
}

/// An attempt at a round of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    /// The run.
    pub run: RunId,
    /// The round, from 1.
    pub round: u32,
    /// The attempt at it, from 1.
    pub attempt: u32,
}

/// What the active run offers and takes at present.
#[derive(Debug, Clone)]
pub struct Current {
    /// The run.
    pub run: RunId,
    /// Digest of its last published model, or of the initial one.
    pub digest: Digest,
    /// That model.
    pub model: Parameters,
    /// Bytes of an update: fewest and most.
    pub update_bytes: (u64, u64),
    /// The attempt that is open, if one is.
    pub attempt: Option<Attempt>,
}

/// What the active run does with an update of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It would take it.
    Wanted,
    /// It has it in its sum.
    InSum,
    /// The attempt is over, or the node is not in it. The node is told so on its control stream.
    Unwanted,
}

/// One event of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Happened {
    /// The run.
    pub run: RunId,
    /// When.
    pub at: Time,
    /// What.
    pub event: RunEvent,
}

/// The driver has ended: the coordinator is shutting down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator is shutting down")]
pub struct Gone;

/// Why a run was not submitted.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The job cannot be run.
    #[error("the job is refused: {0}")]
    Job(#[from] JobError),
    /// The initial model is not the job's.
    #[error("the initial model is refused: {0}")]
    Model(#[from] ImportError),
    /// The operating system gave no random bytes.
    #[error("no random bytes for a run's id")]
    Random,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The driver has ended.
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// Why a run was not stopped.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// Nothing more happens in it anyway.
    #[error("run {0} is over already")]
    Over(RunId),
    /// The store failed, or the run does not exist.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The driver has ended.
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// What the driver can be told.
#[derive(Debug)]
pub enum Command {
    /// A node's control stream is open; it replaces an earlier one of the same node.
    Connected {
        /// The node.
        node: NodeName,
        /// What it is there for.
        role: Role,
        /// The stream's number, never used before in this process.
        connection: u64,
        /// Messages to it.
        outbox: mpsc::Sender<ToNode>,
    },
    /// A control stream has ended.
    Disconnected {
        /// The node.
        node: NodeName,
        /// The stream.
        connection: u64,
    },
    /// A node declines an attempt.
    Declined {
        /// The node.
        node: NodeName,
        /// The stream that it said so on.
        connection: u64,
        /// The attempt.
        attempt: Attempt,
        /// Why.
        reason: Reason,
    },
    /// A message of an attempt's secure-aggregation session.
    Masking {
        /// The node.
        node: NodeName,
        /// The stream that it came on.
        connection: u64,
        /// The attempt.
        attempt: Attempt,
        /// The message, encoded.
        message: Vec<u8>,
    },
    /// A node evaluated a published model.
    Evaluated {
        /// The node.
        node: NodeName,
        /// The stream that it said so on.
        connection: u64,
        /// The run.
        run: RunId,
        /// The round whose model it is.
        round: u32,
        /// What it counted.
        metrics: Metrics,
    },
    /// What would be done with an update of a node?
    Ask {
        /// The node.
        node: NodeName,
        /// The attempt that it is for.
        attempt: Attempt,
        /// Gets the answer.
        reply: oneshot::Sender<Standing>,
    },
    /// An update, whole and verified.
    Update {
        /// The attempt that it is for.
        attempt: Attempt,
        /// The update.
        update: Box<Update>,
        /// Gets to know what was done with it.
        reply: oneshot::Sender<Standing>,
    },
    /// A run for the end of the queue.
    Submit {
        /// Its id.
        id: RunId,
        /// Its job as resolved.
        job_toml: String,
        /// The initial model.
        values: Vec<f32>,
        /// Gets to know when it is durable.
        reply: oneshot::Sender<Result<(), StoreError>>,
    },
    /// A node shows the head of its ledger.
    Head {
        /// The node.
        node: NodeName,
        /// The stream that it came on.
        connection: u64,
        /// The head.
        head: Box<SignedHead>,
        /// That it continues the one before.
        proof: Vec<LedgerHash>,
    },
    /// The export of a run's ledger, as it stands.
    ExportLedger {
        /// The run.
        run: RunId,
        /// Gets it.
        reply: oneshot::Sender<Result<String, RunError>>,
    },
    /// Stops a run.
    Stop {
        /// The run.
        run: RunId,
        /// Gets to know when that is durable.
        reply: oneshot::Sender<Result<(), StopError>>,
    },
    /// Who is connected?
    Nodes {
        /// Gets the nodes, by name.
        reply: oneshot::Sender<Vec<(NodeName, Role)>>,
    },
    /// Finish what is being done, and end.
    Drain,
}

/// The handle of the driver.
#[derive(Clone)]
pub struct Driver {
    store: Arc<dyn Store>,
    commands: mpsc::Sender<Command>,
    current: watch::Receiver<Option<Current>>,
    happened: broadcast::WeakSender<Arc<Happened>>,
    connections: Arc<AtomicU64>,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

/// How the driver's thread ends.
#[derive(Debug)]
pub struct Ending {
    receiver: oneshot::Receiver<Result<(), RunError>>,
    known: Option<Result<(), String>>,
}

impl Ending {
    /// Waits for the end, which can be asked for again. The error is why the coordinator cannot go on, in one line.
    pub async fn wait(&mut self) -> Result<(), String> {
        if let Some(known) = &self.known {
            return known.clone();
        }
        let ended = match (&mut self.receiver).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the driver stopped unexpectedly; the log says where".to_owned()),
        };
        self.known.insert(ended).clone()
    }
}

impl Driver {
    /// Starts the driver: the runs in `store` that are not over go on, the oldest first, each with its ledger. It reads from the disk:
    /// call it off the async threads.
    pub fn start(
        store: Arc<dyn Store>,
        ledgers: Option<Ledgers>,
        clock: Clock,
    ) -> Result<(Self, Ending), RunError> {
        let (commands, receiver) = mpsc::channel(COMMANDS);
        let (current, current_receiver) = watch::channel(None);
        let happened = broadcast::Sender::new(EVENTS);
        let driver = Self {
            store: store.clone(),
            commands,
            current: current_receiver,
            happened: happened.downgrade(),
            connections: Arc::default(),
        };
        let (end, ending) = oneshot::channel();
        actor::start(store, ledgers, clock, current, happened, receiver, end)?;
        Ok((driver, Ending { receiver: ending, known: None }))
    }

    /// The store, for reading.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// What the active run offers and takes, as it changes. It closes when the driver ends.
    pub fn current(&self) -> watch::Receiver<Option<Current>> {
        self.current.clone()
    }

    async fn send(&self, command: Command) -> Result<(), Gone> {
        self.commands.send(command).await.map_err(|_| Gone)
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Gone> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply)).await?;
        answer.await.map_err(|_| Gone)
    }

    /// A node's control stream is open. It replaces an earlier one of the same node.
    pub async fn connect(&self, node: NodeName, role: Role) -> Result<Connection, Gone> {
        let id = self.connections.fetch_add(1, Ordering::Relaxed);
        let (sender, outbox) = mpsc::channel(OUTBOX);
        self.send(Command::Connected { node: node.clone(), role, connection: id, outbox: sender }).await?;
        Ok(Connection { node, outbox, id })
    }

    /// The control stream has ended.
    pub async fn disconnect(&self, connection: Connection) {
        let Connection { node, id, .. } = connection;
        // A driver that is gone has no use for the news.
        let _ = self.send(Command::Disconnected { node, connection: id }).await;
    }

    /// The node declines an attempt.
    pub async fn declined(&self, by: &Connection, attempt: Attempt, reason: Reason) -> Result<(), Gone> {
        self.send(Command::Declined { node: by.node.clone(), connection: by.id, attempt, reason }).await
    }

    /// The node says something in an attempt's secure-aggregation session.
    pub async fn masking(&self, by: &Connection, attempt: Attempt, message: Vec<u8>) -> Result<(), Gone> {
        self.send(Command::Masking { node: by.node.clone(), connection: by.id, attempt, message }).await
    }

    /// The node evaluated the model that `run` published in `round`.
    pub async fn evaluated(
        &self,
        by: &Connection,
        run: RunId,
        round: u32,
        metrics: Metrics,
    ) -> Result<(), Gone> {
        let (node, connection) = (by.node.clone(), by.id);
        self.send(Command::Evaluated { node, connection, run, round, metrics }).await
    }

    /// The node shows the head of its ledger, with the proof that it continues the one before.
    pub async fn showed_head(
        &self,
        by: &Connection,
        head: SignedHead,
        proof: Vec<LedgerHash>,
    ) -> Result<(), Gone> {
        let (node, connection) = (by.node.clone(), by.id);
        self.send(Command::Head { node, connection, head: Box::new(head), proof }).await
    }

    /// The export of a run's ledger, as it stands.
    pub async fn export_ledger(&self, run: RunId) -> Result<Result<String, RunError>, Gone> {
        self.ask(|reply| Command::ExportLedger { run, reply }).await
    }

    /// What would be done with an update of `node` for `attempt`.
    pub async fn standing(&self, node: &NodeName, attempt: Attempt) -> Result<Standing, Gone> {
        let node = node.clone();
        self.ask(|reply| Command::Ask { node, attempt, reply }).await
    }

    /// Hands an update over, whole and verified; what was done with it.
    pub async fn update(&self, attempt: Attempt, update: Update) -> Result<Standing, Gone> {
        self.ask(|reply| Command::Update { attempt, update: Box::new(update), reply }).await
    }

    /// Checks a job and the bytes of its initial model, if it has one, and puts a run at the end of the queue;
    /// durable on return.
    pub async fn submit(&self, job_toml: String, initial: Option<Vec<u8>>) -> Result<RunId, SubmitError> {
        let prepare = move || -> Result<(String, Vec<f32>), SubmitError> {
            let job = Job::parse(&job_toml)?;
            job.guarantee()?;
            let layout = job.layout()?;
            let values = match initial {
                Some(bytes) => import(&layout, &bytes)?,
                None => layout.initial(job.seed),
            };
            Ok((job.to_toml()?, values))
        };
        let (job_toml, values) = tokio::task::spawn_blocking(prepare).await.map_err(|_| Gone)??;
        let id = RunId(rand::TryRng::try_next_u64(&mut rand::rngs::SysRng).map_err(|_| SubmitError::Random)?);
        self.ask(|reply| Command::Submit { id, job_toml, values, reply }).await??;
        Ok(id)
    }

    /// Stops a run; durable on return.
    pub async fn stop(&self, run: RunId) -> Result<(), StopError> {
        self.ask(|reply| Command::Stop { run, reply }).await?
    }

    /// The connected nodes, by name.
    pub async fn nodes(&self) -> Result<Vec<(NodeName, Role)>, Gone> {
        self.ask(|reply| Command::Nodes { reply }).await
    }

    /// What happened in a run so far, then what happens, with the time where it is known. The stream ends
    /// when the run is over; an error says why it ends before.
    pub fn watch(
        &self,
        run: RunId,
    ) -> mpsc::Receiver<Result<(Option<Time>, RunEvent), watching::WatchError>> {
        watching::watch(self, run)
    }

    /// Lets the driver finish what it is at, such as a commit, and end. What comes after is ignored: to the
    /// runs it is as if the process had been killed then.
    pub async fn drain(&self) {
        let _ = self.send(Command::Drain).await;
    }
}

pub use watching::WatchError;
