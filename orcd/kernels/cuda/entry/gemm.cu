#include "math/mma_tile.cu"

// blockIdx.x: 128 rows of x (fastest, so that neighbours share W in the L2 cache), blockIdx.y: 64 rows of W
struct GemmArgs {
    const u8* w; const u16* x; const float *inv, *sums; float* out; const float *bias, *residual;
    int n_rows, n_out, n_in, x_rows, ld; i64 out_stride, residual_stride;
};
template<int T> __device__ __forceinline__ void gemm(const GemmArgs& a) {
    __shared__ __align__(16) Shared s;
    const int t = blockIdx.x * BM + threadIdx.x, o = blockIdx.y * BN;
    if (threadIdx.x < BM) s.xrow[threadIdx.x] = s.yrow[threadIdx.x] = t < a.n_rows ? t : -1;
    __syncthreads();
    tile<T>(s, Planes<T>(a.w, a.n_in), o, a.n_out - o, a, o, a.bias, a.residual, a.residual_stride);
}
#define KERNEL(name, T) \
extern "C" __global__ void __launch_bounds__(256, 2) gemm_##name(const __grid_constant__ GemmArgs a) { gemm<T>(a); }
EACH_HALF(KERNEL)
