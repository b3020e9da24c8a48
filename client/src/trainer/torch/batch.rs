//! The examples of one step as tensors.

use tch::{TchError, Tensor};

use crate::data::Split;

/// Scratch memory for gathering rows; it keeps its size from step to step.
#[derive(Default)]
pub(super) struct Batch {
    features: Vec<f32>,
    labels: Vec<i64>,
}

impl Batch {
    /// Features `[batch, …shape]` and labels `[batch]` of the examples at `indices`, which must exist and have
    /// as many values as `shape`.
    pub(super) fn gather<'a>(
        &mut self,
        examples: &Split,
        shape: &[usize],
        indices: impl Iterator<Item = &'a u32>,
    ) -> Result<(Tensor, Tensor), TchError> {
        let row = shape.iter().product::<usize>();
        self.features.clear();
        self.labels.clear();
        for index in indices {
            let index = *index as usize;
            self.features.extend_from_slice(&examples.features[index * row..(index + 1) * row]);
            self.labels.push(examples.labels[index]);
        }
        let sizes = std::iter::once(self.labels.len()).chain(shape.iter().copied());
        let sizes: Vec<i64> = sizes.map(|size| i64::try_from(size).unwrap_or(i64::MAX)).collect();
        let features = Tensor::f_from_slice(&self.features)?.f_view(sizes.as_slice())?;
        Ok((features, Tensor::f_from_slice(&self.labels)?))
    }
}
