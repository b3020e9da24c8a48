//! A whole federation in one thread: nodes and a coordinator that exchange encoded messages.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ed25519_dalek::SigningKey;

use super::known_answers::stream;
use crate::ids::NodeName;
use crate::ledger::hex::Hex;
use crate::ledger::record::PublicKey;
use crate::privacy::noise::SecretRng;
use crate::secagg::abort::Abort;
use crate::secagg::client::{self, Action as ClientAction};
use crate::secagg::context::{Agreement, ClientId};
use crate::secagg::journal::UploadJournal;
use crate::secagg::keys::{MaskTerm, Sign};
use crate::secagg::messages::{ToClient, ToServer};
use crate::secagg::parameters::{Rules, ThreatLevel};
use crate::secagg::peers::{ClientPolicy, Peers};
use crate::secagg::server::{self, Action as ServerAction, Fault, Step};

/// Coordinates of a test's update.
pub(crate) const VALUES: usize = 5;

pub(crate) fn agreement() -> Agreement {
    Agreement {
        task: "task".into(),
        round: 1,
        attempt: 0,
        rules: Rules {
            level: ThreatLevel::Semi,
            corrupt_per_million: 50_000,
            dropout_per_million: 100_000,
            minimum_survivors: 3,
            maximum_clients: 1000,
        },
        settings: Hex([1; 32]),
        model: Hex([2; 32]),
        support: Hex([3; 32]),
        server: Hex([4; 32]),
    }
}

/// A policy that leaves everything to the protocol.
pub(crate) fn lenient() -> ClientPolicy {
    ClientPolicy {
        minimum_pinned_survivors: 0,
        maximum_dropout_per_million: 1_000_000,
        ..ClientPolicy::default()
    }
}

pub(crate) fn name(index: usize) -> NodeName {
    format!("node-{index}").parse().unwrap()
}

pub(crate) fn identity(index: usize) -> SigningKey {
    let mut seed = [7; 32];
    seed[..8].copy_from_slice(&index.to_le_bytes());
    SigningKey::from_bytes(&seed)
}

pub(crate) fn public(key: &SigningKey) -> PublicKey {
    PublicKey(Hex(key.verifying_key().to_bytes()))
}

/// Adds masks to a segment's words.
pub(crate) fn apply(terms: &[MaskTerm], segment: u8, words: &mut [u32]) {
    for term in terms.iter().filter(|term| term.segment == segment) {
        for (word, mask) in words.iter_mut().zip(stream(&term.key, VALUES)) {
            *word = match term.sign {
                Sign::Add => word.wrapping_add(mask),
                Sign::Subtract => word.wrapping_sub(mask),
            };
        }
    }
}

/// One node.
pub(crate) struct Node {
    pub(crate) id: ClientId,
    pub(crate) session: client::Session,
    pub(crate) first: ToServer,
    pub(crate) journal: UploadJournal,
    pub(crate) values: Vec<u32>,
    pub(crate) masked: Option<Vec<u32>>,
    pub(crate) outcome: Option<Abort>,
    pub(crate) included: Option<bool>,
    pub(crate) rng: SecretRng,
}

impl Node {
    pub(crate) fn new(index: usize, agreement: Agreement, policy: ClientPolicy, peers: Peers) -> Self {
        Self::try_new(index, agreement, policy, peers, UploadJournal::default()).unwrap()
    }

    pub(crate) fn try_new(
        index: usize,
        agreement: Agreement,
        policy: ClientPolicy,
        peers: Peers,
        journal: UploadJournal,
    ) -> Result<Self, Abort> {
        let mut rng = SecretRng::new().unwrap();
        let id = ClientId::of(&name(index));
        let config = client::SessionConfig { agreement, id, identity: identity(index), policy, peers };
        let (session, first) = client::Session::start(config, &journal, &mut rng)?;
        let values = (0..VALUES).map(|at| (index * 1000 + at) as u32 ^ 0x8000_0000).collect();
        Ok(Self { id, session, first, journal, values, masked: None, outcome: None, included: None, rng })
    }

    /// Takes a message; answers in bytes that were read back.
    pub(crate) fn receive(&mut self, message: ToClient) -> Result<Vec<ToServer>, Abort> {
        let message = ToClient::decode(&message.encode()).unwrap();
        let actions = self.session.receive(message, &mut self.rng)?;
        let mut answers = Vec::new();
        for action in actions {
            match action {
                ClientAction::Send(answer) => answers.push(ToServer::decode(&answer.encode()).unwrap()),
                ClientAction::Committed { included } => self.included = Some(included),
                ClientAction::Ready | ClientAction::Remember(_) => {}
            }
        }
        Ok(answers)
    }

    /// Records the upload and masks it; the same bytes if it is asked for again.
    pub(crate) fn upload(&mut self) -> Vec<u32> {
        if let Some(masked) = &self.masked {
            return masked.clone();
        }
        self.journal.record(self.session.upload().unwrap()).unwrap();
        let terms = self.session.mask_keys(&self.journal, 1).unwrap();
        let mut masked = self.values.clone();
        apply(&terms, 0, &mut masked);
        self.masked = Some(masked.clone());
        masked
    }
}

/// Before which step a node dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Until {
    Shares,
    Upload,
    Confirm,
    Unmask,
    Late,
}

/// Nodes and a coordinator.
pub(crate) struct Federation {
    pub(crate) config: server::SessionConfig,
    pub(crate) server: server::Session,
    pub(crate) nodes: BTreeMap<ClientId, Node>,
    /// Nodes by their number.
    pub(crate) ids: Vec<ClientId>,
    pub(crate) dead: BTreeSet<ClientId>,
    pub(crate) queue: VecDeque<(ClientId, ToClient)>,
    pub(crate) records: Vec<Vec<u8>>,
    pub(crate) faults: Vec<(ClientId, Fault)>,
    pub(crate) sum: Vec<u32>,
    pub(crate) outcome: Option<Result<Vec<u32>, Abort>>,
}

impl Federation {
    pub(crate) fn new(count: usize) -> Self {
        Self::with(count, agreement(), |_| (lenient(), Peers::default()))
    }

    pub(crate) fn with(
        count: usize,
        agreement: Agreement,
        of: impl Fn(usize) -> (ClientPolicy, Peers),
    ) -> Self {
        let nodes = (0..count).map(|index| {
            let (policy, peers) = of(index);
            Node::new(index, agreement.clone(), policy, peers)
        });
        Self::of(nodes.collect(), agreement)
    }

    pub(crate) fn of(nodes: Vec<Node>, agreement: Agreement) -> Self {
        let ids: Vec<ClientId> = nodes.iter().map(|node| node.id).collect();
        let members = ids.iter().map(|id| (*id, None)).collect();
        let config = server::SessionConfig { agreement, members, segments: 1, beacon: [9; 32] };
        Self {
            server: server::Session::new(config.clone()),
            config,
            nodes: nodes.into_iter().map(|node| (node.id, node)).collect(),
            ids,
            dead: BTreeSet::new(),
            queue: VecDeque::new(),
            records: Vec::new(),
            faults: Vec::new(),
            sum: vec![0; VALUES],
            outcome: None,
        }
    }

    pub(crate) fn node(&mut self, index: usize) -> &mut Node {
        self.nodes.get_mut(&self.ids[index]).unwrap()
    }

    /// Carries out what the coordinator wants.
    pub(crate) fn perform(&mut self, actions: Vec<ServerAction>) {
        for action in actions {
            match action {
                ServerAction::Send(id, message) => self.queue.push_back((id, message)),
                ServerAction::Journal(record) => self.records.push(record),
                ServerAction::Fault(id, fault) => self.faults.push((id, fault)),
                ServerAction::Unmask(terms) => {
                    apply(&terms, 0, &mut self.sum);
                    self.outcome = Some(Ok(self.sum.clone()));
                }
                ServerAction::Abort(abort) => self.outcome = Some(Err(abort)),
            }
        }
    }

    /// Gives a node's answers to the coordinator.
    pub(crate) fn answer(&mut self, id: ClientId, answers: Vec<ToServer>) {
        for answer in answers {
            let actions = self.server.receive(id, answer);
            self.perform(actions);
        }
    }

    /// Delivers what is queued, and what follows.
    pub(crate) fn deliver(&mut self) {
        while let Some((id, message)) = self.queue.pop_front() {
            if self.dead.contains(&id) {
                continue;
            }
            let node = self.nodes.get_mut(&id).unwrap();
            match node.receive(message) {
                Ok(answers) => self.answer(id, answers),
                Err(abort) => {
                    if !matches!(abort, Abort::Told(_) | Abort::Over) {
                        self.answer(id, vec![ToServer::Abort(abort.reason())]);
                    }
                    let node = self.nodes.get_mut(&id).unwrap();
                    node.outcome.get_or_insert(abort);
                }
            }
        }
    }

    pub(crate) fn advertise(&mut self) {
        for id in self.ids.clone() {
            if !self.dead.contains(&id) {
                let first = self.nodes[&id].first.clone();
                self.answer(id, vec![first]);
            }
        }
    }

    pub(crate) fn upload(&mut self) {
        for id in self.ids.clone() {
            let node = self.nodes.get_mut(&id).unwrap();
            let can = matches!(node.session.step(), client::Step::Ready) || node.masked.is_some();
            if self.dead.contains(&id) || !can {
                continue;
            }
            let masked = node.upload();
            if self.server.upload_arrived(id) {
                self.sum.iter_mut().zip(masked).for_each(|(sum, word)| *sum = sum.wrapping_add(word));
            }
        }
    }

    /// Closes the step without delivering what follows.
    pub(crate) fn close(&mut self) {
        let actions = self.server.close_step();
        self.perform(actions);
    }

    /// Kills nodes by number: they receive and send nothing more.
    pub(crate) fn kill(&mut self, nodes: impl IntoIterator<Item = usize>) {
        for index in nodes {
            self.dead.insert(self.ids[index]);
        }
    }

    /// Goes on honestly until the coordinator is at `step`, with its messages for that step queued, not delivered.
    pub(crate) fn run_to(&mut self, step: Step) {
        while self.server.step() < step {
            match self.server.step() {
                Step::Advertise => self.advertise(),
                Step::Collect => {
                    self.deliver();
                    self.upload();
                }
                _ => self.deliver(),
            }
            self.close();
        }
    }

    /// Runs to the end; before each step, the nodes that `dies` says have died.
    pub(crate) fn run(&mut self, dies: impl Fn(usize, Until) -> bool) -> Result<Vec<u32>, Abort> {
        while self.outcome.is_none() {
            let before = match self.server.step() {
                Step::Shares => Some(Until::Shares),
                Step::Collect => Some(Until::Upload),
                Step::Confirm => Some(Until::Confirm),
                Step::Unmask => Some(Until::Unmask),
                Step::Late => Some(Until::Late),
                _ => None,
            };
            if let Some(before) = before {
                let dying: Vec<usize> = (0..self.ids.len()).filter(|&index| dies(index, before)).collect();
                self.kill(dying);
            }
            let step = self.server.step();
            self.run_to(match step {
                Step::Advertise => Step::Shares,
                Step::Shares => Step::Collect,
                Step::Collect => Step::Confirm,
                Step::Confirm => Step::Unmask,
                // It may skip one.
                Step::Unmask => Step::Late,
                _ => Step::Opened,
            });
        }
        let commits = self.server.commit();
        self.perform(commits);
        self.deliver();
        self.outcome.clone().unwrap()
    }

    /// The plain sum of these nodes' values.
    pub(crate) fn plain_sum(&self, nodes: impl IntoIterator<Item = usize>) -> Vec<u32> {
        let mut sum = vec![0u32; VALUES];
        for index in nodes {
            let values = &self.nodes[&self.ids[index]].values;
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum = sum.wrapping_add(*value));
        }
        sum
    }
}
