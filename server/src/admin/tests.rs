//! The Admin service over its socket.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use tokio_stream::wrappers::UnixListenerStream;
use tonic::Code;
use tonic::transport::{Channel, Server};
use tributary_common::digest::Digest;
use tributary_common::model::{import, to_bytes};
use tributary_common::record::{RunEvent, RunState};
use tributary_common::time::Time;
use tributary_common::token::JoinToken;
use tributary_proto::admin::admin_client::AdminClient;

use super::*;
use crate::driver::tests::{job, memory, name, start};
use crate::driver::{Attempt, Connection, ToNode};
use crate::run::{Payload, Update};
use crate::store::NodeRecord;

struct Site {
    client: AdminClient<Channel>,
    driver: Driver,
    identities: Arc<Identities>,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Site {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = memory();
        let (driver, _) = start(&store).await;
        let identities = Arc::new(Identities::open(store).unwrap());
        let authority = Authority::create(folder.path(), &["localhost".to_owned()], Clock.now()).unwrap();
        let service = AdminService::new(driver.clone(), identities.clone(), Arc::new(authority));
        let socket = folder.path().join("admin.sock");
        let incoming = UnixListenerStream::new(listen(&socket).unwrap());
        tokio::spawn(Server::builder().add_service(service.into_server()).serve_with_incoming(incoming));
        let client = connect(&socket).await.unwrap();
        Self { client, driver, identities, socket, _folder: folder }
    }

    async fn submit(&mut self, parts: Vec<Part>) -> Result<u64, Status> {
        let parts = parts.into_iter().map(|part| wire::SubmitPart { part: Some(part) });
        Ok(self.client.submit_run(tokio_stream::iter(parts)).await?.into_inner().run)
    }

    async fn events(&mut self, run: u64) -> Vec<(u64, RunEvent)> {
        let mut stream = self.client.watch_run(wire::WatchRunRequest { run }).await.unwrap().into_inner();
        let mut events = Vec::new();
        while let Some(event) = stream.message().await.unwrap() {
            events.push((event.at_unix_milliseconds, serde_json::from_str(&event.event_json).unwrap()));
        }
        events
    }

    async fn export(&mut self, run: u64) -> Vec<u8> {
        let mut parts =
            self.client.export_model(wire::ExportModelRequest { run }).await.unwrap().into_inner();
        let mut bytes = Vec::new();
        while let Some(part) = parts.message().await.unwrap() {
            bytes.extend(part.data);
        }
        bytes
    }
}

/// Takes part in one round.
async fn work(driver: &Driver, connection: &mut Connection) {
    let Some(ToNode::Invite { run, round, attempt, .. }) = connection.outbox.recv().await else {
        panic!("not invited")
    };
    let payload = Payload::Bytes(to_bytes(&[0.5; 6]));
    let digest = Some(Digest::of(b"update"));
    let update = Update { node: connection.node.clone(), round, examples: 1, bytes: 24, digest, payload };
    driver.update(Attempt { run, round, attempt }, update).await.unwrap();
}

#[tokio::test]
async fn a_run_from_submission_to_export() {
    let mut site = Site::start().await;
    let layout = Job::parse(&job(1, 1, "")).unwrap().layout().unwrap();
    let initial = export(&layout, &[1.0; 6]).unwrap();
    let (head, tail) = initial.split_at(30);
    let model = [head, tail].map(|part| Part::Model(part.to_vec()));
    let parts = std::iter::once(Part::JobToml(job(1, 1, ""))).chain(model).collect();
    let run = site.submit(parts).await.unwrap();
    assert_eq!(import(&layout, &site.export(run).await).unwrap(), [1.0; 6]);

    let mut node = site.driver.connect(name("a"), Role::Trainer).await.unwrap();
    work(&site.driver, &mut node).await;
    let events = site.events(run).await;
    let (_, last) = events.last().unwrap();
    let RunEvent::Ended { state: RunState::Finished, rounds: 1, model } = last else { panic!("{last:?}") };
    assert_eq!(import(&layout, &site.export(run).await).unwrap(), [1.5; 6]);

    let runs = site.client.list_runs(wire::ListRunsRequest {}).await.unwrap().into_inner().runs;
    let listed = &runs[0];
    assert_eq!((listed.run, listed.name.as_str(), listed.published, listed.rounds), (run, "test", 1, 1));
    assert_eq!((listed.state_json.as_str(), &listed.model[..]), (r#"{"state":"finished"}"#, &model.0[..]));
    let shown = site.client.show_run(wire::ShowRunRequest { run }).await.unwrap().into_inner();
    assert_eq!((shown.run.as_ref(), shown.round_records_json.len()), (Some(listed), 1));
    assert_eq!(Job::parse(&shown.job_toml).unwrap(), Job::parse(&job(1, 1, "")).unwrap());

    let again = site.client.stop_run(wire::StopRunRequest { run }).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);
    let second = site.submit(vec![Part::JobToml(job(1, 1, ""))]).await.unwrap();
    site.client.stop_run(wire::StopRunRequest { run: second }).await.unwrap();
    assert!(matches!(
        site.events(second).await.last(),
        Some((_, RunEvent::Ended { state: RunState::Stopped, rounds: 0, .. }))
    ));
}

#[tokio::test]
async fn live_events_have_a_time_and_past_ones_none() {
    let mut site = Site::start().await;
    let run = site.submit(vec![Part::JobToml(job(2, 1, ""))]).await.unwrap();
    let mut node = site.driver.connect(name("a"), Role::Trainer).await.unwrap();
    work(&site.driver, &mut node).await;
    let mut stream = site.client.watch_run(wire::WatchRunRequest { run }).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!(first.at_unix_milliseconds, 0);
    assert!(matches!(node.outbox.recv().await, Some(ToNode::Dismiss { .. })));
    work(&site.driver, &mut node).await;
    let mut last = first;
    while let Some(event) = stream.message().await.unwrap() {
        last = event;
    }
    assert!(last.at_unix_milliseconds > 0 && last.event_json.contains(r#""event":"ended""#));
}

#[tokio::test]
async fn what_cannot_be_submitted_is_refused_in_one_line() {
    let mut site = Site::start().await;
    let text = |text: &str| Part::JobToml(text.to_owned());
    let bad_file = Part::Model(b"nonsense".to_vec());
    let too_large = || (0..3).map(|_| Part::Model(vec![0; 500_000]));
    for (parts, why) in [
        (vec![], "a submission starts with the job"),
        (vec![bad_file.clone()], "a submission starts with the job"),
        (vec![text("nam = 'x'")], "unknown key `nam`; did you mean `name`?"),
        (vec![text(&job(1, 1, "")), text("twice")], "the initial model, and nothing else"),
        (vec![text(&job(1, 1, "")), bad_file], "not a .safetensors file"),
        (std::iter::once(text(&job(1, 1, ""))).chain(too_large()).collect(), "is larger than 1048600 bytes"),
    ] {
        let refused = site.submit(parts).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(
            refused.message().contains(why) && !refused.message().contains('\n'),
            "{}",
            refused.message()
        );
    }
    assert!(site.client.list_runs(wire::ListRunsRequest {}).await.unwrap().into_inner().runs.is_empty());
    for unknown in [
        site.client.show_run(wire::ShowRunRequest { run: 1 }).await.map(drop),
        site.client.stop_run(wire::StopRunRequest { run: 1 }).await.map(drop),
        site.client.export_model(wire::ExportModelRequest { run: 1 }).await.map(drop),
    ] {
        assert_eq!(unknown.unwrap_err().code(), Code::NotFound);
    }
    let mut watched = site.client.watch_run(wire::WatchRunRequest { run: 1 }).await.unwrap().into_inner();
    assert_eq!(watched.message().await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn nodes_are_invited_listed_and_revoked() {
    let mut site = Site::start().await;
    let ask = |node: &str, valid_seconds| wire::CreateTokenRequest { node: node.to_owned(), valid_seconds };
    let created = site.client.create_token(ask("cleveland", 3600)).await.unwrap().into_inner();
    let token: JoinToken = created.token.parse().unwrap();
    assert_eq!(token.node, name("cleveland"));
    let stored = site.driver.store().take_token(token.secret_digest()).unwrap().unwrap();
    assert_eq!(stored.expires.0 / 1000, created.expires_unix_seconds);
    for bad in [ask("No Name", 60), ask("a", 0), ask("a", TOKEN_SECONDS + 1)] {
        assert_eq!(site.client.create_token(bad).await.unwrap_err().code(), Code::InvalidArgument);
    }

    for node in ["a", "b"] {
        let record = NodeRecord {
            name: name(node),
            identity: Digest::of(node.as_bytes()),
            enrolled: Time(5000),
            expires: Time(9000),
            revoked: None,
        };
        site.identities.enrol(record).unwrap();
    }
    let _connection = site.driver.connect(name("b"), Role::Evaluator).await.unwrap();
    site.client.revoke_node(wire::RevokeNodeRequest { node: "a".to_owned() }).await.unwrap();
    let nodes = site.client.list_nodes(wire::ListNodesRequest {}).await.unwrap().into_inner().nodes;
    let of = |node: &wire::Node| (node.name.clone(), node.revoked, node.connected, node.role.clone());
    assert_eq!(
        nodes.iter().map(of).collect::<Vec<_>>(),
        [("a".to_owned(), true, false, String::new()), ("b".to_owned(), false, true, "evaluator".to_owned())]
    );
    assert_eq!((nodes[0].enrolled_unix_seconds, nodes[0].expires_unix_seconds), (5, 9));
    let unknown = wire::RevokeNodeRequest { node: "nobody".to_owned() };
    assert_eq!(site.client.revoke_node(unknown).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn the_socket_is_the_owners_and_one_coordinator_holds_it() {
    let site = Site::start().await;
    let mode = std::fs::metadata(&site.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(matches!(listen(&site.socket), Err(SocketError::InUse { .. })));

    let folder = tempfile::tempdir().unwrap();
    let stale = folder.path().join("admin.sock");
    assert!(matches!(connect(&stale).await, Err(SocketError::NotRunning { .. })));
    drop(listen(&stale).unwrap());
    assert!(stale.exists());
    let refused = connect(&stale).await.unwrap_err().to_string();
    assert!(refused.contains("no coordinator is running here"), "{refused}");
    let _listener = listen(&stale).unwrap();
    assert!(connect(&stale).await.is_ok());
    assert!(matches!(listen(&folder.path().join("missing/admin.sock")), Err(SocketError::Io { .. })));
}
