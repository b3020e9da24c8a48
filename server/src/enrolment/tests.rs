//! Enrolment, identity and TLS together, over loopback: who gets in, who does not, what is said and logged.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::net::TcpListener;
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Server};
use tracing::subscriber::DefaultGuard;
use tributary_proto::coordinator::UploadHeader;
use tributary_proto::coordinator::coordinator_client::CoordinatorClient;
use tributary_proto::coordinator::enrolment_client::EnrolmentClient;

use super::*;
use crate::authority::tests::{ed25519, request};
use crate::identity::RequireIdentity;
use crate::store::MemoryStore;
use crate::tls::{self, Limits};

const DAY_MILLISECONDS: u64 = 24 * 60 * 60 * 1000;

/// What was logged on this thread since the guard was made.
#[derive(Clone, Default)]
pub(crate) struct Logs(Arc<Mutex<Vec<u8>>>);

impl Logs {
    pub(crate) fn capture() -> (Self, DefaultGuard) {
        let logs = Self::default();
        let writer = logs.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .with_target(false)
            .finish();
        (logs, tracing::subscriber::set_default(subscriber))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// Waits until a line at WARN holds all of `words`.
    pub(crate) async fn warned(&self, words: &[&str]) {
        for _ in 0..500 {
            let text = self.text();
            if text.lines().any(|line| line.contains("WARN") && words.iter().all(|word| line.contains(word)))
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no WARN line with {words:?} in:\n{}", self.text());
    }
}

impl Write for Logs {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A coordinator that has the Enrolment service and no other: a call of another one that is let through ends
/// as "unimplemented".
struct Site {
    store: Arc<dyn Store>,
    authority: Arc<Authority>,
    identities: Arc<Identities>,
    address: SocketAddr,
    logs: Logs,
    _capture: DefaultGuard,
    _folder: tempfile::TempDir,
}

fn new_authority() -> (tempfile::TempDir, Authority) {
    let folder = tempfile::tempdir().unwrap();
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let authority = Authority::create(folder.path(), &names, Clock.now()).unwrap();
    (folder, authority)
}

impl Site {
    async fn start() -> Self {
        Self::with_rate(1000).await
    }

    async fn with_rate(enrolments_per_minute: u32) -> Self {
        let (logs, capture) = Logs::capture();
        let (folder, authority) = new_authority();
        let authority = Arc::new(authority);
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let identities = Arc::new(Identities::open(store.clone()).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let limits = Limits { maximum_connections: 100, handshake_timeout: Duration::from_secs(5) };
        let incoming = tls::incoming(listener, Arc::new(authority.server_config().unwrap()), limits);
        let service = EnrolmentService::new(
            store.clone(),
            authority.clone(),
            identities.clone(),
            90,
            enrolments_per_minute,
        );
        let router = Server::builder()
            .layer(RequireIdentity::new(identities.clone()))
            .add_service(service.into_server());
        tokio::spawn(router.serve_with_incoming(incoming));
        Self { store, authority, identities, address, logs, _capture: capture, _folder: folder }
    }

    fn token(&self, node: &str) -> JoinToken {
        let expires = Clock.now().plus_seconds(60);
        create_token(&*self.store, &self.authority, &node.parse().unwrap(), expires).unwrap()
    }

    fn endpoint(&self, identity: Option<(&str, &KeyPair)>) -> Endpoint {
        let authority = Certificate::from_pem(self.authority.certificate_pem());
        let mut tls = ClientTlsConfig::new().ca_certificate(authority).domain_name("localhost");
        if let Some((certificate, key)) = identity {
            tls = tls.identity(Identity::from_pem(certificate, key.serialize_pem()));
        }
        Endpoint::from_shared(format!("https://{}", self.address)).unwrap().tls_config(tls).unwrap()
    }

    async fn enrol(&self, token: &JoinToken, node: &str, request: Vec<u8>) -> Result<EnrolResponse, Status> {
        let channel = self.endpoint(None).connect().await.unwrap();
        let message = EnrolRequest {
            token_secret: token.secret.to_vec(),
            node: node.to_owned(),
            certificate_request_der: request,
        };
        EnrolmentClient::new(channel).enrol(message).await.map(Response::into_inner)
    }

    /// Enrols a new node: its certificate and key.
    async fn node(&self, name: &str) -> (String, KeyPair) {
        let key = ed25519();
        let response = self.enrol(&self.token(name), name, request(&key)).await.unwrap();
        (response.certificate_pem, key)
    }

    /// What the coordinator answers to a call with this certificate: "unimplemented" if it is let through.
    async fn call(&self, identity: Option<(&str, &KeyPair)>) -> Status {
        let channel = match self.endpoint(identity).connect().await {
            Ok(channel) => channel,
            Err(error) => return Status::unavailable(chain(&error)),
        };
        let status = call(channel).await;
        Status::new(status.code(), chain(&status))
    }
}

async fn call(channel: Channel) -> Status {
    CoordinatorClient::new(channel).upload_status(UploadHeader::default()).await.unwrap_err()
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words.push_str(&format!(": {error}"));
        source = error.source();
    }
    words
}

#[tokio::test]
async fn a_token_makes_a_stranger_a_node() {
    let site = Site::start().await;
    let key = ed25519();
    let response = site.enrol(&site.token("cleveland"), "cleveland", request(&key)).await.unwrap();
    assert_eq!(response.authority_pem, site.authority.certificate_pem());
    let days = (response.expires_unix_seconds * 1000 - Clock.now().0) / DAY_MILLISECONDS;
    assert!((89..=90).contains(&days), "{days}");
    let record = site.store.node(&"cleveland".parse().unwrap()).unwrap().unwrap();
    assert_eq!(record.identity, Digest::of(key.public_key_raw()));
    assert_eq!((record.expires.0 / 1000, record.revoked), (response.expires_unix_seconds, None));
    assert_eq!(site.call(Some((&response.certificate_pem, &key))).await.code(), Code::Unimplemented);
}

#[tokio::test]
async fn a_token_is_good_once_in_time_and_for_its_name() {
    let site = Site::start().await;
    let refused = async |token: &JoinToken, node: &str, code: Code, why: &str| {
        let status = site.enrol(token, node, request(&ed25519())).await.unwrap_err();
        assert!(status.code() == code && status.message().contains(why), "{status:?}");
        site.logs.warned(&["refused a certificate to 127.0.0.1:", why]).await;
    };
    let token = site.token("cleveland");
    site.enrol(&token, "cleveland", request(&ed25519())).await.unwrap();
    refused(&token, "cleveland", Code::Unauthenticated, "not known, or was used already").await;
    let unknown = JoinToken { secret: [7; 32], ..token };
    refused(&unknown, "cleveland", Code::Unauthenticated, "not known, or was used already").await;

    let late =
        create_token(&*site.store, &site.authority, &"hungarian".parse().unwrap(), Clock.now()).unwrap();
    refused(&late, "hungarian", Code::Unauthenticated, "the token for node hungarian has expired").await;

    let other = site.token("switzerland");
    refused(&other, "va", Code::PermissionDenied, "the token is not for node va").await;
    refused(&other, "switzerland", Code::Unauthenticated, "not known, or was used already").await;
    assert_eq!(site.identities.nodes().len(), 1);
}

#[tokio::test]
async fn of_two_that_use_a_token_at_once_one_gets_in() {
    let site = Site::start().await;
    let token = site.token("cleveland");
    let [a, b] = [ed25519(), ed25519()].map(|key| site.enrol(&token, "cleveland", request(&key)));
    let (a, b) = tokio::join!(a, b);
    assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
}

#[tokio::test]
async fn a_mistake_in_the_request_does_not_use_up_the_token() {
    let site = Site::start().await;
    let token = site.token("cleveland");
    let ecdsa = request(&KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap());
    let rsa =
        CertificateSigningRequestDer::from_pem_slice(include_bytes!("../authority/rsa.csr.pem")).unwrap();
    for (der, why) in [
        (Vec::new(), "not PKCS#10"),
        (vec![0xff; 300], "not PKCS#10"),
        (ecdsa, "not Ed25519"),
        (rsa.to_vec(), "not Ed25519"),
    ] {
        let status = site.enrol(&token, "cleveland", der).await.unwrap_err();
        assert!(status.code() == Code::InvalidArgument && status.message().contains(why), "{status:?}");
    }
    let status = site.enrol(&token, "Not A Name", request(&ed25519())).await.unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().contains("node name"), "{status:?}");
    let status = site.enrol(&token, "cleveland", vec![0; MESSAGE_BYTES]).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    let mut short = EnrolmentClient::new(site.endpoint(None).connect().await.unwrap());
    let status = short.enrol(EnrolRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);

    site.enrol(&token, "cleveland", request(&ed25519())).await.unwrap();
}

#[tokio::test]
async fn an_address_that_asks_too_often_waits() {
    let site = Site::with_rate(2).await;
    let token = site.token("cleveland");
    for _ in 0..2 {
        assert_eq!(site.enrol(&token, "cleveland", vec![1]).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let status = site.enrol(&token, "cleveland", request(&ed25519())).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("try again in 30 s") || status.message().contains("try again in 29 s"));
    site.logs.warned(&["too many requests from this address"]).await;
    assert!(site.store.take_token(token.secret_digest()).unwrap().is_some());
}

#[tokio::test]
async fn without_a_certificate_nothing_but_enrolment_is_open() {
    let site = Site::start().await;
    let status = site.call(None).await;
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("no client certificate: enrol this node first"), "{status:?}");
    site.logs.warned(&["refused a call from 127.0.0.1:", "no client certificate", "UploadStatus"]).await;

    let channel = site.endpoint(None).connect().await.unwrap();
    let renewal = RenewRequest { certificate_request_der: request(&ed25519()) };
    let status = EnrolmentClient::new(channel).renew(renewal).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_foreign_and_an_expired_certificate_fail_in_the_handshake_and_the_peer_hears_why() {
    let site = Site::start().await;
    let name: NodeName = "cleveland".parse().unwrap();
    site.node("cleveland").await;

    let (_folder, foreign) = new_authority();
    let key = ed25519();
    let asked = CertificateRequest::from_der(&request(&key)).unwrap();
    let issued = foreign.issue(&asked, &name, Clock.now(), 90).unwrap();
    let status = site.call(Some((&issued.certificate_pem, &key))).await;
    assert!(status.message().contains("UnknownCA"), "{status:?}");
    site.logs.warned(&["refused a connection from 127.0.0.1:", "its certificate is foreign"]).await;

    let long_ago = Time(Clock.now().0 - 91 * DAY_MILLISECONDS);
    let issued = site.authority.issue(&asked, &name, long_ago, 90).unwrap();
    let status = site.call(Some((&issued.certificate_pem, &key))).await;
    assert!(status.message().contains("CertificateExpired"), "{status:?}");
    site.logs.warned(&["refused a connection from 127.0.0.1:", "its certificate has expired"]).await;

    // The coordinator's own certificate is no node's, even with its key.
    let server = std::fs::read_to_string(site._folder.path().join("authority/server.pem")).unwrap();
    let key = KeyPair::from_pem(&server[server.find("-----BEGIN PRIVATE").unwrap()..]).unwrap();
    let status = site.call(Some((&server, &key))).await;
    assert!(status.message().contains("UnsupportedCertificate"), "{status:?}");
    site.logs.warned(&["refused a connection from 127.0.0.1:", "its certificate is not a node's"]).await;
}

#[tokio::test]
async fn a_revoked_node_is_out_at_once_on_old_and_new_connections_and_comes_back_with_a_new_token() {
    let site = Site::start().await;
    let (certificate, key) = site.node("cleveland").await;
    let (other_certificate, other_key) = site.node("hungarian").await;
    let open = site.endpoint(Some((&certificate, &key))).connect().await.unwrap();
    assert_eq!(call(open.clone()).await.code(), Code::Unimplemented);

    site.identities.revoke(&"cleveland".parse().unwrap(), Clock.now()).unwrap();
    for status in [call(open).await, site.call(Some((&certificate, &key))).await] {
        assert_eq!(status.code(), Code::PermissionDenied);
        assert!(status.message().contains("node cleveland was revoked"), "{status:?}");
    }
    site.logs.warned(&["refused a call from 127.0.0.1:", "node cleveland was revoked"]).await;
    assert_eq!(site.call(Some((&other_certificate, &other_key))).await.code(), Code::Unimplemented);

    let (new_certificate, new_key) = site.node("cleveland").await;
    assert_eq!(site.call(Some((&new_certificate, &new_key))).await.code(), Code::Unimplemented);
    let status = site.call(Some((&certificate, &key))).await;
    assert_eq!(status.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_name_that_enrols_again_leaves_its_old_certificate_behind() {
    let site = Site::start().await;
    let (old_certificate, old_key) = site.node("cleveland").await;
    let (certificate, key) = site.node("cleveland").await;
    assert_eq!(site.call(Some((&certificate, &key))).await.code(), Code::Unimplemented);
    let status = site.call(Some((&old_certificate, &old_key))).await;
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("node cleveland enrolled again with another key"), "{status:?}");
    site.logs.warned(&["refused a call from 127.0.0.1:", "no longer its own"]).await;
}

#[tokio::test]
async fn a_certificate_whose_node_the_coordinator_does_not_know_is_refused() {
    let site = Site::start().await;
    let key = ed25519();
    let asked = CertificateRequest::from_der(&request(&key)).unwrap();
    let issued = site.authority.issue(&asked, &"va".parse().unwrap(), Clock.now(), 90).unwrap();
    let status = site.call(Some((&issued.certificate_pem, &key))).await;
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("node va is not enrolled here"), "{status:?}");
}

#[tokio::test]
async fn renewal_keeps_the_key_and_the_old_certificate_stays_good() {
    let site = Site::start().await;
    let (old, key) = site.node("cleveland").await;
    let mut client = EnrolmentClient::new(site.endpoint(Some((&old, &key))).connect().await.unwrap());
    let renewal = |key: &KeyPair| RenewRequest { certificate_request_der: request(key) };
    let renewed = client.renew(renewal(&key)).await.unwrap().into_inner();
    assert_ne!(renewed.certificate_pem, old);
    for certificate in [&old, &renewed.certificate_pem] {
        assert_eq!(site.call(Some((certificate, &key))).await.code(), Code::Unimplemented);
    }
    let record = site.identities.node(&"cleveland".parse().unwrap()).unwrap();
    assert_eq!(record.expires.0 / 1000, renewed.expires_unix_seconds);

    let status = client.renew(renewal(&ed25519())).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("a new key needs a new token"), "{status:?}");
    let status = client.renew(RenewRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_node_does_not_talk_to_a_coordinator_that_its_token_does_not_name() {
    let site = Site::start().await;
    let (_folder, other) = new_authority();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(other.certificate_pem()))
        .domain_name("localhost");
    let endpoint =
        Endpoint::from_shared(format!("https://{}", site.address)).unwrap().tls_config(tls).unwrap();
    let error = endpoint.connect().await.unwrap_err();
    assert!(chain(&error).contains("UnknownIssuer"), "{}", chain(&error));
    site.logs.warned(&["refused a connection from 127.0.0.1:", "does not trust this coordinator"]).await;
}

#[test]
fn a_replaced_key_is_logged() {
    let (logs, _capture) = Logs::capture();
    let (_folder, authority) = new_authority();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let identities = Arc::new(Identities::open(store.clone()).unwrap());
    let core = Core { store, authority: Arc::new(authority), identities, node_certificate_days: 90 };
    let now = Clock.now();
    let enrol = |key: &KeyPair| {
        let node: NodeName = "cleveland".parse().unwrap();
        let token = create_token(&*core.store, &core.authority, &node, now.plus_seconds(9)).unwrap();
        let certificate_request_der = request(key);
        let request = EnrolRequest {
            token_secret: token.secret.to_vec(),
            node: node.to_string(),
            certificate_request_der,
        };
        core.enrol(&request, now).unwrap().identity.short()
    };
    let key = ed25519();
    let first = enrol(&key);
    assert!(logs.text().contains(&format!("node cleveland enrolled with key {first}")));
    enrol(&key);
    assert!(!logs.text().contains("WARN"));
    let second = enrol(&ed25519());
    let line = format!("node cleveland enrolled again with key {second}; its old key {first} is refused");
    assert!(
        logs.text().lines().any(|logged| logged.contains("WARN") && logged.contains(&line)),
        "{}",
        logs.text()
    );
}
