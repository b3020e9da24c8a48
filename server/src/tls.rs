//! TLS connections for tonic: accepts, shakes hands with many peers at once, bounds how many and how long.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::{AlertDescription, CertificateError};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpIncoming};
use tributary_common::time::Clock;

use crate::rate::{Bucket, Rates};

/// How long a connection without a client certificate lives: enough to enrol, too short to hold a place.
const ANONYMOUS_SECONDS: u64 = 60;
/// How long TCP stays silent before it asks whether the peer is there.
const KEEPALIVE_SECONDS: u64 = 60;
/// How long a refused peer has to read why.
const LINGER_SECONDS: u64 = 2;
/// How many bytes of a refused peer are read and thrown away meanwhile.
const LINGER_BYTES: u64 = 64 * 1024;
/// Refused handshakes that are logged per minute and address; what a scanner sends beyond is not.
const COMPLAINTS_PER_MINUTE: u32 = 30;

/// What the acceptor bounds.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most connections at once, those in a handshake included; one more is closed at once.
    pub maximum_connections: u32,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
}

/// A TLS connection; it gives its place back when it is dropped.
///
/// As with tonic's own TLS, a request has `remote_addr()` and `peer_certs()`.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    /// When a connection without a client certificate ends.
    end: Option<Pin<Box<Sleep>>>,
    _place: OwnedSemaphorePermit,
}

/// Accepts connections at `listener` for `Router::serve_with_incoming`.
///
/// Handshakes run beside each other, so a slow peer delays nobody. Failed ones are logged with address and
/// reason and yield nothing: the stream has no errors. Dropping it closes the listener and all handshakes.
/// To be called in a tokio runtime.
pub fn incoming(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    limits: Limits,
) -> ReceiverStream<io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(accept(listener, TlsAcceptor::from(tls), limits, sender));
    ReceiverStream::new(receiver)
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    limits: Limits,
    connections: mpsc::Sender<io::Result<Connection>>,
) {
    let mut incoming = TcpIncoming::from(listener)
        .with_nodelay(Some(true))
        .with_keepalive(Some(Duration::from_secs(KEEPALIVE_SECONDS)));
    let places =
        Arc::new(Semaphore::new(usize::try_from(limits.maximum_connections).unwrap_or(usize::MAX >> 3)));
    let mut handshakes: JoinSet<Option<(SocketAddr, String)>> = JoinSet::new();
    let mut full = Bucket::new(COMPLAINTS_PER_MINUTE, 1, Clock.now());
    let mut complaints = Rates::new(COMPLAINTS_PER_MINUTE);
    loop {
        let accepted = tokio::select! {
            () = connections.closed() => return,
            Some(ended) = handshakes.join_next() => {
                if let Ok(Some((peer, why))) = ended {
                    complain(&mut complaints, peer, &why);
                }
                continue;
            }
            accepted = incoming.next() => accepted,
        };
        let stream = match accepted {
            Some(Ok(stream)) => stream,
            Some(Err(error)) => {
                // Such as too many open files: it passes, and trying at once would only burn time.
                tracing::warn!("cannot accept connections at the moment: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            None => return,
        };
        let Ok(peer) = stream.peer_addr() else { continue }; // gone already
        match places.clone().try_acquire_owned() {
            Ok(place) => {
                let handshake = handshake(stream, peer, acceptor.clone(), limits.handshake_timeout, place);
                let connections = connections.clone();
                handshakes.spawn(async move {
                    match handshake.await {
                        Ok(connection) => {
                            // An error means that nobody accepts any more: the connection is closed.
                            let _ = connections.send(Ok(connection)).await;
                            None
                        }
                        Err(why) => why.map(|why| (peer, why)),
                    }
                });
            }
            Err(_) if full.take(Clock.now()).is_ok() => {
                tracing::warn!(%peer, "refused a connection from {peer}: all {} are in use (`maximum_connections`)", limits.maximum_connections);
            }
            Err(_) => {}
        }
    }
}

fn complain(complaints: &mut Rates, peer: SocketAddr, why: &str) {
    let address: IpAddr = peer.ip();
    if complaints.take(address, Clock.now()).is_ok() {
        tracing::warn!(%peer, "refused a connection from {peer}: {why}");
    } else {
        tracing::debug!(%peer, "refused a connection from {peer}: {why}");
    }
}

/// Shakes hands. The error is why it failed, or `None` if the peer just went away.
async fn handshake(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
    timeout: Duration,
    place: OwnedSemaphorePermit,
) -> Result<Connection, Option<String>> {
    match tokio::time::timeout(timeout, acceptor.accept(stream).into_fallible()).await {
        Ok(Ok(stream)) => {
            let anonymous = stream.get_ref().1.peer_certificates().is_none_or(<[_]>::is_empty);
            let end = anonymous.then(|| Box::pin(tokio::time::sleep(Duration::from_secs(ANONYMOUS_SECONDS))));
            Ok(Connection { stream, end, _place: place })
        }
        Ok(Err((error, stream))) => {
            let why = reason(&error);
            // Reading on lets the alert that says why reach the peer: closing now would reset the connection.
            tokio::spawn(linger(stream, place));
            if why.is_none() {
                tracing::debug!(%peer, "{peer} went away during the handshake: {error}");
            }
            Err(why)
        }
        Err(_) => Err(Some(format!("its TLS handshake took longer than {} s", timeout.as_secs_f32()))),
    }
}

async fn linger(mut stream: TcpStream, place: OwnedSemaphorePermit) {
    let drain = async {
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await
    };
    // Whether the peer reads it or not is the peer's affair.
    let _ = tokio::time::timeout(Duration::from_secs(LINGER_SECONDS), drain).await;
    drop(place);
}

/// A failed handshake in plain words; `None` if the peer just went away, as a port scanner does.
fn reason(error: &io::Error) -> Option<String> {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let Some(tls) = tls else {
        let gone = matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
        );
        return (!gone).then(|| error.to_string());
    };
    Some(match tls {
        rustls::Error::InvalidCertificate(why) => match why {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "its certificate is foreign: not issued by this coordinator's authority".to_owned()
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "its certificate has expired".to_owned()
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "its certificate is not valid yet: compare the clocks".to_owned()
            }
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                "its certificate is not a node's".to_owned()
            }
            other => format!("its certificate is not valid: {other}"),
        },
        rustls::Error::AlertReceived(AlertDescription::UnknownCA | AlertDescription::BadCertificate) => {
            "it does not trust this coordinator's certificate: its `authority.pem` is another coordinator's, or it dialled a name that is not in `server_names`".to_owned()
        }
        rustls::Error::InvalidMessage(_) => format!("it does not speak TLS: {tls}"),
        rustls::Error::PeerIncompatible(_) => format!("it does not speak TLS 1.3 with this coordinator: {tls}"),
        other => other.to_string(),
    })
}

impl Connected for Connection {
    type ConnectInfo = <TlsStream<TcpStream> as Connected>::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(end) = &mut self.end
            && end.as_mut().poll(cx).is_ready()
        {
            // Polled again later, it must end again.
            end.as_mut().reset(Instant::now());
            let words = format!("no client certificate after {ANONYMOUS_SECONDS} s");
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, words)));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, ServerName};
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client;

    use super::*;
    use crate::authority::Authority;
    use crate::enrolment::tests::Logs;

    struct Door {
        address: SocketAddr,
        connections: ReceiverStream<io::Result<Connection>>,
        connector: TlsConnector,
        _folder: tempfile::TempDir,
    }

    async fn door(maximum_connections: u32, handshake_timeout: Duration) -> Door {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(folder.path(), &["localhost".to_owned()], Clock.now()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tls = Arc::new(authority.server_config().unwrap());
        let connections = incoming(listener, tls, Limits { maximum_connections, handshake_timeout });
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.certificate_pem().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = vec![b"h2".to_vec()];
        Door { address, connections, connector: TlsConnector::from(Arc::new(client)), _folder: folder }
    }

    impl Door {
        async fn dial(&self) -> io::Result<client::TlsStream<TcpStream>> {
            let stream = TcpStream::connect(self.address).await?;
            self.connector.connect(ServerName::try_from("localhost").unwrap(), stream).await
        }

        async fn enter(&mut self) -> (client::TlsStream<TcpStream>, Connection) {
            let client = self.dial().await.unwrap();
            (client, self.connections.next().await.unwrap().unwrap())
        }
    }

    #[tokio::test]
    async fn peers_that_do_not_shake_hands_delay_nobody_and_are_dropped() {
        let (logs, _capture) = Logs::capture();
        let mut door = door(100, Duration::from_millis(1500)).await;
        let mut silent = Vec::new();
        for _ in 0..20 {
            silent.push(TcpStream::connect(door.address).await.unwrap());
        }
        let (_client, connection) = door.enter().await;
        assert_eq!(connection.connect_info().get_ref().remote_addr().unwrap().ip().to_string(), "127.0.0.1");
        assert!(!logs.text().contains("WARN"), "a peer in time had to wait for the slow ones");
        for mut peer in silent {
            assert_eq!(peer.read(&mut [0; 1]).await.unwrap_or(0), 0);
        }
        logs.warned(&["refused a connection from 127.0.0.1:", "TLS handshake took longer than 1.5 s"]).await;
    }

    #[tokio::test]
    async fn connections_beyond_the_cap_are_closed_and_a_place_comes_back() {
        let (logs, _capture) = Logs::capture();
        let mut door = door(2, Duration::from_secs(5)).await;
        let (_first_client, first) = door.enter().await;
        let _second = door.enter().await;
        assert!(door.dial().await.is_err());
        logs.warned(&["refused a connection from 127.0.0.1:", "all 2 are in use (`maximum_connections`)"])
            .await;
        drop(first);
        door.enter().await;
    }

    #[tokio::test]
    async fn what_is_not_tls_or_an_older_one_is_logged_and_a_mere_knock_is_not() {
        let (logs, _capture) = Logs::capture();
        let door = door(10, Duration::from_secs(5)).await;
        drop(TcpStream::connect(door.address).await.unwrap());
        let mut plain = TcpStream::connect(door.address).await.unwrap();
        plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        plain.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(&[21]), "a TLS alert is sent, not a reset: {answer:?}");
        logs.warned(&["refused a connection from 127.0.0.1:", "does not speak TLS"]).await;
        assert_eq!(logs.text().matches("WARN").count(), 1, "{}", logs.text());
    }

    #[tokio::test]
    async fn a_connection_without_a_certificate_does_not_stay() {
        let mut door = door(10, Duration::from_secs(5)).await;
        let (mut client, mut connection) = door.enter().await;
        client.write_all(b"hello").await.unwrap();
        client.flush().await.unwrap();
        let mut five = [0; 5];
        connection.read_exact(&mut five).await.unwrap();
        assert_eq!(&five, b"hello");
        let end = connection.end.as_mut().unwrap();
        assert!(end.deadline() <= Instant::now() + Duration::from_secs(ANONYMOUS_SECONDS));
        end.as_mut().reset(Instant::now());
        for _ in 0..2 {
            assert_eq!(connection.read(&mut five).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
    }

    #[tokio::test]
    async fn dropping_the_stream_closes_the_listener() {
        let door = door(10, Duration::from_secs(5)).await;
        let mut pending = TcpStream::connect(door.address).await.unwrap();
        let address = door.address;
        drop(door);
        assert_eq!(pending.read(&mut [0; 1]).await.unwrap_or(0), 0);
        for _ in 0..500 {
            if TcpStream::connect(address).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the listener still accepts");
    }
}
