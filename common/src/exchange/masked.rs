//! A masked update: integers modulo 2^b in segments, of which the coordinator only ever sees the sum.

use std::num::NonZeroUsize;

use zeroize::Zeroizing;

use super::support::{RoundSupport, ballot, vote_seed};
use super::{Coins, ExchangeError};
use crate::aggregate::AggregateError;
use crate::compression::residual::{off_support, unsent};
use crate::digest::Digest;
use crate::job::{Job, JobError};
use crate::privacy::distributed::{self, Plan};
use crate::record::Summed;
use crate::secagg::keys::MaskTerm;
use crate::secagg::ring::{Fixed, RingError, RingVector, Weight, Width};
use crate::secagg::sum::{MaskedSum as SegmentSum, of_segment};

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
    pub width: Width,
}

impl Segment {
    fn bytes(&self) -> usize {
        // It fits memory, or the job was refused.
        self.width.packed_bytes(self.length).unwrap_or(usize::MAX)
    }
}

/// How values become integers.
#[derive(Debug, Clone)]
enum Arithmetic {
    /// Fixed point, weighted.
    Fixed {
        fixed: Fixed,
        /// W: the largest weight; every client's, where all weigh the same.
        weight_limit: u32,
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
}

/// A client's integers, segment after segment; masked once [`Integers::mask`] was called.
#[derive(Clone)]
pub struct Integers {
    segments: Vec<RingVector>,
}

/// An encoded update.
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
    ///
    /// # Errors
    /// [`ExchangeError::Ring`].
    pub fn mask(&mut self, terms: &[MaskTerm]) -> Result<(), ExchangeError> {
        for (place, segment) in (0..).zip(&mut self.segments) {
            segment.mask(of_segment(terms, place), NonZeroUsize::MIN)?;
        }
        Ok(())
    }

    /// The bytes that are sent: each segment packed, and padded to a whole byte.
    ///
    /// # Errors
    /// [`ExchangeError::Ring`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, ExchangeError> {
        let mut bytes = Vec::new();
        for segment in &self.segments {
            bytes.extend(segment.pack()?);
        }
        Ok(bytes)
    }
}

/// The sum of masked updates.
#[derive(Clone)]
pub struct MaskedSum {
    segments: Vec<(Segment, SegmentSum)>,
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
    pub votes: Vec<u32>,
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
                let segment = Segment { length: plan.padded, width: Width::new(plan.width)? };
                (Arithmetic::Noised(Box::new(plan)), segment)
            }
            None => {
                let fixed = Fixed::new(masks.value_bits(), masks.coordinate_limit() as f32)?;
                let weight_limit = if job.privacy.is_none() { masks.weight_limit() } else { 1 };
                let width = fixed.width(u64::from(invited))?;
                (Arithmetic::Fixed { fixed, weight_limit }, Segment { length: coordinates, width })
            }
        };
        let mut segments = vec![values];
        if job.privacy.is_none() {
            segments.push(Segment { length: COUNTS_LENGTH, width: Width::new(COUNT_BITS)? });
            if let Some((ballot, bits)) = ballot(job)? {
                segments.push(Segment { length: ballot.cells(), width: Width::new(bits)? });
            }
        }
        for segment in &segments {
            segment.width.packed_bytes(segment.length)?;
        }
        let keeps_residual = job.has_error_feedback();
        Ok(Self { parameters, arithmetic, segments, seed: job.seed, keeps_residual })
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

    /// Encodes a client's update for `round`; what earlier ones left out is added to its values already. `support` says
    /// which coordinates are sent; `None` means all.
    ///
    /// # Errors
    /// [`ExchangeError::Length`], [`ExchangeError::Noise`], or a value that is not finite where nothing is private.
    pub fn encode(
        &self,
        update: &ClientValues<'_>,
        round: u32,
        support: Option<&RoundSupport>,
        coins: &mut Coins,
    ) -> Result<Encoded, ExchangeError> {
        self.check_length(self.parameters, update.values.len())?;
        let gathered = support.map(|support| support.support().gather(update.values)).transpose()?;
        let gathered = gathered.map(Zeroizing::new);
        let sent = gathered.as_ref().map_or(update.values, |values| values.as_slice());
        let mut cut = 0;
        let mut carried = Vec::new();
        let first = self.segments.first().ok_or_else(|| ExchangeError::Bytes("no segment".into()))?;
        let values = match &self.arithmetic {
            Arithmetic::Fixed { fixed, weight_limit } => {
                let parts = update.examples.clamp(1, u64::from(*weight_limit)) as u32;
                let weight = Weight::new(parts, *weight_limit)?;
                let encoded = fixed.encode(first.width, sent, weight, &mut coins.key_stream())?;
                cut = encoded.clipped;
                if self.keeps_residual {
                    let share = f64::from(parts) / f64::from(*weight_limit);
                    carried = fixed.decode(encoded.vector.signed(), share).collect();
                }
                encoded.vector
            }
            Arithmetic::Noised(plan) => {
                let seed = rotation_seed(self.seed, round);
                let integers = distributed::encode(sent, plan, &seed, coins.secret()?)
                    .map_err(|error| ExchangeError::Noise(error.to_string()))?;
                wrapped(first.width, &integers)?
            }
        };
        let residual = self.keeps_residual.then(|| match support {
            Some(support) => off_support(update.values, support.support(), &carried),
            None => unsent(update.values, &carried),
        });
        let mut segments = vec![values];
        for (place, segment) in (0u8..).zip(&self.segments).skip(1) {
            let integers: Vec<i64> = match (place, support.and_then(RoundSupport::ballot)) {
                (COUNTS, _) => self.counts(update),
                (_, Some(ballot)) => {
                    let votes = ballot.cast(update.values, &vote_seed(self.seed, round))?;
                    votes.into_iter().map(i64::from).collect()
                }
                (_, None) => vec![0; segment.length],
            };
            segments.push(RingVector::from_signed(segment.width, &integers)?);
        }
        Ok(Encoded { integers: Integers { segments }, residual, cut })
    }

    fn counts(&self, update: &ClientValues<'_>) -> Vec<i64> {
        let Arithmetic::Fixed { weight_limit, .. } = self.arithmetic else { return vec![0; COUNTS_LENGTH] };
        let examples = update.examples.min(MOST_COUNT);
        let loss = update.loss.filter(|loss| loss.is_finite()).unwrap_or(0.0).max(0.0);
        let millionths = (loss * 1e6 * examples as f64).min(MOST_COUNT as f64);
        vec![update.examples.clamp(1, u64::from(weight_limit)) as i64, examples as i64, millionths as i64]
    }

    /// Refuses bytes that are no update: of another length, or with bits behind a segment's end.
    ///
    /// # Errors
    /// [`ExchangeError::Bytes`], [`ExchangeError::Ring`].
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
        let zeros = |segment: &Segment| (*segment, SegmentSum::new(segment.width, segment.length));
        MaskedSum { segments: self.segments.iter().map(zeros).collect(), updates: 0 }
    }

    /// Opens a sum from which all masks were taken.
    ///
    /// # Errors
    /// [`ExchangeError::Range`] if honest clients cannot have sent what was summed.
    pub fn open(&self, sum: MaskedSum, round: u32) -> Result<Summation, ExchangeError> {
        let MaskedSum { segments, updates } = sum;
        let segment = |place: u8| segments.get(usize::from(place)).map(|(_, sum)| sum);
        let integers: Vec<i64> = segment(VALUES).map(|sum| sum.signed().collect()).unwrap_or_default();
        let mut weight = f64::from(updates);
        let values: Vec<f64> = match &self.arithmetic {
            Arithmetic::Fixed { fixed, .. } => {
                self.check_range(&integers, u64::from(fixed.bound()) * u64::from(updates), updates)?;
                integers.iter().map(|value| *value as f64 / fixed.scale()).collect()
            }
            Arithmetic::Noised(plan) => {
                // The box of each client, and twelve deviations of the noise of all.
                let noise = 12.0 * (f64::from(updates) * plan.share_variance).sqrt();
                let most = u64::from(plan.box_bound) * u64::from(updates) + noise.ceil() as u64;
                self.check_range(&integers, most, updates)?;
                let seed = rotation_seed(self.seed, round);
                distributed::decode(&integers, plan, &seed)
                    .map_err(|error| ExchangeError::Bytes(error.to_string()))?
            }
        };
        let mut summed = None;
        if let (Some(counts), Arithmetic::Fixed { weight_limit, .. }) = (segment(COUNTS), &self.arithmetic) {
            let counts: Vec<u64> = counts.signed().map(|value| value as u64).collect();
            let count = |place: usize| counts.get(place).copied().unwrap_or_default();
            let most = u64::from(*weight_limit).saturating_mul(u64::from(updates));
            let reach = MOST_COUNT.saturating_mul(u64::from(updates));
            if !(u64::from(updates)..=most).contains(&count(0)) || count(1) > reach || count(2) > reach {
                let value = count(0) as i64;
                return Err(ExchangeError::Range { index: 0, value, clients: updates, most });
            }
            weight = count(0) as f64 / f64::from(*weight_limit);
            summed = Some(Summed { weight: count(0), examples: count(1), loss_millionths: count(2) });
        }
        let narrow = |value: i64| u32::try_from(value.unsigned_abs()).unwrap_or(u32::MAX);
        let width = segments.get(usize::from(VOTES)).map(|(segment, _)| segment.width);
        // Votes fill their width: the highest bit is no sign.
        let lift = |value: i64| match width {
            Some(width) if value < 0 => value + (1i64 << width.bits()),
            _ => value,
        };
        let votes = segment(VOTES).map(|sum| sum.signed().map(|value| narrow(lift(value))).collect());
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
        support: Option<&RoundSupport>,
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
                let indices = support.support().indices().iter().zip(&opened.values);
                indices.for_each(|(at, value)| step(*at as usize, *value));
            }
            None => opened.values.iter().enumerate().for_each(|(at, value)| step(at, *value)),
        }
        Ok(next)
    }

    fn check_length(&self, expected: usize, found: usize) -> Result<(), ExchangeError> {
        if expected == found { Ok(()) } else { Err(ExchangeError::Length { expected, found }) }
    }

    /// Refuses a sum that honest clients cannot have sent.
    fn check_range(&self, integers: &[i64], most: u64, clients: u32) -> Result<(), ExchangeError> {
        match integers.iter().enumerate().find(|(_, value)| value.unsigned_abs() > most) {
            Some((index, value)) => Err(ExchangeError::Range { index, value: *value, clients, most }),
            None => Ok(()),
        }
    }
}

impl MaskedSum {
    /// Adds an update, masked or not, that [`Masked::check`] let pass.
    ///
    /// # Errors
    /// [`ExchangeError::Ring`] for one that it would not have; the sum is then of no use.
    pub fn add(&mut self, bytes: &[u8]) -> Result<(), ExchangeError> {
        let mut rest = bytes;
        for (segment, sum) in &mut self.segments {
            let (own, after) = rest.split_at_checked(segment.bytes()).unwrap_or((rest, &[]));
            sum.add_packed(own)?;
            rest = after;
        }
        self.updates += 1;
        Ok(())
    }

    /// Applies masks to the sum, with up to `threads` threads.
    ///
    /// # Errors
    /// [`ExchangeError::Ring`].
    pub fn unmask(&mut self, terms: &[MaskTerm], threads: NonZeroUsize) -> Result<(), ExchangeError> {
        for (place, (_, sum)) in (0..).zip(&mut self.segments) {
            sum.unmask(terms, place, threads)?;
        }
        Ok(())
    }
}

/// Integers reduced modulo 2^b: noise may take one out of the width, rarely.
fn wrapped(width: Width, integers: &[i64]) -> Result<RingVector, RingError> {
    let above = 64 - width.bits();
    // The one value that has no opposite stands for the next to it.
    let wrap = |value: &i64| (value << above >> above).max(-width.largest());
    RingVector::from_signed(width, &integers.iter().map(wrap).collect::<Vec<i64>>())
}

/// The public seed of a round's rotation.
fn rotation_seed(seed: u64, round: u32) -> [u8; 32] {
    let mut bytes = b"tributary rotation v1".to_vec();
    bytes.extend(seed.to_le_bytes());
    bytes.extend(round.to_le_bytes());
    Digest::of(&bytes).0
}
