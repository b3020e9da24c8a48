//! The masked sum is the plain sum of the survivors for every pattern of drop-outs that the threshold allows, and no
//! sum at all for the others.

use rand::RngExt as _;

use super::federation::{Federation, Until};
use crate::privacy::noise::SecretRng;
use crate::secagg::parameters::Rules;

const STEPS: [Until; 5] = [Until::Shares, Until::Upload, Until::Confirm, Until::Unmask, Until::Late];

/// Who dies before each step, as sets of bits.
type Pattern = [u32; 5];

/// What must come of a pattern on a complete graph: the survivors, or nothing.
fn expected(clients: u32, pattern: &Pattern) -> Option<u32> {
    let threshold = 2 * clients / 3 + 1;
    let enough = |set: u32| set.count_ones() >= threshold && set.count_ones() >= 3;
    let shared = ((1 << clients) - 1) & !pattern[0];
    let alive = shared & !pattern[1];
    let signed = alive & !pattern[2];
    let answered = signed & !pattern[3];
    // Nobody is asked again if nobody is silent.
    let late = if answered == alive { answered } else { answered & !pattern[4] };
    [shared, alive, signed, answered, late].into_iter().all(enough).then_some(alive)
}

fn check(clients: u32, pattern: &Pattern) -> bool {
    let mut federation = Federation::new(clients as usize);
    let dies = |index: usize, before: Until| {
        let step = STEPS.iter().position(|step| *step == before).unwrap();
        pattern[step] >> index & 1 == 1
    };
    let outcome = federation.run(dies);
    let expected = expected(clients, pattern);
    match expected {
        Some(alive) => {
            let survivors: Vec<usize> =
                (0..clients as usize).filter(|index| alive >> index & 1 == 1).collect();
            assert_eq!(outcome.as_ref().unwrap(), &federation.plain_sum(survivors.clone()), "{pattern:?}");
            for index in survivors {
                let id = federation.ids[index];
                let is_dead = federation.dead.contains(&id);
                assert_eq!(federation.nodes[&id].included, (!is_dead).then_some(true), "{pattern:?}");
            }
        }
        None => assert!(outcome.is_err(), "{clients} {pattern:?}"),
    }
    assert_eq!(federation.faults.iter().filter(|(id, _)| !federation.dead.contains(id)).count(), 0);
    expected.is_some()
}

/// All ways to die from `step` on, but for those that differ only after the session was lost.
fn explore(clients: u32, pattern: Pattern, step: usize, dead: u32, checked: &mut u32) {
    if step == STEPS.len() {
        return;
    }
    for dying in (0..1u32 << clients).filter(|dying| dying & dead == 0) {
        let mut next = pattern;
        next[step] = dying;
        // Without new deaths it is the pattern that was checked before.
        let goes_on = if dying == 0 {
            true
        } else {
            *checked += 1;
            check(clients, &next)
        };
        if goes_on {
            explore(clients, next, step + 1, dead | dying, checked);
        }
    }
}

fn every_pattern(clients: u32, count: u32) {
    assert!(check(clients, &[0; 5]));
    let mut checked = 0;
    explore(clients, [0; 5], 0, 0, &mut checked);
    assert_eq!(checked, count);
}

#[test]
fn every_pattern_of_up_to_five_clients() {
    every_pattern(3, 35);
    every_pattern(4, 355);
    every_pattern(5, 905);
}

#[test]
fn every_pattern_of_six_clients() {
    every_pattern(6, 2175);
}

#[test]
fn random_patterns_of_complete_graphs() {
    let mut rng = SecretRng::new().unwrap();
    for clients in [7u32, 10, 13, 20] {
        // A quarter of them may die; now and then too many.
        let mut pattern = [0; 5];
        for index in 0..clients {
            if rng.coin(0.2) {
                pattern[rng.random_range(0..5)] |= 1 << index;
            }
        }
        check(clients, &pattern);
    }
}

#[test]
fn a_ring_of_three_hundred_with_drop_outs_at_every_step() {
    let mut agreement = super::federation::agreement();
    agreement.rules = Rules { dropout_per_million: 150_000, ..agreement.rules };
    let mut rng = SecretRng::new().unwrap();
    let count = 300;
    let fates: Vec<Option<Until>> =
        (0..count).map(|_| rng.coin(0.1).then(|| STEPS[rng.random_range(0..STEPS.len())])).collect();
    let mut federation =
        Federation::with(count, agreement, |_| (super::federation::lenient(), Default::default()));
    let outcome = federation.run(|index, before| fates[index] == Some(before));
    let parameters = federation.config.agreement.rules.parameters(300).unwrap();
    println!("{parameters:?}");
    let survivors = (0..count).filter(|&index| fates[index].is_none_or(|fate| fate > Until::Upload));
    assert_eq!(outcome.unwrap(), federation.plain_sum(survivors));
}
