//! The promises of a run: what is summed, what is refused, and that a crash changes nothing.

use std::io::Write;
use std::sync::Arc;

use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::Job;
use tributary_common::model::{digest, to_bytes};
use tributary_common::record::{Participation, Role, RoundOutcome, RunEvent, RunState};
use tributary_common::time::Time;

use super::*;
use crate::store::MemoryStore;

const JOB: &str = r#"
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
    reconnect_seconds = 5
"#;
const ID: RunId = RunId(5);

fn name(index: usize) -> NodeName {
    format!("node-{index}").parse().unwrap()
}

/// A delta of node `index` in `round`; every coordinate different.
fn delta(index: usize, round: u32) -> Vec<f32> {
    (0..6).map(|at| (at as f32 + 0.1) * (index as f32 - 0.7) / (round as f32 + 1.3)).collect()
}

fn update(index: usize, round: u32, values: &[f32], payload: impl Fn(&[f32]) -> Payload) -> Update {
    Update {
        node: name(index),
        round,
        examples: index as u64 + 1,
        bytes: values.len() as u64 * 4,
        digest: Some(digest(values)),
        payload: payload(values),
    }
}

fn values(values: &[f32]) -> Payload {
    Payload::Values(Arc::new(values.to_vec()))
}

fn bytes(values: &[f32]) -> Payload {
    Payload::Bytes(to_bytes(values))
}

fn file(values: &[f32]) -> Payload {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&to_bytes(values)).unwrap();
    Payload::File(file)
}

fn submitted() -> Arc<dyn Store> {
    submitted_as(JOB)
}

fn submitted_as(job: &str) -> Arc<dyn Store> {
    let store = MemoryStore::new();
    let initial = store.put_model(&Job::parse(job).unwrap().layout().unwrap().initial(7)).unwrap();
    store.create_run(ID, job, initial, Time(0)).unwrap();
    Arc::new(store)
}

fn mean() -> Rule {
    Rule::OfTheJob(Box::new(|_, _| Ok(())))
}

fn open(store: &Arc<dyn Store>) -> Run {
    let (mut run, _) = Run::open(Arc::clone(store), ID, Time(1000), Opening::new(mean())).unwrap();
    for index in 0..3 {
        run.handle(Time(1000), Input::Connected { node: name(index), role: Role::Trainer }).unwrap();
    }
    run
}

#[test]
fn the_model_is_the_same_for_any_order_and_any_kind_of_payload() {
    let finish = |order: [usize; 3], payload: fn(&[f32]) -> Payload| {
        let store = submitted();
        let mut run = open(&store);
        for round in 1..=2 {
            for index in order {
                run.update(Time(2000), update(index, round, &delta(index, round), payload)).unwrap();
            }
        }
        assert_eq!(store.run(ID).unwrap().head.state, RunState::Finished);
        let model = store.model(store.run(ID).unwrap().head.model).unwrap();
        assert_eq!(&*model, &**run.model());
        model
    };
    let first = finish([0, 1, 2], values);
    for (order, payload) in
        [([2, 1, 0], values as fn(&[f32]) -> Payload), ([1, 0, 2], bytes), ([0, 2, 1], file)]
    {
        assert_eq!(finish(order, payload), first);
    }
    // The weighted mean, computed the plain way.
    let initial = Job::parse(JOB).unwrap().layout().unwrap().initial(7);
    for (at, value) in first.iter().enumerate() {
        let step =
            |round| (0..3).map(|i| f64::from(delta(i, round)[at]) * (i as f64 + 1.0)).sum::<f64>() / 6.0;
        let expected = f64::from(initial[at]) + step(1) + step(2);
        assert!((f64::from(*value) - expected).abs() < 1e-6, "{value} {expected}");
    }
}

#[test]
fn an_unfit_update_is_refused_and_the_rest_make_the_round() {
    let store = submitted();
    let mut run = open(&store);
    let bad = [delta(0, 1), vec![0.0, f32::NAN, 0.0, 0.0, 0.0, 0.0], vec![0.0; 5]];
    for (index, delta) in bad.iter().enumerate() {
        run.update(Time(2000), update(index, 1, delta, bytes)).unwrap();
    }
    let record = &store.rounds(ID).unwrap()[0];
    let detail = |index| match &record.cohort[&name(index)] {
        Participation::Refused { detail } => detail.clone(),
        other => panic!("{other:?}"),
    };
    assert!(detail(1).contains("coordinate 1 is NaN"), "{}", detail(1));
    assert!(detail(2).contains("5 parameters, but the model has 6"), "{}", detail(2));
    assert_eq!(store.run(ID).unwrap().head.published, 0);
    // The next attempt starts from an empty sum.
    run.handle(Time(20_000), Input::Tick).unwrap();
    for index in 0..3 {
        run.update(Time(20_000), update(index, 1, &delta(index, 1), bytes)).unwrap();
    }
    let again = submitted();
    let mut undisturbed = open(&again);
    for index in 0..3 {
        undisturbed.update(Time(2000), update(index, 1, &delta(index, 1), bytes)).unwrap();
    }
    assert_eq!(run.model(), undisturbed.model());
}

/// Takes the updates that it is given for its answer to how many there were.
struct Counting(fn(usize) -> Result<Vec<f32>, AggregateError>, usize);

impl AggregationRule for Counting {
    fn begin(&mut self, _: u32, parameters: usize) {
        assert_eq!(parameters, 6);
        self.1 = 0;
    }

    fn add(&mut self, update: Contribution) {
        assert_eq!((update.delta().len(), update.examples() > 0), (6, true));
        self.1 += 1;
    }

    fn finish(&mut self, _: &[f32]) -> Result<Vec<f32>, AggregateError> {
        (self.0)(self.1)
    }
}

#[test]
fn what_a_rule_makes_is_published_only_if_it_is_a_model() {
    let finish = |rule| {
        let store = submitted();
        let mut run =
            Run::open(Arc::clone(&store), ID, Time(1000), Opening::new(Rule::Own(Box::new(Counting(rule, 0)))))
                .unwrap()
                .0;
        for index in 0..3 {
            run.handle(Time(1000), Input::Connected { node: name(index), role: Role::Trainer }).unwrap();
        }
        // One that is not fit reaches no rule.
        run.update(Time(2000), update(0, 1, &[f32::NAN; 6], values)).unwrap();
        for index in 1..3 {
            run.update(Time(2000), update(index, 1, &delta(index, 1), values)).unwrap();
        }
        let reason = match &store.rounds(ID).unwrap()[0].outcome {
            RoundOutcome::Published { .. } => return Ok(run.model().to_vec()),
            RoundOutcome::Abandoned { reason } => format!("{reason:?}"),
        };
        Err(reason)
    };
    assert_eq!(finish(|updates| Ok(vec![updates as f32; 6])), Ok(vec![2.0; 6]));
    for (rule, words) in [
        (
            (|_| Err(AggregateError::Rule("too few".into()))) as fn(usize) -> _,
            "the aggregation rule: too few",
        ),
        (|_| Ok(vec![0.0; 5]), "5 parameters, but the model has 6"),
        (|_| Ok(vec![f32::NAN; 6]), "norm NaN"),
    ] {
        let reason = finish(rule).unwrap_err();
        assert!(reason.contains(words), "{reason}");
    }
}

#[test]
fn a_crash_in_a_round_changes_nothing() {
    let undisturbed = {
        let store = submitted();
        let mut run = open(&store);
        for (round, index) in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)] {
            run.update(Time(2000), update(index, round, &delta(index, round), bytes)).unwrap();
        }
        store.run(ID).unwrap().head.model
    };
    // Crash after any number of updates; the nodes send theirs again.
    for survived in 0..6 {
        let store = submitted();
        let mut run = open(&store);
        let sent = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)];
        for (round, index) in &sent[..survived] {
            run.update(Time(2000), update(*index, *round, &delta(*index, *round), bytes)).unwrap();
        }
        drop(run);
        let mut run = open(&store);
        for (round, index) in sent {
            run.update(Time(3000), update(index, round, &delta(index, round), bytes)).unwrap();
        }
        assert_eq!(store.run(ID).unwrap().head.model, undisturbed, "after {survived} updates");
        let records = store.rounds(ID).unwrap();
        assert_eq!(records.len(), 2);
        assert!(records.iter().all(|record| record.attempt == 1));
    }
}

#[test]
fn an_update_counts_once_and_only_in_its_round() {
    let store = submitted();
    let mut run = open(&store);
    let mine = || update(0, 1, &delta(0, 1), bytes);
    assert_eq!(run.wants(&name(0), 1), Some(1));
    run.update(Time(2000), mine()).unwrap();
    assert!(run.wants(&name(0), 1).is_none() && run.has(&name(0), 1));
    assert!(run.update(Time(2000), mine()).unwrap().is_empty());
    let early = update(1, 2, &delta(1, 2), bytes);
    assert!(run.update(Time(2000), early).unwrap().is_empty());
    let foreign = update(9, 1, &delta(9, 1), bytes);
    assert!(run.update(Time(2000), foreign).unwrap().is_empty());
    run.update(Time(2000), update(1, 1, &delta(1, 1), bytes)).unwrap();
    let told = run.update(Time(2000), update(2, 1, &delta(2, 1), bytes)).unwrap();
    let record = told.iter().find_map(|outgoing| match outgoing {
        Outgoing::Event(event) => match &**event {
            RunEvent::RoundEnded { record } => Some(record.clone()),
            _ => None,
        },
        _ => None,
    });
    assert_eq!(record.unwrap().accepted().count(), 3);
}

#[test]
fn what_cannot_be_run_is_refused_in_words() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let model = store.put_model(&[0.0; 4]).unwrap();
    let error = |id| Run::open(Arc::clone(&store), id, Time(0), Opening::new(mean())).unwrap_err().to_string();
    assert!(error(RunId(9)).contains("does not exist"));
    store.create_run(RunId(1), "name = 1", model, Time(0)).unwrap();
    assert!(error(RunId(1)).contains("cannot be run"));
    store.create_run(RunId(2), JOB, model, Time(0)).unwrap();
    assert!(error(RunId(2)).contains("has 4 parameters, but the job's has 6"));
}

const CLIENT_LEVEL: &str = "
    [privacy]
    unit = 'client'
    mechanism = 'gaussian'
    noise_multiplier = 1.0
    clip_norm = 2.0
    delta = 1e-5
    max_epsilon = 100.0
";

/// Pitfall 5 and correction 14 at the level of clients: what a client sends decides neither who is on record, nor
/// whether the round is published, nor is its digest kept.
#[test]
fn with_client_level_privacy_the_record_is_the_same_whatever_a_client_sends() {
    let record = |strange: &[f32]| {
        let store = submitted_as(&format!("{JOB}{CLIENT_LEVEL}"));
        let rule = Rule::OfTheJob(Box::new(|values, deviation| {
            assert_eq!(deviation, 2.0);
            values.iter_mut().for_each(|value| *value += 0.25);
            Ok(())
        }));
        let (mut run, _) = Run::open(Arc::clone(&store), ID, Time(1000), Opening::new(rule)).unwrap();
        for index in 0..3 {
            run.handle(Time(1000), Input::Connected { node: name(index), role: Role::Trainer }).unwrap();
        }
        for index in 0..3 {
            let values = if index == 1 { strange.to_vec() } else { delta(index, 1) };
            run.update(Time(2000), update(index, 1, &values, bytes)).unwrap();
        }
        let mut record = store.rounds(ID).unwrap()[0].clone();
        let RoundOutcome::Published { model } = record.outcome else { panic!("{record:?}") };
        record.outcome = RoundOutcome::Published { model: Digest::of(b"any") };
        for part in record.cohort.values() {
            assert!(matches!(part, Participation::Accepted { digest: None, .. }), "{part:?}");
        }
        (record, store.model(model).unwrap().to_vec())
    };
    let (plain, model) = record(&delta(1, 1));
    let (odd, without) = record(&[f32::NAN; 6]);
    let (huge, clipped) = record(&[1e30; 6]);
    assert_eq!((&plain, &plain), (&odd, &huge));
    assert!(model.iter().all(|value| value.is_finite()) && model != without);
    assert_eq!(without, clipped, "what cannot be summed counts as nothing");
    let own = Run::open(
        submitted_as(&format!("{JOB}{CLIENT_LEVEL}")),
        ID,
        Time(0),
        Opening::new(Rule::Own(Box::new(Counting(|_| Ok(vec![0.0; 6]), 0)))),
    );
    assert!(own.unwrap_err().to_string().contains("[privacy] needs the coordinator's own"));
}
