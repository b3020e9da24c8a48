//! The same networks in double precision on libtorch's own layers and autograd: what the engine is compared with.

use std::sync::atomic::AtomicBool;

use tch::{Kind, Reduction, Tensor};

use tributary_common::model::{Layer, Layout};
use tributary_common::rng::Stream;

/// Loss (the mean) and gradient of a batch, in the order of the layout.
pub(super) fn gradient(
    layers: &[Layer],
    inputs: &[usize],
    layout: &Layout,
    model: &[f32],
    features: &[f32],
    labels: &[i64],
    dropout: Option<&mut Stream>,
) -> (f64, Vec<f64>) {
    let leaf = |tensor: &tributary_common::model::Tensor| {
        let shape: Vec<i64> = tensor.shape().iter().map(|size| *size as i64).collect();
        let values = Tensor::from_slice(&model[tensor.range()]).to_kind(Kind::Double).view(shape.as_slice());
        (tensor.name().to_owned(), values.set_requires_grad(true))
    };
    let leaves: Vec<(String, Tensor)> = layout.tensors().iter().map(leaf).collect();
    let shape: Vec<i64> =
        std::iter::once(labels.len()).chain(inputs.iter().copied()).map(|s| s as i64).collect();
    let batch = Tensor::from_slice(features).to_kind(Kind::Double).view(shape.as_slice());
    let mut reference = Reference { leaves: &leaves, dropout };
    let logits = reference.run(layers, batch);
    let loss =
        logits.cross_entropy_loss::<Tensor>(&Tensor::from_slice(labels), None, Reduction::Mean, -100, 0.0);
    let tensors: Vec<&Tensor> = leaves.iter().map(|(_, tensor)| tensor).collect();
    let gradients = Tensor::run_backward(&[&loss], &tensors, false, false);
    let flat = gradients.iter().flat_map(|gradient| Vec::<f64>::try_from(gradient.flatten(0, -1)).unwrap());
    (loss.double_value(&[]), flat.collect())
}

struct Reference<'a> {
    leaves: &'a [(String, Tensor)],
    dropout: Option<&'a mut Stream>,
}

impl Reference<'_> {
    fn of(&self, name: &str, part: &str) -> &Tensor {
        let name = format!("{name}.{part}");
        &self.leaves.iter().find(|(leaf, _)| *leaf == name).unwrap().1
    }

    fn run(&mut self, layers: &[Layer], batch: Tensor) -> Tensor {
        layers.iter().fold(batch, |x, layer| self.layer(layer, x))
    }

    fn layer(&mut self, layer: &Layer, x: Tensor) -> Tensor {
        let square = |size: usize| [size as i64, size as i64];
        match layer {
            Layer::Flatten => x.flatten(1, -1),
            // Rows of any shape, as the layout's `[out, in]` takes them.
            Layer::Linear { name, .. } => {
                x.flatten(1, -1).linear(self.of(name, "weight"), Some(self.of(name, "bias")))
            }
            Layer::Convolution { name, stride, padding, .. } => {
                let (weight, bias) = (self.of(name, "weight"), self.of(name, "bias"));
                x.conv2d(weight, Some(bias), square(*stride), square(*padding), [1, 1], 1)
            }
            Layer::GroupNorm { name, groups, .. } => {
                let (weight, bias) = (self.of(name, "weight"), self.of(name, "bias"));
                x.group_norm(*groups as i64, Some(weight), Some(bias), 1e-5, false)
            }
            Layer::LayerNorm { name, features } => {
                let (weight, bias) = (self.of(name, "weight"), self.of(name, "bias"));
                x.layer_norm([*features as i64], Some(weight), Some(bias), 1e-5, false)
            }
            Layer::Embedding { name, .. } => {
                let rows =
                    Tensor::embedding(self.of(name, "weight"), &x.to_kind(Kind::Int64), -1, false, false);
                rows.flatten(1, -1)
            }
            Layer::Relu => x.relu(),
            Layer::Tanh => x.tanh(),
            Layer::MaxPool { size, stride } => {
                x.max_pool2d(square(*size), square(*stride), [0, 0], [1, 1], false)
            }
            Layer::AveragePool { size, stride } => {
                x.avg_pool2d(square(*size), square(*stride), [0, 0], false, true, None)
            }
            Layer::GlobalAveragePool => x.mean_dim([2i64, 3].as_slice(), false, None),
            Layer::Dropout { probability } => match &mut self.dropout {
                // Only on flat values: those of an image lie in another order here.
                Some(stream) => {
                    let mut factors = vec![1.0f32; x.numel()];
                    super::elementwise::dropout(&mut factors, *probability, stream, &mut Vec::new());
                    x.shallow_clone() * Tensor::from_slice(&factors).to_kind(Kind::Double).view_as(&x)
                }
                None => x,
            },
            Layer::Residual { body, shortcut } => {
                let other = self.run(shortcut, x.shallow_clone());
                self.run(body, x) + other
            }
        }
    }
}

/// Never set.
pub(super) static GO: AtomicBool = AtomicBool::new(false);
