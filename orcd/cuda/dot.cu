// Dot products of R rows of a quantised matrix with one vector, by one warp (or a part of them, by one of several warps)
#ifndef ORCD_DOT
#define ORCD_DOT
#include "blocks.cu"

__device__ __forceinline__ float warp_sum(float v) {
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xFFFFFFFF, v, d);
    return v;
}
__device__ __forceinline__ float dot4(const float* w, float4 x) { return fmaf(w[3], x.w, fmaf(w[2], x.z, fmaf(w[1], x.y, w[0] * x.x))); }

// x[i..i+3]. WIDE: x is 16-byte aligned. Plain types may end within the four.
template<int T, bool WIDE> __device__ __forceinline__ float4 load_x(const float* x, int i, int n) {
    if (is_plain<T>()) return {i < n ? x[i] : 0, i + 1 < n ? x[i + 1] : 0, i + 2 < n ? x[i + 2] : 0, i + 3 < n ? x[i + 3] : 0};
    if (WIDE) return *(const float4*)(x + i);
    return {x[i], x[i + 1], x[i + 2], x[i + 3]};
}

// sum[r] = row[r] . x over this lane's octets. One step of a warp covers 256 weights; the loads of U steps are issued before the first is
// used.
// A lane beyond the row's end reads the row's start again and multiplies it by zero: no branch stands between the loads.
// With several warps a row, `part` of `parts` takes every parts-th group of U steps.
template<int T, int R, int U, bool WIDE>
__device__ __forceinline__ void dot_rows(const u8* const (&row)[R], const float* x, int n, int part, int parts, float (&sum)[R]) {
    const int lane = threadIdx.x & 31, u = lane & 7;
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = 0;
    for (int base = lane / 8 + 4 * U * part; base - lane / 8 < (n + 63) / 64; base += 4 * U * parts) {
        Unpack<T> w[U][R];
        float4 xa[U], xb[U];
#pragma unroll
        for (int k = 0; k < U; k++) {
            bool in = 64 * (base + 4 * k) + octet_start<T>(u) < n;
            int span = in ? base + 4 * k : 0, v = in ? u : u & 3, i = 64 * span + octet_start<T>(v);
#pragma unroll
            for (int r = 0; r < R; r++) w[k][r].load(row[r], span, v, n);
            xa[k] = load_x<T, WIDE>(x, i, n); xb[k] = load_x<T, WIDE>(x, i + Type<T>::delta, n);
            if (!in) xa[k] = xb[k] = {0, 0, 0, 0};
        }
        __syncwarp();       // the compiler may not move a load below this line: all of them are on their way before the first is used
#pragma unroll
        for (int k = 0; k < U; k++) {
            int span = base + 4 * k;            // its lowest bits decide how a K block is decoded
            float sa = (xa[k].x + xa[k].y) + (xa[k].z + xa[k].w), sb = (xb[k].x + xb[k].y) + (xb[k].z + xb[k].w);
#pragma unroll
            for (int r = 0; r < R; r++) {
                Eight e = w[k][r].eight(span, u);
                sum[r] = fmaf(e.da, dot4(e.a, xa[k]), sum[r]);
                sum[r] = fmaf(e.db, dot4(e.b, xb[k]), sum[r]);
                if (Type<T>::mins) sum[r] = fmaf(e.mb, sb, fmaf(e.ma, sa, sum[r]));
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = warp_sum(sum[r]);
}
#endif
