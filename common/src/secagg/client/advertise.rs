//! Step 1: fresh keys for one attempt, signed by the node's identity.

use super::super::abort::Abort;
use super::super::journal::UploadJournal;
use super::super::keys::{Secret, public_of, sign, signed};
use super::super::parameters::{MINIMUM_SURVIVORS, ThreatLevel};
use super::super::roster::Entry;
use super::Own;
use crate::ledger::hex::Hex;
use crate::ledger::record::PublicKey;

/// The secrets of one attempt.
pub(in super::super) struct Secrets {
    /// `c_u`: the channel for shares.
    pub(in super::super) channel: Secret,
    /// `s_u`: the masks shared with neighbours; what neighbours hold shares of.
    pub(in super::super) pair: Secret,
    /// `b_u`: the own mask.
    pub(in super::super) own: Secret,
}

/// Keys were made and sent.
pub(super) struct Advertised {
    pub(super) secrets: Secrets,
    pub(super) entry: Entry,
}

impl Advertised {
    pub(super) fn new(
        own: &Own,
        journal: &UploadJournal,
        rng: &mut impl rand::CryptoRng,
    ) -> Result<Self, Abort> {
        let (rules, policy) = (&own.agreement.rules, &own.policy);
        if rules.level < policy.level {
            let (asked, allowed) = (rules.level as u64, policy.level as u64);
            return Err(Abort::Policy { what: "threat level (0 semi, 1 strict)", asked, allowed });
        }
        if rules.level == ThreatLevel::Strict && own.peers.has_no_pins() {
            return Err(Abort::NoPins);
        }
        if rules.maximum_clients < own.minimum_survivors() {
            return Err(Abort::Policy {
                what: "largest cohort",
                asked: rules.maximum_clients.into(),
                allowed: own.minimum_survivors().into(),
            });
        }
        // Floors and fractions; the size is not known yet.
        rules.parameters(own.minimum_survivors().max(MINIMUM_SURVIVORS))?;
        journal.may_start(&own.agreement.task, own.agreement.round)?;
        let secrets = Secrets {
            channel: Secret::random_scalar(rng),
            pair: Secret::random_scalar(rng),
            own: Secret::random(rng),
        };
        let (share_key, mask_key) = (public_of(&secrets.channel), public_of(&secrets.pair));
        let message = signed::advertise(&own.context, &own.id, &share_key, &mask_key);
        let entry = Entry {
            id: own.id,
            identity: PublicKey(Hex(own.identity.verifying_key().to_bytes())),
            share_key,
            mask_key,
            signature: sign(&own.identity, &message),
        };
        Ok(Self { secrets, entry })
    }

    pub(super) fn entry(&self) -> &Entry {
        &self.entry
    }
}
