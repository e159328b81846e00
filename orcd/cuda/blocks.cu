// Quantised tensors in VRAM: the bytes of the file's blocks sorted into planes, read eight weights at a time.
#ifndef ORCD_BLOCKS
#define ORCD_BLOCKS
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// ggml's type ids
enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30, MXFP4 = 39 };

__device__ __forceinline__ float half_bits(u32 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)h)); return f; }
__device__ __forceinline__ float half_at(const u8* p) { return half_bits(*(const u16*)p); }
__device__ __forceinline__ u32 byte_of(u32 v, int i) { return (v >> 8 * i) & 255; }
// byte i of v as a float minus bias: 0x4B0000xx is the float 2^23 + xx, so one subtraction converts exactly
__device__ __forceinline__ float byte_float(u32 v, int i, int bias) {
    return __uint_as_float(__byte_perm(v, 0x4B000000, 0x7540 + i)) - (8388608.f + bias);
}
__device__ __forceinline__ u32 low_nibbles(u32 v) { return v & 0x0F0F0F0F; }
__device__ __forceinline__ u32 high_nibbles(u32 v) { return (v >> 4) & 0x0F0F0F0F; }

// How a type is stored. block: weights of a block. q, h, s, d: bytes of a block in the planes of quants, of their high bits, of scales, and
// of the super-block scale. bias, mins: weight = d * (integer - bias) + m. group: weights that share a scale.
template<int T> struct Type;
struct Of32 { enum { block = 32, d = 0, group = 32, delta = 16 }; };
struct Of256 { enum { block = 256, q = 128, group = 32, delta = 32 }; };
struct Plain { enum { block = 1, q = 0, h = 0, d = 0, bias = 0, mins = 0, group = 32, delta = 32 }; };
template<> struct Type<Q4_0>  : Of32  { enum { q = 16, h = 0, s = 2, bias = 8, mins = 0 }; };
template<> struct Type<Q4_1>  : Of32  { enum { q = 16, h = 0, s = 4, bias = 0, mins = 1 }; };
template<> struct Type<Q5_0>  : Of32  { enum { q = 16, h = 4, s = 2, bias = 16, mins = 0 }; };
template<> struct Type<Q5_1>  : Of32  { enum { q = 16, h = 4, s = 4, bias = 0, mins = 1 }; };
template<> struct Type<Q8_0>  : Of32  { enum { q = 32, h = 0, s = 2, bias = 128, mins = 0 }; };
template<> struct Type<MXFP4> : Of32  { enum { q = 16, h = 0, s = 1, bias = 12, mins = 0 }; };
template<> struct Type<Q4_K>  : Of256 { enum { h = 0, s = 16, d = 0, bias = 0, mins = 1 }; };
template<> struct Type<Q5_K>  : Of256 { enum { h = 32, s = 16, d = 0, bias = 0, mins = 1 }; };
template<> struct Type<Q6_K>  : Of256 { enum { h = 64, s = 16, d = 2, bias = 32, mins = 0, group = 16 }; };
template<> struct Type<F32>   : Plain { enum { s = 4 }; __device__ static float at(const u8* row, int i) { return ((const float*)row)[i]; } };
template<> struct Type<F16>   : Plain { enum { s = 2 }; __device__ static float at(const u8* row, int i) { return half_at(row + 2 * i); } };
template<> struct Type<BF16>  : Plain { enum { s = 2 }; __device__ static float at(const u8* row, int i) { return __uint_as_float((u32)((const u16*)row)[i] << 16); } };

template<int T> __device__ constexpr bool is_plain() { return Type<T>::block == 1; }
template<int T> __device__ constexpr bool is_k() { return Type<T>::block == 256; }

// One matrix: `rows` rows of `n` weights at w. A row is `blocks` blocks.
template<int T> struct Planes {
    const u8 *q, *h, *s, *d;
    int blocks;
    __device__ __forceinline__ Planes(const u8* w, long long rows, int n) : blocks(n / Type<T>::block) {
        long long all = rows * blocks;
        q = w; h = q + all * Type<T>::q; s = h + all * Type<T>::h; d = s + all * Type<T>::s;
    }
};
// Four blocks of 32 weights in a row are a group, 64 bytes of 4-bit quants: 16 for each of four lanes. Lane t holds weights 4t…4t+3 and
// 16+4t…+3 of every block. A row's last group may have fewer blocks; each lane's share is shorter then.
// Where word j of lane t lies in a group of `left` blocks
__device__ __forceinline__ int word_at(int t, int j, int left) { return 4 * (t * left + j); }

// d, m of sub-block j (0…7) of a Q4_K or Q5_K block, from its 16-byte head
__device__ __forceinline__ void k_scale(const uint4& h, int j, float& d, float& m) {
    u32 y = h.y >> 8 * (j & 3), z = h.z >> 8 * (j & 3), w = h.w >> 8 * (j & 3);
    u32 sc = j < 4 ? y & 63 : (w & 15) | (y >> 2 & 0x30), mn = j < 4 ? z & 63 : (w >> 4 & 15) | (z >> 2 & 0x30);
    d = __fmul_rn(half_bits(h.x), byte_float(sc, 0, 0)); m = -__fmul_rn(half_bits(h.x >> 16), byte_float(mn, 0, 0));
}
// 2^(e-128): half of the OCP scale 2^(e-127), since the table below holds doubled values. e = 0 and 1 are subnormal.
__device__ __forceinline__ float mxfp4_scale(u32 e) { return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23); }
// Four FP4 codes (nibbles of s) to bytes 12 + {0,1,2,3,4,6,8,12, -0,-1,-2,-3,-4,-6,-8,-12}: two look-ups by magnitude, one choice by sign.
__device__ __forceinline__ u32 mxfp4_bytes(u32 s) {
    u32 plus = __byte_perm(0x0F0E0D0C, 0x18141210, s & 0x7777), minus = __byte_perm(0x090A0B0C, 0x00040608, s & 0x7777);
    return __byte_perm(plus, minus, 0x3210 | ((s >> 1) & 0x4444));
}

// ---- eight weights: an octet. Octet u (0…7) of a span of 64 weights has a: elements i…i+3 and b: i+delta…+3, i = 64 span + octet_start(u).
// Its bytes a[0..3] and b[0..3] (packed, unsigned): weight = d * (byte - bias) + m.
struct Octet { u32 a, b; float da, db, ma, mb; };
template<int T> __device__ __forceinline__ int octet_start(int u) { return Type<T>::delta == 32 ? 4 * u : 32 * (u / 4) + 4 * (u & 3); }

// A high word keeps its bits as the pairs of halves want them: bit 4j + r is weight pair r of block j, its first weight in the low 16 bits,
// its second in the high ones. Pairs 0…3 are weights (0, 2), (1, 3), (16, 18), (17, 19), counted from 4t. Back to bit 4 of four bytes:
__device__ __forceinline__ u32 fifth_bits(u32 x) { return (x & 0x00010001) << 4 | (x & 0x00020002) << 11; }
__device__ __forceinline__ u32 sixth_bits(u32 x) { return (x & 0x00030003) << 4 | (x & 0x000C000C) << 10; }

// What lies in memory, loaded before any of it is decoded
template<int T> struct Raw { u32 a, b, h, s; uint4 head; };
template<int T> __device__ __forceinline__ void load_octet(Raw<T>& r, const Planes<T>& p, long long row, int span, int u) {
    using Y = Type<T>;
    int t = u & 3;
    if constexpr (is_k<T>()) {
        long long at = row * p.blocks + span / 4;
        int group = span >> 1 & 1, i = 2 * (span & 1) + u / 4;
        r.a = *(const u32*)(p.q + at * 128 + 64 * group + 16 * t + 4 * i);
        if (T == Q5_K) r.h = *(const u32*)(p.h + at * 32 + 16 * group + 4 * t);
        if (T == Q6_K) {
            r.h = *(const u32*)(p.h + at * 64 + 32 * group + 8 * t + 4 * (span & 1));
            const signed char* s = (const signed char*)p.s + at * 16 + 4 * (span & 3) + u / 4;
            r.s = (u8)s[0] | (u32)(u8)s[2] << 8 | (u32)*(const u16*)(p.d + at * 2) << 16;
        } else r.head = *(const uint4*)(p.s + at * 16);
    } else {
        int block = 2 * span + u / 4, first = block & ~3, left = min(4, p.blocks - first), j = block - first;
        long long at = row * p.blocks, to = at + first;
        if (T == Q8_0) {        // two blocks a half of the group
            int pair = min(2, left - (j & 2));
            const u8* w = p.q + to * 32 + 32 * (j & 2) + 4 * (2 * t * pair + 2 * (j & 1));
            r.a = *(const u32*)w; r.b = *(const u32*)(w + 4);
        } else r.a = *(const u32*)(p.q + to * 16 + word_at(t, j, left));
        if (Y::h) {             // a word a lane in a full group, a word a block else
            if (left == 4) r.h = *(const u32*)(p.h + (to + t) * 4) >> 4 * j;
            else { u32 x = p.h[(to + j) * 4 + t]; r.h = (x & 15) | (x & 0xF0) << 12; }
        }
        const u8* s = p.s + (at + block) * Y::s;
        r.s = Y::s == 4 ? *(const u32*)s : Y::s == 2 ? *(const u16*)s : *s;
    }
}
template<int T> __device__ __forceinline__ Octet octet(const Raw<T>& r, int span, int u) {
    Octet o = {};
    if constexpr (is_k<T>()) {
        o.a = low_nibbles(r.a); o.b = high_nibbles(r.a);
        if (T == Q5_K) { u32 x = r.h >> (8 * (span & 1) + 2 * (u / 4)); o.a |= fifth_bits(x); o.b |= fifth_bits(x >> 4); }
        if (T == Q6_K) {
            u32 x = r.h >> 4 * (u / 4);
            o.a |= sixth_bits(x); o.b |= sixth_bits(x >> 8);
            float d = half_bits(r.s >> 16);
            o.da = __fmul_rn(d, (float)(signed char)r.s); o.db = __fmul_rn(d, (float)(signed char)(r.s >> 8));
        } else { k_scale(r.head, 2 * (span & 3), o.da, o.ma); k_scale(r.head, 2 * (span & 3) + 1, o.db, o.mb); }
    } else {
        if (T == Q8_0) { o.a = r.a ^ 0x80808080; o.b = r.b ^ 0x80808080; }     // flipping the top bit adds 128 to a signed byte
        else if (T == MXFP4) {
            u32 lo = mxfp4_bytes(r.a), hi = mxfp4_bytes(r.a >> 16);
            o.a = __byte_perm(lo, hi, 0x6420); o.b = __byte_perm(lo, hi, 0x7531);
        } else { o.a = low_nibbles(r.a); o.b = high_nibbles(r.a); }
        if (Type<T>::h) { o.a |= fifth_bits(r.h); o.b |= fifth_bits(r.h >> 2); }
        o.da = o.db = T == MXFP4 ? mxfp4_scale(r.s) : half_bits(r.s);
        if (Type<T>::mins) o.ma = o.mb = half_bits(r.s >> 16);
    }
    return o;
}

// Element i of a row, rounded as the reference rounds it (product, then sum)
template<int T> __device__ __forceinline__ float dequant_one(const u8* w, long long rows, long long row, int n, int i) {
    if constexpr (is_plain<T>()) return Type<T>::at(w + row * n * Type<T>::s, i);
    else {
        int r = i & 63, second = (r / Type<T>::delta) & 1, u = is_k<T>() ? (r & 31) / 4 : 4 * (r / 32) + (r & 15) / 4;
        Raw<T> raw;
        load_octet<T>(raw, Planes<T>(w, rows, n), row, i / 64, u);
        Octet o = octet<T>(raw, i / 64, u);
        float q = (float)((int)byte_of(second ? o.b : o.a, r & 3) - Type<T>::bias);
        return __fadd_rn(__fmul_rn(second ? o.db : o.da, q), second ? o.mb : o.ma);
    }
}

// F(lower-case name, type) for every type: one kernel per type is made with it
#define EACH_QUANT(F) F(q4_0, Q4_0) F(q4_1, Q4_1) F(q5_0, Q5_0) F(q5_1, Q5_1) F(q8_0, Q8_0) F(mxfp4, MXFP4) \
    F(q4_k, Q4_K) F(q5_k, Q5_K) F(q6_k, Q6_K)
#define EACH_PLAIN(F) F(f32, F32) F(f16, F16) F(bf16, BF16)
#define EACH_TYPE(F) EACH_PLAIN(F) EACH_QUANT(F)
#define EACH_HALF(F) F(f16, F16) EACH_QUANT(F)

// -DONLY_NAME=q4_k -DONLY_TYPE=Q4_K: the kernels of one type alone, which compile in a tenth of the time
#ifdef ONLY_TYPE
#define EXPANDED(F, name, T) F(name, T)
#undef EACH_QUANT
#undef EACH_PLAIN
#undef EACH_TYPE
#undef EACH_HALF
#define EACH_QUANT(F) EXPANDED(F, ONLY_NAME, ONLY_TYPE)
#define EACH_PLAIN(F) EXPANDED(F, ONLY_NAME, ONLY_TYPE)
#define EACH_TYPE(F) EXPANDED(F, ONLY_NAME, ONLY_TYPE)
#define EACH_HALF(F) EXPANDED(F, ONLY_NAME, ONLY_TYPE)
#endif
#endif
