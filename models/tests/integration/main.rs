//! Whole models on the CPU backend, and on a GPU held to it.

mod common;
mod cuda;
mod loading;
mod logits;
mod perplexity;
mod quantized;
