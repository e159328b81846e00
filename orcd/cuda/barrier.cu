// Bulk copies into shared memory, and the barriers that count their bytes: from Hopper on
#ifndef ORCD_BARRIER
#define ORCD_BARRIER
typedef unsigned int u32;
typedef unsigned long long u64;
__device__ __forceinline__ u32 address_of(const void* p) { return (u32)__cvta_generic_to_shared(p); }

#if __CUDA_ARCH__ >= 900
// A barrier goes from phase to phase: when `count` arrivals and all announced bytes have come
__device__ __forceinline__ void barrier_init(u64* b, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(address_of(b)), "r"(count) : "memory"); }
// Initialised barriers, before the copy engine is told of them
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(u64* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(address_of(b)) : "memory"); }
__device__ __forceinline__ void arrive_expecting(u64* b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(address_of(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u64* b, int phase) {
    u32 done = 0;
    while (!done) asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done) : "r"(address_of(b)), "r"(phase) : "memory");
}
// Bytes from global to shared memory by the copy engine
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, u64* b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(address_of(to)), "l"(from), "r"(bytes), "r"(address_of(b)) : "memory");
}
#endif
#endif
