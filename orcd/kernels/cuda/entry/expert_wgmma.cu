#include "math/wgmma_mainloop.cu"
enum { R = 2, D = 3, MOST = 128 };     // rows of W by 64, stages of MOST tokens; of fewer tokens there are more stages

// Blocks on an SM: two, unless a type wants too many registers
template<int T> __device__ constexpr int resident() { return T == MXFP4 || T == Q4_0 || T == Q4_1 ? 2 : 1; }

// One block: 128 rows of an expert's matrix, or 64 of gate and the same 64 of up, times N tokens from position p0 on, of which `left` are the expert's.
// Gated: halves laid out as the next product's x. Otherwise out has a row for each slot.
template<int T, int N, bool GATED>
__device__ __forceinline__ void expert(const u8* w0, const u8* w1, const u8* top0, const u8* top1, const float* bias0, const float* bias1, int expert, int n_expert, int n_out, int n_in,
    const u16* x, const float* inv, int x_rows, int p0, int left, const int* slots, float* out, long long ldo, u16* half, float* half_inv, int half_rows) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int DEEP = D * MOST / N;
    extern __shared__ __align__(1024) u16 shared[];
    __shared__ u64 barriers[2 * D * MOST / 32];
    Stages<N, R, 1, DEEP>::prepare(barriers);
    Tile<T, N, R, 1, DEEP> s;
    const bool up = GATED && s.r;
    const int row0 = (GATED ? blockIdx.y : 2 * blockIdx.y + s.r) * 64, first = expert * n_out, o = row0 + s.mine;
    const float* bias = up ? bias1 : bias0;
    s.run(up ? w1 : w0, (up ? top1 : top0) + first, expert * ((n_out + 15) / 16), row0, n_out, n_in, x + (long long)p0 * 64, (long long)x_rows * 64, shared, barriers);
    if (bias) bias += first + row0;
    if (GATED) {
        store_gated<OAI>(s, bias, inv + p0, n_out - row0, left, shared, half + ((long long)blockIdx.y * half_rows + p0) * 64);
        if (blockIdx.y == 0) for (int i = threadIdx.x; i < min(left, N); i += 256) half_inv[p0 + i] = 1 / gated_scale<OAI>();
        return;
    }
    const bool in[2] = {o < n_out, o + 8 < n_out};
    const float b[2] = {bias && in[0] ? bias[s.mine] : 0, bias && in[1] ? bias[s.mine + 8] : 0};
    s.each([&](int token, const float (&v)[4]) {
        if (token >= left) return;              // an even number
        const float2 x = *(const float2*)(inv + p0 + token);
        const int slot[2] = {slots[p0 + token], slots[p0 + token + 1]};     // -1 where an expert's positions are filled up to a multiple of 8
#pragma unroll
        for (int e = 0; e < 4; e++) if (slot[e & 1] >= 0 && in[e / 2]) out[slot[e & 1] * ldo + o + 8 * (e / 2)] = s.scaled(v[e], e, x) + b[e / 2];
    });
#endif
}

// The grid has room for the worst case; a block finds its expert by walking the offsets, surplus blocks leave. Gated: as many blocks as the next
// product's x has spans, whose columns from n_out on are zero.
template<int T, bool GATED>
__device__ __forceinline__ void experts(const u8* w0, const u8* w1, const u8* top0, const u8* top1, const float* bias0, const float* bias1, const int* offset, const int* slots,
    int n_expert, int n_out, int n_in, const u16* x, const float* inv, int x_rows, float* out, long long ldo, u16* half, float* half_inv, int half_rows) {
    pdl_launch_dependents();
    pdl_wait();            // for the offsets
    int e = 0, tile = blockIdx.x;
    for (; e < n_expert; e++) {
        int tiles = (offset[e + 1] - offset[e] + MOST - 1) / MOST;
        if (tile < tiles) break;
        tile -= tiles;
    }
    if (e == n_expert) return;
    const int p0 = offset[e] + tile * MOST, left = offset[e + 1] - p0;
#define RUN(N) expert<T, N, GATED>(w0, w1, top0, top1, bias0, bias1, e, n_expert, n_out, n_in, x, inv, x_rows, p0, left, slots, out, ldo, half, half_inv, half_rows)
    if (left <= 32) RUN(32); else if (left <= 64) RUN(64); else if (left <= 96) RUN(96); else RUN(128);
#undef RUN
}
#define KERNEL(name, T) \
extern "C" __global__ void __launch_bounds__(256, resident<T>()) experts_##name(const u8* w, const u8* top, const float* bias, const int* offset, const int* slots, \
    int n_expert, int n_out, int n_in, const u16* x, const float* inv, int x_rows, float* out, long long ldo) { \
    experts<T, false>(w, nullptr, top, nullptr, bias, nullptr, offset, slots, n_expert, n_out, n_in, x, inv, x_rows, out, ldo, nullptr, nullptr, 0); } \
extern "C" __global__ void __launch_bounds__(256, resident<T>()) experts_gated_##name(const u8* gate, const u8* up, const u8* gate_top, const u8* up_top, const float* gate_bias, \
    const float* up_bias, const int* offset, const int* slots, int n_expert, int n_out, int n_in, const u16* x, const float* inv, int x_rows, u16* half, float* half_inv, int half_rows) { \
    experts<T, true>(gate, up, gate_top, up_top, gate_bias, up_bias, offset, slots, n_expert, n_out, n_in, x, inv, x_rows, nullptr, 0, half, half_inv, half_rows); }
EACH_QUANT(KERNEL)
