//! All that a node sends in a masked round, read inside its TLS: nothing of it tells an example count, a loss or a parameter.
//!
//! The same node in the same round without masks is the control: what is looked for is found there.

use std::collections::{BTreeMap, HashSet};

use prost::Message;
use tributary_proto::coordinator::{NodeMessage, UploadHeader, UploadPart, node_message, upload_part};
use tributary_tests::{Coordinator, Process, Wiretap};

/// Of the node that is listened to; large, so that no byte sequence is equal to it by chance.
const EXAMPLES: u64 = 20_011;

const JOB: &str = r#"
name = "captured"
seed = 5
rounds = 1
[model]
architecture = "logistic"
inputs = [784]
classes = 10
[train]
algorithm = "fedavg"
learning_rate = 0.1
local_steps = 2
batch_size = 10
[cohort]
size = 4
minimum = 4
settle_seconds = 2
deadline_seconds = 150
"#;

const MASKED: &str = "[secure_aggregation]\nenabled = true\nstep_seconds = 20\nweight_limit = 30000\n";

/// What one node sent, whole and taken apart.
struct Capture {
    raw: Vec<Vec<u8>>,
    /// Everything but the update's own bytes.
    around: Vec<u8>,
    header: UploadHeader,
    update: Vec<u8>,
    control: Vec<node_message::Message>,
}

/// The payloads of a connection's DATA frames (RFC 9113, section 6.1) by stream, and its other bytes.
fn frames(connection: &[u8]) -> (BTreeMap<u32, Vec<u8>>, Vec<u8>) {
    let (mut streams, mut other) = (BTreeMap::<u32, Vec<u8>>::new(), Vec::new());
    let mut rest = connection.strip_prefix(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").expect("HTTP/2");
    while let Some((&head, after)) = rest.split_first_chunk::<9>() {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        if after.len() < length {
            other.extend(rest); // the connection was cut here
            break;
        }
        let (payload, after) = after.split_at(length);
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        if head[3] == 0 {
            assert_eq!(head[4] & 8, 0, "no padding is expected");
            streams.entry(stream).or_default().extend(payload);
        } else {
            other.extend(payload);
        }
        rest = after;
    }
    (streams, other)
}

/// The messages of a gRPC stream, each with five bytes before it.
fn messages(mut stream: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    while let Some((&head, after)) = stream.split_first_chunk::<5>() {
        assert_eq!(head[0], 0, "nothing is compressed");
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let Some((message, after)) = after.split_at_checked(length) else { break };
        found.push(message);
        stream = after;
    }
    found
}

fn decoded<M: Message + Default>(messages: &[&[u8]]) -> Option<Vec<M>> {
    messages.iter().map(|&bytes| M::decode(bytes).ok()).collect()
}

/// A chunk's message without the update's bytes in it: `data` is cut out, whatever else there is stays.
fn without(message: &[u8], data: &[u8]) -> Vec<u8> {
    let at = message.windows(data.len()).position(|window| window == data).expect("a chunk holds its data");
    [&message[..at], &message[at + data.len()..]].concat()
}

fn take_apart(raw: Vec<Vec<u8>>) -> Capture {
    let (mut around, mut uploads, mut control) = (Vec::new(), Vec::new(), Vec::new());
    for connection in &raw {
        let (streams, other) = frames(connection);
        around.extend(other);
        for stream in streams.values() {
            let messages = messages(stream);
            let parts = decoded::<UploadPart>(&messages).unwrap_or_default();
            if let Some(Some(upload_part::Part::Header(header))) = parts.first().map(|first| &first.part)
                && header.digest.len() == 32
            {
                let mut update = Vec::new();
                for (message, part) in messages.iter().zip(&parts) {
                    match &part.part {
                        Some(upload_part::Part::Chunk(chunk)) => {
                            around.extend(without(message, &chunk.data));
                            update.extend(&chunk.data);
                        }
                        _ => around.extend(*message),
                    }
                }
                uploads.push((header.clone(), update));
                continue;
            }
            around.extend(stream);
            let said = decoded::<NodeMessage>(&messages).unwrap_or_default();
            if matches!(said.first(), Some(NodeMessage { message: Some(node_message::Message::Hello(_)) })) {
                control.extend(said.into_iter().filter_map(|said| said.message));
            }
        }
    }
    assert_eq!(uploads.len(), 1, "one upload");
    let (header, update) = uploads.remove(0);
    assert_eq!(header.total_bytes, update.len() as u64, "a whole one");
    Capture { raw, around, header, update, control }
}

fn capture(coordinator: &Coordinator, job: &str) -> Capture {
    let data = |seed: usize, examples: u64| {
        format!(
            "[data]\nsource = \"synthetic\"\nexamples = {examples}\ntest_examples = 30\nseed = {seed}\n\
             [policy]\nfixed_cohort = false\n"
        )
    };
    let configs: Vec<_> = (0..4)
        .map(|node| {
            coordinator.join(&format!("node-{node}"), &data(node, if node == 0 { EXAMPLES } else { 60 }))
        })
        .collect();
    let wiretap = Wiretap::start(coordinator, configs[0].parent().unwrap());
    let text = std::fs::read_to_string(&configs[0]).unwrap();
    std::fs::write(&configs[0], text.replace(&coordinator.url(), &wiretap.url())).unwrap();
    let _nodes: Vec<Process> = configs.iter().map(|config| Process::node(config, &[])).collect();
    let finished = coordinator.finished(&coordinator.submit_text(job));
    assert_eq!(finished["event"], "finished", "{finished}");
    take_apart(wiretap.sent())
}

fn contains(bytes: &[u8], pattern: &[u8]) -> bool {
    bytes.windows(pattern.len()).any(|window| window == pattern)
}

/// A number as a message may carry it. Three bytes and more: none is expected by chance in some thousand bytes.
fn spellings(number: u64) -> Vec<Vec<u8>> {
    #[allow(clippy::cast_precision_loss)] // small
    let (double, single) = (number as f64, number as f32);
    let mut varint = Vec::new();
    prost::encoding::encode_varint(number, &mut varint);
    vec![
        varint,
        number.to_string().into_bytes(),
        number.to_le_bytes()[..4].to_vec(),
        number.to_be_bytes()[4..].to_vec(),
        double.to_le_bytes().to_vec(),
        double.to_be_bytes().to_vec(),
        single.to_le_bytes().to_vec(),
        single.to_be_bytes().to_vec(),
    ]
}

/// Pairs of neighbouring parameters, as they stand in an update in the clear; not those that are mostly zeros.
fn parameters(update: &[u8]) -> HashSet<[u8; 8]> {
    let pairs = update.windows(8).step_by(4).map(|window| <[u8; 8]>::try_from(window).unwrap());
    pairs.filter(|pair| pair.iter().collect::<HashSet<_>>().len() >= 5).collect()
}

fn told(bytes: &[u8], parameters: &HashSet<[u8; 8]>) -> usize {
    bytes.windows(8).filter(|window| parameters.contains(*window)).count()
}

/// Pearson's statistic of the bytes against even ones: 255 is expected, with a standard deviation of 22.6.
fn chi_squared(bytes: &[u8]) -> f64 {
    let mut counts = [0_u32; 256];
    bytes.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
    #[allow(clippy::cast_precision_loss)] // small
    let expected = bytes.len() as f64 / 256.0;
    counts.iter().map(|&count| (f64::from(count) - expected).powi(2) / expected).sum()
}

/// How many standard deviations the number of ones is from one half, at worst over eight bit positions and over
/// differences of bytes that are 1, 2, 3 and 4 apart.
fn worst_bit(bytes: &[u8]) -> f64 {
    let off = |bytes: &mut dyn Iterator<Item = u8>| {
        let (mut ones, mut all) = ([0_u32; 8], 0_u32);
        bytes.for_each(|byte| {
            all += 1;
            (0..8).for_each(|bit| ones[bit] += u32::from(byte >> bit & 1));
        });
        let sigma = f64::from(all).sqrt() / 2.0;
        ones.iter().map(|&ones| (f64::from(ones) - f64::from(all) / 2.0).abs() / sigma).fold(0.0, f64::max)
    };
    let lags = (1..=4).map(|lag| off(&mut bytes.iter().zip(&bytes[lag..]).map(|(a, b)| a ^ b)));
    lags.fold(off(&mut bytes.iter().copied()), f64::max)
}

#[test]
fn nothing_that_a_node_sends_in_a_masked_round_tells_a_count_a_loss_or_a_parameter() {
    let (one, other) = (Coordinator::start(), Coordinator::start());
    let plain = capture(&one, JOB);
    let masked = capture(&other, &format!("{JOB}{MASKED}"));

    // The count: in the clear without masks, nowhere with them.
    let found = |capture: &Capture| {
        let hidden =
            spellings(EXAMPLES).into_iter().filter(|pattern| contains(&capture.around, pattern)).count();
        (capture.header.examples, hidden)
    };
    assert_eq!(found(&plain).0, EXAMPLES);
    assert!(found(&plain).1 > 0, "what looks for the count finds it");
    assert_eq!(found(&masked), (1, 0));

    // The parameters: the node trained the same update both times.
    let parameters = parameters(&plain.update);
    let all = |capture: &Capture| capture.raw.iter().map(|bytes| told(bytes, &parameters)).sum::<usize>();
    assert!(parameters.len() > 3000 && all(&plain) > 3000, "{} and {}", parameters.len(), all(&plain));
    assert_eq!(all(&masked), 0);

    // The loss has no message to travel in, and the update's bytes are even ones.
    assert!(
        masked.control.iter().all(|message| matches!(
            message,
            node_message::Message::Hello(_)
                | node_message::Message::Heartbeat(_)
                | node_message::Message::LedgerHead(_)
                | node_message::Message::Masking(_)
        )),
        "{:?}",
        masked.control
    );
    assert!(masked.control.iter().any(|message| matches!(message, node_message::Message::Masking(_))));
    let evenness = |capture: &Capture| (chi_squared(&capture.update), worst_bit(&capture.update));
    let ((chi, bit), (plain_chi, plain_bit)) = (evenness(&masked), evenness(&plain));
    println!(
        "masked update of {} bytes: chi-squared {chi:.1} (255 ± 22.6), worst bit {bit:.2} σ of 40; plain {plain_chi:.0} \
         and {plain_bit:.1}; {} bytes around it",
        masked.update.len(),
        masked.around.len()
    );
    assert!((120.0..391.0).contains(&chi), "six standard deviations: {chi}");
    assert!(bit < 6.0, "{bit}");
    assert!(plain_chi > 391.0 && plain_bit > 6.0, "the test can fail");
}
