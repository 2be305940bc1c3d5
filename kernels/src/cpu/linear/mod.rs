//! Matrix products of packed weights.
//!
//! There are two definitions, and for output n of row m they differ in a block's sum s alone:
//!
//! ```text
//! total = 0
//! for each block b of 32 along K:
//!     total = fma(s, 2^e(n, b), total)              dense weights: total = total + s
//! out = total + bias[n]
//! ```
//!
//! - [`float`]: `s = 0; for k in the block, in order: s = fma(w[n, k], x[m, k], s)` in F32.
//! - [`integer`]: s is the exact sum of `w[n, k] * x[m, k]`, rounded to F32 once. It serves weights whose elements are
//!   integers times a power of two, and activations that are integers times a power of two per block: the declared MX
//!   format's own ones, or else the [16-bit block fixed point](image) that they are rounded to.
//!
//! So a result depends neither on M, nor on the split of the work, nor on the instruction set.

mod codec;
mod float;
mod image;
mod integer;
mod rotation;
mod tile;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) use self::codec::IntegerCodec;
use self::image::{PLANE_WORDS, QuantizeTile, Quantizer, Rows};
use self::integer::Panels;
pub(crate) use self::rotation::rotate;
use super::memory::{Line, Scratch};
use super::packed::{BLOCK, PackedWeight};
use super::pool::{DisjointSlices, Pool};
use super::simd::{LANES, Lanes};
use crate::buffer::MemoryAccount;
use crate::isa::Isa;
use crate::mx::{Cast, quantize_dequantize};

/// Elements below which a parallel region to quantize them is not worth it.
const SERIAL_ELEMENTS: usize = 16 * 1024;

/// Where a product's result goes: N columns from `column` of rows of `width`.
#[derive(Clone, Copy)]
pub(crate) struct OutColumns {
    pub(crate) width: usize,
    pub(crate) column: usize,
}

/// Where the results of one call go, and what is added to them.
#[derive(Clone, Copy)]
struct Output<'a> {
    /// `[tokens, stride]`, at the first of the N columns.
    start: *mut f32,
    stride: usize,
    /// N.
    rows: usize,
    bias: Option<&'a [f32]>,
}

// SAFETY: tasks write disjoint elements.
unsafe impl Sync for Output<'_> {}

impl Output<'_> {
    /// Adds the bias and writes the lanes of `group` that are rows of the weight.
    ///
    /// # Safety
    /// As [`Lanes`]; the group and token are inside the result, and this thread's alone.
    #[inline(always)]
    unsafe fn write<L: Lanes>(&self, group: usize, token: usize, total: L) {
        let first = group * LANES;
        let lanes = (self.rows - first).min(LANES);
        // SAFETY: `lanes` columns from `first` belong to this group.
        unsafe {
            let out = self.start.add(token * self.stride + first);
            let total = match self.bias {
                None => total,
                Some(bias) if lanes == LANES => total.add(L::load(bias.as_ptr().add(first))),
                Some(bias) => {
                    let mut last = [0.0; LANES];
                    last[..lanes].copy_from_slice(&bias[first..]);
                    total.add(L::load(last.as_ptr()))
                }
            };
            if lanes == LANES {
                total.store(out);
            } else {
                out.copy_from_nonoverlapping(total.to_array().as_ptr(), lanes);
            }
        }
    }
}

/// One task: row groups x tokens.
#[derive(Debug, Clone)]
struct Part {
    groups: Range<usize>,
    tokens: Range<usize>,
}

/// How a product is cut into tasks: the same number of row groups in each, and of tokens.
struct Split {
    groups: usize,
    groups_per_task: usize,
    tokens: usize,
    tokens_per_task: usize,
}

impl Split {
    /// Row groups that a task has at least, for its memory to be read in long runs.
    const GROUPS: usize = 6;
    /// Tokens that a task has at least, so that decoding its weights again does not count.
    const TOKENS: usize = 60;

    /// Tasks of about [`Self::GROUPS`] row groups, in a number that all threads share equally; a thread that another
    /// process delays leaves its tasks to the others. Where that gives too few tasks, tokens are cut too, at multiples of
    /// `tile` that leave no remainder smaller than that.
    fn new(weight: &PackedWeight, tokens: usize, tile: usize, threads: usize, panel_groups: usize) -> Self {
        let groups = weight.groups();
        let rounds = (groups as f64 / (threads * Self::GROUPS) as f64).round().max(1.0) as usize;
        let groups_per_task = groups.div_ceil(threads * rounds).max(1).next_multiple_of(panel_groups);
        let chunks =
            (2 * threads).div_ceil(groups.div_ceil(groups_per_task)).min(tokens / Self::TOKENS).max(1);
        let tokens_per_task = if threads == 1 { tokens } else { tokens.div_ceil(chunks) };
        Self { groups, groups_per_task, tokens, tokens_per_task: tokens_per_task.next_multiple_of(tile) }
    }

    fn token_chunks(&self) -> usize {
        // What is left over at the end goes to the last whole chunk.
        (self.tokens / self.tokens_per_task).max(1)
    }

    /// Tokens of the largest task.
    fn largest_part_tokens(&self) -> usize {
        self.part(self.token_chunks() - 1).tokens.len()
    }

    fn tasks(&self) -> usize {
        self.groups.div_ceil(self.groups_per_task) * self.token_chunks()
    }

    fn part(&self, task: usize) -> Part {
        let chunks = self.token_chunks();
        let (from, chunk) = (task / chunks * self.groups_per_task, task % chunks);
        let start = chunk * self.tokens_per_task;
        let end = if chunk + 1 == chunks { self.tokens } else { start + self.tokens_per_task };
        Part { groups: from..(from + self.groups_per_task).min(self.groups), tokens: start..end }
    }
}

/// Scratch of [`linear`].
pub(crate) struct LinearScratch {
    /// Decoded weights and totals, per thread.
    panels: Scratch<Line>,
    /// Integer activations.
    image: Scratch<i32>,
    /// Activations quantized as declared or padded to whole blocks.
    input: Scratch,
}

impl LinearScratch {
    /// Empty scratch whose size is charged to `memory`.
    pub(crate) fn new(memory: &Arc<MemoryAccount>) -> Self {
        Self { panels: Scratch::new(memory), image: Scratch::new(memory), input: Scratch::new(memory) }
    }
}

/// A product to compute: `out[m, column + n] = sum_k act(x[m])[k] * weight[n, k] + bias[n]`.
pub(crate) struct Product<'a> {
    pub(crate) weight: &'a PackedWeight,
    pub(crate) bias: Option<&'a [f32]>,
    /// How activations are quantized first.
    pub(crate) activation: Option<Cast>,
    /// `[tokens, K]`.
    pub(crate) x: &'a [f32],
    pub(crate) tokens: usize,
    pub(crate) columns: OutColumns,
}

/// Computes `product` into `out`.
///
/// # Panics
/// A slice is too short.
pub(crate) fn linear(
    isa: Isa,
    pool: &mut Pool,
    scratch: &mut LinearScratch,
    product: &Product<'_>,
    out: &mut [f32],
) {
    let Product { weight, bias, tokens, columns: OutColumns { width, column }, .. } = *product;
    if tokens == 0 {
        return;
    }
    assert!(product.x.len() >= tokens * weight.shape[1], "x holds the rows");
    assert!(column + weight.shape[0] <= width && out.len() >= tokens * width, "out holds the result");
    assert!(bias.is_none_or(|bias| bias.len() == weight.shape[0]), "one bias per output");
    // SAFETY: inside `out`, as asserted.
    let start = unsafe { out.as_mut_ptr().add(column) };
    let out = Output { start, stride: width, rows: weight.shape[0], bias };
    match &weight.integer {
        Some(codec) => integer_product(isa, pool, scratch, product, codec, out),
        None => float_product(isa, pool, scratch, product, out),
    }
}

/// Cache lines of this many floats.
const fn lines(floats: usize) -> usize {
    floats.div_ceil(size_of::<Line>() / size_of::<f32>())
}

fn float_product(
    isa: Isa,
    pool: &mut Pool,
    scratch: &mut LinearScratch,
    product: &Product<'_>,
    out: Output<'_>,
) {
    let Product { weight, activation, tokens, .. } = *product;
    let cols = weight.shape[1];
    let padded = cols.next_multiple_of(BLOCK);
    let (x, x_stride) = if activation.is_none() && padded == cols {
        (product.x, cols)
    } else {
        let input = scratch.input.take(tokens * padded);
        let pieces = DisjointSlices::new(input, padded);
        pool.run(tokens, &|m, _| {
            // SAFETY: each row is taken once.
            let row = unsafe { pieces.slice(m) };
            let source = &product.x[m * cols..][..cols];
            match activation {
                Some(cast) => quantize_dequantize(cast, source, &mut row[..cols]),
                None => row[..cols].copy_from_slice(source),
            }
            row[cols..].fill(0.0);
        });
        (&*input, padded)
    };
    let problem = float::Problem { weight, x: x.as_ptr(), x_stride, out };
    let per_thread = lines(float::scratch_floats(tokens));
    let pieces = DisjointSlices::new(scratch.panels.take(per_thread * pool.threads()), per_thread);
    let split = Split::new(weight, tokens, float::TILE_TOKENS, pool.threads(), float::panel_groups(tokens));
    pool.run(split.tasks(), &|task, thread| {
        // SAFETY: one piece per thread; the part is this task's alone; `isa` is available.
        unsafe { float::run_on(isa, &problem, &split.part(task), pieces.slice(thread).as_mut_ptr().cast()) };
    });
}

fn integer_product(
    isa: Isa,
    pool: &mut Pool,
    scratch: &mut LinearScratch,
    product: &Product<'_>,
    codec: &IntegerCodec,
    out: Output<'_>,
) {
    let Product { weight, tokens, .. } = *product;
    let blocks = weight.blocks();
    // SAFETY: `isa` is available.
    let shape = unsafe { isa.dot(integer::FindShape(codec)) };
    let quantizer = Quantizer::new(codec, shape.offset);
    // As few tiles as there can be, of equal size.
    let tile_tokens = tokens.div_ceil(tokens.div_ceil(shape.max_tile_tokens));
    let image = scratch.image.take(tokens * blocks * codec.planes() * PLANE_WORDS);
    let cast = product.activation.filter(|_| codec.planes() > 1);
    let narrow = make_image(
        isa,
        pool,
        &mut scratch.input,
        &quantizer,
        codec.planes(),
        product,
        cast,
        tile_tokens,
        image,
    );

    let problem = integer::Problem { weight, codec, image: image.as_ptr(), tile_tokens, narrow, out };
    let split = Split::new(weight, tokens, tile_tokens, pool.threads(), 1);
    let panels =
        Panels::new(weight, codec.planes(), tile_tokens, split.groups_per_task, split.largest_part_tokens());
    let per_thread = panels.as_ref().map_or(0, Panels::bytes).div_ceil(size_of::<Line>());
    let memory = DisjointSlices::new(scratch.panels.take(per_thread * pool.threads()), per_thread);
    pool.run(split.tasks(), &|task, thread| {
        // SAFETY: one piece per thread.
        let memory = unsafe { memory.slice(thread) }.as_mut_ptr().cast();
        let panels = panels.as_ref().map(|panels| (panels, memory));
        // SAFETY: the part is this task's alone; `isa` is available.
        unsafe { isa.dot(integer::Task { problem: &problem, part: split.part(task), panels }) };
    });
}

/// Writes the image of `product`'s activations, quantized to `cast` first, in tiles of `tile_tokens` tokens; returns
/// whether all of its units are [`NARROW_UNITS`](image::NARROW_UNITS).
#[allow(clippy::too_many_arguments, reason = "what an image is made of")]
fn make_image(
    isa: Isa,
    pool: &mut Pool,
    input: &mut Scratch,
    quantizer: &Quantizer,
    planes: usize,
    product: &Product<'_>,
    cast: Option<Cast>,
    tile_tokens: usize,
    image: &mut [i32],
) -> bool {
    let Product { weight, x, tokens, .. } = *product;
    let (cols, blocks) = (weight.shape[1], weight.blocks());
    let x = match cast {
        None => x,
        Some(cast) => {
            let input = input.take(tokens * cols);
            let pieces = DisjointSlices::new(input, cols);
            pool.run(tokens, &|m, _| {
                // SAFETY: each row is taken once.
                quantize_dequantize(cast, &x[m * cols..][..cols], unsafe { pieces.slice(m) });
            });
            &*input
        }
    };
    let token_words = blocks * planes * PLANE_WORDS;
    let words = DisjointSlices::new(image, token_words);
    let narrow = AtomicBool::new(true);
    let make = |tile: usize| {
        let token = tile * tile_tokens;
        let rows = Rows {
            start: x[token * cols..].as_ptr(),
            stride: cols,
            tokens: tile_tokens.min(tokens - token),
            blocks,
        };
        // SAFETY: the rows are inside `x`, and their image follows those of the tokens before; each tile is made once;
        // `isa` is available.
        let tile = QuantizeTile { quantizer, x: rows, image: unsafe { words.slice(token) }.as_mut_ptr() };
        // SAFETY: as above.
        if !unsafe { isa.dot(tile) } {
            narrow.store(false, Ordering::Relaxed);
        }
    };
    let tiles = tokens.div_ceil(tile_tokens);
    if tokens * cols < SERIAL_ELEMENTS {
        (0..tiles).for_each(make);
    } else {
        pool.run(tiles, &|tile, _| make(tile));
    }
    narrow.into_inner()
}
