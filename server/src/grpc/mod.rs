//! The Coordinator service: control streams and transfers of nodes whose identity was checked before.

mod control;
#[cfg(test)]
mod tests;

pub use control::to_wire;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tributary_common::limits::MESSAGE_BYTES;
use tributary_proto::coordinator::coordinator_server::{Coordinator, CoordinatorServer};
use tributary_proto::coordinator::{
    Chunk, CoordinatorMessage, FetchRequest, NodeMessage, UploadHeader, UploadPart, UploadProgress,
};

use crate::driver::Driver;
use crate::identity::{Identities, PeerIdentity, Refusal, address, shown};
use crate::transfer::{ModelChunks, Transfers};

/// Messages between a control stream's task and its connection.
const STREAM_QUEUE: usize = 8;

/// What the service tells and asks.
#[derive(Debug)]
struct Core {
    driver: Driver,
    transfers: Transfers,
    identities: Arc<Identities>,
    heartbeat_seconds: u32,
    /// True once the coordinator shuts down.
    shutdown: watch::Receiver<bool>,
}

/// The Coordinator service. Requests must carry a [`PeerIdentity`]: the layer before it puts it there.
#[derive(Debug, Clone)]
pub struct CoordinatorService {
    core: Arc<Core>,
}

impl CoordinatorService {
    /// Serves nodes for `driver`; control streams end when `shutdown` turns true.
    pub fn new(
        driver: Driver,
        transfers: Transfers,
        identities: Arc<Identities>,
        heartbeat_seconds: u32,
        shutdown: watch::Receiver<bool>,
    ) -> Self {
        Self { core: Arc::new(Core { driver, transfers, identities, heartbeat_seconds, shutdown }) }
    }

    /// As a tonic service with the protocol's message sizes.
    pub fn into_server(self) -> CoordinatorServer<Self> {
        CoordinatorServer::new(self)
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES)
    }
}

fn peer<T>(request: &Request<T>) -> Result<PeerIdentity, Status> {
    // Without the layer nobody is identified, and nobody gets in.
    request.extensions().get::<PeerIdentity>().cloned().ok_or_else(|| Refusal::NoCertificate.into())
}

fn refused(peer: &PeerIdentity, refusal: Refusal) -> Status {
    tracing::warn!(node = %peer.node, "cut off a stream of {}: {refusal}", peer.node);
    refusal.into()
}

#[tonic::async_trait]
impl Coordinator for CoordinatorService {
    type ControlStream = ReceiverStream<Result<CoordinatorMessage, Status>>;
    type FetchStream = WhileLive<ModelChunks>;

    async fn control(
        &self,
        request: Request<Streaming<NodeMessage>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        let peer = peer(&request)?;
        let from = shown(address(request.extensions()));
        let (sender, receiver) = mpsc::channel(STREAM_QUEUE);
        let core = self.core.clone();
        // A task of its own: it tells the driver of the end of the stream however the stream ends.
        tokio::spawn(async move { control::serve(&core, peer, &from, request.into_inner(), sender).await });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn fetch(&self, request: Request<FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let peer = peer(&request)?;
        let chunks = self.core.transfers.fetch(request.get_ref())?;
        let identities = self.core.identities.clone();
        let refusal = Box::pin(async move {
            let refusal = identities.until_refused(&peer).await;
            refused(&peer, refusal)
        });
        Ok(Response::new(WhileLive { chunks: Some(chunks), refusal }))
    }

    async fn upload_status(
        &self,
        request: Request<UploadHeader>,
    ) -> Result<Response<UploadProgress>, Status> {
        let peer = peer(&request)?;
        Ok(Response::new(self.core.transfers.status(&peer.node, request.get_ref()).await?))
    }

    async fn upload(
        &self,
        request: Request<Streaming<UploadPart>>,
    ) -> Result<Response<UploadProgress>, Status> {
        let peer = peer(&request)?;
        let parts = request.into_inner();
        tokio::select! {
            progress = self.core.transfers.upload(&peer.node, parts) => {
                if let Err(status) = &progress {
                    tracing::debug!(node = %peer.node, "an upload of {} broke: {}", peer.node, status.message());
                }
                progress.map(Response::new)
            }
            refusal = self.core.identities.until_refused(&peer) => Err(refused(&peer, refusal)),
        }
    }
}

/// Chunks for a peer, until it is refused.
pub struct WhileLive<I> {
    chunks: Option<I>,
    refusal: Pin<Box<dyn Future<Output = Status> + Send>>,
}

impl<I> std::fmt::Debug for WhileLive<I> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WhileLive").finish_non_exhaustive()
    }
}

impl<I: Iterator<Item = Chunk> + Unpin> Stream for WhileLive<I> {
    type Item = Result<Chunk, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.chunks.is_some()
            && let Poll::Ready(status) = self.refusal.as_mut().poll(cx)
        {
            self.chunks = None;
            return Poll::Ready(Some(Err(status)));
        }
        Poll::Ready(self.chunks.as_mut().and_then(Iterator::next).map(Ok))
    }
}

impl Core {
    /// After so long without a message a node is gone: three heartbeats.
    fn silence(&self) -> Duration {
        3 * Duration::from_secs(u64::from(self.heartbeat_seconds.max(1)))
    }
}
