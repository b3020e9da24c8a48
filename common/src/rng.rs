//! Named random streams: every draw of the algorithm, and nothing secret.
//!
//! A stream is named by (run seed, purpose, round, client), so a draw does not depend on who runs where
//! or in which order. The coordinator knows the run seed: keys, noise and anything else that must stay
//! secret come from the operating system instead, never from here.

use chacha20::ChaCha12Rng;
use chacha20::rand_core::{SeedableRng, TryRng};

/// What a stream is used for; the purpose is part of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The model's first parameters.
    Initialisation,
    /// Which eligible clients are in a round's cohort; `client` holds the attempt.
    Cohort,
    /// The order of examples in local training.
    Shuffle,
    /// How a simulated population shares a data set.
    Partition,
    /// The built-in generated image set.
    Synthetic,
    /// Dropout layers in local training.
    Dropout,
    /// The noise that a client of a `feature-shift` partition sees; `round` holds the example's position.
    FeatureNoise,
    /// The generated data set of several users.
    SyntheticFederated,
    /// How fast a simulated client and its connection are; `round` holds which of its figures is drawn.
    Devices,
    /// When a simulated client is online; `round` holds how often it has come and gone.
    Availability,
    /// What goes wrong at a simulated client in a round.
    Faults,
    /// Coins of stochastic rounding where nothing is private: with `[privacy]` they are secret, and not from here.
    Rounding,
    /// Coordinates of a round's support that are drawn at random.
    Support,
}

impl Purpose {
    /// The purpose in the stream's name. Changing one changes every model: they are frozen.
    fn name(self) -> &'static str {
        match self {
            Purpose::Initialisation => "initialisation",
            Purpose::Cohort => "cohort",
            Purpose::Shuffle => "shuffle",
            Purpose::Partition => "partition",
            Purpose::Synthetic => "synthetic",
            Purpose::Dropout => "dropout",
            Purpose::FeatureNoise => "feature-noise",
            Purpose::SyntheticFederated => "synthetic-federated",
            Purpose::Devices => "devices",
            Purpose::Availability => "availability",
            Purpose::Faults => "faults",
            Purpose::Rounding => "rounding",
            Purpose::Support => "support",
        }
    }
}

/// A reproducible stream of random numbers (ChaCha12); use it through `rand::Rng` and `rand_distr`.
#[derive(Debug)]
pub struct Stream(ChaCha12Rng);

impl Stream {
    /// The stream named (`seed`, `purpose`, `round`, `client`).
    ///
    /// The ChaCha key is BLAKE3 in key-derivation mode over the length-prefixed name, so no two names
    /// share a key. Use round 0 and an empty client where a purpose has none.
    pub fn new(seed: u64, purpose: Purpose, round: u32, client: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("tributary 2026 named random stream v1");
        hasher.update(&seed.to_le_bytes());
        for part in [purpose.name(), client] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.update(&round.to_le_bytes());
        Self(ChaCha12Rng::from_seed(*hasher.finalize().as_bytes()))
    }
}

impl TryRng for Stream {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        self.0.try_next_u32()
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        self.0.try_next_u64()
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
        self.0.try_fill_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, RngExt, seq::SliceRandom};

    #[test]
    fn every_part_of_the_name_matters() {
        let first = |seed, purpose, round, client: &str| Stream::new(seed, purpose, round, client).next_u64();
        let base = first(1, Purpose::Shuffle, 2, "ab");
        assert_eq!(base, first(1, Purpose::Shuffle, 2, "ab"));
        let others = [
            first(2, Purpose::Shuffle, 2, "ab"),
            first(1, Purpose::Cohort, 2, "ab"),
            first(1, Purpose::Shuffle, 3, "ab"),
            first(1, Purpose::Shuffle, 2, "a"),
            first(1, Purpose::Shuffle, 2, ""),
        ];
        assert!(others.iter().all(|other| *other != base));
    }

    /// A dependency that changed these would silently change every published model.
    #[test]
    fn streams_are_frozen() {
        let mut stream = Stream::new(7, Purpose::Shuffle, 3, "cleveland");
        let mut order: Vec<u32> = (0..8).collect();
        let words = [stream.next_u64(), stream.next_u64()];
        order.shuffle(&mut stream);
        let uniform: f32 = stream.random();
        let below: u32 = stream.random_range(0..1000);
        assert_eq!(
            format!("{:016x} {:016x} {order:?} {uniform} {below}", words[0], words[1]),
            "4db4fc17b00d85b2 d740e430393a76b6 [6, 3, 0, 2, 5, 1, 7, 4] 0.5614928 677"
        );
    }
}
