"""Layers of a decode step on the CPU: the real operations launch the real products (by test_gemv_cuda.py's launcher), attention is NumPy; against the reference engine.

One token at position 0, where attention is easy: what is tested is what `ops` makes of a layer, which products go together and what they do on the way."""
import ctypes
from types import SimpleNamespace as NS
import numpy as np, pytest
import orcd
from make_models import MODELS, make_model
from orcd.kernels import attention, gemv, nvrtc
from orcd.engine.cuda_engine import is_float_array, open_model
from orcd.engine.ops import CudaOps
from orcd.families.reference import ReferenceEngine
from launched import take_launches
from test_gemv_cuda import Array, library, on_cpu, tensor


class Scratch:
    ptr = 1
    def reset(self): pass
    def take(self, shape, dtype=np.float32): return Array(np.full(shape, np.nan if np.dtype(dtype).kind == 'f' else -1, dtype))


def attend(config):
    "Attention of the first position: its own value, less what the sinks take"
    def run(q, k_cache, v_cache, out, state, workspace, window=0, sinks=None, scale=None, k=None, v=None, rope=None, stream=None):
        H, K, d = config.n_head, config.n_head_kv, config.head_dim
        _, mscale, _, n_rot = rope
        turn = np.where(np.arange(d) < n_rot, mscale, 1)
        q, k, v = (y.a.astype(float).reshape(-1, d) for y in (q, k, v))
        k, v = k.repeat(H//K, 0), v.repeat(H//K, 0)
        share = 1 if sinks is None else 1/(1 + np.exp(sinks.a - ((q*turn)*(k*turn)).sum(1)*scale))
        out.a[:] = (v*np.reshape(share, (-1, 1))).reshape(1, -1)
    return run


def at(address, *shape):
    "float32 values in memory"
    return np.ctypeslib.as_array(ctypes.cast(int(address), ctypes.POINTER(ctypes.c_float)), shape) if address else None


def plain(l):
    "gemv_plain.cu for one row and weights in F32"
    a = l.values(gemv.GEMV_PLAIN)
    assert l.name == 'gemv_f32' and l.grid == (a['n_out'], 1) and not a['ids'] and not a['residual']
    v, w, bias = at(a['x'], a['n_in']).astype(float), at(a['norm'], a['n_in']), at(a['bias'], a['n_out'])
    if w is not None: v = v*w/np.sqrt((v**2).mean() + a['eps'])
    at(a['out'], a['n_out'])[:] = at(a['w'], a['n_out'], a['n_in']).astype(float) @ v + (0 if bias is None else bias)


@pytest.mark.parametrize('name, more', [('qwen2', {}), ('qwen2 Q5_K', {}), ('phi3', {}), ('gpt-oss', {}), ('llama', {}), ('gpt-oss', dict(keys={'gpt-oss.attention.scale': .5})),
    ('llama', dict(biases=['attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_gate', 'ffn_up', 'ffn_down']))], ids=str)
def test_layers(tmp_path, on_cpu, monkeypatch, name, more):
    path = make_model(tmp_path/'m.gguf', n_layer=3, n_vocab=200, **MODELS[name], **more)
    launched = []
    def take(l):
        if l.file == 'gemv_plain': return plain(l)
        launched.append(l.name)
        on_cpu.take(l)
    take_launches(monkeypatch, take)
    with orcd.GGUF(path) as g, ReferenceEngine(g, 32) as reference:
        family, config, bound = open_model(g)
        want = reference.residuals([7])[:, 0]
        monkeypatch.setattr(attention, 'attend_decode', attend(config))
        def upload(t):
            if t is None: return None
            if is_float_array(t): return Array(g.dequantize(t.name))
            raw = g.blocks(t.name)
            return nvrtc.QTensor(t.type, t.shape, Array(raw.reshape(-1)), t.name) if t.type.block_size == 1 else tensor(raw, t.type, t.shape)
        layers = [NS(**{role: upload(t) for role, t in roles.items()}) for roles in bound.layers]
        ops = CudaOps(config, 32, Scratch(), [(None, None)]*config.n_layer)
        ops.decode = True
        x = Array(want[:1])
        for i, w in enumerate(layers):
            ops.begin_layer()
            assert family.layer(ops, x, w, i) is x
            ops.begin_layer()
            assert abs(x.a[0] - want[i + 1]).max() < 2e-5*abs(want[i + 1]).max(), i
    kinds = [n.split('_')[0] for n in launched]
    layer = kinds[:len(kinds)//3]
    assert kinds == layer*3 and layer[-3:] == ['gemv', 'gated', 'mix' if name == 'gpt-oss' else 'gemv'] and set(layer[:-3]) == {'gemv'} and len(layer) <= 5, 'q, k and v together; gate, up and activation; the experts and their sum'
