#include "types/blocks.cu"
#include "types/batched_launch.cu"

// Of each row the largest scale's exponent: that of a half, 1 at least, or MXFP4's own. One warp a row.
struct Rows { const u8* w; u8* top; long long rows; int n_out, n, begin; };
template<int T> __device__ __forceinline__ void row_max_exponent(const BatchedLaunch<Rows>& many) {
    using Y = Type<T>;
    const Rows& m = find_item(many, blockIdx.x);
    const long long row = (long long)(blockIdx.x - m.begin) * 8 + threadIdx.x / 32, at = row / m.n_out * ((m.n_out + 15) / 16 * 16) + row % m.n_out;
    if (row >= m.rows) return;
    const Planes<T> p(m.w, m.n);
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
    if (!(threadIdx.x & 31)) m.top[row] = most;
}
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(256) row_max_exponent_##name(const __grid_constant__ BatchedLaunch<Rows> many) { row_max_exponent<T>(many); }
EACH_QUANT(KERNEL)
