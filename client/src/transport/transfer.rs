//! Models in and updates out: chunks with digests, resumed where the link broke.

use std::io::{self, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use prost::bytes::BytesMut;
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tributary_common::digest::Digest;
use tributary_common::limits::CHUNK_BYTES;
use tributary_common::model::{Parameters, from_bytes};
use tributary_proto::coordinator as wire;
use tributary_proto::{WireError, chunk, chunk_data};

use super::{Backoff, Dialer, os_random, status_line};
use crate::machine::{Attempt, Kept};

/// Longest wait for the next message of a transfer.
const STALL_SECONDS: u64 = 60;
/// Damaged chunks or wholes before a transfer is given up: TLS lets none through by chance.
const DAMAGE_TRIES: u32 = 3;
/// Chunks read ahead of the connection.
const CHUNKS_AHEAD: usize = 2;

/// Why one try ended.
enum Trouble {
    /// The link broke: try again where it broke.
    Broken(String),
    /// What came is not what was promised: try again, a few times.
    Damaged(String),
    /// Trying again will not help.
    Refused(String),
}

impl From<tonic::Status> for Trouble {
    fn from(status: tonic::Status) -> Self {
        let line = status_line(&status);
        match status.code() {
            Code::InvalidArgument | Code::NotFound | Code::PermissionDenied | Code::Unauthenticated => {
                Self::Refused(line)
            }
            Code::FailedPrecondition | Code::OutOfRange | Code::Unimplemented | Code::AlreadyExists => {
                Self::Refused(line)
            }
            _ => Self::Broken(line),
        }
    }
}

impl From<WireError> for Trouble {
    fn from(error: WireError) -> Self {
        Self::Damaged(error.to_string())
    }
}

/// The tries of one transfer.
#[derive(Default)]
struct Tries {
    backoff: Backoff,
    damages: u32,
    /// Whether the present try got further than the one before.
    progressed: bool,
}

impl Tries {
    /// Waits until the next try is due; an error if there shall be none.
    async fn wait(&mut self, dialer: &Dialer, what: &str, trouble: Trouble) -> Result<(), String> {
        let line = match trouble {
            Trouble::Refused(line) => return Err(line),
            Trouble::Damaged(line) => {
                self.damages += 1;
                if self.damages >= DAMAGE_TRIES {
                    return Err(line);
                }
                line
            }
            Trouble::Broken(line) => line,
        };
        if std::mem::take(&mut self.progressed) {
            self.backoff.progress();
        }
        let wait = self.backoff.next(os_random());
        tracing::warn!("{what} was interrupted ({line}); it goes on in {:.1} s", wait.as_secs_f64());
        tokio::time::sleep(wait).await;
        dialer.until_up().await;
        Ok(())
    }
}

/// Gets the model with digest `model` and `bytes` bytes, over as many connections as it takes.
///
/// What has arrived lies in the file `part`; an earlier call's part is taken up. Dropping the future stops it.
///
/// # Errors
/// One line, if trying again will not help.
pub async fn fetch(dialer: &Dialer, part: &Path, model: Digest, bytes: u64) -> Result<Parameters, String> {
    let mut tries = Tries::default();
    while let Err(trouble) = fetch_once(dialer, part, model, bytes, &mut tries.progressed).await {
        tries.wait(dialer, "fetching the model", trouble).await?;
    }
    let whole = tokio::fs::read(part).await.map_err(|error| on_disk(part, &error))?;
    remove(part).await.map_err(|error| on_disk(part, &error))?;
    from_bytes(&whole).map(Arc::new).ok_or_else(|| "the model's length is not a multiple of 4 bytes".into())
}

async fn fetch_once(
    dialer: &Dialer,
    part: &Path,
    model: Digest,
    bytes: u64,
    progressed: &mut bool,
) -> Result<(), Trouble> {
    let disk = |error: io::Error| Trouble::Refused(on_disk(part, &error));
    let (mut hasher, mut offset) = read_part(part, bytes).await.map_err(disk)?;
    let mut file = OpenOptions::new().create(true).append(true).open(part).await.map_err(disk)?;
    if offset < bytes {
        let mut client = dialer.transfer().await.map_err(Trouble::Broken)?;
        let request = wire::FetchRequest { model: model.0.to_vec(), offset };
        let mut chunks = in_time(client.fetch(request)).await?.into_inner();
        while offset < bytes {
            let next = in_time(chunks.message()).await?;
            let chunk = next.ok_or_else(|| Trouble::Broken(format!("ended at byte {offset} of {bytes}")))?;
            let data = chunk_data(chunk, offset, bytes)?;
            file.write_all(&data).await.map_err(disk)?;
            hasher.update(&data);
            offset += data.len() as u64;
            *progressed = true;
        }
        file.flush().await.map_err(disk)?;
    }
    if Digest::from(hasher.finalize()) != model {
        remove(part).await.map_err(disk)?;
        return Err(Trouble::Damaged("the model that arrived does not have its digest".into()));
    }
    Ok(())
}

/// Hashes what is there already; a part that cannot be one is deleted.
async fn read_part(part: &Path, bytes: u64) -> io::Result<(blake3::Hasher, u64)> {
    let mut hasher = blake3::Hasher::new();
    let file = match File::open(part).await {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((hasher, 0)),
        Err(error) => return Err(error),
    };
    let there = file.metadata().await?.len();
    if there > bytes {
        remove(part).await?;
        return Ok((hasher, 0));
    }
    let file = file.into_std().await;
    let hashed = tokio::task::spawn_blocking(move || {
        hasher.update_reader(file)?;
        Ok::<_, io::Error>(hasher)
    });
    Ok((hashed.await.map_err(io::Error::other)??, there))
}

/// Sends the kept update in the file `path` for an attempt, over as many connections as it takes.
///
/// Dropping the future stops it.
///
/// # Errors
/// One line, if the coordinator does not want the update.
pub async fn upload(dialer: &Dialer, path: &Path, at: Attempt, update: &Kept) -> Result<(), String> {
    let Attempt { run, round, attempt } = at;
    let digest = update.digest.ok_or("the update has no digest")?.0.to_vec();
    let (total_bytes, examples) = (update.bytes, update.examples);
    let header = wire::UploadHeader { run: run.0, round, attempt, digest, total_bytes, examples };
    let (mut tries, mut reached) = (Tries::default(), 0);
    while let Err(trouble) = upload_once(dialer, path, &header, &mut reached, &mut tries.progressed).await {
        tries.wait(dialer, "sending the update", trouble).await?;
    }
    Ok(())
}

async fn upload_once(
    dialer: &Dialer,
    path: &Path,
    header: &wire::UploadHeader,
    reached: &mut u64,
    progressed: &mut bool,
) -> Result<(), Trouble> {
    let total_bytes = header.total_bytes;
    let mut client = dialer.transfer().await.map_err(Trouble::Broken)?;
    let status = in_time(client.upload_status(header.clone())).await?.into_inner();
    if let Some(decided) = decided(&status) {
        return decided;
    }
    let offset = status.received_bytes;
    if offset > total_bytes {
        return Err(Trouble::Damaged(format!("the coordinator says it has {offset} of {total_bytes} bytes")));
    }
    *progressed = offset > *reached;
    *reached = offset;
    let mut file = File::open(path).await.map_err(|error| Trouble::Refused(on_disk(path, &error)))?;
    file.seek(SeekFrom::Start(offset)).await.map_err(|error| Trouble::Refused(on_disk(path, &error)))?;
    let (sender, parts) = mpsc::channel(CHUNKS_AHEAD);
    let (failure, mut failed) = oneshot::channel();
    let head = wire::upload_part::Part::Header(header.clone());
    let feeding = tokio::spawn(async move {
        if let Err(error) = feed(file, sender, head, offset, total_bytes).await {
            let _ = failure.send(error); // nobody waits: the transfer was stopped
        }
    });
    let answer = client.upload(ReceiverStream::new(parts)).await;
    feeding.abort();
    if let Ok(error) = failed.try_recv() {
        return Err(Trouble::Refused(on_disk(path, &error)));
    }
    let progress = answer?.into_inner();
    *progressed |= progress.received_bytes > offset;
    decided(&progress).unwrap_or_else(|| {
        Err(Trouble::Broken(format!(
            "the coordinator has {} of {total_bytes} bytes",
            progress.received_bytes
        )))
    })
}

/// Whether the coordinator's answer is the last word.
fn decided(progress: &wire::UploadProgress) -> Option<Result<(), Trouble>> {
    if progress.complete {
        return Some(Ok(()));
    }
    (!progress.wanted)
        .then(|| Err(Trouble::Refused("the coordinator does not want the update: the round is over".into())))
}

/// Reads the file from `offset` and queues its chunks, as fast as the connection takes them.
async fn feed(
    mut file: File,
    parts: mpsc::Sender<wire::UploadPart>,
    head: wire::upload_part::Part,
    mut offset: u64,
    total_bytes: u64,
) -> io::Result<()> {
    if parts.send(wire::UploadPart { part: Some(head) }).await.is_err() {
        return Ok(());
    }
    while offset < total_bytes {
        let length = usize::try_from(total_bytes - offset).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let mut data = BytesMut::zeroed(length);
        file.read_exact(&mut data).await?;
        let next = wire::upload_part::Part::Chunk(chunk(offset, data.freeze(), total_bytes));
        if parts.send(wire::UploadPart { part: Some(next) }).await.is_err() {
            return Ok(()); // the call ended: its answer says why
        }
        offset += length as u64;
    }
    Ok(())
}

async fn in_time<T>(call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, Trouble> {
    match timeout(Duration::from_secs(STALL_SECONDS), call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Trouble::Broken(format!("nothing came for {STALL_SECONDS} s"))),
    }
}

async fn remove(path: &Path) -> io::Result<()> {
    match tokio::fs::remove_file(path).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn on_disk(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}
