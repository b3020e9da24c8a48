//! Empirical lower bounds on epsilon from one training run with canaries, and what they can and cannot say.
//!
//! A lower bound above the claim shows that the claim is false. One below it shows nothing: even of a perfect mechanism an
//! audit with some thousand canaries sees a half to two thirds. Bounds at 95 % confidence are wrong once in twenty runs.

pub mod file;
pub mod one_run;
pub mod one_shot;
pub mod trade_off;

/// Probability that a bound is above the truth.
pub const ERROR_PROBABILITY: f64 = 0.05;

/// What guessing the coins of one run came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guesses {
    /// All canaries, guessed or not.
    pub canaries: usize,
    /// Those guessed, as fixed beforehand.
    pub made: usize,
    /// Those guessed right.
    pub correct: usize,
}

/// Solves for where `holds` changes from true to false between `low` and `high`, to 1e−9 or `rounds` halvings.
fn last_true(low: f64, high: f64, rounds: u32, holds: impl Fn(f64) -> bool) -> f64 {
    let (mut low, mut high) = (low, high);
    for _ in 0..rounds {
        if high - low < 1e-9 {
            break;
        }
        let middle = 0.5 * (low + high);
        if holds(middle) { low = middle } else { high = middle }
    }
    low
}
