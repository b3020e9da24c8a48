//! The undisturbed twin: the accepted sets of a disturbed run, imposed on a run without trouble, give the same models.

use std::collections::BTreeMap;
use std::sync::Arc;

use tributary_client::machine::RoundKey;
use tributary_client::trainer::ClientUpdate;
use tributary_common::digest::Digest;
use tributary_common::exchange::{ClientValues, Coins, ExchangeError, Masked};
use tributary_common::ids::NodeName;
use tributary_common::job::Job;
use tributary_common::privacy::noise;
use tributary_common::record::{Participation, Role, RoundOutcome, RoundRecord, RunState};
use tributary_common::time::Time;
use tributary_server::round::{ImposedSets, Input};
use tributary_server::run::{Opening, Outgoing, Payload, Rule, Run, Update};
use tributary_server::store::{MemoryStore, Store};

use super::coordinator::RUN;
use super::hospital::{Carried, Hospital};
use super::script::{Kind, Script};

/// What came of a comparison.
pub(super) enum Compared {
    /// Every published model has the same bits.
    Same,
    /// Noise or a vote on secret coins: nobody promises the same bits.
    NotPromised,
}

/// The bytes that a node sent for a round.
type Sent<'a> = dyn Fn(usize, RoundKey, Option<Digest>) -> Option<Carried> + 'a;
/// What a node's training produced for a round.
type Made<'a> = dyn Fn(usize, RoundKey) -> Option<ClientUpdate> + 'a;

/// Runs the twin and compares each published model.
pub(super) fn compare(
    script: &Script,
    disk: &MemoryStore,
    hospitals: &[Hospital],
    sent: &Sent<'_>,
    made: &Made<'_>,
) -> Result<Compared, String> {
    let rounds = disk.rounds(RUN).map_err(|error| error.to_string())?;
    // A round that was lost under masks is in no twin: it would have to be lost there too.
    if matches!(script.kind, Kind::MaskedSupport | Kind::Distributed)
        || rounds.iter().any(|round| round.spent)
    {
        return Ok(Compared::NotPromised);
    }
    let published: BTreeMap<u32, &RoundRecord> = rounds
        .iter()
        .filter(|record| matches!(record.outcome, RoundOutcome::Published { .. }))
        .map(|record| (record.round, record))
        .collect();
    sums(script, disk, hospitals, &published, made)?;
    let sets: ImposedSets =
        published.iter().map(|(round, record)| (*round, record.accepted().cloned().collect())).collect();
    let (store, job) = (Arc::new(MemoryStore::new()), &script.job);
    let line = |error: tributary_server::store::StoreError| error.to_string();
    let initial = job.layout().map_err(|error| error.to_string())?.initial(job.seed);
    let initial = store.put_model(&initial).map_err(line)?;
    let job_toml = job.to_toml().map_err(|error| error.to_string())?;
    store.create_run(RUN, &job_toml, initial, Time(0)).map_err(line)?;
    store.set_state(RUN, &RunState::Running).map_err(line)?;
    let opening =
        Opening { imposed: Some(sets), ..Opening::new(Rule::OfTheJob(Box::new(noise::add_gaussian))) };
    let failed = |error: tributary_server::run::RunError| format!("the twin: {error}");
    let (mut run, mut outgoing) = Run::open(store.clone(), RUN, Time(0), opening).map_err(failed)?;
    let nodes = hospitals.iter().map(|hospital| (hospital.name.clone(), Role::Trainer)).collect();
    outgoing.extend(run.handle(Time(1), Input::Present { nodes }).map_err(failed)?);
    let mut now = 2;
    while !outgoing.is_empty() || (!run.is_over() && run.next_tick().is_some()) {
        let mut next = Vec::new();
        for what in std::mem::take(&mut outgoing) {
            now += 1;
            let Outgoing::Invite { node, round, .. } = what else { continue };
            let key = RoundKey { run: RUN, round };
            let index = hospitals.iter().position(|hospital| hospital.name == node);
            let index = index.ok_or_else(|| format!("the twin invites {node}, whom nobody knows"))?;
            let record = published.get(&round);
            let Some(Participation::Accepted { digest, .. }) =
                record.and_then(|record| record.cohort.get(&node))
            else {
                return Err(format!("the twin invites {node} to round {round}, who is not in its record"));
            };
            let (examples, bytes) = if script.kind == Kind::Masked {
                let update = made(index, key)
                    .ok_or_else(|| format!("{node} is in round {round}, and did not train"))?;
                (1, unmasked(job, round, &node, &update).map_err(|error| error.to_string())?)
            } else {
                let carried = sent(index, key, *digest)
                    .ok_or_else(|| format!("{node} is in round {round} with bytes that it never sent"))?;
                (carried.examples, carried.bytes.to_vec())
            };
            let update = Update {
                node,
                round,
                examples,
                bytes: bytes.len() as u64,
                digest: Some(Digest::of(&bytes)),
                payload: Payload::Bytes(bytes),
            };
            next.extend(run.update(Time(now), update).map_err(failed)?);
        }
        outgoing = next;
        if outgoing.is_empty() && !run.is_over() {
            let Some(due) = run.next_tick() else { break };
            now = now.max(due.0);
            outgoing = run.handle(Time(now), Input::Tick).map_err(failed)?;
            if now > 1 << 40 {
                return Err("the twin does not end".to_owned());
            }
        }
    }
    let models = |rounds: &[RoundRecord]| -> BTreeMap<u32, Digest> {
        let model = |record: &RoundRecord| match record.outcome {
            RoundOutcome::Published { model } => Some((record.round, model)),
            RoundOutcome::Abandoned { .. } => None,
        };
        rounds.iter().filter_map(model).collect()
    };
    let (here, there) = (models(&rounds), models(&store.rounds(RUN).map_err(line)?));
    for (round, model) in &here {
        if there.get(round) != Some(model) {
            let other = there.get(round).map_or_else(|| "none".to_owned(), Digest::to_string);
            return Err(format!("round {round} has the model {model}, its undisturbed twin {other}"));
        }
    }
    Ok(Compared::Same)
}

/// The integers of an update without masks: sums of them are the same.
fn unmasked(
    job: &Job,
    round: u32,
    client: &NodeName,
    update: &ClientUpdate,
) -> Result<Vec<u8>, ExchangeError> {
    let values = ClientValues { values: &update.delta, examples: update.examples, loss: update.loss };
    let mut coins = Coins::of(job, round, client)?;
    let encoded = Masked::of(job)?.encode(&values, round, None, &mut coins)?;
    encoded.integers.to_bytes()
}

/// The last model follows from what was trained, by plain arithmetic: weighted means in double precision.
fn sums(
    script: &Script,
    disk: &MemoryStore,
    hospitals: &[Hospital],
    published: &BTreeMap<u32, &RoundRecord>,
    made: &Made<'_>,
) -> Result<(), String> {
    /// Fixed-point and 32-bit results are this near.
    const TOLERANCE: f64 = 1e-3;
    if !matches!(script.kind, Kind::Dense | Kind::Masked) {
        return Ok(());
    }
    let job = &script.job;
    let layout = job.layout().map_err(|error| error.to_string())?;
    let mut model: Vec<f64> = layout.initial(job.seed).iter().map(|value| f64::from(*value)).collect();
    for (round, record) in published {
        let (mut sum, mut weights) = (vec![0.0; model.len()], 0.0);
        for name in record.accepted() {
            let node = hospitals.iter().position(|hospital| hospital.name == *name);
            let hospital = node.and_then(|node| hospitals.get(node)).ok_or("a stranger was accepted")?;
            let key = RoundKey { run: RUN, round: *round };
            let update = node.and_then(|node| made(node, key)).ok_or("an update that nobody made")?;
            let weight = hospital.examples().len() as f64;
            if update.examples != hospital.examples().len() as u64 {
                return Err(format!("{name} says that it has {} examples", update.examples));
            }
            weights += weight;
            for (sum, value) in sum.iter_mut().zip(&update.delta) {
                *sum += weight * f64::from(*value);
            }
        }
        for (value, sum) in model.iter_mut().zip(&sum) {
            *value += sum / weights;
        }
    }
    let head = disk.run(RUN).map_err(|error| error.to_string())?.head;
    let stored = disk.model(head.model).map_err(|error| error.to_string())?;
    let far = stored.iter().zip(&model).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    if far > TOLERANCE {
        return Err(format!("the model is {far:.5} away from the weighted mean of what was trained"));
    }
    Ok(())
}
