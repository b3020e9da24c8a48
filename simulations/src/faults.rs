//! The `[faults]` table: what goes wrong at clients, drawn for each invited client and attempt from its own stream.
//!
//! A draw depends on (seed, round, attempt, client) alone, so faults are the same for any number of workers, and one
//! fault's probability does not move another's draw.

use std::collections::BTreeSet;

use rand::RngExt;
use serde::{Deserialize, Serialize};
use tributary_common::document::Schema;
use tributary_common::ids::NodeName;
use tributary_common::job::Job;
use tributary_common::rng::{Purpose, Stream};

/// The keys of the `[faults]` table.
pub const SCHEMA: Schema = Schema {
    keys: &[
        "dropout_probability",
        "dropout_before_training",
        "dropout_after_training",
        "dropout_after_upload",
        "slow_probability",
        "slow_factor",
        "crash_probability",
        "rejoin_seconds",
        "corrupt_upload_probability",
        "duplicate_upload_probability",
        "straggler_fraction",
        "stragglers",
    ],
    tables: &[],
};
/// Largest `slow_factor`.
const SLOW_FACTOR: f64 = 1e6;
/// Longest `rejoin_seconds`: a week.
const REJOIN_SECONDS: f64 = 604_800.0;

/// What becomes of stragglers' work (Li et al. 2020, section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stragglers {
    /// They send what they have done: FedProx.
    Partial,
    /// They never answer: FedAvg that drops them.
    Drop,
}

/// The `[faults]` table: probabilities are per invited client and attempt at a round.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultsConfig {
    /// Goes silent, half before training and half after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout_probability: Option<f64>,
    /// Goes silent before training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout_before_training: Option<f64>,
    /// Goes silent after training, before its update leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout_after_training: Option<f64>,
    /// Goes silent after its update has arrived: its answers are missing where masks are to be taken off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout_after_upload: Option<f64>,
    /// Trains `slow_factor` times as long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_probability: Option<f64>,
    /// How much longer, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slow_factor: Option<f64>,
    /// Dies in the middle of training and loses its work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crash_probability: Option<f64>,
    /// How long after a crash it connects again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejoin_seconds: Option<f64>,
    /// Sends an update that is no update: a value that is not finite, or too few values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrupt_upload_probability: Option<f64>,
    /// Sends its update twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duplicate_upload_probability: Option<f64>,
    /// Exactly this share of each cohort, rounded, cannot do all its work in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub straggler_fraction: Option<f64>,
    /// What becomes of their work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stragglers: Option<Stragglers>,
}

/// Why a `[faults]` table is refused. Each displays as one line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FaultsError {
    /// A value is out of its range.
    #[error("[faults] {key} = {value}: {range} is possible")]
    Range {
        /// The key.
        key: &'static str,
        /// Its value.
        value: f64,
        /// What is possible.
        range: &'static str,
    },
    /// Keys contradict each other or belong together, or the job does not allow them.
    #[error("[faults] {0}")]
    Invalid(String),
}

impl FaultsConfig {
    /// Refuses values out of range, keys without their partners, and stragglers that `job` cannot have.
    ///
    /// # Errors
    /// The first [`FaultsError`].
    pub fn validate(&self, job: &Job) -> Result<(), FaultsError> {
        let shares = [
            ("dropout_probability", self.dropout_probability),
            ("dropout_before_training", self.dropout_before_training),
            ("dropout_after_training", self.dropout_after_training),
            ("dropout_after_upload", self.dropout_after_upload),
            ("slow_probability", self.slow_probability),
            ("crash_probability", self.crash_probability),
            ("corrupt_upload_probability", self.corrupt_upload_probability),
            ("duplicate_upload_probability", self.duplicate_upload_probability),
            ("straggler_fraction", self.straggler_fraction),
        ];
        let check = |key, value: Option<f64>, least: f64, most: f64, range| match value {
            Some(value) if !(least..=most).contains(&value) => Err(FaultsError::Range { key, value, range }),
            _ => Ok(()),
        };
        for (key, value) in shares {
            check(key, value, 0.0, 1.0, "0 to 1")?;
        }
        check("slow_factor", self.slow_factor, 1.0, SLOW_FACTOR, "1 to 1000000")?;
        check("rejoin_seconds", self.rejoin_seconds, 0.0, REJOIN_SECONDS, "0 to 604800 (a week)")?;
        let invalid = |problem: String| Err(FaultsError::Invalid(problem));
        let either = self.dropout_before_training.is_some() || self.dropout_after_training.is_some();
        if self.dropout_probability.is_some() && either {
            return invalid(
                "dropout_probability stands for half of it before and half after training: give it, or \
                 dropout_before_training and dropout_after_training"
                    .into(),
            );
        }
        let (before, after) = self.dropouts();
        let together = before + after + self.dropout_after_upload.unwrap_or_default();
        if together > 1.0 {
            return invalid(format!(
                "a client goes silent once: its probabilities before and after training and after the upload are \
                 {together} together; at most 1 is possible together"
            ));
        }
        let pairs = [
            ("slow_probability", self.slow_probability.is_some(), "slow_factor", self.slow_factor.is_some()),
            (
                "crash_probability",
                self.crash_probability.is_some(),
                "rejoin_seconds",
                self.rejoin_seconds.is_some(),
            ),
            (
                "straggler_fraction",
                self.straggler_fraction.is_some(),
                "stragglers",
                self.stragglers.is_some(),
            ),
        ];
        for (one, has_one, other, has_other) in pairs {
            if has_one != has_other {
                let (given, missing) = if has_one { (one, other) } else { (other, one) };
                return invalid(format!("{given} needs {missing} beside it"));
            }
        }
        self.check_stragglers(job)
    }

    fn check_stragglers(&self, job: &Job) -> Result<(), FaultsError> {
        let Some(fraction) = self.straggler_fraction.filter(|fraction| *fraction > 0.0) else {
            return Ok(());
        };
        let (work, unit) = match (job.train.local_epochs, job.train.local_steps) {
            (_, Some(steps)) => (steps, "local_steps"),
            (epochs, None) => (epochs.unwrap_or(1), "local_epochs"),
        };
        if work < 2 {
            return Err(FaultsError::Invalid(format!(
                "stragglers do part of their work, from 1 to one less than all of it: [train] {unit} = {work} \
                 must be at least 2"
            )));
        }
        let (invited, minimum) = (job.invited(), job.cohort.minimum);
        let left = invited - self.unanswering(invited);
        if left < minimum {
            return Err(FaultsError::Invalid(format!(
                "straggler_fraction = {fraction} with stragglers = \"drop\" leaves {left} of {invited} invited \
                 clients, fewer than [cohort] minimum = {minimum}: no round could be published; lower one of them"
            )));
        }
        Ok(())
    }

    /// How many of a cohort never answer, whatever is drawn.
    pub fn unanswering(&self, members: u32) -> u32 {
        let fraction = self.straggler_fraction.filter(|_| self.stragglers == Some(Stragglers::Drop));
        stragglers_of(members, fraction.unwrap_or_default()).min(members)
    }

    /// Probabilities of going silent before and after training.
    fn dropouts(&self) -> (f64, f64) {
        match self.dropout_probability {
            Some(both) => (both / 2.0, both / 2.0),
            None => (
                self.dropout_before_training.unwrap_or_default(),
                self.dropout_after_training.unwrap_or_default(),
            ),
        }
    }
}

/// Stragglers in a cohort of `members`.
fn stragglers_of(members: u32, fraction: f64) -> u32 {
    (f64::from(members) * fraction).round() as u32
}

/// When a client goes silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropout {
    /// As soon as it should train.
    BeforeTraining,
    /// When it has trained.
    AfterTraining,
    /// When its update has arrived.
    AfterUpload,
}

/// What is wrong with a corrupt update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Corruption {
    /// One value is not a number.
    NotFinite,
    /// The last value is missing.
    TooShort,
}

/// A straggler's lot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Straggling {
    /// It takes so many SGD steps only.
    Steps(u64),
    /// It never answers.
    Never,
}

/// What goes wrong at one client in one attempt at a round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fate {
    /// Whether and when it goes silent.
    pub dropout: Option<Dropout>,
    /// How many times as long as usual it trains.
    pub slowness: f64,
    /// Which share of its training is done when it crashes.
    pub crash: Option<f64>,
    /// What is wrong with its update.
    pub corruption: Option<Corruption>,
    /// Whether its update is sent twice.
    pub is_sent_twice: bool,
    /// For stragglers: 0 to below 1, how much of their work they do.
    part_of_work: f64,
}

impl Fate {
    /// Nothing goes wrong.
    pub const GOOD: Fate = Fate {
        dropout: None,
        slowness: 1.0,
        crash: None,
        corruption: None,
        is_sent_twice: false,
        part_of_work: 0.0,
    };
}

/// A checked `[faults]` table with the run's seed.
#[derive(Debug, Clone)]
pub struct Faults {
    seed: u64,
    config: FaultsConfig,
}

impl Faults {
    /// The faults of a run.
    pub fn new(seed: u64, config: FaultsConfig) -> Self {
        Self { seed, config }
    }

    fn stream(&self, round: u32, attempt: u32, client: &str) -> Stream {
        // No client has a `#` in its name. Without the attempt, who failed would fail in every attempt.
        if attempt <= 1 {
            return Stream::new(self.seed, Purpose::Faults, round, client);
        }
        Stream::new(self.seed, Purpose::Faults, round, &format!("{client}#{attempt}"))
    }

    /// What goes wrong at `client` in an attempt at a round.
    pub fn fate(&self, round: u32, attempt: u32, client: &NodeName) -> Fate {
        if self.config == FaultsConfig::default() {
            return Fate::GOOD;
        }
        let mut stream = self.stream(round, attempt, client.as_str());
        // All draws, always and in this order.
        let mut draw = || stream.random::<f64>();
        let [dropout, slow, crash, crashed_at, corrupt, kind, twice, part_of_work] =
            std::array::from_fn(|_| draw());
        let happens = |drawn: f64, probability: Option<f64>| drawn < probability.unwrap_or_default();
        let config = &self.config;
        let (before, after) = config.dropouts();
        Fate {
            dropout: if dropout < before {
                Some(Dropout::BeforeTraining)
            } else if dropout < before + after {
                Some(Dropout::AfterTraining)
            } else if dropout < before + after + config.dropout_after_upload.unwrap_or_default() {
                Some(Dropout::AfterUpload)
            } else {
                None
            },
            slowness: config.slow_factor.filter(|_| happens(slow, config.slow_probability)).unwrap_or(1.0),
            crash: happens(crash, config.crash_probability).then_some(crashed_at),
            corruption: happens(corrupt, config.corrupt_upload_probability).then_some(if kind < 0.5 {
                Corruption::NotFinite
            } else {
                Corruption::TooShort
            }),
            is_sent_twice: happens(twice, config.duplicate_upload_probability),
            part_of_work,
        }
    }

    /// How long after a crash a client is there again.
    pub fn rejoin_milliseconds(&self) -> u64 {
        (self.config.rejoin_seconds.unwrap_or_default() * 1000.0).round() as u64
    }

    /// The stragglers of a cohort, as places in it: exactly `round(members · fraction)`.
    pub fn stragglers(&self, round: u32, attempt: u32, members: usize) -> BTreeSet<usize> {
        let fraction = self.config.straggler_fraction.unwrap_or_default();
        let count = stragglers_of(u32::try_from(members).unwrap_or(u32::MAX), fraction) as usize;
        if count == 0 {
            return BTreeSet::new();
        }
        let mut stream = self.stream(round, attempt, "");
        rand::seq::index::sample(&mut stream, members, count.min(members)).into_iter().collect()
    }

    /// What a straggler with `fate` and `examples` training examples does: evenly 1 to one less than all of its
    /// epochs, or steps.
    pub fn straggling(&self, fate: &Fate, job: &Job, examples: u64) -> Straggling {
        if self.config.stragglers == Some(Stragglers::Drop) {
            return Straggling::Never;
        }
        let all = job.train.steps(examples);
        let (units, steps_per_unit) = match job.train.local_steps {
            Some(steps) => (u64::from(steps), 1),
            None => {
                let epochs = u64::from(job.train.local_epochs.unwrap_or(1));
                (epochs, all.checked_div(epochs).unwrap_or(all))
            }
        };
        let less = units.saturating_sub(1).max(1);
        let done = 1 + ((fate.part_of_work * less as f64) as u64).min(less - 1);
        Straggling::Steps(done * steps_per_unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(train: &str) -> Job {
        Job::parse(&format!(
            "name = 'j'\nseed = 1\nrounds = 2\n[model]\narchitecture = 'logistic'\ninputs = [2]\nclasses = 2\n\
             [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nbatch_size = 10\n{train}\n\
             [cohort]\nsize = 10\nminimum = 2\n"
        ))
        .unwrap()
    }

    fn config(text: &str) -> FaultsConfig {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn every_bad_value_is_refused_and_named() {
        let epochs = job("local_epochs = 5");
        for (text, words) in [
            ("dropout_probability = 1.1", "dropout_probability = 1.1: 0 to 1 is possible"),
            ("crash_probability = -0.1\nrejoin_seconds = 1", "crash_probability = -0.1"),
            ("dropout_probability = nan", "dropout_probability = NaN"),
            ("dropout_probability = 0.1\ndropout_after_training = 0.1", "give it, or"),
            ("dropout_before_training = 0.6\ndropout_after_training = 0.6", "at most 1 is possible together"),
            ("slow_probability = 0.1", "slow_probability needs slow_factor"),
            ("slow_factor = 2.0", "slow_factor needs slow_probability"),
            ("slow_probability = 0.1\nslow_factor = 0.5", "slow_factor = 0.5: 1 to 1000000"),
            ("crash_probability = 0.1", "crash_probability needs rejoin_seconds"),
            ("rejoin_seconds = 700000.0\ncrash_probability = 0.1", "rejoin_seconds = 700000"),
            ("straggler_fraction = 0.5", "straggler_fraction needs stragglers"),
            ("straggler_fraction = 0.9\nstragglers = 'drop'", "leaves 1 of 10 invited clients"),
        ] {
            let error = config(text).validate(&epochs).unwrap_err().to_string();
            assert!(
                error.contains(words) && error.starts_with("[faults] ") && !error.contains('\n'),
                "{error}"
            );
        }
        let partial = config("straggler_fraction = 0.9\nstragglers = 'partial'");
        partial.validate(&epochs).unwrap();
        let error = partial.validate(&job("local_epochs = 1")).unwrap_err().to_string();
        assert!(error.contains("local_epochs = 1 must be at least 2"), "{error}");
        let error = partial.validate(&job("local_steps = 1")).unwrap_err().to_string();
        assert!(error.contains("local_steps = 1 must be at least 2"), "{error}");
    }

    #[test]
    fn a_fate_depends_on_its_name_alone_and_comes_as_often_as_asked() {
        let faults = Faults::new(
            7,
            config(
                "dropout_probability = 0.2\nslow_probability = 0.3\nslow_factor = 4.0\ncrash_probability = 0.1\n\
                 rejoin_seconds = 9.0\ncorrupt_upload_probability = 0.4\nduplicate_upload_probability = 0.5",
            ),
        );
        let clients: Vec<NodeName> = (0..4000).map(|at| format!("c{at}").parse().unwrap()).collect();
        let fates: Vec<Fate> = clients.iter().map(|client| faults.fate(3, 1, client)).collect();
        let share = |holds: &dyn Fn(&Fate) -> bool| {
            fates.iter().filter(|fate| holds(fate)).count() as f64 / fates.len() as f64
        };
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 0.03, "{found} {expected}");
        near(share(&|fate| fate.dropout == Some(Dropout::BeforeTraining)), 0.1);
        near(share(&|fate| fate.dropout == Some(Dropout::AfterTraining)), 0.1);
        near(share(&|fate| fate.slowness == 4.0), 0.3);
        near(share(&|fate| fate.crash.is_some_and(|at| at < 1.0)), 0.1);
        assert_eq!(faults.rejoin_milliseconds(), 9000);
        near(share(&|fate| fate.corruption == Some(Corruption::TooShort)), 0.2);
        near(share(&|fate| fate.is_sent_twice), 0.5);
        near(share(&|fate| fate.is_sent_twice && fate.slowness == 4.0), 0.15);
        assert_eq!(faults.fate(3, 1, &clients[9]), fates[9]);
        let again = |round, attempt| clients.iter().map(move |c| faults.fate(round, attempt, c));
        assert!(again.clone()(4, 1).ne(fates.iter().copied()) && again(3, 2).ne(fates.iter().copied()));
        assert_eq!(Faults::new(7, FaultsConfig::default()).fate(1, 1, &clients[0]), Fate::GOOD);
    }

    #[test]
    fn stragglers_are_exactly_their_share_and_do_one_epoch_to_all_but_one() {
        let faults = Faults::new(7, config("straggler_fraction = 0.55\nstragglers = 'partial'"));
        let sets: Vec<BTreeSet<usize>> = (1..=20).map(|round| faults.stragglers(round, 1, 10)).collect();
        assert!(sets.iter().all(|set| set.len() == 6 && set.iter().all(|at| *at < 10)));
        assert!(sets.windows(2).any(|pair| pair[0] != pair[1]));
        let lots = |train: &str, examples: u64| -> BTreeSet<u64> {
            let job = job(train);
            let fates = (0..400).map(|at| faults.fate(1, 1, &format!("c{at}").parse().unwrap()));
            let steps = fates.map(|fate| match faults.straggling(&fate, &job, examples) {
                Straggling::Steps(steps) => steps,
                Straggling::Never => panic!("they answer"),
            });
            steps.collect()
        };
        // 25 examples are three batches of ten at most.
        assert_eq!(lots("local_epochs = 4", 25), BTreeSet::from([3, 6, 9]));
        assert_eq!(lots("local_steps = 4", 25), BTreeSet::from([1, 2, 3]));
        let dropping = Faults::new(7, config("straggler_fraction = 0.5\nstragglers = 'drop'"));
        assert_eq!(dropping.straggling(&Fate::GOOD, &job("local_epochs = 4"), 25), Straggling::Never);
    }
}
