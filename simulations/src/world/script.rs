//! What a seed stands for: the job, the federation, and how much goes wrong.

use std::fmt::Write as _;
use std::sync::Arc;

use rand::RngExt as _;
use tributary_common::job::Job;
use tributary_common::rng::Stream;

use super::{HOUR, MINUTE};

/// How updates travel: each kind takes another path through the code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// All values.
    Dense,
    /// The largest tenth, with what was left out kept for later.
    TopK,
    /// Eight bits a value.
    Int8,
    /// Noise of the node's own, charged to its account.
    Private,
    /// Under masks.
    Masked,
    /// Under masks, on coordinates that all share and votes move.
    MaskedSupport,
    /// Under masks, with shares of noise, charged.
    Distributed,
}

const KINDS: [Kind; 7] = [
    Kind::Dense,
    Kind::TopK,
    Kind::Int8,
    Kind::Private,
    Kind::Masked,
    Kind::MaskedSupport,
    Kind::Distributed,
];

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Dense => "runs of kind dense",
            Kind::TopK => "runs of kind top-k with error feedback",
            Kind::Int8 => "runs of kind int8",
            Kind::Private => "runs of kind dp-sgd, charged",
            Kind::Masked => "runs of kind masked",
            Kind::MaskedSupport => "runs of kind masked top-k",
            Kind::Distributed => "runs of kind masked with noise shares, charged",
        }
    }

    pub(super) fn is_masked(self) -> bool {
        matches!(self, Kind::Masked | Kind::MaskedSupport | Kind::Distributed)
    }

    pub(super) fn is_private(self) -> bool {
        matches!(self, Kind::Private | Kind::Distributed)
    }
}

/// Probabilities: per message, per life of a party, per step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rates {
    /// A message takes up to 40 s.
    pub(super) slow: f64,
    /// A message's bytes are changed on their way.
    pub(super) broken: f64,
    /// A message or an upload comes twice.
    pub(super) doubled: f64,
    /// A message overtakes others.
    pub(super) reordered: f64,
    /// A call finds nobody.
    pub(super) unreachable: f64,
    /// A life of the coordinator ends at one of its first thirty writes.
    pub(super) coordinator_dies: f64,
    /// A life of a node ends at one of its first twelve steps.
    pub(super) node_dies: f64,
    /// Milliseconds between two troubles, in the mean.
    pub(super) pause: u64,
}

/// What a seed stands for.
#[derive(Debug, Clone)]
pub(super) struct Script {
    pub(super) kind: Kind,
    pub(super) nodes: usize,
    pub(super) job: Arc<Job>,
    pub(super) rates: Rates,
    /// How long a certificate lasts, in milliseconds.
    pub(super) certificate: u64,
}

/// What a node declares as the number of its examples.
pub(super) const DECLARED_EXAMPLES: u64 = 40;

impl Script {
    #[allow(clippy::expect_used)] // the jobs below are ours, and a test draws a thousand of them
    pub(super) fn draw(seed: u64, rng: &mut Stream) -> Self {
        let kind = KINDS[usize::try_from(seed % KINDS.len() as u64).unwrap_or_default()];
        let nodes = rng.random_range(4..=6);
        let rounds = rng.random_range(2..=4);
        // Now and then one more than are invited.
        let size = if !kind.is_masked() && rng.random::<f64>() < 0.3 { nodes - 1 } else { nodes };
        let calm: f64 = rng.random();
        let mut below = |most: f64| rng.random::<f64>().powi(2) * most * calm;
        let rates = Rates {
            slow: below(0.3),
            broken: below(0.08),
            doubled: below(0.3),
            reordered: below(0.2),
            unreachable: below(0.5),
            coordinator_dies: below(1.2),
            node_dies: below(0.8),
            pause: MINUTE / 2 + (rng.random::<f64>() * 8.0 * MINUTE as f64) as u64,
        };
        let certificate = if rng.random::<f64>() < 0.4 { HOUR / 4 } else { 24 * HOUR };
        let mut toml = format!(
            "name = 'world'\nseed = {}\nrounds = {rounds}\n[model]\narchitecture = 'logistic'\ninputs = [6]\nclasses = 2\n\
             [cohort]\nsize = {size}\nminimum = 3\nreconnect_seconds = 20\ndeadline_seconds = 100\nsettle_seconds = 2\n\
             attempts = 100\n",
            seed % 1000
        );
        let train = match kind {
            Kind::Private => "local_steps = 2\nsampling_rate = 0.25",
            Kind::Distributed => "local_steps = 1\nsampling_rate = 0.25",
            _ => "local_steps = 2\nbatch_size = 4",
        };
        let _ = writeln!(toml, "[train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\n{train}");
        if kind == Kind::Private {
            toml += "[privacy]\nunit = 'example'\nmechanism = 'dp-sgd'\nnoise_multiplier = 2.0\nclip_norm = 1.0\n\
                     delta = 1e-5\nmax_epsilon = 50.0\n";
        }
        if kind == Kind::Distributed {
            let expected = nodes as u64 * DECLARED_EXAMPLES / 4;
            let _ = write!(
                toml,
                "[privacy]\nunit = 'example'\nmechanism = 'distributed'\nnoise_multiplier = 2.0\nclip_norm = 1.0\n\
                 expected_batch_size = {expected}\ndelta = 1e-5\nmax_epsilon = 50.0\n"
            );
        }
        if kind.is_masked() {
            toml += "[secure_aggregation]\nenabled = true\nstep_seconds = 25\n";
        }
        toml += match kind {
            Kind::TopK => "[compression]\nscheme = 'top-k'\ndensity = 0.3\n",
            Kind::Int8 => "[compression]\nscheme = 'int8'\n",
            Kind::MaskedSupport => {
                "[compression]\nscheme = 'top-k'\ndensity = 0.3\nsupport = 'delayed-vote'\n"
            }
            _ => "",
        };
        if !kind.is_private() && rng.random::<f64>() < 0.5 {
            toml += "[evaluation]\nfederated = true\n";
        }
        let job = Job::parse(&toml).expect("a job of the world is a job");
        Self { kind, nodes, job: Arc::new(job), rates, certificate }
    }
}
