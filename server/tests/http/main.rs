//! The server over real TCP, with a real model on the CPU.

mod cancellation;
mod chat;
mod command_line;
mod completions;
mod errors;
mod metrics;
mod streaming;
mod support;
mod tokenizer;
