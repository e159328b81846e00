"Routing, grouping, expert products and their sum against NumPy"
import numpy as np, pytest
from orcd.files.blocks import GGMLType, dequantize
from orcd.errors import KernelError

pytestmark = pytest.mark.gpu


@pytest.fixture(scope='module')
def cp(): return pytest.importorskip('cupy')


def route_np(logits, k):
    l = np.where(np.isnan(logits), -np.inf, logits)
    ids = np.argsort(-l, axis=1, kind='stable')[:, :k]
    top = np.take_along_axis(l, ids, 1).astype(np.float64)
    w = np.exp(top - top[:, :1])
    return ids, w / w.sum(axis=1, keepdims=True)


def route_gpu(cp, logits, k):
    from orcd.kernels.moe import route
    ids, w = cp.full((len(logits), k), -1, cp.int32), cp.full((len(logits), k), np.nan, cp.float32)
    route(cp.asarray(logits), k, ids, w)
    return ids, w


@pytest.mark.parametrize('T,n,k', [(1, 32, 4), (1, 1, 1), (300, 8, 2), (77, 33, 5), (5, 128, 8), (9, 1000, 4), (3, 4, 4)])
def test_route(cp, T, n, k):
    rng = np.random.default_rng()
    logits = rng.standard_normal((T, n)).astype(np.float32)
    ties = rng.integers(-2, 3, (T, n)).astype(np.float32)
    holes = logits.copy()
    holes[rng.random((T, n)) < 0.2] = np.nan
    holes[:, 0] = 1
    for l in (logits, ties, holes):
        if k == n and l is holes: continue
        (ids, w), (ids_np, w_np) = route_gpu(cp, l, k), route_np(l, k)
        assert np.array_equal(ids.get(), ids_np)
        assert abs(w.get() - w_np).max() < 1e-6
    first = route_gpu(cp, logits, k)[1].get()
    for _ in range(19): assert np.array_equal(route_gpu(cp, logits, k)[1].get(), first)



def test_route_of_nothing(cp):
    "All NaN or all -inf: still k different experts and finite weights"
    for v in (np.nan, -np.inf):
        ids, w = route_gpu(cp, np.full((2, 32), v, np.float32), 4)
        assert (ids.get() == [0, 1, 2, 3]).all() and np.allclose(w.get(), 0.25)


@pytest.mark.parametrize('T,n,k', [(1, 32, 4), (31, 8, 2), (129, 5, 1), (1000, 32, 4), (7, 200, 3)])
def test_group(cp, T, n, k):
    from orcd.kernels.moe import Groups, group
    ids = np.random.default_rng().integers(0, n, (T, k)).astype(np.int32)
    g = group(cp.asarray(ids), Groups(cp.full(Groups.size(T*k, n), -1, cp.int32), T*k, n))
    flat, offset, slots = ids.ravel(), g.offset.get(), g.slots.get()
    count = np.bincount(flat, minlength=n)
    assert np.array_equal(offset, np.concatenate([[0], np.cumsum((count + 7) // 8 * 8)])) and offset[-1] + 120 <= len(slots)
    for e in range(n):
        mine = slots[offset[e]:offset[e + 1]]
        assert np.array_equal(mine[:count[e]], np.flatnonzero(flat == e)) and (mine[count[e]:] == -1).all()


def products(cp, t, ids, x, blocks, shape, bias, runs=1):
    from orcd.kernels.gemm import Fp16Activations, half_bytes, to_half
    from orcd.kernels.wgmma import experts, with_row_max_exponents
    from orcd.kernels.moe import Groups, expert_gemm, expert_gemv, group
    from orcd.kernels.nvrtc import QTensor
    n_slots, n_in = ids.size, x.shape[1]
    W, idd, xd, bd = QTensor.upload(blocks, t, shape), cp.asarray(ids), cp.asarray(x), None if bias is None else cp.asarray(bias)
    for _ in range(runs):
        a, b, c = cp.full((3, n_slots, shape[1]), np.nan, cp.float32)
        expert_gemv(W, xd, idd, a, bd)
        g = group(idd, Groups(cp.full(Groups.size(n_slots, shape[0]), -1, cp.int32), n_slots, shape[0]))
        h = to_half(xd, Fp16Activations(cp.full(half_bytes(g.positions, n_in), 255, cp.uint8), g.positions, n_in), g)
        expert_gemm(W, h, g, b, bd)
        experts(with_row_max_exponents(W), h, g, c, bd)
        yield a.get(), b.get(), c.get()


def choose(rng, T, E, k): return np.array([rng.permutation(E)[:k] for _ in range(T)], np.int32)


@pytest.mark.parametrize('t', list(GGMLType), ids=lambda t: t.name)
@pytest.mark.parametrize('T,E,k,n_out,m,shared',
    [(1, 8, 4, 33, 1, True), (1, 32, 4, 64, 3, False), (35, 8, 2, 31, 2, True), (150, 3, 2, 65, 2, False), (140, 2, 1, 70, 3, True)])
def test_experts(cp, t, T, E, k, n_out, m, shared):
    from orcd.kernels.gemv import random_blocks
    rng, n_in = np.random.default_rng(), m * t.block_size if t.block_size > 1 else 37 * m
    blocks, ids = random_blocks(t, E*n_out, n_in, rng), choose(rng, T, E, k)
    x, bias = rng.standard_normal((T if shared else T*k, n_in), np.float32), rng.standard_normal((E, n_out), np.float32)
    w = dequantize(blocks, t).astype(np.float64).reshape(E, n_out, n_in)
    y = np.stack([w[e] @ x[s//k if shared else s] for s, e in enumerate(ids.ravel())])
    for b in (bias, None):
        ref = y if b is None else y + bias[ids.ravel()]
        (ev, *tensor), = products(cp, t, ids, x, blocks, (E, n_out, n_in), b)
        assert np.linalg.norm(ev - ref) / np.linalg.norm(ref) < 1e-5
        for em in tensor: assert np.linalg.norm(em - ref) / np.linalg.norm(ref) < 2e-3


def test_mxfp4_scales(cp):
    "Scale exponents 0, 1, 127 and 254, negative zeros among the codes: an expert each, every slot with inputs that its scale neither overflows nor loses"
    rng, E, n_out, n_in = np.random.default_rng(), np.array([0, 1, 127, 254], np.uint8), 40, 320
    b = rng.integers(0, 256, (4, n_out, n_in // 32, 17), dtype=np.uint8)
    b[3] &= 0xBB # codes 4 to 7 and 12 to 15 would be infinite
    b[..., 0] = E[:, None, None]
    assert ((b[..., 1:] & 15) == 8).any()
    ids, blocks = np.tile(np.arange(4, dtype=np.int32), (35, 1)), b.reshape(4*n_out, -1)
    x = rng.standard_normal((140, n_in), np.float32) * np.tile(np.exp2(np.float32([20, 20, 0, -20])), 35)[:, None]
    w = dequantize(blocks, GGMLType.MXFP4).astype(np.float64).reshape(4, n_out, n_in)
    y = np.stack([w[s % 4] @ x[s] for s in range(140)])
    (ev, em, eh), = products(cp, GGMLType.MXFP4, ids, x, blocks, (4, n_out, n_in), None)
    for out, bound in ((ev, 1e-5), (em, 2e-3), (eh, 2e-3)):
        for e in range(4): assert np.linalg.norm(out[e::4].astype(np.float64) - y[e::4]) < bound*np.linalg.norm(y[e::4]), f'exponent {E[e]}'


def test_same_bits(cp):
    "20 runs, and a token's rows whatever else is in the batch"
    from orcd.kernels.gemv import random_blocks
    t, rng, T, E, k, n_out, n_in = GGMLType.MXFP4, np.random.default_rng(), 200, 4, 2, 66, 96
    blocks, ids, x = random_blocks(t, E*n_out, n_in, rng), choose(rng, T, E, k), rng.standard_normal((T, n_in), np.float32)
    runs = list(products(cp, t, ids, x, blocks, (E, n_out, n_in), None, runs=20))
    for run in runs[1:]: assert all(np.array_equal(a, b) for a, b in zip(run, runs[0]))
    for tokens in ([0], [199], [150, 3], list(range(60, 200))):
        few, = products(cp, t, ids[tokens], x[tokens], blocks, (E, n_out, n_in), None)
        slots = (np.array(tokens)[:, None] * k + np.arange(k)).ravel()
        assert all(np.array_equal(a, b[slots]) for a, b in zip(few, runs[0]))


@pytest.mark.parametrize('T,E,k,n,m', [(1, 8, 2, 96, 160), (33, 4, 3, 320, 96), (300, 3, 2, 64, 320), (70, 2, 1, 160, 2208)])
def test_gated_experts(cp, T, E, k, n, m):
    "gpt-oss's feed-forward part with Hopper's kernels; a token's bits alone and in company"
    from orcd.kernels.gemm import Fp16Activations, half_bytes, to_half
    from orcd.kernels.gemv import random_blocks
    from orcd.kernels.wgmma import experts, experts_gated, is_hopper, with_row_max_exponents
    from orcd.kernels.moe import Groups, group
    from orcd.kernels.nvrtc import QTensor
    if not is_hopper(): pytest.skip('no kernel of its own')
    t, rng, shapes = GGMLType.MXFP4, np.random.default_rng(), ((m, n), (m, n), (n, m))
    blocks = [random_blocks(t, E*s[0], s[1], rng) for s in shapes]
    gate, up, down = (with_row_max_exponents(QTensor.upload(b, t, (E, *s))) for b, s in zip(blocks, shapes))
    x, bias, ids = rng.standard_normal((T, n), np.float32)/np.float32(n**.5), [rng.standard_normal((E, s[0]), np.float32) for s in shapes], choose(rng, T, E, k)
    rows = lambda g, n: Fp16Activations(cp.full(half_bytes(g.positions, n), 255, cp.uint8), g.positions, n)

    def run(x, ids):
        g = group(cp.asarray(ids), Groups(cp.full(Groups.size(ids.size, E), -1, cp.int32), ids.size, E))
        act = experts_gated(gate, up, to_half(cp.asarray(x), rows(g, n), g), g, rows(g, m), *map(cp.asarray, bias[:2]))
        return experts(down, act, g, cp.full((ids.size, n), np.nan, cp.float32), cp.asarray(bias[2])).get()
    W = [dequantize(b, t).astype(np.float64).reshape(E, *s) for b, s in zip(blocks, shapes)]
    y = []
    for s, e in enumerate(ids.ravel()):
        g, u = W[0][e] @ x[s//k] + bias[0][e], W[1][e] @ x[s//k] + bias[1][e]
        g, u = np.minimum(g, 7), np.clip(u, -7, 7)
        y.append(W[2][e] @ (g/(1 + np.exp(-1.702*g))*(u + 1)) + bias[2][e])
    out = run(x, ids)
    assert np.linalg.norm(out - y) < 2e-3*np.linalg.norm(y)
    some = [0, T//2, T - 1]
    assert np.array_equal(run(x[some], ids[some]), out.reshape(T, k, n)[some].reshape(-1, n))


@pytest.mark.parametrize('T,k,n', [(1, 4, 2880), (5, 1, 31), (300, 8, 257)])
def test_expert_sum(cp, T, k, n):
    from orcd.kernels.moe import expert_sum
    rng = np.random.default_rng()
    y, w, r = rng.standard_normal((T*k, n), np.float32), rng.random((T, k)).astype(np.float32), rng.standard_normal((T, n), np.float32)
    ref = np.einsum('tk,tkn->tn', w.astype(np.float64), y.reshape(T, k, n))
    out = expert_sum(cp.asarray(y), cp.asarray(w), cp.full((T, n), np.nan, cp.float32)).get()
    assert abs(out - ref).max() < 1e-5
    res = cp.asarray(r)
    assert abs(expert_sum(cp.asarray(y), cp.asarray(w), res, res).get() - (ref + r)).max() < 1e-5


def test_refused(cp):
    from orcd.kernels.gemv import random_blocks
    from orcd.kernels.moe import Groups, expert_gemv, route
    from orcd.kernels.nvrtc import QTensor
    z = lambda *s, d=cp.float32: cp.zeros(s, d)
    W = QTensor.upload(random_blocks(GGMLType.MXFP4, 4*32, 32, np.random.default_rng(0)), GGMLType.MXFP4, (4, 32, 32))
    i = lambda *s: z(*s, d=cp.int32)
    calls = [lambda: route(z(2, 2000), 4, i(2, 4), z(2, 4)), lambda: route(z(2, 3), 4, i(2, 4), z(2, 4)),
        lambda: route(z(2, 8), 4, z(2, 4), z(2, 4)), lambda: expert_gemv(W, z(2, 31), i(2, 2), z(4, 32)),
        lambda: expert_gemv(W, z(3, 32), i(2, 2), z(4, 32)), lambda: expert_gemv(W, z(2, 32), i(2, 2), z(3, 32)),
        lambda: expert_gemv(W, z(2, 32), i(2, 2), z(4, 32), z(4, 31)), lambda: Groups(i(5), 4, 4)]
    for call in calls:
        with pytest.raises(KernelError): call()
