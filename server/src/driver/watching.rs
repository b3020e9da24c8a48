//! A run as a watcher sees it: the records of what happened, then the events as they come.

use std::sync::Arc;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tributary_common::ids::RunId;
use tributary_common::progress::history;
use tributary_common::record::RunEvent;
use tributary_common::time::Time;

use super::{Driver, Gone};
use crate::store::{Store, StoreError, StoredRun};

/// Events that may wait for a watcher.
const WAITING_EVENTS: usize = 64;

/// Why a watch ends before the run is over.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The records cannot be read, or the run does not exist.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The driver has ended.
    #[error(transparent)]
    Gone(#[from] Gone),
}

type Watched = Result<(Option<Time>, RunEvent), WatchError>;

/// How far a watcher was told.
#[derive(Debug, Default)]
struct Told {
    /// The last ended attempt.
    attempt: (u32, u32),
    /// The last evaluated round.
    evaluated: Option<u32>,
}

impl Told {
    /// Notes an event; `false` if it was told before.
    fn note(&mut self, event: &RunEvent) -> bool {
        match event {
            RunEvent::RoundEnded { record } => {
                let attempt = (record.round, record.attempt);
                let new = attempt > self.attempt;
                self.attempt = self.attempt.max(attempt);
                new
            }
            RunEvent::Evaluated { record } => {
                let new = self.evaluated.is_none_or(|round| record.round > round);
                self.evaluated = self.evaluated.max(Some(record.round));
                new
            }
            _ => true,
        }
    }
}

pub(super) fn watch(driver: &Driver, run: RunId) -> mpsc::Receiver<Watched> {
    let (sender, receiver) = mpsc::channel(WAITING_EVENTS);
    let driver = driver.clone();
    tokio::spawn(async move {
        if let Err(error) = follow(&driver, run, &sender).await {
            let _ = sender.send(Err(error)).await;
        }
    });
    receiver
}

async fn follow(driver: &Driver, run: RunId, to: &mpsc::Sender<Watched>) -> Result<(), WatchError> {
    let mut told = Told::default();
    loop {
        // Subscribed before the records are read: what happens in between comes twice, and is told once.
        let live = driver.happened.upgrade().map(|sender| sender.subscribe());
        let store = driver.store.clone();
        let past =
            tokio::task::spawn_blocking(move || past(store.as_ref(), run)).await.map_err(|_| Gone)??;
        for event in past {
            let last = matches!(event, RunEvent::Ended { .. });
            // An error means that nobody watches any more.
            if told.note(&event) && to.send(Ok((None, event))).await.is_err() || last {
                return Ok(());
            }
        }
        let mut live = live.ok_or(Gone)?;
        loop {
            let happened = tokio::select! {
                () = to.closed() => return Ok(()),
                happened = live.recv() => happened,
            };
            match happened {
                Ok(happened) if happened.run == run => {
                    let happened = Arc::unwrap_or_clone(happened);
                    let last = matches!(happened.event, RunEvent::Ended { .. });
                    let new = told.note(&happened.event);
                    if new && to.send(Ok((Some(happened.at), happened.event))).await.is_err() || last {
                        return Ok(());
                    }
                }
                Ok(_) => {}
                // Too far behind: what was missed is in the records.
                Err(RecvError::Lagged(_)) => break,
                Err(RecvError::Closed) => return Err(Gone.into()),
            }
        }
    }
}

/// What the records tell, in the order in which it happened.
fn past(store: &dyn Store, run: RunId) -> Result<Vec<RunEvent>, StoreError> {
    // The state first: if it says that the run is over, the records below are complete.
    let StoredRun { head, .. } = store.run(run)?;
    let mut events = history(store.rounds(run)?, store.evaluations(run)?);
    if head.state.is_over() {
        events.push(RunEvent::Ended { state: head.state, rounds: head.published, model: head.model });
    }
    Ok(events)
}
