//! A running node: carries out what its machine asks for, on sockets, disks and a thread that trains.

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
use tributary_common::exchange::Exchange;
use tributary_common::ids::NodeName;
use tributary_common::job::Job;
use tributary_common::model::Parameters;
use tributary_common::privacy::counts;
use tributary_common::privacy::release::{Protection, Release};
use tributary_common::record::{Metrics, Reason};
use tributary_common::secagg::client::Step as SessionStep;
use tributary_common::secagg::keys::MaskTerm;
use tributary_common::time::{Clock, Time};
use tributary_proto::coordinator as wire;
use tributary_proto::coordinator::node_message::Message as FromNode;

use x509_parser::pem::parse_x509_pem;

use crate::account::{self, Account, AccountError, Parties};
use crate::config::{NodeConfig, NodeData};
use crate::encoding::{self, Produced};
use crate::enrol::{self, Credentials, EnrolError};
use crate::machine::{
    Attempt, Dismissal, Effect, Failure, Input, Kept, NodeEvent, NodeMachine, Outcome, RoundKey, Trained,
};
use crate::masking::journal::{JournalError, MaskJournal};
use crate::masking::peers::{self, PeersError};
use crate::masking::{Identity, Invitation, MaskedRound, Reply, read_support};
use crate::policy::Policy;
use crate::store::{Facts, Folder, FolderError};
use crate::trainer::{ArithmeticTrainer, Task, TorchTrainer, TrainError, Trainer};
use crate::transport::{self, Dialer, Greeting, LedgerNews, Link, LinkEvent};

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
    /// What it masked.
    #[error(transparent)]
    Masked(#[from] JournalError),
    /// Its identity among other nodes.
    #[error(transparent)]
    Peers(#[from] PeersError),
    /// The coordinator will not have it.
    #[error("the coordinator refused this node: {0}")]
    Refused(String),
    /// The operating system gave no thread or no signals.
    #[error("the node cannot run: {0}")]
    Os(#[from] std::io::Error),
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

/// A step of a round at which a drill kills the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Drill {
    /// The round is paid for; nothing was trained.
    Charged,
    /// With masks: there are keys for the update.
    Keyed,
    /// The update is in memory alone.
    Trained,
    /// With masks: the journal says that the update was masked; it is in memory alone.
    Masked,
    /// The update is on the disk; its charge does not name it yet.
    Stored,
    /// Its charge names it; nothing left.
    Sealed,
    /// The coordinator has it.
    Uploaded,
    /// With masks: the survivors are confirmed.
    Confirmed,
    /// With masks: this node's own mask is revealed.
    Unmasked,
}

impl Options {
    /// Stands still for good, if the drill says so.
    fn drill(&self, step: Drill) {
        if self.pause_at == Some(step) {
            eprintln!("drill: stands still, {step:?}");
            loop {
                std::thread::sleep(Duration::from_secs(3600));
            }
        }
    }
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
    let mut account = open_account(config, &data, &credentials, Clock.now())?;
    let masked = MaskJournal::open(&config.dir)?;
    let identity = Identity {
        node: credentials.node.clone(),
        key: peers::identity(&credentials.key_pem)?,
        server: account.coordinator(),
        dir: config.dir.clone(),
    };
    let kept = sealed(&mut account, &folder, folder.outbox()?)?;
    let rounds: Vec<RoundKey> = kept.iter().map(|(key, _)| *key).collect();
    folder.residuals().settle_all_but(&rounds)?;
    let machine = NodeMachine::new(Arc::new(config.profile(&data)), data.counts(), kept);
    let (sender, mut results) = mpsc::channel(QUEUE);
    let worker = Worker::start(credentials.node.clone(), data, options.trainer, sender.clone())?;
    let mut link = Link::open(dialer.clone(), Greeting::new(credentials.node.clone(), config.role));
    let mut node = Node {
        machine,
        account,
        identity,
        masked,
        session: None,
        policy: config.policy.clone(),
        worker,
        options: *options,
        folder,
        dialer: dialer.clone(),
        results: sender,
        fetching: None,
        uploading: None,
        model: None,
        update: None,
        inputs: VecDeque::new(),
        exit: false,
    };
    let mut renewal = interval(Duration::from_secs(RENEWAL_CHECK_SECONDS));
    renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut renewing: Option<JoinHandle<Result<Credentials, EnrolError>>> = None;
    let outcome = loop {
        while let Some(input) = node.inputs.pop_front() {
            let input = node.written(input, &link);
            for effect in node.machine.step(Clock.now(), input) {
                node.perform(effect, &link)?;
            }
        }
        if node.exit {
            break Ok(());
        }
        let tick = node.machine.next_tick();
        tokio::select! {
            event = link.next() => match event {
                Some(LinkEvent::Up { protocol, software }) => {
                    tracing::info!("connected to {} ({software}, protocol {protocol})", config.server);
                    node.inputs.push_back(Input::Connected);
                }
                Some(LinkEvent::Message(input)) => node.inputs.push_back(*input),
                Some(LinkEvent::Masking { at, message }) => node.masking(at, &message, &link),
                Some(LinkEvent::Ledger(news)) => node.ledger_news(news, &link),
                Some(LinkEvent::Down { reason, retry_in }) => {
                    tracing::warn!("not connected: {reason}; next try in {:.1} s", retry_in.as_secs_f64());
                    if let Err(expired) = credentials.check(Clock.now()) {
                        break Err(expired.into());
                    }
                    node.inputs.push_back(Input::Disconnected);
                }
                Some(LinkEvent::Final { reason }) => break Err(NodeError::Refused(reason)),
                None => break Err(NodeError::Refused("the control stream ended".into())),
            },
            Some(result) = results.recv() => node.received(result),
            Some(()) = stopped.recv() => {
                tracing::info!("stopping; once more to stop at once");
                node.inputs.push_back(Input::Shutdown);
            }
            () = sleep_until(until(tick)), if tick.is_some() => node.inputs.push_back(Input::Tick),
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

/// The kept updates whose bytes may be sent: none that are masked, and those of a job with `[privacy]` only once their charge names them, which a
/// crash may have prevented.
fn sealed(
    account: &mut Account,
    folder: &Folder,
    kept: Vec<(RoundKey, Kept)>,
) -> Result<Vec<(RoundKey, Kept)>, FolderError> {
    let mut sealed = Vec::with_capacity(kept.len());
    for (key, update) in kept {
        if update.masked {
            tracing::warn!(
                "the masked update of run {}, round {} is deleted: its keys went with the process that made it",
                key.run,
                key.round
            );
            folder.forget(key)?;
            // It may have left, and be in a published round.
            folder.residuals().settle(key, Outcome::Unknown)?;
            continue;
        }
        match if update.private { account.seal(key, &update, Clock.now()) } else { Ok(()) } {
            Ok(()) => sealed.push((key, update)),
            Err(why) => {
                tracing::warn!("a kept update is deleted, for its charge does not pay for it: {why}");
                folder.forget(key)?;
            }
        }
    }
    Ok(sealed)
}

/// What comes back from tasks and from the thread that trains.
enum Completion {
    /// An evaluation under a job; with noised metrics it is not to be told as it is.
    Measured(RoundKey, Arc<Job>, Result<Metrics, Failure>),
    Input(Input),
    /// Training succeeded; the update stays here until it is stored.
    Update(RoundKey, Produced, Trained),
}

/// The machine and everything that it commands.
struct Node {
    machine: NodeMachine,
    account: Account,
    policy: Policy,
    worker: Worker,
    options: Options,
    folder: Arc<Folder>,
    dialer: Dialer,
    results: mpsc::Sender<Completion>,
    fetching: Option<JoinHandle<()>>,
    uploading: Option<(RoundKey, JoinHandle<()>)>,
    /// The last model that was fetched: an evaluated model is often the next round's.
    model: Option<(Digest, Parameters)>,
    /// What training produced, until it is stored.
    update: Option<(RoundKey, Produced)>,
    identity: Identity,
    /// What was masked, on the disk.
    masked: MaskJournal,
    /// The session of the attempt at work, with its keys.
    session: Option<MaskedRound>,
    inputs: VecDeque<Input>,
    exit: bool,
}

impl Node {
    fn received(&mut self, outcome: Completion) {
        let input = match outcome {
            Completion::Update(key, update, trained) => {
                self.update = Some((key, update));
                Input::Trained { key, result: Ok(trained) }
            }
            Completion::Measured(key, job, result) => {
                let result = result.and_then(|metrics| self.release(key, &job, metrics));
                Input::Evaluated { key, result }
            }
            Completion::Input(input) => input,
        };
        if let Input::ModelReady { model, parameters } = &input {
            self.model = Some((*model, parameters.clone()));
        }
        self.inputs.push_back(input);
    }

    fn perform(&mut self, effect: Effect, link: &Link) -> Result<(), NodeError> {
        match effect {
            Effect::Decline { at, reason, .. } => {
                let Attempt { run, round, attempt } = at;
                let reason = wire::Reason::from(reason).into();
                link.send(FromNode::Decline(wire::Decline { run: run.0, round, attempt, reason }));
            }
            Effect::Report { key, metrics } => {
                let metrics = Some(wire::Metrics::from(&metrics));
                let RoundKey { run, round } = key;
                link.send(FromNode::Evaluation(wire::EvaluationReport { run: run.0, round, metrics }));
            }
            Effect::Fetch { model, bytes } => self.fetch(model, bytes),
            Effect::CancelFetch => {
                // It stays in its place: the next fetch waits for its end.
                if let Some(task) = &self.fetching {
                    task.abort();
                }
            }
            Effect::Charge { key, job } => self.charge(key, &job),
            Effect::Train { key, job, model } => self.worker.send(Command::Train { key, job, model })?,
            Effect::CancelTraining => self.worker.cancel(),
            Effect::Evaluate { key, job, model } => {
                self.worker.send(Command::Evaluate { key, job, model })?
            }
            Effect::Store { at, job, model, support } => {
                self.store(Invitation { at, job, model, support });
            }
            Effect::Join { at, job, model, support } => {
                self.join(Invitation { at, job, model, support }, link);
            }
            Effect::Leave { at } => self.leave(at),
            Effect::Settle { key, outcome } => self.settle(key, outcome),
            Effect::Upload { at, update } => self.upload(at, update),
            Effect::Forget { key } => {
                if let Some((_, task)) = self.uploading.take_if(|(sending, _)| *sending == key) {
                    task.abort();
                }
                self.update.take_if(|(of, _)| *of == key);
                if let Err(error) = self.folder.forget(key) {
                    tracing::warn!("an update that is no longer needed stays on the disk: {error}");
                }
                self.settle(key, Outcome::Unknown);
            }
            Effect::Event(event) => print(&event, self.options.format),
            Effect::Exit => self.exit = true,
        }
        Ok(())
    }

    fn charge(&mut self, key: RoundKey, job: &Job) {
        let result = self.account.charge(key, job, &self.policy, Clock.now());
        self.options.drill(Drill::Charged);
        self.inputs.push_back(Input::Charged { key, result });
    }

    /// Writes into the ledger what must be there before the machine acts on it.
    fn written(&mut self, input: Input, link: &Link) -> Input {
        let now = Clock.now();
        match input {
            Input::Stored { key, result: Ok(update) } if update.private => {
                self.options.drill(Drill::Stored);
                let result = self.account.seal(key, &update, now).map(|()| update);
                self.options.drill(Drill::Sealed);
                if result.is_ok() {
                    self.show_head(link);
                }
                Input::Stored { key, result }
            }
            Input::UploadDone { .. } => {
                self.options.drill(Drill::Uploaded);
                input
            }
            Input::Dismissed { at, reason: Dismissal::Abandoned } => {
                if let Err(error) = self.account.abandoned(at.key(), at.attempt, now) {
                    tracing::error!("an abandoned attempt is not in the ledger: {error}");
                }
                input
            }
            input => input,
        }
    }

    fn show_head(&mut self, link: &Link) {
        let (head, proof) = self.account.head();
        let consistency = proof.iter().map(|hash| hash.0.to_vec()).collect();
        let head = wire::LedgerHead { head: head.to_bytes().to_vec(), consistency };
        link.send(FromNode::LedgerHead(head));
    }

    /// What the coordinator says about ledgers.
    fn ledger_news(&mut self, news: LedgerNews, link: &Link) {
        let now = Clock.now();
        let result = match news {
            LedgerNews::Known(Some(kept)) => self.account.known_head(&kept, now),
            LedgerNews::Known(None) => Ok(()),
            LedgerNews::Head(head) => {
                let kept = self.account.witness(head, now);
                if matches!(kept, Ok(false)) {
                    tracing::warn!(
                        "the coordinator sent a ledger head whose signature is false; it is not kept"
                    );
                }
                return kept.map(|_| ()).unwrap_or_else(|error| tracing::error!("{error}"));
            }
            LedgerNews::RunOver(run) => {
                if let Err(error) = self.folder.residuals().forget(run) {
                    tracing::warn!("what updates to run {run} left out stays on the disk: {error}");
                }
                let returned = self.account.run_over(run, now);
                return returned.unwrap_or_else(|error| tracing::error!("{error}"));
            }
        };
        match result {
            Ok(()) => self.show_head(link),
            // Every charge is refused from now on; the head would only confirm it.
            Err(error) => tracing::error!("{error}"),
        }
    }

    /// What may be told of an evaluation: with `[privacy] metrics = "noised"` its counts with noise, once per charge.
    fn release(&mut self, key: RoundKey, job: &Job, metrics: Metrics) -> Result<Metrics, Failure> {
        let deviation = match Release::Metrics.protection(job, self.machine.public_test()) {
            Protection::Noise => job.privacy.as_ref().and_then(|privacy| privacy.metrics_noise),
            _ => return Ok(metrics),
        };
        let failed = |detail: String| Failure { reason: Reason::Budget, detail };
        // What was made under this charge is told again, never made again.
        if let Some(kept) = self.folder.metrics(key).map_err(|error| failed(error.to_string()))? {
            self.account.seal_metrics(key, &kept.to_json(), Clock.now()).map_err(failed)?;
            return Ok(kept);
        }
        let deviation = deviation.ok_or_else(|| failed("the job gives no metrics_noise".into()))?;
        let noised = counts::noised(&metrics, job.model.classes, deviation);
        let noised = noised.map_err(|error| failed(error.to_string()))?;
        self.folder.keep_metrics(key, &noised).map_err(|error| failed(error.to_string()))?;
        self.account.seal_metrics(key, &noised.to_json(), Clock.now()).map_err(failed)?;
        Ok(noised)
    }

    fn fetch(&mut self, model: Digest, bytes: u64) {
        let before = self.fetching.take();
        if let Some((_, parameters)) = self.model.as_ref().filter(|(here, _)| *here == model) {
            self.inputs.push_back(Input::ModelReady { model, parameters: parameters.clone() });
            if let Some(task) = before {
                task.abort();
            }
            return;
        }
        self.model = None;
        let (dialer, part, results) =
            (self.dialer.clone(), self.folder.part_path(model), self.results.clone());
        self.fetching = Some(tokio::spawn(async move {
            end(before).await;
            let input = match transport::fetch(&dialer, &part, model, bytes).await {
                Ok(parameters) => Input::ModelReady { model, parameters },
                Err(detail) => Input::FetchFailed { model, detail },
            };
            let _ = results.send(Completion::Input(input)).await; // the loop may have ended
        }));
    }

    fn settle(&self, key: RoundKey, outcome: Outcome) {
        if let Err(error) = self.folder.residuals().settle(key, outcome) {
            tracing::warn!("what the update of round {} left out is lost: {error}", key.round);
        }
    }

    /// Begins a session, or repeats what was said last in it.
    fn join(&mut self, invitation: Invitation, link: &Link) {
        let at = invitation.at;
        if let Some(session) = self.session.as_ref().filter(|session| session.at() == at) {
            if let Some(message) = session.again() {
                send_masking(link, at, message);
            }
            return;
        }
        match MaskedRound::begin(invitation, &self.identity, &self.policy, &self.masked) {
            Ok((session, message)) => {
                self.session = Some(session);
                send_masking(link, at, message);
            }
            Err(failure) => self.inputs.push_back(Input::SessionFailed { at, failure }),
        }
    }

    /// Takes a session's message.
    fn masking(&mut self, at: Attempt, message: &[u8], link: &Link) {
        // Of a session that is not there, there is nothing to say: its keys are gone.
        let Some(session) = self.session.as_mut().filter(|session| session.at() == at) else { return };
        let before = session.step();
        let replies = session.receive(message, &mut self.masked);
        let after = session.step();
        let mut keyed = false;
        for reply in replies {
            match reply {
                Reply::Send(message) => send_masking(link, at, message),
                Reply::Keyed => {
                    keyed = true;
                    self.inputs.push_back(Input::Keyed { at });
                }
                Reply::Failed(failure) => self.inputs.push_back(Input::SessionFailed { at, failure }),
            }
        }
        let drills = [(keyed, Drill::Keyed)].into_iter().chain(
            [(SessionStep::Signed, Drill::Confirmed), (SessionStep::Unmasked, Drill::Unmasked)]
                .map(|(step, drill)| (before != step && after == step, drill)),
        );
        drills.filter(|(reached, _)| *reached).for_each(|(_, drill)| self.options.drill(drill));
    }

    /// Ends a session; its keys are wiped.
    fn leave(&mut self, at: Attempt) {
        self.session.take_if(|session| session.at() == at);
    }

    fn store(&mut self, of: Invitation) {
        let key = of.at.key();
        let mut update = self.update.take_if(|(of, _)| *of == key).map(|(_, update)| update);
        self.options.drill(Drill::Trained);
        let masks = match self.masks(&of) {
            Ok(masks) => masks,
            Err(detail) => {
                self.inputs.push_back(Input::Stored { key, result: Err(detail) });
                return;
            }
        };
        let (folder, results) = (self.folder.clone(), self.results.clone());
        let client = self.identity.node.clone();
        tokio::task::spawn_blocking(move || {
            let result = match &mut update {
                Some(update) => encode_and_keep(&folder, &client, &of, update, masks.as_deref()),
                None => Err("the update is gone".into()),
            };
            // Wiped before anything is said about it.
            drop(update);
            let _ = results.blocking_send(Completion::Input(Input::Stored { key, result })); // as above
        });
    }

    /// The masks of the update of an attempt, journalled; `None` without `[secure_aggregation]`.
    fn masks(&mut self, of: &Invitation) -> Result<Option<Vec<MaskTerm>>, String> {
        if of.job.secure_aggregation.is_none() {
            return Ok(None);
        }
        let session = self.session.as_mut().filter(|session| session.at() == of.at);
        let masks = session.ok_or("the session is over")?.masks(&mut self.masked)?;
        self.options.drill(Drill::Masked);
        Ok(Some(masks))
    }

    fn upload(&mut self, at: Attempt, update: Kept) {
        let before = self.uploading.take().map(|(_, task)| task);
        let (dialer, path, results) =
            (self.dialer.clone(), self.folder.update_path(at.key()), self.results.clone());
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
            let _ = results.send(Completion::Input(input)).await; // as above
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

fn send_masking(link: &Link, at: Attempt, message: Vec<u8>) {
    let Attempt { run, round, attempt } = at;
    link.send(FromNode::Masking(wire::Masking { run: run.0, round, attempt, message }));
}

/// Encodes an update, with masks if there are any, and keeps its bytes and what they leave out.
fn encode_and_keep(
    folder: &Folder,
    client: &NodeName,
    of: &Invitation,
    update: &mut Produced,
    masks: Option<&[MaskTerm]>,
) -> Result<Kept, String> {
    fn line(error: impl std::error::Error + 'static) -> String {
        transport::chain(&error)
    }
    let Invitation { at, job, model, support } = of;
    let (key, now) = (at.key(), Clock.now());
    let (private, masked) = (job.privacy.is_some(), masks.is_some());
    // Under masks the weight is one of the integers.
    let examples = if masked { 1 } else { update.update().examples };
    let facts = Facts { model: *model, examples, private, masked };
    let dense = matches!(Exchange::of(job).map_err(line)?, Exchange::Plain(plain) if plain.is_dense());
    if dense && !masked {
        return folder.keep_values(key, facts, &update.update().delta, now).map_err(line);
    }
    let support = read_support(job, support.as_deref())?;
    let layout = Digest::of(format!("{:?}", job.model).as_bytes());
    let journal = match job.has_error_feedback() {
        true => Some(folder.residuals().add(key, layout, &mut update.update_mut().delta).map_err(line)?),
        false => None,
    };
    let update = update.update();
    let encoded = encoding::encode(job, at.round, client, update, support.as_ref(), masks).map_err(line)?;
    if let (Some(mut journal), Some(residual)) = (journal, encoded.residual) {
        journal.write_pending(key.round, layout, Digest::of(&encoded.bytes), residual, None).map_err(line)?;
        folder.residuals().keep(key.run, update.delta.len(), &journal).map_err(line)?;
    }
    folder.keep_bytes(key, facts, &encoded.bytes, now).map_err(line)
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
        results: mpsc::Sender<Completion>,
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
) -> Completion {
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
                    Completion::Update(key, Produced::new(update), trained)
                }
                Err(error) => Completion::Input(Input::Trained { key, result: Err(failure(&error)) }),
            }
        }
        Command::Evaluate { key, job, model } => {
            let result = trainer.evaluate(&job, &model, &data.test).map_err(|error| failure(&error));
            Completion::Measured(key, job, result)
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
