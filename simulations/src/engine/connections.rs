//! How clients' connections begin and end: with their devices, with faults, and with the attempt.

use tributary_client::machine::{Input, Role};
use tributary_common::record::RoundRecord;
use tributary_server::round;

use super::nodes::Index;
use super::{Action, Computation, Event, Simulation};

impl Simulation<'_> {
    /// Connects those who are online at the start; all are there before a cohort is drawn.
    pub(super) fn gather(&mut self) {
        if self.devices.come_and_go() {
            for index in self.population.indices() {
                if self.population.role(index) == Some(Role::Trainer) {
                    let Some(name) = self.population.name(index) else { continue };
                    let online = self.devices.starts_online(name, index as usize);
                    self.presence.set_online(index, online);
                    self.schedule_change(index);
                }
            }
        }
        let nodes = self.population.roles(|index| self.presence.is_connected(index));
        self.actions.push_back(Action::Run(round::Input::Present { nodes }));
    }

    pub(super) fn schedule_change(&mut self, index: Index) {
        let Some(name) = self.population.name(index) else { return };
        let nth = self.changes.entry(index).or_insert(0);
        *nth += 1;
        let is_online = self.presence.is_online(index);
        if let Some(at) = self.devices.next_change(name, index as usize, *nth, self.now, is_online) {
            self.schedule(at, index, Event::ComesOrGoes);
        }
    }

    /// A client's process is gone, and its work with it.
    pub(super) fn fall_silent(&mut self, index: Index, until_the_attempt_ends: bool) {
        self.forget(index);
        if self.presence.silence(index, until_the_attempt_ends) {
            self.connection_changed(index);
        }
    }

    /// Removes a node with all that it has under way.
    fn forget(&mut self, index: Index) {
        let Some(node) = self.nodes.remove(&index) else { return };
        if let Some(Computation { ends, tickets, .. }) = node.computation {
            self.unschedule(index, ends);
            self.backlog.cancel(tickets);
        }
        self.unschedule(index, node.download.and_then(|download| download.ends));
        // The update goes with the process, or its keys do.
        self.settle_unknown(index);
    }

    /// Tells both sides that a client's connection ended or began. Computations go on without it, transfers wait.
    pub(super) fn connection_changed(&mut self, index: Index) {
        let (Some(name), Some(role)) = (self.population.name(index).cloned(), self.population.role(index))
        else {
            return;
        };
        let is_connected = self.presence.is_connected(index);
        if let Some(mut node) = self.nodes.remove(&index) {
            let now = self.now;
            let effects = if is_connected {
                if let Some(download) = &mut node.download {
                    let end = now + download.left;
                    download.ends = Some((end, self.schedule(end, index, Event::Downloaded)));
                }
                if let Some(computation) = &mut node.computation
                    && let Some(left) = computation.left.take()
                {
                    let end = computation.computed.max(now) + left;
                    computation.ends = Some((end, self.schedule(end, index, Event::Computed)));
                }
                node.machine.step(now, Input::Connected)
            } else {
                if let Some(download) = &mut node.download
                    && let Some(ends) = download.ends.take()
                {
                    download.left = ends.0.0.saturating_sub(now.0);
                    self.events.remove(&(ends.0, index, ends.1));
                }
                if let Some(computation) = &mut node.computation
                    && let Some(ends) = computation.ends
                    && matches!(self.events.get(&(ends.0, index, ends.1)), Some(Event::Computed))
                {
                    self.events.remove(&(ends.0, index, ends.1));
                    computation.ends = None;
                    computation.left = Some(ends.0.0.saturating_sub(computation.computed.max(now).0));
                }
                node.machine.step(now, Input::Disconnected)
            };
            self.nodes.insert(index, node);
            for effect in effects {
                self.perform(index, effect);
            }
        }
        self.actions.push_back(Action::Run(if is_connected {
            round::Input::Connected { node: name, role }
        } else {
            round::Input::Disconnected { node: name }
        }));
    }

    /// An attempt is over: whoever is not here has nothing to go on with.
    pub(super) fn attempt_ended(&mut self, record: &RoundRecord) {
        self.idle_since = self.now;
        self.clock.ended(record, self.job.cohort.deadline_seconds);
        // Whoever is not here now starts anew when it comes: its work is for an attempt that is over.
        let presence = &self.presence;
        let gone = self.nodes.keys().filter(|index| !presence.is_connected(**index));
        for index in gone.copied().collect::<Vec<Index>>() {
            self.forget(index);
        }
        let silent = self.presence.silent_until_the_end();
        self.actions.extend(silent.into_iter().map(Action::Revive));
    }
}
