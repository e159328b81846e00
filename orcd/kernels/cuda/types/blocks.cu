// Quantised tensors in VRAM: the bytes of the file's blocks sorted into planes, read eight weights at a time.
#ifndef ORCD_BLOCKS
#define ORCD_BLOCKS
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// ggml's type ids
enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30, MXFP4 = 39 };

__device__ __forceinline__ float half_bits(u32 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)h)); return f; }
__device__ __forceinline__ float half_at(const u8* p) { return half_bits(*(const u16*)p); }
__device__ __forceinline__ u32 minus_half2(u32 v, u32 b) { u32 r; asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(b)); return r; }
// The half of an integer from 1 to 2047, twice
__device__ constexpr u32 two_of(int n) { int e = 10; while (n < 1 << e) e--; return ((e + 15) << 10 | ((n << 10 >> e) & 1023)) * 0x10001u; }

// How a type is stored. block: weights of a block. q, h, s, d: bytes of a block's quants, of their high bits, of scales, and of the
// super-block scale. mins: weight = d * (integer - bias) + m. group: weights that share a scale. even, odd: what is too much in
// the halves that `pair` makes of an integer, at even and odd places.
template<int T> struct Type;
struct Of32 { enum { block = 32, d = 0, group = 32 }; };
struct Of256 { enum { block = 256, q = 128, group = 32 }; };
struct Plain { enum { block = 1, q = 0, h = 0, d = 0, mins = 0, group = 32 }; };
template<> struct Type<Q4_0>  : Of32  { enum { q = 16, h = 0, s = 2, mins = 0, bias = 8, even = 16 + bias, odd = 256 + bias }; };
template<> struct Type<Q4_1>  : Of32  { enum { q = 16, h = 0, s = 4, mins = 1, bias = 0, even = 16, odd = 256 }; };
template<> struct Type<Q5_0>  : Of32  { enum { q = 16, h = 4, s = 2, mins = 0, bias = 16, even = 32 + bias, odd = 512 + bias }; };
template<> struct Type<Q5_1>  : Of32  { enum { q = 16, h = 4, s = 4, mins = 1, bias = 0, even = 32, odd = 512 }; };
template<> struct Type<Q8_0>  : Of32  { enum { q = 32, h = 0, s = 2, mins = 0, bias = 128, even = 1024 + bias, odd = 1024 + bias }; };
template<> struct Type<MXFP4> : Of32  { enum { q = 16, h = 0, s = 1, mins = 0, bias = 0, even = 0, odd = 0 }; };
template<> struct Type<Q4_K>  : Of256 { enum { h = 0, s = 16, d = 0, mins = 1, bias = 0, even = 16, odd = 256 }; };
template<> struct Type<Q5_K>  : Of256 { enum { h = 32, s = 16, d = 0, mins = 1, bias = 0, even = 32, odd = 512 }; };
template<> struct Type<Q6_K>  : Of256 { enum { h = 64, s = 16, d = 2, mins = 0, group = 16, bias = 32, even = 64 + bias, odd = 1024 + bias }; };
template<> struct Type<F32>   : Plain { enum { s = 4 }; __device__ static float at(const u8* row, int i) { return ((const float*)row)[i]; } };
template<> struct Type<F16>   : Plain { enum { s = 2 }; __device__ static float at(const u8* row, int i) { return half_at(row + 2 * i); } };
template<> struct Type<BF16>  : Plain { enum { s = 2 }; __device__ static float at(const u8* row, int i) { return __uint_as_float((u32)((const u16*)row)[i] << 16); } };

template<int T> __device__ constexpr bool is_plain() { return Type<T>::block == 1; }
template<int T> __device__ constexpr bool is_k() { return Type<T>::block == 256; }

// One matrix: rows of `n` weights at w, 16 rows a tile. A tile is cut along its rows into units: four blocks of 32 weights, or one of 256.
// A unit holds its quants, then high bits, scales, super-block scales.
template<int T> struct Planes {
    enum { PER = Type<T>::block == 32 ? 4 : 1, SIZE = Type<T>::q + Type<T>::h + Type<T>::s + Type<T>::d };
    const u8* w;
    int blocks;         // of a row
    __device__ __forceinline__ Planes(const u8* w, int n) : w(w), blocks(n / Type<T>::block) {}
    __device__ __forceinline__ int units() const { return (blocks + PER - 1) / PER; }                  // of a tile
    __device__ __forceinline__ int left(int unit) const { return min((int)PER, blocks - unit * PER); } // blocks of a row in a unit
    __device__ __forceinline__ const u8* at(long long tile, int unit) const { return w + 16 * SIZE * (tile * blocks + unit * PER); }
};
// Rows 0…7 and 8…15 of a unit have 32 lanes each, so that a warp's 16-byte loads are neighbours: lane 4 g + t holds of row g the weights
// 4t…4t+3 and 16+4t…+3 of every block, as four pairs (0, 2), (1, 3), (16, 18), (17, 19) counted from 4t. One word a block has them where they
// become halves with the fewest instructions: an integer n in the mantissa's bits under a fixed exponent is the half 2^k + n.
__device__ __forceinline__ u32 turn_left(u32 w) { return __byte_perm(w, w, 0x2103); }          // by 8 bits
__device__ __forceinline__ u32 turn_right(u32 w) { return __byte_perm(w, w, 0x0321); }
// Where the loader puts a weight's bits: the first of a pair (bytes 0, 1 of v) at bits p0 and p1, the second (bytes 2, 3) 16 bits higher
__device__ __forceinline__ u32 fields(u32 v, int p0, int p1) { return (v & 255) << p0 | (v >> 8 & 255) << p1 | (v >> 16 & 255) << (p0 + 16) | (v >> 24) << (p1 + 16); }
// Fifth bits of block j: a and b hold them as bytes
__device__ __forceinline__ u32 fifth_fields(u32 a, u32 b, int j) {
    u32 x = (fields(a, 9, 5) | fields(b, 9, 5) << 1) << 2 * (j & 1);
    return j < 2 ? x : turn_right(x);
}
// In a unit of fewer than four blocks they are a byte a block and lane
__device__ __forceinline__ u32 spread(u32 x) { return (x & 1) | (x & 2) << 7 | (x & 4) << 14 | (x & 8) << 21; }
__device__ __forceinline__ u32 gathered(u32 x) { return (x & 1) | (x >> 7 & 2) | (x >> 14 & 4) | (x >> 21 & 8); }
__device__ __forceinline__ u32 fifth_of(u32 x, int j) { return fifth_fields(spread(x), spread(x >> 4), j); }

// Constants that the compiler knows nothing about (there is one layer of threads), so that it keeps them in registers: an instruction has
// room for one constant only
struct Masks {
    u32 even, odd;      // exponents of the pairs' halves
    __device__ __forceinline__ Masks(int bits) { u32 one = blockDim.z; even = two_of_power(bits) * one; odd = two_of_power(bits + 4) * one; }
    __device__ static constexpr u32 two_of_power(int e) { return (e + 15) << 10 | (e + 15) << 26; }
};

template<int T> __device__ constexpr int pair_bits() { return Type<T>::h == 0 ? 4 : T == Q6_K ? 6 : 5; }
// Without the exponent these bits are a small half: the integer times 2^(lifted - 24), of even pairs 16 times as much
template<int T> __device__ constexpr int lifted() { return T == Q8_0 ? 0 : 6 - pair_bits<T>(); }
template<int T> __device__ constexpr bool is_lifted(int r) { return T != Q8_0 && !(r & 1); }
template<int T> __device__ __forceinline__ u32 small_pair(u32 w, u32 v, u32 h, int j, int r) {
    const bool odd = r & 1, second = r / 2;
    if (T == Q8_0) return __byte_perm(second ? v : w, 0, odd ? 0x4341 : 0x4240);
    constexpr int BITS = pair_bits<T>(), LOW = lifted<T>();         // the odd pairs' integers begin at bit LOW, the even ones' 4 higher
    const u32 u = !second ? w : T == Q6_K ? w >> 8 : turn_left(w);
    u32 y = u & (odd ? 0x000F000Fu << LOW : 0x00F000F0u << LOW);
    if (BITS == 5) y |= (j < 2 ? h : turn_left(h)) >> (2 * (j & 1) + second) & (odd ? 0x00200020 : 0x02000200);
    if (BITS == 6) y |= (j & 1 ? turn_left(h) : h) >> 2 * second & (odd ? 0x00300030 : 0x03000300);
    return y;
}

// Pair r (0…3) of block j of a group of four: halves of the integers, plus `even` or `odd`. w: the block's word (of Q8_0 its two words w and
// v), h: the group's high bits (of Q6_K those of blocks 2 (j / 2) and the next)
template<int T> __device__ __forceinline__ u32 pair(const Masks& c, u32 w, u32 v, u32 h, int j, int r) {
    const bool odd = r & 1, second = r / 2;
    if (T == Q8_0) return __byte_perm(second ? v : w, 0x64646464, odd ? 0x4341 : 0x4240);
    if (T == MXFP4) {           // sign to bit 15, the magnitude's three bits to 11…9: that is the half of value / 2^14
        if (r == 0) return w & 0x8E008E00;
        if (r == 1) return w << 8 & 0x8E008E00;
        return r == 2 ? (w << 5 & 0x0E000E00) | (w << 15 & 0x80008000) : (w >> 3 & 0x0E000E00) | (w << 7 & 0x80008000);
    }
    return small_pair<T>(w, v, h, j, r) | (odd ? c.odd : c.even);
}
// The same without what is too much
template<int T> __device__ __forceinline__ u32 exact_pair(const Masks& c, u32 w, u32 v, u32 h, int j, int r) {
    const u32 y = pair<T>(c, w, v, h, j, r);
    return T == MXFP4 ? y : minus_half2(y, two_of(r & 1 ? Type<T>::odd : Type<T>::even));
}

// d, m of sub-block j (0…7) of a Q4_K or Q5_K block, from its 16-byte head
__device__ __forceinline__ void k_scale(const uint4& h, int j, float& d, float& m) {
    u32 y = h.y >> 8 * (j & 3), z = h.z >> 8 * (j & 3), w = h.w >> 8 * (j & 3);
    u32 sc = j < 4 ? y & 63 : (w & 15) | (y >> 2 & 0x30), mn = j < 4 ? z & 63 : (w >> 4 & 15) | (z >> 2 & 0x30);
    d = __fmul_rn(half_bits(h.x), (float)sc); m = -__fmul_rn(half_bits(h.x >> 16), (float)mn);
}
// 2^(e-127); e = 0 is subnormal
__device__ __forceinline__ float mxfp4_scale(u32 e) { return __uint_as_float(e ? e << 23 : 0x00400000); }

// ---- eight weights: an octet. Octet u (0…7) of a span of 64 weights has the elements i…i+3 and i+16…+3, i = 64 span + octet_start(u).
// weight = d * half + m; the halves of MXFP4 are value / 2^14.
struct Octet { u32 p[4]; float da, db, ma, mb; };
__device__ __forceinline__ int octet_start(int u) { return 32 * (u / 4) + 4 * (u & 3); }

// What lies in memory, loaded before any of it is decoded
template<int T> struct Raw { u32 w, v, h, s; uint4 head; };
template<int T> __device__ __forceinline__ void load_octet(Raw<T>& r, const Planes<T>& p, long long row, int span, int u) {
    using Y = Type<T>;
    const int at = 4 * (row & 15) + (u & 3), block = 2 * span + u / 4, j = block & 3;
    if constexpr (is_k<T>()) {
        const u8* unit = p.at(row / 16, block / 8);
        const int group = block >> 2 & 1;
        r.w = *(const u32*)(unit + 1024 * group + 16 * at + 4 * j);
        if (T == Q5_K) r.h = *(const u32*)(unit + 2048 + 256 * group + 4 * at);
        if (T == Q6_K) {
            r.h = *(const u32*)(unit + 2048 + 512 * group + 8 * at + 4 * (j / 2));
            r.s = *(const u16*)(unit + 3072 + 16 * (row & 15) + 2 * (block & 7)) | (u32)*(const u16*)(unit + 3328 + 2 * (row & 15)) << 16;
        } else r.head = *(const uint4*)(unit + 16 * (Y::q + Y::h) + 16 * (row & 15));
    } else {
        const u8* unit = p.at(row / 16, block / 4);
        const int left = p.left(block / 4);
        if (T == Q8_0) {        // two blocks a 16-byte load
            const u8* w = unit + (left == 4 ? 1024 * (j / 2) + 16 * at + 8 * (j & 1) : 8 * (left * at + j));
            r.w = *(const u32*)w; r.v = *(const u32*)(w + 4);
        } else r.w = *(const u32*)(unit + 4 * (left * at + j));
        if (Y::h) {
            const u8* h = unit + 16 * left * Y::q;
            r.h = left == 4 ? *(const u32*)(h + 4 * at) : fifth_of(h[left * at + j], j);
        }
        const u8* s = unit + 16 * left * (Y::q + Y::h) + Y::s * (left * (row & 15) + j);
        r.s = Y::s == 4 ? *(const u32*)s : Y::s == 2 ? *(const u16*)s : *s;
    }
}
template<int T> __device__ __forceinline__ Octet octet(const Raw<T>& r, int span, int u) {
    Octet o = {};
    const int block = 2 * span + u / 4;
    const Masks c(pair_bits<T>());
#pragma unroll
    for (int i = 0; i < 4; i++) o.p[i] = exact_pair<T>(c, r.w, r.v, r.h, block & 3, i);
    if constexpr (is_k<T>()) {
        if (T == Q6_K) {
            float d = half_bits(r.s >> 16);
            o.da = __fmul_rn(d, (float)(signed char)r.s); o.db = __fmul_rn(d, (float)(signed char)(r.s >> 8));
        } else { k_scale(r.head, block & 7, o.da, o.ma); o.db = o.da; o.mb = o.ma; }
    } else {
        o.da = o.db = T == MXFP4 ? mxfp4_scale(r.s) : half_bits(r.s);
        if (Type<T>::mins) o.ma = o.mb = half_bits(r.s >> 16);
    }
    return o;
}

// Element i of a row, rounded as the reference rounds it (product, then sum)
template<int T> __device__ __forceinline__ float dequant_one(const u8* w, long long row, int n, int i) {
    if constexpr (is_plain<T>()) return Type<T>::at(w + row * n * Type<T>::s, i);
    else {
        const int second = i >> 4 & 1, u = 4 * (i >> 5 & 1) + (i & 15) / 4;
        Raw<T> raw;
        load_octet<T>(raw, Planes<T>(w, n), row, i / 64, u);
        Octet o = octet<T>(raw, i / 64, u);
        float q = half_bits(o.p[2 * second + (i & 1)] >> (i & 2) * 8);
        if (T == MXFP4) q *= 16384.f;
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
