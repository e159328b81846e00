// What reading alone costs: four 16-byte loads in flight a thread, nothing written (a sum is never exactly `never`)
struct ReadArgs { const float4* x; float* out; long long n; float never; };
extern "C" __global__ void __launch_bounds__(256) read(const __grid_constant__ ReadArgs a) {
    float sum = 0;
    long long step = gridDim.x * 256ll;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < a.n; i += 4 * step) {
        float4 v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = i + j * step < a.n ? a.x[i + j * step] : float4{0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < 4; j++) sum += (v[j].x + v[j].y) + (v[j].z + v[j].w);
    }
    if (sum == a.never) a.out[0] = sum;
}
