#include "blocks.cu"
#include "reduce.cu"

// Row t of x to halves times a power of two that puts the largest magnitude into [2^13, 2^14), so that nothing overflows and
// little underflows. inv[t] is the inverse. sums: sums of 32 halves each. Halves from n to ld are zero. One block a row.
extern "C" __global__ void __launch_bounds__(256) to_half(const float* x, u16* half, float* inv, float* sums,
    int n, long long ldx, int ld) {
    __shared__ float top[8];
    int t = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    x += t * ldx;
    float m = 0;
    for (int i = threadIdx.x; i < n; i += 256) m = fmaxf(m, fabsf(x[i]));
    for (int d = 16; d; d >>= 1) m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFF, m, d));
    if (lane == 0) top[warp] = m;
    __syncthreads();
    for (int i = 0; i < 8; i++) m = fmaxf(m, top[i]);
    int e = __float_as_uint(m) >> 23;
    int s = e == 255 ? 127 : min(253, 267 - e);         // biased exponent of the scale; a row with an infinity stays as it is
    float scale = __uint_as_float(s << 23);
    if (threadIdx.x == 0) inv[t] = __uint_as_float((254 - s) << 23);
    for (int i = threadIdx.x; i < ld; i += 256) {       // ld is a multiple of 64: whole warps, each with 32 neighbours
        u16 h;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(i < n ? x[i] * scale : 0.f));
        half[(long long)t * ld + i] = h;
        float sum = warp_sum(half_bits(h));
        if (lane == 0) sums[(long long)t * (ld / 32) + i / 32] = sum;
    }
}
