//! Transfers over links that break, and control streams of every end, against a real server on loopback.

use std::time::Duration;

use tributary_common::digest::Digest;
use tributary_common::ids::RunId;
use tributary_common::limits::CHUNK_BYTES;
use tributary_common::time::Time;
use tributary_proto::coordinator as wire;
use tributary_proto::coordinator::coordinator_message::Message;
use tributary_proto::coordinator::node_message::Message as FromNode;

use super::fake::{Fake, Step, welcome};
use super::*;
use crate::machine::{Attempt, Input, Kept, Role, RoundKey};
use crate::store::{Facts, Folder};

const MIB: u64 = CHUNK_BYTES as u64;

/// Three chunks and a bit.
fn values() -> Vec<f32> {
    (0..3 * CHUNK_BYTES / 4 + 5).map(|i| i as f32).collect()
}

fn bytes() -> Vec<u8> {
    tributary_common::model::to_bytes(&values())
}

struct Fetching {
    dir: tempfile::TempDir,
    fake: Fake,
    dialer: Dialer,
}

impl Fetching {
    async fn new(change: impl FnOnce(&mut super::fake::State)) -> Self {
        let fake = Fake::default();
        fake.state().model = bytes();
        change(&mut fake.state());
        let dialer = fake.serve().await;
        Self { dir: tempfile::tempdir().unwrap(), fake, dialer }
    }

    async fn fetch(&self, model: Digest, bytes: u64) -> Result<Vec<f32>, String> {
        let part = self.dir.path().join("part");
        fetch(&self.dialer, &part, model, bytes).await.map(|parameters| parameters.to_vec())
    }
}

#[tokio::test]
async fn a_fetch_goes_on_where_the_link_broke() {
    let model = Digest::of(&bytes());
    let test = Fetching::new(|state| state.fetch_breaks = [1, 2].into()).await;
    assert_eq!(test.fetch(model, bytes().len() as u64).await.unwrap(), values());
    assert_eq!(test.fake.state().fetch_offsets, [0, MIB, 3 * MIB]);
    assert_eq!(std::fs::read_dir(test.dir.path()).unwrap().count(), 0, "the part is gone");
    // And so does another call, after the first was stopped.
    std::fs::write(test.dir.path().join("part"), &bytes()[..100]).unwrap();
    assert_eq!(test.fetch(model, bytes().len() as u64).await.unwrap(), values());
    assert_eq!(test.fake.state().fetch_offsets.last(), Some(&100));
}

#[tokio::test]
async fn what_does_not_have_its_digest_is_refused() {
    let (model, length) = (Digest::of(&bytes()), bytes().len() as u64);
    let test = Fetching::new(|state| state.damaged = true).await;
    assert!(test.fetch(model, length).await.unwrap_err().contains("does not have its digest"));
    let other = Digest::of(b"other");
    let test = Fetching::new(|state| state.named = Some(other)).await;
    assert!(
        test.fetch(other, length)
            .await
            .unwrap_err()
            .contains("the model that arrived does not have its digest")
    );
    assert_eq!(std::fs::read_dir(test.dir.path()).unwrap().count(), 0);
    let test = Fetching::new(|_| {}).await;
    assert!(test.fetch(model, length + 4).await.unwrap_err().contains("in all, but"));
    assert!(test.fetch(other, length).await.unwrap_err().contains("no such model"));
}

async fn send(fake: &Fake) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let folder = Folder::open(dir.path()).unwrap();
    let at = Attempt { run: RunId(1), round: 2, attempt: 3 };
    let facts = Facts { model: Digest::of(b"model"), examples: 7, private: false, masked: false };
    let kept = folder.keep_values(at.key(), facts, &values(), Time(0)).unwrap();
    let dialer = fake.serve().await;
    upload(&dialer, &folder.update_path(at.key()), at, &kept).await
}

#[tokio::test]
async fn an_upload_goes_on_where_the_link_broke() {
    let fake = Fake::default();
    fake.state().upload_breaks = [1, 1].into();
    send(&fake).await.unwrap();
    let state = fake.state();
    assert_eq!(state.upload_offsets, [0, MIB, 2 * MIB]);
    assert_eq!(state.staged, bytes());
    let header = state.header.clone().unwrap();
    let digest = Digest::of(&bytes()).0.to_vec();
    let total_bytes = bytes().len() as u64;
    assert_eq!(header, wire::UploadHeader { run: 1, round: 2, attempt: 3, digest, total_bytes, examples: 7 });
}

#[tokio::test]
async fn an_upload_that_is_there_or_unwanted_is_not_sent() {
    let fake = Fake::default();
    fake.state().complete = true;
    fake.state().unwanted = true; // the round is over, with the update in it
    send(&fake).await.unwrap();
    assert!(fake.state().upload_offsets.is_empty());
    let fake = Fake::default();
    fake.state().unwanted = true;
    assert!(send(&fake).await.unwrap_err().contains("does not want"));
    assert!(fake.state().upload_offsets.is_empty());
}

#[tokio::test]
async fn a_file_that_became_shorter_ends_the_upload() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("update");
    std::fs::write(&path, &bytes()[..10]).unwrap();
    let fake = Fake::default();
    let dialer = fake.serve().await;
    let at = Attempt { run: RunId(1), round: 1, attempt: 1 };
    let digest = Some(Digest::of(&bytes()));
    let kept = Kept {
        model: Digest::of(b"m"),
        digest,
        bytes: bytes().len() as u64,
        examples: 1,
        private: false,
        masked: false,
        stored: Time(0),
    };
    let error = upload(&dialer, &path, at, &kept).await.unwrap_err();
    assert!(error.contains("update: "), "{error}");
}

async fn link(fake: &Fake, scripts: impl IntoIterator<Item = Vec<Step>>) -> Link {
    fake.state().scripts = scripts.into_iter().collect();
    Link::open(fake.serve().await, Greeting::new("clinic".parse().unwrap(), Role::Trainer))
}

async fn next(link: &mut Link) -> LinkEvent {
    tokio::time::timeout(Duration::from_secs(20), link.next()).await.unwrap().unwrap()
}

async fn ends(script: Vec<Step>) -> String {
    let fake = Fake::default();
    let mut link = link(&fake, [script]).await;
    loop {
        match next(&mut link).await {
            LinkEvent::Final { reason } => {
                assert!(link.next().await.is_none());
                return format!("final: {reason}");
            }
            LinkEvent::Down { reason, .. } => return format!("down: {reason}"),
            LinkEvent::Up { .. } | LinkEvent::Ledger(_) => {}
            LinkEvent::Message(input) => panic!("{input:?}"),
            LinkEvent::Masking { at, message } => panic!("{at}: {message:?}"),
        }
    }
}

#[tokio::test]
async fn every_end_of_a_stream_is_told_and_only_a_final_one_is_final() {
    let goodbye =
        |reason: &str, r#final| Step::Say(Message::Goodbye(wire::Goodbye { reason: reason.into(), r#final }));
    let newer = wire::Welcome { protocol: 2, software: "tributary-server 9".into(), heartbeat_seconds: 15 };
    let said = ends(vec![Step::Say(Message::Welcome(newer))]).await;
    assert_eq!(
        said,
        "final: the coordinator (tributary-server 9) speaks protocol 2, this node 1 to 1: bring both to the same release"
    );
    assert_eq!(ends(vec![goodbye("protocol 1 is too old", true)]).await, "final: protocol 1 is too old");
    assert_eq!(ends(vec![welcome(15), goodbye("revoked", true)]).await, "final: revoked");
    assert_eq!(ends(vec![welcome(15), goodbye("restarting\nsoon", false)]).await, "down: restarting soon");
    assert_eq!(
        ends(vec![Step::Fail(Status::permission_denied("node clinic was revoked"))]).await,
        "final: node clinic was revoked"
    );
    assert_eq!(
        ends(vec![welcome(15), Step::Fail(Status::unauthenticated("expired"))]).await,
        "final: expired"
    );
    assert_eq!(ends(vec![Step::Fail(Status::unavailable("busy"))]).await, "down: busy");
    assert_eq!(ends(vec![welcome(15), Step::End]).await, "down: the coordinator ended the stream");
    let heartbeat = Step::Say(Message::Heartbeat(wire::Heartbeat { sequence: 1 }));
    assert!(ends(vec![heartbeat]).await.contains("not a welcome"));
    let garbled = wire::Invite { run: 1, round: 1, attempt: 1, model: vec![1, 2], ..Default::default() };
    assert!(
        ends(vec![welcome(15), Step::Say(Message::Invite(garbled))])
            .await
            .contains("down: the coordinator's message")
    );
}

#[tokio::test]
async fn a_silent_coordinator_is_left() {
    let said = ends(vec![welcome(1), Step::AwaitUpload]).await;
    assert!(said.starts_with("down: no sign of life"), "{said}");
}

#[tokio::test]
async fn a_broken_stream_comes_back_and_messages_go_both_ways() {
    let job = "name = 'j'\nseed = 1\nrounds = 2\n[model]\narchitecture = 'logistic'\ninputs = [2]\nclasses = 2\n\
        [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_epochs = 2\nbatch_size = 10\n[cohort]\nsize = 4\n";
    let model = Digest::of(b"model").0.to_vec();
    let invite = |job_toml: &str| {
        let (job_toml, model) = (job_toml.to_owned(), model.clone());
        let deadline_milliseconds = 5000;
        // As positions of a support: opaque here.
        let support = if job_toml == job { vec![1, 2, 3] } else { Vec::new() };
        Step::Say(Message::Invite(wire::Invite {
            run: 7,
            round: 2,
            attempt: 1,
            job_toml,
            model,
            deadline_milliseconds,
            support,
        }))
    };
    let dismiss =
        wire::Dismiss { run: 7, round: 2, attempt: 1, reason: wire::DismissReason::Published.into() };
    let evaluate = wire::Evaluate { run: 7, round: 2, job_toml: job.into(), model: model.clone() };
    let masking = wire::Masking { run: 7, round: 2, attempt: 1, message: vec![7, 14] };
    let fake = Fake::default();
    let first = vec![welcome(15), Step::Hear, Step::End];
    let second = vec![
        welcome(15),
        Step::Hear,
        invite(job),
        invite("rounds = 1"),
        Step::Say(Message::Dismiss(dismiss)),
        Step::Say(Message::Evaluate(evaluate)),
        Step::Say(Message::Masking(masking.clone())),
        Step::Hear,
        Step::Hear,
    ];
    let mut link = link(&fake, [first, second]).await;
    assert!(matches!(next(&mut link).await, LinkEvent::Up { protocol: 1, .. }));
    assert!(matches!(next(&mut link).await, LinkEvent::Down { .. }));
    assert!(matches!(next(&mut link).await, LinkEvent::Up { protocol: 1, .. }));
    let mut inputs = Vec::new();
    for _ in 0..4 {
        match next(&mut link).await {
            LinkEvent::Message(input) => inputs.push(*input),
            other => panic!("{other:?}"),
        }
    }
    let at = Attempt { run: RunId(7), round: 2, attempt: 1 };
    assert!(matches!(&inputs[0], Input::Invited { at: a, job: Ok(job), support: Some(support), .. }
        if *a == at && job.name == "j" && **support == [1, 2, 3]));
    assert!(
        matches!(&inputs[1], Input::Invited { job: Err(line), support: None, .. } if line.contains("missing field"))
    );
    assert!(matches!(&inputs[2], Input::Dismissed { at: a, .. } if *a == at));
    let key = RoundKey { run: RunId(7), round: 2 };
    assert!(matches!(&inputs[3], Input::EvaluationAsked { key: k, job: Ok(_), .. } if *k == key));
    let LinkEvent::Masking { at: of, message } = next(&mut link).await else {
        panic!("no session's message")
    };
    assert_eq!((of, message), (at, vec![7, 14]));
    let decline = wire::Decline { run: 7, round: 2, attempt: 1, reason: wire::Reason::Busy.into() };
    link.send(FromNode::Decline(decline));
    link.send(FromNode::Masking(masking.clone()));
    link.close().await;
    let heard = fake.state().heard.clone();
    let hello = FromNode::Hello(wire::Hello {
        protocol_minimum: 1,
        protocol_maximum: 1,
        software: concat!("tributary-client ", env!("CARGO_PKG_VERSION")).into(),
        node: "clinic".into(),
        role: wire::Role::Trainer.into(),
    });
    assert_eq!(heard, [hello.clone(), hello, FromNode::Decline(decline), FromNode::Masking(masking)]);
}

use tonic::Status;

#[tokio::test]
async fn a_broken_transfer_waits_for_the_control_stream() {
    let test = Fetching::new(|state| state.fetch_breaks = [1].into()).await;
    test.dialer.set_up(false);
    let (model, length) = (Digest::of(&bytes()), bytes().len() as u64);
    let again = async {
        tokio::time::sleep(Duration::from_secs(2)).await; // longer than the first wait can be
        assert_eq!(test.fake.state().fetch_offsets, [0]);
        test.dialer.set_up(true);
    };
    let (fetched, ()) = tokio::join!(test.fetch(model, length), again);
    assert_eq!(fetched.unwrap(), values());
    assert_eq!(test.fake.state().fetch_offsets, [0, MIB]);
}
