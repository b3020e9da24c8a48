//! From what training produced to what is sent, as a node does it: with what earlier updates left out, per client.

use tributary_client::machine::{Attempt, Kept};
use tributary_client::trainer::ClientUpdate;
use tributary_common::compression::residual::{Outcome, ResidualJournal};
use tributary_common::digest::Digest;
use tributary_common::exchange::{ClientValues, Coins, Exchange, RoundSupport};
use tributary_common::ids::NodeName;
use tributary_common::job::Job;
use tributary_common::model;
use tributary_common::rng::{Purpose, Stream};

use super::Simulation;
use super::nodes::Index;

impl Simulation<'_> {
    /// Encodes what `index` trained, and masks it where there are sessions: then it can be sent.
    ///
    /// # Errors
    /// One line.
    pub(super) fn store(
        &mut self,
        index: Index,
        name: &NodeName,
        at: Attempt,
        model: Digest,
        support: Option<&[u8]>,
    ) -> Result<Kept, String> {
        let (job, exchange) = (self.job.clone(), self.exchange.clone());
        let node = self.nodes.get_mut(&index).ok_or("the client is gone")?;
        let private = job.privacy.is_some();
        let kept = |digest, bytes, examples, masked| Kept {
            model,
            digest,
            bytes,
            examples,
            private,
            masked,
            stored: self.now,
        };
        let crosses = self.wire.is_some();
        if let Exchange::Plain(plain) = &*exchange
            && plain.is_dense()
        {
            // Nothing is made of it before it is sent.
            let update = node.update.as_ref().ok_or("the update is gone")?;
            let digest = crosses.then(|| model::digest(&update.delta));
            return Ok(kept(digest, update.delta.len() as u64 * 4, update.examples, false));
        }
        let ClientUpdate { mut delta, examples, loss } = node.update.take().ok_or("the update is gone")?;
        let round = at.round;
        // The layout is the same all the run.
        let layout = Digest::of(&[]);
        if let Some(journal) = self.residuals.get(&index)
            && journal.add_kept(round, layout, &mut delta).is_err()
        {
            // As at a node: it is a help, not a debt.
            self.residuals.remove(&index);
        }
        let line = |error: &dyn std::fmt::Display| error.to_string();
        let mut coins = Coins::of(&job, round, name).map_err(|error| line(&error))?;
        let (bytes, residual, kept_examples, masked) = match &*exchange {
            Exchange::Plain(plain) => {
                let encoded = plain.encode(&delta, &mut coins).map_err(|error| line(&error))?;
                (encoded.bytes, encoded.residual, examples, false)
            }
            Exchange::Masked(masked) => {
                let support = match (job.support_rule(), support) {
                    (Some(_), Some(bytes)) => Some(RoundSupport::received(&job, bytes)),
                    (Some(_), None) => return Err("the invitation has no support".into()),
                    (None, _) => None,
                };
                let support = support.transpose().map_err(|error| line(&error))?;
                let values = ClientValues { values: &delta, examples, loss };
                let encoded = masked.encode(&values, round, support.as_ref(), &mut coins);
                let mut encoded = encoded.map_err(|error| line(&error))?;
                self.values_cut += encoded.cut as u64;
                if let Some(sessions) = &mut self.sessions {
                    let joined = node.session.as_mut().filter(|joined| joined.at() == at);
                    let masks = sessions.masks(index, joined.ok_or("the session is over")?)?;
                    encoded.integers.mask(&masks).map_err(|error| line(&error))?;
                }
                let bytes = encoded.integers.to_bytes().map_err(|error| line(&error))?;
                // Its weight is under the masks.
                (bytes, encoded.residual, 1, true)
            }
        };
        if let Some(residual) = residual {
            let journal = self.residuals.entry(index).or_insert_with(|| ResidualJournal::new(delta.len()));
            let written = journal.write_pending(round, layout, Digest::of(&bytes), residual, None);
            written.map_err(|error| line(&error))?;
        }
        let digest = crosses.then(|| Digest::of(&bytes));
        let kept = kept(digest, bytes.len() as u64, kept_examples, masked);
        node.encoded = Some(bytes);
        Ok(kept)
    }

    /// Says what became of an update to what it left out; of one that nobody waits for, nothing is to be said.
    pub(super) fn settle(&mut self, index: Index, round: u32, outcome: Outcome) {
        if let Some(journal) = self.residuals.get_mut(&index) {
            let _ = journal.settle(round, outcome);
        }
    }

    /// A client forgets the update that it has under way, if it has one.
    pub(super) fn settle_unknown(&mut self, index: Index) {
        let pending = self.residuals.get(&index).and_then(ResidualJournal::pending);
        if let Some((round, _)) = pending {
            self.settle(index, round, Outcome::Unknown);
        }
    }
}

/// Bytes of an update of `job`: exact, or what a vector of Gaussian values takes where it depends on the values.
pub(crate) fn expected_update_bytes(job: &Job, exchange: &Exchange) -> u64 {
    let (least, most) = exchange.update_bytes();
    let Exchange::Plain(plain) = exchange else { return most };
    if least == most {
        return most;
    }
    let parameters = job.layout().map_or(0, |layout| layout.parameters());
    let mut stream = Stream::new(0, Purpose::Rounding, 0, "");
    let normal = rand_distr::StandardNormal;
    let values: Vec<f32> =
        (0..parameters).map(|_| rand_distr::Distribution::<f32>::sample(&normal, &mut stream)).collect();
    let encoded = plain.encode(&values, &mut Coins::Public(stream));
    encoded.map_or(most, |encoded| encoded.bytes.len() as u64)
}
