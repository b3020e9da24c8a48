//! The node machine: one participant, from invitation to dismissal, as a pure function of its inputs.
//!
//! ```text
//!              ┌───────────────── stored bytes of this (run, round) ──────────────────┐
//!   Invited ───┴─▶ Fetching ─▶ Ready ─▶ Charging ─▶ Training ─▶ Storing ─▶ Uploading ◀┴▶ Delivered ─▶ Dismissed
//!      └▶ Declined (policy, data, busy, shutting down, unsupported; later: budget, training)
//! ```
//!
//! With `[secure_aggregation]` a session of keys runs beside it, from Fetching on: its caller keeps it, and the machine
//! knows of it what [`Effect::Join`], [`Input::Keyed`], [`Input::SessionFailed`] and [`Effect::Leave`] say. What was
//! trained waits (`Trained`) until there are keys to mask it.
//!
//! The machine has no clock, no random source and no I/O: [`NodeMachine::step`] takes the time and an input and
//! returns effects, which its caller performs in order. A node and the simulator run this same machine.
//!
//! What it promises, whatever the order of its inputs:
//! - one computation (training, its storing, or an evaluation) at a time, and one fetch;
//! - no upload of bytes that [`Input::Stored`] did not confirm, and no second training for a (run, round) whose
//!   bytes are kept: they are re-sent as they are, after a new connection or a restart too;
//! - no training of a job before [`Input::Charged`] says that what it costs, and may release, is written down;
//! - with `[privacy]`, one payload per charge: what is stored for a round is kept, and sent again as it is, until the
//!   round is over, abandoned attempts and lack of room notwithstanding;
//! - with `[secure_aggregation]`, no second masking for a (run, round), in no attempt: once [`Effect::Store`] was asked
//!   for, later attempts at the round are declined; and the bytes go when the session does, for nobody could unmask them;
//! - a repeated invitation goes on where the work stands;
//! - every invitation ends in an upload, a decline or a dismissal, or in the next invitation.

mod step;
#[cfg(test)]
mod tests;

pub use step::NodeMachine;
pub use tributary_common::record::{Dismissal, Role};

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
pub use tributary_common::compression::residual::Outcome;
use tributary_common::digest::Digest;
use tributary_common::ids::RunId;
use tributary_common::job::{Job, MetricsRelease, Privacy, PrivacyUnit};
use tributary_common::model::Parameters;
use tributary_common::record::{Metrics, Reason};
use tributary_common::time::Time;

use crate::policy::Policy;

/// Most updates that a node keeps for rounds whose end it was not told; the oldest is forgotten first.
pub const KEPT_UPDATES: usize = 16;
/// Most runs of which a node remembers its last evaluation.
pub const ANSWERED_RUNS: usize = 16;

/// What a machine knows of its node: the same for all nodes with the same data set and policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// What the node is there for.
    pub role: Role,
    /// What its operator allows.
    pub policy: Policy,
    /// Shape of one example: `[features]` or `[channels, height, width]`.
    pub example_shape: Vec<usize>,
    /// Classes of the labels; a job's model may have more.
    pub classes: usize,
    /// Whether the operator declared the test examples public: metrics over them tell nothing about anybody.
    pub public_test: bool,
    /// What the operator declared as the number of training examples, once and rounded.
    pub declared_examples: Option<u64>,
    /// What its `[data]` fits to the data, each in one line that says what to write instead.
    pub fitted: Vec<String>,
    /// Whether all rows of a person are one unit of privacy.
    pub grouped: bool,
    /// Longest time from [`Input::Shutdown`] to [`Effect::Exit`].
    pub drain_seconds: u32,
}

/// How many examples a node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExampleCounts {
    /// To train on.
    pub train: u64,
    /// To evaluate on.
    pub test: u64,
}

/// One round of one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RoundKey {
    /// The run.
    pub run: RunId,
    /// The round, from 1.
    pub round: u32,
}

/// One attempt at one round of one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attempt {
    /// The run.
    pub run: RunId,
    /// The round, from 1.
    pub round: u32,
    /// The attempt at it, from 1.
    pub attempt: u32,
}

impl Attempt {
    /// The round that this is an attempt at.
    pub fn key(&self) -> RoundKey {
        RoundKey { run: self.run, round: self.round }
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "run {}, round {}, attempt {}", self.run, self.round, self.attempt)
    }
}

/// An update whose encoded bytes are kept until its round is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The model that the update changes.
    pub model: Digest,
    /// Digest of the update's bytes; in a simulation no bytes are.
    pub digest: Option<Digest>,
    /// Length of the update's bytes.
    pub bytes: u64,
    /// Its weight, in training examples; 1 where the weight is under the masks, or is no matter.
    pub examples: u64,
    /// Whether it was made under `[privacy]`, and so paid for: it is the one payload of its charge.
    #[serde(default)]
    pub private: bool,
    /// Whether its bytes are masked: they are of use for one attempt alone, while its session lives.
    #[serde(default)]
    pub masked: bool,
    /// When it was stored.
    pub stored: Time,
}

/// Why work failed: the closed reason goes out, the detail stays in the node's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What the coordinator is told.
    pub reason: Reason,
    /// One line for the operator.
    pub detail: String,
}

/// What training produced; the update itself stays with the caller until [`Effect::Store`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trained {
    /// The update's weight, in training examples.
    pub examples: u64,
    /// Mean training loss; `None` with `[privacy]`.
    pub loss: Option<f64>,
}

/// What happens to a node.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// The control stream is open.
    Connected,
    /// The control stream ended. Work goes on; the coordinator repeats its invitation on the next stream.
    Disconnected,
    /// The coordinator invites the node to an attempt, again perhaps.
    Invited {
        /// The attempt.
        at: Attempt,
        /// The job; or why it is not understood, in one line.
        job: Result<Arc<Job>, String>,
        /// The model to start from.
        model: Digest,
        /// When the attempt ends.
        deadline: Time,
        /// With masks and top-k: the coordinates that all updates of the round have, as they came.
        support: Option<Arc<[u8]>>,
    },
    /// An attempt is over for the node.
    Dismissed {
        /// The attempt.
        at: Attempt,
        /// What became of the update.
        reason: Dismissal,
    },
    /// The coordinator asks for an evaluation of a published model, again perhaps.
    EvaluationAsked {
        /// The round whose model it is.
        key: RoundKey,
        /// The job; or why it is not understood, in one line.
        job: Result<Arc<Job>, String>,
        /// The model.
        model: Digest,
    },
    /// The answer to [`Effect::Fetch`]: the model, its digest checked.
    ModelReady {
        /// Its digest.
        model: Digest,
        /// Its parameters.
        parameters: Parameters,
    },
    /// The other answer to [`Effect::Fetch`]: trying again will not help.
    FetchFailed {
        /// The model's digest.
        model: Digest,
        /// Why, in one line.
        detail: String,
    },
    /// The answer to [`Effect::Charge`].
    Charged {
        /// The round.
        key: RoundKey,
        /// Whether the node's account allows it, and it is written down.
        result: Result<(), Failure>,
    },
    /// The answer to [`Effect::Train`], after [`Effect::CancelTraining`] too.
    Trained {
        /// The round.
        key: RoundKey,
        /// What came of it.
        result: Result<Trained, Failure>,
    },
    /// The session of [`Effect::Join`] has its keys: what training produces can be masked.
    Keyed {
        /// The attempt.
        at: Attempt,
    },
    /// The session of [`Effect::Join`] ended without a sum, before or after the upload.
    SessionFailed {
        /// The attempt.
        at: Attempt,
        /// Why.
        failure: Failure,
    },
    /// The answer to [`Effect::Store`]: the encoded update is on the disk, flushed.
    Stored {
        /// The round.
        key: RoundKey,
        /// The update; or why it could not be stored, in one line.
        result: Result<Kept, String>,
    },
    /// The answer to [`Effect::Upload`]: the coordinator has the whole update.
    UploadDone {
        /// The attempt that it was sent for.
        at: Attempt,
    },
    /// The other answer to [`Effect::Upload`]: the coordinator does not want the update.
    UploadRefused {
        /// The attempt that it was sent for.
        at: Attempt,
        /// Why, in one line.
        detail: String,
    },
    /// The answer to [`Effect::Evaluate`].
    Evaluated {
        /// The round.
        key: RoundKey,
        /// What was counted.
        result: Result<Metrics, Failure>,
    },
    /// The operator stops the node; the second time, at once.
    Shutdown,
    /// Time passed; due at [`NodeMachine::next_tick`].
    Tick,
}

/// What the caller must do, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Tell the coordinator that the node does not take part in an attempt.
    Decline {
        /// The attempt.
        at: Attempt,
        /// Why.
        reason: Reason,
        /// One line for the node's own log.
        detail: String,
    },
    /// Begin this node's part in the attempt's secure-aggregation session, or, if it has begun, say again what was said
    /// last. Its messages pass the machine by; it tells [`Input::Keyed`] once, and [`Input::SessionFailed`] if it fails.
    Join {
        /// The attempt.
        at: Attempt,
        /// The job.
        job: Arc<Job>,
        /// The model that is trained on.
        model: Digest,
        /// As it came with the invitation.
        support: Option<Arc<[u8]>>,
    },
    /// End the attempt's session, if it has not ended, and wipe its keys.
    Leave {
        /// The attempt.
        at: Attempt,
    },
    /// Get a model, over broken links too, in place of any other that is being fetched. Answer with
    /// [`Input::ModelReady`] or [`Input::FetchFailed`].
    Fetch {
        /// Its digest.
        model: Digest,
        /// Its length, from the job's layout; another length is refused.
        bytes: u64,
    },
    /// Stop fetching.
    CancelFetch,
    /// Charge a round to the node's account, durably, and answer with [`Input::Charged`].
    Charge {
        /// The round.
        key: RoundKey,
        /// The job.
        job: Arc<Job>,
    },
    /// Train, and answer with [`Input::Trained`].
    Train {
        /// The round.
        key: RoundKey,
        /// The job.
        job: Arc<Job>,
        /// The model to start from.
        model: Parameters,
    },
    /// Stop training soon; it still answers.
    CancelTraining,
    /// Encode what training produced, mask it if the job says so, flush it to the disk, and answer with
    /// [`Input::Stored`]. That it is masked is journalled, durably, before there are masks.
    Store {
        /// The attempt; masks are those of its session.
        at: Attempt,
        /// The job.
        job: Arc<Job>,
        /// The model that it changes.
        model: Digest,
        /// As it came with the invitation.
        support: Option<Arc<[u8]>>,
    },
    /// Send stored bytes, over broken links too, in place of any others that are being sent. Answer with
    /// [`Input::UploadDone`] or [`Input::UploadRefused`].
    Upload {
        /// The attempt they are for.
        at: Attempt,
        /// The update.
        update: Kept,
    },
    /// Say to what the update of a round left out (error feedback) what became of the update.
    Settle {
        /// The round.
        key: RoundKey,
        /// Whether the update is in the published round.
        outcome: Outcome,
    },
    /// Stop sending the update of a round and delete it, in memory and on the disk, if it is there. Nobody will know what
    /// became of it, unless [`Effect::Settle`] said so.
    Forget {
        /// The round.
        key: RoundKey,
    },
    /// Evaluate, and answer with [`Input::Evaluated`].
    Evaluate {
        /// The round.
        key: RoundKey,
        /// The job.
        job: Arc<Job>,
        /// The model.
        model: Parameters,
    },
    /// Report an evaluation, small cells already hidden; empty where the node tells nothing.
    Report {
        /// The round.
        key: RoundKey,
        /// The counts.
        metrics: Metrics,
    },
    /// Tell whoever follows the node.
    Event(NodeEvent),
    /// Send what is queued and end the process. No effect follows.
    Exit,
}

/// One thing that happened at a node, for whoever follows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum NodeEvent {
    /// First invitation to a run.
    JoinedRun {
        /// The run.
        run: RunId,
        /// The job's name.
        name: String,
        /// Rounds that the job asks for.
        rounds: u32,
    },
    /// Training starts.
    Training {
        /// The run.
        run: RunId,
        /// The round.
        round: u32,
        /// Training examples.
        examples: u64,
        /// SGD steps.
        steps: u64,
    },
    /// Training ended.
    Trained {
        /// The run.
        run: RunId,
        /// The round.
        round: u32,
        /// Mean training loss; `None` with `[privacy]`.
        loss: Option<f64>,
    },
    /// The coordinator has the whole update.
    Uploaded {
        /// The run.
        run: RunId,
        /// The round.
        round: u32,
        /// Its length.
        bytes: u64,
    },
    /// The update is in a published round.
    Accepted {
        /// The run.
        run: RunId,
        /// The round.
        round: u32,
    },
    /// The round ended without the node's update.
    NotUsed {
        /// The run.
        run: RunId,
        /// The round.
        round: u32,
        /// Why, in one line.
        detail: String,
    },
    /// The node declined.
    Declined {
        /// The run.
        run: RunId,
        /// The round.
        round: u32,
        /// What the coordinator is told.
        reason: Reason,
        /// What the operator is told.
        detail: String,
    },
    /// A published model was evaluated.
    Evaluated {
        /// The run.
        run: RunId,
        /// The round.
        round: u32,
        /// Examples; 0 if nothing was reported.
        examples: u64,
    },
}

impl Profile {
    /// Checks whether the node can and may work for a job.
    ///
    /// # Errors
    /// The reason for the coordinator and one line for the operator.
    pub fn check(&self, job: &Job, examples: ExampleCounts) -> Result<(), Failure> {
        let example_level = job.privacy.as_ref().is_some_and(|privacy| privacy.unit == PrivacyUnit::Example);
        // What is refused shows: with privacy for examples it depends on public numbers alone.
        let trained_on =
            if example_level { self.declared_examples.unwrap_or_default() } else { examples.train };
        self.policy
            .check(job, trained_on)
            .map_err(|violation| Failure { reason: Reason::Policy, detail: violation.to_string() })?;
        let unfit = |detail: String| Err(Failure { reason: Reason::Data, detail });
        let (inputs, shape) = (&job.model.inputs, &self.example_shape);
        if inputs != shape && *inputs != [shape.iter().product::<usize>()] {
            return unfit(format!("one example has shape {shape:?}, the job's [model] inputs = {inputs:?}"));
        }
        if self.classes > job.model.classes {
            let (here, asked) = (self.classes, job.model.classes);
            return unfit(format!("the data have {here} classes, the job's [model] classes = {asked}"));
        }
        let divides = example_level && !job.sums_gradients();
        if self.role == Role::Trainer && divides && self.declared_examples.is_none() {
            return unfit(
                "with [privacy] the node's [data] must give declared_examples, a rounded number".into(),
            );
        }
        if self.role == Role::Trainer
            && example_level
            && let Some(fitted) = self.fitted.first()
        {
            return unfit(fitted.clone());
        }
        let noised = |privacy: &Privacy| privacy.metrics == MetricsRelease::Noised;
        if self.grouped && job.privacy.as_ref().is_some_and(noised) {
            let detail =
                "metrics = \"noised\" protects one row, and here a person has several ([data] group)";
            return unfit(detail.into());
        }
        let (count, kind) = match self.role {
            Role::Trainer => (examples.train, "training"),
            Role::Evaluator => (examples.test, "test"),
        };
        // Whether there are any is a fact about the data: with privacy for examples an empty node takes part.
        if count == 0 && !(example_level && self.role == Role::Trainer) {
            return unfit(format!("there are no {kind} examples"));
        }
        Ok(())
    }
}
