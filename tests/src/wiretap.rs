//! A relay between one node and its coordinator that opens the TLS of both and keeps every byte that the node sends.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, split};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::Coordinator;

type Connections = Arc<Mutex<Vec<Vec<u8>>>>;

/// What a coordinator can read from one node: it has the coordinator's key for the node and the node's for the coordinator.
pub struct Wiretap {
    address: SocketAddr,
    sent: Connections,
    _runtime: tokio::runtime::Runtime,
}

impl Wiretap {
    /// Listens on a free port for the node whose folder is `node`.
    pub fn start(coordinator: &Coordinator, node: &Path) -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address = listener.local_addr().expect("an address");
        let acceptor = TlsAcceptor::from(Arc::new(as_coordinator(&coordinator.path("data"))));
        let connector = TlsConnector::from(Arc::new(as_node(node)));
        let sent = Connections::default();
        let (kept, target) = (Arc::clone(&sent), coordinator.address);
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (acceptor, connector, kept) = (acceptor.clone(), connector.clone(), Arc::clone(&kept));
                tokio::spawn(relay(socket, target, acceptor, connector, kept));
            }
        });
        Self { address, sent, _runtime: runtime }
    }

    /// The URL for the node.
    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.address.port())
    }

    /// What the node sent so far, inside TLS, a vector for each connection.
    pub fn sent(&self) -> Vec<Vec<u8>> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn relay(
    socket: TcpStream,
    target: SocketAddr,
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    kept: Connections,
) -> std::io::Result<()> {
    let node = acceptor.accept(socket).await?;
    let name = ServerName::try_from("localhost").expect("a name");
    let coordinator = connector.connect(name, TcpStream::connect(target).await?).await?;
    let (from_node, mut to_node) = split(node);
    let (mut from_coordinator, to_coordinator) = split(coordinator);
    tokio::select! {
        ended = keep(from_node, to_coordinator, kept) => ended,
        ended = async { copy(&mut from_coordinator, &mut to_node).await?; to_node.shutdown().await } => ended,
    }
}

/// Passes bytes on and keeps them, before they are passed on.
async fn keep(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    kept: Connections,
) -> std::io::Result<()> {
    let connection = {
        let mut all = kept.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(Vec::new());
        all.len() - 1
    };
    let mut buffer = vec![0; 1 << 16];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        kept.lock().unwrap_or_else(PoisonError::into_inner)[connection].extend(&buffer[..length]);
        to.write_all(&buffer[..length]).await?;
        to.flush().await?;
    }
}

fn as_coordinator(data: &Path) -> ServerConfig {
    let pem = data.join("authority/server.pem");
    let certificate = CertificateDer::from_pem_file(&pem).expect("the coordinator's certificate");
    let key = PrivateKeyDer::from_pem_file(&pem).expect("the coordinator's key");
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .expect("a pair");
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

fn as_node(folder: &Path) -> ClientConfig {
    let certificate = |name: &str| CertificateDer::from_pem_file(folder.join(name)).expect("a certificate");
    let key = PrivateKeyDer::from_pem_file(folder.join("key.pem")).expect("the node's key");
    let mut roots = RootCertStore::empty();
    roots.add(certificate("authority.pem")).expect("the authority");
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate("certificate.pem")], key)
        .expect("a pair");
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}
