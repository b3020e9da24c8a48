//! The store in memory: for simulation and tests, with the same answers as the one on a disk.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::model::{self, Parameters};
use tributary_common::record::{EvaluationRecord, RoundRecord, RunState};
use tributary_common::time::Time;

use super::{
    AttemptRecord, NodeRecord, RunHead, Store, StoreError, StoredRun, TokenRecord, missing_model, missing_run,
};

/// A coordinator's state that ends with the process.
#[derive(Debug, Default)]
pub struct MemoryStore {
    state: Mutex<State>,
    /// Whether only each run's last round and evaluation are kept.
    last_only: bool,
}

#[derive(Debug, Default, Clone)]
struct State {
    models: BTreeMap<Digest, Parameters>,
    states: BTreeMap<Digest, Vec<u8>>,
    runs: BTreeMap<RunId, Run>,
    tokens: BTreeMap<Digest, TokenRecord>,
    nodes: BTreeMap<NodeName, NodeRecord>,
    ledger_heads: BTreeMap<NodeName, Vec<u8>>,
}

#[derive(Debug, Clone)]
struct Run {
    stored: StoredRun,
    initial: Digest,
    session: Option<Vec<u8>>,
    rounds: Vec<RoundRecord>,
    evaluations: BTreeMap<u32, EvaluationRecord>,
}

impl State {
    fn run(&self, run: RunId) -> Result<&Run, StoreError> {
        self.runs.get(&run).ok_or_else(|| missing_run(run))
    }

    fn run_mut(&mut self, run: RunId) -> Result<&mut Run, StoreError> {
        self.runs.get_mut(&run).ok_or_else(|| missing_run(run))
    }

    fn check_model(&self, digest: Digest) -> Result<(), StoreError> {
        if self.models.contains_key(&digest) || self.states.contains_key(&digest) {
            Ok(())
        } else {
            Err(missing_model(digest))
        }
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty store that keeps of each run the last attempt's record, the last published round's and the last
    /// evaluation, all that opening it again needs: for long runs whose records go elsewhere as they are made.
    pub fn keeping_the_last() -> Self {
        Self { last_only: true, ..Self::default() }
    }

    /// Another store with the same content: what a disk holds at this moment.
    pub fn copy(&self) -> Self {
        Self { state: Mutex::new(self.lock().clone()), last_only: self.last_only }
    }

    /// No method leaves the state half changed, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    fn put_model(&self, values: &[f32]) -> Result<Digest, StoreError> {
        let digest = model::digest(values);
        self.lock().models.entry(digest).or_insert_with(|| Arc::new(values.to_vec()));
        Ok(digest)
    }

    fn model(&self, digest: Digest) -> Result<Parameters, StoreError> {
        self.lock().models.get(&digest).cloned().ok_or_else(|| missing_model(digest))
    }

    fn put_state(&self, state: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(state);
        self.lock().states.insert(digest, state.to_vec());
        Ok(digest)
    }

    fn state(&self, digest: Digest) -> Result<Vec<u8>, StoreError> {
        let missing = || StoreError::Missing { what: "state", name: digest.to_string() };
        self.lock().states.get(&digest).cloned().ok_or_else(missing)
    }

    fn collect_garbage(&self) -> Result<usize, StoreError> {
        let mut state = self.lock();
        let named: BTreeSet<Digest> =
            state.runs.values().flat_map(|run| run.stored.head.named().chain([run.initial])).collect();
        let before = state.models.len() + state.states.len();
        state.models.retain(|digest, _| named.contains(digest));
        state.states.retain(|digest, _| named.contains(digest));
        Ok(before - state.models.len() - state.states.len())
    }

    fn create_run(
        &self,
        run: RunId,
        job_toml: &str,
        initial: Digest,
        submitted: Time,
    ) -> Result<(), StoreError> {
        let mut state = self.lock();
        if state.runs.contains_key(&run) {
            return Err(StoreError::Exists { what: "run", name: run.to_string() });
        }
        state.check_model(initial)?;
        let head = RunHead {
            published: 0,
            attempt: 1,
            model: initial,
            state: RunState::Queued,
            clip_norm: None,
            support: None,
        };
        let stored = StoredRun { run, job_toml: job_toml.to_owned(), submitted, head, open_attempt: None };
        state.runs.insert(
            run,
            Run { stored, initial, session: None, rounds: Vec::new(), evaluations: BTreeMap::new() },
        );
        Ok(())
    }

    fn runs(&self) -> Result<Vec<StoredRun>, StoreError> {
        let mut runs: Vec<StoredRun> = self.lock().runs.values().map(|run| run.stored.clone()).collect();
        runs.sort_by_key(|run| (run.submitted, run.run));
        Ok(runs)
    }

    fn run(&self, run: RunId) -> Result<StoredRun, StoreError> {
        Ok(self.lock().run(run)?.stored.clone())
    }

    fn journal_attempt(&self, run: RunId, attempt: &AttemptRecord) -> Result<(), StoreError> {
        let mut state = self.lock();
        let run = state.run_mut(run)?;
        run.stored.open_attempt = Some(attempt.clone());
        run.session = None;
        Ok(())
    }

    fn journal_session(&self, run: RunId, session: &[u8]) -> Result<(), StoreError> {
        self.lock().run_mut(run)?.session = Some(session.to_vec());
        Ok(())
    }

    fn session(&self, run: RunId) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.lock().run(run)?.session.clone())
    }

    fn commit_round(&self, run: RunId, record: &RoundRecord, head: &RunHead) -> Result<(), StoreError> {
        let mut state = self.lock();
        state.run(run)?;
        head.named().try_for_each(|digest| state.check_model(digest))?;
        let found = state.run_mut(run)?;
        if self.last_only {
            found.rounds.retain(|kept| kept.round == head.published);
        }
        found.rounds.push(record.clone());
        found.stored.head = head.clone();
        found.stored.open_attempt = None;
        found.session = None;
        Ok(())
    }

    fn put_evaluation(&self, run: RunId, record: &EvaluationRecord) -> Result<(), StoreError> {
        let mut state = self.lock();
        let evaluations = &mut state.run_mut(run)?.evaluations;
        if self.last_only {
            evaluations.clear();
        }
        evaluations.insert(record.round, record.clone());
        Ok(())
    }

    fn set_state(&self, run: RunId, state: &RunState) -> Result<(), StoreError> {
        self.lock().run_mut(run)?.stored.head.state = state.clone();
        Ok(())
    }

    fn rounds(&self, run: RunId) -> Result<Vec<RoundRecord>, StoreError> {
        Ok(self.lock().run(run)?.rounds.clone())
    }

    fn evaluations(&self, run: RunId) -> Result<Vec<EvaluationRecord>, StoreError> {
        Ok(self.lock().run(run)?.evaluations.values().cloned().collect())
    }

    fn put_token(&self, token: &TokenRecord) -> Result<(), StoreError> {
        self.lock().tokens.insert(token.secret_digest, token.clone());
        Ok(())
    }

    fn take_token(&self, secret_digest: Digest) -> Result<Option<TokenRecord>, StoreError> {
        Ok(self.lock().tokens.remove(&secret_digest))
    }

    fn put_node(&self, node: &NodeRecord) -> Result<(), StoreError> {
        self.lock().nodes.insert(node.name.clone(), node.clone());
        Ok(())
    }

    fn put_ledger_head(&self, node: &NodeName, head: &[u8]) -> Result<(), StoreError> {
        self.lock().ledger_heads.insert(node.clone(), head.to_vec());
        Ok(())
    }

    fn ledger_head(&self, node: &NodeName) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.lock().ledger_heads.get(node).cloned())
    }

    fn node(&self, name: &NodeName) -> Result<Option<NodeRecord>, StoreError> {
        Ok(self.lock().nodes.get(name).cloned())
    }

    fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError> {
        Ok(self.lock().nodes.values().cloned().collect())
    }
}
