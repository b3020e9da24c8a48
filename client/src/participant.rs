//! A participant: the machine with everything that it commands on the disk, and nothing else. Synchronous: a running
//! node carries out its orders on sockets and threads, a fault simulation in a world of its own.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

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
use tributary_common::time::Time;
use tributary_proto::coordinator as wire;
use tributary_proto::coordinator::node_message::Message as FromNode;

use crate::account::Account;
use crate::encoding::{self, Produced};
use crate::machine::{
    Attempt, Dismissal, Effect, ExampleCounts, Failure, Input, Kept, NodeEvent, NodeMachine, Outcome,
    Profile, RoundKey, Trained,
};
use crate::masking::journal::{JournalError, MaskJournal};
use crate::masking::{Identity, Invitation, MaskedRound, Reply, read_support};
use crate::policy::Policy;
use crate::store::{Facts, Folder, FolderError};
use crate::transport::{self, LedgerNews};

/// A step of a round at which a drill kills the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
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

/// Is told each step of a round as it is reached. With an error the participant ends there, as if it had been killed.
pub type Steps = Box<dyn FnMut(Drill) -> Result<(), Killed> + Send>;

/// A drill ended the participant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a drill ended the node at the step {0:?}")]
pub struct Killed(pub Drill);

/// Why a participant cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// What it masked.
    #[error(transparent)]
    Masked(#[from] JournalError),
}

/// What happens to a participant. No `Debug`: an update may be in it.
pub enum Happening {
    /// The machine's own input.
    Input(Input),
    /// Training succeeded; the update stays with the participant until it is stored.
    Updated(RoundKey, Produced, Trained),
    /// An evaluation under a job; with noised metrics it is not to be told as it is.
    Measured(RoundKey, Arc<Job>, Result<Metrics, Failure>),
    /// A message of an attempt's secure-aggregation session.
    Masking {
        /// The attempt.
        at: Attempt,
        /// The message, encoded.
        message: Vec<u8>,
    },
    /// What the coordinator says about ledgers.
    Ledger(LedgerNews),
}

/// What must be done for a participant, in this order.
#[derive(Debug)]
pub enum Order {
    /// Say something to the coordinator, if there is a connection.
    Send(FromNode),
    /// Get a model, in place of any other that is being fetched: answered by [`Input::ModelReady`] or
    /// [`Input::FetchFailed`].
    Fetch {
        /// Its digest.
        model: Digest,
        /// Its length.
        bytes: u64,
    },
    /// Stop fetching.
    CancelFetch,
    /// Train: answered by [`Happening::Updated`], or [`Input::Trained`] with an error.
    Train {
        /// The round.
        key: RoundKey,
        /// The job.
        job: Arc<Job>,
        /// The model to start from.
        model: Parameters,
    },
    /// Stop training soon; it still answers.
    CancelTraining,
    /// Evaluate: answered by [`Happening::Measured`].
    Evaluate {
        /// The round.
        key: RoundKey,
        /// The job.
        job: Arc<Job>,
        /// The model.
        model: Parameters,
    },
    /// Encode an update, a matter of seconds perhaps: answered by what [`Encoding::run`] returns.
    Encode(Encoding),
    /// Send stored bytes, in place of any others: answered by [`Input::UploadDone`] or [`Input::UploadRefused`].
    Upload {
        /// The attempt that they are for.
        at: Attempt,
        /// The update.
        update: Kept,
    },
    /// Stop sending the update of a round.
    CancelUpload {
        /// The round.
        key: RoundKey,
    },
    /// Tell whoever follows the node.
    Tell(NodeEvent),
    /// End, when everything before is sent.
    Exit,
}

/// An update on its way to the disk. Its secrets are wiped when it is dropped.
pub struct Encoding {
    folder: Arc<Folder>,
    client: NodeName,
    of: Invitation,
    update: Option<Produced>,
    masks: Option<Vec<MaskTerm>>,
    now: Time,
}

impl std::fmt::Debug for Encoding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoding").field("at", &self.of.at).finish_non_exhaustive()
    }
}

impl Encoding {
    /// Encodes, masks if there are masks, and keeps the bytes, flushed.
    pub fn run(self) -> Happening {
        let Self { folder, client, of, mut update, masks, now } = self;
        let result = match &mut update {
            Some(update) => encode_and_keep(&folder, &client, &of, update, masks.as_deref(), now),
            None => Err("the update is gone".into()),
        };
        // Wiped before anything is said about it.
        drop(update);
        Happening::Input(Input::Stored { key: of.at.key(), result })
    }
}

/// What a participant begins with.
pub struct Opening {
    /// What its machine knows of it.
    pub profile: Arc<Profile>,
    /// How many examples it has.
    pub examples: ExampleCounts,
    /// Who it is among other nodes.
    pub identity: Identity,
    /// What its data's privacy budget is charged to.
    pub account: Account,
    /// Its folder.
    pub folder: Arc<Folder>,
    /// Is told of each step.
    pub steps: Steps,
}

/// The machine and everything that it commands on the disk.
pub struct Participant {
    machine: NodeMachine,
    account: Account,
    policy: Policy,
    folder: Arc<Folder>,
    steps: Steps,
    /// The last model that was fetched: an evaluated model is often the next round's.
    model: Option<(Digest, Parameters)>,
    /// What training produced, until it is stored.
    update: Option<(RoundKey, Produced)>,
    identity: Identity,
    /// What was masked, on the disk.
    masked: MaskJournal,
    /// The session of the attempt at work, with its keys.
    session: Option<MaskedRound>,
    /// Whether the coordinator said on this stream which head of the ledger it has: one shown before may have been lost
    /// with the last stream, and the next must continue what is there.
    knows_head: bool,
    inputs: VecDeque<Input>,
}

impl Participant {
    /// Takes up what the folder holds.
    ///
    /// # Errors
    /// One line.
    pub fn open(opening: Opening, now: Time) -> Result<Self, OpenError> {
        let Opening { profile, examples, identity, mut account, folder, steps } = opening;
        let masked = MaskJournal::open(&identity.dir)?;
        let kept = sealed(&mut account, &folder, folder.outbox()?, now)?;
        let rounds: Vec<RoundKey> = kept.iter().map(|(key, _)| *key).collect();
        folder.residuals().settle_all_but(&rounds)?;
        let policy = profile.policy.clone();
        let machine = NodeMachine::new(profile, examples, kept);
        Ok(Self {
            machine,
            account,
            policy,
            folder,
            steps,
            model: None,
            update: None,
            identity,
            masked,
            session: None,
            knows_head: false,
            inputs: VecDeque::new(),
        })
    }

    /// Where the bytes of a stored update are.
    pub fn update_path(&self, key: RoundKey) -> PathBuf {
        self.folder.update_path(key)
    }

    /// When [`Input::Tick`] is due, if nothing else happens before.
    pub fn next_tick(&self) -> Option<Time> {
        self.machine.next_tick()
    }

    /// Its account.
    pub fn account(&mut self) -> &mut Account {
        &mut self.account
    }

    /// Takes what happened; what must be done is returned once all that must be on the disk before is there.
    ///
    /// # Errors
    /// A drill.
    pub fn take(&mut self, now: Time, happening: Happening) -> Result<Vec<Order>, Killed> {
        let mut orders = Vec::new();
        match happening {
            Happening::Input(input) => {
                if matches!(input, Input::Connected | Input::Disconnected) {
                    self.knows_head = false;
                }
                self.inputs.push_back(input);
            }
            Happening::Updated(key, update, trained) => {
                self.update = Some((key, update));
                self.inputs.push_back(Input::Trained { key, result: Ok(trained) });
            }
            Happening::Measured(key, job, result) => {
                let result = result.and_then(|metrics| self.release(key, &job, metrics, now));
                self.inputs.push_back(Input::Evaluated { key, result });
            }
            Happening::Masking { at, message } => self.masking(at, &message, &mut orders)?,
            Happening::Ledger(news) => self.ledger_news(news, now, &mut orders),
        }
        while let Some(input) = self.inputs.pop_front() {
            if let Input::ModelReady { model, parameters } = &input {
                self.model = Some((*model, parameters.clone()));
            }
            let input = self.written(input, now, &mut orders)?;
            for effect in self.machine.step(now, input) {
                self.perform(effect, now, &mut orders)?;
            }
        }
        Ok(orders)
    }

    fn perform(&mut self, effect: Effect, now: Time, orders: &mut Vec<Order>) -> Result<(), Killed> {
        match effect {
            Effect::Decline { at, reason, .. } => {
                let Attempt { run, round, attempt } = at;
                let reason = wire::Reason::from(reason).into();
                let decline = wire::Decline { run: run.0, round, attempt, reason };
                orders.push(Order::Send(FromNode::Decline(decline)));
            }
            Effect::Report { key, metrics } => {
                let metrics = Some(wire::Metrics::from(&metrics));
                let RoundKey { run, round } = key;
                let report = wire::EvaluationReport { run: run.0, round, metrics };
                orders.push(Order::Send(FromNode::Evaluation(report)));
            }
            Effect::Fetch { model, bytes } => self.fetch(model, bytes, orders),
            Effect::CancelFetch => orders.push(Order::CancelFetch),
            Effect::Charge { key, job } => {
                let result = self.account.charge(key, &job, &self.policy, now);
                (self.steps)(Drill::Charged)?;
                self.inputs.push_back(Input::Charged { key, result });
            }
            Effect::Train { key, job, model } => orders.push(Order::Train { key, job, model }),
            Effect::CancelTraining => orders.push(Order::CancelTraining),
            Effect::Evaluate { key, job, model } => orders.push(Order::Evaluate { key, job, model }),
            Effect::Store { at, job, model, support } => {
                self.store(Invitation { at, job, model, support }, now, orders)?;
            }
            Effect::Join { at, job, model, support } => {
                self.join(Invitation { at, job, model, support }, orders);
            }
            Effect::Leave { at } => self.leave(at),
            Effect::Settle { key, outcome } => self.settle(key, outcome),
            Effect::Upload { at, update } => orders.push(Order::Upload { at, update }),
            Effect::Forget { key } => {
                orders.push(Order::CancelUpload { key });
                self.update.take_if(|(of, _)| *of == key);
                if let Err(error) = self.folder.forget(key) {
                    tracing::warn!("an update that is no longer needed stays on the disk: {error}");
                }
                self.settle(key, Outcome::Unknown);
            }
            Effect::Event(event) => orders.push(Order::Tell(event)),
            Effect::Exit => orders.push(Order::Exit),
        }
        Ok(())
    }

    /// Writes into the ledger what must be there before the machine acts on it.
    fn written(&mut self, input: Input, now: Time, orders: &mut Vec<Order>) -> Result<Input, Killed> {
        match input {
            Input::Stored { key, result: Ok(update) } if update.private => {
                (self.steps)(Drill::Stored)?;
                let result = self.account.seal(key, &update, now).map(|()| update);
                (self.steps)(Drill::Sealed)?;
                if result.is_ok() {
                    self.show_head(orders);
                }
                Ok(Input::Stored { key, result })
            }
            Input::UploadDone { .. } => {
                (self.steps)(Drill::Uploaded)?;
                Ok(input)
            }
            Input::Dismissed { at, reason: Dismissal::Abandoned } => {
                if let Err(error) = self.account.abandoned(at.key(), at.attempt, now) {
                    tracing::error!("an abandoned attempt is not in the ledger: {error}");
                }
                Ok(input)
            }
            input => Ok(input),
        }
    }

    /// Shows the ledger's head; before the coordinator said what it has, not yet: it is shown when that comes.
    fn show_head(&mut self, orders: &mut Vec<Order>) {
        if !self.knows_head {
            return;
        }
        let (head, proof) = self.account.head();
        let consistency = proof.iter().map(|hash| hash.0.to_vec()).collect();
        let head = wire::LedgerHead { head: head.to_bytes().to_vec(), consistency };
        orders.push(Order::Send(FromNode::LedgerHead(head)));
    }

    /// What the coordinator says about ledgers.
    fn ledger_news(&mut self, news: LedgerNews, now: Time, orders: &mut Vec<Order>) {
        self.knows_head |= matches!(news, LedgerNews::Known(_));
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
            Ok(()) => self.show_head(orders),
            // Every charge is refused from now on; the head would only confirm it.
            Err(error) => tracing::error!("{error}"),
        }
    }

    /// What may be told of an evaluation: with `[privacy] metrics = "noised"` its counts with noise, once per charge.
    fn release(&mut self, key: RoundKey, job: &Job, metrics: Metrics, now: Time) -> Result<Metrics, Failure> {
        let deviation = match Release::Metrics.protection(job, self.machine.public_test()) {
            Protection::Noise => job.privacy.as_ref().and_then(|privacy| privacy.metrics_noise),
            _ => return Ok(metrics),
        };
        let failed = |detail: String| Failure { reason: Reason::Budget, detail };
        // What was made under this charge is told again, never made again.
        if let Some(kept) = self.folder.metrics(key).map_err(|error| failed(error.to_string()))? {
            self.account.seal_metrics(key, &kept.to_json(), now).map_err(failed)?;
            return Ok(kept);
        }
        let deviation = deviation.ok_or_else(|| failed("the job gives no metrics_noise".into()))?;
        let noised = counts::noised(&metrics, job.model.classes, deviation);
        let noised = noised.map_err(|error| failed(error.to_string()))?;
        self.folder.keep_metrics(key, &noised).map_err(|error| failed(error.to_string()))?;
        self.account.seal_metrics(key, &noised.to_json(), now).map_err(failed)?;
        Ok(noised)
    }

    fn fetch(&mut self, model: Digest, bytes: u64, orders: &mut Vec<Order>) {
        if let Some((_, parameters)) = self.model.as_ref().filter(|(here, _)| *here == model) {
            self.inputs.push_back(Input::ModelReady { model, parameters: parameters.clone() });
            orders.push(Order::CancelFetch);
            return;
        }
        self.model = None;
        orders.push(Order::Fetch { model, bytes });
    }

    fn settle(&self, key: RoundKey, outcome: Outcome) {
        if let Err(error) = self.folder.residuals().settle(key, outcome) {
            tracing::warn!("what the update of round {} left out is lost: {error}", key.round);
        }
    }

    /// Begins a session, or repeats what was said last in it.
    fn join(&mut self, invitation: Invitation, orders: &mut Vec<Order>) {
        let at = invitation.at;
        if let Some(session) = self.session.as_ref().filter(|session| session.at() == at) {
            orders.extend(session.again().map(|message| of_session(at, message)));
            return;
        }
        match MaskedRound::begin(invitation, &self.identity, &self.policy, &self.masked) {
            Ok((session, message)) => {
                self.session = Some(session);
                orders.push(of_session(at, message));
            }
            Err(failure) => self.inputs.push_back(Input::SessionFailed { at, failure }),
        }
    }

    /// Takes a session's message.
    fn masking(&mut self, at: Attempt, message: &[u8], orders: &mut Vec<Order>) -> Result<(), Killed> {
        // Of a session that is not there, there is nothing to say: its keys are gone.
        let Some(session) = self.session.as_mut().filter(|session| session.at() == at) else {
            return Ok(());
        };
        let before = session.step();
        let replies = session.receive(message, &mut self.masked);
        let after = session.step();
        let mut keyed = false;
        for reply in replies {
            match reply {
                Reply::Send(message) => orders.push(of_session(at, message)),
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
        for (_, drill) in drills.filter(|(reached, _)| *reached) {
            (self.steps)(drill)?;
        }
        Ok(())
    }

    /// Ends a session; its keys are wiped.
    fn leave(&mut self, at: Attempt) {
        self.session.take_if(|session| session.at() == at);
    }

    fn store(&mut self, of: Invitation, now: Time, orders: &mut Vec<Order>) -> Result<(), Killed> {
        let key = of.at.key();
        let update = self.update.take_if(|(of, _)| *of == key).map(|(_, update)| update);
        (self.steps)(Drill::Trained)?;
        let masks = match self.masks(&of) {
            Ok(masks) => masks,
            Err(detail) => {
                self.inputs.push_back(Input::Stored { key, result: Err(detail) });
                return Ok(());
            }
        };
        if masks.is_some() {
            (self.steps)(Drill::Masked)?;
        }
        let (folder, client) = (self.folder.clone(), self.identity.node.clone());
        orders.push(Order::Encode(Encoding { folder, client, of, update, masks, now }));
        Ok(())
    }

    /// The masks of the update of an attempt, journalled; `None` without `[secure_aggregation]`.
    fn masks(&mut self, of: &Invitation) -> Result<Option<Vec<MaskTerm>>, String> {
        if of.job.secure_aggregation.is_none() {
            return Ok(None);
        }
        let session = self.session.as_mut().filter(|session| session.at() == of.at);
        session.ok_or("the session is over")?.masks(&mut self.masked).map(Some)
    }
}

fn of_session(at: Attempt, message: Vec<u8>) -> Order {
    let Attempt { run, round, attempt } = at;
    Order::Send(FromNode::Masking(wire::Masking { run: run.0, round, attempt, message }))
}

/// The kept updates whose bytes may be sent: none that are masked, and those of a job with `[privacy]` only once their
/// charge names them, which a crash may have prevented.
fn sealed(
    account: &mut Account,
    folder: &Folder,
    kept: Vec<(RoundKey, Kept)>,
    now: Time,
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
        match if update.private { account.seal(key, &update, now) } else { Ok(()) } {
            Ok(()) => sealed.push((key, update)),
            Err(why) => {
                tracing::warn!("a kept update is deleted, for its charge does not pay for it: {why}");
                folder.forget(key)?;
            }
        }
    }
    Ok(sealed)
}

/// Encodes an update, with masks if there are any, and keeps its bytes and what they leave out.
fn encode_and_keep(
    folder: &Folder,
    client: &NodeName,
    of: &Invitation,
    update: &mut Produced,
    masks: Option<&[MaskTerm]>,
    now: Time,
) -> Result<Kept, String> {
    fn line(error: impl std::error::Error + 'static) -> String {
        transport::chain(&error)
    }
    let Invitation { at, job, model, support } = of;
    let key = at.key();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::account::{AccountConfig, Parties, Source};
    use crate::machine::Role;
    use crate::masking::peers;

    const NOW: Time = Time(1_790_000_000_000);

    fn participant(dir: &std::path::Path) -> Participant {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap().serialize_pem();
        let node: NodeName = "clinic".parse().unwrap();
        let parties = Parties { node: &node, key_pem: &key, authority_der: b"authority" };
        let source = Source { data: Digest::of(b"data"), path: "memory", grouped: false };
        let folder = Arc::new(Folder::open(dir).unwrap());
        let account = Account::open(dir, parties, &AccountConfig::default(), source, NOW).unwrap();
        let key = peers::identity(&key).unwrap();
        let identity = Identity { node, key, server: account.coordinator(), dir: dir.to_path_buf() };
        let profile = Profile {
            role: Role::Trainer,
            policy: Policy::default(),
            example_shape: vec![4],
            classes: 2,
            public_test: false,
            declared_examples: None,
            fitted: Vec::new(),
            grouped: false,
            drain_seconds: 1,
        };
        let (profile, examples) = (Arc::new(profile), ExampleCounts { train: 10, test: 0 });
        let steps: Steps = Box::new(|_| Ok(()));
        Participant::open(Opening { profile, examples, identity, account, folder, steps }, NOW).unwrap()
    }

    fn heads(orders: &[Order]) -> Vec<wire::LedgerHead> {
        let head = |order: &Order| match order {
            Order::Send(FromNode::LedgerHead(head)) => Some(head.clone()),
            _ => None,
        };
        orders.iter().filter_map(head).collect()
    }

    /// Found by fault simulation: a head that was lost with its stream was taken for known, the next one was shown with a
    /// proof from there, and the coordinator sent the node away for good.
    #[test]
    fn on_a_new_stream_no_head_is_shown_before_the_coordinator_said_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let mut node = participant(dir.path());
        node.take(NOW, Happening::Input(Input::Connected)).unwrap();
        let known = Happening::Ledger(LedgerNews::Known(None));
        let first = heads(&node.take(NOW, known).unwrap());
        assert_eq!((first.len(), first[0].consistency.len()), (1, 0));
        let kept = tributary_common::ledger::head::SignedHead::from_bytes(&first[0].head).unwrap();
        // Shown again and lost with the stream.
        let mut orders = Vec::new();
        node.show_head(&mut orders);
        assert_eq!(heads(&orders).len(), 1);
        node.take(NOW, Happening::Input(Input::Disconnected)).unwrap();
        node.take(NOW, Happening::Input(Input::Connected)).unwrap();
        let mut orders = Vec::new();
        node.show_head(&mut orders);
        assert_eq!(heads(&orders), []);
        let shown = heads(&node.take(NOW, Happening::Ledger(LedgerNews::Known(Some(kept)))).unwrap());
        assert_eq!(shown.len(), 1);
    }
}
