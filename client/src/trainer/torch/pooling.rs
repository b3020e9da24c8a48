//! Pooling over windows of an image that lies as height, width, channel.

use super::convolution::Image;
use super::slots::Slots;

/// One pooling layer between two slots.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    pub(super) input: usize,
    pub(super) output: usize,
    pub(super) from: Image,
    pub(super) into: Image,
    /// Height and width of a window.
    pub(super) window: (usize, usize),
    pub(super) stride: usize,
}

impl Pool {
    /// Where each pixel of a window lies, from the window's start.
    fn offsets(&self) -> Vec<usize> {
        let wide = self.from.width * self.from.channels;
        let (height, width) = self.window;
        (0..height).flat_map(|y| (0..width).map(move |x| y * wide + x * self.from.channels)).collect()
    }

    /// Values that lie side by side both in the output and, for each pixel of the window, in the image: with a stride
    /// of one a whole row, else the channels of one pixel.
    fn run(&self) -> usize {
        if self.stride == 1 { self.into.width * self.into.channels } else { self.into.channels }
    }

    /// Where the first window of each run begins in the image.
    fn starts(&self) -> impl Iterator<Item = usize> + use<> {
        let Image { height, width, channels } = self.into;
        let (stride, wide) = (self.stride, self.from.width * channels);
        let runs = if stride == 1 { 1 } else { width };
        (0..height).flat_map(move |y| (0..runs).map(move |x| y * stride * wide + x * stride * channels))
    }

    /// Maxima, and in `chosen` which pixel of its window each came from: the first of equals, as in PyTorch.
    pub(super) fn forward_maximum(&self, slots: &mut Slots, examples: usize, chosen: &mut Vec<u32>) {
        let (run, offsets) = (self.run(), self.offsets());
        chosen.resize(examples * self.into.values(), 0);
        let (values, maxima) = slots.values_pair(self.input, self.output);
        let images = values.chunks_exact(self.from.values()).take(examples);
        let outputs =
            maxima.chunks_exact_mut(self.into.values()).zip(chosen.chunks_exact_mut(self.into.values()));
        for (image, (maxima, chosen)) in images.zip(outputs) {
            let runs = maxima.chunks_exact_mut(run).zip(chosen.chunks_exact_mut(run));
            for ((maxima, chosen), start) in runs.zip(self.starts()) {
                maxima.copy_from_slice(&image[start..start + run]);
                chosen.fill(0);
                for (pixel, offset) in (0..).zip(&offsets).skip(1) {
                    take_larger(&image[start + offset..start + offset + run], pixel, maxima, chosen);
                }
            }
        }
    }

    pub(super) fn backward_maximum(&self, slots: &mut Slots, examples: usize, chosen: &[u32]) {
        let (run, offsets) = (self.run(), self.offsets());
        let (slopes, into) = slots.slopes_pair(self.output, self.input);
        let images = into.chunks_exact_mut(self.from.values()).take(examples);
        let outputs = slopes.chunks_exact(self.into.values()).zip(chosen.chunks_exact(self.into.values()));
        for (image, (slopes, chosen)) in images.zip(outputs) {
            image.fill(0.0);
            let runs = slopes.chunks_exact(run).zip(chosen.chunks_exact(run));
            for ((slopes, chosen), start) in runs.zip(self.starts()) {
                for (pixel, offset) in (0..).zip(&offsets) {
                    add_where(slopes, chosen, pixel, &mut image[start + offset..start + offset + run]);
                }
            }
        }
    }

    pub(super) fn forward_mean(&self, slots: &mut Slots, examples: usize) {
        let (run, offsets) = (self.run(), self.offsets());
        let scale = 1.0 / offsets.len() as f32;
        let (values, means) = slots.values_pair(self.input, self.output);
        let images = values.chunks_exact(self.from.values()).take(examples);
        for (image, means) in images.zip(means.chunks_exact_mut(self.into.values())) {
            for (means, start) in means.chunks_exact_mut(run).zip(self.starts()) {
                means.fill(0.0);
                for offset in &offsets {
                    let pixels = &image[start + offset..start + offset + run];
                    means.iter_mut().zip(pixels).for_each(|(mean, value)| *mean += value);
                }
                means.iter_mut().for_each(|mean| *mean *= scale);
            }
        }
    }

    pub(super) fn backward_mean(&self, slots: &mut Slots, examples: usize) {
        let (run, offsets) = (self.run(), self.offsets());
        let scale = 1.0 / offsets.len() as f32;
        let (slopes, into) = slots.slopes_pair(self.output, self.input);
        let images = into.chunks_exact_mut(self.from.values()).take(examples);
        for (image, slopes) in images.zip(slopes.chunks_exact(self.into.values())) {
            image.fill(0.0);
            for (slopes, start) in slopes.chunks_exact(run).zip(self.starts()) {
                for offset in &offsets {
                    let into = &mut image[start + offset..start + offset + run];
                    into.iter_mut().zip(slopes).for_each(|(into, slope)| *into += slope * scale);
                }
            }
        }
    }
}

/// Takes the values that are larger than the maxima so far, and notes which pixel they are of.
///
/// What is no number is passed over unless it comes first: then, as where all is lost, it shows in the loss.
fn take_larger(values: &[f32], pixel: u32, maxima: &mut [f32], chosen: &mut [u32]) {
    for ((value, maximum), chosen) in values.iter().zip(maxima).zip(chosen) {
        let (new, old) = (*value, *maximum);
        // Masks, not conditions: the compiler makes vector instructions of them.
        let better = u32::from(new > old).wrapping_neg();
        *chosen = (pixel & better) | (*chosen & !better);
        *maximum = if new > old { new } else { old };
    }
}

/// Adds the slopes of the maxima that came from `pixel`.
fn add_where(slopes: &[f32], chosen: &[u32], pixel: u32, into: &mut [f32]) {
    for ((slope, chosen), into) in slopes.iter().zip(chosen).zip(into) {
        let mask = u32::from(*chosen == pixel).wrapping_neg();
        *into += f32::from_bits(slope.to_bits() & mask);
    }
}
