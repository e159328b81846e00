// Quantised rows as the GGUF file has them, read eight weights at a time.
#ifndef ORCD_BLOCKS
#define ORCD_BLOCKS
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// ggml's type ids
enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30, MXFP4 = 39 };

// A lane's share: bytes a[0..3] and b[0..3] (packed, unsigned). Weight = d * (byte - bias) + m.
struct Octet { u32 a, b; float da, db, ma, mb; };

__device__ __forceinline__ float half_bits(u32 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)h)); return f; }
__device__ __forceinline__ float half_at(const u8* p) { return half_bits(*(const u16*)p); }
__device__ __forceinline__ u32 byte_of(u32 v, int i) { return (v >> 8 * i) & 255; }

// Four bytes from an address that is a multiple of ALIGN only: two aligned words hold them, a funnel shift cuts them out.
template<int ALIGN> __device__ __forceinline__ u32 load4(const u8* p) {
    if (ALIGN >= 4) return *(const u32*)p;
    u64 at = (u64)p;
    u32 lo = *(const u32*)(at & ~3ull), hi = *(const u32*)((at + 3) & ~3ull);
    return __funnelshift_r(lo, hi, 8 * (u32)(at & 3));
}
__device__ __forceinline__ u32 low_nibbles(u32 v) { return v & 0x0F0F0F0F; }
__device__ __forceinline__ u32 high_nibbles(u32 v) { return (v >> 4) & 0x0F0F0F0F; }
// bits 0..3 of x to bit 4 of bytes 0..3
__device__ __forceinline__ u32 fifth_bits(u32 x) { return (((x & 15) * 0x00204081) & 0x01010101) << 4; }

template<int T> struct Type;

// ---- blocks of 32: octet u is block u/4 of the span; its a are elements 4(u%4)…+3, its b those 16 further on
struct Of32 { enum { block = 32, delta = 16, group = 32 }; };

template<> struct Type<Q4_0> : Of32 {
    enum { bytes = 18, bias = 8, mins = 0 };
    __device__ static Octet octet(const u8* row, int span, int u) {
        const u8* p = row + (2 * span + u / 4) * bytes;
        u32 v = load4<2>(p + 2 + 4 * (u & 3));
        float d = half_at(p);
        return {low_nibbles(v), high_nibbles(v), d, d, 0, 0};
    }
};
template<> struct Type<Q4_1> : Of32 {
    enum { bytes = 20, bias = 0, mins = 1 };
    __device__ static Octet octet(const u8* row, int span, int u) {
        const u8* p = row + (2 * span + u / 4) * bytes;
        u32 v = load4<4>(p + 4 + 4 * (u & 3)), dm = load4<4>(p);
        float d = half_bits(dm), m = half_bits(dm >> 16);
        return {low_nibbles(v), high_nibbles(v), d, d, m, m};
    }
};
template<> struct Type<Q5_0> : Of32 {
    enum { bytes = 22, bias = 16, mins = 0 };
    __device__ static Octet octet(const u8* row, int span, int u) {
        const u8* p = row + (2 * span + u / 4) * bytes;
        u32 v = load4<2>(p + 6 + 4 * (u & 3)), h = load4<2>(p + 2) >> 4 * (u & 3);
        float d = half_at(p);
        return {low_nibbles(v) | fifth_bits(h), high_nibbles(v) | fifth_bits(h >> 16), d, d, 0, 0};
    }
};
template<> struct Type<Q5_1> : Of32 {
    enum { bytes = 24, bias = 0, mins = 1 };
    __device__ static Octet octet(const u8* row, int span, int u) {
        const u8* p = row + (2 * span + u / 4) * bytes;
        u32 v = load4<4>(p + 8 + 4 * (u & 3)), h = load4<4>(p + 4) >> 4 * (u & 3), dm = load4<4>(p);
        float d = half_bits(dm), m = half_bits(dm >> 16);
        return {low_nibbles(v) | fifth_bits(h), high_nibbles(v) | fifth_bits(h >> 16), d, d, m, m};
    }
};
template<> struct Type<Q8_0> : Of32 {
    enum { bytes = 34, bias = 128, mins = 0 };
    __device__ static Octet octet(const u8* row, int span, int u) {
        const u8* p = row + (2 * span + u / 4) * bytes;
        float d = half_at(p);       // flipping the top bit adds 128 to a signed byte
        return {load4<2>(p + 2 + 4 * (u & 3)) ^ 0x80808080, load4<2>(p + 18 + 4 * (u & 3)) ^ 0x80808080, d, d, 0, 0};
    }
};

// 2^(e-128): half of the OCP scale 2^(e-127), since the table below holds doubled values. e = 0 and 1 are subnormal.
__device__ __forceinline__ float mxfp4_scale(u32 e) { return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23); }

// Four FP4 codes (nibbles of s) to bytes 12 + {0,1,2,3,4,6,8,12, -0,-1,-2,-3,-4,-6,-8,-12}: two look-ups by magnitude, one choice by sign.
__device__ __forceinline__ u32 mxfp4_bytes(u32 s) {
    u32 plus = __byte_perm(0x0F0E0D0C, 0x18141210, s & 0x7777), minus = __byte_perm(0x090A0B0C, 0x00040608, s & 0x7777);
    return __byte_perm(plus, minus, 0x3210 | ((s >> 1) & 0x4444));
}
template<> struct Type<MXFP4> : Of32 {
    enum { bytes = 17, bias = 12, mins = 0 };
    __device__ static Octet octet(const u8* row, int span, int u) {
        const u8* p = row + (2 * span + u / 4) * bytes;
        u32 v = load4<1>(p + 1 + 4 * (u & 3)), lo = mxfp4_bytes(v), hi = mxfp4_bytes(v >> 16);
        float d = mxfp4_scale(p[0]);
        return {__byte_perm(lo, hi, 0x6420), __byte_perm(lo, hi, 0x7531), d, d, 0, 0};
    }
};

// ---- blocks of 256 = 4 spans of 64: octet u has elements 4u…+3 of the span and those 32 further on
struct Of256 { enum { block = 256, delta = 32 }; };

// d, m of sub-blocks 2g and 2g+1 of a Q4_K or Q5_K block, from its 16-byte head
__device__ __forceinline__ void k_scales(uint4 h, int g, Octet& o) {
    u32 sc = g < 2 ? h.y & 0x3F3F3F3F : (h.w & 0x0F0F0F0F) | ((h.y >> 2) & 0x30303030);
    u32 mn = g < 2 ? h.z & 0x3F3F3F3F : ((h.w >> 4) & 0x0F0F0F0F) | ((h.z >> 2) & 0x30303030);
    float d = half_bits(h.x), m = -half_bits(h.x >> 16);
    int j = 2 * (g & 1);
    o.da = __fmul_rn(d, byte_of(sc, j)); o.db = __fmul_rn(d, byte_of(sc, j + 1));
    o.ma = __fmul_rn(m, byte_of(mn, j)); o.mb = __fmul_rn(m, byte_of(mn, j + 1));
}
template<> struct Type<Q4_K> : Of256 {
    enum { bytes = 144, bias = 0, mins = 1, group = 32 };
    __device__ static Octet octet(const u8* row, int span, int u) {
        const u8* p = row + span / 4 * bytes;
        int g = span & 3;
        u32 v = load4<4>(p + 16 + 32 * g + 4 * u);
        Octet o; k_scales(*(const uint4*)p, g, o);
        o.a = low_nibbles(v); o.b = high_nibbles(v);
        return o;
    }
};
template<> struct Type<Q5_K> : Of256 {
    enum { bytes = 176, bias = 0, mins = 1, group = 32 };
    __device__ static Octet octet(const u8* row, int span, int u) {
        const u8* p = row + span / 4 * bytes;
        int g = span & 3;
        u32 v = load4<4>(p + 48 + 32 * g + 4 * u), h = load4<4>(p + 16 + 4 * u) >> 2 * g;
        Octet o; k_scales(*(const uint4*)p, g, o);
        o.a = low_nibbles(v) | (h & 0x01010101) << 4; o.b = high_nibbles(v) | (h & 0x02020202) << 3;
        return o;
    }
};
template<> struct Type<Q6_K> : Of256 {
    enum { bytes = 210, bias = 32, mins = 0, group = 16 };
    __device__ static Octet octet(const u8* row, int span, int u) {
        const u8* p = row + span / 4 * bytes;
        int n = (span >> 1) & 1, top = span & 1;    // which half of the block, and which nibble of its bytes
        u32 v = load4<2>(p + 64 * n + 4 * u) >> 4 * top, w = load4<2>(p + 64 * n + 32 + 4 * u) >> 4 * top;
        u32 h = load4<2>(p + 128 + 32 * n + 4 * u) >> 4 * top;
        const signed char* sc = (const signed char*)p + 192 + 8 * n + 4 * top + u / 4;
        float d = half_at(p + 208);
        return {low_nibbles(v) | (h & 0x03030303) << 4, low_nibbles(w) | (h & 0x0C0C0C0C) << 2, __fmul_rn(d, sc[0]), __fmul_rn(d, sc[2]), 0, 0};
    }
};

// ---- plain numbers: no bytes, no scales; a row may have any length
struct Plain { enum { block = 1, delta = 32, bias = 0, mins = 0, group = 32 }; };
template<> struct Type<F32> : Plain { enum { bytes = 4 }; __device__ static float at(const u8* row, int i) { return ((const float*)row)[i]; } };
template<> struct Type<F16> : Plain { enum { bytes = 2 }; __device__ static float at(const u8* row, int i) { return half_at(row + 2 * i); } };
template<> struct Type<BF16> : Plain { enum { bytes = 2 }; __device__ static float at(const u8* row, int i) { return __uint_as_float((u32)((const u16*)row)[i] << 16); } };

template<int T> __device__ constexpr bool is_plain() { return Type<T>::block == 1; }

// first element of octet u within its span of 64; its b elements come Type<T>::delta later
template<int T> __device__ __forceinline__ int octet_start(int u) { return Type<T>::delta == 16 ? 32 * (u / 4) + 4 * (u & 3) : 4 * u; }

// byte i of v as a float minus bias: 0x4B0000xx is the float 2^23 + xx, so one subtraction converts exactly
__device__ __forceinline__ float byte_float(u32 v, int i, int bias) { return __uint_as_float(__byte_perm(v, 0x4B000000, 0x7540 + i)) - (8388608.f + bias); }

// Eight weights: a[j] = element i+j, b[j] = element i+delta+j where i = 64 span + octet_start(u). Weight = d * a + m.
struct Eight { float a[4], b[4], da, db, ma, mb; };
template<int T> __device__ __forceinline__ Eight eight(const u8* row, int span, int u, int n) {
    Eight e;
    if constexpr (is_plain<T>()) {
        int i = 64 * span + 4 * u;
        for (int j = 0; j < 4; j++) { e.a[j] = i + j < n ? Type<T>::at(row, i + j) : 0; e.b[j] = i + 32 + j < n ? Type<T>::at(row, i + 32 + j) : 0; }
        e.da = e.db = 1; e.ma = e.mb = 0;
    } else {
        Octet o = Type<T>::octet(row, span, u);
        for (int j = 0; j < 4; j++) { e.a[j] = byte_float(o.a, j, Type<T>::bias); e.b[j] = byte_float(o.b, j, Type<T>::bias); }
        e.da = o.da; e.db = o.db; e.ma = o.ma; e.mb = o.mb;
    }
    return e;
}

// Element i of a row, rounded as the reference rounds it (product, then sum)
template<int T> __device__ __forceinline__ float dequant_one(const u8* row, int i) {
    if constexpr (is_plain<T>()) return Type<T>::at(row, i);
    else {
        int r = i & 63, second = (r / Type<T>::delta) & 1, u = Type<T>::delta == 16 ? 4 * (r / 32) + (r & 15) / 4 : (r & 31) / 4;
        Octet o = Type<T>::octet(row, i / 64, u);
        float q = (float)((int)byte_of(second ? o.b : o.a, r & 3) - Type<T>::bias);
        return __fadd_rn(__fmul_rn(second ? o.db : o.da, q), second ? o.mb : o.ma);
    }
}

// bytes of a row of n elements
template<int T> __device__ __forceinline__ long long row_bytes(int n) { return (long long)(n / Type<T>::block) * Type<T>::bytes; }

// F(lower-case name, type) for every type: one kernel per type is made with it
#define EACH_QUANT(F) F(q4_0, Q4_0) F(q4_1, Q4_1) F(q5_0, Q5_0) F(q5_1, Q5_1) F(q8_0, Q8_0) F(q4_k, Q4_K) F(q5_k, Q5_K) F(q6_k, Q6_K) F(mxfp4, MXFP4)
#define EACH_TYPE(F) F(f32, F32) F(f16, F16) F(bf16, BF16) EACH_QUANT(F)
#endif
