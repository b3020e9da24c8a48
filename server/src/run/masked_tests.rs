//! Masked runs with real sessions on both sides: whoever drops out when, the model is that of the survivors' integers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use ed25519_dalek::SigningKey;
use tributary_common::exchange::{ClientValues, Coins, SessionOf};
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::Job;
use tributary_common::privacy::noise::SecretRng;
use tributary_common::record::{Abandonment, Role, RoundOutcome, RunState};
use tributary_common::secagg::client::{Action, Session, SessionConfig};
use tributary_common::secagg::context::ClientId;
use tributary_common::secagg::journal::UploadJournal;
use tributary_common::secagg::messages::ToClient;
use tributary_common::secagg::peers::{ClientPolicy, Peers};
use tributary_common::time::Time;

use super::*;
use crate::store::MemoryStore;

const JOB: &str = r#"
    name = "masked"
    seed = 7
    rounds = 2
    [model]
    architecture = "logistic"
    inputs = [6]
    classes = 2
    [train]
    algorithm = "fedavg"
    learning_rate = 0.1
    local_steps = 1
    batch_size = 1
    [cohort]
    size = 4
    minimum = 3
    reconnect_seconds = 5
    deadline_seconds = 100
    settle_seconds = 1
    [secure_aggregation]
    enabled = true
    step_seconds = 20
"#;
const ID: RunId = RunId(5);
const SERVER: [u8; 32] = [9; 32];

/// When a node falls silent for good, its connection with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Dies {
    BeforeKeys,
    BeforeShares,
    BeforeUpload,
    BeforeConfirmation,
    BeforeUnmasking,
    Never,
}

struct Node {
    session: Option<Session>,
    at: (u32, u32),
    model: Digest,
    support: Option<RoundSupport>,
    journal: UploadJournal,
    kept: Option<Vec<u8>>,
    dies: Dies,
    /// Kinds of messages that it heard.
    heard: BTreeSet<&'static str>,
}

/// A coordinator's run and its nodes, over memory.
struct World {
    store: Arc<dyn Store>,
    run: Run,
    job: Job,
    masks: bool,
    now: Time,
    nodes: BTreeMap<NodeName, Node>,
    queue: VecDeque<Outgoing>,
    /// Updates are held back until this is cleared.
    held: bool,
    uploads: Vec<(NodeName, u32)>,
}

fn name(index: usize) -> NodeName {
    format!("node-{index}").parse().unwrap()
}

fn values(node: &NodeName, round: u32, parameters: usize) -> Vec<f32> {
    let index = f32::from(*node.as_str().as_bytes().last().unwrap() - b'0');
    (0..parameters).map(|at| (at as f32 * 0.03 - 0.1) * (index - 1.3) / (round as f32 + 1.0)).collect()
}

impl World {
    fn new(job: &str, dies: &[Dies], masks: bool) -> Self {
        let parsed = Job::parse(job).unwrap();
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let initial = store.put_model(&parsed.layout().unwrap().initial(7)).unwrap();
        store.create_run(ID, &parsed.to_toml().unwrap(), initial, Time(0)).unwrap();
        store.set_state(ID, &RunState::Running).unwrap();
        let now = Time(1000);
        let (run, outgoing) = Run::open(store.clone(), ID, now, Self::opening(masks)).unwrap();
        let node = |dies: &Dies| Node {
            session: None,
            at: (0, 0),
            model: initial,
            support: None,
            journal: UploadJournal::default(),
            kept: None,
            dies: *dies,
            heard: BTreeSet::new(),
        };
        let nodes = dies.iter().enumerate().map(|(index, dies)| (name(index), node(dies))).collect();
        let (queue, uploads) = (outgoing.into(), Vec::new());
        let mut world = Self { store, run, job: parsed, masks, now, nodes, queue, held: false, uploads };
        world.connect_all();
        world
    }

    fn opening(masks: bool) -> Opening {
        Opening {
            coordinator: masks.then_some(SERVER),
            ..Opening::new(Rule::OfTheJob(Box::new(|_, _| Ok(()))))
        }
    }

    fn connect_all(&mut self) {
        let names: Vec<NodeName> = self.nodes.keys().cloned().collect();
        for node in names {
            if self.nodes[&node].dies != Dies::BeforeKeys || self.run.head().published == 0 {
                self.input(Input::Connected { node, role: Role::Trainer });
            }
        }
    }

    /// The coordinator's process ends and another begins.
    fn restart(&mut self) {
        let (run, outgoing) = Run::open(self.store.clone(), ID, self.now, Self::opening(self.masks)).unwrap();
        self.run = run;
        self.queue = outgoing.into();
        self.connect_all();
    }

    fn input(&mut self, input: Input) {
        let outgoing = self.run.handle(self.now, input).unwrap();
        self.queue.extend(outgoing);
    }

    fn die(&mut self, node: &NodeName) {
        self.nodes.get_mut(node).unwrap().session = None;
        self.input(Input::Disconnected { node: node.clone() });
    }

    /// Delivers and answers until nothing happens but by time, then lets time pass; until `done`.
    fn go(&mut self, done: impl Fn(&Self) -> bool) {
        for _ in 0..10_000 {
            if done(self) || self.run.is_over() {
                return;
            }
            match self.queue.pop_front() {
                Some(outgoing) => self.deliver(outgoing),
                None => {
                    let Some(tick) = self.run.next_tick() else { return };
                    self.now = self.now.max(tick);
                    self.input(Input::Tick);
                }
            }
        }
        panic!("the run does not end");
    }

    fn deliver(&mut self, outgoing: Outgoing) {
        match outgoing {
            Outgoing::Invite { node, round, attempt, model, support, .. } => {
                self.invited(&node, (round, attempt), model, support.as_deref());
            }
            Outgoing::Masking { node, round, attempt, message }
                if self.nodes[&node].at == (round, attempt) =>
            {
                self.told(&node, &message);
            }
            Outgoing::Dismiss { node, .. } => {
                let node = self.nodes.get_mut(&node).unwrap();
                (node.session, node.kept) = (None, None);
            }
            _ => {}
        }
    }

    fn invited(&mut self, name: &NodeName, at: (u32, u32), model: Digest, support: Option<&[u8]>) {
        let terms = Terms::of(&self.job, ID).unwrap();
        let node = self.nodes.get_mut(name).unwrap();
        if node.at == at {
            if node.kept.is_some() {
                self.upload(name);
            }
            return;
        }
        (node.at, node.model, node.kept) = (at, model, None);
        node.support = support.map(|bytes| RoundSupport::received(&self.job, bytes).unwrap());
        if !self.masks {
            if node.dies > Dies::BeforeUpload {
                self.upload(name);
            } else {
                self.die(name);
            }
            return;
        }
        if node.dies == Dies::BeforeKeys {
            return self.die(name);
        }
        let of = SessionOf {
            round: at.0,
            attempt: at.1,
            model,
            support: node.support.as_ref().map(RoundSupport::digest),
            server: SERVER,
        };
        let config = SessionConfig {
            agreement: terms.agreement(&of),
            id: ClientId::of(name),
            identity: SigningKey::from_bytes(&Digest::of(name.as_str().as_bytes()).0),
            policy: ClientPolicy {
                minimum_pinned_survivors: 0,
                maximum_dropout_per_million: 500_000,
                ..ClientPolicy::default()
            },
            peers: Peers::default(),
        };
        match Session::start(config, &node.journal, &mut SecretRng::new().unwrap()) {
            Ok((session, advertise)) => {
                node.session = Some(session);
                self.say(name, advertise.encode());
            }
            Err(_) => {
                let (round, attempt) = at;
                let reason = tributary_common::record::Reason::Policy;
                self.input(Input::Declined { node: name.clone(), round, attempt, reason });
            }
        }
    }

    fn say(&mut self, node: &NodeName, message: Vec<u8>) {
        let (round, attempt) = self.nodes[node].at;
        self.input(Input::Masking { node: node.clone(), round, attempt, message });
    }

    fn told(&mut self, name: &NodeName, message: &[u8]) {
        let message = ToClient::decode(message).unwrap();
        let node = self.nodes.get_mut(name).unwrap();
        let dies = match &message {
            ToClient::Roster { .. } => Dies::BeforeShares,
            ToClient::RoutedShares { .. } => Dies::BeforeUpload,
            ToClient::Alive { .. } => Dies::BeforeConfirmation,
            ToClient::AliveSigs { .. } => Dies::BeforeUnmasking,
            _ => Dies::BeforeKeys,
        };
        node.heard.insert(message.name());
        if node.dies == dies {
            return self.die(name);
        }
        let Some(session) = &mut node.session else { return };
        let Ok(actions) = session.receive(message, &mut SecretRng::new().unwrap()) else { return };
        for action in actions {
            match action {
                Action::Send(answer) => self.say(name, answer.encode()),
                Action::Ready => self.upload(name),
                Action::Remember(_) | Action::Committed { .. } => {}
            }
        }
    }

    fn upload(&mut self, name: &NodeName) {
        let Exchange::Masked(masked) = Exchange::of(&self.job).unwrap() else { panic!() };
        let parameters = self.job.layout().unwrap().parameters();
        let node = self.nodes.get_mut(name).unwrap();
        let round = node.at.0;
        if node.kept.is_none() {
            let update = ClientValues {
                values: &values(name, round, parameters),
                examples: 3 + u64::from(round),
                loss: Some(0.5),
            };
            let mut coins = Coins::of(&self.job, round, name).unwrap();
            let encoded = masked.encode(&update, round, node.support.as_ref(), &mut coins).unwrap();
            let mut integers = encoded.integers;
            if let Some(session) = node.session.as_mut().filter(|_| self.masks) {
                node.journal.record(session.upload().unwrap()).unwrap();
                let terms = session.mask_keys(&node.journal, masked.segment_count()).unwrap();
                integers.mask(&terms).unwrap();
            }
            node.kept = Some(integers.to_bytes().unwrap());
        }
        if self.held {
            return;
        }
        let bytes = node.kept.clone().unwrap();
        self.uploads.push((name.clone(), round));
        let update = Update {
            node: name.clone(),
            round,
            examples: 1,
            bytes: bytes.len() as u64,
            digest: Some(Digest::of(&bytes)),
            payload: Payload::Bytes(bytes),
        };
        let outgoing = self.run.update(self.now, update).unwrap();
        self.queue.extend(outgoing);
    }

    fn finish(mut self) -> (RunState, Vec<f32>, Vec<RoundRecord>) {
        self.go(|_| false);
        let records = self.store.rounds(ID).unwrap();
        (self.run.head().state.clone(), self.run.model().to_vec(), records)
    }
}

/// The same run with the integers unmasked, and the same members.
fn unmasked(job: &str, dies: &[Dies]) -> Vec<f32> {
    let (state, model, _) = World::new(job, dies, false).finish();
    assert_eq!(state, RunState::Finished);
    model
}

#[test]
fn a_masked_run_ends_in_the_model_of_the_same_integers_unmasked() {
    let dies = [Dies::Never; 4];
    let (state, model, records) = World::new(JOB, &dies, true).finish();
    assert_eq!(state, RunState::Finished);
    assert_eq!(model, unmasked(JOB, &dies));
    let summed = records[1].summed.unwrap();
    assert_eq!((summed.weight, summed.examples, summed.loss()), (20, 20, Some(0.5)));
    assert!(records.iter().all(|record| record.accepted().count() == 4));
}

/// A hospital killed after its shares, and at every other step: the round completes with the three others, whose sum, and
/// with it the model, is exact.
#[test]
fn one_of_four_may_fall_silent_at_any_step() {
    for at in [
        Dies::BeforeKeys,
        Dies::BeforeShares,
        Dies::BeforeUpload,
        Dies::BeforeConfirmation,
        Dies::BeforeUnmasking,
    ] {
        let dies = [Dies::Never, at, Dies::Never, Dies::Never];
        let job = &JOB.replace("rounds = 2", "rounds = 1");
        let (state, model, records) = World::new(job, &dies, true).finish();
        assert_eq!(state, RunState::Finished, "{at:?}");
        let first = records.first().unwrap();
        // Whoever uploaded is in the sum, whatever becomes of it.
        let expected = if at > Dies::BeforeUpload { 4 } else { 3 };
        assert_eq!(first.accepted().count(), expected, "{at:?}");
        assert_eq!(model, unmasked(job, &dies), "{at:?}");
    }
}

#[test]
fn a_coordinator_killed_at_any_moment_loses_no_masked_round() {
    let dies = [Dies::Never; 4];
    let expected = unmasked(JOB, &dies);
    for moment in ["roster", "set of routed shares", "list of survivors", "list of confirmations"] {
        let mut world = World::new(JOB, &dies, true);
        world.go(|world| world.nodes.values().any(|node| node.heard.contains(moment)));
        world.restart();
        let (state, model, records) = world.finish();
        assert_eq!(state, RunState::Finished, "{moment}");
        assert_eq!(model, expected, "{moment}");
        assert_eq!(records.len(), 2, "{moment}: no attempt is lost");
    }
}

#[test]
fn killed_between_uploads_and_unmasking_the_same_bytes_are_sent_again() {
    let dies = [Dies::Never, Dies::BeforeUpload, Dies::Never, Dies::Never];
    let mut world = World::new(JOB, &dies, true);
    world.go(|world| world.nodes.values().any(|node| node.heard.contains("list of survivors")));
    let sent = world.uploads.len();
    world.restart();
    world.go(|world| world.run.head().published == 1);
    let again: Vec<_> = world.uploads[sent..].iter().filter(|(_, round)| *round == 1).collect();
    assert_eq!(again.len(), 3, "each survivor's bytes come once more");
    let (state, model, _) = world.finish();
    assert_eq!((state, model), (RunState::Finished, unmasked(JOB, &dies)));
}

/// A masked update is sent once for a round: one that cannot be opened is lost, and its number is not used again. The same
/// clients may then go on from the same model.
#[test]
fn a_round_that_cannot_be_opened_is_not_tried_again_under_its_number() {
    let dies = [Dies::Never, Dies::BeforeUpload, Dies::BeforeUpload, Dies::Never];
    let mut world = World::new(JOB, &dies, true);
    world.go(|_| false);
    let initial = Job::parse(JOB).unwrap().layout().unwrap().initial(7);
    assert_eq!(*world.run.model().as_slice(), initial[..]);
    let records = world.store.rounds(ID).unwrap();
    let [lost] = &records[..] else { panic!("{records:?}") };
    assert!(lost.spent && lost.round == 1, "{lost:?}");
    let reason = Abandonment::BelowMinimum { accepted: 2, minimum: 3 };
    assert_eq!(lost.outcome, RoundOutcome::Abandoned { reason });

    world.nodes.values_mut().for_each(|node| node.dies = Dies::Never);
    world.connect_all();
    let (state, _, records) = world.finish();
    assert_eq!(state, RunState::Finished);
    assert_eq!(records.iter().map(|record| record.round).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(records[1].accepted().count(), 4);
}

#[test]
fn top_k_under_masks_is_the_same_with_and_without_them() {
    for support in ["delayed-vote", "track", "random"] {
        let compression = format!("[compression]\nscheme = 'top-k'\ndensity = 0.5\nsupport = '{support}'\n");
        let job = JOB.replace("rounds = 2", "rounds = 4") + &compression;
        let dies = [Dies::Never; 4];
        let (state, model, records) = World::new(&job, &dies, true).finish();
        assert_eq!((state, records.len()), (RunState::Finished, 4));
        assert_eq!(model, unmasked(&job, &dies), "{support}");
        let initial = Job::parse(&job).unwrap().layout().unwrap().initial(7);
        assert_ne!(model, initial);
    }
}

#[test]
fn noise_in_shares_is_summed_and_the_model_stays_near_the_mean() {
    let private = "[privacy]\nunit = 'client'\nmechanism = 'distributed'\nnoise_multiplier = 0.01\nclip_norm = 1.0\n\
                   delta = 1e-5\nmax_epsilon = 1e9\n";
    let job = JOB.to_owned() + private;
    let dies = [Dies::Never; 4];
    let (state, model, records) = World::new(&job, &dies, true).finish();
    assert_eq!(state, RunState::Finished);
    assert!(records.iter().all(|record| record.summed.is_none()), "no counts with noise");
    let plain = unmasked(JOB, &dies);
    let initial = Job::parse(JOB).unwrap().layout().unwrap().initial(7);
    let far = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
    assert!(far(&model, &plain) < 0.05, "{} of {}", far(&model, &plain), far(&plain, &initial));
    assert_ne!(model, plain);
}
