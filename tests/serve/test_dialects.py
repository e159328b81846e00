"A dialect is one module: a toy one, in a real worker process, has everything that `/execute` has"
import contextlib, http.client, json, socket, time
import pytest
from worker_tools import PATIENCE, Proc


@contextlib.contextmanager
def toy(**settings):
    p = Proc(['toy_dialect.py', json.dumps(settings)])
    try: yield p
    finally:
        if p.p.poll() is None: p.p.kill()
        p.p.wait(PATIENCE)


@pytest.fixture(scope='module')
def w():
    with toy() as p: yield p


def ask(w, *prompts, **kw): return w.post('/toy/answer', dict(prompts=prompts, **kw))


def left_alone(w, id, more=b''):
    "A connection on which a long job was asked for"
    c, body = w.connect(), json.dumps(dict(prompts=['tokens:100000@0.01'], id=id)).encode()
    head = f'POST /toy/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n'
    c.sendall(head.encode() + body + more)
    return c


def ended(w, n=1, **fields): return w.event('execute_end', n=n, **fields)


def test_one_body(w):
    "Several texts of one job, also the tokens that have no text"
    status, headers, body = ask(w, 'soft half rain', 'falls')
    assert (status, headers['Content-Type']) == (200, 'application/json')
    assert headers['X-Correlation-ID'] and 'Transfer-Encoding' not in headers
    assert body == dict(texts=['soft rain ', 'falls '], tokens=[1, 2, 3, 1])


def test_a_stream(w):
    status, headers, body = ask(w, 'soft half rain', 'falls', stream=True)
    assert (status, headers['Content-Type'], headers['Cache-Control']) == (200, 'text/event-stream', 'no-cache')
    assert body.decode().split('\n') == ['started', '"soft "', '""', '"rain "', 'next', '"falls "', 'end', '']


def test_a_stream_that_has_nothing_to_say_yet():
    "The client hears that somebody is there although tokens come all the time, and no frame of nothing"
    with toy(heartbeat_s=.05) as w:
        c = http.client.HTTPConnection(w.address, timeout=PATIENCE)
        script = ' '.join(['.', 'prefill:0.02'] * 400)
        c.request('POST', '/toy/answer', json.dumps(dict(prompts=[script], stream=True)), {'Content-Type': 'application/json'})
        r = c.getresponse()
        lines = iter(r.readline, b'')
        assert next(lines) == b'started\n'
        assert next(lines) == b': still here\n'
        c.close()
        ended(w, reason='gone')


def test_the_slot_is_free_when_the_client_of_one_body_leaves(w):
    c = left_alone(w, 'left')
    w.wait_state('busy')
    c.close()
    assert ended(w, job_id='left')['reason'] == 'gone'
    w.wait_state('ready')
    assert ask(w, 'again')[0] == 200


def test_and_when_it_had_begun_another_request(w):
    "Nobody reads what it sends while it is answered, so only the socket knows that it is gone"
    c = left_alone(w, 'piped', b'x' * 100_000)
    w.wait_state('busy')
    c.shutdown(socket.SHUT_WR)
    assert ended(w, job_id='piped')['reason'] == 'gone'
    c.close()


@pytest.mark.parametrize('prompts', [['tokens:100000@0.01'], ['one', 'tokens:100000@0.01', 'never']])
def test_cancel(w, prompts):
    c = http.client.HTTPConnection(w.address, timeout=PATIENCE)
    c.request('POST', '/toy/answer', json.dumps(dict(prompts=prompts, id='c')), {'Content-Type': 'application/json'})
    while w.post('/cancel/c')[2]['status'] == 'not_active': time.sleep(.005)
    r = c.getresponse()
    assert (r.status, json.loads(r.read())) == (499, dict(oops='the job was cancelled'))
    c.close()


def test_all_texts_share_one_time():
    with toy(inference_timeout_sec=.5) as w:
        status, _, body = ask(w, *['tokens:20@0.01'] * 100)
        assert (status, body) == (504, dict(oops='the job took longer than the worker allows'))


def test_errors_have_its_shape_on_its_paths_alone():
    with toy(token='secret') as w:
        def said(path, method='POST', token='secret', body='{"prompts":["a"]}'):
            status, headers, body = w.request(method, path, body, {'Authorization': f'Bearer {token}'})
            return status, list(body)[0], headers
        native = 'code'
        assert said('/toy/answer', token='x')[:2] == (401, 'oops') and said('/execute', token='x')[:2] == (401, native)
        assert said('/toy/nothing')[:2] == (404, 'oops') and said('/nothing')[:2] == (404, native)
        status, kind, headers = said('/toy/answer', 'GET', body=None)
        assert (status, kind, headers['Allow']) == (405, 'oops', 'POST')
        assert said('/toy/answer', body='{')[:2] == (400, 'oops') and said('/execute', body='{')[:2] == (400, native)
        assert said('/toy/answer', body='{"prompts":["bug"]}')[:2] == (500, 'oops')
        c = http.client.HTTPConnection(w.address, timeout=PATIENCE)
        c.request('POST', '/toy/answer', json.dumps(dict(prompts=['tokens:100000@0.01'], id='busy')),
            {'Content-Type': 'application/json', 'Authorization': 'Bearer secret'})
        w.wait_state('busy')
        status, kind, headers = said('/toy/answer')
        assert (status, kind, headers['Retry-After']) == (503, 'oops', '1')
        c.close()
