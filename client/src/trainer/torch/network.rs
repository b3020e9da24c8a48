//! The built-in architectures as lists of layers over the tensors of a layout.

use tch::{TchError, Tensor};

use tributary_common::job::Model;
use tributary_common::model::{Architecture, GROUP_NORM_GROUPS, Layout};

/// GroupNorm's ε, PyTorch's default.
const GROUP_NORM_EPSILON: f64 = 1e-5;

/// One layer; `weight` and `bias` are positions in the layout's tensors.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Layer {
    /// `[n, …]` to `[n, features]`.
    Flatten,
    /// The same `[n, c, h, w]` with its memory in the order n, h, w, c, which pooling is faster on.
    ChannelsLast,
    /// `x·Wᵀ + b`.
    Linear { weight: usize, bias: usize },
    /// Two-dimensional convolution with the same stride and zero padding on both axes.
    Convolution { weight: usize, bias: usize, stride: i64, padding: i64 },
    /// Normalisation over [`GROUP_NORM_GROUPS`] groups of channels.
    GroupNorm { weight: usize, bias: usize },
    /// `max(x, 0)`.
    Relu,
    /// Maximum over square windows.
    MaxPool { size: i64, stride: i64 },
    /// `[n, c, h, w]` to `[n, c]`.
    GlobalAveragePool,
    /// `body(x) + shortcut(x)`; an empty shortcut is the identity.
    Residual { body: Vec<Layer>, shortcut: Vec<Layer> },
}

/// One architecture, ready to compute.
pub(super) struct Network {
    layers: Vec<Layer>,
}

impl Network {
    /// The network of `model`, whose tensors lie as in `layout`.
    ///
    /// Pooling comes before ReLU: the two commute exactly, in values and in gradients, and this order is cheaper.
    pub(super) fn new(model: &Model, layout: &Layout) -> Result<Self, TchError> {
        use Layer::{ChannelsLast, Flatten, GlobalAveragePool, MaxPool, Relu};
        let named = Named(layout);
        let layers = match model.architecture {
            Architecture::Logistic => vec![Flatten, named.linear("linear")?],
            Architecture::Mlp | Architecture::TwoNn => {
                let mut layers = vec![Flatten];
                for number in 1..=layout.tensors().len() / 2 {
                    if number > 1 {
                        layers.push(Relu);
                    }
                    layers.push(named.linear(&format!("linear{number}"))?);
                }
                layers
            }
            Architecture::SmallCnn => vec![
                named.convolution("conv1", 2, 2)?,
                ChannelsLast,
                MaxPool { size: 2, stride: 1 },
                Relu,
                named.convolution("conv2", 2, 0)?,
                MaxPool { size: 2, stride: 1 },
                Relu,
                Flatten,
                named.linear("linear1")?,
                Relu,
                named.linear("linear2")?,
            ],
            Architecture::McmahanCnn => vec![
                named.convolution("conv1", 1, 2)?,
                MaxPool { size: 2, stride: 2 },
                Relu,
                named.convolution("conv2", 1, 2)?,
                MaxPool { size: 2, stride: 2 },
                Relu,
                Flatten,
                named.linear("linear1")?,
                Relu,
                named.linear("linear2")?,
            ],
            Architecture::Lenet => vec![
                named.convolution("conv1", 1, 2)?,
                MaxPool { size: 2, stride: 2 },
                Relu,
                named.convolution("conv2", 1, 0)?,
                MaxPool { size: 2, stride: 2 },
                Relu,
                Flatten,
                named.linear("linear1")?,
                Relu,
                named.linear("linear2")?,
                Relu,
                named.linear("linear3")?,
            ],
            Architecture::Resnet8Gn => {
                let mut layers = vec![named.convolution("stem", 1, 1)?, named.group_norm("stem_norm")?, Relu];
                for (stage, stride) in [(1, 1), (2, 2), (3, 2)] {
                    let name = |part: &str| format!("stage{stage}.{part}");
                    let body = vec![
                        named.convolution(&name("conv1"), stride, 1)?,
                        named.group_norm(&name("norm1"))?,
                        Relu,
                        named.convolution(&name("conv2"), 1, 1)?,
                        named.group_norm(&name("norm2"))?,
                    ];
                    // The first stage keeps size and channels, so its shortcut is the identity.
                    let shortcut = match stride {
                        1 => Vec::new(),
                        _ => vec![named.convolution(&name("shortcut"), stride, 0)?],
                    };
                    layers.extend([Layer::Residual { body, shortcut }, Relu]);
                }
                layers.extend([GlobalAveragePool, named.linear("linear")?]);
                layers
            }
        };
        Ok(Self { layers })
    }

    /// The layers, in order.
    #[cfg(test)]
    pub(super) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Logits `[n, classes]` of a batch `[n, …inputs]`, with `parameters` in the order of the layout.
    pub(super) fn forward(&self, parameters: &[Tensor], batch: Tensor) -> Result<Tensor, TchError> {
        run(&self.layers, parameters, batch)
    }
}

fn run(layers: &[Layer], parameters: &[Tensor], batch: Tensor) -> Result<Tensor, TchError> {
    layers.iter().try_fold(batch, |input, layer| layer.forward(parameters, &input))
}

impl Layer {
    fn forward(&self, parameters: &[Tensor], input: &Tensor) -> Result<Tensor, TchError> {
        let of = |index: usize| {
            parameters.get(index).ok_or_else(|| TchError::Shape(format!("there is no tensor {index}")))
        };
        match *self {
            Layer::Flatten => input.f_flatten(1, -1),
            Layer::ChannelsLast => input.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_permute([0, 3, 1, 2]),
            Layer::Linear { weight, bias } => input.f_linear(of(weight)?, Some(of(bias)?)),
            Layer::Convolution { weight, bias, stride, padding } => {
                input.f_conv2d(of(weight)?, Some(of(bias)?), [stride, stride], [padding, padding], [1, 1], 1)
            }
            Layer::GroupNorm { weight, bias } => input.f_group_norm(
                GROUP_NORM_GROUPS as i64,
                Some(of(weight)?),
                Some(of(bias)?),
                GROUP_NORM_EPSILON,
                false,
            ),
            Layer::Relu => input.f_relu(),
            Layer::MaxPool { size, stride } => {
                input.f_max_pool2d([size, size], [stride, stride], [0, 0], [1, 1], false)
            }
            Layer::GlobalAveragePool => input.f_mean_dim([2i64, 3].as_slice(), false, None),
            Layer::Residual { ref body, ref shortcut } => {
                let skipped = run(shortcut, parameters, input.shallow_clone())?;
                run(body, parameters, input.shallow_clone())?.f_add(&skipped)
            }
        }
    }
}

/// Layers by the names of their tensors.
struct Named<'a>(&'a Layout);

impl Named<'_> {
    fn position(&self, layer: &str, part: &str) -> Result<usize, TchError> {
        let name = format!("{layer}.{part}");
        let found = self.0.tensors().binary_search_by(|tensor| tensor.name().cmp(name.as_str()));
        found.map_err(|_| TchError::TensorNameNotFound(name, "the architecture's layout".into()))
    }

    fn linear(&self, name: &str) -> Result<Layer, TchError> {
        Ok(Layer::Linear { weight: self.position(name, "weight")?, bias: self.position(name, "bias")? })
    }

    fn convolution(&self, name: &str, stride: i64, padding: i64) -> Result<Layer, TchError> {
        let (weight, bias) = (self.position(name, "weight")?, self.position(name, "bias")?);
        Ok(Layer::Convolution { weight, bias, stride, padding })
    }

    fn group_norm(&self, name: &str) -> Result<Layer, TchError> {
        Ok(Layer::GroupNorm { weight: self.position(name, "weight")?, bias: self.position(name, "bias")? })
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::{blobs, every_architecture};
    use super::super::batch::Batch;
    use super::super::parameters::Parameters;
    use super::super::{cross_entropy, threads};
    use super::*;

    /// The architectures are published with ReLU before pooling and say nothing of memory order.
    #[test]
    fn pooling_before_relu_changes_nothing() {
        threads::one_intra_op_thread();
        let with_both = |job: &tributary_common::job::Job| {
            ["small-cnn", "mcmahan-cnn", "lenet"].contains(&job.model.architecture.name())
        };
        for job in every_architecture().into_iter().filter(with_both) {
            let layout = job.layout().unwrap();
            let fast = Network::new(&job.model, &layout).unwrap();
            let mut published = Network { layers: fast.layers.clone() };
            for index in 1..published.layers.len() {
                if matches!(published.layers[index - 1..=index], [Layer::MaxPool { .. }, Layer::Relu]) {
                    published.layers.swap(index - 1, index);
                }
            }
            let moved = published.layers.iter().zip(&fast.layers).filter(|(a, b)| a != b).count();
            assert_eq!(moved, 4);
            let shard = blobs(&job.model, 5, 0.5);
            let mut parameters = Parameters::new(&layout).unwrap();
            parameters.values_mut().copy_from_slice(&layout.initial(1));
            let slopes = |network: &Network| {
                let (features, labels) = Batch::default()
                    .gather(&shard.examples, &job.model.inputs, shard.indices.iter())
                    .unwrap();
                let logits = network.forward(parameters.leaves(), features).unwrap();
                let loss = cross_entropy(&logits, &labels, tch::Reduction::Mean).unwrap();
                Tensor::f_run_backward(&[loss], parameters.leaves(), false, false).unwrap()
            };
            for (fast, published) in slopes(&fast).iter().zip(slopes(&published)) {
                assert_eq!(fast.size(), published.size());
                assert!(fast.equal(&published), "{}", job.model.architecture.name());
            }
        }
    }
}
