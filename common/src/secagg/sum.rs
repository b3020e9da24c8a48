//! The coordinator's sum of one segment: masked updates are added as they are verified, masks are taken out at the end.

use std::num::NonZeroUsize;

use super::keys::{MaskKey, MaskTerm, Sign};
use super::mask::Backend;
use super::ring::{RingError, RingVector, Width};

/// A sum of updates modulo 2^b. It means nothing until all masks are taken out.
///
/// The plain path adds vectors that were never masked: the result is the same, bit for bit.
#[derive(Clone)]
pub struct MaskedSum {
    vector: RingVector,
    updates: u32,
}

impl MaskedSum {
    /// A sum of no updates.
    pub fn new(width: Width, coordinates: usize) -> Self {
        Self { vector: RingVector::zeros(width, coordinates), updates: 0 }
    }

    /// Adds an update as it travels. It cannot be taken out again: verify it first. Adds nothing if there is an error.
    ///
    /// # Errors
    /// [`RingError`] if it has another length, or bits behind its last coordinate.
    pub fn add_packed(&mut self, packed: &[u8]) -> Result<(), RingError> {
        self.vector.add_packed(packed)?;
        self.updates = self.updates.saturating_add(1);
        Ok(())
    }

    /// Adds an update.
    ///
    /// # Errors
    /// [`RingError`] if it has another width or length.
    pub fn add(&mut self, update: &RingVector) -> Result<(), RingError> {
        self.vector.add(update)?;
        self.updates = self.updates.saturating_add(1);
        Ok(())
    }

    /// Takes the masks of segment `segment` out, as `terms` say; terms of other segments are left alone.
    ///
    /// # Errors
    /// [`RingError::Stream`] if the vector is longer than a key stream.
    pub fn unmask(
        &mut self,
        terms: &[MaskTerm],
        segment: u8,
        threads: NonZeroUsize,
    ) -> Result<(), RingError> {
        self.vector.mask(of_segment(terms, segment), threads)
    }

    /// The same by a given back end, whose choice changes no bit.
    ///
    /// # Errors
    /// As [`MaskedSum::unmask`].
    pub fn unmask_by(
        &mut self,
        backend: Backend,
        terms: &[MaskTerm],
        segment: u8,
        threads: NonZeroUsize,
    ) -> Result<(), RingError> {
        self.vector.mask_by(backend, of_segment(terms, segment), threads)
    }

    /// Number of updates that were added.
    pub fn updates(&self) -> u32 {
        self.updates
    }

    /// How many coordinates are larger than `bound` in absolute value. Without noise no sum of n updates exceeds n·Q,
    /// so one means that a client lied about its range or a mask was wrong; with noise the bound has its tail added.
    pub fn exceeding(&self, bound: u64) -> usize {
        self.vector.signed().filter(|value| value.unsigned_abs() > bound).count()
    }

    /// The sum as a vector.
    pub fn vector(&self) -> &RingVector {
        &self.vector
    }

    /// The sum of each coordinate, from −2^(b−1) to 2^(b−1) − 1.
    pub fn signed(&self) -> impl Iterator<Item = i64> + '_ {
        self.vector.signed()
    }
}

/// The terms of one segment.
pub fn of_segment(terms: &[MaskTerm], segment: u8) -> impl Iterator<Item = (&MaskKey, Sign)> {
    terms.iter().filter(move |term| term.segment == segment).map(|term| (&term.key, term.sign))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::secagg::context::{ClientId, SessionId};
    use crate::secagg::keys::{Secret, agree, public_of};
    use crate::secagg::tests::{bytes, vectors};

    fn threads(count: usize) -> NonZeroUsize {
        NonZeroUsize::new(count).unwrap()
    }

    fn term(one: u8, other: u8, segment: u8, sign: Sign) -> MaskTerm {
        MaskTerm { key: MaskKey { key: [one; 16], iv: [other; 12] }, sign, segment }
    }

    /// The masks that client `own` of `clients` adds: its own (255), and one with each other.
    fn masks(own: u8, clients: u8) -> Vec<MaskTerm> {
        let pair = |other: u8| {
            let sign = if own < other { Sign::Add } else { Sign::Subtract };
            term(own.min(other), own.max(other), 1, sign)
        };
        let mut terms = vec![term(own, 255, 1, Sign::Add), term(7, 7, 0, Sign::Add)];
        terms.extend((0..clients).filter(|other| *other != own).map(pair));
        terms
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        /// Whoever drops out after masking: the masked path ends in the integers of the plain one.
        #[test]
        fn masked_and_plain_sums_are_the_same(
            bits in 2..=64u32,
            survivors in prop::collection::vec(any::<bool>(), 2..7),
            coordinates in 0..300usize,
            seed in any::<i64>(),
        ) {
            let width = Width::new(bits).unwrap();
            let clients = survivors.len() as u8;
            let largest = width.largest() / i64::from(clients);
            let value = |at: usize, client: u8| {
                let word = seed.wrapping_mul(at as i64 + 3).wrapping_mul(i64::from(client) * 2 + 1);
                if largest == 0 { 0 } else { word % (largest + 1) }
            };
            let (mut masked, mut plain) =
                (MaskedSum::new(width, coordinates), MaskedSum::new(width, coordinates));
            let mut left = Vec::new();
            for (client, _) in (0..clients).zip(&survivors).filter(|(_, alive)| **alive) {
                let values: Vec<i64> = (0..coordinates).map(|at| value(at, client)).collect();
                let vector = RingVector::from_signed(width, &values).unwrap();
                plain.add(&vector).unwrap();
                let mut hidden = vector;
                hidden.mask(of_segment(&masks(client, clients), 1), threads(1)).unwrap();
                masked.add_packed(&hidden.pack().unwrap()).unwrap();
                // Its own mask, and those with clients that are not in the sum.
                left.extend(masks(client, clients).into_iter().filter(|term| {
                    let [one, other] = [term.key.key[0], term.key.iv[0]];
                    let gone = |id: u8| survivors.get(usize::from(id)).is_none_or(|alive| !alive);
                    gone(one) || gone(other)
                }));
            }
            // Those of segment 0 would not cancel, were they not left alone.
            let segment = left.iter_mut().filter(|term| term.segment == 1);
            segment.for_each(|term| term.sign = term.sign.opposite());
            masked.unmask(&left, 1, threads(2)).unwrap();
            prop_assert!(masked.signed().eq(plain.signed()));
            prop_assert!(masked.vector() == plain.vector());
            prop_assert_eq!(masked.updates(), plain.updates());
            prop_assert_eq!(masked.vector().pack().unwrap(), plain.vector().pack().unwrap());
        }
    }

    /// The known answers of the protocol: three clients, 20 bits; the third is in the sum or drops out late.
    #[test]
    fn the_protocols_known_sums() {
        let known = vectors();
        let hash = |name: &str| <[u8; 32]>::try_from(bytes(&known[name])).unwrap();
        let session = SessionId::new(&hash("ctx"), &hash("roster_root"));
        let ids = [1, 2, 3].map(|byte| ClientId::from_bytes([byte; 16]));
        let own = |at: usize| MaskKey::own(&session, &Secret([0x40 + at as u8; 32]), 0, &ids[at]);
        let pair = |one: usize, other: usize| {
            let public = public_of(&Secret([0x30 + other as u8; 32]));
            let secret = agree(&Secret([0x30 + one as u8; 32]), &public).unwrap();
            MaskKey::pair(&session, &secret, 0, &ids[one], &ids[other])
        };
        let others = |at: usize| (0..3).filter(move |other| *other != at);
        let width = Width::new(20).unwrap();
        let values = [[1, -2, 3, 0], [10, 20, -30, 0], [-5, 5, 0, 7]];
        let uploads = [0, 1, 2].map(|at: usize| {
            let mut vector = RingVector::from_signed(width, &values[at]).unwrap();
            let pairs = others(at).map(|other| (pair(at, other), Sign::of_pair(&ids[at], &ids[other])));
            let keys: Vec<_> = pairs.chain([(own(at), Sign::Add)]).collect();
            vector.mask(keys.iter().map(|(key, sign)| (key, *sign)), threads(1)).unwrap();
            let lanes = vector.signed().map(|value| format!("{:05x}", value & 0xf_ffff)).collect::<Vec<_>>();
            let expected = known["masked_y_b20"][at].as_array().unwrap();
            assert!(lanes.iter().eq(expected.iter().map(|word| word.as_str().unwrap())), "{lanes:?}");
            vector.pack().unwrap()
        });
        let summed = |survivors: &[usize], terms: Vec<MaskTerm>| {
            let mut sum = MaskedSum::new(width, 4);
            survivors.iter().for_each(|at| sum.add_packed(&uploads[*at]).unwrap());
            sum.unmask(&terms, 0, threads(1)).unwrap();
            serde_json::json!(sum.signed().collect::<Vec<_>>())
        };
        let term = |key, sign| MaskTerm { key, sign, segment: 0 };
        let all = [0, 1, 2].map(|at| term(own(at), Sign::Subtract));
        assert_eq!(summed(&[0, 1, 2], all.to_vec()), known["sum"]);
        let opposite = |at: usize| Sign::of_pair(&ids[at], &ids[2]).opposite();
        let late = [0, 1].map(|at| [term(own(at), Sign::Subtract), term(pair(at, 2), opposite(at))]);
        assert_eq!(summed(&[0, 1], late.concat()), known["sum_without_3"]);
    }

    #[test]
    fn a_sum_beyond_the_bound_is_noticed() {
        let width = Width::new(12).unwrap();
        let mut sum = MaskedSum::new(width, 4);
        sum.add(&RingVector::from_signed(width, &[30, -30, 31, -2047]).unwrap()).unwrap();
        assert_eq!([29, 30, 31, 2046, 2047].map(|bound| sum.exceeding(bound)), [4, 2, 1, 1, 0]);
    }
}
