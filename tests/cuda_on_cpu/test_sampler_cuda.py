"""The sampler's kernels run on the CPU by their own launchers, against the NumPy sampler: draws, masks, bias, penalties, the likeliest tokens; and the
loop of `CudaEngine.decode` that feeds them, with a script in place of the layers"""
import ctypes, re, shutil, sys
from types import ModuleType, SimpleNamespace as NS
from unittest.mock import patch
import numpy as np, pytest
from orcd.engine import cuda_engine as engine
from orcd.errors import Cancelled, OutOfVRAM, RequestError
from orcd.kernels import nvrtc, sampler as ks
from orcd.text.sampling import Sampler, SamplingParams
from launched import RUN, take_launches
from random_draws import Multiples, random_logits, some
from test_blocks_cuda import compiled
from test_gemv_cuda import FIBERS, THREADS, Array as Plain

MORE = r'''
typedef uint32_t u32; typedef uint16_t u16; typedef unsigned char u8; typedef long long i64;
static u64 __shfl_xor_sync(unsigned m, u64 v, int d) { const u32 lo = __shfl_xor_sync(m, (u32)v, d), hi = __shfl_xor_sync(m, (u32)(v >> 32), d); return lo | (u64)hi << 32; }
static u64 __shfl_up_sync(unsigned m, u64 v, int d) {
    const int from = std::max(lane_of() - d, 0);
    const u32 lo = from_lane((u32)v, from), hi = from_lane((u32)(v >> 32), from);
    return lo | (u64)hi << 32;
}
static float __fsub_rn(float a, float b) { return a - b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static u64 __umul64hi(u64 a, u64 b) { return (unsigned __int128)a * b >> 64; }
static u32 __umulhi(u32 a, u32 b) { return (u64)a * b >> 32; }
template<class T, class V> static T atomicAdd(T* at, V v) { const T old = *at; *at += v; return old; }
template<class T> static T __ldcg(const T* at) { return *at; }
static void __threadfence() {}
static void delay() {}
static Index gridDim;
'''
GRID = '#undef RUN\n#define RUN(f) extern "C" int run_##f(int x, int y, int z, const void* args) { gridDim = {x, y, z}; return run_grid(f, x, y, z, args); }\n'
KERNELS = dict(sampler=('sample_reset', 'sample_prepare', 'sample_weigh', 'sample_refine', 'sample_draw'), shape=('shape_logits', 'own_logprobs'))


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    if not shutil.which('g++'): pytest.skip('needs g++ to run device code on the CPU')
    made = {}
    def build(file, change=('', '')):
        if (file, change) not in made:
            fibers = FIBERS.replace('#define __shared__', '#define __shared__ static').replace('alignas(16) unsigned char', 'alignas(16) static unsigned char')
            kernels = ''.join(re.sub(r'#include .*', '', nvrtc.read_source(f)) for f in ('reduce', 'logit_keys', file))
            assert not change[0] or kernels.count(change[0]) == 1, 'the source has changed'
            text = THREADS + fibers + MORE + kernels.replace(*change) + RUN + GRID + ''.join(f'RUN({k})' for k in KERNELS[file])
            made[file, change] = compiled(tmp_path_factory, text)
        return made[file, change]
    return build


class Array(Plain):
    "As much more of CuPy's as the sampler and the engine want"
    @classmethod
    def of(cls, a):
        part = object.__new__(cls)
        part.a = a
        return part
    def __getitem__(self, i): return self.of(self.a[i])
    def reshape(self, *shape): return self.of(self.a.reshape(*shape))
    def set(self, a, stream=None): self.a[...] = a
    def __len__(self): return len(self.a)


class Stream:
    "Does at once what is launched; between begin and end of a capture it is kept for the graph"
    ptr, recording = 0, None
    def begin_capture(self): self.recording = []
    def end_capture(self):
        calls, self.recording = self.recording, None
        return NS(upload=lambda stream: None, launch=lambda stream: [call() for call in calls])
    def do(self, call): call() if self.recording is None else self.recording.append(call)
    def synchronize(self): pass


@pytest.fixture
def on_cpu(library, monkeypatch):
    "Launches go to the CPU; `change` (file, old, new) is a mistake"
    state = NS(change=('', '', ''), stream=Stream(), names=[])
    def take(l):
        def run():
            file, *change = state.change
            state.names.append(l.name)
            assert l.block == (256,) and not l.on(library(l.file, tuple(change) if file == l.file else ('', ''))), f'{l.name} hangs'
        state.stream.do(run)
    take_launches(monkeypatch, take)
    return state


class Device:
    "All that a job's draws need"
    def __init__(self, n_vocab, n_valid, ring=8, history=64):
        self.n_vocab, self.n_valid = n_vocab, n_valid
        size, words = ks.workspace_bytes(n_vocab)
        self.work, self.seen = Array(np.full(size, 0xAA, np.uint8)), Array(np.full(words//4, 2**32 - 1, np.uint32))
        self.state, self.ring, self.params = Array(np.zeros(5, np.int32)), Array(np.zeros(ring, np.uint64)), Array(np.zeros(40, np.uint8))
        self.row, self.history = Array(np.zeros(n_vocab, np.float32)), Array(np.full(history, -7, np.int32))
        self.memory = {name: Array(np.full(shape, 255, np.dtype(dtype).char)) for name, (shape, dtype) in ks.shape_memory(n_vocab, ring).items()}

    def begin(self, p):
        self.params.set(ks.pack_params(p, self.n_valid))
        self.state.set(np.array([7, -1, 0, 0, 0], np.int32))
        self.memory['shape'].set(ks.pack_shape(p, self.n_valid))
        ks.reset(self.work, self.seen, self.n_vocab)

    def draw(self, x, mask, step, n_top):
        self.row.set(x)
        self.memory['mask'].a[0] = mask is not None
        if mask is not None: self.memory['mask'].a[1:1 + len(mask)] = mask[:len(self.memory['mask'].a) - 1]
        ks.shape_logits(self.row, self.memory, self.state, self.history)
        ks.draw(self.memory['shaped'], self.params, self.work, self.state, self.seen, self.ring)
        ks.own_logprobs(self.row, self.memory, self.state, self.ring)
        row = step % len(self.ring)
        ids, logprobs = ks.unpack_ring(self.ring.a[row:row + 1])
        return int(ids[0]), float(logprobs[0]), ks.unpack_top(self.memory['top'].a[row], n_top)


def random_params(rng, n_valid):
    ids = rng.choice(n_valid, min(n_valid, int(some(rng, 0, 0, 3, 40))), replace=False)
    return SamplingParams(temperature=some(rng, 0, .7, 1., 2.), top_k=int(some(rng, 0, 0, 2, 40)), top_p=some(rng, 0., .5, 1., 1.), min_p=some(rng, 0., 0., .05),
        repetition_penalty=some(rng, 1., 1., .5, 1.3), seed=int(rng.integers(2**63)), frequency_penalty=some(rng, 0., -2., .3, 1.9),
        presence_penalty=some(rng, 0., -.7, 2.), logit_bias={int(i): float(rng.uniform(-5, 5)) for i in ids}, top_logprobs=int(some(rng, 0, 1, 5, 20)))

def random_mask(rng, n_valid):
    "None, a few tokens, one alone, or nearly all"
    kind, words = rng.integers(4), -(-n_valid//32)
    if kind == 0: return None
    may = np.zeros(32*words, bool)
    may[rng.integers(n_valid, size=some(rng, 1, 5))] = True
    if kind == 3: may = ~may
    if not may[:n_valid].any(): may[0] = True
    return np.packbits(may, bitorder='little').view(np.uint32)


def compare(rng, d, jobs, steps=5):
    cpu = Sampler(d.n_vocab, d.n_valid)
    for _ in range(jobs):
        p, x = random_params(rng, d.n_valid), random_logits(rng, d.n_vocab, (-np.inf, np.nan))
        d.begin(p); cpu.reset(p)
        for step in range(steps):
            if step == 3: x = random_logits(rng, d.n_vocab, (-np.inf, np.nan))
            mask = random_mask(rng, d.n_valid)
            want = cpu.draw(x, step, mask)
            i, logprob, top = d.draw(x, mask, step, p.n_top)
            assert i == want.id, (p, mask, x, want)
            assert np.allclose(logprob, want.logprob, rtol=1e-5, atol=1e-4), (p, x, want, logprob)
            assert [i for i, _ in top] == [i for i, _ in want.top], (p, x, want, top)
            assert np.allclose([v for _, v in top], [v for _, v in want.top], rtol=1e-5, atol=1e-4), (p, x, want, top)
            assert d.state.a[:4].tolist() == [8 + step, i, step + 1, 0]


@pytest.mark.parametrize('n_vocab, n_valid, jobs', [(1, 1, 6), (33, 31, 40), (1024, 1000, 30), (1025, 1025, 10), (5003, 4900, 5)])
@np.errstate(all='ignore')
def test_same_as_numpy(on_cpu, n_vocab, n_valid, jobs): compare(np.random.default_rng(n_vocab), Device(n_vocab, n_valid), jobs)


@np.errstate(all='ignore')
def test_more_blocks_than_threads(on_cpu):
    "So that the last block has to merge several lists a thread"
    n = 257*1024 + 5
    d, x, p = Device(n, n), np.round(np.random.default_rng(0).normal(size=n), 3).astype('f4'), SamplingParams(top_logprobs=20, temperature=0, logit_bias={n - 1: 100})
    d.begin(p); cpu = Sampler(n); cpu.reset(p)
    x[[3, 256*1024 + 3, n - 2]] = 9
    i, logprob, top = d.draw(x, None, 0, 20)
    want = cpu.draw(x, 0)
    assert i == want.id == n - 1 and [i for i, _ in top] == [i for i, _ in want.top] and abs(logprob - want.logprob) < 1e-3
    assert [i for i, _ in top][:3] == [3, 256*1024 + 3, n - 2]


@pytest.mark.parametrize('change', [('i == step - 1 ? a.state[1] : a.history[i]', 'a.history[i]'), ('x >= -1e30f ? x : -1e30f', 'x'), ('__fadd_rn(x, bias[at])', '__fsub_rn(x, bias[at])'),
    ('(float)times[at]', '(float)(times[at] > 0)'), ('a.history[step - 1] = a.state[1]', 'a.history[step] = a.state[1]'), ('key >= last', 'key > last'),
    ('key[i] < last && key[i] > best', 'key[i] <= last && key[i] > best'), ('__fadd_rn(x[i], 0.f)', 'x[i]'), ('| ~(u32)id : 0', '| (u32)id : 0')], ids=lambda c: c[0][:20])
@np.errstate(all='ignore')
def test_mistakes_are_seen(on_cpu, change):
    on_cpu.change = 'shape', *change
    with pytest.raises((AssertionError, IndexError)): compare(np.random.default_rng(1), Device(1100, 1090), 80)


# --- the engine's loop ---

class Played(engine.CudaEngine):
    "The engine without a model: the logits are a function of the tokens so far"
    def __init__(self, on_cpu, n_vocab=1100, n_valid=1090, n_kv=100, prompt=5):
        d = self.device_ = Device(n_vocab, n_valid, engine.RING, 128)
        self.stream, self.device, self.halves, self.exchange, self.on_cpu, self.arenas, self.pins = on_cpu.stream, 0, None, None, on_cpu, [], None
        self.config, self.plan = NS(n_vocab=n_vocab), NS(kv_cache=1 << 20)
        self.n_valid, self.n_kv, self.length, self.tokens, self.thought = n_valid, n_kv, prompt, [], 0
        self.row, self.draw_memory, self.shape_memory = d.row, (d.work, d.seen), d.memory
        self.params, self.state, self.ids, self.ring = d.params, d.state, d.history, d.ring
        self.host = engine.PinnedBuffer(8*engine.RING)
        self.drawn, self.events = np.frombuffer(self.host.view, np.uint64), [NS(record=lambda s: None, synchronize=lambda: None)]*(engine.DEPTH + 1)
        self.state.set(np.array([prompt - 1, 0, 0, 0, 0], np.int32))
        self.row.set(script(n_vocab, []))
        self.graph = NS(launch=lambda stream: (self.think(), self._draw()))
    def think(self):
        self.thought += 1
        self.tokens.append(int(self.state.a[1]))
        assert self.state.a[2] == len(self.tokens) and self.state.a[0] == 4 + len(self.tokens)
        self.row.set(script(self.config.n_vocab, self.tokens))
    def _think(self): self.stream.do(self.think)
    def __del__(self): pass


def script(n_vocab, tokens): return (np.random.default_rng(tokens[-3:]).normal(size=n_vocab)*2).astype('f4')


@pytest.fixture
def cupy(monkeypatch):
    "Copies are made at once"
    pinned = {}
    def alloc(n, flags=0):
        b = ctypes.create_string_buffer(n)
        pinned[ctypes.addressof(b)] = b
        return ctypes.addressof(b)
    runtime = NS(memcpyAsync=lambda to, at, n, kind, stream: ctypes.memmove(int(to), int(at), n), hostAlloc=alloc, freeHost=pinned.pop, memcpyHostToDevice=1, memcpyDeviceToHost=2,
        CUDARuntimeError=type('E', (Exception,), {}))
    cuda = ModuleType('cupy.cuda')
    vars(cuda).update(runtime=runtime, driver=NS(CUDADriverError=type('E', (Exception,), {})))
    module = ModuleType('cupy')
    module.cuda = cuda
    monkeypatch.setattr(engine, 'use_device', lambda i: None)
    monkeypatch.setattr(nvrtc, 'load_all', lambda files, device: {})
    with patch.dict(sys.modules, {'cupy': module, 'cupy.cuda': cuda}): yield


def reference(p, n, constraint=None, n_vocab=1100, n_valid=1090):
    s, tokens = Sampler(n_vocab, n_valid), []
    s.reset(p)
    for step in range(n):
        if constraint and constraint.done: return
        d = s.draw(script(n_vocab, tokens), step, constraint.mask() if constraint else None)
        if constraint: constraint.commit(d.id)
        tokens.append(d.id)
        yield d


@pytest.mark.parametrize('kw', [dict(), dict(temperature=0, top_logprobs=3), dict(frequency_penalty=1.5, presence_penalty=1, logit_bias={9: 4}, temperature=.3), dict(top_k=4, top_logprobs=20, repetition_penalty=1.5)], ids=str)
@pytest.mark.parametrize('constrained', [False, True])
def test_decode(on_cpu, cupy, kw, constrained):
    "Longer than the ring"
    p, n = SamplingParams(seed=3, **kw), 70
    a, b = [Multiples(1090) if constrained else None for _ in 'ab']
    e = Played(on_cpu)
    got, want = list(e.decode(p, n, constraint=a)), list(reference(p, n, b))
    assert [(d.id, [i for i, _ in d.top]) for d in got] == [(d.id, [i for i, _ in d.top]) for d in want] and len(got) == n
    assert np.allclose([d.logprob for d in got], [d.logprob for d in want], atol=1e-4)
    special = constrained or p.shapes or p.n_top
    assert ('shape_logits' in on_cpu.names) == bool(special) and (e.halves is not None) == bool(special)
    if constrained: assert a.told == [d.id for d in got]


def test_the_mask_is_asked_for_while_the_layers_run(on_cpu, cupy):
    "and no earlier than the constraint knows the token before"
    e = Played(on_cpu, prompt=5)
    seen = []
    class Watch(Multiples):
        def mask(self):
            seen.append((e.thought, len(self.told)))
            return super().mask()
    assert len(list(e.decode(SamplingParams(seed=1), 6, constraint=Watch(1090)))) == 6
    assert seen == [(i, i) for i in range(6)]


def test_ends(on_cpu, cupy):
    p = SamplingParams(seed=1)
    assert len(list(Played(on_cpu).decode(p, 50, constraint=Multiples(1090, 4)))) == 4
    assert list(Played(on_cpu).decode(p, 50, constraint=Multiples(1090, 0))) == []
    e, got = Played(on_cpu, n_kv=8), []
    with pytest.raises(OutOfVRAM):
        for d in e.decode(p, 50, constraint=Multiples(1090)): got.append(d.id)
    assert len(got) == 8 - 5 + 1 and e.thought == 3, 'no row of the cache beyond its end'
    with pytest.raises(Cancelled): list(Played(on_cpu).decode(p, 9, cancelled=lambda: True, constraint=Multiples(1090)))
    class Nothing(Multiples):
        def mask(self): return np.zeros(35, np.uint32)
    with pytest.raises(RequestError, match='allows no token'): list(Played(on_cpu).decode(p, 9, constraint=Nothing(1090)))
    with pytest.raises(RequestError, match='id of a token'): list(Played(on_cpu).decode(SamplingParams(logit_bias={1095: 1}), 9))


def test_jobs_leave_no_trace(on_cpu, cupy):
    "One after the other on one engine, with and without wishes"
    e = Played(on_cpu)
    for kw, constraint in ((dict(logit_bias={5: 100}), None), ({}, Multiples), (dict(frequency_penalty=2), None), ({}, None), (dict(top_logprobs=2), None)):
        e.length, e.tokens = 5, []
        e.state.set(np.array([4, 0, 0, 0, 0], np.int32)); e.row.set(script(1100, []))
        p, made = SamplingParams(seed=8, **kw), constraint and constraint(1090)
        assert [d.id for d in e.decode(p, 7, constraint=made)] == [d.id for d in reference(p, 7, constraint and constraint(1090))], kw
