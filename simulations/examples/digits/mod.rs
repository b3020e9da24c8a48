//! What the examples share: a scenario on generated digits, and a simulation that gives its accuracies.

use std::error::Error;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use tributary_common::aggregate::AggregationRule;
use tributary_common::digest::Digest;
use tributary_common::model;
use tributary_common::record::RunEvent;
use tributary_simulations::engine::{Observation, Settings, simulate};
use tributary_simulations::scenario::{Federation, Overrides, Scenario};
use tributary_simulations::workers::MakeTrainer;

/// How a simulation went.
#[derive(Debug, PartialEq)]
pub(crate) struct Learnt {
    /// Accuracy on held-out examples after each round, 0 to 1.
    pub(crate) accuracies: Vec<f64>,
    /// Digest of the last model.
    pub(crate) digest: Digest,
}

impl Learnt {
    /// The last accuracy.
    pub(crate) fn accuracy(&self) -> f64 {
        self.accuracies.last().copied().unwrap_or(0.0)
    }
}

/// The scenario in `digits.toml`.
pub(crate) fn scenario() -> Result<Scenario, Box<dyn Error>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits/digits.toml");
    Ok(Scenario::read(&path, &Overrides::default())?)
}

/// Simulates `scenario` over `federation`.
pub(crate) fn learn(
    scenario: &Scenario,
    federation: Federation,
    workers: usize,
    trainer: MakeTrainer,
    rule: Option<Box<dyn AggregationRule>>,
) -> Result<Learnt, Box<dyn Error>> {
    let settings = Settings { rule, ..Settings::new(workers, trainer) };
    let mut accuracies = Vec::new();
    let finished = simulate(scenario, federation, settings, &AtomicBool::new(false), &mut |observation| {
        if let Observation::Event(RunEvent::Evaluated { record }) = observation {
            let metrics = record.held_out.as_ref();
            accuracies.extend(metrics.map(|metrics| metrics.correct as f64 / metrics.examples as f64));
        }
    })?;
    Ok(Learnt { accuracies, digest: model::digest(&finished.model) })
}
