//! How good a checkpoint is: perplexity of a text, distance to the unquantized model, multiple-choice tasks.
//!
//! [`perplexity()`] and [`divergence()`] measure a loaded model, for whoever has one.

mod divergence;
mod error;
mod perplexity;
mod runner;
mod scores;
mod text;

pub use divergence::{Baseline, Divergence, divergence};
pub use error::EvalError;
pub use perplexity::{Perplexity, perplexity};
pub use text::{TextTokenizer, Windows};
