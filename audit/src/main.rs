//! `tributary-audit`: the privacy officer's command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    tributary_audit::cli::main()
}
