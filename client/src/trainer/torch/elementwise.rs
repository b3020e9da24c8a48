//! Layers that change each value in its place, and the ways between slots.

use rand::{Rng, RngExt};

use super::convolution::Image;
use super::slots::Slots;

/// `max(x, 0)`; what is not a number stays so, and divergence shows in the loss.
pub(super) fn relu(values: &mut [f32]) {
    values.iter_mut().for_each(|value| *value = if *value <= 0.0 { 0.0 } else { *value });
}

/// Slopes pass where the value did.
pub(super) fn relu_slopes(values: &[f32], slopes: &mut [f32]) {
    slopes.iter_mut().zip(values).for_each(|(slope, value)| *slope = if *value > 0.0 { *slope } else { 0.0 });
}

/// Hyperbolic tangent.
pub(super) fn tanh(values: &mut [f32]) {
    values.iter_mut().for_each(|value| *value = value.tanh());
}

/// The slope of tanh is 1 − tanh².
pub(super) fn tanh_slopes(values: &[f32], slopes: &mut [f32]) {
    slopes.iter_mut().zip(values).for_each(|(slope, value)| *slope *= 1.0 - value * value);
}

/// Inverted dropout (Srivastava et al. 2014): each value is dropped with `probability`, what stays is scaled.
/// The draws are the source's next ones, one per value, in the order in which the values lie.
pub(super) fn dropout(values: &mut [f32], probability: f64, stream: &mut dyn Rng, factors: &mut Vec<f32>) {
    let kept = (1.0 / (1.0 - probability)) as f32;
    factors.clear();
    factors
        .extend(values.iter().map(|_| if stream.random::<f32>() < probability as f32 { 0.0 } else { kept }));
    scale(values, factors);
}

/// Multiplies each value by its factor.
pub(super) fn scale(values: &mut [f32], factors: &[f32]) {
    values.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
}

/// From height, width, channel to PyTorch's flat order: channel, height, width.
pub(super) fn flatten(slots: &mut Slots, (from, into): (usize, usize), image: Image, examples: usize) {
    let (values, flat) = slots.values_pair(from, into);
    let images = values.chunks_exact(image.values()).zip(flat.chunks_exact_mut(image.values()));
    images.take(examples).for_each(|(image_values, flat)| transpose(image_values, flat, image.channels));
}

/// The slopes of [`flatten`], on their way back.
pub(super) fn flatten_slopes(slots: &mut Slots, (from, into): (usize, usize), image: Image, examples: usize) {
    let (flat, slopes) = slots.slopes_pair(into, from);
    let images = flat.chunks_exact(image.values()).zip(slopes.chunks_exact_mut(image.values()));
    images.take(examples).for_each(|(flat, slopes)| transpose(flat, slopes, image.height * image.width));
}

/// Writes the transpose of a matrix with rows of `columns` values.
pub(super) fn transpose(from: &[f32], into: &mut [f32], columns: usize) {
    let rows = from.len() / columns.max(1);
    for (row, values) in from.chunks_exact(columns.max(1)).enumerate() {
        for (column, value) in values.iter().enumerate() {
            into[column * rows + row] = *value;
        }
    }
}
