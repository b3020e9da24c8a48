//! A set of clients of a roster, as a bitmap.

use std::fmt;

/// A set of clients, bit i for the roster's entry i; the bits behind the last are zero.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ClientSet {
    clients: u16,
    bits: Vec<u8>,
}

impl ClientSet {
    /// The empty set among `clients`.
    pub fn empty(clients: u16) -> Self {
        Self { clients, bits: vec![0; usize::from(clients).div_ceil(8)] }
    }

    /// The set of these indices among `clients`; an index that is too large is left out.
    pub fn of(clients: u16, members: impl IntoIterator<Item = u16>) -> Self {
        let mut set = Self::empty(clients);
        members.into_iter().for_each(|index| set.insert(index));
        set
    }

    /// Reads a bitmap; none if its length or a bit behind the last is wrong.
    pub fn from_bytes(clients: u16, bits: &[u8]) -> Option<Self> {
        let spare = usize::from(clients).div_ceil(8) * 8 - usize::from(clients);
        let tail = bits.last().map_or(0, |last| last.leading_zeros() as usize);
        let fits = bits.len() == usize::from(clients).div_ceil(8) && (bits.is_empty() || tail >= spare);
        fits.then(|| Self { clients, bits: bits.to_vec() })
    }

    /// The bitmap's bytes, ⌈clients/8⌉ of them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bits
    }

    /// Clients in the roster.
    pub fn clients(&self) -> u16 {
        self.clients
    }

    /// Members of the set.
    pub fn len(&self) -> u16 {
        self.bits.iter().map(|byte| byte.count_ones() as u16).sum()
    }

    /// Whether nobody is in it.
    pub fn is_empty(&self) -> bool {
        self.bits.iter().all(|&byte| byte == 0)
    }

    /// Whether `index` is in it.
    pub fn contains(&self, index: u16) -> bool {
        self.bits.get(usize::from(index / 8)).is_some_and(|byte| byte >> (index % 8) & 1 == 1)
    }

    /// Adds `index`; one that is too large is left out.
    pub fn insert(&mut self, index: u16) {
        if index < self.clients
            && let Some(byte) = self.bits.get_mut(usize::from(index / 8))
        {
            *byte |= 1 << (index % 8);
        }
    }

    /// Takes `index` out.
    pub fn remove(&mut self, index: u16) {
        if let Some(byte) = self.bits.get_mut(usize::from(index / 8)) {
            *byte &= !(1 << (index % 8));
        }
    }

    /// Whether each member is in `other`, a set over the same roster.
    pub fn is_subset_of(&self, other: &Self) -> bool {
        self.clients == other.clients
            && self.bits.iter().zip(&other.bits).all(|(own, other)| own & !other == 0)
    }

    /// The members, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        (0..self.clients).filter(|&index| self.contains(index))
    }
}

impl fmt::Debug for ClientSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bitmaps_read_back(clients in 0u16..300, members in proptest::collection::btree_set(0u16..300, 0..40)) {
            let set = ClientSet::of(clients, members.iter().copied());
            let inside: Vec<u16> = members.into_iter().filter(|&index| index < clients).collect();
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), inside.clone());
            prop_assert_eq!(usize::from(set.len()), inside.len());
            prop_assert_eq!(set.is_empty(), inside.is_empty());
            prop_assert_eq!(ClientSet::from_bytes(clients, set.as_bytes()), Some(set));
        }

        #[test]
        fn a_bitmap_has_one_form(clients in 0u16..40, bits in proptest::collection::vec(any::<u8>(), 0..6)) {
            if let Some(set) = ClientSet::from_bytes(clients, &bits) {
                prop_assert_eq!(ClientSet::of(clients, set.iter()).as_bytes().to_vec(), bits);
            } else {
                let spare = (0..8 * bits.len()).any(|bit| bits[bit / 8] >> (bit % 8) & 1 == 1 && bit >= usize::from(clients));
                prop_assert!(spare || bits.len() != usize::from(clients).div_ceil(8));
            }
        }
    }

    #[test]
    fn subsets_are_of_the_same_roster() {
        let set = ClientSet::of(10, [1, 9]);
        assert!(set.is_subset_of(&ClientSet::of(10, [1, 2, 9])));
        assert!(!set.is_subset_of(&ClientSet::of(10, [1, 2])));
        assert!(!set.is_subset_of(&ClientSet::of(11, [1, 2, 9])));
        assert!(!set.contains(u16::MAX));
    }
}
