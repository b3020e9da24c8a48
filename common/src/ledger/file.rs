//! The ledger's file: lines that are appended and flushed before anything follows from them, and never
//! changed.
//!
//! ```text
//! NAME.jsonl          a line that says what the file is, then one line per record
//! NAME.acknowledged   sequence number and hash of the last durable record, written after it
//! NAME.secret         what opens the commitments in the records; never in an export
//! ```
//!
//! The acknowledgement tells a crash from a loss. A record that was not acknowledged may be torn: it is cut
//! off and reported, for nothing had followed from it. An acknowledged record that is damaged or missing is
//! an error that names it. A copy of all three files that is put back later looks whole: only a head that
//! somebody else kept tells.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::hex::Hex;
use super::log::ChainError;
use super::record::{Evidence, Hour, LedgerHash, Record, RecordError, Secret, hash};

/// The first line of a ledger's file and of an export.
pub const HEADER: &str = "{\"file\":\"tributary-ledger\",\"version\":1}";
/// Each of the two slots of the acknowledgement.
const SLOT_BYTES: usize = 128;
const CHECK_DIGITS: usize = 16;

/// Why a ledger's file cannot be used. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system refused.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
    /// Another process has it open: an account has one writer.
    #[error("{}: another process uses this ledger; stop it first", .0.display())]
    Locked(PathBuf),
    /// There is one already.
    #[error("{}: a ledger is there already", .0.display())]
    Exists(PathBuf),
    /// It was there once.
    #[error(
        "{}: the ledger is gone, though {} says that it had {} records; put the file back",
        path.display(), acknowledged_path(path).display(), sequence.saturating_add(1)
    )]
    Gone {
        /// The ledger's file.
        path: PathBuf,
        /// Its last acknowledged record.
        sequence: u64,
    },
    /// Not a ledger, or of another version.
    #[error("{}: the first line is not that of a Tributary ledger of version 1", .0.display())]
    Header(PathBuf),
    /// A record is damaged.
    #[error("{} line {line}: record {sequence} {cause}; put a copy back that has it whole", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The record that is due there.
        sequence: u64,
        /// What is wrong.
        cause: RecordError,
    },
    /// A record is whole and out of place.
    #[error("{} line {line}: {cause}; put a copy back that is as it was written", path.display())]
    Chain {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        cause: ChainError,
    },
    /// Acknowledged records are missing.
    #[error(
        "{}: the ledger ends before record {}, which was durable: it was cut, or restored from an older copy. \
         Put the latest copy back, or accept the loss with `tributary-client ledger accept-restore`",
        path.display(), acknowledged
    )]
    Shorter {
        /// The file.
        path: PathBuf,
        /// The last acknowledged record.
        acknowledged: u64,
        /// Records that are there.
        records: u64,
    },
    /// The acknowledged record is another one.
    #[error(
        "{}: record {sequence} is not the one that was durable: the ledger was restored from an older copy and went on. \
         Put the latest copy back, or accept the loss with `tributary-client ledger accept-restore`",
        path.display()
    )]
    Other {
        /// The file.
        path: PathBuf,
        /// The acknowledged record.
        sequence: u64,
    },
    /// There is no readable acknowledgement.
    #[error(
        "{}: is missing or damaged, so nobody knows whether the ledger is whole. Put it back, or accept the loss \
         with `tributary-client ledger accept-restore`",
        .0.display()
    )]
    NoAcknowledgement(PathBuf),
    /// An earlier write failed and left the file in an unknown state.
    #[error("{}: an earlier write failed; start again to read what is on the disk", .0.display())]
    Failed(PathBuf),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> FileError + use<> {
    let path = path.to_path_buf();
    move |cause| FileError::Io { path, cause }
}

fn acknowledged_path(path: &Path) -> PathBuf {
    path.with_extension("acknowledged")
}

fn secret_path(path: &Path) -> PathBuf {
    path.with_extension("secret")
}

/// A record that a crash left half written. It was cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Torn {
    /// The number that it would have had.
    pub sequence: u64,
    /// Bytes that were there.
    pub bytes: u64,
}

/// What was in a ledger's file.
#[derive(Debug)]
pub struct Contents {
    /// The file, locked.
    pub file: LedgerFile,
    /// All its records; at least one.
    pub records: Vec<Record>,
    /// What opens its commitments.
    pub secret: Secret,
    /// A record that was cut off.
    pub torn: Option<Torn>,
    /// Evidence that records are missing; only from [`LedgerFile::open_restored`].
    pub lost: Option<Evidence>,
}

/// A ledger's file that this process alone appends to.
#[derive(Debug)]
pub struct LedgerFile {
    path: PathBuf,
    file: File,
    acknowledged: File,
    length: u64,
    failed: bool,
    /// The acknowledgement is of records that are lost: the next one replaces all of it.
    lost: bool,
}

impl LedgerFile {
    /// Makes the file of a new ledger with its first record. On return it is durable.
    ///
    /// # Errors
    /// [`FileError::Exists`], [`FileError::Gone`], [`FileError::Io`].
    pub fn create(path: &Path, first: &Record) -> Result<(Self, Secret), FileError> {
        if path.try_exists().map_err(at(path))? {
            return Err(FileError::Exists(path.to_path_buf()));
        }
        if let Some((sequence, _)) = read_acknowledged(path)? {
            return Err(FileError::Gone { path: path.to_path_buf(), sequence });
        }
        let folder = folder_of(path);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at(folder))?;
        let secret = Secret(Hex::random().map_err(at(path))?.0);
        write_whole(&secret_path(path), format!("{}\n", Hex(secret.0)).as_bytes())?;
        write_whole(path, format!("{HEADER}\n{}\n", first.line()).as_bytes())?;
        let file = lock(path)?;
        let length = file.metadata().map_err(at(path))?.len();
        let acknowledged = open_acknowledged(path)?;
        let mut ledger =
            Self { path: path.to_path_buf(), file, acknowledged, length, failed: false, lost: false };
        ledger.acknowledge(first.sequence(), first.hash())?;
        let folder_is_durable = File::open(folder).and_then(|folder| folder.sync_all());
        folder_is_durable.map_err(at(folder))?;
        Ok((ledger, secret))
    }

    /// Opens a ledger and reads it whole. A torn last record is cut off and reported.
    ///
    /// # Errors
    /// [`FileError`]: whatever else is damaged or missing, by the record's name.
    pub fn open(path: &Path) -> Result<Contents, FileError> {
        Self::read(path, false)
    }

    /// Opens a ledger that has lost acknowledged records at its end, or their acknowledgement, because the
    /// operator accepts it. The caller records the evidence and what the loss is charged.
    ///
    /// # Errors
    /// [`FileError`]: damage within the records that are there is not accepted.
    pub fn open_restored(path: &Path) -> Result<Contents, FileError> {
        Self::read(path, true)
    }

    fn read(path: &Path, accept_loss: bool) -> Result<Contents, FileError> {
        let missing = match path.try_exists() {
            Ok(exists) => !exists,
            Err(cause) => return Err(at(path)(cause)),
        };
        let acknowledged = read_acknowledged(path)?;
        if let (true, Some((sequence, _))) = (missing, acknowledged) {
            return Err(FileError::Gone { path: path.to_path_buf(), sequence });
        }
        let mut file = lock(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(at(path))?;
        // The lock came after the first look.
        let acknowledged = read_acknowledged(path)?;
        let durable = acknowledged.map(|(sequence, _)| sequence);
        let (records, length, torn) = records(path, &bytes, durable)?;
        let Some(last) = records.last() else { return Err(FileError::Header(path.to_path_buf())) };

        let lost = loss(path, &records, acknowledged);
        let evidence = match lost {
            None => None,
            Some(error) if !accept_loss => return Err(error),
            Some(_) => Some(match acknowledged {
                Some((sequence, hash)) => Evidence::Acknowledged { sequence, hash },
                None => Evidence::NoAcknowledgement,
            }),
        };
        if torn.is_some() {
            file.set_len(length).and_then(|()| file.sync_all()).map_err(at(path))?;
        }
        file.seek(SeekFrom::Start(length)).map_err(at(path))?;
        let secret = read_secret(path)?;
        let link = (last.sequence(), last.hash());
        let mut ledger = Self {
            path: path.to_path_buf(),
            file,
            acknowledged: open_acknowledged(path)?,
            length,
            failed: false,
            lost: evidence.is_some(),
        };
        // A loss is acknowledged with the record of it, not before.
        if evidence.is_none() && acknowledged != Some(link) {
            ledger.file.sync_all().map_err(at(path))?;
            ledger.acknowledge(link.0, link.1)?;
        }
        Ok(Contents { file: ledger, records, secret, torn, lost: evidence })
    }

    /// The records of a ledger that another process may be appending to: those that are whole, read without a
    /// lock.
    ///
    /// # Errors
    /// [`FileError`], as [`LedgerFile::open`]: nobody should sign a ledger that lost records.
    pub fn peek(path: &Path) -> Result<Vec<Record>, FileError> {
        // First the acknowledgement: what is appended meanwhile only makes the ledger longer.
        let acknowledged = read_acknowledged(path)?;
        let bytes = fs::read(path).map_err(at(path))?;
        let (records, ..) = records(path, &bytes, acknowledged.map(|(sequence, _)| sequence))?;
        loss(path, &records, acknowledged).map_or(Ok(records), Err)
    }

    /// Appends a record. On return it is on the disk, flushed, and acknowledged.
    ///
    /// # Errors
    /// [`FileError`]; nothing may follow from the record then. A full disk leaves the file as it was; a
    /// failed flush makes every later append fail, for what is on the disk is unknown.
    pub fn append(&mut self, record: &Record) -> Result<(), FileError> {
        if self.failed {
            return Err(FileError::Failed(self.path.clone()));
        }
        let mut line = record.line();
        line.push('\n');
        self.failed = true;
        if let Err(cause) = self.file.write_all_at(line.as_bytes(), self.length) {
            let undone = self.file.set_len(self.length).and_then(|()| self.file.sync_all());
            self.failed = undone.is_err();
            return Err(at(&self.path)(cause));
        }
        self.file.sync_all().map_err(at(&self.path))?;
        self.length += line.len() as u64;
        self.acknowledge(record.sequence(), record.hash())?;
        self.failed = false;
        Ok(())
    }

    fn acknowledge(&mut self, sequence: u64, hash: LedgerHash) -> Result<(), FileError> {
        let slot = acknowledgement(sequence, hash);
        let path = acknowledged_path(&self.path);
        let write = if self.lost {
            self.acknowledged.write_all_at(&[slot, slot].concat(), 0)
        } else {
            // The slots take turns, so that a crash leaves one of them whole.
            self.acknowledged.write_all_at(&slot, (sequence % 2) * SLOT_BYTES as u64)
        };
        write.and_then(|()| self.acknowledged.sync_all()).map_err(at(&path))?;
        self.lost = false;
        Ok(())
    }

    /// The text of the file as it is: an export without its heads.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn text(&self) -> Result<String, FileError> {
        let mut bytes = vec![0; usize::try_from(self.length).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut bytes, 0).map_err(at(&self.path))?;
        String::from_utf8(bytes).map_err(|error| at(&self.path)(io::Error::other(error)))
    }
}

/// Which acknowledged records are missing, if any are.
fn loss(path: &Path, records: &[Record], acknowledged: Option<(u64, LedgerHash)>) -> Option<FileError> {
    let Some((sequence, hash)) = acknowledged else {
        // With one record it is the crash of a creation: nothing was spent yet.
        return (records.len() > 1).then(|| FileError::NoAcknowledgement(acknowledged_path(path)));
    };
    let path = path.to_path_buf();
    match usize::try_from(sequence).ok().and_then(|at| records.get(at)).map(Record::hash) {
        Some(found) if found == hash => None,
        Some(_) => Some(FileError::Other { path, sequence }),
        None => Some(FileError::Shorter { path, acknowledged: sequence, records: records.len() as u64 }),
    }
}

/// The records of a file, the length up to which it is whole, and what is torn after that.
fn records(
    path: &Path,
    bytes: &[u8],
    durable: Option<u64>,
) -> Result<(Vec<Record>, u64, Option<Torn>), FileError> {
    let mut lines = bytes.split_inclusive(|byte| *byte == b'\n');
    let header = lines.next().and_then(|line| line.strip_suffix(b"\n"));
    if header != Some(HEADER.as_bytes()) {
        return Err(FileError::Header(path.to_path_buf()));
    }
    let mut length = HEADER.len() + 1;
    let mut records: Vec<Record> = Vec::new();
    for (number, line) in (2..).zip(lines) {
        let sequence = records.len() as u64;
        let record = match read_line(line) {
            Ok(record) => record,
            Err(cause) => {
                // Only the last record can be torn, and never one that was acknowledged.
                let rest = bytes.get(length + line.len()..).unwrap_or_default();
                let more = rest.split_inclusive(|byte| *byte == b'\n').any(|line| read_line(line).is_ok());
                let first = sequence == 0;
                if more || first || durable.is_some_and(|durable| sequence <= durable) {
                    // What is cut short at an acknowledged record is a loss of records, not damage to one.
                    let cut = !more && !first && !line.ends_with(b"\n");
                    if cut {
                        return Ok((
                            records,
                            length as u64,
                            Some(Torn { sequence, bytes: line.len() as u64 }),
                        ));
                    }
                    return Err(FileError::Damaged {
                        path: path.to_path_buf(),
                        line: number,
                        sequence,
                        cause,
                    });
                }
                let bytes = (bytes.len() - length) as u64;
                return Ok((records, length as u64, Some(Torn { sequence, bytes })));
            }
        };
        let link = records.last().map(Record::link);
        let expected = link.map_or((0, Hex([0; 32]), Hour(0)), |(at, hash, hour)| (at + 1, hash, hour));
        let cause = if record.sequence() != expected.0 {
            Some(ChainError::Sequence { expected: expected.0, found: record.sequence() })
        } else if record.previous() != expected.1 {
            Some(ChainError::Previous(record.sequence()))
        } else {
            (record.hour() < expected.2).then_some(ChainError::Hour(record.sequence()))
        };
        if let Some(cause) = cause {
            return Err(FileError::Chain { path: path.to_path_buf(), line: number, cause });
        }
        length += line.len();
        records.push(record);
    }
    Ok((records, length as u64, None))
}

fn read_line(line: &[u8]) -> Result<Record, RecordError> {
    let whole = line.strip_suffix(b"\n").ok_or_else(|| RecordError::Form("it is cut short".to_owned()))?;
    let text = str::from_utf8(whole).map_err(|_| RecordError::Form("it is not text".to_owned()))?;
    Record::parse(text)
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn lock(path: &Path) -> Result<File, FileError> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(at(path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(FileError::Locked(path.to_path_buf())),
        Err(TryLockError::Error(cause)) => Err(at(path)(cause)),
    }
}

/// Puts a small file in its place whole, flushed; its folder is flushed too.
fn write_whole(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let write = || {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(folder_of(path))?.sync_all()
    };
    write().map_err(at(path))
}

fn open_acknowledged(path: &Path) -> Result<File, FileError> {
    let path = acknowledged_path(path);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(at(&path))
}

fn acknowledgement(sequence: u64, last: LedgerHash) -> [u8; SLOT_BYTES] {
    let front = format!("{sequence:020} {last}");
    let check = hash(front.as_bytes()).to_string();
    let text = format!("{front} {}", check.get(..CHECK_DIGITS).unwrap_or_default());
    let mut slot = [b' '; SLOT_BYTES];
    slot.iter_mut().zip(text.bytes()).for_each(|(byte, digit)| *byte = digit);
    if let Some(end) = slot.last_mut() {
        *end = b'\n';
    }
    slot
}

fn read_acknowledged(path: &Path) -> Result<Option<(u64, LedgerHash)>, FileError> {
    let path = acknowledged_path(path);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(at(&path)(cause)),
    };
    let read = |slot: &[u8]| {
        let mut words = str::from_utf8(slot).ok()?.split_whitespace();
        let (sequence, last) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        (acknowledgement(sequence, last) == slot).then_some((sequence, last))
    };
    Ok(bytes.chunks(SLOT_BYTES).filter_map(read).max_by_key(|(sequence, _)| *sequence))
}

fn read_secret(path: &Path) -> Result<Secret, FileError> {
    let path = secret_path(path);
    let text = fs::read_to_string(&path).map_err(at(&path))?;
    let secret: Hex<32> = text.trim().parse().map_err(io::Error::other).map_err(at(&path))?;
    Ok(Secret(secret.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::head::LedgerKey;
    use crate::ledger::record::{AccountId, Body, LedgerId, LedgerRole};

    fn records(count: u8) -> Vec<Record> {
        let opened = Body::LedgerOpened {
            ledger: LedgerId(Hex([1; 16])),
            public_key: LedgerKey::from_seed([1; 32]).public(),
            role: LedgerRole::Node,
            name: "n".parse().unwrap(),
        };
        let mut records = vec![Record::seal(None, Hour(1), Hex([0; 16]), opened).unwrap()];
        for i in 1..count {
            let account = AccountId(Hex([i; 16]));
            let body = Body::DisjointDeclared { account, other: account };
            records.push(Record::seal(records.last(), Hour(1), Hex([i; 16]), body).unwrap());
        }
        records
    }

    fn filled(path: &Path, count: u8) -> Vec<Record> {
        let records = records(count);
        let (mut file, _) = LedgerFile::create(path, &records[0]).unwrap();
        records[1..].iter().for_each(|record| file.append(record).unwrap());
        records
    }

    #[test]
    fn what_was_appended_is_there_again_and_one_process_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/node.jsonl");
        let records = filled(&path, 5);
        let opened = LedgerFile::open(&path).unwrap();
        assert_eq!(opened.records, records);
        assert_eq!((opened.torn, &opened.lost), (None, &None));
        assert_eq!(opened.file.text().unwrap().lines().count(), 6);
        assert_eq!(LedgerFile::peek(&path).unwrap(), records);
        assert!(matches!(LedgerFile::open(&path), Err(FileError::Locked(_))));
        assert!(matches!(LedgerFile::create(&path, &records[0]), Err(FileError::Exists(_))));
        drop(opened);
        fs::remove_file(&path).unwrap();
        assert!(matches!(LedgerFile::open(&path), Err(FileError::Gone { sequence: 4, .. })));
        assert!(matches!(LedgerFile::create(&path, &records[0]), Err(FileError::Gone { sequence: 4, .. })));
    }

    /// Pitfall 12: a kill at any moment of an append loses nothing that was acknowledged, and a file that
    /// came back shorter than what was acknowledged is never taken for a crash.
    #[test]
    fn a_file_cut_anywhere_is_a_torn_record_or_a_typed_loss() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.jsonl");
        let records = filled(&path, 4);
        let whole = fs::read(&path).unwrap();
        let acknowledged = fs::read(acknowledged_path(&path)).unwrap();
        for cut in 0..whole.len() {
            let lines = whole[..cut].iter().filter(|byte| **byte == b'\n').count();
            // As it is when the crash comes between an append and its acknowledgement.
            for acknowledged_records in 1..=records.len() {
                let last = &records[acknowledged_records - 1];
                let slot = acknowledgement(last.sequence(), last.hash());
                fs::write(acknowledged_path(&path), slot).unwrap();
                fs::write(&path, &whole[..cut]).unwrap();
                let opened = LedgerFile::open(&path);
                match opened {
                    Ok(opened) => {
                        assert!(opened.records.len() >= acknowledged_records, "{cut}");
                        assert_eq!(opened.records, records[..lines - 1]);
                        let left = fs::metadata(&path).unwrap().len();
                        let torn = opened.torn.map_or(0, |torn| torn.bytes);
                        assert_eq!(left + torn, cut as u64);
                    }
                    Err(FileError::Shorter { acknowledged, records, .. }) => {
                        assert!(records <= acknowledged, "{cut}");
                    }
                    Err(FileError::Header(_) | FileError::Damaged { sequence: 0, .. }) => {
                        assert!(lines < 2, "{cut}");
                    }
                    Err(other) => panic!("{cut}: {other}"),
                }
            }
        }
        // After a torn record the log goes on where it was whole.
        fs::write(acknowledged_path(&path), acknowledgement(2, records[2].hash())).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let mut opened = LedgerFile::open(&path).unwrap();
        assert_eq!(opened.torn.map(|torn| torn.sequence), Some(3));
        opened.file.append(&records[3]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
        assert_eq!(fs::read(acknowledged_path(&path)).unwrap(), acknowledged);
    }

    #[test]
    fn damage_within_the_file_names_its_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.jsonl");
        let records = filled(&path, 4);
        let whole = fs::read(&path).unwrap();
        let mut start = HEADER.len() + 1;
        for (number, record) in records.iter().enumerate() {
            let end = start + record.line().len() + 1;
            for at in (start..end).step_by(7).chain([end - 1]) {
                let mut damaged = whole.clone();
                damaged[at] ^= 1;
                fs::write(&path, damaged).unwrap();
                match LedgerFile::open(&path).unwrap_err() {
                    FileError::Damaged { sequence, line, .. } => {
                        assert_eq!((sequence, line), (number as u64, number + 2), "byte {at}");
                    }
                    // The last line break: the record is cut short.
                    FileError::Shorter { acknowledged, .. } => {
                        assert_eq!((acknowledged, at + 1), (number as u64, whole.len()));
                    }
                    other => panic!("byte {at}: {other}"),
                }
            }
            start = end;
        }
        let lines: Vec<_> = whole.split_inclusive(|byte| *byte == b'\n').collect();
        fs::write(&path, [lines[0], lines[1], lines[3], lines[4]].concat()).unwrap();
        let error = LedgerFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("line 3: record 2 stands where record 1 is due"), "{error}");
    }

    /// A torn block at the end of the file, with or without a line break in it, over a record that nobody
    /// acknowledged.
    #[test]
    fn rubbish_after_the_last_acknowledged_record_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.jsonl");
        let records = filled(&path, 3);
        let whole = fs::read(&path).unwrap();
        for rubbish in [&[0_u8; 50][..], b"\0\0\n", b"{\"sequence\":3,", b"x\ny\n"] {
            fs::write(&path, [&whole, rubbish].concat()).unwrap();
            let opened = LedgerFile::open(&path).unwrap();
            assert_eq!(opened.records, records);
            assert_eq!(opened.torn, Some(Torn { sequence: 3, bytes: rubbish.len() as u64 }));
            assert_eq!(fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn a_lost_acknowledgement_and_an_older_copy_are_seen_and_can_be_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.jsonl");
        let records = filled(&path, 4);
        let whole = fs::read(&path).unwrap();
        let note = acknowledged_path(&path);
        let kept = fs::read(&note).unwrap();

        let shorter = &whole[..whole.len() - records[3].line().len() - 1];
        fs::write(&path, shorter).unwrap();
        assert!(matches!(
            LedgerFile::open(&path),
            Err(FileError::Shorter { acknowledged: 3, records: 3, .. })
        ));
        assert!(matches!(LedgerFile::peek(&path), Err(FileError::Shorter { .. })));
        let opened = LedgerFile::open_restored(&path).unwrap();
        let hash = records[3].hash();
        assert_eq!(opened.lost, Some(Evidence::Acknowledged { sequence: 3, hash }));
        drop(opened);
        assert_eq!(fs::read(&note).unwrap(), kept); // until a record says so

        let other =
            Body::DisjointDeclared { account: AccountId(Hex([9; 16])), other: AccountId(Hex([9; 16])) };
        let other = Record::seal(Some(&records[2]), Hour(1), Hex([9; 16]), other).unwrap();
        fs::write(&path, [shorter, other.line().as_bytes(), b"\n"].concat()).unwrap();
        assert!(matches!(LedgerFile::open(&path), Err(FileError::Other { sequence: 3, .. })));

        fs::write(&path, &whole).unwrap();
        for at in (0..SLOT_BYTES).step_by(5) {
            let mut damaged = kept.clone();
            damaged[SLOT_BYTES + at] ^= 1; // the slot of record 3
            fs::write(&note, damaged).unwrap();
            // The other slot still holds: record 3 counts, and is acknowledged again.
            let opened = LedgerFile::open(&path).unwrap();
            assert_eq!(opened.records.len(), 4);
            assert_eq!(fs::read(&note).unwrap(), kept);
        }
        fs::remove_file(&note).unwrap();
        assert!(matches!(LedgerFile::open(&path), Err(FileError::NoAcknowledgement(_))));
        let opened = LedgerFile::open_restored(&path).unwrap();
        assert_eq!(opened.lost, Some(Evidence::NoAcknowledgement));
    }

    #[test]
    fn the_files_are_the_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.jsonl");
        filled(&path, 2);
        for file in [path.clone(), acknowledged_path(&path), secret_path(&path)] {
            assert_eq!(
                fs::metadata(&file).unwrap().permissions().mode() & 0o777,
                0o600,
                "{}",
                file.display()
            );
        }
    }
}
