//! The Coordinator service over loopback without TLS: the layer that identifies peers is replaced by one that
//! believes a header.

use std::net::SocketAddr;

use tokio::net::TcpListener;
use tonic::Code;
use tonic::transport::{Channel, Server};
use tributary_common::digest::Digest;
use tributary_common::ids::NodeName;
use tributary_common::model::{from_bytes, to_bytes};
use tributary_common::progress::{Line, Progress};
use tributary_common::time::{Clock, Time};
use tributary_proto::coordinator as wire;
use tributary_proto::coordinator::coordinator_client::CoordinatorClient;
use tributary_proto::coordinator::coordinator_message::Message as ToPeer;
use tributary_proto::coordinator::node_message::Message as FromPeer;
use tributary_proto::coordinator::upload_part::Part;
use tributary_proto::{chunk, chunk_data};

use super::*;
use crate::driver::tests::{job, memory, name, start};
use crate::enrolment::tests::Logs;
use crate::store::NodeRecord;

struct Site {
    driver: Driver,
    identities: Arc<Identities>,
    address: SocketAddr,
    shutdown: watch::Sender<bool>,
    logs: Logs,
    _capture: tracing::subscriber::DefaultGuard,
    _folder: tempfile::TempDir,
}

fn identity(node: &NodeName) -> PeerIdentity {
    PeerIdentity {
        node: node.clone(),
        identity: Digest::of(node.as_str().as_bytes()),
        expires: Time(u64::MAX),
    }
}

impl Site {
    async fn start() -> Self {
        Self::with_heartbeat(15).await
    }

    async fn with_heartbeat(heartbeat_seconds: u32) -> Self {
        let (logs, capture) = Logs::capture();
        let store = memory();
        let (driver, _) = start(&store).await;
        let identities = Arc::new(Identities::open(store).unwrap());
        for node in ["a", "b"] {
            let PeerIdentity { node, identity, expires } = identity(&name(node));
            let record = NodeRecord { name: node, identity, enrolled: Time(0), expires, revoked: None };
            identities.enrol(record).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        let transfers = Transfers::open(driver.clone(), folder.path(), 1000, 4).unwrap();
        let (shutdown, shut) = watch::channel(false);
        let service =
            CoordinatorService::new(driver.clone(), transfers, identities.clone(), heartbeat_seconds, shut);
        let believe = tonic::service::InterceptorLayer::new(|mut request: Request<()>| {
            let node = request.metadata().get("node").map(|node| name(node.to_str().unwrap()));
            if let Some(node) = node {
                request.extensions_mut().insert(identity(&node));
            }
            Ok(request)
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Server::builder().layer(believe).add_service(service.into_server());
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(router.serve_with_incoming(incoming));
        Self { driver, identities, address, shutdown, logs, _capture: capture, _folder: folder }
    }

    async fn peer(&self, node: &str) -> Peer {
        let channel =
            Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap();
        let client = CoordinatorClient::new(channel);
        Peer { client, node: node.to_owned() }
    }

    /// A control stream that said Hello and was welcomed.
    async fn welcomed(&self, node: &str) -> Stream {
        let mut stream = self.peer(node).await.control().await;
        stream.say(hello(node)).await;
        let Ok(ToPeer::Welcome(welcome)) = stream.hear().await else { panic!("not welcomed") };
        assert_eq!((welcome.protocol, welcome.software.contains("tributary-server")), (1, true));
        stream
    }
}

struct Peer {
    client: CoordinatorClient<Channel>,
    node: String,
}

struct Stream {
    sender: mpsc::Sender<NodeMessage>,
    messages: Streaming<CoordinatorMessage>,
}

impl Peer {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("node", self.node.parse().unwrap());
        request
    }

    async fn control(&mut self) -> Stream {
        let (sender, receiver) = mpsc::channel(1000);
        let request = self.request(ReceiverStream::new(receiver));
        Stream { sender, messages: self.client.control(request).await.unwrap().into_inner() }
    }

    async fn fetch(&mut self, model: Vec<u8>) -> Result<Vec<u8>, Status> {
        let request = self.request(FetchRequest { model, offset: 0 });
        let mut chunks = self.client.fetch(request).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            bytes.extend(chunk_data(chunk, bytes.len() as u64, 24).unwrap());
        }
        Ok(bytes)
    }

    async fn upload(&mut self, header: &UploadHeader, update: &[u8]) -> Result<UploadProgress, Status> {
        let chunk = chunk(0, update.to_vec().into(), update.len() as u64);
        let parts = [Part::Header(header.clone()), Part::Chunk(chunk)];
        let parts = tokio_stream::iter(parts.map(|part| UploadPart { part: Some(part) }));
        let request = self.request(parts);
        Ok(self.client.upload(request).await?.into_inner())
    }
}

impl Stream {
    async fn say(&self, message: FromPeer) {
        // The coordinator may have ended the stream; then what it says is of interest.
        let _ = self.sender.send(NodeMessage { message: Some(message) }).await;
    }

    /// The next message, or how the stream ended.
    async fn hear(&mut self) -> Result<ToPeer, Status> {
        let heard = tokio::time::timeout(Duration::from_secs(20), self.messages.message()).await;
        let heard = heard.expect("it says nothing")?;
        heard.and_then(|message| message.message).ok_or_else(|| Status::ok("ended"))
    }

    async fn goodbye(&mut self) -> wire::Goodbye {
        loop {
            match self.hear().await {
                Ok(ToPeer::Goodbye(goodbye)) => {
                    assert_eq!(self.hear().await.unwrap_err().code(), Code::Ok);
                    return goodbye;
                }
                Ok(_) => {}
                Err(status) => panic!("{status} instead of Goodbye"),
            }
        }
    }

    async fn error(&mut self) -> Status {
        loop {
            if let Err(status) = self.hear().await {
                return status;
            }
        }
    }
}

fn hello(node: &str) -> FromPeer {
    FromPeer::Hello(wire::Hello {
        protocol_minimum: 1,
        protocol_maximum: 1,
        software: "test 1".to_owned(),
        node: node.to_owned(),
        role: wire::Role::Trainer.into(),
    })
}

/// What a coordinator answers to a stream whose first message is `first`.
async fn refusal(site: &Site, first: NodeMessage) -> Status {
    let mut stream = site.peer("a").await.control().await;
    stream.sender.send(first).await.unwrap();
    stream.error().await
}

#[tokio::test]
async fn a_whole_run_over_the_wire() {
    let site = Site::start().await;
    let mut streams = [site.welcomed("a").await, site.welcomed("b").await];
    let text = job(2, 2, "\n[evaluation]\nfederated = true");
    let run = site.driver.submit(text, None).await.unwrap();
    for round in 1..=2 {
        for (stream, node) in streams.iter_mut().zip(["a", "b"]) {
            let Ok(ToPeer::Invite(invite)) = stream.hear().await else { panic!("not invited") };
            assert_eq!((invite.run, invite.round, invite.attempt), (run.0, round, 1));
            assert!((50_000..=60_000).contains(&invite.deadline_milliseconds), "{invite:?}");
            assert!(invite.job_toml.contains("name = \"test\""));
            let mut peer = site.peer(node).await;
            let model = peer.fetch(invite.model.clone()).await.unwrap();
            assert_eq!(Digest::of(&model).0.to_vec(), invite.model);
            let delta = to_bytes(&from_bytes(&model).unwrap().iter().map(|_| 0.5).collect::<Vec<f32>>());
            let header = UploadHeader {
                run: invite.run,
                round,
                attempt: 1,
                digest: Digest::of(&delta).0.to_vec(),
                total_bytes: delta.len() as u64,
                examples: 7,
            };
            let request = peer.request(header.clone());
            assert!(peer.client.upload_status(request).await.unwrap().into_inner().wanted);
            assert!(peer.upload(&header, &delta).await.unwrap().complete);
        }
        for stream in &mut streams {
            let Ok(ToPeer::Dismiss(dismiss)) = stream.hear().await else { panic!("not dismissed") };
            assert_eq!(dismiss.reason(), wire::DismissReason::Published);
            let Ok(ToPeer::Evaluate(evaluate)) = stream.hear().await else { panic!("not asked") };
            let metrics = wire::Metrics { examples: 10, loss_sum: 5.0, correct: 9, confusion: Vec::new() };
            let report = wire::EvaluationReport { run: evaluate.run, round, metrics: Some(metrics) };
            stream.say(FromPeer::Evaluation(report)).await;
        }
    }
    let mut events = site.driver.watch(run);
    let mut progress = Progress::new(2);
    let mut lines = Vec::new();
    while let Some(event) = events.recv().await {
        let (at, event) = event.unwrap();
        lines.extend(progress.take(at, &event));
    }
    assert!(
        matches!(lines[0], Line::Round { accuracy: Some(0.9), completed: 2, bytes_up: 48, .. }),
        "{lines:?}"
    );
    assert!(matches!(lines[2], Line::Finished(_)));
    // Nobody fetches the model of a run that is over.
    let Line::Finished(summary) = &lines[2] else { unreachable!() };
    let refused = site.peer("a").await.fetch(summary.model_digest.0.to_vec()).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
}

#[tokio::test]
async fn heartbeats_come_back_and_their_absence_ends_the_stream() {
    let site = Site::with_heartbeat(1).await;
    let mut stream = site.welcomed("a").await;
    stream.say(FromPeer::Heartbeat(wire::Heartbeat { sequence: 41 })).await;
    assert_eq!(stream.hear().await.unwrap(), ToPeer::Heartbeat(wire::Heartbeat { sequence: 41 }));
    let goodbye = stream.goodbye().await;
    assert_eq!((goodbye.reason.as_str(), goodbye.r#final), ("three heartbeats were missed", false));
    while !site.driver.nodes().await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn nobody_speaks_for_another_node() {
    let site = Site::start().await;
    let refused = refusal(&site, NodeMessage { message: Some(hello("b")) }).await;
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(refused.message(), "this certificate is node a's, not \"b\"'s");
    site.logs.warned(&["node a from", "claims to be \"b\""]).await;
    assert!(site.driver.nodes().await.unwrap().is_empty());

    let mut nobody = site.peer("a").await;
    let request = Request::new(tokio_stream::iter([NodeMessage { message: Some(hello("a")) }]));
    assert_eq!(nobody.client.control(request).await.unwrap_err().code(), Code::Unauthenticated);
    let request = Request::new(FetchRequest { model: vec![0; 32], offset: 0 });
    assert_eq!(nobody.client.fetch(request).await.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn versions_that_do_not_meet_are_told() {
    let site = Site::start().await;
    for (minimum, maximum, update) in [(2, 3, "coordinator"), (0, 0, "node"), (3, 1, "coordinator")] {
        let FromPeer::Hello(mut hello) = hello("a") else { unreachable!() };
        (hello.protocol_minimum, hello.protocol_maximum) = (minimum, maximum);
        let mut stream = site.peer("a").await.control().await;
        stream.say(FromPeer::Hello(hello)).await;
        let goodbye = stream.goodbye().await;
        let words = format!(
            "this coordinator speaks protocol 1..1, the node {minimum}..{maximum}: update the {update}"
        );
        assert_eq!((goodbye.reason, goodbye.r#final), (words, true));
    }
}

#[tokio::test]
async fn hostile_streams_end_and_harm_nobody() {
    let site = Site::start().await;
    let mut honest = site.welcomed("b").await;
    let heartbeat = || FromPeer::Heartbeat(wire::Heartbeat { sequence: 1 });

    let first = refusal(&site, NodeMessage { message: Some(heartbeat()) }).await;
    assert_eq!(first.code(), Code::InvalidArgument, "Hello is missing");
    let unknown = refusal(&site, NodeMessage { message: None }).await;
    assert_eq!(unknown.code(), Code::InvalidArgument, "a message of an unknown kind");
    let FromPeer::Hello(mut roleless) = hello("a") else { unreachable!() };
    roleless.role = 77;
    let roleless = refusal(&site, NodeMessage { message: Some(FromPeer::Hello(roleless)) }).await;
    assert_eq!(roleless.code(), Code::InvalidArgument, "an unknown role");
    let FromPeer::Hello(mut large) = hello("a") else { unreachable!() };
    large.software = "x".repeat(MESSAGE_BYTES);
    let large = refusal(&site, NodeMessage { message: Some(FromPeer::Hello(large)) }).await;
    assert_eq!(large.code(), Code::OutOfRange, "an oversized message");

    for message in [
        Some(hello("a")),
        None,
        Some(FromPeer::Decline(wire::Decline { run: 1, round: 1, attempt: 1, reason: 99 })),
        Some(FromPeer::Evaluation(wire::EvaluationReport {
            run: 1,
            round: 1,
            metrics: Some(wire::Metrics { loss_sum: f64::NAN, ..Default::default() }),
        })),
    ] {
        let mut stream = site.welcomed("a").await;
        stream.sender.send(NodeMessage { message }).await.unwrap();
        assert_eq!(stream.error().await.code(), Code::InvalidArgument);
    }

    let mut flood = site.welcomed("a").await;
    for _ in 0..1000 {
        flood.say(heartbeat()).await;
    }
    let goodbye = flood.goodbye().await;
    assert!(goodbye.reason.contains("slow down") && !goodbye.r#final, "{goodbye:?}");
    site.logs.warned(&["node a floods its stream"]).await;

    honest.say(heartbeat()).await;
    assert!(matches!(honest.hear().await, Ok(ToPeer::Heartbeat(_))));
}

#[tokio::test]
async fn a_revoked_node_is_cut_off_at_once() {
    let site = Site::start().await;
    let (mut a, mut b) = (site.welcomed("a").await, site.welcomed("b").await);
    site.driver.submit(job(1, 2, ""), None).await.unwrap();
    assert!(matches!(a.hear().await, Ok(ToPeer::Invite(_))));
    // An upload is under way.
    let mut peer = site.peer("a").await;
    let (parts, receiver) = mpsc::channel(4);
    let Some(attempt) = site.driver.current().borrow().as_ref().and_then(|current| current.attempt) else {
        panic!("no attempt is open")
    };
    let header = UploadHeader {
        run: attempt.run.0,
        round: 1,
        attempt: 1,
        digest: vec![1; 32],
        total_bytes: 24,
        examples: 1,
    };
    parts.send(UploadPart { part: Some(Part::Header(header)) }).await.unwrap();
    let request = peer.request(ReceiverStream::new(receiver));
    let upload = tokio::spawn(async move { peer.client.upload(request).await });

    let (identities, node) = (site.identities.clone(), name("a"));
    tokio::task::spawn_blocking(move || identities.revoke(&node, Clock.now())).await.unwrap().unwrap();
    let ended = a.error().await;
    assert_eq!(ended.code(), Code::PermissionDenied);
    assert!(ended.message().contains("was revoked"));
    let ended = tokio::time::timeout(Duration::from_secs(10), upload).await.unwrap().unwrap().unwrap_err();
    assert_eq!(ended.code(), Code::PermissionDenied);
    site.logs.warned(&["cut off a stream of a", "was revoked"]).await;
    b.say(FromPeer::Heartbeat(wire::Heartbeat { sequence: 1 })).await;
    assert!(matches!(b.hear().await, Ok(ToPeer::Invite(_))));
    assert!(matches!(b.hear().await, Ok(ToPeer::Heartbeat(_))));
}

#[tokio::test]
async fn a_newer_stream_takes_over_and_a_shutdown_is_told() {
    let site = Site::start().await;
    let mut old = site.welcomed("a").await;
    let mut new = site.welcomed("a").await;
    let goodbye = old.goodbye().await;
    assert!(goodbye.reason.contains("a newer connection") && !goodbye.r#final);
    assert_eq!(site.driver.nodes().await.unwrap().len(), 1);
    site.shutdown.send(true).unwrap();
    let goodbye = new.goodbye().await;
    assert_eq!((goodbye.reason.as_str(), goodbye.r#final), ("the coordinator is shutting down", false));

    let site = Site::start().await;
    let mut stream = site.welcomed("a").await;
    site.driver.drain().await;
    assert_eq!(stream.goodbye().await.reason, "the coordinator is shutting down");
}
