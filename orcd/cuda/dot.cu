// Dot products of R rows of a quantised matrix with one vector, by one warp
#ifndef ORCD_DOT
#define ORCD_DOT
#include "blocks.cu"

__device__ __forceinline__ float warp_sum(float v) {
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xFFFFFFFF, v, d);
    return v;
}

// x[i..i+3], zero from n on; `wide`: x is 16-byte aligned
__device__ __forceinline__ float4 load_x(const float* x, int i, int n, bool wide) {
    if (wide && i + 3 < n) return *(const float4*)(x + i);
    return {i < n ? x[i] : 0, i + 1 < n ? x[i + 1] : 0, i + 2 < n ? x[i + 2] : 0, i + 3 < n ? x[i + 3] : 0};
}
__device__ __forceinline__ float dot4(const float* w, float4 x) { return fmaf(w[3], x.w, fmaf(w[2], x.z, fmaf(w[1], x.y, w[0] * x.x))); }

// sum[r] = row[r] . x over this lane's octets. One step of a warp covers 256 weights; U steps are in flight at once.
// A lane beyond the row's end reads the row's start again and multiplies it by zero: no branch, so the loads overlap.
template<int T, int R, int U> __device__ __forceinline__ void dot_rows(const u8* const (&row)[R], const float* x, int n, bool wide, float (&sum)[R]) {
    int lane = threadIdx.x & 31, u = lane & 7, start = octet_start<T>(u);
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = 0;
    for (int base = lane / 8; base < (n + 63) / 64; base += 4 * U) {
#pragma unroll
        for (int k = 0; k < U; k++) {
            int i = 64 * (base + 4 * k) + start;
            bool in = i < n;
            float4 xa = load_x(x, i, n, wide), xb = load_x(x, i + Type<T>::delta, n, wide);
            float sa = (xa.x + xa.y) + (xa.z + xa.w), sb = (xb.x + xb.y) + (xb.z + xb.w);
#pragma unroll
            for (int r = 0; r < R; r++) {
                Eight e = eight<T>(row[r], in ? base + 4 * k : 0, in ? u : u & 3, n);
                sum[r] = fmaf(e.da, dot4(e.a, xa), sum[r]);
                sum[r] = fmaf(e.db, dot4(e.b, xb), sum[r]);
                if (Type<T>::mins) sum[r] = fmaf(e.mb, sb, fmaf(e.ma, sa, sum[r]));
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = warp_sum(sum[r]);
}
#endif
