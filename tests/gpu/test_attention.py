"Attention kernels against float64 NumPy"
import numpy as np
import pytest

cp = pytest.importorskip('cupy')
pytestmark = pytest.mark.gpu

from orcd.kernels import attention as ka

rng = np.random.default_rng()


def reference(q, k, v, pos0, window=0, sinks=None):
    "q (T, H, d), k and v (n, K, d), row t at position pos0 + t"
    T, H, d = q.shape
    group, out = H // k.shape[1], np.empty((T, H, d))
    p, j = pos0 + np.arange(T)[:, None], np.arange(len(k))[None]
    hidden = (j > p) | ((j <= p - window) if window else False)
    for h in range(H):
        s = np.where(hidden, -np.inf, q[:, h].astype('f8') @ k[:, h//group].astype('f8').T / np.sqrt(d))
        m = np.maximum(s.max(1, keepdims=True), -np.inf if sinks is None else sinks[h])
        e = np.exp(s - m)
        z = e.sum(1, keepdims=True) + (0 if sinks is None else np.exp(sinks[h] - m))
        out[:, h] = e / z @ v[:, h//group].astype('f8')
    return out.reshape(T, H*d)


class Layer:
    "A poisoned cache and a position in device memory"
    def __init__(self, H, K, d, n_ctx, window=0, sinks=None):
        self.H, self.K, self.d, self.window, self.rows = H, K, d, window, min(window, n_ctx) if window else n_ctx
        self.k, self.v = (cp.full((K, self.rows, d), cp.nan, cp.float16) for _ in 'kv')
        self.state, self.work = cp.zeros(ka.STATE_SIZE, cp.int32), cp.full(ka.decode_workspace(H, d, self.rows), cp.nan, cp.float32)
        self.sinks = None if sinks is None else cp.asarray(sinks, cp.float32)

    def prefill(self, q, k, v, pos):
        self.state[0] = pos
        out, stage = cp.full(q.shape, cp.nan, cp.float32), cp.full(ka.prefill_workspace(len(q), self.K, self.d, self.window), cp.nan, cp.float16)
        ka.attend_prefill(q, k, v, self.k, self.v, out, self.state, stage, self.window, self.sinks)
        return out

    def decode(self, q, k, v, pos, fused=True):
        self.state[0] = pos
        out = cp.full(q.shape, cp.nan, cp.float32)
        if not fused: ka.store_kv(k, v, self.k, self.v, self.state, self.window)
        ka.attend_decode(q, self.k, self.v, out, self.state, self.work, self.window, self.sinks, **(dict(k=k, v=v) if fused else {}))
        return out


def random_qkv(n, H, K, d, size=1.):
    "Host arrays of halves, and the same as column slices of one wide float32 array"
    x = (rng.normal(size=(n, (H + 2*K)*d)) * size).astype('f2').astype('f4')
    g, a, b = cp.asarray(x), H*d, (H + K)*d
    return (x[:, :a].reshape(n, H, d), x[:, a:b].reshape(n, K, d), x[:, b:].reshape(n, K, d)), (g[:, :a], g[:, a:b], g[:, b:])


SHAPES = [(14, 2, 64), (64, 8, 64), (3, 3, 96), (4, 2, 32), (6, 1, 48), (32, 8, 128), (16, 1, 64)]
LENGTHS = 1, 2, 63, 64, 127, 128, 129, 300


@pytest.mark.parametrize('H,K,d', SHAPES)
@pytest.mark.parametrize('sinks', [False, True])
def test_prefill(H, K, d, sinks):
    sink = rng.normal(size=H).astype('f4') * 2 if sinks else None
    for n in LENGTHS:
        (q, k, v), g = random_qkv(n, H, K, d)
        err = np.abs(Layer(H, K, d, n + 3, 0, sink).prefill(*g, 0).get() - reference(q, k, v, 0, 0, sink)).max()
        assert err < 2e-3, (n, err)


@pytest.mark.parametrize('H,K,d', SHAPES)
@pytest.mark.parametrize('window', [1, 7, 128, 200])
def test_prefill_window(H, K, d, window):
    sink = rng.normal(size=H).astype('f4')
    for n in (1, 65, 129, 333):
        (q, k, v), g = random_qkv(n, H, K, d)
        err = np.abs(Layer(H, K, d, 400, window, sink).prefill(*g, 0).get() - reference(q, k, v, 0, window, sink)).max()
        assert err < 2e-3, (n, err)


@pytest.mark.parametrize('H,K,d', SHAPES)
@pytest.mark.parametrize('window', [0, 5, 128])
def test_any_cut_gives_the_same_bits(H, K, d, window):
    n = 333
    _, g = random_qkv(n, H, K, d)
    whole = Layer(H, K, d, 400, window)
    want = whole.prefill(*g, 0)
    for cuts in ([1]*3, [64]*9, [100, 1, 27, 128, 1], [332], [37]*9):
        cut, at, pieces = Layer(H, K, d, 400, window), 0, []
        for size in [*cuts, n]:
            if at < n: pieces.append(cut.prefill(*(x[at:at+size] for x in g), at))
            at += size
        assert (cp.concatenate(pieces) == want).all(), cuts
        assert cut.k.tobytes() == whole.k.tobytes() and cut.v.tobytes() == whole.v.tobytes()
    for _ in range(20): assert (Layer(H, K, d, 400, window).prefill(*g, 0) == want).all()


@pytest.mark.parametrize('H,K,d', SHAPES)
@pytest.mark.parametrize('sinks', [False, True])
def test_decode(H, K, d, sinks):
    sink = rng.normal(size=H).astype('f4') * 2 if sinks else None
    top = 4097
    (q, k, v), g = random_qkv(top, H, K, d)
    layer = Layer(H, K, d, top, 0, sink)
    layer.state[0] = 0
    for n in (1, 2, 127, 128, 129, 2047, 2048, 4096, 4097):
        ka.store_kv(g[1][:n], g[2][:n], layer.k, layer.v, layer.state * 0)
        for fused in (True, False):
            got = layer.decode(*(x[n-1:n] for x in g), n - 1, fused).get()
            err = np.abs(got - reference(q[n-1:n], k[:n], v[:n], n - 1, 0, sink)).max()
            assert err < 1e-3, (n, err)
        for _ in range(20): assert layer.decode(*(x[n-1:n] for x in g), n - 1).get().tobytes() == got.tobytes()


@pytest.mark.parametrize('H,K,d', SHAPES)
@pytest.mark.parametrize('window', [7, 128, 300])
def test_decode_window_step_by_step(H, K, d, window):
    n, sink = 700, rng.normal(size=H).astype('f4')
    (q, k, v), g = random_qkv(n, H, K, d)
    want = reference(q, k, v, 0, window, sink)
    layer, start = Layer(H, K, d, 1000, window, sink), 260
    assert np.abs(layer.prefill(*(x[:start] for x in g), 0).get() - want[:start]).max() < 2e-3
    got = np.concatenate([layer.decode(*(x[p:p+1] for x in g), p).get() for p in range(start, n)])
    assert np.abs(got - want[start:]).max() < 1e-3
    assert (layer.state[ka.TICKETS:] == 0).all()


@pytest.mark.parametrize('H,K,d', SHAPES)
@pytest.mark.parametrize('style', ['neox', 'norm'])
def test_turning_on_the_way(H, K, d, style):
    "q and k turned by attention itself, against the kernel that turns them first; a part of each head stays as it is"
    from orcd.kernels import elementwise as ke
    for n_rot in {d, 16}:
        inv = cp.asarray(10000. ** (-np.arange(n_rot//2)*2/n_rot), cp.float32)
        _, g = random_qkv(300, H, K, d)
        a, b = Layer(H, K, d, 300), Layer(H, K, d, 300)
        for l in (a, b): ka.store_kv(g[1], g[2], l.k, l.v, l.state * 0)
        for p in (0, 1, 129, 299):
            q, k, v = (x[p:p + 1].copy() for x in g)
            a.state[0] = b.state[0] = p
            out, want = cp.full(q.shape, cp.nan, cp.float32), cp.full(q.shape, cp.nan, cp.float32)
            ka.attend_decode(q, a.k, a.v, out, a.state, a.work, k=k, v=v, rope=(inv, 1.2, style, n_rot))
            for x, n in ((q, H), (k, K)): ke.rope(x, n, d, inv, 1.2, style, n_rot, b.state, x)
            ka.attend_decode(q, b.k, b.v, want, b.state, b.work, k=k, v=v)
            assert cp.abs((a.k[:, p] - b.k[:, p]).astype(cp.float32)).max() < 4e-3 # the last bit of a half, at most
            assert cp.abs(out - want).max() < 2e-3


def test_large_scores():
    "Keys in the hundreds, as some models have: q must not be rounded to a half"
    (q, k, v), g = random_qkv(300, 14, 2, 64, 8.)
    want = reference(q, k, v, 0)
    layer = Layer(14, 2, 64, 300)
    assert np.abs(layer.prefill(*g, 0).get() - want).max() < 2e-2
    assert np.abs(layer.decode(*(x[299:] for x in g), 299).get() - want[299:]).max() < 2e-2


def test_one_graph_for_all_positions():
    n = 600
    (q, k, v), g = random_qkv(n, 14, 2, 64)
    layer, stream = Layer(14, 2, 64, 1024), cp.cuda.Stream()
    x, out = [cp.empty((1, a.shape[1]), cp.float32) for a in g], cp.empty((1, 14*64), cp.float32)
    run = lambda: ka.attend_decode(x[0], layer.k, layer.v, out, layer.state, layer.work, k=x[1], v=x[2], stream=stream)
    for to, a in zip(x, g): to[:] = a[:1]
    with stream:
        run(); stream.synchronize()
        stream.begin_capture(); run(); graph = stream.end_capture()
        for p in range(n):
            for to, a in zip(x, g): to[:] = a[p:p+1]
            layer.state[0] = p
            graph.launch(stream)
            if p in (0, 127, 128, 599): assert np.abs(out.get() - reference(q[p:p+1], k[:p+1], v[:p+1], p)).max() < 1e-3
    stream.synchronize()


@pytest.mark.parametrize('H,K,d', [(8, 1, 64), (8, 8, 32)])
def test_long_context(H, K, d):
    n = 40000
    (q, k, v), g = random_qkv(n, H, K, d)
    layer = Layer(H, K, d, 131072)
    layer.state[0] = 0
    ka.store_kv(g[1], g[2], layer.k, layer.v, layer.state)
    want = reference(q[-1:], k, v, n - 1)
    assert np.abs(layer.decode(*(x[-1:] for x in g), n - 1).get() - want).max() < 1e-4
    assert np.abs(layer.prefill(*(x[-1:] for x in g), n - 1).get() - want).max() < 1e-4


def test_bounds():
    "Beyond the cache nothing is read or written"
    (q, k, v), g = random_qkv(4, 4, 2, 32)
    layer = Layer(4, 2, 32, 16)
    layer.k[:], layer.v[:] = 1, 2
    layer.decode(*(x[:1] for x in g), 16)
    layer.prefill(*g, 15)
    assert (layer.k[:, :15] == 1).all() and (layer.v[:, :15] == 2).all()
