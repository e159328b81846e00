"How tests are spread over processes, what is said about those that did not run, fixtures every test may use"
import os
if 'PYTEST_XDIST_WORKER' in os.environ:     # there is a process for every core already; NumPy and PyTorch read it when they are imported
    for name in 'OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS': os.environ.setdefault(name, '1')
import re, shutil, signal, subprocess, sys
from collections import Counter
from pathlib import Path
import pytest

try: # no example has to be ready within some milliseconds; the gate's runs repeat themselves, a person's explore
    from hypothesis import settings
    settings.register_profile('person', deadline=None)
    settings.register_profile('ci', deadline=None, derandomize=True)
    settings.load_profile('ci' if os.environ.get('CI') else 'person')
except ImportError: pass

ROOT = Path(__file__).resolve().parent.parent

# nohup, and a shell for what it runs in the background, have signals ignored; programs that tests start would inherit that, and keep to it
for ignored, handler in (signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL):
    if signal.getsignal(ignored) is signal.SIG_IGN: signal.signal(ignored, handler)


def repository_files():
    "The files of the repository: what git follows, or, without git, what an unpacked sdist consists of"
    git = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True) if (ROOT / '.git').exists() else None
    if git and git.returncode == 0: names = git.stdout.split('\0')
    else: names = [n for n in (ROOT / 'orcd.egg-info' / 'SOURCES.txt').read_text().splitlines() if not n.startswith('orcd.egg-info/')]
    return {n for n in names if n and (ROOT / n).exists()}     # moved or removed, and not yet committed


def has_gpu():
    "True when cupy is installed and sees a device"
    try:
        import cupy
        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception: return False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    "`-n auto`: a process for every core that this one may use; more than eight have nothing to do"
    return min(8, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(config, items):
    gpu = [i for i in items if i.get_closest_marker('gpu')] # not `i.keywords`: the folder is called gpu too
    if not gpu: return
    reason = ('an NVIDIA GPU and cupy' if not has_gpu() else 'a process that has the GPU to itself: pytest -m gpu, without -n'
        if hasattr(config, 'workerinput') else None)
    for i in gpu if reason else (): i.add_marker(pytest.mark.skip(reason=f'needs {reason}'))


# --- what did not run: one list at the end of every run

# (file, reason) of files that were left out as a whole. Processes of xdist do not report them: each hands its own over at its end
skipped_files = Counter()


def pytest_collectreport(report):
    if report.skipped: skipped_files[report.nodeid, report.longrepr[2]] = 1


def pytest_sessionfinish(session):
    if hasattr(session.config, 'workeroutput'): session.config.workeroutput['skipped_files'] = list(skipped_files)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for key in getattr(node, 'workeroutput', {}).get('skipped_files', ()): skipped_files[tuple(key)] = 1


def what_it_takes(reason):
    "The reason of a skip in the words of the list"
    reason = reason.removeprefix('Skipped: ')
    if m := re.match(r"could not import '([\w.]+)'", reason): return f'the package {m[1]}'
    return reason.removeprefix('needs ')


def pytest_terminal_summary(terminalreporter):
    tests = Counter(what_it_takes(r.longrepr[2]) for r in terminalreporter.stats.get('skipped', ()) if r.when != 'collect'
        and isinstance(r.longrepr, tuple))
    files = {}
    for name, reason in skipped_files: files.setdefault(what_it_takes(reason), []).append(name)
    if not tests and not files: return
    terminalreporter.section('did not run for want of')
    for reason in sorted({*tests, *files}):
        count = [f'{tests[reason]} tests'] if tests[reason] else []
        terminalreporter.line(f'{reason}: {", ".join(count + [f"all of {n}" for n in sorted(files.get(reason, ()))])}')


def once(factory, name, make):
    "A folder that `make(folder)` fills once a run, however many processes the tests are spread over"
    import fcntl
    root = factory.getbasetemp()
    folder = (root.parent if 'PYTEST_XDIST_WORKER' in os.environ else root) / name
    with open(folder.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            part = folder.with_suffix('.part')
            shutil.rmtree(part, ignore_errors=True)     # of an attempt that failed
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder


@pytest.fixture(scope='session')
def shared():
    "The folder of published headers and golden vectors (ORCD_SHARED, else ../shared), which is not part of the repository"
    p = Path(os.environ.get('ORCD_SHARED', ROOT.parent / 'shared')) / 'models'
    if not p.is_dir(): pytest.skip('needs the folder of published headers and golden vectors (ORCD_SHARED)')
    return p


PUBLISHED = 'qwen2.5-0.5b-instruct-q4_k_m', 'phi-3-mini-4k-instruct-q4', 'gpt-oss-20b-mxfp4'

@pytest.fixture(scope='session')
def headers(shared, tmp_path_factory):
    "A folder of header-only files of the published models"
    def make(folder):
        for n in PUBLISHED:
            subprocess.run([sys.executable, shared / 'full_shape.py', n, folder / f'{n}.gguf', '--header-only'], check=True,
                capture_output=True)
    return once(tmp_path_factory, 'headers', make)
