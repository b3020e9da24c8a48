//! The statistics of audit runs: reference rows, and an ideal mechanism that is honest or has half the noise it claims.
#![allow(clippy::unwrap_used)] // a test

use rand::RngExt;
use rand_distr::{Distribution, StandardNormal};
use tributary_audit::canary::file::{NoiseCheck, Verdict};
use tributary_audit::canary::{Guesses, one_run, one_shot, trade_off};
use tributary_common::privacy::canary::{AuditClaim, AuditRun, Canary, NoiseRecord, step_score};
use tributary_common::privacy::{Event, Unit};
use tributary_common::rng::{Purpose, Stream};

/// Rows of dp_reference_audit.csv, from the folder that `TRIBUTARY_VECTORS` names.
fn reference() -> Option<Vec<[f64; 8]>> {
    let Ok(folder) = std::env::var("TRIBUTARY_VECTORS") else {
        eprintln!("SKIPPED: TRIBUTARY_VECTORS does not name the folder with dp_reference_audit.csv");
        return None;
    };
    let text = std::fs::read_to_string(std::path::Path::new(&folder).join("dp_reference_audit.csv")).unwrap();
    let row = |line: &str| {
        let cells: Vec<f64> = line.split(',').map(|cell| cell.parse().unwrap()).collect();
        cells.try_into().unwrap()
    };
    Some(text.lines().skip(1).map(row).collect())
}

#[test]
fn every_reference_row_is_met() {
    let Some(rows) = reference() else { return };
    let (mut worst, mut worst_curve) = (0f64, 0f64);
    for row in &rows {
        let [canaries, made, correct, delta, error, steinke, _, gaussian] = *row;
        let guesses = Guesses { canaries: canaries as usize, made: made as usize, correct: correct as usize };
        worst = worst.max((one_run::lower_bound(guesses, delta, error) - steinke).abs());
        if gaussian.is_finite() {
            let found = trade_off::gaussian_lower_bound(guesses, delta, error);
            worst_curve = worst_curve.max((found - gaussian).abs());
            println!("{guesses:?} {found} {gaussian}");
        }
    }
    println!("{} rows, off by {worst:.1e} and, with a Gaussian curve, {worst_curve:.1e}", rows.len());
    assert!(worst < 1e-6 && worst_curve < 1e-4, "{worst} {worst_curve}");
}

/// Pitfall 13: m counts all canaries, the term with delta is there, and a claim is not expected to be reached.
#[test]
fn pitfall_13_what_the_bound_counts() {
    let guesses = Guesses { canaries: 1000, made: 100, correct: 95 };
    let at = |guesses, delta| one_run::lower_bound(guesses, delta, 0.05);
    assert!((at(guesses, 1e-5) - 2.165_175_8).abs() < 1e-6);
    assert!(at(guesses, 1e-5) < at(guesses, 0.0));
    assert!(at(guesses, 1e-5) < at(Guesses { canaries: 100, ..guesses }, 1e-5));
    assert_eq!(at(Guesses { correct: 50, ..guesses }, 1e-5), 0.0);
    assert_eq!(at(Guesses { correct: 101, ..guesses }, 1e-5), 0.0);
}

/// 480 steps on batches of 256 of 6000 at epsilon 3, delta 1e-5.
fn claim() -> Event {
    Event::gaussian(256.0 / 6000.0, 1.534, 480)
}

/// A run with canaries in orthogonal directions, whose noise is `factor` of the claimed one.
fn run(seed: u64, canaries: usize, factor: f64) -> AuditRun {
    let event = claim();
    let deviation = factor * event.noise_standard_deviation;
    let mut stream = Stream::new(seed, Purpose::Partition, 1, "audit");
    let mut noise = NoiseRecord {
        declared_standard_deviation: event.noise_standard_deviation,
        coordinates: 0,
        sum_of_squares: 0.0,
    };
    let canaries = (0..canaries)
        .map(|_| {
            let included = stream.random::<bool>();
            let mut score = 0.0;
            for _ in 0..event.count {
                let sampled = included && stream.random::<f64>() < event.sampling_rate;
                let added: f64 = deviation * {
                    let standard: f64 = StandardNormal.sample(&mut stream);
                    standard
                };
                noise.coordinates += 1;
                noise.sum_of_squares += added * added;
                score += step_score(&event, added + f64::from(u8::from(sampled))).unwrap();
            }
            Canary { included, score }
        })
        .collect::<Vec<_>>();
    AuditRun {
        claim: AuditClaim { events: vec![event], delta: 1e-5, unit: Unit::Example },
        guesses_per_side: canaries.len() / 10,
        canaries,
        noise: vec![noise],
        one_shot: None,
    }
}

/// An honest mechanism is seen to leak something and never refuted; one with half the noise it claims is refuted, and its
/// recorded noise is short by itself. m = 3000, 300 guesses a side, 6 seeds each, or 20 with `TRIBUTARY_VECTORS_ALL`.
#[test]
fn an_audit_run_tells_an_honest_mechanism_from_one_with_half_the_noise() {
    let seeds = if std::env::var_os("TRIBUTARY_VECTORS_ALL").is_some() { 20 } else { 6 };
    let (mut lowest, mut highest, mut refuted) = (f64::INFINITY, 0f64, 0u64);
    let mut plain = [0f64; 2];
    for seed in 0..seeds {
        let honest = Verdict::of(&run(seed, 3000, 1.0)).unwrap();
        let found = honest.trade_off.unwrap();
        assert!(honest.is_sound(), "{seed}: {honest:?}");
        (lowest, highest) = (lowest.min(found.epsilon), highest.max(found.epsilon));
        plain[0] = plain[0].max(honest.one_run);

        let halved = Verdict::of(&run(1000 + seed, 3000, 0.5)).unwrap();
        let found = halved.trade_off.unwrap();
        refuted += u64::from(found.claim_refuted);
        plain[1] = plain[1].max(halved.one_run);
        if found.claim_refuted {
            assert!(found.epsilon > halved.claim.epsilon && found.noise_factor < 1.0, "{found:?}");
        }
        assert!(halved.noise.iter().all(NoiseCheck::is_short) && !halved.is_sound());
    }
    println!(
        "honest {lowest:.2} to {highest:.2} of 3; half the noise refuted {refuted} of {seeds}; without a curve at most \
         {:.2} and {:.2}",
        plain[0], plain[1]
    );
    assert!(lowest > 0.0 && highest <= 3.0 && refuted + 1 >= seeds, "{lowest} {highest} {refuted}");
}

#[test]
fn the_client_level_estimate() {
    let mut stream = Stream::new(3, Purpose::Partition, 1, "cosines");
    let dimension = 10_000u64;
    let cosines = |mean: f64, stream: &mut Stream| -> Vec<f64> {
        let mut one = || {
            let standard: f64 = StandardNormal.sample(&mut *stream);
            mean + 0.01 * standard
        };
        (0..20_000).map(|_| one()).collect()
    };
    // Two normals a standard deviation apart: the Gaussian mechanism with mu 1.
    let found = one_shot::estimate(&cosines(0.01, &mut stream), dimension, 1e-5).unwrap();
    let exact = trade_off::gaussian_epsilon(1.0, 1e-5);
    assert!((found / exact - 1.0).abs() < 0.1, "{found} {exact}");
    let nothing = one_shot::estimate(&cosines(0.0, &mut stream), dimension, 1e-5).unwrap();
    assert!(nothing < 0.3, "{nothing}");
    assert_eq!(one_shot::estimate(&[0.1], dimension, 1e-5), None);
    assert_eq!(one_shot::estimate(&[0.1, 0.1], dimension, 1e-5), None);
    assert_eq!(one_shot::estimate(&[0.1, f64::NAN], dimension, 1e-5), None);
    assert_eq!(one_shot::estimate(&[0.1, 0.2], 999, 1e-5), None);
}

#[test]
fn a_record_that_is_none_is_refused() {
    let sound = run(1, 40, 1.0);
    assert!(Verdict::of(&sound).is_ok());
    let refused = |change: fn(&mut AuditRun)| {
        let mut run = sound.clone();
        change(&mut run);
        Verdict::of(&run).unwrap_err().to_string()
    };
    assert!(refused(|run| run.guesses_per_side = 0).contains("guesses"));
    assert!(refused(|run| run.guesses_per_side = 21).contains("guesses"));
    assert!(refused(|run| run.canaries[3].score = f64::NAN).contains("canary 3"));
    assert!(refused(|run| run.noise[0].declared_standard_deviation = 0.0).contains("noise record 0"));
    assert!(refused(|run| run.claim.delta = 2.0).contains("claim"));
}
