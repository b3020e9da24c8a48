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
