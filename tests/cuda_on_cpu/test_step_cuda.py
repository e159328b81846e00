"""Layers of a decode step on the CPU: what the layers are lowered to is run by the real products (test_gemv_cuda.py), attention is NumPy; against the reference engine.

One token at position 0, where attention is easy: what is tested is what lowering makes of a layer, which products go together and what they do on the way."""
import ctypes
from types import SimpleNamespace as NS
import numpy as np, pytest
import orcd
from make_models import MODELS, make_model
from orcd.kernels import attention, gemv, nvrtc
from orcd.engine.lower import Layers, Program, is_float_array
from orcd.families.arch import open_model
from orcd.families.reference import ReferenceEngine
from launched import Launched
from test_gemv_cuda import Array, library, on_cpu, tensor # noqa: F401 (fixtures)


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


def attend(l):
    "Attention of the first position: its own value, less what the sinks take"
    a = l.values(attention.ATTEND_DECODE)
    H, K, d = a['n_head'], a['n_head_kv'], dict(x.split('=') for x in l.defines)['HEAD_DIM']
    d = int(d)
    turn = np.where(np.arange(d) < a['n_rot'], a['mscale'], 1)
    q, k, v = (at(a[n], h, d).astype(float) for n, h in (('q', H), ('k', K), ('v', K)))
    k, v = k.repeat(H//K, 0), v.repeat(H//K, 0)
    sinks = at(a['sinks'], H)
    share = 1 if sinks is None else 1/(1 + np.exp(sinks - ((q*turn)*(k*turn)).sum(1)*a['scale']/np.log2(np.e)))
    at(a['out'], H, d)[:] = v*np.reshape(share, (-1, 1))


@pytest.mark.parametrize('name, more', [('qwen2', {}), ('qwen2 Q5_K', {}), ('phi3', {}), ('gpt-oss', {}), ('llama', {}), ('gpt-oss', dict(keys={'gpt-oss.attention.scale': .5})),
    ('llama', dict(biases=['attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_gate', 'ffn_up', 'ffn_down']))], ids=str)
def test_layers(tmp_path, on_cpu, monkeypatch, name, more): # noqa: F811 (a fixture)
    path = make_model(tmp_path/'m.gguf', n_layer=3, n_vocab=200, **MODELS[name], **more)
    launched = []
    monkeypatch.setattr(nvrtc, 'kernel', lambda *a: NS(config=lambda *a: None, handle=0))
    with orcd.GGUF(path) as g, ReferenceEngine(g, 32) as reference:
        want = reference.residuals([7])[:, 0]
        layers = Layers(*open_model(g), True, gemv.HOPPER)
        def upload(t):
            if is_float_array(t): return Array(g.dequantize(t.name))
            raw = g.blocks(t.name)
            return Array(raw.reshape(-1)) if t.type.block_size == 1 else tensor(raw, t.type, t.shape).data
        x = Array(want[:1])
        for i, roles in enumerate(layers.bound.layers):
            low = layers.layer(i, 1, 32, True)
            scratch = Array(np.full(low.scratch, 255, np.uint8))       # NaN, or -1
            own = {role: upload(t) for role, t in roles.items() if t is not None} | dict(x=x, scratch=scratch)
            addresses = np.zeros(len(layers.roles), np.uint64)
            for role, a in own.items(): addresses[layers.roles[role]] = a.data.ptr
            for l in low.launches:
                args = Program([l], layers.roles, None).arguments(addresses).tobytes()[:l.args.code.size]
                l = Launched(l.file, l.name, l.defines, l.grid, (l.block,), args, l.shared)
                launched.append(l.name)
                if l.file == 'gemv_plain': plain(l)
                elif l.file == 'attention': attend(l)
                else: on_cpu.take(l)
            assert abs(x.a[0] - want[i + 1]).max() < 2e-5*abs(want[i + 1]).max(), i
    kinds = [n.split('_')[0] for n in launched]
    layer = kinds[:len(kinds)//3]
    assert kinds == layer*3 and layer[-3:] == ['gemv', 'gated', 'mix' if name == 'gpt-oss' else 'gemv'] and set(layer[:-3]) == {'gemv', 'attend'} and len(layer) <= 6, 'q, k and v together; gate, up and activation; the experts and their sum'
