//! The public face: guarantees, the noise that a target asks for, the auditor's bracket, and the pitfalls of accounting.

use super::{number, parts, thinning, vectors};
use crate::privacy::accounting::{
    Accountant, AccountingError, Basis, bracket, epsilon, lower, noise_multiplier_for, pld, rdp,
};
use crate::privacy::{Adjacency, Event, Noise, Unit};

/// The noise for a target, as the reference finds it; ours may be a little smaller, never too small.
#[test]
fn every_reference_noise_is_met() {
    let Some(rows) = vectors("dp_reference_inverse.csv") else { return };
    let (mut worst_rdp, mut worst_pld) = (0f64, 0f64);
    for row in &rows {
        let (target, delta, q) = (number(row, "target_eps"), number(row, "delta"), number(row, "q"));
        let steps = number(row, "steps") as u64;
        let find =
            |accountant| noise_multiplier_for(target, delta, q, steps, Unit::Example, accountant).unwrap();
        let (rdp, pld) = (find(Accountant::Rdp), find(Accountant::Pld));
        worst_rdp = worst_rdp.max((rdp / number(row, "sigma_rdp_dpaccounting") - 1.0).abs());
        let reference = number(row, "sigma_pld_dpaccounting");
        // The last row's reference was found on too coarse a grid: at its noise the lower bound, the upper bound and the
        // reference's own accountant on a finer grid all say 0.37 instead of the 0.5 that was aimed at.
        if number(row, "q") > 1e-4 {
            worst_pld = worst_pld.max((pld / reference - 1.0).abs());
        } else {
            assert!(pld < reference, "{row:?} {pld}");
        }
        for (noise, accountant) in [(rdp, Accountant::Rdp), (pld, Accountant::Pld)] {
            let found =
                epsilon(&[Event::gaussian(q, noise, steps)], delta, Unit::Example, accountant).unwrap();
            assert!(found.epsilon <= target && found.epsilon > 0.999 * target, "{row:?} {found:?}");
        }
    }
    println!("{} targets, noise off by {worst_rdp:.2e} (rdp) and {worst_pld:.2e} (pld)", rows.len());
    assert!(worst_rdp < 1e-2 && worst_pld < 1e-4, "{worst_rdp} {worst_pld}");
}

/// The lower bound lies below every reference figure, and near it.
#[test]
fn the_bracket_holds_the_reference() {
    let Some(rows) = vectors("dp_reference.csv") else { return };
    let mut gaps: Vec<f64> = Vec::new();
    let mut rows: Vec<(Vec<Event>, f64, f64)> = rows
        .iter()
        .map(|row| {
            let event = Event::gaussian(number(row, "q"), number(row, "sigma"), number(row, "steps") as u64);
            (vec![event], number(row, "delta"), number(row, "eps_pld_dpaccounting"))
        })
        .collect();
    rows.extend(
        vectors("dp_reference_compositions.csv")
            .unwrap()
            .iter()
            .map(|row| (parts(row), number(row, "delta"), number(row, "eps_pld_dpaccounting"))),
    );
    for (events, delta, reference) in rows.iter().step_by(thinning()) {
        let lower = lower::epsilon(events, *delta);
        assert!(lower <= reference * (1.0 + 1e-6), "{events:?} {delta} {lower} {reference}");
        gaps.push(((reference - lower - 1e-4) / reference).max(0.0));
    }
    gaps.sort_by(f64::total_cmp);
    let (median, worst) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
    println!(
        "{} of {} rows, lower bound {median:.2e} below at the median, {worst:.2e} at worst",
        gaps.len(),
        rows.len()
    );
    assert!(median < 5e-3, "{median}");
}

#[test]
fn best_is_the_smaller_and_names_its_basis() {
    let events = [Event::gaussian(0.05, 1.6, 300)];
    let best = epsilon(&events, 1e-5, Unit::Example, Accountant::Best).unwrap();
    assert!(matches!(best.basis, Basis::Pld { grid_step } if grid_step > 0.0));
    let rdp = epsilon(&events, 1e-5, Unit::Example, Accountant::Rdp).unwrap();
    assert!(best.epsilon < rdp.epsilon);
    let discrete = events.map(|event| Event { noise: Noise::DiscreteGaussian, ..event });
    let best = epsilon(&discrete, 1e-5, Unit::Example, Accountant::Best).unwrap();
    assert!(matches!(best.basis, Basis::Rdp { order } if order == order.round()));
    let refused = epsilon(&discrete, 1e-5, Unit::Example, Accountant::Pld);
    assert_eq!(refused, Err(AccountingError::NotComposed));
    let bracket = bracket(&discrete, 1e-5, Unit::Example).unwrap();
    assert!(bracket.pld.is_none() && bracket.lower > 2.5 && bracket.lower < bracket.rdp.value);
}

#[test]
fn no_noise_is_infinity_and_nonsense_an_error() {
    let ask = |event: Event, delta| epsilon(&[event], delta, Unit::Example, Accountant::Best);
    for accountant in [Accountant::Best, Accountant::Pld, Accountant::Rdp] {
        let silent = epsilon(&[Event::gaussian(0.1, 0.0, 1)], 1e-5, Unit::Example, accountant).unwrap();
        assert_eq!(silent.epsilon, f64::INFINITY);
    }
    // So little noise that losses are not composed any more: the Renyi figure stands.
    let faint = ask(Event::gaussian(1.0, 0.02, 1), 1e-5).unwrap();
    assert!(faint.epsilon.is_finite() && matches!(faint.basis, Basis::Rdp { .. }));
    assert_eq!(ask(Event::gaussian(0.1, 1.0, 0), 1e-5).unwrap().epsilon, 0.0);
    assert!(matches!(ask(Event::gaussian(0.1, -1.0, 1), 1e-5), Err(AccountingError::Noise { .. })));
    assert!(matches!(ask(Event::gaussian(0.1, f64::NAN, 1), 1e-5), Err(AccountingError::Noise { .. })));
    assert!(matches!(ask(Event::gaussian(f64::NAN, 1.0, 1), 1e-5), Err(AccountingError::SamplingRate(_))));
    assert_eq!(ask(Event::gaussian(0.1, 1.0, u64::MAX), 1e-5), Err(AccountingError::Steps));
    for delta in [0.0, 1.0, -1e-5, f64::NAN] {
        assert!(matches!(ask(Event::gaussian(0.1, 1.0, 1), delta), Err(AccountingError::Delta(_))));
    }
    let noise = noise_multiplier_for(0.0, 1e-5, 0.1, 10, Unit::Example, Accountant::Best);
    assert_eq!(noise, Err(AccountingError::Target(0.0)));
}

/// Pitfall 2, the half that is accounting: empty batches and all local steps count. The cost is a function of the public
/// number of steps alone, and more steps always cost more.
#[test]
fn pitfall_2_every_declared_step_is_charged() {
    let at = |steps| {
        epsilon(&[Event::gaussian(0.02, 1.1, steps)], 1e-5, Unit::Example, Accountant::Best).unwrap().epsilon
    };
    assert!(at(100) < at(101) && at(101) < at(200));
}

/// Pitfall 6: signs of fractional orders, capped orders, a grid coarser than the loss, one direction only, a central
/// limit instead of a bound, an estimate instead of the upper bound.
#[test]
fn pitfall_6_numerics_of_accountants() {
    // A fractional order of which others make infinity or 57 % too much (dp_accounting 0.6.0).
    let at = |q, sigma, order| rdp::divergence(&Event::gaussian(q, sigma, 1), order);
    assert!((at(0.1, 2.0, 1.1) / 0.001_523_170_366_529_756 - 1.0).abs() < 1e-9);
    assert!((at(0.5, 2.0, 1.4) / 0.046_204_511_867_806_23 - 1.0).abs() < 1e-9);
    // The best order is beyond the usual cap of 1024.
    assert!(rdp::epsilon(&[Event::gaussian(1e-4, 20.0, 10)], 1e-8).order > 1024.0);
    // A loss of standard deviation 1.25e-5 a step: a fixed grid of 1e-4 loses to Renyi here, ours does not.
    let fine = [Event::gaussian(1e-4, 8.0, 100_000)];
    let pld = pld::epsilon(&fine, 1e-6).unwrap();
    assert!(pld.grid_step < 1e-6 && pld.value < rdp::epsilon(&fine, 1e-6).value);
    // The central limit says 3.06 where the truth is 6.476.
    let tail = [Event::gaussian(0.01, 0.5, 100)];
    assert!((pld::epsilon(&tail, 1e-5).unwrap().value - 6.476_2).abs() < 1e-3);
    // Never an estimate: the exact value of one unsampled Gaussian is not undercut.
    assert!(pld::epsilon(&[Event::gaussian(1.0, 1.0, 1)], 1e-6).unwrap().value >= 4.886_554);
}

/// Pitfall 7: adjacency is part of a claim. A replaced unit moves the sum twice as far; the caller declares that
/// sensitivity, and nothing is assumed in silence.
#[test]
fn pitfall_7_adjacency_and_sensitivity() {
    let claim = |unit| epsilon(&[Event::gaussian(1.0, 5.0, 10)], 1e-5, unit, Accountant::Best).unwrap();
    assert_eq!(claim(Unit::Example).adjacency, Adjacency::AddOrRemoveOne);
    assert_eq!(claim(Unit::Group).adjacency, Adjacency::AddOrRemoveOne);
    assert_eq!(claim(Unit::Client).adjacency, Adjacency::ZeroOut);
    // With everybody sampled a zeroed contribution costs what a removed one does.
    assert_eq!(claim(Unit::Client).epsilon, claim(Unit::Example).epsilon);
    let replaced = Event { sensitivity: 2.0, ..Event::gaussian(1.0, 5.0, 10) };
    let twice = epsilon(&[replaced], 1e-5, Unit::Example, Accountant::Best).unwrap().epsilon;
    assert!(twice > 2.0 * claim(Unit::Example).epsilon);
    let halved = epsilon(&[Event::gaussian(1.0, 2.5, 10)], 1e-5, Unit::Example, Accountant::Best).unwrap();
    assert_eq!(twice, halved.epsilon);
    // Who took part is published, so clients are not hidden by sampling.
    let sampled = epsilon(&[Event::gaussian(0.1, 5.0, 10)], 1e-5, Unit::Client, Accountant::Best);
    assert_eq!(sampled, Err(AccountingError::PublicParticipation(0.1)));
}

/// Pitfall 8: a rate above one, such as batch size over a data set that was filtered to less than a batch, is an error and
/// never silently one.
#[test]
fn pitfall_8_a_rate_above_one_is_refused() {
    for rate in [1.000_001, 4.0, f64::INFINITY, 0.0, -0.1] {
        let found = epsilon(&[Event::gaussian(rate, 1.0, 1)], 1e-5, Unit::Example, Accountant::Best);
        assert_eq!(found, Err(AccountingError::SamplingRate(rate)));
        // Where a caller did not ask the face, it costs infinity (or nothing, if nobody is ever sampled).
        let cost = rdp::epsilon(&[Event::gaussian(rate, 1.0, 1)], 1e-5).value;
        assert_eq!(cost, if rate == 0.0 { 0.0 } else { f64::INFINITY });
    }
}

/// Pitfall 9, the half that is accounting: what adaptive clipping or a noised metric releases is an event of its own, and
/// leaving it out makes the figure smaller.
#[test]
fn pitfall_9_every_release_is_an_event() {
    let training = Event::gaussian(0.02, 1.1, 300);
    let metric = Event::gaussian(1.0, 40.0, 30);
    let paid = epsilon(&[training, metric], 1e-5, Unit::Example, Accountant::Best).unwrap().epsilon;
    let unpaid = epsilon(&[training], 1e-5, Unit::Example, Accountant::Best).unwrap().epsilon;
    assert!(paid > unpaid);
}

/// Pitfall 14: no epsilon without delta, unit, adjacency, and accountant with its order or grid.
#[test]
fn pitfall_14_a_guarantee_says_what_it_is() {
    for accountant in [Accountant::Pld, Accountant::Rdp] {
        let guarantee = epsilon(&[Event::gaussian(0.02, 1.1, 10)], 1e-5, Unit::Group, accountant).unwrap();
        let json = serde_json::to_value(guarantee).unwrap();
        let has = |key: &str| json.get(key).is_some_and(|value| !value.is_null());
        assert!(["epsilon", "delta", "unit", "adjacency", "accountant"].iter().all(|key| has(key)), "{json}");
        assert!(has("order") != has("grid_step"), "{json}");
    }
}
