#include "math/wgmma_mainloop.cu"
enum { R = 2, D = 3, MOST = 128 };     // rows of W by 64, stages of MOST tokens; of fewer tokens there are more stages

// Blocks on an SM: two, unless a type wants too many registers
template<int T> __device__ constexpr int resident() { return T == MXFP4 || T == Q4_0 || T == Q4_1 ? 2 : 1; }

// Gated: gate and up, and halves laid out as the next product's x. Otherwise one matrix, and out has a row for each slot.
struct ExpertWgmmaArgs {
    const u8 *w[2], *top[2]; const float* bias[2]; const int *offset, *slots; int n_expert, n_out, n_in;
    const u16* x; const float* inv; int x_rows;
    float* out; i64 out_stride;
    u16* half; float* half_inv; int half_rows;
};

// One block: 128 rows of an expert's matrix, or 64 of gate and the same 64 of up, times N tokens from position p0 on, of which `left` are the expert's.
template<int T, int N, bool GATED> __device__ __forceinline__ void expert(const ExpertWgmmaArgs& a, int expert, int p0, int left) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int DEEP = D * MOST / N;
    extern __shared__ __align__(1024) u16 shared[];
    __shared__ u64 barriers[2 * D * MOST / 32];
    Stages<N, R, 1, DEEP>::prepare(barriers);
    Tile<T, N, R, 1, DEEP> s;
    const bool up = GATED && s.r;
    const int n_out = a.n_out, row0 = (GATED ? blockIdx.y : 2 * blockIdx.y + s.r) * 64, first = expert * n_out, o = row0 + s.mine;
    const float* inv = a.inv + p0;
    u16* half = a.half + ((i64)blockIdx.y * a.half_rows + p0) * 64;
    const float* bias = up ? a.bias[1] : a.bias[0];
    s.run(up ? a.w[1] : a.w[0], (up ? a.top[1] : a.top[0]) + first, expert * ((n_out + 15) / 16), row0, n_out, a.n_in, a.x + (i64)p0 * 64, (i64)a.x_rows * 64, shared, barriers);
    if (bias) bias += first + row0;
    if (GATED) {
        store_gated<OAI>(s, bias, inv, n_out - row0, left, shared, half);
        if (blockIdx.y == 0) for (int i = threadIdx.x; i < min(left, N); i += 256) a.half_inv[p0 + i] = 1 / gated_scale<OAI>();
        return;
    }
    const bool in[2] = {o < n_out, o + 8 < n_out};
    const float b[2] = {bias && in[0] ? bias[s.mine] : 0, bias && in[1] ? bias[s.mine + 8] : 0};
    s.each([&](int token, const float (&v)[4]) {
        if (token >= left) return;              // an even number
        const float2 x = *(const float2*)(inv + token);
        const int slot[2] = {a.slots[p0 + token], a.slots[p0 + token + 1]};     // -1 where an expert's positions are filled up to a multiple of 8
#pragma unroll
        for (int e = 0; e < 4; e++) if (slot[e & 1] >= 0 && in[e / 2]) a.out[slot[e & 1] * a.out_stride + o + 8 * (e / 2)] = s.scaled(v[e], e, x) + b[e / 2];
    });
#endif
}

// The grid has room for the worst case; a block finds its expert by walking the offsets, surplus blocks leave. Gated: as many blocks as the next
// product's x has spans, whose columns from n_out on are zero.
template<int T, bool GATED> __device__ __forceinline__ void experts(const ExpertWgmmaArgs& a) {
    pdl_launch_dependents();
    pdl_wait();            // for the offsets
    int e = 0, tile = blockIdx.x;
    for (; e < a.n_expert; e++) {
        int tiles = (a.offset[e + 1] - a.offset[e] + MOST - 1) / MOST;
        if (tile < tiles) break;
        tile -= tiles;
    }
    if (e == a.n_expert) return;
    const int p0 = a.offset[e] + tile * MOST, left = a.offset[e + 1] - p0;
    if (left <= 32) expert<T, 32, GATED>(a, e, p0, left);
    else if (left <= 64) expert<T, 64, GATED>(a, e, p0, left);
    else if (left <= 96) expert<T, 96, GATED>(a, e, p0, left);
    else expert<T, 128, GATED>(a, e, p0, left);
}
#define KERNEL(name, T) \
extern "C" __global__ void __launch_bounds__(256, resident<T>()) experts_##name(const __grid_constant__ ExpertWgmmaArgs a) { experts<T, false>(a); } \
extern "C" __global__ void __launch_bounds__(256, resident<T>()) experts_gated_##name(const __grid_constant__ ExpertWgmmaArgs a) { experts<T, true>(a); }
EACH_QUANT(KERNEL)
