//! What a researcher relies on in masked and compressed runs: masks change no bit, drop-outs are made up for or told.

use super::*;
use crate::engine::Masks;

const MASKED: &str = "secure_aggregation={enabled=true}";
const NOT_FIXED: &str = "policy.fixed_cohort=false";
const VOTE: &str = "compression={scheme='top-k',density=0.05}";
const PLAIN_VOTE: &str = "compression={scheme='top-k',density=0.05,error_feedback=false}";
const TRACK: &str = "compression={scheme='top-k',density=0.05,support='track'}";
const DISTRIBUTED: [&str; 4] = [
    MASKED,
    "train={algorithm='fedavg',learning_rate=0.1,local_steps=1,sampling_rate=0.5}",
    "privacy={unit='example',mechanism='distributed',noise_multiplier=2.0,clip_norm=1.0,expected_batch_size=60.0,\
     delta=1e-5,max_epsilon=50.0}",
    "data.declared_examples=20",
];

fn masked(set: &[&str], masks: Masks) -> Told {
    masked_with(&scenario(set), Settings { masks: Some(masks), ..settings(2, arithmetic()) })
}

fn masked_with(scenario: &Scenario, settings: Settings) -> Told {
    run_with(scenario, settings).unwrap()
}

fn accepted(told: &Told) -> ImposedSets {
    let published =
        told.rounds.iter().filter(|round| matches!(round.outcome, RoundOutcome::Published { .. }));
    published.map(|round| (round.round, round.accepted().cloned().collect())).collect()
}

#[test]
fn masks_change_no_bit_of_a_model_and_no_record_but_the_bytes() {
    for more in [&[][..], &[VOTE], &[TRACK], &["model.architecture=2nn", VOTE, "rounds=4"]] {
        let set = [&[MASKED], more].concat();
        let (on, off) = (masked(&set, Masks::On), masked(&set, Masks::Off));
        assert_eq!((on.published, &on.state), (on.rounds.len() as u32, &RunState::Finished), "{set:?}");
        assert_eq!(model::digest(&on.model), model::digest(&off.model), "{set:?}");
        assert_eq!(on.evaluations, off.evaluations);
        for (on, off) in on.rounds.iter().zip(&off.rounds) {
            assert_eq!((&on.cohort, on.summed), (&off.cohort, off.summed));
            assert!(on.summed.and_then(|summed| summed.loss()).is_some_and(|loss| loss > 0.0));
            assert!(on.bytes_up > off.bytes_up && on.bytes_down > off.bytes_down, "the session's messages");
            let updates: u64 = on.cohort.values().map(bytes).sum();
            assert_eq!(updates, off.bytes_up);
        }
        let other = masked(&[&set[..], &["seed=4"]].concat(), Masks::Off);
        assert_ne!(model::digest(&other.model), model::digest(&off.model));
    }
}

fn bytes(part: &Participation) -> u64 {
    match part {
        Participation::Accepted { bytes, .. } => *bytes,
        _ => 0,
    }
}

#[test]
fn whoever_falls_silent_is_made_up_for_and_a_replay_without_masks_ends_in_the_same_model() {
    let silent = [
        "faults.dropout_before_training=0.03",
        "faults.dropout_after_training=0.08",
        "cohort.reconnect_seconds=1",
        "cohort.size=10",
        "rounds=6",
    ];
    // What a client left out is lost with it when it falls silent after its upload, so a replay differs there.
    for more in [&[MASKED][..], &[MASKED, VOTE], &[MASKED, TRACK]] {
        let set = [&silent[..], more].concat();
        let told = masked(&set, Masks::On);
        assert_eq!((&told.state, told.published), (&RunState::Finished, 6), "{set:?}");
        let lost = told.rounds.iter().map(|round| round.dropped().count()).sum::<usize>();
        assert!(lost > 3, "{lost} were lost");
        let without: Vec<&str> = set.iter().filter(|set| !set.starts_with("faults")).copied().collect();
        for masks in [Masks::On, Masks::Off] {
            let imposed = Some(accepted(&told));
            let settings = Settings { imposed, masks: Some(masks), ..settings(2, arithmetic()) };
            let replayed = masked_with(&scenario(&without), settings);
            assert_eq!(accepted(&replayed), accepted(&told));
            assert_eq!(model::digest(&replayed.model), model::digest(&told.model), "{set:?}");
        }
    }
}

#[test]
fn too_many_silent_survivors_lose_the_round() {
    // Nobody who delivered its update answers any more: there is no sum, and nobody masks the round again.
    let set = [MASKED, "faults.dropout_after_upload=1.0", "cohort.size=6", "cohort.attempts=2", NOT_FIXED];
    let told = masked(&set, Masks::On);
    assert!(matches!(told.state, RunState::Failed { .. }), "{:?}", told.state);
    assert!(told.rounds.iter().all(|round| round.spent), "{:?}", told.rounds);
}

#[test]
fn small_cohorts_without_noise_are_fixed_unless_the_policy_says_otherwise() {
    let set =
        [MASKED, "faults.dropout_after_training=0.1", "cohort.reconnect_seconds=1", "cohort.attempts=9"];
    let lost = |told: &Told| told.rounds.iter().filter(|round| round.spent).count();
    let dropped = |round: &RoundRecord| round.dropped().count();
    let fixed = masked(&set, Masks::On);
    assert!(fixed.rounds.iter().all(|round| round.spent == (dropped(round) > 0)), "{:?}", fixed.rounds);
    let free = masked(&[&set[..], &[NOT_FIXED]].concat(), Masks::On);
    assert!(lost(&free) < lost(&fixed), "{:?}", free.rounds);
}

#[test]
fn workers_and_the_wire_decide_no_bit_of_masked_and_compressed_runs() {
    let devices = [
        "devices.step_milliseconds={uniform={from=1,to=900}}",
        "devices.latency_milliseconds=40",
        "devices.upload_megabits_per_second=1",
        "cohort.over_selection=1.5",
        NOT_FIXED,
    ];
    for more in [
        &[MASKED][..],
        &[MASKED, VOTE],
        &["compression={scheme='top-k',density=0.02}"],
        &["compression={scheme='int8'}"],
        &["compression={scheme='qsgd',levels=3}"],
    ] {
        let scenario = scenario(&[&devices[..], more].concat());
        let masks = Some(Masks::On);
        let one = masked_with(&scenario, Settings { masks, ..settings(1, arithmetic()) });
        assert_eq!(one.state, RunState::Finished);
        let uneven: MakeTrainer = Arc::new(|| Ok(Box::new(Uneven(ArithmeticTrainer))));
        assert_same(&one, &masked_with(&scenario, Settings { masks, ..settings(4, uneven) }));
        let transport = Transport::Wire;
        let mut wire = masked_with(&scenario, Settings { masks, transport, ..settings(3, arithmetic()) });
        for part in wire.rounds.iter_mut().flat_map(|round| round.cohort.values_mut()) {
            if let Participation::Accepted { digest, .. } = part {
                assert!(digest.take().is_some());
            }
        }
        assert_same(&one, &wire);
    }
}

#[test]
fn devices_that_come_and_go_and_crash_take_part_in_sessions_again() {
    let set = [
        MASKED,
        // What a client left out is lost when it crashes, and a replay would differ: nothing is kept.
        PLAIN_VOTE,
        "rounds=10",
        "cohort.size=8",
        "cohort.reconnect_seconds=20",
        "cohort.attempts=20",
        "devices.step_milliseconds={uniform={from=100,to=900}}",
        "devices.latency_milliseconds=300",
        "devices.availability.online_seconds=90",
        "devices.availability.offline_seconds=10",
        "faults.crash_probability=0.1",
        "faults.rejoin_seconds=2",
        NOT_FIXED,
    ];
    let told = masked(&set, Masks::On);
    assert_eq!(told.state, RunState::Finished, "{:?}", told.rounds);
    assert!(told.published >= 6, "{:?}", told.rounds);
    let imposed = Some(accepted(&told));
    assert!(told.rounds.iter().any(|round| round.dropped().count() > 0));
    if told.published == 10 {
        let masks = Some(Masks::Off);
        let settings = Settings { imposed, masks, ..settings(2, arithmetic()) };
        let quiet = masked_with(&scenario(&[MASKED, PLAIN_VOTE, "rounds=10", "cohort.size=8"]), settings);
        assert_eq!(model::digest(&quiet.model), model::digest(&told.model));
    }
}

#[test]
fn noise_in_shares_goes_through_masks_and_its_price_is_told() {
    let told = masked(&DISTRIBUTED, Masks::On);
    assert_eq!((&told.state, told.published), (&RunState::Finished, 3), "{:?}", told.rounds);
    assert!(told.rounds.iter().all(|round| round.summed.is_none()), "nothing is told beside the sum");
    let again = masked(&DISTRIBUTED, Masks::On);
    assert_ne!(model::digest(&told.model), model::digest(&again.model), "noise is never the same twice");
    let ledger = told.ledger.as_ref().unwrap();
    assert!(ledger.contains("kellam"), "{ledger}");
    let track =
        masked(&[&DISTRIBUTED[..], &["compression={scheme='top-k',density=0.1}"]].concat(), Masks::On);
    assert_eq!(track.state, RunState::Finished);
}

#[test]
fn strict_sessions_need_pins_and_have_them() {
    let strict = [MASKED, "secure_aggregation.level=strict"];
    let told = masked(&strict, Masks::On);
    assert_eq!(told.state, RunState::Finished, "{:?}", told.rounds);
    assert_eq!(model::digest(&told.model), model::digest(&masked(&[MASKED], Masks::On).model));
}

#[test]
fn corrupt_updates_are_refused_whatever_the_scheme() {
    for more in [&[MASKED, NOT_FIXED][..], &["compression={scheme='top-k',density=0.02}"]] {
        let corrupt = ["faults.corrupt_upload_probability=0.3", "rounds=4", "cohort.attempts=9"];
        let told = masked(&[&corrupt, more].concat(), Masks::On);
        assert_eq!(told.state, RunState::Finished, "{:?}", told.rounds);
        let parts = || told.rounds.iter().flat_map(|round| round.cohort.values());
        assert!(parts().any(|part| matches!(part, Participation::Refused { .. })), "{:?}", told.rounds);
    }
}

#[test]
fn what_updates_leave_out_is_sent_later() {
    let top_k = "compression={scheme='top-k',density=0.01,value_bits=32}";
    let kept = masked(&["rounds=6", "cohort.size=12", top_k], Masks::On);
    let lost = masked(&["rounds=6", "cohort.size=12", top_k, "compression.error_feedback=false"], Masks::On);
    let dense = masked(&["rounds=6", "cohort.size=12"], Masks::On);
    assert_ne!(model::digest(&kept.model), model::digest(&lost.model));
    let distance = |told: &Told| -> f64 {
        let pairs = told.model.iter().zip(dense.model.iter());
        pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    };
    assert!(distance(&kept) < distance(&lost), "{} {}", distance(&kept), distance(&lost));
}

#[test]
fn a_plan_knows_the_bytes_of_masked_runs_and_says_what_masks_promise() {
    for more in [&[][..], &[VOTE], &DISTRIBUTED[1..]] {
        let scenario = scenario(&[&[MASKED], more].concat());
        let plan = Plan::of(&scenario, &scenario.federation().unwrap()).unwrap();
        let masks = Some(Masks::On);
        let told = masked_with(&scenario, Settings { masks, ..settings(2, arithmetic()) });
        assert_eq!(told.published, 3);
        for round in &told.rounds {
            assert_eq!(round.bytes_up, plan.bytes_up_per_round);
            // The coordinates are part of the invitation, which the record does not count.
            let support = plan.invited * plan.transfers.support_bytes;
            // Nor do the messages count that tell of the commit: they leave after the record.
            let committed = plan.invited * 20;
            assert_eq!(round.bytes_down, plan.bytes_down_per_round - support - committed);
        }
        let text = plan.to_string();
        for words in
            ["level semi; 6 clients, each with all others; 1 may fall silent", "an update is ", "other 2"]
        {
            assert!(text.contains(words), "{words}: {text}");
        }
        match &plan.privacy {
            None => assert!(text.contains("cannot wrap around: 6 clients"), "{text}"),
            Some(privacy) => {
                assert!(privacy.epsilon_alone.unwrap() > privacy.epsilon, "{text}");
            }
        }
    }
    let top_k = scenario(&["compression={scheme='top-k',density=0.01}"]);
    let plan = Plan::of(&top_k, &top_k.federation().unwrap()).unwrap();
    let told = run(&top_k, 2, arithmetic());
    let (up, planned) = (told.rounds[0].bytes_up as f64, plan.bytes_up_per_round as f64);
    assert!((up / planned - 1.0).abs() < 0.2, "{up} {planned}");
}
