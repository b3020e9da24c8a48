//! Step 3: opens the neighbours' shares and derives the masks of this client's update.

use super::super::abort::Abort;
use super::super::bitmap::ClientSet;
use super::super::context::{Hash, sha256};
use super::super::keys::{MaskKey, MaskTerm, Secret, Sign, agree, open};
use super::super::messages::{Sealed, ToClient, ToServer};
use super::share::Shared;
use super::{Action, Member, Own};

/// Shares of one neighbour's secrets.
pub(super) struct Held {
    pub(super) owner: u16,
    /// Share of its `s_v`.
    pub(super) pair: Secret,
    /// Share of its `b_v`.
    pub(super) own: Secret,
}

/// What the routed shares brought.
pub(super) struct Received {
    /// Clients that shared.
    pub(super) shared: ClientSet,
    /// Neighbours whose shares could not be opened.
    complaints: ClientSet,
    digest: Hash,
}

impl Received {
    /// The routed shares came again: the same gets the same answer.
    pub(super) fn again(
        &self,
        member: &Member,
        shared: &ClientSet,
        sealed: &[(u16, Sealed)],
    ) -> Result<Vec<Action>, Abort> {
        if routed_digest(member, shared, sealed) != self.digest {
            return Err(Abort::Contradiction("set of routed shares"));
        }
        Ok(self.complaint(member).map(Action::Send).into_iter().collect())
    }

    pub(super) fn complaint(&self, member: &Member) -> Option<ToServer> {
        let session = member.group.session.tag();
        let about = self.complaints.clone();
        (!about.is_empty()).then_some(ToServer::Complaints { session, about })
    }
}

/// Masks can be handed out.
pub(super) struct Ready {
    masked: Masked,
    /// X25519(s_u, S_v) for each neighbour that shared.
    pairs: Vec<(u16, Secret)>,
}

/// Masks were handed out.
pub(super) struct Masked {
    /// `b_u`.
    pub(super) own: Secret,
    pub(super) held: Vec<Held>,
    pub(super) received: Received,
}

fn routed_digest(member: &Member, shared: &ClientSet, sealed: &[(u16, Sealed)]) -> Hash {
    let session = member.group.session.tag();
    let message = ToClient::RoutedShares { session, shared: shared.clone(), sealed: sealed.to_vec() };
    sha256(&[&message.encode()])
}

impl Shared {
    /// Opens what the neighbours sent. From here on `s_u` itself is not needed and is wiped.
    pub(super) fn open(
        self,
        own: &Own,
        member: &Member,
        shared: ClientSet,
        sealed: Vec<(u16, Sealed)>,
    ) -> Result<(Ready, Vec<Action>), Abort> {
        let group = &member.group;
        if shared.clients() != group.roster.len() {
            return Err(Abort::Routed);
        }
        if !shared.contains(member.index) {
            return Err(Abort::Excluded);
        }
        let expected = group.neighbours_in(member.index, &shared);
        if !expected.eq(sealed.iter().map(|(from, _)| *from)) {
            return Err(Abort::Routed);
        }
        let needed = group.parameters.threshold;
        let present = group.counted(member.index, &shared);
        if present < needed {
            return Err(Abort::TooFew { step: "sharing keys", present, needed });
        }
        let needed = own.minimum_survivors();
        if shared.len() < needed {
            return Err(Abort::TooFew { step: "sharing keys", present: shared.len(), needed });
        }
        let mut pairs = Vec::with_capacity(sealed.len());
        let mut held = Vec::with_capacity(sealed.len());
        let mut complaints = ClientSet::empty(group.roster.len());
        let neighbours = group.graph.neighbours(member.index);
        for (from, sealed) in &sealed {
            let entry = group.entry(*from).ok_or(Abort::Routed)?;
            let place = neighbours.binary_search(from).map_err(|_| Abort::Routed)?;
            let channel = self.channels.get(place).ok_or(Abort::Routed)?;
            let x = group.graph.share_index(*from, member.index).ok_or(Abort::Routed)?;
            match open(&group.session, channel, &entry.id, &own.id, x, sealed) {
                Some(share) => {
                    held.push(Held { owner: *from, pair: Secret(share.pair), own: Secret(share.own) });
                }
                None => complaints.insert(*from),
            }
            let pair = agree(&self.pair, &entry.mask_key).ok_or(Abort::LowOrder(entry.id))?;
            pairs.push((*from, pair));
        }
        let digest = routed_digest(member, &shared, &sealed);
        let received = Received { shared, complaints, digest };
        let mut actions: Vec<Action> = received.complaint(member).map(Action::Send).into_iter().collect();
        actions.push(Action::Ready);
        Ok((Ready { masked: Masked { own: self.own, held, received }, pairs }, actions))
    }
}

impl Ready {
    pub(super) fn received(&self) -> &Received {
        &self.masked.received
    }

    /// The own mask and one for each neighbour that shared, for each segment. The pair secrets are wiped.
    pub(super) fn hand_out(self, own: &Own, member: &Member, segments: u8) -> (Masked, Vec<MaskTerm>) {
        let session = &member.group.session;
        let mut terms = Vec::with_capacity(usize::from(segments) * (self.pairs.len() + 1));
        for segment in 0..segments {
            let key = MaskKey::own(session, &self.masked.own, segment, &own.id);
            terms.push(MaskTerm { key, sign: Sign::Add, segment });
            for (other, secret) in &self.pairs {
                let Some(other) = member.group.id(*other) else { continue };
                let key = MaskKey::pair(session, secret, segment, &own.id, &other);
                terms.push(MaskTerm { key, sign: Sign::of_pair(&own.id, &other), segment });
            }
        }
        (self.masked, terms)
    }
}

impl Masked {
    pub(super) fn received(&self) -> &Received {
        &self.received
    }
}
