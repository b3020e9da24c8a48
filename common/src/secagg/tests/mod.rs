//! Tests of the protocol: vectors, drop-outs, attacks.

mod attacks;
mod dropouts;
mod federation;
mod hostile;
mod known_answers;
#[cfg(target_os = "linux")]
mod memory;
mod restart;

use serde_json::Value;

/// The known answers.
pub(crate) fn vectors() -> Value {
    serde_json::from_str(include_str!("secagg_kat.json")).unwrap()
}

/// Bytes from hexadecimal digits.
pub(crate) fn bytes(value: &Value) -> Vec<u8> {
    let digits = value.as_str().unwrap();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}
