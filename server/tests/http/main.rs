//! The server over real TCP, with a real model on the CPU.

#![allow(clippy::needless_pass_by_value, reason = "bodies are written where they are sent")]

mod access_log;
mod bench;
mod cancellation;
mod chat;
mod command_line;
mod completions;
mod connections;
mod embeddings;
mod errors;
mod metrics;
mod openapi;
mod page;
mod process;
mod responses;
mod scheduling;
mod signals;
mod streaming;
mod structured_output;
mod support;
mod tls;
mod tokenizer;
mod tools;
mod traces;
