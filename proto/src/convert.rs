//! Wire messages to checked types and back; every check of a field that a peer filled in.

use prost::bytes::Bytes;
use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::limits::{CHUNK_BYTES, CLASSES, EXAMPLES_PER_UPDATE};
use tributary_common::record::{Metrics, Reason};

use crate::coordinator as wire;

/// A message breaks the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {what}")]
pub struct WireError {
    field: &'static str,
    what: String,
}

impl WireError {
    /// `field` is wrong: `what` says how.
    pub fn new(field: &'static str, what: impl Into<String>) -> Self {
        Self { field, what: what.into() }
    }
}

impl From<WireError> for tonic::Status {
    fn from(error: WireError) -> Self {
        tonic::Status::invalid_argument(error.to_string())
    }
}

/// A digest in the field called `field`.
pub fn digest(field: &'static str, bytes: &[u8]) -> Result<Digest, WireError> {
    Digest::try_from(bytes).map_err(|error| WireError::new(field, error.to_string()))
}

/// A node's name in the field called `field`.
pub fn node_name(field: &'static str, text: &str) -> Result<NodeName, WireError> {
    text.parse().map_err(|error: tributary_common::ids::IdError| WireError::new(field, error.to_string()))
}

/// A chunk of `data` at `offset` of `total_bytes`, with its digest.
pub fn chunk(offset: u64, data: Bytes, total_bytes: u64) -> wire::Chunk {
    let data_digest = Digest::of(&data).0.to_vec();
    wire::Chunk { offset, data, data_digest, total_bytes }
}

/// The data of a chunk that must start at `offset` and end within `total_bytes`; digest checked.
pub fn chunk_data(chunk: wire::Chunk, offset: u64, total_bytes: u64) -> Result<Bytes, WireError> {
    let wrong = |what: String| Err(WireError::new("chunk", what));
    if chunk.offset != offset {
        return wrong(format!("starts at byte {}, but byte {offset} is next", chunk.offset));
    }
    if chunk.total_bytes != total_bytes {
        return wrong(format!("says {} bytes in all, but {total_bytes} are expected", chunk.total_bytes));
    }
    if chunk.data.is_empty() || chunk.data.len() > CHUNK_BYTES {
        return wrong(format!("has {} bytes; 1 to {CHUNK_BYTES} are possible", chunk.data.len()));
    }
    if offset.saturating_add(chunk.data.len() as u64) > total_bytes {
        return wrong(format!("reaches beyond the announced {total_bytes} bytes"));
    }
    if digest("chunk.data_digest", &chunk.data_digest)? != Digest::of(&chunk.data) {
        return wrong(format!("at byte {offset} does not have its digest: damaged on the way"));
    }
    Ok(chunk.data)
}

/// The checked fields of an upload's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    /// The run.
    pub run: RunId,
    /// The round, from 1.
    pub round: u32,
    /// The attempt at it, from 1.
    pub attempt: u32,
    /// Digest of the whole update.
    pub digest: Digest,
    /// Length of the whole update.
    pub total_bytes: u64,
    /// Its weight, in training examples.
    pub examples: u64,
}

/// Checks an upload's header.
pub fn upload_header(header: &wire::UploadHeader) -> Result<Upload, WireError> {
    if !(1..=EXAMPLES_PER_UPDATE).contains(&header.examples) {
        return Err(WireError::new("examples", format!("{}: 1 to {EXAMPLES_PER_UPDATE}", header.examples)));
    }
    Ok(Upload {
        run: RunId(header.run),
        round: header.round,
        attempt: header.attempt,
        digest: digest("digest", &header.digest)?,
        total_bytes: header.total_bytes,
        examples: header.examples,
    })
}

/// The metrics of a report, checked against each other.
pub fn metrics(report: &wire::Metrics) -> Result<Metrics, WireError> {
    let wrong = |what: &str| Err(WireError::new("metrics", what));
    if !report.loss_sum.is_finite() || report.loss_sum < 0.0 {
        return wrong("the loss is not a number from 0");
    }
    if report.correct > report.examples || report.examples > EXAMPLES_PER_UPDATE {
        return wrong("more correct examples than examples, or too many examples");
    }
    if report.confusion.len() > CLASSES || report.confusion.iter().any(|count| *count < -1) {
        return wrong("the confusion counts are too many or negative");
    }
    Ok(Metrics {
        examples: report.examples,
        loss_sum: report.loss_sum,
        correct: report.correct,
        confusion: report.confusion.iter().map(|count| u64::try_from(*count).ok()).collect(),
    })
}

impl From<&Metrics> for wire::Metrics {
    fn from(metrics: &Metrics) -> Self {
        let cell = |count: &Option<u64>| count.map_or(-1, |c| i64::try_from(c).unwrap_or(i64::MAX));
        Self {
            examples: metrics.examples,
            loss_sum: metrics.loss_sum,
            correct: metrics.correct,
            confusion: metrics.confusion.iter().map(cell).collect(),
        }
    }
}

impl From<Reason> for wire::Reason {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::Policy => Self::Policy,
            Reason::Busy => Self::Busy,
            Reason::Data => Self::Data,
            Reason::Training => Self::Training,
            Reason::Budget => Self::Budget,
            Reason::ShuttingDown => Self::ShuttingDown,
            Reason::Unsupported => Self::Unsupported,
        }
    }
}

impl TryFrom<wire::Reason> for Reason {
    type Error = WireError;

    fn try_from(reason: wire::Reason) -> Result<Self, WireError> {
        Ok(match reason {
            wire::Reason::Policy => Self::Policy,
            wire::Reason::Busy => Self::Busy,
            wire::Reason::Data => Self::Data,
            wire::Reason::Training => Self::Training,
            wire::Reason::Budget => Self::Budget,
            wire::Reason::ShuttingDown => Self::ShuttingDown,
            wire::Reason::Unsupported => Self::Unsupported,
            wire::Reason::Unspecified => return Err(WireError::new("reason", "is missing")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_taken_only_in_its_place_and_whole() {
        let good = chunk(4, Bytes::from_static(b"data"), 10);
        assert_eq!(chunk_data(good.clone(), 4, 10).unwrap(), "data");
        let mut damaged = good.clone();
        damaged.data = Bytes::from_static(b"dada");
        for (bad, offset, total) in [
            (good.clone(), 3, 10),
            (good.clone(), 4, 11),
            (damaged, 4, 10),
            (chunk(0, Bytes::new(), 10), 0, 10),
            (chunk(8, Bytes::from_static(b"data"), 10), 8, 10),
            (chunk(0, Bytes::from(vec![0; CHUNK_BYTES + 1]), 1 << 40), 0, 1 << 40),
        ] {
            assert!(chunk_data(bad, offset, total).is_err());
        }
    }

    #[test]
    fn metrics_read_back_and_impossible_ones_are_refused() {
        let metrics_in =
            Metrics { examples: 40, loss_sum: 1.5, correct: 30, confusion: vec![Some(40), None] };
        let report = wire::Metrics::from(&metrics_in);
        assert_eq!(metrics(&report).unwrap(), metrics_in);
        for change in [
            |m: &mut wire::Metrics| m.loss_sum = f64::NAN,
            |m: &mut wire::Metrics| m.loss_sum = -1.0,
            |m: &mut wire::Metrics| m.correct = 41,
            |m: &mut wire::Metrics| m.confusion.push(-2),
        ] {
            let mut bad = report.clone();
            change(&mut bad);
            assert!(metrics(&bad).is_err());
        }
    }
}
