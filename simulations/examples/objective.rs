//! A client-side objective of one's own, and the aggregation rule that belongs to it: FedDyn (Acar et al. 2021).
//!
//! Client k minimises `L_k(w) − ⟨h_k, w⟩ + α/2·‖w − w_t‖²`, and then `h_k ← h_k − α·Δ_k`. The server keeps
//! `h ← h − α/m·Σ Δ_k` over the m clients of the population and publishes `w_t + mean(Δ_k) − h/α`.
//!
//! `cargo run --example objective` prints the accuracy after each round beside FedAvg's.

mod digits;

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use tributary_client::trainer::{Objective, Task, TorchTrainer, Trainer};
use tributary_common::aggregate::{AggregateError, AggregationRule, Contribution};
use tributary_common::ids::NodeName;
use tributary_common::model::Parameters;
use tributary_simulations::workers::MakeTrainer;

use self::digits::Learnt;

const ALPHA: f32 = 0.1;

/// What each client keeps from round to round. Any worker may train any client, so all workers share it; a client
/// writes its own entry alone, and trains once in a round, so the order of the workers decides nothing.
type Kept = Arc<Mutex<BTreeMap<NodeName, Vec<f32>>>>;

/// The terms of one client after another.
struct Dynamic {
    kept: Kept,
    start: Parameters,
    h: Vec<f32>,
}

impl Objective for Dynamic {
    fn begin(&mut self, task: &Task, _examples: u64) {
        self.start = task.model.clone();
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        self.h = kept.get(&task.client).cloned().unwrap_or_else(|| vec![0.0; task.model.len()]);
    }

    fn gradient(&mut self, _step: u64, model: &[f32], gradient: &mut [f32]) {
        let terms = model.iter().zip(self.start.iter()).zip(&self.h);
        for (slope, ((value, start), h)) in gradient.iter_mut().zip(terms) {
            *slope += ALPHA * (value - start) - h;
        }
    }

    fn finish(&mut self, task: &Task, _steps: u64, delta: &[f32]) {
        let mut h = std::mem::take(&mut self.h);
        h.iter_mut().zip(delta).for_each(|(h, change)| *h -= ALPHA * change);
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(task.client.clone(), h);
    }
}

/// The server's part. `h` lives as long as the process: a rule for the simulator.
struct DynamicMean {
    clients: usize,
    h: Vec<f64>,
    updates: Vec<Contribution>,
}

impl AggregationRule for DynamicMean {
    fn begin(&mut self, _round: u32, parameters: usize) {
        self.updates.clear();
        self.h.resize(parameters, 0.0);
    }

    fn add(&mut self, update: Contribution) {
        self.updates.push(update);
    }

    fn finish(&mut self, model: &[f32]) -> Result<Vec<f32>, AggregateError> {
        if self.updates.is_empty() {
            return Err(AggregateError::Empty);
        }
        // Sums of floats depend on their order, which is not to be that of arrival.
        self.updates.sort_by(|a, b| a.client().cmp(b.client()));
        let (alpha, updates) = (f64::from(ALPHA), self.updates.len() as f64);
        let step = |(at, (old, h)): (usize, (&f32, &mut f64))| {
            let deltas = self.updates.iter().filter_map(|update| update.delta().get(at));
            let sum: f64 = deltas.map(|value| f64::from(*value)).sum();
            *h -= alpha / self.clients as f64 * sum;
            (f64::from(*old) + sum / updates - *h / alpha) as f32
        };
        Ok(model.iter().zip(&mut self.h).enumerate().map(step).collect())
    }
}

/// FedAvg with one worker, and FedDyn with each of `workers`.
pub(crate) fn run(workers: &[usize]) -> Result<(Learnt, Vec<Learnt>), Box<dyn Error>> {
    let scenario = digits::scenario()?;
    let plain: MakeTrainer = Arc::new(|| Ok(Box::new(TorchTrainer::new())));
    let fedavg = digits::learn(&scenario, scenario.federation()?, 2, plain, None)?;
    let dynamic = |workers: &usize| {
        let kept = Kept::default();
        let trainer: MakeTrainer = Arc::new(move || {
            let (kept, start) = (kept.clone(), Parameters::default());
            let objective = Dynamic { kept, start, h: Vec::new() };
            Ok(Box::new(TorchTrainer::with_objective(Box::new(objective))) as Box<dyn Trainer>)
        });
        let federation = scenario.federation()?;
        let rule = DynamicMean { clients: federation.shares.len(), h: Vec::new(), updates: Vec::new() };
        digits::learn(&scenario, federation, *workers, trainer, Some(Box::new(rule)))
    };
    Ok((fedavg, workers.iter().map(dynamic).collect::<Result<_, _>>()?))
}

fn main() -> Result<(), Box<dyn Error>> {
    let (fedavg, feddyn) = run(&[2])?;
    println!("round  FedAvg  FedDyn");
    for feddyn in feddyn {
        for (round, (fedavg, feddyn)) in (1..).zip(fedavg.accuracies.iter().zip(&feddyn.accuracies)) {
            println!("{round:>5}  {fedavg:.3}   {feddyn:.3}");
        }
        println!("gained {:.3}", feddyn.accuracy() - fedavg.accuracy());
    }
    Ok(())
}
