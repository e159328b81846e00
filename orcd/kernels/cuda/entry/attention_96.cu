#define HEAD_DIM 96
#include "entry/attention.cu"
