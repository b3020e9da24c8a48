//! Transfers: models to nodes and updates from them, in chunks that are checked and resumed.

mod staging;
#[cfg(test)]
mod tests;

pub use staging::{Staged, Staging, StagingError, Writer};

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use prost::bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;
use tributary_common::ids::NodeName;
use tributary_common::limits::CHUNK_BYTES;
use tributary_common::model::{Parameters, to_bytes};
use tributary_common::record::UploadKey;
use tributary_proto::Upload;
use tributary_proto::coordinator::upload_part::Part;
use tributary_proto::coordinator::{Chunk, FetchRequest, UploadHeader, UploadPart, UploadProgress};

use crate::driver::{Attempt, Current, Driver, Gone, Standing};
use crate::run::Update;

/// How long an upload may send nothing before its place is given to another.
const IDLE_SECONDS: u64 = 60;
/// How long an upload may wait for a place.
const WAIT_SECONDS: u64 = 60;
/// When an upload that found no place should come again.
const RETRY_SECONDS: u64 = 5;
/// The metadata key of a refusal for lack of room: seconds to wait, as a decimal number.
pub const RETRY_AFTER: &str = "retry-after-seconds";

/// Sends models and receives updates.
#[derive(Debug)]
pub struct Transfers {
    driver: Driver,
    staging: Arc<Staging>,
    /// Uploads that are received.
    receiving: Arc<Semaphore>,
    /// Those and the ones that wait to be.
    admitted: Arc<Semaphore>,
}

impl From<Gone> for Status {
    fn from(gone: Gone) -> Self {
        Self::unavailable(gone.to_string())
    }
}

impl From<StagingError> for Status {
    fn from(error: StagingError) -> Self {
        let words = error.to_string();
        match error {
            StagingError::AnotherUpdate(_) => Self::already_exists(words),
            StagingError::Chunk(_) | StagingError::Digest => Self::data_loss(words),
            StagingError::Replaced => Self::aborted(words),
            StagingError::Io { .. } => {
                tracing::error!("cannot stage an upload: {words}");
                Self::unavailable("the coordinator cannot store the upload; its log says why")
            }
        }
    }
}

/// The place of one upload, given back when it is dropped.
#[derive(Debug)]
struct Place {
    _receiving: OwnedSemaphorePermit,
    _admitted: OwnedSemaphorePermit,
}

impl Transfers {
    /// Receives up to `uploads_in_flight` uploads at once, in `folder` where `staging_memory_bytes` do not
    /// suffice; as many again may wait. To be called in a tokio runtime.
    pub fn open(
        driver: Driver,
        folder: &Path,
        staging_memory_bytes: u64,
        uploads_in_flight: u32,
    ) -> Result<Self, StagingError> {
        let staging = Arc::new(Staging::open(folder, staging_memory_bytes)?);
        tokio::spawn(sweep(driver.current(), staging.clone()));
        let places = usize::try_from(uploads_in_flight).unwrap_or(usize::MAX >> 4).max(1);
        let (receiving, admitted) = (Arc::new(Semaphore::new(places)), Arc::new(Semaphore::new(2 * places)));
        Ok(Self { driver, staging, receiving, admitted })
    }

    /// The chunks of the active run's present model from an offset on, encoded one by one as they are sent.
    pub fn fetch(&self, request: &FetchRequest) -> Result<ModelChunks, Status> {
        let wanted = tributary_proto::digest("model", &request.model)?;
        let current = self.driver.current();
        let model =
            current.borrow().as_ref().filter(|current| current.digest == wanted).map(|c| c.model.clone());
        let model = model.ok_or_else(|| {
            Status::not_found(format!("model {} is not the present one of the active run", wanted.short()))
        })?;
        let total_bytes = model.len() as u64 * 4;
        if request.offset > total_bytes {
            let offset = request.offset;
            return Err(Status::out_of_range(format!(
                "offset {offset} is beyond the model's {total_bytes} bytes"
            )));
        }
        Ok(ModelChunks::new(model, request.offset))
    }

    /// Where an upload stands.
    pub async fn status(&self, node: &NodeName, header: &UploadHeader) -> Result<UploadProgress, Status> {
        let upload = tributary_proto::upload_header(header)?;
        match self.driver.standing(node, attempt_of(&upload)).await? {
            Standing::InSum => Ok(complete(&upload)),
            Standing::Unwanted => Ok(UNWANTED),
            Standing::Wanted => {
                self.check_length(&upload)?;
                let received = self.staging.received(&key_of(node, &upload), &upload)?;
                Ok(UploadProgress { received_bytes: received, complete: false, wanted: true })
            }
        }
    }

    /// Receives an upload: the header, then chunks from where [`Transfers::status`] says. When the last byte is
    /// here and the whole has its digest, it goes to the run. What is good stays when the stream breaks.
    pub async fn upload<S>(&self, node: &NodeName, mut parts: S) -> Result<UploadProgress, Status>
    where
        S: Stream<Item = Result<UploadPart, Status>> + Unpin,
    {
        let upload = match next(&mut parts).await?.and_then(|part| part.part) {
            Some(Part::Header(header)) => tributary_proto::upload_header(&header)?,
            Some(Part::Chunk(_)) | None => {
                return Err(Status::invalid_argument("an upload starts with its header"));
            }
        };
        let (attempt, key) = (attempt_of(&upload), key_of(node, &upload));
        match self.driver.standing(node, attempt).await? {
            Standing::InSum => return Ok(complete(&upload)),
            Standing::Unwanted => return Ok(UNWANTED),
            Standing::Wanted => self.check_length(&upload)?,
        }
        let mut current = self.driver.current();
        let received = tokio::select! {
            received = self.receive(&key, &upload, &mut parts) => received?,
            ended = over(&mut current, attempt) => return ended.map(|()| UNWANTED),
        };
        let Some(Received { staged, writer, place }) = received else {
            let received_bytes = self.staging.received(&key, &upload)?;
            return Ok(UploadProgress { received_bytes, complete: false, wanted: true });
        };
        let Staged { payload, reservation } = staged;
        let Upload { round, examples, total_bytes, digest, .. } = upload;
        let update =
            Update { node: node.clone(), round, examples, bytes: total_bytes, digest: Some(digest), payload };
        let standing = self.driver.update(attempt, update).await;
        self.staging.forget(&key, &writer);
        drop((reservation, place));
        Ok(if standing? == Standing::Unwanted { UNWANTED } else { complete(&upload) })
    }

    /// The whole update; `None` if the stream ended properly before its last byte.
    async fn receive<S>(
        &self,
        key: &UploadKey,
        upload: &Upload,
        parts: &mut S,
    ) -> Result<Option<Received>, Status>
    where
        S: Stream<Item = Result<UploadPart, Status>> + Unpin,
    {
        let place = self.place().await?;
        let writer = self.staging.writer(key, upload)?;
        while !writer.is_whole() {
            let chunk = match next(parts).await? {
                None => return Ok(None),
                Some(UploadPart { part: Some(Part::Chunk(chunk)) }) => chunk,
                Some(UploadPart { part: Some(Part::Header(_)) }) => {
                    return Err(Status::invalid_argument("an upload has one header"));
                }
                Some(UploadPart { part: None }) => {
                    return Err(Status::invalid_argument("a part of an upload is neither header nor chunk"));
                }
            };
            // Should the node go away meanwhile, the chunk is still added whole.
            let adding = writer.clone();
            blocking(move || adding.add(chunk)).await??;
        }
        let finishing = writer.clone();
        match blocking(move || finishing.finish()).await? {
            Ok(staged) => Ok(Some(Received { staged, writer, place })),
            Err(error) => {
                if matches!(error, StagingError::Digest) {
                    tracing::warn!(node = %key.node, "an update of {} does not have its digest", key.node);
                    self.staging.forget(key, &writer);
                }
                Err(error.into())
            }
        }
    }

    async fn place(&self) -> Result<Place, Status> {
        let full = || {
            let mut status = Status::resource_exhausted(format!(
                "too many uploads at once: try again in {RETRY_SECONDS} s"
            ));
            status.metadata_mut().insert(RETRY_AFTER, RETRY_SECONDS.into());
            status
        };
        let admitted = self.admitted.clone().try_acquire_owned().map_err(|_| full())?;
        let receiving = self.receiving.clone().acquire_owned();
        let receiving = tokio::time::timeout(Duration::from_secs(WAIT_SECONDS), receiving).await;
        let receiving = receiving.ok().and_then(Result::ok).ok_or_else(full)?;
        Ok(Place { _receiving: receiving, _admitted: admitted })
    }

    fn check_length(&self, upload: &Upload) -> Result<(), Status> {
        let current = self.driver.current();
        let expected = current.borrow().as_ref().filter(|c| c.run == upload.run).map(|c| c.update_bytes);
        match expected {
            Some((least, most)) if !(least..=most).contains(&upload.total_bytes) => {
                Err(Status::invalid_argument(format!(
                    "total_bytes: {}, but an update of this job has {least} to {most}",
                    upload.total_bytes
                )))
            }
            _ => Ok(()),
        }
    }

    /// The uploads under way.
    pub fn staging(&self) -> &Staging {
        &self.staging
    }
}

struct Received {
    staged: Staged,
    writer: Writer,
    place: Place,
}

const UNWANTED: UploadProgress = UploadProgress { received_bytes: 0, complete: false, wanted: false };

fn complete(upload: &Upload) -> UploadProgress {
    UploadProgress { received_bytes: upload.total_bytes, complete: true, wanted: true }
}

fn attempt_of(upload: &Upload) -> Attempt {
    Attempt { run: upload.run, round: upload.round, attempt: upload.attempt }
}

fn key_of(node: &NodeName, upload: &Upload) -> UploadKey {
    UploadKey { run: upload.run, round: upload.round, node: node.clone() }
}

async fn next<S>(parts: &mut S) -> Result<Option<UploadPart>, Status>
where
    S: Stream<Item = Result<UploadPart, Status>> + Unpin,
{
    match tokio::time::timeout(Duration::from_secs(IDLE_SECONDS), parts.next()).await {
        Ok(part) => part.transpose(),
        Err(_) => Err(Status::deadline_exceeded(format!("nothing arrived for {IDLE_SECONDS} s"))),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Status::from(Gone))
}

/// Returns when `attempt` is no longer open. The run's own message tells the node what became of it.
async fn over(current: &mut watch::Receiver<Option<Current>>, attempt: Attempt) -> Result<(), Status> {
    let over = |now: &Option<Current>| now.as_ref().and_then(|now| now.attempt) != Some(attempt);
    current.wait_for(over).await.map(drop).map_err(|_| Gone.into())
}

/// Drops what was staged for attempts that are over, until the driver ends.
async fn sweep(mut current: watch::Receiver<Option<Current>>, staging: Arc<Staging>) {
    while current.changed().await.is_ok() {
        let attempt = current.borrow_and_update().as_ref().and_then(|current| current.attempt);
        staging.keep_only(attempt);
    }
}

/// A model's chunks, in order.
#[derive(Debug)]
pub struct ModelChunks {
    model: Parameters,
    at: u64,
}

impl ModelChunks {
    /// The chunks of `model` from byte `offset` on; none where that is its end or beyond.
    pub fn new(model: Parameters, offset: u64) -> Self {
        Self { model, at: offset }
    }
}

impl Iterator for ModelChunks {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        let total_bytes = self.model.len() as u64 * 4;
        let end = total_bytes.min(self.at.saturating_add(CHUNK_BYTES as u64));
        let index = |byte: u64| usize::try_from(byte).ok();
        // The values that the chunk's bytes are in; its ends may lie within a value.
        let values = self.model.get(index(self.at / 4)?..index(end.div_ceil(4))?)?;
        let skip = index(self.at % 4)?;
        let length = index(end - self.at).filter(|length| *length > 0)?;
        let data = Bytes::from(to_bytes(values)).slice(skip..skip + length);
        let chunk = tributary_proto::chunk(self.at, data, total_bytes);
        self.at = end;
        Some(chunk)
    }
}
