//! Downloads the MNIST files: bounded, resumed where they broke off, and kept only if their content is right.
//!
//! The digests are of the decompressed content, because mirrors wrap the same bytes in different gzip files.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flate2::read::MultiGzDecoder;
use sha2::{Digest, Sha256};
use ureq::Agent;
use ureq::http::{Response, StatusCode, header};

/// The public mirror that other libraries use for MNIST.
pub const MNIST_MIRROR: &str = "https://ossci-datasets.s3.amazonaws.com/mnist/";

/// Attempts per file before giving up.
const ATTEMPTS: u32 = 5;
/// Pause before the second attempt; it doubles for each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Bytes read at once.
const BLOCK_BYTES: usize = 64 * 1024;

/// A file with a known content.
#[derive(Debug, Clone, Copy)]
struct Pinned {
    /// Its name on the mirror and on disk.
    name: &'static str,
    /// Bytes of its content, decompressed.
    content_bytes: u64,
    /// SHA-256 of its content, decompressed, in hexadecimal.
    sha256: &'static str,
}

impl Pinned {
    /// Gzip adds less than a thousandth to bytes that it cannot compress.
    fn most_bytes(&self) -> u64 {
        self.content_bytes + self.content_bytes / 1000 + 1024
    }
}

const MNIST: [Pinned; 4] = [
    Pinned {
        name: "train-images-idx3-ubyte.gz",
        content_bytes: 47_040_016,
        sha256: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    },
    Pinned {
        name: "train-labels-idx1-ubyte.gz",
        content_bytes: 60_008,
        sha256: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    },
    Pinned {
        name: "t10k-images-idx3-ubyte.gz",
        content_bytes: 7_840_016,
        sha256: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    },
    Pinned {
        name: "t10k-labels-idx1-ubyte.gz",
        content_bytes: 10_008,
        sha256: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
];

/// How a download stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FetchProgress {
    /// The file was there already, with the right content.
    Present {
        /// The file's name.
        file: &'static str,
    },
    /// Bytes are arriving.
    Receiving {
        /// The file's name.
        file: &'static str,
        /// Bytes on disk so far, those of an earlier attempt included.
        received_bytes: u64,
        /// Bytes in the end, if the mirror says so.
        total_bytes: Option<u64>,
    },
    /// An attempt failed; another follows after a pause.
    Retrying {
        /// The file's name.
        file: &'static str,
        /// What failed.
        reason: String,
        /// The pause, in milliseconds.
        pause_milliseconds: u64,
    },
    /// The file is in place, and its content is right.
    Verified {
        /// The file's name.
        file: &'static str,
    },
}

/// Why a download failed. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The mirror cannot be reached, or breaks off every time.
    #[error("{url}: {reason}, after {attempts} attempts; check the network and run the command again, it resumes; or put the file into {} by hand", into.display())]
    Unreachable {
        /// The file's address.
        url: String,
        /// What the last attempt met.
        reason: String,
        /// How many attempts were made.
        attempts: u32,
        /// Where the file belongs.
        into: PathBuf,
    },
    /// The mirror refuses the file.
    #[error("{url}: the mirror answers {status}; give another mirror")]
    Refused {
        /// The file's address.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// The mirror serves something else.
    #[error("{url}: {problem}; nothing was kept, give another mirror")]
    WrongContent {
        /// The file's address.
        url: String,
        /// In which way the content is wrong.
        problem: String,
    },
    /// A file on this machine cannot be written or read.
    #[error("{}: cannot be written ({cause})", path.display())]
    Disk {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
}

/// Downloads MNIST's four gzip files from `mirror_base_url` into the folder `into`, which is made if need be.
///
/// A file that is there with the right content is left alone. A broken download stays as `NAME.part` and is
/// resumed, by this call or a later one. Blocks; an agent's proxy settings come from the environment.
///
/// # Errors
/// A [`FetchError`] for the first file that cannot be had.
pub fn fetch_mnist(
    mirror_base_url: &str,
    into: &Path,
    progress: &mut dyn FnMut(FetchProgress),
) -> Result<(), FetchError> {
    let agent = agent(Agent::config_builder());
    fetch(&agent, mirror_base_url, into, &MNIST, FIRST_PAUSE, progress)
}

fn agent(builder: ureq::config::ConfigBuilder<ureq::typestate::AgentScope>) -> Agent {
    builder
        .http_status_as_error(false)
        .accept_encoding("identity")
        .timeout_connect(Some(Duration::from_secs(15)))
        .timeout_recv_response(Some(Duration::from_secs(30)))
        .timeout_per_read(Some(Duration::from_secs(30)))
        .build()
        .into()
}

fn fetch(
    agent: &Agent,
    mirror: &str,
    into: &Path,
    files: &[Pinned],
    first_pause: Duration,
    progress: &mut dyn FnMut(FetchProgress),
) -> Result<(), FetchError> {
    std::fs::create_dir_all(into).map_err(disk(into))?;
    for pinned in files {
        fetch_one(agent, mirror, into, pinned, first_pause, progress)?;
    }
    Ok(())
}

/// What became of one attempt.
enum Attempt {
    /// All bytes that the mirror announced are on disk.
    Complete,
    /// It may go better next time; the bytes so far are kept.
    Broken(String),
    /// What is on disk cannot be continued.
    Stale(String),
    /// It will not go better.
    Failed(FetchError),
}

/// What is in a file.
enum Content {
    Right,
    Truncated,
    Wrong(String),
}

fn fetch_one(
    agent: &Agent,
    mirror: &str,
    into: &Path,
    pinned: &Pinned,
    first_pause: Duration,
    progress: &mut dyn FnMut(FetchProgress),
) -> Result<(), FetchError> {
    let target = into.join(pinned.name);
    let part = into.join(format!("{}.part", pinned.name));
    let url = format!("{}/{}", mirror.trim_end_matches('/'), pinned.name);
    if target.exists() && matches!(inspect(&target, pinned)?, Content::Right) {
        progress(FetchProgress::Present { file: pinned.name });
        return Ok(());
    }
    let mut pause = first_pause;
    let mut reason = String::new();
    for attempt in 1..=ATTEMPTS {
        if attempt > 1 {
            let pause_milliseconds = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
            let reason = reason.clone();
            progress(FetchProgress::Retrying { file: pinned.name, reason, pause_milliseconds });
            std::thread::sleep(pause);
            pause = pause.saturating_mul(2);
        }
        let resumed_bytes = std::fs::metadata(&part).map_or(0, |metadata| metadata.len());
        match attempt_one(agent, &url, &part, resumed_bytes, pinned, progress)? {
            Attempt::Failed(error) => return Err(error),
            Attempt::Broken(why) => {
                reason = why;
                continue;
            }
            Attempt::Stale(why) => {
                std::fs::remove_file(&part).map_err(disk(&part))?;
                reason = why;
                continue;
            }
            Attempt::Complete => {}
        }
        match inspect(&part, pinned)? {
            Content::Right => {
                std::fs::rename(&part, &target).map_err(disk(&target))?;
                progress(FetchProgress::Verified { file: pinned.name });
                return Ok(());
            }
            Content::Truncated => reason = "the file breaks off".to_owned(),
            Content::Wrong(problem) => {
                std::fs::remove_file(&part).map_err(disk(&part))?;
                // The fault may lie in the bytes of an earlier download: once more, from the start.
                if resumed_bytes == 0 {
                    return Err(FetchError::WrongContent { url, problem });
                }
                reason = problem;
            }
        }
    }
    Err(FetchError::Unreachable { url, reason, attempts: ATTEMPTS, into: into.to_path_buf() })
}

/// One request, from `resumed_bytes` on, appended to `part`.
fn attempt_one(
    agent: &Agent,
    url: &str,
    part: &Path,
    resumed_bytes: u64,
    pinned: &Pinned,
    progress: &mut dyn FnMut(FetchProgress),
) -> Result<Attempt, FetchError> {
    let mut request = agent.get(url);
    if resumed_bytes > 0 {
        request = request.header(header::RANGE, format!("bytes={resumed_bytes}-"));
    }
    let mut response = match request.call() {
        Ok(response) => response,
        Err(error) => return Ok(Attempt::Broken(error.to_string())),
    };
    let status = response.status();
    let start = match status {
        StatusCode::OK => 0,
        StatusCode::PARTIAL_CONTENT if range_start(&response) == Some(resumed_bytes) => resumed_bytes,
        StatusCode::PARTIAL_CONTENT => return Ok(Attempt::Stale("the mirror sent another range".to_owned())),
        // Nothing is left to send: complete, or longer than the mirror's file; the digest tells.
        StatusCode::RANGE_NOT_SATISFIABLE if resumed_bytes > 0 => {
            return Ok(match inspect(part, pinned)? {
                Content::Right => Attempt::Complete,
                _ => Attempt::Stale("the earlier download does not fit the mirror's file".to_owned()),
            });
        }
        status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
            return Ok(Attempt::Broken(format!("the mirror answers {}", status.as_u16())));
        }
        status => {
            return Ok(Attempt::Failed(FetchError::Refused { url: url.to_owned(), status: status.as_u16() }));
        }
    };
    let total_bytes = response.body().content_length().map(|rest| start.saturating_add(rest));
    let too_long = |bytes: u64| {
        let problem =
            format!("at least {bytes} bytes are offered, {} is the most possible", pinned.most_bytes());
        Attempt::Failed(FetchError::WrongContent { url: url.to_owned(), problem })
    };
    if let Some(total) = total_bytes.filter(|total| *total > pinned.most_bytes()) {
        return Ok(too_long(total));
    }

    let mut options = OpenOptions::new();
    options.create(true).write(true);
    let options = if start > 0 { options.append(true) } else { options.truncate(true) };
    let mut file = options.open(part).map_err(disk(part))?;
    let mut received_bytes = start;
    let mut block = vec![0; BLOCK_BYTES];
    let mut body = response.body_mut().as_reader();
    let broken = loop {
        progress(FetchProgress::Receiving { file: pinned.name, received_bytes, total_bytes });
        match body.read(&mut block) {
            Ok(0) => break None,
            Ok(count) => {
                received_bytes += count as u64;
                if received_bytes > pinned.most_bytes() {
                    drop(file);
                    std::fs::remove_file(part).map_err(disk(part))?;
                    return Ok(too_long(received_bytes));
                }
                file.write_all(block.get(..count).unwrap_or_default()).map_err(disk(part))?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break Some(error.to_string()),
        }
    };
    file.sync_all().map_err(disk(part))?;
    Ok(match broken {
        Some(reason) => Attempt::Broken(reason),
        None if total_bytes.is_some_and(|total| received_bytes < total) => {
            Attempt::Broken("the mirror broke off".to_owned())
        }
        None => Attempt::Complete,
    })
}

/// Where the bytes of a partial answer begin: `Content-Range: bytes START-END/TOTAL`.
fn range_start<T>(response: &Response<T>) -> Option<u64> {
    let value = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    value.strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok()
}

/// Compares a file's content with its pin; decompresses no further than the pinned length and one byte.
fn inspect(path: &Path, pinned: &Pinned) -> Result<Content, FetchError> {
    let file = File::open(path).map_err(disk(path))?;
    let mut reader = MultiGzDecoder::new(BufReader::new(file)).take(pinned.content_bytes + 1);
    let mut hasher = Sha256::new();
    let mut block = vec![0; BLOCK_BYTES];
    let mut bytes = 0u64;
    loop {
        match reader.read(&mut block) {
            Ok(0) => break,
            Ok(count) => {
                bytes += count as u64;
                hasher.update(block.get(..count).unwrap_or_default());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Content::Truncated),
            Err(error) => {
                return Ok(Content::Wrong(format!("it is not the gzip file it should be ({error})")));
            }
        }
    }
    if bytes != pinned.content_bytes {
        let problem = format!("its content has not the {} bytes it should have", pinned.content_bytes);
        return Ok(Content::Wrong(problem));
    }
    let found: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(if found == pinned.sha256 {
        Content::Right
    } else {
        Content::Wrong(format!("its content has SHA-256 {found}, not {}", pinned.sha256))
    })
}

/// Names the path in an error of the operating system.
fn disk(path: &Path) -> impl FnOnce(io::Error) -> FetchError + '_ {
    move |cause| FetchError::Disk { path: path.to_path_buf(), cause }
}

#[cfg(test)]
mod tests;
