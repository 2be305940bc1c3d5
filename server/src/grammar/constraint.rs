//! A grammar's place as the engine asks for it.

use std::sync::{Mutex, PoisonError};

use llguidance::Matcher;

use crate::engine::{Constraint, ConstraintError, Grammar, Progress, TokenMask};

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
    /// The grammar is invalid, or allows nothing.
    pub(super) fn new(mut matcher: Matcher, ignored: Vec<u32>) -> Result<Self, String> {
        let first = mask(&mut matcher, &ignored).map_err(|error| error.0)?;
        Ok(Self { start: Mutex::new(matcher), first, ignored })
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
    let text = format!("{error:#}");
    let end = ["\n<state>", "\n<non-verbose/>", "<non-verbose/>", "\n<backtrace>"]
        .iter()
        .filter_map(|mark| text.find(mark))
        .min()
        .unwrap_or(text.len());
    ConstraintError(text[..end].trim().to_owned())
}
