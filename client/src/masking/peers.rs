//! What the operator knows of other nodes: `peers.json` in the node's folder, and keys to read out by telephone.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use ed25519_dalek::{SigningKey, VerifyingKey};
use tributary_common::ledger::head::LedgerKey;
use tributary_common::ledger::hex::Hex;
use tributary_common::ledger::record::PublicKey;
use tributary_common::secagg::peers::Peers;
use x509_parser::pem::parse_x509_pem;
use zeroize::Zeroizing;

use crate::store::write_whole;

/// Their file, in the node's folder.
pub const PEERS_FILE: &str = "peers.json";
/// Held while the file is changed: the node and `peers pin` may both do it.
const LOCK_FILE: &str = "peers.lock";
/// Digits in a group of a fingerprint.
const GROUP: usize = 4;

/// Why peers cannot be read or written. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum PeersError {
    /// The disk.
    #[error("{}: {cause}", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
    /// Not what was written.
    #[error("{}: is damaged ({problem}); restore it, or delete it and pin the peers again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Not an identity.
    #[error(
        "{0:?} is no fingerprint: write the 64 digits that `tributary-client identity` prints at the other node, spaces or not"
    )]
    Fingerprint(String),
    /// The node's own key.
    #[error("the node's key.pem is not an Ed25519 private key in PEM")]
    Key,
}

/// The peers known in the folder `dir`.
///
/// # Errors
/// [`PeersError`].
pub fn load(dir: &Path) -> Result<Peers, PeersError> {
    let path = dir.join(PEERS_FILE);
    match fs::read(&path) {
        Ok(json) => serde_json::from_slice(&json)
            .map_err(|error| PeersError::Damaged { path, problem: error.to_string() }),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(Peers::default()),
        Err(cause) => Err(PeersError::Disk { path, cause }),
    }
}

/// Changes the peers known in the folder `dir`, one process at a time.
///
/// # Errors
/// [`PeersError`]; then they are as before.
pub fn change<T>(dir: &Path, change: impl FnOnce(&mut Peers) -> T) -> Result<T, PeersError> {
    let disk = |path: &Path| {
        let path = path.to_path_buf();
        move |cause| PeersError::Disk { path, cause }
    };
    let lock_path = dir.join(LOCK_FILE);
    let lock = File::create(&lock_path).map_err(disk(&lock_path))?;
    lock.lock().map_err(disk(&lock_path))?;
    let mut peers = load(dir)?;
    let result = change(&mut peers);
    let path = dir.join(PEERS_FILE);
    let json = serde_json::to_vec_pretty(&peers).map_err(io::Error::from).map_err(disk(&path))?;
    write_whole(&path, 0o600, |file| file.write_all(&json))
        .map_err(|error| disk(&path)(io::Error::other(error)))?;
    Ok(result)
}

/// Identities that were seen and not pinned, by the client's id, which follows from its name.
pub fn seen(peers: &Peers) -> Vec<(String, PublicKey)> {
    let json = serde_json::to_value(peers).unwrap_or_default();
    let seen = json.get("seen").and_then(|seen| seen.as_object());
    let entry = |(id, identity): (&String, &serde_json::Value)| {
        Some((id.clone(), serde_json::from_value(identity.clone()).ok()?))
    };
    seen.into_iter().flatten().filter_map(entry).collect()
}

/// An identity as people read it out: its 64 digits in groups of four.
pub fn fingerprint(identity: &PublicKey) -> String {
    let digits = identity.0.to_string();
    let groups: Vec<&str> =
        (0..digits.len()).step_by(GROUP).filter_map(|at| digits.get(at..at + GROUP)).collect();
    groups.join(" ")
}

/// The identity whose fingerprint was read out.
///
/// # Errors
/// [`PeersError::Fingerprint`], for bytes that are no point of the curve too: half of what was misread is none.
pub fn read_fingerprint(text: &str) -> Result<PublicKey, PeersError> {
    let digits: String = text
        .chars()
        .filter(|digit| !matches!(digit, ' ' | ':' | '-'))
        .map(|d| d.to_ascii_lowercase())
        .collect();
    let identity: Option<Hex<32>> = digits.parse().ok();
    identity
        .filter(|identity| VerifyingKey::from_bytes(&identity.0).is_ok_and(|key| !key.is_weak()))
        .map(PublicKey)
        .ok_or_else(|| PeersError::Fingerprint(text.to_owned()))
}

/// The node's identity: the key of its certificate and of its ledger.
///
/// # Errors
/// [`PeersError::Key`].
pub fn identity(key_pem: &str) -> Result<SigningKey, PeersError> {
    /// PKCS#8 of an Ed25519 key (RFC 8410, section 7): the algorithm, then two nested strings, then the seed.
    const BEFORE_SEED: [u8; 11] = [0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
    let (_, pem) = parse_x509_pem(key_pem.as_bytes()).map_err(|_| PeersError::Key)?;
    let der = Zeroizing::new(pem.contents);
    let start = der.windows(BEFORE_SEED.len()).position(|part| part == BEFORE_SEED).ok_or(PeersError::Key)?;
    let seed = der.get(start + BEFORE_SEED.len()..).and_then(|rest| rest.first_chunk::<32>());
    let key = SigningKey::from_bytes(seed.ok_or(PeersError::Key)?);
    // Whatever else the file says of itself was checked there.
    let ledger = LedgerKey::from_pem(key_pem).map_err(|_| PeersError::Key)?;
    if ledger.public().0.0 == key.verifying_key().to_bytes() { Ok(key) } else { Err(PeersError::Key) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tributary_common::ids::NodeName;
    use tributary_common::secagg::context::ClientId;
    use tributary_common::secagg::peers::Standing;

    #[test]
    fn an_identity_can_be_read_out_and_pinned_and_a_change_is_seen() {
        let pem = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let key = identity(&pem.serialize_pem()).unwrap();
        assert_eq!(key.verifying_key().to_bytes(), pem.public_key_raw());
        let public = PublicKey(Hex(key.verifying_key().to_bytes()));
        let read_out = fingerprint(&public);
        assert_eq!(read_out.split(' ').count(), 16);
        for spelling in [read_out.clone(), read_out.replace(' ', ""), read_out.to_uppercase()] {
            assert_eq!(read_fingerprint(&spelling).unwrap(), public);
        }
        for wrong in ["", "12", &read_out[1..], &format!("{read_out}0"), &"0".repeat(64)] {
            assert!(read_fingerprint(wrong).unwrap_err().to_string().contains("64 digits"), "{wrong}");
        }
        let dir = tempfile::tempdir().unwrap();
        let name = NodeName::literal("cleveland");
        assert!(load(dir.path()).unwrap().has_no_pins());
        change(dir.path(), |peers| peers.pin(name.clone(), public)).unwrap();
        let peers = load(dir.path()).unwrap();
        assert_eq!(peers.standing(&ClientId::of(&name), &public), Standing::Pinned);
        let other = PublicKey(Hex([3; 32]));
        assert_eq!(peers.standing(&ClientId::of(&name), &other), Standing::Contradicts);
        change(dir.path(), |peers| peers.remember(ClientId::from_bytes([1; 16]), other)).unwrap();
        assert_eq!(seen(&load(dir.path()).unwrap()), [("01".repeat(16), other)]);
        assert!(change(dir.path(), |peers| peers.unpin(&name)).unwrap());
        assert!(load(dir.path()).unwrap().has_no_pins());
        fs::write(dir.path().join(PEERS_FILE), "{").unwrap();
        assert!(load(dir.path()).unwrap_err().to_string().contains("peers.json: is damaged"));
        assert!(matches!(change(dir.path(), |_| ()), Err(PeersError::Damaged { .. })));
    }

    #[test]
    fn other_keys_are_no_identity() {
        let other = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap().serialize_pem();
        for bad in ["", "hello", &other] {
            assert!(matches!(identity(bad), Err(PeersError::Key)));
        }
    }
}
