//! An architecture of one's own: a residual network of tanh blocks, its depth a parameter of the program.
//!
//! `cargo run --example architecture` prints the resolved `[model]` table, the tensors and the accuracy.

mod digits;

use std::error::Error;
use std::sync::Arc;

use tributary_client::trainer::{TorchTrainer, Trainer};
use tributary_common::job::Model;
use tributary_common::model::{Architecture, LayerSpec};

use self::digits::Learnt;

/// Pooled images, `blocks` residual blocks of `width` features, and a linear layer.
fn residual(inputs: &[usize], classes: usize, blocks: usize, width: usize) -> Model {
    let mut layers = vec![
        LayerSpec::AveragePool { size: 2, stride: 2 },
        LayerSpec::Flatten,
        LayerSpec::Linear(width),
        LayerSpec::Tanh,
    ];
    let block =
        LayerSpec::Residual { body: vec![LayerSpec::Linear(width), LayerSpec::Tanh], shortcut: Vec::new() };
    layers.extend(std::iter::repeat_n(block, blocks));
    layers.push(LayerSpec::Linear(classes));
    Model {
        architecture: Architecture::Sequential,
        inputs: inputs.to_vec(),
        classes,
        hidden: Vec::new(),
        layers,
    }
}

/// The model, as it was trained, and how it learnt.
pub(crate) fn run() -> Result<(Model, Learnt), Box<dyn Error>> {
    let mut scenario = digits::scenario()?;
    let model = residual(&scenario.job.model.inputs, scenario.job.model.classes, 3, 32);
    // Every shape is checked here: a misfit is one line that names the layer.
    model.network()?;
    scenario.job.model = model.clone();
    let trainer = Arc::new(|| Ok(Box::new(TorchTrainer::new()) as Box<dyn Trainer>));
    let learnt = digits::learn(&scenario, scenario.federation()?, 2, trainer, None)?;
    Ok((model, learnt))
}

fn main() -> Result<(), Box<dyn Error>> {
    let (model, learnt) = run()?;
    println!("{}", toml::to_string(&model)?);
    let layout = model.network()?.layout();
    for tensor in layout.tensors() {
        println!("{:24} {:?}", tensor.name(), tensor.shape());
    }
    println!("{} parameters, accuracy {:.3}", layout.parameters(), learnt.accuracy());
    Ok(())
}
