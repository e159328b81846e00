// One tensor-core instruction, and integers as pairs of halves for it
#ifndef ORCD_MMA
#define ORCD_MMA
#include "blocks.cu"

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

// Halves whose last bits are an integer are exact: 0x6400 + n is 1024 + n, and the same bits four places up are 1024 + 16 n.
__device__ __forceinline__ u32 minus_half2(u32 v, u32 b) { u32 r; asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(b)); return r; }
template<int BIAS> __device__ __forceinline__ u32 low_halves(u32 v) { return minus_half2(v, (0x6400 + BIAS) * 0x10001); }
template<int BIAS> __device__ __forceinline__ u32 high_halves(u32 v) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(v), "r"(0x2C002C00), "r"((0xD400 + 16 * BIAS) * 0x10001));
    return r;
}
// Bytes 0, 1 (or others) of v minus bias
template<int BIAS> __device__ __forceinline__ u32 byte_halves(u32 v, u32 select) {
    return minus_half2(__byte_perm(v, 0x64646464, select), (0x6400 + BIAS) * 0x10001);
}
__device__ __forceinline__ u32 to_half_bits(float x) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x)); return h; }
#endif
