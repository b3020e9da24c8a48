//! Keys of a session: signatures by identities, key agreement, the key schedule of masks, the channel for shares.

use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{ChaCha20Poly1305, Key, Nonce};
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use hkdf::Hkdf;
use sha2::Sha256;
use subtle::ConstantTimeEq as _;
use x25519_dalek::{PublicKey as DhPublicKey, StaticSecret};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::bitmap::ClientSet;
use super::context::{ClientId, Hash, SessionId, sha256};
use crate::ledger::record::PublicKey;

/// Bytes of the plain text of a share: two ids, the share's index, a share of each secret.
const SHARE_BYTES: usize = 16 + 16 + 1 + 32 + 32;
/// Bytes of a sealed share.
pub const SEALED_BYTES: usize = SHARE_BYTES + 16;

/// 32 secret bytes, wiped when they are dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret(pub(crate) [u8; 32]);

impl Secret {
    /// Fresh bytes.
    pub(crate) fn random(rng: &mut impl rand::CryptoRng) -> Self {
        let mut secret = Self([0; 32]);
        rng.fill_bytes(&mut secret.0);
        secret
    }

    /// Fresh bytes of an X25519 scalar in its one canonical form.
    ///
    /// X25519 ignores five of the bits. If they were free, shares that are wrong in these alone would recover a secret
    /// with the right public key, and the holders of the right shares would be blamed.
    pub(crate) fn random_scalar(rng: &mut impl rand::CryptoRng) -> Self {
        let mut secret = Self::random(rng);
        secret.clamp();
        secret
    }

    fn clamp(&mut self) {
        let [first, .., last] = &mut self.0;
        *first &= 0xf8;
        *last = *last & 0x7f | 0x40;
    }

    /// Whether these are the bytes of a scalar in canonical form with this public key.
    pub(crate) fn is_scalar_of(&self, public: &[u8; 32]) -> bool {
        let mut canonical = self.clone();
        canonical.clamp();
        canonical.0.ct_eq(&self.0).into() && public_of(self) == *public
    }
}

/// Key and first block of one mask's stream: AES-128-CTR, block = `iv` ‖ big-endian u32 counter from 0.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct MaskKey {
    /// The AES-128 key.
    pub key: [u8; 16],
    /// The first 12 bytes of each counter block.
    pub iv: [u8; 12],
}

impl MaskKey {
    fn derive(session: &SessionId, secret: &Secret, info: &[&[u8]]) -> Self {
        let mut okm = Zeroizing::new([0; 28]);
        derive(session, secret, info, okm.as_mut_slice());
        let mut mask = Self { key: [0; 16], iv: [0; 12] };
        mask.key.iter_mut().chain(&mut mask.iv).zip(okm.iter()).for_each(|(to, from)| *to = *from);
        mask
    }

    /// The mask that two clients share in one segment; both derive the same. `secret` is X25519(s_u, S_v).
    pub(crate) fn pair(
        session: &SessionId,
        secret: &Secret,
        segment: u8,
        one: &ClientId,
        two: &ClientId,
    ) -> Self {
        let (low, high) = (one.min(two), one.max(two));
        Self::derive(session, secret, &[b"mask", &[segment], low.as_bytes(), high.as_bytes()])
    }

    /// The mask that only client `id` has, from its secret `b_u`.
    pub(crate) fn own(session: &SessionId, secret: &Secret, segment: u8, id: &ClientId) -> Self {
        Self::derive(session, secret, &[b"self", &[segment], id.as_bytes()])
    }
}

/// Whether a mask's words are added or subtracted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sign {
    /// Added, modulo 2^lane.
    Add,
    /// Subtracted, modulo 2^lane.
    Subtract,
}

impl Sign {
    /// How client `own` applies the mask that it shares with `other`: the lower id adds.
    pub fn of_pair(own: &ClientId, other: &ClientId) -> Self {
        if other > own { Self::Add } else { Self::Subtract }
    }

    /// The other sign.
    pub fn opposite(self) -> Self {
        match self {
            Self::Add => Self::Subtract,
            Self::Subtract => Self::Add,
        }
    }
}

/// One mask to add to or subtract from one segment of an update or of a sum.
#[derive(Clone)]
pub struct MaskTerm {
    /// Its stream.
    pub key: MaskKey,
    /// Its sign.
    pub sign: Sign,
    /// The segment, from 0.
    pub segment: u8,
}

/// HKDF-SHA256 with the session as salt.
fn derive(session: &SessionId, secret: &Secret, info: &[&[u8]], out: &mut [u8]) {
    // It fails only for more than 8160 bytes; 28 or 32 are asked for.
    let outcome = Hkdf::<Sha256>::new(Some(session.as_bytes()), &secret.0).expand_multi_info(info, out);
    debug_assert!(outcome.is_ok());
}

/// The public key of a secret one.
pub(crate) fn public_of(secret: &Secret) -> [u8; 32] {
    DhPublicKey::from(&StaticSecret::from(secret.0)).to_bytes()
}

/// X25519(secret, public), or none if `public` is a point of low order, which yields zero for every secret.
pub(crate) fn agree(secret: &Secret, public: &[u8; 32]) -> Option<Secret> {
    let shared = StaticSecret::from(secret.0).diffie_hellman(&DhPublicKey::from(*public));
    shared.was_contributory().then(|| Secret(shared.to_bytes()))
}

/// Whether a public key is a point of low order, with which no secret can be agreed.
pub(crate) fn is_low_order(public: &[u8; 32]) -> bool {
    agree(&Secret([8; 32]), public).is_none()
}

/// `bcommit = H("fl-secagg/v1/bcommit" ‖ T ‖ id ‖ b)`.
pub(crate) fn commit(session: &SessionId, id: &ClientId, own_mask: &Secret) -> Hash {
    sha256(&[b"fl-secagg/v1/bcommit", session.as_bytes(), id.as_bytes(), &own_mask.0])
}

/// What is sent to one neighbour: its share of each of the sender's secrets.
#[derive(Zeroize, ZeroizeOnDrop)]
pub(crate) struct Share {
    /// Where the sender's polynomials were evaluated, 1 to 254.
    #[zeroize(skip)]
    pub(crate) x: u8,
    /// Share of `s_u`, the secret of the sender's pair masks.
    pub(crate) pair: [u8; 32],
    /// Share of `b_u`, the secret of its own mask.
    pub(crate) own: [u8; 32],
}

/// The key for shares from one client to another; `channel` is X25519(c_u, C_v). The other direction has another key.
pub(crate) fn channel_key(session: &SessionId, channel: &Secret, from: &ClientId, to: &ClientId) -> Secret {
    let mut key = Secret([0; 32]);
    derive(session, channel, &[b"share", from.as_bytes(), to.as_bytes()], &mut key.0);
    key
}

/// Seals a share: ChaCha20-Poly1305 with a key that is used once, so the nonce is zero.
pub(crate) fn seal(
    session: &SessionId,
    channel: &Secret,
    from: &ClientId,
    to: &ClientId,
    share: &Share,
) -> [u8; SEALED_BYTES] {
    let key = channel_key(session, channel, from, to);
    let mut plain = Zeroizing::new(Vec::with_capacity(SHARE_BYTES));
    plain.extend_from_slice(from.as_bytes());
    plain.extend_from_slice(to.as_bytes());
    plain.push(share.x);
    plain.extend_from_slice(&share.pair);
    plain.extend_from_slice(&share.own);
    let aad = [session.as_bytes().as_slice(), from.as_bytes(), to.as_bytes()].concat();
    let cipher = ChaCha20Poly1305::new(&Key::from(key.0));
    let sealed = cipher.encrypt(&Nonce::default(), Payload { msg: &plain, aad: &aad });
    // Encryption fails only for messages of more than 256 GiB.
    sealed.ok().and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; SEALED_BYTES])
}

/// Opens a share that was sealed for `to`, or none if it is not from `from`, of this session, at index `x`.
pub(crate) fn open(
    session: &SessionId,
    channel: &Secret,
    from: &ClientId,
    to: &ClientId,
    x: u8,
    sealed: &[u8; SEALED_BYTES],
) -> Option<Share> {
    let key = channel_key(session, channel, from, to);
    let aad = [session.as_bytes().as_slice(), from.as_bytes(), to.as_bytes()].concat();
    let cipher = ChaCha20Poly1305::new(&Key::from(key.0));
    let plain =
        cipher.decrypt(&Nonce::default(), Payload { msg: sealed, aad: &aad }).ok().map(Zeroizing::new)?;
    let (sender, rest) = plain.split_first_chunk::<16>()?;
    let (receiver, rest) = rest.split_first_chunk::<16>()?;
    let (&[index], rest) = rest.split_first_chunk::<1>()?;
    let (pair, rest) = rest.split_first_chunk::<32>()?;
    let own = rest.first_chunk::<32>()?;
    let fits = sender == from.as_bytes() && receiver == to.as_bytes() && index == x;
    fits.then_some(Share { x, pair: *pair, own: *own })
}

/// What identities sign. Each text stands for one purpose, so no signature serves for another.
pub(crate) mod signed {
    use super::*;

    /// Keys of one attempt.
    pub(crate) fn advertise(
        context: &Hash,
        id: &ClientId,
        share_key: &[u8; 32],
        mask_key: &[u8; 32],
    ) -> Vec<u8> {
        [b"fl-secagg/v1/adv".as_slice(), context, id.as_bytes(), share_key, mask_key].concat()
    }

    /// All sealed shares and the commitment.
    pub(crate) fn shares(session: &SessionId, id: &ClientId, digest: &Hash) -> Vec<u8> {
        [b"fl-secagg/v1/shares".as_slice(), session.as_bytes(), id.as_bytes(), digest].concat()
    }

    /// The bytes of a masked upload.
    pub(crate) fn masked(session: &SessionId, id: &ClientId, digest: &Hash) -> Vec<u8> {
        [b"fl-secagg/v1/masked".as_slice(), session.as_bytes(), id.as_bytes(), digest].concat()
    }

    /// The survivors.
    pub(crate) fn alive(session: &SessionId, alive: &ClientSet) -> Vec<u8> {
        let clients = u32::from(alive.clients()).to_le_bytes();
        [b"fl-secagg/v1/alive".as_slice(), session.as_bytes(), &clients, alive.as_bytes()].concat()
    }
}

/// Signs with a node's identity.
pub(crate) fn sign(identity: &SigningKey, message: &[u8]) -> [u8; 64] {
    identity.sign(message).to_bytes()
}

/// Whether `signature` over `message` is by `identity`; weak keys and malleable signatures are refused.
pub(crate) fn verify(identity: &PublicKey, message: &[u8], signature: &[u8; 64]) -> bool {
    VerifyingKey::from_bytes(&identity.0.0)
        .is_ok_and(|key| key.verify_strict(message, &Signature::from_bytes(signature)).is_ok())
}
