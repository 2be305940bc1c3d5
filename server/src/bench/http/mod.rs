//! Measures an OpenAI-style server over HTTP: so many streams at a time, each request as soon as the one before it on
//! its stream has ended.

mod client;
mod prompts;
mod report;

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::BenchError;
use super::args::{HttpBench, OutputFormat};

use client::Client;
pub use client::HttpBenchError;

/// Measures, and writes the result.
pub(super) fn run(bench: &HttpBench, format: OutputFormat, out: &mut dyn Write) -> Result<(), BenchError> {
    // One thread: what the client uses is missing on the server's side where both share a machine.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (answers, total) = runtime.block_on(load(bench))?;
    report::write(bench, &answers, total, format, out)?;
    Ok(())
}

/// When the tokens of one answer came, and how many there were.
#[derive(Debug, Clone, PartialEq)]
struct Answer {
    /// From sending the request to each piece of text.
    arrivals: Vec<Duration>,
    prompt_tokens: usize,
    /// Those of the prompt that the server had computed before; `None` if it does not say.
    cached_tokens: Option<usize>,
    completion_tokens: usize,
}

/// Sends all requests; returns the answers, and the time from the first request to the last answer.
async fn load(bench: &HttpBench) -> Result<(Vec<Answer>, Duration), HttpBenchError> {
    let client = Client::connect(bench).await?;
    let prompts = prompts::prompts(bench.seed, bench.requests, bench.input_words);
    let next = AtomicUsize::new(0);
    let start = Instant::now();
    let stream = async || {
        let mut answers = Vec::new();
        while let Some(prompt) = prompts.get(next.fetch_add(1, Ordering::Relaxed)) {
            answers.push(client.complete(prompt, bench.output_tokens).await?);
        }
        Ok::<_, HttpBenchError>(answers)
    };
    let streams = (0..bench.concurrency).map(|_| stream());
    let answers = futures::future::try_join_all(streams).await?;
    Ok((answers.into_iter().flatten().collect(), start.elapsed()))
}
