//! The coordinator's session: collects keys, shares, confirmations, and recovers the masks to take out of the sum.
//!
//! `Advertise → Shares → Collect → Confirm → Unmask → (Late) → Opened → over`. Each step has a file. The caller owns
//! deadlines: it calls [`Session::close_step`] when a step's time is over or [`Session::awaits`] is empty. An impossible
//! message makes a client drop out and never takes the session back.

mod advertise;
mod collect;
mod confirm;
mod journal;
mod shares;
mod unmask;

use std::collections::{BTreeMap, BTreeSet};

use super::abort::{Abort, Reason};
use super::bitmap::ClientSet;
use super::context::{Agreement, ClientId, Hash, SessionId};
use super::group::Group;
use super::keys::{self, MaskTerm, signed};
use super::messages::{Late, Shares, ToClient, ToServer, Unmask};
use super::roster::Entry;
use crate::ledger::record::PublicKey;

/// What a session starts from.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// What is agreed on.
    pub agreement: Agreement,
    /// The cohort, with each member's identity if the coordinator knows it (then no other is accepted).
    pub members: BTreeMap<ClientId, Option<PublicKey>>,
    /// How many segments an update has.
    pub segments: u8,
    /// 32 fresh random bytes, which decide the order of a ring; nobody sees them before the roster is fixed.
    pub beacon: Hash,
}

/// What the caller does next, in order.
#[derive(Clone)]
pub enum Action {
    /// Sends a message to a client.
    Send(ClientId, ToClient),
    /// Appends a record to the session's journal; it must be durable before any later action.
    Journal(Vec<u8>),
    /// A client broke the rules: for the log. It counts as a drop-out from here on, except for an upload that is
    /// already in the sum.
    Fault(ClientId, Fault),
    /// The masks to apply to the sum of all uploads that [`Session::upload_arrived`] accepted: then it is the plain
    /// sum of the survivors' updates. Each upload must be in the sum by now.
    Unmask(Vec<MaskTerm>),
    /// The session is over without a sum.
    Abort(Abort),
}

/// How a client broke the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Fault {
    /// It is not of the cohort, or speaks for another.
    #[error("it is not a member, or speaks for another client")]
    Stranger,
    /// Its identity is not the one that it enrolled.
    #[error("its identity is not the one that it enrolled with")]
    Identity,
    /// A signature is not valid.
    #[error("a signature is not valid")]
    Signature,
    /// A key is of low order, or somebody else's.
    #[error("a key is of low order or belongs to another client")]
    Key,
    /// A second, different message of its kind.
    #[error("it sent a second, different message of the same kind")]
    Contradiction,
    /// A message that cannot be.
    #[error("its message is impossible at this step")]
    Malformed,
    /// The own mask is not the one that it committed to.
    #[error("the mask that it revealed is not the one it committed to")]
    Commitment,
    /// A share that it passed on does not fit the others.
    #[error("a share that it passed on is wrong")]
    Share,
    /// It left.
    #[error("it ended the session: {0:?}")]
    Left(Reason),
}

/// Where a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// Keys are advertised.
    Advertise,
    /// Shares are exchanged; clients train meanwhile.
    Shares,
    /// Masked updates arrive.
    Collect,
    /// Survivors confirm each other.
    Confirm,
    /// Survivors reveal their own masks and shares of drop-outs' keys.
    Unmask,
    /// Survivors answer for those that fell silent.
    Late,
    /// [`Action::Unmask`] was given.
    Opened,
    /// Committed or aborted.
    Over,
}

/// One attempt of one round at the coordinator. It has no `Debug`: it comes to hold opened secrets.
pub struct Session {
    config: SessionConfig,
    context: Hash,
    step: Step,
    adverts: BTreeMap<ClientId, Entry>,
    group: Option<Group>,
    /// Clients that may say nothing more.
    dropped: BTreeSet<ClientId>,
    /// Clients without a connection.
    absent: BTreeSet<ClientId>,
    shares: BTreeMap<u16, Shares>,
    /// U2: those whose shares were routed.
    shared: Option<ClientSet>,
    complaints: BTreeMap<u16, ClientSet>,
    uploaded: BTreeSet<u16>,
    /// U3: the survivors.
    alive: Option<ClientSet>,
    signatures: BTreeMap<u16, [u8; 64]>,
    unmasks: BTreeMap<u16, Unmask>,
    silent: Option<ClientSet>,
    lates: BTreeMap<u16, Late>,
}

impl Session {
    /// A session that waits for the advertisements of its members.
    pub fn new(config: SessionConfig) -> Self {
        Self {
            context: config.agreement.context(),
            config,
            step: Step::Advertise,
            adverts: BTreeMap::new(),
            group: None,
            dropped: BTreeSet::new(),
            absent: BTreeSet::new(),
            shares: BTreeMap::new(),
            shared: None,
            complaints: BTreeMap::new(),
            uploaded: BTreeSet::new(),
            alive: None,
            signatures: BTreeMap::new(),
            unmasks: BTreeMap::new(),
            silent: None,
            lates: BTreeMap::new(),
        }
    }

    /// Where the session is.
    pub fn step(&self) -> Step {
        self.step
    }

    /// The session's id, once the roster is fixed.
    pub fn session_id(&self) -> Option<SessionId> {
        self.group.as_ref().map(|group| group.session)
    }

    /// The ids of the survivors, ascending, once [`Step::Collect`] was closed (or restored from a journal).
    pub fn survivors(&self) -> Option<Vec<ClientId>> {
        let (group, alive) = (self.group.as_ref()?, self.alive.as_ref()?);
        Some(group.roster.ids(alive).collect())
    }

    /// The ids in the roster, ascending, once it is fixed.
    pub fn roster(&self) -> Option<Vec<ClientId>> {
        self.group.as_ref().map(|group| group.roster.entries().iter().map(|entry| entry.id).collect())
    }

    /// The clients whose answer this step still waits for; those without a connection are left out.
    pub fn awaits(&self) -> Vec<ClientId> {
        let from_group = |indices: Vec<u16>| -> Vec<ClientId> {
            let group = self.group.as_ref();
            indices.into_iter().filter_map(|index| group.and_then(|group| group.id(index))).collect()
        };
        let missing = |all: Option<&ClientSet>, has: &dyn Fn(u16) -> bool| {
            all.map_or_else(Vec::new, |all| from_group(all.iter().filter(|&index| !has(index)).collect()))
        };
        let ids = match self.step {
            Step::Advertise => {
                self.config.members.keys().filter(|id| !self.adverts.contains_key(id)).copied().collect()
            }
            Step::Shares => {
                let clients = self.group.as_ref().map_or(0, |group| group.roster.len());
                from_group((0..clients).filter(|index| !self.shares.contains_key(index)).collect())
            }
            Step::Collect => {
                let all = self.alive.as_ref().or(self.shared.as_ref());
                missing(all, &|index| self.uploaded.contains(&index))
            }
            Step::Confirm => missing(self.alive.as_ref(), &|index| self.signatures.contains_key(&index)),
            Step::Unmask => {
                let signers = self.signatures.keys();
                from_group(signers.filter(|index| !self.unmasks.contains_key(index)).copied().collect())
            }
            Step::Late => {
                let helpers = self.unmasks.keys().filter(|index| self.helps(**index));
                from_group(helpers.filter(|index| !self.lates.contains_key(index)).copied().collect())
            }
            Step::Opened | Step::Over => Vec::new(),
        };
        // An upload may still come over another connection, but nobody waits for it.
        ids.into_iter().filter(|id| !self.absent.contains(id) && !self.dropped.contains(id)).collect()
    }

    /// Takes a message from a client whose connection was authenticated as `id`.
    ///
    /// Repetitions and messages of other sessions or past steps are ignored.
    pub fn receive(&mut self, id: ClientId, message: ToServer) -> Vec<Action> {
        if matches!(self.step, Step::Opened | Step::Over) || self.dropped.contains(&id) {
            return Vec::new();
        }
        let outcome = match message {
            ToServer::Advertise(entry) => self.advertised(id, entry),
            ToServer::Abort(reason) => Err(Fault::Left(reason)),
            other => {
                let Some(index) = self.group.as_ref().and_then(|group| group.roster.index_of(&id)) else {
                    return Vec::new();
                };
                let tag = match &other {
                    ToServer::Shares(Shares { session, .. })
                    | ToServer::Complaints { session, .. }
                    | ToServer::AliveSig { session, .. }
                    | ToServer::Unmask(Unmask { session, .. })
                    | ToServer::Late(Late { session, .. }) => *session,
                    ToServer::Advertise(_) | ToServer::Abort(_) => return Vec::new(),
                };
                if self.session_id().map(|session| session.tag()) != Some(tag) {
                    return Vec::new();
                }
                match other {
                    ToServer::Shares(shares) => self.shares_came(index, shares),
                    ToServer::Complaints { about, .. } => self.complained(index, about),
                    ToServer::AliveSig { signature, .. } => self.confirmed(index, signature),
                    ToServer::Unmask(unmask) => self.unmask_came(index, unmask),
                    ToServer::Late(late) => self.late_came(index, late),
                    ToServer::Advertise(_) | ToServer::Abort(_) => Ok(()),
                }
            }
        };
        match outcome {
            Ok(()) => Vec::new(),
            Err(fault) => {
                self.dropped.insert(id);
                vec![Action::Fault(id, fault)]
            }
        }
    }

    /// A client's connection was lost. It is not waited for until [`Session::connected`].
    pub fn disconnected(&mut self, id: ClientId) {
        self.absent.insert(id);
    }

    /// A client is there again, or for the first time since a restart: what it may have missed.
    pub fn connected(&mut self, id: ClientId) -> Vec<Action> {
        self.absent.remove(&id);
        if self.dropped.contains(&id) {
            return Vec::new();
        }
        let Some(index) = self.group.as_ref().and_then(|group| group.roster.index_of(&id)) else {
            return Vec::new();
        };
        let message = match self.step {
            Step::Advertise | Step::Opened | Step::Over => None,
            Step::Shares => self.roster_message(),
            Step::Collect => self.routed_message(index),
            Step::Confirm => self.alive_message(index),
            Step::Unmask => self.signatures_message(index),
            Step::Late => self.late_message(index),
        };
        message.map(|message| Action::Send(id, message)).into_iter().collect()
    }

    /// A masked upload is complete and verified. True if it belongs to the sum: then the caller adds it, else it throws
    /// it away. Uploads after [`Step::Collect`] never count: their sender was declared a drop-out.
    pub fn upload_arrived(&mut self, id: ClientId) -> bool {
        let Some(index) = self.group.as_ref().and_then(|group| group.roster.index_of(&id)) else {
            return false;
        };
        let expected = self.alive.as_ref().or(self.shared.as_ref());
        let counts = self.step == Step::Collect && expected.is_some_and(|set| set.contains(index));
        counts && self.uploaded.insert(index)
    }

    /// Whether a masked upload of this client belongs to the sum: it shared its keys and, once they are fixed, is one of
    /// the survivors.
    pub fn expects_upload(&self, id: ClientId) -> bool {
        let index = self.group.as_ref().and_then(|group| group.roster.index_of(&id));
        let expected = self.alive.as_ref().or(self.shared.as_ref());
        index.is_some_and(|index| expected.is_some_and(|set| set.contains(index)))
    }

    /// Whether an upload was signed by its sender for this session; `digest` is the SHA-256 of its bytes.
    pub fn verify_upload(&self, id: ClientId, digest: &Hash, signature: &[u8; 64]) -> bool {
        let Some(group) = &self.group else { return false };
        let entry = group.roster.index_of(&id).and_then(|index| group.entry(index));
        entry.is_some_and(|entry| {
            keys::verify(&entry.identity, &signed::masked(&group.session, &id, digest), signature)
        })
    }

    /// Closes the step: goes on with those who answered, or aborts.
    pub fn close_step(&mut self) -> Vec<Action> {
        let outcome = match self.step {
            Step::Advertise => self.close_advertise(),
            Step::Shares => self.close_shares(),
            Step::Collect => self.close_collect(),
            Step::Confirm => self.close_confirm(),
            Step::Unmask => self.close_unmask(),
            Step::Late => self.finish(),
            Step::Opened | Step::Over => Ok(Vec::new()),
        };
        outcome.unwrap_or_else(|abort| self.abort(abort))
    }

    /// The sum was taken and is durable: tells the survivors.
    pub fn commit(&mut self) -> Vec<Action> {
        if self.step != Step::Opened {
            return Vec::new();
        }
        self.step = Step::Over;
        let (Some(group), Some(alive)) = (&self.group, &self.alive) else { return Vec::new() };
        let message = ToClient::Committed { session: group.session.tag(), alive: alive.clone() };
        self.shared
            .iter()
            .flat_map(|set| group.roster.ids(set))
            .map(|id| Action::Send(id, message.clone()))
            .collect()
    }

    /// Ends the session: every client is told, and all that was opened is wiped.
    pub fn abort(&mut self, abort: Abort) -> Vec<Action> {
        if self.step == Step::Over {
            return Vec::new();
        }
        self.step = Step::Over;
        self.wipe();
        let message = ToClient::Abort(abort.reason());
        let mut actions: Vec<Action> = match &self.group {
            Some(group) => group.roster.entries().iter().map(|entry| entry.id).collect::<Vec<_>>(),
            None => self.adverts.keys().copied().collect(),
        }
        .into_iter()
        .map(|id| Action::Send(id, message.clone()))
        .collect();
        actions.push(Action::Abort(abort));
        actions
    }

    fn wipe(&mut self) {
        self.unmasks.clear();
        self.lates.clear();
    }

    /// Sends each of a set the message that is made for it.
    fn send_each(&self, set: &ClientSet, message: impl Fn(&Self, u16) -> Option<ToClient>) -> Vec<Action> {
        let id = |index| self.group.as_ref().and_then(|group| group.id(index));
        set.iter().filter_map(|index| Some(Action::Send(id(index)?, message(self, index)?))).collect()
    }

    /// The group, or an error that cannot happen after the first step.
    fn group(&self) -> Result<&Group, Abort> {
        self.group.as_ref().ok_or(Abort::Over)
    }
}
