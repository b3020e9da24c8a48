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

    /// Where each window begins in the image.
    fn starts(&self) -> impl Iterator<Item = usize> + use<> {
        let Image { height, width, channels } = self.into;
        let (stride, wide) = (self.stride, self.from.width * channels);
        (0..height).flat_map(move |y| (0..width).map(move |x| y * stride * wide + x * stride * channels))
    }

    /// Maxima, and in `chosen` which pixel of its window each came from: the first of equals, as in PyTorch.
    pub(super) fn forward_maximum(&self, slots: &mut Slots, examples: usize, chosen: &mut Vec<u16>) {
        let (channels, offsets) = (self.into.channels, self.offsets());
        chosen.resize(examples * self.into.values(), 0);
        let (values, maxima) = slots.values_pair(self.input, self.output);
        let images = values.chunks_exact(self.from.values()).take(examples);
        let outputs =
            maxima.chunks_exact_mut(self.into.values()).zip(chosen.chunks_exact_mut(self.into.values()));
        for (image, (maxima, chosen)) in images.zip(outputs) {
            let pixels = maxima.chunks_exact_mut(channels).zip(chosen.chunks_exact_mut(channels));
            for ((maxima, chosen), start) in pixels.zip(self.starts()) {
                maxima.copy_from_slice(&image[start..start + channels]);
                chosen.fill(0);
                for (pixel, offset) in offsets.iter().enumerate().skip(1) {
                    let candidates = &image[start + offset..start + offset + channels];
                    for ((maximum, chosen), value) in maxima.iter_mut().zip(chosen.iter_mut()).zip(candidates)
                    {
                        let better = *value > *maximum || value.is_nan();
                        *maximum = if better { *value } else { *maximum };
                        // A window has at most 65,536 pixels: compiling refuses larger ones.
                        *chosen = if better { pixel as u16 } else { *chosen };
                    }
                }
            }
        }
    }

    pub(super) fn backward_maximum(&self, slots: &mut Slots, examples: usize, chosen: &[u16]) {
        let (channels, offsets) = (self.into.channels, self.offsets());
        let (slopes, into) = slots.slopes_pair(self.output, self.input);
        let images = into.chunks_exact_mut(self.from.values()).take(examples);
        let outputs = slopes.chunks_exact(self.into.values()).zip(chosen.chunks_exact(self.into.values()));
        for (image, (slopes, chosen)) in images.zip(outputs) {
            image.fill(0.0);
            let pixels = slopes.chunks_exact(channels).zip(chosen.chunks_exact(channels));
            for ((slopes, chosen), start) in pixels.zip(self.starts()) {
                for (pixel, offset) in offsets.iter().enumerate() {
                    let into = &mut image[start + offset..start + offset + channels];
                    for ((into, slope), chosen) in into.iter_mut().zip(slopes).zip(chosen) {
                        *into += if usize::from(*chosen) == pixel { *slope } else { 0.0 };
                    }
                }
            }
        }
    }

    pub(super) fn forward_mean(&self, slots: &mut Slots, examples: usize) {
        let (channels, offsets) = (self.into.channels, self.offsets());
        let scale = 1.0 / offsets.len() as f32;
        let (values, means) = slots.values_pair(self.input, self.output);
        let images = values.chunks_exact(self.from.values()).take(examples);
        for (image, means) in images.zip(means.chunks_exact_mut(self.into.values())) {
            for (means, start) in means.chunks_exact_mut(channels).zip(self.starts()) {
                means.fill(0.0);
                for offset in &offsets {
                    let pixel = &image[start + offset..start + offset + channels];
                    means.iter_mut().zip(pixel).for_each(|(mean, value)| *mean += value);
                }
                means.iter_mut().for_each(|mean| *mean *= scale);
            }
        }
    }

    pub(super) fn backward_mean(&self, slots: &mut Slots, examples: usize) {
        let (channels, offsets) = (self.into.channels, self.offsets());
        let scale = 1.0 / offsets.len() as f32;
        let (slopes, into) = slots.slopes_pair(self.output, self.input);
        let images = into.chunks_exact_mut(self.from.values()).take(examples);
        for (image, slopes) in images.zip(slopes.chunks_exact(self.into.values())) {
            image.fill(0.0);
            for (slopes, start) in slopes.chunks_exact(channels).zip(self.starts()) {
                for offset in &offsets {
                    let into = &mut image[start + offset..start + offset + channels];
                    into.iter_mut().zip(slopes).for_each(|(into, slope)| *into += slope * scale);
                }
            }
        }
    }
}
