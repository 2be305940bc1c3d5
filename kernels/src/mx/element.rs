//! One element: code <-> value.

use super::{ElementSpec, ElementType, Specials};

impl ElementSpec {
    /// Whether the element is a two's complement integer.
    pub const fn is_integer(&self) -> bool {
        self.exponent_bits == 0
    }

    /// Exponent of the smallest normal value (floats).
    pub const fn emin(&self) -> i32 {
        1 - self.bias
    }

    /// Sign bit and everything below it.
    pub const fn code_mask(&self) -> u8 {
        (0xff_u16 >> (8 - self.bits)) as u8
    }

    /// The sign bit.
    const fn sign_bit(&self) -> u8 {
        1 << (self.bits - 1)
    }
}

/// 2^`exponent`, exactly, for exponents of normal F32 values.
pub(super) const fn exp2(exponent: i32) -> f32 {
    assert!(exponent >= -126 && exponent <= 127, "2^exponent is a normal F32 value");
    f32::from_bits(((exponent + 127) as u32) << 23)
}

impl ElementType {
    /// The value of `code` (its low `bits` bits; the others are ignored). Exact: every element value is an F32 value.
    /// The integer code without a counterpart (-128 for INT8) is legal input: it decodes to -2.0.
    pub const fn decode(self, code: u8) -> f32 {
        let spec = self.spec();
        let code = code & spec.code_mask();
        if spec.is_integer() {
            let unused = 8 - spec.bits;
            let integer = ((code << unused) as i8) >> unused;
            return integer as f32 * exp2(-(spec.mantissa_bits as i32));
        }
        let mantissa = code & ((1 << spec.mantissa_bits) - 1);
        let top_exponent = (1 << spec.exponent_bits) - 1;
        let exponent = (code >> spec.mantissa_bits) & top_exponent;
        let magnitude = match spec.specials {
            Specials::Ieee if exponent == top_exponent && mantissa == 0 => f32::INFINITY,
            Specials::Ieee if exponent == top_exponent => f32::NAN,
            Specials::NanOnly if code | spec.sign_bit() == spec.code_mask() => f32::NAN,
            _ if exponent == 0 => mantissa as f32 * exp2(spec.emin() - spec.mantissa_bits as i32),
            _ => {
                let significand = (1 << spec.mantissa_bits) | mantissa;
                significand as f32 * exp2(exponent as i32 - spec.bias - spec.mantissa_bits as i32)
            }
        };
        if code & spec.sign_bit() == 0 { magnitude } else { -magnitude }
    }

    /// The code of the nearest value, ties to the even code; magnitudes beyond the largest finite value saturate to it
    /// (OCP MX v1.0, section 5.3), subnormals are kept, and floats keep the sign of zero. Integers stay within
    /// ±(2^(bits-1) - 1). NaN becomes the element's NaN, or 0 where there is none.
    ///
    /// This is the definition that the block loops are held to. It takes F32 and F64 alike.
    pub fn encode(self, value: impl Into<f64>) -> u8 {
        let spec = self.spec();
        let value: f64 = value.into();
        if value.is_nan() {
            return match spec.specials {
                Specials::None => 0,
                Specials::NanOnly | Specials::Ieee => spec.code_mask() & !spec.sign_bit(),
            };
        }
        let magnitude = value.abs().min(f64::from(spec.max));
        let mantissa_bits = spec.mantissa_bits as i32;
        if spec.is_integer() {
            let integer = (magnitude * f64::from(exp2(mantissa_bits))).round_ties_even() as i8;
            let signed = if value.is_sign_negative() { -integer } else { integer };
            return signed as u8 & spec.code_mask();
        }
        // Below the normal range the exponent field of an F64, subnormals included, is less than `emin`.
        let exponent = ((magnitude.to_bits() >> 52) as i32 - 1023).max(spec.emin());
        let steps = magnitude * f64::from(exp2(mantissa_bits - exponent));
        let below = steps.floor();
        // Codes of one sign ascend with their values across binades, so "one code up" is always "the next value".
        let code = (((exponent - spec.emin()) as u8) << spec.mantissa_bits) + below as u8;
        let rest = steps - below;
        let up = rest > 0.5 || (rest == 0.5 && code & 1 == 1);
        let sign = if value.is_sign_negative() { spec.sign_bit() } else { 0 };
        sign | (code + u8::from(up))
    }

    /// Value of every code: entry `c` is `decode(c)`.
    pub const fn values(self) -> &'static [f32; 256] {
        const fn table(element: ElementType) -> [f32; 256] {
            let mut values = [0.0; 256];
            let mut code = 0;
            while code < 256 {
                values[code] = element.decode(code as u8);
                code += 1;
            }
            values
        }
        const TABLES: [[f32; 256]; ElementType::ALL.len()] = {
            let mut tables = [[0.0; 256]; ElementType::ALL.len()];
            let mut i = 0;
            while i < tables.len() {
                assert!(
                    ElementType::ALL[i] as usize == i,
                    "ALL lists the element types in declaration order"
                );
                tables[i] = table(ElementType::ALL[i]);
                i += 1;
            }
            tables
        };
        static VALUES: [[f32; 256]; ElementType::ALL.len()] = TABLES;
        &VALUES[self as usize]
    }
}
