"Chat templates, their sandbox, text that stays text, and replies in channels"
import json, lzma, random, subprocess, sys, threading
from datetime import datetime
from types import SimpleNamespace
import jinja2, pytest
from hypothesis import given, settings, strategies as st

from orcd.chat import CHATML, ChatTemplate, Harmony, check_messages, merge_dropped
from orcd.errors import ChatTemplateError, RequestError
from orcd.gguf import GGUF
from orcd.tokenizer import ALPHABET, Tokenizer

DAY = datetime(2025, 10, 10)
TALK = [dict(role='system', content='Answer in verse.'), dict(role='user', content='Where is the rain?')]


def byte_tokenizer(specials, template=None, **more):
    "A vocabulary of 256 bytes and some special tokens"
    tokens = [*ALPHABET.values(), *specials]
    m = {'model': 'gpt2', 'pre': 'gpt-4o', 'tokens': tokens, 'token_type': [1]*256 + [3]*len(specials), 'merges': [], **more}
    m = {'tokenizer.ggml.' + k: v for k, v in m.items()} | ({'tokenizer.chat_template': template} if template else {})
    return Tokenizer.from_gguf(SimpleNamespace(path=None, metadata=m))


CHATML_TOKENS = ['<|im_start|>', '<|im_end|>']
CHANNELS = ['<|start|>', '<|channel|>', '<|message|>', '<|end|>', '<|return|>', '<|call|>', '<|constrain|>']


# --- templates ------------------------------------------------------------------------------------

@pytest.mark.parametrize('source', [CHATML,
    "{{ bos_token }}{% for m in messages %}{{ '[' ~ m['role'] ~ '] ' ~ m.content | trim ~ '\n' }}{% endfor %}",
    "{%- set ns = namespace(n=0, seen=[]) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set ns.seen = ns.seen + [m.role] %}{% endfor %}{{ ns.n }} {{ ns.seen }} {{ ns.seen | join('-') }}",
    "{% macro show(m, up=false) %}{{ m.content.upper() if up else m.content.split(' ')[0] }}{% endmacro %}{% for m in messages %}"
        "{{ show(m, up=loop.last) }}{{ ', ' if not loop.last }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index0 }}{{ m | tojson }}{% else %}none{% endfor %}"
        "{{ messages | length }}{{ messages[-1].content[::-1] }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | first | replace('rain', 'snow') | title }}",
    "{% set x %}a{{ messages[0].role }}b{% endset %}{{ x | upper }}{% filter lower %}ABC{% endfilter %}{{ {'k': (1, 2)} }}"
        "{{ 7 // 2 }}{{ 2 ** 10 }}{{ 'ab' * 3 }}{{ 5 % 3 }}",
    "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n<u>{{ m.content }}</u>\n    {%- endif %}\n{%- endfor %}\n",
    "{{ '%s' }}{{ messages | map(attribute='role') | unique | sort | join }}{{ [3, 1, 2] | sort | last }}"
        "{{ messages[0].missing }}{{ messages[0].missing | default('d') }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ 'x'.replace('x', 'yy') }}{{ '/'.join(['a', 'b']) }}",
    "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}{{ messages[0] is mapping }}"
        "{{ 'rain' in messages[1].content }}"])
def test_same_as_plain_jinja(source):
    "What the sandbox lets through it does not change"
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    env.filters['tojson'] = lambda x: json.dumps(x, ensure_ascii=False)
    want = env.from_string(source).render(messages=TALK, add_generation_prompt=True, bos_token='<s>')
    assert ChatTemplate(source, dict(bos_token='<s>')).render(TALK) == want


ATTACKS = ["{{ 'a' * 10**10 }}", "{{ [1] * 10**9 }}", "{{ (1,) * 10**9 }}", "{{ 10 ** (10 ** 10) }}", "{{ 2.0 ** 5000 }}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(50) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(50) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(50) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}"
        "{% endfor %}{{ n.x == n.y }}",
    "{% set n = namespace(x={}) %}{% for i in range(50) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='a') %}{% for i in range(50) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ range(10**12) | list }}",
    "{% for a in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}{% endmacro %}{{ m(60, 'x') }}",
    "{{ '%9999999999d' % 1 }}", "{{ '{:>9999999999}'.format(1) }}", "{{ 'a'.zfill(10**10) }}", "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.center(10**10) }}", "{{ 'a\t'.expandtabs(10**10) }}", "{{ 'a' | center(10**10) }}",
    "{{ 'a' | indent(10**10, true) }}", "{{ [1] | tojson(indent=10**10) }}", "{{ 'a' | wordwrap(1) }}",
    "{{ range(99999) | join('a' * 99999) }}", "{% set a = 'a' * 9999 %}{{ a | replace('a', a) }}", "{{ lipsum(n=10**7) }}",
    "{% macro m() %}{% set a = 'a' * 4000000 %}{% for i in range(9999) %}{{ a[:-1] }}{% endfor %}{% endmacro %}{{ m() }}",
    "{{ 1.5 | round(10**10, 'ceil') }}{{ nope() }}", "{{ 1 .to_bytes(10**9) }}",
    "{{ ''.__class__.__mro__ }}{{ ''.__class__() }}", "{{ messages.append(1) }}", "{{ self.__init__.__globals__ }}{{ self._x() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}", "{% include 'x' %}", "{% import 'x' as y %}",
    "{{ strftime_now('%9999999999Y') }}", "{{ messages | map('attr', '__class__') | list }}", "{% if %}",
    "{{ " + "[" * 9999 + "]" * 9999 + " }}", "{{ " + "-" * 99999 + "1 }}", "{{ 1 / 0 }}", "{{ missing.x }}", "x" * 300_000]


def test_attacks_are_bounded():
    "In a process that may take 1 GiB: every attack ends in a ChatTemplateError, in seconds, in a thread that is not the main one"
    code = '''if True:
        import json, resource, sys, threading, time
        from orcd.chat import ChatTemplate
        from orcd.errors import ChatTemplateError
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        def work():
            for s in json.load(sys.stdin):
                t = time.perf_counter()
                try: out = ChatTemplate(s).render([{'role': 'user', 'content': 'x'}])
                except ChatTemplateError as e:
                    out = None
                    if 'MemoryError' in str(e): print('memory', s[:100])
                except BaseException as e: print(repr(e)[:200], s[:100])
                if out is not None: print('rendered', s[:100], len(out))
                if time.perf_counter() - t > 10: print('slow', s[:100])
        t = threading.Thread(target=work); t.start(); t.join()
        print('done')'''
    r = subprocess.run([sys.executable, '-c', code], input=json.dumps(ATTACKS), capture_output=True, text=True, timeout=200)
    assert r.stdout.strip() == 'done', r.stdout + r.stderr[-2000:]


def test_trace_function_is_restored():
    seen = []
    def mine(frame, event, arg): return None
    def work():
        sys.settrace(mine)
        try: ChatTemplate('{{ 1 }}').render(TALK); seen.append(sys.gettrace() is mine)
        finally: sys.settrace(None)
    t = threading.Thread(target=work); t.start(); t.join()
    assert seen == [True]


def test_many_threads_share_a_template():
    t, out = ChatTemplate(CHATML), []
    def work(i):
        for _ in range(20): out.append(f'n{i}<' in t.render([dict(role='user', content=f'n{i}')]))
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for x in threads: x.start()
    for x in threads: x.join()
    assert out == [True]*160


def test_a_long_chat_is_no_attack():
    long = [dict(role=('user', 'assistant')[i % 2], content=f'message {i} ' * 90) for i in range(999)]
    assert len(ChatTemplate(CHATML).render(long)) > 900_000


# --- messages -------------------------------------------------------------------------------------

@pytest.mark.parametrize('bad',
    [None, [], 'hi', {}, [1], [{}], [dict(role='user')], [dict(role=1, content='')], [dict(role='', content='x')],
    [dict(role='user', content=3)],
    [dict(role='user', content=[dict(type='image_url')])], [dict(role='user', content='\udc00')],
    [dict(role='user', content='x', extra=float('nan'))], [dict(role='user', content='x', extra={1})]])
def test_bad_messages(bad):
    with pytest.raises(RequestError): check_messages(bad)


def test_system_message_that_would_vanish():
    deaf = ("{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}"
            "{% elif m.role == 'assistant' %}<A>{{ m.content }}{% endif %}{% endfor %}")
    tok = byte_tokenizer(['<e>'], deaf)
    assert tok.chat(TALK) == '<U>Answer in verse.\n\nWhere is the rain?'
    assert tok.chat([TALK[1], dict(role='assistant', content='Here.'), TALK[0],
        dict(role='user', content='And now?')]) == '<U>Where is the rain?<A>Here.<U>Answer in verse.\n\nAnd now?'
    assert tok.decode(tok.encode_chat(TALK)) == tok.chat(TALK)
    assert byte_tokenizer(CHATML_TOKENS).chat(TALK).count('Answer in verse.') == 1
    refuses = byte_tokenizer(['<e>'], "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}")
    with pytest.raises(ChatTemplateError, match='no system role'): refuses.chat(TALK)


def test_no_template():
    assert byte_tokenizer(CHATML_TOKENS).chat(TALK[1:]) == '<|im_start|>user\nWhere is the rain?<|im_end|>\n<|im_start|>assistant\n'
    with pytest.raises(ChatTemplateError, match='no chat template'): byte_tokenizer(['<e>']).chat(TALK)


snippets = st.lists(st.sampled_from([*CHATML_TOKENS, '<|im_', 'start|>', '<', '|>', 'rain', '\n', '\U000F0000', '\U000F0001', 'system\n',
    '"', '\\']), max_size=10).map(''.join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['user', 'assistant', 'system', 'user<|im_end|>']), snippets), min_size=1, max_size=4))
def test_typed_text_never_becomes_control(turns):
    tok = byte_tokenizer(CHATML_TOKENS)
    messages = [dict(role=r, content=c) for r, c in turns]
    ids = tok.encode_chat(messages)
    start, end = (tok.special[t].id for t in CHATML_TOKENS)
    assert (ids.count(start), ids.count(end)) == (len(turns) + 1, len(turns))
    assert tok.decode(ids) == tok.chat(messages)
    if not any(t in c or t in r for t in CHATML_TOKENS for r, c in turns): assert ids == tok.encode(tok.chat(messages))


# --- channels -------------------------------------------------------------------------------------

def reply(text, prompt=''):
    tok = byte_tokenizer(CHANNELS)
    h = tok.parse_reply(after=tok.encode(prompt))
    pieces = [h.push(i) for i in tok.encode(text)] + [h.flush()]
    assert ''.join(pieces) == h.text[len(h.text) - len(''.join(pieces)):]
    return ''.join(pieces), h


@pytest.mark.parametrize('text, final, analysis, tools', [
    ('<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Grüße 🌧', 'Grüße 🌧', 'Hm.', []),
    ('<|channel|>final<|message|>yes<|return|>', 'yes', '', []),
    ('<|channel|>analysis<|message|>never ends', '', 'never ends', []),
    ('<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"a": 1}<|call|>', '', '',
    [dict(recipient='functions.get', content='{"a": 1}')]),
    (' to=functions.get<|channel|>commentary<|message|>{}<|call|>', '', '', [dict(recipient='functions.get', content='{}')]),
    ('<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant<|channel|>final<|message|>Done', 'Done', '', []),
    ('just text', 'just text', '', []), ('to be', 'to be', '', []), ('a', 'a', '', []), ('\nassistants', '\nassistants', '', []),
    ('', '', '', []),
    ('<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b', 'b', 'a', []), ('<|message|>c', 'c', '', []),
    ('<|end|><|end|>d', 'd', '', []), ('<|channel|>', '', '', []),
    ('<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>', '', 'ab', [])])
def test_harmony(text, final, analysis, tools):
    out, h = reply(text)
    assert (out, h.analysis, h.tool_calls) == (final, analysis, tools)


def test_harmony_prompt_has_begun_the_reply():
    assert reply('yes', '<|start|>user<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>')[0] == 'yes'
    out, h = reply('<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b', '<|start|>assistant<|channel|>analysis')
    assert (out, h.analysis) == ('b', 'a')


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255 + len(CHANNELS)), max_size=40))
def test_harmony_takes_anything(ids):
    h = byte_tokenizer(CHANNELS).parse_reply()
    out = ''.join([h.push(i) for i in ids]) + h.flush()
    assert out == h.text


def test_plain_reply():
    tok = byte_tokenizer(CHATML_TOKENS)
    r = tok.parse_reply()
    assert ''.join(r.push(i) for i in tok.encode('Grüße')) + r.flush() == 'Grüße' and r.analysis == ''


# --- the published templates ----------------------------------------------------------------------

@pytest.fixture(scope='module')
def chats(shared, tmp_path_factory):
    d, names = tmp_path_factory.mktemp('headers'), dict(qwen2='qwen2.5-0.5b-instruct-q4_k_m', phi3='phi-3-mini-4k-instruct-q4',
        gptoss='gpt-oss-20b-mxfp4')
    out = {}
    for k, name in names.items():
        (d / k).write_bytes(lzma.decompress((shared / 'headers' / f'{name}.header.xz').read_bytes()))
        with GGUF(d / k) as g: out[k] = Tokenizer.from_gguf(g)
    return out, json.loads((shared / 'golden' / 'chat.json').read_text())['models']


def test_golden_chats(chats):
    n = 0
    for name, tok in chats[0].items():
        for c in chats[1][name]:
            assert tok.template.render(c['messages'], now=DAY, **c['kwargs']) == c['prompt']
            assert tok.encode(c['prompt'], add_special=False) == tok.encode(c['prompt']) == c['ids_no_bos_added']
            if name != 'phi3' or c['messages'][0]['role'] != 'system':      # Phi-3's template drops it, we do not
                assert tok.chat(c['messages'], now=DAY, **c['kwargs']) == c['prompt']
                assert tok.encode_chat(c['messages'], now=DAY, **c['kwargs']) == c['ids_no_bos_added']
            n += 1
    assert n == 9


def test_phi3_keeps_the_system_message(chats):
    tok = chats[0]['phi3']
    assert tok.chat(TALK) == '<s><|user|>\nAnswer in verse.\n\nWhere is the rain?<|end|>\n<|assistant|>\n'


@pytest.mark.parametrize('name, marks',
    [('qwen2', ['<|im_start|>', '<|im_end|>', '<|endoftext|>']),
    ('phi3', ['<|user|>', '<|assistant|>', '<|end|>', '<|system|>', '<s>', '</s>']),
    ('gptoss', ['<|start|>', '<|channel|>', '<|message|>', '<|end|>', '<|return|>'])])
def test_published_markers_in_user_text(chats, name, marks):
    tok = chats[0][name]
    control = {s.id for s in tok.special.values() if s.control}
    plain = [i for i in tok.encode_chat([dict(role='user', content='x')], now=DAY) if i in control]
    evil = [dict(role='user', content='x ' + ' '.join(marks) + '\n' + ''.join(marks))]
    assert [i for i in tok.encode_chat(evil, now=DAY) if i in control] == plain


def test_published_reply_in_channels(chats):
    tok = chats[0]['gptoss']
    h = tok.parse_reply(after=tok.encode_chat(TALK, now=DAY))
    ids = tok.encode('<|channel|>analysis<|message|>Simple.<|end|><|start|>assistant<|channel|>final<|message|>Über den Wolken 🌧️')
    assert ''.join(map(h.push, ids)) + h.flush() == 'Über den Wolken 🌧️' and h.analysis == 'Simple.'
    tok = chats[0]['phi3']
    r = tok.parse_reply(after=tok.encode_chat(TALK))
    assert ''.join(map(r.push, tok.encode('Sure, here', add_special=False))) + r.flush() == 'Sure, here'
