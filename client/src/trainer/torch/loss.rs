//! Softmax cross-entropy of a batch: the loss, its slopes, and what an evaluation counts.

/// Cross-entropy of softmax(`logits`) against `label`, and the class that is most probable: the first of equals.
pub(super) fn cross_entropy(logits: &[f32], label: usize) -> (f64, usize) {
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (class, logit) in logits.iter().enumerate() {
        if *logit > largest || logit.is_nan() {
            (best, largest) = (class, *logit);
        }
    }
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    let own = logits.get(label).copied().unwrap_or(f32::NAN);
    (sum.ln() - f64::from(own - largest), best)
}

/// Writes the slopes of `scale` times the sum of a batch's losses, and returns the sum itself.
///
/// `logits` and `slopes` hold a row of `classes` values per label: softmax less the label's indicator, scaled.
pub(super) fn slopes(
    logits: &[f32],
    labels: &[usize],
    classes: usize,
    scale: f64,
    slopes: &mut [f32],
) -> f64 {
    let rows = logits.chunks_exact(classes.max(1)).zip(slopes.chunks_exact_mut(classes.max(1)));
    let mut total = 0.0;
    for ((logits, slopes), label) in rows.zip(labels) {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for (slope, logit) in slopes.iter_mut().zip(logits) {
            let power = f64::from(logit - largest).exp();
            sum += power;
            *slope = power as f32;
        }
        for (class, slope) in slopes.iter_mut().enumerate() {
            let own = f64::from(u8::from(class == *label));
            *slope = ((f64::from(*slope) / sum - own) * scale) as f32;
        }
        let own = logits.get(*label).copied().unwrap_or(f32::NAN);
        total += sum.ln() - f64::from(own - largest);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_is_that_of_softmax_and_its_slopes_are_its_differences() {
        let logits = [1.0f32, -2.0, 0.5, 3.0, 0.0, -1.0];
        let labels = [2usize, 0];
        let mut found = [0.0; 6];
        let total = slopes(&logits, &labels, 3, 0.5, &mut found);
        let alone = cross_entropy(&logits[..3], 2).0 + cross_entropy(&logits[3..], 0).0;
        assert!((total - alone).abs() < 1e-12);
        let softmax: f64 = [1.0f64, -2.0, 0.5].iter().map(|v| v.exp()).sum();
        assert!((cross_entropy(&logits[..3], 2).0 - (softmax.ln() - 0.5)).abs() < 1e-12);
        for at in 0..6 {
            let moved = |by: f32| {
                let mut logits = logits;
                logits[at] += by;
                slopes(&logits, &labels, 3, 0.5, &mut [0.0; 6])
            };
            let difference = (moved(1e-2) - moved(-1e-2)) / 2e-2 * 0.5;
            assert!((difference - f64::from(found[at])).abs() < 1e-4, "{at}: {difference} {}", found[at]);
        }
    }

    #[test]
    fn the_first_of_equals_is_chosen_and_what_is_no_number_shows() {
        assert_eq!(cross_entropy(&[1.0, 2.0, 2.0], 0).1, 1);
        assert!(cross_entropy(&[1.0, f32::NAN], 0).0.is_nan());
        assert!(slopes(&[f32::INFINITY, 0.0], &[1], 2, 1.0, &mut [0.0; 2]).is_nan());
        assert!(cross_entropy(&[1e30, -1e30], 1).0.is_finite());
    }
}
