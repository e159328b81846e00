"""Prompts of some lengths and decoding, beside what reading the weights would take: `python tests/bench/prompts.py FILE...`

The drawn tokens are hashed: the same bits on every run."""
import argparse, hashlib, os, time
import cupy, numpy as np
import orcd
from orcd.engine.cuda_engine import CudaEngine
from orcd.kernels.gemv import read_bandwidth
from orcd.text.sampling import SamplingParams


def prompt_ms(e, ids, repeats=5):
    "The shortest of a few runs"
    times = []
    for _ in range(repeats):
        e.stream.synchronize()
        t = time.perf_counter()
        e.prefill(ids); e.stream.synchronize()
        times.append(time.perf_counter() - t)
    return 1e3*min(times)


def decode(e, ids, n=256, warm=16):
    "(tokens a second, tokens): greedy, the first `warm` not counted"
    e.prefill(ids)
    tokens = []
    for token, *_ in e.decode(SamplingParams(temperature=0), n):
        tokens.append(token)
        if len(tokens) == warm: t = time.perf_counter()
    return (n - warm)/(time.perf_counter() - t), tokens


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('files', nargs='+')
    p.add_argument('--lengths', type=int, nargs='+', default=[128, 150, 256, 300, 512, 2048, 3800])
    p.add_argument('--decode-at', type=int, nargs='+', default=[128, 3800])
    a = p.parse_args()
    bandwidth = read_bandwidth()
    print(f'{cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()}, reads {bandwidth/1e12:.2f} TB/s')
    n_ctx = max(max(a.lengths), max(a.decode_at) + 256)
    for path in a.files:
        with orcd.GGUF(path) as g: e = CudaEngine(g, n_ctx=n_ctx)
        ids = np.random.default_rng(0).integers(0, min(30_000, e.n_valid), n_ctx).tolist()
        print(f'\n{os.path.basename(path)}')
        for n in a.lengths:
            ms = prompt_ms(e, ids[:n])
            print(f'  prompt of {n:5} tokens {ms:8.2f} ms {1e3*n/ms:10,.0f} tok/s')
        for n in a.decode_at:
            rate, tokens = decode(e, ids[:n])
            print(f'  decoding after {n:5}    {rate:8,.0f} tok/s, {rate*e.step_bytes(n + 128)/bandwidth:.0%} of what reading alone allows, '
                f'{hashlib.sha256(str(tokens).encode()).hexdigest()[:12]}', flush=True)
        e.close()


if __name__ == '__main__': main()
