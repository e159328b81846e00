#include "types/blocks.cu"
#include "math/reduce.cu"
#include "math/input_prologue.cu"

// F32 and BF16 weights with few rows, such as a router: 4 rows of x a block, 4 rows of W a warp; a lane adds up every 32nd
// four columns, then lanes are added
template<int T> __device__ __forceinline__ float4 four(const u8* row, int k) {
    if (T == F32) return *(const float4*)(row + 4 * k);
    const uint2 v = *(const uint2*)(row + 2 * k);
    return {__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xFFFF0000), __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xFFFF0000)};
}
template<int T> __device__ __forceinline__ void thin(const u8* w, const float* x, float* out, const float* bias, const float* residual,
    int n_rows, int n_out, int n_in, long long ldx, long long ldo, long long ldr) {
    pdl_launch_dependents();
    pdl_wait();
    const int lane = threadIdx.x & 31, t0 = 4 * blockIdx.x, o0 = 32 * blockIdx.y + 4 * (threadIdx.x / 32);
    if (o0 >= n_out) return;
    const u8* rows[4];
#pragma unroll
    for (int j = 0; j < 4; j++) rows[j] = w + (long long)min(o0 + j, n_out - 1) * n_in * Type<T>::s;
    float acc[4][4] = {};
#pragma unroll 4
    for (int k = 4 * lane; k < n_in; k += 128) {
        float4 b[4];
#pragma unroll
        for (int j = 0; j < 4; j++) b[j] = four<T>(rows[j], k);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 a = *(const float4*)(x + min(t0 + i, n_rows - 1) * ldx + k);
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] = fmaf(a.w, b[j].w, fmaf(a.z, b[j].z, fmaf(a.y, b[j].y, fmaf(a.x, b[j].x, acc[i][j]))));
        }
    }
    float mine = 0;             // lane 4 i + j keeps row i, column j
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) { const float y = warp_sum(acc[i][j]); if (lane == 4 * i + j) mine = y; }
    const int t = t0 + lane / 4, o = o0 + (lane & 3);
    if (lane >= 16 || t >= n_rows || o >= n_out) return;
    if (bias) mine += bias[o];
    if (residual) mine += residual[t * ldr + o];
    out[t * ldo + o] = mine;
}
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(256) thin_##name(const u8* w, const float* x, float* out, \
    const float* bias, const float* residual, int n_rows, int n_out, int n_in, long long ldx, long long ldo, long long ldr) { \
    thin<T>(w, x, out, bias, residual, n_rows, n_out, n_in, ldx, ldo, ldr); }
KERNEL(f32, F32)
KERNEL(bf16, BF16)
