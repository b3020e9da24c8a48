//! The update rule: SGD with momentum, weight decay and FedProx's proximal term, in one pass over memory.

use tributary_common::job::{Algorithm, Job};

/// PyTorch's `torch.optim.SGD` (no dampening, no Nesterov), with FedProx's term added to the gradient
/// (Li et al. 2020, eq. 2).
#[derive(Default)]
pub(super) struct Sgd {
    learning_rate: f32,
    momentum: f32,
    weight_decay: f32,
    proximal_mu: f32,
    velocity: Vec<f32>,
}

impl Sgd {
    /// Takes the settings of `job` in `round` for a model of `parameters` values; the momentum starts at zero.
    pub(super) fn start(&mut self, job: &Job, round: u32, parameters: usize) {
        let train = &job.train;
        self.learning_rate = train.learning_rate(round, job.rounds) as f32;
        self.momentum = train.momentum as f32;
        self.weight_decay = train.weight_decay as f32;
        self.proximal_mu = match train.algorithm {
            Algorithm::Fedprox => train.proximal_mu.unwrap_or(0.0) as f32,
            Algorithm::Fedavg => 0.0,
        };
        self.velocity.clear();
        if self.momentum != 0.0 {
            self.velocity.resize(parameters, 0.0);
        }
    }

    /// Whether the rule is `w ← w − η·g`. Decided by the values, not the names: FedProx with µ = 0 is FedAvg.
    pub(super) fn is_plain(&self) -> bool {
        self.momentum == 0.0 && self.weight_decay == 0.0 && self.proximal_mu == 0.0
    }

    /// η of this round.
    pub(super) fn learning_rate(&self) -> f32 {
        self.learning_rate
    }

    /// One step for all parameters, from their gradient and the values at the start of training.
    ///
    /// g ← g + λ·w + µ·(w − w₀); v ← m·v + g; w ← w − η·v.
    pub(super) fn step(&mut self, values: &mut [f32], gradient: &[f32], start: &[f32]) {
        let rate = self.learning_rate;
        if self.is_plain() {
            for (value, slope) in values.iter_mut().zip(gradient) {
                *value -= rate * slope;
            }
            return;
        }
        let (momentum, decay, mu) = (self.momentum, self.weight_decay, self.proximal_mu);
        if momentum == 0.0 {
            for ((value, slope), start) in values.iter_mut().zip(gradient).zip(start) {
                *value -= rate * (slope + decay * *value + mu * (*value - start));
            }
            return;
        }
        for (((value, slope), start), velocity) in
            values.iter_mut().zip(gradient).zip(start).zip(&mut self.velocity)
        {
            let slope = slope + decay * *value + mu * (*value - start);
            *velocity = momentum * *velocity + slope;
            *value -= rate * *velocity;
        }
    }
}
