//! The workers that write the tensors of a plan: hashes of the source's files and pieces of its tensors, in the order of
//! the files.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use kernels::mx::Energy;

use super::piece::Scratch;
use crate::calibrate::CalibratedModules;
use crate::error::ConvertError;
use crate::files;
use crate::output::Output;
use crate::plan::Plan;
use crate::progress::Progress;
use crate::quantize::DirectCast;
use crate::sink::Sink;
use crate::source::Source;

/// Everything the workers share.
pub(super) struct Job<'a> {
    pub(super) source: &'a Source,
    pub(super) plan: &'a Plan,
    pub(super) output: &'a Output,
    pub(super) sink: &'a Sink,
    pub(super) direct: &'a DirectCast,
    /// Weights that it holds come from there.
    pub(super) calibrated: Option<&'a CalibratedModules>,
    pub(super) progress: &'a dyn Progress,
}

/// What the workers found out.
pub(super) struct Outcome {
    /// By planned tensor.
    pub(super) energies: Vec<Energy>,
    /// Name and digest of each weight file.
    pub(super) sha256: Vec<(String, String)>,
}

/// A unit of work.
enum Task {
    /// SHA-256 of a weight file.
    Hash(usize),
    /// A byte range of a planned tensor's source.
    Piece { tensor: usize, range: Range<u64> },
}

/// What a task yields.
enum Done {
    Hash(String),
    Piece(Energy),
}

impl Job<'_> {
    /// Runs all tasks; the first error, in task order, stops the workers.
    pub(super) fn run(&self, threads: NonZeroUsize) -> Result<Outcome, ConvertError> {
        let files = self.source.weight_files();
        let tasks = self.tasks()?;
        let total = self.plan.tensors.iter().map(|t| self.source.tensors()[t.source].bytes()).sum();
        self.progress.begin(total);

        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let results: Mutex<Vec<(usize, Result<Done, ConvertError>)>> = Mutex::new(Vec::new());
        let work = || {
            let mut scratch = Scratch::default();
            let mut done = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(task) = tasks.get(index) else { break };
                let result = match task {
                    Task::Hash(file) => files::sha256(&files[*file], &stop).map(Done::Hash),
                    Task::Piece { tensor, range } => {
                        self.piece(*tensor, range, &mut scratch).map(Done::Piece)
                    }
                };
                stop.fetch_or(result.is_err(), Ordering::Relaxed);
                done.push((index, result));
            }
            results.lock().unwrap_or_else(PoisonError::into_inner).append(&mut done);
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.get().min(tasks.len()) {
                scope.spawn(work);
            }
            work();
        });

        let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        results.sort_by_key(|(index, _)| *index);
        let mut outcome =
            Outcome { energies: vec![Energy::default(); self.plan.tensors.len()], sha256: Vec::new() };
        for (index, result) in results {
            match (&tasks[index], result?) {
                (Task::Piece { tensor, .. }, Done::Piece(energy)) => outcome.energies[*tensor] += energy,
                (Task::Hash(file), Done::Hash(digest)) => {
                    let name = files[*file].file_name().unwrap_or_default().to_string_lossy().into_owned();
                    outcome.sha256.push((name, digest));
                }
                (Task::Piece { .. }, Done::Hash(_)) | (Task::Hash(_), Done::Piece(_)) => {
                    unreachable!("a task yields its own kind of result")
                }
            }
        }
        Ok(outcome)
    }

    /// Each file's hash just before its tensors: whoever comes second finds the bytes in the page cache.
    fn tasks(&self) -> Result<Vec<Task>, ConvertError> {
        let mut tasks = Vec::new();
        let mut hashed = 0;
        for (tensor, planned) in self.plan.tensors.iter().enumerate() {
            let source = &self.source.tensors()[planned.source];
            let file = self.source.file_of(source)?;
            while hashed <= file {
                tasks.push(Task::Hash(hashed));
                hashed += 1;
            }
            let pieces = self.source.pieces(source);
            tasks.extend(pieces.into_iter().map(|range| Task::Piece { tensor, range }));
        }
        tasks.extend((hashed..self.source.weight_files().len()).map(Task::Hash));
        Ok(tasks)
    }
}
