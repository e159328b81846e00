#include "math/reduce.cu"
#include "math/rope_angle.cu"
#include "math/input_prologue.cu"
#include "types/mma_operands.cu"
#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
constexpr int D = HEAD_DIM, PAD = D + 8;   // halves of a row in shared memory; 8 more keep ldmatrix free of bank conflicts
constexpr float LOG2E = 1.4426950408889634f;
static_assert(D % 16 == 0, "head_dim is a multiple of 16");

// state[4] rows at a chunk's end are there to fill it only
// where a position lives in a layer's cache of `rows` rows; -1: nowhere
__device__ __forceinline__ int cache_row(int pos, int rows, bool ring) { return pos < 0 ? -1 : ring ? pos % rows : pos < rows ? pos : -1; }

// float32 k, v (n_rows, n_head_kv * D) -> FP16 caches (n_head_kv, rows, D); a ring keeps the last `rows` of them
struct StoreKvArgs {
    const float* k; i64 k_stride; const float* v; i64 v_stride; f16 *k_cache, *v_cache; const int* state;
    int n_rows, n_head_kv, rows, ring;
};
extern "C" __global__ void store_kv(const __grid_constant__ StoreKvArgs a) {
    pdl_launch_dependents();
    pdl_wait();
    const int t = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x, n_rows = a.n_rows - a.state[4];
    if (t >= n_rows || c >= a.n_head_kv * D || (a.ring && t < n_rows - a.rows)) return;
    const int row = cache_row(a.state[0] + t, a.rows, a.ring);
    if (row < 0) return;
    const i64 at = ((i64)(c / D) * a.rows + row) * D + c % D;
    a.k_cache[at] = to_half_bits(a.k[t * a.k_stride + c]);
    a.v_cache[at] = to_half_bits(a.v[t * a.v_stride + c]);
}

// A window layer's prefill: row j of the staging buffers is position pos - rows + j, the past from the ring, the rest from k and v
struct StageWindowArgs {
    const float* k; i64 k_stride; const float* v; i64 v_stride; const f16 *k_ring, *v_ring; f16 *k_staged, *v_staged; const int* state;
    int n_rows, n_head_kv, rows;
};
extern "C" __global__ void stage_window(const __grid_constant__ StageWindowArgs a) {
    pdl_launch_dependents();
    pdl_wait();
    const int rows = a.rows, j = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x, pos = a.state[0] - rows + j;
    if (j >= rows + a.n_rows || c >= a.n_head_kv * D || pos < 0) return;
    const i64 to = ((i64)(c / D) * (rows + a.n_rows) + j) * D + c % D;
    if (j < rows) {
        const i64 from = ((i64)(c / D) * rows + pos % rows) * D + c % D;
        a.k_staged[to] = a.k_ring[from];
        a.v_staged[to] = a.v_ring[from];
    } else {
        a.k_staged[to] = to_half_bits(a.k[(j - rows) * a.k_stride + c]);
        a.v_staged[to] = to_half_bits(a.v[(j - rows) * a.v_stride + c]);
    }
}

// Many rows before attention: q is turned in place, k too, or turned and stored in the cache with the values. A block a row; a thread turns the
// same pair of several heads.
struct TurnRowsArgs {
    float* q; i64 q_stride; float* k; i64 k_stride; const float* v; i64 v_stride; f16 *k_cache, *v_cache; const int* state;
    const float* inv_freq; float mscale; int n_rot, neox, n_rows, n_head, n_head_kv, rows;
};
extern "C" __global__ void __launch_bounds__(256, 6) turn_rows(const __grid_constant__ TurnRowsArgs args) {
    constexpr int PAIRS = D / 2, AT_ONCE = 256 / PAIRS;
    pdl_launch_dependents();
    pdl_wait();
    const int t = blockIdx.x, pos = args.state[0] + t, j = threadIdx.x % PAIRS, n_rot = args.n_rot, half = n_rot / 2, n_head = args.n_head;
    if (threadIdx.x >= AT_ONCE * PAIRS) return;
    const bool store = args.k_cache && t < args.n_rows - args.state[4] && pos >= 0 && pos < args.rows, turns = j < half;
    const float2 turn = turns ? rope_angle(pos, args.inv_freq[j], args.mscale) : make_float2(1.f, 0.f);
    const int a = !turns ? n_rot + 2 * (j - half) : args.neox ? j : 2 * j, b = turns && args.neox ? j + half : a + 1;
    #pragma unroll 4
    for (int h = threadIdx.x / PAIRS; h < n_head + args.n_head_kv; h += AT_ONCE) {
        float* x = h < n_head ? args.q + t * args.q_stride + h * D : args.k + t * args.k_stride + (h - n_head) * D;
        const float xa = x[a], xb = x[b], ya = xa * turn.x - xb * turn.y, yb = xb * turn.x + xa * turn.y;
        if (h >= n_head && args.k_cache) {
            if (!store) continue;
            f16* to = args.k_cache + ((i64)(h - n_head) * args.rows + pos) * D;
            to[a] = to_half_bits(ya);
            to[b] = to_half_bits(yb);
        } else if (turns) {
            x[a] = ya;
            x[b] = yb;
        }
    }
    if (store) for (int h = threadIdx.x / PAIRS; h < args.n_head_kv; h += AT_ONCE) {
        const float* x = args.v + t * args.v_stride + h * D + 2 * j;
        *(u32*)(args.v_cache + ((i64)h * args.rows + pos) * D + 2 * j) = pack_half2(x[0], x[1]);
    }
}

// ---- one query row ----------------------------------------------------------------------------------------------------------------
// Columns i…i+3 of a head, turned by `turns` up to column n_rot (a multiple of 8)
__device__ __forceinline__ float4 turned(const float* p, int i, const float2* turns, int n_rot, int neox) {
    float4 a = *(const float4*)(p + i);
    if (i >= n_rot) return a;
    if (!neox) {
        const float2 t = turns[i / 2], u = turns[i / 2 + 1];
        return make_float4(a.x * t.x - a.y * t.y, a.y * t.x + a.x * t.y, a.z * u.x - a.w * u.y, a.w * u.x + a.z * u.y);
    }
    const int half = n_rot / 2, first = i < half, j = first ? i : i - half;
    const float4 b = *(const float4*)(p + (first ? i + half : j));
    const float sign = first ? -1.f : 1.f;
    const float2 *t = turns + j;
    return make_float4(a.x * t[0].x + sign * b.x * t[0].y, a.y * t[1].x + sign * b.y * t[1].y, a.z * t[2].x + sign * b.z * t[2].y, a.w * t[3].x + sign * b.w * t[3].y);
}

constexpr int SPLIT = 128, HEADS = 8;                         // positions a block attends to, query heads it serves
constexpr int LOAD = D % 32 ? 4 : 8, CHUNKS = D / (4 * LOAD);  // halves of a K row that a thread loads at once, and how often

// Scores are K (16 positions x D) times Q^T (D x 8 heads) on the tensor cores, the output V^T (16 dims x positions) times P^T.
// Blocks beyond the context leave at once; the last block of a head to finish adds the splits up in order.
struct AttendDecodeArgs {
    const float *q, *k, *v; f16 *k_cache, *v_cache; const int* state; const float* sinks; float *out, *partial; int* tickets;
    float scale; int n_head, n_head_kv, rows, ring;
    const float* inv_freq; float mscale; int n_rot, neox;
};
#define ATTEND_DECODE_PARAMETERS const float* q, const float* k, const float* v, f16* k_cache, f16* v_cache, const int* state, \
    const float* sinks, float* out, float* partial, int* tickets, float scale, int n_head, int n_head_kv, int rows, int ring, \
    const float* inv_freq, float mscale, int n_rot, int neox
#define ATTEND_DECODE_ARGS {q, k, v, k_cache, v_cache, state, sinks, out, partial, tickets, scale, n_head, n_head_kv, rows, ring, \
    inv_freq, mscale, n_rot, neox}
__device__ __forceinline__ void attend_position(const AttendDecodeArgs& args) {
    __shared__ float2 turns[D / 2];  // cosine and sine of each pair, when q and k still have to be turned
    __shared__ __align__(16) f16 vs[SPLIT * PAD];
    __shared__ __align__(16) f16 ps[HEADS][SPLIT + 8];
    __shared__ float ss[HEADS][SPLIT + 4], ms[HEADS], ls[HEADS];
    __shared__ int last;
    // All launches before the last one are done: the position and the older rows of the cache are there. Only q and the newest k and v are not.
    const float *q = args.q, *sinks = args.sinks;
    float *out = args.out, *partial = args.partial;
    const int n_head = args.n_head, rows = args.rows, neox = args.neox, n_rot = args.inv_freq ? args.n_rot : 0;
    const int kv = blockIdx.y, group = n_head / args.n_head_kv, head0 = kv * group + blockIdx.z * HEADS, heads = min(HEADS, group - (int)blockIdx.z * HEADS);
    const int pos = args.state[0], row = cache_row(pos, rows, args.ring), n = args.ring ? min(pos + 1, rows) : pos + 1;
    const int splits = (n + SPLIT - 1) / SPLIT, max_splits = (rows + SPLIT - 1) / SPLIT;
    if (row < 0) {
        pdl_wait();
        return;
    }
    if (blockIdx.x >= splits) return;
    f16 *k_cache = args.k_cache + (i64)kv * rows * D, *v_cache = args.v_cache + (i64)kv * rows * D;
    for (int i = threadIdx.x; i < n_rot / 2; i += 128) turns[i] = rope_angle(pos, args.inv_freq[i], args.mscale);
    __syncthreads();
    float* ml = partial + (i64)n_head * max_splits * D;
    bool waiting = true;

    for (int split = blockIdx.x; split < splits; split += gridDim.x) {
        int tid = threadIdx.x;
        asm volatile("" : "+r"(tid));  // or the compiler computes every address before the loop and holds it in a register
        const int lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, begin = split * SPLIT;

        // The newest row, when it is given, is taken from k and v, and stored in the cache on the way: everything else is asked for before.
        const int fresh = args.k && row / SPLIT == split ? row : -1;
        for (int i = tid; i < SPLIT * D / 8; i += 128) {
            const int r = begin + i / (D / 8), c = i % (D / 8) * 8;
            f16* to = &vs[(r - begin) * PAD + c];
            copy16(to, v_cache + (r < n && r != fresh ? (i64)r * D + c : 0), r < n && r != fresh);
        }
        copy_commit();

        // A warp scores 32 positions. The order of the dims in a dot product is free: each thread takes LOAD neighbours, in Q as in K.
        struct alignas(2 * LOAD) Keys { u32 pair[LOAD / 2]; };
        Keys keys[2][2][CHUNKS];
        #pragma unroll
        for (int m = 0; m < 2; m++)
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                const int r = begin + warp * 32 + m * 16 + h * 8 + g;
                f16* from = k_cache + (i64)r * D + t * LOAD;
                #pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    keys[m][h][c] = r < n && r != fresh ? *(const Keys*)(from + c * 4 * LOAD) : Keys{};
                }
            }
        if (waiting) {
            pdl_wait();
            pdl_launch_dependents();
            waiting = false;
        }
        if (fresh >= 0) {
            copy_wait<0>();         // a thread's own copies: none may come after what is written here
            __syncthreads();
            for (int c = tid * 8; c < D; c += 128 * 8) {
                const float* x = args.v + kv * D + c;
                *(uint4*)(v_cache + (i64)fresh * D + c) = *(uint4*)&vs[(fresh - begin) * PAD + c] =
                    make_uint4(pack_half2(x[0], x[1]), pack_half2(x[2], x[3]), pack_half2(x[4], x[5]), pack_half2(x[6], x[7]));
            }
            #pragma unroll
            for (int m = 0; m < 2; m++)
                #pragma unroll
                for (int h = 0; h < 2; h++) {
                    if (begin + warp * 32 + m * 16 + h * 8 + g != fresh) continue;
                    #pragma unroll
                    for (int c = 0; c < CHUNKS; c++) {
                        Keys& x = keys[m][h][c];
                        #pragma unroll
                        for (int i = 0; i < LOAD / 4; i++) {
                            const float4 y = turned(args.k + kv * D, c * 4 * LOAD + t * LOAD + 4 * i, turns, n_rot, neox);
                            x.pair[2 * i] = pack_half2(y.x, y.y);
                            x.pair[2 * i + 1] = pack_half2(y.z, y.w);
                        }
                        *(Keys*)(k_cache + (i64)fresh * D + t * LOAD + c * 4 * LOAD) = x;
                    }
                }
        }
        float acc[2][4] = {};
        #pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            #pragma unroll
            for (int s = 0; s < LOAD / 4; s++) {
                float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
                if (g < heads) x = turned(q + (head0 + g) * D, c * 4 * LOAD + t * LOAD + s * 4, turns, n_rot, neox);
                x = make_float4(x.x * args.scale, x.y * args.scale, x.z * args.scale, x.w * args.scale);
                const u32 b0 = pack_half2(x.x, x.y), b1 = pack_half2(x.z, x.w), r0 = pack_rest(x.x, x.y, b0), r1 = pack_rest(x.z, x.w, b1);
                #pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma(acc[m], keys[m][0][c].pair[2 * s], keys[m][1][c].pair[2 * s], keys[m][0][c].pair[2 * s + 1], keys[m][1][c].pair[2 * s + 1], b0, b1);
                    mma(acc[m], keys[m][0][c].pair[2 * s], keys[m][1][c].pair[2 * s], keys[m][0][c].pair[2 * s + 1], keys[m][1][c].pair[2 * s + 1], r0, r1);
                }
            }
        #pragma unroll
        for (int m = 0; m < 2; m++)
            #pragma unroll
            for (int e = 0; e < 4; e++) {
                const int p = warp * 32 + m * 16 + (e >> 1) * 8 + g;
                ss[2 * t + (e & 1)][p] = begin + p < n ? acc[m][e] : NEG_INF;
            }
        __syncthreads();

        // softmax of this split, a warp a head
        for (int h = warp; h < HEADS; h += 4) {
            float x[SPLIT / 32], m = NEG_INF, l = 0.f;
            #pragma unroll
            for (int i = 0; i < SPLIT / 32; i++) {
                x[i] = ss[h][i * 32 + lane];
                m = fmaxf(m, x[i]);
            }
            m = warp_max(m);
            #pragma unroll
            for (int i = 0; i < SPLIT / 32; i++) {
                const float p = exp2f(x[i] - m);
                l += p;
                ps[h][i * 32 + lane] = to_half_bits(p);
            }
            l = warp_sum(l);
            if (lane == 0) {
                ms[h] = m;
                ls[h] = l;
            }
        }
        copy_wait<0>();
        __syncthreads();

        for (int tile = warp; tile < D / 16; tile += 4) {
            float o[4] = {};
            #pragma unroll
            for (int s = 0; s < SPLIT / 16; s++) {
                u32 a[4];
                load_tiles_transposed(a, &vs[(s * 16 + (lane >> 4) * 8 + (lane & 7)) * PAD + tile * 16 + (lane >> 3 & 1) * 8]);
                mma(o, a[0], a[1], a[2], a[3], *(const u32*)&ps[g][s * 16 + 2 * t], *(const u32*)&ps[g][s * 16 + 8 + 2 * t]);
            }
            #pragma unroll
            for (int e = 0; e < 4; e++) {
                const int h = 2 * t + (e & 1), d = tile * 16 + (e >> 1) * 8 + g;
                if (h >= heads) continue;
                if (splits > 1) partial[((i64)(head0 + h) * max_splits + split) * D + d] = o[e];
                else {
                    const float sink = sinks ? sinks[head0 + h] * LOG2E : NEG_INF, m = fmaxf(ms[h], sink);
                    out[(head0 + h) * D + d] = o[e] * exp2f(ms[h] - m) / (ls[h] * exp2f(ms[h] - m) + exp2f(sink - m));
                }
            }
        }
        if (splits == 1) return;
        if (tid < heads) *(float2*)(ml + ((i64)(head0 + tid) * max_splits + split) * 2) = make_float2(ms[tid], ls[tid]);
        __syncthreads();  // shared memory may be used again
    }

    // the last block of this head combines
    const int tid = threadIdx.x;
    __threadfence();
    __syncthreads();
    int* ticket = args.tickets + kv * gridDim.z + blockIdx.z;
    delay();
    if (tid == 0) last = atomicAdd(ticket, 1) == min(splits, (int)gridDim.x) - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (tid == 0) *ticket = 0;  // for the next launch
    for (int i = tid; i < heads * (D / 4); i += 128) {
        const int h = head0 + i / (D / 4), d = i % (D / 4) * 4;
        const float* from = partial + (i64)h * max_splits * D + d;
        const float2* mli = (const float2*)ml + (i64)h * max_splits;
        float m = sinks ? sinks[h] * LOG2E : NEG_INF, l = sinks ? 1.f : 0.f;
        float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int s0 = 0; s0 < splits; s0 += 8) {  // eight at a time, so that their loads overlap
            float2 y[8];
            float4 x[8];
            float top = m;
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                const int s = min(s0 + j, splits - 1);
                y[j] = __ldcg(mli + s);
                x[j] = __ldcg((const float4*)(from + (i64)s * D));
            }
            #pragma unroll
            for (int j = 0; j < 8; j++) top = fmaxf(top, y[j].x);
            const float keep = exp2f(m - top);
            m = top;
            l *= keep;
            o = make_float4(o.x * keep, o.y * keep, o.z * keep, o.w * keep);
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                const float w = s0 + j < splits ? exp2f(y[j].x - m) : 0.f;
                l += w * y[j].y;
                o = make_float4(o.x + w * x[j].x, o.y + w * x[j].y, o.z + w * x[j].z, o.w + w * x[j].w);
            }
        }
        const float r = 1.f / l;
        *(float4*)(out + h * D + d) = make_float4(o.x * r, o.y * r, o.z * r, o.w * r);
    }
}
extern "C" __global__ void __launch_bounds__(128, D < 96 ? 5 : 4) attend_decode(ATTEND_DECODE_PARAMETERS) {
    const AttendDecodeArgs args = ATTEND_DECODE_ARGS;
    attend_position(args);
}

// ---- many query rows --------------------------------------------------------------------------------------------------------------
constexpr int TILE = 64;  // query rows of a block, and key rows of a step; both at multiples of 64 from position 0

__device__ __forceinline__ void load_kv_tile(f16* to, const f16* from, int first, int base, int lo, int hi) {
    for (int i = threadIdx.x; i < TILE * D / 8; i += 128) {
        const int r = i / (D / 8), c = i % (D / 8) * 8, p = first + r;
        const bool valid = p >= lo && p < hi;
        copy16(&to[r * PAD + c], from + (valid ? (i64)(p - base) * D + c : 0), valid);
    }
    copy_commit();
}

// Softmax over the keys so far, tile by tile, with a running maximum m and sum l. Tiles lie at absolute positions: what a row sees does
// not depend on the chunk it came with. k, v: (n_head_kv, kv_rows, D), row r is position base + r; base is pos - window in a staged layer.
struct AttendPrefillArgs {
    const float* q; i64 q_stride; const f16 *k, *v; const int* state; const float* sinks; float* out; i64 out_stride;
    float scale; int n_rows, n_head, n_head_kv, kv_rows, window;
};
extern "C" __global__ void __launch_bounds__(128, D < 96 ? 3 : 2) attend_prefill(const __grid_constant__ AttendPrefillArgs args) {
    __shared__ __align__(16) f16 ks[TILE * PAD];
    __shared__ __align__(16) f16 vs[TILE * PAD];
    pdl_launch_dependents();
    pdl_wait();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, head = blockIdx.y;
    const int window = args.window, pos0 = args.state[0], base = window ? pos0 - window : 0, end = min(pos0 + args.n_rows - args.state[4], base + args.kv_rows), tile = (end - 1) / TILE - blockIdx.x;
    if (pos0 < 0 || end <= pos0 || tile < pos0 / TILE) return;
    const i64 of_head = (i64)(head / (args.n_head / args.n_head_kv)) * args.kv_rows * D;
    const f16 *k = args.k + of_head, *v = args.v + of_head;
    const int lo = max(base, 0), first = window ? max(tile * TILE - window + 1, 0) / TILE : 0;
    load_kv_tile(ks, k, first * TILE, base, lo, end);

    const int row[2] = {tile * TILE + warp * 16 + g, tile * TILE + warp * 16 + g + 8};  // positions of this thread's two query rows
    u32 qh[D / 16][4], ql[D / 16][4];
    #pragma unroll
    for (int s = 0; s < D / 16; s++)
        #pragma unroll
        for (int e = 0; e < 4; e++) {
            float2 x = make_float2(0.f, 0.f);
            const int r = row[e & 1];
            if (r >= pos0 && r < end) x = *(const float2*)(args.q + (r - pos0) * args.q_stride + head * D + s * 16 + (e >> 1) * 8 + 2 * t);
            x = make_float2(x.x * args.scale, x.y * args.scale);
            qh[s][e] = pack_half2(x.x, x.y);
            ql[s][e] = pack_rest(x.x, x.y, qh[s][e]);
        }
    float o[D / 8][4] = {}, m[2] = {NEG_INF, NEG_INF}, l[2] = {0.f, 0.f};

    for (int kt = first; kt <= tile; kt++) {
        copy_wait<0>();
        __syncthreads();  // keys are here, and nobody reads the old values any more
        load_kv_tile(vs, v, kt * TILE, base, lo, end);
        float s[TILE / 8][4] = {};
        #pragma unroll
        for (int c = 0; c < D / 16; c++)
            #pragma unroll
            for (int j = 0; j < TILE / 8; j += 2) {
                u32 b[4];
                load_tiles(b, &ks[((j + (lane >> 4)) * 8 + (lane & 7)) * PAD + c * 16 + (lane >> 3 & 1) * 8]);
                mma(s[j], qh[c][0], qh[c][1], qh[c][2], qh[c][3], b[0], b[1]);
                mma(s[j], ql[c][0], ql[c][1], ql[c][2], ql[c][3], b[0], b[1]);
                mma(s[j + 1], qh[c][0], qh[c][1], qh[c][2], qh[c][3], b[2], b[3]);
                mma(s[j + 1], ql[c][0], ql[c][1], ql[c][2], ql[c][3], b[2], b[3]);
            }
        __syncthreads();  // everybody has read the keys
        if (kt < tile) load_kv_tile(ks, k, (kt + 1) * TILE, base, lo, end);
        if (kt == tile || (window && kt * TILE <= tile * TILE + TILE - 1 - window))
            #pragma unroll
            for (int j = 0; j < TILE / 8; j++)
                #pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int p = kt * TILE + j * 8 + 2 * t + (e & 1), r = row[e >> 1];
                    if (p > r || (window && p <= r - window)) s[j][e] = NEG_INF;
                }
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = m[h], sum = 0.f;
            #pragma unroll
            for (int j = 0; j < TILE / 8; j++) top = fmaxf(top, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            const float ref = top == NEG_INF ? 0.f : top, keep = exp2f(m[h] - ref);
            m[h] = top;
            #pragma unroll
            for (int j = 0; j < TILE / 8; j++) {
                s[j][2 * h] = exp2f(s[j][2 * h] - ref);
                s[j][2 * h + 1] = exp2f(s[j][2 * h + 1] - ref);
                sum += s[j][2 * h] + s[j][2 * h + 1];
            }
            l[h] = l[h] * keep + sum;
            #pragma unroll
            for (int j = 0; j < D / 8; j++) {
                o[j][2 * h] *= keep;
                o[j][2 * h + 1] *= keep;
            }
        }
        if (kt < tile) copy_wait<1>(); else copy_wait<0>();
        __syncthreads();  // the values are here
        #pragma unroll
        for (int c = 0; c < TILE / 16; c++) {
            const u32 a0 = pack_half2(s[2 * c][0], s[2 * c][1]), a1 = pack_half2(s[2 * c][2], s[2 * c][3]);
            const u32 a2 = pack_half2(s[2 * c + 1][0], s[2 * c + 1][1]), a3 = pack_half2(s[2 * c + 1][2], s[2 * c + 1][3]);
            #pragma unroll
            for (int j = 0; j < D / 8; j += 2) {
                u32 b[4];
                load_tiles_transposed(b, &vs[(c * 16 + (lane >> 3 & 1) * 8 + (lane & 7)) * PAD + (j + (lane >> 4)) * 8]);
                mma(o[j], a0, a1, a2, a3, b[0], b[1]);
                mma(o[j + 1], a0, a1, a2, a3, b[2], b[3]);
            }
        }
    }
    #pragma unroll
    for (int h = 0; h < 2; h++) {
        l[h] += __shfl_xor_sync(~0u, l[h], 1);
        l[h] += __shfl_xor_sync(~0u, l[h], 2);
        const float sink = args.sinks ? args.sinks[head] * LOG2E : NEG_INF, top = fmaxf(m[h], sink), r = exp2f(m[h] - top);
        const float norm = r / (l[h] * r + exp2f(sink - top));
        if (row[h] < pos0 || row[h] >= end) continue;
        float* to = args.out + (row[h] - pos0) * args.out_stride + head * D + 2 * t;
        #pragma unroll
        for (int j = 0; j < D / 8; j++) *(float2*)(to + j * 8) = make_float2(o[j][2 * h] * norm, o[j][2 * h + 1] * norm);
    }
}
