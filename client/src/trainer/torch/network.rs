//! A network's layers compiled into stages over slots: one forward pass, one backward pass, no graph in between.
//!
//! libtorch computes the matrix products; what lies between them are loops over the same memory. Against libtorch's
//! own autograd this saves the graph, the allocations and the copies, which on a client's small batches cost more
//! than the arithmetic. Tests compare every gradient with autograd's.

use std::collections::BTreeMap;

use rand::Rng;
use tch::TchError;

use tributary_common::model::{Layer, Layout};

use super::convolution::{self, Convolution, Image};
use super::elementwise;
use super::embedding::Embedding;
use super::linear::{self, Linear, Target};
use super::loss;
use super::normalisation::{GroupNorm, Moments};
use super::parameters::Parameters;
use super::pooling::Pool;
use super::slots::Slots;

/// Most batch sizes that a network stays bound to; each costs a few kilobytes beside the unfolded windows.
const BOUND_SIZES: usize = 32;

/// One step of the computation.
#[derive(Debug, Clone)]
enum Stage {
    Linear(Linear),
    Convolution(Convolution),
    GroupNorm(GroupNorm),
    Embedding(Embedding),
    MaxPool(Pool),
    AveragePool(Pool),
    /// Images to flat rows in PyTorch's order.
    Flatten {
        from: usize,
        into: usize,
        image: Image,
    },
    Relu {
        slot: usize,
    },
    Tanh {
        slot: usize,
    },
    Dropout {
        slot: usize,
        probability: f64,
    },
    /// The same values in a second slot, so that the first stay as they are.
    Copy {
        from: usize,
        into: usize,
    },
    /// The same values in a second slot, for a second branch.
    Fork {
        from: usize,
        into: usize,
    },
    /// Adds the values of `from` to those of `into`.
    Join {
        from: usize,
        into: usize,
    },
}

/// What a stage keeps between its way forward and its way back, for one batch size.
enum Kept {
    Nothing,
    Linear(linear::Bound),
    Convolution(convolution::Bound),
    Moments(Moments),
    Chosen(Vec<u32>),
    Factors(Vec<f32>),
}

/// The shape of a slot's values for one example.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Flat(usize),
    Image(Image),
}

impl Shape {
    fn values(self) -> usize {
        match self {
            Shape::Flat(values) => values,
            Shape::Image(image) => image.values(),
        }
    }
}

/// A network that computes. It keeps no state from batch to batch but its memory.
pub(super) struct Network {
    stages: Vec<Stage>,
    /// Values per example, slot by slot; slot 0 takes the batch.
    sizes: Vec<usize>,
    input: Shape,
    logits: usize,
    classes: usize,
    /// The first stage with parameters: nothing before it needs slopes.
    first: usize,
    target: Option<Target>,
    /// Examples for which there is room.
    room: usize,
    slots: Slots,
    bound: BTreeMap<usize, Vec<Kept>>,
}

impl Network {
    /// Compiles `layers`, which were checked against `inputs`, over the tensors of `layout`. Without a `target` the
    /// network evaluates and cannot go back.
    pub(super) fn new(
        layers: &[Layer],
        inputs: &[usize],
        layout: &Layout,
        target: Option<Target>,
    ) -> Result<Self, TchError> {
        let flat = matches!(layers.first(), Some(Layer::Flatten | Layer::Linear { .. }) | None);
        let input = match *inputs {
            [channels, height, width] if !flat => Shape::Image(Image { height, width, channels }),
            _ => Shape::Flat(inputs.iter().product()),
        };
        let mut compiler = Compiler { layout, stages: Vec::new(), sizes: vec![input.values()] };
        let (logits, shape) = compiler.layers(layers, 0, input)?;
        let Compiler { stages, sizes, .. } = compiler;
        let has_parameters = |stage: &Stage| {
            matches!(
                stage,
                Stage::Linear(_) | Stage::Convolution(_) | Stage::GroupNorm(_) | Stage::Embedding(_)
            )
        };
        let first = stages.iter().position(has_parameters).unwrap_or(stages.len());
        let slots = Slots::new(&sizes, 0, false)?;
        let classes = shape.values();
        Ok(Self {
            stages,
            sizes,
            input,
            logits,
            classes,
            first,
            target,
            room: 0,
            slots,
            bound: BTreeMap::new(),
        })
    }

    /// Makes ready for batches of `examples`, which must be done before any of the calls below for that size.
    pub(super) fn bind(&mut self, parameters: &Parameters, examples: usize) -> Result<(), TchError> {
        if examples > self.room {
            self.bound.clear();
            self.slots = Slots::new(&self.sizes, examples, self.target.is_some())?;
            self.room = examples;
        }
        if self.bound.contains_key(&examples) {
            return Ok(());
        }
        if self.bound.len() >= BOUND_SIZES {
            self.bound.clear();
        }
        let keep = |(at, stage): (usize, &Stage)| -> Result<Kept, TchError> {
            let slopes = at > self.first;
            Ok(match stage {
                Stage::Linear(layer) => {
                    Kept::Linear(layer.bind(&self.slots, parameters, examples, self.target, slopes)?)
                }
                Stage::Convolution(layer) => {
                    Kept::Convolution(layer.bind(&self.slots, parameters, examples, self.target, slopes)?)
                }
                Stage::GroupNorm(_) => Kept::Moments(Moments::default()),
                Stage::MaxPool(_) => Kept::Chosen(Vec::new()),
                Stage::Dropout { .. } => Kept::Factors(Vec::new()),
                _ => Kept::Nothing,
            })
        };
        let kept = self.stages.iter().enumerate().map(keep).collect::<Result<Vec<_>, _>>()?;
        self.bound.insert(examples, kept);
        Ok(())
    }

    /// Copies an example, in the order of the data, to place `at` of the batch.
    pub(super) fn take(&mut self, at: usize, example: &[f32]) {
        let each = self.input.values();
        let Some(into) = self.slots.value_mut(0).get_mut(at * each..(at + 1) * each) else { return };
        match self.input {
            Shape::Image(image) if image.channels > 1 => {
                elementwise::transpose(example, into, image.height * image.width);
            }
            _ => into.copy_from_slice(example),
        }
    }

    /// Puts an example of zeros at place `at` of the batch.
    pub(super) fn take_nothing(&mut self, at: usize) {
        let each = self.input.values();
        self.slots.value_mut(0).get_mut(at * each..(at + 1) * each).unwrap_or_default().fill(0.0);
    }

    /// The logits of the batch, row by row; with a source of random bits, as in training.
    pub(super) fn forward(
        &mut self,
        parameters: &Parameters,
        examples: usize,
        mut dropout: Option<&mut dyn Rng>,
    ) -> Result<&[f32], TchError> {
        let Self { stages, sizes, slots, bound, .. } = self;
        let kept = bound.get_mut(&examples).map(Vec::as_mut_slice).unwrap_or_default();
        for (stage, kept) in stages.iter().zip(kept) {
            match (stage, kept) {
                (Stage::Linear(layer), Kept::Linear(bound)) => layer.forward(bound, slots, parameters)?,
                (Stage::Convolution(layer), Kept::Convolution(bound)) => {
                    layer.forward(bound, slots, parameters)?
                }
                (Stage::GroupNorm(layer), Kept::Moments(moments)) => {
                    layer.forward(moments, slots, parameters, examples);
                }
                (Stage::Embedding(layer), _) => layer.forward(slots, parameters, examples),
                (Stage::MaxPool(pool), Kept::Chosen(chosen)) => pool.forward_maximum(slots, examples, chosen),
                (Stage::AveragePool(pool), _) => pool.forward_mean(slots, examples),
                (Stage::Flatten { from, into, image }, _) => {
                    elementwise::flatten(slots, (*from, *into), *image, examples);
                }
                (Stage::Relu { slot }, _) => {
                    elementwise::relu(&mut slots.value_mut(*slot)[..examples * sizes[*slot]]);
                }
                (Stage::Tanh { slot }, _) => {
                    elementwise::tanh(&mut slots.value_mut(*slot)[..examples * sizes[*slot]]);
                }
                (Stage::Dropout { slot, probability }, Kept::Factors(factors)) => {
                    if let Some(stream) = dropout.as_deref_mut() {
                        let values = &mut slots.value_mut(*slot)[..examples * sizes[*slot]];
                        elementwise::dropout(values, *probability, stream, factors);
                    }
                }
                (Stage::Copy { from, into } | Stage::Fork { from, into }, _) => {
                    let (values, copy) = slots.values_pair(*from, *into);
                    let length = examples * sizes[*from];
                    copy[..length].copy_from_slice(&values[..length]);
                }
                (Stage::Join { from, into }, _) => {
                    let (values, sum) = slots.values_pair(*from, *into);
                    let length = examples * sizes[*into];
                    sum[..length].iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
                }
                _ => {}
            }
        }
        let logits = self.slots.value(self.logits).values();
        Ok(logits.get(..examples * self.classes).unwrap_or_default())
    }

    /// Sets the slopes of `scale` times the sum of the losses of the batch that went forward last, and returns that
    /// sum.
    pub(super) fn loss(&mut self, labels: &[usize], scale: f64) -> f64 {
        let length = labels.len() * self.classes;
        let (logits, slopes) = self.slots.value_and_slope_mut(self.logits);
        loss::slopes(&logits[..length], labels, self.classes, scale, &mut slopes[..length])
    }

    /// Carries the slopes back through the network and into the target.
    pub(super) fn backward(&mut self, parameters: &mut Parameters, examples: usize) -> Result<(), TchError> {
        let Self { stages, sizes, slots, bound, target, first, .. } = self;
        let Some(target) = *target else { return Ok(()) };
        let kept = bound.get_mut(&examples).map(Vec::as_mut_slice).unwrap_or_default();
        for (stage, kept) in stages.iter().zip(kept).skip(*first).rev() {
            match (stage, kept) {
                (Stage::Linear(layer), Kept::Linear(bound)) => {
                    layer.backward(bound, slots, parameters, target)?
                }
                (Stage::Convolution(layer), Kept::Convolution(bound)) => {
                    layer.backward(bound, slots, parameters, target)?;
                }
                (Stage::GroupNorm(layer), Kept::Moments(moments)) => {
                    layer.backward(moments, slots, parameters, target, examples);
                }
                (Stage::Embedding(layer), _) => layer.backward(slots, parameters, target, examples),
                (Stage::MaxPool(pool), Kept::Chosen(chosen)) => {
                    pool.backward_maximum(slots, examples, chosen)
                }
                (Stage::AveragePool(pool), _) => pool.backward_mean(slots, examples),
                (Stage::Flatten { from, into, image }, _) => {
                    elementwise::flatten_slopes(slots, (*from, *into), *image, examples);
                }
                (Stage::Relu { slot }, _) => {
                    let (values, slopes) = slots.value_and_slope_mut(*slot);
                    elementwise::relu_slopes(values, &mut slopes[..examples * sizes[*slot]]);
                }
                (Stage::Tanh { slot }, _) => {
                    let (values, slopes) = slots.value_and_slope_mut(*slot);
                    elementwise::tanh_slopes(values, &mut slopes[..examples * sizes[*slot]]);
                }
                (Stage::Dropout { slot, .. }, Kept::Factors(factors)) => {
                    elementwise::scale(&mut slots.slope_mut(*slot)[..examples * sizes[*slot]], factors);
                }
                (Stage::Copy { from, into }, _) => {
                    let (slopes, copy) = slots.slopes_pair(*into, *from);
                    let length = examples * sizes[*from];
                    copy[..length].copy_from_slice(&slopes[..length]);
                }
                // The other branch's slopes arrive in `into`, this branch's are in `from`.
                (Stage::Fork { from, into }, _) => {
                    let (other, sum) = slots.slopes_pair(*into, *from);
                    let length = examples * sizes[*from];
                    sum[..length].iter_mut().zip(other).for_each(|(sum, slope)| *sum += slope);
                }
                (Stage::Join { from, into }, _) => {
                    let (slopes, copy) = slots.slopes_pair(*into, *from);
                    let length = examples * sizes[*into];
                    copy[..length].copy_from_slice(&slopes[..length]);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The squared norm of each example's own gradient, in place of `squares`: after [`Network::backward`] towards
    /// [`Target::Clipped`], which leaves the gradient as it was.
    pub(super) fn squares(&self, examples: usize, squares: &mut Vec<f64>) {
        squares.clear();
        squares.resize(examples, 0.0);
        let kept = self.bound.get(&examples).map(Vec::as_slice).unwrap_or_default();
        for (stage, kept) in self.stages.iter().zip(kept) {
            match (stage, kept) {
                (Stage::Linear(layer), _) => layer.add_squares(&self.slots, squares),
                (Stage::Embedding(layer), _) => layer.add_squares(&self.slots, squares),
                (Stage::Convolution(layer), Kept::Convolution(bound)) => layer.add_squares(bound, squares),
                (Stage::GroupNorm(layer), Kept::Moments(moments)) => layer.add_squares(moments, squares),
                _ => {}
            }
        }
    }

    /// Adds each example's gradient times its factor to the gradient: the other half of [`Network::backward`] towards
    /// [`Target::Clipped`]. An example whose factor is zero adds nothing, whatever its values are.
    pub(super) fn add_clipped(
        &mut self,
        parameters: &mut Parameters,
        factors: &[f32],
    ) -> Result<(), TchError> {
        let Self { stages, slots, bound, .. } = self;
        let kept = bound.get_mut(&factors.len()).map(Vec::as_mut_slice).unwrap_or_default();
        for (stage, kept) in stages.iter().zip(kept) {
            match (stage, kept) {
                (Stage::Linear(layer), Kept::Linear(bound)) => {
                    layer.add_clipped(bound, slots, parameters, factors)?;
                }
                (Stage::Convolution(layer), Kept::Convolution(bound)) => {
                    layer.add_clipped(bound, slots, parameters, factors)?;
                }
                (Stage::Embedding(layer), _) => layer.add_clipped(slots, parameters, factors),
                (Stage::GroupNorm(layer), Kept::Moments(moments)) => {
                    layer.add_clipped(moments, parameters, factors);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes all convolutions find norms in the one way or the other; before the first batch.
    #[cfg(test)]
    pub(super) fn force_ghost(&mut self, ghost: bool) {
        for stage in &mut self.stages {
            if let Stage::Convolution(layer) = stage {
                layer.ghost = ghost;
            }
        }
    }

    /// Whether a layer unfolds windows.
    pub(super) fn has_convolutions(&self) -> bool {
        self.stages.iter().any(|stage| matches!(stage, Stage::Convolution(_)))
    }
}

struct Compiler<'a> {
    layout: &'a Layout,
    stages: Vec<Stage>,
    sizes: Vec<usize>,
}

impl Compiler<'_> {
    fn layers(&mut self, layers: &[Layer], slot: usize, shape: Shape) -> Result<(usize, Shape), TchError> {
        let mut at = (slot, shape);
        let mut rest = layers;
        // Pooling before ReLU: the two commute exactly, in values and in slopes, and this order is cheaper.
        while let Some((layer, after)) = rest.split_first() {
            (at, rest) = match (layer, after.split_first()) {
                (Layer::Relu, Some((pool @ Layer::MaxPool { .. }, after))) => {
                    let pooled = self.layer(pool, at.0, at.1)?;
                    (self.layer(layer, pooled.0, pooled.1)?, after)
                }
                _ => (self.layer(layer, at.0, at.1)?, after),
            };
        }
        Ok(at)
    }

    fn layer(&mut self, layer: &Layer, slot: usize, shape: Shape) -> Result<(usize, Shape), TchError> {
        let misfit = || TchError::Shape(format!("{layer:?} does not fit {shape:?}"));
        match layer {
            Layer::Flatten => match shape {
                // Of one pixel or one channel, both orders are the same.
                Shape::Image(image) if image.channels > 1 && image.height * image.width > 1 => {
                    let into = self.slot(image.values());
                    self.stages.push(Stage::Flatten { from: slot, into, image });
                    Ok((into, Shape::Flat(image.values())))
                }
                _ => Ok((slot, Shape::Flat(shape.values()))),
            },
            Layer::Linear { name, inputs, outputs } => {
                if shape.values() != *inputs {
                    return Err(misfit());
                }
                let output = self.slot(*outputs);
                let (weight, bias) = (self.range(name, "weight")?, self.range(name, "bias")?);
                let layer = Linear { input: slot, output, weight, bias, inputs: *inputs, outputs: *outputs };
                self.stages.push(Stage::Linear(layer));
                Ok((output, Shape::Flat(*outputs)))
            }
            Layer::Convolution { name, inputs, outputs, size, stride, padding } => {
                let Shape::Image(from) = shape else { return Err(misfit()) };
                let into =
                    window(from, (*size, *size), *stride, *padding).filter(|_| from.channels == *inputs);
                let into = Image { channels: *outputs, ..into.ok_or_else(misfit)? };
                let output = self.slot(into.values());
                let (weight, bias) = (self.range(name, "weight")?, self.range(name, "bias")?);
                let (size, stride, padding) = (*size, *stride, *padding);
                let ghost = false;
                let mut layer = Convolution {
                    input: slot,
                    output,
                    weight,
                    bias,
                    from,
                    into,
                    size,
                    stride,
                    padding,
                    ghost,
                };
                layer.ghost = layer.prefers_ghost();
                self.stages.push(Stage::Convolution(layer));
                Ok((output, Shape::Image(into)))
            }
            Layer::GroupNorm { name, channels, groups } => {
                // A row of features is an image of one pixel.
                let image = match shape {
                    Shape::Image(image) => image,
                    Shape::Flat(channels) => Image { height: 1, width: 1, channels },
                };
                if image.channels != *channels {
                    return Err(misfit());
                }
                let output = self.slot(image.values());
                let (weight, bias) = (self.range(name, "weight")?, self.range(name, "bias")?);
                let layer = GroupNorm { input: slot, output, weight, bias, image, groups: *groups };
                self.stages.push(Stage::GroupNorm(layer));
                Ok((output, shape))
            }
            Layer::LayerNorm { name, features } => {
                if shape != Shape::Flat(*features) {
                    return Err(misfit());
                }
                // One group of all the channels of an image of one pixel.
                let image = Image { height: 1, width: 1, channels: *features };
                let output = self.slot(*features);
                let (weight, bias) = (self.range(name, "weight")?, self.range(name, "bias")?);
                let layer = GroupNorm { input: slot, output, weight, bias, image, groups: 1 };
                self.stages.push(Stage::GroupNorm(layer));
                Ok((output, shape))
            }
            Layer::Embedding { name, vocabulary, width } => {
                let Shape::Flat(tokens) = shape else { return Err(misfit()) };
                let output = self.slot(tokens * width);
                let (weight, vocabulary, width) = (self.range(name, "weight")?, *vocabulary, *width);
                let layer = Embedding { input: slot, output, weight, tokens, vocabulary, width };
                self.stages.push(Stage::Embedding(layer));
                Ok((output, Shape::Flat(tokens * width)))
            }
            Layer::MaxPool { size, stride } => {
                self.pool(slot, shape, (*size, *size), *stride, Stage::MaxPool)
            }
            Layer::AveragePool { size, stride } => {
                self.pool(slot, shape, (*size, *size), *stride, Stage::AveragePool)
            }
            Layer::GlobalAveragePool => {
                let Shape::Image(image) = shape else { return Err(misfit()) };
                let pooled = self.pool(slot, shape, (image.height, image.width), 1, Stage::AveragePool)?;
                Ok((pooled.0, Shape::Flat(image.channels)))
            }
            Layer::Relu => self.in_place(slot, shape, |slot| Stage::Relu { slot }),
            Layer::Tanh => self.in_place(slot, shape, |slot| Stage::Tanh { slot }),
            Layer::Dropout { probability } => {
                let probability = *probability;
                self.in_place(slot, shape, |slot| Stage::Dropout { slot, probability })
            }
            Layer::Residual { body, shortcut } => {
                let fork = self.slot(shape.values());
                self.stages.push(Stage::Fork { from: slot, into: fork });
                let (from, _) = self.layers(shortcut, fork, shape)?;
                let (sum, shape) = self.layers(body, slot, shape)?;
                // With an empty body the sum would overwrite what was forked.
                let into = if sum == slot { self.copy(sum, shape) } else { self.free(sum, shape) };
                self.stages.push(Stage::Join { from, into });
                Ok((into, shape))
            }
        }
    }

    fn slot(&mut self, values: usize) -> usize {
        self.sizes.push(values);
        self.sizes.len() - 1
    }

    fn copy(&mut self, from: usize, shape: Shape) -> usize {
        let into = self.slot(shape.values());
        self.stages.push(Stage::Copy { from, into });
        into
    }

    /// A slot with the values of `slot` that may be changed in place: itself, unless a way back needs what it holds.
    fn free(&mut self, slot: usize, shape: Shape) -> usize {
        let needs = |stage: &Stage| match stage {
            Stage::Relu { slot: of } | Stage::Tanh { slot: of } => *of == slot,
            Stage::Linear(layer) => layer.input == slot,
            Stage::Convolution(layer) => layer.input == slot,
            Stage::GroupNorm(layer) => layer.input == slot,
            Stage::Embedding(layer) => layer.input == slot,
            _ => false,
        };
        if self.stages.iter().any(needs) { self.copy(slot, shape) } else { slot }
    }

    fn in_place(
        &mut self,
        slot: usize,
        shape: Shape,
        stage: impl FnOnce(usize) -> Stage,
    ) -> Result<(usize, Shape), TchError> {
        let slot = self.free(slot, shape);
        self.stages.push(stage(slot));
        Ok((slot, shape))
    }

    fn pool(
        &mut self,
        slot: usize,
        shape: Shape,
        size: (usize, usize),
        stride: usize,
        stage: fn(Pool) -> Stage,
    ) -> Result<(usize, Shape), TchError> {
        let misfit = || TchError::Shape(format!("a pool of {size:?} does not fit {shape:?}"));
        let Shape::Image(from) = shape else { return Err(misfit()) };
        let into = window(from, size, stride, 0).ok_or_else(misfit)?;
        let output = self.slot(into.values());
        let stage = stage(Pool { input: slot, output, from, into, window: size, stride });
        self.stages.push(stage);
        Ok((output, Shape::Image(into)))
    }

    fn range(&self, layer: &str, part: &str) -> Result<std::ops::Range<usize>, TchError> {
        let name = format!("{layer}.{part}");
        let tensor = self.layout.tensor(&name);
        Ok(tensor.ok_or_else(|| TchError::TensorNameNotFound(name, "the layout".into()))?.range())
    }
}

/// The image of the windows of `size` over `from`.
fn window(from: Image, size: (usize, usize), stride: usize, padding: usize) -> Option<Image> {
    let side =
        |length: usize, size: usize| Some((length + 2 * padding).checked_sub(size)?.checked_div(stride)? + 1);
    Some(Image {
        height: side(from.height, size.0)?,
        width: side(from.width, size.1)?,
        channels: from.channels,
    })
}
