// One tensor-core instruction, and floats as halves for it
#ifndef ORCD_MMA
#define ORCD_MMA
#include "types/blocks.cu"
#include "copy/copies.cu"

// c (16x8, float) += a (16x16, half) * b (16x8, half)
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    for (int h = 0; h < 2; h++) asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2 * h]), "r"(a[2 * h + 1]), "r"(h ? b1 : b0));
#endif
}

__device__ __forceinline__ u32 to_half_bits(float x) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x)); return h; }
// Two floats rounded to halves, the first in the low bits
__device__ __forceinline__ u32 pack_half2(float lo, float hi) {
#if __CUDA_ARCH__ >= 800
    u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r;
#else
    return to_half_bits(lo) | to_half_bits(hi) << 16;
#endif
}
// Four 8 x 8 tiles of halves from shared memory; lane i gives the address of row i % 8 of tile i / 8
__device__ __forceinline__ void load_tiles(u32* r, const u16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address_of(row)) : "memory");
}
__device__ __forceinline__ void load_tiles_transposed(u32* r, const u16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address_of(row)) : "memory");
}
#endif
