//! A node's accounts as a pure function of its records: what each data set promised, spent and has set aside.
//!
//! ```text
//! open_account ─▶ reserve_job ─▶ charge_round ─▶ (train) ─▶ seal_payload ─▶ (send) … return_rounds
//!                 whole cost      before it trains            before the first byte leaves
//! ```
//!
//! Each function answers with the record to append and changes nothing. Append it durably,
//! [`NodeLedger::apply`] it, and only then do what it pays for: a crash in between counts as spent.
//!
//! An account adds Rényi divergence at the one order it was opened with, which bounds jobs that are chosen
//! one after another. A capped account never sets aside more than its cap's budget, so its guarantee is the
//! cap; what was spent so far is a reading.

use std::collections::{BTreeMap, BTreeSet};

use super::head::{SignedHead, View};
use super::log::{ChainError, Log};
use super::record::{
    AccountId, Body, Claim, Commitment, CoordinatorId, Evidence, JobKey, LedgerRole, LostCharge, Party,
    Record, Release, Secret,
};
use crate::digest::Digest;
use crate::ids::NodeName;
use crate::privacy::accounting::filter::{self, Cap, FilterError, default_order};
use crate::privacy::accounting::rdp;
use crate::privacy::{Adjacency, Event, Unit};
use crate::record::one_line;

/// How far a sum of divergences may be from the recorded one, relative: errors of arithmetic.
pub const TOLERANCE: f64 = 1e-9;
/// The cap for which an account without one chooses its order.
const UNCAPPED_EPSILON: f64 = 3.0;

/// Why a node's ledger refuses to spend. For the operator's own log: a submitter is told a constant.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// There is no such account.
    #[error("there is no account {0}")]
    NoAccount(AccountId),
    /// Names are for people, who must be able to tell accounts apart.
    #[error("there is an account called {0} already")]
    NameTaken(NodeName),
    /// The same data would get a second budget.
    #[error(
        "account {0} has the same source or shares records with this one; one person's data would have two budgets. \
         Use that account, or declare the two disjoint if no person is in both"
    )]
    Overlap(NodeName),
    /// The cap or its delta cannot be kept.
    #[error(transparent)]
    Cap(#[from] FilterError),
    /// A value of the request is outside its range.
    #[error("the request cannot be recorded: {0}")]
    Value(&'static str),
    /// A job that promises nothing on an account that promises something.
    #[error(
        "the job has unit = \"none\" and account {0} has a cap: after it the data's epsilon is infinite. \
         Only the operator can allow it, and every later report says so"
    )]
    Unbounded(NodeName),
    /// The job's promise does not cover what the account's does.
    #[error(
        "the job protects {job:?} and account {name} {account:?}; open an account of the job's unit, or ask for \
         a job of the account's"
    )]
    Unit {
        /// The account.
        name: NodeName,
        /// Its unit.
        account: Unit,
        /// The job's.
        job: Unit,
    },
    /// The job costs more than is left.
    #[error(
        "the job costs {cost:.6} of divergence at order {order} and account {name} has {left:.6} left of {budget:.6} \
         (epsilon {cap} at delta {delta})"
    )]
    Exhausted {
        /// The account.
        name: NodeName,
        /// What the job costs.
        cost: f64,
        /// What is neither spent nor set aside.
        left: f64,
        /// The budget.
        budget: f64,
        /// The account's order.
        order: f64,
        /// Its cap.
        cap: f64,
        /// Its delta.
        delta: f64,
    },
    /// The run was reserved with another job file, budget or account.
    #[error("{0} was accepted with another job; a run's parameters cannot change")]
    OtherJob(JobKey),
    /// Nothing was set aside for the run.
    #[error("nothing was reserved for {0}")]
    NotReserved(JobKey),
    /// The run ended here.
    #[error("{0} is over: what it had not used was given back")]
    Over(JobKey),
    /// All rounds that the reservation pays for are charged.
    #[error("{key} has charged all {rounds} rounds that were reserved")]
    NoRounds {
        /// The run.
        key: JobKey,
        /// Rounds reserved.
        rounds: u32,
    },
    /// The coordinator abandons too much.
    #[error("{key} abandoned {abandoned} attempts that were paid for; this node's policy allows {most}")]
    Abandoned {
        /// The run.
        key: JobKey,
        /// Distinct attempts abandoned.
        abandoned: u32,
        /// Most allowed.
        most: u32,
    },
    /// A payload needs a charge.
    #[error("round {round} of {key} was not charged")]
    NotCharged {
        /// The run.
        key: JobKey,
        /// The round.
        round: u32,
    },
    /// One charge pays for one payload.
    #[error("round {round} of {key} has its payload {sealed:?} already; a second one is not paid for")]
    SecondPayload {
        /// The run.
        key: JobKey,
        /// The round.
        round: u32,
        /// The payload that was sealed.
        sealed: Digest,
    },
    /// Records were lost and nobody knows what they spent.
    #[error(
        "this ledger was longer once: it was restored from a copy, and what was spent since is not in it. \
         Put the latest file back, or accept the loss with `tributary-client ledger accept-restore`"
    )]
    Restored,
    /// There is no loss to accept.
    #[error("no record of this ledger is known to be lost")]
    NotRestored,
}

/// Why a record contradicts the records before it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Fault {
    /// It does not continue the log.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// It belongs to the other kind of ledger.
    #[error("this kind of record does not belong into this kind of ledger")]
    WrongRole,
    /// It names an account that was not opened.
    #[error("account {0} was not opened")]
    NoAccount(AccountId),
    /// The account is there already.
    #[error("account {0} is opened a second time")]
    AccountTwice(AccountId),
    /// Its cap leaves no budget.
    #[error("the account's cap cannot be kept: {0}")]
    Cap(FilterError),
    /// The job's unit does not cover the account's.
    #[error("the job protects {job:?}, the account {account:?}")]
    Unit {
        /// The account's.
        account: Unit,
        /// The job's.
        job: Unit,
    },
    /// The run is reserved already.
    #[error("{0} is reserved a second time")]
    ReservedTwice(JobKey),
    /// The recorded cost is not what the recorded parameters cost.
    #[error("the recorded cost is {stated}, and its parameters cost {found}")]
    Cost {
        /// As recorded.
        stated: f64,
        /// Recomputed.
        found: f64,
    },
    /// More is set aside than the cap allows.
    #[error("account {name} has set aside {committed}, above its budget of {budget} (epsilon {cap})")]
    Overspent {
        /// The account.
        name: NodeName,
        /// Spent and set aside.
        committed: f64,
        /// The budget.
        budget: f64,
        /// The cap.
        cap: f64,
    },
    /// Nothing was reserved.
    #[error("there is no reservation for {0}")]
    NotReserved(JobKey),
    /// It names another account than the reservation.
    #[error("{0} was reserved on another account")]
    OtherAccount(JobKey),
    /// A charge after the run's end.
    #[error("{0} was over when this was written")]
    Over(JobKey),
    /// More rounds than reserved.
    #[error("{key} charges more than the {rounds} rounds that were reserved")]
    TooManyRounds {
        /// The run.
        key: JobKey,
        /// Rounds reserved.
        rounds: u32,
    },
    /// A charge for other parameters than those reserved.
    #[error("{0} charges other events than were reserved")]
    OtherEvents(JobKey),
    /// The round is charged already.
    #[error("round {round} of {key} is charged a second time")]
    ChargedTwice {
        /// The run.
        key: JobKey,
        /// The round.
        round: u32,
    },
    /// A payload that nothing pays for.
    #[error("a payload of round {round} of {key} left without a charge")]
    NotCharged {
        /// The run.
        key: JobKey,
        /// The round.
        round: u32,
    },
    /// Two payloads under one charge.
    #[error("two payloads for the one charge of round {round} of {key}: {first:?} and {second:?}")]
    SecondPayload {
        /// The run.
        key: JobKey,
        /// The round.
        round: u32,
        /// The payload sealed first.
        first: Digest,
        /// The other one.
        second: Digest,
    },
    /// More rounds are given back than never started.
    #[error("{key} gives {returned} rounds back, and {unused} were never started")]
    Returned {
        /// The run.
        key: JobKey,
        /// Rounds given back.
        returned: u32,
        /// Rounds never charged.
        unused: u32,
    },
    /// Rounds are given back twice.
    #[error("{0} gives rounds back a second time")]
    ReturnedTwice(JobKey),
    /// Something was spent while records were known to be lost.
    #[error("something was spent although records were known to be lost and the loss was not accepted")]
    Restored,
    /// A loss is accepted that was not found.
    #[error("a loss of records is accepted that was not recorded")]
    NotRestored,
    /// The charge for lost records is called the worst case and is not.
    #[error("the charge for lost records does not fill every capped account, as it says")]
    NotWorstCase,
    /// A witnessed head with a false signature.
    #[error("a witnessed head has a false signature")]
    ForgedHead,
    /// The records of a run contradict each other.
    #[error("{0}")]
    Run(&'static str),
}

/// A new account, before it has a record.
#[derive(Debug, Clone, PartialEq)]
pub struct NewAccount {
    /// A fresh random id.
    pub account: AccountId,
    /// The operator's name for it.
    pub name: NodeName,
    /// Whom it protects.
    pub unit: Unit,
    /// Above 0 and below 1.
    pub delta: f64,
    /// The guarantee; `None` for an account that only counts.
    pub cap_epsilon: Option<f64>,
    /// The Rényi order; `None` for the default of the cap.
    pub order: Option<f64>,
    /// The data, for example by a digest of the file's bytes.
    pub data: Commitment,
    /// Where the data come from.
    pub source: Commitment,
    /// Accounts that share record ids with this one, as far as the node can tell.
    pub overlaps: Vec<AccountId>,
    /// Accounts that the operator declares disjoint from this one.
    pub disjoint_from: Vec<AccountId>,
}

/// A job that asks to spend.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRequest {
    /// The run.
    pub key: JobKey,
    /// Digest of the job file.
    pub job: Digest,
    /// Most rounds that may be charged, from 1.
    pub rounds: u32,
    /// What it promises; `None` for `unit = "none"`.
    pub promise: Option<Promise>,
}

/// What a job with a guarantee promises.
#[derive(Debug, Clone, PartialEq)]
pub struct Promise {
    /// Whom it protects.
    pub unit: Unit,
    /// The mechanism's name.
    pub mechanism: String,
    /// What one round does, noised metrics included.
    pub events: Vec<Event>,
    /// The epsilon of all rounds.
    pub claim: Claim,
}

/// The answer to a round.
#[derive(Debug, Clone, PartialEq)]
pub enum Charge {
    /// Append this record, then train.
    New(Body),
    /// Charged before. What is sealed is sent again byte for byte and never made again; what is not sealed
    /// never left, so it may be made again, with fresh noise, under the same charge.
    Again {
        /// Digest of the sealed update.
        update: Option<Digest>,
        /// Digest of the sealed metrics.
        metrics: Option<Digest>,
    },
}

/// What a head that another party kept tells of this ledger.
#[derive(Debug, Clone, PartialEq)]
pub enum Witness {
    /// The ledger continues it.
    Agrees,
    /// It is of another ledger, or its signature is not this ledger's: it tells nothing.
    Foreign,
    /// The ledger was longer or other: append this record. Nothing is spent until the loss is accepted.
    Lost(Box<Body>),
}

/// How an account stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// The account.
    pub account: AccountId,
    /// The operator's name for it.
    pub name: NodeName,
    /// Whom it protects.
    pub unit: Unit,
    /// From which neighbours.
    pub adjacency: Adjacency,
    /// Its delta.
    pub delta: f64,
    /// Its Rényi order.
    pub order: f64,
    /// The guarantee, if it has one.
    pub cap_epsilon: Option<f64>,
    /// The divergence that the cap allows.
    pub budget: Option<f64>,
    /// The divergence of the rounds charged, and of what is charged for lost records.
    pub spent: f64,
    /// The divergence set aside for rounds that may still be charged.
    pub reserved: f64,
    /// Epsilon of what was spent: an odometer's reading. Infinite after an unbounded release.
    pub epsilon_spent: f64,
    /// Epsilon of what was spent and set aside. Infinite after an unbounded release.
    pub epsilon_committed: f64,
    /// A job without a guarantee ran on the data.
    pub unbounded: bool,
    /// Records were lost once: the reading is a lower bound unless the loss was charged in full.
    pub restored: bool,
}

#[derive(Debug, Clone, PartialEq)]
struct Account {
    name: NodeName,
    unit: Unit,
    adjacency: Adjacency,
    delta: f64,
    order: f64,
    cap: Option<f64>,
    budget: Option<f64>,
    data: Commitment,
    source: Commitment,
    disjoint: BTreeSet<AccountId>,
    lost: f64,
    unbounded: bool,
    restored: bool,
}

#[derive(Debug, Clone, PartialEq)]
struct Job {
    account: AccountId,
    digest: Digest,
    rounds: u32,
    events: Vec<Event>,
    round_cost: f64,
    charged: BTreeMap<u32, BTreeMap<Release, Digest>>,
    abandoned: BTreeSet<(u32, u32)>,
    /// Rounds given back, once the run is over.
    returned: Option<u32>,
}

impl Job {
    fn charges(&self) -> u32 {
        u32::try_from(self.charged.len()).unwrap_or(u32::MAX)
    }

    fn spent(&self) -> f64 {
        f64::from(self.charges()) * self.round_cost
    }

    fn reserved(&self) -> f64 {
        let open = self.rounds.saturating_sub(self.charges()).saturating_sub(self.returned.unwrap_or(0));
        f64::from(open) * self.round_cost
    }
}

/// The events of a job as an account of `account` feels them; `None` if the job's promise does not cover its
/// unit.
///
/// A client's guarantee is that its contribution might as well be zero. Two data sets of the client that
/// differ by one row are each that far from zero and so up to twice as far from each other: to an account of
/// rows the sensitivity is double. That is exact for an unsampled sum; client-level sums are not sampled. A
/// group's guarantee is sampled and says nothing as simple of a part of the group: the account must have the
/// job's unit. Noise in shares is no other: what two clipped vectors differ by is a vector of integers too, of up to twice
/// the norm.
fn felt(account: Unit, job: Unit, events: &[Event]) -> Option<Vec<Event>> {
    if account == job {
        return Some(events.to_vec());
    }
    let unsampled = events.iter().all(|event| event.sampling_rate == 1.0);
    let twice = |event: &Event| Event { sensitivity: 2.0 * event.sensitivity, ..*event };
    (job == Unit::Client && unsampled).then(|| events.iter().map(twice).collect())
}

/// What one round costs an account: Rényi divergence at its order, and in the same unit what it pays into delta besides.
fn round_cost(account: &Account, job: Unit, events: &[Event]) -> Option<f64> {
    let cost = |events: Vec<Event>| filter::cost(&events, account.order, account.delta, account.cap);
    felt(account.unit, job, events).map(cost)
}

/// All accounts of one node. Two are equal if they were replayed from the same records.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeLedger {
    log: Log,
    accounts: BTreeMap<AccountId, Account>,
    jobs: BTreeMap<JobKey, Job>,
    /// Records are known to be lost and nobody accepted it yet.
    halted: bool,
    /// Heads over lost records whose loss is on record.
    lost: Vec<SignedHead>,
}

impl NodeLedger {
    /// The state after `first`, which opens a node's ledger.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn begin(first: &Record) -> Result<Self, Fault> {
        let log = Log::begin(first)?;
        if log.opening().role != LedgerRole::Node {
            return Err(Fault::WrongRole);
        }
        Ok(Self { log, accounts: BTreeMap::new(), jobs: BTreeMap::new(), halted: false, lost: Vec::new() })
    }

    /// The state after all `records`.
    ///
    /// # Errors
    /// The sequence number of the first record that contradicts those before it, and how.
    pub fn replay<'a>(records: impl IntoIterator<Item = &'a Record>) -> Result<Self, (u64, Fault)> {
        let mut records = records.into_iter();
        let first = records.next().ok_or((0, Fault::Chain(ChainError::Opening)))?;
        let mut ledger = Self::begin(first).map_err(|fault| (0, fault))?;
        for record in records {
            ledger.apply(record).map_err(|fault| (record.sequence(), fault))?;
        }
        Ok(ledger)
    }

    /// The chain and its heads.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Takes a record that was appended.
    ///
    /// # Errors
    /// How it contradicts the records before it. What it spends is counted even so, except if it is not in
    /// the chain.
    pub fn apply(&mut self, record: &Record) -> Result<(), Fault> {
        self.log.push(record)?;
        self.count(record.body())
    }

    /// [`NodeLedger::apply`] for a record that is in no chain: an auditor counts on after a damaged one.
    ///
    /// # Errors
    /// As there.
    pub fn count(&mut self, body: &Body) -> Result<(), Fault> {
        match body {
            Body::AccountOpened {
                account,
                name,
                unit,
                adjacency,
                delta,
                order,
                cap_epsilon,
                data,
                source,
                disjoint_from,
            } => {
                if self.accounts.contains_key(account) {
                    return Err(Fault::AccountTwice(*account));
                }
                let cap = cap_epsilon.map(|epsilon| Cap { epsilon, delta: *delta, order: *order }.budget());
                let opened = Account {
                    name: name.clone(),
                    unit: *unit,
                    adjacency: *adjacency,
                    delta: *delta,
                    order: *order,
                    cap: *cap_epsilon,
                    budget: cap.map(|budget| budget.unwrap_or(0.0)),
                    data: *data,
                    source: *source,
                    disjoint: disjoint_from.iter().copied().collect(),
                    lost: 0.0,
                    unbounded: false,
                    restored: false,
                };
                self.accounts.insert(*account, opened);
                match cap {
                    Some(Err(error)) => Err(Fault::Cap(error)),
                    _ => Ok(()),
                }
            }
            Body::DatasetChanged { account, data, source } => {
                let account = self.account_mut(*account)?;
                (account.data, account.source) = (*data, *source);
                Ok(())
            }
            Body::DisjointDeclared { account, other } => {
                self.account_mut(*other)?;
                self.account_mut(*account)?.disjoint.insert(*other);
                Ok(())
            }
            Body::JobReserved { account, key, job, unit, rounds, events, rho, .. } => {
                self.reserve(*account, *key, *job, *rounds, Some((*unit, events, *rho)))
            }
            Body::UnboundedRelease { account, key, job, rounds, .. } => {
                self.account_mut(*account)?.unbounded = true;
                self.reserve(*account, *key, *job, *rounds, None)
            }
            Body::RoundCharged { account, key, round, events } => {
                let halted = self.halted;
                let job = self.job_mut(*account, *key)?;
                let twice = job.charged.contains_key(round);
                job.charged.entry(*round).or_default();
                if twice {
                    Err(Fault::ChargedTwice { key: *key, round: *round })
                } else if job.returned.is_some() {
                    Err(Fault::Over(*key))
                } else if job.charges() > job.rounds {
                    Err(Fault::TooManyRounds { key: *key, rounds: job.rounds })
                } else if *events != job.events {
                    Err(Fault::OtherEvents(*key))
                } else if halted {
                    Err(Fault::Restored)
                } else {
                    Ok(())
                }
            }
            Body::PayloadSealed { account, key, round, release, payload, .. } => {
                let halted = self.halted;
                let job = self.job_mut(*account, *key)?;
                let charge = job.charged.get_mut(round);
                let sealed = charge.ok_or(Fault::NotCharged { key: *key, round: *round })?;
                let first = *sealed.entry(*release).or_insert(*payload);
                if first != *payload {
                    let (key, round) = (*key, *round);
                    Err(Fault::SecondPayload { key, round, first, second: *payload })
                } else if halted {
                    Err(Fault::Restored)
                } else {
                    Ok(())
                }
            }
            Body::AttemptAbandoned { account, key, round, attempt } => {
                self.job_mut(*account, *key)?.abandoned.insert((*round, *attempt));
                Ok(())
            }
            Body::RoundsReturned { account, key, rounds } => {
                let job = self.job_mut(*account, *key)?;
                if job.returned.is_some() {
                    return Err(Fault::ReturnedTwice(*key));
                }
                let unused = job.rounds.saturating_sub(job.charges());
                job.returned = Some((*rounds).min(unused));
                if *rounds <= unused {
                    Ok(())
                } else {
                    Err(Fault::Returned { key: *key, returned: *rounds, unused })
                }
            }
            Body::HeadWitnessed { head, .. } => head.verify().map_err(|_| Fault::ForgedHead),
            Body::RestoreDetected { evidence } => {
                self.halted = true;
                if let Evidence::Head(head) = evidence {
                    self.lost.push(*head);
                    if head.key != self.log.opening().public_key || head.verify().is_err() {
                        return Err(Fault::ForgedHead);
                    }
                }
                Ok(())
            }
            Body::RestoreAccepted { charges, worst_case, .. } => {
                let (was_halted, worst) = (self.halted, self.worst_case());
                self.halted = false;
                for account in self.accounts.values_mut() {
                    account.restored = true;
                }
                let mut outcome = if was_halted { Ok(()) } else { Err(Fault::NotRestored) };
                for charge in charges {
                    match self.account_mut(charge.account) {
                        Ok(account) => account.lost += charge.rho,
                        Err(fault) => outcome = Err(fault),
                    }
                }
                let covers = |lost: &LostCharge| {
                    let same = charges.iter().filter(|charge| charge.account == lost.account);
                    same.map(|charge| charge.rho).sum::<f64>() >= lost.rho * (1.0 - TOLERANCE)
                };
                if *worst_case && !worst.iter().all(covers) {
                    outcome = Err(Fault::NotWorstCase);
                }
                outcome
            }
            Body::LedgerOpened { .. }
            | Body::RunOpened { .. }
            | Body::RoundNoised { .. }
            | Body::RoundPublished { .. }
            | Body::RoundAbandoned { .. }
            | Body::MetricsReceived { .. }
            | Body::RunEnded { .. } => Err(Fault::WrongRole),
        }
    }

    /// Sets a job's cost aside: its unit, one round's events and the recorded cost of all rounds, if it has a
    /// promise.
    fn reserve(
        &mut self,
        account: AccountId,
        key: JobKey,
        digest: Digest,
        rounds: u32,
        promise: Option<(Unit, &Vec<Event>, f64)>,
    ) -> Result<(), Fault> {
        let payer = self.accounts.get(&account).ok_or(Fault::NoAccount(account))?;
        if self.jobs.contains_key(&key) {
            return Err(Fault::ReservedTwice(key));
        }
        let mut outcome = if self.halted { Err(Fault::Restored) } else { Ok(()) };
        let (events, stated) = promise.map_or((Vec::new(), 0.0), |(_, events, rho)| (events.clone(), rho));
        let mut cost = stated / f64::from(rounds.max(1));
        if let Some((unit, events, _)) = promise {
            match round_cost(payer, unit, events) {
                Some(found) => {
                    let whole = f64::from(rounds) * found;
                    if (whole - stated).abs() > TOLERANCE * whole.abs() || !whole.is_finite() {
                        outcome = Err(Fault::Cost { stated, found: whole });
                    }
                    cost = found;
                }
                None => outcome = Err(Fault::Unit { account: payer.unit, job: unit }),
            }
        }
        let job = Job {
            account,
            digest,
            rounds,
            events,
            round_cost: cost,
            charged: BTreeMap::new(),
            abandoned: BTreeSet::new(),
            returned: None,
        };
        self.jobs.insert(key, job);
        let payer = self.accounts.get(&account).ok_or(Fault::NoAccount(account))?;
        if let (Some(cap), Some(budget), true) = (payer.cap, payer.budget, cost > 0.0) {
            let committed = self.committed(account);
            if committed > budget * (1.0 + TOLERANCE) {
                return Err(Fault::Overspent { name: payer.name.clone(), committed, budget, cap });
            }
        }
        outcome
    }

    fn account_mut(&mut self, account: AccountId) -> Result<&mut Account, Fault> {
        self.accounts.get_mut(&account).ok_or(Fault::NoAccount(account))
    }

    fn job_mut(&mut self, account: AccountId, key: JobKey) -> Result<&mut Job, Fault> {
        let job = self.jobs.get_mut(&key).ok_or(Fault::NotReserved(key))?;
        if job.account == account { Ok(job) } else { Err(Fault::OtherAccount(key)) }
    }

    /// Divergence spent and set aside on an account, in the order of its runs.
    fn committed(&self, account: AccountId) -> f64 {
        let jobs = self.jobs.values().filter(|job| job.account == account);
        let lost = self.accounts.get(&account).map_or(0.0, |account| account.lost);
        jobs.map(|job| job.spent() + job.reserved()).sum::<f64>() + lost
    }

    /// What fills every capped account.
    fn worst_case(&self) -> Vec<LostCharge> {
        let left = |(id, account): (&AccountId, &Account)| {
            let rho = (account.budget? - self.committed(*id)).max(0.0);
            Some(LostCharge { account: *id, rho })
        };
        self.accounts.iter().filter_map(left).collect()
    }

    fn may_spend(&self) -> Result<(), Refusal> {
        if self.halted { Err(Refusal::Restored) } else { Ok(()) }
    }

    fn account(&self, account: AccountId) -> Result<&Account, Refusal> {
        self.accounts.get(&account).ok_or(Refusal::NoAccount(account))
    }

    /// The account of a name.
    pub fn account_named(&self, name: &NodeName) -> Option<AccountId> {
        self.accounts.iter().find(|(_, account)| account.name == *name).map(|(id, _)| *id)
    }

    /// Opens an account. `secret` and `source` find accounts over the same source.
    ///
    /// # Errors
    /// [`Refusal`]: the name is taken, the cap cannot be kept, or another account has the same source or
    /// shares records and was not declared disjoint.
    pub fn open_account(&self, new: NewAccount, secret: &Secret, source: &[u8]) -> Result<Body, Refusal> {
        if self.account_named(&new.name).is_some() || self.accounts.contains_key(&new.account) {
            return Err(Refusal::NameTaken(new.name));
        }
        for other in &new.disjoint_from {
            self.account(*other)?;
        }
        self.disjoint(new.account, &new.overlaps, &new.disjoint_from, secret, source)?;
        let order = match new.order {
            Some(order) => order,
            None => default_order(new.cap_epsilon.unwrap_or(UNCAPPED_EPSILON), new.delta)?,
        };
        if let Some(epsilon) = new.cap_epsilon {
            Cap { epsilon, delta: new.delta, order }.budget()?;
        }
        checked(Body::AccountOpened {
            account: new.account,
            name: new.name,
            unit: new.unit,
            adjacency: new.unit.adjacency(),
            delta: new.delta,
            order,
            cap_epsilon: new.cap_epsilon,
            data: new.data,
            source: new.source,
            disjoint_from: new.disjoint_from,
        })
    }

    /// Whether an account is over these data from this source.
    pub fn is_over_data(&self, account: AccountId, secret: &Secret, data: &[u8], source: &[u8]) -> bool {
        let holds =
            |account: &Account| secret.opens(&account.data, data) && secret.opens(&account.source, source);
        self.accounts.get(&account).is_some_and(holds)
    }

    /// Records that an account's data changed. The account stays, and with it what was spent.
    ///
    /// # Errors
    /// [`Refusal`]: no such account, or another account over the new data that was not declared disjoint.
    pub fn change_dataset(
        &self,
        account: AccountId,
        data: Commitment,
        source: Commitment,
        overlaps: &[AccountId],
        secret: &Secret,
        source_name: &[u8],
    ) -> Result<Body, Refusal> {
        let declared: Vec<_> = self.account(account)?.disjoint.iter().copied().collect();
        self.disjoint(account, overlaps, &declared, secret, source_name)?;
        checked(Body::DatasetChanged { account, data, source })
    }

    /// Records that the operator says that two accounts share no unit.
    ///
    /// # Errors
    /// [`Refusal::NoAccount`].
    pub fn declare_disjoint(&self, account: AccountId, other: AccountId) -> Result<Body, Refusal> {
        self.account(account)?;
        self.account(other)?;
        Ok(Body::DisjointDeclared { account, other })
    }

    fn disjoint(
        &self,
        account: AccountId,
        overlaps: &[AccountId],
        declared: &[AccountId],
        secret: &Secret,
        source: &[u8],
    ) -> Result<(), Refusal> {
        let clash = self.accounts.iter().find(|(id, other)| {
            let same = secret.opens(&other.source, source) || overlaps.contains(id);
            let said = declared.contains(id) || other.disjoint.contains(&account);
            **id != account && same && !said
        });
        clash.map_or(Ok(()), |(_, other)| Err(Refusal::Overlap(other.name.clone())))
    }

    /// Sets a job's whole cost aside, before its first round; `None` if it is already. `unbounded` is the
    /// operator's reason to let a job without a guarantee onto a capped account; elsewhere such a job needs
    /// none.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn reserve_job(
        &self,
        account: AccountId,
        request: JobRequest,
        unbounded: Option<&str>,
    ) -> Result<Option<Body>, Refusal> {
        self.may_spend()?;
        let payer = self.account(account)?;
        let JobRequest { key, job: digest, rounds, promise } = request;
        if rounds == 0 {
            return Err(Refusal::Value("a job has at least one round"));
        }
        if let Some(job) = self.jobs.get(&key) {
            let events = promise.map_or_else(Vec::new, |promise| promise.events);
            let same =
                (job.account, job.digest, job.rounds) == (account, digest, rounds) && job.events == events;
            return match (same, job.returned) {
                (true, None) => Ok(None),
                (true, Some(_)) => Err(Refusal::Over(key)),
                (false, _) => Err(Refusal::OtherJob(key)),
            };
        }
        let Some(Promise { unit, mechanism, events, claim }) = promise else {
            let reason = match (payer.cap, unbounded) {
                (_, Some(reason)) => one_line(reason),
                (None, None) => "the account has no cap".to_owned(),
                (Some(_), None) => return Err(Refusal::Unbounded(payer.name.clone())),
            };
            let body = Body::UnboundedRelease { account, key, job: digest, rounds, reason };
            return checked(body).map(Some);
        };
        if events.is_empty() {
            return Err(Refusal::Value("a job with a guarantee has at least one event a round"));
        }
        let cost = round_cost(payer, unit, &events).ok_or_else(|| Refusal::Unit {
            name: payer.name.clone(),
            account: payer.unit,
            job: unit,
        })?;
        let rho = f64::from(rounds) * cost;
        if let (Some(cap), Some(budget)) = (payer.cap, payer.budget) {
            let committed = self.committed(account);
            if committed + rho > budget {
                return Err(Refusal::Exhausted {
                    name: payer.name.clone(),
                    cost: rho,
                    left: (budget - committed).max(0.0),
                    budget,
                    order: payer.order,
                    cap,
                    delta: payer.delta,
                });
            }
        }
        let adjacency = unit.adjacency();
        let body = Body::JobReserved {
            account,
            key,
            job: digest,
            unit,
            adjacency,
            mechanism,
            rounds,
            events,
            claim,
            rho,
        };
        checked(body).map(Some)
    }

    /// Pays for a round, once: before it trains, and before a metric is computed. `maximum_abandoned` is the
    /// policy's bound on paid attempts that the coordinator abandoned.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn charge_round(
        &self,
        key: JobKey,
        round: u32,
        maximum_abandoned: Option<u32>,
    ) -> Result<Charge, Refusal> {
        self.may_spend()?;
        let job = self.jobs.get(&key).ok_or(Refusal::NotReserved(key))?;
        if let Some(sealed) = job.charged.get(&round) {
            let digest = |release| sealed.get(&release).copied();
            return Ok(Charge::Again { update: digest(Release::Update), metrics: digest(Release::Metrics) });
        }
        if job.returned.is_some() {
            return Err(Refusal::Over(key));
        }
        let abandoned = self.abandoned(key);
        if let Some(most) = maximum_abandoned.filter(|most| abandoned > *most) {
            return Err(Refusal::Abandoned { key, abandoned, most });
        }
        if job.charges() >= job.rounds {
            return Err(Refusal::NoRounds { key, rounds: job.rounds });
        }
        let body = Body::RoundCharged { account: job.account, key, round, events: job.events.clone() };
        Ok(Charge::New(body))
    }

    /// Binds a charge to the one payload that it pays for, whose bytes are on the disk already; `None` if it
    /// is bound to it.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn seal_payload(
        &self,
        key: JobKey,
        round: u32,
        release: Release,
        payload: Digest,
        bytes: u64,
    ) -> Result<Option<Body>, Refusal> {
        self.may_spend()?;
        let job = self.jobs.get(&key).ok_or(Refusal::NotReserved(key))?;
        let charge = job.charged.get(&round).ok_or(Refusal::NotCharged { key, round })?;
        match charge.get(&release) {
            Some(sealed) if *sealed == payload => Ok(None),
            Some(sealed) => Err(Refusal::SecondPayload { key, round, sealed: *sealed }),
            None => {
                let account = job.account;
                Ok(Some(Body::PayloadSealed { account, key, round, release, payload, bytes }))
            }
        }
    }

    /// Counts an attempt that the coordinator abandoned after the node paid for its round; `None` if there is
    /// nothing to count.
    pub fn abandon_attempt(&self, key: JobKey, round: u32, attempt: u32) -> Option<Body> {
        let job = self.jobs.get(&key)?;
        let counts = job.charged.contains_key(&round) && !job.abandoned.contains(&(round, attempt));
        counts.then_some(Body::AttemptAbandoned { account: job.account, key, round, attempt })
    }

    /// Paid attempts of a run that the coordinator abandoned.
    pub fn abandoned(&self, key: JobKey) -> u32 {
        let count = self.jobs.get(&key).map_or(0, |job| job.abandoned.len());
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Ends a run and gives back the rounds that never started; `None` if it ended before.
    ///
    /// # Errors
    /// [`Refusal::NotReserved`].
    pub fn return_rounds(&self, key: JobKey) -> Result<Option<Body>, Refusal> {
        let job = self.jobs.get(&key).ok_or(Refusal::NotReserved(key))?;
        let rounds = job.rounds.saturating_sub(job.charges());
        let body = Body::RoundsReturned { account: job.account, key, rounds };
        Ok(job.returned.is_none().then_some(body))
    }

    /// The runs that may still charge rounds.
    pub fn open_jobs(&self) -> impl Iterator<Item = JobKey> {
        self.jobs.iter().filter(|(_, job)| job.returned.is_none()).map(|(key, _)| *key)
    }

    /// Compares a head of this ledger that a coordinator or an auditor kept.
    pub fn check_head(&self, kept: &SignedHead) -> Witness {
        let (opening, head) = (self.log.opening(), &kept.head);
        let ours = head.ledger == opening.ledger && kept.key == opening.public_key && kept.verify().is_ok();
        if !ours {
            return Witness::Foreign;
        }
        let agrees = self.log.root_at(head.view, head.size) == Some(head.root);
        if agrees || self.lost.contains(kept) {
            Witness::Agrees
        } else {
            Witness::Lost(Box::new(Body::RestoreDetected { evidence: Evidence::Head(*kept) }))
        }
    }

    /// Records a head of a coordinator's ledger; `None` if its signature is false.
    pub fn witness(&self, of: CoordinatorId, head: SignedHead) -> Option<Body> {
        head.verify().ok()?;
        Some(Body::HeadWitnessed { of: Party::Coordinator(of), head })
    }

    /// Accepts that records were lost, at the operator's word. Without `charges` every capped account is
    /// charged all that is left of it, for the lost records may have spent it.
    ///
    /// # Errors
    /// [`Refusal::NotRestored`], or a charge that cannot be recorded.
    pub fn accept_restore(&self, reason: &str, charges: Option<Vec<LostCharge>>) -> Result<Body, Refusal> {
        if !self.halted {
            return Err(Refusal::NotRestored);
        }
        let worst_case = charges.is_none();
        let charges = charges.unwrap_or_else(|| self.worst_case());
        for charge in &charges {
            self.account(charge.account)?;
        }
        checked(Body::RestoreAccepted { reason: one_line(reason), charges, worst_case })
    }

    /// Whether records are known to be lost and the operator has not accepted it.
    pub fn is_halted(&self) -> bool {
        self.halted
    }

    /// How an account stands.
    ///
    /// # Errors
    /// [`Refusal::NoAccount`].
    pub fn reading(&self, id: AccountId) -> Result<Reading, Refusal> {
        let account = self.account(id)?;
        let jobs = || self.jobs.values().filter(|job| job.account == id);
        let spent = jobs().map(Job::spent).sum::<f64>() + account.lost;
        let reserved = jobs().map(Job::reserved).sum::<f64>();
        let epsilon = |divergence| match account.unbounded {
            true => f64::INFINITY,
            false => rdp::epsilon_at(divergence, account.delta, account.order),
        };
        Ok(Reading {
            account: id,
            name: account.name.clone(),
            unit: account.unit,
            adjacency: account.adjacency,
            delta: account.delta,
            order: account.order,
            cap_epsilon: account.cap,
            budget: account.budget,
            spent,
            reserved,
            epsilon_spent: epsilon(spent),
            epsilon_committed: epsilon(spent + reserved),
            unbounded: account.unbounded,
            restored: account.restored,
        })
    }

    /// How all accounts stand, in the order of their ids.
    pub fn readings(&self) -> Vec<Reading> {
        self.accounts.keys().filter_map(|id| self.reading(*id).ok()).collect()
    }

    /// The view whose heads a coordinator is shown.
    pub fn view_of(coordinator: CoordinatorId) -> View {
        View::Coordinator(coordinator)
    }
}

fn checked(body: Body) -> Result<Body, Refusal> {
    body.check().map_err(Refusal::Value)?;
    Ok(body)
}

#[cfg(test)]
mod tests;
