#define HEAD_DIM 32
#include "attention.cu"
