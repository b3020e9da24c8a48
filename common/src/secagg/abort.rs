//! Why a session ends without a sum: a closed list for the wire, and a line with the detail for one's own log.

use super::context::ClientId;
use super::journal::JournalError;
use super::parameters::ParameterError;
use super::roster::RosterError;

/// Why a session ended, as the other side is told. Nothing in it depends on anybody's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Reason {
    /// Policy does not allow this session.
    Policy = 1,
    /// Graph or threshold are not those of the configuration.
    Parameters = 2,
    /// The roster is not acceptable.
    Roster = 3,
    /// An identity is not the pinned or remembered one.
    Identity = 4,
    /// A signature or a key is not valid.
    Signature = 5,
    /// Too few clients are left.
    TooFew = 6,
    /// Too many clients were declared drop-outs.
    DropOuts = 7,
    /// The client itself was declared a drop-out.
    Excluded = 8,
    /// Too few signatures confirm the survivors.
    Unconfirmed = 9,
    /// A message contradicts an earlier one.
    Contradiction = 10,
    /// A message is not possible.
    Malformed = 11,
    /// An update may not be masked again.
    Repeated = 12,
    /// A drop-out's masks could not be recovered.
    Recovery = 13,
    /// The round was cancelled, or a deadline passed.
    Cancelled = 14,
}

impl Reason {
    /// The reason of this number.
    pub fn from_code(code: u8) -> Option<Self> {
        use Reason::*;
        let all = [
            Policy,
            Parameters,
            Roster,
            Identity,
            Signature,
            TooFew,
            DropOuts,
            Excluded,
            Unconfirmed,
            Contradiction,
            Malformed,
            Repeated,
            Recovery,
            Cancelled,
        ];
        all.into_iter().find(|reason| reason.code() == code)
    }

    /// Its number on the wire.
    pub const fn code(self) -> u8 {
        self as u8
    }
}

/// Why this side ended a session. All secrets are wiped by then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Abort {
    /// `Strict` needs identities that somebody else than the coordinator vouched for.
    #[error(
        "level strict needs the other participants' identities: pin them with `tributary-client peers pin NAME FINGERPRINT`"
    )]
    NoPins,
    /// A participant is not pinned at level `Strict`.
    #[error("client {0} is not pinned, and level strict trusts nobody else: pin it, or ask for level semi")]
    NotPinned(ClientId),
    /// The job asks for less than policy wants.
    #[error(
        "the job's {what} of {asked} is not within policy ({allowed}): change the job or the node's policy"
    )]
    Policy {
        /// What is asked for.
        what: &'static str,
        /// How much of it.
        asked: u64,
        /// What policy allows.
        allowed: u64,
    },
    /// Above [`super::parameters::COMPLETE_CLIENTS`] clients `Strict` would need a public beacon.
    #[error(
        "level strict is limited to 255 clients: the order of a larger ring could be chosen by the coordinator"
    )]
    NoBeacon,
    /// The cohort has no parameters.
    #[error(transparent)]
    Parameters(#[from] ParameterError),
    /// The coordinator's parameters are not those of the configuration.
    #[error(
        "the coordinator says {neighbours} neighbours and threshold {threshold}, the configuration yields {own_neighbours} and {own_threshold}"
    )]
    OtherParameters {
        /// Neighbours that were announced.
        neighbours: u16,
        /// Threshold that was announced.
        threshold: u16,
        /// Neighbours by the configuration.
        own_neighbours: u16,
        /// Threshold by the configuration.
        own_threshold: u16,
    },
    /// The roster is malformed.
    #[error(transparent)]
    Roster(#[from] RosterError),
    /// Own entry is missing or was changed.
    #[error("the roster does not have this client's own entry as it was sent")]
    OwnEntry,
    /// A pinned or remembered identity was changed.
    #[error(
        "client {0} has another identity than the one pinned or remembered: ask its operator before going on"
    )]
    Identity(ClientId),
    /// A neighbour's keys are not signed by its identity for this context.
    #[error("the keys of client {0} are not signed by its identity for this round, model and configuration")]
    Signature(ClientId),
    /// A key is a point of low order.
    #[error("client {0} has a key of low order, with which no secret can be agreed")]
    LowOrder(ClientId),
    /// Shares were routed that belong to no neighbour, or not all of those announced.
    #[error("the routed shares are not those of the clients announced")]
    Routed,
    /// Too few are left.
    #[error("{present} clients are left at {step}, {needed} are needed")]
    TooFew {
        /// At which step.
        step: &'static str,
        /// How many are there.
        present: u16,
        /// How many are needed.
        needed: u16,
    },
    /// Too few of the survivors are pinned.
    #[error("only {pinned} pinned participants are among the survivors, policy wants {needed}")]
    TooFewPinned {
        /// Pinned survivors.
        pinned: u16,
        /// What policy wants.
        needed: u16,
    },
    /// Too many were declared drop-outs.
    #[error("{dropped} of {shared} clients were declared drop-outs, {allowed} are allowed")]
    DropOuts {
        /// Declared drop-outs.
        dropped: u16,
        /// Clients that had shared keys.
        shared: u16,
        /// How many drop-outs are allowed.
        allowed: u16,
    },
    /// Policy wants all clients of the roster among the survivors.
    #[error(
        "{missing} clients of a fixed cohort are missing: their updates could be told by comparing two rounds"
    )]
    FixedCohort {
        /// How many.
        missing: u16,
    },
    /// This client was declared a drop-out: its masks will be removed without it.
    #[error("this client was declared a drop-out; its update is not part of the sum")]
    Excluded,
    /// Survivors that never shared keys.
    #[error("the survivors are not all among the clients that shared keys")]
    Survivors,
    /// Too few signatures.
    #[error("{valid} clients signed the same survivors, {needed} are needed")]
    Unconfirmed {
        /// Valid signatures.
        valid: u16,
        /// How many are needed.
        needed: u16,
    },
    /// A second, different message of its kind.
    #[error("a second, different {0} came: each is accepted once")]
    Contradiction(&'static str),
    /// A message for another step.
    #[error("a {message} cannot come at step {step}")]
    OutOfOrder {
        /// What came.
        message: &'static str,
        /// Where the session is.
        step: &'static str,
    },
    /// The journal forbids this upload, or does not have it.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A dropped client's keys could not be recovered.
    #[error("the masks of client {0} cannot be removed: too few good shares of its secrets came")]
    Recovery(ClientId),
    /// Uploads are missing that a signed bitmap counts.
    #[error("{missing} uploads of the confirmed survivors were lost")]
    UploadsLost {
        /// How many.
        missing: u16,
    },
    /// A journal is of another session or damaged.
    #[error("the session's journal is damaged or of another session")]
    Restore,
    /// The other side ended it.
    #[error("the other side ended the session: {0:?}")]
    Told(Reason),
    /// The session is over already.
    #[error("the session is over")]
    Over,
}

impl Abort {
    /// What the other side is told.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoPins
            | Self::NotPinned(_)
            | Self::Policy { .. }
            | Self::NoBeacon
            | Self::FixedCohort { .. } => Reason::Policy,
            Self::Parameters(ParameterError::TooFew { .. }) => Reason::TooFew,
            Self::Parameters(_) | Self::OtherParameters { .. } => Reason::Parameters,
            Self::Roster(_) | Self::OwnEntry => Reason::Roster,
            Self::Identity(_) => Reason::Identity,
            Self::Signature(_) | Self::LowOrder(_) => Reason::Signature,
            Self::TooFew { .. } | Self::TooFewPinned { .. } => Reason::TooFew,
            Self::DropOuts { .. } => Reason::DropOuts,
            Self::Excluded => Reason::Excluded,
            Self::Unconfirmed { .. } => Reason::Unconfirmed,
            Self::Contradiction(_) => Reason::Contradiction,
            Self::Routed | Self::Survivors | Self::OutOfOrder { .. } => Reason::Malformed,
            Self::Journal(_) => Reason::Repeated,
            Self::Recovery(_) => Reason::Recovery,
            Self::UploadsLost { .. } | Self::Restore | Self::Over => Reason::Cancelled,
            Self::Told(reason) => *reason,
        }
    }
}
