// Copies from global to shared memory: of 16 bytes, in the background from Ampere on; of whole pieces, and the barriers that count their bytes, from Hopper on
#ifndef ORCD_COPIES
#define ORCD_COPIES
#include "copy/delays.cu"
typedef unsigned int u32;
typedef unsigned long long u64;
__device__ __forceinline__ u32 address_of(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes, zeros when not valid
__device__ __forceinline__ void copy16(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(address_of(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
#else
    *(uint4*)to = valid ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// wait until at most N groups of this thread's copies are under way
template <int N> __device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
    delay();
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
    delay();
#endif
}

#if __CUDA_ARCH__ >= 900
// A barrier goes from phase to phase: when `count` arrivals and all announced bytes have come
__device__ __forceinline__ void barrier_init(u64* b, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(address_of(b)), "r"(count) : "memory"); }
// Initialised barriers, before the copy engine is told of them
__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    delay();
}
__device__ __forceinline__ void arrive(u64* b) {
    delay();
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(address_of(b)) : "memory");
    delay();
}
__device__ __forceinline__ void arrive_expecting(u64* b, int bytes) {
    delay();
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(address_of(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u64* b, int phase) {
    u32 done = 0;
    delay();
    while (!done) asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done) : "r"(address_of(b)), "r"(phase) : "memory");
    delay();
}
// This thread's ordinary reads and writes of shared memory are done before any bulk copy that is asked for later. Barriers between threads do not say that:
// the copy engine goes another way to the same bytes (the "async proxy"), and a read that was issued may still be on its own.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Bytes from global to shared memory by the copy engine
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, u64* b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(address_of(to)), "l"(from), "r"(bytes), "r"(address_of(b)) : "memory");
}
// The same for bytes that are not wanted again soon: the first to leave the L2 cache
__device__ __forceinline__ void bulk_copy_once(void* to, const void* from, int bytes, u64* b) {
    asm volatile("{.reg .b64 p; createpolicy.fractional.L2::evict_first.b64 p, 1.0;"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], p;}"
        :: "r"(address_of(to)), "l"(from), "r"(bytes), "r"(address_of(b)) : "memory");
}
#endif
#endif
