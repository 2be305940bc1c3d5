//! Memory, inputs and recorded steps.

use kernels::{Component, DenseDtype, Dtype, Error, InputWrite, WeightSource};

use crate::gpu;

#[test]
fn what_is_written_is_read_back() {
    let Some(gpu) = gpu() else { return };
    let values: Vec<f32> = (0..10_000).map(|i| i as f32 * 0.25 - 100.0).collect();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let mut buffer = gpu.alloc(dtype, 10_010, Component::Workspace).unwrap();
        gpu.write_f32(&mut buffer, 3, &values);
        let mut back = vec![f32::NAN; 10_010];
        gpu.read_f32(&buffer, 0, &mut back);
        let expected = |x: f32| if dtype == Dtype::Bf16 { half::bf16::from_f32(x).to_f32() } else { x };
        assert!(back[..3].iter().chain(&back[10_003..]).all(|&x| x == 0.0), "{dtype:?}: zeroed");
        assert!(back[3..10_003].iter().zip(&values).all(|(&a, &b)| a == expected(b)), "{dtype:?}");
    }
    let mut buffer = gpu.alloc(Dtype::U32, 5, Component::Workspace).unwrap();
    gpu.write_u32(&mut buffer, 1, &[7, u32::MAX]);
    let mut back = [1; 5];
    gpu.read_u32(&buffer, 0, &mut back);
    assert_eq!(back, [0, 7, u32::MAX, 0, 0]);
}

#[test]
fn inputs_arrive_in_their_rows() {
    let Some(gpu) = gpu() else { return };
    let alloc = |len| gpu.alloc(Dtype::U32, len, Component::Workspace).unwrap();
    let (mut flat, mut rows, mut empty) = (alloc(70_000), alloc(4 * 9), alloc(2));
    // More steps than there are slots in flight, the last of a size that makes a slot grow.
    for step in 0..8_u32 {
        let count = if step == 7 { 70_000 } else { 5 + step };
        let values: Vec<u32> = (0..count).map(|i| i * 3 + step).collect();
        let table: Vec<u32> = (0..12).map(|i| 100 * step + i).collect();
        gpu.write_inputs(&mut [
            InputWrite::flat(&mut flat, &values),
            InputWrite::flat(&mut empty, &[]),
            InputWrite { buffer: &mut rows, values: &table, width: 3, stride: 9 },
        ]);
        let mut back = vec![0; values.len()];
        gpu.read_u32(&flat, 0, &mut back);
        assert_eq!(back, values, "step {step}");
        let mut back = [0; 36];
        gpu.read_u32(&rows, 0, &mut back);
        for (i, &value) in back.iter().enumerate() {
            let expected = if i % 9 < 3 { table[i / 9 * 3 + i % 9] } else { 0 };
            assert_eq!(value, expected, "step {step}, element {i}");
        }
    }
}

#[test]
fn a_recorded_step_runs_on_what_its_buffers_hold() {
    let Some(gpu) = gpu() else { return };
    let (rows, width) = (3, 64);
    let alloc = |dtype, len| gpu.alloc(dtype, len, Component::Workspace).unwrap();
    let mut x = alloc(Dtype::Bf16, 10 * width);
    let values: Vec<f32> = (0..10 * width).map(|i| (i / width) as f32).collect();
    gpu.write_f32(&mut x, 0, &values);
    let (mut indices, mut out) = (alloc(Dtype::U32, rows), alloc(Dtype::Bf16, rows * width));
    let graph = gpu.capture(&mut || gpu.gather_rows(&x, &indices, rows, width, &mut out));
    let mut back = vec![f32::NAN; rows * width];
    gpu.read_f32(&out, 0, &mut back);
    assert!(back.iter().all(|&x| x == 0.0), "recording runs nothing");
    for picked in [[1, 9, 4], [0, 0, 7]] {
        gpu.write_inputs(&mut [InputWrite::flat(&mut indices, &picked)]);
        gpu.replay(&graph);
        gpu.read_f32(&out, 0, &mut back);
        let rows: Vec<f32> = back.chunks(width).map(|row| row[width - 1]).collect();
        assert_eq!(rows, picked.map(|i| i as f32));
    }
    // Memory that a graph knows stays until the graph is gone.
    drop(x);
    gpu.replay(&graph);
    gpu.read_f32(&out, 0, &mut back);
    assert_eq!(back[0], 0.0);
    drop(graph);
}

#[test]
fn the_account_holds_what_the_device_gave() {
    let Some(gpu) = gpu() else { return };
    let before = gpu.device_memory().unwrap();
    let bytes = 1 << 30;
    let buffer = gpu.alloc(Dtype::Bf16, bytes / 2, Component::KvCache).unwrap();
    assert_eq!(gpu.memory().bytes(Component::KvCache), bytes);
    // Other processes may take and give memory meanwhile; not as much.
    let taken = before.free_bytes - gpu.device_memory().unwrap().free_bytes;
    assert!(taken.abs_diff(bytes) < bytes / 50, "{taken} bytes");
    drop(buffer);
    assert_eq!(gpu.memory().bytes(Component::KvCache), 0);
}

#[test]
fn too_much_is_refused_with_the_numbers() {
    let Some(gpu) = gpu() else { return };
    let total = gpu.device_memory().unwrap().total_bytes;
    let error = gpu.alloc(Dtype::F32, total, Component::KvCache).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { bytes, .. } if bytes == 4 * total), "{error}");
    assert!(error.to_string().contains("free"), "{error}");
    // The device works on.
    gpu.alloc(Dtype::F32, 1000, Component::KvCache).unwrap();
}

#[test]
fn rows_of_a_table_come_back_whatever_its_size() {
    let Some(gpu) = gpu() else { return };
    // The last one is packed in several pieces by several threads.
    for [rows, cols] in [[1, 2], [17, 70], [300, 128], [20_000, 1024]] {
        let value = |i: usize| ((i * 7919) % 251) as f32 - 125.0;
        let bytes: Vec<u8> =
            (0..rows * cols).flat_map(|i| half::bf16::from_f32(value(i)).to_le_bytes()).collect();
        let source = WeightSource::Dense { dtype: DenseDtype::Bf16, shape: [rows, cols], bytes: &bytes };
        let table = gpu.upload(&[source], None).unwrap();
        let picked: Vec<u32> = (0..20).map(|i| (i * i * 997 % rows) as u32).collect();
        let mut tokens = gpu.alloc(Dtype::U32, picked.len(), Component::Workspace).unwrap();
        gpu.write_u32(&mut tokens, 0, &picked);
        let mut out = gpu.alloc(Dtype::Bf16, picked.len() * cols, Component::Workspace).unwrap();
        gpu.embed(&table, &tokens, picked.len(), &mut out);
        let mut back = vec![f32::NAN; picked.len() * cols];
        gpu.read_f32(&out, 0, &mut back);
        for (row, &picked) in back.chunks(cols).zip(&picked) {
            for (col, &x) in row.iter().enumerate() {
                assert_eq!(x, value(picked as usize * cols + col), "[{rows}, {cols}]: {picked}, {col}");
            }
        }
    }
}
