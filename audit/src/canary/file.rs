//! The file of an audit run: how it is read, what is checked, and the verdict on it.

use std::path::Path;

use anyhow::Context;
use tributary_common::privacy::accounting::{self, Accountant, Guarantee};
use tributary_common::privacy::canary::{AuditRun, NoiseRecord};

use super::{ERROR_PROBABILITY, Guesses, one_run, one_shot, trade_off};

/// Largest file that is read.
const FILE_BYTES: u64 = 1 << 30;
/// How many standard errors noise may be off.
const NOISE_ERRORS: f64 = 5.0;

/// What an audit run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The claim, by the better accountant.
    pub claim: Guarantee,
    /// The guesses.
    pub guesses: Guesses,
    /// Lower bound at 95 %, without a trade-off curve.
    pub one_run: f64,
    /// The same by the claimed mechanism's curve, where it is covered.
    pub trade_off: Option<trade_off::Finding>,
    /// The client-level estimate, where the run had canary clients.
    pub one_shot: Option<f64>,
    /// The noise.
    pub noise: Vec<NoiseCheck>,
}

/// Recorded noise against what was declared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NoiseCheck {
    /// Its number in the record, from 0; None for all together.
    pub record: Option<usize>,
    /// Measured over declared standard deviation.
    pub ratio: f64,
    /// How far the ratio may honestly be from 1: five standard errors.
    pub margin: f64,
}

impl NoiseCheck {
    fn of(record: Option<usize>, noise: &[NoiseRecord]) -> Self {
        let count: f64 = noise.iter().map(|noise| noise.coordinates as f64).sum();
        let square = |noise: &NoiseRecord| noise.sum_of_squares / noise.declared_standard_deviation.powi(2);
        let ratio = (noise.iter().map(square).sum::<f64>() / count).sqrt();
        Self { record, ratio, margin: NOISE_ERRORS / (2.0 * count).sqrt() }
    }

    /// Whether there is too little noise.
    pub fn is_short(&self) -> bool {
        self.ratio < 1.0 - self.margin
    }

    /// Whether there is too much, which costs accuracy alone.
    pub fn is_excessive(&self) -> bool {
        self.ratio > 1.0 + self.margin
    }
}

impl Verdict {
    /// Judges a run.
    ///
    /// # Errors
    /// Where the record is not one of an audit run.
    pub fn of(run: &AuditRun) -> anyhow::Result<Self> {
        let claim = &run.claim;
        let guarantee = accounting::epsilon(&claim.events, claim.delta, claim.unit, Accountant::Best)
            .context("the claim")?;
        let guesses = guess(run)?;
        for (index, noise) in run.noise.iter().enumerate() {
            let declared = noise.declared_standard_deviation;
            let sound = declared > 0.0
                && declared.is_finite()
                && noise.coordinates > 0
                && noise.sum_of_squares >= 0.0
                && noise.sum_of_squares.is_finite();
            anyhow::ensure!(
                sound,
                "noise record {index}: a deviation, coordinates and a sum of squares are needed"
            );
        }
        let each =
            run.noise.iter().enumerate().map(|(i, one)| NoiseCheck::of(Some(i), std::slice::from_ref(one)));
        let mut noise: Vec<NoiseCheck> = each.collect();
        if !run.noise.is_empty() {
            noise.push(NoiseCheck::of(None, &run.noise));
        }
        let error = ERROR_PROBABILITY;
        Ok(Self {
            claim: guarantee,
            guesses,
            one_run: one_run::lower_bound(guesses, claim.delta, error),
            trade_off: trade_off::lower_bound(guesses, &claim.events, claim.delta, error),
            one_shot: run
                .one_shot
                .as_ref()
                .and_then(|shot| one_shot::estimate(&shot.cosines, shot.dimension, claim.delta)),
            noise,
        })
    }

    /// Whether a lower bound is above the claim.
    pub fn is_refuted(&self) -> bool {
        self.one_run > self.claim.epsilon || self.trade_off.is_some_and(|found| found.claim_refuted)
    }

    /// Whether there is anything to object to.
    pub fn is_sound(&self) -> bool {
        !self.is_refuted() && !self.noise.iter().any(NoiseCheck::is_short)
    }
}

/// Guesses the coins: the highest scores took part, the lowest did not. Equal scores keep the record's order.
fn guess(run: &AuditRun) -> anyhow::Result<Guesses> {
    let side = run.guesses_per_side;
    let canaries = run.canaries.len();
    anyhow::ensure!(
        side > 0 && side.saturating_mul(2) <= canaries,
        "{side} guesses a side of {canaries} canaries: from 1 to half of them are possible"
    );
    for (index, canary) in run.canaries.iter().enumerate() {
        anyhow::ensure!(canary.score.is_finite(), "canary {index}: its score is not a number");
    }
    let mut order: Vec<_> = run.canaries.iter().collect();
    order.sort_by(|a, b| b.score.total_cmp(&a.score));
    let right_in = order.iter().take(side).filter(|canary| canary.included).count();
    let right_out = order.iter().rev().take(side).filter(|canary| !canary.included).count();
    Ok(Guesses { canaries, made: 2 * side, correct: right_in + right_out })
}

/// Reads the record of an audit run.
///
/// # Errors
/// Where the file cannot be read or is no such record.
pub fn read(path: &Path) -> anyhow::Result<AuditRun> {
    let name = path.display();
    let size = std::fs::metadata(path).with_context(|| format!("{name}"))?.len();
    anyhow::ensure!(size <= FILE_BYTES, "{name} has {size} bytes; at most {FILE_BYTES} are read");
    let text = std::fs::read_to_string(path).with_context(|| format!("{name}"))?;
    serde_json::from_str(&text).with_context(|| format!("{name} is not the record of an audit run"))
}
