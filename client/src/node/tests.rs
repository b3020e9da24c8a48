//! A whole node against a coordinator on loopback.

use super::*;
use crate::masking::journal::MaskJournal;
use crate::store::Facts;
use crate::transport::fake::{Fake, Step, welcome};
use tributary_common::ids::RunId;
use tributary_common::model::to_bytes;
use tributary_proto::coordinator as wire;
use tributary_proto::coordinator::coordinator_message::Message;
use tributary_proto::coordinator::node_message::Message as FromNode;

const JOB: &str = "name = 'j'\nseed = 1\nrounds = 2\n[model]\narchitecture = 'logistic'\ninputs = [784]\nclasses = 10\n\
    [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_steps = 2\nbatch_size = 10\n[cohort]\nsize = 1\n\
    [evaluation]\nfederated = true\n";

struct Test {
    dir: tempfile::TempDir,
    fake: Fake,
    model: Digest,
    job: String,
}

impl Test {
    fn new() -> Self {
        let fake = Fake::default();
        let bytes = to_bytes(&vec![0.0; 7850]);
        let model = Digest::of(&bytes);
        fake.state().model = bytes;
        Self { dir: tempfile::tempdir().unwrap(), fake, model, job: JOB.to_owned() }
    }

    fn invite(&self, round: u32) -> Step {
        let (job_toml, model) = (self.job.clone(), self.model.0.to_vec());
        let deadline_milliseconds = 60_000;
        Step::Say(Message::Invite(wire::Invite {
            run: 7,
            round,
            attempt: 1,
            job_toml,
            model,
            deadline_milliseconds,
            support: Vec::new(),
        }))
    }

    /// Runs a node until the coordinator ends it or `stop` does.
    async fn run(&self, script: Vec<Step>, stop: impl Future<Output = ()>) -> Result<(), NodeError> {
        self.fake.state().scripts.push_back(script);
        let path = self.dir.path().join("node.toml");
        let text =
            "server = 'https://h:1'\n[data]\nsource = 'synthetic'\nexamples = 40\ntest_examples = 20\n";
        std::fs::write(&path, text).unwrap();
        let config = NodeConfig::load(&path).unwrap();
        let data = config.load_data(&path).unwrap();
        let folder = Arc::new(Folder::open(&config.dir).unwrap());
        let key_path = self.dir.path().join("key.pem");
        let key = match std::fs::read_to_string(&key_path) {
            Ok(pem) => rcgen::KeyPair::from_pem(&pem).unwrap(),
            Err(_) => rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap(),
        };
        std::fs::write(&key_path, key.serialize_pem()).unwrap();
        let authority = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap();
        let credentials = Credentials {
            node: "clinic".parse().unwrap(),
            authority_pem: authority.pem(),
            certificate_pem: String::new(),
            key_pem: key.serialize_pem(),
            issued: Time(0),
            expires: Time(u64::MAX),
        };
        let options = Options { trainer: TrainerKind::Arithmetic, ..Default::default() };
        let (sender, stopped) = mpsc::channel(2);
        let dialer = self.fake.serve().await;
        let node = serve(&config, data, &options, folder, credentials, dialer, stopped);
        let stopping = async {
            stop.await;
            let _ = sender.send(()).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            outcome = tokio::time::timeout(Duration::from_secs(30), node) => outcome.unwrap(),
            () = stopping => unreachable!(),
        }
    }

    fn outbox(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("outbox")).unwrap().count()
    }
}

fn dismiss(round: u32) -> Step {
    let reason = wire::DismissReason::Published.into();
    Step::Say(Message::Dismiss(wire::Dismiss { run: 7, round, attempt: 1, reason }))
}

fn goodbye() -> Step {
    Step::Say(Message::Goodbye(wire::Goodbye { reason: "done".into(), r#final: true }))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_trains_uploads_evaluates_and_forgets() {
    let test = Test::new();
    let evaluate = wire::Evaluate { run: 7, round: 1, job_toml: JOB.into(), model: test.model.0.to_vec() };
    let script = vec![
        welcome(15),
        Step::Hear,
        test.invite(1),
        Step::AwaitUpload,
        dismiss(1),
        Step::Say(Message::Evaluate(evaluate)),
        Step::Hear,
        goodbye(),
    ];
    let outcome = test.run(script, std::future::pending()).await;
    assert!(matches!(outcome, Err(NodeError::Refused(reason)) if reason == "done"));
    let state = test.fake.state();
    assert_eq!(state.staged.len(), 7850 * 4);
    assert_eq!(state.header.as_ref().unwrap().examples, 40);
    assert_eq!(state.fetch_offsets, [0], "the evaluated model was here already");
    assert!(
        matches!(&state.heard[1], FromNode::Evaluation(report) if report.metrics.as_ref().unwrap().examples == 20)
    );
    assert_eq!(test.outbox(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_node_sends_the_bytes_that_it_kept() {
    let test = Test::new();
    // Killed after storing, before the round was over.
    let key = RoundKey { run: RunId(7), round: 1 };
    let delta = vec![0.25; 7850];
    let folder = Folder::open(test.dir.path()).unwrap();
    let facts = Facts { model: test.model, examples: 39, private: false, masked: false };
    folder.keep_values(key, facts, &delta, Time(1)).unwrap();
    drop(folder);
    let script = vec![welcome(15), Step::Hear, test.invite(1), Step::AwaitUpload, goodbye()];
    assert!(test.run(script, std::future::pending()).await.is_err());
    let state = test.fake.state();
    assert_eq!(state.staged, to_bytes(&delta));
    assert!(state.fetch_offsets.is_empty(), "nothing was trained");
    assert_eq!(test.outbox(), 2, "kept until the round is over");
}

/// Attack 27: keys go with the process, so bytes that they masked are of no use, and the round is not masked again.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_node_neither_sends_masked_bytes_nor_masks_the_round_again() {
    let masked_job = format!(
        "{}[secure_aggregation]\nenabled = true\n",
        JOB.replace("[cohort]\nsize = 1", "[cohort]\nsize = 4\nminimum = 3")
    );
    let mut test = Test::new();
    test.job = masked_job.clone();
    let invite = test.invite(1);
    // What a first process says, and what a second one does with the same invitation.
    let script = vec![welcome(15), Step::Hear, invite.clone(), Step::Hear, goodbye()];
    assert!(test.run(script, std::future::pending()).await.is_err());
    let FromNode::Masking(first) = test.fake.state().heard[1].clone() else { panic!("no keys were sent") };
    assert_eq!((first.run, first.round, first.attempt), (7, 1, 1));
    // Killed after masking.
    let key = RoundKey { run: RunId(7), round: 1 };
    let folder = Folder::open(test.dir.path()).unwrap();
    let facts = Facts { model: test.model, examples: 1, private: false, masked: true };
    folder.keep_bytes(key, facts, &[1, 2, 3], Time(1)).unwrap();
    drop(folder);
    let (task, hex) = (RunId(7).to_string(), tributary_common::ledger::hex::Hex([1; 32]));
    let session = tributary_common::secagg::context::SessionId::new(&[1; 32], &[2; 32]);
    let upload =
        tributary_common::secagg::journal::Upload { task, round: 1, model: hex, cohort: hex, session };
    MaskJournal::open(test.dir.path()).unwrap().record(upload).unwrap();
    assert!(test.run(vec![welcome(15), Step::Hear, goodbye()], std::future::pending()).await.is_err());
    assert_eq!(test.outbox(), 0, "they are of no use to anybody");
    test.fake.state().heard.clear();
    let script = vec![welcome(15), Step::Hear, invite, Step::Hear, goodbye()];
    assert!(test.run(script, std::future::pending()).await.is_err());
    let decline = wire::Decline { run: 7, round: 1, attempt: 1, reason: wire::Reason::Policy.into() };
    assert_eq!(test.fake.state().heard[1..], [FromNode::Decline(decline)]);
    assert!(test.fake.state().upload_offsets.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_node_declines_what_it_has_not_trained() {
    let test = Test::new();
    test.fake.state().fetch_breaks = vec![0; 1000].into(); // the model never comes
    let script = vec![welcome(15), Step::Hear, test.invite(1), Step::Hear];
    let fake = test.fake.clone();
    let fetching = async move {
        while fake.state().fetch_offsets.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    test.run(script, fetching).await.unwrap();
    let decline = wire::Decline { run: 7, round: 1, attempt: 1, reason: wire::Reason::ShuttingDown.into() };
    assert_eq!(test.fake.state().heard[1..], [FromNode::Decline(decline)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_node_finishes_its_upload() {
    let test = Test::new();
    test.fake.state().upload_breaks = [0].into();
    let script = vec![welcome(15), Step::Hear, test.invite(1)];
    let fake = test.fake.clone();
    let uploading = async move {
        while fake.state().upload_offsets.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    test.run(script, uploading).await.unwrap();
    assert!(test.fake.state().complete);
    assert_eq!(test.outbox(), 2, "received is not committed");
}

#[test]
fn lines_are_for_people_and_json_for_machines() {
    let event = NodeEvent::Training { run: RunId(7), round: 3, examples: 303, steps: 100 };
    assert_eq!(line(&event), "round 3: training (303 examples, 100 steps)");
    let json = serde_json::to_value(&event).unwrap();
    assert_eq!(json["event"], "training");
    assert_eq!(json["run"], "0000000000000007");
}
