//! Transfers to and from a driver with a run, without a network.

use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tributary_common::digest::Digest;
use tributary_common::ids::RunId;
use tributary_common::model::digest;
use tributary_proto::{chunk, chunk_data};

use super::*;
use crate::driver::tests::{job, memory, name, start};
use crate::driver::{Connection, ToNode};
use crate::round::Role;

/// A run with an open attempt of all `nodes`, and transfers for it.
struct World {
    _folder: tempfile::TempDir,
    transfers: Arc<Transfers>,
    connections: Vec<Connection>,
    run: RunId,
    model: Vec<u8>,
}

impl World {
    async fn new(nodes: &[&str], uploads_in_flight: u32) -> Self {
        let (driver, _) = start(&memory()).await;
        let mut connections = Vec::new();
        for node in nodes {
            connections.push(driver.connect(name(node), Role::Trainer).await.unwrap());
        }
        let run = driver.submit(job(2, u32::try_from(nodes.len()).unwrap(), ""), None).await.unwrap();
        for connection in &mut connections {
            assert!(matches!(connection.outbox.recv().await, Some(ToNode::Invite { .. })));
        }
        let folder = tempfile::tempdir().unwrap();
        let transfers = Transfers::open(driver.clone(), folder.path(), 1000, uploads_in_flight).unwrap();
        let current = driver.current();
        let model = to_bytes(&current.borrow().as_ref().unwrap().model);
        Self { _folder: folder, transfers: Arc::new(transfers), connections, run, model }
    }

    fn header(&self, content: &[u8]) -> UploadHeader {
        UploadHeader {
            run: self.run.0,
            round: 1,
            attempt: 1,
            digest: Digest::of(content).0.to_vec(),
            total_bytes: content.len() as u64,
            examples: 5,
        }
    }

    async fn upload(
        &self,
        node: &str,
        parts: Vec<Result<UploadPart, Status>>,
    ) -> Result<UploadProgress, Status> {
        self.transfers.upload(&name(node), tokio_stream::iter(parts)).await
    }

    async fn status(&self, node: &str, header: &UploadHeader) -> Result<UploadProgress, Status> {
        self.transfers.status(&name(node), header).await
    }

    /// An upload that waits for its parts; it has begun when this returns.
    async fn begin(
        &self,
        node: &str,
        content: &[u8],
    ) -> (
        tokio::sync::mpsc::Sender<Result<UploadPart, Status>>,
        tokio::task::JoinHandle<Result<UploadProgress, Status>>,
    ) {
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let (transfers, node) = (self.transfers.clone(), name(node));
        let upload =
            tokio::spawn(async move { transfers.upload(&node, ReceiverStream::new(receiver)).await });
        sender.send(head(&self.header(content))).await.unwrap();
        sender.send(body(content, 0, 8)).await.unwrap();
        (sender, upload)
    }
}

fn head(header: &UploadHeader) -> Result<UploadPart, Status> {
    Ok(UploadPart { part: Some(Part::Header(header.clone())) })
}

fn body(content: &[u8], from: usize, to: usize) -> Result<UploadPart, Status> {
    let chunk = chunk(from as u64, content[from..to].to_vec().into(), content.len() as u64);
    Ok(UploadPart { part: Some(Part::Chunk(chunk)) })
}

fn content(value: f32) -> Vec<u8> {
    to_bytes(&[value; 6])
}

const WHOLE: (u64, bool, bool) = (24, true, true);

fn progress(progress: Result<UploadProgress, Status>) -> (u64, bool, bool) {
    let UploadProgress { received_bytes, complete, wanted } = progress.unwrap();
    (received_bytes, complete, wanted)
}

#[tokio::test]
async fn a_broken_upload_is_resumed_and_taken_once() {
    let world = World::new(&["a", "b"], 2).await;
    let update = content(0.5);
    let header = world.header(&update);
    assert_eq!(progress(world.status("a", &header).await), (0, false, true));
    let broken =
        world.upload("a", vec![head(&header), body(&update, 0, 8), Err(Status::unknown("reset"))]).await;
    assert_eq!(broken.unwrap_err().code(), Code::Unknown);
    assert_eq!(progress(world.status("a", &header).await), (8, false, true));
    // A node that stops in order is told how far it came.
    assert_eq!(
        progress(world.upload("a", vec![head(&header), body(&update, 8, 16)]).await),
        (16, false, true)
    );
    assert_eq!(progress(world.upload("a", vec![head(&header), body(&update, 16, 24)]).await), WHOLE);
    assert!(world.transfers.staging().is_empty());
    // Again, in any form: it is in the sum.
    assert_eq!(progress(world.status("a", &header).await), WHOLE);
    assert_eq!(progress(world.upload("a", vec![head(&header)]).await), WHOLE);
}

#[tokio::test]
async fn what_is_damaged_or_another_update_is_refused() {
    let world = World::new(&["a", "b"], 2).await;
    let update = content(0.5);
    let header = world.header(&update);
    let mut damaged = chunk(0, update[..8].to_vec().into(), 24);
    damaged.data = vec![0; 8].into();
    let damaged = Ok(UploadPart { part: Some(Part::Chunk(damaged)) });
    let refused = world.upload("a", vec![head(&header), body(&update, 0, 4), damaged]).await.unwrap_err();
    assert_eq!(refused.code(), Code::DataLoss);
    assert_eq!(progress(world.status("a", &header).await), (4, false, true));

    let other = content(0.7);
    let refused =
        world.upload("a", vec![head(&world.header(&other)), body(&other, 0, 24)]).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
    assert_eq!(world.status("a", &world.header(&other)).await.unwrap_err().code(), Code::AlreadyExists);

    let lie = UploadHeader { digest: Digest::of(b"else").0.to_vec(), ..header.clone() };
    let refused = world.upload("b", vec![head(&lie), body(&update, 0, 24)]).await.unwrap_err();
    assert_eq!(refused.code(), Code::DataLoss);
    assert!(refused.message().contains("from the start"));
    assert_eq!(progress(world.status("b", &header).await), (0, false, true));
    assert_eq!(progress(world.upload("b", vec![head(&header), body(&update, 0, 24)]).await), WHOLE);
}

#[tokio::test]
async fn what_breaks_the_protocol_is_refused() {
    let world = World::new(&["a"], 1).await;
    let update = content(0.5);
    let header = world.header(&update);
    let short = world.header(&update[..20]);
    let nothing = || Ok(UploadPart { part: None });
    for parts in [
        vec![],
        vec![nothing()],
        vec![body(&update, 0, 24)],
        vec![head(&UploadHeader { digest: vec![1], ..header.clone() })],
        vec![head(&UploadHeader { examples: 0, ..header.clone() })],
        vec![head(&short), body(&update[..20], 0, 20)],
        vec![head(&header), head(&header)],
        vec![head(&header), nothing()],
    ] {
        let refused = world.upload("a", parts).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    assert_eq!(world.status("a", &short).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn nobody_uploads_to_what_is_not_theirs() {
    let mut world = World::new(&["a"], 1).await;
    let update = content(0.5);
    let header = world.header(&update);
    const UNWANTED: (u64, bool, bool) = (0, false, false);
    for (node, header) in [
        ("stranger", header.clone()),
        ("a", UploadHeader { run: 1, ..header.clone() }),
        ("a", UploadHeader { round: 2, ..header.clone() }),
        ("a", UploadHeader { attempt: 2, ..header.clone() }),
    ] {
        assert_eq!(progress(world.status(node, &header).await), UNWANTED);
        assert_eq!(progress(world.upload(node, vec![head(&header), body(&update, 0, 24)]).await), UNWANTED);
    }
    assert!(world.transfers.staging().is_empty());
    // The node itself is also told on its control stream.
    assert!(matches!(world.connections[0].outbox.recv().await, Some(ToNode::Dismiss { .. })));
}

#[tokio::test]
async fn an_upload_ends_with_its_attempt() {
    let world = World::new(&["a"], 1).await;
    let update = content(0.5);
    let (_sender, upload) = world.begin("a", &update).await;
    world.transfers.driver.stop(world.run).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(10), upload).await.unwrap().unwrap();
    assert_eq!(progress(ended), (0, false, false));
    while !world.transfers.staging().is_empty() {
        tokio::task::yield_now().await; // until the sweep has seen it
    }

    let world = World::new(&["a"], 1).await;
    let (_sender, upload) = world.begin("a", &update).await;
    world.transfers.driver.drain().await;
    let ended = tokio::time::timeout(Duration::from_secs(10), upload).await.unwrap().unwrap();
    assert_eq!(ended.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn so_many_uploads_at_once_so_many_waiting_and_no_more() {
    let world = World::new(&["a", "b", "c"], 1).await;
    let update = content(0.5);
    let (first_parts, first) = world.begin("a", &update).await;
    let (second_parts, second) = world.begin("b", &update).await;
    while world.transfers.admitted.available_permits() > 0 {
        tokio::task::yield_now().await;
    }
    let header = world.header(&update);
    let refused = world.upload("c", vec![head(&header), body(&update, 0, 24)]).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert_eq!(refused.metadata().get(RETRY_AFTER).unwrap(), "5");
    assert_eq!(progress(world.status("c", &header).await), (0, false, true), "it can come again");
    // The first breaks; the second, which waited, takes its place.
    drop(first_parts);
    assert_eq!(progress(first.await.unwrap()), (8, false, true));
    second_parts.send(body(&update, 8, 24)).await.unwrap();
    assert_eq!(progress(second.await.unwrap()), WHOLE);
    assert_eq!(progress(world.upload("c", vec![head(&header), body(&update, 0, 24)]).await), WHOLE);
}

#[tokio::test]
async fn a_model_is_fetched_from_any_byte() {
    let world = World::new(&["a"], 1).await;
    let model = Digest::of(&world.model).0.to_vec();
    for offset in 0..=24u64 {
        let mut received = world.model[..offset as usize].to_vec();
        for chunk in world.transfers.fetch(&FetchRequest { model: model.clone(), offset }).unwrap() {
            received.extend(chunk_data(chunk, received.len() as u64, 24).unwrap());
        }
        assert_eq!(received, world.model);
    }
    let code = |model, offset| world.transfers.fetch(&FetchRequest { model, offset }).unwrap_err().code();
    assert_eq!(code(model, 25), Code::OutOfRange);
    assert_eq!(code(Digest::of(b"another").0.to_vec(), 0), Code::NotFound);
    assert_eq!(code(vec![1, 2], 0), Code::InvalidArgument);
}

#[test]
fn a_large_model_is_cut_into_chunks() {
    let model: Parameters = Arc::new((0..600_000).map(|value| value as f32).collect());
    let bytes = to_bytes(&model);
    for at in [0, 1, 1_048_577, 2_399_999] {
        let mut received = bytes[..at as usize].to_vec();
        for chunk in (ModelChunks { model: model.clone(), at }) {
            received.extend(chunk_data(chunk, received.len() as u64, 2_400_000).unwrap());
        }
        assert_eq!(Digest::of(&received), digest(&model), "from {at}");
    }
}
