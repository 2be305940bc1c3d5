//! Which rows go over which positions together, and in which tasks.

use std::ops::Range;
use std::sync::atomic::AtomicU32;

use super::Step;
use super::kernel::RANGE_TOKENS;

/// Query rows, of the heads that share a KV head, that go over the keys and values together.
const TILE_ROWS: usize = 48;

/// Tasks per thread below which tasks are cut into ranges.
const TASKS_PER_THREAD: usize = 4;

/// Rows of one sequence and one KV head, over some ranges of positions.
#[derive(Debug, Clone)]
pub(super) struct Task {
    pub(super) sequence: usize,
    pub(super) head: usize,
    /// Rows of the step, one a token.
    pub(super) rows: Range<usize>,
    /// Ranges of positions.
    pub(super) ranges: Range<usize>,
    /// Where its partial result goes; `None` if it has all ranges.
    pub(super) part: Option<Part>,
}

/// One of several tasks with the same rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    /// Which of the counters of unfinished tasks is theirs.
    pub(super) counter: usize,
    /// First and number of their partial results, and which one is its own.
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) own: usize,
}

impl Step<'_> {
    /// Lists the tasks; returns the number of partial results.
    pub(super) fn plan(
        &self,
        threads: usize,
        tasks: &mut Vec<Task>,
        unfinished: &mut Vec<AtomicU32>,
    ) -> usize {
        let heads = self.cache.layout.heads;
        let tile_tokens = (TILE_ROWS / (heads.q / heads.kv)).max(1);
        tasks.clear();
        unfinished.clear();
        for (sequence, bounds) in self.query_start.windows(2).enumerate() {
            let (first, last) = (bounds[0] as usize, bounds[1] as usize);
            // Later rows see more: the long tasks come first.
            for start in (first..last).step_by(tile_tokens).rev() {
                let rows = start..(start + tile_tokens).min(last);
                let seen = self.seen(sequence, &rows);
                let ranges = seen.start / RANGE_TOKENS..seen.end.div_ceil(RANGE_TOKENS);
                tasks.extend((0..heads.kv).map(|head| Task {
                    sequence,
                    head,
                    rows: rows.clone(),
                    ranges: ranges.clone(),
                    part: None,
                }));
            }
        }
        if threads == 1 || tasks.len() >= TASKS_PER_THREAD * threads {
            return 0;
        }
        let (mut partials, whole) = (0, tasks.len());
        for index in 0..whole {
            let task = tasks[index].clone();
            let count = task.ranges.len();
            if count > 1 {
                let parts = task.ranges.clone().enumerate().map(|(own, range)| Task {
                    ranges: range..range + 1,
                    part: Some(Part { counter: unfinished.len(), first: partials, count, own }),
                    ..task.clone()
                });
                let mut parts: Vec<_> = parts.collect();
                tasks[index] = parts.swap_remove(0);
                tasks.extend(parts);
                unfinished.push(AtomicU32::new(count as u32));
                partials += count;
            }
        }
        partials
    }

    /// Positions that some of `rows` of `sequence` see.
    pub(super) fn seen(&self, sequence: usize, rows: &Range<usize>) -> Range<usize> {
        let end = self.query_start[sequence + 1] as usize;
        let context = self.context_lens[sequence] as usize;
        let (first, last) = (context + rows.start + 1 - end, context + rows.end - end);
        self.window.map_or(0, |window| first.saturating_sub(window))..last
    }
}
