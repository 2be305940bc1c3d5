//! Whole models on the CPU backend.

mod common;
mod loading;
mod logits;
mod perplexity;
mod quantized;
