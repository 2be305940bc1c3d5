//! A persistent thread pool for parallel regions of microseconds.
//!
//! A decode step has five regions per layer; a general work-stealing pool costs more there than the work. Workers
//! spin for a short while between regions, then park, so that an idle server uses no processor time.
//!
//! Every thread has an equal share of a region's tasks, in order, and helps the others when it has done its own. So the
//! thread that packed a part of a weight, and whose memory node its pages came from by being the first to touch them,
//! is in general the one that multiplies it.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a worker spins for the next region before it parks.
const SPIN: Duration = Duration::from_micros(100);

/// A region's work: called with (task, thread), each task once.
type Body<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Region {
    body: *const Body<'static>,
    tasks: usize,
}

/// The next task of a thread's share; on cache lines of its own, since every thread has one at hand.
#[repr(align(128))]
#[derive(Default)]
struct NextTask(AtomicUsize);

/// The tasks that are thread `thread`'s share of `tasks`.
fn share(thread: usize, threads: usize, tasks: usize) -> Range<usize> {
    thread * tasks / threads..(thread + 1) * tasks / threads
}

struct Shared {
    /// Number of regions started; a worker that sees it change takes part in the new one.
    epoch: AtomicU32,
    region: UnsafeCell<Region>,
    /// One per thread.
    next_tasks: Vec<NextTask>,
    /// Workers that have not finished the current region.
    busy: AtomicUsize,
    stop: AtomicBool,
    parked: Vec<AtomicBool>,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

// SAFETY: `region` is written by the pool's owner only while no worker is in a region (`busy` is 0), before the
// release store to `epoch`; workers read it only after an acquire load of the new epoch, and before they leave `busy`.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `region` is only used inside `Pool::run`, while what it points to is borrowed.
unsafe impl Send for Shared {}

impl Shared {
    /// Does what is left of all shares, `thread`'s own first.
    fn work(&self, body: &Body<'_>, tasks: usize, thread: usize) {
        let threads = self.next_tasks.len();
        for owner in (thread..threads).chain(0..thread) {
            let (next, end) = (&self.next_tasks[owner].0, share(owner, threads, tasks).end);
            // Looked at before it is changed, so that a share that is done stays in the caches of all.
            while next.load(Ordering::Relaxed) < end {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task < end {
                    body(task, thread);
                }
            }
        }
    }

    /// Leaves no task to be started.
    fn cancel(&self, tasks: usize) {
        for next in &self.next_tasks {
            next.0.store(tasks, Ordering::Relaxed);
        }
    }

    fn worker(&self, thread: usize) {
        let mut seen = 0;
        loop {
            let since = Instant::now();
            let mut spins = 0_u32;
            while self.epoch.load(Ordering::Acquire) == seen {
                spins += 1;
                std::hint::spin_loop();
                if spins.is_multiple_of(64) && since.elapsed() > SPIN {
                    let parked = &self.parked[thread - 1];
                    parked.store(true, Ordering::SeqCst);
                    // The owner stores the epoch, then looks at `parked`: one of us sees the other.
                    while self.epoch.load(Ordering::SeqCst) == seen {
                        std::thread::park();
                    }
                    parked.store(false, Ordering::SeqCst);
                }
            }
            seen = seen.wrapping_add(1);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            // SAFETY: see `Sync`: the epoch was acquired and this worker is counted in `busy`.
            let (body, tasks) = unsafe {
                let region = &*self.region.get();
                (&*region.body, region.tasks)
            };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work(body, tasks, thread))) {
                self.cancel(tasks);
                *self.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(panic);
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Threads that run regions together; the owner's thread is number 0.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
}

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    pub(crate) fn new(threads: usize) -> Self {
        let workers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            epoch: AtomicU32::new(0),
            region: UnsafeCell::new(Region { body: &|_, _| (), tasks: 0 }),
            next_tasks: (0..=workers).map(|_| NextTask::default()).collect(),
            busy: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            parked: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            panic: Mutex::new(None),
        });
        // A thread that the system refuses is one fewer in the pool.
        let workers: Vec<_> = (1..=workers)
            .map_while(|thread| {
                let shared = Arc::clone(&shared);
                let name = format!("kernels-{thread}");
                std::thread::Builder::new().name(name).spawn(move || shared.worker(thread)).ok()
            })
            .collect();
        let handles = workers.iter().map(|w| w.thread().clone()).collect();
        Self { shared, workers, handles }
    }

    /// Number of threads, the owner's included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    fn start_epoch(&self) {
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (parked, handle) in self.shared.parked.iter().zip(&self.handles) {
            if parked.load(Ordering::SeqCst) {
                handle.unpark();
            }
        }
    }

    /// Calls `body(task, thread)` for every task in `0..tasks`, on all threads, and returns when all are done. Which
    /// thread runs a task is not determined, though in general it is the one in whose share it is. Not reentrant: `&mut` keeps regions apart.
    pub(crate) fn run(&mut self, tasks: usize, body: &Body<'_>) {
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|task| body(task, 0));
            return;
        }
        // SAFETY: the lifetime is only forgotten for the duration of this call: it returns, or unwinds, after every
        // worker has left the region. No worker is in a region now.
        unsafe {
            let body: *const Body<'static> = std::mem::transmute::<*const Body<'_>, _>(body);
            *self.shared.region.get() = Region { body, tasks };
        }
        let threads = self.shared.next_tasks.len();
        for (thread, next) in self.shared.next_tasks.iter().enumerate() {
            next.0.store(share(thread, threads, tasks).start, Ordering::Relaxed);
        }
        self.shared.busy.store(self.workers.len(), Ordering::Relaxed);
        self.start_epoch();
        let own = catch_unwind(AssertUnwindSafe(|| self.shared.work(body, tasks, 0)));
        if own.is_err() {
            self.shared.cancel(tasks);
        }
        let mut spins = 0_u32;
        while self.shared.busy.load(Ordering::Acquire) > 0 {
            spins += 1;
            // With more threads than processors a worker may need ours to finish.
            if spins.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let theirs = self.shared.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.start_epoch();
        for worker in self.workers.drain(..) {
            // Its panics were caught and passed on by `run`.
            let _ = worker.join();
        }
    }
}

/// A slice cut into pieces of equal length that different tasks may write at the same time.
pub(crate) struct DisjointSlices<T> {
    start: *mut T,
    len: usize,
    piece: usize,
}

// SAFETY: `slice` hands out disjoint pieces, each to one task, by its contract.
unsafe impl<T: Send> Sync for DisjointSlices<T> {}

impl<T> DisjointSlices<T> {
    /// Cuts `slice` into pieces of `piece` elements; what is left over at its end is in no piece. The caller keeps
    /// `slice` borrowed for as long as pieces are used.
    pub(crate) fn new(slice: &mut [T], piece: usize) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), piece }
    }

    /// Piece `index`.
    ///
    /// # Safety
    /// No two live pieces have the same index, and the slice given to `new` is still borrowed.
    #[allow(clippy::mut_from_ref, reason = "pieces are disjoint by contract")]
    pub(crate) unsafe fn slice(&self, index: usize) -> &mut [T] {
        assert!((index + 1) * self.piece <= self.len, "piece {index} is inside the slice");
        // SAFETY: inside the slice, and no other live piece overlaps.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(index * self.piece), self.piece) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads);
            for tasks in [0, 1, 2, 3, 100, 1001] {
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|task, thread| {
                    assert!(thread < threads);
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks}");
            }
        }
    }

    #[test]
    fn threads_do_their_own_share_first_and_then_help() {
        for (threads, tasks) in [(1, 7), (2, 2), (3, 10), (4, 2), (5, 1001)] {
            let shares: Vec<_> = (0..threads).flat_map(|thread| share(thread, threads, tasks)).collect();
            assert!(shares.into_iter().eq(0..tasks), "{threads} threads share {tasks} tasks");
        }
        let mut pool = Pool::new(2);
        let barrier = std::sync::Barrier::new(2);
        let threads: Vec<_> = (0..8).map(|_| AtomicUsize::new(usize::MAX)).collect();
        pool.run(8, &|task, thread| {
            // Both threads are here with the first task of their shares, and thread 1 waits until the rest is done.
            if matches!(task, 0 | 4) {
                barrier.wait();
            }
            threads[task].store(thread, Ordering::Relaxed);
            if task == 4 {
                let rest = || threads.iter().filter(|t| t.load(Ordering::Relaxed) == usize::MAX).count();
                while rest() > 0 {
                    std::hint::spin_loop();
                }
            }
        });
        let threads: Vec<_> = threads.into_iter().map(AtomicUsize::into_inner).collect();
        assert_eq!(threads, [0, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn parked_workers_wake_up() {
        let mut pool = Pool::new(3);
        for _ in 0..5 {
            std::thread::sleep(SPIN * 20);
            let sum = AtomicUsize::new(0);
            pool.run(64, &|task, _| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 64 * 63 / 2);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|task, _| assert!(task != 5, "task five"));
        }));
        assert!(result.is_err());
        // Both threads panic; nothing of it is left for the next region.
        let result = catch_unwind(AssertUnwindSafe(|| {
            let barrier = std::sync::Barrier::new(2);
            pool.run(2, &|task, _| {
                barrier.wait();
                panic!("task {task}");
            });
        }));
        assert!(result.is_err());
        let done = AtomicUsize::new(0);
        pool.run(8, &|_, _| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 8);
    }
}
