#include "math/wgmma_mainloop.cu"
// Defines: TOKENS x 64 ROWS is a block's tile, its columns dealt to SPLITS parts, stages DEPTH deep; BLOCKS on an SM. Or one part after the other, TURNS in all.
#ifndef TOKENS
#define TOKENS 256
#define ROWS 2
#define SPLITS 1
#define DEPTH 3
#define BLOCKS 1
#endif
#ifndef TURNS
#define TURNS 1
#endif

// Up to three matrices that read the same x, in one launch; blockIdx.x: TOKENS rows of x (fastest, so that neighbours share W in the L2 cache),
// blockIdx.y: 64 ROWS rows of W, blocks[i] of them for matrix i, which is n_out[i] rows of W from first[i] on, a multiple of 16.
struct WgmmaArgs {
    const u8 *w[3], *top[3]; float* out[3]; const float* bias[3]; i64 out_stride[3]; int n_out[3], first[3], blocks[3];
    int second;                                                 // bit i: matrix i is of the second type
    const float* residual; i64 residual_stride;
    const u16* x; const float* inv; int x_rows, n_rows, n_in;
};
struct Matrix { const u8 *w, *top; float* out; const float* bias; int n_out, first; i64 out_stride; };
__device__ __forceinline__ Matrix matrix(const WgmmaArgs& a, int i) { return {a.w[i], a.top[i], a.out[i], a.bias[i], a.n_out[i], a.first[i], a.out_stride[i]}; }

// out (tokens, n_out) = x W^T (+ bias) (+ residual) of one of the matrices. tile: of the matrix's rows
template<int T> __device__ __forceinline__ void product(const WgmmaArgs& a, const Matrix& m, int tile) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) u16 shared[];
    __shared__ u64 barriers[2 * SPLITS * DEPTH];
    __shared__ u16 order[TURNS > 1 ? ORDERED : 1];
    pdl_launch_dependents();
    if (TURNS > 1) put_in_order<TURNS>(order, groups_of(a.n_in));
    Stages<TOKENS, ROWS, SPLITS, DEPTH>::prepare(barriers);
    Tile<T, TOKENS, ROWS, SPLITS, DEPTH, TURNS> s;
    const int t0 = blockIdx.x * TOKENS, row0 = (tile * ROWS + s.r) * 64, o = row0 + s.mine;
    if (!s.run(m.w, m.top + m.first, m.first / 16, row0, m.n_out, a.n_in, a.x + (i64)t0 * 64, (i64)a.x_rows * 64, shared, barriers, order)) return;
    const bool in[2] = {o < m.n_out, o + 8 < m.n_out};
    const float b[2] = {m.bias && in[0] ? m.bias[o] : 0, m.bias && in[1] ? m.bias[o + 8] : 0};
    s.each([&](int token, const float (&v)[4]) {
        const int t = t0 + token;
        if (t >= a.n_rows) return;
        const float2 x = *(const float2*)(a.inv + t);
        float* to = m.out + t * m.out_stride + o;
        const float* from = a.residual + t * a.residual_stride + o;
#pragma unroll
        for (int e = 0; e < 4; e++) if (in[e / 2] && (!(e & 1) || t + 1 < a.n_rows)) {
            float y = s.scaled(v[e], e, x) + b[e / 2];
            if (a.residual) y += from[(e & 1) * a.residual_stride + 8 * (e / 2)];
            to[(e & 1) * m.out_stride + 8 * (e / 2)] = y;
        }
    });
#endif
}
template<int A, int B> __device__ __forceinline__ void products(const WgmmaArgs& a) {
    int tile = blockIdx.y, i = 0;
    Matrix m = matrix(a, 0);
    if (tile >= a.blocks[0]) {
        tile -= a.blocks[0];
        i = 1;
        m = matrix(a, 1);
    }
    if (i && tile >= a.blocks[1]) {
        tile -= a.blocks[1];
        i = 2;
        m = matrix(a, 2);
    }
    if (A == B || !(a.second >> i & 1)) product<A>(a, m, tile);
    else product<B>(a, m, tile);
}
#define KERNEL(name, A, B) \
extern "C" __global__ void __launch_bounds__(128 * ROWS * SPLITS, BLOCKS) wgmma_##name(const __grid_constant__ WgmmaArgs a) { products<A, B>(a); }

// silu(gate) * up as halves, laid out as the next product's x, of n_out rows of gate and of up from first[i] on; blockIdx.y: 64 of them
struct WgmmaGatedArgs {
    const u8 *w[2], *top[2]; const float* bias[2]; int first[2], n_out, n_rows, n_in;
    const u16* x; const float* inv; u16* half; float* half_inv; int x_rows, half_rows;
};
template<int T> __device__ __forceinline__ void gated_product(const WgmmaGatedArgs& a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && ROWS == 2
    extern __shared__ __align__(1024) u16 shared[];
    __shared__ u64 barriers[2 * SPLITS * DEPTH];
    pdl_launch_dependents();
    Stages<TOKENS, ROWS, SPLITS, DEPTH>::prepare(barriers);
    Tile<T, TOKENS, ROWS, SPLITS, DEPTH> s;
    const int t0 = blockIdx.x * TOKENS, row0 = blockIdx.y * 64, first = a.first[s.r];
    const float* bias = a.bias[s.r];
    s.run(a.w[s.r], a.top[s.r] + first, first / 16, row0, a.n_out, a.n_in, a.x + (i64)t0 * 64, (i64)a.x_rows * 64, shared, barriers);
    store_gated<SILU>(s, bias ? bias + row0 : nullptr, a.inv + t0, a.n_out - row0, a.n_rows - t0, shared, a.half + ((i64)blockIdx.y * a.half_rows + t0) * 64);
    if (blockIdx.y == 0) for (int i = threadIdx.x; i < TOKENS; i += 256) a.half_inv[t0 + i] = 1 / gated_scale<SILU>();
#endif
}
#define GATED(name, T) \
extern "C" __global__ void __launch_bounds__(128 * ROWS * SPLITS, BLOCKS) gated_##name(const __grid_constant__ WgmmaGatedArgs a) { gated_product<T>(a); }
#define EACH(name, T) KERNEL(name, T, T)
#ifdef SECOND_TYPE
KERNEL(mixed, ONLY_TYPE, SECOND_TYPE)
#elif defined(GATE)
EACH_QUANT(GATED)
#else
EACH_QUANT(EACH)
#endif
