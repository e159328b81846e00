"""The products of a decode step, launch by launch, on the shapes of the three published models: `python tests/bench/launches.py [qwen]
[phi] [gpt-oss]`

Each in a chain of its like over different weights (a CUDA graph), beside what reading its weights would take. Weights are random
bytes."""
import sys
import cupy as cp
from orcd.kernels import gemv
from orcd.files.blocks import GGMLType as G
from orcd.kernels.nvrtc import QTensor, padded_bytes

CACHE, CHAIN = 400_000_000, 48 # bytes of weights that surely do not stay in the L2 cache; launches in a graph


def stacks(n, t, shape):
    "`n` matrices, or stacks of experts. Of the random bytes some bits are cleared, so that no scale is infinite."
    return [QTensor(t, shape, cp.random.randint(0, 255, padded_bytes(shape, t), dtype=cp.uint8) & cp.uint8(0x37), 'w') for _ in range(n)]


def normal(*shape): return cp.random.standard_normal(shape, dtype=cp.float32)


def copies(size): return max(3, min(24, CACHE//size + 1))


def product(t, n_out, n_in, norm):
    "(bytes, launch): x W^T, of a normed x or added to out"
    size = t.row_bytes(n_in)*n_out
    Ws, x, out = stacks(copies(size), t, (n_out, n_in)), normal(1, n_in), cp.zeros((1, n_out), cp.float32)
    source = gemv.Normed(x, cp.ones(n_in, cp.float32), 1e-6) if norm else x
    return size, lambda i, s: gemv.gemvs([(Ws[i % len(Ws)], out, None)], source, None if norm else out, stream=s)


def gated(t, n_out, n_in, n_expert=0, k=4):
    "(bytes, launch): gate, up and the activation; of `k` experts when there are any"
    size, shape, rows = 2*t.row_bytes(n_in)*n_out*(k if n_expert else 1), (n_out, n_in), 1
    choice = None
    if n_expert: shape, rows, choice = (n_expert, *shape), k, gemv.Choice(normal(1, n_expert), k)
    n = 4 if n_expert else copies(size)
    gates, ups, x, out = (stacks(n, t, shape), stacks(n, t, shape), gemv.Normed(normal(1, n_in), cp.ones(n_in, cp.float32), 1e-6),
        cp.zeros((rows, n_out), cp.float32))
    return size, lambda i, s: gemv.gated((gates[i % n], None), (ups[i % n], None), x, out, bool(n_expert), choice, stream=s)


def mixed(t, n_out, n_in, n_expert, k=4):
    "(bytes, launch): `k` experts, weighted and added up"
    Ws, x, out, choice = (stacks(4, t, (n_expert, n_out, n_in)), normal(k, n_in), cp.zeros((1, n_out), cp.float32),
        gemv.Choice(normal(1, n_expert), k))
    return t.row_bytes(n_in)*n_out*k, lambda i, s: gemv.mixed(Ws[i % 4], x, out, None, out, choice, settled=True, stream=s)


MODELS = {
    'qwen': {'q': (product, G.Q5_0, 1152, 896, True), 'o': (product, G.Q5_0, 896, 896, False), 'gate, up': (gated, G.Q5_0, 4864, 896),
             'down': (product, G.Q6_K, 896, 4864, False), 'head': (product, G.Q8_0, 151936, 896, True)},
    'phi': {'qkv': (product, G.Q5_K, 9216, 3072, True), 'o': (product, G.Q4_K, 3072, 3072, False), 'gate, up': (gated, G.Q4_K, 8192, 3072),
            'down Q4_K': (product, G.Q4_K, 3072, 8192, False), 'down Q6_K': (product, G.Q6_K, 3072, 8192, False),
            'head': (product, G.Q6_K, 32064, 3072, True)},
    'gpt-oss': {'qkv': (product, G.Q8_0, 5120, 2880, True), 'o': (product, G.Q8_0, 2880, 4096, False),
        'gate, up': (gated, G.MXFP4, 2880, 2880, 32),
                'down': (mixed, G.MXFP4, 2880, 2880, 32), 'head': (product, G.Q8_0, 201088, 2880, True)}}


def main(names):
    bandwidth = gemv.read_bandwidth()
    print(f'{cp.cuda.runtime.getDeviceProperties(0)["name"].decode()}, reads {bandwidth/1e12:.2f} TB/s')
    for name in names:
        for what, (make, *args) in MODELS[name].items():
            size, launch = make(*args)
            us = 1e6*gemv.graph_time(launch, CHAIN)
            print(f'{name + " " + what:20} {args[0].name:6} {size/1e6:7.1f} MB {us:8.2f} us, reading takes {1e6*size/bandwidth/us:4.0%} of '
                f'it', flush=True)


if __name__ == '__main__': main(sys.argv[1:] or MODELS)
