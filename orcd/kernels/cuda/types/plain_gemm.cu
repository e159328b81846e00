// Arguments of the products with F32 and BF16 weights
#include "types/blocks.cu"
struct PlainGemmArgs {
    const u8* w; const float* x; float* out; const float *bias, *residual;
    int n_rows, n_out, n_in; i64 x_stride, out_stride, residual_stride;
};
