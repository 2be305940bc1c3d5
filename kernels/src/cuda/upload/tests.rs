//! What the device packs against `tile::pack`.

use std::sync::Arc;

use fastrand::Rng;

use super::Uploader;
use crate::backend::{DenseDtype, WeightSource};
use crate::buffer::MemoryAccount;
use crate::cuda::Context;
use crate::mx::{ElementType, MxFormat, MxTensor, ScaleRounding, pack as pack_bits};
use crate::tile::{self, RowOrder, TileFormat, TileLayout};

/// Any codes at all, with blocks of zeros; any scales, mostly near each other.
fn tensor(random: &mut Rng, element: ElementType, [rows, cols]: [usize; 2]) -> (Vec<u8>, Vec<u8>) {
    let mask = element.spec().code_mask();
    let mut codes: Vec<u8> = (0..rows * cols).map(|_| random.u8(..) & mask).collect();
    codes.chunks_mut(32).filter(|_| random.u8(..7) == 0).for_each(|block| block.fill(0));
    let mut packed = vec![0; MxFormat::new(element).code_bytes(codes.len())];
    pack_bits(&codes, element.spec().bits, &mut packed);
    let scale = |random: &mut Rng| match random.u8(..40) {
        0 => random.u8(..),
        1 => 0,
        _ => random.u8(120..129),
    };
    (packed, (0..rows * cols / 32).map(|_| scale(random)).collect())
}

const SHAPES: [(&[[usize; 2]], RowOrder); 5] = [
    (&[[1, 32]], RowOrder::Stacked),
    (&[[17, 96], [30, 96], [1, 96]], RowOrder::Stacked),
    (&[[5, 160], [5, 160]], RowOrder::Paired),
    (&[[24, 64], [24, 64]], RowOrder::Paired),
    // More than one piece of FP8 and wider formats.
    (&[[5000, 4096], [5000, 4096]], RowOrder::Paired),
];

/// Uploads `parts` and compares all bytes.
fn check(uploader: &mut Uploader, parts: &[WeightSource<'_>], order: RowOrder) {
    let shape = [parts.iter().map(|part| part.shape()[0]).sum(), parts[0].shape()[1]];
    let layout = TileLayout { format: TileFormat::of(&parts[0]).expect("blocks of 32"), shape, order };
    let what = format!("{:?} {shape:?} {order:?}", layout.format);
    let (mut tiles, rows) = (vec![0xA5; layout.bytes()], layout.padded_rows());
    let (mut factors, mut spreads) = (vec![-1.0; rows], vec![77; rows]);
    tile::pack(&layout, parts, 0, &mut tiles, &mut factors, &mut spreads);
    let weight = uploader.upload(layout, parts, None).expect("memory");
    let (device_tiles, device_factors) = weight.read();
    assert!(tiles == device_tiles, "{what}: tiles");
    let bits = |factors: &[f32]| factors.iter().map(|f| if f.is_nan() { !0 } else { f.to_bits() }).collect();
    let (expected, actual): (Vec<u32>, Vec<u32>) = (bits(&factors), bits(&device_factors));
    assert_eq!(expected, actual, "{what}: factors");
    assert_eq!(spreads.into_iter().max(), Some(weight.spread()), "{what}: spread");
}

#[test]
fn a_device_packs_as_the_host_does() {
    if Context::check(0).is_err() {
        return;
    }
    let context = Arc::new(Context::open(0).expect("the device opens"));
    let account: Arc<MemoryAccount> = Arc::default();
    let mut uploader = Uploader::new(&context, &account).expect("memory");
    let mut random = Rng::with_seed(41);
    for element in ElementType::ALL {
        for (shapes, order) in SHAPES {
            let data: Vec<_> = shapes.iter().map(|&shape| tensor(&mut random, element, shape)).collect();
            let parts: Vec<_> = data
                .iter()
                .zip(shapes)
                .map(|((codes, scales), &shape)| WeightSource::Mx {
                    tensor: MxTensor::new(MxFormat::new(element), shape, codes, scales).expect("a tensor"),
                    scale_rounding: ScaleRounding::Even,
                    activation: None,
                    rotation: None,
                })
                .collect();
            check(&mut uploader, &parts, order);
        }
    }
    for dtype in [DenseDtype::Bf16, DenseDtype::F16, DenseDtype::F32] {
        for (shape, order) in [([5, 70], RowOrder::Stacked), ([3000, 4096], RowOrder::Stacked)] {
            // Numbers only: what becomes of the bits of a NaN is nobody's business.
            let value = |random: &mut Rng| 3.0 * random.f32() - 1.5;
            let bytes: Vec<u8> = (0..shape[0] * shape[1])
                .flat_map(|_| match dtype {
                    DenseDtype::Bf16 => half::bf16::from_f32(value(&mut random)).to_le_bytes().to_vec(),
                    DenseDtype::F16 => half::f16::from_f32(value(&mut random)).to_le_bytes().to_vec(),
                    DenseDtype::F32 => value(&mut random).to_le_bytes().to_vec(),
                })
                .collect();
            check(&mut uploader, &[WeightSource::Dense { dtype, shape, bytes: &bytes }], order);
        }
    }
}
