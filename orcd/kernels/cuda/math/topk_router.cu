// The router's choice, by one warp
#ifndef ORCD_TOP
#define ORCD_TOP
__device__ __forceinline__ unsigned warp_most(unsigned v) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(~0u, v);
#else
    for (int d = 16; d; d >>= 1) v = max(v, __shfl_xor_sync(~0u, v, d));
    return v;
#endif
}

// The k largest of n logits (at most 32 of 1024) in order, ties to the lower id, NaN last. Lane r < k gets the expert of rank r and its weight,
// the softmax over those k.
__device__ __forceinline__ void top_experts(const float* logits, int n, int k, int& id, float& weight) {
    const int lane = threadIdx.x & 31;
    unsigned taken = 0, key;                        // bit j: expert lane + 32 j is chosen; keys are in the order of the logits, and never 0
    int mine = n;
    float value = 0, first = 0, sum = 0;
    auto best_of_lane = [&] {
        key = 0;
        for (int j = 0, e = lane; e < n; j++, e += 32) if (!(taken >> j & 1)) {
            const float l = logits[e];
            unsigned u = __float_as_uint(l == 0 ? 0.f : l);         // -0 is 0
            u = l == l ? (u >> 31 ? ~u : u | 0x80000000) : 1;
            if (u > key) { key = u; mine = e; value = l == l ? l : __int_as_float(0xFF800000); }
        }
    };
    best_of_lane();
    id = 0; weight = 0;
    for (int r = 0; r < k; r++) {
        const unsigned most = warp_most(key);
        const int who = ~warp_most(~(key == most ? mine : 0x7FFFFFFF));
        const float best = __shfl_sync(~0u, value, who & 31);
        const float w = r == 0 || best == first ? 1 : expf(best - first);
        if (r == 0) first = best;
        sum += w;
        if (lane == r) { id = who; weight = w; }
        if (who == mine) {
            taken |= 1u << who / 32;
            if (n > 32) best_of_lane(); else key = 0;
        }
    }
    weight /= sum;
}
#endif
