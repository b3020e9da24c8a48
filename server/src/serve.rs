//! The running coordinator: opens everything, serves until it is told to stop, and stops in order.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tributary_common::time::Clock;

use crate::admin::{self, AdminService, SocketError};
use crate::authority::{Authority, AuthorityError};
use crate::config::ServerConfig;
use crate::driver::Driver;
use crate::enrolment::EnrolmentService;
use crate::grpc::CoordinatorService;
use crate::identity::{Identities, RequireIdentity};
use crate::ledger::Ledgers;
use crate::run::RunError;
use crate::store::{SledStore, Store, StoreError};
use crate::tls::{self, Limits};
use crate::transfer::{StagingError, Transfers};

/// Receive window of one upload: enough for a link of 0.6 Gbit/s with a delay of 100 ms.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// Receive window of one connection: above a stream's, so that one stalled upload holds up nothing else.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Most calls at once on one connection. A node needs a handful.
const CALLS_PER_CONNECTION: u32 = 16;
/// Largest request headers, in bytes.
const HEADER_BYTES: u32 = 16 << 10;
/// How often the server's own certificate is looked at.
const CERTIFICATE_CHECK: Duration = Duration::from_secs(86_400);

/// Why the coordinator cannot start, or cannot go on; one line.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The certificate authority.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A run in the store.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The folder for uploads under way.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// The operator's socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The system refused.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        error: io::Error,
    },
    /// It ran, and cannot go on; what was committed is safe, and the next start resumes it.
    #[error("{0}")]
    Failed(String),
}

/// What is opened from the disk.
struct Opened {
    authority: Arc<Authority>,
    identities: Arc<Identities>,
    store: Arc<SledStore>,
}

fn open(config: &ServerConfig) -> Result<Opened, ServeError> {
    let authority = Arc::new(Authority::open(&config.data_dir, &config.server_names, Clock.now())?);
    let store = SledStore::open(&config.data_dir.join("store"))?;
    let store = Arc::new(match config.pause_at {
        Some(drill) => {
            let (moment, count) = drill.moment();
            store.standing_still_at(moment, count)
        }
        None => store,
    });
    let identities = Arc::new(Identities::open(store.clone())?);
    Ok(Opened { authority, identities, store })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ServeError> + Send + 'static,
) -> Result<T, ServeError> {
    let stopped = |_| ServeError::Failed("the start stopped unexpectedly".to_owned());
    tokio::task::spawn_blocking(work).await.map_err(stopped)?
}

/// Runs the coordinator until `stop` is ready, or until it cannot go on.
///
/// When it stops, it finishes a commit that is under way, tells the nodes, and returns. To its runs a stop is
/// the same as a crash: the next start goes on with the attempt that is open.
pub async fn serve(config: &ServerConfig, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
    let opening = config.clone();
    let Opened { authority, identities, store: on_disk } = blocking(move || open(&opening)).await?;
    let store: Arc<dyn Store> = on_disk.clone();
    let starting = store.clone();
    let key = authority.ledger_key()?;
    let ledgers = Ledgers::new(config.data_dir.join("ledgers"), key, authority.certificate_der())
        .map_err(RunError::from)?;
    let (driver, mut ending) = blocking(move || Ok(Driver::start(starting, Some(ledgers), Clock)?)).await?;
    let (shutdown, shut) = watch::channel(false);

    let staging = config.data_dir.join("staging");
    let transfers =
        Transfers::open(driver.clone(), &staging, config.staging_memory_bytes, config.uploads_in_flight)?;
    let coordinator = CoordinatorService::new(
        driver.clone(),
        transfers,
        identities.clone(),
        config.heartbeat_seconds,
        shut.clone(),
    );
    let enrolment = EnrolmentService::new(
        store,
        authority.clone(),
        identities.clone(),
        config.node_certificate_days,
        config.enrolments_per_minute,
    );

    // The operator's socket first: a second coordinator on this folder is refused before it takes the port.
    let socket = config.admin_socket();
    let admin_listener = admin::listen(&socket)?;
    let listening = |error| ServeError::Io { what: format!("cannot listen on {}", config.listen), error };
    let listener = TcpListener::bind(config.listen).await.map_err(listening)?;
    let address = listener.local_addr().map_err(listening)?;
    let address_file = config.data_dir.join("address");
    write_whole(&address_file, &format!("{address}\n"))?;
    let limits = Limits {
        maximum_connections: config.maximum_connections,
        handshake_timeout: Duration::from_secs(u64::from(config.handshake_timeout_seconds)),
    };
    let incoming = tls::incoming(listener, Arc::new(authority.server_config()?), limits);

    let nodes = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(CALLS_PER_CONNECTION)
        .http2_max_header_list_size(HEADER_BYTES)
        .http2_keepalive_interval(Some(Duration::from_secs(u64::from(config.heartbeat_seconds))))
        .http2_keepalive_timeout(Some(Duration::from_secs(2 * u64::from(config.heartbeat_seconds))))
        .layer(RequireIdentity::new(identities.clone()))
        .add_service(coordinator.into_server())
        .add_service(enrolment.into_server())
        .serve_with_incoming_shutdown(incoming, until(shut.clone()));
    let admin = AdminService::new(driver.clone(), identities, authority.clone())
        .with_backups(on_disk, config.data_dir.clone());
    let admin = Server::builder()
        .add_service(admin.into_server())
        .serve_with_incoming_shutdown(UnixListenerStream::new(admin_listener), until(shut));
    let mut nodes = tokio::spawn(nodes);
    let mut admin = tokio::spawn(admin);
    let certificates = tokio::spawn(renew(authority));
    tracing::info!("listening on {address}");

    let ended = |what: &str| ServeError::Failed(format!("the {what} service ended unexpectedly"));
    let result = tokio::select! {
        () = stop => Ok(()),
        _ = ending.wait() => Err(ended("driver's")),
        _ = &mut nodes => Err(ended("nodes'")),
        _ = &mut admin => Err(ended("admin")),
    };
    tracing::info!("shutting down");
    certificates.abort();
    // The driver first: that the nodes lose their connections now is not an event in any run.
    driver.drain().await;
    drop(driver);
    let result = ending.wait().await.map_err(ServeError::Failed).and(result);
    // An error means that both servers are gone already.
    let _ = shutdown.send(true);
    let parted = async {
        if !nodes.is_finished() {
            let _ = nodes.await;
        }
        if !admin.is_finished() {
            let _ = admin.await;
        }
    };
    let patience = Duration::from_secs(u64::from(config.drain_seconds));
    if tokio::time::timeout(patience, parted).await.is_err() {
        tracing::warn!("some connections did not end within {} s and are cut off", config.drain_seconds);
    }
    for path in [&socket, &address_file] {
        // Left behind they do no harm: the next start replaces them.
        let _ = fs::remove_file(path);
    }
    result
}

/// Returns when the coordinator shuts down.
async fn until(mut shut: watch::Receiver<bool>) {
    let _ = shut.wait_for(|down| *down).await;
}

/// Looks after the server's own certificate.
async fn renew(authority: Arc<Authority>) {
    loop {
        tokio::time::sleep(CERTIFICATE_CHECK).await;
        let authority = authority.clone();
        let renewed =
            tokio::task::spawn_blocking(move || authority.renew_server_certificate(Clock.now())).await;
        if let Ok(Err(error)) = renewed {
            tracing::error!("cannot renew the server's certificate: {error}");
        }
    }
}

/// Replaces the small file at `path`, so that a reader sees the old text or the new one.
fn write_whole(path: &Path, text: &str) -> Result<(), ServeError> {
    let temporary = path.with_extension("new");
    let written = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|error| ServeError::Io { what: path.display().to_string(), error })
}
