//! A node's ledger beside a coordinator's: what the coordinator says that it received and the node did not
//! pay for.
//!
//! The node may hold more: it pays before it trains, and not all that it trains arrives. Only what the
//! coordinator has beyond it is a finding, and whatever the two say differently of the same thing.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::bail;
use tributary_common::digest::Digest;
use tributary_common::ids::NodeName;
use tributary_common::ledger::record::{Body, JobKey, LedgerRole, Participant, Release};
use tributary_common::ledger::run::RunOpening;
use tributary_common::ledger::verify::{State, Verified, Weight};
use tributary_common::privacy::{Event, Unit};

use crate::verify::{Audited, alone};

/// What two ledgers say of one run.
#[derive(Debug)]
pub struct Comparison {
    /// The run.
    pub run: JobKey,
    /// The node.
    pub node: NodeName,
    /// Payloads of the node that the coordinator recorded and that the node paid for and sealed alike.
    pub agreed: usize,
    /// What is wrong, a line each.
    pub findings: Vec<String>,
    /// What a reader should know, a line each.
    pub notes: Vec<String>,
}

/// What a node recorded of one run.
#[derive(Default)]
struct Paid {
    job: Option<Digest>,
    /// Unit and events of one round, if it was a job with a guarantee.
    promise: Option<(Unit, Vec<Event>, f64, f64)>,
    rounds: u32,
    charged: BTreeSet<u32>,
    sealed: BTreeMap<(u32, Release), Digest>,
}

/// Compares a node's ledger with a coordinator's. Both were verified, each with the other's heads.
///
/// # Errors
/// In one line, if the files are not a node's and a coordinator's ledger with a run.
pub fn compare(node: &Audited, coordinator: &Audited) -> anyhow::Result<Comparison> {
    let (Some(ours), Some(LedgerRole::Node)) =
        (&node.verified.opening, node.verified.opening.as_ref().map(|opening| opening.role))
    else {
        bail!(
            "{}: is not a node's ledger; give the node's first, then the coordinator's",
            node.path.display()
        );
    };
    let Some(State::Run(run)) = &coordinator.verified.state else {
        bail!("{}: is not a coordinator's ledger; give the node's first", coordinator.path.display());
    };
    let Some(opening) = run.run() else {
        bail!("{}: no run was opened in this ledger", coordinator.path.display());
    };
    let mut comparison = Comparison {
        run: opening.key,
        node: ours.name.clone(),
        agreed: 0,
        findings: Vec::new(),
        notes: Vec::new(),
    };
    for (who, audited) in [("the node's ledger", node), ("the coordinator's ledger", coordinator)] {
        comparison
            .findings
            .extend(audited.lines(Weight::Finding).iter().map(|line| format!("{who}: {line}")));
    }
    let paid = paid(&node.verified, opening.key);
    comparison.promises(&paid, opening);
    comparison.payloads(&paid, &coordinator.verified);
    Ok(comparison)
}

fn paid(node: &Verified, run: JobKey) -> Paid {
    let mut paid = Paid::default();
    for record in &node.records {
        match record.body() {
            Body::JobReserved { key, job, unit, rounds, events, claim, .. } if *key == run => {
                paid.job = Some(*job);
                paid.promise = Some((*unit, events.clone(), claim.epsilon, claim.delta));
                paid.rounds = *rounds;
            }
            Body::UnboundedRelease { key, job, rounds, .. } if *key == run => {
                paid.job = Some(*job);
                paid.rounds = *rounds;
            }
            Body::RoundCharged { key, round, .. } if *key == run => {
                paid.charged.insert(*round);
            }
            Body::PayloadSealed { key, round, release, payload, .. } if *key == run => {
                paid.sealed.entry((*round, *release)).or_insert(*payload);
            }
            _ => {}
        }
    }
    paid
}

impl Comparison {
    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.findings.is_empty()
    }

    fn promises(&mut self, paid: &Paid, run: &RunOpening) {
        let Some(job) = paid.job else {
            self.notes.push("the node reserved nothing for this run".to_owned());
            return;
        };
        if job != run.job {
            self.findings.push("the two accepted different job files for this run".to_owned());
        }
        match (&paid.promise, run.unit, run.claim) {
            (Some((unit, events, epsilon, delta)), Some(theirs), Some(claim)) => {
                // That a node's rows are grouped is its own affair: the coordinator records rows.
                let grouped = (*unit, theirs) == (Unit::Group, Unit::Example);
                if (*unit != theirs && !grouped) || *events != run.events {
                    self.findings.push("the two recorded different parameters for this run".to_owned());
                }
                if let Some((colluders, survivors, alone)) = alone(events, paid.rounds, *delta, *unit) {
                    self.notes.push(format!(
                        "epsilon {epsilon:.4} at delta {delta} is with at most {colluders} of {survivors} survivors \
                         dishonest; {alone:.4} if all others are"
                    ));
                }
                if (*epsilon, *delta) != (claim.epsilon, claim.delta) {
                    self.findings.push(format!(
                        "the node was promised epsilon {epsilon} at delta {delta}, the coordinator recorded {} at {}",
                        claim.epsilon, claim.delta
                    ));
                }
            }
            (None, None, None) => {}
            _ => self.findings.push("one of the two recorded a guarantee, the other none".to_owned()),
        }
        if run.rounds > paid.rounds {
            self.notes.push(format!(
                "the coordinator plans {} rounds, the node set {} aside",
                run.rounds, paid.rounds
            ));
        }
    }

    fn payloads(&mut self, paid: &Paid, coordinator: &Verified) {
        let mut received: BTreeSet<(u32, Release)> = BTreeSet::new();
        for record in &coordinator.records {
            let (round, release, participants) = match record.body() {
                Body::RoundPublished { round, participants, .. }
                | Body::RoundAbandoned { round, participants, .. } => (*round, Release::Update, participants),
                Body::MetricsReceived { round, participants } => (*round, Release::Metrics, participants),
                _ => continue,
            };
            let own = |participant: &&Participant| participant.node == self.node;
            let Some(payload) = participants.iter().find(own).map(|participant| participant.payload) else {
                continue;
            };
            received.insert((round, release));
            // A job without a guarantee is not charged by the round.
            if paid.job.is_some() && paid.promise.is_none() {
                continue;
            }
            let what = match release {
                Release::Update => "an update",
                Release::Metrics => "metrics",
            };
            let says = format!("record {} of the coordinator: {what} of round {round}", record.sequence());
            if !paid.charged.contains(&round) {
                self.findings.push(format!("{says} arrived, and the node charged nothing for it"));
                continue;
            }
            match (paid.sealed.get(&(round, release)), payload) {
                (None, _) => self.findings.push(format!("{says} arrived, and the node sealed none")),
                // The digest of what is not noised is not recorded.
                (Some(_), None) => self.agreed += 1,
                (Some(sealed), Some(payload)) if *sealed != payload => self
                    .findings
                    .push(format!("{says} arrived as {payload:?}, and the node sealed {sealed:?}")),
                (Some(_), Some(_)) => self.agreed += 1,
            }
        }
        let unseen = paid.charged.iter().filter(|round| !received.iter().any(|(other, _)| other == *round));
        let unseen = unseen.count();
        if unseen > 0 {
            self.notes.push(format!(
                "the node charged {unseen} rounds of which the coordinator recorded nothing: they count as spent"
            ));
        }
    }
}
