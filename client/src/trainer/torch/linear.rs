//! Fully connected layers: `y = x·Wᵀ + b`.

use std::ops::Range;

use tch::TchError;

use super::memory::{Memory, Product, transposed};
use super::parameters::Parameters;
use super::slots::Slots;

/// A weight larger than this is worked off in blocks of rows: a block stays in a core's cache while the products
/// that need it run, and MKL's thin products are several times faster on it.
const BLOCK_BYTES: usize = 768 << 10;

/// Where a step's gradient goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// Added to the values at once: the slopes of the loss were scaled by the negative learning rate.
    Values,
    /// Into the gradient, for an update rule that needs more than it.
    Gradient,
    /// Onto the gradient, example by example times a factor that depends on the norm of the example's own gradient.
    Clipped,
}

impl Target {
    /// The block that a step writes to.
    pub(super) fn of(self, parameters: &Parameters) -> &Memory {
        match self {
            Target::Values => &parameters.values,
            Target::Gradient | Target::Clipped => &parameters.gradient,
        }
    }

    /// The product `left · right` into, or onto, the target's matrix `out`.
    pub(super) fn product(self, out: tch::Tensor, left: tch::Tensor, right: tch::Tensor) -> Product {
        match self {
            Target::Values | Target::Clipped => Product::add(out, left, right),
            Target::Gradient => Product::set(out, left, right),
        }
    }

    /// The sums over the rows of `slopes`, `range.len()` wide, into or onto the target's `range`.
    pub(super) fn column_sums(self, parameters: &mut Parameters, range: &Range<usize>, slopes: &[f32]) {
        let block = match self {
            Target::Values => &mut parameters.values,
            Target::Gradient | Target::Clipped => &mut parameters.gradient,
        };
        let Some(sums) = block.values_mut().get_mut(range.clone()) else { return };
        if self == Target::Gradient {
            sums.fill(0.0);
        }
        for row in slopes.chunks_exact(range.len().max(1)) {
            for (sum, slope) in sums.iter_mut().zip(row) {
                *sum += slope;
            }
        }
    }
}

/// One layer between two slots.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    pub(super) input: usize,
    pub(super) output: usize,
    pub(super) weight: Range<usize>,
    pub(super) bias: Range<usize>,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

/// A layer's products for one batch size.
pub(super) struct Bound {
    rows: usize,
    forward: Vec<Product>,
    /// In their order: a block's input slopes need its weight as it was, so they come before its change.
    backward: Vec<Product>,
    /// The changes of the weight, where they come after all slopes are known: [`Target::Clipped`].
    clipped: Vec<Product>,
}

impl Linear {
    /// Binds the layer to `rows` examples.
    pub(super) fn bind(
        &self,
        slots: &Slots,
        parameters: &Parameters,
        rows: usize,
        target: Option<Target>,
        input_slopes: bool,
    ) -> Result<Bound, TchError> {
        let (inputs, outputs) = (self.inputs, self.outputs);
        let (x, y) = (slots.value(self.input), slots.value(self.output));
        let block = if inputs * outputs * 4 > BLOCK_BYTES {
            (BLOCK_BYTES / (inputs * 4)).clamp(1, outputs)
        } else {
            outputs
        };
        let (mut forward, mut backward, mut clipped) = (Vec::new(), Vec::new(), Vec::new());
        for first in (0..outputs).step_by(block) {
            let width = block.min(outputs - first);
            let at = self.weight.start + first * inputs;
            let all = || x.matrix(0, rows, inputs, inputs);
            let weight = parameters.values.matrix(at, width, inputs, inputs)?;
            let out = y.matrix(first, rows, width, outputs)?;
            forward.push(Product::add(out, all()?, transposed(&weight)?));
            let Some(target) = target else { continue };
            let slopes = slots.slope(self.output).matrix(first, rows, width, outputs)?;
            if input_slopes {
                let into = slots.slope(self.input).matrix(0, rows, inputs, inputs)?;
                let product = if first == 0 { Product::set } else { Product::add };
                backward.push(product(into, slopes.shallow_clone(), weight));
            }
            let change = target.of(parameters).matrix(at, width, inputs, inputs)?;
            let change = target.product(change, transposed(&slopes)?, all()?);
            if target == Target::Clipped { &mut clipped } else { &mut backward }.push(change);
        }
        Ok(Bound { rows, forward, backward, clipped })
    }

    pub(super) fn forward(
        &self,
        bound: &mut Bound,
        slots: &mut Slots,
        parameters: &Parameters,
    ) -> Result<(), TchError> {
        let bias = parameters.values.values().get(self.bias.clone()).unwrap_or_default();
        let rows = slots.value_mut(self.output).chunks_exact_mut(self.outputs.max(1));
        rows.take(bound.rows).for_each(|row| row.copy_from_slice(bias));
        bound.forward.iter_mut().try_for_each(Product::run)
    }

    pub(super) fn backward(
        &self,
        bound: &mut Bound,
        slots: &Slots,
        parameters: &mut Parameters,
        target: Target,
    ) -> Result<(), TchError> {
        if target != Target::Clipped {
            self.sum_bias(bound, slots, parameters, target);
        }
        bound.backward.iter_mut().try_for_each(Product::run)
    }

    fn sum_bias(&self, bound: &Bound, slots: &Slots, parameters: &mut Parameters, target: Target) {
        let slopes = slots.slope(self.output).values();
        let slopes = slopes.get(..bound.rows * self.outputs).unwrap_or_default();
        target.column_sums(parameters, &self.bias, slopes);
    }

    /// Adds to each example's `squares` the squared norm of its gradient: with slopes g and input a, that of the outer
    /// product and of g itself, ‖g‖²·(‖a‖² + 1).
    pub(super) fn add_squares(&self, slots: &Slots, squares: &mut [f64]) {
        let slopes = slots.slope(self.output).values().chunks_exact(self.outputs.max(1));
        let inputs = slots.value(self.input).values().chunks_exact(self.inputs.max(1));
        for (square, (slopes, input)) in squares.iter_mut().zip(slopes.zip(inputs)) {
            *square += square_norm(slopes) * (square_norm(input) + 1.0);
        }
    }

    /// Adds each example's gradient times its factor to the target.
    pub(super) fn add_clipped(
        &self,
        bound: &mut Bound,
        slots: &mut Slots,
        parameters: &mut Parameters,
        factors: &[f32],
    ) -> Result<(), TchError> {
        slots.scale((self.input, self.inputs), (self.output, self.outputs), factors);
        self.sum_bias(bound, slots, parameters, Target::Clipped);
        bound.clipped.iter_mut().try_for_each(Product::run)
    }
}

/// The squared Euclidean norm, in double precision.
pub(super) fn square_norm(values: &[f32]) -> f64 {
    // Sums side by side: the compiler makes vector instructions of them.
    let (blocks, rest) = values.as_chunks::<16>();
    let mut sums = [0.0f64; 16];
    for block in blocks {
        for (sum, value) in sums.iter_mut().zip(block) {
            let value = f64::from(*value);
            *sum += value * value;
        }
    }
    let rest: f64 = rest.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
    sums.iter().sum::<f64>() + rest
}
