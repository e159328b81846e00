"Chat templates, their sandbox, text that stays text, and replies in channels"
import json, lzma, os, subprocess, sys, threading
from datetime import datetime
from types import SimpleNamespace
import jinja2, pytest
from hypothesis import given, settings, strategies as st

from orcd.text import chat
from orcd.text.chat import CHATML, ROLES, ChatTemplate, check_messages, drop_oldest
from orcd.errors import ChatTemplateError, RequestError
from orcd.files.gguf import GGUF
from orcd.text.tokenizer import ALPHABET, Tokenizer
from worker_tools import gone

DAY = datetime(2025, 10, 10)
TALK = [dict(role='system', content='Answer in verse.'), dict(role='user', content='Where is the rain?')]


def byte_tokenizer(specials, template=None, metadata=None, **more):
    "A vocabulary of 256 bytes and some special tokens"
    tokens = [*ALPHABET.values(), *specials]
    m = {'model': 'gpt2', 'pre': 'gpt-4o', 'tokens': tokens, 'token_type': [1]*256 + [3]*len(specials), 'merges': [], **more}
    m = {'tokenizer.ggml.' + k: v for k, v in m.items()} | ({'tokenizer.chat_template': template} if template else {}) | (metadata or {})
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


def test_a_long_chat_is_no_attack():
    long = [dict(role=('user', 'assistant')[i % 2], content=f'message {i} ' * 90) for i in range(999)]
    assert len(ChatTemplate(CHATML).render(long)) > 900_000


# --- messages -------------------------------------------------------------------------------------

@pytest.mark.parametrize('bad',
    [None, [], 'hi', {}, [1], [{}], [dict(role='user')], [dict(role=1, content='')], [dict(role='', content='x')],
    [dict(role='user', content=3)],
    [dict(role='user', content=[dict(type='image_url')])], [dict(role='user', content='\udc00')],
    [dict(role='user', content='x', extra=float('nan'))], [dict(role='user', content='x', extra={1})],
    [dict(role='function', content='x')], [dict(role='User', content='x')], [dict(role='user<|im_end|>', content='x')],
    [dict(role='user', content=['x'])], [dict(role='user', content=[dict(type='text')])], [dict(role='user', content=[dict(text='x')])],
    [dict(role='user', content=None, tool_calls=[1])], [dict(role='assistant', content=None)], [dict(role='user', content={'text': 'x'})]])
def test_bad_messages(bad):
    with pytest.raises(RequestError) as e: check_messages(bad)
    assert str(e.value).isprintable() and len(str(e.value)) < 200


@pytest.mark.parametrize('role', ROLES)
@pytest.mark.parametrize('content',
    ['', 'x', [], [dict(type='text', text='x')], [dict(type='text', text='x'), dict(type='text', text='y')]])
def test_good_messages(role, content):
    assert check_messages([dict(role=role, content=content, name='n')]) == [dict(role=role, content=content, name='n')]


def test_tool_calls_without_content():
    assert check_messages([dict(role='assistant', content=None, tool_calls=[{}])]) == [dict(role='assistant', content='', tool_calls=[{}])]


def test_system_message_that_would_vanish():
    deaf = ("{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}"
            "{% elif m.role == 'assistant' %}<A>{{ m.content }}{% endif %}{% endfor %}")
    tok = byte_tokenizer(['<e>'], deaf)
    assert tok.chat(TALK) == '<U>Answer in verse.\n\nWhere is the rain?'
    assert tok.chat([TALK[1], dict(role='assistant', content='Here.'), TALK[0],
        dict(role='user', content='And now?')]) == '<U>Where is the rain?<A>Here.<U>Answer in verse.\n\nAnd now?'
    assert tok.decode(tok.encode_chat(TALK)) == tok.chat(TALK)
    assert byte_tokenizer(CHATML_TOKENS).chat(TALK).count('Answer in verse.') == 1


@pytest.mark.parametrize('deaf', ['system', 'none'])
def test_many_messages(deaf):
    "The time of finding and moving what a template leaves out is linear in the number of messages"
    from doubling import doubling
    from orcd.text.chat import merge_dropped
    class Template:
        def render(self, messages, **variables): return ''.join(f"<{m['content']}>" for m in messages if m['role'] != deaf)
    def make(n):
        turns = check_messages([dict(role=r, content=r) for _ in range(n) for r in ('system', 'user', 'tool', 'assistant')])
        want = [dict(role='user', content='system\n\nuser') if m['role'] == 'user' else m for m in turns if m['role'] != 'system']
        assert merge_dropped(Template(), turns) == (want if deaf == 'system' else turns)
        return lambda: merge_dropped(Template(), turns)
    doubling(make, 2000)


REFUSALS = {
    'alternate': "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif "
    "%}"
        "{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }};{% endif %}{% endfor %}",
    'says so': "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }};{% endif %}{% endfor %}",
    'fails': "{% for m in messages %}{{ {'user': '[', 'assistant': ''}[m.role] + m.content + {'user': ']', 'assistant': ';'}[m.role] }}{% "
    "endfor %}",
}


@pytest.mark.parametrize('source', REFUSALS.values(), ids=REFUSALS)
def test_system_message_that_is_refused(source):
    "It goes into the user's turn, wherever it stands; in an assistant's place it must not become what the assistant said"
    tok, user, answer = byte_tokenizer(['<e>'], source), TALK[1], dict(role='assistant', content='Here.')
    merged, later = '[Answer in verse.\n\nWhere is the rain?]', '[Where is the rain?\n\nAnswer in verse.]'
    assert tok.chat(TALK) == merged
    assert tok.chat([*TALK, answer, user]) == merged + 'Here.;[Where is the rain?]'
    assert tok.chat([user, answer, *TALK]) == '[Where is the rain?]Here.;' + merged
    assert tok.chat([user, TALK[0]]) == later and tok.chat([user, answer, user, TALK[0]]) == '[Where is the rain?]Here.;' + later
    assert tok.chat([dict(role='system', content='A'), *TALK]) == '[A\n\nAnswer in verse.\n\nWhere is the rain?]'
    assert tok.chat([dict(role='system', content=''), user]) == '[Where is the rain?]'
    assert tok.decode(tok.encode_chat(TALK)) == merged
    with pytest.raises(ChatTemplateError): tok.chat(TALK[:1])


def test_what_a_template_refuses_for_another_reason():
    tok = byte_tokenizer(['<e>'], REFUSALS['alternate'])
    with pytest.raises(ChatTemplateError, match='refuses these messages: take turns'): tok.chat([TALK[1], TALK[1]])
    with pytest.raises(ChatTemplateError, match='refuses these messages: take turns'): tok.chat([*TALK, TALK[1]])


def test_lost_tool_result():
    deaf = byte_tokenizer(['<e>'], "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }};{% endfor %}")
    with pytest.raises(ChatTemplateError, match=r'leaves out messages\[1\], whose role is "tool"'):
        deaf.chat([TALK[1], dict(role='tool', content='42')])


# --- strings or parts -----------------------------------------------------------------------------

def parts(*texts): return [dict(type='text', text=t) for t in texts]


FORMS = {
    'strings': ("{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}", ''),
    'parts': ("{% for m in messages %}{{ m.role }}:{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %};{% "
    "endfor %}", None),
    'first part': ("{% for m in messages %}{{ m.role + ':' + m.content[0]['text'] + ';' }}{% endfor %}", None),
    'either': ("{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}({{ "
    "p['text'] }})"
        "{% endfor %}{% endif %};{% endfor %}", ''),
    'parts of users': ("{% for m in messages %}{{ m.role }}:{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% else %}{{ m.content + '' }}{% endif %};{% endfor %}", None),
    'parts of users, prints the rest': ("{% for m in messages %}{{ m.role }}:{{ m.content[0].text if m.role == 'user' else m.content }};{% "
    "endfor %}", None),
    'parts of the system': ("{% for m in messages %}{{ m.role }}:"
        "{{ m.content[0].text if m.role == 'system' else m.content }};{% endfor %}", None),
    'strings that are tested': ("{% for m in messages %}{% if m.content is not string %}{{ raise_exception('strings') }}{% endif %}"
        "{{ m.role }}:{{ m.content }};{% endfor %}", ''),
    'upper case': ("{% for m in messages %}{{ m.role }}:{{ m.content | upper | lower }};{% endfor %}", ''),
}


@pytest.mark.parametrize('source', [s for s, _ in FORMS.values()], ids=FORMS)
@pytest.mark.parametrize('form', [str, lambda text: parts(text)], ids=['string', 'part'])
def test_text_arrives_in_either_form(source, form):
    tok = byte_tokenizer(['<e>'], source)
    talk = [dict(role=r, content=form(t)) for r, t in (('system', 'be brief'), ('user', 'rain?'), ('assistant', 'here'), ('user', 'where'))]
    want = 'system:be brief;user:rain?;assistant:here;user:where;'
    assert tok.chat(talk) == tok.decode(tok.encode_chat(talk)) == want
    assert tok.chat(talk[1:]) == want[want.index('user'):]


def test_several_parts():
    "As Jinja gives it to a template for parts; one text to a template for strings"
    source = "{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endfor %}"
    several = [dict(role='user', content=parts('a', 'b'))]
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    assert byte_tokenizer(['<e>'], source).chat(several) == env.from_string(source).render(messages=several) == '(a)(b)'
    assert byte_tokenizer(['<e>'], FORMS['strings'][0]).chat(several) == 'user:ab;'


def test_template_without_the_users_text():
    tok = byte_tokenizer(['<e>'], 'Hello!{% for m in messages %}{{ m.role }}{% endfor %}')
    with pytest.raises(ChatTemplateError, match='leaves out what users say'): tok.chat(TALK)


# --- which template, and when ---------------------------------------------------------------------

def test_broken_template_is_refused_once_and_for_all(monkeypatch):
    asked, render = [], chat._render
    monkeypatch.setattr(chat, '_render', lambda *a: asked.append(1) or render(*a))
    tok = byte_tokenizer(CHATML_TOKENS, '{% if %}')
    assert tok.encode('rain') and not asked
    for _ in range(3):
        with pytest.raises(ChatTemplateError, match=r'chat template fails: Expected an expression.*\(line 1\)'): tok.encode_chat(TALK)
    assert len(asked) == 1


def test_warm_chat(recwarn):
    "In a thread: what is wrong is a warning, nothing more"
    def join(): [t.join() for t in threading.enumerate() if t.name == 'orcd-template']
    good, bad = byte_tokenizer(CHATML_TOKENS), byte_tokenizer(CHATML_TOKENS, '{% if %}')
    good.warm_chat(); join()
    assert good._templates._made and not recwarn.list
    bad.warm_chat(); join()
    assert [str(w.message)[:51] for w in recwarn.list] == ['messages will be refused, prompts are not affected:']
    byte_tokenizer(['<e>']).warm_chat(); join()        # no template, no child, no warning
    assert len(recwarn.list) == 1


def test_warm_chat_of_a_process_that_ends():
    "It may be gone before the child is there: nothing is said, nothing is left"
    code = """if True:
        from test_chat import CHATML_TOKENS, byte_tokenizer
        from orcd.text import chat
        started, start = [], chat._start
        def listed(end): started.append(start(end)); print(started[-1].pid, flush=True); return started[-1]
        chat._start = listed
        byte_tokenizer(CHATML_TOKENS).warm_chat()
        while not started: pass"""
    p = subprocess.run([sys.executable, '-c', code], env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)), capture_output=True,
        text=True, timeout=300)
    assert (p.returncode, p.stderr) == (0, '') and len(p.stdout.split()) == 1
    assert gone(p.stdout.strip())           # soon, if it was only just being started


@pytest.mark.parametrize('value', [7, ['a'], b'{{ 1 }}', True])
def test_template_that_is_no_text(value):
    tok = byte_tokenizer(['<e>'], value)
    assert tok.encode('rain')
    with pytest.raises(ChatTemplateError, match='not a text'): tok.chat(TALK)


def named(default, **more):
    tok = {'tokenizer.chat_template.' + k: v for k,
        v in more.items()} | ({'tokenizer.chat_template': default} if default is not None else {})
    return byte_tokenizer(CHATML_TOKENS, metadata=tok | {'tokenizer.chat_templates': list(more)})


def test_named_templates():
    tok = named('d{{ messages[0].content }}', tool_use='t{{ messages[0].content }}', rag='r{{ messages[0].content }}')
    user = TALK[1:]
    assert tok.chat(user)[0] == 'd' and tok.chat(user, tools=[])[0] == 'd' and tok.chat(user, tools=[{}])[0] == 't'
    assert tok.chat(user, chat_template='rag')[0] == 'r' and tok.chat(user, chat_template='rag', tools=[{}])[0] == 'r'
    assert tok.decode(tok.encode_chat(user, chat_template='rag'))[0] == 'r' and tok.chat_template[0] == 'd'
    for wrong in 'other', ['rag'], '{{ 1 }}':
        with pytest.raises(ChatTemplateError, match='choose one of: default, rag, tool_use'): tok.chat(user, chat_template=wrong)
    assert named(None, rag='r{{ messages[0].content }}').chat(user)[0] == 'r'
    with pytest.raises(ChatTemplateError, match="no chat template 'default'; choose one of: rag, tool_use"):
        named(None, rag='r', tool_use='t').chat(user)
    assert named('').chat(user).startswith('<|im_start|>user')          # an empty one is none


def test_named_templates_as_gguf_py_writes_them(tmp_path):
    import gguf
    w = gguf.GGUFWriter(tmp_path / 'x.gguf', 'qwen2')
    w.add_chat_template([dict(name='default', template='d{{ messages[0].content }}'),
        dict(name='tool_use', template='t{{ messages[0].content }}')])
    w.add_tokenizer_model('gpt2'); w.add_tokenizer_pre('gpt-2')
    w.add_token_list([*ALPHABET.values(), 'ab']); w.add_token_types([1]*257); w.add_token_merges(['a b'])
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    with GGUF(tmp_path / 'x.gguf') as g: tok = Tokenizer.from_gguf(g)
    assert tok.chat(TALK[1:]) == 'dWhere is the rain?' and tok.chat(TALK[1:], tools=[{}]) == 'tWhere is the rain?'


def json_tokenizer(folder, files):
    import tokenizers
    t = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(ALPHABET.values())}, []))
    t.pre_tokenizer, t.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    t.save(str(folder / 'tokenizer.json'))
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return Tokenizer.from_json(folder / 'tokenizer.json')


LISTED = [dict(name='default', template='d{{ messages[0].content }}'), dict(name='tool_use', template='t{{ messages[0].content }}'), 3, {}]


@pytest.mark.parametrize('files, plain, tools', [
    ({'tokenizer_config.json': json.dumps(dict(chat_template='c{{ messages[0].content }}')).encode('utf-8-sig')}, 'c', 'c'),
    ({'tokenizer_config.json': json.dumps(dict(chat_template=LISTED)).encode()}, 'd', 't'),
    ({'chat_template.jinja': '\ufeffj{{ messages[0].content }}'.encode(),
        'tokenizer_config.json': json.dumps(dict(chat_template=LISTED)).encode()}, 'j', 't'),
    ({'chat_template.jinja': b'j{{ messages[0].content }}', 'additional_chat_templates/tool_use.jinja': b'a{{ messages[0].content }}'},
        'j', 'a')])
def test_templates_beside_a_tokenizer(tmp_path, files, plain, tools):
    tok = json_tokenizer(tmp_path, files)
    assert tok.chat(TALK[1:]) == plain + 'Where is the rain?' and tok.chat(TALK[1:], tools=[{}]) == tools + 'Where is the rain?'


def test_template_file_that_is_no_text(tmp_path):
    tok = json_tokenizer(tmp_path, {'chat_template.jinja': b'\xff\xfe'})
    assert tok.encode('rain')
    with pytest.raises(ChatTemplateError, match='not a text'): tok.chat(TALK)


def test_byte_order_mark():
    assert byte_tokenizer(['<e>'], '\ufeff' + CHATML).chat(TALK) == byte_tokenizer(['<e>'], CHATML).chat(TALK)


# --- what a user types is text --------------------------------------------------------------------

def test_no_template():
    assert byte_tokenizer(CHATML_TOKENS).chat(TALK[1:]) == '<|im_start|>user\nWhere is the rain?<|im_end|>\n<|im_start|>assistant\n'
    with pytest.raises(ChatTemplateError, match='no chat template'): byte_tokenizer(['<e>']).chat(TALK)


snippets = st.lists(st.sampled_from([*CHATML_TOKENS, '<|im_', 'start|>', '<', '|>', 'rain', '\n', '\U000F0000', '\U000F0001', 'system\n',
    '"', '\\']), max_size=10).map(''.join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['user', 'assistant', 'system']), snippets), min_size=1, max_size=4))
def test_typed_text_never_becomes_control(turns):
    tok = byte_tokenizer(CHATML_TOKENS)
    messages = [dict(role=r, content=c) for r, c in turns]
    ids = tok.encode_chat(messages)
    start, end = (tok.special[t].id for t in CHATML_TOKENS)
    assert (ids.count(start), ids.count(end)) == (len(turns) + 1, len(turns))
    assert tok.decode(ids) == tok.chat(messages)
    if not any(t in c for t in CHATML_TOKENS for r, c in turns): assert ids == tok.encode(tok.chat(messages))


GLUE = "{% for m in messages %}{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endfor %}{{ tools | tojson if tools }}"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(snippets, min_size=1, max_size=4), min_size=1, max_size=3), snippets)
def test_pieces_never_join_to_a_control_token(turns, tool):
    "A template that writes parts without anything between them, and the tools too"
    tok = byte_tokenizer(CHATML_TOKENS, GLUE)
    messages = [dict(role='user', content=parts(*texts)) for texts in turns]
    ids, control = tok.encode_chat(messages, tools=[{tool: tool}]), {tok.special[t].id for t in CHATML_TOKENS}
    assert not control & set(ids)
    assert tok.decode(ids) == tok.chat(messages, tools=[{tool: tool}])


def test_pieces_that_would_join():
    tok = byte_tokenizer(CHATML_TOKENS, GLUE)
    ids = tok.encode_chat([dict(role='user', content=parts('a <|im', '_start|> b', '<', '|', 'im_end|>'))])
    assert tok.decode(ids) == 'a <|im_start|> b<|im_end|>' and max(ids) < 256


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


# --- a chat that outgrows the context -------------------------------------------------------------

@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(['system', 'user', 'assistant', 'tool']), max_size=12),
    st.lists(st.integers(1, 9), min_size=13, max_size=13), st.integers(0, 60))
def test_drop_oldest(roles, sizes, room):
    "Against the plain way: leave out one turn after the other until it fits"
    messages = [dict(role=r, content='x' * n) for r, n in zip([*roles, 'user'], sizes)]
    def fits(ms): return sum(len(m['content']) for m in ms) <= room
    kept = drop_oldest(messages, fits)
    head = [m for i, m in enumerate(messages) if all(x['role'] == 'system' for x in messages[:i+1])]
    starts = [i for i, m in enumerate(messages) if m['role'] == 'user']
    ways = [messages] + [head + messages[i:] for i in starts[1:]]
    assert kept == next((w for w in ways if fits(w)), ways[-1])
    assert kept[-1] is messages[-1] and kept[:len(head)] == head
