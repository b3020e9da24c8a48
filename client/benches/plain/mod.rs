//! The floor of the benchmarks: local SGD as one would write it with tch, on autograd, one thread, nothing kept but
//! the data and the leaves.

use tch::{Kind, Reduction, Tensor};
use tributary_client::data::Split;
use tributary_client::shard::Shard;
use tributary_common::job::Job;
use tributary_common::model::{Layer, Layout};

/// Local SGD as one would write it with tch.
pub(crate) struct Plain {
    layers: Vec<Layer>,
    names: Vec<String>,
    leaves: Vec<Tensor>,
    ranges: Vec<std::ops::Range<usize>>,
    features: Tensor,
    labels: Tensor,
    batch: usize,
    rate: f64,
}

impl Plain {
    /// For the model of `job` over `data`, in memory once.
    pub(crate) fn new(job: &Job, layout: &Layout, data: &Split) -> Self {
        let leaf = |tensor: &tributary_common::model::Tensor| {
            let shape: Vec<i64> = tensor.shape().iter().map(|size| *size as i64).collect();
            Tensor::zeros(shape.as_slice(), (Kind::Float, tch::Device::Cpu)).set_requires_grad(true)
        };
        Self {
            layers: job.model.network().expect("a built-in network").layers().to_vec(),
            names: layout.tensors().iter().map(|tensor| tensor.name().to_owned()).collect(),
            leaves: layout.tensors().iter().map(leaf).collect(),
            ranges: layout.tensors().iter().map(|tensor| tensor.range()).collect(),
            features: Tensor::from_slice(&data.features).view([-1, 1, 28, 28]),
            labels: Tensor::from_slice(&data.labels),
            batch: job.train.batch_size as usize,
            rate: job.train.learning_rate,
        }
    }

    /// Loads `model` and takes one epoch over `shard`.
    pub(crate) fn train(&mut self, model: &[f32], shard: &Shard) {
        {
            let _no_graph = tch::no_grad_guard();
            for (leaf, range) in self.leaves.iter_mut().zip(&self.ranges) {
                leaf.copy_(&Tensor::from_slice(&model[range.clone()]).view_as(leaf));
            }
        }
        for batch in shard.indices.chunks(self.batch) {
            let indices: Vec<i64> = batch.iter().map(|index| i64::from(*index)).collect();
            let indices = Tensor::from_slice(&indices);
            let (x, y) = (self.features.index_select(0, &indices), self.labels.index_select(0, &indices));
            let logits = self.forward(&self.layers, x);
            let loss = logits.cross_entropy_loss::<Tensor>(&y, None, Reduction::Mean, -100, 0.0);
            let gradients = Tensor::run_backward(&[loss], &self.leaves, false, false);
            let _no_graph = tch::no_grad_guard();
            for (leaf, mut gradient) in self.leaves.iter_mut().zip(gradients) {
                let _ = leaf.f_sub_(&gradient.g_mul_scalar_(self.rate)).expect("equal shapes");
            }
        }
    }

    fn of(&self, name: &str, part: &str) -> &Tensor {
        let name = format!("{name}.{part}");
        let at = self.names.iter().position(|other| *other == name).expect("a tensor of the layout");
        &self.leaves[at]
    }

    fn forward(&self, layers: &[Layer], x: Tensor) -> Tensor {
        let mut rest = layers;
        let mut x = x;
        while let Some((layer, after)) = rest.split_first() {
            rest = after;
            // Pooling before ReLU, in channels-last order where that is faster.
            if let (Layer::Relu, Some((pool @ Layer::MaxPool { stride: 1, .. }, after))) =
                (layer, after.split_first())
            {
                let last = x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
                x = self.layer(pool, last).relu();
                rest = after;
            } else {
                x = self.layer(layer, x);
            }
        }
        x
    }

    fn layer(&self, layer: &Layer, x: Tensor) -> Tensor {
        let square = |size: usize| [size as i64, size as i64];
        match layer {
            Layer::Flatten => x.flatten(1, -1),
            Layer::Linear { name, .. } => x.linear(self.of(name, "weight"), Some(self.of(name, "bias"))),
            Layer::Convolution { name, stride, padding, .. } => {
                let (weight, bias) = (self.of(name, "weight"), self.of(name, "bias"));
                x.conv2d(weight, Some(bias), square(*stride), square(*padding), [1, 1], 1)
            }
            Layer::GroupNorm { name, groups, .. } => {
                let (weight, bias) = (self.of(name, "weight"), self.of(name, "bias"));
                x.group_norm(*groups as i64, Some(weight), Some(bias), 1e-5, false)
            }
            Layer::Relu => x.relu(),
            Layer::MaxPool { size, stride } => {
                x.max_pool2d(square(*size), square(*stride), [0, 0], [1, 1], false)
            }
            Layer::GlobalAveragePool => x.mean_dim([2i64, 3].as_slice(), false, None),
            Layer::Residual { body, shortcut } => {
                let other = self.forward(shortcut, x.shallow_clone());
                self.forward(body, x) + other
            }
            other => unreachable!("no benchmarked network has {other:?}"),
        }
    }
}
