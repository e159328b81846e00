// state: position of the first row, token, step, done, rows that a chunk lacks at its end
extern "C" __global__ void set_state(int* state, int pos, int token, int step, int missing) {
    if (threadIdx.x == 0) { state[0] = pos; state[1] = token; state[2] = step; state[3] = 0; state[4] = missing; }
}
