"The check of single layers, on small models: it lets the roundings of the NumPy engine pass and finds small mistakes. Wants PyTorch, but no GPU."
import numpy as np
import pytest

torch = pytest.importorskip('torch')

import orcd
from by_layer import layer_errors, too_far
from make_models import MODELS, make_model
from rounded import Rounded
from torch_oracle import Oracle

N_LAYER, NAMES = 2, ('qwen2', 'phi3', 'gpt-oss')


@pytest.fixture(scope='module', params=NAMES)
def case(request, tmp_path_factory):
    "Streams of the NumPy engine with the roundings of the CUDA engine, and an oracle. Takes all experts, so that nothing is chosen."
    path = make_model(tmp_path_factory.mktemp('model') / 'm.gguf', seed=3, n_layer=N_LAYER, n_vocab=331, **MODELS[request.param] | dict(n_expert_used=6))
    with orcd.GGUF(path) as g: residuals = Rounded(g, is_hopper=True).residuals(np.random.default_rng(0).integers(0, 331, 64))
    oracle = Oracle(path, 'cpu', halves=True, keep=True)
    oracle.is_hopper = True
    return residuals, oracle


def off_by_one(oracle):
    "The first block of one row of the last matrix: its scale of 6 or 8 bits off by one, or its half by 3 %"
    name = f'blk.1.ffn_down{"_exps" * (oracle.arch == "gpt-oss")}.weight'
    t = oracle.t[name]
    at, bit = {'Q6_K': (192, 1), 'MXFP4': (0, 1), 'Q4_0': (0, 32)}[t.tensor_type.name] # which byte of a block, which bit of it
    data = t.data.copy()
    data[..., 5, at] ^= bit
    return dict(t=oracle.t | {name: t._replace(data=data)}, kept={})


MISTAKES = { # what is wrong: attributes of the oracle
    'base of RoPE off by 1 %': lambda o: dict(key=lambda k, d=None, key=o.key: key(k, d) * 1.01 if k == 'rope.freq_base' else key(k, d)),
    'scale of attention off by 0.5 %': lambda o: dict(attention=lambda q, *more, f=o.attention: f(q*1.005, *more)),
    'activation off by 0.2 %': lambda o: dict(between=lambda y, scale, f=o.between: f(y*1.002, scale)),
    'eps of the norms 1e-3 too large': lambda o: dict(eps=o.eps + 1e-3),
    'a scale of a block': off_by_one,
}


def test_our_roundings_pass(case):
    residuals, oracle = case
    assert not too_far(*layer_errors(oracle, residuals, N_LAYER))


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_found(case, mistake, monkeypatch):
    residuals, oracle = case
    for name, wrong in MISTAKES[mistake](oracle).items(): monkeypatch.setattr(oracle, name, wrong)
    found = too_far(*layer_errors(oracle, residuals, N_LAYER))
    print(found)
    assert found
