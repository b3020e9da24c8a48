//! A small real coordinator for tests: it speaks the wire format on a loopback port and misbehaves as told.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use prost::bytes::Bytes;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use tributary_common::digest::Digest;
use tributary_common::limits::{CHUNK_BYTES, MESSAGE_BYTES};
use tributary_proto::coordinator as wire;
use tributary_proto::coordinator::coordinator_message::Message;
use tributary_proto::coordinator::coordinator_server::{Coordinator, CoordinatorServer};
use tributary_proto::coordinator::node_message::Message as FromNode;
use tributary_proto::{chunk, chunk_data};

use super::Dialer;

/// What the coordinator does on a control stream.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// Says this.
    Say(Message),
    /// Waits until the node has said something other than a heartbeat.
    Hear,
    /// Waits until an upload is complete.
    AwaitUpload,
    /// Ends the stream with this status.
    Fail(Status),
    /// Ends the stream.
    End,
}

/// How the coordinator behaves, and what it saw.
#[derive(Default)]
pub(crate) struct State {
    /// The model that Fetch sends, and the one that it says it has.
    pub(crate) model: Vec<u8>,
    pub(crate) named: Option<Digest>,
    /// Chunks after which the link breaks, call by call; then no more breaks.
    pub(crate) fetch_breaks: VecDeque<usize>,
    pub(crate) upload_breaks: VecDeque<usize>,
    /// Whether chunks are damaged.
    pub(crate) damaged: bool,
    /// Whether uploads are unwanted.
    pub(crate) unwanted: bool,
    /// Control streams to come.
    pub(crate) scripts: VecDeque<Vec<Step>>,
    /// Offsets from which models and updates were sent.
    pub(crate) fetch_offsets: Vec<u64>,
    pub(crate) upload_offsets: Vec<u64>,
    /// The update as far as it came, and the last header of it.
    pub(crate) staged: Vec<u8>,
    pub(crate) header: Option<wire::UploadHeader>,
    pub(crate) complete: bool,
    /// What nodes said, heartbeats left out.
    pub(crate) heard: Vec<FromNode>,
}

#[derive(Clone, Default)]
pub(crate) struct Fake(pub(crate) Arc<Mutex<State>>);

impl Fake {
    pub(crate) fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Serves on a free port until the test ends.
    pub(crate) async fn serve(&self) -> Dialer {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let service = CoordinatorServer::new(self.clone())
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES);
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Dialer::plain(url)
    }

    async fn wait(&self, until: impl Fn(&State) -> bool) {
        while !until(&self.state()) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Coordinator for Fake {
    type ControlStream = Answers<wire::CoordinatorMessage>;
    type FetchStream = Answers<wire::Chunk>;

    async fn control(
        &self,
        request: Request<Streaming<wire::NodeMessage>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        let script = self.state().scripts.pop_front().unwrap_or_default();
        let mut heard = self.state().heard.len();
        if let [Step::Fail(status)] = &script[..] {
            return Err(status.clone());
        }
        let (sender, answers) = mpsc::channel(16);
        let fake = self.clone();
        let mut from_node = request.into_inner();
        let listening = tokio::spawn({
            let fake = fake.clone();
            async move {
                while let Ok(Some(message)) = from_node.message().await {
                    let message = message.message.unwrap();
                    if !matches!(message, FromNode::Heartbeat(_)) {
                        fake.state().heard.push(message);
                    }
                }
            }
        });
        tokio::spawn(async move {
            for step in script {
                match step {
                    Step::Say(message) => {
                        let message = wire::CoordinatorMessage { message: Some(message) };
                        let _ = sender.send(Ok(message)).await;
                    }
                    Step::Hear => {
                        fake.wait(|state| state.heard.len() > heard).await;
                        heard += 1;
                    }
                    Step::AwaitUpload => fake.wait(|state| state.complete).await,
                    Step::Fail(status) => {
                        let _ = sender.send(Err(status)).await;
                        return;
                    }
                    Step::End => return,
                }
            }
            let _ = listening.await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn fetch(
        &self,
        request: Request<wire::FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let wire::FetchRequest { model, offset } = request.into_inner();
        let mut state = self.state();
        state.fetch_offsets.push(offset);
        let named = state.named.unwrap_or(Digest::of(&state.model));
        if model != named.0 {
            return Err(Status::not_found("no such model"));
        }
        let breaks = state.fetch_breaks.pop_front();
        let total = state.model.len() as u64;
        let mut chunks = Vec::new();
        for data in state.model[offset as usize..].chunks(CHUNK_BYTES) {
            let at = offset + chunks.len() as u64 * CHUNK_BYTES as u64;
            let mut next = chunk(at, Bytes::copy_from_slice(data), total);
            if state.damaged {
                next.data_digest[0] ^= 1;
            }
            chunks.push(Ok(next));
        }
        if let Some(after) = breaks {
            chunks.truncate(after);
            chunks.push(Err(Status::unavailable("the link broke")));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks))))
    }

    async fn upload_status(
        &self,
        request: Request<wire::UploadHeader>,
    ) -> Result<Response<wire::UploadProgress>, Status> {
        let mut state = self.state();
        state.header = Some(request.into_inner());
        Ok(Response::new(progress(&state)))
    }

    async fn upload(
        &self,
        request: Request<Streaming<wire::UploadPart>>,
    ) -> Result<Response<wire::UploadProgress>, Status> {
        let breaks = {
            let mut state = self.state();
            let offset = state.staged.len() as u64;
            state.upload_offsets.push(offset);
            state.upload_breaks.pop_front()
        };
        let mut parts = request.into_inner();
        let Some(wire::upload_part::Part::Header(header)) = parts.next().await.unwrap()?.part else {
            return Err(Status::invalid_argument("no header"));
        };
        let mut chunks = 0;
        while let Some(part) = parts.next().await {
            if Some(chunks) == breaks {
                return Err(Status::unavailable("the link broke"));
            }
            let Some(wire::upload_part::Part::Chunk(next)) = part?.part else {
                return Err(Status::invalid_argument("no chunk"));
            };
            let mut state = self.state();
            let offset = state.staged.len() as u64;
            state.staged.extend(chunk_data(next, offset, header.total_bytes)?);
            chunks += 1;
        }
        let mut state = self.state();
        if state.staged.len() as u64 == header.total_bytes {
            assert_eq!(Digest::of(&state.staged).0.to_vec(), header.digest);
            state.complete = true;
        }
        Ok(Response::new(progress(&state)))
    }
}

fn progress(state: &State) -> wire::UploadProgress {
    let received_bytes = state.staged.len() as u64;
    wire::UploadProgress { received_bytes, complete: state.complete, wanted: !state.unwanted }
}

/// The usual greeting, with a heartbeat every `heartbeat_seconds`.
pub(crate) fn welcome(heartbeat_seconds: u32) -> Step {
    let software = "fake".into();
    Step::Say(Message::Welcome(wire::Welcome { protocol: 1, software, heartbeat_seconds }))
}
