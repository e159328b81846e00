"Bodies of every kind against the rules of the contract, written here a second time"
import asyncio, functools, inspect, json, math, string, threading, uuid
from pathlib import Path
import httpx, pytest
from hypothesis import given, settings, strategies as st
from doubling import doubling
from fake_engine import EOS, fake_model, say
from orcd.engine.generation import Model
from orcd.errors import CODES
from orcd.serve import protocol
from orcd.serve.jobs import Jobs
from orcd.serve.protocol import ApiError, frame, parse_json, parse_request, read_events, to_json, token_frame
from orcd.serve.worker import RequestMiddleware, Settings, Worker, make_app
from worker_tools import quiet_logs


@pytest.fixture(scope='module', autouse=True)
def quiet():
    with quiet_logs(): yield

CHAPTER = next((Path(__file__).resolve().parents[2] / 'nbs').rglob('*_protocol.ipynb'))
quick = settings(max_examples=150, deadline=None)


class InProcess:
    "The whole application without sockets, around a scripted engine"
    def __init__(self, script=say('hi') + [EOS], **kw):
        self.jobs = Jobs(lambda: fake_model(script))
        self.jobs.thread.start(); self.jobs.loaded.result()
        self.worker = Worker(Settings(model='x.gguf', **kw), self.jobs)
        self.app = RequestMiddleware(make_app(self.worker), self.worker.settings)

    def request(self, method, path, **kw):
        async def go():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app, raise_app_exceptions=True), base_url='http://x') as c:
                return await c.request(method, path, **kw)
        return asyncio.run(go())

    def post(self, path, body): return self.request('POST', path, content=body, headers={'Content-Type': 'application/json'})


@pytest.fixture(scope='module')
def app():
    a = InProcess()
    yield a
    a.jobs.stop()


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=4), max_leaves=8)
FIELDS = 'prompt messages max_tokens temperature top_k top_p min_p repetition_penalty stop seed stream'.split()


def is_int(x): return isinstance(x, int) and not isinstance(x, bool)
def is_num(x): return isinstance(x, (int, float)) and not isinstance(x, bool)
def whole(s): return isinstance(s, str) and not any(0xd800 <= ord(c) <= 0xdfff for c in s)

# the table of the contract: field -> is this value allowed?
ALLOWED = dict(
    job_id=lambda v: whole(v) and 1 <= len(v) <= 256,
    prompt=lambda v: whole(v) and 1 <= len(v) <= 32768,
    messages=lambda v: isinstance(v, list) and v
    and all(isinstance(m, dict) and whole(m.get('role')) and m['role'] and whole(m.get('content')) for m in v)
        and any(m['content'] for m in v),
    max_tokens=lambda v: is_int(v) and 1 <= v <= 2048, temperature=lambda v: is_num(v) and 0 <= v <= 2,
    top_k=lambda v: is_int(v) and v >= 0,
    top_p=lambda v: is_num(v) and 0 <= v <= 1, min_p=lambda v: is_num(v) and 0 <= v <= 1, repetition_penalty=lambda v: is_num(v)
    and 0 < v <= 2,
    seed=lambda v: is_int(v) and 0 <= v < 2**64,
    stop=lambda v: (whole(v) and 0 < len(v.encode()) <= 32)
    or (isinstance(v, list) and len(v) <= 4 and all(whole(s) and 0 < len(s.encode()) <= 32 for s in v)))


def allowed(d):
    d = {k: v for k, v in d.items() if v is not None}
    return 'job_id' in d and ('prompt' in d) != ('messages' in d) and all(ok(d[k]) for k, ok in ALLOWED.items() if k in d)


def finite(x):
    if isinstance(x, float): return math.isfinite(x)
    if isinstance(x, list): return all(map(finite, x))
    if isinstance(x, dict): return all(map(finite, x.values()))
    return not is_int(x) or len(str(x)) <= protocol.MAX_DIGITS


@quick
@given(st.fixed_dictionaries(dict(job_id=st.just('j') | json_values), optional=dict.fromkeys(FIELDS, json_values)))
def test_anything_in_any_field(app, d):
    r = app.post('/execute', json.dumps(d))
    if finite(d) and allowed(d): assert r.status_code == 200, (d, r.text)
    else:
        assert r.status_code == 400, (d, r.text)
        body = r.json()
        assert body['code'] == 'INVALID_REQUEST' and body['retriable'] is False and uuid.UUID(body['correlation_id'])
        assert all(set(e) <= {'field', 'constraint', 'message', 'value'} and isinstance(e.get('value', ''), str)
            for e in body.get('errors', []))
        assert not any('value' in e for e in body.get('errors', []) if e['field'] in ('prompt', 'messages', 'stop'))


good = dict(
    prompt=st.text(min_size=1, max_size=20), max_tokens=st.integers(1, 2048), temperature=st.floats(0, 2) | st.integers(0, 2),
    top_k=st.integers(0, 10**30),
    top_p=st.floats(0, 1), min_p=st.floats(0, 1), repetition_penalty=st.floats(0, 2, exclude_min=True), seed=st.integers(0, 2**64 - 1),
    stop=st.lists(st.text('abc', min_size=1, max_size=9), max_size=4) | st.text('abc', min_size=1, max_size=9))


@quick
@given(st.fixed_dictionaries({'prompt': good['prompt']}, optional={k: v | st.none() for k, v in good.items() if k != 'prompt'}))
def test_everything_allowed_runs(app, d):
    r = app.post('/execute', json.dumps(dict(job_id='j') | d))
    assert r.status_code == 200, r.text
    events = list(read_events(r.content.splitlines()))
    assert [e['type'] for e in events][0::len(events) - 1] == ['started', 'end']
    if d.get('seed') is not None: assert events[0]['seed'] == d['seed']


@quick
@given(st.binary(max_size=200) | st.text(string.punctuation + 'abN0123456789eE+-. \n', max_size=40).map(str.encode))
def test_any_bytes(app, body):
    for path in '/execute', '/cancel':
        r = app.post(path, body)
        assert r.status_code == 400 and r.json()['code'] == 'INVALID_REQUEST'


@quick
@given(json_values)
def test_parser_agrees_with_pythons(x):
    "What is accepted is what `json` reads"
    s = json.dumps({'a': x})
    if finite(x): assert parse_json(s.encode()) == json.loads(s)
    else:
        with pytest.raises(ApiError): parse_json(s.encode())


@quick
@given(st.text(st.characters(exclude_categories=['Cs'])))
def test_frames_survive_every_character(t):
    f = token_frame(t, 7)
    assert f == frame('token', t=t, i=7) and len(f.decode().splitlines()) == 3
    assert json.loads(f.decode().splitlines()[1][6:]) == dict(type='token', t=t, i=7)


def test_nesting_is_counted_outside_of_strings():
    assert parse_json(b'{"a":"' + b'[' * 1000 + b'\\"' + b'{' * 1000 + b'"}')
    assert parse_json(b'{"a":' + b'[' * 31 + b']' * 31 + b'}')
    with pytest.raises(ApiError, match='brackets'): parse_json(b'{"a":' + b'[' * 32 + b']' * 32 + b'}')


# --- one table, and everything that is made of it

CONTRACT = dict(INVALID_REQUEST=(400, False), MODEL_LOAD_FAILED=(500, False), INSUFFICIENT_VRAM=(503, False),
    VRAM_OOM=(500, False), CUDA_ERROR=(500, True), INFERENCE_TIMEOUT=(504, True), CANCELLED=(499, False),
    INTERNAL=(500, True), WORKER_BUSY=(503, True), SHUTTING_DOWN=(503, True))


def test_codes():
    "The contract's table, written here a second time; an error is what its code says unless it lasts"
    assert CODES == CONTRACT
    for code, (status, retriable) in CONTRACT.items():
        e, lasting = ApiError(code, 'x'), ApiError(code, 'x', lasting=True)
        assert (e.status, e.retriable, lasting.retriable) == (status, retriable, False)
        assert e.fields == dict(code=code, message='x', retriable=retriable) and ApiError(code, 'x', status=418).status == 418


def execute_of(app):
    "The two bodies of /execute in the worker's OpenAPI document"
    body = app.request('GET', '/openapi.json').json()['paths']['/execute']['post']['requestBody']
    return body['content']['application/json']['schema']['oneOf']


def test_every_field_is_in_every_place(app):
    "Validation, the OpenAPI document, the chapter, the arguments of `generate`"
    assert set(protocol.FIELDS) == set(ALLOWED)
    answer = app.post('/execute', json.dumps({f: {} for f in protocol.FIELDS})).json()
    assert {e['field'] for e in answer['errors']} == set(protocol.FIELDS), 'an object is wrong for each'
    assert all(set(b['properties']) == set(protocol.FIELDS) for b in execute_of(app))
    parameters, optional = inspect.signature(Model.generate).parameters, set(protocol.FIELDS) - {'job_id', 'prompt', 'messages'}
    assert {f: parameters[f].default for f in optional} == {f: protocol.FIELDS[f].default for f in optional}
    shown = [o for c in json.loads(CHAPTER.read_text())['cells'] for o in c.get('outputs', [])]
    outputs = [''.join(o.get('data', {}).get('text/markdown', '')) for o in shown]
    assert protocol.as_markdown() in outputs, 'the table that the chapter shows is an old one'


def test_what_execute_does_not_have_is_ignored_there():
    "Other dialects have them; here clients may send anything"
    wrong = dict.fromkeys(['frequency_penalty', 'presence_penalty', 'logit_bias', 'top_logprobs'], 'x')
    right = dict(frequency_penalty=1, presence_penalty=1, logit_bias={'65': 100}, top_logprobs=3)
    for more in wrong, right: assert parse_request(dict(job_id='1', prompt='a', **more)) == parse_request(dict(job_id='1', prompt='a'))
    assert not set(wrong) & set(protocol.FIELDS)


ONE = dict(role='user', content='a')
NEAR = [0, 1, -1, 2, 2048, 2049, 0.0, 2.0, 2.1, 1e-9, -1e-9, 2**64 - 1, 2**64, 10**30, None, True, {},
    *['x' * n for n in (0, 1, 256, 257, 4096, 4097, 32768, 32769)], [], ['a'] * 4, ['a'] * 5, [''], ['x' * 4097],
    [ONE], [ONE] * 1024, [ONE] * 1025, [ONE | dict(role='stranger')], [dict(role='user')],
    [ONE | dict(content=[dict(type='text', text='a')])]]


@pytest.mark.parametrize('field', ALLOWED)
def test_the_document_says_what_is_checked(field):
    "A validator of JSON Schema and ours agree on values around every limit. It takes 1.0 for an integer, which we do not."
    jsonschema = pytest.importorskip('jsonschema')
    with_prompt, with_messages = (s['properties'] for s in protocol.execute_schema()['oneOf'])
    schema = (with_messages if field == 'messages' else with_prompt)[field]
    for v in NEAR:
        if isinstance(v, float) and v.is_integer() and 'integer' in schema.get('type', ()) or v is None: continue
        d = dict(job_id='1', prompt='a') | {field: v}
        if field == 'messages': del d['prompt']
        try: parse_request(d); ok = True
        except ApiError as e: ok = field not in {x['field'] for x in e.errors}
        assert ok == jsonschema.Draft202012Validator(schema).is_valid(v), (v, schema)


def test_a_worker_that_takes_fewer_tokens():
    "says so in its document, and goes by it"
    a = InProcess(max_tokens_out=100)
    schema = execute_of(a)[0]['properties']['max_tokens']
    assert (schema['maximum'], schema['default']) == (100, 100)
    answer = a.post('/execute', json.dumps(dict(job_id='1', prompt='a', max_tokens=101))).json()
    assert answer['errors'][0]['constraint'] == 'range(1..=100)'
    a.jobs.stop()


def filled(head, unit, tail):
    "size -> a body of about that size, in which `unit` is repeated"
    return lambda n: head + unit * ((n - len(head) - len(tail)) // len(unit)) + tail

BODIES = dict(
    quotes_escaped=filled(b'{"a":"', b'\\"', b''), quotes_escaped_closed=filled(b'{"a":"', b'\\"', b'"}'),
    backslashes=filled(b'{"a":"', b'\\', b''), quotes=filled(b'', b'"', b''),
    strings=filled(b'{"a":[', b'"",', b'""]}'), strings_of_brackets=filled(b'{"a":[', b'"[",', b'""]}'),
    half_strings=filled(b'{"a":', b'"[', b''), text=filled(b'{"a":"', b'x', b'"}'),
    escapes=filled(b'{"a":"', b'\\u00e9', b'"}'), pairs=filled(b'{"a":"', b'\\ud83d\\ude00', b'"}'),
    utf8=filled(b'{"a":"', 'é'.encode(), b'"}'), spaces=filled(b'{"a":1', b' ', b'}'),
    lines=filled(b'{"a":1', b'\n', b'!'), integers=filled(b'{"a":[', b'1,', b'1]}'), floats=filled(b'{"a":[', b'1e0,', b'1]}'),
    digits=filled(b'{"a":', b'1', b'}'), fraction=filled(b'{"a":0.', b'1', b'}'),
    zeros=filled(b'{"a":0.', b'0', b'1}'), exponent=filled(b'{"a":1e', b'0', b'}'), nulls=filled(b'{"a":[', b'null,', b'1]}'),
    open=filled(b'', b'[', b''), closed=filled(b'', b']', b''),
    lists=filled(b'{"a":[', b'[],', b'[]]}'), objects=filled(b'{"a":[', b'{},', b'{}]}'),
    keys=lambda n: b'{' + b','.join(b'"%07x":0' % i for i in range(n // 12)) + b'}',
    same_key=filled(b'{', b'"a":0,', b'"a":0}'), deep=filled(b'', b'{"a":', b''), junk=filled(b'', b'x', b''),
    not_utf8=filled(b'"', b'\xff', b'"'))


def ask(body):
    "Everything that a body passes before the model is asked"
    try: return parse_request(parse_json(body))
    except ApiError: return None


@pytest.mark.parametrize('name', BODIES)
def test_time_is_linear_in_the_body(name):
    doubling(lambda n: functools.partial(ask, BODIES[name](n)), protocol.MAX_BODY)


@pytest.mark.parametrize('name', ['keys', 'same_key', 'lists', 'objects'])
def test_time_is_linear_in_what_is_counted(name):
    "The largest bodies of these are refused before they are parsed; this is as much as is parsed"
    doubling(lambda n: functools.partial(ask, BODIES[name](n)), 3 * protocol.MAX_PARTS - 100)


@pytest.mark.parametrize('name', BODIES)
def test_values_of_any_size_are_reported_cheaply(name):
    "A wrong value is quoted in the answer, a little of it"
    body = BODIES[name](protocol.MAX_BODY - 30)
    try: value = parse_json(body)
    except ApiError as e: assert len(e.message) < 300
    else:
        for x in value, value.get('a'):
            with pytest.raises(ApiError) as e: parse_request(dict(job_id=x, prompt='a', top_k='1', seed=x, stop=x))
            assert len(to_json(e.value.errors)) < 2000


def test_headers_take_linear_time():
    "What the parser of HTTP and ours do with a header of the largest size"
    import h11
    heads = dict(many=b'A: b\r\n', spaces=b'A: a' + b' ' * 60 + b'\x00\r\n', folded=b'A: b\r\n' + b' a\r\n' * 12,
        lengths=b'Content-Length: 1\r\n', tokens=b'Connection: ' + b'a,' * 30 + b'a\r\n')
    def read(data):
        c = h11.Connection(h11.SERVER, 1 << 20)
        c.receive_data(data)
        try: c.next_event()
        except h11.RemoteProtocolError: pass
    for unit in heads.values():
        doubling(lambda n: functools.partial(read, b'GET / HTTP/1.1\r\nHost: x\r\n' + unit * (n // len(unit)) + b'\r\n'), 1 << 15)
    for text in '9', '-', ' ', 'T', '2023-11-14T22:13:21.', 'a-':
        for f in protocol.remaining_ms, protocol.correlation_id, protocol.is_uuid:
            doubling(lambda n: functools.partial(f, text * (n // len(text))), 1 << 15)


def test_stop_strings_are_measured_in_tokens():
    with pytest.raises(ApiError) as e: parse_request(dict(job_id='1', prompt='a', stop=['x' * 33]), tokens=len)
    assert e.value.errors[0]['constraint'] == 'tokens(1..=32)'
    assert parse_request(dict(job_id='1', prompt='a', stop='x' * 32), tokens=len).stop == ('x' * 32,)


def test_a_prompt_is_tokenised_once(monkeypatch):
    """By the thread that checks the request; the engine's thread, for which everybody waits, gets ids. Messages are read as a reply all
    the same."""
    from fake_engine import FakeTokenizer
    seen = []
    def noted(name, f): return lambda self, *a, **k: [seen.append((name, threading.current_thread().name)), f(self, *a, **k)][1]
    for name in 'encode', 'encode_chat', 'parse_reply', 'stream':
        monkeypatch.setattr(FakeTokenizer, name, noted(name, getattr(FakeTokenizer, name)))
    a = InProcess()
    for body, name, reader in (dict(prompt='rain'), 'encode', 'stream'), (dict(messages=[dict(role='user', content='rain')]),
            'encode_chat', 'parse_reply'):
        seen.clear()
        assert a.post('/execute', json.dumps(dict(job_id='j') | body)).status_code == 200
        assert seen == [(name, 'orcd-work'), (reader, 'orcd-engine')]
    engine = a.jobs.model.engine
    assert engine.prompts == [list(b'rain'), FakeTokenizer().encode_chat([dict(role='user', content='rain')])]
    a.jobs.stop()


@pytest.mark.parametrize('method, path',
    [('GET', '/health'), ('POST', '/shutdown'), ('POST', '/cancel/x'), ('GET', '/nowhere'), ('POST', '/execute')])
def test_every_answer_has_a_correlation_id(method, path):
    a, cid = InProcess(), str(uuid.uuid4())
    assert a.request(method, path, headers={'X-Correlation-ID': cid}).headers['x-correlation-id'] == cid
    a.jobs.stop()


@pytest.mark.parametrize('mode', ['positive', 'negative'])
def test_schemathesis(mode):
    "Requests made from the OpenAPI document, valid and invalid ones: never a 5xx, answers as documented"
    import schemathesis
    from hypothesis import HealthCheck, Phase
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode
    from schemathesis.checks import CHECKS, load_all_checks
    load_all_checks()
    checks = CHECKS.get_by_names(['not_a_server_error', 'status_code_conformance', 'content_type_conformance',
        'response_schema_conformance'])
    a, seen = InProcess(), set()
    schema = schemathesis.openapi.from_asgi('/openapi.json', a.app).exclude(path='/shutdown')
    for result in schema.get_all_operations():
        operation = result.ok()
        @given(operation.as_strategy(generation_mode=GenerationMode(mode)))
        @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        def one(case):
            response = case.call()
            seen.add((operation.label, response.status_code))
            case.validate_response(response, checks=checks)
        try: one()
        except Unsatisfiable:     # nothing about these can be invalid
            assert operation.label in ('GET /health', 'GET /metrics', 'POST /cancel/{job_id}', 'GET /v1/models', 'GET /v1/models/{id}')
    a.jobs.stop()
    assert ('POST /execute', 200 if mode == 'positive' else 400) in seen


def mostly_linear(n):
    "Of 512 four fifths are quadratic, of 128 half, of 32 a fifth"
    for _ in range(n * 128): pass
    for _ in range(n * n): pass


def test_doubling_sees_what_is_not_linear():
    "The test's own test: an expression that begins anew at every quote"
    import re
    old = re.compile(r'"(?:[^"\\]|\\.)*"', re.S)
    for make, n in ((lambda n: functools.partial(old.sub, '', '"a' + '\\"' * (n // 2)), 1 << 12),
                    (lambda n: functools.partial(lambda: [0 for _ in range(n) for _ in range(n)]), 512),
                    (lambda n: functools.partial(mostly_linear, n), 512)):
        with pytest.raises(AssertionError, match='times as long'): doubling(make, n, tries=3)
    doubling(lambda n: functools.partial(lambda: sum(range(n))), 1 << 14)
