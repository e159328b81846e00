"`orcd.load` and what it returns, as an importing program uses them: real files, the reference engine, no scripts"
import subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import gguf
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
import make_models
from conftest import has_gpu
from fake_engine import FakeEngine, fake_config
import orcd
from orcd.errors import DeviceError, GGUFError, ModelError, OrcdError, RequestError
from orcd.engine.generation import Model, device_number
from orcd.files.hub import find_model
from orcd.text.sampling import Sampler, SamplingParams

DEMO = Path(orcd.__file__).parent / 'demo' / 'haiku-qwen2-q4_k_m.gguf'
CORPUS = ['The rain falls on the quiet roof of night and the river listens.', 'Write a haiku about the moon, forty-two of them.',
    'Zwölf Boxkämpfer 雨 🌧 привет'] * 8
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt "
    "%}<|im_start|>assistant\n{% endif %}")
MARKS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']


def vocabulary():
    "A byte-level BPE vocabulary as qwen2 files have it: (tokens, merges)"
    import json
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.train_from_iterator(CORPUS,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    model = json.loads(t.to_str())['model']
    return sorted(model['vocab'], key=model['vocab'].get), [m if isinstance(m, str) else ' '.join(m) for m in model['merges']]


def write_model(path, monkeypatch, arch='qwen2', marks=MARKS, end='<|im_end|>', template=CHATML, **kw):
    "A random model with that vocabulary; the last 5 ids are padding"
    tokens, merges = vocabulary()
    all_tokens = tokens + marks + [f'[PAD{i}]' for i in range(5)]
    class Writer(gguf.GGUFWriter):
        def add_tokenizer_model(self, _):
            super().add_tokenizer_model('gpt2'); self.add_tokenizer_pre('qwen2')
            self.add_token_list(all_tokens); self.add_token_merges(merges)
            self.add_token_types([1] * len(tokens) + [3] * len(marks) + [5] * 5)
            self.add_eos_token_id(all_tokens.index(end)); self.add_add_bos_token(False); self.add_chat_template(template)
        def add_vocab_size(self, _): pass
    monkeypatch.setattr(make_models.gguf, 'GGUFWriter', Writer)
    return make_models.make_model(path, arch, n_vocab=len(all_tokens), **kw)


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m: return write_model(tmp_path_factory.mktemp('api') / 'small.gguf', m, context_length=96)


@pytest.fixture(scope='module')
def model(path):
    with orcd.load(path, device='reference', progress=False) as m: yield m


def test_what_a_model_has(model):
    assert model.config.arch == 'qwen2' and model.config.n_layer == 2 and model.config.context_length == 96 and model.engine.n_ctx == 96
    assert model.tokenizer.kind == 'gguf-bpe' and model.engine.kind == 'reference' and not model.engine.resident
    assert model.engine.n_valid == model.config.n_vocab - 5
    x = model.logits([1, 2, 3])
    assert x.shape == (3, model.config.n_vocab) and x.dtype == np.float32 and np.isfinite(x).all()
    assert 'qwen2' in repr(model) and 'reference' in repr(model)


def test_same_twice_and_a_b_a(model):
    a = dict(prompt='Write a haiku', max_tokens=24)
    greedy, seeded = dict(a, temperature=0), dict(a, temperature=1.3, top_p=.95, seed=42)
    one = [model.generate(**kw).run() for kw in (greedy, seeded)]
    model.generate('something else entirely', seed=1, repetition_penalty=1.9, max_tokens=30).run()
    half = model.generate('left in the middle', seed=2); next(half); next(half)
    two = [model.generate(**kw).run() for kw in (greedy, seeded)]
    for x, y in zip(one, two): assert x.ids == y.ids and x.text == y.text and x.stop_reason == y.stop_reason and x.tokens_out > 0
    assert one[0].ids != one[1].ids
    assert model.generate(**dict(seeded, seed=43)).run().ids != one[1].ids
    g = model.generate(**dict(seeded, seed=None)).run()
    assert model.generate(**dict(seeded, seed=g.seed)).run().ids == g.ids, 'the seed that was drawn repeats the run'


@pytest.mark.parametrize('kw', [dict(temperature=0), dict(seed=3), dict(temperature=1.7, top_k=20, min_p=.01, seed=4),
    dict(top_p=.8, repetition_penalty=1.8, seed=5), dict(temperature=0, repetition_penalty=1.5),
    dict(seed=6, frequency_penalty=1.5, presence_penalty=.5, logit_bias={300: 3})], ids=str)
def test_against_logits_and_a_loop(model, kw):
    "generate is: logits of everything so far, draw, append"
    prompt = model.tokenizer.encode('The rain falls')
    got = list(model.generate(prompt, max_tokens=12, **kw))
    s, ids = Sampler(model.config.n_vocab, model.tokenizer.n_valid), list(prompt)
    s.reset(SamplingParams(**kw))
    for step, token in enumerate(got):
        i, lp, _ = s.draw(model.logits(ids)[-1], step)
        assert token.id == i and abs(token.logprob - lp) < 1e-3
        ids.append(i)


class Script:
    "A constraint that allows one sequence of tokens, or `also` in place of any of them"
    def __init__(self, ids, also=()): self.ids, self.also, self.at, self.told = list(ids), set(also), 0, []
    @property
    def done(self): return self.at == len(self.ids)
    def mask(self):
        words = np.zeros(64, np.uint32)
        for i in {self.ids[self.at], *self.also}: words[i // 32] |= np.uint32(1 << i % 32)
        return words
    def commit(self, id): self.told.append(id); self.at += 1


def test_a_constraint_decides(model):
    want = model.tokenizer.encode('The rain falls')
    for kw in dict(temperature=0), dict(seed=1, temperature=2., frequency_penalty=2, presence_penalty=2, logit_bias={want[0]: -100}):
        c = Script(want)
        tokens = list(g := model.generate('Write', max_tokens=50, constraint=c, **kw))
        assert g.ids == want == c.told and g.text == 'The rain falls' and g.stop_reason == 'EOS' and len(tokens) == len(want)
    assert model.generate('Write', constraint=Script(want[:0])).run().stop_reason == 'EOS'
    assert model.generate('Write', constraint=Script(want), max_tokens=2).run().stop_reason == 'MAX_TOKENS'
    assert model.generate('Write', constraint=Script(want), max_tokens=len(want)).run().stop_reason == 'EOS', 'complete with the last token'
    eos = min(model.stop_ids)
    g = model.generate('Write', constraint=Script([want[0], eos, want[1]])).run()
    assert g.ids == want[:1] and g.stop_reason == 'EOS'


def test_same_seed_same_text_with_a_constraint(model):
    def text(seed):
        constraint = Script([1]*12, range(300, 400))
        return model.generate('Write', seed=seed, temperature=2., presence_penalty=1, constraint=constraint).run().ids
    assert text(5) == text(5) != text(6) and set(text(5)) <= {1, *range(300, 400)}


def test_a_constraint_that_allows_nothing(model):
    class Nothing(Script):
        def mask(self): return np.zeros(64, np.uint32)
    with pytest.raises(RequestError, match='allows no token'): model.generate('Write', constraint=Nothing([1])).run()
    assert model.generate('Write', max_tokens=3).run().tokens_out == 3
    for bad in 7, 'json', {}:
        with pytest.raises(RequestError, match='a constraint has') as e: model.generate('Write', constraint=bad)
        assert e.value.errors[0]['field'] == 'constraint'


def test_top_logprobs(model):
    prompt = model.tokenizer.encode('The rain falls')
    plain, tokens = [list(model.generate(prompt, max_tokens=6, seed=4, **kw)) for kw in ({}, dict(top_logprobs=5))]
    assert [t.id for t in tokens] == [t.id for t in plain] and all(t.top == [] for t in plain)
    ids = list(prompt)
    for t in tokens:
        x = model.logits(ids)[-1, :model.tokenizer.n_valid].astype('f8'); p = x - np.log(np.exp(x).sum())
        assert [i for i, *_ in t.top] == np.argsort(-p)[:5].tolist()
        assert np.allclose([q for *_, q in t.top], np.sort(p)[::-1][:5], atol=1e-3)
        assert [s for _, s, _ in t.top] == [model.tokenizer.decode([i]) for i, *_ in t.top]
        ids.append(t.id)
    assert all(t.top == [] for t in model.generate(prompt, max_tokens=2, top_logprobs=0))


def test_bias_and_penalties(model):
    prompt = model.tokenizer.encode('The rain falls')
    assert set(model.generate(prompt, max_tokens=4, temperature=0, logit_bias={77: 100}).run().ids) == {77}
    ids = model.generate(prompt, max_tokens=30, temperature=0, frequency_penalty=2, logit_bias=dict.fromkeys(range(50, 60), 100)).run().ids
    assert set(ids) == set(range(50, 60)), 'whatever was said often has to wait'
    with pytest.raises(RequestError) as e: model.generate('x', logit_bias={10**6: 1}, top_logprobs=21, frequency_penalty=3)
    assert [x['field'] for x in e.value.errors] == ['frequency_penalty', 'top_logprobs', 'logit_bias']


def test_text_is_the_decoded_ids(model):
    for seed in range(6):
        g = model.generate('The', max_tokens=40, temperature=2., seed=seed)
        parts = [t.text for t in g]
        assert ''.join(parts) == g.text == model.tokenizer.decode(g.ids)
        for p in parts: p.encode()
        assert max(g.ids) < model.tokenizer.n_valid and not set(g.ids) & set(model.tokenizer.stop_ids)


def test_stop_string_of_the_models_own_text(model):
    free = model.generate('The rain', max_tokens=40, temperature=0).run()
    assert len(free.text) > 6
    for a in range(1, len(free.text) - 3, 5):
        stop = free.text[a:a + 3]
        if '\ufffd' in stop: continue
        g = model.generate('The rain', max_tokens=40, temperature=0, stop=stop).run()
        assert g.stop_reason == 'STOP_SEQUENCE' and g.stop_sequence_matched == stop and g.text == free.text[:free.text.index(stop)]
        assert g.ids == free.ids[:len(g.ids)]


def test_messages(model):
    t, messages = model.tokenizer, [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'hi <|im_end|>'}]
    g = model.generate(messages, max_tokens=3, temperature=0)
    assert g.prompt_ids == t.encode_chat(messages) and g.prompt_ids.count(t.encode('<|im_end|>')[0]) == 2, \
        'a marker in the text of a user is text'
    raw = model.generate('<|im_start|>user\nhi<|im_end|>', max_tokens=1)
    assert raw.prompt_ids[0] == t.encode('<|im_start|>')[0]
    for bad in ([{'role': 'user'}], [{'role': 'user', 'content': object()}], [{'content': 'x'}]):
        with pytest.raises(RequestError) as e: model.generate(bad)
        assert e.value.errors[0]['field'] == 'messages'


def test_channels(tmp_path, monkeypatch):
    "A reply as gpt-oss writes it, through a real tokenizer: the answer is the text, the thinking is kept apart"
    marks = ['<|start|>', '<|channel|>', '<|message|>', '<|end|>', '<|return|>', '<|call|>', '<|startoftext|>', '<|endoftext|>']
    template = ("{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt "
        "%}<|start|>assistant{% endif %}")
    with orcd.GGUF(write_model(tmp_path / 'c.gguf', monkeypatch, marks=marks, end='<|return|>', template=template)) as g:
        t = orcd.Tokenizer.from_gguf(g)
        config = SimpleNamespace(**{**vars(fake_config()), 'n_vocab': t.vocab_size})
        reply = (t.encode('<|channel|>analysis<|message|>A moon, then rain.<|end|><|start|>assistant<|channel|>final<|message|>Rain ')
            + t.encode('雨\n\nmore<|return|>'))
        def run(prompt, **kw): return Model(FakeEngine(reply, config=config), t).generate(prompt, **kw).run()
        out = run([{'role': 'user', 'content': 'hi'}])
        assert ((out.text, out.analysis) == ('Rain 雨\n\nmore', 'A moon, then rain.') and out.tokens_out == len(reply)
            - (out.stop_reason == 'EOS'))
        out = run([{'role': 'user', 'content': 'hi'}], stop=['\n\n', 'moon'])
        assert (out.text, out.analysis, out.stop_sequence_matched) == ('Rain 雨', 'A moon, then rain.', '\n\n'), \
            'what is thought does not stop the answer'
        assert run('hi', max_tokens=8).text == t.decode(reply[:8]) and '<|channel|>' in run('hi', max_tokens=8).text, \
            'a text that is continued stays raw'


def test_context(path):
    with orcd.load(path, device='reference', context_length=16, progress=False) as m:
        g = m.generate([1] * 10, temperature=0).run()
        assert (g.stop_reason, g.tokens_out) == ('CONTEXT_LENGTH', 6) or g.stop_reason == 'EOS'
        assert m.generate([1] * 10, temperature=0, max_tokens=6).run().stop_reason in ('MAX_TOKENS', 'EOS')
        assert m.generate([1] * 16).run().stop_reason == 'CONTEXT_LENGTH'
        with pytest.raises(RequestError, match='17 tokens, the context 16'): m.generate([1] * 17)
    for n in (0, -1, 97, 1.5, True, '9'):
        with pytest.raises(RequestError): orcd.load(path, device='reference', context_length=n, progress=False)


def test_without_vocabulary(tmp_path):
    file = make_models.make_model(tmp_path / 'n.gguf', 'llama')
    with orcd.load(file, device='reference', progress=False) as m:
        assert m.tokenizer is None
        a, b = (m.generate([1, 2, 3], max_tokens=9, seed=1).run() for _ in 'ab')
        assert a.ids == b.ids and len(a.ids) == 9 and a.text == '' and a.stop_reason == 'MAX_TOKENS'
        with pytest.raises(RequestError, match='no vocabulary'): m.generate('text')


@pytest.mark.parametrize('arch', ['qwen2', 'phi3', 'gpt-oss', 'llama', 'qwen3'])
def test_every_family(tmp_path, arch):
    "Longer than any window, and A, B, A"
    file = make_models.make_model(tmp_path / 'm.gguf', arch, head_dim=32)
    with orcd.load(file, device='reference', progress=False) as m:
        prompt = list(range(3, 30))
        a = m.generate(prompt, max_tokens=12, temperature=0).run().ids
        b = m.generate(prompt[::-1], max_tokens=12, seed=9).run().ids
        assert (m.generate(prompt, max_tokens=12, temperature=0).run().ids == a
            and m.generate(prompt[::-1], max_tokens=12, seed=9).run().ids == b)
        assert a[0] == m.logits(prompt)[-1].argmax()


@given(st.text(min_size=1, max_size=30), st.floats(0, 2), st.integers(0, 50), st.floats(0, 1), st.floats(0, 1), st.floats(.01, 2),
    st.integers(0, 2**64 - 1), st.lists(st.text(min_size=1, max_size=3), max_size=4), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_any_valid_request_runs(model, prompt, T, k, p, q, r, seed, stop, n):
    try: prompt.encode(); ''.join(stop).encode()
    except UnicodeEncodeError: return
    if not model.tokenizer.encode(prompt): return
    g = model.generate(prompt[:20], temperature=T, top_k=k, top_p=p, min_p=q, repetition_penalty=r, seed=seed, stop=stop,
        max_tokens=n).run()
    assert (g.stop_reason in ('EOS', 'MAX_TOKENS', 'STOP_SEQUENCE', 'CONTEXT_LENGTH') and g.tokens_out <= n
        and not any(s in g.text for s in stop))
    g.text.encode()


# --- loading ---

def test_progress(path):
    calls = []
    orcd.load(path, device='reference', progress=lambda done, total: calls.append((done, total))).close()
    size = path.stat().st_size
    assert calls[0] == (0, size) and calls[-1] == (size, size)


def test_bar_only_where_somebody_looks(path, capsys):
    orcd.load(path, device='reference').close()
    assert capsys.readouterr() == ('', '')


def test_failures_name_the_cure(path, tmp_path, monkeypatch):
    monkeypatch.setenv('ORCD_CACHE_DIR', str(tmp_path / 'none'))
    def fails(kind, match, *a, **kw):
        with pytest.raises(kind, match=match) as e: orcd.load(*a, progress=False, **dict(dict(device='reference'), **kw))
        assert isinstance(e.value, OrcdError)
    fails(OrcdError, 'missing.gguf', tmp_path / 'missing.gguf')
    fails(ModelError, 'no-such-model', 'no-such-model')
    fails(OrcdError, 'orcd pull qwen2.5-0.5b', 'qwen2.5-0.5b')
    (tmp_path / 'text.gguf').write_text('not a model')
    fails(GGUFError, 'text.gguf', tmp_path / 'text.gguf')
    fails(OrcdError, tmp_path.name, tmp_path)
    for device in ('cpu', 'cuda:', 'cuda:x', 'cuda:-1', 'gpu', '', None, 'cuda:0:1', 'CUDA:0'):
        fails(RequestError, 'reference', path, device=device)
    for kw in (dict(kv_cache_mb=0), dict(chunk_bytes=0), dict(kv_cache_mb=1.5)): fails(RequestError, 'at least 1', path, **kw)
    cut = tmp_path / 'cut.gguf'; cut.write_bytes(path.read_bytes()[:-1000])
    fails(OrcdError, 'cut.gguf', cut)
    with orcd.GGUF(path) as g: cut.write_bytes(path.read_bytes()[:g.data_offset])
    fails(GGUFError, 'cut.gguf.*header without tensor data', cut)
    fails(GGUFError, 'header without tensor data', cut, device='cuda:0')     # before anything is asked of a GPU
    file = make_models.make_model(tmp_path / 'l.gguf', 'llama', leave_out=['blk.1.ffn_up.weight'])
    fails(ModelError, 'blk.1.ffn_up.weight', file)


def test_device_names():
    assert [device_number(d) for d in ('reference', 'cuda', 'cuda:0', 'cuda:12', 0, 3, '3', np.int64(2))] == [None, 0, 0, 12, 0, 3, 3, 2]
    for d in (True, -1, 1.0, None, [0], '-1', '٣', '1.0'):
        with pytest.raises(RequestError, match='neither the number of a GPU'): device_number(d)


@pytest.mark.skipif(has_gpu(), reason='this machine has a GPU')
def test_no_gpu_names_the_opt_in(path):
    with pytest.raises(DeviceError) as e: orcd.load(path, progress=False)
    assert 'device="reference"' in str(e.value) and '--device reference' in str(e.value) and e.value.code == 'CUDA_ERROR'


def test_no_cupy_names_the_opt_in(path):
    code = f"""import sys; sys.modules['cupy'] = None
import orcd
try: orcd.load({str(path)!r}, progress=False)
except orcd.OrcdError as e: print(type(e).__name__, e)"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.startswith('DeviceError') and 'device="reference"' in out


def test_a_failed_load_closes_the_file(path, monkeypatch):
    import orcd.files.gguf, orcd.families.reference
    closed = []
    class Opened(orcd.files.gguf.GGUF):
        def close(self): closed.append(1); super().close()
    monkeypatch.setattr(orcd.files.gguf, 'GGUF', Opened)
    class Broken:
        def __init__(self, *a, **kw): raise MemoryError('no room')
    monkeypatch.setattr(orcd.families.reference, 'ReferenceEngine', Broken)
    with pytest.raises(MemoryError): orcd.load(path, device='reference', progress=False)
    assert closed


class Copying:
    "Stands for an engine that copies weights: a percent a call of `progress`, a moment for each"
    def __init__(self, monkeypatch):
        self.copied = 0
        monkeypatch.setattr('orcd.engine.generation._engine', lambda device: self.make)

    def make(self, g, n_ctx, kv_cache_mb, chunk_bytes, progress):
        progress(0, 10_000)
        for self.copied in range(1, 10_001):
            time.sleep(.001)
            progress(self.copied, 10_000)
        raise AssertionError('everything was copied')


@pytest.mark.parametrize('change, message', [
    ({'tokenizer.ggml.pre': 'klingon'}, "unknown tokenizer.ggml.pre 'klingon'"),
    ({'tokenizer.ggml.model': 'runes'}, "unknown tokenizer.ggml.model 'runes'"),
    ({'tokenizer.ggml.merges': None}, 'no tokenizer.ggml.merges'), ({'tokenizer.ggml.tokens': None}, 'no tokenizer.ggml.tokens'),
    ({'tokenizer.ggml.add_bos_token': 3}, 'add_bos_token is 3'), ({'tokenizer.ggml.model': 'no_vocab'}, 'no vocabulary')], ids=str)
def test_a_bad_tokenizer_is_refused_before_weights_are_copied(path, monkeypatch, change, message):
    import orcd.files.gguf
    class Changed(orcd.files.gguf.GGUF):
        def _parse(self, path):
            super()._parse(path)
            for k, v in change.items():
                self.metadata._values[k], self.metadata._types[k] = v, (None, None, None)
                if v is None: del self.metadata._values[k]
    monkeypatch.setattr(orcd.files.gguf, 'GGUF', Changed)
    engine = Copying(monkeypatch)
    with pytest.raises(OrcdError, match=message) as e: orcd.load(path, progress=False, text=True)
    assert engine.copied == 0 and e.value.code == 'MODEL_LOAD_FAILED'


def test_a_bad_tokenizer_ends_the_copying(path, monkeypatch):
    "What only making it brings to light, here when a tenth is copied"
    import orcd.text.tokenizer
    engine, tenth = Copying(monkeypatch), threading.Event()
    def make(g):
        tenth.wait(60)
        raise orcd.errors.TokenizerError('the merge is wrong')
    monkeypatch.setattr(orcd.text.tokenizer.Tokenizer, 'from_gguf', make)
    told = lambda done, total: tenth.set() if done == 1000 else None
    with pytest.raises(orcd.errors.TokenizerError, match='the merge is wrong'): orcd.load(path, progress=told)
    assert 1000 <= engine.copied < 10_000


def test_loads_without_cupy_and_fastapi(path):
    code = (f'import sys, orcd; m = orcd.load({str(path)!r}, device="reference", progress=False); m.generate("hi", max_tokens=2).run(); '
        f'm.close(); print({{"cupy", "fastapi", "uvicorn", "IPython"}} & set(sys.modules))')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'set()'


def test_memory_comes_back(path):
    import gc, weakref
    m = orcd.load(path, device='reference', progress=False)
    engine = weakref.ref(m.engine); weights = weakref.ref(m.engine.model)
    m.generate('hi', max_tokens=2).run()
    del m; gc.collect()
    assert engine() is None and weights() is None
    m = orcd.load(path, device='reference', progress=False); weights = weakref.ref(m.engine.model)
    m.close(); gc.collect()
    assert weights() is None


# --- the model that ships ---

@pytest.fixture(scope='module')
def demo():
    with orcd.load('demo', device='reference', progress=False) as m: yield m


def test_demo(demo):
    assert find_model('demo') == DEMO and demo.config.arch == 'qwen2' and DEMO.stat().st_size <= 4 << 20
    prompt = [{'role': 'user', 'content': 'Write a haiku about GPU computing'}]
    a, b = (demo.generate(prompt, temperature=.7, seed=42, max_tokens=64).run() for _ in 'ab')
    assert a.ids == b.ids and a.stop_reason == 'EOS' and len(a.text.strip().splitlines()) == 3
    g = demo.generate(prompt, temperature=0, max_tokens=64).run()
    assert g.stop_reason == 'EOS' and len(g.text.strip().splitlines()) == 3
    g = demo.generate(prompt, temperature=0, max_tokens=64, stop='\n').run()
    assert g.stop_reason == 'STOP_SEQUENCE' and '\n' not in g.text


def test_broken_template(tmp_path, monkeypatch):
    "It is said at load and in answer to messages; prompts do not need it"
    file = write_model(tmp_path / 'broken.gguf', monkeypatch, template='{% for m in messages %}', context_length=96)
    with pytest.warns(UserWarning, match='messages will be refused, prompts are not affected: the chat template fails'):
        with orcd.load(file, device='reference', progress=False) as m:
            assert len(list(m.generate('the rain', max_tokens=3))) <= 3
            with pytest.raises(orcd.OrcdError, match='the chat template fails') as e: m.generate([dict(role='user', content='the rain')])
            assert e.value.code == 'INVALID_REQUEST' and e.value.errors[0]['field'] == 'messages'
            for t in threading.enumerate():
                if t.name == 'orcd-template': t.join()


# --- questions

@pytest.fixture(scope='module')
def haiku(demo):
    with orcd.load('demo', device='reference', progress=False) as m: yield m


def test_chat_asks_and_generate_continues(haiku):
    "What the template makes of a question, written out by hand; the same text given to `generate` is another prompt"
    question, how = 'Write a haiku about rain', dict(max_tokens=24, temperature=.7, seed=5)
    a, b = haiku.chat(question, **how), haiku.chat([dict(role='user', content=question)], **how)
    text = haiku.tokenizer.chat([dict(role='user', content=question)])
    assert question in text and text != question
    raw = haiku.generate(text, **how)
    assert a.prompt_ids == b.prompt_ids == raw.prompt_ids == haiku.tokenizer.encode(text) and str(a) == str(b) == str(raw) != ''
    assert haiku.generate(question, **how).prompt_ids == haiku.tokenizer.encode(question)


def test_str_runs_to_the_end(haiku):
    out = haiku.chat('Write a haiku about snow', temperature=0)
    first = next(out)
    assert out.stop_reason is None
    whole = f'{out}'
    assert out.stop_reason == 'EOS' and whole == out.text == str(out) and whole.startswith(first.text) and len(out.ids) > 5


@pytest.mark.parametrize('messages, more, says', [
    (5, {}, 'a question, or a list'), ([1, 2], {}, 'a question, or a list'), ([], {}, 'a question, or a list'),
    ([dict(role='boss', content='x')], {}, "messages.0..role is 'boss', it must be one of system, developer, user, assistant, tool"),
    ('x', dict(response_format={'type': 'xml'}), 'response_format'), ('x', dict(response_format='json'), 'response_format'),
    ('x', dict(top_p=3), 'top_p')])
def test_chat_refuses(haiku, messages, more, says):
    with pytest.raises(RequestError, match=says): haiku.chat(messages, **more)


def test_chat_without_a_template(tmp_path, monkeypatch):
    "A model that has none continues texts, and says so"
    with orcd.load(write_model(tmp_path / 'm.gguf', monkeypatch, template=''), device='reference', progress=False) as m:
        with pytest.raises(RequestError, match='no chat template; generate'): m.chat('hello')
        assert len(m.generate('hello', max_tokens=2).run().ids) <= 2


@pytest.mark.parametrize('prompts', [['a', 'b'], [[1, 2], [3]], [[dict(role='user', content='a')], 'b'], ('a',)])
def test_several_prompts_need_slots(haiku, prompts):
    with pytest.raises(RequestError, match='one after another'): haiku.generate(prompts)


def test_vram_of_the_reference_engine_is_a_plan(path, tmp_path):
    "The figures that `orcd info` prints, and what is planned says so"
    from orcd.engine.cuda_engine import plan
    with orcd.load(path, device='reference', progress=False) as m:
        with pytest.raises(ModelError, match='no kernel for heads of 16'): m.vram        # no GPU would hold it
    fits = make_models.make_model(tmp_path / 'm.gguf', 'qwen2', head_dim=32, context_length=96)
    with orcd.load(fits, device='reference', progress=False, context_length=64) as m, orcd.GGUF(fits) as g:
        p = plan(g, 64)
        assert m.vram.by_kind() == dict(weights=p.weights, kv_cache=p.kv_cache, workspace=p.workspace)
        assert {e.name for e in m.vram.entries} > set(g.tensors)
        assert repr(m.vram).startswith('(planned: ') and 'planned' in m.vram._repr_html_()
    assert m.vram is None
    assert orcd.Ledger().planned == '' and 'planned' not in repr(orcd.Ledger()) + orcd.Ledger()._repr_html_()


@pytest.mark.parametrize('misuse', [
    lambda m: orcd.load(5), lambda m: orcd.load(None), lambda m: orcd.load(b'demo'), lambda m: orcd.load('demo', device=True),
    lambda m: orcd.load('demo', device='reference', progress=3), lambda m: orcd.load('demo', device='reference', text='yes'),
    lambda m: orcd.pull(5), lambda m: orcd.pull(None), lambda m: orcd.pull(['a']), lambda m: orcd.pull('demo'),
    lambda m: orcd.pull('a/b/c.gguf', endpoint=5), lambda m: orcd.pull('a/b/c.gguf', verify='no'),
    lambda m: orcd.GGUF(5), lambda m: orcd.GGUF(None), lambda m: orcd.GGUF(b'demo'), lambda m: orcd.GGUF(''),
    lambda m: orcd.GGUF('nothing'),
    lambda m: m.tokenizer.decode('abc'), lambda m: m.tokenizer.decode(5), lambda m: m.tokenizer.decode([1.5]),
    lambda m: m.tokenizer.decode({1, 2}), lambda m: m.tokenizer.decode(b'ab'),
    lambda m: m.tokenizer.encode(5), lambda m: m.tokenizer.encode(b'abc'), lambda m: m.tokenizer.encode(['a']),
    lambda m: orcd.Tokenizer.from_gguf('demo'), lambda m: orcd.Tokenizer.from_json(5),
    lambda m: orcd.ReferenceEngine('demo'), lambda m: orcd.Model(5)])
def test_misuse_is_an_error_of_ours(haiku, misuse):
    with pytest.raises(OrcdError) as e: misuse(haiku)
    assert str(e.value) and '\n' not in str(e.value)


def test_chat_takes_what_generate_takes():
    from inspect import signature
    from orcd.engine.generation import Asked
    assert set(Asked.__annotations__) == set(signature(Model.generate).parameters) - {'self', 'prompt'}


def test_a_model_in_parts(path, model, tmp_path):
    "Opened by any part it computes what the whole file does, and says so in its fingerprint only if it is the same"
    from gguf_files import split
    from orcd.serve.openai import file_hash
    parts = split(path, tmp_path / 'cut.gguf', 5)
    ids = [5, 9, 77, 3]
    want = model.logits(ids)
    for p in (parts[0], parts[-1]):
        with orcd.load(p, device='reference', progress=False) as m:
            assert len(parts) > 3 and np.array_equal(m.logits(ids), want)
            assert m.generate(ids, max_tokens=8, temperature=0, seed=1).ids == model.generate(ids, max_tokens=8, temperature=0, seed=1).ids
    with orcd.GGUF(parts[0]) as g: before, again = file_hash(g), file_hash(g)
    data = bytearray(parts[-1].read_bytes())
    data[-1] ^= 1
    parts[-1].write_bytes(data)
    with orcd.GGUF(parts[1]) as g: assert file_hash(g) != before == again
