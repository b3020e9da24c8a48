//! The promises of the round machine: by example, and over random worlds with crashes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;
use tributary_common::digest::Digest;
use tributary_common::ids::NodeName;
use tributary_common::job::Job;
use tributary_common::record::{
    Abandonment, Metrics, Participation, Reason, RoundOutcome, RoundRecord, RunEvent, RunState,
};
use tributary_common::time::Time;

use super::*;
use crate::store::{AttemptRecord, RunHead};

fn job(overrides: &[&str]) -> Arc<Job> {
    let text = r#"
        name = "test"
        seed = 7
        rounds = 2
        [model]
        architecture = "logistic"
        inputs = [2]
        classes = 2
        [train]
        algorithm = "fedavg"
        learning_rate = 0.1
        local_steps = 1
        batch_size = 1
        [cohort]
        size = 3
        minimum = 2
        deadline_seconds = 100
        reconnect_seconds = 20
        settle_seconds = 5
        attempts = 2
    "#;
    let mut table = tributary_common::document::parse(text).unwrap();
    for assignment in overrides {
        tributary_common::document::set(&mut table, assignment).unwrap();
    }
    Arc::new(Job::from_table(table).unwrap())
}

fn name(index: usize) -> NodeName {
    format!("node-{index}").parse().unwrap()
}

/// What a crash leaves: the head, the open attempt, and the records.
#[derive(Debug, Clone)]
struct Disk {
    head: RunHead,
    open: Option<AttemptRecord>,
    records: Vec<RoundRecord>,
    evaluated: BTreeSet<u32>,
}

fn aggregated(model: Digest) -> Aggregated {
    Aggregated { model, summed: None, support: None }
}

/// Carries out the machine's effects as `Run` does, and checks their order.
#[derive(Debug)]
struct World {
    machine: RoundMachine,
    now: Time,
    disk: Disk,
    folded: BTreeSet<NodeName>,
    invited: BTreeMap<NodeName, (u32, u32)>,
    dismissed: Vec<(NodeName, Dismissal)>,
    asked: Vec<NodeName>,
    events: Vec<RunEvent>,
    unfit_models: u32,
}

impl World {
    fn new(job: &Arc<Job>) -> Self {
        let head = RunHead {
            published: 0,
            attempt: 1,
            model: Digest::of(b"initial"),
            state: RunState::Running,
            clip_norm: None,
            support: None,
        };
        let disk = Disk { head, open: None, records: Vec::new(), evaluated: BTreeSet::new() };
        Self::start(job, disk, Time(1_000_000), None)
    }

    fn start(job: &Arc<Job>, disk: Disk, now: Time, imposed: Option<ImposedSets>) -> Self {
        let start = Start {
            job: Arc::clone(job),
            model_bytes: 24,
            head: disk.head.clone(),
            open_attempt: disk.open.clone(),
            evaluated: disk.evaluated.contains(&disk.head.published),
            contributors: (disk.records.iter().rev())
                .find(|record| record.round == disk.head.published)
                .map(|record| record.accepted().cloned().collect())
                .unwrap_or_default(),
            imposed,
            masking: None,
            session: None,
        };
        let (machine, effects) = RoundMachine::new(now, start);
        let mut world = Self {
            machine,
            now,
            disk,
            folded: BTreeSet::new(),
            invited: BTreeMap::new(),
            dismissed: Vec::new(),
            asked: Vec::new(),
            events: Vec::new(),
            unfit_models: 0,
        };
        world.perform(effects);
        world
    }

    fn step(&mut self, input: Input) {
        let effects = self.machine.step(self.now, input);
        self.perform(effects);
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Journal(attempt) => {
                    assert!(self.disk.open.is_none(), "an attempt is journalled only when none is open");
                    assert_eq!(
                        (attempt.round, attempt.attempt),
                        (self.disk.head.published + 1, self.disk.head.attempt)
                    );
                    assert!(attempt.cohort.is_sorted() && !attempt.cohort.is_empty());
                    self.folded.clear();
                    self.disk.open = Some(attempt);
                }
                Effect::Invite { node, round, attempt, model, deadline } => {
                    let open =
                        self.disk.open.as_ref().expect("nobody is invited to what a crash could forget");
                    assert_eq!((open.round, open.attempt, self.disk.head.model), (round, attempt, model));
                    assert!(open.cohort.contains(&node) && deadline > self.now);
                    self.invited.insert(node, (round, attempt));
                }
                Effect::JournalSession(_) | Effect::Masking { .. } => panic!("no session without masks"),
                Effect::Fold { node } => {
                    assert!(self.folded.insert(node), "an update is summed once");
                }
                Effect::Aggregate { unmask } => {
                    assert!(unmask.is_none());
                    let answer = if self.unfit_models > 0 {
                        self.unfit_models -= 1;
                        Err("norm".to_owned())
                    } else {
                        let text = format!("{} {:?}", self.disk.head.model, self.folded);
                        Ok(aggregated(Digest::of(text.as_bytes())))
                    };
                    let effects = self.machine.step(self.now, Input::Aggregated(answer));
                    self.perform(effects);
                }
                Effect::Commit { record, head } => {
                    let open = self.disk.open.take().expect("an attempt ends once");
                    assert_eq!((open.round, open.attempt), (record.round, record.attempt));
                    assert_eq!(
                        record.cohort.keys().collect::<Vec<_>>(),
                        open.cohort.iter().collect::<Vec<_>>()
                    );
                    assert_eq!(record.accepted().cloned().collect::<BTreeSet<_>>(), self.folded);
                    match &record.outcome {
                        RoundOutcome::Published { model } => {
                            assert_eq!((head.published, head.attempt, head.model), (record.round, 1, *model));
                        }
                        RoundOutcome::Abandoned { .. } => {
                            assert_eq!(
                                (head.published, head.model),
                                (record.round - 1, self.disk.head.model)
                            );
                        }
                    }
                    self.disk.head = head;
                    self.disk.records.push(*record);
                }
                Effect::Dismiss { node, reason, .. } => {
                    self.invited.remove(&node);
                    self.dismissed.push((node, reason));
                }
                Effect::Evaluate { node, round, model } => {
                    assert_eq!((self.disk.head.published, self.disk.head.model), (round, model));
                    self.asked.push(node);
                }
                Effect::RecordEvaluation(record) => {
                    self.disk.evaluated.insert(record.round);
                }
                Effect::Finish(state) => self.disk.head.state = state,
                Effect::Event(event) => {
                    if let RunEvent::RoundEnded { record } = &*event {
                        assert_eq!(self.disk.records.last(), Some(record), "announced after it is durable");
                    }
                    self.events.push(*event);
                }
            }
        }
    }

    fn connect(&mut self, nodes: std::ops::Range<usize>) {
        for index in nodes {
            self.step(Input::Connected { node: name(index), role: Role::Trainer });
        }
    }

    fn upload(&mut self, index: usize) {
        let round = self.disk.head.published + 1;
        self.step(Input::Update { node: name(index), round, examples: 5, bytes: 24, digest: None });
    }

    fn pass(&mut self, seconds: u32) {
        self.now = self.now.plus_seconds(seconds);
        self.step(Input::Tick);
    }

    fn cohort(&self) -> Vec<usize> {
        let index = |node: &NodeName| node.as_str().trim_start_matches("node-").parse().unwrap();
        self.disk.open.iter().flat_map(|open| open.cohort.iter().map(index)).collect()
    }

    fn part(&self, record: usize, index: usize) -> &Participation {
        &self.disk.records[record].cohort[&name(index)]
    }
}

#[test]
fn a_run_goes_through_its_rounds() {
    let mut world = World::new(&job(&[]));
    world.connect(0..3);
    for _ in 0..2 {
        assert_eq!(world.cohort(), [0, 1, 2]);
        (0..3).for_each(|index| world.upload(index));
    }
    assert_eq!(world.disk.head.state, RunState::Finished);
    assert_eq!(world.disk.head.published, 2);
    assert_eq!(world.dismissed.iter().filter(|(_, why)| *why == Dismissal::Published).count(), 6);
    assert!(matches!(
        world.events.last(),
        Some(RunEvent::Ended { state: RunState::Finished, rounds: 2, .. })
    ));
    assert_eq!(world.machine.next_tick(), None);
}

#[test]
fn a_round_waits_for_the_wanted_clients_but_not_for_ever() {
    let mut world = World::new(&job(&[]));
    world.connect(0..1);
    assert_eq!(world.machine.next_tick(), None, "below the minimum there is nothing to wait for but clients");
    world.connect(1..2);
    assert!(world.disk.open.is_none());
    world.pass(4);
    assert!(world.disk.open.is_none());
    assert_eq!(world.machine.next_tick(), Some(world.now + 1000));
    world.pass(1);
    assert_eq!(world.cohort(), [0, 1]);
    let waits: Vec<_> = world.events.iter().filter(|e| matches!(e, RunEvent::Waiting { .. })).collect();
    assert_eq!(waits.len(), 3, "once per count of clients: {waits:?}");
}

#[test]
fn a_killed_client_is_waited_for_and_then_recorded_as_missing() {
    let mut world = World::new(&job(&["rounds=3"]));
    world.connect(0..3);
    world.upload(0);
    world.step(Input::Disconnected { node: name(1) });
    world.upload(2);
    assert_eq!(world.machine.next_tick(), Some(world.now + 20_000));
    world.pass(19);
    assert!(world.disk.records.is_empty());
    world.pass(1);
    assert_eq!(world.part(0, 1), &Participation::Disconnected);
    assert!(matches!(world.disk.records[0].outcome, RoundOutcome::Published { .. }));
    // The next round does not wait for it; it comes back and is in the one after.
    assert_eq!(world.cohort(), [0, 2]);
    world.connect(1..2);
    world.upload(0);
    world.upload(2);
    assert_eq!(world.cohort(), [0, 1, 2]);
}

#[test]
fn a_client_that_comes_back_in_time_is_invited_again() {
    let mut world = World::new(&job(&[]));
    world.connect(0..3);
    world.step(Input::Disconnected { node: name(1) });
    world.pass(10);
    world.invited.clear();
    world.connect(1..2);
    assert_eq!(world.invited.keys().collect::<Vec<_>>(), [&name(1)]);
    world.pass(15);
    (0..3).for_each(|index| world.upload(index));
    assert_eq!(world.disk.records[0].accepted().count(), 3);
    // Also when only the acknowledgement was lost, until the round is over.
    world.upload(0);
    world.step(Input::Disconnected { node: name(0) });
    world.invited.clear();
    world.connect(0..1);
    assert!(world.invited.contains_key(&name(0)));
    assert!(world.machine.has(&name(0), 2) && world.machine.wants(&name(0), 2).is_none());
    assert_eq!(world.machine.wants(&name(1), 2), Some(1));
}

#[test]
fn the_deadline_ends_a_round_on_its_quorum() {
    let mut world = World::new(&job(&[]));
    world.connect(0..3);
    world.upload(0);
    world.upload(1);
    assert_eq!(world.machine.next_tick(), Some(world.now.plus_seconds(100)));
    world.pass(100);
    assert_eq!(world.part(0, 2), &Participation::Late);
    assert_eq!(world.disk.head.published, 1);
    assert!(world.dismissed.contains(&(name(2), Dismissal::NotUsed)));
}

#[test]
fn too_few_updates_abandon_the_attempt_and_then_the_run() {
    let mut world = World::new(&job(&[]));
    world.connect(0..3);
    for attempt in 1..=2 {
        assert_eq!(world.disk.open.as_ref().map(|open| (open.round, open.attempt)), Some((1, attempt)));
        world.upload(0);
        for index in [1, 2] {
            let reason = Reason::Training;
            world.step(Input::Declined { node: name(index), round: 1, attempt, reason });
        }
        assert_eq!(world.disk.records.len(), attempt as usize);
        assert_eq!(world.part(0, 1), &Participation::Declined { reason: Reason::Training });
    }
    let reason = Abandonment::BelowMinimum { accepted: 1, minimum: 2 };
    assert_eq!(world.disk.records[0].outcome, RoundOutcome::Abandoned { reason: reason.clone() });
    assert_eq!(world.disk.head.state, RunState::Failed { reason });
    assert_eq!(world.disk.head.published, 0);
    assert!(world.dismissed.iter().all(|(_, why)| *why == Dismissal::Abandoned));
}

#[test]
fn an_abandoned_attempt_ends_as_soon_as_it_is_hopeless() {
    let mut world = World::new(&job(&["cohort.minimum=3"]));
    world.connect(0..3);
    world.step(Input::Declined { node: name(0), round: 1, attempt: 1, reason: Reason::Busy });
    assert_eq!(world.disk.records.len(), 1);
    assert_eq!(world.part(0, 1), &Participation::Late);
}

#[test]
fn a_client_that_refuses_the_job_is_not_asked_again_until_it_connects_anew() {
    let mut world = World::new(&job(&["cohort.size=2"]));
    world.connect(0..3);
    let first = world.cohort()[0];
    world.step(Input::Declined { node: name(first), round: 1, attempt: 1, reason: Reason::Policy });
    assert_eq!(world.disk.records.len(), 1);
    let rest: Vec<usize> = (0..3).filter(|index| *index != first).collect();
    assert_eq!(world.cohort(), rest);
    world.connect(first..first + 1);
    rest.iter().for_each(|index| world.upload(*index));
    assert_eq!(world.disk.open.as_ref().unwrap().eligible, 3);
}

#[test]
fn a_run_does_not_wait_for_good_for_clients_that_are_there_and_refuse() {
    let mut world =
        World::new(&job(&["cohort.attempts=3", "cohort.minimum=2", "cohort.deadline_seconds=50"]));
    world.connect(0..3);
    for attempt in 1..=3 {
        for index in world.cohort() {
            world.step(Input::Declined { node: name(index), round: 1, attempt, reason: Reason::Policy });
        }
        assert_eq!(world.disk.records.len(), attempt as usize);
        if attempt < 3 {
            let due = world.machine.next_tick().unwrap();
            assert_eq!(due, world.disk.records.last().unwrap().ended.plus_seconds(50));
            world.now = due;
            world.step(Input::Tick);
        }
    }
    assert!(matches!(world.disk.head.state, RunState::Failed { .. }), "{:?}", world.disk.head);
    assert_eq!(world.machine.next_tick(), None);
}

#[test]
fn surplus_updates_are_not_used() {
    let mut world = World::new(&job(&["cohort.over_selection=1.5"]));
    world.connect(0..5);
    assert_eq!(world.cohort().len(), 5);
    for index in [4, 0, 2] {
        world.upload(index);
    }
    assert_eq!(world.part(0, 1), &Participation::Surplus);
    assert_eq!(world.disk.records[0].dropped().count(), 0);
    assert!(world.dismissed.contains(&(name(3), Dismissal::NotUsed)));
}

#[test]
fn an_unfit_model_is_never_published() {
    let mut world = World::new(&job(&[]));
    world.unfit_models = 1;
    world.connect(0..3);
    (0..3).for_each(|index| world.upload(index));
    let reason = Abandonment::UnfitModel { detail: "norm".into() };
    assert_eq!(world.disk.records[0].outcome, RoundOutcome::Abandoned { reason });
    assert_eq!(world.disk.head.published, 0);
    (0..3).for_each(|index| world.upload(index));
    assert_eq!(world.disk.head.published, 1);
}

#[test]
fn a_refused_update_is_recorded_and_the_round_goes_on() {
    let mut world = World::new(&job(&[]));
    world.connect(0..3);
    world.step(Input::Refused { node: name(0), round: 1, bytes: 24, detail: "coordinate 3\nis NaN".into() });
    world.upload(0);
    world.upload(1);
    world.upload(2);
    assert_eq!(world.part(0, 0), &Participation::Refused { detail: "coordinate 3 is NaN".into() });
    assert_eq!(world.disk.records[0].accepted().count(), 2);
    assert_eq!(world.disk.records[0].bytes_up, 72);
}

#[test]
fn stale_and_foreign_messages_change_nothing() {
    let mut world = World::new(&job(&[]));
    world.connect(0..3);
    let before = format!("{:?}", world.machine);
    for input in [
        Input::Update { node: name(0), round: 9, examples: 1, bytes: 24, digest: None },
        Input::Update { node: name(9), round: 1, examples: 1, bytes: 24, digest: None },
        Input::Declined { node: name(0), round: 1, attempt: 2, reason: Reason::Policy },
        Input::Declined { node: name(9), round: 1, attempt: 1, reason: Reason::Policy },
        Input::Evaluated { node: name(0), round: 1, metrics: Metrics::default() },
        Input::Aggregated(Ok(aggregated(Digest::of(b"forged")))),
        Input::Tick,
    ] {
        world.step(input);
        assert_eq!(format!("{:?}", world.machine), before);
    }
}

#[test]
fn a_stopped_run_abandons_its_round() {
    let mut world = World::new(&job(&[]));
    world.connect(0..3);
    world.upload(0);
    world.step(Input::Stop);
    assert_eq!(world.disk.head.state, RunState::Stopped);
    assert_eq!(world.disk.records[0].outcome, RoundOutcome::Abandoned { reason: Abandonment::Stopped });
    world.step(Input::Stop);
    world.connect(3..5);
    assert_eq!(world.disk.records.len(), 1);
}

#[test]
fn evaluators_are_in_no_cohort_and_measure_what_is_published() {
    let job = job(&["evaluation.federated=true", "evaluation.every_rounds=2"]);
    let mut world = World::new(&job);
    world.step(Input::Connected { node: name(7), role: Role::Evaluator });
    world.connect(0..3);
    (0..3).for_each(|index| world.upload(index));
    assert!(world.asked.is_empty(), "round 1 is not evaluated");
    (0..3).for_each(|index| world.upload(index));
    assert_eq!(world.asked, [name(0), name(1), name(2), name(7)]);
    let metrics = |correct| Metrics { examples: 10, loss_sum: 1.0, correct, confusion: vec![] };
    for (index, correct) in [(0, 5), (1, 6), (7, 9)] {
        world.step(Input::Evaluated { node: name(index), round: 2, metrics: metrics(correct) });
    }
    assert_eq!(world.disk.head.state, RunState::Running);
    world.step(Input::Disconnected { node: name(2) });
    assert_eq!(world.disk.head.state, RunState::Finished);
    let record = world.events.iter().find_map(|event| match event {
        RunEvent::Evaluated { record } => Some(record),
        _ => None,
    });
    let record = record.unwrap();
    assert_eq!(record.held_out.as_ref().unwrap().correct, 9);
    assert_eq!(record.federated().unwrap().correct, 11);
    assert_eq!(record.headline().unwrap().accuracy(), Some(0.9));
}

#[test]
fn after_a_restart_the_evaluator_is_waited_for() {
    let job = job(&["rounds=1"]);
    let mut world = World::new(&job);
    world.step(Input::Connected { node: name(7), role: Role::Evaluator });
    world.connect(0..3);
    (0..3).for_each(|index| world.upload(index));
    let disk = world.disk.clone();
    let mut world = World::start(&job, disk.clone(), world.now, None);
    assert!(!world.machine.is_over());
    world.connect(0..3);
    world.step(Input::Connected { node: name(7), role: Role::Evaluator });
    world.step(Input::Evaluated { node: name(7), round: 1, metrics: Metrics::default() });
    assert_eq!((&world.disk.head.state, world.disk.evaluated.len()), (&RunState::Finished, 1));
    // But not for ever.
    let mut world = World::start(&job, disk, world.now, None);
    world.pass(5);
    assert_eq!(world.disk.head.state, RunState::Finished);
}

#[test]
fn after_a_restart_the_clients_evaluate_too() {
    let job = job(&["rounds=1", "evaluation.federated=true"]);
    let mut world = World::new(&job);
    world.connect(0..4);
    let cohort = world.cohort();
    cohort.iter().for_each(|index| world.upload(*index));
    let disk = world.disk.clone();
    let answer = |world: &mut World, index: usize| {
        let metrics = Metrics { examples: 4, loss_sum: 1.0, correct: 2, confusion: Vec::new() };
        world.step(Input::Evaluated { node: name(index), round: 1, metrics });
    };
    let measured = |world: &World| match world.events.iter().find(|e| matches!(e, RunEvent::Evaluated { .. }))
    {
        Some(RunEvent::Evaluated { record }) => record.by_client.len(),
        _ => 0,
    };
    let mut world = World::start(&job, disk.clone(), world.now, None);
    for index in &cohort {
        assert!(!world.machine.is_over(), "the others are waited for");
        world.connect(*index..*index + 1);
        answer(&mut world, *index);
    }
    assert_eq!((world.machine.is_over(), measured(&world)), (true, 3));
    // One that does not come back is not waited for longer than for the rest to settle.
    let mut world = World::start(&job, disk, world.now, None);
    world.connect(cohort[0]..cohort[0] + 1);
    answer(&mut world, cohort[0]);
    assert_eq!(world.machine.next_tick(), Some(world.now + 5000));
    world.pass(5);
    assert_eq!((world.machine.is_over(), measured(&world)), (true, 1));
}

#[test]
fn imposed_sets_replace_the_drawing() {
    let job = job(&[]);
    let sets: ImposedSets = [(1, [name(1), name(4)].into()), (2, [name(0)].into())].into();
    let disk = World::new(&job).disk;
    let mut world = World::start(&job, disk, Time(5), Some(sets));
    world.connect(0..4);
    world.pass(1000);
    assert!(world.disk.open.is_none(), "node-4 is not there");
    world.connect(4..5);
    assert_eq!(world.cohort(), [1, 4]);
    world.upload(1);
    world.upload(4);
    assert_eq!(world.cohort(), [0]);
    world.upload(0);
    assert_eq!(world.disk.head.state, RunState::Finished);
}

#[test]
fn a_first_cohort_is_drawn_from_all_who_are_there() {
    let mut world = World::new(&job(&["cohort.size=2"]));
    let nodes = (0..9).map(|index| (name(index), Role::Trainer)).collect();
    world.step(Input::Present { nodes });
    let open = world.disk.open.clone().unwrap();
    assert_eq!((open.eligible, open.cohort.len()), (9, 2));
    assert_ne!(world.cohort(), [0, 1], "with this seed it is not the first two");
}

#[test]
fn cohorts_come_from_the_seed_the_round_and_the_attempt() {
    let cohorts = |seed: &str| {
        let mut world = World::new(&job(&[seed, "cohort.attempts=9", "cohort.settle_seconds=0", "rounds=5"]));
        world.connect(0..100);
        (0..3)
            .map(|_| {
                let cohort = world.cohort();
                world.pass(100);
                cohort
            })
            .collect::<Vec<_>>()
    };
    // The first round starts as soon as three clients are there; later ones draw from a hundred.
    assert_eq!(cohorts("seed=1"), cohorts("seed=1"));
    assert_ne!(cohorts("seed=1")[1..], cohorts("seed=2")[1..]);
    assert_ne!(cohorts("seed=1")[1], cohorts("seed=1")[2]);
}

/// One thing that may happen in a random world.
#[derive(Debug, Clone)]
enum Happening {
    Connect(usize),
    Disconnect(usize),
    Upload(usize),
    Refuse(usize),
    Decline(usize, Reason),
    Pass(u32),
    UnfitModel,
    Crash,
}

fn happening() -> impl Strategy<Value = Happening> {
    let node = 0usize..6;
    prop_oneof![
        3 => node.clone().prop_map(Happening::Connect),
        2 => node.clone().prop_map(Happening::Disconnect),
        6 => node.clone().prop_map(Happening::Upload),
        1 => node.clone().prop_map(Happening::Refuse),
        1 => (node, prop_oneof![Just(Reason::Policy), Just(Reason::Busy)]).prop_map(|(n, r)| Happening::Decline(n, r)),
        2 => (0u32..40).prop_map(Happening::Pass),
        1 => Just(Happening::UnfitModel),
        1 => Just(Happening::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever happens, in whatever order, with crashes in between: `World::perform` checks every effect, and
    /// once the clients stay and answer, the run ends, with as many published rounds as it says.
    #[test]
    fn every_run_ends_with_a_true_record(
        happenings in prop::collection::vec(happening(), 0..120),
        over_selection in prop_oneof![Just("1.0"), Just("1.5")],
    ) {
        let over_selection = format!("cohort.over_selection={over_selection}");
        let job = job(&["rounds=4", "cohort.attempts=3", &over_selection]);
        let mut world = World::new(&job);
        for happening in happenings {
            let round = world.disk.head.published + 1;
            let attempt = world.disk.head.attempt;
            match happening {
                Happening::Connect(index) => world.connect(index..index + 1),
                Happening::Disconnect(index) => world.step(Input::Disconnected { node: name(index) }),
                Happening::Upload(index) => world.upload(index),
                Happening::Refuse(index) => {
                    world.step(Input::Refused { node: name(index), round, bytes: 24, detail: "bad".into() });
                }
                Happening::Decline(index, reason) => {
                    world.step(Input::Declined { node: name(index), round, attempt, reason });
                }
                Happening::Pass(seconds) => world.pass(seconds),
                Happening::UnfitModel => world.unfit_models += 1,
                Happening::Crash => world = World::start(&job, world.disk.clone(), world.now, None),
            }
        }
        world.unfit_models = 0;
        for _ in 0..50 {
            if world.machine.is_over() {
                break;
            }
            world.connect(0..6);
            (0..6).for_each(|index| world.upload(index));
            if let Some(tick) = world.machine.next_tick() {
                world.now = world.now.max(tick);
                world.step(Input::Tick);
            }
        }
        prop_assert!(world.machine.is_over(), "{:?}", world.machine);
        let published = world.disk.records.iter().filter(|r| matches!(r.outcome, RoundOutcome::Published { .. }));
        prop_assert_eq!(published.count() as u32, world.disk.head.published);
        prop_assert_eq!(world.disk.head.state == RunState::Finished, world.disk.head.published == 4);
        for record in &world.disk.records {
            let accepted = record.accepted().count() as u32;
            let fits = (job.cohort.minimum..=job.cohort.size).contains(&accepted);
            let abandoned = matches!(record.outcome, RoundOutcome::Abandoned { .. });
            prop_assert!(fits || abandoned);
        }
    }
}
