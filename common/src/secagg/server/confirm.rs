//! Step 4: collects the survivors' signatures and hands them round.

use super::super::abort::Abort;
use super::super::bitmap::ClientSet;
use super::super::keys::{signed, verify};
use super::super::messages::ToClient;
use super::super::parameters::GraphKind;
use super::{Action, Fault, Session, Step};

impl Session {
    pub(super) fn confirmed(&mut self, index: u16, signature: [u8; 64]) -> Result<(), Fault> {
        if self.step != Step::Confirm || self.signatures.contains_key(&index) {
            return Ok(());
        }
        let (Some(group), Some(alive)) = (&self.group, &self.alive) else { return Ok(()) };
        if !alive.contains(index) {
            return Ok(());
        }
        let entry = group.entry(index).ok_or(Fault::Stranger)?;
        if !verify(&entry.identity, &signed::alive(&group.session, alive), &signature) {
            return Err(Fault::Signature);
        }
        self.signatures.insert(index, signature);
        Ok(())
    }

    pub(super) fn close_confirm(&mut self) -> Result<Vec<Action>, Abort> {
        let group = self.group()?;
        let signers = ClientSet::of(group.roster.len(), self.signatures.keys().copied());
        let needed = group.parameters.threshold;
        if group.parameters.kind == GraphKind::Complete && signers.len() < needed {
            return Err(Abort::Unconfirmed { valid: signers.len(), needed });
        }
        self.step = Step::Unmask;
        Ok(self.send_each(&signers, Self::signatures_message))
    }

    /// The signatures of a signer's neighbours.
    pub(super) fn signatures_message(&self, index: u16) -> Option<ToClient> {
        let group = self.group.as_ref().filter(|_| self.signatures.contains_key(&index))?;
        let neighbours = group.graph.neighbours(index).iter();
        let signatures =
            neighbours.filter_map(|other| Some((*other, *self.signatures.get(other)?))).collect();
        Some(ToClient::AliveSigs { session: group.session.tag(), signatures })
    }
}
