#include "mma.cu"
#include "source.cu"

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
    __device__ __forceinline__ void load(const Planes<T>& p, const long long (&row)[2], int step, int t) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const long long at = row[e] * p.blocks;
            if constexpr (is_k<T>()) {
#pragma unroll
                for (int g = 0; g < 2; g++) {
                    four(q[g][e], 0, p.q + (at + step) * 128 + 64 * g + 16 * t);
                    if (T == Q5_K) h[g][e][0] = *(const u32*)(p.h + (at + step) * 32 + 16 * g + 4 * t);
                    if (T == Q6_K) {
                        uint2 v = *(const uint2*)(p.h + (at + step) * 64 + 32 * g + 8 * t);
                        h[g][e][0] = v.x; h[g][e][1] = v.y;
                        s[g][e] = *(const u16*)(p.s + (at + step) * 16 + 8 * g + 2 * t);
                    }
                }
                if (T == Q6_K) head[e].x = *(const u16*)(p.d + (at + step) * 2);
                else head[e] = *(const uint4*)(p.s + (at + step) * 16);
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
    // Weight pair r (0…3) of block j of group g in row e, as halves without their scale
    __device__ __forceinline__ u32 pair(const Masks& c, int g, int e, int j, int r) const {
        constexpr int B = Type<T>::bias;
        if (T == Q8_0) return byte_halves<B>(q[0][e][(2 * j + r / 2) % WORDS] ^ 0x80808080, r & 1 ? 0x4341 : 0x4240);
        if (T == MXFP4) {       // sign to bit 15, the magnitude's three bits to 11…9: that is the half of value/2^14
            const int at = 8 * (r & 1) + 4 * (r / 2);
            u32 w = q[0][e][j], m = at <= 9 ? w << (9 - (at <= 9 ? at : 9)) : w >> (at > 9 ? at - 9 : 0);
            return (w << (12 - at) & 0x80008000) | (m & 0x0E000E00);
        }
        const bool high = is_k<T>() ? j & 1 : r / 2;
        u32 w = q[g][e][is_k<T>() ? 2 * (j / 2) + r / 2 : j] >> 8 * (r & 1);
        w = (w & (high ? c.high : c.low)) | c.magic;
        if (Type<T>::h) {       // the high bits of the pair to bit 4, or to bit 8
            const int from = T == Q6_K ? 8 * (j & 1) + 2 * r : 4 * j + r, to = high ? 8 : 4;
            u32 x = h[g][e][T == Q6_K ? j / 2 : 0];
            x = from >= to ? x >> (from >= to ? from - to : 0) : x << (from < to ? to - from : 0);
            w |= x & (T == Q6_K ? 0x00030003u << to : 0x00010001u << to);
        }
        return high ? high_halves<B>(w) : low_halves<B>(w);
    }
    // What lane t adds of group g to row e: c0, c1 are the sums of the first and the last 16 weights of block t of the group
    __device__ __forceinline__ float scaled(int g, int e, int t, float c0, float c1, float2 x) const {      // x: 1/scale and sum of the block of x
        if (T == Q6_K) {
            float d = half_bits(head[e].x);
            return x.x * (__fmul_rn(d, (float)(signed char)s[g][e]) * c0 + __fmul_rn(d, (float)(signed char)(s[g][e] >> 8)) * c1);
        }
        float c = (c0 + c1) * x.x, d, m;
        if constexpr (is_k<T>()) { k_scale(head[e], 4 * g + t, d, m); return fmaf(c, d, m * x.y); }
        if (T == MXFP4) return c * 16384.f * __uint_as_float(s[0][e] ? s[0][e] << 23 : 0x00400000);
        d = half_bits(s[0][e]);
        return Type<T>::mins ? fmaf(c, d, half_bits(s[0][e] >> 16) * x.y) : c * d;
    }
};

// The vector in shared memory, for the tensor cores: x = hi + lo in halves, 22 bits, with a power of two for every block of 32.
// A block's 128 bytes are 16 for each of four lanes of hi, then of lo: the pairs that the lane's weights meet.
struct Vector {
    char* zero;         // 16 bytes of zeros
    char* part;         // 128 bytes a block
    float2* block;      // 1/scale, sum
    float* sums;        // twice 8 warps x 16 rows
    float* squares;     // of each warp
    __device__ Vector(char* shared, int blocks) : zero(shared), part(shared + 16), block((float2*)(part + 128 * blocks)),
        sums((float*)(block + blocks)), squares(sums + 256) {}
};
__device__ __forceinline__ int padded_blocks(int n) { return (n + 255) / 256 * 8; }        // whole K blocks, and whole warps in `prepare`

__device__ __forceinline__ void prepare(const Vector& v, const Source& src, int n) {
    if (threadIdx.x < 4) ((u32*)v.zero)[threadIdx.x] = 0;
    float square = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < 4 * padded_blocks(n); i += 256) {
        const int b = i / 4, t = i & 3, at = 32 * b + 4 * t;
        float x[8] = {};
        if (at < n) { src.four(x, at, square); src.four(x + 4, at + 16, square); }
        float top = 0, sum = 0;
#pragma unroll
        for (int k = 0; k < 8; k++) { top = fmaxf(top, fabsf(x[k])); sum += x[k]; }
        for (int d = 1; d < 4; d *= 2) { top = fmaxf(top, __shfl_xor_sync(~0u, top, d)); sum += __shfl_xor_sync(~0u, sum, d); }
        int e = __float_as_uint(top) >> 23, s = e == 255 ? 127 : min(253, 267 - e);        // the largest to [2^13, 2^14)
        float scale = __uint_as_float(s << 23);
        u32 hi[8], lo[8];
#pragma unroll
        for (int k = 0; k < 8; k++) { float y = x[k] * scale; hi[k] = to_half_bits(y); lo[k] = to_half_bits(y - half_bits(hi[k])); }
        auto pairs = [](const u32 (&h)[8]) { return uint4{h[0] | h[2] << 16, h[1] | h[3] << 16, h[4] | h[6] << 16, h[5] | h[7] << 16}; };
        *(uint4*)(v.part + 128 * b + 16 * t) = pairs(hi);
        *(uint4*)(v.part + 128 * b + 64 + 16 * t) = pairs(lo);
        if (t == 0) v.block[b] = {__uint_as_float((254 - s) << 23), sum};
    }
    square = warp_sum(square);
    if ((threadIdx.x & 31) == 0) v.squares[threadIdx.x / 32] = square;
}

struct Segment { const u8* w; float* out; const float* bias; int n_out; long long ldo; };

// Steps of a batch, whose loads are on their way together; of K types the next batch is loaded while one is multiplied. Both were measured: what
// costs more registers than it hides is slower.
template<int T> __device__ constexpr int batch() { return is_k<T>() || T == Q8_0 ? 1 : 2; }
template<int T> __device__ constexpr bool ahead() { return is_k<T>(); }
// Blocks of threads an SM holds: a K block's step takes more registers
template<int A, int B> __device__ constexpr int resident() { return is_k<A>() || is_k<B>() ? 2 : 3; }

// One warp's part of the products of W with the vector: 16 rows of W at a time, of which warp `part` of `parts` takes every parts-th batch.
// Weights are the A of the tensor core (16 rows x 16 columns), x its B. B's eight columns are hi and lo of four blocks: in the column of
// another block than the one at hand B is zero, so that after four blocks lane t of a row holds the sums of block t, and only there its
// scale is needed.
template<int T> struct Rows {
    static constexpr int N = batch<T>();
    typedef Share<T> Batch[N];
    const Planes<T> p;
    const Masks c;
    const int lane, t, part, parts, tiles, stride, steps, n_out;
    const long long first;          // row of the matrix in a stack of experts
    int tile, at;                   // the batch to be loaded next
    float acc[2] = {0, 0};
    __device__ __forceinline__ Rows(const Segment& s, int n_expert, int expert, int n_in, int block, int blocks, int parts)
        : p(s.w, (long long)n_expert * s.n_out, n_in), lane(threadIdx.x & 31), t(lane & 3), part(threadIdx.x / 32 % parts), parts(parts),
          tiles((s.n_out + 15) / 16), stride(blocks * (8 / parts)), steps(is_k<T>() ? p.blocks : (p.blocks + 3) / 4), n_out(s.n_out), first((long long)expert * s.n_out),
          tile(block * (8 / parts) + threadIdx.x / 32 / parts), at(part * N) {}
    __device__ __forceinline__ void load(Batch& b) {
        if (tile >= tiles) return;
        long long row[2];
        for (int e = 0; e < 2; e++) row[e] = first + min(16 * tile + lane / 4 + 8 * e, n_out - 1);
#pragma unroll
        for (int k = 0; k < N; k++) if (at + k < steps) b[k].load(p, row, at + k, t);
    }
    __device__ __forceinline__ bool next() {            // true: the next batch is of another tile
        at += parts * N;
        if (at < steps) return false;
        at = part * N; tile += stride;
        return true;
    }
    __device__ __forceinline__ void multiply(const Batch& b, const Vector& v, int from) {
#pragma unroll
        for (int k = 0; k < N; k++) if (from + k < steps) multiply(b[k], v, from + k);
    }
    __device__ __forceinline__ void multiply(const Share<T>& b, const Vector& v, int step) {
        const int mine = lane / 8, hi = lane / 4 & 1;           // the block and half of x whose column this lane holds
#pragma unroll
        for (int g = 0; g < Share<T>::GROUPS; g++) {
            const int block = 4 * (step * Share<T>::GROUPS + g);
            const char* own = v.part + 128 * (block + mine) + 64 * hi + 16 * t;
            float sum[2][4] = {};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint4 x = *(const uint4*)(j == mine ? own : v.zero);
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    const u32 a[4] = {b.pair(c, g, 0, j, 2 * s), b.pair(c, g, 1, j, 2 * s), b.pair(c, g, 0, j, 2 * s + 1), b.pair(c, g, 1, j, 2 * s + 1)};
                    mma(sum[s], a, s ? x.z : x.x, s ? x.w : x.y);
                }
            }
            const float2 x = v.block[block + t];
#pragma unroll
            for (int e = 0; e < 2; e++) acc[e] += b.scaled(g, e, t, sum[0][2 * e] + sum[0][2 * e + 1], sum[1][2 * e] + sum[1][2 * e + 1], x);
        }
    }
};

template<int T>
__device__ __forceinline__ void gemv(const Segment& s, const Source& src, const float* residual, long long ldr, int block, int blocks, int n_in, int parts, int slot,
    int expert, int n_expert) {
    extern __shared__ __align__(16) char shared[];
    const Vector v(shared, padded_blocks(n_in));
    Rows<T> m(s, n_expert, expert, n_in, block, blocks, parts);
    const int warp = threadIdx.x / 32;
    typename Rows<T>::Batch one, two;
    float bias = 0, old = 0;
    int turn = 0;
    auto row = [&](int tile) { return 16 * tile + m.lane; };
    auto writes = [&](int tile) { return !m.part && m.lane < 16 && row(tile) < s.n_out; };
    auto fetch = [&](int tile) { bias = s.bias && writes(tile) ? s.bias[m.first + row(tile)] : 0; };
    m.load(one);                        // on their way while the vector is prepared
    fetch(m.tile);
    wait_for_last();
    prepare(v, src, n_in);
    if (residual && writes(m.tile)) old = residual[slot * ldr + row(m.tile)];
    __syncthreads();
    auto step = [&](typename Rows<T>::Batch& now, typename Rows<T>::Batch& then) {        // false: all done
        const int tile = m.tile, at = m.at;
        const bool end = m.next();
        if (ahead<T>()) m.load(then);
        m.multiply(now, v, at);
        if (!ahead<T>()) m.load(now);
        if (!end) return true;
        float* sums = v.sums + 128 * turn;      // two sets in turns: one barrier a tile is enough
        turn ^= 1;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float y = m.acc[e];
            y += __shfl_xor_sync(~0u, y, 1); y += __shfl_xor_sync(~0u, y, 2);
            if (m.t == 0) sums[16 * warp + m.lane / 4 + 8 * e] = y;
            m.acc[e] = 0;
        }
        __syncthreads();
        if (writes(tile)) {
            float y = 0;
            for (int k = 0; k < parts; k++) y += sums[16 * (warp + k) + m.lane];
            s.out[slot * s.ldo + row(tile)] = y * src.factor(v.squares, n_in) + bias + old;
        }
        if (m.tile - warp / parts >= m.tiles) return false;     // the same answer in all warps of the block
        fetch(m.tile);
        if (residual && writes(m.tile)) old = residual[slot * ldr + row(m.tile)];
        return true;
    };
    if (ahead<T>()) while (step(one, two) && step(two, one)) {}
    else while (step(one, one)) {}
}

// Up to three matrices that read the same vector, in one launch; blockIdx.y is the row of x, or a slot whose expert is ids[slot]. Matrix i has
// b_i of the launch's blocks, each of which does every b_i-th tile. `second`: bit i says that matrix i is of type B.
#define KERNEL(name, A, B) extern "C" __global__ void __launch_bounds__(256, (resident<A, B>())) gemv_##name(const u8* w0, const u8* w1, const u8* w2, \
    float* out0, float* out1, float* out2, const float* bias0, const float* bias1, const float* bias2, int n0, int n1, int n2, int b0, int b1, int b2, \
    long long ldo0, long long ldo1, long long ldo2, const float* residual, long long ldr, int n_in, int parts, int second, \
    const float* x, const float* other, long long ldx, long long ldother, float eps, int mode, const int* ids, int per, int n_expert) { \
    let_next_start(); \
    if (ids) wait_for_last(); \
    const int slot = blockIdx.y, expert = ids ? ids[slot] : 0; \
    if (expert < 0 || expert >= n_expert) return; \
    const Source src(x, other, slot / per, ldx, ldother, eps, mode); \
    int block = blockIdx.x, blocks = b0, i = 0; \
    Segment m = {w0, out0, bias0, n0, ldo0}; \
    if (block >= b0) { block -= b0; blocks = b1; i = 1; m = {w1, out1, bias1, n1, ldo1}; } \
    if (i && block >= b1) { block -= b1; blocks = b2; i = 2; m = {w2, out2, bias2, n2, ldo2}; } \
    if (A == B || !(second >> i & 1)) gemv<A>(m, src, residual, ldr, block, blocks, n_in, parts, slot, expert, n_expert); \
    else gemv<B>(m, src, residual, ldr, block, blocks, n_in, parts, slot, expert, n_expert); }
#define EACH(name, T) KERNEL(name, T, T)
#ifdef SECOND_TYPE
KERNEL(mixed, ONLY_TYPE, SECOND_TYPE)
#else
EACH_QUANT(EACH)
#endif
