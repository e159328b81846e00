#include "math/reduce.cu"
#include "math/rope_angle.cu"
#include "math/input_prologue.cu"
typedef long long i64;

// y = x / sqrt(mean(x^2) + eps) * w; one block a row
extern "C" __global__ void rms_norm(const float* x, i64 x_stride, const float* w, float eps, float* out, i64 out_stride, int n_rows, int n) {
    pdl_launch_dependents();
    pdl_wait();
    const int row = blockIdx.x;
    if (row >= n_rows) return;
    x += row * x_stride, out += row * out_stride;
    float xs[4], ws[4], sum = 0.f;  // the first four columns of a thread stay in registers
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        const int i = threadIdx.x + j * blockDim.x;
        xs[j] = i < n ? x[i] : 0.f, ws[j] = i < n ? w[i] : 0.f, sum += xs[j] * xs[j];
    }
    for (int i = threadIdx.x + 4 * blockDim.x; i < n; i += blockDim.x) sum += x[i] * x[i];
    const float scale = rsqrtf(block_sum(sum) / n + eps);
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        const int i = threadIdx.x + j * blockDim.x;
        if (i < n) out[i] = xs[j] * scale * ws[j];
    }
    for (int i = threadIdx.x + 4 * blockDim.x; i < n; i += blockDim.x) out[i] = x[i] * scale * w[i];
}

// the same over each head of head_dim columns; one warp a head
extern "C" __global__ void head_norm(const float* x, i64 x_stride, const float* w, float eps, float* out, i64 out_stride, int n_rows, int n_head, int head_dim) {
    const int item = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (item >= n_rows * n_head) return;
    const int row = item / n_head, head = item % n_head;
    x += row * x_stride + head * head_dim, out += row * out_stride + head * head_dim;
    float sum = 0.f;
    for (int i = lane; i < head_dim; i += 32) sum += x[i] * x[i];
    const float scale = rsqrtf(warp_sum(sum) / head_dim + eps);
    for (int i = lane; i < head_dim; i += 32) out[i] = x[i] * scale * w[i];
}

// Rotate pair i of every head by the angle position * inv_freq[i]; one thread a pair. A pair is (i, i + n_rot/2) in style neox and
// (2i, 2i + 1) otherwise; columns from n_rot on are copied.
extern "C" __global__ void rope(const float* x, i64 x_stride, const float* inv_freq, float mscale, const int* state, float* out, i64 out_stride,
                                int n_rows, int n_head, int head_dim, int n_rot, int neox) {
    const int row = blockIdx.y, t = blockIdx.x * blockDim.x + threadIdx.x, pairs = head_dim / 2;
    if (row >= n_rows || t >= n_head * pairs) return;
    const int head = t / pairs, i = t % pairs, half = n_rot / 2;
    x += row * x_stride + head * head_dim, out += row * out_stride + head * head_dim;
    if (i >= half) {  // not rotated
        const int a = n_rot + 2 * (i - half);
        out[a] = x[a], out[a + 1] = x[a + 1];
        return;
    }
    const float2 turn = rope_angle(state[0] + row, inv_freq[i], mscale);
    const int a = neox ? i : 2 * i, b = neox ? i + half : 2 * i + 1;
    const float p = x[a], q = x[b];
    out[a] = p * turn.x - q * turn.y, out[b] = q * turn.x + p * turn.y;
}

// silu(gate) * up
extern "C" __global__ void swiglu(const float* gate, i64 gate_stride, const float* up, i64 up_stride, float* out, i64 out_stride, int n_rows, int n) {
    const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= n_rows || i >= n) return;
    const float g = gate[row * gate_stride + i];
    out[row * out_stride + i] = g / (1.f + expf(-g)) * up[row * up_stride + i];
}

// the clamped SwiGLU of gpt-oss: g sigmoid(1.702 g) (u + 1), g at most 7, u within +-7. A NaN stays one.
extern "C" __global__ void clamped_swiglu(const float* gate, i64 gate_stride, const float* up, i64 up_stride, float* out, i64 out_stride, int n_rows, int n) {
    const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= n_rows || i >= n) return;
    float g = gate[row * gate_stride + i], u = up[row * up_stride + i];
    g = g > 7.f ? 7.f : g;
    u = u > 7.f ? 7.f : u < -7.f ? -7.f : u;
    out[row * out_stride + i] = g / (1.f + expf(-1.702f * g)) * (u + 1.f);
}

// a + b
extern "C" __global__ void add(const float* a, i64 a_stride, const float* b, i64 b_stride, float* out, i64 out_stride, int n_rows, int n) {
    const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= n_rows || i >= n) return;
    out[row * out_stride + i] = a[row * a_stride + i] + b[row * b_stride + i];
}

extern "C" __global__ void copy(const float* x, i64 x_stride, float* out, i64 out_stride, int n_rows, int n) {
    const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= n_rows || i >= n) return;
    out[row * out_stride + i] = x[row * x_stride + i];
}
