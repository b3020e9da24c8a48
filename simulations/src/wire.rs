//! `--transport wire`: what would cross a network crosses its encoding, in one process.
//!
//! Every message becomes protobuf bytes and is read again by the code that reads it in a real federation: the
//! chunks with their digests, the assembly of updates ([`Staging`]), the checked conversions of `tributary-proto`,
//! the coordinator's [`to_wire`] and the node's [`read`]. Only sockets and TLS are missing.

use std::sync::Arc;

use prost::Message as _;
use prost::bytes::Bytes;
use tributary_client::machine::{Attempt, Input as NodeInput, Kept};
use tributary_client::transport::read;
use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::{Job, JobError};
use tributary_common::limits::{CHUNK_BYTES, MESSAGE_BYTES};
use tributary_common::model::{Parameters, from_bytes};
use tributary_common::record::{Reason, UploadKey};
use tributary_common::time::Time;
use tributary_proto::coordinator::coordinator_message::Message as FromCoordinator;
use tributary_proto::coordinator::node_message::Message as FromNode;
use tributary_proto::coordinator::upload_part::Part;
use tributary_proto::coordinator::{
    Chunk, CoordinatorMessage, Decline, EvaluationReport, FetchRequest, Masking, Metrics, NodeMessage,
    UploadHeader, UploadPart,
};
use tributary_proto::{WireError, chunk, chunk_data};
use tributary_server::driver::ToNode;
use tributary_server::grpc::to_wire;
use tributary_server::round::Input as RunInput;
use tributary_server::run::Update;
use tributary_server::transfer::{ModelChunks, Staged, Staging, StagingError};

/// What a message would not survive. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum CrossingError {
    /// The bytes are no message.
    #[error("not a message of the protocol: {0}")]
    Message(#[from] prost::DecodeError),
    /// A message is longer than gRPC would take.
    #[error("a message of {0} bytes is longer than the {MESSAGE_BYTES} that a peer takes")]
    Long(usize),
    /// A field breaks the protocol.
    #[error(transparent)]
    Field(#[from] WireError),
    /// The coordinator does not take a part of an update.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// A whole is not what was announced.
    #[error("the model that arrived does not have its digest")]
    Digest,
    /// Parts are missing or in the wrong place.
    #[error("{0}")]
    Parts(&'static str),
}

/// The network between the coordinator and its nodes.
#[derive(Debug)]
pub(crate) struct Wire {
    run: RunId,
    job_toml: Arc<str>,
    staging: Staging,
    /// The model that the last node got, as it arrived: nodes with the same one share it, so that memory does not
    /// grow with the cohort.
    arrived: Option<(Digest, Parameters)>,
}

impl Wire {
    /// A network for the run `run` of `job`.
    pub(crate) fn new(run: RunId, job: &Job) -> Result<Self, JobError> {
        Ok(Self { run, job_toml: job.to_toml()?.into(), staging: Staging::in_memory(), arrived: None })
    }

    /// What a node's machine gets at `now` of an input; an input that comes from the node itself crosses nothing.
    pub(crate) fn to_node(&self, now: Time, input: NodeInput) -> Result<NodeInput, CrossingError> {
        let job_toml = self.job_toml.clone();
        let message = match input {
            NodeInput::Invited { at: Attempt { run, round, attempt }, model, deadline, support, .. } => {
                ToNode::Invite { run, round, attempt, job_toml, model, deadline, support }
            }
            NodeInput::Dismissed { at: Attempt { run, round, attempt }, reason } => {
                ToNode::Dismiss { run, round, attempt, reason }
            }
            NodeInput::EvaluationAsked { key, model, .. } => {
                ToNode::Evaluate { run: key.run, round: key.round, job_toml, model }
            }
            own => return Ok(own),
        };
        let sent = CoordinatorMessage { message: Some(to_wire(message, now)) };
        let arrived = crossed(&sent)?.message.ok_or(CrossingError::Parts("an empty message"))?;
        Ok(read(arrived, now)?)
    }

    /// What a node gets at `now` of a message of an attempt's session.
    pub(crate) fn session_to_node(
        &self,
        now: Time,
        at: Attempt,
        message: Vec<u8>,
    ) -> Result<Vec<u8>, CrossingError> {
        let Attempt { run, round, attempt } = at;
        let sent = to_wire(ToNode::Masking { run, round, attempt, message }, now);
        match crossed(&CoordinatorMessage { message: Some(sent) })?.message {
            Some(FromCoordinator::Masking(Masking { run, round, attempt, message }))
                if (RunId(run), round, attempt) == (at.run, at.round, at.attempt) =>
            {
                Ok(message)
            }
            _ => Err(CrossingError::Parts("a message of another kind")),
        }
    }

    /// What the coordinator's core gets of a node's message.
    pub(crate) fn to_coordinator(&self, input: RunInput) -> Result<RunInput, CrossingError> {
        let run = self.run.0;
        let (node, message) = match input {
            RunInput::Declined { node, round, attempt, reason } => {
                let reason = tributary_proto::coordinator::Reason::from(reason).into();
                (node, FromNode::Decline(Decline { run, round, attempt, reason }))
            }
            RunInput::Evaluated { node, round, metrics } => {
                let metrics = Some(Metrics::from(&metrics));
                (node, FromNode::Evaluation(EvaluationReport { run, round, metrics }))
            }
            RunInput::Masking { node, round, attempt, message } => {
                (node, FromNode::Masking(Masking { run, round, attempt, message }))
            }
            own => return Ok(own),
        };
        match crossed(&NodeMessage { message: Some(message) })?.message {
            Some(FromNode::Decline(decline)) => {
                let reason = Reason::try_from(decline.reason())?;
                Ok(RunInput::Declined { node, round: decline.round, attempt: decline.attempt, reason })
            }
            Some(FromNode::Evaluation(report)) => {
                let metrics = report.metrics.as_ref().map(tributary_proto::metrics).transpose()?;
                let metrics = metrics.unwrap_or_default();
                Ok(RunInput::Evaluated { node, round: report.round, metrics })
            }
            Some(FromNode::Masking(Masking { round, attempt, message, .. })) => {
                Ok(RunInput::Masking { node, round, attempt, message })
            }
            _ => Err(CrossingError::Parts("a message of another kind")),
        }
    }

    /// The model that a node gets when it fetches `digest` and the coordinator has `model`.
    pub(crate) fn fetch(&mut self, digest: Digest, model: &Parameters) -> Result<Parameters, CrossingError> {
        let request = crossed(&FetchRequest { model: digest.0.to_vec(), offset: 0 })?;
        let wanted = tributary_proto::digest("model", &request.model)?;
        let frames = ModelChunks::new(model.clone(), request.offset).map(|chunk| frame(&chunk));
        let values = assemble(frames, wanted, model.len() as u64 * 4)?;
        match &self.arrived {
            Some((known, shared)) if *known == wanted => Ok(shared.clone()),
            _ => Ok(self.arrived.insert((wanted, Arc::new(values))).1.clone()),
        }
    }

    /// The update of `node` as the coordinator's core gets it: bytes with their digest.
    pub(crate) fn upload(
        &self,
        node: &NodeName,
        at: Attempt,
        kept: &Kept,
        bytes: Vec<u8>,
    ) -> Result<Update, CrossingError> {
        receive(&self.staging, node, parts(at, kept, bytes.into())?.into_iter())
    }
}

/// The bytes of a message on the wire.
fn frame(message: &impl prost::Message) -> Result<Bytes, CrossingError> {
    let bytes = message.encode_to_vec();
    if bytes.len() > MESSAGE_BYTES {
        return Err(CrossingError::Long(bytes.len()));
    }
    Ok(bytes.into())
}

/// A message encoded and read again.
fn crossed<M: prost::Message + Default>(message: &M) -> Result<M, CrossingError> {
    Ok(M::decode(frame(message)?)?)
}

/// The node's side of a fetch: the values of a model of `bytes` bytes, chunk after chunk, every digest checked.
fn assemble(
    frames: impl Iterator<Item = Result<Bytes, CrossingError>>,
    model: Digest,
    bytes: u64,
) -> Result<Vec<f32>, CrossingError> {
    let mut whole = Vec::new();
    for frame in frames {
        let data = chunk_data(Chunk::decode(frame?)?, whole.len() as u64, bytes)?;
        whole.extend_from_slice(&data);
    }
    if whole.len() as u64 != bytes || Digest::of(&whole) != model {
        return Err(CrossingError::Digest);
    }
    from_bytes(&whole).ok_or(CrossingError::Parts("a model is a whole number of values"))
}

/// The node's side of an upload: its header and its chunks.
fn parts(at: Attempt, kept: &Kept, bytes: Bytes) -> Result<Vec<Bytes>, CrossingError> {
    let Attempt { run, round, attempt } = at;
    let digest = kept.digest.ok_or(CrossingError::Parts("the update has no digest"))?.0.to_vec();
    let (total_bytes, examples) = (kept.bytes, kept.examples);
    let header = UploadHeader { run: run.0, round, attempt, digest, total_bytes, examples };
    let mut frames = vec![frame(&UploadPart { part: Some(Part::Header(header)) })?];
    for start in (0..bytes.len()).step_by(CHUNK_BYTES) {
        let data = bytes.slice(start..bytes.len().min(start + CHUNK_BYTES));
        let part = Part::Chunk(chunk(start as u64, data, total_bytes));
        frames.push(frame(&UploadPart { part: Some(part) })?);
    }
    Ok(frames)
}

/// The coordinator's side of an upload.
fn receive(
    staging: &Staging,
    node: &NodeName,
    mut frames: impl Iterator<Item = Bytes>,
) -> Result<Update, CrossingError> {
    let mut next = || frames.next().map(|frame| Ok::<_, CrossingError>(UploadPart::decode(frame)?.part));
    let Some(Some(Part::Header(header))) = next().transpose()? else {
        return Err(CrossingError::Parts("an upload starts with its header"));
    };
    let upload = tributary_proto::upload_header(&header)?;
    let key = UploadKey { run: upload.run, round: upload.round, node: node.clone() };
    let writer = staging.writer(&key, &upload)?;
    let mut finish = || {
        while !writer.is_whole() {
            let Some(Some(Part::Chunk(chunk))) = next().transpose()? else {
                return Err(CrossingError::Parts("an upload ends before its last byte"));
            };
            writer.add(chunk)?;
        }
        Ok(writer.finish()?)
    };
    let finished = finish();
    staging.forget(&key, &writer);
    let Staged { payload, reservation: _ } = finished?;
    let tributary_proto::Upload { round, examples, total_bytes, digest, .. } = upload;
    Ok(Update { node: node.clone(), round, examples, bytes: total_bytes, digest: Some(digest), payload })
}

#[cfg(test)]
mod tests {
    use tributary_common::model::{self, to_bytes};
    use tributary_server::run::Payload;

    use super::*;

    /// Three chunks, the last one short.
    fn values() -> Vec<f32> {
        (0..CHUNK_BYTES / 2 + 5).map(|at| at as f32 * 0.37 - 9.0).collect()
    }

    fn kept(values: &[f32]) -> (Attempt, Kept) {
        let digest = model::digest(values);
        let bytes = values.len() as u64 * 4;
        let kept = Kept {
            model: digest,
            digest: Some(digest),
            bytes,
            examples: 60,
            private: false,
            masked: false,
            stored: Time(0),
        };
        (Attempt { run: RunId(1), round: 2, attempt: 1 }, kept)
    }

    #[test]
    fn a_model_and_an_update_arrive_as_they_were_sent() {
        let values = Arc::new(values());
        let digest = model::digest(&values);
        let frames: Vec<_> = ModelChunks::new(values.clone(), 0).map(|chunk| frame(&chunk)).collect();
        assert_eq!(frames.len(), 3);
        assert_eq!(assemble(frames.into_iter(), digest, values.len() as u64 * 4).unwrap(), *values);

        let (at, kept) = kept(&values);
        let staging = Staging::in_memory();
        let name = "a".parse().unwrap();
        let update =
            receive(&staging, &name, parts(at, &kept, to_bytes(&values).into()).unwrap().into_iter())
                .unwrap();
        let Payload::Bytes(bytes) = &update.payload else { panic!("bytes crossed the wire") };
        assert_eq!(from_bytes(bytes).unwrap(), *values);
        assert_eq!((update.round, update.examples, update.digest), (2, 60, Some(digest)));
        assert!(staging.is_empty());
    }

    #[test]
    fn one_flipped_bit_anywhere_in_a_chunk_is_refused() {
        let values = Arc::new(values());
        let bytes = values.len() as u64 * 4;
        let digest = model::digest(&values);
        let chunks: Vec<Bytes> =
            ModelChunks::new(values.clone(), 0).map(|chunk| frame(&chunk).unwrap()).collect();
        let (at, kept) = kept(&values);
        let upload = parts(at, &kept, to_bytes(&values).into()).unwrap();
        let damaged = |frames: &[Bytes], which: usize, at: usize, bit: u8| -> Vec<Bytes> {
            let mut frames = frames.to_vec();
            let mut frame = frames[which].to_vec();
            frame[at] ^= 1 << bit;
            frames[which] = frame.into();
            frames
        };
        let staging = Staging::in_memory();
        let name = "a".parse().unwrap();
        for which in 0..3 {
            let length = chunks[which].len();
            // The framing at both ends, and some of the values.
            let places = (0..12).chain((1..20).map(|step| step * length / 20)).chain(length - 45..length);
            for place in places {
                let bit = (place % 8) as u8;
                let frames = damaged(&chunks, which, place, bit);
                assert!(assemble(frames.into_iter().map(Ok), digest, bytes).is_err(), "{which}, {place}");
                // The first part is the header, whose fields TLS protects.
                let place = place.min(upload[which + 1].len() - 1);
                let frames = damaged(&upload, which + 1, place, bit);
                assert!(receive(&staging, &name, frames.into_iter()).is_err(), "{which}, {place}");
                assert!(staging.is_empty());
            }
        }
        let missing = chunks.iter().take(2).cloned().map(Ok);
        assert!(matches!(assemble(missing, digest, bytes), Err(CrossingError::Digest)));
        let missing = upload.iter().take(3).cloned();
        assert!(matches!(receive(&staging, &name, missing), Err(CrossingError::Parts(_))));
        assert!(matches!(
            assemble(chunks.into_iter().map(Ok), Digest::of(b""), bytes),
            Err(CrossingError::Digest)
        ));
    }
}
