// silu(gate) * up, or gpt-oss's variant of it: gate at most 7, up within +-7, and then gate sigmoid(1.702 gate) (up + 1). A NaN stays one.
#ifndef ORCD_SWIGLU
#define ORCD_SWIGLU
__device__ __forceinline__ float clamped_gate(float gate) { return gate > 7.f ? 7.f : gate; }
__device__ __forceinline__ float clamped_up(float up) { return (up > 7.f ? 7.f : up < -7.f ? -7.f : up) + 1.f; }
__device__ __forceinline__ float activation(float gate, float up, bool clamped) {
    const float g = clamped ? clamped_gate(gate) : gate, u = clamped ? clamped_up(up) : up;
    return g / (1.f + expf(clamped ? -1.702f * g : -g)) * u;
}
// With the hardware's exponential function and division: for what is rounded to a half afterwards
__device__ __forceinline__ float fast_activation(float gate, float up, bool clamped) {
    const float g = clamped ? clamped_gate(gate) : gate, u = clamped ? clamped_up(up) : up;
    return __fdividef(g, 1.f + __expf(clamped ? -1.702f * g : -g)) * u;
}
#endif
