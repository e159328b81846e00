// For tests: with -DDELAYS=n, waits of up to n cycles where threads, blocks, kernels or the copy engine wait for each other. Nothing otherwise.
#ifndef ORCD_DELAYS
#define ORCD_DELAYS
#ifdef DELAYS
// A wait of random length, every fourth time or so; all lanes of a warp take the same
__device__ __forceinline__ void delay() {
    const unsigned begin = clock();
    unsigned h = begin ^ (threadIdx.x / 32) * 0x9E3779B9u ^ blockIdx.x * 0x85EBCA6Bu;
    h *= 0x2C1B3C6Du; h ^= h >> 13; h *= 0x297A2D39u; h ^= h >> 15;
    if (h & 3) return;
    const unsigned n = (h >> 2) % DELAYS;
    while (clock() - begin < n) { }
}
__device__ __forceinline__ void late_syncthreads() { delay(); __syncthreads(); delay(); }
__device__ __forceinline__ void late_syncwarp() { delay(); __syncwarp(); delay(); }
#define __syncthreads late_syncthreads
#define __syncwarp late_syncwarp
#else
__device__ __forceinline__ void delay() { }
#endif
#endif
