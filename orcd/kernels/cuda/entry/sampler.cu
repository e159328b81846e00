#include "math/logit_keys.cu"
constexpr int BINS = 2048;

struct Params {              // as SAMPLER_PARAMS in Python
    float temperature, penalty;
    int top_k, n_valid;      // top_k 0: all
    u64 top_p, min_p, seed;  // shares in units of 2^-32; top_p >= 2^32: all
};
struct Found { u64 mass, limit; u32 count, key, all, pad; };  // mass and count before the bin found, the bits of the key so far; all: nothing is cut
struct Header {              // one a workspace; all zero at the start of a job
    float max;               // largest adjusted logit
    float raw_max, log_sum;  // of the raw logits: log sum exp(x - raw_max)
    u32 ticket;              // blocks that have finished
    u32 drawn;               // 1: this step's token is out already
    int n_valid;             // ids that may be drawn, at most n_vocab
    Found found[2];
    u64 mass[3][BINS];
    u32 count[3][BINS];
};
struct Chunk { u64 best, mass; float max, sum; u32 ties, pad; };  // what a block reports about its ids; the array lies behind the header
// behind them: the adjusted logits

__device__ __forceinline__ Chunk* chunks(Header* h) { return (Chunk*)(h + 1); }
__device__ __forceinline__ float* adjusted(Header* h, int n_chunk) { return (float*)(chunks(h) + n_chunk); }

// floor(exp(l - max) 2^32), the same bits as in NumPy: every operation is rounded by itself
__device__ u64 weight(float l, float max) {
    const float z = l == max ? 0.f : __fsub_rn(l, max);
    if (!(z >= -23.f)) return 0;
    const float t = __fmul_rn(z, 1.4426950408889634f), n = rintf(t), f = __fsub_rn(t, n);
    const float c[6] = {1.3333558e-3f, 9.618129e-3f, 5.550411e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f};
    float p = 1.5403530e-4f;
    #pragma unroll
    for (int i = 0; i < 6; i++) p = __fadd_rn(__fmul_rn(p, f), c[i]);
    return (u64)(p * __int_as_float(((int)n + 32 + 127) << 23));  // a power of two: exact
}

// (a share) >> 32 without overflow
__device__ __forceinline__ u64 part_of(u64 a, u64 share) { return __umul64hi(a, share) << 32 | (a * share) >> 32; }

// sum of v over the threads before this one; total: over all of them
__device__ u64 block_scan(u64 v, u64& total) {
    __shared__ u64 part[THREADS / 32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 s = v;
    for (int o = 1; o < 32; o <<= 1) { const u64 x = __shfl_up_sync(~0u, s, o); if (lane >= o) s += x; }
    __syncthreads();  // part may still be read from the call before
    if (lane == 31) part[warp] = s;
    __syncthreads();
    u64 before = 0;
    total = 0;
    for (int i = 0; i < THREADS / 32; i++) { if (i < warp) before += part[i]; total += part[i]; }
    return before + s - v;
}

// true in every thread of the block that finishes last
__device__ bool last_block(Header* h) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    delay();
    if (threadIdx.x == 0) {
        last = atomicAdd(&h->ticket, 1) == gridDim.x - 1;
        if (last) h->ticket = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

__device__ u64 philox(u64 seed, u64 step) {
    u32 k0 = (u32)seed, k1 = seed >> 32, c0 = (u32)step, c1 = step >> 32, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        const u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0, h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c0 | (u64)c1 << 32;
}

// Forget a job: the tokens seen and every ticket
struct SampleResetArgs { Header* workspace; u32* seen; int n_words; };
extern "C" __global__ void sample_reset(const __grid_constant__ SampleResetArgs a) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < a.n_words; i += gridDim.x * blockDim.x) a.seen[i] = 0;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        Header* h = a.workspace;
        h->ticket = 0;
        h->drawn = 0;
        h->n_valid = 0;
    }
}

// What the five kernels of a draw take. level: of the second and third histogram, in its launch alone
struct SampleArgs {
    const float* logits; const Params* params; Header* workspace; int* state; u32* seen; u64* ring;
    int ring_size, n_vocab, level;
};

// One thread: the token is `id`. (id, log probability) goes to the ring in one 8-byte store.
__device__ void emit(int id, const SampleArgs& a) {
    Header* h = a.workspace;
    const float x = a.logits[id], logprob = (x == h->raw_max || !(x > NEG_INF) ? 0.f : x - h->raw_max) - h->log_sum;
    a.seen[id >> 5] |= 1u << (id & 31);
    const int step = a.state[2];
    a.state[0] += 1;
    a.state[1] = id;
    a.state[2] = step + 1;
    h->drawn = 1;
    *(volatile u64*)(a.ring + step % a.ring_size) = (u32)id | (u64)__float_as_uint(logprob) << 32;
}

// 1: temperature and repetition penalty; the largest; log-sum-exp. Draws at once when the temperature is 0.
extern "C" __global__ void __launch_bounds__(THREADS) sample_prepare(const __grid_constant__ SampleArgs a) {
    pdl_launch_dependents();
    pdl_wait();
    Header* h = a.workspace;
    const int tid = threadIdx.x, n_vocab = a.n_vocab;
    float raw[CHUNK / THREADS], max = NEG_INF, sum = 0.f;
    #pragma unroll
    for (int i = 0; i < CHUNK / THREADS; i++) {
        const int id = blockIdx.x * CHUNK + i * THREADS + tid;
        raw[i] = id < n_vocab ? a.logits[id] : NEG_INF;
    }
    const Params p = *a.params;
    const int n_valid = min(p.n_valid, n_vocab);
    if (a.state[3]) {  // the job is over
        if (blockIdx.x == 0 && tid == 0) h->drawn = 1;
        return;
    }
    for (int i = blockIdx.x * THREADS + tid; i < 3 * BINS; i += gridDim.x * THREADS) {
        h->mass[0][i] = 0;
        h->count[0][i] = 0;
    }
    float* l_out = adjusted(h, gridDim.x);
    u64 best = 0;
    #pragma unroll
    for (int i = 0; i < CHUNK / THREADS; i++) {
        const int id = blockIdx.x * CHUNK + i * THREADS + tid;
        if (id >= n_valid || raw[i] != raw[i]) raw[i] = NEG_INF;  // NaN is never drawn
        max = fmaxf(max, raw[i]);
        if (id >= n_valid) continue;
        float l = p.temperature == 0.f ? raw[i] : __fdiv_rn(raw[i], p.temperature);
        if (p.penalty != 1.f && a.seen[id >> 5] >> (id & 31) & 1) l = l > 0.f ? __fdiv_rn(l, p.penalty) : __fmul_rn(l, p.penalty);
        l = __fadd_rn(l, 0.f);  // -0 is 0
        l_out[id] = l;
        const u64 key = (u64)to_key(l) << 32 | ~(u32)id;  // larger is better, of equals the lower id
        best = key > best ? key : best;
    }
    best = block_best(best);
    max = block_max(max);
    for (int i = 0; i < CHUNK / THREADS; i++)
        if (blockIdx.x * CHUNK + i * THREADS + tid < n_valid) sum += raw[i] == max ? 1.f : expf(raw[i] - max);
    sum = block_sum(sum);
    if (tid == 0) {
        Chunk& c = chunks(h)[blockIdx.x];
        c.best = best;
        c.max = max;
        c.sum = sum;
    }
    if (!last_block(h)) return;

    // each thread adds up its blocks' sums on its own maximum, then all move to the common one
    best = 0, max = NEG_INF, sum = 0.f;
    for (int i = tid; i < gridDim.x; i += THREADS) {
        const Chunk* c = chunks(h) + i;
        const u64 b = __ldcg(&c->best);
        const float m = __ldcg(&c->max), s = __ldcg(&c->sum), top = fmaxf(max, m);
        best = b > best ? b : best;
        sum = sum * (max == top ? 1.f : expf(max - top)) + s * (m == top ? 1.f : expf(m - top));
        max = top;
    }
    const float own = max;
    best = block_best(best);
    max = block_max(max);
    sum *= own == max ? 1.f : expf(own - max);
    sum = block_sum(sum);
    if (tid) return;
    h->max = from_key(best >> 32);
    h->raw_max = max;
    h->log_sum = logf(sum);
    h->n_valid = n_valid;
    h->drawn = 0;
    if (p.temperature == 0.f || h->max == NEG_INF) emit(~(u32)best, a);
}

// does the job cut a prefix by count or by mass?
__device__ __forceinline__ bool has_prefix(const Params* p) { return (p->top_k > 0 && p->top_k < p->n_valid) || p->top_p >> 32 == 0; }
__device__ __forceinline__ u64 prefix_count(const Params* p) { return p->top_k > 0 && p->top_k < p->n_valid ? p->top_k : ~0ull; }

// Where does the kept prefix end? In the first bin from the top with which its count reaches k or its mass the limit.
__device__ Found find_bin(const Header* h, const Params* params, int level) {
    __shared__ Found found;
    const int tid = threadIdx.x, n_bins = level < 2 ? BINS : BINS / 2, per = n_bins / THREADS;
    Found f = {0, 0, 0, 0, 0, 0};
    if (level) f = h->found[level - 1];
    u64 mass = 0, count = 0, total, n;
    for (int i = 0; i < per; i++) {
        const int bin = n_bins - 1 - (tid * per + i);
        mass += h->mass[level][bin], count += h->count[level][bin];
    }
    mass = f.mass + block_scan(mass, total), count = f.count + block_scan(count, n);
    if (level == 0) f.limit = params->top_p >> 32 ? ~0ull : part_of(total, params->top_p);
    const u64 k = prefix_count(params);
    if (tid == 0) found = f, found.all = 1;
    __syncthreads();
    for (int i = 0; i < per; i++) {
        const int bin = n_bins - 1 - (tid * per + i);
        const u64 m = h->mass[level][bin], c = h->count[level][bin];
        const bool reached = count > 0 && (count >= k || mass >= f.limit);  // by an earlier bin
        if (c && !reached && (count + c >= k || mass + m >= f.limit))
            found = {mass, f.limit, (u32)count, f.key << (level < 2 ? 11 : 10) | bin, 0, 0};  // true for one thread at most
        mass += m, count += c;
    }
    __syncthreads();
    return f.all ? f : found;
}

// this thread's logits; asked for at the start of a kernel, so that they are there when the decisions have been made
struct Mine { float l[CHUNK / THREADS]; };
__device__ __forceinline__ Mine my_logits(Header* h) {
    Mine x;
    #pragma unroll
    for (int i = 0; i < CHUNK / THREADS; i++) {
        const int id = blockIdx.x * CHUNK + i * THREADS + threadIdx.x;
        x.l[i] = id < h->n_valid ? adjusted(h, gridDim.x)[id] : NEG_INF;
    }
    return x;
}

// Add up weights and counts by the next bits of the key, for keys whose upper bits are those found so far
__device__ void histogram(Header* h, const Mine& x, int level, u32 prefix) {
    __shared__ u32 count[BINS], low[BINS], high[BINS];  // 16 + 17 bits of a weight, so that 32-bit sums of CHUNK of them cannot overflow
    const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, above = level == 2 ? 10 : 11;
    for (int i = threadIdx.x; i < BINS; i += THREADS) count[i] = 0, low[i] = 0, high[i] = 0;
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < CHUNK / THREADS; i++) {
        const u32 key = to_key(x.l[i]) >> shift, bin = key & ((1u << above) - 1);
        const u64 w = weight(x.l[i], h->max);
        if (w == 0 || (level && key >> above != prefix)) continue;
        atomicAdd(&count[bin], 1), atomicAdd(&low[bin], (u32)w & 0xffff), atomicAdd(&high[bin], (u32)(w >> 16));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS)
        if (count[i]) atomicAdd(&h->count[level][i], count[i]), atomicAdd(&h->mass[level][i], ((u64)high[i] << 16) + low[i]);
}

// 2: histogram by the top 11 bits of the key
extern "C" __global__ void __launch_bounds__(THREADS) sample_weigh(const __grid_constant__ SampleArgs a) {
    pdl_launch_dependents();
    pdl_wait();
    Header* h = a.workspace;
    const Mine x = my_logits(h);
    if (!h->drawn && has_prefix(a.params)) histogram(h, x, 0, 0);
}

// 3 and 4: the next bits, of the keys in the bin where the prefix ends
extern "C" __global__ void __launch_bounds__(THREADS) sample_refine(const __grid_constant__ SampleArgs a) {
    pdl_launch_dependents();
    pdl_wait();
    Header* h = a.workspace;
    const Mine x = my_logits(h);
    if (h->drawn || !has_prefix(a.params)) return;
    const Found f = find_bin(h, a.params, a.level - 1);
    if (blockIdx.x == 0 && threadIdx.x == 0) h->found[a.level - 1] = f;
    if (!f.all) histogram(h, x, a.level, f.key);
}

// 5: every block weighs what it keeps; the last one turns a random number into an id
extern "C" __global__ void __launch_bounds__(THREADS) sample_draw(const __grid_constant__ SampleArgs a) {
    __shared__ u64 rest;         // of the random number, within the chunk
    __shared__ int chosen, ties_before;
    pdl_launch_dependents();
    pdl_wait();
    Header* h = a.workspace;
    const Params* params = a.params;
    if (h->drawn) return;
    const int tid = threadIdx.x, n_valid = h->n_valid, n_chunk = gridDim.x;
    const float* l = adjusted(h, n_chunk);
    // Kept: keys above `cut`, and of the ids whose key is `cut` the first `ties`
    u32 cut = 0;
    u64 ties = 0;
    if (has_prefix(params)) {
        const Found f = find_bin(h, params, 2);
        if (!f.all) {
            cut = f.key, ties = h->count[2][cut & 1023];
            const u64 w = weight(from_key(cut), h->max), by_count = prefix_count(params) - f.count, by_mass = f.mass < f.limit ? (f.limit - f.mass + w - 1) / w : 0;
            ties = min(ties, min(by_count, f.limit == ~0ull ? ties : by_mass));
            if (f.count == 0 && ties == 0) ties = 1;  // the first one always stays
        }
    }
    const u64 least = params->min_p, w = weight(from_key(cut), h->max), w_cut = w >= least ? w : 0;
    const float max = h->max;
    auto kept_weight = [&](int id) { const u64 w = weight(l[id], max); return w >= least ? w : 0; };  // the first one weighs 2^32

    u64 mine = 0, tied = 0, mass, n_tied, kept[CHUNK / THREADS];
    bool tie[CHUNK / THREADS];
    for (int i = 0; i < CHUNK / THREADS; i++) {
        const int id = blockIdx.x * CHUNK + tid * (CHUNK / THREADS) + i;
        const u32 key = id < n_valid ? to_key(l[id]) : 0;
        mine += key > cut ? kept_weight(id) : 0, tied += id < n_valid && key == cut;
    }
    block_scan(mine, mass), block_scan(tied, n_tied);
    if (tid == 0) chunks(h)[blockIdx.x].mass = mass, chunks(h)[blockIdx.x].ties = n_tied;
    if (!last_block(h)) return;

    // which chunk?
    const int per = (n_chunk + THREADS - 1) / THREADS, from = min(tid * per, n_chunk), to = min(from + per, n_chunk);
    u64 before = 0, total;
    for (int c = from; c < to; c++) before += __ldcg(&chunks(h)[c].ties);
    before = block_scan(before, total);
    u64 at = before, sum = 0;
    for (int c = from; c < to; c++) {
        const u64 n = __ldcg(&chunks(h)[c].ties), keep = at >= ties ? 0 : min(n, ties - at);
        sum += __ldcg(&chunks(h)[c].mass) + keep * w_cut, at += n;
    }
    const u64 start = block_scan(sum, total), r = __umul64hi(philox(params->seed, (u32)a.state[2]), total);
    if (r >= start && r < start + sum) {
        u64 left = r - start;
        at = before;
        for (int c = from; c < to; c++) {
            const u64 n = __ldcg(&chunks(h)[c].ties), keep = at >= ties ? 0 : min(n, ties - at), w = __ldcg(&chunks(h)[c].mass) + keep * w_cut;
            if (left < w) { chosen = c, rest = left, ties_before = (int)at; break; }
            left -= w, at += n;
        }
    }
    __syncthreads();

    // which id of the chunk?
    const int first = chosen * CHUNK + tid * (CHUNK / THREADS);
    tied = 0;
    for (int i = 0; i < CHUNK / THREADS; i++) {
        const u32 key = first + i < n_valid ? to_key(l[first + i]) : 0;
        kept[i] = key > cut ? kept_weight(first + i) : 0, tie[i] = first + i < n_valid && key == cut, tied += tie[i];
    }
    u64 rank = ties_before + block_scan(tied, total);
    sum = 0;
    for (int i = 0; i < CHUNK / THREADS; i++) {
        if (tie[i]) kept[i] = rank++ < ties ? w_cut : 0;
        sum += kept[i];
    }
    u64 running = block_scan(sum, total);
    if (rest < running || rest >= running + sum) return;
    int i = 0;
    while (rest >= running + kept[i]) running += kept[i++];
    emit(first + i, a);
}
