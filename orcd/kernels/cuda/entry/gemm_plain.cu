#include "types/plain_gemm.cu"

// F32 and BF16 weights: FP32 arithmetic, 64 x 64 outputs a block, 4 x 4 a thread, k in order
template<int T> __device__ __forceinline__ void plain(const PlainGemmArgs& a) {
    __shared__ __align__(16) float xs[16][68], ws[16][68];
    const int n_rows = a.n_rows, n_out = a.n_out, n_in = a.n_in;
    int tid = threadIdx.x, t0 = blockIdx.x * 64, o0 = blockIdx.y * 64, tx = tid % 16 * 4, ty = tid / 16 * 4;
    float acc[4][4] = {};
    for (int k0 = 0; k0 < n_in; k0 += 16) {
        for (int j = tid; j < 64 * 16; j += 256) {
            int r = j / 16, k = j % 16;
            xs[k][r] = t0 + r < n_rows && k0 + k < n_in ? a.x[(t0 + r) * a.x_stride + k0 + k] : 0;
            ws[k][r] = o0 + r < n_out && k0 + k < n_in ? Type<T>::at(a.w + (i64)(o0 + r) * n_in * Type<T>::s, k0 + k) : 0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 16; k++) {
            const float4 x = *(const float4*)&xs[k][ty], w = *(const float4*)&ws[k][tx];
            const float xv[4] = {x.x, x.y, x.z, x.w}, wv[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) acc[i][j] = fmaf(xv[i], wv[j], acc[i][j]);
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
            if (a.bias) y += a.bias[o];
            if (a.residual) y += a.residual[t * a.residual_stride + o];
            a.out[t * a.out_stride + o] = y;
        }
}
#define KERNEL(name, T) \
extern "C" __global__ void __launch_bounds__(256, 5) gemm_##name(const __grid_constant__ PlainGemmArgs a) { plain<T>(a); }
KERNEL(f32, F32)
KERNEL(bf16, BF16)
