"The contract, against a real worker process around a scripted model"
import contextlib, json, re, socket, struct, threading, time, uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
import pytest
from worker_tools import PATIENCE, worker


@pytest.fixture(scope='module')
def w():
    with worker() as p: yield p


def test_start_order(w):
    names = [e['event'] for e in w.log if e['event'] not in ('uvicorn', 'request')]
    progress = ['model_load_progress'] * 5
    assert names[:8] == ['startup', 'model_load_start', *progress, 'model_load_complete'] and names[8] == 'ready'
    assert [e['percent'] for e in w.log if e['event'] == 'model_load_progress'] == [0, 25, 50, 75, 100]
    for e in w.log: assert list(e)[:6] == ['timestamp', 'level', 'event', 'worker_id', 'model_ref', 'gpu_device']
    uuid.UUID(w.log[0]['worker_id'])


def test_health(w):
    h = w.health()
    assert h.pop('uptime_seconds') >= 0 and h.pop('worker_id') == w.log[0]['worker_id'] and h.pop('version')
    want = dict(status='healthy', state='ready', model='fake', model_ref='fake.gguf', resident=True, quant_kind='Q4_K_M',
        vram_bytes_used=1234, vram_bytes=1234,
        tokenizer_kind='gguf-bpe', vocab_size=1000, context_length=4096, gpu_device=0, sm=90, cuda_runtime_version='13.0',
        capabilities=['text-gen'], protocol='sse')
    assert want.items() <= h.items()


def test_stream(w):
    cid = str(uuid.uuid4())
    s = w.execute('job-1', prompt='soft half rain', seed=2**64 - 1, headers={'X-Correlation-ID': cid, 'X-Deadline': '99999999999999'})
    h = s.r.headers
    assert (h['Content-Type'], h['Cache-Control'], h['X-Accel-Buffering'],
        h['X-Correlation-ID']) == ('text/event-stream', 'no-cache', 'no', cid)
    assert 'Server' not in h
    started, *tokens, end = s.all()
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ', started.pop('started_at'))
    assert started == dict(type='started', job_id='job-1', model='fake', seed=2**64 - 1, correlation_id=cid)
    # the token without text is no event, but counts
    assert tokens == [dict(type='token', t='soft ', i=0), dict(type='token', t='rain ', i=1)]
    assert (end['tokens_out'], end['stop_reason'], sorted(end)) == (3, 'EOS', ['decode_time_ms', 'stop_reason', 'tokens_out', 'type'])
    line = w.event('execute_end', job_id='job-1')
    assert line['correlation_id'] == cid and w.event('execute_start', job_id='job-1')['correlation_id'] == cid
    assert w.event('deadline', job_id='job-1')['remaining_ms'] > 0
    assert not any('soft' in l for l in w.raw)


def test_messages_and_random_seed(w):
    events = w.execute(messages=[dict(role='user', content='seed seed')], stream=True, model='x', temperature=None).all()
    assert [e['t'] for e in events[1:-1]] == [str(events[0]['seed'])] * 2


def test_contents_in_parts(w):
    parts = [dict(type='text', text='a b'), dict(type='text', text=' c')]
    assert [e['t'] for e in w.execute(messages=[dict(role='user', content=parts)]).all()[1:-1]] == ['a ', 'b ', 'c ']
    for content in [dict(type='image_url',
            image_url='x')], [dict(type='text')], [dict(text='a')], ['a'], [], [dict(type='text',
            text='')], None, 7, [dict(type='text', text='x' * 20_000)] * 2:
        status, _, body = w.post('/execute', dict(job_id='1', messages=[dict(role='user', content=content)]))
        assert status == 400 and [e['field'] for e in body['errors']] == ['messages'] and 'value' not in body['errors'][0], content
    assert w.post('/execute', dict(job_id='1', messages=[dict(role='user', content='a')] * 1025))[0] == 400


def test_max_tokens(w):
    assert w.execute(prompt='a b c d',
        max_tokens=2).all()[-1] | dict(decode_time_ms=0) == dict(type='end', tokens_out=2, stop_reason='MAX_TOKENS', decode_time_ms=0)


def test_the_first_token_does_not_wait():
    "However seldom a stream is written to"
    with worker(pace_s=600) as w:
        frames = w.execute(prompt='hang:0.2 tokens:5@0.1').frames()
        assert [next(frames)['type'], next(frames)['type']] == ['started', 'token']


def test_tokens_come_as_they_are_made(w):
    "The first ones are read while the job, which would take 200 s, still runs"
    s = w.execute('live', prompt='tokens:2000@0.1')
    assert [s.next()['type'] for _ in range(4)] == ['started', 'token', 'token', 'token'] and w.health()['state'] == 'busy'
    w.post('/cancel/live')
    assert list(s.frames())[-1]['code'] == 'CANCELLED'


def test_correlation_id_replaced(w):
    s = w.execute(prompt='a', headers={'X-Correlation-ID': 'evil\tthing'})
    assert uuid.UUID(s.r.headers['X-Correlation-ID']) and s.all()[0]['correlation_id'] == s.r.headers['X-Correlation-ID']
    for path in '/health', '/nowhere': assert uuid.UUID(w.request('GET', path)[1]['X-Correlation-ID'])


def test_every_rule_is_reported(w):
    status, _, body = w.post('/execute',
        dict(job_id='', prompt='', max_tokens=4096, temperature=-1, top_k=1.5, top_p='x', min_p=True, repetition_penalty=0, seed=-1,
        stop=['', 'a']))
    assert status == 400 and body['code'] == 'INVALID_REQUEST' and body['retriable'] is False and uuid.UUID(body['correlation_id'])
    fields = {e['field']: e for e in body['errors']}
    assert set(fields) == {'job_id', 'prompt', 'max_tokens', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'seed', 'stop'}
    assert fields['max_tokens']['constraint'] == 'range(1..=2048)' and fields['max_tokens']['value'] == '4096'
    assert (all(isinstance(e.get('value', ''), str) for e in body['errors']) and 'value' not in fields['prompt']
        and 'value' not in fields['stop'])


@pytest.mark.parametrize('body, status',
    [(b'{', 400), (b'[]', 400), (b'{"a":NaN}', 400), (b'\xff\xfe', 400), (b'{"job_id":"1","job_id":"1"}', 400), (b'[' * 100_000, 400),
    (b'{"prompt":"' + b'x' * (1 << 20) + b'"}', 413)])
def test_bad_bodies(w, body, status):
    for path in '/execute', '/cancel':
        got, _, answer = w.post(path, body)
        assert got == status and answer['code'] == 'INVALID_REQUEST' and set(answer) >= {'message', 'retriable', 'correlation_id'}


@pytest.mark.parametrize('kind', ['text/plain', 'application/x-www-form-urlencoded', 'application/jsonx', ''])
def test_content_type(w, kind): assert w.post('/execute', dict(job_id='1', prompt='a'), headers={'Content-Type': kind})[0] == 415


def test_charset_is_fine(w):
    s = w.execute(prompt='a', headers={'Content-Type': 'application/json; charset=utf-8'})
    assert s.all()[-1]['stop_reason'] == 'EOS'


def test_prompt_over_the_context(w):
    status, _, body = w.post('/execute', dict(job_id='1', prompt='a ' * 5000))
    assert status == 400 and body['errors'][0]['field'] == 'prompt' and 'value' not in body['errors'][0]


def test_unknown_routes(w):
    for method, path, status in [('GET', '/', 404), ('GET', '/execute', 405), ('PUT', '/health', 405), ('POST', '/load', 404),
            ('GET', '/docs', 404)]:
        got, _, body = w.request(method, path)
        assert got == status and body['code'] == 'INVALID_REQUEST'


def test_busy_conflict_and_cancel(w):
    s = w.execute('long', prompt='tokens:2000@0.1')
    assert s.next()['type'] == 'started' and w.health()['state'] == 'busy'
    status, headers, body = w.post('/execute', dict(job_id='other', prompt='a'))
    assert (status, headers['Retry-After'], body['code'], body['retriable']) == (503, '1', 'WORKER_BUSY', True)
    assert w.post('/execute', dict(job_id='long', prompt='a'))[0] == 409
    # a bad request is told so, busy or not
    assert w.post('/execute', dict(job_id='long', prompt='a', top_p=2))[0] == 400
    assert w.post('/cancel/long')[2] == dict(job_id='long', status='cancelling')
    last = list(s.frames())[-1]
    assert (last['type'], last['code'], last['retriable']) == ('error', 'CANCELLED', False)
    assert w.execute('long', prompt='a').all()[-1]['type'] == 'end'                                   # a finished id may be used again


def test_cancel_any_number_of_times(w):
    for path, body in [('/cancel', dict(job_id='ghost')), ('/cancel/ghost', None), ('/cancel', dict(job_id='ghost', x=1))]:
        status, _, answer = w.post(path, body)
        assert (status, answer) == (202, dict(job_id='ghost', status='not_active'))
    assert w.post('/cancel', {})[0] == 400 and w.post('/cancel', dict(job_id=7))[0] == 400
    assert w.post('/cancel/a%2Fb%20%C3%BC')[2]['job_id'] == 'a/b ü'


def test_next_job_right_after_the_last(w):
    for i in range(50): assert w.execute('again', prompt='a b').all()[-1]['type'] == 'end'


@pytest.mark.parametrize('word, code, retriable', [('oom', 'VRAM_OOM', False), ('cuda', 'CUDA_ERROR', True), ('bug', 'INTERNAL', True)])
def test_errors_in_a_job(w, word, code, retriable):
    events = w.execute('e', prompt=f'a {word} b').all()
    assert (events[-1]['code'], events[-1]['retriable'], len(events)) == (code, retriable, 3) and 'secret' not in events[-1]['message']
    assert w.health()['status'] == ('unhealthy' if word == 'oom' else 'healthy') and w.health()['state'] == 'ready'
    assert w.execute('e', prompt='fine').all()[-1]['type'] == 'end' and w.health()['status'] == 'healthy'
    assert w.event('error', job_id='e', code=code)['level'] == 'error'


def test_pages_of_the_web_are_refused(w):
    for origin in 'https://example.org', 'null', f'http://{w.address}':
        for method, path in ('POST', '/shutdown'), ('POST',
                '/execute'), ('GET', '/health'), ('GET', '/openapi.json'), ('OPTIONS', '/execute'), ('HEAD', '/health'):
            assert w.request(method, path, headers={'Origin': origin})[0] == 403


def test_a_name_that_points_here_does_not_make_a_page_ours(w):
    """A page may let its own name point to 127.0.0.1 and read what it finds there; an address, localhost and this machine's names are no
    page's"""
    for host in 'evil.example.org', 'evil.example.org:80', f'localhost.evil.org:{w.port}', f'127.0.0.1.evil.org:{w.port}', 'evil.org.':
        for method, path in ('GET', '/health'), ('GET', '/openapi.json'), ('POST', '/execute'), ('POST', '/shutdown'), ('GET', '/nowhere'):
            status, _, body = w.request(method, path, headers={'Host': host})
            assert status == 403 and 'fake' not in str(body) and '--token-file' in body['message']
    for host in (w.address, 'localhost', f'LocalHost:{w.port}', f'[::1]:{w.port}', '192.0.2.7', socket.gethostname(), 'orcd:8080',
            'a.localhost'):
        assert w.request('GET', '/health', headers={'Host': host})[0] == 200
    c = w.connect()
    c.sendall(b'GET /health HTTP/1.0\r\n\r\n')                          # older than the header
    assert b' 200 ' in c.recv(1000)


def test_any_name_where_names_decide_nothing():
    "With a token, and on a network: a service has names that the worker cannot know"
    host = {'Host': 'orcd.models.svc.cluster.local'}
    with worker(token='s3cret') as w:
        assert w.request('GET', '/health', headers=host)[0] == 200 and w.post('/cancel/x', headers=host)[0] == 401
        assert w.post('/cancel/x', headers=host | {'Authorization': 'Bearer s3cret'})[0] == 202
    with worker(host='0.0.0.0', wait=False) as w:
        w.address = f"127.0.0.1:{w.event('ready')['uri'].rsplit(':', 1)[1]}"
        assert w.request('GET', '/health', headers=host)[0] == 200 and w.request('GET', '/health', headers={'Origin': 'http://x'})[0] == 403


def test_no_redirects(w):
    "A slash too many is a 404 with a hint, never an address made of what the client said of itself"
    for method, path in ('GET',
            '/health/'), ('POST', '/execute/'), ('POST', '/shutdown/'), ('GET', '/'), ('GET', '//health'), ('GET', '/openapi.json/'):
        status, headers, body = w.request(method, path, headers={'X-Forwarded-Proto': 'https', 'X-Forwarded-Host': 'example.org'})
        assert (status == 404 and 'Location' not in headers and body['code'] == 'INVALID_REQUEST' and 'slash' in body['message']
            or path == '//health' and status == 404)
    for path in '/cancel/', '/cancel/' + 'x' * 257: assert w.post(path)[0] == 400
    assert w.post('/cancel/a/')[2]['job_id'] == 'a/'


def test_head(w):
    "What GET says of itself, without the body"
    (_, get, body), (status, head, nothing) = w.request('GET', '/health'), w.request('HEAD', '/health')
    assert (status == 200 and nothing == b'' and {k: v for k, v in head.items() if k.lower() != 'x-correlation-id'}
        == {k: v for k, v in get.items() if k.lower() != 'x-correlation-id'})
    assert int(head['Content-Length']) == len(json.dumps(body, separators=(',', ':')))
    assert w.request('HEAD', '/execute')[0] == 405 and w.request('HEAD', '/nowhere')[0] == 404


def test_openapi(w):
    doc = w.request('GET', '/openapi.json')[2]
    own = {'/execute', '/cancel', '/cancel/{job_id}', '/health', '/metrics', '/shutdown'}
    openai = {'/v1/chat/completions', '/v1/completions', '/v1/models', '/v1/models/{id}', '/tokenize', '/detokenize'}
    assert set(doc['paths']) == own | openai
    schemas = doc['paths']['/execute']['post']['requestBody']['content']['application/json']['schema']['oneOf']
    assert ([set(s['required']) for s in schemas] == [{'job_id', 'prompt'}, {'job_id', 'messages'}]
        and all({'seed', 'stop', 'min_p'} <= set(s['properties']) for s in schemas))


def test_heartbeat_while_nothing_is_sent():
    with worker(heartbeat_s=.1) as w:
        began = time.monotonic()
        s = w.execute('slow', prompt='prefill:200')
        s.next()
        heard = [line for line in (s.r.readline() for _ in range(6)) if line != b'\n']      # as long as it takes
        assert len(heard) == 3 <= (time.monotonic() - began) / .1 and all(line.startswith(b':') for line in heard)
        w.post('/cancel/slow')
        assert list(s.frames())[-1]['code'] == 'CANCELLED'


def test_timeout():
    with worker(inference_timeout_sec=.2) as w:
        for prompt in 'prefill:200', 'tokens:2000@0.1':
            last = w.execute(prompt=prompt).all()[-1]
            assert (last['code'], last['retriable']) == ('INFERENCE_TIMEOUT', True)


def test_queue():
    with worker(queue_depth=1) as w:
        a, b = w.execute('a', prompt='tokens:30@0.1'), w.execute('b', prompt='x y')
        assert w.post('/execute', dict(job_id='c', prompt='x'))[0] == 503 and w.post('/execute', dict(job_id='b', prompt='x'))[0] == 409
        assert a.all()[-1]['tokens_out'] == 30 and b.all()[-1]['tokens_out'] == 2


def test_a_queued_client_that_leaves_does_not_touch_the_running_job():
    with worker(queue_depth=1) as w:
        a = w.execute('a', prompt='tokens:60@0.05')
        b = w.execute('b', prompt='x')
        b.close()
        c = w.execute_when_free('c', prompt='x y')                             # the slot in the queue is free again
        assert a.all()[-1]['tokens_out'] == 60 and c.all()[-1]['tokens_out'] == 2


def test_cancel_before_start():
    with worker(queue_depth=1) as w:
        a, b = w.execute('a', prompt='tokens:60@0.05'), w.execute('b', prompt='x')
        assert w.post('/cancel/b')[2]['status'] == 'cancelling'
        events = b.all()
        assert [e['type'] for e in events] == ['started', 'error'] and events[-1]['code'] == 'CANCELLED'
        assert a.all()[-1]['tokens_out'] == 60


def test_max_tokens_out_and_in():
    with worker(max_tokens_out=8, max_tokens_in=3) as w:
        assert (w.execute(prompt='tokens:100').all()[-1] | dict(decode_time_ms=0)
            == dict(type='end', tokens_out=8, stop_reason='MAX_TOKENS', decode_time_ms=0))
        assert w.post('/execute', dict(job_id='1', prompt='a', max_tokens=9))[2]['errors'][0]['constraint'] == 'range(1..=8)'
        assert w.post('/execute', dict(job_id='1', prompt='a b c d'))[2]['errors'][0]['constraint'] == 'tokens(1..=3)'


def test_token():
    with worker(token='s3cret') as w:
        assert w.health()['state'] == 'ready'
        for headers in {}, {'Authorization': 'Bearer wrong'}, {'Authorization': 's3cret'}, {'Authorization': 'Bearer s3cret\xe9'}:
            for path in '/execute', '/cancel', '/cancel/x', '/shutdown', '/nowhere':
                status, h, body = w.post(path, dict(job_id='1', prompt='a'), headers=headers)
                assert status == 401 and body['code'] == 'INVALID_REQUEST' and h['WWW-Authenticate'] == 'Bearer'
        for good in 'Bearer s3cret', 'bearer s3cret', 'BEARER  s3cret':
            assert w.execute(prompt='a', headers={'Authorization': good}).all()[-1]['type'] == 'end'
        for bad in 'Bearer', 'Bearer ', 'Bearer s3cre', 'Bearer S3CRET', 'Bearer s3cret x', 'Basic s3cret', 'Bearers3cret':
            assert w.post('/cancel/x', headers={'Authorization': bad})[0] == 401
        c = w.connect()
        c.sendall(b'POST /cancel/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\nAuthorization: Bearer other\r\nContent-Length: '
            b'0\r\n\r\n')
        assert b' 401 ' in c.recv(1000).split(b'\r\n')[0]                  # which one would a proxy have checked?
        assert w.request('HEAD', '/health')[0] == 200 and w.request('GET', '/health/')[0] == 401
        assert not any('s3cret' in l for l in w.raw)


def test_shutdown_route():
    with worker() as w:
        assert w.post('/shutdown')[0] == 202
        assert w.end() == 0 and w.log[-1]['event'] == 'shutdown' and w.p.stdout.read() == b'closed\n'


class Orchestrator(HTTPServer):
    "Answers the callback with the given statuses, one after another"
    def __init__(self, *statuses):
        self.calls, self.statuses = [], list(statuses)
        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}/workers'


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.calls.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.end_headers()
    def log_message(self, *_): pass


def test_callback():
    o = Orchestrator(500, 200)
    with worker(callback_url=o.url, worker_id='w', model_ref='m') as w:
        end = time.monotonic() + PATIENCE
        while len(o.calls) < 2 and time.monotonic() < end: time.sleep(.02)
        assert o.calls[1] == dict(worker_id='w', model_ref='m', vram_bytes=1234, memory_bytes=1234, memory_architecture='vram-only',
            worker_type='bespoke-cuda',
            capabilities=['text-gen'], uri=f'http://{w.address}')
        time.sleep(.3)
        assert len(o.calls) == 2 and w.health()['state'] == 'ready'


def test_callback_that_never_works():
    o = Orchestrator(500, 500, 500, 500)
    with worker(callback_url=o.url) as w:
        assert w.end() == 1 and len(o.calls) == 3 and '--callback-url' in w.event('error')['message'] and w.log[-1]['event'] == 'shutdown'


class Wild:
    "A server on a socket: `talk(connection)` after it read a request"
    def __init__(self, talk):
        self.sock, self.calls, self.talk = socket.create_server(('127.0.0.1', 0)), 0, talk
        self.url = f'http://127.0.0.1:{self.sock.getsockname()[1]}/x'
        threading.Thread(target=self.run, daemon=True).start()
    def run(self):
        while True:
            c, _ = self.sock.accept()
            threading.Thread(target=self.one, args=(c,), daemon=True).start()
    def one(self, c):
        with c, contextlib.suppress(OSError):
            c.recv(65536)
            self.calls += 1
            self.talk(c)


def answer(data): return lambda c: c.sendall(data)
def drip(data):
    def talk(c):
        for b in data: c.sendall(bytes([b])); time.sleep(.2)
    return talk
def endless(c):
    while True: c.sendall(b'HTTP/1.1 100 Continue\r\n\r\n'); time.sleep(.01)

elsewhere = Wild(answer(b'HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n'))
FAULTS = dict(garbage=answer(b'HELLO\r\n\r\n'), nothing=lambda c: None,
    long_line=answer(b'HTTP/1.1 200 OK\r\nX: ' + b'y' * 70_000 + b'\r\n\r\n'),
    many_headers=answer(b'HTTP/1.1 200 OK\r\n' + b'X: y\r\n' * 20_000 + b'\r\n'),
    half=answer(b'HTTP/1.1 200 OK\r\nX'), drip=drip(b'HTTP/1.1 200 OK\r\nX: ' + b'y' * 1000), silent=lambda c: time.sleep(60),
    continues=endless, status_404=answer(b'HTTP/1.1 404 no\r\n\r\n'),
    status_700=answer(b'HTTP/1.1 700 what\r\n\r\n'),
    reset=lambda c: c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)),
    **{f'redirect_{code}': answer(f'HTTP/1.1 {code} go\r\nLocation: {elsewhere.url}\r\nContent-Length: 0\r\n\r\n'.encode())
        for code in (301, 302, 303, 307, 308)})


@pytest.mark.parametrize('name', FAULTS)
def test_callback_to_something_else(name):
    o, before = Wild(FAULTS[name]), elsewhere.calls
    with worker(callback_url=o.url, callback_s=.5) as w:
        assert w.end(60) == 1 and o.calls == 3 and elsewhere.calls == before
        errors = [e for e in w.log if e['level'] == 'error']
        assert (len(errors) == 1 and '--callback-url' in errors[0]['message'] and 'exception' not in errors[0]
            and w.log[-1]['event'] == 'shutdown')


@pytest.mark.parametrize('name, says', [('nothing', 'it closed the connection without a whole answer'),
    ('half', 'it closed the connection without a whole answer'), ('garbage', 'its answer is not HTTP: ')])
def test_callback_errors_in_words(name, says):
    with worker(callback_url=Wild(FAULTS[name]).url) as w: assert w.end(60) == 1 and says in w.event('error')['message']


@pytest.mark.parametrize('url', ['ftp://127.0.0.1/x', 'file:///etc/hostname', 'http://', 'http://127.0.0.1:99999/',
    'http://127.0.0.1:1/a b', 'http://127.0.0.1:1/\n', 'http://user:secret@127.0.0.1:1/',
    'http://\udc80/', 'http://' + 'a' * 300 + '/', 'http://127.0.0.1:1/é'])
def test_callback_urls_that_cannot_be(url):
    "However they came past the command line"
    with worker(callback_url=url) as w:
        assert w.end(60) == 1 and len([e for e in w.log if e['level'] == 'error']) == 1 and 'secret' not in ''.join(w.raw)


def test_callback_over_tls_is_checked():
    "A certificate that nobody vouches for is no answer"
    o = Wild(answer(b'\x15\x03\x03\x00\x02\x02\x28'))
    with worker(callback_url=o.url.replace('http:', 'https:'), callback_s=2) as w: assert w.end(60) == 1 and o.calls == 3


@pytest.mark.parametrize('name', ['silent', 'drip'])
def test_end_during_a_callback(name):
    "Whoever is told to end does not wait for an orchestrator"
    o = Wild(FAULTS[name])
    with worker(callback_url=o.url, callback_s=600) as w:
        while not o.calls: time.sleep(.01)
        w.signal()
        assert w.end(60) == 0 and not any(e['level'] == 'error' for e in w.log)


def test_callback_with_an_endless_answer():
    "The status says it all"
    def talk(c):
        c.sendall(b'HTTP/1.1 204 fine\r\n\r\n')
        while True: c.sendall(b'x' * 65536)
    o = Wild(talk)
    with worker(callback_url=o.url) as w:
        while not o.calls: time.sleep(.01)
        assert w.execute(prompt='a').all()[-1]['type'] == 'end' and o.calls == 1
