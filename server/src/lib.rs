//! `mxserve`: serves models in MX formats over an OpenAI-style HTTP API.

#![forbid(unsafe_code)]

pub mod answer;
pub mod bench;
pub mod check_config;
pub mod cli;
pub mod demo;
mod device;
pub mod engine;
pub mod grammar;
pub mod http;
pub mod model;
pub mod net;
mod reload;
mod secrets;
pub mod serve;
mod startup;
pub mod telemetry;
pub mod tokenizer;
