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

// Four bytes at any address, in two steps: `load` only moves words, so that many loads can be on their way; `word` puts them together.
template<int ALIGN> struct Four;
template<> struct Four<4> { u32 v; __device__ void load(const u8* p) { v = *(const u32*)p; } __device__ u32 word() const { return v; } };
template<> struct Four<2> {
    u16 lo, hi;
    __device__ void load(const u8* p) { lo = *(const u16*)p; hi = *(const u16*)(p + 2); }
    __device__ u32 word() const { return lo | (u32)hi << 16; }
};
// the byte before is the block's too, so the two aligned words around all five hold nothing but bytes of the tensor's words
template<> struct Four<1> {
    u32 lo, hi, shift;
    __device__ void load(const u8* p) {
        u32 odd = (u32)(u64)(p - 1) & 3;
        p -= 1 + odd; lo = *(const u32*)p; hi = *(const u32*)(p + 4); shift = 8 * odd + 8;
    }
    __device__ u32 word() const { return __funnelshift_rc(lo, hi, shift); }
};
// byte i of v as a float minus bias: 0x4B0000xx is the float 2^23 + xx, so one subtraction converts exactly
__device__ __forceinline__ float byte_float(u32 v, int i, int bias) {
    return __uint_as_float(__byte_perm(v, 0x4B000000, 0x7540 + i)) - (8388608.f + bias);
}
__device__ __forceinline__ u32 low_nibbles(u32 v) { return v & 0x0F0F0F0F; }
__device__ __forceinline__ u32 high_nibbles(u32 v) { return (v >> 4) & 0x0F0F0F0F; }
// bits 0..3 of x to bit 4 of bytes 0..3
__device__ __forceinline__ u32 fifth_bits(u32 x) { return (((x & 15) * 0x00204081) & 0x01010101) << 4; }

// Type<T>: Raw holds an octet's bytes as they lie in memory, load() fetches them, octet() decodes them
template<int T> struct Type;

// ---- blocks of 32: octet u is block u/4 of the span; its a are elements 4(u%4)…+3, its b those 16 further on
struct Of32 { enum { block = 32, delta = 16, group = 32 }; };
template<int BYTES> __device__ __forceinline__ const u8* block32(const u8* row, int span, int u) {
    return row + (2 * span + u / 4) * BYTES;
}

template<> struct Type<Q4_0> : Of32 {
    enum { bytes = 18, bias = 8, mins = 0 };
    struct Raw { u16 d; Four<2> q; };
    __device__ static void load(Raw& r, const u8* row, int span, int u) {
        const u8* p = block32<bytes>(row, span, u);
        r.d = *(const u16*)p; r.q.load(p + 2 + 4 * (u & 3));
    }
    __device__ static Octet octet(const Raw& r, int span, int u) {
        u32 v = r.q.word(); float d = half_bits(r.d);
        return {low_nibbles(v), high_nibbles(v), d, d, 0, 0};
    }
};
template<> struct Type<Q4_1> : Of32 {
    enum { bytes = 20, bias = 0, mins = 1 };
    struct Raw { Four<4> dm, q; };
    __device__ static void load(Raw& r, const u8* row, int span, int u) {
        const u8* p = block32<bytes>(row, span, u);
        r.dm.load(p); r.q.load(p + 4 + 4 * (u & 3));
    }
    __device__ static Octet octet(const Raw& r, int span, int u) {
        u32 v = r.q.v; float d = half_bits(r.dm.v), m = half_bits(r.dm.v >> 16);
        return {low_nibbles(v), high_nibbles(v), d, d, m, m};
    }
};
template<> struct Type<Q5_0> : Of32 {
    enum { bytes = 22, bias = 16, mins = 0 };
    struct Raw { u16 d; Four<2> h, q; };
    __device__ static void load(Raw& r, const u8* row, int span, int u) {
        const u8* p = block32<bytes>(row, span, u);
        r.d = *(const u16*)p; r.h.load(p + 2); r.q.load(p + 6 + 4 * (u & 3));
    }
    __device__ static Octet octet(const Raw& r, int span, int u) {
        u32 v = r.q.word(), s = 4 * (u & 3); float d = half_bits(r.d);
        return {low_nibbles(v) | fifth_bits(r.h.lo >> s), high_nibbles(v) | fifth_bits(r.h.hi >> s), d, d, 0, 0};
    }
};
template<> struct Type<Q5_1> : Of32 {
    enum { bytes = 24, bias = 0, mins = 1 };
    struct Raw { Four<4> dm, h, q; };
    __device__ static void load(Raw& r, const u8* row, int span, int u) {
        const u8* p = block32<bytes>(row, span, u);
        r.dm.load(p); r.h.load(p + 4); r.q.load(p + 8 + 4 * (u & 3));
    }
    __device__ static Octet octet(const Raw& r, int span, int u) {
        u32 v = r.q.v, h = r.h.v >> 4 * (u & 3); float d = half_bits(r.dm.v), m = half_bits(r.dm.v >> 16);
        return {low_nibbles(v) | fifth_bits(h), high_nibbles(v) | fifth_bits(h >> 16), d, d, m, m};
    }
};
template<> struct Type<Q8_0> : Of32 {
    enum { bytes = 34, bias = 128, mins = 0 };
    struct Raw { u16 d; Four<2> a, b; };
    __device__ static void load(Raw& r, const u8* row, int span, int u) {
        const u8* p = block32<bytes>(row, span, u);
        r.d = *(const u16*)p; r.a.load(p + 2 + 4 * (u & 3)); r.b.load(p + 18 + 4 * (u & 3));
    }
    __device__ static Octet octet(const Raw& r, int span, int u) {      // flipping the top bit adds 128 to a signed byte
        float d = half_bits(r.d);
        return {r.a.word() ^ 0x80808080, r.b.word() ^ 0x80808080, d, d, 0, 0};
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
    struct Raw { u8 e; Four<1> q; };
    __device__ static void load(Raw& r, const u8* row, int span, int u) {
        const u8* p = block32<bytes>(row, span, u);
        r.e = p[0]; r.q.load(p + 1 + 4 * (u & 3));
    }
    __device__ static Octet octet(const Raw& r, int span, int u) {
        u32 v = r.q.word(), lo = mxfp4_bytes(v), hi = mxfp4_bytes(v >> 16);
        float d = mxfp4_scale(r.e);
        return {__byte_perm(lo, hi, 0x6420), __byte_perm(lo, hi, 0x7531), d, d, 0, 0};
    }
};

// ---- blocks of 256 = 4 spans of 64: octet u has elements 4u…+3 of the span and those 32 further on
struct Of256 { enum { block = 256, delta = 32 }; };

// d, m of sub-blocks 2g and 2g+1 of a Q4_K or Q5_K block, from its 16-byte head
__device__ __forceinline__ void k_scales(const uint4& h, int g, Octet& o) {
    u32 sc = g < 2 ? h.y & 0x3F3F3F3F : (h.w & 0x0F0F0F0F) | ((h.y >> 2) & 0x30303030);
    u32 mn = g < 2 ? h.z & 0x3F3F3F3F : ((h.w >> 4) & 0x0F0F0F0F) | ((h.z >> 2) & 0x30303030);
    float d = half_bits(h.x), m = -half_bits(h.x >> 16);
    sc >>= 16 * (g & 1); mn >>= 16 * (g & 1);
    o.da = __fmul_rn(d, byte_float(sc, 0, 0)); o.db = __fmul_rn(d, byte_float(sc, 1, 0));
    o.ma = __fmul_rn(m, byte_float(mn, 0, 0)); o.mb = __fmul_rn(m, byte_float(mn, 1, 0));
}
template<> struct Type<Q4_K> : Of256 {
    enum { bytes = 144, bias = 0, mins = 1, group = 32 };
    struct Raw { uint4 head; Four<4> q; };
    __device__ static void load(Raw& r, const u8* row, int span, int u) {
        const u8* p = row + span / 4 * bytes;
        r.head = *(const uint4*)p; r.q.load(p + 16 + 32 * (span & 3) + 4 * u);
    }
    __device__ static Octet octet(const Raw& r, int span, int u) {
        Octet o; k_scales(r.head, span & 3, o);
        o.a = low_nibbles(r.q.v); o.b = high_nibbles(r.q.v);
        return o;
    }
};
template<> struct Type<Q5_K> : Of256 {
    enum { bytes = 176, bias = 0, mins = 1, group = 32 };
    struct Raw { uint4 head; Four<4> h, q; };
    __device__ static void load(Raw& r, const u8* row, int span, int u) {
        const u8* p = row + span / 4 * bytes;
        r.head = *(const uint4*)p; r.h.load(p + 16 + 4 * u); r.q.load(p + 48 + 32 * (span & 3) + 4 * u);
    }
    __device__ static Octet octet(const Raw& r, int span, int u) {
        Octet o; k_scales(r.head, span & 3, o);
        u32 v = r.q.v, h = r.h.v >> 2 * (span & 3);
        o.a = low_nibbles(v) | (h & 0x01010101) << 4; o.b = high_nibbles(v) | (h & 0x02020202) << 3;
        return o;
    }
};
template<> struct Type<Q6_K> : Of256 {      // a span is one nibble (low, high) of one half of the block
    enum { bytes = 210, bias = 32, mins = 0, group = 16 };
    struct Raw { Four<2> a, b, h; signed char sa, sb; u16 d; };
    __device__ static void load(Raw& r, const u8* row, int span, int u) {
        const u8* p = row + span / 4 * bytes;
        int n = (span >> 1) & 1;
        r.a.load(p + 64 * n + 4 * u); r.b.load(p + 64 * n + 32 + 4 * u); r.h.load(p + 128 + 32 * n + 4 * u);
        const signed char* s = (const signed char*)p + 192 + 8 * n + 4 * (span & 1) + u / 4;
        r.sa = s[0]; r.sb = s[2]; r.d = *(const u16*)(p + 208);
    }
    __device__ static Octet octet(const Raw& r, int span, int u) {
        int s = 4 * (span & 1);
        u32 h = r.h.word() >> s; float d = half_bits(r.d);
        return {low_nibbles(r.a.word() >> s) | (h & 0x03030303) << 4, low_nibbles(r.b.word() >> s) | (h & 0x0C0C0C0C) << 2,
            __fmul_rn(d, r.sa), __fmul_rn(d, r.sb), 0, 0};
    }
};

// ---- plain numbers: no bytes, no scales; a row may have any length
struct Plain { enum { block = 1, delta = 32, bias = 0, mins = 0, group = 32 }; };
template<> struct Type<F32> : Plain {
    enum { bytes = 4 };
    __device__ static float at(const u8* row, int i) { return ((const float*)row)[i]; }
};
template<> struct Type<F16> : Plain {
    enum { bytes = 2 };
    __device__ static float at(const u8* row, int i) { return half_at(row + 2 * i); }
};
template<> struct Type<BF16> : Plain {
    enum { bytes = 2 };
    __device__ static float at(const u8* row, int i) { return __uint_as_float((u32)((const u16*)row)[i] << 16); }
};

template<int T> __device__ constexpr bool is_plain() { return Type<T>::block == 1; }

// first element of octet u within its span of 64; its b elements come Type<T>::delta later
template<int T> __device__ __forceinline__ int octet_start(int u) { return Type<T>::delta == 16 ? 32 * (u / 4) + 4 * (u & 3) : 4 * u; }

// Eight weights: a[j] = element i+j, b[j] = element i+delta+j where i = 64 span + octet_start(u). Weight = d * a + m.
struct Eight { float a[4], b[4], da, db, ma, mb; };
template<int T> struct Unpack {     // load, then decode
    typename Type<T>::Raw raw;
    __device__ __forceinline__ void load(const u8* row, int span, int u, int n) { Type<T>::load(raw, row, span, u); }
    __device__ __forceinline__ Eight eight(int span, int u) const {
        Octet o = Type<T>::octet(raw, span, u);
        Eight e;
#pragma unroll
        for (int j = 0; j < 4; j++) { e.a[j] = byte_float(o.a, j, Type<T>::bias); e.b[j] = byte_float(o.b, j, Type<T>::bias); }
        e.da = o.da; e.db = o.db; e.ma = o.ma; e.mb = o.mb;
        return e;
    }
};
template<int T> struct UnpackPlain {
    float a[4], b[4];
    __device__ __forceinline__ void load(const u8* row, int span, int u, int n) {
        int i = 64 * span + 4 * u;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            a[j] = i + j < n ? Type<T>::at(row, i + j) : 0;
            b[j] = i + 32 + j < n ? Type<T>::at(row, i + 32 + j) : 0;
        }
    }
    __device__ __forceinline__ Eight eight(int span, int u) const {
        return {{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, 1, 1, 0, 0};
    }
};
template<> struct Unpack<F32> : UnpackPlain<F32> {};
template<> struct Unpack<F16> : UnpackPlain<F16> {};
template<> struct Unpack<BF16> : UnpackPlain<BF16> {};

// Both steps at once. The octet must start before n, the row's length.
template<int T> __device__ __forceinline__ Eight eight(const u8* row, int span, int u, int n) {
    Unpack<T> w;
    w.load(row, span, u, n);
    return w.eight(span, u);
}

// Element i of a row, rounded as the reference rounds it (product, then sum)
template<int T> __device__ __forceinline__ float dequant_one(const u8* row, int i) {
    if constexpr (is_plain<T>()) return Type<T>::at(row, i);
    else {
        int r = i & 63, second = (r / Type<T>::delta) & 1, u = Type<T>::delta == 16 ? 4 * (r / 32) + (r & 15) / 4 : (r & 31) / 4;
        typename Type<T>::Raw raw;
        Type<T>::load(raw, row, i / 64, u);
        Octet o = Type<T>::octet(raw, i / 64, u);
        float q = (float)((int)byte_of(second ? o.b : o.a, r & 3) - Type<T>::bias);
        return __fadd_rn(__fmul_rn(second ? o.db : o.da, q), second ? o.mb : o.ma);
    }
}

// bytes of a row of n elements
template<int T> __device__ __forceinline__ long long row_bytes(int n) { return (long long)(n / Type<T>::block) * Type<T>::bytes; }

// F(lower-case name, type) for every type: one kernel per type is made with it
#define EACH_QUANT(F) F(q4_0, Q4_0) F(q4_1, Q4_1) F(q5_0, Q5_0) F(q5_1, Q5_1) F(q8_0, Q8_0) F(mxfp4, MXFP4) \
    F(q4_k, Q4_K) F(q5_k, Q5_K) F(q6_k, Q6_K)
#define EACH_TYPE(F) F(f32, F32) F(f16, F16) F(bf16, BF16) EACH_QUANT(F)
#define EACH_HALF(F) F(f16, F16) EACH_QUANT(F)

// -DONLY_NAME=q4_k -DONLY_TYPE=Q4_K: the kernels of one type alone, which compile in a tenth of the time
#ifdef ONLY_TYPE
#define EXPANDED(F, name, T) F(name, T)
#undef EACH_TYPE
#undef EACH_HALF
#define EACH_TYPE(F) EXPANDED(F, ONLY_NAME, ONLY_TYPE)
#define EACH_HALF(F) EXPANDED(F, ONLY_NAME, ONLY_TYPE)
#endif
#endif
