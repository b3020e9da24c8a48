//! A model's parameters shared between libtorch and Rust: one flat tensor, its views and its memory.
//!
//! The only unsafe code of the trainer: libtorch hands out its memory as a pointer.
#![allow(unsafe_code)]

use std::ops::Range;
use std::slice;

use tch::{Device, Kind, TchError, Tensor};

use tributary_common::model::Layout;

/// The parameters as one flat vector that belongs to libtorch, and as the named tensors of the layout.
pub(super) struct Parameters {
    flat: Tensor,
    length: usize,
    /// Views of `flat`, in the order of the layout, that gradients are taken for.
    leaves: Vec<Tensor>,
    ranges: Vec<Range<usize>>,
}

impl Parameters {
    /// Zeros, laid out as `layout`.
    pub(super) fn new(layout: &Layout) -> Result<Self, TchError> {
        let signed = |size: usize| i64::try_from(size).map_err(|_| TchError::Shape(size.to_string()));
        let length = layout.parameters();
        let flat = Tensor::f_zeros([signed(length)?], (Kind::Float, Device::Cpu))?;
        let leaf = |tensor: &tributary_common::model::Tensor| {
            let shape = tensor.shape().iter().map(|size| signed(*size)).collect::<Result<Vec<_>, _>>()?;
            let part = flat.f_narrow(0, signed(tensor.offset())?, signed(tensor.elements())?)?;
            part.f_view(shape.as_slice())?.f_detach()?.f_set_requires_grad(true)
        };
        let leaves = layout.tensors().iter().map(leaf).collect::<Result<Vec<_>, _>>()?;
        let ranges = layout.tensors().iter().map(|tensor| tensor.range()).collect();
        Ok(Self { flat, length, leaves, ranges })
    }

    /// The named tensors, in the order of the layout.
    pub(super) fn leaves(&self) -> &[Tensor] {
        &self.leaves
    }

    /// The flat vector.
    pub(super) fn values(&self) -> &[f32] {
        // SAFETY: `flat` is a contiguous CPU tensor of `length` f32, made in `new`, private and never resized, so
        // the pointer is valid and aligned while `self` lives. Its memory is written only through `&mut self`:
        // the leaves leave this module as shared references, and no caller runs an in-place operation on them.
        unsafe { slice::from_raw_parts(self.flat.data_ptr().cast::<f32>(), self.length) }
    }

    /// The flat vector, to write; the leaves see it.
    pub(super) fn values_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `values`; `&mut self` makes this the only slice, and libtorch computes only in calls that
        // borrow the leaves from `self`.
        unsafe { slice::from_raw_parts_mut(self.flat.data_ptr().cast::<f32>(), self.length) }
    }

    /// Calls `pass(range, values, gradient)` for each tensor and its gradient, in the order of the layout.
    pub(super) fn update(
        &mut self,
        gradients: &[Tensor],
        mut pass: impl FnMut(Range<usize>, &mut [f32], &[f32]),
    ) -> Result<(), TchError> {
        if gradients.len() != self.leaves.len() {
            return Err(TchError::Shape(format!("{} gradients", gradients.len())));
        }
        for (index, gradient) in gradients.iter().enumerate() {
            let Some(range) = self.ranges.get(index).cloned() else { continue };
            // Convolutions in channels-last give gradients in that order of memory.
            let gradient = gradient.f_contiguous()?;
            let fits = gradient.f_kind()? == Kind::Float
                && gradient.device() == Device::Cpu
                && gradient.numel() == range.len();
            if !fits {
                return Err(TchError::Shape(format!("gradient {index} has sizes {:?}", gradient.size())));
            }
            // SAFETY: a contiguous CPU tensor of `range.len()` f32 (checked above) that lives to the end of the
            // iteration; `run_backward` made it, so it shares no memory with the parameters.
            let gradient = unsafe { slice::from_raw_parts(gradient.data_ptr().cast::<f32>(), range.len()) };
            if let Some(values) = self.values_mut().get_mut(range.clone()) {
                pass(range, values, gradient);
            }
        }
        Ok(())
    }
}
