#include "types/blocks.cu"
typedef long long i64;

// Row `ids[row]` of an embedding table, dequantised; an id outside the table gives NaN, so that it is noticed
template <int T> __device__ void embed_row(const u8* w, const int* ids, float* out, i64 out_stride, int n_rows, int n_vocab, int n) {
    const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= n_rows || i >= n) return;
    const int id = ids[row];
    out[row * out_stride + i] = id >= 0 && id < n_vocab ? dequant_one<T>(w, id, n, i) : __int_as_float(0x7fc00000);
}
#define EMBED(name, T) \
extern "C" __global__ void embed_##name(const u8* w, const int* ids, float* out, i64 out_stride, int n_rows, int n_vocab, int n) { \
    embed_row<T>(w, ids, out, out_stride, n_rows, n_vocab, n); }
EACH_TYPE(EMBED)
