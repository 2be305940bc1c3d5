//! What is noted about a request while it is answered: for its line in the log, and for its trace.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::engine::GenerateRequest;

/// Shared by who answers a request and who tells of it.
#[derive(Debug)]
pub(crate) struct Record {
    started: Instant,
    started_at: SystemTime,
    generated: Mutex<Option<Generated>>,
}

/// What was generated for a request.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Generated {
    /// Name of the model, as it is served.
    pub(crate) model: String,
    /// Sequences.
    pub(crate) sequences: usize,
    /// Tokens of the prompts.
    pub(crate) prompt_tokens: usize,
    /// Of these, found in the cache.
    pub(crate) cached_tokens: usize,
    /// Tokens generated.
    pub(crate) completion_tokens: usize,
    /// From the request's headers to the first token of any sequence.
    pub(crate) first_token: Option<Duration>,
    /// From there to the last token of any sequence.
    pub(crate) decode: Duration,
    /// A reason per sequence that ended by itself.
    pub(crate) finish_reasons: Vec<&'static str>,
    /// Most tokens of a sequence that were asked for.
    pub(crate) max_tokens: usize,
    /// Of the sampling.
    pub(crate) temperature: f32,
    /// Of the sampling.
    pub(crate) top_p: f32,
}

impl Generated {
    /// Mean time from one token of a sequence to the next; `None` where no sequence had two.
    pub(crate) fn time_per_output_token(&self) -> Option<Duration> {
        let intervals = self.completion_tokens.checked_sub(self.sequences).filter(|&n| n > 0)?;
        let per_sequence = intervals as f64 / self.sequences.max(1) as f64;
        Some(self.decode.div_f64(per_sequence))
    }
}

impl Record {
    /// A request that begins now.
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), started_at: SystemTime::now(), generated: Mutex::default() }
    }

    /// When its headers had been read.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// The same, as the time of day.
    pub(crate) fn started_at(&self) -> SystemTime {
        self.started_at
    }

    fn note(&self, generated: Generated) {
        *self.lock() = Some(generated);
    }

    /// What was noted.
    pub(crate) fn generated(&self) -> Option<Generated> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Generated>> {
        self.generated.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes note while a request's sequences run, and writes it down when they have ended, in whatever way.
#[derive(Debug)]
pub(crate) struct Recorder {
    record: Option<Arc<Record>>,
    generated: Generated,
    /// When the first and the last token came.
    tokens: Option<(Instant, Instant)>,
}

impl Recorder {
    /// For these sequences of one request; they share everything but their seeds.
    pub(crate) fn new(model: &str, requests: &[GenerateRequest], prompt_tokens: usize) -> Self {
        let first = requests.first();
        let generated = Generated {
            model: model.to_owned(),
            sequences: requests.len(),
            prompt_tokens,
            max_tokens: first.map_or(0, |request| request.stop.max_tokens),
            temperature: first.map_or(0.0, |request| request.sampling.temperature),
            top_p: first.map_or(0.0, |request| request.sampling.top_p),
            ..Generated::default()
        };
        Self { record: None, generated, tokens: None }
    }

    /// Where to write it down.
    pub(crate) fn write_to(&mut self, record: &Arc<Record>) {
        self.record = Some(Arc::clone(record));
    }

    /// A token came.
    pub(crate) fn token(&mut self) {
        let now = Instant::now();
        self.generated.completion_tokens += 1;
        self.tokens = Some((self.tokens.map_or(now, |(first, _)| first), now));
    }

    /// Prompt tokens were found in the cache.
    pub(crate) fn cached(&mut self, tokens: usize) {
        self.generated.cached_tokens += tokens;
    }

    /// A sequence ended by itself.
    pub(crate) fn finished(&mut self, reason: &'static str) {
        self.generated.finish_reasons.push(reason);
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let Some(record) = &self.record else { return };
        if let Some((first, last)) = self.tokens {
            self.generated.first_token = Some(first.duration_since(record.started));
            self.generated.decode = last.duration_since(first);
        }
        record.note(std::mem::take(&mut self.generated));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_per_token_is_that_of_a_sequence() {
        let generated = |sequences, completion_tokens| Generated {
            sequences,
            completion_tokens,
            decode: Duration::from_secs(6),
            ..Generated::default()
        };
        assert_eq!(generated(1, 7).time_per_output_token(), Some(Duration::from_secs(1)));
        // Two sequences side by side, each of four tokens.
        assert_eq!(generated(2, 8).time_per_output_token(), Some(Duration::from_secs(2)));
        assert_eq!(generated(2, 2).time_per_output_token(), None);
        assert_eq!(generated(1, 0).time_per_output_token(), None);
    }
}
