//! The records of a ledger: their words, their one written form, and the hash that chains them.
//!
//! A record is one line of JSON with its keys in a fixed order and each number in its shortest exact form:
//! `{"sequence":…,"previous":…,"salt":…,"hour":…,"body":{…},"hash":…}`. The hash is SHA-256 of the line
//! without its last key, that is, of the object that ends after `body`. The salt is fresh and random, so that
//! nobody who sees a hash can find the record by guessing.
//!
//! Nothing in a record depends on data: no number of examples, no realised batch, no clipped share, no
//! metric. Digests are of bytes that left the process, never of anything before noise or masks. Times are
//! whole hours.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::head::SignedHead;
use super::hex::Hex;
use crate::digest::Digest;
use crate::ids::{NodeName, RunId};
use crate::limits::{COHORT_MEMBERS, REASON_BYTES, ROUNDS};
use crate::privacy::accounting::{Basis, Guarantee};
use crate::privacy::{Adjacency, Event, Noise, SkellamShares, Unit};
use crate::time::Time;

/// Longest line of a ledger, in bytes: a published round of the largest cohort fits.
pub const LINE_BYTES: usize = 32 << 20;
/// Most events that a record lists: the kinds of release of one round.
pub const EVENTS: usize = 16;
/// Longest name of a mechanism, in bytes.
pub const MECHANISM_BYTES: usize = 63;
/// How far noise may be from the sum of its shares, as a part of the variance: errors of arithmetic.
const SHARES_TOLERANCE: f64 = 1e-9;
/// Most accounts that a record lists.
pub const ACCOUNTS: usize = 1024;

/// A SHA-256 hash: of a record, or of a tree over records.
pub type LedgerHash = Hex<32>;
/// Random bytes of one record.
pub type Salt = Hex<16>;

/// What stands before the digits of a record's hash at the end of its line, and after them.
const HASH_KEY: &str = ",\"hash\":\"";
const LINE_END: &str = "\"}";
const TAIL_BYTES: usize = HASH_KEY.len() + 64 + LINE_END.len();

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Hex<$bytes>);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0.short())
            }
        }

        impl std::str::FromStr for $name {
            type Err = super::hex::HexError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

identity! {
    /// A ledger: 128 random bits, drawn when it is made.
    LedgerId, 16
}
identity! {
    /// A dataset's account: 128 random bits, drawn when it is opened. It outlives changes of the data.
    AccountId, 16
}
identity! {
    /// A coordinator as a node pins it: the SHA-256 hash of its authority's certificate.
    CoordinatorId, 32
}
identity! {
    /// An Ed25519 public key.
    PublicKey, 32
}

impl CoordinatorId {
    /// The identity of the coordinator whose authority has this certificate, in DER.
    pub fn of(authority_der: &[u8]) -> Self {
        Self(hash(authority_der))
    }
}

/// The SHA-256 hash of `bytes`.
pub(crate) fn hash(bytes: &[u8]) -> LedgerHash {
    Hex(Sha256::digest(bytes).into())
}

/// Whole hours since the Unix epoch: the only time in a ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Hour(pub u64);

impl Hour {
    /// The hour in which `time` falls.
    pub fn of(time: Time) -> Self {
        Self(time.0 / 3_600_000)
    }
}

impl fmt::Display for Hour {
    /// `2026-11-24 23:00 UTC` (the civil calendar after Howard Hinnant's `civil_from_days`).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let days = self.0 / 24 + 719_468; // since 1 March of the year 0
        let (era, day_of_era) = (days / 146_097, days % 146_097);
        let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
        let month = (5 * day_of_year + 2) / 153; // from March
        let day = day_of_year - (153 * month + 2) / 5 + 1;
        let (month, later) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        write!(f, "{:04}-{month:02}-{day:02} {:02}:00 UTC", era * 400 + year + later, self.0 % 24)
    }
}

/// Whose ledger it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LedgerRole {
    /// A node's: what its data sets spent, for all coordinators.
    Node,
    /// A coordinator's: what one run published.
    Coordinator,
}

/// One run of one coordinator. The coordinator is part of it, for another one may choose the same run id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobKey {
    /// The coordinator.
    pub coordinator: CoordinatorId,
    /// Its run.
    pub run: RunId,
}

impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "run {} of coordinator {}", self.run, self.coordinator.0.short())
    }
}

/// A hash that binds to content and shows nothing of it: see [`Secret::commit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commitment {
    /// Fresh and random, so that equal content does not show.
    pub nonce: Hex<16>,
    /// SHA-256 of a salt, which the secret and the nonce determine, and the content.
    pub hash: LedgerHash,
}

/// What opens a node's commitments: it stays beside the ledger and is in no export, for with a known salt
/// whoever can list the likely contents finds the right one by trying.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret(pub(crate) [u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    /// A secret of these random bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Binds to `content`: a data set's digest, or the name of its source.
    pub fn commit(&self, nonce: Hex<16>, content: &[u8]) -> Commitment {
        let salt = self.salt(nonce);
        Commitment { nonce, hash: salted(salt, content) }
    }

    /// The salt of one commitment: handing it out opens that one alone.
    pub fn salt(&self, nonce: Hex<16>) -> Hex<32> {
        let hasher = Sha256::new().chain_update(b"tributary commitment salt\n");
        Hex(hasher.chain_update(self.0).chain_update(nonce.0).finalize().into())
    }

    /// Whether `commitment` binds to `content`.
    pub fn opens(&self, commitment: &Commitment, content: &[u8]) -> bool {
        commitment.hash == salted(self.salt(commitment.nonce), content)
    }
}

fn salted(salt: Hex<32>, content: &[u8]) -> LedgerHash {
    let hasher = Sha256::new().chain_update(b"tributary commitment\n");
    Hex(hasher.chain_update(salt.0).chain_update(content).finalize().into())
}

impl From<Guarantee> for Claim {
    fn from(guarantee: Guarantee) -> Self {
        Self { epsilon: guarantee.epsilon, delta: guarantee.delta, basis: guarantee.basis }
    }
}

/// What a job promises over all its rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// At least 0 and finite.
    pub epsilon: f64,
    /// Above 0 and below 1.
    pub delta: f64,
    /// The accountant that computed it, and its order or grid.
    pub basis: Basis,
}

impl From<&Guarantee> for Claim {
    fn from(guarantee: &Guarantee) -> Self {
        Self { epsilon: guarantee.epsilon, delta: guarantee.delta, basis: guarantee.basis }
    }
}

/// What leaves a node in a round, each kind at most once under one charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Release {
    /// The update of the model.
    Update,
    /// Noised metrics.
    Metrics,
}

/// The other side of a ledger.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Party {
    /// A coordinator.
    Coordinator(CoordinatorId),
    /// A node.
    Node(NodeName),
}

/// One participant of a round at the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Participant {
    /// The node.
    pub node: NodeName,
    /// Digest of the bytes that arrived from it; `None` where they are not noised, so that their digest would
    /// tell.
    pub payload: Option<Digest>,
}

/// What shows that a ledger was longer once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evidence {
    /// The node's own note of its last durable record.
    Acknowledged {
        /// That record's sequence number.
        sequence: u64,
        /// Its hash.
        hash: LedgerHash,
    },
    /// That note is missing.
    NoAcknowledgement,
    /// A head that the ledger's owner signed and another party kept.
    Head(SignedHead),
}

/// What an account is charged for records that were lost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LostCharge {
    /// The account.
    pub account: AccountId,
    /// Rényi divergence at the account's order, at least 0 and finite.
    pub rho: f64,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case", rename_all_fields = "snake_case", deny_unknown_fields)]
pub enum Body {
    /// Always the first record.
    LedgerOpened {
        /// The ledger.
        ledger: LedgerId,
        /// The key that signs its heads.
        public_key: PublicKey,
        /// Whose it is.
        role: LedgerRole,
        /// The owner's name.
        name: NodeName,
    },

    /// Node: a dataset gets an account.
    AccountOpened {
        /// The account.
        account: AccountId,
        /// What the operator calls it.
        name: NodeName,
        /// Whom the account protects.
        unit: Unit,
        /// From which neighbours.
        adjacency: Adjacency,
        /// Above 0 and below 1.
        delta: f64,
        /// The Rényi order at which the account adds up, above 1.
        order: f64,
        /// The guarantee; `None` for an account that only counts.
        cap_epsilon: Option<f64>,
        /// The data.
        data: Commitment,
        /// Where the data come from.
        source: Commitment,
        /// Accounts of which the operator says that they share no unit with this one.
        disjoint_from: Vec<AccountId>,
    },
    /// Node: an account's data are other data now. What was spent stays spent.
    DatasetChanged {
        /// The account.
        account: AccountId,
        /// The data.
        data: Commitment,
        /// Where they come from.
        source: Commitment,
    },
    /// Node: the operator says that two accounts share no unit.
    DisjointDeclared {
        /// The account.
        account: AccountId,
        /// The other account.
        other: AccountId,
    },
    /// Node: a job was accepted; its whole cost is set aside.
    JobReserved {
        /// The account that pays.
        account: AccountId,
        /// The run.
        key: JobKey,
        /// Digest of the job file.
        job: Digest,
        /// Whom the job protects.
        unit: Unit,
        /// From which neighbours.
        adjacency: Adjacency,
        /// The mechanism's name.
        mechanism: String,
        /// Most rounds that may be charged.
        rounds: u32,
        /// What one round does, noised metrics included: raw parameters.
        events: Vec<Event>,
        /// What the job promises.
        claim: Claim,
        /// What all rounds cost the account: Rényi divergence at its order.
        rho: f64,
    },
    /// Node: a job without a guarantee was accepted. From here on the account's epsilon is infinite.
    UnboundedRelease {
        /// The account.
        account: AccountId,
        /// The run.
        key: JobKey,
        /// Digest of the job file.
        job: Digest,
        /// Most rounds that may be charged.
        rounds: u32,
        /// Why it was allowed, in one line.
        reason: String,
    },
    /// Node: a round is paid for. Written before it trains.
    RoundCharged {
        /// The account.
        account: AccountId,
        /// The run.
        key: JobKey,
        /// The round.
        round: u32,
        /// What is paid for: the reservation's events.
        events: Vec<Event>,
    },
    /// Node: an encoded payload is on the disk. Written before its first byte leaves.
    PayloadSealed {
        /// The account.
        account: AccountId,
        /// The run.
        key: JobKey,
        /// The round.
        round: u32,
        /// What it carries.
        release: Release,
        /// Digest of its bytes.
        payload: Digest,
        /// Its length.
        bytes: u64,
    },
    /// Node: an attempt at a charged round was abandoned by the coordinator.
    AttemptAbandoned {
        /// The account.
        account: AccountId,
        /// The run.
        key: JobKey,
        /// The round.
        round: u32,
        /// The attempt.
        attempt: u32,
    },
    /// Node: a run is over; the rounds that never started are given back. Nothing is charged to it any more.
    RoundsReturned {
        /// The account.
        account: AccountId,
        /// The run.
        key: JobKey,
        /// Rounds reserved and never charged.
        rounds: u32,
    },
    /// Node: evidence that this ledger was longer once. Nothing is spent until the operator accepts.
    RestoreDetected {
        /// The evidence.
        evidence: Evidence,
    },
    /// Node: the operator accepts that records were lost.
    RestoreAccepted {
        /// Why, in one line.
        reason: String,
        /// What every account is charged for what may have been in them.
        charges: Vec<LostCharge>,
        /// The charges fill every capped account; if not, the operator chose them.
        worst_case: bool,
    },

    /// Either side: a head of the other side's ledger.
    HeadWitnessed {
        /// Whose.
        of: Party,
        /// The head.
        head: SignedHead,
    },

    /// Coordinator: always the second record. A ledger has one run.
    RunOpened {
        /// The run.
        key: JobKey,
        /// Digest of the job file.
        job: Digest,
        /// Whom the job protects; `None` for nobody.
        unit: Option<Unit>,
        /// The mechanism's name.
        mechanism: String,
        /// Rounds to publish.
        rounds: u32,
        /// What one round does: raw parameters. Empty without a guarantee.
        events: Vec<Event>,
        /// What the job promises.
        claim: Option<Claim>,
    },
    /// Coordinator: noise was added to an aggregate. Written before it is published.
    RoundNoised {
        /// The round.
        round: u32,
        /// What was done.
        events: Vec<Event>,
    },
    /// Coordinator: a model is committed.
    RoundPublished {
        /// The round, from 1.
        round: u32,
        /// The attempt.
        attempt: u32,
        /// Digest of the model.
        model: Digest,
        /// Whose payloads are in it.
        participants: Vec<Participant>,
    },
    /// Coordinator: an attempt ended without a model.
    RoundAbandoned {
        /// The round, from 1.
        round: u32,
        /// The attempt.
        attempt: u32,
        /// Whose payloads had arrived.
        participants: Vec<Participant>,
    },
    /// Coordinator: noised metrics arrived.
    MetricsReceived {
        /// The round.
        round: u32,
        /// From whom.
        participants: Vec<Participant>,
    },
    /// Coordinator: the run is over.
    RunEnded {
        /// Rounds published.
        rounds: u32,
    },
}

impl Body {
    /// The coordinator whom the record concerns: it is in the sub-log that this coordinator is shown heads
    /// of. Records that concern nobody in particular are in none, but for the first, which is in all.
    pub fn concerns(&self) -> Option<CoordinatorId> {
        match self {
            Body::JobReserved { key, .. }
            | Body::UnboundedRelease { key, .. }
            | Body::RoundCharged { key, .. }
            | Body::PayloadSealed { key, .. }
            | Body::AttemptAbandoned { key, .. }
            | Body::RoundsReturned { key, .. } => Some(key.coordinator),
            Body::HeadWitnessed { of: Party::Coordinator(id), .. } => Some(*id),
            Body::RestoreDetected { evidence: Evidence::Head(head) } => head.coordinator(),
            _ => None,
        }
    }

    /// Checks that every number can be computed with and every list and text is within its bound.
    ///
    /// # Errors
    /// Which field is wrong, in one line.
    pub fn check(&self) -> Result<(), &'static str> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let delta_is_sound = |delta: f64| positive(delta) && delta < 1.0;
        let claim_is_sound =
            |claim: &Claim| claim.epsilon.is_finite() && claim.epsilon >= 0.0 && delta_is_sound(claim.delta);
        let sound = |holds: bool, problem| if holds { Ok(()) } else { Err(problem) };
        let cost = |rho: f64| sound(rho.is_finite() && rho >= 0.0, "rho is not a finite number from 0");
        let line = |text: &str| {
            let fits = text.len() <= REASON_BYTES && !text.chars().any(char::is_control);
            sound(fits, "the reason is longer than one line of 512 bytes")
        };
        let mechanism = |name: &str| {
            let fits = (1..=MECHANISM_BYTES).contains(&name.len()) && !name.chars().any(char::is_control);
            sound(fits, "the mechanism's name is not 1 to 63 bytes of text")
        };
        let rounds = |rounds: u32| sound(rounds <= ROUNDS, "there are more rounds than a job may ask for");
        let accounts = |count: usize| sound(count <= ACCOUNTS, "there are more than 1024 accounts");
        match self {
            Body::AccountOpened { delta, order, cap_epsilon, disjoint_from, .. } => {
                sound(delta_is_sound(*delta), "delta is not above 0 and below 1")?;
                sound(order.is_finite() && *order > 1.0, "the order is not a finite number above 1")?;
                sound(cap_epsilon.is_none_or(positive), "the cap is not a finite number above 0")?;
                accounts(disjoint_from.len())
            }
            Body::JobReserved { mechanism: name, rounds: count, events, claim, rho, .. } => {
                mechanism(name)?;
                rounds(*count)?;
                check_events(events)?;
                sound(claim_is_sound(claim), "the claim is not an epsilon from 0 and a delta from 0 to 1")?;
                cost(*rho)
            }
            Body::RunOpened { mechanism: name, rounds: count, events, claim, .. } => {
                mechanism(name)?;
                rounds(*count)?;
                check_events(events)?;
                let claim = claim.as_ref().is_none_or(claim_is_sound);
                sound(claim, "the claim is not an epsilon from 0 and a delta from 0 to 1")
            }
            Body::UnboundedRelease { rounds: count, reason, .. } => {
                rounds(*count)?;
                line(reason)
            }
            Body::RoundCharged { events, .. } | Body::RoundNoised { events, .. } => check_events(events),
            Body::RestoreAccepted { reason, charges, .. } => {
                line(reason)?;
                accounts(charges.len())?;
                charges.iter().try_for_each(|charge| cost(charge.rho))
            }
            Body::RoundPublished { participants, .. }
            | Body::RoundAbandoned { participants, .. }
            | Body::MetricsReceived { participants, .. } => {
                let few = participants.len() <= COHORT_MEMBERS as usize;
                sound(few, "there are more participants than a cohort may have")
            }
            _ => Ok(()),
        }
    }
}

/// Checks that an accountant can compute with the events.
fn check_events(events: &[Event]) -> Result<(), &'static str> {
    let positive = |value: f64| value.is_finite() && value > 0.0;
    let sound = |event: &Event| {
        let rate = positive(event.sampling_rate) && event.sampling_rate <= 1.0;
        let numbers = positive(event.sensitivity) && positive(event.noise_standard_deviation);
        let shares = match &event.noise {
            Noise::Gaussian | Noise::DiscreteGaussian => true,
            Noise::Skellam(shares) => shares_are_sound(shares, event.noise_standard_deviation),
        };
        rate && numbers && shares && event.count > 0
    };
    if events.len() > EVENTS {
        return Err("there are more than 16 events");
    }
    if events.iter().all(sound) { Ok(()) } else { Err("an event has a number outside its range") }
}

/// Checks that an accountant can compute with noise in shares, and that they make up the `deviation` that is accounted for.
fn shares_are_sound(noise: &SkellamShares, deviation: f64) -> bool {
    let positive = |value: f64| value.is_finite() && value > 0.0;
    let part = |value: f64| (0.0..1.0).contains(&value);
    let variance = f64::from(noise.honest()) * noise.share_variance;
    let sum = deviation * deviation;
    noise.colluders < noise.survivors
        && noise.dimension > 0
        && [noise.share_variance, noise.scale, noise.clip_norm].into_iter().all(positive)
        && part(noise.rounding_failure)
        && part(noise.sampler_distance)
        && (sum - variance).abs() <= SHARES_TOLERANCE * variance
}

/// Why a line is not a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The line is not of the form of a record.
    #[error("is not a record: {0}")]
    Form(String),
    /// The line says the same as a record does, in another form.
    #[error("is not written in the one form of a record")]
    NotCanonical,
    /// The line was changed after it was written.
    #[error("has the hash {stated}, and its content has {found}: it was changed after it was written")]
    Hash {
        /// The hash in the line.
        stated: LedgerHash,
        /// The hash of the rest of the line.
        found: LedgerHash,
    },
    /// A value is outside its range.
    #[error("has a value outside its range: {0}")]
    Value(&'static str),
    /// The line is too long.
    #[error("is longer than {LINE_BYTES} bytes")]
    Long,
}

/// One record of a ledger. Its hash is always right, for there are two ways to have one: sealing and reading.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    content: Content,
    hash: LedgerHash,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    sequence: u64,
    previous: LedgerHash,
    salt: Salt,
    hour: Hour,
    body: Body,
}

impl Record {
    /// The record that follows `previous`, or the first one.
    ///
    /// `hour` is raised to the previous record's, so that a clock that is set back does not disorder a
    /// ledger.
    ///
    /// # Errors
    /// [`RecordError::Value`], [`RecordError::Long`].
    pub fn seal(
        previous: Option<&Record>,
        hour: Hour,
        salt: Salt,
        body: Body,
    ) -> Result<Record, RecordError> {
        let link = previous.map(|record| (record.sequence(), record.hash, record.hour()));
        Self::chain(link, hour, salt, body)
    }

    /// [`Record::seal`] from what is needed of the previous record.
    pub(crate) fn chain(
        previous: Option<(u64, LedgerHash, Hour)>,
        hour: Hour,
        salt: Salt,
        body: Body,
    ) -> Result<Record, RecordError> {
        body.check().map_err(RecordError::Value)?;
        let (sequence, previous, hour) = match previous {
            Some((sequence, hash, earlier)) => (sequence.saturating_add(1), hash, hour.max(earlier)),
            None => (0, Hex([0; 32]), hour),
        };
        let content = Content { sequence, previous, salt, hour, body };
        let text = content.text()?;
        if text.len() + TAIL_BYTES > LINE_BYTES {
            return Err(RecordError::Long);
        }
        Ok(Record { hash: hash(text.as_bytes()), content })
    }

    /// Reads a line without its line break.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn parse(line: &str) -> Result<Record, RecordError> {
        let form = |problem: &str| RecordError::Form(problem.to_owned());
        if line.len() > LINE_BYTES {
            return Err(RecordError::Long);
        }
        let cut = line.len().checked_sub(TAIL_BYTES).ok_or_else(|| form("it is too short"))?;
        let (front, tail) = line.split_at_checked(cut).ok_or_else(|| form("its hash is missing"))?;
        let digits = tail.strip_prefix(HASH_KEY).and_then(|tail| tail.strip_suffix(LINE_END));
        let digits = digits.ok_or_else(|| form("its hash is missing"))?;
        let stated: LedgerHash = digits.parse().map_err(|_| form("its hash is not 64 digits"))?;
        let mut text = String::with_capacity(front.len() + 1);
        text.push_str(front);
        text.push('}');
        let found = hash(text.as_bytes());
        if found != stated {
            return Err(RecordError::Hash { stated, found });
        }
        let content: Content = serde_json::from_str(&text).map_err(|error| form(&error.to_string()))?;
        content.body.check().map_err(RecordError::Value)?;
        if content.text()? != text {
            return Err(RecordError::NotCanonical);
        }
        Ok(Record { content, hash: stated })
    }

    /// The record's line, without a line break.
    pub fn line(&self) -> String {
        // A record that was sealed or read has been written before, so this cannot fail.
        let mut line = self.content.text().unwrap_or_default();
        line.pop();
        line.push_str(HASH_KEY);
        line.push_str(&self.hash.to_string());
        line.push_str(LINE_END);
        line
    }

    /// Its place, from 0.
    pub fn sequence(&self) -> u64 {
        self.content.sequence
    }

    /// The hash of the record before; zeros in the first.
    pub fn previous(&self) -> LedgerHash {
        self.content.previous
    }

    /// When it was written.
    pub fn hour(&self) -> Hour {
        self.content.hour
    }

    /// What it says.
    pub fn body(&self) -> &Body {
        &self.content.body
    }

    /// Its hash.
    pub fn hash(&self) -> LedgerHash {
        self.hash
    }

    /// What the next record needs of this one.
    pub(crate) fn link(&self) -> (u64, LedgerHash, Hour) {
        (self.sequence(), self.hash, self.hour())
    }
}

impl Content {
    fn text(&self) -> Result<String, RecordError> {
        serde_json::to_string(self).map_err(|error| RecordError::Form(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened() -> Body {
        Body::LedgerOpened {
            ledger: LedgerId(Hex([1; 16])),
            public_key: PublicKey(Hex([2; 32])),
            role: LedgerRole::Node,
            name: "st-mary".parse().unwrap(),
        }
    }

    fn reserved(delta: f64, events: Vec<Event>) -> Body {
        Body::JobReserved {
            account: AccountId(Hex([3; 16])),
            key: JobKey { coordinator: CoordinatorId(Hex([4; 32])), run: RunId(5) },
            job: Digest::of(b"job"),
            unit: Unit::Example,
            adjacency: Adjacency::AddOrRemoveOne,
            mechanism: "dp-sgd".into(),
            rounds: 30,
            events,
            claim: Claim { epsilon: 2.6, delta, basis: Basis::Rdp { order: 7.0 } },
            rho: 0.1 + 0.2,
        }
    }

    #[test]
    fn a_line_is_the_one_form_of_its_record() {
        let first = Record::seal(None, Hour(494_000), Hex([7; 16]), opened()).unwrap();
        let body = reserved(1e-5, vec![Event::gaussian(0.05, 1.6, 10)]);
        let second = Record::seal(Some(&first), Hour(3), Hex([8; 16]), body).unwrap();
        assert_eq!((second.sequence(), second.previous(), second.hour()), (1, first.hash(), Hour(494_000)));
        for record in [&first, &second] {
            assert_eq!(&Record::parse(&record.line()).unwrap(), record);
        }
        // Frozen: a change of the form makes every ledger unreadable.
        assert_eq!(
            first.line(),
            "{\"sequence\":0,\"previous\":\"0000000000000000000000000000000000000000000000000000000000000000\",\
             \"salt\":\"07070707070707070707070707070707\",\"hour\":494000,\"body\":{\"record\":\"ledger-opened\",\
             \"ledger\":\"01010101010101010101010101010101\",\
             \"public_key\":\"0202020202020202020202020202020202020202020202020202020202020202\",\
             \"role\":\"node\",\"name\":\"st-mary\"},\
             \"hash\":\"3a50da5a2e61cadac534569310d158136a8d1601aff519b2501cc494a0afa012\"}"
        );
        // Frozen too: noise that one party adds is a word, noise in shares an object.
        let gaussian = "\"events\":[{\"noise\":\"gaussian\",\"sampling_rate\":0.05,\"sensitivity\":1.0,\
             \"noise_standard_deviation\":1.6,\"count\":10}]";
        assert!(second.line().contains(gaussian), "{}", second.line());
        let noise = Noise::Skellam(SkellamShares {
            survivors: 4,
            colluders: 1,
            share_variance: 3.0,
            dimension: 32,
            scale: 10.0,
            clip_norm: 0.5,
            rounding_failure: 0.0,
            sampler_distance: 1e-30,
        });
        let event = Event { noise, sensitivity: 7.5, ..Event::gaussian(1.0, 3.0, 1) };
        let third = Record::seal(Some(&second), Hour(4), Hex([9; 16]), reserved(1e-5, vec![event])).unwrap();
        assert_eq!(Record::parse(&third.line()).unwrap(), third);
        let skellam = "{\"noise\":{\"skellam\":{\"survivors\":4,\"colluders\":1,\"share_variance\":3.0,\"dimension\":32,\
             \"scale\":10.0,\"clip_norm\":0.5,\"rounding_failure\":0.0,\"sampler_distance\":1e-30}},\
             \"sampling_rate\":1.0,\"sensitivity\":7.5,\"noise_standard_deviation\":3.0,\"count\":1}";
        assert!(third.line().contains(skellam), "{}", third.line());
        let numbers = "\"claim\":{\"epsilon\":2.6,\"delta\":0.00001,\"basis\":{\"accountant\":\"rdp\",\"order\":7.0}},\"rho\":0.30000000000000004}";
        assert!(second.line().contains(numbers), "{}", second.line());
    }

    #[test]
    fn every_changed_byte_is_seen() {
        let record = Record::seal(None, Hour(1), Hex([7; 16]), opened()).unwrap();
        let line = record.line();
        for at in 0..line.len() {
            for bit in 0..7 {
                let mut bytes = line.clone().into_bytes();
                bytes[at] ^= 1 << bit;
                let changed = String::from_utf8(bytes).unwrap();
                assert!(Record::parse(&changed).is_err(), "{changed}");
            }
            assert!(Record::parse(&line[..at]).is_err());
        }
        let spaced = line.replace("\"hour\":1", "\"hour\": 1");
        assert!(matches!(Record::parse(&spaced), Err(RecordError::Hash { .. })));
        assert!(Record::parse(&format!("{line} ")).is_err());
    }

    /// A forger can compute hashes too: another form of the same words, and words that no accountant can
    /// read.
    #[test]
    fn a_right_hash_does_not_excuse_another_form_or_a_value_out_of_range() {
        let forge = |text: &str| {
            let mut line = text[..text.len() - 1].to_owned();
            line.push_str(&format!(",\"hash\":\"{}\"}}", hash(text.as_bytes())));
            Record::parse(&line)
        };
        let record = Record::seal(None, Hour(1), Hex([7; 16]), reserved(1e-5, vec![])).unwrap();
        let text = record.content.text().unwrap();
        assert_eq!(forge(&text).unwrap(), record);
        assert_eq!(forge(&text.replace("\"hour\":1,", "\"hour\":1, ")), Err(RecordError::NotCanonical));
        assert_eq!(forge(&text.replace("0.00001", "1e-5")), Err(RecordError::NotCanonical));
        assert!(matches!(
            forge(&text.replace("\"hour\":1,", "\"hour\":1,\"n\":2,")),
            Err(RecordError::Form(_))
        ));
        assert!(matches!(
            forge(&text.replace("\"delta\":0.00001", "\"delta\":1.5")),
            Err(RecordError::Value(_))
        ));
        for (rate, deviation, count) in [
            (0.0, 1.0, 1),
            (1.5, 1.0, 1),
            (f64::NAN, 1.0, 1),
            (0.5, -1.0, 1),
            (0.5, f64::INFINITY, 1),
            (0.5, 1.0, 0),
        ] {
            let body = reserved(1e-5, vec![Event::gaussian(rate, deviation, count)]);
            assert!(Record::seal(None, Hour(1), Hex([7; 16]), body).is_err(), "{rate} {deviation} {count}");
        }
    }

    #[test]
    fn hours_are_dates() {
        assert_eq!(Hour(0).to_string(), "1970-01-01 00:00 UTC");
        assert_eq!(Hour::of(Time(951_782_400_000 + 3_599_999)).to_string(), "2000-02-29 00:00 UTC");
        assert_eq!(Hour::of(Time(1_795_562_055_000)).to_string(), "2026-11-24 23:00 UTC");
    }

    /// Correction 13: equal data do not show as equal, and nobody finds them by trying without the secret.
    #[test]
    fn commitments_bind_and_hide() {
        let secret = Secret::new([1; 32]);
        let (first, second) = (secret.commit(Hex([1; 16]), b"data"), secret.commit(Hex([2; 16]), b"data"));
        assert_ne!(first.hash, second.hash);
        assert!(secret.opens(&first, b"data") && secret.opens(&second, b"data"));
        assert!(!secret.opens(&first, b"other"));
        assert!(!Secret::new([2; 32]).opens(&first, b"data"));
        assert_eq!(salted(secret.salt(first.nonce), b"data"), first.hash);
    }
}
