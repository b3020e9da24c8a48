//! What a client does to its vector before it is masked, and what is done to the unmasked sum.
//!
//! Why the planned sensitivity holds. Rotation keeps every distance, and is done in f64, whose errors are far below the
//! 10⁻⁶ by which vectors are clipped below the clip norm. Cutting each coordinate to ±Q brings no two vectors further
//! apart (it is the projection onto a convex set), so one example changes the cut sum by no more than it changed the sum,
//! and a clipped vector is not made longer. What rounding then does to it is in [`rounding`](super::rounding).

use super::rotation::{padded, rotate, rotate_back};
use super::rounding::{round, round_within};
use super::skellam::Skellam;
use super::{Level, Plan};
use crate::privacy::noise::{NoiseError, SecretRng};

/// How far below the clip norm a vector is clipped, so that errors of arithmetic never take it above.
const MARGIN: f64 = 1e-6;

/// Why a vector cannot be encoded or a sum decoded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// The vector has another length than was planned.
    #[error("a vector of {found} coordinates was given where the plan has {planned}")]
    Length {
        /// Of the vector.
        found: usize,
        /// Planned.
        planned: usize,
    },
    /// The noise cannot be drawn.
    #[error(transparent)]
    Noise(#[from] NoiseError),
    /// No rounding stayed within the sensitivity.
    #[error(
        "no rounding of the vector stays within the planned sensitivity: the plan was not made by this program"
    )]
    Rounding,
}

/// A client's `vector` as integers with its share of noise, [`Plan::padded`] of them, to be reduced modulo 2ᵇ and masked.
///
/// Clips (client level), rotates by the signs of the public `seed`, scales, cuts to the box, rounds, adds a share. A
/// vector with a value that is not finite counts as zero, and is not told apart: only its noise is sent. Give f64 where
/// the vector is a sum over examples, for what f32 rounds away depends on all of them.
///
/// # Errors
/// [`EncodeError`]; never for what the values are.
pub fn encode<T: Copy + Into<f64>>(
    vector: &[T],
    plan: &Plan,
    seed: &[u8; 32],
    rng: &mut SecretRng,
) -> Result<Vec<i64>, EncodeError> {
    let mut encoded = signal(vector, plan, seed, rng)?;
    Skellam::new(plan.share_variance)?.add(rng, &mut encoded);
    Ok(encoded)
}

/// [`encode`] without the noise.
fn signal<T: Copy + Into<f64>>(
    vector: &[T],
    plan: &Plan,
    seed: &[u8; 32],
    rng: &mut SecretRng,
) -> Result<Vec<i64>, EncodeError> {
    let (found, planned) = (vector.len(), plan.requirements.dimension);
    if found != planned || padded(planned) != plan.padded {
        return Err(EncodeError::Length { found, planned });
    }
    let mut values: Vec<f64> = Vec::with_capacity(plan.padded);
    values.extend(vector.iter().map(|value| (*value).into()));
    values.resize(plan.padded, 0.0);
    // Of finite numbers the squares' sum can be infinite; such a vector counts as zero too.
    let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt();
    if !norm.is_finite() {
        values.fill(0.0);
    }
    rotate(&mut values, seed);
    let most = plan.requirements.clip_norm * (1.0 - MARGIN);
    let factor = match plan.requirements.level {
        Level::Client if norm.is_finite() && norm > most => most / norm,
        Level::Client | Level::Example { .. } => 1.0,
    };
    let (scale, bound) = (plan.scale * factor, f64::from(plan.box_bound));
    values.iter_mut().for_each(|value| *value = (*value * scale).clamp(-bound, bound));
    let mut rounded = Vec::new();
    match plan.requirements.level {
        Level::Client => {
            let most = (plan.sensitivity * plan.sensitivity) as u128;
            if !round_within(rng, &values, most, &mut rounded) {
                return Err(EncodeError::Rounding);
            }
        }
        Level::Example { .. } => round(rng, &values, &mut rounded),
    }
    Ok(rounded)
}

/// The sum of the clients' vectors, noise included, from the `sum` of their integers, lifted from the ring to ±2ᵇ⁻¹.
///
/// # Errors
/// [`EncodeError::Length`].
pub fn decode(sum: &[i64], plan: &Plan, seed: &[u8; 32]) -> Result<Vec<f64>, EncodeError> {
    let (found, planned) = (sum.len(), plan.padded);
    if found != planned || padded(plan.requirements.dimension) != planned {
        return Err(EncodeError::Length { found, planned });
    }
    let mut values: Vec<f64> = sum.iter().map(|value| *value as f64 / plan.scale).collect();
    rotate_back(&mut values, seed);
    values.truncate(plan.requirements.dimension);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::super::rounding::square;
    use super::super::{PlanError, Requirements, Scale};
    use super::*;

    const SEED: [u8; 32] = [5; 32];

    fn plan(level: Level, dimension: usize, scale: Scale) -> Result<Plan, PlanError> {
        Plan::new(&Requirements {
            level,
            noise_multiplier: 0.8,
            clip_norm: 2.0,
            dimension,
            fewest_survivors: 3,
            colluders: 1,
            most_clients: 6,
            scale,
        })
    }

    fn random(dimension: usize, norm: f64, rng: &mut SecretRng) -> Vec<f64> {
        let values: Vec<f64> = (0..dimension).map(|_| rng.random_range(-1.0..1.0)).collect();
        let length = values.iter().map(|value| value * value).sum::<f64>().sqrt();
        values.iter().map(|value| value * norm / length).collect()
    }

    /// Client level: whatever the vector and however coarse the grid, what is summed is within the sensitivity.
    #[test]
    fn no_client_is_longer_than_planned() {
        let mut rng = SecretRng::seeded(1);
        for scale in [Scale::Steps(1.0), Scale::Inflation(0.05), Scale::Inflation(0.001)] {
            for dimension in [1, 28, 300, 4500] {
                let plan = plan(Level::Client, dimension, scale).unwrap();
                let most = (plan.sensitivity * plan.sensitivity) as u128;
                for norm in [0.0, 0.1, 2.0, 2.000_000_1, 1e6, 1e200, 1e300] {
                    let mut vector = random(dimension, norm, &mut rng);
                    for _ in 0..60 {
                        let found = signal(&vector, &plan, &SEED, &mut rng).unwrap();
                        assert!(square(&found) <= most && found.len() == plan.padded);
                        assert!(found.iter().all(|q| q.unsigned_abs() <= u64::from(plan.box_bound)));
                    }
                    // All the mass in one coordinate.
                    vector.fill(0.0);
                    vector[dimension / 2] = norm;
                    assert!(square(&signal(&vector, &plan, &SEED, &mut rng).unwrap()) <= most);
                }
            }
        }
    }

    /// Example level, the whole way: the same coins, with and without one example, cut or not.
    #[test]
    fn no_example_changes_more_than_planned() {
        let mut rng = SecretRng::seeded(2);
        let mut cut = 0;
        for (dimension, batch_norm) in [(28, 20.0), (28, 0.5), (1500, 16.0), (4500, 0.3)] {
            let level = Level::Example { batch_norm };
            let plan = plan(level, dimension, Scale::Inflation(0.1)).unwrap();
            let bound = (plan.sensitivity * plan.sensitivity) as u128;
            for coins in 0..300 {
                let others = random(dimension, 30.0, &mut rng);
                let mut example = random(dimension, 2.0 * (1.0 - MARGIN), &mut rng);
                if coins % 3 == 0 {
                    example.fill(0.0);
                    example[dimension - 1] = 2.0 * (1.0 - MARGIN);
                }
                let with: Vec<f64> = others.iter().zip(&example).map(|(a, b)| a + b).collect();
                let a = signal(&others, &plan, &SEED, &mut SecretRng::seeded(coins)).unwrap();
                let b = signal(&with, &plan, &SEED, &mut SecretRng::seeded(coins)).unwrap();
                let difference: Vec<i64> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
                assert!(square(&difference) <= bound, "{dimension} {batch_norm} {coins}");
                let largest = a.iter().chain(&b).map(|q| q.unsigned_abs()).max().unwrap_or(0);
                assert!(largest <= u64::from(plan.box_bound), "{largest}");
                cut += usize::from(a.iter().any(|q| q.unsigned_abs() == u64::from(plan.box_bound)));
            }
        }
        assert!(cut > 100, "the box is part of what is tested");
    }

    /// The sum of six clients decodes to the sum of their vectors, give or take the planned noise.
    #[test]
    fn a_sum_decodes_to_the_sum_of_the_vectors_within_the_noise() {
        let mut rng = SecretRng::seeded(3);
        for level in [Level::Client, Level::Example { batch_norm: 16.0 }] {
            let dimension = 5000;
            let plan = plan(level, dimension, Scale::Inflation(0.01)).unwrap();
            let (mut sum, mut expected) = (vec![0i64; plan.padded], vec![0f64; dimension]);
            let clients = 6;
            for _ in 0..clients {
                let vector: Vec<f32> =
                    random(dimension, 1.9, &mut rng).iter().map(|value| *value as f32).collect();
                let encoded = encode(&vector, &plan, &SEED, &mut rng).unwrap();
                for (sum, value) in sum.iter_mut().zip(&encoded) {
                    // As in the ring, and lifted again.
                    let shift = 64 - plan.width;
                    *sum = sum.wrapping_add(*value) << shift >> shift;
                }
                expected.iter_mut().zip(&vector).for_each(|(sum, value)| *sum += f64::from(*value));
            }
            let decoded = decode(&sum, &plan, &SEED).unwrap();
            assert_eq!(decoded.len(), dimension);
            let squares = decoded.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            // Six shares, and 1/6 to 1/4 of a step of rounding each.
            let noise = f64::from(clients) * plan.share_variance / plan.scale.powi(2);
            let ratio = squares / dimension as f64 / noise;
            let rounding = 0.25 / plan.share_variance;
            assert!(ratio > 0.9 && ratio < 1.1 + rounding, "{ratio}");
            // Another seed's rotation does not come back.
            let other = decode(&sum, &plan, &[6; 32]).unwrap();
            let off: f64 = other.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum();
            assert!(off > squares + 20.0, "{off} {squares}");
        }
    }

    /// What is no number is not told apart from nothing, and nothing is sent as noise.
    #[test]
    fn a_vector_that_is_no_number_counts_as_zero() {
        let mut rng = SecretRng::seeded(4);
        for level in [Level::Client, Level::Example { batch_norm: 4.0 }] {
            let plan = plan(level, 100, Scale::Inflation(0.01)).unwrap();
            for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut vector = vec![0.1f32; 100];
                vector[40] = poison;
                assert!(signal(&vector, &plan, &SEED, &mut rng).unwrap().iter().all(|value| *value == 0));
                assert!(encode(&vector, &plan, &SEED, &mut rng).unwrap().iter().any(|value| *value != 0));
            }
        }
        let plan = plan(Level::Client, 100, Scale::Inflation(0.01)).unwrap();
        assert!(matches!(
            encode(&[0f32; 99], &plan, &SEED, &mut rng),
            Err(EncodeError::Length { found: 99, planned: 100 })
        ));
        assert!(decode(&[0; 100], &plan, &SEED).is_err());
    }
}
