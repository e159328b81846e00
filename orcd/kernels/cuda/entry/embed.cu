#include "types/blocks.cu"

// Row `ids[row]` of an embedding table, dequantised; an id outside the table gives NaN, so that it is noticed
struct EmbedArgs { const u8* w; const int* ids; float* out; i64 out_stride; int n_rows, n_vocab, n; };
template <int T> __device__ void embed_row(const EmbedArgs& a) {
    const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.n_rows || i >= a.n) return;
    const int id = a.ids[row];
    a.out[row * a.out_stride + i] = id >= 0 && id < a.n_vocab ? dequant_one<T>(a.w, id, a.n, i) : __int_as_float(0x7fc00000);
}
#define EMBED(name, T) \
extern "C" __global__ void embed_##name(const __grid_constant__ EmbedArgs a) { embed_row<T>(a); }
EACH_TYPE(EMBED)
