//! How good a checkpoint is: perplexity of a text, distance to the unquantized model, multiple-choice tasks.
//!
//! [`perplexity()`] and [`divergence()`] measure a loaded model, for whoever has one;
//! [`evaluate`] compares checkpoints side by side.

mod compare;
mod divergence;
mod error;
mod perplexity;
mod result;
mod runner;
mod scores;
pub(crate) mod table;
mod task;
mod text;

pub use compare::{EvalOptions, evaluate};
pub use divergence::{Baseline, Divergence, divergence};
pub use error::EvalError;
pub use perplexity::{Perplexity, perplexity};
pub use result::{Evaluation, ModelResult, TaskResult, TextResult};
pub(crate) use scores::{kl_divergence, nll};
pub use task::{Task, TaskScore, answer};
pub use text::Windows;
