//! The converter from outside: its library and its program, on files.

#![forbid(unsafe_code)]

mod calibrated;
mod command;
mod common;
mod eval;
mod gguf;
mod inputs;
mod mix;
mod permutation;
mod perplexity;
mod rotation;
mod round_trip;
mod study;
