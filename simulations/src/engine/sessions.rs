//! Clients' parts in masked rounds: sessions with real keys, and what a client remembers from round to round.
//!
//! The messages are the ones of a real federation, and so are the keys: fresh, from the operating system. Only the disk
//! is missing, so what a node would read after a restart is kept here, per client.

use std::collections::BTreeMap;

use ed25519_dalek::SigningKey;
use rand::Rng as _;
use tributary_client::machine::{Attempt, Failure};
use tributary_client::policy::Policy;
use tributary_common::digest::Digest;
use tributary_common::exchange::{ExchangeError, Masked, SessionOf, Terms};
use tributary_common::ids::NodeName;
use tributary_common::job::{Job, Level};
use tributary_common::ledger::hex::Hex;
use tributary_common::ledger::record::PublicKey;
use tributary_common::privacy::noise::{NoiseError, SecretRng};
use tributary_common::record::Reason;
use tributary_common::secagg::abort::{Abort, Reason as AbortReason};
use tributary_common::secagg::client::{Action, Session, SessionConfig, Step};
use tributary_common::secagg::context::ClientId;
use tributary_common::secagg::journal::UploadJournal;
use tributary_common::secagg::keys::MaskTerm;
use tributary_common::secagg::messages::{ToClient, ToServer};
use tributary_common::secagg::peers::Peers;

use super::RUN;
use super::nodes::Index;

/// Who the coordinator is to its clients: a real one is named by a hash of its certificate authority.
pub(super) const COORDINATOR: [u8; 32] = [7; 32];

/// What follows from a message, in order.
pub(super) enum Reply {
    /// To the coordinator.
    Send(Vec<u8>),
    /// The update can be masked.
    Keyed,
    /// The session is over without a sum.
    Failed(Failure),
}

/// A client's part in the session of one attempt.
pub(super) struct Joined {
    at: Attempt,
    session: Session,
}

impl Joined {
    /// The attempt.
    pub(super) fn at(&self) -> Attempt {
        self.at
    }

    /// What was said last, for a connection that broke.
    pub(super) fn again(&self) -> Option<Vec<u8>> {
        self.session.resend().map(|message| message.encode())
    }
}

/// What a node has on its disk.
struct Party {
    identity: SigningKey,
    journal: UploadJournal,
    peers: Peers,
}

/// All clients that ever took part in a session.
pub(super) struct Sessions {
    terms: Terms,
    policy: Policy,
    segments: u8,
    /// Where somebody must be pinned, everybody is, by everybody.
    pinned: Option<Peers>,
    parties: BTreeMap<Index, Party>,
    rng: SecretRng,
}

impl Sessions {
    /// The sessions of `job`, whose `exchange` is masked, among the clients `names`.
    ///
    /// # Errors
    /// [`ExchangeError`]; also if the operating system has no random bytes.
    pub(super) fn new<'a>(
        job: &Job,
        exchange: &Masked,
        policy: &Policy,
        names: impl Iterator<Item = (Index, &'a NodeName)>,
    ) -> Result<Self, ExchangeError> {
        let no_bytes = |error: NoiseError| ExchangeError::Noise(error.to_string());
        let mut sessions = Self {
            terms: Terms::of(job, RUN)?,
            policy: policy.clone(),
            segments: exchange.segment_count(),
            pinned: None,
            parties: BTreeMap::new(),
            rng: SecretRng::new().map_err(no_bytes)?,
        };
        let is_strict = job.secure_aggregation.as_ref().is_some_and(|masks| masks.level == Level::Strict);
        if is_strict || policy.minimum_pinned_survivors > 0 {
            let mut pinned = Peers::default();
            for (index, name) in names {
                let identity = sessions.party(index).identity.verifying_key().to_bytes();
                pinned.pin(name.clone(), PublicKey(Hex(identity)));
            }
            sessions.pinned = Some(pinned);
        }
        Ok(sessions)
    }

    fn party(&mut self, index: Index) -> &mut Party {
        let rng = &mut self.rng;
        self.parties.entry(index).or_insert_with(|| {
            let mut seed = [0; 32];
            rng.fill_bytes(&mut seed);
            let identity = SigningKey::from_bytes(&seed);
            Party { identity, journal: UploadJournal::default(), peers: Peers::default() }
        })
    }

    /// Begins a client's part in an attempt with fresh keys: the part, and the first message.
    ///
    /// # Errors
    /// Why there is none; then nothing was sent.
    pub(super) fn begin(
        &mut self,
        index: Index,
        name: &NodeName,
        at: Attempt,
        model: Digest,
        support: Option<&[u8]>,
    ) -> Result<(Joined, Vec<u8>), Failure> {
        let (round, attempt, support) = (at.round, at.attempt, support.map(Digest::of));
        let of = SessionOf { round, attempt, model, support, server: COORDINATOR };
        let (agreement, policy) = (self.terms.agreement(&of), self.policy.of_sessions());
        let pinned = self.pinned.clone();
        let party = self.party(index);
        let peers = pinned.unwrap_or_else(|| party.peers.clone());
        let (id, identity) = (ClientId::of(name), party.identity.clone());
        let config = SessionConfig { agreement, id, identity, policy, peers };
        let Self { parties, rng, .. } = self;
        let empty = UploadJournal::default();
        let journal = parties.get(&index).map_or(&empty, |party| &party.journal);
        let (session, first) = Session::start(config, journal, rng).map_err(|abort| failure(&abort))?;
        Ok((Joined { at, session }, first.encode()))
    }

    /// Takes the coordinator's message; after [`Reply::Failed`] the part is over.
    pub(super) fn receive(
        &mut self,
        index: Index,
        joined: &mut Joined,
        job: &Job,
        message: &[u8],
    ) -> Vec<Reply> {
        let failed = |abort: &Abort, told: Option<AbortReason>| {
            let told = told.map(|reason| Reply::Send(ToServer::Abort(reason).encode()));
            told.into_iter().chain([Reply::Failed(failure(abort))]).collect()
        };
        let message = match ToClient::decode(message) {
            Ok(message) => message,
            Err(error) => {
                joined.session.end();
                let (reason, detail) = (Reason::Training, format!("masked round: {error}"));
                return vec![Reply::Failed(Failure { reason, detail })];
            }
        };
        let before = joined.session.step();
        let actions = match joined.session.receive(message, &mut self.rng) {
            Ok(actions) => actions,
            Err(abort) => {
                let is_told = matches!(abort, Abort::Told(_) | Abort::Over);
                return failed(&abort, (!is_told).then(|| abort.reason()));
            }
        };
        // As a node does: how many there are is known only now.
        if before == Step::Masked
            && joined.session.step() == Step::Signed
            && let Some(alive) = joined.session.survivors()
        {
            let missing = alive.clients().saturating_sub(alive.len());
            if missing > 0 && self.policy.wants_fixed_cohort(job, alive.clients()) {
                joined.session.end();
                let abort = Abort::FixedCohort { missing };
                return failed(&abort, Some(abort.reason()));
            }
        }
        let mut replies = Vec::with_capacity(actions.len());
        for action in actions {
            match action {
                Action::Send(message) => replies.push(Reply::Send(message.encode())),
                Action::Remember(new) => {
                    let peers = &mut self.party(index).peers;
                    new.into_iter().for_each(|(id, identity)| peers.remember(id, identity));
                }
                Action::Ready => replies.push(Reply::Keyed),
                Action::Committed { .. } => {}
            }
        }
        replies
    }

    /// The masks of a client's update, once: the journal then says that the round was masked.
    ///
    /// # Errors
    /// One line; then the update must not be masked.
    pub(super) fn masks(&mut self, index: Index, joined: &mut Joined) -> Result<Vec<MaskTerm>, String> {
        let upload = joined.session.upload().ok_or("the session has no roster")?;
        let segments = self.segments;
        let journal = &mut self.party(index).journal;
        journal.record(upload).map_err(|error| error.to_string())?;
        joined.session.mask_keys(journal, segments).map_err(|error| error.to_string())
    }
}

/// Why the session ended: for the coordinator, and one line.
fn failure(abort: &Abort) -> Failure {
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
    Failure { reason, detail: format!("masked round: {abort}") }
}
