//! `tributary-sim`: the simulator's command line.

use std::process::ExitCode;

/// libtorch's buffers are large and short-lived: glibc would map and fault them in at every step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tributary_simulations::cli::main()
}
