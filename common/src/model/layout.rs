//! Where each named tensor lies in the flat vector, and how it starts.

use rand::RngExt;
use rand_distr::StandardNormal;

use crate::rng::{Purpose, Stream};

/// How a tensor's first values are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Start {
    /// Uniform in ±1/√fan_in: what PyTorch's `Linear` and `Conv2d` do for weights and biases.
    FanIn(usize),
    /// Normal with mean 0 and deviation 1: what PyTorch's `Embedding` does.
    Normal,
    /// The same value everywhere: normalisation layers.
    Constant(f32),
}

/// One named tensor of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    name: String,
    shape: Vec<usize>,
    offset: usize,
    start: Start,
}

impl Tensor {
    /// The tensor's name, such as `conv1.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its shape; a bias has one dimension.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Position of its first element in the flat vector.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its elements within the flat vector.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.elements()
    }
}

/// The tensors of a model, sorted by name: the one order that every party knows.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    tensors: Vec<Tensor>,
    parameters: usize,
}

impl Layout {
    pub(crate) fn new(mut named: Vec<(String, Vec<usize>, Start)>) -> Self {
        named.sort_by(|a, b| a.0.cmp(&b.0));
        let mut parameters = 0;
        let place = |(name, shape, start): (String, Vec<usize>, Start)| {
            let offset = parameters;
            parameters += shape.iter().product::<usize>();
            Tensor { name, shape, offset, start }
        };
        let tensors = named.into_iter().map(place).collect();
        Self { tensors, parameters }
    }

    /// The tensors, sorted by name.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        let at = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
        self.tensors.get(at)
    }

    /// Length of the flat vector.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// The first parameters of a run, drawn from the run's own stream in the order of the layout.
    pub fn initial(&self, seed: u64) -> Vec<f32> {
        let mut stream = Stream::new(seed, Purpose::Initialisation, 0, "");
        let mut values = Vec::with_capacity(self.parameters);
        for tensor in &self.tensors {
            match tensor.start {
                Start::Constant(value) => values.extend(std::iter::repeat_n(value, tensor.elements())),
                Start::Normal => {
                    let draw = || stream.sample::<f32, _>(StandardNormal);
                    values.extend(std::iter::repeat_with(draw).take(tensor.elements()));
                }
                Start::FanIn(fan_in) => {
                    let bound = 1.0 / (fan_in as f32).sqrt();
                    let draw = || (stream.random::<f32>() * 2.0 - 1.0) * bound;
                    values.extend(std::iter::repeat_with(draw).take(tensor.elements()));
                }
            }
        }
        values
    }
}
