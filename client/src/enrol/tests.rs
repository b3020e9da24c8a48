//! Enrolment and renewal over real TLS, against an authority of the test's own.

use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};

use rcgen::{
    BasicConstraints, CertificateSigningRequestParams, CertifiedIssuer, DistinguishedName, DnType, IsCa,
    KeyUsagePurpose,
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};
use tributary_proto::coordinator::enrolment_server::{Enrolment, EnrolmentServer};

use super::*;

const SECRET: [u8; 32] = [7; 32];

/// What the coordinator gets wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    Refuses,
    OtherKey,
    OtherName,
    OtherAuthority,
}

struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    fault: Mutex<Fault>,
    renewals: Mutex<u32>,
}

#[derive(Clone)]
struct Fake(Arc<Authority>);

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ED25519).unwrap()
}

fn named(name: &str) -> CertificateParams {
    let mut parameters = CertificateParams::new(vec!["localhost".into()]).unwrap();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters
}

impl Fake {
    fn new() -> Self {
        let mut parameters = named("authority");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let issuer = CertifiedIssuer::self_signed(parameters, key()).unwrap();
        Self(Arc::new(Authority { issuer, fault: Mutex::new(Fault::None), renewals: Mutex::new(0) }))
    }

    fn token(&self) -> JoinToken {
        JoinToken { secret: SECRET, node: "clinic".parse().unwrap(), authority_pem: self.0.issuer.pem() }
    }

    async fn serve(&self) -> String {
        let own = key();
        let certificate = named("server").signed_by(&own, &self.0.issuer).unwrap();
        let tls = ServerTlsConfig::new()
            .identity(Identity::from_pem(certificate.pem(), own.serialize_pem()))
            .client_ca_root(Certificate::from_pem(self.0.issuer.pem()))
            .client_auth_optional(true);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server =
            Server::builder().tls_config(tls).unwrap().add_service(EnrolmentServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        format!("https://localhost:{port}")
    }

    fn issue(&self, request_der: Vec<u8>) -> wire::EnrolResponse {
        let fault = *self.0.fault.lock().unwrap();
        let name = if fault == Fault::OtherName { "other" } else { "clinic" };
        let certificate = if fault == Fault::OtherKey {
            named(name).signed_by(&key(), &self.0.issuer).unwrap()
        } else {
            let mut request = CertificateSigningRequestParams::from_der(&request_der.into()).unwrap();
            request.params = named(name);
            let renewals = i32::try_from(*self.0.renewals.lock().unwrap()).unwrap();
            request.params.not_before = rcgen::date_time_ymd(2020 + renewals, 1, 1);
            request.signed_by(&self.0.issuer).unwrap()
        };
        let authority_pem =
            if fault == Fault::OtherAuthority { Fake::new().0.issuer.pem() } else { self.0.issuer.pem() };
        wire::EnrolResponse { certificate_pem: certificate.pem(), authority_pem, expires_unix_seconds: 0 }
    }
}

#[tonic::async_trait]
impl Enrolment for Fake {
    async fn enrol(
        &self,
        request: Request<wire::EnrolRequest>,
    ) -> Result<Response<wire::EnrolResponse>, Status> {
        let request = request.into_inner();
        if *self.0.fault.lock().unwrap() == Fault::Refuses
            || request.token_secret != SECRET
            || request.node != "clinic"
        {
            return Err(Status::permission_denied("the token was used already"));
        }
        Ok(Response::new(self.issue(request.certificate_request_der)))
    }

    async fn renew(
        &self,
        request: Request<wire::RenewRequest>,
    ) -> Result<Response<wire::EnrolResponse>, Status> {
        if request.peer_certs().is_none_or(|certificates| certificates.is_empty()) {
            return Err(Status::unauthenticated("no certificate"));
        }
        *self.0.renewals.lock().unwrap() += 1;
        Ok(Response::new(self.issue(request.into_inner().certificate_request_der)))
    }
}

#[tokio::test]
async fn a_node_joins_again_and_renews_with_one_key() {
    let fake = Fake::new();
    let url = fake.serve().await;
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("clinic");
    let joined = join(&url, &fake.token(), &home, None).await.unwrap();
    assert_eq!(joined.credentials.node.as_str(), "clinic");
    assert!(!joined.config_kept);
    assert_eq!(std::fs::read_to_string(&joined.config).unwrap(), crate::config::default_toml(&url));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&home), mode(&home.join(KEY_FILE))), (0o700, 0o600));

    std::fs::write(&joined.config, "# mine").unwrap();
    let again = join(&url, &fake.token(), &home, Some(&"clinic".parse().unwrap())).await.unwrap();
    assert!(again.config_kept);
    assert_eq!(std::fs::read_to_string(&joined.config).unwrap(), "# mine");
    assert_eq!(again.credentials.key_pem, joined.credentials.key_pem);

    let dialer = again.credentials.dialer(&url);
    let renewed = renew(&dialer, &home, &again.credentials).await.unwrap();
    assert_ne!(renewed.certificate_pem, again.credentials.certificate_pem);
    assert_eq!(Credentials::load(&home).unwrap().certificate_pem, renewed.certificate_pem);
    let bare = Dialer::new(url, &fake.token().authority_pem);
    assert!(matches!(renew(&bare, &home, &again.credentials).await, Err(EnrolError::Refused(_))));
    assert_eq!(*fake.0.renewals.lock().unwrap(), 1);
}

#[tokio::test]
async fn a_join_that_is_not_right_leaves_no_certificate() {
    let fake = Fake::new();
    let url = fake.serve().await;
    let dir = tempfile::tempdir().unwrap();
    let tries = async |token: &JoinToken, name: Option<&str>| {
        let name = name.map(|name| name.parse().unwrap());
        let error = join(&url, token, dir.path(), name.as_ref()).await.unwrap_err().to_string();
        assert!(!dir.path().join(CERTIFICATE_FILE).exists() && !error.contains('\n'), "{error}");
        error
    };
    assert!(tries(&fake.token(), Some("other")).await.contains("the token is for node clinic, not other"));
    let stranger = JoinToken { authority_pem: Fake::new().0.issuer.pem(), ..fake.token() };
    let error = tries(&stranger, None).await;
    assert!(error.starts_with("cannot reach the coordinator") && error.contains("certificate"), "{error}");
    for (fault, words) in [
        (Fault::Refuses, "the token was used already"),
        (Fault::OtherKey, "for another key"),
        (Fault::OtherName, "for node other, not clinic"),
        (Fault::OtherAuthority, "another authority"),
    ] {
        *fake.0.fault.lock().unwrap() = fault;
        let error = tries(&fake.token(), None).await;
        assert!(error.contains(words), "{fault:?}: {error}");
    }
}

#[tokio::test]
async fn credentials_are_checked_when_they_are_read() {
    let fake = Fake::new();
    let url = fake.serve().await;
    let dir = tempfile::tempdir().unwrap();
    let missing = Credentials::load(dir.path()).unwrap_err().to_string();
    assert!(missing.contains("key.pem: is missing: run `tributary-client join` first"), "{missing}");
    let credentials = join(&url, &fake.token(), dir.path(), None).await.unwrap().credentials;
    let (issued, expires) = (credentials.issued.0, credentials.expires.0);
    assert!(!credentials.is_due(Time(issued + (expires - issued) / 2)));
    assert!(credentials.is_due(Time(issued + (expires - issued) / 10 * 7)));
    assert!(credentials.check(Time(expires - 1)).is_ok());
    assert!(credentials.check(Time(expires)).unwrap_err().to_string().contains("has expired"));
    assert!(!format!("{credentials:?}").contains("PRIVATE"));
    std::fs::write(dir.path().join(KEY_FILE), key().serialize_pem()).unwrap();
    assert!(Credentials::load(dir.path()).unwrap_err().to_string().contains("does not belong to key.pem"));
    std::fs::write(dir.path().join(KEY_FILE), "x").unwrap();
    assert!(Credentials::load(dir.path()).unwrap_err().to_string().contains("not a private key"));
}
