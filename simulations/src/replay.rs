//! `--replay`: the accepted sets of an earlier run, simulated or real, imposed on this one.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use tributary_common::ids::NodeName;
use tributary_common::record::{RoundOutcome, RoundRecord};
use tributary_server::round::ImposedSets;

/// Longest line of a record that is read.
const LINE_BYTES: u64 = 64 << 20;

/// Why a record cannot be replayed. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file cannot be read.
    #[error("{}: cannot be read ({cause}): give a run's folder or its rounds.jsonl", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: std::io::Error,
    },
    /// A line is not the record of a round.
    #[error("{}, line {line}: not the record of a round ({detail}): give a run's rounds.jsonl, or what `run show --format json` printed", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        detail: String,
    },
    /// The record lacks a round that the job asks for.
    #[error("{}: round {round} is not in it, but the job has {rounds}: give --set rounds={published}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The first round that is missing.
        round: u32,
        /// Rounds of the job.
        rounds: u32,
        /// Rounds in the record before it.
        published: u32,
    },
    /// The record names a client that the population lacks.
    #[error("{}: round {round} has an update of {client}, who is not among the clients: the population is another", path.display())]
    Stranger {
        /// The file.
        path: PathBuf,
        /// The round.
        round: u32,
        /// The client.
        client: NodeName,
    },
}

/// Reads the accepted sets of the published rounds from `path`: a JSON-lines file of round records, or a run's
/// folder. Abandoned attempts changed nothing and are skipped.
///
/// # Errors
/// A [`ReplayError`]; also if a round from 1 to `rounds` is missing, or an accepted client is not in `clients`.
pub fn read(path: &Path, rounds: u32, clients: &BTreeSet<&NodeName>) -> Result<ImposedSets, ReplayError> {
    let path = if path.is_dir() { path.join("rounds.jsonl") } else { path.to_path_buf() };
    let io = |cause| ReplayError::Io { path: path.clone(), cause };
    let mut file = BufReader::new(std::fs::File::open(&path).map_err(io)?);
    let mut sets: ImposedSets = BTreeMap::new();
    for line in 1.. {
        let mut text = String::new();
        let read = std::io::Read::take(&mut file, LINE_BYTES).read_line(&mut text).map_err(io)?;
        if read == 0 {
            break;
        }
        if text.trim().is_empty() {
            continue;
        }
        let record: RoundRecord = serde_json::from_str(&text).map_err(|error| ReplayError::Line {
            path: path.clone(),
            line,
            detail: error.to_string(),
        })?;
        if matches!(record.outcome, RoundOutcome::Published { .. }) {
            sets.insert(record.round, record.accepted().cloned().collect());
        }
    }
    for round in 1..=rounds {
        let Some(set) = sets.get(&round).filter(|set| !set.is_empty()) else {
            return Err(ReplayError::Missing { path, round, rounds, published: round - 1 });
        };
        if let Some(client) = set.iter().find(|client| !clients.contains(client)) {
            return Err(ReplayError::Stranger { path, round, client: client.clone() });
        }
    }
    Ok(sets)
}

#[cfg(test)]
mod tests {
    use tributary_common::digest::Digest;
    use tributary_common::record::{Abandonment, Participation};
    use tributary_common::time::Time;

    use super::*;

    fn record(round: u32, accepted: &[&str], outcome: RoundOutcome) -> RoundRecord {
        let part = || Participation::Accepted { digest: None, examples: 1, bytes: 4 };
        let mut cohort: BTreeMap<NodeName, Participation> =
            accepted.iter().map(|name| (name.parse().unwrap(), part())).collect();
        cohort.insert("late-one".parse().unwrap(), Participation::Late);
        RoundRecord {
            round,
            attempt: 1,
            started: Time(0),
            ended: Time(1),
            eligible: 3,
            cohort,
            bytes_down: 0,
            bytes_up: 0,
            outcome,
            spent: false,
            summed: None,
        }
    }

    #[test]
    fn the_published_rounds_are_imposed_and_gaps_are_named() {
        let published = || RoundOutcome::Published { model: Digest::of(b"m") };
        let abandoned = RoundOutcome::Abandoned { reason: Abandonment::Stopped };
        let records = [
            record(1, &["a"], abandoned),
            record(1, &["a", "b"], published()),
            record(2, &["b"], published()),
        ];
        let text: String = records.iter().map(|r| serde_json::to_string(r).unwrap() + "\n").collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rounds.jsonl");
        std::fs::write(&path, &text).unwrap();
        let names: Vec<NodeName> = ["a", "b"].iter().map(|name| name.parse().unwrap()).collect();
        let clients: BTreeSet<&NodeName> = names.iter().collect();
        for from in [path.as_path(), folder.path()] {
            let sets = read(from, 2, &clients).unwrap();
            assert_eq!(sets[&1].iter().map(NodeName::as_str).collect::<Vec<_>>(), ["a", "b"]);
            assert_eq!(sets[&2].len(), 1);
        }
        let error =
            |rounds, clients: &BTreeSet<&NodeName>| read(&path, rounds, clients).unwrap_err().to_string();
        assert!(error(3, &clients).contains("round 3 is not in it, but the job has 3: give --set rounds=2"));
        assert!(error(2, &clients.iter().skip(1).copied().collect()).contains("an update of a, who is not"));
        std::fs::write(&path, format!("{text}{{\"event\":\"round\"}}\n")).unwrap();
        assert!(error(2, &clients).contains("line 4: not the record of a round"));
        assert!(
            read(&folder.path().join("none"), 1, &clients)
                .unwrap_err()
                .to_string()
                .contains("cannot be read")
        );
    }
}
