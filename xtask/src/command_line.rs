//! The command line of `cargo xtask`, parsed by hand so that the first command is built in a second.

use std::path::PathBuf;

use crate::bench::{self, Bench};

pub(crate) const USAGE: &str = "\
Tributary's developer commands. Each one does the set-up that it needs.

usage: cargo xtask COMMAND

  setup              fetch libtorch 2.13.0 (526 MB, once per user) and link it into the repository
  demo [ARGUMENTS]   train the federation of jobs/demo.toml in the simulator; the arguments go to
                     `tributary-sim run`, for example: cargo xtask demo --workers 1 --set rounds=5
  demo --real        the same with a coordinator and nodes as processes of their own over mutual TLS
  test [--quick]     formatting, clippy, all tests, documentation, licences
                     (--quick: formatting, clippy, tests without the tests of whole processes)
  faults [ARGUMENTS] production code in a seeded world of trouble; the arguments go to `tributary-sim faults`:
                     --seeds N [--start N], --seed S --trace, --planted
  bench peers        other frameworks and the simulator on the same work, in turn; options: --repeats N, --rounds N,
                     --model small-cnn|2nn, --python FILE, --program FILE (a simulator that is built already)
  bench scale        a round's time against its cohort, and peak memory; options: --model NAME, --largest N,
                     --program FILE
  bench privacy      a step of private training beside Opacus', and noise per number; option: --python FILE
  bench secagg       masking against the rate of its cipher, beside Flower; options: --dimension D, --python FILE
  bench robust       accuracy under attack for each aggregation rule; option: --program FILE
  bench engine [NAME…]  the workspace's own benches
  dist [--out DIR]   one tarball for each role, for machines without Rust (DIR: dist)

LIBTORCH=FOLDER uses your own libtorch 2.13.0 instead of downloading one.
";

/// One parsed command line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Help,
    Setup,
    /// `arguments` go to `tributary-sim run` as they are.
    Demo {
        arguments: Vec<String>,
    },
    /// A coordinator and nodes as real processes.
    RealDemo,
    Test {
        quick: bool,
    },
    /// `arguments` go to `tributary-sim faults` as they are.
    Faults {
        arguments: Vec<String>,
    },
    Bench(Bench),
    Dist {
        out: Option<PathBuf>,
    },
}

/// Parses the arguments after the program's name. The error is one line that names what was not understood.
pub(crate) fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Command, String> {
    let mut arguments = arguments.into_iter();
    let Some(name) = arguments.next() else { return Ok(Command::Help) };
    let rest: Vec<String> = arguments.collect();
    let asks_help = rest.first().is_some_and(|first| is_help(first));
    match name.as_str() {
        name if is_help(name) => Ok(Command::Help),
        "setup" | "demo" | "test" | "bench" | "dist" if asks_help => Ok(Command::Help),
        "setup" => none_left(&name, &rest).map(|()| Command::Setup),
        "demo" if rest.first().is_some_and(|first| first == "--real") => {
            none_left("demo --real", rest.get(1..).unwrap_or_default()).map(|()| Command::RealDemo)
        }
        "demo" => Ok(Command::Demo { arguments: rest }),
        "test" => match rest.as_slice() {
            [] => Ok(Command::Test { quick: false }),
            [flag] if flag == "--quick" => Ok(Command::Test { quick: true }),
            [other, ..] => Err(format!("`test` takes --quick only, not `{other}`")),
        },
        "faults" => Ok(Command::Faults { arguments: rest }),
        "bench" => bench::parse(&rest).map(Command::Bench),
        "dist" => match rest.as_slice() {
            [] => Ok(Command::Dist { out: None }),
            [flag, folder] if flag == "--out" => Ok(Command::Dist { out: Some(PathBuf::from(folder)) }),
            [flag] if flag == "--out" => Err("`--out` needs a folder".to_owned()),
            [flag] if flag.starts_with("--out=") => {
                Ok(Command::Dist { out: Some(PathBuf::from(flag.trim_start_matches("--out="))) })
            }
            [other, ..] => Err(format!("`dist` takes --out DIR only, not `{other}`")),
        },
        other => Err(format!("unknown command `{other}`")),
    }
}

fn is_help(argument: &str) -> bool {
    matches!(argument, "--help" | "-h" | "help")
}

fn none_left(name: &str, rest: &[String]) -> Result<(), String> {
    rest.first().map_or(Ok(()), |other| Err(format!("`{name}` takes no arguments, not `{other}`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn no_command_and_help_show_the_usage() {
        for line in ["", "--help", "-h", "help", "demo --help", "dist -h"] {
            assert_eq!(parsed(line), Ok(Command::Help), "{line}");
        }
    }

    #[test]
    fn demo_passes_its_arguments_on() {
        let arguments = ["--workers", "2", "--set", "rounds=3"].map(str::to_owned).to_vec();
        assert_eq!(parsed("demo --workers 2 --set rounds=3"), Ok(Command::Demo { arguments }));
        let arguments = ["--seeds", "10"].map(str::to_owned).to_vec();
        assert_eq!(parsed("faults --seeds 10"), Ok(Command::Faults { arguments }));
    }

    #[test]
    fn the_real_demo_takes_no_arguments() {
        assert_eq!(parsed("demo --real"), Ok(Command::RealDemo));
        assert!(parsed("demo --real --workers 2").unwrap_err().contains("--workers"));
    }

    #[test]
    fn flags_are_read() {
        assert_eq!(parsed("test"), Ok(Command::Test { quick: false }));
        assert_eq!(parsed("test --quick"), Ok(Command::Test { quick: true }));
        let dist = || Ok(Command::Dist { out: Some(PathBuf::from("there")) });
        assert_eq!(parsed("dist --out there"), dist());
        assert_eq!(parsed("dist --out=there"), dist());
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (line, named) in [
            ("frobnicate", "`frobnicate`"),
            ("setup now", "`now`"),
            ("test --fast", "`--fast`"),
            ("dist --out", "needs a folder"),
            ("dist there", "`there`"),
        ] {
            let message = parsed(line).unwrap_err();
            assert!(message.contains(named), "{line}: {message}");
        }
    }
}
