//! What the commands print.

use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::macros::format_description;
use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::Job;
use tributary_common::progress::{Progress, history};
use tributary_common::record::{EvaluationRecord, RoundRecord, RunEvent, RunState};
use tributary_proto::admin as wire;

use super::{Failure, Format};
use crate::config::ServerConfig;

/// A moment for people: UTC, to the minute.
pub(super) fn moment(unix_seconds: u64) -> String {
    let seconds = i64::try_from(unix_seconds).unwrap_or(i64::MAX);
    let format = format_description!("[year]-[month]-[day] [hour]:[minute] UTC");
    let moment =
        OffsetDateTime::from_unix_timestamp(seconds).ok().and_then(|moment| moment.format(&format).ok());
    moment.unwrap_or_else(|| format!("second {unix_seconds}"))
}

/// Columns as wide as their widest cell; the last is not padded.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn lines(objects: impl Iterator<Item = Value>) -> String {
    objects.map(|object| format!("{object}\n")).collect()
}

pub(super) fn config(config: &ServerConfig) -> String {
    let row = |key: &str, value: String| vec![key.to_owned(), value];
    table(&[
        row("listens on", config.listen.to_string()),
        row("nodes dial", config.public_url.clone()),
        row("certificate for", config.server_names.join(", ")),
        row("data folder", config.data_dir.display().to_string()),
        row("operator's socket", config.admin_socket().display().to_string()),
        row("connections", format!("up to {}", config.maximum_connections)),
        row("uploads at once", config.uploads_in_flight.to_string()),
        row("heartbeat", format!("every {} s", config.heartbeat_seconds)),
        row("certificates", format!("valid for {} days", config.node_certificate_days)),
    ])
}

pub(super) fn token(
    format: Format,
    name: &NodeName,
    public_url: &str,
    created: &wire::CreateTokenResponse,
) -> String {
    let wire::CreateTokenResponse { token, expires_unix_seconds } = created;
    match format {
        Format::Json => {
            let object = json!({
                "node": name, "token": token, "server": public_url, "expires_unix_seconds": expires_unix_seconds
            });
            format!("{object}\n")
        }
        Format::Text => format!(
            "{token}

This token enrols one node, named {name}, once, until {}.
Send it on a private channel. At the node:
  tributary-client join --server {public_url} --token TOKEN --dir {name}
  tributary-client start --config {name}/node.toml
",
            moment(*expires_unix_seconds)
        ),
    }
}

pub(super) fn nodes(format: Format, nodes: &[wire::Node]) -> String {
    match format {
        Format::Json => lines(nodes.iter().map(|node| {
            json!({
                "node": node.name,
                "connected": node.connected,
                "role": Some(&node.role).filter(|role| !role.is_empty()),
                "revoked": node.revoked,
                "identity": node.identity,
                "enrolled_unix_seconds": node.enrolled_unix_seconds,
                "expires_unix_seconds": node.expires_unix_seconds,
            })
        })),
        Format::Text if nodes.is_empty() => {
            "no node has enrolled yet; invite one with `tributary-server token create`\n".to_owned()
        }
        Format::Text => {
            let head = ["NODE", "STATE", "ROLE", "IDENTITY", "ENROLLED", "CERTIFICATE UNTIL"];
            let row = |node: &wire::Node| {
                let state = match (node.revoked, node.connected) {
                    (true, _) => "revoked",
                    (false, true) => "connected",
                    (false, false) => "away",
                };
                vec![
                    node.name.clone(),
                    state.to_owned(),
                    if node.role.is_empty() { "–".to_owned() } else { node.role.clone() },
                    node.identity.chars().take(8).collect(),
                    moment(node.enrolled_unix_seconds),
                    moment(node.expires_unix_seconds),
                ]
            };
            let head = head.map(str::to_owned).to_vec();
            table(&std::iter::once(head).chain(nodes.iter().map(row)).collect::<Vec<_>>())
        }
    }
}

pub(super) fn submitted(format: Format, run: RunId) -> String {
    match format {
        Format::Text => format!("{run}\n"),
        Format::Json => format!("{}\n", json!({ "run": run })),
    }
}

fn damaged(error: impl std::fmt::Display) -> Failure {
    Failure::failed(format!("the coordinator's answer is of another version: {error}"))
}

/// A run's state, and its words.
fn state(run: &wire::Run) -> Result<(RunState, String), Failure> {
    let state: RunState = serde_json::from_str(&run.state_json).map_err(damaged)?;
    let words = match &state {
        RunState::Queued => "queued".to_owned(),
        RunState::Running => "running".to_owned(),
        RunState::Finished => "finished".to_owned(),
        RunState::Stopped => "stopped".to_owned(),
        RunState::Failed { reason } => format!("failed: {reason}"),
    };
    Ok((state, words))
}

fn run_object(run: &wire::Run) -> Result<Value, Failure> {
    let (state, _) = state(run)?;
    let model = Digest::try_from(run.model.as_slice()).map_err(damaged)?;
    let mut object = json!({
        "run": RunId(run.run),
        "name": run.name,
        "rounds": run.rounds,
        "published": run.published,
        "submitted_unix_milliseconds": run.submitted_unix_milliseconds,
        "model_digest": model,
    });
    // `state`, and with it `reason` where a run failed.
    let state = serde_json::to_value(&state).map_err(damaged)?;
    if let (Some(object), Value::Object(state)) = (object.as_object_mut(), state) {
        object.extend(state);
    }
    Ok(object)
}

pub(super) fn runs(format: Format, runs: &[wire::Run]) -> Result<String, Failure> {
    match format {
        Format::Json => Ok(lines(runs.iter().map(run_object).collect::<Result<Vec<_>, _>>()?.into_iter())),
        Format::Text if runs.is_empty() => {
            Ok("no run yet; submit one with `tributary-server run submit JOB`\n".to_owned())
        }
        Format::Text => {
            let head = ["RUN", "NAME", "ROUNDS", "SUBMITTED", "STATE"].map(str::to_owned).to_vec();
            let mut rows = vec![head];
            for run in runs {
                rows.push(vec![
                    RunId(run.run).to_string(),
                    run.name.clone(),
                    format!("{}/{}", run.published, run.rounds),
                    moment(run.submitted_unix_milliseconds / 1000),
                    state(run)?.1,
                ]);
            }
            Ok(table(&rows))
        }
    }
}

pub(super) fn run(format: Format, shown: &wire::ShowRunResponse) -> Result<String, Failure> {
    let run = shown.run.as_ref().ok_or_else(|| damaged("no run in it"))?;
    let rounds: Vec<RoundRecord> = parsed(&shown.round_records_json)?;
    let evaluations: Vec<EvaluationRecord> = parsed(&shown.evaluation_records_json)?;
    if format == Format::Json {
        let mut object = run_object(run)?;
        if let Some(object) = object.as_object_mut() {
            object.insert("job_toml".to_owned(), shown.job_toml.clone().into());
            object.insert("rounds_ended".to_owned(), serde_json::to_value(&rounds).map_err(damaged)?);
            object.insert("evaluations".to_owned(), serde_json::to_value(&evaluations).map_err(damaged)?);
        }
        return Ok(format!("{object}\n"));
    }
    let (run_state, words) = state(run)?;
    let row = |key: &str, value: String| vec![key.to_owned(), value];
    let model = Digest::try_from(run.model.as_slice()).map_err(damaged)?;
    let mut text = table(&[
        row("run", RunId(run.run).to_string()),
        row("name", run.name.clone()),
        row("state", words),
        row("rounds", format!("{} of {} published", run.published, run.rounds)),
        row("submitted", moment(run.submitted_unix_milliseconds / 1000)),
        row("model", model.to_string()),
    ]);
    // The lines that a watcher would have seen.
    let mut progress = match Job::parse(&shown.job_toml) {
        Ok(job) => Progress::of(&Arc::new(job)),
        Err(_) => Progress::new(run.rounds), // another version's job
    };
    let mut events = history(rounds, evaluations);
    events.push(if run_state.is_over() {
        RunEvent::Ended { state: run_state, rounds: run.published, model }
    } else {
        RunEvent::Waiting { round: run.published + 1, connected: 0, wanted: 0 }
    });
    for line in events.iter().flat_map(|event| progress.take(None, event)) {
        let _ = write!(text, "\n{line}");
    }
    let _ = write!(text, "\n\n# the job as resolved\n{}", shown.job_toml);
    Ok(text)
}

fn parsed<T: serde::de::DeserializeOwned>(texts: &[String]) -> Result<Vec<T>, Failure> {
    texts.iter().map(|text| serde_json::from_str(text).map_err(damaged)).collect()
}
