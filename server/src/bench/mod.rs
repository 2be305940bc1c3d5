//! `mxserve bench`: how fast a model runs. Offline it measures whole steps on a device, in the protocol of llama.cpp's
//! `llama-bench`; with `--url` it measures a server over HTTP.

mod args;
mod http;
mod measure;
mod offline;
mod plan;
mod report;
mod statistics;

use std::io;

pub use args::BenchArgs;
pub use http::HttpBenchError;
pub use offline::OfflineBenchError;

use self::args::Mode;

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The flags contradict each other.
    #[error("{0}")]
    Arguments(String),
    /// A model on a device.
    #[error(transparent)]
    Offline(#[from] OfflineBenchError),
    /// A server.
    #[error(transparent)]
    Http(#[from] HttpBenchError),
    /// The results cannot be written.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

/// Measures what `args` ask for, and writes the results to standard output as they come.
///
/// # Errors
/// See [`BenchError`].
pub fn run(args: BenchArgs) -> Result<(), BenchError> {
    let format = args.output;
    match args.mode()? {
        Mode::Offline(bench) => offline::run(&bench, format, &mut io::stdout()),
        Mode::Http(bench) => http::run(&bench, format, &mut io::stdout()),
    }
}

#[cfg(test)]
mod tests;
