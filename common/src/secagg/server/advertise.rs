//! Step 1: takes the clients' keys and fixes the roster.

use super::super::abort::Abort;
use super::super::bitmap::ClientSet;
use super::super::context::ClientId;
use super::super::group::Group;
use super::super::keys::{is_low_order, signed, verify};
use super::super::messages::ToClient;
use super::super::roster::{Entry, Roster};
use super::journal::Record;
use super::{Action, Fault, Session, Step};

impl Session {
    pub(super) fn advertised(&mut self, id: ClientId, entry: Entry) -> Result<(), Fault> {
        let Some(expected) = self.config.members.get(&id) else { return Err(Fault::Stranger) };
        if entry.id != id {
            return Err(Fault::Stranger);
        }
        if let Some(earlier) = self.adverts.get(&id) {
            return if *earlier == entry { Ok(()) } else { Err(Fault::Contradiction) };
        }
        if self.step != Step::Advertise {
            // Too late; it does no harm.
            return Ok(());
        }
        if expected.is_some_and(|identity| identity != entry.identity) {
            return Err(Fault::Identity);
        }
        let keys = signed::advertise(&self.context, &id, &entry.share_key, &entry.mask_key);
        if !verify(&entry.identity, &keys, &entry.signature) {
            return Err(Fault::Signature);
        }
        let own = [entry.identity.0.0, entry.share_key, entry.mask_key];
        let is_taken = self.adverts.values().any(|other| {
            [other.identity.0.0, other.share_key, other.mask_key].iter().any(|key| own.contains(key))
        });
        if is_taken
            || entry.share_key == entry.mask_key
            || is_low_order(&entry.share_key)
            || is_low_order(&entry.mask_key)
        {
            return Err(Fault::Key);
        }
        self.adverts.insert(id, entry);
        Ok(())
    }

    pub(super) fn close_advertise(&mut self) -> Result<Vec<Action>, Abort> {
        let dropped = &self.dropped;
        let entries = self.adverts.values().filter(|entry| !dropped.contains(&entry.id)).cloned().collect();
        let roster = Roster::new(entries)?;
        let parameters = self.config.agreement.rules.parameters(roster.len())?;
        let group = Group::new(&self.context, roster, parameters, self.config.beacon);
        let everybody = ClientSet::of(group.roster.len(), 0..group.roster.len());
        self.group = Some(group);
        self.step = Step::Shares;
        let message = self.roster_message().ok_or(Abort::Over)?;
        let mut actions = vec![Action::Journal(self.record(&Record::Roster(message)))];
        actions.extend(self.send_each(&everybody, |session, _| session.roster_message()));
        Ok(actions)
    }

    pub(super) fn roster_message(&self) -> Option<ToClient> {
        let group = self.group.as_ref()?;
        Some(ToClient::Roster {
            entries: group.roster.entries().to_vec(),
            beacon: group.beacon,
            neighbours: group.parameters.neighbours,
            threshold: group.parameters.threshold,
        })
    }
}
