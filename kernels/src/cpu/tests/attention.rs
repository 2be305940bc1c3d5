//! Attention and its cache.

use super::*;
use crate::backend::{HostSpans, KV_BLOCK_TOKENS};
use crate::input_form::InputForm;

#[test]
fn a_kv_block_takes_the_bytes_it_says() {
    let backend = CpuBackend::new(1);
    for dim in [32, 64] {
        for dtype in KvCacheDtype::ALL {
            let heads = Heads { q: 4, kv: 2, dim };
            let cache = backend.alloc_kv(8, heads, dtype).unwrap();
            let held = backend.memory().bytes(Component::KvCache);
            assert_eq!(held, 8 * backend.kv_block_bytes(heads, dtype).unwrap(), "{dim} {dtype:?}");
            assert_eq!(
                held,
                cache.k.len() * cache.k.dtype().size_bytes() + cache.v.len() * cache.v.dtype().size_bytes()
            );
        }
    }
}

/// Two sequences whose blocks are interleaved in the cache, in chunks; returns each row's attention output.
fn run_attention(
    backend: &CpuBackend,
    heads: Heads,
    dtype: KvCacheDtype,
    window: Option<usize>,
    qkv: &[&[f32]],
    chunk: usize,
) -> Vec<Vec<f32>> {
    let width = heads.qkv_width();
    let lens: Vec<usize> = qkv.iter().map(|q| q.len() / width).collect();
    let max_blocks = lens.iter().max().unwrap().div_ceil(KV_BLOCK_TOKENS) + 1;
    let block = |s: usize, i: usize| (i * qkv.len() + (qkv.len() - 1 - s)) as u32;
    let tables: Vec<u32> = (0..qkv.len()).flat_map(|s| (0..max_blocks).map(move |i| block(s, i))).collect();
    let mut cache = backend.alloc_kv(max_blocks * qkv.len(), heads, dtype).unwrap();
    let inv_freq: Vec<f32> = (0..heads.dim / 2).map(|i| 0.3_f32.powi(i as i32)).collect();
    let inv_freq = upload_f32(backend, &inv_freq);
    let mut out = vec![Vec::new(); qkv.len()];
    for start in (0..*lens.iter().max().unwrap()).step_by(chunk) {
        let (mut rows, mut query_start, mut contexts) = (Vec::new(), vec![0], Vec::new());
        let (mut positions, mut slots, mut ids) = (Vec::new(), Vec::new(), Vec::new());
        let mut step_tables = Vec::new();
        for (s, &len) in lens.iter().enumerate() {
            let end = (start + chunk).min(len);
            if start >= end {
                continue;
            }
            rows.extend_from_slice(&qkv[s][start * width..end * width]);
            positions.extend((start..end).map(|p| p as u32));
            slots.extend((start..end).map(|p| block(s, p / 16) * 16 + (p % 16) as u32));
            query_start.push(positions.len() as u32);
            contexts.push(end as u32);
            step_tables.extend_from_slice(&tables[s * max_blocks..][..max_blocks]);
            ids.push(s);
        }
        let m = positions.len();
        let mut x = upload_f32(backend, &rows);
        let mut rope = poison(backend, m * heads.dim);
        backend.rope_table(&upload_u32(backend, &positions), &inv_freq, 1.0, m, &mut rope);
        backend.rope_and_cache(&mut x, heads, &rope, None, &upload_u32(backend, &slots), m, &mut cache);
        let mut y = poison(backend, m * heads.q_width());
        let inputs = AttentionInputs {
            rows: m,
            sequences: ids.len(),
            query_start: &upload_u32(backend, &query_start),
            context_lens: &upload_u32(backend, &contexts),
            block_tables: &upload_u32(backend, &step_tables),
            max_blocks,
            host: HostSpans { query_start: &query_start, context_lens: &contexts },
        };
        backend.paged_attention(&x, heads, 0.2, window, &inputs, &cache, InputForm::Plain, &mut y);
        let y = read(backend, &y);
        for (i, s) in ids.into_iter().enumerate() {
            let rows = query_start[i] as usize..query_start[i + 1] as usize;
            out[s].extend_from_slice(&y[rows.start * heads.q_width()..rows.end * heads.q_width()]);
        }
    }
    out
}

/// (in the backend's order, by the plain definition) with keys and values as `dtype` holds them.
fn expected_attention(
    heads: Heads,
    dtype: KvCacheDtype,
    window: Option<usize>,
    qkv: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let (dim, width) = (heads.dim, heads.qkv_width());
    let inv_freq: Vec<f32> = (0..dim / 2).map(|i| 0.3_f32.powi(i as i32)).collect();
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let (mut ordered, mut plain) = (Vec::new(), Vec::new());
    for (p, row) in qkv.chunks_exact(width).enumerate() {
        let mut row = row.to_vec();
        for head in row[..(heads.q + heads.kv) * dim].chunks_exact_mut(dim) {
            reference::rope(head, p as u32, &inv_freq, 1.0);
        }
        let (new_keys, new_values) = row[heads.q_width()..].split_at(heads.kv * dim);
        keys.extend(new_keys.chunks_exact(dim).flat_map(|k| reference::stored_in_cache(k, dtype)));
        values.extend(new_values.chunks_exact(dim).flat_map(|v| reference::stored_in_cache(v, dtype)));
        let from = window.map_or(0, |w| (p + 1).saturating_sub(w));
        let (keys, values) = (&keys[from * heads.kv * dim..], &values[from * heads.kv * dim..]);
        let q = &row[..heads.q_width()];
        ordered.extend(reference::attention_in_ranges(q, keys, values, heads, 0.2, from, dtype));
        plain.extend(reference::attention(q, keys, values, heads, 0.2));
    }
    (ordered, plain)
}

/// Types that take heads of `dim`.
fn dtypes(dim: usize) -> Vec<KvCacheDtype> {
    let fits = |dtype: &KvCacheDtype| dtype.cast().is_none() || dim.is_multiple_of(32);
    KvCacheDtype::ALL.into_iter().filter(fits).collect()
}

#[test]
fn attention_equals_its_definition_and_does_not_depend_on_chunks_or_neighbours() {
    for heads in [
        Heads { q: 9, kv: 3, dim: 64 },
        Heads { q: 4, kv: 4, dim: 32 },
        Heads { q: 7, kv: 1, dim: 80 },
        Heads { q: 2, kv: 1, dim: 24 },
        Heads { q: 10, kv: 2, dim: 128 },
        Heads { q: 13, kv: 1, dim: 96 },
    ] {
        let (a, b) = (Random(1).vec(53 * heads.qkv_width()), Random(2).vec(18 * heads.qkv_width()));
        for window in [None, Some(7), Some(16), Some(33)] {
            for dtype in dtypes(heads.dim) {
                let what = format!("{heads:?} window {window:?} {dtype:?}");
                let [a_expected, b_expected] = [&a, &b].map(|x| expected_attention(heads, dtype, window, x));
                let tolerance = if dtype == KvCacheDtype::F32 { 2e-6 } else { 1e-2 };
                assert_close(&a_expected.0, &a_expected.1, tolerance, &what);
                for backend in backends() {
                    let what = format!("{what} on {}", backend.attention_kernel(dtype));
                    for chunk in [64, 1, 5, 16] {
                        let chunked = run_attention(&backend, heads, dtype, window, &[&a, &b], chunk);
                        assert_bits(&chunked[0], &a_expected.0, &format!("{what} in chunks of {chunk}"));
                        assert_bits(&chunked[1], &b_expected.0, &format!("{what} in chunks of {chunk}"));
                    }
                    let alone = run_attention(&backend, heads, dtype, window, &[&b], 64);
                    assert_bits(&alone[0], &b_expected.0, &format!("{what} alone"));
                }
            }
        }
    }
}

#[test]
fn attention_over_several_ranges_of_positions_equals_its_definition() {
    let heads = Heads { q: 2, kv: 1, dim: 32 };
    // Large scores, so that maxima differ from range to range and most probabilities are negligible.
    let a: Vec<f32> = Random(1).vec(530 * heads.qkv_width()).iter().map(|x| x * 3.0).collect();
    for window in [None, Some(270)] {
        for dtype in KvCacheDtype::ALL {
            let (expected, plain) = expected_attention(heads, dtype, window, &a);
            let tolerance = if dtype == KvCacheDtype::F32 { 2e-5 } else { 5e-2 };
            assert_close(&expected, &plain, tolerance, "the order");
            for backend in backends() {
                // Whole, the last rows are cut into tasks by ranges where there are threads for them.
                for chunk in [530, 529, 250] {
                    let out = run_attention(&backend, heads, dtype, window, &[&a], chunk);
                    let kernel = backend.attention_kernel(dtype);
                    let what = format!("window {window:?} in chunks of {chunk}, {}", backend.description());
                    assert_bits(&out[0], &expected, &format!("{kernel} {what}"));
                }
            }
        }
    }
}

#[test]
fn heads_that_mx_blocks_do_not_divide_are_refused() {
    let backend = CpuBackend::new(1);
    for dtype in [KvCacheDtype::Mxfp8, KvCacheDtype::Mxint8, KvCacheDtype::Mxfp4] {
        let heads = Heads { q: 2, kv: 1, dim: 80 };
        let error = backend.kv_block_bytes(heads, dtype).unwrap_err().to_string();
        assert!(error.contains(&format!("{dtype} (kv_cache_dtype) with a head dimension of 80")), "{error}");
        assert!(backend.alloc_kv(1, heads, dtype).is_err());
    }
}

#[test]
fn tiny_huge_and_absent_numbers_are_the_same_on_every_instruction_set() {
    let heads = Heads { q: 2, kv: 1, dim: 32 };
    let mut random = Random(3);
    let x: Vec<f32> = (0..40 * heads.qkv_width())
        .map(|_| random.next() * 2.0_f32.powi((random.bits() % 240) as i32 - 150))
        .collect();
    for dtype in KvCacheDtype::ALL {
        let (expected, _) = expected_attention(heads, dtype, None, &x);
        for backend in backends() {
            let out = run_attention(&backend, heads, dtype, None, &[&x], 40);
            assert_bits(&out[0], &expected, &backend.attention_kernel(dtype));
        }
        // A NaN, or an infinity that MX has no number for, reaches the rows that see it, in its own sequence.
        let mut broken = Random(4).vec(40 * heads.qkv_width());
        broken[21 * heads.qkv_width() + 3 * heads.dim + 5] = f32::NAN;
        let fine = Random(5).vec(40 * heads.qkv_width());
        let (expected, _) = expected_attention(heads, dtype, None, &fine);
        for backend in backends() {
            for chunk in [40, 7, 1] {
                let out = run_attention(&backend, heads, dtype, None, &[&broken, &fine], chunk);
                assert_bits(&out[1], &expected, "its neighbour");
                for (row, out) in out[0].chunks_exact(heads.q_width()).enumerate() {
                    assert_eq!(out.iter().any(|x| x.is_nan()), row >= 21, "row {row} of {dtype}");
                }
            }
        }
    }
}
