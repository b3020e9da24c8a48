//! Who is whose neighbour in a session: all with all, or the next k on a ring in random order.

use aes::Aes128;
use aes::cipher::{BlockCipherEncrypt as _, KeyInit as _};

use super::context::{Hash, SessionId, sha256};
use super::parameters::{GraphKind, Parameters};

/// The neighbours of every client, by index in the roster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graph {
    /// For each client its neighbours, ascending.
    neighbours: Vec<Vec<u16>>,
}

/// The seed of the ring's order: `H("graph" ‖ T ‖ beacon)`.
pub(crate) fn seed(session: &SessionId, beacon: &Hash) -> Hash {
    sha256(&[b"graph", session.as_bytes(), beacon])
}

impl Graph {
    /// The graph of these parameters; `seed` is public and decides the order of a ring.
    pub fn new(parameters: &Parameters, seed: &Hash) -> Self {
        match parameters.kind {
            GraphKind::Complete => Self::complete(parameters.clients),
            GraphKind::Harary => Self::ring(&permutation(parameters.clients, seed), parameters.neighbours),
        }
    }

    fn complete(clients: u16) -> Self {
        let others = |own: u16| (0..clients).filter(|&other| other != own).collect();
        Self { neighbours: (0..clients).map(others).collect() }
    }

    /// Each client with the `k`/2 before and after it in `order`.
    pub(crate) fn ring(order: &[u16], k: u16) -> Self {
        let n = order.len();
        let half = usize::from(k / 2);
        let mut neighbours = vec![Vec::with_capacity(usize::from(k)); n];
        for (place, &own) in order.iter().enumerate() {
            let mut around: Vec<u16> = (1..=half)
                .flat_map(|step| [(place + step) % n, (place + n - step % n) % n])
                .filter_map(|place| order.get(place).copied())
                .filter(|&other| other != own)
                .collect();
            around.sort_unstable();
            around.dedup();
            if let Some(list) = neighbours.get_mut(usize::from(own)) {
                *list = around;
            }
        }
        Self { neighbours }
    }

    /// The neighbours of `client`, ascending; nobody if there is no such client.
    pub fn neighbours(&self, client: u16) -> &[u16] {
        self.neighbours.get(usize::from(client)).map_or(&[], Vec::as_slice)
    }

    /// Index of `holder`'s share of `owner`'s secrets: its 1-based place among the owner's neighbours.
    pub fn share_index(&self, owner: u16, holder: u16) -> Option<u8> {
        let place = self.neighbours(owner).binary_search(&holder).ok()?;
        u8::try_from(place + 1).ok()
    }
}

/// A uniform permutation of 0..`n`: Fisher-Yates over an AES-128-CTR stream (key and IV from `seed`), each draw a
/// little-endian u32, drawn again where a remainder would be biased.
fn permutation(n: u16, seed: &Hash) -> Vec<u16> {
    let mut stream = Stream::new(seed);
    let mut order: Vec<u16> = (0..n).collect();
    for last in (1..usize::from(n)).rev() {
        let bound = last as u32 + 1;
        let limit = u32::MAX - (u32::MAX % bound + 1) % bound;
        let drawn = loop {
            let word = stream.next_u32();
            if word <= limit {
                break word % bound;
            }
        };
        order.swap(last, drawn as usize);
    }
    order
}

struct Stream {
    cipher: Aes128,
    iv: [u8; 12],
    counter: u32,
    words: Vec<u32>,
}

impl Stream {
    fn new(seed: &Hash) -> Self {
        let (key, rest) = seed.split_first_chunk::<16>().unwrap_or((&[0; 16], &[]));
        let iv = rest.first_chunk::<12>().unwrap_or(&[0; 12]);
        Self { cipher: Aes128::new(&(*key).into()), iv: *iv, counter: 0, words: Vec::new() }
    }

    fn next_u32(&mut self) -> u32 {
        if self.words.is_empty() {
            let mut block = [0; 16];
            let counter = self.counter.to_be_bytes();
            block.iter_mut().zip(self.iv.iter().chain(&counter)).for_each(|(to, from)| *to = *from);
            self.counter = self.counter.wrapping_add(1);
            let mut block = block.into();
            self.cipher.encrypt_block(&mut block);
            let (words, _) = block.as_slice().as_chunks::<4>();
            self.words.extend(words.iter().rev().map(|word| u32::from_le_bytes(*word)));
        }
        self.words.pop().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secagg::parameters::{Rules, ThreatLevel};

    #[test]
    fn rings_are_symmetric_regular_and_random() {
        let parameters = Parameters { clients: 300, kind: GraphKind::Harary, neighbours: 38, threshold: 20 };
        let graph = Graph::new(&parameters, &[1; 32]);
        for client in 0..300 {
            let neighbours = graph.neighbours(client);
            assert_eq!(neighbours.len(), 38);
            for (place, &other) in neighbours.iter().enumerate() {
                assert!(graph.neighbours(other).contains(&client) && other != client);
                assert_eq!(graph.share_index(client, other), Some(place as u8 + 1));
            }
        }
        assert_eq!(graph.share_index(0, 0), None);
        assert_ne!(graph, Graph::new(&parameters, &[2; 32]));
        let order = permutation(300, &[1; 32]);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().copied().eq(0..300) && order != sorted);
    }

    #[test]
    fn every_place_of_a_permutation_is_equally_likely() {
        let mut counts = [[0u32; 5]; 5];
        for seed in 0..5000u32 {
            let order = permutation(5, &sha256(&[&seed.to_le_bytes()]));
            order.iter().enumerate().for_each(|(place, &client)| counts[place][usize::from(client)] += 1);
        }
        // 1000 expected, standard deviation 28.
        assert!(counts.as_flattened().iter().all(|count| (850..1150).contains(count)), "{counts:?}");
    }

    #[test]
    fn a_complete_graph_joins_all() {
        let rules = Rules {
            level: ThreatLevel::Semi,
            corrupt_per_million: 0,
            dropout_per_million: 0,
            minimum_survivors: 3,
            maximum_clients: 255,
        };
        let graph = Graph::new(&rules.parameters(255).unwrap(), &[0; 32]);
        assert_eq!(graph.neighbours(254).len(), 254);
        assert_eq!(graph.share_index(254, 253), Some(254));
        assert_eq!(graph.neighbours(255), [0u16; 0]);
    }

    /// One attempt to cut the ring C_n(1..k/2): everybody uploads, the coordinator declares `dead` drop-outs, `corrupt`
    /// clients give it all they hold, and honest ones follow the rules. Returns the groups of honest clients whose sum
    /// opens although they are not all honest survivors.
    fn leak(ring: &Ring, threshold: u32, counts_itself: bool, dead: u32, corrupt: u32) -> Vec<u32> {
        let Ring { n, around } = ring;
        let everybody = (1u32 << n) - 1;
        let alive = everybody & !dead;
        let honest = everybody & !corrupt;
        let members = |set: u32| (0..*n).filter(move |client| set >> client & 1 == 1);
        // Who answers: honest survivors with enough living neighbours.
        let answers = members(alive & honest)
            .filter(|&client| (around[client] & alive).count_ones() + u32::from(counts_itself) >= threshold)
            .fold(0u32, |set, client| set | 1 << client);
        let known = |client: usize, set: u32| (around[client] & set).count_ones() >= threshold;
        let (mut own, mut pair) = (0u32, 0u32);
        for client in 0..*n {
            let is_alive = alive >> client & 1 == 1;
            let helpers = answers | corrupt;
            // Shares of a survivor's own mask and of a drop-out's key are given by all, the other kind by the corrupt.
            let own_known = known(client, if is_alive { helpers } else { corrupt });
            let pair_known = known(client, if is_alive { corrupt } else { helpers });
            own |= u32::from(own_known || answers >> client & 1 == 1) << client;
            pair |= u32::from(pair_known) << client;
        }
        // Honest clients that are still joined by a pair mask that nobody knows can only be summed together.
        let free = |client: usize| pair >> client & 1 == 1;
        let mut opened = Vec::new();
        let mut left = honest;
        while left != 0 {
            let mut group = 1u32 << left.trailing_zeros();
            loop {
                let joined = members(group)
                    .filter(|&client| !free(client))
                    .map(|client| around[client])
                    .fold(0, |set, around| set | around);
                let joined = members(joined & honest).filter(|&client| !free(client));
                let grown = joined.fold(group, |set, client| set | 1 << client);
                if grown == group {
                    break;
                }
                group = grown;
            }
            if group & own == group && group != alive & honest {
                opened.push(group);
            }
            left &= !group;
        }
        opened
    }

    struct Ring {
        n: usize,
        around: Vec<u32>,
    }

    impl Ring {
        fn new(n: usize, k: u16) -> Self {
            let order: Vec<u16> = (0..n as u16).collect();
            let graph = Graph::ring(&order, k);
            let set = |client| graph.neighbours(client).iter().fold(0u32, |set, other| set | 1 << other);
            Self { n, around: (0..n as u16).map(set).collect() }
        }

        /// Sets of up to two corrupt clients with at most `a` and somewhere `a` of them next to one client; by symmetry
        /// the first is client 0.
        fn corrupt_sets(&self, a: u32) -> Vec<u32> {
            let sets = (0..self.n).flat_map(|one| (one..self.n).map(move |two| 1u32 << one | 1 << two));
            let sets = sets.filter(|set| set & 1 == 1).chain([0]);
            let most = |set: u32| self.around.iter().map(|around| (around & set).count_ones()).max().unwrap();
            sets.filter(|&set| most(set) == a).collect()
        }

        fn first_leak(&self, threshold: u32, counts_itself: bool, a: u32) -> Option<(u32, u32, u32)> {
            self.corrupt_sets(a).into_iter().find_map(|corrupt| {
                (0..1u32 << self.n).find_map(|dead| {
                    let groups = leak(self, threshold, counts_itself, dead, corrupt);
                    groups.first().map(|&group| (corrupt, dead, group))
                })
            })
        }
    }

    fn set(clients: &[u32]) -> u32 {
        clients.iter().fold(0, |set, client| set | 1 << client)
    }

    /// t = k/2 + a + 1, a client never counted itself: no cut of a small ring opens a partial sum.
    #[test]
    fn no_false_drop_outs_open_an_arc_of_the_ring() {
        for n in 6..=14usize {
            for k in (2..=8u16).step_by(2).filter(|&k| usize::from(k) < n - 1) {
                let ring = Ring::new(n, k);
                for a in 0..=2 {
                    let threshold = u32::from(k) / 2 + a + 1;
                    assert_eq!(ring.first_leak(threshold, false, a), None, "n {n} k {k} a {a}");
                }
            }
        }
    }

    /// The rules that look alike do leak, so the search above can find something.
    #[test]
    fn weaker_rules_open_arcs() {
        // A client that counts itself.
        let ring = Ring::new(10, 4);
        assert!(leak(&ring, 3, true, set(&[0, 1, 5, 6]), 0).contains(&set(&[2, 3, 4])));
        assert!(leak(&ring, 3, false, set(&[0, 1, 5, 6]), 0).is_empty());
        // 2t > k + a, which excludes two signed lists and no more.
        let ring = Ring::new(12, 4);
        assert!(leak(&ring, 3, false, set(&[0, 7]), set(&[6, 11])).contains(&set(&[8, 9, 10])));
        assert!(leak(&ring, 4, false, set(&[0, 7]), set(&[6, 11])).is_empty());
        // t = k/2.
        assert!(ring.first_leak(2, false, 0).is_some());
        let leaks = |counts_itself| {
            let rings = (8..=11).flat_map(|n| (2..=6u16).step_by(2).map(move |k| (n, k)));
            rings
                .filter(|&(n, k)| {
                    Ring::new(n, k).first_leak(u32::from(k) / 2 + 1, counts_itself, 0).is_some()
                })
                .count()
        };
        assert_eq!(leaks(false), 0);
        assert!(leaks(true) > 0);
    }
}
