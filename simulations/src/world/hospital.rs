//! The world's nodes: the production participant over files of its own, and what it asks for.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use rcgen::{KeyPair, PKCS_ED25519};
use tributary_client::account::{Account, AccountConfig, Parties, Source};
use tributary_client::data::Split;
use tributary_client::encoding::Produced;
use tributary_client::machine::{Attempt, ExampleCounts, Failure, Input, Profile, Role, RoundKey, Trained};
use tributary_client::masking::Identity;
use tributary_client::masking::journal::JOURNAL_FILE;
use tributary_client::masking::peers;
use tributary_client::participant::{Drill, Happening, Killed, Opening, Order, Participant, Steps};
use tributary_client::policy::Policy;
use tributary_client::shard::Shard;
use tributary_client::store::Folder;
use tributary_client::trainer::{ArithmeticTrainer, ClientUpdate, Task, Trainer as _};
use tributary_client::transport::{read as read_input, read_ledger_news};
use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::record::Reason;
use tributary_common::time::Time;
use tributary_proto::WireError;
use tributary_proto::coordinator::coordinator_message::Message as ToPeer;
use tributary_proto::coordinator::node_message::Message as FromPeer;

use super::script::{DECLARED_EXAMPLES, Script};

/// The ledger's file, in a node's folder.
const LEDGER_FILE: &str = tributary_client::account::LEDGER_FILE;
/// Values of one example.
const WIDTH: usize = 6;

/// Who certifies everybody.
pub(super) struct Authority {
    /// What nodes and ledgers know it by.
    pub(super) der: Vec<u8>,
}

/// The authority of every world: its certificate is hashed, and nobody reads it.
pub(super) fn authority() -> Authority {
    Authority { der: b"the world's certificate authority".to_vec() }
}

/// An update's bytes on their way.
#[derive(Debug, Clone)]
pub(super) struct Carried {
    pub(super) serial: u64,
    pub(super) at: Attempt,
    pub(super) examples: u64,
    pub(super) bytes: Arc<[u8]>,
}

/// What a node wants from the world.
pub(super) enum Wish {
    Send(FromPeer),
    Fetch {
        serial: u64,
    },
    /// Work that is done some time from now.
    Soon(Happening),
    Upload(Carried),
    /// Told to the checkers alone.
    Trained {
        key: RoundKey,
        update: ClientUpdate,
    },
    Exit,
}

/// What a node's disk forgets when it dies: planted bugs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forgets {
    Nothing,
    Charge,
    Masked,
}

/// A node: a folder, and now and then a process.
pub(super) struct Hospital {
    pub(super) index: usize,
    pub(super) name: NodeName,
    /// Counts its processes.
    pub(super) life: u32,
    /// The open control stream.
    pub(super) connection: Option<u64>,
    /// When its certificate ends.
    pub(super) expires: Time,
    pub(super) revoked: bool,
    /// Milliseconds by which its clock is ahead.
    pub(super) skew: i64,
    /// The last planned tick.
    pub(super) tick: u64,
    dir: PathBuf,
    key_pem: String,
    identity: Digest,
    profile: Arc<Profile>,
    train: Shard,
    test: Shard,
    process: Option<Participant>,
    serial: u64,
    fetching: Option<(u64, Digest)>,
    sending: Option<(u64, RoundKey)>,
    /// Steps that are left until the process dies.
    doom: Arc<std::sync::atomic::AtomicU32>,
    /// What the disk held before the last charge, and before the last masking.
    before: Option<Vec<(PathBuf, Option<Vec<u8>>)>>,
}

/// No step is so far away.
const NEVER: u32 = u32::MAX;

/// The keys of nodes, made once: no bit of a model hangs on them.
fn key(index: usize) -> io::Result<(String, Digest)> {
    static KEYS: OnceLock<Vec<(String, Digest)>> = OnceLock::new();
    let make = || {
        let key = KeyPair::generate_for(&PKCS_ED25519).ok()?;
        Some((key.serialize_pem(), Digest::of(key.public_key_raw())))
    };
    let keys = KEYS.get_or_init(|| (0..8).map_while(|_| make()).collect());
    keys.get(index).cloned().ok_or_else(|| io::Error::other("no key for a node"))
}

/// Examples of a node: more of them the higher its index.
fn examples(index: usize, count: usize) -> Shard {
    let value = |at: usize| ((at * 7 + index * 3) % 11) as f32 / 11.0 - 0.5;
    let split = Split {
        features: (0..count * WIDTH).map(value).collect(),
        labels: (0..count).map(|at| i64::from((at + index).is_multiple_of(3))).collect(),
        groups: Vec::new(),
    };
    Shard::whole(Arc::new(split))
}

/// A coordinator's message as the participant takes it.
pub(super) fn read(message: ToPeer, now: Time) -> Result<Happening, WireError> {
    Ok(match message {
        ToPeer::Masking(masking) => Happening::Masking {
            at: Attempt { run: RunId(masking.run), round: masking.round, attempt: masking.attempt },
            message: masking.message,
        },
        ToPeer::KnownHead(_) | ToPeer::LedgerHead(_) | ToPeer::RunOver(_) => {
            Happening::Ledger(read_ledger_news(message)?)
        }
        message => Happening::Input(read_input(message, now)?),
    })
}

/// Half a record at the end of a file: a process died while it wrote it.
pub(super) fn tear(path: &Path) {
    let Ok(text) = fs::read(path) else { return };
    let last = text.split(|byte| *byte == b'\n').rfind(|line| !line.is_empty()).unwrap_or_default();
    let half = last.get(..last.len() / 2).unwrap_or_default();
    if let Ok(mut file) = OpenOptions::new().append(true).open(path) {
        let _ = file.write_all(half); // a test's damage; without it there is less
    }
}

impl Hospital {
    pub(super) fn new(index: usize, dir: &Path, script: &Script) -> io::Result<Self> {
        let name: NodeName = format!("node-{index}").parse().map_err(io::Error::other)?;
        let dir = dir.join(name.as_str());
        fs::create_dir_all(&dir)?;
        let (key_pem, identity) = key(index)?;
        let policy = Policy { fixed_cohort: Some(false), ..Policy::default() };
        let profile = Profile {
            role: Role::Trainer,
            policy,
            example_shape: vec![WIDTH],
            classes: 2,
            public_test: true,
            declared_examples: Some(DECLARED_EXAMPLES),
            fitted: Vec::new(),
            grouped: false,
            drain_seconds: 5,
        };
        Ok(Self {
            index,
            name,
            life: 0,
            connection: None,
            expires: Time(super::BEGINNING + script.certificate),
            revoked: false,
            skew: 0,
            tick: 0,
            dir,
            key_pem,
            identity,
            profile: Arc::new(profile),
            train: examples(index, 30 + 5 * index),
            test: examples(index, 12),
            process: None,
            serial: 0,
            fetching: None,
            sending: None,
            doom: Arc::new(NEVER.into()),
            before: None,
        })
    }

    pub(super) fn identity(&self) -> Digest {
        self.identity
    }

    /// Whether its certificate is a good one, whatever the coordinator thinks.
    pub(super) fn is_live(&self, now: u64) -> bool {
        !self.revoked && self.expires > Time(now)
    }

    pub(super) fn clock(&self, now: u64) -> Time {
        Time(now.saturating_add_signed(self.skew))
    }

    pub(super) fn is_up(&self) -> bool {
        self.process.is_some()
    }

    pub(super) fn examples(&self) -> &Shard {
        &self.train
    }

    /// Starts a process on what the folder holds; it dies at the step after `dies` more.
    pub(super) fn start(&mut self, now: u64, dies: Option<u32>) -> Result<(), String> {
        let now = self.clock(now);
        let open = || -> Result<Participant, Box<dyn std::error::Error>> {
            let folder = Arc::new(Folder::open(&self.dir)?);
            let der = authority().der;
            let parties = Parties { node: &self.name, key_pem: &self.key_pem, authority_der: &der };
            let source = Source { data: Digest::of(&[self.index as u8]), path: "memory", grouped: false };
            let account = Account::open(&self.dir, parties, &AccountConfig::default(), source, now)?;
            let identity = Identity {
                node: self.name.clone(),
                key: peers::identity(&self.key_pem)?,
                server: account.coordinator(),
                dir: self.dir.clone(),
            };
            let doom = self.doom.clone();
            let steps: Steps = Box::new(move |step: Drill| {
                use std::sync::atomic::Ordering::Relaxed;
                match doom.load(Relaxed) {
                    NEVER => Ok(()),
                    0 => Err(Killed(step)),
                    left => {
                        doom.store(left - 1, Relaxed);
                        Ok(())
                    }
                }
            });
            let examples = ExampleCounts { train: self.train.len() as u64, test: self.test.len() as u64 };
            let profile = self.profile.clone();
            let opening = Opening { profile, examples, identity, account, folder, steps };
            Ok(Participant::open(opening, now)?)
        };
        let process = open().map_err(|error| error.to_string())?;
        self.doom.store(dies.unwrap_or(NEVER), std::sync::atomic::Ordering::Relaxed);
        self.process = Some(process);
        self.life += 1;
        (self.fetching, self.sending, self.connection) = (None, None, None);
        Ok(())
    }

    /// The process no longer dies by itself.
    pub(super) fn spare(&self) {
        self.doom.store(NEVER, std::sync::atomic::Ordering::Relaxed);
    }

    pub(super) fn stop(&mut self) {
        self.process = None;
    }

    pub(super) fn is_halted(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.account().is_halted())
    }

    /// The process dies. What it was writing may be there by half, and files that it had not renamed.
    pub(super) fn die(&mut self, tear_ledger: bool, litter: bool, forgets: Forgets) {
        self.process = None;
        (self.fetching, self.sending, self.connection) = (None, None, None);
        if tear_ledger {
            tear(&self.dir.join(LEDGER_FILE));
        }
        if litter {
            let _ = fs::write(self.dir.join("outbox").join("half.tmp"), b"half of it");
        }
        if forgets != Forgets::Nothing
            && let Some(files) = self.before.take()
        {
            let of_journal = |path: &Path| path.ends_with(JOURNAL_FILE);
            for (path, content) in files {
                if of_journal(&path) != (forgets == Forgets::Masked) {
                    continue;
                }
                let _ = match content {
                    Some(content) => fs::write(&path, content),
                    None => fs::remove_file(&path),
                };
            }
        }
    }

    /// Keeps what the disk holds now, for a planted bug.
    fn remember(&mut self, files: &[&str]) {
        let kept = files.iter().map(|name| self.dir.join(name));
        self.before = Some(kept.map(|path| (path.clone(), fs::read(&path).ok())).collect());
    }

    /// With a full disk, no update can be kept.
    pub(super) fn set_outbox_full(&mut self, full: bool) {
        let (outbox, aside) = (self.dir.join("outbox"), self.dir.join("outbox-aside"));
        if full && outbox.is_dir() && !aside.exists() {
            let _ = fs::rename(&outbox, &aside).and_then(|()| fs::write(&outbox, b""));
        } else if !full && aside.is_dir() {
            let _ = fs::remove_file(&outbox).and_then(|()| fs::rename(&aside, &outbox));
        }
    }

    pub(super) fn is_outbox_full(&self) -> bool {
        self.dir.join("outbox-aside").is_dir()
    }

    /// The ledger's file.
    pub(super) fn ledger(&self) -> Vec<u8> {
        fs::read(self.dir.join(LEDGER_FILE)).unwrap_or_default()
    }

    pub(super) fn until_tick(&self, now: u64) -> Option<u64> {
        let due = self.process.as_ref()?.next_tick()?;
        Some(due.0.saturating_sub(self.clock(now).0))
    }

    pub(super) fn is_due(&self, now: Time) -> bool {
        self.until_tick(now.0) == Some(0)
    }

    /// The model that is being fetched, if that is still so.
    pub(super) fn fetching(&self, serial: u64) -> Option<Digest> {
        self.fetching.filter(|(current, _)| *current == serial).map(|(_, model)| model)
    }

    pub(super) fn is_sending(&self, serial: u64) -> bool {
        self.sending.is_some_and(|(current, _)| current == serial)
    }

    /// Lets the participant take what happened.
    pub(super) fn take(&mut self, now: u64, happening: Happening) -> Result<Vec<Wish>, Killed> {
        // For the planted bugs: what the disk held before an invitation was answered.
        if let Happening::Input(Input::Invited { .. }) = &happening {
            self.remember(&[LEDGER_FILE, "ledger.acknowledged", JOURNAL_FILE]);
        }
        let clock = self.clock(now);
        let Some(process) = &mut self.process else { return Ok(Vec::new()) };
        let orders = process.take(clock, happening)?;
        let mut wishes = Vec::new();
        for order in orders {
            match order {
                Order::Send(message) => wishes.push(Wish::Send(message)),
                Order::Fetch { model, .. } => {
                    self.serial += 1;
                    self.fetching = Some((self.serial, model));
                    wishes.push(Wish::Fetch { serial: self.serial });
                }
                Order::CancelFetch => self.fetching = None,
                Order::Train { key, job, model } => {
                    let task = Task {
                        job,
                        round: key.round,
                        client: self.name.clone(),
                        model,
                        declared_examples: self.profile.declared_examples,
                        max_steps: None,
                    };
                    match ArithmeticTrainer.train(&task, &self.train, &AtomicBool::new(false)) {
                        Ok(update) => {
                            wishes.push(Wish::Trained { key, update: update.clone() });
                            let trained = Trained { examples: update.examples, loss: update.loss };
                            wishes.push(Wish::Soon(Happening::Updated(key, Produced::new(update), trained)));
                        }
                        Err(error) => {
                            let failure = Failure { reason: Reason::Training, detail: error.to_string() };
                            let input = Input::Trained { key, result: Err(failure) };
                            wishes.push(Wish::Soon(Happening::Input(input)));
                        }
                    }
                }
                Order::CancelTraining => {} // it is quick
                Order::Evaluate { key, job, model } => {
                    let result = ArithmeticTrainer.evaluate(&job, &model, &self.test);
                    let result = result
                        .map_err(|error| Failure { reason: Reason::Training, detail: error.to_string() });
                    wishes.push(Wish::Soon(Happening::Measured(key, job, result)));
                }
                Order::Encode(encoding) => wishes.push(Wish::Soon(encoding.run())),
                Order::Upload { at, update } => {
                    let path = self.process.as_ref().map(|process| process.update_path(at.key()));
                    // A file that is gone is what the transport would find too.
                    let Some(bytes) = path.and_then(|path| fs::read(path).ok()) else {
                        let detail = "the kept update cannot be read".to_owned();
                        wishes.push(Wish::Soon(Happening::Input(Input::UploadRefused { at, detail })));
                        continue;
                    };
                    self.serial += 1;
                    self.sending = Some((self.serial, at.key()));
                    let (serial, examples) = (self.serial, update.examples);
                    wishes.push(Wish::Upload(Carried { serial, at, examples, bytes: bytes.into() }));
                }
                Order::CancelUpload { key } => {
                    self.sending.take_if(|(_, of)| *of == key);
                }
                Order::Tell(_) => {}
                Order::Exit => wishes.push(Wish::Exit),
            }
        }
        Ok(wishes)
    }
}
