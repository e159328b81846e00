"What /metrics and the log say of jobs, read by Prometheus' own parser and compared with what clients saw"
import hashlib, json, re, subprocess, sys, threading, time
from pathlib import Path
import pytest
from prometheus_client.parser import text_string_to_metric_families
from worker_tools import orcd, worker

TOKEN = 'a-token-of-the-metrics'
# the names of the contract
GAUGES = {'vllm:num_requests_running', 'vllm:num_requests_waiting', 'vllm:kv_cache_usage_perc',
    'orcd_vram_bytes', 'orcd_model_load_seconds'}
COUNTERS = {'vllm:prompt_tokens', 'vllm:generation_tokens', 'orcd_jobs'}
HISTOGRAMS = {'vllm:time_to_first_token_seconds', 'vllm:inter_token_latency_seconds', 'vllm:e2e_request_latency_seconds'}


def read(w, headers=None):
    "{(name of a sample, value of its second label or None): value}, and the kinds of the families"
    status, h, body = w.request('GET', '/metrics', headers=headers)
    assert status == 200, body
    families = list(text_string_to_metric_families(body.decode()))
    out = {}
    for s in (s for f in families for s in f.samples):
        labels = dict(s.labels)
        assert labels.pop('model_name') == 'fake.gguf' and len(labels) <= 1
        assert (key := (s.name, *labels.values())) not in out
        out[key] = s.value
    return out, {f.name: f.type for f in families}, h


def reasons(m): return {k[1]: v for k, v in m.items() if k[0] == 'orcd_jobs_total' and v}


def test_names_and_kinds_from_the_start():
    with worker() as w:
        m, kinds, headers = read(w)
        assert headers['Content-Type'].startswith('text/plain; version=0.0.4')
        assert kinds == dict.fromkeys(GAUGES - {'orcd_vram_bytes'}, 'gauge') | dict.fromkeys(COUNTERS, 'counter') | dict.fromkeys(
            HISTOGRAMS, 'histogram')
        assert m.pop(('orcd_model_load_seconds',)) > 0 and not any(m.values())
        assert {'EOS', 'CANCELLED', 'INFERENCE_TIMEOUT', 'VRAM_OOM'} <= {k[1] for k in m if k[0] == 'orcd_jobs_total'}
        status, h, body = w.request('HEAD', '/metrics')
        assert (status, body) == (200, b'') and int(h['Content-Length']) > 1000
        assert w.post('/metrics', {})[0] == 405


def test_numbers_are_those_of_the_clients():
    with worker() as w:
        prompts = ['soft rain falls', 'prefill:0.2 one', 'tokens:50 more', 'half half x', 'a oom', 'tokens:9 bug', 'x']
        began, n_prompt, tokens, ends, firsts = time.monotonic(), 0, [], [], 0
        for i, p in enumerate(prompts):
            s = w.execute(str(i), prompt=p, max_tokens=40)
            events = s.all()
            end = events[-1]
            ends.append(end.get('stop_reason') or end['code'])
            seen = sum(e['type'] == 'token' for e in events) + 2 * p.count('half')      # a half is a token without an event
            seen = seen - p.count('half') if p.startswith('half') else seen
            assert end['type'] == 'error' or end['tokens_out'] == seen
            tokens.append(seen)
            n_prompt, firsts = n_prompt + len(p.split(' ')), firsts + (seen > 0)
        took = time.monotonic() - began
        m, _, _ = read(w)
        assert m['vllm:prompt_tokens_total',] == n_prompt
        assert m['vllm:generation_tokens_total',] == sum(tokens)
        assert m['vllm:time_to_first_token_seconds_count',] == firsts
        assert m['vllm:inter_token_latency_seconds_count',] == sum(max(n - 1, 0) for n in tokens)
        well = [e for e in ends if e in ('EOS', 'MAX_TOKENS')]
        assert m['vllm:e2e_request_latency_seconds_count',] == len(well) == 5
        assert reasons(m) == {r: ends.count(r) for r in ends} and set(ends) == {'EOS', 'MAX_TOKENS', 'VRAM_OOM', 'INTERNAL'}
        # 0.2 s were waited before a first token; no client waited for less than what was measured
        assert .2 <= m['vllm:time_to_first_token_seconds_sum',] <= m['vllm:e2e_request_latency_seconds_sum',] + took and (
            m['vllm:e2e_request_latency_seconds_sum',] <= took)
        assert m['vllm:time_to_first_token_seconds_bucket', '0.1'] <= firsts - 1
        for h in HISTOGRAMS:
            buckets = [v for k, v in m.items() if k[0] == f'{h}_bucket']
            assert buckets == sorted(buckets) and buckets[-1] == m[f'{h}_count',]


def test_while_a_job_runs_and_another_waits():
    with worker(queue_depth=1) as w:
        a = w.execute('a', prompt='tokens:3 prefill:100')
        events = [a.next() for _ in range(4)]
        assert [e['type'] for e in events] == ['started', 'token', 'token', 'token']
        b = threading.Thread(target=lambda: seen.extend(w.execute('b', prompt='x').all()))
        seen = []
        b.start()
        while not read(w)[0]['vllm:num_requests_waiting',]: time.sleep(.005)
        m, _, _ = read(w)
        assert (m['vllm:num_requests_running',], m['vllm:num_requests_waiting',]) == (1, 1)
        assert m['vllm:kv_cache_usage_perc',] == (2 + 3) / 4096           # two words, three tokens
        assert m['vllm:generation_tokens_total',] == 3 and not reasons(m)
        w.post('/cancel/b')
        b.join()
        assert seen[-1]['code'] == 'CANCELLED' and reasons(read(w)[0]) == dict(CANCELLED=1)
        w.post('/cancel/a'); list(a.frames())
        w.wait_state('ready')
        m, _, _ = read(w)
        assert reasons(m) == dict(CANCELLED=2) and m['vllm:e2e_request_latency_seconds_count',] == 0
        assert [m[f'vllm:{k}',] for k in ('num_requests_running', 'num_requests_waiting', 'kv_cache_usage_perc')] == [0, 0, 0]


@pytest.mark.parametrize('accept', ['', '*/*', 'x;;=,;',
    # of Prometheus 2 and 3
    'application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1',
    'application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2'])
def test_one_format_for_every_reader(accept, idle):
    "In OpenMetrics the package would write underscores for the colons of the names"
    m, kinds, headers = read(idle, {'Accept': accept})
    assert ('vllm:generation_tokens_total',) in m and headers['Content-Type'] == 'text/plain; version=0.0.4; charset=utf-8'


@pytest.fixture(scope='module')
def idle():
    with worker() as w: yield w


def test_who_may_read():
    "Open as /health is, also where other routes want a token; a token of its own, when it has one, and no other"
    def status(w, path, token=None): return w.request('GET', path, headers=token and {'Authorization': f'Bearer {token}'})[0]
    with worker(token='the-token-of-the-jobs') as w:
        assert status(w, '/metrics') == 200 == status(w, '/health') and w.post('/execute', {})[0] == 401
        assert w.request('GET', '/metrics', headers={'Origin': 'http://x'})[0] == 403
    for more in {}, dict(token='the-token-of-the-jobs'):
        with worker(metrics_token=TOKEN, **more) as w:
            assert [status(w, '/metrics', t) for t in (None, 'x', 'the-token-of-the-jobs', TOKEN)] == [401, 401, 401, 200]
            assert w.request('HEAD', '/metrics')[0] == 401 and status(w, '/health') == 200
            assert w.post('/execute', {}, headers={'Authorization': f'Bearer {TOKEN}'})[0] == (401 if more else 400)
            w.event('request', path='/execute')
            asked = [(e['path'], e['status']) for e in w.log if e['event'] == 'request']
            assert asked == [('/metrics', 401)] * 4 + [('/execute', 401 if more else 400)]    # readers who may read leave no line


def test_nothing_is_imported_for_it_before_somebody_asks():
    code = '''import sys, fake_worker, orcd.serve.worker as w
serve = w.Process.serve
async def noted(self, *a):
    print('prometheus_client' in sys.modules)
    self.worker.leave()
    await serve(self, *a)
w.Process.serve = noted
w.serve(w.Settings(model='fake.gguf', port=0), fake_worker.load)
from orcd.serve.metrics import Load, Metrics, render
text = render(Metrics(), Load(0, 0, 0), 'x')
from prometheus_client import REGISTRY, generate_latest
print(b'vllm' in text, b'vllm' in generate_latest(REGISTRY))'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    assert r.stdout.split() == ['False', 'closed', 'True', 'False'], r.stdout + r.stderr


# --- the log

FIELDS = {'queue_ms', 'prefill_ms', 'ttft_ms', 'decode_tok_s', 'prompt_tokens', 'cached_tokens', 'tokens_out'}


def test_what_the_log_says_of_a_job():
    "The real engine, so that every time is one; and a job that waited"
    with orcd('serve', '--model', 'demo', '--device', 'reference', '--port', '0', '--queue-depth', '1', wait=True) as w:
        s = w.execute('a', prompt='Write a haiku about rain', max_tokens=24, seed=1)
        assert s.next()['type'] == 'started'
        b = w.execute('b', prompt='rain', max_tokens=3, seed=1)
        ends = dict(a=list(s.frames())[-1], b=b.all()[-1])
        for job in 'ab':
            e = w.event('execute_end', job_id=job)
            start = w.event('execute_start', job_id=job)
            assert FIELDS <= e.keys() and e['cached_tokens'] == 0
            assert (e['prompt_tokens'], e['tokens_out']) == (start['tokens_in'], ends[job]['tokens_out'])
            assert 0 <= e['queue_ms'] <= e['ttft_ms'] and 0 < e['prefill_ms'] <= e['ttft_ms'] - e['queue_ms'] + .2
            assert abs(e['tokens_out'] / e['decode_tok_s'] * 1e3 - e['decode_time_ms']) <= 1
        # what the first one needed after the second had come is what the second waited
        assert w.event('execute_end', job_id='b')['queue_ms'] > 0


@pytest.mark.parametrize('prompt, tokens_out, first', [('a prefill:0 b oom', 2, True), ('oom', 0, False)])
def test_a_job_that_fails_has_them_too(prompt, tokens_out, first):
    with worker() as w:
        w.execute(prompt=prompt).all()
        e = w.event('execute_end')
        assert FIELDS <= e.keys() and e['tokens_out'] == tokens_out and (e['ttft_ms'] is not None) == first


@pytest.mark.parametrize('asked', [dict(prompt='xyzzy is secret'), dict(messages=[dict(role='user', content='xyzzy')])])
def test_no_prompt_in_the_log(asked):
    "Its length and its hash are there; the text is when the worker was told to write it"
    text = asked.get('prompt') or json.dumps(asked['messages'], separators=(',', ':'))
    for told in False, True:
        with worker(log_prompts=told) as w:
            w.execute(**asked).all()
            e = w.event('execute_start')
            assert e['prompt_sha256'] == hashlib.sha256(text.encode()).hexdigest() and e['prompt_chars'] == len(text)
            w.event('execute_end')
            assert any('xyzzy' in line for line in w.raw) == told and e.get('prompt') == (text if told else None)


# --- where the model's memory lies

def test_memory_that_leaves_the_card_ends_the_worker():
    with worker(check_s=.05) as w:
        assert w.execute(prompt='a').all()[-1]['type'] == 'end' and w.health()['resident'] is True
        time.sleep(.3)                                # several looks, and nothing came of them
        assert w.health()['resident'] is True
        w.execute(prompt='evict a').all()
        assert w.end() == 1
        fatal = w.event('error')
        assert fatal['fatal'] and fatal['code'] == 'CUDA_ERROR' and 'VRAM' in fatal['message'] and w.log[-1]['event'] == 'shutdown'


def test_the_look_comes_between_jobs_that_leave_no_pause():
    with worker(check_s=.001, queue_depth=1) as w:
        a = w.execute('a', prompt='evict prefill:0.2')
        b = w.execute('b', prompt='never')
        assert a.all()[-1]['type'] == 'end'
        last = b.all()[-1]
        assert (last['type'], last['code']) == ('error', 'CUDA_ERROR') and w.end() == 1


def test_an_engine_without_vram_is_not_looked_at():
    "The reference engine says `resident: false` from the start, and that is no failure"
    with worker(check_s=.02, env=dict(FAKE_LOAD='host')) as w:
        time.sleep(.3)
        assert w.execute(prompt='a').all()[-1]['type'] == 'end' and w.health()['resident'] is False
        assert not re.search('orcd_vram_bytes', w.request('GET', '/metrics')[2].decode())


def test_memory_by_kind():
    with worker(env=dict(FAKE_LOAD='ledger')) as w:
        m, kinds, _ = read(w)
        assert kinds['orcd_vram_bytes'] == 'gauge'
        assert {k[1]: v for k, v in m.items() if k[0] == 'orcd_vram_bytes'} == dict(weights=1000, KV=234)


# --- the dashboard

def dashboard(): return json.loads((Path(__file__).resolve().parents[2] / 'nbs/deploy/grafana.json').read_text())


def test_every_expression_of_the_dashboard_names_what_is_there():
    "Names and labels of series are those that a worker with every kind of series gives away; a panel more or less is a matter of taste"
    with worker(env=dict(FAKE_LOAD='ledger')) as w:
        text = w.request('GET', '/metrics')[2].decode()
    labels = {s.name: set(s.labels) | {'instance'} for f in text_string_to_metric_families(text) for s in f.samples}  # Prometheus adds one
    d = dashboard()
    exprs = [t['expr'] for p in d['panels'] for t in p['targets']]
    asked = exprs + [v['definition'] for v in d['templating']['list'] if 'definition' in v]
    named = set()
    for e in asked:
        names = re.findall(r'\b(?:vllm:|orcd_)\w+', e)
        assert len(names) == 1 and names[0] in labels, e
        named |= set(names)
        used = {*re.findall(r'(\w+)=~', e), *(l for g in re.findall(r'by \(([^)]*)\)', e) for l in g.split(', '))}
        used |= set(re.findall(r'label_values\(.*, (\w+)\)$', e))
        assert used <= labels[names[0]], (e, used)
        # rates of what only grows, and of nothing else
        grows = names[0].endswith(('_total', '_bucket'))
        assert grows == bool(re.search(r'\b(?:rate|increase)\(', e)) == ('$__rate_interval' in e), e
        assert e.count('(') == e.count(')') and e.count('{') == e.count('}')
    families = {f.name for f in text_string_to_metric_families(text)}
    assert {f for f in families if not any(n.startswith(f) for n in named)} == set(), 'series that no panel shows'


def test_the_dashboard_is_whole():
    "Panels lie beside each other, every variable that is used is declared, and the source of the data is the reader's"
    d, cells = dashboard(), set()
    declared = {v['name'] for v in d['templating']['list']}
    assert set(re.findall(r'\$\{?(?!__)(\w+)', json.dumps(d))) == declared
    assert len({p['id'] for p in d['panels']}) == len(d['panels'])
    for p in d['panels']:
        g = p['gridPos']
        mine = {(x, y) for x in range(g['x'], g['x'] + g['w']) for y in range(g['y'], g['y'] + g['h'])}
        assert not mine & cells and g['x'] + g['w'] <= 24
        cells |= mine
        for t in p['targets']:
            assert t['datasource'] == dict(type='prometheus', uid='${source}') and set(re.findall(r'{{(\w+)}}', t['legendFormat'])) <= set(
                re.findall(r'\w+', re.search(r'by \((.*?)\)|$', t['expr'])[0]))
