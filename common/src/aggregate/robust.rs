//! Rules that a few hostile updates cannot move far: they need to see each update, and most of them all at once.
//!
//! Weights are the clients' own word. The norm bound keeps them; the others count every client once. Clients are taken in
//! the order of their names, so that no result depends on who came first.

use super::{Accumulator, AggregateError, AggregationRule, Contribution, WeightedMean, norm};
use crate::job::{Aggregation, Combination, Job};

/// Coordinates of which all values are gathered at a time.
const BLOCK: usize = 1 << 12;

/// What makes each round's model where the job leaves it to the coordinator and no noise is added there.
pub fn rule_of(job: &Job) -> Box<dyn AggregationRule> {
    match job.aggregation.as_ref() {
        None | Some(Aggregation { rule: Combination::Mean, .. }) => Box::new(WeightedMean::default()),
        Some(Aggregation { rule: Combination::NormBound, norm_bound, .. }) => {
            Box::new(NormBound::new(norm_bound.unwrap_or(f64::INFINITY)))
        }
        Some(aggregation) => Box::new(OrderStatistics::new(aggregation.clone())),
    }
}

/// The weighted mean of updates that are shortened to a norm: `Δ·min(1, bound/‖Δ‖₂)` (Sun et al. 2019, section 4).
#[derive(Debug)]
pub struct NormBound {
    bound: f64,
    sum: Accumulator,
    refused: Option<AggregateError>,
}

impl NormBound {
    /// Shortens to `bound`, above 0.
    pub fn new(bound: f64) -> Self {
        Self { bound, sum: Accumulator::new(0), refused: None }
    }
}

impl AggregationRule for NormBound {
    fn begin(&mut self, _round: u32, parameters: usize) {
        self.sum = Accumulator::new(parameters);
        self.refused = None;
    }

    fn add(&mut self, update: Contribution) {
        let norm = norm(update.delta());
        let added = if norm > self.bound {
            let factor = self.bound / norm;
            let shortened: Vec<f32> =
                update.delta().iter().map(|value| (f64::from(*value) * factor) as f32).collect();
            self.sum.add(&shortened, update.examples())
        } else {
            self.sum.add(update.delta(), update.examples())
        };
        if let Err(error) = added {
            self.refused.get_or_insert(error);
        }
    }

    fn finish(&mut self, model: &[f32]) -> Result<Vec<f32>, AggregateError> {
        match self.refused.take() {
            Some(error) => Err(error),
            None => self.sum.average_onto(model),
        }
    }
}

/// Rules over all updates of a round: [`Combination::Median`], [`Combination::TrimmedMean`], [`Combination::Krum`] and
/// [`Combination::MultiKrum`]. It keeps nothing from round to round; in a round, every update.
#[derive(Debug)]
pub struct OrderStatistics {
    aggregation: Aggregation,
    held: Vec<Contribution>,
}

impl OrderStatistics {
    /// The rule of a job's `[aggregation]`.
    pub fn new(aggregation: Aggregation) -> Self {
        Self { aggregation, held: Vec::new() }
    }

    /// The updates whose mean is taken, by their place among the sorted ones: all, but for Krum.
    fn selected(&self) -> Result<Vec<usize>, AggregateError> {
        let attackers = self.aggregation.attackers.unwrap_or_default() as usize;
        let all = self.held.len();
        let most = match self.aggregation.rule {
            Combination::Krum => 1,
            Combination::MultiKrum => match self.aggregation.selected {
                Some(selected) => selected as usize,
                None => all.saturating_sub(attackers),
            },
            _ => return Ok((0..all).collect()),
        };
        if all < 2 * attackers + 3 {
            return Err(AggregateError::Rule(format!(
                "{all} updates, but against {attackers} attackers {} are needed",
                2 * attackers + 3
            )));
        }
        let scores = scores(&self.held, attackers);
        let mut order: Vec<usize> = (0..all).collect();
        // Equal scores: the first by name.
        order.sort_by(|a, b| scores.get(*a).partial_cmp(&scores.get(*b)).unwrap_or(a.cmp(b)).then(a.cmp(b)));
        order.truncate(most.max(1));
        order.sort_unstable();
        Ok(order)
    }
}

/// Krum's scores: for each update the sum of its squared distances to the `n − f − 2` nearest others (Blanchard et al.
/// 2017, section 4).
fn scores(updates: &[Contribution], attackers: usize) -> Vec<f64> {
    let all = updates.len();
    let mut distances = vec![0.0; all * all];
    for (i, one) in updates.iter().enumerate() {
        for (j, other) in updates.iter().enumerate().skip(i + 1) {
            let pairs = one.delta().iter().zip(other.delta());
            let distance: f64 = pairs.map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
            for at in [i * all + j, j * all + i] {
                if let Some(place) = distances.get_mut(at) {
                    *place = distance;
                }
            }
        }
    }
    let nearest = all.saturating_sub(attackers + 2);
    let score = |(i, row): (usize, &[f64])| {
        let mut others: Vec<f64> =
            row.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, distance)| *distance).collect();
        others.sort_by(f64::total_cmp);
        others.iter().take(nearest).sum()
    };
    distances.chunks(all.max(1)).enumerate().map(score).collect()
}

/// The median of values that may be reordered; of an even number the mean of the two in the middle.
fn median(values: &mut [f32]) -> f64 {
    let middle = values.len() / 2;
    if values.is_empty() {
        return 0.0;
    }
    let even = values.len().is_multiple_of(2);
    let (below, upper, _) = values.select_nth_unstable_by(middle, f32::total_cmp);
    let upper = f64::from(*upper);
    if !even {
        return upper;
    }
    let lower = below.iter().copied().max_by(f32::total_cmp).map_or(upper, f64::from);
    (lower + upper) / 2.0
}

/// The mean of values that may be reordered, without the `trimmed` smallest and largest.
fn trimmed_mean(values: &mut [f32], trimmed: usize) -> f64 {
    values.sort_unstable_by(f32::total_cmp);
    let kept = values.get(trimmed..values.len().saturating_sub(trimmed)).unwrap_or_default();
    kept.iter().map(|value| f64::from(*value)).sum::<f64>() / kept.len().max(1) as f64
}

impl AggregationRule for OrderStatistics {
    fn begin(&mut self, _round: u32, _parameters: usize) {
        self.held.clear();
    }

    fn add(&mut self, update: Contribution) {
        self.held.push(update);
    }

    fn finish(&mut self, model: &[f32]) -> Result<Vec<f32>, AggregateError> {
        if self.held.is_empty() {
            return Err(AggregateError::Empty);
        }
        self.held.sort_by(|a, b| a.client().cmp(b.client()));
        let trimmed = self.aggregation.attackers.unwrap_or_default() as usize;
        if self.aggregation.rule == Combination::TrimmedMean && self.held.len() <= 2 * trimmed {
            return Err(AggregateError::Rule(format!(
                "{} updates, of which {trimmed} are left out at either end",
                self.held.len()
            )));
        }
        let selected = self.selected()?;
        let updates: Vec<&[f32]> =
            selected.iter().filter_map(|at| self.held.get(*at)).map(Contribution::delta).collect();
        let mut next = Vec::with_capacity(model.len());
        let mut columns = vec![0.0; BLOCK * updates.len()];
        for (block, old) in model.chunks(BLOCK).enumerate() {
            // All values of a coordinate side by side.
            for (client, update) in updates.iter().enumerate() {
                let part = update.get(block * BLOCK..block * BLOCK + old.len()).unwrap_or_default();
                for (at, value) in part.iter().enumerate() {
                    if let Some(place) = columns.get_mut(at * updates.len() + client) {
                        *place = *value;
                    }
                }
            }
            for (old, values) in old.iter().zip(columns.chunks_mut(updates.len().max(1))) {
                let change = match self.aggregation.rule {
                    Combination::Median => median(values),
                    Combination::TrimmedMean => trimmed_mean(values, trimmed),
                    _ => values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len() as f64,
                };
                next.push((f64::from(*old) + change) as f32);
            }
        }
        self.held.clear();
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    fn aggregation(rule: Combination, attackers: Option<u32>, selected: Option<u32>) -> Aggregation {
        Aggregation { rule, norm_bound: None, attackers, selected }
    }

    fn finished(mut rule: impl AggregationRule, updates: &[Vec<f32>], order: &[usize]) -> Vec<f32> {
        let parameters = updates[0].len();
        rule.begin(1, parameters);
        for index in order {
            let client = format!("node-{index:02}").parse().unwrap();
            let delta = Arc::new(updates[*index].clone());
            rule.add(Contribution::new(client, 1 + *index as u64, delta, parameters).unwrap());
        }
        rule.finish(&vec![0.0; parameters]).unwrap()
    }

    fn all(rule: Aggregation, updates: &[Vec<f32>]) -> Vec<f32> {
        let order: Vec<usize> = (0..updates.len()).collect();
        finished(OrderStatistics::new(rule), updates, &order)
    }

    #[test]
    fn medians_and_trimmed_means_of_a_few() {
        let updates = [vec![1.0, 5.0], vec![2.0, -7.0], vec![9.0, 0.0], vec![4.0, 1.0]];
        assert_eq!(all(aggregation(Combination::Median, None, None), &updates), [3.0, 0.5]);
        assert_eq!(all(aggregation(Combination::Median, None, None), &updates[..3]), [2.0, 0.0]);
        assert_eq!(all(aggregation(Combination::TrimmedMean, Some(1), None), &updates), [3.0, 0.5]);
        assert_eq!(all(aggregation(Combination::TrimmedMean, Some(0), None), &updates), [4.0, -0.25]);
    }

    #[test]
    fn krum_takes_the_update_that_is_nearest_to_the_others() {
        // Five near 1, and one far away: f = 1, n = 6.
        let mut updates: Vec<Vec<f32>> =
            [0.9, 1.0, 1.05, 1.1, 1.3].iter().map(|value| vec![*value; 3]).collect();
        updates.push(vec![-50.0; 3]);
        // Squared distances to the three nearest: 0.0225 for 1.0, 0.0275 for 1.05, more for the others.
        assert_eq!(all(aggregation(Combination::Krum, Some(1), None), &updates), [1.0; 3]);
        let three = all(aggregation(Combination::MultiKrum, Some(1), Some(3)), &updates);
        assert!(three.iter().all(|value| (value - 1.05).abs() < 1e-6), "{three:?}");
        let most = all(aggregation(Combination::MultiKrum, Some(1), None), &updates);
        assert!(most.iter().all(|value| (value - 1.07).abs() < 1e-6), "{most:?}");
        // Of equals the first by name.
        let equal = vec![vec![2.0]; 5];
        assert_eq!(all(aggregation(Combination::Krum, Some(1), None), &equal), [2.0]);
    }

    #[test]
    fn too_few_updates_are_no_model() {
        for (rule, count) in [(Combination::Krum, 4), (Combination::TrimmedMean, 2)] {
            let mut rule = OrderStatistics::new(aggregation(rule, Some(1), None));
            rule.begin(1, 1);
            for index in 0..count {
                let client = format!("n{index}").parse().unwrap();
                rule.add(Contribution::new(client, 1, Arc::new(vec![1.0]), 1).unwrap());
            }
            assert!(matches!(rule.finish(&[0.0]), Err(AggregateError::Rule(_))));
        }
        let mut empty = OrderStatistics::new(aggregation(Combination::Median, None, None));
        empty.begin(1, 1);
        assert_eq!(empty.finish(&[0.0]), Err(AggregateError::Empty));
    }

    #[test]
    fn a_norm_bound_shortens_what_is_long_and_nothing_else() {
        let updates = [vec![3.0, 4.0], vec![0.3, 0.4]];
        let next = finished(NormBound::new(1.0), &updates, &[0, 1]);
        // Weights 1 and 2: (0.6, 0.8) and (0.3, 0.4) twice.
        assert!((next[0] - 0.4).abs() < 1e-6 && (next[1] - 1.6 / 3.0).abs() < 1e-6, "{next:?}");
    }

    /// By definition, with no blocks and no selection: what the rules must agree with.
    fn by_definition(rule: Combination, attackers: usize, updates: &[Vec<f32>]) -> Vec<f32> {
        (0..updates[0].len())
            .map(|at| {
                let mut column: Vec<f64> = updates.iter().map(|update| f64::from(update[at])).collect();
                column.sort_by(f64::total_cmp);
                let n = column.len();
                let value = match rule {
                    Combination::Median if n % 2 == 1 => column[n / 2],
                    Combination::Median => (column[n / 2 - 1] + column[n / 2]) / 2.0,
                    _ => {
                        let kept = &column[attackers..n - attackers];
                        kept.iter().sum::<f64>() / kept.len() as f64
                    }
                };
                value as f32
            })
            .collect()
    }

    proptest! {
        #[test]
        fn order_statistics_are_by_definition_whatever_the_order_of_arrival(
            updates in (3usize..9).prop_flat_map(|n| {
                proptest::collection::vec(proptest::collection::vec(-9.0f32..9.0, BLOCK + 3), n..=n)
            }),
            turn in 0usize..9,
        ) {
            let n = updates.len();
            let order: Vec<usize> = (0..n).map(|at| (at + turn) % n).collect();
            for (rule, attackers) in [(Combination::Median, None), (Combination::TrimmedMean, Some(1))] {
                let own = finished(OrderStatistics::new(aggregation(rule, attackers, None)), &updates, &order);
                prop_assert_eq!(own, by_definition(rule, attackers.unwrap_or(0) as usize, &updates));
            }
            if n >= 5 {
                let krum = || OrderStatistics::new(aggregation(Combination::MultiKrum, Some(1), Some(2)));
                let forwards: Vec<usize> = (0..n).collect();
                prop_assert_eq!(finished(krum(), &updates, &order), finished(krum(), &updates, &forwards));
            }
        }

        /// With fewer attackers than the rule is for, each coordinate stays within what honest clients sent; Krum's choice
        /// is no attacker's, if honest updates are near each other and the attackers' are far.
        #[test]
        fn attackers_do_not_move_the_model_out_of_the_honest_range(
            honest in proptest::collection::vec(proptest::collection::vec(-1.0f32..1.0, 6), 5..8),
            attack in proptest::collection::vec(proptest::collection::vec(-9000.0f32..9000.0, 6), 1..=1),
        ) {
            let updates: Vec<Vec<f32>> = honest.iter().chain(&attack).cloned().collect();
            for (rule, attackers) in [(Combination::Median, None), (Combination::TrimmedMean, Some(1))] {
                for (at, value) in all(aggregation(rule, attackers, None), &updates).iter().enumerate() {
                    let column = || honest.iter().map(|update| update[at]);
                    let (least, most) = (column().fold(f32::MAX, f32::min), column().fold(f32::MIN, f32::max));
                    prop_assert!((least..=most).contains(value), "{} is not in {}..={}", value, least, most);
                }
            }
            if attack[0].iter().any(|value| value.abs() > 100.0) {
                let chosen = all(aggregation(Combination::Krum, Some(1), None), &updates);
                prop_assert!(honest.contains(&chosen));
            }
        }
    }
}
