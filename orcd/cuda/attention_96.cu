#define HEAD_DIM 96
#include "attention.cu"
