// Where a product takes its vector from: as it is, or through the small operation before the product, which costs no launch of its own then
#ifndef ORCD_SOURCE
#define ORCD_SOURCE
#include "blocks.cu"
#include "reduce.cu"

// Programmatic dependent launch (from Hopper on): the next kernel may start when all blocks of this one have said so, and what it reads of
// this one's results it reads after it has waited for its end.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

enum { AS_IS = 0, NORM = 1, SWIGLU = 2, SWIGLU_OAI = 3 };

// Element i of row `row` is x[i], or x[i] * w[i] (the norm's common factor is applied to the products), or silu(gate[i]) * up[i]
struct Source {
    const float *x, *other;
    float eps;
    int mode;
    __device__ Source(const float* x, const float* other, long long row, long long ldx, long long ldo, float eps, int mode)
        : x(x + row * ldx), other(other + (mode == NORM ? 0 : row * ldo)), eps(eps), mode(mode) {}

    __device__ __forceinline__ float value(float a, float b, float& square) const {
        if (mode == NORM) { square = fmaf(a, a, square); return a * b; }
        if (mode == SWIGLU) return a / (1.f + expf(-a)) * b;
        if (mode == SWIGLU_OAI) {
            a = a > 7.f ? 7.f : a; b = b > 7.f ? 7.f : b < -7.f ? -7.f : b;
            return a / (1.f + expf(-1.702f * a)) * (b + 1.f);
        }
        return a;
    }
    __device__ __forceinline__ float one(int i, float& square) const { return value(x[i], mode ? other[i] : 0.f, square); }
    __device__ __forceinline__ void four(float* to, int i, float& square) const {       // i is a multiple of 4
        float4 a, b = {0, 0, 0, 0};
        if ((((u64)x | (u64)other) & 15) == 0) { a = *(const float4*)(x + i); if (mode) b = *(const float4*)(other + i); }
        else { a = {x[i], x[i + 1], x[i + 2], x[i + 3]}; if (mode) b = {other[i], other[i + 1], other[i + 2], other[i + 3]}; }
        to[0] = value(a.x, b.x, square); to[1] = value(a.y, b.y, square); to[2] = value(a.z, b.z, square); to[3] = value(a.w, b.w, square);
    }
    // 1 / root mean square, from the sums of squares of eight warps
    __device__ __forceinline__ float factor(const float* squares, int n) const {
        if (mode != NORM) return 1.f;
        float sum = 0;
        for (int i = 0; i < 8; i++) sum += squares[i];
        return rsqrtf(sum / n + eps);
    }
};
#endif
