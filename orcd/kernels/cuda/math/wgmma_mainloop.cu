// 64 rows of W times N tokens by a warpgroup: weights become halves in registers, which the tensor cores read as they are
#ifndef ORCD_SLAB
#define ORCD_SLAB
#include "types/lane_fragment.cu"
#include "math/wgmma.cu"
#include "math/swiglu.cu"
#include "math/input_prologue.cu"

// The integers of two weights, in the mantissas of two halves without exponents, are subnormal halves: 2^-24 times the integers or so. So one multiply-add makes weights of
// them: with the block's scale, lifted by a power of two that brings the row's largest below 2^15, and its minimum. What is left is a factor of the
// row's sums. `top` is the exponent of the row's largest scale.
template<int T> struct ScaleShift {
    int top;
    __device__ __forceinline__ int up() const { return (is_k<T>() ? T == Q6_K ? 22 : 23 : 29) - top; }
    __device__ __forceinline__ float factor() const { return T == MXFP4 ? .5f * mxfp4_scale(top) : __uint_as_float((127 + 24 - up()) << 23); }
    // Lifted scale and minimum of block t of group g in row e as halves; of Q6_K two scales
    __device__ __forceinline__ u32 halves(const LaneFragment<T>& b, int g, int e, int t) const {
        if (T == MXFP4) {
            const int f = (int)b.s[0][e] - top + 15;
            return to_half_bits(f < -24 ? 0.f : __uint_as_float((127 + f) << 23));
        }
        const float up = __uint_as_float((127 + this->up()) << 23);
        const float2 v = b.scale(g, e, t);
        constexpr float LOW = 1.f / (1 << lifted<T>());
        const float d = v.x * up * LOW, m = T == Q6_K ? v.y * up : (Type<T>::mins ? v.y * up : v.x * up * -Type<T>::bias) * (1.f / (1 << 24));
        u32 h;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(m), "f"(d));
        return h;
    }
};
__device__ __forceinline__ u32 times(u32 a, u32 b) { u32 r; asm("mul.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }

// The four pairs of block j that lane t holds of row e; v: the block's `halves`
template<int T> __device__ __forceinline__ void weights(u32 (&w)[4], const LaneFragment<T>& b, const Masks& c, int g, int e, int j, u32 v) {
    const u32 first = __byte_perm(v, 0, 0x1010), second = __byte_perm(v, 0, 0x3232);
#pragma unroll
    for (int r = 0; r < 4; r++) {
        if (T == MXFP4) { w[r] = times(b.pair(c, g, e, j, r), first); continue; }
        const u32 d = T == Q6_K && r / 2 ? second : first, m = T == Q6_K ? times(d, 0x80208020) : second;    // 32 of Q6_K: -2^5 2^-24
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(w[r]) : "r"(b.small(g, e, j, r)), "r"(is_lifted<T>(r) ? times(d, 0x2C002C00) : d), "r"(m));
    }
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

// Of n_in columns, in groups of 128, part `part` of P takes every P-th unit of two groups
__device__ __forceinline__ int groups_of(int n_in) { return (n_in + 127) / 128; }
template<int P> __device__ __forceinline__ int size_of(int part, int groups) {
    const int units = (groups + 1) / 2;
    return 2 * ((units - part + P - 1) / P) - ((groups & 1) && (units - 1) % P == part);
}
// The groups of the first part, then those of the second, and so on
constexpr int ORDERED = 1024;
template<int P> __device__ __forceinline__ void put_in_order(u16* order, int groups) {
    for (int g = threadIdx.x; g < groups && g < ORDERED; g += blockDim.x) {
        int at = 2 * (g / 2 / P) + (g & 1);
        for (int part = 0; part < g / 2 % P; part++) at += size_of<P>(part, groups);
        order[at] = g;
    }
}

// acc += 64 rows of W, of which `tile` is this warp's, times N rows of x (halves, `span` apart from one span of 64 columns to the next). The columns are
// dealt to S warpgroups, of which this is number `part`; or (Q > 1) one takes Q parts in turns, in `order`, and adds their sums up as S = Q would:
// the same bits. `issuer`: the one thread that asks for stages.
template<int T, int N, int R, int S, int D, int Q>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Planes<T>& p, int tile, const ScaleShift<T> (&lift)[2], const u16* x, long long span, int n_in,
    const Stages<N, R, S, D>& s, int part, bool issuer, const u16* order) {
    constexpr bool K = is_k<T>();
    const int lane = threadIdx.x & 31, t = lane & 3, groups = groups_of(n_in), mine = Q > 1 ? groups : size_of<S>(part, groups);
    int turn = 0, until = Q > 1 ? size_of<Q>(0, groups) : 0;       // of the part at hand, and where the next one begins
    float total[Q > 1 ? N / 2 : 1];
    const Masks c(pair_bits<T>());
    constexpr int UNIT = 16 * Planes<T>::PER * Planes<T>::SIZE;
    const u8* rows = p.at(tile, 0);
    LaneFragment<T> b[K ? 1 : 2];      // two groups, in turns: a K block, or two steps
    auto group_of = [&](int k) { return Q > 1 ? (int)order[k] : 2 * (part + S * (k / 2)) + (k & 1); };
    auto copy = [&](int k, int slot) {
        arrive_expecting(s.full + slot, 2 * N * 128);
#pragma unroll
        for (int h = 0; h < 2; h++) bulk_copy(s.x + (2 * slot + h) * N * 64, x + (2 * group_of(k) + h) * span, N * 128, s.full + slot);
    };
    auto load = [&](int k, int g) {
        if (k >= mine) return;
        const int unit = K ? group_of(k) / 2 : group_of(k);
        b[K ? 0 : g % 2].quants(rows + unit * UNIT, p.left(unit), K ? g : 0, lane);
    };
    load(0, 0); load(1, 1);
    if (K && mine) b[0].heads(rows + group_of(0) / 2 * UNIT, lane);
    pdl_wait();            // weights are there, x is not yet
    if (issuer) for (int k = 0; k < D && k < mine; k++) copy(k, k);
    int slot = 0, phase = 0, last = 0, last_phase = 0;
    auto step = [&](int k, int g) {       // group k; g = k & 1
        if (Q > 1 && k == until) {          // a part is at its end
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < N / 2; i++) { total[Q > 1 ? i : 0] = turn ? total[Q > 1 ? i : 0] + acc[i] : acc[i]; acc[i] = 0; }
            until += size_of<Q>(++turn, groups);
        }
        const LaneFragment<T>& now = b[K ? 0 : g];
        const u32 v[2] = {lift[0].halves(now, K ? g : 0, 0, t), lift[1].halves(now, K ? g : 0, 1, t)};
        if (K && g == 1 && k + 1 < mine) b[0].heads(rows + group_of(k + 1) / 2 * UNIT, lane);
        wait(s.full + slot, phase);
        const u64 at = described(address_of(s.x + 2 * slot * N * 64));
        u32 a[2][2][4];         // block j while block j - 1 is multiplied
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 v0 = __shfl_sync(~0u, v[0], j, 4), v1 = __shfl_sync(~0u, v[1], j, 4);
            u32 w[2][4];
            weights<T>(w[0], now, c, K ? g : 0, 0, j, v0);
            weights<T>(w[1], now, c, K ? g : 0, 1, j, v1);
#pragma unroll
            for (int r = 0; r < 4; r++) for (int e = 0; e < 2; e++) a[j & 1][r / 2][2 * (r & 1) + e] = w[e][r];
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
    if (Q > 1 && turn)
#pragma unroll
        for (int i = 0; i < N / 2; i++) acc[i] = total[Q > 1 ? i : 0] + acc[i];
}

// Of a tile of N tokens and R * 64 rows of W: where this thread is, and its sums
template<int T, int N, int R, int S, int D, int Q = 1> struct Tile {
    const int group = threadIdx.x / 128, r = group % R, part = group / R, tid = threadIdx.x & 127, lane = tid & 31, mine = tid / 32 * 16 + lane / 4;
    float acc[N / 2] = {}, factor[2];
    // first_tile: of the matrix, row0: this warpgroup's first row of n_out; top: of the matrix's rows; x: the tile's first token.
    // True for the threads that hold the result: those of the first part
    __device__ __forceinline__ bool run(const u8* w, const u8* top, int first_tile, int row0, int n_out, int n_in, const u16* x, long long span,
        u16* shared, u64* barriers, const u16* order = nullptr) {
        const Planes<T> p(w, n_in);
        const ScaleShift<T> lift[2] = {{top[min(row0 + mine, n_out - 1)]}, {top[min(row0 + mine + 8, n_out - 1)]}};
        multiply<T, N, R, S, D, Q>(acc, p, first_tile + min(row0 + tid / 32 * 16, n_out - 1) / 16, lift, x, span, n_in, Stages<N, R, S, D>(shared, barriers, part), part, r == 0 && tid == 0, order);
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
    // Sum e of a pair of tokens as it should be; inv: 1/scale of their activations. In this order, since either factor may be near the end of the range
    __device__ __forceinline__ float scaled(float sum, int e, float2 inv) const { return sum * (e & 1 ? inv.y : inv.x) * factor[e / 2]; }
    // f(token, v) for each pair of tokens of the tile that this thread has: v are the sums of rows mine, mine and mine + 8, mine + 8
    template<class F> __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            float v[4];
#pragma unroll
            for (int e = 0; e < 4; e++) v[e] = acc[4 * i + e];
            f(8 * i + 2 * (lane & 3), v);
        }
    }
};

// silu(g) * u, or gpt-oss's clamped variant of it, times a power of two that fits its range; a NaN stays one
enum { SILU = 0, OAI = 1 };
template<int ACT> __device__ constexpr float gated_scale() { return ACT == OAI ? 256.f : 0.125f; }     // |OAI| <= 7 * 8
template<int ACT> __device__ __forceinline__ u32 gated(float g, float u) {
    float y = fast_activation(g, u, ACT == OAI) * gated_scale<ACT>();
    if (ACT == SILU) y = y > 65504.f ? 65504.f : y < -65504.f ? -65504.f : y;
    return to_half_bits(y);
}

// The warpgroups of a block have gate (r = 0) and up (r = 1) of the same 64 rows, `rows` of which there are: halves of the activation, laid out as
// the next product's x, for `tokens` tokens from `to` on; zeros beyond the rows. inv: 1/scale of the tile's tokens, bias: of this warpgroup's rows.
template<int ACT, int T, int N, int S, int D>
__device__ __forceinline__ void store_gated(const Tile<T, N, 2, S, D>& s, const float* bias, const float* inv, int rows, int tokens, u16* shared, u16* to) {
    float* ups = (float*)shared;                        // N tokens, 64 rows and 4 against bank conflicts
    u16* halves = shared + 2 * N * 68;
    const bool in[2] = {s.mine < rows, s.mine + 8 < rows};
    const float b[2] = {bias && in[0] ? bias[s.mine] : 0, bias && in[1] ? bias[s.mine + 8] : 0};
    __syncthreads();
    if (s.r) s.each([&](int token, const float (&v)[4]) {
        const float2 x = *(const float2*)(inv + token);
#pragma unroll
        for (int e = 0; e < 4; e++) ups[(token + (e & 1)) * 68 + s.mine + 8 * (e / 2)] = s.scaled(v[e], e, x) + b[e / 2];
    });
    __syncthreads();
    if (!s.r) {
        const int chunk = 2 * (s.mine / 16) + (s.mine & 1), place = (s.mine & 15) / 2;      // row mine + 8 is 4 places further in the same chunk
        s.each([&](int token, const float (&v)[4]) {
            const float2 x = *(const float2*)(inv + token);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int t = token + (e & 1);
                const u32 h = gated<ACT>(s.scaled(v[e], e, x) + b[e / 2], ups[t * 68 + s.mine + 8 * (e / 2)]);
                halves[t * 64 + ((chunk ^ (t & 7)) << 3) + place + 4 * (e / 2)] = in[e / 2] ? h : 0;
            }
        });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < min(tokens, N) * 8; i += 256) ((uint4*)to)[i] = ((const uint4*)halves)[i];
}
#endif
