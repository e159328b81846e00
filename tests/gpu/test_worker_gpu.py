"The worker on a GPU, as processes that load files of the published shapes: start, faults, signals, and a soak of 500 mixed jobs"
import functools, json, lzma, os, re, statistics, subprocess, sys, time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
import pytest
from worker_tools import PATH, ROOT, Proc, check, orcd, rss, soak

pytestmark = pytest.mark.gpu
QWEN, PHI, OSS = 'qwen2.5-0.5b-instruct-q4_k_m', 'phi-3-mini-4k-instruct-q4', 'gpt-oss-20b-mxfp4'
KINDS = {QWEN: ('Q4_K_M', 'gguf-bpe'), PHI: ('Q4_K_M', 'gguf-bpe'), OSS: ('MXFP4', 'hf-json')} # quant_kind, tokenizer_kind
LONG = '0123456789' * 3000 # 30,000 tokens for Qwen, a second and more of prefill
DEMO = ROOT / 'orcd' / 'demo' / 'haiku-qwen2-q4_k_m.gguf'


@pytest.fixture(scope='module')
def model(shared, tmp_path_factory):
    "Name -> path, in a folder of its own (a link: the file is large), with tokenizer.json where it belongs"
    @functools.cache
    def make(name):
        file, folder = Path(os.environ.get('ORCD_FULL_SHAPE', '/dev/shm')) / f'{name}.gguf', tmp_path_factory.mktemp(name)
        if not file.exists(): subprocess.run([sys.executable, str(shared / 'full_shape.py'), name, str(file)], check=True, stdout=subprocess.DEVNULL)
        (folder / file.name).symlink_to(file)
        if name == OSS: (folder / 'tokenizer.json').write_bytes(lzma.decompress((shared / 'gpt-oss-20b.tokenizer.json.xz').read_bytes()))
        return folder / file.name
    return make


def serve(path, *flags, wait=True, env=None):
    return orcd('serve', '--model', str(path), '--port', '0', '--log-format', 'json', *flags, wait=wait, env=env)

@pytest.fixture(scope='module')
def w(model):
    "One worker for all tests that leave it alive"
    with serve(model(QWEN)) as w:
        yield w
        w.signal()
        assert w.end(60) == 0


def vram_used():
    "Bytes in use on GPU 0, by whomever"
    command = ['nvidia-smi', '-i', '0', '--query-gpu=memory.used', '--format=csv,noheader,nounits']
    return int(subprocess.run(command, capture_output=True, text=True).stdout) * 2**20

@contextmanager
def ballast(but):
    "Another process (this one) takes all VRAM but so many bytes"
    from test_engine import give_back, take_all_but
    taken = take_all_but(but)
    try: yield
    finally: give_back(taken)

def logged(w, *names): return [e for e in w.log if e['event'] in names]
def text(events): return ''.join(e['t'] for e in events if e['type'] == 'token')
def alive(w):
    w.wait_state('ready')
    assert w.execute('alive', prompt='Rain', max_tokens=4, seed=1).all()[-1]['tokens_out'] == 4


# --- start, health, end

def growth(w):
    "Anonymous memory of a worker that starts, from the first byte that is copied until it is ready"
    before = most = now = 0
    while w.p.poll() is None and not logged(w, 'ready'):
        with suppress(OSError, StopIteration): now = rss(w.p.pid)
        if logged(w, 'model_load_start'): most = max(most, now)
        else: before = now
        time.sleep(.002)
    assert 0 < before <= most, w.raw
    return most - before

def info(path, n_ctx):
    "What `orcd info` says that weights, KV cache and workspace take"
    command = [sys.executable, '-m', 'orcd.serve.cli', 'info', str(path), '--context-length', str(n_ctx)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | dict(PYTHONPATH=PATH)).stdout
    mib = lambda what: float(re.search(rf'^  {what} +([\d,.]+) MiB', out, re.M)[1].replace(',', ''))
    return [mib(what) * 2**20 for what in ('weights', 'kv_cache', 'workspace')]

@pytest.mark.parametrize('name', KINDS)
def test_published_shape(name, model):
    path, before = model(name), vram_used()
    began = time.monotonic()
    with serve(path, wait=False) as w:
        grown = growth(w)
        ready = time.monotonic() - began
        w.ready()
        order = ['startup', 'model_load_start', 'model_load_complete', 'ready']
        assert [e['event'] for e in logged(w, *order)] == order
        assert [e['percent'] for e in logged(w, 'model_load_progress')] == [0, 25, 50, 75, 100]
        h, taken = w.health(), vram_used() - before
        assert h['resident'] is True and h['gpu_device'] == 0 and h['sm'] >= 75 and (h['quant_kind'], h['tokenizer_kind']) == KINDS[name]
        parts = info(path, h['context_length'])
        assert abs(h['vram_bytes_used'] - sum(parts)) < .05*sum(parts) and parts[0] > .95*path.stat().st_size - (24 << 20) # less its header
        assert .99*sum(parts) < taken < 1.05*sum(parts) + (1 << 30) # a CUDA context takes about half a GiB
        s = w.execute(prompt='Rain', max_tokens=256, seed=1, temperature=.8)
        events = [s.next(), s.next()]
        assert [e['type'] for e in events] == ['started', 'token'] and w.health()['state'] == 'busy'
        events += s.frames()
        check(events)
        assert events[-1]['type'] == 'end' and (len(events) > 100 or events[-1]['stop_reason'] == 'EOS')
        maps = Path(f'/proc/{w.p.pid}/maps').read_text()
        assert 'libcuda' in maps and '.gguf' not in maps
        print(f'{name}: ready after {ready:.2f} s, VRAM {h["vram_bytes_used"] >> 20} MiB, {taken >> 20} with the context; anonymous host memory +{grown >> 20} MiB during the load; '
              f'{events[-1]["tokens_out"] / events[-1]["decode_time_ms"] * 1e3:.0f} tok/s')
        assert grown < 512 << 20
        w.signal()
        assert w.end(60) == 0 and w.log[-1]['event'] == 'shutdown'
    assert vram_used() <= before + (64 << 20)


def test_no_such_device(model):
    "One error line that names the way out, exit code 1"
    with ExitStack() as stack:
        cases = [(('--gpu-device', '99'), {}), *(((), dict(CUDA_VISIBLE_DEVICES=v)) for v in ('', '99', 'nonsense'))]
        for w in [stack.enter_context(serve(model(QWEN), *flags, wait=False, env=env)) for flags, env in cases]:
            assert w.end(60) == 1
            e, = logged(w, 'error')
            assert (e['code'], e['model_path']) == ('CUDA_ERROR', str(model(QWEN))) and '--device reference' in e['message'], e
            assert all(line.startswith('{') for line in w.raw) and 'Traceback' not in ''.join(w.raw)


def test_too_little_memory(model):
    "Said before a byte is copied, with both numbers and what would fit"
    with ballast(1 << 30), serve(model(PHI), wait=False) as w:
        assert w.end(60) == 1
        e, = logged(w, 'error')
        assert e['code'] == 'INSUFFICIENT_VRAM' and e['required_bytes'] > e['available_bytes'] > 0 == e['max_context'], e
        assert not logged(w, 'model_load_start') and 'Traceback' not in ''.join(w.raw)
    with ballast(300 << 20), serve(model(QWEN), wait=False) as w: # perhaps not even a CUDA context fits
        assert w.end(60) == 1
        e, = logged(w, 'error')
        assert e['code'] in ('INSUFFICIENT_VRAM', 'CUDA_ERROR') and 'Traceback' not in ''.join(w.raw)


def test_kernel_cache_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with serve(DEMO, env=dict(ORCD_CACHE_DIR=str(tmp_path / 'file' / 'cache'))) as w: alive(w)


# --- jobs, on one worker

def test_health_during_a_long_prefill(w):
    def look():
        began = time.monotonic()
        state = w.health()['state']
        return time.monotonic() - began, state
    idle = statistics.median(look()[0] for _ in range(50))
    s = w.execute(prompt=LONG, max_tokens=4, timeout=120)
    assert s.next()['type'] == 'started'
    times, states = zip(*[look() for _ in range(100)])
    assert list(s.frames())[-1]['tokens_out'] == 4 and set(states) == {'busy'}
    print(f'/health during a prefill of 30,000 tokens: median {statistics.median(times) * 1e3:.1f} ms, 95 % {sorted(times)[95] * 1e3:.1f} ms')
    assert sorted(times)[95] < 20 * idle
    alive(w)


@pytest.mark.parametrize('prompt', [LONG, 'Rain'], ids=['prefill', 'decode'])
def test_cancel(w, prompt):
    s = w.execute('c', prompt=prompt, max_tokens=2000, timeout=120)
    s.next()
    if prompt == 'Rain': s.next()
    for _ in range(2): assert w.post('/cancel/c')[0] == 202
    assert list(s.frames())[-1]['code'] == 'CANCELLED'
    alive(w)


@pytest.mark.parametrize('prompt', [LONG, 'Rain'], ids=['prefill', 'decode'])
def test_client_gone(w, prompt):
    s = w.execute('gone', prompt=prompt, max_tokens=2000, timeout=120)
    s.next()
    s.close()
    w.wait_state('ready')
    alive(w)


def test_a_full_device(w):
    "Another process takes all the VRAM there is: jobs need none"
    def run(): return text(w.execute(prompt=LONG[:5000], seed=3, max_tokens=64).all())
    want, used = run(), w.health()['vram_bytes_used']
    with ballast(0):
        for _ in range(3): assert run() == want
        assert w.health()['status'] == 'healthy' and w.health()['vram_bytes_used'] == used


def test_two_workers_on_one_gpu(w, model):
    with serve(model(QWEN), '--context-length', '1024') as b:
        streams = [x.execute(prompt='Rain', seed=3, max_tokens=64) for x in (w, b)]
        a, b = (text(s.all()) for s in streams)
        assert a == b and a


def test_soak(w):
    seen = soak(w, 500, vram=vram_used)
    texts, speeds, host, vram = zip(*seen)
    mib = lambda a: f'{a[2] >> 20} -> {a[-1] >> 20} MiB'
    print(f'first {speeds[1]:.0f} tok/s, last {speeds[-1]:.0f} tok/s, host {mib(host)}, VRAM {mib(vram)}')
    assert len(set(texts)) == 1, 'the same seed gave different texts'
    assert len(set(vram)) == 1, f'VRAM is not constant: {vram}'
    assert host[-1] < host[2] + (32 << 20), host
    assert statistics.median(speeds[-5:]) > .8 * statistics.median(speeds[1:6])


def test_a_job_larger_than_its_cache(model):
    "A KV budget too small for the job: VRAM_OOM, unhealthy until the next job succeeds; several times in a row"
    with serve(model(QWEN), '--context-length', '8192', '--kv-cache-size-mb', '8') as w:
        for _ in range(3):
            assert w.execute(prompt='rain ' * 3000, max_tokens=4).all()[-1]['code'] == 'VRAM_OOM' and w.health()['status'] == 'unhealthy'
            assert w.execute(prompt='rain', max_tokens=4).all()[-1]['type'] == 'end' and w.health()['status'] == 'healthy'
        *_, last = w.execute(prompt='rain ' * 500, max_tokens=2000).all() # full in the middle of the text
        assert last['code'] == 'VRAM_OOM' and w.health()['status'] == 'unhealthy'
        alive(w)
        assert w.health()['status'] == 'healthy'


# --- the end of the process

@pytest.mark.parametrize('phase', ['prefill', 'decode', 'twice'])
def test_sigterm(model, phase):
    "The running job finishes; a second signal cancels it. VRAM is free afterwards, the exit code 0"
    before = vram_used()
    with serve(model(QWEN)) as w:
        prompt, n, seen = ('Rain', 2000, 3) if phase == 'decode' else (LONG, 8, 1)
        s = w.execute(prompt=prompt, max_tokens=n, timeout=120)
        events = [s.next() for _ in range(seen)]
        w.signal()
        w.event('signal')
        if phase == 'twice': w.signal(); w.event('signal', n=2)
        else: assert w.health()['state'] == 'draining'
        events += s.frames()
        check(events)
        assert events[-1]['code'] == 'CANCELLED' if phase == 'twice' else events[-1]['tokens_out'] == n
        assert w.end(60) == 0 and w.log[-1]['event'] == 'shutdown'
    assert vram_used() <= before + (64 << 20)


def test_sigterm_during_load(model):
    before = vram_used()
    with serve(model(OSS), wait=False) as w:
        w.event('model_load_progress', 60)
        w.signal()
        assert w.end() == 0
        assert w.log[-1]['event'] == 'shutdown' and not logged(w, 'ready', 'error')
    assert vram_used() <= before + (64 << 20)


def test_lost_context():
    "A kernel writes to address 0: the job gets its error, /health says 503, the process ends for its supervisor to restart it"
    before, w = vram_used(), Proc(['fatal_worker.py', json.dumps(dict(model=str(DEMO), queue_depth=1))])
    try:
        alive(w)
        a, b = w.execute('a', prompt='wild write', max_tokens=8), w.execute('b', prompt='Rain', max_tokens=8)
        last = a.all()[-1]
        assert (last['code'], last['retriable']) == ('CUDA_ERROR', False) and b.all()[-1]['code'] == 'CUDA_ERROR'
        status, _, h = w.request('GET', '/health')
        assert (status, h['status']) == (503, 'unhealthy')
        assert w.post('/execute', dict(job_id='c', prompt='x'))[0] in (500, 503)
        assert w.end(60) == 1 and any(e.get('fatal') for e in logged(w, 'error'))
    finally:
        if w.p.poll() is None: w.p.kill()
        w.p.wait(10)
    assert vram_used() <= before + (64 << 20)
