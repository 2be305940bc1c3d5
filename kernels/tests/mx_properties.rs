//! Properties of quantization that hold for every format, scale rule and block size.

use kernels::mx::{
    Block, Cast, E8m0, ElementRounding, ElementType, Energy, MxFormat, MxTensor, NonFinite, ScaleRounding,
    Values, pack, quantize_block, quantize_dequantize, quantize_rows, unpack,
};
use proptest::prelude::*;
use proptest::sample::select;

fn elements() -> impl Strategy<Value = ElementType> {
    select(ElementType::ALL.to_vec())
}

fn formats() -> impl Strategy<Value = MxFormat> {
    let block = select(vec![16, 32, 64]).prop_map(|size| Block::along_k(size).expect("a block size"));
    (elements(), block).prop_map(|(element, block)| MxFormat { element, block })
}

fn casts() -> impl Strategy<Value = Cast> {
    (formats(), select(ScaleRounding::ALL.to_vec()))
        .prop_map(|(format, scale_rounding)| Cast { format, scale_rounding })
}

/// Four blocks of the largest size, of values within `binades` of 2^`exponent`.
fn rows(exponent: i32, binades: u32) -> impl Strategy<Value = Vec<f32>> {
    let value = (any::<u32>(), 0..binades).prop_map(move |(bits, below)| {
        let significand = 1.0 + f64::from(bits >> 9) / f64::from(1 << 23);
        let magnitude = significand * f64::from(exponent - below as i32).exp2();
        (if bits & 1 == 0 { magnitude } else { -magnitude }) as f32
    });
    prop::collection::vec(value, 4 * Block::MAX)
}

/// Rows of any scale, far enough from both ends of F32 and E8M0 that neither shows.
fn moderate_rows() -> impl Strategy<Value = Vec<f32>> {
    (-90..100_i32, 1..24_u32).prop_flat_map(|(exponent, binades)| rows(exponent, binades))
}

fn f32_bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

struct Quantized {
    codes: Vec<u8>,
    scales: Vec<u8>,
    energy: Energy,
}

fn quantize(
    cast: Cast,
    rounding: ElementRounding,
    x: &[f32],
    first_index: u64,
) -> Result<Quantized, NonFinite> {
    let mut codes = vec![0; cast.format.code_bytes(x.len())];
    let mut scales = vec![0; cast.format.scale_bytes(x.len())];
    let bytes = f32_bytes(x);
    let energy = quantize_rows(cast, rounding, Values::F32(&bytes), first_index, &mut codes, &mut scales)?;
    Ok(Quantized { codes, scales, energy })
}

fn dequantized(cast: Cast, x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    quantize_dequantize(cast, x, &mut out);
    out
}

/// Scale and codes of every block, one code per byte.
fn blocks(cast: Cast, x: &[f32]) -> Vec<(E8m0, Vec<u8>)> {
    let block = cast.format.block.size();
    x.chunks_exact(block)
        .map(|x| {
            let mut codes = vec![0; block];
            (quantize_block(cast, x, &mut codes), codes)
        })
        .collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #[test]
    fn pack_and_unpack_are_inverse(width in select(vec![4_u32, 6, 8]), bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        let mask = (0xff_u16 >> (8 - width)) as u8;
        let codes: Vec<u8> = bytes[..bytes.len() / 8 * 8].iter().map(|b| b & mask).collect();
        let mut packed = vec![0; codes.len() * width as usize / 8];
        pack(&codes, width, &mut packed);
        for (i, code) in codes.iter().enumerate() {
            for bit in 0..width as usize {
                let place = i * width as usize + bit;
                prop_assert_eq!(packed[place / 8] >> (place % 8) & 1, code >> bit & 1, "bit {} of code {}", bit, i);
            }
        }
        let mut unpacked = vec![0; codes.len()];
        unpack(&packed, width, &mut unpacked);
        prop_assert_eq!(unpacked, codes);
    }

    /// A block that holds the element's largest value is its own quantization, under every rule that does not always
    /// round the scale up.
    #[test]
    fn representable_blocks_survive(
        element in elements(),
        rounding in select(vec![ScaleRounding::Floor, ScaleRounding::Rceil, ScaleRounding::Even, ScaleRounding::Mse]),
        scale in 30_u8..=220,
        codes in prop::collection::vec(any::<u8>(), 32),
    ) {
        let cast = Cast { format: MxFormat::new(element), scale_rounding: rounding };
        let spec = element.spec();
        let mut codes: Vec<u8> = codes.iter().map(|code| element.encode(element.decode(*code))).collect();
        for code in &mut codes {
            // NaN encodes as NaN.
            if element.decode(*code).is_nan() { *code = 0 }
        }
        codes[13] = element.encode(spec.max);
        let x: Vec<f32> = codes.iter().map(|code| element.decode(*code) * E8m0(scale).to_f32()).collect();
        prop_assert_eq!(blocks(cast, &x), vec![(E8m0(scale), codes)]);
        prop_assert_eq!(bits(&dequantized(cast, &x)), bits(&x));
    }

    #[test]
    fn quantizing_again_changes_nothing(cast in casts(), x in moderate_rows()) {
        let once = dequantized(cast, &x);
        prop_assert_eq!(bits(&dequantized(cast, &once)), bits(&once));
    }

    #[test]
    fn nothing_exceeds_the_largest_value_and_ceil_and_rceil_never_saturate(format in formats(), x in moderate_rows()) {
        for scale_rounding in ScaleRounding::ALL {
            let cast = Cast { format, scale_rounding };
            for (x, (scale, codes)) in x.chunks_exact(format.block.size()).zip(blocks(cast, &x)) {
                let largest = format.element.spec().max * scale.to_f32();
                for (x, code) in x.iter().zip(codes) {
                    prop_assert!(format.element.decode(code).abs() <= format.element.spec().max);
                    let never_saturates = matches!(scale_rounding, ScaleRounding::Ceil | ScaleRounding::Rceil);
                    prop_assert!(!never_saturates || x.abs() <= largest, "{} {}: {:e}", format, scale_rounding, x);
                }
            }
        }
    }

    /// floor <= even, rceil <= ceil <= floor + 1, and mse within 1 of even with no more noise than any rule in its reach.
    #[test]
    fn scale_rules_are_ordered(format in formats(), x in moderate_rows()) {
        let cast = |scale_rounding| Cast { format, scale_rounding };
        let byte = |rounding, x: &[f32]| i32::from(quantize_block(cast(rounding), x, &mut vec![0; x.len()]).0);
        let noise = |rounding, x: &[f32]| {
            quantize(cast(rounding), ElementRounding::NearestEven, x, 0).expect("finite").energy.noise
        };
        for x in x.chunks_exact(format.block.size()) {
            let [floor, ceil, rceil, even, mse] = ScaleRounding::ALL.map(|rounding| byte(rounding, x));
            prop_assert!(floor <= even && even <= ceil && floor <= rceil && rceil <= ceil && ceil <= floor + 1);
            prop_assert!((even - 1..=even + 1).contains(&mse));
            for rounding in ScaleRounding::ALL {
                if (byte(rounding, x) - even).abs() <= 1 {
                    prop_assert!(noise(ScaleRounding::Mse, x) <= noise(rounding, x) * (1.0 + 1e-12));
                }
            }
        }
    }

    #[test]
    fn one_non_finite_value_spoils_its_block_only(
        cast in casts(),
        mut x in moderate_rows(),
        at in 0..4 * Block::MAX,
        (bad, name) in select(vec![(f32::NAN, "NaN"), (-f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")]),
    ) {
        let clean = dequantized(cast, &x);
        x[at] = bad;
        let block = cast.format.block.size();
        let (scale, codes) = &blocks(cast, &x)[at / block];
        prop_assert_eq!(*scale, E8m0::NAN);
        prop_assert!(codes.iter().all(|code| *code == 0));
        for (i, (spoiled, clean)) in dequantized(cast, &x).iter().zip(&clean).enumerate() {
            let same = spoiled.to_bits() == clean.to_bits();
            prop_assert!(if i / block == at / block { spoiled.is_nan() } else { same }, "{}", i);
        }
        let error = quantize(cast, ElementRounding::NearestEven, &x, 1000).err();
        prop_assert_eq!(error, Some(NonFinite { index: 1000 + at, value: name }));
    }

    #[test]
    fn zero_blocks_have_byte_zero_and_keep_signs(cast in casts(), negative in prop::collection::vec(any::<bool>(), 64)) {
        let x: Vec<f32> = negative.iter().map(|n| if *n { -0.0 } else { 0.0 }).collect();
        let spec = cast.format.element.spec();
        for (x, (scale, codes)) in x.chunks_exact(cast.format.block.size()).zip(blocks(cast, &x)) {
            prop_assert_eq!(scale, E8m0(0));
            for (x, code) in x.iter().zip(codes) {
                let sign = if x.is_sign_negative() && spec.exponent_bits > 0 { 1 << (spec.bits - 1) } else { 0 };
                prop_assert_eq!(code, sign);
            }
        }
    }

    /// At both ends of E8M0 the exponent is clamped and values are those of the clamped scale, rounded to F32 once.
    #[test]
    fn both_ends_of_e8m0(cast in casts(), bits in prop::collection::vec(any::<u32>(), 64), high in any::<bool>()) {
        // Exponents of the lowest or highest eight binades of F32, subnormals included.
        let base = if high { 247 << 23 } else { 0 };
        let x: Vec<f32> = bits.iter().map(|b| f32::from_bits((b & 0x83ff_ffff) + base)).collect();
        prop_assume!(x.iter().all(|x| x.is_finite()));
        let block = cast.format.block.size();
        let values = dequantized(cast, &x);
        for ((x, values), (scale, codes)) in x.chunks(block).zip(values.chunks(block)).zip(blocks(cast, &x)) {
            prop_assert_ne!(scale, E8m0::NAN);
            let exact_scale = f64::from(i32::from(scale.0) - 127).exp2();
            for ((x, value), code) in x.iter().zip(values).zip(codes) {
                prop_assert_eq!(code, cast.format.element.encode(f64::from(*x) / exact_scale));
                let exact = f64::from(cast.format.element.decode(code)) * exact_scale;
                prop_assert_eq!(value.to_bits(), (exact as f32).to_bits());
            }
        }
    }

    #[test]
    fn powers_of_two_move_the_scale_alone(cast in casts(), x in rows(0, 20), shift in -60..60_i32) {
        let factor = f64::from(shift).exp2() as f32;
        let shifted: Vec<f32> = x.iter().map(|x| x * factor).collect();
        for ((scale, codes), (moved, same)) in blocks(cast, &x).into_iter().zip(blocks(cast, &shifted)) {
            prop_assert_eq!(i32::from(scale.0) + shift, i32::from(moved.0));
            prop_assert_eq!(codes, same);
        }
    }

    #[test]
    fn chunks_do_not_matter(
        cast in casts(),
        x in moderate_rows(),
        rounding in select(vec![ElementRounding::NearestEven, ElementRounding::Stochastic { seed: 11 }]),
        first_index in select(vec![0_u64, 4096, 1 << 40]),
    ) {
        let whole = quantize(cast, rounding, &x, first_index).expect("finite");
        let (mut codes, mut scales, mut energy) = (Vec::new(), Vec::new(), Energy::default());
        for (i, x) in x.chunks_exact(Block::MAX).enumerate() {
            let chunk = quantize(cast, rounding, x, first_index + (i * Block::MAX) as u64).expect("finite");
            codes.extend(chunk.codes);
            scales.extend(chunk.scales);
            energy += chunk.energy;
        }
        prop_assert_eq!(&codes, &whole.codes);
        prop_assert_eq!(&scales, &whole.scales);
        prop_assert!((energy.signal - whole.energy.signal).abs() <= 1e-12 * energy.signal);
        prop_assert!((energy.noise - whole.energy.noise).abs() <= 1e-12 * energy.noise);
    }

    /// The packed tensor decodes to what the activations' path gives directly, and the energies are theirs.
    #[test]
    fn packed_rows_decode_to_the_direct_values(cast in casts(), x in moderate_rows()) {
        let Quantized { codes, scales, energy } = quantize(cast, ElementRounding::NearestEven, &x, 0).expect("finite");
        let shape = [2, x.len() / 2];
        let tensor = MxTensor::new(cast.format, shape, &codes, &scales).expect("sizes of the format");
        let mut decoded = vec![0.0; x.len()];
        for (row, out) in decoded.chunks_exact_mut(shape[1]).enumerate() {
            tensor.dequantize_row(row, out);
        }
        prop_assert_eq!(bits(&decoded), bits(&dequantized(cast, &x)));
        let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
            x.iter().zip(&decoded).map(|(x, q)| f(f64::from(*x), f64::from(*q)).powi(2)).sum()
        };
        let (signal, noise) = (sum(&|x, _| x), sum(&|x, q| x - q));
        prop_assert!((energy.signal - signal).abs() <= 1e-12 * signal);
        prop_assert!((energy.noise - noise).abs() <= 1e-12 * noise);
    }

    /// Stochastic rounding gives one of the two neighbours: never further than a step from the nearest.
    #[test]
    fn stochastic_rounding_stays_between_neighbours(format in formats(), x in moderate_rows(), seed in any::<u64>()) {
        let cast = Cast { format, scale_rounding: ScaleRounding::Rceil };
        let random = quantize(cast, ElementRounding::Stochastic { seed }, &x, 0).expect("finite");
        let width = format.element.spec().bits;
        let mut codes = vec![0; x.len()];
        unpack(&random.codes, width, &mut codes);
        let block = format.block.size();
        for ((x, codes), (scale, nearest)) in x.chunks(block).zip(codes.chunks(block)).zip(blocks(cast, &x)) {
            for ((x, code), nearest) in x.iter().zip(codes).zip(nearest) {
                let y = f64::from(*x / scale.to_f32());
                let value = |code| f64::from(format.element.decode(code));
                let (drawn, best) = (value(*code), value(nearest));
                // The same value, or y lies between the two.
                prop_assert!(drawn == best || (drawn - y) * (best - y) < 0.0, "{}: {} or {}", y, drawn, best);
            }
        }
    }
}

/// The mean over many draws is the value itself, also among subnormals: within four standard errors.
#[test]
fn stochastic_rounding_is_unbiased() {
    const DRAWS: usize = 1 << 16;
    for element in ElementType::ALL {
        let cast = Cast { format: MxFormat::new(element), scale_rounding: ScaleRounding::Rceil };
        let (max, smallest) = (element.spec().max, element.decode(1));
        for y in [0.3 * smallest, -0.8 * smallest, 1.5 * smallest, 0.137 * max, -0.42 * max, 0.9 * max] {
            // One element of each block is the largest value, so that the scale is 1.
            let x: Vec<f32> = (0..DRAWS).map(|i| if i % 32 == 0 { max } else { y }).collect();
            let seed = u64::from(y.to_bits());
            let Quantized { codes, scales, .. } =
                quantize(cast, ElementRounding::Stochastic { seed }, &x, 0).expect("finite");
            assert!(scales.iter().all(|scale| *scale == E8m0::ONE.0));
            let mut unpacked = vec![0; DRAWS];
            unpack(&codes, element.spec().bits, &mut unpacked);
            let draws: Vec<f64> = unpacked
                .iter()
                .enumerate()
                .filter(|(i, _)| i % 32 != 0)
                .map(|(_, code)| f64::from(element.decode(*code)))
                .collect();
            let n = draws.len() as f64;
            let mean = draws.iter().sum::<f64>() / n;
            let variance = draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / n;
            assert!(variance > 0.0, "{element:?} {y}: nothing is random");
            let error = (mean - f64::from(y)).abs();
            assert!(error <= 4.0 * (variance / n).sqrt(), "{element:?} {y}: mean {mean}");
        }
    }
}
