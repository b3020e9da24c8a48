//! The control stream: greeting, heartbeats, messages both ways, and coming back when it breaks.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::job::Job;
use tributary_common::ledger::head::SignedHead;
use tributary_common::record::one_line;
use tributary_common::time::{Clock, Time};
use tributary_proto::coordinator as wire;
use tributary_proto::coordinator::coordinator_message::Message as FromCoordinator;
use tributary_proto::coordinator::node_message::Message as FromNode;
use tributary_proto::{PROTOCOL_VERSIONS, WireError};

use super::{Backoff, Dialer, chain, os_random, status_line};
use crate::machine::{Attempt, Dismissal, Input, Role, RoundKey};

/// Messages waiting in one direction, at most.
const QUEUE: usize = 64;
/// Longest time from opening the stream to Welcome.
const WELCOME_SECONDS: u64 = 30;
/// Missed heartbeats that end the stream.
const MISSED_HEARTBEATS: u32 = 3;
/// Longest time to end the stream in good order.
const CLOSE_SECONDS: u64 = 2;

/// What a node says first.
#[derive(Debug, Clone)]
pub struct Greeting {
    /// The certificate's name.
    pub node: NodeName,
    /// What the node is there for.
    pub role: Role,
    /// The protocol versions it speaks.
    pub versions: RangeInclusive<u32>,
}

impl Greeting {
    /// A node of this software.
    pub fn new(node: NodeName, role: Role) -> Self {
        Self { node, role, versions: PROTOCOL_VERSIONS }
    }
}

/// What happens to the control stream.
#[derive(Debug)]
pub enum LinkEvent {
    /// It is open.
    Up {
        /// The version that both speak.
        protocol: u32,
        /// The coordinator's software, for logs.
        software: String,
    },
    /// A message for the machine.
    Message(Box<Input>),
    /// A message of a secure-aggregation session.
    Masking {
        /// The attempt.
        at: Attempt,
        /// As the session takes it.
        message: Vec<u8>,
    },
    /// Something about ledgers.
    Ledger(LedgerNews),
    /// It ended; another try follows.
    Down {
        /// Why, in one line.
        reason: String,
        /// When.
        retry_in: Duration,
    },
    /// It ended, and coming back will not help. Nothing follows.
    Final {
        /// Why, in one line.
        reason: String,
    },
}

/// What the coordinator says about ledgers.
#[derive(Debug)]
pub enum LedgerNews {
    /// The last head of this node's ledger that it holds, if it holds one. Comes first on every stream.
    Known(Option<SignedHead>),
    /// A head of the ledger of a run.
    Head(SignedHead),
    /// A run is over.
    RunOver(RunId),
}

/// The control stream, kept up by a task of its own.
#[derive(Debug)]
pub struct Link {
    events: mpsc::Receiver<LinkEvent>,
    outgoing: mpsc::Sender<FromNode>,
    task: JoinHandle<()>,
}

impl Link {
    /// Starts dialling. Needs a tokio runtime.
    pub fn open(dialer: Dialer, greeting: Greeting) -> Self {
        let (event_sender, events) = mpsc::channel(QUEUE);
        let (outgoing, messages) = mpsc::channel(QUEUE);
        let task = tokio::spawn(keep_up(dialer, greeting, event_sender, messages));
        Self { events, outgoing, task }
    }

    /// What happens next; `None` after [`LinkEvent::Final`].
    pub async fn next(&mut self) -> Option<LinkEvent> {
        self.events.recv().await
    }

    /// Sends a message if the stream is up; otherwise the coordinator will ask again.
    pub fn send(&self, message: FromNode) {
        if self.outgoing.try_send(message).is_err() {
            tracing::warn!("a message to the coordinator was dropped: the queue is full");
        }
    }

    /// Sends what is queued and ends the stream.
    pub async fn close(self) {
        let Self { mut events, outgoing, mut task } = self;
        drop(outgoing);
        let drained = async {
            // The task must not wait for room in the queue of events.
            while events.recv().await.is_some() {}
            let _ = (&mut task).await;
        };
        if timeout(Duration::from_secs(CLOSE_SECONDS), drained).await.is_err() {
            task.abort();
        }
    }
}

/// Why one stream ended.
enum End {
    /// The node closes it.
    Closed,
    Broken(String),
    Final(String),
}

async fn keep_up(
    dialer: Dialer,
    greeting: Greeting,
    events: mpsc::Sender<LinkEvent>,
    mut messages: mpsc::Receiver<FromNode>,
) {
    let mut backoff = Backoff::default();
    loop {
        // What was said to the last stream's end is void: the coordinator repeats its questions.
        loop {
            match messages.try_recv() {
                Ok(_) => {}
                Err(mpsc::error::TryRecvError::Empty) => break,
                Err(mpsc::error::TryRecvError::Disconnected) => return,
            }
        }
        let started = Instant::now();
        let end = tokio::select! {
            end = one_stream(&dialer, &greeting, &events, &mut messages) => end,
            () = events.closed() => return,
        };
        dialer.set_up(false);
        backoff.held(started.elapsed());
        match end {
            End::Closed => return,
            End::Final(reason) => {
                let _ = events.send(LinkEvent::Final { reason }).await; // nobody listens: the node is ending
                return;
            }
            End::Broken(reason) => {
                let retry_in = backoff.next(os_random());
                if events.send(LinkEvent::Down { reason, retry_in }).await.is_err() {
                    return;
                }
                tokio::time::sleep(retry_in).await;
            }
        }
    }
}

/// Dials, greets, and carries messages until the stream ends.
async fn one_stream(
    dialer: &Dialer,
    greeting: &Greeting,
    events: &mpsc::Sender<LinkEvent>,
    messages: &mut mpsc::Receiver<FromNode>,
) -> End {
    let mut client = match dialer.control().await {
        Ok(client) => client,
        Err(reason) => return End::Broken(reason),
    };
    let (to_coordinator, stream) = mpsc::channel(QUEUE);
    let send = |message: FromNode| {
        let message = wire::NodeMessage { message: Some(message) };
        to_coordinator.try_send(message).map_err(|_| End::Broken("the coordinator does not read".into()))
    };
    if let Err(end) = send(FromNode::Hello(hello(greeting))) {
        return end;
    }
    let welcome = async {
        let mut incoming = client.control(ReceiverStream::new(stream)).await.map_err(refused)?.into_inner();
        let first = incoming.message().await.map_err(refused)?;
        Ok((incoming, first))
    };
    let (mut incoming, first) = match timeout(Duration::from_secs(WELCOME_SECONDS), welcome).await {
        Ok(Ok(opened)) => opened,
        Ok(Err(end)) => return end,
        Err(_) => return End::Broken(format!("no welcome within {WELCOME_SECONDS} s")),
    };
    let welcome = match first.and_then(|message| message.message) {
        Some(FromCoordinator::Welcome(welcome)) => welcome,
        Some(FromCoordinator::Goodbye(goodbye)) => return farewell(&goodbye),
        _ => return End::Broken("the coordinator's first message was not a welcome".into()),
    };
    if !greeting.versions.contains(&welcome.protocol) {
        let (theirs, [oldest, newest]) =
            (welcome.protocol, [greeting.versions.start(), greeting.versions.end()]);
        return End::Final(format!(
            "the coordinator ({}) speaks protocol {theirs}, this node {oldest} to {newest}: bring both to the same release",
            one_line(&welcome.software)
        ));
    }
    let up = LinkEvent::Up { protocol: welcome.protocol, software: one_line(&welcome.software) };
    if events.send(up).await.is_err() {
        return End::Closed;
    }
    dialer.set_up(true);
    let period = Duration::from_secs(u64::from(welcome.heartbeat_seconds.clamp(1, 3600)));
    let mut heartbeat = interval_at(Instant::now() + period, period);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut sequence, mut heard) = (0u64, Instant::now());
    loop {
        tokio::select! {
            message = incoming.message() => {
                heard = Instant::now();
                let message = match message {
                    Ok(Some(message)) => message,
                    Ok(None) => return End::Broken("the coordinator ended the stream".into()),
                    Err(status) => return refused(status),
                };
                match message.message {
                    // None: of a later version.
                    None | Some(FromCoordinator::Heartbeat(_)) => {}
                    Some(
                        message @ (FromCoordinator::KnownHead(_)
                        | FromCoordinator::LedgerHead(_)
                        | FromCoordinator::RunOver(_)),
                    ) => {
                        let news = match read_ledger_news(message) {
                            Ok(news) => news,
                            Err(error) => return End::Broken(format!("the coordinator's message is not valid: {error}")),
                        };
                        if events.send(LinkEvent::Ledger(news)).await.is_err() {
                            return End::Closed;
                        }
                    }
                    Some(FromCoordinator::Goodbye(goodbye)) => return farewell(&goodbye),
                    Some(FromCoordinator::Masking(wire::Masking { run, round, attempt, message })) => {
                        let at = match numbered(run, round, attempt) {
                            Ok(at) => at,
                            Err(error) => return End::Broken(format!("the coordinator's message is not valid: {error}")),
                        };
                        if events.send(LinkEvent::Masking { at, message }).await.is_err() {
                            return End::Closed;
                        }
                    }
                    Some(message) => {
                        let input = match read(message, Clock.now()) {
                            Ok(input) => input,
                            Err(error) => return End::Broken(format!("the coordinator's message is not valid: {error}")),
                        };
                        if events.send(LinkEvent::Message(Box::new(input))).await.is_err() {
                            return End::Closed;
                        }
                    }
                }
            }
            _ = heartbeat.tick() => {
                if heard.elapsed() > period * MISSED_HEARTBEATS {
                    return End::Broken(format!("no sign of life for {} s", heard.elapsed().as_secs()));
                }
                sequence += 1;
                if let Err(end) = send(FromNode::Heartbeat(wire::Heartbeat { sequence })) {
                    return end;
                }
            }
            message = messages.recv() => match message {
                Some(message) => {
                    if let Err(end) = send(message) {
                        return end;
                    }
                }
                None => {
                    // Ends our half; the coordinator ends its own once it has read everything.
                    drop(to_coordinator);
                    let rest = async { while let Ok(Some(_)) = incoming.message().await {} };
                    let _ = timeout(Duration::from_secs(CLOSE_SECONDS), rest).await;
                    return End::Closed;
                }
            },
        }
    }
}

fn hello(greeting: &Greeting) -> wire::Hello {
    wire::Hello {
        protocol_minimum: *greeting.versions.start(),
        protocol_maximum: *greeting.versions.end(),
        software: concat!("tributary-client ", env!("CARGO_PKG_VERSION")).into(),
        node: greeting.node.to_string(),
        role: match greeting.role {
            Role::Trainer => wire::Role::Trainer,
            Role::Evaluator => wire::Role::Evaluator,
        }
        .into(),
    }
}

fn refused(status: tonic::Status) -> End {
    let line = status_line(&status);
    match status.code() {
        Code::Unauthenticated | Code::PermissionDenied | Code::FailedPrecondition | Code::Unimplemented => {
            End::Final(line)
        }
        _ => End::Broken(line),
    }
}

fn farewell(goodbye: &wire::Goodbye) -> End {
    let reason = one_line(&goodbye.reason);
    if goodbye.r#final { End::Final(reason) } else { End::Broken(reason) }
}

/// An attempt, whose numbers count from 1.
fn numbered(run: u64, round: u32, attempt: u32) -> Result<Attempt, WireError> {
    if round == 0 || attempt == 0 {
        return Err(WireError::new("round", "rounds and attempts count from 1"));
    }
    Ok(Attempt { run: RunId(run), round, attempt })
}

/// A message as the machine takes it; a deadline counts from `now`.
///
/// # Errors
/// A field that breaks the protocol, or a message that is not for the machine.
pub fn read(message: FromCoordinator, now: Time) -> Result<Input, WireError> {
    let job = |text: &str| Job::parse(text).map(Arc::new).map_err(|error| one_line(&chain(&error)));
    Ok(match message {
        FromCoordinator::Invite(invite) => Input::Invited {
            at: numbered(invite.run, invite.round, invite.attempt)?,
            job: job(&invite.job_toml),
            model: tributary_proto::digest("model", &invite.model)?,
            deadline: now + invite.deadline_milliseconds,
            support: (!invite.support.is_empty()).then(|| invite.support.into()),
        },
        FromCoordinator::Dismiss(dismiss) => Input::Dismissed {
            at: numbered(dismiss.run, dismiss.round, dismiss.attempt)?,
            reason: match dismiss.reason() {
                wire::DismissReason::Published => Dismissal::Published,
                wire::DismissReason::Abandoned => Dismissal::Abandoned,
                wire::DismissReason::NotUsed | wire::DismissReason::Unspecified => Dismissal::NotUsed,
            },
        },
        FromCoordinator::Evaluate(evaluate) => Input::EvaluationAsked {
            key: RoundKey { run: RunId(evaluate.run), round: evaluate.round },
            job: job(&evaluate.job_toml),
            model: tributary_proto::digest("model", &evaluate.model)?,
        },
        FromCoordinator::Welcome(_) => return Err(WireError::new("welcome", "came twice")),
        FromCoordinator::Heartbeat(_)
        | FromCoordinator::Goodbye(_)
        | FromCoordinator::KnownHead(_)
        | FromCoordinator::LedgerHead(_)
        | FromCoordinator::RunOver(_)
        | FromCoordinator::Masking(_) => {
            return Err(WireError::new("message", "is not one for the machine"));
        }
    })
}

/// What a message says about ledgers. A head's signature is for the ledger to check.
///
/// # Errors
/// A field that breaks the protocol, or a message that is about something else.
pub fn read_ledger_news(message: FromCoordinator) -> Result<LedgerNews, WireError> {
    let head = |bytes: &[u8]| {
        SignedHead::from_bytes(bytes)
            .map_err(|_| WireError::new("head", "is not the compact form of a ledger head"))
    };
    Ok(match message {
        FromCoordinator::KnownHead(known) if known.head.is_empty() => LedgerNews::Known(None),
        FromCoordinator::KnownHead(known) => LedgerNews::Known(Some(head(&known.head)?)),
        FromCoordinator::LedgerHead(shown) => LedgerNews::Head(head(&shown.head)?),
        FromCoordinator::RunOver(over) => LedgerNews::RunOver(RunId(over.run)),
        _ => return Err(WireError::new("message", "is not about ledgers")),
    })
}
