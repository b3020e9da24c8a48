//! How a population of clients shares one data set: as lists of positions, drawn from the partition's own stream.
//!
//! The simulator and a node that plays one client of a population (`[share]`) call the same function, so both
//! train on the same examples in the same order.

mod schemes;
mod shift;

use std::sync::Arc;

use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use tributary_common::document::Schema;
use tributary_common::ids::{IdError, NodeName};
use tributary_common::rng::{Purpose, Stream};

pub use self::shift::Shift;

use self::schemes::{
    Deck, Units, by_dirichlet, by_quantity, by_shards, cut, dealt_by_dirichlet, position, positions,
};
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
    /// Shuffled and cut into parts whose sizes follow a power law: labels alike, quantities not.
    Quantity,
    /// As `iid`, but each client sees its examples in its own way: with noise, turned, brighter or darker.
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

    /// Whether it goes with [`Population::samples_per_client`].
    fn deals(self) -> bool {
        matches!(self, Scheme::Iid | Scheme::Dirichlet | Scheme::FeatureShift)
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
    /// `quantity`: the exponent, 0 to 10; 0 is even, and the client of rank k has a share of about k^-power.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power: Option<f64>,
    /// `feature-shift`: standard deviation of the noise that the last client sees, above 0, in the units of the
    /// features; client i of n has i/n of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noise: Option<f64>,
    /// `feature-shift`: largest angle by which a client's images are turned, above 0 to 180, either way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation_degrees: Option<f64>,
    /// `feature-shift`: largest change of the factor that a client's features are multiplied with, above 0 to 1:
    /// 0.3 gives factors from 0.7 to 1.3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intensity: Option<f64>,
    /// Seed of the partition's stream; absent, the run's own seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// The keys of the `[partition]` table.
pub const SCHEMA: Schema = Schema {
    keys: &[
        "scheme",
        "shards_per_client",
        "alpha",
        "power",
        "noise",
        "rotation_degrees",
        "intensity",
        "seed",
    ],
    tables: &[],
};

/// The `[population]` table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Population {
    /// Clients; with `natural` as many as there are sites.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clients: Option<u32>,
    /// Examples of every client, in place of a partition of all: the pool is dealt out card by card, and
    /// shuffled anew whenever it is used up. `iid`, `dirichlet` and `feature-shift` alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples_per_client: Option<u32>,
}

/// The keys of the `[population]` table.
pub const POPULATION_SCHEMA: Schema = Schema { keys: &["clients", "samples_per_client"], tables: &[] };

/// One client's part of a data set.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// The client: `client-000`, `client-001`, … in the order of the shares; with `natural` the site's name.
    pub name: NodeName,
    /// Its training examples, as positions in [`Dataset::train`], in its own order.
    pub train: Arc<[u32]>,
    /// Its test examples, as positions in [`Dataset::test`]: a site's; empty for any other scheme.
    pub test: Arc<[u32]>,
    /// How it sees its training examples; `None` as they are.
    pub shift: Option<Arc<Shift>>,
}

/// Why a data set cannot be shared so. Each displays as one line.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PartitionError {
    /// A key is missing, out of range, or means nothing here.
    #[error("{0}")]
    Invalid(String),
    /// There are more clients, or shards, than there is to share.
    #[error("{wanted} {what} need as many {of}, but there are {units}: lower [population] clients{hint}")]
    TooFew {
        /// Clients or shards.
        what: &'static str,
        /// How many of them.
        wanted: u64,
        /// What is shared: training examples, or whole groups of them.
        of: &'static str,
        /// How many there are.
        units: usize,
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
        Self {
            scheme,
            shards_per_client: None,
            alpha: None,
            power: None,
            noise: None,
            rotation_degrees: None,
            intensity: None,
            seed: None,
        }
    }

    /// Checks everything that can be checked without the data.
    ///
    /// # Errors
    /// [`PartitionError::Invalid`] for the first thing that is wrong.
    pub fn validate(&self, population: &Population) -> Result<(), PartitionError> {
        let invalid = |message: String| Err(PartitionError::Invalid(message));
        let scheme = self.scheme;
        let shards = self.shards_per_client.map(f64::from);
        for (key, value, of, range, words) in [
            ("alpha", self.alpha, Scheme::Dirichlet, 0.0..=1e6, "above 0 and at most 1000000 is possible"),
            ("shards_per_client", shards, Scheme::Shards, 1.0..=f64::from(u32::MAX), "1 is the least"),
            ("power", self.power, Scheme::Quantity, 0.0..=10.0, "0 to 10 are possible"),
            ("noise", self.noise, Scheme::FeatureShift, 0.0..=1e6, "above 0 and at most 1000000 is possible"),
            (
                "rotation_degrees",
                self.rotation_degrees,
                Scheme::FeatureShift,
                0.0..=180.0,
                "above 0 and at most 180 is possible",
            ),
            (
                "intensity",
                self.intensity,
                Scheme::FeatureShift,
                0.0..=1.0,
                "above 0 and at most 1 is possible",
            ),
        ] {
            let Some(value) = value else { continue };
            if scheme != of {
                let message = format!("[partition] {key} belongs to scheme = \"{}\"", of.name());
                return invalid(message);
            }
            // Of all these only an even power law is a zero that says something.
            if !range.contains(&value) || (value == 0.0 && key != "power") {
                return invalid(format!("[partition] {key} = {value}: {words}"));
            }
        }
        let missing = match scheme {
            Scheme::Dirichlet if self.alpha.is_none() => "dirichlet needs alpha, such as 0.3",
            Scheme::Shards if self.shards_per_client.is_none() => "shards needs shards_per_client, such as 2",
            Scheme::Quantity if self.power.is_none() => "quantity needs power, such as 1.0",
            Scheme::FeatureShift
                if self.noise.is_none() && self.rotation_degrees.is_none() && self.intensity.is_none() =>
            {
                "feature-shift needs at least one of noise, rotation_degrees and intensity"
            }
            _ => "",
        };
        if !missing.is_empty() {
            return invalid(format!("[partition] {missing}"));
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
            Some(_) if !scheme.deals() => invalid(format!(
                "[population] samples_per_client belongs to schemes iid, dirichlet and feature-shift, not {}",
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
/// Examples of one group ([`Split::groups`](crate::data::Split)) are never parted: where there are groups, each scheme
/// shares out groups in place of examples, and counts them in place of examples; a group's label is its most frequent
/// one.
///
/// Every draw of positions comes from the stream (`seed`, partition), where `seed` is the table's own or else `run_seed`:
/// - `iid`: a shuffle, cut into parts whose sizes differ by at most one, larger ones first;
/// - `shards`: positions sorted by label (stable), cut the same way into `clients · shards_per_client` shards;
///   the shards are shuffled and dealt in runs of `shards_per_client`;
/// - `dirichlet`: for each label in turn, proportions over the clients from Dir(α, …, α); the label's shuffled
///   positions are cut at the cumulative proportions, rounded down. A client that is left without any example
///   then takes one from the client that has most (Yurochkin et al. 2019, with this repair in place of redrawing).
///   With `samples_per_client`: for each client in turn, proportions over the labels from Dir(α, …, α), then as
///   many labels from these proportions, each answered by the next position of that label's deck (Hsu et al. 2019);
/// - `quantity`: a shuffle of the positions, then one of the clients, which ranks them; every client has one example,
///   and of the others the client of rank k a share k^-power / Σ j^-power (Zipf's law; sizes by a power law as in
///   Li et al. 2020, "Federated Optimization in Heterogeneous Networks"), rounded by largest remainder;
/// - `feature-shift`: positions as `iid`, and for each client a [`Shift`]: an angle uniform in ±`rotation_degrees`, a
///   factor uniform in 1 ± `intensity` and Gaussian noise of standard deviation `noise` · i/n for client i = 1 to n
///   (Li et al. 2022, "Federated Learning on Non-IID Data Silos: An Experimental Study": σ · i/N for party i);
/// - `natural`: a site's rows, in their order; nothing is drawn.
///
/// # Errors
/// As [`PartitionConfig::validate`]; too few examples; `rotation_degrees` without images; a population that is not the
/// number of sites; `samples_per_client`, which deals single examples, with groups.
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
    let units = Units::of(&dataset.train);
    let labels = &*units.labels;
    if units.grouped() && population.samples_per_client.is_some() {
        let message = "[population] samples_per_client deals single examples, but [data] group keeps a group's examples \
                       together: remove one of the two keys";
        return Err(PartitionError::Invalid(message.into()));
    }
    let clients = population.clients.unwrap_or(1) as usize;
    let plane = match *dataset.example_shape.as_slice() {
        [_, height, width] => [height, width],
        _ if config.rotation_degrees.is_some() => {
            return Err(PartitionError::Invalid(format!(
                "[partition] rotation_degrees turns images, but one example has shape {:?}: remove the key",
                dataset.example_shape
            )));
        }
        _ => [0, 0],
    };
    let seed = config.seed.unwrap_or(run_seed);
    let mut stream = Stream::new(seed, Purpose::Partition, 0, "");
    let too_few = |what, wanted: usize, hint| PartitionError::TooFew {
        what,
        wanted: wanted as u64,
        of: if units.grouped() { "groups of training examples" } else { "training examples" },
        units: labels.len(),
        hint,
    };
    let samples = population.samples_per_client.map(|samples| samples as usize);
    if labels.is_empty() || (samples.is_none() && labels.len() < clients) {
        let hint = if config.scheme.deals() { ", or give samples_per_client" } else { "" };
        return Err(too_few("clients", clients, hint));
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
        (Scheme::Quantity, _) => by_quantity(labels.len(), clients, config.power.unwrap_or(0.0), &mut stream),
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
        let name: NodeName = format!("client-{index:0width$}").parse()?;
        let shift = (config.scheme == Scheme::FeatureShift)
            .then(|| Arc::new(Shift::draw(config, seed, (index, clients), name.clone(), plane)));
        Ok(Share { name, train: units.examples(train).into(), test: [].into(), shift })
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
    let share = |site: &Site| Share {
        name: site.name.clone(),
        train: rows(&site.train),
        test: rows(&site.test),
        shift: None,
    };
    Ok(sites.iter().map(share).collect())
}

#[cfg(test)]
mod tests;
