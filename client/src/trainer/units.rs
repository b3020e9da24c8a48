//! Whom example-level privacy protects in a client's part: its rows or, where they are grouped, its persons.

use std::collections::BTreeMap;

use super::TrainError;
use crate::shard::Shard;

/// The units of one client, each with its rows as positions in the examples.
pub(super) enum Units {
    /// Every row for itself.
    Rows(std::sync::Arc<[u32]>),
    /// All rows of a person together.
    Groups(Vec<Vec<u32>>),
}

impl Units {
    /// The units of `shard`, whose positions were checked.
    ///
    /// # Errors
    /// [`TrainError::Examples`] where groups and rows do not belong together, or a group is only in part the client's:
    /// the bound on what a person changes would then hold for each part alone.
    pub(super) fn of(shard: &Shard) -> Result<Self, TrainError> {
        let groups = &shard.examples.groups;
        if groups.is_empty() {
            return Ok(Self::Rows(shard.indices.clone()));
        }
        let rows = shard.examples.labels.len();
        if groups.len() != rows {
            return Err(TrainError::Examples(format!("{} groups, but {rows} labels", groups.len())));
        }
        let mut own: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for position in shard.indices.iter() {
            let Some(group) = groups.get(*position as usize) else { continue };
            own.entry(*group).or_default().push(*position);
        }
        let mut everywhere: BTreeMap<u32, usize> = BTreeMap::new();
        for group in groups {
            *everywhere.entry(*group).or_default() += 1;
        }
        for (group, rows) in &own {
            let all = everywhere.get(group).copied().unwrap_or_default();
            if rows.len() != all {
                return Err(TrainError::Examples(format!(
                    "the client has {} of the {all} rows of group {group}: with [privacy] a person's rows stay together",
                    rows.len()
                )));
            }
        }
        Ok(Self::Groups(own.into_values().collect()))
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Rows(rows) => rows.len(),
            Self::Groups(groups) => groups.len(),
        }
    }

    /// Whether every unit is one row.
    pub(super) fn by_row(&self) -> bool {
        matches!(self, Self::Rows(_))
    }

    /// The rows of a unit; none of one that does not exist.
    pub(super) fn rows(&self, unit: u32) -> &[u32] {
        let at = unit as usize;
        match self {
            Self::Rows(rows) => rows.get(at..at + 1).unwrap_or_default(),
            Self::Groups(groups) => groups.get(at).map(Vec::as_slice).unwrap_or_default(),
        }
    }
}
