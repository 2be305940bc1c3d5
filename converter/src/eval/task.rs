//! Multiple-choice tasks: the answer whose text is the likeliest wins, as in EleutherAI's lm-evaluation-harness.

use std::num::NonZeroUsize;
use std::path::Path;

use kernels::{Backend, KvCacheDtype};
use models::Model;
use serde::{Deserialize, Serialize};

use super::EvalError;
use super::runner::{Group, Runner};
use super::scores::score;
use crate::text_tokenizer::TextTokenizer;

/// A line of a task's file. PIQA and ARC have `question` and `choices`, HellaSwag `ctx` and `endings`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    Question { question: String, choices: Vec<String>, label: usize },
    Context { ctx: String, endings: Vec<String>, label: usize },
}

/// A question, tokenized.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Item {
    /// Prompt and answer, for each answer.
    sequences: Vec<Vec<u32>>,
    /// Position of the answers' first token.
    scored_from: usize,
    /// Characters of each answer.
    lengths: Vec<usize>,
    /// The right answer.
    label: usize,
}

/// The questions of a file, tokenized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    name: String,
    items: Vec<Item>,
}

impl Task {
    /// Reads a jsonl file, or its first `limit` lines: objects with `question` and `choices`, asked as
    /// `Question: …\nAnswer: …`, or with `ctx` and `endings`, which are continued; `label` is the right one, from 0.
    ///
    /// # Errors
    /// The file cannot be read, or a line is no such object.
    pub fn read(tokenizer: &TextTokenizer, path: &Path, limit: Option<usize>) -> Result<Self, EvalError> {
        let text = std::fs::read_to_string(path).map_err(EvalError::io(path))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let wrong =
            |line: usize, reason: String| EvalError::Task { path: path.to_owned(), line: line + 1, reason };
        let mut items = Vec::new();
        for (number, line) in lines.take(limit.unwrap_or(usize::MAX)) {
            let line: Line = serde_json::from_str(line).map_err(|error| {
                let shape = "question, choices, label or ctx, endings, label are expected";
                wrong(number, format!("{shape} ({error})"))
            })?;
            let (prompt, answers, label) = match line {
                Line::Question { question, choices, label } => {
                    (format!("Question: {question}\nAnswer:"), choices, label)
                }
                Line::Context { ctx, endings, label } => (ctx, endings, label),
            };
            if label >= answers.len() {
                return Err(wrong(number, format!("label is {label}, there are {} answers", answers.len())));
            }
            let item = Item::new(tokenizer, &prompt, &answers, label)?;
            items.push(item.ok_or_else(|| wrong(number, "the question or an answer is empty".to_owned()))?);
        }
        if items.is_empty() {
            return Err(wrong(0, "there are no questions".to_owned()));
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, items })
    }

    /// Name of the file, without its extension.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tokens of the longest question with an answer.
    pub(super) fn longest(&self) -> usize {
        self.tokens().map(<[u32]>::len).max().unwrap_or(0)
    }

    /// Every sequence of tokens.
    pub(super) fn tokens(&self) -> impl Iterator<Item = &[u32]> {
        self.items.iter().flat_map(|item| &item.sequences).map(Vec::as_slice)
    }
}

impl Item {
    /// `None` if the prompt or an answer has no tokens.
    fn new(
        tokenizer: &TextTokenizer,
        prompt: &str,
        answers: &[String],
        label: usize,
    ) -> Result<Option<Self>, EvalError> {
        let mut scored_from = tokenizer.encode(prompt)?.len();
        let mut sequences = Vec::with_capacity(answers.len());
        for answer in answers {
            let sequence = tokenizer.encode(&format!("{prompt} {answer}"))?;
            // A token across the border belongs to the answer.
            scored_from = scored_from.min(sequence.len().saturating_sub(1));
            sequences.push(sequence);
        }
        let lengths: Vec<_> = answers.iter().map(|answer| answer.chars().count()).collect();
        let complete = scored_from > 0 && !lengths.contains(&0);
        Ok(complete.then_some(Self { sequences, scored_from, lengths, label }))
    }

    /// The answer with the largest of `scores`; of equals, the first.
    fn best(scores: impl Iterator<Item = f64>) -> usize {
        let best = scores.enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best });
        best.map_or(0, |(index, _)| index)
    }
}

/// How a model answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskScore {
    /// Questions.
    pub items: usize,
    /// Share of questions whose likeliest answer is right.
    pub accuracy: f64,
    /// Its standard error.
    pub accuracy_stderr: f64,
    /// Share of questions whose answer with the largest log-likelihood per character is right.
    pub accuracy_normalized: f64,
    /// Its standard error.
    pub accuracy_normalized_stderr: f64,
    /// Chosen by log-likelihood per character, for each question.
    #[serde(skip)]
    pub answers: Vec<usize>,
}

/// Lets a loaded model answer the questions of `task`.
///
/// # Errors
/// Out of memory, or a KV cache that the device does not have.
///
/// # Panics
/// A token is beyond the model's vocabulary, or a question longer than its context.
pub fn answer(
    backend: &dyn Backend,
    model: &dyn Model,
    task: &Task,
    kv_cache: KvCacheDtype,
    threads: NonZeroUsize,
) -> kernels::Result<TaskScore> {
    let groups: Vec<_> = (task.items.iter())
        .map(|item| Group {
            sequences: item.sequences.iter().map(Vec::as_slice).collect(),
            scored_from: item.scored_from,
        })
        .collect();
    let mut log_likelihoods = vec![0.0; task.tokens().count()];
    Runner::new(backend, model, kv_cache, &groups)?.run(&groups, &mut |chunk| {
        for (scored, score) in chunk.scored.iter().zip(score(chunk, None, threads)) {
            log_likelihoods[scored.sequence] -= score.nll;
        }
    });

    let (mut right, mut right_normalized, mut answers) = (0, 0, Vec::with_capacity(task.items.len()));
    let mut rest = log_likelihoods.as_slice();
    for item in &task.items {
        let (scores, others) = rest.split_at(item.sequences.len());
        rest = others;
        right += usize::from(Item::best(scores.iter().copied()) == item.label);
        let per_character = scores.iter().zip(&item.lengths).map(|(score, &length)| score / length as f64);
        let answer = Item::best(per_character);
        right_normalized += usize::from(answer == item.label);
        answers.push(answer);
    }
    let items = task.items.len();
    let (accuracy, accuracy_stderr) = share(right, items);
    let (accuracy_normalized, accuracy_normalized_stderr) = share(right_normalized, items);
    Ok(TaskScore {
        items,
        accuracy,
        accuracy_stderr,
        accuracy_normalized,
        accuracy_normalized_stderr,
        answers,
    })
}

/// `part / all` and its standard error.
fn share(part: usize, all: usize) -> (f64, f64) {
    let p = part as f64 / all as f64;
    (p, (p * (1.0 - p) / all.saturating_sub(1).max(1) as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> TextTokenizer {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/rustdoc-6m");
        TextTokenizer::open(Path::new(folder)).unwrap()
    }

    fn read(lines: &str, limit: Option<usize>) -> Result<Task, EvalError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some_task.jsonl");
        std::fs::write(&path, lines).unwrap();
        Task::read(&tokenizer(), &path, limit)
    }

    #[test]
    fn both_kinds_of_lines_are_read() {
        let lines = "{\"id\": 1, \"question\": \"Why?\", \"choices\": [\"Because\", \"So that\"], \"label\": 1}\n\n\
                     {\"ctx\": \"A vector\", \"endings\": [\"is empty.\", \"is full.\", \"é\"], \"label\": 0}\n";
        let task = read(lines, None).unwrap();
        assert_eq!((task.name(), task.items.len()), ("some_task", 2));
        let tokenizer = tokenizer();
        let first = &task.items[0];
        assert_eq!(first.sequences[1], tokenizer.encode("Question: Why?\nAnswer: So that").unwrap());
        assert_eq!(first.scored_from, tokenizer.encode("Question: Why?\nAnswer:").unwrap().len());
        assert_eq!((first.label, first.lengths.as_slice()), (1, &[7, 7][..]));
        assert_eq!(task.items[1].sequences[0], tokenizer.encode("A vector is empty.").unwrap());
        assert_eq!(task.items[1].lengths, [9, 8, 1]);
        assert_eq!(read(lines, Some(1)).unwrap().items.len(), 1);
    }

    #[test]
    fn lines_that_are_no_questions_are_refused_with_their_number() {
        let good = "{\"question\": \"Why?\", \"choices\": [\"a\", \"b\"], \"label\": 1}\n";
        for (bad, part) in [
            ("{\"question\": \"Why?\", \"label\": 0}", "choices"),
            ("{\"question\": \"Why?\", \"choices\": [\"a\"], \"label\": 1}", "label is 1"),
            ("{\"ctx\": \"\", \"endings\": [\"a\", \"b\"], \"label\": 0}", "empty"),
            ("{\"ctx\": \"Once\", \"endings\": [\"a\", \"\"], \"label\": 0}", "empty"),
            ("nonsense", "expected"),
        ] {
            let error = read(&format!("{good}{bad}"), None).unwrap_err().to_string();
            assert!(error.contains("some_task.jsonl, line 2") && error.contains(part), "{error}");
        }
        assert!(read("", None).unwrap_err().to_string().contains("no questions"));
    }

    #[test]
    fn shares_have_the_error_of_a_binomial() {
        assert_eq!(share(5, 10), (0.5, (0.25_f64 / 9.0).sqrt()));
        assert_eq!(share(1, 1), (1.0, 0.0));
    }
}
