#include "types/plain_gemm.cu"
#include "math/reduce.cu"
#include "math/input_prologue.cu"

// F32 and BF16 weights with few rows, such as a router: 4 rows of x a block, 4 rows of W a warp; a lane adds up every 32nd
// four columns, then lanes are added
template<int T> __device__ __forceinline__ float4 four(const u8* row, int k) {
    if (T == F32) return *(const float4*)(row + 4 * k);
    const uint2 v = *(const uint2*)(row + 2 * k);
    return {__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xFFFF0000), __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xFFFF0000)};
}
template<int T> __device__ __forceinline__ void thin(const PlainGemmArgs& a) {
    pdl_launch_dependents();
    pdl_wait();
    const int n_rows = a.n_rows, n_out = a.n_out, n_in = a.n_in;
    const int lane = threadIdx.x & 31, t0 = 4 * blockIdx.x, o0 = 32 * blockIdx.y + 4 * (threadIdx.x / 32);
    if (o0 >= n_out) return;
    const u8* rows[4];
#pragma unroll
    for (int j = 0; j < 4; j++) rows[j] = a.w + (i64)min(o0 + j, n_out - 1) * n_in * Type<T>::s;
    float acc[4][4] = {};
#pragma unroll 4
    for (int k = 4 * lane; k < n_in; k += 128) {
        float4 w[4];
#pragma unroll
        for (int j = 0; j < 4; j++) w[j] = four<T>(rows[j], k);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 x = *(const float4*)(a.x + min(t0 + i, n_rows - 1) * a.x_stride + k);
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] = fmaf(x.w, w[j].w, fmaf(x.z, w[j].z, fmaf(x.y, w[j].y, fmaf(x.x, w[j].x, acc[i][j]))));
        }
    }
    float mine = 0;             // lane 4 i + j keeps row i, column j
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float y = warp_sum(acc[i][j]);
            if (lane == 4 * i + j) mine = y;
        }
    const int t = t0 + lane / 4, o = o0 + (lane & 3);
    if (lane >= 16 || t >= n_rows || o >= n_out) return;
    if (a.bias) mine += a.bias[o];
    if (a.residual) mine += a.residual[t * a.residual_stride + o];
    a.out[t * a.out_stride + o] = mine;
}
#define KERNEL(name, T) \
extern "C" __global__ void __launch_bounds__(256) thin_##name(const __grid_constant__ PlainGemmArgs a) { thin<T>(a); }
KERNEL(f32, F32)
KERNEL(bf16, BF16)
