//! Who takes part in a simulation, and what each has to learn from.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use tributary_client::data::Split;
use tributary_client::machine::{ExampleCounts, Input, NodeMachine, Profile, Role};
use tributary_client::partition::{Share, Shift};
use tributary_client::shard::Shard;
use tributary_common::ids::NodeName;
use tributary_common::time::Time;

use crate::scenario::{Federation, Scenario};

/// A client by its place in the order of the names.
pub(super) type Index = u32;

/// The clients by name, the held-out set's node among them.
pub(super) struct Population {
    names: Vec<NodeName>,
    clients: Vec<Client>,
    /// The parts of the data set, each in one buffer.
    train: Arc<Split>,
    test: Arc<Split>,
    trainer: Arc<Profile>,
    evaluator: Arc<Profile>,
}

struct Client {
    train: Arc<[u32]>,
    test: Arc<[u32]>,
    /// How it sees its training examples.
    shift: Option<Arc<Shift>>,
    declared_examples: Option<u64>,
    role: Role,
}

impl Population {
    /// The federation's clients, and a node for what its data hold out.
    pub(super) fn new(scenario: &Scenario, federation: Federation) -> Self {
        let Federation { dataset, shares, .. } = federation;
        let declared: Vec<Option<u64>> =
            shares.iter().map(|share| scenario.data.declared_examples_of(Some(&share.name))).collect();
        let profile = |role| {
            Arc::new(Profile {
                role,
                policy: scenario.policy.clone(),
                example_shape: dataset.example_shape.clone(),
                classes: dataset.classes,
                public_test: scenario.data.public_test,
                // Each client's own is in its task; the scenario refused what is fitted or not declared.
                declared_examples: declared.first().copied().flatten(),
                fitted: Vec::new(),
                grouped: !dataset.train.groups.is_empty(),
                drain_seconds: 0,
            })
        };
        let (trainer, evaluator) = (profile(Role::Trainer), profile(Role::Evaluator));
        let client = |share: Share| {
            let Share { name, train, test, shift } = share;
            let declared_examples = scenario.data.declared_examples_of(Some(&name));
            (name, Client { train, test, shift, declared_examples, role: Role::Trainer })
        };
        let mut clients: Vec<(NodeName, Client)> = shares.into_iter().map(client).collect();
        clients.sort_by(|a, b| a.0.cmp(&b.0));
        let held_out = Shard::whole(dataset.test.clone());
        if !held_out.is_empty() {
            let client = Client {
                train: [].into(),
                test: held_out.indices,
                shift: None,
                declared_examples: None,
                role: Role::Evaluator,
            };
            let name = evaluators_name(&clients);
            let place = clients.partition_point(|(other, _)| *other < name);
            clients.insert(place, (name, client));
        }
        let (names, clients) = clients.into_iter().unzip();
        Self { names, clients, train: dataset.train, test: dataset.test, trainer, evaluator }
    }

    /// Every node.
    pub(super) fn indices(&self) -> Range<Index> {
        0..Index::try_from(self.names.len()).unwrap_or(Index::MAX)
    }

    pub(super) fn find(&self, name: &NodeName) -> Option<Index> {
        self.names.binary_search(name).ok().and_then(|at| Index::try_from(at).ok())
    }

    pub(super) fn name(&self, index: Index) -> Option<&NodeName> {
        self.names.get(index as usize)
    }

    pub(super) fn role(&self, index: Index) -> Option<Role> {
        self.clients.get(index as usize).map(|client| client.role)
    }

    /// The nodes that `are_here`, with what they are there for.
    pub(super) fn roles(&self, are_here: impl Fn(Index) -> bool) -> BTreeMap<NodeName, Role> {
        let here = self.indices().filter(|index| are_here(*index));
        here.filter_map(|index| Some((self.name(index)?.clone(), self.role(index)?))).collect()
    }

    /// What a node declares as its number of training examples.
    pub(super) fn declared_examples(&self, index: Index) -> Option<u64> {
        self.clients.get(index as usize).and_then(|client| client.declared_examples)
    }

    /// A node's training examples.
    pub(super) fn to_train_on(&self, index: Index) -> Option<Shard> {
        let client = self.clients.get(index as usize)?;
        Some(Shard {
            examples: self.train.clone(),
            indices: client.train.clone(),
            shift: client.shift.clone(),
        })
    }

    /// A node's test examples, in parts of at most `part`.
    pub(super) fn to_evaluate_on(&self, index: Index, part: usize) -> Vec<Shard> {
        let Some(client) = self.clients.get(index as usize) else { return Vec::new() };
        let shard = |indices| Shard { examples: self.test.clone(), indices, shift: None };
        if client.test.len() <= part {
            return vec![shard(client.test.clone())];
        }
        client.test.chunks(part).map(|indices| shard(indices.into())).collect()
    }

    /// A node that has just started, connected.
    pub(super) fn machine(&self, index: Index) -> Option<NodeMachine> {
        let client = self.clients.get(index as usize)?;
        let profile = match client.role {
            Role::Trainer => &self.trainer,
            Role::Evaluator => &self.evaluator,
        };
        let examples = ExampleCounts { train: client.train.len() as u64, test: client.test.len() as u64 };
        let mut machine = NodeMachine::new(profile.clone(), examples, []);
        machine.step(Time(0), Input::Connected);
        Some(machine)
    }
}

/// A name for the held-out set's node that no client has.
fn evaluators_name(clients: &[(NodeName, Client)]) -> NodeName {
    let names = (1..).map(|n| if n == 1 { "evaluator".to_owned() } else { format!("evaluator-{n}") });
    let is_taken = |name: &NodeName| clients.binary_search_by(|(other, _)| other.cmp(name)).is_ok();
    let mut free = names.filter_map(|name| name.parse().ok()).skip_while(is_taken);
    loop {
        // The names never end, so there is a free one.
        if let Some(name) = free.next() {
            return name;
        }
    }
}
