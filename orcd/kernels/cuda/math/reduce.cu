// Sums over a warp and over a block, always added in the same order
#ifndef ORCD_REDUCE
#define ORCD_REDUCE
#define NEG_INF __int_as_float(0xff800000)
__device__ __forceinline__ float warp_sum(float v) {
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
    for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
    return v;
}
// every thread of the block calls this and gets the sum; blockDim.x is a multiple of 32
__device__ float block_sum(float v) {
    __shared__ float part[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    v = warp_sum(v);
    if (lane == 0) part[warp] = v;
    __syncthreads();
    v = warp_sum(lane < (blockDim.x >> 5) ? part[lane] : 0.f);
    __syncthreads();  // part may be used again
    return v;
}
#endif
