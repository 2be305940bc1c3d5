// Warpgroup matrix multiply-accumulate of Hopper: D[64, N] += A[64, K] * B[N, K]^T with FP32 accumulators.
//
// A comes from registers, where warp w of the warpgroup holds rows 16w .. 16w + 15 as an mma.sync A fragment, or from
// shared memory as B does: K-major, rows of 128 bytes in the 128-byte swizzle. Registers take some 20 clock cycles per
// instruction more. Thread `lane` of warp w holds of D, for j in 0 .. N / 8,
//   d[4j + 0], d[4j + 1]: row 16w + lane / 4,     columns 8j + 2 * (lane % 4) and the next one
//   d[4j + 2], d[4j + 3]: row 16w + lane / 4 + 8, the same columns.
// Between `wgmma_fence` and `wgmma_wait` the registers of A and D belong to the tensor core.
#pragma once

#include <cstdint>

namespace ptx {

/// What multiplies: 16 bits k16, or 8 bits k32; both read 32 bytes of each row of B.
enum class Operand { Bf16, E4m3 };

/// Describes a K-major operand at `shared` (1024-byte aligned): 8 rows of 128 bytes form a swizzle atom of 1024 bytes.
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t shared) {
    constexpr uint64_t SWIZZLE_128B = 1, ATOM_STRIDE = 1024 >> 4;
    return (SWIZZLE_128B << 62) | (ATOM_STRIDE << 32) | (uint64_t(1) << 16) | ((shared >> 4) & 0x3FFF);
}

/// The same, for a warp whose lanes all have the same address. An instruction takes descriptors from registers that all
/// lanes share; what comes from a shuffle goes there once, instead of anew before each of the instructions.
__device__ __forceinline__ uint64_t uniform_descriptor(uint32_t shared) {
    return swizzled_descriptor(__shfl_sync(0xFFFFFFFFu, shared, 0));
}

/// What to add to a descriptor to move by `bytes` (a multiple of 16).
__host__ __device__ constexpr uint64_t descriptor_step(uint32_t bytes) { return bytes >> 4; }

/// Orders earlier register writes before the wgmmas that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// Closes the group of the wgmmas so far.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until all groups but the newest `PENDING` are done.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/// Keeps the compiler from moving uses of an accumulator across this point.
template <int COUNT>
__device__ __forceinline__ void pin(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

/// One instruction on N columns. `d` is overwritten where `accumulate` is false.
template <Operand OPERAND, int N>
struct Wgmma;

// Operand numbers and lists of the accumulators, ten and eight at a time.
#define MX_R10(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define MX_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
#define MX_R32 MX_R0 MX_R10(1) MX_R10(2) "%30, %31"
#define MX_R64 MX_R0 MX_R10(1) MX_R10(2) MX_R10(3) MX_R10(4) MX_R10(5) "%60, %61, %62, %63"
#define MX_R96 \
    MX_R0 MX_R10(1) MX_R10(2) MX_R10(3) MX_R10(4) MX_R10(5) MX_R10(6) MX_R10(7) MX_R10(8) "%90, %91, %92, %93, %94, %95"
#define MX_R128                                                                                             \
    MX_R0 MX_R10(1) MX_R10(2) MX_R10(3) MX_R10(4) MX_R10(5) MX_R10(6) MX_R10(7) MX_R10(8) MX_R10(9) MX_R10( \
        10) MX_R10(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define MX_D8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MX_D32(i) MX_D8(i), MX_D8(i + 8), MX_D8(i + 16), MX_D8(i + 24)
#define MX_D64 MX_D32(0), MX_D32(32)
#define MX_D96 MX_D64, MX_D32(64)
#define MX_D128 MX_D64, MX_D32(64), MX_D32(96)

#define MX_WGMMA(OPERAND, SHAPE_TYPES, N, COUNT, REGISTERS, LIST, A0, A1, A2, A3, B, P, TAIL)                         \
    template <>                                                                                                       \
    struct Wgmma<OPERAND, N> {                                                                                        \
        static __device__ __forceinline__ void run(                                                                   \
            float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, bool accumulate) {                                 \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                             \
                         "wgmma.mma_async.sync.aligned." SHAPE_TYPES " {" REGISTERS "}, {%" #A0 ", %" #A1 ", %" #A2   \
                         ", %" #A3 "}, %" #B ", p, 1, 1" TAIL ";\n}"                                                  \
                         : LIST                                                                                       \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(uint32_t(accumulate)));            \
        }                                                                                                             \
    }

MX_WGMMA(Operand::Bf16, "m64n64k16.f32.bf16.bf16", 64, 32, MX_R32, MX_D32(0), 32, 33, 34, 35, 36, 37, ", 0");
MX_WGMMA(Operand::Bf16, "m64n128k16.f32.bf16.bf16", 128, 64, MX_R64, MX_D64, 64, 65, 66, 67, 68, 69, ", 0");
MX_WGMMA(Operand::Bf16, "m64n256k16.f32.bf16.bf16", 256, 128, MX_R128, MX_D128, 128, 129, 130, 131, 132, 133, ", 0");


MX_WGMMA(Operand::E4m3, "m64n128k32.f32.e4m3.e4m3", 128, 64, MX_R64, MX_D64, 64, 65, 66, 67, 68, 69, "");

/// As `Wgmma`, with A in shared memory.
template <Operand OPERAND, int N>
struct SharedWgmma;

#define MX_SHARED_WGMMA(OPERAND, SHAPE_TYPES, N, COUNT, REGISTERS, LIST, A, B, P, TAIL)                                    \
    template <>                                                                                                            \
    struct SharedWgmma<OPERAND, N> {                                                                                       \
        static __device__ __forceinline__ void run(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {           \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                                 \
                         "wgmma.mma_async.sync.aligned." SHAPE_TYPES " {" REGISTERS "}, %" #A ", %" #B ", p, 1, 1" TAIL ";\n}" \
                         : LIST                                                                                            \
                         : "l"(a), "l"(b), "r"(uint32_t(accumulate)));                                                     \
        }                                                                                                                  \
    }

MX_SHARED_WGMMA(Operand::Bf16, "m64n128k16.f32.bf16.bf16", 128, 64, MX_R64, MX_D64, 64, 65, 66, ", 0, 0");
MX_SHARED_WGMMA(Operand::E4m3, "m64n192k32.f32.e4m3.e4m3", 192, 96, MX_R96, MX_D96, 96, 97, 98, "");

#undef MX_SHARED_WGMMA
#undef MX_WGMMA
#undef MX_D128
#undef MX_D96
#undef MX_D64
#undef MX_D32
#undef MX_D8
#undef MX_R128
#undef MX_R96
#undef MX_R64
#undef MX_R32
#undef MX_R0
#undef MX_R10

}  // namespace ptx
