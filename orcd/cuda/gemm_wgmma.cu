#include "share.cu"
#include "wgmma.cu"

#ifndef TOKENS
#define TOKENS 128
#endif
#ifndef ROWS
#define ROWS 2
#endif
#ifndef SPLITS
#define SPLITS 1
#endif
#ifndef DEPTH
#define DEPTH 3
#endif
#ifndef WAIT0
#define WAIT0 0
#endif
#ifndef BLOCKS
#define BLOCKS (4 / (ROWS * SPLITS))
#endif

// Exponent that a row's weights are lifted by: with it the largest scale's weights stay below 2^15
template<int T> __device__ constexpr int room() {
    return T == Q4_0 ? 11 : T == Q4_1 || T == Q5_0 ? 10 : T == Q5_1 ? 9 : T == Q8_0 ? 7 : T == Q4_K ? 4 : T == Q5_K ? 3 : 2;
}
// A row's scales as halves: those of a block relative to the row's largest; the rest is a factor of the row's sums
template<int T> struct Lift {
    int top;
    __device__ __forceinline__ int up() const { return room<T>() + 15 - max(top >> 10, 1); }
    __device__ __forceinline__ u32 halves(const Share<T>& b, int g, int e, int t) const {
        if (T == MXFP4) {
            const int f = (int)b.s[0][e] - top + 15;
            return to_half_bits(f < -24 ? 0.f : __uint_as_float((127 + f) << 23));
        }
        const float up = __uint_as_float((127 + this->up()) << 23);
        const float2 v = b.scale(g, e, t);
        u32 h;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(v.y * up), "f"(v.x * up));
        return h;
    }
    __device__ __forceinline__ float factor() const { return T == MXFP4 ? mxfp4_scale(top) : __uint_as_float((127 - up()) << 23); }
};

// Weight pair r of block j as halves with their scale; v: scale and minimum of the block
template<int T> __device__ __forceinline__ u32 weights(const Share<T>& b, const Masks& c, int g, int e, int j, int r, u32 v) {
    const u32 d = __byte_perm(v, 0, T == Q6_K && r / 2 ? 0x3232 : 0x1010), m = __byte_perm(v, 0, 0x3232), q = b.pair(c, g, e, j, r);
    u32 w;
    if (Type<T>::mins) asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(w) : "r"(q), "r"(d), "r"(m));
    else asm("mul.f16x2 %0, %1, %2;" : "=r"(w) : "r"(q), "r"(d));
    return w;
}

struct Stages { u16* x; u64 *full, *empty; };      // of one class

// acc += 64 rows of W (of this warpgroup) * N rows of x, over every S-th unit of 256 columns from `part` on
template<int T, int N, int S, int D>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Planes<T>& p, const long long (&row)[2], const Lift<T> (&lift)[2], const u16* x, long long span, int n_in,
    const Stages& s, int part, bool issuer) {
    constexpr bool K = is_k<T>();
    const int lane = threadIdx.x & 31, t = lane & 3, groups = (n_in + 127) / 128, units = (groups + 1) / 2, units_mine = (units - part + S - 1) / S;
    const int mine = 2 * units_mine - ((groups & 1) && (units - 1) % S == part);
    const Masks c;
    Share<T> b[K ? 1 : 2];
    auto unit_of = [&](int k) { return part + S * (k / 2); };
    auto copy = [&](int k, int slot) {
        const int group = 2 * unit_of(k) + (k & 1);
        arrive_expecting(s.full + slot, 2 * N * 128);
#pragma unroll
        for (int h = 0; h < 2; h++) bulk_copy(s.x + (2 * slot + h) * N * 64, x + (2 * group + h) * span, N * 128, s.full + slot);
    };
    auto load = [&](int k, int g) { if (k < mine) { if (K) b[0].quants(p, row, unit_of(k), g, t); else b[g % (K ? 1 : 2)].quants(p, row, 2 * unit_of(k) + g, 0, t); } };
    if (issuer) for (int k = 0; k < D && k < mine; k++) copy(k, k);
    load(0, 0); load(1, 1);
    if (mine) b[0].heads(p, row, unit_of(0));
    int slot = 0, phase = 0, last = 0, last_phase = 0;
    auto step = [&](int k, int g) {       // g = k & 1
        const Share<T>& now = b[K ? 0 : g];
        const u32 v[2] = {lift[0].halves(now, K ? g : 0, 0, t), lift[1].halves(now, K ? g : 0, 1, t)};
        if (K && g == 1 && k + 1 < mine) b[0].heads(p, row, unit_of(k + 1));
        wait(s.full + slot, phase);
        const u64 at = described(address_of(s.x + 2 * slot * N * 64));
        u32 a[2][2][4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 v0 = __shfl_sync(~0u, v[0], j, 4), v1 = __shfl_sync(~0u, v[1], j, 4);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                a[j & 1][h][0] = weights<T>(now, c, K ? g : 0, 0, j, 2 * h, v0);
                a[j & 1][h][1] = weights<T>(now, c, K ? g : 0, 1, j, 2 * h, v1);
                a[j & 1][h][2] = weights<T>(now, c, K ? g : 0, 0, j, 2 * h + 1, v0);
                a[j & 1][h][3] = weights<T>(now, c, K ? g : 0, 1, j, 2 * h + 1, v1);
            }
            wgmma_fence();
#pragma unroll
            for (int h = 0; h < 2; h++) wgmma<N>(acc, a[j & 1][h], at + (j / 2 * N * 128 + ((j & 1) * 2 + h) * 32) / 16);
            wgmma_commit();
            if (WAIT0 && j == 3) wgmma_wait<0>(); else wgmma_wait<1>();
            if (j == 0 && k > 0 && lane == 0) arrive(s.empty + last);       // nothing of the stage before is read any more
            if (j == 2 && k > 0 && issuer && k - 1 + D < mine) { wait(s.empty + last, last_phase); copy(k - 1 + D, last); }
            __syncwarp();
        }
        load(k + 2, g);
        last = slot; last_phase = phase;
        if (++slot == D) { slot = 0; phase ^= 1; }
    };
#pragma unroll 1
    for (int k = 0; k + 1 < mine; k += 2) { step(k, 0); step(k + 1, 1); }
    wgmma_wait<0>();
    if (mine & 1) { step(mine - 1, 0); wgmma_wait<0>(); }
}

// out (tokens, n_out) = x W^T (+ bias) (+ residual)
template<int T, int N, int R, int S, int D>
__device__ __forceinline__ void gemm(const u8* w, const u16* x, const float* xinv, int x_rows, float* out, const float* bias, const float* residual,
    int n_rows, int n_out, int n_in, long long ldo, long long ldr) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) u16 shared[];
    __shared__ u64 full[S * D], empty[S * D];
    const int group = threadIdx.x / 128, r = group % R, part = group / R, tid = threadIdx.x & 127, lane = tid & 31;
    const int t0 = blockIdx.x * N, first = (blockIdx.y * R + r) * 64 + tid / 32 * 16 + lane / 4;
    if (threadIdx.x < S * D) { barrier_init(full + threadIdx.x, 1); barrier_init(empty + threadIdx.x, 4 * R); }
    barriers_ready();
    __syncthreads();
    float acc[N / 2] = {};
    const Planes<T> p(w, n_out, n_in);
    const long long row[2] = {min(first, n_out - 1), min(first + 8, n_out - 1)};
    const Lift<T> lift[2] = {{top_scale<T>(p, row[0], lane & 3)}, {top_scale<T>(p, row[1], lane & 3)}};
    const Stages mine = {shared + part * D * 2 * N * 64, full + part * D, empty + part * D};
    multiply<T, N, S, D>(acc, p, row, lift, x + (long long)t0 * 64, (long long)x_rows * 64, n_in, mine, part, r == 0 && tid == 0);
    if (S > 1) {                // the parts' sums, in their order
        float* sums = (float*)shared;
        __syncthreads();
        if (part)
#pragma unroll
            for (int i = 0; i < N / 2; i++) sums[((part - 1) * R + r) * (N / 2 * 128) + i * 128 + tid] = acc[i];
        __syncthreads();
        if (part) return;
#pragma unroll 1
        for (int k = 0; k < S - 1; k++)
#pragma unroll
            for (int i = 0; i < N / 2; i++) acc[i] += sums[(k * R + r) * (N / 2 * 128) + i * 128 + tid];
    }
    const float f[2] = {lift[0].factor(), lift[1].factor()};
#pragma unroll
    for (int i = 0; i < N / 8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int t = t0 + 8 * i + 2 * (lane & 3) + (e & 1), o = first + 8 * (e / 2);
            if (t >= n_rows || o >= n_out) continue;
            float y = acc[4 * i + e] * xinv[t] * f[e / 2];
            if (bias) y += bias[o];
            if (residual) y += residual[t * ldr + o];
            out[t * ldo + o] = y;
        }
#endif
}
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(128 * ROWS * SPLITS, BLOCKS) wgemm_##name(const u8* w, const u16* x, const float* xinv, int x_rows, \
    float* out, const float* bias, const float* residual, int n_rows, int n_out, int n_in, long long ldo, long long ldr) { \
    gemm<T, TOKENS, ROWS, SPLITS, DEPTH>(w, x, xinv, x_rows, out, bias, residual, n_rows, n_out, n_in, ldo, ldr); }
EACH_QUANT(KERNEL)
