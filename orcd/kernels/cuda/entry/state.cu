// state: position of the first row, token, step, done, rows that a chunk lacks at its end
struct SetStateArgs { int* state; int position, token, step, missing; };
extern "C" __global__ void set_state(const __grid_constant__ SetStateArgs a) {
    if (threadIdx.x) return;
    a.state[0] = a.position;
    a.state[1] = a.token;
    a.state[2] = a.step;
    a.state[3] = 0;
    a.state[4] = a.missing;
}
