// Tensor-core fragments and FP16 pairs
#include "mma.cu"
typedef unsigned short f16;  // the bits of an IEEE half
typedef long long i64;

__device__ __forceinline__ f16 to_f16(float x) {
    f16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float from_f16(f16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
    return r;
}
// two floats as a pair of halves, the first one in the low 16 bits
__device__ __forceinline__ u32 pack_f16(float lo, float hi) {
#if __CUDA_ARCH__ >= 800
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
#else
    return to_f16(lo) | (u32)to_f16(hi) << 16;
#endif
}
// what rounding to halves lost, as halves again: x = hi + lo to about 22 bits
__device__ __forceinline__ u32 pack_rest(float lo, float hi, u32 rounded) {
    return pack_f16(lo - from_f16((f16)rounded), hi - from_f16((f16)(rounded >> 16)));
}

// d += a b: a is 16 x 16 (rows g and g + 8, columns 2t and 2t + 8), b is 16 x 8, d is 16 x 8 in float32; g = lane / 4, t = lane % 4
__device__ __forceinline__ void mma(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else  // Turing multiplies 16 x 8 by 8 x 8
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}
