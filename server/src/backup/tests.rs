//! A backup put back is what was there, but for what must not come back; a damaged one leaves nothing behind.

use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::sync::atomic::{AtomicBool, Ordering};

use tributary_common::time::Clock;

use super::*;
use crate::authority::Authority;
use crate::driver::tests::job;
use crate::store::conformance::{Content, attempt, content, head, model, node, record, token};
use crate::store::{Store, StoredRun};

const PLAIN: RunId = RunId(0xa);
const MASKED: RunId = RunId(0xb);
const PRIVATE: RunId = RunId(0xc);
const OVER: RunId = RunId(0xd);

const MASKS: &str = "minimum = 3\n[secure_aggregation]\nenabled = true\n";

/// A coordinator's folder with a history.
struct Site {
    folder: tempfile::TempDir,
    config: ServerConfig,
    config_toml: String,
    store: SledStore,
}

impl Site {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config_toml = ServerConfig::default_toml("127.0.0.1:0".parse().unwrap(), "localhost", &[]);
        let config = ServerConfig::parse(&config_toml, folder.path()).unwrap();
        fs::create_dir_all(config.data_dir.join(LEDGERS)).unwrap();
        Authority::create(&config.data_dir, &config.server_names, Clock.now()).unwrap();
        let store = SledStore::open(&config.data_dir.join("store")).unwrap();
        let initial = store.put_model(&model(0, 10)).unwrap();
        for (run, job_toml) in [
            (PLAIN, job(9, 1, "")),
            (MASKED, job(9, 4, MASKS)),
            (PRIVATE, "a job of another version".to_owned()),
            (OVER, job(9, 4, MASKS)),
        ] {
            store.create_run(run, &job_toml, initial, Time(run.0)).unwrap();
            for round in 1..=2 {
                publish(&store, run, round);
            }
            store.journal_attempt(run, &attempt(3, 1, 20)).unwrap();
            for kind in LEDGER_FILES {
                fs::write(config.data_dir.join(format!("ledgers/{run}.{kind}")), format!("{run} {kind}"))
                    .unwrap();
            }
        }
        store.journal_session(MASKED, b"survivors are fixed").unwrap();
        store.set_state(OVER, &RunState::Finished).unwrap();
        store.put_token(&token(1)).unwrap();
        store.put_node(&node(1, None)).unwrap();
        store.put_node(&node(2, Some(Time(8)))).unwrap();
        store.put_ledger_head(&node(1, None).name, b"head").unwrap();
        Self { folder, config, config_toml, store }
    }

    fn back_up(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(&self.store, &self.config.data_dir, &self.config_toml, Time(77), &mut bytes).unwrap();
        bytes
    }

    /// A file with `bytes`, and a folder that is not there.
    fn put(&self, bytes: &[u8]) -> (PathBuf, PathBuf) {
        let from = self.folder.path().join("backup.zip");
        fs::write(&from, bytes).unwrap();
        (from, self.folder.path().join("restored"))
    }
}

/// Publishes a round of 60 clients: its record is too large for the database's own file.
fn publish(store: &SledStore, run: RunId, round: u32) {
    store.journal_attempt(run, &attempt(round, 1, 60)).unwrap();
    let next = store.put_model(&model(round, 10)).unwrap();
    store.commit_round(run, &record(round, 1, 60, Some(next)), &head(round, 1, next)).unwrap();
}

fn opened(restored: &Restored) -> (ServerConfig, SledStore) {
    let config = ServerConfig::load(&restored.config).unwrap();
    let store = SledStore::open(&config.data_dir.join("store")).unwrap();
    (config, store)
}

fn run_of(store: &SledStore, run: RunId) -> StoredRun {
    store.run(run).unwrap()
}

#[test]
fn a_backup_put_back_is_what_was_there_but_for_what_must_not_come_back() {
    let site = Site::new();
    let (from, dir) = site.put(&site.back_up());
    let restored = restore(&from, &dir).unwrap();
    assert_eq!((restored.made, &restored.nodes), (Time(77), &vec![node(1, None).name]));
    assert_eq!((&restored.going_on, &restored.stopped), (&vec![PLAIN], &vec![MASKED, PRIVATE]));
    let (config, store) = opened(&restored);

    // A plain run goes on with the attempt that was open; all records and models are there.
    assert_eq!(run_of(&store, PLAIN), run_of(&site.store, PLAIN));
    // A masked or private one does not: no session of it is taken up again, and no round done twice.
    for run in [MASKED, PRIVATE] {
        assert_eq!(run_of(&store, run).head.state, RunState::Stopped);
        site.store.set_state(run, &RunState::Stopped).unwrap();
    }
    assert_eq!(content(&store).unwrap(), content(&site.store).unwrap());
    assert!(site.store.session(MASKED).unwrap().is_some() && store.session(MASKED).unwrap().is_none());
    assert_eq!(store.ledger_head(&node(1, None).name).unwrap().as_deref(), Some(&b"head"[..]));
    // The token may have been used since.
    let secret = token(1).secret_digest;
    assert_eq!(store.take_token(secret).unwrap(), None);
    assert!(site.store.take_token(secret).unwrap().is_some());

    Authority::open(&config.data_dir, &config.server_names, Clock.now()).unwrap();
    for file in AUTHORITY_FILES.map(|file| format!("{AUTHORITY}/{file}")).into_iter().chain(
        [PLAIN, OVER].iter().flat_map(|run| LEDGER_FILES.map(|kind| format!("{LEDGERS}/{run}.{kind}"))),
    ) {
        let read = |data: &Path| fs::read(data.join(&file)).unwrap();
        assert_eq!(read(&config.data_dir), read(&site.config.data_dir), "{file}");
        let mode = fs::metadata(config.data_dir.join(&file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{file}");
    }
    assert_eq!(fs::read_to_string(&restored.config).unwrap(), site.config_toml);

    drop(store);
    let before = fs::read(&restored.config).unwrap();
    let again = restore(&from, &dir).unwrap_err();
    assert!(matches!(again, BackupError::Occupied { .. }), "{again}");
    assert_eq!(fs::read(&restored.config).unwrap(), before);
}

#[test]
fn a_folder_elsewhere_comes_into_the_restored_one() {
    let mut site = Site::new();
    site.config_toml = site.config_toml.replace("data_dir = \"data\"", "data_dir = '/srv/old'");
    assert!(site.config_toml.contains("/srv/old"));
    let (from, dir) = site.put(&site.back_up());
    fs::create_dir(&dir).unwrap();
    let restored = restore(&from, &dir).unwrap();
    assert_eq!(opened(&restored).0.data_dir, dir.join("data"));
}

#[test]
fn a_damaged_backup_leaves_nothing_behind() {
    let site = Site::new();
    let bytes = site.back_up();
    let refused = |damaged: &[u8], what: &str| {
        let (from, dir) = site.put(damaged);
        let error = check(&from).expect_err(what);
        assert!(matches!(error, BackupError::Damaged { .. }), "{what}: {error}");
        assert!(!error.to_string().contains('\n'), "{error}");
        assert!(restore(&from, &dir).is_err(), "{what}");
        let left: Vec<_> =
            fs::read_dir(site.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(
            left.iter().all(|name| ["backup.zip", "data"].contains(&name.to_str().unwrap())),
            "{what}: {left:?}"
        );
    };
    for length in [0, 1, 100, bytes.len() / 2, bytes.len() - 1] {
        refused(&bytes[..length], &format!("cut to {length} bytes"));
    }
    // A bit in each file: found at a byte of its content.
    let mut archive = ZipArchive::new(std::io::Cursor::new(&bytes)).unwrap();
    for number in 0..archive.len() {
        let (start, name) = {
            let file = archive.by_index(number).unwrap();
            (usize::try_from(file.data_start().unwrap()).unwrap(), file.name().unwrap().into_owned())
        };
        let mut damaged = bytes.clone();
        damaged[start + 3] ^= 4;
        refused(&damaged, &name);
    }
    // Anywhere: refused, or it does no harm.
    let (from, dir) = site.put(&bytes);
    restore(&from, &dir).unwrap();
    let sound: Content = content(&SledStore::open(&dir.join("data/store")).unwrap()).unwrap();
    fs::remove_dir_all(&dir).unwrap();
    for at in (0..bytes.len()).step_by(bytes.len() / 60) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x41;
        let (from, dir) = site.put(&damaged);
        if restore(&from, &dir).is_ok() {
            let store = SledStore::open(&dir.join("data/store")).unwrap();
            assert_eq!(content(&store).unwrap(), sound, "byte {at}");
            drop(store);
            fs::remove_dir_all(&dir).unwrap();
        }
        assert!(!dir.exists(), "byte {at}");
    }
}

#[test]
fn names_that_lead_out_of_the_folder_are_refused() {
    for name in [
        "../evil",
        "authority/../../evil",
        "ledgers/..",
        "ledgers/x.jsonl",
        "models/x",
        "/etc/passwd",
        "admin.sock",
    ] {
        let listed = Listed::of(name, b"");
        assert!(listed.place().is_none() && listed.model().is_none(), "{name}");
    }
    assert!(Listed::of(&format!("models/{}", Digest::of(b"m")), b"m").model().is_some());
}

#[test]
fn a_backup_of_a_later_format_says_what_to_do() {
    let site = Site::new();
    let mut bytes = Vec::new();
    let mut archive = ZipWriter::new_stream(&mut bytes);
    archive.start_file(MANIFEST, SimpleFileOptions::default()).unwrap();
    archive.write_all(b"{\"format\":2,\"new\":true}").unwrap();
    archive.finish().unwrap();
    let (from, _) = site.put(&bytes);
    let error = check(&from).unwrap_err();
    assert!(matches!(error, BackupError::Format { found: 2, .. }), "{error}");
    assert!(error.to_string().contains("restore it with the version that made it"), "{error}");
}

#[test]
fn backups_of_a_store_in_use_are_each_of_one_moment() {
    let site = Site::new();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut round = 3;
            while !over.load(Ordering::Relaxed) {
                publish(&site.store, PLAIN, round);
                site.store.collect_garbage().unwrap();
                round += 1;
            }
            round - 1
        });
        let mut newest = 0;
        for _ in 0..4 {
            let (from, dir) = site.put(&site.back_up());
            let restored = restore(&from, &dir).unwrap();
            let (_, store) = opened(&restored);
            let at = run_of(&store, PLAIN).head.published;
            assert_eq!(store.rounds(PLAIN).unwrap().len(), at as usize);
            content(&store).unwrap();
            assert!(at >= newest);
            newest = at;
            drop(store);
            fs::remove_dir_all(dir).unwrap();
        }
        over.store(true, Ordering::Relaxed);
        assert!(writer.join().unwrap() >= newest);
    });
    // No backup is under way: old models go again.
    let runs = site.store.runs().unwrap();
    let mut named: Vec<Digest> = runs.iter().flat_map(|run| run.head.named()).collect();
    named.push(site.store.put_model(&model(0, 10)).unwrap());
    named.sort_unstable();
    named.dedup();
    site.store.collect_garbage().unwrap();
    assert_eq!(fs::read_dir(site.config.data_dir.join("store/models")).unwrap().count(), named.len());
}

#[tokio::test]
async fn a_backup_file_is_its_owners_alone_and_never_replaces_another() {
    let site = Site::new();
    let out = site.folder.path().join("out.zip");
    let bytes = site.back_up();
    let fill = async |file: &mut File| {
        file.write_all_at(&bytes, 0).map_err(|error| io_error(Path::new("out"), &error))
    };
    assert_eq!(create(&out, fill).await.unwrap(), bytes.len() as u64);
    assert_eq!(fs::metadata(&out).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(create(&out, fill).await, Err(BackupError::Occupied { .. })));
    assert_eq!(fs::read(&out).unwrap(), bytes);

    // What did not come whole is no backup.
    let cut = site.folder.path().join("cut.zip");
    let half = async |file: &mut File| {
        file.write_all_at(&bytes[..bytes.len() / 2], 0).map_err(|error| io_error(Path::new("cut"), &error))
    };
    assert!(matches!(create(&cut, half).await, Err(BackupError::Damaged { .. })));
    assert!(!cut.exists() && !site.folder.path().join("cut.zip.part").exists());
}

#[test]
fn no_model_is_deleted_while_a_backup_reads_it() {
    let site = Site::new();
    let (snapshot, ()) = site.store.snapshot(|| ()).unwrap();
    let before = run_of(&site.store, PLAIN).head.model;
    for run in [PLAIN, MASKED, PRIVATE, OVER] {
        publish(&site.store, run, 3);
    }
    assert_eq!(site.store.collect_garbage().unwrap(), 0);
    snapshot.read(before, |_| {}).unwrap();
    drop(snapshot);
    assert!(site.store.collect_garbage().unwrap() > 0);
    assert!(site.store.model(before).is_err());
}
