//! What goes over the network in one round, and what masks promise, before anything runs.

use std::fmt;

use serde::Serialize;
use tributary_common::exchange::{Exchange, ExchangeError, Masked, RoundSupport, Terms};
use tributary_common::ids::RunId;
use tributary_common::job::{Job, SupportRule};
use tributary_common::ledger::hex::Hex;
use tributary_common::ledger::record::PublicKey;
use tributary_common::progress::bytes_words;
use tributary_common::secagg::bitmap::ClientSet;
use tributary_common::secagg::context::ClientId;
use tributary_common::secagg::keys::SEALED_BYTES;
use tributary_common::secagg::messages::{Shares, ToClient, ToServer};
use tributary_common::secagg::parameters::{GraphKind, Parameters, what_a_sum_reveals};
use tributary_common::secagg::ring::Fixed;
use tributary_common::secagg::roster::Entry;

use crate::engine::expected_update_bytes;

/// A survivor's unmasking when nobody dropped out: kind, session, its own mask, and an empty list.
const UNMASK_BYTES: u64 = 1 + 16 + 32 + 2;

/// One client's traffic in one round, and how it is masked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TransferPlan {
    /// What an update is reduced to, in words.
    pub scheme: String,
    /// Bytes of an update.
    pub update_bytes: u64,
    /// Whether every update has exactly so many.
    pub update_bytes_are_exact: bool,
    /// Bytes of an update that is sent whole.
    pub whole_bytes: u64,
    /// Bytes of the round's coordinates, as a client gets them.
    pub support_bytes: u64,
    /// The masks; absent without `[secure_aggregation]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub masks: Option<MasksPlan>,
}

/// How updates are masked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MasksPlan {
    /// Whom they protect from.
    pub level: &'static str,
    /// Clients of a session.
    pub clients: u16,
    /// Neighbours of each in the graph of masks.
    pub neighbours: u16,
    /// Shares that recover a drop-out's key, and survivors that a sum needs.
    pub threshold: u16,
    /// Bytes of session messages from each client, where nobody drops out.
    pub session_bytes_up: u64,
    /// Bytes of session messages to each client.
    pub session_bytes_down: u64,
    /// Length and bits of each segment of an update.
    pub segments: Vec<(usize, u32)>,
    /// Why sums do not wrap around, or how likely they do.
    pub wrap: String,
    /// What the sum of the fewest survivors reveals, in words.
    pub reveals: String,
    /// What decides the coordinates that are sent, and how many there are; absent where all are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub support: Option<String>,
}

impl TransferPlan {
    /// The plan of a job.
    ///
    /// # Errors
    /// [`ExchangeError`] for a job that cannot be carried out.
    pub fn of(job: &Job) -> Result<Self, ExchangeError> {
        let exchange = Exchange::of(job)?;
        let (least, most) = exchange.update_bytes();
        let support = RoundSupport::first(job)?;
        let masks = exchange.masked().map(|masked| MasksPlan::of(job, masked)).transpose()?;
        Ok(Self {
            scheme: scheme(job),
            update_bytes: expected_update_bytes(job, &exchange),
            update_bytes_are_exact: least == most,
            whole_bytes: job.layout()?.parameters() as u64 * 4,
            support_bytes: support.map_or(0, |support| support.encoded().len() as u64),
            masks,
        })
    }

    /// Bytes that one client sends in a round.
    pub fn up(&self) -> u64 {
        self.update_bytes + self.masks.as_ref().map_or(0, |masks| masks.session_bytes_up)
    }

    /// Bytes that one client gets in a round beside the model.
    pub fn down(&self) -> u64 {
        self.support_bytes + self.masks.as_ref().map_or(0, |masks| masks.session_bytes_down)
    }
}

impl MasksPlan {
    fn of(job: &Job, masked: &Masked) -> Result<Self, ExchangeError> {
        let terms = Terms::of(job, RunId(1))?;
        let rules = *terms.rules();
        let clients = rules.maximum_clients;
        let parameters =
            rules.parameters(clients).map_err(|error| ExchangeError::Noise(error.to_string()))?;
        let Parameters { neighbours, threshold, .. } = parameters;
        let segments: Vec<(usize, u32)> =
            masked.segments().iter().map(|segment| (segment.length, segment.width.bits())).collect();
        let width = segments.first().map_or(0, |(_, bits)| *bits);
        let masks = job.secure_aggregation.as_ref();
        let masks =
            masks.ok_or_else(|| ExchangeError::Bytes("the job has no [secure_aggregation]".into()))?;
        let wrap = match masked.plan() {
            Some(plan) => format!(
                "the signal of {clients} clients, {} grid steps each at most, fits {width} bits for certain; with the \
                 noise a sum wraps around in a round with a probability of at most 2^{:.0}, which would cost accuracy and \
                 never privacy",
                plan.box_bound,
                plan.wrap_probability.log2().ceil().max(-1000.0)
            ),
            None => {
                let bound = Fixed::new(masks.value_bits(), masks.coordinate_limit() as f32)?.bound();
                format!(
                    "sums cannot wrap around: {clients} clients · {bound} steps = {} is below 2^{}",
                    u64::from(clients) * u64::from(bound),
                    width.saturating_sub(1)
                )
            }
        };
        let support = job.support_rule().map(|rule| {
            let (sent, all) =
                (job.masked_coordinates().unwrap_or(0), job.layout().map_or(0, |l| l.parameters()));
            let how = match rule {
                SupportRule::DelayedVote => "by the votes of the round before, the first by lot",
                SupportRule::Track => "by the magnitudes of past sums and in part by lot",
                SupportRule::Random => "by lot, anew in each round",
            };
            format!("{sent} of {all} coordinates, chosen {how}")
        });
        let (session_bytes_up, session_bytes_down) = session_bytes(clients, neighbours);
        let survivors = u16::try_from(job.cohort.minimum).unwrap_or(u16::MAX);
        Ok(Self {
            level: masks.level.name(),
            clients,
            neighbours,
            threshold,
            session_bytes_up,
            session_bytes_down,
            segments,
            wrap,
            reveals: what_a_sum_reveals(survivors),
            support,
        })
    }

    /// Clients that may fall silent after their keys are shared.
    fn tolerated(&self) -> u16 {
        self.clients.saturating_sub(self.threshold)
    }

    fn kind(&self) -> GraphKind {
        if self.neighbours + 1 == self.clients { GraphKind::Complete } else { GraphKind::Harary }
    }
}

/// Bytes of one client's session, up and down, where nobody drops out: the lengths of its messages.
fn session_bytes(clients: u16, neighbours: u16) -> (u64, u64) {
    let session = [0; 16];
    let id = ClientId::from_bytes([0; 16]);
    let entry = Entry {
        id,
        identity: PublicKey(Hex([0; 32])),
        share_key: [0; 32],
        mask_key: [0; 32],
        signature: [0; 64],
    };
    let each = usize::from(neighbours);
    let everybody = || ClientSet::of(clients, 0..clients);
    let sealed = [0; SEALED_BYTES];
    let up = [
        ToServer::Advertise(entry.clone()),
        ToServer::Shares(Shares {
            session,
            sealed: vec![sealed; each],
            commitment: [0; 32],
            signature: [0; 64],
        }),
        ToServer::AliveSig { session, signature: [0; 64] },
    ];
    let down = [
        ToClient::Roster {
            entries: vec![entry; usize::from(clients)],
            beacon: [0; 32],
            neighbours,
            threshold: 0,
        },
        ToClient::RoutedShares { session, shared: everybody(), sealed: vec![(0, sealed); each] },
        ToClient::Alive { session, alive: everybody() },
        ToClient::AliveSigs { session, signatures: vec![(0, [0; 64]); each] },
        ToClient::Committed { session, alive: everybody() },
    ];
    let up: u64 = up.iter().map(|message| message.encode().len() as u64).sum();
    let down = down.iter().map(|message| message.encode().len() as u64).sum();
    (up + UNMASK_BYTES, down)
}

/// What an update is reduced to.
fn scheme(job: &Job) -> String {
    let Some(compression) = &job.compression else { return "whole updates".into() };
    let mut words = compression.scheme.name().to_owned();
    if let Some(density) = compression.density {
        words.push_str(&format!(" {} %", density * 100.0));
    }
    if job.has_error_feedback() {
        words.push_str(" with error feedback");
    }
    words
}

impl fmt::Display for TransferPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let about = if self.update_bytes_are_exact { "" } else { "about " };
        let times = self.whole_bytes as f64 / self.update_bytes.max(1) as f64;
        write!(f, "updates              {}: {about}{} each", self.scheme, bytes_words(self.update_bytes))?;
        if self.update_bytes != self.whole_bytes {
            write!(f, ", {times:.1} times fewer than whole ones")?;
        }
        let Some(masks) = &self.masks else { return Ok(()) };
        let graph = match masks.kind() {
            GraphKind::Complete => format!("{} clients, each with all others", masks.clients),
            GraphKind::Harary => format!("{} clients, each with {} others", masks.clients, masks.neighbours),
        };
        write!(
            f,
            "\nmasks                level {}; {graph}; {} may fall silent; messages of {} up and {} down per client and round",
            masks.level,
            masks.tolerated(),
            bytes_words(masks.session_bytes_up),
            bytes_words(masks.session_bytes_down)
        )?;
        let kinds = ["values", "counts", "votes"];
        let segments = masks.segments.iter().zip(kinds);
        let segments: Vec<String> =
            segments.map(|((length, bits), kind)| format!("{length} {kind} of {bits} bits")).collect();
        write!(f, "\n                     an update is {}; {}", segments.join(", "), masks.wrap)?;
        if let Some(support) = &masks.support {
            let bytes = bytes_words(self.support_bytes);
            write!(f, "\n                     {support}; {bytes} tell each client which")?;
        }
        write!(f, "\n                     {}", masks.reveals)
    }
}
