//! A masked update: integers modulo 2^b in segments, of which the coordinator only ever sees the sum.

use rand::RngExt as _;

use super::ExchangeError;
use super::lanes::Lanes;
use crate::aggregate::AggregateError;
use crate::digest::Digest;
use crate::job::{Job, JobError};
use crate::privacy::distributed::{self, Plan};
use crate::privacy::noise::SecretRng;
use crate::record::Summed;
use crate::rng::Stream;
use crate::secagg::keys::MaskTerm;

/// Place of the update's values among the segments.
const VALUES: u8 = 0;
/// Weight, examples and loss of the client, without `[privacy]`.
const COUNTS: u8 = 1;
/// Votes for the next round's support.
const VOTES: u8 = 2;
/// Integers of the counts.
const COUNTS_LENGTH: usize = 3;
/// Bits of a count: whatever clients may send, 4096 of them fit.
const COUNT_BITS: u32 = 64;
/// Largest number of examples, and of millionths of loss, that a client adds.
const MOST_COUNT: u64 = 1 << 50;

/// A part of an update: integers of one width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// How many integers.
    pub length: usize,
    /// Bits b of each: sums are taken modulo 2^b.
    pub width: u32,
}

impl Segment {
    fn bytes(&self) -> usize {
        Lanes::packed_bytes(self.width, self.length)
    }
}

/// How values become integers.
#[derive(Debug, Clone)]
enum Arithmetic {
    /// Fixed point: a value x of a client of weight w is ⌊x·w/W·s + u⌋, with s·limit = Q = 2^(v−1) − 1.
    Fixed {
        /// Largest magnitude of a value.
        limit: f64,
        /// Q.
        most: i64,
        /// W: the largest weight; every client's, where all weigh the same.
        weight_limit: u64,
    },
    /// On the grid of a noise share.
    Noised(Box<Plan>),
}

/// How a job's masked updates travel.
#[derive(Debug, Clone)]
pub struct Masked {
    parameters: usize,
    arithmetic: Arithmetic,
    segments: Vec<Segment>,
    /// Votes of one client, 0 without them.
    votes: usize,
    seed: u64,
    keeps_residual: bool,
}

/// What a client has to send.
#[derive(Debug, Clone, Copy)]
pub struct ClientValues<'a> {
    /// The change of the model, or with [`Job::sums_gradients`] the sum of clipped gradients: all parameters.
    pub values: &'a [f32],
    /// Training examples; used without `[privacy]` alone.
    pub examples: u64,
    /// Mean training loss; used without `[privacy]` alone.
    pub loss: Option<f64>,
    /// What earlier updates left out, all parameters; `None` where nothing is kept.
    pub residual: Option<&'a [f32]>,
}

/// Where the coins of rounding, and noise, come from.
#[derive(Debug)]
pub enum Coins {
    /// A named stream: without `[privacy]`, so that a masked sum is the unmasked one to the last bit.
    Public(Stream),
    /// Secret bits: with `[privacy]`.
    Secret(SecretRng),
}

impl Coins {
    fn uniform(&mut self) -> f64 {
        let bits = match self {
            Coins::Public(stream) => stream.random::<u32>(),
            Coins::Secret(rng) => rng.random::<u32>(),
        };
        f64::from(bits >> 8) / f64::from(1 << 24)
    }
}

/// A client's integers, segment after segment; masked once [`Integers::mask`] was called.
#[derive(Debug, Clone)]
pub struct Integers {
    segments: Vec<Lanes>,
}

/// An encoded update.
#[derive(Debug)]
pub struct Encoded {
    /// What is to be masked and sent.
    pub integers: Integers,
    /// What it leaves out, all parameters; `None` where nothing is kept.
    pub residual: Option<Vec<f32>>,
    /// Values that were cut to the coordinate limit.
    pub cut: usize,
}

impl Integers {
    /// Adds the masks.
    pub fn mask(&mut self, terms: &[MaskTerm]) {
        for term in terms {
            if let Some(segment) = self.segments.get_mut(usize::from(term.segment)) {
                segment.apply(&term.key, term.sign);
            }
        }
    }

    /// The bytes that are sent: each segment packed, and padded to a whole byte.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.segments.iter().for_each(|segment| segment.pack(&mut bytes));
        bytes
    }
}

/// The sum of masked updates.
#[derive(Debug, Clone)]
pub struct MaskedSum {
    segments: Vec<Lanes>,
    updates: u32,
}

/// An opened sum.
#[derive(Debug, Clone)]
pub struct Summation {
    /// Σ of the values that were sent, weighted where clients weigh differently, per coordinate of the support.
    pub values: Vec<f64>,
    /// Σ of the weights, as shares of the largest.
    pub weight: f64,
    /// Clients in the sum.
    pub updates: u32,
    /// What came with it.
    pub summed: Option<Summed>,
    /// Σ of the votes.
    pub votes: Vec<u64>,
}

impl Masked {
    /// How the masked updates of `job` travel.
    ///
    /// # Errors
    /// [`ExchangeError::Job`]: no masks are asked for, or sums do not fit 64 bits.
    pub fn of(job: &Job) -> Result<Self, ExchangeError> {
        let invalid = |message: String| ExchangeError::Job(JobError::Invalid(message));
        let masks = job
            .secure_aggregation
            .as_ref()
            .ok_or_else(|| invalid("the job has no [secure_aggregation]".into()))?;
        let (parameters, coordinates) = (job.layout()?.parameters(), job.masked_coordinates()?);
        let invited = job.invited();
        let (arithmetic, values) = match job.noise_plan()? {
            Some(plan) => {
                let segment = Segment { length: plan.padded, width: plan.width };
                (Arithmetic::Noised(Box::new(plan)), segment)
            }
            None => {
                let most = (1i64 << (masks.value_bits() - 1)) - 1;
                let width = width(most as u64, invited)
                    .ok_or_else(|| invalid("[secure_aggregation] sums need more than 64 bits".into()))?;
                let weight_limit = if job.privacy.is_none() { u64::from(masks.weight_limit()) } else { 1 };
                let fixed = Arithmetic::Fixed { limit: masks.coordinate_limit(), most, weight_limit };
                (fixed, Segment { length: coordinates, width })
            }
        };
        let mut segments = vec![values];
        let mut votes = 0;
        if job.privacy.is_none() {
            segments.push(Segment { length: COUNTS_LENGTH, width: COUNT_BITS });
            if let Some(cells) = super::support::votes(job)? {
                segments.push(Segment { length: cells.cells, width: cells.width });
                votes = cells.votes;
            }
        }
        let keeps_residual = job.has_error_feedback();
        Ok(Self { parameters, arithmetic, segments, votes, seed: job.seed, keeps_residual })
    }

    /// The segments of an update, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// How many there are.
    pub fn segment_count(&self) -> u8 {
        // Three at most.
        self.segments.len() as u8
    }

    /// Bytes of an update: all have as many.
    pub fn update_bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes() as u64).sum()
    }

    /// The noise that each client adds, where it adds any.
    pub fn plan(&self) -> Option<&Plan> {
        match &self.arithmetic {
            Arithmetic::Noised(plan) => Some(plan),
            Arithmetic::Fixed { .. } => None,
        }
    }

    /// Encodes a client's update for `round`. `support` holds the coordinates that are sent, ascending; `None` means all.
    ///
    /// # Errors
    /// [`ExchangeError::Length`], [`ExchangeError::Noise`].
    pub fn encode(
        &self,
        update: &ClientValues<'_>,
        round: u32,
        support: Option<&[u32]>,
        coins: &mut Coins,
    ) -> Result<Encoded, ExchangeError> {
        self.check_length(self.parameters, update.values.len())?;
        if let Some(residual) = update.residual {
            self.check_length(self.parameters, residual.len())?;
        }
        let whole: Vec<f32> = match update.residual {
            Some(residual) => update.values.iter().zip(residual).map(|(value, left)| value + left).collect(),
            None => update.values.to_vec(),
        };
        let sent: Vec<f32> = match support {
            Some(support) => {
                support.iter().map(|at| whole.get(*at as usize).copied().unwrap_or(0.0)).collect()
            }
            None => whole.clone(),
        };
        let mut cut = 0;
        let (integers, back) = match &self.arithmetic {
            Arithmetic::Fixed { limit, most, weight_limit } => {
                let weight = update.examples.clamp(1, *weight_limit) as f64 / *weight_limit as f64;
                let scale = *most as f64 / limit;
                let mut integers = Vec::with_capacity(sent.len());
                let mut back = Vec::with_capacity(sent.len());
                for value in &sent {
                    let value = f64::from(*value);
                    let kept = if value.is_finite() { value.clamp(-limit, *limit) } else { 0.0 };
                    cut += usize::from(kept != value);
                    let integer = (kept * weight * scale + coins.uniform()).floor();
                    let integer = (integer as i64).clamp(-most, *most);
                    integers.push(integer);
                    back.push((integer as f64 / (weight * scale)) as f32);
                }
                (integers, back)
            }
            Arithmetic::Noised(plan) => {
                let Coins::Secret(rng) = coins else {
                    return Err(ExchangeError::Noise("the coins of noised updates are secret".into()));
                };
                let seed = rotation_seed(self.seed, round);
                let integers = distributed::encode(&sent, plan, &seed, rng)
                    .map_err(|error| ExchangeError::Noise(error.to_string()))?;
                (integers, Vec::new())
            }
        };
        let mut residual = None;
        if self.keeps_residual {
            let mut left = whole.clone();
            match support {
                Some(support) => {
                    for (at, back) in support.iter().zip(&back) {
                        if let Some(left) = left.get_mut(*at as usize) {
                            *left -= back;
                        }
                    }
                }
                None => left.iter_mut().zip(&back).for_each(|(left, back)| *left -= back),
            }
            residual = Some(left);
        }
        let mut segments = Vec::with_capacity(self.segments.len());
        for (place, segment) in self.segments.iter().enumerate() {
            let values = match place as u8 {
                VALUES => integers.clone(),
                COUNTS => self.counts(update),
                _ => super::support::ballot(&whole, self.votes, segment.length, self.seed, round),
            };
            segments.push(Lanes::from_signed(segment.width, &values));
        }
        Ok(Encoded { integers: Integers { segments }, residual, cut })
    }

    fn counts(&self, update: &ClientValues<'_>) -> Vec<i64> {
        let Arithmetic::Fixed { weight_limit, .. } = self.arithmetic else { return vec![0; COUNTS_LENGTH] };
        let examples = update.examples.min(MOST_COUNT);
        let loss = update.loss.filter(|loss| loss.is_finite()).unwrap_or(0.0).max(0.0);
        let millionths = (loss * 1e6 * examples as f64).min(MOST_COUNT as f64);
        vec![update.examples.clamp(1, weight_limit) as i64, examples as i64, millionths as i64]
    }

    /// Refuses bytes that are no update.
    ///
    /// # Errors
    /// [`ExchangeError::Bytes`].
    pub fn check(&self, bytes: &[u8]) -> Result<(), ExchangeError> {
        let (found, expected) = (bytes.len() as u64, self.update_bytes());
        if found == expected {
            Ok(())
        } else {
            Err(ExchangeError::Bytes(format!(
                "{found} bytes, but a masked update of this job has {expected}"
            )))
        }
    }

    /// An empty sum.
    pub fn sum(&self) -> MaskedSum {
        let zeros = |segment: &Segment| Lanes::zeros(segment.width, segment.length);
        MaskedSum { segments: self.segments.iter().map(zeros).collect(), updates: 0 }
    }

    /// Opens a sum from which all masks were taken.
    ///
    /// # Errors
    /// [`ExchangeError::Range`] if honest clients cannot have sent what was summed.
    pub fn open(&self, sum: MaskedSum, round: u32) -> Result<Summation, ExchangeError> {
        let MaskedSum { segments, updates } = sum;
        let segment = |place: u8| segments.get(usize::from(place));
        let integers: Vec<i64> = segment(VALUES).map(|lanes| lanes.signed().collect()).unwrap_or_default();
        let (values, mut weight) = match &self.arithmetic {
            Arithmetic::Fixed { limit, most, .. } => {
                let reach = most.saturating_mul(i64::from(updates));
                let out = integers.iter().position(|value| value.unsigned_abs() > reach.unsigned_abs());
                if let Some(index) = out {
                    let value = integers.get(index).copied().unwrap_or_default();
                    return Err(ExchangeError::Range { index, value, clients: updates, most: reach });
                }
                let step = limit / *most as f64;
                (integers.iter().map(|value| *value as f64 * step).collect(), f64::from(updates))
            }
            Arithmetic::Noised(plan) => {
                let seed = rotation_seed(self.seed, round);
                let values = distributed::decode(&integers, plan, &seed)
                    .map_err(|error| ExchangeError::Bytes(error.to_string()))?;
                (values, f64::from(updates))
            }
        };
        let mut summed = None;
        if let (Some(counts), Arithmetic::Fixed { weight_limit, .. }) = (segment(COUNTS), &self.arithmetic) {
            let counts: Vec<u64> = counts.signed().map(|value| value as u64).collect();
            let count = |place: usize| counts.get(place).copied().unwrap_or_default();
            let most = weight_limit.saturating_mul(u64::from(updates));
            let reach = MOST_COUNT.saturating_mul(u64::from(updates));
            if !(u64::from(updates)..=most).contains(&count(0)) || count(1) > reach || count(2) > reach {
                let value = count(0) as i64;
                return Err(ExchangeError::Range { index: 0, value, clients: updates, most: most as i64 });
            }
            weight = count(0) as f64 / *weight_limit as f64;
            summed = Some(Summed { weight: count(0), examples: count(1), loss_millionths: count(2) });
        }
        let votes = segment(VOTES).map(|lanes| lanes.signed().map(|value| value.unsigned_abs()).collect());
        Ok(Summation { values, weight, updates, summed, votes: votes.unwrap_or_default() })
    }

    /// The model after `model`, from an opened sum over `support` (`None`: all coordinates).
    ///
    /// A mean of changes, weighted where clients weigh differently; with noise in shares for examples a step of SGD with
    /// the public batch size as divisor, in proportion to the clients in the sum; for clients the sum by their number.
    ///
    /// # Errors
    /// [`AggregateError`].
    pub fn next_model(
        &self,
        model: &[f32],
        opened: &Summation,
        job: &Job,
        round: u32,
        support: Option<&[u32]>,
    ) -> Result<Vec<f32>, AggregateError> {
        if opened.updates == 0 || opened.weight <= 0.0 {
            return Err(AggregateError::Empty);
        }
        let batch = job.privacy.as_ref().and_then(|privacy| privacy.expected_batch_size);
        let factor = match batch.filter(|_| job.sums_gradients()) {
            Some(batch) => {
                let share = f64::from(opened.updates) / f64::from(job.cohort.size.max(1));
                -job.train.learning_rate(round, job.rounds) / (batch * share)
            }
            None => 1.0 / opened.weight,
        };
        let mut next = model.to_vec();
        let mut step = |at: usize, value: f64| {
            if let Some(parameter) = next.get_mut(at) {
                *parameter = (f64::from(*parameter) + value * factor) as f32;
            }
        };
        match support {
            Some(support) => {
                support.iter().zip(&opened.values).for_each(|(at, value)| step(*at as usize, *value));
            }
            None => opened.values.iter().enumerate().for_each(|(at, value)| step(at, *value)),
        }
        Ok(next)
    }

    fn check_length(&self, expected: usize, found: usize) -> Result<(), ExchangeError> {
        if expected == found { Ok(()) } else { Err(ExchangeError::Length { expected, found }) }
    }
}

impl MaskedSum {
    /// Adds an update, masked or not. Its length was checked with [`Masked::check`].
    pub fn add(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        for segment in &mut self.segments {
            let length = segment.packed_len().min(rest.len());
            let (own, after) = rest.split_at(length);
            segment.add_packed(own);
            rest = after;
        }
        self.updates += 1;
    }

    /// Applies masks to the sum, with up to `threads` threads.
    pub fn unmask(&mut self, terms: &[MaskTerm], threads: usize) {
        let _ = threads;
        for term in terms {
            if let Some(segment) = self.segments.get_mut(usize::from(term.segment)) {
                segment.apply(&term.key, term.sign);
            }
        }
    }
}

/// b = ⌈log₂(2·n·Q + 1)⌉: sums of n integers of at most Q stay within ±2^(b−1) − 1. At most 64.
fn width(most: u64, clients: u32) -> Option<u32> {
    let reach = u128::from(most) * u128::from(clients);
    let bits = (2 * reach + 1).next_power_of_two().trailing_zeros().max(2);
    (bits <= 64).then_some(bits)
}

/// The public seed of a round's rotation.
fn rotation_seed(seed: u64, round: u32) -> [u8; 32] {
    let mut bytes = seed.to_le_bytes().to_vec();
    bytes.extend(round.to_le_bytes());
    bytes.extend(b"tributary rotation v1");
    Digest::of(&bytes).0
}
