//! What a population looks like: how many examples each client has, and of which labels.

use tributary_client::partition::Share;

use crate::scenario::Federation;

/// Clients and classes that a table of label counts shows at most.
pub const SHOWN: usize = 100;

/// A distribution over clients by its quantiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Quantiles {
    /// Smallest value.
    pub minimum: u64,
    /// A tenth of the clients have at most this.
    pub tenth: u64,
    /// Half of the clients have at most this.
    pub median: u64,
    /// Nine tenths of the clients have at most this.
    pub ninetieth: u64,
    /// Largest value.
    pub maximum: u64,
}

impl Quantiles {
    /// The quantiles of `values` (nearest rank); all zero without values.
    pub fn of(mut values: Vec<u64>) -> Self {
        values.sort_unstable();
        let at = |share: f64| {
            let rank = (share * values.len() as f64).ceil() as usize;
            values.get(rank.max(1) - 1).copied().unwrap_or(0)
        };
        Self { minimum: at(0.0), tenth: at(0.1), median: at(0.5), ninetieth: at(0.9), maximum: at(1.0) }
    }
}

/// How a data set is spread over a population.
#[derive(Debug, Clone, PartialEq)]
pub struct Spread {
    /// Clients.
    pub clients: usize,
    /// Training examples per client.
    pub examples: Quantiles,
    /// Different labels per client.
    pub labels: Quantiles,
    /// Mean over clients of the total variation distance between the client's labels and all clients' together:
    /// 0 where every client has the same mixture, towards 1 where each has labels of its own.
    pub label_skew: f64,
    /// Label counts of all clients in their order; of more than [`SHOWN`], of as many that are evenly spaced from the
    /// largest to the smallest, the same of the same population.
    pub shown: Vec<LabelCounts>,
}

/// One client's training examples by label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelCounts {
    /// The client.
    pub client: String,
    /// Its training examples, all labels.
    pub examples: u64,
    /// Examples of label 0, 1, ….
    pub counts: Vec<u64>,
}

impl Spread {
    /// Looks at a federation's training examples.
    pub fn of(federation: &Federation) -> Self {
        let dataset = &federation.dataset;
        let count = |share: &Share| {
            let mut counts = vec![0u64; dataset.classes];
            for at in share.train.iter() {
                let label =
                    dataset.train.labels.get(*at as usize).and_then(|label| usize::try_from(*label).ok());
                if let Some(count) = label.and_then(|label| counts.get_mut(label)) {
                    *count += 1;
                }
            }
            counts
        };
        let mut all = vec![0u64; dataset.classes];
        for share in &federation.shares {
            all.iter_mut().zip(count(share)).for_each(|(sum, more)| *sum += more);
        }
        let total = all.iter().sum::<u64>().max(1) as f64;
        let (mut labels, mut distance) = (Vec::new(), 0.0);
        for share in &federation.shares {
            let counts = count(share);
            let examples = share.train.len().max(1) as f64;
            let differences = counts.iter().zip(&all);
            let differences =
                differences.map(|(own, all)| (*own as f64 / examples - *all as f64 / total).abs());
            distance += differences.sum::<f64>() / 2.0;
            labels.push(counts.iter().filter(|count| **count > 0).count() as u64);
        }
        let shown = sample(&federation.shares).into_iter().map(|share| LabelCounts {
            client: share.name.to_string(),
            examples: share.train.len() as u64,
            counts: count(share),
        });
        let clients = federation.shares.len();
        Self {
            clients,
            examples: Quantiles::of(federation.shares.iter().map(|share| share.train.len() as u64).collect()),
            labels: Quantiles::of(labels),
            label_skew: distance / clients.max(1) as f64,
            shown: shown.collect(),
        }
    }
}

/// The clients that a table shows.
fn sample(shares: &[Share]) -> Vec<&Share> {
    let mut clients: Vec<&Share> = shares.iter().collect();
    if clients.len() <= SHOWN {
        return clients;
    }
    clients.sort_by_key(|share| std::cmp::Reverse(share.train.len()));
    let last = clients.len() - 1;
    (0..SHOWN).filter_map(|at| clients.get(at * last / (SHOWN - 1)).copied()).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tributary_client::data::{Dataset, Split};

    use super::*;
    use crate::devices::Devices;

    #[test]
    fn quantiles_by_nearest_rank() {
        let expected = Quantiles { minimum: 1, tenth: 1, median: 5, ninetieth: 9, maximum: 10 };
        assert_eq!(Quantiles::of((1..=10).rev().collect()), expected);
        assert_eq!(Quantiles::of(vec![7]).median, 7);
        assert_eq!(Quantiles::of(Vec::new()), Quantiles::default());
    }

    #[test]
    fn the_skew_is_zero_for_equal_mixtures_and_near_one_for_labels_of_ones_own() {
        let spread = |parts: &[&[u32]]| {
            let train = Split { features: vec![0.0; 4], labels: vec![0, 0, 1, 1], groups: Vec::new() };
            let dataset = Dataset {
                example_shape: vec![1],
                classes: 2,
                train: Arc::new(train),
                test: Arc::default(),
                sites: None,
            };
            let share = |(at, part): (usize, &&[u32])| Share {
                name: format!("c{at}").parse().unwrap(),
                train: (*part).into(),
                test: [].into(),
                shift: None,
            };
            let shares = parts.iter().enumerate().map(share).collect();
            Spread::of(&Federation { dataset, shares, devices: Devices::default() })
        };
        let even = spread(&[&[0, 2], &[1, 3]]);
        assert_eq!((even.label_skew, even.labels.minimum, even.examples.maximum), (0.0, 2, 2));
        let apart = spread(&[&[0, 1], &[2, 3]]);
        assert_eq!((apart.label_skew, apart.labels.maximum), (0.5, 1));
        assert_eq!(apart.shown[1], LabelCounts { client: "c1".into(), examples: 2, counts: vec![0, 2] });
    }

    #[test]
    fn a_large_population_is_shown_from_its_largest_to_its_smallest_client() {
        let share = |at: u32| Share {
            name: format!("c{at:03}").parse().unwrap(),
            train: (0..=at % 250).collect(),
            test: [].into(),
            shift: None,
        };
        let some: Vec<Share> = (0..SHOWN as u32).map(share).collect();
        assert!(sample(&some).into_iter().eq(&some), "all, in their order");
        let many: Vec<Share> = (0..500).map(share).collect();
        let sizes: Vec<usize> = sample(&many).iter().map(|share| share.train.len()).collect();
        assert_eq!((sizes.len(), sizes[0], sizes[SHOWN - 1]), (SHOWN, 250, 1));
        assert!(sizes.windows(2).all(|pair| (0..=3).contains(&(pair[0] - pair[1]))), "{sizes:?}");
        let names: std::collections::BTreeSet<_> =
            sample(&many).into_iter().map(|share| &share.name).collect();
        assert_eq!(names.len(), SHOWN);
    }
}
