//! Ledgers read and verified together: each export is also a witness for the others.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::{Value, json};
use tributary_common::ledger::head::SignedHead;
use tributary_common::ledger::record::{LedgerRole, PublicKey};
use tributary_common::ledger::verify::{Knowledge, Remark, Verified, Weight, verify};
use tributary_common::privacy::distributed::guarantees;
use tributary_common::privacy::{Event, Noise, Unit};

/// What the ledger cannot show, for every text that speaks of a verified one.
pub const LIMITS: &str = "What a ledger cannot show: that the noise was really added (canaries and replays test that); \
    a rewrite of records that no head covers which somebody else holds; an older copy put back whole, if no other party \
    honestly shows a later head. Claims are recomputed by a second method of the same program, which is tested against \
    published reference values.";

/// An export, verified.
#[derive(Debug)]
pub struct Audited {
    /// Where it was read from.
    pub path: PathBuf,
    /// What was found.
    pub verified: Verified,
}

/// Reads exports, and verifies each with the heads in all the others, in the witnesses' files and the key.
///
/// # Errors
/// The file that cannot be read, in one line.
pub fn audit(
    files: &[PathBuf],
    witnesses: &[PathBuf],
    key: Option<PublicKey>,
) -> anyhow::Result<Vec<Audited>> {
    let texts: Vec<Vec<u8>> = files.iter().map(|path| read(path)).collect::<anyhow::Result<_>>()?;
    let mut held: Vec<SignedHead> = Vec::new();
    for path in witnesses {
        held.extend(heads(&read(path)?));
    }
    if files.len() > 1 {
        texts.iter().for_each(|text| held.extend(heads(text)));
    }
    let knowledge = Knowledge { key, witnesses: held };
    let audited = |(path, text): (&PathBuf, Vec<u8>)| Audited {
        path: path.clone(),
        verified: verify(&text, &knowledge),
    };
    Ok(files.iter().zip(texts).map(audited).collect())
}

/// What is left of a promise over `rounds` rounds of `events` if every other participant is dishonest: the colluders and
/// survivors that it was planned for, and the epsilon at `delta`. `None` where no noise is in shares.
pub fn alone(events: &[Event], rounds: u32, delta: f64, unit: Unit) -> Option<(u32, u32, f64)> {
    let shares = events.iter().find_map(|event| match event.noise {
        Noise::Skellam(shares) => Some(shares),
        Noise::Gaussian | Noise::DiscreteGaussian => None,
    })?;
    let times = |event: &Event| event.times(event.count.saturating_mul(u64::from(rounds)));
    let all: Vec<Event> = events.iter().map(times).collect();
    let (_, alone) = guarantees(&all, delta, unit).ok()?;
    Some((shares.colluders, shares.survivors, alone.epsilon))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))
}

/// The heads in a file: of an export, or lines that are heads alone.
fn heads(text: &[u8]) -> Vec<SignedHead> {
    let alone = text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
    let mut heads: Vec<SignedHead> = alone.collect();
    heads.extend(verify(text, &Knowledge::default()).all_heads());
    heads
}

impl Audited {
    /// Whose ledger it is, for people.
    pub fn title(&self) -> String {
        match &self.verified.opening {
            Some(opening) => {
                let role = match opening.role {
                    LedgerRole::Node => "node",
                    LedgerRole::Coordinator => "coordinator",
                };
                format!("{role} {} (ledger {})", opening.name, opening.ledger.0.short())
            }
            None => "unknown ledger".to_owned(),
        }
    }

    /// The remarks of one weight, a line each.
    pub fn lines(&self, weight: Weight) -> Vec<String> {
        let remarks = self.verified.remarks.iter().filter(|remark| remark.weight == weight);
        remarks.map(Remark::to_string).collect()
    }

    /// The verdict as a JSON object.
    pub fn to_json(&self) -> Value {
        let remark = |remark: &Remark| {
            json!({
                "weight": match remark.weight { Weight::Finding => "finding", Weight::Note => "note" },
                "record": remark.sequence,
                "line": remark.line,
                "problem": remark.problem.to_string(),
            })
        };
        json!({
            "file": self.path.display().to_string(),
            "ledger": self.verified.opening.as_ref().map(|opening| opening.ledger.to_string()),
            "name": self.verified.opening.as_ref().map(|opening| opening.name.to_string()),
            "public_key": self.verified.opening.as_ref().map(|opening| opening.public_key.to_string()),
            "records": self.verified.records.len(),
            "sound": self.verified.is_sound(),
            "remarks": self.verified.remarks.iter().map(remark).collect::<Vec<_>>(),
        })
    }
}
