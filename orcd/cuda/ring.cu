// A ring of pieces of memory on their way to a warp. From Hopper on one lane asks for a whole piece (a bulk copy), and a barrier in shared
// memory tells when it is there; older cards read it where it lies.
#ifndef ORCD_RING
#define ORCD_RING
typedef unsigned char u8;
typedef unsigned int u32;

struct Ring {
    const u8* memory;
    u32 pieces, full;           // addresses in shared memory: `depth` pieces of `size` bytes, a barrier for each
    int size, depth, lane, put = 0, got = 0;
    u32 parity = 0;

    // memory: depth * (size + 8) bytes of shared memory, 16-byte aligned; size is a multiple of 16
    __device__ __forceinline__ Ring(u8* memory, int size, int depth, int lane) : memory(memory), size(size), depth(depth), lane(lane) {
#if __CUDA_ARCH__ >= 900
        pieces = (u32)__cvta_generic_to_shared(memory); full = pieces + depth * size;
        if (lane < depth) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(full + 8 * lane) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
#endif
    }
    // Ask for the next piece. The warp must be done with the piece it takes the place of.
    __device__ __forceinline__ void ask(const u8* from, int bytes) {
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            const u32 to = pieces + put * size, bar = full + 8 * put;
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                :: "r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
        }
        put = put + 1 == depth ? 0 : put + 1;
#endif
    }
    // The piece that was asked for first, once it is there; `from` says again where it comes from
    __device__ __forceinline__ const u8* get(const u8* from) {
#if __CUDA_ARCH__ >= 900
        const u32 bar = full + 8 * got;
        asm volatile("{\n.reg .pred p;\nwaiting:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra there;\nbra waiting;\nthere:\n}"
            :: "r"(bar), "r"(parity) : "memory");
        const u8* piece = memory + got * size;
        if (++got == depth) { got = 0; parity ^= 1; }
        return piece;
#else
        return from;
#endif
    }
};
#endif
