#include "blocks.cu"

// Of each row the largest scale's exponent: that of a half, 1 at least, or MXFP4's own. One warp a row.
template<int T> __device__ __forceinline__ void tops(const u8* w, u8* top, long long rows, int n) {
    const long long row = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    const Planes<T> p(w, rows, n);
    int most = T == MXFP4 ? 0 : 1;
    for (int b = threadIdx.x & 31; b < p.blocks; b += 32) {
        const long long at = row * p.blocks + b;
        if (T == MXFP4) most = max(most, (int)p.s[at]);
        else if (T == Q6_K) most = max(most, *(const u16*)(p.d + at * 2) >> 10 & 31);
        else {
            u32 v = Type<T>::mins ? *(const u32*)(p.s + at * Type<T>::s) : *(const u16*)(p.s + at * Type<T>::s);
            most = max(most, (int)max(v >> 10 & 31, v >> 26 & 31));
        }
    }
    for (int o = 16; o; o >>= 1) most = max(most, __shfl_xor_sync(~0u, most, o));
    if (!(threadIdx.x & 31)) top[row] = most;
}
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(256) tops_##name(const u8* w, u8* top, long long rows, int n) { tops<T>(w, top, rows, n); }
EACH_QUANT(KERNEL)
