//! How a population of clients shares one data set: as lists of positions, drawn from the partition's own stream.
//!
//! The simulator and a node that plays one client of a population (`[share]`) call the same function, so both
//! train on the same examples in the same order.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

use rand::RngExt;
use rand::seq::SliceRandom;
use rand_distr::{Distribution, Gamma};
use serde::{Deserialize, Serialize};
use tributary_common::document::Schema;
use tributary_common::ids::{IdError, NodeName};
use tributary_common::rng::{Purpose, Stream};

use crate::data::{Dataset, Site};

/// Most clients of one population.
pub const CLIENTS: u32 = 1_000_000;
/// Most examples of one client, where [`Population::samples_per_client`] says how many it draws.
pub const SAMPLES_PER_CLIENT: u32 = 10_000_000;

/// How examples are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheme {
    /// Shuffled and cut into equal parts.
    Iid,
    /// Sorted by label and cut into `shards_per_client` shards per client, dealt at random
    /// (McMahan et al. 2017: 200 shards of 300 MNIST images, two for each of 100 clients).
    Shards,
    /// Every label shared in proportions drawn from a symmetric Dirichlet distribution.
    Dirichlet,
    /// One client per site of the data set, with the site's name.
    Natural,
    /// Sizes by a power law: not available yet.
    Quantity,
    /// The same labels, shifted features: not available yet.
    FeatureShift,
}

impl Scheme {
    /// The scheme's name in a scenario.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::Iid => "iid",
            Scheme::Shards => "shards",
            Scheme::Dirichlet => "dirichlet",
            Scheme::Natural => "natural",
            Scheme::Quantity => "quantity",
            Scheme::FeatureShift => "feature-shift",
        }
    }
}

/// The `[partition]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionConfig {
    /// How examples are shared.
    pub scheme: Scheme,
    /// `shards`: shards per client, from 1; few shards mean few labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shards_per_client: Option<u32>,
    /// `dirichlet`: the concentration, above 0; 0.1 is very uneven, 100 nearly even.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Seed of the partition's stream; absent, the run's own seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// The keys of the `[partition]` table.
pub const SCHEMA: Schema = Schema { keys: &["scheme", "shards_per_client", "alpha", "seed"], tables: &[] };

/// The `[population]` table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Population {
    /// Clients; with `natural` as many as there are sites.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clients: Option<u32>,
    /// Examples of every client, in place of a partition of all: the pool is dealt out card by card, and
    /// shuffled anew whenever it is used up. `iid` and `dirichlet` alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples_per_client: Option<u32>,
}

/// The keys of the `[population]` table.
pub const POPULATION_SCHEMA: Schema = Schema { keys: &["clients", "samples_per_client"], tables: &[] };

/// One client's part of a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The client: `client-000`, `client-001`, … in the order of the shares; with `natural` the site's name.
    pub name: NodeName,
    /// Its training examples, as positions in [`Dataset::train`], in its own order.
    pub train: Arc<[u32]>,
    /// Its test examples, as positions in [`Dataset::test`]: a site's; empty for any other scheme.
    pub test: Arc<[u32]>,
}

/// Why a data set cannot be shared so. Each displays as one line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PartitionError {
    /// A scheme of a later version.
    #[error("[partition] scheme = \"{0}\" is not available yet; use iid, shards, dirichlet or natural")]
    NotAvailable(&'static str),
    /// A key is missing, out of range, or means nothing here.
    #[error("{0}")]
    Invalid(String),
    /// There are more clients, or shards, than examples.
    #[error(
        "{wanted} {what} need as many training examples, but there are {examples}: lower [population] clients{hint}"
    )]
    TooFew {
        /// Clients or shards.
        what: &'static str,
        /// How many of them.
        wanted: u64,
        /// Training examples.
        examples: usize,
        /// What else helps.
        hint: &'static str,
    },
    /// `natural` needs sites.
    #[error(
        "[partition] scheme = \"natural\" needs a data set with sites: give [data] sites, or use another scheme"
    )]
    NoSites,
    /// A client's name is not valid.
    #[error(transparent)]
    Name(#[from] IdError),
}

impl PartitionConfig {
    /// The table with only its scheme set.
    pub fn new(scheme: Scheme) -> Self {
        Self { scheme, shards_per_client: None, alpha: None, seed: None }
    }

    /// Checks everything that can be checked without the data.
    ///
    /// # Errors
    /// [`PartitionError::Invalid`] or [`PartitionError::NotAvailable`] for the first thing that is wrong.
    pub fn validate(&self, population: &Population) -> Result<(), PartitionError> {
        let invalid = |message: String| Err(PartitionError::Invalid(message));
        let scheme = self.scheme;
        if matches!(scheme, Scheme::Quantity | Scheme::FeatureShift) {
            return Err(PartitionError::NotAvailable(scheme.name()));
        }
        match (scheme, self.alpha) {
            (Scheme::Dirichlet, None) => {
                return invalid("[partition] dirichlet needs alpha, such as 0.3".into());
            }
            (Scheme::Dirichlet, Some(alpha)) if !(alpha > 0.0 && alpha <= 1e6) => {
                return invalid(format!(
                    "[partition] alpha = {alpha}: above 0 and at most 1000000 is possible"
                ));
            }
            (Scheme::Dirichlet, Some(_)) | (_, None) => {}
            (_, Some(_)) => return invalid("[partition] alpha belongs to scheme = \"dirichlet\"".into()),
        }
        match (scheme, self.shards_per_client) {
            (Scheme::Shards, None) => {
                return invalid("[partition] shards needs shards_per_client, such as 2".into());
            }
            (Scheme::Shards, Some(0)) => {
                return invalid("[partition] shards_per_client = 0: 1 is the least".into());
            }
            (Scheme::Shards, Some(_)) | (_, None) => {}
            (_, Some(_)) => {
                return invalid("[partition] shards_per_client belongs to scheme = \"shards\"".into());
            }
        }
        match population.clients {
            None if scheme != Scheme::Natural => {
                return invalid(
                    "[population] clients is missing: say how many clients share the data".into(),
                );
            }
            Some(clients) if !(1..=CLIENTS).contains(&clients) => {
                return invalid(format!("[population] clients = {clients}: 1 to {CLIENTS} are possible"));
            }
            _ => {}
        }
        match population.samples_per_client {
            Some(_) if !matches!(scheme, Scheme::Iid | Scheme::Dirichlet) => invalid(format!(
                "[population] samples_per_client belongs to schemes iid and dirichlet, not {}",
                scheme.name()
            )),
            Some(samples) if !(1..=SAMPLES_PER_CLIENT).contains(&samples) => invalid(format!(
                "[population] samples_per_client = {samples}: 1 to {SAMPLES_PER_CLIENT} are possible"
            )),
            _ => Ok(()),
        }
    }
}

/// Shares `dataset`'s training examples among the population's clients.
///
/// Every draw comes from the stream (`seed`, partition), where `seed` is the table's own or else `run_seed`:
/// - `iid`: a shuffle, cut into parts whose sizes differ by at most one, larger ones first;
/// - `shards`: positions sorted by label (stable), cut the same way into `clients · shards_per_client` shards;
///   the shards are shuffled and dealt in runs of `shards_per_client`;
/// - `dirichlet`: for each label in turn, proportions over the clients from Dir(α, …, α); the label's shuffled
///   positions are cut at the cumulative proportions, rounded down. A client that is left without any example
///   then takes one from the client that has most (Yurochkin et al. 2019, with this repair in place of redrawing).
///   With `samples_per_client`: for each client in turn, proportions over the labels from Dir(α, …, α), then as
///   many labels from these proportions, each answered by the next position of that label's deck (Hsu et al. 2019);
/// - `natural`: a site's rows, in their order; nothing is drawn.
///
/// # Errors
/// As [`PartitionConfig::validate`]; too few examples; a population that is not the number of sites.
pub fn partition(
    config: &PartitionConfig,
    population: &Population,
    run_seed: u64,
    dataset: &Dataset,
) -> Result<Vec<Share>, PartitionError> {
    config.validate(population)?;
    if config.scheme == Scheme::Natural {
        return natural(population, dataset.sites.as_deref().ok_or(PartitionError::NoSites)?);
    }
    let labels = dataset.train.labels.as_slice();
    let clients = population.clients.unwrap_or(1) as usize;
    let mut stream = Stream::new(config.seed.unwrap_or(run_seed), Purpose::Partition, 0, "");
    let too_few = |what, wanted: usize, hint| PartitionError::TooFew {
        what,
        wanted: wanted as u64,
        examples: labels.len(),
        hint,
    };
    let samples = population.samples_per_client.map(|samples| samples as usize);
    if labels.is_empty() || (samples.is_none() && labels.len() < clients) {
        return Err(too_few("clients", clients, ", or give samples_per_client"));
    }
    let parts = match (config.scheme, samples) {
        (Scheme::Shards, _) => {
            let each = config.shards_per_client.unwrap_or(1) as usize;
            let shards = clients.saturating_mul(each);
            if labels.len() < shards {
                return Err(too_few("shards", shards, " or shards_per_client"));
            }
            by_shards(labels, clients, each, &mut stream)
        }
        (Scheme::Dirichlet, None) => by_dirichlet(labels, clients, config.alpha.unwrap_or(1.0), &mut stream),
        (Scheme::Dirichlet, Some(samples)) => {
            dealt_by_dirichlet(labels, clients, samples, config.alpha.unwrap_or(1.0), &mut stream)
        }
        (_, None) => {
            let mut order = positions(labels.len());
            order.shuffle(&mut stream);
            cut(&order, clients)
        }
        (_, Some(samples)) => {
            let mut deck = Deck::new(positions(labels.len()));
            (0..clients).map(|_| (0..samples).map(|_| deck.deal(&mut stream)).collect()).collect()
        }
    };
    let width = (clients - 1).to_string().len();
    let share = |(index, train): (usize, Vec<u32>)| {
        Ok(Share { name: format!("client-{index:0width$}").parse()?, train: train.into(), test: [].into() })
    };
    parts.into_iter().enumerate().map(share).collect()
}

fn natural(population: &Population, sites: &[Site]) -> Result<Vec<Share>, PartitionError> {
    if let Some(clients) = population.clients.filter(|clients| *clients as usize != sites.len()) {
        return Err(PartitionError::Invalid(format!(
            "[population] clients = {clients}, but the data set has {} sites: remove the key",
            sites.len()
        )));
    }
    let rows = |range: &std::ops::Range<usize>| range.clone().map(position).collect();
    let share =
        |site: &Site| Share { name: site.name.clone(), train: rows(&site.train), test: rows(&site.test) };
    Ok(sites.iter().map(share).collect())
}

/// A position as it is stored: data sets are bounded by [`crate::data::EXAMPLES`], which fits.
fn position(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

fn positions(examples: usize) -> Vec<u32> {
    (0..examples).map(position).collect()
}

/// Cuts into `parts` whose lengths differ by at most one, longer ones first, as numpy's `array_split` does.
fn cut(order: &[u32], parts: usize) -> Vec<Vec<u32>> {
    let (each, longer) = (order.len() / parts, order.len() % parts);
    let mut rest = order;
    let mut piece = |index: usize| {
        let (head, tail) = rest.split_at_checked(each + usize::from(index < longer)).unwrap_or((rest, &[]));
        rest = tail;
        head.to_vec()
    };
    (0..parts).map(&mut piece).collect()
}

fn by_shards(labels: &[i64], clients: usize, each: usize, stream: &mut Stream) -> Vec<Vec<u32>> {
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

fn by_dirichlet(labels: &[i64], clients: usize, alpha: f64, stream: &mut Stream) -> Vec<Vec<u32>> {
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

fn dealt_by_dirichlet(
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
fn proportions(parts: usize, alpha: f64, stream: &mut Stream) -> Vec<f64> {
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
struct Deck {
    cards: Vec<u32>,
    dealt: usize,
}

impl Deck {
    fn new(cards: Vec<u32>) -> Self {
        let dealt = cards.len();
        Self { cards, dealt }
    }

    fn deal(&mut self, stream: &mut Stream) -> u32 {
        if self.dealt >= self.cards.len() {
            self.cards.shuffle(stream);
            self.dealt = 0;
        }
        self.dealt += 1;
        self.cards.get(self.dealt - 1).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::data::Split;

    fn dataset(labels: Vec<i64>) -> Dataset {
        let train = Split { features: vec![0.0; labels.len()], labels };
        let classes = train.labels.iter().max().map_or(1, |label| *label as usize + 1);
        Dataset { example_shape: vec![1], classes, train: Arc::new(train), test: Arc::default(), sites: None }
    }

    fn config(toml: &str) -> PartitionConfig {
        toml::from_str(toml).unwrap()
    }

    fn clients(clients: u32) -> Population {
        Population { clients: Some(clients), samples_per_client: None }
    }

    fn labels_of(share: &Share, dataset: &Dataset) -> Vec<i64> {
        share.train.iter().map(|at| dataset.train.labels[*at as usize]).collect()
    }

    const SCHEMES: [&str; 4] = [
        "scheme = 'iid'",
        "scheme = 'shards'\nshards_per_client = 2",
        "scheme = 'dirichlet'\nalpha = 0.05",
        "scheme = 'dirichlet'\nalpha = 10.0",
    ];

    proptest! {
        #[test]
        fn every_example_belongs_to_exactly_one_client(
            labels in proptest::collection::vec(0i64..7, 40..300),
            population in 1u32..20,
            seed in any::<u64>(),
        ) {
            let dataset = dataset(labels);
            for scheme in SCHEMES {
                let shares = partition(&config(scheme), &clients(population), seed, &dataset).unwrap();
                prop_assert_eq!(shares.len(), population as usize);
                let mut all: Vec<u32> = shares.iter().flat_map(|share| share.train.iter().copied()).collect();
                all.sort_unstable();
                prop_assert_eq!(all, positions(dataset.train.len()), "{}", scheme);
                prop_assert!(shares.iter().all(|share| !share.train.is_empty()), "{}", scheme);
                let again = partition(&config(scheme), &clients(population), seed, &dataset).unwrap();
                prop_assert_eq!(&again, &shares);
                let own = format!("{scheme}\nseed = {}", seed >> 1);
                let with_own = partition(&config(&own), &clients(population), 0, &dataset).unwrap();
                let with_run = partition(&config(scheme), &clients(population), seed >> 1, &dataset).unwrap();
                prop_assert_eq!(with_own, with_run);
            }
        }

        #[test]
        fn dealt_examples_repeat_only_when_the_pool_is_used_up(
            labels in proptest::collection::vec(0i64..4, 5..60),
            population in 1u32..12,
            samples in 1u32..12,
            seed in any::<u64>(),
        ) {
            let dataset = dataset(labels);
            let population = Population { clients: Some(population), samples_per_client: Some(samples) };
            for scheme in ["scheme = 'iid'", "scheme = 'dirichlet'\nalpha = 0.001"] {
                let shares = partition(&config(scheme), &population, seed, &dataset).unwrap();
                prop_assert!(shares.iter().all(|share| share.train.len() == samples as usize));
            }
            let shares = partition(&config("scheme = 'iid'"), &population, seed, &dataset).unwrap();
            let mut times = vec![0usize; dataset.train.len()];
            for at in shares.iter().flat_map(|share| share.train.iter()) {
                times[*at as usize] += 1;
            }
            prop_assert!(times.iter().max().unwrap() - times.iter().min().unwrap() <= 1);
        }
    }

    #[test]
    fn parts_are_balanced_and_named_in_order() {
        let dataset = dataset((0..1003).map(|at| at % 10).collect());
        let shares = partition(&config("scheme = 'iid'"), &clients(101), 1, &dataset).unwrap();
        let sizes: Vec<usize> = shares.iter().map(|share| share.train.len()).collect();
        assert_eq!((sizes[0], sizes[93], sizes[94], sizes[100]), (10, 10, 9, 9));
        assert_eq!((shares[0].name.as_str(), shares[100].name.as_str()), ("client-000", "client-100"));
        assert!(shares.is_sorted_by_key(|share| &share.name));
        let other = partition(&config("scheme = 'iid'"), &clients(101), 2, &dataset).unwrap();
        assert_ne!(shares, other);
    }

    #[test]
    fn two_shards_are_two_labels_at_most() {
        let dataset = dataset((0..6000).map(|at| (at * 7) % 10).collect());
        let two = config("scheme = 'shards'\nshards_per_client = 2");
        let shares = partition(&two, &clients(100), 7, &dataset).unwrap();
        assert!(shares.iter().all(|share| share.train.len() == 60));
        let kinds = |share: &Share| labels_of(share, &dataset).into_iter().collect::<BTreeSet<_>>().len();
        assert!(shares.iter().all(|share| kinds(share) <= 2));
        assert!(shares.iter().filter(|share| kinds(share) == 2).count() > 80);
    }

    #[test]
    fn a_small_alpha_is_uneven_and_a_large_one_even() {
        let dataset = dataset((0..5000).map(|at| at % 10).collect());
        let largest_label = |alpha: f64, samples: Option<u32>| {
            let population = Population { clients: Some(20), samples_per_client: samples };
            let scheme = config(&format!("scheme = 'dirichlet'\nalpha = {alpha:?}"));
            let shares = partition(&scheme, &population, 3, &dataset).unwrap();
            let most = |share: &Share| {
                let labels = labels_of(share, &dataset);
                let count = |label| labels.iter().filter(|other| **other == label).count();
                (0..10).map(count).max().unwrap() as f64 / labels.len() as f64
            };
            shares.iter().map(most).sum::<f64>() / 20.0
        };
        for samples in [None, Some(200)] {
            assert!(largest_label(0.05, samples) > 0.6, "{}", largest_label(0.05, samples));
            assert!(largest_label(1000.0, samples) < 0.2, "{}", largest_label(1000.0, samples));
        }
        let drawn = proportions(50, 1e-3, &mut Stream::new(1, Purpose::Partition, 0, ""));
        assert!(
            (drawn.iter().sum::<f64>() - 1.0).abs() < 1e-9 && drawn.iter().all(|share| share.is_finite())
        );
    }

    #[test]
    fn sites_are_clients_with_their_own_test_rows() {
        let mut dataset = dataset(vec![0, 1, 0, 1, 1]);
        let site = |name: &str, train, test| Site { name: name.parse().unwrap(), train, test };
        dataset.sites = Some(vec![site("north", 0..2, 0..1), site("south", 2..5, 1..4)]);
        let natural = config("scheme = 'natural'");
        let shares = partition(&natural, &Population::default(), 0, &dataset).unwrap();
        assert_eq!(shares[1].name.as_str(), "south");
        assert_eq!((&*shares[1].train, &*shares[1].test), ([2, 3, 4].as_slice(), [1, 2, 3].as_slice()));
        assert_eq!(partition(&natural, &clients(2), 9, &dataset).unwrap(), shares);
        let error = partition(&natural, &clients(3), 0, &dataset).unwrap_err().to_string();
        assert!(error.contains("has 2 sites"), "{error}");
        dataset.sites = None;
        assert_eq!(partition(&natural, &Population::default(), 0, &dataset), Err(PartitionError::NoSites));
    }

    #[test]
    fn what_cannot_be_shared_is_refused_in_one_line() {
        let dataset = dataset(vec![0, 1, 0, 1]);
        for (scheme, population, words) in [
            ("scheme = 'quantity'", clients(2), "\"quantity\" is not available yet"),
            ("scheme = 'feature-shift'", clients(2), "\"feature-shift\" is not available yet"),
            ("scheme = 'dirichlet'", clients(2), "needs alpha"),
            ("scheme = 'dirichlet'\nalpha = 0.0", clients(2), "alpha = 0"),
            ("scheme = 'iid'\nalpha = 1.0", clients(2), "belongs to scheme = \"dirichlet\""),
            ("scheme = 'shards'", clients(2), "needs shards_per_client"),
            ("scheme = 'shards'\nshards_per_client = 0", clients(2), "1 is the least"),
            ("scheme = 'natural'\nshards_per_client = 1", clients(2), "belongs to scheme = \"shards\""),
            ("scheme = 'iid'", Population::default(), "clients is missing"),
            ("scheme = 'iid'", clients(0), "clients = 0"),
            ("scheme = 'iid'", clients(5), "5 clients need as many training examples, but there are 4"),
            ("scheme = 'shards'\nshards_per_client = 3", clients(2), "6 shards need"),
            (
                "scheme = 'shards'\nshards_per_client = 1",
                Population { clients: Some(2), samples_per_client: Some(1) },
                "samples_per_client belongs to",
            ),
        ] {
            let error = partition(&config(scheme), &population, 0, &dataset).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains('\n'), "{scheme}: {error}");
        }
        assert!(toml::from_str::<PartitionConfig>("scheme = 'iid'\nsede = 1").is_err());
    }
}
