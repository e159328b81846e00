"Kernels run on the CPU: what a launcher of the package asks a GPU for, taken where every launch passes, with its struct of arguments as bytes"
from dataclasses import dataclass
import numpy as np
from orcd.kernels import nvrtc

# After `FIBERS` and a kernel f: RUN(f) makes run_f(blocks in x, y and z, address of its struct), which returns what `run_block` says. A struct that
# is handed over in parts lies as its parts do, each at a multiple of its size.
RUN = r'''
#include <utility>
template<class... P, size_t... I> static void call(void (*kernel)(P...), const char* args, std::index_sequence<I...>) {
    const size_t size[] = {sizeof(P)...}, align[] = {alignof(P)...};
    size_t start[sizeof...(P)], at = 0;
    for (size_t i = 0; i < sizeof...(P); i++) { start[i] = (at + align[i] - 1) / align[i] * align[i]; at = start[i] + size[i]; }
    kernel(*(const P*)(args + start[I])...);
}
template<class... P> static int run_grid(void (*kernel)(P...), int x, int y, int z, const void* args) {
    body = [=] { call(kernel, (const char*)args, std::index_sequence_for<P...>()); };
    for (blockIdx.z = 0; blockIdx.z < z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < x; blockIdx.x++)
                if (int wrong = run_block()) return wrong;
    return 0;
}
#define RUN(f) extern "C" int run_##f(int x, int y, int z, const void* args) { return run_grid(f, x, y, z, args); }
'''


@dataclass(frozen=True)
class Launched:
    "A launch as the driver would get it"
    file:str
    name:str
    defines:tuple
    grid:tuple
    block:tuple
    args:bytes          # the struct; its pointers are addresses of arrays in this process
    shared_mem:int
    def on(self, library):
        "Run it by a library with RUN(name); returns `run_block`'s answer"
        return getattr(library, f'run_{self.name}')(*map(int, (*self.grid, 1, 1)[:3]), self.args)
    def values(self, args):
        "The struct by field name, of an `nvrtc.Args`"
        return np.frombuffer(self.args, args.dtype)[0]


def take_launches(monkeypatch, take):
    "Every launch of the package becomes a call take(Launched)"
    def kernel(file, name, defines=(), device=None):
        def launch(grid, block, args, starts, shared_mem=0, stream=None, early=False): take(Launched(file, name, defines, grid, block, args, shared_mem))
        return launch
    monkeypatch.setattr(nvrtc, 'kernel', kernel)
