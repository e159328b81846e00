#include "types/blocks.cu"
#include "types/batched_launch.cu"

// From the file's blocks to units. A run: n_rows rows of blocks at src as they lie in the file, any alignment; they become rows first_row… of a
// stack of matrices of n_out rows of n weights at dst, each padded to whole tiles. Its blocks are `begin` to the next run's. A thread moves the
// share of one lane in a group of four blocks.
struct Run { const u8* src; u8* dst; long long first_row; int n_out, n, n_rows, begin; };
__device__ __forceinline__ u32 word_of(const u8* p) { return p[0] | (u32)p[1] << 8 | (u32)p[2] << 16 | (u32)p[3] << 24; }
__device__ __forceinline__ u32 low_nibbles(u32 v) { return v & 0x0F0F0F0F; }
__device__ __forceinline__ u32 high_nibbles(u32 v) { return (v >> 4) & 0x0F0F0F0F; }
__device__ __forceinline__ u32 bit_of_each(u32 v, int i) { return v >> i & 0x01010101; }

// The word of a block: integers (of MXFP4 codes) of a lane's first and second four weights, as bytes; their low four bits
template<int T> __device__ __forceinline__ u32 packed(u32 a, u32 b) {
    if (T == MXFP4) return fields(a & 0x07070707, 9, 1) | fields(bit_of_each(a, 3), 15, 7) | fields(b & 0x07070707, 4, 12) | fields(bit_of_each(b, 3), 0, 8);
    if (T == Q6_K) return fields(low_nibbles(a), 4, 0) | fields(low_nibbles(b), 4, 0) << 8;
    constexpr int LOW = Type<T>::h ? 1 : 2;
    return fields(low_nibbles(a), LOW + 4, LOW) | turn_right(fields(low_nibbles(b), LOW + 4, LOW));
}

template<int T> __device__ void repack(const BatchedLaunch<Run>& runs) {
    using Y = Type<T>;
    const Run& r = find_item(runs, blockIdx.x);
    const Planes<T> p(r.dst, r.n);
    const int groups = is_k<T>() ? 2 * p.blocks : (p.blocks + 3) / 4;
    const long long item = (blockIdx.x - r.begin) * (long long)blockDim.x + threadIdx.x;
    if (item >= (long long)r.n_rows * groups * 4) return;
    const int t = item & 3, group = item / 4 % groups;
    const long long row = r.first_row + item / 4 / groups, to = row / r.n_out * ((r.n_out + 15) / 16 * 16) + row % r.n_out;
    const u8* from = r.src + (row - r.first_row) * p.blocks * p.SIZE;
    const int in_tile = to & 15, at = 4 * in_tile + t;
    if constexpr (is_k<T>()) {
        const int g = group & 1;
        u8* unit = (u8*)p.at(to / 16, group / 2);
        from += (long long)(group / 2) * p.SIZE;
        const u8* quants = from + (T == Q4_K ? 16 : T == Q5_K ? 48 : 0);
        u32 w[4], high[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 v[2];
            for (int f = 0; f < 2; f++) {
                const u32 x = word_of(quants + 64 * g + 32 * (T == Q6_K ? j & 1 : j / 2) + 16 * f + 4 * t);
                v[f] = (T == Q6_K ? j / 2 : j & 1) ? high_nibbles(x) : low_nibbles(x);
            }
            w[j] = packed<T>(v[0], v[1]);
            if (T == Q5_K) high[0] |= fifth_fields(bit_of_each(word_of(from + 16 + 4 * t), 4 * g + j), bit_of_each(word_of(from + 32 + 4 * t), 4 * g + j), j);
            if (T == Q6_K) {
                const u32 a = word_of(from + 128 + 32 * g + 4 * t) >> 2 * j & 0x03030303, b = word_of(from + 144 + 32 * g + 4 * t) >> 2 * j & 0x03030303;
                const u32 x = fields(a, 8, 4) | fields(b, 8, 4) << 2;
                high[j / 2] |= j & 1 ? turn_right(x) : x;
            }
        }
        *(uint4*)(unit + 1024 * g + 16 * at) = {w[0], w[1], w[2], w[3]};
        if (T == Q5_K) *(u32*)(unit + 2048 + 256 * g + 4 * at) = high[0];
        if (T == Q6_K) {
            *(uint2*)(unit + 2048 + 512 * g + 8 * at) = {high[0], high[1]};
            if (g == 0) *(u32*)(unit + 3072 + 4 * at) = word_of(from + 192 + 4 * t);
            else if (t == 0) *(u16*)(unit + 3328 + 2 * in_tile) = from[208] | from[209] << 8;
        } else if (g == 0) *(u32*)(unit + 16 * (Y::q + Y::h) + 4 * at) = word_of(from + 4 * t);
    } else {
        constexpr int H = Y::s, Q = Y::s + Y::h;            // where a block's high bits and quants begin
        u8* unit = (u8*)p.at(to / 16, group);
        const int left = p.left(group);
        u8 *high_at = unit + 16 * left * Y::q, *scale_at = unit + 16 * left * (Y::q + Y::h) + Y::s * (left * in_tile + t);
        u32 high = 0;
        for (int j = 0; j < left; j++) {
            const u8* block = from + (long long)(4 * group + j) * p.SIZE;
            if (T == Q8_0) {        // flipping the top bit adds 128
                u32* w = (u32*)(unit + (left == 4 ? 1024 * (j / 2) + 16 * at + 8 * (j & 1) : 8 * (left * at + j)));
                w[0] = word_of(block + Q + 4 * t) ^ 0x80808080; w[1] = word_of(block + Q + 16 + 4 * t) ^ 0x80808080;
            } else { const u32 x = word_of(block + Q + 4 * t); *(u32*)(unit + 4 * (left * at + j)) = packed<T>(low_nibbles(x), high_nibbles(x)); }
            if (Y::h) {
                const u32 bits = word_of(block + H), a = spread(bits >> 4 * t), b = spread(bits >> (16 + 4 * t));
                if (left == 4) high |= fifth_fields(a, b, j);
                else high_at[left * at + j] = gathered(a) | gathered(b) << 4;
            }
            if (j == t) for (int i = 0; i < Y::s; i++) scale_at[i] = block[i];
        }
        if (Y::h && left == 4) *(u32*)(high_at + 4 * at) = high;
    }
}
#define KERNEL(name, T) extern "C" __global__ void __launch_bounds__(256) repack_##name(const __grid_constant__ BatchedLaunch<Run> runs) { repack<T>(runs); }
EACH_QUANT(KERNEL)
