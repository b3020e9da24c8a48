//! How long to wait before the next try: exponential, with full jitter.

use std::time::Duration;

/// Longest wait.
const MOST_SECONDS: f64 = 60.0;
/// A connection that held so long was good: the next wait is short again.
const STABLE_SECONDS: u64 = 60;

/// Waits between tries: uniform from 0 to 1, 2, 4, … 60 seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Backoff {
    tries: u32,
}

impl Backoff {
    /// The next wait, with `random` from 0 to below 1.
    pub fn next(&mut self, random: f64) -> Duration {
        let ceiling = 2f64.powi(i32::try_from(self.tries.min(16)).unwrap_or(16)).min(MOST_SECONDS);
        self.tries = self.tries.saturating_add(1);
        Duration::from_secs_f64(ceiling * random.clamp(0.0, 1.0))
    }

    /// Notes how long a connection held.
    pub fn held(&mut self, time: Duration) {
        if time.as_secs() >= STABLE_SECONDS {
            self.tries = 0;
        }
    }

    /// Notes progress: the next wait is short again.
    pub fn progress(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_minute_and_start_anew_after_a_stable_one() {
        let mut backoff = Backoff::default();
        let ceilings: Vec<u64> = (0..9).map(|_| backoff.next(1.0).as_secs()).collect();
        assert_eq!(ceilings, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        backoff.held(Duration::from_secs(59));
        assert_eq!(backoff.next(0.5), Duration::from_secs(30));
        backoff.held(Duration::from_secs(60));
        assert_eq!(backoff.next(1.0).as_secs(), 1);
        assert_eq!(backoff.next(0.0), Duration::ZERO);
    }
}
