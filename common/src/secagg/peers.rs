//! What a node knows about the other participants, and what its operator wants of a session.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::context::ClientId;
use super::parameters::{MINIMUM_SURVIVORS, ThreatLevel};
use crate::ids::NodeName;
use crate::ledger::record::PublicKey;

/// Identities of other nodes: pinned by the operator, or remembered from the first time they were seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peers {
    #[serde(default)]
    pinned: BTreeMap<ClientId, Pin>,
    #[serde(default)]
    seen: BTreeMap<ClientId, PublicKey>,
}

/// A node whose identity the operator vouched for, for example by telephone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// The node's name.
    pub name: NodeName,
    /// Its Ed25519 identity. A renewed certificate keeps it.
    pub identity: PublicKey,
}

/// How well an identity is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The operator pinned it.
    Pinned,
    /// It is the same as the first time.
    Remembered,
    /// It was never seen.
    New,
    /// It contradicts a pin or what was seen first.
    Contradicts,
}

impl Peers {
    /// Pins a node's identity; replaces an earlier pin and what was remembered.
    pub fn pin(&mut self, name: NodeName, identity: PublicKey) {
        let id = ClientId::of(&name);
        self.seen.remove(&id);
        self.pinned.insert(id, Pin { name, identity });
    }

    /// Takes a pin back. Whether there was one.
    pub fn unpin(&mut self, name: &NodeName) -> bool {
        self.pinned.remove(&ClientId::of(name)).is_some()
    }

    /// The pins, by client id.
    pub fn pins(&self) -> impl Iterator<Item = &Pin> {
        self.pinned.values()
    }

    /// Whether nobody is pinned.
    pub fn has_no_pins(&self) -> bool {
        self.pinned.is_empty()
    }

    /// How well `identity` is known as that of client `id`.
    pub fn standing(&self, id: &ClientId, identity: &PublicKey) -> Standing {
        let known = |expected: &PublicKey, standing| {
            if expected == identity { standing } else { Standing::Contradicts }
        };
        match (self.pinned.get(id), self.seen.get(id)) {
            (Some(pin), _) => known(&pin.identity, Standing::Pinned),
            (None, Some(seen)) => known(seen, Standing::Remembered),
            (None, None) => Standing::New,
        }
    }

    /// Remembers an identity that was never seen before; keeps what is known otherwise.
    pub fn remember(&mut self, id: ClientId, identity: PublicKey) {
        if !self.pinned.contains_key(&id) {
            self.seen.entry(id).or_insert(identity);
        }
    }

    /// The level that a session with these peers may claim at most: without pins the coordinator, which enrolled
    /// everybody, could be everybody else.
    pub fn level(&self) -> ThreatLevel {
        if self.has_no_pins() { ThreatLevel::Semi } else { ThreatLevel::Strict }
    }
}

/// What the operator of a node wants of a masked session, whatever the job says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClientPolicy {
    /// Lowest level that is accepted.
    pub level: ThreatLevel,
    /// Fewest survivors. Never below [`MINIMUM_SURVIVORS`]; 5 or more are recommended without noise.
    pub minimum_survivors: u16,
    /// Fewest pinned nodes among the survivors, this one not counted.
    pub minimum_pinned_survivors: u16,
    /// Largest part of the clients that shared keys that may be declared drop-outs, in millionths.
    pub maximum_dropout_per_million: u32,
    /// Smallest assumed fraction of colluding clients, in millionths; it matters above 255 clients.
    pub minimum_corrupt_per_million: u32,
    /// All clients of the roster must survive, so that no two sums differ by one client.
    pub fixed_cohort: bool,
}

impl Default for ClientPolicy {
    fn default() -> Self {
        Self {
            level: ThreatLevel::Semi,
            minimum_survivors: MINIMUM_SURVIVORS,
            minimum_pinned_survivors: 2,
            maximum_dropout_per_million: 333_333,
            minimum_corrupt_per_million: 50_000,
            fixed_cohort: false,
        }
    }
}

impl ClientPolicy {
    /// Whether survivors should equal the roster if the operator says nothing: without noise and below 10 hospitals,
    /// sums over two sets that differ by one tell the one's update.
    pub fn fixed_cohort_is_advised(clients: u16, has_noise: bool) -> bool {
        !has_noise && clients < 10
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::hex::Hex;

    #[test]
    fn pins_and_first_sights_are_kept() {
        let (one, other) = (PublicKey(Hex([1; 32])), PublicKey(Hex([2; 32])));
        let name = NodeName::literal("cleveland");
        let id = ClientId::of(&name);
        let mut peers = Peers::default();
        assert_eq!(peers.level(), ThreatLevel::Semi);
        assert_eq!(peers.standing(&id, &one), Standing::New);
        peers.remember(id, one);
        peers.remember(id, other);
        assert_eq!(peers.standing(&id, &one), Standing::Remembered);
        assert_eq!(peers.standing(&id, &other), Standing::Contradicts);
        // The operator decides.
        peers.pin(name.clone(), other);
        assert_eq!(peers.standing(&id, &other), Standing::Pinned);
        assert_eq!(peers.standing(&id, &one), Standing::Contradicts);
        assert_eq!(peers.level(), ThreatLevel::Strict);
        let text = serde_json::to_string(&peers).unwrap();
        assert_eq!(serde_json::from_str::<Peers>(&text).unwrap(), peers);
        assert!(peers.unpin(&name) && !peers.unpin(&name) && peers.has_no_pins());
    }

    #[test]
    fn policies_without_a_word_have_their_defaults() {
        let policy: ClientPolicy = toml::from_str("minimum_survivors = 5").unwrap();
        assert_eq!(policy, ClientPolicy { minimum_survivors: 5, ..ClientPolicy::default() });
        assert!(ClientPolicy::fixed_cohort_is_advised(4, false));
        assert!(
            !ClientPolicy::fixed_cohort_is_advised(4, true)
                && !ClientPolicy::fixed_cohort_is_advised(10, false)
        );
    }
}
