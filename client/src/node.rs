//! A running node: carries out its participant's orders on sockets and a thread that trains.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as thread_mpsc;
use std::thread::JoinHandle as ThreadHandle;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tributary_common::digest::Digest;
use tributary_common::ids::NodeName;
use tributary_common::job::Job;
use tributary_common::model::Parameters;
use tributary_common::record::Reason;
use tributary_common::time::{Clock, Time};
use x509_parser::pem::parse_x509_pem;

use crate::account::{self, Account, AccountError, Parties};
use crate::config::{NodeConfig, NodeData};
use crate::encoding::Produced;
use crate::enrol::{self, Credentials, EnrolError};
use crate::machine::{Attempt, Failure, Input, Kept, NodeEvent, RoundKey, Trained};
use crate::masking::Identity;
use crate::masking::peers::{self, PeersError};
use crate::participant::{Drill, Happening, Killed, OpenError, Opening, Order, Participant, Steps};
use crate::store::{Folder, FolderError};
use crate::trainer::{ArithmeticTrainer, Task, TorchTrainer, TrainError, Trainer};
use crate::transport::{self, Dialer, Greeting, Link, LinkEvent};

/// Results waiting for the loop, at most.
const QUEUE: usize = 16;
/// How often the certificate's age is looked at.
const RENEWAL_CHECK_SECONDS: u64 = 600;
/// Longest wait for the training thread when the node ends.
const STOP_SECONDS: u64 = 5;

/// Why a node ended, other than by being stopped.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Its folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// Its certificate.
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    /// Its data's account.
    #[error(transparent)]
    Account(#[from] AccountError),
    /// What its folder holds.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its identity among other nodes.
    #[error(transparent)]
    Peers(#[from] PeersError),
    /// The coordinator will not have it.
    #[error("the coordinator refused this node: {0}")]
    Refused(String),
    /// The operating system gave no thread or no signals.
    #[error("the node cannot run: {0}")]
    Os(#[from] std::io::Error),
    /// A drill.
    #[error(transparent)]
    Killed(#[from] Killed),
    /// The thread that trains is gone.
    #[error("the training thread ended unexpectedly; start the node again")]
    Worker,
}

/// How progress is printed on standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Which trainer a node uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrainerKind {
    /// libtorch.
    #[default]
    Torch,
    /// The deterministic stand-in of the protocol tests.
    Arithmetic,
}

/// How a node runs, beyond its configuration.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// How progress is printed.
    pub format: Format,
    /// For drills: wait between storing an update and sending it.
    pub pause_before_upload_seconds: u32,
    /// For drills: stand still at this step of a round, to be killed.
    pub pause_at: Option<Drill>,
    /// Which trainer is used.
    pub trainer: TrainerKind,
}

impl Options {
    /// Stands still for good at the drill's step.
    fn steps(&self) -> Steps {
        let pause_at = self.pause_at;
        Box::new(move |step| {
            if pause_at == Some(step) {
                eprintln!("drill: stands still, {step:?}");
                loop {
                    std::thread::sleep(Duration::from_secs(3600));
                }
            }
            Ok(())
        })
    }
}

/// Runs a node until it is stopped by SIGTERM or SIGINT, or cannot go on.
///
/// # Errors
/// One line.
pub async fn run(config: &NodeConfig, data: NodeData, options: &Options) -> Result<(), NodeError> {
    let folder = Arc::new(Folder::open(&config.dir)?);
    let credentials = Credentials::load(&config.dir)?;
    credentials.check(Clock.now())?;
    let dialer = credentials.dialer(&config.server);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, stopped) = mpsc::channel(2);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if stop.send(()).await.is_err() {
                return;
            }
        }
    });
    serve(config, data, options, folder, credentials, dialer, stopped).await
}

/// What [`run`] does once the process is set up; stops when `stopped` says so.
async fn serve(
    config: &NodeConfig,
    data: NodeData,
    options: &Options,
    folder: Arc<Folder>,
    mut credentials: Credentials,
    dialer: Dialer,
    mut stopped: mpsc::Receiver<()>,
) -> Result<(), NodeError> {
    let account = open_account(config, &data, &credentials, Clock.now())?;
    let identity = Identity {
        node: credentials.node.clone(),
        key: peers::identity(&credentials.key_pem)?,
        server: account.coordinator(),
        dir: config.dir.clone(),
    };
    let (profile, examples) = (Arc::new(config.profile(&data)), data.counts());
    let opening =
        Opening { profile, examples, identity, account, folder: folder.clone(), steps: options.steps() };
    let participant = Participant::open(opening, Clock.now())?;
    let (sender, mut results) = mpsc::channel(QUEUE);
    let worker = Worker::start(credentials.node.clone(), data, options.trainer, sender.clone())?;
    let mut link = Link::open(dialer.clone(), Greeting::new(credentials.node.clone(), config.role));
    let mut node = Node {
        participant,
        worker,
        options: *options,
        folder,
        dialer: dialer.clone(),
        results: sender,
        fetching: None,
        uploading: None,
        happened: VecDeque::new(),
        exit: false,
    };
    let mut renewal = interval(Duration::from_secs(RENEWAL_CHECK_SECONDS));
    renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut renewing: Option<JoinHandle<Result<Credentials, EnrolError>>> = None;
    let outcome = loop {
        while let Some(happening) = node.happened.pop_front() {
            for order in node.participant.take(Clock.now(), happening)? {
                node.perform(order, &link)?;
            }
        }
        if node.exit {
            break Ok(());
        }
        let tick = node.participant.next_tick();
        tokio::select! {
            event = link.next() => match event {
                Some(LinkEvent::Up { protocol, software }) => {
                    tracing::info!("connected to {} ({software}, protocol {protocol})", config.server);
                    node.input(Input::Connected);
                }
                Some(LinkEvent::Message(input)) => node.input(*input),
                Some(LinkEvent::Masking { at, message }) => {
                    node.happened.push_back(Happening::Masking { at, message });
                }
                Some(LinkEvent::Ledger(news)) => node.happened.push_back(Happening::Ledger(news)),
                Some(LinkEvent::Down { reason, retry_in }) => {
                    tracing::warn!("not connected: {reason}; next try in {:.1} s", retry_in.as_secs_f64());
                    if let Err(expired) = credentials.check(Clock.now()) {
                        break Err(expired.into());
                    }
                    node.input(Input::Disconnected);
                }
                Some(LinkEvent::Final { reason }) => break Err(NodeError::Refused(reason)),
                None => break Err(NodeError::Refused("the control stream ended".into())),
            },
            Some(happening) = results.recv() => node.happened.push_back(happening),
            Some(()) = stopped.recv() => {
                tracing::info!("stopping; once more to stop at once");
                node.input(Input::Shutdown);
            }
            () = sleep_until(until(tick)), if tick.is_some() => node.input(Input::Tick),
            _ = renewal.tick(), if renewing.is_none() => {
                if credentials.is_due(Clock.now()) {
                    let (dialer, dir, present) = (dialer.clone(), config.dir.clone(), credentials.clone());
                    renewing = Some(tokio::spawn(async move { enrol::renew(&dialer, &dir, &present).await }));
                }
            }
            renewed = finished(&mut renewing) => {
                renewing = None;
                match renewed {
                    Ok(Ok(renewed)) => {
                        tracing::info!("the certificate was renewed");
                        credentials = renewed;
                    }
                    Ok(Err(error)) => tracing::warn!("the certificate was not renewed: {error}; the next try follows"),
                    Err(error) => tracing::warn!("the certificate was not renewed: {error}"),
                }
            }
        }
    };
    link.close().await;
    node.stop().await;
    outcome
}

/// The end of the task, if there is one.
async fn finished<T>(task: &mut Option<JoinHandle<T>>) -> Result<T, tokio::task::JoinError> {
    match task {
        Some(task) => task.await,
        None => std::future::pending().await,
    }
}

fn until(tick: Option<Time>) -> Instant {
    let left = tick.map_or(0, |at| at.0.saturating_sub(Clock.now().0));
    Instant::now() + Duration::from_millis(left)
}

/// Opens the node's ledger and its data's account.
pub(crate) fn open_account(
    config: &NodeConfig,
    data: &NodeData,
    credentials: &Credentials,
    now: Time,
) -> Result<Account, AccountError> {
    let (_, authority) =
        parse_x509_pem(credentials.authority_pem.as_bytes()).map_err(|_| AccountError::Authority)?;
    let parties = Parties {
        node: &credentials.node,
        key_pem: &credentials.key_pem,
        authority_der: &authority.contents,
    };
    let source = account::Source { data: data.digest(), path: &data.source, grouped: data.is_grouped() };
    let account = Account::open(&config.dir, parties, &config.account, source, now)?;
    tracing::info!("{}", account.describe());
    Ok(account)
}

/// A participant and what carries out its orders.
struct Node {
    participant: Participant,
    worker: Worker,
    options: Options,
    folder: Arc<Folder>,
    dialer: Dialer,
    results: mpsc::Sender<Happening>,
    fetching: Option<JoinHandle<()>>,
    uploading: Option<(RoundKey, JoinHandle<()>)>,
    /// Waits for the participant.
    happened: VecDeque<Happening>,
    exit: bool,
}

impl Node {
    fn input(&mut self, input: Input) {
        self.happened.push_back(Happening::Input(input));
    }

    fn perform(&mut self, order: Order, link: &Link) -> Result<(), NodeError> {
        match order {
            Order::Send(message) => link.send(message),
            Order::Fetch { model, bytes } => self.fetch(model, bytes),
            Order::CancelFetch => {
                // It stays in its place: the next fetch waits for its end.
                if let Some(task) = &self.fetching {
                    task.abort();
                }
            }
            Order::Train { key, job, model } => self.worker.send(Command::Train { key, job, model })?,
            Order::CancelTraining => self.worker.cancel(),
            Order::Evaluate { key, job, model } => self.worker.send(Command::Evaluate { key, job, model })?,
            Order::Encode(encoding) => {
                let results = self.results.clone();
                tokio::task::spawn_blocking(move || {
                    let _ = results.blocking_send(encoding.run()); // the loop may have ended
                });
            }
            Order::Upload { at, update } => self.upload(at, update),
            Order::CancelUpload { key } => {
                if let Some((_, task)) = self.uploading.take_if(|(sending, _)| *sending == key) {
                    task.abort();
                }
            }
            Order::Tell(event) => print(&event, self.options.format),
            Order::Exit => self.exit = true,
        }
        Ok(())
    }

    fn fetch(&mut self, model: Digest, bytes: u64) {
        let before = self.fetching.take();
        let (dialer, part, results) =
            (self.dialer.clone(), self.folder.part_path(model), self.results.clone());
        self.fetching = Some(tokio::spawn(async move {
            end(before).await;
            let input = match transport::fetch(&dialer, &part, model, bytes).await {
                Ok(parameters) => Input::ModelReady { model, parameters },
                Err(detail) => Input::FetchFailed { model, detail },
            };
            let _ = results.send(Happening::Input(input)).await; // as above
        }));
    }

    fn upload(&mut self, at: Attempt, update: Kept) {
        let before = self.uploading.take().map(|(_, task)| task);
        let (dialer, path, results) =
            (self.dialer.clone(), self.participant.update_path(at.key()), self.results.clone());
        let pause = Duration::from_secs(self.options.pause_before_upload_seconds.into());
        let task = tokio::spawn(async move {
            end(before).await;
            if !pause.is_zero() {
                tracing::info!("{at}: stored; waiting {} s before the upload, as told", pause.as_secs());
                tokio::time::sleep(pause).await;
            }
            let input = match transport::upload(&dialer, &path, at, &update).await {
                Ok(()) => Input::UploadDone { at },
                Err(detail) => Input::UploadRefused { at, detail },
            };
            let _ = results.send(Happening::Input(input)).await; // as above
        });
        self.uploading = Some((at.key(), task));
    }

    /// Ends tasks and the thread.
    async fn stop(self) {
        for task in self.fetching.into_iter().chain(self.uploading.map(|(_, task)| task)) {
            task.abort();
        }
        self.worker.stop().await;
    }
}

/// Stops a task and waits until it has stopped, so that no two work on one file.
async fn end(task: Option<JoinHandle<()>>) {
    if let Some(task) = task {
        task.abort();
        let _ = task.await; // cancelled, as told
    }
}

enum Command {
    Train { key: RoundKey, job: Arc<Job>, model: Parameters },
    Evaluate { key: RoundKey, job: Arc<Job>, model: Parameters },
}

/// The one thread that trains: never one of tokio's, so that libtorch keeps its one thread and its bits.
struct Worker {
    commands: thread_mpsc::SyncSender<Command>,
    cancelled: Arc<AtomicBool>,
    thread: ThreadHandle<()>,
}

impl Worker {
    fn start(
        client: NodeName,
        data: NodeData,
        kind: TrainerKind,
        results: mpsc::Sender<Happening>,
    ) -> Result<Self, NodeError> {
        let (commands, queue) = thread_mpsc::sync_channel(1);
        let cancelled = Arc::new(AtomicBool::new(false));
        let stop = cancelled.clone();
        let work = move || {
            let mut trainer: Box<dyn Trainer> = match kind {
                TrainerKind::Torch => Box::new(TorchTrainer::new()),
                TrainerKind::Arithmetic => Box::new(ArithmeticTrainer),
            };
            for command in queue {
                let outcome = carry_out(trainer.as_mut(), &client, &data, command, &stop);
                if results.blocking_send(outcome).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("trainer".into()).spawn(work)?;
        Ok(Self { commands, cancelled, thread })
    }

    /// The machine gives one command at a time, so there is always room.
    fn send(&self, command: Command) -> Result<(), NodeError> {
        self.cancelled.store(false, Ordering::Relaxed);
        self.commands.try_send(command).map_err(|_| NodeError::Worker)
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Waits for the step under way, but not for a long evaluation.
    async fn stop(self) {
        self.cancel();
        drop(self.commands);
        let ended = async {
            while !self.thread.is_finished() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(STOP_SECONDS), ended).await.is_err() {
            tracing::warn!("the training thread is still at work; it is left");
        }
    }
}

fn carry_out(
    trainer: &mut dyn Trainer,
    client: &NodeName,
    data: &NodeData,
    command: Command,
    stop: &AtomicBool,
) -> Happening {
    match command {
        Command::Train { key, job, model } => {
            let task = Task {
                job,
                round: key.round,
                client: client.clone(),
                model,
                declared_examples: data.declared_examples,
                max_steps: None,
            };
            match trainer.train(&task, &data.train, stop) {
                Ok(update) => {
                    let trained = Trained { examples: update.examples, loss: update.loss };
                    Happening::Updated(key, Produced::new(update), trained)
                }
                Err(error) => Happening::Input(Input::Trained { key, result: Err(failure(&error)) }),
            }
        }
        Command::Evaluate { key, job, model } => {
            let result = trainer.evaluate(&job, &model, &data.test).map_err(|error| failure(&error));
            Happening::Measured(key, job, result)
        }
    }
}

fn failure(error: &TrainError) -> Failure {
    let reason = match error {
        TrainError::NoExamples
        | TrainError::Inputs { .. }
        | TrainError::Label { .. }
        | TrainError::Examples(_) => Reason::Data,
        TrainError::Model { .. } | TrainError::Job(_) => Reason::Unsupported,
        TrainError::Cancelled
        | TrainError::Diverged { .. }
        | TrainError::LossNotFinite
        | TrainError::Torch(_)
        | TrainError::DeclaredExamples
        | TrainError::Noise(_)
        | TrainError::Audit(_) => Reason::Training,
    };
    Failure { reason, detail: transport::chain(error) }
}

/// One line on standard output; whoever reads may have gone away.
fn print(event: &NodeEvent, format: Format) {
    let mut out = std::io::stdout();
    let _ = match format {
        Format::Text => writeln!(out, "{}", line(event)),
        Format::Json => serde_json::to_string(event).map_or(Ok(()), |json| writeln!(out, "{json}")),
    };
}

fn line(event: &NodeEvent) -> String {
    match event {
        NodeEvent::JoinedRun { run, name, rounds } => format!("joined run {run}: {name}, {rounds} rounds"),
        NodeEvent::Training { round, examples, steps, .. } => {
            format!("round {round}: training ({examples} examples, {steps} steps)")
        }
        NodeEvent::Trained { round, loss: Some(loss), .. } => {
            format!("round {round}: trained, mean loss {loss:.4}")
        }
        NodeEvent::Trained { round, .. } => format!("round {round}: trained"),
        NodeEvent::Uploaded { round, bytes, .. } => {
            format!("round {round}: uploaded {:.1} KB", *bytes as f64 / 1000.0)
        }
        NodeEvent::Accepted { round, .. } => format!("round {round}: accepted"),
        NodeEvent::NotUsed { round, detail, .. } => format!("round {round}: not used ({detail})"),
        NodeEvent::Declined { round, detail, .. } => format!("round {round}: declined ({detail})"),
        NodeEvent::Evaluated { round, examples: 0, .. } => {
            format!("round {round}: asked to evaluate, nothing reported")
        }
        NodeEvent::Evaluated { round, examples, .. } => {
            format!("round {round}: evaluated on {examples} examples")
        }
    }
}

#[cfg(test)]
#[path = "node/tests.rs"]
mod tests;
