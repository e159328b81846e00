#include "blocks.cu"

// From the file's blocks to planes. src: n_rows rows of blocks as they lie in the file, any alignment; they become rows first_row… of a
// matrix of `rows` rows at dst. A thread moves the share of one lane in one group.
__device__ __forceinline__ u32 word_of(const u8* p) { return p[0] | (u32)p[1] << 8 | (u32)p[2] << 16 | (u32)p[3] << 24; }
// bits of 32 weights -> pair bits of lane t: bit r the first of pair r, bit 16 + r its second
__device__ __forceinline__ u32 pair_bits(u32 bits, int t) {
    u32 a = bits >> 4 * t, b = bits >> (16 + 4 * t);
    return (a & 3) | (b & 3) << 2 | (a >> 2 & 3) << 16 | (b >> 2 & 3) << 18;
}

template<int T> __device__ void repack(const u8* src, u8* dst, long long rows, int n, long long first_row, int n_rows) {
    using Y = Type<T>;
    const Planes<T> p(dst, rows, n);
    u8 *q = (u8*)p.q, *h = (u8*)p.h, *s = (u8*)p.s, *d = (u8*)p.d;
    constexpr int SIZE = Y::q + Y::h + Y::s + Y::d, PER = is_k<T>() ? 2 : 1;       // bytes of a block, groups of a K block
    const int groups = is_k<T>() ? 2 * p.blocks : (p.blocks + 3) / 4;
    const long long item = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (item >= (long long)n_rows * groups * 4) return;
    const int t = item & 3, group = item / 4 % groups, row = item / 4 / groups;
    const u8* from = src + (long long)row * p.blocks * SIZE;
    const long long at = (first_row + row) * p.blocks;
    if constexpr (is_k<T>()) {
        const int b = group / PER, g = group % PER;
        from += (long long)b * SIZE;
        const u8* quants = from + (T == Q4_K ? 16 : T == Q5_K ? 48 : 0);
        u32 w[4];
        if (T == Q6_K) for (int f = 0; f < 2; f++) {       // low nibbles: blocks 0, 1 of the half; high ones: blocks 2, 3
            u32 x = word_of(quants + 64 * g + 16 * f + 4 * t), y = word_of(quants + 64 * g + 32 + 16 * f + 4 * t);
            w[f] = low_nibbles(x) | low_nibbles(y) << 4; w[2 + f] = high_nibbles(x) | high_nibbles(y) << 4;
        } else for (int i = 0; i < 4; i++) w[i] = word_of(quants + 64 * g + 32 * (i / 2) + 16 * (i & 1) + 4 * t);
        u32* to = (u32*)(q + (at + b) * 128 + 64 * g + 16 * t);
        for (int i = 0; i < 4; i++) to[i] = w[i];
        if (T == Q5_K) {
            u32 out = 0;
            for (int j = 0; j < 4; j++) {
                u32 bits = 0;
                for (int i = 0; i < 4; i++) bits |= (from[16 + 4 * t + i] >> (4 * g + j) & 1u) << (4 * t + i) | (from[32 + 4 * t + i] >> (4 * g + j) & 1u) << (16 + 4 * t + i);
                out |= pair_bits(bits, t) << 4 * j;
            }
            *(u32*)(h + (at + b) * 32 + 16 * g + 4 * t) = out;
        }
        if (T == Q6_K) {
            u32 out[2] = {0, 0};
            for (int j = 0; j < 4; j++) for (int e = 0; e < 8; e++) {      // weights 4t…4t+3, 16+4t…+3 of block j
                int i = e & 3, r = (i & 1) + (e & 4) / 2;
                u32 two = from[128 + 32 * g + (e & 4) * 4 + 4 * t + i] >> 2 * j & 3;
                out[j / 2] |= two << (8 * (j & 1) + 2 * r + (i & 2) * 8);
            }
            u32* to = (u32*)(h + (at + b) * 64 + 32 * g + 8 * t);
            to[0] = out[0]; to[1] = out[1];
            const u8* scales = from + 192;
            if (g == 0) *(u32*)(s + (at + b) * 16 + 4 * t) = word_of(scales + 4 * t);
            else if (t == 0) *(u16*)(d + (at + b) * 2) = scales[16] | scales[17] << 8;
        } else if (g == 0) *(u32*)(s + (at + b) * 16 + 4 * t) = word_of(from + 4 * t);
    } else {
        constexpr int H = Y::s, Q = Y::s + Y::h;            // where a block's high bits and quants begin
        const int first = 4 * group, left = min(4, p.blocks - first);
        u32 high = 0;
        for (int j = 0; j < left; j++) {
            const u8* block = from + (long long)(first + j) * SIZE;
            if (T == Q8_0) {
                int pair = min(2, left - (j & 2));
                u32* to = (u32*)(q + (at + first) * 32 + 32 * (j & 2)) + 2 * t * pair + 2 * (j & 1);
                to[0] = word_of(block + Q + 4 * t); to[1] = word_of(block + Q + 16 + 4 * t);
            } else *(u32*)(q + (at + first) * 16 + word_at(t, j, left)) = word_of(block + Q + 4 * t);
            if (Y::h) {
                u32 x = pair_bits(word_of(block + H), t);
                if (left == 4) high |= x << 4 * j;
                else h[(at + first + j) * 4 + t] = (x & 15) | x >> 12;
            }
            if (j == t) for (int i = 0; i < Y::s; i++) s[(at + first + j) * Y::s + i] = block[i];
        }
        if (Y::h && left == 4) *(u32*)(h + (at + first + t) * 4) = high;
    }
}
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(256) repack_##name(const u8* src, u8* dst, long long rows, int n, \
    long long first_row, int n_rows) { repack<T>(src, dst, rows, n, first_row, n_rows); }
EACH_QUANT(KERNEL)
