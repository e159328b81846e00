#include "math/mma_tile.cu"

// The grid has room for the worst case, (slots/128 + experts) tiles; a block finds its expert by walking the offsets, surplus blocks leave.
struct ExpertGemmArgs {
    const u8* w; const u16* x; const float *inv, *sums; const int *offset, *slots; float* out; const float* bias;
    int n_expert, n_out, n_in, x_rows, ld; i64 out_stride;
};
template<int T> __device__ __forceinline__ void expert_gemm(const ExpertGemmArgs& a) {
    __shared__ __align__(16) Shared s;
    int e = 0, tile_at = blockIdx.x, o = blockIdx.y * BN;
    for (; e < a.n_expert; e++) {
        int tiles = (a.offset[e + 1] - a.offset[e] + BM - 1) / BM;
        if (tile_at < tiles) break;
        tile_at -= tiles;
    }
    if (e == a.n_expert) return;
    if (threadIdx.x < BM) {
        int i = a.offset[e] + tile_at * BM + threadIdx.x, slot = i < a.offset[e + 1] ? a.slots[i] : -1;
        s.yrow[threadIdx.x] = slot;
        s.xrow[threadIdx.x] = slot < 0 ? -1 : i;
    }
    __syncthreads();
    const i64 first = (i64)e * (is_plain<T>() ? a.n_out : (a.n_out + 15) / 16 * 16) + o;
    tile<T>(s, Planes<T>(a.w, a.n_in), first, a.n_out - o, a, o, a.bias ? a.bias + (i64)e * a.n_out : nullptr, nullptr, 0);
}
#define KERNEL(name, T) \
extern "C" __global__ void __launch_bounds__(256, 2) expert_gemm_##name(const __grid_constant__ ExpertGemmArgs a) { expert_gemm<T>(a); }
EACH_HALF(KERNEL)
