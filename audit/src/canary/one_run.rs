//! The bound that needs no assumption on the mechanism but its claim: Steinke, Nasr and Jagielski 2023, arXiv 2305.08846.

use super::{Guesses, last_true};

/// No epsilon above this is looked for.
const LARGEST: f64 = 60.0;

/// Probability, at most, of as many correct guesses or more if (`epsilon`, `delta`) held.
///
/// With W binomial of `made` trials and probability e^ε/(1 + e^ε): min(1, β + 2·m·δ·α), β = P\[W ≥ v\],
/// α = max over 1 ≤ i ≤ v of P\[v − i ≤ W < v\]/i. The term with delta counts all m canaries, guessed or not.
pub fn chance(guesses: Guesses, epsilon: f64, delta: f64) -> f64 {
    let Guesses { canaries, made, correct } = guesses;
    // ln of the probabilities of a right and of a wrong guess.
    let ln_right = -(-epsilon).exp().ln_1p();
    let ln_wrong = ln_right - epsilon;
    let mut ln_binomial = 0f64;
    let mut masses = Vec::with_capacity(made + 1);
    for w in 0..=made {
        let mass = ln_binomial + w as f64 * ln_right + (made - w) as f64 * ln_wrong;
        masses.push(mass.exp());
        ln_binomial += ((made - w) as f64 / (w + 1) as f64).ln();
    }
    let at_least: f64 = masses.iter().skip(correct).rev().sum();
    let (mut below, mut largest) = (0f64, 0f64);
    for (i, mass) in masses.iter().take(correct).rev().enumerate() {
        below += mass;
        largest = largest.max(below / (i + 1) as f64);
    }
    (at_least + 2.0 * canaries as f64 * delta * largest).min(1.0)
}

/// The largest epsilon that is too small for the guesses, at confidence 1 − `error`; 0 where even 0 is not.
pub fn lower_bound(guesses: Guesses, delta: f64, error: f64) -> f64 {
    if guesses.correct > guesses.made || guesses.made > guesses.canaries {
        return 0.0;
    }
    let refuted = |epsilon: f64| chance(guesses, epsilon, delta) < error;
    if refuted(0.0) { last_true(0.0, LARGEST, 60, refuted) } else { 0.0 }
}
