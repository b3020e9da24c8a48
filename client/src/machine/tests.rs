//! The rules one by one, then all of them under random interleavings.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use tributary_common::model::Architecture;

const JOB: &str = "name = 'j'\nseed = 1\nrounds = 9\n\
    [model]\narchitecture = 'logistic'\ninputs = [2]\nclasses = 2\n\
    [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_steps = 3\nbatch_size = 10\n\
    [cohort]\nsize = 4\nminimum = 3\n[evaluation]\nfederated = true\n";

fn job(changes: &str) -> Result<Arc<Job>, String> {
    let mut table = tributary_common::document::parse(JOB).unwrap();
    for change in changes.split_whitespace() {
        tributary_common::document::set(&mut table, change).unwrap();
    }
    Ok(Arc::new(Job::from_table(table).unwrap()))
}

fn profile() -> Profile {
    Profile {
        role: Role::Trainer,
        policy: Policy::default(),
        example_shape: vec![2],
        classes: 2,
        public_test: false,
        declared_examples: None,
        fitted: Vec::new(),
        grouped: false,
        drain_seconds: 30,
    }
}

fn counts() -> ExampleCounts {
    ExampleCounts { train: 20, test: 20 }
}

fn key(run: u64, round: u32) -> RoundKey {
    RoundKey { run: RunId(run), round }
}

fn at(run: u64, round: u32, attempt: u32) -> Attempt {
    Attempt { run: RunId(run), round, attempt }
}

/// The model that `round` of `run` starts from: the one that the round before published.
fn model_of(run: u64, round: u32) -> Digest {
    Digest::of(format!("{run} {round}").as_bytes())
}

fn invite(at: Attempt) -> Input {
    invite_with(at, "", model_of(at.run.0, at.round))
}

fn invite_with(at: Attempt, changes: &str, model: Digest) -> Input {
    Input::Invited { at, job: job(changes), model, deadline: Time(1_000_000), support: None }
}

fn ask(key: RoundKey) -> Input {
    Input::EvaluationAsked { key, job: job(""), model: model_of(key.run.0, key.round + 1) }
}

fn ready(model: Digest) -> Input {
    Input::ModelReady { model, parameters: Arc::new(vec![0.0; 6]) }
}

fn charged(key: RoundKey) -> Input {
    Input::Charged { key, result: Ok(()) }
}

fn trained(key: RoundKey) -> Input {
    Input::Trained { key, result: Ok(Trained { examples: 20, loss: Some(0.5) }) }
}

fn kept(key: RoundKey) -> Kept {
    let digest = Some(Digest::of(b"update"));
    Kept {
        model: model_of(key.run.0, key.round),
        digest,
        bytes: 24,
        examples: 20,
        private: false,
        masked: false,
        stored: Time(u64::from(key.round)),
    }
}

fn settle(round: u32, outcome: Outcome) -> Effect {
    Effect::Settle { key: key(1, round), outcome }
}

fn stored(key: RoundKey) -> Input {
    Input::Stored { key, result: Ok(kept(key)) }
}

fn metrics() -> Metrics {
    Metrics { examples: 20, loss_sum: 2.0, correct: 16, confusion: vec![Some(12), Some(0), Some(4), Some(4)] }
}

/// A machine and what it said, events left out.
struct Node(NodeMachine);

impl Node {
    fn new(profile: Profile) -> Self {
        let mut node = Self(NodeMachine::new(Arc::new(profile), counts(), []));
        assert_eq!(node.does(Input::Connected), []);
        node
    }

    fn does_at(&mut self, now: u64, input: Input) -> Vec<Effect> {
        let mut effects = self.0.step(Time(now), input);
        effects.retain(|effect| !matches!(effect, Effect::Event(_)));
        effects
    }

    fn does(&mut self, input: Input) -> Vec<Effect> {
        self.does_at(1000, input)
    }

    fn declines(&mut self, input: Input) -> Reason {
        match &self.does(input)[..] {
            [Effect::Decline { reason, .. }] => *reason,
            other => panic!("{other:?}"),
        }
    }

    /// Goes through a round up to the upload.
    fn uploads(&mut self, at: Attempt) {
        let fetch = Effect::Fetch { model: model_of(at.run.0, at.round), bytes: 24 };
        assert!(self.does(invite(at)).contains(&fetch));
        assert!(matches!(self.does(ready(model_of(at.run.0, at.round)))[..], [Effect::Charge { .. }]));
        assert!(matches!(self.does(charged(at.key()))[..], [Effect::Train { .. }]));
        assert!(matches!(self.does(trained(at.key()))[..], [Effect::Store { .. }]));
        assert_eq!(self.does(stored(at.key())), [Effect::Upload { at, update: kept(at.key()) }]);
    }
}

#[test]
fn a_round_goes_its_way_and_is_forgotten_only_when_dismissed() {
    let mut node = Node::new(profile());
    node.uploads(at(1, 1, 1));
    assert_eq!(node.does(Input::UploadDone { at: at(1, 1, 1) }), []);
    let effects = node.0.step(Time(0), Input::Dismissed { at: at(1, 1, 1), reason: Dismissal::Published });
    let accepted = Effect::Event(NodeEvent::Accepted { run: RunId(1), round: 1 });
    assert_eq!(effects, [settle(1, Outcome::Accepted), Effect::Forget { key: key(1, 1) }, accepted]);
    assert!(node.0.is_idle());
}

#[test]
fn a_repeated_invitation_goes_on_where_the_work_stands() {
    let mut node = Node::new(profile());
    let again = invite(at(1, 1, 1));
    assert_eq!(node.does(again.clone()).len(), 1);
    assert_eq!(node.does(again.clone()), []);
    node.does(ready(model_of(1, 1)));
    node.does(charged(key(1, 1)));
    assert_eq!(node.does(Input::Disconnected), []);
    assert_eq!(node.does(Input::Connected), []);
    assert_eq!(node.does(again.clone()), []);
    node.does(trained(key(1, 1)));
    assert_eq!(node.does(again.clone()), []);
    node.does(stored(key(1, 1)));
    assert_eq!(node.does(again.clone()), [], "the upload is under way");
    node.does(Input::UploadDone { at: at(1, 1, 1) });
    let resent = [Effect::Upload { at: at(1, 1, 1), update: kept(key(1, 1)) }];
    assert_eq!(node.does(again), resent, "delivered, but the coordinator lost it");
    let next = [Effect::Upload { at: at(1, 1, 2), update: kept(key(1, 1)) }];
    assert_eq!(node.does(invite(at(1, 1, 2))), next, "the same bytes under the new attempt");
    assert_eq!(node.does(Input::UploadDone { at: at(1, 1, 1) }), [], "an answer to the old attempt");
    assert!(!node.0.is_idle());
}

#[test]
fn a_new_attempt_does_not_train_anew() {
    let mut node = Node::new(profile());
    node.does(invite(at(1, 1, 1)));
    node.does(ready(model_of(1, 1)));
    node.does(charged(key(1, 1)));
    assert_eq!(node.does(invite(at(1, 1, 2))), []);
    node.does(trained(key(1, 1)));
    assert_eq!(node.does(stored(key(1, 1))), [Effect::Upload { at: at(1, 1, 2), update: kept(key(1, 1)) }]);
    assert_eq!(
        node.does(Input::Dismissed { at: at(1, 1, 1), reason: Dismissal::Abandoned }),
        [],
        "of the old attempt"
    );
}

#[test]
fn bytes_from_before_a_restart_are_sent_as_they_are() {
    let stored = [(key(1, 3), kept(key(1, 3))), (key(1, 2), kept(key(1, 2))), (key(2, 1), kept(key(2, 1)))];
    let mut node = Node(NodeMachine::new(Arc::new(profile()), counts(), stored));
    node.does(Input::Connected);
    let upload = Effect::Upload { at: at(1, 3, 2), update: kept(key(1, 3)) };
    assert_eq!(node.does(invite(at(1, 3, 2))), [Effect::Forget { key: key(1, 2) }, upload]);
    // A coordinator that lost a round asks for the same round of another model: other bytes.
    node.does(Input::UploadDone { at: at(1, 3, 2) });
    let model = Digest::of(b"another");
    let other = invite_with(at(1, 3, 3), "", model);
    assert_eq!(node.does(other), [Effect::Forget { key: key(1, 3) }, Effect::Fetch { model, bytes: 24 }]);
}

#[test]
fn a_later_round_replaces_the_earlier_and_waits_for_the_worker() {
    let mut node = Node::new(profile());
    node.does(invite(at(1, 1, 1)));
    node.does(ready(model_of(1, 1)));
    node.does(charged(key(1, 1)));
    let effects = node.does(invite(at(1, 2, 1)));
    assert_eq!(effects, [Effect::CancelTraining, Effect::Fetch { model: model_of(1, 2), bytes: 24 }]);
    assert_eq!(node.does(ready(model_of(1, 2))), [], "the worker is not free yet");
    let freed = node.does(trained(key(1, 1)));
    assert!(
        matches!(freed[..], [Effect::Forget { key: k }, Effect::Charge { .. }] if k == key(1, 1)),
        "{freed:?}"
    );
    assert!(matches!(node.does(charged(key(1, 2)))[..], [Effect::Train { .. }]));
}

#[test]
fn nothing_is_trained_that_the_account_refuses_or_nobody_waits_for() {
    let mut node = Node::new(profile());
    node.does(invite(at(1, 1, 1)));
    node.does(ready(model_of(1, 1)));
    let spent = Failure { reason: Reason::Budget, detail: "the cap is reached".into() };
    assert_eq!(node.declines(Input::Charged { key: key(1, 1), result: Err(spent) }), Reason::Budget);
    assert_eq!(node.declines(invite(at(1, 1, 1))), Reason::Budget, "asked again, without a charge");
    node.does(invite(at(1, 2, 1)));
    node.does(ready(model_of(1, 2)));
    assert_eq!(node.does(Input::Dismissed { at: at(1, 2, 1), reason: Dismissal::NotUsed }), []);
    assert_eq!(node.does(charged(key(1, 2))), [], "the round is over: the charge stays, nothing is trained");
    assert!(node.0.is_idle());
}

/// Correction 11: one charge, one payload.
#[test]
fn a_private_update_outlives_abandoned_attempts_and_full_outboxes() {
    let mut node = Node::new(profile());
    let private = Kept { private: true, ..kept(key(1, 1)) };
    node.does(invite(at(1, 1, 1)));
    node.does(ready(model_of(1, 1)));
    node.does(charged(key(1, 1)));
    node.does(trained(key(1, 1)));
    node.does(Input::Stored { key: key(1, 1), result: Ok(private) });
    node.does(Input::UploadDone { at: at(1, 1, 1) });
    assert_eq!(node.does(Input::Dismissed { at: at(1, 1, 1), reason: Dismissal::Abandoned }), []);
    for run in 2..40 {
        for input in [
            invite(at(run, 1, 1)),
            ready(model_of(run, 1)),
            charged(key(run, 1)),
            trained(key(run, 1)),
            stored(key(run, 1)),
            Input::UploadDone { at: at(run, 1, 1) },
        ] {
            node.does(input);
        }
    }
    let again = Effect::Upload { at: at(1, 1, 2), update: private };
    assert_eq!(node.does(invite(at(1, 1, 2))), [again], "no second training, no second charge");
    node.does(Input::UploadDone { at: at(1, 1, 2) });
    let over = Input::Dismissed { at: at(1, 1, 2), reason: Dismissal::Published };
    assert_eq!(node.does(over), [settle(1, Outcome::Accepted), Effect::Forget { key: key(1, 1) }]);
}

#[test]
fn with_privacy_metrics_over_a_nodes_data_stay_there_unless_noised_or_public() {
    let table = "train.batch_size=0 train.sampling_rate=0.1 privacy.unit=example privacy.mechanism=dp-sgd \
                 privacy.noise_multiplier=1.0 privacy.clip_norm=1.0 privacy.delta=1e-5 privacy.max_epsilon=9.0";
    let asked = |changes: &str, public_test: bool| {
        let mut node = Node::new(Profile { public_test, declared_examples: Some(20), ..profile() });
        let (key, model) = (key(1, 1), model_of(1, 2));
        let job = job(&format!("{table} {changes}"));
        node.does(Input::EvaluationAsked { key, job, model })
    };
    let told_nothing =
        |effects: &[Effect]| matches!(effects, [Effect::Report { metrics, .. }] if metrics.examples == 0);
    assert!(told_nothing(&asked("", false)), "correction 2");
    assert!(matches!(asked("", true)[..], [Effect::Fetch { .. }]));
    let noised = "privacy.metrics=noised privacy.metrics_noise=20.0";
    assert!(matches!(asked(noised, false)[..], [Effect::Fetch { .. }]));
}

#[test]
fn another_run_finds_the_node_busy_until_the_update_is_delivered_or_late() {
    let mut node = Node::new(profile());
    node.does(invite(at(1, 1, 1)));
    assert_eq!(node.declines(invite(at(2, 1, 1))), Reason::Busy);
    assert_eq!(node.declines(invite(at(2, 1, 1))), Reason::Busy, "not remembered");
    let late = node.does_at(1_000_000, invite(at(2, 1, 1)));
    assert_eq!(late, [Effect::Fetch { model: model_of(2, 1), bytes: 24 }]);
    node.does(ready(model_of(2, 1)));
    node.does(charged(key(2, 1)));
    node.does(trained(key(2, 1)));
    node.does(stored(key(2, 1)));
    node.does(Input::UploadDone { at: at(2, 1, 1) });
    assert_eq!(node.does(invite(at(3, 1, 1))), [Effect::Fetch { model: model_of(3, 1), bytes: 24 }]);
}

#[test]
fn unfit_jobs_are_declined_with_the_closed_reason() {
    let strict = |change: fn(&mut Profile)| {
        let mut profile = profile();
        change(&mut profile);
        Node::new(profile)
    };
    assert_eq!(strict(|p| p.policy.minimum_cohort = 4).declines(invite(at(1, 1, 1))), Reason::Policy);
    assert_eq!(
        strict(|p| p.policy.maximum_local_steps = Some(2)).declines(invite(at(1, 1, 1))),
        Reason::Policy
    );
    assert_eq!(strict(|p| p.example_shape = vec![3]).declines(invite(at(1, 1, 1))), Reason::Data);
    assert_eq!(strict(|p| p.classes = 3).declines(invite(at(1, 1, 1))), Reason::Data);
    assert_eq!(strict(|p| p.role = Role::Evaluator).declines(invite(at(1, 1, 1))), Reason::Unsupported);
    let (model, deadline) = (model_of(1, 1), Time(1_000_000));
    let garbled = Input::Invited {
        at: at(1, 1, 1),
        job: Err("unknown key `a`".into()),
        model,
        deadline,
        support: None,
    };
    assert_eq!(Node::new(profile()).declines(garbled), Reason::Unsupported);
    let approved = |p: &mut Profile| p.policy.approved_initial_models = Some(vec![model_of(1, 1)]);
    assert!(matches!(strict(approved).does(invite(at(1, 1, 1)))[..], [Effect::Fetch { .. }]));
    let crafted = invite_with(at(1, 1, 1), "", Digest::of(b"crafted"));
    assert_eq!(strict(approved).declines(crafted), Reason::Policy, "A26");
    let later = strict(approved).does(invite(at(1, 2, 1)));
    assert!(matches!(later[..], [Effect::Fetch { .. }]), "nobody can tell what a later model must be");
}

/// A8, by the operator's policy: a hostile coordinator's model that would print inputs into the update is refused before
/// anything is fetched, as an architecture that is not allowed, as a first model that nobody approved, or for a cohort in
/// which it would find the one it looks for. A model of the right shape that is crafted later is not recognised.
#[test]
fn a08_a_model_that_prints_inputs_is_refused_before_it_is_fetched() {
    let refuses = |change: fn(&mut Policy), invitation: Input| {
        let mut profile = profile();
        change(&mut profile.policy);
        let mut node = Node::new(profile);
        let effects = node.does(invitation);
        assert!(!effects.iter().any(|effect| matches!(effect, Effect::Fetch { .. } | Effect::Train { .. })));
        effects.iter().any(|effect| matches!(effect, Effect::Decline { reason: Reason::Policy, .. }))
    };
    let crafted = || invite_with(at(1, 1, 1), "", Digest::of(b"a layer of thresholds"));
    assert!(refuses(|policy| policy.allowed_architectures = Some(vec![Architecture::SmallCnn]), crafted()));
    assert!(refuses(|policy| policy.approved_initial_models = Some(vec![model_of(1, 1)]), crafted()));
    assert!(refuses(|policy| policy.minimum_cohort = 50, crafted()));
    assert!(refuses(|policy| policy.require_masks = true, crafted()));
}

#[test]
fn failures_are_declined_once_and_not_tried_again() {
    let mut node = Node::new(profile());
    node.does(invite(at(1, 1, 1)));
    let failed = Input::FetchFailed { model: model_of(1, 1), detail: "gone".into() };
    assert_eq!(node.declines(failed), Reason::Training);
    assert_eq!(node.declines(invite(at(1, 1, 1))), Reason::Training);
    node.does(invite(at(1, 1, 2)));
    node.does(ready(model_of(1, 1)));
    node.does(charged(key(1, 1)));
    let diverged = Failure { reason: Reason::Training, detail: "NaN".into() };
    assert_eq!(node.declines(Input::Trained { key: key(1, 1), result: Err(diverged) }), Reason::Training);
    node.does(invite(at(1, 1, 3)));
    node.does(ready(model_of(1, 1)));
    node.does(charged(key(1, 1)));
    node.does(trained(key(1, 1)));
    assert_eq!(
        node.declines(Input::Stored { key: key(1, 1), result: Err("disk full".into()) }),
        Reason::Training
    );
    node.does(invite(at(1, 1, 4)));
    let wrong = Input::ModelReady { model: model_of(1, 1), parameters: Arc::new(vec![0.0; 5]) };
    assert_eq!(node.declines(wrong), Reason::Unsupported);
    assert!(node.0.is_idle());
}

#[test]
fn an_unwanted_update_is_kept_for_the_next_attempt() {
    let mut node = Node::new(profile());
    node.uploads(at(1, 1, 1));
    assert_eq!(node.does(Input::UploadRefused { at: at(1, 1, 1), detail: "over".into() }), []);
    assert!(node.0.is_idle());
    assert_eq!(node.does(invite(at(1, 1, 2))), [Effect::Upload { at: at(1, 1, 2), update: kept(key(1, 1)) }]);
}

#[test]
fn a_model_is_evaluated_once_and_small_cells_stay_at_home() {
    let mut node = Node::new(profile());
    let question = ask(key(1, 1));
    assert!(matches!(node.does(question.clone())[..], [Effect::Fetch { .. }]));
    assert_eq!(node.does(question.clone()), [], "already at it");
    assert!(matches!(node.does(ready(model_of(1, 2)))[..], [Effect::Evaluate { .. }]));
    let mut hidden = metrics();
    hidden.confusion = vec![Some(12), Some(0), None, None];
    let report = [Effect::Report { key: key(1, 1), metrics: hidden }];
    assert_eq!(node.does(Input::Evaluated { key: key(1, 1), result: Ok(metrics()) }), report);
    assert_eq!(node.does(question), report, "the same answer, no new computation");
    let nothing = |round| [Effect::Report { key: key(1, round), metrics: Metrics::default() }];
    let crafted = Input::EvaluationAsked { key: key(1, 1), job: job(""), model: Digest::of(b"crafted") };
    assert_eq!(node.does(crafted), nothing(1), "another model under the same name");
    assert_eq!(node.does(ask(key(1, 10))), nothing(10), "the job has nine rounds");
    let sparse = Input::EvaluationAsked {
        key: key(1, 3),
        job: job("evaluation.every_rounds=2"),
        model: model_of(1, 4),
    };
    assert_eq!(node.does(sparse), nothing(3), "not due");
    let central = Input::EvaluationAsked {
        key: key(1, 3),
        job: job("evaluation.federated=false"),
        model: model_of(1, 4),
    };
    assert_eq!(node.does(central.clone()), nothing(3), "the clients are not asked");
    let mut evaluator = Node::new(Profile { role: Role::Evaluator, ..profile() });
    assert!(matches!(evaluator.does(central)[..], [Effect::Fetch { .. }]));
}

#[test]
fn a_shutdown_finishes_an_upload_and_drops_a_training() {
    let mut node = Node::new(profile());
    assert_eq!(node.does(Input::Shutdown), [Effect::Exit]);
    assert_eq!(node.does(invite(at(1, 1, 1))), [], "nothing follows");

    let mut node = Node::new(profile());
    node.does(invite(at(1, 1, 1)));
    node.does(ready(model_of(1, 1)));
    node.does(charged(key(1, 1)));
    let effects = node.does(Input::Shutdown);
    assert!(
        matches!(effects[..], [Effect::CancelTraining, Effect::Decline { reason: Reason::ShuttingDown, .. }]),
        "{effects:?}"
    );
    assert_eq!(node.declines(invite(at(1, 1, 2))), Reason::ShuttingDown);
    assert_eq!(node.does(trained(key(1, 1))), [Effect::Forget { key: key(1, 1) }, Effect::Exit]);

    let mut node = Node::new(profile());
    node.uploads(at(1, 1, 1));
    assert_eq!(node.does(Input::Shutdown), []);
    assert_eq!(node.0.next_tick(), Some(Time(31_000)));
    assert_eq!(node.does_at(30_999, Input::Tick), []);
    assert_eq!(node.clone().does_at(31_000, Input::Tick), [Effect::Exit], "bounded");
    assert_eq!(node.clone().does(Input::Shutdown), [Effect::Exit], "at once the second time");
    assert_eq!(node.does(Input::UploadDone { at: at(1, 1, 1) }), [Effect::Exit]);
}

const MASKS: &str = "secure_aggregation.enabled=true";

fn masked(at: Attempt) -> Input {
    invite_with(at, MASKS, model_of(at.run.0, at.round))
}

fn join(at: Attempt) -> Effect {
    let model = model_of(at.run.0, at.round);
    Effect::Join { at, job: job(MASKS).unwrap(), model, support: None }
}

fn stored_masked(key: RoundKey) -> (Kept, Input) {
    let kept = Kept { masked: true, examples: 1, ..kept(key) };
    (kept, Input::Stored { key, result: Ok(kept) })
}

impl Node {
    /// Goes through a masked round up to the moment when the update could be masked, but for its keys.
    fn trains_masked(&mut self, at: Attempt) {
        assert!(self.does(masked(at)).contains(&join(at)));
        self.does(ready(model_of(at.run.0, at.round)));
        self.does(charged(at.key()));
        assert_eq!(self.does(trained(at.key())), [], "without keys");
    }
}

#[test]
fn a_masked_update_waits_for_its_keys_and_its_session_lasts_until_the_round_is_over() {
    let mut node = Node::new(profile());
    let first = at(1, 1, 1);
    assert_eq!(
        node.does(masked(first)),
        [join(first), Effect::Fetch { model: model_of(1, 1), bytes: 24 }],
        "keys are made while it trains"
    );
    assert_eq!(node.does(masked(first)), [join(first)], "what was said last is said again");
    node.does(ready(model_of(1, 1)));
    node.does(charged(key(1, 1)));
    assert_eq!(node.does(Input::Keyed { at: at(1, 1, 2) }), [], "of another attempt");
    assert_eq!(node.does(trained(key(1, 1))), []);
    let store = Effect::Store { at: first, job: job(MASKS).unwrap(), model: model_of(1, 1), support: None };
    assert_eq!(node.does(Input::Keyed { at: first }), [store]);
    let (kept, stored) = stored_masked(key(1, 1));
    assert_eq!(node.does(stored), [Effect::Upload { at: first, update: kept }]);
    node.does(Input::UploadDone { at: first });
    assert!(!node.0.is_idle(), "there are masks to be taken off");
    assert_eq!(node.declines(masked(at(2, 1, 1))), Reason::Busy);
    let again = node.does(masked(first));
    assert_eq!(again, [join(first), Effect::Upload { at: first, update: kept }], "the same bytes");
    node.does(Input::UploadDone { at: first });
    let over = node.does(Input::Dismissed { at: first, reason: Dismissal::Published });
    let forget = Effect::Forget { key: key(1, 1) };
    assert_eq!(over, [settle(1, Outcome::Accepted), Effect::Leave { at: first }, forget]);
    assert!(node.0.is_idle());
}

/// Attacks 9 and 13: what was masked once is not masked again, for a private job neither.
#[test]
fn a_round_is_masked_once_in_all_its_attempts() {
    let (mut node, first) = (Node::new(profile()), at(1, 1, 1));
    node.trains_masked(first);
    assert!(matches!(node.does(Input::Keyed { at: first })[..], [Effect::Store { .. }]));
    let (kept, stored) = stored_masked(key(1, 1));
    node.does(Input::Stored { key: key(1, 1), result: Ok(Kept { private: true, ..kept }) });
    node.does(Input::UploadDone { at: first });
    let abandoned = node.does(Input::Dismissed { at: first, reason: Dismissal::Abandoned });
    let forget = Effect::Forget { key: key(1, 1) };
    assert_eq!(abandoned, [settle(1, Outcome::NotAccepted), Effect::Leave { at: first }, forget]);
    assert_eq!(node.declines(masked(at(1, 1, 2))), Reason::Policy);
    assert_eq!(node.declines(invite(at(1, 1, 3))), Reason::Policy, "in clear neither");
    let other = invite_with(at(1, 1, 4), MASKS, Digest::of(b"another"));
    assert_eq!(node.declines(other), Reason::Policy, "of another model neither");
    node.trains_masked(at(1, 2, 1));

    // Bytes from before a restart are no longer of use.
    let mut restarted = Node(NodeMachine::new(Arc::new(profile()), counts(), [(key(1, 1), kept)]));
    restarted.does(Input::Connected);
    let effects = restarted.does(masked(first));
    assert!(matches!(effects[..], [Effect::Join { .. }, Effect::Fetch { .. }]), "{effects:?}");

    // Also if the next attempt comes while the bytes are made, or are under way.
    for uploading in [false, true] {
        let mut node = Node::new(profile());
        node.trains_masked(first);
        node.does(Input::Keyed { at: first });
        if uploading {
            node.does(stored.clone());
        }
        let effects = node.does(masked(at(1, 1, 2)));
        assert!(effects.contains(&Effect::Leave { at: first }), "{effects:?}");
        assert!(matches!(effects.last(), Some(Effect::Decline { reason: Reason::Policy, .. })));
        let forget = Effect::Forget { key: key(1, 1) };
        match uploading {
            true => assert!(effects.contains(&forget)),
            false => {
                assert_eq!(node.does(stored.clone()), [settle(1, Outcome::NotAccepted), forget]);
            }
        }
        assert!(node.0.is_idle());
    }
}

#[test]
fn a_new_attempt_has_new_keys_and_the_same_training() {
    let (mut node, first, second) = (Node::new(profile()), at(1, 1, 1), at(1, 1, 2));
    node.trains_masked(first);
    assert_eq!(node.does(masked(second)), [Effect::Leave { at: first }, join(second)]);
    assert_eq!(node.does(Input::Keyed { at: first }), [], "keys of the old session");
    assert!(matches!(node.does(Input::Keyed { at: second })[..], [Effect::Store { at, .. }] if at == second));
    // What waits in vain is wiped.
    let mut node = Node::new(profile());
    node.trains_masked(first);
    let effects = node.does(Input::Dismissed { at: first, reason: Dismissal::Abandoned });
    assert_eq!(effects, [Effect::Leave { at: first }, Effect::Forget { key: key(1, 1) }]);
    node.trains_masked(second);
    let effects = node.does(Input::Shutdown);
    let declined = matches!(effects[2], Effect::Decline { reason: Reason::ShuttingDown, .. });
    assert_eq!(effects[..2], [Effect::Leave { at: second }, Effect::Forget { key: key(1, 1) }]);
    assert!(declined && effects[3..] == [Effect::Exit], "{effects:?}");
}

#[test]
fn a_session_that_fails_ends_the_round_here() {
    let failed = |at| {
        let failure = Failure { reason: Reason::Policy, detail: "2 survivors".into() };
        Input::SessionFailed { at, failure }
    };
    let (mut node, first) = (Node::new(profile()), at(1, 1, 1));
    node.does(masked(first));
    assert_eq!(node.does(failed(at(1, 1, 2))), [], "of another attempt");
    let effects = node.does(failed(first));
    let [Effect::Leave { .. }, Effect::Decline { reason: Reason::Policy, .. }, Effect::CancelFetch] =
        effects[..]
    else {
        panic!("{effects:?}")
    };
    assert_eq!(node.declines(masked(first)), Reason::Policy);
    // After the upload there is nothing to decline, and nothing to send again.
    let first = at(1, 2, 1);
    node.trains_masked(first);
    node.does(Input::Keyed { at: first });
    node.does(stored_masked(key(1, 2)).1);
    node.does(Input::UploadDone { at: first });
    let [leave, forget] = [Effect::Leave { at: first }, Effect::Forget { key: key(1, 2) }];
    assert_eq!(node.does(failed(first)), [leave, forget]);
    assert!(node.0.is_idle());
    assert_eq!(node.declines(masked(first)), Reason::Policy);
}

#[test]
fn undismissed_updates_do_not_pile_up() {
    let mut node = Node::new(profile());
    for run in 1..=20 {
        node.uploads(at(run, 1, 1));
        node.does(Input::UploadDone { at: at(run, 1, 1) });
        if run == KEPT_UPDATES as u64 {
            break;
        }
    }
    node.does(invite(at(99, 2, 1)));
    node.does(ready(model_of(99, 2)));
    node.does(charged(key(99, 2)));
    node.does(trained(key(99, 2)));
    let effects = node.does(stored(key(99, 2)));
    assert_eq!(effects[1..], [Effect::Forget { key: key(1, 1) }]);
}

impl Clone for Node {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// What the world does next; answers are given only where something is open.
#[derive(Debug, Clone)]
enum Move {
    Invite { run: u64, round: u32, attempt: u32 },
    Repeat,
    Dismiss { reason: u8 },
    Ask { run: u64, round: u32 },
    Reconnect,
    Restart,
    Answer { which: u8, well: bool },
    Wait { seconds: u32 },
    Shutdown,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        4 => (1..3u64, 1..5u32, 1..3u32).prop_map(|(run, round, attempt)| Move::Invite { run, round, attempt }),
        2 => Just(Move::Repeat),
        2 => (0..3u8).prop_map(|reason| Move::Dismiss { reason }),
        2 => (1..3u64, 1..5u32).prop_map(|(run, round)| Move::Ask { run, round }),
        1 => Just(Move::Reconnect),
        1 => Just(Move::Restart),
        12 => (0..5u8, prop::bool::weighted(0.85)).prop_map(|(which, well)| Move::Answer { which, well }),
        1 => (0..600u32).prop_map(|seconds| Move::Wait { seconds }),
        1 => prop::bool::weighted(0.05).prop_map(|now| if now { Move::Shutdown } else { Move::Repeat }),
    ];
    prop::collection::vec(one, 1..120)
}

/// A faithful caller of the machine that checks its promises.
struct World {
    machine: NodeMachine,
    now: Time,
    /// At most one of each.
    fetch: Option<Digest>,
    training: Option<RoundKey>,
    storing: Option<RoundKey>,
    evaluating: Option<RoundKey>,
    upload: Option<Attempt>,
    /// Whether jobs have masks, and the attempt of the session, with whether its keys were announced.
    masks: bool,
    session: Option<(Attempt, bool)>,
    /// What is said once all effects were carried out.
    answer: Option<Input>,
    /// Rounds that were masked: on the disk.
    masked: BTreeSet<RoundKey>,
    /// The attempt that each round's bytes were last sent for.
    sent: BTreeMap<RoundKey, u32>,
    /// On the disk.
    disk: BTreeMap<RoundKey, Kept>,
    /// Invitations without an end yet, and the last one of all.
    open: BTreeSet<Attempt>,
    last: Option<Attempt>,
    charged: BTreeSet<RoundKey>,
    trainings: BTreeMap<RoundKey, u32>,
    exited: bool,
}

impl World {
    fn new(masks: bool) -> Self {
        let machine = NodeMachine::new(Arc::new(profile()), counts(), []);
        let mut world = Self {
            masks,
            session: None,
            answer: None,
            masked: BTreeSet::new(),
            machine,
            now: Time(0),
            fetch: None,
            training: None,
            storing: None,
            evaluating: None,
            upload: None,
            sent: BTreeMap::new(),
            disk: BTreeMap::new(),
            open: BTreeSet::new(),
            last: None,
            charged: BTreeSet::new(),
            trainings: BTreeMap::new(),
            exited: false,
        };
        world.step(Input::Connected);
        world
    }

    fn step(&mut self, input: Input) {
        for effect in self.machine.step(self.now, input) {
            assert!(!self.exited, "an effect after Exit: {effect:?}");
            self.perform(effect);
        }
        if let Some(answer) = self.answer.take() {
            self.step(answer);
        }
    }

    fn perform(&mut self, effect: Effect) {
        let idle = self.training.is_none() && self.storing.is_none() && self.evaluating.is_none();
        match effect {
            Effect::Decline { at, .. } => {
                self.open.remove(&at);
            }
            Effect::Fetch { model, .. } => self.fetch = Some(model),
            Effect::CancelFetch => self.fetch = None,
            Effect::Charge { key, .. } => {
                assert!(idle, "two computations at once");
                self.charged.insert(key);
                self.step(Input::Charged { key, result: Ok(()) });
            }
            Effect::Train { key, .. } => {
                assert!(idle, "two computations at once");
                assert!(self.charged.contains(&key), "training before the charge");
                assert!(!self.disk.contains_key(&key), "training for a round whose bytes are kept");
                self.training = Some(key);
                *self.trainings.entry(key).or_default() += 1;
            }
            Effect::CancelTraining => assert!(self.training.is_some(), "nothing to cancel"),
            Effect::Join { at, .. } => match self.session {
                Some((open, _)) => assert_eq!(open, at, "a second session beside the first"),
                // What the journal on the disk says, the machine may have forgotten.
                None if self.masked.contains(&at.key()) => {
                    let failure = Failure { reason: Reason::Policy, detail: "masked before".into() };
                    self.answer = Some(Input::SessionFailed { at, failure });
                }
                None => self.session = Some((at, false)),
            },
            Effect::Leave { at } => {
                self.session.take_if(|(open, _)| *open == at);
            }
            Effect::Store { at, .. } => {
                assert!(idle, "two computations at once");
                if self.masks {
                    assert_eq!(self.session, Some((at, true)), "masked without keys");
                    assert!(self.masked.insert(at.key()), "masked twice");
                }
                self.storing = Some(at.key());
            }
            Effect::Settle { key, .. } => {
                assert!(self.disk.contains_key(&key), "settled, but nothing was kept");
            }
            Effect::Upload { at, update } => {
                assert_eq!(
                    self.disk.get(&at.key()),
                    Some(&update),
                    "an upload of bytes that were not stored"
                );
                let open = self.session.map(|(open, _)| open);
                assert!(!self.masks || open == Some(at), "masked bytes without their session");
                self.upload = Some(at);
                self.sent.insert(at.key(), at.attempt);
                self.open.remove(&at);
            }
            Effect::Forget { key } => {
                self.disk.remove(&key);
                self.upload.take_if(|at| at.key() == key);
            }
            Effect::Evaluate { key, .. } => {
                assert!(idle, "two computations at once");
                self.evaluating = Some(key);
            }
            Effect::Report { metrics, .. } => {
                let small = |cell: &Option<u64>| cell.is_some_and(|count| (1..10).contains(&count));
                assert!(!metrics.confusion.iter().any(small));
            }
            Effect::Event(_) => {}
            Effect::Exit => self.exited = true,
        }
    }

    fn invite(&mut self, at: Attempt) {
        // An invitation ends the ones before it that are not at work any more.
        self.open.clear();
        self.open.insert(at);
        self.last = Some(at);
        let model = model_of(at.run.0, at.round);
        let job = job(if self.masks { MASKS } else { "" });
        let deadline = self.now.plus_seconds(600);
        self.step(Input::Invited { at, job, model, deadline, support: None });
    }

    fn make(&mut self, next: &Move) {
        match *next {
            Move::Invite { run, round, attempt } => self.invite(at(run, round, attempt)),
            Move::Repeat => {
                if let Some(at) = self.last {
                    self.invite(at);
                }
            }
            Move::Dismiss { reason } => {
                if let Some(at) = self.last {
                    self.open.remove(&at);
                    let reasons = [Dismissal::Published, Dismissal::NotUsed, Dismissal::Abandoned];
                    self.step(Input::Dismissed { at, reason: reasons[usize::from(reason)] });
                    assert!(!self.disk.contains_key(&at.key()) || self.machine_is_at_a_later_attempt(at));
                }
            }
            Move::Ask { run, round } => self.step(ask(key(run, round))),
            Move::Reconnect => {
                self.step(Input::Disconnected);
                self.step(Input::Connected);
                self.make(&Move::Repeat);
            }
            Move::Restart => {
                // Keys go with the process, and so do bytes that they masked.
                let kept = if self.masks { BTreeMap::new() } else { self.disk.clone() };
                let (disk, last, now, masked) = (kept.clone(), self.last, self.now, self.masked.clone());
                *self = World { disk, last, now, masked, ..World::new(self.masks) };
                self.machine = NodeMachine::new(Arc::new(profile()), counts(), kept);
                self.step(Input::Connected);
                self.make(&Move::Repeat);
            }
            Move::Answer { which, well } => self.answer(which, well),
            Move::Wait { seconds } => {
                self.now = self.now.plus_seconds(seconds);
                self.step(Input::Tick);
            }
            Move::Shutdown => self.step(Input::Shutdown),
        }
    }

    fn machine_is_at_a_later_attempt(&self, at: Attempt) -> bool {
        self.sent.get(&at.key()).is_some_and(|attempt| *attempt > at.attempt) || self.exited
    }

    fn answer(&mut self, which: u8, well: bool) {
        let failure = || Failure { reason: Reason::Training, detail: "failed".into() };
        let line = || "failed".to_owned();
        if which == 4 {
            match self.session {
                Some((at, false)) if well => {
                    self.session = Some((at, true));
                    self.step(Input::Keyed { at });
                }
                Some((at, _)) if !well => {
                    self.session = None;
                    self.step(Input::SessionFailed { at, failure: failure() });
                }
                _ => {}
            }
            return;
        }
        if which == 0
            && let Some(model) = self.fetch.take()
        {
            self.step(if well { ready(model) } else { Input::FetchFailed { model, detail: line() } });
        } else if which == 1
            && let Some(at) = self.upload.take()
        {
            // Also where the invitation was repeated while the upload was under way.
            self.open.remove(&at);
            let refused = Input::UploadRefused { at, detail: line() };
            self.step(if well { Input::UploadDone { at } } else { refused });
        } else if let Some(key) = self.training.take() {
            self.step(if well { trained(key) } else { Input::Trained { key, result: Err(failure()) } });
        } else if let Some(key) = self.storing.take() {
            let kept = Kept { masked: self.masks, ..kept(key) };
            if well {
                self.disk.insert(key, kept);
            }
            self.step(Input::Stored { key, result: if well { Ok(kept) } else { Err(line()) } });
        } else if let Some(key) = self.evaluating.take() {
            self.step(Input::Evaluated { key, result: if well { Ok(metrics()) } else { Err(failure()) } });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_promises_hold_whatever_the_order(moves in moves(), masks in any::<bool>()) {
        let mut world = World::new(masks);
        for next in &moves {
            world.make(next);
        }
        for _ in 0..20 {
            [0, 1, 2, 4].into_iter().for_each(|which| world.answer(which, true));
        }
        if let Some((at, _)) = world.session {
            // Until the round is over there are masks to be taken off.
            world.step(Input::Dismissed { at, reason: Dismissal::NotUsed });
        }
        prop_assert!(world.exited || world.open.is_empty(), "no end: {:?}", world.open);
        prop_assert!(world.exited || world.machine.is_idle());
        // And a node can always be stopped.
        world.step(Input::Shutdown);
        world.now = world.now.plus_seconds(30);
        world.step(Input::Tick);
        prop_assert!(world.exited);
    }
}
