"The check of single layers, on small models: it lets the roundings of the NumPy engine pass and finds small mistakes. Wants PyTorch, but no GPU."
from contextlib import contextmanager
import numpy as np
import pytest

torch = pytest.importorskip('torch')

import orcd
from by_layer import layer_errors, limits, too_far
from make_models import MODELS, make_model
from rounded import Rounded
from torch_oracle import Oracle

N_LAYER, NAMES = 2, ('qwen2', 'phi3', 'gpt-oss')


@pytest.fixture(scope='module', params=NAMES)
def case(request, tmp_path_factory):
    "Streams of the NumPy engine with the roundings of the CUDA engine, and an oracle. Takes all experts, so that nothing is chosen."
    path = make_model(tmp_path_factory.mktemp('model') / 'm.gguf', seed=3, n_layer=N_LAYER, n_vocab=331, **MODELS[request.param] | dict(n_expert_used=6))
    with orcd.GGUF(path) as g: residuals = Rounded(g, wide=True).residuals(np.random.default_rng(0).integers(0, 331, 64))
    oracle = Oracle(path, 'cpu', halves=True, keep=True)
    oracle.wide = True
    return residuals, oracle


def a_scale_off_by_one(oracle):
    "The last bit of a block's scale in one row of the last matrix of layer 1"
    name = f'blk.1.ffn_down{"_exps" * (oracle.arch == "gpt-oss")}.weight'
    t, at = oracle.t[name], {'Q6_K': 192, 'Q4_K': 4}.get(oracle.t[name].tensor_type.name, 0) # where a row's first scale lies
    data = t.data.copy()
    data[..., 5, at] ^= 1
    return dict(t=oracle.t | {name: t._replace(data=data)}, kept={})

# what is wrong -> attributes of the oracle
MISTAKES = {
    'base of RoPE off by 1 %': lambda o: dict(key=lambda k, d=None, key=o.key: key(k, d)*1.01 if k == 'rope.freq_base' else key(k, d)),
    'scale of attention off by 0.5 %': lambda o: dict(attention=lambda q, *a, f=o.attention: f(q*1.005, *a)),
    'activation off by 0.2 %': lambda o: dict(between=lambda y, s, f=o.between: f(y*1.002, s)),
    'eps of the norms 1e-3 too large': lambda o: dict(eps=o.eps + 1e-3),
    'keys and values not rounded': lambda o: dict(attention=lambda q, k, v, *a, f=o.attention: unrounded(o, f, q, k, v, *a)),
    'a scale off by one': a_scale_off_by_one,
}
