#include "math/input_prologue.cu"
#include "math/topk_router.cu"

// Row t of logits (n experts, at most 1024): the k largest in order, ties to the lower id; weights: softmax over those k. One warp a row.
extern "C" __global__ void __launch_bounds__(32) route(const float* logits, int* ids, float* weights, int n, int k, long long ld) {
    pdl_launch_dependents();
    pdl_wait();
    int t = blockIdx.x, lane = threadIdx.x, id;
    float weight;
    top_experts(logits + t * ld, n, k, id, weight);
    if (lane < k) { ids[t * k + lane] = id; weights[t * k + lane] = weight; }
}

// out[t] = sum over rank r of weights[t][r] * y[t k + r] (+ residual[t]), in rank order
extern "C" __global__ void __launch_bounds__(256) expert_sum(const float* y, const float* weights, const float* residual, float* out,
    int n, int k, long long ldy, long long ldo, long long ldr) {
    pdl_launch_dependents();
    pdl_wait();
    int i = blockIdx.x * 256 + threadIdx.x, t = blockIdx.y;
    if (i >= n) return;
    float sum = 0;
    for (int r = 0; r < k; r++) sum = fmaf(weights[t * k + r], y[((long long)t * k + r) * ldy + i], sum);
    if (residual) sum += residual[t * ldr + i];
    out[t * ldo + i] = sum;
}

// Slots (token, rank) sorted by expert, within an expert by slot: offset[e] is where expert e's slots begin in `slots`, a multiple of 8; what is
// left before the next expert's is -1. One block of 1024.
// A warp counts an expert's slots, later places them, 32 at a time by ballot: the order never depends on timing.
extern "C" __global__ void __launch_bounds__(1024) group_slots(const int* ids, int* offset, int* slots, int n_slots, int n_expert) {
    __shared__ int count[1025];
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
        offset[e] = count[e] = at;
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
            if (mine) slots[at + __popc(all & ((1u << lane) - 1))] = i;
            at += __popc(all);
        }
        if (at + lane < end) slots[at + lane] = -1;
    }
}
