//! The service that gives nodes their certificates: for a one-time token, or for the present certificate.

use std::sync::{Arc, Mutex, PoisonError};

use rand::TryRng as _;
use tonic::{Request, Response, Status};
use tributary_common::digest::Digest;
use tributary_common::ids::NodeName;
use tributary_common::time::{Clock, Time};
use tributary_common::token::JoinToken;
use tributary_proto::coordinator::enrolment_server::{Enrolment, EnrolmentServer};
use tributary_proto::coordinator::{EnrolRequest, EnrolResponse, RenewRequest};

use crate::authority::{Authority, CertificateRequest, Issued};
use crate::identity::{ExtendError, Identities, PeerIdentity, Refusal, shown};
use crate::rate::Rates;
use crate::store::{NodeRecord, Store, StoreError, TokenRecord};

/// Largest message that the service reads, in bytes.
const MESSAGE_BYTES: usize = 16 * 1024;

/// Why a token could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateTokenError {
    /// The operating system gave no random bytes.
    #[error("no random bytes for a token: {0}")]
    Random(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Makes a token with which one node can enrol as `node` until `expires`; durable on return.
pub fn create_token(
    store: &dyn Store,
    authority: &Authority,
    node: &NodeName,
    expires: Time,
) -> Result<JoinToken, CreateTokenError> {
    let mut secret = [0; 32];
    let random = |error: rand::rngs::SysError| CreateTokenError::Random(error.to_string());
    rand::rngs::SysRng.try_fill_bytes(&mut secret).map_err(random)?;
    let token =
        JoinToken { secret, node: node.clone(), authority_pem: authority.certificate_pem().to_owned() };
    store.put_token(&TokenRecord { secret_digest: token.secret_digest(), node: node.clone(), expires })?;
    Ok(token)
}

/// The Enrolment service.
#[derive(Debug)]
pub struct EnrolmentService {
    core: Arc<Core>,
    rates: Mutex<Rates>,
}

/// What the blocking half of a call needs.
struct Core {
    store: Arc<dyn Store>,
    authority: Arc<Authority>,
    identities: Arc<Identities>,
    node_certificate_days: u32,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").finish_non_exhaustive()
    }
}

impl EnrolmentService {
    /// A service that issues certificates valid for `node_certificate_days`, and that hears each address
    /// `enrolments_per_minute` times a minute.
    pub fn new(
        store: Arc<dyn Store>,
        authority: Arc<Authority>,
        identities: Arc<Identities>,
        node_certificate_days: u32,
        enrolments_per_minute: u32,
    ) -> Self {
        let rates = Mutex::new(Rates::new(enrolments_per_minute));
        Self { core: Arc::new(Core { store, authority, identities, node_certificate_days }), rates }
    }

    /// The service as tonic serves it, with its message limit.
    pub fn into_server(self) -> EnrolmentServer<Self> {
        EnrolmentServer::new(self).max_decoding_message_size(MESSAGE_BYTES)
    }

    /// Runs one call: counts it, then does `work` where it may block; logs why it is refused.
    async fn call<T: Send + 'static>(
        &self,
        request: Request<T>,
        work: impl FnOnce(&Core, Request<T>, Time) -> Result<Issued, Refused> + Send + 'static,
    ) -> Result<Response<EnrolResponse>, Status> {
        let peer = request.remote_addr();
        let (core, now) = (self.core.clone(), Clock.now());
        let counted = match peer {
            Some(peer) => self.rates.lock().unwrap_or_else(PoisonError::into_inner).take(peer.ip(), now),
            None => Ok(()),
        };
        let issued = match counted {
            Err(seconds) => Err(Refused::TooOften(seconds)),
            Ok(()) => tokio::task::spawn_blocking(move || work(&core, request, now))
                .await
                .unwrap_or_else(|error| Err(Refused::Internal(error.to_string()))),
        };
        match issued {
            Ok(issued) => Ok(Response::new(EnrolResponse {
                certificate_pem: issued.certificate_pem,
                authority_pem: self.core.authority.certificate_pem().to_owned(),
                expires_unix_seconds: issued.expires.0 / 1000,
            })),
            Err(Refused::Internal(why)) => {
                tracing::error!("cannot issue a certificate: {why}");
                Err(Status::internal("the coordinator cannot issue a certificate; its log says why"))
            }
            Err(refused) => {
                let peer = shown(peer);
                tracing::warn!(%peer, "refused a certificate to {peer}: {refused}");
                Err(refused.into())
            }
        }
    }
}

/// Why no certificate is issued; all but the last may be sent to the peer.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("too many requests from this address: try again in {0} s")]
    TooOften(u64),
    #[error("{0}")]
    Malformed(String),
    #[error("this token is not known, or was used already: ask the coordinator's operator for a new one")]
    UnknownToken,
    #[error("the token for node {0} has expired: ask the coordinator's operator for a new one")]
    ExpiredToken(NodeName),
    #[error(
        "the token is not for node {0}, and is used up now: ask the coordinator's operator for a new one"
    )]
    WrongName(NodeName),
    #[error("node {0} asks for another key than its own: a new key needs a new token")]
    AnotherKey(NodeName),
    #[error(transparent)]
    Identity(#[from] Refusal),
    #[error("{0}")]
    Internal(String),
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let words = refused.to_string();
        match refused {
            Refused::TooOften(_) => Self::resource_exhausted(words),
            Refused::Malformed(_) => Self::invalid_argument(words),
            Refused::UnknownToken | Refused::ExpiredToken(_) => Self::unauthenticated(words),
            Refused::WrongName(_) | Refused::AnotherKey(_) => Self::permission_denied(words),
            Refused::Identity(refusal) => refusal.into(),
            Refused::Internal(_) => Self::internal(words),
        }
    }
}

fn internal(error: impl std::fmt::Display) -> Refused {
    Refused::Internal(error.to_string())
}

fn malformed(error: impl std::fmt::Display) -> Refused {
    Refused::Malformed(error.to_string())
}

impl Core {
    fn enrol(&self, request: &EnrolRequest, now: Time) -> Result<Issued, Refused> {
        // Everything that can be wrong by mistake is checked before the token is used up.
        let node = tributary_proto::node_name("node", &request.node).map_err(malformed)?;
        let secret: &[u8; 32] = request
            .token_secret
            .as_slice()
            .try_into()
            .map_err(|_| malformed("token_secret: is not 32 bytes"))?;
        let asked = CertificateRequest::from_der(&request.certificate_request_der).map_err(malformed)?;

        let token =
            self.store.take_token(Digest::of(secret)).map_err(internal)?.ok_or(Refused::UnknownToken)?;
        if token.node != node {
            return Err(Refused::WrongName(node));
        }
        if token.expires <= now {
            return Err(Refused::ExpiredToken(node));
        }
        let issued =
            self.authority.issue(&asked, &node, now, self.node_certificate_days).map_err(internal)?;
        let before = self.identities.node(&node);
        let (identity, expires) = (issued.identity, issued.expires);
        let record = NodeRecord { name: node.clone(), identity, enrolled: now, expires, revoked: None };
        self.identities.enrol(record).map_err(internal)?;
        let key = identity.short();
        match before {
            Some(old) if old.identity != identity => {
                tracing::warn!(%node, "node {node} enrolled again with key {key}; its old key {} is refused", old.identity.short());
            }
            Some(_) => tracing::info!(%node, "node {node} enrolled again with its key {key}"),
            None => tracing::info!(%node, "node {node} enrolled with key {key}"),
        }
        Ok(issued)
    }

    fn renew(
        &self,
        peer: Option<&PeerIdentity>,
        request: &RenewRequest,
        now: Time,
    ) -> Result<Issued, Refused> {
        // The layer before has checked the peer; without the layer there is no peer.
        let peer = peer.ok_or(Refusal::NoCertificate)?;
        let asked = CertificateRequest::from_der(&request.certificate_request_der).map_err(malformed)?;
        if asked.identity() != peer.identity {
            return Err(Refused::AnotherKey(peer.node.clone()));
        }
        let issued =
            self.authority.issue(&asked, &peer.node, now, self.node_certificate_days).map_err(internal)?;
        self.identities.extend(peer, issued.expires, now).map_err(|error| match error {
            ExtendError::Refused(refusal) => Refused::Identity(refusal),
            ExtendError::Store(error) => internal(error),
        })?;
        tracing::info!(node = %peer.node, "renewed the certificate of node {}", peer.node);
        Ok(issued)
    }
}

#[tonic::async_trait]
impl Enrolment for EnrolmentService {
    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<EnrolResponse>, Status> {
        self.call(request, |core, request, now| core.enrol(request.get_ref(), now)).await
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<EnrolResponse>, Status> {
        self.call(request, |core, request, now| {
            core.renew(request.extensions().get::<PeerIdentity>(), request.get_ref(), now)
        })
        .await
    }
}

#[cfg(test)]
pub(crate) mod tests;
