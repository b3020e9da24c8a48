//! One client's part of examples that lie in memory once, for all clients and workers.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::data::{Groups, Split};
use crate::partition::Shift;

/// One client's examples: their positions in a shared buffer, in the client's own order.
#[derive(Debug, Clone)]
pub struct Shard {
    /// The buffer that holds them.
    pub examples: Arc<Split>,
    /// Which of them, as positions in `examples.labels`.
    pub indices: Arc<[u32]>,
    /// How the client sees them; `None` as they are.
    pub shift: Option<Arc<Shift>>,
}

impl Shard {
    /// All of `examples`.
    pub fn whole(examples: Arc<Split>) -> Self {
        let indices = (0..u32::try_from(examples.len()).unwrap_or(u32::MAX)).collect();
        Self { examples, indices, shift: None }
    }

    /// The same examples as the client sees them: with a shift in a buffer of their own, otherwise where they lie.
    ///
    /// Call it where one client is trained or evaluated and drop the result after, so that the values of a whole
    /// population are never in memory at once.
    pub fn as_seen(&self) -> Self {
        let Some(shift) = &self.shift else { return self.clone() };
        let Split { features, labels, groups } = &*self.examples;
        let width = features.len() / labels.len().max(1);
        let mut seen = Split::default();
        let mut own_groups = Groups::default();
        seen.features.reserve_exact(width * self.len());
        for position in self.indices.iter() {
            let at = *position as usize;
            let (Some(row), Some(label)) = (features.get(at * width..(at + 1) * width), labels.get(at))
            else {
                // The trainer refuses such a part, and names the position.
                return Self { shift: None, ..self.clone() };
            };
            seen.features.extend(shift.apply(*position, row));
            seen.labels.push(*label);
            seen.groups.extend(groups.get(at).map(|group| own_groups.id(group)));
        }
        Self::whole(Arc::new(seen))
    }

    /// How many units of privacy the client has: groups, or without groups examples.
    pub fn units(&self) -> usize {
        let groups = &self.examples.groups;
        if groups.is_empty() {
            return self.len();
        }
        self.indices.iter().filter_map(|at| groups.get(*at as usize)).collect::<BTreeSet<_>>().len()
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
