//! `cargo xtask bench robust`: what each aggregation rule keeps of a model's accuracy under each attack.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::{Simulator, print_table};

const SCENARIO: &str = "jobs/robust.toml";
/// Rules, each with the settings that it needs against four attackers of twenty.
const RULES: [(&str, &[&str]); 6] = [
    ("mean", &[]),
    ("norm-bound", &["aggregation.norm_bound=1.0"]),
    ("median", &[]),
    ("trimmed-mean", &["aggregation.attackers=4"]),
    ("krum", &["aggregation.attackers=4"]),
    ("multi-krum", &["aggregation.attackers=4"]),
];
/// Attacks, each with its strength; none is a fifth of the clients that attack by nothing.
const ATTACKS: [(&str, &[&str]); 6] = [
    ("none", &["attacks.fraction=0.0"]),
    ("sign flip ×4", &["attacks.kind=sign-flip", "attacks.strength=4.0"]),
    ("scaled ×10", &["attacks.kind=scaled", "attacks.strength=10.0"]),
    ("label flip", &["attacks.kind=label-flip"]),
    ("a little ×1.5", &["attacks.kind=little-is-enough", "attacks.strength=1.5"]),
    ("a little ×20", &["attacks.kind=little-is-enough", "attacks.strength=20.0"]),
];
const PARTITIONS: [(&str, &[&str]); 2] = [
    ("IID", &["partition.scheme=iid"]),
    ("Dirichlet(0.5)", &["partition.scheme=dirichlet", "partition.alpha=0.5"]),
];

/// Prints a table for each partition. Exit code 2 means that it was skipped.
pub(super) fn run(repository: &Path, program: Option<&Path>) -> anyhow::Result<ExitCode> {
    let Some(data) = std::env::var_os("TRIBUTARY_DATA").map(PathBuf::from) else {
        eprintln!("SKIPPED: TRIBUTARY_DATA does not name a folder with `mnist`; nothing was measured");
        return Ok(ExitCode::from(2));
    };
    let simulator = Simulator::new(repository, program)?;
    for (partition, of_partition) in PARTITIONS {
        let mut header = vec!["rule".to_owned()];
        header.extend(ATTACKS.map(|(attack, _)| attack.to_owned()));
        let mut rows = vec![header];
        for (rule, of_rule) in RULES {
            let mut row = vec![rule.to_owned()];
            for (attack, of_attack) in ATTACKS {
                eprintln!("{partition}: {rule}, {attack}");
                let own = format!("aggregation.rule={rule}");
                let settings = [own.as_str()].into_iter().chain(of_rule.iter().copied());
                let settings = settings.chain(of_attack.iter().copied()).chain(of_partition.iter().copied());
                let mut arguments: Vec<OsString> = vec!["--data".into(), data.clone().into()];
                for setting in settings {
                    arguments.extend(["--set".into(), setting.into()]);
                }
                // A run that attackers bring to its end is a result too.
                row.push(match simulator.measure(SCENARIO, "robust", &arguments) {
                    Ok(measured) => measured
                        .accuracy
                        .map_or_else(|| "–".to_owned(), |accuracy| format!("{:.1}", accuracy * 100.0)),
                    Err(error) => {
                        eprintln!("{partition}: {rule}, {attack}: {error:#}");
                        "failed".to_owned()
                    }
                });
            }
            rows.push(row);
        }
        println!("\n{partition}, 4 attackers of 20, accuracy in % after 20 rounds:\n");
        print_table(&rows);
    }
    Ok(ExitCode::SUCCESS)
}
