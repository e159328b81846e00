#include "math/mma_tile.cu"

// The grid has room for the worst case, (slots/128 + experts) tiles; a block finds its expert by walking the offsets, surplus blocks leave.
template<int T>
__device__ __forceinline__ void expert_gemm(Shared& s, const u8* w, const u16* x, const float* xinv, const float* xsum, const int* offset,
    const int* slots, float* out, const float* bias, int n_expert, int n_out, int n_in, int x_rows, int ldx, long long ldo) {
    int e = 0, tile_at = blockIdx.x, o = blockIdx.y * BN;
    for (; e < n_expert; e++) {
        int tiles = (offset[e + 1] - offset[e] + BM - 1) / BM;
        if (tile_at < tiles) break;
        tile_at -= tiles;
    }
    if (e == n_expert) return;
    if (threadIdx.x < BM) {
        int i = offset[e] + tile_at * BM + threadIdx.x, slot = i < offset[e + 1] ? slots[i] : -1;
        s.yrow[threadIdx.x] = slot; s.xrow[threadIdx.x] = slot < 0 ? -1 : i;
    }
    __syncthreads();
    tile<T>(s, Planes<T>(w, n_in), (long long)e * (is_plain<T>() ? n_out : (n_out + 15) / 16 * 16) + o, n_out - o, x, xinv, xsum, x_rows, ldx, n_in, out + o, ldo,
        bias ? bias + (long long)e * n_out + o : nullptr, nullptr, 0);
}
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(256, 2) expert_gemm_##name(const u8* w, const u16* x, \
    const float* xinv, const float* xsum, const int* offset, const int* slots, float* out, const float* bias, \
    int n_expert, int n_out, int n_in, int x_rows, int ldx, long long ldo) { \
    __shared__ __align__(16) Shared s; \
    expert_gemm<T>(s, w, x, xinv, xsum, offset, slots, out, bias, n_expert, n_out, n_in, x_rows, ldx, ldo); }
EACH_HALF(KERNEL)
