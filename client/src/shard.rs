//! One client's part of examples that lie in memory once, for all clients and workers.

use std::sync::Arc;

use crate::data::Split;

/// One client's examples: their positions in a shared buffer, in the client's own order.
#[derive(Debug, Clone)]
pub struct Shard {
    /// The buffer that holds them.
    pub examples: Arc<Split>,
    /// Which of them, as positions in `examples.labels`.
    pub indices: Arc<[u32]>,
}

impl Shard {
    /// All of `examples`.
    pub fn whole(examples: Arc<Split>) -> Self {
        let indices = (0..u32::try_from(examples.len()).unwrap_or(u32::MAX)).collect();
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
