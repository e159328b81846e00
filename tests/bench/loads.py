"""How long `CudaEngine` takes to load files, and what it does when: `python tests/bench/loads.py FILE... [--n 6]`

A line a load: milliseconds, then every part as `name begin-end` from the load's beginning. The first load of a process also loads the
kernels. The logits of a short prompt are hashed: a loader that is fast and wrong would show. Then the loader alone, over the same
bytes: pinned memory is made and given back, nothing else is done meanwhile."""
import argparse, functools, hashlib, inspect, os, time
from statistics import median
import cupy
import orcd
from orcd.engine import cuda_engine as engine, loader
from orcd.kernels import nvrtc

spans, began = {}, 0.


def timed(owner, name):
    "Have a function note when it is at work"
    f = inspect.getattr_static(owner, name)
    @functools.wraps(f)
    def g(*args, **kw):
        t = time.perf_counter()
        try: return f(*args, **kw)
        finally: spans.setdefault(name, []).append((1e3*(t - began), 1e3*(time.perf_counter() - began)))
    setattr(owner, name, g)


PARTS = {engine: ('open_model', 'plan', 'layers_of'), nvrtc: ('load_all', 'wait_for'),
    engine.CudaEngine: ('_arena', '_allocate', '_capture', '_warm_up'),
         loader.Loader: ('_pin', 'start', '_run', 'wait', '_unpin', 'close')}
for owner, names in PARTS.items():
    for name in names: timed(owner, name)


def alone(g, e, copies, stage):
    "Milliseconds of the loader, with nobody beside it: the engine's weights are read once more"
    t = time.perf_counter()
    with loader.Loader(e.device, total=e.plan.weights) as l:
        l.start(g.filenos(), copies, None, stage)
        l.wait()
    return 1e3*(time.perf_counter() - t)


def timeline():
    "The parts in the order in which they began; of one that was at work several times how often, and from when to when"
    order = sorted(spans.items(), key=lambda s: min(s[1]))
    return '  '.join(f'{name}{f"×{len(s)}" if len(s) > 1 else ""} {min(a for a, _ in s):.0f}-{max(b for _, b in s):.0f}'
        for name, s in order)


def main():
    global began
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('files', nargs='+')
    p.add_argument('--n', type=int, default=6, help='loads of each file')
    p.add_argument('--context-length', type=int, default=4096)
    a = p.parse_args()
    cupy.cuda.runtime.free(0)       # the context is there before
    print(f'{cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()}, {os.cpu_count()} cores')
    for path in a.files:
        print(f'\n{os.path.basename(path)}')
        times = []
        kept, start = [], loader.Loader.start
        def keep(self, fd, copies, progress, stage): kept[:] = copies, stage; start(self, fd, copies, progress, stage)
        with orcd.GGUF(path) as g:
            loader.Loader.start = keep
            for i in range(a.n):
                spans.clear()
                began = time.perf_counter()
                e = engine.CudaEngine(g, n_ctx=a.context_length)
                times.append(1e3*(time.perf_counter() - began))
                line = timeline()
                print(f'{times[-1]:7.1f} ms  {line}  {hashlib.sha256(e.logits([1, 2, 3, 4, 5]).tobytes()).hexdigest()[:12]}', flush=True)
                if i == a.n - 1:
                    loader.Loader.start = start
                    ms = [alone(g, e, *kept) for _ in range(a.n)]
                    print(f'  the loader alone {min(ms):.1f} to {max(ms):.1f}, median {median(ms):.1f}; logits then '
                        f'{hashlib.sha256(e.logits([1, 2, 3, 4, 5]).tobytes()).hexdigest()[:12]}')
                e.close()
        if a.n > 1: print(f'  first {times[0]:.1f}, others {min(times[1:]):.1f} to {max(times[1:]):.1f}, median {median(times[1:]):.1f}')


if __name__ == '__main__': main()
