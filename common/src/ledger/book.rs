//! A ledger in use: a core, the file that holds it or memory, and the key that signs its heads.
//!
//! Every function that spends returns after its record is durable. What it pays for may follow, nothing
//! before.

use std::path::Path;

use super::account::{Charge, Fault, JobRequest, NewAccount, NodeLedger, Reading, Refusal, Witness};
use super::file::{FileError, HEADER, LedgerFile, Torn};
use super::head::{LedgerKey, SignedHead, View};
use super::hex::Hex;
use super::log::Log;
use super::record::{
    AccountId, Body, Commitment, CoordinatorId, Hour, JobKey, LedgerHash, LedgerId, LedgerRole, LostCharge,
    Participant, Record, RecordError, Release, Secret,
};
use super::run::{RunLedger, RunOpening, RunRefusal};
use crate::digest::Digest;
use crate::ids::NodeName;
use crate::privacy::{Event, Unit};
use crate::time::Time;

/// Why a ledger could not do what was asked. After all but a refusal nothing may follow.
#[derive(Debug, thiserror::Error)]
pub enum BookError {
    /// The node's accounts refuse.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The run's ledger refuses.
    #[error(transparent)]
    Run(#[from] RunRefusal),
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The record cannot be written.
    #[error("a record {0}")]
    Record(#[from] RecordError),
    /// The records contradict each other.
    #[error("record {sequence} of the ledger: {fault}; `tributary-audit verify` lists all that is wrong")]
    Fault {
        /// The record.
        sequence: u64,
        /// How.
        fault: Fault,
    },
    /// Another key signs this ledger.
    #[error(
        "the ledger's heads are signed by another key than this one; put back the key.pem that it began with"
    )]
    Key,
    /// No randomness.
    #[error("the operating system gives no random bytes: {0}")]
    Random(std::io::Error),
}

/// What a book's core is: a node's accounts or a coordinator's run.
pub trait Core: Sized {
    /// Whose ledger it is.
    const ROLE: LedgerRole;
    /// The state after the first record.
    ///
    /// # Errors
    /// [`Fault`].
    fn begin(first: &Record) -> Result<Self, Fault>;
    /// Takes the next record.
    ///
    /// # Errors
    /// [`Fault`].
    fn take(&mut self, record: &Record) -> Result<(), Fault>;
    /// The chain.
    fn log(&self) -> &Log;
}

impl Core for NodeLedger {
    const ROLE: LedgerRole = LedgerRole::Node;

    fn begin(first: &Record) -> Result<Self, Fault> {
        NodeLedger::begin(first)
    }

    fn take(&mut self, record: &Record) -> Result<(), Fault> {
        self.apply(record)
    }

    fn log(&self) -> &Log {
        NodeLedger::log(self)
    }
}

impl Core for RunLedger {
    const ROLE: LedgerRole = LedgerRole::Coordinator;

    fn begin(first: &Record) -> Result<Self, Fault> {
        RunLedger::begin(first)
    }

    fn take(&mut self, record: &Record) -> Result<(), Fault> {
        self.apply(record)
    }

    fn log(&self) -> &Log {
        RunLedger::log(self)
    }
}

#[derive(Debug)]
enum Medium {
    File(LedgerFile),
    Memory(Vec<String>),
}

/// A ledger in use.
#[derive(Debug)]
pub struct Book<C> {
    core: C,
    medium: Medium,
    key: LedgerKey,
    secret: Secret,
}

/// A node's ledger in use.
pub type NodeBook = Book<NodeLedger>;
/// A coordinator's ledger of one run, in use.
pub type RunBook = Book<RunLedger>;

fn random<const N: usize>() -> Result<Hex<N>, BookError> {
    Hex::random().map_err(BookError::Random)
}

fn first_record(key: &LedgerKey, role: LedgerRole, name: &NodeName, now: Time) -> Result<Record, BookError> {
    let (ledger, public_key) = (LedgerId(random()?), key.public());
    let opened = Body::LedgerOpened { ledger, public_key, role, name: name.clone() };
    Ok(Record::seal(None, Hour::of(now), random()?, opened)?)
}

impl<C: Core> Book<C> {
    /// Opens the ledger at `path`, or makes it if there is none. A record that a crash tore is cut off and
    /// told.
    ///
    /// # Errors
    /// [`BookError::File`] where acknowledged records are damaged or missing, [`BookError::Key`],
    /// [`BookError::Fault`].
    pub fn open(
        path: &Path,
        name: &NodeName,
        key: LedgerKey,
        now: Time,
    ) -> Result<(Self, Option<Torn>), BookError> {
        let exists = path.try_exists().map_err(|cause| FileError::Io { path: path.to_path_buf(), cause })?;
        if !exists {
            let first = first_record(&key, C::ROLE, name, now)?;
            let (file, secret) = LedgerFile::create(path, &first)?;
            let core = C::begin(&first).map_err(|fault| BookError::Fault { sequence: 0, fault })?;
            return Ok((Self { core, medium: Medium::File(file), key, secret }, None));
        }
        let contents = LedgerFile::open(path)?;
        let core = replay(&contents.records, &key)?;
        Ok((Self { core, medium: Medium::File(contents.file), key, secret: contents.secret }, contents.torn))
    }

    /// A ledger in memory, for simulations.
    ///
    /// # Errors
    /// [`BookError::Random`].
    pub fn in_memory(name: &NodeName, key: LedgerKey, now: Time) -> Result<Self, BookError> {
        let first = first_record(&key, C::ROLE, name, now)?;
        let core = C::begin(&first).map_err(|fault| BookError::Fault { sequence: 0, fault })?;
        let secret = Secret::new(random()?.0);
        Ok(Self { core, medium: Medium::Memory(vec![first.line()]), key, secret })
    }

    /// The state.
    pub fn core(&self) -> &C {
        &self.core
    }

    /// What opens this ledger's commitments.
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Binds to `content` with a fresh nonce.
    ///
    /// # Errors
    /// [`BookError::Random`].
    pub fn commit(&self, content: &[u8]) -> Result<Commitment, BookError> {
        Ok(self.secret.commit(random()?, content))
    }

    /// The signed head of a view, for those who are shown it.
    pub fn head(&self, view: View) -> SignedHead {
        self.key.sign(self.core.log().head(view))
    }

    /// The proof that a view's head continues the one over its first `earlier` records.
    pub fn consistency(&self, view: View, earlier: u64) -> Option<Vec<LedgerHash>> {
        self.core.log().consistency(view, earlier)
    }

    /// The export: the file's lines and the signed head over all of them.
    ///
    /// # Errors
    /// [`BookError::File`].
    pub fn export(&self) -> Result<String, BookError> {
        let mut text = match &self.medium {
            Medium::File(file) => file.text()?,
            Medium::Memory(lines) => {
                let mut text = format!("{HEADER}\n");
                for line in lines {
                    text.push_str(line);
                    text.push('\n');
                }
                text
            }
        };
        text.push_str(&head_line(&self.head(View::Whole)));
        text.push('\n');
        Ok(text)
    }

    /// The state of a ledger that another process may be using, and its export, signed with `key`.
    ///
    /// # Errors
    /// As [`Book::open`].
    pub fn peek(path: &Path, key: &LedgerKey) -> Result<(C, String), BookError> {
        let records = LedgerFile::peek(path)?;
        let core: C = replay(&records, key)?;
        let head = head_line(&key.sign(core.log().head(View::Whole)));
        let lines = records.iter().map(Record::line);
        let text: Vec<String> = std::iter::once(HEADER.to_string()).chain(lines).chain([head]).collect();
        Ok((core, format!("{}\n", text.join("\n"))))
    }

    fn record(&mut self, body: Body, now: Time) -> Result<(), BookError> {
        let last = self.core.log().last();
        let record = Record::chain(Some(last), Hour::of(now), random()?, body)?;
        match &mut self.medium {
            Medium::File(file) => file.append(&record)?,
            Medium::Memory(lines) => lines.push(record.line()),
        }
        let sequence = record.sequence();
        self.core.take(&record).map_err(|fault| BookError::Fault { sequence, fault })
    }
}

fn replay<C: Core>(records: &[Record], key: &LedgerKey) -> Result<C, BookError> {
    let fault = |sequence| move |fault| BookError::Fault { sequence, fault };
    let (first, rest) =
        records.split_first().ok_or(Fault::Run("the ledger has no records")).map_err(fault(0))?;
    let mut core = C::begin(first).map_err(fault(0))?;
    if core.log().opening().public_key != key.public() {
        return Err(BookError::Key);
    }
    for record in rest {
        core.take(record).map_err(fault(record.sequence()))?;
    }
    Ok(core)
}

/// The line of a head in an export.
pub(crate) fn head_line(head: &SignedHead) -> String {
    // Every key is a string and every value an integer or a string, so this cannot fail.
    serde_json::to_string(head).unwrap_or_default()
}

impl NodeBook {
    /// Opens a ledger that lost acknowledged records, because the operator accepts it. The evidence is
    /// recorded, and nothing can be spent until [`NodeBook::accept_restore`].
    ///
    /// # Errors
    /// As [`Book::open`].
    pub fn open_restored(path: &Path, key: LedgerKey, now: Time) -> Result<(Self, Option<Torn>), BookError> {
        let contents = LedgerFile::open_restored(path)?;
        let core: NodeLedger = replay(&contents.records, &key)?;
        let mut book = Self { core, medium: Medium::File(contents.file), key, secret: contents.secret };
        if let Some(evidence) = contents.lost {
            book.record(Body::RestoreDetected { evidence }, now)?;
        }
        Ok((book, contents.torn))
    }

    /// Opens an account over `data` (a digest of them) from `source` (its path, for example), with a fresh
    /// random id. See [`NewAccount`] for the rest.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn open_account(&mut self, dataset: &Dataset<'_>, now: Time) -> Result<AccountId, BookError> {
        let account = AccountId(random()?);
        let new = NewAccount {
            account,
            name: dataset.name.clone(),
            unit: dataset.unit,
            delta: dataset.delta,
            cap_epsilon: dataset.cap_epsilon,
            order: dataset.order,
            data: self.commit(dataset.data)?,
            source: self.commit(dataset.source)?,
            overlaps: dataset.overlaps.clone(),
            disjoint_from: dataset.disjoint_from.clone(),
        };
        let body = self.core.open_account(new, &self.secret, dataset.source)?;
        self.record(body, now)?;
        Ok(account)
    }

    /// Records that an account's data or their source are others now.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn change_dataset(
        &mut self,
        account: AccountId,
        data: &[u8],
        source: &[u8],
        overlaps: &[AccountId],
        now: Time,
    ) -> Result<(), BookError> {
        let (bound, from) = (self.commit(data)?, self.commit(source)?);
        let body = self.core.change_dataset(account, bound, from, overlaps, &self.secret, source)?;
        self.record(body, now)
    }

    /// Records that the operator says that two accounts share no unit.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn declare_disjoint(
        &mut self,
        account: AccountId,
        other: AccountId,
        now: Time,
    ) -> Result<(), BookError> {
        let body = self.core.declare_disjoint(account, other)?;
        self.record(body, now)
    }

    /// Sets a job's whole cost aside ([`NodeLedger::reserve_job`]); done again it changes nothing.
    ///
    /// # Errors
    /// [`BookError::Refused`] and others.
    pub fn reserve_job(
        &mut self,
        account: AccountId,
        request: JobRequest,
        unbounded: Option<&str>,
        now: Time,
    ) -> Result<(), BookError> {
        match self.core.reserve_job(account, request, unbounded)? {
            Some(body) => self.record(body, now),
            None => Ok(()),
        }
    }

    /// Pays for a round ([`NodeLedger::charge_round`]). On return the charge is durable and training may
    /// begin, unless an update is sealed already: that one is sent again.
    ///
    /// # Errors
    /// [`BookError::Refused`] and others.
    pub fn charge_round(
        &mut self,
        key: JobKey,
        round: u32,
        maximum_abandoned: Option<u32>,
        now: Time,
    ) -> Result<Charged, BookError> {
        match self.core.charge_round(key, round, maximum_abandoned)? {
            Charge::New(body) => {
                self.record(body, now)?;
                Ok(Charged { update: None, metrics: None })
            }
            Charge::Again { update, metrics } => Ok(Charged { update, metrics }),
        }
    }

    /// Binds a charge to its payload, whose bytes are on the disk already. On return they may be sent.
    ///
    /// # Errors
    /// [`BookError::Refused`] and others.
    pub fn seal_payload(
        &mut self,
        key: JobKey,
        round: u32,
        release: Release,
        payload: Digest,
        bytes: u64,
        now: Time,
    ) -> Result<(), BookError> {
        match self.core.seal_payload(key, round, release, payload, bytes)? {
            Some(body) => self.record(body, now),
            None => Ok(()),
        }
    }

    /// Counts an abandoned attempt at a round that was paid for.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn abandon_attempt(
        &mut self,
        key: JobKey,
        round: u32,
        attempt: u32,
        now: Time,
    ) -> Result<(), BookError> {
        match self.core.abandon_attempt(key, round, attempt) {
            Some(body) => self.record(body, now),
            None => Ok(()),
        }
    }

    /// Ends a run: the rounds that never started are given back.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn return_rounds(&mut self, key: JobKey, now: Time) -> Result<(), BookError> {
        match self.core.return_rounds(key)? {
            Some(body) => self.record(body, now),
            None => Ok(()),
        }
    }

    /// Compares a head of this ledger that another party kept. If records were lost, that is recorded, and
    /// nothing can be spent until the operator accepts it.
    ///
    /// # Errors
    /// [`BookError::Refused`] with [`Refusal::Restored`] if records were lost.
    pub fn check_head(&mut self, kept: &SignedHead, now: Time) -> Result<(), BookError> {
        match self.core.check_head(kept) {
            Witness::Agrees | Witness::Foreign => Ok(()),
            Witness::Lost(body) => {
                self.record(*body, now)?;
                Err(Refusal::Restored.into())
            }
        }
    }

    /// Keeps a head of a coordinator's ledger; `false` if its signature is false.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn witness(&mut self, of: CoordinatorId, head: SignedHead, now: Time) -> Result<bool, BookError> {
        match self.core.witness(of, head) {
            Some(body) => self.record(body, now).map(|()| true),
            None => Ok(false),
        }
    }

    /// Accepts that records were lost ([`NodeLedger::accept_restore`]).
    ///
    /// # Errors
    /// [`BookError`].
    pub fn accept_restore(
        &mut self,
        reason: &str,
        charges: Option<Vec<LostCharge>>,
        now: Time,
    ) -> Result<(), BookError> {
        let body = self.core.accept_restore(reason, charges)?;
        self.record(body, now)
    }

    /// How an account stands.
    ///
    /// # Errors
    /// [`Refusal::NoAccount`].
    pub fn reading(&self, account: AccountId) -> Result<Reading, Refusal> {
        self.core.reading(account)
    }
}

/// What an operator opens an account over.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset<'a> {
    /// The operator's name for it.
    pub name: NodeName,
    /// Whom the account protects.
    pub unit: Unit,
    /// Above 0 and below 1.
    pub delta: f64,
    /// The guarantee; `None` for an account that only counts.
    pub cap_epsilon: Option<f64>,
    /// The Rényi order; `None` for the default of the cap.
    pub order: Option<f64>,
    /// The data, for example a digest of the file's bytes.
    pub data: &'a [u8],
    /// Where they come from, for example the file's path.
    pub source: &'a [u8],
    /// Accounts that share record ids with this one, as far as the node can tell.
    pub overlaps: Vec<AccountId>,
    /// Accounts that the operator declares disjoint from this one.
    pub disjoint_from: Vec<AccountId>,
}

/// A round that is paid for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Charged {
    /// Digest of an update that is sealed: send it again, never make another.
    pub update: Option<Digest>,
    /// Digest of metrics that are sealed: likewise.
    pub metrics: Option<Digest>,
}

impl RunBook {
    /// Opens the run; done again for the same run it changes nothing.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn open_run(&mut self, opening: RunOpening, now: Time) -> Result<(), BookError> {
        if self.core.run() == Some(&opening) {
            return Ok(());
        }
        let body = self.core.open_run(opening)?;
        self.record(body, now)
    }

    /// Pays for the coordinator's own noise ([`RunLedger::noise_round`]).
    ///
    /// # Errors
    /// [`BookError`].
    pub fn noise_round(&mut self, round: u32, events: Vec<Event>, now: Time) -> Result<(), BookError> {
        match self.core.noise_round(round, events)? {
            Some(body) => self.record(body, now),
            None => Ok(()),
        }
    }

    /// Records a model that is committed.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn publish_round(
        &mut self,
        round: u32,
        attempt: u32,
        model: Digest,
        participants: Vec<Participant>,
        now: Time,
    ) -> Result<(), BookError> {
        let body = self.core.publish_round(round, attempt, model, participants)?;
        self.record(body, now)
    }

    /// Records an attempt that ended without a model.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn abandon_round(
        &mut self,
        round: u32,
        attempt: u32,
        participants: Vec<Participant>,
        now: Time,
    ) -> Result<(), BookError> {
        let body = self.core.abandon_round(round, attempt, participants)?;
        self.record(body, now)
    }

    /// Records noised metrics that arrived.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn receive_metrics(
        &mut self,
        round: u32,
        participants: Vec<Participant>,
        now: Time,
    ) -> Result<(), BookError> {
        let body = self.core.receive_metrics(round, participants)?;
        self.record(body, now)
    }

    /// Keeps a head of a node's ledger; `false` if its signature is false.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn witness(&mut self, node: NodeName, head: SignedHead, now: Time) -> Result<bool, BookError> {
        match self.core.witness(node, head) {
            Some(body) => self.record(body, now).map(|()| true),
            None => Ok(false),
        }
    }

    /// Ends the run.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn end_run(&mut self, now: Time) -> Result<(), BookError> {
        match self.core.end_run()? {
            Some(body) => self.record(body, now),
            None => Ok(()),
        }
    }
}
