"Quantised GEMV and GEMM against float64 NumPy on the reference decoder's weights, and against gguf-py's"
import numpy as np, pytest
from orcd.blocks import GGMLType, dequantize
from orcd.errors import KernelError

pytestmark = pytest.mark.gpu
TYPES = list(GGMLType)
ids = lambda t: t.name


@pytest.fixture(scope='module')
def cp(): return pytest.importorskip('cupy')


def columns(t, k): return k * t.block_size if t.block_size > 1 else 37 * k


def gemv_out(cp, t, blocks, x, n_out, bias=None, residual=None, kernel=None):
    from orcd.k_gemv import gemv
    from orcd.nvrtc import QTensor
    W, out = QTensor.upload(blocks, t, (n_out, x.shape[1])), cp.full((len(x), n_out), np.nan, cp.float32)
    return gemv(W, cp.asarray(x), out, *(None if a is None else cp.asarray(a) for a in (bias, residual))).get()


def gemm_out(cp, t, blocks, x, n_out, bias=None, residual=None):
    from orcd.k_gemm import HalfRows, gemm, half_bytes, to_half
    from orcd.nvrtc import QTensor
    rows, n_in = x.shape
    W, out = QTensor.upload(blocks, t, (n_out, n_in)), cp.full((rows, n_out), np.nan, cp.float32)
    h = to_half(cp.asarray(x), HalfRows(cp.full(half_bytes(rows, n_in), 255, cp.uint8), rows, n_in))
    return gemm(W, h, out, *(None if a is None else cp.asarray(a) for a in (bias, residual))).get()


def by_norm(y, ref): return np.linalg.norm(y - ref) / np.linalg.norm(ref)


def inputs(t, rows, n_out, n_in):
    from orcd.k_gemv import random_blocks
    rng = np.random.default_rng()
    return random_blocks(t, n_out, n_in, rng), rng.standard_normal((rows, n_in), np.float32), rng.standard_normal(n_out, np.float32), \
        rng.standard_normal((rows, n_out), np.float32)


@pytest.mark.parametrize('t', TYPES, ids=ids)
@pytest.mark.parametrize('n_out,k,rows', [(1, 1, 1), (31, 2, 4), (33, 7, 1), (896, 19, 1), (8193, 3, 1), (32801, 1, 2)])
def test_gemv(cp, t, n_out, k, rows):
    from orcd.k_gemv import product64
    n_in = columns(t, k)
    blocks, x, bias, res = inputs(t, rows, n_out, n_in)
    y, size = product64(blocks, t, x)
    out = gemv_out(cp, t, blocks, x, n_out, bias, res)
    assert (abs(out - (y + bias + res)) <= 1e-5 * (size + abs(bias) + abs(res))).all()
    plain = gemv_out(cp, t, blocks, x, n_out)
    assert (abs(plain - y) <= 1e-5 * size).all()


@pytest.mark.parametrize('t', [GGMLType.Q8_0, GGMLType.Q5_0], ids=ids)
def test_gemv_vocabulary(cp, t):
    from orcd.k_gemv import product64
    blocks, x, *_ = inputs(t, 1, 151936, 896)
    y, size = product64(blocks, t, x)
    assert (abs(gemv_out(cp, t, blocks, x, 151936) - y) <= 1e-5 * size).all()


@pytest.mark.parametrize('t', TYPES, ids=ids)
@pytest.mark.parametrize('rows,n_out,k', [(1, 1, 1), (2, 31, 2), (33, 33, 7), (127, 64, 3), (129, 65, 5), (300, 896, 2)])
def test_gemm(cp, t, rows, n_out, k):
    from orcd.k_gemv import product64
    blocks, x, bias, res = inputs(t, rows, n_out, columns(t, k))
    y, size = product64(blocks, t, x)
    out, fused = gemm_out(cp, t, blocks, x, n_out), gemm_out(cp, t, blocks, x, n_out, bias, res)
    assert (abs(out - y) <= 1e-3 * size).all()
    assert (abs(fused - (y + bias + res)) <= 1e-3 * size + 1e-6 * (abs(bias) + abs(res))).all()
    if y.size > 30: assert by_norm(out, y) < 2e-3 and by_norm(fused, y + bias + res) < 2e-3     # a single number may cancel
    if t in (GGMLType.F32, GGMLType.BF16): assert (abs(out - y) <= 1e-5 * size).all()


@pytest.mark.parametrize('t', TYPES, ids=ids)
def test_exact_on_half_activations(cp, t):
    "With activations that are halves, only FP32 sums are rounded: no weight is"
    from orcd.k_gemv import product64
    blocks, x, *_ = inputs(t, 70, 90, columns(t, 4))
    x = x.astype(np.float16).astype(np.float32)
    y, size = product64(blocks, t, x)
    assert (abs(gemm_out(cp, t, blocks, x, 90) - y) <= 1e-5 * size).all()


@pytest.mark.parametrize('t', TYPES, ids=ids)
def test_same_bits(cp, t):
    "20 runs; a row alone, at another place, in a batch of another size"
    blocks, x, *_ = inputs(t, 140, 100, columns(t, 4))
    for f in (gemv_out, gemm_out):
        first = f(cp, t, blocks, x, 100)
        for _ in range(19): assert np.array_equal(f(cp, t, blocks, x, 100), first)
        for rows in ([0], [139], [128, 5, 127], list(range(64, 140))): assert np.array_equal(f(cp, t, blocks, x[rows], 100), first[rows])


@pytest.mark.parametrize('t', TYPES, ids=ids)
def test_views(cp, t):
    "Inputs and outputs that are columns of wider arrays; in-place residual"
    from orcd.k_gemm import HalfRows, gemm, half_bytes, to_half
    from orcd.k_gemv import gemv
    from orcd.nvrtc import QTensor
    n_in, n_out, rows = columns(t, 2), 45, 9
    blocks, x, bias, res = inputs(t, rows, n_out, n_in)
    W = QTensor.upload(blocks, t, (n_out, n_in))
    for shift in (4, 3):                # rows at 16 bytes and not
        wide, target = cp.full((rows, n_in + 7 + shift), np.nan, cp.float32), cp.full((rows, n_out + 5), 7, cp.float32)
        xv, ov = wide[:, shift:shift+n_in], target[:, 2:2+n_out]
        xv[...] = cp.asarray(x)
        ov[...] = cp.asarray(res)
        gemv(W, xv, ov, cp.asarray(bias), ov)
        a = ov.get()
        assert np.array_equal(a, gemv_out(cp, t, blocks, x, n_out, bias, res))
        ov[...] = cp.asarray(res)
        h = to_half(xv, HalfRows(cp.empty(half_bytes(rows, n_in), cp.uint8), rows, n_in))
        gemm(W, h, ov, cp.asarray(bias), ov)
        assert np.array_equal(ov.get(), gemm_out(cp, t, blocks, x, n_out, bias, res))
        edge = target.get()
        assert (edge[:, :2] == 7).all() and (edge[:, 2+n_out:] == 7).all()      # nothing beside the view is written


@pytest.mark.parametrize('t', [t for t in TYPES if t.block_size > 1], ids=ids)
def test_against_gguf_py(cp, t):
    "The same, with weights that another decoder gives"
    gguf = pytest.importorskip('gguf')
    blocks, x, *_ = inputs(t, 20, 50, columns(t, 3))
    w = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(int(t))).astype(np.float64)
    assert (abs(gemv_out(cp, t, blocks, x, 50) - x @ w.T) <= 1e-5 * (abs(x) @ abs(w).T)).all()
    assert by_norm(gemm_out(cp, t, blocks, x, 50), x @ w.T) < 2e-3


@pytest.mark.parametrize('t', [GGMLType.Q4_K, GGMLType.Q8_0, GGMLType.MXFP4, GGMLType.F16], ids=ids)
def test_large_and_small_activations(cp, t):
    "A half would overflow or vanish; the scale of each row prevents it. A row of zeros stays zero."
    from orcd.k_gemv import product64
    blocks, x, *_ = inputs(t, 6, 40, columns(t, 4))
    x *= np.float32([[1e-30], [1e-6], [1], [1e6], [1e25], [0]])
    y, _ = product64(blocks, t, x)
    out = gemm_out(cp, t, blocks, x, 40)
    for r in range(5): assert by_norm(out[r], y[r]) < 2e-3
    assert (out[5] == 0).all()


# ---- MXFP4

def mxfp4_rows(e, n_out=48, n_in=320):
    "Every code (8: negative zero in the OCP table, zero here) with one exponent; the small codes for the largest, which would overflow"
    rng = np.random.default_rng()
    b = rng.integers(0, 256, (n_out, n_in // 32, 17), dtype=np.uint8)
    if e > 252: b &= 0xBB
    b[..., 0] = e
    return b.reshape(n_out, -1)


@pytest.mark.parametrize('e', [0, 1, 2, 127, 128, 253, 254])
def test_mxfp4_exponents(cp, e):
    t, blocks = GGMLType.MXFP4, mxfp4_rows(e)
    x = np.random.default_rng().standard_normal((5, 320)).astype(np.float32)
    if e > 250: x *= np.float32(2**-20)
    if e < 3: x *= np.float32(2**20)
    w = dequantize(blocks, t).astype(np.float64)
    y = x.astype(np.float64) @ w.T
    for f, bound in ((gemv_out, 1e-5), (gemm_out, 2e-3)): assert by_norm(f(cp, t, blocks, x, 48).astype(np.float64), y) < bound


def test_mxfp4_negative_zero(cp):
    blocks = np.full((3, 17), 0x88, np.uint8)
    blocks[:, 0] = 130
    x = np.random.default_rng().standard_normal((2, 32)).astype(np.float32)
    for f in (gemv_out, gemm_out): assert (f(cp, GGMLType.MXFP4, blocks, x, 3) == 0).all()


MUTATIONS = dict(   # name -> (what the source says, what a mistake would say)
    nibbles=('__byte_perm(lo, hi, 0x6420), __byte_perm(lo, hi, 0x7531)', '__byte_perm(lo, hi, 0x7531), __byte_perm(lo, hi, 0x6420)'),
    scale_at=('r.q.load(p + 1 + 4 * (u & 3))', 'r.q.load(p + 4 * (u & 3))'),
    table=('0x18141210', '0x18161210'),
    exponent=('(e - 1) << 23', 'e << 23'))


def inlined(name):
    "A kernel's source with its includes in place"
    import re
    from orcd.nvrtc import read_source
    return re.sub(r'#include "(\w+)\.cu"', lambda m: inlined(m[1]), read_source(name))


def mxfp4_errors(cp, mutation=None):
    "GEMV and GEMM error by norm with the shipped source, or with one mistake in it"
    from cupy.cuda.function import Module
    from orcd.k_gemm import HalfRows, half_bytes, to_half
    from orcd.k_gemv import random_blocks
    from orcd.nvrtc import compile_text, device_arch
    rng, n_out, n_in, rows = np.random.default_rng(0), 96, 320, 8
    blocks, x = random_blocks(GGMLType.MXFP4, n_out, n_in, rng), rng.standard_normal((rows, n_in), np.float32)
    y = x.astype(np.float64) @ dequantize(blocks, GGMLType.MXFP4).astype(np.float64).T
    W, xd, h = cp.asarray(blocks.ravel()), cp.asarray(x), HalfRows(cp.empty(half_bytes(rows, n_in), cp.uint8), rows, n_in)
    to_half(xd, h)
    out, errors = cp.full((2, rows, n_out), np.nan, cp.float32), []
    for i, (name, function) in enumerate((('gemv', 'gemv_mxfp4_1'), ('gemm', 'gemm_mxfp4'))):
        source = inlined(name)
        for all_types, one in (('EACH_TYPE(KERNELS)', 'KERNELS(mxfp4, MXFP4)'), ('KERNEL(f16, F16)\nEACH_QUANT(KERNEL)', 'KERNEL(mxfp4, MXFP4)')):
            source = source.replace(all_types, one)
        if mutation:
            old, new = MUTATIONS[mutation]
            assert source.count(old) == 1, f'{mutation}: the source has changed'
            source = source.replace(old, new)
        m = Module()
        m.load(compile_text(name, source, device_arch()).cubin)
        l, s = np.int64, np.int32
        common = (out[i], np.uintp(0), np.uintp(0))
        if name == 'gemv': grid, args = (n_out // 8, rows), (W, xd, *common, s(n_out), s(n_in), l(n_in), l(n_out), l(0), s(1))
        else: grid, args = (1, 2), (W, h.half, h.inv, h.sums, *common, s(rows), s(n_out), s(n_in), s(h.ld), l(n_out), l(0))
        m.get_function(function)(grid, (256,), args)
        errors.append(by_norm(out[i].get(), y))
    return errors


def test_mxfp4_mistakes_are_seen(cp):
    good = mxfp4_errors(cp)
    assert good[0] < 1e-5 and good[1] < 2e-3
    for name in MUTATIONS:
        for e in mxfp4_errors(cp, name): assert not e < 0.01, name


# ---- wrong calls

def test_refused(cp):
    from orcd.k_gemm import HalfRows, gemm, half_bytes, to_half
    from orcd.k_gemv import gemv
    from orcd.nvrtc import QTensor
    blocks, x, bias, _ = inputs(GGMLType.Q8_0, 2, 32, 64)
    W, x, out = QTensor.upload(blocks, GGMLType.Q8_0, (32, 64)), cp.asarray(x), cp.empty((2, 32), cp.float32)
    z = lambda *s, d=cp.float32: cp.zeros(s, d)
    calls = [lambda: gemv(W, z(2, 63), out), lambda: gemv(W, z(2, 64, d=cp.float64), out), lambda: gemv(W, x, z(3, 32)),
        lambda: gemv(W, x, out, z(31)), lambda: gemv(W, x, out, None, z(2, 31)), lambda: gemv(W, z(2, 128)[:, ::2], out),
        lambda: gemv(W, z(64, 2).T, out), lambda: gemv(QTensor.upload(blocks, GGMLType.Q8_0, (2, 16, 64)), x, out),
        lambda: HalfRows(z(100, d=cp.uint8), 2, 64), lambda: gemm(W, HalfRows(z(5000, d=cp.uint8), 2, 64), out),
        lambda: gemm(W, to_half(z(2, 96), HalfRows(z(5000, d=cp.uint8), 2, 96)), out)]
    for call in calls:
        with pytest.raises(KernelError): call()
    assert half_bytes(1, 32) == half_bytes(1, 64)
