"Start real worker processes, talk to them over sockets, read their logs"
import contextlib, http.client, json, os, signal, socket, subprocess, sys, threading, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# seconds until what should happen at once counts as never: a slow and busy machine has its time, and what tests forbid takes longer still
PATIENCE = 60
PATH = os.pathsep.join([str(ROOT), str(ROOT / 'tests'), *filter(None, [os.environ.get('PYTHONPATH')])]) # packages may lie there


class Proc:
    "A worker process; its log lines are collected as they come"
    def __init__(self, command, env=None, wait=True, read=True):
        e = dict(os.environ, PYTHONPATH=PATH, **(env or {}))
        self.p = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=e, cwd=ROOT / 'tests')
        self.log, self.raw, self._new = [], [], threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        if read: self.reader.start()
        if wait: self.ready()

    def _read(self):
        for line in self.p.stderr:
            with self._new:
                self.raw.append(line.decode())
                self.log.append(json.loads(line) if line.startswith(b'{') else dict(event=None, raw=line.decode()))
                self._new.notify_all()

    def ready(self, timeout=PATIENCE):
        "Wait for the port: with a cold cache the kernels are compiled first"
        self.address = self.event('ready', timeout)['uri'].removeprefix('http://')

    def event(self, name, timeout=PATIENCE, n=1, **fields):
        "Wait for the n-th log line of that event"
        def found():
            hits = [e for e in self.log if e['event'] == name and all(e.get(k) == v for k, v in fields.items())]
            return hits[n - 1] if len(hits) >= n else None
        with self._new:
            assert self._new.wait_for(lambda: found() or self.p.poll() is not None, timeout), f'no {name}: {self.raw}'
        time.sleep(.05) if not found() else None
        assert found(), f'ended without {name}: {self.raw}'
        return found()

    def end(self, timeout=PATIENCE):
        "Exit code"
        code = self.p.wait(timeout)
        if self.reader.ident: self.reader.join(PATIENCE)
        return code

    def signal(self, s=signal.SIGTERM): self.p.send_signal(s)

    # --- HTTP
    @property
    def host(self): return self.address.rsplit(':', 1)[0]
    @property
    def port(self): return int(self.address.rsplit(':', 1)[1])

    def connect(self, timeout=PATIENCE): return socket.create_connection((self.host, self.port), timeout)

    def request(self, method, path, body=None, headers=None, timeout=PATIENCE):
        "(status, headers, JSON body)"
        c = http.client.HTTPConnection(self.address, timeout=timeout)
        if isinstance(body, (dict, list)): body = json.dumps(body)
        c.request(method, path, body, {'Content-Type': 'application/json'} | (headers or {}))
        r = c.getresponse()
        data = r.read()
        c.close()
        return r.status, r.headers, json.loads(data) if data and r.headers.get('Content-Type') == 'application/json' else data

    def health(self): return self.request('GET', '/health')[2]
    def post(self, path, body=None, **kw): return self.request('POST', path, body, **kw)

    def execute(self, job_id='1', timeout=PATIENCE, headers=None, **body):
        "A `Stream` of the events of a job"
        return Stream(self, dict(job_id=job_id) | body, timeout, headers)

    def execute_when_free(self, job_id, **body):
        "`execute`, tried again while the worker is busy"
        end = time.monotonic() + PATIENCE
        while True:
            try: return self.execute(job_id, **body)
            except AssertionError as e:
                if e.args[0][0] != 503 or time.monotonic() > end: raise

    def wait_state(self, state, timeout=PATIENCE):
        end = time.monotonic() + timeout
        while self.health()['state'] != state:
            assert time.monotonic() < end, f'never {state}'
            time.sleep(.005)


class Stream:
    "Events of one `/execute`, read one by one or all at once"
    def __init__(self, proc, body, timeout, headers=None):
        self.c = http.client.HTTPConnection(proc.address, timeout=timeout)
        self.c.request('POST', '/execute', json.dumps(body), {'Content-Type': 'application/json'} | (headers or {}))
        self.r = self.c.getresponse()
        assert self.r.status == 200, (self.r.status, self.r.read())
        self.comments = 0

    def frames(self):
        "(event line, data) of each frame, checked for their shape"
        lines = []
        for line in self.r:
            line = line.decode()
            assert line.endswith('\n')
            if line != '\n': lines.append(line[:-1]); continue
            if lines[0].startswith(':'): self.comments += 1
            else:
                assert len(lines) == 2 and lines[0].startswith('event: ') and lines[1].startswith('data: '), lines
                data = json.loads(lines[1][6:])
                assert data['type'] == lines[0][7:]
                yield data
            lines = []
        assert not lines

    def next(self): return next(self.frames())

    def all(self):
        events = list(self.frames())
        check(events)
        return events

    def close(self):
        "Leave at once, with unread bytes: the kernel sends a reset"
        sock = self.c.sock or self.r.fp.raw._sock
        with contextlib.suppress(OSError): sock.shutdown(socket.SHUT_RDWR)
        self.r.close(); self.c.close()


def check(events, started=True):
    "started -> token* -> (end | error), numbered without gaps"
    types = [e['type'] for e in events]
    body = types[1:-1] if started else types[:-1]
    assert (not started or types[0] == 'started') and types[-1] in ('end', 'error') and set(body) <= {'token'}, types
    assert [e['i'] for e in events if e['type'] == 'token'] == list(range(len(body)))


@contextlib.contextmanager
def worker(env=None, wait=True, read=True, **settings):
    "A process around the scripted model"
    p = Proc(['fake_worker.py', json.dumps(settings)], env, wait, read)
    try: yield p
    finally:
        if p.p.poll() is None: p.p.kill()
        p.p.wait(PATIENCE)


@contextlib.contextmanager
def quiet_logs():
    "Log lines of this process go nowhere"
    import logging, structlog
    from orcd.serve.logs import configure
    root, hooks = logging.getLogger(), (sys.excepthook, threading.excepthook)
    before = root.handlers, root.level
    configure('json', lambda line: None)
    try: yield
    finally:
        (root.handlers, root.level), (sys.excepthook, threading.excepthook) = before, hooks
        logging.captureWarnings(False)
        structlog.reset_defaults()


@contextlib.contextmanager
def orcd(*args, env=None, wait=False):
    "A process of the real command line"
    p = Proc(['-m', 'orcd.serve.cli', *args], env, wait)
    try: yield p
    finally:
        if p.p.poll() is None: p.p.kill()
        p.p.wait(PATIENCE)


def gone(pid):
    "Wait until a process is no more, or a zombie that nobody has asked for"
    for _ in range(1200):
        try: state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
        except (FileNotFoundError, ProcessLookupError): return True
        if state in 'ZX': return True
        time.sleep(.05)
    return False


def rss(pid):
    "Memory of a process that no file backs, in bytes"
    return int(next(l for l in open(f'/proc/{pid}/status') if l.startswith('RssAnon')).split()[1]) * 1024


def soak(w, jobs, seed=0, tokens=32, long='The rain falls. ' * 200, vram=lambda: 0):
    """Mixed jobs with random cancels, disconnects and bad requests. Every stream is checked; between them a probe asks the same thing
    again and again. Returns what the probes saw: [(text, tokens a second, host bytes, VRAM bytes)]."""
    import random
    r, seen = random.Random(seed), []

    def probe():
        *events, end = w.execute('probe', prompt='Rain', seed=1, temperature=.8, max_tokens=tokens).all()
        seen.append((''.join(e['t'] for e in events[1:]), end['tokens_out'] / max(end['decode_time_ms'], 1) * 1e3, rss(w.p.pid), vram()))

    def start(i):
        return w.execute(f'job-{i}', prompt=r.choice(['Rain', 'The moon', long]), max_tokens=r.choice([1, tokens, 2000]),
            temperature=r.choice([0, .7, 2]), timeout=2 * PATIENCE)
    def finish(i):
        check(list(w.execute(f'job-{i}', prompt=r.choice(['Rain', long]), max_tokens=tokens, stop=r.choice([[], ['a', 'the']])).frames()))
    def cancel(i):
        s = start(i)
        time.sleep(r.random() * .05)
        assert w.post(f'/cancel/job-{i}')[0] == 202
        check(list(s.frames()))
    def leave(i):
        s = start(i)
        for _ in zip(range(r.randrange(5)), s.frames()): pass
        s.close()
    def bad(i): assert w.post('/execute', dict(job_id=f'job-{i}', prompt='', top_p=7))[0] == 400
    def busy(i):
        s = start(i)
        status = w.post('/execute', dict(job_id='second', prompt='x', max_tokens=1))[0] if s.next() else 0
        assert status in (503, 200)
        w.post(f'/cancel/job-{i}'); list(s.frames())

    for i in range(jobs):
        r.choice([finish, finish, cancel, leave, bad, busy])(i)
        w.wait_state('ready')
        if i % max(jobs // 20, 1) == 0: probe()
    return seen
