//! 4-, 6- and 8-bit codes <-> bytes: a little-endian bit stream, code `i` at bits `[i * bits, (i + 1) * bits)`.
//!
//! Eight codes always end on a byte: they are `bits` bytes, moved together as the lanes of one 64-bit word.

/// Packs one code per byte into a little-endian bit stream. High bits of the codes beyond `bits` are ignored.
///
/// # Panics
/// `bits` is not 4, 6 or 8, the number of codes is not a multiple of 8, or `out` is not `codes.len() * bits / 8` long.
pub fn pack(codes: &[u8], bits: u32, out: &mut [u8]) {
    pack_inlined(codes, bits, out);
}

/// [`pack`], compiled for the caller's instruction set.
#[inline(always)]
pub(super) fn pack_inlined(codes: &[u8], bits: u32, out: &mut [u8]) {
    check(codes.len(), bits, out.len());
    let (codes, _) = codes.as_chunks();
    match bits {
        4 => codes.iter().zip(out.as_chunks_mut().0).for_each(|(c, o)| *o = pack4(*c)),
        6 => {
            // Four groups of 48 bits are three words: whole stores instead of single bytes.
            let (fours, rest) = codes.as_chunks();
            let (words, bytes) = out.split_at_mut(fours.len() * 24);
            fours.iter().zip(words.as_chunks_mut().0).for_each(|(c, o)| *o = pack6_words(c));
            rest.iter().zip(bytes.as_chunks_mut().0).for_each(|(c, o)| *o = pack6(*c));
        }
        _ => out.copy_from_slice(codes.as_flattened()),
    }
}

/// Reverse of [`pack`]: one code per byte, zero-extended.
///
/// # Panics
/// As [`pack`].
pub fn unpack(packed: &[u8], bits: u32, codes: &mut [u8]) {
    check(codes.len(), bits, packed.len());
    let (codes, _) = codes.as_chunks_mut();
    match bits {
        4 => codes.iter_mut().zip(packed.as_chunks().0).for_each(|(c, p)| *c = unpack4(*p)),
        6 => codes.iter_mut().zip(packed.as_chunks().0).for_each(|(c, p)| *c = unpack6(*p)),
        _ => codes.as_flattened_mut().copy_from_slice(packed),
    }
}

#[inline(always)]
fn check(codes: usize, bits: u32, packed_bytes: usize) {
    assert!(matches!(bits, 4 | 6 | 8), "codes have 4, 6 or 8 bits, not {bits}");
    assert!(codes.is_multiple_of(8), "{codes} codes of {bits} bits are not packed in groups of 8");
    assert!(
        codes / 8 * bits as usize == packed_bytes,
        "{codes} codes of {bits} bits do not take {packed_bytes} bytes"
    );
}

#[inline(always)]
fn pack4(codes: [u8; 8]) -> [u8; 4] {
    let w = u64::from_le_bytes(codes) & 0x0f0f_0f0f_0f0f_0f0f;
    let w = (w | w >> 4) & 0x00ff_00ff_00ff_00ff;
    let w = (w | w >> 8) & 0x0000_ffff_0000_ffff;
    ((w | w >> 16) as u32).to_le_bytes()
}

#[inline(always)]
fn unpack4(packed: [u8; 4]) -> [u8; 8] {
    let w = u64::from(u32::from_le_bytes(packed));
    let w = (w | w << 16) & 0x0000_ffff_0000_ffff;
    let w = (w | w << 8) & 0x00ff_00ff_00ff_00ff;
    ((w | w << 4) & 0x0f0f_0f0f_0f0f_0f0f).to_le_bytes()
}

// Six bits are moved by less than their own width, so each step masks the two halves apart.

/// Eight codes in the low 48 bits.
#[inline(always)]
fn squeeze6(codes: [u8; 8]) -> u64 {
    let w = u64::from_le_bytes(codes);
    let w = (w & 0x003f_003f_003f_003f) | (w >> 2 & 0x0fc0_0fc0_0fc0_0fc0);
    let w = (w & 0x0000_0fff_0000_0fff) | (w >> 4 & 0x00ff_f000_00ff_f000);
    (w & 0x0000_0000_00ff_ffff) | (w >> 8 & 0x0000_ffff_ff00_0000)
}

#[inline(always)]
fn pack6(codes: [u8; 8]) -> [u8; 6] {
    let [b0, b1, b2, b3, b4, b5, ..] = squeeze6(codes).to_le_bytes();
    [b0, b1, b2, b3, b4, b5]
}

#[inline(always)]
fn pack6_words(codes: &[[u8; 8]; 4]) -> [u8; 24] {
    let [a, b, c, d] = codes.map(squeeze6);
    let words = [a | b << 48, b >> 16 | c << 32, c >> 32 | d << 16];
    let mut bytes = [0; 24];
    bytes.as_chunks_mut().0.iter_mut().zip(words).for_each(|(out, word)| *out = word.to_le_bytes());
    bytes
}

#[inline(always)]
fn unpack6(packed: [u8; 6]) -> [u8; 8] {
    let [b0, b1, b2, b3, b4, b5] = packed;
    let w = u64::from_le_bytes([b0, b1, b2, 0, b3, b4, b5, 0]);
    let w = (w & 0x0000_0fff_0000_0fff) | (w & 0x00ff_f000_00ff_f000) << 4;
    ((w & 0x003f_003f_003f_003f) | (w & 0x0fc0_0fc0_0fc0_0fc0) << 2).to_le_bytes()
}
