//! The coordinator's own certificate authority: its keys on disk, the certificates it issues, its TLS settings.
//!
//! `data_dir/authority/` (mode 0700) holds `authority.key` (the key of the authority, mode 0600),
//! `authority.pem` (its certificate, public) and `server.pem` (certificate and key of the server, mode 0600,
//! one file so that they can only change together). All keys are Ed25519.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rand::TryRng as _;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ED25519, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;
use tributary_common::digest::Digest;
use tributary_common::ids::NodeName;
use tributary_common::ledger::head::LedgerKey;
use tributary_common::time::Time;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::GeneralName;
use x509_parser::oid_registry::OID_SIG_ED25519;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use x509_parser::x509::SubjectPublicKeyInfo as ParsedKey;

/// The URI in a node's certificate is this and the node's name.
pub(crate) const NODE_URI: &str = "tributary://node/";

/// Largest certificate request that is looked at, in bytes; one with an Ed25519 key has about 200.
const REQUEST_BYTES: usize = 8 * 1024;
const DAY_MILLISECONDS: u64 = 24 * 60 * 60 * 1000;
const AUTHORITY_DAYS: u32 = 3653;
const SERVER_DAYS: u32 = 365;
/// The server's certificate is replaced when it has fewer days left.
const SERVER_RENEWAL_DAYS: u32 = 30;
/// Certificates are valid from so long before they are issued, for peers whose clock is behind.
const BACKDATE_MILLISECONDS: u64 = 60 * 60 * 1000;

/// Why the authority cannot be used; one line.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The file system refused.
    #[error("{path}: {what}")]
    Io {
        /// The file or folder.
        path: String,
        /// What the system said.
        what: String,
    },
    /// There is no authority.
    #[error(
        "{path} does not exist; put the folder `authority` back from a backup (`tributary-server init` makes a new coordinator, \
         which no node of this one knows)"
    )]
    Missing {
        /// The file.
        path: String,
    },
    /// There is one already.
    #[error("{path} exists already: nodes trust that authority, and a new one would shut them out")]
    Exists {
        /// The file.
        path: String,
    },
    /// Other users can read a private key.
    #[error("{path} can be read by others (mode {mode:03o}); run `chmod 600` on it")]
    Exposed {
        /// The file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// A file does not hold what it should.
    #[error("{path} is damaged: {what}; restore it from a backup")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// A cryptographic operation failed.
    #[error("cannot {what}: {detail}")]
    Crypto {
        /// The operation.
        what: &'static str,
        /// The library's words.
        detail: String,
    },
}

/// Why a certificate request is refused; one line that may be sent to the peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("certificate request: {0}")]
pub struct RequestError(&'static str);

/// A certificate request (PKCS#10) that is signed with the Ed25519 key it is for.
///
/// Only the key is taken from it: names and extensions in a certificate are the authority's own.
#[derive(Debug, Clone)]
pub struct CertificateRequest {
    key: SubjectPublicKeyInfo,
    identity: Digest,
}

impl CertificateRequest {
    /// Checks the form, the key's type and the signature.
    pub fn from_der(der: &[u8]) -> Result<Self, RequestError> {
        if der.len() > REQUEST_BYTES {
            return Err(RequestError("is far too long"));
        }
        let (rest, request) =
            X509CertificationRequest::from_der(der).map_err(|_| RequestError("is not PKCS#10 in DER"))?;
        if !rest.is_empty() {
            return Err(RequestError("has bytes after its end"));
        }
        let key = &request.certification_request_info.subject_pki;
        let identity =
            identity(key).ok_or(RequestError("its key is not Ed25519, the only kind that is used here"))?;
        request.verify_signature().map_err(|_| RequestError("is not signed with its own key"))?;
        let key = SubjectPublicKeyInfo::from_der(key.raw)
            .map_err(|_| RequestError("its key is not well-formed Ed25519"))?;
        Ok(Self { key, identity })
    }

    /// The fingerprint of the requested key: BLAKE3 of its 32 bytes.
    pub fn identity(&self) -> Digest {
        self.identity
    }
}

/// The fingerprint of an Ed25519 key, BLAKE3 of its 32 bytes; `None` for a key of another kind.
pub(crate) fn identity(key: &ParsedKey<'_>) -> Option<Digest> {
    let ed25519 = key.algorithm.algorithm == OID_SIG_ED25519 && key.algorithm.parameters.is_none();
    let bytes = key.subject_public_key.data.as_ref();
    (ed25519 && key.subject_public_key.unused_bits == 0 && bytes.len() == 32).then(|| Digest::of(bytes))
}

/// A certificate for a node.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate_pem: String,
    /// The fingerprint of its key.
    pub identity: Digest,
    /// When it expires, a whole second.
    pub expires: Time,
}

/// A certificate authority with its key, and the server's certificate from it.
pub struct Authority {
    folder: PathBuf,
    server_names: BTreeSet<String>,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    served: Arc<Served>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new authority in `data_dir/authority/`, valid for ten years, and a certificate of the server for
    /// `server_names` (DNS names and IP addresses). Durable on return. An existing authority is left alone:
    /// [`AuthorityError::Exists`].
    pub fn create(data_dir: &Path, server_names: &[String], now: Time) -> Result<Self, AuthorityError> {
        let folder = data_dir.join("authority");
        let (key_path, certificate_path) = (folder.join("authority.key"), folder.join("authority.pem"));
        if certificate_path.exists() {
            return Err(AuthorityError::Exists { path: certificate_path.display().to_string() });
        }
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.map_err(|error| io(&folder, &error))?;

        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(crypto("make a key"))?;
        let fingerprint = Digest::of(key.public_key_raw()).short();
        let mut params =
            certificate_params(&format!("Tributary authority {fingerprint}"), now, AUTHORITY_DAYS)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(crypto("sign the authority's certificate"))?;
        // The key first: an authority whose certificate exists is whole.
        write_atomically(&key_path, key.serialize_pem().as_bytes(), 0o600)?;
        write_atomically(&certificate_path, certificate.pem().as_bytes(), 0o644)?;
        Self::open(data_dir, server_names, now)
    }

    /// Opens the authority in `data_dir/authority/`, and replaces the server's certificate if that is due.
    pub fn open(data_dir: &Path, server_names: &[String], now: Time) -> Result<Self, AuthorityError> {
        let folder = data_dir.join("authority");
        let (key_path, certificate_path) = (folder.join("authority.key"), folder.join("authority.pem"));
        let certificate_pem = read(&certificate_path)?;
        let key = KeyPair::from_pem(&read_private(&key_path)?).map_err(damaged(&key_path))?;
        let certificate =
            CertificateDer::from_pem_slice(certificate_pem.as_bytes()).map_err(damaged(&certificate_path))?;
        let (_, parsed) = X509Certificate::from_der(&certificate).map_err(damaged(&certificate_path))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(damaged(&certificate_path)("it does not belong to the key beside it"));
        }
        if !parsed.is_ca() {
            return Err(damaged(&certificate_path)("it is not an authority's certificate"));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(damaged(&certificate_path))?;
        let authority = Self {
            folder,
            server_names: server_names.iter().cloned().collect(),
            issuer,
            certificate,
            certificate_pem,
            served: Arc::default(),
        };
        authority.renew_server_certificate(now)?;
        Ok(authority)
    }

    /// The authority's certificate, as a join token carries it.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The authority's certificate, in DER: what a coordinator is known by.
    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate
    }

    /// The authority's key, as it signs ledgers.
    pub fn ledger_key(&self) -> Result<LedgerKey, AuthorityError> {
        let path = self.folder.join("authority.key");
        LedgerKey::from_pem(&read_private(&path)?).map_err(damaged(&path))
    }

    /// Issues a certificate to the node called `node`, for the requested key, valid from an hour before `now`
    /// until `valid_days` after it: subject and URI are the node's name, and it is good for TLS clients only.
    pub fn issue(
        &self,
        request: &CertificateRequest,
        node: &NodeName,
        now: Time,
        valid_days: u32,
    ) -> Result<Issued, AuthorityError> {
        let mut params = certificate_params(node.as_str(), now, valid_days)?;
        let uri = Ia5String::try_from(format!("{NODE_URI}{node}")).map_err(crypto("write the node's URI"))?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.complete(&mut params);
        let certificate =
            params.signed_by(&request.key, &self.issuer).map_err(crypto("sign the node's certificate"))?;
        let expires =
            Time(u64::try_from(params.not_after.unix_timestamp()).unwrap_or_default().saturating_mul(1000));
        Ok(Issued { certificate_pem: certificate.pem(), identity: request.identity, expires })
    }

    /// Replaces the server's certificate if it is missing, damaged, expires within 30 days or bears other names
    /// than it should; connections from then on see the new one. Returns whether it was replaced. To be called
    /// once a day.
    pub fn renew_server_certificate(&self, now: Time) -> Result<bool, AuthorityError> {
        let path = self.folder.join("server.pem");
        let reason = match read_private(&path) {
            Ok(pem) => match self.accept_server_pem(&pem, now) {
                Ok(key) => {
                    self.served.replace(key);
                    return Ok(false);
                }
                Err(reason) => reason,
            },
            Err(AuthorityError::Missing { .. }) => "there is none yet".to_owned(),
            Err(other) => return Err(other),
        };
        let key = KeyPair::generate_for(&PKCS_ED25519).map_err(crypto("make a key"))?;
        let mut params = certificate_params("Tributary coordinator", now, SERVER_DAYS)?;
        params.subject_alt_names =
            CertificateParams::new(self.server_names.iter().cloned().collect::<Vec<_>>())
                .map_err(crypto("write the server's names"))?
                .subject_alt_names;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.complete(&mut params);
        let certificate =
            params.signed_by(&key, &self.issuer).map_err(crypto("sign the server's certificate"))?;
        let pem = format!("{}{}", certificate.pem(), key.serialize_pem());
        let certified =
            self.accept_server_pem(&pem, now).map_err(crypto("use the server's new certificate"))?;
        write_atomically(&path, pem.as_bytes(), 0o600)?;
        self.served.replace(certified);
        tracing::info!("issued the coordinator a certificate for {}: {reason}", self.names());
        Ok(true)
    }

    /// TLS for the coordinator: version 1.3, HTTP/2, the server's certificate as it is at each handshake, and
    /// client certificates of this authority, which are optional so that a node without one can enrol.
    ///
    /// Sessions are not resumed: each connection shows its certificate anew.
    pub fn server_config(&self) -> Result<rustls::ServerConfig, AuthorityError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.certificate.clone()).map_err(crypto("use the authority's certificate"))?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .allow_unauthenticated()
            .build()
            .map_err(crypto("set up the check of client certificates"))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(crypto("set up TLS 1.3"))?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(self.served.clone());
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// The parts that the certificates of servers and nodes have in common.
    fn complete(&self, params: &mut CertificateParams) {
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
    }

    fn names(&self) -> String {
        self.server_names.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
    }

    /// The server's certificate and key in `pem`, or why they are not to be used.
    fn accept_server_pem(&self, pem: &str, now: Time) -> Result<CertifiedKey, String> {
        let unreadable = |_| "the old one cannot be read".to_owned();
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(unreadable)?;
        let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(unreadable)?;
        {
            let unreadable = |_| "the old one cannot be read".to_owned();
            let (_, parsed) = X509Certificate::from_der(&certificate).map_err(unreadable)?;
            let (_, authority) = X509Certificate::from_der(&self.certificate).map_err(unreadable)?;
            if parsed.verify_signature(Some(authority.public_key())).is_err() {
                return Err("the old one is from another authority".to_owned());
            }
            if expiry(&parsed) < now.plus_days(SERVER_RENEWAL_DAYS) {
                return Err(format!("the old one has less than {SERVER_RENEWAL_DAYS} days left"));
            }
            if names_of(&parsed) != self.server_names {
                return Err("the old one has other names".to_owned());
            }
        }
        let key = rustls::crypto::ring::sign::any_supported_type(&key).map_err(|error| error.to_string())?;
        let certified = CertifiedKey::new(vec![certificate], key);
        certified.keys_match().map_err(|_| "the old one does not belong to its key".to_owned())?;
        Ok(certified)
    }
}

/// The certificate that the server shows at present.
#[derive(Debug, Default)]
struct Served(RwLock<Option<Arc<CertifiedKey>>>);

impl Served {
    fn replace(&self, key: CertifiedKey) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(key));
    }
}

impl ResolvesServerCert for Served {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

trait Days {
    fn plus_days(self, days: u32) -> Time;
}

impl Days for Time {
    fn plus_days(self, days: u32) -> Time {
        self + u64::from(days) * DAY_MILLISECONDS
    }
}

/// When `certificate` expires.
pub(crate) fn expiry(certificate: &X509Certificate<'_>) -> Time {
    Time(u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or_default().saturating_mul(1000))
}

/// The DNS names and IP addresses of a certificate.
fn names_of(certificate: &X509Certificate<'_>) -> BTreeSet<String> {
    let extension = certificate.subject_alternative_name().ok().flatten();
    let names = extension.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
    names
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => match **bytes {
                [a, b, c, d] => Some(std::net::Ipv4Addr::new(a, b, c, d).to_string()),
                _ => {
                    <[u8; 16]>::try_from(*bytes).ok().map(|bytes| std::net::Ipv6Addr::from(bytes).to_string())
                }
            },
            _ => None,
        })
        .collect()
}

/// A certificate's subject, random serial number and validity; whole seconds.
fn certificate_params(name: &str, now: Time, valid_days: u32) -> Result<CertificateParams, AuthorityError> {
    let moment = |time: Time| {
        let seconds = i64::try_from(time.0 / 1000).unwrap_or(i64::MAX);
        OffsetDateTime::from_unix_timestamp(seconds).map_err(crypto("write the time into a certificate"))
    };
    let mut serial = [0; 16];
    rand::rngs::SysRng.try_fill_bytes(&mut serial).map_err(crypto("draw a serial number"))?;
    serial[0] &= 0x7f; // a serial number is positive
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = moment(Time(now.0.saturating_sub(BACKDATE_MILLISECONDS)))?;
    params.not_after = moment(now.plus_days(valid_days))?;
    Ok(params)
}

fn crypto<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> AuthorityError {
    move |error| AuthorityError::Crypto { what, detail: error.to_string() }
}

fn damaged<E: std::fmt::Display>(path: &Path) -> impl FnOnce(E) -> AuthorityError {
    move |error| AuthorityError::Damaged { path: path.display().to_string(), what: error.to_string() }
}

fn io(path: &Path, error: &std::io::Error) -> AuthorityError {
    let path = path.display().to_string();
    match error.kind() {
        ErrorKind::NotFound => AuthorityError::Missing { path },
        _ => AuthorityError::Io { path, what: error.to_string() },
    }
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    let bytes = fs::read(path).map_err(|error| io(path, &error))?;
    // A file that is not text is damaged; its lossy reading fails the parse that follows.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn read_private(path: &Path) -> Result<String, AuthorityError> {
    let mode = fs::metadata(path).map_err(|error| io(path, &error))?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(AuthorityError::Exposed { path: path.display().to_string(), mode });
    }
    read(path)
}

/// Replaces the file at `path`, durable on return: a crash leaves the old one or the new one, whole.
fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<(), AuthorityError> {
    let temporary = path.with_extension("new");
    let write = || {
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    };
    write().map_err(|error| AuthorityError::Io { path: path.display().to_string(), what: error.to_string() })
}

#[cfg(test)]
pub(crate) mod tests {
    use rcgen::{CustomExtension, PKCS_ECDSA_P256_SHA256};

    use super::*;

    pub(crate) const NOW: Time = Time(1_800_000_000_000);

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|&name| name.to_owned()).collect()
    }

    fn request_with(key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::default();
        change(&mut params);
        params.serialize_request(key).unwrap().der().to_vec()
    }

    /// A well-formed certificate request for `key`.
    pub(crate) fn request(key: &KeyPair) -> Vec<u8> {
        request_with(key, |_| ())
    }

    pub(crate) fn ed25519() -> KeyPair {
        KeyPair::generate_for(&PKCS_ED25519).unwrap()
    }

    /// A request with an RSA key of 2048 bits, made by another program.
    fn rsa_request() -> Vec<u8> {
        rustls::pki_types::CertificateSigningRequestDer::from_pem_slice(include_bytes!(
            "authority/rsa.csr.pem"
        ))
        .unwrap()
        .to_vec()
    }

    fn authority() -> (tempfile::TempDir, Authority) {
        let folder = tempfile::tempdir().unwrap();
        let authority =
            Authority::create(folder.path(), &names(&["localhost", "127.0.0.1", "::1"]), NOW).unwrap();
        (folder, authority)
    }

    #[test]
    fn a_nodes_certificate_says_what_the_authority_says_not_what_was_asked() {
        let (_folder, authority) = authority();
        let key = ed25519();
        let der = request_with(&key, |params| {
            params.distinguished_name.push(DnType::CommonName, "another-node");
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            let uri = Ia5String::try_from("tributary://node/another-node").unwrap();
            params.subject_alt_names = vec![SanType::URI(uri)];
            params.custom_extensions = vec![CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0])];
        });
        let asked = CertificateRequest::from_der(&der).unwrap();
        let issued = authority.issue(&asked, &"cleveland".parse().unwrap(), NOW, 90).unwrap();
        assert_eq!(issued.identity, Digest::of(key.public_key_raw()));
        assert_eq!(issued.expires, Time(NOW.0 + 90 * DAY_MILLISECONDS));

        let der = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap();
        let (_, parsed) = X509Certificate::from_der(&der).unwrap();
        assert_eq!(parsed.subject().to_string(), "CN=cleveland");
        let alternative = parsed.subject_alternative_name().unwrap().unwrap();
        assert!(matches!(*alternative.value.general_names, [GeneralName::URI("tributary://node/cleveland")]));
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth && !usage.any && usage.other.is_empty());
        assert!(!parsed.is_ca());
        assert_eq!(parsed.validity().not_before.timestamp() as u64, NOW.0 / 1000 - 3600);
        assert!(!issued.certificate_pem.contains("PRIVATE"));

        let again = authority.issue(&asked, &"cleveland".parse().unwrap(), NOW, 90).unwrap();
        let der = CertificateDer::from_pem_slice(again.certificate_pem.as_bytes()).unwrap();
        assert_ne!(X509Certificate::from_der(&der).unwrap().1.raw_serial(), parsed.raw_serial());
    }

    #[test]
    fn only_a_request_signed_with_its_own_ed25519_key_is_taken() {
        let good = request(&ed25519());
        let mut forged = good.clone();
        *forged.last_mut().unwrap() ^= 1;
        let mut longer = good.clone();
        longer.push(0);
        for (bad, why) in [
            (Vec::new(), "not PKCS#10"),
            (b"garbage".to_vec(), "not PKCS#10"),
            (good[..good.len() - 1].to_vec(), "not PKCS#10"),
            (vec![0x30; REQUEST_BYTES + 1], "too long"),
            (longer, "bytes after its end"),
            (forged, "not signed with its own key"),
            (request(&KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()), "not Ed25519"),
            (rsa_request(), "not Ed25519"),
        ] {
            let message = CertificateRequest::from_der(&bad).unwrap_err().to_string();
            assert!(message.contains(why) && !message.contains('\n'), "{why}: {message}");
        }
    }

    #[test]
    fn keys_are_readable_by_their_owner_alone_and_an_authority_is_never_replaced() {
        let (folder, authority) = authority();
        let path = |name: &str| folder.path().join("authority").join(name);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&folder.path().join("authority")), 0o700);
        assert_eq!((mode(&path("authority.key")), mode(&path("server.pem"))), (0o600, 0o600));
        assert_eq!(fs::read_dir(folder.path().join("authority")).unwrap().count(), 3);

        let again = Authority::create(folder.path(), &names(&["localhost"]), NOW).unwrap_err();
        assert!(matches!(again, AuthorityError::Exists { .. }), "{again}");
        assert_eq!(fs::read_to_string(path("authority.pem")).unwrap(), authority.certificate_pem());

        fs::set_permissions(path("authority.key"), fs::Permissions::from_mode(0o644)).unwrap();
        let exposed = Authority::open(folder.path(), &names(&["localhost"]), NOW).unwrap_err().to_string();
        assert!(exposed.contains("authority.key can be read by others (mode 644)"), "{exposed}");
    }

    #[test]
    fn what_is_missing_or_damaged_is_said() {
        let server = names(&["localhost"]);
        let open = |folder: &tempfile::TempDir| Authority::open(folder.path(), &server, NOW).unwrap_err();
        let empty = tempfile::tempdir().unwrap();
        assert!(open(&empty).to_string().contains("authority.pem does not exist; put the folder"));

        let (folder, _) = authority();
        let path = |name: &str| folder.path().join("authority").join(name);
        let whole = fs::read(path("authority.pem")).unwrap();
        fs::write(path("authority.pem"), [0xff; 40]).unwrap();
        assert!(matches!(open(&folder), AuthorityError::Damaged { .. }));
        let (other, _) = authority();
        fs::copy(other.path().join("authority/authority.pem"), path("authority.pem")).unwrap();
        assert!(
            open(&folder).to_string().contains("authority.pem is damaged: it does not belong to the key")
        );
        fs::write(path("authority.pem"), whole).unwrap();
        fs::write(path("authority.key"), "no key").unwrap();
        assert!(open(&folder).to_string().contains("authority.key is damaged"));
        fs::remove_file(path("authority.key")).unwrap();
        assert!(open(&folder).to_string().contains("authority.key does not exist"));
    }

    #[test]
    fn the_servers_certificate_is_replaced_when_it_is_due_and_only_then() {
        let (folder, first) = authority();
        let pem = || fs::read_to_string(folder.path().join("authority/server.pem")).unwrap();
        let served =
            |authority: &Authority| authority.served.0.read().unwrap().clone().unwrap().cert[0].clone();
        let server = names(&["::1", "127.0.0.1", "localhost"]);
        let (before, shown) = (pem(), served(&first));

        let reopened = Authority::open(folder.path(), &server, NOW.plus_days(334)).unwrap();
        assert_eq!((pem(), served(&reopened)), (before.clone(), shown.clone()));
        assert!(!reopened.renew_server_certificate(NOW.plus_days(334)).unwrap());
        assert!(reopened.renew_server_certificate(NOW.plus_days(336)).unwrap());
        assert_ne!((pem(), served(&reopened)), (before.clone(), shown.clone()));

        let renamed =
            Authority::open(folder.path(), &names(&["fl.example.org"]), NOW.plus_days(337)).unwrap();
        let certificate = served(&renamed);
        let (_, parsed) = X509Certificate::from_der(&certificate).unwrap();
        assert_eq!(names_of(&parsed), BTreeSet::from(["fl.example.org".to_owned()]));
        assert_eq!(expiry(&parsed), NOW.plus_days(337 + SERVER_DAYS));

        // A damaged file, or one from another authority, is replaced too: it holds nothing that is not remade.
        for bad in
            [String::new(), "garbage".to_owned(), pem().replace("BEGIN PRIVATE", "BEGIN PUBLIC"), before]
        {
            fs::write(folder.path().join("authority/server.pem"), &bad).unwrap();
            Authority::open(folder.path(), &names(&["fl.example.org"]), NOW.plus_days(337)).unwrap();
            assert_ne!(pem(), bad);
        }
        let (other, _) = authority();
        fs::copy(other.path().join("authority/server.pem"), folder.path().join("authority/server.pem"))
            .unwrap();
        let reopened = Authority::open(folder.path(), &server, NOW).unwrap();
        assert!(!reopened.renew_server_certificate(NOW).unwrap());
        assert_ne!(pem(), fs::read_to_string(other.path().join("authority/server.pem")).unwrap());
    }
}
