// The tensor-core tile: 128 rows of x times 64 rows of W, in steps (spans) of 64 along the row
#ifndef ORCD_TILE
#define ORCD_TILE
#include "math/mma.cu"
enum { BM = 128, BN = 64, BK = 64 };

// Where 16-byte chunk c of a row of 64 halves lies: the exclusive or spreads a column over all banks
__device__ __forceinline__ int chunk(int row, int c) { return row * BK + ((c ^ (row & 7)) << 3); }

// An octet as halves without their scale: q[0] are the even ones of its first four weights, q[1] the odd ones, q[2..3] those of the four 16 further
struct Halves { u32 q[4]; float da, db, ma, mb; };

// An octet on its way from global to shared memory: it waits in registers as it came, `there` says whether there is one
template<int T> struct Fetch {
    Raw<T> raw;
    bool there;
    __device__ __forceinline__ void get(const Planes<T>& p, i64 row, int span, int u, int n, bool valid) {
        there = valid && 64 * span + octet_start(u) < n;
        if (there) load_octet<T>(raw, p, row, span, u);
    }
    __device__ __forceinline__ Halves halves(int span, int u) {
        if (!there) return {{0, 0, 0, 0}, 0, 0, 0, 0};
        Octet o = octet<T>(raw, span, u);
        return {{o.p[0], o.p[1], o.p[2], o.p[3]}, o.da, o.db, o.ma, o.mb};
    }
};
template<> struct Fetch<F16> {      // are halves already
    u32 q[4];
    __device__ __forceinline__ void get(const Planes<F16>& w, i64 row, int span, int u, int n, bool valid) {
        const u16* p = (const u16*)w.w + row * n;
        int i = 64 * span + octet_start(u);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int k = i + (j & 1) + 16 * (j / 2);
            q[j] = (valid && k < n ? p[k] : 0) | (valid && k + 2 < n ? p[k + 2] : 0) << 16;
        }
    }
    __device__ __forceinline__ Halves halves(int span, int u) { return {{q[0], q[1], q[2], q[3]}, 1, 1, 0, 0}; }
};

struct Shared {
    u16 x[2][BM * BK], w[BN * BK];
    float d[4][BN], m[4][BN];       // scale and minimum of each group of 32 (16) weights
    int xrow[BM], yrow[BM];         // rows of x and out that this tile's rows stand for, -1: none
};

// Of the kernel's arguments: x: halves in spans of x_rows rows, inv: 1/scale of each row, sums: those of 32 halves (ld/32 a row), n_in, out_stride.
// p: W, first: its first row of this tile, rows: how many are left; column: the first of out; bias: of the matrix.
// The scale of a block multiplies the accumulators of that block in FP32; integers times halves are summed exactly as the tensor core
// sums them.
template<int T, class A>
__device__ __forceinline__ void tile(Shared& s, const Planes<T>& p, i64 first, int rows, const A& args, int column, const float* bias,
    const float* residual, i64 residual_stride) {
    constexpr int GROUP = Type<T>::group;
    const u16* x = args.x;
    const int x_rows = args.x_rows;
    const int tid = threadIdx.x, lane = tid & 31, wm = tid / 32 / 2 * 32, wn = tid / 32 % 2 * 32, n_in = args.n_in, spans = (n_in + BK - 1) / BK;
    auto load_x = [&](int span) {
        for (int j = 0; j < 4; j++) {
            int r = (tid + 256 * j) / 8, c = tid & 7, t = s.xrow[r];
            copy16(&s.x[span & 1][chunk(r, c)], x + ((i64)span * x_rows + max(t, 0)) * BK + ((c ^ (t & 7)) << 3), t >= 0);
        }
    };
    Fetch<T> f[2];
    auto load_w = [&](int span) {
        for (int j = 0; j < 2; j++) { int r = tid / 8 + 32 * j; f[j].get(p, first + r, span, tid & 7, n_in, r < rows); }
    };
    auto store_w = [&](int span) {
        for (int j = 0; j < 2; j++) {
            Halves h = f[j].halves(span, tid & 7);
            int r = tid / 8 + 32 * j, i = octet_start(tid & 7), k = i + 16;
#pragma unroll
            for (int e = 0; e < 2; e++) {       // even and odd columns apart, as x has them
                *(u32*)&s.w[chunk(r, i / 16 * 2 + e) + (i & 15) / 2] = h.q[e];
                *(u32*)&s.w[chunk(r, k / 16 * 2 + e) + (k & 15) / 2] = h.q[2 + e];
            }
            if (i % GROUP == 0) { s.d[i / GROUP][r] = h.da; s.m[i / GROUP][r] = h.ma; }
            if (k % GROUP == 0) { s.d[k / GROUP][r] = h.db; s.m[k / GROUP][r] = h.mb; }
        }
    };
    float acc[2][4][4] = {};
    auto x_row = [&](int i, int e) { return s.xrow[wm + 16 * i + 8 * e + lane / 4]; };     // the four rows whose sums this lane holds
    auto inverse = [&](int i, int e) { int t = x_row(i, e); return t < 0 ? 0 : args.inv[t]; };
    const bool busy = s.xrow[wm] >= 0;      // rows are filled from the first, so an empty first row means none
    load_x(0); load_w(0);
    for (int span = 0; span < spans; span++) {
        store_w(span); copy_commit(); copy_wait<0>(); __syncthreads();
        if (span + 1 < spans) { load_x(span + 1); load_w(span + 1); }
        if (busy) {
#pragma unroll
            for (int g = 0; g < BK / GROUP; g++) {
                u32 b[GROUP / 16][2][4];
#pragma unroll
                for (int k = 0; k < GROUP / 16; k++) for (int j = 0; j < 2; j++)
                    load_tiles(b[k][j], &s.w[chunk(wn + 16 * j + lane / 16 * 8 + (lane & 7), 2 * (g * GROUP / 16 + k) + (lane / 8 & 1))]);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float c[4][4] = {}, sum[2] = {0, 0}, inv[2] = {1, 1};
#pragma unroll
                    for (int k = 0; k < GROUP / 16; k++) {
                        u32 a[4];
                        load_tiles(a, &s.x[span & 1][chunk(wm + 16 * i + (lane & 15), 2 * (g * GROUP / 16 + k) + lane / 16)]);
#pragma unroll
                        for (int j = 0; j < 4; j++) mma(c[j], a, b[k][j / 2][j % 2 * 2], b[k][j / 2][j % 2 * 2 + 1]);
                    }
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        if (Type<T>::mins) sum[e] = args.sums[(i64)max(x_row(i, e), 0) * (args.ld / 32) + 2 * span + g];
                        if (T == MXFP4) inv[e] = 16384 * inverse(i, e);     // before a block scale that may be 2^127; 16384: the halves are value / 2^14
                    }
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        int o = wn + 8 * j + 2 * (lane & 3);
                        float2 d = *(const float2*)&s.d[g][o], m = *(const float2*)&s.m[g][o];
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            float v = T == MXFP4 ? c[j][e] * inv[e / 2] : c[j][e];
                            acc[i][j][e] = fmaf(v, e & 1 ? d.y : d.x, acc[i][j][e]);
                            if (Type<T>::mins) acc[i][j][e] = fmaf(sum[e / 2], e & 1 ? m.y : m.x, acc[i][j][e]);
                        }
                    }
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int t = s.yrow[wm + 16 * i + 8 * (e / 2) + lane / 4], o = wn + 8 * j + 2 * (lane & 3) + (e & 1);
                if (t < 0 || o >= rows) continue;
                float y = T == MXFP4 ? acc[i][j][e] : acc[i][j][e] * inverse(i, e / 2);
                if (bias) y += bias[column + o];
                if (residual) y += residual[t * residual_stride + column + o];
                args.out[t * args.out_stride + column + o] = y;
            }
}
#endif
