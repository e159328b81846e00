"`orcd pull` against a hub of our own on loopback: whole, cut and wrong files"
import hashlib, json, os, re, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from orcd import hub
from orcd.errors import HubError, ModelError
from worker_tools import PATH, ROOT

pytest.importorskip('huggingface_hub', reason='needs the extra hub: pip install "orcd[hub]"')
DATA = b'GGUF' + os.urandom(300_000)
SHA = hashlib.sha256(DATA).hexdigest()


class Hub(ThreadingHTTPServer):
    "Serves one file like the hub does: HEAD with its size and checksum, GET with ranges; may cut connections"
    daemon_threads = True
    def __init__(self):
        self.data, self.etag, self.cut_at, self.cuts, self.gets = DATA, SHA, None, 0, []
        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}'


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass

    def headers_for(self, status, n, start=0):
        h = self.server
        self.send_response(status)
        self.send_header('Content-Length', str(n))
        self.send_header('ETag', f'"{h.etag}"'); self.send_header('X-Linked-ETag', f'"{h.etag}"'); self.send_header('X-Linked-Size', str(len(h.data)))
        self.send_header('X-Repo-Commit', 'c' * 40); self.send_header('Accept-Ranges', 'bytes')
        if status == 206: self.send_header('Content-Range', f'bytes {start}-{len(h.data) - 1}/{len(h.data)}')
        self.end_headers()

    def known(self):
        if self.path.startswith('/me/repo/resolve/'): return True
        self.send_response(404); self.send_header('X-Error-Code', 'EntryNotFound'); self.send_header('Content-Length', '0'); self.end_headers()

    def do_HEAD(self):
        if self.known(): self.headers_for(200, len(self.server.data))

    def do_GET(self):
        h = self.server
        if not self.known(): return
        if int((re.match(r'bytes=(\d+)-', self.headers.get('Range', '')) or [0, 0])[1]) > len(h.data): return self.send_error(416)
        m = re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))
        start = int(m[1]) if m else 0
        h.gets.append(start)
        self.headers_for(206 if m else 200, len(h.data) - start, start)
        if h.cuts:
            h.cuts -= 1
            if len(h.gets) == 1: self.wfile.write(h.data[start:start + h.cut_at]); self.wfile.flush()      # later ones are cut at once
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(h.data[start:])


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv('ORCD_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('HF_HUB_DISABLE_XET', '1')
    monkeypatch.setitem(hub.MODELS, 'toy', hub.Remote('me/repo', 'toy.gguf', 'r' * 40, len(DATA), SHA))
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 4096)            # what is lost when a connection is cut; 10 MB usually
    h = Hub()
    yield h
    h.shutdown()


def test_pull_and_find(fake):
    path = hub.pull('toy', progress=False, endpoint=fake.url)
    assert path.read_bytes() == DATA and hub.find('toy') == path
    n = len(fake.gets)
    assert hub.pull('toy', progress=False, endpoint='http://127.0.0.1:9') == path and len(fake.gets) == n    # no network for what is here


def test_any_file_of_the_hub(fake):
    path = hub.pull('me/repo/sub/other.gguf', progress=False, endpoint=fake.url)
    assert path.read_bytes() == DATA and path.name == 'other.gguf' and hub.find('me/repo/sub/other.gguf') == path


def test_a_cut_connection_is_resumed(fake):
    fake.cut_at, fake.cuts = 100_000, 1
    assert hub.pull('toy', progress=False, endpoint=fake.url).read_bytes() == DATA
    assert fake.gets[0] == 0 and fake.gets[1] > 0


def test_a_second_run_goes_on_where_the_first_stopped(fake, monkeypatch):
    import time
    monkeypatch.setattr(time, 'sleep', lambda s: None)                     # between its attempts
    fake.cut_at, fake.cuts = 10_000, 99
    with pytest.raises(HubError, match='Run the same command again') as e: hub.pull('toy', progress=False, endpoint=fake.url)
    assert '\n' not in str(e.value)
    with pytest.raises(ModelError): hub.find('toy')
    fake.cuts = 0
    assert hub.pull('toy', progress=False, endpoint=fake.url).read_bytes() == DATA and fake.gets[-1] > 4000


@pytest.mark.parametrize('wrong', [b'GGUF' + b'\0' * 300_000, DATA + b'x'])
def test_a_wrong_file_is_refused_and_deleted(fake, wrong):
    fake.data = wrong
    with pytest.raises(HubError, match='SHA-256|bytes instead'): hub.pull('toy', progress=False, endpoint=fake.url)
    with pytest.raises(ModelError): hub.find('toy')
    assert not [p for p in hub.models_dir().rglob('*.gguf')]
    fake.data = DATA
    assert hub.pull('toy', progress=False, endpoint=fake.url).read_bytes() == DATA


def test_not_there(fake):
    with pytest.raises(HubError, match='other/repo'): hub.pull('other/repo/x.gguf', progress=False, endpoint=fake.url)


def test_no_network(fake, monkeypatch):
    import time
    monkeypatch.setattr(time, 'sleep', lambda s: None)                     # between its attempts
    with pytest.raises(HubError) as e: hub.pull('toy', progress=False, endpoint='http://127.0.0.1:9')
    assert '\n' not in str(e.value)


def test_full_disk(fake, monkeypatch):
    monkeypatch.setattr(hub.shutil, 'disk_usage', lambda p: __import__('types').SimpleNamespace(free=10))
    with pytest.raises(HubError, match='free'): hub.pull('toy', progress=False, endpoint=fake.url)
    assert not fake.gets


def test_without_the_extra(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(HubError, match=r'pip install "orcd\[hub\]"'): hub.pull('toy', progress=False, endpoint=fake.url)


def test_command(fake, tmp_path):
    env = dict(os.environ, ORCD_CACHE_DIR=str(tmp_path), HF_ENDPOINT=fake.url, PYTHONPATH=PATH)
    r = subprocess.run([sys.executable, '-m', 'orcd.cli', 'pull', 'me/repo/x.gguf'], env=env, capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0 and Path(r.stdout.strip()).read_bytes() == DATA, r.stderr
    r = subprocess.run([sys.executable, '-m', 'orcd.cli', 'pull', 'nonsense'], env=env, capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 1 and r.stderr.count('\n') == 1 and 'qwen2.5-0.5b' in r.stderr


def test_the_table_says_what_was_published(shared):
    for name in hub.MODELS:
        r = hub.MODELS[name]
        f, = [json.loads(p.read_text()) for p in shared.glob('*.json') if json.loads(p.read_text()).get('file') == r.file]
        assert (f['repo'], f['sha256'], f['file_bytes']) == (r.repo, r.sha256, r.size) and f['revision'].startswith(r.revision)
