//! RoPE, the cache, and attention over it.

use std::iter::once;

use kernels::{
    AttentionInputs, Backend, Buffer, Dtype, HeadNorm, Heads, HostSpans, InputForm, KV_BLOCK_TOKENS,
    KvCacheDtype, PagedKv,
};

use crate::common::{
    Devices, Random, activations, assert_close, assert_same, floats, integers, poisoned, read,
};
use crate::forms::declaring;
use crate::prefill::multiply;

/// Sequences in a cache: how long they get, and where their blocks are.
struct Sequences {
    heads: Heads,
    window: Option<usize>,
    dtype: KvCacheDtype,
    tables: Vec<Vec<u32>>,
    blocks: usize,
    /// Rows of q, k and v of every position.
    qkv: Vec<Vec<f32>>,
}

/// Positions `from .. to` of a sequence.
#[derive(Clone, Copy)]
struct Part {
    sequence: usize,
    from: usize,
    to: usize,
}

impl Sequences {
    fn new(random: &mut Random, heads: Heads, window: Option<usize>, lens: &[usize]) -> Self {
        let counts: Vec<usize> = lens.iter().map(|len| len.div_ceil(KV_BLOCK_TOKENS)).collect();
        let blocks = counts.iter().sum::<usize>() + 2;
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        let mut take = || free.swap_remove(random.below(free.len()));
        let tables = counts.iter().map(|&count| (0..count).map(|_| take()).collect()).collect();
        let qkv = lens.iter().map(|len| random.bf16(len * heads.qkv_width(), 2.0)).collect();
        Self { heads, window, dtype: KvCacheDtype::Bf16, tables, blocks, qkv }
    }

    /// The same with another kind of cache.
    fn in_cache_of(self, dtype: KvCacheDtype) -> Self {
        Self { dtype, ..self }
    }

    /// A cache full of NaN, as memory that held anything may be.
    fn cache(&self, backend: &dyn Backend) -> PagedKv {
        let heads = self.heads;
        let mut cache = backend.alloc_kv(self.blocks, heads, self.dtype).expect("memory");
        let rows = self.blocks * KV_BLOCK_TOKENS;
        let mut qkv = activations(backend, &vec![f32::NAN; rows * heads.qkv_width()]);
        let rope = floats(backend, Dtype::F32, &vec![1.0; rows * heads.dim]);
        let slots = integers(backend, &(0..rows as u32).collect::<Vec<_>>());
        backend.rope_and_cache(&mut qkv, heads, &rope, None, &slots, rows, &mut cache);
        cache
    }

    /// One step of `parts`; their rows of the result, one part after the other.
    fn step(
        &self,
        backend: &dyn Backend,
        cache: &mut PagedKv,
        parts: &[Part],
        norm: Option<&[f32]>,
    ) -> Vec<f32> {
        read(backend, &self.step_to(backend, cache, parts, norm, InputForm::Plain))
    }

    /// As [`step`](Self::step), left in `form`.
    fn step_to(
        &self,
        backend: &dyn Backend,
        cache: &mut PagedKv,
        parts: &[Part],
        norm: Option<&[f32]>,
        form: InputForm,
    ) -> Buffer {
        let (heads, width) = (self.heads, self.heads.qkv_width());
        let max_blocks = self.tables.iter().map(Vec::len).max().unwrap_or(1) + 1;
        let (mut qkv, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        let (mut query_start, mut context_lens, mut tables) = (vec![0], Vec::new(), Vec::new());
        for &Part { sequence, from, to } in parts {
            qkv.extend_from_slice(&self.qkv[sequence][from * width..to * width]);
            for position in from..to {
                positions.push(position as u32);
                let block = self.tables[sequence][position / KV_BLOCK_TOKENS] as usize;
                slots.push((block * KV_BLOCK_TOKENS + position % KV_BLOCK_TOKENS) as u32);
            }
            query_start.push(positions.len() as u32);
            context_lens.push(to as u32);
            tables.extend_from_slice(&self.tables[sequence]);
            // Entries beyond the last block are never read.
            tables.resize(context_lens.len() * max_blocks, u32::MAX);
        }
        let rows = positions.len();
        let inv_freq: Vec<f32> = (0..heads.dim / 2).map(|i| 0.9_f32.powi(i as i32)).collect();
        let mut rope = floats(backend, Dtype::F32, &vec![f32::NAN; rows * heads.dim]);
        let inv_freq = floats(backend, Dtype::F32, &inv_freq);
        backend.rope_table(&integers(backend, &positions), &inv_freq, 1.0, rows, &mut rope);
        let mut qkv = activations(backend, &qkv);
        let weights = norm.map(|weights| floats(backend, Dtype::F32, weights));
        let norm = weights.as_ref().map(|weights| HeadNorm { q: weights, k: weights, eps: 1e-6 });
        backend.rope_and_cache(&mut qkv, heads, &rope, norm, &integers(backend, &slots), rows, cache);
        let mut out = poisoned(backend, rows * heads.q_width());
        let inputs = AttentionInputs {
            rows,
            sequences: parts.len(),
            query_start: &integers(backend, &query_start),
            context_lens: &integers(backend, &context_lens),
            block_tables: &integers(backend, &tables),
            max_blocks,
            host: HostSpans { query_start: &query_start, context_lens: &context_lens },
        };
        let scale = (heads.dim as f32).sqrt().recip();
        backend.paged_attention(&qkv, heads, scale, self.window, &inputs, cache, form, &mut out);
        out
    }
}

/// Weights are rounded to BF16, and so are results; values are below 2. A key that rotation leaves within the last bit
/// of the border of two codes may become either of them.
fn error_bound(dtype: KvCacheDtype) -> f32 {
    match dtype {
        KvCacheDtype::Mxfp8 | KvCacheDtype::Mxint8 => 0.05,
        KvCacheDtype::Mxfp4 => 0.12,
        KvCacheDtype::Bf16 | KvCacheDtype::F32 => 0.02,
    }
}

fn geometries(dtype: KvCacheDtype) -> Vec<Heads> {
    let dims: &[usize] = match dtype {
        KvCacheDtype::Mxfp8 | KvCacheDtype::Mxint8 => &[32, 64, 128, 256],
        KvCacheDtype::Mxfp4 => &[64, 128, 256],
        KvCacheDtype::Bf16 | KvCacheDtype::F32 => &[16, 32, 64, 96, 128, 256],
    };
    let mut all = Vec::new();
    for &dim in dims {
        all.extend([(4, 1), (6, 6), (9, 3), (32, 8), (14, 2), (20, 1)].map(|(q, kv)| Heads { q, kv, dim }));
    }
    all
}

#[test]
fn steps_of_any_mixture() {
    check_mixtures(KvCacheDtype::Bf16);
}

#[test]
fn steps_of_any_mixture_in_mx() {
    for dtype in [KvCacheDtype::Mxfp8, KvCacheDtype::Mxint8, KvCacheDtype::Mxfp4] {
        check_mixtures(dtype);
    }
}

fn check_mixtures(dtype: KvCacheDtype) {
    let Some(Devices { gpu, cpu }) = Devices::open() else { return };
    let mut random = Random(21);
    for heads in geometries(dtype) {
        for window in [None, Some(1), Some(40), Some(300)] {
            let lens: Vec<usize> =
                (0..1 + random.below(5)).map(|_| random.pick(&[1, 15, 16, 17, 64, 129, 400, 701])).collect();
            let sequences = Sequences::new(&mut random, heads, window, &lens).in_cache_of(dtype);
            let what = format!("{dtype}, {heads:?}, window {window:?}, lengths {lens:?}");
            let (mut gpu_cache, mut cpu_cache) = (sequences.cache(&*gpu), sequences.cache(&*cpu));
            // Everything but the last few positions, then a step of one or more for each.
            let cuts: Vec<usize> =
                lens.iter().map(|&len| len - len.min(random.pick(&[1, 1, 1, 2, 20, 130]))).collect();
            let first: Vec<Part> = (cuts.iter().enumerate())
                .filter(|&(_, &to)| to > 0)
                .map(|(sequence, &to)| Part { sequence, from: 0, to })
                .collect();
            let second: Vec<Part> = (cuts.iter().zip(&lens).enumerate())
                .map(|(sequence, (&from, &to))| Part { sequence, from, to })
                .collect();
            let norm = random.f32(heads.dim, 1.5);
            let norm = (random.below(2) == 0).then_some(norm.as_slice());
            for parts in [first, second] {
                let actual = sequences.step(&*gpu, &mut gpu_cache, &parts, norm);
                let expected = sequences.step(&*cpu, &mut cpu_cache, &parts, norm);
                assert_close(&actual, &expected, 0.0, error_bound(dtype), &what);
                let again = sequences.step(&*gpu, &mut gpu_cache, &parts, norm);
                assert_same(&again, &actual, &format!("{what}, again"));
            }
        }
    }
}

#[test]
fn rows_do_not_see_their_batch() {
    let Some(Devices { gpu, .. }) = Devices::open() else { return };
    let mut random = Random(22);
    for (heads, window, dtype) in [
        (Heads { q: 32, kv: 8, dim: 128 }, None, KvCacheDtype::Bf16),
        (Heads { q: 9, kv: 3, dim: 64 }, Some(100), KvCacheDtype::Bf16),
        (Heads { q: 8, kv: 1, dim: 256 }, None, KvCacheDtype::Bf16),
        (Heads { q: 32, kv: 8, dim: 128 }, None, KvCacheDtype::Mxfp8),
        (Heads { q: 9, kv: 3, dim: 64 }, Some(100), KvCacheDtype::Mxint8),
        (Heads { q: 8, kv: 1, dim: 256 }, None, KvCacheDtype::Mxfp4),
    ] {
        let mut lens: Vec<usize> = (0..70).map(|_| 1 + random.below(900)).collect();
        lens[0] = 1700;
        let sequences = Sequences::new(&mut random, heads, window, &lens).in_cache_of(dtype);
        let mut cache = sequences.cache(&*gpu);
        let prompts: Vec<Part> = (lens.iter().enumerate())
            .filter(|&(_, &len)| len > 1)
            .map(|(sequence, &len)| Part { sequence, from: 0, to: len - 1 })
            .collect();
        sequences.step(&*gpu, &mut cache, &prompts, None);
        let last: Vec<Part> = (lens.iter().enumerate())
            .map(|(sequence, &len)| Part { sequence, from: len - 1, to: len })
            .collect();
        let together = sequences.step(&*gpu, &mut cache, &last, None);
        for count in [1, 2, 3, 5, 9, 17, 33] {
            let few = sequences.step(&*gpu, &mut cache, &last[..count], None);
            let expected = &together[..count * heads.q_width()];
            assert_same(&few, expected, &format!("{heads:?}, {count} of 70"));
        }
        // Beside a prompt, too.
        let longest = Part { sequence: 0, from: 1000, to: lens[0] };
        let mixed = sequences.step(&*gpu, &mut cache, &[last[1], longest, last[2]], None);
        let width = heads.q_width();
        assert_same(&mixed[..width], &together[width..2 * width], "beside a prompt");
        assert_same(&mixed[mixed.len() - width..], &together[2 * width..3 * width], "behind a prompt");
        // The rows of a prompt do not depend on where its chunks begin.
        let tail = Part { sequence: 0, from: 1537, to: lens[0] };
        let chunk = sequences.step(&*gpu, &mut cache, &[tail], None);
        let whole = &mixed[width..mixed.len() - width];
        assert_same(&chunk, &whole[whole.len() - chunk.len()..], "a chunk");
    }
}

#[test]
fn long_contexts() {
    let Some(Devices { gpu, cpu }) = Devices::open() else { return };
    let mut random = Random(23);
    let heads = Heads { q: 8, kv: 2, dim: 128 };
    for (window, dtype) in
        [(None, KvCacheDtype::Bf16), (Some(4096), KvCacheDtype::Bf16), (None, KvCacheDtype::Mxfp8)]
    {
        let sequences = Sequences::new(&mut random, heads, window, &[20_011, 333]).in_cache_of(dtype);
        let (mut gpu_cache, mut cpu_cache) = (sequences.cache(&*gpu), sequences.cache(&*cpu));
        let prompt = [Part { sequence: 0, from: 0, to: 20_010 }, Part { sequence: 1, from: 0, to: 332 }];
        let last = [Part { sequence: 0, from: 20_010, to: 20_011 }, Part { sequence: 1, from: 332, to: 333 }];
        for parts in [prompt, last] {
            let actual = sequences.step(&*gpu, &mut gpu_cache, &parts, None);
            let expected = sequences.step(&*cpu, &mut cpu_cache, &parts, None);
            assert_close(&actual, &expected, 0.0, error_bound(dtype), &format!("{dtype}, window {window:?}"));
        }
    }
}

#[test]
fn a_nan_reaches_those_who_see_it_and_no_other_head_or_sequence() {
    let Some(Devices { gpu, .. }) = Devices::open() else { return };
    let heads = Heads { q: 4, kv: 2, dim: 64 };
    let width = heads.q_width();
    for (dtype, elements) in
        [(KvCacheDtype::Bf16, 5..6), (KvCacheDtype::Mxfp8, 0..32), (KvCacheDtype::Mxfp4, 0..32)]
    {
        let mut sequences = Sequences::new(&mut Random(24), heads, None, &[200, 200]).in_cache_of(dtype);
        // In the value of the second KV head at position 100.
        let at = 100 * heads.qkv_width() + (heads.q + heads.kv + 1) * heads.dim + 5;
        sequences.qkv[0][at] = f32::NAN;
        let mut cache = sequences.cache(&*gpu);
        let parts = [0, 1].map(|sequence| Part { sequence, from: 0, to: 200 });
        let last = [Part { sequence: 0, from: 199, to: 200 }, Part { sequence: 1, from: 199, to: 200 }];
        for (parts, rows) in [(&parts, 200), (&last, 1)] {
            let out = sequences.step(&*gpu, &mut cache, parts, None);
            for (i, value) in out.iter().enumerate() {
                let (row, column) = (i / width, i % width);
                let touched =
                    row < rows && column / heads.dim >= 2 && elements.contains(&(column % heads.dim));
                let sees = touched && (rows == 1 || row >= 100);
                assert!(!value.is_nan() || touched, "{dtype}: row {row}, column {column} is not concerned");
                assert!(value.is_nan() || !sees, "{dtype}: row {row}, column {column} sees it");
            }
        }
    }
}

#[test]
fn results_are_left_as_products_take_them() {
    let Some(Devices { gpu, .. }) = Devices::open() else { return };
    let mut random = Random(25);
    for dtype in [KvCacheDtype::Bf16, KvCacheDtype::Mxfp8, KvCacheDtype::Mxint8, KvCacheDtype::Mxfp4] {
        for heads in geometries(dtype).into_iter().filter(|heads| heads.q_width() % 32 == 0) {
            let sequences = Sequences::new(&mut random, heads, None, &[33, 700, 64, 17]).in_cache_of(dtype);
            let mut cache = sequences.cache(&*gpu);
            // Prompts, rows of one token, and both.
            let prompt = |sequence, to| Part { sequence, from: 0, to };
            let next = |sequence, from| Part { sequence, from, to: from + 1 };
            let steps = [
                vec![prompt(0, 32), prompt(1, 690), prompt(2, 63)],
                vec![next(0, 32), next(1, 690), next(2, 63)],
                vec![next(1, 691), prompt(3, 17)],
            ];
            for (step, (weight, parts)) in
                declaring(&*gpu, heads.q_width()).iter().zip(steps.iter().cycle()).enumerate()
            {
                let rows = parts.iter().map(|part| part.to - part.from).sum();
                let form = gpu.input_form(&mut once(weight), rows);
                let mut to = |form| sequences.step_to(&*gpu, &mut cache, parts, None, form);
                let (plain, left) = (to(InputForm::Plain), to(form));
                let can = heads.dim % 32 == 0 && matches!(form, InputForm::Prepared(_));
                assert!(left.form() == if can { form } else { InputForm::Plain }, "{:?}", left.form());
                let product = |x| multiply(&*gpu, x, rows, weight, Dtype::F32);
                assert_same(&product(&left), &product(&plain), &format!("{dtype}, {heads:?}, {step}"));
            }
        }
    }
}
