//! The k coordinates of largest magnitude, exactly, with ties to the lowest index.

/// Why nothing is selected.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("coordinate {index} is {value}; an update must be finite (lower the learning rate?)")]
pub struct NotFinite {
    /// Position in the flat vector.
    pub index: usize,
    /// The value found.
    pub value: f32,
}

/// The indices of the `k` largest magnitudes, ascending; of equal magnitudes the lowest indices. All, if `k` is larger.
///
/// -0 equals 0, and denormal numbers count. The values are a flat vector of at most `u32::MAX` coordinates; what is
/// beyond is never selected.
///
/// # Errors
/// [`NotFinite`] names the first NaN or infinity.
pub fn top_k(_values: &[f32], _k: usize) -> Result<Vec<u32>, NotFinite> {
    unimplemented!()
}
