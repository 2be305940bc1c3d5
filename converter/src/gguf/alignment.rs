//! `general.alignment`, read before candle parses the file: candle divides by it.

use std::io::{BufRead, Seek};

/// candle itself refuses arrays in arrays long before this depth.
const MAX_DEPTH: usize = 64;

/// Whether the file says that tensors are aligned to 0 bytes. What else is wrong with it, candle says.
pub(super) fn is_zero(reader: impl BufRead + Seek) -> bool {
    Walk { reader, wide: true }.find().is_some_and(|alignment| alignment.iter().all(|byte| *byte == 0))
}

struct Walk<R> {
    reader: R,
    /// Counts and lengths take 8 bytes; 4 in version 1.
    wide: bool,
}

impl<R: BufRead + Seek> Walk<R> {
    /// The bytes of the value; `None` if there is none or the file is no GGUF file up to there.
    fn find(&mut self) -> Option<Vec<u8>> {
        // The magic is candle's to check.
        let _magic = self.u32()?;
        self.wide = self.u32()? != 1;
        let _tensors = self.count()?;
        let mut found = None;
        for _ in 0..self.count()? {
            let key_bytes = self.count()?;
            let is_alignment = key_bytes == 17 && self.bytes(17)? == b"general.alignment";
            if key_bytes != 17 {
                self.skip(key_bytes)?;
            }
            let kind = self.u32()?;
            match fixed_size(kind) {
                // Of several values the last one counts, as for candle.
                Some(size) if is_alignment => found = Some(self.bytes(size as usize)?),
                _ => self.skip_value(kind, 0)?,
            }
        }
        found
    }

    fn skip_value(&mut self, kind: u32, depth: usize) -> Option<()> {
        match (kind, fixed_size(kind)) {
            (_, Some(size)) => self.skip(size),
            (8, None) => {
                let length = self.count()?;
                self.skip(length)
            }
            (9, None) if depth < MAX_DEPTH => {
                let (kind, count) = (self.u32()?, self.count()?);
                match fixed_size(kind) {
                    Some(size) => self.skip(count.checked_mul(size)?),
                    None => (0..count).try_for_each(|_| self.skip_value(kind, depth + 1)),
                }
            }
            _ => None,
        }
    }

    fn skip(&mut self, bytes: u64) -> Option<()> {
        self.reader.seek_relative(i64::try_from(bytes).ok()?).ok()
    }

    fn bytes(&mut self, count: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.reader.read_exact(&mut bytes).ok()?;
        Some(bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.bytes(4)?.try_into().ok().map(u32::from_le_bytes)
    }

    fn count(&mut self) -> Option<u64> {
        if self.wide {
            self.bytes(8)?.try_into().ok().map(u64::from_le_bytes)
        } else {
            self.u32().map(u64::from)
        }
    }
}

/// Bytes of a value that is neither a string nor an array.
fn fixed_size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}
