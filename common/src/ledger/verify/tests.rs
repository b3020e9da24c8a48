//! Every way to tamper with a ledger is found, and most findings name the record; a correct ledger has none.

use super::*;
use crate::digest::Digest;
use crate::ids::RunId;
use crate::ledger::account::{JobRequest, Promise};
use crate::ledger::book::{Dataset, NodeBook, RunBook};
use crate::ledger::head::{Head, LedgerKey};
use crate::ledger::record::{AccountId, Hour, JobKey, LostCharge, Participant, Release};
use crate::ledger::run::RunOpening;
use crate::privacy::accounting::{Accountant, Guarantee, rdp};
use crate::privacy::distributed::{Level, Plan, Requirements, Scale};
use crate::time::Time;

const NOW: Time = Time(1_795_562_055_000);

fn key() -> LedgerKey {
    LedgerKey::from_seed([7; 32])
}

fn run(number: u64) -> JobKey {
    JobKey { coordinator: CoordinatorId(Hex([1; 32])), run: RunId(number) }
}

fn events() -> Vec<Event> {
    vec![Event::gaussian(0.05, 1.6, 10)]
}

/// What a node claims: the smaller of the two accountants' figures for three rounds.
fn guarantee() -> Guarantee {
    accounting::epsilon(&[Event::gaussian(0.05, 1.6, 30)], 1e-5, Unit::Example, Accountant::Best).unwrap()
}

fn claimed(epsilon: f64) -> Promise {
    let claim = Claim { epsilon, ..Claim::from(&guarantee()) };
    Promise { unit: Unit::Example, mechanism: "dp-sgd".into(), events: events(), claim }
}

fn request(number: u64, promise: Option<Promise>) -> JobRequest {
    JobRequest { key: run(number), job: Digest::of(b"job"), rounds: 3, promise }
}

fn node() -> (NodeBook, AccountId) {
    let mut book = NodeBook::in_memory(&"st-mary".parse().unwrap(), key(), NOW).unwrap();
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
    (book, account)
}

fn worked() -> (NodeBook, AccountId) {
    let (mut book, account) = node();
    book.reserve_job(account, request(1, Some(claimed(guarantee().epsilon))), None, NOW).unwrap();
    for round in 1..=2 {
        book.charge_round(run(1), round, None, NOW).unwrap();
        let payload = Digest::of(&[round as u8]);
        book.seal_payload(run(1), round, Release::Update, payload, 9, NOW).unwrap();
    }
    book.return_rounds(run(1), NOW).unwrap();
    (book, account)
}

fn check(text: &str) -> Verified {
    verify(text.as_bytes(), &Knowledge::default())
}

/// The findings as text, one a line.
fn told(verified: &Verified) -> String {
    verified.findings().map(|remark| format!("{remark}\n")).collect()
}

/// A ledger of these bodies after its opening, signed, as a forger with the key could write it.
fn forged(bodies: Vec<Body>) -> String {
    let (book, _) = node();
    let text = book.export().unwrap();
    let mut records: Vec<Record> = text.lines().filter_map(|line| Record::parse(line).ok()).take(1).collect();
    for body in bodies {
        records.push(Record::seal(records.last(), Hour(1), Hex([0; 16]), body).unwrap());
    }
    signed(&records)
}

fn signed(records: &[Record]) -> String {
    let leaves: Vec<_> = records.iter().map(|record| merkle::leaf(&record.hash().0)).collect();
    let Body::LedgerOpened { ledger, .. } = records[0].body() else { panic!() };
    let head =
        Head { ledger: *ledger, view: View::Whole, size: leaves.len() as u64, root: merkle::root(&leaves) };
    let lines: Vec<_> = records.iter().map(Record::line).collect();
    format!("{HEADER}\n{}\n{}\n", lines.join("\n"), head_line(&key().sign(head)))
}

/// The bodies of [`worked`] after the opening.
fn bodies() -> Vec<Body> {
    let verified = check(&worked().0.export().unwrap());
    verified.records[1..].iter().map(|record| record.body().clone()).collect()
}

#[test]
fn a_correct_ledger_has_no_findings() {
    let (book, account) = worked();
    let verified = check(&book.export().unwrap());
    assert_eq!(told(&verified), "");
    assert!(verified.is_sound() && verified.remarks.is_empty());
    let Some(State::Node(ledger)) = &verified.state else { panic!() };
    assert_eq!(ledger.reading(account).unwrap(), book.reading(account).unwrap());
    let told_key = Knowledge { key: Some(key().public()), ..Knowledge::default() };
    assert!(verify(book.export().unwrap().as_bytes(), &told_key).is_sound());
    let other = Knowledge { key: Some(LedgerKey::from_seed([8; 32]).public()), ..Knowledge::default() };
    assert!(told(&verify(book.export().unwrap().as_bytes(), &other)).contains("rewritten"));
    assert_eq!(told(&check(&forged(bodies()))), "");
}

/// One changed bit at every byte of the export: each is found, and within a record it is found by name.
#[test]
fn every_changed_byte_is_found() {
    let text = worked().0.export().unwrap();
    let bytes = text.as_bytes();
    let mut starts = vec![0];
    starts.extend(bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1));
    let records = starts.len() - 3;
    let mut named = 0;
    // The one bracket is computed once.
    let mut brackets = Brackets::default();
    let mut verify = |bytes: &[u8]| {
        let auditor = Auditor { remarks: Vec::new(), brackets: std::mem::take(&mut brackets) };
        let (verified, known) = auditor.read(bytes, &Knowledge::default());
        brackets = known;
        verified
    };
    for at in 0..bytes.len() {
        for bit in [0, 5] {
            let mut changed = bytes.to_vec();
            changed[at] ^= 1 << bit;
            let verified = verify(&changed);
            assert!(!verified.is_sound(), "byte {at} bit {bit}");
            let line = starts.iter().rposition(|start| *start <= at).unwrap();
            let sequence = line.checked_sub(1).filter(|sequence| *sequence < records);
            let names = |remark: &Remark| remark.sequence == sequence.map(|sequence| sequence as u64);
            named += usize::from(sequence.is_some() && verified.findings().any(names));
        }
    }
    let within = starts[records + 1] - starts[1];
    assert!(named >= 2 * (within - records), "{named} of {}", 2 * within);
    for cut in 0..bytes.len() {
        assert!(!verify(&bytes[..cut]).is_sound(), "cut at {cut}");
    }
}

#[test]
fn removed_reordered_repeated_and_exchanged_records_are_named() {
    let text = worked().0.export().unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let joined = |lines: &[&str]| check(&format!("{}\n", lines.join("\n")));
    let count = lines.len() - 2;

    for gone in 1..count {
        let mut left = lines.clone();
        left.remove(gone + 1);
        let told = told(&joined(&left));
        let expected = format!("records {gone} to {gone} are missing");
        // What is cut at the end is seen by the head alone.
        assert!(
            told.contains(if gone == count - 1 { "the head covers" } else { &expected }),
            "{gone}: {told}"
        );
    }
    let mut left = lines.clone();
    left.drain(3..6);
    assert!(told(&joined(&left)).contains("record 2 (line 4): records 2 to 4 are missing"));

    let mut swapped = lines.clone();
    swapped.swap(3, 5);
    let told_of = told(&joined(&swapped));
    assert!(told_of.contains("record 2 (line 6): the record stands in another place"), "{told_of}");

    let mut twice = lines.clone();
    twice.insert(6, lines[3]);
    let told_of = told(&joined(&twice));
    assert_eq!(told_of, "record 2 (line 7): the record is there a second time\n");

    // A record of another ledger's, whole in itself, in the same place.
    let other = worked().0.export().unwrap();
    let mut exchanged = lines.clone();
    exchanged[4] = other.lines().nth(4).unwrap();
    let told_of = told(&joined(&exchanged));
    assert!(told_of.contains("record 3 (line 5): the record was not written after"), "{told_of}");

    let first_gone: Vec<&str> = [&lines[..1], &lines[2..]].concat();
    assert!(told(&joined(&first_gone)).contains("no record says whose ledger"));
    assert!(told(&check("")).contains("not the export"));
    assert!(told(&check(&format!("{HEADER}\n"))).contains("no record"));
}

#[test]
fn heads_that_are_missing_forged_or_over_other_records_are_found() {
    let (book, _) = worked();
    let text = book.export().unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let bare = format!("{}\n", lines[..lines.len() - 1].join("\n"));
    assert!(told(&check(&bare)).contains("no signed head covers the records from 0"));
    let head = book.head(View::Whole);
    let with = |head: &SignedHead| told(&check(&format!("{bare}{}\n", head_line(head))));
    assert_eq!(with(&head), "");
    let other_key = LedgerKey::from_seed([8; 32]).sign(head.head);
    assert!(with(&other_key).contains("forged or damaged"));
    assert!(with(&SignedHead { signature: Hex([1; 64]), ..head }).contains("forged or damaged"));
    let other_root = key().sign(Head { root: Hex([1; 32]), ..head.head });
    assert!(with(&other_root).contains("the head covers 8 records that are not these"));
    // A head over the beginning is right, and the rest is not signed.
    let size = 5;
    let root = book.core().log().root_at(View::Whole, size).unwrap();
    let earlier = key().sign(Head { size, root, ..head.head });
    assert_eq!(
        with(&earlier),
        "record 5: no signed head covers the records from 5 on: anybody could have written them\n"
    );
}

/// Pitfall 12 and correction 14: what another party kept finds a ledger that was cut, rewritten or restored,
/// even one that its owner signed anew.
#[test]
fn witnesses_find_what_the_owner_could_sign_anew() {
    let (mut book, _) = worked();
    let (view, backup) = (View::Coordinator(run(1).coordinator), book.export().unwrap());
    let held = [book.head(View::Whole), book.head(view)];
    for head in held {
        let knows = Knowledge { key: None, witnesses: vec![head] };
        assert_eq!(told(&verify(backup.as_bytes(), &knows)), "");
        let mut records = check(&backup).records;
        records.pop();
        let shorter = told(&verify(signed(&records).as_bytes(), &knows));
        assert!(shorter.contains("cut or restored"), "{shorter}");
        let again = told(&verify(forged(bodies()).as_bytes(), &knows));
        assert_eq!(again, "", "a head of another ledger says nothing");
        let other =
            Body::DisjointDeclared { account: AccountId(Hex([1; 16])), other: AccountId(Hex([1; 16])) };
        let mut rewritten = check(&backup).records[..4].to_vec();
        for body in bodies().into_iter().skip(3).chain([other]) {
            rewritten.push(Record::seal(rewritten.last(), Hour(1), Hex([0; 16]), body).unwrap());
        }
        let rewritten = told(&verify(signed(&rewritten).as_bytes(), &knows));
        assert!(rewritten.contains("rewritten"), "{rewritten}");
        let forged = SignedHead { signature: Hex([0; 64]), ..head };
        let verified = verify(backup.as_bytes(), &Knowledge { key: None, witnesses: vec![forged] });
        assert!(verified.is_sound() && verified.remarks[0].problem == Problem::WitnessForged);
    }
    // A loss that is on record and accepted is a note.
    let later = SignedHead { ..key().sign(Head { size: 99, ..held[1].head }) };
    assert!(book.check_head(&later, NOW).is_err());
    assert!(check(&book.export().unwrap()).remarks.iter().any(|r| r.problem == Problem::LossOpen));
    book.accept_restore("the disk died", None, NOW).unwrap();
    let knows = Knowledge { key: None, witnesses: vec![later] };
    let verified = verify(book.export().unwrap().as_bytes(), &knows);
    assert_eq!(told(&verified), "");
    let problems: Vec<_> = verified.remarks.iter().map(|remark| remark.problem.to_string()).collect();
    assert!(problems.iter().any(|text| text.contains("the disk died")), "{problems:?}");
    assert!(problems.iter().any(|text| text.contains("were lost; the loss is on record")), "{problems:?}");
}

/// Correction 10: false below the lower bound, right up to exact Rényi accounting, careful above; and the
/// claim of the tighter accountant is never a finding.
#[test]
fn claims_are_bracketed() {
    let (pld, rdp) = (guarantee().epsilon, rdp::epsilon(&[Event::gaussian(0.05, 1.6, 30)], 1e-5).value);
    assert!(pld < rdp);
    for (epsilon, sound, careful) in [
        (pld * 0.98, false, false),
        (pld, true, false),
        (rdp, true, false),
        (rdp * 1.01, true, true),
        (0.0, false, false),
    ] {
        let (mut book, account) = node();
        book.reserve_job(account, request(1, Some(claimed(epsilon))), None, NOW).unwrap();
        let verified = check(&book.export().unwrap());
        assert_eq!(verified.is_sound(), sound, "{epsilon}: {}", told(&verified));
        assert_eq!(!verified.remarks.is_empty(), !sound || careful, "{epsilon}");
        if !sound {
            assert!(told(&verified).starts_with("record 2 (line 4): epsilon"), "{}", told(&verified));
        }
    }
}

/// What an owner with the key could write is still held to its own rules.
/// A plan for noise in shares, the events of one of its rounds, and what three rounds claim.
fn in_shares(level: Level) -> (Event, Promise) {
    let plan = Plan::new(&Requirements {
        level,
        noise_multiplier: 9.0,
        clip_norm: 1.0,
        dimension: 300,
        fewest_survivors: 4,
        colluders: 1,
        most_clients: 6,
        scale: Scale::Inflation(0.01),
    })
    .unwrap();
    let unit = if level == Level::Client { Unit::Client } else { Unit::Example };
    let event = plan.event(1.0, 1);
    let guarantee = accounting::epsilon(&[event.times(3)], 1e-5, unit, Accountant::Best).unwrap();
    let claim = Claim::from(&guarantee);
    (event, Promise { unit, mechanism: "distributed".into(), events: vec![event], claim })
}

/// Correction 10 and 18 for noise in shares: the claim is the Rényi accountant's from the raw numbers, the Gaussian of equal
/// variance is below, and both figures are told.
#[test]
fn claims_of_noise_in_shares_are_bracketed_and_both_figures_told() {
    for level in [Level::Client, Level::Example { batch_norm: 8.0 }] {
        let (event, promise) = in_shares(level);
        let book = |promise: Promise| {
            let (mut book, account) = node();
            book.reserve_job(account, request(1, Some(promise)), None, NOW).unwrap();
            book.charge_round(run(1), 1, None, NOW).unwrap();
            book.export().unwrap()
        };
        // The account is one of rows: a client's guarantee covers them, at twice the sensitivity.
        let verified = check(&book(promise.clone()));
        assert_eq!(told(&verified), "", "{level:?}");
        let [remark] = verified.remarks.as_slice() else { panic!("{:?}", verified.remarks) };
        let text = remark.to_string();
        assert_eq!(remark.weight, Weight::Note);
        assert!(text.contains("with at most 1 of 4 survivors dishonest; if every other"), "{text}");
        let (planned, alone) = guarantees(&[event.times(3)], 1e-5, promise.unit).unwrap();
        assert_eq!(planned.epsilon, promise.claim.epsilon);
        assert!(text.ends_with(&format!("epsilon {:.4}", alone.epsilon)), "{text}");

        let claims = |epsilon: f64| Promise { claim: Claim { epsilon, ..promise.claim }, ..promise.clone() };
        let small = told(&check(&book(claims(promise.claim.epsilon * 0.8))));
        assert!(small.contains("the claim is too small"), "{small}");
        let careful = check(&book(claims(promise.claim.epsilon * 1.1)));
        assert!(careful.is_sound() && careful.remarks.len() == 2);

        // Less than rounding can make of the clip norm is accounted for.
        let factor = if level == Level::Client { 0.98 } else { 0.999 };
        let short = Event { sensitivity: factor * event.sensitivity, ..event };
        let short = told(&check(&book(Promise { events: vec![short], ..promise.clone() })));
        assert!(short.contains("grid steps is recorded; clipping to 1 at"), "{short}");
    }
}

#[test]
fn noise_that_is_not_the_sum_of_its_shares_is_no_record() {
    let (event, _) = in_shares(Level::Client);
    let Noise::Skellam(shares) = event.noise else { panic!() };
    let with = |noise: SkellamShares| Event { noise: Noise::Skellam(noise), ..event };
    for bad in [
        with(SkellamShares { colluders: 0, ..shares }),
        with(SkellamShares { colluders: 4, ..shares }),
        with(SkellamShares { survivors: 40, ..shares }),
        with(SkellamShares { dimension: 0, ..shares }),
        with(SkellamShares { scale: f64::NAN, ..shares }),
        with(SkellamShares { clip_norm: 0.0, ..shares }),
        with(SkellamShares { rounding_failure: 1.0, ..shares }),
        with(SkellamShares { sampler_distance: -1e-30, ..shares }),
        Event { noise_standard_deviation: 1.001 * event.noise_standard_deviation, ..event },
    ] {
        assert!(Body::RoundNoised { round: 1, events: vec![bad] }.check().is_err(), "{bad:?}");
    }
    assert_eq!(Body::RoundNoised { round: 1, events: vec![event, event.alone()] }.check(), Ok(()));
}

#[test]
fn records_that_contradict_each_other_are_named() {
    let good = bodies();
    let (account, reserved) = (0, 1);
    let says = |bodies: Vec<Body>| told(&check(&forged(bodies)));
    let with = |change: &dyn Fn(&mut Vec<Body>)| {
        let mut bodies = good.clone();
        change(&mut bodies);
        says(bodies)
    };
    let charge = good[2].clone();
    let Body::PayloadSealed { account: payer, key, .. } = good[3].clone() else { panic!() };
    let seal = |round, payload: &[u8]| Body::PayloadSealed {
        account: payer,
        key,
        round,
        release: Release::Update,
        payload: Digest::of(payload),
        bytes: 1,
    };

    let text = with(&|b| drop(b.remove(reserved)));
    assert!(text.contains("record 2 (line 4): there is no reservation"), "{text}");
    let text = with(&|b| drop(b.remove(account)));
    assert!(text.contains("record 1 (line 3): account"), "{text}");
    let text = with(&|b| b.insert(3, charge.clone()));
    assert!(text.contains("record 4 (line 6): round 1 of run"), "{text}");
    let text = with(&|b| b.insert(5, seal(1, b"other")));
    assert!(text.contains("record 6 (line 8): two payloads for the one charge"), "{text}");
    let text = with(&|b| b.insert(5, seal(3, b"other")));
    assert!(text.contains("left without a charge"), "{text}");
    let text = with(&|b| b.push(b[6].clone()));
    assert!(text.contains("record 8 (line 10): run"), "{text}");
    assert!(text.contains("a second time"), "{text}");
    let text = with(&|b| {
        if let Body::RoundsReturned { rounds, .. } = &mut b[6] {
            *rounds = 2;
        }
    });
    assert!(text.contains("gives 2 rounds back, and 1 were never started"), "{text}");
    let text = with(&|b| {
        if let Body::JobReserved { rho, .. } = &mut b[reserved] {
            *rho *= 1.0 - 1e-8;
        }
    });
    assert!(text.contains("record 2 (line 4): the recorded cost is"), "{text}");
    let text = with(&|b| {
        if let Body::RoundCharged { events, .. } = &mut b[2] {
            events[0].noise_standard_deviation = 3.2;
        }
    });
    assert!(text.contains("charges other events than were reserved"), "{text}");
    let text = with(&|b| {
        let Body::AccountOpened { unit, .. } = &mut b[account] else { panic!() };
        *unit = Unit::Client;
    });
    assert!(text.contains("the job protects Example, the account Client"), "{text}");

    // Overspend: the same job again and again, each with its right cost.
    let mut many = vec![good[account].clone()];
    for number in 1..=20 {
        let Body::JobReserved { key, .. } = &good[reserved] else { panic!() };
        let key = JobKey { run: RunId(number), ..*key };
        let mut job = good[reserved].clone();
        if let Body::JobReserved { key: of, .. } = &mut job {
            *of = key;
        }
        many.push(job);
    }
    let text = says(many);
    assert!(text.contains("above its budget of"), "{text}");
    let first = text.lines().next().unwrap();
    let (Some(State::Node(ledger)), number) = (check(&forged(good.clone())).state, first) else { panic!() };
    let reading = &ledger.readings()[0];
    let fit = (reading.budget.unwrap() / (1.5 * reading.spent)) as u64;
    assert!(number.starts_with(&format!("record {} ", fit + 2)), "{number}, {fit} jobs fit");

    let text = with(&|b| {
        let charges = vec![LostCharge { account: payer, rho: 0.0 }];
        b.push(Body::RestoreDetected { evidence: Evidence::NoAcknowledgement });
        b.push(charge.clone());
        b.push(Body::RestoreAccepted { reason: "x".into(), charges, worst_case: true });
    });
    assert!(text.contains("does not fill every capped account"), "{text}");
    let text = with(&|b| b.push(Body::RunEnded { rounds: 1 }));
    assert!(text.contains("does not belong into this kind of ledger"), "{text}");
}

#[test]
fn an_unbounded_release_is_told_and_is_no_finding() {
    let (mut book, account) = node();
    book.reserve_job(account, request(1, None), Some("approved"), NOW).unwrap();
    let verified = check(&book.export().unwrap());
    assert!(verified.is_sound());
    assert!(verified.remarks[0].to_string().contains("epsilon is infinite from here on (approved)"));
}

#[test]
fn a_coordinators_ledger_is_held_to_its_rules_too() {
    let mut book = RunBook::in_memory(&"coordinator".parse().unwrap(), key(), NOW).unwrap();
    let opening = |epsilon| RunOpening {
        key: run(1),
        job: Digest::of(b"job"),
        unit: Some(Unit::Example),
        mechanism: "dp-sgd".into(),
        rounds: 3,
        events: events(),
        claim: Some(claimed(epsilon).claim),
    };
    let sent = |payload: &[u8]| {
        vec![Participant { node: "st-mary".parse().unwrap(), payload: Some(Digest::of(payload)) }]
    };
    book.open_run(opening(guarantee().epsilon), NOW).unwrap();
    book.abandon_round(1, 1, sent(b"1"), NOW).unwrap();
    book.publish_round(1, 2, Digest::of(b"model"), sent(b"1"), NOW).unwrap();
    book.end_run(NOW).unwrap();
    let text = book.export().unwrap();
    assert_eq!(told(&check(&text)), "");
    let records = check(&text).records;
    let Body::RoundPublished { model, .. } = records[3].body() else { panic!() };
    let body = Body::RoundPublished { round: 1, attempt: 2, model: *model, participants: sent(b"2") };
    let second = Record::seal(Some(&records[2]), Hour(1), Hex([0; 16]), body).unwrap();
    let told_of = told(&check(&signed(&[&records[..3], &[second]].concat())));
    assert!(told_of.contains("record 3 (line 5): a node has two payloads for one round"), "{told_of}");

    let mut low = RunBook::in_memory(&"coordinator".parse().unwrap(), key(), NOW).unwrap();
    low.open_run(opening(0.1), NOW).unwrap();
    assert!(told(&check(&low.export().unwrap())).contains("the claim is too small"));
}
