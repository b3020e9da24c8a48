//! `cargo xtask test`: everything that must hold before a commit, one step after the other.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::cargo::{self, cargo};
use crate::libtorch;

/// A step of the tests: its name, and the command that must succeed.
struct Step {
    name: &'static str,
    command: Command,
    /// The cargo tool that the step needs; where it is not installed the step is skipped, and says so.
    tool: Option<&'static str>,
}

/// Runs the steps in order and stops at the first that fails. `quick` leaves out the tests of whole processes and
/// what follows the tests.
pub(crate) fn run(repository: &Path, quick: bool) -> anyhow::Result<()> {
    let start = Instant::now();
    libtorch::set_up(repository)?;
    let mut times = Vec::new();
    let mut skipped = Vec::new();
    for mut step in steps(repository, quick) {
        if let Some(tool) = step.tool.filter(|tool| !cargo::has_subcommand(tool)) {
            println!("\n== {}: skipped, cargo-{tool} is not installed", step.name);
            skipped.push(step.name);
            continue;
        }
        println!("\n== {}", step.name);
        let began = Instant::now();
        cargo::run(&mut step.command)
            .with_context(|| format!("`cargo xtask test` stopped at the step {}", step.name))?;
        times.push((step.name, began.elapsed()));
    }
    print!("{}", summary(&times, &skipped, start.elapsed()));
    Ok(())
}

fn steps(repository: &Path, quick: bool) -> Vec<Step> {
    let step = |name, tool, arguments: &[&str]| {
        let mut command = cargo(repository);
        command.args(arguments);
        Step { name, command, tool }
    };
    let mut steps = vec![
        step("format", None, &["fmt", "--all", "--check"]),
        step("clippy", None, &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    ];
    if quick {
        steps.push(step(
            "tests",
            None,
            &["test", "--workspace", "--no-fail-fast", "--exclude", "tributary-tests"],
        ));
        return steps;
    }
    steps.push(step("tests", None, &["test", "--workspace", "--no-fail-fast"]));
    let mut documentation = step("documentation", None, &["doc", "--workspace", "--no-deps"]);
    documentation.command.env("RUSTDOCFLAGS", "-D warnings");
    steps.push(documentation);
    // Advisories are left out: their database needs a network, and a finding there breaks no commit of ours.
    steps.push(step("licences and sources", Some("deny"), &["deny", "check", "bans", "licenses", "sources"]));
    steps.push(step("unused dependencies", Some("machete"), &["machete"]));
    steps
}

fn summary(times: &[(&str, Duration)], skipped: &[&str], total: Duration) -> String {
    let mut lines = String::from("\n");
    for (name, time) in times {
        lines += &format!("{name:22} ok       {:>12}\n", cargo::duration(*time));
    }
    for name in skipped {
        lines += &format!("{name:22} skipped\n");
    }
    lines + &format!("{:22} passed   {:>12}\n", "all", cargo::duration(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commands(quick: bool) -> Vec<String> {
        let words = |command: &Command| {
            command.get_args().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        steps(Path::new("/repository"), quick).iter().map(|step| words(&step.command)).collect()
    }

    #[test]
    fn the_full_pass_has_every_check_and_one_test_run() {
        let commands = commands(false);
        for check in
            ["fmt --all --check", "test --workspace --no-fail-fast", "doc --workspace --no-deps", "machete"]
        {
            assert_eq!(commands.iter().filter(|command| *command == check).count(), 1, "{check}");
        }
        assert!(commands.iter().any(|command| command.ends_with("-- -D warnings")));
    }

    #[test]
    fn the_quick_pass_leaves_out_whole_processes() {
        let commands = commands(true);
        assert_eq!(commands.len(), 3);
        assert!(commands[2].contains("--exclude tributary-tests"), "{commands:?}");
    }

    #[test]
    fn builds_use_the_one_spelling_of_libtorch() {
        for step in steps(Path::new("/repository"), false) {
            let removed = step.command.get_envs().any(|(name, value)| name == "LIBTORCH" && value.is_none());
            assert!(removed, "{}", step.name);
        }
    }

    #[test]
    fn the_summary_names_what_was_skipped() {
        let text = summary(
            &[("tests", Duration::from_secs(90))],
            &["licences and sources"],
            Duration::from_secs(95),
        );
        assert!(text.contains("licences and sources   skipped"), "{text}");
        assert!(text.contains("1 min 35 s"), "{text}");
    }
}
