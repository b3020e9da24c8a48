//! A client's session: a state machine that checks every rule itself and trusts the coordinator with nothing.
//!
//! `Advertised → Shared → Ready → Masked → Signed → Unmasked → over`. Each step has a file. An error ends the session:
//! its secrets are wiped, and it never answers again. A message that comes twice gets the same answer, so that a
//! coordinator may start again; a different message of the same kind ends the session.

mod advertise;
mod confirm;
mod mask;
mod share;
mod unmask;

use ed25519_dalek::SigningKey;

use self::advertise::Advertised;
use self::confirm::Signed;
use self::mask::{Masked, Ready};
use self::share::Shared;
pub(super) use self::share::digest as shares_digest;
use self::unmask::Unmasked;
use super::abort::Abort;
use super::bitmap::ClientSet;
use super::context::{Agreement, ClientId, Hash, SessionId, SessionTag, sha256};
use super::group::Group;
use super::journal::{JournalError, Upload, UploadJournal};
use super::keys::{self, MaskTerm, signed};
use super::messages::{ToClient, ToServer};
use super::peers::{ClientPolicy, Peers};
use crate::ledger::hex::Hex;
use crate::ledger::record::PublicKey;

/// What a session starts from.
pub struct SessionConfig {
    /// What this node holds of the round: computed from its own model bytes and configuration.
    pub agreement: Agreement,
    /// This node, [`ClientId::of`] its name.
    pub id: ClientId,
    /// This node's identity.
    pub identity: SigningKey,
    /// What its operator wants.
    pub policy: ClientPolicy,
    /// What it knows about the others.
    pub peers: Peers,
}

/// What the caller does next, in order.
#[derive(Clone)]
pub enum Action {
    /// Sends a message to the coordinator.
    Send(ToServer),
    /// Remembers identities that were seen for the first time ([`Peers::remember`]).
    Remember(Vec<(ClientId, PublicKey)>),
    /// All shares are here: an update can be masked when training is done ([`Session::mask_keys`]).
    Ready,
    /// The sum was taken: residuals of this round may be kept if the own update is `included`, else dropped.
    Committed {
        /// Whether it sums this node's update.
        included: bool,
    },
}

/// Where a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Its keys were sent.
    Advertised,
    /// Shares of its secrets were sent.
    Shared,
    /// Mask keys are available.
    Ready,
    /// Mask keys were handed out; the round is consumed.
    Masked,
    /// The survivors were confirmed.
    Signed,
    /// The own mask was revealed.
    Unmasked,
    /// Committed or ended; no secrets are left.
    Over,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::Advertised => "advertised",
            Self::Shared => "shared",
            Self::Ready => "ready",
            Self::Masked => "masked",
            Self::Signed => "signed",
            Self::Unmasked => "unmasked",
            Self::Over => "over",
        }
    }
}

/// Why there are no mask keys; the session goes on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MaskError {
    /// Too early, or already handed out.
    #[error("mask keys are handed out once, when the shares are here; the session is at step {0:?}")]
    Step(Step),
    /// The journal does not have this upload.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Everything about oneself that no step changes.
struct Own {
    agreement: Agreement,
    context: Hash,
    id: ClientId,
    identity: SigningKey,
    policy: ClientPolicy,
    peers: Peers,
}

impl Own {
    /// Fewest survivors by configuration, policy and compiled floor.
    fn minimum_survivors(&self) -> u16 {
        self.agreement.rules.minimum_survivors.max(self.policy.minimum_survivors)
    }
}

/// The own place in a group.
struct Member {
    group: Group,
    index: u16,
    /// Members whose identity is pinned, without this one.
    pinned: ClientSet,
}

enum Progress {
    Shared(Shared),
    Ready(Ready),
    Masked(Masked),
    Signed(Signed),
    Unmasked(Unmasked),
}

enum State {
    Advertised(Box<Advertised>),
    Member(Box<Member>, Box<Progress>),
    Over,
}

/// One attempt of one round at one client. It has no `Debug` and no serialised form: it holds keys.
pub struct Session {
    own: Own,
    state: State,
    committed: bool,
    session: Option<SessionId>,
    alive: Option<ClientSet>,
}

impl Session {
    /// Starts a session with fresh keys and returns the first message.
    ///
    /// # Errors
    /// [`Abort`] if policy, level or journal forbid it: then nothing was sent.
    pub fn start(
        config: SessionConfig,
        journal: &UploadJournal,
        rng: &mut impl rand::CryptoRng,
    ) -> Result<(Self, ToServer), Abort> {
        let SessionConfig { agreement, id, identity, policy, peers } = config;
        let context = agreement.context();
        let own = Own { agreement, context, id, identity, policy, peers };
        let advertised = Advertised::new(&own, journal, rng)?;
        let message = ToServer::Advertise(advertised.entry().clone());
        let state = State::Advertised(Box::new(advertised));
        Ok((Self { own, state, committed: false, session: None, alive: None }, message))
    }

    /// Where the session is.
    pub fn step(&self) -> Step {
        match &self.state {
            State::Advertised(_) => Step::Advertised,
            State::Member(_, progress) => progress.step(),
            State::Over => Step::Over,
        }
    }

    /// The session's id, once the roster is known.
    pub fn session_id(&self) -> Option<SessionId> {
        self.session
    }

    /// The survivors, once this client confirmed them or the coordinator committed.
    pub fn survivors(&self) -> Option<&ClientSet> {
        self.alive.as_ref()
    }

    /// `H("fl-secagg/v1/transcript" ‖ T ‖ u32 n ‖ bitmap)`, once the survivors were confirmed: for the node's ledger.
    pub fn transcript(&self) -> Option<Hash> {
        let (session, alive) = (self.session?, self.alive.as_ref()?);
        let clients = u32::from(alive.clients()).to_le_bytes();
        Some(sha256(&[b"fl-secagg/v1/transcript", session.as_bytes(), &clients, alive.as_bytes()]))
    }

    /// What is to be recorded in the journal before [`Session::mask_keys`], once the roster is known.
    pub fn upload(&self) -> Option<Upload> {
        let State::Member(member, _) = &self.state else { return None };
        Some(Upload {
            task: self.own.agreement.task.clone(),
            round: self.own.agreement.round,
            model: self.own.agreement.model,
            cohort: Hex(member.group.roster.cohort()),
            session: member.group.session,
        })
    }

    /// Takes a message from the coordinator.
    ///
    /// A message of another session is ignored.
    ///
    /// # Errors
    /// [`Abort`] ends the session. Its secrets are wiped; the caller sends [`ToServer::Abort`] with its reason.
    pub fn receive(
        &mut self,
        message: ToClient,
        rng: &mut impl rand::CryptoRng,
    ) -> Result<Vec<Action>, Abort> {
        if matches!(self.state, State::Over) {
            return if self.committed { Ok(Vec::new()) } else { Err(Abort::Over) };
        }
        if message.session().is_some_and(|tag| Some(tag) != self.session.map(|session| session.tag())) {
            return Ok(Vec::new());
        }
        if let ToClient::Abort(reason) = message {
            self.state = State::Over;
            return Err(Abort::Told(reason));
        }
        // On any error the old state is dropped here, and with it the secrets.
        let (state, actions) = match std::mem::replace(&mut self.state, State::Over) {
            State::Advertised(advertised) => match message {
                ToClient::Roster { entries, beacon, neighbours, threshold } => {
                    let announced = (neighbours, threshold);
                    let (member, shared, actions) =
                        advertised.join(&self.own, entries, beacon, announced, rng)?;
                    self.session = Some(member.group.session);
                    (State::Member(Box::new(member), Box::new(Progress::Shared(shared))), actions)
                }
                other => return Err(out_of_order(&other, Step::Advertised)),
            },
            State::Member(member, progress) => match message {
                ToClient::Roster { entries, beacon, .. } => {
                    if entries != member.group.roster.entries() || beacon != member.group.beacon {
                        return Err(Abort::Contradiction("roster"));
                    }
                    let actions = match progress.as_ref() {
                        Progress::Shared(shared) => vec![Action::Send(shared.message())],
                        _ => Vec::new(),
                    };
                    (State::Member(member, progress), actions)
                }
                ToClient::Committed { alive, .. } => {
                    let included = progress.committed(&member, &alive)?;
                    self.committed = true;
                    self.alive = Some(alive);
                    (State::Over, vec![Action::Committed { included }])
                }
                other => {
                    let (progress, actions) = progress.receive(&self.own, &member, other)?;
                    if let Some(alive) = progress.alive() {
                        self.alive = Some(alive.clone());
                    }
                    (State::Member(member, Box::new(progress)), actions)
                }
            },
            State::Over => return Err(Abort::Over),
        };
        self.state = state;
        Ok(actions)
    }

    /// The masks of this client's update for segments 0 to `segments` − 1, handed out once: to be applied to the
    /// encoded update, which is then uploaded, and re-sent byte for byte if asked again.
    ///
    /// The journal must hold [`Session::upload`] and be durable by now. From here on the round is consumed.
    ///
    /// # Errors
    /// [`MaskError`] if it is not the time, or the journal lacks the upload; the session goes on.
    pub fn mask_keys(&mut self, journal: &UploadJournal, segments: u8) -> Result<Vec<MaskTerm>, MaskError> {
        let step = self.step();
        let recorded = self.upload().is_some_and(|upload| journal.has(&upload));
        match std::mem::replace(&mut self.state, State::Over) {
            State::Member(member, progress) => match *progress {
                Progress::Ready(ready) if recorded => {
                    let (masked, terms) = ready.hand_out(&self.own, &member, segments);
                    self.state = State::Member(member, Box::new(Progress::Masked(masked)));
                    Ok(terms)
                }
                progress => {
                    let error = match progress {
                        Progress::Ready(_) => MaskError::Journal(JournalError::Missing),
                        _ => MaskError::Step(step),
                    };
                    self.state = State::Member(member, Box::new(progress));
                    Err(error)
                }
            },
            state => {
                self.state = state;
                Err(MaskError::Step(step))
            }
        }
    }

    /// The last answer of this step, for a connection that was lost on the way; the coordinator takes it once.
    pub fn resend(&self) -> Option<ToServer> {
        match &self.state {
            State::Advertised(advertised) => Some(ToServer::Advertise(advertised.entry().clone())),
            State::Member(member, progress) => match progress.as_ref() {
                Progress::Shared(shared) => Some(shared.message()),
                Progress::Ready(ready) => ready.received().complaint(member),
                Progress::Masked(masked) => masked.received().complaint(member),
                Progress::Signed(signed) => Some(signed.message(member)),
                Progress::Unmasked(unmasked) => Some(unmasked.message(member)),
            },
            State::Over => None,
        }
    }

    /// Signature over the SHA-256 `digest` of the masked bytes, for the end of the upload; none before masking.
    pub fn sign_upload(&self, digest: &Hash) -> Option<[u8; 64]> {
        let is_masked = matches!(self.step(), Step::Masked | Step::Signed | Step::Unmasked);
        let session = self.session.filter(|_| is_masked)?;
        Some(keys::sign(&self.own.identity, &signed::masked(&session, &self.own.id, digest)))
    }

    /// Ends the session (deadline, operator, lost run) and wipes its secrets.
    pub fn end(&mut self) {
        self.state = State::Over;
    }
}

fn out_of_order(message: &ToClient, step: Step) -> Abort {
    Abort::OutOfOrder { message: message.name(), step: step.name() }
}

impl ToClient {
    /// The session that the message names.
    fn session(&self) -> Option<SessionTag> {
        match self {
            Self::RoutedShares { session, .. }
            | Self::Alive { session, .. }
            | Self::AliveSigs { session, .. }
            | Self::Late { session, .. }
            | Self::Committed { session, .. } => Some(*session),
            Self::Roster { .. } | Self::Abort(_) => None,
        }
    }
}

impl Progress {
    fn step(&self) -> Step {
        match self {
            Self::Shared(_) => Step::Shared,
            Self::Ready(_) => Step::Ready,
            Self::Masked(_) => Step::Masked,
            Self::Signed(_) => Step::Signed,
            Self::Unmasked(_) => Step::Unmasked,
        }
    }

    fn alive(&self) -> Option<&ClientSet> {
        match self {
            Self::Signed(signed) => Some(signed.alive()),
            Self::Unmasked(unmasked) => Some(unmasked.signed().alive()),
            _ => None,
        }
    }

    fn receive(self, own: &Own, member: &Member, message: ToClient) -> Result<(Self, Vec<Action>), Abort> {
        let step = self.step();
        match (self, message) {
            (Self::Shared(shared), ToClient::RoutedShares { shared: who, sealed, .. }) => {
                let (ready, actions) = shared.open(own, member, who, sealed)?;
                Ok((Self::Ready(ready), actions))
            }
            (Self::Ready(ready), ToClient::RoutedShares { shared, sealed, .. }) => {
                let actions = ready.received().again(member, &shared, &sealed)?;
                Ok((Self::Ready(ready), actions))
            }
            (Self::Masked(masked), ToClient::RoutedShares { shared, sealed, .. }) => {
                let actions = masked.received().again(member, &shared, &sealed)?;
                Ok((Self::Masked(masked), actions))
            }
            // Later a coordinator that starts again may still route them; the answer is known to it.
            (progress @ (Self::Signed(_) | Self::Unmasked(_)), ToClient::RoutedShares { .. }) => {
                Ok((progress, Vec::new()))
            }
            (Self::Masked(masked), ToClient::Alive { alive, .. }) => {
                let signed = masked.confirm(own, member, alive)?;
                let actions = vec![Action::Send(signed.message(member))];
                Ok((Self::Signed(signed), actions))
            }
            (Self::Signed(signed), ToClient::Alive { alive, .. }) => {
                signed.again(&alive)?;
                let actions = vec![Action::Send(signed.message(member))];
                Ok((Self::Signed(signed), actions))
            }
            (Self::Unmasked(unmasked), ToClient::Alive { alive, .. }) => {
                unmasked.signed().again(&alive)?;
                let actions = vec![Action::Send(unmasked.signed().message(member))];
                Ok((Self::Unmasked(unmasked), actions))
            }
            (Self::Signed(signed), ToClient::AliveSigs { signatures, .. }) => {
                let unmasked = signed.unmask(member, &signatures)?;
                let actions = vec![Action::Send(unmasked.message(member))];
                Ok((Self::Unmasked(unmasked), actions))
            }
            (Self::Unmasked(unmasked), ToClient::AliveSigs { .. }) => {
                let actions = vec![Action::Send(unmasked.message(member))];
                Ok((Self::Unmasked(unmasked), actions))
            }
            (Self::Unmasked(unmasked), ToClient::Late { alive, silent, .. }) => {
                let (unmasked, answer) = unmasked.late(member, &alive, silent)?;
                Ok((Self::Unmasked(unmasked), vec![Action::Send(answer)]))
            }
            (_, message) => Err(out_of_order(&message, step)),
        }
    }

    /// Whether the own update is in the sum that was committed.
    fn committed(&self, member: &Member, alive: &ClientSet) -> Result<bool, Abort> {
        let clients = member.group.roster.len();
        if alive.clients() != clients || self.alive().is_some_and(|signed| signed != alive) {
            return Err(Abort::Contradiction("list of survivors"));
        }
        match self {
            Self::Shared(_) | Self::Ready(_) => Ok(false),
            _ => Ok(alive.contains(member.index)),
        }
    }
}
