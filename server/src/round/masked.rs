//! One attempt's secure-aggregation session as the round machine sees it: who is awaited and until when, what is said to
//! whom, what is journalled.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest as _, Sha256};
use tributary_common::digest::Digest;
use tributary_common::exchange::{SessionOf, Terms};
use tributary_common::ids::NodeName;
use tributary_common::job::Job;
use tributary_common::secagg::context::ClientId;
use tributary_common::secagg::keys::MaskTerm;
use tributary_common::secagg::messages::{ToClient, ToServer};
use tributary_common::secagg::server::{Action, Session, SessionConfig, Step as SessionStep};
use tributary_common::time::Time;

use super::Effect;
use crate::store::AttemptRecord;

/// What a run's sessions need to know.
#[derive(Debug, Clone)]
pub struct Masking {
    /// What stays the same in all sessions of the run.
    pub terms: Terms,
    /// Who the coordinator is: SHA-256 of its certificate authority.
    pub server: [u8; 32],
    /// Digest of the next round's support, where there is one.
    pub support: Option<Digest>,
    /// How many segments an update has.
    pub segments: u8,
    /// Fresh random bytes, from which each session's beacon follows: nobody sees one before its roster is fixed.
    pub secret: [u8; 32],
}

/// Where the session is, as far as the round is concerned.
pub(super) enum Step {
    /// Keys and shares are exchanged; clients train.
    Keys,
    /// Masked updates arrive.
    Collecting,
    /// The survivors confirm each other and unmask the sum.
    Opening,
    /// These masks are to be taken off the sum.
    Open(Vec<MaskTerm>),
    /// There will be no sum.
    Failed(String),
}

/// The session of an open attempt.
pub(super) struct Masked {
    session: Session,
    names: BTreeMap<ClientId, NodeName>,
    /// The journal so far, record after record.
    records: Vec<Vec<u8>>,
    round: u32,
    attempt: u32,
    step_seconds: u32,
    /// When the present step is closed, where it is one of messages.
    step_ends: Time,
    /// Members that broke the rules or left, and are not in the record yet.
    left: BTreeSet<NodeName>,
    outcome: Option<Result<Vec<MaskTerm>, String>>,
    resumed: bool,
    bytes_sent: u64,
}

impl std::fmt::Debug for Masked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the session: it comes to hold opened secrets.
        f.debug_struct("Masked").field("step", &self.session.step()).finish_non_exhaustive()
    }
}

impl Masked {
    /// The session of `attempt` at a round on `model`: new, or as its `journal` left it.
    pub(super) fn open(
        now: Time,
        masking: &Masking,
        job: &Job,
        attempt: &AttemptRecord,
        model: Digest,
        journal: Option<&[u8]>,
    ) -> Self {
        let AttemptRecord { round, attempt: number, .. } = *attempt;
        let of =
            SessionOf { round, attempt: number, model, support: masking.support, server: masking.server };
        let names: BTreeMap<ClientId, NodeName> =
            attempt.cohort.iter().map(|name| (ClientId::of(name), name.clone())).collect();
        let mut beacon = Sha256::new_with_prefix(b"tributary beacon v1");
        beacon.update(masking.secret);
        beacon.update(round.to_le_bytes());
        beacon.update(number.to_le_bytes());
        let config = SessionConfig {
            agreement: masking.terms.agreement(&of),
            members: names.keys().map(|id| (*id, None)).collect(),
            segments: masking.segments,
            beacon: beacon.finalize().into(),
        };
        let records = journal.map(records);
        let (session, outcome) = match &records {
            None => (Session::new(config), None),
            Some(Some(records)) => match Session::restore(config.clone(), records) {
                Ok(session) => (session, None),
                Err(abort) => (Session::new(config), Some(Err(abort.to_string()))),
            },
            Some(None) => (Session::new(config), Some(Err("its journal is damaged".to_owned()))),
        };
        let step_seconds = job.secure_aggregation.as_ref().map_or(60, |masks| masks.step_seconds);
        let resumed = records.is_some();
        let mut masked = Self {
            session,
            names,
            records: records.flatten().unwrap_or_default(),
            round,
            attempt: number,
            step_seconds,
            step_ends: now,
            left: BTreeSet::new(),
            outcome,
            resumed,
            bytes_sent: 0,
        };
        masked.begin_step(now);
        if resumed {
            // Nobody is connected yet.
            masked.names.keys().for_each(|id| masked.session.disconnected(*id));
        }
        masked
    }

    fn begin_step(&mut self, now: Time) {
        self.step_ends = now.plus_seconds(self.step_seconds);
    }

    pub(super) fn step(&mut self) -> Step {
        match (&mut self.outcome, self.session.step()) {
            (Some(Ok(terms)), _) => Step::Open(std::mem::take(terms)),
            (Some(Err(detail)), _) => Step::Failed(detail.clone()),
            (None, SessionStep::Advertise | SessionStep::Shares) => Step::Keys,
            (None, SessionStep::Collect) => Step::Collecting,
            (None, SessionStep::Confirm | SessionStep::Unmask | SessionStep::Late) => Step::Opening,
            (None, SessionStep::Opened | SessionStep::Over) => Step::Failed("the session is over".to_owned()),
        }
    }

    /// When the present step is closed at the latest; the collection ends with the attempt.
    pub(super) fn step_ends(&self) -> Option<Time> {
        let by_messages =
            !matches!(self.session.step(), SessionStep::Collect | SessionStep::Opened | SessionStep::Over);
        (self.outcome.is_none() && by_messages).then_some(self.step_ends)
    }

    /// Whether the step can be closed: nobody is awaited, or its time is over.
    pub(super) fn is_settled(&self, now: Time, nobody_is_lost: bool) -> bool {
        now >= self.step_ends || (nobody_is_lost && self.session.awaits().is_empty())
    }

    /// Whether an update of `node` would be in the sum.
    pub(super) fn takes(&self, node: &NodeName) -> bool {
        let id = ClientId::of(node);
        self.outcome.is_none()
            && self.session.step() == SessionStep::Collect
            && self.session.expects_upload(id)
    }

    /// Members that are out, told once: they are in no session any more, or not among its survivors.
    pub(super) fn left_out(&mut self) -> Vec<NodeName> {
        let mut left = std::mem::take(&mut self.left);
        let expected = |id: &ClientId| match self.session.step() {
            SessionStep::Advertise => true,
            SessionStep::Shares => self.session.roster().is_none_or(|roster| roster.contains(id)),
            _ => self.session.expects_upload(*id),
        };
        left.extend(self.names.iter().filter(|(id, _)| !expected(id)).map(|(_, name)| name.clone()));
        left.into_iter().collect()
    }

    /// A member's part was decided: its update is in the sum, or will never be.
    pub(super) fn decided(&mut self, node: &NodeName, accepted: bool) {
        let id = ClientId::of(node);
        if accepted {
            self.session.upload_arrived(id);
        } else {
            self.session.disconnected(id);
        }
    }

    /// A member's control stream opened, for the first time perhaps.
    pub(super) fn connected(&mut self, node: &NodeName, effects: &mut Vec<Effect>) {
        let actions = self.session.connected(ClientId::of(node));
        self.perform(actions, effects);
    }

    /// A member's control stream ended.
    pub(super) fn disconnected(&mut self, node: &NodeName) {
        self.session.disconnected(ClientId::of(node));
    }

    /// Takes a member's message.
    pub(super) fn receive(&mut self, node: &NodeName, message: &[u8], effects: &mut Vec<Effect>) {
        let id = ClientId::of(node);
        if self.outcome.is_some() || !self.names.contains_key(&id) {
            return;
        }
        match ToServer::decode(message) {
            Ok(message) => {
                let actions = self.session.receive(id, message);
                self.perform(actions, effects);
            }
            // It is not waited for any longer; the others go on.
            Err(_) => {
                self.session.disconnected(id);
                self.left.insert(node.clone());
            }
        }
    }

    /// Closes the present step.
    pub(super) fn close(&mut self, now: Time, effects: &mut Vec<Effect>) {
        self.begin_step(now);
        let actions = self.session.close_step();
        self.perform(actions, effects);
    }

    /// The sum is published: the clients are told.
    pub(super) fn commit(&mut self, effects: &mut Vec<Effect>) {
        let actions = self.session.commit();
        self.perform(actions, effects);
    }

    /// Bytes said to members.
    pub(super) fn bytes_sent(&self) -> u64 {
        self.bytes_sent
    }

    /// Whether masked updates may have been sent for the attempt that a crash interrupted.
    pub(super) fn was_resumed(&self) -> bool {
        // Keys were exchanged: before that there is no second record.
        self.resumed && self.records.len() > 1
    }

    fn perform(&mut self, actions: Vec<Action>, effects: &mut Vec<Effect>) {
        for action in actions {
            match action {
                Action::Send(id, message) => self.say(id, &message, effects),
                Action::Journal(record) => {
                    self.records.push(record);
                    effects.push(Effect::JournalSession(journal(&self.records)));
                }
                Action::Fault(id, _) => {
                    // Its update stays in the sum if it is there: then only its answers are missing.
                    self.left.extend(self.names.get(&id).cloned());
                }
                Action::Unmask(terms) => self.outcome = Some(Ok(terms)),
                Action::Abort(abort) => self.outcome = Some(Err(abort.to_string())),
            }
        }
    }

    fn say(&mut self, id: ClientId, message: &ToClient, effects: &mut Vec<Effect>) {
        let Some(node) = self.names.get(&id).cloned() else { return };
        let message = message.encode();
        self.bytes_sent += message.len() as u64;
        effects.push(Effect::Masking { node, round: self.round, attempt: self.attempt, message });
    }
}

/// The journal of a session: its records, each after its length.
fn journal(records: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records {
        bytes.extend((record.len() as u64).to_le_bytes());
        bytes.extend(record);
    }
    bytes
}

/// The records of a journal; `None` if it is damaged.
fn records(journal: &[u8]) -> Option<Vec<Vec<u8>>> {
    let (mut rest, mut records) = (journal, Vec::new());
    while let Some((length, after)) = rest.split_first_chunk::<8>() {
        let (record, after) = after.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        records.push(record.to_vec());
        rest = after;
    }
    rest.is_empty().then_some(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_reads_back_and_a_cut_one_does_not() {
        let all = vec![vec![1, 2, 3], Vec::new(), vec![9; 300]];
        let bytes = journal(&all);
        assert_eq!(records(&bytes), Some(all));
        for length in 1..bytes.len() {
            let whole = records(&bytes[..length]).is_some_and(|records| journal(&records).len() == length);
            assert_eq!(records(&bytes[..length]).is_some(), whole);
        }
        assert_eq!(records(&[]), Some(Vec::new()));
        assert_eq!(records(&[0xff; 20]), None);
    }
}
