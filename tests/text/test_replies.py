"Replies taken apart: nothing is lost, whatever the pieces, and what is no call stays text"
import json, re
from itertools import groupby
import pytest
from hypothesis import given, settings, strategies as st
from doubling import doubling
from test_chat import CHANNELS, byte_tokenizer

from orcd.text.replies import FORMATS, ReplyFormat, ReplyParser, reply_parser

TOOLS = [dict(type='function', function=dict(name=n)) for n in ('weather', 'rain.fall-2')]
TEXTS = [f for f in FORMATS if f != 'harmony']


def deltas(parser, pieces):
    return [d for p in pieces for d in parser.push(p)] + parser.flush()


def parts(found):
    "(kind, text) without neighbours of a kind; a call is (name, arguments)"
    out = []
    for kind, group in groupby(found, lambda d: d.id or d.kind):
        group = list(group)
        out.append((group[0].name or kind, ''.join(d.text for d in group)))
    return out


def parse(form, text, tools=TOOLS): return parts(deltas(reply_parser(form, tools), [text]))


words = st.lists(st.sampled_from(['<think>', '</think>', '<tool_call>', '</tool_call>', '<|tool_call|>', '<|/tool_call|>', '<|python_tag|>',
    'functools[', 'functools', ';', '\n', ' ', '\n\n', '{', '}', '[', ']', '"', '\\', ',', ':', 'Grüße', '<', '|', 'tool', 'call', '>', '/',
    '{"name": "weather", "arguments": {"city": "Bern"}}', '{"name": "rain.fall-2", "parameters": {"a": [1, {"b": "}"}]}}',
    '{"name": "snow", "arguments": {}}', '{"name": "weather", "arguments": "{}"}', '[{"name": "weather", "arguments": {}}]',
    '{"arguments": {"x": "</tool_call>"}, "name": "weather"}', '{"name": "weather"', ', "arguments": {}}', '\x00', '\u2028']), max_size=14)
texts = words.map(''.join)


@st.composite
def cut(draw, source=texts):
    "A text and its pieces"
    text = draw(source)
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


@pytest.mark.parametrize('form', TEXTS)
@settings(max_examples=400, deadline=None)
@given(cut(), st.booleans())
def test_every_character_for_every_split(form, given_, offered):
    text, pieces = given_
    tools = TOOLS if offered else None
    whole, pieced = (deltas(reply_parser(form, tools, markup=True), p) for p in ([text], pieces))
    assert ''.join(d.text for d in whole) == ''.join(d.text for d in pieced) == text
    def calls(found): return [(d.index, d.name, d.text) for d in found if d.kind == 'tool_call']
    assert calls(whole) == calls(pieced) and [i for i, _, _ in calls(whole)] == list(range(len(calls(whole))))
    for kind in ('content', 'reasoning'):
        assert ''.join(d.text for d in whole if d.kind == kind) == ''.join(d.text for d in pieced if d.kind == kind)
    assert {d.kind for d in deltas(reply_parser(form, tools), pieces)} <= {'content', 'reasoning', 'tool_call'}
    for d in whole:
        if d.kind == 'tool_call': assert isinstance(json.loads(d.text), dict) and d.name in ('weather', 'rain.fall-2')
    if not offered: assert not calls(whole)


BERN = '{"city": "Bern", "n": 1.50, "s": "</tool_call> }"}'


@pytest.mark.parametrize('form, text, want', [
    ('hermes', 'Hello', [('content', 'Hello')]),
    ('hermes', f'<tool_call>\n{{"name": "weather", "arguments": {BERN}}}\n</tool_call>', [('weather', BERN)]),
    ('hermes', 'I look.\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "rain.fall-2", "arguments": {"a": 1}}\n</tool_call>\n',
        [('content', 'I look.'), ('weather', '{}'), ('rain.fall-2', '{"a": 1}')]),
    ('hermes', '<tool_call>{"arguments": {}, "name": "weather"}', [('weather', '{}')]),          # it ended before the mark
    ('hermes', '<tool_call>{"name": "weather", "arguments": {}}</tool', [('weather', '{}')]),
    ('hermes', '<tool_call>{"name": "weather", "arguments": {"a": 1', [('content', '<tool_call>{"name": "weather", "arguments": {"a": 1')]),
    ('hermes', '<tool_call>{"name": "weather", "arguments": {}}}</tool_call>', None),
    ('hermes', '<tool_call>{"name": "snow", "arguments": {}}</tool_call>', None),
    ('hermes', '<tool_call>{"name": "weather", "arguments": []}</tool_call>', None),
    ('hermes', '<tool_call>{"name": "weather", "arguments": {"a": Infinity}}</tool_call>', None),
    ('hermes', '<tool_call>\n<function=weather>\n</function>\n</tool_call>', None),
    ('hermes', '<tool_call>{"name": "weather", "arguments": {"a": "b\n"}}</tool_call> x', None),
    ('hermes', '<tool_call>{"a</tool_call>\n<tool_call>{"name": "weather", "arguments": {}}</tool_call>',
        [('content', '<tool_call>{"a</tool_call>'), ('weather', '{}')]),
    ('hermes', '<think>\nHm.\n</think>\n\nYes.', [('reasoning', 'Hm.'), ('content', 'Yes.')]),
    ('hermes', '\n<think>never ends', [('reasoning', 'never ends')]),
    ('hermes', '<think></think>Yes.', [('content', 'Yes.')]),
    ('hermes', 'Yes. <think>no</think>', None),
    ('hermes', '<think>a <tool_call>{"name": "weather", "arguments": {}}</tool_call></think>b',
        [('reasoning', 'a <tool_call>{"name": "weather", "arguments": {}}</tool_call>'), ('content', 'b')]),
    ('llama', '{"name": "weather", "parameters": {"a": {"b": [1, 2]}}}', [('weather', '{"a": {"b": [1, 2]}}')]),
    ('llama', '<|python_tag|>{"type": "function", "name": "weather", "parameters": {}}', [('weather', '{}')]),
    ('llama', ' {"name": "weather", "parameters": {}}; {"name": "rain.fall-2", "parameters": {}}',
        [('weather', '{}'), ('rain.fall-2', '{}')]),
    ('llama', '{"name": "weather", "parameters": {}} is how I would call it', None),
    ('llama', '{"name": "Ada", "parameters": {}}', None), ('llama', '{"name": "weather"}', None),
    ('llama', '<|python_tag|>weather.call(city="Bern")', None), ('llama', 'So: {"name": "weather", "parameters": {}}', None),
    ('phi4', '<|tool_call|>[{"name": "weather", "arguments": {}}, {"name": "weather", "arguments": {"a": 1}}]<|/tool_call|>',
        [('weather', '{}'), ('weather', '{"a": 1}')]),
    ('phi4', 'functools[{"name": "weather", "arguments": {}}]', [('weather', '{}')]),
    ('phi4', 'functools are [1]', None), ('phi4', '<|tool_call|>[]<|/tool_call|>', None),
    ('phi4', '<|tool_call|>[{"name": "weather", "arguments": {}}, {"name": "snow", "arguments": {}}]<|/tool_call|>', None),
    ('plain', '<tool_call>{"name": "weather", "arguments": {}}</tool_call>', None)])
def test_formats(form, text, want):
    "None: all of it is content"
    assert parse(form, text) == (want or [('content', text)])


@pytest.mark.parametrize('form', TEXTS)
def test_no_tools_no_calls(form):
    text = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    assert parse(form, text, None) == [('content', text)]


def test_content_does_not_wait():
    "Only what could begin a mark is held back"
    p = reply_parser('hermes', TOOLS)
    assert [d.text for t in ('Hel', 'lo <', 'b> ', '<tool', '_x') for d in p.push(t)] == ['Hel', 'lo', ' <b>', ' <tool_x']


CHANNEL_WORDS = [*CHANNELS, 'analysis', 'final', 'commentary', ' to=functions.weather', ' to=functions.snow', 'json', '{"a": 1}', '{',
    'x', ' ', 'ü', 'to', 'assistant']


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(CHANNEL_WORDS), st.binary(min_size=1, max_size=2)), max_size=25))
def test_every_character_in_channels(pieces):
    tok = byte_tokenizer(CHANNELS)
    ids = [i for p in pieces for i in (tok.encode(p) if isinstance(p, str) else p)]
    found = deltas(ReplyParser(ReplyFormat('harmony'), TOOLS, tokenizer=tok, markup=True), ids)
    assert ''.join(d.text for d in found) == tok.decode(ids)
    answer = tok.parse_reply()
    said = ''.join([answer.push(i) for i in ids]) + answer.flush()
    without = deltas(ReplyParser(ReplyFormat('harmony'), tokenizer=tok), ids)     # without tools a call's body is content as well
    bodies = [c['content'] for c in answer.tool_calls]
    assert sorted(''.join(d.text for d in without if d.kind == 'content')) == sorted(said + ''.join(bodies))
    assert sorted(''.join(d.text for d in without if d.kind == 'reasoning')) == sorted(answer.analysis + answer.commentary)


@pytest.mark.parametrize('text, want', [
    ('<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes',
        [('reasoning', 'Hm.'), ('content', 'Yes')]),
    ('<|channel|>commentary to=functions.weather <|constrain|>json<|message|>' + BERN + '<|call|>', [('weather', BERN)]),
    (' to=functions.weather<|channel|>commentary json<|message|>' + BERN, [('weather', BERN)]),          # <|call|> ends the reply
    ('<|channel|>commentary<|message|>I look.<|end|>'
        '<|start|>assistant<|channel|>commentary to=functions.weather<|message|>{}<|call|>',
        [('reasoning', 'I look.'), ('weather', '{}')]),
    ('<|channel|>commentary to=functions.weather<|message|>{}<|call|>'
        '<|start|>assistant to=functions.rain.fall-2<|channel|>commentary<|message|>{"a":1}',
        [('weather', '{}'), ('rain.fall-2', '{"a":1}')]),
    ('<|channel|>commentary to=functions.weather<|message|>{"a": <|call|>', [('content', '{"a": ')]),
    ('<|channel|>commentary to=functions.snow<|message|>{}<|call|>', [('content', '{}')]),
    ('<|channel|>commentary to=python<|message|>1 + 1<|call|>', [('content', '1 + 1')]),
    ('just text', [('content', 'just text')])])
def test_channels(text, want):
    tok = byte_tokenizer(CHANNELS)
    p = reply_parser(tok, TOOLS)
    assert p.format.calls == 'harmony' and parts(deltas(p, tok.encode(text))) == want


def test_thought_that_the_prompt_has_begun():
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if think %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
    tok = byte_tokenizer(['<e>'], source)
    for think, want in ((True, [('reasoning', 'Hm'), ('content', 'Yes')]), (False, [('content', 'Hm\n</think>\n\nYes')])):
        after = tok.encode_chat([dict(role='user', content='x')], think=think)
        p = reply_parser(tok, after=after)
        assert p.answering != think
        assert parts(deltas(p, tok.encode('Hm\n</think>\n\nYes'))) == want and p.answering


SAID = '{% for m in messages %}{{ m.content }}{% endfor %}'


@pytest.mark.parametrize('source, tools, want', [
    (SAID + "{% for t in tools %}<tool_call>{{ t.function.name }}{% endfor %}", TOOLS, 'hermes'),
    (SAID + "{% for t in tools %}[TOOLS]{{ t.function.name }}{% endfor %}", TOOLS, 'plain'), (SAID, TOOLS, 'hermes'), (SAID, None, 'plain'),
    ("{% for m in messages %}{% if m.role == 'system' and m.tools %}<|tool|>{{ m.tools }}{% endif %}{{ m.content }}{% endfor %}",
        TOOLS, 'phi4')])
def test_format_of_a_template(source, tools, want):
    assert reply_parser(byte_tokenizer(['<e>'], source), tools).format == ReplyFormat(want)


@pytest.mark.parametrize('piece', ['a ', '<', '<tool_call>', '<tool_call>{', '<tool_call>{"', '{"a": "', ' ', '<tool_call>{}', '\\',
    '{"name": "weather", "parameters": {}};', '<tool_call>{"name": "weather", "arguments": {}}</tool_call>', '[', '<|python_tag|>{"a":',
    'functools['])
@pytest.mark.parametrize('form', ['hermes', 'llama', 'phi4'])
def test_linear(form, piece):
    def make(n):
        pieces = [piece] * n
        def run(): deltas(reply_parser(form, TOOLS), pieces)
        return run
    doubling(make, 6000)     # a sixteenth of it is nested deeper than a call may be, which is when text is read otherwise


@pytest.mark.parametrize('piece', ['x', '<|end|>', '<|start|>', '<|channel|>', ' ', 'to=', '<|message|>',
    '<|channel|>commentary to=functions.weather<|message|>{'])
def test_linear_in_channels(piece):
    tok = byte_tokenizer(CHANNELS)
    def make(n):
        ids = tok.encode(piece) * n
        return lambda: deltas(ReplyParser(ReplyFormat('harmony'), TOOLS, tokenizer=tok), ids)
    doubling(make, 1500)


def test_ids_of_calls_differ():
    ids = {d.id for _ in range(3) for d in deltas(reply_parser('llama', TOOLS), ['{"name": "weather", "parameters": {}};' * 2]) if d.id}
    assert len(ids) == 6 and all(re.fullmatch('call_[0-9a-f]{24}', i) for i in ids)
