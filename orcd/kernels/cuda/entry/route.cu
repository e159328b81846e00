#include "math/input_prologue.cu"
#include "math/topk_router.cu"

// Row t of logits (n experts, at most 1024): the k largest in order, ties to the lower id; weights: softmax over those k. One warp a row.
struct RouteArgs { const float* logits; i64 logits_stride; int* ids; float* weights; int n_expert, k; };
extern "C" __global__ void __launch_bounds__(32) route(const __grid_constant__ RouteArgs a) {
    pdl_launch_dependents();
    pdl_wait();
    int t = blockIdx.x, lane = threadIdx.x, id;
    float weight;
    top_experts(a.logits + t * a.logits_stride, a.n_expert, a.k, id, weight);
    if (lane < a.k) {
        a.ids[t * a.k + lane] = id;
        a.weights[t * a.k + lane] = weight;
    }
}

// out[t] = sum over rank r of weights[t][r] * y[t k + r] (+ residual[t]), in rank order
struct ExpertSumArgs {
    const float* y; i64 y_stride; const float* weights; const float* residual; i64 residual_stride; float* out; i64 out_stride; int n, k;
};
extern "C" __global__ void __launch_bounds__(256) expert_sum(const __grid_constant__ ExpertSumArgs a) {
    pdl_launch_dependents();
    pdl_wait();
    int i = blockIdx.x * 256 + threadIdx.x, t = blockIdx.y;
    if (i >= a.n) return;
    float sum = 0;
    for (int r = 0; r < a.k; r++) sum = fmaf(a.weights[t * a.k + r], a.y[((i64)t * a.k + r) * a.y_stride + i], sum);
    if (a.residual) sum += a.residual[t * a.residual_stride + i];
    a.out[t * a.out_stride + i] = sum;
}

// Slots (token, rank) sorted by expert, within an expert by slot: offset[e] is where expert e's slots begin in `slots`, a multiple of 8; what is
// left before the next expert's is -1. One block of 1024.
// A warp counts an expert's slots, later places them, 32 at a time by ballot: the order never depends on timing.
struct GroupSlotsArgs { const int* ids; int *offset, *slots; int n_slots, n_expert; };
extern "C" __global__ void __launch_bounds__(1024) group_slots(const __grid_constant__ GroupSlotsArgs a) {
    __shared__ int count[1025];
    const int *ids = a.ids, n_slots = a.n_slots, n_expert = a.n_expert;
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    pdl_launch_dependents();
    pdl_wait();
    for (int e = warp; e < n_expert; e += 32) {
        int c = 0;
#pragma unroll 8
        for (int i = lane; i < (n_slots + 31) / 32 * 32; i += 32) c += __popc(__ballot_sync(0xFFFFFFFF, i < n_slots && ids[i] == e));
        if (lane == 0) count[e] = c;
    }
    __syncthreads();
    if (threadIdx.x == 0) for (int e = 0, at = 0; e <= n_expert; e++) {
        int c = e < n_expert ? count[e] : 0;
        a.offset[e] = count[e] = at;
        at += (c + 7) & ~7;
    }
    __syncthreads();
    for (int e = warp; e < n_expert; e += 32) {
        int at = count[e];
        const int end = count[e + 1];
#pragma unroll 8
        for (int i = lane; i < (n_slots + 31) / 32 * 32; i += 32) {
            bool mine = i < n_slots && ids[i] == e;
            u32 all = __ballot_sync(0xFFFFFFFF, mine);
            if (mine) a.slots[at + __popc(all & ((1u << lane) - 1))] = i;
            at += __popc(all);
        }
        if (at + lane < end) a.slots[at + lane] = -1;
    }
}
