//! Bytes and orders of messages that nobody honest sends: refused or ignored, never a panic, never a step back.

use proptest::collection::vec;
use proptest::prelude::*;

use super::federation::Federation;
use crate::secagg::client;
use crate::secagg::context::ClientId;
use crate::secagg::messages::{MAXIMUM_MESSAGE_BYTES, MessageError, ToClient, ToServer};
use crate::secagg::server::Step;

/// Messages of one direction, with the client's id.
type Captured = Vec<(ClientId, Vec<u8>)>;

/// Every message of a session with a drop-out and a silent survivor: to clients and to the coordinator.
fn harvest(count: usize) -> (Captured, Captured) {
    let mut federation = Federation::new(count);
    let (mut down, mut up) = (Vec::new(), Vec::new());
    for node in federation.nodes.values() {
        up.push((node.id, node.first.encode()));
    }
    for step in [Step::Shares, Step::Collect, Step::Confirm, Step::Unmask, Step::Late] {
        match step {
            Step::Confirm => federation.kill([count - 1]),
            Step::Late => federation.kill([count - 2]),
            _ => {}
        }
        federation.run_to(step);
        while let Some((id, message)) = federation.queue.pop_front() {
            down.push((id, message.encode()));
            if federation.dead.contains(&id) {
                continue;
            }
            let answers = federation.nodes.get_mut(&id).unwrap().receive(message).unwrap();
            up.extend(answers.iter().map(|answer| (id, answer.encode())));
            federation.answer(id, answers);
        }
        if step == Step::Collect {
            federation.kill([count - 1]);
            federation.upload();
        }
    }
    federation.run_to(Step::Opened);
    assert!(matches!(federation.outcome, Some(Ok(_))));
    (down, up)
}

#[test]
fn messages_have_one_form_and_are_refused_when_cut_or_longer() {
    let (down, up) = harvest(7);
    for (_, bytes) in &down {
        assert_eq!(ToClient::decode(bytes).unwrap().encode(), *bytes);
    }
    for (_, bytes) in &up {
        assert_eq!(ToServer::decode(bytes).unwrap().encode(), *bytes);
    }
    let to_client = |bytes: &[u8]| ToClient::decode(bytes).err();
    let to_server = |bytes: &[u8]| ToServer::decode(bytes).err();
    let all = down.iter().map(|(_, bytes)| (bytes, &to_client as &dyn Fn(&[u8]) -> Option<MessageError>));
    for (bytes, read) in all.chain(up.iter().map(|(_, bytes)| (bytes, &to_server as _))) {
        for length in 0..bytes.len() {
            assert_eq!(read(&bytes[..length]), Some(MessageError::Truncated));
        }
        assert_eq!(read(&[bytes.as_slice(), &[0]].concat()), Some(MessageError::Trailing));
    }
    let long = vec![1; MAXIMUM_MESSAGE_BYTES + 1];
    assert_eq!(ToClient::decode(&long).err(), Some(MessageError::TooLong(long.len())));
    assert_eq!(ToServer::decode(&long).err(), Some(MessageError::TooLong(long.len())));
    assert_eq!(ToClient::decode(&[8]).err(), Some(MessageError::Kind(8)));
    // A count that no message has: nothing is allocated for it.
    assert!(matches!(ToClient::decode(&[1, 255, 255]).err(), Some(MessageError::Range(_))));
    assert!(matches!(ToClient::decode(&[7, 99]).err(), Some(MessageError::Range(_))));
}

proptest! {
    #[test]
    fn whatever_is_read_is_written_alike(kind in 0u8..9, bytes in vec(any::<u8>(), 0..700)) {
        let bytes = [vec![kind], bytes].concat();
        if let Ok(message) = ToClient::decode(&bytes) {
            prop_assert_eq!(message.encode(), bytes.clone());
        }
        if let Ok(message) = ToServer::decode(&bytes) {
            prop_assert_eq!(message.encode(), bytes);
        }
    }
}

/// What may happen to a message before it is delivered.
#[derive(Debug, Clone)]
struct Move {
    which: prop::sample::Index,
    flip: Option<(prop::sample::Index, u8)>,
    close: bool,
    upload: bool,
}

fn steps() -> impl Strategy<Value = Vec<Move>> {
    let step = (
        any::<prop::sample::Index>(),
        proptest::option::weighted(0.3, (any::<prop::sample::Index>(), 0u8..8)),
        any::<u8>(),
        any::<u8>(),
    );
    let step = step.prop_map(|(which, flip, close, upload)| Move {
        which,
        flip,
        close: close < 12,
        upload: upload < 30,
    });
    vec(step, 1..60)
}

fn changed(bytes: &[u8], step: &Move) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if let Some((at, bit)) = &step.flip {
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// A coordinator gets clients' messages of this and of another session, in any order, damaged or not, between
    /// honest ones.
    #[test]
    fn a_coordinator_survives_any_messages(steps in steps()) {
        let (_, foreign) = harvest(4 + 3);
        let mut federation = Federation::new(5);
        let mut pool = foreign;
        pool.extend(federation.nodes.values().map(|node| (node.id, node.first.encode())));
        federation.advertise();
        for step in steps {
            let before = federation.server.step();
            let (id, bytes) = pool[step.which.index(pool.len())].clone();
            if let Ok(message) = ToServer::decode(&changed(&bytes, &step)) {
                let actions = federation.server.receive(id, message);
                federation.perform(actions);
            }
            if let Some((id, message)) = federation.queue.pop_front()
                && let Some(node) = federation.nodes.get_mut(&id)
                && let Ok(answers) = node.receive(message)
            {
                pool.extend(answers.iter().map(|answer| (id, answer.encode())));
                federation.answer(id, answers);
            }
            if step.upload && federation.server.step() == Step::Collect {
                federation.upload();
            }
            if step.close {
                federation.close();
            }
            prop_assert!(federation.server.step() >= before);
        }
    }

    /// A client gets a coordinator's messages of this and of another session, meant for it or for others, in any order,
    /// damaged or not.
    #[test]
    fn a_client_survives_any_messages(steps in steps()) {
        let (mut pool, _) = harvest(4 + 3);
        let mut federation = Federation::new(5);
        federation.run_to(Step::Shares);
        for step in steps {
            let before = federation.node(0).session.step() as u8;
            let honest = federation.queue.pop_front().map(|(_, message)| message.encode());
            pool.extend(honest.map(|bytes| (federation.ids[0], bytes)));
            let bytes = changed(&pool[step.which.index(pool.len())].1, &step);
            if let Ok(message) = ToClient::decode(&bytes) {
                let node = federation.node(0);
                let was_over = node.session.step() == client::Step::Over;
                match node.receive(message) {
                    Ok(answers) => {
                        prop_assert!(!was_over || answers.is_empty());
                        let id = node.id;
                        federation.answer(id, answers);
                    }
                    Err(_) => prop_assert_eq!(node.session.step(), client::Step::Over),
                }
            }
            if step.upload && federation.node(0).session.step() == client::Step::Ready {
                federation.node(0).upload();
            }
            if step.close && federation.server.step() < Step::Opened {
                let next = match federation.server.step() {
                    Step::Shares => Step::Collect,
                    Step::Collect => Step::Confirm,
                    _ => Step::Unmask,
                };
                if federation.outcome.is_none() {
                    federation.run_to(next);
                }
            }
            prop_assert!(federation.node(0).session.step() as u8 >= before);
        }
    }
}

/// Every message twice, and each step's messages in the reverse order: the same sum.
#[test]
fn repeated_and_reordered_messages_change_nothing() {
    let mut federation = Federation::new(6);
    while federation.outcome.is_none() {
        federation.advertise();
        let messages: Vec<_> = federation.queue.drain(..).collect();
        for (id, message) in messages.iter().rev().chain(&messages) {
            if federation.dead.contains(id) {
                continue;
            }
            let answers = federation.nodes.get_mut(id).unwrap().receive(message.clone()).unwrap();
            federation.answer(*id, answers.clone());
            federation.answer(*id, answers);
        }
        federation.upload();
        federation.upload();
        if federation.server.step() == Step::Collect {
            // Its upload is in the sum already.
            federation.kill([0]);
        }
        federation.close();
    }
    assert_eq!(federation.outcome.clone().unwrap().unwrap(), federation.plain_sum(0..6));
    assert!(federation.faults.is_empty());
}
