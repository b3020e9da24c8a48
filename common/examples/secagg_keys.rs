//! Times the key stage of secure aggregation: `cargo run --release --example secagg_keys`. One thread.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ed25519_dalek::SigningKey;
use tributary_common::ledger::hex::Hex;
use tributary_common::privacy::noise::SecretRng;
use tributary_common::secagg::client::{self, Action};
use tributary_common::secagg::context::{Agreement, ClientId};
use tributary_common::secagg::journal::UploadJournal;
use tributary_common::secagg::messages::{ToClient, ToServer};
use tributary_common::secagg::parameters::{Rules, ThreatLevel};
use tributary_common::secagg::peers::{ClientPolicy, Peers};
use tributary_common::secagg::server;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

struct Node {
    session: client::Session,
    journal: UploadJournal,
    spent: Duration,
}

fn main() -> Outcome<()> {
    for clients in [10, 100, 250, 500, 1000] {
        run(clients)?;
    }
    Ok(())
}

fn run(clients: u16) -> Outcome<()> {
    let mut rng = SecretRng::new()?;
    let agreement = Agreement {
        task: "bench".into(),
        round: 1,
        attempt: 0,
        rules: Rules {
            level: ThreatLevel::Semi,
            corrupt_per_million: 50_000,
            dropout_per_million: 100_000,
            minimum_survivors: 3,
            maximum_clients: clients,
        },
        settings: Hex([0; 32]),
        model: Hex([1; 32]),
        support: Hex([2; 32]),
        server: Hex([3; 32]),
    };
    let parameters = agreement.rules.parameters(clients)?;
    let policy = ClientPolicy { minimum_pinned_survivors: 0, ..ClientPolicy::default() };
    let mut nodes = BTreeMap::new();
    let mut adverts = Vec::new();
    for index in 0..clients {
        let id = ClientId::of(&format!("node-{index}").parse()?);
        let mut seed = [1; 32];
        seed[..2].copy_from_slice(&index.to_le_bytes());
        let config = client::SessionConfig {
            agreement: agreement.clone(),
            id,
            identity: SigningKey::from_bytes(&seed),
            policy,
            peers: Peers::default(),
        };
        let start = Instant::now();
        let journal = UploadJournal::default();
        let (session, advert) = client::Session::start(config, &journal, &mut rng)?;
        nodes.insert(id, Node { session, journal, spent: start.elapsed() });
        adverts.push((id, advert));
    }
    let members = nodes.keys().map(|id| (*id, None)).collect();
    let config = server::SessionConfig { agreement, members, segments: 1, beacon: [4; 32] };
    let mut coordinator = server::Session::new(config);
    let mut pending: Vec<(ClientId, ToServer)> = adverts;
    let (mut coordinating, mut opening) = (Duration::ZERO, Duration::ZERO);
    let mut terms = 0;
    // A tenth drops out after its shares.
    let dead: Vec<ClientId> = nodes.keys().copied().step_by(10).take(usize::from(clients) / 10).collect();
    while coordinator.step() != server::Step::Opened {
        let start = Instant::now();
        for (id, message) in pending.drain(..) {
            coordinator.receive(id, message);
        }
        coordinating += start.elapsed();
        if coordinator.step() == server::Step::Collect {
            for (id, node) in nodes.iter_mut().filter(|(id, _)| !dead.contains(id)) {
                let start = Instant::now();
                node.journal.record(node.session.upload().ok_or("no roster")?)?;
                node.session.mask_keys(&node.journal, 1)?;
                node.spent += start.elapsed();
                coordinator.upload_arrived(*id);
            }
        }
        let start = Instant::now();
        let step = coordinator.step();
        let actions = coordinator.close_step();
        if step == server::Step::Unmask {
            opening += start.elapsed();
        } else {
            coordinating += start.elapsed();
        }
        for action in actions {
            match action {
                server::Action::Send(id, message) if !dead.contains(&id) || step < server::Step::Collect => {
                    let node = nodes.get_mut(&id).ok_or("a stranger")?;
                    pending.extend(receive(node, message, &mut rng)?.into_iter().map(|answer| (id, answer)));
                }
                server::Action::Unmask(list) => terms = list.len(),
                server::Action::Abort(abort) => return Err(abort.into()),
                _ => {}
            }
        }
    }
    let spent: Duration = nodes.values().map(|node| node.spent).sum();
    println!(
        "{clients:5} clients, {} neighbours, threshold {}: {:7.2} ms per client, {:6.1} ms coordinator, {:6.1} ms to open ({} dead, {terms} masks)",
        parameters.neighbours,
        parameters.threshold,
        spent.as_secs_f64() * 1e3 / f64::from(clients),
        coordinating.as_secs_f64() * 1e3,
        opening.as_secs_f64() * 1e3,
        dead.len(),
    );
    Ok(())
}

fn receive(node: &mut Node, message: ToClient, rng: &mut SecretRng) -> Outcome<Vec<ToServer>> {
    let start = Instant::now();
    let actions = node.session.receive(message, rng)?;
    node.spent += start.elapsed();
    let sent = actions.into_iter().filter_map(|action| match action {
        Action::Send(answer) => Some(answer),
        _ => None,
    });
    Ok(sent.collect())
}
