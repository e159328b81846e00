"The command line as people and supervisors use it: real processes, a small real model on the reference engine"
import os, re, select, signal, socket, subprocess, sys, time
import pytest
import orcd as package
from orcd.serve.cli import FLAGS, complete_model, run
from orcd.files.hub import MODELS, find_model, place, remote
from test_api import write_model
from worker_tools import PATH, PATIENCE, ROOT, orcd, soak



@pytest.fixture(scope='module')
def path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        return write_model(tmp_path_factory.mktemp('cli') / 'small.gguf', m, context_length=2048, head_dim=32)


def call(*args, env=None, cwd=None, timeout=4 * PATIENCE, **kw):
    "(exit code, stdout, stderr) of a command"
    r = subprocess.run([sys.executable, '-m', 'orcd.serve.cli', *map(str, args)], capture_output=True, text=True, timeout=timeout,
        cwd=cwd or ROOT,
        env=dict(os.environ, PYTHONPATH=PATH) | (env or {}), **kw)
    return r.returncode, r.stdout, r.stderr


# --- what is said in two places

def test_the_command_line_agrees_with_the_tables():
    "It is light, so it does not import the table of fields and the worker's settings; what it repeats of them is the same"
    import inspect
    from orcd.serve import cli
    from orcd.serve.worker import Settings
    from orcd.text.sampling import RULES
    s = Settings()
    own = dict(token_file='token', insecure=None, log_format=None)          # read, or decided, before there are settings
    for f in FLAGS:
        name = own.get(f.name.replace('-', '_'), f.name.replace('-', '_'))
        assert name is None or getattr(s, name) == f.default, f.name
    most, parse = RULES['max_tokens'].high, next(f.parse for f in FLAGS if f.name == 'max-tokens-out')
    assert parse(str(most)) == most
    with pytest.raises(ValueError): parse(str(most + 1))
    for command in cli.generate, cli.chat:
        given = inspect.signature(command).parameters
        for f in 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'seed': assert given[f].default == RULES[f].default
    assert inspect.signature(cli.generate).parameters['temperature'].default == RULES['temperature'].default


# --- speed and shape

def test_help_is_fast_and_imports_nothing_heavy():
    code = ("import sys; from orcd.serve.cli import run; run(['--help']); print(sorted({m.split('.')[0] for m in sys.modules} & {'numpy', "
        "'fastapi', 'uvicorn', 'cupy', 'structlog', 'tokenizers', 'huggingface_hub', 'tqdm'}))")
    def took(code):
        began = time.monotonic()
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT).stdout
        return time.monotonic() - began, out
    bare, ours = zip(*[(took('pass'), took(code)) for _ in range(5)])
    out = ours[0][1]
    assert out.endswith('[]\n'), out[-200:]
    assert min(ours)[0] < 25 * min(bare)[0]      # some five times what an empty program takes
    for command in 'serve generate chat info bench pull list rm demo doctor'.split(): assert command in out


def test_serve_imports_no_cupy():
    code = ("import sys, orcd.serve.worker, orcd.serve.cli, orcd.serve.jobs, orcd.serve.protocol, orcd.serve.logs, orcd.files.hub; assert "
        "'cupy' not in sys.modules and 'huggingface_hub' not in sys.modules")
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_version(): assert call('--version') == (0, f'orcd {package.__version__}\n', '')


def test_alias(path):
    code = 'import sys; from orcd.serve.cli import worker_main; worker_main()'
    r = subprocess.run([sys.executable, '-c', code, '--port', 'x'], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 2 and r.stderr.startswith('orcd: --port')


BAD = [('--port', '65536'), ('--port', 'http'), ('--port', '-1'), ('--gpu-device', '-1'), ('--device', 'gpu'), ('--max-tokens-in', '0'),
    ('--max-tokens-out', '2049'),
    ('--max-tokens-out', '0'), ('--inference-timeout-sec', '0'), ('--inference-timeout-sec', 'nan'), ('--inference-timeout-sec', 'inf'),
    ('--inference-timeout-sec', '1_0'), ('--inference-timeout-sec', '٣'), ('--kv-cache-size-mb', '0'),
    ('--context-length', '-5'), ('--context-length', '1.5'), ('--chunk-bytes', '1'), ('--callback-url', 'localhost:80'),
    ('--queue-depth', 'many'), ('--log-format', 'xml'),
    ('--token-file', '/nowhere/token'), ('--settings', '/nowhere/settings.ini'), ('--host', '0.0.0.0'), ('--port', '٣'),
    ('--model-ref', ''), ('--worker-id', 'a\nb')]


@pytest.mark.parametrize('flag, value', BAD)
def test_bad_values_are_one_line_and_exit_2(path, flag, value, capsys):
    assert run(['serve', '--model', str(path), flag, value]) == 2
    out, err = capsys.readouterr()
    named = {'--device': '--gpu-device'}.get(flag, flag)
    assert out == '' and err.count('\n') == 1 and named in err, err


def test_bad_values_from_the_other_places(path, tmp_path):
    code, out, err = call('serve', '--model', path, env=dict(ORCD_PORT='high'))
    assert code == 2 and '--port' in err and 'ORCD_PORT' in err and err.count('\n') == 1
    (tmp_path / 'settings.ini').write_text('[worker]\nqueue-depth = -1\n')
    code, out, err = call('serve', '--model', path, cwd=tmp_path)
    assert code == 2 and '--queue-depth' in err and 'settings file' in err
    (tmp_path / 'other.ini').write_text('[worker]\nprot = 1\n')
    code, out, err = call('serve', '--model', path, '--settings', tmp_path / 'other.ini')
    assert code == 2 and "'prot'" in err
    (tmp_path / 'broken.ini').write_text('no section')
    assert call('serve', '--model', path, '--settings', tmp_path / 'broken.ini')[0] == 2


def test_no_model(): assert call('serve', cwd='/') [0] == 2 and run(['serve', '--no-such-flag']) == 2 and run(['nonsense']) == 2


def test_every_flag_is_documented():
    text = call('serve', '--help')[1]
    for f in FLAGS: assert f'--{f.name}' in text
    assert '--device' in text and '--settings' in text


def test_settings_file_of_the_repository():
    from orcd.serve.cli import read_settings, resolve_settings
    assert resolve_settings({'model': 'x'}, {}, read_settings(ROOT / 'settings.ini'))['port'] == 8080


# --- serve

def test_serve_on_the_reference_engine(path):
    with orcd('serve', '--model', str(path), '--device', 'reference', '--port', '0', '--worker-id', 'not-a-uuid', '--model-ref', 'small',
            wait=True) as w:
        names = [e['event'] for e in w.log if e['event'] != 'uvicorn']
        assert names[0] == 'startup' and names[-1] == 'ready' and names.index('model_load_start') < names.index('model_load_complete')
        assert [e['percent'] for e in w.log if e['event'] == 'model_load_progress'] == [0, 25, 50, 75, 100]
        assert 'not the production engine' in w.event('reference_engine')['message'] and 'not-a-uuid' in w.event('worker_id')['message']
        h = w.health()
        want = dict(status='healthy', state='ready', resident=False, tokenizer_kind='gguf-bpe', context_length=2048,
            worker_id='not-a-uuid', model_ref='small', gpu_device='reference')
        assert want.items() <= h.items(), h
        # the same seed gives the same text, whatever ran before; the pieces are what the library says
        a = w.execute('a', prompt='The rain', seed=7, max_tokens=40, temperature=1.2).all()
        w.execute('b', prompt='Another', max_tokens=5).all()
        b = w.execute('c', prompt='The rain', seed=7, max_tokens=40, temperature=1.2).all()
        text = ''.join(e['t'] for e in a[1:-1])
        assert a[1:-1] == b[1:-1] and text
        with package.load(path, device='reference', progress=False) as m:
            assert m.generate('The rain', seed=7, max_tokens=40, temperature=1.2).run().text == text
        # stop strings are never sent
        stop = text[8:10]
        c = w.execute('d', prompt='The rain', seed=7, max_tokens=40, temperature=1.2, stop=stop).all()
        assert (c[-1]['stop_reason'] == 'STOP_SEQUENCE' and c[-1]['stop_sequence_matched'] == stop
            and ''.join(e['t'] for e in c[1:-1]) == text[:text.index(stop)])
        # the chat template, the end of the context, a prompt that is too long
        assert w.execute('e', messages=[dict(role='user', content='hi')], max_tokens=3).all()[-1]['type'] == 'end'
        status, _, body = w.post('/execute', dict(job_id='f', prompt='the rain ' * 3000))
        assert status == 400 and body['errors'][0]['field'] == 'prompt'
        # cancel in the prefill and in the decode of a real model
        for prompt in 'rain ' * 600, 'rain':
            s = w.execute('g', prompt=prompt, max_tokens=2000)
            s.next()
            w.post('/cancel/g')
            last = list(s.frames())[-1]
            assert last.get('code') == 'CANCELLED' or last.get('stop_reason') == 'EOS'
        w.signal()
        assert w.end() == 0 and w.log[-1]['event'] == 'shutdown'
        assert not any('Traceback' in l for l in w.raw)


def test_context_length(path):
    with orcd('serve', '--model', str(path), '--device', 'reference', '--port', '0', '--context-length', '24', wait=True) as w:
        end = w.execute(prompt='The rain falls', max_tokens=100, temperature=0).all()[-1]
        assert end['stop_reason'] in ('CONTEXT_LENGTH', 'EOS') and end['tokens_out'] < 24 and w.health()['context_length'] == 24


@pytest.mark.parametrize('make, code, text', [
    (lambda p: p / 'missing.gguf', 'MODEL_LOAD_FAILED', 'missing.gguf'),
    (lambda p: (p / 'bad.gguf').write_bytes(b'GGUF' + b'\xff' * 60) and p / 'bad.gguf', 'MODEL_LOAD_FAILED', 'version'),
    (lambda p: (p / 'empty.gguf').touch() or p / 'empty.gguf', 'MODEL_LOAD_FAILED', ''), (lambda p: p, 'MODEL_LOAD_FAILED', ''),
    (lambda p: 'gpt-oss-20b', 'MODEL_LOAD_FAILED', 'orcd pull gpt-oss-20b')])
def test_files_that_cannot_be_served(tmp_path, make, code, text):
    with orcd('serve', '--model', str(make(tmp_path)), '--device', 'reference', '--port', '0',
            env=dict(ORCD_CACHE_DIR=str(tmp_path / 'cache'))) as w:
        assert w.end() == 1
        errors = [e for e in w.log if e['event'] == 'error']
        assert (len(errors) == 1 and errors[0]['code'] == code and text in errors[0]['message']
            and {'gpu_device', 'model_path'} <= set(errors[0]))
        assert not any('Traceback' in l or 'exception' in l for l in w.raw) and w.log[-1]['event'] == 'shutdown'


def test_unknown_architecture_and_no_vocabulary(tmp_path):
    from make_models import make_model
    plain = make_model(tmp_path / 'plain.gguf')
    data = plain.read_bytes()
    (tmp_path / 'odd.gguf').write_bytes(data.replace(b'qwen2', b'qwenX'))
    for name, text in ('odd.gguf', 'qwenX'), ('plain.gguf', 'vocabulary'):
        with orcd('serve', '--model', str(tmp_path / name), '--device', 'reference', '--port', '0') as w:
            assert w.end() == 1 and w.event('error')['code'] == 'MODEL_LOAD_FAILED' and text in w.event('error')['message']


@pytest.mark.parametrize('visible', ['', '99', 'none'])
def test_no_usable_gpu(path, visible):
    "Hidden devices: a clear error that names the one way to run without a GPU"
    with orcd('serve', '--model', str(path), '--port', '0', env=dict(CUDA_VISIBLE_DEVICES=visible)) as w:
        assert w.end(60) == 1
        e = w.event('error')
        assert e['code'] == 'CUDA_ERROR' and '--device reference' in e['message'] and e['gpu_device'] == 0 and e['model_path'] == str(path)
        assert not any('Traceback' in l for l in w.raw) and 'model_load_start' not in [e['event'] for e in w.log]


def test_port_in_use(path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        with orcd('serve', '--model', str(path), '--device', 'reference', '--port', str(s.getsockname()[1])) as w:
            assert w.end() == 1 and 'in use' in w.event('error')['message']


def test_settings_from_file_environment_and_flags(path, tmp_path):
    (tmp_path / 's.ini').write_text(f'[worker]\nmodel = {path}\ndevice = reference\nport = 1\nmax-tokens-out = 7\nmodel-ref = from-file\n')
    with orcd('serve', '--settings', str(tmp_path / 's.ini'), '--port', '0', env=dict(ORCD_MODEL_REF='from-env', ORCD_PORT='2'),
            wait=True) as w:
        assert w.health()['model_ref'] == 'from-env'
        assert w.post('/execute', dict(job_id='1', prompt='a', max_tokens=8))[0] == 400


def test_token_file(path, tmp_path):
    (tmp_path / 'token').write_text('abc-123-456-789-0\n')
    with orcd('serve', '--model', str(path), '--device', 'reference', '--port', '0', '--host', '0.0.0.0', '--token-file',
            str(tmp_path / 'token'), wait=False) as w:
        w.address = f"127.0.0.1:{w.event('ready')['uri'].rsplit(':', 1)[1]}"
        assert w.post('/shutdown')[0] == 401 and w.health()['state'] == 'ready'
        assert w.post('/shutdown', headers={'Authorization': 'Bearer abc-123-456-789-0'})[0] == 202 and w.end() == 0


def test_pretty_log(path):
    "On a terminal: a progress bar and lines for people"
    import pty
    leader, follower = pty.openpty()
    p = subprocess.Popen([sys.executable, '-m', 'orcd.serve.cli', 'serve', '--model', str(path), '--device', 'reference', '--port', '0'],
        stderr=follower, cwd=ROOT)
    os.close(follower)
    text = ''
    while 'ready' not in text: text += os.read(leader, 4096).decode()
    p.send_signal(signal.SIGINT)
    assert p.wait(PATIENCE) == 0 and '█' in text and '100 %' in text and '{' not in text
    os.close(leader)


# --- the other commands

def test_generate(path, capsys):
    args = ['generate', str(path), 'The rain', '--device', 'reference', '-n', '12', '--seed', '3', '--raw']
    assert run(args) == 0
    first = capsys.readouterr()
    assert run(args) == 0 and capsys.readouterr() == first and first.err == ''
    with package.load(path, device='reference', progress=False) as m:
        assert m.generate('The rain', max_tokens=12, seed=3).run().text + '\n' == first.out
    assert run(['generate', str(path), 'x', '--device', 'reference', '--temperature', '9', '--top-p', '7']) == 1
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'temperature' in err and 'top_p' in err


def test_generate_from_stdin_into_a_closed_pipe(path):
    p = subprocess.run(f'echo hi | {sys.executable} -m orcd.serve.cli generate {path} - --device reference -n 3', shell=True,
        capture_output=True, cwd=ROOT)
    assert p.returncode == 0 and p.stderr == b''
    p = subprocess.run(f'{sys.executable} -m orcd.serve.cli generate {path} hi --device reference -n 200 | true', shell=True,
        capture_output=True, cwd=ROOT)
    assert b'Traceback' not in p.stderr


def test_chat(path):
    code, out, err = call('chat', path, '--device', 'reference', '-n', '5', '--seed', '1', input='hello\n\nagain\n')
    assert code == 0 and out.count('\n') >= 2 and 'Traceback' not in err


def test_info(path, capsys):
    assert run(['info', str(path)]) == 0
    out = capsys.readouterr().out
    assert 'qwen2' in out and 'F32' in out and 'VRAM at a context of 2048' in out and 'kv_cache' in out
    assert run(['info', 'nowhere.gguf']) == 1 and 'no file' in capsys.readouterr().err


@pytest.mark.parametrize('free, code', [(100 << 30, 0), (33 << 20, 1)])
def test_info_where_there_is_a_gpu(path, capsys, monkeypatch, free, code):
    "The model has to fit into what the GPU has free, on the kernels of that GPU"
    pytest.importorskip('cuda.bindings.driver')
    from fake_gpu import played
    with played(monkeypatch, free=free): assert run(['info', str(path)]) == code
    said = capsys.readouterr()
    assert f'GPU 0 has {free / 2**20:,.1f} MiB of VRAM free' in said.out
    assert (('VRAM at a context of 2048' in said.out)
        if code == 0 else ('needs' in said.err and 'context' in said.err and 'Traceback' not in said.err))


def test_bench(path, capsys):
    assert run(['bench', str(path), '--device', 'reference', '--prompt', '8', '--tokens', '4', '--repeat', '1']) == 0
    assert re.search(r'prefill +[\d.]+ tok/s.*\n +decode +[\d.]+ tok/s', capsys.readouterr().out)


def test_bench_says_what_reading_alone_would_take(tmp_path, capsys, monkeypatch):
    pytest.importorskip('cuda.bindings.driver')
    from make_models import make_model
    from fake_gpu import played
    model = make_model(tmp_path/'m.gguf', 'qwen2', types='Q4_K', n_layer=3, n_embd=256, n_ff=512, head_dim=64, n_head=4, n_head_kv=2)
    with played(monkeypatch): assert run(['bench', str(model), '--prompt', '8', '--tokens', '4', '--repeat', '1']) == 0
    # 2 GiB in an eighth of a millisecond
    assert re.search(r'decode +[\d.]+ tok/s +\([\d.]+ ms a token; reading \d+ MB at 17\.18 TB/s takes \d+% of that\)',
        capsys.readouterr().out)


def test_doctor(capsys):
    code = run(['doctor'])
    out = capsys.readouterr().out
    assert code in (0, 1) and 'gpu engine' in out and ('NO ' in out) == (code == 1)


def test_completion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'models').mkdir()
    (tmp_path / 'models' / 'm.gguf').touch()
    (tmp_path / 'mine.gguf').touch()
    (tmp_path / 'notes.txt').touch()
    assert complete_model('') == ['demo', *MODELS, 'mine.gguf', 'models/']
    assert (complete_model('m') == ['mine.gguf', 'models/'] and complete_model('models/') == ['models/m.gguf']
        and complete_model('q') == ['qwen2.5-0.5b'])
    assert complete_model(f'{tmp_path}/mi') == [f'{tmp_path}/mine.gguf'] and complete_model('/nowhere/x') == []
    env = dict(os.environ, _ORCD_COMPLETE='complete_bash', COMP_WORDS='orcd info q', COMP_CWORD='2', PYTHONPATH=PATH)
    r = subprocess.run([sys.executable, '-c', 'from orcd.serve.cli import main; main()'], env=env, capture_output=True, text=True)
    assert 'qwen2.5-0.5b' in r.stdout


def test_pulled_names_are_models(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('ORCD_CACHE_DIR', str(tmp_path))
    target = place(remote('qwen2.5-0.5b'))
    target.parent.mkdir(parents=True); target.write_bytes(path.read_bytes())
    assert run(['info', 'qwen2.5-0.5b']) == 0 and 'qwen2' in capsys.readouterr().out


def test_demo():
    code, out, err = call('demo', '--device', 'reference')
    assert code == 0 and 'reference engine' in out and 'exit code 0' in out and err == ''


def is_alive(pid):
    try: return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] not in 'ZX'
    except (FileNotFoundError, ProcessLookupError): return False


@pytest.mark.skipif(sys.platform != 'linux', reason='asks /proc')
@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize('when', ['starting', 'ready'])
def test_a_demo_that_is_ended_leaves_no_worker(sig, when):
    "However it ends, while its worker starts or after that"
    code = f"""if True:
        import signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import subprocess
        from orcd.serve import cli
        class Told(subprocess.Popen):
            def __init__(self, *args, **kw):
                super().__init__(*args, **kw)
                print(self.pid, flush=True)
                if {when == 'starting'}: self.stderr.close(); self.stderr = Never()
        class Never:
            def __iter__(self): time.sleep(1e6)
        subprocess.Popen = Told
        def ask(*args, **kw): print('asked', flush=True); time.sleep(1e6); yield
        cli.ask = ask
        cli.main(['demo', '--device', 'reference'])"""
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=PATH))
    pid = next(int(line) for line in p.stdout if line.strip().isdigit())
    if when == 'ready': assert any(line == 'asked\n' for line in p.stdout)
    p.send_signal(sig)
    _, err = p.communicate(timeout=4 * PATIENCE)       # the end of its output: the worker held the other end of that pipe
    assert p.returncode == (130 if sig == signal.SIGINT else -sig) and 'Traceback' not in err
    end = time.monotonic() + PATIENCE
    while is_alive(pid) and time.monotonic() < end: time.sleep(.05)
    assert not is_alive(pid)


def test_a_demo_that_cannot_start():
    "says why, in characters that steer no terminal"
    code, out, err = call('demo', '--device', '\x1b[31m')
    assert (code, out) == (2, '') and r"--device: '\x1b[31m' is not the index of a GPU, or reference" in err
    code, out, err = call('demo', '--device', 'reference', env=dict(ORCD_CONTEXT_LENGTH='many'))
    assert code == 1 and "--context-length: 'many' is not a whole number" in out and '(ORCD_CONTEXT_LENGTH)' in out


def test_a_demo_writes_no_controls():
    code, out, err = call('demo', '--device', 'reference', 'a\x1b[31mb')
    assert code == 0 and r'a\x1b[31mb' in out and '\x1b' not in out


def test_haiku_through_the_worker():
    with orcd('serve', '--model', 'demo', '--device', 'reference', '--port', '0', wait=True) as w:
        events = w.execute(messages=[dict(role='user', content='Write a haiku about GPU computing')], temperature=0, max_tokens=80).all()
        assert ''.join(e['t'] for e in events[1:-1]).strip().count('\n') == 2 and events[-1]['stop_reason'] == 'EOS'


def test_soak(path):
    "60 mixed jobs on a real model: every stream well formed, memory flat, the same seed the same text to the last"
    with orcd('serve', '--model', str(path), '--device', 'reference', '--port', '0', wait=True) as w:
        seen = soak(w, 60, long='rain ' * 300)
        texts, speeds, host, _ = zip(*seen)
        assert len(set(texts)) == 1 and host[-1] < host[2] + 16 * 2**20, host
        w.signal()
        assert w.end() == 0


@pytest.mark.parametrize('ends', ['well', 'badly'])
def test_a_start_is_hasty_only_while_it_lasts(ends):
    "Python's lock changes hands sooner, and garbage waits, until the model is there, or is not"
    code = f"""import gc, os, signal, sys
import fake_worker, orcd.serve.worker as w
from orcd.errors import ModelError
def now(): return gc.isenabled(), sys.getswitchinterval()
before, during, later = now(), [], []
def load(settings, progress):
    during.append(now())
    if {ends == 'badly'}: raise ModelError('no model')
    return fake_worker.load(settings, progress)
serve = w.Process.serve
async def noted(self, *a):
    later.append(now())
    self.worker.leave()
    await serve(self, *a)
w.Process.serve = noted
w.serve(w.Settings(model='fake.gguf', port=0), load)
print(before, *during, *(later or [now()]), sep=';')"""
    env = dict(os.environ, PYTHONPATH=PATH)
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT / 'tests', env=env)
    before, during, later = map(eval, r.stdout.splitlines()[-1].split(';'))
    assert before == later and before[0] and not during[0] and during[1] < before[1], r.stderr


@pytest.mark.parametrize('template, metadata, says', [
    ('abc', {}, 'chat template of 3 characters'), (None, {}, 'chat template none'), (7, {}, 'chat template that is no text'),
    ('abc', {'tokenizer.chat_template.tool_use': 'x'}, 'chat template of 3 characters, others: tool_use')])
def test_info_on_templates(monkeypatch, template, metadata, says):
    from orcd.serve.cli import words
    from orcd.text.tokenizer import Tokenizer
    from test_chat import byte_tokenizer
    tok = byte_tokenizer(['<e>'], template, metadata)
    monkeypatch.setattr(Tokenizer, 'from_gguf', lambda g: tok)
    assert words(None)[1] == says


def test_as_a_module():
    "`python -m orcd` is the command"
    import subprocess, sys
    r = subprocess.run([sys.executable, '-m', 'orcd', 'info', 'demo'], capture_output=True, text=True, timeout=120)
    assert r.returncode == 0 and 'qwen2' in r.stdout, r.stderr
    assert subprocess.run([sys.executable, '-m', 'orcd', 'info', 'nothing-of-this-name'], capture_output=True, timeout=120).returncode


def test_a_password_is_not_repeated():
    "The usage error for a callback's URL with a user name and a password names neither"
    from orcd.serve.cli import UsageError, resolve_settings
    for bad in 'http://someone:hunter2@host/x', 'someone:hunter2@host':
        with pytest.raises(UsageError) as e: resolve_settings({'callback-url': bad}, {}, {})
        assert 'hunter2' not in str(e.value) and 'host' in str(e.value) and '--callback-url' in str(e.value)


# --- what people type

CHAT = 'chat', 'demo', '--device', 'reference', '-n', '24', '--temperature', '0'


def test_generate_asks_as_the_library_does(path, tmp_path, monkeypatch):
    "Word for word, with the same seed; `--raw` is the library's raw text; a model without a template says that it is raw"
    how = dict(max_tokens=24, temperature=.7, seed=5)
    with package.load('demo', device='reference', progress=False) as m:
        asked, raw = str(m.chat('Write a haiku about rain', **how)), str(m.generate('Write a haiku about rain', **how))
    assert asked != raw
    args = 'generate', 'demo', 'Write a haiku about rain', '--device', 'reference', '-n', 24, '-t', .7, '-s', 5
    assert call(*args) == (0, asked + '\n', '') and call(*args, '--raw') == (0, raw + '\n', '')
    plain = write_model(tmp_path / 'plain.gguf', monkeypatch, template='')
    code, out, err = call('generate', plain, 'rain', '--device', 'reference', '-n', 2)
    assert code == 0 and out and err.count('no chat template') == 1 and err.count('\n') == 1
    assert call('generate', plain, 'rain', '--device', 'reference', '-n', 2, '--raw')[2] == ''


def test_commands_of_a_chat(tmp_path):
    import json
    file = tmp_path / 'talk.json'
    (tmp_path / 'bad.json').write_text('[{"role": "boss", "content": "x"}]')
    code, out, err = call(*CHAT, cwd=tmp_path, env=dict(ORCD_CACHE_DIR=str(tmp_path)),
        input='/help\n/system\n/system Be brief\n/system\nWrite a haiku about rain\n'
        f'/save {file}\n/save {file}\n/clear\n/load {file}\n/load {tmp_path}/bad.json\n/load\n/nonsense\n/quit\nWrite a haiku about snow\n')
    assert code == 0 and '/save FILE' in err and '(nothing is said first' in err and '(Be brief)' in err
    said = json.loads(file.read_text())
    assert [m['role'] for m in said] == ['system', 'user', 'assistant'] and said[2]['content'].strip() == out.strip() != ''
    assert file.stat().st_mode & 0o777 == 0o600 and 'is there already' in err and '(3 messages' in err
    assert 'bad.json is no saved conversation' in err and '/load FILE)' in err and 'there is no /nonsense' in err
    assert not (tmp_path / 'chat_history').exists(), 'of what people type on a terminal alone'


def test_a_message_that_begins_with_a_slash():
    code, out, err = call(*CHAT, input='//nonsense\n')
    assert code == 0 and out.strip() and 'there is no' not in err


def test_a_full_context_ends_no_chat():
    said = ''.join(f'Write a haiku about rain and the sea, number {i}\n' for i in range(6))
    code, out, err = call(*CHAT, '--context-length', 96, input=said)
    assert code == 0 and 'forgetting the oldest turn' in err


def test_chat_on_a_terminal(tmp_path):
    "A banner, the commands, and a history for this user alone that does not grow without end"
    import pty
    (tmp_path / 'chat_history').write_text('old\n' * 3000)
    ours, theirs = pty.openpty()
    own = 'import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])'
    p = subprocess.Popen([sys.executable, '-c', own, '-m', 'orcd.serve.cli', *CHAT], stdin=theirs, stdout=theirs, stderr=theirs,
        env=dict(os.environ, PYTHONPATH=PATH, ORCD_CACHE_DIR=str(tmp_path)), start_new_session=True)    # it has Ctrl-C to itself
    os.close(theirs)
    # a line when there is a prompt; Ctrl-C and the end when nothing more is written, again while they are not heard: a terminal
    # forgets what was typed before a Ctrl-C, and the first may come before the program listens
    seen, asked = b'', False
    while p.poll() is None:
        if select.select([ours], [], [], 1)[0]:
            try: seen += os.read(ours, 4096)
            except OSError: break
        prompts = seen.count(b'> ') + seen.count(b'>\x1b')
        if prompts and not asked: asked = bool(os.write(ours, b'Write a haiku about rain\n'))
        elif prompts > 1 and not select.select([ours], [], [], 1)[0] and p.poll() is None:
            os.write(ours, b'/quit\n' if b'Ctrl-C again' in seen else b'\x03')
    assert p.wait(PATIENCE) == 0 and b'a context of 2048 tokens; /help' in seen and b'Ctrl-C again' in seen, seen
    lines = (tmp_path / 'chat_history').read_text().splitlines()
    assert lines[-2:] == ['Write a haiku about rain', '/quit'] and len(lines) <= 1000
    assert (tmp_path / 'chat_history').stat().st_mode & 0o777 == 0o600


def test_list_and_rm(path, tmp_path):
    env = dict(ORCD_CACHE_DIR=str(tmp_path))
    assert call('list', env=env)[:2] == (0, '') and 'orcd pull' in call('list', env=env)[2]
    folder = tmp_path / 'models' / 'me--repo' / 'main'
    folder.mkdir(parents=True)
    whole, cut, part, link = folder / 'x.gguf', folder / 'cut\x1b[31m.gguf', folder / 'y.gguf.0123456789abcdef.part', folder / 'link.gguf'
    data = find_model('demo').read_bytes()
    whole.write_bytes(data)
    cut.write_bytes(data[:100_000])
    part.write_bytes(b'a')
    precious = tmp_path / 'precious.gguf'
    precious.write_bytes(data)
    link.symlink_to(precious)
    code, out, err = call('list', env=env)
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and '\x1b' not in out and len(rows) == 5 and out.startswith('NAME')
    assert 'Q4_K_M' in rows['me/repo/x.gguf'] and 'yes' in rows['me/repo/x.gguf'] and f'{len(data) / 1e6:.1f} MB' in rows['me/repo/x.gguf']
    assert 'no: ' in rows['me/repo/cut\\x1b[31m.gguf'] and 'in part' in rows['me/repo/y.gguf']
    for name, code in ('../../precious.gguf', 2), ('demo', 2), (str(whole), 2), ('me/repo/link.gguf', 1), ('me/repo/nothing.gguf', 2):
        c, out, err = call('rm', '--yes', name, env=env)
        assert (c, out) == (code, '') and err.count('\n') == 1, (name, err)
    code, _, err = call('rm', 'me/repo/x.gguf', env=env, input='')
    assert code == 2 and '--yes' in err and all(f.exists() for f in (whole, cut, part, link, precious))
    assert call('rm', '-y', 'me/repo/x.gguf', env=env)[0] == 0 and call('rm', '-y', 'me/repo/y.gguf', env=env)[0] == 0
    assert not whole.exists() and not part.exists() and cut.exists() and precious.read_bytes() == data


def test_hub_that_cannot_be_reached(tmp_path):
    pytest.importorskip('huggingface_hub')
    env = dict(ORCD_CACHE_DIR=str(tmp_path), HF_ENDPOINT='http://127.0.0.1:9')
    code, out, err = call('pull', 'other/repo/x.gguf', env=env)
    assert (code, out) == (1, '') and err.count('\n') == 1 and 'the hub cannot be reached' in err
