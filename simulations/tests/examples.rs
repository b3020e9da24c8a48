//! Every example runs, and shows what it says that it shows.

// What the examples share belongs to each of them.
#![allow(clippy::duplicate_mod)]

#[allow(dead_code)]
#[path = "../examples/aggregation_rule.rs"]
mod aggregation_rule;
#[allow(dead_code)]
#[path = "../examples/architecture.rs"]
mod architecture;
#[allow(dead_code)]
#[path = "../examples/objective.rs"]
mod objective;
#[allow(dead_code)]
#[path = "../examples/partition.rs"]
mod partition;

#[test]
fn a_trimmed_mean_stands_two_saboteurs() {
    let [mean, trimmed] = aggregation_rule::run().unwrap();
    assert!(trimmed.accuracy() > mean.accuracy() + 0.2, "{trimmed:?} {mean:?}");
}

#[test]
fn a_ring_gives_every_client_two_digits() {
    let (spread, learnt) = partition::run().unwrap();
    assert_eq!((spread.clients, spread.labels.minimum, spread.labels.maximum), (10, 2, 2));
    assert!(learnt.iter().all(|learnt| learnt.accuracy() > 0.5), "{learnt:?}");
}

#[test]
fn an_architecture_of_ones_own_learns() {
    let (model, learnt) = architecture::run().unwrap();
    assert_eq!(model.network().unwrap().layout().tensors().len(), 10);
    assert!(learnt.accuracy() > 0.5, "{learnt:?}");
}

#[test]
fn an_objective_with_state_gives_the_same_bits_on_any_number_of_workers() {
    let (fedavg, feddyn) = objective::run(&[1, 3]).unwrap();
    assert_eq!(feddyn[0], feddyn[1]);
    assert_ne!(fedavg.digest, feddyn[0].digest);
    assert!(feddyn[0].accuracy() > 0.5, "{feddyn:?}");
}
