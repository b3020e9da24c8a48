//! The privacy-loss-distribution accountant: nearly exact epsilon, delta and trade-off curve, always an upper bound.
//!
//! A step's privacy loss is discretised on a grid so that the discrete pair of outputs is easier to tell apart than the
//! real one ("connect the dots": Doroshenko, Ghazi, Kamath, Kumar and Manurangsi 2022, arXiv 2207.04380), and composed
//! by Fourier transform. Both directions are composed, a unit removed and a unit added; the larger figure is the answer.
//!
//! Three things differ from the usual way:
//! - The grid's step is tied to the loss's standard deviation per step, never an absolute number: a fixed one can be
//!   coarser than the whole loss and lose to the Rényi accountant.
//! - Where delta is small the composition runs under an exponential tilt, e^(t·loss), as in the theory of large
//!   deviations. Rounding errors of the transform are then relative to Chernoff's bound on delta instead of to one, so
//!   that a delta of 1e−12 is as accurate as one of 1e−3.
//! - What is left of such errors and of the mass outside the window is bounded and added to delta.
//!
//! For a unit that is always in the sample (rate 1) and whose contribution is zero in the neighbour
//! ([`ZeroOut`](crate::privacy::Adjacency::ZeroOut)) the outputs are the same two normal distributions as for adding or
//! removing, so the same figures hold.

use std::sync::Arc;

use realfft::num_complex::Complex;
use realfft::{RealFftPlanner, RealToComplex};

use super::sampled_gaussian::SampledGaussian;
use super::{MAX_STEPS, normal, rdp};
use crate::privacy::{Event, Noise};

/// Grid steps per standard deviation of one step's tilted loss. The discretisation adds at most 1/4 of a squared grid
/// step to that variance, so a figure grows by about 1/(24·64²) of itself.
const STEPS_PER_DEVIATION: f64 = 64.0;
/// Grid points that a step or a composition gets at least: few large losses can make a deviation that says little of
/// the loss near the answer.
const MIN_POINTS: f64 = (1 << 15) as f64;
/// Largest number of grid points of a composition; where it does not suffice the grid is coarser.
const MAX_WINDOW: f64 = (1 << 20) as f64;
/// Largest number of cells of one step.
const MAX_CELLS: f64 = (1 << 19) as f64;
/// Largest loss of one step, in nats, that is represented: its exponential must be a float.
const MAX_LOSS: f64 = 600.0;
/// Tilted mass that the window may leave out on either side.
const OUTSIDE: f64 = 1e-13;
/// Passes, each aimed at the last one's answer. The Rényi order is a poor guide to the first where
/// few large losses decide it.
const MAX_PASSES: u32 = 8;
/// A pass that improves epsilon by less than this part is the last.
const SETTLED: f64 = 1e-5;
/// How far above its least value ln of Chernoff's bound may be to allow a smaller tilt.
const NEAR_LEAST: f64 = 0.1;
/// Part of delta that one run's truncated tails may cost.
const TRUNCATED: f64 = 1e-7;
/// Half a unit in the last place of one.
const ROUNDING: f64 = f64::EPSILON / 2.0;

/// A figure and the grid step, in nats, that gave it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// Epsilon or delta.
    pub value: f64,
    /// Spacing of the privacy losses.
    pub grid_step: f64,
}

/// The smallest epsilon that this accountant can show for `events` at `delta`.
///
/// None where it has nothing to say: discrete noise, a loss of more than 600 nats in one step, more than 2^40 steps, or
/// an event that is no mechanism.
pub fn epsilon(events: &[Event], delta: f64) -> Option<Bound> {
    if !(delta > 0.0 && delta < 1.0) {
        return None;
    }
    let steps = steps(events)?;
    let start = rdp::epsilon(events, delta);
    if start.value == 0.0 || steps.is_empty() {
        return Some(Bound { value: 0.0, grid_step: 0.0 });
    }
    let mut aim = Aim { epsilon: start.value, slope: start.order - 1.0 };
    let mut best: Option<Bound> = None;
    for _ in 0..MAX_PASSES {
        let Some(plan) = Plan::new(&steps, Some(aim), delta) else { break };
        let Some(compositions) = plan.compositions() else { break };
        let worse = |a: Aim, b: Aim| if a.epsilon >= b.epsilon { a } else { b };
        let [removed, added] = compositions.map(|composition| composition.epsilon(delta));
        let found = worse(removed, added);
        let settled = best.is_some_and(|best| found.epsilon > (1.0 - SETTLED) * best.value);
        if best.is_none_or(|best| found.epsilon < best.value) {
            best = Some(Bound { value: found.epsilon, grid_step: plan.grid_step });
        }
        if settled || !found.epsilon.is_finite() || found.epsilon == 0.0 || plan.suits(found, delta) {
            break;
        }
        aim = found;
    }
    best
}

/// The smallest delta that this accountant can show for `events` at `epsilon` ≥ 0; None as for [`epsilon`].
pub fn delta(events: &[Event], epsilon: f64) -> Option<Bound> {
    if !(epsilon >= 0.0 && epsilon.is_finite()) {
        return None;
    }
    let steps = steps(events)?;
    if steps.is_empty() {
        return Some(Bound { value: 0.0, grid_step: 0.0 });
    }
    let start = rdp::delta(events, epsilon);
    let plan = Plan::new(&steps, Some(Aim { epsilon, slope: start.order - 1.0 }), start.value.max(1e-280))?;
    let value = plan.compositions()?.iter().map(|composition| composition.delta(epsilon)).fold(0.0, f64::max);
    Some(Bound { value: value.min(1.0), grid_step: plan.grid_step })
}

/// How well any test can tell whether one unit took part: the least rate of misses for each rate of false alarms.
///
/// None as for [`epsilon`].
pub fn trade_off(events: &[Event]) -> Option<TradeOff> {
    let steps = steps(events)?;
    if steps.is_empty() {
        return Some(TradeOff { points: vec![(0.0, 1.0), (1.0, 0.0)] });
    }
    let plan = Plan::new(&steps, None, 1e-6)?;
    let removed = plan.composition(Direction::Remove)?;
    Some(removed.trade_off())
}

/// A lower bound on the trade-off function of a mechanism (Dong, Roth and Su 2019, arXiv 1905.02383, Definition 2.1):
/// f(false alarms) ≤ misses for every test of "the unit took part" against "it did not".
#[derive(Debug, Clone, PartialEq)]
pub struct TradeOff {
    /// (false alarms, misses), false alarms rising from 0 to 1; convex and piecewise linear.
    points: Vec<(f64, f64)>,
}

impl TradeOff {
    /// The least rate of misses of a test whose rate of false alarms is at most `false_alarms` (0 to 1).
    pub fn misses(&self, false_alarms: f64) -> f64 {
        between(&self.points, false_alarms, |point| point.0, |point| point.1)
    }

    /// The least rate of false alarms of a test whose rate of misses is at most `misses` (0 to 1): the inverse function.
    pub fn false_alarms(&self, misses: f64) -> f64 {
        // Reversed, misses rise.
        let at = self.points.partition_point(|point| point.1 > misses);
        let (Some(after), before) = (self.points.get(at), at.checked_sub(1).and_then(|i| self.points.get(i)))
        else {
            return 1.0;
        };
        before.map_or(after.0, |before| line((before.1, before.0), (after.1, after.0), misses))
    }
}

/// The value at `x` of the line through the points, which rise in `x_of`.
fn between(
    points: &[(f64, f64)],
    x: f64,
    x_of: impl Fn(&(f64, f64)) -> f64,
    y_of: impl Fn(&(f64, f64)) -> f64,
) -> f64 {
    let at = points.partition_point(|point| x_of(point) < x);
    match (at.checked_sub(1).and_then(|i| points.get(i)), points.get(at)) {
        (Some(before), Some(after)) => line((x_of(before), y_of(before)), (x_of(after), y_of(after)), x),
        (None, Some(after)) => y_of(after),
        (Some(before), None) => y_of(before),
        (None, None) => 0.0,
    }
}

fn line(from: (f64, f64), to: (f64, f64), x: f64) -> f64 {
    if to.0 == from.0 {
        return to.1;
    }
    let part = ((x - from.0) / (to.0 - from.0)).clamp(0.0, 1.0);
    from.1 + part * (to.1 - from.1)
}

/// The distinct steps of `events` and how often each is taken; None where one is not covered.
pub(super) fn steps(events: &[Event]) -> Option<Vec<(SampledGaussian, u64)>> {
    let mut steps: Vec<(SampledGaussian, u64)> = Vec::new();
    let mut total = 0u64;
    for event in events.iter().filter(|event| event.count > 0 && event.sampling_rate != 0.0) {
        if event.noise != Noise::Gaussian {
            return None;
        }
        let step = SampledGaussian::new(event.sampling_rate, event.noise_multiplier())?;
        total = total.checked_add(event.count).filter(|total| *total <= MAX_STEPS)?;
        match steps.iter_mut().find(|(known, _)| *known == step) {
            Some((_, count)) => *count += event.count,
            None => steps.push((step, event.count)),
        }
    }
    Some(steps)
}

/// Which of two neighbours is the first argument of the divergence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// The unit is in the data, and absent from the neighbour: the mixture against the plain noise.
    Remove,
    /// The reverse.
    Add,
}

impl Direction {
    /// ln E\[e^(t·loss)\], with mean and variance of the loss under that tilt.
    pub(super) fn cumulant(self, step: &SampledGaussian, t: f64) -> Option<super::sampled_gaussian::Moment> {
        match self {
            Direction::Remove => step.moment(t + 1.0),
            Direction::Add => step.moment(-t).map(|mut moment| {
                moment.mean = -moment.mean;
                moment
            }),
        }
    }
}

/// Where on the curve of delta against epsilon an answer is sought.
#[derive(Debug, Clone, Copy)]
struct Aim {
    epsilon: f64,
    /// −d ln δ/dε there, above 0.
    slope: f64,
}

impl Aim {
    /// The grid step that adds 1/(24·64²) of epsilon: a step h adds at most `total`·h²/6 to the variance of the loss, and
    /// where delta falls as e^(−s·ε) a variance v adds s·v/2 to epsilon. For a normal loss it is the deviation over 64.
    fn grid_step(&self, total: f64) -> f64 {
        (self.epsilon / (self.slope * total)).sqrt() / STEPS_PER_DEVIATION
    }

    /// ln of the error of delta, relative to it, that moves epsilon by a ten-thousandth of itself and a millionth.
    fn ln_tolerance(&self) -> f64 {
        (self.slope * (1e-4 * self.epsilon + 1e-6)).ln()
    }
}

/// What is composed and on which grid.
struct Plan<'a> {
    steps: &'a [(SampledGaussian, u64)],
    tilt: f64,
    grid_step: f64,
    /// Steps of all events together.
    total: f64,
    /// Standard deviations at which a step's normal tails are cut.
    reach: f64,
    removed: Frame,
    added: Frame,
}

impl<'a> Plan<'a> {
    /// A plan for figures around `delta`; None where a loss is too large to be represented.
    ///
    /// Without an aim the whole curve is wanted, and there is no tilt.
    fn new(steps: &'a [(SampledGaussian, u64)], aim: Option<Aim>, delta: f64) -> Option<Self> {
        let total: f64 = steps.iter().map(|(_, count)| *count as f64).sum();
        let reach = -normal::quantile((delta * TRUNCATED / total).max(1e-300));
        let mut span = 0f64;
        for (step, _) in steps {
            let (low, high) = losses(step, reach);
            if !(high <= MAX_LOSS && low >= -MAX_LOSS) {
                return None;
            }
            span = span.max(high - low);
        }
        let tilt = aim.map_or(Some(0.0), |aim| least_tilt(steps, aim, delta))?;
        let removed = Frame::new(steps, tilt, Direction::Remove, OUTSIDE)?;
        let added = Frame::new(steps, tilt, Direction::Add, OUTSIDE)?;
        let (variance, width) = (removed.variance.max(added.variance), removed.width().max(added.width()));
        // A coarser grid is still a bound. The window gets a margin for what the grid itself adds.
        let by_deviation = (variance / total).sqrt() / STEPS_PER_DEVIATION;
        let finest = (1.1 * width / MAX_WINDOW).max(span / MAX_CELLS);
        let wanted = by_deviation
            .min(width.max(span) / MIN_POINTS)
            .min(aim.map_or(f64::INFINITY, |aim| aim.grid_step(total)));
        let grid_step = wanted.max(finest);
        let plan = Self { steps, tilt, grid_step, total, reach, removed, added };
        (grid_step > 0.0 && grid_step.is_finite()).then_some(plan)
    }

    /// Whether grid and tilt are about those of a plan that is aimed at what was found.
    fn suits(&self, found: Aim, delta: f64) -> bool {
        self.grid_step <= 1.25 * found.grid_step(self.total)
            && least_tilt(self.steps, found, delta).is_none_or(|tilt| tilt <= 1.1 * self.tilt)
    }

    fn cells(&self) -> Vec<Cells> {
        let cells =
            |(step, _): &(SampledGaussian, u64)| Cells::new(step, self.grid_step, losses(step, self.reach));
        self.steps.iter().map(cells).collect()
    }

    /// Both directions.
    fn compositions(&self) -> Option<[Composition; 2]> {
        let cells = self.cells();
        Some([self.compose(&cells, Direction::Remove)?, self.compose(&cells, Direction::Add)?])
    }

    fn composition(&self, direction: Direction) -> Option<Composition> {
        self.compose(&self.cells(), direction)
    }

    fn compose(&self, cells: &[Cells], direction: Direction) -> Option<Composition> {
        let frame = match direction {
            Direction::Remove => self.removed,
            Direction::Add => self.added,
        };
        let losses: Vec<(Loss, u64)> =
            cells.iter().zip(self.steps).map(|(cells, (_, count))| (cells.loss(direction), *count)).collect();
        Composition::new(&losses, self.tilt, self.grid_step, frame)
    }
}

/// The smallest tilt under which the errors of a composition, relative to Chernoff's bound on delta, are small enough for
/// the aim; the one with the smallest bound where none is.
///
/// A larger tilt would widen the window where a few large losses carry much of the tilted mass.
fn least_tilt(steps: &[(SampledGaussian, u64)], aim: Aim, delta: f64) -> Option<f64> {
    // ln of Chernoff's bound, E\[e^(t·loss)\]·e^(−t·ε), and its slope.
    let chernoff = |tilt: f64| {
        let mut sums = (-tilt * aim.epsilon, -aim.epsilon);
        for (step, count) in steps {
            let moment = Direction::Remove.cumulant(step, tilt)?;
            sums.0 += *count as f64 * moment.ln;
            sums.1 += *count as f64 * moment.mean;
        }
        Some(sums)
    };
    let total: f64 = steps.iter().map(|(_, count)| *count as f64).sum();
    let enough =
        delta.ln() + aim.ln_tolerance() - (2.0 * OUTSIDE + 4.0 * transform_error(total, MAX_WINDOW)).ln();
    if chernoff(0.0)?.0 <= enough {
        return Some(0.0);
    }
    // Where the bound is smallest; it is convex.
    let (mut low, mut high) = (0.0, 1e-3);
    while chernoff(high)?.1 < 0.0 {
        (low, high) = (high, 4.0 * high);
    }
    while high - low > 0.02 * high {
        let middle = 0.5 * (low + high);
        if chernoff(middle)?.1 < 0.0 { low = middle } else { high = middle }
    }
    let enough = enough.max(chernoff(high)?.0 + NEAR_LEAST);
    low = 0.0;
    while high - low > 0.02 * high {
        let middle = 0.5 * (low + high);
        if chernoff(middle)?.0 > enough { low = middle } else { high = middle }
    }
    Some(high)
}

/// Bound on the sum of the errors of `total` steps' composition over `size` points, per square root of the energy.
///
/// Each value of the transform of masses that sum to one is taken to be off by at most 2·log2(size) roundings, several
/// times what is seen (a test compares it with an exact sum); a power multiplies that by the count, and Parseval's
/// theorem turns it into a bound on the sum of the errors.
pub(super) fn transform_error(total: f64, size: f64) -> f64 {
    2.0 * ROUNDING * size.log2() * (total + 4.0)
}

/// ln of the ratio at a step's two cuts, `reach` standard deviations out.
pub(super) fn losses(step: &SampledGaussian, reach: f64) -> (f64, f64) {
    let reach = reach * step.sigma();
    (step.ln_ratio(-reach), step.ln_ratio(1.0 + reach))
}

/// Where all but a given mass of the tilted composed loss lies on either side, by Chernoff's bound at about its best tilt.
#[derive(Clone, Copy)]
pub(super) struct Frame {
    pub(super) low: f64,
    pub(super) high: f64,
    /// The tilts, relative to the plan's and positive, that gave the two.
    low_tilt: f64,
    high_tilt: f64,
    /// Variance of the composed loss under the plan's tilt.
    pub(super) variance: f64,
}

impl Frame {
    pub(super) fn new(
        steps: &[(SampledGaussian, u64)],
        tilt: f64,
        direction: Direction,
        outside: f64,
    ) -> Option<Self> {
        // ln of the composed moment generating function at `tilt` + s, and the variance there.
        let composed = |s: f64| {
            let mut sums = (0f64, 0f64);
            for (step, count) in steps {
                let moment = direction.cumulant(step, tilt + s)?;
                sums.0 += *count as f64 * moment.ln;
                sums.1 += *count as f64 * moment.variance;
            }
            Some(sums)
        };
        let outside = -outside.ln();
        let (base, variance) = composed(0.0)?;
        let normal = (2.0 * outside / variance.max(1e-300)).sqrt();
        // Both bounds are unimodal in the tilt; a few large losses move the best one far below the normal law's.
        let at = |s: f64| composed(s).map_or(f64::INFINITY, |(moved, _)| (moved - base + outside) / s.abs());
        let (high_tilt, high) = smallest(1e-4 * normal, 4.0 * normal, at);
        let (low_tilt, low) = smallest(1e-4 * normal, 4.0 * normal, |s| at(-s));
        let frame = Self { low: -low, high, low_tilt, high_tilt, variance };
        (low.is_finite() && high.is_finite()).then_some(frame)
    }

    fn width(&self) -> f64 {
        self.high - self.low
    }
}

/// Where between `low` and `high` (above 0) the unimodal `at` is about smallest, and its value there.
fn smallest(low: f64, high: f64, at: impl Fn(f64) -> f64) -> (f64, f64) {
    const GOLDEN: f64 = 0.618_033_988_749_894_9;
    let (mut a, mut b) = (low.ln(), high.ln());
    let (mut c, mut d) = (b - GOLDEN * (b - a), a + GOLDEN * (b - a));
    let (mut at_c, mut at_d) = (at(c.exp()), at(d.exp()));
    for _ in 0..14 {
        // Where neither is finite the smaller tilt is nearer to where one is.
        if at_c <= at_d {
            (b, d, at_d) = (d, c, at_c);
            c = b - GOLDEN * (b - a);
            at_c = at(c.exp());
        } else {
            (a, c, at_c) = (c, d, at_d);
            d = a + GOLDEN * (b - a);
            at_d = at(d.exp());
        }
    }
    if at_c <= at_d { (c.exp(), at_c) } else { (d.exp(), at_d) }
}

/// Masses of the plain noise and of the mixture between neighbouring points of the grid of ln r.
struct Cells {
    grid_step: f64,
    /// The lowest grid point, in grid steps.
    first: i64,
    /// Per cell: plain mass, mixed mass, and bounds on their rounding errors.
    masses: Vec<[f64; 4]>,
    /// Plain and mixed mass below the first point, zero where no ratio is that low.
    below: (f64, f64),
    /// Plain and mixed mass above the last point.
    above: (f64, f64),
}

/// A normal distribution's smaller tail at a point.
#[derive(Clone, Copy)]
struct Tail {
    mass: f64,
    upper: bool,
}

impl Tail {
    fn at(x: f64) -> Self {
        Self { mass: normal::cdf(-x.abs()), upper: x > 0.0 }
    }

    /// The mass up to here.
    fn below(self) -> f64 {
        if self.upper { 1.0 - self.mass } else { self.mass }
    }

    /// The mass from here.
    fn above(self) -> f64 {
        if self.upper { self.mass } else { 1.0 - self.mass }
    }

    /// The mass from here to `high`, and a bound on its error.
    fn to(self, high: Self) -> (f64, f64) {
        let mass = match (self.upper, high.upper) {
            (true, _) => self.mass - high.mass,
            (false, false) => high.mass - self.mass,
            (false, true) => 1.0 - self.mass - high.mass,
        };
        (mass.max(0.0), 4.0 * ROUNDING * (self.mass + high.mass))
    }
}

impl Cells {
    fn new(step: &SampledGaussian, grid_step: f64, (low, high): (f64, f64)) -> Self {
        let (q, sigma) = (step.rate(), step.sigma());
        let first = (low / grid_step).floor() as i64;
        let last = ((high / grid_step).ceil() as i64).max(first + 1);
        let tails = |index: i64| {
            let x = step.position(index as f64 * grid_step);
            (Tail::at(x / sigma), Tail::at((x - 1.0) / sigma))
        };
        let mut left = tails(first);
        let mixed = |plain: f64, shifted: f64| (1.0 - q) * plain + q * shifted;
        let below = (left.0.below(), mixed(left.0.below(), left.1.below()));
        let mut masses = Vec::with_capacity((last - first) as usize);
        for index in first + 1..=last {
            let right = tails(index);
            let (plain, plain_error) = left.0.to(right.0);
            let (shifted, shifted_error) = left.1.to(right.1);
            let mixed_error = mixed(plain_error, shifted_error) + 4.0 * ROUNDING * mixed(plain, shifted);
            masses.push([plain, mixed(plain, shifted), plain_error, mixed_error]);
            left = right;
        }
        let above = (left.0.above(), mixed(left.0.above(), left.1.above()));
        Self { grid_step, first, masses, below, above }
    }

    /// The discrete loss of one direction: each cell's mass goes to its two ends so that both outputs' masses are kept.
    ///
    /// With mass u of the first output and l of the second in the cell from a to a + h, the part
    /// b = (u − l·e^a)/(1 − e^−h) goes to the upper end. What rounding leaves open goes up. Beyond the cuts: low losses
    /// are rounded up to the first point, high ones to infinity.
    fn loss(&self, direction: Direction) -> Loss {
        let width = -(-self.grid_step).exp_m1();
        let mut masses = Vec::with_capacity(self.masses.len() + 1);
        let upper_part = |first: [f64; 2], second: [f64; 2], low: f64| {
            let scale = low.exp();
            let exact = first[0] - second[0] * scale;
            let error = first[1] + (second[1] + 4.0 * ROUNDING * (1.0 + low.abs()) * second[0]) * scale;
            // A product of zero and an infinity is not a number; all mass then goes up.
            let part = (exact + error) / width;
            if part < first[0] { part.max(0.0) } else { first[0] }
        };
        let grid = |index: i64| index as f64 * self.grid_step;
        let last = self.first + self.masses.len() as i64;
        // What the cell below sent to its upper end, which is this cell's lower one.
        let mut carried;
        match direction {
            Direction::Remove => {
                carried = self.below.1;
                for (index, [plain, mixed, plain_error, mixed_error]) in
                    (self.first..).zip(self.masses.iter().copied())
                {
                    let up = upper_part([mixed, mixed_error], [plain, plain_error], grid(index));
                    masses.push(carried + mixed - up);
                    carried = up;
                }
            }
            Direction::Add => {
                carried = self.above.0;
                for (index, [plain, mixed, plain_error, mixed_error]) in
                    (-last..).zip(self.masses.iter().rev().copied())
                {
                    let up = upper_part([plain, plain_error], [mixed, mixed_error], grid(index));
                    masses.push(carried + plain - up);
                    carried = up;
                }
            }
        }
        masses.push(carried);
        let (first, infinity) = match direction {
            Direction::Remove => (self.first, self.above.1),
            Direction::Add => (-last, self.below.0),
        };
        Loss { first, masses, infinity }
    }
}

/// A discrete privacy loss: masses of the first output on the grid, and its mass at an infinite loss.
struct Loss {
    first: i64,
    masses: Vec<f64>,
    infinity: f64,
}

impl Loss {
    fn points(&self) -> impl Iterator<Item = (i64, f64)> + '_ {
        (self.first..).zip(self.masses.iter().copied()).filter(|(_, mass)| *mass > 0.0)
    }

    /// ln Σ mass·e^(t·loss).
    fn cumulant(&self, t: f64, grid_step: f64) -> f64 {
        let top = self
            .points()
            .map(|(i, mass)| mass.ln() + t * i as f64 * grid_step)
            .fold(f64::NEG_INFINITY, f64::max);
        let terms = self.points().map(|(i, mass)| (mass.ln() + t * i as f64 * grid_step - top).exp());
        top + terms.sum::<f64>().ln()
    }
}

/// A composed loss over a window of the grid, under a tilt.
///
/// The mass at grid point i is `masses[i]`·exp(`ln_scale` − t·loss), so that `masses` sum to about one.
struct Composition {
    tilt: f64,
    grid_step: f64,
    /// The window's lowest point, in grid steps.
    first: i64,
    masses: Vec<f64>,
    ln_scale: f64,
    /// Bound on the sum of all errors of `masses` and of tilted mass outside the window.
    slack: f64,
    /// Mass at an infinite loss.
    infinity: f64,
}

impl Composition {
    /// The composition of each of `losses` as often as its count says.
    fn new(losses: &[(Loss, u64)], tilt: f64, grid_step: f64, frame: Frame) -> Option<Self> {
        let cumulants: Vec<f64> = losses.iter().map(|(loss, _)| loss.cumulant(tilt, grid_step)).collect();
        let composed = |s: f64| {
            let terms = losses
                .iter()
                .zip(&cumulants)
                .map(|((loss, count), base)| *count as f64 * (loss.cumulant(tilt + s, grid_step) - base));
            terms.sum::<f64>()
        };
        // The window, by the discrete loss's own Chernoff bounds.
        let outside = -OUTSIDE.ln();
        let low = -(composed(-frame.low_tilt) + outside) / frame.low_tilt;
        let high = (composed(frame.high_tilt) + outside) / frame.high_tilt;
        let first = (low / grid_step).floor();
        let points = (high / grid_step).ceil() - first + 2.0;
        if !(points <= 4.0 * MAX_WINDOW && first.abs() < 9e15) {
            return None;
        }
        let first = first as i64;
        let size = transform_size(points as usize);

        let mut planner = RealFftPlanner::<f64>::new();
        let forward: Arc<dyn RealToComplex<f64>> = planner.plan_fft_forward(size);
        let mut spectrum = vec![Complex::new(1.0, 0.0); size / 2 + 1];
        let mut buffer = vec![0f64; size];
        let mut one = forward.make_output_vec();
        let mut origin = 0i64;
        let (mut total, mut ln_scale, mut ln_finite) = (0f64, 0f64, 0f64);
        for ((loss, count), cumulant) in losses.iter().zip(&cumulants) {
            let count = *count;
            buffer.fill(0.0);
            let tilted = |(i, mass): (i64, f64)| (mass.ln() + tilt * i as f64 * grid_step - cumulant).exp();
            // Centred, so that phases stay small when they are multiplied by the count.
            let mean: f64 = loss.points().map(|point| point.0 as f64 * tilted(point)).sum();
            let centre = mean.round() as i64;
            for point in loss.points() {
                let slot = (point.0 - centre).rem_euclid(size as i64) as usize;
                if let Some(slot) = buffer.get_mut(slot) {
                    *slot += tilted(point);
                }
            }
            forward.process(&mut buffer, &mut one).ok()?;
            for (product, value) in spectrum.iter_mut().zip(&one) {
                *product *= power(*value, count);
            }
            origin = origin.checked_add(centre.checked_mul(i64::try_from(count).ok()?)?)?;
            total += count as f64;
            ln_scale += count as f64 * cumulant;
            ln_finite += count as f64 * (-loss.infinity).ln_1p();
        }
        let energy: f64 = 2.0 * spectrum.iter().map(Complex::norm_sqr).sum::<f64>();
        if let Some(constant) = spectrum.first_mut() {
            constant.im = 0.0;
        }
        if let (true, Some(last)) = (size.is_multiple_of(2), spectrum.last_mut()) {
            last.im = 0.0;
        }
        planner.plan_fft_inverse(size).process(&mut spectrum, &mut buffer).ok()?;
        let norm = 1.0 / size as f64;
        let rotation = (first - origin).rem_euclid(size as i64) as usize;
        buffer.rotate_left(rotation);
        buffer.iter_mut().for_each(|mass| *mass = (*mass * norm).max(0.0));

        let slack = 2.0 * OUTSIDE + transform_error(total, size as f64) * energy.sqrt();
        let ln_scale = ln_scale + 16.0 * ROUNDING * (total + ln_scale.abs());
        Some(Self {
            tilt,
            grid_step,
            first,
            masses: buffer,
            ln_scale,
            slack,
            infinity: -(ln_finite.exp_m1()),
        })
    }

    fn loss_at(&self, slot: usize) -> f64 {
        (self.first + slot as i64) as f64 * self.grid_step
    }

    /// Goes down the window with an upper bound on ln of the finite part of delta at each point, until `stop` says so.
    ///
    /// δ(ε) = Σ over losses above ε of mass·(1 − e^(ε − loss)). From one point to the next below, with W the sum of
    /// mass·e^(ε − loss): δ ← δ + (1 − e^−h)(W + mass), W ← e^−h (W + mass). No term is negative.
    fn scan(&self, mut stop: impl FnMut(usize, f64) -> bool) {
        let fall = (-self.grid_step).exp();
        let gain = -(-self.grid_step).exp_m1();
        let rescale = (-self.tilt * self.grid_step).exp();
        let (mut delta, mut weight) = (0f64, 0f64);
        for (slot, mass) in self.masses.iter().copied().enumerate().rev() {
            // Before `mass` is added: the losses above this point.
            let ln = (delta + self.slack).ln() + self.ln_scale - self.tilt * self.loss_at(slot);
            if stop(slot, ln) {
                return;
            }
            delta = rescale * (delta + gain * (weight + mass));
            weight = rescale * fall * (weight + mass);
        }
    }

    /// The smallest epsilon at `delta`, and how steep delta is there.
    fn epsilon(&self, delta: f64) -> Aim {
        if delta <= self.infinity {
            return Aim { epsilon: f64::INFINITY, slope: 1.0 };
        }
        let target = (delta - self.infinity).ln();
        // Should the window begin above the answer, its first point is a bound.
        let mut found = Aim { epsilon: self.loss_at(0).max(0.0), slope: self.tilt.max(1.0) };
        let mut above: Option<f64> = None;
        self.scan(|slot, ln| {
            let loss = self.loss_at(slot);
            match above {
                _ if ln <= target => {
                    above = Some(ln);
                    if loss < 0.0 {
                        found.epsilon = 0.0;
                    }
                    loss < 0.0
                }
                Some(above) => {
                    // δ is convex in e^ε, and for the discrete loss linear between points.
                    let part = (target - ln).exp_m1() / (above - ln).exp_m1();
                    let step = (part.clamp(0.0, 1.0) * self.grid_step.exp_m1()).ln_1p();
                    let slope = ((ln - above) / self.grid_step).max(1e-3);
                    found = Aim { epsilon: (loss + step).max(0.0), slope };
                    true
                }
                // Even the highest point has a larger delta.
                None => {
                    found.epsilon = f64::INFINITY;
                    true
                }
            }
        });
        // A few roundings of the loss itself.
        Aim { epsilon: found.epsilon * (1.0 + 1e-14), slope: found.slope }
    }

    /// The smallest delta at `epsilon`.
    fn delta(&self, epsilon: f64) -> f64 {
        let mut above = (f64::INFINITY, 0f64);
        let mut found = None;
        self.scan(|slot, ln| {
            let (loss, value) = (self.loss_at(slot), ln.exp());
            if loss <= epsilon {
                found = Some(if above.0.is_finite() {
                    line((loss.exp_m1(), value), (above.0.exp_m1(), above.1), epsilon.exp_m1())
                } else {
                    value
                });
                return true;
            }
            above = (loss, value);
            false
        });
        (found.unwrap_or(1.0) + self.infinity).min(1.0)
    }

    /// The discrete pair's trade-off curve: likelihood-ratio tests at each point of the grid.
    fn trade_off(&self) -> TradeOff {
        let mut points = vec![(0.0, (1.0 - self.infinity - self.slack).max(0.0))];
        let (mut alarms, mut hits) = (0f64, self.infinity + self.slack);
        for (slot, mass) in self.masses.iter().copied().enumerate().rev() {
            let loss = self.loss_at(slot);
            let mass = mass * (self.ln_scale - self.tilt * loss).exp();
            hits += mass;
            alarms += mass * (-loss).exp();
            if mass > 1e-18 {
                points.push((alarms.min(1.0), (1.0 - hits).max(0.0)));
            }
        }
        points.push((1.0, 0.0));
        TradeOff { points }
    }
}

/// `value` to the `count`; zero where it is below 1e−20.
pub(super) fn power(value: Complex<f64>, count: u64) -> Complex<f64> {
    if count == 1 {
        return value;
    }
    let ln = 0.5 * value.norm_sqr().ln() * count as f64;
    if ln < -46.0 {
        return Complex::new(0.0, 0.0);
    }
    let (sin, cos) = (value.arg() * count as f64).sin_cos();
    let size = ln.exp();
    Complex::new(size * cos, size * sin)
}

/// The smallest of 2^k, 3·2^k and 5·2^k that is at least `points`.
pub(super) fn transform_size(points: usize) -> usize {
    let points = points.max(16);
    let sizes = [1usize, 3, 5].map(|odd| points.div_ceil(odd).next_power_of_two() * odd);
    sizes.into_iter().min().unwrap_or(points)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bound that [`transform_error`] rests on, with room: values of the transform of a step's masses against sums
    /// whose rounding errors are carried along (Neumaier).
    #[test]
    fn the_transform_is_as_accurate_as_claimed() {
        let step = SampledGaussian::new(1e-3, 0.8).unwrap();
        let loss = Cells::new(&step, 2e-4, losses(&step, 11.0)).loss(Direction::Remove);
        let size = 1 << 17;
        let mut planner = RealFftPlanner::<f64>::new();
        let forward = planner.plan_fft_forward(size);
        let mut buffer = vec![0.0; size];
        for (index, mass) in loss.points() {
            buffer[index.rem_euclid(size as i64) as usize] += mass;
        }
        let exact = buffer.clone();
        let mut spectrum = forward.make_output_vec();
        forward.process(&mut buffer, &mut spectrum).unwrap();
        let mut worst = 0f64;
        for bin in [0usize, 1, 2, 5, 17, 99, 1234, 40_000, 65_535] {
            let (mut re, mut im) = (Careful::default(), Careful::default());
            for (at, mass) in exact.iter().enumerate().filter(|(_, mass)| **mass > 0.0) {
                let turn = (at * bin % size) as f64 / size as f64 * std::f64::consts::TAU;
                re.add(mass * turn.cos());
                im.add(-mass * turn.sin());
            }
            worst = worst.max((spectrum[bin].re - re.value()).hypot(spectrum[bin].im - im.value()));
        }
        let claimed = transform_error(1.0, size as f64) / 5.0;
        println!("transform off by {worst:.1e}, claimed {claimed:.1e}");
        assert!(worst < claimed / 3.0);
    }

    /// One step has a closed form in either direction, which the discretisation meets from above.
    #[test]
    fn both_directions_of_one_step_meet_their_closed_forms() {
        for (q, sigma) in [(0.1, 1.0), (0.6, 2.0), (1e-3, 0.7), (1.0, 1.5)] {
            let steps = [(SampledGaussian::new(q, sigma).unwrap(), 1)];
            let plan = Plan::new(&steps, None, 1e-8).unwrap();
            let [removed, added] = plan.compositions().unwrap();
            let cdf = |x: f64| normal::cdf(x / sigma);
            for epsilon in [0.01, 0.05, 0.3, 1.0, 2.0] {
                // Where ln r is ε, and where it is −ε.
                let (above, below) = (steps[0].0.position(epsilon), steps[0].0.position(-epsilon));
                let mixed = |x: f64| (1.0 - q) * cdf(-x) + q * cdf(1.0 - x);
                let remove = mixed(above) - epsilon.exp() * cdf(-above);
                let add = cdf(below) - epsilon.exp() * ((1.0 - q) * cdf(below) + q * cdf(below - 1.0));
                for (found, exact) in [(removed.delta(epsilon), remove), (added.delta(epsilon), add)] {
                    assert!(found >= exact, "{q} {sigma} {epsilon}: {found:e} < {exact:e}");
                    assert!(found <= exact * 1.001 + 1e-11, "{q} {sigma} {epsilon}: {found:e} > {exact:e}");
                }
            }
        }
    }

    #[derive(Default)]
    struct Careful(f64, f64);

    impl Careful {
        fn add(&mut self, value: f64) {
            let sum = self.0 + value;
            self.1 += if self.0.abs() >= value.abs() { self.0 - sum + value } else { value - sum + self.0 };
            self.0 = sum;
        }

        fn value(&self) -> f64 {
            self.0 + self.1
        }
    }
}
