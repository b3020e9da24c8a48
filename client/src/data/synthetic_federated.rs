//! Synthetic(α, β): users whose data and models differ by as much as one likes (Li et al. 2020, "Federated Optimization
//! in Heterogeneous Networks").
//!
//! Distributions and their order are those of the authors' generators (`data/synthetic_1_1/generate_synthetic.py` and
//! `data/synthetic_iid/generate_iid.py` in litian96/FedProx), which take α and β for standard deviations where the
//! paper writes variances. They draw from an unseeded generator, so their numbers cannot be had again; these come
//! from a named stream.

use std::sync::Arc;

use rand::seq::SliceRandom;
use rand_distr::{Distribution, LogNormal, StandardNormal};
use tributary_common::ids::NodeName;
use tributary_common::rng::{Purpose, Stream};

use super::config::config as config_error;
use super::{DataConfig, DataError, Dataset, EXAMPLES, Site, Split, VALUES};

/// Features of an example.
const FEATURES: usize = 60;
const CLASSES: usize = 10;
/// Examples of a user beside the log-normal ones.
const LEAST: usize = 50;

/// Labels by argmax(x·W + b).
struct Teacher {
    /// A row of weights per feature.
    weights: Vec<[f64; CLASSES]>,
    bias: [f64; CLASSES],
}

impl Teacher {
    /// Weights, then biases, each normal with this mean and deviation 1.
    fn draw(mean: f64, stream: &mut Stream) -> Self {
        let mut row = || std::array::from_fn(|_| normal(mean, 1.0, stream));
        Self { weights: (0..FEATURES).map(|_| row()).collect(), bias: row() }
    }

    /// The first class of the greatest score.
    fn label(&self, x: &[f64]) -> i64 {
        let mut scores = [0.0; CLASSES];
        for (value, weights) in x.iter().zip(&self.weights) {
            scores.iter_mut().zip(weights).for_each(|(score, weight)| *score += value * weight);
        }
        let mut best = (0, f64::NEG_INFINITY);
        for (class, (score, bias)) in (0i64..).zip(scores.iter().zip(&self.bias)) {
            if score + bias > best.1 {
                best = (class, score + bias);
            }
        }
        best.0
    }
}

/// Draws the users that `config` asks for, each a site with nine tenths of its examples to train on.
///
/// In order, from the stream (seed, synthetic federated): every user's number of examples ⌊LogNormal(4, 2)⌋ + 50;
/// every u_k ~ N(0, α); every B_k ~ N(0, β); every v_k ~ N(B_k, 1) of 60 values; then user by user W ~ N(u_k, 1) of
/// 60 × 10, b ~ N(u_k, 1) of 10 and the examples x ~ N(v_k, Σ), Σ = diag(j^-1.2); then user by user a shuffle. `iid`
/// has one W and b ~ N(0, 1), drawn after the numbers, and every v_k = 0.
pub(super) fn load(config: &DataConfig) -> Result<Dataset, DataError> {
    let users = config.users.unwrap_or(30);
    let iid = config.iid.unwrap_or(false);
    let mut stream = Stream::new(config.seed.unwrap_or(0), Purpose::SyntheticFederated, 0, "");
    let sizes = sizes(users, &mut stream)?;
    let deviations: Vec<f64> = (1..=FEATURES).map(|j| (j as f64).powf(-1.2).sqrt()).collect();

    let (mut models, mut middles, mut shared) = (vec![0.0; users], vec![vec![0.0; FEATURES]; users], None);
    if iid {
        shared = Some(Teacher::draw(0.0, &mut stream));
    } else {
        let (alpha, beta) = (config.alpha.unwrap_or(0.0), config.beta.unwrap_or(0.0));
        models.iter_mut().for_each(|mean| *mean = normal(0.0, alpha, &mut stream));
        let biases: Vec<f64> = (0..users).map(|_| normal(0.0, beta, &mut stream)).collect();
        for (middle, bias) in middles.iter_mut().zip(biases) {
            middle.iter_mut().for_each(|value| *value = normal(bias, 1.0, &mut stream));
        }
    }
    let mut drawn = Vec::with_capacity(users);
    for ((size, mean), middle) in sizes.into_iter().zip(models).zip(&middles) {
        let own = if shared.is_none() { Some(Teacher::draw(mean, &mut stream)) } else { None };
        let mut user = Split::default();
        for _ in 0..size {
            let spread = middle.iter().zip(&deviations);
            let x: Vec<f64> =
                spread.map(|(mean, deviation)| normal(*mean, *deviation, &mut stream)).collect();
            let label = own.as_ref().or(shared.as_ref()).map_or(0, |teacher| teacher.label(&x));
            user.features.extend(x.iter().map(|value| *value as f32));
            user.labels.push(label);
        }
        drawn.push(user);
    }
    let (mut train, mut test, mut sites) = (Split::default(), Split::default(), Vec::with_capacity(users));
    for (number, user) in drawn.into_iter().enumerate() {
        let mut order: Vec<usize> = (0..user.len()).collect();
        order.shuffle(&mut stream);
        let (first_train, first_test) = (train.len(), test.len());
        let (head, tail) = order.split_at((0.9 * order.len() as f64) as usize);
        append(&mut train, &user, head);
        append(&mut test, &user, tail);
        let site =
            Site { name: name(number)?, train: first_train..train.len(), test: first_test..test.len() };
        sites.push(site);
    }
    Ok(Dataset {
        example_shape: vec![FEATURES],
        classes: CLASSES,
        train: Arc::new(train),
        test: Arc::new(test),
        sites: Some(sites),
    })
}

/// Every user's number of examples.
fn sizes(users: usize, stream: &mut Stream) -> Result<Vec<usize>, DataError> {
    let few = || config_error("users", "draws too many examples for one data set: give fewer");
    let distribution = LogNormal::new(4.0, 2.0).map_err(|_| few())?;
    let (mut sizes, mut sum) = (Vec::with_capacity(users), 0usize);
    for _ in 0..users {
        // The cast rounds down and saturates.
        let size = (distribution.sample(stream) as usize).saturating_add(LEAST);
        sum = sum.saturating_add(size);
        sizes.push(size);
    }
    if sum > EXAMPLES || sum > VALUES / FEATURES {
        return Err(few());
    }
    Ok(sizes)
}

/// The authors' name of user `number`, from 0.
fn name(number: usize) -> Result<NodeName, DataError> {
    format!("f_{number:05}").parse().map_err(|error| config_error("users", format!("{error}")))
}

fn append(to: &mut Split, from: &Split, rows: &[usize]) {
    for row in rows {
        to.features.extend(from.features.iter().skip(row * FEATURES).take(FEATURES));
        to.labels.extend(from.labels.get(*row));
    }
}

fn normal(mean: f64, deviation: f64, stream: &mut Stream) -> f64 {
    let standard: f64 = StandardNormal.sample(stream);
    mean + deviation * standard
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::load;

    fn drawn(keys: &str) -> Dataset {
        let config: DataConfig =
            toml::from_str(&format!("source = \"synthetic-federated\"\n{keys}")).unwrap();
        load(&config, Path::new(".")).unwrap()
    }

    fn site_labels(dataset: &Dataset) -> Vec<Vec<f64>> {
        let sites = dataset.sites.as_ref().unwrap().iter();
        sites
            .map(|site| {
                let mut shares = vec![0.0; CLASSES];
                let labels = &dataset.train.labels[site.train.clone()];
                labels.iter().for_each(|label| shares[*label as usize] += 1.0 / labels.len() as f64);
                shares
            })
            .collect()
    }

    /// Mean over the pairs of users of the total variation distance between their labels.
    fn apart(keys: &str) -> f64 {
        let shares = site_labels(&drawn(keys));
        let pairs = (0..shares.len()).flat_map(|a| (0..a).map(move |b| (a, b)));
        let distance = |(a, b): (usize, usize)| {
            shares[a].iter().zip(&shares[b]).map(|(x, y)| (x - y).abs()).sum::<f64>() / 2.0
        };
        let distances: Vec<f64> = pairs.map(distance).collect();
        distances.iter().sum::<f64>() / distances.len() as f64
    }

    /// Variance over the users of their mean feature.
    fn shift(keys: &str) -> f64 {
        let dataset = drawn(keys);
        let sites = dataset.sites.as_ref().unwrap();
        let mean = |site: &Site| {
            let values = &dataset.train.features[site.train.start * FEATURES..site.train.end * FEATURES];
            values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len() as f64
        };
        let means: Vec<f64> = sites.iter().map(mean).collect();
        let all = means.iter().sum::<f64>() / means.len() as f64;
        means.iter().map(|mean| (mean - all).powi(2)).sum::<f64>() / means.len() as f64
    }

    #[test]
    fn users_are_sites_with_nine_tenths_to_train_on() {
        let dataset = drawn("alpha = 1.0\nbeta = 1.0");
        let sites = dataset.sites.clone().unwrap();
        assert_eq!((sites.len(), dataset.example_shape.clone(), dataset.classes), (30, vec![60], 10));
        assert_eq!((sites[0].name.as_str(), sites[29].name.as_str()), ("f_00000", "f_00029"));
        let mut ends = (0, 0);
        for site in &sites {
            assert_eq!((site.train.start, site.test.start), ends);
            ends = (site.train.end, site.test.end);
            let all = site.train.len() + site.test.len();
            assert!(all >= LEAST && site.train.len() == (0.9 * all as f64) as usize, "{site:?}");
        }
        assert_eq!(ends, (dataset.train.len(), dataset.test.len()));
        assert_eq!(dataset.train.features.len(), 60 * dataset.train.len());
        assert_eq!(dataset, drawn("alpha = 1.0\nbeta = 1.0\nusers = 30\nseed = 0"));
        assert_ne!(dataset, drawn("alpha = 1.0\nbeta = 1.0\nseed = 1"));
        dataset.check(&[60], 10).unwrap();
    }

    #[test]
    fn sizes_are_log_normal_above_fifty() {
        let mut sizes = sizes(4001, &mut Stream::new(5, Purpose::SyntheticFederated, 0, "")).unwrap();
        sizes.sort_unstable();
        let logarithm = |share: f64| ((sizes[(share * 4000.0) as usize] - LEAST) as f64).ln();
        // The median is exp(4), and one standard deviation above it exp(6).
        assert!((logarithm(0.5) - 4.0).abs() < 0.15, "{}", logarithm(0.5));
        assert!((logarithm(0.8413) - 6.0).abs() < 0.2, "{}", logarithm(0.8413));
    }

    #[test]
    fn features_have_the_stated_moments() {
        let dataset = drawn("iid = true\nusers = 60\nseed = 3");
        let examples = dataset.train.len() as f64;
        for j in [0usize, 1, 9, 59] {
            let column = || dataset.train.features.iter().skip(j).step_by(FEATURES).map(|x| f64::from(*x));
            let mean = column().sum::<f64>() / examples;
            let variance = column().map(|x| (x - mean).powi(2)).sum::<f64>() / examples;
            let expected = (j as f64 + 1.0).powf(-1.2);
            assert!(mean.abs() < 5.0 * (expected / examples).sqrt(), "{j}: {mean}");
            assert!((variance / expected - 1.0).abs() < 0.07, "{j}: {variance}");
        }
        // Within a user the spread is the same, whatever the middle.
        let dataset = drawn("alpha = 1.0\nbeta = 1.0\nusers = 60\nseed = 3");
        let site = dataset.sites.as_ref().unwrap().iter().max_by_key(|site| site.train.len()).unwrap();
        let column: Vec<f64> =
            site.train.clone().map(|row| f64::from(dataset.train.features[row * FEATURES])).collect();
        let mean = column.iter().sum::<f64>() / column.len() as f64;
        let variance = column.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / column.len() as f64;
        assert!((variance - 1.0).abs() < 0.15, "{variance}");
    }

    #[test]
    fn users_differ_more_the_larger_alpha_and_beta() {
        let keys =
            |alpha: f64, beta: f64| format!("alpha = {alpha:?}\nbeta = {beta:?}\nusers = 100\nseed = 2");
        // Means of 60 features ~ N(B, 1) have variance beta² + 1/60.
        for beta in [0.0, 0.5, 1.0, 2.0] {
            let (found, expected) = (shift(&keys(0.0, beta)), beta * beta + 1.0 / 60.0);
            assert!((found / expected - 1.0).abs() < 0.45, "{beta}: {found}");
        }
        let iid = apart("iid = true\nusers = 100\nseed = 2");
        let (zero, one) = (apart(&keys(0.0, 0.0)), apart(&keys(1.0, 1.0)));
        assert!(iid < 0.2 && zero > 0.3 && one > zero, "{iid} {zero} {one}");
        let shares = site_labels(&drawn("iid = true\nusers = 100\nseed = 2"));
        let used = (0..CLASSES).filter(|class| shares.iter().any(|shares| shares[*class] > 0.01)).count();
        assert!(used >= 8, "a common model uses nearly every class: {used}");
    }

    #[test]
    fn keys_out_of_range_are_refused() {
        for (keys, words) in [
            ("alpha = -1.0\nbeta = 0.0", "alpha: must be from 0 to 100"),
            ("alpha = 1.0", "beta: missing"),
            ("beta = 1.0", "alpha: missing"),
            ("iid = true\nalpha = 1.0", "alpha: iid users are all alike"),
            ("iid = true\nusers = 0", "users: must be from 1 to 10000"),
            ("iid = true\npath = 'x'", "path: "),
            ("iid = true\nnoise = 0.1", "noise: source = \"synthetic-federated\" does not use it"),
            ("iid = true\nclasses = 9", "classes: "),
        ] {
            let config: DataConfig =
                toml::from_str(&format!("source = \"synthetic-federated\"\n{keys}")).unwrap();
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains('\n'), "{keys}: {error}");
        }
    }
}
