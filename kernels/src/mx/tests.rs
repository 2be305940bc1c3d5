//! The block loops, compiled for every instruction set, against the definitions in plain F64 arithmetic.

use super::block::{QuantizeBlock, QuantizeDequantize, QuantizeRows};
use super::random::Stream;
use super::{
    Block, Cast, E8m0, ElementRounding, ElementType, Energy, MxFormat, NonFinite, ScaleRounding, Specials,
    Values,
};
use crate::isa::Isa;

/// Blocks that together hold every F32 exponent with mantissas around every rounding boundary of every element, either
/// sign, and random bits; finite.
fn interesting_values() -> Vec<f32> {
    let mut values = Vec::new();
    // All ties and powers of two of elements with up to 7 mantissa bits, and their neighbours.
    for exponent in 0..=254_u32 {
        for step in 0..=128_u32 {
            for neighbour in [-1_i64, 0, 1] {
                let bits = (i64::from(exponent) << 23) + (i64::from(step) << 16) + neighbour;
                if (0..0x7f80_0000).contains(&bits) {
                    let sign = (exponent ^ step) << 31;
                    values.push(f32::from_bits(bits as u32 | sign));
                }
            }
        }
    }
    let stream = Stream::new(7);
    // Random bits, whose blocks are dominated by their largest value, and random mantissas within few binades.
    values.extend((0..1 << 16).map(|i| f32::from_bits(stream.bits(i))).filter(|x| x.is_finite()));
    for i in 0..1 << 16 {
        let bits = stream.bits(i ^ (1 << 40));
        let exponent = (i >> 7) % 240 + 1 + u64::from(bits >> 20 & 7);
        values.push(f32::from_bits(bits & 0x807f_ffff | (exponent as u32) << 23));
    }
    values.truncate(values.len() / 64 * 64);
    values
}

fn casts() -> impl Iterator<Item = Cast> {
    ElementType::ALL.into_iter().flat_map(|element| {
        [16, 32, 64].into_iter().flat_map(move |size| {
            let format = MxFormat { element, block: Block::along_k(size).expect("a block size") };
            ScaleRounding::ALL.map(|scale_rounding| Cast { format, scale_rounding })
        })
    })
}

fn power_of_two(exponent: i32) -> f64 {
    f64::from(exponent).exp2()
}

/// The shared exponent as its rule says it, before clamping to E8M0.
fn shared_exponent(element: ElementType, rounding: ScaleRounding, amax: f64) -> i32 {
    let spec = element.spec();
    let floor_log2 = |x: f64| (x.to_bits() >> 52) as i32 - 1023;
    let floor = floor_log2(amax);
    match rounding {
        ScaleRounding::Floor => floor - spec.emax,
        ScaleRounding::Ceil => floor + i32::from(amax > power_of_two(floor)) - spec.emax,
        ScaleRounding::Rceil => {
            let fits = |e: i32| amax <= f64::from(spec.max) * power_of_two(e);
            (floor - spec.emax - 1..).find(|e| fits(*e)).expect("some exponent fits")
        }
        ScaleRounding::Even | ScaleRounding::Mse => {
            let unit = power_of_two(floor - spec.mantissa_bits as i32);
            floor_log2((amax / unit).round_ties_even() * unit) - spec.emax
        }
    }
}

/// Codes and squared error of a block with shared exponent `e`.
fn encode(element: ElementType, x: &[f32], e: i32) -> (Vec<u8>, f64) {
    let scale = power_of_two(e);
    let codes: Vec<u8> = x.iter().map(|x| element.encode(f64::from(*x) / scale)).collect();
    let error = |(x, code): (&f32, &u8)| f64::from(*x) - f64::from(element.decode(*code)) * scale;
    let noise = x.iter().zip(&codes).map(error).map(|d| d * d).sum();
    (codes, noise)
}

/// A block by the definitions: candidates for the scale byte (one, or those of equal error up to rounding of the sum).
fn define(cast: Cast, x: &[f32]) -> Vec<(E8m0, Vec<u8>)> {
    let element = cast.format.element;
    let amax = x.iter().fold(0.0, |amax: f64, x| amax.max(f64::from(x.abs())));
    let start =
        if amax == 0.0 { -127 } else { shared_exponent(element, cast.scale_rounding, amax).clamp(-127, 127) };
    let range = if cast.scale_rounding == ScaleRounding::Mse {
        (start - 1).max(-127)..=(start + 1).min(127)
    } else {
        start..=start
    };
    let tried: Vec<_> = range.map(|e| (e, encode(element, x, e))).collect();
    let least = tried.iter().map(|(_, (_, noise))| *noise).fold(f64::INFINITY, f64::min);
    if tried.iter().any(|(e, (_, noise))| *e == start && *noise == least) {
        return vec![(E8m0((start + 127) as u8), encode(element, x, start).0)];
    }
    let good_enough = |noise: f64| noise <= least * (1.0 + 1e-12);
    let best = tried.into_iter().filter(|(_, (_, noise))| good_enough(*noise));
    best.map(|(e, (codes, _))| (E8m0((e + 127) as u8), codes)).collect()
}

fn available() -> impl Iterator<Item = Isa> {
    Isa::ALL.iter().copied().filter(|isa| isa.is_available())
}

struct Quantized {
    codes: Vec<u8>,
    scales: Vec<u8>,
    energy: Result<Energy, NonFinite>,
}

fn quantize(isa: Isa, cast: Cast, rounding: ElementRounding, bytes: &[u8], n: usize) -> Quantized {
    let mut codes = vec![0; cast.format.code_bytes(n)];
    let mut scales = vec![0; cast.format.scale_bytes(n)];
    let values = Values::F32(bytes);
    let work = QuantizeRows { rounding, values, first_index: 0, codes: &mut codes, scales: &mut scales };
    let energy = isa.quantize(cast, work);
    Quantized { codes, scales, energy }
}

#[test]
fn blocks_are_quantized_as_defined() {
    let values = interesting_values();
    for cast in casts() {
        let (size, spec) = (cast.format.block.size(), cast.format.element.spec());
        let mut out = vec![0.0; values.len()];
        Isa::best().quantize(cast, QuantizeDequantize { x: &values, out: &mut out });
        for (x, out) in values.chunks_exact(size).zip(out.chunks_exact(size)) {
            let mut codes = vec![0; size];
            let scale = Isa::best().quantize(cast, QuantizeBlock { x, codes: &mut codes });
            let defined = define(cast, x);
            let what = || format!("{} {} {x:?}", cast.format, cast.scale_rounding);
            assert!(
                defined.contains(&(scale, codes.clone())),
                "{}: {:?} not {defined:?}",
                what(),
                (scale, codes)
            );
            for (code, out) in codes.iter().zip(out) {
                let value =
                    f64::from(cast.format.element.decode(*code)) * power_of_two(i32::from(scale.0) - 127);
                assert_eq!((value as f32).to_bits(), out.to_bits(), "{}", what());
                assert!(cast.format.element.decode(*code).abs() <= spec.max, "{}", what());
            }
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let values = interesting_values();
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    for cast in casts() {
        for rounding in [ElementRounding::NearestEven, ElementRounding::Stochastic { seed: 3 }] {
            let portable = quantize(Isa::Portable, cast, rounding, &bytes, values.len());
            for isa in available() {
                let Quantized { codes, scales, energy } = quantize(isa, cast, rounding, &bytes, values.len());
                let what = format!("{isa:?} {} {} {rounding:?}", cast.format, cast.scale_rounding);
                assert!(scales == portable.scales, "scales: {what}");
                assert!(codes == portable.codes, "codes: {what}");
                assert_eq!(energy, portable.energy, "{what}");
            }
        }
        let mut portable = vec![0.0; values.len()];
        Isa::Portable.quantize(cast, QuantizeDequantize { x: &values, out: &mut portable });
        for isa in available() {
            let mut out = vec![0.0; values.len()];
            isa.quantize(cast, QuantizeDequantize { x: &values, out: &mut out });
            let same = out.iter().zip(&portable).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{isa:?} {} {}", cast.format, cast.scale_rounding);
        }
    }
}

/// `encode` against the definition of rounding to nearest: a search over all codes.
#[test]
fn encode_finds_the_nearest_value_ties_to_the_even_code() {
    let values = interesting_values();
    for element in ElementType::ALL {
        let spec = element.spec();
        let legal = |code: &u8| {
            let value = element.decode(*code);
            value.is_finite() && value >= -spec.max
        };
        let codes: Vec<u8> = (0..=spec.code_mask()).filter(legal).collect();
        // Around the element's range; beyond it everything saturates or vanishes.
        let near = values.iter().copied().filter(|x| x.abs() < 4.0 * spec.max && x.abs() > 1e-7);
        for x in near.chain([0.0, -0.0, f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, 1e-30, -1e-30])
        {
            let target = f64::from(x.clamp(-spec.max, spec.max));
            let distance = |code: u8| (f64::from(element.decode(code)) - target).abs();
            let least = codes.iter().map(|code| distance(*code)).fold(f64::INFINITY, f64::min);
            let code = element.encode(x);
            let nearest: Vec<u8> = codes.iter().copied().filter(|code| distance(*code) == least).collect();
            assert!(nearest.contains(&code), "{} {x:e}: {code:#x} not in {nearest:x?}", spec.name);
            // The two zeros are equally near; anything else is a tie between neighbours.
            let tie = nearest.iter().any(|other| element.decode(*other) != element.decode(code));
            assert!(!tie || code & 1 == 0, "{} {x:e}: {code:#x} of {nearest:x?}", spec.name);
            let negative = element.decode(code).is_sign_negative();
            let zero = element.decode(code) == 0.0;
            assert!(negative == x.is_sign_negative() || (zero && spec.is_integer()), "{} {x:e}", spec.name);
        }
    }
}

#[test]
fn nan_encodes_as_nan_where_there_is_one() {
    for element in ElementType::ALL {
        let value = element.decode(element.encode(f32::NAN));
        let has_nan = element.spec().specials != Specials::None;
        assert!(if has_nan { value.is_nan() } else { value == 0.0 }, "{element:?}: {value}");
    }
}

#[test]
fn special_codes_decode_as_the_specification_says() {
    assert_eq!(ElementType::Int8.decode(0x80), -2.0);
    assert_eq!(ElementType::Int8.decode(0x7f), 1.984_375);
    assert_eq!(ElementType::E4m3.decode(0x7e), 448.0);
    assert!(ElementType::E4m3.decode(0x7f).is_nan() && ElementType::E4m3.decode(0xff).is_nan());
    assert_eq!(ElementType::E5m2.decode(0x7b), 57344.0);
    assert_eq!(ElementType::E5m2.decode(0x7c), f32::INFINITY);
    assert_eq!(ElementType::E5m2.decode(0xfc), f32::NEG_INFINITY);
    assert!((0x7d..=0x7f).chain(0xfd..=0xff).all(|code| ElementType::E5m2.decode(code).is_nan()));
    assert!(ElementType::E2m1.decode(0x8).is_sign_negative());
    let magnitudes: Vec<f32> = (0..8).map(|code| ElementType::E2m1.decode(code)).collect();
    assert_eq!(magnitudes, [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
    let magnitudes: Vec<f32> = (0..8).map(|code| ElementType::E3m0.decode(code)).collect();
    assert_eq!(magnitudes, [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]);
    for element in ElementType::ALL {
        for code in 0..=255 {
            let value = element.values()[usize::from(code)];
            assert_eq!(value.to_bits(), element.decode(code).to_bits());
            assert_eq!(value.to_bits(), element.decode(code & element.spec().code_mask()).to_bits());
        }
    }
}

#[test]
fn every_e8m0_byte_is_its_power_of_two() {
    for byte in 0..=254 {
        let exponent = i32::from(byte) - 127;
        assert_eq!(f64::from(E8m0(byte).to_f32()), power_of_two(exponent));
        assert_eq!(f64::from(E8m0(byte).reciprocal().to_f32()), power_of_two(-exponent));
        assert_eq!(E8m0(byte).squared(), power_of_two(2 * exponent));
    }
    assert!(E8m0::NAN.to_f32().is_nan());
}
