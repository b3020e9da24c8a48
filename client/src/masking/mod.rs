//! This node's part in masked rounds: its session with the other nodes, what it remembers, and whom it knows.
//!
//! A session lives in memory alone, with its keys, for one attempt at one round. What must outlive it is on the disk
//! before anything follows from it: that an update was masked ([`journal`]), which survivors were confirmed, which
//! identities were seen ([`peers`]).

pub mod journal;
pub mod peers;

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ed25519_dalek::SigningKey;
use serde::Serialize;
use tributary_common::digest::Digest;
use tributary_common::exchange::{ExchangeError, Masked, RoundSupport, SessionOf, Terms};
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::Job;
use tributary_common::ledger::hex::Hex;
use tributary_common::ledger::record::{CoordinatorId, PublicKey};
use tributary_common::privacy::noise::SecretRng;
use tributary_common::record::Reason;
use tributary_common::secagg::abort::{Abort, Reason as AbortReason};
use tributary_common::secagg::client::{Action, Session, SessionConfig, Step};
use tributary_common::secagg::context::{ClientId, SessionId};
use tributary_common::secagg::keys::MaskTerm;
use tributary_common::secagg::messages::{ToClient, ToServer};
use tributary_common::secagg::parameters::what_a_sum_reveals;
use tributary_common::secagg::peers::{Peers, Standing};

use self::journal::MaskJournal;
use crate::machine::{Attempt, Failure};
use crate::policy::Policy;

/// Where each masked round that this node helped to open is written down, in the node's folder.
pub const ROUNDS_FILE: &str = "masked.jsonl";

/// Who this node is to the others of a session.
#[derive(Clone)]
pub struct Identity {
    /// Its name.
    pub node: NodeName,
    /// The key of its certificate.
    pub key: SigningKey,
    /// Who its coordinator is.
    pub server: CoordinatorId,
    /// The node's folder.
    pub dir: PathBuf,
}

/// What an attempt is about.
#[derive(Debug, Clone)]
pub struct Invitation {
    /// The attempt.
    pub at: Attempt,
    /// The job.
    pub job: Arc<Job>,
    /// The model that is trained on.
    pub model: Digest,
    /// The round's coordinates, as they came.
    pub support: Option<Arc<[u8]>>,
}

/// What follows from a message, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// To the coordinator.
    Send(Vec<u8>),
    /// Updates can be masked.
    Keyed,
    /// The session is over without a sum, and its secrets are wiped.
    Failed(Failure),
}

/// This node's part in the session of one attempt. No `Debug` and no serialised form: it holds keys.
pub struct MaskedRound {
    invitation: Invitation,
    session: Session,
    identity: Identity,
    policy: Policy,
    peers: Peers,
    segments: u8,
    /// Everybody in it with their identities, in the order of their ids, once known.
    roster: Vec<(ClientId, PublicKey)>,
    told: bool,
}

/// One line of [`ROUNDS_FILE`]: what two nodes compare to see that they opened the same sum.
#[derive(Debug, Serialize)]
struct Opened {
    run: RunId,
    round: u32,
    attempt: u32,
    session: SessionId,
    clients: u16,
    survivors: Vec<ClientId>,
    pinned_survivors: usize,
    transcript: Option<Hex<32>>,
}

/// The coordinates of a masked update of `job`; `None` where all are sent.
///
/// # Errors
/// One line, if what came is not what the job asks for.
pub fn read_support(job: &Job, support: Option<&[u8]>) -> Result<Option<RoundSupport>, String> {
    match (job.support_rule(), support) {
        (None, None) => Ok(None),
        (Some(_), Some(bytes)) => {
            RoundSupport::received(job, bytes).map(Some).map_err(|error| error.to_string())
        }
        (None, Some(_)) => Err("the invitation has a support, but the job sends all coordinates".into()),
        (Some(_), None) => Err("the invitation has no support, but the job needs one".into()),
    }
}

impl MaskedRound {
    /// Begins with fresh keys: this node's part, and the first message.
    ///
    /// # Errors
    /// The reason for the coordinator and one line for the operator; then nothing was sent.
    pub fn begin(
        invitation: Invitation,
        identity: &Identity,
        policy: &Policy,
        journal: &MaskJournal,
    ) -> Result<(Self, Vec<u8>), Failure> {
        let Invitation { at, job, model, support } = &invitation;
        let unsupported = |detail: String| Failure { reason: Reason::Unsupported, detail };
        let exchanged = |error: ExchangeError| unsupported(error.to_string());
        read_support(job, support.as_deref()).map_err(unsupported)?;
        let segments = Masked::of(job).map_err(exchanged)?.segment_count();
        let agreement = Terms::of(job, at.run).map_err(exchanged)?.agreement(&SessionOf {
            round: at.round,
            attempt: at.attempt,
            model: *model,
            support: support.as_deref().map(Digest::of),
            server: identity.server.0.0,
        });
        let refused = |detail: String| Failure { reason: Reason::Policy, detail };
        let peers = peers::load(&identity.dir).map_err(|error| refused(error.to_string()))?;
        let config = SessionConfig {
            agreement,
            id: ClientId::of(&identity.node),
            identity: identity.key.clone(),
            policy: policy.of_sessions(),
            peers: peers.clone(),
        };
        let mut rng = rng()?;
        let (session, first) =
            Session::start(config, journal.uploads(), &mut rng).map_err(|abort| failure(&abort, &peers))?;
        let (identity, policy) = (identity.clone(), policy.clone());
        let (roster, told) = (Vec::new(), false);
        let round = Self { invitation, session, identity, policy, peers, segments, roster, told };
        Ok((round, first.encode()))
    }

    /// The attempt.
    pub fn at(&self) -> Attempt {
        self.invitation.at
    }

    /// Where it stands.
    pub fn step(&self) -> Step {
        self.session.step()
    }

    /// What was said last, for a connection that broke.
    pub fn again(&self) -> Option<Vec<u8>> {
        self.session.resend().map(|message| message.encode())
    }

    /// Takes the coordinator's message. What must be on the disk first is, before a reply is returned.
    pub fn receive(&mut self, message: &[u8], journal: &mut MaskJournal) -> Vec<Reply> {
        match self.take(message, journal) {
            Ok(replies) => replies,
            Err((told, failure)) => {
                self.session.end();
                let abort = told.map(|reason| Reply::Send(ToServer::Abort(reason).encode()));
                abort.into_iter().chain([Reply::Failed(failure)]).collect()
            }
        }
    }

    /// The replies; or what the coordinator is told, if anything, and why the session ends.
    fn take(
        &mut self,
        message: &[u8],
        journal: &mut MaskJournal,
    ) -> Result<Vec<Reply>, (Option<AbortReason>, Failure)> {
        let ended = |abort: Abort, peers: &Peers| {
            let told = (!matches!(abort, Abort::Told(_) | Abort::Over)).then(|| abort.reason());
            (told, failure(&abort, peers))
        };
        let mine =
            |reason: AbortReason, detail: String| (Some(reason), Failure { reason: Reason::Policy, detail });
        let message = ToClient::decode(message).map_err(|error| {
            let detail = format!("the coordinator's message is not one of a session: {error}");
            (Some(AbortReason::Malformed), Failure { reason: Reason::Training, detail })
        })?;
        let entries = match &message {
            ToClient::Roster { entries, .. } if self.roster.is_empty() => {
                Some(entries.iter().map(|entry| (entry.id, entry.identity)).collect())
            }
            _ => None,
        };
        let before = self.session.step();
        let mut rng = rng().map_err(|failure| (Some(AbortReason::Cancelled), failure))?;
        let actions = self.session.receive(message, &mut rng).map_err(|abort| ended(abort, &self.peers))?;
        self.roster = entries.unwrap_or_else(|| std::mem::take(&mut self.roster));
        if before == Step::Masked && self.session.step() == Step::Signed {
            self.confirm(journal).map_err(|error| match error {
                Confirm::Abort(abort) => ended(abort, &self.peers),
                Confirm::Journal(detail) => mine(AbortReason::Policy, detail),
            })?;
        }
        let mut replies = Vec::with_capacity(actions.len());
        for action in actions {
            match action {
                Action::Send(message) => replies.push(Reply::Send(message.encode())),
                Action::Remember(new) => {
                    let remembered = peers::change(&self.identity.dir, |peers| {
                        new.iter().for_each(|(id, identity)| peers.remember(*id, *identity));
                    });
                    // Whoever is not remembered could be another one the next time.
                    remembered.map_err(|error| mine(AbortReason::Policy, error.to_string()))?;
                }
                Action::Ready => {
                    // Before anything is trained for it in vain.
                    if let Some(upload) = self.session.upload() {
                        let allowed = journal.uploads().may_record(&upload);
                        allowed.map_err(|error| mine(AbortReason::Repeated, error.to_string()))?;
                    }
                    replies.push(Reply::Keyed);
                }
                Action::Committed { included } => {
                    tracing::debug!(
                        "{}: the sum was taken; this node's update included: {included}",
                        self.at()
                    );
                }
            }
        }
        if self.session.step() == Step::Unmasked && !self.told {
            self.told = true;
            self.report();
        }
        Ok(replies)
    }

    /// Checks the survivors that the session has signed, and writes them down, before the signature leaves.
    fn confirm(&self, journal: &mut MaskJournal) -> Result<(), Confirm> {
        let Some(alive) = self.session.survivors() else { return Ok(()) };
        let missing = alive.clients().saturating_sub(alive.len());
        if missing > 0 && self.policy.wants_fixed_cohort(&self.invitation.job, alive.clients()) {
            return Err(Confirm::Abort(Abort::FixedCohort { missing }));
        }
        journal
            .confirm(Hex(self.invitation.model.0), alive)
            .map_err(|error| Confirm::Journal(error.to_string()))
    }

    /// The masks of this node's update, once: by then the journal says that it was masked.
    ///
    /// # Errors
    /// One line; then it must not be masked.
    pub fn masks(&mut self, journal: &mut MaskJournal) -> Result<Vec<MaskTerm>, String> {
        if self.session.step() != Step::Ready {
            return Err("the session has no keys".into());
        }
        let upload = self.session.upload().ok_or("the session has no roster")?;
        journal.record(upload).map_err(|error| error.to_string())?;
        self.session.mask_keys(journal.uploads(), self.segments).map_err(|error| error.to_string())
    }

    /// Tells the operator what the sum that is being opened reveals, and keeps what two nodes can compare.
    fn report(&self) {
        let (Some(session), Some(alive)) = (self.session.session_id(), self.session.survivors()) else {
            return;
        };
        let Attempt { run, round, attempt } = self.at();
        let own = ClientId::of(&self.identity.node);
        let members = || alive.iter().filter_map(|index| self.roster.get(usize::from(index)));
        let pinned = |member: &&(ClientId, PublicKey)| {
            member.0 != own && self.peers.standing(&member.0, &member.1) == Standing::Pinned
        };
        let pinned_survivors = members().filter(pinned).count();
        let (survivors, clients) = (alive.len(), alive.clients());
        tracing::info!(
            "{}: masked sum of {survivors} of {clients} nodes, session {session}: {}",
            self.at(),
            what_a_sum_reveals(survivors)
        );
        if pinned_survivors == 0 {
            tracing::warn!(
                "{}: NO OTHER SURVIVOR IS PINNED: the coordinator, which enrolled everybody, could be every other node, and \
                 would then know this node's update; pin them with `tributary-client peers pin NAME FINGERPRINT`",
                self.at()
            );
        }
        let opened = Opened {
            run,
            round,
            attempt,
            session,
            clients,
            survivors: members().map(|(id, _)| *id).collect(),
            pinned_survivors,
            transcript: self.session.transcript().map(Hex),
        };
        if let Err(error) = append(&self.identity.dir.join(ROUNDS_FILE), &opened) {
            tracing::warn!("{ROUNDS_FILE}: the round is not written down: {error}");
        }
    }
}

enum Confirm {
    Abort(Abort),
    Journal(String),
}

fn rng() -> Result<SecretRng, Failure> {
    SecretRng::new().map_err(|error| Failure { reason: Reason::Training, detail: error.to_string() })
}

fn append(path: &Path, opened: &Opened) -> io::Result<()> {
    let mut line = serde_json::to_vec(opened)?;
    line.push(b'\n');
    let mut file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    file.write_all(&line)?;
    file.sync_all()
}

/// Why the session ended, for the coordinator and, with the name of a pinned peer, for the operator.
fn failure(abort: &Abort, peers: &Peers) -> Failure {
    let reason = match abort.reason() {
        AbortReason::Policy
        | AbortReason::Parameters
        | AbortReason::Roster
        | AbortReason::Identity
        | AbortReason::Signature
        | AbortReason::Repeated
        | AbortReason::Contradiction => Reason::Policy,
        AbortReason::TooFew
        | AbortReason::DropOuts
        | AbortReason::Excluded
        | AbortReason::Unconfirmed
        | AbortReason::Malformed
        | AbortReason::Recovery
        | AbortReason::Cancelled => Reason::Training,
    };
    let about = match abort {
        Abort::Identity(id) | Abort::Signature(id) | Abort::NotPinned(id) | Abort::LowOrder(id) => Some(*id),
        _ => None,
    };
    let name = about.and_then(|id| peers.pins().find(|pin| ClientId::of(&pin.name) == id));
    let detail = match name {
        Some(pin) => format!("masked round: {abort} ({})", pin.name),
        None => format!("masked round: {abort}"),
    };
    Failure { reason, detail }
}
