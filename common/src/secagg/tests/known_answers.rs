//! The known answers of `secagg_kat.json`, made by another implementation.

use aes::Aes128;
use aes::cipher::{BlockCipherEncrypt as _, KeyInit as _};
use ed25519_dalek::SigningKey;

use super::{bytes, vectors};
use crate::ledger::hex::Hex;
use crate::ledger::record::PublicKey;
use crate::secagg::bitmap::ClientSet;
use crate::secagg::context::{ClientId, Hash, SessionId, context_hash, sha256};
use crate::secagg::keys::{
    MaskKey, SEALED_BYTES, Secret, Share, Sign, agree, commit, open, public_of, seal, sign, signed, verify,
};
use crate::secagg::roster::{Entry, Roster};

/// The first words of a mask's stream.
pub(crate) fn stream(key: &MaskKey, words: usize) -> Vec<u32> {
    let cipher = Aes128::new(&key.key.into());
    let block = |counter: u32| {
        let mut block = [0; 16];
        block[..12].copy_from_slice(&key.iv);
        block[12..].copy_from_slice(&counter.to_be_bytes());
        let mut block = block.into();
        cipher.encrypt_block(&mut block);
        block.as_chunks::<4>().0.to_vec()
    };
    (0..words.div_ceil(4) as u32).flat_map(block).map(u32::from_le_bytes).take(words).collect()
}

struct Client {
    id: ClientId,
    identity: SigningKey,
    c: Secret,
    s: Secret,
    b: Secret,
}

fn clients() -> Vec<Client> {
    let client = |i: u8| Client {
        id: ClientId::from_bytes([1 + i; 16]),
        identity: SigningKey::from_bytes(&[0x10 + i; 32]),
        c: Secret([0x20 + i; 32]),
        s: Secret([0x30 + i; 32]),
        b: Secret([0x40 + i; 32]),
    };
    (0..3).map(client).collect()
}

fn context() -> Hash {
    // The hashes are of these words.
    let hashes = ["config", "model", "support", "server"].map(|word| sha256(&[word.as_bytes()]));
    context_hash(b"task-0", 7, 0, hashes.each_ref())
}

fn roster(clients: &[Client]) -> Roster {
    let entry = |client: &Client| {
        let (share_key, mask_key) = (public_of(&client.c), public_of(&client.s));
        Entry {
            id: client.id,
            identity: PublicKey(Hex(client.identity.verifying_key().to_bytes())),
            share_key,
            mask_key,
            signature: sign(
                &client.identity,
                &signed::advertise(&context(), &client.id, &share_key, &mask_key),
            ),
        }
    };
    Roster::new(clients.iter().map(entry).collect()).unwrap()
}

#[test]
fn contexts_rosters_sessions_and_signatures() {
    let vectors = vectors();
    let clients = clients();
    assert_eq!(context().to_vec(), bytes(&vectors["ctx"]));
    let roster = roster(&clients);
    assert_eq!(roster.entries()[0].signature.to_vec(), bytes(&vectors["adv_sig_1"]));
    let root = roster.root(&context());
    assert_eq!(root.to_vec(), bytes(&vectors["roster_root"]));
    let session = SessionId::new(&context(), &root);
    assert_eq!(session.as_bytes().to_vec(), bytes(&vectors["T"]));
    let alive = ClientSet::of(3, [0, 1]);
    assert_eq!(alive.as_bytes(), [3]);
    let message = signed::alive(&session, &alive);
    let signature = sign(&clients[0].identity, &message);
    assert_eq!(signature.to_vec(), bytes(&vectors["alive_sig_1_bitmap03"]));
    assert!(verify(&roster.entries()[0].identity, &message, &signature));
    assert!(!verify(&roster.entries()[1].identity, &message, &signature));
    assert_eq!(commit(&session, &clients[0].id, &clients[0].b).to_vec(), bytes(&vectors["bcommit_1"]));
}

#[test]
fn masks_and_their_sum() {
    let vectors = vectors();
    let clients = clients();
    let session = SessionId::new(&context(), &roster(&clients).root(&context()));
    let pair = |own: &Client, other: &Client| agree(&own.s, &public_of(&other.s)).unwrap();
    assert_eq!(pair(&clients[0], &clients[1]).0.to_vec(), bytes(&vectors["Zs_12"]));
    assert_eq!(pair(&clients[1], &clients[0]).0.to_vec(), bytes(&vectors["Zs_12"]));
    let okm = |key: &MaskKey| [key.key.as_slice(), &key.iv].concat();
    let words = |key: &MaskKey| stream(key, 8).iter().map(|word| format!("{word:08x}")).collect::<Vec<_>>();
    let key = MaskKey::pair(&session, &pair(&clients[0], &clients[1]), 0, &clients[1].id, &clients[0].id);
    assert_eq!(okm(&key), bytes(&vectors["mask_okm_12"]));
    assert_eq!(serde_json::json!(words(&key)), vectors["mask_words_12"]);
    let key = MaskKey::own(&session, &clients[0].b, 0, &clients[0].id);
    assert_eq!(okm(&key), bytes(&vectors["self_okm_1"]));
    assert_eq!(serde_json::json!(words(&key)), vectors["self_words_1"]);

    let values = [[1i64, -2, 3, 0], [10, 20, -30, 0], [-5, 5, 0, 7]];
    for (own, values) in clients.iter().zip(values) {
        let mut masked: Vec<u32> = values.iter().map(|&value| value as u32).collect();
        let mut apply = |key: &MaskKey, sign| {
            for (into, word) in masked.iter_mut().zip(stream(key, 4)) {
                *into = match sign {
                    Sign::Add => into.wrapping_add(word),
                    Sign::Subtract => into.wrapping_sub(word),
                };
            }
        };
        apply(&MaskKey::own(&session, &own.b, 0, &own.id), Sign::Add);
        for other in clients.iter().filter(|other| other.id != own.id) {
            let key = MaskKey::pair(&session, &pair(own, other), 0, &own.id, &other.id);
            apply(&key, Sign::of_pair(&own.id, &other.id));
        }
        let index = usize::from(own.id.as_bytes()[0] - 1);
        let expected = vectors["masked_y_b20"][index].as_array().unwrap();
        for (word, expected) in masked.iter().zip(expected) {
            assert_eq!(word & 0xf_ffff, u32::from_str_radix(expected.as_str().unwrap(), 16).unwrap());
        }
    }
}

#[test]
fn sealed_shares() {
    let vectors = vectors();
    let clients = clients();
    let session = SessionId::new(&context(), &roster(&clients).root(&context()));
    let (one, two) = (&clients[0], &clients[1]);
    let channel = agree(&one.c, &public_of(&two.c)).unwrap();
    let share = Share { x: 2, pair: [0xaa; 32], own: [0xbb; 32] };
    let sealed = seal(&session, &channel, &one.id, &two.id, &share);
    assert_eq!(vectors["share_ct_len"], SEALED_BYTES);
    assert_eq!(sealed[SEALED_BYTES - 16..].to_vec(), bytes(&vectors["share_ct_1to2_last16"]));
    let key = crate::secagg::keys::channel_key(&session, &channel, &one.id, &two.id);
    assert_eq!(key.0.to_vec(), bytes(&vectors["K_1to2"]));

    let opened = open(&session, &channel, &one.id, &two.id, 2, &sealed).unwrap();
    assert_eq!((opened.x, opened.pair, opened.own), (2, [0xaa; 32], [0xbb; 32]));
    let other = SessionId::new(&[1; 32], &[2; 32]);
    assert!(open(&other, &channel, &one.id, &two.id, 2, &sealed).is_none(), "another session");
    assert!(open(&session, &channel, &two.id, &one.id, 2, &sealed).is_none(), "the other direction");
    assert!(open(&session, &channel, &one.id, &two.id, 3, &sealed).is_none(), "another index");
    for at in 0..SEALED_BYTES {
        let mut damaged = sealed;
        damaged[at] ^= 1;
        assert!(open(&session, &channel, &one.id, &two.id, 2, &damaged).is_none(), "byte {at}");
    }
}
