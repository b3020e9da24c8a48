//! Supports: what each rule chooses, and that its state comes back.

use super::*;
use crate::rng::{Purpose, Stream};
use proptest::prelude::*;
use rand::RngExt;

const SEED: [u8; 32] = [7; 32];

fn stream(round: u32) -> Stream {
    Stream::new(5, Purpose::Cohort, round, "")
}

fn sum(cells: &[Vec<u32>]) -> Vec<u32> {
    (0..cells[0].len()).map(|at| cells.iter().map(|cells| cells[at]).sum()).collect()
}

/// An update that is large at `large` and small elsewhere.
fn update(parameters: usize, large: &[usize]) -> Vec<f32> {
    let mut update: Vec<f32> = (0..parameters).map(|at| ((at * 7) % 13) as f32 * 1e-4).collect();
    large.iter().for_each(|at| update[*at] = -1.0);
    update
}

#[test]
fn votes_lead_the_support_to_what_most_clients_need() {
    let (parameters, size) = (4_000, 100);
    let mut rule = DelayedVote::first(parameters, size, &mut stream(0)).unwrap();
    let common: Vec<usize> = (0..90).map(|at| at * 41).collect();
    for round in 1..10 {
        // With one seed for all rounds the same coordinates would share their cells for ever.
        let seed = [round as u8; 32];
        assert_eq!(rule.support().indices().len(), size);
        let cells: Vec<Vec<u32>> = (0..20)
            .map(|client| {
                let mut own = common.clone();
                own.extend((0..10).map(|at| 1 + (at * 97 + client * 31) % 3_999));
                rule.ballot().cast(&update(parameters, &own), &seed).unwrap()
            })
            .collect();
        rule.advance(&sum(&cells), &seed, &mut stream(round)).unwrap();
    }
    let found = common.iter().filter(|at| rule.support().indices().contains(&(**at as u32))).count();
    assert!(found >= 88, "{found} of 90");
}

/// Count-min never counts too few, as long as no cell of a client is capped.
#[test]
fn a_count_is_at_least_the_votes_where_no_cell_is_capped() {
    let (parameters, size) = (3_000, 20);
    let ballot = Ballot::new(parameters, size).unwrap();
    assert_eq!(ballot.cells(), 80);
    let large: Vec<usize> = (0..size).map(|at| at * 149).collect();
    let cells = ballot.cast(&update(parameters, &large), &SEED).unwrap();
    assert!(cells.iter().all(|cell| *cell <= Ballot::CELL_CAP));
    for row in cells.chunks(40) {
        assert_eq!(row.iter().sum::<u32>(), 20, "one vote for each coordinate in each row, none capped");
    }
    let counts = ballot.count(&sum(&vec![cells.clone(); 50]), &SEED).unwrap();
    assert!(large.iter().all(|at| counts[*at] >= 50));
    let zero = counts.iter().filter(|count| **count == 0).count();
    assert!(zero > parameters / 2, "{zero} coordinates that nobody voted for");
    // Another seed puts them elsewhere.
    assert_ne!(ballot.cast(&update(parameters, &large), &[8; 32]).unwrap(), cells);
    assert!(ballot.count(&cells[1..], &SEED).is_err());
    assert_eq!(Ballot::new(2_000, 21).unwrap().cells(), 42);
}

#[test]
fn a_client_puts_at_most_three_into_a_cell() {
    let ballot = Ballot::new(1_000, 1_000).unwrap();
    let cells = ballot.cast(&vec![1.0; 1_000], &SEED).unwrap();
    assert_eq!(cells.iter().max(), Some(&3));
    assert_eq!(cells.len(), 2_000);
    assert_eq!([1, 85, 100, 1000].map(Ballot::cell_bits), [2, 8, 9, 12]);
    assert_eq!(Ballot::cell_bits(0), 0);
}

#[test]
fn tracking_keeps_what_the_sums_show_and_explores() {
    let (parameters, size) = (1_000, 50);
    let mut rule = Track::first(parameters, size, 0.3, &mut stream(0)).unwrap();
    let truth = |index: u32| if index % 50 == 3 { 2.0 } else { 0.001 };
    for round in 1..800 {
        let sum: Vec<f32> = rule.support().indices().iter().map(|index| truth(*index)).collect();
        rule.advance(&sum, &mut stream(round)).unwrap();
        assert_eq!(rule.support().indices().len(), size);
    }
    let found = rule.support().indices().iter().filter(|index| **index % 50 == 3).count();
    assert_eq!(found, 20, "all of them were met and kept");
    let before = rule.clone();
    assert!(rule.advance(&[0.0; 49], &mut stream(0)).is_err());
    let mut sum = [0.0; 50];
    sum[7] = f32::NAN;
    assert_eq!(rule.advance(&sum, &mut stream(0)), Err(SupportError::NotFinite(7)));
    assert_eq!(rule, before);
    assert!(Track::first(10, 2, f64::NAN, &mut stream(0)).is_err());
}

/// On the support 0.7·a + 0.3·|sum|, off it 0.98·a.
#[test]
fn tracking_follows_its_formula() {
    let mut rule = Track::restored(0.0, vec![1.0; 4], Support::new(4, vec![1, 2]).unwrap()).unwrap();
    rule.advance(&[-3.0, 0.0], &mut stream(0)).unwrap();
    let expected = [0.98, 0.7 + 0.3 * 3.0, 0.7, 0.98];
    assert!(rule.scores.iter().zip(expected).all(|(score, expected)| (score - expected).abs() < 1e-6));
    // Ties go to the lowest index.
    assert_eq!(rule.support().indices(), [0, 1]);
}

#[test]
fn lots_reach_every_coordinate_alike() {
    let mut met = [0u32; 40];
    let mut rng = stream(1);
    let mut scores = [0.0f32; 40];
    scores[3..6].fill(1.0);
    for _ in 0..4_000 {
        let support = by_score_and_lot(&scores, 8, 0.6, &mut rng).unwrap();
        assert!(support.indices().is_sorted_by(|a, b| a < b));
        support.indices().iter().for_each(|index| met[*index as usize] += 1);
    }
    assert_eq!(met[3..6], [4_000; 3]);
    // 5 lots over 37 coordinates: 541 each, deviation 22.
    let rest = met.iter().enumerate().filter(|(at, _)| !(3..6).contains(at));
    for (at, met) in rest {
        assert!((430..650).contains(met), "coordinate {at} was met {met} times");
    }
}

/// Models of another version of this program must not follow other supports.
#[test]
fn supports_are_frozen() {
    let first = SeededRandom::first(1_000, 8, &mut stream(0)).unwrap();
    let cells = Ballot::new(100, 3).unwrap().cast(&update(100, &[5, 50, 95]), &SEED).unwrap();
    let digest = first.support().digest().short();
    assert_eq!(format!("{:?} {digest} {cells:?}", first.support().indices()), FROZEN);
}
const FROZEN: &str = "[59, 194, 360, 379, 523, 525, 892, 921] 2e4af333 [1, 1, 1, 1, 0, 2]";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn states_come_back(parameters in 0usize..2_000, share in 0.0f64..=1.0, seed: u64) {
        let size = (parameters as f64 * share) as usize;
        let mut rng = Stream::new(seed, Purpose::Cohort, 0, "");
        let mut vote = DelayedVote::first(parameters, size, &mut rng).unwrap();
        let cells: Vec<u32> = (0..vote.ballot().cells()).map(|_| rng.random_range(0..100)).collect();
        vote.advance(&cells, &SEED, &mut rng).unwrap();
        let mut track = Track::first(parameters, size, 0.25, &mut rng).unwrap();
        let sum: Vec<f32> = (0..size).map(|_| rng.random_range(-1.0..1.0)).collect();
        track.advance(&sum, &mut rng).unwrap();
        let mut random = SeededRandom::first(parameters, size, &mut rng).unwrap();
        random.advance(&mut rng).unwrap();
        for state in [SupportState::DelayedVote(vote), SupportState::Track(track), SupportState::SeededRandom(random)] {
            let support = state.support();
            prop_assert_eq!(support.indices().len(), size);
            prop_assert_eq!(&Support::new(parameters, support.indices().to_vec()).unwrap(), support);
            prop_assert_eq!(&Support::from_bytes(&support.to_bytes(), parameters, size).unwrap(), support);
            let bytes = state.to_bytes();
            prop_assert_eq!(&SupportState::from_bytes(&bytes, parameters).unwrap(), &state);
            prop_assert!(SupportState::from_bytes(&bytes, parameters + 1).is_err());
            let mut damaged = bytes.clone();
            let at = rng.random_range(0..damaged.len());
            damaged[at] ^= 1 << rng.random_range(0..8);
            prop_assert!(SupportState::from_bytes(&damaged, parameters).is_err());
            prop_assert!(SupportState::from_bytes(&bytes[..at], parameters).is_err());
        }
    }
}

#[test]
fn what_is_no_support_is_refused() {
    assert!(Support::new(3, vec![0, 0]).is_err());
    assert!(Support::new(3, vec![1, 0]).is_err());
    assert!(Support::new(3, vec![3]).is_err());
    assert!(Support::new(1, vec![0, 1]).is_err());
    assert!(DelayedVote::first(10, 11, &mut stream(0)).is_err());
    let support = Support::new(5, vec![1, 4]).unwrap();
    assert_eq!(support.gather(&[0.0, 1.0, 2.0, 3.0, 4.0]).unwrap(), [1.0, 4.0]);
    assert_eq!(support.scatter(&[1.0, 4.0]).unwrap(), [0.0, 1.0, 0.0, 0.0, 4.0]);
    assert!(support.gather(&[0.0; 4]).is_err());
    assert!(support.scatter(&[0.0; 3]).is_err());
}
