#define HEAD_DIM 128
#include "attention.cu"
