//! The Merkle tree over a log (RFC 9162 section 2.1), with proofs that an entry is in it and that it only
//! grew.
//!
//! Leaf: `SHA-256(0x00 | entry)`. Node: `SHA-256(0x01 | left | right)`. Empty: `SHA-256("")`. A tree of n > 1
//! leaves has the largest power of two below n on its left.

use sha2::{Digest as _, Sha256};

use super::hex::Hex;
use super::record::LedgerHash;

/// The hash of a leaf.
pub fn leaf(entry: &[u8]) -> LedgerHash {
    Hex(Sha256::new().chain_update([0]).chain_update(entry).finalize().into())
}

fn node(left: LedgerHash, right: LedgerHash) -> LedgerHash {
    Hex(Sha256::new().chain_update([1]).chain_update(left.0).chain_update(right.0).finalize().into())
}

/// The largest power of two below `count`, which is at least 2.
fn left_size(count: usize) -> usize {
    count.next_power_of_two() / 2
}

/// Leaves, left and right of the root.
fn halves(leaves: &[LedgerHash]) -> (&[LedgerHash], &[LedgerHash]) {
    leaves.split_at_checked(left_size(leaves.len())).unwrap_or((leaves, &[]))
}

/// The root over hashed leaves.
pub fn root(leaves: &[LedgerHash]) -> LedgerHash {
    match leaves {
        [] => Hex(Sha256::digest(b"").into()),
        [one] => *one,
        _ => {
            let (left, right) = halves(leaves);
            node(root(left), root(right))
        }
    }
}

/// The proof that leaf number `index` is in the tree; `None` if there is no such leaf.
pub fn inclusion(leaves: &[LedgerHash], index: usize) -> Option<Vec<LedgerHash>> {
    if index >= leaves.len() {
        return None;
    }
    let (mut proof, mut part, mut index) = (Vec::new(), leaves, index);
    while part.len() > 1 {
        let (left, right) = halves(part);
        if index < left.len() {
            proof.push(root(right));
            part = left;
        } else {
            proof.push(root(left));
            index -= left.len();
            part = right;
        }
    }
    proof.reverse();
    Some(proof)
}

/// The proof that the tree of the first `earlier` leaves is a beginning of the whole tree; `None` if
/// `earlier` is 0 or above the tree's size. It is empty where both are equal.
pub fn consistency(leaves: &[LedgerHash], earlier: usize) -> Option<Vec<LedgerHash>> {
    if earlier == 0 || earlier > leaves.len() {
        return None;
    }
    // `known`: the earlier tree's part here is one that the other side has the root of.
    let (mut proof, mut part, mut size, mut known) = (Vec::new(), leaves, earlier, true);
    while size < part.len() {
        let (left, right) = halves(part);
        if size <= left.len() {
            proof.push(root(right));
            part = left;
        } else {
            proof.push(root(left));
            part = right;
            size -= left.len();
            known = false;
        }
    }
    if !known {
        proof.push(root(part));
    }
    proof.reverse();
    Some(proof)
}

/// Whether `proof` shows that `leaf` is number `index` of the tree of `size` leaves with this root
/// (RFC 9162 section 2.1.3.2).
pub fn verify_inclusion(
    leaf: LedgerHash,
    index: u64,
    size: u64,
    proof: &[LedgerHash],
    expected: LedgerHash,
) -> bool {
    if index >= size {
        return false;
    }
    let (mut at, mut last, mut hash) = (index, size - 1, leaf);
    for sibling in proof {
        if last == 0 {
            return false;
        }
        if at & 1 == 1 || at == last {
            hash = node(*sibling, hash);
            while at & 1 == 0 && at != 0 {
                at >>= 1;
                last >>= 1;
            }
        } else {
            hash = node(hash, *sibling);
        }
        at >>= 1;
        last >>= 1;
    }
    last == 0 && hash == expected
}

/// Whether `proof` shows that the tree of `earlier` leaves with root `before` is a beginning of the tree of
/// `size` leaves with root `after` (RFC 9162 section 2.1.4.2). The empty tree is a beginning of every tree.
pub fn verify_consistency(
    earlier: u64,
    before: LedgerHash,
    size: u64,
    after: LedgerHash,
    proof: &[LedgerHash],
) -> bool {
    if earlier == 0 || earlier == size {
        let same = if earlier == 0 { before == root(&[]) } else { before == after };
        return same && proof.is_empty();
    }
    if earlier > size {
        return false;
    }
    let whole = earlier.is_power_of_two().then_some(before);
    let mut path = whole.iter().chain(proof);
    let Some(first) = path.next() else { return false };
    let (mut at, mut last) = (earlier - 1, size - 1);
    while at & 1 == 1 {
        at >>= 1;
        last >>= 1;
    }
    let (mut old, mut new) = (*first, *first);
    for hash in path {
        if last == 0 {
            return false;
        }
        if at & 1 == 1 || at == last {
            old = node(*hash, old);
            new = node(*hash, new);
            while at & 1 == 0 && at != 0 {
                at >>= 1;
                last >>= 1;
            }
        } else {
            new = node(new, *hash);
        }
        at >>= 1;
        last >>= 1;
    }
    last == 0 && old == before && new == after
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The eight entries of the certificate-transparency project's reference tests.
    fn reference() -> Vec<LedgerHash> {
        let entries: [&[u8]; 8] = [
            b"",
            &[0x00],
            &[0x10],
            &[0x20, 0x21],
            &[0x30, 0x31],
            &[0x40, 0x41, 0x42, 0x43],
            &[0x50, 0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57],
            &[0x60, 0x61, 0x62, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x6b, 0x6c, 0x6d, 0x6e, 0x6f],
        ];
        entries.iter().map(|entry| leaf(entry)).collect()
    }

    fn hex(texts: &[&str]) -> Vec<LedgerHash> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// Vectors of the certificate-transparency reference implementation (`merkle_tree_test`), which RFC 9162
    /// keeps.
    #[test]
    fn the_published_vectors() {
        let leaves = reference();
        assert_eq!(root(&[]).to_string(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        let roots = [
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
            "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
            "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
            "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
            "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
        ];
        for (size, expected) in (1..).zip(roots) {
            assert_eq!(root(&leaves[..size]).to_string(), expected, "{size}");
        }
        let proofs: [(usize, usize, &[&str]); 4] = [
            (0, 1, &[]),
            (
                0,
                8,
                &[
                    "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
                    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                    "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
                ],
            ),
            (
                5,
                8,
                &[
                    "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
                    "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
                ],
            ),
            (2, 3, &["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"]),
        ];
        for (index, size, expected) in proofs {
            assert_eq!(inclusion(&leaves[..size], index).unwrap(), hex(expected), "{index} of {size}");
        }
        let proofs: [(usize, usize, &[&str]); 3] = [
            (
                1,
                8,
                &[
                    "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
                    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                    "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
                ],
            ),
            (
                6,
                8,
                &[
                    "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
                    "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
                ],
            ),
            (
                2,
                5,
                &[
                    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                    "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
                ],
            ),
        ];
        for (earlier, size, expected) in proofs {
            assert_eq!(consistency(&leaves[..size], earlier).unwrap(), hex(expected), "{earlier} of {size}");
        }
    }

    #[test]
    fn there_is_no_proof_of_what_is_not_there() {
        let leaves = reference();
        assert_eq!(inclusion(&leaves, 8), None);
        assert_eq!(consistency(&leaves, 9), None);
        assert_eq!(consistency(&leaves, 0), None);
        assert!(verify_consistency(0, root(&[]), 8, root(&leaves), &[]));
        assert!(!verify_consistency(0, root(&leaves), 8, root(&leaves), &[]));
        assert!(!verify_consistency(9, root(&leaves), 8, root(&leaves), &[]));
        assert!(!verify_inclusion(leaves[0], 8, 8, &[], root(&leaves)));
        assert!(!verify_inclusion(leaves[0], u64::MAX, u64::MAX, &[leaves[0]; 70], root(&leaves)));
    }

    proptest! {
        #[test]
        fn proofs_hold_for_their_trees_and_for_no_others(
            size in 1_usize..200,
            pick in 0_usize..200,
            other in any::<[u8; 32]>(),
            spot in 0_usize..16,
        ) {
            let leaves: Vec<_> = (0..size).map(|i| leaf(&i.to_be_bytes())).collect();
            let (index, earlier) = (pick % size, pick % size + 1);
            let (whole, before) = (root(&leaves), root(&leaves[..earlier]));
            let (size, wrong) = (size as u64, Hex(other));

            let proof = inclusion(&leaves, index).unwrap();
            let holds = |hash, at, size, proof: &[_], root| verify_inclusion(hash, at, size, proof, root);
            prop_assert!(holds(leaves[index], index as u64, size, &proof, whole));
            prop_assert!(!holds(wrong, index as u64, size, &proof, whole));
            prop_assert!(!holds(leaves[index], index as u64, size, &proof, wrong));
            prop_assert!(!holds(leaves[index], index as u64 + 1, size, &proof, whole));
            let longer = [proof.clone(), vec![wrong]].concat();
            prop_assert!(!holds(leaves[index], index as u64, size, &longer, whole));
            if !proof.is_empty() {
                let mut changed = proof.clone();
                changed[spot % proof.len()] = wrong;
                prop_assert!(!holds(leaves[index], index as u64, size, &changed, whole));
                prop_assert!(!holds(leaves[index], index as u64, size, &proof[1..], whole));
            }

            let proof = consistency(&leaves, earlier).unwrap();
            prop_assert!(verify_consistency(earlier as u64, before, size, whole, &proof));
            prop_assert!(!verify_consistency(earlier as u64, wrong, size, whole, &proof));
            prop_assert!(!verify_consistency(earlier as u64, before, size, wrong, &proof));
            let longer = [proof.clone(), vec![wrong]].concat();
            prop_assert!(!verify_consistency(earlier as u64, before, size, whole, &longer));
            if !proof.is_empty() {
                let mut changed = proof.clone();
                changed[spot % proof.len()] = wrong;
                prop_assert!(!verify_consistency(earlier as u64, before, size, whole, &changed));
            }
        }
    }
}
