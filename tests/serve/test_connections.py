"Many connections, slow ones, dead ones: whoever asks for /health gets an answer"
import asyncio, contextlib, json, os, resource, select, socket, threading, time
import pytest
from orcd.serve import routes, worker as worker_module
from orcd.serve.jobs import Jobs
from orcd.serve.worker import Server, Settings, Worker, bind, drop_silent, make_app, make_room
from fake_engine import EOS, fake_model, say
from worker_tools import PATIENCE, Proc, quiet_logs, worker

HEAD = b'POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n'
SILENT = [b'', b'GET /hea', HEAD, HEAD + b'Content-Length: 100\r\n\r\n{"job', HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"job',
    b'GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n']


def sockets_of(w):
    return sum(os.readlink(f'/proc/{w.p.pid}/fd/{f}').startswith('socket:') for f in os.listdir(f'/proc/{w.p.pid}/fd')
        if os.path.lexists(f'/proc/{w.p.pid}/fd/{f}'))


def everything(c):
    "All that comes until the connection ends"
    out = b''
    with contextlib.suppress(ConnectionError):
        while data := c.recv(65536): out += data
    return out


@pytest.mark.parametrize('data', SILENT, ids=['nothing', 'half a line', 'half a header', 'half a body', 'half a chunk', 'an old answer'])
def test_silent_connections_never_keep_a_probe_out(data):
    with worker(max_connections=20, read_s=60) as w:
        held = []
        for i in range(60):
            held.append(w.connect())
            held[-1].sendall(data)
            assert w.request('GET', '/health')[0] == 200, i
        assert sockets_of(w) < 20 + 16 + 10
        for c in held[:30]:
            c.settimeout(10)
            everything(c)                                           # the oldest were cut
        assert w.execute(prompt='a b').all()[-1]['tokens_out'] == 2
        for c in held: c.close()


def test_all_places_taken_by_work():
    "What needs a body is refused, what a probe or an operator asks is not, and no stream is touched"
    with worker(max_connections=4, queue_depth=50) as w:
        streams = [w.execute(f'j{i}', prompt='tokens:300@0.01' if i == 0 else 'a b') for i in range(4)]
        for _ in range(3):
            status, headers, body = w.post('/execute', dict(job_id='more', prompt='a'))
            assert (status, body['code'], headers['Retry-After']) == (503, 'WORKER_BUSY', '1')
            assert w.request('GET', '/health')[0] == 200
        idle = [w.connect() for _ in range(40)]                    # the spare places too
        assert w.request('GET', '/health')[0] == 200 and w.request('HEAD', '/health')[0] == 200
        assert w.post('/cancel/j3')[2]['status'] == 'cancelling' and list(streams[3].frames())[-1]['code'] == 'CANCELLED'
        assert [s.all()[-1]['tokens_out'] for s in streams[:3]] == [300, 2, 2]
        for c in idle: c.close()


def test_answers_that_nobody_reads_are_no_work():
    "Requests in a row whose answers are not read hold their connection until it is needed, and no longer than `stall_s` allows"
    def deaf(w):
        c = socket.socket()
        c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        c.connect((w.host, w.port))
        c.setblocking(False)
        with contextlib.suppress(BlockingIOError): c.send(b'GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n' * 3000)
        return c
    with worker(max_connections=8, read_s=60, stall_s=60) as w:
        held = [deaf(w) for _ in range(30)]
        time.sleep(.5)
        assert w.request('GET', '/health', timeout=PATIENCE)[0] == 200
        for c in held: c.close()
    with worker(stall_s=.3, read_s=60) as w:
        c = deaf(w)
        poll = select.poll()
        poll.register(c.fileno(), select.POLLRDHUP)
        assert poll.poll(60_000)                                    # cut, with nothing read
        assert w.request('GET', '/health')[0] == 200


def test_the_oldest_silent_one_goes():
    class Wire:
        closing = False
        def is_closing(self): return self.closing
        def abort(self): self.closing = True
    class One:
        def __init__(self, since, silent=True): self.idle_since, self.silent, self.transport = since, silent, Wire()
    limits = type('', (), dict(max_connections=3, spare=2))
    a, b, c = One(1, silent=False), One(3), One(2)
    assert make_room(limits, {a, b, c}, c) and not any(x.transport.closing for x in (a, b, c))
    new = One(9)
    assert make_room(limits, {a, b, c, new}, new) and [x.transport.closing for x in (a, b, c, new)] == [False, False, True, False]
    work = [One(i, silent=False) for i in range(5)]
    assert make_room(limits, set(work), work[0]) and not make_room(limits, {*work, new}, new)
    assert drop_silent([a, b, c, new], 9) == 2 and not a.transport.closing


@pytest.mark.parametrize('data', SILENT[3:5])
def test_a_client_that_leaves_in_the_middle_of_its_body(data):
    with worker() as w:
        for path in b'/execute', b'/cancel':
            for _ in range(5):
                c = w.connect()
                c.sendall(data.replace(b'/execute', path))
                time.sleep(.02)
                c.close()
        w.event('request', n=10, status=499)
        assert w.execute(prompt='a').all()[-1]['type'] == 'end' and not [e for e in w.log if e['level'] in ('error', 'warning')]


def test_a_header_that_never_ends():
    with worker(read_s=1) as w:
        c, began = w.connect(), time.monotonic()
        with pytest.raises(ConnectionError):
            c.sendall(b'GET /health HTTP/1.1\r\nX: ')
            while time.monotonic() < began + PATIENCE:
                c.sendall(b'a')
                time.sleep(.05)


def test_a_client_that_leaves_with_more_in_the_pipe():
    "What it sent after its request is not read, so nobody sees the end of it; the socket does"
    with worker() as w:
        body = json.dumps(dict(job_id='gone', prompt='prefill:60')).encode()
        c = w.connect()
        c.sendall(HEAD + b'Content-Length: %d\r\n\r\n' % len(body) + body + b'GET /health HTTP/1.1\r\n' * 20_000)
        w.event('execute_start')
        c.close()
        assert w.event('execute_end')['reason'] == 'gone'
        w.wait_state('ready')


# --- the event loop

@pytest.mark.parametrize('n', [5000, 9000])
def test_bodies_in_crumbs(n):
    "A piece of a body costs the event loop the same, however small it is; some thousands are enough for everybody"
    with worker() as w:
        body = json.dumps(dict(job_id='1', prompt='a', more='x' * n)).encode()[:n]
        c = w.connect()
        with contextlib.suppress(ConnectionError):
            c.sendall(HEAD + b'Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n' + b''.join(b'1\r\n%c\r\n' % b for b in body)
                + b'0\r\n\r\n')
        answer = everything(c)
        if n == 5000: assert b' 400 ' in answer.split(b'\r\n')[0] and b'not JSON' in answer
        elif answer: assert b' 400 ' in answer.split(b'\r\n')[0] and b'INVALID_REQUEST' in answer and b'not JSON' not in answer
        assert w.health()['state'] == 'ready'


class Here:
    "A worker's server in this process, in a thread of its own"
    def __init__(self, **settings):
        self.jobs, self.up = Jobs(lambda: fake_model(say('hi') + [EOS])), threading.Event()
        self.jobs.thread.start(); self.jobs.loaded.result()
        self.sock = bind('127.0.0.1', 0)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run(settings)))
        self.thread.start(); self.up.wait(PATIENCE)
    async def run(self, settings):
        self.loop, w = asyncio.get_running_loop(), Worker(Settings(model='x', **settings), self.jobs)
        self.server = Server(w, make_app(w), self.sock)
        task = asyncio.create_task(self.server.serve([self.sock]))
        while not self.server.started: await asyncio.sleep(.01)
        self.up.set()
        await task
    def ask(self, data):
        with socket.create_connection(self.sock.getsockname(), 10) as c:
            c.sendall(data)
            return everything(c)
    def __enter__(self): return self
    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(PATIENCE); self.jobs.stop()


def post(path, body):
    return b'POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n' % (path,
        len(body)) + body


def test_what_the_event_loop_is_spared(monkeypatch):
    "It parses no body but a cancel of a few bytes, and never gets much to read at once"
    parsed, read = [], []
    parse, receive = routes.parse_json, worker_module.Connection.data_received
    monkeypatch.setattr(routes, 'parse_json', lambda body: [parsed.append((threading.get_ident(), len(body))), parse(body)][1])
    monkeypatch.setattr(worker_module.Connection, 'data_received', lambda self, data: [read.append(len(data)), receive(self, data)][1])
    with quiet_logs(), Here() as h:
        for path in b'/execute', b'/cancel':
            for size in 30, 1 << 20: assert b'400' in h.ask(post(path, b'{"a":"' + b'x' * (size - 8) + b'"}')).split(b'\r\n')[0]
        assert [n for _, n in parsed] == [30, 1 << 20] * 2 and [i == h.thread.ident for i, _ in parsed] == [False, False, True, False]
        assert max(read) <= 8192 and sum(read) > 2 << 20


def test_cookies_end_at_the_edge(monkeypatch):
    import starlette.requests
    monkeypatch.setattr(starlette.requests, 'cookie_parser', lambda s: 1 / 0)
    with quiet_logs(), Here() as h:
        assert b' 200 ' in h.ask(b'GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nCookie: a="' + b'\\' * 9000
            + b'"\r\n\r\n').split(b'\r\n')[0]


# --- file descriptors

def test_descriptors_run_out_and_come_back():
    "A line a second, and as soon as there are some, everything works"
    with worker(read_s=60) as w:
        used = len(os.listdir(f'/proc/{w.p.pid}/fd'))
        hard = resource.prlimit(w.p.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(w.p.pid, resource.RLIMIT_NOFILE, (used + 2, hard))
        began, held = time.monotonic(), [w.connect() for _ in range(12)]          # two or three are let go a second
        w.event('descriptors', n=2)
        for c in held: c.close()
        assert w.request('GET', '/health', timeout=PATIENCE)[0] == 200 and w.execute(prompt='a').all()[-1]['type'] == 'end'
        lines = [e for e in w.log if e['level'] in ('warning', 'error')]
        assert ({e['event'] for e in lines} == {'descriptors'} and len(lines) <= time.monotonic() - began + 2
            and not any('exception' in e for e in lines))


def test_few_descriptors_from_the_start():
    few = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); sys.argv = ['', '{\"read_s\": 60}']; "
        "runpy.run_path('fake_worker.py', run_name='__main__')")
    w = Proc(['-c', few])
    try:
        assert 'ulimit -n' in w.event('descriptors')['message']
        held = []
        for _ in range(100):
            held.append(w.connect())
            held[-1].sendall(b'GET /hea')
            assert w.request('GET', '/health', timeout=PATIENCE)[0] == 200
        assert w.execute(prompt='a b').all()[-1]['tokens_out'] == 2
        assert len([e for e in w.log if e['event'] == 'descriptors']) == 1          # they never ran out
        for c in held: c.close()
    finally:
        w.p.kill()
        w.p.wait(PATIENCE)


def test_answers_without_a_request_have_the_headers_of_all_answers():
    with worker() as w:
        c = w.connect()
        c.sendall(b'what\r\n\r\n')
        head, _, body = everything(c).partition(b'\r\n\r\n')
        assert (head.startswith(b'HTTP/1.1 400 ')
            and ('X-Correlation-ID: ' + json.loads(body)['correlation_id']).encode() in head.split(b'\r\n'))


def test_places_taken_are_told_with_retry_after():
    from orcd.serve.worker import raw_response, too_many
    head, _, body = raw_response(too_many()).decode().partition('\r\n\r\n')
    assert head.startswith('HTTP/1.1 503 Service Unavailable\r\n')
    headers = dict(l.split(': ') for l in head.split('\r\n')[1:])
    assert (headers['Retry-After'] == '1' and headers['X-Correlation-ID'] == json.loads(body)['correlation_id']
        and int(headers['Content-Length']) == len(body))


def test_odd_requests_say_little():
    "An offer of HTTP/2 (the default of some clients) is no warning; a method of 15 KB is not repeated"
    with worker() as w:
        offer = {'Connection': 'Upgrade, HTTP2-Settings', 'Upgrade': 'h2c', 'HTTP2-Settings': 'AAMAAABkAAQAoAAAAAIAAAAA'}
        assert w.post('/execute', dict(job_id='1', prompt='a'), headers=offer)[0] == 200
        c = w.connect()
        c.sendall(b'M' * 15000 + b' /execute HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n')
        data = everything(c)
        assert data.startswith(b'HTTP/1.1 405 ') and len(data) < 1000
        w.event('request', status=405)
        assert max(map(len, w.raw)) < 1000 and not [e for e in w.log if e['level'] == 'warning' and e['event'] == 'uvicorn']


def test_a_path_that_is_no_text_names_no_job():
    with worker() as w:
        s = w.execute('\ufffd', prompt='tokens:2000@0.01')
        s.next()
        for path in '/cancel/%ff', '/cancel/%ed%a0%80':
            status, _, body = w.post(path)
            assert (status, body['errors'][0]['field']) == (400, 'job_id')
        assert (s.next()['type'] == 'token' and w.post('/cancel/%ef%bf%bd')[2]['status'] == 'cancelling'
            and list(s.frames())[-1]['code'] == 'CANCELLED')


def test_a_port_that_comes_back_before_it_is_gone():
    "The old connection's end, heard late, takes nothing from the new one"
    class Transport:
        max_size = 0
        def get_extra_info(self, name, default=None): return ('127.0.0.1', 4711) if name in ('peername', 'sockname') else None
        def is_closing(self): return False
        def close(self): pass
    from uvicorn.server import ServerState
    async def go():
        w = Worker(Settings(), Jobs(None))
        with bind('127.0.0.1', 0) as sock: server = Server(w, make_app(w), sock)
        old, new = (server.config.http_protocol_class(server.config, ServerState(), {}) for _ in range(2))
        for c in old, new: c.connection_made(Transport())
        old.connection_lost(None)
        return w.open == {('127.0.0.1', 4711): new}
    assert asyncio.run(go())


def test_a_cancel_does_not_wait_for_prompts():
    "Both places for work on bodies are taken, by prompts that take their time"
    from starlette.requests import Request
    async def go():
        w = Worker(Settings(), Jobs(None))
        for _ in range(2): await w.working.acquire()
        async def receive(): return dict(type='http.request', body=b'{"job_id":"1"}', more_body=False)
        http = Request({'type': 'http', 'method': 'POST', 'path': '/cancel', 'headers': [(b'content-type', b'application/json')],
            'orcd.id': 'x'}, receive)
        return json.loads((await asyncio.wait_for(w.cancel(http), PATIENCE)).body)
    assert asyncio.run(go()) == dict(job_id='1', status='not_active')
