//! The Unix socket of the Admin service: who may open it, and that one coordinator at a time answers it.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tonic::transport::{Channel, Endpoint};
use tributary_common::limits::MESSAGE_BYTES;
use tributary_proto::admin::admin_client::AdminClient;

/// Why the socket cannot be used; one line.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another coordinator answers it.
    #[error("{path}: another coordinator is running on this folder; stop it first")]
    InUse {
        /// The socket.
        path: String,
    },
    /// Nobody answers it.
    #[error("{path}: no coordinator is running here; start it with `tributary-server serve`")]
    NotRunning {
        /// The socket.
        path: String,
    },
    /// The system refused.
    #[error("{path}: {what}")]
    Io {
        /// The socket.
        path: String,
        /// What the system said.
        what: String,
    },
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> SocketError {
    move |error| SocketError::Io { path: path.display().to_string(), what: error.to_string() }
}

/// Listens at `path` for the coordinator's own user alone. A socket that a killed coordinator left behind is
/// replaced.
pub fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(SocketError::InUse { path: path.display().to_string() }),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {}
        Err(error) => return Err(failed(path)(error)),
    }
    // Made under another name: under its own it is never open to others.
    let temporary = path.with_extension("new");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(&temporary)(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&temporary).map_err(failed(&temporary))?;
    fs::set_permissions(&temporary, Permissions::from_mode(0o600)).map_err(failed(&temporary))?;
    fs::rename(&temporary, path).map_err(failed(path))?;
    Ok(listener)
}

/// Connects to the coordinator that listens at `path`.
pub async fn connect(path: &Path) -> Result<AdminClient<Channel>, SocketError> {
    match UnixStream::connect(path).await {
        Ok(_) => {}
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            return Err(SocketError::NotRunning { path: path.display().to_string() });
        }
        Err(error) => return Err(failed(path)(error)),
    }
    let socket: PathBuf = path.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    // The address is not used: the connector knows the socket.
    let channel = Endpoint::from_static("http://coordinator").connect_with_connector(connector).await;
    let channel = channel.map_err(|error| failed(path)(std::io::Error::other(error)))?;
    // A run's records come in one message.
    Ok(AdminClient::new(channel).max_encoding_message_size(MESSAGE_BYTES).max_decoding_message_size(1 << 30))
}
