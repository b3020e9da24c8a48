//! A roster with what follows from it: the session's id, the graph, who counts towards the threshold.

use super::bitmap::ClientSet;
use super::context::{ClientId, Hash, SessionId};
use super::graph::{self, Graph};
use super::parameters::{GraphKind, Parameters};
use super::roster::{Entry, Roster};

/// The clients of one session.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) roster: Roster,
    pub(crate) session: SessionId,
    pub(crate) parameters: Parameters,
    pub(crate) graph: Graph,
    pub(crate) beacon: Hash,
}

impl Group {
    pub(crate) fn new(context: &Hash, roster: Roster, parameters: Parameters, beacon: Hash) -> Self {
        let session = SessionId::new(context, &roster.root(context));
        let graph = Graph::new(&parameters, &graph::seed(&session, &beacon));
        Self { roster, session, parameters, graph, beacon }
    }

    pub(crate) fn entry(&self, index: u16) -> Option<&Entry> {
        self.roster.get(index)
    }

    pub(crate) fn id(&self, index: u16) -> Option<ClientId> {
        self.roster.get(index).map(|entry| entry.id)
    }

    /// The neighbours of `client` that are in `set`, ascending.
    pub(crate) fn neighbours_in<'a>(
        &'a self,
        client: u16,
        set: &'a ClientSet,
    ) -> impl Iterator<Item = u16> + 'a {
        self.graph.neighbours(client).iter().copied().filter(|&other| set.contains(other))
    }

    /// How many of `set` count for `client` towards the threshold.
    ///
    /// On a complete graph it counts itself, on a ring it never does (with itself counted, false drop-outs can cut
    /// an arc out of the ring whose sum then opens).
    pub(crate) fn counted(&self, client: u16, set: &ClientSet) -> u16 {
        let neighbours = self.neighbours_in(client, set).count() as u16;
        let itself = self.parameters.kind == GraphKind::Complete && set.contains(client);
        neighbours + u16::from(itself)
    }
}
