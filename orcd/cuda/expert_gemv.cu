#include "dot.cu"

// out[s] = W[ids[s]] . x[s / per] + bias[ids[s]] for every slot s = blockIdx.y. A warp takes two rows of W.
template<int T, bool WIDE>
__device__ __forceinline__ void expert_gemv(const u8* w, const float* x, const int* ids, float* out, const float* bias,
    int n_expert, int n_out, int n_in, int per, long long ldx, long long ldo) {
    enum { R = 2, U = 3 };
    int first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * R, slot = blockIdx.y, lane = threadIdx.x & 31, e = ids[slot];
    if (first >= n_out || e < 0 || e >= n_expert) return;
    w += (long long)e * n_out * row_bytes<T>(n_in);
    const u8* row[R];
#pragma unroll
    for (int r = 0; r < R; r++) row[r] = w + min(first + r, n_out - 1) * row_bytes<T>(n_in);
    float sum[R];
    dot_rows<T, R, U, WIDE>(row, x + slot / per * ldx, n_in, 0, 1, sum);
#pragma unroll
    for (int r = 0; r < R; r++) if (lane == r && first + r < n_out)
        out[slot * ldo + first + r] = sum[r] + (bias ? bias[(long long)e * n_out + first + r] : 0);
}
#define KERNEL(name, T, WIDE) extern "C" __global__ void __launch_bounds__(256, 2) expert_gemv_##name(const u8* w, const float* x, \
    const int* ids, float* out, const float* bias, int n_expert, int n_out, int n_in, int per, long long ldx, long long ldo) { \
    expert_gemv<T, WIDE>(w, x, ids, out, bias, n_expert, n_out, n_in, per, ldx, ldo); }
#define KERNELS(name, T) KERNEL(name, T, true) KERNEL(name##_any, T, false)
EACH_TYPE(KERNELS)
