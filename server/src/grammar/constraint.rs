//! A grammar's place as the engine asks for it.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use llguidance::{CancellationHandle, Cancelled, Matcher};

use crate::engine::{Canceller, Constraint, ConstraintError, Grammar, Progress, TokenMask};

/// A compiled grammar. Its lexer's states are shared by the sequences of a request no longer than for a copy: they run
/// on different threads.
pub(super) struct TokenGrammar {
    start: Mutex<Matcher>,
    first: TokenMask,
    /// End-of-sequence tokens to be avoided.
    ignored: Vec<u32>,
}

impl TokenGrammar {
    /// The grammar of a matcher that has seen nothing yet; `ignored` are tokens that come only where nothing else may.
    ///
    /// # Errors
    /// The grammar is invalid, or allows nothing, or its first mask takes longer than `patience`.
    pub(super) fn new(matcher: Matcher, ignored: Vec<u32>, patience: Duration) -> Result<Self, String> {
        let mut matcher = matcher.into_cancellable();
        let first = within(patience, matcher.cancellation_handle(), || mask(&mut matcher, &ignored));
        Ok(Self { start: Mutex::new(matcher), first: first.map_err(|error| error.0)?, ignored })
    }
}

impl Grammar for TokenGrammar {
    fn begin(&self) -> Box<dyn Constraint> {
        let matcher = self.start.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        Box::new(Place { matcher, first: Some(self.first.clone()), ignored: self.ignored.clone() })
    }
}

struct Place {
    matcher: Matcher,
    /// The first mask, until it is asked for.
    first: Option<TokenMask>,
    ignored: Vec<u32>,
}

impl Constraint for Place {
    fn allowed(&mut self) -> Result<TokenMask, ConstraintError> {
        match self.first.take() {
            Some(first) => Ok(first),
            None => mask(&mut self.matcher, &self.ignored),
        }
    }

    fn accept(&mut self, token: u32) -> Result<Progress, ConstraintError> {
        self.first = None;
        self.matcher.consume_token(token).map_err(|error| described(&error))?;
        Ok(if self.matcher.is_stopped() { Progress::Complete } else { Progress::Open })
    }

    fn canceller(&self) -> Option<Canceller> {
        let handle = self.matcher.cancellation_handle()?;
        Some(Box::new(move || handle.cancel()))
    }
}

/// Runs `work`, which `handle` cancels when it takes longer than `patience`.
fn within<T>(patience: Duration, handle: Option<CancellationHandle>, work: impl FnOnce() -> T) -> T {
    let (done, is_done) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            if is_done.recv_timeout(patience) == Err(RecvTimeoutError::Timeout)
                && let Some(handle) = handle
            {
                handle.cancel();
            }
        });
        let result = work();
        drop(done);
        result
    })
}

fn mask(matcher: &mut Matcher, ignored: &[u32]) -> Result<TokenMask, ConstraintError> {
    let mut mask = matcher.compute_mask_or_eos().map_err(|error| described(&error))?;
    let others = mask.num_set() > ignored.iter().filter(|&&id| mask.is_allowed(id)).count();
    if others {
        ignored.iter().for_each(|&id| mask.disallow_token(id));
    }
    Ok(TokenMask::from_words(mask.as_slice().to_vec()))
}

/// The error's first lines, without the parser's state and without a backtrace.
fn described(error: &anyhow::Error) -> ConstraintError {
    if error.is::<Cancelled>() {
        return ConstraintError("it is too complex: a mask takes too long".to_owned());
    }
    let text = format!("{error:#}");
    let end = ["\n<state>", "\n<non-verbose/>", "<non-verbose/>", "\n<backtrace>"]
        .iter()
        .filter_map(|mark| text.find(mark))
        .min()
        .unwrap_or(text.len());
    ConstraintError(text[..end].trim().to_owned())
}
