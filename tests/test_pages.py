"""What the front page and the operators' page tell people to type is typed here, in their order, in a folder that looks like a checkout.
Real are `orcd`, `curl`, Python and the shell. The hub is one on this machine that has the demo model under the large ones' names; where
there is no GPU, the reference engine is asked for; `pip`, `make`, `docker` and `kubectl` are looked at, not run."""
import hashlib, http.server, json, os, re, shlex, shutil, signal, socket, subprocess, sys, threading, time, tomllib, urllib.request
from pathlib import Path
import pytest
from conftest import ROOT, has_gpu
from orcd.errors import CODES
from orcd.files.hub import find_model

OPERATING = ROOT / 'nbs' / '6_serve' / '39b_operating.ipynb'
BLOCK = re.compile(r'^```(\w+)\n(.*?)^```', re.M | re.S)
# what asks for an engine, and takes GPU 0 when nothing is said
ENGINE = 'serve', 'generate', 'chat', 'bench'

ORCD = '''import sys
from orcd.files import hub
for name, r in hub.MODELS.items(): hub.MODELS[name] = hub.Remote(r.repo, r.file, r.revision, {size}, {sha!r})
args = sys.argv[1:]
said = {{'--device', '--gpu-device', '--http'}} & {{*args}}
if {reference} and args and args[0] in {engine} and not said: args += ['--device', 'reference']
from orcd.serve.start import main
sys.argv[1:] = args
main()
'''
# programs that would change the machine, or are not there: are their arguments well-formed, and do the files exist?
LOOKED_AT = r'''import os, re, sys, tomllib
program, args = os.path.basename(sys.argv[0]), sys.argv[1:]
if program == 'pip':
    extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']
    what = [a for a in args if a not in ('install', '-e')]
    assert args[0] == 'install' and what, args
    for w in what:
        m = re.fullmatch(r"\.(?:\[([\w,]+)\])?", w)
        assert m and set((m[1] or '').split(',')) - {''} <= set(extras), w
files = [b for a, b in zip(args, args[1:]) if a == '-f'] + [a.split('=', 1)[1] for a in args if a.startswith('--from-file=')]
for f in files: assert os.path.exists(f), f
print(program, *args)
'''


def blocks(text):
    "(language, what is in it) of every fenced block"
    return [(m[1], m[2]) for m in BLOCK.finditer(text)]


def page():
    cells = json.loads(OPERATING.read_text())['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def commands(block):
    "The commands of a block of shell: a line each, with those that go on in the next one"
    return [c for c in (c.strip() for c in re.split(r'(?<!\\)\n', block)) if c and not c.startswith('#')]


class Hub(http.server.BaseHTTPRequestHandler):
    "The demo model, whatever file is asked for"
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass

    def do_HEAD(self):
        self.send_response(200)
        headers = {'Content-Length': len(self.server.data), 'ETag': f'"{self.server.sha}"', 'X-Linked-ETag': f'"{self.server.sha}"',
            'X-Linked-Size': len(self.server.data), 'X-Repo-Commit': 'c' * 40}
        for k, v in headers.items(): self.send_header(k, str(v))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.server.data)


class Terminal:
    "A person at a shell in a checkout, and what the commands left running"
    def __init__(self, folder, monkeypatch):
        self.here, self.tools, self.worker, self.typed = folder / 'checkout', folder / 'tools', None, []
        for d in self.here, self.tools, folder / 'home', self.here / '.venv' / 'bin': d.mkdir(parents=True)
        for p in ROOT.iterdir():
            if p.name not in ('.venv', '.git', 'token'): (self.here / p.name).symlink_to(p)
        (self.here / '.venv' / 'bin' / 'activate').touch()         # the tools below are what it would put into the path
        hub = self.hub = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
        hub.data = Path(find_model('demo')).read_bytes()
        hub.sha = hashlib.sha256(hub.data).hexdigest()
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        self.tool('orcd', ORCD.format(size=len(hub.data), sha=hub.sha, reference=not has_gpu(), engine=ENGINE))
        for name in 'pip', 'docker', 'kubectl': self.tool(name, LOOKED_AT)
        (self.tools / 'make').write_text(f'#!/bin/sh\nexec {shutil.which("make")} -n "$@"\n')
        for p in self.tools.iterdir(): p.chmod(0o755)
        (folder / 'home' / '.curlrc').write_text('fail\nsilent\nshow-error\n')
        self.env = {k: v for k, v in os.environ.items() if not k.startswith('ORCD_')} | dict(HOME=str(folder / 'home'),
            PATH=f'{self.tools}:{os.environ["PATH"]}', PYTHONPATH=str(ROOT), ORCD_PORT=str(self.port), ORCD_CACHE_DIR=str(folder / 'cache'),
            HF_ENDPOINT=f'http://127.0.0.1:{hub.server_port}', HF_HUB_DISABLE_XET='1', NO_PROXY='127.0.0.1,localhost')

    def tool(self, name, text): (self.tools / name).write_text(f'#!{sys.executable}\n{text}')

    def run(self, *command, **more):
        return subprocess.run(command, cwd=self.here, env=self.env, capture_output=True, text=True, **more)

    def serve(self, command):
        "What stays in the foreground of a terminal of its own, until it is ready"
        self.end()
        self.log = open(self.here.parent / 'worker.log', 'w+')
        self.worker = subprocess.Popen(['bash', '-ec', f'exec {command}'], cwd=self.here, env=self.env, stderr=self.log,
            start_new_session=True)
        while self.worker.poll() is None:
            try: return urllib.request.urlopen(f'http://127.0.0.1:{self.port}/health').read()
            except OSError: time.sleep(.1)
        raise AssertionError(f'{command}\n{Path(self.log.name).read_text()}')

    def end(self, asked=False):
        "Ctrl-C; or it ends by itself, because a command asked for it"
        if self.worker is None: return
        if not asked: self.worker.send_signal(signal.SIGINT)
        assert self.worker.wait() == 0, Path(self.log.name).read_text()
        self.log.close()
        self.worker = None

    def type(self, language, block):
        "Everything that a block of commands or of Python prints"
        block = block.replace('8080', str(self.port))
        if language == 'python':
            r = self.run(sys.executable, '-c', 'import orcd\n' + block)
            assert r.returncode == 0, f'{block}\n{r.stderr}'
            self.typed.append(block)
            return r.stdout
        out = ''
        for c in commands(block):
            self.typed.append(c)
            words = shlex.split(c, comments=True)
            if words[:2] == ['orcd', 'serve']: self.serve(c)
            elif shutil.which(words[0], path=self.env['PATH']) or words[0] == '.':
                r = self.run('bash', '-ec', c, input='hello\n')
                assert r.returncode == 0 or words == ['orcd', 'doctor'], f'{c}\n{r.stdout}\n{r.stderr}'
                assert 'Traceback' not in r.stderr, r.stderr
                out += r.stdout
            if '/shutdown' in c: self.end(asked=True)
        return out


@pytest.fixture
def terminal(tmp_path, monkeypatch):
    for program in 'bash', 'curl', 'make':
        if not shutil.which(program): pytest.skip(f'needs the program {program}')
    pytest.importorskip('huggingface_hub', reason='needs the extra hub: pip install "orcd[hub]"')
    pytest.importorskip('openai')
    t = Terminal(tmp_path, monkeypatch)
    yield t
    if t.worker and t.worker.poll() is None: os.killpg(t.worker.pid, signal.SIGKILL)
    t.hub.shutdown()


def shape(text):
    "Events and the names of fields: what an answer is made of, whatever it says"
    return set(re.findall(r'^event: \w+|"\w+"(?=:)', text, re.M))


def typed(terminal, text):
    "Type a page; the answers that it shows have the fields of those that came"
    printed = ''
    for language, block in blocks(text):
        if language == 'text':
            if shape(block): assert shape(block) <= shape(printed), f'{block}\ndiffers from\n{printed}'
        elif language in ('sh', 'python'): printed = terminal.type(language, block)
        else: pytest.fail(f'a block of {language}: what runs it?')
    terminal.end()
    return terminal.typed


def test_front_page(terminal):
    done = typed(terminal, (ROOT / 'README.md').read_text())
    for what in 'make demo', 'orcd serve', 'curl', 'orcd pull', 'orcd generate', 'orcd chat', 'pip install', 'import orcd', 'from openai': \
        assert any(d.startswith(what) for d in done), what


def test_operators_page(terminal):
    done = typed(terminal, page())
    assert len(done) > 20
    for what in 'orcd serve', 'curl', 'orcd info', 'orcd doctor', 'orcd generate', 'docker run', 'kubectl apply', 'from openai': \
        assert any(d.startswith(what) for d in done), what


@pytest.mark.parametrize('block, why', [
    ('curl localhost:8080/nothing', '404'), ('orcd generate demo rain --max-token 3', 'No such option'), ("pip install '.[gpu]'", 'gpu'),
    ('kubectl apply -f nbs/deploy/gone.yaml', 'gone.yaml'), ('orcd pull', 'Missing argument'),
    ('orcd serve --model demo --ports 1', 'ports')])
def test_a_wrong_page_is_seen(terminal, block, why):
    terminal.serve('orcd serve --model demo --device reference')
    with pytest.raises(AssertionError, match=why): terminal.type('sh', block + '\n')


def test_an_answer_that_changed_is_seen(terminal):
    text = '```sh\norcd serve --model demo --device reference\ncurl localhost:8080/health\n```\n'
    text += '```text\n{"status":"healthy","mood":"fine"}\n```\n'
    with pytest.raises(AssertionError, match='mood'): typed(terminal, text)
    typed(terminal, text.replace(',"mood":"fine"', ''))


def test_every_error_has_its_row():
    assert re.findall(r'^\| `([A-Z_]+)` \|', page(), re.M) == list(CODES)


def test_figures_of_the_unit():
    "What the page says of systemd's judgement, asked again"
    tool = shutil.which('systemd-analyze')
    if not tool: pytest.skip('needs the program systemd-analyze')
    unit = ROOT / 'nbs' / 'deploy' / 'orcd.service'
    r = subprocess.run([tool, 'security', '--offline=true', '--no-pager', unit], capture_output=True, text=True)
    found = re.search(r'Overall exposure level for orcd.service: ([\d.]+)', r.stdout)
    if not found: pytest.skip('needs systemd-analyze 250')
    said = float(re.search(r'from 0 \(closed\) to 10 \(open\), is ([\d.]+):', page())[1])
    assert abs(float(found[1]) - said) < .3, 'versions of systemd weigh a little otherwise'


def test_pip_names_what_pyproject_has():
    "Every extra that a page or a message of the package names"
    extras = set(tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies'])
    for p in [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', OPERATING, *(ROOT / 'orcd').rglob('*.py')]:
        for names in re.findall(r'''(?:orcd|['"]\.)\[([a-z][\w,]*)\]''', p.read_text()):
            assert set(names.split(',')) <= extras, (p.name, names)
