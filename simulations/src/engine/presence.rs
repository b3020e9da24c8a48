//! Which clients are connected: those that their device lets, and that no fault keeps silent.

use std::collections::BTreeMap;

use super::nodes::Index;

/// Who is here. Small per client, for there may be very many.
#[derive(Debug, Default)]
pub(super) struct Presence {
    /// Whether each client's device is online; beyond its end everybody is.
    offline: Vec<bool>,
    /// Whom a fault keeps silent; `true`: until the attempt ends.
    silent: BTreeMap<Index, bool>,
    /// How often each client that was ever lost was lost: what was sent over an older connection is lost, too.
    losses: BTreeMap<Index, u32>,
}

impl Presence {
    pub(super) fn is_connected(&self, index: Index) -> bool {
        self.is_online(index) && !self.silent.contains_key(&index)
    }

    pub(super) fn is_online(&self, index: Index) -> bool {
        !self.offline.get(index as usize).copied().unwrap_or(false)
    }

    /// Names the present connection of a client.
    pub(super) fn connection(&self, index: Index) -> u32 {
        self.losses.get(&index).copied().unwrap_or(0)
    }

    /// The device comes or goes; whether that connects or disconnects the client.
    pub(super) fn set_online(&mut self, index: Index, online: bool) -> bool {
        let before = self.is_connected(index);
        let at = index as usize;
        if self.offline.len() <= at {
            self.offline.resize(at + 1, false);
        }
        if let Some(offline) = self.offline.get_mut(at) {
            *offline = !online;
        }
        self.count(index, before)
    }

    /// A fault silences the client, until the attempt ends or until it is told; whether that disconnects it.
    pub(super) fn silence(&mut self, index: Index, until_the_attempt_ends: bool) -> bool {
        let before = self.is_connected(index);
        self.silent.insert(index, until_the_attempt_ends);
        self.count(index, before)
    }

    /// The client's fault is over; whether that connects it.
    pub(super) fn revive(&mut self, index: Index) -> bool {
        let before = self.is_connected(index);
        self.silent.remove(&index);
        self.count(index, before)
    }

    /// Those who are silent until the attempt ends.
    pub(super) fn silent_until_the_end(&self) -> Vec<Index> {
        self.silent.iter().filter(|(_, until_the_end)| **until_the_end).map(|(index, _)| *index).collect()
    }

    fn count(&mut self, index: Index, before: bool) -> bool {
        let now = self.is_connected(index);
        if before && !now {
            *self.losses.entry(index).or_insert(0) += 1;
        }
        before != now
    }
}
