// A ring of pieces of memory on their way to a warp. From Hopper on one lane asks for a whole piece, and a barrier tells when it is there; older
// cards read it where it lies.
#ifndef ORCD_RING
#define ORCD_RING
#include "copy/copies.cu"
typedef unsigned char u8;

struct BulkPipeline {
    u8* pieces;                 // `depth` pieces of `size` bytes
    u64* full;                  // a barrier for each
    int size, depth, lane, put = 0, got = 0;
    u32 parity = 0;

    // memory: depth * (size + 8) bytes of shared memory, 16-byte aligned; size is a multiple of 16
    __device__ __forceinline__ BulkPipeline(u8* memory, int size, int depth, int lane) : pieces(memory), full((u64*)(memory + depth * size)), size(size), depth(depth), lane(lane) {
#if __CUDA_ARCH__ >= 900
        if (lane < depth) barrier_init(full + lane, 1);
        barriers_ready();
        __syncwarp();
#endif
    }
    // This lane has read what it wants of the piece that `get` gave last, and so have the others when this returns
    __device__ __forceinline__ void done() {
#if __CUDA_ARCH__ >= 900
        fence_async();
        __syncwarp();
#endif
    }
    // Ask for the next piece. It takes the place of one that all lanes are `done` with.
    __device__ __forceinline__ void ask(const u8* from, int bytes) {
#if __CUDA_ARCH__ >= 900
        if (lane == 0) { arrive_expecting(full + put, bytes); bulk_copy_once(pieces + put * size, from, bytes, full + put); }
        put = put + 1 == depth ? 0 : put + 1;
#endif
    }
    // The piece that was asked for first, once it is there; `from` says again where it comes from
    __device__ __forceinline__ const u8* get(const u8* from) {
#if __CUDA_ARCH__ >= 900
        wait(full + got, parity);
        const u8* piece = pieces + got * size;
        if (++got == depth) { got = 0; parity ^= 1; }
        return piece;
#else
        return from;
#endif
    }
};
#endif
