#include "source.cu"
#include "mma.cu"

enum { AS_IS = 0, NORM = 1, SWIGLU = 2, SWIGLU_OAI = 3 };

// Element i of row `row` is x[i], or x[i] * other[i] (a norm, without its common factor), or silu(x[i]) * other[i], or gpt-oss's variant
struct Lazy {
    const float *x, *other;
    int mode;
    __device__ Lazy(const float* x, const float* other, long long row, long long ldx, long long ldo, int mode) : x(x + row * ldx), other(other + (mode == NORM ? 0 : row * ldo)), mode(mode) {}
    __device__ __forceinline__ float one(int i, float& square) const {
        float a = x[i], b = mode ? other[i] : 0.f;
        if (mode == NORM) { square = fmaf(a, a, square); return a * b; }
        if (mode == SWIGLU) return a / (1.f + expf(-a)) * b;
        if (mode == SWIGLU_OAI) {
            a = a > 7.f ? 7.f : a; b = b > 7.f ? 7.f : b < -7.f ? -7.f : b;
            return a / (1.f + expf(-1.702f * a)) * (b + 1.f);
        }
        return a;
    }
};

// Row t of x, or of what `mode` makes of x and `other`, to halves times a power of two that puts the largest magnitude into [2^13, 2^14), so
// that nothing overflows and little underflows; inv[t] is the inverse. sums: sums of 32 halves each. Columns from n to ld are zero.
// Halves lie in spans of 64 columns: 128 bytes for each of `rows` rows. In a span, 16 columns are two chunks of 16 bytes, the even and the odd
// ones, and chunk c of row t is at place c ^ (t & 7). One block a row. With `slots`, row t is a copy of row slots[t] / per.
extern "C" __global__ void __launch_bounds__(256) to_half(const float* x, const float* other, long long ldx, long long ldother, float eps, int mode,
    const int* slots, const int* end, int per, u16* half, float* inv, float* sums, int n, int ld, int rows) {
    __shared__ float top[8], squares[8];
    let_next_start();
    wait_for_last();
    const int t = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    if (slots && (t >= *end || slots[t] < 0)) return;
    const Lazy src(x, other, slots ? slots[t] / per : t, ldx, ldother, mode);
    if (threadIdx.x < 8) top[threadIdx.x] = squares[threadIdx.x] = 0;       // there may be fewer warps
    __syncthreads();
    float m = 0, square = 0;
    auto read = [&](float (&v)[16], int i) {        // columns i ... i + 15
        if (i + 16 <= n) {
#pragma unroll
            for (int k = 0; k < 16; k++) v[k] = src.one(i + k, square);
        } else for (int k = 0; k < 16; k++) v[k] = i + k < n ? src.one(i + k, square) : 0;
    };
    float v[16];
    for (int i = 16 * threadIdx.x; i < n; i += 16 * blockDim.x) {
        read(v, i);
#pragma unroll
        for (int k = 0; k < 16; k++) m = fmaxf(m, fabsf(v[k]));
    }
    m = warp_max(m); square = warp_sum(square);
    if (lane == 0) { top[warp] = m; squares[warp] = square; }
    __syncthreads();
    for (int i = 0; i < 8; i++) m = fmaxf(m, top[i]);
    const float factor = norm_factor(mode == NORM, squares, 8, n, eps);
    const int e = __float_as_uint(m * factor) >> 23, s = e == 255 ? 127 : min(253, 267 - e);    // biased exponent of the scale; a row with an infinity stays as it is
    const float scale = __uint_as_float(s << 23);
    if (threadIdx.x == 0) inv[t] = __uint_as_float((254 - s) << 23);
    for (int i = 16 * threadIdx.x; i < ld; i += 16 * blockDim.x) {        // ld is a multiple of 128: pairs of threads
        read(v, i);
        float sum = 0;
        u32 h[16];
#pragma unroll
        for (int k = 0; k < 16; k++) { h[k] = to_half_bits(v[k] * factor * scale); sum += half_bits(h[k]); }
        sum += __shfl_xor_sync(__activemask(), sum, 1);
        if (!(threadIdx.x & 1)) sums[(long long)t * (ld / 32) + i / 32] = sum;
        u16* to = half + ((long long)(i / 64) * rows + t) * 64;
#pragma unroll
        for (int c = 0; c < 2; c++)
            *(uint4*)(to + ((2 * (i / 16 & 3) + c ^ t & 7) << 3)) = uint4{h[c] | h[2 + c] << 16, h[4 + c] | h[6 + c] << 16, h[8 + c] | h[10 + c] << 16, h[12 + c] | h[14 + c] << 16};
    }
}
