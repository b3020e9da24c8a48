//! Fixed strings of bytes that are written as hexadecimal digits: hashes, salts, keys, signatures, random
//! ids.

use std::fmt;
use std::str::FromStr;

use rand::TryRng as _;
use rand::rngs::SysRng;
use serde::{Deserialize, Serialize};

/// `N` bytes, written as `2 N` lower-case hexadecimal digits and read from nothing else.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hex<const N: usize>(pub [u8; N]);

/// A text is not `N` bytes in lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {0} lower-case hexadecimal digits")]
pub struct HexError(usize);

impl<const N: usize> Hex<N> {
    /// Fresh bytes from the operating system.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; N];
        SysRng.try_fill_bytes(&mut bytes).map_err(std::io::Error::other)?;
        Ok(Self(bytes))
    }

    /// The first eight digits, for people.
    pub fn short(&self) -> String {
        self.to_string().chars().take(8).collect()
    }
}

impl<const N: usize> fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<const N: usize> fmt::Debug for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}…", self.short())
    }
}

impl<const N: usize> FromStr for Hex<N> {
    type Err = HexError;

    fn from_str(text: &str) -> Result<Self, HexError> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(HexError(2 * N)),
        };
        if text.len() != 2 * N {
            return Err(HexError(2 * N));
        }
        let mut bytes = [0; N];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            for character in pair {
                *byte = *byte << 4 | digit(*character)?;
            }
        }
        Ok(Self(bytes))
    }
}

impl<const N: usize> TryFrom<String> for Hex<N> {
    type Error = HexError;

    fn try_from(text: String) -> Result<Self, HexError> {
        text.parse()
    }
}

impl<const N: usize> From<Hex<N>> for String {
    fn from(hex: Hex<N>) -> String {
        hex.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_way_to_write_bytes() {
        let bytes = Hex([0x00, 0x9a, 0xff]);
        assert_eq!(bytes.to_string(), "009aff");
        assert_eq!("009aff".parse::<Hex<3>>().unwrap(), bytes);
        for bad in ["", "009af", "009AFF", "009aff0", "0x9aff", "+09aff", "00é9af"] {
            assert!(bad.parse::<Hex<3>>().is_err(), "{bad:?}");
        }
        assert_ne!(Hex::<16>::random().unwrap(), Hex::<16>::random().unwrap());
    }
}
