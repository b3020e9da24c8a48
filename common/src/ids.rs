//! Names and numbers that identify runs, rounds and nodes; each is valid by construction.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::limits::NODE_NAME_BYTES;

/// Why a text is not a [`NodeName`] or a [`RunId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// A node's name breaks the rule in the message.
    #[error(
        "node name {0:?} is not valid: use 1 to {NODE_NAME_BYTES} of a-z, 0-9, '-', '_' and '.', starting with a letter or digit"
    )]
    NodeName(String),
    /// A run's id is not 16 hexadecimal digits.
    #[error("run id {0:?} is not valid: expected 16 hexadecimal digits, as `run list` shows them")]
    RunId(String),
}

/// The name of a node, also the client's name in every random stream.
///
/// 1 to 63 bytes of `a-z`, `0-9`, `-`, `_`, `.`, the first a letter or digit: safe in a file name, a
/// certificate and a log line.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(std::sync::Arc<str>);

impl NodeName {
    /// A name that is written in the program; one that breaks the rule becomes `unnamed`.
    pub fn literal(name: &'static str) -> Self {
        name.parse().unwrap_or_else(|_| Self("unnamed".into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let head = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let tail = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b));
        if head && tail && text.len() <= NODE_NAME_BYTES {
            Ok(Self(text.into()))
        } else {
            Err(IdError::NodeName(text.chars().take(NODE_NAME_BYTES + 1).collect()))
        }
    }
}

impl TryFrom<String> for NodeName {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> String {
        name.0.as_ref().to_owned()
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The identity of one run of a job on one coordinator: 64 bits, shown as 16 hexadecimal digits.
///
/// It names files and messages and enters no random stream: two runs of the same job and seed are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(pub u64);

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for RunId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let fits = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let number = fits.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        number.map(Self).ok_or_else(|| IdError::RunId(text.chars().take(32).collect()))
    }
}

impl TryFrom<String> for RunId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<RunId> for String {
    fn from(id: RunId) -> String {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_names_are_safe_everywhere_they_appear() {
        for good in ["a", "cleveland", "client-000042", "st.mary_2", &"a".repeat(63)] {
            assert_eq!(good.parse::<NodeName>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", ".", "..", "a/b", "A", "a b", "é", "a\n", &"a".repeat(64)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?}");
            assert!(serde_json::from_str::<NodeName>(&serde_json::to_string(bad).unwrap()).is_err());
        }
    }

    #[test]
    fn run_ids_read_back() {
        let id = RunId(0x0123_4567_89ab_cdef);
        assert_eq!(id.to_string().parse::<RunId>().unwrap(), id);
        for bad in ["", "1", "0123456789abcdeg", "+123456789abcdef", "0123456789abcdef0"] {
            assert!(bad.parse::<RunId>().is_err(), "{bad:?}");
        }
    }
}
