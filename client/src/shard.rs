//! Labelled examples resident in memory, and the part of them that belongs to one client.

use std::sync::Arc;

/// Labelled examples: one buffer that workers and simulated clients share.
#[derive(Debug, Clone, PartialEq)]
pub struct Examples {
    /// Shape of one example: `[features]` or `[channels, height, width]`.
    pub shape: Vec<usize>,
    /// Features, example after example, each row-major.
    pub features: Vec<f32>,
    /// Class of each example, from 0.
    pub labels: Vec<i64>,
}

/// One client's part of some examples: their positions, in the client's own order.
#[derive(Debug, Clone)]
pub struct Shard {
    /// The buffer that holds them.
    pub examples: Arc<Examples>,
    /// Which of them, as positions in `examples.labels`.
    pub indices: Arc<[u32]>,
}

impl Shard {
    /// All of `examples`.
    pub fn whole(examples: Arc<Examples>) -> Self {
        let indices = (0..u32::try_from(examples.labels.len()).unwrap_or(u32::MAX)).collect();
        Self { examples, indices }
    }

    /// How many examples the client has.
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// Whether the client has none.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }
}
