//! What a partition promises: everybody has something, nothing is lost, and the same again from the same seed.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::schemes::{power_law, proportions};
use super::*;
use crate::data::Split;
use crate::shard::Shard;

fn dataset(labels: Vec<i64>) -> Dataset {
    let train = Split { features: vec![0.0; labels.len()], labels, groups: Vec::new() };
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

const SCHEMES: [&str; 7] = [
    "scheme = 'iid'",
    "scheme = 'shards'\nshards_per_client = 2",
    "scheme = 'dirichlet'\nalpha = 0.05",
    "scheme = 'dirichlet'\nalpha = 10.0",
    "scheme = 'quantity'\npower = 0.0",
    "scheme = 'quantity'\npower = 2.5",
    "scheme = 'feature-shift'\nnoise = 0.3",
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
    fn a_group_belongs_to_one_client_whole(
        groups in proptest::collection::vec(0u32..30, 60..300),
        population in 1u32..6,
        seed in any::<u64>(),
    ) {
        let mut dataset = dataset((0..groups.len() as i64).map(|at| at % 7).collect());
        let mut ids = crate::data::Groups::default();
        let groups: Vec<u32> = groups.into_iter().map(|group| ids.id(group)).collect();
        Arc::make_mut(&mut dataset.train).groups.clone_from(&groups);
        for scheme in SCHEMES {
            let shares = partition(&config(scheme), &clients(population), seed, &dataset).unwrap();
            let mut all: Vec<u32> = shares.iter().flat_map(|share| share.train.iter().copied()).collect();
            all.sort_unstable();
            prop_assert_eq!(all, positions(groups.len()), "{}", scheme);
            let mut owners = std::collections::BTreeMap::new();
            for share in &shares {
                prop_assert!(!share.train.is_empty(), "{}", scheme);
                for at in share.train.iter() {
                    let owner = owners.entry(groups[*at as usize]).or_insert(&share.name);
                    prop_assert_eq!(*owner, &share.name, "{}", scheme);
                }
                let (indices, shift) = (share.train.clone(), share.shift.clone());
                let shard = Shard { examples: dataset.train.clone(), indices, shift };
                let seen = shard.as_seen();
                prop_assert_eq!(seen.units(), shard.units());
                if share.shift.is_some() {
                    let (mut ids, mut again) = (crate::data::Groups::default(), Vec::new());
                    again.extend(share.train.iter().map(|at| ids.id(groups[*at as usize])));
                    prop_assert_eq!(&seen.examples.groups, &again);
                }
            }
        }
        let dealt = Population { clients: Some(population), samples_per_client: Some(2) };
        let error = partition(&config("scheme = 'iid'"), &dealt, seed, &dataset).unwrap_err().to_string();
        prop_assert!(error.contains("samples_per_client deals single examples"), "{}", error);
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
        for scheme in
            ["scheme = 'iid'", "scheme = 'dirichlet'\nalpha = 0.001", "scheme = 'feature-shift'\nnoise = 1.0"]
        {
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
    assert!((drawn.iter().sum::<f64>() - 1.0).abs() < 1e-9 && drawn.iter().all(|share| share.is_finite()));
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
        ("scheme = 'quantity'", clients(2), "quantity needs power"),
        ("scheme = 'quantity'\npower = -1.0", clients(2), "power = -1: 0 to 10"),
        ("scheme = 'quantity'\npower = nan", clients(2), "power = NaN"),
        ("scheme = 'iid'\npower = 1.0", clients(2), "power belongs to scheme = \"quantity\""),
        ("scheme = 'feature-shift'", clients(2), "at least one of noise, rotation_degrees and intensity"),
        ("scheme = 'feature-shift'\nnoise = 0.0", clients(2), "noise = 0: above 0"),
        ("scheme = 'feature-shift'\nintensity = 1.5", clients(2), "intensity = 1.5: above 0 and at most 1"),
        ("scheme = 'feature-shift'\nrotation_degrees = 181.0", clients(2), "at most 180"),
        ("scheme = 'feature-shift'\nrotation_degrees = 9.0", clients(2), "one example has shape [1]"),
        ("scheme = 'dirichlet'\nalpha = 1.0\nnoise = 1.0", clients(2), "scheme = \"feature-shift\""),
        (
            "scheme = 'quantity'\npower = 1.0",
            Population { clients: Some(2), samples_per_client: Some(1) },
            "iid, dirichlet and feature-shift, not quantity",
        ),
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

#[test]
fn quantities_follow_the_power_law_over_a_random_order_of_the_clients() {
    assert_eq!(power_law(10, 4, 0.0), [3, 3, 2, 2]);
    assert_eq!(power_law(3, 3, 5.0), [1, 1, 1]);
    for power in [0.5, 1.0, 2.0] {
        let sizes = power_law(60_000, 50, power);
        assert_eq!(sizes.iter().sum::<usize>(), 60_000);
        assert!(sizes.windows(2).all(|pair| pair[0] >= pair[1]), "{sizes:?}");
        for rank in [2usize, 5, 10] {
            let (expected, found) = ((rank as f64).powf(power), sizes[0] as f64 / sizes[rank - 1] as f64);
            assert!((found / expected - 1.0).abs() < 0.05, "{power}, rank {rank}: {found}");
        }
    }
    let dataset = dataset((0..1000).map(|at| at % 10).collect());
    let scheme = config("scheme = 'quantity'\npower = 1.5");
    let largest = |seed| {
        let shares = partition(&scheme, &clients(20), seed, &dataset).unwrap();
        (0..20).max_by_key(|at| shares[*at].train.len()).unwrap()
    };
    assert!((0..10).map(largest).collect::<BTreeSet<_>>().len() > 3, "any client may be the largest");
}

/// `examples` images of 2 × 3 × 3 with values of their own.
fn images(examples: usize) -> Dataset {
    let features = (0..examples * 18).map(|at| (at * 37 % 101) as f32 / 100.0).collect();
    let labels = (0..examples).map(|at| (at % 3) as i64).collect();
    let train = Split { features, labels, groups: Vec::new() };
    Dataset {
        example_shape: vec![2, 3, 3],
        classes: 3,
        train: Arc::new(train),
        test: Arc::default(),
        sites: None,
    }
}

/// What each client sees, and what lies in memory.
fn seen_and_plain(keys: &str, dataset: &Dataset, population: Population) -> Vec<(Vec<f32>, Vec<f32>)> {
    let scheme = config(&format!("scheme = 'feature-shift'\n{keys}"));
    let client = |share: Share| {
        let plain = |at: &u32| dataset.train.features[*at as usize * 18..][..18].to_vec();
        let plain = share.train.iter().flat_map(plain).collect();
        let labels = labels_of(&share, dataset);
        let shard = Shard { examples: dataset.train.clone(), indices: share.train, shift: share.shift };
        let (seen, again) = (shard.as_seen(), shard.as_seen());
        assert_eq!(seen.examples, again.examples, "the same in every round");
        assert_eq!(seen.examples.labels, labels, "labels and order stay");
        assert!(!Arc::ptr_eq(&seen.examples, &dataset.train));
        (seen.examples.features.clone(), plain)
    };
    partition(&scheme, &population, 11, dataset).unwrap().into_iter().map(client).collect()
}

#[test]
fn noise_grows_with_the_client() {
    let deviations: Vec<f64> = seen_and_plain("noise = 0.5", &images(2000), clients(4))
        .iter()
        .map(|(seen, plain)| {
            let differences: Vec<f64> = seen.iter().zip(plain).map(|(s, p)| f64::from(s - p)).collect();
            let mean = differences.iter().sum::<f64>() / differences.len() as f64;
            assert!(mean.abs() < 0.03, "{mean}");
            (differences.iter().map(|d| d * d).sum::<f64>() / differences.len() as f64).sqrt()
        })
        .collect();
    for (deviation, expected) in deviations.iter().zip([0.125, 0.25, 0.375, 0.5]) {
        assert!((deviation / expected - 1.0).abs() < 0.04, "{deviations:?}");
    }
}

#[test]
fn every_client_has_one_factor_of_its_own() {
    let mut factors = Vec::new();
    for (seen, plain) in seen_and_plain("intensity = 0.4", &images(60), clients(20)) {
        let at = plain.iter().position(|value| *value > 0.5).unwrap();
        let factor = seen[at] / plain[at];
        assert!(seen.iter().zip(&plain).all(|(seen, plain)| (seen - plain * factor).abs() < 1e-5));
        assert!((0.6..=1.4).contains(&factor), "{factor}");
        factors.push(factor);
    }
    factors.sort_by(f32::total_cmp);
    assert!(factors[0] < 0.8 && factors[19] > 1.2, "{factors:?}");
}

#[test]
fn images_turn_about_their_middle_channel_by_channel() {
    let clients_angles = seen_and_plain("rotation_degrees = 90.0", &images(40), clients(8));
    for (seen, plain) in &clients_angles {
        for (seen, plain) in seen.chunks(9).zip(plain.chunks(9)) {
            assert!((seen[4] - plain[4]).abs() < 1e-6, "the middle stays");
        }
        assert_ne!(seen, plain);
    }
    // A quarter turn anticlockwise moves every pixel onto another.
    let mut shift = Shift::draw(&config("scheme = 'iid'"), 1, (0, 1), "c".parse().unwrap(), [3, 3]);
    shift.turn_by(90.0);
    let image: Vec<f32> = (0..9).chain(10..19).map(|value| value as f32).collect();
    let expected = [2, 5, 8, 1, 4, 7, 0, 3, 6, 12, 15, 18, 11, 14, 17, 10, 13, 16];
    let turned = shift.apply(0, &image);
    assert!(
        turned.iter().zip(expected).all(|(seen, value)| (seen - value as f32).abs() < 1e-5),
        "{turned:?}"
    );
}

#[test]
fn shifts_combine_and_depend_on_seed_and_client_alone() {
    let all = "noise = 0.1\nrotation_degrees = 20.0\nintensity = 0.2";
    let dataset = images(30);
    let base = seen_and_plain(all, &dataset, clients(3));
    assert_eq!(base, seen_and_plain(all, &dataset, clients(3)));
    assert_ne!(base, seen_and_plain(&format!("{all}\nseed = 12"), &dataset, clients(3)));
    let drawn = Population { clients: Some(3), samples_per_client: Some(25) };
    assert!(seen_and_plain(all, &dataset, drawn).iter().all(|(seen, _)| seen.len() == 25 * 18));
    let plain = partition(&config("scheme = 'iid'"), &clients(3), 11, &dataset).unwrap();
    let shifted = partition(&config(&format!("scheme = 'feature-shift'\n{all}")), &clients(3), 11, &dataset);
    let positions = |shares: &[Share]| shares.iter().map(|share| share.train.clone()).collect::<Vec<_>>();
    assert_eq!(positions(&plain), positions(&shifted.unwrap()), "who has what is as with iid");
}
