#define HEAD_DIM 128
#include "entry/attention.cu"
