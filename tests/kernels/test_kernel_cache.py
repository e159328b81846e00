"What is kept of compiled kernels: believed when it is ours and whole, else compiled again; nothing is left behind"
import errno, multiprocessing, os, subprocess, sys
from pathlib import Path
import pytest
from orcd.kernels import nvrtc

CODE = b'\x7fELF' + bytes(range(256))*400


@pytest.fixture
def cache(monkeypatch, tmp_path):
    "A cache of its own and a compiler that counts; `ask` gives a kernel's code as a new process would get it"
    monkeypatch.setenv('ORCD_CACHE_DIR', str(tmp_path / 'cache'))
    compiled = []
    def compile_text(name, source, arch, defines):
        compiled.append(name)
        return nvrtc.Compiled(name, arch, CODE + name.encode(), '')
    monkeypatch.setattr(nvrtc, 'compile_text', compile_text)
    def ask(name='elementwise'):
        nvrtc.cubin.cache_clear()
        data, n = nvrtc.cubin(name, 'sm_90'), len(compiled)
        compiled.clear()
        assert data == CODE + name.encode()
        return bool(n)
    yield ask
    nvrtc.cubin.cache_clear()


def entry(name='elementwise'): return nvrtc._cache_path(name, nvrtc.read_source(name), 'sm_90', ())
def there(): return sorted(p.name for p in nvrtc.cache_dir().iterdir())


def test_compiled_once(cache):
    assert cache() and not cache() and there() == [entry().name]
    assert entry().stat().st_mode & 0o777 == 0o644


def flipped(p, at):
    data = bytearray(p.read_bytes())
    data[at] ^= 16
    p.write_bytes(data)


DAMAGE = dict(
    cut=lambda p: os.truncate(p, p.stat().st_size // 3), emptied=lambda p: os.truncate(p, 0), three_bytes=lambda p: os.truncate(p, 3), one_byte_less=lambda p: os.truncate(p, p.stat().st_size - 1),
    longer=lambda p: p.write_bytes(p.read_bytes() + b'x'), flipped=lambda p: flipped(p, 5000), sum_flipped=lambda p: flipped(p, -1), first_flipped=lambda p: flipped(p, 0),
    zeros=lambda p: p.write_bytes(bytes(p.stat().st_size)), overwritten=lambda p: p.write_bytes(b'\x7fELF' + b'junk'*100), without_sum=lambda p: p.write_bytes(CODE + b'elementwise'),
    others_may_write=lambda p: p.chmod(0o666), group_may_write=lambda p: p.chmod(0o664), huge=lambda p: os.truncate(p, 1 << 40))


@pytest.mark.parametrize('how', DAMAGE)
def test_a_damaged_entry(cache, how):
    "is compiled again and replaced"
    cache()
    DAMAGE[how](entry())
    assert cache() and not cache() and there() == [entry().name]


@pytest.mark.parametrize('what', ['folder', 'pipe', 'link', 'dangling', 'other_kernel'])
def test_something_else_in_its_place(cache, tmp_path, what):
    cache()
    cache('gemv')
    good = entry().read_bytes()
    if what == 'other_kernel': entry().write_bytes(entry('gemv').read_bytes())     # whole, but not what its name says
    else:
        entry().unlink()
        (tmp_path / 'good').write_bytes(good)
        dict(folder=lambda: entry().mkdir(), pipe=lambda: os.mkfifo(entry()), link=lambda: entry().symlink_to(tmp_path / 'good'),
            dangling=lambda: entry().symlink_to(tmp_path / 'nothing'))[what]()
    assert cache() and not cache() and entry().read_bytes() == good and not entry().is_symlink() and len(there()) == 2
    assert not (tmp_path / 'nothing').exists()


@pytest.mark.skipif(os.geteuid() != 0, reason='only root gives files away')
def test_an_entry_of_another_user(cache):
    cache()
    os.chown(entry(), 54321, -1)
    assert cache() and entry().stat().st_uid == 0 and not cache()


def test_who_may_have_written_it(monkeypatch):
    st = lambda mode, uid: os.stat_result((mode, 1, 1, 1, uid, 0, 10, 0, 0, 0))
    monkeypatch.setattr(os, 'geteuid', lambda: 1000)
    assert [nvrtc._is_ours(st(0o100644, uid)) for uid in (0, 1000, 1001)] == [True, True, False]
    assert [nvrtc._is_ours(st(mode, 1000)) for mode in (0o100600, 0o100664, 0o100646, 0o40755, 0o10644)] == [True, False, False, False, False]


@pytest.mark.parametrize('call', ['fchmod', 'replace', 'write'])
def test_a_full_disk(cache, monkeypatch, call):
    "The kernel is there all the same, and no piece of a file"
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        if call == 'write': m.setattr(os, 'fdopen', lambda fd, mode, real=os.fdopen: Full(real(fd, mode)))
        else: m.setattr(os, call, full)
        assert cache() and cache() and there() == []
    assert cache() and not cache()


class Full:
    "A file on a disk that has room for a part"
    def __init__(self, f): self.f = f
    def __enter__(self): return self
    def __exit__(self, *_): self.f.close()
    def write(self, data):
        self.f.write(data[:1000])
        raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_limit_of_the_system(tmp_path):
    "The kernel's own refusal, in a process of its own"
    code = f"""
import os, resource
from pathlib import Path
from orcd.kernels import nvrtc
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
nvrtc._store(Path({str(tmp_path)!r}) / 'k' / 'x.cubin', bytes(100_000))
print(os.listdir({str(tmp_path)!r} + '/k'))
"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[2])))
    assert (r.returncode, r.stdout.strip()) == (0, '[]'), r.stderr


def test_an_interrupt_while_it_is_written(cache, monkeypatch):
    def interrupt(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', interrupt)
        with pytest.raises(KeyboardInterrupt): cache()
    assert there() == []


def test_a_cache_that_cannot_be(cache, monkeypatch, tmp_path):
    "A file where the folder should be, no home, a home that only has a name"
    (tmp_path / 'file').touch()
    monkeypatch.setenv('ORCD_CACHE_DIR', str(tmp_path / 'file' / 'x'))
    assert cache() and cache()
    def nobody(): raise RuntimeError('Could not determine home directory.')
    monkeypatch.setattr(Path, 'home', nobody)
    for k in 'ORCD_CACHE_DIR', 'XDG_CACHE_HOME': monkeypatch.setenv(k, '')
    assert nvrtc.cache_dir() is None and cache() and cache()
    monkeypatch.setenv('ORCD_CACHE_DIR', '~no_such_user/cache')
    assert nvrtc.cache_dir() is None and cache()


def write_and_read(path, n):
    for i in range(n):
        data = CODE + bytes([i % 256])
        nvrtc._store(path, data)
        seen = nvrtc._cached(path)
        if seen is None or not seen.startswith(CODE): raise AssertionError(seen and len(seen))


def test_many_processes_at_once(tmp_path):
    "Each reads what one of them wrote, whole"
    path = tmp_path / 'k' / 'x.cubin'
    some = [multiprocessing.get_context('spawn').Process(target=write_and_read, args=(path, 150)) for _ in range(4)]
    for p in some: p.start()
    for p in some: p.join(120)
    assert [p.exitcode for p in some] == [0]*4 and os.listdir(path.parent) == ['x.cubin']
