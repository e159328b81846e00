#include "math/reduce.cu"
#include "math/rope_angle.cu"
#include "math/swiglu.cu"
#include "math/input_prologue.cu"

// y = x / sqrt(mean(x^2) + eps) * w; one block a row
struct RmsNormArgs { const float* x; i64 x_stride; const float* w; float eps; float* out; i64 out_stride; int n_rows, n; };
extern "C" __global__ void rms_norm(const __grid_constant__ RmsNormArgs a) {
    pdl_launch_dependents();
    pdl_wait();
    const int row = blockIdx.x;
    if (row >= a.n_rows) return;
    const float *x = a.x + row * a.x_stride, *w = a.w;
    float* out = a.out + row * a.out_stride;
    const int n = a.n;
    float xs[4], ws[4], sum = 0.f;  // the first four columns of a thread stay in registers
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        const int i = threadIdx.x + j * blockDim.x;
        xs[j] = i < n ? x[i] : 0.f;
        ws[j] = i < n ? w[i] : 0.f;
        sum += xs[j] * xs[j];
    }
    for (int i = threadIdx.x + 4 * blockDim.x; i < n; i += blockDim.x) sum += x[i] * x[i];
    const float scale = rsqrtf(block_sum(sum) / n + a.eps);
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        const int i = threadIdx.x + j * blockDim.x;
        if (i < n) out[i] = xs[j] * scale * ws[j];
    }
    for (int i = threadIdx.x + 4 * blockDim.x; i < n; i += blockDim.x) out[i] = x[i] * scale * w[i];
}

// the same over each head of head_dim columns; one warp a head
struct HeadNormArgs { const float* x; i64 x_stride; const float* w; float eps; float* out; i64 out_stride; int n_rows, n_head, head_dim; };
extern "C" __global__ void head_norm(const __grid_constant__ HeadNormArgs a) {
    const int item = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31, head_dim = a.head_dim;
    if (item >= a.n_rows * a.n_head) return;
    const int row = item / a.n_head, head = item % a.n_head;
    const float *x = a.x + row * a.x_stride + head * head_dim, *w = a.w;
    float* out = a.out + row * a.out_stride + head * head_dim;
    float sum = 0.f;
    for (int i = lane; i < head_dim; i += 32) sum += x[i] * x[i];
    const float scale = rsqrtf(warp_sum(sum) / head_dim + a.eps);
    for (int i = lane; i < head_dim; i += 32) out[i] = x[i] * scale * w[i];
}

// Rotate pair i of every head by the angle position * inv_freq[i]; one thread a pair. A pair is (i, i + n_rot/2) in style neox and
// (2i, 2i + 1) otherwise; columns from n_rot on are copied.
struct RopeArgs {
    const float* x; i64 x_stride; const float* inv_freq; float mscale; const int* state; float* out; i64 out_stride;
    int n_rows, n_head, head_dim, n_rot, neox;
};
extern "C" __global__ void rope(const __grid_constant__ RopeArgs a) {
    const int row = blockIdx.y, t = blockIdx.x * blockDim.x + threadIdx.x, pairs = a.head_dim / 2;
    if (row >= a.n_rows || t >= a.n_head * pairs) return;
    const int head = t / pairs, i = t % pairs, half = a.n_rot / 2;
    const float* x = a.x + row * a.x_stride + head * a.head_dim;
    float* out = a.out + row * a.out_stride + head * a.head_dim;
    if (i >= half) {  // not rotated
        const int j = a.n_rot + 2 * (i - half);
        out[j] = x[j];
        out[j + 1] = x[j + 1];
        return;
    }
    const float2 angle = rope_angle(a.state[0] + row, a.inv_freq[i], a.mscale);
    const int j = a.neox ? i : 2 * i, k = a.neox ? i + half : 2 * i + 1;
    const float p = x[j], q = x[k];
    out[j] = p * angle.x - q * angle.y;
    out[k] = q * angle.x + p * angle.y;
}

struct GatedArgs { const float* gate; i64 gate_stride; const float* up; i64 up_stride; float* out; i64 out_stride; int n_rows, n; };

// silu(gate) * up
extern "C" __global__ void swiglu(const __grid_constant__ GatedArgs a) {
    const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.n_rows || i >= a.n) return;
    a.out[row * a.out_stride + i] = activation(a.gate[row * a.gate_stride + i], a.up[row * a.up_stride + i], false);
}

// gpt-oss's variant
extern "C" __global__ void clamped_swiglu(const __grid_constant__ GatedArgs a) {
    const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.n_rows || i >= a.n) return;
    a.out[row * a.out_stride + i] = activation(a.gate[row * a.gate_stride + i], a.up[row * a.up_stride + i], true);
}

// x + y
struct AddArgs { const float* x; i64 x_stride; const float* y; i64 y_stride; float* out; i64 out_stride; int n_rows, n; };
extern "C" __global__ void add(const __grid_constant__ AddArgs a) {
    const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.n_rows || i >= a.n) return;
    a.out[row * a.out_stride + i] = a.x[row * a.x_stride + i] + a.y[row * a.y_stride + i];
}

struct CopyArgs { const float* x; i64 x_stride; float* out; i64 out_stride; int n_rows, n; };
extern "C" __global__ void copy(const __grid_constant__ CopyArgs a) {
    const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.n_rows || i >= a.n) return;
    a.out[row * a.out_stride + i] = a.x[row * a.x_stride + i];
}
