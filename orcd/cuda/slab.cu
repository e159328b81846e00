// 64 rows of W times N tokens by a warpgroup: weights become halves in registers, which the tensor cores read as they are
#ifndef ORCD_SLAB
#define ORCD_SLAB
#include "share.cu"
#include "wgmma.cu"

// A row's scales are taken relative to its largest, with `top` its exponent, so that all weights stay below 2^15; what is left is a factor of the row's sums.
template<int T> __device__ constexpr int headroom() {      // 2^15 over the largest weight at a scale of 2
    return T == Q4_0 ? 11 : T == Q4_1 || T == Q5_0 ? 10 : T == Q5_1 ? 9 : T == Q8_0 ? 7 : T == Q4_K ? 4 : T == Q5_K ? 3 : 2;
}
template<int T> struct Lift {
    int top;
    __device__ __forceinline__ int up() const { return headroom<T>() + 15 - top; }
    // Scale and minimum (of Q6_K two scales) of block t of group g in row e, as halves
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

// Weight pair r of block j with its scale; v: the block's `halves`
template<int T> __device__ __forceinline__ u32 weights(const Share<T>& b, const Masks& c, int g, int e, int j, int r, u32 v) {
    const u32 d = __byte_perm(v, 0, T == Q6_K && r / 2 ? 0x3232 : 0x1010), m = __byte_perm(v, 0, 0x3232), q = b.pair(c, g, e, j, r);
    u32 w;
    if (Type<T>::mins) asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(w) : "r"(q), "r"(d), "r"(m));
    else asm("mul.f16x2 %0, %1, %2;" : "=r"(w) : "r"(q), "r"(d));
    return w;
}

// D stages of 128 columns of N tokens in shared memory: `full` when their bytes have come, `empty` when all warps of the R warpgroups that read
// them have done so
template<int N, int R, int S, int D> struct Stages {
    u16* x;
    u64 *full, *empty;
    __device__ __forceinline__ Stages(u16* shared, u64* barriers, int part) : x(shared + part * D * 2 * N * 64), full(barriers + part * D), empty(full + S * D) {}
    __device__ static void prepare(u64* barriers) {
        if (threadIdx.x < 2 * S * D) barrier_init(barriers + threadIdx.x, threadIdx.x < S * D ? 1 : 4 * R);
        barriers_ready();
        __syncthreads();
    }
};

// acc += 64 rows of W, two of them this lane's, times N rows of x (halves, `span` apart from one span of 64 columns to the next). Of the
// columns, part `part` of S takes every S-th unit of 256. `issuer`: the one thread that asks for stages.
template<int T, int N, int R, int S, int D>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Planes<T>& p, const long long (&row)[2], const Lift<T> (&lift)[2], const u16* x, long long span, int n_in,
    const Stages<N, R, S, D>& s, int part, bool issuer) {
    constexpr bool K = is_k<T>();
    const int lane = threadIdx.x & 31, t = lane & 3, groups = (n_in + 127) / 128, units = (groups + 1) / 2;
    const int mine = 2 * ((units - part + S - 1) / S) - ((groups & 1) && (units - 1) % S == part);       // groups of this part
    const Masks c;
    Share<T> b[K ? 1 : 2];      // two groups, in turns: a K block, or two steps
    auto unit_of = [&](int k) { return part + S * (k / 2); };
    auto copy = [&](int k, int slot) {
        arrive_expecting(s.full + slot, 2 * N * 128);
#pragma unroll
        for (int h = 0; h < 2; h++) bulk_copy(s.x + (2 * slot + h) * N * 64, x + (2 * (2 * unit_of(k) + (k & 1)) + h) * span, N * 128, s.full + slot);
    };
    auto load = [&](int k, int g) {
        if (k >= mine) return;
        if (K) b[0].quants(p, row, unit_of(k), g, t); else b[g % (K ? 1 : 2)].quants(p, row, 2 * unit_of(k) + g, 0, t);
    };
    if (issuer) for (int k = 0; k < D && k < mine; k++) copy(k, k);
    load(0, 0); load(1, 1);
    if (mine) b[0].heads(p, row, unit_of(0));
    int slot = 0, phase = 0, last = 0, last_phase = 0;
    auto step = [&](int k, int g) {       // group k; g = k & 1
        const Share<T>& now = b[K ? 0 : g];
        const u32 v[2] = {lift[0].halves(now, K ? g : 0, 0, t), lift[1].halves(now, K ? g : 0, 1, t)};
        if (K && g == 1 && k + 1 < mine) b[0].heads(p, row, unit_of(k + 1));
        wait(s.full + slot, phase);
        const u64 at = described(address_of(s.x + 2 * slot * N * 64));
        u32 a[2][2][4];         // block j while block j - 1 is multiplied
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
            wgmma_wait<1>();
            if (j == 0 && k > 0 && lane == 0) arrive(s.empty + last);       // the stage before is read
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

// Of a tile of N tokens and R * 64 rows of W: where this thread is, and its sums
template<int T, int N, int R, int S, int D> struct Tile {
    const int group = threadIdx.x / 128, r = group % R, part = group / R, tid = threadIdx.x & 127, lane = tid & 31, mine = tid / 32 * 16 + lane / 4;
    float acc[N / 2] = {}, factor[2];
    // `first`: the matrix's first row in a stack of experts, row0: this warpgroup's first row of n_out; x: the tile's first token.
    // True for the threads that hold the result: those of the first part
    __device__ __forceinline__ bool run(const u8* w, const u8* top, long long all, long long first, int row0, int n_out, int n_in, const u16* x, long long span,
        u16* shared, u64* barriers) {
        const Planes<T> p(w, all, n_in);
        const long long row[2] = {first + min(row0 + mine, n_out - 1), first + min(row0 + mine + 8, n_out - 1)};
        const Lift<T> lift[2] = {{top[row[0]]}, {top[row[1]]}};
        multiply<T, N, R, S, D>(acc, p, row, lift, x, span, n_in, Stages<N, R, S, D>(shared, barriers, part), part, r == 0 && tid == 0);
        for (int e = 0; e < 2; e++) factor[e] = lift[e].factor();
        if (S > 1) {                // the parts' sums, in their order
            float* sums = (float*)shared;
            __syncthreads();
            if (part)
#pragma unroll
                for (int i = 0; i < N / 2; i++) sums[((part - 1) * R + r) * (N / 2 * 128) + i * 128 + tid] = acc[i];
            __syncthreads();
            if (part) return false;
#pragma unroll 1
            for (int k = 0; k < S - 1; k++)
#pragma unroll
                for (int i = 0; i < N / 2; i++) acc[i] += sums[(k * R + r) * (N / 2 * 128) + i * 128 + tid];
        }
        return true;
    }
    // f(token of the tile, row of the 64, sum) for each of this thread's sums
    template<class F> __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (int i = 0; i < N / 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) f(8 * i + 2 * (lane & 3) + (e & 1), mine + 8 * (e / 2), acc[4 * i + e], factor[e / 2]);
    }
};
#endif
