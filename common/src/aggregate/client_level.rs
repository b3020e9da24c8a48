//! The aggregation rule of `unit = "client"`: clipped updates, a noised sum, a public denominator.

use crate::job::{AdaptiveClipping, Clipping, Job, Privacy};

use super::{Accumulator, AggregateError, AggregationRule, Contribution, norm};

/// Share of the clip norm that is left for the rounding of norms, factors and coordinates.
const MARGIN: f64 = 1e-6;
/// Automatic clipping's stabiliser γ (Bu et al. 2022, section 4).
const AUTOMATIC_GAMMA: f64 = 0.01;
/// Adaptive clipping keeps the clip norm within these.
const CLIP_NORMS: (f64, f64) = (1e-6, 1e6);

/// Adds independent Gaussian noise of a standard deviation to each value, or says in one line why it cannot.
pub type AddNoise = Box<dyn FnMut(&mut [f64], f64) -> Result<(), String> + Send>;

/// DP-FedAvg with a fixed denominator: `model + (Σ clipped delta + N(0, (zC)²)) / [cohort] size`
/// (McMahan et al. 2018, algorithm 1, every client weighing one), with adaptive clipping if the job says so
/// (Andrew et al. 2021, algorithm 1).
///
/// One client changes the sum by at most C. That it took part is public, and so is the number of clients; what it sent
/// is protected against whoever sees the models, not against the coordinator. Each model costs one use of a Gaussian
/// of the job's noise multiplier, without amplification.
pub struct ClientLevel {
    privacy: Privacy,
    adaptive: Option<AdaptiveClipping>,
    /// Public denominator: updates a round waits for.
    expected: f64,
    clip_norm: f64,
    sum: Accumulator,
    /// Updates whose norm was at most the clip norm.
    within: u32,
    /// The first update that could not be added.
    refused: Option<AggregateError>,
    add_noise: AddNoise,
}

impl std::fmt::Debug for ClientLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the sum: it is what the noise protects.
        f.debug_struct("ClientLevel").field("clip_norm", &self.clip_norm).finish_non_exhaustive()
    }
}

impl ClientLevel {
    /// The rule of a job's `[privacy]` with noise from `add_noise`; `clip_norm` is the present one of a run that
    /// goes on, where it adapts.
    pub fn new(job: &Job, privacy: &Privacy, clip_norm: Option<f64>, add_noise: AddNoise) -> Self {
        let expected = f64::from(job.cohort.size.max(1));
        let adaptive = privacy.adaptive(expected);
        let clip_norm = clip_norm.filter(|_| adaptive.is_some()).unwrap_or(privacy.clip_norm);
        Self {
            privacy: privacy.clone(),
            adaptive,
            expected,
            clip_norm,
            sum: Accumulator::new(0),
            within: 0,
            refused: None,
            add_noise,
        }
    }

    /// What an update of this norm is multiplied with.
    fn factor(&self, norm: f64, parameters: usize) -> f64 {
        // Fixed-point rounding moves each coordinate by at most 2^-33.
        let rounding = (parameters as f64).sqrt() * 2f64.powi(-33);
        let most = (self.clip_norm * (1.0 - MARGIN) - rounding).max(0.0);
        match self.privacy.clipping {
            Clipping::Flat | Clipping::Adaptive if norm <= most => 1.0,
            Clipping::Flat | Clipping::Adaptive => most / norm,
            Clipping::Automatic => most / (norm + AUTOMATIC_GAMMA),
        }
    }
}

impl AggregationRule for ClientLevel {
    fn begin(&mut self, _round: u32, parameters: usize) {
        self.sum = Accumulator::new(parameters);
        (self.within, self.refused) = (0, None);
    }

    fn add(&mut self, update: Contribution) {
        let norm = norm(update.delta());
        self.within += u32::from(norm <= self.clip_norm);
        let factor = self.factor(norm, update.delta().len());
        let clipped: Vec<f32> =
            update.delta().iter().map(|value| (f64::from(*value) * factor) as f32).collect();
        if let Err(error) = self.sum.add(&clipped, 1) {
            self.refused.get_or_insert(error);
        }
    }

    fn finish(&mut self, model: &[f32]) -> Result<Vec<f32>, AggregateError> {
        if let Some(error) = self.refused.take() {
            return Err(error);
        }
        let (expected, found) = (self.sum.parameters(), model.len());
        if expected != found {
            return Err(AggregateError::WrongLength { expected, found });
        }
        let multiplier =
            self.adaptive.map_or(self.privacy.noise_multiplier, |adaptive| adaptive.sum_noise_multiplier);
        let mut sum: Vec<f64> = self.sum.sums().collect();
        (self.add_noise)(&mut sum, multiplier * self.clip_norm).map_err(AggregateError::Rule)?;
        if let Some(adaptive) = &self.adaptive {
            // Each client's bit is centred: it moves the count by at most a half.
            let mut count = [f64::from(self.within) - 0.5 * f64::from(self.sum.updates())];
            (self.add_noise)(&mut count, adaptive.count_noise).map_err(AggregateError::Rule)?;
            let fraction = 0.5 + count.iter().sum::<f64>() / self.expected;
            let step = (-adaptive.learning_rate * (fraction - adaptive.target_quantile)).exp();
            self.clip_norm = (self.clip_norm * step).clamp(CLIP_NORMS.0, CLIP_NORMS.1);
        }
        let step = |(old, sum): (&f32, f64)| (f64::from(*old) + sum / self.expected) as f32;
        Ok(model.iter().zip(sum).map(step).collect())
    }

    fn clip_norm(&self) -> Option<f64> {
        self.adaptive.map(|_| self.clip_norm)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const JOB: &str = "name = 'j'\nseed = 1\nrounds = 2\n\
        [model]\narchitecture = 'logistic'\ninputs = [1]\nclasses = 2\n\
        [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_epochs = 2\nbatch_size = 10\n\
        [cohort]\nsize = 4\nminimum = 2\n\
        [privacy]\nunit = 'client'\nmechanism = 'gaussian'\nnoise_multiplier = 2.0\nclip_norm = 5.0\ndelta = 1e-5\n\
        max_epsilon = 100.0\n";

    /// The rule with "noise" that adds its standard deviation, and counts how often it is asked.
    fn rule(changes: &str, calls: &Arc<AtomicU32>) -> ClientLevel {
        let job = Job::parse(&format!("{JOB}{changes}")).unwrap();
        let calls = calls.clone();
        let add = move |values: &mut [f64], deviation: f64| {
            calls.fetch_add(1, Ordering::Relaxed);
            values.iter_mut().for_each(|value| *value += deviation);
            Ok(())
        };
        ClientLevel::new(&job, job.privacy.as_ref().unwrap(), None, Box::new(add))
    }

    fn contribution(client: &str, examples: u64, delta: [f32; 4]) -> Contribution {
        Contribution::new(client.parse().unwrap(), examples, Arc::new(delta.to_vec()), 4).unwrap()
    }

    fn close(found: &[f32], expected: [f64; 4]) {
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} for {expected}");
        }
    }

    /// Pitfall 1: the denominator is the job's, whoever came; and one client weighs one, whatever it says.
    #[test]
    fn updates_are_clipped_summed_noised_once_and_divided_by_the_jobs_cohort() {
        let calls = Arc::new(AtomicU32::new(0));
        let mut rule = rule("", &calls);
        rule.begin(1, 4);
        rule.add(contribution("a", 1_000, [3.0, 4.0, 0.0, 0.0]));
        rule.add(contribution("b", 1, [0.0, 0.0, 300.0, 400.0]));
        rule.add(contribution("c", 7, [0.0; 4]));
        // Noise of standard deviation 2 · 5.
        close(&rule.finish(&[1.0; 4]).unwrap(), [3.0, 4.0, 3.0, 4.0].map(|sum| 1.0 + (sum + 10.0) / 4.0));
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        rule.begin(1, 4);
        close(&rule.finish(&[0.0; 4]).unwrap(), [2.5; 4]);
        assert!(rule.finish(&[0.0; 3]).is_err());
    }

    #[test]
    fn no_update_moves_the_sum_by_more_than_the_clip_norm() {
        let calls = Arc::new(AtomicU32::new(0));
        for clipping in ["flat", "automatic", "adaptive"] {
            for scale in [1e-30f32, 1e-3, 1.0, 4.999_999, 5.0, 5.000_001, 1e4, 16_384.0] {
                let mut rule = rule(&format!("clipping = '{clipping}'\n"), &calls);
                rule.begin(1, 4);
                rule.add(contribution("a", 9, [scale, -scale, 0.3 * scale, 0.0]));
                let moved = rule.sum.sums().map(|value| value * value).sum::<f64>().sqrt();
                assert!(moved <= 5.0, "{clipping} {scale}: {moved}");
            }
        }
    }

    #[test]
    fn without_noise_there_is_no_model() {
        let job = Job::parse(JOB).unwrap();
        let none = Box::new(|_: &mut [f64], _: f64| Err("no random bytes".to_owned()));
        let mut rule = ClientLevel::new(&job, job.privacy.as_ref().unwrap(), None, none);
        rule.begin(1, 4);
        assert!(rule.finish(&[0.0; 4]).unwrap_err().to_string().contains("no random bytes"));
    }

    /// Pitfall 9: the count of norms is noised with the sensitivity of a centred bit, and paid for.
    #[test]
    fn an_adaptive_clip_norm_follows_the_noised_count_and_survives_a_restart() {
        let calls = Arc::new(AtomicU32::new(0));
        let mut rule = rule("clipping = 'adaptive'\ncount_noise = 4.0\n", &calls);
        rule.begin(1, 4);
        rule.add(contribution("a", 1, [100.0, 0.0, 0.0, 0.0]));
        rule.add(contribution("b", 1, [1.0, 0.0, 0.0, 0.0]));
        let model = rule.finish(&[0.0; 4]).unwrap();
        // z_Δ = (2^-2 − 8^-2)^-½, and the "noise" adds its standard deviation.
        let multiplier = (0.25f64 - 1.0 / 64.0).powf(-0.5);
        close(&model, [6.0, 0.0, 0.0, 0.0].map(|sum| (sum + 5.0 * multiplier) / 4.0));
        assert_eq!(calls.load(Ordering::Relaxed), 2);
        let expected = 5.0 * (-0.2 * (0.5 + (0.0 + 4.0) / 4.0 - 0.5f64)).exp();
        assert!((rule.clip_norm().unwrap() - expected).abs() < 1e-12);
        let job = Job::parse(&format!("{JOB}clipping = 'adaptive'\ncount_noise = 4.0\n")).unwrap();
        let privacy = job.privacy.clone().unwrap();
        let again = ClientLevel::new(&job, &privacy, rule.clip_norm(), Box::new(|_, _| Ok(())));
        assert_eq!(again.clip_norm(), rule.clip_norm());
        assert_eq!(ClientLevel::new(&job, &privacy, None, Box::new(|_, _| Ok(()))).clip_norm(), Some(5.0));
    }
}
