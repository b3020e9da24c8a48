//! How many threads libtorch may use: one, always, because more change the bits.

use std::cell::Cell;
use std::panic::catch_unwind;
use std::sync::Once;

thread_local! {
    static IS_SET: Cell<bool> = const { Cell::new(false) };
}
static INTER_OP: Once = Once::new();

/// Makes libtorch run each operation of the calling thread on that thread alone.
///
/// The setting is per operating system thread and must come before the thread's first tensor. Setting it also
/// clears oneDNN's cache of primitives, so it is set once per thread, not once per call.
pub(super) fn one_intra_op_thread() {
    if IS_SET.replace(true) {
        return;
    }
    // The inter-op pool, which nothing of ours uses, can be sized once per process and not after its start;
    // tch panics when it is too late, which then changes nothing.
    INTER_OP.call_once(|| drop(catch_unwind(|| tch::set_num_interop_threads(1))));
    tch::set_num_threads(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_gets_one_and_asking_again_is_harmless() {
        let count = || {
            one_intra_op_thread();
            one_intra_op_thread();
            tch::get_num_threads()
        };
        let threads = [std::thread::spawn(count), std::thread::spawn(count)];
        assert!(threads.into_iter().all(|thread| thread.join().unwrap() == 1));
    }
}
