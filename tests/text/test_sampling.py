"The sampler against two implementations that share no code with it: one in float64, one in Python integers straight from the definition"
import math
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from orcd.errors import OrcdError, RequestError
from orcd.text.sampling import (RULES, Sampler, SamplingParams, check_params, kept, kept_simply, logprob, philox4x32, philox_u64, prepare,
    random_seed, weights)

F = np.float32


# --- the definition, token by token ---

def weight(z):
    if z < -23: return 0
    t = F(z * F(1.4426950408889634)); n = F(np.rint(t)); f = F(t - n); p = F(1.5403530e-4)
    for c in (1.3333558e-3, 9.618129e-3, 5.550411e-2, 2.4022651e-1, 6.9314718e-1, 1.0): p = F(F(p * f) + F(c))
    return math.floor(float(p) * 2.0 ** (int(n) + 32))


def slow_draw(logits, n_valid, p, step, seen):
    "(id drawn, ids kept) by the definition, in Python integers"
    l = []
    for i, x in enumerate(logits[:n_valid]):
        x = F(-np.inf) if np.isnan(x) else F(x)
        if p.temperature >= 1e-6: x = F(x / F(p.temperature))
        if i in seen and p.repetition_penalty != 1: x = F(x / F(p.repetition_penalty)) if x > 0 else F(x * F(p.repetition_penalty))
        l.append(x)
    order = sorted(range(len(l)), key=lambda i: (-l[i], i))
    if p.temperature < 1e-6 or l[order[0]] == -np.inf: return order[0], {order[0]}
    m = l[order[0]]
    w = [2**32 if x == m else weight(F(x - m)) for x in l]
    limit, mass, keep = (sum(w) * round(p.top_p * 2**32)) >> 32, 0, set()
    for rank, i in enumerate(order):
        in_k = p.top_k == 0 or rank < p.top_k
        in_p = p.top_p == 1 or mass < limit
        if rank == 0 or (in_k and in_p and w[i] >= round(p.min_p * 2**32) and w[i] > 0): keep.add(i)
        mass += w[i]
    r, total = (philox_u64(p.seed, step) * sum(w[i] for i in keep)) >> 64, 0
    for i in sorted(keep):
        total += w[i]
        if total > r: return i, keep


special = st.sampled_from([0.0, -0.0, 1.0, 1.0, 5.0, -5.0, 80.0, -80.0, 3e38, -3e38, math.inf, -math.inf, math.nan, 1e-40])
rows = st.lists(st.one_of(st.floats(-30, 30, width=32), special), min_size=1, max_size=40)
params = st.builds(SamplingParams, temperature=st.one_of(st.sampled_from([0, 1e-9, 1e-6, 1e-3, .7, 1, 2]), st.floats(0, 2)),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.sampled_from([0, 1, .5]), st.floats(0, 1)), min_p=st.one_of(st.sampled_from([0, 1]), st.floats(0, 1)),
    repetition_penalty=st.floats(1e-3, 2), seed=st.integers(0, 2**64 - 1))


@given(rows, params, st.integers(0, 2**40), st.integers(1, 40))
@settings(max_examples=400, deadline=None)
@example([math.nan] * 3, SamplingParams(), 0, 3)
@example([-math.inf] * 3, SamplingParams(temperature=2), 5, 3)
@example([math.inf, 1, math.inf], SamplingParams(top_k=1), 5, 3)
@np.errstate(all='ignore')
def test_equals_the_definition(row, p, step, n_valid):
    x, n_valid = np.array(row, F), min(n_valid, len(row))
    s, seen = Sampler(len(row), n_valid), set()
    s.reset(p)
    for i in range(3):
        want, keep = slow_draw(x, n_valid, p, step + i, seen)
        if p.T and not np.isneginf(prepare(x[:n_valid], p, seen).max()):
            l = prepare(x[:n_valid], p, seen)
            assert set(kept(l, p)[0]) == set(kept_simply(l, p)) == keep
        got, lp = s.draw(x, step + i)
        assert got == want < n_valid and (lp <= 1e-6 or math.isnan(lp))
        seen.add(got)


# --- float64 ---

def shares(x, p):
    "Probabilities after temperature and the filters in float64, and the distance of each token to a threshold"
    l = x.astype('f8') / p.temperature
    q = np.exp(l - l.max()); q /= q.sum()
    order = np.argsort(-q, kind='stable'); s = q[order]; before = np.cumsum(s) - s
    keep = np.ones(len(q), bool)
    near = np.full(len(q), np.inf)
    if p.top_k: keep &= np.arange(len(q)) < p.top_k
    if p.top_p < 1: keep &= before < p.top_p; near = np.minimum(near, abs(before - p.top_p))
    if p.min_p > 0: keep &= s >= p.min_p * s[0]; near = np.minimum(near, abs(s - p.min_p * s[0]))
    keep[0] = True
    out, distance = np.zeros(len(q), bool), np.zeros(len(q))
    out[order], distance[order] = keep, near
    return q, out, distance


@pytest.mark.parametrize('scale', [.5, 2, 8])
@pytest.mark.parametrize('kw', [dict(top_k=1), dict(top_k=50), dict(top_p=.3), dict(top_p=.95), dict(min_p=.02), dict(min_p=.5),
    dict(temperature=.3, top_k=500, top_p=.9, min_p=.01), dict(temperature=2.)], ids=str)
def test_sets_in_float64(scale, kw):
    p = SamplingParams(**kw)
    for seed in range(3):
        x = (np.random.default_rng(seed).normal(size=(33, 1000, 20000)[seed]) * scale).astype(F)
        q, want, distance = shares(x, p)
        got = np.zeros(len(x), bool); got[kept(prepare(x, p), p)[0]] = True
        sure = (distance > 1e-5) & (q / q.max() > 1e-9)      # elsewhere rounding decides
        assert (got == want)[sure].all() and sure.sum() > .9 * (q / q.max() > 1e-9).sum()


@pytest.mark.parametrize('kw', [{}, dict(temperature=.5), dict(temperature=2., top_k=7), dict(top_p=.8), dict(min_p=.1, temperature=1.5)],
    ids=str)
def test_frequencies(kw):
    "Chi-square of 6,000 draws; the limit is passed by chance once in 10^5"
    x = (np.random.default_rng(1).normal(size=30) * 1.5).astype(F)
    p, n = SamplingParams(seed=5, **kw), 6000
    q, keep, _ = shares(x, p)
    q = np.where(keep, q, 0); q /= q.sum()
    s = Sampler(30); s.reset(p)
    count = np.bincount([s.draw(x, i)[0] for i in range(n)], minlength=30)
    assert count[q == 0].sum() == 0
    big = n * q > 5
    rest, expected = n - count[big].sum(), n * (1 - q[big].sum())
    chi2 = ((count - n * q)[big] ** 2 / (n * q)[big]).sum() + (rest - expected) ** 2 / max(expected, 1)
    d = big.sum()
    assert chi2 < d + 4.3 * math.sqrt(2 * d) + 8


def test_logprob():
    x = (np.random.default_rng(0).normal(size=5000) * 4).astype(F)
    d = x.astype('f8'); want = d - (d.max() + np.log(np.exp(d - d.max()).sum()))
    assert max(abs(logprob(x, i) - want[i]) for i in range(0, 5000, 97)) < 1e-5
    s = Sampler(5000, 100); s.reset(SamplingParams(temperature=.1, repetition_penalty=2., top_k=3))
    i, lp = s.draw(x, 0)
    d = d[:100]
    assert abs(lp - (d[i] - d.max() - np.log(np.exp(d - d.max()).sum()))) < 1e-5  # over the valid ids alone, before temperature
    assert logprob(np.array([np.nan, 1, np.nan], F), 1) == 0.0


# --- promises ---

def draws(x, n, n_valid=None, **kw):
    s = Sampler(len(x), n_valid); s.reset(SamplingParams(**kw)); return [s.draw(np.array(x, F), i)[0] for i in range(n)]


def test_padding_is_never_drawn():
    x = np.zeros(64); x[50:] = 1000
    for kw in (dict(temperature=0), dict(), dict(temperature=2., top_k=64), dict(top_p=.99), dict(min_p=.5)):
        assert max(draws(x, 100, 50, **kw)) < 50


def test_ties_go_to_the_lowest_id():
    assert draws([1, 3, 3, 3], 3, temperature=0) == [1, 1, 1]
    assert set(draws([1, 3, 3, 3], 200, top_k=1)) == {1}
    assert set(draws([1, 3, 3, 3], 200, top_k=2)) == {1, 2}
    assert set(draws([1, 3, 3, 3], 200, top_p=0)) == {1}
    assert set(draws([3, 3, 3, 3], 200, top_p=.5)) == {0, 1}
    assert set(draws([3, 3, 3, 3], 200, min_p=1)) == {0, 1, 2, 3}


def test_cold_is_greedy_and_hot_is_flat():
    x = np.random.default_rng(0).normal(size=200)
    best = int(np.argmax(x.astype(F)))
    for T in (0, 1e-300, 1e-9, 1e-6, 1e-4): assert set(draws(x, 50, temperature=T)) == {best}
    assert len(set(draws(x, 2000, temperature=2.))) > 150


def test_same_seed_same_tokens_whatever_ran_before():
    x = np.random.default_rng(0).normal(size=500)
    a = draws(x, 40, seed=7)
    assert draws(x, 40, seed=7) == a != draws(x, 40, seed=8)
    s = Sampler(500); s.reset(SamplingParams(seed=1, repetition_penalty=2.)); s.draw(np.array(x, F), 0)
    s.reset(SamplingParams(seed=7)); assert [s.draw(np.array(x, F), i)[0] for i in range(40)] == a
    s.reset(SamplingParams(seed=7)); assert s.draw(np.array(x, F), 17)[0] == a[17]      # a step alone


def test_input_is_not_changed():
    x = np.arange(9, dtype=F); y = x.copy()
    s = Sampler(9); s.reset(SamplingParams(repetition_penalty=2., temperature=.5))
    for i in range(5): s.draw(x, i)
    assert (x == y).all()


@pytest.mark.parametrize('kw', [dict(top_p=.9), dict(top_p=.999), dict(top_k=300, top_p=.99), dict(top_k=5000), {}], ids=str)
def test_large_vocabulary(kw):
    "The growing search of top-p against the full sort, with many equals"
    p = SamplingParams(**kw)
    for decimals in (1, 6):
        l = prepare(np.round(np.random.default_rng(0).normal(size=50_000) * 2, decimals).astype(F), p)
        assert np.array_equal(kept(l, p)[0], kept_simply(l, p))


def test_weights_monotone_enough():
    z = -np.linspace(0, 23.5, 200_001).astype(F)
    w = weights(z).astype('f8'); exact = np.floor(2**32 * np.exp(z.astype('f8')))
    assert w[0] == 2**32 and (abs(w - exact) <= 1 + 3e-6 * exact)[z >= -23].all() and (w[z < -23] == 0).all()


def test_philox():
    assert [f'{w:08x}' for w in philox4x32((0,) * 4, (0,) * 2)] == ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    assert ([f'{w:08x}' for w in philox4x32((0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344), (0xa4093822, 0x299f31d0))]
        == ['d16cfe09', '94fdcceb', '5001e420', '24126ea1'])
    many = {philox_u64(s, i) for s in (0, 1, 2**32, 2**64 - 1) for i in (*range(500), 2**32, 2**63)}
    assert len(many) == 4 * 502 and max(many) < 2**64
    ones = np.mean([bin(u).count('1') for u in many]); assert abs(ones - 32) < .5


# --- rules ---

@pytest.mark.parametrize('field, good, bad', [
    ('max_tokens', [1, 2048], [0, 2049, -1, 1.5, '1', True, 1.0, 2**70]),
    ('temperature', [0, 0.0, 2, 2.0, 1e-9, np.float32(.5)], [-1e-9, 2.0001, math.nan, math.inf, '1', True, []]),
    ('top_k', [0, 1, 10**30, np.int64(4)], [-1, 1.0, '5', False]),
    ('top_p', [0, 1, .5], [-.1, 1.1, math.nan, None.__class__]),
    ('min_p', [0, 1, .5], [-.1, 1.1, math.nan, {}]),
    ('repetition_penalty', [1e-9, 2, 1], [0, 0.0, -1, 2.1, math.nan]),
    ('seed', [0, 2**64 - 1], [-1, 2**64, 1.0, '42', True]),
    ('stop', ['a', [], ['a', 'b', 'c', 'd'], ('\n',)], ['', [''], list('abcde'), [1], 7, {'a': 1}, ['\ud800']])])
def test_rules(field, good, bad):
    for v in good: assert check_params({field: v}) == []
    for v in bad:
        (e, *_) = check_params({field: v})
        assert (e['field'] == field and e['message'] and e['constraint']
            and ('value' not in e or (isinstance(e['value'], str) and len(e['value']) <= 64 and e['value'].encode())))
    assert check_params({field: None}) == []


def test_rules_form():
    assert check_params(dict(max_tokens=4096)) == [dict(field='max_tokens', constraint='range(1..=2048)', value='4096',
        message='max_tokens must be a whole number of at least 1 and at most 2048')]
    assert (check_params(dict(max_tokens=4096), max_tokens=None) == []
        and check_params(dict(max_tokens=65), max_tokens=64)[0]['constraint'] == 'range(1..=64)')
    assert check_params(dict(repetition_penalty=0))[0]['constraint'] == 'range(0.0<..=2.0)'
    assert (check_params(dict(stop=['x' * 33]), count_tokens=len)[0]['constraint'] == 'tokens(1..=32)'
        and check_params(dict(stop=['x' * 32]), count_tokens=len) == [])
    assert 'value' not in check_params(dict(stop=['']))[0]
    assert len(check_params(dict(max_tokens=0, temperature=9, seed=-1, stop=7))) == 4
    assert '5000' in check_params(dict(seed=2**5000))[0]['value'] or 'bits' in check_params(dict(seed=2**5000))[0]['value']


@pytest.mark.parametrize('stop', ['x'*4097, ['a', 'x'*500_000], ['x'*4097]*4, ['x'*4097]*100_000, ['\ud800'*5000]],
    ids=lambda s: f'{len(s)}')
def test_what_is_too_long_is_not_counted(stop):
    "Whoever sends a megabyte does not get it tokenised"
    counted = []
    errors = check_params(dict(stop=stop), count_tokens=lambda s: counted.append(s) or 1)
    assert 'characters(1..=4096)' in [e['constraint'] for e in errors] and max(map(len, counted), default=0) <= 1


def test_the_longest_stop_string():
    "32 tokens of the longest kind that published vocabularies have"
    assert check_params(dict(stop=['='*4096]*4), count_tokens=lambda s: len(s)//128) == []


@given(st.dictionaries(st.sampled_from([*RULES, 'stop', 'model']),
    st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=4)))
@settings(deadline=None)
def test_rules_never_crash(d):
    errors = check_params(d)
    for e in errors: str(e).encode(); e.get('value', '').encode()
    sampling = {k: v for k, v in d.items() if k in SamplingParams.__dataclass_fields__ and v is not None}
    if errors and {e['field'] for e in errors} & set(sampling):
        with pytest.raises(RequestError): SamplingParams(**sampling)
    else: SamplingParams(**sampling)


def test_params():
    p = SamplingParams(temperature=.5, top_k=3)
    with pytest.raises(AttributeError): p.top_k = 4
    with pytest.raises(OrcdError, match='top_p') as e: SamplingParams(top_p=-1, min_p=2)
    assert [x['field'] for x in e.value.errors] == ['top_p', 'min_p']
    assert 0 <= random_seed() < 2**64 and random_seed() != random_seed()
