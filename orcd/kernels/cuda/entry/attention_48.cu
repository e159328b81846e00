#define HEAD_DIM 48
#include "entry/attention.cu"
