#include "slab.cu"
// Defines: TOKENS x 64 ROWS is a block's tile, its columns dealt to SPLITS parts, stages DEPTH deep; BLOCKS on an SM
#ifndef TOKENS
#define TOKENS 256
#define ROWS 2
#define SPLITS 1
#define DEPTH 3
#define BLOCKS 1
#endif

struct Matrix { const u8 *w, *top; float* out; const float* bias; int n_out; long long ldo; };

// out (tokens, n_out) = x W^T (+ bias) (+ residual). tile: of W's rows
template<int T>
__device__ __forceinline__ void product(const Matrix& m, int tile, const u16* x, const float* inv, int x_rows, const float* residual, long long ldr, int n_rows, int n_in) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) u16 shared[];
    __shared__ u64 barriers[2 * SPLITS * DEPTH];
    Stages<TOKENS, ROWS, SPLITS, DEPTH>::prepare(barriers);
    Tile<T, TOKENS, ROWS, SPLITS, DEPTH> s;
    const int t0 = blockIdx.x * TOKENS, row0 = (tile * ROWS + s.r) * 64;
    if (!s.run(m.w, m.top, m.n_out, 0, row0, m.n_out, n_in, x + (long long)t0 * 64, (long long)x_rows * 64, shared, barriers)) return;
    s.each([&](int token, int row, float sum, float factor) {
        const int t = t0 + token, o = row0 + row;
        if (t >= n_rows || o >= m.n_out) return;
        float y = sum * inv[t] * factor;
        if (m.bias) y += m.bias[o];
        if (residual) y += residual[t * ldr + o];
        m.out[t * m.ldo + o] = y;
    });
#endif
}

// Up to three matrices that read the same x, in one launch; blockIdx.x: TOKENS rows of x (fastest, so that neighbours share W in the L2 cache),
// blockIdx.y: 64 ROWS rows of W, b_i of them for matrix i. `second`: bit i says that matrix i is of type B.
#define KERNEL(name, A, B) extern "C" __global__ void __launch_bounds__(128 * ROWS * SPLITS, BLOCKS) wgmma_##name(const u8* w0, const u8* w1, const u8* w2, \
    const u8* top0, const u8* top1, const u8* top2, float* out0, float* out1, float* out2, const float* bias0, const float* bias1, const float* bias2, \
    int n0, int n1, int n2, int b0, int b1, long long ldo0, long long ldo1, long long ldo2, const float* residual, long long ldr, int second, \
    const u16* x, const float* inv, int x_rows, int n_rows, int n_in) { \
    int tile = blockIdx.y, i = 0; \
    Matrix m = {w0, top0, out0, bias0, n0, ldo0}; \
    if (tile >= b0) { tile -= b0; i = 1; m = {w1, top1, out1, bias1, n1, ldo1}; } \
    if (i && tile >= b1) { tile -= b1; i = 2; m = {w2, top2, out2, bias2, n2, ldo2}; } \
    if (A == B || !(second >> i & 1)) product<A>(m, tile, x, inv, x_rows, residual, ldr, n_rows, n_in); \
    else product<B>(m, tile, x, inv, x_rows, residual, ldr, n_rows, n_in); }
#define EACH(name, T) KERNEL(name, T, T)
#ifdef SECOND_TYPE
KERNEL(mixed, ONLY_TYPE, SECOND_TYPE)
#else
EACH_QUANT(EACH)
#endif
