//! A described network as a list of libtorch operations over the tensors of a layout.

use tch::{TchError, Tensor};

use tributary_common::job::Model;
use tributary_common::model::{self, Layout};

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
    /// Normalisation over groups of channels.
    GroupNorm { weight: usize, bias: usize, groups: i64 },
    /// `max(x, 0)`.
    Relu,
    /// Hyperbolic tangent.
    Tanh,
    /// Maximum over square windows.
    MaxPool { size: i64, stride: i64 },
    /// Mean over square windows.
    AveragePool { size: i64, stride: i64 },
    /// `[n, c, h, w]` to `[n, c]`.
    GlobalAveragePool,
    /// `body(x) + shortcut(x)`; an empty shortcut is the identity.
    Residual { body: Vec<Layer>, shortcut: Vec<Layer> },
}

/// One network, ready to compute.
pub(super) struct Network {
    layers: Vec<Layer>,
}

impl Network {
    /// The network of `model`, whose tensors lie as in `layout`.
    ///
    /// Pooling comes before ReLU: the two commute exactly, in values and in gradients, and this order is cheaper.
    pub(super) fn new(model: &Model, layout: &Layout) -> Result<Self, TchError> {
        let described = model.network().map_err(|error| TchError::Torch(error.to_string()))?;
        let mut layers = Named(layout).layers(described.layers())?;
        // Windows that overlap are pooled faster in this order of memory; later layers keep it.
        let overlapping = |layer: &Layer| matches!(layer, Layer::MaxPool { size, stride } if stride < size);
        if let Some(first) = layers.iter().position(overlapping) {
            layers.insert(first, Layer::ChannelsLast);
        }
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
            Layer::GroupNorm { weight, bias, groups } => {
                input.f_group_norm(groups, Some(of(weight)?), Some(of(bias)?), GROUP_NORM_EPSILON, false)
            }
            Layer::Relu => input.f_relu(),
            Layer::Tanh => input.f_tanh(),
            Layer::MaxPool { size, stride } => {
                input.f_max_pool2d([size, size], [stride, stride], [0, 0], [1, 1], false)
            }
            Layer::AveragePool { size, stride } => {
                input.f_avg_pool2d([size, size], [stride, stride], [0, 0], false, true, None)
            }
            Layer::GlobalAveragePool => input.f_mean_dim([2i64, 3].as_slice(), false, None),
            Layer::Residual { ref body, ref shortcut } => {
                let skipped = run(shortcut, parameters, input.shallow_clone())?;
                run(body, parameters, input.shallow_clone())?.f_add(&skipped)
            }
        }
    }
}

/// A layout to find the tensors of described layers in.
struct Named<'a>(&'a Layout);

impl Named<'_> {
    fn position(&self, layer: &str, part: &str) -> Result<usize, TchError> {
        let name = format!("{layer}.{part}");
        let found = self.0.tensors().binary_search_by(|tensor| tensor.name().cmp(name.as_str()));
        found.map_err(|_| TchError::TensorNameNotFound(name, "the architecture's layout".into()))
    }

    fn layers(&self, described: &[model::Layer]) -> Result<Vec<Layer>, TchError> {
        let mut layers: Vec<Layer> =
            described.iter().map(|layer| self.layer(layer)).collect::<Result<_, _>>()?;
        for index in 1..layers.len() {
            if let Some(pair @ [Layer::Relu, Layer::MaxPool { .. }]) = layers.get_mut(index - 1..=index) {
                pair.swap(0, 1);
            }
        }
        Ok(layers)
    }

    fn layer(&self, described: &model::Layer) -> Result<Layer, TchError> {
        let tensors =
            |name: &str| Ok::<_, TchError>((self.position(name, "weight")?, self.position(name, "bias")?));
        Ok(match described {
            model::Layer::Flatten => Layer::Flatten,
            model::Layer::Linear { name, .. } => {
                let (weight, bias) = tensors(name)?;
                Layer::Linear { weight, bias }
            }
            model::Layer::Convolution { name, stride, padding, .. } => {
                let (weight, bias) = tensors(name)?;
                Layer::Convolution { weight, bias, stride: *stride as i64, padding: *padding as i64 }
            }
            model::Layer::GroupNorm { name, groups, .. } => {
                let (weight, bias) = tensors(name)?;
                Layer::GroupNorm { weight, bias, groups: *groups as i64 }
            }
            model::Layer::Relu => Layer::Relu,
            model::Layer::Tanh => Layer::Tanh,
            model::Layer::MaxPool { size, stride } => {
                Layer::MaxPool { size: *size as i64, stride: *stride as i64 }
            }
            model::Layer::AveragePool { size, stride } => {
                Layer::AveragePool { size: *size as i64, stride: *stride as i64 }
            }
            model::Layer::GlobalAveragePool => Layer::GlobalAveragePool,
            model::Layer::Dropout { .. } => {
                return Err(TchError::Torch("dropout layers are not available yet".into()));
            }
            model::Layer::Residual { body, shortcut } => {
                Layer::Residual { body: self.layers(body)?, shortcut: self.layers(shortcut)? }
            }
        })
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
