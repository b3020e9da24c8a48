//! How a node gets its certificate, and a new one before the old one expires. Its private key never leaves it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair, PKCS_ED25519};
use tributary_common::ids::NodeName;
use tributary_common::time::{Clock, Time};
use tributary_common::token::JoinToken;
use tributary_proto::coordinator as wire;
use x509_parser::pem::parse_x509_pem;

use crate::config::default_toml;
use crate::store::{Folder, FolderError, read_text, write_whole};
use crate::transport::{Dialer, status_line};

/// The private key, PKCS#8 in PEM.
pub const KEY_FILE: &str = "key.pem";
/// The node's certificate.
pub const CERTIFICATE_FILE: &str = "certificate.pem";
/// The certificate of the coordinator's authority: the only one that is trusted.
pub const AUTHORITY_FILE: &str = "authority.pem";
/// The configuration that `join` writes.
pub const CONFIG_FILE: &str = "node.toml";

/// Longest PEM file.
const PEM_BYTES: u64 = 64 * 1024;
/// Longest wait for the coordinator's answer.
const ANSWER_SECONDS: u64 = 30;

/// Why a node has no certificate that it can use.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The node's folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// `--name` is not the token's name.
    #[error("the token is for node {token}, not {asked}: leave --name out, or ask for a token for {asked}")]
    Name {
        /// The token's name.
        token: NodeName,
        /// The name asked for.
        asked: NodeName,
    },
    /// The coordinator cannot be reached, or is not the token's.
    #[error("cannot reach the coordinator: {0}")]
    Unreachable(String),
    /// The coordinator refused.
    #[error("the coordinator refused: {0}")]
    Refused(String),
    /// What the coordinator answered is of no use.
    #[error("the coordinator's answer is not usable: {0}")]
    Answer(String),
    /// A key or certificate in the folder cannot be used.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The certificate has expired.
    #[error(
        "the certificate of {node} has expired: ask the coordinator's operator for a token and run `tributary-client join` again"
    )]
    Expired {
        /// The node.
        node: NodeName,
    },
}

/// A node's key and certificate.
#[derive(Clone)]
pub struct Credentials {
    /// The certificate's name.
    pub node: NodeName,
    /// The certificate of the coordinator's authority.
    pub authority_pem: String,
    /// The node's certificate.
    pub certificate_pem: String,
    /// The node's private key.
    pub key_pem: String,
    /// From when the certificate is valid.
    pub issued: Time,
    /// Until when.
    pub expires: Time,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("node", &self.node)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads the files that `join` wrote into `dir`.
    ///
    /// # Errors
    /// One line that names the file.
    pub fn load(dir: &Path) -> Result<Self, EnrolError> {
        let read = |name: &str| {
            let path = dir.join(name);
            match read_text(&path, PEM_BYTES) {
                Err(FolderError::Io { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => {
                    let problem = "is missing: run `tributary-client join` first".into();
                    Err(EnrolError::File { path, problem })
                }
                other => Ok(other?),
            }
        };
        let (key_pem, certificate_pem, authority_pem) =
            (read(KEY_FILE)?, read(CERTIFICATE_FILE)?, read(AUTHORITY_FILE)?);
        let wrong = |name: &str, problem: String| EnrolError::File { path: dir.join(name), problem };
        let key = KeyPair::from_pem(&key_pem).map_err(|error| {
            wrong(KEY_FILE, format!("not a private key ({error}); run `tributary-client join` again"))
        })?;
        let facts = facts(&certificate_pem).map_err(|problem| wrong(CERTIFICATE_FILE, problem))?;
        if facts.public_key != key.public_key_raw() {
            let problem = "does not belong to key.pem; run `tributary-client join` again".into();
            return Err(wrong(CERTIFICATE_FILE, problem));
        }
        let Facts { node, issued, expires, .. } = facts;
        Ok(Self { node, authority_pem, certificate_pem, key_pem, issued, expires })
    }

    /// Whether less than a third of the validity is left.
    pub fn is_due(&self, now: Time) -> bool {
        let (left, whole) =
            (self.expires.0.saturating_sub(now.0), self.expires.0.saturating_sub(self.issued.0));
        left < whole / 3
    }

    /// Refuses an expired certificate.
    ///
    /// # Errors
    /// [`EnrolError::Expired`].
    pub fn check(&self, now: Time) -> Result<(), EnrolError> {
        if now < self.expires { Ok(()) } else { Err(EnrolError::Expired { node: self.node.clone() }) }
    }

    /// Dials `url` with this certificate.
    pub fn dialer(&self, url: &str) -> Dialer {
        let dialer = Dialer::new(url, &self.authority_pem);
        dialer.set_identity(&self.certificate_pem, &self.key_pem);
        dialer
    }
}

/// What a certificate says.
struct Facts {
    node: NodeName,
    public_key: Vec<u8>,
    issued: Time,
    expires: Time,
}

fn facts(certificate_pem: &str) -> Result<Facts, String> {
    let (_, pem) =
        parse_x509_pem(certificate_pem.as_bytes()).map_err(|_| "not a certificate in PEM".to_owned())?;
    let certificate = pem.parse_x509().map_err(|_| "not an X.509 certificate".to_owned())?;
    let names: Vec<&str> =
        certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok()).collect();
    let node = match names[..] {
        [name] => name.parse().map_err(|error: tributary_common::ids::IdError| error.to_string())?,
        _ => return Err("the certificate names no node".into()),
    };
    let time = |seconds: i64| Time(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000));
    let validity = certificate.validity();
    Ok(Facts {
        node,
        public_key: certificate.public_key().subject_public_key.data.to_vec(),
        issued: time(validity.not_before.timestamp()),
        expires: time(validity.not_after.timestamp()),
    })
}

/// What `join` did.
#[derive(Debug)]
pub struct Joined {
    /// The node's credentials.
    pub credentials: Credentials,
    /// The configuration file.
    pub config: PathBuf,
    /// Whether it was there before, and was left as it is.
    pub config_kept: bool,
}

/// Enrols a node: a key that stays in `dir`, a certificate for it, and a configuration to begin with.
///
/// A key that is there already is used again, so a join that failed half way can be repeated.
///
/// # Errors
/// One line.
pub async fn join(
    server: &str,
    token: &JoinToken,
    dir: &Path,
    name: Option<&NodeName>,
) -> Result<Joined, EnrolError> {
    if let Some(asked) = name.filter(|asked| **asked != token.node) {
        return Err(EnrolError::Name { token: token.node.clone(), asked: asked.clone() });
    }
    join_through(&Dialer::new(server, &token.authority_pem), server, token, dir).await
}

async fn join_through(
    dialer: &Dialer,
    server: &str,
    token: &JoinToken,
    dir: &Path,
) -> Result<Joined, EnrolError> {
    let _lock = Folder::open(dir)?;
    let key = own_key(&dir.join(KEY_FILE))?;
    let request = wire::EnrolRequest {
        token_secret: token.secret.to_vec(),
        node: token.node.to_string(),
        certificate_request_der: request_der(&key)?,
    };
    let mut client = dialer.enrolment().await.map_err(EnrolError::Unreachable)?;
    let answer = answered(client.enrol(request)).await?;
    check_answer(&answer, &key, &token.node)?;
    if answer.authority_pem.trim() != token.authority_pem.trim() {
        return Err(EnrolError::Answer("it names another authority than the token".into()));
    }
    let write = |name: &str, mode, text: &str| {
        write_whole(&dir.join(name), mode, |file| file.write_all(text.as_bytes()))
    };
    write(AUTHORITY_FILE, 0o644, &token.authority_pem)?;
    write(CERTIFICATE_FILE, 0o644, &answer.certificate_pem)?;
    let config = dir.join(CONFIG_FILE);
    let config_kept = config.exists();
    if !config_kept {
        write(CONFIG_FILE, 0o644, &default_toml(server))?;
    }
    Ok(Joined { credentials: Credentials::load(dir)?, config, config_kept })
}

/// Gets a new certificate for the same key and puts it in its place, on the disk and for the next connections.
///
/// # Errors
/// One line; the present certificate stays in use.
pub async fn renew(dialer: &Dialer, dir: &Path, present: &Credentials) -> Result<Credentials, EnrolError> {
    let key = own_key(&dir.join(KEY_FILE))?;
    let mut client = dialer.enrolment().await.map_err(EnrolError::Unreachable)?;
    let request = wire::RenewRequest { certificate_request_der: request_der(&key)? };
    let answer = answered(client.renew(request)).await?;
    check_answer(&answer, &key, &present.node)?;
    let path = dir.join(CERTIFICATE_FILE);
    write_whole(&path, 0o644, |file| file.write_all(answer.certificate_pem.as_bytes()))?;
    let renewed = Credentials::load(dir)?;
    dialer.set_identity(&renewed.certificate_pem, &renewed.key_pem);
    Ok(renewed)
}

/// The key in `path`; if there is none, a new one from the operating system's random numbers.
fn own_key(path: &Path) -> Result<KeyPair, EnrolError> {
    let wrong = |problem: String| EnrolError::File { path: path.to_path_buf(), problem };
    if fs::exists(path).map_err(|cause| FolderError::Io { path: path.to_path_buf(), cause })? {
        let pem = read_text(path, PEM_BYTES)?;
        let key = KeyPair::from_pem(&pem)
            .map_err(|error| wrong(format!("not a private key ({error}); delete it to get a new one")))?;
        if !key.is_compatible(&PKCS_ED25519) {
            return Err(wrong("not an Ed25519 key; delete it to get a new one".into()));
        }
        return Ok(key);
    }
    let key = KeyPair::generate_for(&PKCS_ED25519)
        .map_err(|error| wrong(format!("no key could be made: {error}")))?;
    write_whole(path, 0o600, |file| file.write_all(key.serialize_pem().as_bytes()))?;
    Ok(key)
}

/// A certificate request (PKCS#10) for a key; the name in the certificate is the coordinator's to give.
fn request_der(key: &KeyPair) -> Result<Vec<u8>, EnrolError> {
    let unusable =
        |error: rcgen::Error| EnrolError::Answer(format!("no certificate request could be made: {error}"));
    let mut parameters = CertificateParams::new(Vec::new()).map_err(unusable)?;
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    Ok(parameters.serialize_request(key).map_err(unusable)?.der().to_vec())
}

async fn answered(
    call: impl Future<Output = Result<tonic::Response<wire::EnrolResponse>, tonic::Status>>,
) -> Result<wire::EnrolResponse, EnrolError> {
    match tokio::time::timeout(Duration::from_secs(ANSWER_SECONDS), call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status))
            if status.code() == tonic::Code::Unavailable || status.code() == tonic::Code::Unknown =>
        {
            Err(EnrolError::Unreachable(status_line(&status)))
        }
        Ok(Err(status)) => Err(EnrolError::Refused(status_line(&status))),
        Err(_) => Err(EnrolError::Unreachable(format!("no answer within {ANSWER_SECONDS} s"))),
    }
}

/// Checks that the certificate is for this key and name and holds now.
fn check_answer(answer: &wire::EnrolResponse, key: &KeyPair, node: &NodeName) -> Result<(), EnrolError> {
    let facts = facts(&answer.certificate_pem).map_err(EnrolError::Answer)?;
    if facts.public_key != key.public_key_raw() {
        return Err(EnrolError::Answer("the certificate is for another key".into()));
    }
    if facts.node != *node {
        return Err(EnrolError::Answer(format!("the certificate is for node {}, not {node}", facts.node)));
    }
    let now = Clock.now();
    if now >= facts.expires || now < facts.issued {
        return Err(EnrolError::Answer(
            "the certificate is not valid now: check this machine's clock".into(),
        ));
    }
    Ok(())
}

#[cfg(test)]
#[path = "enrol/tests.rs"]
mod tests;
