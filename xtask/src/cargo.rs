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
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("cannot start {program}"))?;
    if !status.success() {
        bail!("{program} ended with {status}");
    }
    Ok(())
}

/// Runs a command to its end and gives its standard output. Fails with one line that ends in the last line
/// that the command wrote to standard error.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        bail!("{program} ended with {}: {}", output.status, last.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a program starts and answers `arguments` with success.
pub(crate) fn answers<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}

/// Where cargo puts the binaries of a profile (`debug` or `release`): beside the folder of this binary.
pub(crate) fn binaries(profile: &str) -> anyhow::Result<PathBuf> {
    let here = std::env::current_exe().context("cannot find xtask's own binary")?;
    let target = here.parent().and_then(Path::parent).context("xtask's binary is not in a target folder")?;
    Ok(target.join(profile))
}

/// SHA-256 of a file in lower-case hexadecimal, by coreutils: it is on every machine that has the wheels' one
/// platform, reads half a gigabyte in a second, and costs this crate no dependency.
pub(crate) fn sha256(path: &Path) -> anyhow::Result<String> {
    let line = output(Command::new("sha256sum").arg("--").arg(path))?;
    // A leading backslash marks a file name that sha256sum had to escape.
    let digest = line.trim_start_matches('\\').split_whitespace().next().unwrap_or_default();
    if digest.len() != 64 {
        bail!("sha256sum gave no digest for {}", path.display());
    }
    Ok(digest.to_owned())
}

/// Bytes for people: `526.6 MB`.
pub(crate) fn megabytes(bytes: u64) -> String {
    let tenths = (bytes + 50_000) / 100_000;
    format!("{}.{} MB", tenths / 10, tenths % 10)
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
    fn digest_of_a_known_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a file\\with odd name");
        std::fs::write(&path, "abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&path).unwrap(), expected);
        assert!(sha256(&folder.path().join("absent")).is_err());
    }

    #[test]
    fn figures_for_people() {
        assert_eq!(megabytes(526_574_961), "526.6 MB");
        assert_eq!(megabytes(254_009), "0.3 MB");
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
