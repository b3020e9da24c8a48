//! What is wrong with an export of a ledger: every finding, each naming its record, from the export alone.
//!
//! The accountants here are the ones that wrote the claims: a second *method* (exact Rényi divergences
//! against privacy loss distributions), not a second implementation. That one is the published reference
//! vectors, which both are tested against.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::account::{Fault, NodeLedger};
use super::book::head_line;
use super::file::HEADER;
use super::head::{HeadError, SignedHead, View};
use super::hex::Hex;
use super::log::{Log, Opening};
use super::merkle;
use super::record::{
    Body, Claim, CoordinatorId, Evidence, LedgerHash, LedgerRole, PublicKey, Record, RecordError,
};
use super::run::RunLedger;
use crate::privacy::accounting::distributed::rounded_norm;
use crate::privacy::accounting::{self, AccountingError, Bracket};
use crate::privacy::distributed::{are_in_shares, guarantees};
use crate::privacy::{Event, Noise, SkellamShares, Unit};

/// How far above exact Rényi accounting a claim may be before it is called out, relative.
const RDP_SLACK: f64 = 1e-3;
/// How far below the lower bound a claim may be: this part of it, or [`LOWER_SLACK_LEAST`] if that is more.
const LOWER_SLACK: f64 = 1e-3;
/// How far below a recomputed sensitivity a recorded one may be, relative: errors of arithmetic.
const SENSITIVITY_SLACK: f64 = 1e-9;
/// The least of it.
const LOWER_SLACK_LEAST: f64 = 1e-4;

/// What an auditor knows besides the export.
#[derive(Debug, Clone, Default)]
pub struct Knowledge {
    /// The key that the ledger must be signed by, learnt from its owner on another way.
    pub key: Option<PublicKey>,
    /// Heads that others kept, of this ledger or of any.
    pub witnesses: Vec<SignedHead>,
}

/// How much a remark weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// The ledger or its owner is at fault.
    Finding,
    /// Nothing is wrong, but a reader should know.
    Note,
}

/// One thing that is wrong or worth knowing.
#[derive(Debug, Clone, PartialEq)]
pub struct Remark {
    /// How much it weighs.
    pub weight: Weight,
    /// The record that it is about.
    pub sequence: Option<u64>,
    /// The line of the export, from 1.
    pub line: Option<usize>,
    /// What it is.
    pub problem: Problem,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.sequence, self.line) {
            (Some(sequence), Some(line)) => write!(f, "record {sequence} (line {line}): ")?,
            (Some(sequence), None) => write!(f, "record {sequence}: ")?,
            (None, Some(line)) => write!(f, "line {line}: ")?,
            (None, None) => {}
        }
        self.problem.fmt(f)
    }
}

/// What can be wrong with an export, or worth knowing.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Problem {
    /// Not an export.
    #[error("this is not the export of a Tributary ledger of version 1")]
    NotALedger,
    /// No record opens it.
    #[error("no record says whose ledger this is: nothing can be checked")]
    NoOpening,
    /// The export ends within a line.
    #[error("the export ends within a line: it was cut")]
    Cut,
    /// A line is no record and no head.
    #[error("the record {0}")]
    Broken(RecordError),
    /// Records are missing.
    #[error("records {from} to {to} are missing: they were removed")]
    Removed {
        /// The first of them.
        from: u64,
        /// The last of them.
        to: u64,
    },
    /// A record stands in another place than it was written in.
    #[error("the record stands in another place than it was written in")]
    Reordered,
    /// A record is there twice.
    #[error("the record is there a second time")]
    Repeated,
    /// A record does not follow on the one before it.
    #[error("the record was not written after the one before it: one of the two was exchanged")]
    Previous,
    /// A record is from before its predecessor.
    #[error("the record is from an earlier hour than the one before it")]
    Hour,
    /// The records contradict each other.
    #[error("{0}")]
    Fault(Fault),
    /// A head line is not one.
    #[error("the line is not a head in its one form")]
    BrokenHead,
    /// A head that its owner did not sign.
    #[error("the head was not signed by the ledger's key: it was forged or damaged")]
    ForgedHead,
    /// A head over other records.
    #[error(
        "the head covers {size} records that are not these: records were changed, removed or added since"
    )]
    HeadMismatch {
        /// Records that it covers.
        size: u64,
    },
    /// No head covers the records from here on.
    #[error("no signed head covers the records from {from} on: anybody could have written them")]
    Unsigned {
        /// The first of them.
        from: u64,
    },
    /// The ledger's key is another one than the auditor was told.
    #[error(
        "the ledger names the key {found}, and you were told {expected}: it is another ledger or was rewritten"
    )]
    OtherKey {
        /// Told.
        expected: PublicKey,
        /// Named.
        found: PublicKey,
    },
    /// A witness kept a head over more records than there are.
    #[error(
        "a witness holds a head over {size} records, and only {left} of those are here: the ledger was cut or restored from \
         an older copy"
    )]
    Shorter {
        /// Records that the head covers.
        size: u64,
        /// Records that are here, of the same view.
        left: u64,
    },
    /// A witness kept a head over other records.
    #[error("a witness holds a head over {size} records that are not these: the ledger was rewritten")]
    Rewritten {
        /// Records that the head covers.
        size: u64,
    },
    /// Such a head, but the loss is on record.
    #[error(
        "a witness holds a head over {size} records that were lost; the loss is on record and was accepted"
    )]
    LossOnRecord {
        /// Records that the head covers.
        size: u64,
    },
    /// A witness's head with a false signature.
    #[error("a witness's head of this ledger is not signed by the ledger's key: it says nothing")]
    WitnessForged,
    /// The claim is below what its parameters can give.
    #[error(
        "epsilon {claimed} is claimed at delta {delta}; the recorded parameters give at least {least:.6}: the claim is too small"
    )]
    Overclaim {
        /// The claim.
        claimed: f64,
        /// Its delta.
        delta: f64,
        /// The optimistic figure.
        least: f64,
    },
    /// The claim is above what a plain accountant shows.
    #[error(
        "epsilon {claimed} is claimed at delta {delta}; exact Rényi accounting already shows {shown:.6}: the claim is careful"
    )]
    Careful {
        /// The claim.
        claimed: f64,
        /// Its delta.
        delta: f64,
        /// The Rényi figure.
        shown: f64,
    },
    /// The claim counts on honest participants.
    #[error(
        "epsilon {claimed:.4} is claimed at delta {delta} with at most {colluders} of {survivors} survivors dishonest; if every \
         other participant is, the node's own noise gives epsilon {alone:.4}"
    )]
    Alone {
        /// The claim.
        claimed: f64,
        /// Its delta.
        delta: f64,
        /// Dishonest survivors that the claim allows for.
        colluders: u32,
        /// Fewest survivors.
        survivors: u32,
        /// The epsilon if all others are dishonest.
        alone: f64,
    },
    /// Less than rounding can make of the clip norm.
    #[error(
        "a sensitivity of {recorded} grid steps is recorded; clipping to {clip_norm} at {scale} steps per unit and rounding \
         can give {needed:.3}: the claim is too small"
    )]
    Sensitivity {
        /// Recorded.
        recorded: f64,
        /// What it must be at least.
        needed: f64,
        /// The clip norm.
        clip_norm: f64,
        /// Grid steps per unit.
        scale: f64,
    },
    /// No accountant can compute the parameters.
    #[error("the recorded parameters have no figure: {0}")]
    NoFigure(AccountingError),
    /// A claim over nothing.
    #[error("a guarantee is claimed and no mechanism is recorded, or a mechanism without a claim")]
    EmptyClaim,
    /// The data's epsilon is infinite.
    #[error(
        "a job without a guarantee was allowed on this data set: its epsilon is infinite from here on ({0})"
    )]
    Unbounded(String),
    /// Records were lost and it was accepted.
    #[error("the operator accepted that records were lost ({reason}); {charge}")]
    LossAccepted {
        /// The operator's reason.
        reason: String,
        /// What was charged for it, in words.
        charge: &'static str,
    },
    /// Records were lost and nobody accepted it.
    #[error(
        "records are known to be lost, and the operator has not accepted it: nothing can be spent until then"
    )]
    LossOpen,
}

/// An export that was read as far as it can be.
#[derive(Debug, Clone)]
pub struct Verified {
    /// Whose ledger it is.
    pub opening: Option<Opening>,
    /// Its records in the order of the export, repeated ones once and damaged ones left out.
    pub records: Vec<Record>,
    /// The heads of the ledger in it whose signature is right.
    pub heads: Vec<SignedHead>,
    /// What is wrong or worth knowing, in the order of the export.
    pub remarks: Vec<Remark>,
    /// What the records come to, damaged ones left out.
    pub state: Option<State>,
    leaves: Leaves,
}

/// What the records of a ledger come to.
#[derive(Debug, Clone)]
pub enum State {
    /// A node's accounts.
    Node(NodeLedger),
    /// A coordinator's run.
    Run(RunLedger),
}

impl State {
    fn count(&mut self, body: &Body) -> Result<(), Fault> {
        match self {
            State::Node(ledger) => ledger.count(body),
            State::Run(ledger) => ledger.count(body),
        }
    }
}

/// The leaves of the whole log and of each coordinator's.
#[derive(Debug, Clone, Default)]
struct Leaves {
    whole: Vec<LedgerHash>,
    views: BTreeMap<CoordinatorId, Vec<LedgerHash>>,
}

impl Leaves {
    fn push(&mut self, record: &Record) {
        let leaf = merkle::leaf(&record.hash().0);
        let first = self.whole.first().copied();
        if let Some(coordinator) = record.body().concerns() {
            self.views.entry(coordinator).or_insert_with(|| first.into_iter().collect()).push(leaf);
        }
        self.whole.push(leaf);
    }

    fn of(&self, view: View) -> &[LedgerHash] {
        match view {
            View::Whole => &self.whole,
            View::Coordinator(id) => match self.views.get(&id) {
                Some(leaves) => leaves,
                None => self.whole.get(..1).unwrap_or_default(),
            },
        }
    }

    fn root_at(&self, view: View, size: u64) -> Option<LedgerHash> {
        Some(merkle::root(self.of(view).get(..usize::try_from(size).ok()?)?))
    }
}

impl Verified {
    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.remarks.iter().all(|remark| remark.weight == Weight::Note)
    }

    /// What is wrong.
    pub fn findings(&self) -> impl Iterator<Item = &Remark> {
        self.remarks.iter().filter(|remark| remark.weight == Weight::Finding)
    }

    /// Whether the records of a view began with these: compares a head that somebody kept.
    pub fn agrees_with(&self, head: &SignedHead) -> bool {
        self.leaves.root_at(head.head.view, head.head.size) == Some(head.head.root)
    }

    /// All heads in the export: its own, and those of other ledgers that its owner witnessed. Signatures
    /// unchecked.
    pub fn all_heads(&self) -> Vec<SignedHead> {
        let witnessed = self.records.iter().filter_map(|record| match record.body() {
            Body::HeadWitnessed { head, .. } => Some(*head),
            _ => None,
        });
        self.heads.iter().copied().chain(witnessed).collect()
    }
}

/// Lists what is wrong with an export, and what a reader should know.
pub fn verify(export: &[u8], knowledge: &Knowledge) -> Verified {
    Auditor::default().read(export, knowledge).0
}

#[derive(Default)]
struct Auditor {
    remarks: Vec<Remark>,
    brackets: Brackets,
}

/// Those computed, by what they are of: jobs come in series.
type Brackets = Vec<(Promise, Result<Figures, AccountingError>)>;

/// The bracket, and for noise in shares the epsilon if all other participants are dishonest.
type Figures = (Bracket, Option<f64>);

/// What a claim is about: one round's events, rounds, delta, unit.
type Promise = (Vec<Event>, u32, f64, Unit);

/// A line of an export after the first.
enum Line {
    Record(Box<Record>),
    Head(Box<SignedHead>),
    Broken(Problem),
}

fn read_line(line: &[u8]) -> Line {
    let Ok(text) = str::from_utf8(line) else {
        return Line::Broken(Problem::Broken(RecordError::Form("it is not text".to_owned())));
    };
    if text.starts_with("{\"head\":") {
        let head = serde_json::from_str::<SignedHead>(text).ok().filter(|head| head_line(head) == text);
        return head.map_or(Line::Broken(Problem::BrokenHead), |head| Line::Head(Box::new(head)));
    }
    match Record::parse(text) {
        Ok(record) => Line::Record(Box::new(record)),
        Err(error) => Line::Broken(Problem::Broken(error)),
    }
}

impl Auditor {
    fn remark(&mut self, weight: Weight, sequence: Option<u64>, line: Option<usize>, problem: Problem) {
        self.remarks.push(Remark { weight, sequence, line, problem });
    }

    fn finding(&mut self, sequence: Option<u64>, line: Option<usize>, problem: Problem) {
        self.remark(Weight::Finding, sequence, line, problem);
    }

    fn read(mut self, export: &[u8], knowledge: &Knowledge) -> (Verified, Brackets) {
        let mut lines = export.split(|byte| *byte == b'\n');
        let header = lines.next();
        let mut body: Vec<(usize, &[u8])> = (2..).zip(lines).collect();
        if header != Some(HEADER.as_bytes()) || body.is_empty() {
            self.finding(None, Some(1), Problem::NotALedger);
        }
        // After the last line break there is nothing.
        if let Some((line, rest)) = body.pop()
            && !rest.is_empty()
        {
            self.finding(None, Some(line), Problem::Cut);
            body.push((line, rest));
        }

        let read: Vec<_> = body.iter().map(|(number, line)| (*number, read_line(line))).collect();
        let records = self.in_order(&read);
        let mut leaves = Leaves::default();
        let mut state = None;
        for (line, record) in &records {
            leaves.push(record);
            self.count(&mut state, *line, record);
        }
        let opening = state.as_ref().map(|state| match state {
            State::Node(ledger) => ledger.log().opening().clone(),
            State::Run(ledger) => ledger.log().opening().clone(),
        });
        let records: Vec<Record> = records.into_iter().map(|(_, record)| record).collect();
        let mut verified =
            Verified { opening, records, heads: Vec::new(), remarks: Vec::new(), state, leaves };
        match verified.opening.clone() {
            Some(opening) => {
                verified.heads = self.own_heads(&verified, &opening, &read);
                self.compare_outside(&verified, &opening, knowledge);
            }
            None => self.finding(None, None, Problem::NoOpening),
        }
        if let Some(State::Node(ledger)) = &verified.state
            && ledger.is_halted()
        {
            self.remark(Weight::Note, None, None, Problem::LossOpen);
        }
        verified.remarks = self.remarks;
        (verified, self.brackets)
    }

    /// The records, each once, and what is wrong with their order and their links.
    fn in_order(&mut self, read: &[(usize, Line)]) -> Vec<(usize, Record)> {
        let there: BTreeSet<u64> = read
            .iter()
            .filter_map(|(_, line)| match line {
                Line::Record(record) => Some(record.sequence()),
                _ => None,
            })
            .collect();
        let mut seen: BTreeSet<LedgerHash> = BTreeSet::new();
        let mut records: Vec<(usize, Record)> = Vec::new();
        let mut due = 0_u64;
        // The last record that was read, if it stands right before.
        let mut before: Option<Record> = None;
        for (number, line) in read {
            let at = Some(*number);
            let record = match line {
                Line::Record(record) => record.as_ref(),
                Line::Head(_) => continue,
                Line::Broken(Problem::BrokenHead) => {
                    self.finding(None, at, Problem::BrokenHead);
                    continue;
                }
                Line::Broken(problem) => {
                    self.finding(Some(due), at, problem.clone());
                    due = due.saturating_add(1);
                    before = None;
                    continue;
                }
            };
            let (sequence, named) = (record.sequence(), Some(record.sequence()));
            if !seen.insert(record.hash()) {
                self.finding(named, at, Problem::Repeated);
                before = None;
                continue;
            }
            if sequence > due {
                // Those that come later stand in another place; the others are gone.
                let missing: Vec<u64> =
                    (due..sequence).take(1 << 16).filter(|n| !there.contains(n)).collect();
                if let (Some(from), Some(to)) = (missing.first(), missing.last()) {
                    self.finding(Some(*from), at, Problem::Removed { from: *from, to: *to });
                }
                before = None;
                due = sequence.saturating_add(1);
            } else if sequence < due {
                self.finding(named, at, Problem::Reordered);
                before = None;
            } else {
                due = due.saturating_add(1);
            }
            let links = match &before {
                Some(before) => Some((before.hash(), before.hour())),
                None => (sequence == 0).then_some((Hex([0; 32]), record.hour())),
            };
            if let Some((hash, hour)) = links {
                if record.previous() != hash {
                    self.finding(named, at, Problem::Previous);
                }
                if record.hour() < hour {
                    self.finding(named, at, Problem::Hour);
                }
            }
            before = Some(record.clone());
            records.push((*number, record.clone()));
        }
        records
    }

    /// Counts a record, and remarks what it says.
    fn count(&mut self, state: &mut Option<State>, line: usize, record: &Record) {
        let (sequence, line) = (Some(record.sequence()), Some(line));
        let counted = match state {
            Some(state) if !matches!(record.body(), Body::LedgerOpened { .. }) => state.count(record.body()),
            Some(_) => Err(Fault::WrongRole),
            None => match Log::begin(record).map(|log| log.opening().role) {
                Ok(LedgerRole::Node) => {
                    NodeLedger::begin(record).map(|ledger| *state = Some(State::Node(ledger)))
                }
                Ok(LedgerRole::Coordinator) => {
                    RunLedger::begin(record).map(|ledger| *state = Some(State::Run(ledger)))
                }
                // Said once, for the whole export.
                Err(_) => return,
            },
        };
        if let Err(fault) = counted {
            self.finding(sequence, line, Problem::Fault(fault));
        }
        match record.body() {
            Body::JobReserved { unit, rounds, events, claim, .. } => {
                self.claim((sequence, line), *rounds, events, Some(*unit), Some(claim));
            }
            Body::RunOpened { unit, rounds, events, claim, .. } => {
                self.claim((sequence, line), *rounds, events, *unit, claim.as_ref());
            }
            Body::UnboundedRelease { reason, .. } => {
                self.remark(Weight::Note, sequence, line, Problem::Unbounded(reason.clone()));
            }
            Body::RestoreAccepted { reason, worst_case, .. } => {
                let charge = match worst_case {
                    true => "every capped account was charged all that was left of it",
                    false => "the operator chose what it was charged",
                };
                let problem = Problem::LossAccepted { reason: reason.clone(), charge };
                self.remark(Weight::Note, sequence, line, problem);
            }
            _ => {}
        }
    }

    /// Correction 10: a claim is false below what its parameters give at least, and never for being below
    /// exact Rényi accounting.
    fn claim(
        &mut self,
        (sequence, line): (Option<u64>, Option<usize>),
        rounds: u32,
        events: &[Event],
        unit: Option<Unit>,
        claim: Option<&Claim>,
    ) {
        let (Some(unit), Some(claim), false) = (unit, claim, events.is_empty()) else {
            if unit.is_some() || claim.is_some() || !events.is_empty() {
                self.finding(sequence, line, Problem::EmptyClaim);
            }
            return;
        };
        let (claimed, delta) = (claim.epsilon, claim.delta);
        let promise: Promise = (events.to_vec(), rounds, delta, unit);
        let known = self.brackets.iter().find(|known| known.0 == promise).map(|known| known.1);
        let bracket = known.unwrap_or_else(|| {
            let times = |event: &Event| event.times(event.count.saturating_mul(u64::from(rounds)));
            let all: Vec<Event> = events.iter().map(times).collect();
            let bracket = figures(&all, delta, unit);
            self.brackets.push((promise, bracket));
            bracket
        });
        let (Bracket { lower: least, rdp, .. }, alone) = match bracket {
            Ok(figures) => figures,
            Err(error) => return self.finding(sequence, line, Problem::NoFigure(error)),
        };
        for event in events {
            if let Some(problem) = too_small(event, unit) {
                self.finding(sequence, line, problem);
            }
        }
        let shares = events.iter().find_map(|event| match event.noise {
            Noise::Skellam(shares) => Some(shares),
            Noise::Gaussian | Noise::DiscreteGaussian => None,
        });
        if let (Some(SkellamShares { survivors, colluders, .. }), Some(alone)) = (shares, alone) {
            let problem = Problem::Alone { claimed, delta, colluders, survivors, alone };
            self.remark(Weight::Note, sequence, line, problem);
        }
        if claimed < least - (LOWER_SLACK * least).max(LOWER_SLACK_LEAST) {
            self.finding(sequence, line, Problem::Overclaim { claimed, delta, least });
        } else if claimed > rdp.value * (1.0 + RDP_SLACK) {
            let problem = Problem::Careful { claimed, delta, shown: rdp.value };
            self.remark(Weight::Note, sequence, line, problem);
        }
    }

    /// Checks the export's own heads: at least one is over all its records.
    fn own_heads(
        &mut self,
        verified: &Verified,
        opening: &Opening,
        read: &[(usize, Line)],
    ) -> Vec<SignedHead> {
        let mut heads = Vec::new();
        let mut covered = 0;
        for (number, line) in read {
            let Line::Head(head) = line else { continue };
            let ours = head.head.ledger == opening.ledger && head.key == opening.public_key;
            if !ours || head.verify() == Err(HeadError::Signature) {
                self.finding(None, Some(*number), Problem::ForgedHead);
            } else if !verified.agrees_with(head) {
                self.finding(None, Some(*number), Problem::HeadMismatch { size: head.head.size });
            } else {
                if head.head.view == View::Whole {
                    covered = covered.max(head.head.size);
                }
                heads.push(**head);
            }
        }
        if covered < verified.leaves.whole.len() as u64 {
            self.finding(Some(covered), None, Problem::Unsigned { from: covered });
        }
        heads
    }

    /// Compares with what others hold.
    fn compare_outside(&mut self, verified: &Verified, opening: &Opening, knowledge: &Knowledge) {
        if let Some(expected) = knowledge.key.filter(|expected| *expected != opening.public_key) {
            self.finding(Some(0), None, Problem::OtherKey { expected, found: opening.public_key });
        }
        let accepted = verified.records.iter().any(|r| matches!(r.body(), Body::RestoreAccepted { .. }));
        let lost: BTreeSet<_> = verified
            .records
            .iter()
            .filter_map(|record| match record.body() {
                Body::RestoreDetected { evidence: Evidence::Head(head) } if accepted => Some(head.to_bytes()),
                _ => None,
            })
            .collect();
        let mut seen = BTreeSet::new();
        for witness in &knowledge.witnesses {
            let head = &witness.head;
            if head.ledger != opening.ledger || !seen.insert(witness.to_bytes()) {
                continue;
            }
            if witness.key != opening.public_key || witness.verify().is_err() {
                self.remark(Weight::Note, None, None, Problem::WitnessForged);
                continue;
            }
            if verified.agrees_with(witness) {
                continue;
            }
            let (size, left) = (head.size, verified.leaves.of(head.view).len() as u64);
            if lost.contains(&witness.to_bytes()) {
                self.remark(Weight::Note, None, None, Problem::LossOnRecord { size });
            } else if left < size {
                self.finding(Some(left), None, Problem::Shorter { size, left });
            } else {
                self.finding(None, None, Problem::Rewritten { size });
            }
        }
    }
}

/// What an auditor holds a claim against.
fn figures(events: &[Event], delta: f64, unit: Unit) -> Result<Figures, AccountingError> {
    let bracket = accounting::bracket(events, delta, unit)?;
    let alone = if are_in_shares(events) { Some(guarantees(events, delta, unit)?.1.epsilon) } else { None };
    Ok((bracket, alone))
}

/// Whether less is accounted for than one unit can change a sum of rounded vectors.
///
/// A client can see to it that its own rounded vector is no longer than it says, whatever that is, from its clip norm on. What
/// one example changes nobody can see: it is the bound for the failure that is paid into delta, or the one that needs none.
fn too_small(event: &Event, unit: Unit) -> Option<Problem> {
    let Noise::Skellam(SkellamShares { scale, clip_norm, dimension, rounding_failure, .. }) = event.noise
    else {
        return None;
    };
    let norm = scale * clip_norm;
    let needed = match unit {
        Unit::Client => norm,
        Unit::Example | Unit::Group => {
            rounded_norm(norm, dimension as usize, Some(rounding_failure).filter(|failure| *failure > 0.0))
        }
    };
    let recorded = event.sensitivity;
    let short = recorded < needed * (1.0 - SENSITIVITY_SLACK);
    short.then_some(Problem::Sensitivity { recorded, needed, clip_norm, scale })
}

#[cfg(test)]
mod tests;
