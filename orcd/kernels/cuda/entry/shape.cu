#include "math/logit_keys.cu"
constexpr int MOST_BIASED = 300, MOST_TOP = 20;

struct Shape {               // as SHAPE in Python
    u32 ticket;              // blocks that have finished; 0 between kernels
    float frequency, presence;
    int n_valid, n_bias, n_top;
    int ids[MOST_BIASED];    // different ones
    float bias[MOST_BIASED];
};
struct Part { float max, sum; u64 best[MOST_TOP]; };  // what a block knows of its ids: the likeliest as keys, best first
static_assert(sizeof(Shape) == 24 + 8 * MOST_BIASED && sizeof(Part) == 8 + 8 * MOST_TOP, "as Python has them");

// true in every thread of the block that finishes last. A copy of the sampler's: in a file of both, before the sampler's other shared memory,
// it would change the machine code of sampler.cu
__device__ bool last_block(Shape* h) {
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

// Before the draw. mask: its first word says whether there is one. history: the tokens of this job but the last, which is in `state`.
struct ShapeArgs { const float* logits; float* shaped; const int* state; int* history; const u32* mask; const Shape* shape; int n_vocab; };
extern "C" __global__ void __launch_bounds__(THREADS) shape_logits(const __grid_constant__ ShapeArgs a) {
    __shared__ int times[CHUNK];
    __shared__ float bias[CHUNK];
    const Shape* s = a.shape;
    const int tid = threadIdx.x, first = blockIdx.x * CHUNK, step = a.state[2];
    const float frequency = s->frequency, presence = s->presence;
    for (int i = tid; i < CHUNK; i += THREADS) times[i] = 0, bias[i] = 0.f;
    __syncthreads();
    for (int i = tid; i < s->n_bias; i += THREADS) {
        const int at = s->ids[i] - first;
        if (at >= 0 && at < CHUNK) bias[at] = s->bias[i];
    }
    if (frequency != 0.f || presence != 0.f)
        for (int i = tid; i < step; i += THREADS) {
            const int at = (i == step - 1 ? a.state[1] : a.history[i]) - first;
            if (at >= 0 && at < CHUNK) atomicAdd(&times[at], 1);
        }
    if (blockIdx.x == 0 && tid == 0 && step) a.history[step - 1] = a.state[1];  // for later steps: this one's blocks do not read it
    __syncthreads();
    for (int at = tid; at < CHUNK; at += THREADS) {
        const int id = first + at;
        if (id >= a.n_vocab) return;
        float x = a.logits[id];
        if (a.mask[0]) x = !(a.mask[1 + (id >> 5)] >> (id & 31) & 1) ? NEG_INF : x >= -1e30f ? x : -1e30f;  // NaN is no number above it
        if (bias[at] != 0.f) x = __fadd_rn(x, bias[at]);
        if (times[at]) x = __fsub_rn(x, __fadd_rn(__fmul_rn((float)times[at], frequency), presence));
        a.shaped[id] = x;
    }
}

// this thread's best key below `last`, of its blocks' lists
__device__ u64 best_below(const Part* parts, int n_part, int n_top, u64 last) {
    u64 best = 0;
    for (int p = threadIdx.x; p < n_part; p += THREADS)
        for (int i = 0; i < n_top; i++) {
            const u64 key = __ldcg(&parts[p].best[i]);
            if (key >= last) continue;
            best = key > best ? key : best;
            break;
        }
    return best;
}

// After the draw: the log probability of its token in the model's own distribution, in place of that of the shaped one, and the likeliest tokens.
// (id, log probability) in 8 bytes each, as in the ring; an id of -1: there are no more.
struct OwnArgs { const float* logits; const int* state; Shape* shape; Part* parts; u64 *ring, *top; int ring_size, n_vocab; };
extern "C" __global__ void __launch_bounds__(THREADS) own_logprobs(const __grid_constant__ OwnArgs a) {
    const int tid = threadIdx.x, n_valid = min(a.shape->n_valid, a.n_vocab), n_top = a.shape->n_top, step = a.state[2] - 1;
    float x[CHUNK / THREADS], max = NEG_INF, sum = 0.f;
    u64 key[CHUNK / THREADS];
    #pragma unroll
    for (int i = 0; i < CHUNK / THREADS; i++) {
        const int id = blockIdx.x * CHUNK + i * THREADS + tid;
        x[i] = id < n_valid ? a.logits[id] : NEG_INF;
        if (x[i] != x[i]) x[i] = NEG_INF;
        max = fmaxf(max, x[i]);
        key[i] = id < n_valid ? (u64)to_key(__fadd_rn(x[i], 0.f)) << 32 | ~(u32)id : 0;  // larger is better, of equals the lower id; -0 is 0
    }
    max = block_max(max);
    #pragma unroll
    for (int i = 0; i < CHUNK / THREADS; i++)
        if (key[i]) sum += x[i] == max ? 1.f : expf(x[i] - max);
    sum = block_sum(sum);
    Part& mine = a.parts[blockIdx.x];
    u64 last = ~0ull;
    for (int n = 0; n < n_top; n++) {
        u64 best = 0;
        #pragma unroll
        for (int i = 0; i < CHUNK / THREADS; i++) best = key[i] < last && key[i] > best ? key[i] : best;
        last = block_best(best);
        if (tid == 0) mine.best[n] = last;
    }
    if (tid == 0) mine.max = max, mine.sum = sum;
    if (!last_block(a.shape)) return;

    // each thread adds up its blocks' sums on its own maximum, then all move to the common one
    max = NEG_INF, sum = 0.f;
    for (int p = tid; p < gridDim.x; p += THREADS) {
        const float m = __ldcg(&a.parts[p].max), s = __ldcg(&a.parts[p].sum), top = fmaxf(max, m);
        sum = sum * (max == top ? 1.f : expf(max - top)) + s * (m == top ? 1.f : expf(m - top));
        max = top;
    }
    const float own = max;
    max = block_max(max);
    sum *= own == max ? 1.f : expf(own - max);
    sum = block_sum(sum);
    const float log_sum = logf(sum);
    auto entry = [&](int id, float l) {
        const float logprob = (l == max ? 0.f : l - max) - log_sum;
        return (u64)(u32)id | (u64)__float_as_uint(logprob) << 32;
    };
    u64 head = best_below(a.parts, gridDim.x, n_top, ~0ull);
    for (int n = 0; n < n_top; n++) {
        const u64 best = block_best(head);
        if (tid == 0) a.top[step % a.ring_size * MOST_TOP + n] = best ? entry(~(u32)best, from_key(best >> 32)) : ~0ull;
        if (best && best == head) head = best_below(a.parts, gridDim.x, n_top, best);
    }
    if (tid) return;
    const int id = a.state[1];
    const float l = a.logits[id];
    a.ring[step % a.ring_size] = entry(id, l != l ? NEG_INF : l);
}
