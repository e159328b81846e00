"""How a worker's process begins and ends: signals in every phase, descriptors that are closed, files that are no files, errors outside
of jobs"""
import json, os, resource, signal, socket, subprocess, sys, tempfile, threading, time
import pytest
from worker_tools import PATH, ROOT, worker

ENDING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
FAR = 120   # seconds that nobody waits for


def run(*args, env=None, cwd=None, before=None, **kw):
    "(exit code, stdout, stderr) of the command line"
    e = {k: v for k, v in dict(os.environ, PYTHONPATH=PATH, **(env or {})).items() if v is not None}
    r = subprocess.run([sys.executable, '-m', 'orcd.serve.cli', *map(str, args)], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, cwd=cwd or ROOT,
        env=e, timeout=FAR, preexec_fn=before, **kw)
    return r.returncode, r.stdout, r.stderr


def errors(text): return [e for e in map(json.loads, filter(lambda l: l.startswith('{'), text.splitlines())) if e['event'] == 'error']


# --- signals

@pytest.mark.parametrize('sig', ENDING)
def test_signals_while_python_imports(sig):
    "Before there is anything to end in order: exit code 0 at once. The import that never ends stands for a slow disk."
    code = """import sys
from orcd.serve import start
start.begin(['serve'])
class Slow:
    def find_spec(self, name, *a):
        if name == 'typer': print('importing', flush=True); import time; time.sleep(1e6)
sys.meta_path.insert(0, Slow())
start.main()"""
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=PATH))
    assert p.stdout.readline() == b'importing\n'
    p.send_signal(sig)
    out, err = p.communicate(timeout=FAR)
    assert (p.returncode, out, err) == (0, b'', b'')


@pytest.mark.parametrize('when', ['importing', 'at the end'])
def test_ctrl_c_outside_of_a_command(when):
    "ends the process without a traceback, before there is a command and after it"
    code = f"""import atexit, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from orcd.serve import start
def wait(): print('here', flush=True); time.sleep(1e6)
class Slow:
    def find_spec(self, name, *a):
        if name == 'typer': wait()
if {when == 'importing'}: sys.meta_path.insert(0, Slow())
else: atexit.register(wait)
sys.argv = ['orcd', '--version']
start.main()"""
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=PATH))
    while p.stdout.readline() != b'here\n': assert p.poll() is None
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=FAR)
    assert (p.returncode, out, err) == (-signal.SIGINT, b'', b'')


@pytest.mark.parametrize('sig', ENDING)
@pytest.mark.parametrize('times', [1, 2])
def test_a_load_that_does_not_come_back(sig, times):
    "is left behind: one `shutdown`, no error, exit code 0"
    with worker(env=dict(FAKE_LOAD='stuck'), wait=False, stop_s=.5) as w:
        w.event('startup')
        for _ in range(times): w.signal(sig)
        assert w.end(FAR) == 0
        names = [e['event'] for e in w.log]
        assert (names[-1] == 'shutdown' and names.count('shutdown') == 1 and w.log[-1]['exit_code'] == 0 and 'error' not in names
            and 'ready' not in names)


def test_sighup_lets_the_job_finish():
    with worker() as w:
        s = w.execute(prompt='tokens:40@0.01')
        s.next()
        w.signal(signal.SIGHUP)
        assert list(s.frames())[-1]['type'] == 'end' and w.end(FAR) == 0 and w.p.stdout.read() == b'closed\n'


def test_nohup_is_respected():
    script = ("import os, signal\nfrom orcd.serve.start import Signals\nwith Signals() as s: os.kill(os.getpid(), signal.SIGHUP); "
        "print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)")
    r = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), env=dict(os.environ, PYTHONPATH=PATH))
    assert (r.returncode, r.stdout) == (0, 'True\n')


def test_signals_leave_everything_as_it_was():
    from orcd.serve.start import Signals
    before = [signal.getsignal(s) for s in ENDING]
    heard, told = [], threading.Event()
    with Signals() as s:
        s.tell(lambda name: (heard.append(name), told.set()))
        os.kill(os.getpid(), signal.SIGTERM)
        assert told.wait(FAR) and heard == ['SIGTERM']
    assert [signal.getsignal(x) for x in ENDING] == before
    fd = signal.set_wakeup_fd(-1)
    assert fd == -1
    s.close()


def test_many_signals_at_once():
    with worker() as w:
        s = w.execute(prompt='tokens:2000@0.01')
        s.next()
        w.signal()
        w.event('signal')                              # signals that nobody has heard yet may become one
        for _ in range(60): w.signal()
        assert list(s.frames())[-1]['code'] == 'CANCELLED' and w.end(FAR) == 0
        assert [e['event'] for e in w.log].count('shutdown') == 1 and sum(e['event'] == 'signal' for e in w.log) <= 2


def test_a_main_thread_that_is_blocked():
    "by a name server, say: the process ends all the same, the log says that it was forced"
    code = """import sys, time
import fake_worker, orcd.serve.worker as w
def bind(*a): time.sleep(1e6)
w.bind = bind
sys.exit(w.serve(w.Settings(model='fake.gguf', port=0, stop_s=.5), fake_worker.load))"""
    p = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True, cwd=ROOT / 'tests',
        env=dict(os.environ, PYTHONPATH=PATH))
    assert '"startup"' in p.stderr.readline()
    p.send_signal(signal.SIGTERM)
    text = p.communicate(timeout=FAR)[1]
    last = json.loads(text.splitlines()[-1])
    assert p.returncode == 0 and (last['event'], last['exit_code'], last['forced']) == ('shutdown', 0, True)


def test_a_callback_that_is_not_answered_keeps_no_process():
    with socket.create_server(('127.0.0.1', 0)) as silent:
        with worker(callback_url=f'http://127.0.0.1:{silent.getsockname()[1]}/', stop_s=1) as w:
            silent.accept()
            w.signal()
            assert w.end(FAR) == 0 and w.log[-1]['event'] == 'shutdown'


def test_no_memory_for_another_thread():
    "The process ends in order: whatever that needs was there before"
    code = """import sys, threading
import fake_worker, orcd.serve.worker as w
def start(self): raise RuntimeError("can't start new thread")
told = w.Process.told
def without(self, name):
    threading.Thread.start = start
    told(self, name)
w.Process.told = without
sys.exit(w.serve(w.Settings(model='fake.gguf', port=0), fake_worker.load))"""
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT / 'tests',
        env=dict(os.environ, PYTHONPATH=PATH))
    with p:
        while '"ready"' not in p.stderr.readline(): pass
        p.send_signal(signal.SIGTERM)
        try: out, text = p.communicate(timeout=FAR)
        finally: p.kill()
    assert p.returncode == 0 and out == 'closed\n' and not errors(text) and json.loads(text.splitlines()[-1])['event'] == 'shutdown'


# --- time that does not count

def test_a_frozen_process_has_no_hanging_engine():
    "A job that was cancelled when the process was stopped for four times as long as an engine may take to answer"
    with worker(hang_s=1) as w:
        s = w.execute(prompt='prefill:100')
        s.next()
        c = w.connect()
        c.sendall(b'POST /cancel/1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n')
        w.p.send_signal(signal.SIGSTOP)
        time.sleep(4)                                  # a thing that must not be noticed, so nothing to wait for
        w.p.send_signal(signal.SIGCONT)
        assert list(s.frames())[-1]['code'] == 'CANCELLED'
        w.wait_state('ready')
        assert w.execute(prompt='a').all()[-1]['type'] == 'end' and not any(e['event'] == 'error' for e in w.log)


def test_watching_forgives_frozen_time():
    from types import SimpleNamespace as NS
    from orcd.serve.jobs import Job
    from orcd.serve.worker import Settings, Worker
    ended, job = [], Job(NS(job_id='1', params={}), 'c', NS(put=lambda x: None))
    w = Worker.__new__(Worker)
    w.settings, w.answers, w.jobs = Settings(hang_s=10), set(), NS(active={'1': job}, abandon=ended.append)
    job.cancel()
    t = job.stopped_at
    w.look(t + 9, 0); w.look(t + 109, 100); assert not ended            # 9 s of its own
    w.look(t + 109.9, 0); assert not ended
    w.look(t + 110.1, 0); assert ended == [job]


# --- errors outside of jobs

def test_a_model_that_cannot_be_asked_is_a_failed_start():
    with worker(env=dict(FAKE_LOAD='facts'), wait=False) as w:
        assert w.end(FAR) == 1
        assert (len(errors('\n'.join(w.raw))) == 1 and w.log[-1]['event'] == 'shutdown' and w.p.stdout.read() == b'closed\n'
            and 'ready' not in [e['event'] for e in w.log])


def test_an_error_after_a_job_replaces_the_process():
    with worker(queue_depth=1) as w:
        a, b = w.execute('a', prompt='prefill:1 forget'), w.execute('b', prompt='x')
        assert a.all()[-1]['type'] == 'end' and b.all()[-1]['code'] == 'INTERNAL'
        status, _, h = w.request('GET', '/health')
        assert (status, h['status']) == (503, 'unhealthy') and w.post('/execute', dict(job_id='c', prompt='x'))[0] in (500, 503)
        assert w.end(FAR) == 1 and w.event('error')['fatal']


def test_a_watcher_that_fails_replaces_the_process():
    code = """import sys
import fake_worker, orcd.serve.worker as w
def look(*a): raise ZeroDivisionError('a bug')
w.Worker.look = look
sys.exit(w.serve(w.Settings(model='fake.gguf', port=0, hang_s=.4), fake_worker.load))"""
    r = subprocess.run([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True, cwd=ROOT / 'tests',
        env=dict(os.environ, PYTHONPATH=PATH), timeout=FAR)
    assert r.returncode == 1 and errors(r.stderr)[0]['fatal'] and 'a bug' in errors(r.stderr)[0]['message'] and '"shutdown"' in r.stderr


# --- busy before any work

def test_busy_is_said_before_a_prompt_is_tokenised():
    """A prompt that is far too long for the context, and a stop string of too many tokens: a busy worker says that it is busy, an idle
    one what is wrong"""
    with worker() as w:
        long = dict(prompt='a ' * 5000)
        s = w.execute('long', prompt='tokens:100000@0.01')
        s.next()
        assert w.post('/execute', dict(job_id='b', **long))[2]['code'] == 'WORKER_BUSY'
        assert w.post('/execute', dict(job_id='b', prompt='a', stop='x ' * 50))[2]['code'] == 'WORKER_BUSY'
        assert w.post('/execute', dict(job_id='long', **long))[0] == 409
        assert w.post('/execute', dict(job_id='b', top_p=7, **long))[0] == 400, 'what costs nothing to see is said, busy or not'
        w.post('/cancel/long'); list(s.frames())
        w.wait_state('ready')
        assert w.post('/execute', dict(job_id='b', **long))[0] == 400
        fields = [e['field'] for e in w.post('/execute', dict(job_id='b', prompt='a', top_p=7, stop='x ' * 50))[2]['errors']]
        assert fields == ['top_p', 'stop'], 'every rule at once'


# --- descriptors and terminals

def close(*fds): return lambda: [os.close(fd) for fd in fds]


def test_closed_descriptors():
    "The log goes nowhere, and not into whatever file got its number"
    serve = ['serve', '--model', 'missing.gguf', '--device', 'reference', '--port', '0']
    for fds in (2,), (1,), (0, 1, 2):
        code, out, err = run(*serve, before=close(*fds))
        assert code == 1 and out == '' and len(errors(err)) == (2 not in fds)
    assert run('--version', before=close(1)) == (0, '', '')


def test_the_first_file_does_not_become_stderr(tmp_path):
    "A worker without stderr serves, and its model is what it was"
    from orcd.files.hub import find_model
    model = tmp_path / 'm.gguf'
    model.write_bytes(find_model("demo").read_bytes())
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    p = subprocess.Popen([sys.executable, '-m', 'orcd.serve.cli', 'serve', '--model', str(model), '--device', 'reference', '--port',
        str(port)], preexec_fn=close(0, 1, 2), cwd=ROOT, env=dict(os.environ, PYTHONPATH=PATH))
    try:
        end = time.monotonic() + FAR
        while True:
            try: socket.create_connection(('127.0.0.1', port), 5).close(); break
            except OSError: assert time.monotonic() < end and p.poll() is None; time.sleep(.05)
        links = [os.readlink(f'/proc/{p.pid}/fd/{n}') for n in range(3)]
        assert links == ['/dev/null'] * 3 and model.read_bytes() == find_model("demo").read_bytes()
        p.terminate()
        assert p.wait(FAR) == 0
    finally:
        if p.poll() is None: p.kill(); p.wait()


def test_a_terminal_that_cannot_show_everything():
    code, out, err = run('generate', 'demo', 'Write a haiku about GPU computing', '--device', 'reference', '-n', '40', '--temperature',
        '0', env=dict(PYTHONIOENCODING='ascii', PYTHONUTF8='0'))
    assert code == 0 and err == '' and out.isascii()
    whole = run('generate', 'demo', 'Write a haiku about GPU computing', '--device', 'reference', '-n', '40', '--temperature', '0',
        env=dict(PYTHONIOENCODING='utf-8'))[1]
    assert out == whole.encode('ascii', 'backslashreplace').decode() and not whole.isascii()


def test_text_that_the_terminal_could_not_read():
    "In the C locale without its usual remedies Python reads every byte above 127 as half a surrogate pair"
    plain = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    ask = ['generate', 'demo', '--device', 'reference', '-n', '3', '--seed', '1']
    assert run(*ask, 'Größe 雨', env=plain) == run(*ask, 'Größe 雨', env=dict(LC_ALL='C.UTF-8'))
    code, out, err = run(*ask, b'Gr\xf6\xdfe'.decode('utf-8', 'surrogateescape'))
    assert (code, out) == (2, '') and err == 'orcd: PROMPT: not UTF-8 text\n'


def test_a_full_disk_and_a_reader_that_left():
    with open('/dev/full', 'w') as full:
        p = subprocess.run([sys.executable, '-m', 'orcd.serve.cli', '--version'], stdout=full, stderr=subprocess.PIPE, text=True,
            env=dict(os.environ, PYTHONPATH=PATH))
    assert (p.returncode, p.stderr) == (1, 'orcd: No space left on device\n')
    read, write = os.pipe(); os.close(read)
    for args in ['--version'], ['generate', 'demo', 'hi', '--device', 'reference', '-n', '30']:
        p = subprocess.run([sys.executable, '-m', 'orcd.serve.cli', *args], stdout=write, stderr=subprocess.PIPE, text=True,
            env=dict(os.environ, PYTHONPATH=PATH))
        assert (p.returncode, p.stderr) == (0, '')
    os.close(write)


# --- files and flags that are not what they should be

@pytest.fixture
def odd(tmp_path):
    "A folder of things that are no models"
    os.mkfifo(tmp_path / 'fifo'); (tmp_path / 'folder').mkdir(); (tmp_path / 'empty').touch()
    (tmp_path / 'broken').symlink_to('nowhere'); (tmp_path / 'loop').symlink_to('loop')
    with socket.socket(socket.AF_UNIX) as s:
        here = os.getcwd(); os.chdir(tmp_path)
        try: s.bind('socket')
        finally: os.chdir(here)
    return tmp_path


@pytest.mark.parametrize('name', ['fifo', 'folder', 'empty', 'broken', 'loop', 'socket', '/dev/zero', 'x' * 300, '~nobody-at-all/x.gguf',
    'empty/x', 'a/b/c.gguf'])
def test_what_is_no_model(odd, name, monkeypatch):
    from orcd.serve import cli
    code, out, err = run('serve', '--model', name, '--device', 'reference', '--port', '0', '--log-format', 'json', cwd=odd)
    assert code == 1 and [e['code'] for e in errors(err)] == ['MODEL_LOAD_FAILED'] and 'Traceback' not in err and errors(err)[0]['message']
    monkeypatch.chdir(odd)
    assert cli.run(['info', name]) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_no_permission(odd):
    (odd / 'empty').chmod(0); (odd / 'folder').chmod(0)
    for name in 'empty', 'folder/x':
        code, _, err = run('serve', '--model', name, '--device', 'reference', '--port', '0', '--log-format', 'json', cwd=odd)
        assert code == 1 and errors(err)[0]['code'] == 'MODEL_LOAD_FAILED' and 'ermission' in errors(err)[0]['message']


@pytest.mark.parametrize('flag', ['--settings', '--token-file'])
@pytest.mark.parametrize('name', ['fifo', 'folder', 'broken', 'loop', 'socket', '/dev/zero', '/dev/full', 'x' * 300, 'missing'])
def test_what_is_no_settings_or_token_file(odd, flag, name, monkeypatch, capsys):
    from orcd.serve.cli import run
    monkeypatch.chdir(odd)
    assert run(['serve', '--model', 'm', flag, name]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and err.startswith(f'orcd: {flag}: ')


@pytest.mark.parametrize('text, says', [('[worker]\nprot = 1\n', "'prot'"), ('[worker]\nport = 1\nport = 2\n', "'port'"),
    ('[worker]\nport=1\n[worker]\n', "'worker'"), ('[wroker]\nport = 1\n', "'wroker'"),
    ('[DEFAULT]\nport = 1\n[worker]\n', "'port'"), ('port = 1\n', 'section'), ('[worker]\nport\n', 'line'), ('\udcff\udcfe', 'UTF-8'),
    ('[worker]\nport = 99999\n', '99999'), ('[worker]\nport =\n', 'port'), ('x' * (2 << 20), 'MiB')])
def test_settings_that_are_wrong(tmp_path, text, says, capsys):
    from orcd.serve.cli import run
    (tmp_path / 's.ini').write_bytes(text.encode('utf-8', 'surrogateescape'))
    assert run(['serve', '--model', 'm', '--settings', str(tmp_path / 's.ini')]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and says in err, err


@pytest.mark.parametrize('text', ['x', 'short-token-15ch', '', 'two words of some length', 'line-of-16-chars\nanother',
    'umläut-umläut-umläut', 'null\0null\0null\0null'])
def test_tokens_that_are_wrong(tmp_path, text, capsys):
    from orcd.serve.cli import run
    (tmp_path / 't').write_text(text[:15] if text.startswith('short') else text)
    assert run(['serve', '--model', 'm', '--token-file', str(tmp_path / 't')]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and '--token-file' in err and (len(text) < 5 or text[:15] not in err), 'a secret is not printed'


@pytest.mark.parametrize('ini, refused', [('host = 0.0.0.0\ninsecure = yes', True), ('host = 0.0.0.0\ntoken-file = token', True),
    ('host = 0.0.0.0', True), ('host = 127.0.0.1\ninsecure = yes', False), ('queue-depth = 1', False)])
def test_a_settings_file_that_nobody_named_opens_nothing(tmp_path, ini, refused, monkeypatch):
    from orcd.serve.cli import worker_settings
    from orcd.errors import UsageError
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'token').write_text('0123456789abcdef')
    (tmp_path / 'settings.ini').write_text(f'[worker]\nmodel = m\n{ini}\n')
    def host(given=None, settings=None): return worker_settings(given or {}, settings)['host']
    if not refused: assert host() == '127.0.0.1'
    else:
        with pytest.raises(UsageError, match='--host'): host()
    assert host({'host': '0.0.0.0', 'token-file': 'token'}) == '0.0.0.0', 'whoever says it means it'
    if 'token' in ini or 'insecure' in ini:
        if refused: assert host(settings='settings.ini') == '0.0.0.0', 'who names the file says what is in it'
        with pytest.raises(UsageError, match='./settings.ini'): host({'host': '0.0.0.0'})
    monkeypatch.setenv('ORCD_HOST', '127.0.0.1')
    assert host() == '127.0.0.1'


def test_a_settings_file_of_another_program(tmp_path, monkeypatch):
    from orcd.serve.cli import read_settings
    monkeypatch.chdir(tmp_path)
    assert read_settings() == {}
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nlib_name = other\n')
    assert read_settings() == {}
    (tmp_path / 'settings.ini').write_text('\ufeff[worker]\nport = 7\n')
    assert read_settings() == dict(port='7')


@pytest.mark.parametrize('host, port, says',
    [('192.0.2.7', '0', '--host: 192.0.2.7:0'), ('no such host', '0', '--host'), ('x' * 70, '0', '--host')])
def test_addresses_that_are_wrong(host, port, says):
    code, _, err = run('serve', '--model', 'demo', '--device', 'reference', '--host', host, '--port', port, '--insecure',
        '--log-format', 'json')
    assert code == 1 and [e['code'] for e in errors(err)] == ['MODEL_LOAD_FAILED'] and errors(err)[0]['message'].startswith(says)


def test_a_port_in_use_is_named():
    with socket.create_server(('127.0.0.1', 0)) as s:
        port = s.getsockname()[1]
        code, _, err = run('serve', '--model', 'demo', '--device', 'reference', '--port', port, '--log-format', 'json')
    e, = errors(err)
    assert ((code, e['code'], e['model_path']) == (1, 'MODEL_LOAD_FAILED', 'demo')
        and f'--port: 127.0.0.1:{port} is in use' in e['message'] and 'exception' not in e)


def test_addresses_in_brackets():
    from orcd.serve.cli import guard, resolve_settings
    assert resolve_settings({'host': '[::1]'}, {}, {})['host'] == '::1'
    guard('::1', None, False)


# --- homes

def test_tilde_is_the_home(tmp_path, monkeypatch):
    "In every place where a path is taken"
    import orcd as package
    from orcd.serve.cli import complete_model, read_settings, read_token, resolve_settings
    from orcd.files.hub import find_model, models_dir
    model = tmp_path / 'x.gguf'
    model.write_bytes(find_model("demo").read_bytes())
    (tmp_path / 's.ini').write_text('[worker]\nport = 7\ntoken-file = ~/t\n'); (tmp_path / 't').write_text('0123456789abcdef')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert find_model('~/x.gguf') == model
    with package.load('~/x.gguf', device='reference', progress=False) as m: assert m.config.arch == 'qwen2'
    with package.GGUF('~/x.gguf') as g: assert g.path == str(model)
    s = resolve_settings({}, {}, read_settings('~/s.ini'))
    assert (s['port'] == 7 and read_token(s['token_file']) == '0123456789abcdef'
        and resolve_settings({}, {'ORCD_TOKEN_FILE': '~/t'}, {})['token_file'] == str(tmp_path / 't'))
    assert complete_model('~/x') == ['~/x.gguf']
    monkeypatch.setenv('ORCD_CACHE_DIR', '~/cache')
    assert models_dir() == tmp_path / 'cache' / 'models'
    from orcd.kernels.nvrtc import cache_dir
    assert cache_dir() == tmp_path / 'cache' / 'kernels'


def test_no_home(monkeypatch):
    "A user without an entry and without HOME, as in many containers"
    from pathlib import Path
    from orcd.files import hub
    from orcd.kernels import nvrtc
    from orcd.errors import HubError, ModelError
    def nobody(): raise RuntimeError('Could not determine home directory.')
    monkeypatch.setattr(Path, 'home', nobody)
    for k in 'ORCD_CACHE_DIR', 'XDG_CACHE_HOME': monkeypatch.delenv(k, raising=False)
    with pytest.raises(HubError, match='ORCD_CACHE_DIR'): hub.models_dir()
    with pytest.raises(ModelError, match='ORCD_CACHE_DIR'): hub.find_model('qwen2.5-0.5b')
    assert nvrtc.cache_dir() is None and hub.find_model('demo').is_file()


def test_an_empty_variable_is_none(monkeypatch):
    from orcd.serve.cli import resolve_settings
    empty = {f'ORCD_{k}': v for k, v in dict(PORT='', HOST=' ', MODEL='', TOKEN_FILE='', DEVICE='', GPU_DEVICE='reference').items()}
    s = resolve_settings({}, empty, {'port': '7', 'model': 'm'})
    assert (s['port'], s['host'], s['model'], s['token_file'], s['gpu_device']) == (7, '127.0.0.1', 'm', None, 'reference')


# --- a chat that outgrows its context

def chat(said, *flags):
    r = subprocess.run([sys.executable, '-m', 'orcd.serve.cli', 'chat', 'demo', '--device', 'reference', '--temperature', '0', *flags],
        input=said if isinstance(said, bytes) else said.encode(), capture_output=True, cwd=ROOT, env=dict(os.environ, PYTHONPATH=PATH),
        timeout=FAR)
    return r.returncode, r.stdout.decode(), r.stderr.decode()


@pytest.mark.parametrize('command', [['generate', 'demo', '-'], ['chat', 'demo']])
def test_an_input_that_does_not_end(command):
    "is not read into memory for ever: the writer is told, by its broken pipe"
    code = "import sys, orcd.serve.cli as c; c.MAX_READ = 1 << 16; c.main(sys.argv[1:])"
    p = subprocess.Popen([sys.executable, '-c', code, *command, '--device', 'reference'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=PATH))
    with pytest.raises(BrokenPipeError):
        for _ in range(1 << 14): os.write(p.stdin.fileno(), b'a' * (1 << 16))
    p.stdin.close()
    assert p.wait(FAR) == 2 and b'more than' in p.stderr.read()


def test_a_chat_forgets_its_oldest_turns():
    lines = [f'Write a haiku about rain and the sea, number {i}' for i in range(6)]
    code, out, err = chat('\n'.join(lines), '--context-length', '96', '-n', '24')
    assert code == 0 and 'forgetting the oldest turn' in err and 'context of 96' in err
    assert len([p for p in out.split('\n') if p.strip()]) >= 6, 'every question has its answer'


def test_a_question_that_is_too_long_is_told_and_the_chat_goes_on():
    code, out, err = chat('rain ' * 400 + '\nWrite a haiku about rain\n', '--context-length', '64', '-n', '20')
    assert code == 0 and err.count('\n') == 1 and 'the context 64' in err and out.strip()
    assert chat('hi\n', '--temperature', '7')[0] == 1, 'a wrong flag is no question'


def test_a_line_that_is_no_text():
    code, out, err = chat(b'caf\xe9\nrain\n', '-n', '4')
    assert code == 0 and err == '(this line: not UTF-8 text)\n' and out.strip()


@pytest.mark.parametrize('n', [5, 8, 12, 31])
@pytest.mark.parametrize('command', [('info', 'demo'), ('serve', '--model', 'demo', '--device', 'reference', '--port', '0')],
    ids=['info', 'serve'])
def test_too_few_files(n, command):
    code, out, err = run(*command, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (n, n)))
    assert (code, out) == (1, '') and len(err.splitlines()) == 1 and 'ulimit -n' in err and str(n) in err


def test_a_disk_that_was_full_for_a_while():
    "Lines are lost and counted, one may be cut; every other line is whole"
    code = """import os, resource, signal
from orcd.serve.logs import LineWriter
out = LineWriter(os.open('log', os.O_CREAT | os.O_WRONLY, 0o600))
def say(n, most):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, -1))
    for i in range(n): out('{"event": "%s"}\\n' % ('x' * 80))
    assert out.flush(60)
say(3, -1); say(5, os.path.getsize('log') + 40); say(3, -1)"""
    with tempfile.TemporaryDirectory() as folder:
        r = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=PATH),
            timeout=FAR)
        lines = open(f'{folder}/log').read().splitlines()
    assert (r.returncode, r.stderr) == (0, '')
    torn = [l for l in lines if not l.endswith('}')]
    events = [json.loads(l) for l in lines if l not in torn]
    assert len(torn) == 1 and [e['event'][:1] for e in events] == ['x'] * 4 + ['l', 'x', 'x'] and events[4]['lines'] == 5


@pytest.mark.parametrize('sigs', [1, 2])
@pytest.mark.parametrize('kind', ['half a body', 'does not read', 'does not read the end'])
def test_clients_that_are_not_done_when_the_worker_ends(kind, sigs):
    "are cut after a moment: no error line, no traceback, exit code 0"
    prompt = {'does not read': 'flood:2000@0.001', 'does not read the end': 'flood:20'}.get(kind, 'a')
    body = json.dumps(dict(job_id='1', prompt=prompt)).encode()
    head = b'POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(body)
    with worker(stop_s=3, drain_s=1) as w, socket.socket() as c:
        c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        c.connect((w.host, w.port))
        c.sendall(head + (body[:-1] if kind == 'half a body' else body))
        if kind == 'half a body': time.sleep(.2)
        else: w.event('execute_start')
        for _ in range(sigs):
            w.signal()
            w.event('signal')
            time.sleep(.1)
        assert w.end(FAR) == 0
        assert (not [e for e in w.log if e['level'] == 'error' or 'exception' in e] and w.log[-1]['event'] == 'shutdown'
            and 'forced' not in w.log[-1])
