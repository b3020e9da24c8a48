//! A client-side objective of a researcher's own: terms beside the job's loss, as their gradients.

use super::Task;

/// What a client minimises beside the job's loss.
///
/// The trainer calls [`Objective::begin`] before a client's first step, [`Objective::gradient`] in every step and
/// [`Objective::finish`] after the last. Vectors lie in the order of the job's layout
/// (`tributary_common::model::Layout`). One trainer serves many clients, one after another: state that belongs to a
/// client is kept by its name. For the simulator to give the same bits on any number of workers, what `gradient` adds
/// may depend on the task, the step and the model alone, or on state that only the same client's earlier rounds wrote.
pub trait Objective: Send {
    /// A client with `examples` training examples begins `task`.
    fn begin(&mut self, task: &Task, examples: u64) {
        let _ = (task, examples);
    }

    /// Adds to `gradient`, the loss's at `model`, what the objective's own terms add, or replaces it. `step` counts
    /// from 1.
    fn gradient(&mut self, step: u64, model: &[f32], gradient: &mut [f32]);

    /// The client took `steps` steps and changed the model by `delta`.
    fn finish(&mut self, task: &Task, steps: u64, delta: &[f32]) {
        let _ = (task, steps, delta);
    }
}
