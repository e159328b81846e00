// A lane's share of a unit of weights, as the tensor cores want them
#ifndef ORCD_SHARE
#define ORCD_SHARE
#include "math/mma.cu"

// A lane's share of a unit: of two of its 16 rows, 16 bytes of quants each a group of 128 weights
template<int T> struct LaneFragment {
    static constexpr int GROUPS = is_k<T>() ? 2 : 1, WORDS = T == Q8_0 ? 8 : 4;
    u32 q[GROUPS][2][WORDS], h[GROUPS][2][2], s[GROUPS][2];
    uint4 head[2];

    __device__ __forceinline__ void four(u32 (&to)[WORDS], int at, const u8* from) {
        uint4 v = *(const uint4*)from;
        to[at] = v.x; to[at + 1] = v.y; to[at + 2] = v.z; to[at + 3] = v.w;
    }
    // Group g of a unit in shared or global memory, which has `left` blocks a row; the scales of a K block's two groups come apart
    __device__ __forceinline__ void quants(const u8* unit, int left, int g, int lane) {
        using Y = Type<T>;
        const int t = lane & 3;
        if (is_k<T>() || left == 4) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int row = 8 * e + lane / 4, at = 32 * e + lane;
                four(q[g][e], 0, unit + 1024 * g + 16 * at);
                if (T == Q8_0) four(q[g][e], WORDS - 4, unit + 1024 + 16 * at);
                if (T == Q6_K) {
                    uint2 v = *(const uint2*)(unit + 2048 + 512 * g + 8 * at);
                    h[g][e][0] = v.x; h[g][e][1] = v.y;
                    s[g][e] = *(const u16*)(unit + 3072 + 16 * row + 8 * g + 2 * t);
                } else if (Y::h) h[g][e][0] = *(const u32*)(unit + (is_k<T>() ? 2048 + 256 * g : 64 * Y::q) + 4 * at);
                if (!is_k<T>()) { const u8* f = unit + 64 * (Y::q + Y::h) + Y::s * at; s[0][e] = Y::s == 4 ? *(const u32*)f : Y::s == 2 ? *(const u16*)f : *f; }
            }
        } else {        // a row's last blocks: fewer words a lane
            constexpr int W = T == Q8_0 ? 8 : 4;
            const int row = lane / 4;
            const u8 *words = unit + W * left * lane, *high = unit + 16 * left * Y::q + left * lane, *scale = unit + 16 * left * (Y::q + Y::h) + Y::s * (left * row + t);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                h[0][e][0] = 0;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const bool in = j < left;
                    q[0][e][(T == Q8_0 ? 2 * j : j) % WORDS] = in ? *(const u32*)(words + W * j) : 0;
                    if (T == Q8_0) q[0][e][(2 * j + 1) % WORDS] = in ? *(const u32*)(words + W * j + 4) : 0;
                    if (Y::h && in) h[0][e][0] |= fifth_of(high[j], j);
                }
                s[0][e] = t >= left ? 0 : Y::s == 4 ? *(const u32*)scale : Y::s == 2 ? *(const u16*)scale : *scale;
                words += W * left * 32; high += left * 32; scale += Y::s * left * 8;
            }
        }
    }
    __device__ __forceinline__ void heads(const u8* unit, int lane) {
        if constexpr (is_k<T>())
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int row = 8 * e + lane / 4;
                if (T == Q6_K) head[e].x = *(const u16*)(unit + 3328 + 2 * row);
                else head[e] = *(const uint4*)(unit + 16 * (Type<T>::q + Type<T>::h) + 16 * row);
            }
    }
    __device__ __forceinline__ void load(const u8* unit, int left, int lane) {
#pragma unroll
        for (int g = 0; g < GROUPS; g++) quants(unit, left, g, lane);
        heads(unit, lane);
    }
    // Pair r (0…3) of block j of group g in row e: as `pair` in blocks.cu has it, and as its `small_pair`
    __device__ __forceinline__ u32 word(int g, int e, int j) const { return q[g][e][(T == Q8_0 ? 2 * j : j) % WORDS]; }
    __device__ __forceinline__ u32 next_word(int g, int e, int j) const { return q[g][e][(2 * j + 1) % WORDS]; }
    __device__ __forceinline__ u32 high(int g, int e, int j) const { return h[g][e][T == Q6_K ? j / 2 : 0]; }
    __device__ __forceinline__ u32 pair(const Masks& c, int g, int e, int j, int r) const { return ::pair<T>(c, word(g, e, j), next_word(g, e, j), high(g, e, j), j, r); }
    __device__ __forceinline__ u32 small(int g, int e, int j, int r) const { return small_pair<T>(word(g, e, j), next_word(g, e, j), high(g, e, j), j, r); }
    // Of row e: scale and minimum of block t of group g; of Q6_K the scales of its two halves
    __device__ __forceinline__ float2 scale(int g, int e, int t) const {
        float d, m = 0;
        if (T == Q6_K) {
            d = half_bits(head[e].x);
            return {__fmul_rn(d, (float)(signed char)s[g][e]), __fmul_rn(d, (float)(signed char)(s[g][e] >> 8))};
        }
        if constexpr (is_k<T>()) k_scale(head[e], 4 * g + t, d, m);
        else if (T == MXFP4) d = mxfp4_scale(s[0][e]);
        else { d = half_bits(s[0][e]); if (Type<T>::mins) m = half_bits(s[0][e] >> 16); }
        return {d, m};
    }
    // What lane t adds of group g to row e: c0, c1 are the sums of the first and the last 16 weights of block t of the group.
    // x of that block: 1/scale, sum, and what is too much in c0 and c1
    __device__ __forceinline__ float scaled(int g, int e, int t, float c0, float c1, float4 x) const {
        const float2 f = scale(g, e, t);
        if (T == Q6_K) return x.x * (f.x * (c0 - x.z) + f.y * (c1 - x.w));
        if (T == MXFP4) return (c0 + c1) * x.x * 16384.f * f.x;
        const float c = (c0 + c1 - x.z) * x.x;
        return Type<T>::mins ? fmaf(c, f.x, f.y * x.y) : c * f.x;
    }
};

#endif
