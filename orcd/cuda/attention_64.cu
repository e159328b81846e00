#define HEAD_DIM 64
#include "attention.cu"
