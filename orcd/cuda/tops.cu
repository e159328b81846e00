#include "blocks.cu"

// Of each row the largest scale's exponent: that of a half, 1 at least, or MXFP4's own. One warp a row.
template<int T> __device__ __forceinline__ void tops(const u8* w, u8* top, long long rows, int n_out, int n) {
    using Y = Type<T>;
    const long long row = (long long)blockIdx.x * 8 + threadIdx.x / 32, at = row / n_out * ((n_out + 15) / 16 * 16) + row % n_out;
    if (row >= rows) return;
    const Planes<T> p(w, n);
    const int r = at & 15;
    int most = T == MXFP4 ? 0 : 1;
    for (int b = threadIdx.x & 31; b < p.blocks; b += 32) {
        const int left = p.left(b / p.PER);
        const u8* unit = p.at(at / 16, b / p.PER);
        const u8* scale = T == Q6_K ? unit + 3328 + 2 * r : unit + 16 * left * (Y::q + Y::h) + Y::s * (left * r + b % p.PER);
        if (T == MXFP4) most = max(most, (int)*scale);
        else {
            const u32 v = Y::mins ? *(const u32*)scale : *(const u16*)scale;
            most = max(most, (int)max(v >> 10 & 31, v >> 26 & 31));
        }
    }
    for (int o = 16; o; o >>= 1) most = max(most, __shfl_xor_sync(~0u, most, o));
    if (!(threadIdx.x & 31)) top[row] = most;
}
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(256) tops_##name(const u8* w, u8* top, long long rows, int n_out, int n) { tops<T>(w, top, rows, n_out, n); }
EACH_QUANT(KERNEL)
