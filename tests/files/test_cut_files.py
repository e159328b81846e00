"""A model file that somebody cuts off, overwrites or replaces while it is in use: an error that names it, or the old file; the process
is never killed"""
import os, shutil, subprocess, sys
from pathlib import Path
import pytest
from orcd.files.hub import find_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path): return shutil.copy(find_model('demo'), tmp_path / 'x.gguf')


def child(code, *args):
    "What a process prints; a signal ends the test and not the suite"
    r = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, timeout=300,
        env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert r.returncode == 0, (r.returncode, r.stderr[-1000:])
    return r.stdout.split('\n')[:-1]


ENGINE = """
import os, sys
import numpy as np
from orcd.errors import GGUFError
from orcd.files.gguf import GGUF
from orcd.families.reference import ReferenceEngine
path, how, keep = sys.argv[1], sys.argv[2], int(sys.argv[3])
g = GGUF(path)
e = ReferenceEngine(g, keep_bytes=keep)
before = e.logits([1, 2, 3])
if how == 'cut': os.truncate(path, g.data_offset + 100)
elif how == 'emptied': os.truncate(path, 0)
elif how == 'written':
    data = open(path, 'rb').read()
    with open(path, 'r+b') as f: f.write(data)
    os.utime(path, ns=(1, 1))
elif how == 'replaced': open(path + '.new', 'wb').write(b'GGUF'); os.replace(path + '.new', path)
else: os.unlink(path)
try: print('same' if np.array_equal(e.logits([1, 2, 3]), before) else 'other')
except GGUFError as error: assert str(error).startswith(path + ': '), error; print('error')
"""


@pytest.mark.parametrize('how', ['cut', 'emptied', 'written', 'replaced', 'deleted'])
@pytest.mark.parametrize('keep', [0, 200_000, 4 << 30])
def test_an_engine_that_lives_long(file, how, keep):
    "Weights that are decoded when they are wanted are read then; those that are kept need no file any more"
    want = 'same' if keep > 1 << 30 or how in ('replaced', 'deleted') else 'error'
    assert child(ENGINE, file, how, keep) == [want]


LOADER = """
import os, subprocess, sys
import orcd
from orcd.errors import OrcdError
path, said = sys.argv[1], set()
cutter = subprocess.Popen([sys.executable, '-c', '''
import sys, time
path = sys.argv[1]
data = open(path, "rb").read()
with open(path, "r+b") as f:
    print("here", flush=True)
    while True:
        f.truncate(len(data)//3); time.sleep(.002); f.seek(0); f.write(data); f.flush(); time.sleep(.05)
''', path], stdout=subprocess.PIPE)
assert cutter.stdout.readline() == b'here\\n'
try:
    for _ in range(60):
        try:
            with orcd.load(path, device='reference', progress=False) as m: m.logits([1, 2, 3])
            said.add('loaded')
        except OrcdError as e: assert path in str(e), e; said.add('error')
finally: cutter.kill()
print(*sorted(said))
"""


def test_a_file_that_is_cut_off_while_it_loads(file):
    "Again and again: it loads or says why not"
    assert 'error' in child(LOADER, file)[0]
