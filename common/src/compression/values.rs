//! How the values of an update are written: `f32`, `bf16`, levels of a scale, or a sign.

/// How the values of a sparse update are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ValueCodec {
    /// 32 bits, exact.
    F32,
    /// 16 bits: `f32` with an 8-bit significand, rounded to nearest, ties to even.
    Bf16,
    /// 8 bits, rounded at random without bias, 256 values to a scale.
    Int8,
    /// One bit: the sign of the mean magnitude of all sent values (sparse ternary compression, Sattler et al. 2019).
    Sign,
}
