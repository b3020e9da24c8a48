//! The world's coordinator: the production driver over the world's disk, and its connections.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tributary_common::digest::Digest;
use tributary_common::ids::{NodeName, RunId};
use tributary_common::ledger::head::{LedgerKey, SignedHead};
use tributary_common::ledger::hex::Hex;
use tributary_common::model::Parameters;
use tributary_common::record::{Reason, Role, RunEvent};
use tributary_common::time::Time;
use tributary_proto::coordinator::coordinator_message::Message as ToPeer;
use tributary_proto::coordinator::node_message::Message as FromPeer;
use tributary_server::driver::actor::Actor;
use tributary_server::driver::{Attempt, Command, Current, Happened, Standing, ToNode};
use tributary_server::grpc::to_wire;
use tributary_server::identity::{Identities, PeerIdentity};
use tributary_server::ledger::Ledgers;
use tributary_server::run::{Payload, Update};
use tributary_server::store::{NodeRecord, Store};

use super::disk::{Disk, Mounted};
use super::hospital::{Carried, Hospital, authority};
use super::script::Script;
use super::{Plant, is_over};

/// The world's one run.
pub(super) const RUN: RunId = RunId(0x7ead);
/// Messages that may wait for a node, as in a real coordinator.
const OUTBOX: usize = 64;
/// Events that may wait for the world.
const EVENTS: usize = 1024;

/// A coordinator: a disk, and now and then a process.
pub(super) struct Coordinator {
    disk: Arc<Disk>,
    folder: PathBuf,
    plant: Option<Plant>,
    peers: Vec<PeerIdentity>,
    skew: i64,
    /// The process's clock.
    time: Arc<AtomicU64>,
    process: Option<Process>,
    /// Uploads that arrived before, for the planted bug.
    seen: std::collections::BTreeSet<(usize, u32)>,
}

struct Process {
    actor: Actor,
    identities: Identities,
    current: watch::Receiver<Option<Current>>,
    happened: broadcast::Receiver<Arc<Happened>>,
    connections: BTreeMap<u64, (usize, mpsc::Receiver<ToNode>)>,
}

impl Coordinator {
    /// A coordinator whose disk has the run and the nodes' records, and that is not started yet.
    pub(super) fn new(
        dir: &Path,
        script: &Script,
        plant: Option<Plant>,
        now: Time,
        hospitals: &[Hospital],
    ) -> io::Result<Self> {
        let disk = Arc::new(Disk::new(plant == Some(Plant::LostFlush)));
        let store = Mounted(disk.clone());
        let set_up = || -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            let initial = store.put_model(&script.job.layout()?.initial(script.job.seed))?;
            store.create_run(RUN, &script.job.to_toml()?, initial, now)?;
            for hospital in hospitals {
                store.put_node(&NodeRecord {
                    name: hospital.name.clone(),
                    identity: hospital.identity(),
                    enrolled: now,
                    expires: hospital.expires,
                    revoked: None,
                })?;
            }
            Ok(())
        };
        set_up().map_err(io::Error::other)?;
        disk.is_flushed();
        let peer = |hospital: &Hospital| PeerIdentity {
            node: hospital.name.clone(),
            identity: hospital.identity(),
            expires: hospital.expires,
        };
        let peers = hospitals.iter().map(peer).collect();
        let folder = dir.join("coordinator");
        std::fs::create_dir_all(&folder)?;
        Ok(Self {
            disk,
            folder,
            plant,
            peers,
            skew: 0,
            time: Arc::new(AtomicU64::new(now.0)),
            process: None,
            seen: Default::default(),
        })
    }

    pub(super) fn disk(&self) -> &Disk {
        &self.disk
    }

    pub(super) fn is_up(&self) -> bool {
        self.process.is_some()
    }

    /// Whether the run is over, as the disk says.
    pub(super) fn is_over(&self) -> bool {
        self.disk.content().run(RUN).is_ok_and(|run| is_over(&run.head.state))
    }

    /// Where the run stands, in one line.
    pub(super) fn standing(&self) -> String {
        match self.disk.content().run(RUN) {
            Ok(run) => format!(
                "{} rounds are published, attempt {}, open: {}, the coordinator is {}, connected: {:?}",
                run.head.published,
                run.head.attempt,
                run.open_attempt.is_some(),
                if self.is_up() { "up" } else { "down" },
                self.process.as_ref().map(|process| {
                    process.connections.values().map(|(node, _)| *node).collect::<Vec<_>>()
                })
            ),
            Err(error) => error.to_string(),
        }
    }

    /// Its clock, when the world's says `now`.
    pub(super) fn clock(&self, now: u64) -> Time {
        Time(now.saturating_add_signed(self.skew))
    }

    pub(super) fn skew(&mut self, by: i64) {
        self.skew += by;
    }

    pub(super) fn set_clock(&self, now: u64) {
        self.time.store(self.clock(now).0, Ordering::Relaxed);
    }

    /// Starts a process.
    pub(super) fn start(&mut self, now: u64) -> Result<(), String> {
        self.set_clock(now);
        let store: Arc<dyn Store> = Arc::new(Mounted(self.disk.clone()));
        let open = || -> Result<Process, Box<dyn std::error::Error>> {
            let identities = Identities::open(store.clone())?;
            let key = LedgerKey::from_seed(Hex([7; 32]).0);
            let ledgers = Ledgers::new(self.folder.join("ledgers"), key, &authority().der)?;
            let (current, current_receiver) = watch::channel(None);
            let happened = broadcast::Sender::new(EVENTS);
            let events = happened.subscribe();
            let time = self.time.clone();
            let clock = Box::new(move || Time(time.load(Ordering::Relaxed)));
            let actor = Actor::open(store.clone(), Some(ledgers), clock, current, happened)?;
            let connections = BTreeMap::new();
            Ok(Process { actor, identities, current: current_receiver, happened: events, connections })
        };
        self.process = Some(open().map_err(|error| error.to_string())?);
        Ok(())
    }

    /// The process dies.
    pub(super) fn die(&mut self) {
        self.process = None;
        self.seen.clear();
        self.disk.process_ended();
    }

    /// A record that was being written when the process died, half of it.
    pub(super) fn tear_ledger(&self) {
        super::hospital::tear(&self.ledger_path());
    }

    fn ledger_path(&self) -> PathBuf {
        self.folder.join("ledgers").join(format!("{RUN}.jsonl"))
    }

    /// The ledger's file.
    pub(super) fn ledger(&self) -> Vec<u8> {
        std::fs::read(self.ledger_path()).unwrap_or_default()
    }

    /// What was announced since the last call.
    pub(super) fn events(&mut self) -> Vec<RunEvent> {
        let mut events = Vec::new();
        if let Some(process) = &mut self.process {
            while let Ok(happened) = process.happened.try_recv() {
                events.push(happened.event.clone());
            }
        }
        events
    }

    /// What it says to whom on which connection; `None` ends the connection.
    pub(super) fn said(&mut self, now: Time) -> Vec<(usize, u64, Option<ToPeer>)> {
        let mut said = Vec::new();
        let Some(process) = &mut self.process else { return said };
        for (connection, (node, outbox)) in &mut process.connections {
            loop {
                match outbox.try_recv() {
                    Ok(message) => said.push((*node, *connection, Some(to_wire(message, now)))),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        said.push((*node, *connection, None));
                        break;
                    }
                }
            }
        }
        for (_, connection, message) in &said {
            if message.is_none() {
                process.connections.remove(connection);
            }
        }
        said
    }

    pub(super) fn next_tick(&self) -> Option<Time> {
        self.process.as_ref().and_then(|process| process.actor.next_tick())
    }

    pub(super) fn is_due(&self, now: Time) -> bool {
        self.next_tick().is_some_and(|due| due <= now)
    }

    pub(super) fn tick(&mut self) -> Result<(), String> {
        match &mut self.process {
            Some(process) => process.actor.tick().map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }

    fn command(&mut self, command: Command) -> Result<(), String> {
        match &mut self.process {
            Some(process) => process.actor.take(command).map_err(|error| error.to_string()),
            None => Ok(()),
        }
    }

    fn name(&self, node: usize) -> Result<NodeName, String> {
        self.peers.get(node).map(|peer| peer.node.clone()).ok_or_else(|| format!("there is no node {node}"))
    }

    pub(super) fn has(&self, node: usize, connection: u64) -> bool {
        let connections = self.process.as_ref().map(|process| &process.connections);
        connections.and_then(|known| known.get(&connection)).is_some_and(|(of, _)| *of == node)
    }

    pub(super) fn connected(&mut self, node: usize, connection: u64) -> Result<(), String> {
        let name = self.name(node)?;
        let (outbox, receiver) = mpsc::channel(OUTBOX);
        if let Some(process) = &mut self.process {
            process.connections.insert(connection, (node, receiver));
        }
        self.command(Command::Connected { node: name, role: Role::Trainer, connection, outbox })
    }

    pub(super) fn disconnected(&mut self, node: usize, connection: u64) -> Result<(), String> {
        let name = self.name(node)?;
        let ended = self.process.as_mut().and_then(|process| process.connections.remove(&connection));
        match ended {
            Some(_) => self.command(Command::Disconnected { node: name, connection }),
            None => Ok(()),
        }
    }

    /// A message on a control stream, as the service hands it on.
    pub(super) fn heard(&mut self, node: usize, connection: u64, message: FromPeer) -> Result<(), String> {
        let name = self.name(node)?;
        let wrong = |error: tributary_proto::WireError| format!("a node's message is wrong: {error}");
        let command = match message {
            FromPeer::Decline(decline) => Command::Declined {
                node: name,
                connection,
                attempt: Attempt { run: RunId(decline.run), round: decline.round, attempt: decline.attempt },
                reason: Reason::try_from(decline.reason()).map_err(wrong)?,
            },
            FromPeer::Evaluation(report) => Command::Evaluated {
                node: name,
                connection,
                run: RunId(report.run),
                round: report.round,
                metrics: report
                    .metrics
                    .as_ref()
                    .map(tributary_proto::metrics)
                    .transpose()
                    .map_err(wrong)?
                    .unwrap_or_default(),
            },
            FromPeer::LedgerHead(shown) => {
                let head = SignedHead::from_bytes(&shown.head).map_err(|error| error.to_string())?;
                let hash = |bytes: &Vec<u8>| bytes.as_slice().try_into().map(Hex);
                let proof: Result<Vec<_>, _> = shown.consistency.iter().map(hash).collect();
                let proof = proof.map_err(|_| "a hash has 32 bytes".to_owned())?;
                Command::Head { node: name, connection, head: Box::new(head), proof }
            }
            FromPeer::Masking(masking) => Command::Masking {
                node: name,
                connection,
                attempt: Attempt { run: RunId(masking.run), round: masking.round, attempt: masking.attempt },
                message: masking.message,
            },
            FromPeer::Hello(_) | FromPeer::Heartbeat(_) => return Ok(()),
        };
        self.command(command)
    }

    /// The present model, if it is this one.
    pub(super) fn model(&self, digest: Digest) -> Option<Parameters> {
        let process = self.process.as_ref()?;
        let current = process.current.borrow();
        current.as_ref().filter(|current| current.digest == digest).map(|current| current.model.clone())
    }

    /// An upload, whole: first whether it is wanted, then the update, as the service does it.
    pub(super) fn update(&mut self, node: usize, carried: &Carried) -> Result<Standing, String> {
        let (name, at) = (self.name(node)?, carried.at);
        let attempt = Attempt { run: at.run, round: at.round, attempt: at.attempt };
        let again = !self.seen.insert((node, at.round));
        let planted = self.plant == Some(Plant::DoubleAccept) && again;
        let (reply, mut answer) = oneshot::channel();
        self.command(Command::Ask { node: name.clone(), attempt, reply })?;
        let standing = answer.try_recv().map_err(|_| "no answer".to_owned())?;
        if standing != Standing::Wanted {
            return Ok(standing);
        }
        let update = Update {
            node: name,
            round: at.round,
            examples: if planted { carried.examples * 2 } else { carried.examples },
            bytes: carried.bytes.len() as u64,
            digest: Some(Digest::of(&carried.bytes)),
            payload: Payload::Bytes(carried.bytes.to_vec()),
        };
        let (reply, mut answer) = oneshot::channel();
        self.command(Command::Update { attempt, update: Box::new(update), reply })?;
        answer.try_recv().map_err(|_| "no answer".to_owned())
    }

    // ---- identities

    /// Whether the disk says that a node is revoked: after a write of unknown outcome nobody else knows.
    pub(super) fn is_revoked(&self, node: usize) -> bool {
        let name = self.peers.get(node).map(|peer| &peer.node);
        let record = name.and_then(|name| self.disk.content().node(name).ok().flatten());
        record.is_some_and(|record| record.revoked.is_some())
    }

    /// Whether a certificate that ends at `expires` is let in.
    pub(super) fn admits(&self, node: usize, expires: Time, now: Time) -> bool {
        let (Some(process), Some(peer)) = (&self.process, self.peers.get(node)) else { return true };
        if self.plant == Some(Plant::StaleCertificate) {
            return true;
        }
        process.identities.check(&PeerIdentity { expires, ..peer.clone() }, now).is_ok()
    }

    /// Whether the certificate is renewed.
    pub(super) fn renew(&mut self, node: usize, present: Time, expires: Time, now: Time) -> bool {
        let (Some(process), Some(peer)) = (&self.process, self.peers.get(node)) else { return false };
        let peer = PeerIdentity { expires: present, ..peer.clone() };
        process.identities.extend(&peer, expires, now).is_ok()
    }

    pub(super) fn revoke(&mut self, node: usize, now: Time) -> bool {
        let (Some(process), Some(peer)) = (&self.process, self.peers.get(node)) else { return false };
        process.identities.revoke(&peer.node, now).is_ok()
    }

    pub(super) fn enrol(&mut self, node: usize, identity: Digest, expires: Time, now: Time) -> bool {
        let (Some(process), Some(peer)) = (&self.process, self.peers.get(node)) else { return false };
        let name = peer.node.clone();
        let record = NodeRecord { name, identity, enrolled: now, expires, revoked: None };
        process.identities.enrol(record).is_ok()
    }
}
