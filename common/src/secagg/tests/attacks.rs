//! The attacks on a masked round, each by a hostile peer that speaks the protocol: it ends in an abort or in masked
//! garbage, never in an accepted wrong session.
//!
//! Each test says at which level it holds. Not here, because they are not of this protocol: a08 (a crafted model: the
//! node's list of architectures and digests), a17 (weights and metrics in clear: the composition of the masked vector),
//! a18 for updates (`common/src/exchange/tests.rs`; for messages it is here), a23 (evaluation as an oracle), a25 (budgets
//! drained by abandoned rounds), a26 (a job that isolates a patient): policy and ledger of the node. a10 is here as far
//! as a fixed cohort answers it; a24 cannot be refused and is reported.

use ed25519_dalek::SigningKey;

use super::federation::{Federation, Node, VALUES, agreement, apply, identity, lenient, name, public};
use super::known_answers::stream;
use crate::ledger::hex::Hex;
use crate::secagg::abort::{Abort, Reason};
use crate::secagg::bitmap::ClientSet;
use crate::secagg::client;
use crate::secagg::context::{Agreement, ClientId, SessionId};
use crate::secagg::journal::{JournalError, UploadJournal};
use crate::secagg::keys::{MaskKey, SEALED_BYTES, Secret, Sign, agree, public_of, sign, signed};
use crate::secagg::messages::{ToClient, ToServer};
use crate::secagg::parameters::{GraphKind, ParameterError, ThreatLevel, what_a_sum_reveals};
use crate::secagg::peers::{ClientPolicy, Peers};
use crate::secagg::roster::{Entry, Roster, RosterError};
use crate::secagg::server::{Fault, Step};

/// What the coordinator queued for a node, taken off the queue.
fn queued(federation: &mut Federation, index: usize) -> ToClient {
    let id = federation.ids[index];
    let place = federation.queue.iter().position(|(to, _)| *to == id).unwrap();
    federation.queue.remove(place).unwrap().1
}

/// The node ended with this, and answers nothing more.
fn ended(node: &mut Node, outcome: Result<Vec<ToServer>, Abort>) -> Abort {
    let abort = outcome.err().expect("the client should have ended the session");
    assert_eq!(node.session.step(), client::Step::Over);
    let session = node.session.session_id();
    if let Some(session) = session {
        let message = ToClient::AliveSigs { session: session.tag(), signatures: Vec::new() };
        assert_eq!(node.receive(message).err(), Some(Abort::Over));
    }
    abort
}

/// A roster message, changed; entries are sorted again.
fn tampered(message: ToClient, change: impl FnOnce(&mut Vec<Entry>)) -> ToClient {
    let ToClient::Roster { mut entries, beacon, neighbours, threshold } = message else { panic!() };
    change(&mut entries);
    entries.sort_by_key(|entry| entry.id);
    ToClient::Roster { entries, beacon, neighbours, threshold }
}

fn entry_of(entries: &mut [Entry], id: ClientId) -> &mut Entry {
    entries.iter_mut().find(|entry| entry.id == id).unwrap()
}

/// Keys that the attacker made, signed by an identity of its choice.
fn forged(agreement: &Agreement, id: ClientId, by: &SigningKey) -> (Entry, Secret, Secret) {
    let (channel, pair) = (Secret([77; 32]), Secret([78; 32]));
    let (share_key, mask_key) = (public_of(&channel), public_of(&pair));
    let signature = sign(by, &signed::advertise(&agreement.context(), &id, &share_key, &mask_key));
    (Entry { id, identity: public(by), share_key, mask_key, signature }, channel, pair)
}

/// The set of all nodes but some, over the roster.
fn without(federation: &Federation, missing: &[usize]) -> ClientSet {
    let roster = federation.server.roster().unwrap();
    let missing: Vec<ClientId> = missing.iter().map(|&index| federation.ids[index]).collect();
    let members = (0..).zip(&roster).filter(|(_, id)| !missing.contains(id)).map(|(index, _)| index);
    ClientSet::of(roster.len() as u16, members)
}

fn place(federation: &Federation, index: usize) -> u16 {
    let id = federation.ids[index];
    federation.server.roster().unwrap().iter().position(|other| *other == id).unwrap() as u16
}

/// Nodes 0 to `count` − 1, pinned with each other but for `unpinned`.
fn pins(count: usize, own: usize, unpinned: &[usize]) -> Peers {
    let mut peers = Peers::default();
    for other in (0..count).filter(|other| *other != own && !unpinned.contains(other)) {
        peers.pin(name(other), public(&identity(other)));
    }
    peers
}

fn strict() -> Agreement {
    let mut agreement = agreement();
    agreement.rules.level = ThreatLevel::Strict;
    agreement
}

/// Level semi for keys that no identity signed; strict, or pins, for identities that the coordinator made up.
#[test]
fn a01_coordinator_in_the_middle() {
    let intruder = SigningKey::from_bytes(&[99; 32]);
    // Another key under the right identity: not signed by it.
    let mut federation = Federation::new(4);
    federation.run_to(Step::Shares);
    let (forged_entry, ..) = forged(&agreement(), federation.ids[1], &intruder);
    let message = tampered(queued(&mut federation, 0), |entries| {
        entry_of(entries, forged_entry.id).share_key = forged_entry.share_key;
    });
    let victim = federation.ids[1];
    let outcome = federation.node(0).receive(message);
    assert_eq!(ended(federation.node(0), outcome), Abort::Signature(victim));

    // A made-up identity for a node that is pinned, or that was seen before.
    for remembered in [false, true] {
        let peers = |own: usize| {
            let mut peers = Peers::default();
            for other in (0..4).filter(|other| *other != own) {
                if remembered {
                    peers.remember(ClientId::of(&name(other)), public(&identity(other)));
                } else {
                    peers.pin(name(other), public(&identity(other)));
                }
            }
            peers
        };
        let mut federation = Federation::with(4, agreement(), |own| (lenient(), peers(own)));
        federation.run_to(Step::Shares);
        let message = tampered(queued(&mut federation, 0), |entries| {
            *entry_of(entries, victim) = forged_entry.clone();
        });
        let outcome = federation.node(0).receive(message);
        assert_eq!(ended(federation.node(0), outcome), Abort::Identity(victim));
    }

    // Strict without pins does not start, and accepts nobody whom the operator does not know.
    let policy = ClientPolicy { level: ThreatLevel::Strict, ..lenient() };
    let start = |agreement, peers| {
        Node::try_new(0, agreement, policy, peers, UploadJournal::default()).map(|_| ()).unwrap_err()
    };
    assert_eq!(start(strict(), Peers::default()), Abort::NoPins);
    assert!(matches!(start(agreement(), pins(4, 0, &[])), Abort::Policy { asked: 0, allowed: 1, .. }));
    let mut federation = Federation::with(4, strict(), |own| (policy, pins(4, own, &[2])));
    federation.run_to(Step::Shares);
    let stranger = federation.ids[2];
    let message = queued(&mut federation, 0);
    let outcome = federation.node(0).receive(message);
    assert_eq!(ended(federation.node(0), outcome), Abort::NotPinned(stranger));

    // All pinned: it works.
    let mut federation = Federation::with(4, strict(), |own| (policy, pins(4, own, &[])));
    assert_eq!(federation.run(|_, _| false).unwrap(), federation.plain_sum(0..4));
}

/// Level semi. After the signature a client has one kind of share left of each neighbour, and never names itself.
#[test]
fn a02_both_secrets_of_one_client() {
    // The own bit cleared: the client would help to open its own masks.
    let mut federation = Federation::new(5);
    federation.run_to(Step::Confirm);
    let session = federation.server.session_id().unwrap();
    let message = ToClient::Alive { session: session.tag(), alive: without(&federation, &[0]) };
    let outcome = federation.node(0).receive(message);
    assert_eq!(ended(federation.node(0), outcome), Abort::Excluded);

    // Node 4 dropped out; asked late about it, about oneself, or under another list, a client ends.
    for case in 0..3 {
        let mut federation = Federation::new(5);
        federation.run_to(Step::Collect);
        federation.kill([4]);
        federation.run_to(Step::Unmask);
        let message = queued(&mut federation, 0);
        let answers = federation.node(0).receive(message).unwrap();
        let [ToServer::Unmask(unmask)] = &answers[..] else { panic!() };
        let owners: Vec<u16> = unmask.dead.iter().map(|(owner, _)| *owner).collect();
        assert_eq!(owners, [place(&federation, 4)], "shares of the key of the drop-out and of no other");
        let alive = without(&federation, &[4]);
        let only = |index: usize| ClientSet::of(5, [place(&federation, index)]);
        let session = federation.server.session_id().unwrap().tag();
        let message = match case {
            0 => ToClient::Late { session, alive, silent: only(4) },
            1 => ToClient::Late { session, alive, silent: only(0) },
            _ => ToClient::Late { session, alive: without(&federation, &[]), silent: only(4) },
        };
        let outcome = federation.node(0).receive(message);
        let abort = ended(federation.node(0), outcome);
        match case {
            2 => assert_eq!(abort, Abort::Contradiction("list of survivors")),
            _ => assert_eq!(abort, Abort::Survivors),
        }
    }
}

/// A second question about silent survivors is refused; the same one gets the same answer. Level semi.
#[test]
fn a02_two_lists_of_silent_survivors() {
    let mut federation = Federation::new(6);
    federation.run_to(Step::Unmask);
    federation.kill([5]);
    federation.run_to(Step::Late);
    let message = queued(&mut federation, 0);
    let first = federation.node(0).receive(message.clone()).unwrap();
    let again = federation.node(0).receive(message.clone()).unwrap();
    let bytes = |answers: &[ToServer]| answers.iter().map(ToServer::encode).collect::<Vec<_>>();
    assert_eq!(bytes(&first), bytes(&again));
    let ToClient::Late { session, alive, .. } = message else { panic!() };
    let silent = ClientSet::of(6, [place(&federation, 4)]);
    let outcome = federation.node(0).receive(ToClient::Late { session, alive, silent });
    assert_eq!(ended(federation.node(0), outcome), Abort::Contradiction("list of silent survivors"));
}

/// Level semi. Two lists of survivors for two halves: neither is confirmed by a threshold.
#[test]
fn a03_two_lists_of_survivors() {
    let mut federation = Federation::new(6);
    federation.run_to(Step::Confirm);
    let session = federation.server.session_id().unwrap().tag();
    let lists = [without(&federation, &[5]), without(&federation, &[4])];
    let mut signatures: [Vec<(u16, [u8; 64])>; 2] = [Vec::new(), Vec::new()];
    for index in 0..4 {
        let alive = lists[index % 2].clone();
        let answers = federation.node(index).receive(ToClient::Alive { session, alive }).unwrap();
        let [ToServer::AliveSig { signature, .. }] = &answers[..] else { panic!() };
        signatures[index % 2].push((place(&federation, index), *signature));
    }
    // All signatures together, under whichever list.
    let mut all: Vec<(u16, [u8; 64])> = signatures.concat();
    all.sort_unstable();
    let message = ToClient::AliveSigs { session, signatures: all };
    for index in 0..4 {
        let outcome = federation.node(index).receive(message.clone());
        assert_eq!(ended(federation.node(index), outcome), Abort::Unconfirmed { valid: 2, needed: 5 });
    }

    // A second list for one client, even a larger one.
    let outcome = federation.node(4).receive(ToClient::Alive { session, alive: lists[0].clone() });
    outcome.unwrap();
    let everybody = without(&federation, &[]);
    let outcome = federation.node(4).receive(ToClient::Alive { session, alive: everybody });
    assert_eq!(ended(federation.node(4), outcome), Abort::Contradiction("list of survivors"));
}

/// One signature many times, of a drop-out, or of nobody counts nothing. Level semi.
#[test]
fn a03_signatures_that_do_not_count() {
    let mut federation = Federation::new(5);
    federation.run_to(Step::Collect);
    federation.kill([4]);
    federation.run_to(Step::Confirm);
    let message = queued(&mut federation, 0);
    let ToClient::Alive { session, alive } = message.clone() else { panic!() };
    federation.node(0).receive(message).unwrap();
    let id = federation.server.session_id().unwrap();
    let text = signed::alive(&id, &alive);
    let by = |signer: usize| (place(&federation, signer), sign(&identity(signer), &text));
    let mut signatures = vec![by(0), by(1), by(4), (place(&federation, 2), by(1).1)];
    signatures.sort_unstable();
    signatures.push((4000, by(1).1));
    let outcome = federation.node(0).receive(ToClient::AliveSigs { session, signatures });
    assert_eq!(ended(federation.node(0), outcome), Abort::Unconfirmed { valid: 2, needed: 4 });
}

/// Level semi. False drop-outs around a client of a ring: it does not answer with too few living neighbours, itself not
/// counted. (The ring's arithmetic is searched through in `graph`.)
#[test]
fn a04_false_drop_outs_cut_the_graph() {
    let count = 260;
    let mut agreement = agreement();
    agreement.rules.dropout_per_million = 200_000;
    let parameters = agreement.rules.parameters(count).unwrap();
    assert_eq!(parameters.kind, GraphKind::Harary);
    // Few: declared drop-outs next to the client. Many: far from it, more than the configuration allows.
    for few in [true, false] {
        let (mut node, session, index, neighbours) = ready_on_a_ring(count, &agreement);
        node.upload();
        let keep = if few { usize::from(parameters.threshold) - 1 } else { neighbours.len() };
        let far = (0..count).filter(|other| *other != index && !neighbours.contains(other)).take(if few {
            0
        } else {
            60
        });
        let dead: Vec<u16> = neighbours.iter().copied().skip(keep).chain(far).collect();
        let alive = ClientSet::of(count, (0..count).filter(|other| !dead.contains(other)));
        let outcome = node.receive(ToClient::Alive { session: session.tag(), alive });
        let abort = ended(&mut node, outcome);
        if few {
            let present = parameters.threshold - 1;
            assert!(matches!(abort, Abort::TooFew { present: had, .. } if had == present), "{abort:?}");
        } else {
            assert_eq!(abort, Abort::DropOuts { dropped: 60, shared: count, allowed: 52 });
        }
    }

    // On a ring the own signature does not count: one less than the threshold of neighbours is too few.
    for enough in [false, true] {
        let (mut node, session, index, neighbours) = ready_on_a_ring(count, &agreement);
        node.upload();
        let alive = ClientSet::of(count, 0..count);
        let text = signed::alive(&session, &alive);
        node.receive(ToClient::Alive { session: session.tag(), alive }).unwrap();
        let mut identities: Vec<(ClientId, SigningKey)> =
            (0..usize::from(count)).map(|other| (ClientId::of(&name(other)), identity(other))).collect();
        identities.sort_by_key(|(id, _)| *id);
        let signers = usize::from(parameters.threshold) - usize::from(!enough);
        let by = |signer: u16| (signer, sign(&identities[usize::from(signer)].1, &text));
        let mut signatures: Vec<_> = neighbours.iter().take(signers).map(|signer| by(*signer)).collect();
        // Nor do those of clients that are no neighbours.
        let strangers = (0..count).filter(|other| *other != index && !neighbours.contains(other)).take(5);
        signatures.extend(strangers.map(by).chain([by(index)]));
        signatures.sort_unstable();
        let outcome = node.receive(ToClient::AliveSigs { session: session.tag(), signatures });
        if enough {
            assert!(matches!(&outcome.unwrap()[..], [ToServer::Unmask(_)]));
        } else {
            let (valid, needed) = (parameters.threshold - 1, parameters.threshold);
            assert_eq!(ended(&mut node, outcome), Abort::Unconfirmed { valid, needed });
        }
    }

    // A complete graph: fewer than the threshold left, or more than policy allows.
    let policy = ClientPolicy { maximum_dropout_per_million: 100_000, ..lenient() };
    let mut federation = Federation::with(6, super::federation::agreement(), |own| {
        (if own == 1 { policy } else { lenient() }, Peers::default())
    });
    federation.run_to(Step::Confirm);
    let session = federation.server.session_id().unwrap().tag();
    let message = ToClient::Alive { session, alive: without(&federation, &[4, 5]) };
    let outcome = federation.node(0).receive(message);
    assert!(matches!(ended(federation.node(0), outcome), Abort::TooFew { present: 4, needed: 5, .. }));
    let message = ToClient::Alive { session, alive: without(&federation, &[5]) };
    let outcome = federation.node(1).receive(message);
    assert_eq!(ended(federation.node(1), outcome), Abort::DropOuts { dropped: 1, shared: 6, allowed: 0 });
}

/// Node 0 among made-up clients on a ring, at the point where it can mask; its index and neighbours.
fn ready_on_a_ring(count: u16, agreement: &Agreement) -> (Node, SessionId, u16, Vec<u16>) {
    let mut node = Node::new(0, agreement.clone(), lenient(), Peers::default());
    let ToServer::Advertise(own) = node.first.clone() else { panic!() };
    let mut entries = vec![own];
    for other in 1..count {
        let key = identity(usize::from(other));
        let secret = |kind: u8| {
            let mut bytes = [kind; 32];
            bytes[8..10].copy_from_slice(&other.to_le_bytes());
            public_of(&Secret(bytes))
        };
        let (id, share_key, mask_key) = (ClientId::of(&name(usize::from(other))), secret(1), secret(2));
        let signature = sign(&key, &signed::advertise(&agreement.context(), &id, &share_key, &mask_key));
        entries.push(Entry { id, identity: public(&key), share_key, mask_key, signature });
    }
    entries.sort_by_key(|entry| entry.id);
    let parameters = agreement.rules.parameters(count).unwrap();
    let group = crate::secagg::group::Group::new(
        &agreement.context(),
        Roster::new(entries.clone()).unwrap(),
        parameters,
        [5; 32],
    );
    let index = group.roster.index_of(&node.id).unwrap();
    let neighbours = group.graph.neighbours(index).to_vec();
    let message = ToClient::Roster {
        entries,
        beacon: [5; 32],
        neighbours: parameters.neighbours,
        threshold: parameters.threshold,
    };
    node.receive(message).unwrap();
    // Shares that cannot be opened are complained about and do not stop a client.
    let sealed = neighbours.iter().map(|from| (*from, [0; SEALED_BYTES])).collect();
    let shared = ClientSet::of(count, 0..count);
    let answers =
        node.receive(ToClient::RoutedShares { session: group.session.tag(), shared, sealed }).unwrap();
    assert!(
        matches!(&answers[..], [ToServer::Complaints { about, .. }] if usize::from(about.len()) == neighbours.len())
    );
    (node, group.session, index, neighbours)
}

/// Level semi; strict refuses rings, whose order the coordinator could search for. Neighbours follow from roster and
/// beacon, and shares of others are not taken for theirs.
#[test]
fn a05_a_victim_among_colluding_neighbours() {
    let mut federation = Federation::new(5);
    federation.run_to(Step::Collect);
    let message = queued(&mut federation, 0);
    let ToClient::RoutedShares { session, shared, mut sealed } = message else { panic!() };
    // One of the senders is left out, or named as another.
    sealed.pop();
    let message = ToClient::RoutedShares { session, shared: shared.clone(), sealed };
    let outcome = federation.node(0).receive(message);
    assert_eq!(ended(federation.node(0), outcome), Abort::Routed);
    // Too few announced to have shared.
    let few = ClientSet::of(5, [place(&federation, 1), place(&federation, 2), place(&federation, 3)]);
    let ToClient::RoutedShares { mut sealed, .. } = queued(&mut federation, 1) else { panic!() };
    sealed.retain(|(from, _)| few.contains(*from));
    let message = ToClient::RoutedShares { session, shared: few, sealed };
    let outcome = federation.node(1).receive(message);
    assert!(matches!(ended(federation.node(1), outcome), Abort::TooFew { present: 3, needed: 4, .. }));

    let mut agreement = strict();
    agreement.rules.maximum_clients = 300;
    let policy = ClientPolicy { level: ThreatLevel::Strict, ..lenient() };
    let mut federation = Federation::with(256, agreement.clone(), |own| {
        (policy, if own == 0 { pins(256, 0, &[]) } else { pins(2, own, &[]) })
    });
    federation.run_to(Step::Shares);
    let message = queued(&mut federation, 0);
    let outcome = federation.node(0).receive(message);
    assert_eq!(ended(federation.node(0), outcome), Abort::NoBeacon);
}

/// Level semi. Two rosters for two halves are two sessions: shares do not open, confirmations do not count, and a client
/// that has one roster takes no other.
#[test]
fn a06_two_rosters() {
    let mut federation = Federation::new(4);
    federation.run_to(Step::Shares);
    // Node 3 colludes and signed two sets of keys.
    let (other, ..) = forged(&agreement(), federation.ids[3], &identity(3));
    let honest: Vec<ToClient> = (0..3).map(|index| queued(&mut federation, index)).collect();
    let second = tampered(honest[0].clone(), |entries| *entry_of(entries, other.id) = other.clone());
    let shares = |federation: &mut Federation, index: usize, message: &ToClient| {
        let answers = federation.node(index).receive(message.clone()).unwrap();
        let [ToServer::Shares(shares)] = &answers[..] else { panic!() };
        shares.clone()
    };
    let of_0 = shares(&mut federation, 0, &second);
    let of_1 = shares(&mut federation, 1, &honest[1]);
    assert_ne!(of_0.session, of_1.session);

    // Shares of node 1 routed to node 0 as if they were of its session: they do not open.
    let everybody = ClientSet::of(4, 0..4);
    let own = place(&federation, 0);
    let sealed = (0..4).filter(|from| *from != own).map(|from| (from, of_1.sealed[0])).collect();
    let message = ToClient::RoutedShares { session: of_0.session, shared: everybody.clone(), sealed };
    let answers = federation.node(0).receive(message).unwrap();
    assert!(matches!(&answers[..], [ToServer::Complaints { about, .. }] if about.len() == 3));

    // Confirmations from the other session do not count in this one.
    federation.node(0).upload();
    federation.node(0).receive(ToClient::Alive { session: of_0.session, alive: everybody.clone() }).unwrap();
    let other_session = federation.node(1).session.session_id().unwrap();
    let text = signed::alive(&other_session, &everybody);
    let mut signatures: Vec<_> =
        (1..4).map(|by| (place(&federation, by), sign(&identity(by), &text))).collect();
    signatures.sort_unstable();
    let outcome = federation.node(0).receive(ToClient::AliveSigs { session: of_0.session, signatures });
    assert_eq!(ended(federation.node(0), outcome), Abort::Unconfirmed { valid: 1, needed: 3 });

    // A second roster for one client.
    let outcome = federation.node(1).receive(second);
    assert_eq!(ended(federation.node(1), outcome), Abort::Contradiction("roster"));

    // Malformed ones.
    type Change = fn(&mut Vec<Entry>);
    type Expected = fn(&Abort) -> bool;
    let cases: [(Change, Expected); 4] = [
        (|entries| entries.swap(0, 1), |abort| matches!(abort, Abort::Roster(RosterError::Order(_)))),
        (
            |entries| entries.push(entries.last().unwrap().clone()),
            |abort| matches!(abort, Abort::Roster(RosterError::Order(_))),
        ),
        (
            |entries| entries[1].mask_key = entries[0].mask_key,
            |abort| matches!(abort, Abort::Roster(RosterError::Duplicate(_))),
        ),
        (
            |entries| {
                let own = ClientId::of(&name(2));
                entries.retain(|entry| entry.id != own);
            },
            |abort| matches!(abort, Abort::OwnEntry),
        ),
    ];
    for (change, expected) in cases {
        let mut federation = Federation::new(4);
        federation.run_to(Step::Shares);
        let ToClient::Roster { mut entries, beacon, neighbours, threshold } = queued(&mut federation, 2)
        else {
            panic!()
        };
        change(&mut entries);
        let outcome = federation.node(2).receive(ToClient::Roster { entries, beacon, neighbours, threshold });
        let abort = ended(federation.node(2), outcome);
        assert!(expected(&abort), "{abort:?}");
    }
}

/// Level semi. Whoever holds another model, support, configuration, round or coordinator has other keys' signatures.
#[test]
fn a07_another_model_for_one_client() {
    let changes: [fn(&mut Agreement); 8] = [
        |agreement| agreement.model = Hex([8; 32]),
        |agreement| agreement.support = Hex([8; 32]),
        |agreement| agreement.settings = Hex([8; 32]),
        |agreement| agreement.server = Hex([8; 32]),
        |agreement| agreement.round = 2,
        |agreement| agreement.attempt = 1,
        |agreement| agreement.task = "tas".into(),
        |agreement| agreement.rules.dropout_per_million += 1,
    ];
    for change in changes {
        let mut other = agreement();
        change(&mut other);
        let nodes = (0..4).map(|index| {
            let agreement = if index == 0 { other.clone() } else { agreement() };
            Node::new(index, agreement, lenient(), Peers::default())
        });
        let mut federation = Federation::of(nodes.collect(), agreement());
        // The honest coordinator notices.
        federation.advertise();
        assert_eq!(federation.faults, [(federation.ids[0], Fault::Signature)]);
        // One that does not care cannot bring them together.
        let entries: Vec<Entry> = {
            let advert = |node: &Node| match &node.first {
                ToServer::Advertise(entry) => entry.clone(),
                _ => panic!(),
            };
            federation.nodes.values().map(advert).collect()
        };
        let message = ToClient::Roster { entries, beacon: [0; 32], neighbours: 3, threshold: 3 };
        for index in 0..4 {
            let outcome = federation.node(index).receive(message.clone());
            assert!(matches!(ended(federation.node(index), outcome), Abort::Signature(_)));
        }
    }
}

/// Level semi. A round is masked once; masks come once; nothing is masked that the journal does not hold.
#[test]
fn a09_the_same_update_in_two_sums() {
    let mut federation = Federation::new(4);
    federation.run_to(Step::Confirm);
    let node = federation.node(0);
    assert!(node.session.mask_keys(&node.journal, 1).is_err(), "a second time");
    let journal = node.journal.clone();
    for (round, attempt) in [(1, 0), (1, 1), (0, 0)] {
        let again = Agreement { round, attempt, ..agreement() };
        let outcome = Node::try_new(0, again, lenient(), Peers::default(), journal.clone());
        assert!(matches!(outcome.err(), Some(Abort::Journal(JournalError::Round { last: 1, .. }))));
    }
    let next = Agreement { round: 2, model: Hex([5; 32]), ..agreement() };
    Node::try_new(0, next, lenient(), Peers::default(), journal).unwrap();

    // No masks without the journal.
    let mut federation = Federation::new(4);
    federation.run_to(Step::Collect);
    federation.deliver();
    let node = federation.node(0);
    assert_eq!(
        node.session.mask_keys(&node.journal, 1).err(),
        Some(client::MaskError::Journal(JournalError::Missing))
    );
    assert_eq!(node.session.step(), client::Step::Ready);
    node.upload();
    // A round that was not masked may be tried again.
    let mut federation = Federation::new(4);
    federation.run_to(Step::Collect);
    federation.deliver();
    let journal = federation.node(0).journal.clone();
    let again = Agreement { attempt: 1, ..agreement() };
    Node::try_new(0, again, lenient(), Peers::default(), journal).unwrap();
}

/// Level semi, as far as it goes: with a fixed cohort no two sums differ by one client.
#[test]
fn a10_cohorts_that_differ_by_one() {
    let policy = ClientPolicy { fixed_cohort: true, ..lenient() };
    let mut federation = Federation::with(5, agreement(), |_| (policy, Peers::default()));
    let outcome = federation.run(|index, before| index == 4 && before == super::federation::Until::Upload);
    assert!(outcome.is_err());
    let missing = Abort::FixedCohort { missing: 1 };
    assert!((0..4).all(|index| federation.node(index).outcome == Some(missing.clone())));
    let mut federation = Federation::with(5, agreement(), |_| (policy, Peers::default()));
    federation.run(|_, _| false).unwrap();
}

/// Level semi. Fewer than three survivors, or fewer than policy wants.
#[test]
fn a11_a_cohort_of_few() {
    let mut federation = Federation::new(2);
    federation.run_to(Step::Advertise);
    federation.advertise();
    federation.close();
    assert_eq!(
        federation.outcome,
        Some(Err(Abort::Parameters(ParameterError::TooFew { clients: 2, minimum: 3 })))
    );
    // A coordinator that goes on all the same.
    let adverts: Vec<ToServer> = federation.nodes.values().map(|node| node.first.clone()).collect();
    let entries = adverts.into_iter().map(|advert| match advert {
        ToServer::Advertise(entry) => entry,
        _ => panic!(),
    });
    let message =
        ToClient::Roster { entries: entries.collect(), beacon: [0; 32], neighbours: 1, threshold: 1 };
    let outcome = federation.node(0).receive(message);
    assert!(matches!(ended(federation.node(0), outcome), Abort::TooFew { present: 2, needed: 3, .. }));

    let policy = ClientPolicy { minimum_survivors: 5, ..lenient() };
    let mut federation =
        Federation::with(5, agreement(), |own| (if own == 0 { policy } else { lenient() }, Peers::default()));
    federation.run_to(Step::Confirm);
    let session = federation.server.session_id().unwrap().tag();
    let message = ToClient::Alive { session, alive: without(&federation, &[4]) };
    let outcome = federation.node(0).receive(message);
    assert!(matches!(ended(federation.node(0), outcome), Abort::TooFew { present: 4, needed: 5, .. }));
}

/// Level semi. The client computes graph and threshold itself.
#[test]
fn a12_weak_parameters() {
    for (neighbours, threshold) in [(4, 1), (2, 2), (4, 3), (4, 5), (0, 0)] {
        let mut federation = Federation::new(5);
        federation.run_to(Step::Shares);
        let ToClient::Roster { entries, beacon, .. } = queued(&mut federation, 0) else { panic!() };
        let outcome = federation.node(0).receive(ToClient::Roster { entries, beacon, neighbours, threshold });
        let abort = ended(federation.node(0), outcome);
        assert!(
            matches!(abort, Abort::OtherParameters { own_neighbours: 4, own_threshold: 4, .. }),
            "{abort:?}"
        );
    }
    let mut weak = agreement();
    weak.rules.minimum_survivors = 1;
    let outcome = Node::try_new(0, weak, lenient(), Peers::default(), UploadJournal::default());
    assert_eq!(outcome.err(), Some(Abort::Parameters(ParameterError::Floor(1))));
}

/// Level semi. A late update of a declared drop-out is not counted, and stays masked although its key is known.
#[test]
fn a13_an_update_that_comes_too_late() {
    let mut federation = Federation::new(5);
    federation.run_to(Step::Collect);
    federation.deliver();
    let late = federation.node(4).upload();
    federation.kill([4]);
    assert_eq!(federation.run(|_, _| false).unwrap(), federation.plain_sum(0..4));
    let id = federation.ids[4];
    assert!(!federation.server.upload_arrived(id));
    // What the coordinator knows of it: all pair masks, by the recovered key. Here from the other ends.
    let mut rest = late;
    let mut node = Federation::new(5);
    node.run_to(Step::Collect);
    node.deliver();
    let journal = {
        let upload = node.node(4).session.upload().unwrap();
        node.node(4).journal.record(upload).unwrap();
        node.node(4).journal.clone()
    };
    let mut terms = node.node(4).session.mask_keys(&journal, 1).unwrap();
    let own = terms.remove(0);
    assert!(own.sign == Sign::Add && terms.len() == 4);
    let mut masked = node.node(4).values.clone();
    apply(&[own], 0, &mut masked);
    apply(&terms, 0, &mut masked);
    for term in &mut terms {
        term.sign = term.sign.opposite();
    }
    apply(&terms, 0, &mut masked);
    assert_ne!(masked, node.node(4).values, "the own mask is left");
    rest.truncate(VALUES);
    assert_ne!(rest, federation.node(4).values);
}

/// Level semi. Wrong shares and wrong masks are found, named, and worked around while enough good ones are there.
#[test]
fn a14_clients_that_lie() {
    // A wrong own mask: recovered from shares. A wrong share of a drop-out's key: found among the others.
    let mut federation = Federation::new(8);
    federation.run_to(Step::Collect);
    federation.kill([7]);
    federation.run_to(Step::Unmask);
    for index in 0..7 {
        let message = queued(&mut federation, index);
        let mut answers = federation.node(index).receive(message).unwrap();
        if let ([ToServer::Unmask(unmask)], 0) = (&mut answers[..], index) {
            // X25519 ignores this bit: the secret would be wrong and its public key right.
            unmask.dead[0].1.0[0] ^= 1;
        }
        let id = federation.ids[index];
        federation.answer(id, answers);
    }
    federation.close();
    assert_eq!(federation.outcome.clone().unwrap().unwrap(), federation.plain_sum(0..7));
    assert_eq!(federation.faults, [(federation.ids[0], Fault::Share)]);

    let mut federation = Federation::new(8);
    federation.run_to(Step::Unmask);
    for index in 0..8 {
        let message = queued(&mut federation, index);
        let mut answers = federation.node(index).receive(message).unwrap();
        if let ([ToServer::Unmask(unmask)], 3) = (&mut answers[..], index) {
            unmask.own.0[5] ^= 1;
        }
        let id = federation.ids[index];
        federation.answer(id, answers);
    }
    assert_eq!(federation.faults, [(federation.ids[3], Fault::Commitment)]);
    federation.run_to(Step::Opened);
    assert_eq!(federation.outcome.clone().unwrap().unwrap(), federation.plain_sum(0..8));

    // Garbage instead of shares: complaints; the sum opens while its sender stays, and is lost if it goes.
    for stays in [true, false] {
        let mut federation = Federation::new(6);
        federation.run_to(Step::Shares);
        for index in 0..6 {
            let message = queued(&mut federation, index);
            let mut answers = federation.node(index).receive(message).unwrap();
            if let ([ToServer::Shares(shares)], 2) = (&mut answers[..], index) {
                shares.sealed.iter_mut().for_each(|sealed| sealed[40] ^= 1);
                let digest = crate::secagg::client::shares_digest(&shares.sealed, &shares.commitment);
                let session = federation.server.session_id().unwrap();
                shares.signature = sign(&identity(2), &signed::shares(&session, &federation.ids[2], &digest));
            }
            let id = federation.ids[index];
            federation.answer(id, answers);
        }
        federation.close();
        federation.deliver();
        if !stays {
            federation.kill([2]);
        }
        let outcome = federation.run(|_, _| false);
        match stays {
            true => assert_eq!(outcome.unwrap(), federation.plain_sum(0..6)),
            false => assert_eq!(outcome, Err(Abort::Recovery(federation.ids[2]))),
        }
    }

    // Shares that open and are wrong: their sender has all of them wrong, and nothing fits its key.
    let mut federation = Federation::new(5);
    federation.run_to(Step::Collect);
    federation.kill([4]);
    federation.run_to(Step::Unmask);
    for index in 0..4 {
        let message = queued(&mut federation, index);
        let mut answers = federation.node(index).receive(message).unwrap();
        let [ToServer::Unmask(unmask)] = &mut answers[..] else { panic!() };
        unmask.dead[0].1.0[index] ^= 1;
        let id = federation.ids[index];
        federation.answer(id, answers);
    }
    federation.close();
    assert_eq!(federation.outcome, Some(Err(Abort::Recovery(federation.ids[4]))));
}

/// Level semi. Points of low order are refused by coordinator and clients.
#[test]
fn a15_keys_of_low_order() {
    let mut low = [[0u8; 32]; 3];
    low[1][0] = 1;
    // 2^255 − 19 + 1, another form of 1.
    low[2] = [0xff; 32];
    low[2][0] = 0xee;
    low[2][31] = 0x7f;
    for (point, of_masks) in low.into_iter().flat_map(|point| [(point, false), (point, true)]) {
        let (mut entry, ..) = forged(&agreement(), ClientId::of(&name(3)), &identity(3));
        if of_masks {
            entry.mask_key = point;
        } else {
            entry.share_key = point;
        }
        let text = signed::advertise(&agreement().context(), &entry.id, &entry.share_key, &entry.mask_key);
        entry.signature = sign(&identity(3), &text);
        let mut federation = Federation::new(4);
        let id = federation.ids[3];
        federation.answer(id, vec![ToServer::Advertise(entry.clone())]);
        assert_eq!(federation.faults, [(id, Fault::Key)]);

        let mut federation = Federation::new(4);
        federation.run_to(Step::Shares);
        let message = tampered(queued(&mut federation, 0), |entries| *entry_of(entries, id) = entry.clone());
        let mut outcome = federation.node(0).receive(message);
        if of_masks {
            let session = federation.node(0).session.session_id().unwrap().tag();
            let shared = ClientSet::of(4, 0..4);
            let own = place(&federation, 0);
            let sealed = (0..4).filter(|from| *from != own).map(|from| (from, [0; SEALED_BYTES])).collect();
            outcome = federation.node(0).receive(ToClient::RoutedShares { session, shared, sealed });
        }
        assert_eq!(ended(federation.node(0), outcome), Abort::LowOrder(id));
    }
}

/// Level semi. Keys of masks and of shares never come twice: other attempt, segment, direction, client.
#[test]
fn a16_a_stream_used_twice() {
    let mut streams = std::collections::BTreeSet::new();
    let mut count = 0;
    for attempt in 0..2 {
        let agreement = Agreement { attempt, ..agreement() };
        let mut federation = Federation::with(4, agreement, |_| (lenient(), Peers::default()));
        federation.run_to(Step::Collect);
        federation.deliver();
        for index in 0..4 {
            let node = federation.node(index);
            node.journal.record(node.session.upload().unwrap()).unwrap();
            let terms = node.session.mask_keys(&node.journal, 3).unwrap();
            assert_eq!(terms.len(), 3 * 4);
            count += terms.len();
            streams.extend(terms.iter().map(|term| stream(&term.key, 4)));
        }
    }
    // Each pair mask is there at both its ends: 3 segments and 2 attempts of 4 own and 6 pair masks.
    assert_eq!((count, streams.len()), (96, 60));
    let session = SessionId::new(&[1; 32], &[2; 32]);
    let (one, two) = (ClientId::from_bytes([1; 16]), ClientId::from_bytes([2; 16]));
    let secret = agree(&Secret([3; 32]), &public_of(&Secret([4; 32]))).unwrap();
    let there = crate::secagg::keys::channel_key(&session, &secret, &one, &two);
    let back = crate::secagg::keys::channel_key(&session, &secret, &two, &one);
    assert_ne!(there.0, back.0);
    let pair = MaskKey::pair(&session, &secret, 0, &one, &two);
    let own = MaskKey::own(&session, &secret, 0, &one);
    assert_ne!(pair.key, own.key);
}

/// What a client sends has a length that follows from the roster and the drop-outs alone (a part of a18).
#[test]
fn a18_answers_have_fixed_sizes() {
    let lengths = || {
        let mut federation = Federation::new(5);
        let mut lengths = Vec::new();
        for step in [Step::Shares, Step::Collect, Step::Confirm, Step::Unmask] {
            federation.run_to(step);
            let message = queued(&mut federation, 0);
            let answers = federation.node(0).receive(message).unwrap();
            lengths.extend(answers.iter().map(|answer| answer.encode().len()));
            let id = federation.ids[0];
            federation.answer(id, answers);
        }
        lengths
    };
    assert_eq!(lengths(), [1 + 16 + 2 + 4 * SEALED_BYTES + 32 + 64, 1 + 16 + 64, 1 + 16 + 32 + 2]);
    assert_eq!(lengths(), lengths());
}

/// Any level. Secrets are wiped when they are dropped, and a session that ended has none left.
#[test]
fn a19_secrets_that_stay_behind() {
    fn wiped<T: zeroize::ZeroizeOnDrop>() {}
    wiped::<Secret>();
    wiped::<MaskKey>();
    wiped::<x25519_dalek::StaticSecret>();
    wiped::<SigningKey>();
    wiped::<crate::secagg::keys::Share>();
    wiped::<crate::secagg::shamir::HeldShare>();
    let mut secret = Secret([9; 32]);
    zeroize::Zeroize::zeroize(&mut secret);
    assert_eq!(secret.0, [0; 32]);

    // After a commit, an abort by the coordinator, and an end by the node: nothing more is answered.
    let mut federation = Federation::new(4);
    federation.run(|_, _| false).unwrap();
    let node = federation.node(0);
    assert_eq!((node.session.step(), node.included), (client::Step::Over, Some(true)));
    assert!(node.session.transcript().is_some());
    assert!(node.session.sign_upload(&[0; 32]).is_none());
    let mut federation = Federation::new(4);
    federation.run_to(Step::Confirm);
    let outcome = federation.node(0).receive(ToClient::Abort(Reason::Cancelled));
    assert_eq!(ended(federation.node(0), outcome), Abort::Told(Reason::Cancelled));
    federation.node(1).session.end();
    let message = queued(&mut federation, 1);
    assert_eq!(federation.node(1).receive(message).err(), Some(Abort::Over));
}

/// Any level. Whoever reads the memory of a node, or of the coordinator, after a session finds no mask key of it: not in
/// freed memory, and not on the stack.
#[cfg(target_os = "linux")]
#[test]
fn a19_no_key_is_left_in_memory() {
    use super::memory::{Covered, found, scrub_stack};
    let mut federation = Federation::new(4);
    federation.run_to(Step::Collect);
    let message = queued(&mut federation, 0);
    let node = federation.node(0);
    let answers = node.receive(message).unwrap();
    let mut journal = node.journal.clone();
    journal.record(node.session.upload().unwrap()).unwrap();
    let terms = node.session.mask_keys(&journal, 1).unwrap();
    let keys: Vec<Covered> = terms.iter().map(|term| Covered::of(&term.key.key)).collect();
    assert_eq!(keys.len(), 4, "one for each other client, and its own");
    // The control: while they are in use they are found.
    assert_eq!(found(&keys), keys.len());
    drop(terms);
    let id = federation.ids[0];
    federation.answer(id, answers);
    federation.run(|_, _| false).unwrap();
    drop(federation);
    scrub_stack(256);
    assert_eq!(found(&keys), 0);
}

/// Pins, at either level: a cohort of ghosts, from the start or as the only survivors.
#[test]
fn a20_a_cohort_of_ghosts() {
    // Node 0 knows node 1; 2, 3, 4 are the coordinator's.
    let policy = ClientPolicy { minimum_pinned_survivors: 2, ..lenient() };
    let mut federation = Federation::with(5, agreement(), |own| {
        if own == 0 { (policy, pins(5, 0, &[2, 3, 4])) } else { (lenient(), Peers::default()) }
    });
    federation.run_to(Step::Shares);
    let message = queued(&mut federation, 0);
    let outcome = federation.node(0).receive(message);
    assert_eq!(ended(federation.node(0), outcome), Abort::TooFewPinned { pinned: 1, needed: 2 });

    // It knows 1 and 2; 2 is then declared a drop-out.
    let mut federation = Federation::with(5, agreement(), |own| {
        if own == 0 { (policy, pins(5, 0, &[3, 4])) } else { (lenient(), Peers::default()) }
    });
    federation.run_to(Step::Confirm);
    let session = federation.server.session_id().unwrap().tag();
    let message = ToClient::Alive { session, alive: without(&federation, &[2]) };
    let outcome = federation.node(0).receive(message);
    assert_eq!(ended(federation.node(0), outcome), Abort::TooFewPinned { pinned: 1, needed: 2 });
}

/// Level semi. "All alive" to one client, "it is dead" to the others: without the confirmations its own mask and its key
/// would both come out.
#[test]
fn a21_a_false_list_for_one_victim() {
    let mut federation = Federation::new(4);
    federation.run_to(Step::Confirm);
    let session = federation.server.session_id().unwrap().tag();
    let (everybody, others) = (without(&federation, &[]), without(&federation, &[0]));
    let mut signatures = Vec::new();
    for index in 0..4 {
        let alive = if index == 0 { everybody.clone() } else { others.clone() };
        let answers = federation.node(index).receive(ToClient::Alive { session, alive }).unwrap();
        let [ToServer::AliveSig { signature, .. }] = &answers[..] else { panic!() };
        signatures.push((place(&federation, index), *signature));
    }
    signatures.sort_unstable();
    let outcome = federation.node(0).receive(ToClient::AliveSigs { session, signatures: signatures.clone() });
    assert_eq!(ended(federation.node(0), outcome), Abort::Unconfirmed { valid: 1, needed: 3 });
    // The others open the victim's key; its own mask is still there.
    for index in 1..4 {
        let message = ToClient::AliveSigs { session, signatures: signatures.clone() };
        let answers = federation.node(index).receive(message).unwrap();
        assert!(matches!(&answers[..], [ToServer::Unmask(unmask)] if unmask.dead.len() == 1));
    }
}

/// Level semi. An update to one model is masked with one cohort only.
#[test]
fn a22_abandon_and_run_again_without_one() {
    let mut federation = Federation::new(5);
    federation.run_to(Step::Confirm);
    let journals: Vec<UploadJournal> = (0..4).map(|index| federation.node(index).journal.clone()).collect();
    // Another task, same model, without node 4.
    let again = Agreement { task: "again".into(), ..agreement() };
    let nodes = journals.into_iter().enumerate().map(|(index, journal)| {
        Node::try_new(index, again.clone(), lenient(), Peers::default(), journal).unwrap()
    });
    let mut federation = Federation::of(nodes.collect(), again);
    federation.run_to(Step::Collect);
    federation.deliver();
    let node = federation.node(0);
    let upload = node.session.upload().unwrap();
    assert_eq!(node.journal.record(upload), Err(JournalError::Model { model: Hex([2; 32]) }));
    assert!(node.session.mask_keys(&node.journal, 1).is_err());
}

/// No level: who is in the sum subtracts itself. It is said, not refused.
#[test]
fn a24_a_survivor_subtracts_itself() {
    let mut federation = Federation::new(3);
    let sum = federation.run(|_, _| false).unwrap();
    let own = federation.node(0).values.clone();
    let rest: Vec<u32> = sum.iter().zip(own).map(|(sum, own)| sum.wrapping_sub(own)).collect();
    assert_eq!(rest, federation.plain_sum(1..3));
    assert!(
        what_a_sum_reveals(3).contains("every hospital that subtracts its own update learns the exact sum")
    );
}

/// Level semi. A node that was restored or started again has its journal and no keys: it starts nothing and signs
/// nothing, whatever the coordinator asks.
#[test]
fn a27_a_second_signature_after_a_restart() {
    let mut federation = Federation::new(4);
    federation.run_to(Step::Confirm);
    let journal = serde_json::to_string(&federation.node(0).journal).unwrap();
    let journal: UploadJournal = serde_json::from_str(&journal).unwrap();
    let outcome = Node::try_new(0, agreement(), lenient(), Peers::default(), journal);
    assert!(matches!(outcome.err(), Some(Abort::Journal(JournalError::Round { .. }))));
    // Without a journal entry it may start, with other keys: the messages of the old session mean nothing to it.
    let message = queued(&mut federation, 0);
    let mut node = Node::new(0, agreement(), lenient(), Peers::default());
    assert!(node.receive(message).unwrap().is_empty());
    assert_eq!(node.session.step(), client::Step::Advertised);
}
