//! What an evaluation found, as tables and as JSON.

use std::fmt;

use serde::Serialize;

use super::table::table;
use super::{Divergence, Perplexity, TaskScore};

/// Checkpoints side by side.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    /// Windows of each text, from its beginning.
    pub windows: usize,
    /// Tokens of a window.
    pub window_tokens: usize,
    /// The checkpoint that the others are compared with.
    pub baseline: Option<String>,
    /// Every checkpoint in every configuration; the baseline comes first.
    pub models: Vec<ModelResult>,
}

/// One checkpoint in one configuration.
#[derive(Debug, Clone, Serialize)]
pub struct ModelResult {
    /// The folder, as given.
    pub checkpoint: String,
    /// What its linear layers run in: `mxfp4:mxfp6_e2m3`, or `unquantized`; several are joined by ` + `.
    pub format: String,
    /// How keys and values are stored.
    pub kv_cache: &'static str,
    /// Stored bits per weight of the linear layers, scales included.
    pub bits_per_weight: f64,
    /// Wall-clock seconds of all measurements.
    pub seconds: f64,
    /// By text.
    pub texts: Vec<TextResult>,
    /// By task.
    pub tasks: Vec<TaskResult>,
}

/// One text.
#[derive(Debug, Clone, Serialize)]
pub struct TextResult {
    /// Name of the file.
    pub text: String,
    /// Perplexity and its parts.
    #[serde(flatten)]
    pub perplexity: Perplexity,
    /// From the baseline; absent without one, and for itself.
    pub divergence: Option<Divergence>,
}

/// One task.
#[derive(Debug, Clone, Serialize)]
pub struct TaskResult {
    /// Name of the file, without its extension.
    pub task: String,
    /// Accuracies.
    #[serde(flatten)]
    pub score: TaskScore,
    /// Share of questions with the baseline's answer (by log-likelihood per character).
    pub same_answers: Option<f64>,
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self.models.first() else { return Ok(()) };
        let mut tables = Vec::new();
        for (index, text) in first.texts.iter().enumerate() {
            let heading = format!(
                "{}: {} windows of {} tokens, {} scored",
                text.text, self.windows, self.window_tokens, text.perplexity.tokens
            );
            tables.push(format!("{heading}\n{}", self.text_table(index)));
        }
        for (index, task) in first.tasks.iter().enumerate() {
            tables.push(format!("{}: {} questions\n{}", task.task, task.score.items, self.task_table(index)));
        }
        f.write_str(tables.join("\n").trim_end())
    }
}

impl Evaluation {
    /// Perplexities and distances of text `index`.
    fn text_table(&self, index: usize) -> String {
        let baseline = self.baseline_model().map(|model| model.texts[index].perplexity.perplexity);
        let rows: Vec<_> = (self.models.iter())
            .map(|model| {
                let text = &model.texts[index];
                let perplexity = &text.perplexity;
                let divergence = text.divergence.as_ref();
                let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.4}"));
                let change = baseline.filter(|_| divergence.is_some()).map_or_else(
                    || "-".to_owned(),
                    |baseline| format!("{:+.2} %", 100.0 * (perplexity.perplexity / baseline - 1.0)),
                );
                let mut row = model.name();
                row.extend([
                    format!("{:.4}", perplexity.perplexity),
                    change,
                    format!("{:.4}", perplexity.perplexity_second_half),
                    number(divergence.map(|d| d.kl_mean)),
                    number(divergence.map(|d| d.kl_99th_percentile)),
                    percent(divergence.map(|d| d.top1_agreement)),
                ]);
                row
            })
            .collect();
        let header =
            [NAME.as_slice(), &["perplexity", "change", "2nd half", "KL mean", "KL 99 %", "same top-1"]];
        table(&header.concat(), 3, &rows)
    }

    /// Accuracies of task `index`.
    fn task_table(&self, index: usize) -> String {
        let rows: Vec<_> = (self.models.iter())
            .map(|model| {
                let TaskResult { score, same_answers, .. } = &model.tasks[index];
                let with_error = |p: f64, e: f64| format!("{:.1} ± {:.1} %", 100.0 * p, 100.0 * e);
                let mut row = model.name();
                row.extend([
                    with_error(score.accuracy, score.accuracy_stderr),
                    with_error(score.accuracy_normalized, score.accuracy_normalized_stderr),
                    percent(*same_answers),
                ]);
                row
            })
            .collect();
        table(&[NAME.as_slice(), &["accuracy", "normalized", "same answers"]].concat(), 3, &rows)
    }

    /// The baseline's row: the first one, if there is a baseline.
    pub fn baseline_model(&self) -> Option<&ModelResult> {
        self.baseline.as_ref().and_then(|_| self.models.first())
    }
}

/// Columns that say what was measured.
const NAME: [&str; 4] = ["checkpoint", "format", "KV cache", "bits/weight"];

impl ModelResult {
    /// Cells of [`NAME`].
    fn name(&self) -> Vec<String> {
        let bits = format!("{:.2}", self.bits_per_weight);
        vec![self.checkpoint.clone(), self.format.clone(), self.kv_cache.to_owned(), bits]
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", 100.0 * share))
}
