//! The coordinator's disk: a store in memory that can be full, and at a chosen write dies with the process, before the
//! write is durable or after it, without saying so.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::model::Parameters;
use tributary_common::record::{EvaluationRecord, RoundRecord, RunState};
use tributary_common::time::Time;
use tributary_server::store::{
    AttemptRecord, MemoryStore, NodeRecord, RunHead, Store, StoreError, StoredRun, TokenRecord,
};

/// The disk. It outlives the processes that use it.
#[derive(Debug)]
pub(super) struct Disk {
    state: Mutex<State>,
    /// Whether a round's commit is acknowledged before it is durable: a planted bug.
    forgets: bool,
}

#[derive(Debug)]
struct State {
    content: MemoryStore,
    full: bool,
    /// Writes until the process dies, and whether the last one is durable then.
    deadly: Option<(u32, bool)>,
    /// With a process that died, nothing works until the next one.
    dead: bool,
    /// What the disk held before the last round was committed.
    before: Option<MemoryStore>,
}

impl Disk {
    /// An empty disk; one that `forgets` loses its last round, and what came after, when the process dies.
    pub(super) fn new(forgets: bool) -> Self {
        let content = MemoryStore::new();
        let state = State { content, full: false, deadly: None, dead: false, before: None };
        Self { state: Mutex::new(state), forgets }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process dies at the write after `writes` more: every second time before it is durable.
    pub(super) fn arm(&self, writes: Option<u32>) {
        let mut state = self.lock();
        let durable = writes.is_some_and(|writes| writes % 2 == 0);
        state.deadly = writes.map(|writes| (writes / 2, durable));
    }

    pub(super) fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    /// A process ended: the next one finds what was durable.
    pub(super) fn process_ended(&self) {
        let mut state = self.lock();
        state.dead = false;
        state.deadly = None;
        if self.forgets
            && let Some(before) = state.before.take()
        {
            state.content = before;
        }
        state.before = None;
    }

    /// All that was written is durable, even on a disk that forgets.
    pub(super) fn is_flushed(&self) {
        self.lock().before = None;
    }

    /// A copy of what is on the disk.
    pub(super) fn content(&self) -> MemoryStore {
        self.lock().content.copy()
    }

    fn about_to_commit(&self) {
        let mut state = self.lock();
        if self.forgets && !state.dead && !state.full {
            state.before = Some(state.content.copy());
        }
    }

    fn error(what: &str) -> StoreError {
        StoreError::Io { path: "the world's disk".to_owned(), what: what.to_owned() }
    }

    fn read<T>(&self, read: impl FnOnce(&MemoryStore) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let state = self.lock();
        if state.dead { Err(Self::error("the process is dead")) } else { read(&state.content) }
    }

    fn write<T>(&self, write: impl FnOnce(&MemoryStore) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut state = self.lock();
        if state.dead {
            return Err(Self::error("the process is dead"));
        }
        if state.full {
            return Err(Self::error("no space left on the device"));
        }
        match &mut state.deadly {
            Some((0, durable)) => {
                let durable = *durable;
                state.dead = true;
                if durable {
                    write(&state.content)?;
                    state.before = None;
                }
                Err(Self::error("the process died at this write"))
            }
            Some((left, _)) => {
                *left -= 1;
                write(&state.content)
            }
            None => write(&state.content),
        }
    }
}

/// The disk as a process has it.
#[derive(Debug, Clone)]
pub(super) struct Mounted(pub(super) std::sync::Arc<Disk>);

macro_rules! writes {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, $($argument: $type),*) -> Result<$result, StoreError> {
            self.0.write(|store| store.$name($($argument),*))
        })*
    };
}

macro_rules! reads {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, $($argument: $type),*) -> Result<$result, StoreError> {
            self.0.read(|store| store.$name($($argument),*))
        })*
    };
}

impl Store for Mounted {
    fn commit_round(&self, run: RunId, record: &RoundRecord, head: &RunHead) -> Result<(), StoreError> {
        self.0.about_to_commit();
        self.0.write(|store| store.commit_round(run, record, head))
    }

    writes! {
        put_model(values: &[f32]) -> Digest;
        put_state(state: &[u8]) -> Digest;
        collect_garbage() -> usize;
        create_run(run: RunId, job_toml: &str, initial: Digest, submitted: Time) -> ();
        journal_attempt(run: RunId, attempt: &AttemptRecord) -> ();
        journal_session(run: RunId, session: &[u8]) -> ();
        put_evaluation(run: RunId, record: &EvaluationRecord) -> ();
        set_state(run: RunId, state: &RunState) -> ();
        put_token(token: &TokenRecord) -> ();
        take_token(secret_digest: Digest) -> Option<TokenRecord>;
        put_node(node: &NodeRecord) -> ();
        put_ledger_head(node: &NodeName, head: &[u8]) -> ();
    }
    reads! {
        model(digest: Digest) -> Parameters;
        state(digest: Digest) -> Vec<u8>;
        runs() -> Vec<StoredRun>;
        run(run: RunId) -> StoredRun;
        session(run: RunId) -> Option<Vec<u8>>;
        rounds(run: RunId) -> Vec<RoundRecord>;
        evaluations(run: RunId) -> Vec<EvaluationRecord>;
        node(name: &NodeName) -> Option<NodeRecord>;
        ledger_head(node: &NodeName) -> Option<Vec<u8>>;
        nodes() -> Vec<NodeRecord>;
    }
}
