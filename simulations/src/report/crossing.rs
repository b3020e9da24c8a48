//! When a run reached an accuracy, counted as McMahan et al. 2017 count rounds.

use std::fmt;

use serde::Serialize;

use super::Row;

/// The round at which an accuracy was first reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "event", rename = "target")]
pub struct Crossing {
    /// The accuracy asked for, above 0 to 1.
    pub accuracy: f64,
    /// The round, with a fraction; `None` where it was not reached.
    pub round: Option<f64>,
    /// Rounds published.
    #[serde(skip)]
    rounds: u32,
}

impl Crossing {
    /// Where `rows`, in order of their rounds, reach `accuracy`.
    ///
    /// The curve is made monotone by taking the best accuracy so far, and the crossing is interpolated linearly
    /// between the evaluated rounds on its two sides (McMahan et al. 2017, section 3). A curve that starts above
    /// crosses at its first point, for nothing is known before it.
    pub fn of(rows: &[Row], accuracy: f64) -> Self {
        let mut crossing = Self { accuracy, round: None, rounds: rows.last().map_or(0, |row| row.round) };
        let mut below: Option<(f64, f64)> = None;
        for (round, value) in rows.iter().filter_map(|row| Some((f64::from(row.round), row.accuracy?))) {
            if value >= accuracy {
                crossing.round = Some(below.map_or(round, |(before, best)| {
                    before + (round - before) * (accuracy - best) / (value - best)
                }));
                break;
            }
            below = Some((round, below.map_or(value, |(_, best)| best.max(value))));
        }
        crossing
    }

    /// The JSON object, without a line break.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default() // every key is a string, so this cannot fail
    }
}

impl fmt::Display for Crossing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Rounded, for 0.07 times a hundred is not 7 in binary.
        let per_cent = (self.accuracy * 1e8).round() / 1e6;
        match self.round {
            Some(round) => write!(f, "{per_cent} % first reached at round {round:.1} (interpolated)"),
            None => write!(f, "{per_cent} % not reached in {} rounds", self.rounds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crossing(curve: &[(u32, Option<f64>)], accuracy: f64) -> Crossing {
        let row = |(round, accuracy): &(u32, Option<f64>)| Row {
            round: *round,
            accuracy: *accuracy,
            loss: None,
            epsilon: None,
            bytes_up: 0,
            bytes_down: 0,
            completed: 1,
            dropped: 0,
            seconds: 0.0,
        };
        Crossing::of(&curve.iter().map(row).collect::<Vec<_>>(), accuracy)
    }

    #[test]
    fn the_crossing_is_interpolated_from_the_best_so_far() {
        let curve = [(1, Some(0.5)), (2, Some(0.75)), (3, Some(0.25)), (4, None), (5, Some(1.0))];
        let at = |accuracy| crossing(&curve, accuracy).round;
        assert_eq!(at(0.6), Some(1.4));
        // The monotone curve holds 0.75 at round 3, and round 4 was not evaluated: from (3, 0.75) to (5, 1).
        assert_eq!(at(0.875), Some(4.0));
        assert_eq!((at(0.75), at(0.4), at(1.0)), (Some(2.0), Some(1.0), Some(5.0)));
        assert_eq!(crossing(&curve[..4], 0.8).round, None);
        assert_eq!(crossing(&[], 0.8).round, None);
    }

    #[test]
    fn it_is_said_in_words_and_in_json() {
        let curve = [(86, Some(0.9696)), (87, Some(0.9706)), (90, Some(0.9701))];
        let reached = crossing(&curve, 0.97);
        assert_eq!(reached.to_string(), "97 % first reached at round 86.4 (interpolated)");
        let json: serde_json::Value = serde_json::from_str(&reached.to_json()).unwrap();
        assert_eq!((json["event"].as_str(), json["accuracy"].as_f64()), (Some("target"), Some(0.97)));
        assert!((json["round"].as_f64().unwrap() - 86.4).abs() < 1e-6);
        let missed = crossing(&curve, 0.995);
        assert_eq!(missed.to_string(), "99.5 % not reached in 90 rounds");
        assert_eq!(missed.to_json(), r#"{"event":"target","accuracy":0.995,"round":null}"#);
    }
}
