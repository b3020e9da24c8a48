//! Signed tree heads: what a ledger's owner hands to others so that it cannot rewrite what they saw.
//!
//! A coordinator is shown heads of a sub-log alone: the ledger's first record and the records that concern
//! this coordinator, in order. Neither its size nor its root tells what the node does for others. The auditor
//! is shown the head of the whole ledger, from which every sub-log follows.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::{Signature as DalekSignature, Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use super::hex::Hex;
use super::merkle;
use super::record::{CoordinatorId, LedgerHash, LedgerId, PublicKey};

/// Length of a head's compact form.
pub const HEAD_BYTES: usize = SIGNED_BYTES + 32 + 64;
const SIGNED_BYTES: usize = 16 + 1 + 32 + 8 + 32;
/// Separates signatures of heads from whatever else the key signs.
const CONTEXT: &[u8] = b"tributary ledger head 1\n";

/// Which records a head covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum View {
    /// All records.
    Whole,
    /// The first record and those that concern a coordinator.
    Coordinator(CoordinatorId),
}

/// The state of a log: how many records, and the root over their hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// The ledger.
    pub ledger: LedgerId,
    /// Which of its records.
    pub view: View,
    /// How many.
    pub size: u64,
    /// The tree's root.
    pub root: LedgerHash,
}

/// A head and its owner's signature. Holding one proves nothing until [`SignedHead::verify`] was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedHead {
    /// The head.
    pub head: Head,
    /// The key that signed.
    pub key: PublicKey,
    /// Its Ed25519 signature.
    pub signature: Hex<64>,
}

/// Why a head is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// Not the compact form of a head.
    #[error("these bytes are not a ledger head of {HEAD_BYTES} bytes")]
    Form,
    /// The signature is not the key's.
    #[error("the head's signature is not valid: it was forged or damaged")]
    Signature,
    /// The head is of another ledger, of another view, or signed by another key.
    #[error("the head is of another ledger or was signed by another key")]
    Foreign,
    /// The ledger was rewritten or cut since the earlier head.
    #[error(
        "the ledger had {earlier} records and shows {now} that do not continue them: it was rewritten or restored"
    )]
    Inconsistent {
        /// Size of the earlier head.
        earlier: u64,
        /// Size of this one.
        now: u64,
    },
}

/// Why a text is not a signing key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the key is not an Ed25519 private key (PKCS#8 in PEM), as `tributary-client join` makes it")]
pub struct KeyError;

/// The key that signs a ledger's heads.
#[derive(Clone)]
pub struct LedgerKey(SigningKey);

impl fmt::Debug for LedgerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LedgerKey({:?})", self.public())
    }
}

/// An Ed25519 PKCS#8 structure (RFC 8410) up to its 32-byte seed, without the length and version that vary.
const PKCS8_HEAD: [u8; 11] = [0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

impl LedgerKey {
    /// The key of a 32-byte seed.
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self(SigningKey::from_bytes(&seed))
    }

    /// Reads a node's `key.pem`: Ed25519 in PKCS#8, version 1 or 2. A public key in it must fit the private
    /// one, whichever of its two encodings was used: ring writes the one that RFC 8410 does not.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        let mut lines = pem.lines().map(str::trim).skip_while(|line| *line != "-----BEGIN PRIVATE KEY-----");
        lines.next().ok_or(KeyError)?;
        let text: String = lines.take_while(|line| *line != "-----END PRIVATE KEY-----").collect();
        let der = STANDARD.decode(text).map_err(|_| KeyError)?;
        let [0x30, length, 0x02, 0x01, version @ (0 | 1), rest @ ..] = der.as_slice() else {
            return Err(KeyError);
        };
        if usize::from(*length) != der.len() - 2 || *length >= 0x80 {
            return Err(KeyError);
        }
        let rest = rest.strip_prefix(&PKCS8_HEAD).ok_or(KeyError)?;
        let (seed, rest) = rest.split_first_chunk::<32>().ok_or(KeyError)?;
        let key = Self::from_seed(*seed);
        let public = match (version, rest) {
            (0, []) | (1, []) => return Ok(key),
            (1, [0x81, 0x21, 0x00, public @ ..] | [0xa1, 0x23, 0x03, 0x21, 0x00, public @ ..]) => public,
            _ => return Err(KeyError),
        };
        if public == key.public().0.0 { Ok(key) } else { Err(KeyError) }
    }

    /// Its public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(Hex(self.0.verifying_key().to_bytes()))
    }

    /// Signs a head.
    pub fn sign(&self, head: Head) -> SignedHead {
        let signature = Hex(self.0.sign(&head.message()).to_bytes());
        SignedHead { head, key: self.public(), signature }
    }
}

impl Head {
    fn signed_bytes(&self) -> [u8; SIGNED_BYTES] {
        let (tag, coordinator) = match self.view {
            View::Whole => (0, [0; 32]),
            View::Coordinator(id) => (1, id.0.0),
        };
        let mut bytes = [0; SIGNED_BYTES];
        let parts: [&[u8]; 5] =
            [&self.ledger.0.0, &[tag], &coordinator, &self.size.to_be_bytes(), &self.root.0];
        bytes.iter_mut().zip(parts.concat()).for_each(|(byte, part)| *byte = part);
        bytes
    }

    fn message(&self) -> Vec<u8> {
        [CONTEXT, &self.signed_bytes()].concat()
    }
}

impl SignedHead {
    /// Checks the signature, strictly: one signature per head and key.
    ///
    /// # Errors
    /// [`HeadError::Signature`].
    pub fn verify(&self) -> Result<(), HeadError> {
        let key = VerifyingKey::from_bytes(&self.key.0.0).map_err(|_| HeadError::Signature)?;
        let signature = DalekSignature::from_bytes(&self.signature.0);
        key.verify_strict(&self.head.message(), &signature).map_err(|_| HeadError::Signature)
    }

    /// Checks the signature, and that this head continues `earlier`, the last one seen of the same log.
    /// `proof` is from [`merkle::consistency`] over this head's leaves.
    ///
    /// # Errors
    /// [`HeadError`].
    pub fn continues(&self, earlier: &SignedHead, proof: &[LedgerHash]) -> Result<(), HeadError> {
        self.verify()?;
        let (old, new) = (&earlier.head, &self.head);
        if (old.ledger, old.view, earlier.key) != (new.ledger, new.view, self.key) {
            return Err(HeadError::Foreign);
        }
        if merkle::verify_consistency(old.size, old.root, new.size, new.root, proof) {
            Ok(())
        } else {
            Err(HeadError::Inconsistent { earlier: old.size, now: new.size })
        }
    }

    /// The coordinator whose sub-log the head is of, if it is of one.
    pub fn coordinator(&self) -> Option<CoordinatorId> {
        match self.head.view {
            View::Whole => None,
            View::Coordinator(id) => Some(id),
        }
    }

    /// The compact form: ledger (16) | 0 or 1 (1) | coordinator or zeros (32) | size, big endian (8) | root
    /// (32) | key (32) | signature (64).
    pub fn to_bytes(&self) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        let parts: [&[u8]; 3] = [&self.head.signed_bytes(), &self.key.0.0, &self.signature.0];
        bytes.iter_mut().zip(parts.concat()).for_each(|(byte, part)| *byte = part);
        bytes
    }

    /// Reads the compact form. The signature is not checked.
    ///
    /// # Errors
    /// [`HeadError::Form`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, HeadError> {
        fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], HeadError> {
            let (part, others) = rest.split_first_chunk::<N>().ok_or(HeadError::Form)?;
            *rest = others;
            Ok(*part)
        }
        let rest = &mut &*bytes;
        let ledger = LedgerId(Hex(take(rest)?));
        let view = match (take(rest)?, take(rest)?) {
            ([0], zeros) if zeros == [0; 32] => View::Whole,
            ([1], id) => View::Coordinator(CoordinatorId(Hex(id))),
            _ => return Err(HeadError::Form),
        };
        let (size, root) = (u64::from_be_bytes(take(rest)?), Hex(take(rest)?));
        let (key, signature) = (PublicKey(Hex(take(rest)?)), Hex(take(rest)?));
        if !rest.is_empty() {
            return Err(HeadError::Form);
        }
        Ok(Self { head: Head { ledger, view, size, root }, key, signature })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(view: View, size: u64) -> Head {
        Head { ledger: LedgerId(Hex([3; 16])), view, size, root: Hex([4; 32]) }
    }

    /// RFC 8032 section 7.1, test 1, in the PKCS#8 of RFC 8410 section 10.3.
    #[test]
    fn keys_are_read_from_the_pem_that_nodes_have() {
        let made = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let key = LedgerKey::from_pem(&made.serialize_pem()).unwrap();
        assert_eq!(key.public().0.0, made.public_key_raw());

        let version_1 = "-----BEGIN PRIVATE KEY-----\n\
            MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
            -----END PRIVATE KEY-----\n";
        let key = LedgerKey::from_pem(version_1).unwrap();
        assert_eq!(
            key.public().to_string(),
            "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1"
        );
        let other = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap().serialize_pem();
        let mut mixed = made.serialize_der();
        let last = mixed.len() - 1;
        mixed[last] ^= 1;
        let body = STANDARD.encode(&mixed);
        let mixed = format!("-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n");
        for bad in ["", "hello", other.as_str(), &mixed, &version_1.replace("MC4C", "MC5C")] {
            assert_eq!(LedgerKey::from_pem(bad).unwrap_err(), KeyError);
        }
    }

    #[test]
    fn a_signature_covers_every_part_of_a_head() {
        let key = LedgerKey::from_seed([9; 32]);
        for view in [View::Whole, View::Coordinator(CoordinatorId(Hex([5; 32])))] {
            let signed = key.sign(head(view, 7));
            signed.verify().unwrap();
            let bytes = signed.to_bytes();
            assert_eq!(SignedHead::from_bytes(&bytes).unwrap(), signed);
            let json = serde_json::to_string(&signed).unwrap();
            assert_eq!(serde_json::from_str::<SignedHead>(&json).unwrap(), signed);
            for at in 0..bytes.len() {
                let mut changed = bytes;
                changed[at] ^= 1;
                let forged = SignedHead::from_bytes(&changed).and_then(|head| head.verify());
                assert!(forged.is_err(), "byte {at}");
                assert!(SignedHead::from_bytes(&bytes[..at]).is_err());
            }
            assert!(SignedHead::from_bytes(&[&bytes[..], &[0]].concat()).is_err());
        }
    }

    #[test]
    fn a_head_continues_an_earlier_one_or_says_that_it_does_not() {
        let key = LedgerKey::from_seed([9; 32]);
        let leaves: Vec<_> = (0..9_u8).map(|i| merkle::leaf(&[i])).collect();
        let at = |size: usize| {
            let root = merkle::root(&leaves[..size]);
            key.sign(Head { root, ..head(View::Whole, size as u64) })
        };
        let proof = merkle::consistency(&leaves, 4).unwrap();
        at(9).continues(&at(4), &proof).unwrap();
        at(9).continues(&at(9), &[]).unwrap();
        assert_eq!(at(4).continues(&at(9), &proof), Err(HeadError::Inconsistent { earlier: 9, now: 4 }));
        let rewritten = key.sign(head(View::Whole, 9));
        assert_eq!(rewritten.continues(&at(4), &proof), Err(HeadError::Inconsistent { earlier: 4, now: 9 }));
        let other = LedgerKey::from_seed([8; 32]).sign(at(9).head);
        assert_eq!(other.continues(&at(4), &proof), Err(HeadError::Foreign));
        let forged = SignedHead { signature: Hex([0; 64]), ..at(9) };
        assert_eq!(forged.continues(&at(4), &proof), Err(HeadError::Signature));
    }
}
