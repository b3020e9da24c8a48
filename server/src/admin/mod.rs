//! What an operator commands, over a Unix socket that only the coordinator's own user may open.

mod socket;
#[cfg(test)]
mod tests;

pub use socket::{SocketError, connect, listen};

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Iter, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::Job;
use tributary_common::limits::{CHUNK_BYTES, MESSAGE_BYTES};
use tributary_common::model::export;
use tributary_common::time::Clock;
use tributary_proto::admin as wire;
use tributary_proto::admin::admin_server::{Admin, AdminServer};
use tributary_proto::admin::submit_part::Part;
use tributary_proto::node_name;

use crate::authority::Authority;
use crate::backup;
use crate::driver::{Driver, Gone, StopError, SubmitError, WatchError};
use crate::enrolment::create_token;
use crate::identity::Identities;
use crate::round::Role;
use crate::store::{SledStore, Store, StoreError, StoredRun};

/// Longest validity of a token: 30 days.
const TOKEN_SECONDS: u32 = 30 * 86_400;
/// Room for names and shapes in a `.safetensors` file, beside the model's own bytes.
const SAFETENSORS_HEADER_BYTES: u64 = 1 << 20;
/// Events between a watch and its connection.
const WATCH_QUEUE: usize = 16;
/// Parts of a backup between the disk and its connection.
const BACKUP_QUEUE: usize = 4;

/// The Admin service.
#[derive(Debug)]
pub struct AdminService {
    driver: Driver,
    identities: Arc<Identities>,
    authority: Arc<Authority>,
    /// What a backup is made of: the store, and the folder around it.
    durable: Option<(Arc<SledStore>, PathBuf)>,
}

impl AdminService {
    /// Commands `driver`, and enrols and revokes nodes in `identities` under `authority`.
    pub fn new(driver: Driver, identities: Arc<Identities>, authority: Arc<Authority>) -> Self {
        Self { driver, identities, authority, durable: None }
    }

    /// Makes backups of `store`, which is the driver's, and of what lies beside it in `data_dir`.
    pub fn with_backups(self, store: Arc<SledStore>, data_dir: PathBuf) -> Self {
        Self { durable: Some((store, data_dir)), ..self }
    }

    /// As a tonic service.
    pub fn into_server(self) -> AdminServer<Self> {
        AdminServer::new(self).max_decoding_message_size(MESSAGE_BYTES)
    }

    /// Reads from the store, off the async threads.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&dyn Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Status> {
        let store = self.driver.store().clone();
        blocking(move || read(store.as_ref())).await?.map_err(store_status)
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Status::from(Gone))
}

fn store_status(error: StoreError) -> Status {
    let words = error.to_string();
    match error {
        StoreError::Missing { .. } => Status::not_found(words),
        StoreError::Exists { .. } => Status::already_exists(words),
        _ => {
            tracing::error!("the store failed: {words}");
            Status::internal(words)
        }
    }
}

impl From<SubmitError> for Status {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Job(_) | SubmitError::Model(_) => Self::invalid_argument(error.to_string()),
            SubmitError::Random => Self::internal(error.to_string()),
            SubmitError::Store(error) => store_status(error),
            SubmitError::Gone(gone) => gone.into(),
        }
    }
}

impl From<StopError> for Status {
    fn from(error: StopError) -> Self {
        match error {
            StopError::Over(_) => Self::failed_precondition(error.to_string()),
            StopError::Store(error) => store_status(error),
            StopError::Gone(gone) => gone.into(),
        }
    }
}

impl From<WatchError> for Status {
    fn from(error: WatchError) -> Self {
        match error {
            WatchError::Store(error) => store_status(error),
            WatchError::Gone(gone) => gone.into(),
        }
    }
}

fn json(value: &impl serde::Serialize) -> Result<String, Status> {
    serde_json::to_string(value).map_err(|error| Status::internal(error.to_string()))
}

/// A run as it is listed.
fn run_to_wire(stored: &StoredRun) -> Result<wire::Run, Status> {
    // The store holds jobs that were checked; one of another version may still be unreadable here.
    let job = Job::parse(&stored.job_toml).ok();
    Ok(wire::Run {
        run: stored.run.0,
        name: job.as_ref().map_or_else(|| "(a job of another version)".to_owned(), |job| job.name.clone()),
        state_json: json(&stored.head.state)?,
        published: stored.head.published,
        rounds: job.map_or(0, |job| job.rounds),
        submitted_unix_milliseconds: stored.submitted.0,
        model: stored.head.model.0.to_vec(),
    })
}

/// The model of a run's last published round, as the bytes of a `.safetensors` file.
fn exported(store: &dyn Store, run: RunId) -> Result<Vec<u8>, Status> {
    let refused = |error: &dyn std::fmt::Display| Status::internal(error.to_string());
    loop {
        let StoredRun { job_toml, head, .. } = store.run(run).map_err(store_status)?;
        let layout = Job::parse(&job_toml).and_then(|job| job.layout()).map_err(|error| refused(&error))?;
        let values = match store.model(head.model) {
            Ok(values) => values,
            // A round may have been published since the head was read, and the model before it deleted.
            Err(StoreError::Missing { .. })
                if store.run(run).map_err(store_status)?.head.model != head.model =>
            {
                continue;
            }
            Err(error) => return Err(store_status(error)),
        };
        return export(&layout, &values).map_err(|error| refused(&error));
    }
}

/// Parts of a file.
#[derive(Debug)]
pub struct Parts {
    bytes: Vec<u8>,
    at: usize,
}

impl Iterator for Parts {
    type Item = Result<wire::ModelPart, Status>;

    fn next(&mut self) -> Option<Self::Item> {
        let end = self.bytes.len().min(self.at + CHUNK_BYTES);
        let data = self.bytes.get(self.at..end).filter(|data| !data.is_empty())?.to_vec();
        self.at = end;
        Some(Ok(wire::ModelPart { data }))
    }
}

/// Sends what is written to it as parts of a file. It blocks: off the async threads.
struct Sending(mpsc::Sender<Result<wire::ModelPart, Status>>);

impl std::io::Write for Sending {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let data = bytes.get(..CHUNK_BYTES).unwrap_or(bytes).to_vec();
        let sent = data.len();
        let gone =
            |_| std::io::Error::new(std::io::ErrorKind::BrokenPipe, "nobody takes the backup any more");
        self.0.blocking_send(Ok(wire::ModelPart { data })).map_err(gone)?;
        Ok(sent)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    type WatchRunStream = ReceiverStream<Result<wire::WatchRunEvent, Status>>;
    type ExportModelStream = Iter<Parts>;
    type ExportLedgerStream = Iter<Parts>;
    type BackupStream = ReceiverStream<Result<wire::ModelPart, Status>>;

    async fn create_token(
        &self,
        request: Request<wire::CreateTokenRequest>,
    ) -> Result<Response<wire::CreateTokenResponse>, Status> {
        let wire::CreateTokenRequest { node, valid_seconds } = request.into_inner();
        let node = node_name("node", &node)?;
        if !(1..=TOKEN_SECONDS).contains(&valid_seconds) {
            let most = TOKEN_SECONDS / 3600;
            return Err(Status::invalid_argument(format!("a token is valid for up to {most} hours")));
        }
        let expires = Clock.now().plus_seconds(valid_seconds);
        let (store, authority) = (self.driver.store().clone(), self.authority.clone());
        let make =
            move || create_token(store.as_ref(), &authority, &node, expires).map(|token| (node, token));
        let (node, token) = blocking(make).await?.map_err(|error| Status::internal(error.to_string()))?;
        tracing::info!(%node, "made a token for node {node}");
        let expires_unix_seconds = expires.0 / 1000;
        Ok(Response::new(wire::CreateTokenResponse { token: token.to_string(), expires_unix_seconds }))
    }

    async fn list_nodes(
        &self,
        _: Request<wire::ListNodesRequest>,
    ) -> Result<Response<wire::ListNodesResponse>, Status> {
        let connected = self.driver.nodes().await?;
        let role_of = |name: &NodeName| {
            let at = connected.binary_search_by(|(node, _)| node.cmp(name)).ok()?;
            connected.get(at).map(|(_, role)| *role)
        };
        let nodes = self.identities.nodes().into_iter().map(|record| {
            let role = role_of(&record.name);
            wire::Node {
                name: record.name.to_string(),
                identity: record.identity.to_string(),
                connected: role.is_some(),
                revoked: record.revoked.is_some(),
                enrolled_unix_seconds: record.enrolled.0 / 1000,
                expires_unix_seconds: record.expires.0 / 1000,
                role: match role {
                    Some(Role::Trainer) => "trainer".to_owned(),
                    Some(Role::Evaluator) => "evaluator".to_owned(),
                    None => String::new(),
                },
            }
        });
        Ok(Response::new(wire::ListNodesResponse { nodes: nodes.collect() }))
    }

    async fn revoke_node(
        &self,
        request: Request<wire::RevokeNodeRequest>,
    ) -> Result<Response<wire::RevokeNodeResponse>, Status> {
        let node = node_name("node", &request.get_ref().node)?;
        let identities = self.identities.clone();
        blocking(move || identities.revoke(&node, Clock.now())).await?.map_err(store_status)?;
        Ok(Response::new(wire::RevokeNodeResponse {}))
    }

    async fn accept_ledger(
        &self,
        request: Request<wire::AcceptLedgerRequest>,
    ) -> Result<Response<wire::AcceptLedgerResponse>, Status> {
        let node = node_name("node", &request.get_ref().node)?;
        let store = self.driver.store().clone();
        let accept = move || match store.node(&node)? {
            // No head at all: the next one that the node shows begins anew. Those before are in the runs' ledgers.
            Some(_) => store.put_ledger_head(&node, &[]),
            None => Err(StoreError::Missing { what: "node", name: node.to_string() }),
        };
        blocking(accept).await?.map_err(store_status)?;
        Ok(Response::new(wire::AcceptLedgerResponse {}))
    }

    async fn submit_run(
        &self,
        request: Request<Streaming<wire::SubmitPart>>,
    ) -> Result<Response<wire::SubmitRunResponse>, Status> {
        let mut parts = request.into_inner();
        let Some(wire::SubmitPart { part: Some(Part::JobToml(job_toml)) }) = parts.message().await? else {
            return Err(Status::invalid_argument("a submission starts with the job"));
        };
        let job = Job::parse(&job_toml).map_err(SubmitError::Job)?;
        let parameters = job.layout().map_err(SubmitError::Job)?.parameters() as u64;
        let most = 4 * parameters + SAFETENSORS_HEADER_BYTES;
        let mut initial: Option<Vec<u8>> = None;
        while let Some(part) = parts.next().await.transpose()? {
            let Some(Part::Model(bytes)) = part.part else {
                return Err(Status::invalid_argument(
                    "after the job comes the initial model, and nothing else",
                ));
            };
            let model = initial.get_or_insert_default();
            if (model.len() + bytes.len()) as u64 > most {
                return Err(Status::invalid_argument(format!(
                    "the initial model is refused: it is larger than {most} bytes, but the job's model has {parameters} parameters"
                )));
            }
            model.extend(bytes);
        }
        let run = self.driver.submit(job_toml, initial).await?;
        Ok(Response::new(wire::SubmitRunResponse { run: run.0 }))
    }

    async fn list_runs(
        &self,
        _: Request<wire::ListRunsRequest>,
    ) -> Result<Response<wire::ListRunsResponse>, Status> {
        let runs = self.read(|store| store.runs()).await?;
        let runs = runs.iter().map(run_to_wire).collect::<Result<_, _>>()?;
        Ok(Response::new(wire::ListRunsResponse { runs }))
    }

    async fn show_run(
        &self,
        request: Request<wire::ShowRunRequest>,
    ) -> Result<Response<wire::ShowRunResponse>, Status> {
        let run = RunId(request.get_ref().run);
        let read =
            move |store: &dyn Store| Ok((store.run(run)?, store.rounds(run)?, store.evaluations(run)?));
        let (stored, rounds, evaluations) = self.read(read).await?;
        Ok(Response::new(wire::ShowRunResponse {
            run: Some(run_to_wire(&stored)?),
            job_toml: stored.job_toml,
            round_records_json: rounds.iter().map(json).collect::<Result<_, _>>()?,
            evaluation_records_json: evaluations.iter().map(json).collect::<Result<_, _>>()?,
        }))
    }

    async fn watch_run(
        &self,
        request: Request<wire::WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        let mut events = self.driver.watch(RunId(request.get_ref().run));
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        tokio::spawn(async move {
            while let Some(watched) = events.recv().await {
                let event = watched.map_err(Status::from).and_then(|(at, event)| {
                    let at_unix_milliseconds = at.map_or(0, |at| at.0);
                    Ok(wire::WatchRunEvent { event_json: json(&event)?, at_unix_milliseconds })
                });
                // An error means that nobody watches any more.
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn stop_run(
        &self,
        request: Request<wire::StopRunRequest>,
    ) -> Result<Response<wire::StopRunResponse>, Status> {
        self.driver.stop(RunId(request.get_ref().run)).await?;
        Ok(Response::new(wire::StopRunResponse {}))
    }

    async fn export_model(
        &self,
        request: Request<wire::ExportModelRequest>,
    ) -> Result<Response<Self::ExportModelStream>, Status> {
        let run = RunId(request.get_ref().run);
        let store = self.driver.store().clone();
        let bytes = blocking(move || exported(store.as_ref(), run)).await??;
        Ok(Response::new(tokio_stream::iter(Parts { bytes, at: 0 })))
    }

    async fn backup(
        &self,
        request: Request<wire::BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        let Some((store, data_dir)) = self.durable.clone() else {
            return Err(Status::unimplemented("this coordinator keeps nothing on a disk"));
        };
        let config_toml = request.into_inner().config_toml;
        let (parts, receiver) = mpsc::channel(BACKUP_QUEUE);
        tokio::task::spawn_blocking(move || {
            let out = std::io::BufWriter::with_capacity(CHUNK_BYTES, Sending(parts.clone()));
            if let Err(error) = backup::write(&store, &data_dir, &config_toml, Clock.now(), out) {
                tracing::error!("a backup failed: {error}");
                // An error means that nobody waits for it any more.
                let _ = parts.blocking_send(Err(Status::internal(error.to_string())));
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn export_ledger(
        &self,
        request: Request<wire::ExportLedgerRequest>,
    ) -> Result<Response<Self::ExportLedgerStream>, Status> {
        let export = self.driver.export_ledger(RunId(request.get_ref().run)).await?;
        let bytes = export.map_err(|error| Status::failed_precondition(error.to_string()))?.into_bytes();
        Ok(Response::new(tokio_stream::iter(Parts { bytes, at: 0 })))
    }
}
