"Elementwise kernels against float64 NumPy"
import numpy as np
import pytest

cp = pytest.importorskip('cupy')
pytestmark = pytest.mark.gpu

from orcd.kernels import elementwise as ke
from orcd.files.blocks import GGMLType, dequantize
from orcd.errors import KernelError
from orcd.kernels.nvrtc import QTensor
import orcd.kernels.weight_layout   # noqa: F401  QTensor.upload is defined there
from orcd.files.quants import quantize

SIZES = 1, 31, 33, 896, 2880, 4864
rng = np.random.default_rng()


def on_device(x, pad=5):
    "A column slice of a wider array that is NaN around it"
    is_hopper = cp.full((x.shape[0], x.shape[1] + pad), cp.nan, cp.float32)
    view = is_hopper[:, 2:2 + x.shape[1]]
    view[:] = cp.asarray(x, cp.float32)
    return view


def poisoned(T, n): return on_device(np.full((T, n), np.nan))


def close(out, want, tol=1e-6):
    err = np.abs(out.get() - want).max() / max(np.abs(want).max(), 1e-30)
    assert err < tol, err


def same_bits(f, out, runs=20):
    f(); first = out.get().tobytes()
    for _ in range(runs - 1):
        out[:] = cp.nan
        f()
        assert out.get().tobytes() == first


@pytest.mark.parametrize('n', SIZES)
@pytest.mark.parametrize('T', [1, 3, 130])
def test_rms_norm(T, n):
    x, w = rng.normal(size=(T, n)).astype('f4') * 5, rng.normal(size=n).astype('f4')
    g, gw, o = on_device(x), cp.asarray(w), poisoned(T, n)
    ke.rms_norm(g, gw, 1e-5, o)
    x8 = x.astype('f8')
    close(o, x8 / np.sqrt((x8**2).mean(1, keepdims=True) + 1e-5) * w)
    alone = poisoned(1, n)
    ke.rms_norm(g[T-1:], gw, 1e-5, alone)
    assert alone.get().tobytes() == o[T-1:].get().tobytes() # a row does not know its neighbours
    same_bits(lambda: ke.rms_norm(g, gw, 1e-5, o), o)
    ke.rms_norm(g, gw, 1e-5, g)
    assert (g == o).all()


@pytest.mark.parametrize('n_head,d', [(1, 32), (7, 64), (16, 128), (3, 96), (5, 33)])
def test_head_norm(n_head, d):
    x, w = rng.normal(size=(9, n_head*d)).astype('f4'), rng.normal(size=d).astype('f4')
    o = poisoned(9, n_head*d)
    ke.head_norm(on_device(x), cp.asarray(w), n_head, 1e-6, o)
    x8 = x.astype('f8').reshape(9, n_head, d)
    close(o, (x8 / np.sqrt((x8**2).mean(2, keepdims=True) + 1e-6) * w).reshape(9, -1))


@pytest.mark.parametrize('style', ['neox', 'norm'])
@pytest.mark.parametrize('n_head,d,n_rot', [(14, 64, 64), (3, 96, 96), (2, 128, 128), (4, 32, 16), (1, 48, 48), (2, 80, 32)])
@pytest.mark.parametrize('pos', [0, 1, 1000, 4095, 131071 - 4])
def test_rope(style, n_head, d, n_rot, pos):
    T = 5
    x = rng.normal(size=(T, n_head*d)).astype('f4')
    inv = (150000.0 ** (-np.arange(n_rot//2) * 2 / n_rot)).astype('f4')
    inv[:2] *= np.float32(.73)
    state, o = cp.asarray([pos, 0, 0, 0], cp.int32), poisoned(T, n_head*d)
    g = on_device(x)
    ke.rope(g, n_head, d, cp.asarray(inv), 1.3465736, style, n_rot, state, o)
    y = x.astype('f8').reshape(T, n_head, d).copy()
    a, b = (slice(0, n_rot//2), slice(n_rot//2, n_rot)) if style == 'neox' else (slice(0, n_rot, 2), slice(1, n_rot, 2))
    angle = (pos + np.arange(T))[:, None, None] * inv.astype('f8')
    c, s = np.cos(angle) * 1.3465736, np.sin(angle) * 1.3465736
    y[..., a], y[..., b] = y[..., a]*c - y[..., b]*s, y[..., b]*c + y[..., a]*s
    close(o, y.reshape(T, -1))
    ke.rope(g, n_head, d, cp.asarray(inv), 1.3465736, style, n_rot, state, g) # in place
    assert (g == o).all()


@pytest.mark.parametrize('n', SIZES)
@pytest.mark.parametrize('T', [1, 65])
def test_gates_add_copy(T, n):
    a, b = rng.normal(size=(T, n)).astype('f4') * 6, rng.normal(size=(T, n)).astype('f4') * 6
    a.flat[0], b.flat[0] = -100, 100
    ga, gb, o, a8, b8 = on_device(a), on_device(b), poisoned(T, n), a.astype('f8'), b.astype('f8')
    ke.swiglu(ga, gb, o); close(o, a8 / (1 + np.exp(-a8)) * b8)
    g8, u8 = np.minimum(a8, 7), np.clip(b8, -7, 7)
    ke.clamped_swiglu(ga, gb, o); close(o, g8 / (1 + np.exp(-1.702*g8)) * (u8 + 1))
    same_bits(lambda: ke.clamped_swiglu(ga, gb, o), o)
    ke.add(ga, gb, o); assert (o.get() == a + b).all()
    ke.copy(ga, o); assert (o.get() == a).all()


@pytest.mark.parametrize('type', [t for t in GGMLType if t.name in 'F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K MXFP4'.split()])
def test_embed(type):
    n = 512 if type.block_size > 1 else 331
    blocks = quantize(rng.normal(size=(77, n)).astype('f4'), type)
    W, ids = QTensor.upload(blocks, type, (77, n)), np.array([0, 76, 5, 5, 33], np.int32)
    o = poisoned(5, n)
    ke.embed(W, cp.asarray(ids), o)
    assert (o.get() == dequantize(blocks, type)[ids]).all()
    state = cp.asarray([9, 76, 0, 0], cp.int32)
    ke.embed(W, state[1:2], o[:1])
    assert (o[0].get() == dequantize(blocks, type)[76]).all()
    ke.embed(W, cp.asarray([-1, 77], cp.int32), o[:2])
    assert cp.isnan(o[:2]).all()


def test_refusals():
    x = cp.zeros((2, 8), cp.float32)
    for bad in (lambda: ke.rms_norm(x, x[0, :4], 1e-5, x), lambda: ke.swiglu(x, x[:1], x), lambda: ke.copy(x.T, x.T),
                lambda: ke.add(x, x.astype(cp.float64), x)):
        with pytest.raises(KernelError): bad()
