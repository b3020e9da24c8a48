//! The driver with fake nodes over a store in memory.

use std::time::Duration;

use tributary_common::digest::Digest;
use tributary_common::model::{digest, to_bytes};
use tributary_common::progress::{Line, Progress};
use tributary_common::record::RunState;

use super::*;
use crate::run::Payload;
use crate::store::MemoryStore;

/// A job of `rounds` rounds with a cohort of `size`; its model has six parameters.
pub(crate) fn job(rounds: u32, size: u32, more: &str) -> String {
    format!(
        "name = 'test'\nseed = 7\nrounds = {rounds}\n\
         [model]\narchitecture = 'logistic'\ninputs = [2]\nclasses = 2\n\
         [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_steps = 1\nbatch_size = 1\n\
         [cohort]\nsize = {size}\ndeadline_seconds = 60\n{more}"
    )
}

/// A driver over `store`.
pub(crate) async fn start(store: &Arc<dyn Store>) -> (Driver, Ending) {
    let store = store.clone();
    tokio::task::spawn_blocking(move || Driver::start(store, None, Clock).unwrap()).await.unwrap()
}

pub(crate) fn memory() -> Arc<dyn Store> {
    Arc::new(MemoryStore::new())
}

pub(crate) fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), what).await.expect("it takes too long")
}

struct Node {
    driver: Driver,
    connection: Connection,
}

impl Node {
    async fn new(driver: &Driver, node: &str, role: Role) -> Self {
        Self { driver: driver.clone(), connection: driver.connect(name(node), role).await.unwrap() }
    }

    async fn next(&mut self) -> ToNode {
        soon(self.connection.outbox.recv()).await.expect("the connection is open")
    }

    async fn invited(&mut self) -> Attempt {
        match self.next().await {
            ToNode::Invite { run, round, attempt, .. } => Attempt { run, round, attempt },
            other => panic!("{other:?} instead of an invitation"),
        }
    }

    async fn send(&self, attempt: Attempt, delta: f32) -> Standing {
        let update = update(&self.connection.node, attempt.round, Payload::Bytes(to_bytes(&[delta; 6])));
        self.driver.update(attempt, update).await.unwrap()
    }

    /// Takes part in one round.
    async fn work(&mut self, delta: f32) -> Attempt {
        let attempt = self.invited().await;
        assert_eq!(self.send(attempt, delta).await, Standing::InSum);
        attempt
    }

    async fn dismissed(&mut self) -> Dismissal {
        match self.next().await {
            ToNode::Dismiss { reason, .. } => reason,
            other => panic!("{other:?} instead of a dismissal"),
        }
    }
}

fn update(node: &NodeName, round: u32, payload: Payload) -> Update {
    let digest = Some(Digest::of(b"its bytes"));
    Update { node: node.clone(), round, examples: 5, bytes: 24, digest, payload }
}

/// All lines of a run, to its end.
async fn lines(driver: &Driver, run: RunId, rounds: u32) -> Vec<Line> {
    let mut events = driver.watch(run);
    let mut progress = Progress::new(rounds);
    let mut lines = Vec::new();
    while let Some(event) = soon(events.recv()).await {
        let (at, event) = event.unwrap();
        lines.extend(progress.take(at, &event));
    }
    lines
}

fn model_of(line: &Line) -> Digest {
    match line {
        Line::Finished(summary) => summary.model_digest,
        other => panic!("{other:?} instead of the end"),
    }
}

/// The initial model of [`job`], and what `rounds` rounds of a mean delta make of it.
fn after(rounds: u32, delta: f32) -> Digest {
    let mut values = Job::parse(&job(1, 1, "")).unwrap().layout().unwrap().initial(7);
    for _ in 0..rounds {
        for value in &mut values {
            *value += delta;
        }
    }
    digest(&values)
}

#[tokio::test]
async fn a_run_from_its_submission_to_its_end() {
    let store = memory();
    let (driver, mut ending) = start(&store).await;
    let mut a = Node::new(&driver, "a", Role::Trainer).await;
    let mut b = Node::new(&driver, "b", Role::Trainer).await;
    let mut judge = Node::new(&driver, "judge", Role::Evaluator).await;
    assert!(driver.current().borrow().is_none());
    let run = driver.submit(job(2, 2, ""), None).await.unwrap();
    let watching = tokio::spawn({
        let driver = driver.clone();
        async move { lines(&driver, run, 2).await }
    });
    for round in 1..=2 {
        let attempt = a.work(0.25).await;
        assert_eq!((attempt.run, attempt.round, attempt.attempt), (run, round, 1));
        assert_eq!(driver.standing(&name("a"), attempt).await.unwrap(), Standing::InSum);
        assert_eq!(driver.standing(&name("b"), attempt).await.unwrap(), Standing::Wanted);
        assert_eq!(driver.current().borrow().as_ref().unwrap().attempt, Some(attempt));
        b.work(0.25).await;
        assert_eq!((a.dismissed().await, b.dismissed().await), (Dismissal::Published, Dismissal::Published));
        let ToNode::Evaluate { round: asked, model, .. } = judge.next().await else { panic!("not asked") };
        assert_eq!((asked, model), (round, after(round, 0.25)));
        let metrics = Metrics { examples: 4, loss_sum: 1.0, correct: 3, confusion: Vec::new() };
        driver.evaluated(&judge.connection, run, round, metrics).await.unwrap();
    }
    let lines = soon(watching).await.unwrap();
    assert!(matches!(
        lines[0],
        Line::Round { round: 1, accuracy: Some(0.75), completed: 2, bytes_up: 48, .. }
    ));
    assert_eq!((lines.len(), model_of(&lines[2])), (3, after(2, 0.25)));
    // Whoever comes late is told the same.
    let told = self::lines(&driver, run, 2).await;
    assert_eq!((told[0].to_string(), model_of(&told[2])), (lines[0].to_string(), after(2, 0.25)));
    assert_eq!(store.run(run).unwrap().head.state, RunState::Finished);
    assert!(driver.current().borrow().is_none());
    driver.drain().await;
    soon(ending.wait()).await.unwrap();
    assert!(matches!(driver.nodes().await, Err(Gone)));
    let mut events = driver.watch(run);
    while let Some(event) = soon(events.recv()).await {
        event.unwrap(); // the records are still there
    }
}

#[tokio::test]
async fn a_newer_connection_replaces_an_older_one_whose_end_comes_late() {
    let (driver, _ending) = start(&memory()).await;
    let mut old = Node::new(&driver, "a", Role::Trainer).await;
    let run = driver.submit(job(1, 1, ""), None).await.unwrap();
    let attempt = old.invited().await;
    let mut new = Node::new(&driver, "a", Role::Trainer).await;
    assert_eq!(new.invited().await, attempt, "the invitation is repeated");
    assert!(soon(old.connection.outbox.recv()).await.is_none());
    // What the old connection still says does not count.
    driver.declined(&old.connection, attempt, Reason::Busy).await.unwrap();
    driver.disconnect(old.connection).await;
    assert_eq!(driver.nodes().await.unwrap(), [(name("a"), Role::Trainer)]);
    assert_eq!(new.send(attempt, 1.0).await, Standing::InSum);
    assert_eq!(model_of(lines(&driver, run, 1).await.last().unwrap()), after(1, 1.0));
    driver.disconnect(new.connection).await;
    assert!(driver.nodes().await.unwrap().is_empty());
}

#[tokio::test]
async fn runs_go_one_after_another_and_can_be_stopped() {
    let store = memory();
    let (driver, _ending) = start(&store).await;
    let mut a = Node::new(&driver, "a", Role::Trainer).await;
    let mut runs = Vec::new();
    for _ in 0..4 {
        runs.push(driver.submit(job(1, 1, ""), None).await.unwrap());
    }
    let states =
        || store.runs().unwrap().into_iter().map(|run| (run.run, run.head.state)).collect::<Vec<_>>();
    let (queued, running) = (RunState::Queued, RunState::Running);
    let of = |states: [&RunState; 4]| runs.iter().copied().zip(states.map(Clone::clone)).collect::<Vec<_>>();
    assert_eq!(states(), of([&running, &queued, &queued, &queued]));
    let first = a.invited().await;
    assert_eq!(first.run, runs[0]);

    driver.stop(runs[2]).await.unwrap();
    assert!(matches!(lines(&driver, runs[2], 1).await[..], [Line::Stopped(_)]));
    driver.stop(runs[0]).await.unwrap();
    assert_eq!(a.dismissed().await, Dismissal::Abandoned);
    assert!(matches!(driver.stop(runs[0]).await, Err(StopError::Over(_))));
    assert!(matches!(driver.stop(RunId(1)).await, Err(StopError::Store(StoreError::Missing { .. }))));
    assert_eq!(states(), of([&RunState::Stopped, &running, &RunState::Stopped, &queued]));

    // An update for the stopped run is not wanted, and the node is told so again.
    assert_eq!(a.invited().await.run, runs[1]);
    assert_eq!(a.send(first, 9.0).await, Standing::Unwanted);
    a.dismissed().await;
    let second = Attempt { run: runs[1], ..first };
    assert_eq!(a.send(second, 0.5).await, Standing::InSum);
    assert_eq!(a.dismissed().await, Dismissal::Published);
    assert_eq!(a.work(0.5).await.run, runs[3]);
    assert_eq!(model_of(lines(&driver, runs[3], 1).await.last().unwrap()), after(1, 0.5));
}

#[tokio::test]
async fn a_restart_goes_on_with_the_open_attempt() {
    let store = memory();
    let (driver, mut ending) = start(&store).await;
    let (mut a, mut b) =
        (Node::new(&driver, "a", Role::Trainer).await, Node::new(&driver, "b", Role::Trainer).await);
    let run = driver.submit(job(2, 2, ""), None).await.unwrap();
    let waiting = driver.submit(job(1, 1, ""), None).await.unwrap();
    let attempt = a.work(0.5).await;
    assert_eq!(b.invited().await, attempt);
    driver.drain().await;
    soon(ending.wait()).await.unwrap();
    // The nodes lose their connections; to the run that is no event.
    assert!(soon(a.connection.outbox.recv()).await.is_none());
    drop((a, b, driver));

    let (driver, _ending) = start(&store).await;
    assert_eq!(driver.current().borrow().as_ref().unwrap().attempt, Some(attempt));
    let mut a = Node::new(&driver, "a", Role::Trainer).await;
    assert_eq!(a.work(0.5).await, attempt, "what was in the lost sum is asked for again");
    let mut b = Node::new(&driver, "b", Role::Trainer).await;
    b.work(0.5).await;
    for node in [&mut a, &mut b] {
        assert_eq!(node.dismissed().await, Dismissal::Published);
        node.work(0.5).await;
    }
    assert_eq!(model_of(lines(&driver, run, 2).await.last().unwrap()), after(2, 0.5));
    // Then the one that was waiting.
    assert_eq!(a.dismissed().await, Dismissal::Published);
    assert_eq!(a.work(0.5).await.run, waiting);
}

#[tokio::test]
async fn a_node_that_does_not_read_is_disconnected() {
    let (driver, _ending) = start(&memory()).await;
    let mut deaf = Node::new(&driver, "deaf", Role::Trainer).await;
    let stale = Attempt { run: RunId(1), round: 1, attempt: 1 };
    for _ in 0..OUTBOX {
        driver.standing(&name("deaf"), stale).await.unwrap();
    }
    assert_eq!(driver.nodes().await.unwrap().len(), 1);
    driver.standing(&name("deaf"), stale).await.unwrap();
    assert!(driver.nodes().await.unwrap().is_empty());
    for _ in 0..OUTBOX {
        deaf.dismissed().await;
    }
    assert!(soon(deaf.connection.outbox.recv()).await.is_none());
}

#[tokio::test]
async fn an_error_of_the_disk_ends_the_driver_and_nothing_is_lost() {
    let store = memory();
    let (driver, mut ending) = start(&store).await;
    let mut a = Node::new(&driver, "a", Role::Trainer).await;
    let run = driver.submit(job(1, 1, ""), None).await.unwrap();
    let attempt = a.invited().await;
    let folder = tempfile::tempdir().unwrap();
    // Opened for writing only: it cannot be read again.
    let unreadable = Payload::File(std::fs::File::create(folder.path().join("update")).unwrap());
    assert!(driver.update(attempt, update(&name("a"), 1, unreadable)).await.is_err());
    let why = soon(ending.wait()).await.unwrap_err();
    assert!(why.contains("the staged update of a cannot be read again"), "{why}");
    assert!(soon(driver.watch(run).recv()).await.unwrap().is_err());

    let (driver, _ending) = start(&store).await;
    let mut a = Node::new(&driver, "a", Role::Trainer).await;
    assert_eq!(a.work(1.0).await, attempt);
    assert_eq!(model_of(lines(&driver, run, 1).await.last().unwrap()), after(1, 1.0));
}

#[tokio::test]
async fn a_job_of_another_version_does_not_hold_up_the_others() {
    let store = memory();
    let model = store.put_model(&[0.0; 6]).unwrap();
    store.create_run(RunId(1), "from = 'the future'", model, Time(1)).unwrap();
    let (driver, _ending) = start(&store).await;
    let mut a = Node::new(&driver, "a", Role::Trainer).await;
    let run = driver.submit(job(1, 1, ""), None).await.unwrap();
    assert_eq!(a.work(1.0).await.run, run);
    assert_eq!(lines(&driver, run, 1).await.len(), 2);
    driver.stop(RunId(1)).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_run_is_not_submitted() {
    let (driver, _ending) = start(&memory()).await;
    let refused = driver.submit(job(0, 1, ""), None).await.unwrap_err().to_string();
    assert!(refused.contains("the job is refused: rounds = 0"), "{refused}");
    let refused = driver.submit(job(1, 1, ""), Some(b"nonsense".to_vec())).await.unwrap_err().to_string();
    assert!(refused.contains("the initial model is refused: not a .safetensors file"), "{refused}");
    let layout = Job::parse(&job(1, 1, "")).unwrap().layout().unwrap();
    let file = tributary_common::model::export(&layout, &[2.0; 6]).unwrap();
    let run = driver.submit(job(1, 1, ""), Some(file)).await.unwrap();
    assert_eq!(driver.store().run(run).unwrap().head.model, digest(&[2.0; 6]));
}

#[tokio::test]
async fn an_impossible_report_says_nothing() {
    let (driver, _ending) = start(&memory()).await;
    let mut a = Node::new(&driver, "a", Role::Trainer).await;
    let mut judge = Node::new(&driver, "judge", Role::Evaluator).await;
    let run = driver.submit(job(1, 1, ""), None).await.unwrap();
    a.work(1.0).await;
    assert!(matches!(judge.next().await, ToNode::Evaluate { .. }));
    let metrics = Metrics { examples: 4, loss_sum: 1.0, correct: 3, confusion: vec![Some(1); 9] };
    driver.evaluated(&judge.connection, run, 1, metrics).await.unwrap();
    let lines = lines(&driver, run, 1).await;
    assert!(matches!(lines[0], Line::Round { accuracy: None, .. }));
}

/// A node that was away when a run ended still learns that it is over, and gives back what it had set aside.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_back_is_told_which_runs_are_over() {
    let folder = tempfile::tempdir().unwrap();
    let key = tributary_common::ledger::head::LedgerKey::from_seed([7; 32]);
    let ledgers = Ledgers::new(folder.path().join("ledgers"), key, b"authority").unwrap();
    let (store, clock) = (memory(), Clock);
    let starting = (store.clone(), ledgers.clone());
    let start = move || Driver::start(starting.0, Some(starting.1), clock).unwrap();
    let (driver, mut ending) = tokio::task::spawn_blocking(start).await.unwrap();
    let mut early = Node::new(&driver, "early", Role::Trainer).await;
    assert_eq!(early.next().await, ToNode::KnownHead(None));
    let run = driver.submit(job(2, 9, ""), None).await.unwrap();
    driver.stop(run).await.unwrap();
    assert_eq!(early.next().await, ToNode::RunOver(run));
    let mut late = Node::new(&driver, "late", Role::Trainer).await;
    assert_eq!([late.next().await, late.next().await], [ToNode::KnownHead(None), ToNode::RunOver(run)]);
    assert!(driver.export_ledger(run).await.unwrap().unwrap().contains("run-ended"));
    driver.drain().await;
    ending.wait().await.unwrap();

    // The next coordinator on this folder knows it too.
    let start = move || Driver::start(store, Some(ledgers), clock).unwrap();
    let (driver, _ending) = tokio::task::spawn_blocking(start).await.unwrap();
    let mut again = Node::new(&driver, "late", Role::Trainer).await;
    assert_eq!([again.next().await, again.next().await], [ToNode::KnownHead(None), ToNode::RunOver(run)]);
    driver.drain().await;
}
