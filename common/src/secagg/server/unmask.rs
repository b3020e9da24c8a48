//! Steps 5 and 6: takes what the survivors reveal, recovers what is missing, and lists the masks to take out.

use std::collections::BTreeSet;

use zeroize::Zeroizing;

use super::super::abort::Abort;
use super::super::bitmap::ClientSet;
use super::super::keys::{MaskKey, MaskTerm, Secret, Sign, agree, commit};
use super::super::messages::{Late, ToClient, Unmask};
use super::super::shamir::{HeldShare, WeightCache, recover};
use super::journal::Record;
use super::{Action, Fault, Session, Step};

impl Session {
    pub(super) fn unmask_came(&mut self, index: u16, unmask: Unmask) -> Result<(), Fault> {
        if self.step != Step::Unmask
            || !self.signatures.contains_key(&index)
            || self.unmasks.contains_key(&index)
        {
            return Ok(());
        }
        let (Some(group), Some(shared), Some(alive)) = (&self.group, &self.shared, &self.alive) else {
            return Ok(());
        };
        let is_dead = |owner: u16| shared.contains(owner) && !alive.contains(owner);
        let neighbours = group.graph.neighbours(index);
        if !unmask.dead.iter().all(|(owner, _)| is_dead(*owner) && neighbours.binary_search(owner).is_ok()) {
            return Err(Fault::Malformed);
        }
        let entry = group.entry(index).ok_or(Fault::Stranger)?;
        let shares = self.shares.get(&index).ok_or(Fault::Stranger)?;
        if commit(&group.session, &entry.id, &unmask.own) != shares.commitment {
            return Err(Fault::Commitment);
        }
        self.unmasks.insert(index, unmask);
        Ok(())
    }

    pub(super) fn close_unmask(&mut self) -> Result<Vec<Action>, Abort> {
        let group = self.group()?;
        let alive = self.alive.as_ref().ok_or(Abort::Over)?;
        let answered = ClientSet::of(group.roster.len(), self.unmasks.keys().copied());
        let silent =
            ClientSet::of(group.roster.len(), alive.iter().filter(|&index| !answered.contains(index)));
        if silent.is_empty() {
            return self.finish();
        }
        let lost = |owner: &u16| self.holders(*owner, &answered) < group.parameters.threshold;
        if let Some(owner) = silent.iter().find(lost) {
            return Err(group.id(owner).map_or(Abort::Over, Abort::Recovery));
        }
        let mut actions = Vec::new();
        match &self.silent {
            // Restored: clients answer about one list only.
            Some(asked) if silent.is_subset_of(asked) => {}
            Some(_) => {
                let owner = silent.iter().next().and_then(|index| group.id(index));
                return Err(owner.map_or(Abort::Over, Abort::Recovery));
            }
            None => {
                actions.push(Action::Journal(self.record(&Record::Late(&silent))));
                self.silent = Some(silent);
            }
        }
        self.step = Step::Late;
        actions.extend(self.send_each(&answered, Self::late_message));
        Ok(actions)
    }

    /// Whether a client that answered holds a share of a silent one's mask.
    pub(super) fn helps(&self, index: u16) -> bool {
        let (Some(group), Some(silent)) = (&self.group, &self.silent) else { return false };
        !silent.contains(index) && group.neighbours_in(index, silent).next().is_some()
    }

    pub(super) fn late_message(&self, index: u16) -> Option<ToClient> {
        let group = self.group.as_ref().filter(|_| self.unmasks.contains_key(&index) && self.helps(index))?;
        Some(ToClient::Late {
            session: group.session.tag(),
            alive: self.alive.clone()?,
            silent: self.silent.clone()?,
        })
    }

    pub(super) fn late_came(&mut self, index: u16, late: Late) -> Result<(), Fault> {
        let Some(silent) = self.silent.as_ref().filter(|_| self.step == Step::Late) else { return Ok(()) };
        if !self.unmasks.contains_key(&index) || self.lates.contains_key(&index) {
            return Ok(());
        }
        let neighbours = self.group.as_ref().map_or(&[][..], |group| group.graph.neighbours(index));
        let is_asked = |owner: u16| silent.contains(owner) && neighbours.binary_search(&owner).is_ok();
        if !late.silent.iter().all(|(owner, _)| is_asked(*owner)) {
            return Err(Fault::Malformed);
        }
        self.lates.insert(index, late);
        Ok(())
    }

    /// Recovers what was not revealed and lists all masks that are still in the sum.
    pub(super) fn finish(&mut self) -> Result<Vec<Action>, Abort> {
        let group = self.group()?;
        let (shared, alive) =
            (self.shared.as_ref().ok_or(Abort::Over)?, self.alive.as_ref().ok_or(Abort::Over)?);
        let segments = self.config.segments;
        let mut cache = WeightCache::default();
        let mut liars = BTreeSet::new();
        // A list that grew would leave its keys behind, in memory that nobody wipes.
        let dead = shared.iter().filter(|&index| !alive.contains(index));
        let of_dead = dead.map(|index| group.neighbours_in(index, alive).count()).sum::<usize>();
        let mut terms = Vec::with_capacity(usize::from(segments) * (usize::from(alive.len()) + of_dead));
        for index in alive.iter() {
            let id = group.id(index).ok_or(Abort::Over)?;
            let own = match self.unmasks.get(&index) {
                Some(unmask) => unmask.own.clone(),
                None => {
                    let commitment = self.shares.get(&index).ok_or(Abort::Over)?.commitment;
                    let shares = self.lates.iter().map(|(holder, late)| (*holder, late.silent.as_slice()));
                    self.recovered(&mut cache, &mut liars, index, shares, |secret| {
                        commit(&group.session, &id, secret) == commitment
                    })?
                }
            };
            for segment in 0..segments {
                let key = MaskKey::own(&group.session, &own, segment, &id);
                terms.push(MaskTerm { key, sign: Sign::Subtract, segment });
            }
        }
        for index in shared.iter().filter(|&index| !alive.contains(index)) {
            let dead = group.entry(index).ok_or(Abort::Over)?;
            let living: Vec<u16> = group.neighbours_in(index, alive).collect();
            if living.is_empty() {
                continue;
            }
            let shares = self.unmasks.iter().map(|(holder, unmask)| (*holder, unmask.dead.as_slice()));
            let secret = self.recovered(&mut cache, &mut liars, index, shares, |secret| {
                secret.is_scalar_of(&dead.mask_key)
            })?;
            for other in living {
                let other = group.entry(other).ok_or(Abort::Over)?;
                let pair = agree(&secret, &other.mask_key).ok_or(Abort::LowOrder(other.id))?;
                let sign = Sign::of_pair(&other.id, &dead.id).opposite();
                for segment in 0..segments {
                    let key = MaskKey::pair(&group.session, &pair, segment, &other.id, &dead.id);
                    terms.push(MaskTerm { key, sign, segment });
                }
            }
        }
        self.step = Step::Opened;
        self.wipe();
        let fault = |index| Some(Action::Fault(self.group.as_ref()?.id(index)?, Fault::Share));
        let mut actions: Vec<Action> = liars.into_iter().filter_map(fault).collect();
        actions.push(Action::Unmask(terms));
        Ok(actions)
    }

    /// One secret of `owner` from the shares that its neighbours sent.
    fn recovered<'a>(
        &self,
        cache: &mut WeightCache,
        liars: &mut BTreeSet<u16>,
        owner: u16,
        sent: impl Iterator<Item = (u16, &'a [(u16, Secret)])>,
        is_right: impl Fn(&Secret) -> bool,
    ) -> Result<Secret, Abort> {
        let group = self.group()?;
        let id = group.id(owner).ok_or(Abort::Over)?;
        let neighbours = usize::from(group.parameters.neighbours);
        let (mut holders, mut shares) = (Vec::with_capacity(neighbours), Vec::with_capacity(neighbours + 1));
        // Who was caught before comes last, so that one liar costs one search.
        let (honest, caught): (Vec<_>, Vec<_>) = sent.partition(|(holder, _)| !liars.contains(holder));
        for (holder, list) in honest.into_iter().chain(caught) {
            let Ok(place) = list.binary_search_by_key(&owner, |(owner, _)| *owner) else { continue };
            let (Some((_, share)), Some(x)) = (list.get(place), group.graph.share_index(owner, holder))
            else {
                continue;
            };
            holders.push(holder);
            shares.push(HeldShare { x, value: share.0 });
        }
        let check = |secret: &Zeroizing<[u8; 32]>| is_right(&Secret(**secret));
        let found = recover(cache, &shares, group.parameters.threshold, check).ok_or(Abort::Recovery(id))?;
        liars.extend(found.wrong.iter().filter_map(|place| holders.get(*place)));
        Ok(Secret(*found.secret))
    }
}
