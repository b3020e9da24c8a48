//! The commands that run the coordinator or talk to a running one.

use std::future::Future;
use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Channel;
use tributary_common::ids::RunId;
use tributary_common::job::Job;
use tributary_common::limits::CHUNK_BYTES;
use tributary_common::progress::{Line, Progress};
use tributary_common::record::RunEvent;
use tributary_common::time::Time;
use tributary_proto::admin as wire;
use tributary_proto::admin::admin_client::AdminClient;
use tributary_proto::admin::submit_part::Part;

use super::{ConfigArg, Failure, Format, LedgerCommand, NodesCommand, RunCommand, TokenCommand, print, show};
use crate::admin;
use crate::config::ServerConfig;

pub(super) fn serve(config: &ServerConfig) -> Result<(), Failure> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::failed)?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(Failure::failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::failed)?;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        tokio::spawn(async move {
            let mut stop = Some(stop);
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                match stop.take() {
                    Some(stop) => drop(stop.send(())),
                    None => {
                        tracing::warn!("a second signal: ending at once");
                        #[allow(clippy::exit)] // what a second signal asks for; the store survives it
                        std::process::exit(1);
                    }
                }
            }
        });
        let stopped = async {
            let _ = stopped.await;
        };
        crate::serve::serve(config, stopped).await.map_err(Failure::failed)
    })
}

/// Runs a command that talks to a coordinator.
pub(super) fn with_runtime(
    command: impl Future<Output = Result<ExitCode, Failure>>,
) -> Result<ExitCode, Failure> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::failed)?;
    runtime.block_on(command)
}

async fn connect(config: &ServerConfig) -> Result<AdminClient<Channel>, Failure> {
    admin::connect(&config.admin_socket()).await.map_err(Failure::failed)
}

async fn open(config: &ConfigArg) -> Result<AdminClient<Channel>, Failure> {
    connect(&config.load()?).await
}

pub(super) async fn token(command: TokenCommand) -> Result<ExitCode, Failure> {
    let TokenCommand::Create { name, valid_hours, format, config } = command;
    let config = config.load()?;
    let request = wire::CreateTokenRequest { node: name.to_string(), valid_seconds: valid_hours * 3600 };
    let created = connect(&config).await?.create_token(request).await?.into_inner();
    print(&show::token(format.format, &name, &config.public_url, &created))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn nodes(command: NodesCommand) -> Result<ExitCode, Failure> {
    match command {
        NodesCommand::List { format, config } => {
            let nodes = open(&config).await?.list_nodes(wire::ListNodesRequest {}).await?.into_inner().nodes;
            print(&show::nodes(format.format, &nodes))?;
        }
        NodesCommand::AcceptLedger { name, config } => {
            let request = wire::AcceptLedgerRequest { node: name.to_string() };
            open(&config).await?.accept_ledger(request).await?;
            print(&format!("the next ledger head of {name} begins anew\n"))?;
        }
        NodesCommand::Revoke { name, config } => {
            let request = wire::RevokeNodeRequest { node: name.to_string() };
            open(&config).await?.revoke_node(request).await?;
            print(&format!("revoked {name}\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn ledger(command: LedgerCommand) -> Result<ExitCode, Failure> {
    let LedgerCommand::Export { run, out, config } = command;
    let request = wire::ExportLedgerRequest { run: run.0 };
    let parts = open(&config).await?.export_ledger(request).await?.into_inner();
    let bytes = write_parts(parts, &out).await?;
    print(&format!("{} ({bytes} bytes)\n", out.display()))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn run(command: RunCommand) -> Result<ExitCode, Failure> {
    match command {
        RunCommand::Submit { job, initial_model, watch, format, config } => {
            let mut client = open(&config).await?;
            let run = submit(&mut client, &job, initial_model.as_deref()).await?;
            if watch {
                // The watch's lines alone are the output.
                let _ = writeln!(std::io::stderr(), "run {run} submitted");
                return follow(&mut client, run, format.format).await;
            }
            print(&show::submitted(format.format, run))?;
        }
        RunCommand::List { format, config } => {
            let runs = open(&config).await?.list_runs(wire::ListRunsRequest {}).await?.into_inner().runs;
            print(&show::runs(format.format, &runs)?)?;
        }
        RunCommand::Show { run, format, config } => {
            let shown =
                open(&config).await?.show_run(wire::ShowRunRequest { run: run.0 }).await?.into_inner();
            print(&show::run(format.format, &shown)?)?;
        }
        RunCommand::Watch { run, format, config } => {
            return follow(&mut open(&config).await?, run, format.format).await;
        }
        RunCommand::Stop { run, config } => {
            open(&config).await?.stop_run(wire::StopRunRequest { run: run.0 }).await?;
            print(&format!("stopped {run}\n"))?;
        }
        RunCommand::Export { run, out, config } => {
            let request = wire::ExportModelRequest { run: run.0 };
            let parts = open(&config).await?.export_model(request).await?.into_inner();
            let bytes = write_parts(parts, &out).await?;
            print(&format!("{} ({bytes} bytes)\n", out.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn submit(
    client: &mut AdminClient<Channel>,
    job_path: &Path,
    initial_model: Option<&Path>,
) -> Result<RunId, Failure> {
    let read = |path: &Path, error: std::io::Error| Failure::usage(format!("{}: {error}", path.display()));
    let job_toml = std::fs::read_to_string(job_path).map_err(|error| read(job_path, error))?;
    // Checked here too, so that the message names the file.
    Job::parse(&job_toml).map_err(|error| Failure::usage(format!("{}: {error}", job_path.display())))?;
    let model = match initial_model {
        Some(path) => std::fs::read(path).map_err(|error| read(path, error))?,
        None => Vec::new(),
    };
    if initial_model.is_some() && model.is_empty() {
        return Err(Failure::usage(format!("{}: is empty", initial_model.unwrap_or(job_path).display())));
    }
    let parts = (0..model.len()).step_by(CHUNK_BYTES).map(move |at| {
        let end = model.len().min(at + CHUNK_BYTES);
        Part::Model(model.get(at..end).unwrap_or_default().to_vec())
    });
    let parts = std::iter::once(Part::JobToml(job_toml)).chain(parts);
    let parts = tokio_stream::iter(parts.map(|part| wire::SubmitPart { part: Some(part) }));
    Ok(RunId(client.submit_run(parts).await?.into_inner().run))
}

/// Prints a run's lines to its end. The exit code tells how it ended.
async fn follow(client: &mut AdminClient<Channel>, run: RunId, format: Format) -> Result<ExitCode, Failure> {
    let shown = client.show_run(wire::ShowRunRequest { run: run.0 }).await?.into_inner();
    let job = Job::parse(&shown.job_toml).map_err(Failure::failed)?;
    let mut events = client.watch_run(wire::WatchRunRequest { run: run.0 }).await?.into_inner();
    let mut progress = Progress::of(&Arc::new(job));
    let mut status = StatusLine::new(format);
    let lost = || {
        Failure::failed(format!(
            "the coordinator went away; the run goes on when it is back: watch {run} again"
        ))
    };
    loop {
        let event = match events.message().await {
            Ok(event) => event.ok_or_else(lost)?,
            Err(gone) if gone.code() == tonic::Code::Unavailable => return Err(lost()),
            Err(error) => return Err(error.into()),
        };
        let at = Some(Time(event.at_unix_milliseconds)).filter(|at| at.0 > 0);
        let event: RunEvent = serde_json::from_str(&event.event_json)
            .map_err(|error| Failure::failed(format!("an event of another version: {error}")))?;
        for line in progress.take(at, &event) {
            status.clear();
            match format {
                Format::Text => print(&format!("{line}\n"))?,
                Format::Json => print(&format!("{}\n", line.to_json()))?,
            }
            if line.is_last() {
                let finished = matches!(line, Line::Finished(_));
                return Ok(if finished { ExitCode::SUCCESS } else { ExitCode::from(1) });
            }
        }
        if let Some(text) = progress.status(&event) {
            status.show(&text);
        }
    }
}

/// Writes a file as it comes.
async fn write_parts(mut parts: tonic::Streaming<wire::ModelPart>, out: &Path) -> Result<u64, Failure> {
    let failed = |error: std::io::Error| Failure::failed(format!("{}: {error}", out.display()));
    // Under another name until it is whole.
    let mut name = out.as_os_str().to_owned();
    name.push(".part");
    let mut file = std::fs::File::create(&name).map_err(failed)?;
    let mut bytes = 0;
    while let Some(part) = parts.message().await? {
        file.write_all(&part.data).map_err(failed)?;
        bytes += part.data.len() as u64;
    }
    file.sync_all().and_then(|()| std::fs::rename(&name, out)).map_err(failed)?;
    Ok(bytes)
}

/// A line on the terminal that the next one replaces; nothing where nobody looks.
struct StatusLine {
    enabled: bool,
    shown: bool,
}

impl StatusLine {
    fn new(format: Format) -> Self {
        Self { enabled: format == Format::Text && std::io::stderr().is_terminal(), shown: false }
    }

    fn show(&mut self, text: &str) {
        if self.enabled {
            self.shown = true;
            let _ = write!(std::io::stderr(), "\r\x1b[K{text}");
        }
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

impl Drop for StatusLine {
    fn drop(&mut self) {
        self.clear();
    }
}
