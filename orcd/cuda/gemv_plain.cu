#include "blocks.cu"
#include "source.cu"

// F32, F16 and BF16 weights: a block of 256 threads makes one number, out[slot][o] = W[o] . x (+ bias) (+ residual)
template<int T> __device__ __forceinline__ void plain(const u8* w, const Source& src, float* out, const float* bias, const float* residual, int n) {
    __shared__ float part[8], squares[8];
    float sum = 0, square = 0;
    for (int i = threadIdx.x; i < n; i += 256) sum = fmaf(Type<T>::at(w, i), src.one(i, square), sum);
    sum = warp_sum(sum); square = warp_sum(square);
    if ((threadIdx.x & 31) == 0) { part[threadIdx.x / 32] = sum; squares[threadIdx.x / 32] = square; }
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < 8; i++) sum += part[i];
    sum *= src.factor(squares, n);
    if (bias) sum += *bias;
    if (residual) sum += *residual;
    *out = sum;
}
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(256) gemv_##name(const u8* w, float* out, const float* bias, int n_out, \
    long long ldo, const float* residual, long long ldr, int n_in, const float* x, const float* other, long long ldx, long long ldother, \
    float eps, int mode, const int* ids, int per, int n_expert) { \
    let_next_start(); wait_for_last(); \
    const int slot = blockIdx.y, o = blockIdx.x, expert = ids ? ids[slot] : 0; \
    if (expert < 0 || expert >= n_expert) return; \
    const long long row = (long long)expert * n_out + o; \
    plain<T>(w + row * n_in * Type<T>::s, Source(x, other, slot / per, ldx, ldother, eps, mode), out + slot * ldo + o, \
        bias ? bias + row : nullptr, residual ? residual + slot * ldr + o : nullptr, n_in); }
EACH_PLAIN(KERNEL)
