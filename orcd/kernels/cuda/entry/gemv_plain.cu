#include "types/blocks.cu"
#include "math/input_prologue.cu"

// F32, F16 and BF16 weights: a block of 256 threads makes one number, out[slot][o] = W[o] . x (+ bias) (+ residual)
template<int T> __device__ __forceinline__ float4 four_of(const u8* w, int i) {         // weights i…i+3 of an aligned row
    if (T == F32) return *(const float4*)(w + 4 * i);
    const uint2 v = *(const uint2*)(w + 2 * i);
    if (T == F16) return {half_bits(v.x), half_bits(v.x >> 16), half_bits(v.y), half_bits(v.y >> 16)};
    return {__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xFFFF0000), __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xFFFF0000)};
}
template<int T> __device__ __forceinline__ void plain(const u8* w, const InputPrologue& src, float* out, const float* bias, const float* residual, int n) {
    __shared__ float part[8], squares[8];
    constexpr int AHEAD = 4;                            // times four weights that are on their way before x is there
    float sum = 0, square = 0;
    if (n % 4 == 0) {
        float4 a[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) { const int i = 4 * (threadIdx.x + 256 * k); if (i < n) a[k] = four_of<T>(w, i); }
        pdl_wait(); pdl_launch_dependents();
        auto add = [&](float4 a, int i) {
            float x[4];
            src.four(x, i, square);
            sum = fmaf(a.x, x[0], sum); sum = fmaf(a.y, x[1], sum); sum = fmaf(a.z, x[2], sum); sum = fmaf(a.w, x[3], sum);
        };
#pragma unroll
        for (int k = 0; k < AHEAD; k++) { const int i = 4 * (threadIdx.x + 256 * k); if (i < n) add(a[k], i); }
        for (int i = 4 * (threadIdx.x + 256 * AHEAD); i < n; i += 4 * 256) add(four_of<T>(w, i), i);
    } else {
        pdl_wait(); pdl_launch_dependents();
        for (int i = threadIdx.x; i < n; i += 256) sum = fmaf(Type<T>::at(w, i), src.one(i, square), sum);
    }
    sum = warp_sum(sum); square = warp_sum(square);
    if ((threadIdx.x & 31) == 0) { part[threadIdx.x / 32] = sum; squares[threadIdx.x / 32] = square; }
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < 8; i++) sum += part[i];
    sum *= src.factor(squares, 8, n);
    if (bias) sum += *bias;
    if (residual) sum += *residual;
    *out = sum;
}
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(256) gemv_##name(const u8* w, float* out, const float* bias, int n_out, \
    long long ldo, const float* residual, long long ldr, int n_in, const float* x, const float* norm, long long ldx, float eps, int per, \
    const int* ids, int n_expert) { \
    if (ids) pdl_wait(); \
    const int slot = blockIdx.y, o = blockIdx.x, expert = ids ? ids[slot] : 0; \
    if (expert < 0 || expert >= n_expert) return; \
    const long long row = (long long)expert * n_out + o; \
    plain<T>(w + row * n_in * Type<T>::s, InputPrologue(x, norm, slot / per, ldx, eps), out + slot * ldo + o, \
        bias ? bias + row : nullptr, residual ? residual + slot * ldr + o : nullptr, n_in); }
EACH_PLAIN(KERNEL)
