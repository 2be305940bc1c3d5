//! How fast threads read memory.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use super::memory::AlignedBytes;

/// Bytes of all threads together, at least: more than caches hold.
const BYTES: usize = 512 << 20;
/// And of each.
const THREAD_BYTES: usize = 64 << 20;
/// Times that they are read in a measurement.
const PASSES: usize = 3;

/// Measures what threads reach together that do nothing but read memory, in huge pages where the system has them.
///
/// That is the ceiling of generating on a CPU: each step reads all weights. It holds the memory that it reads, 512 MiB or
/// 64 MiB for each thread, whichever is more.
#[derive(Debug)]
pub struct PlainRead {
    /// One per thread.
    parts: Vec<AlignedBytes>,
}

impl PlainRead {
    /// Memory for `threads` (at least one); `None` if the system refuses it.
    pub fn new(threads: usize) -> Option<Self> {
        let threads = threads.max(1);
        let bytes = (BYTES / threads).max(THREAD_BYTES);
        let mut parts: Vec<_> = (0..threads).map(|_| AlignedBytes::zeroed(bytes)).collect::<Option<_>>()?;
        // Written by the threads that read them: memory is near the one that touches it first.
        std::thread::scope(|scope| {
            for part in &mut parts {
                scope.spawn(|| part.as_mut_slice().fill(1));
            }
        });
        Some(Self { parts })
    }

    /// Bytes per second of all threads together, on average over some hundred milliseconds at most.
    pub fn bytes_per_sec(&self) -> f64 {
        let barrier = Barrier::new(self.parts.len());
        let seconds = |part: &AlignedBytes| {
            barrier.wait();
            let start = Instant::now();
            for _ in 0..PASSES {
                read(part.as_slice());
            }
            // The slowest thread's time is that of all.
            barrier.wait();
            start.elapsed().as_secs_f64()
        };
        let slowest = std::thread::scope(|scope| {
            let threads: Vec<_> = self.parts.iter().map(|part| scope.spawn(|| seconds(part))).collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).fold(0.0, f64::max)
        });
        let bytes: usize = self.parts.iter().map(|part| part.as_slice().len()).sum();
        (PASSES * bytes) as f64 / slowest
    }
}

/// Reads `bytes`.
fn read(bytes: &[u8]) {
    /// Independent sums, so that loads wait for nothing but memory.
    const SUMS: usize = 256;
    let mut sums = [0_u8; SUMS];
    for chunk in bytes.as_chunks::<SUMS>().0 {
        for (sum, byte) in sums.iter_mut().zip(chunk) {
            *sum ^= byte;
        }
    }
    black_box(sums);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_by_all_threads_at_a_rate_that_memory_has() {
        let rate = PlainRead::new(2).unwrap().bytes_per_sec();
        assert!((1e8..1e13).contains(&rate), "{rate}");
    }
}
