//! The states of a node and the transitions between them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use tributary_common::digest::Digest;
use tributary_common::ids::RunId;
use tributary_common::job::Job;
use tributary_common::model::Parameters;
use tributary_common::privacy::release::{Protection, Release};
use tributary_common::record::{Metrics, Reason};
use tributary_common::time::Time;

use crate::policy::Violation;

use super::{
    ANSWERED_RUNS, Attempt, Dismissal, Effect, ExampleCounts, Failure, Input, KEPT_UPDATES, Kept, NodeEvent,
    Outcome, Profile, Role, RoundKey, Trained,
};

/// One node. See the module for the states. Cheap to make and to clone: a simulation holds one per client.
#[derive(Debug, Clone)]
pub struct NodeMachine {
    profile: Arc<Profile>,
    examples: ExampleCounts,
    connected: bool,
    /// After a shutdown: when the process must end.
    until: Option<Time>,
    exited: bool,
    /// The run of the last invitation.
    run: Option<RunId>,
    work: Option<Work>,
    evaluation: Option<Evaluation>,
    fetching: Option<Digest>,
    computing: Option<Computing>,
    kept: BTreeMap<RoundKey, Kept>,
    /// The last round of each of the last runs for which an update was to be masked.
    masked: BTreeMap<RunId, u32>,
    /// The attempt that was declined last, unless for being busy.
    declined: Option<(Attempt, Digest, Reason)>,
    /// The last evaluation of each of the last runs, oldest first.
    answers: VecDeque<Answer>,
}

#[derive(Debug, Clone)]
struct Work {
    at: Attempt,
    job: Arc<Job>,
    model: Digest,
    deadline: Time,
    support: Option<Arc<[u8]>>,
    /// Whether the session has its keys.
    keyed: bool,
    phase: Phase,
}

#[derive(Debug, Clone)]
enum Phase {
    Fetching,
    Ready(Parameters),
    Charging(Parameters),
    Training,
    /// Waiting for keys, or for the worker.
    Trained,
    Storing,
    Uploading,
    Delivered,
}

#[derive(Debug, Clone)]
struct Evaluation {
    key: RoundKey,
    job: Arc<Job>,
    digest: Digest,
    /// `None` until it is fetched.
    model: Option<Parameters>,
}

/// What the one worker does, until it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Computing {
    what: Computation,
    key: RoundKey,
    /// Whether its answer is no longer wanted.
    cancelled: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Computation {
    Charging,
    Training,
    Storing,
    Evaluating,
}

#[derive(Debug, Clone)]
struct Answer {
    key: RoundKey,
    model: Digest,
    metrics: Metrics,
}

impl Work {
    fn is_masked(&self) -> bool {
        self.job.secure_aggregation.is_some()
    }

    /// Whether there is nothing to do but to wait for the end of the round. Masks have yet to be taken off.
    fn is_done(&self) -> bool {
        matches!(self.phase, Phase::Delivered) && !self.is_masked()
    }

    /// Whether there is something to do for the coordinator before the round's end.
    fn is_busy(&self, now: Time) -> bool {
        !self.is_done() && now < self.deadline
    }

    fn join(&self) -> Effect {
        let (job, support) = (self.job.clone(), self.support.clone());
        Effect::Join { at: self.at, job, model: self.model, support }
    }
}

impl NodeMachine {
    /// A node that is not connected yet, with the updates that it kept from before a restart.
    pub fn new(
        profile: Arc<Profile>,
        examples: ExampleCounts,
        kept: impl IntoIterator<Item = (RoundKey, Kept)>,
    ) -> Self {
        Self {
            profile,
            examples,
            connected: false,
            until: None,
            exited: false,
            run: None,
            work: None,
            evaluation: None,
            fetching: None,
            computing: None,
            kept: kept.into_iter().collect(),
            masked: BTreeMap::new(),
            declined: None,
            answers: VecDeque::new(),
        }
    }

    /// When [`Input::Tick`] is due, if nothing else happens before.
    pub fn next_tick(&self) -> Option<Time> {
        self.until.filter(|_| !self.exited)
    }

    /// Whether the node has nothing under way: a good moment to renew its certificate.
    pub fn is_idle(&self) -> bool {
        let waiting = self.work.as_ref().is_none_or(Work::is_done);
        waiting && self.computing.is_none() && self.evaluation.is_none()
    }

    /// Whether the operator declared the test examples public.
    pub fn public_test(&self) -> bool {
        self.profile.public_test
    }

    /// Takes one input and returns what must be done about it.
    pub fn step(&mut self, now: Time, input: Input) -> Vec<Effect> {
        let mut effects = Vec::new();
        if self.exited {
            return effects;
        }
        match input {
            Input::Connected => self.connected = true,
            Input::Disconnected => self.connected = false,
            Input::Invited { at, job, model, deadline, support } => {
                self.invited(now, at, job, (model, support), deadline, &mut effects);
            }
            Input::Dismissed { at, reason } => self.dismissed(at, reason, &mut effects),
            Input::EvaluationAsked { key, job, model } => self.asked(key, job, model, &mut effects),
            Input::ModelReady { model, parameters } => self.model_ready(model, &parameters, &mut effects),
            Input::FetchFailed { model, detail } => self.fetch_failed(model, &detail, &mut effects),
            Input::Charged { key, result } => self.charged(key, result, &mut effects),
            Input::Trained { key, result } => self.trained(key, result, &mut effects),
            Input::Keyed { at } => self.keyed(at),
            Input::SessionFailed { at, failure } => self.session_failed(at, failure, &mut effects),
            Input::Stored { key, result } => self.stored(key, result, &mut effects),
            Input::UploadDone { at } => self.uploaded(at, &mut effects),
            Input::UploadRefused { at, detail } => self.upload_refused(at, detail, &mut effects),
            Input::Evaluated { key, result } => self.evaluated(key, result, &mut effects),
            Input::Shutdown => self.shut_down(now, &mut effects),
            Input::Tick => {}
        }
        self.advance(now, &mut effects);
        effects
    }

    /// Goes on as far as the present state allows without another input.
    fn advance(&mut self, now: Time, effects: &mut Vec<Effect>) {
        self.fetch_next(effects);
        self.compute_next(effects);
        if let Some(until) = self.until
            && (now >= until || self.is_idle())
        {
            self.exited = true;
            effects.push(Effect::Exit);
        }
    }

    fn fetch_next(&mut self, effects: &mut Vec<Effect>) {
        let for_work = self.work.as_ref().filter(|work| matches!(work.phase, Phase::Fetching));
        let wanted = for_work.map(|work| (work.model, &work.job)).or_else(|| {
            let open = self.evaluation.as_ref().filter(|evaluation| evaluation.model.is_none());
            open.map(|evaluation| (evaluation.digest, &evaluation.job))
        });
        match wanted {
            Some((model, job)) if self.fetching != Some(model) => {
                self.fetching = Some(model);
                effects.push(Effect::Fetch { model, bytes: parameters(job) * 4 });
            }
            None if self.fetching.take().is_some() => effects.push(Effect::CancelFetch),
            _ => {}
        }
    }

    fn compute_next(&mut self, effects: &mut Vec<Effect>) {
        if self.computing.is_some() {
            return;
        }
        if let Some(work) = &mut self.work
            && matches!(work.phase, Phase::Trained)
            && (work.keyed || !work.is_masked())
        {
            let at = work.at;
            work.phase = Phase::Storing;
            if work.is_masked() {
                // From here on the round is used up, whatever becomes of it.
                self.masked.insert(at.run, at.round);
                if self.masked.len() > ANSWERED_RUNS {
                    self.masked.retain(|run, _| *run == at.run);
                }
            }
            self.computing = Some(Computing { what: Computation::Storing, key: at.key(), cancelled: false });
            let (job, support) = (work.job.clone(), work.support.clone());
            effects.push(Effect::Store { at, job, model: work.model, support });
        } else if let Some(work) = &mut self.work
            && let Phase::Ready(model) = &work.phase
        {
            let (key, job, model) = (work.at.key(), work.job.clone(), model.clone());
            work.phase = Phase::Charging(model);
            self.computing = Some(Computing { what: Computation::Charging, key, cancelled: false });
            effects.push(Effect::Charge { key, job });
        } else if let Some(Evaluation { key, job, model: Some(model), .. }) = &self.evaluation {
            self.computing = Some(Computing { what: Computation::Evaluating, key: *key, cancelled: false });
            effects.push(Effect::Evaluate { key: *key, job: job.clone(), model: model.clone() });
        }
    }

    fn invited(
        &mut self,
        now: Time,
        at: Attempt,
        job: Result<Arc<Job>, String>,
        (model, support): (Digest, Option<Arc<[u8]>>),
        deadline: Time,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(work) = &mut self.work
            && work.at.key() == at.key()
            && work.model == model
            && at.attempt >= work.at.attempt
            && (!work.is_masked() || at == work.at || self.masked.get(&at.run) < Some(&at.round))
        {
            if work.is_masked() {
                if at != work.at {
                    // Keys are of one attempt; what is trained, or being trained, is not yet.
                    effects.push(Effect::Leave { at: work.at });
                    (work.keyed, work.support) = (false, support);
                    (work.at, work.deadline) = (at, deadline);
                }
                effects.push(work.join());
            }
            let again = at.attempt > work.at.attempt && matches!(work.phase, Phase::Uploading);
            (work.at, work.deadline) = (at, deadline);
            // Delivered, but the coordinator asks again: it lost what it had, or its acknowledgement was lost.
            if (again || matches!(work.phase, Phase::Delivered))
                && let Some(update) = self.kept.get(&at.key())
            {
                work.phase = Phase::Uploading;
                effects.push(Effect::Upload { at, update: *update });
            }
            return;
        }
        if self.until.is_some() {
            return self.decline(at, model, Reason::ShuttingDown, "the node is shutting down", effects);
        }
        if let Some((declined, of, reason)) = self.declined
            && (declined, of) == (at, model)
        {
            return self.decline(at, model, reason, "declined before", effects);
        }
        if self.masked.get(&at.run) >= Some(&at.round) {
            // What waits for this round's end, or a later one's, would wait in vain.
            if self
                .work
                .as_ref()
                .is_some_and(|work| work.at.key() == at.key() && work.at.attempt < at.attempt)
            {
                self.drop_work(effects);
            }
            let detail = "an update of this round, or a later one, was masked before: a round is masked once";
            return self.decline(at, model, Reason::Policy, detail, effects);
        }
        let job = match self.accept(job, at, model) {
            Ok(job) => job,
            Err(failure) => return self.decline(at, model, failure.reason, &failure.detail, effects),
        };
        if let Some(work) = &self.work {
            let later = work.at.run == at.run && (work.at.round, work.at.attempt) < (at.round, at.attempt);
            if work.is_busy(now) && !later {
                let detail = format!("at work for {}", work.at);
                return self.decline(at, model, Reason::Busy, &detail, effects);
            }
        }
        self.drop_work(effects);
        // The run has moved on; and an update of another model, should the coordinator have lost a round, is void.
        let over = |key: &RoundKey, update: &Kept| {
            key.run == at.run && (key.round < at.round || (key.round == at.round && update.model != model))
        };
        for key in self.kept.extract_if(.., |key, update| over(key, update)).map(|(key, _)| key) {
            effects.push(Effect::Forget { key });
        }
        if self.run.replace(at.run) != Some(at.run) {
            let (name, rounds) = (job.name.clone(), job.rounds);
            effects.push(Effect::Event(NodeEvent::JoinedRun { run: at.run, name, rounds }));
        }
        let kept = self.kept.get(&at.key()).copied();
        let phase = if kept.is_some() { Phase::Uploading } else { Phase::Fetching };
        effects.extend(kept.map(|update| Effect::Upload { at, update }));
        let work = Work { at, job, model, deadline, support, keyed: false, phase };
        if work.is_masked() {
            effects.push(work.join());
        }
        self.work = Some(work);
    }

    /// The job, if this node may train for it and can.
    fn accept(&self, job: Result<Arc<Job>, String>, at: Attempt, model: Digest) -> Result<Arc<Job>, Failure> {
        let unsupported = |detail| Failure { reason: Reason::Unsupported, detail };
        let job = job.map_err(unsupported)?;
        if self.profile.role == Role::Evaluator {
            return Err(unsupported("this node is an evaluator: it trains nothing".into()));
        }
        self.profile.check(&job, self.examples)?;
        if at.round == 1 {
            let policy =
                |violation: Violation| Failure { reason: Reason::Policy, detail: violation.to_string() };
            self.profile.policy.check_initial_model(model).map_err(policy)?;
        }
        Ok(job)
    }

    fn decline(
        &mut self,
        at: Attempt,
        model: Digest,
        reason: Reason,
        detail: &str,
        effects: &mut Vec<Effect>,
    ) {
        if reason != Reason::Busy {
            self.declined = Some((at, model, reason));
        }
        // Without a connection nobody hears it: the repeated invitation will be declined.
        if self.connected {
            let Attempt { run, round, .. } = at;
            effects.push(Effect::Decline { at, reason, detail: detail.into() });
            effects.push(Effect::Event(NodeEvent::Declined { run, round, reason, detail: detail.into() }));
        }
    }

    /// Stops the present work; stored bytes stay, unless they are masked.
    fn drop_work(&mut self, effects: &mut Vec<Effect>) {
        let Some(work) = self.work.take() else { return };
        let key = work.at.key();
        if work.is_masked() {
            effects.push(Effect::Leave { at: work.at });
        }
        let useless = work.is_masked() && self.kept.remove(&key).is_some();
        if useless || matches!(work.phase, Phase::Trained) {
            effects.push(Effect::Forget { key });
        }
        if let Some(computing) = &mut self.computing
            && matches!(work.phase, Phase::Charging(_) | Phase::Training | Phase::Storing)
        {
            computing.cancelled = true;
            if computing.what == Computation::Training {
                effects.push(Effect::CancelTraining);
            }
        }
    }

    /// Ends the present work with a decline.
    fn give_up(&mut self, reason: Reason, detail: &str, effects: &mut Vec<Effect>) {
        if let Some((at, model)) = self.work.as_ref().map(|work| (work.at, work.model)) {
            self.drop_work(effects);
            self.decline(at, model, reason, detail, effects);
        }
    }

    fn dismissed(&mut self, at: Attempt, reason: Dismissal, effects: &mut Vec<Effect>) {
        let key = at.key();
        let current = self.work.as_ref().filter(|work| work.at.key() == key);
        if current.is_some_and(|work| at.attempt < work.at.attempt) {
            return;
        }
        let at_work = current.is_some();
        let kept = self.kept.contains_key(&key);
        // One charge, one payload: another attempt at the round gets the same bytes.
        let again = reason == Dismissal::Abandoned;
        let again = self.kept.get(&key).is_some_and(|update| again && update.private && !update.masked);
        if kept && !again {
            let accepted = reason == Dismissal::Published;
            let outcome = if accepted { Outcome::Accepted } else { Outcome::NotAccepted };
            effects.push(Effect::Settle { key, outcome });
        }
        if at_work {
            self.drop_work(effects);
        }
        if !again && self.kept.remove(&key).is_some() {
            effects.push(Effect::Forget { key });
        }
        if at_work || kept {
            let RoundKey { run, round } = key;
            let not_used = |detail: &str| NodeEvent::NotUsed { run, round, detail: detail.into() };
            effects.push(Effect::Event(match reason {
                Dismissal::Published => NodeEvent::Accepted { run, round },
                Dismissal::NotUsed => not_used("the round ended without this node's update"),
                Dismissal::Abandoned => not_used("the attempt was abandoned"),
            }));
        }
    }

    fn model_ready(&mut self, model: Digest, values: &Parameters, effects: &mut Vec<Effect>) {
        if self.fetching == Some(model) {
            self.fetching = None;
        }
        let fits = |job: &Job| values.len() as u64 == parameters(job);
        if let Some(work) = &mut self.work
            && matches!(work.phase, Phase::Fetching)
            && work.model == model
        {
            if fits(&work.job) {
                work.phase = Phase::Ready(values.clone());
            } else {
                self.give_up(Reason::Unsupported, "the model does not have the job's layout", effects);
            }
        }
        if let Some(evaluation) = &mut self.evaluation
            && evaluation.digest == model
            && evaluation.model.is_none()
        {
            if fits(&evaluation.job) {
                evaluation.model = Some(values.clone());
            } else {
                self.answer(Metrics::default(), effects);
            }
        }
    }

    fn fetch_failed(&mut self, model: Digest, detail: &str, effects: &mut Vec<Effect>) {
        if self.fetching == Some(model) {
            self.fetching = None;
        }
        if self.work.as_ref().is_some_and(|work| matches!(work.phase, Phase::Fetching) && work.model == model)
        {
            self.give_up(Reason::Training, detail, effects);
        }
        if self
            .evaluation
            .as_ref()
            .is_some_and(|evaluation| evaluation.digest == model && evaluation.model.is_none())
        {
            self.answer(Metrics::default(), effects);
        }
    }

    /// Takes the worker's answer if it is to this question: whether it was cancelled.
    fn finish(&mut self, what: Computation, key: RoundKey) -> Option<bool> {
        let computing = self.computing.take_if(|computing| computing.what == what && computing.key == key)?;
        Some(computing.cancelled)
    }

    fn charged(&mut self, key: RoundKey, result: Result<(), Failure>, effects: &mut Vec<Effect>) {
        match (self.finish(Computation::Charging, key), result) {
            // A charge that nobody waits for stays: it was written before anybody could know.
            (None | Some(true), _) => {}
            (Some(false), Err(failure)) => self.give_up(failure.reason, &failure.detail, effects),
            (Some(false), Ok(())) => {
                let Some(work) = &mut self.work else { return };
                let Phase::Charging(model) = &work.phase else { return };
                let (job, model) = (work.job.clone(), model.clone());
                work.phase = Phase::Training;
                self.computing = Some(Computing { what: Computation::Training, key, cancelled: false });
                let (examples, steps) = (self.examples.train, job.train.steps(self.examples.train));
                let RoundKey { run, round } = key;
                effects.push(Effect::Event(NodeEvent::Training { run, round, examples, steps }));
                effects.push(Effect::Train { key, job, model });
            }
        }
    }

    fn trained(&mut self, key: RoundKey, result: Result<Trained, Failure>, effects: &mut Vec<Effect>) {
        match (self.finish(Computation::Training, key), result) {
            (None, _) | (Some(true), Err(_)) => {}
            (Some(true), Ok(_)) => effects.push(Effect::Forget { key }),
            (Some(false), Err(failure)) => self.give_up(failure.reason, &failure.detail, effects),
            (Some(false), Ok(trained)) => {
                let Some(work) = &mut self.work else { return };
                work.phase = Phase::Trained;
                let (RoundKey { run, round }, loss) = (key, trained.loss);
                effects.push(Effect::Event(NodeEvent::Trained { run, round, loss }));
            }
        }
    }

    fn keyed(&mut self, at: Attempt) {
        if let Some(work) = self.work.as_mut().filter(|work| work.at == at) {
            work.keyed = true;
        }
    }

    fn session_failed(&mut self, at: Attempt, failure: Failure, effects: &mut Vec<Effect>) {
        let Some(work) = self.work.as_ref().filter(|work| work.at == at && work.is_masked()) else { return };
        if matches!(work.phase, Phase::Delivered) {
            // The coordinator has the update, and learns from the session that this node does not open it.
            self.drop_work(effects);
            let Attempt { run, round, .. } = at;
            effects.push(Effect::Event(NodeEvent::NotUsed { run, round, detail: failure.detail }));
        } else {
            self.give_up(failure.reason, &failure.detail, effects);
        }
    }

    fn stored(&mut self, key: RoundKey, result: Result<Kept, String>, effects: &mut Vec<Effect>) {
        match (self.finish(Computation::Storing, key), result) {
            (None, _) | (Some(true), Err(_)) => {}
            (Some(true), Ok(_)) => {
                // Nothing of it left.
                effects.push(Effect::Settle { key, outcome: Outcome::NotAccepted });
                effects.push(Effect::Forget { key });
            }
            (Some(false), Err(detail)) => self.give_up(Reason::Training, &detail, effects),
            (Some(false), Ok(update)) => {
                let Some(work) = &mut self.work else { return };
                work.phase = Phase::Uploading;
                effects.push(Effect::Upload { at: work.at, update });
                self.kept.insert(key, update);
                while self.kept.values().filter(|update| !update.private).count() > KEPT_UPDATES {
                    let others = self.kept.iter().filter(|(other, update)| **other != key && !update.private);
                    let Some(oldest) = others.min_by_key(|(_, update)| update.stored).map(|(key, _)| *key)
                    else {
                        break;
                    };
                    self.kept.remove(&oldest);
                    effects.push(Effect::Forget { key: oldest });
                }
            }
        }
    }

    fn uploading(&mut self, at: Attempt) -> Option<&mut Work> {
        self.work.as_mut().filter(|work| work.at == at && matches!(work.phase, Phase::Uploading))
    }

    fn uploaded(&mut self, at: Attempt, effects: &mut Vec<Effect>) {
        if let Some(work) = self.uploading(at) {
            work.phase = Phase::Delivered;
            let bytes = self.kept.get(&at.key()).map_or(0, |update| update.bytes);
            let Attempt { run, round, .. } = at;
            effects.push(Effect::Event(NodeEvent::Uploaded { run, round, bytes }));
        }
    }

    fn upload_refused(&mut self, at: Attempt, detail: String, effects: &mut Vec<Effect>) {
        if let Some(work) = self.uploading(at) {
            if work.is_masked() {
                self.drop_work(effects);
            } else {
                // The bytes stay: another attempt at the round may still ask for them.
                self.work = None;
            }
            let Attempt { run, round, .. } = at;
            effects.push(Effect::Event(NodeEvent::NotUsed { run, round, detail }));
        }
    }

    fn asked(
        &mut self,
        key: RoundKey,
        job: Result<Arc<Job>, String>,
        model: Digest,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(open) = self.evaluation.as_ref().filter(|open| open.key == key) {
            // Another model under the name of the same round was not published by the run.
            if open.digest != model {
                self.report(key, Metrics::default(), effects);
            }
            return;
        }
        if let Some(answer) = self.answers.iter().find(|answer| answer.key.run == key.run)
            && answer.key.round >= key.round
        {
            let same = answer.key == key && answer.model == model;
            let metrics = if same { answer.metrics.clone() } else { Metrics::default() };
            return self.report(key, metrics, effects);
        }
        match job.ok().filter(|job| self.may_evaluate(job, key.round)) {
            Some(job) => self.evaluation = Some(Evaluation { key, job, digest: model, model: None }),
            None => self.report(key, Metrics::default(), effects),
        }
    }

    /// Whether the job asks for an evaluation of this round's model by such a node, and the node may and can.
    fn may_evaluate(&self, job: &Job, round: u32) -> bool {
        let invited = self.profile.role == Role::Evaluator || job.evaluation.federated;
        let due = round <= job.rounds && job.evaluates(round);
        let fits = self.profile.check(job, self.examples).is_ok();
        let counted = match Release::Metrics.protection(job, self.profile.public_test) {
            Protection::Withheld => false,
            // Whether there are any is a fact about the data.
            Protection::Noise => true,
            _ => self.examples.test > 0,
        };
        self.until.is_none() && invited && due && fits && counted
    }

    fn evaluated(&mut self, key: RoundKey, result: Result<Metrics, Failure>, effects: &mut Vec<Effect>) {
        let mine = self.finish(Computation::Evaluating, key).is_some();
        let open = |evaluation: &Evaluation| evaluation.key == key && evaluation.model.is_some();
        if mine && self.evaluation.as_ref().is_some_and(open) {
            let mut metrics = result.unwrap_or_default();
            metrics.hide_small_cells(self.profile.policy.minimum_cell);
            self.answer(metrics, effects);
        }
    }

    /// Answers the open question, and remembers the answer.
    fn answer(&mut self, metrics: Metrics, effects: &mut Vec<Effect>) {
        let Some(Evaluation { key, digest, .. }) = self.evaluation.take() else { return };
        self.answers.retain(|answer| answer.key.run != key.run);
        self.answers.push_back(Answer { key, model: digest, metrics: metrics.clone() });
        if self.answers.len() > ANSWERED_RUNS {
            self.answers.pop_front();
        }
        self.report(key, metrics, effects);
    }

    fn report(&self, key: RoundKey, metrics: Metrics, effects: &mut Vec<Effect>) {
        // Without a connection nobody hears it: the repeated question will be answered.
        if self.connected {
            let (RoundKey { run, round }, examples) = (key, metrics.examples);
            effects.push(Effect::Report { key, metrics });
            effects.push(Effect::Event(NodeEvent::Evaluated { run, round, examples }));
        }
    }

    fn shut_down(&mut self, now: Time, effects: &mut Vec<Effect>) {
        if self.until.is_some() {
            self.until = Some(now);
            return;
        }
        self.until = Some(now.plus_seconds(self.profile.drain_seconds));
        self.evaluation = None;
        if let Some(work) = &self.work
            && !matches!(work.phase, Phase::Storing | Phase::Uploading | Phase::Delivered)
        {
            self.give_up(Reason::ShuttingDown, "the node is shutting down", effects);
        }
    }
}

/// Parameters of the job's model; a checked job has a layout.
fn parameters(job: &Job) -> u64 {
    job.layout().map_or(0, |layout| layout.parameters() as u64)
}
