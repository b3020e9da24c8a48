//! Memory that libtorch computes on and Rust reads and writes.
//!
//! The only unsafe code of the trainer: libtorch hands out its memory as a pointer.
#![allow(unsafe_code)]

use std::slice;

use tch::{Device, Kind, TchError, Tensor};

/// A block of `f32` on the CPU that never moves.
pub(super) struct Memory {
    tensor: Tensor,
    length: usize,
}

impl Memory {
    /// `length` zeros.
    pub(super) fn zeros(length: usize) -> Result<Self, TchError> {
        // An empty tensor has no memory to point to.
        let tensor = Tensor::f_zeros([signed(length.max(1))?], (Kind::Float, Device::Cpu))?;
        Ok(Self { tensor, length })
    }

    /// The values.
    pub(super) fn values(&self) -> &[f32] {
        // SAFETY: `tensor` is a contiguous CPU tensor of at least `length` f32, made in `zeros`, private and never
        // resized, so the pointer is valid and aligned while `self` lives. libtorch writes to it only within
        // `Product::run` and `Products::run`, during which no slice of any block is held: they take no block.
        unsafe { slice::from_raw_parts(self.tensor.data_ptr().cast::<f32>(), self.length) }
    }

    /// The values, to write; views see it.
    pub(super) fn values_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `values`; `&mut self` makes this the only slice.
        unsafe { slice::from_raw_parts_mut(self.tensor.data_ptr().cast::<f32>(), self.length) }
    }

    /// The matrix of `rows × columns` at `offset` whose rows begin `stride` values apart.
    ///
    /// # Errors
    /// [`TchError::Shape`] for a matrix that does not lie within the block.
    pub(super) fn matrix(
        &self,
        offset: usize,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<Tensor, TchError> {
        let last = rows.saturating_sub(1).saturating_mul(stride).saturating_add(offset);
        if columns > stride || last.saturating_add(columns) > self.length {
            return Err(TchError::Shape(format!("{rows}×{columns} at {offset} of {}", self.length)));
        }
        let (sizes, strides) = ([signed(rows)?, signed(columns)?], [signed(stride)?, 1]);
        self.tensor.f_as_strided(sizes.as_slice(), strides.as_slice(), signed(offset)?)
    }
}

impl Memory {
    /// `count` matrices of `rows × columns`, one after another from `offset`.
    ///
    /// # Errors
    /// [`TchError::Shape`] for matrices that do not lie within the block.
    pub(super) fn matrices(
        &self,
        offset: usize,
        count: usize,
        rows: usize,
        columns: usize,
    ) -> Result<Tensor, TchError> {
        let each = rows.saturating_mul(columns);
        if count.saturating_mul(each).saturating_add(offset) > self.length {
            return Err(TchError::Shape(format!(
                "{count} of {rows}×{columns} at {offset} of {}",
                self.length
            )));
        }
        let sizes = [signed(count)?, signed(rows)?, signed(columns)?];
        let strides = [signed(each)?, signed(columns)?, 1];
        self.tensor.f_as_strided(sizes.as_slice(), strides.as_slice(), signed(offset)?)
    }
}

fn signed(size: usize) -> Result<i64, TchError> {
    i64::try_from(size).map_err(|_| TchError::Shape(size.to_string()))
}

/// One matrix product with its operands bound: `out = left · right`, or `out += left · right`.
///
/// libtorch's products run on MKL; everything between them is a loop over slices.
pub(super) struct Product {
    out: Tensor,
    left: Tensor,
    right: Tensor,
    adds: bool,
}

impl Product {
    /// `out = left · right`.
    pub(super) fn set(out: Tensor, left: Tensor, right: Tensor) -> Self {
        Self { out, left, right, adds: false }
    }

    /// `out += left · right`.
    pub(super) fn add(out: Tensor, left: Tensor, right: Tensor) -> Self {
        Self { out, left, right, adds: true }
    }

    /// Computes it.
    pub(super) fn run(&mut self) -> Result<(), TchError> {
        // What is returned is the result once more.
        let _same = match self.adds {
            true => self.out.f_addmm_(&self.left, &self.right)?,
            false => self.left.f_mm_out(&self.out, &self.right)?,
        };
        Ok(())
    }
}

/// As many matrix products as there are matrices in the operands: `out[i] = left[i] · right[i]`.
pub(super) struct Products {
    out: Tensor,
    left: Tensor,
    right: Tensor,
}

impl Products {
    /// Binds `count × n × k`, `count × k × m` and, for the results, `count × n × m`.
    pub(super) fn set(out: Tensor, left: Tensor, right: Tensor) -> Self {
        Self { out, left, right }
    }

    /// Computes them.
    pub(super) fn run(&mut self) -> Result<(), TchError> {
        let _same = self.left.f_bmm_out(&self.out, &self.right)?;
        Ok(())
    }
}

/// The transpose of a matrix, or of each of several, as a view.
pub(super) fn transposed(matrix: &Tensor) -> Result<Tensor, TchError> {
    matrix.f_transpose(-2, -1)
}
