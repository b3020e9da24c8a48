//! A seeded world in which production code meets trouble: the coordinator's driver and the nodes' participants, with their
//! stores, ledgers and journals, in one thread and under one clock, while messages are late, lost, doubled and broken,
//! parties die at any step, disks fill up, clocks jump and certificates end.
//!
//! What happens follows from the seed alone; keys, masks and noise are the operating system's, and nothing in the order
//! of events depends on them. [`run`] tells what the checkers in `checks` found: they know what really happened, and
//! nothing of how the code came to its results.

mod checks;
mod coordinator;
mod disk;
mod hospital;
mod script;
#[cfg(test)]
mod tests;
mod twin;

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::ValueEnum;
use rand::RngExt as _;
use tributary_client::machine::{Attempt, Input, RoundKey};
use tributary_client::participant::Happening;
use tributary_common::record::RunState;
use tributary_common::rng::{Purpose, Stream};
use tributary_common::time::Time;
use tributary_proto::coordinator::coordinator_message::Message as ToPeer;
use tributary_proto::coordinator::node_message::Message as FromPeer;
use tributary_server::driver::Standing;

use self::checks::Checks;
use self::coordinator::Coordinator;
use self::hospital::{Carried, Hospital, Wish};
use self::script::Script;

/// A bug that is put into the world on purpose, to see whether the checkers find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Plant {
    /// When the coordinator dies, its disk forgets the last round that it had acknowledged, and what came after.
    LostFlush,
    /// An update that is sent again counts twice.
    DoubleAccept,
    /// A node's ledger forgets a charge after the payload left.
    RefundedSpend,
    /// A node's journal of masked rounds forgets, so that a session is answered twice.
    RepeatedUnmask,
    /// A certificate is taken after its end, or after it was revoked.
    StaleCertificate,
}

/// One run of the world.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Everything that happens follows from it.
    pub seed: u64,
    /// What is wrong on purpose.
    pub plant: Option<Plant>,
    /// Whether each event is printed on standard error.
    pub trace: bool,
}

/// How often things happened.
pub type Tally = BTreeMap<&'static str, u64>;

/// What came of a run of the world.
#[derive(Debug, Default)]
pub struct Report {
    /// What must not happen and did, one line each.
    pub violations: Vec<String>,
    /// How often things happened.
    pub tally: Tally,
    /// How the federation's run ended.
    pub ended: String,
}

/// Why the world cannot be set up.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {error}")]
pub struct WorldError {
    what: &'static str,
    error: std::io::Error,
}

/// When the world's clock begins: a morning in 2026.
const BEGINNING: u64 = 1_790_000_000_000;
const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
/// From then on nothing more goes wrong, and what was broken is mended.
const TROUBLE: u64 = 2 * HOUR;
/// How long a run may take after that.
const PATIENCE: u64 = 72 * HOUR;
/// More events than this in one run are a run that does not end.
const MOST_EVENTS: usize = 400_000;
/// A coordinator that does not start so often in peace never will.
const MOST_FAILED_STARTS: u32 = 30;
/// How long a crashed party is away at most, in trouble.
const AWAY: u64 = 4 * MINUTE;
/// How often a node tries to connect, to fetch and to send.
const RETRY: u64 = SECOND;

enum Event {
    StartCoordinator,
    CoordinatorTick(u64),
    Start(usize),
    Dial { node: usize, life: u32 },
    NodeTick { node: usize, number: u64 },
    ToCoordinator { node: usize, connection: u64, message: FromPeer },
    ToHospital { node: usize, connection: u64, message: Box<ToPeer> },
    Happens { node: usize, life: u32, happening: Box<Happening> },
    Fetches { node: usize, life: u32, serial: u64 },
    Sends { node: usize, life: u32, carried: Box<Carried> },
    LinkEnds { node: usize, connection: u64, heard_by_coordinator: bool },
    Trouble,
    Expires(usize),
    Renews(usize),
    Enrols(usize),
    DiskFreed,
    OutboxFreed { node: usize },
    Peace,
}

/// The world.
struct World {
    settings: Settings,
    script: Script,
    rng: Stream,
    now: u64,
    serial: u64,
    events: BTreeMap<(u64, u64), Event>,
    coordinator: Coordinator,
    hospitals: Vec<Hospital>,
    checks: Checks,
    tally: Tally,
    /// When the next message of a connection and direction arrives at the earliest: a stream keeps its order.
    arrived: BTreeMap<(u64, bool), u64>,
    peace: bool,
    /// The coordinator's last planned tick.
    tick: u64,
    /// Starts of the coordinator that failed since the last one that did not.
    failed_starts: u32,
    _dir: tempfile::TempDir,
}

/// Runs the world of a seed to the end of its run.
///
/// # Errors
/// A temporary folder cannot be made or used.
pub fn run(settings: Settings) -> Result<Report, WorldError> {
    World::new(settings).map(World::live)
}

/// Where the nodes' files are: in memory where there is such a place.
fn scratch() -> Result<tempfile::TempDir, std::io::Error> {
    let memory = PathBuf::from("/dev/shm");
    let place = if memory.is_dir() { memory } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("tributary-faults-").tempdir_in(place)
}

impl World {
    fn new(settings: Settings) -> Result<Self, WorldError> {
        let failed = |what| move |error| WorldError { what, error };
        let dir = scratch().map_err(failed("a temporary folder"))?;
        let mut rng = Stream::new(settings.seed, Purpose::Faults, 0, "world");
        let script = Script::draw(settings.seed, &mut rng);
        let hospitals = (0..script.nodes)
            .map(|index| Hospital::new(index, dir.path(), &script))
            .collect::<Result<Vec<_>, _>>()
            .map_err(failed("a node's folder"))?;
        let coordinator = Coordinator::new(dir.path(), &script, settings.plant, Time(BEGINNING), &hospitals)
            .map_err(failed("the coordinator's folder"))?;
        let checks = Checks::new(script.nodes);
        Ok(Self {
            settings,
            script,
            rng,
            now: BEGINNING,
            serial: 0,
            events: BTreeMap::new(),
            coordinator,
            hospitals,
            checks,
            tally: Tally::new(),
            arrived: BTreeMap::new(),
            peace: false,
            tick: 0,
            failed_starts: 0,
            _dir: dir,
        })
    }

    fn live(mut self) -> Report {
        self.after(0, Event::StartCoordinator);
        for node in 0..self.hospitals.len() {
            let wait = self.rng.random_range(0..5 * SECOND);
            self.after(wait, Event::Start(node));
            self.certificate_begins(node);
        }
        let wait = self.rng.random_range(SECOND..MINUTE);
        self.after(wait, Event::Trouble);
        self.at(BEGINNING + TROUBLE, Event::Peace);
        let mut count = 0;
        while !self.coordinator.is_over() {
            let Some(((at, _), event)) = self.events.pop_first() else {
                self.checks.found("nothing more happens, and the run is not over".to_owned());
                break;
            };
            self.now = self.now.max(at);
            count += 1;
            if self.now > BEGINNING + TROUBLE + PATIENCE || count > MOST_EVENTS {
                self.checks.found(format!(
                    "the run did not end: {} h and {count} events, {}",
                    (self.now - BEGINNING) / HOUR,
                    self.coordinator.standing()
                ));
                break;
            }
            self.happen(event);
            if self.checks.is_enough(self.settings.plant.is_some()) {
                break;
            }
        }
        self.end()
    }

    /// The last checks, once the run is over.
    fn end(mut self) -> Report {
        let store = self.coordinator.disk().content();
        let over = self.coordinator.is_over();
        for hospital in &mut self.hospitals {
            hospital.stop();
            self.checks.ledger(hospital.index, &hospital.ledger());
        }
        self.checks.coordinators_ledger(&self.coordinator.ledger());
        let ended = self.checks.at_the_end(&self.script, &store, &self.hospitals, over);
        let mut tally = std::mem::take(&mut self.tally);
        for (what, count) in self.checks.tally() {
            *tally.entry(what).or_default() += count;
        }
        let kind = self.script.kind.name();
        *tally.entry(kind).or_default() += 1;
        Report { violations: self.checks.into_violations(), tally, ended }
    }

    fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
        self.trace(|| what.to_owned());
    }

    fn trace(&self, line: impl FnOnce() -> String) {
        if self.settings.trace {
            eprintln!("{:>10.3} s  {}", (self.now - BEGINNING) as f64 / 1000.0, line());
        }
    }

    fn at(&mut self, at: u64, event: Event) {
        self.serial += 1;
        self.events.insert((at.max(self.now), self.serial), event);
    }

    fn after(&mut self, milliseconds: u64, event: Event) {
        self.at(self.now + milliseconds, event);
    }

    /// Whether something with this probability happens, while there is trouble.
    fn goes_wrong(&mut self, probability: f64) -> bool {
        // Drawn in peace too: nothing hangs on it.
        let draw: f64 = self.rng.random();
        !self.peace && draw < probability
    }

    /// How long a message is on its way.
    fn delay(&mut self) -> u64 {
        let slow = self.rng.random::<f64>() < self.script.rates.slow;
        let most = if slow && !self.peace { 40 * SECOND } else { 80 };
        self.rng.random_range(1..=most)
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::StartCoordinator => self.start_coordinator(),
            Event::CoordinatorTick(number) if number == self.tick => {
                if self.coordinator.is_due(self.clock()) {
                    self.command(Coordinator::tick);
                } else {
                    self.plan_coordinators_tick();
                }
            }
            Event::Start(node) => self.start(node),
            Event::Dial { node, life } if self.lives(node, life) => self.dial(node),
            Event::NodeTick { node, number } if self.ticks(node, number) => {
                if self.is_due(node) {
                    self.take(node, Happening::Input(Input::Tick));
                } else {
                    self.plan_tick(node);
                }
            }
            Event::ToCoordinator { node, connection, message } => self.heard(node, connection, message),
            Event::ToHospital { node, connection, message } => self.told(node, connection, *message),
            Event::Happens { node, life, happening } if self.lives(node, life) => self.take(node, *happening),
            Event::Fetches { node, life, serial } if self.lives(node, life) => self.fetches(node, serial),
            Event::Sends { node, life, carried } if self.lives(node, life) => self.sends(node, *carried),
            Event::LinkEnds { node, connection, heard_by_coordinator } => {
                self.link_ends(node, connection, heard_by_coordinator);
            }
            Event::Trouble => self.trouble(),
            Event::Expires(node) => self.certificate_ends(node),
            Event::Renews(node) => self.renews(node),
            Event::Enrols(node) => self.enrols(node),
            Event::DiskFreed => self.coordinator.disk().set_full(false),
            Event::OutboxFreed { node } => {
                if let Some(hospital) = self.hospitals.get_mut(node) {
                    hospital.set_outbox_full(false);
                }
            }
            Event::Peace => self.peace_begins(),
            _ => {} // too early, or of a party's earlier life
        }
    }

    /// The coordinator's clock.
    fn clock(&self) -> Time {
        self.coordinator.clock(self.now)
    }

    /// Whether this is the last tick that was planned for a node that runs.
    fn ticks(&self, node: usize, number: u64) -> bool {
        self.hospitals.get(node).is_some_and(|hospital| hospital.is_up() && hospital.tick == number)
    }

    fn is_due(&self, node: usize) -> bool {
        self.hospitals.get(node).is_some_and(|hospital| hospital.is_due(Time(self.now)))
    }

    fn lives(&self, node: usize, life: u32) -> bool {
        self.hospitals.get(node).is_some_and(|hospital| hospital.is_up() && hospital.life == life)
    }

    // ---- the coordinator

    fn start_coordinator(&mut self) {
        if self.coordinator.is_up() {
            return;
        }
        let dies = self.goes_wrong(0.1).then(|| self.rng.random_range(0..6));
        self.coordinator.disk().arm(dies);
        match self.coordinator.start(self.now) {
            Ok(()) => {
                self.trace(|| "the coordinator is up".to_owned());
                self.failed_starts = 0;
                self.checks.coordinator_is_back(&self.coordinator.disk().content());
                self.checks.coordinators_ledger(&self.coordinator.ledger());
                self.coordinator_may_die();
                self.after_command();
            }
            Err(why) => {
                self.trace(|| format!("the coordinator does not start: {why}"));
                self.count("starts of the coordinator that failed");
                self.coordinator.die();
                self.failed_starts += 1;
                if self.peace && self.failed_starts > MOST_FAILED_STARTS {
                    self.failed_starts = 0;
                    self.checks.found(format!("the coordinator does not start: {why}"));
                    return;
                }
                self.after(10 * SECOND, Event::StartCoordinator);
            }
        }
    }

    /// Draws whether, and at which write, this process of the coordinator dies.
    fn coordinator_may_die(&mut self) {
        let dies = self.goes_wrong(self.script.rates.coordinator_dies);
        let at = self.rng.random_range(0..30);
        self.coordinator.disk().arm(dies.then_some(at));
    }

    /// Does something at the coordinator, if it runs, and what follows.
    fn command(&mut self, work: impl FnOnce(&mut Coordinator) -> Result<(), String>) {
        if !self.coordinator.is_up() {
            return;
        }
        self.coordinator.set_clock(self.now);
        match work(&mut self.coordinator) {
            Ok(()) => self.after_command(),
            Err(why) => {
                self.trace(|| format!("the coordinator ends: {why}"));
                self.coordinator_dies();
            }
        }
    }

    fn coordinator_dies(&mut self) {
        self.count("deaths of the coordinator");
        let tear = self.rng.random::<f64>() < 0.3;
        self.coordinator.die();
        if tear {
            self.coordinator.tear_ledger();
        }
        for node in 0..self.hospitals.len() {
            if let Some(connection) = self.hospitals.get(node).and_then(|hospital| hospital.connection) {
                let wait = self.delay();
                self.after(wait, Event::LinkEnds { node, connection, heard_by_coordinator: false });
            }
        }
        let wait = self.rng.random_range(SECOND..AWAY);
        self.after(wait, Event::StartCoordinator);
    }

    /// Carries what the coordinator said, and plans its next tick.
    fn after_command(&mut self) {
        for event in self.coordinator.events() {
            self.trace(|| format!("coordinator: {event:?}"));
            self.checks.event(&event);
        }
        let clock = self.clock();
        for (node, connection, message) in self.coordinator.said(clock) {
            match message {
                Some(message) => {
                    if let ToPeer::Goodbye(goodbye) = &message {
                        self.checks.found(format!("node {node} was sent away: {}", goodbye.reason));
                        self.break_link(node, connection);
                        continue;
                    }
                    self.carry(node, connection, message);
                }
                None => self.after(1, Event::LinkEnds { node, connection, heard_by_coordinator: true }),
            }
        }
        self.plan_coordinators_tick();
    }

    /// The driver looks at the clock once a minute at least, in case it was set.
    fn plan_coordinators_tick(&mut self) {
        if let Some(due) = self.coordinator.next_tick() {
            let wait = due.0.saturating_sub(self.clock().0).clamp(1, MINUTE);
            self.tick += 1;
            self.after(wait, Event::CoordinatorTick(self.tick));
        }
    }

    // ---- messages

    /// When a message on a stream arrives.
    fn arrival(&mut self, connection: u64, up: bool) -> u64 {
        let at = self.now + self.delay();
        let before = self.arrived.entry((connection, up)).or_default();
        *before = at.max(*before);
        *before
    }

    fn carry(&mut self, node: usize, connection: u64, message: ToPeer) {
        if self.goes_wrong(self.script.rates.broken) {
            // TLS sees every wrong byte, and ends the connection.
            self.count("messages broken on their way");
            return self.break_link(node, connection);
        }
        let at = self.arrival(connection, false);
        // A stream keeps its order, and what is said of ledgers needs it. The rest must bear more than a stream does.
        let in_order = matches!(&message, ToPeer::KnownHead(_) | ToPeer::LedgerHead(_) | ToPeer::RunOver(_));
        if !in_order && self.goes_wrong(self.script.rates.doubled) {
            self.count("messages doubled");
            let message = Box::new(message.clone());
            self.at(at, Event::ToHospital { node, connection, message });
        }
        let at = if !in_order && self.goes_wrong(self.script.rates.reordered) {
            self.count("messages out of order");
            at + self.rng.random_range(0..2 * SECOND)
        } else {
            at
        };
        self.at(at, Event::ToHospital { node, connection, message: Box::new(message) });
    }

    fn send(&mut self, node: usize, message: FromPeer) {
        self.checks.said(node, &message);
        let Some(connection) = self.hospitals.get(node).and_then(|hospital| hospital.connection) else {
            return;
        };
        if self.goes_wrong(self.script.rates.broken) {
            self.count("messages broken on their way");
            return self.break_link(node, connection);
        }
        let at = self.arrival(connection, true);
        let in_order = matches!(&message, FromPeer::LedgerHead(_));
        if !in_order && self.goes_wrong(self.script.rates.doubled) {
            self.count("messages doubled");
            self.at(at, Event::ToCoordinator { node, connection, message: message.clone() });
        }
        let at = if !in_order && self.goes_wrong(self.script.rates.reordered) {
            self.count("messages out of order");
            at + self.rng.random_range(0..2 * SECOND)
        } else {
            at
        };
        self.at(at, Event::ToCoordinator { node, connection, message });
    }

    /// A connection breaks; each side sees it in its own time.
    fn break_link(&mut self, node: usize, connection: u64) {
        let (one, other) = (self.delay(), self.delay());
        self.after(one, Event::LinkEnds { node, connection, heard_by_coordinator: true });
        self.after(other, Event::LinkEnds { node, connection, heard_by_coordinator: false });
    }

    fn link_ends(&mut self, node: usize, connection: u64, heard_by_coordinator: bool) {
        if heard_by_coordinator {
            self.command(|coordinator| coordinator.disconnected(node, connection));
            // Whoever ends it, the other side sees it.
            let wait = self.delay();
            if self.hospitals.get(node).is_some_and(|hospital| hospital.connection == Some(connection)) {
                self.after(wait, Event::LinkEnds { node, connection, heard_by_coordinator: false });
            }
            return;
        }
        let Some(hospital) = self.hospitals.get_mut(node) else { return };
        if hospital.connection != Some(connection) {
            return;
        }
        hospital.connection = None;
        let life = hospital.life;
        if hospital.is_up() {
            self.take(node, Happening::Input(Input::Disconnected));
            let wait = self.rng.random_range(RETRY..20 * RETRY);
            self.after(wait, Event::Dial { node, life });
        }
    }

    fn heard(&mut self, node: usize, connection: u64, message: FromPeer) {
        if !self.coordinator.has(node, connection) {
            return;
        }
        if !self.admitted(node) {
            return self.command(|coordinator| coordinator.disconnected(node, connection));
        }
        self.checks.admitted(
            node,
            self.hospitals.get(node).is_some_and(|h| h.is_live(self.now)),
            "a message",
        );
        self.command(|coordinator| coordinator.heard(node, connection, message));
    }

    fn told(&mut self, node: usize, connection: u64, message: ToPeer) {
        let Some(hospital) = self.hospitals.get(node) else { return };
        if hospital.connection != Some(connection) || !hospital.is_up() {
            return;
        }
        let now = hospital.clock(self.now);
        self.checks.told(node, &message);
        match hospital::read(message, now) {
            Ok(happening) => self.take(node, happening),
            Err(why) => self.checks.found(format!("node {node} cannot read a message: {why}")),
        }
    }

    /// Whether the coordinator lets the node in, by its own rules.
    fn admitted(&mut self, node: usize) -> bool {
        let Some(hospital) = self.hospitals.get(node) else { return false };
        let admitted = self.coordinator.admits(node, hospital.expires, Time(self.now));
        if !admitted {
            self.count("calls refused for their certificate");
        }
        admitted
    }

    // ---- nodes

    fn start(&mut self, node: usize) {
        let (now, dies) = (self.now, self.goes_wrong(self.script.rates.node_dies));
        let step = self.rng.random_range(0..12);
        let Some(hospital) = self.hospitals.get_mut(node) else { return };
        if hospital.is_up() {
            return;
        }
        match hospital.start(now, dies.then_some(step)) {
            Ok(()) => {
                let (life, ledger, halted) = (hospital.life, hospital.ledger(), hospital.is_halted());
                self.trace(|| format!("node {node} is up"));
                self.checks.ledger(node, &ledger);
                if halted {
                    self.checks.found(format!("node {node}: its ledger says that records were lost"));
                }
                self.after(1, Event::Dial { node, life });
                self.plan_tick(node);
            }
            Err(_) if hospital.is_outbox_full() => {
                self.count("starts of nodes that failed for a full disk");
                self.after(30 * SECOND, Event::Start(node));
            }
            Err(why) => self.checks.found(format!("node {node} does not start: {why}")),
        }
    }

    fn plan_tick(&mut self, node: usize) {
        self.serial += 1;
        let number = self.serial;
        let Some(hospital) = self.hospitals.get_mut(node) else { return };
        hospital.tick = number;
        if let Some(wait) = hospital.until_tick(self.now) {
            self.after(wait.clamp(1, MINUTE), Event::NodeTick { node, number });
        }
    }

    fn dial(&mut self, node: usize) {
        let Some(hospital) = self.hospitals.get(node) else { return };
        let (life, connected) = (hospital.life, hospital.connection.is_some());
        if connected {
            return;
        }
        let wait = self.rng.random_range(RETRY..10 * RETRY);
        if !self.coordinator.is_up() || self.goes_wrong(self.script.rates.unreachable) || !self.admitted(node)
        {
            return self.after(wait, Event::Dial { node, life });
        }
        self.checks.admitted(
            node,
            self.hospitals.get(node).is_some_and(|h| h.is_live(self.now)),
            "a connection",
        );
        self.serial += 1;
        let connection = self.serial;
        if let Some(hospital) = self.hospitals.get_mut(node) {
            hospital.connection = Some(connection);
        }
        self.count("connections");
        self.take(node, Happening::Input(Input::Connected));
        self.command(|coordinator| coordinator.connected(node, connection));
    }

    /// Lets a node take what happened, and does what it asks for.
    fn take(&mut self, node: usize, happening: Happening) {
        let now = self.now;
        let Some(hospital) = self.hospitals.get_mut(node) else { return };
        if !hospital.is_up() {
            return;
        }
        let wishes = match hospital.take(now, happening) {
            Ok(wishes) => wishes,
            Err(killed) => {
                self.trace(|| format!("node {node}: {killed}"));
                return self.node_dies(node);
            }
        };
        let life = hospital.life;
        for wish in wishes {
            match wish {
                Wish::Send(message) => self.send(node, message),
                Wish::Fetch { serial } => {
                    let wait = self.delay();
                    self.after(wait, Event::Fetches { node, life, serial });
                }
                Wish::Soon(happening) => {
                    let wait = self.rng.random_range(1..3 * SECOND);
                    self.after(wait, Event::Happens { node, life, happening: Box::new(happening) });
                }
                Wish::Upload(carried) => {
                    self.checks.left(node, &carried);
                    let wait = self.delay();
                    self.after(wait, Event::Sends { node, life, carried: Box::new(carried) });
                }
                Wish::Trained { key, update } => self.checks.trained(node, key, update),
                Wish::Exit => return self.node_dies(node),
            }
        }
        self.plan_tick(node);
    }

    fn node_dies(&mut self, node: usize) {
        self.count("deaths of nodes");
        let (tear, litter) = (self.rng.random::<f64>() < 0.3, self.rng.random::<f64>() < 0.2);
        let forgets = match self.settings.plant {
            Some(Plant::RefundedSpend) => hospital::Forgets::Charge,
            Some(Plant::RepeatedUnmask) => hospital::Forgets::Masked,
            _ => hospital::Forgets::Nothing,
        };
        let Some(hospital) = self.hospitals.get_mut(node) else { return };
        let connection = hospital.connection.take();
        hospital.die(tear, litter, forgets);
        if let Some(connection) = connection {
            let wait = self.delay();
            self.after(wait, Event::LinkEnds { node, connection, heard_by_coordinator: true });
        }
        let wait = self.rng.random_range(SECOND..AWAY);
        self.after(wait, Event::Start(node));
    }

    fn fetches(&mut self, node: usize, serial: u64) {
        let Some(hospital) = self.hospitals.get(node) else { return };
        let Some((model, life)) = hospital.fetching(serial).map(|model| (model, hospital.life)) else {
            return;
        };
        let broken = self.goes_wrong(self.script.rates.broken * 5.0);
        if !self.coordinator.is_up() || broken || !self.admitted(node) {
            return self.after(RETRY, Event::Fetches { node, life, serial });
        }
        let input = match self.coordinator.model(model) {
            Some(parameters) => Input::ModelReady { model, parameters },
            None => {
                Input::FetchFailed { model, detail: "it is not the present one of the active run".into() }
            }
        };
        self.take(node, Happening::Input(input));
    }

    fn sends(&mut self, node: usize, carried: Carried) {
        let Some(hospital) = self.hospitals.get(node) else { return };
        let life = hospital.life;
        if !hospital.is_sending(carried.serial) {
            return;
        }
        // A node waits with its uploads until its control stream is up.
        let broken = self.goes_wrong(self.script.rates.broken * 5.0);
        if broken {
            self.count("uploads broken on their way");
        }
        let connected = hospital_is_connected(&self.hospitals, node);
        if !self.coordinator.is_up() || broken || !connected || !self.admitted(node) {
            return self.after(RETRY, Event::Sends { node, life, carried: Box::new(carried) });
        }
        self.checks.admitted(
            node,
            self.hospitals.get(node).is_some_and(|h| h.is_live(self.now)),
            "an upload",
        );
        let again = self.goes_wrong(self.script.rates.doubled);
        let (at, copy) = (carried.at, carried.clone());
        let mut standing = None;
        self.command(|coordinator| {
            standing = Some(coordinator.update(node, &carried)?);
            Ok(())
        });
        let Some(standing) = standing else {
            // The coordinator died over it.
            return self.after(RETRY, Event::Sends { node, life, carried: Box::new(copy) });
        };
        if again {
            self.count("uploads sent twice");
            self.command(|coordinator| coordinator.update(node, &copy).map(drop));
        }
        // The answer may be lost, and then the node asks again.
        if self.goes_wrong(self.script.rates.broken * 5.0) {
            return self.after(RETRY, Event::Sends { node, life, carried: Box::new(copy) });
        }
        let input = match standing {
            Standing::InSum => Input::UploadDone { at },
            Standing::Wanted | Standing::Unwanted => {
                Input::UploadRefused { at, detail: "the coordinator does not want the update".into() }
            }
        };
        let wait = self.delay();
        self.after(wait, Event::Happens { node, life, happening: Box::new(Happening::Input(input)) });
    }

    // ---- trouble

    fn trouble(&mut self) {
        if self.peace {
            return;
        }
        let node = self.rng.random_range(0..self.hospitals.len().max(1));
        let draw: f64 = self.rng.random();
        if draw < 0.25 {
            if self.hospitals.get(node).is_some_and(Hospital::is_up) {
                self.node_dies(node);
            }
        } else if draw < 0.37 {
            if self.coordinator.is_up() {
                self.coordinator_dies();
            }
        } else if draw < 0.5 {
            if let Some(connection) = self.hospitals.get(node).and_then(|hospital| hospital.connection) {
                self.count("links broken");
                self.break_link(node, connection);
            }
        } else if draw < 0.58 {
            self.count("full disks of the coordinator");
            self.coordinator.disk().set_full(true);
            let wait = self.rng.random_range(SECOND..3 * MINUTE);
            self.after(wait, Event::DiskFreed);
        } else if draw < 0.66 {
            self.count("full disks of nodes");
            if let Some(hospital) = self.hospitals.get_mut(node) {
                hospital.set_outbox_full(true);
            }
            let wait = self.rng.random_range(SECOND..3 * MINUTE);
            self.after(wait, Event::OutboxFreed { node });
        } else if draw < 0.76 {
            self.count("clocks set");
            let by = self.rng.random_range(-(5 * MINUTE as i64)..5 * MINUTE as i64);
            if self.rng.random::<f64>() < 0.3 {
                self.coordinator.skew(by);
            } else if let Some(hospital) = self.hospitals.get_mut(node) {
                hospital.skew += by;
            }
        } else if draw < 0.82 {
            self.revoked(node);
        } else if draw < 0.9 {
            // Everybody at once: a power cut.
            self.count("power cuts");
            if self.coordinator.is_up() {
                self.coordinator_dies();
            }
            for node in 0..self.hospitals.len() {
                if self.hospitals.get(node).is_some_and(Hospital::is_up) {
                    self.node_dies(node);
                }
            }
        }
        let mean = self.script.rates.pause;
        let wait = self.rng.random_range(mean / 4..2 * mean);
        self.after(wait, Event::Trouble);
    }

    fn peace_begins(&mut self) {
        self.trace(|| "peace: nothing more goes wrong".to_owned());
        self.peace = true;
        self.coordinator.disk().set_full(false);
        self.coordinator.disk().arm(None);
        for node in 0..self.hospitals.len() {
            if let Some(hospital) = self.hospitals.get_mut(node) {
                hospital.set_outbox_full(false);
                hospital.spare();
            }
            self.enrols(node);
        }
    }

    // ---- certificates

    /// A certificate's end, and the moment when its node renews it.
    fn certificate_begins(&mut self, node: usize) {
        let Some(hospital) = self.hospitals.get(node) else { return };
        let (expires, left) = (hospital.expires, hospital.expires.0.saturating_sub(self.now));
        self.at(expires.0, Event::Expires(node));
        self.after(left * 2 / 3, Event::Renews(node));
    }

    fn certificate_ends(&mut self, node: usize) {
        let Some(hospital) = self.hospitals.get(node) else { return };
        if hospital.expires > Time(self.now) {
            return; // renewed in time
        }
        let connection = hospital.connection;
        self.count("certificates that ended");
        // The coordinator ends the stream when it sees it.
        if let Some(connection) = connection
            && !self.admitted(node)
        {
            self.break_link(node, connection);
        }
        let wait = self.rng.random_range(SECOND..10 * MINUTE);
        self.after(wait, Event::Enrols(node));
    }

    fn renews(&mut self, node: usize) {
        let fails = self.goes_wrong(0.2);
        let Some(hospital) = self.hospitals.get(node) else { return };
        if !hospital.is_live(self.now) || hospital.connection.is_none() || fails {
            return;
        }
        let (present, expires) = (hospital.expires, Time(self.now + self.script.certificate));
        if self.coordinator.renew(node, present, expires, Time(self.now)) {
            self.count("certificates renewed");
            if let Some(hospital) = self.hospitals.get_mut(node) {
                hospital.expires = expires;
            }
            self.certificate_begins(node);
        } else if self.coordinator.is_up() {
            self.unknown_outcome(node);
        }
    }

    fn revoked(&mut self, node: usize) {
        if !self.coordinator.is_up() {
            return;
        }
        if !self.coordinator.revoke(node, Time(self.now)) {
            self.unknown_outcome(node);
            return self.after(MINUTE, Event::Enrols(node));
        }
        let Some(hospital) = self.hospitals.get_mut(node) else { return };
        hospital.revoked = true;
        let connection = hospital.connection;
        self.count("nodes revoked");
        if let Some(connection) = connection
            && !self.admitted(node)
        {
            self.break_link(node, connection);
        }
        let wait = self.rng.random_range(MINUTE..10 * MINUTE);
        self.after(wait, Event::Enrols(node));
    }

    /// The operators mend what needs a new token.
    fn enrols(&mut self, node: usize) {
        let Some(hospital) = self.hospitals.get_mut(node) else { return };
        if hospital.is_live(self.now) && !self.peace {
            return;
        }
        let lasts = if self.peace { TROUBLE + PATIENCE } else { self.script.certificate };
        let expires = Time(self.now + lasts);
        if self.coordinator.enrol(node, hospital.identity(), expires, Time(self.now)) {
            hospital.expires = expires;
            hospital.revoked = false;
            self.certificate_begins(node);
        } else {
            if self.coordinator.is_up() {
                self.unknown_outcome(node);
            }
            self.after(MINUTE, Event::Enrols(node));
        }
    }

    /// The coordinator died over a node's record, or its disk is full: what is on the disk holds.
    fn unknown_outcome(&mut self, node: usize) {
        let revoked = self.coordinator.is_revoked(node);
        if let Some(hospital) = self.hospitals.get_mut(node) {
            hospital.revoked = revoked;
        }
        self.coordinator_dies();
    }
}

fn hospital_is_connected(hospitals: &[Hospital], node: usize) -> bool {
    hospitals.get(node).is_some_and(|hospital| hospital.connection.is_some())
}

/// A round of the world's one run, as the checkers count it.
fn key_of(at: Attempt) -> RoundKey {
    at.key()
}

/// Whether a run is over.
fn is_over(state: &RunState) -> bool {
    !matches!(state, RunState::Queued | RunState::Running)
}
