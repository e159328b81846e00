#include "math/mma_tile.cu"

// blockIdx.x: 128 rows of x (fastest, so that neighbours share W in the L2 cache), blockIdx.y: 64 rows of W
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(256, 2) gemm_##name(const u8* w, const u16* x, const float* xinv, \
    const float* xsum, float* out, const float* bias, const float* residual, int n_rows, int n_out, int n_in, int x_rows, int ldx, \
    long long ldo, long long ldr) { \
    __shared__ __align__(16) Shared s; \
    int t = blockIdx.x * BM + threadIdx.x, o = blockIdx.y * BN; \
    if (threadIdx.x < BM) s.xrow[threadIdx.x] = s.yrow[threadIdx.x] = t < n_rows ? t : -1; \
    __syncthreads(); \
    tile<T>(s, Planes<T>(w, n_in), o, n_out - o, x, xinv, xsum, x_rows, ldx, n_in, out + o, ldo, \
        bias ? bias + o : nullptr, residual ? residual + o : nullptr, ldr); }
EACH_HALF(KERNEL)
