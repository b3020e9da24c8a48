//! The node's account: what its data may spend, whoever asks, kept in a ledger that outlives runs and coordinators.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tributary_common::digest::Digest;
use tributary_common::document::Schema;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::{Job, JobError, PrivacyUnit};
use tributary_common::ledger::account::{JobRequest, Promise, Reading, Refusal};
use tributary_common::ledger::book::{BookError, Dataset, NodeBook};
use tributary_common::ledger::head::{LedgerKey, SignedHead};
use tributary_common::ledger::record::{AccountId, CoordinatorId, JobKey, LedgerHash, LostCharge, Release};
use tributary_common::privacy::Unit;
use tributary_common::privacy::accounting::filter::Cap;
use tributary_common::privacy::distributed;
use tributary_common::record::Reason;
use tributary_common::time::Time;

use crate::config::{NodeConfig, NodeData};
use crate::enrol::Credentials;
use crate::machine::{Failure, Kept, RoundKey};
use crate::policy::Policy;

/// The ledger's file, in the node's folder.
pub const LEDGER_FILE: &str = "ledger.jsonl";
/// The operator's word where [`Policy::allow_unbounded_release`] lets a job without `[privacy]` onto a capped account.
const OVERRIDE: &str = "allow_unbounded_release = true in this node's policy";

/// Why a node has no account that it can use. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    /// The ledger.
    #[error("the ledger: {0}")]
    Book(#[from] BookError),
    /// The key that signs it.
    #[error("the ledger's key: {0}")]
    Key(#[from] tributary_common::ledger::head::KeyError),
    /// The authority's certificate.
    #[error("the coordinator's authority is not a certificate in PEM")]
    Authority,
    /// The configuration says otherwise than the account.
    #[error(
        "[account] {key} is another than when account {name} was opened ({recorded}); what was promised then holds: put it \
         back, or open an account of another name for data with nobody in both"
    )]
    Changed {
        /// The account.
        name: NodeName,
        /// The key.
        key: &'static str,
        /// What it was.
        recorded: String,
    },
    /// An account that is to be disjoint does not exist.
    #[error("[account] disjoint_from names {0}, but this node has no such account")]
    Unknown(NodeName),
}

/// The `[account]` table of a node's configuration: the budget of its data, for all jobs and coordinators together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AccountConfig {
    /// What people call it. A changed file stays on the same account.
    pub name: NodeName,
    /// The cap: what the data may spend in all. Absent, the account counts and refuses nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_epsilon: Option<f64>,
    /// δ of the cap.
    pub delta: f64,
    /// The Rényi order at which the account adds up, above 1; absent, the best for one long job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<f64>,
    /// Other accounts of this node over the same source with nobody in both: the operator's signed word.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disjoint_from: Vec<NodeName>,
}

impl Default for AccountConfig {
    fn default() -> Self {
        let name = NodeName::literal("data");
        Self { name, max_epsilon: None, delta: 1e-5, order: None, disjoint_from: Vec::new() }
    }
}

/// The keys of `[account]`.
pub const SCHEMA: Schema =
    Schema { keys: &["name", "max_epsilon", "delta", "order", "disjoint_from"], tables: &[] };

impl AccountConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// One line that names the key.
    pub fn check(&self) -> Result<(), String> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if let Some(cap) = self.max_epsilon.filter(|cap| !positive(*cap)) {
            return Err(format!("[account] max_epsilon = {cap}: a number above 0 is needed"));
        }
        if !(self.delta > 0.0 && self.delta < 1.0) {
            return Err(format!("[account] delta = {}: above 0 and below 1 is needed", self.delta));
        }
        match self.order {
            Some(order) if !(order.is_finite() && order > 1.0) => {
                Err(format!("[account] order = {order}: a number above 1 is needed"))
            }
            _ => Ok(()),
        }
    }
}

/// What an account is opened over.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Digest of the examples.
    pub data: Digest,
    /// Where they come from: their path.
    pub path: &'a str,
    /// Whether all rows of a person are one unit.
    pub grouped: bool,
}

/// Who the node is and whom it works for.
#[derive(Debug, Clone, Copy)]
pub struct Parties<'a> {
    /// The node.
    pub node: &'a NodeName,
    /// Its private key.
    pub key_pem: &'a str,
    /// The certificate of the coordinator's authority, in DER.
    pub authority_der: &'a [u8],
}

/// A node's account in use. It is written before anything follows from it.
#[derive(Debug)]
pub struct Account {
    book: NodeBook,
    account: AccountId,
    coordinator: CoordinatorId,
    grouped: bool,
    /// The promises of runs, computed once.
    promises: BTreeMap<RunId, (Digest, Option<Promise>)>,
    /// Records of the sub-log that the coordinator was last shown a head of.
    shown: u64,
}

impl Account {
    /// Opens the ledger in `dir`, or begins one, and in it the account of `config`.
    ///
    /// # Errors
    /// [`AccountError`].
    pub fn open(
        dir: &Path,
        parties: Parties<'_>,
        config: &AccountConfig,
        source: Source<'_>,
        now: Time,
    ) -> Result<Self, AccountError> {
        let key = LedgerKey::from_pem(parties.key_pem)?;
        let (mut book, torn) = NodeBook::open(&dir.join(LEDGER_FILE), parties.node, key, now)?;
        if let Some(torn) = torn {
            tracing::warn!(
                "the ledger ended in a record that a crash tore: {} bytes were cut off",
                torn.bytes
            );
        }
        let account = match book.core().account_named(&config.name) {
            Some(account) => {
                agree(config, source.grouped, &book.reading(account).map_err(BookError::from)?)?;
                account
            }
            None => {
                let known = |name: &NodeName| {
                    book.core().account_named(name).ok_or_else(|| AccountError::Unknown(name.clone()))
                };
                let disjoint_from = config.disjoint_from.iter().map(known).collect::<Result<_, _>>()?;
                let dataset = Dataset {
                    name: config.name.clone(),
                    unit: if source.grouped { Unit::Group } else { Unit::Example },
                    delta: config.delta,
                    cap_epsilon: config.max_epsilon,
                    order: config.order,
                    data: &source.data.0,
                    source: source.path.as_bytes(),
                    overlaps: Vec::new(),
                    disjoint_from,
                };
                book.open_account(&dataset, now)?
            }
        };
        if !book.core().is_over_data(account, book.secret(), &source.data.0, source.path.as_bytes()) {
            book.change_dataset(account, &source.data.0, source.path.as_bytes(), &[], now)?;
            tracing::info!(
                "the data changed: they stay on account {}, and so does what was spent",
                config.name
            );
        }
        let coordinator = CoordinatorId::of(parties.authority_der);
        let (promises, shown) = (BTreeMap::new(), 0);
        Ok(Self { book, account, coordinator, grouped: source.grouped, promises, shown })
    }

    /// How the account stands.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn reading(&self) -> Result<Reading, BookError> {
        Ok(self.book.reading(self.account)?)
    }

    /// Whether records were lost, so that nothing is spent until the loss is accepted.
    pub fn is_halted(&self) -> bool {
        self.book.core().is_halted()
    }

    /// One line for the operator: what the account allows and how it stands.
    pub fn describe(&self) -> String {
        self.reading().map_or_else(|error| error.to_string(), |reading| describe(&reading))
    }

    /// The coordinator that the node works for.
    pub fn coordinator(&self) -> CoordinatorId {
        self.coordinator
    }

    fn job_key(&self, run: RunId) -> JobKey {
        JobKey { coordinator: self.coordinator, run }
    }

    /// Sets the whole job aside, if that was not done yet, and pays for a round: durable on return. A job without
    /// `[privacy]` is written down once.
    ///
    /// # Errors
    /// The reason for the coordinator and one line for the operator; then nothing may be trained.
    pub fn charge(&mut self, at: RoundKey, job: &Job, policy: &Policy, now: Time) -> Result<(), Failure> {
        let key = self.job_key(at.run);
        let digest = digest_of(job)?;
        let promise = match self.promises.get(&at.run) {
            Some((known, promise)) if *known == digest => promise.clone(),
            _ => {
                let promise = promise(job, self.grouped)?;
                if let Some(line) = worth_alone(job) {
                    tracing::info!("run {}: {line}", at.run);
                }
                self.promises.insert(at.run, (digest, promise.clone()));
                promise
            }
        };
        let private = promise.is_some();
        let request = JobRequest { key, job: digest, rounds: job.rounds, promise };
        let word = policy.allow_unbounded_release.then_some(OVERRIDE);
        self.book.reserve_job(self.account, request, word, now).map_err(failed)?;
        if !private {
            return Ok(());
        }
        let most = policy.maximum_abandoned_rounds;
        let charged = self.book.charge_round(key, at.round, most, now).map_err(failed)?;
        match charged.update {
            None => Ok(()),
            Some(sealed) => Err(Failure {
                reason: Reason::Budget,
                detail: format!(
                    "round {} of run {} was paid for and its payload {sealed} sealed, but the payload is gone: another one \
                     is not paid for",
                    at.round, at.run
                ),
            }),
        }
    }

    /// Binds a round's charge to the update that is on the disk; only then may its first byte leave.
    ///
    /// # Errors
    /// One line; then it must not be sent.
    pub fn seal(&mut self, at: RoundKey, update: &Kept, now: Time) -> Result<(), String> {
        let digest = update.digest.ok_or("the update has no digest")?;
        self.seal_release(at, Release::Update, digest, update.bytes, now)
    }

    /// The same for noised metrics.
    ///
    /// # Errors
    /// One line; then they must not be sent.
    pub fn seal_metrics(&mut self, at: RoundKey, json: &[u8], now: Time) -> Result<(), String> {
        self.seal_release(at, Release::Metrics, Digest::of(json), json.len() as u64, now)
    }

    fn seal_release(
        &mut self,
        at: RoundKey,
        release: Release,
        digest: Digest,
        bytes: u64,
        now: Time,
    ) -> Result<(), String> {
        let key = self.job_key(at.run);
        self.book
            .seal_payload(key, at.round, release, digest, bytes, now)
            .map_err(|error| crate::transport::chain(&error))
    }

    /// Counts an attempt that the coordinator abandoned after the node paid for it.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn abandoned(&mut self, at: RoundKey, attempt: u32, now: Time) -> Result<(), BookError> {
        self.book.abandon_attempt(self.job_key(at.run), at.round, attempt, now)
    }

    /// Gives back what a run that is over had set aside for rounds that never started.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn run_over(&mut self, run: RunId, now: Time) -> Result<(), BookError> {
        let key = self.job_key(run);
        if !self.book.core().open_jobs().any(|open| open == key) {
            return Ok(());
        }
        self.promises.remove(&run);
        self.book.return_rounds(key, now)
    }

    /// The head to show the coordinator, and the proof that it continues the one shown last.
    pub fn head(&mut self) -> (SignedHead, Vec<LedgerHash>) {
        let view = tributary_common::ledger::account::NodeLedger::view_of(self.coordinator);
        let head = self.book.head(view);
        let proof = self.book.consistency(view, self.shown).unwrap_or_default();
        self.shown = head.head.size;
        (head, proof)
    }

    /// Takes the head of this ledger that the coordinator kept: one that this ledger does not continue halts it.
    ///
    /// # Errors
    /// [`BookError`]: records were lost.
    pub fn known_head(&mut self, kept: &SignedHead, now: Time) -> Result<(), BookError> {
        self.shown = 0;
        self.book.check_head(kept, now)?;
        if kept.coordinator() == Some(self.coordinator) {
            self.shown = kept.head.size;
        }
        Ok(())
    }

    /// Keeps a head of the coordinator's ledger; `false` if its signature is false.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn witness(&mut self, head: SignedHead, now: Time) -> Result<bool, BookError> {
        self.book.witness(self.coordinator, head, now)
    }
}

/// Refuses a configuration that says otherwise than the account.
fn agree(config: &AccountConfig, grouped: bool, recorded: &Reading) -> Result<(), AccountError> {
    let changed = |key, recorded| Err(AccountError::Changed { name: config.name.clone(), key, recorded });
    if config.max_epsilon != recorded.cap_epsilon {
        let cap = recorded.cap_epsilon.map_or("none".into(), |cap| cap.to_string());
        return changed("max_epsilon", cap);
    }
    if config.delta != recorded.delta {
        return changed("delta", recorded.delta.to_string());
    }
    if config.order.is_some_and(|order| order != recorded.order) {
        return changed("order", recorded.order.to_string());
    }
    if grouped != (recorded.unit == Unit::Group) {
        return changed("unit ([data] group)", format!("{:?}", recorded.unit));
    }
    Ok(())
}

fn digest_of(job: &Job) -> Result<Digest, Failure> {
    let unsupported = |error: JobError| Failure { reason: Reason::Unsupported, detail: error.to_string() };
    job.to_toml().map(|toml| Digest::of(toml.as_bytes())).map_err(unsupported)
}

/// What a job promises at a node with such data; a job that does not keep its own limit is refused.
fn promise(job: &Job, grouped: bool) -> Result<Option<Promise>, Failure> {
    let Some(privacy) = &job.privacy else { return Ok(None) };
    let refused = |detail: String| Failure { reason: Reason::Budget, detail };
    let guarantee = job.guarantee().map_err(|error| refused(error.to_string()))?;
    let Some(guarantee) = guarantee else { return Ok(None) };
    Ok(Some(Promise {
        unit: privacy.unit(grouped && privacy.unit == PrivacyUnit::Example),
        mechanism: privacy.mechanism.name().into(),
        events: job.round_events(),
        claim: guarantee.into(),
    }))
}

/// What a job whose clients add noise in shares is worth if every other participant is dishonest, in one line; `None` of
/// other jobs. Unless its peers are pinned, this is the figure that a node can rely on: the coordinator enrolled them.
pub fn worth_alone(job: &Job) -> Option<String> {
    let privacy = job.privacy.as_ref().filter(|_| job.is_distributed())?;
    let (planned, alone) =
        distributed::guarantees(&job.events(job.rounds), privacy.delta, privacy.unit(false)).ok()?;
    let colluders = job.secure_aggregation.as_ref().map_or(0, |masks| masks.colluders);
    Some(format!(
        "noise in shares: ε = {:.4} at δ = {} if at most {colluders} of the survivors are dishonest, ε = {:.4} if every other \
         participant is; without pinned peers the second figure counts",
        planned.epsilon, privacy.delta, alone.epsilon
    ))
}

/// Why the account does not pay: what it refuses is the job's affair, all else the node's own.
fn failed(error: BookError) -> Failure {
    match error {
        BookError::Refused(refusal) => refused(refusal),
        other => Failure { reason: Reason::Budget, detail: crate::transport::chain(&other) },
    }
}

fn refused(refusal: Refusal) -> Failure {
    let reason = match refusal {
        Refusal::Unbounded(_) | Refusal::Unit { .. } | Refusal::Abandoned { .. } => Reason::Policy,
        _ => Reason::Budget,
    };
    Failure { reason, detail: refusal.to_string() }
}

/// How an account stands, in one line for people.
pub fn describe(reading: &Reading) -> String {
    let Reading { name, cap_epsilon, delta, epsilon_spent, epsilon_committed, unit, order, .. } = reading;
    let cap = match (cap_epsilon, reading.budget) {
        (Some(cap), Some(budget)) => {
            let share = |rho: f64| 100.0 * rho / budget;
            format!(
                "{:.1} % of the budget of ε = {cap} is spent, {:.1} % set aside",
                share(reading.spent),
                share(reading.reserved)
            )
        }
        _ => "no cap".to_owned(),
    };
    let mut line = format!(
        "account {name}: {cap}; odometer ε = {epsilon_spent:.4}, {epsilon_committed:.4} with what is set aside; δ = {delta}, \
         unit {unit:?}, added up at Rényi order {order:.2}"
    );
    if reading.unbounded {
        line.push_str("; a job without [privacy] ran on these data: ε = ∞");
    }
    if reading.restored {
        line.push_str("; records were lost once");
    }
    line
}

/// How an account stands, as a JSON object.
pub fn to_json(reading: &Reading) -> serde_json::Value {
    let finite = |value: f64| value.is_finite().then_some(value);
    serde_json::json!({
        "account": reading.name,
        "unit": reading.unit,
        "delta": reading.delta,
        "order": reading.order,
        "cap_epsilon": reading.cap_epsilon,
        "epsilon_spent": finite(reading.epsilon_spent),
        "epsilon_committed": finite(reading.epsilon_committed),
        "divergence_spent": finite(reading.spent),
        "divergence_reserved": finite(reading.reserved),
        "divergence_budget": reading.budget,
        "unbounded": reading.unbounded,
        "restored": reading.restored,
    })
}

/// Whether the node's account would take the whole job, without writing anything and whether the node runs or not: how
/// the account stands.
///
/// # Errors
/// The reason for the coordinator and one line for the operator.
pub fn would_admit(
    config: &NodeConfig,
    data: &NodeData,
    credentials: &Credentials,
    job: &Job,
) -> Result<String, Failure> {
    let failed = |detail: String| Failure { reason: Reason::Budget, detail };
    let key = LedgerKey::from_pem(&credentials.key_pem).map_err(|error| failed(error.to_string()))?;
    let path = config.dir.join(LEDGER_FILE);
    let promise = promise(job, data.is_grouped())?;
    if !path.exists() {
        return Ok("nothing was spent yet".into());
    }
    let (ledger, _) = NodeBook::peek(&path, &key).map_err(|error| failed(crate::transport::chain(&error)))?;
    let Some(account) = ledger.account_named(&config.account.name) else {
        return Ok(format!("account {} is opened at the next start", config.account.name));
    };
    // No run has this id: the question is about the next one.
    let key = JobKey { coordinator: CoordinatorId::of(b"policy check"), run: RunId(0) };
    let request = JobRequest { key, job: digest_of(job)?, rounds: job.rounds, promise };
    let word = config.policy.allow_unbounded_release.then_some(OVERRIDE);
    ledger.reserve_job(account, request, word).map_err(refused)?;
    ledger.reading(account).map(|reading| describe(&reading)).map_err(refused)
}

/// Accepts, at the operator's word, that records were lost.
///
/// # Errors
/// [`AccountError`].
pub fn accept_restore(
    dir: &Path,
    key_pem: &str,
    account: &NodeName,
    reason: &str,
    charge: Option<f64>,
    now: Time,
) -> Result<(), AccountError> {
    let key = LedgerKey::from_pem(key_pem)?;
    let (mut book, _) = NodeBook::open_restored(&dir.join(LEDGER_FILE), key, now)?;
    let charges = match charge {
        None => None,
        Some(epsilon) => {
            let id =
                book.core().account_named(account).ok_or_else(|| AccountError::Unknown(account.clone()))?;
            let Reading { delta, order, .. } = book.reading(id).map_err(BookError::from)?;
            let rho =
                Cap { epsilon, delta, order }.budget().map_err(|error| BookError::Refused(error.into()))?;
            Some(vec![LostCharge { account: id, rho }])
        }
    };
    Ok(book.accept_restore(reason, charges, now)?)
}
