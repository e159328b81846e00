#include "slab.cu"
enum { R = 2, D = 3, MOST = 128 };     // rows of W by 64, stages of MOST tokens; of fewer tokens there are more stages

// One block: 128 rows of an expert's matrix, or 64 of gate and the same 64 of up, times N tokens from position p0 on, of which `left` are the expert's.
// Gated: halves of gate * sigmoid(1.702 gate) * (up + 1), clamped, times 2^8 (at most 7 * 8 * 2^8), laid out as the next product's x. Otherwise out has a row for each slot.
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
    const int row0 = (GATED ? blockIdx.y : 2 * blockIdx.y + s.r) * 64;
    const float* bias = up ? bias1 : bias0;
    s.run(up ? w1 : w0, up ? top1 : top0, (long long)n_expert * n_out, (long long)expert * n_out, row0, n_out, n_in, x + (long long)p0 * 64, (long long)x_rows * 64, shared, barriers);
    auto value = [&](int token, int row, float sum, float factor) {
        float y = token < left ? sum * inv[p0 + token] * factor : 0;
        return bias && row0 + row < n_out ? y + bias[(long long)expert * n_out + row0 + row] : y;
    };
    if (!GATED) {
        s.each([&](int token, int row, float sum, float factor) {
            const int slot = token < left ? slots[p0 + token] : -1;         // none where an expert's positions are filled up to a multiple of 8
            if (slot >= 0 && row0 + row < n_out) out[slot * ldo + row0 + row] = value(token, row, sum, factor);
        });
        return;
    }
    float* ups = (float*)shared;                        // N tokens, 64 rows and 4 against bank conflicts
    u16* halves = shared + 2 * N * 68;
    __syncthreads();
    if (up) s.each([&](int token, int row, float sum, float factor) { ups[token * 68 + row] = value(token, row, sum, factor); });
    __syncthreads();
    if (!up) s.each([&](int token, int row, float sum, float factor) {
        float g = value(token, row, sum, factor), u = ups[token * 68 + row];
        g = g > 7.f ? 7.f : g; u = u > 7.f ? 7.f : u < -7.f ? -7.f : u;
        const float y = row0 + row < n_out ? g / (1.f + expf(-1.702f * g)) * (u + 1.f) : 0;
        const int chunk = 2 * (row / 16) + (row & 1);
        halves[token * 64 + ((chunk ^ ((p0 + token) & 7)) << 3) + (row & 15) / 2] = to_half_bits(256.f * y);
    });
    __syncthreads();
    uint4* to = (uint4*)(half + ((long long)blockIdx.y * half_rows + p0) * 64);
    for (int i = threadIdx.x; i < min(left, N) * 8; i += 256) to[i] = ((const uint4*)halves)[i];
    if (blockIdx.y == 0) for (int i = threadIdx.x; i < min(left, N); i += 256) half_inv[p0 + i] = 1 / 256.f;
#endif
}

// The grid has room for the worst case; a block finds its expert by walking the offsets, surplus blocks leave. Gated: as many blocks as the next
// product's x has spans, whose columns from n_out on are zero.
template<int T, bool GATED>
__device__ __forceinline__ void experts(const u8* w0, const u8* w1, const u8* top0, const u8* top1, const float* bias0, const float* bias1, const int* offset, const int* slots,
    int n_expert, int n_out, int n_in, const u16* x, const float* inv, int x_rows, float* out, long long ldo, u16* half, float* half_inv, int half_rows) {
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
extern "C" __global__ void __launch_bounds__(256, 2) experts_##name(const u8* w, const u8* top, const float* bias, const int* offset, const int* slots, \
    int n_expert, int n_out, int n_in, const u16* x, const float* inv, int x_rows, float* out, long long ldo) { \
    experts<T, false>(w, nullptr, top, nullptr, bias, nullptr, offset, slots, n_expert, n_out, n_in, x, inv, x_rows, out, ldo, nullptr, nullptr, 0); } \
extern "C" __global__ void __launch_bounds__(256, 2) experts_gated_##name(const u8* gate, const u8* up, const u8* gate_top, const u8* up_top, const float* gate_bias, \
    const float* up_bias, const int* offset, const int* slots, int n_expert, int n_out, int n_in, const u16* x, const float* inv, int x_rows, u16* half, float* half_inv, int half_rows) { \
    experts<T, true>(gate, up, gate_top, up_top, gate_bias, up_bias, offset, slots, n_expert, n_out, n_in, x, inv, x_rows, nullptr, 0, half, half_inv, half_rows); }
EACH_QUANT(KERNEL)
