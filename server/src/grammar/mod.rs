//! Structured output: grammars of tokens made from JSON schemas, regular expressions, choices and Lark grammars, by
//! [llguidance](https://github.com/guidance-ai/llguidance).

mod cache;
mod constraint;
mod reasoning;
mod token_env;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, TokEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::engine::{SharedGrammar, TokenMask};
use crate::tokenizer::Tokenizer;
use cache::Cache;
use constraint::TokenGrammar;
use reasoning::AfterReasoning;
pub use reasoning::ReasoningTokens;
use token_env::TokenEnv;

/// White space between the tokens of JSON, where a schema does not say otherwise: a space or two, or a new line and what
/// indents it. A model that got lost in more than that would not come back.
const JSON_WHITESPACE: &str = r"\x20{1,2}|\x0D?\x0A(?:\x20{0,24}|\x09{0,8})";

/// How long a grammar's first mask may take. Most take milliseconds, some small expressions many seconds.
const FIRST_MASK_PATIENCE: Duration = Duration::from_secs(3);

/// What an output must follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GrammarSource {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema describes.
    JsonSchema(Value),
    /// A text that a regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in llguidance's variant of Lark.
    Lark(String),
    /// Calls of tools, or a text.
    CallsOr {
        /// As [`Lark`](Self::Lark).
        calls: String,
        /// What the text must follow.
        text: Box<GrammarSource>,
    },
}

/// How a grammar is followed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GrammarOptions {
    /// End-of-sequence tokens come only where nothing else may.
    pub ignore_eos: bool,
    /// The grammar begins behind a part of reasoning.
    pub reasoning: Option<ReasoningTokens>,
}

/// Why a grammar could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The tokenizer has no form that grammars can use.
    #[error("this model's tokenizer cannot be used for structured output: {0}")]
    Tokenizer(String),
    /// The schema, expression or grammar is invalid, unsupported, or too complex.
    #[error("{0}")]
    Invalid(String),
}

/// Makes grammars for the tokens of one model.
pub struct GrammarCompiler {
    tokenizer: Arc<Tokenizer>,
    vocab_size: usize,
    eos_token_ids: Vec<u32>,
    /// Made when the first grammar is: it takes a while, and most servers never see one.
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    /// Grammars of late: clients send the same ones again and again.
    cache: Mutex<Cache<(GrammarSource, GrammarOptions), SharedGrammar>>,
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarCompiler").finish_non_exhaustive()
    }
}

/// Grammars that are kept. One is some hundred kilobytes; large schemas take megabytes.
const KEPT_GRAMMARS: usize = 32;

impl GrammarCompiler {
    /// A compiler for a model of `vocab_size` tokens, whose texts end with any of `eos_token_ids`.
    pub fn new(tokenizer: Arc<Tokenizer>, vocab_size: usize, eos_token_ids: Vec<u32>) -> Self {
        let cache = Mutex::new(Cache::new(KEPT_GRAMMARS));
        Self { tokenizer, vocab_size, eos_token_ids, factory: OnceLock::new(), cache }
    }

    /// Compiles a grammar, and computes its first mask. Takes milliseconds, or seconds where it is large.
    ///
    /// # Errors
    /// See [`GrammarError`].
    pub fn compile(
        &self,
        source: &GrammarSource,
        options: GrammarOptions,
    ) -> Result<SharedGrammar, GrammarError> {
        let key = (source.clone(), options);
        if let Some(known) = self.lock_cache().get(&key) {
            return Ok(known.clone());
        }
        if source.has_bottomless_number() {
            let message = "the number -2^63 is not supported";
            return Err(GrammarError::Invalid(message.to_owned()));
        }
        let factory = self.factory.get_or_init(|| self.make_factory()).as_ref().map_err(Clone::clone)?;
        let matcher = Matcher::new(factory.create_parser(source.grammar()));
        let ignored = if options.ignore_eos { self.eos_token_ids.clone() } else { Vec::new() };
        let grammar =
            TokenGrammar::new(matcher, ignored, FIRST_MASK_PATIENCE).map_err(GrammarError::Invalid)?;
        let grammar = SharedGrammar(Arc::new(grammar));
        let grammar = match options.reasoning {
            Some(tokens) => SharedGrammar(Arc::new(AfterReasoning::new(grammar, tokens, self.free_tokens()))),
            None => grammar,
        };
        self.lock_cache().insert(key, grammar.clone());
        Ok(grammar)
    }

    /// What a model may think: anything but the end.
    fn free_tokens(&self) -> TokenMask {
        let mut mask = TokenMask::all(self.vocab_size);
        self.eos_token_ids.iter().for_each(|&id| mask.remove(id));
        mask
    }

    fn lock_cache(&self) -> std::sync::MutexGuard<'_, Cache<(GrammarSource, GrammarOptions), SharedGrammar>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make_factory(&self) -> Result<ParserFactory, GrammarError> {
        let env = TokenEnv::new(Arc::clone(&self.tokenizer), self.vocab_size, &self.eos_token_ids);
        let env: TokEnv = Arc::new(env);
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|error| GrammarError::Tokenizer(error.to_string()))?;
        factory.quiet();
        // An error's text is for the client: what it sent is no news.
        *factory.limits_mut() = ParserLimits { verbose_errors: false, ..ParserLimits::default() };
        Ok(factory)
    }
}

impl GrammarSource {
    /// Whether llguidance would negate a number without end, until the stack is used up and the process ends: -2^63 is
    /// its own negative in 64 bits.
    fn has_bottomless_number(&self) -> bool {
        match self {
            Self::JsonObject | Self::Regex(_) | Self::Choice(_) => false,
            Self::JsonSchema(schema) => is_bottomless(schema),
            Self::Lark(grammar) => has_bottomless_number(grammar),
            Self::CallsOr { calls, text } => has_bottomless_number(calls) || text.has_bottomless_number(),
        }
    }

    fn grammar(&self) -> TopLevelGrammar {
        TopLevelGrammar { grammars: self.parts(), max_tokens: None }
    }

    /// The grammar, and those behind it that it refers to by name.
    fn parts(&self) -> Vec<GrammarWithLexer> {
        let whole = match self {
            Self::JsonObject => {
                GrammarWithLexer::from_json_schema(with_whitespace(&json!({"type": "object"})))
            }
            Self::JsonSchema(schema) => GrammarWithLexer::from_json_schema(with_whitespace(schema)),
            Self::Regex(regex) => GrammarWithLexer::from_regex(regex),
            Self::Choice(choices) => {
                let choices: Vec<String> = choices.iter().map(|choice| regex::escape(choice)).collect();
                GrammarWithLexer::from_regex(&format!("(?:{})", choices.join("|")))
            }
            Self::Lark(grammar) => GrammarWithLexer::from_lark(grammar.clone()),
            Self::CallsOr { calls, text } => {
                let either = GrammarWithLexer::from_lark("start: @calls | @text".to_owned());
                let mut parts = vec![either, GrammarWithLexer::from_lark(calls.clone())];
                parts.extend(text.parts());
                for (part, name) in parts[1..].iter_mut().zip(["calls", "text"]) {
                    part.name = Some(name.to_owned());
                }
                return parts;
            }
        };
        vec![whole]
    }
}

const LOWEST: f64 = i64::MIN as f64;

/// Whether there is the number -2^63 inside, or one that cannot be told from it.
fn is_bottomless(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.as_f64().is_some_and(|x| x == LOWEST),
        Value::Array(items) => items.iter().any(is_bottomless),
        Value::Object(fields) => fields.values().any(is_bottomless),
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}

/// The same for the text of a grammar, which may have schemas inside.
fn has_bottomless_number(text: &str) -> bool {
    text.split('-').skip(1).any(|rest| {
        let is_part = |c: char| c.is_ascii_digit() || matches!(c, '.' | 'e' | 'E' | '+');
        let number = &rest[..rest.find(|c| !is_part(c)).unwrap_or(rest.len())];
        number.parse().is_ok_and(|x: f64| x == -LOWEST)
    })
}

/// The schema with the compiler's options: how much white space there may be, and `oneOf` read as `anyOf`, without which
/// few such schemas could be used.
pub(crate) fn with_whitespace(schema: &Value) -> Value {
    let mut schema = match schema {
        // "Anything" and "nothing" have no place for options.
        Value::Bool(true) => json!({}),
        Value::Bool(false) => json!({"not": {}}),
        other => other.clone(),
    };
    if let Some(fields) = schema.as_object_mut() {
        fields
            .entry("x-guidance")
            .or_insert_with(|| json!({"whitespace_pattern": JSON_WHITESPACE, "coerce_one_of": true}));
    }
    schema
}

#[cfg(test)]
mod tests;
