//! One node's control stream, from its Hello to its end.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;
use tributary_common::ids::RunId;
use tributary_common::ledger::head::SignedHead;
use tributary_common::ledger::hex::Hex;
use tributary_common::ledger::record::LedgerHash;
use tributary_common::record::{Reason, one_line};
use tributary_common::time::{Clock, Time};
use tributary_proto::coordinator::coordinator_message::Message as ToPeer;
use tributary_proto::coordinator::node_message::Message as FromPeer;
use tributary_proto::coordinator::{
    CoordinatorMessage, Dismiss, DismissReason, Evaluate, Goodbye, Hello, Invite, KnownHead, LedgerHead,
    Masking, NodeMessage, Role as WireRole, RunOver, Welcome,
};
use tributary_proto::{PROTOCOL_VERSIONS, negotiate};

use super::Core;
use crate::driver::{Attempt, Connection, Gone, ToNode};
use crate::identity::PeerIdentity;
use crate::rate::Bucket;
use crate::round::{Dismissal, Role};

/// How long a node may take to say Hello.
const HELLO_SECONDS: u64 = 10;
/// How long the last message of a stream may take to leave.
const PARTING_SECONDS: u64 = 5;
/// Messages of one node per minute in the long run, and at once.
const MESSAGES_PER_MINUTE: u32 = 3000;
const MESSAGES_AT_ONCE: u32 = 200;
/// Most hashes of a consistency proof: a ledger of 2^64 records needs no more.
const PROOF_HASHES: usize = 128;
/// The name and version of this software, for a peer's log.
const SOFTWARE: &str = concat!("tributary-server ", env!("CARGO_PKG_VERSION"));

type Sender = mpsc::Sender<Result<CoordinatorMessage, Status>>;

/// Why a stream ends.
#[derive(Debug)]
enum End {
    /// The node went away.
    Away(String),
    /// The node is told why, and may come back unless `last`.
    Goodbye { reason: String, last: bool },
    /// The node broke the protocol, or is not who it says.
    Error(Status),
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Error(status)
    }
}

impl From<tributary_proto::WireError> for End {
    fn from(error: tributary_proto::WireError) -> Self {
        Self::Error(error.into())
    }
}

impl From<Gone> for End {
    fn from(gone: Gone) -> Self {
        Self::Goodbye { reason: gone.to_string(), last: false }
    }
}

/// Serves one stream to its end.
pub(super) async fn serve<S>(core: &Core, peer: PeerIdentity, from: &str, mut messages: S, sender: Sender)
where
    S: Stream<Item = Result<NodeMessage, Status>> + Unpin,
{
    let node = &peer.node;
    let end = match greet(core, &peer, from, &mut messages, &sender).await {
        Ok(mut connection) => {
            let end = converse(core, &peer, &mut connection, &mut messages, &sender).await;
            core.driver.disconnect(connection).await;
            end
        }
        Err(end) => end,
    };
    let last = match end {
        End::Away(why) => {
            tracing::info!(%node, "node {node} disconnected: {why}");
            return;
        }
        End::Goodbye { reason, last } => {
            tracing::info!(%node, "sent node {node} away: {reason}");
            Ok(message(ToPeer::Goodbye(Goodbye { reason: one_line(&reason), r#final: last })))
        }
        End::Error(status) => {
            tracing::warn!(%node, "ended the stream of node {node} from {from}: {}", one_line(status.message()));
            Err(status)
        }
    };
    // An error means that the node is gone already.
    let _ = sender.send_timeout(last, Duration::from_secs(PARTING_SECONDS)).await;
}

/// Hello and Welcome.
async fn greet<S>(
    core: &Core,
    peer: &PeerIdentity,
    from: &str,
    messages: &mut S,
    sender: &Sender,
) -> Result<Connection, End>
where
    S: Stream<Item = Result<NodeMessage, Status>> + Unpin,
{
    let first = tokio::time::timeout(Duration::from_secs(HELLO_SECONDS), messages.next()).await;
    let Ok(first) = first else {
        return Err(Status::deadline_exceeded(format!("no Hello within {HELLO_SECONDS} s")).into());
    };
    let Some(first) = first.transpose()? else {
        return Err(End::Away("it said nothing".to_owned()));
    };
    let Some(FromPeer::Hello(hello)) = first.message else {
        return Err(Status::invalid_argument("the first message of a control stream is Hello").into());
    };
    let Hello { protocol_minimum, protocol_maximum, ref software, ref node, .. } = hello;
    if *node != peer.node.as_str() {
        let claimed = one_line(node);
        tracing::warn!(node = %peer.node, "node {} from {from} claims to be {claimed:?}", peer.node);
        let words = format!("this certificate is node {}'s, not {claimed:?}'s", peer.node);
        return Err(Status::permission_denied(words).into());
    }
    let Some(protocol) = negotiate(protocol_minimum..=protocol_maximum) else {
        let (oldest, newest) = (PROTOCOL_VERSIONS.start(), PROTOCOL_VERSIONS.end());
        let older = if protocol_maximum < *oldest { "node" } else { "coordinator" };
        let reason = format!(
            "this coordinator speaks protocol {oldest}..{newest}, the node {protocol_minimum}..{protocol_maximum}: update the {older}"
        );
        return Err(End::Goodbye { reason, last: true });
    };
    let role = match hello.role() {
        WireRole::Trainer => Role::Trainer,
        WireRole::Evaluator => Role::Evaluator,
        WireRole::Unspecified => return Err(Status::invalid_argument("role: is missing or unknown").into()),
    };
    let software_of_peer = one_line(software);
    let welcome =
        Welcome { protocol, software: SOFTWARE.to_owned(), heartbeat_seconds: core.heartbeat_seconds };
    send(core, sender, ToPeer::Welcome(welcome)).await?;
    let name = &peer.node;
    let connection = core.driver.connect(name.clone(), role).await?;
    tracing::info!(node = %name, "node {name} connected from {from} as {role:?} with {software_of_peer:?}");
    Ok(connection)
}

/// Everything between Welcome and the end.
async fn converse<S>(
    core: &Core,
    peer: &PeerIdentity,
    connection: &mut Connection,
    messages: &mut S,
    sender: &Sender,
) -> End
where
    S: Stream<Item = Result<NodeMessage, Status>> + Unpin,
{
    let mut shutdown = core.shutdown.clone();
    let mut rate = Bucket::new(MESSAGES_PER_MINUTE, MESSAGES_AT_ONCE, Clock.now());
    let mut refusal = std::pin::pin!(core.identities.until_refused(peer));
    let mut silent = Instant::now() + core.silence();
    loop {
        // The present run's last words to a node go out before the shutdown's.
        let step = tokio::select! {
            biased;
            refusal = &mut refusal => return Status::from(refusal).into(),
            queued = connection.outbox.recv() => match queued {
                Some(ToNode::SentAway(reason)) => {
                    Err(End::Goodbye { reason: reason.to_owned(), last: true })
                }
                Some(queued) => send(core, sender, to_wire(queued, Clock.now())).await,
                None if core.driver.current().has_changed().is_err() => Err(Gone.into()),
                None => {
                    let reason = "a newer connection of this node took over, or it did not read its messages";
                    Err(End::Goodbye { reason: reason.to_owned(), last: false })
                }
            },
            () = down(&mut shutdown) => Err(Gone.into()),
            received = messages.next() => {
                silent = Instant::now() + core.silence();
                match received {
                    None => Err(End::Away("it closed the stream".to_owned())),
                    Some(Err(status)) if status.code() == tonic::Code::OutOfRange => Err(status.into()),
                    Some(Err(status)) => Err(End::Away(one_line(status.message()))),
                    Some(Ok(_)) if rate.take(Clock.now()).is_err() => {
                        let reason = format!("more than {MESSAGES_AT_ONCE} messages at once: slow down");
                        tracing::warn!(node = %peer.node, "node {} floods its stream", peer.node);
                        Err(End::Goodbye { reason, last: false })
                    }
                    Some(Ok(received)) => take(core, connection, sender, received).await,
                }
            }
            () = tokio::time::sleep_until(silent) => {
                let reason = "three heartbeats were missed".to_owned();
                Err(End::Goodbye { reason, last: false })
            }
        };
        if let Err(end) = step {
            return end;
        }
    }
}

/// Returns when the coordinator shuts down.
async fn down(shutdown: &mut watch::Receiver<bool>) {
    // An error means that the coordinator is gone already.
    let _ = shutdown.wait_for(|down| *down).await;
}

/// One message of the node.
async fn take(
    core: &Core,
    connection: &Connection,
    sender: &Sender,
    received: NodeMessage,
) -> Result<(), End> {
    match received.message {
        Some(FromPeer::Heartbeat(heartbeat)) => send(core, sender, ToPeer::Heartbeat(heartbeat)).await,
        Some(FromPeer::Decline(decline)) => {
            let reason = Reason::try_from(decline.reason())?;
            let attempt = Attempt { run: RunId(decline.run), round: decline.round, attempt: decline.attempt };
            Ok(core.driver.declined(connection, attempt, reason).await?)
        }
        Some(FromPeer::Evaluation(report)) => {
            let metrics =
                report.metrics.as_ref().map(tributary_proto::metrics).transpose()?.unwrap_or_default();
            Ok(core.driver.evaluated(connection, RunId(report.run), report.round, metrics).await?)
        }
        Some(FromPeer::LedgerHead(shown)) => {
            let head = SignedHead::from_bytes(&shown.head)
                .map_err(|error| Status::invalid_argument(format!("head: {error}")))?;
            let hash = |bytes: &Vec<u8>| bytes.as_slice().try_into().map(Hex);
            if shown.consistency.len() > PROOF_HASHES {
                return Err(Status::invalid_argument("consistency: the proof is too long").into());
            }
            let proof: Result<Vec<LedgerHash>, _> = shown.consistency.iter().map(hash).collect();
            let proof = proof.map_err(|_| Status::invalid_argument("consistency: a hash has 32 bytes"))?;
            Ok(core.driver.showed_head(connection, head, proof).await?)
        }
        Some(FromPeer::Masking(masking)) => {
            let attempt = Attempt { run: RunId(masking.run), round: masking.round, attempt: masking.attempt };
            Ok(core.driver.masking(connection, attempt, masking.message).await?)
        }
        Some(FromPeer::Hello(_)) => Err(Status::invalid_argument("a control stream has one Hello").into()),
        None => Err(Status::invalid_argument("a message of an unknown kind").into()),
    }
}

async fn send(core: &Core, sender: &Sender, what: ToPeer) -> Result<(), End> {
    let sent = sender.send_timeout(Ok(message(what)), core.silence()).await;
    sent.map_err(|_| End::Away("it does not read its messages".to_owned()))
}

fn message(what: ToPeer) -> CoordinatorMessage {
    CoordinatorMessage { message: Some(what) }
}

/// A message in its wire form; a deadline becomes the time left at `now`.
pub fn to_wire(message: ToNode, now: Time) -> ToPeer {
    match message {
        ToNode::Masking { run, round, attempt, message } => {
            ToPeer::Masking(Masking { run: run.0, round, attempt, message })
        }
        ToNode::Invite { run, round, attempt, job_toml, model, deadline, support } => {
            ToPeer::Invite(Invite {
                run: run.0,
                round,
                attempt,
                job_toml: job_toml.as_ref().to_owned(),
                model: model.0.to_vec(),
                deadline_milliseconds: deadline.0.saturating_sub(now.0),
                support: support.map_or_else(Vec::new, |support| support.to_vec()),
            })
        }
        ToNode::Dismiss { run, round, attempt, reason } => {
            let reason = match reason {
                Dismissal::Published => DismissReason::Published,
                Dismissal::NotUsed => DismissReason::NotUsed,
                Dismissal::Abandoned => DismissReason::Abandoned,
            };
            ToPeer::Dismiss(Dismiss { run: run.0, round, attempt, reason: reason.into() })
        }
        ToNode::KnownHead(head) => ToPeer::KnownHead(KnownHead { head: head.unwrap_or_default() }),
        ToNode::LedgerHead(head) => {
            ToPeer::LedgerHead(LedgerHead { head: head.to_bytes().to_vec(), consistency: Vec::new() })
        }
        ToNode::RunOver(run) => ToPeer::RunOver(RunOver { run: run.0 }),
        ToNode::SentAway(reason) => ToPeer::Goodbye(Goodbye { reason: one_line(reason), r#final: true }),
        ToNode::Evaluate { run, round, job_toml, model } => ToPeer::Evaluate(Evaluate {
            run: run.0,
            round,
            job_toml: job_toml.as_ref().to_owned(),
            model: model.0.to_vec(),
        }),
    }
}
