#define HEAD_DIM 48
#include "attention.cu"
