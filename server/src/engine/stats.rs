//! What the engine does, in numbers: a snapshot for gauges and counters, an observer for histograms.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::request::{FinishReason, Usage};

/// The engine at one moment, and its counters since the start. Read it with
/// [`EngineHandle::stats`](super::EngineHandle::stats).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences in the running batch.
    pub running: usize,
    /// Sequences that were submitted and do not run, the preempted ones included.
    pub waiting: usize,
    /// KV blocks in use.
    pub kv_blocks_used: usize,
    /// KV blocks of the cache.
    pub kv_blocks_total: usize,
    /// Steps run.
    pub steps: u64,
    /// Tokens of the prompts that are done, found in the cache or computed; each counts once.
    pub prompt_tokens: u64,
    /// Prompt tokens that were looked for in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Those that were found there.
    pub prefix_cache_hits: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Times that a sequence gave its KV blocks back to an older one.
    pub preemptions: u64,
    /// Drafts that were verified.
    pub spec_decode_drafts: u64,
    /// Their tokens.
    pub spec_decode_draft_tokens: u64,
    /// Those that were right.
    pub spec_decode_accepted_tokens: u64,
}

impl EngineStats {
    /// Part of the KV cache in use, 0 to 1.
    pub fn kv_cache_usage(&self) -> f64 {
        if self.kv_blocks_total == 0 { 0.0 } else { self.kv_blocks_used as f64 / self.kv_blocks_total as f64 }
    }
}

/// Where [`EngineStats`] live. Written by the engine alone, a few plain stores per step; every value is right, but a
/// snapshot taken during a step may mix two steps.
#[derive(Debug, Default)]
pub(super) struct StatsCell {
    pub(super) running: AtomicUsize,
    pub(super) kv_blocks_used: AtomicUsize,
    pub(super) kv_blocks_total: AtomicUsize,
    pub(super) steps: AtomicU64,
    pub(super) prompt_tokens: AtomicU64,
    pub(super) prefix_cache_queries: AtomicU64,
    pub(super) prefix_cache_hits: AtomicU64,
    pub(super) generation_tokens: AtomicU64,
    pub(super) preemptions: AtomicU64,
    pub(super) spec_decode_drafts: AtomicU64,
    pub(super) spec_decode_draft_tokens: AtomicU64,
    pub(super) spec_decode_accepted_tokens: AtomicU64,
}

impl StatsCell {
    /// The values now; `in_flight` sequences are submitted and have not ended.
    pub(super) fn snapshot(&self, in_flight: usize) -> EngineStats {
        let running = self.running.load(Ordering::Relaxed);
        EngineStats {
            running,
            waiting: in_flight.saturating_sub(running),
            kv_blocks_used: self.kv_blocks_used.load(Ordering::Relaxed),
            kv_blocks_total: self.kv_blocks_total.load(Ordering::Relaxed),
            steps: self.steps.load(Ordering::Relaxed),
            prompt_tokens: self.prompt_tokens.load(Ordering::Relaxed),
            prefix_cache_queries: self.prefix_cache_queries.load(Ordering::Relaxed),
            prefix_cache_hits: self.prefix_cache_hits.load(Ordering::Relaxed),
            generation_tokens: self.generation_tokens.load(Ordering::Relaxed),
            preemptions: self.preemptions.load(Ordering::Relaxed),
            spec_decode_drafts: self.spec_decode_drafts.load(Ordering::Relaxed),
            spec_decode_draft_tokens: self.spec_decode_draft_tokens.load(Ordering::Relaxed),
            spec_decode_accepted_tokens: self.spec_decode_accepted_tokens.load(Ordering::Relaxed),
        }
    }
}

/// Hears what the engine does, on the engine's thread: implementations do no more than update a histogram. Every
/// method does nothing unless implemented.
pub trait EngineObserver: Send {
    /// A step computed this many tokens, prompts' and others.
    fn step(&mut self, tokens: usize) {
        let _ = tokens;
    }

    /// A sequence got its first token this long after it was submitted.
    fn first_token(&mut self, since_submission: Duration) {
        let _ = since_submission;
    }

    /// A sequence got another token this long after the one before; said once for tokens that came together.
    fn next_token(&mut self, since_previous: Duration) {
        let _ = since_previous;
    }

    /// A sequence is over.
    fn ended(&mut self, report: &SequenceReport) {
        let _ = report;
    }
}

/// Observes nothing.
impl EngineObserver for () {}

/// A sequence that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceReport {
    /// Why; `None` when the client went away, as the HTTP side also does at a stop string.
    pub reason: Option<FinishReason>,
    /// Its tokens.
    pub usage: Usage,
    /// Where its time went.
    pub timing: Timing,
}

/// Where a sequence's time went. The three phases follow each other; one that was not reached is zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timing {
    /// From submission to the first step that it was part of.
    pub queue: Duration,
    /// From there to its first token, or to its end if it had none.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// From submission to the end.
    pub total: Duration,
}

/// The moments that [`Timing`] is made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    submitted: Instant,
    scheduled: Option<Instant>,
    tokens: Option<TokenTimes>,
}

#[derive(Debug, Clone, Copy)]
struct TokenTimes {
    first: Instant,
    last: Instant,
}

impl Clock {
    pub(super) fn new(submitted: Instant) -> Self {
        Self { submitted, scheduled: None, tokens: None }
    }

    /// The sequence runs; only the first time counts.
    pub(super) fn scheduled(&mut self, now: Instant) {
        self.scheduled.get_or_insert(now);
    }

    /// The sequence got a token.
    pub(super) fn token(&mut self, now: Instant, observer: &mut dyn EngineObserver) {
        match &mut self.tokens {
            None => {
                observer.first_token(now.saturating_duration_since(self.submitted));
                self.tokens = Some(TokenTimes { first: now, last: now });
            }
            // They came with the same step.
            Some(times) if times.last == now => {}
            Some(times) => {
                observer.next_token(now.saturating_duration_since(times.last));
                times.last = now;
            }
        }
    }

    /// The sequence is over.
    pub(super) fn timing(&self, now: Instant) -> Timing {
        let scheduled = self.scheduled.unwrap_or(now);
        let (first, last) = self.tokens.map_or((now, now), |times| (times.first, times.last));
        Timing {
            queue: scheduled.saturating_duration_since(self.submitted),
            prefill: first.saturating_duration_since(scheduled),
            decode: last.saturating_duration_since(first),
            total: now.saturating_duration_since(self.submitted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_each_other() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let ms = Duration::from_millis;
        let mut clock = Clock::new(start);
        assert_eq!(clock.timing(at(5)), Timing { queue: ms(5), total: ms(5), ..Timing::default() });
        clock.scheduled(at(10));
        clock.scheduled(at(20)); // again, after a preemption
        assert_eq!(
            clock.timing(at(25)),
            Timing { queue: ms(10), prefill: ms(15), decode: ms(0), total: ms(25) }
        );
        for token in [30, 40, 60] {
            clock.token(at(token), &mut ());
        }
        assert_eq!(
            clock.timing(at(61)),
            Timing { queue: ms(10), prefill: ms(20), decode: ms(30), total: ms(61) }
        );
    }

    #[test]
    fn usage_of_an_empty_cache_is_zero() {
        assert_eq!(EngineStats::default().kv_cache_usage(), 0.0);
        let stats = EngineStats { kv_blocks_used: 1, kv_blocks_total: 4, ..EngineStats::default() };
        assert_eq!(stats.kv_cache_usage(), 0.25);
    }
}
