//! The CPU operators against their defining loops, on every instruction set of this processor.

use super::*;
use crate::backend::{DenseDtype, KV_BLOCK_TOKENS};
use crate::isa::Isa;
use crate::mx::{
    Block, Cast, ElementRounding, ElementType, MxFormat, MxTensor, ScaleRounding, Specials, Values,
    quantize_dequantize, quantize_rows,
};
use crate::reference::{self, BlockSum};

/// Seeded numbers in [-1, 1), with some structure in their magnitudes.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn next(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

fn backends() -> Vec<CpuBackend> {
    let pairs = |isa| PairIsa::available(isa).into_iter().map(move |pairs| (isa, pairs));
    let isas = Isa::ALL.iter().copied().filter(|isa| isa.is_available()).flat_map(pairs);
    isas.flat_map(|(isa, pairs)| [1, 3].map(|t| CpuBackend::with_isa(t, isa, pairs))).collect()
}

fn upload_f32(backend: &CpuBackend, values: &[f32]) -> Buffer {
    let mut buffer = backend.alloc(Dtype::F32, values.len(), Component::Workspace).unwrap();
    backend.write_f32(&mut buffer, 0, values);
    buffer
}

fn upload_u32(backend: &CpuBackend, values: &[u32]) -> Buffer {
    let mut buffer = backend.alloc(Dtype::U32, values.len(), Component::Workspace).unwrap();
    backend.write_u32(&mut buffer, 0, values);
    buffer
}

fn read(backend: &CpuBackend, buffer: &Buffer) -> Vec<f32> {
    let mut out = vec![0.0; buffer.len()];
    backend.read_f32(buffer, 0, &mut out);
    out
}

/// Poisoned output: an element that an operator forgets is NaN.
fn poison(backend: &CpuBackend, len: usize) -> Buffer {
    upload_f32(backend, &vec![f32::NAN; len])
}

#[track_caller]
fn assert_bits(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(a.to_bits() == e.to_bits() || (a.is_nan() && e.is_nan()), "{what}: [{i}] is {a}, not {e}");
    }
}

#[track_caller]
fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((a - e).abs() <= tolerance * (1.0 + e.abs()), "{what}: [{i}] is {a}, not {e}");
    }
}

/// A weight in both forms: packed on disk, and as element values and scales.
struct TestWeight {
    format: MxFormat,
    shape: [usize; 2],
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl TestWeight {
    fn random(format: MxFormat, shape: [usize; 2], seed: u64) -> Self {
        let mut random = Random(seed);
        let mut codes = vec![0; shape[0] * format.code_bytes(shape[1])];
        let mut scales = vec![0; shape[0] * format.scale_bytes(shape[1])];
        // Every code and many scales, not only those that quantization makes; no specials.
        let spec = format.element.spec();
        codes.iter_mut().for_each(|c| {
            *c = random.bits() as u8;
            if spec.specials != Specials::None && !format.element.decode(*c).is_finite() {
                *c = 1;
            }
        });
        scales.iter_mut().for_each(|s| *s = 110 + (random.bits() % 24) as u8);
        scales[0] = 0;
        Self { format, shape, codes, scales }
    }

    fn tensor(&self) -> MxTensor<'_> {
        MxTensor::new(self.format, self.shape, &self.codes, &self.scales).unwrap()
    }

    fn source(&self, activation: Option<Cast>) -> WeightSource<'_> {
        WeightSource::Mx { tensor: self.tensor(), scale_rounding: ScaleRounding::Floor, activation }
    }

    /// How its products are summed.
    fn sum(&self) -> BlockSum {
        let integers = self.format.element.spec().int8_factor().is_some();
        if integers { BlockSum::Exact } else { BlockSum::Chained }
    }

    /// Element values and scales.
    fn parts(&self) -> (Vec<f32>, Vec<f32>) {
        let spec = self.format.element.spec();
        let mut codes = vec![0; self.shape[0] * self.shape[1]];
        crate::mx::unpack(&self.codes, spec.bits, &mut codes);
        let elements = codes.iter().map(|&c| self.format.element.decode(c)).collect();
        let scales = self.scales.iter().map(|&s| crate::mx::E8m0(s).to_f32()).collect();
        (elements, scales)
    }
}

#[test]
fn linear_equals_its_definition_for_every_format_and_number_of_rows() {
    // 70 outputs leave a partial row group; 1120 columns make a second, partial panel.
    for shape in [[70, 96], [16, 32], [37, 1120]] {
        for element in ElementType::ALL {
            let weight = TestWeight::random(MxFormat::new(element), shape, 7);
            let (elements, scales) = weight.parts();
            let bias = Random(3).vec(shape[0]);
            for rows in [1, 2, 3, 4, 5, 12, 17, 31] {
                let x = Random(11).vec(rows * shape[1]);
                let seen = match weight.sum() {
                    BlockSum::Exact => reference::block_fixed_point(&x),
                    BlockSum::Chained => x.clone(),
                };
                let expected =
                    reference::linear(weight.sum(), &seen, &elements, Some(&scales), Some(&bias), shape);
                for backend in backends() {
                    let what = format!("{element:?} {shape:?} x {rows} on {}", backend.description());
                    let w = backend.upload(&[weight.source(None)], Some(&bias)).unwrap();
                    let mut out = poison(&backend, rows * shape[0]);
                    backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, shape[0], 0);
                    assert_bits(&read(&backend, &out), &expected, &what);
                }
            }
        }
    }
}

#[test]
fn many_rows_are_cut_as_defined() {
    // More tokens than a task takes at least, and than stay in a cache beside the weights.
    let (shape, rows) = ([20, 2112], 190);
    let formats =
        [(ElementType::E2m1, None), (ElementType::Int8, Some(ElementType::Int8)), (ElementType::E4m3, None)];
    // Scales and activations that leave room for the sums in an F32's exponent, and some that do not.
    for ((element, activation), extreme) in formats.into_iter().flat_map(|f| [(f, false), (f, true)]) {
        let mut weight = TestWeight::random(MxFormat::new(element), shape, 7);
        let cast = activation.map(|element| Cast::from(MxFormat::new(element)));
        let mut x = Random(11).vec(rows * shape[1]);
        x[..32].fill(0.0);
        if extreme {
            weight.scales[5] = 3;
            weight.scales[70] = 250;
            x[3 * shape[1]..][..40].fill(f32::MIN_POSITIVE);
            x[7 * shape[1]] = f32::NAN;
        }
        let (elements, scales) = weight.parts();
        let mut seen = x.clone();
        match cast {
            Some(cast) => quantize_dequantize(cast, &x, &mut seen),
            None if weight.sum() == BlockSum::Exact => seen = reference::block_fixed_point(&x),
            None => {}
        }
        let expected = reference::linear(weight.sum(), &seen, &elements, Some(&scales), None, shape);
        for backend in backends() {
            let w = backend.upload(&[weight.source(cast)], None).unwrap();
            let mut out = poison(&backend, rows * shape[0]);
            backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, shape[0], 0);
            let what = format!("{element:?} on {}", backend.description());
            assert_bits(&read(&backend, &out), &expected, &what);
        }
    }
}

#[test]
fn dense_linear_takes_any_number_of_columns_and_each_dtype() {
    for shape in [[33, 50], [20, 64], [5, 1100]] {
        let values = Random(5).vec(shape[0] * shape[1]);
        for dtype in [DenseDtype::Bf16, DenseDtype::F16, DenseDtype::F32] {
            let (bytes, elements): (Vec<u8>, Vec<f32>) = match dtype {
                DenseDtype::Bf16 => {
                    let v: Vec<_> = values.iter().map(|&v| half::bf16::from_f32(v)).collect();
                    (v.iter().flat_map(|v| v.to_le_bytes()).collect(), v.iter().map(|v| v.to_f32()).collect())
                }
                DenseDtype::F16 => {
                    let v: Vec<_> = values.iter().map(|&v| half::f16::from_f32(v)).collect();
                    (v.iter().flat_map(|v| v.to_le_bytes()).collect(), v.iter().map(|v| v.to_f32()).collect())
                }
                DenseDtype::F32 => (values.iter().flat_map(|v| v.to_le_bytes()).collect(), values.clone()),
            };
            for rows in [1, 6, 13] {
                let x = Random(2).vec(rows * shape[1]);
                let expected = reference::linear(BlockSum::Chained, &x, &elements, None, None, shape);
                for backend in backends() {
                    let source = WeightSource::Dense { dtype, shape, bytes: &bytes };
                    let w = backend.upload(&[source], None).unwrap();
                    // The result's columns are in the middle of wider rows.
                    let width = shape[0] + 9;
                    let mut out = upload_f32(&backend, &vec![-7.0; rows * width]);
                    backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, width, 4);
                    let out = read(&backend, &out);
                    for (row, expected) in out.chunks_exact(width).zip(expected.chunks_exact(shape[0])) {
                        assert_bits(&row[4..4 + shape[0]], expected, &format!("{dtype:?} {shape:?}"));
                        assert!(row[..4].iter().chain(&row[4 + shape[0]..]).all(|&v| v == -7.0));
                    }
                    let mut row = poison(&backend, shape[1]);
                    backend.embed(&w, &upload_u32(&backend, &[3]), 1, &mut row);
                    assert_bits(&read(&backend, &row), &elements[3 * shape[1]..][..shape[1]], "embed");
                }
            }
        }
    }
}

#[test]
fn declared_activations_are_quantized() {
    let shape = [35, 96];
    for weight in ElementType::ALL {
        let weight = TestWeight::random(MxFormat::new(weight), shape, 1);
        let (elements, scales) = weight.parts();
        for activation in ElementType::ALL {
            let cast = Cast::from(MxFormat::new(activation));
            for rows in [1, 2, 3, 4, 5, 15] {
                let x = Random(4).vec(rows * 96);
                let mut quantized = vec![0.0; x.len()];
                let mut codes = vec![0; cast.format.code_bytes(x.len())];
                let mut block_scales = vec![0; cast.format.scale_bytes(x.len())];
                let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
                let nearest = ElementRounding::NearestEven;
                quantize_rows(cast, nearest, Values::F32(&bytes), 0, &mut codes, &mut block_scales).unwrap();
                let tensor = MxTensor::new(cast.format, [1, x.len()], &codes, &block_scales).unwrap();
                tensor.dequantize_row(0, &mut quantized);
                assert_ne!(quantized, x);
                let bias = Random(6).vec(35);
                if weight.sum() == BlockSum::Exact && activation.spec().int8_factor().is_none() {
                    quantized = reference::block_fixed_point(&quantized);
                }
                let expected =
                    reference::linear(weight.sum(), &quantized, &elements, Some(&scales), Some(&bias), shape);
                for backend in backends() {
                    let w = backend.upload(&[weight.source(Some(cast))], Some(&bias)).unwrap();
                    let mut out = poison(&backend, rows * 35);
                    backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, 35, 0);
                    let what = format!("{} on {}", w.scheme().unwrap(), backend.description());
                    assert_bits(&read(&backend, &out), &expected, &what);
                }
            }
        }
    }
}

#[test]
fn a_nan_activation_makes_its_row_nan_and_no_other() {
    let weight = TestWeight::random("mxint8".parse().unwrap(), [8, 64], 1);
    let mut x = Random(4).vec(3 * 64);
    x[64 + 40] = f32::NAN;
    let cast = Cast::from("mxint8".parse::<MxFormat>().unwrap());
    for backend in backends() {
        let w = backend.upload(&[weight.source(Some(cast))], None).unwrap();
        let mut out = upload_f32(&backend, &[0.0; 24]);
        backend.linear(&upload_f32(&backend, &x), 3, &w, &mut out, 8, 0);
        for (i, v) in read(&backend, &out).iter().enumerate() {
            assert_eq!(v.is_nan(), i / 8 == 1, "output {i}");
        }
    }
}

#[test]
fn a_nan_scale_or_element_makes_its_row_nan_and_no_other() {
    for element in [ElementType::E4m3, ElementType::E5m2, ElementType::E2m1, ElementType::Int8] {
        let shape = [20, 64];
        let mut weight = TestWeight::random(MxFormat::new(element), shape, 9);
        weight.scales[3 * 2 + 1] = 255;
        let mut nan_rows = vec![3];
        if element.spec().specials != Specials::None {
            weight.codes[5 * 64 + 40] = 0xFF;
            nan_rows.push(5);
        }
        let x = Random(4).vec(64 * 6);
        for backend in backends() {
            let w = backend.upload(&[weight.source(None)], None).unwrap();
            for rows in [1, 6] {
                let mut out = upload_f32(&backend, &vec![0.0; rows * 20]);
                backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, 20, 0);
                for (i, v) in read(&backend, &out).iter().enumerate() {
                    assert_eq!(v.is_nan(), nan_rows.contains(&(i % 20)), "{element:?} output {i}");
                }
            }
        }
    }
}

#[test]
fn stacked_parts_are_one_weight_and_embedding_decodes_it() {
    for element in ElementType::ALL {
        let format = MxFormat::new(element);
        let (a, b) = (TestWeight::random(format, [19, 64], 1), TestWeight::random(format, [6, 64], 2));
        for backend in backends() {
            let w = backend.upload(&[a.source(None), b.source(None)], None).unwrap();
            assert_eq!(w.shape(), [25, 64]);
            let mut out = poison(&backend, 3 * 64);
            backend.embed(&w, &upload_u32(&backend, &[18, 19, 24]), 3, &mut out);
            let out = read(&backend, &out);
            let mut expected = vec![0.0; 3 * 64];
            a.tensor().dequantize_row(18, &mut expected[..64]);
            b.tensor().dequantize_row(0, &mut expected[64..128]);
            b.tensor().dequantize_row(5, &mut expected[128..]);
            assert_bits(&out, &expected, &format!("{element:?}"));
        }
    }
}

#[test]
fn packed_weights_take_the_bytes_of_their_format() {
    let backend = CpuBackend::new(1);
    for element in ElementType::ALL {
        let format = MxFormat::new(element);
        let weight = TestWeight::random(format, [64, 128], 1);
        let w = backend.upload(&[weight.source(None)], None).unwrap();
        assert_eq!(w.bytes(), weight.tensor().num_bytes(), "{element:?}");
        assert_eq!(backend.memory().bytes(Component::Weights), weight.codes.len());
        assert_eq!(backend.memory().bytes(Component::Scales), weight.scales.len());
        drop(w);
        assert_eq!(backend.memory().bytes(Component::Weights), 0);
    }
}

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

#[test]
fn row_operators_equal_their_definition() {
    for width in [64, 100, 576] {
        for rows in [1, 40] {
            let (x, delta) = (Random(1).vec(rows * width), Random(2).vec(rows * width));
            let weight = Random(3).vec(width);
            let sum: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| a + b).collect();
            let norm = |x: &[f32]| -> Vec<f32> {
                x.chunks_exact(width).flat_map(|row| reference::rms_norm(row, &weight, 1e-5)).collect()
            };
            for backend in backends() {
                let what = format!("{rows} x {width} on {}", backend.description());
                let w = upload_f32(&backend, &weight);
                let mut out = poison(&backend, rows * width);
                backend.rms_norm(&upload_f32(&backend, &x), &w, 1e-5, rows, &mut out);
                assert_close(&read(&backend, &out), &norm(&x), 1e-6, &what);

                let mut residual = upload_f32(&backend, &x);
                let delta = upload_f32(&backend, &delta);
                backend.add_rms_norm(&delta, &mut residual, &w, 1e-5, rows, &mut out);
                assert_bits(&read(&backend, &residual), &sum, &what);
                assert_close(&read(&backend, &out), &norm(&sum), 1e-6, &what);

                let gate_up: Vec<f32> = Random(8).vec(rows * 2 * width).iter().map(|v| v * 30.0).collect();
                let expected: Vec<f32> =
                    gate_up.chunks_exact(2 * width).flat_map(reference::silu_mul).collect();
                backend.silu_mul(&upload_f32(&backend, &gate_up), rows, width, &mut out);
                assert_close(&read(&backend, &out), &expected, 1e-6, &what);
            }
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
        };
        backend.paged_attention(&x, heads, 0.2, window, &inputs, &cache, &mut y);
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
fn exp_is_within_two_ulp_on_every_instruction_set_and_keeps_nan() {
    let xs: Vec<f32> = (-87_000..88_000).map(|i| i as f32 * 1e-3 + 3e-4).collect();
    let mut first: Option<Vec<f32>> = None;
    for isa in Isa::ALL.iter().copied().filter(|isa| isa.is_available()) {
        let mut out = vec![0.0; xs.len()];
        // SAFETY: `isa` is available.
        unsafe { sampling::exp_of(isa, &xs, 0.0, 1.0, &mut out) };
        for (x, y) in xs.iter().zip(&out) {
            let exact = f64::from(*x).exp();
            let ulp = f64::from(f32::from_bits(y.to_bits() + 1)) - f64::from(*y);
            assert!((f64::from(*y) - exact).abs() <= 2.0 * ulp, "e^{x} is {exact}, not {y} ({isa:?})");
        }
        assert_bits(&out, first.get_or_insert_with(|| out.clone()), "e^x");
    }
    let mut nan = vec![1.0; 16];
    nan[3] = f32::NAN;
    for backend in backends() {
        let mut out = poison(&backend, 8);
        backend.silu_mul(&upload_f32(&backend, &nan), 1, 8, &mut out);
        let out = read(&backend, &out);
        assert!(out[3].is_nan() && out[2].is_finite());
    }
}

#[test]
fn log_probabilities_equal_their_definition() {
    for backend in backends() {
        for width in [5, 16, 1000] {
            let logits: Vec<f32> = Random(7).vec(2 * width).iter().map(|v| v * 12.0).collect();
            let buffer = upload_f32(&backend, &logits);
            let targets = [3, width as u32 - 1];
            let out = backend.logprobs(&buffer, width, &[1, 0], &targets, 3);
            for (row, (actual, target)) in [1, 0].into_iter().zip(out.iter().zip(targets)) {
                let expected = reference::log_softmax(&logits[row * width..][..width]);
                let own = expected[target as usize];
                assert!((actual.logprob - own).abs() < 2e-5, "{} is not {own}", actual.logprob);
                let mut order: Vec<usize> = (0..width).collect();
                order.sort_by(|&a, &b| expected[b].total_cmp(&expected[a]));
                assert_eq!(order[actual.rank as usize - 1], target as usize);
                assert_eq!(actual.top.len(), 3);
                for ((id, logprob), &best) in actual.top.iter().zip(&order) {
                    assert_eq!(*id as usize, best);
                    assert!((logprob - expected[best]).abs() < 2e-5);
                }
            }
        }
    }
}

#[test]
fn what_has_no_kernel_is_refused_when_it_is_uploaded() {
    let backend = CpuBackend::new(1);
    let format = |element, size| MxFormat { element, block: Block::along_k(size).unwrap() };
    for size in [16, 64] {
        let weight = TestWeight::random(format(ElementType::E2m1, size), [16, 64], 1);
        let error = backend.upload(&[weight.source(None)], None).unwrap_err().to_string();
        assert!(error.contains(&format!("mxfp4_k{size}")), "{error}");
    }
    // Blocks of 64 do not fit rows of 96 activations.
    let weight = TestWeight::random(format(ElementType::E2m1, 32), [16, 96], 1);
    let activation = Cast::from(format(ElementType::Int8, 64));
    let error = backend.upload(&[weight.source(Some(activation))], None).unwrap_err().to_string();
    assert!(error.contains("mxfp4:mxint8_k64 with 96 columns"), "{error}");
}

#[test]
fn both_ends_of_the_scales_are_multiplied_as_defined() {
    let shape = [16, 64];
    let mut weight = TestWeight::random("mxint8".parse().unwrap(), shape, 2);
    weight.scales.iter_mut().enumerate().for_each(|(i, s)| *s = if i % 2 == 0 { 2 } else { 250 });
    let (elements, scales) = weight.parts();
    // Small activations meet large scales, and large ones small scales.
    let x: Vec<f32> = (Random(3).vec(5 * 64).iter().enumerate())
        .map(|(i, v)| if i % 64 < 32 { v * 2.0_f32.powi(60) } else { v * 2.0_f32.powi(-60) })
        .collect();
    let cast = Cast::from("mxint8".parse::<MxFormat>().unwrap());
    let mut quantized = vec![0.0; x.len()];
    quantize_dequantize(cast, &x, &mut quantized);
    for (activation, seen) in [(Some(cast), quantized), (None, reference::block_fixed_point(&x))] {
        let expected = reference::linear(weight.sum(), &seen, &elements, Some(&scales), None, shape);
        for backend in backends() {
            let w = backend.upload(&[weight.source(activation)], None).unwrap();
            for rows in [1, 5] {
                let mut out = poison(&backend, rows * 16);
                backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, 16, 0);
                assert_bits(&read(&backend, &out), &expected[..rows * 16], &backend.description());
            }
        }
    }
}

#[test]
fn activations_of_every_magnitude_are_multiplied_as_defined() {
    let shape = [16, 32];
    let mut random = Random(8);
    // Values just below and at the points where a block's exponent changes, subnormals, zeros, and what is too large.
    let edge = f32::from_bits(32639.0_f32.to_bits() - 1);
    let peaks = [0.0, 1e-45, 1e-40, 2.0_f32.powi(-113), 1.0, 32639.0, edge, 2.0_f32.powi(99)];
    let mut x: Vec<f32> =
        peaks.iter().flat_map(|peak| random.vec(32).into_iter().map(move |v| v * peak)).collect();
    peaks.iter().zip(x.chunks_exact_mut(32)).for_each(|(peak, row)| row[7] = -peak);
    // Halves of a step: ties go to even.
    x.extend((0..32).map(|i| if i == 0 { 16384.0 } else { i as f32 - 15.5 }));
    for too_large in [2.0_f32.powi(100), -f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        x.extend((0..32).map(|i| if i == 9 { too_large } else { 1.0 }));
    }
    let rows = x.len() / 32;
    for element in [ElementType::E2m1, ElementType::E2m3, ElementType::Int8, ElementType::E3m0] {
        let weight = TestWeight::random(MxFormat::new(element), shape, 3);
        let (elements, scales) = weight.parts();
        let seen = reference::block_fixed_point(&x);
        let expected = reference::linear(BlockSum::Exact, &seen, &elements, Some(&scales), None, shape);
        assert_eq!(expected.iter().position(|v| v.is_nan()), Some((rows - 5) * 16));
        for backend in backends() {
            let w = backend.upload(&[weight.source(None)], None).unwrap();
            let mut out = poison(&backend, rows * 16);
            backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, 16, 0);
            assert_bits(&read(&backend, &out), &expected, &format!("{element:?} {}", backend.description()));
        }
    }
}

fn draw(backend: &CpuBackend, logits: &[f32], params: SampleParams) -> u32 {
    let mut out = backend.alloc(Dtype::U32, 1, Component::Workspace).unwrap();
    backend.sample(&upload_f32(backend, logits), logits.len(), &[params], &mut out);
    let mut token = [0];
    backend.read_u32(&out, 0, &mut token);
    token[0]
}

const PLAIN: SampleParams =
    SampleParams { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0, seed: 1, draw: 0 };

#[test]
fn sampling_follows_the_distribution_and_its_restrictions() {
    let probabilities = [0.05_f32, 0.4, 0.2, 0.3, 0.04, 0.01];
    let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
    for backend in backends() {
        let count = |params: SampleParams| {
            let mut counts = [0_usize; 6];
            for draw_index in 0..4000 {
                counts[draw(&backend, &logits, SampleParams { draw: draw_index, ..params }) as usize] += 1;
            }
            counts
        };
        let free = count(PLAIN);
        for (c, p) in free.iter().zip(probabilities) {
            let sd = (4000.0 * p * (1.0 - p)).sqrt();
            assert!((*c as f32 - 4000.0 * p).abs() < 5.0 * sd, "{free:?}");
        }
        for temperature in [0.5_f32, 2.0] {
            let weights = probabilities.map(|p| p.powf(1.0 / temperature));
            let total: f32 = weights.iter().sum();
            for (c, w) in count(SampleParams { temperature, ..PLAIN }).iter().zip(weights) {
                let p = w / total;
                let sd = (4000.0 * p * (1.0 - p)).sqrt();
                assert!((*c as f32 - 4000.0 * p).abs() < 5.0 * sd, "temperature {temperature}");
            }
        }
        let kept = |params| count(params).map(|c| c > 0);
        assert_eq!(kept(SampleParams { top_k: Some(2), ..PLAIN }), [false, true, false, true, false, false]);
        assert_eq!(kept(SampleParams { top_p: 0.65, ..PLAIN }), [false, true, false, true, false, false]);
        assert_eq!(kept(SampleParams { top_p: 0.75, ..PLAIN }), [false, true, true, true, false, false]);
        assert_eq!(kept(SampleParams { min_p: 0.45, ..PLAIN }), [false, true, true, true, false, false]);
        assert_eq!(
            kept(SampleParams { top_k: Some(3), top_p: 0.7, ..PLAIN }),
            [false, true, false, true, false, false]
        );
        assert_eq!(draw(&backend, &logits, SampleParams { temperature: 0.0, ..PLAIN }), 1);
        assert_eq!(draw(&backend, &[2.0, 5.0, 5.0], SampleParams { temperature: 0.0, ..PLAIN }), 1);
        let masked = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
        assert!((0..200).all(|d| draw(&backend, &masked, SampleParams { draw: d, ..PLAIN }) == 1));
        assert_eq!(draw(&backend, &logits, PLAIN), draw(&backend, &logits, PLAIN));
    }
}

/// The definition of a draw: weights as integers, restrictions one after the other over the sorted tokens.
fn defined_draw(logits: &[f32], params: SampleParams) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut weights = vec![0.0; logits.len()];
    // SAFETY: plain Rust is always available.
    unsafe { sampling::exp_of(Isa::Portable, logits, max, 1.0 / params.temperature, &mut weights) };
    let mut tokens: Vec<(f32, usize)> = weights.into_iter().zip(0..).collect();
    tokens.retain(|&(_, id)| logits[id] > f32::NEG_INFINITY);
    tokens.sort_by(|a, b| b.0.total_cmp(&a.0));
    tokens.truncate(params.top_k.unwrap_or(u32::MAX) as usize);
    let units = |weight: f32| (f64::from(weight) * 2.0_f64.powi(44)).round_ties_even() as u64;
    let total = |tokens: &[(f32, usize)]| tokens.iter().map(|t| units(t.0)).sum::<u64>();
    if params.top_p < 1.0 {
        let enough = (f64::from(params.top_p) * total(&tokens) as f64).ceil() as u64;
        let count = (1..=tokens.len()).find(|&n| total(&tokens[..n]) >= enough.max(1));
        tokens.truncate(count.unwrap_or(tokens.len()));
    }
    tokens.retain(|t| t.0 >= params.min_p);
    tokens.sort_by_key(|t| t.1);
    let target = (sampling::uniform(params.seed, params.draw) * total(&tokens) as f64) as u64;
    let drawn = (1..=tokens.len()).find(|&n| total(&tokens[..n]) > target);
    tokens[drawn.expect("the target is below the total") - 1].1 as u32
}

#[test]
fn draws_are_those_of_the_definition_on_every_instruction_set() {
    let mut random = Random(11);
    for width in [1, 7, 256, 257, 1003] {
        let mut logits: Vec<f32> = random.vec(width).iter().map(|v| (v * 40.0).round() * 0.25).collect();
        if width > 7 {
            logits[3] = f32::NEG_INFINITY;
            logits[5] = f32::NAN;
        }
        for (i, (top_k, top_p, min_p)) in [
            (None, 1.0, 0.0),
            (None, 1.0, 0.1),
            (Some(1), 1.0, 0.0),
            (Some(40), 1.0, 0.0),
            (Some(40), 0.8, 0.05),
            (None, 0.9, 0.0),
            (None, 1e-6, 0.0),
            (None, 0.999_999, 0.0),
        ]
        .into_iter()
        .enumerate()
        {
            for draw_index in 0..12 {
                let temperature = [0.3, 1.0, 5.0][draw_index % 3];
                let params = SampleParams {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    seed: i as u64,
                    draw: draw_index as u64,
                };
                let defined = defined_draw(&logits, params);
                for backend in backends() {
                    assert_eq!(draw(&backend, &logits, params), defined, "{width} tokens, {params:?}");
                }
            }
        }
    }
}
