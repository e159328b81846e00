#include "types/blocks.cu"

// F32 and BF16 weights: FP32 arithmetic, 64 x 64 outputs a block, 4 x 4 a thread, k in order
template<int T> __device__ __forceinline__ void plain(const u8* w, const float* x, float* out, const float* bias, const float* residual,
    int n_rows, int n_out, int n_in, long long ldx, long long ldo, long long ldr) {
    __shared__ __align__(16) float xs[16][68], ws[16][68];
    int tid = threadIdx.x, t0 = blockIdx.x * 64, o0 = blockIdx.y * 64, tx = tid % 16 * 4, ty = tid / 16 * 4;
    float acc[4][4] = {};
    for (int k0 = 0; k0 < n_in; k0 += 16) {
        for (int j = tid; j < 64 * 16; j += 256) {
            int r = j / 16, k = j % 16;
            xs[k][r] = t0 + r < n_rows && k0 + k < n_in ? x[(t0 + r) * ldx + k0 + k] : 0;
            ws[k][r] = o0 + r < n_out && k0 + k < n_in ? Type<T>::at(w + (long long)(o0 + r) * n_in * Type<T>::s, k0 + k) : 0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 16; k++) {
            float4 a = *(const float4*)&xs[k][ty], b = *(const float4*)&ws[k][tx];
            float av[4] = {a.x, a.y, a.z, a.w}, bv[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) acc[i][j] = fmaf(av[i], bv[j], acc[i][j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int t = t0 + ty + i, o = o0 + tx + j;
            if (t >= n_rows || o >= n_out) continue;
            float y = acc[i][j];
            if (bias) y += bias[o];
            if (residual) y += residual[t * ldr + o];
            out[t * ldo + o] = y;
        }
}
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(256) gemm_##name(const u8* w, const float* x, float* out, \
    const float* bias, const float* residual, int n_rows, int n_out, int n_in, long long ldx, long long ldo, long long ldr) { \
    plain<T>(w, x, out, bias, residual, n_rows, n_out, n_in, ldx, ldo, ldr); }
KERNEL(f32, F32)
KERNEL(bf16, BF16)
