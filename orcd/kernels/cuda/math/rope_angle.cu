// Cosine and sine of position * inv_freq, times mscale. In turns (half circles) the reduction is exact: subtract the nearest even number.
// Only that line needs more than float32.
__device__ __forceinline__ float2 rope_angle(int position, float inv_freq, float mscale) {
    const double turns = (double)position * inv_freq * 0.31830988618379067;
    float s, c;
    sincospif((float)(turns - 2.0 * rint(0.5 * turns)), &s, &c);
    return make_float2(c * mscale, s * mscale);
}
