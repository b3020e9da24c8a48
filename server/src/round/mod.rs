//! The round machine: one run's rounds from selection to publication, as a pure function of its inputs.
//!
//! ```text
//!   Selecting ──enough clients──▶ Collecting ──size reached, all decided, or deadline──▶ Aggregating
//!      ▲  ▲                           │ fewer than the minimum                              │
//!      │  └──────── Abandoned ◀───────┴──────────────────── unfit model ◀───────────────────┤
//!      │                                                                                    ▼
//!      └───────────── (Evaluating, where the job asks for it) ◀──────────────────────── Published
//! ```
//!
//! The machine has no clock, no random source and no I/O: [`RoundMachine::step`] takes the time and an input
//! and returns effects, which its caller performs in order. [`Effect::Journal`] and [`Effect::Commit`] must be
//! durable before the effects after them are performed: nobody is invited to a round that a crash could
//! forget, and no round is announced that a crash could take back.

mod machine;
mod masked;
#[cfg(test)]
mod tests;

pub use machine::{RoundMachine, Start};
pub use masked::Masking;
pub use tributary_common::record::{Dismissal, Role};

use std::collections::{BTreeMap, BTreeSet};

use tributary_common::digest::Digest;
use tributary_common::ids::NodeName;
use tributary_common::record::{EvaluationRecord, Metrics, Reason, RoundRecord, RunEvent, RunState, Summed};
use tributary_common::secagg::keys::MaskTerm;
use tributary_common::time::Time;

use crate::store::{AttemptRecord, RunHead};

/// What happens to a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// A node's control stream opened.
    Connected {
        /// The node.
        node: NodeName,
        /// What it is there for.
        role: Role,
    },
    /// Nodes whose control streams are open already when a run begins: all are there before a cohort is drawn.
    Present {
        /// The nodes, with what they are there for.
        nodes: BTreeMap<NodeName, Role>,
    },
    /// A node's control stream ended.
    Disconnected {
        /// The node.
        node: NodeName,
    },
    /// A node will not take part in an attempt.
    Declined {
        /// The node.
        node: NodeName,
        /// The round.
        round: u32,
        /// The attempt.
        attempt: u32,
        /// Why.
        reason: Reason,
    },
    /// A node's update is here, whole, and fit to be summed.
    Update {
        /// The node.
        node: NodeName,
        /// The round.
        round: u32,
        /// Its weight.
        examples: u64,
        /// Its length.
        bytes: u64,
        /// Digest of its bytes, where it crossed a wire.
        digest: Option<Digest>,
    },
    /// A node's update is here and not fit to be summed.
    Refused {
        /// The node.
        node: NodeName,
        /// The round.
        round: u32,
        /// Its length.
        bytes: u64,
        /// Why, in one line.
        detail: String,
    },
    /// A member says something in the attempt's secure-aggregation session.
    Masking {
        /// The node.
        node: NodeName,
        /// The round.
        round: u32,
        /// The attempt.
        attempt: u32,
        /// The message, encoded.
        message: Vec<u8>,
    },
    /// The answer to [`Effect::Aggregate`].
    Aggregated(
        /// The new model, stored; or why there is none, in one line.
        Result<Aggregated, String>,
    ),
    /// A node evaluated the published model.
    Evaluated {
        /// The node.
        node: NodeName,
        /// The round whose model it is.
        round: u32,
        /// What it measured.
        metrics: Metrics,
    },
    /// The operator stops the run.
    Stop,
    /// Time passed; due at [`RoundMachine::next_tick`].
    Tick,
}

/// What became of a sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aggregated {
    /// The new model.
    pub model: Digest,
    /// What was summed with it.
    pub summed: Option<Summed>,
    /// Digest of the next round's support, where there is one.
    pub support: Option<Digest>,
}

/// What the caller must do, in this order.
#[derive(Clone)]
pub enum Effect {
    /// Write the attempt down, durably.
    Journal(AttemptRecord),
    /// Invite a node; an invitation may be repeated.
    Invite {
        /// The node.
        node: NodeName,
        /// The round.
        round: u32,
        /// The attempt.
        attempt: u32,
        /// The model to start from.
        model: Digest,
        /// When the attempt ends.
        deadline: Time,
    },
    /// Write down where the attempt's secure-aggregation session stands, durably.
    JournalSession(Vec<u8>),
    /// Say something to a member in that session.
    Masking {
        /// The node.
        node: NodeName,
        /// The round.
        round: u32,
        /// The attempt.
        attempt: u32,
        /// The message, encoded.
        message: Vec<u8>,
    },
    /// Add the node's update to the sum.
    Fold {
        /// The node.
        node: NodeName,
    },
    /// Make the new model from the sum, store it, and answer with [`Input::Aggregated`].
    Aggregate {
        /// Masks to take off the sum first; `None` without masks.
        unmask: Option<Vec<MaskTerm>>,
    },
    /// Write the end of the attempt down, durably and at once; then start a new sum.
    Commit {
        /// The record.
        record: Box<RoundRecord>,
        /// Where the run stands now.
        head: RunHead,
    },
    /// Tell a node that an attempt is over for it.
    Dismiss {
        /// The node.
        node: NodeName,
        /// The round.
        round: u32,
        /// The attempt.
        attempt: u32,
        /// What became of its update.
        reason: Dismissal,
    },
    /// Ask a node to evaluate the published model.
    Evaluate {
        /// The node.
        node: NodeName,
        /// The round whose model it is.
        round: u32,
        /// The model.
        model: Digest,
    },
    /// Write an evaluation down.
    RecordEvaluation(Box<EvaluationRecord>),
    /// Write the run's state down: it is over.
    Finish(RunState),
    /// Tell whoever watches.
    Event(Box<RunEvent>),
}

/// The accepted sets of an earlier run, by round: what `--replay` imposes.
pub type ImposedSets = BTreeMap<u32, BTreeSet<NodeName>>;
