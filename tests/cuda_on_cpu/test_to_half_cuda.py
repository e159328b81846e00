"The kernel that makes halves of activations, to_half.cu, run on the CPU by its own launcher, against NumPy"
import re, shutil
from types import SimpleNamespace
import numpy as np, pytest
from orcd.kernels.gemm import Gated, Fp16Activations, half_bytes, to_half
from orcd.kernels.gemv import Normed
from orcd.kernels.nvrtc import read_source
from test_blocks_cuda import compiled
from launched import RUN, take_launches
from test_gemv_cuda import FIBERS, THREADS, Array, floats

REDUCE = 'static float warp_max(float v) { for (int d = 16; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(0, v, d)); return v; }\n' \
    'static float warp_sum(float v) { for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0, v, d); return v; }\n'


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    if not shutil.which('g++'): pytest.skip('needs g++ to run device code on the CPU')
    made = {}
    def build(threads, change=('', '')):
        if (threads, change) not in made:
            source = read_source('input_prologue')
            factor = source[source.index('// 1 / root mean square'):source.index('// Element i of row')]
            kernel = re.sub(r'#include .*', '', read_source('to_half'))
            assert not change[0] or kernel.count(change[0]) == 1, 'the source has changed'
            # here `shared` is one per block: a static one does, since blocks run one after the other
            fibers = FIBERS.replace('#define __shared__', '#define __shared__ static').replace('alignas(16) unsigned char', 'alignas(16) static unsigned char').replace('256', str(threads))
            text = THREADS + fibers + 'typedef uint32_t u32; typedef uint16_t u16; typedef long long i64;\n' + REDUCE + factor + read_source('swiglu') + kernel.replace(*change) + RUN + 'RUN(to_half)'
            made[threads, change] = compiled(tmp_path_factory, text)
        return made[threads, change]
    return build


@pytest.fixture
def on_cpu(library, monkeypatch):
    "Launches go to the CPU; `change` is a mistake"
    state = SimpleNamespace(change=('', ''), threads=set())
    def take(launched):
        threads, = launched.block
        state.threads.add(threads)
        assert not launched.on(library(threads, state.change)), 'the kernel hangs'
    take_launches(monkeypatch, take)
    return state


class Buffer(Array):
    "An array that may be looked at as one of another type"
    def __getitem__(self, i): return self.of(self.a[i])
    def view(self, dtype): return self.of(self.a.view(dtype))
    @classmethod
    def of(cls, a):
        part = object.__new__(cls)
        part.a = a
        return part


def halves(rows, n):
    "Poisoned memory for rows of n halves"
    return Fp16Activations(Buffer(np.full(half_bytes(rows, n), 255, np.uint8)), rows, n)


def columns(h, rows):
    "What lies in `half`, by row and column"
    x = h.half.a.reshape(-1, h.padded_rows, 8, 8)                          # span, row, place, half
    out = np.empty((rows, h.ld), np.uint16)
    for t in range(rows):
        for c in range(8):                                          # chunk c: of 16 columns the even or the odd ones
            out[t].reshape(-1, 4, 8, 2)[:, c//2, :, c & 1] = x[:, t, c ^ (t & 7)]
    return out.view(np.float16)


def check(x, h, rows, made):
    "`made`: float64 values that the rows stand for"
    n = made.shape[1]
    got, inv = columns(h, rows).astype(np.float64), h.inv.a[:rows].astype(np.float64)[:, None]
    top = np.abs(got).max(1)
    assert ((2**13 - 4 <= top) & (top <= 2**14)).all() and (np.log2(inv) % 1 == 0).all()
    assert (got[:, n:] == 0).all()
    assert np.abs(got[:, :n]*inv - made).max() <= 2**-10.9 * np.abs(made).max()
    assert np.allclose(got[:, :n]*inv, made, rtol=2**-10.9, atol=np.abs(made).max()*1e-6)
    assert np.allclose(h.sums.a[:rows*(h.ld//32)].reshape(rows, -1), got.reshape(rows, -1, 32).sum(2), rtol=1e-6, atol=.02)


@pytest.mark.parametrize('n', [32, 40, 128, 896, 1100, 2880, 4864])
def test_rows(on_cpu, n):
    "As it is, with a norm before it, and both gates; rows that end anywhere, that are longer than what stays in registers, and that do not begin at 16 bytes"
    rng, rows = np.random.default_rng(n), 3
    for shift in (0, 1):
        x, other, w = (np.stack([floats(rng, n + 8)[shift:shift + n] for _ in range(rows)]) for _ in range(3))
        X, U, W = (Array(np.concatenate([np.full(shift, np.nan, np.float32), a.ravel()]))[shift:] for a in (x, other, w[0]))
        X.a, U.a = X.a.reshape(rows, n), U.a.reshape(rows, n)
        x64, u64 = x.astype(np.float64), other.astype(np.float64)
        normed = x64/np.sqrt((x64**2).mean(1, keepdims=True) + 1e-5)*w[0]
        for what, made in ((X, x64), (Normed(X, W, 1e-5), normed), (Gated(X, U), x64/(1 + np.exp(-x64))*u64),
                           (Gated(X, U, clamped=True), np.minimum(x64, 7)/(1 + np.exp(-1.702*np.minimum(x64, 7)))*(np.clip(u64, -7, 7) + 1))):
            h = halves(rows, n)
            to_half(what, h)
            check(what, h, rows, made)
    assert on_cpu.threads == {min(256, -(-n//128)*32)}


def test_rows_of_experts(on_cpu):
    "Rows gathered by slot; those without one are not written"
    rng, n = np.random.default_rng(0), 200
    x, slots = floats(rng, 4, n), np.array([5, -1, 0, 7, 2, 3], np.int32)
    groups = SimpleNamespace(n_slots=8, positions=6, n_expert=1, slots=Array(slots), offset=Array(np.array([0, 5], np.int32)))
    h = halves(6, n)
    to_half(Array(x), h, groups)
    got, inv = columns(h, 6).astype(np.float64), h.inv.a
    for i, s in enumerate(slots):
        if s < 0 or i >= 5: assert np.isnan(inv[i])
        else: assert np.abs(got[i, :n]*inv[i] - x[s//2]).max() < 2**-10.9*np.abs(x[s//2]).max()


@pytest.mark.parametrize('change', [('d < 8; d *= 2', 'd < 4; d *= 2'), ('h[c] | h[2 + c] << 16', 'h[c] | h[1 + c] << 16'), ('int i = first + KEPT * step; i < n', 'int i = first; i < 0'),
                                    ('i + 4 <= n', 'i <= n'), ('2 * (lane & 3)', '2 * (lane & 1)')], ids=lambda c: c[0][:12])
def test_mistakes_are_seen(on_cpu, change):
    on_cpu.change = change
    n, rng = 4870 if 'KEPT' in change[0] else 198, np.random.default_rng(3)
    x = floats(rng, 2, n)
    if 'KEPT' in change[0]: x[:, -1] = 1000
    h = halves(2, n)
    to_half(Array(x), h)
    with pytest.raises(AssertionError): check(None, h, 2, x.astype(np.float64))
