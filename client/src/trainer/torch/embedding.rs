//! Embeddings: whole numbers in the data to the rows of a weight.

use std::ops::Range;

use super::linear::{Target, square_norm};
use super::parameters::Parameters;
use super::slots::Slots;

/// One layer between two slots. A value that is no number below the vocabulary yields values that are none either: it
/// shows in the loss, or in the norm.
#[derive(Debug, Clone)]
pub(super) struct Embedding {
    pub(super) input: usize,
    pub(super) output: usize,
    pub(super) weight: Range<usize>,
    pub(super) tokens: usize,
    pub(super) vocabulary: usize,
    pub(super) width: usize,
}

impl Embedding {
    /// The row of the weight that `token` names.
    fn row(&self, token: f32) -> Option<Range<usize>> {
        let id = token as usize;
        // Above 2²⁴ there are whole numbers that f32 does not hold; what it holds is compared exactly.
        (id as f32 == token && id < self.vocabulary).then(|| id * self.width..(id + 1) * self.width)
    }

    pub(super) fn forward(&self, slots: &mut Slots, parameters: &Parameters, examples: usize) {
        let weight = parameters.values.values().get(self.weight.clone()).unwrap_or_default();
        let (tokens, values) = slots.values_pair(self.input, self.output);
        let values = values.chunks_exact_mut(self.width.max(1));
        for (token, into) in tokens.iter().take(examples * self.tokens).zip(values) {
            match self.row(*token).and_then(|row| weight.get(row)) {
                Some(row) => into.copy_from_slice(row),
                None => into.fill(f32::NAN),
            }
        }
    }

    pub(super) fn backward(
        &self,
        slots: &Slots,
        parameters: &mut Parameters,
        target: Target,
        examples: usize,
    ) {
        let into = match target {
            Target::Clipped => return,
            Target::Values => &mut parameters.values,
            Target::Gradient => &mut parameters.gradient,
        };
        let into = into.values_mut().get_mut(self.weight.clone()).unwrap_or_default();
        if target == Target::Gradient {
            into.fill(0.0);
        }
        self.add(slots, 0..examples, 1.0, into);
    }

    /// Adds the slopes of `examples` times `factor` to the rows that their tokens name.
    fn add(&self, slots: &Slots, examples: Range<usize>, factor: f32, into: &mut [f32]) {
        let each = self.tokens * self.width;
        let tokens = slots.value(self.input).values();
        let tokens = tokens.get(examples.start * self.tokens..examples.end * self.tokens).unwrap_or_default();
        let slopes = slots.slope(self.output).values();
        let slopes = slopes.get(examples.start * each..examples.end * each).unwrap_or_default();
        for (token, slopes) in tokens.iter().zip(slopes.chunks_exact(self.width.max(1))) {
            let row = self.row(*token).and_then(|row| into.get_mut(row));
            row.unwrap_or_default().iter_mut().zip(slopes).for_each(|(into, slope)| *into += factor * slope);
        }
    }

    /// Adds to each example's `squares` the squared norm of its gradient: the slopes of equal tokens are added first.
    pub(super) fn add_squares(&self, slots: &Slots, squares: &mut [f64]) {
        let each = (self.tokens * self.width).max(1);
        let slopes = slots.slope(self.output).values().chunks_exact(each);
        let tokens = slots.value(self.input).values().chunks_exact(self.tokens.max(1));
        let (mut order, mut sum) = (Vec::new(), vec![0.0f32; self.width]);
        for (square, (tokens, slopes)) in squares.iter_mut().zip(tokens.zip(slopes)) {
            if tokens.iter().any(|token| self.row(*token).is_none()) {
                *square = f64::NAN;
                continue;
            }
            order.clear();
            order.extend(tokens.iter().zip(slopes.chunks_exact(self.width.max(1))));
            order.sort_by(|a: &(&f32, &[f32]), b| a.0.total_cmp(b.0));
            for equal in order.chunk_by(|a, b| a.0 == b.0) {
                sum.fill(0.0);
                for (_, slopes) in equal {
                    sum.iter_mut().zip(*slopes).for_each(|(sum, slope)| *sum += slope);
                }
                *square += square_norm(&sum);
            }
        }
    }

    /// Adds each example's gradient times its factor to the target; nothing where that is zero.
    pub(super) fn add_clipped(&self, slots: &Slots, parameters: &mut Parameters, factors: &[f32]) {
        let into = parameters.gradient.values_mut().get_mut(self.weight.clone()).unwrap_or_default();
        for (example, factor) in factors.iter().enumerate().filter(|(_, factor)| **factor != 0.0) {
            self.add(slots, example..example + 1, *factor, into);
        }
    }
}
