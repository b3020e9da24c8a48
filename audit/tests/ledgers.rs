//! The commands that read ledgers, as a privacy officer meets them.
#![allow(clippy::unwrap_used)] // a test

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use tributary_common::digest::Digest;
use tributary_common::ids::RunId;
use tributary_common::ledger::account::{JobRequest, Promise};
use tributary_common::ledger::book::{Dataset, NodeBook, RunBook};
use tributary_common::ledger::head::{LedgerKey, View};
use tributary_common::ledger::record::{AccountId, Claim, CoordinatorId, JobKey, Participant, Release};
use tributary_common::ledger::run::RunOpening;
use tributary_common::privacy::accounting::{self, Accountant};
use tributary_common::privacy::distributed::{Level, Plan, Requirements, Scale, guarantees};
use tributary_common::privacy::{Event, Unit};
use tributary_common::time::Time;

const NOW: Time = Time(1_795_562_055_000);

fn run() -> JobKey {
    JobKey { coordinator: CoordinatorId::of(b"authority"), run: RunId(0xabc) }
}

fn promise() -> Promise {
    let all = [Event::gaussian(0.05, 1.6, 30)];
    let guarantee = accounting::epsilon(&all, 1e-5, Unit::Example, Accountant::Best).unwrap();
    let events = vec![Event::gaussian(0.05, 1.6, 10)];
    Promise { unit: Unit::Example, mechanism: "dp-sgd".into(), events, claim: Claim::from(&guarantee) }
}

/// The promise of three rounds with noise in shares.
fn in_shares() -> Promise {
    let plan = Plan::new(&Requirements {
        level: Level::Example { batch_norm: 8.0 },
        noise_multiplier: 1.6,
        clip_norm: 1.0,
        dimension: 300,
        fewest_survivors: 4,
        colluders: 1,
        most_clients: 6,
        scale: Scale::Inflation(0.01),
    })
    .unwrap();
    let (all, unit) = ([plan.event(0.05, 3)], Unit::Example);
    let guarantee = accounting::epsilon(&all, 1e-5, unit, Accountant::Best).unwrap();
    let events = vec![plan.event(0.05, 1)];
    Promise { unit, mechanism: "distributed".into(), events, claim: Claim::from(&guarantee) }
}

fn payload(round: u32) -> Digest {
    Digest::of(&round.to_be_bytes())
}

/// A node that worked for two rounds of three.
fn node(name: &str, seed: u8) -> (NodeBook, AccountId) {
    node_with(name, seed, promise())
}

fn node_with(name: &str, seed: u8, promise: Promise) -> (NodeBook, AccountId) {
    let mut book =
        NodeBook::in_memory(&name.parse().unwrap(), LedgerKey::from_seed([seed; 32]), NOW).unwrap();
    let dataset = Dataset {
        name: "heart".parse().unwrap(),
        unit: Unit::Example,
        delta: 1e-5,
        cap_epsilon: Some(3.0),
        order: None,
        data: b"data",
        source: b"source",
        overlaps: Vec::new(),
        disjoint_from: Vec::new(),
    };
    let account = book.open_account(&dataset, NOW).unwrap();
    let request = JobRequest { key: run(), job: Digest::of(b"job"), rounds: 3, promise: Some(promise) };
    book.reserve_job(account, request, None, NOW).unwrap();
    for round in 1..=2 {
        book.charge_round(run(), round, None, NOW + 3_600_000 * u64::from(round)).unwrap();
        book.seal_payload(run(), round, Release::Update, payload(round), 9, NOW).unwrap();
    }
    book.return_rounds(run(), NOW + 86_400_000).unwrap();
    (book, account)
}

fn coordinator() -> RunBook {
    coordinator_with(promise())
}

fn coordinator_with(promise: Promise) -> RunBook {
    let key = LedgerKey::from_seed([9; 32]);
    let mut book = RunBook::in_memory(&"coordinator".parse().unwrap(), key, NOW).unwrap();
    let Promise { unit, mechanism, events, claim } = promise;
    let opening = RunOpening {
        key: run(),
        job: Digest::of(b"job"),
        unit: Some(unit),
        mechanism,
        rounds: 3,
        events,
        claim: Some(claim),
    };
    book.open_run(opening, NOW).unwrap();
    book
}

fn sent(node: &str, payload: Digest) -> Vec<Participant> {
    vec![Participant { node: node.parse().unwrap(), payload: Some(payload) }]
}

fn audit(dir: &Path, arguments: &str) -> (i32, String) {
    let program = env!("CARGO_BIN_EXE_tributary-audit");
    let Output { status, stdout, stderr } =
        Command::new(program).args(arguments.split_whitespace()).current_dir(dir).output().unwrap();
    let text = String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap();
    (status.code().unwrap(), text)
}

#[test]
fn verify_says_what_is_wrong_and_ends_accordingly() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (mut book, account) = node("st-mary", 1);
    let export = book.export().unwrap();
    fs::write(at("node.jsonl"), &export).unwrap();
    let key = LedgerKey::from_seed([1; 32]).public();
    let (code, text) = audit(dir.path(), &format!("verify node.jsonl --key {key}"));
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("8 records, nothing to object to"), "{text}");
    let other = LedgerKey::from_seed([2; 32]).public();
    assert_eq!(audit(dir.path(), &format!("verify node.jsonl --key {other}")).0, 1);

    fs::write(at("changed.jsonl"), export.replace("\"round\":2,", "\"round\":3,")).unwrap();
    let (code, text) = audit(dir.path(), "verify node.jsonl changed.jsonl");
    assert_eq!(code, 1);
    assert!(text.contains("FINDING  record 5 (line 7): the record has the hash"), "{text}");
    let (_, json) = audit(dir.path(), "verify changed.jsonl --format json");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((json["sound"].as_bool(), json["remarks"][0]["record"].as_u64()), (Some(false), Some(5)));

    // A backup that is put back, against a later head, as an export or as a bare line.
    book.change_dataset(account, b"new data", b"source", &[], NOW).unwrap();
    fs::write(at("later.jsonl"), book.export().unwrap()).unwrap();
    let head = serde_json::to_string(&book.head(View::Whole)).unwrap();
    fs::write(at("head.json"), format!("{head}\n")).unwrap();
    for witness in ["later.jsonl", "head.json"] {
        let (code, text) = audit(dir.path(), &format!("verify node.jsonl --witness {witness}"));
        assert_eq!(code, 1, "{text}");
        assert!(text.contains("restored from an older copy"), "{text}");
    }
    // Pitfall 12: without a witness an older copy looks whole; the help says so.
    assert_eq!(audit(dir.path(), "verify node.jsonl").0, 0);
    for command in ["verify", "report", "compare"] {
        let (_, help) = audit(dir.path(), &format!("{command} --help"));
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for limit in ["noise was really added", "no head covers", "older copy put back whole"] {
            assert!(help.contains(limit), "{command}: {help}");
        }
    }
    for bad in ["verify", "verify missing.jsonl", "verify node.jsonl --key abc", "report node.jsonl"] {
        let (code, text) = audit(dir.path(), bad);
        assert_eq!(code, 2, "{bad}: {text}");
    }
}

/// Corrections 10 and 11: the node may hold more than the coordinator, never less; and digests must be equal.
#[test]
fn compare_finds_what_the_coordinator_has_beyond_the_node() {
    let dir = tempfile::tempdir().unwrap();
    let (mut node, _) = node("st-mary", 1);
    let compared = |node: &NodeBook, coordinator: &RunBook| {
        fs::write(dir.path().join("node.jsonl"), node.export().unwrap()).unwrap();
        fs::write(dir.path().join("run.jsonl"), coordinator.export().unwrap()).unwrap();
        audit(dir.path(), "compare node.jsonl run.jsonl")
    };
    let model = Digest::of(b"model");
    let mut run_book = coordinator();
    run_book.abandon_round(1, 1, sent("st-mary", payload(1)), NOW).unwrap();
    run_book.publish_round(1, 2, model, sent("st-mary", payload(1)), NOW).unwrap();
    let (code, text) = compared(&node, &run_book);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("2 payloads agree"), "{text}");
    assert!(text.contains("charged 1 rounds of which the coordinator recorded nothing"), "{text}");

    let mut other = coordinator();
    other.publish_round(1, 1, model, sent("st-mary", payload(7)), NOW).unwrap();
    other.publish_round(2, 1, model, sent("st-mary", payload(2)), NOW).unwrap();
    other.publish_round(3, 1, model, sent("st-mary", payload(3)), NOW).unwrap();
    let (code, text) = compared(&node, &other);
    assert_eq!(code, 1);
    assert!(text.contains("record 2 of the coordinator: an update of round 1 arrived as"), "{text}");
    assert!(text.contains("update of round 3 arrived, and the node charged nothing for it"), "{text}");

    // Heads that were exchanged hold both sides: the coordinator shows another history than the one that it signed.
    node.witness(run().coordinator, run_book.head(View::Whole), NOW).unwrap();
    let (code, text) = compared(&node, &run_book);
    assert_eq!(code, 0, "{text}");
    let mut shorter = coordinator();
    shorter.publish_round(1, 1, model, sent("st-mary", payload(1)), NOW).unwrap();
    assert_eq!(compared(&node, &shorter).0, 0, "a head of another ledger says nothing");
    let text = run_book.export().unwrap();
    let last = text.lines().nth(3).unwrap();
    fs::write(dir.path().join("run.jsonl"), text.replace(&format!("{last}\n"), "")).unwrap();
    let (code, text) = audit(dir.path(), "compare node.jsonl run.jsonl");
    assert_eq!(code, 1);
    assert!(text.contains("the coordinator's ledger: "), "{text}");
    let (code, text) = audit(dir.path(), "compare run.jsonl node.jsonl");
    assert_eq!(code, 2, "{text}");
}

/// Correction 18: verify, report and compare tell both figures of noise in shares.
#[test]
fn noise_in_shares_is_reported_with_both_figures() {
    let dir = tempfile::tempdir().unwrap();
    let (node, _) = node_with("st-mary", 1, in_shares());
    let mut run_book = coordinator_with(in_shares());
    run_book.publish_round(1, 1, Digest::of(b"model"), sent("st-mary", payload(1)), NOW).unwrap();
    fs::write(dir.path().join("node.jsonl"), node.export().unwrap()).unwrap();
    fs::write(dir.path().join("run.jsonl"), run_book.export().unwrap()).unwrap();
    let all = [in_shares().events[0].times(3)];
    let (planned, alone) = guarantees(&all, 1e-5, Unit::Example).unwrap();
    let (planned, alone) = (planned.epsilon, alone.epsilon);
    assert!(alone > 1.5 * planned);

    let (code, text) = audit(dir.path(), "verify node.jsonl run.jsonl");
    assert_eq!(code, 0, "{text}");
    let told =
        format!("epsilon {planned:.4} is claimed at delta 0.00001 with at most 1 of 4 survivors dishonest");
    assert_eq!(text.matches(&told).count(), 2, "{text}");
    assert_eq!(text.matches(&format!("own noise gives epsilon {alone:.4}")).count(), 2, "{text}");

    let (code, text) = audit(dir.path(), "compare node.jsonl run.jsonl");
    assert_eq!(code, 0, "{text}");
    assert!(text.contains(&format!("survivors dishonest; {alone:.4} if all others are")), "{text}");

    assert_eq!(audit(dir.path(), "report node.jsonl run.jsonl --out out").0, 0);
    let read = |name: &str| fs::read_to_string(dir.path().join("out").join(name)).unwrap();
    let page = read("report.html");
    let claim =
        format!("epsilon {planned:.3} at delta 1e-5 with at most 1 of 4 survivors dishonest; {alone:.3} if");
    assert_eq!(page.matches(&claim).count(), 2, "{page}");
    assert!(page.contains("Skellam noise of ") && page.contains("512 coordinates"));
    let json: serde_json::Value = serde_json::from_str(&read("report.json")).unwrap();
    let told = &json["accounts"][0]["jobs"][0]["epsilon_if_all_others_are_dishonest"];
    assert!((told.as_f64().unwrap() - alone).abs() < 1e-9);

    // Other shares are other parameters, however alike the noise that counts.
    let mut other = in_shares();
    other.events[0] = other.events[0].alone();
    fs::write(dir.path().join("run.jsonl"), coordinator_with(other).export().unwrap()).unwrap();
    let (code, text) = audit(dir.path(), "compare node.jsonl run.jsonl");
    assert!(code == 1 && text.contains("different parameters"), "{text}");
}

/// Pitfall 14: an epsilon never stands without unit, neighbours, delta, sampling and accountant; corrections 12 and 16.
#[test]
fn the_report_says_what_was_promised_and_spent() {
    let dir = tempfile::tempdir().unwrap();
    let (first, _) = node("st-mary", 1);
    let (mut second, account) = node("st-john", 2);
    let write = |name: &str, text: String| fs::write(dir.path().join(name), text).unwrap();
    write("a.jsonl", first.export().unwrap());
    write("b.jsonl", second.export().unwrap());
    write("run.jsonl", coordinator().export().unwrap());
    let read = |name: &str| fs::read_to_string(dir.path().join("out").join(name)).unwrap();
    let (code, text) = audit(dir.path(), "report a.jsonl b.jsonl run.jsonl --out out");
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("promised epsilon 3.000 at most"), "{text}");
    assert!(text.contains("the promises add up: epsilon 6.000 at delta 2e-5"), "{text}");
    let page = read("report.html");
    for part in [
        "heart at st-mary",
        "heart at st-john",
        "m times the epsilon",
        "with and without it",
        "Epsilon 3.000 at delta 1e-5, over all jobs together",
        "an odometer",
        "Rényi filter at order 7",
        "privacy loss distributions, grid",
        "Poisson samples at rate 0.05",
        "2026-11-25 23:00 UTC",
        "noise was really added",
    ] {
        assert!(page.contains(part), "{part:?} is not in the page");
    }
    assert_eq!(page.matches("<svg").count(), 2);
    assert!(
        !page.contains("http://")
            || page.matches("http://").count() == page.matches("http://www.w3.org").count()
    );
    assert!(!page.contains("<script") && !page.contains("src="));
    let json: serde_json::Value = serde_json::from_str(&read("report.json")).unwrap();
    assert_eq!(json["epsilon_of_a_person_in_all_data_sets_at_most"], 6.0);
    assert_eq!(json["accounts"][0]["jobs"][0]["rounds_charged"], 2);
    assert_eq!(json["accounts"][0]["adjacency"], "add-or-remove-one");

    let key = JobKey { run: RunId(2), ..run() };
    let request = JobRequest { key, job: Digest::of(b"none"), rounds: 1, promise: None };
    second.reserve_job(account, request, Some("<b>board</b>"), NOW).unwrap();
    write("b.jsonl", second.export().unwrap());
    let (code, text) = audit(dir.path(), "report a.jsonl b.jsonl --out out");
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("promised epsilon ∞ at most"), "{text}");
    let page = read("report.html");
    assert!(page.contains("its epsilon is ∞") && page.contains("Nothing any more: epsilon ∞."));
    assert!(!page.contains("<b>board</b>"), "what an operator wrote is text");
    let json: serde_json::Value = serde_json::from_str(&read("report.json")).unwrap();
    assert_eq!(json["epsilon_of_a_person_in_one_data_set_at_most"], "infinite");
    let unbounded: Vec<_> =
        json["accounts"].as_array().unwrap().iter().map(|account| &account["unbounded_release"]).collect();
    assert_eq!(unbounded, [false, true]);
}
