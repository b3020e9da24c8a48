//! GroupNorm (Wu and He 2018) over images that lie as height, width, channel.

use std::ops::Range;

use super::convolution::Image;
use super::linear::Target;
use super::parameters::Parameters;
use super::slots::Slots;

/// ε, PyTorch's default.
const EPSILON: f64 = 1e-5;

/// One layer between two slots.
#[derive(Debug, Clone)]
pub(super) struct GroupNorm {
    pub(super) input: usize,
    pub(super) output: usize,
    pub(super) weight: Range<usize>,
    pub(super) bias: Range<usize>,
    pub(super) image: Image,
    pub(super) groups: usize,
}

/// What the way back needs from the way forward, and rows of memory that are kept between calls.
#[derive(Debug, Default)]
pub(super) struct Moments {
    /// Example by example: the mean of each channel's group, then 1/√(variance + ε).
    rows: Vec<f32>,
    sums: Vec<f64>,
    own: Vec<f32>,
    /// Example by example the gradients of weight and bias, for [`Target::Clipped`].
    each: Vec<f64>,
}

impl GroupNorm {
    fn channels_per_group(&self) -> usize {
        (self.image.channels / self.groups.max(1)).max(1)
    }

    pub(super) fn forward(
        &self,
        moments: &mut Moments,
        slots: &mut Slots,
        parameters: &Parameters,
        examples: usize,
    ) {
        let (channels, each) = (self.image.channels, self.image.values());
        let all = parameters.values.values();
        let (weight, bias) = (&all[self.weight.clone()], &all[self.bias.clone()]);
        let (values, normal) = slots.values_pair(self.input, self.output);
        let Moments { rows, sums, own, .. } = moments;
        rows.resize(examples * 2 * channels, 0.0);
        let images = values.chunks_exact(each).zip(normal.chunks_exact_mut(each));
        for ((image, normal), row) in images.zip(rows.chunks_exact_mut(2 * channels)) {
            let (means, scales) = row.split_at_mut(channels);
            sums.clear();
            sums.resize(channels, 0.0);
            for pixel in image.chunks_exact(channels) {
                sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += f64::from(*value));
            }
            self.spread(sums, means, |mean| mean);
            sums.fill(0.0);
            for pixel in image.chunks_exact(channels) {
                for ((sum, value), mean) in sums.iter_mut().zip(pixel).zip(&*means) {
                    let difference = value - mean;
                    *sum += f64::from(difference * difference);
                }
            }
            self.spread(sums, scales, |variance| 1.0 / (variance + EPSILON).sqrt());
            own.clear();
            own.extend(scales.iter().zip(weight).map(|(scale, weight)| scale * weight));
            for (pixel, normal) in image.chunks_exact(channels).zip(normal.chunks_exact_mut(channels)) {
                let factors = means.iter().zip(&*own).zip(bias);
                for ((value, normal), ((mean, factor), bias)) in pixel.iter().zip(normal).zip(factors) {
                    *normal = (value - mean) * factor + bias;
                }
            }
        }
    }

    /// With x̂ = (x − mean)·scale and g = slope·weight over the m values of a group:
    /// dx = scale·(g − Σg/m − x̂·Σ(g·x̂)/m).
    pub(super) fn backward(
        &self,
        moments: &mut Moments,
        slots: &mut Slots,
        parameters: &mut Parameters,
        target: Target,
        examples: usize,
    ) {
        let (channels, each) = (self.image.channels, self.image.values());
        let weight = parameters.values.values()[self.weight.clone()].to_vec();
        let Moments { rows, sums, own, each: of_each } = moments;
        of_each.clear();
        // Slopes of weight and bias, as one row each.
        own.clear();
        own.resize(2 * channels, 0.0);
        let mut pulls = vec![0.0f32; 2 * channels];
        let values = slots.value(self.input).values().to_vec();
        let (slopes, into) = slots.slopes_pair(self.output, self.input);
        let images =
            values.chunks_exact(each).zip(slopes.chunks_exact(each)).zip(into.chunks_exact_mut(each));
        for (((image, slopes), into), row) in images.take(examples).zip(rows.chunks_exact(2 * channels)) {
            let (means, scales) = row.split_at(channels);
            sums.clear();
            sums.resize(2 * channels, 0.0);
            let (along, plain) = sums.split_at_mut(channels);
            for (pixel, slopes) in image.chunks_exact(channels).zip(slopes.chunks_exact(channels)) {
                let of = pixel.iter().zip(slopes).zip(means.iter().zip(scales));
                for ((along, plain), ((value, slope), (mean, scale))) in
                    along.iter_mut().zip(&mut *plain).zip(of)
                {
                    *along += f64::from(slope * ((value - mean) * scale));
                    *plain += f64::from(*slope);
                }
            }
            if target == Target::Clipped {
                of_each.extend_from_slice(sums);
            } else {
                own.iter_mut().zip(&*sums).for_each(|(own, sum)| *own += *sum as f32);
            }
            for half in sums.chunks_exact_mut(channels) {
                half.iter_mut().zip(&weight).for_each(|(sum, weight)| *sum *= f64::from(*weight));
            }
            let (along, plain) = pulls.split_at_mut(channels);
            self.spread(&sums[..channels], along, |mean| mean);
            self.spread(&sums[channels..], plain, |mean| mean);
            let rows = image.chunks_exact(channels).zip(slopes.chunks_exact(channels));
            for ((pixel, slopes), into) in rows.zip(into.chunks_exact_mut(channels)) {
                let of = means.iter().zip(scales).zip(weight.iter().zip(along.iter().zip(&*plain)));
                let given = pixel.iter().zip(slopes).zip(of);
                for (into, ((value, slope), ((mean, scale), (weight, (along, plain))))) in
                    into.iter_mut().zip(given)
                {
                    *into = scale * (slope * weight - plain - (value - mean) * scale * along);
                }
            }
        }
        if target != Target::Clipped {
            let (weights, biases) = own.split_at(channels);
            target.column_sums(parameters, &self.weight, weights);
            target.column_sums(parameters, &self.bias, biases);
        }
    }

    /// Adds to each example's `squares` the squared norm of its gradient.
    pub(super) fn add_squares(&self, moments: &Moments, squares: &mut [f64]) {
        let rows = moments.each.chunks_exact(2 * self.image.channels.max(1));
        for (square, row) in squares.iter_mut().zip(rows) {
            *square += row.iter().map(|slope| slope * slope).sum::<f64>();
        }
    }

    /// Adds each example's gradient times its factor to the target; nothing where that is zero.
    pub(super) fn add_clipped(&self, moments: &mut Moments, parameters: &mut Parameters, factors: &[f32]) {
        let channels = self.image.channels;
        let Moments { sums, each, .. } = moments;
        sums.clear();
        sums.resize(2 * channels, 0.0);
        for (factor, row) in factors.iter().zip(each.chunks_exact(2 * channels.max(1))) {
            if *factor != 0.0 {
                let factor = f64::from(*factor);
                sums.iter_mut().zip(row).for_each(|(sum, slope)| *sum += factor * slope);
            }
        }
        let (weights, biases) = sums.split_at(channels);
        let gradient = parameters.gradient.values_mut();
        for (range, sums) in [(&self.weight, weights), (&self.bias, biases)] {
            let into = gradient.get_mut(range.clone()).unwrap_or_default();
            into.iter_mut().zip(sums).for_each(|(into, sum)| *into += *sum as f32);
        }
    }

    /// Adds up the channels' sums over each group, divides by its values, and gives every channel what `of` makes of
    /// its group's mean.
    fn spread(&self, sums: &[f64], into: &mut [f32], of: impl Fn(f64) -> f64) {
        let each = self.channels_per_group();
        let values = (self.image.height * self.image.width * each) as f64;
        for (sums, into) in sums.chunks(each).zip(into.chunks_mut(each)) {
            into.fill(of(sums.iter().sum::<f64>() / values) as f32);
        }
    }
}
