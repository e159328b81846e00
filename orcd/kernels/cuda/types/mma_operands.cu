// Halves of the cache, and the tensor-core instruction with its operands one by one
#include "math/mma.cu"
typedef u16 f16;  // the bits of an IEEE half

// what rounding to halves lost, as halves again: x = hi + lo to about 22 bits
__device__ __forceinline__ u32 pack_rest(float lo, float hi, u32 rounded) {
    return pack_half2(lo - half_bits(rounded), hi - half_bits(rounded >> 16));
}

// d += a b: a is 16 x 16 (rows g and g + 8, columns 2t and 2t + 8), b is 16 x 8, d is 16 x 8 in float32; g = lane / 4, t = lane % 4
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 a[4] = {a0, a1, a2, a3};
    mma(d, a, b0, b1);
}
