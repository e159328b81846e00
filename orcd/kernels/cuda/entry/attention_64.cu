#define HEAD_DIM 64
#include "entry/attention.cu"
