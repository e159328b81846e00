// Logits in an order: what the kernels share that look for the largest ones
#ifndef ORCD_LOGIT_KEYS
#define ORCD_LOGIT_KEYS
#include "math/input_prologue.cu"
constexpr int THREADS = 256, CHUNK = 1024;  // a block takes CHUNK ids

// floats as integers of the same order
__device__ __forceinline__ u32 to_key(float x) { const u32 b = __float_as_uint(x); return b & 0x80000000u ? ~b : b | 0x80000000u; }
__device__ __forceinline__ float from_key(u32 k) { return __uint_as_float(k & 0x80000000u ? k & 0x7fffffffu : ~k); }

// the largest of all threads, in every thread
__device__ u64 block_best(u64 v) {
    __shared__ u64 part[THREADS / 32];
    for (int o = 16; o; o >>= 1) { const u64 x = __shfl_xor_sync(~0u, v, o); v = x > v ? x : v; }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; i++) v = part[i] > v ? part[i] : v;
    return v;
}
__device__ float block_max(float v) { return from_key(block_best(to_key(v))); }

#endif
