//! The `[devices]` table: how fast the clients and their connections are, and when they are online.
//!
//! Virtual time only: no real time passes for any of it, and none of it enters training. Without the table a client
//! takes 1 ms per SGD step, messages and models take no time, and everybody is always online.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::RngExt;
use rand_distr::{Distribution, Exp, LogNormal};
use serde::{Deserialize, Serialize};
use toml::Value;
use tributary_common::document::Schema;
use tributary_common::ids::NodeName;
use tributary_common::rng::{Purpose, Stream};
use tributary_common::time::Time;

/// The keys of the `[devices]` table.
pub const SCHEMA: Schema = Schema {
    keys: &[
        "step_milliseconds",
        "download_megabits_per_second",
        "upload_megabits_per_second",
        "latency_milliseconds",
        "trace",
    ],
    tables: &[("availability", Some(&Schema { keys: &["online_seconds", "offline_seconds"], tables: &[] }))],
};
/// Largest trace that is read.
const TRACE_BYTES: u64 = 256 << 20;
/// Largest figure of any key: in milliseconds eleven days, in seconds thirty years.
const LARGEST: f64 = 1e9;
/// The clients of a trace that have no rows of their own.
const ANYBODY: &str = "*";

/// Why a `[devices]` table, or its trace, is refused. Each displays as one line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DevicesError {
    /// A figure is out of its range.
    #[error("[devices] {key}: {value} is not possible; give {range}")]
    Range {
        /// The key.
        key: &'static str,
        /// The figure.
        value: f64,
        /// What is possible.
        range: &'static str,
    },
    /// Two keys contradict each other.
    #[error("[devices] trace gives every figure of every client: remove {0}, or the trace")]
    Contradiction(&'static str),
    /// The trace cannot be read.
    #[error("{}: cannot be read ({cause}); [devices] trace names a CSV file beside the scenario", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: String,
    },
    /// A row of the trace is wrong.
    #[error("{}, line {line}: {problem}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// Somebody has no device.
    #[error("{}: client {client} has no row: add one, or rows for client \"*\" that are shared out", path.display())]
    Nobody {
        /// The file.
        path: PathBuf,
        /// The client.
        client: NodeName,
    },
    /// A row's client is not there.
    #[error("{}: client {client} is not in the population: correct the name, or remove its rows", path.display())]
    Stranger {
        /// The file.
        path: PathBuf,
        /// The client.
        client: NodeName,
    },
}

/// One figure of every client: the same for all, or drawn for each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum Figure {
    /// The same for all.
    Number(f64),
    /// `median · exp(sigma · N(0, 1))`.
    LogNormal {
        /// Half of the clients have at most this.
        median: f64,
        /// Spread of the logarithm, from 0.
        sigma: f64,
    },
    /// Evenly between two figures.
    Uniform {
        /// The least.
        from: f64,
        /// The most.
        to: f64,
    },
    /// One of these, each as likely as the others.
    Choice(Vec<f64>),
}

impl TryFrom<Value> for Figure {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let forms = "a number, { lognormal = { median = 20, sigma = 0.5 } }, { uniform = { from = 1, to = 9 } } or \
                     { choice = [5, 20, 80] } is needed";
        let wrong = || format!("{value} is not a figure: {forms}");
        if let Some(number) = number(&value) {
            return Ok(Figure::Number(number));
        }
        let table = value.as_table().filter(|table| table.len() == 1).ok_or_else(wrong)?;
        let (name, inner) = table.iter().next().ok_or_else(wrong)?;
        let two = |first: &str, second: &str| {
            let inner = inner.as_table().filter(|inner| inner.len() == 2)?;
            Some((number(inner.get(first)?)?, number(inner.get(second)?)?))
        };
        let drawn = match name.as_str() {
            "lognormal" => two("median", "sigma").map(|(median, sigma)| Figure::LogNormal { median, sigma }),
            "uniform" => two("from", "to").map(|(from, to)| Figure::Uniform { from, to }),
            "choice" => {
                let figures =
                    inner.as_array().map(|all| all.iter().map(number).collect::<Option<Vec<f64>>>());
                figures.flatten().map(Figure::Choice)
            }
            _ => None,
        };
        drawn.ok_or_else(wrong)
    }
}

impl From<Figure> for Value {
    fn from(figure: Figure) -> Self {
        let table = |entries: Vec<(&str, Value)>| -> Value {
            Value::Table(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
        };
        match figure {
            Figure::Number(number) => Value::Float(number),
            Figure::LogNormal { median, sigma } => {
                table(vec![("lognormal", table(vec![("median", median.into()), ("sigma", sigma.into())]))])
            }
            Figure::Uniform { from, to } => {
                table(vec![("uniform", table(vec![("from", from.into()), ("to", to.into())]))])
            }
            Figure::Choice(figures) => table(vec![("choice", figures.into())]),
        }
    }
}

fn number(value: &Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|number| number as f64))
}

impl Figure {
    /// Refuses a figure that can be outside `least` to [`LARGEST`]; `least` itself is possible if `or_least`.
    fn check(&self, key: &'static str, least: f64, or_least: bool) -> Result<(), DevicesError> {
        let range = if or_least { "0 to 1000000000" } else { "more than 0, up to 1000000000" };
        let refuse = |value| Err(DevicesError::Range { key, value, range });
        let fits = |value: f64| value <= LARGEST && (value > least || (or_least && value == least));
        let bounds = match self {
            Figure::Number(number) => vec![*number],
            Figure::LogNormal { median, sigma } => {
                if !(0.0..=10.0).contains(sigma) {
                    return Err(DevicesError::Range { key, value: *sigma, range: "a sigma of 0 to 10" });
                }
                if *median <= 0.0 {
                    return Err(DevicesError::Range { key, value: *median, range: "a median above 0" });
                }
                vec![*median]
            }
            Figure::Uniform { from, to } => {
                if from > to {
                    return Err(DevicesError::Range { key, value: *from, range: "a `from` up to `to`" });
                }
                vec![*from, *to]
            }
            Figure::Choice(figures) if figures.is_empty() => {
                return Err(DevicesError::Range { key, value: 0.0, range: "at least one choice" });
            }
            Figure::Choice(figures) => figures.clone(),
        };
        bounds.into_iter().find(|value| !fits(*value)).map_or(Ok(()), refuse)
    }

    /// One client's figure, from its own stream.
    fn draw(&self, stream: &mut Stream) -> f64 {
        let drawn = match self {
            Figure::Number(number) => *number,
            Figure::LogNormal { median, sigma } => {
                // A checked sigma is finite, so the distribution exists.
                LogNormal::new(median.ln(), *sigma).map_or(*median, |normal| normal.sample(stream))
            }
            Figure::Uniform { from, to } => from + (to - from) * stream.random::<f64>(),
            Figure::Choice(figures) => {
                let at = stream.random_range(0..figures.len().max(1));
                figures.get(at).copied().unwrap_or_default()
            }
        };
        drawn.clamp(0.0, LARGEST)
    }
}

/// When clients are online: alternating exponential times with these means.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Availability {
    /// Mean time online.
    pub online_seconds: f64,
    /// Mean time offline.
    pub offline_seconds: f64,
}

/// The `[devices]` table.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DevicesConfig {
    /// Time of one SGD step; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_milliseconds: Option<Figure>,
    /// How fast a model comes; default: at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download_megabits_per_second: Option<Figure>,
    /// How fast an update goes; default: at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload_megabits_per_second: Option<Figure>,
    /// What any message takes one way; default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_milliseconds: Option<Figure>,
    /// When clients are online; default: always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub availability: Option<Availability>,
    /// A CSV file that gives all of this, relative to the scenario.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<PathBuf>,
}

impl DevicesConfig {
    /// Refuses figures that mean nothing.
    ///
    /// # Errors
    /// The first [`DevicesError`].
    pub fn validate(&self) -> Result<(), DevicesError> {
        let figures = [
            ("step_milliseconds", &self.step_milliseconds, false),
            ("download_megabits_per_second", &self.download_megabits_per_second, false),
            ("upload_megabits_per_second", &self.upload_megabits_per_second, false),
            ("latency_milliseconds", &self.latency_milliseconds, true),
        ];
        for (key, figure, or_least) in figures {
            let Some(figure) = figure else { continue };
            figure.check(key, 0.0, or_least)?;
            if self.trace.is_some() {
                return Err(DevicesError::Contradiction(key));
            }
        }
        if let Some(Availability { online_seconds, offline_seconds }) = self.availability {
            Figure::Number(online_seconds).check("availability.online_seconds", 0.0, false)?;
            Figure::Number(offline_seconds).check("availability.offline_seconds", 0.0, false)?;
            if self.trace.is_some() {
                return Err(DevicesError::Contradiction("availability"));
            }
        }
        Ok(())
    }
}

/// How fast one client and its connection are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Device {
    step_milliseconds: f64,
    download_megabits_per_second: f64,
    upload_megabits_per_second: f64,
    latency_milliseconds: f64,
}

impl Device {
    /// Nothing costs time.
    pub const IDEAL: Device = Device {
        step_milliseconds: 0.0,
        download_megabits_per_second: f64::INFINITY,
        upload_megabits_per_second: f64::INFINITY,
        latency_milliseconds: 0.0,
    };

    /// Milliseconds of `steps` SGD steps, `slowness` times as long as usual.
    pub fn training(&self, steps: u64, slowness: f64) -> u64 {
        milliseconds(steps as f64 * self.step_milliseconds * slowness)
    }

    /// Milliseconds of one message.
    pub fn message(&self) -> u64 {
        milliseconds(self.latency_milliseconds)
    }

    /// Milliseconds until a model of `bytes` is here.
    pub fn download(&self, bytes: u64) -> u64 {
        milliseconds(self.latency_milliseconds + transfer(bytes, self.download_megabits_per_second))
    }

    /// Milliseconds until an update of `bytes` is there.
    pub fn upload(&self, bytes: u64) -> u64 {
        milliseconds(self.latency_milliseconds + transfer(bytes, self.upload_megabits_per_second))
    }
}

fn transfer(bytes: u64, megabits_per_second: f64) -> f64 {
    bytes as f64 * 8.0 / (megabits_per_second * 1000.0)
}

/// To the nearest one; far beyond any deadline, a century is as good as more.
fn milliseconds(value: f64) -> u64 {
    const CENTURY: f64 = 3.2e12;
    value.clamp(0.0, CENTURY).round() as u64
}

/// A trace: devices with the times at which they are online.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Trace {
    path: PathBuf,
    own: BTreeMap<NodeName, Traced>,
    pool: Vec<Traced>,
}

#[derive(Debug, Clone, PartialEq)]
struct Traced {
    device: Device,
    /// From and until, one after another; `None`: always.
    online: Option<Vec<(Time, Time)>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TraceRow {
    client: String,
    step_milliseconds: f64,
    download_megabits_per_second: f64,
    upload_megabits_per_second: f64,
    latency_milliseconds: f64,
    online_from_seconds: Option<f64>,
    online_until_seconds: Option<f64>,
}

impl Trace {
    /// Reads a trace.
    ///
    /// # Errors
    /// A [`DevicesError`] that names the file and the line.
    pub fn read(path: &Path) -> Result<Self, DevicesError> {
        let io = |cause: String| DevicesError::Io { path: path.to_path_buf(), cause };
        let bytes = std::fs::metadata(path).map_err(|error| io(error.to_string()))?.len();
        if bytes > TRACE_BYTES {
            return Err(io(format!("{bytes} bytes are too many: at most {TRACE_BYTES} are read")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| io(error.to_string()))?;
        let mut trace = Self { path: path.to_path_buf(), ..Self::default() };
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text.as_bytes());
        let wrong = |line, problem| DevicesError::Row { path: path.to_path_buf(), line, problem };
        let headers = reader.headers().map_err(|error| wrong(1, error.to_string()))?.clone();
        for record in reader.into_records() {
            let record = record.map_err(|error| {
                let line = error.position().map_or(1, csv::Position::line);
                wrong(line, error.to_string().replace('\n', " "))
            })?;
            let line = record.position().map_or(1, csv::Position::line);
            let row = record.deserialize::<TraceRow>(Some(&headers));
            let row = row.map_err(|error| wrong(line, format!("{error}: the header says the columns")))?;
            trace.add(row).map_err(|problem| wrong(line, problem))?;
        }
        Ok(trace)
    }

    fn add(&mut self, row: TraceRow) -> Result<(), String> {
        let device = Device {
            step_milliseconds: row.step_milliseconds,
            download_megabits_per_second: row.download_megabits_per_second,
            upload_megabits_per_second: row.upload_megabits_per_second,
            latency_milliseconds: row.latency_milliseconds,
        };
        let checks = [
            ("step_milliseconds", row.step_milliseconds, false),
            ("download_megabits_per_second", row.download_megabits_per_second, false),
            ("upload_megabits_per_second", row.upload_megabits_per_second, false),
            ("latency_milliseconds", row.latency_milliseconds, true),
        ];
        for (key, value, or_least) in checks {
            Figure::Number(value).check(key, 0.0, or_least).map_err(|error| error.to_string())?;
        }
        let window = match (row.online_from_seconds, row.online_until_seconds) {
            (None, None) => None,
            (Some(from), Some(until)) if 0.0 <= from && from < until && until <= LARGEST => {
                Some((Time(milliseconds(from * 1000.0)), Time(milliseconds(until * 1000.0))))
            }
            _ => {
                return Err(
                    "give both online_from_seconds and a later online_until_seconds, from 0, or neither: \
                            then the client is always online"
                        .to_owned(),
                );
            }
        };
        let traced = Traced { device, online: window.map(|window| vec![window]) };
        if row.client == ANYBODY {
            self.pool.push(traced);
            return Ok(());
        }
        let client: NodeName = row.client.parse().map_err(|error| format!("{error}, or \"*\""))?;
        let Some(before) = self.own.get_mut(&client) else {
            self.own.insert(client, traced);
            return Ok(());
        };
        if before.device != device {
            return Err(format!(
                "{client} has other figures in an earlier row: give all of its rows the same"
            ));
        }
        match (&mut before.online, window) {
            (Some(windows), Some(window)) if windows.last().is_none_or(|last| last.1 < window.0) => {
                windows.push(window);
                Ok(())
            }
            _ => Err(format!("{client} is online already: order its rows by time, with gaps between them")),
        }
    }

    /// Refuses a population that the trace does not fit; `clients` are sorted.
    ///
    /// # Errors
    /// [`DevicesError::Stranger`] or [`DevicesError::Nobody`].
    pub fn check(&self, clients: &[&NodeName]) -> Result<(), DevicesError> {
        let path = || self.path.clone();
        if let Some(client) = self.own.keys().find(|client| clients.binary_search(client).is_err()) {
            return Err(DevicesError::Stranger { path: path(), client: client.clone() });
        }
        let nobody = clients.iter().find(|client| self.pool.is_empty() && !self.own.contains_key(**client));
        nobody.map_or(Ok(()), |client| Err(DevicesError::Nobody { path: path(), client: (*client).clone() }))
    }

    /// The device of a client that is the `place`th of all.
    fn of(&self, client: &NodeName, place: usize) -> Option<&Traced> {
        let shared_out = || self.pool.get(place.checked_rem(self.pool.len())?);
        self.own.get(client).or_else(shared_out)
    }
}

/// What a simulation knows of its clients' devices: nothing is kept per client, all is drawn again by name.
#[derive(Debug, Clone, Default)]
pub struct Devices {
    seed: u64,
    config: DevicesConfig,
    trace: Option<Arc<Trace>>,
}

impl Devices {
    /// The devices of a checked table, with the trace that it names.
    pub fn new(seed: u64, config: DevicesConfig, trace: Option<Arc<Trace>>) -> Self {
        Self { seed, config, trace }
    }

    /// Whether anybody may ever be offline.
    pub fn come_and_go(&self) -> bool {
        let traced =
            |trace: &Arc<Trace>| trace.own.values().chain(&trace.pool).any(|traced| traced.online.is_some());
        self.config.availability.is_some() || self.trace.as_ref().is_some_and(traced)
    }

    /// The device of `client`, the `place`th of all by name.
    pub fn of(&self, client: &NodeName, place: usize) -> Device {
        if let Some(trace) = &self.trace {
            return trace.of(client, place).map_or(Device::IDEAL, |traced| traced.device);
        }
        let config = &self.config;
        // A stream for each figure, so that one does not move another.
        let draw = |which: u32, figure: &Option<Figure>, default: f64| match figure {
            None => default,
            Some(Figure::Number(number)) => *number,
            Some(drawn) => drawn.draw(&mut Stream::new(self.seed, Purpose::Devices, which, client.as_str())),
        };
        Device {
            step_milliseconds: draw(0, &config.step_milliseconds, 1.0),
            download_megabits_per_second: draw(1, &config.download_megabits_per_second, f64::INFINITY),
            upload_megabits_per_second: draw(2, &config.upload_megabits_per_second, f64::INFINITY),
            latency_milliseconds: draw(3, &config.latency_milliseconds, 0.0),
        }
    }

    /// Whether `client` is online when the simulation starts.
    pub fn starts_online(&self, client: &NodeName, place: usize) -> bool {
        if let Some(trace) = &self.trace {
            let online = trace.of(client, place).and_then(|traced| traced.online.as_ref());
            return online.is_none_or(|windows| windows.first().is_some_and(|first| first.0 == Time(0)));
        }
        let Some(Availability { online_seconds, offline_seconds }) = self.config.availability else {
            return true;
        };
        let share = online_seconds / (online_seconds + offline_seconds);
        Stream::new(self.seed, Purpose::Availability, 0, client.as_str()).random::<f64>() < share
    }

    /// When `client`, which is online or not since `now`, comes or goes for the `nth` time, from 1; `None`: never.
    pub fn next_change(
        &self,
        client: &NodeName,
        place: usize,
        nth: u32,
        now: Time,
        is_online: bool,
    ) -> Option<Time> {
        if let Some(trace) = &self.trace {
            let windows = trace.of(client, place)?.online.as_ref()?;
            let mut next = windows.iter().flat_map(|(from, until)| [*from, *until]);
            return next.find(|at| *at > now);
        }
        let Availability { online_seconds, offline_seconds } = self.config.availability?;
        let mean = if is_online { online_seconds } else { offline_seconds };
        let mut stream = Stream::new(self.seed, Purpose::Availability, nth, client.as_str());
        // A checked mean is above 0, so the distribution exists. Nobody comes or goes twice in a millisecond.
        let seconds = Exp::new(1.0 / mean).map_or(mean, |exponential| exponential.sample(&mut stream));
        Some(now + milliseconds(seconds * 1000.0).max(1))
    }
}
