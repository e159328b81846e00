// A lane's share of 16 rows of weights, as the tensor cores want them
#ifndef ORCD_SHARE
#define ORCD_SHARE
#include "mma.cu"

// Constants that the compiler knows nothing about (there is one layer of threads), so that it keeps them in registers: an instruction has
// room for one constant only
struct Masks {
    u32 low, high, magic;
    __device__ __forceinline__ Masks() {
        u32 one = blockDim.z;
        low = 0x000F000F * one; high = 0x00F000F0 * one; magic = 0x64006400 * one;
    }
};

// A lane's share of a step: of two rows, 16 bytes of quants each (a step is a group of 128 weights, or a K block of 256)
template<int T> struct Share {
    static constexpr int GROUPS = is_k<T>() ? 2 : 1, WORDS = T == Q8_0 ? 8 : 4;
    u32 q[GROUPS][2][WORDS], h[GROUPS][2][2], s[GROUPS][2];
    uint4 head[2];

    __device__ __forceinline__ void four(u32 (&to)[WORDS], int at, const u8* from) {
        uint4 v = *(const uint4*)from;
        to[at] = v.x; to[at + 1] = v.y; to[at + 2] = v.z; to[at + 3] = v.w;
    }
    // Group g of a step; the scales of a K block's two groups come apart
    template<class I> __device__ __forceinline__ void quants(const Planes<T>& p, const I (&row)[2], int step, int g, int t) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const I at = row[e] * p.blocks;
            if constexpr (is_k<T>()) {
                four(q[g][e], 0, p.q + (at + step) * 128 + 64 * g + 16 * t);
                if (T == Q5_K) h[g][e][0] = *(const u32*)(p.h + (at + step) * 32 + 16 * g + 4 * t);
                if (T == Q6_K) {
                    uint2 v = *(const uint2*)(p.h + (at + step) * 64 + 32 * g + 8 * t);
                    h[g][e][0] = v.x; h[g][e][1] = v.y;
                    s[g][e] = *(const u16*)(p.s + (at + step) * 16 + 8 * g + 2 * t);
                }
            } else {
                const int first = 4 * step, left = p.blocks - first;
                if (left >= 4) {
                    four(q[0][e], 0, p.q + (at + first) * Type<T>::q + 16 * t);
                    if (T == Q8_0) four(q[0][e], WORDS - 4, p.q + (at + first) * 32 + 64 + 16 * t);
                    if (Type<T>::h) h[0][e][0] = *(const u32*)(p.h + (at + first + t) * 4);
                } else {        // the row's last blocks: fewer words a lane
                    h[0][e][0] = 0;
#pragma unroll
                    for (int j = 0; j < 3; j++) {
                        const bool in = j < left;
                        if (T == Q8_0) {
                            const int pair = min(2, left - (j & 2));
                            const u32* w = (const u32*)(p.q + (at + first) * 32 + 32 * (j & 2)) + 2 * t * pair + 2 * (j & 1);
                            q[0][e][(2 * j) % WORDS] = in ? w[0] : 0; q[0][e][(2 * j + 1) % WORDS] = in ? w[1] : 0;
                        } else q[0][e][j] = in ? *(const u32*)(p.q + (at + first) * 16 + word_at(t, j, left)) : 0;
                        if (Type<T>::h && in) { u32 x = p.h[(at + first + j) * 4 + t]; h[0][e][0] |= ((x & 15) | (x & 0xF0) << 12) << 4 * j; }
                    }
                    if (T == Q8_0) q[0][e][WORDS - 2] = q[0][e][WORDS - 1] = 0; else q[0][e][3] = 0;
                }
                const u8* f = p.s + (at + first + t) * Type<T>::s;
                s[0][e] = t >= left ? 0 : Type<T>::s == 4 ? *(const u32*)f : Type<T>::s == 2 ? *(const u16*)f : *f;
            }
        }
    }
    template<class I> __device__ __forceinline__ void heads(const Planes<T>& p, const I (&row)[2], int step) {
        if constexpr (is_k<T>())
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const I at = row[e] * p.blocks + step;
                if (T == Q6_K) head[e].x = *(const u16*)(p.d + at * 2);
                else head[e] = *(const uint4*)(p.s + at * 16);
            }
    }
    __device__ __forceinline__ void load(const Planes<T>& p, const long long (&row)[2], int step, int t) {
#pragma unroll
        for (int g = 0; g < GROUPS; g++) quants(p, row, step, g, t);
        heads(p, row, step);
    }
    // Of types with a plane of high bits: those of the pair, at bit 4, or at bit 8
    __device__ __forceinline__ u32 high_bits(int g, int e, int j, int r) const {
        const int from = T == Q6_K ? 8 * (j & 1) + 2 * r : 4 * j + r, to = high(j, r) ? 8 : 4;
        u32 x = h[g][e][T == Q6_K ? j / 2 : 0];
        x = from >= to ? x >> (from >= to ? from - to : 0) : x << (from < to ? to - from : 0);
        return x & (T == Q6_K ? 0x00030003u << to : 0x00010001u << to);
    }
    // Weight pair r (0…3) of block j of group g in row e, as halves without their scale
    __device__ __forceinline__ u32 pair(const Masks& c, int g, int e, int j, int r) const {
        constexpr int B = Type<T>::bias;
        if (T == Q8_0) return byte_halves<B>(q[0][e][(2 * j + r / 2) % WORDS] ^ 0x80808080, r & 1 ? 0x4341 : 0x4240);
        if (T == MXFP4) {       // sign to bit 15, the magnitude's three bits to 11…9: that is the half of value/2^14
            const int at = 8 * (r & 1) + 4 * (r / 2);
            u32 w = q[0][e][j], m = at <= 9 ? w << (9 - (at <= 9 ? at : 9)) : w >> (at > 9 ? at - 9 : 0);
            return (w << (12 - at) & 0x80008000) | (m & 0x0E000E00);
        }
        const bool high = this->high(j, r);
        u32 w = q[g][e][is_k<T>() ? 2 * (j / 2) + r / 2 : j] >> 8 * (r & 1);
        w = (w & (high ? c.high : c.low)) | c.magic;
        if (Type<T>::h) w |= high_bits(g, e, j, r);
        return high ? high_halves<B>(w) : low_halves<B>(w);
    }
    // The same pair as integers in the low bits of two halves, 16 times as much where `high`. As halves these are the integers times 2^-24.
    __device__ static constexpr bool high(int j, int r) { return T != Q8_0 && (is_k<T>() ? j & 1 : r / 2); }
    __device__ __forceinline__ u32 integers(const Masks& c, int g, int e, int j, int r) const {
        if (T == Q8_0) return __byte_perm(q[0][e][(2 * j + r / 2) % WORDS] ^ 0x80808080, 0, r & 1 ? 0x4341 : 0x4240);
        u32 w = q[g][e][is_k<T>() ? 2 * (j / 2) + r / 2 : j] >> 8 * (r & 1) & (high(j, r) ? c.high : c.low);
        return Type<T>::h ? w | high_bits(g, e, j, r) : w;
    }
    // Of row e: scale and minimum of block t of group g; of Q6_K the scales of its two halves
    __device__ __forceinline__ float2 scale(int g, int e, int t) const {
        float d, m = 0;
        if (T == Q6_K) {
            d = half_bits(head[e].x);
            return {__fmul_rn(d, (float)(signed char)s[g][e]), __fmul_rn(d, (float)(signed char)(s[g][e] >> 8))};
        }
        if constexpr (is_k<T>()) k_scale(head[e], 4 * g + t, d, m);
        else if (T == MXFP4) d = __uint_as_float(s[0][e] ? s[0][e] << 23 : 0x00400000);
        else { d = half_bits(s[0][e]); if (Type<T>::mins) m = half_bits(s[0][e] >> 16); }
        return {d, m};
    }
    // What lane t adds of group g to row e: c0, c1 are the sums of the first and the last 16 weights of block t of the group
    __device__ __forceinline__ float scaled(int g, int e, int t, float c0, float c1, float2 x) const {      // x: 1/scale and sum of the block of x
        const float2 f = scale(g, e, t);
        if (T == Q6_K) return x.x * (f.x * c0 + f.y * c1);
        float c = (c0 + c1) * x.x;
        if (T == MXFP4) return c * 16384.f * f.x;
        return Type<T>::mins ? fmaf(c, f.x, f.y * x.y) : c * f.x;
    }
};

#endif
