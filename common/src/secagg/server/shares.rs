//! Step 2: takes the sealed shares and routes them.

use super::super::abort::Abort;
use super::super::bitmap::ClientSet;
use super::super::client::shares_digest;
use super::super::keys::{signed, verify};
use super::super::messages::{Shares, ToClient};
use super::journal::Record;
use super::{Action, Fault, Session, Step};

impl Session {
    pub(super) fn shares_came(&mut self, index: u16, shares: Shares) -> Result<(), Fault> {
        if let Some(earlier) = self.shares.get(&index) {
            return if *earlier == shares { Ok(()) } else { Err(Fault::Contradiction) };
        }
        let Some(group) = self.group.as_ref().filter(|_| self.step == Step::Shares) else { return Ok(()) };
        let entry = group.entry(index).ok_or(Fault::Stranger)?;
        if shares.sealed.len() != group.graph.neighbours(index).len() {
            return Err(Fault::Malformed);
        }
        let digest = shares_digest(&shares.sealed, &shares.commitment);
        if !verify(&entry.identity, &signed::shares(&group.session, &entry.id, &digest), &shares.signature) {
            return Err(Fault::Signature);
        }
        self.shares.insert(index, shares);
        Ok(())
    }

    pub(super) fn close_shares(&mut self) -> Result<Vec<Action>, Abort> {
        let group = self.group()?;
        let threshold = group.parameters.threshold;
        let is_dropped = |index: &u16| group.id(*index).is_none_or(|id| self.dropped.contains(&id));
        let mut shared =
            ClientSet::of(group.roster.len(), self.shares.keys().copied().filter(|index| !is_dropped(index)));
        // Who has too few neighbours would end its session: it is left out, and so on.
        loop {
            let lonely: Vec<u16> =
                shared.iter().filter(|&index| group.counted(index, &shared) < threshold).collect();
            if lonely.is_empty() {
                break;
            }
            lonely.into_iter().for_each(|index| shared.remove(index));
        }
        let needed = self.config.agreement.rules.minimum_survivors;
        if shared.len() < needed {
            let present = self.shares.len() as u16;
            return Err(Abort::TooFew { step: "sharing keys", present, needed: needed.max(threshold) });
        }
        self.shares.retain(|index, _| shared.contains(*index));
        self.shared = Some(shared.clone());
        self.step = Step::Collect;
        let mut actions = vec![Action::Journal(self.record(&Record::Shares(&self.shares)))];
        actions.extend(self.send_each(&shared, Self::routed_message));
        Ok(actions)
    }

    /// The shares that a client's neighbours sealed for it.
    pub(super) fn routed_message(&self, index: u16) -> Option<ToClient> {
        let group = self.group.as_ref()?;
        let shared = self.shared.as_ref().filter(|shared| shared.contains(index))?;
        let sealed = group.neighbours_in(index, shared).filter_map(|from| {
            let place = group.graph.share_index(from, index)?;
            let sealed = self.shares.get(&from)?.sealed.get(usize::from(place) - 1)?;
            Some((from, *sealed))
        });
        Some(ToClient::RoutedShares {
            session: group.session.tag(),
            shared: shared.clone(),
            sealed: sealed.collect(),
        })
    }

    pub(super) fn complained(&mut self, index: u16, about: ClientSet) -> Result<(), Fault> {
        let Some(group) = &self.group else { return Ok(()) };
        if about.clients() != group.roster.len() {
            return Err(Fault::Malformed);
        }
        if self.complaints.get(&index).is_some_and(|earlier| *earlier != about) {
            return Err(Fault::Contradiction);
        }
        self.complaints.insert(index, about);
        Ok(())
    }

    /// How many of `holders` hold a share of `owner`'s secrets, as far as is known.
    pub(super) fn holders(&self, owner: u16, holders: &ClientSet) -> u16 {
        let Some(group) = &self.group else { return 0 };
        let complained =
            |holder: &u16| self.complaints.get(holder).is_some_and(|about| about.contains(owner));
        group.neighbours_in(owner, holders).filter(|holder| !complained(holder)).count() as u16
    }
}
