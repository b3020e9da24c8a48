//! A partition of one's own: client k has half the examples of digit k and half of digit k + 1, in a ring.
//!
//! `cargo run --example partition` prints who has what, and the accuracy beside that of the scenario's own partition.

mod digits;

use std::error::Error;
use std::sync::Arc;

use tributary_client::data;
use tributary_client::partition::Share;
use tributary_client::trainer::{TorchTrainer, Trainer};
use tributary_simulations::devices::Devices;
use tributary_simulations::population::Spread;
use tributary_simulations::scenario::{Federation, Scenario};

use self::digits::Learnt;

/// The data of `scenario`, shared in a ring.
fn ring(scenario: &Scenario) -> Result<Federation, Box<dyn Error>> {
    let model = &scenario.job.model;
    let dataset = data::load_for(&scenario.data, &scenario.base, &model.inputs, model.classes)?;
    let clients = dataset.classes;
    let mut parts = vec![Vec::new(); clients];
    let mut seen = vec![0; clients];
    for (position, label) in (0u32..).zip(&dataset.train.labels) {
        let label = usize::try_from(*label)?;
        // Its examples go to client `label` and to the one before, in turn.
        let back = seen.get_mut(label).map(|seen| std::mem::replace(seen, 1 - *seen)).unwrap_or_default();
        let client = (label + clients - back) % clients;
        parts.get_mut(client).ok_or("no such client")?.push(position);
    }
    let share = |(client, train): (usize, Vec<u32>)| {
        let name = format!("client-{client}").parse()?;
        Ok(Share { name, train: train.into(), test: [].into(), shift: None })
    };
    let shares = parts.into_iter().enumerate().map(share).collect::<Result<_, Box<dyn Error>>>()?;
    Ok(Federation { dataset, shares, devices: Devices::default() })
}

/// The spread of the ring; the accuracy on the scenario's own partition, and on the ring.
pub(crate) fn run() -> Result<(Spread, [Learnt; 2]), Box<dyn Error>> {
    let scenario = digits::scenario()?;
    let learn = |federation| {
        let trainer = Arc::new(|| Ok(Box::new(TorchTrainer::new()) as Box<dyn Trainer>));
        digits::learn(&scenario, federation, 2, trainer, None)
    };
    let ring = ring(&scenario)?;
    let spread = Spread::of(&ring);
    Ok((spread, [learn(scenario.federation()?)?, learn(ring)?]))
}

fn main() -> Result<(), Box<dyn Error>> {
    let (spread, [own, ring]) = run()?;
    println!("labels per client  {}, label skew {:.2}", spread.labels.median, spread.label_skew);
    println!("dirichlet          {:.3}", own.accuracy());
    println!("ring               {:.3}", ring.accuracy());
    Ok(())
}
