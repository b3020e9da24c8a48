//! What a researcher relies on when devices are slow, come and go, and fail: exact times, true records, the same bits.

use super::*;

fn uneven() -> MakeTrainer {
    Arc::new(|| Ok(Box::new(Uneven(ArithmeticTrainer))))
}

/// The run of a scenario, which no number of workers changes.
fn run_on_any(scenario: &Scenario) -> Told {
    let one = run(scenario, 1, arithmetic());
    assert_same(&one, &run(scenario, 4, uneven()));
    assert!(matches!(one.state, RunState::Finished | RunState::Failed { .. }), "{:?}", one.state);
    one
}

fn parts(told: &Told) -> impl Iterator<Item = &Participation> {
    told.rounds.iter().flat_map(|round| round.cohort.values())
}

fn count(told: &Told, holds: impl Fn(&Participation) -> bool) -> usize {
    parts(told).filter(|part| holds(part)).count()
}

fn accepted(told: &Told) -> ImposedSets {
    told.rounds
        .iter()
        .filter(|round| round.accepted().count() > 0)
        .map(|round| (round.round, round.accepted().cloned().collect()))
        .collect()
}

fn is_accepted(part: &Participation) -> bool {
    matches!(part, Participation::Accepted { .. })
}

const IID: &str = "partition={scheme='iid'}";

#[test]
fn the_default_devices_are_what_there_was_without_any() {
    let set = ["devices.step_milliseconds=1", "devices.latency_milliseconds=0"];
    assert_same(&run(&scenario(&[]), 2, arithmetic()), &run(&scenario(&set), 2, arithmetic()));
}

#[test]
fn a_round_takes_its_messages_its_transfers_and_its_steps() {
    let set = [
        IID,
        "devices.step_milliseconds=100",
        "devices.latency_milliseconds=50",
        "devices.download_megabits_per_second=1",
        "devices.upload_megabits_per_second=0.5",
    ];
    let told = run_on_any(&scenario(&set));
    // 31,400 bytes and 20 examples in batches of 8: 50, 50 + 251.2, 3 · 100, 50 + 502.4, each to the millisecond.
    let span = 50 + 301 + 300 + 552;
    for (at, round) in told.rounds.iter().enumerate() {
        assert_eq!((round.started.0, round.ended.0), (at as u64 * span, (at as u64 + 1) * span));
    }
    assert_eq!(told.timing.total_milliseconds, 3 * span);
    assert_eq!((told.timing.ended_by_deadline, told.timing.idle_share), (0.0, 0.0));
    let scenario = scenario(&set);
    assert_eq!(Plan::of(&scenario, &scenario.federation().unwrap()).unwrap().timing, told.timing);
    assert_eq!(
        model::digest(&told.model),
        model::digest(&run(&super::scenario(&[IID]), 1, arithmetic()).model)
    );
}

#[test]
fn slow_devices_are_late_or_surplus_and_the_plan_says_so_before() {
    let slow = [IID, "devices.step_milliseconds={choice=[1,100000]}", "cohort.deadline_seconds=60"];
    let told = run_on_any(&scenario(&slow));
    let late = count(&told, |part| *part == Participation::Late);
    assert!(late > 0 && count(&told, is_accepted) + late == 3 * 6, "{:?}", told.rounds);
    assert!(told.timing.ended_by_deadline > 0.3 && told.timing.idle_share > 0.3, "{}", told.timing);
    let scenario = scenario(&slow);
    let plan = Plan::of(&scenario, &scenario.federation().unwrap()).unwrap();
    assert!(plan.warnings[0].contains("of 12 clients take longer for a round than"), "{plan}");
    assert_eq!(plan.timing, told.timing);

    let over = super::scenario(&[&slow[..], &["cohort.size=3", "cohort.over_selection=3.0"]].concat());
    let told = run_on_any(&over);
    assert!(count(&told, |part| *part == Participation::Surplus) > 0);
    assert_eq!(told.timing.ended_by_deadline, 0.0, "{}", told.timing);
}

#[test]
fn clients_that_come_and_go_drop_out_and_take_part_again() {
    let set = [
        "rounds=12",
        "cohort.reconnect_seconds=20",
        "devices.step_milliseconds={uniform={from=1000,to=9000}}",
        "devices.upload_megabits_per_second={lognormal={median=0.1,sigma=1.0}}",
        "devices.latency_milliseconds=300",
        "devices.availability.online_seconds=90",
        "devices.availability.offline_seconds=40",
    ];
    let told = run_on_any(&scenario(&set));
    assert_eq!((&told.state, told.published), (&RunState::Finished, 12));
    let members: BTreeMap<_, Vec<&Participation>> = told.rounds.iter().flat_map(|round| &round.cohort).fold(
        BTreeMap::new(),
        |mut all, (client, part)| {
            all.entry(client).or_insert_with(Vec::new).push(part);
            all
        },
    );
    let both = |parts: &&Vec<&Participation>| {
        parts.iter().any(|part| is_accepted(part)) && parts.contains(&&Participation::Disconnected)
    };
    assert!(members.values().filter(both).count() > 2, "{members:?}");
    assert!(told.rounds.iter().any(|round| round.eligible < 12));
    // Whoever is back within the grace goes on: without a grace more are lost.
    let lost = |told: &Told| count(told, |part| *part == Participation::Disconnected);
    let strict = scenario(&[&set[..], &["cohort.reconnect_seconds=0"]].concat());
    let strict = run_on_any(&strict);
    assert!(lost(&strict) * told.rounds.len() > lost(&told) * strict.rounds.len());
    // What a round accepted gives the same model without any of it.
    let imposed = Some(accepted(&told));
    let replayed = run_with(&scenario(&["rounds=12"]), Settings { imposed, ..settings(2, arithmetic()) });
    assert_eq!(model::digest(&replayed.unwrap().model), model::digest(&told.model));
}

#[test]
fn nobody_waits_for_ever_for_clients_that_do_not_come() {
    let away = ["devices.availability.online_seconds=1", "devices.availability.offline_seconds=900000"];
    let told = run(&scenario(&[&away[..], &["cohort.minimum=6"]].concat()), 1, arithmetic());
    assert_eq!((&told.state, told.deserted, told.published), (&RunState::Stopped, true, 0));
}

#[test]
fn a_trace_says_who_is_there_when_and_bad_ones_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scenario.toml");
    std::fs::write(&path, format!("{SCENARIO}[devices]\ntrace = 'devices.csv'\n")).unwrap();
    let header = "client,step_milliseconds,download_megabits_per_second,upload_megabits_per_second,\
                  latency_milliseconds,online_from_seconds,online_until_seconds\n";
    let with = |rows: &str, set: &[&str]| {
        std::fs::write(folder.path().join("devices.csv"), format!("{header}{rows}")).unwrap();
        let set = set.iter().map(|assignment| (*assignment).to_owned()).collect();
        let scenario = Scenario::read(&path, &Overrides { set, ..Overrides::default() }).unwrap();
        scenario.federation().map(|_| scenario).map_err(|error| error.to_string())
    };
    let rows = "client-03,10,8,8,0,100,200\nclient-03,10,8,8,0,300,400\n*,10,8,8,5,,\n*,50,8,8,5,,\n";
    let told = run_on_any(&with(rows, &["cohort.size=12"]).unwrap());
    assert_eq!(told.rounds[0].eligible, 11, "client-03 is not there before 100 s");
    assert_eq!(told.state, RunState::Finished);
    for (rows, words) in [
        ("client-03,10,8,8,0,,\n", "client client-00 has no row"),
        ("nobody,10,8,8,0,,\n*,1,1,1,1,,\n", "client nobody is not in the population"),
        ("*,0,8,8,0,,\n", "line 2"),
        ("*,ten,8,8,0,,\n", "line 2"),
        ("client-03,1,8,8,0,5,4\n", "online_from_seconds"),
        ("client-03,1,8,8,0,1,9\nclient-03,1,8,8,0,5,20\n", "line 3: client-03 is online already"),
    ] {
        let error = with(rows, &[]).unwrap_err();
        assert!(error.contains(words) && error.contains("devices.csv") && !error.contains('\n'), "{error}");
    }
}

#[test]
fn bad_tables_are_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scenario.toml");
    for (table, words) in [
        ("[devices]\nstep_millisecond = 1", "did you mean `devices.step_milliseconds`"),
        ("[devices]\nstep_milliseconds = 0", "[devices] step_milliseconds: 0 is not possible"),
        ("[devices]\nlatency_milliseconds = -1", "[devices] latency_milliseconds: -1"),
        ("[devices]\nstep_milliseconds = {normal = 3}", "is not a figure"),
        ("[devices.availability]\nonline_seconds = 3", "offline_seconds"),
        ("[devices]\ntrace = 'x.csv'\nstep_milliseconds = 3", "remove step_milliseconds, or the trace"),
        ("[faults]\ndropout_probabilty = 0.1", "did you mean `faults.dropout_probability`"),
        ("[faults]\ncrash_probability = 0.1", "crash_probability needs rejoin_seconds"),
        ("[faults]\nstraggler_fraction = 0.5\nstragglers = 'partial'", "local_epochs = 1 must be at least 2"),
        ("[faults]\nstraggler_fraction = 0.5\nstragglers = 'wait'", "unknown variant"),
    ] {
        std::fs::write(&path, format!("{SCENARIO}{table}\n")).unwrap();
        let error = Scenario::read(&path, &Overrides::default()).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("scenario.toml") && !error.contains('\n'), "{error}");
    }
    let set =
        ["devices.step_milliseconds={lognormal={median=20,sigma=0.5}}", "faults.dropout_probability=0.1"];
    let resolved: toml::Table = scenario(&set).to_toml().unwrap().parse().unwrap();
    assert_eq!(resolved["devices"]["step_milliseconds"]["lognormal"]["median"].as_float(), Some(20.0));
    assert_eq!(resolved["faults"]["dropout_probability"].as_float(), Some(0.1));
}

#[test]
fn every_fault_alone_and_all_together_is_told_and_decides_no_bit() {
    type Holds = fn(&Participation) -> bool;
    let lost: Holds = |part| *part == Participation::Disconnected;
    let faults: [(&[&str], Holds); 6] = [
        (&["faults.dropout_before_training=0.3"], lost),
        (&["faults.dropout_after_training=0.3"], lost),
        (
            &["faults.slow_probability=0.3", "faults.slow_factor=1000", "devices.step_milliseconds=1000"],
            |part| *part == Participation::Late,
        ),
        (&["faults.crash_probability=0.4", "faults.rejoin_seconds=600"], lost),
        (&["faults.corrupt_upload_probability=0.3"], |part| matches!(part, Participation::Refused { .. })),
        (&["faults.duplicate_upload_probability=0.9"], is_accepted),
    ];
    let base = ["rounds=6", "cohort.minimum=2"];
    let plain = scenario(&base);
    for (set, holds) in &faults {
        let told = run_on_any(&scenario(&[&base[..], set].concat()));
        assert_eq!(told.state, RunState::Finished, "{set:?}");
        assert!(count(&told, holds) > 1, "{set:?}: {:?}", told.rounds);
        let imposed = Some(accepted(&told));
        let replayed = run_with(&plain, Settings { imposed, ..settings(2, arithmetic()) }).unwrap();
        assert_eq!(model::digest(&replayed.model), model::digest(&told.model), "{set:?}");
    }
    let twice = run(&scenario(&[&base[..], faults[5].0].concat()), 2, arithmetic());
    assert_same(&twice, &run(&plain, 2, arithmetic()));

    let all: Vec<&str> = faults.iter().flat_map(|(set, _)| set.iter().copied()).collect();
    let rest = ["train.local_epochs=4", "faults.straggler_fraction=0.5", "faults.stragglers=partial"];
    let gone = ["devices.availability.online_seconds=5000", "devices.availability.offline_seconds=500"];
    let few = ["cohort.minimum=1", "cohort.attempts=20"];
    let told = run_on_any(&scenario(&[&base[..], &all, &rest, &gone, &few].concat()));
    assert_eq!((&told.state, told.published), (&RunState::Finished, 6));
    assert!(parts(&told).map(std::mem::discriminant).collect::<std::collections::HashSet<_>>().len() >= 4);
    let nobody = run_on_any(&scenario(&["faults.dropout_probability=1.0", "cohort.attempts=3"]));
    assert!(matches!(nobody.state, RunState::Failed { .. }) && nobody.rounds.len() == 3);
}

#[test]
fn a_crashed_client_that_is_back_in_time_does_its_work_again() {
    let set = ["cohort.minimum=6", "faults.crash_probability=1.0", "faults.rejoin_seconds=2"];
    let steps = ["devices.step_milliseconds=500", "cohort.reconnect_seconds=10", IID];
    let told = run_on_any(&scenario(&[&set[..], &steps].concat()));
    assert_eq!((&told.state, count(&told, is_accepted)), (&RunState::Finished, 18));
    // Two seconds away, three steps of half a second done anew, and what was lost of them.
    let spans = told.rounds.iter().map(|round| round.ended.0 - round.started.0);
    assert!(spans.clone().all(|span| (3500..=5000).contains(&span)), "{:?}", spans.collect::<Vec<_>>());
    let plain = run(&scenario(&[IID]), 1, arithmetic());
    assert_eq!(model::digest(&told.model), model::digest(&plain.model));
}

#[test]
fn stragglers_send_partial_work_or_never_answer() {
    let base = ["train.local_epochs=5", "cohort.size=10", IID, "faults.straggler_fraction=0.5"];
    let all = run(&scenario(&base[..3]), 2, arithmetic());
    let partial = scenario(&[&base[..], &["faults.stragglers=partial"]].concat());
    let told = run_on_any(&partial);
    assert_eq!(count(&told, is_accepted), 30);
    assert_ne!(model::digest(&told.model), model::digest(&all.model), "their work is not whole");
    assert!(told.timing.idle_share > 0.1, "stragglers stop early and wait: {}", told.timing);

    let dropped = run_on_any(&scenario(&[&base[..], &["faults.stragglers=drop"]].concat()));
    for round in &dropped.rounds {
        let late = round.cohort.values().filter(|part| **part == Participation::Late).count();
        assert_eq!((late, round.accepted().count()), (5, 5));
    }
    assert_eq!((dropped.published, dropped.timing.ended_by_deadline), (3, 1.0));
    let chosen = |round: usize| -> BTreeSet<_> { dropped.rounds[round].accepted().collect() };
    assert!(chosen(0) != chosen(1) || chosen(1) != chosen(2), "each round has stragglers of its own");
}

#[test]
fn libtorch_gives_the_same_bits_with_faults_on_any_number_of_workers() {
    let set = [
        "model.architecture=small-cnn",
        "rounds=2",
        "train.local_epochs=3",
        "faults.straggler_fraction=0.4",
        "faults.stragglers=partial",
        "faults.dropout_probability=0.2",
        "devices.step_milliseconds={lognormal={median=20,sigma=0.5}}",
    ];
    let scenario = scenario(&set);
    assert_same(&run(&scenario, 1, torch()), &run(&scenario, 3, torch()));
}
