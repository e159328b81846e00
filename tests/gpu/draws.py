"""Draw the same tokens again and again, beside other kernels of the process or alone; every bit has to be the first draw's.

    python tests/gpu/draws.py FILE.gguf --draws 1000 --beside lds,memory --tokens 16

prints one line of JSON: {"draws": ..., "differ": ..., "hash": ..., "first": ...}. With ORCD_NVRTC_OPTIONS=-DDELAYS=2048 the kernels wait at random where they meet;
--change FILE OLD NEW (any number of times) replaces text in a kernel's source, to plant a mistake. Exit code 1 when a draw differed."""
import argparse, hashlib, json, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
import numpy as np

# What shares the multiprocessors with the engine: reads and writes of shared memory that meet in one bank, arithmetic, reading memory
NOISE = r'''
extern "C" __global__ void lds(float* out, int n) {
    __shared__ volatile float x[1024];
    float a = 0;
    for (int i = 0; i < n; i++) a += x[(threadIdx.x * 32 + (i & 31)) & 1023];
    if (a == 1e30f) out[0] = a;
}
extern "C" __global__ void sts(float* out, int n) {
    __shared__ volatile float x[1024];
    for (int i = 0; i < n; i++) x[(threadIdx.x * 32 + (i & 31)) & 1023] = i;
    if (x[5] == 1e30f) out[0] = 1;
}
extern "C" __global__ void alu(float* out, int n) {
    float a = threadIdx.x, b = a + 1;
    for (int i = 0; i < n; i++) { a = a * b + 1; b = b * a + 2; }
    if (a + b == 1e30f) out[0] = a;
}
extern "C" __global__ void memory(const float4* x, float* out, int n) {
    float a = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) a += x[i].x;
    if (a == 1e30f) out[0] = a;
}
'''
GRIDS = dict(lds=(264, 3000), sts=(264, 3000), alu=(528, 20000), memory=(264, 1 << 23))


class Beside:
    "Keeps kernels running on a stream of their own while a `with` block lasts"
    def __init__(self, names): self.names, self.stop = names, False

    def __enter__(self):
        import cupy as cp
        self.buffer, self.square = cp.zeros(1 << 26, cp.float32), cp.random.standard_normal((2048, 2048), dtype=cp.float32)
        self.square @ self.square
        module = cp.RawModule(code=NOISE)
        kernels = {n: module.get_function(n) for n in GRIDS}
        cp.cuda.Device().synchronize()

        def work(name):
            with cp.cuda.Stream(non_blocking=True) as stream:
                while not self.stop:
                    for _ in range(4):
                        if name == 'gemm': self.square @ self.square
                        else:
                            blocks, n = GRIDS[name]
                            args = (self.buffer, self.buffer[8:], np.int32(n)) if name == 'memory' else (self.buffer, np.int32(n))
                            kernels[name]((blocks,), (128,), args)
                    stream.synchronize()
        self.threads = [threading.Thread(target=work, args=(n,)) for n in self.names]
        for t in self.threads: t.start()
        return self

    def __exit__(self, *_):
        self.stop = True
        for t in self.threads: t.join()


class Draws:
    "A prompt and some tokens after it: the bits of every logit of the prompt's end, of the cache, of the last step's logits and of the tokens"
    def __init__(self, engine, prompt, tokens, prompt_every=1):
        import cupy as cp
        from orcd.text.sampling import SamplingParams
        self.e, self.tokens, self.cp, self.every, self.n = engine, tokens, cp, prompt_every, 0
        self.ids = np.random.default_rng(1).integers(0, min(30000, engine.n_valid), prompt).tolist()
        self.params = SamplingParams(temperature=.9, seed=7)
        window = min([w for w in engine.config.windows if w], default=prompt + tokens)
        assert prompt_every == 1 or prompt + tokens <= window, f'a window of {window} forgets the prompt: run it before every draw, or a shorter one'
        arrays = [a for kv in engine.cache for a in kv]
        low, high = min(a.data.ptr for a in arrays), max(a.data.ptr + a.nbytes for a in arrays)
        memory = cp.cuda.UnownedMemory(low, high - low, engine)
        self.cache = cp.ndarray(((high - low) // 8,), cp.uint64, cp.cuda.MemoryPointer(memory, 0))
        with engine.stream: self.cache[:] = 0
        self.draw()
        with engine.stream: self.want = [self.head.copy(), engine.row.copy(), engine.ring.copy(), self.cache.copy()]
        engine.stream.synchronize()
        self.hash = hashlib.sha256(b''.join(a.get().tobytes() for a in self.want)).hexdigest()[:16]

    def draw(self):
        e, self.n = self.e, self.n + 1
        if self.n % self.every == 0 or self.n == 1:
            e.prefill(self.ids)
            with e.stream: self.head = e.row.copy()
        else:                                   # the prompt's rows of the cache are still there
            with e.stream: e.row[:] = self.head
            e._set_state(len(self.ids) - 1)
        e._begin(self.params)
        e._draw()
        for _ in range(self.tokens - 1): e.graph.launch(e.stream)

    def same(self):
        "Draw once more; is every bit as it was?"
        self.draw()
        with self.e.stream:
            got = self.head, self.e.row, self.e.ring, self.cache
            return bool(self.cp.stack([(a.view(np.uint32) == b.view(np.uint32)).all() for a, b in zip(got, self.want)]).all())

    def where(self):
        "What differs first"
        names = 'logits of the prompt', 'logits of the last step', 'tokens', 'cache'
        with self.e.stream: got = [a.get() for a in (self.head, self.e.row, self.e.ring, self.cache)]
        return [n for n, a, b in zip(names, got, self.want) if a.tobytes() != b.get().tobytes()]


def plant(changes):
    "Replace text in the sources of kernels before they are compiled"
    from orcd.kernels import nvrtc
    plain = nvrtc.read_source.__wrapped__

    @lru_cache(None)
    def read_source(name):
        text = plain(name)
        for file, old, new in changes:
            if file != name: continue
            assert text.count(old) == 1, f'{file}: {old!r} is there {text.count(old)} times'
            text = text.replace(old, new)
        return text
    nvrtc.read_source = read_source


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('file'); p.add_argument('--draws', type=int, default=100); p.add_argument('--tokens', type=int, default=16); p.add_argument('--prompt', type=int, default=200)
    p.add_argument('--prompt-every', type=int, default=1, help='run the prompt again before every so many draws')
    p.add_argument('--beside', default='', help='of lds, sts, alu, memory, gemm'); p.add_argument('--seconds', type=float, default=1e9, help='stop after so long')
    p.add_argument('--engines', type=int, default=1, help='so many at once on the same GPU, each with weights of its own')
    p.add_argument('--until', type=int, default=1 << 30, help='stop after so many that differ')
    p.add_argument('--change', nargs=3, action='append', default=[], metavar=('FILE', 'OLD', 'NEW'))
    a = p.parse_args()
    plant(a.change)
    import orcd
    from orcd.engine.cuda_engine import CudaEngine
    began, found, lock, engines = time.monotonic(), dict(draws=0, differ=0, first=None), threading.Lock(), []

    def more():
        "Is there another draw to make? Counts it."
        with lock:
            go = found['draws'] < a.draws and found['differ'] < a.until and time.monotonic() - began < a.seconds
            found['draws'] += go
            return go

    def work(d):
        while more():
            if d.same(): continue
            where = d.where()
            with lock: found.update(differ=found['differ'] + 1, first=found['first'] or where)

    with ExitStack() as stack:
        for _ in range(a.engines):
            with orcd.GGUF(a.file) as g: engines.append(stack.enter_context(CudaEngine(g, n_ctx=a.prompt + a.tokens)))
        all_draws = [Draws(e, a.prompt, a.tokens, a.prompt_every) for e in engines]
        hashes = sorted({d.hash for d in all_draws})
        began = time.monotonic()
        with Beside([x for x in a.beside.split(',') if x]), ThreadPoolExecutor(a.engines) as threads:
            for job in [threads.submit(work, d) for d in all_draws]: job.result()
        for e in engines: e.stream.synchronize()
        differ = found['differ'] + len(hashes) - 1
        print(json.dumps(found | dict(differ=differ, hash=','.join(hashes), tokens=a.tokens, beside=a.beside, engines=a.engines, seconds=round(time.monotonic() - began, 1))), flush=True)
    sys.exit(bool(differ))


if __name__ == '__main__': main()
