//! What a sweep varies: its keys with their values, its seeds, and the points that they span.

use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use tributary_common::document;

/// Most points of one sweep.
pub const POINTS: usize = 10_000;
/// Longest name of a point's folder, in bytes.
const NAME_BYTES: usize = 100;

/// Why a grid is refused. Each displays as one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GridError {
    /// Nothing varies.
    #[error("a sweep varies something: give --vary train.learning_rate=0.05,0.1 or --seeds 1,2,3")]
    Nothing,
    /// An assignment is not a key and its values.
    #[error("--vary {assignment:?}: {problem}")]
    Vary {
        /// What was given.
        assignment: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A key or a seed stands there twice.
    #[error("{0} is given twice: once is enough")]
    Twice(String),
    /// The seed is varied in two ways.
    #[error("--vary seed=… and --seeds both set the seed: give one of them")]
    TwoSeeds,
    /// The grid is too large.
    #[error("these are {points} points, and one sweep has at most {POINTS}: vary less at once")]
    TooMany {
        /// How many there would be.
        points: u128,
    },
}

/// One varied key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Varied {
    /// The key, as `--set` takes it.
    pub key: String,
    /// Its values, as they were written.
    pub values: Vec<String>,
}

impl Varied {
    /// Reads `key=a,b,…`. Values are TOML, else strings; commas in brackets and quotes belong to a value.
    fn parse(assignment: &str) -> Result<Self, GridError> {
        let wrong = |problem: String| GridError::Vary { assignment: assignment.to_owned(), problem };
        let Some((key, text)) = assignment.split_once('=') else {
            return Err(wrong("is not `key=value,value`, such as `train.learning_rate=0.05,0.1`".into()));
        };
        let key = key.trim();
        if key.is_empty() {
            return Err(wrong("names no key before the `=`".into()));
        }
        let values = split(text).ok_or_else(|| wrong("a bracket or a quote is not closed".into()))?;
        for (index, one) in values.iter().enumerate() {
            if one.is_empty() {
                return Err(wrong(format!("value {} is empty; write \"\" for an empty text", index + 1)));
            }
            if values.iter().take(index).any(|before| value(before) == value(one)) {
                return Err(GridError::Twice(format!("--vary {key}: {one}")));
            }
        }
        Ok(Self { key: key.to_owned(), values })
    }

    /// The key's last step, which tables show.
    fn short(&self) -> &str {
        self.key.rsplit('.').next().unwrap_or(&self.key)
    }

    /// The values as numbers, if all are.
    pub fn numbers(&self) -> Option<Vec<f64>> {
        let number = |text: &String| match value(text) {
            Value::Integer(number) => Some(number as f64),
            Value::Float(number) => Some(number),
            _ => None,
        };
        self.values.iter().map(number).collect()
    }
}

/// A value as `--set` reads it.
pub(crate) fn value(text: &str) -> Value {
    let mut table = Table::new();
    // A key without dots takes any text.
    let _ = document::set(&mut table, &format!("value={text}"));
    table.remove("value").unwrap_or_else(|| Value::String(text.to_owned()))
}

/// Splits at the commas outside brackets and quotes; `None` where one is not closed.
fn split(text: &str) -> Option<Vec<String>> {
    let (mut values, mut one) = (Vec::new(), String::new());
    let (mut depth, mut quote, mut escaped) = (0i32, None, false);
    for character in text.chars() {
        match (quote, character) {
            (Some('"'), '\\') if !escaped => {
                escaped = true;
                one.push(character);
                continue;
            }
            (Some(open), _) if character == open && !escaped => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(character),
            (None, '[' | '{') => depth += 1,
            (None, ']' | '}') => depth -= 1,
            (None, ',') if depth == 0 => {
                values.push(std::mem::take(&mut one).trim().to_owned());
                continue;
            }
            (None, _) => {}
        }
        escaped = false;
        one.push(character);
        if depth < 0 {
            return None;
        }
    }
    values.push(one.trim().to_owned());
    (depth == 0 && quote.is_none()).then_some(values)
}

/// One run of a sweep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// The name of its folder.
    pub name: String,
    /// Which combination of values it has, from 0; points that differ in the seed alone share it.
    pub combination: usize,
    /// The position of its value in each varied key.
    pub choices: Vec<usize>,
    /// Its seed, where seeds are varied.
    pub seed: Option<u64>,
}

/// What is varied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grid {
    /// The varied keys, in the order in which they were given.
    pub varied: Vec<Varied>,
    /// The seeds; none where the scenario's own is used.
    pub seeds: Vec<u64>,
}

impl Grid {
    /// Reads the assignments of `--vary` and the seeds of `--seeds`.
    ///
    /// # Errors
    /// A [`GridError`].
    pub fn parse(vary: &[String], seeds: &[u64]) -> Result<Self, GridError> {
        let varied =
            vary.iter().map(|assignment| Varied::parse(assignment)).collect::<Result<Vec<_>, _>>()?;
        if varied.is_empty() && seeds.is_empty() {
            return Err(GridError::Nothing);
        }
        for (index, one) in varied.iter().enumerate() {
            if varied.iter().take(index).any(|before| before.key == one.key) {
                return Err(GridError::Twice(format!("--vary {}", one.key)));
            }
            if !seeds.is_empty() && ["seed", "job.seed"].contains(&one.key.as_str()) {
                return Err(GridError::TwoSeeds);
            }
        }
        if let Some(twice) =
            seeds.iter().enumerate().find(|(at, seed)| seeds.iter().take(*at).any(|s| s == *seed))
        {
            return Err(GridError::Twice(format!("--seeds: {}", twice.1)));
        }
        let points =
            varied.iter().fold(1u128, |product, one| product.saturating_mul(one.values.len() as u128));
        let points = points.saturating_mul(seeds.len().max(1) as u128);
        if points > POINTS as u128 {
            return Err(GridError::TooMany { points });
        }
        Ok(Self { varied, seeds: seeds.to_vec() })
    }

    /// What tables call each varied key: its last step, or the whole where two end alike.
    pub fn labels(&self) -> Vec<&str> {
        let label =
            |one: &Varied| self.varied.iter().filter(|other| other.short() == one.short()).count() == 1;
        self.varied.iter().map(|one| if label(one) { one.short() } else { one.key.as_str() }).collect()
    }

    /// How many combinations of values there are.
    pub fn combinations(&self) -> usize {
        self.varied.iter().map(|one| one.values.len()).product()
    }

    /// The position of combination `index`'s value in each varied key; the last key varies fastest.
    pub fn choices(&self, index: usize) -> Vec<usize> {
        let mut rest = index;
        let mut choices: Vec<usize> = self
            .varied
            .iter()
            .rev()
            .map(|one| {
                let choice = rest % one.values.len().max(1);
                rest /= one.values.len().max(1);
                choice
            })
            .collect();
        choices.reverse();
        choices
    }

    /// The values of `choices`, as they were written.
    pub fn values(&self, choices: &[usize]) -> Vec<&str> {
        let chosen = self.varied.iter().zip(choices);
        chosen.map(|(one, choice)| one.values.get(*choice).map_or("", String::as_str)).collect()
    }

    /// The `--set` assignments of a point.
    pub fn assignments(&self, point: &Point) -> Vec<String> {
        let values = self.values(&point.choices);
        self.varied.iter().zip(values).map(|(one, value)| format!("{}={value}", one.key)).collect()
    }

    /// The points: every combination with every seed, the last varied key and then the seed fastest.
    pub fn points(&self) -> Vec<Point> {
        let seeds: Vec<Option<u64>> =
            if self.seeds.is_empty() { vec![None] } else { self.seeds.iter().copied().map(Some).collect() };
        let total = self.combinations() * seeds.len();
        let digits = total.to_string().len();
        let labels = self.labels();
        let mut points = Vec::with_capacity(total);
        for combination in 0..self.combinations() {
            let choices = self.choices(combination);
            for seed in &seeds {
                let values = labels.iter().zip(self.values(&choices));
                let mut words: Vec<String> =
                    values.map(|(label, value)| format!("{label}={}", safe(value))).collect();
                words.extend(seed.map(|seed| format!("seed={seed}")));
                let name = format!("{:0digits$}-{}", points.len() + 1, words.join("-"));
                points.push(Point { name: safe(&name), combination, choices: choices.clone(), seed: *seed });
            }
        }
        points
    }
}

/// A name that any file system and shell takes as it is: letters, digits and `.=_-`, cut to [`NAME_BYTES`].
fn safe(name: &str) -> String {
    let mut safe = String::new();
    for character in name.chars() {
        let character =
            if character.is_ascii_alphanumeric() || ".=_-".contains(character) { character } else { ' ' };
        if character != ' ' {
            safe.push(character);
        } else if !safe.is_empty() && !safe.ends_with(['-', '=']) {
            safe.push('-');
        }
    }
    safe.truncate(NAME_BYTES);
    safe.trim_end_matches(['-', '.']).to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn grid(vary: &[&str], seeds: &[u64]) -> Result<Grid, GridError> {
        let vary: Vec<String> = vary.iter().map(|one| (*one).to_owned()).collect();
        Grid::parse(&vary, seeds)
    }

    #[test]
    fn values_are_toml_and_their_own_commas_stay() {
        let values = |text: &str| Varied::parse(&format!("k={text}")).unwrap().values;
        assert_eq!(values("0.05, 0.1"), ["0.05", "0.1"]);
        assert_eq!(values("[16],[32,16]"), ["[16]", "[32,16]"]);
        assert_eq!(values("{ a = [1, 2], b = 3 },4"), ["{ a = [1, 2], b = 3 }", "4"]);
        assert_eq!(values(r#""a,b",'c,d',e"#), [r#""a,b""#, "'c,d'", "e"]);
        assert_eq!(values(r#""a\",b",c"#), [r#""a\",b""#, "c"]);
        assert_eq!(values("fedavg"), ["fedavg"]);
        assert_eq!(Varied::parse("k=1,2.5").unwrap().numbers(), Some(vec![1.0, 2.5]));
        assert_eq!(Varied::parse("k=1,x").unwrap().numbers(), None);
    }

    #[test]
    fn points_are_the_product_in_a_fixed_order_with_safe_names() {
        let grid = grid(&["train.learning_rate=0.05,0.1", "model.hidden=[16],[32, 16]"], &[7, 9]).unwrap();
        let points = grid.points();
        let names: Vec<&str> = points.iter().map(|point| point.name.as_str()).collect();
        assert_eq!(names[0], "1-learning_rate=0.05-hidden=16-seed=7");
        assert_eq!(names[7], "8-learning_rate=0.1-hidden=32-16-seed=9");
        assert_eq!((points.len(), points[5].combination, points[5].seed), (8, 2, Some(9)));
        assert_eq!(grid.assignments(&points[5]), ["train.learning_rate=0.1", "model.hidden=[16]"]);
        let alike =
            Grid { seeds: vec![], ..self::grid(&["data.seed=1", "partition.seed=../2"], &[]).unwrap() };
        assert_eq!(alike.points()[0].name, "1-data.seed=1-partition.seed=..-2");
        assert!(!alike.points()[0].name.contains('/'));
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        for (vary, seeds, words) in [
            (&[][..], &[][..], "a sweep varies something"),
            (&["train.learning_rate"], &[], "is not `key=value,value`"),
            (&["=1,2"], &[], "names no key"),
            (&["a="], &[], "value 1 is empty"),
            (&["a=1,,2"], &[], "value 2 is empty"),
            (&["a=1,2,"], &[], "value 3 is empty"),
            (&["a=[1,2"], &[], "not closed"),
            (&["a=1],2"], &[], "not closed"),
            (&["a='x,2"], &[], "not closed"),
            (&["a=0.1,0.10"], &[], "a: 0.10 is given twice"),
            (&["a=1", "a=2"], &[], "--vary a is given twice"),
            (&["a=1"], &[1, 2, 1], "--seeds: 1 is given twice"),
            (&["seed=1,2"], &[1], "both set the seed"),
        ] {
            let error = grid(vary, seeds).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains('\n'), "{vary:?}: {error}");
        }
        let many: Vec<String> = (0..101).map(|number| number.to_string()).collect();
        let many = [format!("a={}", many.join(",")), format!("b={}", many.join(","))];
        assert_eq!(Grid::parse(&many, &[]), Err(GridError::TooMany { points: 10_201 }));
    }

    proptest! {
        #[test]
        fn any_values_come_back_and_any_name_is_safe(values in prop::collection::vec("[a-z0-9 /\\\\.\u{e9}]{0,12}x", 1..6)) {
            let mut unique: Vec<String> = values.iter().map(|value| value.trim().to_owned()).collect();
            unique.sort();
            unique.dedup();
            let grid = grid(&[&format!("k={}", unique.join(","))], &[]).unwrap();
            prop_assert_eq!(&grid.varied[0].values, &unique);
            for point in grid.points() {
                prop_assert!(point.name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".=_-".contains(&byte)));
                prop_assert!(!point.name.starts_with('.') && point.name.len() <= NAME_BYTES);
            }
        }
    }
}
