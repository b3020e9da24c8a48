//! Step 4: checks the list of survivors and signs it, once.

use super::super::abort::Abort;
use super::super::bitmap::ClientSet;
use super::super::keys::{Secret, sign, signed};
use super::super::messages::ToServer;
use super::super::parameters::GraphKind;
use super::mask::Masked;
use super::{Member, Own};

/// The survivors were signed. For each neighbour one kind of share is left: the other was wiped, so that no request
/// can ever get both.
pub(super) struct Signed {
    /// `b_u`.
    pub(super) own: Secret,
    /// Shares of `s_v` of neighbours that dropped out.
    pub(super) dead: Vec<(u16, Secret)>,
    /// Shares of `b_v` of neighbours that survived.
    pub(super) living: Vec<(u16, Secret)>,
    alive: ClientSet,
    signature: [u8; 64],
}

impl Masked {
    pub(super) fn confirm(self, own: &Own, member: &Member, alive: ClientSet) -> Result<Signed, Abort> {
        check(own, member, &self.received.shared, &alive)?;
        // Lists that grew would leave shares behind, in memory that nobody wipes.
        let most = self.held.len();
        let (mut dead, mut living) = (Vec::with_capacity(most), Vec::with_capacity(most));
        for held in self.held {
            if alive.contains(held.owner) {
                living.push((held.owner, held.own));
            } else {
                dead.push((held.owner, held.pair));
            }
        }
        let signature = sign(&own.identity, &signed::alive(&member.group.session, &alive));
        Ok(Signed { own: self.own, dead, living, alive, signature })
    }
}

/// Whether these may be the survivors.
fn check(own: &Own, member: &Member, shared: &ClientSet, alive: &ClientSet) -> Result<(), Abort> {
    let group = &member.group;
    if !alive.is_subset_of(shared) {
        return Err(Abort::Survivors);
    }
    if !alive.contains(member.index) {
        return Err(Abort::Excluded);
    }
    let needed = own.minimum_survivors();
    if alive.len() < needed {
        return Err(Abort::TooFew { step: "the survivors", present: alive.len(), needed });
    }
    let needed = group.parameters.threshold;
    let present = group.counted(member.index, alive);
    if present < needed {
        return Err(Abort::TooFew { step: "the survivors next to this client", present, needed });
    }
    if own.policy.fixed_cohort && alive.len() != group.roster.len() {
        return Err(Abort::FixedCohort { missing: group.roster.len() - alive.len() });
    }
    let mut fraction = own.policy.maximum_dropout_per_million;
    if group.parameters.kind == GraphKind::Harary {
        fraction = fraction.min(own.agreement.rules.dropout_per_million);
    }
    let dropped = shared.len() - alive.len();
    let allowed = (u64::from(shared.len()) * u64::from(fraction) / 1_000_000) as u16;
    if dropped > allowed {
        return Err(Abort::DropOuts { dropped, shared: shared.len(), allowed });
    }
    let pinned = alive.iter().filter(|&index| member.pinned.contains(index)).count() as u16;
    let needed = own.policy.minimum_pinned_survivors;
    if pinned < needed {
        return Err(Abort::TooFewPinned { pinned, needed });
    }
    Ok(())
}

impl Signed {
    pub(super) fn alive(&self) -> &ClientSet {
        &self.alive
    }

    /// The signature as it was sent.
    pub(super) fn message(&self, member: &Member) -> ToServer {
        ToServer::AliveSig { session: member.group.session.tag(), signature: self.signature }
    }

    /// The list came again: a different one is refused.
    pub(super) fn again(&self, alive: &ClientSet) -> Result<(), Abort> {
        if *alive == self.alive { Ok(()) } else { Err(Abort::Contradiction("list of survivors")) }
    }
}
