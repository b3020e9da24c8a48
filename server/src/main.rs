//! `tributary-server`: the coordinator and its operator's commands.

use std::process::ExitCode;

fn main() -> ExitCode {
    tributary_server::cli::main()
}
