//! What a processor can do at most, measured: bytes read from memory, and products of each kind, per second.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use kernels::PlainRead;

/// Runs of which the best counts: a ceiling is what was once reached.
const RUNS: usize = 6;

/// The ceilings of a number of threads.
pub(crate) struct Ceilings {
    /// Bytes per second of a plain read, from huge pages where the system has them, in 10^9.
    pub(crate) read: f64,
    /// Multiply-adds of signed bytes per second, in 10^9.
    pub(crate) int8: f64,
    /// Multiply-adds of F32 per second, in 10^9.
    pub(crate) f32: f64,
}

impl Ceilings {
    /// Measures them with `threads` threads.
    pub(crate) fn measure(threads: usize) -> Self {
        Self { read: read(threads), int8: products(threads, int8()), f32: products(threads, f32()) }
    }
}

/// Runs `body` on all threads at once, [`RUNS`] times; the best run's `units` of all threads per second, in 10^9.
fn best_of(threads: usize, units: usize, body: impl Fn() + Sync) -> f64 {
    let (barrier, body) = (Barrier::new(threads), &body);
    let run = || {
        let mut times = [0.0; RUNS];
        for time in &mut times {
            barrier.wait();
            let start = Instant::now();
            body();
            // The slowest thread's time is the run's.
            barrier.wait();
            *time = start.elapsed().as_secs_f64();
        }
        times.into_iter().fold(f64::INFINITY, f64::min)
    };
    let slowest = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        handles.into_iter().map(|h| h.join().expect("no panic")).fold(0.0, f64::max)
    });
    (threads * units) as f64 / slowest / 1e9
}

fn read(threads: usize) -> f64 {
    let memory = PlainRead::new(threads).expect("memory");
    (0..RUNS).map(|_| memory.bytes_per_sec() / 1e9).fold(0.0, f64::max)
}

/// Multiply-adds per round, and a function that does so many rounds, with instructions that the processor has.
type Loop = (usize, unsafe fn(usize));

/// Rounds of a [`Loop`]: some milliseconds.
const ROUNDS: usize = 1 << 20;
/// Sums in flight: enough for latency times throughput.
const SUMS: usize = 16;

fn products(threads: usize, (per_round, body): Loop) -> f64 {
    // SAFETY: a loop's instructions are there.
    best_of(threads, per_round * ROUNDS, || unsafe { body(ROUNDS) })
}

macro_rules! sums_of {
    ($name:ident, $features:literal, $zero:expr, |$sum:ident, $w:ident, $x:ident| $step:expr) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        fn $name(rounds: usize) {
            use std::arch::x86_64::*;
            let mut sums = [$zero; SUMS];
            let ($w, $x) = (black_box($zero), black_box($zero));
            for _ in 0..rounds {
                for $sum in &mut sums {
                    *$sum = $step;
                }
            }
            black_box(sums);
        }
    };
}
sums_of!(int8_512, "avx512f,avx512vnni", _mm512_setzero_si512(), |sum, w, x| _mm512_dpbusd_epi32(*sum, w, x));
sums_of!(int8_vnni, "avx2,avxvnni", _mm256_setzero_si256(), |sum, w, x| _mm256_dpbusd_avx_epi32(*sum, w, x));
sums_of!(int8_avx2, "avx2", _mm256_setzero_si256(), |sum, w, x| _mm256_add_epi32(
    *sum,
    _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1))
));
sums_of!(f32_512, "avx512f", _mm512_setzero_ps(), |sum, w, x| _mm512_fmadd_ps(w, x, *sum));
sums_of!(f32_avx2, "avx2,fma", _mm256_setzero_ps(), |sum, w, x| _mm256_fmadd_ps(w, x, *sum));

/// What the compiler makes of plain sums of products, where there is nothing better here.
fn f32_plain(rounds: usize) {
    let (mut sums, w, x) = ([0.0_f32; 4 * SUMS], black_box(0.5_f32), black_box(0.5_f32));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum += w * x;
        }
    }
    black_box(sums);
}

fn int8_plain(rounds: usize) {
    let (mut sums, w, x) = ([0_i32; 4 * SUMS], black_box(3_i8), black_box(5_i8));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = sum.wrapping_add(i32::from(w) * i32::from(x));
        }
    }
    black_box(sums);
}

fn int8() -> Loop {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512vnni") {
            return (64 * SUMS, int8_512);
        }
        if is_x86_feature_detected!("avxvnni") {
            return (32 * SUMS, int8_vnni);
        }
        if is_x86_feature_detected!("avx2") {
            return (32 * SUMS, int8_avx2);
        }
    }
    (4 * SUMS, int8_plain)
}

fn f32() -> Loop {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return (16 * SUMS, f32_512);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return (8 * SUMS, f32_avx2);
        }
    }
    (4 * SUMS, f32_plain)
}
