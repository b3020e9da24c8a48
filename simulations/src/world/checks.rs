//! What must hold, whatever happened: checked from outside, by what really was trained, said, sent and written.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tributary_client::machine::{Attempt, RoundKey};
use tributary_client::trainer::ClientUpdate;
use tributary_common::digest::Digest;
use tributary_common::ids::RunId;
use tributary_common::record::{Abandonment, RoundOutcome, RunEvent, RunState};
use tributary_common::secagg::context::ClientId;
use tributary_common::secagg::messages::{ToClient, ToServer};
use tributary_proto::coordinator as wire;
use tributary_proto::coordinator::coordinator_message::Message as ToPeer;
use tributary_proto::coordinator::node_message::Message as FromPeer;
use tributary_server::store::{MemoryStore, Store};

use super::coordinator::RUN;
use super::hospital::{Carried, Hospital};
use super::script::Script;
use super::{Tally, is_over, key_of, twin};

/// After so many the rest would only repeat them.
const ENOUGH: usize = 5;

/// What the world knows of one node.
#[derive(Default)]
struct Seen {
    /// What training produced, by round: the last one.
    trained: BTreeMap<RoundKey, ClientUpdate>,
    /// The bytes that left, by round and digest.
    left: BTreeMap<RoundKey, BTreeMap<Digest, Carried>>,
    /// The ledger as it was last seen, without a torn end.
    ledger: Vec<u8>,
    /// Models of the attempts that it was invited to.
    models: BTreeMap<Attempt, Digest>,
    /// The participants of a session, in the order of its roster, by attempt.
    rosters: BTreeMap<Attempt, Vec<ClientId>>,
    /// The survivors that it was last asked to confirm, by attempt.
    asked: BTreeMap<Attempt, BTreeSet<ClientId>>,
    /// The survivors that it confirmed, by model.
    confirmed: BTreeMap<Digest, BTreeSet<BTreeSet<ClientId>>>,
    /// What it said to open the sum, by attempt.
    unmasked: BTreeMap<Attempt, BTreeSet<Vec<u8>>>,
    /// The highest round of which it was told that its update is published.
    published: u32,
}

/// The checkers.
pub(super) struct Checks {
    violations: Vec<String>,
    nodes: Vec<Seen>,
    coordinators_ledger: Vec<u8>,
    /// The highest round that was announced.
    announced: u32,
    tally: Tally,
}

/// The records of a ledger's file; a torn end is left out.
fn records(file: &[u8]) -> Vec<Value> {
    let whole = file.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let lines = file.get(..whole).unwrap_or_default().split(|byte| *byte == b'\n');
    lines.filter(|line| !line.is_empty()).filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// The file without a torn end.
fn whole(file: &[u8]) -> &[u8] {
    let end = file.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    file.get(..end).unwrap_or_default()
}

/// Rounds of the world's run of which a ledger has a record of this kind.
fn rounds_of(records: &[Value], kind: &str) -> BTreeSet<u32> {
    let body = |record: &Value| record.get("body").cloned().unwrap_or_default();
    let is_kind = |body: &Value| body.get("record").and_then(Value::as_str) == Some(kind);
    let round =
        |body: Value| body.get("round").and_then(Value::as_u64).and_then(|round| round.try_into().ok());
    records.iter().map(body).filter(is_kind).filter_map(round).collect()
}

/// Payloads that a ledger's charges name, by round.
fn sealed(records: &[Value]) -> BTreeMap<u32, BTreeSet<String>> {
    let mut sealed: BTreeMap<u32, BTreeSet<String>> = BTreeMap::new();
    for record in records {
        let Some(body) = record.get("body") else { continue };
        if body.get("record").and_then(Value::as_str) != Some("payload-sealed") {
            continue;
        }
        let round = body.get("round").and_then(Value::as_u64).and_then(|round| u32::try_from(round).ok());
        let digest = body.get("payload").or_else(|| body.get("digest")).and_then(Value::as_str);
        if let (Some(round), Some(digest)) = (round, digest) {
            sealed.entry(round).or_default().insert(digest.to_owned());
        }
    }
    sealed
}

impl Checks {
    pub(super) fn new(nodes: usize) -> Self {
        Self {
            violations: Vec::new(),
            nodes: (0..nodes).map(|_| Seen::default()).collect(),
            coordinators_ledger: Vec::new(),
            announced: 0,
            tally: Tally::new(),
        }
    }

    pub(super) fn found(&mut self, violation: String) {
        self.violations.push(violation);
    }

    /// Whether the rest of a run is of no interest: of a planted bug, one sign is enough.
    pub(super) fn is_enough(&self, planted: bool) -> bool {
        self.violations.len() >= if planted { 1 } else { ENOUGH }
    }

    pub(super) fn into_violations(self) -> Vec<String> {
        self.violations
    }

    pub(super) fn tally(&self) -> Tally {
        self.tally.clone()
    }

    fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    /// Something of a node is about to be taken by the coordinator.
    pub(super) fn admitted(&mut self, node: usize, live: bool, what: &str) {
        if !live {
            self.found(format!(
                "{what} of node {node} was taken, but its certificate has ended or was revoked"
            ));
        }
    }

    pub(super) fn trained(&mut self, node: usize, key: RoundKey, update: ClientUpdate) {
        self.count("trainings");
        if let Some(seen) = self.nodes.get_mut(node) {
            seen.trained.insert(key, update);
        }
    }

    /// An update's bytes leave a node.
    pub(super) fn left(&mut self, node: usize, carried: &Carried) {
        self.count("uploads begun");
        let digest = Digest::of(&carried.bytes);
        if let Some(seen) = self.nodes.get_mut(node) {
            seen.left.entry(key_of(carried.at)).or_default().insert(digest, carried.clone());
        }
    }

    /// A node says something to the coordinator: sent or not, it may have left.
    pub(super) fn said(&mut self, node: usize, message: &FromPeer) {
        let FromPeer::Masking(masking) = message else { return };
        let at = Attempt { run: RunId(masking.run), round: masking.round, attempt: masking.attempt };
        let Some(seen) = self.nodes.get_mut(node) else { return };
        match ToServer::decode(&masking.message) {
            Ok(ToServer::AliveSig { .. }) => {
                let (asked, model) = (seen.asked.get(&at).cloned(), seen.models.get(&at).copied());
                if let (Some(asked), Some(model)) = (asked, model) {
                    let confirmed = seen.confirmed.entry(model).or_default();
                    confirmed.insert(asked);
                    if confirmed.len() > 1 {
                        self.found(format!(
                            "node {node} confirmed two sets of survivors for one model ({at})"
                        ));
                    }
                }
            }
            Ok(ToServer::Unmask(_)) => {
                let said = seen.unmasked.entry(at).or_default();
                said.insert(masking.message.clone());
                let answers = said.len();
                self.count("nodes that opened a sum");
                if answers > 1 {
                    self.found(format!(
                        "node {node} opened the sum of one session twice, differently ({at})"
                    ));
                }
            }
            Ok(ToServer::Abort(_)) => self.count("sessions that a node ended"),
            Ok(_) => {}
            Err(error) => self.found(format!("node {node} said what is no message of a session: {error}")),
        }
    }

    /// The coordinator's message reaches a node.
    pub(super) fn told(&mut self, node: usize, message: &ToPeer) {
        let Some(seen) = self.nodes.get_mut(node) else { return };
        match message {
            ToPeer::Invite(invite) => {
                let at = Attempt { run: RunId(invite.run), round: invite.round, attempt: invite.attempt };
                if let Ok(model) = tributary_proto::digest("model", &invite.model) {
                    seen.models.insert(at, model);
                }
                // Somebody knows by it that the round before is published.
                self.announced = self.announced.max(invite.round.saturating_sub(1));
            }
            ToPeer::Masking(masking) => {
                let at = Attempt { run: RunId(masking.run), round: masking.round, attempt: masking.attempt };
                match ToClient::decode(&masking.message) {
                    Ok(ToClient::Roster { entries, .. }) => {
                        let ids = entries.iter().map(|entry| entry.id).collect();
                        seen.rosters.entry(at).or_insert(ids);
                    }
                    Ok(ToClient::Alive { alive, .. }) => {
                        let roster = seen.rosters.get(&at).map(Vec::as_slice).unwrap_or_default();
                        let members = alive.iter().filter_map(|index| roster.get(usize::from(index)));
                        seen.asked.insert(at, members.copied().collect());
                    }
                    _ => {}
                }
            }
            ToPeer::Dismiss(dismiss) if dismiss.reason() == wire::DismissReason::Published => {
                seen.published = seen.published.max(dismiss.round);
                self.announced = self.announced.max(dismiss.round);
            }
            _ => {}
        }
    }

    pub(super) fn event(&mut self, event: &RunEvent) {
        if let RunEvent::RoundEnded { record } = event {
            match &record.outcome {
                RoundOutcome::Published { .. } => {
                    self.count("rounds published");
                    self.announced = self.announced.max(record.round);
                }
                RoundOutcome::Abandoned { reason } => self.count(match reason {
                    Abandonment::BelowMinimum { .. } => "attempts with too few updates",
                    Abandonment::UnfitModel { .. } => "attempts with an unfit model",
                    Abandonment::SecureAggregation { .. } => "masked attempts that did not complete",
                    Abandonment::Stopped => "attempts that were stopped",
                }),
            }
        }
    }

    /// A new process of the coordinator: what was announced by the last one must be on its disk.
    pub(super) fn coordinator_is_back(&mut self, disk: &MemoryStore) {
        let published = disk.run(RUN).map_or(0, |run| run.head.published);
        let spent = disk.rounds(RUN).map_or(0, |rounds| rounds.iter().filter(|round| round.spent).count());
        let spent = u32::try_from(spent).unwrap_or(u32::MAX);
        if published.saturating_add(spent) < self.announced {
            let announced = self.announced;
            self.found(format!(
                "round {announced} was announced, but after a restart {published} rounds are published and {spent} spent"
            ));
            self.announced = 0;
        }
    }

    /// A ledger only grows.
    fn grows(before: &mut Vec<u8>, now: &[u8]) -> Result<(), String> {
        let now = whole(now);
        if !now.starts_with(before) {
            let (before, now) = (before.len(), now.len());
            return Err(format!(
                "its {before} bytes of before are not the beginning of its {now} bytes of now"
            ));
        }
        *before = now.to_vec();
        Ok(())
    }

    /// A node's ledger, as its file has it.
    pub(super) fn ledger(&mut self, node: usize, file: &[u8]) {
        let Some(seen) = self.nodes.get_mut(node) else { return };
        let grew = Self::grows(&mut seen.ledger, file);
        let records = records(file);
        let (charged, sealed) = (rounds_of(&records, "round-charged"), sealed(&records));
        let is_private = records.iter().any(|record| {
            record.get("body").and_then(|body| body.get("record")).and_then(Value::as_str)
                == Some("job-reserved")
        });
        let mut found = Vec::new();
        if let Err(why) = grew {
            found.push(format!("node {node}: the ledger lost records: {why}"));
        }
        if is_private {
            for (key, payloads) in &seen.left {
                if !charged.contains(&key.round) {
                    found.push(format!(
                        "node {node}: bytes of round {} left, and no charge pays for them",
                        key.round
                    ));
                }
                let named = sealed.get(&key.round).cloned().unwrap_or_default();
                for digest in payloads.keys().map(Digest::to_string) {
                    if !named.contains(&digest) {
                        found.push(format!(
                            "node {node}: the payload {digest} of round {} left, and no charge names it",
                            key.round
                        ));
                    }
                }
                if payloads.len() > 1 {
                    found.push(format!(
                        "node {node}: {} payloads of round {} left",
                        payloads.len(),
                        key.round
                    ));
                }
            }
        }
        self.violations.extend(found);
    }

    /// The ledger of the coordinator's run, as its file has it.
    pub(super) fn coordinators_ledger(&mut self, file: &[u8]) {
        if let Err(why) = Self::grows(&mut self.coordinators_ledger, file) {
            self.found(format!("the coordinator's ledger lost records: {why}"));
        }
    }

    /// Once the run is over; says how it ended.
    pub(super) fn at_the_end(
        &mut self,
        script: &Script,
        disk: &MemoryStore,
        hospitals: &[Hospital],
        over: bool,
    ) -> String {
        let Ok(run) = disk.run(RUN) else {
            self.found("the run is gone".to_owned());
            return "gone".to_owned();
        };
        let rounds = disk.rounds(RUN).unwrap_or_default();
        let published = rounds.iter().filter(|round| matches!(round.outcome, RoundOutcome::Published { .. }));
        let (published, spent) = (published.count(), rounds.iter().filter(|round| round.spent).count());
        let ended = match &run.head.state {
            RunState::Finished => {
                self.count("runs finished");
                if published + spent < script.job.rounds as usize {
                    self.found(format!(
                        "the run is finished after {published} of {} rounds",
                        script.job.rounds
                    ));
                }
                "finished".to_owned()
            }
            RunState::Failed { reason } => {
                self.count("runs failed with a reason");
                let last = rounds.last().map(|record| &record.outcome);
                if !matches!(last, Some(RoundOutcome::Abandoned { .. })) {
                    self.found(format!("the run failed ({reason}), but its last attempt did not"));
                }
                format!("failed: {reason}")
            }
            state => {
                if over || is_over(state) {
                    self.found(format!("the run ended as {state:?}, and nobody stopped it"));
                }
                format!("{state:?}")
            }
        };
        self.sessions();
        self.record(&rounds, hospitals);
        if over {
            self.twin(script, disk, hospitals);
        }
        ended
    }

    /// No masked update of a round left in two forms.
    fn sessions(&mut self) {
        let mut found = Vec::new();
        for (node, seen) in self.nodes.iter().enumerate() {
            for at in seen.unmasked.keys() {
                if seen.left.get(&key_of(*at)).is_some_and(|payloads| payloads.len() > 1) {
                    found.push(format!("node {node} masked its update twice ({at})"));
                }
            }
        }
        self.violations.extend(found);
    }

    /// What the records say was accepted is what those nodes sent.
    fn record(&mut self, rounds: &[tributary_common::record::RoundRecord], hospitals: &[Hospital]) {
        let mut found = Vec::new();
        let mut last = 0;
        for record in rounds {
            if !matches!(record.outcome, RoundOutcome::Published { .. }) {
                continue;
            }
            if record.round <= last {
                found.push(format!("round {} is published twice", record.round));
            }
            last = record.round;
            let key = RoundKey { run: RUN, round: record.round };
            for name in record.accepted() {
                let node = hospitals.iter().position(|hospital| hospital.name == *name);
                let seen = node.and_then(|node| self.nodes.get(node));
                if !seen.is_some_and(|seen| seen.left.contains_key(&key)) {
                    found.push(format!("round {} has an update of {name}, who sent none", record.round));
                }
            }
        }
        self.violations.extend(found);
    }

    /// The same accepted sets in a world without trouble give the same bits.
    fn twin(&mut self, script: &Script, disk: &MemoryStore, hospitals: &[Hospital]) {
        let payload = |node: usize, key: RoundKey, digest: Option<Digest>| {
            let left = self.nodes.get(node)?.left.get(&key)?;
            match digest {
                Some(digest) => left.get(&digest).cloned(),
                None => left.values().next().cloned(),
            }
        };
        let trained = |node: usize, key: RoundKey| self.nodes.get(node)?.trained.get(&key).cloned();
        match twin::compare(script, disk, hospitals, &payload, &trained) {
            Ok(twin::Compared::Same) => self.count("runs with the bits of their undisturbed twin"),
            Ok(twin::Compared::NotPromised) => {}
            Err(why) => self.found(why),
        }
    }
}
