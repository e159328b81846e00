#include "dot.cu"

// out[t][o] = W[o] . x[t] (+ bias[o]) (+ residual[t][o]): a warp takes R rows of W, blockIdx.y is t
template<int T, int R> __device__ __forceinline__ void gemv(const u8* w, const float* x, float* out, const float* bias, const float* residual,
    int n_out, int n_in, long long ldx, long long ldo, long long ldr, int wide) {
    int first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * R, t = blockIdx.y, lane = threadIdx.x & 31;
    if (first >= n_out) return;
    const u8* row[R];
#pragma unroll
    for (int r = 0; r < R; r++) row[r] = w + min(first + r, n_out - 1) * row_bytes<T>(n_in);
    float sum[R];
    dot_rows<T, R, R == 4 ? 2 : 4>(row, x + t * ldx, n_in, wide, sum);
#pragma unroll
    for (int r = 0; r < R; r++) if (lane == r && first + r < n_out) {
        float y = sum[r];
        if (bias) y += bias[first + r];
        if (residual) y += residual[t * ldr + first + r];
        out[t * ldo + first + r] = y;
    }
}

#define KERNEL(name, T, R) extern "C" __global__ void __launch_bounds__(256) gemv_##name##_##R(const u8* w, const float* x, float* out, \
    const float* bias, const float* residual, int n_out, int n_in, long long ldx, long long ldo, long long ldr, int wide) { \
    gemv<T, R>(w, x, out, bias, residual, n_out, n_in, ldx, ldo, ldr, wide); }
#define KERNELS(name, T) KERNEL(name, T, 1) KERNEL(name, T, 2) KERNEL(name, T, 4)
EACH_TYPE(KERNELS)
