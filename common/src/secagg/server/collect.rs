//! Step 3: masked updates arrive; at its end the survivors are fixed.

use super::super::abort::Abort;
use super::super::bitmap::ClientSet;
use super::super::messages::ToClient;
use super::super::parameters::GraphKind;
use super::journal::Record;
use super::{Action, Session, Step};

impl Session {
    pub(super) fn close_collect(&mut self) -> Result<Vec<Action>, Abort> {
        let group = self.group()?;
        let uploaded = ClientSet::of(group.roster.len(), self.uploaded.iter().copied());
        let (alive, is_new) = match &self.alive {
            // Restored: the survivors may have signed, so no other list can be asked about.
            Some(alive) if *alive == uploaded => (uploaded, false),
            Some(alive) => {
                let missing = alive.iter().filter(|&index| !uploaded.contains(index)).count() as u16;
                return Err(Abort::UploadsLost { missing });
            }
            None => {
                self.check_survivors(&uploaded)?;
                (uploaded, true)
            }
        };
        self.alive = Some(alive.clone());
        self.step = Step::Confirm;
        let mut actions = Vec::new();
        if is_new {
            actions.push(Action::Journal(self.record(&Record::Alive(&alive))));
        }
        actions.extend(self.send_each(&alive, Self::alive_message));
        Ok(actions)
    }

    /// Whether a sum over these can be opened.
    fn check_survivors(&self, alive: &ClientSet) -> Result<(), Abort> {
        let group = self.group()?;
        let rules = &self.config.agreement.rules;
        let threshold = group.parameters.threshold;
        if alive.len() < rules.minimum_survivors {
            let needed = rules.minimum_survivors;
            return Err(Abort::TooFew { step: "the survivors", present: alive.len(), needed });
        }
        let fewest = alive.iter().map(|index| group.counted(index, alive)).min().unwrap_or(0);
        if fewest < threshold {
            return Err(Abort::TooFew {
                step: "the survivors' neighbours",
                present: fewest,
                needed: threshold,
            });
        }
        let shared = self.shared.as_ref().ok_or(Abort::Over)?;
        let dropped = shared.len() - alive.len();
        let allowed = u64::from(shared.len()) * u64::from(rules.dropout_per_million) / 1_000_000;
        if group.parameters.kind == GraphKind::Harary && u64::from(dropped) > allowed {
            return Err(Abort::DropOuts { dropped, shared: shared.len(), allowed: allowed as u16 });
        }
        for owner in shared.iter().filter(|&index| !alive.contains(index)) {
            let is_needed = group.neighbours_in(owner, alive).next().is_some();
            if is_needed && self.holders(owner, alive) < threshold {
                return Err(group.id(owner).map_or(Abort::Over, Abort::Recovery));
            }
        }
        Ok(())
    }

    pub(super) fn alive_message(&self, index: u16) -> Option<ToClient> {
        let group = self.group.as_ref()?;
        let alive = self.alive.as_ref().filter(|alive| alive.contains(index))?;
        Some(ToClient::Alive { session: group.session.tag(), alive: alive.clone() })
    }
}
