//! Time as the cores see it: an argument, in milliseconds since the Unix epoch.

use std::ops::Add;

use serde::{Deserialize, Serialize};

/// A moment: milliseconds since the Unix epoch, or since the start of a simulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Time(pub u64);

impl Time {
    /// Seconds from `earlier` to this moment; zero if `earlier` is later.
    pub fn seconds_since(self, earlier: Time) -> f64 {
        self.0.saturating_sub(earlier.0) as f64 / 1000.0
    }

    /// This moment and `seconds` more.
    pub fn plus_seconds(self, seconds: u32) -> Time {
        self + u64::from(seconds) * 1000
    }
}

impl Add<u64> for Time {
    type Output = Time;

    /// Adds milliseconds.
    fn add(self, milliseconds: u64) -> Time {
        Time(self.0.saturating_add(milliseconds))
    }
}

/// Reads the machine's clock: the one place that does, for the edges to call.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clock;

impl Clock {
    /// The present moment; the epoch if the machine's clock stands before it.
    #[allow(clippy::disallowed_methods)] // the one blessed reader of the wall clock
    pub fn now(&self) -> Time {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Time(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}
