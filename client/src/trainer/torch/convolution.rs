//! Two-dimensional convolutions as matrix products over unfolded windows.
//!
//! An image lies as height, width, channel, so a window's row is one run of memory, and the product's result is the
//! next image as it must lie. For the small batches of federated clients one product over the whole batch is two to
//! three times faster than a convolution primitive per batch.

use std::ops::Range;

use tch::TchError;

use super::linear::{Target, square_norm};
use super::memory::{Memory, Product, Products, transposed};
use super::parameters::Parameters;
use super::slots::Slots;

/// Unfolded windows in memory at a time: they should stay in a core's cache between being made and being used.
const WINDOWS_BYTES: usize = 1 << 20;

/// Height, width and channels of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) channels: usize,
}

impl Image {
    /// Values of one image.
    pub(super) fn values(self) -> usize {
        self.height * self.width * self.channels
    }

    /// The image with `padding` pixels more on each side.
    fn padded(self, padding: usize) -> Self {
        Self { height: self.height + 2 * padding, width: self.width + 2 * padding, ..self }
    }
}

/// One layer between two slots.
#[derive(Debug, Clone)]
pub(super) struct Convolution {
    pub(super) input: usize,
    pub(super) output: usize,
    pub(super) weight: Range<usize>,
    pub(super) bias: Range<usize>,
    pub(super) from: Image,
    pub(super) into: Image,
    pub(super) size: usize,
    pub(super) stride: usize,
    pub(super) padding: usize,
    /// Whether the norms of single examples' gradients are found without computing these.
    pub(super) ghost: bool,
}

/// How the gradients of single examples are measured and summed, for [`Target::Clipped`].
enum Each {
    /// Not at all.
    Nothing,
    /// Each example's weight gradient is computed and kept until its factor is known.
    Direct { gradients: Memory, products: Vec<Products>, factors: Memory, sum: Product },
    /// Norms from the inner products of the windows and those of the slopes, T × T for T positions: for windows u and
    /// slopes g, ‖Σ g_t·u_tᵀ‖² = Σ_t Σ_s ⟨u_t, u_s⟩·⟨g_t, g_s⟩ (Li et al. 2022). The sum then takes the windows again.
    Ghost { of_windows: Memory, of_slopes: Memory, products: Vec<[Products; 2]>, squares: Vec<f64> },
}

/// A layer's products for one batch size, and its unfolded windows.
pub(super) struct Bound {
    examples: usize,
    /// Images whose windows are unfolded at a time.
    part: usize,
    windows: Memory,
    forward: Vec<Product>,
    /// Slopes with respect to the windows, part by part; empty for a network's first layer.
    window_slopes: Memory,
    input: Vec<Product>,
    weight: Vec<Product>,
    each: Each,
    /// Sums of the slopes over the positions, example by example: the bias's gradients.
    sums: Vec<f32>,
    /// One image with its padding.
    padded: Vec<f32>,
}

impl Convolution {
    /// Values of one window.
    fn window(&self) -> usize {
        self.size * self.size * self.from.channels
    }

    /// Windows of one image.
    fn positions(&self) -> usize {
        self.into.height * self.into.width
    }

    /// Binds the layer to `examples` images.
    pub(super) fn bind(
        &self,
        slots: &Slots,
        parameters: &Parameters,
        examples: usize,
        target: Option<Target>,
        input_slopes: bool,
    ) -> Result<Bound, TchError> {
        let (window, positions, outputs) = (self.window(), self.positions(), self.into.channels);
        let part = (WINDOWS_BYTES / (window * positions * 4).max(1)).clamp(1, examples.max(1));
        let windows = Memory::zeros(part * positions * window)?;
        let padded =
            if self.padding > 0 { vec![0.0; self.from.padded(self.padding).values()] } else { Vec::new() };
        let window_slopes =
            Memory::zeros(if input_slopes && target.is_some() { windows.values().len() } else { 0 })?;
        let weight = parameters.values.matrix(self.weight.start, outputs, window, window)?;
        let mut bound = Bound {
            examples,
            part,
            windows,
            forward: Vec::new(),
            window_slopes,
            input: Vec::new(),
            weight: Vec::new(),
            each: Each::Nothing,
            sums: Vec::new(),
            padded,
        };
        if target == Some(Target::Clipped) {
            bound.sums = vec![0.0; examples * outputs];
            bound.each = self.each(slots, parameters, &bound)?;
        }
        for first in (0..examples).step_by(part) {
            let rows = part.min(examples - first) * positions;
            let at = first * positions * outputs;
            let unfolded = bound.windows.matrix(0, rows, window, window)?;
            let out = slots.value(self.output).matrix(at, rows, outputs, outputs)?;
            bound.forward.push(Product::add(out, unfolded.shallow_clone(), transposed(&weight)?));
            let Some(target) = target else { continue };
            let slopes = slots.slope(self.output).matrix(at, rows, outputs, outputs)?;
            if input_slopes {
                let into = bound.window_slopes.matrix(0, rows, window, window)?;
                bound.input.push(Product::set(into, slopes.shallow_clone(), weight.shallow_clone()));
            }
            let change = target.of(parameters).matrix(self.weight.start, outputs, window, window)?;
            let slopes = transposed(&slopes)?;
            bound.weight.push(match first {
                0 => target.product(change, slopes, unfolded),
                _ => Product::add(change, slopes, unfolded),
            });
        }
        Ok(bound)
    }

    /// Whether norms without gradients cost less: the inner products of all pairs of positions against the gradient,
    /// 2T² ≤ p·d for T positions, p outputs and windows of d values (Bu et al. 2022).
    pub(super) fn prefers_ghost(&self) -> bool {
        2 * self.positions() * self.positions() <= self.into.channels * self.window()
    }

    fn each(&self, slots: &Slots, parameters: &Parameters, bound: &Bound) -> Result<Each, TchError> {
        let (window, positions, outputs) = (self.window(), self.positions(), self.into.channels);
        let (examples, part) = (bound.examples, bound.part);
        let parts = (0..examples).step_by(part).map(|first| (first, part.min(examples - first)));
        let windows = |count: usize| bound.windows.matrices(0, count, positions, window);
        let slopes = |first: usize, count: usize| {
            slots.slope(self.output).matrices(first * positions * outputs, count, positions, outputs)
        };
        if self.ghost {
            let of_windows = Memory::zeros(part * positions * positions)?;
            let of_slopes = Memory::zeros(part * positions * positions)?;
            let square = |out: &Memory, matrices: tch::Tensor, count: usize| -> Result<Products, TchError> {
                let right = transposed(&matrices)?;
                Ok(Products::set(out.matrices(0, count, positions, positions)?, matrices, right))
            };
            let products = parts.map(|(first, count)| {
                let of_windows = square(&of_windows, windows(count)?, count)?;
                Ok([of_windows, square(&of_slopes, slopes(first, count)?, count)?])
            });
            let products = products.collect::<Result<Vec<_>, TchError>>()?;
            return Ok(Each::Ghost { of_windows, of_slopes, products, squares: vec![0.0; examples] });
        }
        let size = outputs * window;
        let gradients = Memory::zeros(examples * size)?;
        let products = parts.map(|(first, count)| {
            let out = gradients.matrices(first * size, count, outputs, window)?;
            Ok(Products::set(out, transposed(&slopes(first, count)?)?, windows(count)?))
        });
        let products = products.collect::<Result<Vec<_>, TchError>>()?;
        let factors = Memory::zeros(examples)?;
        let sum = Product::add(
            Target::Clipped.of(parameters).matrix(self.weight.start, 1, size, size)?,
            factors.matrix(0, 1, examples, examples)?,
            gradients.matrix(0, examples, size, size)?,
        );
        Ok(Each::Direct { gradients, products, factors, sum })
    }

    pub(super) fn forward(
        &self,
        bound: &mut Bound,
        slots: &mut Slots,
        parameters: &Parameters,
    ) -> Result<(), TchError> {
        let bias = parameters.values.values().get(self.bias.clone()).unwrap_or_default();
        let rows = slots.value_mut(self.output).chunks_exact_mut(self.into.channels.max(1));
        rows.take(bound.examples * self.positions()).for_each(|row| row.copy_from_slice(bias));
        for part in 0..bound.forward.len() {
            self.unfold_part(bound, slots, part);
            bound.forward[part].run()?;
        }
        Ok(())
    }

    pub(super) fn backward(
        &self,
        bound: &mut Bound,
        slots: &mut Slots,
        parameters: &mut Parameters,
        target: Target,
    ) -> Result<(), TchError> {
        if target != Target::Clipped {
            self.sum_bias(bound, slots, parameters, target);
        }
        // All slopes with respect to the input come first: they need the weight as it was.
        for part in 0..bound.input.len() {
            bound.input[part].run()?;
            self.fold_part(bound, slots, part);
        }
        if target == Target::Clipped { self.measure(bound, slots) } else { self.sum_weight(bound, slots) }
    }

    fn sum_bias(&self, bound: &Bound, slots: &Slots, parameters: &mut Parameters, target: Target) {
        let slopes = slots.slope(self.output).values();
        let slopes = slopes.get(..bound.examples * self.into.values()).unwrap_or_default();
        target.column_sums(parameters, &self.bias, slopes);
    }

    fn sum_weight(&self, bound: &mut Bound, slots: &Slots) -> Result<(), TchError> {
        for part in 0..bound.weight.len() {
            // One part is there still from the way forward.
            if bound.weight.len() > 1 {
                self.unfold_part(bound, slots, part);
            }
            bound.weight[part].run()?;
        }
        Ok(())
    }

    /// Finds what [`Convolution::add_squares`] and [`Convolution::add_clipped`] need of each example.
    fn measure(&self, bound: &mut Bound, slots: &Slots) -> Result<(), TchError> {
        let outputs = self.into.channels.max(1);
        let slopes = slots.slope(self.output).values().chunks_exact(self.into.values().max(1));
        for (sums, slopes) in bound.sums.chunks_exact_mut(outputs).zip(slopes) {
            sums.fill(0.0);
            for pixel in slopes.chunks_exact(outputs) {
                sums.iter_mut().zip(pixel).for_each(|(sum, slope)| *sum += slope);
            }
        }
        let parts = bound.examples.div_ceil(bound.part);
        for part in 0..parts {
            if parts > 1 {
                self.unfold_part(bound, slots, part);
            }
            let images = self.images(bound, part);
            match &mut bound.each {
                Each::Nothing => {}
                Each::Direct { products, .. } => products[part].run()?,
                Each::Ghost { of_windows, of_slopes, products, squares } => {
                    products[part].iter_mut().try_for_each(Products::run)?;
                    let each = (self.positions() * self.positions()).max(1);
                    let pairs =
                        of_windows.values().chunks_exact(each).zip(of_slopes.values().chunks_exact(each));
                    for (square, (windows, slopes)) in squares[images].iter_mut().zip(pairs) {
                        *square = ghost_square(windows, slopes, self.positions());
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds to each example's `squares` the squared norm of its gradient.
    pub(super) fn add_squares(&self, bound: &Bound, squares: &mut [f64]) {
        let biases = bound.sums.chunks_exact(self.into.channels.max(1));
        squares.iter_mut().zip(biases).for_each(|(square, bias)| *square += square_norm(bias));
        match &bound.each {
            Each::Nothing => {}
            Each::Direct { gradients, .. } => {
                let gradients = gradients.values().chunks_exact(self.weight.len().max(1));
                squares
                    .iter_mut()
                    .zip(gradients)
                    .for_each(|(square, gradient)| *square += square_norm(gradient));
            }
            Each::Ghost { squares: found, .. } => {
                squares.iter_mut().zip(found).for_each(|(square, found)| *square += found);
            }
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
        match &mut bound.each {
            Each::Nothing => Ok(()),
            Each::Direct { gradients, factors: kept, sum, .. } => {
                let rows = gradients.values_mut().chunks_exact_mut(self.weight.len().max(1));
                let biases = bound.sums.chunks_exact_mut(self.into.channels.max(1));
                let into = parameters.gradient.values_mut().get_mut(self.bias.clone()).unwrap_or_default();
                for ((factor, row), bias) in factors.iter().zip(rows).zip(biases) {
                    if *factor == 0.0 {
                        // They may be no numbers, and zero times such a value is none either.
                        row.fill(0.0);
                        bias.fill(0.0);
                    }
                    into.iter_mut().zip(bias).for_each(|(into, bias)| *into += factor * *bias);
                }
                kept.values_mut().iter_mut().zip(factors).for_each(|(kept, factor)| *kept = *factor);
                sum.run()
            }
            Each::Ghost { .. } => {
                let image = (self.input, self.from.values());
                slots.scale(image, (self.output, self.into.values()), factors);
                self.sum_bias(bound, slots, parameters, Target::Clipped);
                // The windows in memory are those of the last part, and not yet without what is no number.
                for part in 0..bound.weight.len() {
                    self.unfold_part(bound, slots, part);
                    bound.weight[part].run()?;
                }
                Ok(())
            }
        }
    }

    /// The images of a part, with their places in it.
    fn images(&self, bound: &Bound, part: usize) -> Range<usize> {
        let first = part * bound.part;
        first..(first + bound.part).min(bound.examples)
    }

    fn unfold_part(&self, bound: &mut Bound, slots: &Slots, part: usize) {
        let images = self.images(bound, part);
        let values = slots.value(self.input).values();
        let windows = bound.windows.values_mut().chunks_exact_mut((self.positions() * self.window()).max(1));
        let each = self.from.values();
        for (image, windows) in images.zip(windows) {
            let image = &values[image * each..(image + 1) * each];
            if self.padding == 0 {
                self.unfold(image, self.from, windows);
            } else {
                self.pad(image, &mut bound.padded);
                self.unfold(&bound.padded, self.from.padded(self.padding), windows);
            }
        }
    }

    fn fold_part(&self, bound: &mut Bound, slots: &mut Slots, part: usize) {
        let images = self.images(bound, part);
        let slopes = slots.slope_mut(self.input);
        let windows = bound.window_slopes.values().chunks_exact((self.positions() * self.window()).max(1));
        let each = self.from.values();
        for (image, windows) in images.zip(windows) {
            let image = &mut slopes[image * each..(image + 1) * each];
            if self.padding == 0 {
                image.fill(0.0);
                self.fold(windows, self.from, image);
            } else {
                bound.padded.fill(0.0);
                self.fold(windows, self.from.padded(self.padding), &mut bound.padded);
                self.crop(&bound.padded, image);
                // The border stays zero for the next unfolding.
                bound.padded.fill(0.0);
            }
        }
    }

    /// Copies an image between the borders of `padded`, which are zero.
    fn pad(&self, image: &[f32], padded: &mut [f32]) {
        let row = self.from.width * self.from.channels;
        let wide = self.from.padded(self.padding).width * self.from.channels;
        let left = self.padding * self.from.channels;
        let rows = padded.chunks_exact_mut(wide.max(1)).skip(self.padding);
        for (from, into) in image.chunks_exact(row.max(1)).zip(rows) {
            into[left..left + row].copy_from_slice(from);
        }
    }

    /// Copies what lies between the borders of `padded` into `image`.
    fn crop(&self, padded: &[f32], image: &mut [f32]) {
        let row = self.from.width * self.from.channels;
        let wide = self.from.padded(self.padding).width * self.from.channels;
        let left = self.padding * self.from.channels;
        let rows = padded.chunks_exact(wide.max(1)).skip(self.padding);
        for (into, from) in image.chunks_exact_mut(row.max(1)).zip(rows) {
            into.copy_from_slice(&from[left..left + row]);
        }
    }

    /// Writes the windows of an image, one after another.
    fn unfold(&self, image: &[f32], shape: Image, windows: &mut [f32]) {
        match self.size * shape.channels {
            3 => self.unfold_runs::<3>(image, shape, windows),
            5 => self.unfold_runs::<5>(image, shape, windows),
            8 => self.unfold_runs::<8>(image, shape, windows),
            9 => self.unfold_runs::<9>(image, shape, windows),
            run => {
                for (window, start) in windows.chunks_exact_mut(self.window()).zip(self.starts(shape)) {
                    for (into, from) in window.chunks_exact_mut(run).zip(self.rows(image, shape, start)) {
                        into.copy_from_slice(&from[..run]);
                    }
                }
            }
        }
    }

    /// The same for short runs, whose length the compiler then knows.
    fn unfold_runs<const RUN: usize>(&self, image: &[f32], shape: Image, windows: &mut [f32]) {
        for (window, start) in windows.chunks_exact_mut(self.window()).zip(self.starts(shape)) {
            let (runs, _) = window.as_chunks_mut::<RUN>();
            for (into, from) in runs.iter_mut().zip(self.rows(image, shape, start)) {
                if let Some(from) = from.first_chunk::<RUN>() {
                    *into = *from;
                }
            }
        }
    }

    /// Adds the windows onto an image: the transpose of [`Convolution::unfold`].
    fn fold(&self, windows: &[f32], shape: Image, image: &mut [f32]) {
        let run = self.size * shape.channels;
        let wide = shape.width * shape.channels;
        for (window, start) in windows.chunks_exact(self.window()).zip(self.starts(shape)) {
            for (row, from) in window.chunks_exact(run).enumerate() {
                let at = start + row * wide;
                for (into, from) in image[at..at + run].iter_mut().zip(from) {
                    *into += from;
                }
            }
        }
    }

    /// Where each window begins in an image of `shape`.
    fn starts(&self, shape: Image) -> impl Iterator<Item = usize> + use<> {
        let Image { height, width, .. } = self.into;
        let (stride, channels, wide) = (self.stride, shape.channels, shape.width * shape.channels);
        (0..height).flat_map(move |y| (0..width).map(move |x| y * stride * wide + x * stride * channels))
    }

    /// The rows of the window that begins at `start`, each with what follows it.
    fn rows<'a>(
        &self,
        image: &'a [f32],
        shape: Image,
        start: usize,
    ) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        let wide = shape.width * shape.channels;
        (0..self.size).map(move |row| &image[start + row * wide..])
    }
}

/// Σ_t Σ_s `windows`[t, s]·`slopes`[t, s], and what rounding in single precision may have taken from it: each inner
/// product is off by a few 2⁻²⁴ of the two norms, so the sum by as much of (Σ_t ‖u_t‖‖g_t‖)². A norm too small would
/// leave a gradient longer than the clip norm; one too large by so little only shortens it.
fn ghost_square(windows: &[f32], slopes: &[f32], positions: usize) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (left, left_rest) = windows.as_chunks::<8>();
    let (right, right_rest) = slopes.as_chunks::<8>();
    for (left, right) in left.iter().zip(right) {
        for (sum, (a, b)) in lanes.iter_mut().zip(left.iter().zip(right)) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    let rest: f64 = left_rest.iter().zip(right_rest).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    let diagonal = |of: &[f32]| of.iter().step_by(positions + 1).map(|v| f64::from(*v)).collect::<Vec<f64>>();
    let norms = diagonal(windows).iter().zip(diagonal(slopes)).map(|(a, b)| (a * b).sqrt()).sum::<f64>();
    lanes.iter().sum::<f64>() + rest + norms * norms * 4.0 * 2f64.powi(-24)
}
