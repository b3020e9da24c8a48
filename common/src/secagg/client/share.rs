//! Step 2: checks the roster and sends each neighbour a share of this client's two secrets.

use rand::CryptoRng;
use zeroize::Zeroizing;

use super::super::abort::Abort;
use super::super::bitmap::ClientSet;
use super::super::context::{Hash, sha256};
use super::super::group::Group;
use super::super::keys::{Secret, Share, agree, commit, seal, sign, signed, verify};
use super::super::messages::{Shares, ToServer};
use super::super::parameters::{GraphKind, ThreatLevel};
use super::super::peers::Standing;
use super::super::roster::{Entry, Roster};
use super::super::shamir;
use super::advertise::Advertised;
use super::{Action, Member, Own};

/// Shares were sent.
pub(super) struct Shared {
    /// `s_u`.
    pub(super) pair: Secret,
    /// `b_u`.
    pub(super) own: Secret,
    /// X25519(c_u, C_v) for each neighbour, in their order.
    pub(super) channels: Vec<Secret>,
    sent: Shares,
}

impl Advertised {
    /// Checks everything that a roster claims, and shares the secrets.
    pub(super) fn join(
        self,
        own: &Own,
        entries: Vec<Entry>,
        beacon: Hash,
        announced: (u16, u16),
        rng: &mut impl CryptoRng,
    ) -> Result<(Member, Shared, Vec<Action>), Abort> {
        let roster = Roster::new(entries)?;
        let index = roster.index_of(&own.id).ok_or(Abort::OwnEntry)?;
        if roster.get(index) != Some(&self.entry) {
            return Err(Abort::OwnEntry);
        }
        let needed = own.minimum_survivors();
        if roster.len() < needed {
            return Err(Abort::TooFew { step: "the roster", present: roster.len(), needed });
        }
        let parameters = own.agreement.rules.parameters(roster.len())?;
        let (neighbours, threshold) = announced;
        if announced != (parameters.neighbours, parameters.threshold) {
            return Err(Abort::OtherParameters {
                neighbours,
                threshold,
                own_neighbours: parameters.neighbours,
                own_threshold: parameters.threshold,
            });
        }
        if parameters.kind == GraphKind::Harary {
            check_ring(own)?;
        }
        let (pinned, new) = identities(own, &roster, index)?;
        if pinned.len() < own.policy.minimum_pinned_survivors {
            let needed = own.policy.minimum_pinned_survivors;
            return Err(Abort::TooFewPinned { pinned: pinned.len(), needed });
        }
        let member = Member { group: Group::new(&own.context, roster, parameters, beacon), index, pinned };
        let shared = self.share(own, &member, rng)?;
        let mut actions = vec![Action::Send(shared.message())];
        if !new.is_empty() {
            actions.insert(0, Action::Remember(new));
        }
        Ok((member, shared, actions))
    }

    fn share(self, own: &Own, member: &Member, rng: &mut impl CryptoRng) -> Result<Shared, Abort> {
        let Self { secrets, .. } = self;
        let group = &member.group;
        let neighbours = group.graph.neighbours(member.index);
        let mut both = Zeroizing::new([0; 64]);
        both.iter_mut().zip(secrets.pair.0.iter().chain(&secrets.own.0)).for_each(|(to, from)| *to = *from);
        let shares = shamir::split(&both, group.parameters.threshold, neighbours.len() as u16, rng);
        let mut channels = Vec::with_capacity(neighbours.len());
        let mut sealed = Vec::with_capacity(neighbours.len());
        for ((&neighbour, share), x) in neighbours.iter().zip(shares.iter()).zip(1..=u8::MAX) {
            let entry = group.entry(neighbour).ok_or(Abort::Routed)?;
            let keys = signed::advertise(&own.context, &entry.id, &entry.share_key, &entry.mask_key);
            if !verify(&entry.identity, &keys, &entry.signature) {
                return Err(Abort::Signature(entry.id));
            }
            let channel = agree(&secrets.channel, &entry.share_key).ok_or(Abort::LowOrder(entry.id))?;
            let mut parts = Share { x, pair: [0; 32], own: [0; 32] };
            parts.pair.iter_mut().chain(&mut parts.own).zip(share).for_each(|(to, from)| *to = *from);
            sealed.push(seal(&group.session, &channel, &own.id, &entry.id, &parts));
            channels.push(channel);
        }
        let commitment = commit(&group.session, &own.id, &secrets.own);
        let digest = digest(&sealed, &commitment);
        let signature = sign(&own.identity, &signed::shares(&group.session, &own.id, &digest));
        let sent = Shares { session: group.session.tag(), sealed, commitment, signature };
        Ok(Shared { pair: secrets.pair, own: secrets.own, channels, sent })
    }
}

impl Shared {
    /// The shares as they were sent; the same bytes each time.
    pub(super) fn message(&self) -> ToServer {
        ToServer::Shares(self.sent.clone())
    }
}

/// Hash of all sealed shares and of the commitment, which is signed.
pub(in super::super) fn digest(sealed: &[super::super::messages::Sealed], commitment: &Hash) -> Hash {
    sha256(&[sealed.as_flattened(), commitment])
}

/// Rules for cohorts above [`super::super::parameters::COMPLETE_CLIENTS`].
fn check_ring(own: &Own) -> Result<(), Abort> {
    let rules = &own.agreement.rules;
    if rules.level == ThreatLevel::Strict {
        return Err(Abort::NoBeacon);
    }
    if rules.corrupt_per_million < own.policy.minimum_corrupt_per_million {
        return Err(Abort::Policy {
            what: "assumed fraction of colluding clients, in millionths",
            asked: rules.corrupt_per_million.into(),
            allowed: own.policy.minimum_corrupt_per_million.into(),
        });
    }
    Ok(())
}

/// Members that are pinned, and identities never seen before.
fn identities(
    own: &Own,
    roster: &Roster,
    index: u16,
) -> Result<(ClientSet, Vec<(super::ClientId, super::PublicKey)>), Abort> {
    let mut pinned = ClientSet::empty(roster.len());
    let mut new = Vec::new();
    for (other, entry) in (0..).zip(roster.entries()).filter(|(other, _)| *other != index) {
        match own.peers.standing(&entry.id, &entry.identity) {
            Standing::Contradicts => return Err(Abort::Identity(entry.id)),
            Standing::Pinned => pinned.insert(other),
            _ if own.agreement.rules.level == ThreatLevel::Strict => return Err(Abort::NotPinned(entry.id)),
            Standing::Remembered => {}
            Standing::New => new.push((entry.id, entry.identity)),
        }
    }
    Ok((pinned, new))
}
