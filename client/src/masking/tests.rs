//! Masked rounds of whole nodes' sessions with the coordinator's, on one thread.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use tributary_common::secagg::server::{
    Action as ToDo, Session as Coordinator, SessionConfig as CoordinatorConfig, Step as Stage,
};

use super::*;
use crate::encoding;
use crate::trainer::ClientUpdate;

const JOB: &str = "name = 'j'\nseed = 1\nrounds = 9\n[model]\narchitecture = 'logistic'\ninputs = [2]\nclasses = 2\n\
    [train]\nalgorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_steps = 3\nbatch_size = 10\n\
    [cohort]\nsize = 4\nminimum = 3\n[secure_aggregation]\nenabled = true\nweight_limit = 20\n";
const SERVER: [u8; 32] = [9; 32];

struct Site {
    dir: tempfile::TempDir,
    identity: Identity,
    policy: Policy,
    journal: MaskJournal,
    round: Option<MaskedRound>,
    failed: Option<Failure>,
}

impl Site {
    fn id(&self) -> ClientId {
        ClientId::of(&self.identity.node)
    }

    fn public(&self) -> PublicKey {
        PublicKey(Hex(self.identity.key.verifying_key().to_bytes()))
    }
}

/// Sites and what the coordinator does with their updates.
struct Federation {
    job: Arc<Job>,
    sites: Vec<Site>,
}

/// How a round goes.
#[derive(Default)]
struct Course {
    round: u32,
    attempt: u32,
    /// Sites that die after their keys are shared.
    dead: Vec<usize>,
    model: u8,
}

impl Federation {
    fn new(sites: usize, job: &str, policy: &str) -> Self {
        let site = |number: usize| {
            let dir = tempfile::tempdir().unwrap();
            let identity = Identity {
                node: format!("site-{number}").parse().unwrap(),
                key: SigningKey::from_bytes(&[number as u8 + 1; 32]),
                server: CoordinatorId(Hex(SERVER)),
                dir: dir.path().to_path_buf(),
            };
            let journal = MaskJournal::open(dir.path()).unwrap();
            let policy = toml::from_str(policy).unwrap();
            Site { dir, identity, policy, journal, round: None, failed: None }
        };
        Self { job: Arc::new(Job::parse(job).unwrap()), sites: (0..sites).map(site).collect() }
    }

    /// Everybody pins everybody else.
    fn pin_all(&mut self) {
        let all: Vec<_> = self.sites.iter().map(|site| (site.identity.node.clone(), site.public())).collect();
        for site in &self.sites {
            let others = all.iter().filter(|(name, _)| *name != site.identity.node);
            others.for_each(|(name, key)| {
                peers::change(&site.identity.dir, |peers| peers.pin(name.clone(), *key)).unwrap();
            });
        }
    }

    fn update(&self, site: usize) -> ClientUpdate {
        let delta = (0..6).map(|at| (site * 6 + at) as f32 * 0.01 - 0.1).collect();
        ClientUpdate { delta, examples: 20, loss: Some(0.5) }
    }

    /// Goes through a round: the mean of the survivors' updates, if it could be opened.
    fn run(&mut self, course: &Course) -> Option<Vec<f64>> {
        let at = Attempt { run: RunId(7), round: course.round.max(1), attempt: course.attempt.max(1) };
        let model = Digest::of(&[course.model]);
        let of = SessionOf { round: at.round, attempt: at.attempt, model, support: None, server: SERVER };
        let mut coordinator = Coordinator::new(CoordinatorConfig {
            agreement: Terms::of(&self.job, at.run).unwrap().agreement(&of),
            members: self.sites.iter().map(|site| (site.id(), None)).collect(),
            segments: Masked::of(&self.job).unwrap().segment_count(),
            beacon: [3; 32],
        });
        let names: BTreeMap<ClientId, usize> =
            self.sites.iter().enumerate().map(|(number, site)| (site.id(), number)).collect();
        let mut to_coordinator = Vec::new();
        for (number, site) in self.sites.iter_mut().enumerate() {
            let invitation = Invitation { at, job: self.job.clone(), model, support: None };
            site.failed = None;
            match MaskedRound::begin(invitation, &site.identity, &site.policy, &site.journal) {
                Ok((round, first)) => {
                    site.round = Some(round);
                    to_coordinator.push((number, first));
                }
                Err(failure) => (site.round, site.failed) = (None, Some(failure)),
            }
        }
        let exchange = Masked::of(&self.job).unwrap();
        let mut sum = exchange.sum();
        let mut uploads: Vec<(usize, Vec<u8>)> = Vec::new();
        loop {
            let mut to_do = Vec::new();
            for (number, message) in to_coordinator.drain(..) {
                let message = ToServer::decode(&message).unwrap();
                to_do.extend(coordinator.receive(self.sites[number].id(), message));
            }
            for (number, bytes) in uploads.drain(..) {
                assert!(coordinator.upload_arrived(self.sites[number].id()));
                sum.add(&bytes).unwrap();
            }
            if to_do.is_empty() {
                to_do = match coordinator.step() {
                    Stage::Opened => coordinator.commit(),
                    Stage::Over => return None,
                    _ => coordinator.close_step(),
                };
            }
            let mut committed = false;
            for action in to_do {
                match action {
                    ToDo::Send(id, message) => {
                        committed |= matches!(message, ToClient::Committed { .. });
                        let number = names[&id];
                        let site = &mut self.sites[number];
                        let Some(round) = &mut site.round else { continue };
                        let replies = round.receive(&message.encode(), &mut site.journal);
                        for reply in replies {
                            match reply {
                                Reply::Send(message) => to_coordinator.push((number, message)),
                                Reply::Failed(failure) => self.sites[number].failed = Some(failure),
                                Reply::Keyed if course.dead.contains(&number) => {
                                    self.sites[number].round = None
                                }
                                Reply::Keyed => uploads.extend(self.upload(number).map(|own| (number, own))),
                            }
                        }
                    }
                    ToDo::Unmask(terms) => {
                        sum.unmask(&terms, NonZeroUsize::MIN).unwrap();
                    }
                    ToDo::Abort(_) => return None,
                    ToDo::Journal(_) | ToDo::Fault(..) => {}
                }
            }
            if committed {
                let opened = exchange.open(sum, at.round).unwrap();
                return Some(opened.values.iter().map(|value| value / opened.weight).collect());
            }
        }
    }

    /// A site's masked bytes; `None` if they may not be made.
    fn upload(&mut self, number: usize) -> Option<Vec<u8>> {
        let update = self.update(number);
        let site = &mut self.sites[number];
        let round = site.round.as_mut()?;
        let key = round.at().key();
        let masks = round.masks(&mut site.journal).ok()?;
        assert!(round.masks(&mut site.journal).is_err(), "masks are given out once");
        let node = &site.identity.node;
        let encoded = encoding::encode(&self.job, key.round, node, &update, None, Some(&masks)).unwrap();
        Some(encoded.bytes)
    }

    fn mean(&self, of: &[usize]) -> Vec<f64> {
        let sum = |at: usize| of.iter().map(|site| f64::from(self.update(*site).delta[at])).sum::<f64>();
        (0..6).map(|at| sum(at) / of.len() as f64).collect()
    }

    fn failure(&self, site: usize) -> &str {
        self.sites[site].failed.as_ref().map_or("", |failure| &failure.detail)
    }

    fn opened(&self, site: usize) -> Vec<serde_json::Value> {
        let path = self.sites[site].dir.path().join(ROUNDS_FILE);
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn near(found: &[f64], expected: &[f64]) -> bool {
    found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-4)
}

const DROPS: &str = "fixed_cohort = false";

#[test]
fn a_masked_mean_is_the_mean_and_all_nodes_write_the_same_session_down() {
    let mut federation = Federation::new(4, JOB, "");
    let found = federation.run(&Course::default()).unwrap();
    assert!(near(&found, &federation.mean(&[0, 1, 2, 3])), "{found:?}");
    let lines: Vec<_> = (0..4).map(|site| federation.opened(site)).collect();
    assert!(lines.iter().all(|line| line.len() == 1 && *line == lines[0]), "{lines:?}");
    assert_eq!((&lines[0][0]["clients"], &lines[0][0]["pinned_survivors"]), (&4.into(), &0.into()));
    assert_eq!(lines[0][0]["survivors"].as_array().unwrap().len(), 4);
    assert!(lines[0][0]["transcript"].is_string());
    // The others' identities were remembered.
    assert_eq!(peers::seen(&peers::load(federation.sites[0].dir.path()).unwrap()).len(), 3);
}

#[test]
fn a_lost_node_is_left_out_of_the_sum_where_the_cohort_is_not_fixed() {
    let mut federation = Federation::new(4, JOB, DROPS);
    let found = federation.run(&Course { dead: vec![2], ..Course::default() }).unwrap();
    assert!(near(&found, &federation.mean(&[0, 1, 3])), "{found:?}");
    // Without a word from the operator, two sums over a small cohort never differ by one node (A10).
    let mut fixed = Federation::new(4, JOB, "");
    assert_eq!(fixed.run(&Course { dead: vec![2], ..Course::default() }), None);
    assert!(fixed.failure(0).contains("fixed cohort"), "{}", fixed.failure(0));
    assert!(fixed.opened(0).is_empty(), "nothing was unmasked");
}

#[test]
fn a_round_is_masked_once_whatever_the_attempt_and_after_a_restart() {
    let mut federation = Federation::new(4, JOB, "");
    federation.run(&Course::default()).unwrap();
    for site in &mut federation.sites {
        // The process died: what it remembers is on the disk.
        (site.round, site.journal) = (None, MaskJournal::open(site.dir.path()).unwrap());
    }
    assert_eq!(federation.run(&Course { attempt: 2, ..Course::default() }), None);
    for site in 0..4 {
        assert!(federation.failure(site).contains("a round is masked once"), "{}", federation.failure(site));
    }
    assert!(federation.run(&Course { round: 2, model: 1, ..Course::default() }).is_some());
}

/// Attack 22: the same model again with others, or with other survivors, gives a difference of two sums.
#[test]
fn a_model_is_answered_with_one_cohort_and_one_set_of_survivors() {
    let mut federation = Federation::new(5, JOB, DROPS);
    federation.job = Arc::new(Job::parse(&JOB.replace("size = 4", "size = 5")).unwrap());
    federation.run(&Course { round: 1, dead: vec![4], ..Course::default() }).unwrap();
    assert_eq!(federation.run(&Course { round: 2, ..Course::default() }), None, "all five");
    assert!(federation.failure(0).contains("difference of the two sums"), "{}", federation.failure(0));
    let same = Course { round: 3, dead: vec![4], ..Course::default() };
    assert!(federation.run(&same).is_some(), "the same four");
    federation.sites.pop();
    assert_eq!(federation.run(&Course { round: 4, ..Course::default() }), None, "another cohort");
    assert!(federation.failure(0).contains("other participants"), "{}", federation.failure(0));
    assert!(federation.run(&Course { round: 5, model: 1, ..Course::default() }).is_some(), "another model");
}

#[test]
fn pins_decide_who_the_others_are() {
    let strict = JOB.replace("enabled = true", "enabled = true\nlevel = 'strict'");
    let mut federation = Federation::new(4, &strict, "");
    assert_eq!(federation.run(&Course::default()), None);
    assert!(federation.failure(0).contains("peers pin NAME FINGERPRINT"), "{}", federation.failure(0));
    federation.pin_all();
    assert!(federation.run(&Course { round: 2, ..Course::default() }).is_some());
    assert_eq!(federation.opened(0)[0]["pinned_survivors"], 3);
    // One who has another key than the one that was read out (A1, A20).
    federation.sites[3].identity.key = SigningKey::from_bytes(&[77; 32]);
    assert_eq!(federation.run(&Course { round: 3, model: 1, ..Course::default() }), None);
    let said = federation.failure(0);
    assert!(said.contains("another identity") && said.contains("site-3") && !said.contains('\n'), "{said}");

    let mut federation = Federation::new(4, JOB, "minimum_pinned_survivors = 2");
    assert_eq!(federation.run(&Course::default()), None);
    assert!(federation.failure(0).contains("pinned"), "{}", federation.failure(0));
}

#[test]
fn too_few_survivors_are_not_confirmed() {
    let mut federation = Federation::new(5, &JOB.replace("size = 4", "size = 5"), DROPS);
    for site in &mut federation.sites {
        site.policy.minimum_survivors = 5;
    }
    assert_eq!(federation.run(&Course { dead: vec![1], ..Course::default() }), None);
    assert!(federation.failure(0).contains("5 are needed"), "{}", federation.failure(0));
    for site in &mut federation.sites {
        (site.policy.minimum_survivors, site.policy.maximum_dropout) = (3, 0.1);
    }
    assert_eq!(federation.run(&Course { round: 2, model: 1, dead: vec![1], ..Course::default() }), None);
    assert!(federation.failure(0).contains("drop-outs"), "{}", federation.failure(0));
}

#[test]
fn a_message_that_is_none_ends_the_session_and_its_keys() {
    let mut federation = Federation::new(4, JOB, "");
    federation.run(&Course::default()).unwrap();
    let site = &mut federation.sites[0];
    let at = Attempt { run: RunId(7), round: 2, attempt: 1 };
    let invitation = Invitation { at, job: federation.job.clone(), model: Digest([1; 32]), support: None };
    let with_support = Invitation { support: Some(Arc::new([1])), ..invitation.clone() };
    let refused = MaskedRound::begin(with_support, &site.identity, &site.policy, &site.journal);
    assert_eq!(refused.err().unwrap().reason, Reason::Unsupported);
    let (mut round, first) =
        MaskedRound::begin(invitation, &site.identity, &site.policy, &site.journal).unwrap();
    assert_eq!(round.again(), Some(first));
    let replies = round.receive(&[200, 1, 2], &mut site.journal);
    let told = Reply::Send(ToServer::Abort(AbortReason::Malformed).encode());
    assert!(matches!(&replies[..], [abort, Reply::Failed(_)] if *abort == told), "{replies:?}");
    assert_eq!((round.step(), round.again()), (Step::Over, None));
    assert!(round.masks(&mut site.journal).is_err());
}
