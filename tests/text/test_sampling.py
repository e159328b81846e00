"The sampler against two implementations that share no code with it: one in float64, one in Python integers straight from the definition"
import math
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from orcd.errors import OrcdError, RequestError
from orcd.text.sampling import (BIAS, RULES, STOP, Sampler, SamplingParams, check_params, kept, kept_simply, logprob, philox4x32,
    philox_u64, prepare, random_seed, rules_for, shape, top_logprobs, weights)

F = np.float32


# --- the definition, token by token ---

def weight(z):
    if z < -23: return 0
    t = F(z * F(1.4426950408889634)); n = F(np.rint(t)); f = F(t - n); p = F(1.5403530e-4)
    for c in (1.3333558e-3, 9.618129e-3, 5.550411e-2, 2.4022651e-1, 6.9314718e-1, 1.0): p = F(F(p * f) + F(c))
    return math.floor(float(p) * 2.0 ** (int(n) + 32))


def slow_draw(logits, n_valid, p, step, seen, may=None):
    "(id drawn, ids kept) by the definition, in Python integers; `seen` has how often, `may` what a constraint allows"
    l = []
    for i, x in enumerate(logits[:n_valid]):
        if may is not None: x = F(-np.inf) if i not in may else F(-1e30) if np.isnan(x) or x < F(-1e30) else x
        x = F(-np.inf) if np.isnan(x) else F(x)
        if i in p.logit_bias: x = F(x + F(p.logit_bias[i]))
        if i in seen: x = F(x - F(F(F(seen[i]) * F(p.frequency_penalty)) + F(p.presence_penalty)))
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
penalty = st.one_of(st.sampled_from([0, -2, 2]), st.floats(-2, 2))
shaped = st.builds(SamplingParams, temperature=st.sampled_from([0, 1e-6, .7, 1, 2]), top_k=st.sampled_from([0, 0, 3]),
    top_p=st.sampled_from([1, 1, .6]), repetition_penalty=st.sampled_from([1, 1, 1.3, 1e-6]), seed=st.integers(0, 2**64 - 1),
    frequency_penalty=penalty, presence_penalty=penalty,
    logit_bias=st.dictionaries(st.integers(0, 39), st.one_of(st.sampled_from([-100, 0, 100]), st.floats(-100, 100)), max_size=9))


@given(rows, params, st.integers(0, 2**40), st.integers(1, 40))
@settings(max_examples=400, deadline=None)
@example([math.nan] * 3, SamplingParams(), 0, 3)
@example([-math.inf] * 3, SamplingParams(temperature=2), 5, 3)
@example([math.inf, 1, math.inf], SamplingParams(top_k=1), 5, 3)
@np.errstate(all='ignore')
def test_equals_the_definition(row, p, step, n_valid):
    x, n_valid = np.array(row, F), min(n_valid, len(row))
    s, seen = Sampler(len(row), n_valid), {}
    s.reset(p)
    for i in range(3):
        want, keep = slow_draw(x, n_valid, p, step + i, seen)
        if p.T and not np.isneginf(prepare(x[:n_valid], p, seen).max()):
            l = prepare(x[:n_valid], p, seen)
            assert set(kept(l, p)[0]) == set(kept_simply(l, p)) == keep
        got, lp, _ = s.draw(x, step + i)
        assert got == want < n_valid and (lp <= 1e-6 or math.isnan(lp))
        seen[got] = seen.get(got, 0) + 1


def words(may, n):
    "A constraint's mask, bit by bit"
    return np.array([sum(1 << i for i in range(32) if 32*w + i in may) for w in range(n)], np.uint32)


@given(st.lists(st.one_of(st.floats(-30, 30, width=32), special), min_size=40, max_size=45), shaped,
    st.one_of(st.none(), st.sets(st.integers(0, 39), min_size=1)), st.integers(0, 2**40))
@settings(max_examples=400, deadline=None)
@example([math.nan] * 40, SamplingParams(), {7, 9}, 0)
@example([-math.inf] * 40, SamplingParams(temperature=0, repetition_penalty=1e-6), {7}, 0)
@example([math.inf] * 40, SamplingParams(temperature=1e-6, logit_bias={3: 100}), {7, 39}, 0)
@np.errstate(all='ignore')
def test_mask_bias_and_penalties_equal_the_definition(row, p, may, step):
    x = np.array(row, F)
    s, seen = Sampler(len(row), 40), {}
    s.reset(p)
    for i in range(5):
        got = s.draw(x, step + i, None if may is None else words(may, 2)).id
        assert got == slow_draw(x, 40, p, step + i, seen, may)[0] and (may is None or got in may)
        seen[got] = seen.get(got, 0) + 1


# --- as it was before there were masks and biases ---

LOGITS = (np.random.default_rng(5).normal(size=3000) * 3).astype(F)

@pytest.mark.parametrize('kw, want', [
    (dict(seed=9), [1969, 1725, 1876, 2513, 185, 639, 1650, 625, 1073, 632, 554, 1650]),
    (dict(seed=9, top_k=50), [2059, 1969, 1980, 2522, 185, 803, 1749, 639, 1121, 639, 639, 1650]),
    (dict(seed=9, top_p=.9, temperature=.6), [2488, 2488, 2488, 2522, 220, 803, 2488, 639, 1650, 639, 639, 2204]),
    (dict(seed=9, repetition_penalty=1.4, min_p=.01), [1980, 1838, 1969, 2522, 185, 639, 1650, 625, 1073, 632, 554, 1645])], ids=str)
def test_the_tokens_that_version_0_1_drew(kw, want):
    s = Sampler(3000, 2990); s.reset(SamplingParams(**kw))
    assert [s.draw(LOGITS, i).id for i in range(12)] == want
    s.reset(SamplingParams(**kw, frequency_penalty=0, presence_penalty=0, logit_bias={}, top_logprobs=3))
    assert [s.draw(LOGITS, i, words(range(3000), 94)).id for i in range(12)] == want, 'a mask that allows everything changes nothing'


# --- penalties and bias in float64, by the formula of OpenAI's documentation ---

def test_penalties_in_float64():
    "mu[j] - c[j]*frequency - (c[j] > 0)*presence, then softmax: what comes after a history, against frequencies"
    x = (np.random.default_rng(2).normal(size=12) * 1.5).astype(F)
    p = SamplingParams(seed=3, frequency_penalty=.7, presence_penalty=-.4, logit_bias={4: 2.5, 9: -100}, temperature=1.3)
    history = {0: 3, 4: 1, 7: 9}
    mu = x.astype('f8')
    for j, b in p.logit_bias.items(): mu[j] += b
    for j, c in history.items(): mu[j] = mu[j] - c*p.frequency_penalty - (c > 0)*p.presence_penalty
    q = np.exp(mu/1.3); q /= q.sum()
    s = Sampler(12); s.reset(p); drawn = []
    for i in range(6000):
        s.seen = dict(history)
        drawn.append(s.draw(x, i).id)
    count, big = np.bincount(drawn, minlength=12), 6000*q > 5
    assert count[9] == 0 and ((count - 6000*q)[big]**2/(6000*q)[big]).sum() < 45      # 11 degrees of freedom: by chance once in 10^5
    assert np.allclose(shape(x, p, history), mu, atol=1e-5)


@pytest.mark.parametrize('mask', [np.zeros(2, np.uint32), words({40, 41}, 2)], ids=['nothing', 'only padding'])
def test_an_empty_mask_says_so(mask):
    s = Sampler(64, 40)
    with pytest.raises(RequestError, match='allows no token'): s.draw(np.zeros(64, F), 0, mask)


@pytest.mark.parametrize('mask', [np.ones(1, np.uint32), np.ones(40, bool), np.ones((2, 2), np.uint32), np.ones(2, np.int32)],
    ids=['short', 'bools', 'square', 'signed'])
def test_a_mask_that_is_none(mask):
    with pytest.raises(RequestError, match='at least 2 uint32'): Sampler(64, 40).draw(np.zeros(64, F), 0, mask)


@given(st.lists(st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, 0.0, 5.0, math.inf, -math.inf, math.nan])), min_size=1,
    max_size=40), st.integers(1, 20))
@settings(deadline=None)
@example([0.0, 5.0, 1e-8], 2)
def test_top_logprobs(row, n):
    "By sorting everything, in float64"
    x = np.array(row, F); l = np.where(np.isnan(x), -np.inf, x.astype('f8')); m = l.max()
    with np.errstate(invalid='ignore'): d = np.where(l == m, 0, l - m)
    want = d - np.log(np.exp(d).sum())
    order = sorted(range(len(x)), key=lambda i: (-l[i], i))[:n]
    got = top_logprobs(x, n)
    assert [i for i, _ in got] == order and np.allclose([v for _, v in got], want[order], atol=1e-5)
    assert [v for _, v in got] == [logprob(x, i) for i, _ in got]
    s = Sampler(len(x) + 5, len(x)); s.reset(SamplingParams(temperature=.3, top_logprobs=n, logit_bias={0: 100}, frequency_penalty=2))
    assert s.draw(np.append(x, [99]*5), 0).top == got, "the model's own distribution"


def test_a_large_vocabulary_is_not_sorted(monkeypatch):
    x = np.round(np.random.default_rng(0).normal(size=200_000), 2).astype(F)
    sizes, argsort = [], np.argsort
    monkeypatch.setattr(np, 'argsort', lambda a, *k, **kw: (sizes.append(len(a)), argsort(a, *k, **kw))[1])
    got = top_logprobs(x, 20)
    assert [i for i, _ in got] == sorted(range(len(x)), key=lambda i: (-x[i], i))[:20] and max(sizes) < 1000
    s = Sampler(len(x)); s.reset(SamplingParams()); sizes.clear()
    assert s.draw(x, 0).top == () and not sizes


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
    i, lp, _ = s.draw(x, 0)
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
    ('frequency_penalty', [0, -2, 2, .5], [-2.1, 2.1, math.nan, '1', True]),
    ('presence_penalty', [0, -2, 2, .5], [-2.1, 2.1, math.nan, [1]]),
    ('top_logprobs', [0, 20, np.int64(4)], [-1, 21, 1.0, True, '5']),
    ('logit_bias', [{}, {0: 1}, {'0': 1, '17': -100}, {np.int64(3): 100}, dict.fromkeys(range(300), 0)],
        [[], 'a', {-1: 0}, {'01': 1}, {'': 1}, {' 1': 1}, {'1': 1, 1: 1}, {True: 1}, {1.0: 1}, {'\u0661': 1}, {1: 101}, {1: math.nan},
            {1: None}, {1: '1'}, {1: True}, dict.fromkeys(range(301), 0), {'9'*99: 0}]),
    ('stop', ['a', [], ['a', 'b', 'c', 'd'], ('\n',)], ['', [''], list('abcde'), [1], 7, {'a': 1}, ['\ud800']])])
def test_rules(field, good, bad):
    for v in good: assert check_params({field: v}) == []
    for v in bad:
        (e, *_) = check_params({field: v})
        assert (e['field'] == field and e['message'] and e['constraint']
            and ('value' not in e or (isinstance(e['value'], str) and len(e['value']) <= 64 and isinstance(e['value'].encode(), bytes))))
    assert check_params({field: None}) == []


def test_the_dialects_fields():
    "The table of `/execute` is the contract's; what OpenAI's dialect adds is ignored there"
    execute, openai = map(rules_for, ('execute', 'openai'))
    assert list(execute) == ['max_tokens', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'seed', 'stop']
    more = {'frequency_penalty', 'presence_penalty', 'logit_bias', 'top_logprobs'}
    assert openai == RULES | dict(logit_bias=BIAS, stop=STOP) and openai.keys() == execute.keys() | more
    wrong = dict.fromkeys([*more, 'top_k'], 'x')
    assert [e['field'] for e in check_params(wrong, dialect='execute')] == ['top_k']
    assert {e['field'] for e in check_params(wrong, dialect='openai')} == more | {'top_k'}
    for r in openai.values(): assert r.words and r.meaning and 'null' in str(r.schema)


@pytest.mark.parametrize('field', ['frequency_penalty', 'presence_penalty', 'logit_bias', 'top_logprobs'])
def test_the_schema_says_what_is_checked(field):
    "A validator of JSON Schema and ours agree on values that JSON can have, around every limit"
    schema = pytest.importorskip('jsonschema').Draft202012Validator(rules_for('openai')[field].schema)
    keys = ('0', '7', '07', '', 'a', '-1', '1.0', '99999')
    values = [0, 1, -2, 2, 2.1, -2.1, 20, 21, -1, .5, 'x', True, [], *({k: 1} for k in keys), {},
        *({'3': v} for v in (100, -100, 100.1, -101, None, 'x', True, {})),
        {str(i): 0 for i in range(300)}, {str(i): 0 for i in range(301)}]
    for v in values: assert (check_params({field: v}) == []) == schema.is_valid(v), v


def test_ids_of_a_bias():
    assert check_params(dict(logit_bias={99: 1}), n_valid=100) == []
    assert check_params(dict(logit_bias={100: 1}), n_valid=100)[0]['constraint'] == 'ids(0..=99)'
    with pytest.raises(RequestError, match='id of a token'): Sampler(128, 100).reset(SamplingParams(logit_bias={100: 1}))
    given = {'5': 1}
    p = SamplingParams(logit_bias=given); given['6'] = 2
    assert p.logit_bias == {5: 1.0} and hash(p) == hash(SamplingParams()) and p != SamplingParams()


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


@given(st.dictionaries(st.sampled_from([*RULES, 'logit_bias', 'stop', 'model']),
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
