//! A lower bound on epsilon: what an auditor holds a claim against from below.
//!
//! The accountants bound from above, so a claim may honestly be smaller than theirs, but never smaller than this. The
//! method is another than [`pld`]'s: each privacy loss is rounded to the nearest point of a grid and shifted so
//! that the mean stays, and what rounding can do to a sum is bounded by Hoeffding's inequality (Gopi, Lee and Wutschitz
//! 2021, arXiv 2106.02848, section 5 and Theorem 5.5, of which one side suffices here). Mass that is dropped on the way
//! only makes the bound smaller. The grid's size is capped; for very long runs the bound is looser, never wrong.

use realfft::RealFftPlanner;
use realfft::num_complex::Complex;

use super::normal;
use super::pld::{self, Direction, Frame};
use super::sampled_gaussian::SampledGaussian;
use crate::privacy::{Event, Noise};

/// Part of delta that each of three failures may have: rounding in sum, the window, truncation.
const FAILURE: f64 = 1e-3;
/// Part of the standard deviation of the composed loss that the rounding may move it.
const MOVED: f64 = 1e-3;
/// Largest number of grid points, of a composition and of a step.
const MAX_POINTS: f64 = (1 << 20) as f64;

/// An epsilon that no correct claim at `delta` for `events` can be below; 0 where nothing can be shown.
///
/// Discrete noise is replaced by the Gaussian of the same standard deviation, which it approaches from above; below a
/// standard deviation of about 1 of the grid that is not a proof.
pub fn epsilon(events: &[Event], delta: f64) -> f64 {
    if !(delta > 0.0 && delta < 1.0) {
        return 0.0;
    }
    let gaussian: Vec<Event> =
        events.iter().map(|event| Event { noise: Noise::Gaussian, ..*event }).collect();
    let Some(steps) = pld::steps(&gaussian).filter(|steps| !steps.is_empty()) else { return 0.0 };
    let bound = |direction| directed(&steps, delta, direction).unwrap_or(0.0);
    bound(Direction::Remove).max(bound(Direction::Add))
}

fn directed(steps: &[(SampledGaussian, u64)], delta: f64, direction: Direction) -> Option<f64> {
    let total: f64 = steps.iter().map(|(_, count)| *count as f64).sum();
    let failure = delta * FAILURE;
    let frame = Frame::new(steps, 0.0, direction, failure)?;
    let reach = -normal::quantile((failure / total).max(1e-300));
    // What a grid step moves the sum by, except with probability `failure`.
    let deviation = (0.5 * total * -failure.ln()).sqrt();
    let wanted = MOVED * frame.variance.sqrt() / deviation;
    let span = steps.iter().map(|(step, _)| pld::losses(step, reach)).map(|(low, high)| high - low);
    let finest = span.fold(1.1 * (frame.high - frame.low), f64::max) / MAX_POINTS;
    let grid_step = wanted.max(finest);
    let moved = deviation * grid_step;

    let low = frame.low - moved;
    let size = pld::transform_size(((frame.high + moved - low) / grid_step).ceil() as usize + 2);
    let mut planner = RealFftPlanner::<f64>::new();
    let forward = planner.plan_fft_forward(size);
    let mut spectrum = vec![Complex::new(1.0, 0.0); size / 2 + 1];
    let mut buffer = vec![0f64; size];
    let mut one = forward.make_output_vec();
    // The composed loss of slot 0, in grid steps and beyond the grid.
    let (mut origin, mut shift) = (0i64, 0f64);
    for (step, count) in steps {
        let masses = rounded(step, grid_step, pld::losses(step, reach), direction);
        let (mass, sum) =
            masses.iter().fold((0.0, 0.0), |(mass, sum), (i, p)| (mass + p, sum + p * *i as f64));
        let centre = (sum / mass).round() as i64;
        buffer.fill(0.0);
        for (index, mass) in masses {
            let slot = (index - centre).rem_euclid(size as i64) as usize;
            if let Some(slot) = buffer.get_mut(slot) {
                *slot += mass;
            }
        }
        forward.process(&mut buffer, &mut one).ok()?;
        for (product, value) in spectrum.iter_mut().zip(&one) {
            *product *= pld::power(*value, *count);
        }
        origin = origin.checked_add(centre.checked_mul(i64::try_from(*count).ok()?)?)?;
        // The real mean; what lies beyond the cuts changes it by less than the failure accounts for below.
        shift += *count as f64 * (direction.cumulant(step, 0.0)?.mean - sum / mass * grid_step);
    }
    let energy: f64 = 2.0 * spectrum.iter().map(Complex::norm_sqr).sum::<f64>();
    for end in [0, size / 2] {
        if let Some(value) = spectrum.get_mut(end) {
            value.im = 0.0;
        }
    }
    planner.plan_fft_inverse(size).process(&mut spectrum, &mut buffer).ok()?;
    let first = (low / grid_step).floor() as i64;
    buffer.rotate_left((first - origin).rem_euclid(size as i64) as usize);

    // Rounding of the sum, the window's two sides and once more their rounding, and the transform.
    let failures = 4.0 * failure + pld::transform_error(total, size as f64) * energy.sqrt();
    // The cut tails' part of the mean: probability failure/total each, at losses of about the cut.
    let cut: f64 =
        steps.iter().map(|(step, _)| pld::losses(step, reach)).map(|(l, h)| h - l).fold(0.0, f64::max);
    let moved = moved + 4.0 * failure * (cut + 1.0);
    let target = delta + failures;
    // δ(ε) goes up as ε goes down; see `pld` for the recursion.
    let (fall, gain) = ((-grid_step).exp(), -(-grid_step).exp_m1());
    let (mut found, mut weight) = (0f64, 0f64);
    for (slot, mass) in buffer.iter().enumerate().rev() {
        if found >= target {
            let loss = (first + slot as i64) as f64 * grid_step + shift;
            return Some((loss - moved).max(0.0));
        }
        let mass = mass / size as f64;
        found += gain * (weight + mass);
        weight = fall * (weight + mass);
    }
    None
}

/// Mass of the first output around each grid point, (i − ½, i + ½] grid steps, between the cuts.
fn rounded(
    step: &SampledGaussian,
    grid_step: f64,
    (low, high): (f64, f64),
    direction: Direction,
) -> Vec<(i64, f64)> {
    let (q, sigma) = (step.rate(), step.sigma());
    let (first, last) = ((low / grid_step).floor() as i64, (high / grid_step).ceil() as i64);
    // The first output up to ln r, from below and from above.
    let at = |index: i64| {
        let x = step.position((index as f64 - 0.5) * grid_step);
        let two = |sign: f64| match direction {
            Direction::Add => normal::cdf(sign * x / sigma),
            Direction::Remove => {
                (1.0 - q) * normal::cdf(sign * x / sigma) + q * normal::cdf(sign * (x - 1.0) / sigma)
            }
        };
        (two(1.0), two(-1.0))
    };
    let mut left = at(first);
    let mut masses = Vec::new();
    for index in first..=last {
        let right = at(index + 1);
        let mass = if left.0 > 0.5 { left.1 - right.1 } else { right.0 - left.0 };
        if mass > 0.0 {
            masses.push((if direction == Direction::Add { -index } else { index }, mass));
        }
        left = right;
    }
    masses
}
