//! Kinds of KV cache on the device: the kernels for each, and its memory. Layouts: `kv.cuh` and `kv_mx.cuh`.

use super::address;
use crate::backend::{Heads, KV_BLOCK_TOKENS, PagedKv};
use crate::buffer::Dtype;
use crate::cuda::DevicePtr;
use crate::kv_cache_dtype::KvCacheDtype;

/// The kernels for heads of `dim` elements in a cache of `dtype`, by name.
#[derive(Debug)]
pub(super) struct KvKernels {
    dtype: KvCacheDtype,
    dim: usize,
    pub(super) rope: &'static str,
    pub(super) decode: &'static str,
    pub(super) prefill: &'static str,
    /// Whether `prefill` is of `attention_prefill_wgmma.cu`; else of `attention_prefill.cuh`.
    pub(super) has_wgmma: bool,
    /// What turns the cache into the BF16 one that `prefill` reads, where it does not read this one.
    pub(super) expand: Option<&'static str>,
}

/// A row of [`KERNELS`]; `$infix` is the type's part of the names.
macro_rules! kernels {
    ($dtype:ident, $infix:literal, $dim:literal, prefill) => {
        kernels!($dtype, $infix, $dim, concat!("ops_attention_prefill_", $infix, $dim), false, None)
    };
    ($dtype:ident, $infix:literal, $dim:literal, wgmma) => {
        kernels!($dtype, $infix, $dim, concat!("ops_attention_prefill_wgmma_", $dim), true, None)
    };
    ($dtype:ident, $infix:literal, $dim:literal, expanded_wgmma) => {
        kernels!(
            $dtype,
            $infix,
            $dim,
            concat!("ops_attention_prefill_wgmma_", $dim),
            true,
            Some(concat!("ops_kv_expand_", $infix, $dim))
        )
    };
    ($dtype:ident, $infix:literal, $dim:literal, $prefill:expr, $has_wgmma:literal, $expand:expr) => {
        KvKernels {
            dtype: KvCacheDtype::$dtype,
            dim: $dim,
            rope: concat!("ops_rope_and_cache_", $infix, $dim),
            decode: concat!("ops_attention_decode_", $infix, $dim),
            prefill: $prefill,
            has_wgmma: $has_wgmma,
            expand: $expand,
        }
    };
}

const KERNELS: [KvKernels; 17] = [
    kernels!(Bf16, "", 16, prefill),
    kernels!(Bf16, "", 32, prefill),
    kernels!(Bf16, "", 64, wgmma),
    kernels!(Bf16, "", 96, prefill),
    kernels!(Bf16, "", 128, wgmma),
    kernels!(Bf16, "", 256, prefill),
    kernels!(Mxfp8, "mxfp8_", 32, prefill),
    kernels!(Mxfp8, "mxfp8_", 64, expanded_wgmma),
    kernels!(Mxfp8, "mxfp8_", 128, expanded_wgmma),
    kernels!(Mxfp8, "mxfp8_", 256, prefill),
    kernels!(Mxint8, "mxint8_", 32, prefill),
    kernels!(Mxint8, "mxint8_", 64, expanded_wgmma),
    kernels!(Mxint8, "mxint8_", 128, expanded_wgmma),
    kernels!(Mxint8, "mxint8_", 256, prefill),
    kernels!(Mxfp4, "mxfp4_", 64, expanded_wgmma),
    kernels!(Mxfp4, "mxfp4_", 128, expanded_wgmma),
    kernels!(Mxfp4, "mxfp4_", 256, prefill),
];

impl KvKernels {
    /// Those for `dim` and `dtype`, if there are.
    pub(super) fn find(dtype: KvCacheDtype, dim: usize) -> Option<&'static Self> {
        KERNELS.iter().find(|kernels| kernels.dtype == dtype && kernels.dim == dim)
    }

    /// Whether these are the ones for `dim` and `dtype`.
    pub(super) fn are_for(&self, dtype: KvCacheDtype, dim: usize) -> bool {
        (self.dtype, self.dim) == (dtype, dim)
    }
}

/// Bytes of the keys, or of the values, of one head in a block of the cache.
pub(super) fn head_block_bytes(dtype: KvCacheDtype, dim: usize) -> usize {
    let elements = KV_BLOCK_TOKENS * dim;
    match dtype.cast() {
        Some(cast) => cast.format.code_bytes(elements) + cast.format.scale_bytes(elements),
        None => elements * Dtype::Bf16.size_bytes(),
    }
}

/// Bytes of one block of a layer's cache of `dtype`, keys and values.
///
/// # Errors
/// Why there is none for these heads.
pub(crate) fn kv_block_bytes(heads: Heads, dtype: KvCacheDtype) -> Result<usize, String> {
    if KvKernels::find(dtype, heads.dim).is_some() {
        return Ok(2 * heads.kv * head_block_bytes(dtype, heads.dim));
    }
    let list = |known: Vec<String>| known.join(", ");
    let dims: Vec<_> = KERNELS.iter().filter(|k| k.dtype == dtype).map(|k| k.dim.to_string()).collect();
    if dims.is_empty() {
        let mut known: Vec<_> = KERNELS.iter().map(|kernels| kernels.dtype.to_string()).collect();
        known.dedup();
        return Err(format!("a KV cache of {dtype}; it has {}", list(known)));
    }
    Err(format!("heads of {} elements in a KV cache of {dtype}; it has {}", heads.dim, list(dims)))
}

/// The element type of the buffers of a cache.
pub(crate) fn kv_buffer_dtype(dtype: KvCacheDtype) -> Dtype {
    if dtype.cast().is_some() { Dtype::U8 } else { Dtype::Bf16 }
}

/// Where keys and values of a cache are.
///
/// # Panics
/// The buffers are not of this device, or too small for `heads`.
#[track_caller]
pub(super) fn kv_addresses(cache: &PagedKv, heads: Heads) -> [DevicePtr; 2] {
    let dtype = kv_buffer_dtype(cache.dtype);
    let elements = cache.blocks * heads.kv * head_block_bytes(cache.dtype, heads.dim) / dtype.size_bytes();
    [address(&cache.k, dtype, elements), address(&cache.v, dtype, elements)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_with_what_there_is() {
        let heads = |dim| Heads { q: 8, kv: 2, dim };
        assert_eq!(kv_block_bytes(heads(128), KvCacheDtype::Bf16), Ok(2 * 2 * 16 * 128 * 2));
        assert_eq!(kv_block_bytes(heads(128), KvCacheDtype::Mxfp8), Ok(2 * 2 * 16 * (128 + 4)));
        assert_eq!(kv_block_bytes(heads(64), KvCacheDtype::Mxfp4), Ok(2 * 2 * 16 * (32 + 2)));
        let error = kv_block_bytes(heads(128), KvCacheDtype::F32).unwrap_err();
        assert_eq!(error, "a KV cache of f32; it has bf16, mxfp8, mxint8, mxfp4");
        let error = kv_block_bytes(heads(96), KvCacheDtype::Mxfp4).unwrap_err();
        assert_eq!(error, "heads of 96 elements in a KV cache of mxfp4; it has 64, 128, 256");
    }

    #[test]
    fn kernels_are_named_as_their_files_say() {
        let kernels = KvKernels::find(KvCacheDtype::Mxint8, 64).expect("kernels for mxint8");
        assert_eq!(kernels.rope, "ops_rope_and_cache_mxint8_64");
        assert_eq!((kernels.prefill, kernels.has_wgmma), ("ops_attention_prefill_wgmma_64", true));
        assert_eq!(kernels.expand, Some("ops_kv_expand_mxint8_64"));
        let kernels = KvKernels::find(KvCacheDtype::Bf16, 96).expect("kernels for bf16");
        assert_eq!(kernels.decode, "ops_attention_decode_96");
        assert_eq!((kernels.prefill, kernels.has_wgmma), ("ops_attention_prefill_96", false));
    }
}
