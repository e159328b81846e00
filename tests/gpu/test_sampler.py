"The GPU sampler draws the tokens of the NumPy sampler"
import numpy as np
import pytest

cp = pytest.importorskip('cupy')
pytestmark = pytest.mark.gpu

from orcd.kernels import sampler as ks
from orcd.text.sampling import Sampler, SamplingParams, kept_simply, prepare
from random_draws import random_logits, some


class Device:
    def __init__(self, n_vocab, n_valid, ring=8):
        self.n_vocab, self.n_valid = n_vocab, n_valid
        size, words = ks.workspace_bytes(n_vocab)
        self.work, self.seen = cp.full(size, 0xAA, cp.uint8), cp.full(words // 4, 0xFFFFFFFF, cp.uint32)
        self.state, self.ring, self.params = cp.zeros(4, cp.int32), cp.zeros(ring, cp.uint64), cp.zeros(40, cp.uint8)

    def begin(self, p, pos=7):
        self.params.set(ks.pack_params(p, self.n_valid))
        self.state.set(np.array([pos, -1, 0, 0], np.int32))
        ks.reset(self.work, self.seen, self.n_vocab)

    def draw(self, g, stream=None): ks.draw(g, self.params, self.work, self.state, self.seen, self.ring, stream=stream)


def random_params(rng):
    return SamplingParams(temperature=some(rng, 0, .05, .7, 1., 2.), top_k=int(some(rng, 0, 1, 2, 40, 1000, 10**6)), top_p=some(rng, 0., .1, .5, .9, .999, 1.),
        min_p=some(rng, 0., 0., .05, .5, 1.), repetition_penalty=some(rng, 1., 1., .5, 1.3), seed=int(rng.integers(2**63)))


@pytest.mark.parametrize('n_vocab,n_valid,jobs', [(1, 1, 20), (33, 31, 300), (1024, 1000, 300), (4099, 4099, 200), (151936, 151665, 60), (201088, 200019, 60)])
def test_same_tokens_as_numpy(n_vocab, n_valid, jobs):
    rng = np.random.default_rng()
    d, cpu = Device(n_vocab, n_valid), Sampler(n_vocab, n_valid)
    for _ in range(jobs):
        p, x = random_params(rng), random_logits(rng, n_vocab)
        d.begin(p); cpu.reset(p)
        want, g = [cpu.draw(x, step) for step in range(6)], cp.asarray(x)
        for _ in range(6): d.draw(g)
        ids, lp = ks.unpack_ring(d.ring.get()[:6])
        assert ids.tolist() == [i for i, *_ in want], (p, x)
        assert np.allclose(lp, [v.logprob for v in want], rtol=1e-5, atol=1e-4, equal_nan=True), (p, lp, want)
        assert d.state.get().tolist() == [13, want[-1][0], 6, 0]


class Shaped(Device):
    "With the kernels around the draw"
    def __init__(self, n_vocab, n_valid, ring=8):
        super().__init__(n_vocab, n_valid, ring)
        self.memory = {name: cp.full(shape, 255, dtype) for name, (shape, dtype) in ks.shape_memory(n_vocab, ring).items()}
        self.history = cp.full(64, -7, cp.int32)

    def begin(self, p, pos=7):
        super().begin(p, pos)
        self.memory['shape'].set(ks.pack_shape(p, self.n_valid))

    def draw(self, g, mask=None, stream=None):
        self.memory['mask'][0] = mask is not None
        if mask is not None: self.memory['mask'][1:1 + len(mask)] = cp.asarray(mask)
        ks.shape_logits(g, self.memory, self.state, self.history, stream=stream)
        ks.draw(self.memory['shaped'], self.params, self.work, self.state, self.seen, self.ring, stream=stream)
        ks.own_logprobs(g, self.memory, self.state, self.ring, stream=stream)


def random_mask(rng, n_valid):
    "None, a few tokens, or nearly all"
    kind, words = rng.integers(3), -(-n_valid//32)
    if kind == 0: return None
    may = np.zeros(32*words, bool)
    may[rng.integers(n_valid, size=4)] = True
    if kind == 2: may[may.argmax() + 1:] ^= True
    return np.packbits(may, bitorder='little').view(np.uint32)


@pytest.mark.parametrize('n_vocab,n_valid,jobs', [(1, 1, 20), (33, 31, 200), (1025, 1025, 100), (4099, 4099, 100), (201088, 200019, 40), (300001, 300000, 20)])
def test_masks_bias_penalties_and_the_likeliest(n_vocab, n_valid, jobs):
    rng = np.random.default_rng()
    d, cpu = Shaped(n_vocab, n_valid), Sampler(n_vocab, n_valid)
    for _ in range(jobs):
        ids = rng.choice(n_valid, min(n_valid, int(some(rng, 0, 3, 300))), replace=False)
        kw = dict(random_params(rng).__dict__, logit_bias={int(i): float(rng.uniform(-9, 9)) for i in ids}, frequency_penalty=some(rng, 0., -2., .3), presence_penalty=some(rng, 0., 1.7))
        p = SamplingParams(**{k: kw[k] for k in SamplingParams.__dataclass_fields__} | dict(top_logprobs=int(some(rng, 0, 1, 20))))
        d.begin(p); cpu.reset(p)
        for step in range(10):              # more than the ring holds
            x, mask = random_logits(rng, n_vocab), random_mask(rng, n_valid)
            want = cpu.draw(x, step, mask)
            d.draw(cp.asarray(x), mask)
            ids, lp = ks.unpack_ring(d.ring.get()[step % 8:step % 8 + 1])
            top = ks.unpack_top(d.memory['top'].get()[step % 8], p.n_top)
            assert ids[0] == want.id and [i for i, _ in top] == [i for i, _ in want.top], (p, x, mask)
            assert np.allclose([lp[0], *(v for _, v in top)], [want.logprob, *(v for _, v in want.top)], rtol=1e-5, atol=1e-4), (p, x)


def test_every_kept_token_appears_and_no_other():
    rng = np.random.default_rng(1)
    x = np.round(rng.normal(size=500).astype('f4') * 2)
    p = SamplingParams(top_k=37, top_p=.95, seed=5)
    d, g = Device(500, 500, ring=4096), cp.asarray(x)
    d.begin(p)
    for _ in range(4096): d.draw(g)
    ids, _ = ks.unpack_ring(d.ring.get())
    assert set(ids.tolist()) == set(kept_simply(prepare(x, p), p).tolist())


def test_ring_wraps_and_done_stops():
    d, g = Device(100, 100, ring=4), cp.arange(100, dtype=cp.float32)
    d.begin(SamplingParams(temperature=0, repetition_penalty=1.9))
    cpu = Sampler(100); cpu.reset(SamplingParams(temperature=0, repetition_penalty=1.9))
    want = [cpu.draw(g.get(), i)[0] for i in range(10)]
    for _ in range(10): d.draw(g)
    ids, _ = ks.unpack_ring(d.ring.get())
    assert ids.tolist() == [want[8], want[9], want[6], want[7]]
    d.state[3] = 1
    d.draw(g)
    assert d.state.get().tolist() == [17, want[9], 10, 1]


def test_one_graph_for_all_parameters():
    rng = np.random.default_rng(2)
    n = 151936
    d, cpu, g, stream = Device(n, n), Sampler(n), cp.empty(n, cp.float32), cp.cuda.Stream()
    with stream:
        d.begin(SamplingParams()); d.draw(g, stream); stream.synchronize()
        stream.begin_capture(); d.draw(g, stream); graph = stream.end_capture()
        for _ in range(20):
            p, x = random_params(rng), random_logits(rng, n)
            g.set(x); d.begin(p); cpu.reset(p)
            for step in range(3):
                graph.launch(stream)
                stream.synchronize()
                assert int(d.state[1]) == cpu.draw(x, step)[0], p
    stream.synchronize()


def test_pinned_ring():
    "The host reads the ring without a copy"
    d, g = Device(100, 100), cp.arange(100, dtype=cp.float32)
    host = cp.cuda.alloc_pinned_memory(64)
    view = np.frombuffer(host, np.uint64, 8)
    view[:] = 2**64 - 1
    d.ring = cp.ndarray(8, cp.uint64, cp.cuda.MemoryPointer(cp.cuda.UnownedMemory(host.ptr, 64, host), 0))
    d.begin(SamplingParams(temperature=0))
    d.draw(g); cp.cuda.Device().synchronize()
    ids, lp = ks.unpack_ring(view)
    assert ids[0] == 99 and ids[1] == -1 and abs(lp[0] + np.log(np.exp(np.arange(100.) - 99).sum())) < 1e-5
