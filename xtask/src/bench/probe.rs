//! Whether the machine was quiet: the same arithmetic on one thread and on two, several times.

use std::fmt;
use std::hint::black_box;
use std::thread;
use std::time::Instant;

/// Steps of one piece of work: some tenths of a second.
const STEPS: u64 = 100_000_000;
const PIECES: usize = 5;
/// How much slower a piece may be than the fastest on a quiet machine.
const TOLERANCE: f64 = 1.1;
/// How much slower two threads may be than one: they share caches and power.
const TOGETHER: f64 = 1.2;

/// Seconds of each piece.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Probe {
    one: Vec<f64>,
    two: Vec<f64>,
}

impl Probe {
    /// Measures now.
    pub(super) fn take() -> Self {
        let two = || {
            thread::scope(|scope| {
                let other = scope.spawn(piece);
                let own = piece();
                own.max(other.join().unwrap_or(f64::INFINITY))
            })
        };
        Self { one: (0..PIECES).map(|_| piece()).collect(), two: (0..PIECES).map(|_| two()).collect() }
    }

    /// Whether nothing else used the machine meanwhile.
    pub(super) fn is_quiet(&self) -> bool {
        let steady = |pieces: &[f64]| worst(pieces) <= best(pieces) * TOLERANCE;
        steady(&self.one) && steady(&self.two) && best(&self.two) <= best(&self.one) * TOGETHER
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words =
            if self.is_quiet() { "quiet" } else { "NOT quiet: compare ratios only, and measure again" };
        write!(
            f,
            "one thread {:.3} to {:.3} s, two threads {:.3} to {:.3} s: {words}",
            best(&self.one),
            worst(&self.one),
            best(&self.two),
            worst(&self.two)
        )
    }
}

fn best(pieces: &[f64]) -> f64 {
    pieces.iter().copied().fold(f64::INFINITY, f64::min)
}

fn worst(pieces: &[f64]) -> f64 {
    pieces.iter().copied().fold(0.0, f64::max)
}

/// A chain of multiplications that no compiler shortens.
fn piece() -> f64 {
    let start = Instant::now();
    let mut value = 1u64;
    for _ in 0..STEPS {
        value = black_box(value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
    black_box(value);
    start.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_piece_or_a_missing_core_is_not_quiet() {
        let probe = |one: &[f64], two: &[f64]| Probe { one: one.to_vec(), two: two.to_vec() };
        assert!(probe(&[1.0, 1.05], &[1.1, 1.15]).is_quiet());
        assert!(!probe(&[1.0, 1.2], &[1.1, 1.1]).is_quiet());
        assert!(!probe(&[1.0, 1.0], &[1.1, 1.5]).is_quiet());
        assert!(!probe(&[1.0, 1.0], &[2.0, 2.0]).is_quiet());
    }
}
