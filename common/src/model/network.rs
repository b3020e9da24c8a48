//! A network as a list of layers: what an engine executes, what a layout is derived from, checked shape by shape.

use super::Layout;
use super::architecture::ArchitectureError;
use super::layout::Start;
use crate::limits::{CLASSES, EXAMPLE_VALUES, LAYER_WIDTH, MAX_POOL_SIZE, MODEL_PARAMETERS, WINDOW_SIZE};

/// One layer. Shapes are those of one example: `[features]` or `[channels, height, width]`.
///
/// A layer with a name owns the tensors `<name>.weight` and `<name>.bias`, shaped as in PyTorch.
#[derive(Debug, Clone, PartialEq)]
pub enum Layer {
    /// Any shape to `[features]`, in row-major order.
    Flatten,
    /// `[inputs]` to `[outputs]`: `W·x + b`, with a weight `[outputs, inputs]`.
    Linear {
        /// Name of its tensors.
        name: String,
        /// Features in.
        inputs: usize,
        /// Features out.
        outputs: usize,
    },
    /// Two-dimensional cross-correlation, with a weight `[outputs, inputs, size, size]`.
    Convolution {
        /// Name of its tensors.
        name: String,
        /// Channels in.
        inputs: usize,
        /// Channels out.
        outputs: usize,
        /// Side of the square window.
        size: usize,
        /// Step of the window, on both axes.
        stride: usize,
        /// Zeros added on each of the four sides.
        padding: usize,
    },
    /// Normalisation of each example over groups of channels (Wu and He 2018), ε = 1e-5, with a weight and a bias
    /// per channel.
    GroupNorm {
        /// Name of its tensors.
        name: String,
        /// Channels, in and out.
        channels: usize,
        /// Groups; a divisor of `channels`.
        groups: usize,
    },
    /// Normalisation of each example over all its features (Ba, Kiros and Hinton 2016), ε = 1e-5, with a weight and a
    /// bias per feature.
    LayerNorm {
        /// Name of its tensors.
        name: String,
        /// Features, in and out; from 2.
        features: usize,
    },
    /// Whole numbers below `vocabulary`, `[tokens]`, to the rows of its weight `[vocabulary, width]` that they name, one
    /// after another: `[tokens · width]`. It has no bias, and takes the data themselves.
    Embedding {
        /// Name of its tensor.
        name: String,
        /// How many numbers there are.
        vocabulary: usize,
        /// Values that stand for a number.
        width: usize,
    },
    /// `max(x, 0)`.
    Relu,
    /// Hyperbolic tangent.
    Tanh,
    /// Maximum over square windows, no padding; what does not fill a window is left out.
    MaxPool {
        /// Side of the window.
        size: usize,
        /// Step of the window.
        stride: usize,
    },
    /// Mean over square windows, no padding; what does not fill a window is left out.
    AveragePool {
        /// Side of the window.
        size: usize,
        /// Step of the window.
        stride: usize,
    },
    /// `[channels, height, width]` to `[channels]`: the mean of each channel.
    GlobalAveragePool,
    /// In training each value is zero with `probability`, else divided by `1 − probability`; the identity in
    /// evaluation (inverted dropout, Srivastava et al. 2014).
    Dropout {
        /// 0 to below 1.
        probability: f64,
    },
    /// `body(x) + shortcut(x)`.
    Residual {
        /// The layers of one branch.
        body: Vec<Layer>,
        /// The layers of the other; none is the identity.
        shortcut: Vec<Layer>,
    },
}

impl Layer {
    /// The layer's kind as a job file names it.
    pub fn kind(&self) -> &'static str {
        match self {
            Layer::Flatten => "flatten",
            Layer::Linear { .. } => "linear",
            Layer::Convolution { .. } => "convolution",
            Layer::GroupNorm { .. } => "group_norm",
            Layer::LayerNorm { .. } => "layer-norm",
            Layer::Embedding { .. } => "embedding",
            Layer::Relu => "relu",
            Layer::Tanh => "tanh",
            Layer::MaxPool { .. } => "max_pool",
            Layer::AveragePool { .. } => "average_pool",
            Layer::GlobalAveragePool => "global-average-pool",
            Layer::Dropout { .. } => "dropout",
            Layer::Residual { .. } => "residual",
        }
    }

    /// The shape that the layer makes of `input`; `position` names it in the error.
    pub(super) fn output(&self, input: &[usize], position: &str) -> Result<Vec<usize>, ArchitectureError> {
        let misfit = |misfit: String| ArchitectureError::Layer {
            position: position.to_owned(),
            kind: self.kind(),
            misfit,
        };
        let in_range = |name: &str, value: usize, least: usize, most: usize| {
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                Err(misfit(format!("{name} = {value}: {least} to {most} are possible")))
            }
        };
        let image = || match *input {
            [channels, height, width] => Ok((channels, height, width)),
            _ => Err(misfit(format!("takes [channels, height, width], but gets {input:?}"))),
        };
        let window = |length: usize, size: usize, stride: usize, padding: usize| {
            let rest = (length + 2 * padding).checked_sub(size);
            rest.map(|rest| rest / stride + 1).ok_or_else(|| {
                misfit(format!("a window of {size} does not fit into {input:?} with padding {padding}"))
            })
        };
        let output = match self {
            Layer::Flatten => vec![volume(input)?],
            Layer::Linear { inputs, outputs, .. } => {
                in_range("outputs", *outputs, 1, LAYER_WIDTH)?;
                match input {
                    [features] if features == inputs => vec![*outputs],
                    [features] => {
                        return Err(misfit(format!("takes {inputs} features, but gets {features}")));
                    }
                    _ => {
                        return Err(misfit(format!(
                            "takes [features], but gets {input:?}: put \"flatten\" before it"
                        )));
                    }
                }
            }
            Layer::Convolution { inputs, outputs, size, stride, padding, .. } => {
                in_range("channels", *outputs, 1, LAYER_WIDTH)?;
                in_range("size", *size, 1, WINDOW_SIZE)?;
                in_range("stride", *stride, 1, WINDOW_SIZE)?;
                in_range("padding", *padding, 0, WINDOW_SIZE)?;
                let (channels, height, width) = image()?;
                if channels != *inputs {
                    return Err(misfit(format!("takes {inputs} channels, but gets {channels}")));
                }
                let side = |length| window(length, *size, *stride, *padding);
                vec![*outputs, side(height)?, side(width)?]
            }
            Layer::GroupNorm { channels, groups, .. } => {
                if input.first() != Some(channels) {
                    return Err(misfit(format!("takes {channels} channels, but gets {input:?}")));
                }
                in_range("groups", *groups, 1, *channels)?;
                if !channels.is_multiple_of(*groups) {
                    return Err(misfit(format!("groups = {groups} does not divide {channels} channels")));
                }
                if volume(input)? == *groups {
                    return Err(misfit("each group would be a single value: give fewer groups".into()));
                }
                input.to_vec()
            }
            Layer::LayerNorm { features, .. } => match *input {
                [found] if found == *features && found > 1 => input.to_vec(),
                [found] => {
                    return Err(misfit(format!("takes {features} features, from 2, but gets {found}")));
                }
                _ => {
                    return Err(misfit(format!(
                        "takes [features], but gets {input:?}: put \"flatten\" before it, or use group_norm"
                    )));
                }
            },
            Layer::Embedding { vocabulary, width, .. } => {
                in_range("vocabulary", *vocabulary, 1, LAYER_WIDTH)?;
                in_range("width", *width, 1, LAYER_WIDTH)?;
                match *input {
                    [tokens] => vec![tokens.saturating_mul(*width)],
                    _ => return Err(misfit(format!("takes [tokens], but gets {input:?}"))),
                }
            }
            Layer::MaxPool { size, stride } | Layer::AveragePool { size, stride } => {
                let most = if matches!(self, Layer::MaxPool { .. }) { MAX_POOL_SIZE } else { WINDOW_SIZE };
                in_range("size", *size, 1, most)?;
                in_range("stride", *stride, 1, WINDOW_SIZE)?;
                let (channels, height, width) = image()?;
                let side = |length| window(length, *size, *stride, 0);
                vec![channels, side(height)?, side(width)?]
            }
            Layer::GlobalAveragePool => vec![image()?.0],
            Layer::Relu | Layer::Tanh => input.to_vec(),
            Layer::Dropout { probability } if (0.0..1.0).contains(probability) => input.to_vec(),
            Layer::Dropout { probability } => {
                return Err(misfit(format!("probability {probability}: 0 to below 1 is possible")));
            }
            Layer::Residual { body, shortcut } => {
                let branch = |name: &str, layers: &[Layer]| {
                    layers.iter().enumerate().try_fold(input.to_vec(), |shape, (index, layer)| {
                        layer.output(&shape, &below(position, name, index))
                    })
                };
                let (body, shortcut) = (branch("body", body)?, branch("shortcut", shortcut)?);
                if body != shortcut {
                    return Err(misfit(format!(
                        "its body yields {body:?} and its shortcut {shortcut:?}: they must be equal"
                    )));
                }
                body
            }
        };
        volume(&output)?;
        Ok(output)
    }
}

impl Layer {
    /// Whether it is, or holds, an embedding.
    fn embeds(&self) -> bool {
        match self {
            Layer::Embedding { .. } => true,
            Layer::Residual { body, shortcut } => body.iter().chain(shortcut).any(Layer::embeds),
            _ => false,
        }
    }
}

/// The position of the layer at `index` (from 0) in a branch of a residual layer.
pub(super) fn below(position: &str, branch: &str, index: usize) -> String {
    format!("{position}, {branch} {}", index + 1)
}

/// The position of the layer at `index` (from 0) of the whole list.
pub(super) fn at(index: usize) -> String {
    format!("layer {}", index + 1)
}

/// The values of one example of `shape`, at most [`EXAMPLE_VALUES`].
fn volume(shape: &[usize]) -> Result<usize, ArchitectureError> {
    let volume = shape.iter().try_fold(1usize, |product, side| product.checked_mul(*side));
    volume.filter(|volume| *volume <= EXAMPLE_VALUES).ok_or(ArchitectureError::ExampleTooLarge)
}

/// A whole network: every layer takes what the one before it yields, and the last yields a value per class.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    inputs: Vec<usize>,
    classes: usize,
    layers: Vec<Layer>,
}

impl Network {
    /// Checks `layers` one after another, from an example of shape `inputs` to `classes` values.
    pub(super) fn new(
        inputs: &[usize],
        classes: usize,
        layers: Vec<Layer>,
    ) -> Result<Self, ArchitectureError> {
        let mut shape = inputs.to_vec();
        for (index, layer) in layers.iter().enumerate() {
            shape = layer.output(&shape, &at(index))?;
            if layer.embeds() && (index > 0 || matches!(layer, Layer::Residual { .. })) {
                return Err(ArchitectureError::Layer {
                    position: at(index),
                    kind: "embedding",
                    misfit: "takes numbers of the data: it can only be the first layer".into(),
                });
            }
        }
        if shape != [classes] {
            return Err(match layers.last() {
                Some(layer) => ArchitectureError::Layer {
                    position: at(layers.len() - 1),
                    kind: layer.kind(),
                    misfit: format!(
                        "yields {shape:?}, but the last layer must yield [{classes}], a value per class"
                    ),
                },
                None => ArchitectureError::NoLayers,
            });
        }
        let network = Self { inputs: inputs.to_vec(), classes, layers };
        let size = |(_, shape, _): &Declared| {
            shape.iter().fold(1u64, |product, side| product.saturating_mul(*side as u64))
        };
        let parameters = network.declared().iter().map(size).fold(0, u64::saturating_add);
        match parameters {
            0 => Err(ArchitectureError::NoParameters),
            1..=MODEL_PARAMETERS => Ok(network),
            _ => Err(ArchitectureError::TooLarge),
        }
    }

    /// Shape of one example.
    pub fn inputs(&self) -> &[usize] {
        &self.inputs
    }

    /// Values that the last layer yields: the logits of the classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// The layers, in the order of their execution.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Where each layer's tensors lie in the model's flat vector, and how they start.
    pub fn layout(&self) -> Layout {
        Layout::new(self.declared())
    }

    /// The tensors of all layers, before they are sorted.
    fn declared(&self) -> Vec<Declared> {
        let mut tensors = Vec::new();
        declare(&self.layers, &mut tensors);
        tensors
    }
}

type Declared = (String, Vec<usize>, Start);

fn declare(layers: &[Layer], into: &mut Vec<Declared>) {
    let mut own = |name: &str, weight: Vec<usize>, outputs: usize, start: [Start; 2]| {
        let [weight_start, bias_start] = start;
        into.push((format!("{name}.weight"), weight, weight_start));
        into.push((format!("{name}.bias"), vec![outputs], bias_start));
    };
    for layer in layers {
        match layer {
            Layer::Linear { name, inputs, outputs } => {
                own(name, vec![*outputs, *inputs], *outputs, [Start::FanIn(*inputs); 2]);
            }
            Layer::Convolution { name, inputs, outputs, size, .. } => {
                let start = [Start::FanIn(inputs * size * size); 2];
                own(name, vec![*outputs, *inputs, *size, *size], *outputs, start);
            }
            Layer::GroupNorm { name, channels: own_values, .. }
            | Layer::LayerNorm { name, features: own_values } => {
                let start = [Start::Constant(1.0), Start::Constant(0.0)];
                own(name, vec![*own_values], *own_values, start);
            }
            _ => {}
        }
    }
    for layer in layers {
        match layer {
            Layer::Embedding { name, vocabulary, width } => {
                into.push((format!("{name}.weight"), vec![*vocabulary, *width], Start::Normal));
            }
            Layer::Residual { body, shortcut } => {
                declare(body, into);
                declare(shortcut, into);
            }
            _ => {}
        }
    }
}

/// Refuses an example shape or a number of classes that no network takes.
pub(super) fn check_ends(inputs: &[usize], classes: usize) -> Result<(), ArchitectureError> {
    if inputs.is_empty() || inputs.len() > 3 || inputs.iter().any(|size| !(1..=65_536).contains(size)) {
        return Err(ArchitectureError::Inputs(inputs.to_vec()));
    }
    if !(2..=CLASSES).contains(&classes) {
        return Err(ArchitectureError::Classes(classes));
    }
    Ok(())
}
