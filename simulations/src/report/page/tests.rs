//! What a report shows, and that nothing in a name or a reason can break out of it.

use tributary_common::digest::Digest;
use tributary_common::progress::Line;
use tributary_common::record::{Abandonment, Participation, Reason, RoundOutcome, RoundRecord, RunEvent};
use tributary_common::time::Time;

use super::*;
use crate::population::LabelCounts;

fn job(classes: usize) -> Job {
    Job::parse(&format!(
        "name = 'j'\nseed = 1\nrounds = 2\n[model]\narchitecture = 'logistic'\ninputs = [2]\nclasses = {classes}\n\
         [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_epochs = 2\nbatch_size = 10\n\
         [cohort]\nsize = 2\n"
    ))
    .unwrap()
}

fn spread(clients: usize, classes: usize) -> Spread {
    let counts = |at: usize| LabelCounts { client: format!("c{at}"), examples: 4, counts: vec![4; classes] };
    Spread {
        clients,
        examples: Quantiles::of(vec![4; clients]),
        labels: Quantiles::of(vec![2; clients]),
        label_skew: 0.25,
        shown: (0..clients.min(SHOWN)).map(counts).collect(),
    }
}

fn metrics(correct: u64, classes: usize) -> Metrics {
    let mut confusion = vec![Some(0); classes * classes];
    confusion[0] = Some(correct);
    confusion[1] = None;
    Metrics { examples: 10, loss_sum: 5.0, correct, confusion }
}

fn page(classes: usize, clients: usize, refusal: &str) -> String {
    let job = job(classes);
    let part = Participation::Refused { detail: refusal.to_owned() };
    let declined = Participation::Declined { reason: Reason::Training };
    let round = RoundRecord {
        round: 1,
        attempt: 1,
        started: Time(0),
        ended: Time(1),
        eligible: 2,
        cohort: [("c0", part), ("c1", declined)]
            .into_iter()
            .map(|(name, p)| (name.parse().unwrap(), p))
            .collect(),
        bytes_down: 8,
        bytes_up: 4,
        outcome: RoundOutcome::Abandoned { reason: Abandonment::BelowMinimum { accepted: 0, minimum: 2 } },
        spent: false,
        summed: None,
    };
    let by_client = [("c0", 6), ("c1", 8)];
    let evaluation = EvaluationRecord {
        round: 2,
        held_out: Some(metrics(7, classes)),
        by_client: by_client
            .into_iter()
            .map(|(name, n)| (name.parse().unwrap(), metrics(n, classes)))
            .collect(),
    };
    let machine = Machine {
        processor: "A & B".into(),
        instruction_sets: "AVX2".into(),
        trainer: "none".into(),
        workers: 3,
        has_secret_noise: true,
    };
    let mut history = History::default();
    history.take(&RunEvent::RoundEnded { record: round });
    history.take(&RunEvent::Evaluated { record: evaluation });
    render(&RunReport {
        job: &job,
        scenario_toml: "x = 1",
        warning: Some("The run was stopped.".into()),
        rows: &[],
        crossing: Some(Crossing::of(&[], 0.97)),
        history: &history,
        timing: &Timing { total_milliseconds: 450_000, idle_share: 0.25, ..Timing::default() },
        spread: &spread(clients, classes),
        digest: Digest::of(b"m").to_string(),
        seconds: 1.0,
        machine: &machine,
    })
    .unwrap()
}

#[test]
fn a_page_shows_what_was_measured() {
    let html = page(2, 3, "not finite");
    for part in [
        "The run was stopped.",
        "<dd>0.7000</dd>",
        "mean of 2 clients",
        "pooled",
        "hidden",
        "clients&#39; own test examples together",
        "round 1, attempt 1: 0 of at least 2 updates arrived (c0 refused: not finite, c1 declined (training failed))",
        "A &#38; B",
        "<dt>whole run</dt><dd>7 min 30 s</dd>",
        "<dd>25.0 %</dd>",
        "label skew 0.25",
        "<dt>target</dt><dd>97 % not reached in 0 rounds</dd>",
        "Training examples of each client by label",
        "beside the largest client&#39;s 4.",
    ] {
        assert!(html.contains(part), "{part}\n{html}");
    }
    assert_eq!(html.matches("fill-opacity=\"1.00\"").count(), 3 * 2, "three clients, two labels");
    assert_eq!(
        html.matches("fill=\"currentColor\" fill-opacity=\"0.35\"").count(),
        3,
        "a bar for each client's size"
    );
    assert!(!html.contains("<script"));
}

#[test]
fn texts_from_outside_are_escaped_and_large_tables_bounded() {
    let html = page(2, 3, "<script>alert(1)</script>");
    assert!(!html.contains("<script") && html.contains("&#60;script&#62;"));
    let html = page(200, 5000, "x");
    assert!(html.contains("100 of 5000 clients, evenly spaced from the largest to the smallest"));
    assert!(!html.contains("Confusion of the final model"));
    assert!(html.len() < 4_000_000, "{}", html.len());
}

#[test]
fn a_comparison_names_what_differs() {
    let row = |round, accuracy| {
        let line = Line::Round {
            round,
            accuracy,
            loss: accuracy.map(|a: f64| 1.0 - a),
            epsilon: None,
            bytes_up: 1,
            bytes_down: 2,
            completed: 2,
            dropped: 0,
            seconds: 0.5,
            out: Vec::new(),
            of: 2,
        };
        Row::of(&line).unwrap()
    };
    let run = |name: &str, classes, accuracy| Loaded {
        name: name.into(),
        job: job(classes),
        rows: vec![row(1, None), row(2, Some(accuracy))],
        digest: Some(Digest::of(name.as_bytes())),
    };
    let html = compare(&[run("one", 2, 0.5), run("two", 3, 0.75)]).unwrap();
    assert!(html.contains("<code>model.classes</code></td><td>2</td><td>3</td>"), "{html}");
    assert!(!html.contains("<code>seed</code>"));
    assert!(html.contains("0.7500") && html.contains(&Digest::of(b"two").short()));
    assert!(compare(&[run("one", 2, 0.5), run("same", 2, 0.5)]).unwrap().contains("the jobs are equal"));
}
