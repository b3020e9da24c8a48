//! `epsilon` and `noise`: both accountants' figures with all that they mean nothing without.

use std::fmt::Write as _;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use tributary_common::privacy::accounting::{
    self, Accountant, AccountingError, Basis, Guarantee, noise_multiplier_for,
};
use tributary_common::privacy::distributed::{self, Level, Plan, Requirements, Scale};
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

/// How noise is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum MechanismName {
    /// Gaussian noise by one party.
    #[default]
    Gaussian,
    /// Skellam noise in shares, under masks: --dimension and --survivors are needed.
    Skellam,
}

/// What noise in shares is planned from.
#[derive(Debug, Args)]
#[command(next_help_heading = "Noise in shares (--mechanism skellam)")]
struct SharesArguments {
    /// Coordinates of the vector.
    #[arg(long, value_name = "K", default_value_t = 0, hide_default_value = true)]
    dimension: usize,
    /// Fewest survivors with which a sum is released.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    survivors: u32,
    /// How many of them may be dishonest.
    #[arg(long, value_name = "N", default_value_t = 0)]
    colluders: u32,
    /// Clip norm C, in the vector's unit.
    #[arg(long, value_name = "C", default_value_t = 1.0)]
    clip_norm: f64,
    /// Grid steps per unit of the vector; without it the coarsest grid whose rounding costs 1 % of the sensitivity.
    #[arg(long, value_name = "STEPS")]
    scale: Option<f64>,
}

/// What both commands ask for.
#[derive(Debug, Args)]
struct Run {
    /// How noise is added.
    #[arg(long, value_enum, default_value_t)]
    mechanism: MechanismName,
    #[command(flatten)]
    shares: SharesArguments,
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

impl Run {
    /// What the plan for noise in shares starts from. Sizes of sums and of a ring are no part of what they cost.
    fn requirements(&self, noise_multiplier: f64) -> Requirements {
        let SharesArguments { dimension, survivors, colluders, clip_norm, scale } = self.shares;
        let level = match self.unit {
            UnitName::Client => Level::Client,
            UnitName::Example | UnitName::Group => Level::Example { batch_norm: 1.0 },
        };
        Requirements {
            level,
            noise_multiplier,
            clip_norm,
            dimension,
            fewest_survivors: survivors,
            colluders,
            most_clients: survivors,
            scale: scale.map_or(Scale::Inflation(0.01), Scale::Steps),
        }
    }

    /// What is done in all the steps, and the plan of one for noise in shares.
    fn event(&self, noise_multiplier: f64) -> anyhow::Result<(Event, Option<Plan>)> {
        match self.mechanism {
            MechanismName::Gaussian => {
                Ok((Event::gaussian(self.sampling_rate, noise_multiplier, self.steps), None))
            }
            MechanismName::Skellam => {
                let plan = Plan::new(&self.requirements(noise_multiplier))?;
                Ok((plan.event(self.sampling_rate, self.steps), Some(plan)))
            }
        }
    }
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
    let multiplier = match run.mechanism {
        MechanismName::Gaussian => {
            noise_multiplier_for(*target_epsilon, delta, sampling_rate, steps, unit, accountant)?
        }
        MechanismName::Skellam => {
            let requirements = run.requirements(1.0);
            distributed::noise_multiplier_for(*target_epsilon, delta, sampling_rate, steps, &requirements)?
        }
    };
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
    /// For noise in shares: its plan, and the epsilon if all others are dishonest.
    shares: Option<(Plan, Guarantee)>,
}

impl Figures {
    fn of(noise_multiplier: f64, run: &Run) -> anyhow::Result<Self> {
        let (event, plan) = run.event(noise_multiplier)?;
        let events = [event];
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
        let (_, alone) = distributed::guarantees(&events, run.delta, run.unit.unit())?;
        Ok(Self { noise_multiplier, pld, rdp, claim, shares: plan.map(|plan| (plan, alone)) })
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
        if let Some((plan, alone)) = &self.shares {
            let SharesArguments { survivors, colluders, .. } = run.shares;
            let alone = (alone.epsilon * 1e5).ceil() / 1e5;
            let _ = writeln!(
                text,
                "  with at most {colluders} of {survivors} survivors dishonest; epsilon {alone:.5} if all others are"
            );
            let Plan { scale, padded, sensitivity, .. } = plan;
            let share = plan.share_standard_deviation();
            let _ = writeln!(
                text,
                "  {scale} grid steps per unit, {padded} coordinates, sensitivity {sensitivity:.4}, share {share:.4} grid steps"
            );
        } else if self.pld.is_none() {
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
        let shares = self.shares.as_ref().map(|(plan, alone)| {
            json!({
                "epsilon_if_all_others_are_dishonest": alone.epsilon,
                "event": plan.event(run.sampling_rate, run.steps),
            })
        });
        json!({
            "event": event,
            "shares": shares,
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
