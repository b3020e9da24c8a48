//! Worker threads: each owns a trainer, takes work from one queue, and answers with the work's ticket.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use tributary_client::shard::Shard;
use tributary_client::trainer::{ClientUpdate, Task, Trainer};
use tributary_common::job::Job;
use tributary_common::model::Parameters;
use tributary_common::record::Metrics;

/// Makes one worker's trainer, on the worker's own thread.
pub type MakeTrainer = Arc<dyn Fn() -> Result<Box<dyn Trainer>, String> + Send + Sync>;

/// What a worker is given to do.
pub(crate) enum Work {
    /// A client's local training.
    Train {
        /// What to train.
        task: Task,
        /// On what.
        shard: Shard,
    },
    /// An evaluation.
    Evaluate {
        /// The job.
        job: Arc<Job>,
        /// The model.
        model: Parameters,
        /// On what.
        shard: Shard,
    },
}

/// What came of it; errors are one line.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Of training.
    Trained(Result<ClientUpdate, String>),
    /// Of an evaluation.
    Evaluated(Result<Metrics, String>),
}

struct Assignment {
    ticket: u64,
    work: Work,
    stop: Arc<AtomicBool>,
}

/// The threads. Dropping the pool stops what they do and waits for them.
pub(crate) struct Pool {
    queue: Option<mpsc::Sender<Assignment>>,
    answers: mpsc::Receiver<(u64, Outcome)>,
    threads: Vec<JoinHandle<()>>,
    /// Set when the pool is dropped: queued work is answered without being done.
    closing: Arc<AtomicBool>,
}

impl Pool {
    /// Starts `workers` threads.
    pub(crate) fn start(workers: usize, make: &MakeTrainer) -> std::io::Result<Self> {
        let (queue, work) = mpsc::channel::<Assignment>();
        let (answer, answers) = mpsc::channel();
        let work = Arc::new(Mutex::new(work));
        let closing = Arc::new(AtomicBool::new(false));
        let mut pool = Self { queue: Some(queue), answers, threads: Vec::new(), closing: closing.clone() };
        for index in 0..workers {
            let (make, work, answer, closing) = (make.clone(), work.clone(), answer.clone(), closing.clone());
            let thread = std::thread::Builder::new().name(format!("worker-{index}"));
            pool.threads.push(thread.spawn(move || work_off(&make, &work, &answer, &closing))?);
        }
        Ok(pool)
    }

    /// Queues work under `ticket`. `stop` ends training early.
    pub(crate) fn assign(&self, ticket: u64, work: Work, stop: Arc<AtomicBool>) {
        if let Some(queue) = &self.queue {
            // A worker lives as long as the queue does: sending cannot fail.
            let _ = queue.send(Assignment { ticket, work, stop });
        }
    }

    /// Waits for the next answer, at most `patience`.
    pub(crate) fn answer(&self, patience: Duration) -> Option<(u64, Outcome)> {
        self.answers.recv_timeout(patience).ok()
    }

    /// An answer that is here already.
    pub(crate) fn answered(&self) -> Option<(u64, Outcome)> {
        self.answers.try_recv().ok()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        self.queue = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn work_off(
    make: &MakeTrainer,
    queue: &Mutex<mpsc::Receiver<Assignment>>,
    answers: &mpsc::Sender<(u64, Outcome)>,
    closing: &AtomicBool,
) {
    let mut trainer: Option<Box<dyn Trainer>> = None;
    loop {
        let next = queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).recv();
        let Ok(Assignment { ticket, work, stop }) = next else { return };
        if closing.load(Ordering::Relaxed) {
            continue;
        }
        let mut made = match trainer.take().map_or_else(|| make(), Ok) {
            Ok(made) => made,
            Err(problem) => {
                let _ = answers.send((ticket, failed(&work, problem)));
                continue;
            }
        };
        // A trainer that panicked is not used again.
        let done = catch_unwind(AssertUnwindSafe(|| {
            let outcome = perform(made.as_mut(), &work, &stop);
            (outcome, made)
        }));
        let outcome = match done {
            Ok((outcome, made)) => {
                trainer = Some(made);
                outcome
            }
            Err(_) => failed(&work, "the trainer panicked; this is a bug".to_owned()),
        };
        if answers.send((ticket, outcome)).is_err() {
            return;
        }
    }
}

fn perform(trainer: &mut dyn Trainer, work: &Work, stop: &AtomicBool) -> Outcome {
    match work {
        Work::Train { task, shard } => {
            Outcome::Trained(trainer.train(task, &shard.as_seen(), stop).map_err(|error| error.to_string()))
        }
        Work::Evaluate { job, model, shard } => Outcome::Evaluated(
            trainer.evaluate(job, model, &shard.as_seen()).map_err(|error| error.to_string()),
        ),
    }
}

fn failed(work: &Work, problem: String) -> Outcome {
    match work {
        Work::Train { .. } => Outcome::Trained(Err(problem)),
        Work::Evaluate { .. } => Outcome::Evaluated(Err(problem)),
    }
}
