//! Step 5: counts the confirmations, then reveals the own mask and shares of the drop-outs' keys; at most once more,
//! shares of the own masks of survivors that fell silent.

use super::super::abort::Abort;
use super::super::bitmap::ClientSet;
use super::super::keys::{Secret, signed, verify};
use super::super::messages::{Late, ToServer, Unmask};
use super::super::parameters::GraphKind;
use super::Member;
use super::confirm::Signed;

/// The own mask was revealed.
pub(super) struct Unmasked {
    signed: Signed,
    /// Survivors that fell silent, once asked about.
    silent: Option<ClientSet>,
}

impl Signed {
    pub(super) fn unmask(self, member: &Member, signatures: &[(u16, [u8; 64])]) -> Result<Unmasked, Abort> {
        let group = &member.group;
        let message = signed::alive(&group.session, self.alive());
        let needed = group.parameters.threshold;
        // The own signature counts on a complete graph only.
        let mut valid = u16::from(group.parameters.kind == GraphKind::Complete);
        let mut last = None;
        for (signer, signature) in signatures {
            if valid >= needed {
                break;
            }
            let is_new = last.is_none_or(|last| last < *signer);
            last = Some(*signer);
            let is_neighbour = group.graph.neighbours(member.index).binary_search(signer).is_ok();
            let counts = is_new && is_neighbour && self.alive().contains(*signer);
            let entry = group.entry(*signer).filter(|_| counts);
            if entry.is_some_and(|entry| verify(&entry.identity, &message, signature)) {
                valid += 1;
            }
        }
        if valid < needed {
            return Err(Abort::Unconfirmed { valid, needed });
        }
        Ok(Unmasked { signed: self, silent: None })
    }
}

impl Unmasked {
    pub(super) fn signed(&self) -> &Signed {
        &self.signed
    }

    /// The answer; the same each time.
    pub(super) fn message(&self, member: &Member) -> ToServer {
        let session = member.group.session.tag();
        ToServer::Unmask(Unmask { session, own: self.signed.own.clone(), dead: self.signed.dead.clone() })
    }

    /// Answers about survivors that fell silent: once, or again if it is the same question.
    pub(super) fn late(
        mut self,
        member: &Member,
        alive: &ClientSet,
        silent: ClientSet,
    ) -> Result<(Self, ToServer), Abort> {
        self.signed.again(alive)?;
        if !silent.is_subset_of(alive) || silent.contains(member.index) {
            return Err(Abort::Survivors);
        }
        if self.silent.as_ref().is_some_and(|earlier| *earlier != silent) {
            return Err(Abort::Contradiction("list of silent survivors"));
        }
        // At its full size from the beginning: a list that grew would leave shares behind.
        let mut shares: Vec<(u16, Secret)> = Vec::with_capacity(self.signed.living.len());
        shares.extend(self.signed.living.iter().filter(|(owner, _)| silent.contains(*owner)).cloned());
        self.silent = Some(silent);
        let session = member.group.session.tag();
        Ok((self, ToServer::Late(Late { session, silent: shares })))
    }
}
