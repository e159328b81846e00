// Where a product takes its vector from: as it is, or through the small operation before the product, which costs no launch of its own then
#ifndef ORCD_SOURCE
#define ORCD_SOURCE
#include "copy/delays.cu"
#include "types/blocks.cu"
#include "math/reduce.cu"

// Programmatic dependent launch (from Hopper on): the next kernel may start when all blocks of this one have said so, and what it reads of
// this one's results it reads after it has waited for its end.
__device__ __forceinline__ void pdl_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    delay();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    delay();
#endif
}
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    delay();
    asm volatile("griddepcontrol.wait;" ::: "memory");
    delay();
#endif
}

// 1 / root mean square, from the sums of squares of the block's warps
__device__ __forceinline__ float norm_factor(bool norm, const float* squares, int warps, int n, float eps) {
    if (!norm) return 1.f;
    float sum = 0;
    for (int i = 0; i < warps; i++) sum += squares[i];
    return rsqrtf(sum / n + eps);
}

// Element i of row `row` is x[i], or x[i] * w[i] when there are weights of a norm: its common factor is applied to the products
struct InputPrologue {
    const float *x, *w;
    float eps;
    __device__ InputPrologue(const float* x, const float* w, long long row, long long ldx, float eps) : x(x + row * ldx), w(w), eps(eps) {}

    __device__ __forceinline__ void four(float* to, int i, float& square) const {       // i is a multiple of 4, x and w are aligned
        float4 a = *(const float4*)(x + i);
        if (w) {
            const float4 b = *(const float4*)(w + i);
            square = fmaf(a.x, a.x, square); square = fmaf(a.y, a.y, square); square = fmaf(a.z, a.z, square); square = fmaf(a.w, a.w, square);
            a.x *= b.x; a.y *= b.y; a.z *= b.z; a.w *= b.w;
        }
        to[0] = a.x; to[1] = a.y; to[2] = a.z; to[3] = a.w;
    }
    __device__ __forceinline__ float one(int i, float& square) const {
        float a = x[i];
        if (w) { square = fmaf(a, a, square); a *= w[i]; }
        return a;
    }
    __device__ __forceinline__ float factor(const float* squares, int warps, int n) const { return norm_factor(w, squares, warps, n, eps); }
};
#endif
