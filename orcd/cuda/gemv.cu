#include "share.cu"
#include "source.cu"

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
