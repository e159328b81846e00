"What the benchmark of a running worker says: figures against NumPy, gaps that are scripted, real workers without a look at the clock"
import http.server, json, os, random, subprocess, sys, threading
from urllib.parse import urlsplit
import numpy as np
import pytest
from orcd.errors import OrcdError
from orcd.serve.latency import ROUTES, Client, measure, percentile, report, summary
from worker_tools import PATH, orcd, worker


@pytest.mark.parametrize('n', [1, 2, 3, 19, 20, 21, 99, 100, 101, 1000])
def test_percentiles_are_those_of_numpy(n):
    values = [random.Random(n + i).expovariate(1) for i in range(n)]
    for p in (1, 50, 95, 99, 100): assert percentile(sorted(values), p) == np.percentile(values, p, method='inverted_cdf')
    s = summary(values)
    assert s['n'] == n and s['p95'] == round(float(np.percentile(values, 95, method='inverted_cdf')) * 1e3, 3)
    assert s['mean'] == round(float(np.mean(values)) * 1e3, 3) and s['max'] == round(max(values) * 1e3, 3)


class Scripted:
    "A server whose answers are a script, and the clock of its clients: it goes on only while a line is on its way"
    def __init__(self, script): self.script, self.now, self.slept, self.asked = iter(script), 0.0, [], []
    def clock(self): return self.now
    def sleep(self, s): self.slept.append(s)

    # what a client knows of http.client
    def request(self, method, path, body, headers): self.asked.append((method, path, json.loads(body), headers))
    def getresponse(self): self.status, self.headers, self.body = next(self.script); return self
    def read(self, n): return b''.join(line for _, line in self.body)
    def close(self): pass
    def __iter__(self):
        for wait, line in self.body:
            self.now += wait
            yield line


def event(type, **fields): return b'data: ' + json.dumps(dict(type=type) | fields).encode() + b'\n'


def answer(first, *gaps, end='EOS'):
    yield first / 4, b'event: started\n'
    yield 0, event('started')
    yield 0, b': still here\n'
    for wait in (first * 3 / 4, *gaps): yield wait, event('token', t='x')
    yield 2, event('end', stop_reason=end)


def test_gaps_that_are_known():
    "A first answer that does not count, a worker that is busy twice, and every figure from the script"
    busy = 503, {'Retry-After': '7'}, [(0, b'{}')]
    ok = [(200, {}, list(answer(*times))) for times in [(9, 9), (4, 1, 2, 1), (8, 3)]]
    s = Scripted([ok[0], busy, ok[1], busy, ok[2]])
    c = Client(urlsplit('http://x:1/below/'), ROUTES['execute'], lambda: dict(a=1), {'h': 'x'}, s.clock, s.sleep)
    c.connect = lambda: s
    c.run(2)
    assert s.slept == [7, 7] and s.asked == [('POST', '/below/execute', dict(a=1), {'h': 'x'})] * 5
    assert [(a.first, a.gaps, a.whole) for a in c.answers] == [(4, [1, 2, 1], 10), (8, [3], 13)]
    r = report(c.answers, 1, c.busy)
    assert (r['busy'], r['tokens'], r['ends']) == (2, 6, dict(EOS=2))
    assert r['gap_ms'] == dict(n=4, p50=1000, p95=3000, p99=3000, mean=1750, max=3000)
    assert r['first_token_ms'] == dict(n=2, p50=4000, p95=8000, p99=8000, mean=6000, max=8000)


@pytest.mark.parametrize('response, words', [((400, {}, [(0, b'{"code":"INVALID_REQUEST"}')]), 'INVALID_REQUEST'),
    ((503, {}, [(0, b'SHUTTING_DOWN')]), 'SHUTTING_DOWN'), ((404, {}, [(0, b'')]), '404')])
def test_what_is_no_answer_ends_it(response, words):
    s = Scripted([response])
    c = Client(urlsplit('http://x'), ROUTES['execute'], dict, {}, s.clock, s.sleep)
    c.connect = lambda: s
    with pytest.raises(OrcdError, match=words): c.run(1)


def test_a_real_worker_and_more_clients_than_it_takes():
    "Everything but the times, which nobody knows"
    with worker(queue_depth=1, token='the-token-of-the-jobs') as w:
        r = measure(f'http://{w.address}', 2, 3, 'tokens:9', 5, token='the-token-of-the-jobs')
        assert (r['answers'], r['ends'], r['tokens'], r['busy']) == (6, dict(MAX_TOKENS=6), 30, 0)
        assert (r['first_token_ms']['n'], r['gap_ms']['n'], r['answer_ms']['n']) == (6, 24, 6)
        assert sum(e['event'] == 'execute_end' for e in w.log) in (7, 8)       # the last line may be on its way
        with pytest.raises(OrcdError, match='/execute answers 401'): measure(f'http://{w.address}', prompt='a')
    with worker() as w:
        r = measure(f'http://{w.address}', 3, 2, 'prefill:0.02 a')
        assert r['answers'] == 6 and r['busy'] > 0, 'three clients and one place'
        assert measure(f'http://{w.address}', 1, 1, 'a oom')['ends'] == dict(VRAM_OOM=1)
    with pytest.raises(OrcdError, match='127.0.0.1'): measure(f'http://{w.address}', prompt='a')


def test_another_server():
    class Page(http.server.BaseHTTPRequestHandler):
        def do_POST(self): self.send_response(200); self.end_headers(); self.wfile.write(b'data: <html>\n')
        def log_message(self, *a): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Page) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        with pytest.raises(OrcdError, match='not what such a route sends'): measure(f'http://127.0.0.1:{s.server_address[1]}')
        s.shutdown()


def test_the_command(tmp_path):
    def bench(*args): return subprocess.run([sys.executable, '-m', 'orcd', 'bench', *args], capture_output=True, text=True, env=env)
    env = dict(os.environ, PYTHONPATH=PATH)
    (tmp_path / 'token').write_text('the-token-of-the-jobs\n')
    with worker(queue_depth=3, token='the-token-of-the-jobs') as w:
        more = ['--clients', '2', '--requests', '2', '--tokens', '4', '--token-file', str(tmp_path / 'token')]
        r = bench('--http', f'http://{w.address}', *more)
        d = json.loads(r.stdout)
        assert (d['clients'], d['answers'], d['max_tokens'], d['route']) == (2, 4, 4, '/execute')
        assert d['gap_ms']['p99'] >= d['gap_ms']['p50']
        r = bench('--http', f'http://{w.address}')
        assert r.returncode == 1 and '401' in r.stderr and 'Traceback' not in r.stderr
    for args, words in [(('--http', 'x'), 'no URL'), ((), 'MODEL'), (('demo', '--http', 'http://x'), 'either'),
        (('--http', 'http://x', '--route', 'y'), 'execute, chat')]:
        r = bench(*args)
        assert r.returncode == 2 and words in r.stderr and 'Traceback' not in r.stderr, r


def test_the_route_of_openai():
    "The same model and prompt twice: its chat route, told apart by its own stream"
    with orcd('serve', '--model', 'demo', '--device', 'reference', '--port', '0', wait=True) as w:
        r = measure(f'http://{w.address}', 1, 2, 'Write about rain.', 5, route='chat')
        ends = [e for e in w.log if e['event'] == 'execute_end'][1:]
        assert (r['answers'], r['route'], sum(r['ends'].values())) == (2, '/v1/chat/completions', 2)
        assert set(r['ends']) <= {'stop', 'length'}
        assert 0 < r['tokens'] <= 10 and r['first_token_ms']['n'] == 2 and all(e['tokens_out'] <= 5 for e in ends)
