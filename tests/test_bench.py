"The benchmarks in tests/bench, on a played GPU: they start, look where there is something to see, and end"
import re, runpy, sys
from types import SimpleNamespace as NS
import numpy as np
import pytest
from conftest import ROOT
from make_models import MODELS, make_model
from fake_gpu import Array, array, played


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    "What a benchmark prints of a small model"
    path = make_model(tmp_path/'m.gguf', n_layer=2, n_vocab=331, **MODELS['qwen2'])
    def go(name, *args):
        from orcd.engine import cuda_engine as engine
        from orcd.kernels import gemv
        with played(monkeypatch):
            monkeypatch.setattr(engine.CudaEngine, 'logits', lambda self, ids: np.zeros(3, np.float32))
            monkeypatch.setattr(gemv, 'read_bandwidth', lambda: 3e12)
            monkeypatch.setattr(sys, 'argv', [name, str(path), *args])
            runpy.run_path(str(ROOT/'tests'/'bench'/f'{name}.py'), run_name='__main__')
        return capsys.readouterr().out
    return go


def test_loads(run, monkeypatch):
    from orcd.engine import cuda_engine as engine, loader
    from orcd.kernels import nvrtc
    for owner in engine, nvrtc, engine.CudaEngine, loader.Loader: # the benchmark wraps their functions: put everything back
        for name, f in list(vars(owner).items()):
            if callable(f) and not name.startswith('__'): monkeypatch.setattr(owner, name, f)
    out = run('loads', '--n', '2', '--context-length', '128')
    assert out.count(' ms  open_model 0-') == 2 and '_capture' in out and '_run' in out and 'others' in out and 'the loader alone' in out


def test_prompts(run):
    out = run('prompts', '--lengths', '5', '40', '--decode-at', '8')
    assert out.count('prompt of') == 2 and 'of what reading alone allows' in out


def test_launches(monkeypatch, capsys):
    from orcd.kernels import gemv
    monkeypatch.setattr(sys, 'argv', ['launches'])
    with played(monkeypatch) as gpu:
        import cupy
        new = lambda shape, dtype: array(shape if isinstance(shape, tuple) else (shape,), dtype, NS(ptr=1 << 20))
        monkeypatch.setattr(Array, '__and__', lambda self, bits: self, raising=False)
        vars(cupy).update(random=NS(randint=lambda lo, hi, n, dtype: new(n, dtype), standard_normal=lambda shape,
            dtype: new(shape, dtype)), zeros=new, ones=new, uint8=np.uint8)
        monkeypatch.setattr(gemv, 'read_bandwidth', lambda: 3e12)
        monkeypatch.setattr(gemv, 'graph_time', lambda launch, n: (launch(0, cupy.cuda.Stream()), 1e-5)[1])
        runpy.run_path(str(ROOT/'tests'/'bench'/'launches.py'), run_name='__main__')
    out = capsys.readouterr().out
    assert out.count('reading takes') == len(gpu.launches) == 16, 'each is one launch'


def test_starts(monkeypatch, capsys):
    "Real workers, with the small model on the CPU"
    monkeypatch.setattr(sys, 'argv', ['starts', 'demo', '--n', '2', '--device', 'reference'])
    runpy.run_path(str(ROOT/'tests'/'bench'/'starts.py'), run_name='__main__')
    out = capsys.readouterr().out
    times = [float(t) for t in out.split('medians')[0].replace('demo: ready after ', '').split()[:2]]
    medians = [float(part.split()[-1]) for part in out.split('medians:')[1].split(',')]
    assert all(0 < t < 60 for t in times) and medians == sorted(medians) and len(medians) == 3


def test_constraints(capsys):
    pytest.importorskip('llguidance')
    runpy.run_path(str(ROOT/'tests'/'bench'/'constraints.py'))['main'](2000, 1)
    assert re.fullmatch(r'vocabulary [0-9.]+ s\na mask [0-9]+ µs \(.*99%: [0-9]+\)\n', capsys.readouterr().out)
