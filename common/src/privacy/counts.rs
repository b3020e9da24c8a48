//! Noised counts: what a node may tell of its own examples.

use super::noise::{DiscreteGaussian, NoiseError, SecretRng};
use crate::record::Metrics;

/// Confusion counts with discrete Gaussian noise of at least `standard_deviation` on each, negative ones raised to
/// zero, and what follows from them; no loss.
///
/// One example more or less changes one count by one: the Euclidean sensitivity is 1. Cells are `classes × classes`
/// whatever was measured, an empty test set included. Noise on integers is exact: no floating point to attack
/// (Canonne, Kamath and Steinke 2020).
///
/// # Errors
/// [`NoiseError`].
pub fn noised(metrics: &Metrics, classes: usize, standard_deviation: f64) -> Result<Metrics, NoiseError> {
    let variance = (standard_deviation * standard_deviation).ceil();
    let noise = DiscreteGaussian::new(variance as u64)?;
    let mut rng = SecretRng::new()?;
    let counts = metrics.confusion.iter().map(|cell| cell.unwrap_or_default()).chain(std::iter::repeat(0));
    let cells = classes.saturating_mul(classes);
    let noised = counts.take(cells).map(|count| {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        u64::try_from(count.saturating_add(noise.sample(&mut rng))).unwrap_or(0)
    });
    let confusion: Vec<u64> = noised.collect();
    Ok(Metrics {
        examples: confusion.iter().sum(),
        loss_sum: 0.0,
        correct: confusion.iter().step_by(classes.saturating_add(1)).sum(),
        confusion: confusion.into_iter().map(Some).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_count_is_noised_and_totals_follow_from_the_noised_counts() {
        let metrics =
            Metrics { examples: 4000, loss_sum: 17.0, correct: 3000, confusion: vec![Some(1000); 4] };
        let (mut sum, mut squares) = (0.0, 0.0);
        for _ in 0..500 {
            let told = noised(&metrics, 2, 20.0).unwrap();
            let cells: Vec<u64> = told.confusion.iter().map(|cell| cell.unwrap()).collect();
            assert_eq!(
                (told.examples, told.correct, told.loss()),
                (cells.iter().sum(), cells[0] + cells[3], None)
            );
            for cell in cells {
                let noise = cell as f64 - 1000.0;
                (sum, squares) = (sum + noise, squares + noise * noise);
            }
        }
        let (mean, deviation) = (sum / 2000.0, (squares / 2000.0f64).sqrt());
        assert!(mean.abs() < 3.0, "{mean}");
        assert!((18.0..22.0).contains(&deviation), "{deviation}");
    }

    /// Correction 2: neither the number of examples nor the absence of any shows in the form.
    #[test]
    fn an_empty_test_set_looks_like_any_other() {
        let told = noised(&Metrics::default(), 3, 50.0).unwrap();
        assert_eq!(told.confusion.len(), 9);
        assert!(told.confusion.iter().all(Option::is_some));
    }
}
