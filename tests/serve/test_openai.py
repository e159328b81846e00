"OpenAI's routes, the application without sockets around a scripted engine, against what OpenAI's documentation says"
import asyncio, json, uuid
import pytest
from hypothesis import given, settings, strategies as st
from fake_engine import EOS, piece, say
from orcd.errors import CODES, OutOfVRAM
from test_protocol import InProcess
from worker_tools import quiet_logs

quick = settings(max_examples=100, deadline=None)
HI = [dict(role='user', content='hi')]


@pytest.fixture(scope='module', autouse=True)
def quiet():
    with quiet_logs(): yield


@pytest.fixture(scope='module')
def app():
    a = InProcess(say('Rain falls.') + [EOS], model_ref='m')
    yield a
    a.jobs.stop()


@pytest.fixture
def scripted():
    made = []
    def make(script, **kw):
        made.append(InProcess(script, model_ref='m', **kw))
        return made[-1]
    yield make
    for a in made: a.jobs.stop()


def chat(app, messages=HI, **kw): return app.post('/v1/chat/completions', json.dumps(dict(messages=messages) | kw))
def complete(app, prompt='hi', **kw): return app.post('/v1/completions', json.dumps(dict(prompt=prompt) | kw))


def chunks(r):
    "The data of a stream's frames, which ends with [DONE]; each a line of its own"
    assert r.status_code == 200 and r.headers['content-type'] == 'text/event-stream', r.text
    *frames, rest = r.text.split('\n\n')
    assert rest == '' and all(f.startswith('data: ') and '\n' not in f for f in frames)
    assert frames.pop() == 'data: [DONE]'
    return [json.loads(f[6:]) for f in frames]


def fault(r, status, param=None, code=None):
    assert r.status_code == status, r.text
    e = r.json()
    assert list(e) == ['error'] and list(e['error']) == ['message', 'type', 'param', 'code'], e
    assert e['error']['param'] == param and (code is None or e['error']['code'] == code), e
    return e['error']


# --- answers

def test_chat(app):
    r = chat(app, seed=3)
    d = r.json()
    assert d['id'].startswith('chatcmpl-') and d['object'] == 'chat.completion' and d['model'] == 'm' and d['created'] > 1e9
    assert d['system_fingerprint'].startswith('fp_')
    assert d['choices'] == [dict(index=0, message=dict(role='assistant', content='Rain falls.'), logprobs=None, finish_reason='stop')]
    # <start>user\nhi<end><start>, and the bytes of the answer: the token that ends it has no place in the text, nor in the count
    assert d['usage'] == dict(prompt_tokens=10, completion_tokens=11, total_tokens=21, prompt_tokens_details=dict(cached_tokens=0),
        completion_tokens_details=dict(reasoning_tokens=0))
    assert uuid.UUID(r.headers['x-correlation-id'])


def test_chat_stream(app):
    first, *tokens, last = chunks(chat(app, stream=True))
    assert first['choices'] == [dict(index=0, delta=dict(role='assistant', content=''), logprobs=None, finish_reason=None)]
    assert ''.join(c['choices'][0]['delta']['content'] for c in tokens) == 'Rain falls.' and len(tokens) == 11
    assert last['choices'] == [dict(index=0, delta={}, logprobs=None, finish_reason='stop')]
    same = [{k: c[k] for k in ('id', 'object', 'created', 'model', 'system_fingerprint')} for c in (first, *tokens, last)]
    assert all(s == same[0] for s in same) and same[0]['object'] == 'chat.completion.chunk'
    assert not any('usage' in c for c in (first, *tokens, last))


def test_usage_in_a_stream(app):
    *rest, last = chunks(chat(app, stream=True, stream_options=dict(include_usage=True)))
    assert all(c['usage'] is None for c in rest) and last['choices'] == []
    assert last['usage'] == chat(app).json()['usage']


def test_completion(app):
    d = complete(app).json()
    assert d['id'].startswith('cmpl-') and d['object'] == 'text_completion'
    assert d['choices'] == [dict(index=0, text='Rain falls.', logprobs=None, finish_reason='stop')]
    assert d['usage']['prompt_tokens'] == 2
    parts = chunks(complete(app, stream=True))
    assert ''.join(c['choices'][0]['text'] for c in parts) == 'Rain falls.' and parts[-1]['choices'][0]['finish_reason'] == 'stop'
    assert {c['object'] for c in parts} == {'text_completion'}


@pytest.mark.parametrize('prompt, texts', [('hi', ['hi']), (say('hi'), ['hi']), (['a', 'b'], ['a', 'b']), ([say('a'), say('bc')], ['a',
    'bc'])])
def test_prompts(app, prompt, texts):
    "Of every kind, in their order, one job for all; with `echo` each text begins with its prompt"
    d = complete(app, prompt, echo=True).json()
    assert [(c['index'], c['text']) for c in d['choices']] == [(i, t + 'Rain falls.') for i, t in enumerate(texts)]
    assert d['usage']['prompt_tokens'] == sum(map(len, texts)) and d['usage']['completion_tokens'] == 11 * len(texts)
    said = [''] * len(texts)
    for c in chunks(complete(app, prompt, echo=True, stream=True)): said[c['choices'][0]['index']] += c['choices'][0]['text']
    assert said == [t + 'Rain falls.' for t in texts]


def test_length(app):
    assert chat(app, max_tokens=3).json()['choices'][0]['finish_reason'] == 'length'
    d = chat(app, max_completion_tokens=3).json()
    assert d['choices'][0]['message']['content'] == 'Rai' and d['usage']['completion_tokens'] == 3


def test_absent_max_tokens_is_what_the_worker_and_the_context_allow(scripted):
    a = scripted([], max_tokens_out=7)
    assert chat(a).json()['usage']['completion_tokens'] == 7
    fault(chat(a, max_tokens=8), 400, 'max_tokens')
    d = complete(scripted([]), 'x' * 4090).json()          # the context has 4096
    assert (d['usage']['completion_tokens'], d['choices'][0]['finish_reason']) == (6, 'length')


def test_stop(scripted):
    a = scripted(say('Rain falls.\nMore') + [EOS])
    for stop in '\nM', ['xx', '\nM']:
        c = chat(a, stop=stop).json()['choices'][0]
        assert (c['message']['content'], c['finish_reason']) == ('Rain falls.', 'stop')
    assert ''.join(c['choices'][0]['delta'].get('content', '') for c in chunks(chat(a, stop='\nM', stream=True))) == 'Rain falls.'


def test_what_goes_to_the_engine(app):
    given = dict(temperature=.25, top_k=5, top_p=.5, min_p=.125, repetition_penalty=1.5, seed=7,
        frequency_penalty=-1.5, presence_penalty=.75)
    for ask in chat, complete:
        assert ask(app, logit_bias={'65': -100, '9': 1.5}, **given).status_code == 200
        params = app.jobs.model.engine.params[-1]
        assert {k: getattr(params, k) for k in given} == given and params.logit_bias == {65: -100, 9: 1.5} and not params.top_logprobs
    chat(app, logprobs=True, top_logprobs=3)
    assert app.jobs.model.engine.params[-1].top_logprobs == 3
    complete(app, logprobs=4)
    assert app.jobs.model.engine.params[-1].top_logprobs == 4


def test_text_is_whole(scripted):
    "Half a character waits; what steers a terminal or ends a line for some clients is escaped"
    rain = [piece('雨'.encode()[:2]), piece('雨'.encode()[2:])]
    a = scripted([*rain, *say('\x7f\u2028"\\'), EOS])
    assert chat(a).json()['choices'][0]['message']['content'] == '雨\x7f\u2028"\\'
    r = chat(a, stream=True)
    assert ''.join(c['choices'][0]['delta'].get('content', '') for c in chunks(r)) == '雨\x7f\u2028"\\'
    assert '雨' in r.text and not any(c in r.text for c in '\x7f\u2028')


# --- probabilities

def test_logprobs(scripted):
    a = scripted([piece('雨'.encode()[:2]), piece('雨'.encode()[2:]), *say('!'), EOS])
    d = chat(a, logprobs=True).json()['choices'][0]
    entries = d['logprobs']['content']
    assert b''.join(bytes(e['bytes']) for e in entries).decode() == d['message']['content'] == '雨!'
    assert all(list(e) == ['token', 'logprob', 'bytes',
        'top_logprobs'] and e['logprob'] == -.5 and e['top_logprobs'] == [] for e in entries)
    streamed = [e for c in chunks(chat(a, logprobs=True,
        stream=True)) for e in (c['choices'][0]['logprobs'] or dict(content=[]))['content']]
    assert streamed == entries


def test_logprobs_of_a_stop_string_are_not_told(scripted):
    a = scripted(say('ab') + [piece(b'stop')])
    for stream in (False, True):
        r = chat(a, logprobs=True, stop='stop', stream=stream)
        found = [c['choices'][0]['logprobs'] for c in (chunks(r) if stream else [r.json()])]
        assert ''.join(e['token'] for f in found if f for e in f['content']) == 'ab'


def test_legacy_logprobs(scripted):
    a = scripted([piece(b'Ha'), *say('i'), EOS])
    d = complete(a, logprobs=0).json()['choices'][0]
    assert d['logprobs'] == dict(tokens=['Ha', 'i'], token_logprobs=[-.5, -.5], top_logprobs=None, text_offset=[0, 2])
    assert complete(a).json()['choices'][0]['logprobs'] is None
    offsets = [o for c in chunks(complete(a, logprobs=0,
        stream=True)) for o in (c['choices'][0]['logprobs'] or dict(text_offset=[]))['text_offset']]
    assert offsets == [0, 2]


# --- errors

KNOWN = dict(suffix='x', best_of=2, functions=[], function_call='auto', modalities=['text', 'audio'], audio={}, guided_json={}, grammar='a',
    prompt_logprobs=1, ignore_eos=True, documents=[])


@pytest.mark.parametrize('field', KNOWN)
def test_known_and_not_honoured(app, field):
    for ask in chat, complete: assert field in fault(ask(app, **{field: KNOWN[field]}), 400, field, 'unsupported_parameter')['message']


TOOL = dict(type='function', function=dict(name='weather', description='of a city', parameters=dict(type='object')))


def schema(schema): return dict(response_format=dict(type='json_schema', json_schema=dict(name='a', schema=schema)))
def strict(parameters): return dict(TOOL, function=dict(name='weather', strict=True, parameters=parameters))


@pytest.mark.parametrize('field, given', [('tools', dict(tools=[dict(type='retrieval')])), ('tools', dict(tools=[TOOL, TOOL])),
    ('tools', dict(tools=[dict(type='function', function=dict(name='a b'))])), ('tools', dict(tools=dict())),
    ('tools', dict(tools=[strict(dict(type='nonsense'))])), ('tool_choice', dict(tool_choice='required')),
    ('tool_choice', dict(tool_choice=3)),
    ('tool_choice', dict(tools=[TOOL], tool_choice=dict(type='function', function=dict(name='rain')))),
    ('response_format', dict(response_format=dict(type='json_schema'))), ('response_format', dict(response_format=dict(type='xml'))),
    ('response_format', schema(dict(type='nonsense'))), ('response_format', schema(None)),
    ('chat_template_kwargs', dict(chat_template_kwargs=dict(enable_thinking=False))),
    ('reasoning_effort', dict(reasoning_effort='low')), ('reasoning_effort', dict(reasoning_effort='huge'))])
def test_nothing_runs_without_what_was_asked_for(app, field, given): fault(chat(app, **given), 400, field)


def test_which_tool_is_wrong(app):
    def named(name, **more): return dict(TOOL, function=dict(name=name, **more))
    for wrong, why in ((dict(type='retrieval'), 'must be'), (named('now', parameters=[]), 'must be a JSON schema'),
            (named('now', strict='yes'), 'strict must be'), (named('weather'), 'twice'), (named('a b'), 'letters')):
        message = chat(app, tools=[TOOL, wrong]).json()['error']['message']
        assert message.startswith('tools[1]') and why in message, message


def test_tools_and_thoughts(scripted, monkeypatch):
    "As the templates of Qwen3 have them; a call is told when it is complete, in both kinds of answers"
    from fake_engine import FakeTokenizer
    monkeypatch.setattr(FakeTokenizer, 'chat_source', lambda self, tools=None: '<think></think>{{ tools }}<tool_call>')
    monkeypatch.setattr(FakeTokenizer, 'tool_form', lambda self, tools=None: type('F', (), dict(tools=True))())
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    a = scripted(say('<think>Where?</think>\n\nI look.' + call) + [EOS])
    d = chat(a, tools=[TOOL]).json()
    c = d['choices'][0]
    assert (c['message']['content'], c['message']['reasoning_content'], c['finish_reason']) == ('I look.', 'Where?', 'tool_calls')
    call, = c['message']['tool_calls']
    assert call['type'] == 'function' and call['function'] == dict(name='weather', arguments='{"city": "Bern"}')
    assert 0 < d['usage']['completion_tokens_details']['reasoning_tokens'] < d['usage']['completion_tokens']
    deltas = [c['choices'][0]['delta'] for c in chunks(chat(a, tools=[TOOL], stream=True))]
    assert [t['function']['name'] for d in deltas for t in d.get('tool_calls', [])] == ['weather']
    assert ''.join(d.get('content') or '' for d in deltas) == 'I look.'
    assert ''.join(d.get('reasoning_content', '') for d in deltas) == 'Where?'
    for other in (dict(tools=[TOOL], tool_choice='none'), {}):        # without tools the call is text
        m = chat(a, **other).json()['choices'][0]
        assert '<tool_call>' in m['message']['content'] and m['finish_reason'] == 'stop' and 'tool_calls' not in m['message']


def test_unknown_is_ignored(app):
    assert chat(app, user='me', store=False, metadata={}, whatever=[1], temperature=None).status_code == 200


@pytest.mark.parametrize('field, value', [('temperature', 2.1), ('temperature', True), ('top_p', -1), ('top_p', '1'), ('min_p', 2),
    ('top_k', -1),
    ('top_k', 1.5), ('repetition_penalty', 0), ('seed', -1), ('seed', 2**64), ('n', 2), ('n', 0), ('stop', ['a'] * 5), ('stop', ''),
        ('stop', 3),
    ('stream', 'yes'), ('stream_options', []), ('max_tokens', 0), ('max_tokens', 99999),
    ('logit_bias', {'-1': 1}), ('logit_bias', {'1': 101}), ('logit_bias', []), ('logit_bias', {'100000': 1}),
    ('frequency_penalty', 2.5),
    ('presence_penalty', '1')])
def test_rules(app, field, value):
    for ask in chat, complete: fault(ask(app, **{'stream': True} | {field: value}), 400, field)


@pytest.mark.parametrize('messages', [[], 'hi', [{}], [dict(role='robot', content='a')], [dict(role='user')], [dict(role='user',
    content='')],
    [dict(role='user', content=[dict(type='image_url', image_url=dict(url='data:'))])], [dict(role='user', content='\ud800')], None])
def test_messages(app, messages): fault(chat(app, messages), 400, 'messages')


def test_other_parts_are_named(app):
    parts = [dict(type='text', text='a'), dict(type='input_audio', input_audio={})]
    assert 'input_audio' in fault(chat(app, [dict(role='user', content=parts)]), 400, 'messages')['message']


def test_parts_and_roles(app):
    roles = [dict(role='system', content='s'), dict(role='developer', content='d'), dict(role='user', content=[dict(type='text',
        text='u')] * 2),
        dict(role='assistant', content='a'), dict(role='tool', content='t', tool_call_id='1'), dict(role='user', content='u')]
    assert chat(app, roles).json()['usage']['prompt_tokens'] == len(app.jobs.model.tokenizer.encode_chat(roles))


@pytest.mark.parametrize('prompt', ['', [], [''], ['a', 1], [[1], 'a'], [True], [1.5], {}, 3, ['a'] * 65, None, [[]], '\ud800'])
def test_wrong_prompts(app, prompt): fault(complete(app, prompt), 400, 'prompt')


def test_ids_beyond_the_vocabulary(app): fault(complete(app, [10**6]), 400, 'prompt')
def test_two_limits(app): fault(chat(app, max_tokens=3, max_completion_tokens=4), 400, 'max_tokens')
def test_stream_options_without_a_stream(app): fault(chat(app, stream_options=dict(include_usage=True)), 400, 'stream_options')
def test_echo_has_no_probabilities(app): fault(complete(app, echo=True, logprobs=1), 400, 'logprobs')


def test_every_broken_rule_is_named(app):
    message = fault(chat(app, temperature=3, n=4, best_of=2), 400, 'temperature')['message']
    assert all(f in message for f in ('temperature', 'n must be', 'best_of'))


def test_model(app):
    assert chat(app, model='m').status_code == chat(app, model=None).status_code == 200
    for ask in (chat, complete): assert 'gpt-4' in fault(ask(app, model='gpt-4'), 404, 'model', 'model_not_found')['message']
    fault(chat(app, model=7), 400, 'model')


def test_too_long(app):
    fault(complete(app, 'x' * 5000), 400, 'prompt', 'context_length_exceeded')
    fault(chat(app, [dict(role='user', content='x' * 5000)]), 400, 'prompt', 'context_length_exceeded')


@pytest.mark.parametrize('body', [b'', b'{', b'[]', b'{"a":NaN}', b'\xff', b'{"a":1,"a":2}', b'[' * 10000,
    b'{"messages":' + b'[' * 40 + b']' * 40 + b'}'])
@pytest.mark.parametrize('path', ['/v1/chat/completions', '/v1/completions', '/tokenize', '/detokenize'])
def test_bad_json(app, path, body): fault(app.post(path, body), 400, None, 'INVALID_REQUEST')


def test_http_errors(app):
    fault(app.request('GET', '/v1/chat/completions'), 405)
    fault(app.request('GET', '/v1/nothing'), 404)
    fault(app.request('POST', '/v1/completions', content='{}', headers={'Content-Type': 'text/plain'}), 415)
    fault(app.post('/tokenize', b' ' * (1 << 20) + b'{}'), 413)


def test_errors_in_a_job(scripted):
    for error, code in (OutOfVRAM('no room'), 'VRAM_OOM'), (ZeroDivisionError('/home/secret'), 'INTERNAL'):
        a = scripted(say('ab') + [error])
        assert 'secret' not in fault(chat(a), CODES[code].status, None, code)['message']
        *said, last = chunks(chat(a, stream=True))
        assert last['error']['code'] == code and 'secret' not in last['error']['message'] and len(said) == 3
    a = scripted([], )
    a.jobs.drain()
    fault(chat(a), 503, None, 'SHUTTING_DOWN')


def test_busy_comes_before_the_length(scripted):
    import threading
    event = threading.Event()
    a = scripted([event])
    async def go():
        import httpx
        async with httpx.AsyncClient(transport=httpx.ASGITransport(a.app), base_url='http://x') as c:
            running = asyncio.create_task(c.post('/v1/completions', json=dict(prompt='a', max_tokens=1)))
            while not a.jobs.active: await asyncio.sleep(.001)
            late = await c.post('/v1/completions', json=dict(prompt='x' * 5000))
            wrong = await c.post('/v1/completions', json=dict(prompt='x', n=7))
            event.set()
            return await running, late, wrong
    running, late, wrong = asyncio.run(go())
    assert fault(late, 503, None, 'WORKER_BUSY')['type'] == 'server_error' and late.headers['retry-after'] == '1'
    fault(wrong, 400, 'n')
    assert running.status_code == 200


# --- the others

def test_models(app):
    listed = app.request('GET', '/v1/models').json()
    assert listed['object'] == 'list' and len(listed['data']) == 1
    entry = listed['data'][0]
    assert (entry['id'], entry['object'], entry['max_model_len']) == ('m', 'model', 4096) and entry['created'] > 1e9
    assert app.request('GET', '/v1/models/m').json() == entry
    fault(app.request('GET', '/v1/models/other'), 404, 'model', 'model_not_found')
    fault(app.request('GET', '/v1/models/m%FF'), 404, 'model', 'model_not_found')


def test_tokenize(app):
    d = app.post('/tokenize', json.dumps(dict(prompt='Rain ☂'))).json()
    assert d == dict(tokens=list('Rain ☂'.encode()), count=8, max_model_len=4096)
    assert app.post('/detokenize', json.dumps(dict(tokens=d['tokens']))).json() == dict(prompt='Rain ☂')
    assert app.post('/tokenize', json.dumps(dict(messages=HI))).json()['tokens'] == app.jobs.model.tokenizer.encode_chat(HI)
    assert app.post('/tokenize', json.dumps(dict(messages=HI, add_generation_prompt=False))).json()['count'] == 9
    assert app.post('/tokenize', json.dumps(dict(prompt='x' * 5000))).json()['count'] == 5000      # it may be more than the context
    assert app.post('/detokenize', json.dumps(dict(tokens=[]))).json() == dict(prompt='')


@pytest.mark.parametrize('path, body, param', [('/tokenize', {}, 'prompt'), ('/tokenize', dict(prompt='a', messages=HI), 'prompt'),
    ('/tokenize', dict(prompt=''), 'prompt'), ('/tokenize', dict(prompt=3), 'prompt'), ('/tokenize', dict(messages=[]), 'messages'),
    ('/tokenize', dict(prompt='a', add_special_tokens=1), 'add_special_tokens'), ('/detokenize', {}, 'tokens'),
    ('/detokenize', dict(tokens=['a']), 'tokens'), ('/detokenize', dict(tokens=[-1]), 'tokens'), ('/detokenize', dict(tokens=[10**30]),
        'tokens')])
def test_tokenize_errors(app, path, body, param): fault(app.post(path, json.dumps(body)), 400, param)


def test_token(scripted):
    a = scripted([EOS], token='secret')
    assert fault(chat(a), 401, None, 'invalid_api_key')['type'] == 'authentication_error'
    fault(a.request('GET', '/v1/models'), 401)
    assert a.request('GET', '/v1/models', headers={'Authorization': 'Bearer secret'}).status_code == 200


# --- anything at all

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=4), max_leaves=8)
FIELDS = '''messages prompt model max_tokens max_completion_tokens temperature top_p top_k min_p repetition_penalty seed stop stream
    stream_options n logprobs top_logprobs logit_bias frequency_penalty presence_penalty response_format tools tool_choice
    parallel_tool_calls
    reasoning_effort chat_template_kwargs echo suffix tokens add_special_tokens add_generation_prompt'''.split()


@quick
@given(st.sampled_from(['/v1/chat/completions', '/v1/completions', '/tokenize', '/detokenize']), st.booleans(), st.booleans(),
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6))
def test_anything_in_any_field(app, path, messages, prompt, d):
    d |= (dict(messages=HI) if messages else {}) | (dict(prompt='hi') if prompt else {})
    r = app.post(path, json.dumps(d))
    assert r.status_code in (200, 400, 404), (d, r.text)
    if r.status_code != 200: fault(r, r.status_code, r.json()['error']['param'])
    elif r.headers['content-type'] == 'text/event-stream': chunks(r)
    else: assert 'choices' in r.json() or 'tokens' in r.json() or 'prompt' in r.json()


@quick
@given(st.fixed_dictionaries({}, optional=dict(temperature=st.floats(0, 2), top_p=st.floats(0, 1), top_k=st.integers(0, 10**30),
    min_p=st.floats(0, 1), seed=st.integers(0, 2**64 - 1), stop=st.lists(st.text('abc', min_size=1, max_size=9), max_size=4),
    max_tokens=st.integers(1, 2048), stream=st.booleans(), n=st.just(1), logit_bias=st.just({}), frequency_penalty=st.just(0),
        tools=st.just([]))))
def test_everything_allowed_runs(app, d):
    for ask in chat, complete: assert ask(app, **d).status_code == 200


def test_channels():
    "A reply of gpt-oss, token by token: thoughts, then an answer that ends before a stop string; a call"
    import codecs, re
    from types import SimpleNamespace as NS
    from orcd.serve.openai import Reply
    from orcd.text.replies import ReplyFormat, ReplyParser
    marks = ['<|start|>', '<|channel|>', '<|message|>', '<|end|>', '<|return|>', '<|call|>']
    def stream(after=()):
        d = codecs.getincrementaldecoder('utf-8')('replace')
        return NS(push=lambda i: d.decode(bytes([i])), flush=lambda: d.decode(b'', True))
    toy = NS(special_by_id={256 + i: NS(text=t) for i, t in enumerate(marks)}, stream=stream)
    def read(text, stop=(), tools=()):
        reply = Reply(ReplyParser(ReplyFormat('harmony'), tools, tokenizer=toy), stop)
        parts = re.split('(' + '|'.join(map(re.escape, marks)) + ')', text)
        ids = [i for p in parts for i in ([256 + marks.index(p)] if p in marks else p.encode())]
        deltas = [d for i in ids for d in reply.push(NS(id=i, text=''))] + reply.flush()
        return {k: ''.join(d.text for d in deltas if d.kind == k) for k in ('reasoning', 'content', 'tool_call')}, reply
    answer = '<|channel|>analysis<|message|>They greet. STOP.<|end|><|start|>assistant<|channel|>final<|message|>Hello! STOP'
    assert read(answer)[0] == dict(reasoning='They greet. STOP.', content='Hello! STOP', tool_call='')
    assert read(answer, ['STOP'])[0] == dict(reasoning='They greet. STOP.', content='Hello! ', tool_call='')
    assert read(answer[:-1], ['STOP'])[0]['content'] == 'Hello! STO'
    call = '<|start|>assistant to=functions.weather<|channel|>commentary<|message|>{"a": 1}'
    said, reply = read('<|channel|>analysis<|message|>Hm.<|end|>' + call, (), ['weather'])
    assert said == dict(reasoning='Hm.', content='', tool_call='{"a": 1}') and reply.calls == 1 and reply.thinking > 3
