//! A node's side of the wire: dialling the coordinator, the control stream, and transfers that resume.
//!
//! The node always dials. One connection carries the control stream, with small windows; a second one is
//! opened for each transfer, with large ones, so that a stalled transfer never starves a heartbeat.

mod backoff;
mod control;
mod transfer;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

pub use backoff::Backoff;
pub use control::{Greeting, LedgerNews, Link, LinkEvent, read, read_ledger_news};
pub use transfer::{fetch, upload};

use std::error::Error;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rand::TryRng;
use tokio::sync::watch;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tributary_common::record::one_line;
use tributary_proto::coordinator::coordinator_client::CoordinatorClient;
use tributary_proto::coordinator::enrolment_client::EnrolmentClient;

/// Longest time to connect, TLS included.
const CONNECT_SECONDS: u64 = 15;
/// HTTP/2 pings: how often, and how long an answer may take.
const PING_SECONDS: u64 = 20;
/// Windows of the control connection, in bytes: a job file and some.
const CONTROL_WINDOW_BYTES: u32 = 256 * 1024;
/// Windows of a transfer connection, in bytes.
const TRANSFER_WINDOW_BYTES: u32 = 8 << 20;

/// Where the coordinator is and how both sides prove who they are. Clones share the certificate, so that a
/// renewed one is used from the next connection on.
#[derive(Clone)]
pub struct Dialer {
    url: String,
    authority: Option<Certificate>,
    identity: Arc<RwLock<Option<Identity>>>,
    /// Whether the control stream is up, or was not begun.
    up: Arc<watch::Sender<bool>>,
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dialer").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Dialer {
    /// Dials `url` and trusts no authority but `authority_pem`.
    pub fn new(url: impl Into<String>, authority_pem: &str) -> Self {
        let authority = Some(Certificate::from_pem(authority_pem));
        Self { url: url.into(), authority, identity: Arc::default(), up: Arc::new(watch::Sender::new(true)) }
    }

    /// Dials without TLS: for tests on one machine.
    #[cfg(test)]
    pub(crate) fn plain(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            authority: None,
            identity: Arc::default(),
            up: Arc::new(watch::Sender::new(true)),
        }
    }

    /// Shows this certificate from the next connection on.
    pub fn set_identity(&self, certificate_pem: &str, key_pem: &str) {
        let mut identity = self.identity.write().unwrap_or_else(PoisonError::into_inner);
        *identity = Some(Identity::from_pem(certificate_pem, key_pem));
    }

    /// Notes whether the control stream is up.
    fn set_up(&self, up: bool) {
        self.up.send_replace(up);
    }

    /// Waits for the control stream: an update that arrives without one may end a round whose end the node
    /// would then not be told.
    async fn until_up(&self) {
        let _ = self.up.subscribe().wait_for(|up| *up).await; // the sender lives as long as `self`
    }

    async fn connect(&self, window_bytes: u32) -> Result<Channel, String> {
        let endpoint = Endpoint::from_shared(self.url.clone()).map_err(|error| chain(&error))?;
        let mut endpoint = endpoint
            .connect_timeout(Duration::from_secs(CONNECT_SECONDS))
            .http2_keep_alive_interval(Duration::from_secs(PING_SECONDS))
            .keep_alive_timeout(Duration::from_secs(PING_SECONDS))
            .tcp_nodelay(true)
            .initial_stream_window_size(window_bytes)
            .initial_connection_window_size(window_bytes);
        if let Some(authority) = &self.authority {
            let mut tls = ClientTlsConfig::new().ca_certificate(authority.clone());
            if let Some(identity) = self.identity.read().unwrap_or_else(PoisonError::into_inner).clone() {
                tls = tls.identity(identity);
            }
            endpoint = endpoint.tls_config(tls).map_err(|error| chain(&error))?;
        }
        match tokio::time::timeout(Duration::from_secs(CONNECT_SECONDS), endpoint.connect()).await {
            Ok(connected) => connected.map_err(|error| format!("{}: {}", self.url, chain(&error))),
            Err(_) => Err(format!("{}: no connection within {CONNECT_SECONDS} s", self.url)),
        }
    }

    /// A connection for the control stream.
    ///
    /// # Errors
    /// One line.
    pub async fn control(&self) -> Result<CoordinatorClient<Channel>, String> {
        Ok(CoordinatorClient::new(self.connect(CONTROL_WINDOW_BYTES).await?))
    }

    /// A connection for a transfer.
    async fn transfer(&self) -> Result<CoordinatorClient<Channel>, String> {
        let limit = tributary_common::limits::MESSAGE_BYTES;
        let client = CoordinatorClient::new(self.connect(TRANSFER_WINDOW_BYTES).await?);
        Ok(client.max_decoding_message_size(limit).max_encoding_message_size(limit))
    }

    /// A connection for enrolment and renewal.
    ///
    /// # Errors
    /// One line.
    pub async fn enrolment(&self) -> Result<EnrolmentClient<Channel>, String> {
        Ok(EnrolmentClient::new(self.connect(CONTROL_WINDOW_BYTES).await?))
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !words.contains(&text) {
            words = format!("{words}: {text}");
        }
        next = cause.source();
    }
    one_line(&words)
}

/// A refused call in one line: the coordinator's words, or what happened to the connection.
pub(crate) fn status_line(status: &tonic::Status) -> String {
    match status.source() {
        Some(cause) => chain(cause),
        None if status.message().is_empty() => status.code().to_string(),
        None => one_line(status.message()),
    }
}

/// 0 to below 1, from the operating system: nodes that lost the same coordinator must not come back together.
pub(crate) fn os_random() -> f64 {
    let bits = rand::rngs::SysRng.try_next_u64().unwrap_or(u64::MAX / 2);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}
