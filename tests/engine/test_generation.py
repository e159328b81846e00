"Generation on a scripted engine: what is shown, where it stops, and what is left after something went wrong"
import contextlib, functools, gc, math, re, threading, time, weakref
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from orcd.text.chat import text_of
from orcd.errors import CUDAError, OrcdError, OutOfVRAM, RequestError
from orcd.engine.generation import Model, StopMatcher, Token, prefix_table
from doubling import doubling
from speed import cost
from fake_engine import EOS, IM_END, N_VALID, N_VOCAB, FakeEngine, FakeStream, FakeTokenizer, fake_model, piece, say


# --- stop strings ---

def oracle(text, stops):
    "(what may be shown, stop string): cut where the text first ends with a stop string, of several the longest"
    for i in range(len(text) + 1):
        for s in sorted(stops, key=len, reverse=True):
            if text[:i].endswith(s): return text[:i - len(s)], s
    return text, None


def cut(text, at):
    at = sorted({min(a, len(text)) for a in at} | {0, len(text)})
    return [text[a:b] for a, b in zip(at, at[1:])] or ['']


few = st.text('ab雨', max_size=14)
stop_lists = st.lists(st.text('ab雨', min_size=1, max_size=5), min_size=1, max_size=4)


@given(few, stop_lists, st.lists(st.integers(0, 14), max_size=6))
@settings(max_examples=800, deadline=None)
@example('ababc', ['ababc', 'bc'], [1, 2, 3])
@example('aab', ['ab', 'aab'], [1])
@example('abab', ['abac', 'b'], [])
def test_stop_matcher(text, stops, at):
    m, shown, fed = StopMatcher(stops), '', ''
    for part in cut(text, at):
        shown += m.push(part); fed += part
        if m.matched: break
        need = max(k for s in stops for k in range(len(s)) if fed.endswith(s[:k]))
        assert shown + m.held == fed and len(m.held) == need, 'exactly what may become a stop string is held back'
    want, stop = oracle(text, stops)
    if m.matched: assert (shown, m.matched) == (want, stop) and m.flush() == ''
    else: assert stop is None and shown + m.flush() == text


@given(st.text('ab', min_size=1, max_size=12))
def test_prefix_table(s):
    assert prefix_table(s) == [max([k for k in range(i + 1) if s[:i + 1].endswith(s[:k])]) for i in range(len(s))]


def test_long_stop_is_fast():
    def run(n):
        m = StopMatcher(['a' * n + 'b'] * 4)
        out = ''.join(m.push('a' * 50) for _ in range(400))
        assert len(out) == 20_000 - n and m.flush() == 'a' * n
    doubling(lambda n: functools.partial(run, n), 2000, limit=1.6)      # a letter costs what it costs, however long the strings are


# --- whole runs ---

tokens = st.lists(st.integers(0, N_VALID - 1).filter(lambda i: i not in (EOS, IM_END)), max_size=20)


@given(tokens, st.sampled_from([EOS, None]),
    st.lists(st.sampled_from(['\n\n', 'END', 'a', 'Haik', '雨', '🌧', '\ufffd', 'stop', ' the']), max_size=4), st.integers(1, 25))
@settings(max_examples=500, deadline=None)
@example([*say('雨')[:2]], EOS, ['\ufffd'], 9)
@example(say('\n'), EOS, ['\n\n'], 9)
def test_text_is_whole_and_complete(script, end, stops, n):
    "Against decoding everything at once and cutting it"
    m = fake_model(script + ([end] if end else []), then=ord('z'))
    g = m.generate('?', max_tokens=n, stop=stops)
    got = list(g)
    # the oracle: the ids up to the end, decoded at once, cut at the first stop string; the stop string ends the run at the token that
    # completes it
    drawn = [*script, *([] if end else [ord('z')] * n)][:n]
    full = m.tokenizer.decode(drawn)
    text, stop = oracle(full, stops)
    assert g.text == ''.join(t.text for t in got) == text and g.stop_sequence_matched == stop
    for t in got: t.text.encode()                                  # no halves
    assert '\ufffd' not in ''.join(t.text for t in got[:-1]) or '\ufffd' in full
    assert g.stop_reason == ('STOP_SEQUENCE' if stop else 'EOS' if end and len(script) < n else 'MAX_TOKENS')
    assert g.ids == drawn[:len(g.ids)] and g.tokens_out == len(g.ids) <= n
    if not stop: assert g.ids == drawn
    own = [t for t in got if t.id not in m.stop_ids]
    assert [t.id for t in own] == g.ids and len(got) - len(own) <= 1
    assert m.engine.finished == len(m.engine.params) == 1, "the engine's iterator was closed"


def test_incremental():
    m = fake_model([piece('雨'.encode()[:2]), piece('雨'.encode()[2:]), *say(' x'), EOS])
    got = list(m.generate('?'))
    assert [t.text for t in got] == ['', '雨', ' ', 'x'] and got[1] == Token(piece('雨'.encode()[2:]), '雨', -.5)
    got = list(fake_model([*say('ok'), 0xE9]).generate('?', max_tokens=3))
    assert [t.text for t in got] == ['o', 'k', '\ufffd'], 'the end comes inside a character'
    got = list(fake_model([*say('ok'), 0xE9, EOS]).generate('?'))
    assert [t.text for t in got] == ['o', 'k', '', '\ufffd'] and got[-1].id == EOS


def test_stop_across_tokens():
    m = fake_model([*say('a'), piece(b'EN'), ord('D'), *say('zzz')])
    g = m.generate('?', stop=['END']).run()
    assert (g.text, g.stop_reason, g.stop_sequence_matched, g.tokens_out) == ('a', 'STOP_SEQUENCE', 'END', 3)
    assert len(m.engine.drawn) == 3, 'nothing is drawn after the match'
    g = fake_model([*say('a'), piece(b'EN'), *say('ERGY'), EOS]).generate('?', stop='END').run()
    assert (g.text, g.stop_reason, g.stop_sequence_matched) == ('aENERGY', 'EOS', None)
    g = fake_model(say('Uptheend.')).generate('?', stop=['theend', 'then', 'hee']).run()
    assert (g.text, g.stop_sequence_matched) == ('Upt', 'hee'), 'complete first wins'


def test_limits():
    assert fake_model(n_ctx=10).generate('1234', max_tokens=6).run().stop_reason == 'MAX_TOKENS'
    for n in (7, 2048):
        g = fake_model(n_ctx=10).generate('1234', max_tokens=n).run(); assert (g.tokens_out, g.stop_reason) == (6, 'CONTEXT_LENGTH')
    g = fake_model(n_ctx=4).generate('1234').run(); assert (g.tokens_out, g.text, g.stop_reason) == (0, '', 'CONTEXT_LENGTH')
    with pytest.raises(RequestError, match='5 tokens, the context 4'): fake_model(n_ctx=4).generate('12345')
    g = fake_model(say('no\n')).generate('?', max_tokens=3, stop='\n\n').run(); assert (g.text, g.stop_reason) == ('no\n', 'MAX_TOKENS')
    g = fake_model([EOS]).generate('?'); assert list(g) == [] and (g.text, g.stop_reason, g.tokens_out) == ('', 'EOS', 0)
    g = fake_model([IM_END]).generate('?').run(); assert g.stop_reason == 'EOS'
    m = fake_model(n_ctx=5000)
    assert m.generate('?', max_tokens=3000).run().tokens_out == 3000  # a notebook may ask for more than the worker's 2048


def test_prompts():
    m = fake_model([EOS])
    m.generate('hé').run()
    m.generate([{'role': 'user', 'content': 'hi'}]).run()
    m.generate([1, np.int64(2)]).run()
    m.generate(np.array([3, 4])).run()
    m.generate((5,)).run()
    assert (m.engine.prompts[0] == list('hé'.encode())
        and m.engine.prompts[1] == m.tokenizer.encode_chat([{'role': 'user', 'content': 'hi'}]))
    assert m.engine.prompts[2:] == [[1, 2], [3, 4], [5]] and all(type(i) is int for i in m.engine.prompts[2])
    # tokenised before, as by a server that counts the tokens first
    for prompt in 'hé', [{'role': 'user', 'content': 'hi'}], [1, 2]:
        encoded = m.encode(prompt); m.generate(encoded).run()
        assert (m.engine.prompts.pop() == encoded.ids and len(encoded.ids) == m.count(prompt)
            and encoded.reply == (prompt[0] == {'role': 'user', 'content': 'hi'}))
    assert m.count('hé') == 3 and m.count([1, 2]) == 2 and m.count_stop('ab') == 2
    for bad in ('', [], [N_VOCAB], [-1], ['a'], [1.5], [True], None, 7, b'hi', {}, [{'role': 'user'}], [{'content': 'x'}],
            [{'role': 'user', 'content': 3}], [1, {}], '\ud800', np.zeros((2, 2), int), [[1]]):
        with pytest.raises(RequestError) as e: m.generate(bad)
        assert [x['field'] for x in e.value.errors] in (['prompt'], ['messages']), bad
    assert len(m.engine.prompts) == 5, 'nothing reached the engine'


def test_every_broken_rule_at_once():
    m = fake_model()
    with pytest.raises(RequestError) as e:
        m.generate('', max_tokens=0, temperature=math.nan, top_k=-1, top_p=2, min_p='x', repetition_penalty=0, seed=2**64, stop=[''],
            cancelled=7)
    assert [x['field'] for x in e.value.errors] == ['max_tokens', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'seed',
        'stop', 'cancelled', 'prompt']
    assert all(x['message'] in str(e.value) for x in e.value.errors) and e.value.code == 'INVALID_REQUEST'
    with pytest.raises(RequestError, match='32 tokens'): m.generate('?', stop=['x' * 33])
    assert m.engine.prompts == []


def test_params_reach_the_engine():
    m = fake_model([EOS])
    g = m.generate('?', temperature=.5, top_k=3, top_p=.9, min_p=.1, repetition_penalty=1.5, seed=2**64 - 1).run()
    p = m.engine.params[0]
    assert (p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty, p.seed) == (.5, 3, .9, .1, 1.5, 2**64 - 1) and g.seed == p.seed
    seeds = {m.generate('?', seed=None).seed for _ in range(5)}; assert len(seeds) == 5 and all(0 <= s < 2**64 for s in seeds)
    assert m.generate('?', temperature=None, stop=None, max_tokens=None).params.temperature == 1.0


def test_no_vocabulary():
    m = fake_model([1, 2, 3], tokenizer=None)
    g = m.generate([5], max_tokens=3); got = list(g)
    assert [t.id for t in got] == [1, 2, 3] and g.text == '' and g.stop_reason == 'MAX_TOKENS' and m.tokenizer is None
    for bad in ('text', [{'role': 'user', 'content': 'x'}]):
        with pytest.raises(RequestError, match='no vocabulary'): m.generate(bad)
    with pytest.raises(RequestError, match='without vocabulary'): m.generate([1], stop='x')
    assert m.engine.n_valid == N_VOCAB and fake_model().engine.n_valid == N_VALID


class Channels(FakeTokenizer):
    "What stands before `|` is thought, what comes after is the answer"
    def parse_reply(self, after=()):
        class Reply(FakeStream):
            analysis, final = '', False
            def push(self, i):
                if i == ord('|'): self.final = True; return ''
                text = super().push(i)
                if self.final: return text
                self.analysis += text; return ''
        return Reply()


def test_channels():
    script = say('I think END|Hi END') + [EOS]
    g = fake_model(script, tokenizer=Channels()).generate([{'role': 'user', 'content': 'x'}], stop='END').run()
    assert (g.text, g.analysis, g.stop_reason) == ('Hi ', 'I think END', 'STOP_SEQUENCE'), 'stop strings look at the answer alone'
    g = fake_model(script, tokenizer=Channels()).generate('raw').run()
    assert (g.text, g.analysis) == ('I think END|Hi END', '')


# --- when something goes wrong ---

def test_cancelled():
    m = fake_model(then=ord('a'))
    g = m.generate('?', cancelled=lambda: g.tokens_out >= 3)
    assert g.run().text == 'aaa' and g.stop_reason == 'CANCELLED' and list(g) == []
    g = m.generate('?', cancelled=lambda: True).run(); assert (g.stop_reason, g.tokens_out) == ('CANCELLED', 0)
    calls = []
    fake_model([EOS], chunk=1).generate('12345678', cancelled=lambda: calls.append(1)).run()
    assert len(calls) == 8 + 1, 'before every chunk and every token'
    g = m.generate('?'); next(g); g.close(); g.close()
    assert g.stop_reason == 'CANCELLED' and list(g) == []
    g = m.generate('?'); g.close(); assert g.stop_reason == 'CANCELLED' and list(g) == []
    assert m.generate('?', max_tokens=2).run().text == 'aa'


@pytest.mark.parametrize('error', [OutOfVRAM('full'), CUDAError('lost', sticky=True), ZeroDivisionError('bug'), RuntimeError])
@pytest.mark.parametrize('where', ['prefill', 'decode'])
def test_errors_pass_through(error, where):
    m = fake_model([*say('ab'), error], **(dict(prefill=[error]) if where == 'prefill' else {}))
    g = m.generate('?')
    with pytest.raises(error if isinstance(error, type) else type(error)): g.run()
    assert g.stop_reason == 'ERROR' and g.text == ('ab' if where == 'decode' else '') and list(g) == []
    m.engine.script, m.engine.prefill_script = [*say('fine'), EOS], []
    assert m.generate('?').run().text == 'fine', 'the model can be used again'


def test_keyboard_interrupt():
    m = fake_model([*say('ab'), KeyboardInterrupt])
    g = m.generate('?')
    with pytest.raises(KeyboardInterrupt): g.run()
    assert (g.text, g.stop_reason) == ('ab', 'CANCELLED') and m.engine.finished == 1
    m.engine.script = [*say('fine'), EOS]
    assert m.generate('?').run().text == 'fine'


def test_exception_of_the_caller():
    m = fake_model(then=ord('a'))
    def cell():
        for t in m.generate('?'): raise ValueError('in the notebook')
    with pytest.raises(ValueError): cell()
    gc.collect()
    assert m.generate('?', max_tokens=3).run().text == 'aaa'


@contextlib.contextmanager
def at_work(m, call):
    "Another thread runs `call` and is inside of the engine, whose script waits for a gate; yields (gate, what it raised or returned)"
    gate, out = threading.Event(), []
    m.engine.script = m.engine.prefill_script = [gate]
    def run():
        try: out.append(call())
        except BaseException as e: out.append(e)
    t = threading.Thread(target=run, daemon=True); t.start()
    while not m.engine.busy.locked(): time.sleep(.001)
    try: yield gate, out
    finally: gate.set(); t.join(60)
    assert not t.is_alive()


def test_one_at_a_time():
    m = fake_model(then=ord('a'))
    old, new = m.generate('?', max_tokens=3), m.generate('?', max_tokens=3)
    next(old); next(new)
    with pytest.raises(RequestError, match='taken over'): next(old)
    assert new.run().text == 'aaa' and old.stop_reason == 'ERROR'
    g = m.generate('?', max_tokens=3); next(g); m.logits([1, 2])
    with pytest.raises(RequestError, match='taken over'): next(g)
    first, other = m.generate('?'), m.generate('?')
    with at_work(m, lambda: next(first)):
        for call in (lambda: next(other), lambda: next(first), lambda: m.logits([1])):
            with pytest.raises(RequestError, match='at work in another call'): call()
        assert 'context 4096' in repr(m) and m.vram is None and m.count('ab') == 2, 'what needs no engine is answered'
    assert first.tokens_out == 1 and other.stop_reason is None and other.run().stop_reason


def test_logits_keeps_generate_out():
    m = fake_model(then=ord('a'))
    with at_work(m, lambda: m.logits([1, 2])) as (gate, out):
        with pytest.raises(RequestError, match='at work in another call'): next(m.generate('?'))
        with pytest.raises(RequestError, match='at work in another call'): m.logits([3])
    assert out[0].shape == (2, N_VOCAB)


@pytest.mark.parametrize('call', ['generate', 'logits'])
@pytest.mark.parametrize('way', ['close', 'exit'])
def test_closing_beside_a_call(call, way):
    "A text ends before its next token, a call of logits at its end; the engine is closed after both, and never beside them"
    m = fake_model(then=ord('a')); engine, g = m.engine, m.generate('?')
    with at_work(m, g.run if call == 'generate' else lambda: m.logits([1, 2])) as (gate, out):
        closer = threading.Thread(target=m.close if way == 'close' else lambda: m.__exit__(None, None, None)); closer.start()
        while not m.closing: time.sleep(.001)
        if call == 'logits':
            assert engine.closed == 0 and closer.is_alive()
            gate.set()
        closer.join(60)
        assert engine.closed == 1 and m.engine is None
    if call == 'generate':
        assert isinstance(out[0], RequestError) and 'closed' in str(out[0]) and g.stop_reason == 'ERROR' and engine.finished <= 1
    else: assert out[0].shape == (2, N_VOCAB)
    with pytest.raises(RequestError, match='closed'): m.logits([1])


def test_closing_from_within():
    "`cancelled`, or the handler of a signal, may close the model whose text is being made"
    m = fake_model(then=ord('a')); engine = m.engine
    g = m.generate('?', cancelled=lambda: g.tokens_out == 2 and m.close())
    with pytest.raises(RequestError, match='closed'): g.run()
    assert (g.text, g.stop_reason, engine.closed, m.engine) == ('aa', 'ERROR', 1, None)
    m = fake_model(then=ord('a'))
    g = m.generate('?', cancelled=lambda: g.tokens_out == 2 and g.close())
    assert (g.run().text, g.stop_reason) == ('aa', 'CANCELLED') and m.logits([1]).shape == (1, N_VOCAB)
    inner = []
    def meddle():
        try: m.logits([1])
        except RequestError as e: inner.append(str(e))
    assert m.generate('?', max_tokens=2, cancelled=meddle).run().text == 'aa' and all('at work' in e for e in inner) and inner


def test_closing_a_text_from_another_thread():
    m = fake_model(then=ord('a')); g = m.generate('?')
    with at_work(m, g.run) as (gate, out): g.close()
    assert g.stop_reason == 'CANCELLED' and out == [g] and m.generate('?', max_tokens=2).run().tokens_out == 2


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(['generate', 'logits', 'close text', 'close']), min_size=2, max_size=4))
def test_threads_at_random(deeds):
    """Whatever several threads do to one model: the right text or one of two sentences; the engine refuses two threads and use after its
    end by an AssertionError"""
    m, seen = fake_model(say('Rain'), then=ord('.'), pace=.0002), []
    engine = m.engine
    def run(deed):
        try:
            for _ in range(8):
                if deed == 'logits': seen.append(m.logits([5, 6]).argmax(1).tolist() == [5, 6])
                elif deed == 'close': m.close()
                else:
                    g = m.generate('?', max_tokens=6)
                    if deed == 'close text': threading.Timer(.0005, g.close).start()
                    seen.append('Rain..'.startswith(g.run().text))
        except RequestError as e: seen.append(bool(re.search('at work|taken over|closed', str(e))))
        except BaseException as e: seen.append(e)
    threads = [threading.Thread(target=run, args=(d,)) for d in deeds]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert all(x is True for x in seen), seen
    m.close()
    assert engine.closed == 1


def test_closing():
    m = fake_model([EOS]); engine = m.engine
    with m: pass
    m.close()
    assert engine.closed == 1 and m.engine is None and m.vram is None and 'closed' in repr(m)
    for f in (lambda: m.generate('?'), lambda: m.logits([1]), lambda: m.count('x')):
        with pytest.raises(RequestError, match='closed'): f()
    m = fake_model(); g = m.generate('?'); next(g); m.close()
    with pytest.raises(RequestError, match='closed'): g.run()
    assert g.stop_reason == 'ERROR' and list(g) == []
    m = fake_model(); g = m.generate('?'); m.close()
    with pytest.raises(RequestError, match='closed'): next(g)
    with pytest.raises(ValueError), fake_model() as m: engine = m.engine; raise ValueError
    assert engine.closed == 1


class Counting(FakeTokenizer):
    "Says what it was asked to tokenise; its longest token has 3 bytes"
    def __init__(self): self.seen = []
    def encode(self, text, **kw): self.seen.append(len(text)); return [1] * (len(text) // 3)
    def encode_chat(self, messages, **kw): return self.encode(''.join(text_of(m['content']) for m in messages))
    def token_bytes(self, i): return b'abc' if i == 7 else b'a'


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: [dict(role='user', content=s)],
    lambda s: [dict(role='user', content=[dict(type='text', text=s)])] * 2], ids=['text', 'messages', 'parts'])
def test_huge_prompts_are_refused_by_their_length(wrap):
    "Three bytes a token and a context of 100: more than 900 characters cannot fit, and are not tokenised (below 4,800 that is not asked)"
    m = fake_model(tokenizer=Counting(), n_ctx=100)
    with pytest.raises(RequestError, match='characters are more than a context of 100 tokens') as e: m.generate(wrap('x' * 5000))
    assert m.tokenizer.seen == [] and e.value.errors[0]['field'] in ('prompt', 'messages')
    with pytest.raises(RequestError, match='characters'): m.count(wrap('x' * 10**7))
    with pytest.raises(RequestError, match='tokens, the context 100'): m.generate(wrap('x' * 2000))
    assert len(m.tokenizer.seen) == 1 and m.generate('x' * 300).prompt_ids == [1] * 100


def test_huge_lists_are_refused_by_their_length():
    m = fake_model(n_ctx=100)
    for call in m.generate, m.logits, m.count:
        for bad in range(10**15), [1] * 101, np.ones(10**6, np.int64):
            with pytest.raises(RequestError, match='tokens, the context 100'): call(bad)
    with pytest.raises(RequestError, match='101 messages'): m.generate([dict(role='user', content='')] * 101)


def test_del_is_enough():
    gc.disable()
    try:
        m = fake_model([*say('abc')]); engine, alive = m.engine, weakref.ref(m)
        g = m.generate('?'); next(g)
        list(m.generate('?', max_tokens=2, cancelled=lambda: False)); del g
        h = m.generate('?', stop=['x', 'y']); next(h)
        del m, h
        assert alive() is None and engine.closed == 1
    finally: gc.enable()


def test_an_engine_holds_one_model():
    e = FakeEngine()
    m = Model(e, FakeTokenizer())
    with pytest.raises(OrcdError, match='already'): Model(e, FakeTokenizer())
    assert e.closed == 0
    m.close()


def test_logits():
    m = fake_model()
    x = m.logits([5, 6, 7]); assert x.shape == (3, N_VOCAB) and x.argmax(1).tolist() == [5, 6, 7] and x.dtype == np.float32
    for bad in ('text', [], [N_VOCAB], [1.5]):
        with pytest.raises(RequestError): m.logits(bad)


def test_shows_text(capsys, monkeypatch):
    g = fake_model([*say('Rain <b>'), EOS]).generate('?')
    g._ipython_display_()
    assert capsys.readouterr().out == 'Rain <b>\n' and 'Rain <b>' in repr(g)
    g._ipython_display_(); assert capsys.readouterr().out == 'Rain <b>\n', 'again: the text, not a second run'
    # in Jupyter: one display that is updated, with the text escaped
    import IPython, IPython.display
    class ZMQInteractiveShell: pass
    shown = []
    class Handle:
        def update(self, x): shown.append(x.data)
    monkeypatch.setattr(IPython, 'get_ipython', ZMQInteractiveShell)
    monkeypatch.setattr(IPython.display, 'display', lambda x, display_id: (shown.append(x.data), Handle())[1])
    fake_model([*say('Rain <b>'), EOS]).generate('?')._ipython_display_()
    assert 'Rain &lt;b&gt;' in shown[-1] and len(shown) >= 2


def test_timing_and_cost():
    began = time.perf_counter()
    g = fake_model(pace=.01, prefill=[.05]).generate('?', max_tokens=5).run()
    took = (time.perf_counter() - began) * 1e3
    assert g.prefill_time_ms > 45 and g.decode_time_ms > 45 and g.prefill_time_ms + g.decode_time_ms < took    # no time counts twice
    text = 'The rain falls on the quiet roof of night and the river listens. ' * 32
    class Fast(FakeEngine):
        def decode(self, params, n, cancelled=None):
            for i in text.encode()[:n]: yield i, -1.
    def run(stop): assert Model(Fast(), FakeTokenizer()).generate('?', max_tokens=2000, stop=stop).run().tokens_out == 2000
    # 2000 tokens, a few microseconds each
    for stop in (), ('\n\n',), ('night!', 'the end', 'on the river', '\n\n'): assert cost(lambda: run(stop)) < 15
