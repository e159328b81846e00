"Block formats against the gguf package, golden vectors, plain loops and, where it is installed, libggml"
import ctypes, json
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
import orcd
from orcd.files.blocks import GGMLType, E2M1, LAYOUT, dequantize, ggml_type, half_scale, nibbles, scales_mins
from orcd.errors import GGUFError
from orcd.files.quants import pack_nibbles, pack_scales_mins, quantize
import llama_cpp_ctypes

gguf = pytest.importorskip('gguf')
TYPES = list(GGMLType)
QUANTS = [t for t in TYPES if t.block_size > 1]
K = [GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K]
EXACT = ['F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0']     # a formula says which bytes
theirs = lambda t: gguf.GGMLQuantizationType[GGMLType(t).name]
THEIRS = [t for t in TYPES if t.name in gguf.GGMLQuantizationType.__members__]     # the package knows the format
ids = lambda t: GGMLType(t).name


def same_bits(a, b): return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())
def rmse(x, y): return float(np.sqrt(np.square(x.astype(np.float64) - y).mean()))


WEIGHTS = {
    'gauss': lambda r, s: r.standard_normal(s),
    'heavy': lambda r, s: r.standard_t(3, s),
    'uniform': lambda r, s: r.uniform(-1, 1, s),
    'shifted': lambda r, s: .3*r.standard_normal(s) + .4,
    'positive': lambda r, s: abs(r.standard_normal(s)),
    'tiny': lambda r, s: r.standard_normal(s)*1e-4,
    'sparse': lambda r, s: np.where(r.random(s) < .1, r.standard_normal(s), 0),
    'outliers': lambda r, s: r.standard_normal(s)*np.where(r.random(s) < .01, 30, 1),
}


@pytest.fixture(params=WEIGHTS)
def weights(request): return WEIGHTS[request.param](np.random.default_rng(5), (16, 1024)).astype(np.float32)


# --- the table -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('t', TYPES, ids=ids)
def test_table(t):
    if t in THEIRS: assert int(theirs(t)) == t and (t.block_size, t.type_size) == gguf.GGML_QUANT_SIZES[theirs(t)]
    assert LAYOUT[t.name][0] == t and ggml_type(t.name.lower()) is ggml_type(int(t)) is t and str(t) == t.name


def test_unknown_types():
    for t in (4, 5, 10, 40, 999, -1, 'Q9', '', None, 2.5):
        with pytest.raises(GGUFError, match='is not supported; supported: F32'): ggml_type(t)


# --- dequantise ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('t', THEIRS, ids=ids)
@pytest.mark.parametrize('shape', [(1, 1), (3, 1), (1, 5), (2, 3, 2), (700, 3)])
def test_dequantize_like_gguf_py(t, shape):
    rng = np.random.default_rng(sum(shape))
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1]*t.type_size), dtype=np.uint8)
    with np.errstate(all='ignore'): want = gguf.quants.dequantize(raw, theirs(t))
    got = dequantize(raw, t)
    assert got.dtype == np.float32 and got.shape == (*shape[:-1], shape[-1]*t.block_size) and same_bits(got, np.ascontiguousarray(want))


def test_dequantize_golden(shared):
    golden = json.loads((shared / 'golden' / 'dequant.json').read_text())['types']
    assert len(golden) >= 9 and set(golden) <= {t.name for t in QUANTS}         # a format that came later has no vectors there
    for name, v in golden.items():
        blocks = np.stack([np.frombuffer(bytes.fromhex(h), np.uint8) for h in v['blocks_hex']])
        want = np.stack([np.frombuffer(bytes.fromhex(h), '<u4') for h in v['f32_hex']])
        assert np.array_equal(dequantize(blocks, name).view(np.uint32), want), name


def by_the_book(t, b):
    "One block, weight by weight, in float32: the textbook formulas without any vector tricks"
    f, h = np.float32, lambda at: np.frombuffer(bytes(b[at:at + 2]), '<f2')[0].astype(np.float32)
    x = np.zeros(t.block_size, np.float32)
    for i in range(t.block_size):
        j, high = i % 16, i // 16
        nib = lambda at: b[at + j] >> 4 & 15 if high else b[at + j] & 15
        if t.name == 'Q4_0': x[i] = f(int(nib(2)) - 8)*h(0)
        elif t.name == 'Q4_1': x[i] = f(f(nib(4))*h(0)) + h(2)
        elif t.name == 'Q5_0': x[i] = f((int(nib(6)) | (b[2 + i//8] >> i % 8 & 1) << 4) - 16)*h(0)
        elif t.name == 'Q5_1': x[i] = f(f(nib(8) | (b[4 + i//8] >> i % 8 & 1) << 4)*h(0)) + h(2)
        elif t.name == 'Q8_0': x[i] = f(np.int8(np.uint8(b[2 + i])))*h(0)
        elif t.name == 'MXFP4':
            v = [0, .5, 1, 1.5, 2, 3, 4, 6][nib(1) & 7]
            x[i] = f(-v if nib(1) > 8 else v)*np.float64(2)**(int(b[0]) - 127)
        elif t.name in ('Q4_K', 'Q5_K'):
            s, sc = i//32, b[4:16]
            k, m = (sc[s] & 63, sc[s + 4] & 63) if s < 4 else (sc[s + 4] & 15 | sc[s - 4] >> 6 << 4, sc[s + 4] >> 4 | sc[s] >> 6 << 4)
            at = (16 if t.name == 'Q4_K' else 48) + i//64*32 + i % 32
            q = b[at] >> 4 if s % 2 else b[at] & 15
            if t.name == 'Q5_K': q |= (b[16 + i % 32] >> s & 1) << 4
            x[i] = f(f(h(0)*f(k))*f(q)) - f(h(2)*f(m))
        elif t.name == 'Q6_K':
            half, r = divmod(i, 128)
            quarter, l = divmod(r, 32)
            low = b[half*64 + quarter % 2*32 + l]
            q = (low >> 4 if quarter > 1 else low & 15) | (b[128 + half*32 + l] >> 2*quarter & 3) << 4
            x[i] = f(h(208)*f(np.int8(np.uint8(b[192 + i//16]))))*f(int(q) - 32)
    return x


@pytest.mark.parametrize('t', QUANTS, ids=ids)
def test_dequantize_by_the_book(t):
    rng = np.random.default_rng(int(t))
    for _ in range(6):
        b = rng.integers(0, 256, t.type_size, dtype=np.uint8)
        if t.name == 'MXFP4': b[0] = rng.integers(0, 252)
        with np.errstate(all='ignore'): assert same_bits(dequantize(b[None], t)[0], by_the_book(t, [int(v) for v in b])), t


def test_mxfp4_scales():
    assert np.array_equal(half_scale(np.arange(255, dtype=np.uint8)).astype(np.float64), 2.**(np.arange(255) - 128))
    assert half_scale(np.array([0, 1, 255], np.uint8)).view(np.uint32).tolist() == [0x200000, 0x400000, 0x7f000000]
    block = np.zeros((1, 17), np.uint8); block[0, 1:] = np.arange(16)*16 + np.arange(16)
    for e, unit in ((0, 2.**-128), (1, 2.**-127), (127, .5), (250, 2.**122)):
        block[0, 0] = e
        assert np.array_equal(dequantize(block, 'MXFP4')[0].astype(np.float64), np.tile(E2M1, 2)*unit)
    block[0, 0] = 254
    x = dequantize(block, 'MXFP4')[0]
    assert np.isposinf(x[7]) and np.isneginf(x[15]) and x[1] == 2.**126 and not np.signbit(x[8])


def test_dequantize_checks():
    good = np.zeros((4, 36), np.uint8)
    for bad in (good[:, :35], good.astype(np.int8), np.uint8(3), good.astype(np.float32)):
        with pytest.raises(GGUFError, match='rows of uint8'): dequantize(bad, 'Q4_0')
    out = np.full((4, 64), np.nan, np.float32)
    assert dequantize(good, 'Q4_0', out=out) is out and not out.any()
    for bad in (out[:2], out.astype(np.float64), out[:, ::-1], np.zeros((64, 4), np.float32).T):
        with pytest.raises(GGUFError, match='out must be a float32 array'): dequantize(good, 'Q4_0', out=bad)
    assert dequantize(good[:0], 'Q4_0').shape == (0, 64) and dequantize(good[:, :0], 'Q4_0').shape == (4, 0)
    strided = np.random.default_rng(0).integers(0, 256, (4, 72), dtype=np.uint8)[:, ::2]
    assert same_bits(dequantize(strided, 'Q4_0'), dequantize(strided.copy(), 'Q4_0'))


# --- quantise --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('t', EXACT)
def test_quantize_like_gguf_py(t, weights):
    with np.errstate(all='ignore'): want = gguf.quants.quantize(weights, theirs(GGMLType[t]))
    assert np.array_equal(quantize(weights, t), np.ascontiguousarray(want).view(np.uint8).reshape(quantize(weights, t).shape))


def test_bf16_rounds_to_even():
    x = np.array([[0x3f808000, 0x3f818000, 0x3f808001, 0x7f7f7fff, 0x80000001, 0]], np.uint32).view(np.float32)
    assert quantize(x, 'BF16').view(np.uint16).tolist() == [[0x3f80, 0x3f82, 0x3f81, 0x7f7f, 0x8000, 0]]


@pytest.mark.parametrize('t', QUANTS, ids=ids)
def test_round_trip_error(t, weights):
    "No weight is further off than its format allows, and no format is worse than its share of bits"
    y = dequantize(quantize(weights, t), t)
    group = {'Q6_K': 16}.get(t.name, 32)
    span = np.ptp(np.concatenate([weights.reshape(-1, group), np.zeros((weights.size//group, 1), np.float32)], axis=1), axis=1)
    step = {4: 1/7.5, 5: 1/15.5, 6: 1/28, 8: 1/127}.get(int(t.bits_per_weight), 1/7.5)
    if t.name == 'MXFP4': step = .3
    allowed = 2.4*step*np.sqrt(np.square(span).mean())/np.sqrt(12)
    assert rmse(weights, y) < allowed + 1e-9, (rmse(weights, y), allowed)


def rounded(x, t):
    "K-formats without a search: scales from minimum and maximum, then rounded to six or eight bits of a half-precision scale"
    def shared(a, top):
        d = np.maximum(a.max(1, keepdims=True)/top, 1e-7).astype(np.float16).astype(np.float32)
        return np.clip(np.rint(a/d), 0, top)*d
    with np.errstate(all='ignore'):
        if t.name == 'Q6_K':
            x = x.reshape(-1, 16, 16)
            s = shared(abs(x).max(2)/31, 127)
            return np.nan_to_num(np.clip(np.rint(x/s[..., None]), -32, 31)*s[..., None])
        x, top = x.reshape(-1, 8, 32), 15 if t.name == 'Q4_K' else 31
        low = np.minimum(x.min(2), 0)
        s, m = shared((x.max(2) - low)/top, 63), shared(-low, 63)
        return np.nan_to_num(np.clip(np.rint((x + m[..., None])/s[..., None]), 0, top)*s[..., None]) - m[..., None]


@pytest.mark.parametrize('t', K, ids=ids)
def test_search_beats_rounding(t, weights):
    assert rmse(weights, dequantize(quantize(weights, t), t)) < .97*rmse(weights, rounded(weights, t).reshape(weights.shape))


def test_mxfp4_no_block_worse_than_gguf_py(weights):
    ours, other = (np.square(dequantize(q, 'MXFP4') - weights).reshape(-1, 32).sum(1)
        for q in (quantize(weights, 'MXFP4'), gguf.quants.quantize(weights, theirs(GGMLType.MXFP4))))
    assert (ours <= other*(1 + 1e-6)).all()


@pytest.mark.parametrize('t', QUANTS, ids=ids)
def test_what_a_block_can_say_comes_back(t):
    "Weights that are exactly representable: the error is nothing, or nearly so for the searched formats"
    rng = np.random.default_rng(2)
    zero = np.zeros((1, 2*t.block_size), np.float32)
    assert not dequantize(quantize(zero, t), t).any()
    once = dequantize(quantize(rng.standard_normal((8, 2*t.block_size)).astype(np.float32), t), t)
    twice = dequantize(quantize(once, t), t)
    if t in K: assert rmse(once, twice) < .01*once.std()
    else: assert np.array_equal(once, twice)


@pytest.mark.parametrize('t', K, ids=ids)
def test_k_quants_of_awkward_blocks(t):
    one = np.zeros(256, np.float32); one[77] = -3
    rows = [one, np.arange(256) - 128., np.repeat(np.linspace(-1, 1, 8), 32), np.repeat([1., 0.], 128), np.linspace(-6e4, 6e4, 256)]
    rows += [np.full(256, v) for v in (.5, -.5, 6e4, -6e4, 1e-7, 1e-30)]
    x = np.stack(rows).astype(np.float32)
    y = dequantize(quantize(x, t), t)
    assert np.isfinite(y).all()
    error, size = abs(y - x).max(1), abs(x).max(1)
    assert (error <= np.maximum(size*{'Q4_K': .07, 'Q5_K': .035, 'Q6_K': .02}[t.name], 1e-4)).all(), error/size


def test_packing_is_inverse():
    rng = np.random.default_rng(1)
    q = rng.integers(0, 16, (5, 4, 64), dtype=np.uint8)
    assert np.array_equal(nibbles(pack_nibbles(q)), q)
    k, l = rng.integers(0, 64, (2, 9, 8), dtype=np.uint8)
    assert all(np.array_equal(a, b) for a, b in zip(scales_mins(pack_scales_mins(k, l)), (k, l)))


@given(arrays(np.float32, (2, 256), elements=st.floats(-60000, 60000, width=32)), st.sampled_from(QUANTS))
@settings(max_examples=150, deadline=None)
def test_any_finite_weights(x, t):
    "Whatever the weights: finite, of the right shape, never further off than the largest of the block"
    q = quantize(x, t)
    assert q.dtype == np.uint8 and q.shape == (2, t.row_bytes(256))
    y = dequantize(q, t)
    assert np.isfinite(y).all()
    error, range0 = abs(y - x).reshape(-1, t.block_size).max(1), np.ptp(np.pad(x.reshape(-1, t.block_size), ((0, 0), (0, 1))), axis=1)
    assert (error <= 1.01*range0 + 1e-6).all()


def test_quantize_checks():
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(GGUFError, match='finite'): quantize(np.full((1, 256), bad), 'Q4_K')
    for t in ('Q4_0', 'F16'):
        with pytest.raises(GGUFError, match='at most 65504'): quantize(np.full((1, 32), 1e5), t)
    assert dequantize(quantize(np.full((1, 32), 1e5), 'BF16'), 'BF16')[0, 0] == pytest.approx(1e5, rel=.01)
    with pytest.raises(GGUFError, match='scalar'): quantize(3., 'F32')
    with pytest.raises(GGUFError, match='no whole number'): quantize(np.zeros((2, 128)), 'Q6_K')
    with pytest.raises(GGUFError, match='not supported'): quantize(np.zeros((2, 128)), 'Q2_K')
    x = np.random.default_rng(0).standard_normal((2, 3, 512))
    for t in TYPES:
        q = quantize(x, t)
        assert q.shape == (2, 3, t.row_bytes(512))
        for a, b in ((q.reshape(6, -1), x.reshape(6, 512)), (q[1], x[1])): assert np.array_equal(a, quantize(b, t))   # rows are independent
    assert orcd.quants.quantize is quantize and orcd.quants.dequantize is dequantize


# --- libggml ---------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not llama_cpp_ctypes.base(), reason="needs llama.cpp's library (make oracles, or ORCD_LLAMA_LIB)")
@pytest.mark.parametrize('t', [t for t in QUANTS if t in THEIRS], ids=ids)
def test_like_libggml(t, weights):
    "The simple formats: the same bytes. The searched ones: no larger error. And both decode each other's blocks alike."
    lib = ctypes.CDLL(llama_cpp_ctypes.base())
    name = t.name.replace('Q', 'q') if t.name != 'MXFP4' else 'mxfp4'
    pointers = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    enc, dec = getattr(lib, f'quantize_row_{name}_ref'), getattr(lib, f'dequantize_row_{name}')
    enc.argtypes, enc.restype, dec.argtypes, dec.restype = pointers, None, pointers, None
    ours, other = quantize(weights, t), np.zeros((len(weights), t.row_bytes(weights.shape[1])), np.uint8)
    enc(weights.ctypes.data, other.ctypes.data, weights.size)
    for q in (ours, other):
        y = np.zeros_like(weights)
        dec(q.ctypes.data, y.ctypes.data, y.size)
        assert same_bits(y, dequantize(q, t))
    if t.name in EXACT: assert np.array_equal(ours, other)
    assert rmse(weights, dequantize(ours, t)) <= 1.001*rmse(weights, dequantize(other, t))


# --- what is no array of weights, or of blocks

ONES = np.ones((2, 256), np.float32)
REFUSED = dict(
    scalar=lambda: quantize(3., 'F32'), ragged=lambda: quantize([[1.], [1., 2.]], 'F32'), text=lambda: quantize(['1.5'], 'F32'),
    complex=lambda: quantize(ONES*1j, 'Q8_0'),
    objects=lambda: quantize(ONES.astype(object), 'Q8_0'), times=lambda: quantize(np.zeros((1, 32), 'm8[s]'), 'Q8_0'),
    half_a_block=lambda: quantize(ONES[:, :48], 'Q4_0'),
    nan=lambda: quantize(ONES*np.nan, 'F32'), infinite=lambda: quantize(ONES*np.inf, 'F16'),
    beyond_half=lambda: quantize(ONES*65536, 'Q4_K'), beyond_single=lambda: quantize(ONES.astype(float)*1e300, 'F32'),
    beyond_bf16=lambda: quantize([[3.3962e38]], 'BF16'), nothing=lambda: quantize(None, 'F32'),
    whole_numbers_as_blocks=lambda: dequantize([[0]*34], 'Q8_0'),
    blocks_cut=lambda: dequantize(np.zeros((2, 33), np.uint8), 'Q8_0'), one_number=lambda: dequantize(np.uint8(3), 'Q8_0'),
    ragged_blocks=lambda: dequantize([[1], [1, 2]], 'Q8_0'),
    out_is_a_list=lambda: dequantize(np.zeros((1, 4), np.uint8), 'F32', out=[0.]),
    out_of_another_shape=lambda: dequantize(np.zeros((1, 4), np.uint8), 'F32', out=np.zeros(1, np.float32)),
    true=lambda: ggml_type(True), real=lambda: ggml_type(2.), a_list=lambda: ggml_type([2]), none=lambda: ggml_type(None),
    long=lambda: ggml_type('Q' * 10_000), negative=lambda: ggml_type(-1),
    negative_row=lambda: ggml_type('Q4_0').row_bytes(-32))


@pytest.mark.parametrize('case', REFUSED)
def test_refused(case):
    with pytest.raises(GGUFError) as e: REFUSED[case]()
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


def test_out_that_cannot_be_written_to():
    blocks = quantize(ONES[:, :4], 'F32')
    locked = np.zeros((2, 4), np.float32)
    locked.flags.writeable = False
    for out in locked, blocks.view(np.float32), np.zeros((2, 8), np.float32)[:, ::2], np.zeros((2, 4), '>f4'):
        with pytest.raises(GGUFError, match='out must be'): dequantize(blocks, 'F32', out=out)


@pytest.mark.parametrize('t', list(GGMLType))
def test_nothing_is_nothing(t):
    "Arrays without rows, or with rows without weights"
    for shape in (0, 256), (3, 0), (2, 0, 256), (0,):
        b = quantize(np.zeros(shape, np.float32), t)
        assert b.dtype == np.uint8 and b.shape == (*shape[:-1], t.row_bytes(shape[-1])) and dequantize(b, t).shape == shape


@pytest.mark.parametrize('t', list(GGMLType))
def test_however_it_lies_in_memory(t):
    "Columns first, every second row, backwards, double precision, whole numbers: the same blocks"
    x = np.random.default_rng(0).integers(-9, 9, (4, 512)).astype(np.float32)
    want = quantize(x, t)
    for y in (np.asfortranarray(x), np.repeat(x, 2, 0)[::2], x[::-1][::-1], x.astype(float), x.astype(int), x.astype('>f4'),
            x.reshape(2, 2, 512)):
        assert np.array_equal(quantize(y, t).reshape(want.shape), want)
    shown = dequantize(want, t)
    for b in np.asfortranarray(want), np.repeat(want, 2, 0)[::2], want[::-1][::-1]: assert np.array_equal(dequantize(b, t), shown)


def test_the_largest_bf16():
    "Rounding may not leave the numbers that there are"
    top = np.uint32([0x7f7f7fff]).view(np.float32)
    assert dequantize(quantize(top, 'BF16'), 'BF16').view(np.uint32).tolist() == [0x7f7f0000]
