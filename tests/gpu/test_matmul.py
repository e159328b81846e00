"Quantised GEMV and GEMM against float64 NumPy on the reference decoder's weights, and against gguf-py's"
import numpy as np, pytest
from orcd.files.blocks import GGMLType, dequantize
from orcd.errors import KernelError

pytestmark = pytest.mark.gpu
TYPES = list(GGMLType)
ids = lambda t: t.name


@pytest.fixture(scope='module')
def cp(): return pytest.importorskip('cupy')


def columns(t, k): return k * t.block_size if t.block_size > 1 else 37 * k


def gemv_out(cp, t, blocks, x, n_out, bias=None, residual=None, kernel=None):
    from orcd.kernels.gemv import gemv
    from orcd.kernels.nvrtc import QTensor
    W, out = QTensor.upload(blocks, t, (n_out, x.shape[1])), cp.full((len(x), n_out), np.nan, cp.float32)
    return gemv(W, cp.asarray(x), out, *(None if a is None else cp.asarray(a) for a in (bias, residual))).get()


def gemm_out(cp, t, blocks, x, n_out, bias=None, residual=None):
    from orcd.kernels.gemm import Fp16Activations, gemm, half_bytes, to_half
    from orcd.kernels.nvrtc import QTensor
    rows, n_in = x.shape
    W, out = QTensor.upload(blocks, t, (n_out, n_in)), cp.full((rows, n_out), np.nan, cp.float32)
    h = to_half(cp.asarray(x), Fp16Activations(cp.full(half_bytes(rows, n_in), 255, cp.uint8), rows, n_in))
    return gemm(W, h, out, *(None if a is None else cp.asarray(a) for a in (bias, residual))).get()


def wide_out(cp, t, blocks, x, n_out, bias=None, residual=None):
    "The same with Hopper's kernels, where there are any"
    from orcd.kernels.gemm import Fp16Activations, half_bytes, to_half
    from orcd.kernels.wgmma import gemms, is_hopper, with_row_max_exponents
    from orcd.kernels.nvrtc import QTensor
    if t.block_size == 1 or not is_hopper(): pytest.skip('no kernel of its own')
    rows, n_in = x.shape
    W, out = with_row_max_exponents(QTensor.upload(blocks, t, (n_out, n_in))), cp.full((rows, n_out), np.nan, cp.float32)
    h = to_half(cp.asarray(x), Fp16Activations(cp.full(half_bytes(rows, n_in), 255, cp.uint8), rows, n_in))
    gemms([(W, out, None if bias is None else cp.asarray(bias))], h, None if residual is None else cp.asarray(residual))
    return out.get()


def by_norm(y, ref): return np.linalg.norm(y - ref) / np.linalg.norm(ref)


def inputs(t, rows, n_out, n_in):
    from orcd.kernels.gemv import random_blocks
    rng = np.random.default_rng()
    return random_blocks(t, n_out, n_in, rng), rng.standard_normal((rows, n_in), np.float32), rng.standard_normal(n_out, np.float32), \
        rng.standard_normal((rows, n_out), np.float32)


@pytest.mark.parametrize('t', TYPES, ids=ids)
@pytest.mark.parametrize('n_out,k,rows', [(1, 1, 1), (31, 2, 4), (33, 7, 1), (896, 19, 1), (8193, 3, 1), (32801, 1, 2)])
def test_gemv(cp, t, n_out, k, rows):
    from orcd.kernels.gemv import product64
    n_in = columns(t, k)
    blocks, x, bias, res = inputs(t, rows, n_out, n_in)
    y, size = product64(blocks, t, x)
    out = gemv_out(cp, t, blocks, x, n_out, bias, res)
    assert (abs(out - (y + bias + res)) <= 1e-5 * (size + abs(bias) + abs(res))).all()
    plain = gemv_out(cp, t, blocks, x, n_out)
    assert (abs(plain - y) <= 1e-5 * size).all()


@pytest.mark.parametrize('t', [GGMLType.Q8_0, GGMLType.Q5_0], ids=ids)
def test_gemv_vocabulary(cp, t):
    from orcd.kernels.gemv import product64
    blocks, x, *_ = inputs(t, 1, 151936, 896)
    y, size = product64(blocks, t, x)
    assert (abs(gemv_out(cp, t, blocks, x, 151936) - y) <= 1e-5 * size).all()


both = pytest.mark.parametrize('product', [gemm_out, wide_out])


@both
@pytest.mark.parametrize('t', TYPES, ids=ids)
@pytest.mark.parametrize('rows,n_out,k', [(1, 1, 1), (2, 31, 2), (33, 33, 7), (127, 64, 3), (129, 65, 5), (300, 896, 2), (140, 1100, 3), (260, 2200, 1)])
def test_gemm(cp, t, rows, n_out, k, product):
    from orcd.kernels.gemv import product64
    blocks, x, bias, res = inputs(t, rows, n_out, columns(t, k))
    y, size = product64(blocks, t, x)
    out, fused = product(cp, t, blocks, x, n_out), product(cp, t, blocks, x, n_out, bias, res)
    assert (abs(out - y) <= 1e-3 * size).all()
    assert (abs(fused - (y + bias + res)) <= 1e-3 * size + 1e-6 * (abs(bias) + abs(res))).all()
    if y.size > 30: assert by_norm(out, y) < 2e-3 and by_norm(fused, y + bias + res) < 2e-3     # a single number may cancel
    if t in (GGMLType.F32, GGMLType.BF16): assert (abs(out - y) <= 1e-5 * size).all()


@pytest.mark.parametrize('t', TYPES, ids=ids)
def test_exact_on_half_activations(cp, t):
    "With activations that are halves, only FP32 sums are rounded: no weight is"
    from orcd.kernels.gemv import product64
    blocks, x, *_ = inputs(t, 70, 90, columns(t, 4))
    x = x.astype(np.float16).astype(np.float32)
    y, size = product64(blocks, t, x)
    assert (abs(gemm_out(cp, t, blocks, x, 90) - y) <= 1e-5 * size).all()


@pytest.mark.parametrize('t', TYPES, ids=ids)
def test_same_bits(cp, t):
    "20 runs; a row alone, at another place, in a batch of another size"
    blocks, x, *_ = inputs(t, 140, 100, columns(t, 4))
    for f in (gemv_out, gemm_out, wide_out):
        if f is wide_out and t.block_size == 1: continue
        first = f(cp, t, blocks, x, 100)
        for _ in range(19): assert np.array_equal(f(cp, t, blocks, x, 100), first)
        for rows in ([0], [139], [128, 5, 127], list(range(64, 140))): assert np.array_equal(f(cp, t, blocks, x[rows], 100), first[rows])


@pytest.mark.parametrize('t', [GGMLType.Q4_K, GGMLType.Q5_0, GGMLType.MXFP4], ids=ids)
@pytest.mark.parametrize('n_out', [896, 1100, 2200])
def test_same_bits_in_any_tile(cp, t, n_out):
    "Hopper's tiles of 64, 128 and 256 tokens, and rows dealt to one, two or four warpgroups"
    blocks, x, *_ = inputs(t, 700, n_out, columns(t, 20 if t.block_size == 32 else 4))
    whole = wide_out(cp, t, blocks, x, n_out)
    for rows in (slice(0, 1), slice(40, 100), slice(100, 230), slice(400, 700)): assert np.array_equal(wide_out(cp, t, blocks, x[rows], n_out), whole[rows])


@pytest.mark.parametrize('types', [('Q5_0', 'Q5_0', 'Q8_0'), ('Q4_K', 'Q6_K'), ('MXFP4', 'Q4_1', 'Q5_1', 'Q8_0'), ('F16', 'Q4_0')], ids=str)
def test_gemms(cp, types):
    "Several matrices in a launch"
    from orcd.kernels.gemm import Fp16Activations, half_bytes, to_half
    from orcd.kernels.gemv import Normed, product64, random_blocks
    from orcd.kernels.wgmma import gemms, with_row_max_exponents
    from orcd.kernels.nvrtc import QTensor
    rng, rows, n_in = np.random.default_rng(), 77, 768
    x, w = rng.standard_normal((rows, n_in), np.float32), rng.standard_normal(n_in, np.float32)
    parts = [(GGMLType[t], random_blocks(GGMLType[t], n, n_in, rng), n) for t, n in zip(types, (150, 33, 64, 16))]
    jobs = [(with_row_max_exponents(QTensor.upload(b, t, (n, n_in))), cp.full((rows, n), np.nan, cp.float32), cp.asarray(rng.standard_normal(n, np.float32))) for t, b, n in parts]
    gemms(jobs, to_half(Normed(cp.asarray(x), cp.asarray(w), 1e-6), Fp16Activations(cp.full(half_bytes(rows, n_in), 255, cp.uint8), rows, n_in)))
    d = x.astype(np.float64)
    d = d*w/np.sqrt((d*d).mean(1, keepdims=True) + 1e-6)
    for (t, b, n), (_, out, bias) in zip(parts, jobs): assert by_norm(out.get(), product64(b, t, d)[0] + bias.get()) < 2e-3, t.name


def unpacked(h):
    "Halves of `Fp16Activations` as float64 (rows, n_in)"
    a = h.half.get().view(np.float16).reshape(h.ld//64, h.padded_rows, 8, 8)[:, :h.rows]              # span, row, place, of a chunk's 8 halves
    place = np.arange(8) ^ (np.arange(h.rows) & 7)[:, None]                                      # where chunk c of a row is
    a = np.take_along_axis(a, place[None, :, :, None], 2).reshape(h.ld//64, h.rows, 4, 2, 8)     # 16 columns: the even ones, then the odd ones
    a = a.swapaxes(3, 4).reshape(h.ld//64, h.rows, 64).swapaxes(0, 1).reshape(h.rows, h.ld)
    assert (a[:, h.n_in:] == 0).all(), 'columns beyond the last must be zero'
    return a[:, :h.n_in].astype(np.float64) * h.inv.get()[:h.rows, None]


@pytest.mark.parametrize('rows,n', [(1, 32), (5, 37), (130, 896), (9, 4864)])
def test_halves(cp, rows, n):
    from orcd.kernels.gemm import Fp16Activations, half_bytes, to_half
    rng = np.random.default_rng()
    x, w, up = (rng.standard_normal(s).astype(np.float32)*3 for s in ((rows, n), n, (rows, n)))
    for lazy, v in vectors(cp, x, w) + gates(cp, x, up):
        h = to_half(lazy, Fp16Activations(cp.full(half_bytes(rows, n), 255, cp.uint8), rows, n))
        got = unpacked(h)
        assert (abs(got - v) <= 2.0**-11*abs(v) + 2.0**-20*abs(v).max(1, keepdims=True)).all()
        sums = h.sums.get()[:rows*h.ld//32].reshape(rows, -1) * h.inv.get()[:rows, None]
        whole = np.pad(got, ((0, 0), (0, h.ld - n))).reshape(rows, -1, 32)
        assert (abs(sums - whole.sum(2)) <= 1e-5*abs(whole).sum(2)).all()


@pytest.mark.parametrize('t', [t for t in TYPES if t.block_size > 1], ids=ids)
@pytest.mark.parametrize('rows,n,k', [(1, 64, 1), (150, 208, 3), (300, 1104, 1)])
def test_gated(cp, t, rows, n, k):
    "Gate and up in one launch, also when they are one matrix; a token alone and in company"
    from orcd.kernels.gemm import Fp16Activations, half_bytes, to_half
    from orcd.kernels.gemv import product64, random_blocks
    from orcd.kernels.wgmma import Rows, gated, is_hopper, with_row_max_exponents
    from orcd.kernels.nvrtc import QTensor
    if not is_hopper(): pytest.skip('no kernel of its own')
    rng, n_in = np.random.default_rng(), columns(t, k)
    blocks, x, bias = random_blocks(t, 2*n, n_in, rng), rng.standard_normal((rows, n_in), np.float32)/np.float32(n_in**.5), rng.standard_normal(2*n, np.float32)
    one = with_row_max_exponents(QTensor.upload(blocks, t, (2*n, n_in)))
    two = [with_row_max_exponents(QTensor.upload(b, t, (n, n_in))) for b in (blocks[:n], blocks[n:])]
    biases = cp.asarray(bias[:n]), cp.asarray(bias[n:])

    def run(x, gate, up):
        buffer = lambda m: Fp16Activations(cp.full(half_bytes(len(x), m), 255, cp.uint8), len(x), m)
        return unpacked(gated(gate, up, to_half(cp.asarray(x), buffer(n_in)), buffer(n), *biases))
    y = product64(blocks, t, x)[0] + bias
    y = y[:, :n]/(1 + np.exp(-y[:, :n]))*y[:, n:]
    out = run(x, *two)
    assert by_norm(out, y) < 2e-3
    assert np.array_equal(run(x, Rows(one, 0, n), Rows(one, n, n)), out)
    some = [0, rows//2, rows - 1]
    assert np.array_equal(run(x[some], *two), out[some])


@pytest.mark.parametrize('t', TYPES, ids=ids)
def test_views(cp, t):
    "Inputs and outputs that are columns of wider arrays; in-place residual"
    from orcd.kernels.gemm import Fp16Activations, gemm, half_bytes, to_half
    from orcd.kernels.gemv import gemv
    from orcd.kernels.nvrtc import QTensor
    n_in, n_out, rows = columns(t, 2), 45, 9
    blocks, x, bias, res = inputs(t, rows, n_out, n_in)
    W = QTensor.upload(blocks, t, (n_out, n_in))
    for shift in (4, 3):                # rows at 16 bytes and not
        is_hopper, target = cp.full((rows, n_in + 4 + shift), np.nan, cp.float32), cp.full((rows, n_out + 5), 7, cp.float32)
        xv, ov = is_hopper[:, shift:shift+n_in], target[:, 2:2+n_out]
        xv[...] = cp.asarray(x)
        ov[...] = cp.asarray(res)
        if is_hopper.strides[0] % 16 == 0 and shift == 4 or n_in % 4:
            gemv(W, xv, ov, cp.asarray(bias), ov)
            assert np.array_equal(ov.get(), gemv_out(cp, t, blocks, x, n_out, bias, res))
        else:
            with pytest.raises(KernelError, match='multiples of 16'): gemv(W, xv, ov, cp.asarray(bias), ov)
        ov[...] = cp.asarray(res)
        h = to_half(xv, Fp16Activations(cp.empty(half_bytes(rows, n_in), cp.uint8), rows, n_in))
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


@both
@pytest.mark.parametrize('t', [GGMLType.Q4_K, GGMLType.Q8_0, GGMLType.MXFP4, GGMLType.F16], ids=ids)
def test_large_and_small_activations(cp, t, product):
    "A half would overflow or vanish; the scale of each row prevents it. A row of zeros stays zero."
    from orcd.kernels.gemv import product64
    blocks, x, *_ = inputs(t, 6, 40, columns(t, 4))
    x *= np.float32([[1e-30], [1e-6], [1], [1e6], [1e25], [0]])
    y, _ = product64(blocks, t, x)
    out = product(cp, t, blocks, x, 40)
    for r in range(5): assert by_norm(out[r], y[r]) < 2e-3
    assert (out[5] == 0).all()


@pytest.mark.parametrize('t', [t for t in TYPES if t.block_size > 1 and t != GGMLType.MXFP4], ids=ids)
def test_large_and_small_weights(cp, t):
    "Scales at both ends of a half's range, rows of either in one matrix: weights as halves must neither overflow nor vanish"
    from orcd.kernels.gemv import product64
    blocks, x, *_ = inputs(t, 6, 48, columns(t, 4))
    b = blocks.view(t.dtype).reshape(48, -1)
    for f in {'d', 'm', 'dmin'} & set(b.dtype.names): b[f] = (b[f].astype(np.float64) * np.float64([2.**-9, 1, 2.**9]).repeat(16)[:, None]).astype(np.float16)
    y, _ = product64(blocks, t, x)
    out = wide_out(cp, t, blocks, x, 48)
    for k in range(3): assert by_norm(out[:, 16*k:16*k+16], y[:, 16*k:16*k+16]) < (1e-2 if k == 0 else 2e-3)    # the small ones are subnormal halves in the file


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
    for f, bound in ((gemv_out, 1e-5), (gemm_out, 2e-3), (wide_out, 2e-3)): assert by_norm(f(cp, t, blocks, x, 48).astype(np.float64), y) < bound


def test_mxfp4_negative_zero(cp):
    blocks = np.full((3, 17), 0x88, np.uint8)
    blocks[:, 0] = 130
    x = np.random.default_rng().standard_normal((2, 32)).astype(np.float32)
    for f in (gemv_out, gemm_out, wide_out): assert (f(cp, GGMLType.MXFP4, blocks, x, 3) == 0).all()


MUTATIONS = dict(   # name -> for GEMV and GEMM: (what the source says, what a mistake would say)
    nibbles=(('if (r == 1) return w << 8 & 0x8E008E00;', 'if (r == 1) return w & 0x8E008E00;'),)*2,
    scale_at=(('unit + 64 * (Y::q + Y::h) + Y::s * at;', 'unit + 64 * (Y::q + Y::h) + Y::s * (at ^ 1);'), ('Y::s * (left * (row & 15) + j);', 'Y::s * (left * (row & 15) + (j ^ 1));')),
    table=(('(w << 5 & 0x0E000E00)', '(w << 5 & 0x06000600)'),)*2,
    exponent=(('e ? e << 23', 'e ? (e + 1) << 23'),)*2)


def inlined(name):
    "A kernel's source with its includes in place"
    import re
    from orcd.kernels.nvrtc import read_source
    seen = set()
    def text(name):
        if name in seen: return ''
        seen.add(name)
        return re.sub(r'#include "\w+/(\w+)\.cu"', lambda m: text(m[1]), read_source(name))
    return text(name)


def mxfp4_errors(cp, monkeypatch, mutation=None):
    "GEMV and GEMM error by norm with the shipped source, or with one mistake in it"
    from cupy.cuda.function import Module
    from orcd.kernels import nvrtc
    from orcd.kernels.weight_layout import random_blocks
    rng, n_out, n_in, rows = np.random.default_rng(0), 96, 320, 8
    blocks, x = random_blocks(GGMLType.MXFP4, n_out, n_in, rng), rng.standard_normal((rows, n_in), np.float32)
    y, errors = x.astype(np.float64) @ dequantize(blocks, GGMLType.MXFP4).astype(np.float64).T, []
    for i, (file, out) in enumerate((('gemv', gemv_out), ('gemm', gemm_out))):
        source = '#define ONLY_NAME mxfp4\n#define ONLY_TYPE MXFP4\n' + inlined(file)
        if mutation:
            old, new = MUTATIONS[mutation][i]
            assert source.count(old) == 1, f'{mutation}: the source has changed'
            source = source.replace(old, new)
        m, shipped = Module(), nvrtc.kernel
        m.load(nvrtc.compile_text(file, source, nvrtc.device_arch()).cubin)
        def changed(module, name, *defines):
            return nvrtc.Kernel(m.get_function(name), 0) if module == file else shipped(module, name, *defines)
        with monkeypatch.context() as p:
            p.setattr(nvrtc, 'kernel', changed)
            errors.append(by_norm(out(cp, GGMLType.MXFP4, blocks, x, n_out), y))
    return errors


def test_mxfp4_mistakes_are_seen(cp, monkeypatch):
    good = mxfp4_errors(cp, monkeypatch)
    assert good[0] < 1e-5 and good[1] < 2e-3
    for name in MUTATIONS:
        for e in mxfp4_errors(cp, monkeypatch, name): assert not e < 0.01, name


# ---- several matrices, and vectors that are made on the way

def gates(cp, x, up):
    "Gated input -> the same in float64"
    from orcd.kernels.gemm import Gated
    d, g = (np.asarray(a, np.float64) for a in (x, up))
    gate, sig = np.minimum(d, 7), lambda z: 1/(1 + np.exp(-z))
    return [(Gated(cp.asarray(x), cp.asarray(up)), d*sig(d)*g), (Gated(cp.asarray(x), cp.asarray(up), True), gate*sig(1.702*gate)*(np.clip(g, -7, 7) + 1))]

def vectors(cp, x, w):
    "Lazy input -> the same in float64"
    from orcd.kernels.gemv import Normed
    d = np.asarray(x, np.float64)
    return [(cp.asarray(x), d), (Normed(cp.asarray(x), cp.asarray(w), 1e-6), d*w/np.sqrt((d*d).mean(1, keepdims=True) + 1e-6))]


@pytest.mark.parametrize('types', [('Q5_0', 'Q5_0', 'Q8_0'), ('Q4_K', 'Q4_K', 'Q6_K'), ('Q4_K', 'Q5_K'), ('MXFP4', 'MXFP4'), ('Q8_0', 'F32'), ('Q4_0', 'Q5_1', 'Q4_1'), ('F16', 'BF16', 'F32')], ids=str)
@pytest.mark.parametrize('rows,n_in', [(1, 256), (3, 2304), (1, 4864)])
def test_many(cp, types, rows, n_in):
    from orcd.kernels.gemv import gemvs, product64
    from orcd.kernels.nvrtc import QTensor
    from orcd.kernels.weight_layout import random_blocks
    rng = np.random.default_rng()
    x, w = (rng.standard_normal(s).astype(np.float32)*3 for s in ((rows, n_in), n_in))
    blocks = [random_blocks(GGMLType[t], n, n_in, rng) for t, n in zip(types, (70, 33, 16))]
    W = [QTensor.upload(b, GGMLType[t], (len(b), n_in)) for b, t in zip(blocks, types)]
    bias = [None, *(rng.standard_normal(len(b), np.float32) for b in blocks[1:])]
    for lazy, v in vectors(cp, x, w):
        outs = [cp.full((rows, len(b)), np.nan, cp.float32) for b in blocks]
        run = lambda: gemvs([(M, o, None if c is None else cp.asarray(c)) for M, o, c in zip(W, outs, bias)], lazy)
        run()
        first = [o.get() for o in outs]
        for b, t, c, got in zip(blocks, types, bias, first):
            y, size = product64(b, GGMLType[t], v)
            assert (abs(got - (y + (0 if c is None else c))) <= 1e-5 * (size + (0 if c is None else abs(c)))).all(), t
        for _ in range(5):
            for o in outs: o[...] = cp.nan
            run()
            assert all(np.array_equal(o.get(), f) for o, f in zip(outs, first))


@pytest.mark.parametrize('t', [t for t in TYPES if t.block_size > 1], ids=ids)
@pytest.mark.parametrize('n_out,k,clamped', [(1, 1, False), (33, 3, True), (200, 11, False)])
def test_gated_row(cp, t, n_out, k, clamped):
    from orcd.kernels.gemv import gated, product64
    from orcd.kernels.nvrtc import QTensor
    n_in = columns(t, k)
    b, x, *_ = inputs(t, 1, 2*n_out, n_in)
    rng, x = np.random.default_rng(k), x*np.float32(.05)
    bias, w = rng.standard_normal((2, n_out)).astype(np.float32), rng.standard_normal(n_in).astype(np.float32)*np.float32(.1)
    Wg, Wu = (QTensor.upload(b[i*n_out:(i + 1)*n_out], t, (n_out, n_in)) for i in (0, 1))
    for lazy, v in vectors(cp, x, w):
        out = cp.full((1, n_out), np.nan, cp.float32)
        gated((Wg, cp.asarray(bias[0])), (Wu, cp.asarray(bias[1])), lazy, out, clamped)
        y, size = product64(b, t, v)
        (g, u), (sg, su) = (y[0, :n_out] + bias[0], y[0, n_out:] + bias[1]), (size[0, :n_out] + 1, size[0, n_out:] + 1)
        if clamped: g, u = np.minimum(g, 7), np.clip(u, -7, 7) + 1
        a = g/(1 + np.exp(-(1.702 if clamped else 1)*g))
        assert (abs(out.get()[0] - a*u) <= 2e-5*(sg*abs(u) + su*abs(a)) + 1e-6).all()


# ---- wrong calls

def test_refused(cp):
    from orcd.kernels.gemm import Fp16Activations, gemm, half_bytes, to_half
    from orcd.kernels.gemv import gemv
    from orcd.kernels.nvrtc import QTensor
    blocks, x, bias, _ = inputs(GGMLType.Q8_0, 2, 32, 64)
    W, x, out = QTensor.upload(blocks, GGMLType.Q8_0, (32, 64)), cp.asarray(x), cp.empty((2, 32), cp.float32)
    z = lambda *s, d=cp.float32: cp.zeros(s, d)
    size = half_bytes(2, 96)
    calls = [lambda: gemv(W, z(2, 63), out), lambda: gemv(W, z(2, 64, d=cp.float64), out), lambda: gemv(W, x, z(3, 32)),
        lambda: gemv(W, x, out, z(31)), lambda: gemv(W, x, out, None, z(2, 31)), lambda: gemv(W, z(2, 128)[:, ::2], out),
        lambda: gemv(W, z(64, 2).T, out), lambda: gemv(QTensor.upload(blocks, GGMLType.Q8_0, (2, 16, 64)), x, out),
        lambda: Fp16Activations(z(100, d=cp.uint8), 2, 64), lambda: gemm(W, Fp16Activations(z(size, d=cp.uint8), 2, 64), out),
        lambda: gemm(W, to_half(z(2, 96), Fp16Activations(z(size, d=cp.uint8), 2, 96)), out)]
    for call in calls:
        with pytest.raises(KernelError): call()
    assert half_bytes(1, 32) == half_bytes(1, 64)
