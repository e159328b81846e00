#include "types/lane_fragment.cu"
#include "math/input_prologue.cu"
#include "math/swiglu.cu"
#include "copy/bulk_pipeline.cu"
#include "math/topk_router.cu"
#ifndef WARPS
#define WARPS 8             // of a block
#endif
// Blocks that an SM has registers for. Of a small launch two and one of the next, which waits with its first weights; a large one wants the registers.
#ifndef RESIDENT
#define RESIDENT 3
#endif

// Up to three matrices that read the same vector, or those that one result is made of. blockIdx.y is the row of out.
struct GemvArgs {
    const u8* w[3]; float* out[3]; const float* bias[3];
    int n_out[3], blocks[3];            // rows of a matrix, and how many of the launch's blocks it has
    i64 ldo[3];
    const float* residual; i64 ldr;     // added to the first matrix's result
    int n_in;
    int parts, depth, span;             // warps that share a tile; pieces in a ring, units in a piece
    int second;                         // bit i: matrix i is of the second type
    int clamped;                        // gpt-oss's activation
    const float *x, *norm; i64 ldx; float eps;
    int per;                            // rows of out that share a row of x
    const float* logits;                // of a router, or
    const int* ids;                     // which expert a row of out takes
    int n_expert, n_used;
    int settled;                        // the logits were there before the launch before this one began
};
// The same as parameters, and put together again. Registers for sm_90 (NVRTC 13.5): gemv_q8_0 60, of a struct 66; gated_q8_0 70, of a struct 67
#define GEMV_PARAMETERS const u8* w0, const u8* w1, const u8* w2, float* out0, float* out1, float* out2, \
    const float* bias0, const float* bias1, const float* bias2, int n_out0, int n_out1, int n_out2, int blocks0, int blocks1, int blocks2, \
    i64 ldo0, i64 ldo1, i64 ldo2, const float* residual, i64 ldr, int n_in, int parts, int depth, int span, int second, int clamped, \
    const float* x, const float* norm, i64 ldx, float eps, int per, const float* logits, const int* ids, int n_expert, int n_used, int settled
#define GEMV_ARGS {{w0, w1, w2}, {out0, out1, out2}, {bias0, bias1, bias2}, {n_out0, n_out1, n_out2}, {blocks0, blocks1, blocks2}, \
    {ldo0, ldo1, ldo2}, residual, ldr, n_in, parts, depth, span, second, clamped, \
    x, norm, ldx, eps, per, logits, ids, n_expert, n_used, settled}
struct Matrix { const u8* w; float* out; const float* bias; i64 ldo; int n_out, blocks; };
__device__ __forceinline__ Matrix matrix(const GemvArgs& a, int i) { return {a.w[i], a.out[i], a.bias[i], a.ldo[i], a.n_out[i], a.blocks[i]}; }

// The vector in shared memory, for the tensor cores: x = hi + lo in halves, 22 bits, with a power of two for every block of 32.
// A block's 128 bytes are 16 for each of four lanes of hi, then of lo: the pairs that the lane's weights meet.
struct Vector {
    u8* part;           // 128 bytes a block
    float4* block;      // 1/scale, sum, and of the first and last 16 (or all 32) elements what `pair` makes too much
    __device__ Vector(u8* memory, int blocks) : part(memory), block((float4*)(memory + 128 * blocks)) {}
};
__device__ __forceinline__ int padded_blocks(int n) { return (n + 255) / 256 * 8; }        // whole K blocks, and whole warps in `prepare`

// From `rows` rows of x, ldx apart. Returns this thread's part of the sum of squares.
template<int T, bool MANY>
__device__ __forceinline__ float prepare(u8* memory, int vector_bytes, const InputPrologue& src, int rows, i64 ldx, int n) {
    constexpr int AT_ONCE = 2;                                  // whose loads are on their way together
    const int blocks = padded_blocks(n), each = 4 * blocks, items = rows * each;
    float square = 0;
#pragma unroll 1
    for (int from = threadIdx.x; from < items; from += 32 * WARPS * AT_ONCE) {
        float x[AT_ONCE][8];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int item = from + 32 * WARPS * i, row = MANY ? item / each : 0, at = 32 * ((item - row * each) / 4) + 4 * (item & 3);
            if (item < items && at < n) {
                const InputPrologue one(src.x, src.w, row, ldx, src.eps);
                one.four(x[i], at, square); one.four(x[i] + 4, at + 16, square);
            } else for (int k = 0; k < 8; k++) x[i][k] = 0;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int item = from + 32 * WARPS * i, row = MANY ? item / each : 0, b = (item - row * each) / 4, t = item & 3;
            if (item >= items) break;                           // the same answer in all lanes of a warp
            const Vector v(memory + row * vector_bytes, blocks);
            float top = 0, sum = 0;
#pragma unroll
            for (int k = 0; k < 8; k++) { top = fmaxf(top, fabsf(x[i][k])); sum += x[i][k]; }
            for (int d = 1; d < 4; d *= 2) { top = fmaxf(top, __shfl_xor_sync(~0u, top, d)); sum += __shfl_xor_sync(~0u, sum, d); }
            int e = __float_as_uint(top) >> 23, s = e == 255 ? 127 : min(253, 267 - e);        // the largest to [2^13, 2^14)
            float scale = __uint_as_float(s << 23);
            u32 hi[4], lo[4];           // pairs (0, 2), (1, 3), (16, 18), (17, 19)
            float over[2] = {0, 0};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int p = k / 2 * 4 + (k & 1);
                const float y = x[i][p] * scale, z = x[i][p + 2] * scale;
                hi[k] = pack_half2(y, z);
                const float y0 = half_bits(hi[k]), z0 = half_bits(hi[k] >> 16);
                lo[k] = pack_half2(y - y0, z - z0);
                over[k / 2] += (k & 1 ? Type<T>::odd : Type<T>::even) * ((y0 + half_bits(lo[k])) + (z0 + half_bits(lo[k] >> 16)));
            }
            if (Type<T>::even) for (int d = 1; d < 4; d *= 2) for (int k = 0; k < 2; k++) over[k] += __shfl_xor_sync(~0u, over[k], d);
            *(uint4*)(v.part + 128 * b + 16 * t) = {hi[0], hi[1], hi[2], hi[3]};
            *(uint4*)(v.part + 128 * b + 64 + 16 * t) = {lo[0], lo[1], lo[2], lo[3]};
            if (t == 0) v.block[b] = {__uint_as_float((254 - s) << 23), sum, T == Q6_K ? over[0] : over[0] + over[1], over[1]};
        }
    }
    return square;
}

// Adds the products of a unit's 16 rows with the vector. Weights are the A of the tensor core (16 rows x 16 columns), x its B. B's eight
// columns are hi and lo of four blocks: in the column of another block than the one at hand B is zero, so that after four blocks lane t of a
// row holds the sums of block t, and only there its scale is needed.
// own: where this lane's column of the unit's first group lies; zero: zeros, as many bytes
template<int T>
__device__ __forceinline__ void multiply(float (&acc)[2], const LaneFragment<T>& b, const Masks& c, const u8* own, const u8* zero, const float4* block, int lane) {
    const int t = lane & 3, mine = lane / 8;            // the block whose column this lane holds
    const u8* from[4];
#pragma unroll
    for (int j = 0; j < 4; j++) from[j] = j == mine ? own : zero;
#pragma unroll
    for (int g = 0; g < LaneFragment<T>::GROUPS; g++) {
        float sum[2][4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint4 x = *(const uint4*)(from[j] + 512 * g);
#pragma unroll
            for (int s = 0; s < 2; s++) {
                const u32 a[4] = {b.pair(c, g, 0, j, 2 * s), b.pair(c, g, 1, j, 2 * s), b.pair(c, g, 0, j, 2 * s + 1), b.pair(c, g, 1, j, 2 * s + 1)};
                mma(sum[s], a, s ? x.z : x.x, s ? x.w : x.y);
            }
        }
        const float4 x = block[4 * g + t];
#pragma unroll
        for (int e = 0; e < 2; e++) acc[e] += b.scaled(g, e, t, sum[0][2 * e] + sum[0][2 * e + 1], sum[1][2 * e] + sum[1][2 * e + 1], x);
    }
}

// What is made of the products of a row: the product itself; silu(gate) * up of two matrices; the weighted sum over at most four experts
enum { PRODUCT = 0, GATED = 1, MIX = 2 };

// Rows of matrix m (or of the `terms` that one result is made of), of which this is block `block`. `parts` of the block's warps share a tile of 16
// rows: each takes a run of its units, in pieces of `span` units. Pieces are asked for `depth` ahead, before the vector is there: weights never change.
template<int T, int MODE>
__device__ __forceinline__ void gemv(const GemvArgs& a, const Matrix& m, int block) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr int MAX_TERMS = MODE == MIX ? 4 : MODE == GATED ? 2 : 1;
    constexpr bool ASK_FIRST = T == MXFP4;      // for the next piece, before the last products of this one; after them the wait for its loads is over anyway
    const int n_in = a.n_in, n_out = m.n_out, parts = a.parts, depth = a.depth, span = a.span, row = blockIdx.y;
    const int terms = MODE == MIX ? a.n_used : MAX_TERMS;
    const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), part = warp % parts, n_blocks = padded_blocks(n_in), vectors = MODE == MIX ? terms : 1;
    // shared memory: zeros, sums of squares, two sets of sums (warps x terms x 16 rows), vectors, rings
    u8* zero = shared;
    float *squares = (float*)(shared + 1024), *sums = squares + 16;
    u8* vector = (u8*)(sums + 2 * WARPS * MAX_TERMS * 16);
    const int vector_bytes = 144 * n_blocks;
    const Planes<T> p(m.w, n_in);
    constexpr int UNIT = 16 * p.PER * p.SIZE;
    const int units = p.units(), tiles = (n_out + 15) / 16, stride = m.blocks * (WARPS / parts), begin = part * units / parts, end = (part + 1) * units / parts;
    const i64 tile_bytes = 16ll * p.SIZE * p.blocks, matrix = tiles * tile_bytes;         // matrix: of one expert
    BulkPipeline ring(vector + vectors * vector_bytes + warp * (depth * span * UNIT + 64), span * UNIT, depth, lane);
    if (threadIdx.x < 256) ((u32*)zero)[threadIdx.x] = 0;

    int id = 0;
    float weight = 1;
    if (MODE == PRODUCT && a.ids) {
        pdl_wait();
        id = a.ids[row];
        if (id < 0 || id >= a.n_expert) return;
    }
    if (MODE != PRODUCT && a.logits) {
        if (!a.settled) pdl_wait();
        top_experts(a.logits + (MODE == MIX ? row : row / a.n_used) * a.n_expert, a.n_expert, a.n_used, id, weight);
        if (MODE != MIX) id = __shfl_sync(~0u, id, row % a.n_used);
    }
    auto expert = [&](int term) { return MODE == MIX ? __shfl_sync(~0u, id, term) : id; };
    const i64 other = MODE == GATED ? a.w[1] - a.w[0] : 0;
    // A run of units of one tile and term, and the pieces of it that are still to come
    struct Run { int tile, term, unit; const u8* at; };
    auto start = [&](Run& r) {
        r.unit = begin;
        r.at = p.w + r.tile * tile_bytes + begin * UNIT + (r.term ? other : 0) + expert(r.term) * matrix;
    };
    auto bytes = [&](const Run& r) { return 16 * p.SIZE * min(span * p.PER, min(end * p.PER, p.blocks) - r.unit * p.PER); };
    auto next = [&](Run& r) {
        r.unit += span;
        r.at += span * UNIT;
        if (r.unit < end) return;
        if (++r.term == terms) { r.term = 0; r.tile += stride; }
        start(r);
    };
    const int first = block * (WARPS / parts) + warp / parts;
    Run ahead = {first, 0, 0, nullptr};
    start(ahead);
    Run now = ahead;
    auto ask = [&] { if (begin < end && ahead.tile < tiles) { ring.ask(ahead.at, bytes(ahead)); next(ahead); } };
#pragma unroll 1
    for (int i = 0; i < depth; i++) ask();

    auto writes = [&](int tile) { return !part && lane < 16 && 16 * tile + lane < n_out; };
    float bias[MAX_TERMS], old = 0;
    auto fetch = [&](int tile) {
#pragma unroll
        for (int i = 0; i < MAX_TERMS; i++) {
            bias[i] = 0;
            if (i >= terms) continue;
            const float* b = MODE == GATED && i == 1 ? a.bias[1] : m.bias;
            const int e = expert(i);
            if (b && writes(tile)) bias[i] = b[e * n_out + 16 * tile + lane];
        }
    };
    fetch(first);
    pdl_wait();
    pdl_launch_dependents();           // so that all that was launched before the last launch is done when the next one starts
    const InputPrologue src(a.x, a.norm, MODE == MIX ? row * terms : row / a.per, a.ldx, a.eps);
    const float square = warp_sum(prepare<T, MODE == MIX>(vector, vector_bytes, src, vectors, a.ldx, n_in));
    if (lane == 0) squares[warp] = square;
    auto fetch_old = [&](int tile) { if (a.residual && writes(tile)) old = a.residual[row * a.ldr + 16 * tile + lane]; };
    fetch_old(first);
    __syncthreads();
    const float factor = src.factor(squares, WARPS, n_in);
    const Masks masks(pair_bits<T>());
    int turn = 0;
#pragma unroll 1
    for (int tile = first; tile - warp / parts < tiles; tile += stride) {           // the same answer in all warps
        float* mine = sums + turn * WARPS * MAX_TERMS * 16 + warp * MAX_TERMS * 16;     // two sets in turns: one barrier a tile is enough
        if (tile < tiles)
#pragma unroll 1
            for (int term = 0; term < terms; term++) {
                const Vector v(vector + (MODE == MIX ? term * vector_bytes : 0), n_blocks);
                const u8* own = v.part + 512 * LaneFragment<T>::GROUPS * begin + 16 * lane;
                const float4* scale = v.block + 4 * LaneFragment<T>::GROUPS * begin;
                float acc[2] = {0, 0};
#pragma unroll 1
                for (int unit = begin; unit < end;) {
                    const u8* piece = ring.get(now.at);
#if __CUDA_ARCH__ < 900
                    next(now);
#endif
                    const int stop = min(end, unit + span);
#pragma unroll 1
                    for (; unit < stop; unit++) {
                        LaneFragment<T> b;
                        b.load(piece, p.left(unit), lane);
                        if (ASK_FIRST && unit + 1 == stop) { ring.done(); ask(); }
                        multiply(acc, b, masks, own, zero, scale, lane);
                        if (!ASK_FIRST && unit + 1 == stop) { ring.done(); ask(); }
                        piece += UNIT; own += 512 * LaneFragment<T>::GROUPS; scale += 4 * LaneFragment<T>::GROUPS;
                    }
                }
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float y = acc[e];
                    y += __shfl_xor_sync(~0u, y, 1); y += __shfl_xor_sync(~0u, y, 2);
                    if ((lane & 3) == 0) mine[16 * term + lane / 4 + 8 * e] = y;
                }
            }
        __syncthreads();
        float y[MAX_TERMS];
        const bool write = writes(tile);
#pragma unroll
        for (int i = 0; i < MAX_TERMS; i++) {
            y[i] = 0;
            if (i >= terms || !write) continue;
#pragma unroll 1
            for (int k = 0; k < parts; k++) y[i] += mine[k * MAX_TERMS * 16 + 16 * i + lane];
            y[i] = fmaf(y[i], factor, bias[i]);
        }
        float out = y[0];
        if (MODE == GATED) out = activation(y[0], y[MAX_TERMS - 1], a.clamped);
        if (MODE == MIX) {
            out = 0;
#pragma unroll
            for (int i = 0; i < MAX_TERMS; i++) if (i < terms) out = fmaf(__shfl_sync(~0u, weight, i), y[i], out);
        }
        if (write) m.out[row * m.ldo + 16 * tile + lane] = out + old;
        turn ^= 1;
        if (tile + stride - warp / parts < tiles) {
            fetch(tile + stride);
            fetch_old(tile + stride);
        }
    }
}

// Each matrix with its blocks, of type A or B
template<int A, int B> __device__ __forceinline__ void products(const GemvArgs& a) {
    int block = blockIdx.x, i = 0;
    Matrix m = matrix(a, 0);
    const Matrix m1 = matrix(a, 1);
    if (block >= m.blocks) { block -= m.blocks; m = m1; i = 1; }
    if (i && block >= m1.blocks) { block -= m1.blocks; m = matrix(a, 2); i = 2; }
    if (A == B || !(a.second >> i & 1)) gemv<A, PRODUCT>(a, m, block);
    else gemv<B, PRODUCT>(a, m, block);
}
// gemv: up to three matrices. gated: gate and up. mix: a token's experts, weighted.
#define PRODUCTS(name, A, B) \
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) gemv_##name(GEMV_PARAMETERS) { \
    const GemvArgs a = GEMV_ARGS; \
    products<A, B>(a); \
}
#define JOINT(name, MODE, T) \
extern "C" __global__ void __launch_bounds__(32 * WARPS, MODE == MIX && is_k<T>() ? 1 : RESIDENT) name(GEMV_PARAMETERS) { \
    const GemvArgs a = GEMV_ARGS; \
    gemv<T, MODE>(a, matrix(a, 0), blockIdx.x); \
}
#define EACH(name, T) PRODUCTS(name, T, T) JOINT(gated_##name, GATED, T) JOINT(mix_##name, MIX, T)
#ifdef SECOND_TYPE
PRODUCTS(mixed, ONLY_TYPE, SECOND_TYPE)
#else
EACH_QUANT(EACH)
#endif
