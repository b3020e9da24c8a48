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

/// What the way back needs from the way forward.
#[derive(Debug, Default)]
pub(super) struct Moments {
    /// Mean and 1/√(variance + ε), example by example, group by group.
    groups: Vec<(f32, f32)>,
    /// Channel sums, kept between calls.
    sums: Vec<f64>,
}

impl GroupNorm {
    fn channels_per_group(&self) -> usize {
        (self.image.channels / self.groups.max(1)).max(1)
    }

    /// Values over which one mean is taken.
    fn group_values(&self) -> f64 {
        (self.image.height * self.image.width * self.channels_per_group()) as f64
    }

    pub(super) fn forward(
        &self,
        moments: &mut Moments,
        slots: &mut Slots,
        parameters: &Parameters,
        examples: usize,
    ) {
        let channels = self.image.channels;
        let all = parameters.values.values();
        let (weight, bias) = (&all[self.weight.clone()], &all[self.bias.clone()]);
        let (values, normal) = slots.values_pair(self.input, self.output);
        moments.groups.clear();
        let images =
            values.chunks_exact(self.image.values()).zip(normal.chunks_exact_mut(self.image.values()));
        for (image, normal) in images.take(examples) {
            let first = moments.groups.len();
            self.channel_sums(&mut moments.sums, image, |_, value| f64::from(value));
            let means: Vec<f64> = self.per_group(&moments.sums);
            self.channel_sums(&mut moments.sums, image, |channel, value| {
                let mean = means.get(channel / self.channels_per_group()).copied().unwrap_or_default();
                (f64::from(value) - mean).powi(2)
            });
            let variances = self.per_group(&moments.sums);
            let of =
                |(mean, variance): (&f64, &f64)| (*mean as f32, (1.0 / (variance + EPSILON).sqrt()) as f32);
            moments.groups.extend(means.iter().zip(&variances).map(of));
            let groups = &moments.groups[first..];
            for (from, into) in image.chunks_exact(channels).zip(normal.chunks_exact_mut(channels)) {
                for (channel, (value, into)) in from.iter().zip(into).enumerate() {
                    let (mean, scale) = groups[channel / self.channels_per_group()];
                    *into = (value - mean) * scale * weight[channel] + bias[channel];
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
        let per_group = self.channels_per_group();
        let weight = parameters.values.values()[self.weight.clone()].to_vec();
        // Slopes of weight and bias, as one row each.
        let mut own = vec![0.0f32; 2 * channels];
        let values = slots.value(self.input).values()[..examples * each].to_vec();
        let (slopes, into) = slots.slopes_pair(self.output, self.input);
        for example in 0..examples {
            let (x, slope) = (&values[example * each..][..each], &slopes[example * each..][..each]);
            let groups = &moments.groups[example * self.groups..][..self.groups];
            let normal = |channel: usize, value: f32| {
                let (mean, scale) = groups[channel / per_group];
                (value - mean) * scale
            };
            let mut sums = vec![0.0f64; 2 * channels];
            for (x, slope) in x.chunks_exact(channels).zip(slope.chunks_exact(channels)) {
                for channel in 0..channels {
                    sums[channel] += f64::from(slope[channel] * normal(channel, x[channel]));
                    sums[channels + channel] += f64::from(slope[channel]);
                }
            }
            own.iter_mut().zip(&sums).for_each(|(own, sum)| *own += *sum as f32);
            let weighted = |half: &[f64]| -> Vec<f64> {
                half.iter().zip(&weight).map(|(sum, weight)| sum * f64::from(*weight)).collect()
            };
            let along = self.per_group(&weighted(&sums[..channels]));
            let mean = self.per_group(&weighted(&sums[channels..]));
            let rows = into[example * each..][..each].chunks_exact_mut(channels);
            for (into, (x, slope)) in rows.zip(x.chunks_exact(channels).zip(slope.chunks_exact(channels))) {
                for channel in 0..channels {
                    let group = channel / per_group;
                    let (_, scale) = groups[group];
                    let pull = mean[group] as f32 + normal(channel, x[channel]) * along[group] as f32;
                    into[channel] = scale * (slope[channel] * weight[channel] - pull);
                }
            }
        }
        let (weights, biases) = own.split_at(channels);
        target.column_sums(parameters, &self.weight, weights);
        target.column_sums(parameters, &self.bias, biases);
    }

    /// The sum of `of(channel, value)` over an image's pixels, channel by channel.
    fn channel_sums(&self, sums: &mut Vec<f64>, image: &[f32], of: impl Fn(usize, f32) -> f64) {
        sums.clear();
        sums.resize(self.image.channels, 0.0);
        for pixel in image.chunks_exact(self.image.channels) {
            for (channel, (sum, value)) in sums.iter_mut().zip(pixel).enumerate() {
                *sum += of(channel, *value);
            }
        }
    }

    /// Channel sums, added up and divided by the values of a group.
    fn per_group(&self, sums: &[f64]) -> Vec<f64> {
        sums.chunks(self.channels_per_group())
            .map(|group| group.iter().sum::<f64>() / self.group_values())
            .collect()
    }
}
