"The `openai` package, as its users write it, against the demo model in a worker process"
import asyncio, json
import pytest
from worker_tools import PATIENCE, orcd, worker

openai = pytest.importorskip('openai', reason='the openai package is not installed')
RAIN = [dict(role='user', content='rain')]


@pytest.fixture(scope='module')
def w():
    with orcd('serve', '--model', 'demo', '--device', 'reference', '--port', '0', '--log-format', 'json', wait=True) as p: yield p


@pytest.fixture(scope='module')
def client(w):
    with openai.OpenAI(base_url=f'http://{w.address}/v1', api_key='none', timeout=PATIENCE, max_retries=5) as c: yield c


@pytest.fixture(scope='module')
def name(client): return client.models.list().data[0].id


def native(w, **body):
    "What `/execute` says to the same request"
    *tokens, end = w.execute_when_free('native', **body).all()[1:]
    return ''.join(t['t'] for t in tokens), end


def test_models(client, name):
    assert client.models.retrieve(name).id == name and client.models.retrieve(name).model_extra['max_model_len'] > 0
    with pytest.raises(openai.NotFoundError) as e: client.models.retrieve('gpt-4o')
    assert e.value.code == 'model_not_found' and e.value.param == 'model'


def test_chat(w, client, name):
    "The text of `/execute`, plain and streamed"
    text, end = native(w, messages=RAIN, max_tokens=24, seed=7, temperature=.8)
    given = dict(model=name, messages=RAIN, max_tokens=24, seed=7, temperature=.8)
    r = client.chat.completions.create(**given)
    assert r.choices[0].message.content == text and r.usage.completion_tokens == end['tokens_out'] and r.system_fingerprint
    assert r.choices[0].finish_reason == ('length' if end['stop_reason'] == 'MAX_TOKENS' else 'stop')
    chunks = list(client.chat.completions.create(**given, stream=True, stream_options=dict(include_usage=True)))
    assert ''.join(c.choices[0].delta.content or '' for c in chunks if c.choices) == text
    assert chunks[-1].usage == r.usage and {c.system_fingerprint for c in chunks} == {r.system_fingerprint}
    with client.chat.completions.stream(**given) as s:
        assert ''.join(e.delta for e in s if e.type == 'content.delta') == text
        assert s.get_final_completion().choices[0].message.content == text


def test_async(w, client, name):
    async def go():
        async with openai.AsyncOpenAI(base_url=f'http://{w.address}/v1', api_key='none', timeout=PATIENCE, max_retries=5) as c:
            r = await c.chat.completions.create(model=name, messages=RAIN, max_tokens=9, temperature=0)
            s = await c.chat.completions.create(model=name, messages=RAIN, max_tokens=9, temperature=0, stream=True)
            return r.choices[0].message.content, ''.join([x.choices[0].delta.content or '' async for x in s])
    whole, streamed = asyncio.run(go())
    assert whole == streamed == native(w, messages=RAIN, max_tokens=9, temperature=0)[0]


def test_completions(w, client, name):
    given = dict(model=name, max_tokens=12, temperature=0)
    text = native(w, prompt='The rain', max_tokens=12, temperature=0)[0]
    assert client.completions.create(prompt='The rain', **given).choices[0].text == text
    assert ''.join(c.choices[0].text for c in client.completions.create(prompt='The rain', stream=True, **given)) == text
    two = client.completions.create(prompt=['The rain', 'The moon'], echo=True, **given)
    assert [c.text.startswith(p) for c, p in zip(two.choices, ['The rain', 'The moon'])] == [True, True]
    assert two.choices[0].text == 'The rain' + text


def test_ids_and_back(w, client, name):
    ids = w.post('/tokenize', dict(prompt='The rain'))[2]['tokens']
    given = dict(model=name, max_tokens=12, temperature=0)
    texts = [client.completions.create(prompt=p, **given).choices[0].text for p in (ids, 'The rain')]
    assert texts[0] == texts[1]
    assert w.post('/detokenize', dict(tokens=ids))[2]['prompt'].endswith('The rain')


def test_logprobs(client, name):
    r = client.chat.completions.create(model=name, messages=RAIN, max_tokens=8, temperature=0, logprobs=True, top_logprobs=5)
    entries = r.choices[0].logprobs.content
    assert b''.join(bytes(e.bytes) for e in entries).decode().strip() == r.choices[0].message.content.strip()
    for e in entries:       # at temperature 0 the likeliest is drawn
        assert len(e.top_logprobs) == 5 and e.top_logprobs[0].token == e.token and abs(e.top_logprobs[0].logprob - e.logprob) < 1e-4
        assert sorted((t.logprob for t in e.top_logprobs), reverse=True) == [t.logprob for t in e.top_logprobs]
    legacy = client.completions.create(model=name, prompt='The rain', max_tokens=4, temperature=0, logprobs=2).choices[0]
    assert len(legacy.logprobs.tokens) == 4 and all(len(t) == 2 for t in legacy.logprobs.top_logprobs)


def test_bias_and_stop(w, client, name):
    given = dict(model=name, prompt='The rain', max_tokens=12, temperature=0)
    text = client.completions.create(**given).choices[0].text
    word = text.split()[1]
    cut = client.completions.create(stop=word, **given).choices[0]
    assert cut.text == text[:text.index(word)] and cut.finish_reason == 'stop'
    *_, a = w.post('/tokenize', dict(prompt='a', add_special_tokens=False))[2]['tokens']
    biased = client.completions.create(logit_bias={str(a): 100}, **given).choices[0].text
    assert biased == w.post('/detokenize', dict(tokens=[a] * 12))[2]['prompt'] != text


@pytest.mark.parametrize('given, error', [(dict(temperature=3), 'temperature'), (dict(n=2), 'n'), (dict(max_tokens=10**6), 'max_tokens'),
    (dict(extra_body=dict(suffix='x')), 'suffix'), (dict(modalities=['text', 'audio']), 'modalities')])
def test_bad_requests(client, name, given, error):
    with pytest.raises(openai.BadRequestError) as e: client.chat.completions.create(model=name, messages=RAIN, **given)
    assert e.value.param == error and error in e.value.message


def test_errors_of_a_job_and_of_a_busy_worker():
    "The package's own exceptions; a stream that breaks raises while it is read; it tries again when the worker is busy"
    with worker() as w, openai.OpenAI(base_url=f'http://{w.address}/v1', api_key='none', timeout=PATIENCE, max_retries=0) as c:
        with pytest.raises(openai.InternalServerError) as e: c.completions.create(model='fake.gguf', prompt='soft oom')
        assert e.value.code == 'VRAM_OOM'
        s = c.completions.create(model='fake.gguf', prompt='soft oom', stream=True)
        assert next(iter(s)).choices[0].text == 'soft '
        with pytest.raises(openai.APIError, match='no room'): list(s)
        running = c.completions.create(model='fake.gguf', prompt='tokens:100000@0.01', stream=True)
        next(iter(running))
        with pytest.raises(openai.InternalServerError) as e: c.completions.create(model='fake.gguf', prompt='a')
        assert e.value.status_code == 503 and e.value.code == 'WORKER_BUSY'
        running.close()                                         # the client leaves: the slot is free
        assert w.event('execute_end', reason='gone')
        w.wait_state('ready')
        assert c.completions.create(model='fake.gguf', prompt='a').choices[0].text == 'a '


def test_token():
    import tempfile
    with tempfile.NamedTemporaryFile('w') as f:
        f.write('0123456789abcdef'); f.flush()
        with worker(token='0123456789abcdef') as w:
            url = f'http://{w.address}/v1'
            with openai.OpenAI(base_url=url, api_key='0123456789abcdef', timeout=PATIENCE) as c: assert c.models.list().data
            with openai.OpenAI(base_url=url, api_key='wrong', timeout=PATIENCE) as c:
                with pytest.raises(openai.AuthenticationError): c.models.list()


def test_cancel_ends_an_answer_that_is_no_stream():
    import threading
    with worker() as w:
        got = []
        t = threading.Thread(target=lambda: got.append(w.post('/v1/completions', dict(prompt='tokens:100000@0.01'))))
        t.start()
        id = w.event('execute_start')['job_id']
        assert w.post(f'/cancel/{id}')[0] == 202
        t.join(PATIENCE)
        status, _, body = got[0]
        assert (status, body['error']['code']) == (499, 'CANCELLED') and id.startswith('cmpl-')


def test_curl(w):
    import shutil, subprocess
    if not (curl := shutil.which('curl')): pytest.skip('curl is not installed')
    body = json.dumps(dict(messages=RAIN, max_tokens=4, stream=True))
    out = subprocess.run([curl, '-sN', f'http://{w.address}/v1/chat/completions', '-H', 'Content-Type: application/json', '-d', body],
        capture_output=True, text=True, timeout=PATIENCE).stdout
    assert out.endswith('data: [DONE]\n\n')


# --- answers of a form, and calls of tools: on the demo model, which was trained for neither, the constraint alone makes them

def test_response_format(client, name):
    import jsonschema
    schema = dict(type='object', properties=dict(kind=dict(enum=['rain', 'snow']), drops=dict(type='integer', minimum=1, maximum=9)),
        required=['kind', 'drops'], additionalProperties=False)
    wanted = dict(type='json_schema', json_schema=dict(name='weather', schema=schema, strict=True))
    given = dict(model=name, messages=RAIN, max_tokens=200, temperature=.9, response_format=wanted)
    for seed in range(3):
        r = client.chat.completions.create(seed=seed, **given)
        jsonschema.validate(json.loads(r.choices[0].message.content), schema)
        assert r.choices[0].finish_reason == 'stop'
        s = client.chat.completions.create(seed=seed, stream=True, **given)
        assert ''.join(c.choices[0].delta.content or '' for c in s) == r.choices[0].message.content


def test_pydantic(client, name):
    from pydantic import BaseModel
    class Sky(BaseModel):
        cloudy: bool
        birds: int
    r = client.chat.completions.parse(model=name, messages=RAIN, max_tokens=200, seed=1, response_format=Sky)
    assert r.choices[0].finish_reason != 'stop' or isinstance(r.choices[0].message.parsed, Sky)


def tool(name, **properties):
    parameters = dict(type='object', properties=properties, required=list(properties), additionalProperties=False)
    return dict(type='function', function=dict(name=name, description=name, parameters=parameters))


TOOLS = [tool('weather', city=dict(enum=['Bern', 'Rome'])), tool('convert', celsius=dict(enum=[1, 20]), to=dict(enum=['F', 'K']))]


def test_agent(client, name):
    "A loop with two tools, to its end: each is demanded once, then an answer in words"
    done = dict(weather=lambda city: dict(Bern='1', Rome='20')[city], convert=lambda celsius, to: f'{celsius} {to}')
    messages, called = [*RAIN], []
    for choice in ('weather', 'convert', 'none'):
        wanted = 'none' if choice == 'none' else dict(type='function', function=dict(name=choice))
        r = client.chat.completions.create(model=name, messages=messages, tools=TOOLS, tool_choice=wanted, temperature=0,
            parallel_tool_calls=False if choice != 'none' else None)
        c = r.choices[0]
        messages.append(c.message.model_dump(exclude_none=True, exclude={'reasoning_content'}))
        if choice == 'none': break
        assert c.finish_reason == 'tool_calls' and c.message.tool_calls, c
        for call in c.message.tool_calls:
            result = done[call.function.name](**json.loads(call.function.arguments))
            called.append(call.function.name)
            messages.append(dict(role='tool', tool_call_id=call.id, content=result))
    assert called[0] == 'weather' and 'convert' in called and not c.message.tool_calls and c.message.content


def test_streamed_call(client, name):
    s = client.chat.completions.create(model=name, messages=RAIN, tools=TOOLS, tool_choice='required', parallel_tool_calls=False,
        stream=True)
    chunks = list(s)
    call = next(t for c in chunks for t in c.choices[0].delta.tool_calls or [])
    assert call.function.name in ('weather', 'convert') and json.loads(call.function.arguments) and call.index == 0
    assert chunks[-1].choices[0].finish_reason == 'tool_calls'


# --- programs that are heavy, or bring much: they are tested where they are installed

def test_llm(w, client, name, tmp_path):
    import os, shutil, subprocess
    if not (llm := shutil.which('llm')): pytest.skip('llm is not installed')
    model = dict(model_id='here', model_name=name, api_base=f'http://{w.address}/v1', api_key_name='none')
    (tmp_path / 'extra-openai-models.yaml').write_text(json.dumps([model]))
    for way in [], ['--no-stream']:
        out = subprocess.run([llm, '-m', 'here', '-o', 'max_tokens', '12', '-o', 'temperature', '0', *way, 'rain', '--key', 'x'],
            capture_output=True, text=True, timeout=PATIENCE, env=dict(os.environ, LLM_USER_PATH=str(tmp_path)))
        text = client.chat.completions.create(model=name, messages=RAIN, max_tokens=12, temperature=0).choices[0].message.content
        assert (out.returncode, out.stdout.strip()) == (0, text.strip()), out.stderr


def test_litellm(w, client, name):
    litellm = pytest.importorskip('litellm', reason='litellm is not installed')
    given = dict(messages=RAIN, max_tokens=12, temperature=0)
    text = client.chat.completions.create(model=name, **given).choices[0].message.content
    there = dict(model=f'openai/{name}', api_base=f'http://{w.address}/v1', api_key='x')
    assert litellm.completion(**there, **given).choices[0].message.content == text
    assert ''.join(c.choices[0].delta.content or '' for c in litellm.completion(**there, **given, stream=True)) == text
