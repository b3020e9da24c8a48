//! A coordinator that starts again from its journal loses no masked round, and answers are the same.

use super::federation::{Federation, Until, VALUES};
use crate::secagg::abort::Abort;
use crate::secagg::server::{Session, Step};

/// Seven clients, two of which drop out: one before its upload, one before it reveals its mask.
fn dies(index: usize, before: Until) -> bool {
    (index, before) == (5, Until::Upload) || (index, before) == (6, Until::Unmask)
}

/// As [`Federation::run`], up to a step.
fn run_until(federation: &mut Federation, step: Step) {
    for (at, before) in
        [(Step::Collect, Until::Upload), (Step::Unmask, Until::Unmask), (Step::Late, Until::Late)]
    {
        if at > step {
            break;
        }
        federation.run_to(at);
        if at < step {
            federation.kill((0..7).filter(|&index| dies(index, before)));
        }
    }
    federation.run_to(step);
}

/// The process ends: memory, sum and connections are lost, the journal is not. Uploads of nodes that are gone were
/// staged on disk; the others send theirs again.
fn restart(federation: &mut Federation) {
    federation.queue.clear();
    federation.sum = vec![0; VALUES];
    federation.server = Session::restore(federation.config.clone(), &federation.records).unwrap();
    for id in federation.ids.clone() {
        let actions = federation.server.connected(id);
        federation.perform(actions);
        if federation.dead.contains(&id)
            && let Some(masked) = federation.nodes[&id].masked.clone()
            && federation.server.upload_arrived(id)
        {
            federation.sum.iter_mut().zip(masked).for_each(|(sum, word)| *sum = sum.wrapping_add(word));
        }
    }
}

#[test]
fn a_killed_coordinator_loses_no_masked_round() {
    for step in [Step::Shares, Step::Collect, Step::Confirm, Step::Unmask, Step::Late] {
        // Before its messages left, after they arrived, and after answers came.
        for reached in 0..3 {
            let mut federation = Federation::new(7);
            run_until(&mut federation, step);
            if reached == 1 {
                while let Some((id, message)) = federation.queue.pop_front() {
                    if !federation.dead.contains(&id) {
                        federation.nodes.get_mut(&id).unwrap().receive(message).unwrap();
                    }
                }
            }
            if reached == 2 {
                federation.deliver();
                if step == Step::Collect {
                    federation.upload();
                }
            }
            let before = federation.records.clone();
            restart(&mut federation);
            let outcome = federation.run(dies);
            assert_eq!(outcome.unwrap(), federation.plain_sum([0, 1, 2, 3, 4, 6]), "{step:?} {reached}");
            assert_eq!(federation.records[..before.len()], before[..], "the journal only grows");
            assert!(federation.faults.is_empty());
            assert!((0..5).all(|index| federation.node(index).included == Some(true)));
        }
    }
}

#[test]
fn twice_killed_and_still_the_same_sum() {
    let mut federation = Federation::new(7);
    for step in [Step::Collect, Step::Confirm, Step::Unmask, Step::Late, Step::Late] {
        run_until(&mut federation, step);
        federation.deliver();
        restart(&mut federation);
    }
    assert_eq!(federation.run(dies).unwrap(), federation.plain_sum([0, 1, 2, 3, 4, 6]));
}

/// Once survivors may have signed, each of their uploads is needed again.
#[test]
fn an_upload_that_is_lost_ends_the_round() {
    let mut federation = Federation::new(5);
    federation.run_to(Step::Confirm);
    federation.deliver();
    restart(&mut federation);
    // Gone, and nothing of it was staged.
    federation.kill([0]);
    federation.run_to(Step::Confirm);
    assert_eq!(federation.outcome, Some(Err(Abort::UploadsLost { missing: 1 })));
}

#[test]
fn damaged_and_foreign_journals_are_refused() {
    let mut federation = Federation::new(5);
    federation.run_to(Step::Confirm);
    let records = federation.records.clone();
    assert_eq!(records.len(), 3);
    let restore = |records: &[Vec<u8>]| Session::restore(federation.config.clone(), records).err();
    assert_eq!(restore(&records), None);
    for (record, at) in
        (0..3).flat_map(|record| (0..records[record].len().min(80)).map(move |at| (record, at)))
    {
        let mut damaged = records.clone();
        damaged[record].truncate(at);
        assert_eq!(restore(&damaged), Some(Abort::Restore));
    }
    let mut longer = records.clone();
    longer[1].push(0);
    assert_eq!(restore(&longer), Some(Abort::Restore));
    assert_eq!(restore(&[records[1].clone()]), Some(Abort::Restore), "out of order");
    assert_eq!(restore(&[&records[..], &records[..1]].concat()), Some(Abort::Restore), "twice");
    let mut other = federation.config.clone();
    other.agreement.attempt = 1;
    assert_eq!(Session::restore(other, &records).err(), Some(Abort::Restore));
}

/// A node that lost its connection is not waited for, gets what it missed, and is in the sum.
#[test]
fn a_node_that_comes_back_in_time() {
    let mut federation = Federation::new(4);
    federation.run_to(Step::Collect);
    let id = federation.ids[0];
    assert_eq!(federation.server.awaits().len(), 4);
    federation.server.disconnected(id);
    assert_eq!(federation.server.awaits().len(), 3);
    federation.queue.retain(|(to, _)| *to != id);
    federation.deliver();
    let actions = federation.server.connected(id);
    federation.perform(actions);
    federation.deliver();
    federation.upload();
    assert!(federation.server.awaits().is_empty());
    assert_eq!(federation.run(|_, _| false).unwrap(), federation.plain_sum(0..4));
}

/// Answers that were lost with a connection are sent again, and taken once.
#[test]
fn answers_that_were_lost_are_sent_again() {
    let mut federation = Federation::new(4);
    for step in [Step::Shares, Step::Collect, Step::Confirm, Step::Unmask, Step::Opened] {
        // Nothing of this step's answers arrives, then all of it twice.
        while let Some((id, message)) = federation.queue.pop_front() {
            federation.nodes.get_mut(&id).unwrap().receive(message).unwrap();
        }
        for id in federation.ids.clone() {
            let answers: Vec<_> = federation.nodes[&id].session.resend().into_iter().collect();
            federation.answer(id, answers.clone());
            federation.answer(id, answers);
        }
        federation.upload();
        assert!(federation.server.awaits().is_empty(), "{step:?}");
        federation.close();
        assert_eq!(federation.server.step(), step);
    }
    assert_eq!(federation.outcome.clone().unwrap().unwrap(), federation.plain_sum(0..4));
    assert!(federation.faults.is_empty());
}

/// Each step says whom it waits for, and it is over when nobody is left.
#[test]
fn steps_name_those_that_they_wait_for() {
    let mut federation = Federation::new(5);
    assert_eq!(federation.server.awaits().len(), 5);
    federation.advertise();
    for step in [Step::Shares, Step::Collect, Step::Confirm, Step::Unmask] {
        assert!(federation.server.awaits().is_empty());
        federation.close();
        assert_eq!(federation.server.step(), step);
        assert_eq!(federation.server.awaits().len(), 5);
        federation.deliver();
        if step == Step::Collect {
            federation.upload();
        }
    }
    assert!(federation.server.awaits().is_empty());
    federation.close();
    assert_eq!(federation.server.step(), Step::Opened);
    assert_eq!(federation.server.survivors().unwrap().len(), 5);
}
