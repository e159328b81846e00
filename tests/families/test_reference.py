"The reference engine against a forward pass in float64 that shares nothing with it, and its promises as an engine"
from dataclasses import replace
import numpy as np
import pytest
from make_models import ARCHES, make_model
from oracle import Float64
from orcd.errors import Cancelled, OrcdError, RequestError
from orcd.files.gguf import GGUF
from orcd.families.reference import ReferenceEngine
from orcd.text.sampling import SamplingParams

SHAPES = [dict(head_dim=32), dict(head_dim=48, n_head=6, n_head_kv=3, n_embd=96), dict(head_dim=64, n_head=2, n_head_kv=1),
    dict(head_dim=96, n_head=3, n_head_kv=1, n_embd=160),
    dict(head_dim=128, n_head=2, n_head_kv=2)]
GREEDY = SamplingParams(temperature=0.)


@pytest.fixture
def model(tmp_path):
    opened = []
    def make(arch, **kw):
        g = GGUF(make_model(tmp_path/'m.gguf', arch, **kw))
        opened.append(g)
        return g
    yield make
    for g in opened: g.close()


@pytest.mark.parametrize('shape', SHAPES, ids=lambda s: str(s['head_dim']))
@pytest.mark.parametrize('arch', ARCHES)
def test_float64(model, arch, shape):
    g = model(arch, n_layer=3, **shape)
    oracle, engine = Float64(g.path), ReferenceEngine(g)
    ids = np.random.default_rng(0).integers(0, 160, 40)
    logits, stream = oracle.run(ids)
    for n in (1, 2, 7, 8, 9, 40): # nobody looks ahead, so the oracle's rows are right for every shorter text
        got = engine.residuals(ids[:n])
        for i in range(4): assert abs(got[i] - stream[i][:n]).max() < 1e-4*stream[i].std(), f'layer {i - 1}'
        assert abs(engine.logits(ids[:n]) - logits[:n]).max() < 1e-4*logits.std()


@pytest.mark.parametrize('kw', [dict(arch='llama', rope_freqs=True), dict(arch='llama', n_rot=8), dict(arch='qwen2', tied=True),
    dict(arch='phi3', window=5),
    dict(arch='gpt-oss', types={'exps': 'MXFP4', '': 'Q8_0'}), dict(arch='qwen2', types='Q4_K', n_embd=256, n_ff=256),
    dict(arch='qwen3', types='Q6_K', n_embd=256),
    dict(arch='llama', biases=['attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_gate', 'ffn_up', 'ffn_down']),
    dict(arch='llama', biases=['ffn_down']),
    dict(arch='qwen2', leave_out=[f'blk.{i}.attn_{n}.bias' for i in range(2) for n in 'qkv']),
    dict(arch='qwen3', keys={'qwen3.attention.scale': .4}), dict(arch='gpt-oss', keys={'gpt-oss.attention.scale': .1}),
    dict(arch='phi3', keys={'phi3.rope.scaling.attn_factor': 1.2})], ids=str)
def test_variants(model, kw):
    g = model(**kw)
    ids = np.random.default_rng(3).integers(0, 160, 30)
    logits, _ = Float64(g.path).run(ids)
    for keep in (0, 1 << 30): assert abs(ReferenceEngine(g, keep_bytes=keep).logits(ids) - logits).max() < 1e-4*logits.std()


@pytest.mark.parametrize('keys', [{}, {'yarn_beta_fast': 8., 'yarn_beta_slow': 2.}, {'attn_factor': 1.3}], ids=str)
@pytest.mark.parametrize('yarn', [(4., 32), (4., 64), (8., 2048)], ids=str)
@pytest.mark.parametrize('arch', ARCHES)
def test_yarn(model, arch, yarn, keys):
    "The ends of the ramp are whole pairs, in gpt-oss fractional ones; logits of the other kind are far away"
    g = model(arch, yarn=yarn, keys={f'{arch}.rope.scaling.{k}': v for k, v in keys.items()})
    ids, engine = np.random.default_rng(4).integers(0, 160, 60), ReferenceEngine(g)
    want, _ = Float64(g.path).run(ids)
    assert abs(engine.logits(ids) - want).max() < 1e-4*want.std()
    rope = engine.config.rope
    other = ReferenceEngine(g, config=replace(engine.config, rope=replace(rope, yarn_truncate=not rope.yarn_truncate)))
    if (rope.inv_freq() != other.config.rope.inv_freq()).any(): assert abs(other.logits(ids) - want).max() > 1e-2*want.std()
    else: assert yarn == (4., 32) and 'yarn_beta_fast' in keys # where both ends are before the first pair


@pytest.mark.parametrize('arch', ARCHES)
def test_numbers_of_layers(model, arch):
    "An array with the same number for each layer is that number"
    one = model(arch, n_layer=3)
    c, ids = ReferenceEngine(one).config, [5, 9, 77, 3]
    want = ReferenceEngine(one).logits(ids)
    many = model(arch, n_layer=3, keys={f'{arch}.{k}': [n]*3 for k,
        n in (('attention.head_count', c.n_head), ('attention.head_count_kv', c.n_head_kv), ('feed_forward_length', c.n_ff))})
    assert ReferenceEngine(many).config == c and (ReferenceEngine(many).logits(ids) == want).all()


@pytest.mark.parametrize('arch', ARCHES)
def test_cached_decode_equals_fresh_prefill(model, arch):
    g = model(arch, n_layer=3)
    e, fresh = ReferenceEngine(g), ReferenceEngine(g)
    text = list(np.random.default_rng(1).integers(0, 160, 5))
    e.prefill(text)
    for i in np.random.default_rng(2).integers(0, 160, 30): # past the window of 8
        e.feed(i)
        text.append(i)
        assert abs(e.current - fresh.logits(text)[-1]).max() < 1e-3


def test_lengths(model):
    "Around the window and around the chunks of the prefill"
    g = model('gpt-oss', window=128)
    ids = np.random.default_rng(0).integers(0, 160, 300)
    logits, _ = Float64(g.path).run(ids)
    for n in (1, 2, 127, 128, 129, 255, 256, 257, 300):
        assert abs(ReferenceEngine(g).logits(ids[:n]) - logits[:n]).max() < 1e-4*logits.std(), n


def test_a_b_a(model):
    e = ReferenceEngine(model('gpt-oss'))
    def run(seed):
        e.prefill(np.random.default_rng(seed).integers(0, 160, 40))
        return list(e.decode(SamplingParams(temperature=.9, seed=5), 30))
    a = run(1)
    assert run(2) != a and run(1) == a


def test_padding_is_never_drawn(model):
    e = ReferenceEngine(model('qwen2'))
    e.n_valid = 3
    e.prefill([1, 2])
    assert {i for i, *_ in e.decode(SamplingParams(temperature=2.), 50)} <= {0, 1, 2}


def test_cancel(model):
    e = ReferenceEngine(model('qwen2'))
    calls = []
    def after(n): return lambda: calls.append(1) or len(calls) > n
    with pytest.raises(Cancelled): e.prefill([1]*300, cancelled=after(2))
    assert len(calls) == 3
    with pytest.raises(RequestError): next(e.decode(GREEDY, 1))
    e.prefill([1, 2])
    calls.clear()
    drawn = []
    with pytest.raises(Cancelled):
        for i, *_ in e.decode(GREEDY, 10, cancelled=after(4)): drawn.append(i)
    assert len(drawn) == 4


def test_protocol(model):
    with ReferenceEngine(model('qwen2'), n_ctx=16) as e:
        assert e.kind == 'reference' and e.resident is False and e.info()['resident'] is False and e.vram is None and e.n_ctx == 16
        for bad in ([], [160], [-1], [1.5], [[1]], [1]*17):
            with pytest.raises(OrcdError): e.prefill(bad)
        e.prefill([1]*16)
        assert len(list(e.decode(GREEDY, 5))) == 1
        assert e.logits([1, 2]).dtype == np.float32 and e.logits([1, 2]).shape == (2, 160)
