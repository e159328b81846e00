#define HEAD_DIM 32
#include "entry/attention.cu"
