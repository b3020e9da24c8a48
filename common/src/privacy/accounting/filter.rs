//! The account of a data set that several jobs share: a Rényi filter at one order that was fixed when it was opened.
//!
//! Jobs, and the parameters of each, may be chosen after seeing what earlier ones released. Then a sum of costs at an
//! order that is chosen afterwards bounds nothing, but stopping before the sum at one fixed order passes a fixed budget
//! does: the whole interaction has the budget as its divergence (Feldman and Zrnic 2021, arXiv 2008.11193).
//! The guarantee is therefore the cap, (`epsilon`, `delta`), from the first charge on; what was spent so far is an
//! odometer's reading and promises nothing by itself.

use serde::{Deserialize, Serialize};

use super::distributed::Failures;
use super::rdp;
use crate::privacy::Event;

/// Highest order that [`default_order`] considers.
const HIGHEST_ORDER: u32 = 1024;
/// How much less than the best order's budget per order the default may have.
const ORDER_TOLERANCE: f64 = 0.01;
/// Part of the budget that is withheld, so that errors of arithmetic, at most 1e−11 of a cost, never pass the cap.
const WITHHELD: f64 = 1e-9;

/// The epsilon up to which the reading of an account without a cap counts inexact noise in full.
const UNCAPPED: f64 = 20.0;

/// Why a filter cannot be opened or charged.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum FilterError {
    /// The cap is not a positive number.
    #[error("a cap of epsilon {0} is not possible; it must be above 0 and finite")]
    Epsilon(f64),
    /// Delta is no probability that a guarantee can have.
    #[error("delta {0} is not between 0 and 1")]
    Delta(f64),
    /// The order is not above 1.
    #[error("order {0} is not above 1 and finite")]
    Order(f64),
    /// At this order the conversion alone exceeds the cap.
    #[error(
        "at order {order} a cap of epsilon {epsilon} with delta {delta} leaves no budget; raise one of the three"
    )]
    NoBudget {
        /// The cap.
        epsilon: f64,
        /// Its delta.
        delta: f64,
        /// The order.
        order: f64,
    },
    /// What is asked for costs more than is left.
    #[error("the account has {remaining:.6} of divergence left at order {order}; this costs {cost:.6}")]
    Exhausted {
        /// What it costs.
        cost: f64,
        /// What is left.
        remaining: f64,
        /// The order.
        order: f64,
    },
}

/// What an account was opened with; it never changes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cap {
    /// Largest epsilon of all that the account pays for.
    pub epsilon: f64,
    /// The delta that goes with it.
    pub delta: f64,
    /// The order α at which costs are added.
    pub order: f64,
}

impl Cap {
    /// A cap at the order of [`default_order`].
    ///
    /// # Errors
    /// Where no order has a budget, or the numbers are out of range.
    pub fn new(epsilon: f64, delta: f64) -> Result<Self, FilterError> {
        Ok(Self { epsilon, delta, order: default_order(epsilon, delta)? })
    }

    /// The divergence of order α that the account may spend: the largest whose conversion stays at the cap
    /// ([`rdp::epsilon_at`]).
    ///
    /// # Errors
    /// Where there is none, or the numbers are out of range.
    pub fn budget(&self) -> Result<f64, FilterError> {
        let Self { epsilon, delta, order } = *self;
        if !(epsilon > 0.0 && epsilon.is_finite()) {
            return Err(FilterError::Epsilon(epsilon));
        }
        if !(delta > 0.0 && delta < 1.0) {
            return Err(FilterError::Delta(delta));
        }
        if !(order > 1.0 && order.is_finite()) {
            return Err(FilterError::Order(order));
        }
        let budget = epsilon - rdp::surcharge(delta, order);
        if budget > 0.0 {
            Ok(budget * (1.0 - WITHHELD))
        } else {
            Err(FilterError::NoBudget { epsilon, delta, order })
        }
    }
}

/// The order for an account with this cap, a whole number: 7 for epsilon 3 and delta 1e−5.
///
/// For noise whose divergence is proportional to the order, as everybody's is that is not sampled, the order with the
/// largest budget(α)/α buys most. A sampled Gaussian's grows faster, which favours lower orders. So it is the lowest whole
/// order from 2 to 1024 whose budget(α)/α is within 1 % of the largest. Whole orders hold for discrete noise too.
///
/// # Errors
/// Where no order has a budget, or the numbers are out of range.
pub fn default_order(epsilon: f64, delta: f64) -> Result<f64, FilterError> {
    let worth = |order: u32| {
        let order = f64::from(order);
        Cap { epsilon, delta, order }.budget().map(|budget| budget / order)
    };
    let mut best = None;
    let mut refused = FilterError::Epsilon(epsilon);
    for order in 2..=HIGHEST_ORDER {
        match worth(order) {
            Ok(worth) => best = Some(best.map_or(worth, |best: f64| best.max(worth))),
            Err(error) => refused = error,
        }
    }
    let best = best.ok_or(refused)?;
    let enough = |order: &u32| worth(*order).is_ok_and(|worth| worth >= (1.0 - ORDER_TOLERANCE) * best);
    (2..=HIGHEST_ORDER).find(enough).map(f64::from).ok_or(refused)
}

/// What `events` cost an account that adds divergences at `order` and promises `delta`: their divergence and, in its unit,
/// what they pay into delta besides ([`Failures`]).
///
/// Failures of probability f in all leave δ − f for the conversion, which adds −ln(1 − f/δ)/(α − 1) to epsilon. Up to
/// f = δ/2 that is at most 2·ln 2·f/(δ(α − 1)), so it can be added up like a divergence; and with a cap ε, whose budget is
/// less than ε, charging at least 2ε·f/δ sees to it that f stays below δ/2. Without a cap there is no promise, and e^ε is
/// taken for ε = 20.
pub fn cost(events: &[Event], order: f64, delta: f64, cap: Option<f64>) -> f64 {
    let divergence = rdp::composed(events, order);
    let failures = Failures::of(events);
    if failures.are_none() {
        return divergence;
    }
    let per_part = (2.0 * std::f64::consts::LN_2 / (order - 1.0)).max(cap.map_or(0.0, |cap| 2.0 * cap));
    divergence + per_part * failures.delta(cap.unwrap_or(UNCAPPED)) / delta
}

/// An account: its cap and what was charged to it.
///
/// A charge must be durable before what it pays for begins, and may be given back only for what never began.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Filter {
    cap: Cap,
    budget: f64,
    spent: f64,
}

impl Filter {
    /// An account with nothing spent.
    ///
    /// # Errors
    /// Where the cap has no budget, or its numbers are out of range.
    pub fn open(cap: Cap) -> Result<Self, FilterError> {
        Ok(Self { cap, budget: cap.budget()?, spent: 0.0 })
    }

    /// What it was opened with.
    pub fn cap(&self) -> Cap {
        self.cap
    }

    /// The divergence that may be spent in all.
    pub fn budget(&self) -> f64 {
        self.budget
    }

    /// The divergence spent so far.
    pub fn spent(&self) -> f64 {
        self.spent
    }

    /// The divergence that is left, at least 0.
    pub fn remaining(&self) -> f64 {
        (self.budget - self.spent).max(0.0)
    }

    /// What `events` cost at the account's order.
    pub fn cost(&self, events: &[Event]) -> f64 {
        let Cap { epsilon, delta, order } = self.cap;
        cost(events, order, delta, Some(epsilon))
    }

    /// Whether `events` can be paid for. Nothing is changed.
    pub fn admits(&self, events: &[Event]) -> bool {
        self.spent + self.cost(events) <= self.budget
    }

    /// Pays for `events`.
    ///
    /// # Errors
    /// [`FilterError::Exhausted`], and nothing is changed.
    pub fn charge(&mut self, events: &[Event]) -> Result<(), FilterError> {
        if !self.admits(events) {
            let (cost, remaining) = (self.cost(events), self.remaining());
            return Err(FilterError::Exhausted { cost, remaining, order: self.cap.order });
        }
        self.spent += self.cost(events);
        Ok(())
    }

    /// How many times more `event`, all its `count` steps each time, can be paid for; `u64::MAX` where it costs nothing.
    pub fn affordable(&self, event: &Event) -> u64 {
        let cost = self.cost(std::slice::from_ref(event));
        if cost == 0.0 {
            return u64::MAX;
        }
        // The quotient may be one off, and a float that is no count saturates in the conversion.
        let mut times = (self.remaining() / cost) as u64;
        let pays = |times: u64| self.spent + times as f64 * cost <= self.budget;
        while times > 0 && !pays(times) {
            times -= 1;
        }
        times
    }

    /// Epsilon, at the cap's delta, of what was spent so far. An odometer's reading, not a guarantee: that is the cap.
    pub fn odometer(&self) -> f64 {
        rdp::epsilon_at(self.spent, self.cap.delta, self.cap.order)
    }
}
