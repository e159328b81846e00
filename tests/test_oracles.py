"The tests' own oracles for FP16: what they must accept and what they must not"
import sys
import numpy as np
import pytest
import rounded
from make_models import ARCHES, make_model
from orcd.files.gguf import GGUF
from orcd.families.reference import ReferenceEngine
from routing import Recorded, best, forced
from worker_tools import ROOT


@pytest.fixture
def gguf_file(tmp_path):
    opened, types = [], {'exps': 'MXFP4', '': 'Q8_0'}
    def make(arch):
        window = 40 if arch == 'gpt-oss' else None
        opened.append(GGUF(make_model(tmp_path/'m.gguf', arch, types=types, n_layer=3, n_embd=64, head_dim=32, window=window)))
        return opened[-1]
    yield make
    for g in opened: g.close()


def scores(seed, n_layer=3, T=200, n=32): return np.random.default_rng(seed).standard_normal((n_layer, T, n)).astype(np.float32)

def judged(engine, oracle, ids=None, limit=1e-2):
    "`check` of choices that were recorded in two chunks and are followed in one"
    seen = Recorded(len(engine))
    for part in (slice(None, 70), slice(70, None)):
        for i, s in enumerate(engine): seen.calls.append((s[part], best(s[part], 4) if ids is None else ids[i][part]))
    follower = seen.follow()
    for i, s in enumerate(oracle): assert (follower(s) == (best(engine[i], 4) if ids is None else ids[i])).all()
    return follower.check(limit)


def test_a_choice_between_equals_is_accepted():
    oracle = scores(0)
    engine = oracle + np.random.default_rng(1).uniform(-4e-3, 4e-3, oracle.shape).astype(np.float32)
    engine[1, 5, :] = oracle[1, 5, :]
    fourth, fifth = best(oracle[1], 5)[5, 3:]
    oracle[1, 5, fifth] = oracle[1, 5, fourth] - 1e-3
    engine[1, 5, fifth], engine[1, 5, fourth] = oracle[1, 5, fourth], oracle[1, 5, fifth]
    swapped, lost, off = judged(engine, oracle)
    assert 1/600 <= swapped < .02 and 5e-4 < lost < 1e-2 and 1e-3 < off < 1e-2


def test_a_wrong_choice_is_seen():
    oracle = scores(0)
    ids = [best(s, 4) for s in oracle]
    assert judged(oracle, oracle, ids) == (0, 0, 0)
    worst = [i.copy() for i in ids]
    worst[2][100, 3] = best(oracle[2], 5)[100, 4] # the fifth best, once
    with pytest.raises(AssertionError, match='layer 2: the engine did not take the best'): judged(oracle, oracle, worst)
    off = oracle.copy()
    off[1, 100, 7] += .05
    with pytest.raises(AssertionError, match='layer 1: the scores differ'): judged(off, oracle)
    with pytest.raises(AssertionError, match='of the choices differ'): judged(oracle + scores(1)/10, oracle, limit=1)


def test_a_reference_follows(gguf_file):
    engine, ids = ReferenceEngine(gguf_file('gpt-oss')), np.random.default_rng(0).integers(0, 160, 150)
    k = engine.config.n_expert_used
    seen, route = Recorded(engine.config.n_layer), engine.model.ops.route
    engine.model.ops.route = lambda s, k: (seen.calls.append((s, best(s, k))), route(s, k))[1]
    want = engine.logits(ids)
    with forced(engine, seen.follow()): assert (engine.logits(ids) == want).all()
    seen.calls = [(s, best(-s, k)) for s, _ in seen.calls]
    with forced(engine, seen.follow()): assert (abs(engine.logits(ids) - want).max(1) > .1*want.std()).mean() > .9


@pytest.mark.parametrize('arch', ARCHES)
def test_only_roundings_set_them_apart(gguf_file, arch, monkeypatch):
    "The rounded engine is the reference engine where nothing is rounded: tiles and running maxima change nothing"
    g, ids = gguf_file(arch), np.random.default_rng(0).integers(0, 160, 200)
    plain, other = ReferenceEngine(g), rounded.Rounded(g)
    want = plain.logits(ids)
    if arch != 'gpt-oss': assert 5e-4 < abs(other.logits(ids) - want).max()/want.std() < 3e-2
    for name in ('half', 'as_half'): monkeypatch.setattr(rounded, name, lambda x: x)
    assert abs(rounded.Rounded(g).logits(ids) - want).max() < 1e-4*want.std()


def test_halves():
    x = np.random.default_rng(0).standard_normal((50, 70)).astype(np.float32) * np.exp2(np.arange(-20, 30, dtype=np.float32))[:, None]
    x[3, :], x[4, 0] = 0, 1e-12
    y = rounded.as_half(x)
    assert (abs(y - x) <= abs(x)*2**-11 + abs(x).max(1, keepdims=True)*2.**-39).all() and (y != x).mean() > .9
    # ties to even; the row's scale keeps the small one normal
    fixed = np.float32([[1, 1 + 2**-10, 1 + 2**-11, 1 + 3*2**-11, 2**-20 + 2**-30]])
    assert rounded.as_half(fixed).tolist() == [[1, 1 + 2**-10, 1, 1 + 2**-9, 2**-20 + 2**-30]]


@pytest.mark.parametrize('arch', ['qwen2', 'phi3', 'gpt-oss'])
def test_two_oracles(gguf_file, arch):
    "NumPy's and PyTorch's model of the roundings share no code; what is between them are roundings that went the other way"
    pytest.importorskip('torch')
    sys.path.insert(0, str(ROOT/'tests'/'gpu'))
    from torch_oracle import Oracle
    g, ids = gguf_file(arch), np.random.default_rng(0).integers(0, 160, 200)
    oracle, engine = Oracle(g.path, 'cpu', halves=True), rounded.Rounded(g)
    seen = Recorded(engine.config.n_layer)
    if arch == 'gpt-oss':
        def choose(s): seen.calls.append((s, best(s, engine.config.n_expert_used))); return seen.calls[-1][1]
        oracle.choose = choose
    want = oracle.run(ids)[1]
    follower = seen.follow() if seen.calls else None
    with forced(engine, follower): got = engine.logits(ids)
    rows = abs(got - want).max(1)/want.std()
    assert rows.max() < 6e-3 and np.median(rows) < 2.2e-3  # without the roundings more than 7e-3 and 3e-3
    if follower: follower.check(5e-3)
