//! What a disk may do to a store, and a crash: every case ends in a typed error or with nothing lost.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use tributary_common::digest::Digest;
use tributary_common::ids::RunId;
use tributary_common::record::RunState;
use tributary_common::time::Time;

use super::conformance::{Content, RUN, attempt, content, evaluation, head, model, node, record, token};
use super::{SledStore, Store, StoreError};

/// A store with a history, closed. Returns its folder and what it holds.
fn history(rounds: u32) -> (tempfile::TempDir, Content) {
    let dir = tempfile::tempdir().unwrap();
    let store = SledStore::open(dir.path()).unwrap();
    let initial = store.put_model(&model(0, 10)).unwrap();
    store.create_run(RUN, &"key = 1\n".repeat(900), initial, Time(1)).unwrap();
    store.create_run(RunId(1), "other", initial, Time(2)).unwrap();
    let mut store = Some(store);
    for round in 1..=rounds {
        if round % 50 == 0 {
            drop(store.take());
            store = Some(SledStore::open(dir.path()).unwrap());
        }
        let store = store.as_ref().unwrap();
        store.put_node(&node(round, None)).unwrap();
        store.put_token(&token(round)).unwrap();
        store.journal_attempt(RUN, &attempt(round, 1, 20)).unwrap();
        let next = store.put_model(&model(round, 10)).unwrap();
        let cohort = if round % 10 == 0 { 60 } else { 20 };
        store.commit_round(RUN, &record(round, 1, cohort, Some(next)), &head(round, 1, next)).unwrap();
        store.put_evaluation(RUN, &evaluation(round, 0.5, 3)).unwrap();
    }
    let store = store.unwrap();
    store.collect_garbage().unwrap();
    let content = content(&store).unwrap();
    (dir, content)
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn is_damaged<T>(answer: &Result<T, StoreError>) -> bool {
    matches!(answer, Err(StoreError::Damaged { .. }))
}

fn open_error(dir: &Path) -> StoreError {
    SledStore::open(dir).unwrap_err()
}

#[test]
fn a_store_is_open_once_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = SledStore::open(&dir.path().join("new").join("state")).unwrap();
    let path = dir.path().join("new").join("state");
    let error = open_error(&path);
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    assert!(error.to_string().contains(&path.display().to_string()));
    drop(store);
    for _ in 0..5 {
        drop(SledStore::open(&path).unwrap());
    }
}

#[test]
fn everything_survives_and_goes_on() {
    let (dir, before) = history(12);
    let store = SledStore::open(dir.path()).unwrap();
    assert_eq!(content(&store).unwrap(), before);
    assert_eq!(store.take_token(token(7).secret_digest).unwrap(), Some(token(7)));
    store.journal_attempt(RUN, &attempt(13, 1, 20)).unwrap();
    drop(store);
    let store = SledStore::open(dir.path()).unwrap();
    assert_eq!(store.take_token(token(7).secret_digest).unwrap(), None);
    assert_eq!(store.run(RUN).unwrap().open_attempt, Some(attempt(13, 1, 20)));
}

#[test]
fn killed_between_model_and_commit_the_old_head_stands() {
    let (dir, before) = history(3);
    let store = SledStore::open(dir.path()).unwrap();
    let orphan = store.put_model(&model(77, 10)).unwrap();
    let folder = dir.path().join("models");
    let partial = folder.join(format!("{}.0.partial", Digest::of(b"cut off")));
    let partial_record = dir.path().join("records").join("x.partial");
    fs::write(&partial, b"half").unwrap();
    fs::write(&partial_record, b"half").unwrap();
    drop(store);
    let store = SledStore::open(dir.path()).unwrap();
    assert_eq!(content(&store).unwrap(), before);
    assert!(!partial.exists() && !partial_record.exists());
    assert_eq!(store.collect_garbage().unwrap(), 1);
    assert!(matches!(store.model(orphan), Err(StoreError::Missing { .. })));
    assert_eq!(fs::read_dir(folder).unwrap().count(), 2, "the initial and the last published model");
}

#[test]
fn a_killed_process_loses_nothing_that_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    // A copy of the files of an open store is what a kill leaves.
    let store = SledStore::open(&dir.path().join("a")).unwrap();
    let initial = store.put_model(&model(0, 10)).unwrap();
    store.create_run(RUN, "job", initial, Time(1)).unwrap();
    for round in 1..=15 {
        let next = store.put_model(&model(round, 10)).unwrap();
        store.journal_attempt(RUN, &attempt(round, 1, 50)).unwrap();
        store.commit_round(RUN, &record(round, 1, round * 5, Some(next)), &head(round, 1, next)).unwrap();
        let killed = dir.path().join(format!("killed-{round}"));
        copy_folder(&dir.path().join("a"), &killed);
        let resumed = SledStore::open(&killed).unwrap();
        assert_eq!(content(&resumed).unwrap(), content(&store).unwrap());
        resumed.set_state(RUN, &RunState::Finished).unwrap();
    }
}

#[test]
fn a_damaged_model_is_named_and_can_be_stored_again() {
    let (dir, _) = history(3);
    let store = SledStore::open(dir.path()).unwrap();
    let digest = store.run(RUN).unwrap().head.model;
    let file = dir.path().join("models").join(digest.to_string());
    let good = fs::read(&file).unwrap();
    let mut flipped = good.clone();
    flipped[17] ^= 4;
    let longer = [&good[..], &[0; 4]].concat();
    for bad in [&flipped[..], &longer, &good[..good.len() - 4], &good[..good.len() - 1], &[]] {
        fs::write(&file, bad).unwrap();
        let error = store.model(digest).unwrap_err();
        assert!(matches!(&error, StoreError::Damaged { what: "model", .. }), "{error}");
        assert!(error.to_string().contains(&digest.to_string()), "{error}");
        assert_eq!(store.put_model(&model(3, 10)).unwrap(), digest);
        assert_eq!(*store.model(digest).unwrap(), model(3, 10));
    }
    fs::remove_file(&file).unwrap();
    assert!(matches!(store.model(digest), Err(StoreError::Missing { what: "model", .. })));
    fs::create_dir(&file).unwrap();
    assert!(is_damaged(&store.model(digest)));
}

#[test]
fn missing_files_are_not_taken_for_a_new_store() {
    let (dir, before) = history(3);
    let spoilt = |remove: &[&str]| {
        let copy = dir.path().join("copy");
        let _ = fs::remove_dir_all(&copy);
        for part in ["store", "models", "records"] {
            copy_folder(&dir.path().join(part), &copy.join(part));
        }
        fs::copy(dir.path().join("store.jsonl"), copy.join("store.jsonl")).unwrap();
        for name in remove {
            let path = copy.join(name);
            if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
        copy
    };
    for remove in [
        &["store"][..],
        &["store/db"],
        &["store.jsonl"],
        &["store.jsonl", "store"],
        &["store.jsonl", "models"],
        &["records"],
    ] {
        let copy = spoilt(remove);
        for _ in 0..2 {
            let error = open_error(&copy);
            assert!(matches!(error, StoreError::Damaged { .. }), "without {remove:?}: {error}");
        }
    }
    assert_eq!(content(&SledStore::open(&spoilt(&[])).unwrap()).unwrap(), before);
}

#[test]
fn a_database_older_than_what_was_acknowledged_is_refused() {
    let (dir, _) = history(3);
    let old = dir.path().join("old");
    copy_folder(&dir.path().join("store"), &old);
    let store = SledStore::open(dir.path()).unwrap();
    store.set_state(RUN, &RunState::Finished).unwrap();
    drop(store);
    fs::remove_dir_all(dir.path().join("store")).unwrap();
    copy_folder(&old, &dir.path().join("store"));
    let error = open_error(dir.path());
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("was acknowledged"), "{error}");
}

#[test]
fn a_damaged_record_file_is_found_when_it_is_read() {
    let (dir, _) = history(10);
    let store = SledStore::open(dir.path()).unwrap();
    let large: Vec<PathBuf> =
        fs::read_dir(dir.path().join("records")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(large.len(), 2, "the job and the round with the large cohort");
    for file in &large {
        fs::File::options().write(true).open(file).unwrap().write_all_at(b"~", 100).unwrap();
    }
    assert!(is_damaged(&store.rounds(RUN)) && is_damaged(&store.run(RUN)) && is_damaged(&store.runs()));
    fs::remove_file(&large[0]).unwrap();
    fs::remove_file(&large[1]).unwrap();
    assert!(is_damaged(&store.rounds(RUN)) && is_damaged(&store.run(RUN)) && is_damaged(&store.runs()));
}

#[test]
fn another_format_is_refused() {
    let (dir, _) = history(1);
    let path = dir.path().join("store.jsonl");
    fs::remove_file(&path).unwrap();
    let check = Digest::of(b"tributary store 9 40").short();
    fs::write(&path, format!("{{\"format\":9,\"sequence\":40,\"check\":\"{check}\"}}\n")).unwrap();
    let error = open_error(dir.path());
    assert!(matches!(error, StoreError::Format { found: 9, expected: 1, .. }), "{error}");
}

#[test]
fn a_write_that_the_disk_refuses_changes_nothing() {
    let (dir, before) = history(2);
    let store = SledStore::open(dir.path()).unwrap();
    // An evaluation that needs a file of its own, and no folder for it.
    let (folder, aside) = (dir.path().join("records"), dir.path().join("aside"));
    fs::rename(&folder, &aside).unwrap();
    let refused = store.put_evaluation(RUN, &evaluation(9, 1.0, 500));
    assert!(matches!(refused, Err(StoreError::Io { .. })), "{refused:?}");
    fs::rename(&aside, &folder).unwrap();
    assert_eq!(content(&store).unwrap(), before);
    store.put_evaluation(RUN, &evaluation(9, 1.0, 500)).unwrap();
    assert_eq!(store.evaluations(RUN).unwrap().last(), Some(&evaluation(9, 1.0, 500)));
}

/// Opens a damaged copy in a thread of its own: it must answer, and with nothing or with everything.
fn judge(copy: &Path, before: &Content, what: &str) -> bool {
    let (send, receive) = mpsc::channel();
    let path = copy.to_owned();
    std::thread::spawn(move || {
        let answer = SledStore::open(&path).and_then(|store| content(&store));
        let _ = send.send(answer);
    });
    match receive.recv_timeout(Duration::from_secs(30)) {
        Ok(Ok(found)) => {
            assert_eq!(&found, before, "{what}: opened with other content");
            false
        }
        Ok(Err(error)) => {
            assert!(matches!(error, StoreError::Damaged { .. } | StoreError::Io { .. }), "{what}: {error}");
            eprintln!("{what}: {error}");
            true
        }
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what}: opening hangs"),
        Err(mpsc::RecvTimeoutError::Disconnected) => panic!("{what}: a panic came through"),
    }
}

/// Pseudo-random numbers below `bound`: the same in each run.
fn numbers(bound: u64) -> impl Iterator<Item = u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % bound
    })
}

#[test]
fn no_damage_to_the_database_passes_for_truth() {
    let number = |name, or| std::env::var(name).ok().map_or(or, |text: String| text.parse().unwrap());
    // Enough for several of sled's segments; each of these histories was opened and closed several times.
    let (dir, before) = history(number("STORE_DAMAGE_ROUNDS", 150));
    let cases = number("STORE_DAMAGE_CASES", 15);
    let mut found = 0;
    let base = tempfile::tempdir().unwrap();
    let mut damage = |file: &str, what: &str, number: u32, change: &dyn Fn(&fs::File)| {
        let copy = base.path().join(format!("{what}-{number}-{}", file.replace('/', "-")));
        copy_folder(dir.path(), &copy);
        change(&fs::File::options().read(true).write(true).open(copy.join(file)).unwrap());
        let case = format!("{what} {number} of {file}");
        let damaged = judge(&copy, &before, &case);
        if damaged {
            assert!(judge(&copy, &before, &format!("{case}, opened again")), "{case}: healed by opening");
        }
        found += u32::from(damaged);
        fs::remove_dir_all(copy).unwrap();
        damaged
    };
    let bytes = fs::read(dir.path().join("store/db")).unwrap();
    let used = bytes.iter().rposition(|byte| *byte != 0).unwrap() as u64 + 1;
    for (number, position) in (0..cases).zip(numbers(used)) {
        damage("store/db", "bit flipped", number, &|file| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, position).unwrap();
            file.write_all_at(&[byte[0] ^ (1 << (number % 8))], position).unwrap();
        });
        damage("store/db", "512 bytes zeroed", number, &|file| {
            file.write_all_at(&[0; 512], position / 512 * 512).unwrap();
        });
        damage("store/db", "cut", number, &|file| file.set_len(position).unwrap());
    }
    for entry in fs::read_dir(dir.path().join("store")).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let length = entry.metadata().unwrap().len();
        if name == "db" || !entry.file_type().unwrap().is_file() || length == 0 {
            continue;
        }
        for (number, position) in (0..cases.div_ceil(4)).zip(numbers(length)) {
            damage(&format!("store/{name}"), "bit flipped", number, &|file| {
                let mut byte = [0];
                file.read_exact_at(&mut byte, position).unwrap();
                file.write_all_at(&[byte[0] ^ 16], position).unwrap();
            });
            damage(&format!("store/{name}"), "cut", number, &|file| file.set_len(position).unwrap());
        }
    }
    assert!(found > 0, "no case was noticed at all");
    eprintln!("{found} cases of damage refused, the others without effect");
}
