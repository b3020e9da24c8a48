//! The size of a session's graph and the threshold of its shares, which each client computes itself.

use serde::{Deserialize, Serialize};

/// No session ends with fewer survivors: with two, each learns the other's update.
pub const MINIMUM_SURVIVORS: u16 = 3;
/// Largest roster that is read: it fits into one message of the control stream.
pub const MAXIMUM_CLIENTS: u16 = 4096;
/// Up to here every client is every other's neighbour.
pub const COMPLETE_CLIENTS: u16 = 255;
/// A share's index is a non-zero byte of GF(2^8), so a client has at most this many neighbours.
pub const MAXIMUM_NEIGHBOURS: u16 = 254;
/// Probability of a graph that leaks: at most 2^-`SIGMA`.
pub const SIGMA: i32 = 40;
/// Probability of a round lost to drop-outs within the assumption: at most 2^-`ETA`.
pub const ETA: i32 = 30;

const MILLION: u64 = 1_000_000;

/// Against whom a session protects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ThreatLevel {
    /// The coordinator follows the protocol and does not invent clients.
    Semi,
    /// The coordinator may do anything; every client's identity was vouched for by somebody else (pinned).
    Strict,
}

/// What the configuration of a session says about its cohort. It is part of the context hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// The level.
    pub level: ThreatLevel,
    /// Assumed fraction of clients that collude with the coordinator, in millionths. It decides only above
    /// [`COMPLETE_CLIENTS`] clients.
    pub corrupt_per_million: u32,
    /// Assumed fraction of clients that drop out, in millionths. It decides only above [`COMPLETE_CLIENTS`] clients.
    pub dropout_per_million: u32,
    /// Fewest survivors whose sum is opened.
    pub minimum_survivors: u16,
    /// Largest roster.
    pub maximum_clients: u16,
}

/// Which clients share masks and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GraphKind {
    /// All with all. A client counts itself: it is one of the threshold.
    Complete,
    /// Each with the `neighbours` next to it on a permuted ring. A client never counts itself: if it did, a false
    /// bitmap could cut the ring and open an arc's sum.
    Harary,
}

/// Graph and threshold of a session of `clients` clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Parameters {
    /// Clients in the roster.
    pub clients: u16,
    /// The graph.
    pub kind: GraphKind,
    /// Neighbours of each client.
    pub neighbours: u16,
    /// Shares that recover a secret, and signatures that confirm a bitmap.
    pub threshold: u16,
}

/// Why there are no parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// Too few for any protection.
    #[error("{clients} clients are too few for masking: at least {minimum} are needed")]
    TooFew {
        /// Clients in the roster.
        clients: u16,
        /// Fewest that are allowed.
        minimum: u16,
    },
    /// More than the configuration or the program allows.
    #[error("{clients} clients are more than the {maximum} that the configuration allows")]
    TooMany {
        /// Clients in the roster.
        clients: u16,
        /// Most that are allowed.
        maximum: u16,
    },
    /// The floor of survivors lies below the compiled one.
    #[error("minimum_survivors = {0} is too low: at least {MINIMUM_SURVIVORS} are needed")]
    Floor(u16),
    /// The fractions are no fractions, or leave nobody.
    #[error(
        "assumed fractions of {corrupt} and {dropout} millionths (corrupt, drop-out) must sum to less than 1000000"
    )]
    Fractions {
        /// Millionths that collude.
        corrupt: u32,
        /// Millionths that drop out.
        dropout: u32,
    },
    /// No degree of at most [`MAXIMUM_NEIGHBOURS`] is secure and correct.
    #[error(
        "no graph of at most {MAXIMUM_NEIGHBOURS} neighbours protects {0} clients under these assumptions: split the cohort into groups of at most {COMPLETE_CLIENTS}"
    )]
    NoGraph(u16),
}

impl Rules {
    /// Graph and threshold for a roster of `clients`, computed alike by the coordinator and by every client.
    ///
    /// Up to [`COMPLETE_CLIENTS`] the graph is complete and t = ⌊2n/3⌋ + 1; above, the smallest Harary graph that
    /// is safe but for 2^-[`SIGMA`] and completes but for 2^-[`ETA`] under the assumed fractions.
    ///
    /// # Errors
    /// [`ParameterError`] if the rules or the size are outside the compiled floors, or no graph fits.
    pub fn parameters(&self, clients: u16) -> Result<Parameters, ParameterError> {
        if self.minimum_survivors < MINIMUM_SURVIVORS {
            return Err(ParameterError::Floor(self.minimum_survivors));
        }
        let (corrupt, dropout) = (self.corrupt_per_million, self.dropout_per_million);
        if u64::from(corrupt) + u64::from(dropout) >= MILLION {
            return Err(ParameterError::Fractions { corrupt, dropout });
        }
        if clients < self.minimum_survivors {
            return Err(ParameterError::TooFew { clients, minimum: self.minimum_survivors });
        }
        let maximum = self.maximum_clients.min(MAXIMUM_CLIENTS);
        if clients > maximum {
            return Err(ParameterError::TooMany { clients, maximum });
        }
        if clients <= COMPLETE_CLIENTS {
            let threshold = 2 * clients / 3 + 1;
            return Ok(Parameters { clients, kind: GraphKind::Complete, neighbours: clients - 1, threshold });
        }
        let (neighbours, threshold) = harary(u32::from(clients), self.level, corrupt, dropout)
            .ok_or(ParameterError::NoGraph(clients))?;
        Ok(Parameters { clients, kind: GraphKind::Harary, neighbours, threshold })
    }

    /// Canonical bytes for the context hash.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let level = match self.level {
            ThreatLevel::Semi => 1u8,
            ThreatLevel::Strict => 2,
        };
        let mut bytes = vec![level];
        bytes.extend(self.corrupt_per_million.to_le_bytes());
        bytes.extend(self.dropout_per_million.to_le_bytes());
        bytes.extend(self.minimum_survivors.to_le_bytes());
        bytes.extend(self.maximum_clients.to_le_bytes());
        bytes.extend(SIGMA.to_le_bytes());
        bytes.extend(ETA.to_le_bytes());
        bytes.extend(COMPLETE_CLIENTS.to_le_bytes());
        bytes
    }
}

/// Neighbours k and threshold t of the smallest Harary graph for `n` clients, or none up to [`MAXIMUM_NEIGHBOURS`].
///
/// With A = ⌊γn⌋ corrupt clients, D = ⌊δn⌋ drop-outs, S = ⌈(1 − δ)n⌉ survivors and hypergeometric tails (Bell et al.
/// 2020, and the finder of Google's `fcp`): the graph without A + D nodes is connected but for 2^-(σ+1); a is the
/// number of corrupt neighbours that no client exceeds but for 2^-(σ+1); every client keeps t living neighbours but
/// for 2^-η. Then t = max(a + 1, k/2 + 1) for `Semi`. For `Strict` t = k/2 + a + 1: the end of an arc that was cut
/// off by false drop-outs has k/2 honest neighbours and a corrupt ones, too few for its masks.
fn harary(
    n: u32,
    level: ThreatLevel,
    corrupt_per_million: u32,
    dropout_per_million: u32,
) -> Option<(u16, u16)> {
    let million = MILLION as u32;
    let fraction = |per_million: u32| (u64::from(n) * u64::from(per_million) / MILLION) as u32;
    let corrupt = fraction(corrupt_per_million);
    let dropped = fraction(dropout_per_million);
    let surviving = (u64::from(n) * u64::from(million - dropout_per_million)).div_ceil(MILLION) as u32;
    let leak = (-f64::from(SIGMA + 1)).exp2();
    let loss = (-f64::from(ETA)).exp2();
    let nodes = f64::from(n);
    (2..=u32::from(MAXIMUM_NEIGHBOURS).min(n - 1)).step_by(2).find_map(|k| {
        if disconnected(n, k, corrupt + dropped) >= leak {
            return None;
        }
        let upper = Hypergeometric::new(n, corrupt, k).upper_tails();
        let a = upper.iter().position(|&tail| tail <= leak / nodes)? as u32;
        let lower = Hypergeometric::new(n, surviving, k).lower_tails();
        let most = lower.iter().rposition(|&tail| tail <= loss / nodes)? as u32;
        let t = match level {
            ThreatLevel::Semi => (a + 1).max(k / 2 + 1),
            ThreatLevel::Strict => k / 2 + a + 1,
        };
        (2..=most).contains(&t).then_some((k as u16, t as u16))
    })
}

/// Union bound on a Harary graph without `missing` random nodes being disconnected:
/// n(n−k−1)/2 · m!(n−k)! / (n!(m−k)!).
fn disconnected(n: u32, k: u32, missing: u32) -> f64 {
    if k > missing || k + 1 >= n {
        return 0.0;
    }
    let ways = f64::from(n) * f64::from(n - k - 1) / 2.0;
    ways * (ln_factorial(missing) + ln_factorial(n - k) - ln_factorial(n) - ln_factorial(missing - k)).exp()
}

fn ln_factorial(n: u32) -> f64 {
    libm::lgamma(f64::from(n) + 1.0)
}

/// How many of `draws` nodes are marked if `marked` of `population` are.
struct Hypergeometric {
    probabilities: Vec<f64>,
}

impl Hypergeometric {
    fn new(population: u32, marked: u32, draws: u32) -> Self {
        let choose = |n: u32, k: u32| {
            if k > n { f64::NEG_INFINITY } else { ln_factorial(n) - ln_factorial(k) - ln_factorial(n - k) }
        };
        let all = choose(population, draws);
        let probability = |x: u32| (choose(marked, x) + choose(population - marked, draws - x) - all).exp();
        Self { probabilities: (0..=draws).map(probability).collect() }
    }

    /// Probabilities of more than x, for x = 0, 1, …, draws; summed from the small end.
    fn upper_tails(&self) -> Vec<f64> {
        let mut sum = 0.0;
        let mut tails: Vec<f64> = self
            .probabilities
            .iter()
            .rev()
            .map(|p| {
                let above = sum;
                sum += p;
                above
            })
            .collect();
        tails.reverse();
        tails
    }

    /// Probabilities of less than x, for x = 0, 1, …, draws.
    fn lower_tails(&self) -> Vec<f64> {
        let mut sum = 0.0;
        self.probabilities
            .iter()
            .map(|p| {
                let below = sum;
                sum += p;
                below
            })
            .collect()
    }
}

/// What the sum over `survivors` clients tells its members, in words for a person.
///
/// Masks hide updates from the coordinator. They cannot hide a sum from somebody who knows all of its other terms:
/// this is reported, it cannot be refused.
pub fn what_a_sum_reveals(survivors: u16) -> String {
    let others = survivors.saturating_sub(1);
    let rest = survivors.saturating_sub(2);
    let insider = match rest {
        0 => "a hospital that colludes with another leaves nothing to hide in".to_owned(),
        1 => "one hospital together with the coordinator or with another hospital learns the exact update of a third: masking hides an update from the coordinator alone".to_owned(),
        _ => format!("one more that colludes with it leaves a sum over {rest}"),
    };
    format!(
        "with {survivors} survivors every hospital that subtracts its own update learns the exact sum of the other {others}; {insider}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [u32; 9] = [64, 100, 200, 500, 1000, 2000, 5000, 10_000, 100_000];

    /// Rows of k/t by size, from another implementation of the same conditions; `-` where there is none.
    const ROWS: [(ThreatLevel, u32, u32, &str); 12] = [
        (ThreatLevel::Semi, 0, 100_000, "14/8 22/12 34/18 42/22 48/25 50/26 54/28 56/29 60/31"),
        (ThreatLevel::Semi, 50_000, 50_000, "8/5 12/7 22/12 30/16 34/18 36/19 36/20 38/21 40/22"),
        (ThreatLevel::Semi, 50_000, 100_000, "14/8 22/12 34/18 42/22 48/25 50/26 54/28 56/29 60/31"),
        (ThreatLevel::Semi, 100_000, 100_000, "14/8 22/12 36/19 46/25 52/28 56/30 58/31 60/32 66/35"),
        (ThreatLevel::Semi, 100_000, 200_000, "26/14 42/22 64/33 88/45 100/51 110/56 118/60 124/63 134/68"),
        (ThreatLevel::Semi, 200_000, 100_000, "20/13 32/21 50/31 66/41 76/47 80/49 88/53 90/55 98/59"),
        (ThreatLevel::Strict, 0, 100_000, "14/8 22/12 34/18 42/22 48/25 50/26 54/28 56/29 60/31"),
        (
            ThreatLevel::Strict,
            50_000,
            50_000,
            "14/11 22/17 42/32 82/63 104/80 118/91 130/100 134/103 146/112",
        ),
        (
            ThreatLevel::Strict,
            50_000,
            100_000,
            "20/14 32/22 60/41 116/83 148/106 170/122 192/138 200/144 224/161",
        ),
        (ThreatLevel::Strict, 100_000, 100_000, "26/20 42/32 82/62 164/125 218/166 - - - -"),
        (ThreatLevel::Strict, 100_000, 200_000, "38/26 62/42 122/82 - - - - - -"),
        (ThreatLevel::Strict, 200_000, 100_000, "38/32 62/52 122/102 - - - - - -"),
    ];

    /// Degrees above 254 of the published table are none here: a share's index is one byte.
    #[test]
    fn rings_are_those_of_the_published_table() {
        for (level, corrupt, dropout, row) in ROWS {
            for (n, expected) in SIZES.into_iter().zip(row.split(' ')) {
                let found = harary(n, level, corrupt, dropout);
                let found = found.map_or_else(|| "-".to_owned(), |(k, t)| format!("{k}/{t}"));
                assert_eq!(found, expected, "{level:?} {corrupt} {dropout} n={n}");
            }
        }
    }

    fn rules() -> Rules {
        Rules {
            level: ThreatLevel::Semi,
            corrupt_per_million: 50_000,
            dropout_per_million: 100_000,
            minimum_survivors: 3,
            maximum_clients: 1000,
        }
    }

    #[test]
    fn complete_graphs_lose_at_most_a_third() {
        // Clients and the drop-outs that are tolerated, the client itself counted.
        for (clients, tolerated) in [(3, 0), (4, 1), (5, 1), (6, 1), (7, 2), (10, 3), (100, 33), (255, 84)] {
            let parameters = rules().parameters(clients).unwrap();
            assert_eq!((parameters.kind, parameters.neighbours), (GraphKind::Complete, clients - 1));
            assert_eq!(clients - parameters.threshold, tolerated);
            // Two lists cannot both be signed: 2t > n + colluders, up to a third less one.
            let colluders = clients.div_ceil(3) - 1;
            assert!(2 * parameters.threshold > clients + colluders, "{clients}");
        }
        assert_eq!(rules().parameters(256).unwrap().kind, GraphKind::Harary);
    }

    #[test]
    fn rules_below_the_floors_are_refused() {
        let refused = |change: fn(&mut Rules), clients| {
            let mut rules = rules();
            change(&mut rules);
            rules.parameters(clients).unwrap_err()
        };
        assert_eq!(refused(|_| {}, 2), ParameterError::TooFew { clients: 2, minimum: 3 });
        assert_eq!(refused(|rules| rules.minimum_survivors = 2, 5), ParameterError::Floor(2));
        assert_eq!(refused(|rules| rules.minimum_survivors = 0, 5), ParameterError::Floor(0));
        assert_eq!(
            refused(|rules| rules.maximum_clients = 5, 6),
            ParameterError::TooMany { clients: 6, maximum: 5 }
        );
        assert_eq!(
            refused(|rules| rules.maximum_clients = u16::MAX, 4097),
            ParameterError::TooMany { clients: 4097, maximum: 4096 }
        );
        let everybody = |rules: &mut Rules| rules.corrupt_per_million = 1_000_000;
        assert!(matches!(refused(everybody, 5), ParameterError::Fractions { .. }));
        let most = |rules: &mut Rules| rules.dropout_per_million = 600_000;
        assert_eq!(refused(most, 300), ParameterError::NoGraph(300));
    }

    #[test]
    fn what_few_survivors_reveal_is_said() {
        let three = what_a_sum_reveals(3);
        assert!(
            three.contains("exact sum of the other 2") && three.contains("from the coordinator alone"),
            "{three}"
        );
        let ten = what_a_sum_reveals(10);
        assert!(ten.contains("the other 9") && ten.contains("a sum over 8"), "{ten}");
    }
}
