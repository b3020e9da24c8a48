//! A model's parameters as the engine computes with them, and the way from and to the order of the layout.

use std::ops::Range;

use tch::TchError;

use tributary_common::model::Layout;

use super::memory::Memory;

/// The flat vectors of one model: its values and, where the update rule needs them, their gradient.
///
/// The engine keeps images as height, width, channel, so it keeps a convolution's weight as
/// `[out, height, width, in]` where the layout has PyTorch's `[out, in, height, width]`. Nothing else differs.
pub(super) struct Parameters {
    /// The values.
    pub(super) values: Memory,
    /// The gradient of the last step; empty unless asked for.
    pub(super) gradient: Memory,
    /// The values at the start of a client's training; empty unless asked for.
    pub(super) start: Vec<f32>,
    reordered: Vec<Reordered>,
}

/// A convolution's weight of more than one input channel and pixel.
struct Reordered {
    range: Range<usize>,
    inputs: usize,
    area: usize,
}

impl Reordered {
    /// The position in the layout's order of each value of `range`, in the engine's order.
    fn positions(&self) -> impl Iterator<Item = usize> + use<> {
        let (inputs, area, start) = (self.inputs, self.area, self.range.start);
        let outputs = self.range.len() / (inputs * area).max(1);
        (0..outputs).flat_map(move |output| {
            let first = start + output * inputs * area;
            (0..area).flat_map(move |pixel| (0..inputs).map(move |input| first + input * area + pixel))
        })
    }
}

impl Parameters {
    /// Zeros for a model laid out as `layout`.
    pub(super) fn new(layout: &Layout) -> Result<Self, TchError> {
        let reordered = |tensor: &tributary_common::model::Tensor| match *tensor.shape() {
            [_, inputs, height, width] if inputs > 1 && height * width > 1 => {
                Some(Reordered { range: tensor.range(), inputs, area: height * width })
            }
            _ => None,
        };
        Ok(Self {
            values: Memory::zeros(layout.parameters())?,
            gradient: Memory::zeros(0)?,
            start: Vec::new(),
            reordered: layout.tensors().iter().filter_map(reordered).collect(),
        })
    }

    /// Length of the flat vector.
    pub(super) fn len(&self) -> usize {
        self.values.values().len()
    }

    /// Takes a model, in the order of the layout.
    pub(super) fn load(&mut self, model: &[f32]) {
        let Self { values, reordered, .. } = self;
        reorder(reordered, model, values.values_mut());
    }

    /// Makes room for the gradient; to be called before a network is bound to it.
    pub(super) fn make_gradient(&mut self) -> Result<(), TchError> {
        // Made once: other networks may be bound to it.
        if self.gradient.values().len() != self.len() {
            self.gradient = Memory::zeros(self.len())?;
        }
        Ok(())
    }

    /// Keeps the present values as the start.
    pub(super) fn keep_start(&mut self) {
        self.start.clear();
        self.start.extend_from_slice(self.values.values());
    }

    /// The values less `model`, in the order of the layout.
    pub(super) fn change_since(&self, model: &[f32]) -> Vec<f32> {
        let values = self.values.values();
        let mut change: Vec<f32> = values.iter().zip(model).map(|(new, old)| new - old).collect();
        for part in &self.reordered {
            let from = values.get(part.range.clone()).unwrap_or_default();
            for (new, at) in from.iter().zip(part.positions()) {
                if let (Some(change), Some(old)) = (change.get_mut(at), model.get(at)) {
                    *change = new - old;
                }
            }
        }
        change
    }

    /// `vector` of the engine's order in the order of the layout.
    pub(super) fn to_layout(&self, vector: &[f32], into: &mut Vec<f32>) {
        into.clear();
        into.extend_from_slice(vector);
        for part in &self.reordered {
            for (value, at) in vector.get(part.range.clone()).unwrap_or_default().iter().zip(part.positions())
            {
                into.get_mut(at).into_iter().for_each(|into| *into = *value);
            }
        }
    }

    /// `vector`, of the layout's order, in the engine's; both as long as the model.
    pub(super) fn to_engine(&self, vector: &[f32], into: &mut [f32]) {
        reorder(&self.reordered, vector, into);
    }

    /// Takes a gradient in the order of the layout.
    pub(super) fn set_gradient(&mut self, gradient: &[f32]) {
        let Self { gradient: into, reordered, .. } = self;
        reorder(reordered, gradient, into.values_mut());
    }
}

/// `vector`, of the layout's order, in the engine's.
fn reorder(reordered: &[Reordered], vector: &[f32], into: &mut [f32]) {
    into.iter_mut().zip(vector).for_each(|(into, value)| *into = *value);
    for part in reordered {
        let into = into.get_mut(part.range.clone()).unwrap_or_default();
        for (value, at) in into.iter_mut().zip(part.positions()) {
            *value = vector.get(at).copied().unwrap_or_default();
        }
    }
}
