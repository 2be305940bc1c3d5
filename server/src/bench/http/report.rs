//! What the answers come to.

use std::io::{self, Write};
use std::time::Duration;

use serde_json::json;

use super::super::args::{HttpBench, OutputFormat};
use super::super::report::{Table, write_json};
use super::super::statistics::quantile;
use super::Answer;

/// Throughput and times.
#[derive(Debug, Clone, PartialEq)]
struct Summary {
    secs: f64,
    input_tokens: usize,
    /// Of `input_tokens`, those that the server had computed before; `None` if it does not say.
    cached_tokens: Option<usize>,
    output_tokens: usize,
    /// Seconds to the first piece of each answer.
    first: Vec<f64>,
    /// Seconds between pieces, over all answers.
    between: Vec<f64>,
}

impl Summary {
    fn of(answers: &[Answer], total: Duration) -> Self {
        let secs = |duration: &Duration| duration.as_secs_f64();
        let gaps = |answer: &Answer| {
            let pairs = answer.arrivals.windows(2);
            pairs.map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect::<Vec<_>>()
        };
        Self {
            secs: total.as_secs_f64(),
            input_tokens: answers.iter().map(|answer| answer.prompt_tokens).sum(),
            cached_tokens: answers.iter().map(|answer| answer.cached_tokens).sum(),
            output_tokens: answers.iter().map(|answer| answer.completion_tokens).sum(),
            first: answers.iter().filter_map(|answer| answer.arrivals.first().map(secs)).collect(),
            between: answers.iter().flat_map(gaps).collect(),
        }
    }

    fn output_per_sec(&self) -> f64 {
        self.output_tokens as f64 / self.secs
    }

    fn total_per_sec(&self) -> f64 {
        (self.input_tokens + self.output_tokens) as f64 / self.secs
    }
}

/// Writes the result.
pub(super) fn write(
    bench: &HttpBench,
    answers: &[Answer],
    total: Duration,
    format: OutputFormat,
    out: &mut dyn Write,
) -> io::Result<()> {
    let summary = Summary::of(answers, total);
    match format {
        OutputFormat::Md => table(bench, &summary, answers.len(), out),
        OutputFormat::Json => {
            let quantiles = |values: &[f64]| {
                json!({
                    "p50": quantile(values, 0.5),
                    "p90": quantile(values, 0.9),
                    "p99": quantile(values, 0.99),
                })
            };
            let record = json!({
                "url": bench.url.as_str(),
                "concurrency": bench.concurrency,
                "requests": answers.len(),
                "input_tokens": summary.input_tokens,
                "cached_tokens": summary.cached_tokens,
                "output_tokens": summary.output_tokens,
                "seconds": summary.secs,
                "output_tokens_per_sec": summary.output_per_sec(),
                "total_tokens_per_sec": summary.total_per_sec(),
                "time_to_first_token_secs": quantiles(&summary.first),
                "inter_token_secs": quantiles(&summary.between),
            });
            write_json(out, vec![record])
        }
    }
}

fn table(bench: &HttpBench, summary: &Summary, requests: usize, out: &mut dyn Write) -> io::Result<()> {
    let millis =
        |values: &[f64]| [0.5, 0.9, 0.99].map(|q| format!("{:.1}", quantile(values, q) * 1e3)).join(" / ");
    let columns = [
        "streams",
        "requests",
        "tokens in",
        "of these cached",
        "tokens out",
        "s",
        "out t/s",
        "in+out t/s",
        "first token ms (p50/p90/p99)",
        "between tokens ms (p50/p90/p99)",
    ];
    let cells = [
        bench.concurrency.to_string(),
        requests.to_string(),
        summary.input_tokens.to_string(),
        summary.cached_tokens.map_or_else(|| "unknown".to_owned(), |tokens| tokens.to_string()),
        summary.output_tokens.to_string(),
        format!("{:.2}", summary.secs),
        format!("{:.1}", summary.output_per_sec()),
        format!("{:.1}", summary.total_per_sec()),
        millis(&summary.first),
        millis(&summary.between),
    ];
    Table::new(&columns).row(out, &cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_times() {
        let ms = Duration::from_millis;
        let answer = |arrivals: &[u64], completion_tokens| Answer {
            arrivals: arrivals.iter().map(|&at| ms(at)).collect(),
            prompt_tokens: 10,
            cached_tokens: Some(4),
            completion_tokens,
        };
        let summary = Summary::of(&[answer(&[100, 110, 130], 3), answer(&[200], 1)], ms(500));
        assert_eq!((summary.output_per_sec(), summary.total_per_sec()), (8.0, 48.0));
        assert_eq!((summary.input_tokens, summary.cached_tokens), (20, Some(8)));
        assert_eq!(summary.first, [0.1, 0.2]);
        assert_eq!(summary.between.iter().map(|gap| (gap * 1e3).round()).collect::<Vec<_>>(), [10.0, 20.0]);
    }
}
