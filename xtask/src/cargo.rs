//! Running cargo and other tools for a command: where they run, what they see, how long they took.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// `cargo` in the repository, with no `LIBTORCH` of its own: `.cargo/config.toml` gives every build the same
/// spelling of it, and another spelling would compile torch-sys again (three minutes).
pub(crate) fn cargo(repository: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(repository).env_remove("LIBTORCH");
    // What `cargo run` told this process about itself is no business of the next cargo.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_")
            || text.starts_with("CARGO_MANIFEST_")
            || text == "CARGO_PRIMARY_PACKAGE"
        {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs a command on this terminal to its end. Fails with one line when it cannot start or exits non-zero.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let program = name(command);
    let status = command.status().with_context(|| format!("cannot start {program}"))?;
    if !status.success() {
        bail!("{program} ended with {status}");
    }
    Ok(())
}

/// Runs a command to its end and gives its standard output. Fails with one line that ends in the last line
/// that the command wrote to standard error.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    let program = name(command);
    let output = command.output().with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        bail!("{program} ended with {}: {}", output.status, last.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A command's program without its folder.
fn name(command: &Command) -> String {
    let program = Path::new(command.get_program());
    program.file_name().unwrap_or(command.get_program()).to_string_lossy().into_owned()
}

/// Whether a program starts and answers `arguments` with success.
pub(crate) fn answers<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}

/// Whether a cargo subcommand is installed: `deny`, `machete`.
pub(crate) fn has_subcommand(name: &str) -> bool {
    answers(&format!("cargo-{name}"), &["--version"])
}

/// Where cargo puts the binaries of a profile (`debug` or `release`): beside the folder of this binary.
pub(crate) fn binaries(profile: &str) -> anyhow::Result<PathBuf> {
    let here = std::env::current_exe().context("cannot find xtask's own binary")?;
    let target = here.parent().and_then(Path::parent).context("xtask's binary is not in a target folder")?;
    Ok(target.join(profile))
}

/// Time for people: `3.2 s`, `4 min 05 s`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 {
        format!("{:.1} s", duration.as_secs_f64())
    } else {
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    }
}

/// Since when: for the line that ends a command.
pub(crate) fn elapsed(start: Instant) -> String {
    duration(start.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_for_people() {
        assert_eq!(duration(Duration::from_millis(3_240)), "3.2 s");
        assert_eq!(duration(Duration::from_secs(245)), "4 min 05 s");
    }

    #[test]
    fn a_failed_tool_is_one_line_with_its_last_words() {
        let error =
            output(Command::new("sh").args(["-c", "echo first >&2; echo last >&2; exit 3"])).unwrap_err();
        let message = format!("{error:#}");
        assert!(message.contains("last") && !message.contains("first"), "{message}");
        assert_eq!(message.lines().count(), 1);
    }
}
