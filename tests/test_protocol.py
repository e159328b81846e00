"Bodies of every kind against the rules of the contract, written here a second time"
import asyncio, json, math, string, uuid
import httpx, pytest
from hypothesis import given, settings, strategies as st
from fake_engine import EOS, fake_model, say
from orcd import protocol
from orcd.jobs import Jobs
from orcd.protocol import Problem, frame, parse_json, parse_request, read_events, to_json, token_frame
from orcd.worker import Edge, Settings, Worker, make_app
from worker_tools import quiet_logs


@pytest.fixture(scope='module', autouse=True)
def quiet():
    with quiet_logs(): yield

quick = settings(max_examples=150, deadline=None)


class InProcess:
    "The whole application without sockets, around a scripted engine"
    def __init__(self, script=say('hi') + [EOS], **kw):
        self.jobs = Jobs(lambda: fake_model(script))
        self.jobs.thread.start(); self.jobs.loaded.result()
        self.worker = Worker(Settings(model='x.gguf', **kw), self.jobs)
        self.app = Edge(make_app(self.worker), self.worker.settings)

    def request(self, method, path, **kw):
        async def go():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app, raise_app_exceptions=True), base_url='http://x') as c: return await c.request(method, path, **kw)
        return asyncio.run(go())

    def post(self, path, body): return self.request('POST', path, content=body, headers={'Content-Type': 'application/json'})


@pytest.fixture(scope='module')
def app():
    a = InProcess()
    yield a
    a.jobs.stop()


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=4), max_leaves=8)
FIELDS = 'prompt messages max_tokens temperature top_k top_p min_p repetition_penalty stop seed stream'.split()


def is_int(x): return isinstance(x, int) and not isinstance(x, bool)
def is_num(x): return isinstance(x, (int, float)) and not isinstance(x, bool)
def whole(s): return isinstance(s, str) and not any(0xd800 <= ord(c) <= 0xdfff for c in s)

# the table of the contract: field -> is this value allowed?
ALLOWED = dict(
    job_id=lambda v: whole(v) and 1 <= len(v) <= 256,
    prompt=lambda v: whole(v) and 1 <= len(v) <= 32768,
    messages=lambda v: isinstance(v, list) and v and all(isinstance(m, dict) and whole(m.get('role')) and m['role'] and whole(m.get('content')) for m in v)
        and any(m['content'] for m in v),
    max_tokens=lambda v: is_int(v) and 1 <= v <= 2048, temperature=lambda v: is_num(v) and 0 <= v <= 2, top_k=lambda v: is_int(v) and v >= 0,
    top_p=lambda v: is_num(v) and 0 <= v <= 1, min_p=lambda v: is_num(v) and 0 <= v <= 1, repetition_penalty=lambda v: is_num(v) and 0 < v <= 2,
    seed=lambda v: is_int(v) and 0 <= v < 2**64,
    stop=lambda v: (whole(v) and 0 < len(v.encode()) <= 32) or (isinstance(v, list) and len(v) <= 4 and all(whole(s) and 0 < len(s.encode()) <= 32 for s in v)))


def allowed(d):
    d = {k: v for k, v in d.items() if v is not None}
    return 'job_id' in d and ('prompt' in d) != ('messages' in d) and all(ok(d[k]) for k, ok in ALLOWED.items() if k in d)


def finite(x):
    if isinstance(x, float): return math.isfinite(x)
    if isinstance(x, list): return all(map(finite, x))
    if isinstance(x, dict): return all(map(finite, x.values()))
    return not is_int(x) or len(str(x)) <= protocol.MAX_DIGITS


@quick
@given(st.fixed_dictionaries(dict(job_id=st.just('j') | json_values), optional={f: json_values for f in FIELDS}))
def test_anything_in_any_field(app, d):
    r = app.post('/execute', json.dumps(d))
    if finite(d) and allowed(d): assert r.status_code == 200, (d, r.text)
    else:
        assert r.status_code == 400, (d, r.text)
        body = r.json()
        assert body['code'] == 'INVALID_REQUEST' and body['retriable'] is False and uuid.UUID(body['correlation_id'])
        assert all(set(e) <= {'field', 'constraint', 'message', 'value'} and isinstance(e.get('value', ''), str) for e in body.get('errors', []))
        assert not any('value' in e for e in body.get('errors', []) if e['field'] in ('prompt', 'messages', 'stop'))


good = dict(
    prompt=st.text(min_size=1, max_size=20), max_tokens=st.integers(1, 2048), temperature=st.floats(0, 2) | st.integers(0, 2), top_k=st.integers(0, 10**30),
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
        with pytest.raises(Problem): parse_json(s.encode())


@quick
@given(st.text(st.characters(exclude_categories=['Cs'])))
def test_frames_survive_every_character(t):
    f = token_frame(t, 7)
    assert f == frame('token', t=t, i=7) and len(f.decode().splitlines()) == 3
    assert json.loads(f.decode().splitlines()[1][6:]) == dict(type='token', t=t, i=7)


def test_nesting_is_counted_outside_of_strings():
    assert parse_json(b'{"a":"' + b'[' * 1000 + b'\\"' + b'{' * 1000 + b'"}')
    assert parse_json(b'{"a":' + b'[' * 31 + b']' * 31 + b'}')
    with pytest.raises(Problem, match='brackets'): parse_json(b'{"a":' + b'[' * 32 + b']' * 32 + b'}')


def test_hostile_bodies_are_cheap():
    import time
    for body in b'[' * (1 << 20), b'{"a":' * 200_000, b'"' * (1 << 20), b'{"a":"' + b'\\' * (1 << 20), b'9' * (1 << 20), b'{"a":' + b'1' * (1 << 20) + b'}':
        began = time.process_time()
        with pytest.raises(Problem): parse_json(body)
        assert time.process_time() - began < 1


def test_stop_strings_are_measured_in_tokens():
    with pytest.raises(Problem) as e: parse_request(dict(job_id='1', prompt='a', stop=['x' * 33]), tokens=len)
    assert e.value.errors[0]['constraint'] == 'tokens(1..=32)'
    assert parse_request(dict(job_id='1', prompt='a', stop='x' * 32), tokens=len).stop == ('x' * 32,)


@pytest.mark.parametrize('method, path', [('GET', '/health'), ('POST', '/shutdown'), ('POST', '/cancel/x'), ('GET', '/nowhere'), ('POST', '/execute')])
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
    checks = CHECKS.get_by_names(['not_a_server_error', 'status_code_conformance', 'content_type_conformance', 'response_schema_conformance'])
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
        except Unsatisfiable: assert operation.label in ('GET /health', 'POST /cancel/{job_id}')     # nothing about these can be invalid
    a.jobs.stop()
    assert ('POST /execute', 200 if mode == 'positive' else 400) in seen
