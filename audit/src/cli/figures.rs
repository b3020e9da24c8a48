//! `epsilon` and `noise`: both accountants' figures with all that they mean nothing without.

use std::fmt::Write as _;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use tributary_common::privacy::accounting::{
    self, Accountant, AccountingError, Basis, Guarantee, noise_multiplier_for,
};
use tributary_common::privacy::{Adjacency, Event, Unit};

use super::{Format, Outcome};

/// Whose presence is hidden.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum UnitName {
    /// One row.
    #[default]
    Example,
    /// All rows of one person, or of another group.
    Group,
    /// All that one client holds.
    Client,
}

impl UnitName {
    fn unit(self) -> Unit {
        match self {
            UnitName::Example => Unit::Example,
            UnitName::Group => Unit::Group,
            UnitName::Client => Unit::Client,
        }
    }
}

/// Whose figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum AccountantName {
    /// Privacy loss distributions: the tighter.
    Pld,
    /// Rényi divergences: what data-set accounts are kept in.
    Rdp,
    /// The smaller of the two.
    #[default]
    Best,
}

impl AccountantName {
    fn accountant(self) -> Accountant {
        match self {
            AccountantName::Pld => Accountant::Pld,
            AccountantName::Rdp => Accountant::Rdp,
            AccountantName::Best => Accountant::Best,
        }
    }
}

/// What both commands ask for.
#[derive(Debug, Args)]
struct Run {
    /// Probability with which each unit is in a step's sample, above 0 and at most 1.
    #[arg(long, value_name = "Q")]
    sampling_rate: f64,
    /// Steps in all: rounds times local steps.
    #[arg(long, value_name = "T")]
    steps: u64,
    /// Probability that the guarantee fails, below 1.
    #[arg(long, value_name = "D")]
    delta: f64,
    /// Whose figure counts; both are printed.
    #[arg(long, value_enum, default_value_t)]
    accountant: AccountantName,
    /// Whose presence is hidden.
    #[arg(long, value_enum, default_value_t)]
    unit: UnitName,
    /// How to print it.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Arguments of `epsilon`.
#[derive(Debug, Args)]
pub(super) struct EpsilonArguments {
    /// Standard deviation of the noise on the sum, per clipping norm.
    #[arg(long, value_name = "S")]
    noise_multiplier: f64,
    #[command(flatten)]
    run: Run,
}

/// Arguments of `noise`.
#[derive(Debug, Args)]
pub(super) struct NoiseArguments {
    /// The epsilon that is not to be passed.
    #[arg(long, value_name = "E")]
    target_epsilon: f64,
    #[command(flatten)]
    run: Run,
}

/// Prints what the run costs.
pub(super) fn epsilon(arguments: &EpsilonArguments) -> anyhow::Result<Outcome> {
    let EpsilonArguments { noise_multiplier, run } = arguments;
    let figures = Figures::of(*noise_multiplier, run)?;
    match run.format {
        Format::Text => print!("{}", figures.text(run)),
        Format::Json => println!("{}", figures.json("epsilon", run)),
    }
    Ok(Outcome::Sound)
}

/// Prints the noise that the target asks for, and what it then costs.
pub(super) fn noise(arguments: &NoiseArguments) -> anyhow::Result<Outcome> {
    let NoiseArguments { target_epsilon, run } = arguments;
    let Run { sampling_rate, steps, delta, .. } = *run;
    let (unit, accountant) = (run.unit.unit(), run.accountant.accountant());
    let multiplier = noise_multiplier_for(*target_epsilon, delta, sampling_rate, steps, unit, accountant)?;
    // Rounded up in the sixth digit, so that what is printed still meets the target.
    let digits = 10f64.powi(5 - multiplier.log10().floor() as i32);
    let multiplier = (multiplier * digits).ceil() / digits;
    let figures = Figures::of(multiplier, run)?;
    match run.format {
        Format::Text => {
            println!("noise multiplier {multiplier} keeps epsilon at or below {target_epsilon}");
            print!("{}", figures.text(run));
        }
        Format::Json => {
            let mut object = figures.json("noise", run);
            if let Value::Object(object) = &mut object {
                object.insert("target_epsilon".into(), json!(target_epsilon));
            }
            println!("{object}");
        }
    }
    Ok(Outcome::Sound)
}

/// Both accountants' figures for a run, and the one that counts.
struct Figures {
    noise_multiplier: f64,
    /// None where the accountant does not cover the run.
    pld: Option<Guarantee>,
    rdp: Guarantee,
    claim: Guarantee,
}

impl Figures {
    fn of(noise_multiplier: f64, run: &Run) -> Result<Self, AccountingError> {
        let events = [Event::gaussian(run.sampling_rate, noise_multiplier, run.steps)];
        let ask = |accountant| accounting::epsilon(&events, run.delta, run.unit.unit(), accountant);
        let rdp = ask(Accountant::Rdp)?;
        let pld = match ask(Accountant::Pld) {
            Err(AccountingError::NotComposed) => None,
            other => Some(other?),
        };
        let claim = match run.accountant.accountant() {
            Accountant::Rdp => rdp,
            Accountant::Pld => pld.ok_or(AccountingError::NotComposed)?,
            Accountant::Best => pld.filter(|pld| pld.epsilon <= rdp.epsilon).unwrap_or(rdp),
        };
        Ok(Self { noise_multiplier, pld, rdp, claim })
    }

    fn text(&self, run: &Run) -> String {
        let mut text = String::new();
        let mut line = |guarantee: &Guarantee| {
            let mark = if guarantee.basis == self.claim.basis { "*" } else { " " };
            let (name, basis) = match guarantee.basis {
                Basis::Pld { grid_step } => ("pld", format!("grid step {grid_step:.2e} nats")),
                Basis::Rdp { order } => ("rdp", format!("order {order:.4}")),
            };
            // Up, never down: a bound stays one.
            let epsilon = (guarantee.epsilon * 1e5).ceil() / 1e5;
            let _ = writeln!(text, "{mark} {name}  epsilon {epsilon:.5}  ({basis})");
        };
        self.pld.iter().for_each(&mut line);
        line(&self.rdp);
        if self.pld.is_none() {
            text.push_str("  pld  not available: its losses exceed 600 nats in one step\n");
        }
        let adjacency = match self.claim.adjacency {
            Adjacency::AddOrRemoveOne => "data with one unit more or less",
            Adjacency::ZeroOut => "data where one unit contributes nothing; that it took part is public",
        };
        let Guarantee { delta, unit, .. } = self.claim;
        let unit = serde_json::to_value(unit).unwrap_or_default();
        let unit = unit.as_str().unwrap_or_default();
        let _ = writeln!(text, "  delta {delta:e}, unit {unit}, neighbours: {adjacency}");
        let Run { sampling_rate, steps, .. } = run;
        let noise = self.noise_multiplier;
        let _ = writeln!(
            text,
            "  {steps} steps fixed beforehand, Poisson sampling rate {sampling_rate}, noise multiplier {noise}"
        );
        text
    }

    /// Infinite figures are `null`.
    fn json(&self, event: &str, run: &Run) -> Value {
        let Guarantee { epsilon, delta, unit, adjacency, .. } = self.claim;
        json!({
            "event": event,
            "epsilon": epsilon,
            "accountant": if matches!(self.claim.basis, Basis::Pld { .. }) { "pld" } else { "rdp" },
            "pld": self.pld,
            "rdp": self.rdp,
            "delta": delta,
            "unit": unit,
            "adjacency": adjacency,
            "sampling_rate": run.sampling_rate,
            "noise_multiplier": self.noise_multiplier,
            "steps": run.steps,
        })
    }
}
