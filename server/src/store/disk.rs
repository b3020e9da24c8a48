//! The store on a disk: models in files named by their digests, all the rest in [`Database`].
//!
//! The folder holds `store.jsonl` (format, number of the last acknowledged write, lock), `store/` (sled),
//! `records/` (values too large for sled) and `models/`. A model is durable before any entry names it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::model::{self, Parameters};
use tributary_common::record::{EvaluationRecord, Metrics, RoundRecord, RunState};
use tributary_common::time::Time;

use super::database::{Database, Write};
use super::files::{ContentFolder, create_folder, io_error};
use super::sequence::{SEQUENCE_FILE, SequenceFile};
use super::{
    AttemptRecord, NodeRecord, RunHead, Store, StoreError, StoredRun, TokenRecord, missing_model, missing_run,
};

/// Values encoded at a time.
const PART_VALUES: usize = 1 << 18;

/// A write after which a drill lets the process stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// A cohort, before anybody is invited.
    AttemptWritten,
    /// Where a secure-aggregation session stands.
    SessionWritten,
    /// A model, which no run names yet.
    ModelWritten,
    /// The end of an attempt, of which nobody knows yet.
    RoundWritten,
}

/// A coordinator's durable state in one folder, which one process may open at a time.
#[derive(Debug)]
pub struct SledStore {
    pub(super) models: ContentFolder,
    pub(super) database: Database,
    /// How many snapshots are being read: meanwhile no model is deleted.
    pub(super) snapshots: AtomicUsize,
    /// For drills: at which write the process stands still, to be killed, and how many of these are left until then.
    until_pause: Option<(Moment, AtomicU32)>,
}

/// What never changes of a run.
#[derive(Serialize, Deserialize)]
struct JobEntry {
    job_toml: String,
    submitted: Time,
}

/// What changes of a run: one entry, so that a reader sees head and attempt of the same moment.
#[derive(Serialize, Deserialize)]
struct RunEntry {
    head: RunHead,
    initial: Digest,
    /// Attempts ended: the number of the next round record.
    ended: u32,
    open_attempt: Option<AttemptRecord>,
}

/// An evaluation. JSON knows no NaN: loss sums that are not finite stand beside the record, as bits.
#[derive(Serialize, Deserialize)]
struct EvaluationEntry {
    record: EvaluationRecord,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    odd_held_out: Option<u64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    odd_clients: BTreeMap<NodeName, u64>,
}

impl EvaluationEntry {
    fn new(record: &EvaluationRecord) -> Self {
        let take = |metrics: &mut Metrics| {
            let odd = (!metrics.loss_sum.is_finite()).then(|| metrics.loss_sum.to_bits());
            if odd.is_some() {
                metrics.loss_sum = 0.0;
            }
            odd
        };
        let mut record = record.clone();
        let odd_held_out = record.held_out.as_mut().and_then(take);
        let clients = record.by_client.iter_mut();
        let odd_clients =
            clients.filter_map(|(name, metrics)| Some((name.clone(), take(metrics)?))).collect();
        Self { record, odd_held_out, odd_clients }
    }

    fn into_record(mut self) -> EvaluationRecord {
        if let (Some(bits), Some(metrics)) = (self.odd_held_out, &mut self.record.held_out) {
            metrics.loss_sum = f64::from_bits(bits);
        }
        for (name, bits) in self.odd_clients {
            if let Some(metrics) = self.record.by_client.get_mut(&name) {
                metrics.loss_sum = f64::from_bits(bits);
            }
        }
        self.record
    }
}

fn job_key(run: RunId) -> String {
    format!("job/{run}")
}

fn run_key(run: RunId) -> String {
    format!("run/{run}")
}

fn session_key(run: RunId) -> String {
    format!("session/{run}")
}

fn node_key(name: &NodeName) -> String {
    format!("node/{name}")
}

fn ledger_head_key(name: &NodeName) -> String {
    format!("ledger-head/{name}")
}

impl SledStore {
    /// Opens the store in `dir`; creates it if `dir` is missing or empty. Reads and checks every entry.
    ///
    /// # Errors
    /// [`StoreError::InUse`] if it is open already, here or in another process; [`StoreError::Format`] if
    /// another version wrote it; [`StoreError::Damaged`] if anything is missing or not as it was written;
    /// [`StoreError::Io`] if the system refuses.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        create_folder(dir)?;
        let (sequence, acknowledged) = SequenceFile::open(dir)?;
        let models = dir.join("models");
        let acknowledged = match acknowledged {
            Some(acknowledged) => acknowledged,
            None if dir.join("store").join("db").exists() || ContentFolder::holds_any(&models)? => {
                return Err(StoreError::Damaged {
                    what: "the count of writes",
                    path: dir.join(SEQUENCE_FILE).display().to_string(),
                    detail: "it is missing or empty beside a store that is not".to_owned(),
                });
            }
            None => {
                sequence.create(dir)?;
                0
            }
        };
        let models = ContentFolder::open(models, "model")?;
        let database = Database::open(dir, sequence, acknowledged)?;
        Ok(Self { models, database, snapshots: AtomicUsize::new(0), until_pause: None })
    }

    /// For drills: the process stands still for good at the `count`th such moment.
    pub fn standing_still_at(self, moment: Moment, count: u32) -> Self {
        Self { until_pause: Some((moment, AtomicU32::new(count))), ..self }
    }

    fn drill(&self, moment: Moment) {
        if let Some((at, left)) = &self.until_pause
            && *at == moment
            && left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            tracing::warn!("drill: stands still");
            loop {
                std::thread::sleep(std::time::Duration::from_secs(3600));
            }
        }
    }

    fn entry(&self, run: RunId) -> Result<RunEntry, StoreError> {
        self.database.get(&run_key(run))?.ok_or_else(|| missing_run(run))
    }

    fn stored(&self, run: RunId, entry: RunEntry) -> Result<StoredRun, StoreError> {
        let job: Option<JobEntry> = self.database.get(&job_key(run))?;
        let JobEntry { job_toml, submitted } = job.ok_or_else(|| missing_run(run))?;
        Ok(StoredRun { run, job_toml, submitted, head: entry.head, open_attempt: entry.open_attempt })
    }

    /// The models and states that runs name.
    pub(super) fn named(&self) -> Result<BTreeSet<Digest>, StoreError> {
        let entries: Vec<(String, RunEntry)> = self.database.scan("run/")?;
        Ok(entries.iter().flat_map(|(_, entry)| entry.head.named().chain([entry.initial])).collect())
    }

    fn check_model(&self, digest: Digest) -> Result<(), StoreError> {
        self.models.length(digest)?.map(|_| ()).ok_or_else(|| missing_model(digest))
    }

    /// Changes the entry of a run, with whatever else `change` adds to the same write.
    fn change_run(
        &self,
        run: RunId,
        change: impl FnOnce(&mut RunEntry, &mut Write<'_>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.database.write(|write| {
            let mut entry = write.get(&run_key(run))?.ok_or_else(|| missing_run(run))?;
            change(&mut entry, write)?;
            write.put(run_key(run), &entry)
        })
    }
}

impl Store for SledStore {
    fn put_model(&self, values: &[f32]) -> Result<Digest, StoreError> {
        let digest = model::digest(values);
        self.models.put(digest, values.chunks(PART_VALUES).map(model::to_bytes))?;
        self.drill(Moment::ModelWritten);
        Ok(digest)
    }

    fn model(&self, digest: Digest) -> Result<Parameters, StoreError> {
        let length = self.models.length(digest)?.ok_or_else(|| missing_model(digest))?;
        if length % 4 != 0 {
            return Err(self
                .models
                .damaged(digest, &format!("{length} bytes are not a whole number of values")));
        }
        let mut values = Vec::new();
        let count = usize::try_from(length / 4).unwrap_or(usize::MAX);
        let reserved = values.try_reserve_exact(count);
        reserved.map_err(|_| io_error(Path::new("memory"), &std::io::ErrorKind::OutOfMemory.into()))?;
        self.models.read(digest, |part| {
            let (words, _) = part.as_chunks::<4>();
            values.extend(words.iter().map(|word| f32::from_le_bytes(*word)));
        })?;
        Ok(Arc::new(values))
    }

    fn put_state(&self, state: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(state);
        self.models.put(digest, std::iter::once(state.to_vec()))?;
        Ok(digest)
    }

    fn state(&self, digest: Digest) -> Result<Vec<u8>, StoreError> {
        let mut state = Vec::new();
        self.models.read(digest, |part| state.extend_from_slice(part))?;
        Ok(state)
    }

    fn collect_garbage(&self) -> Result<usize, StoreError> {
        // Inside a write, so that no run comes to name a model that is being deleted.
        self.database.write(|_| {
            if self.snapshots.load(Ordering::Acquire) > 0 {
                return Ok(0); // what is no longer named goes when the next round is published
            }
            self.models.retain(&self.named()?)
        })
    }

    fn create_run(
        &self,
        run: RunId,
        job_toml: &str,
        initial: Digest,
        submitted: Time,
    ) -> Result<(), StoreError> {
        self.database.write(|write| {
            if write.get::<RunEntry>(&run_key(run))?.is_some() {
                return Err(StoreError::Exists { what: "run", name: run.to_string() });
            }
            self.check_model(initial)?;
            let head = RunHead {
                published: 0,
                attempt: 1,
                model: initial,
                state: RunState::Queued,
                clip_norm: None,
                support: None,
            };
            write.put(job_key(run), &JobEntry { job_toml: job_toml.to_owned(), submitted })?;
            write.put(run_key(run), &RunEntry { head, initial, ended: 0, open_attempt: None })
        })
    }

    fn runs(&self) -> Result<Vec<StoredRun>, StoreError> {
        let entries: Vec<(String, RunEntry)> = self.database.scan("run/")?;
        let mut runs = Vec::with_capacity(entries.len());
        for (key, entry) in entries {
            let run = key.trim_start_matches("run/").parse().map_err(|_| StoreError::Damaged {
                what: "the database",
                path: key.clone(),
                detail: "the key is not that of a run".to_owned(),
            })?;
            runs.push(self.stored(run, entry)?);
        }
        runs.sort_by_key(|run| (run.submitted, run.run));
        Ok(runs)
    }

    fn run(&self, run: RunId) -> Result<StoredRun, StoreError> {
        let entry = self.entry(run)?;
        self.stored(run, entry)
    }

    fn journal_attempt(&self, run: RunId, attempt: &AttemptRecord) -> Result<(), StoreError> {
        self.change_run(run, |entry, write| {
            entry.open_attempt = Some(attempt.clone());
            write.remove(session_key(run));
            Ok(())
        })?;
        self.drill(Moment::AttemptWritten);
        Ok(())
    }

    fn journal_session(&self, run: RunId, session: &[u8]) -> Result<(), StoreError> {
        self.entry(run)?;
        self.database.write(|write| write.put(session_key(run), &BASE64.encode(session)))?;
        self.drill(Moment::SessionWritten);
        Ok(())
    }

    fn session(&self, run: RunId) -> Result<Option<Vec<u8>>, StoreError> {
        let text: Option<String> = self.database.get(&session_key(run))?;
        let decoded = text.map(|text| BASE64.decode(text)).transpose();
        decoded.map_err(|error| StoreError::Damaged {
            what: "a session",
            path: session_key(run),
            detail: error.to_string(),
        })
    }

    fn commit_round(&self, run: RunId, record: &RoundRecord, head: &RunHead) -> Result<(), StoreError> {
        self.change_run(run, |entry, write| {
            head.named().try_for_each(|digest| self.check_model(digest))?;
            write.remove(session_key(run));
            write.put(format!("round/{run}/{:08x}", entry.ended), record)?;
            entry.ended += 1;
            entry.head = head.clone();
            entry.open_attempt = None;
            Ok(())
        })?;
        self.drill(Moment::RoundWritten);
        Ok(())
    }

    fn put_evaluation(&self, run: RunId, record: &EvaluationRecord) -> Result<(), StoreError> {
        self.database.write(|write| {
            write.get::<RunEntry>(&run_key(run))?.ok_or_else(|| missing_run(run))?;
            write.put(format!("evaluation/{run}/{:08x}", record.round), &EvaluationEntry::new(record))
        })
    }

    fn set_state(&self, run: RunId, state: &RunState) -> Result<(), StoreError> {
        self.change_run(run, |entry, _| {
            entry.head.state = state.clone();
            Ok(())
        })
    }

    fn rounds(&self, run: RunId) -> Result<Vec<RoundRecord>, StoreError> {
        self.entry(run)?;
        let records = self.database.scan(&format!("round/{run}/"))?;
        Ok(records.into_iter().map(|(_, record)| record).collect())
    }

    fn evaluations(&self, run: RunId) -> Result<Vec<EvaluationRecord>, StoreError> {
        self.entry(run)?;
        let records: Vec<(String, EvaluationEntry)> = self.database.scan(&format!("evaluation/{run}/"))?;
        Ok(records.into_iter().map(|(_, entry)| entry.into_record()).collect())
    }

    fn put_token(&self, token: &TokenRecord) -> Result<(), StoreError> {
        self.database.write(|write| write.put(format!("token/{}", token.secret_digest), token))
    }

    fn take_token(&self, secret_digest: Digest) -> Result<Option<TokenRecord>, StoreError> {
        let key = format!("token/{secret_digest}");
        self.database.write(|write| {
            let token = write.get(&key)?;
            if token.is_some() {
                write.remove(key);
            }
            Ok(token)
        })
    }

    fn put_node(&self, node: &NodeRecord) -> Result<(), StoreError> {
        self.database.write(|write| write.put(node_key(&node.name), node))
    }

    fn put_ledger_head(&self, node: &NodeName, head: &[u8]) -> Result<(), StoreError> {
        self.database.write(|write| write.put(ledger_head_key(node), &head.to_vec()))
    }

    fn ledger_head(&self, node: &NodeName) -> Result<Option<Vec<u8>>, StoreError> {
        self.database.get(&ledger_head_key(node))
    }

    fn node(&self, name: &NodeName) -> Result<Option<NodeRecord>, StoreError> {
        self.database.get(&node_key(name))
    }

    fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError> {
        Ok(self.database.scan("node/")?.into_iter().map(|(_, node)| node).collect())
    }
}
