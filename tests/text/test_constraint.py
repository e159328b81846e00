"Constraints: what is drawn under them is valid, said by jsonschema; what cannot be had is refused before a token"
import json, re
from pathlib import Path
from types import SimpleNamespace
import jsonschema, numpy as np, pytest
import orcd
from orcd.errors import RequestError
from orcd.text import constraint
from orcd.text.constraint import MAX_SCHEMA, Guide, asked_choice, asked_format, compile
from orcd.text.replies import reply_parser
from orcd.text.tokenizer import ALPHABET, Tokenizer

pytest.importorskip('llguidance')
CITY = dict(type='object', properties=dict(city=dict(enum=['Bern', 'Zürich']), n=dict(type='integer', minimum=-5, maximum=500),
    tags=dict(type='array', items=dict(type='string', maxLength=4), maxItems=2)), required=['city', 'n'], additionalProperties=False)
PLACE = dict(type='object', properties=dict(city=dict(enum=['Bern', 'Rom'])), required=['city'], additionalProperties=False)
TOOLS = [dict(type='function', function=f) for f in (dict(name='weather', parameters=PLACE), dict(name='now'))]
TEMPLATES = {name: '{% for m in messages %}{{ m.content }}{% endfor %}' + rest for name, rest in dict(
    hermes='{% for t in tools %}<tool_call>{{ t.function.name }}{% endfor %}',
    thinks='{% for t in tools %}<tool_call>{{ t }}{% endfor %}{% if 0 %}<think>{% endif %}',
    llama='{% for t in tools %}{{ t.function.name }}{% endfor %}{% if 0 %}<|python_tag|>{% endif %}',
    phi4='{% for t in tools %}<|tool|>{{ t }}<|/tool|>{% endfor %}').items()}


def tokenizer(name):
    marks = dict(hermes='<tool_call> </tool_call>', thinks='<think> </think> <tool_call> </tool_call>', llama='<|python_tag|>',
        phi4='<|tool|> <|/tool|> <|tool_call|> <|/tool_call|>')[name].split()
    merges = ['{ "', 'e r', 'i n', '} }', '" :']
    tokens = [*ALPHABET.values(), *(m.replace(' ', '') for m in merges), *marks, '<|im_end|>', '[PAD1]']
    m = dict(model='gpt2', pre='gpt-2', tokens=tokens, merges=merges, eos_token_id=len(tokens) - 2,
        token_type=[1]*(256 + len(merges)) + [4]*len(marks) + [3, 5])
    m = {'tokenizer.ggml.' + k: v for k, v in m.items()} | {'tokenizer.chat_template': TEMPLATES[name]}
    return Tokenizer.from_gguf(SimpleNamespace(path=None, metadata=m))


@pytest.fixture(scope='module')
def haiku():
    with orcd.load('demo', device='reference', progress=False) as m: yield m


def draw(guide, tok, seed, n=600):
    "A reply of a model that knows nothing; whatever is allowed may come"
    rng, ids = np.random.default_rng(seed), []
    while len(ids) < n and not guide.done:
        bits = guide.mask()
        allowed = np.arange(tok.n_valid) if bits is None else np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder='little'))
        assert allowed.size and allowed.max() < tok.n_valid
        i = int(rng.choice(allowed))
        if i in tok.stop_ids: break
        ids.append(i)
        guide.commit(i)
    return ids


@pytest.mark.parametrize('name', TEMPLATES)
def test_answers_are_valid(name):
    tok, asked, whole = tokenizer(name), dict(type='json_schema', json_schema=dict(name='city', schema=CITY)), 0
    for seed in range(12):
        ids = draw(compile(tok, asked), tok, seed)
        if len(ids) == 600: continue        # still thinking: nothing is demanded of that
        said = tok.decode(ids)
        if '</think>' in said: said = said.partition('</think>')[2]
        jsonschema.validate(json.loads(said), CITY)
        whole += 1
    assert whole >= 6


def test_a_vocabulary_that_puts_a_space_before_texts():
    "What the grammar forces follows something: no space comes before it, as Phi-3's vocabulary would have it at the beginning of a text"
    with orcd.GGUF(Path(__file__).parent.parent/'models'/'haiku-phi3-q4_0.gguf') as g: tok = Tokenizer.from_gguf(g)
    assert tok.space_prefix
    asked, whole = dict(type='json_schema', json_schema=dict(name='city', schema=CITY)), 0
    for seed in range(8):
        ids = draw(compile(tok, asked), tok, seed)
        if len(ids) == 600: continue
        jsonschema.validate(json.loads(tok.decode(ids)), CITY)
        whole += 1
    assert whole >= 4


@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize('choice', ['required', dict(type='function', function=dict(name='weather'))])
def test_calls_are_valid(name, choice):
    tok, seen = tokenizer(name), set()
    for seed in range(8):
        guide, parser = compile(tok, None, TOOLS, choice, False, after=tok.encode('<think></think>' if name == 'thinks' else '')), \
            reply_parser(tok, TOOLS, after=tok.encode('<think></think>' if name == 'thinks' else ''))
        deltas = [d for i in draw(guide, tok, seed) for d in parser.push(i)] + parser.flush()
        if not guide.done: continue         # arguments without a schema may go on for long
        found = [d for d in deltas if d.kind == 'tool_call']
        called, arguments = next(d.name for d in found), json.loads(''.join(d.text for d in found))
        if called == 'weather': jsonschema.validate(arguments, PLACE)
        else: assert isinstance(arguments, dict)
        assert not ''.join(d.text for d in deltas if d.kind == 'content').strip()
        seen.add(called)
    assert 'weather' in seen if choice == 'required' else seen == {'weather'}


def test_nothing_demanded_is_no_constraint():
    "… and no look at the template; a constraint that lacks a half cannot be made"
    for tools, choice in ((None, None), ([], 'auto'), (TOOLS, 'none')):
        assert compile(None, dict(type='text'), tools, choice) is None
    class Half(Guide):
        def mask(self): return None
    with pytest.raises(TypeError, match='commit'): Half(None, None, False)


def test_free_until_a_call_begins():
    "With auto nothing is masked before the mark of a call; behind it the call has its form"
    tok = tokenizer('hermes')
    guide = compile(tok, None, TOOLS)
    for i in tok.encode('Let me see. '):
        assert guide.mask() is None
        guide.commit(i)
    guide.commit(tok.special['<tool_call>'].id)
    assert guide.mask() is not None
    said = tok.decode(draw(guide, tok, 1, 3000))
    assert re.match(r'\s*\{"name": "(weather|now)", "arguments": \{', said)


def test_the_demo_model(haiku):
    "Through `chat`: valid, ended by itself, the same for the same seed, and other seeds say other things"
    asked = dict(response_format=dict(type='json_schema', json_schema=dict(name='city', schema=CITY)), max_tokens=400)
    texts = []
    for seed in (1, 2, 1):
        g = haiku.chat('rain', seed=seed, **asked).run()
        assert g.stop_reason == 'EOS'
        jsonschema.validate(json.loads(g.text), CITY)
        texts.append(g.text)
    assert texts[0] == texts[2] != texts[1]
    g = haiku.chat('rain', tools=TOOLS[:1], tool_choice='required', seed=3, max_tokens=100).run()
    (call,) = g.tool_calls
    assert call['function']['name'] == 'weather' and json.loads(call['function']['arguments'])['city'] in ('Bern', 'Rom')
    assert g.tool_calls == [call] and call['type'] == 'function'
    assert haiku.chat('rain', tools=TOOLS, tool_choice='none', seed=3, max_tokens=8).run().tool_calls == []


@pytest.mark.parametrize('schema, says', [
    (dict(type='array', uniqueItems=True), 'uniqueItems'), (dict(type='integer', multipleOf=9_999_991), 'cannot be used'),
    ({'$ref': '#/$defs/x'}, 'cannot be used'), (dict(const='x'*MAX_SCHEMA), 'too large'), (dict(type='nothing'), 'cannot be used'),
    (dict(type='string', pattern='('), 'cannot be used'), (dict(allOf=[dict(type='string'), dict(type='integer')]), 'cannot be used'),
    (dict(type='object', properties={f'p{i}': dict(type='string', pattern='(a|b)*c{500}') for i in range(300)}, required=[]), '')])
def test_schemas_that_cannot_be_had(schema, says):
    "Refused in a sentence, or compiled; nothing else"
    tok = tokenizer('hermes')
    try: guide = compile(tok, dict(type='json_schema', json_schema=dict(schema=schema)))
    except RequestError as e: assert says in str(e) and '\n' not in str(e) and len(str(e)) < 500
    else: assert not says and guide.mask() is not None


def test_a_reason_names_the_tool():
    parameters = dict(type='object', properties=dict(a=dict(type='array', uniqueItems=True)))
    bad = [dict(type='function', function=dict(name='bad', parameters=parameters))]
    with pytest.raises(RequestError, match='tools: the parameters of bad cannot be used: .*uniqueItems'):
        compile(tokenizer('hermes'), None, TOOLS + bad, 'required')
    assert compile(tokenizer('hermes'), None, TOOLS + bad) is not None        # a call that nobody demands may then hold any object


@pytest.mark.parametrize('asked, says', [('json', 'must be an object'), ({}, 'type must be'), (dict(type='xml'), 'type must be'),
    (dict(type='json_schema'), 'schema is missing'), (dict(type='json_schema', json_schema=dict(schema=[])), 'schema is missing')])
def test_formats_that_are_none(asked, says):
    with pytest.raises(RequestError, match=says): asked_format(asked)


@pytest.mark.parametrize('tools, choice, says', [('x', None, 'must be a list'), ([{}], None, r'tools\[0\] must be'),
    ([*TOOLS, TOOLS[0]], None, 'twice'), ([dict(type='function', function=dict(name='a b'))], None, 'letters'),
    ([], 'required', 'no tools'), (TOOLS, 'always', 'tool_choice must be'),
    (TOOLS, dict(type='function', function=dict(name='rain')), 'none of the tools'), (TOOLS*65, None, 'are allowed')])
def test_choices_that_are_none(tools, choice, says):
    with pytest.raises(RequestError, match=says): asked_choice(tools, choice)


def test_the_vocabulary_is_the_tokenizers(haiku):
    "llguidance cuts texts as the tokenizer does, and padding is never allowed"
    v = constraint.vocabulary(haiku.tokenizer)
    for text in ('rain on Grüße 雨', '{"a": [1, 2]}', ' \n\t', "it's"):
        assert v.guide.tokenize_str(text) == haiku.tokenizer.encode(text, add_special=False, parse_special=False)
    bits = np.unpackbits(v.valid.view(np.uint8), bitorder='little')
    assert bits.sum() == haiku.tokenizer.n_valid and bits[:haiku.tokenizer.n_valid].all()
