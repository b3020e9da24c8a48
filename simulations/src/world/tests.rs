//! Fresh seeds, seeds that failed once, and planted bugs.

use super::*;

/// Seeds that once showed a violation, one per line, with what it was.
const SAVED: &str = include_str!("saved-seeds.txt");
/// A planted bug is found within so many seeds.
const ENOUGH_SEEDS: u64 = 200;

fn world(seed: u64, plant: Option<Plant>) -> Report {
    run(Settings { seed, plant, trace: false }).unwrap()
}

#[test]
fn seeds_that_failed_once_hold() {
    let seeds = SAVED.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok());
    for seed in seeds {
        assert_eq!(world(seed, None).violations, Vec::<String>::new(), "seed {seed}");
    }
}

#[test]
fn nothing_is_violated_and_trouble_really_comes() {
    let mut tally = Tally::new();
    for seed in 0..70 {
        let report = world(seed, None);
        assert_eq!(
            report.violations,
            Vec::<String>::new(),
            "seed {seed}: tributary-sim faults --seed {seed} --trace"
        );
        for (what, count) in report.tally {
            *tally.entry(what).or_default() += count;
        }
    }
    for what in [
        "deaths of nodes",
        "deaths of the coordinator",
        "rounds published",
        "messages doubled",
        "certificates that ended",
        "nodes revoked",
        "full disks of nodes",
        "runs finished",
    ] {
        assert!(tally.get(what).is_some_and(|count| *count > 5), "{what}: {tally:?}");
    }
}

#[test]
fn the_same_seed_is_the_same_story() {
    for seed in [3, 11, 19] {
        let (one, other) = (world(seed, None), world(seed, None));
        assert_eq!((one.tally, one.ended), (other.tally, other.ended));
    }
}

#[test]
fn planted_bugs_are_found() {
    for plant in Plant::value_variants() {
        let found = (0..ENOUGH_SEEDS).find(|seed| !world(*seed, Some(*plant)).violations.is_empty());
        assert!(found.is_some(), "{plant:?} was not found in {ENOUGH_SEEDS} seeds");
    }
}
