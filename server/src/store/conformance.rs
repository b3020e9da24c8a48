//! What every [`Store`] must do: each check runs on both twins, and on the disk also against a reopened store.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::record::{
    Abandonment, EvaluationRecord, Metrics, Participation, Reason, RoundOutcome, RoundRecord, RunState,
    Summed,
};
use tributary_common::time::Time;

use super::{
    AttemptRecord, MemoryStore, NodeRecord, RunHead, SledStore, Store, StoreError, StoredRun, TokenRecord,
};

pub(crate) const RUN: RunId = RunId(0xfeed);

pub(crate) fn name(number: u32) -> NodeName {
    format!("client-{number:06}").parse().unwrap()
}

/// A model of `values` parameters that no other `seed` gives.
pub(crate) fn model(seed: u32, values: u32) -> Vec<f32> {
    (0..values).map(|i| (seed * 1000 + i) as f32 * 0.37 - 11.0).collect()
}

pub(crate) fn attempt(round: u32, attempt: u32, cohort: u32) -> AttemptRecord {
    let cohort = (0..cohort).map(name).collect::<Vec<_>>();
    AttemptRecord { round, attempt, started: Time(7), eligible: cohort.len() as u32 * 2, cohort }
}

/// A published round, or an abandoned one, with every kind of participation in a cohort of `cohort`.
pub(crate) fn record(round: u32, attempt: u32, cohort: u32, model: Option<Digest>) -> RoundRecord {
    let part = |number: u32| match number % 6 {
        0 => Participation::Accepted { digest: Some(Digest::of(b"u")), examples: u64::MAX, bytes: 12 },
        1 => Participation::Declined { reason: Reason::ShuttingDown },
        2 => Participation::Refused { detail: "weight \"0\"\u{7f}é".to_owned() },
        3 => Participation::Disconnected,
        4 => Participation::Late,
        _ => Participation::Surplus,
    };
    let below = Abandonment::BelowMinimum { accepted: 1, minimum: 2 };
    RoundRecord {
        round,
        attempt,
        started: Time(u64::from(round) * 1000),
        ended: Time(u64::from(round) * 1000 + 999),
        eligible: cohort,
        cohort: (0..cohort).map(|number| (name(number), part(number))).collect(),
        bytes_down: 1 << 40,
        bytes_up: 3,
        outcome: match model {
            Some(model) => RoundOutcome::Published { model },
            None => RoundOutcome::Abandoned { reason: below },
        },
        spent: model.is_none() && attempt > 1,
        summed: model.map(|_| Summed { weight: 7, examples: u64::MAX, loss_millionths: 3 }),
    }
}

pub(crate) fn evaluation(round: u32, loss_sum: f64, clients: u32) -> EvaluationRecord {
    let metrics =
        Metrics { examples: 10, loss_sum, correct: 7, confusion: vec![Some(4), None, Some(0), Some(6)] };
    let by_client = (0..clients).map(|number| (name(number), metrics.clone())).collect();
    EvaluationRecord { round, held_out: Some(metrics), by_client }
}

pub(crate) fn node(number: u32, revoked: Option<Time>) -> NodeRecord {
    let identity = Digest::of(&number.to_le_bytes());
    NodeRecord { name: name(number), identity, enrolled: Time(5), expires: Time(6), revoked }
}

pub(crate) fn token(number: u32) -> TokenRecord {
    let secret_digest = Digest::of(&number.to_be_bytes());
    TokenRecord { secret_digest, node: name(number), expires: Time(99) }
}

pub(crate) fn head(published: u32, attempt: u32, model: Digest) -> RunHead {
    RunHead { published, attempt, model, state: RunState::Running, clip_norm: None, support: None }
}

/// All that can be read without taking anything out.
#[derive(Debug, PartialEq)]
pub(crate) struct Content {
    runs: Vec<StoredRun>,
    rounds: BTreeMap<RunId, Vec<RoundRecord>>,
    /// As text, in which NaN equals NaN.
    evaluations: BTreeMap<RunId, String>,
    models: BTreeMap<Digest, Vec<u32>>,
    nodes: Vec<NodeRecord>,
}

/// Reads all that `store` holds, with the models that its runs stand at.
pub(crate) fn content(store: &dyn Store) -> Result<Content, StoreError> {
    let runs = store.runs()?;
    let mut content = Content {
        rounds: BTreeMap::new(),
        evaluations: BTreeMap::new(),
        models: BTreeMap::new(),
        nodes: store.nodes()?,
        runs,
    };
    for stored in &content.runs {
        content.rounds.insert(stored.run, store.rounds(stored.run)?);
        content.evaluations.insert(stored.run, format!("{:?}", store.evaluations(stored.run)?));
        let values = store.model(stored.head.model)?;
        content.models.insert(stored.head.model, values.iter().map(|value| value.to_bits()).collect());
    }
    Ok(content)
}

fn missing<T>(answer: Result<T, StoreError>, expected: &str) -> bool {
    matches!(answer, Err(StoreError::Missing { what, .. }) if what == expected)
}

/// Runs each check on a new store of either kind; what a disk holds must read the same when reopened.
macro_rules! on_both_twins {
    ($($check:ident),* $(,)?) => {
        mod in_memory {
            $(#[test] fn $check() { super::$check(&super::MemoryStore::new()); })*
        }
        mod on_disk {
            $(#[test] fn $check() {
                let dir = tempfile::tempdir().unwrap();
                let store = super::SledStore::open(dir.path()).unwrap();
                super::$check(&store);
                let before = super::content(&store).unwrap();
                drop(store);
                let store = super::SledStore::open(dir.path()).unwrap();
                assert_eq!(super::content(&store).unwrap(), before);
            })*
        }
    };
}

on_both_twins!(
    models_read_back_to_the_same_bits,
    a_run_starts_queued_at_its_initial_model,
    runs_come_in_the_order_of_submission,
    what_is_not_there_is_said_to_be_missing,
    an_attempt_is_open_until_its_round_is_committed,
    a_commit_needs_its_model,
    records_come_in_the_order_in_which_attempts_ended,
    large_records_are_stored_like_small_ones,
    an_evaluation_replaces_one_of_the_same_round,
    figures_keep_their_bits,
    the_state_changes_alone,
    garbage_is_what_no_run_names,
    a_token_is_taken_once,
    eight_threads_take_each_token_once,
    eight_threads_commit_to_eight_runs,
    nodes_are_replaced_by_name,
    ledger_heads_are_replaced_by_node,
);

fn models_read_back_to_the_same_bits(store: &dyn Store) {
    let odd = vec![0.0, -0.0, f32::NAN, f32::INFINITY, f32::MIN_POSITIVE / 2.0, 1.5e30];
    for values in [odd, Vec::new(), model(3, 1), model(4, 700_001)] {
        let digest = store.put_model(&values).unwrap();
        assert_eq!(digest, tributary_common::model::digest(&values));
        assert_eq!(store.put_model(&values).unwrap(), digest);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&store.model(digest).unwrap()), bits(&values));
    }
    assert_eq!(store.collect_garbage().unwrap(), 4, "the same model twice is stored once");
}

fn a_run_starts_queued_at_its_initial_model(store: &dyn Store) {
    let initial = store.put_model(&model(1, 10)).unwrap();
    let job_toml = "name = \"a \\\"b\\\" é\"\n".repeat(3000);
    store.create_run(RUN, &job_toml, initial, Time(u64::MAX)).unwrap();
    let head = RunHead {
        published: 0,
        attempt: 1,
        model: initial,
        state: RunState::Queued,
        clip_norm: None,
        support: None,
    };
    let expected = StoredRun { run: RUN, job_toml, submitted: Time(u64::MAX), head, open_attempt: None };
    assert_eq!(store.run(RUN).unwrap(), expected);
    let again = store.create_run(RUN, "other", initial, Time(1));
    assert!(matches!(again, Err(StoreError::Exists { what: "run", .. })));
    assert_eq!(store.runs().unwrap(), [expected]);
    assert!(store.rounds(RUN).unwrap().is_empty() && store.evaluations(RUN).unwrap().is_empty());
}

fn runs_come_in_the_order_of_submission(store: &dyn Store) {
    let initial = store.put_model(&model(1, 10)).unwrap();
    for (run, submitted) in [(9, 20), (1, 30), (5, 10), (4, 20), (u64::MAX, 20)] {
        store.create_run(RunId(run), "job", initial, Time(submitted)).unwrap();
    }
    let order: Vec<u64> = store.runs().unwrap().iter().map(|stored| stored.run.0).collect();
    assert_eq!(order, [5, 4, 9, u64::MAX, 1]);
}

fn what_is_not_there_is_said_to_be_missing(store: &dyn Store) {
    let nothing = Digest::of(b"nothing");
    assert!(missing(store.model(nothing), "model"));
    assert!(missing(store.create_run(RUN, "job", nothing, Time(1)), "model"));
    assert!(missing(store.run(RUN), "run"));
    assert!(missing(store.rounds(RUN), "run"));
    assert!(missing(store.evaluations(RUN), "run"));
    assert!(missing(store.journal_attempt(RUN, &attempt(1, 1, 2)), "run"));
    assert!(missing(store.set_state(RUN, &RunState::Running), "run"));
    assert!(missing(store.put_evaluation(RUN, &evaluation(0, 1.0, 0)), "run"));
    let model = store.put_model(&model(1, 10)).unwrap();
    assert!(missing(store.commit_round(RUN, &record(1, 1, 2, None), &head(0, 2, model)), "run"));
    assert_eq!(store.take_token(nothing).unwrap(), None);
    assert_eq!(store.node(&name(1)).unwrap(), None);
    assert!(store.runs().unwrap().is_empty() && store.nodes().unwrap().is_empty());
}

fn an_attempt_is_open_until_its_round_is_committed(store: &dyn Store) {
    let initial = store.put_model(&model(1, 10)).unwrap();
    store.create_run(RUN, "job", initial, Time(1)).unwrap();
    store.journal_attempt(RUN, &attempt(1, 1, 3)).unwrap();
    assert_eq!(store.run(RUN).unwrap().open_attempt, Some(attempt(1, 1, 3)));
    assert_eq!(store.run(RUN).unwrap().head.model, initial, "nothing is published by a journal");
    store.commit_round(RUN, &record(1, 1, 3, None), &head(0, 2, initial)).unwrap();
    let stored = store.run(RUN).unwrap();
    assert_eq!((stored.open_attempt, stored.head), (None, head(0, 2, initial)));
    // A cohort that is too large for one entry, replaced by another before its end.
    store.journal_attempt(RUN, &attempt(1, 2, 5000)).unwrap();
    store.journal_attempt(RUN, &attempt(1, 2, 4999)).unwrap();
    assert_eq!(store.run(RUN).unwrap().open_attempt, Some(attempt(1, 2, 4999)));
    let next = store.put_model(&model(2, 10)).unwrap();
    store.commit_round(RUN, &record(1, 2, 3, Some(next)), &head(1, 1, next)).unwrap();
    store.journal_attempt(RUN, &attempt(2, 1, 7)).unwrap();
    let stored = store.run(RUN).unwrap();
    assert_eq!((stored.open_attempt, stored.head), (Some(attempt(2, 1, 7)), head(1, 1, next)));
}

fn a_commit_needs_its_model(store: &dyn Store) {
    let initial = store.put_model(&model(1, 10)).unwrap();
    store.create_run(RUN, "job", initial, Time(1)).unwrap();
    store.journal_attempt(RUN, &attempt(1, 1, 3)).unwrap();
    let before = store.run(RUN).unwrap();
    let absent = Digest::of(b"absent");
    assert!(missing(store.commit_round(RUN, &record(1, 1, 3, Some(absent)), &head(1, 1, absent)), "model"));
    assert_eq!(store.run(RUN).unwrap(), before, "a refused commit changes nothing");
    assert!(store.rounds(RUN).unwrap().is_empty());
}

fn records_come_in_the_order_in_which_attempts_ended(store: &dyn Store) {
    let initial = store.put_model(&model(1, 10)).unwrap();
    store.create_run(RUN, "job", initial, Time(1)).unwrap();
    store.create_run(RunId(1), "job", initial, Time(2)).unwrap();
    let mut expected = Vec::new();
    for number in 0..40 {
        let (round, attempt) = (number / 2 + 1, number % 2 + 1);
        expected.push(record(round, attempt, number, (attempt == 2).then_some(initial)));
        store.commit_round(RUN, &expected[number as usize], &head(round, attempt, initial)).unwrap();
    }
    assert_eq!(store.rounds(RUN).unwrap(), expected);
    assert!(store.rounds(RunId(1)).unwrap().is_empty());
}

fn large_records_are_stored_like_small_ones(store: &dyn Store) {
    let initial = store.put_model(&model(1, 10)).unwrap();
    store.create_run(RUN, "job", initial, Time(1)).unwrap();
    let mut rounds = Vec::new();
    for number in 1..=20 {
        // From below to far above what lies inside sled, around the limit step by step.
        rounds.push(record(number, 1, number * number + 20, None));
        store.commit_round(RUN, &rounds[number as usize - 1], &head(0, number, initial)).unwrap();
    }
    rounds.push(record(21, 1, 10_000, None));
    store.commit_round(RUN, &rounds[20], &head(0, 22, initial)).unwrap();
    assert_eq!(store.rounds(RUN).unwrap(), rounds);
    for clients in [3000, 2, 3000, 2999] {
        store.put_evaluation(RUN, &evaluation(1, 0.1, clients)).unwrap();
        assert_eq!(store.evaluations(RUN).unwrap(), [evaluation(1, 0.1, clients)]);
    }
    // The same large value under two keys, and one of them replaced.
    store.put_evaluation(RUN, &evaluation(1, 0.1, 900)).unwrap();
    store.create_run(RunId(2), "job", initial, Time(2)).unwrap();
    store.put_evaluation(RunId(2), &evaluation(1, 0.1, 900)).unwrap();
    store.put_evaluation(RUN, &evaluation(1, 0.2, 0)).unwrap();
    assert_eq!(store.evaluations(RunId(2)).unwrap(), [evaluation(1, 0.1, 900)]);
}

fn an_evaluation_replaces_one_of_the_same_round(store: &dyn Store) {
    let initial = store.put_model(&model(1, 10)).unwrap();
    store.create_run(RUN, "job", initial, Time(1)).unwrap();
    for round in [300, 2, 0, 17, 2] {
        store.put_evaluation(RUN, &evaluation(round, f64::from(round), 1)).unwrap();
    }
    store.put_evaluation(RUN, &evaluation(17, 0.5, 2)).unwrap();
    let expected = [(0, 0.0, 1), (2, 2.0, 1), (17, 0.5, 2), (300, 300.0, 1)];
    let expected = expected.map(|(round, loss, clients)| evaluation(round, loss, clients));
    assert_eq!(store.evaluations(RUN).unwrap(), expected);
}

fn figures_keep_their_bits(store: &dyn Store) {
    let initial = store.put_model(&model(1, 10)).unwrap();
    store.create_run(RUN, "job", initial, Time(1)).unwrap();
    let losses = [0.1 + 0.2, f64::MIN_POSITIVE, 1.797_693_134_862_315_7e308, f64::NAN, f64::INFINITY, -0.0];
    for (round, loss) in losses.into_iter().enumerate() {
        store.put_evaluation(RUN, &evaluation(round as u32, loss, 2)).unwrap();
    }
    let found = store.evaluations(RUN).unwrap();
    for (record, loss) in found.iter().zip(losses) {
        let of_clients = record.by_client.values();
        let sums = of_clients.chain(&record.held_out).map(|metrics| metrics.loss_sum.to_bits());
        assert_eq!(sums.collect::<Vec<_>>(), [loss.to_bits(); 3]);
    }
}

fn the_state_changes_alone(store: &dyn Store) {
    let initial = store.put_model(&model(1, 10)).unwrap();
    store.create_run(RUN, "job", initial, Time(1)).unwrap();
    store.journal_attempt(RUN, &attempt(1, 1, 3)).unwrap();
    let failed = RunState::Failed { reason: Abandonment::UnfitModel { detail: "NaN".to_owned() } };
    for state in [RunState::Running, RunState::Stopped, failed, RunState::Finished] {
        let mut expected = store.run(RUN).unwrap();
        expected.head.state = state.clone();
        store.set_state(RUN, &state).unwrap();
        assert_eq!(store.run(RUN).unwrap(), expected);
    }
}

fn garbage_is_what_no_run_names(store: &dyn Store) {
    let digests: Vec<Digest> = (0..5).map(|seed| store.put_model(&model(seed, 10)).unwrap()).collect();
    store.create_run(RUN, "job", digests[0], Time(1)).unwrap();
    store.create_run(RunId(2), "job", digests[1], Time(1)).unwrap();
    store.commit_round(RUN, &record(1, 1, 3, Some(digests[2])), &head(1, 1, digests[2])).unwrap();
    store.commit_round(RUN, &record(2, 1, 3, Some(digests[3])), &head(2, 1, digests[3])).unwrap();
    assert_eq!(store.collect_garbage().unwrap(), 2);
    assert_eq!(store.collect_garbage().unwrap(), 0);
    for kept in [0, 1, 3] {
        assert_eq!(*store.model(digests[kept]).unwrap(), model(kept as u32, 10));
    }
    for gone in [2, 4] {
        assert!(missing(store.model(digests[gone]), "model"));
        assert_eq!(store.put_model(&model(gone as u32, 10)).unwrap(), digests[gone], "and can come back");
        store.model(digests[gone]).unwrap();
    }
}

fn a_token_is_taken_once(store: &dyn Store) {
    store.put_token(&token(1)).unwrap();
    store.put_token(&token(2)).unwrap();
    assert_eq!(store.take_token(token(1).secret_digest).unwrap(), Some(token(1)));
    assert_eq!(store.take_token(token(1).secret_digest).unwrap(), None);
    assert_eq!(store.take_token(token(2).secret_digest).unwrap(), Some(token(2)));
}

fn eight_threads_take_each_token_once(store: &dyn Store) {
    let taken = AtomicUsize::new(0);
    for number in 0..4 {
        store.put_token(&token(number)).unwrap();
    }
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for number in 0..4 {
                    if let Some(found) = store.take_token(token(number).secret_digest).unwrap() {
                        assert_eq!(found, token(number));
                        taken.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert_eq!(taken.into_inner(), 4);
}

fn eight_threads_commit_to_eight_runs(store: &dyn Store) {
    let initial = store.put_model(&model(0, 10)).unwrap();
    std::thread::scope(|scope| {
        for run in 1..=8 {
            scope.spawn(move || {
                store.create_run(RunId(run), "job", initial, Time(run)).unwrap();
                for round in 1..=3 {
                    store.journal_attempt(RunId(run), &attempt(round, 1, 400)).unwrap();
                    assert_eq!(store.run(RunId(run)).unwrap().open_attempt, Some(attempt(round, 1, 400)));
                    let done = record(round, 1, 60 * round, Some(initial));
                    store.commit_round(RunId(run), &done, &head(round, 1, initial)).unwrap();
                    // Readers of the other runs meet large values that are just being replaced.
                    assert!(store.runs().unwrap().iter().all(|stored| stored.head.model == initial));
                    assert_eq!(store.collect_garbage().unwrap(), 0);
                }
            });
        }
    });
    for run in 1..=8 {
        let expected: Vec<_> = (1..=3).map(|round| record(round, 1, 60 * round, Some(initial))).collect();
        assert_eq!(store.rounds(RunId(run)).unwrap(), expected);
    }
}

fn nodes_are_replaced_by_name(store: &dyn Store) {
    for number in [30, 4, 200] {
        store.put_node(&node(number, None)).unwrap();
    }
    let revoked = NodeRecord { identity: Digest::of(b"new"), ..node(4, Some(Time(8))) };
    store.put_node(&revoked).unwrap();
    assert_eq!(store.node(&name(4)).unwrap(), Some(revoked.clone()));
    assert_eq!(store.nodes().unwrap(), [revoked, node(30, None), node(200, None)]);
}

fn ledger_heads_are_replaced_by_node(store: &dyn Store) {
    assert_eq!(store.ledger_head(&name(4)).unwrap(), None);
    store.put_ledger_head(&name(4), &[1; 185]).unwrap();
    store.put_ledger_head(&name(40), &[2; 185]).unwrap();
    store.put_ledger_head(&name(4), &[3; 185]).unwrap();
    assert_eq!(store.ledger_head(&name(4)).unwrap(), Some(vec![3; 185]));
    assert_eq!(store.ledger_head(&name(40)).unwrap(), Some(vec![2; 185]));
}

/// One call, over few names, so that calls meet.
#[derive(Debug, Clone)]
enum Call {
    PutModel(u32),
    Model(u32),
    CollectGarbage,
    CreateRun(u64, u32),
    Journal(u64, u32),
    Commit(u64, u32, u32),
    Evaluate(u64, u32, u32),
    SetState(u64, bool),
    PutToken(u32),
    TakeToken(u32),
    PutNode(u32, bool),
    Node(u32),
    Reopen,
}

fn call() -> impl Strategy<Value = Call> {
    let (run, model, size) = (0..3u64, 0..4u32, prop_oneof![0..10u32, 10..120u32]);
    prop_oneof![
        3 => model.clone().prop_map(Call::PutModel),
        1 => model.clone().prop_map(Call::Model),
        1 => Just(Call::CollectGarbage),
        2 => (run.clone(), model.clone()).prop_map(|(run, model)| Call::CreateRun(run, model)),
        2 => (run.clone(), size.clone()).prop_map(|(run, size)| Call::Journal(run, size)),
        3 => (run.clone(), model, size.clone()).prop_map(|(run, model, size)| Call::Commit(run, model, size)),
        2 => (run.clone(), 0..3u32, size).prop_map(|(run, round, size)| Call::Evaluate(run, round, size)),
        1 => (run, any::<bool>()).prop_map(|(run, over)| Call::SetState(run, over)),
        1 => (0..3u32).prop_map(Call::PutToken),
        1 => (0..3u32).prop_map(Call::TakeToken),
        1 => (0..3u32, any::<bool>()).prop_map(|(number, revoked)| Call::PutNode(number, revoked)),
        1 => (0..3u32).prop_map(Call::Node),
        1 => Just(Call::Reopen),
    ]
}

/// The answer to `call` as text, errors included.
fn answer(store: &dyn Store, call: &Call, step: u32) -> String {
    let digest = |seed: &u32| tributary_common::model::digest(&model(*seed, 10));
    match call {
        Call::PutModel(seed) => format!("{:?}", store.put_model(&model(*seed, 10))),
        Call::Model(seed) => format!("{:?}", store.model(digest(seed))),
        Call::CollectGarbage => format!("{:?}", store.collect_garbage()),
        Call::CreateRun(run, seed) => {
            format!("{:?}", store.create_run(RunId(*run), "job", digest(seed), Time(u64::from(step / 4))))
        }
        Call::Journal(run, size) => {
            format!("{:?}", store.journal_attempt(RunId(*run), &attempt(step, 1, *size)))
        }
        Call::Commit(run, seed, size) => {
            let record = record(step, 1, *size, Some(digest(seed)));
            format!("{:?}", store.commit_round(RunId(*run), &record, &head(step, 1, digest(seed))))
        }
        Call::Evaluate(run, round, size) => {
            let record = evaluation(*round, 1.0 / f64::from(step + 3), *size);
            format!("{:?}", store.put_evaluation(RunId(*run), &record))
        }
        Call::SetState(run, over) => {
            let state = if *over { RunState::Finished } else { RunState::Running };
            format!("{:?}", store.set_state(RunId(*run), &state))
        }
        Call::PutToken(number) => format!("{:?}", store.put_token(&token(*number))),
        Call::TakeToken(number) => format!("{:?}", store.take_token(token(*number).secret_digest)),
        Call::PutNode(number, revoked) => {
            format!("{:?}", store.put_node(&node(*number, revoked.then_some(Time(u64::from(step))))))
        }
        Call::Node(number) => format!("{:?}", store.node(&name(*number))),
        Call::Reopen => String::new(),
    }
}

#[test]
fn a_store_of_the_last_keeps_what_opening_the_run_again_needs() {
    let (all, last) = (MemoryStore::new(), MemoryStore::keeping_the_last());
    for store in [&all, &last] {
        let digest = store.put_model(&model(1, 10)).unwrap();
        store.create_run(RUN, "job", digest, Time(1)).unwrap();
        for round in 1..=50 {
            store.commit_round(RUN, &record(round, 1, 3, Some(digest)), &head(round, 1, digest)).unwrap();
            store.put_evaluation(RUN, &evaluation(round, 1.5, 2)).unwrap();
        }
        for attempt in 1..=2 {
            let abandoned = record(51, attempt, 3, None);
            store.commit_round(RUN, &abandoned, &head(50, attempt + 1, digest)).unwrap();
        }
    }
    let published = |store: &MemoryStore| {
        let rounds = store.rounds(RUN).unwrap();
        rounds.into_iter().rev().find(|record| record.round == 50).unwrap()
    };
    assert_eq!(published(&last), published(&all));
    assert_eq!(last.run(RUN).unwrap(), all.run(RUN).unwrap());
    assert_eq!(last.evaluations(RUN).unwrap().last(), all.evaluations(RUN).unwrap().last());
    assert!(last.rounds(RUN).unwrap().len() <= 3 && last.evaluations(RUN).unwrap().len() == 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_twins_answer_alike(calls in proptest::collection::vec(call(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let memory = MemoryStore::new();
        let mut disk = Some(SledStore::open(dir.path()).unwrap());
        for (step, call) in (0..).zip(&calls) {
            if matches!(call, Call::Reopen) {
                drop(disk.take());
                disk = Some(SledStore::open(dir.path()).unwrap());
            }
            let disk = disk.as_ref().unwrap();
            prop_assert_eq!(answer(disk, call, step), answer(&memory, call, step), "{:?}", call);
        }
        drop(disk.take());
        let disk: Arc<dyn Store> = Arc::new(SledStore::open(dir.path()).unwrap());
        prop_assert_eq!(content(disk.as_ref()).unwrap(), content(&memory).unwrap());
    }
}
