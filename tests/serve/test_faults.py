"What goes wrong in the life of a worker process: every stream ends once, the process ends with the right code"
import contextlib, json, os, signal, socket, threading, time
import pytest
from statistics import median
from worker_tools import PATIENCE, worker

LONG = dict(prefill='prefill:200', decode='tokens:2000@0.1')      # 200 s: whoever waits for the end of such a job is given up long before


@pytest.fixture(scope='module')
def w():
    with worker(read_s=1, stall_s=1, max_connections=64) as p: yield p


def alive(w):
    "It still works, and nothing is left of what was done to it"
    w.wait_state('ready')
    assert w.execute('alive', prompt='a b').all()[-1]['tokens_out'] == 2


# --- clients

@pytest.mark.parametrize('phase', LONG)
def test_client_gone(w, phase):
    s = w.execute(f'gone-{phase}', prompt=LONG[phase])
    assert s.next()['type'] == 'started'
    if phase == 'decode': s.next()
    s.close()
    w.wait_state('ready')
    assert w.event('execute_end', job_id=f'gone-{phase}')['stop_reason'] == 'CANCELLED'
    alive(w)


def test_client_half_closes_and_goes(w):
    c = w.connect()
    body = json.dumps(dict(job_id='half', prompt=LONG['decode'])).encode()
    c.sendall(b'POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(body) + body)
    c.recv(100)
    c.shutdown(socket.SHUT_WR)
    c.close()
    w.wait_state('ready')


def test_client_that_never_reads():
    "The job runs at full speed and frees its slot, whatever its client does; the connection is cut after a while"
    with worker(stall_s=.5, read_s=.5) as w:
        c = socket.socket()
        c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        c.connect((w.host, w.port))
        body = json.dumps(dict(job_id='deaf', prompt=' '.join(['x' * 400] * 80))).encode()
        words = b'POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(body) + body
        c.sendall(words)
        assert w.event('execute_end', job_id='deaf')['tokens_out'] == 80
        alive(w)
        c.close()


def test_stalled_stream_is_cut():
    with worker(stall_s=.5) as w:
        c = socket.socket()
        c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        c.connect((w.host, w.port))
        body = json.dumps(dict(job_id='deaf', prompt='flood:2000@0.005')).encode()
        c.sendall(b'POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(body) + body)
        end = w.event('execute_end', job_id='deaf')
        assert end['stop_reason'] == 'CANCELLED' and end['reason'] == 'stalled'
        alive(w)
        c.close()


def answer_time(w):
    began = time.monotonic()
    w.health()
    return time.monotonic() - began


@pytest.mark.parametrize('data', [b'', b'GET /hea', b'POST /execute HTTP/1.1\r\nHost: x\r\nContent-',
    b'POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n'
    b'Content-Length: 100\r\n\r\n{"job',
    b'POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"job'])
def test_half_sent(w, data):
    "Silence does not keep a connection: cut, or 408 for half a body"
    c = w.connect()
    c.sendall(data)
    answer = b''.join(iter(lambda: reading(c), b''))
    assert b' 408 ' in answer.split(b'\r\n')[0] if b'{"job' in data else answer == b''
    alive(w)


def reading(c):
    try: return c.recv(65536)
    except ConnectionResetError: return b''


@pytest.mark.parametrize('data', [b'\x16\x03\x01\x02\x00\x01\x00', b'GARBAGE\r\n\r\n', b'GET / HTTP/9.9\r\n\r\n', b'GET /' + b'x' * 40000,
    b'GET / HTTP/1.1\r\n' + b'A: b\r\n' * 9000,
    b'POST /execute HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n',
    b'POST /execute HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n'])
def test_broken_http(w, data):
    c = w.connect()
    with contextlib.suppress(ConnectionError): c.sendall(data)
    answer = b''.join(iter(lambda: reading(c), b''))
    if answer: assert answer.startswith(b'HTTP/1.1 4') and json.loads(answer.split(b'\r\n\r\n', 1)[1])['code'] == 'INVALID_REQUEST'
    alive(w)


def until_served(w):
    "Until the last of many connections is gone, newcomers are too many"
    end = time.monotonic() + PATIENCE
    while w.request('GET', '/health')[0] == 503: assert time.monotonic() < end


def test_a_thousand_quick_connects(w):
    for _ in range(1000): w.connect().close()
    until_served(w)
    alive(w)


def test_many_clients_at_once(w):
    "One is served at a time, the others are told so"
    got = []
    def one(i):
        status, _, body = w.post('/execute', dict(job_id=f'm{i}', prompt='a b tokens:3')) if i % 2 else (None, None, None)
        if status is None:
            try: got.append(w.execute(f'm{i}', prompt='a').all()[-1]['type'])
            except AssertionError as e: got.append(e.args[0][0])
        else: got.append(status)
    threads = [threading.Thread(target=one, args=(2 * i,)) for i in range(30)]
    for t in threads: t.start()
    for t in threads: t.join(PATIENCE)
    assert len(got) == 30 and set(got) <= {'end', 503} and 'end' in got
    alive(w)


def test_duplicate_ids_at_once(w):
    s = w.execute('twin', prompt=LONG['decode'])
    assert [w.post('/execute', dict(job_id='twin', prompt='a'))[0] for _ in range(5)] == [409] * 5
    w.post('/cancel/twin')
    assert s.all()[-1]['code'] == 'CANCELLED'


# --- cancel

@pytest.mark.parametrize('phase', LONG)
@pytest.mark.parametrize('times', [1, 2])
def test_cancel(w, phase, times):
    s = w.execute('c', prompt=LONG[phase])
    s.next()
    for _ in range(times): assert w.post('/cancel/c')[2]['status'] in ('cancelling', 'not_active')
    last = list(s.frames())[-1]
    assert last['code'] == 'CANCELLED'
    assert w.post('/cancel/c')[2]['status'] == 'not_active'                    # after the end
    alive(w)


def test_health_while_busy(w):
    """A job does not make answers slower: the median of many is that of the same worker without one, within what a machine's other work
    does. They are asked in turns, since that comes and goes."""
    idle, busy = [], []
    for _ in range(10):
        idle += [answer_time(w) for _ in range(5)]
        s = w.execute('h', prompt=LONG['prefill'])
        s.next()
        busy += [answer_time(w) for _ in range(5)]
        w.post('/cancel/h')
        list(s.frames())
        w.wait_state('ready')
    assert median(busy) < 10 * median(idle)


# --- the end of the process

@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGINT])
def test_signal_idle(sig):
    with worker(drain_s=200) as w:
        w.signal(sig)
        assert w.end() == 0
        assert w.log[-1]['event'] == 'shutdown' and w.log[-1]['exit_code'] == 0 and w.p.stdout.read() == b'closed\n'


def test_sigterm_lets_the_job_finish():
    with worker() as w:
        s = w.execute(prompt='tokens:60@0.05')
        s.next()
        idle = w.connect()  # noqa: F841 (a silent connection, open to the end: it does not keep the process)
        w.signal()
        w.event('signal')
        w.wait_state('draining')
        status, headers, body = w.post('/execute', dict(job_id='new', prompt='a'))
        assert (status, body['code'], body['retriable']) == (503, 'SHUTTING_DOWN', True)
        last = list(s.frames())[-1]
        assert (last['type'], last['tokens_out']) == ('end', 60)
        assert w.end() == 0 and w.p.stdout.read() == b'closed\n'


@pytest.mark.parametrize('phase', LONG)
def test_sigterm_cuts_a_long_job(phase):
    with worker(drain_s=.5) as w:
        s = w.execute(prompt=LONG[phase])
        s.next()
        began = time.monotonic()
        w.signal()
        last = list(s.frames())[-1]
        assert last['code'] == 'CANCELLED' and time.monotonic() - began > .4
        assert w.end() == 0 and w.p.stdout.read() == b'closed\n'


@pytest.mark.parametrize('phase', LONG)
def test_second_sigterm_does_not_wait(phase):
    with worker(drain_s=200) as w:
        s = w.execute(prompt=LONG[phase])
        s.next()
        w.signal()
        w.event('signal')
        time.sleep(.1)
        w.signal()
        assert list(s.frames())[-1]['code'] == 'CANCELLED'
        assert w.end() == 0


def test_sigterm_ends_waiting_jobs():
    with worker(queue_depth=2, drain_s=.5) as w:
        a, b = w.execute('a', prompt=LONG['decode']), w.execute('b', prompt='x')
        w.signal()
        events = b.all()
        assert [e['type'] for e in events] == ['started', 'error'] and events[1]['code'] == 'SHUTTING_DOWN' and events[1]['retriable']
        assert list(a.frames())[-1]['code'] == 'CANCELLED'
        assert w.end() == 0


def test_sigterm_during_load():
    with worker(env=dict(FAKE_LOAD='slow'), wait=False) as w:
        w.event('model_load_progress')
        w.signal()
        assert w.end() == 0
        names = [e['event'] for e in w.log]
        assert names[-1] == 'shutdown' and 'ready' not in names and 'error' not in names


def test_a_client_that_does_not_read_cannot_keep_the_process():
    with worker(drain_s=.3) as w:
        c = socket.socket()
        c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        c.connect((w.host, w.port))
        body = json.dumps(dict(job_id='deaf', prompt='flood:2000')).encode()
        c.sendall(b'POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(body) + body)
        w.event('execute_end')
        w.signal()
        assert w.end() == 0


def test_port_in_use():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        with worker(wait=False, port=s.getsockname()[1]) as w:
            assert w.end() == 1
            e = w.event('error')
            assert 'in use' in e['message'] and {'code', 'gpu_device', 'model_path'} <= set(e)
            assert 'model_load_start' not in [e['event'] for e in w.log] and not any('Traceback' in l for l in w.raw)


def test_too_little_vram():
    with worker(env=dict(FAKE_LOAD='vram'), wait=False) as w:
        assert w.end() == 1
        e = w.event('error')
        assert (e['code'], e['required_bytes'], e['available_bytes'], e['gpu_device'],
            e['model_path']) == ('INSUFFICIENT_VRAM', 10**12, 10**9, 0, 'fake.gguf')


def test_lost_context():
    "A sticky CUDA error: the job gets its error, /health says 503, the process ends for its supervisor to restart it"
    with worker(queue_depth=1, fatal_s=4) as w:
        a, b = w.execute('a', prompt='prefill:2 sticky'), w.execute('b', prompt='x')
        last = a.all()[-1]
        assert (last['code'], last['retriable']) == ('CUDA_ERROR', False) and b.all()[-1]['code'] == 'CUDA_ERROR'
        status, _, h = w.request('GET', '/health')
        assert (status, h['status']) == (503, 'unhealthy')
        assert w.post('/execute', dict(job_id='c', prompt='x'))[0] in (500, 503)
        assert w.end() == 1


def test_hanging_engine():
    with worker(inference_timeout_sec=.3, hang_s=.5, fatal_s=4) as w:
        last = w.execute(prompt='a hang').all()[-1]
        assert last['code'] == 'INFERENCE_TIMEOUT'
        assert w.request('GET', '/health')[0] == 503
        assert w.end() == 1


def test_log_pipe_that_nobody_reads():
    with worker(read=False, port=0, wait=False) as w:
        line = b''
        while b'"ready"' not in line: line = w.p.stderr.readline()
        w.address = json.loads(line)['uri'].removeprefix('http://')
        for i in range(400): w.post('/cancel', dict(job_id='x' * 200))           # each leaves a line of 400 bytes, a pipe holds 64 KiB
        assert w.execute(prompt='tokens:50').all()[-1]['tokens_out'] == 50 and w.health()['state'] == 'ready'
        w.signal()
        assert w.p.wait(PATIENCE) == 0


def test_log_reader_gone():
    with worker(read=False, wait=False) as w:
        line = b''
        while b'"ready"' not in line: line = w.p.stderr.readline()
        w.address = json.loads(line)['uri'].removeprefix('http://')
        w.p.stderr.close()
        assert w.execute(prompt='tokens:50').all()[-1]['tokens_out'] == 50
        w.signal()
        assert w.p.wait(PATIENCE) == 0


@pytest.mark.parametrize('jump', [-86400, 86400])
def test_clock_jumps(jump):
    "The time of day moves by a day in the middle of a job; timeouts and uptime do not notice"
    with worker(env=dict(FAKE_CLOCK=str(jump)), inference_timeout_sec=3600) as w:
        assert w.execute(prompt='a jump tokens:20@0.01').all()[-1]['tokens_out'] == 21
        assert 0 <= w.health()['uptime_seconds'] < 3600                         # a day is 86,400
        last = w.execute(prompt='tokens:2@0.01').all()[-1]
        assert last['type'] == 'end' and 0 <= last['decode_time_ms'] < 3_600_000
        w.signal()
        assert w.end() == 0 and 0 < w.log[-1]['uptime_seconds'] < 3600


def test_two_workers_side_by_side():
    with worker() as a, worker() as b:
        sa, sb = a.execute(prompt='tokens:30@0.01'), b.execute(prompt='tokens:30@0.01')
        assert sa.all()[-1]['tokens_out'] == sb.all()[-1]['tokens_out'] == 30


def test_nothing_leaks():
    "Descriptors and threads after 200 jobs, half of them left by their clients, are those of the first"
    with worker() as w:
        def count(): return len(os.listdir(f'/proc/{w.p.pid}/fd')), len(os.listdir(f'/proc/{w.p.pid}/task'))
        alive(w)
        for i in range(8): answer_time(w)
        before = count()
        for i in range(200):
            s = w.execute(f'l{i}', prompt='a b' if i % 2 else 'tokens:500@0.01')
            if i % 2: s.all()
            else: s.close(); w.wait_state('ready')
        end = time.monotonic() + PATIENCE                                      # connections that were left are closed when that is noticed
        # the pool for prompts grows to a few threads
        while not (count()[0] <= before[0] + 2 and count()[1] <= before[1] + 8): assert time.monotonic() < end, (before, count())
