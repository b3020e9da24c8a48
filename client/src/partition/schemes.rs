//! The schemes that draw: from labels to each client's positions, with the examples of one group kept together.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use rand::RngExt;
use rand::seq::SliceRandom;
use rand_distr::{Distribution, Gamma};
use tributary_common::rng::Stream;

use crate::data::Split;

/// A position as it is stored: data sets are bounded by [`crate::data::EXAMPLES`], which fits.
pub(super) fn position(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

pub(super) fn positions(examples: usize) -> Vec<u32> {
    (0..examples).map(position).collect()
}

/// What the schemes share out: examples, or where there are groups whole groups.
pub(super) struct Units<'a> {
    /// A label each: a group's most frequent one, of equally frequent ones the smallest.
    pub(super) labels: Cow<'a, [i64]>,
    /// The positions of each group, in their order; empty without groups.
    groups: Vec<Vec<u32>>,
}

impl<'a> Units<'a> {
    pub(super) fn of(examples: &'a Split) -> Self {
        let mut groups: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (at, group) in examples.groups.iter().enumerate() {
            groups.entry(*group).or_default().push(position(at));
        }
        let groups: Vec<Vec<u32>> = groups.into_values().collect();
        if groups.is_empty() {
            return Self { labels: Cow::Borrowed(&examples.labels), groups };
        }
        let label = |group: &Vec<u32>| {
            let mut counts: BTreeMap<i64, usize> = BTreeMap::new();
            for label in group.iter().filter_map(|at| examples.labels.get(*at as usize)) {
                *counts.entry(*label).or_default() += 1;
            }
            counts
                .into_iter()
                .max_by_key(|(label, count)| (*count, Reverse(*label)))
                .map_or(0, |(label, _)| label)
        };
        Self { labels: groups.iter().map(label).collect(), groups }
    }

    /// Whether these are groups.
    pub(super) fn grouped(&self) -> bool {
        !self.groups.is_empty()
    }

    /// The positions of the examples of `units`.
    pub(super) fn examples(&self, units: Vec<u32>) -> Vec<u32> {
        if !self.grouped() {
            return units;
        }
        units.iter().filter_map(|unit| self.groups.get(*unit as usize)).flatten().copied().collect()
    }
}

/// Cuts into `parts` whose lengths differ by at most one, longer ones first, as numpy's `array_split` does.
pub(super) fn cut(order: &[u32], parts: usize) -> Vec<Vec<u32>> {
    let (each, longer) = (order.len() / parts, order.len() % parts);
    let mut rest = order;
    let mut piece = |index: usize| {
        let (head, tail) = rest.split_at_checked(each + usize::from(index < longer)).unwrap_or((rest, &[]));
        rest = tail;
        head.to_vec()
    };
    (0..parts).map(&mut piece).collect()
}

/// Shuffled positions, cut into parts whose sizes follow a power law over a random order of the clients.
pub(super) fn by_quantity(examples: usize, clients: usize, power: f64, stream: &mut Stream) -> Vec<Vec<u32>> {
    let mut order = positions(examples);
    order.shuffle(stream);
    let mut ranked: Vec<usize> = (0..clients).collect();
    ranked.shuffle(stream);
    let mut parts = vec![Vec::new(); clients];
    let mut rest = order.as_slice();
    for (client, size) in ranked.into_iter().zip(power_law(examples, clients, power)) {
        let (head, tail) = rest.split_at_checked(size).unwrap_or((rest, &[]));
        rest = tail;
        parts.get_mut(client).into_iter().for_each(|part| part.extend_from_slice(head));
    }
    parts
}

/// The sizes of the clients of rank 1, 2, …, largest first: one example each, and of the others a share
/// k^-power / Σ j^-power for rank k, rounded by largest remainder so that none is left.
pub(super) fn power_law(examples: usize, clients: usize, power: f64) -> Vec<usize> {
    let weights: Vec<f64> = (1..=clients).map(|rank| (rank as f64).powf(-power)).collect();
    let sum: f64 = weights.iter().sum();
    let others = examples.saturating_sub(clients);
    let quotas: Vec<f64> = weights.into_iter().map(|weight| others as f64 * weight / sum).collect();
    let mut sizes: Vec<usize> = quotas.iter().map(|quota| 1 + *quota as usize).collect();
    let mut by_remainder: Vec<(usize, f64)> = quotas.iter().map(|quota| quota.fract()).enumerate().collect();
    by_remainder.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    let left = examples.saturating_sub(sizes.iter().sum());
    for (rank, _) in by_remainder.into_iter().take(left) {
        sizes.get_mut(rank).into_iter().for_each(|size| *size += 1);
    }
    sizes
}

pub(super) fn by_shards(labels: &[i64], clients: usize, each: usize, stream: &mut Stream) -> Vec<Vec<u32>> {
    let mut order = positions(labels.len());
    order.sort_by_key(|at| labels.get(*at as usize));
    let mut shards = cut(&order, clients * each);
    shards.shuffle(stream);
    shards.chunks(each).map(<[Vec<u32>]>::concat).collect()
}

/// The positions of each label, labels increasing.
fn by_label(labels: &[i64]) -> Vec<Vec<u32>> {
    let mut groups: BTreeMap<i64, Vec<u32>> = BTreeMap::new();
    for (at, label) in labels.iter().enumerate() {
        groups.entry(*label).or_default().push(position(at));
    }
    groups.into_values().collect()
}

pub(super) fn by_dirichlet(labels: &[i64], clients: usize, alpha: f64, stream: &mut Stream) -> Vec<Vec<u32>> {
    let mut parts = vec![Vec::new(); clients];
    for mut group in by_label(labels) {
        group.shuffle(stream);
        let (mut share, mut from) = (0.0, 0);
        let last = clients - 1;
        for (client, proportion) in proportions(clients, alpha, stream).into_iter().enumerate() {
            share += proportion;
            let cut = if client == last { group.len() } else { (share * group.len() as f64) as usize };
            let until = cut.clamp(from, group.len());
            if let (Some(part), Some(taken)) = (parts.get_mut(client), group.get(from..until)) {
                part.extend_from_slice(taken);
            }
            from = until;
        }
    }
    let mut fullest: BinaryHeap<(usize, Reverse<usize>)> =
        parts.iter().enumerate().map(|(client, part)| (part.len(), Reverse(client))).collect();
    for poor in 0..clients {
        if parts.get(poor).is_some_and(Vec::is_empty)
            && let Some((length, Reverse(rich))) = fullest.pop()
            && let Some(given) = parts.get_mut(rich).and_then(Vec::pop)
        {
            parts.get_mut(poor).into_iter().for_each(|part| part.push(given));
            fullest.push((length - 1, Reverse(rich)));
        }
    }
    parts
}

pub(super) fn dealt_by_dirichlet(
    labels: &[i64],
    clients: usize,
    samples: usize,
    alpha: f64,
    stream: &mut Stream,
) -> Vec<Vec<u32>> {
    let mut decks: Vec<Deck> = by_label(labels).into_iter().map(Deck::new).collect();
    let mut client = |_| {
        let mut sum = 0.0;
        let mut cumulative = proportions(decks.len(), alpha, stream);
        for share in &mut cumulative {
            sum += *share;
            *share = sum;
        }
        let mut card = |_| {
            let draw = stream.random::<f64>() * sum;
            let label = cumulative.partition_point(|upper| *upper <= draw).min(decks.len() - 1);
            decks.get_mut(label).map_or(0, |deck| deck.deal(stream))
        };
        (0..samples).map(&mut card).collect()
    };
    (0..clients).map(&mut client).collect()
}

/// Proportions drawn from Dir(α, …, α): normalised Gamma(α) draws, taken as logarithms so that a tiny α does
/// not round all of them to zero: Gamma(α) is distributed as Gamma(α + 1) · U^(1/α).
pub(super) fn proportions(parts: usize, alpha: f64, stream: &mut Stream) -> Vec<f64> {
    // `validate` keeps α in the range that `Gamma` takes.
    let Ok(gamma) = Gamma::new(alpha + 1.0, 1.0) else { return vec![1.0 / parts as f64; parts] };
    let logarithm = |_| {
        let uniform: f64 = 1.0 - stream.random::<f64>();
        gamma.sample(stream).ln() + uniform.ln() / alpha
    };
    let logarithms: Vec<f64> = (0..parts).map(logarithm).collect();
    let largest = logarithms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logarithms.iter().map(|value| (value - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

/// Positions that are dealt one by one, and shuffled anew when all are dealt.
pub(super) struct Deck {
    cards: Vec<u32>,
    dealt: usize,
}

impl Deck {
    pub(super) fn new(cards: Vec<u32>) -> Self {
        let dealt = cards.len();
        Self { cards, dealt }
    }

    pub(super) fn deal(&mut self, stream: &mut Stream) -> u32 {
        if self.dealt >= self.cards.len() {
            self.cards.shuffle(stream);
            self.dealt = 0;
        }
        self.dealt += 1;
        self.cards.get(self.dealt - 1).copied().unwrap_or(0)
    }
}
