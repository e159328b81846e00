#include "math/input_prologue.cu"
#include "math/swiglu.cu"
#include "math/mma.cu"

enum { AS_IS = 0, NORM = 1, SWIGLU = 2, CLAMPED_SWIGLU = 3 };

struct ToHalfArgs {
    const float* x; i64 x_stride; const float* other; i64 other_stride; float eps; int mode;
    const int *slots, *end; u16* half; float *inv, *sums; int per, n, ld, rows;
};

// Element i of row `row` is x[i], or x[i] * other[i] (a norm, without its common factor), or silu(x[i]) * other[i], or gpt-oss's variant
struct Lazy {
    const float *x, *other;
    int mode;
    __device__ Lazy(const ToHalfArgs& a, i64 row) : x(a.x + row * a.x_stride), other(a.other + (a.mode == NORM ? 0 : row * a.other_stride)), mode(a.mode) {}
    __device__ __forceinline__ float made(float a, float b, float& square) const {
        if (mode == NORM) { square = fmaf(a, a, square); return a * b; }
        if (mode == SWIGLU) return activation(a, b, false);
        if (mode == CLAMPED_SWIGLU) return activation(a, b, true);
        return a;
    }
    // Elements i ... i + 3, zeros from n on; i is a multiple of 4
    __device__ __forceinline__ void four(float (&v)[4], int i, int n, float& square) const {
        float4 a = {0, 0, 0, 0}, b = a;
        if (i + 4 <= n && (((size_t)x | (size_t)other) & 15) == 0) {
            a = *(const float4*)(x + i);
            if (mode) b = *(const float4*)(other + i);
        } else {
            if (i < n) { a.x = x[i]; if (mode) b.x = other[i]; }
            if (i + 1 < n) { a.y = x[i + 1]; if (mode) b.y = other[i + 1]; }
            if (i + 2 < n) { a.z = x[i + 2]; if (mode) b.z = other[i + 2]; }
            if (i + 3 < n) { a.w = x[i + 3]; if (mode) b.w = other[i + 3]; }
        }
        v[0] = made(a.x, b.x, square); v[1] = made(a.y, b.y, square); v[2] = made(a.z, b.z, square); v[3] = made(a.w, b.w, square);
    }
};

// Row t of x, or of what `mode` makes of x and `other`, to halves times a power of two that puts the largest magnitude into [2^13, 2^14), so
// that nothing overflows and little underflows; inv[t] is the inverse. sums: sums of 32 halves each. Columns from n to ld are zero.
// Halves lie in spans of 64 columns: 128 bytes for each of `rows` rows. In a span, 16 columns are two chunks of 16 bytes, the even and the odd
// ones, and chunk c of row t is at place c ^ (t & 7). One block a row. With `slots`, row t is a copy of row slots[t] / per.
// Four neighbouring lanes have the 16 columns of two chunks, four each; the first KEPT such fours of a thread stay in registers.
extern "C" __global__ void __launch_bounds__(256) to_half(const __grid_constant__ ToHalfArgs a) {
    __shared__ float top[8], squares[8];
    pdl_launch_dependents();
    pdl_wait();
    const int t = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x & 31, n = a.n, ld = a.ld;
    if (a.slots && (t >= *a.end || a.slots[t] < 0)) return;
    const Lazy src(a, a.slots ? a.slots[t] / a.per : t);
    if (threadIdx.x < 8) top[threadIdx.x] = squares[threadIdx.x] = 0;       // there may be fewer warps
    __syncthreads();
    constexpr int KEPT = 4;
    const int first = 4 * threadIdx.x, step = 4 * blockDim.x;
    float v[KEPT][4], m = 0, square = 0;
    auto look = [&](const float (&y)[4]) { m = fmaxf(m, fmaxf(fmaxf(fabsf(y[0]), fabsf(y[1])), fmaxf(fabsf(y[2]), fabsf(y[3])))); };
#pragma unroll
    for (int k = 0; k < KEPT; k++) { src.four(v[k], first + k * step, n, square); look(v[k]); }
    for (int i = first + KEPT * step; i < n; i += step) { float y[4]; src.four(y, i, n, square); look(y); }
    m = warp_max(m); square = warp_sum(square);
    if (lane == 0) { top[warp] = m; squares[warp] = square; }
    __syncthreads();
    for (int i = 0; i < 8; i++) m = fmaxf(m, top[i]);
    const float factor = norm_factor(a.mode == NORM, squares, 8, n, a.eps);
    const int e = __float_as_uint(m * factor) >> 23, s = e == 255 ? 127 : min(253, 267 - e);    // biased exponent of the scale; a row with an infinity stays as it is
    const float scale = __uint_as_float(s << 23);
    if (threadIdx.x == 0) a.inv[t] = __uint_as_float((254 - s) << 23);
    auto write = [&](const float (&y)[4], int i) {          // all lanes of a warp or none: ld is a multiple of 128
        u32 h[4];
#pragma unroll
        for (int k = 0; k < 4; k++) h[k] = to_half_bits(y[k] * factor * scale);
        float sum = (half_bits(h[0]) + half_bits(h[1])) + (half_bits(h[2]) + half_bits(h[3]));
        for (int d = 1; d < 8; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (!(lane & 7)) a.sums[(i64)t * (ld / 32) + i / 32] = sum;
        u16* to = a.half + ((i64)(i / 64) * a.rows + t) * 64 + 2 * (lane & 3);
#pragma unroll
        for (int c = 0; c < 2; c++) *(u32*)(to + ((2 * (i / 16 & 3) + c ^ t & 7) << 3)) = h[c] | h[2 + c] << 16;
    };
#pragma unroll
    for (int k = 0; k < KEPT; k++) if (first + k * step < ld) write(v[k], first + k * step);
    for (int i = first + KEPT * step; i < ld; i += step) { float y[4]; src.four(y, i, n, square); write(y, i); }
}
