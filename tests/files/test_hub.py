"`orcd pull` against a hub of our own on loopback: whole, cut and wrong files"
import errno, gzip, hashlib, json, os, re, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from orcd.files import hub
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
        # a test's own way to answer GET; headers of every request; the size that HEAD states; waited for before each piece
        self.answer, self.seen, self.size, self.go = None, [], None, None
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
        if h.etag: self.send_header('ETag', f'"{h.etag}"'); self.send_header('X-Linked-ETag', f'"{h.etag}"')
        self.send_header('X-Linked-Size', str(len(h.data) if h.size is None else h.size))
        self.send_header('X-Repo-Commit', 'c' * 40); self.send_header('Accept-Ranges', 'bytes')
        if status == 206: self.send_header('Content-Range', f'bytes {start}-{len(h.data) - 1}/{len(h.data)}')
        self.end_headers()

    def known(self):
        if self.path.startswith('/me/repo/resolve/'): return True
        self.send_response(404)
        self.send_header('X-Error-Code', 'EntryNotFound')
        self.send_header('Content-Length', '0')
        self.end_headers()

    def do_HEAD(self):
        self.server.seen.append((self.command, dict(self.headers)))
        if self.known(): self.headers_for(200, len(self.server.data))

    def do_GET(self):
        h = self.server
        h.seen.append((self.command, dict(self.headers)))
        if not self.known(): return
        if h.answer: h.gets.append(0); return h.answer(self)
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
        for at in range(start, len(h.data), 50_000):
            if h.go: h.go.wait(60)
            self.wfile.write(h.data[at:at + 50_000])


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv('ORCD_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('HF_HUB_DISABLE_XET', '1')
    monkeypatch.setitem(hub.MODELS, 'toy', hub.Remote('me/repo', 'toy.gguf', 'r' * 40, len(DATA), SHA))
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
    with pytest.raises(HubError, match='SHA-256|more than the stated 300004 bytes'): hub.pull('toy', progress=False, endpoint=fake.url)
    with pytest.raises(ModelError): hub.find('toy')
    assert not list(hub.models_dir().rglob('*.gguf'))
    fake.data = DATA
    assert hub.pull('toy', progress=False, endpoint=fake.url).read_bytes() == DATA


# --- two at once

def started(f, *args, **kwargs):
    "A thread and what came of it"
    out = []
    def run():
        try: out.append(f(*args, **kwargs))
        except BaseException as e: out.append(e)
    t = threading.Thread(target=run, daemon=True)
    t.start()
    return t, out


def until(what):
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(.01)


def test_two_at_once(fake, capsys):
    "The second waits, says so, and finds the file; the bytes came once"
    fake.go = threading.Event()
    a, first = started(hub.pull, 'toy', endpoint=fake.url)
    until(lambda: fake.gets)
    b, second = started(hub.pull, 'toy', endpoint=fake.url)
    said = []
    until(lambda: said.append(capsys.readouterr().err) or 'waiting' in ''.join(said))
    assert ''.join(said).count('toy.gguf is being pulled by another process: waiting for it') == 1
    fake.go.set()
    a.join(60); b.join(60)
    assert first == second == [hub.place(hub.remote('toy'))] and first[0].read_bytes() == DATA and fake.gets == [0]
    assert [p.name for p in first[0].parent.iterdir()] == ['toy.gguf']


def test_one_fails_the_other_goes_on(fake):
    "Who waits takes over what the other one left"
    fake.go = threading.Event()
    def broken(h):
        h.headers_for(200, len(DATA)); h.wfile.write(DATA[:100_000]); h.wfile.flush()
        fake.go.wait(60)
        fake.answer = None
        h.close_connection = True; h.connection.close()
    fake.answer = broken
    a, first = started(hub.pull, 'toy', progress=False, endpoint=fake.url)
    until(lambda: [p for p in hub.models_dir().rglob('*.part') if p.stat().st_size])
    b, second = started(hub.pull, 'toy', progress=False, endpoint=fake.url)
    fake.go.set()
    a.join(60); b.join(60)
    assert first == second and first[0].read_bytes() == DATA and fake.gets[-1] == 100_000


def test_the_lock_of_a_dead_process(fake, tmp_path):
    "goes with it, however it ended"
    target = hub.place(hub.remote('toy'))
    target.parent.mkdir(parents=True)
    part = target.with_name(f'toy.gguf.{SHA[:16]}.part')
    code = (f"from orcd.files import hub; from pathlib import Path; f = hub._locked(Path({str(part)!r}), Path({str(target)!r})); "
        f"f.write(b'GGUF'); print('here', flush=True); input()")
    p = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert p.stdout.readline() == b'here\n'
    t, got = started(hub.pull, 'toy', progress=False, endpoint=fake.url)
    t.join(.3)
    assert t.is_alive() and not fake.gets
    p.send_signal(signal.SIGKILL); p.wait()
    t.join(60)
    assert got == [target] and target.read_bytes() == DATA and fake.gets == [4]


# --- servers that do as they like

def test_more_than_was_stated_is_cut_off(fake):
    "Nothing behind the stated size is written, however long it goes on; nobody hangs"
    largest, write = [0], hub._write
    def endless(h):
        h.send_response(200); h.send_header('Transfer-Encoding', 'chunked'); h.end_headers()
        try:
            while True: h.wfile.write(b'10000\r\n' + bytes(1 << 16) + b'\r\n')
        except OSError: h.close_connection = True
    def watch(f, block):
        write(f, block)
        largest[0] = max(largest[0], f.tell())
    fake.answer = endless
    hub._write = watch
    try:
        with pytest.raises(HubError, match='more than the stated 300004 bytes') as e: hub.pull('toy', progress=False, endpoint=fake.url)
    finally: hub._write = write
    assert '\n' not in str(e.value) and len(fake.gets) == 1 and 200_000 < largest[0] <= len(DATA)
    assert not [p for p in hub.models_dir().rglob('*') if p.is_file() and p.stat().st_size]


def test_compressed_answers(fake):
    "We ask for the bytes as they are, and take nothing else"
    packed = gzip.compress(bytes(10_000_000))
    def answer(h):
        h.send_response(200); h.send_header('Content-Encoding', 'gzip'); h.send_header('Content-Length', str(len(packed))); h.end_headers()
        h.wfile.write(packed)
    fake.answer = answer
    with pytest.raises(HubError, match='sent compressed .gzip'): hub.pull('toy', progress=False, endpoint=fake.url)
    assert [h['accept-encoding'] for _, h in [(c, {k.lower(): v for k, v in h.items()}) for c, h in fake.seen]] == ['identity']
    assert len(fake.gets) == 1


def leave(fake, n, data=DATA, key=SHA[:16], name='toy'):
    "A partial file of yesterday"
    target = hub.place(hub.remote(name))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f'{target.name}.{key}.part')
    part.write_bytes(data[:n])
    return part


def test_a_server_without_ranges(fake):
    leave(fake, 100_000, b'x' * 100_000)
    def whole(h): h.headers_for(200, len(DATA)); h.wfile.write(DATA)
    fake.answer = whole
    assert hub.pull('toy', progress=False, endpoint=fake.url).read_bytes() == DATA and len(fake.gets) == 1


@pytest.mark.parametrize('wrong', ['bytes 0-300003/300004', 'bytes 100000-300003/999999', 'bytes 99999-300003/300004', None, 'nonsense',
    'bytes 100000-300003'])
def test_another_part_than_was_asked_for(fake, wrong):
    part = leave(fake, 100_000)
    def answer(h):
        h.send_response(206); h.send_header('Content-Length', str(len(DATA) - 100_000))
        if wrong: h.send_header('Content-Range', wrong)
        h.end_headers(); h.wfile.write(DATA[100_000:])
    fake.answer = answer
    with pytest.raises(HubError, match='not the part of the file that was asked for'): hub.pull('toy', progress=False, endpoint=fake.url)
    assert part.read_bytes() == DATA[:100_000]
    fake.answer = None
    assert hub.pull('toy', progress=False, endpoint=fake.url).read_bytes() == DATA and fake.gets[-1] == 100_000


def test_answers_that_end_early(fake, monkeypatch):
    "Without a length nobody sees that an answer was cut, except by the size: the rest is asked for"
    monkeypatch.setattr(time, 'sleep', lambda s: None)
    def some(h):
        start = int((re.match(r'bytes=(\d+)-', h.headers.get('Range', '')) or [0, 0])[1])
        h.send_response(206 if start else 200); h.send_header('Connection', 'close')
        if start: h.send_header('Content-Range', f'bytes {start}-{len(DATA) - 1}/{len(DATA)}')
        h.end_headers(); h.wfile.write(DATA[start:start + 70_000]); h.close_connection = True
    fake.answer = some
    assert hub.pull('toy', progress=False, endpoint=fake.url).read_bytes() == DATA and len(fake.gets) == 5
    hub.place(hub.remote('toy')).unlink()
    fake.gets.clear()
    def nothing(h): h.send_response(200); h.send_header('Connection', 'close'); h.end_headers(); h.close_connection = True
    fake.answer = nothing
    with pytest.raises(HubError, match='nothing more is sent. Run the same command again'):
        hub.pull('toy', progress=False, endpoint=fake.url)
    assert len(fake.gets) == hub.TRIES + 1


@pytest.mark.parametrize('status, tries', [(403, 1), (404, 1), (416, 1), (500, hub.TRIES + 1), (503, hub.TRIES + 1), (429, hub.TRIES + 1)])
def test_refusals(fake, monkeypatch, status, tries):
    "What will not change is asked for once, what may pass is asked for again"
    monkeypatch.setattr(time, 'sleep', lambda s: None)
    def no(h): h.send_response(status); h.send_header('Content-Length', '0'); h.end_headers()
    fake.answer = no
    with pytest.raises(HubError, match='me/repo/toy.gguf') as e: hub.pull('toy', progress=False, endpoint=fake.url)
    assert len(fake.gets) == tries and '\n' not in str(e.value) and str(status) in str(e.value)


def test_another_version_is_not_continued(fake):
    "The file of a branch changed between two runs: yesterday's bytes are not its beginning, and go"
    old = leave(fake, 100_000, b'o' * 100_000, key=hashlib.sha256(b'old').hexdigest()[:16], name='me/repo/x.gguf')
    older = old.with_name('x.gguf.part')
    older.write_bytes(b'GGUF')
    path = hub.pull('me/repo/x.gguf', progress=False, endpoint=fake.url)
    assert path.read_bytes() == DATA and fake.gets == [0] and [p.name for p in path.parent.iterdir()] == ['x.gguf']


def test_the_token_is_for_the_hub(fake, monkeypatch):
    "It is not sent to the server that the hub leads to"
    monkeypatch.setenv('HF_TOKEN', 'hf_' + 'x' * 30)
    cdn = Hub()
    def lead(h):
        h.send_response(302)
        h.send_header('Location', f'{cdn.url}{h.path}')
        h.send_header('Content-Length', '0')
        h.end_headers()
    fake.answer = lead
    try:
        assert hub.pull('toy', progress=False, endpoint=fake.url).read_bytes() == DATA and cdn.gets == [0]
        lower = lambda h: {k.lower(): v for k, v in h.items()}
        assert [lower(h)['authorization'] for _, h in fake.seen] == ['Bearer hf_' + 'x' * 30]
        assert len(cdn.seen) == 1 and 'authorization' not in lower(cdn.seen[0][1]) and 'xxxx' not in str(cdn.seen)
    finally: cdn.shutdown()


@pytest.mark.parametrize('name', ['toy', 'me/repo/x.gguf'])
@pytest.mark.parametrize('odd', ['\x0b', '\x1b', 'ö', '\udcff'])
def test_a_token_that_cannot_be_sent(fake, monkeypatch, name, odd):
    "is not repeated in an error message, and nothing is asked for"
    monkeypatch.setenv('HF_TOKEN', f'hf_secret{odd}word')
    with pytest.raises(HubError, match='HF_TOKEN') as e: hub.pull(name, progress=False, endpoint=fake.url)
    assert 'secret' not in str(e.value) and 'word' not in str(e.value) and not fake.seen


@pytest.mark.parametrize('name', ['toy', 'me/repo/x.gguf'])
@pytest.mark.parametrize('endpoint', ['127.0.0.1:9', 'ftp://127.0.0.1', 'http://[::1', 'http://127.0.0.1:port'])
def test_an_endpoint_that_is_no_address(fake, monkeypatch, name, endpoint):
    "No second try would help: what is set wrongly is to be looked for"
    monkeypatch.setattr(time, 'sleep', lambda s: pytest.fail('tried again'))
    with pytest.raises(HubError, match='HF_ENDPOINT') as e: hub.pull(name, progress=False, endpoint=endpoint)
    assert hub.AGAIN not in str(e.value) and '\n' not in str(e.value)


def test_a_server_that_never_gets_further(fake, monkeypatch):
    "It knows no ranges and cuts now here, now there: what came before is no progress"
    monkeypatch.setattr(time, 'sleep', lambda s: None)
    def some(h):
        h.headers_for(200, len(DATA))
        h.wfile.write(DATA[:1000 + len(fake.gets) % 2 * 1000])
        h.close_connection = True
    fake.answer = some
    with pytest.raises(HubError, match='Run the same command again'): hub.pull('toy', progress=False, endpoint=fake.url)
    assert len(fake.gets) <= 2 + hub.TRIES


def test_a_folder_in_the_way_of_the_file(fake):
    "is found before gigabytes are fetched"
    hub.place(hub.remote('toy')).mkdir(parents=True)
    with pytest.raises(HubError, match='a folder is where the file belongs'): hub.pull('toy', progress=False, endpoint=fake.url)
    assert not fake.seen


@pytest.mark.parametrize('status', [401, 418, 500])
def test_errors_repeat_no_secrets_of_a_url(fake, monkeypatch, status):
    "A password in the endpoint, the signature of the address that the hub leads to"
    monkeypatch.setattr(time, 'sleep', lambda s: None)
    def no(h):
        h.send_response(status if 'Signature' in h.path else 302)
        h.send_header('Location', f'http://someone:hunter2@127.0.0.1:{fake.server_port}{h.path}?Signature=hush&x=1')
        h.send_header('Content-Length', '0'); h.end_headers()
    fake.answer = no
    with pytest.raises(HubError) as e: hub.pull('toy', progress=False, endpoint=fake.url.replace('//', '//me:hunter2@'))
    assert str(status) in str(e.value) and '127.0.0.1' in str(e.value) and 'hunter2' not in str(e.value) and 'hush' not in str(e.value)


def test_reasons_are_short():
    e = OSError("'http://a:b@c/d?e=f' and https://u:p@[::1]:1/x#y, ok@home? " + 'x' * 9999 + '\nmore')
    assert hub._reason(e).startswith("OSError: 'http://c/d' and https://[::1]:1/x ok@home? xxx") and len(hub._reason(e)) < 600


def test_a_redirect_in_a_circle(fake, monkeypatch):
    monkeypatch.setattr(time, 'sleep', lambda s: None)
    def lead(h): h.send_response(302); h.send_header('Location', h.path); h.send_header('Content-Length', '0'); h.end_headers()
    fake.answer = lead
    with pytest.raises(HubError) as e: hub.pull('toy', progress=False, endpoint=fake.url)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('etag', ['d41d8cd98f00b204e9800998ecf8427e', None, 'W/x'])
def test_without_a_checksum(fake, etag):
    "Only whoever says so gets a file that nobody can check; its size is checked all the same"
    fake.etag = etag
    with pytest.raises(HubError, match='states no SHA-256.*--no-verify'): hub.pull('me/repo/x.gguf', progress=False, endpoint=fake.url)
    assert not fake.gets
    path = hub.pull('me/repo/x.gguf', progress=False, endpoint=fake.url, verify=False)
    assert path.read_bytes() == DATA
    path.unlink()
    fake.size = len(DATA) - 1
    with pytest.raises(HubError, match='more than the stated'): hub.pull('me/repo/x.gguf', progress=False, endpoint=fake.url, verify=False)


def test_a_stated_checksum_is_checked_in_any_case(fake):
    fake.etag = '0' * 64
    with pytest.raises(HubError, match='SHA-256'): hub.pull('me/repo/x.gguf', progress=False, endpoint=fake.url, verify=False)


@pytest.mark.parametrize('size', [0, -5, ''])
def test_a_file_without_a_size(fake, size):
    fake.size = size
    if size == '': fake.data = b''                                         # HEAD's own length says nothing either
    with pytest.raises(HubError, match='states no size'): hub.pull('me/repo/x.gguf', progress=False, endpoint=fake.url)
    assert not fake.gets


# --- what lies in the way

@pytest.mark.parametrize('what', ['link', 'dangling', 'hard', 'pipe', 'folder'])
def test_what_others_put_in_the_way(fake, tmp_path, what):
    "Nothing is written through a link; what is no file of ours is said"
    part, precious = leave(fake, 0), tmp_path / 'precious'
    precious.write_bytes(b'GGUF')
    part.unlink()
    if what == 'link': part.symlink_to(precious)
    elif what == 'dangling': part.symlink_to(tmp_path / 'new')
    elif what == 'hard': os.link(precious, part)
    elif what == 'pipe': os.mkfifo(part)
    else: part.mkdir()
    with pytest.raises(HubError, match=f'{part.name}: ') as e: hub.pull('toy', progress=False, endpoint=fake.url)
    assert '\n' not in str(e.value) and precious.read_bytes() == b'GGUF' and not (tmp_path / 'new').exists() and not fake.gets


def test_a_folder_that_cannot_be_made(fake, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('ORCD_CACHE_DIR', str(tmp_path / 'file' / 'cache'))
    with pytest.raises(HubError, match='file/cache') as e: hub.pull('toy', progress=False, endpoint=fake.url)
    assert '\n' not in str(e.value)
    with pytest.raises(ModelError): hub.find('toy')


def test_a_disk_that_gets_full(fake, monkeypatch):
    "What came stays, and the next run goes on with it"
    write = hub._write
    def full(f, block):
        if f.tell() + len(block) > 150_000: write(f, block[:150_000 - f.tell()]); raise OSError(errno.ENOSPC, 'No space left on device')
        write(f, block)
    monkeypatch.setattr(hub, '_write', full)
    with pytest.raises(HubError, match='the disk is full: make room and run the same command again') as e:
        hub.pull('toy', progress=False, endpoint=fake.url)
    assert len(fake.gets) == 1 and '\n' not in str(e.value)
    monkeypatch.setattr(hub, '_write', write)
    assert hub.pull('toy', progress=False, endpoint=fake.url).read_bytes() == DATA and fake.gets[-1] == 150_000


def test_a_disk_that_cannot_be_read(fake, monkeypatch):
    def broken(*_): raise OSError(errno.EIO, 'Input/output error')
    monkeypatch.setattr(hub, 'sha256', broken)
    with pytest.raises(HubError, match='toy.gguf.*part: Input/output error'): hub.pull('toy', progress=False, endpoint=fake.url)


def test_a_disk_that_fails_at_the_end(fake, monkeypatch):
    def broken(fd): raise OSError(errno.EIO, 'Input/output error')
    monkeypatch.setattr(os, 'fsync', broken)
    with pytest.raises(HubError, match='toy.gguf: Input/output error'): hub.pull('toy', progress=False, endpoint=fake.url)
    with pytest.raises(ModelError): hub.find('toy')


def test_not_there(fake):
    with pytest.raises(HubError, match='other/repo'): hub.pull('other/repo/x.gguf', progress=False, endpoint=fake.url)


def test_no_network(fake, monkeypatch):
    import time
    monkeypatch.setattr(time, 'sleep', lambda s: None)                     # between its attempts
    for name in 'toy', 'other/repo/x.gguf':
        says = 'the hub cannot be reached .*Connection refused.*look at the network.*Run the same command again'
        with pytest.raises(HubError, match=says) as e:
            hub.pull(name, progress=False, endpoint='http://127.0.0.1:9')
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
    r = subprocess.run([sys.executable, '-m', 'orcd.serve.cli', 'pull', 'me/repo/x.gguf'], env=env, capture_output=True,
        text=True, cwd=ROOT)
    assert r.returncode == 0 and Path(r.stdout.strip()).read_bytes() == DATA, r.stderr
    fake.etag = None
    for flags, rc in ((), 1), (('--no-verify',), 0):
        r = subprocess.run([sys.executable, '-m', 'orcd.serve.cli', 'pull', 'me/repo/y.gguf', *flags], env=env, capture_output=True,
            text=True, cwd=ROOT)
        assert r.returncode == rc and ('--no-verify' in r.stderr) == bool(rc), r.stderr
    r = subprocess.run([sys.executable, '-m', 'orcd.serve.cli', 'pull', 'nonsense'], env=env, capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 1 and r.stderr.count('\n') == 1 and 'qwen2.5-0.5b' in r.stderr


PARTS = [f'me/repo/sub/big-{i:05}-of-00003.gguf' for i in (1, 2, 3)]


@pytest.mark.parametrize('name', PARTS)
def test_all_parts_come(fake, name):
    "By the name of any of them; what is here already is not fetched again"
    here = hub.place(hub.remote(PARTS[1]))
    here.parent.mkdir(parents=True)
    here.write_bytes(DATA)
    with pytest.raises(ModelError, match='not all of its parts: orcd pull'): hub.find(name)
    path = hub.pull(name, progress=False, endpoint=fake.url)
    assert path.name == 'big-00001-of-00003.gguf' and fake.gets == [0, 0]
    assert sorted(p.name for p in path.parent.iterdir()) == [p.rpartition('/')[2] for p in PARTS]
    assert all(p.read_bytes() == DATA for p in path.parent.iterdir()) and hub.find(name).name == name.rpartition('/')[2]
    assert hub.pull(name, progress=False, endpoint='http://127.0.0.1:9') == path
    listed, = hub.as_models(hub.pulled())
    assert (listed.name, listed.path, listed.size, listed.whole) == (PARTS[0], path, 3*len(DATA), True)
    for p in hub.pulled(): hub.remove(p)
    assert not list(hub.models_dir().iterdir())


def test_a_part_that_is_nowhere_is_missed_at_once(fake, monkeypatch):
    known = Handler.known
    def all_but_the_last(self):
        if '00003-of' in self.path: self.path = '/nowhere'
        return known(self)
    monkeypatch.setattr(Handler, 'known', all_but_the_last)
    with pytest.raises(HubError, match='big-00003-of-00003.gguf: ') as e: hub.pull(PARTS[0], progress=False, endpoint=fake.url)
    assert not fake.gets and '\n' not in str(e.value)


def test_parts_that_do_not_fit_together(fake, monkeypatch):
    "Each would, all do not: nothing is fetched; what was fetched before counts"
    free = [2*len(DATA)]
    monkeypatch.setattr(hub.shutil, 'disk_usage', lambda p: __import__('types').SimpleNamespace(free=free[0]))
    with pytest.raises(HubError, match='and its other parts has') as e: hub.pull(PARTS[0], progress=False, endpoint=fake.url)
    assert not fake.gets and '\n' not in str(e.value)
    part = hub.place(hub.remote(PARTS[0]))
    part.parent.mkdir(parents=True)
    part.with_name(f'{part.name}.{SHA[:16]}.part').write_bytes(DATA[:200_000])
    free[0] = 3*len(DATA) - 200_000
    assert hub.pull(PARTS[0], progress=False, endpoint=fake.url).read_bytes() == DATA and fake.gets == [200_000, 0, 0]


def test_a_pull_of_parts_that_is_cut_goes_on(fake, monkeypatch):
    monkeypatch.setattr(time, 'sleep', lambda s: None)
    fake.cut_at, fake.cuts = 100_000, 99
    with pytest.raises(HubError, match='big-00001-of-00003.gguf: .*Run the same command again'):
        hub.pull(PARTS[2], progress=False, endpoint=fake.url)
    listed, = hub.as_models(hub.pulled())
    assert (listed.name, listed.whole) == (PARTS[0], False) and 0 < listed.size <= 100_000
    fake.cuts = 0
    assert hub.pull(PARTS[2], progress=False, endpoint=fake.url).read_bytes() == DATA


def test_the_table_says_what_was_published(shared):
    for name in hub.MODELS:
        r = hub.MODELS[name]
        f, = [json.loads(p.read_text()) for p in shared.glob('*.json') if json.loads(p.read_text()).get('file') == r.file]
        assert (f['repo'], f['sha256'], f['file_bytes']) == (r.repo, r.sha256, r.size) and f['revision'].startswith(r.revision)
