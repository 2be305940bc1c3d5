//! Packs BF16, F16 and F32 checkpoints (Hugging Face folders, llama GGUF files) into Microscaling formats.
//!
//! [`plan`] decides, as a pure function, what happens to each tensor; [`convert()`] streams the tensors through a
//! [`quantize::Quantizer`] into a folder that appears when it is complete. Memory does not grow with the model:
//! worker threads hold a few MiB each (for GGUF: one dequantized tensor each).

#![forbid(unsafe_code)]

pub mod calibrate;
mod convert;
mod error;
pub mod eval;
mod files;
mod finite;
mod gguf;
pub mod inspect;
mod layout;
pub mod mix;
mod model_card;
mod output;
pub mod permute;
pub mod plan;
mod pool;
mod progress;
pub mod quantize;
mod report;
mod sink;
mod source;
mod staging;
pub mod study;
mod text_tokenizer;

pub use convert::{Options, convert, default_output};
pub use error::ConvertError;
pub use progress::{ConsoleProgress, Progress};
pub use report::{Report, TensorReport, Totals};
pub use source::SourceTensor;
pub use text_tokenizer::{TextTokenizer, TokenizerError};
