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

// n_out rows of W from `first` on, a multiple of 16
struct Matrix { const u8 *w, *top; float* out; const float* bias; int n_out, first; long long ldo; };

// out (tokens, n_out) = x W^T (+ bias) (+ residual). tile: of the matrix's rows
template<int T>
__device__ __forceinline__ void product(const Matrix& m, int tile, const u16* x, const float* inv, int x_rows, const float* residual, long long ldr, int n_rows, int n_in) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) u16 shared[];
    __shared__ u64 barriers[2 * SPLITS * DEPTH];
    __shared__ u16 order[TURNS > 1 ? ORDERED : 1];
    pdl_launch_dependents();
    if (TURNS > 1) put_in_order<TURNS>(order, groups_of(n_in));
    Stages<TOKENS, ROWS, SPLITS, DEPTH>::prepare(barriers);
    Tile<T, TOKENS, ROWS, SPLITS, DEPTH, TURNS> s;
    const int t0 = blockIdx.x * TOKENS, row0 = (tile * ROWS + s.r) * 64, o = row0 + s.mine;
    if (!s.run(m.w, m.top + m.first, m.first / 16, row0, m.n_out, n_in, x + (long long)t0 * 64, (long long)x_rows * 64, shared, barriers, order)) return;
    const bool in[2] = {o < m.n_out, o + 8 < m.n_out};
    const float b[2] = {m.bias && in[0] ? m.bias[o] : 0, m.bias && in[1] ? m.bias[o + 8] : 0};
    s.each([&](int token, const float (&v)[4]) {
        const int t = t0 + token;
        if (t >= n_rows) return;
        const float2 x = *(const float2*)(inv + t);
        float* to = m.out + t * m.ldo + o;
        const float* from = residual + t * ldr + o;
#pragma unroll
        for (int e = 0; e < 4; e++) if (in[e / 2] && (!(e & 1) || t + 1 < n_rows)) {
            float y = s.scaled(v[e], e, x) + b[e / 2];
            if (residual) y += from[(e & 1) * ldr + 8 * (e / 2)];
            to[(e & 1) * m.ldo + 8 * (e / 2)] = y;
        }
    });
#endif
}

// Up to three matrices that read the same x, in one launch; blockIdx.x: TOKENS rows of x (fastest, so that neighbours share W in the L2 cache),
// blockIdx.y: 64 ROWS rows of W, b_i of them for matrix i. `second`: bit i says that matrix i is of type B.
#define KERNEL(name, A, B) extern "C" __global__ void __launch_bounds__(128 * ROWS * SPLITS, BLOCKS) wgmma_##name(const u8* w0, const u8* w1, const u8* w2, \
    const u8* top0, const u8* top1, const u8* top2, float* out0, float* out1, float* out2, const float* bias0, const float* bias1, const float* bias2, \
    int n0, int n1, int n2, int first0, int first1, int first2, int b0, int b1, long long ldo0, long long ldo1, long long ldo2, \
    const float* residual, long long ldr, int second, const u16* x, const float* inv, int x_rows, int n_rows, int n_in) { \
    int tile = blockIdx.y, i = 0; \
    Matrix m = {w0, top0, out0, bias0, n0, first0, ldo0}; \
    if (tile >= b0) { tile -= b0; i = 1; m = {w1, top1, out1, bias1, n1, first1, ldo1}; } \
    if (i && tile >= b1) { tile -= b1; i = 2; m = {w2, top2, out2, bias2, n2, first2, ldo2}; } \
    if (A == B || !(second >> i & 1)) product<A>(m, tile, x, inv, x_rows, residual, ldr, n_rows, n_in); \
    else product<B>(m, tile, x, inv, x_rows, residual, ldr, n_rows, n_in); }

// silu(gate) * up as halves, laid out as the next product's x, of rows n_out; blockIdx.y: 64 of them
template<int T>
__device__ __forceinline__ void gated_product(const Matrix& gate, const Matrix& up, const u16* x, const float* inv, int x_rows, u16* half, float* half_inv, int half_rows, int n_rows, int n_in) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && ROWS == 2
    extern __shared__ __align__(1024) u16 shared[];
    __shared__ u64 barriers[2 * SPLITS * DEPTH];
    pdl_launch_dependents();
    Stages<TOKENS, ROWS, SPLITS, DEPTH>::prepare(barriers);
    Tile<T, TOKENS, ROWS, SPLITS, DEPTH> s;
    Matrix m = gate;
    if (s.r) m = up;
    const int t0 = blockIdx.x * TOKENS, row0 = blockIdx.y * 64;
    s.run(m.w, m.top + m.first, m.first / 16, row0, m.n_out, n_in, x + (long long)t0 * 64, (long long)x_rows * 64, shared, barriers);
    store_gated<SILU>(s, m.bias ? m.bias + row0 : nullptr, inv + t0, m.n_out - row0, n_rows - t0, shared, half + ((long long)blockIdx.y * half_rows + t0) * 64);
    if (blockIdx.y == 0) for (int i = threadIdx.x; i < TOKENS; i += 256) half_inv[t0 + i] = 1 / gated_scale<SILU>();
#endif
}
#define GATED(name, T) extern "C" __global__ void __launch_bounds__(128 * ROWS * SPLITS, BLOCKS) gated_##name(const u8* w0, const u8* w1, const u8* top0, const u8* top1, \
    const float* bias0, const float* bias1, int n_out, int first0, int first1, const u16* x, const float* inv, int x_rows, u16* half, float* half_inv, int half_rows, \
    int n_rows, int n_in) { \
    gated_product<T>({w0, top0, nullptr, bias0, n_out, first0, 0}, {w1, top1, nullptr, bias1, n_out, first1, 0}, x, inv, x_rows, half, half_inv, half_rows, n_rows, n_in); }
#define EACH(name, T) KERNEL(name, T, T)
#ifdef SECOND_TYPE
KERNEL(mixed, ONLY_TYPE, SECOND_TYPE)
#elif defined(GATE)
EACH_QUANT(GATED)
#else
EACH_QUANT(EACH)
#endif
