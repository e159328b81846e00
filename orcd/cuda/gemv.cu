#include "dot.cu"

// out[t][o] = W[o] . x[t] (+ bias[o]) (+ residual[t][o]). `parts` of a block's 8 warps (1, 2, 4 or 8) share R rows of W; blockIdx.y is t.
template<int T, int R, int U, bool WIDE>
__device__ __forceinline__ void gemv(const u8* w, const float* x, float* out, const float* bias, const float* residual,
    int n_out, int n_in, long long ldx, long long ldo, long long ldr, int parts) {
    __shared__ float partial[8][R];
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, part = warp % parts, t = blockIdx.y;
    int first = (blockIdx.x * (8 / parts) + warp / parts) * R;
    const u8* row[R];
#pragma unroll
    for (int r = 0; r < R; r++) row[r] = w + min(first + r, n_out - 1) * row_bytes<T>(n_in);
    float sum[R];
    dot_rows<T, R, U, WIDE>(row, x + t * ldx, n_in, part, parts, sum);
    if (parts > 1) {
#pragma unroll
        for (int r = 0; r < R; r++) if (lane == 0) partial[warp][r] = sum[r];
        __syncthreads();
        if (part) return;
#pragma unroll
        for (int r = 0; r < R; r++) for (int p = 1; p < parts; p++) sum[r] += partial[warp + p][r];
    }
#pragma unroll
    for (int r = 0; r < R; r++) if (lane == r && first + r < n_out) {
        float y = sum[r];
        if (bias) y += bias[first + r];
        if (residual) y += residual[t * ldr + first + r];
        out[t * ldo + first + r] = y;
    }
}

// With a bound of 2 blocks an SM the compiler spends registers on loads in flight instead of on more warps.
#define KERNEL(name, T, R, U, WIDE) extern "C" __global__ void __launch_bounds__(256, 2) gemv_##name(const u8* w, const float* x, \
    float* out, const float* bias, const float* residual, int n_out, int n_in, long long ldx, long long ldo, long long ldr, int parts) { \
    gemv<T, R, U, WIDE>(w, x, out, bias, residual, n_out, n_in, ldx, ldo, ldr, parts); }
#define KERNELS(name, T) KERNEL(name##_1, T, 1, 4, true) KERNEL(name##_4, T, 4, 2, true) KERNEL(name##_any, T, 1, 4, false)
EACH_TYPE(KERNELS)
