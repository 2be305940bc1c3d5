//! The threads that a job's parallel loops run on.

use std::num::NonZeroUsize;

/// Runs `work` where rayon's loops have `threads` threads.
///
/// # Panics
/// The system gives no threads: without any of its own, the process has no way to go on.
pub(crate) fn in_pool<T: Send>(threads: NonZeroUsize, work: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build();
    pool.expect("the system gives threads").install(work)
}
