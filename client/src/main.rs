//! The program `tributary-client`.

use std::process::ExitCode;

/// Also under libtorch: glibc returns the large buffers of each step to the kernel and faults them in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tributary_client::cli::main()
}
