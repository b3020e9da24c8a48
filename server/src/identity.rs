//! Who a peer is: its certificate's name and key, checked against what is enrolled at each call.
//!
//! TLS proves that a certificate comes from the authority and that the peer holds its key. Here is decided
//! whether it is still good: the node is enrolled, not revoked, and this is the key that it enrolled last.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tower::{Layer, Service};
use tributary_common::digest::Digest;
use tributary_common::ids::NodeName;
use tributary_common::time::{Clock, Time};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::authority::{self, NODE_URI};
use crate::store::{NodeRecord, Store, StoreError};

/// The one call that needs no identity: it is how a node gets one.
const OPEN_CALL: &str = "/tributary.coordinator.v1.Enrolment/Enrol";

/// How long [`Identities::until_refused`] sleeps at most before it reads the clock again.
const CLOCK_CHECK_SECONDS: u64 = 3600;

/// What a client certificate says, once TLS has verified it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The node's name.
    pub node: NodeName,
    /// Fingerprint of its Ed25519 public key: BLAKE3 of the 32 bytes.
    pub identity: Digest,
    /// When the certificate expires.
    pub expires: Time,
}

/// Why a peer is refused; one line that may be sent to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The connection has no client certificate.
    #[error("no client certificate: enrol this node first, with `tributary-client join`")]
    NoCertificate,
    /// The certificate is from the authority, but not a node's.
    #[error("the certificate is not a node's: {0}")]
    NotANode(&'static str),
    /// The node is not enrolled.
    #[error("node {0} is not enrolled here")]
    Unknown(NodeName),
    /// The node was revoked.
    #[error("node {0} was revoked: it can enrol again with a new token")]
    Revoked(NodeName),
    /// The name was enrolled again with another key.
    #[error("node {0} enrolled again with another key: this certificate is no longer its own")]
    Replaced(NodeName),
    /// The certificate has expired.
    #[error("the certificate of node {0} has expired: it can enrol again with a new token")]
    Expired(NodeName),
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let words = refusal.to_string();
        match refusal {
            Refusal::NoCertificate | Refusal::NotANode(_) | Refusal::Expired(_) => {
                Self::unauthenticated(words)
            }
            Refusal::Unknown(_) | Refusal::Revoked(_) | Refusal::Replaced(_) => {
                Self::permission_denied(words)
            }
        }
    }
}

impl PeerIdentity {
    /// Reads a certificate that TLS has verified.
    pub fn from_certificate(der: &CertificateDer<'_>) -> Result<Self, Refusal> {
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|_| Refusal::NotANode("it cannot be read"))?;
        let identity = authority::identity(certificate.public_key())
            .ok_or(Refusal::NotANode("its key is not Ed25519"))?;
        let names = certificate.subject_alternative_name().ok().flatten();
        let node = match names.as_ref().map(|names| names.value.general_names.as_slice()) {
            Some([GeneralName::URI(uri)]) => uri.strip_prefix(NODE_URI).and_then(|name| name.parse().ok()),
            _ => None,
        };
        let node = node.ok_or(Refusal::NotANode("it names no node"))?;
        Ok(Self { node, identity, expires: authority::expiry(&certificate) })
    }
}

/// Why a certificate's renewal could not be recorded.
#[derive(Debug, thiserror::Error)]
pub enum ExtendError {
    /// The identity is no longer live.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The enrolled nodes, and which identities are live.
///
/// All writes of [`NodeRecord`]s go through here, so that a check needs no disk and sees a revocation at once.
/// Methods that write block on the disk: call them off the async threads.
pub struct Identities {
    store: Arc<dyn Store>,
    nodes: RwLock<BTreeMap<NodeName, NodeRecord>>,
    /// Held while a record is read, changed and written.
    writing: Mutex<()>,
    /// Counts the changes to `nodes`.
    changes: watch::Sender<u64>,
}

impl std::fmt::Debug for Identities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identities").finish_non_exhaustive()
    }
}

impl Identities {
    /// Reads all nodes from `store`.
    pub fn open(store: Arc<dyn Store>) -> Result<Self, StoreError> {
        let nodes = store.nodes()?.into_iter().map(|node| (node.name.clone(), node)).collect();
        Ok(Self { store, nodes: RwLock::new(nodes), writing: Mutex::new(()), changes: watch::Sender::new(0) })
    }

    /// All enrolled nodes, revoked ones included, by name.
    pub fn nodes(&self) -> Vec<NodeRecord> {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// One node's record.
    pub fn node(&self, name: &NodeName) -> Option<NodeRecord> {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Whether `peer` is live at `now`.
    pub fn check(&self, peer: &PeerIdentity, now: Time) -> Result<(), Refusal> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        let name = || peer.node.clone();
        let record = nodes.get(&peer.node).ok_or_else(|| Refusal::Unknown(name()))?;
        if record.identity != peer.identity {
            return Err(Refusal::Replaced(name()));
        }
        if record.revoked.is_some() {
            return Err(Refusal::Revoked(name()));
        }
        if peer.expires <= now {
            return Err(Refusal::Expired(name()));
        }
        Ok(())
    }

    /// Returns as soon as `peer` is no longer live: revoked, enrolled again with another key, or expired. What
    /// a stream waits for beside its messages.
    pub async fn until_refused(&self, peer: &PeerIdentity) -> Refusal {
        let mut changes = self.changes.subscribe();
        loop {
            // Marked as seen before the check: a change during the check ends the wait below.
            changes.borrow_and_update();
            let now = Clock.now();
            if let Err(refusal) = self.check(peer, now) {
                return refusal;
            }
            let left = Duration::from_millis(peer.expires.0.saturating_sub(now.0).saturating_add(1));
            tokio::select! {
                _ = changes.changed() => {}
                () = tokio::time::sleep(left.min(Duration::from_secs(CLOCK_CHECK_SECONDS))) => {}
            }
        }
    }

    /// Records an enrolment, durable on return. It replaces an earlier one of the same name, whose certificates
    /// are refused from then on if the key is another one.
    pub fn enrol(&self, record: NodeRecord) -> Result<(), StoreError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.put(record)
    }

    /// Records that `peer`, live at `now`, has a certificate until `expires`; durable on return.
    pub fn extend(&self, peer: &PeerIdentity, expires: Time, now: Time) -> Result<(), ExtendError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.check(peer, now)?;
        let record = self.node(&peer.node).ok_or_else(|| Refusal::Unknown(peer.node.clone()))?;
        Ok(self.put(NodeRecord { expires: expires.max(record.expires), ..record })?)
    }

    /// Revokes a node, durable on return; its calls are refused and its streams end from then on. A node that is
    /// revoked already stays as it is. Unknown: [`StoreError::Missing`].
    pub fn revoke(&self, name: &NodeName, now: Time) -> Result<NodeRecord, StoreError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = || StoreError::Missing { what: "node", name: name.to_string() };
        let record = self.node(name).ok_or_else(missing)?;
        if record.revoked.is_some() {
            return Ok(record);
        }
        let record = NodeRecord { revoked: Some(now), ..record };
        self.put(record.clone())?;
        tracing::warn!(node = %name, "revoked node {name}");
        Ok(record)
    }

    /// Writes a record; `writing` is held.
    fn put(&self, record: NodeRecord) -> Result<(), StoreError> {
        self.store.put_node(&record)?;
        self.nodes.write().unwrap_or_else(PoisonError::into_inner).insert(record.name.clone(), record);
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
        Ok(())
    }
}

/// A layer that lets a call pass only with a live identity, which it puts into the request's extensions as a
/// [`PeerIdentity`]. `Enrol` alone passes without one.
#[derive(Debug, Clone)]
pub struct RequireIdentity {
    identities: Arc<Identities>,
}

impl RequireIdentity {
    /// Checks calls against `identities`.
    pub fn new(identities: Arc<Identities>) -> Self {
        Self { identities }
    }

    fn admit<B>(&self, request: &mut http::Request<B>) -> Result<(), Refusal> {
        if request.uri().path() == OPEN_CALL {
            return Ok(());
        }
        let connection = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
        let certificates = connection.and_then(TlsConnectInfo::peer_certs);
        let certificate =
            certificates.as_ref().and_then(|chain| chain.first()).ok_or(Refusal::NoCertificate)?;
        let peer = PeerIdentity::from_certificate(certificate)?;
        self.identities.check(&peer, Clock.now())?;
        request.extensions_mut().insert(peer);
        Ok(())
    }
}

/// Where a request comes from, if it came over TLS.
pub(crate) fn address(extensions: &http::Extensions) -> Option<SocketAddr> {
    extensions.get::<TlsConnectInfo<TcpConnectInfo>>().and_then(|info| info.get_ref().remote_addr())
}

/// An address for a log line.
pub(crate) fn shown(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| "an unknown address".to_owned(), |address| address.to_string())
}

impl<S> Layer<S> for RequireIdentity {
    type Service = WithIdentity<S>;

    fn layer(&self, inner: S) -> WithIdentity<S> {
        WithIdentity { check: self.clone(), inner }
    }
}

/// A service behind [`RequireIdentity`].
#[derive(Debug, Clone)]
pub struct WithIdentity<S> {
    check: RequireIdentity,
    inner: S,
}

impl<S, B> Service<http::Request<B>> for WithIdentity<S>
where
    S: Service<http::Request<B>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        match self.check.admit(&mut request) {
            Ok(()) => Box::pin(self.inner.call(request)),
            Err(refusal) => {
                let peer = shown(address(request.extensions()));
                tracing::warn!(%peer, call = request.uri().path(), "refused a call from {peer}: {refusal}");
                Box::pin(std::future::ready(Ok(Status::from(refusal).into_http())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::pem::PemObject as _;

    use super::*;
    use crate::authority::tests::{NOW, ed25519, request};
    use crate::authority::{Authority, CertificateRequest};
    use crate::store::MemoryStore;

    fn record(name: &str, identity: Digest) -> NodeRecord {
        let name = name.parse().unwrap();
        NodeRecord { name, identity, enrolled: NOW, expires: NOW.plus_seconds(1000), revoked: None }
    }

    fn peer(record: &NodeRecord) -> PeerIdentity {
        PeerIdentity { node: record.name.clone(), identity: record.identity, expires: record.expires }
    }

    fn identities() -> (Arc<dyn Store>, Identities) {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        (store.clone(), Identities::open(store).unwrap())
    }

    #[test]
    fn an_identity_is_live_from_enrolment_to_revocation_replacement_or_expiry() {
        let (store, identities) = identities();
        let first = record("cleveland", Digest::of(b"first"));
        let check =
            |record: &NodeRecord, now| identities.check(&peer(record), now).map_err(|r| r.to_string());
        assert_eq!(check(&first, NOW).unwrap_err(), "node cleveland is not enrolled here");
        identities.enrol(first.clone()).unwrap();
        assert_eq!(check(&first, NOW), Ok(()));
        assert!(check(&first, first.expires).unwrap_err().contains("has expired"));

        identities.revoke(&first.name, NOW).unwrap();
        assert!(check(&first, NOW).unwrap_err().contains("was revoked"));
        assert_eq!(identities.revoke(&first.name, NOW.plus_seconds(9)).unwrap().revoked, Some(NOW));

        let second = record("cleveland", Digest::of(b"second"));
        identities.enrol(second.clone()).unwrap();
        assert_eq!(check(&second, NOW), Ok(()));
        assert!(check(&first, NOW).unwrap_err().contains("enrolled again with another key"));

        let missing = identities.revoke(&"nobody".parse().unwrap(), NOW).unwrap_err();
        assert!(matches!(missing, StoreError::Missing { .. }));
        // What the store holds is what a restarted coordinator knows.
        assert_eq!(Identities::open(store).unwrap().nodes(), identities.nodes());
        assert_eq!(identities.nodes(), [second]);
    }

    #[test]
    fn a_renewal_does_not_undo_a_revocation() {
        let (store, identities) = identities();
        let node = record("cleveland", Digest::of(b"key"));
        identities.enrol(node.clone()).unwrap();
        let later = NOW.plus_seconds(5000);
        identities.extend(&peer(&node), later, NOW).unwrap();
        assert_eq!(store.node(&node.name).unwrap().unwrap().expires, later);
        // A shorter certificate does not make the record forget the longer one.
        identities.extend(&peer(&node), NOW, NOW).unwrap();
        assert_eq!(identities.node(&node.name).unwrap().expires, later);

        identities.revoke(&node.name, NOW).unwrap();
        let refused = identities.extend(&peer(&node), later.plus_seconds(1), NOW).unwrap_err();
        assert!(matches!(refused, ExtendError::Refused(Refusal::Revoked(_))), "{refused}");
        assert_eq!(store.node(&node.name).unwrap().unwrap().revoked, Some(NOW));
    }

    #[tokio::test]
    async fn a_stream_hears_of_its_own_revocation_at_once_and_of_no_other() {
        let (_, identities) = identities();
        let identities = Arc::new(identities);
        let far = Clock.now().plus_seconds(1000);
        let node = NodeRecord { expires: far, ..record("cleveland", Digest::of(b"a")) };
        let other = NodeRecord { expires: far, ..record("hungarian", Digest::of(b"b")) };
        identities.enrol(node.clone()).unwrap();
        identities.enrol(other.clone()).unwrap();
        let waiting = tokio::spawn({
            let (identities, peer) = (identities.clone(), peer(&node));
            async move { identities.until_refused(&peer).await }
        });
        tokio::task::yield_now().await;
        identities.revoke(&other.name, NOW).unwrap();
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert!(!waiting.is_finished());
        identities.revoke(&node.name, NOW).unwrap();
        let heard = tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
        assert_eq!(heard, Refusal::Revoked(node.name.clone()));

        let brief =
            PeerIdentity { expires: Clock.now() + 30, ..peer(&NodeRecord { expires: far, ..node.clone() }) };
        identities.enrol(node.clone()).unwrap();
        let heard =
            tokio::time::timeout(Duration::from_secs(10), identities.until_refused(&brief)).await.unwrap();
        assert_eq!(heard, Refusal::Expired(node.name));
    }

    #[test]
    fn only_a_nodes_certificate_gives_an_identity() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(folder.path(), &["localhost".to_owned()], NOW).unwrap();
        let key = ed25519();
        let asked = CertificateRequest::from_der(&request(&key)).unwrap();
        let issued = authority.issue(&asked, &"st.mary_2".parse().unwrap(), NOW, 1).unwrap();
        let read = |pem: &str| {
            PeerIdentity::from_certificate(&CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
        };
        let expected = PeerIdentity {
            node: "st.mary_2".parse().unwrap(),
            identity: issued.identity,
            expires: issued.expires,
        };
        assert_eq!(read(&issued.certificate_pem), Ok(expected));

        let server = std::fs::read_to_string(folder.path().join("authority/server.pem")).unwrap();
        for pem in [authority.certificate_pem(), &server] {
            assert_eq!(read(pem), Err(Refusal::NotANode("it names no node")));
        }
        let garbage = PeerIdentity::from_certificate(&CertificateDer::from(vec![0x30, 1, 2]));
        assert_eq!(garbage, Err(Refusal::NotANode("it cannot be read")));
    }
}
