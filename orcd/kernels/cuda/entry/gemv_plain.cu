#include "types/blocks.cu"
#include "math/input_prologue.cu"

// F32, F16 and BF16 weights: a block of 256 threads makes one number, out[slot][o] = W[o] . x (+ bias) (+ residual)
template<int T> __device__ __forceinline__ float4 four_of(const u8* w, int i) {         // weights i…i+3 of an aligned row
    if (T == F32) return *(const float4*)(w + 4 * i);
    const uint2 v = *(const uint2*)(w + 2 * i);
    if (T == F16) return {half_bits(v.x), half_bits(v.x >> 16), half_bits(v.y), half_bits(v.y >> 16)};
    return {__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xFFFF0000), __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xFFFF0000)};
}
struct GemvPlainArgs {
    const u8* w; float* out; const float* bias; int n_out; i64 ldo; const float* residual; i64 ldr; int n_in;
    const float *x, *norm; i64 ldx; float eps;
    int per;            // rows of out that share a row of x
    const int* ids;     // which expert a row of out takes
    int n_expert;
};
#define GEMV_PLAIN_PARAMETERS const u8* w, float* out, const float* bias, int n_out, i64 ldo, const float* residual, i64 ldr, int n_in, \
    const float* x, const float* norm, i64 ldx, float eps, int per, const int* ids, int n_expert
#define GEMV_PLAIN_ARGS {w, out, bias, n_out, ldo, residual, ldr, n_in, x, norm, ldx, eps, per, ids, n_expert}
// This thread's part of the product of a row with the vector, and of the vector's sum of squares
template<int T> __device__ __forceinline__ void dot(const u8* w, const InputPrologue& src, int n, float& sum, float& square) {
    constexpr int AHEAD = 4;                            // times four weights that are on their way before x is there
    if (n % 4 == 0) {
        float4 ahead[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int i = 4 * (threadIdx.x + 256 * k);
            if (i < n) ahead[k] = four_of<T>(w, i);
        }
        pdl_wait();
        pdl_launch_dependents();
        auto add = [&](float4 v, int i) {
            float x[4];
            src.four(x, i, square);
            sum = fmaf(v.x, x[0], sum);
            sum = fmaf(v.y, x[1], sum);
            sum = fmaf(v.z, x[2], sum);
            sum = fmaf(v.w, x[3], sum);
        };
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int i = 4 * (threadIdx.x + 256 * k);
            if (i < n) add(ahead[k], i);
        }
        for (int i = 4 * (threadIdx.x + 256 * AHEAD); i < n; i += 4 * 256) add(four_of<T>(w, i), i);
    } else {
        pdl_wait();
        pdl_launch_dependents();
        for (int i = threadIdx.x; i < n; i += 256) sum = fmaf(Type<T>::at(w, i), src.one(i, square), sum);
    }
}
template<int T> __device__ __forceinline__ void plain(const GemvPlainArgs& a) {
    __shared__ float part[8], squares[8];
    if (a.ids) pdl_wait();
    const int slot = blockIdx.y, o = blockIdx.x, expert = a.ids ? a.ids[slot] : 0;
    if (expert < 0 || expert >= a.n_expert) return;
    const i64 row = (i64)expert * a.n_out + o;
    const u8* w = a.w + row * a.n_in * Type<T>::s;
    const InputPrologue src(a.x, a.norm, slot / a.per, a.ldx, a.eps);
    float sum = 0, square = 0;
    dot<T>(w, src, a.n_in, sum, square);
    sum = warp_sum(sum);
    square = warp_sum(square);
    if ((threadIdx.x & 31) == 0) {
        part[threadIdx.x / 32] = sum;
        squares[threadIdx.x / 32] = square;
    }
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < 8; i++) sum += part[i];
    sum *= src.factor(squares, 8, a.n_in);
    if (a.bias) sum += a.bias[row];
    if (a.residual) sum += a.residual[slot * a.ldr + o];
    a.out[slot * a.ldo + o] = sum;
}
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(256) gemv_##name(GEMV_PLAIN_PARAMETERS) { \
    const GemvPlainArgs a = GEMV_PLAIN_ARGS; \
    plain<T>(a); \
}
EACH_PLAIN(KERNEL)
