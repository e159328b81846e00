"What the engine loads and launches, and that it gives everything back, on a GPU that is only played"
import os, sys
import pytest
from conftest import PUBLISHED
from make_models import MODELS, make_model
from fake_gpu import played
pytest.importorskip('cuda.bindings.driver')


@pytest.fixture(params=[*PUBLISHED, *MODELS])
def path(request, tmp_path):
    if request.param in PUBLISHED: return request.getfixturevalue('headers') / f'{request.param}.gguf'
    return make_model(tmp_path/'m.gguf', n_layer=5, n_vocab=331, **MODELS[request.param])


@pytest.fixture
def no_weights(monkeypatch):
    "Headers have none: nothing is read"
    from orcd.engine.loader import Loader
    for f in ('start', 'wait'): monkeypatch.setattr(Loader, f, lambda *a: None)


def test_bytes_of_a_step(path, no_weights, monkeypatch):
    "What the published models must read for a token, and for each position of a short context"
    import orcd
    from orcd.engine import cuda_engine as engine
    known = {'qwen2': (392e6, 12288), 'phi3': (2.34e9, 393216), 'gpt-oss': (2.57e9, 49152)}
    with orcd.GGUF(path) as g, played(monkeypatch), engine.CudaEngine(g) as e:
        want, a_position = known.get(e.config.arch, (0, 0)) if e.config.n_layer > 5 else (0, 0)
        if want: assert abs(e.step_bytes(0)/want - 1) < .015 and e.step_bytes(100) - e.step_bytes(0) == 100*a_position
        assert e.step_bytes(64) < e.step_bytes(128) and e.step_bytes(0) <= e.plan.weights


@pytest.mark.parametrize('sm', ['90', '80'])
def test_repeated_launches(path, sm, no_weights, monkeypatch):
    """A layer whose launches repeat those of another one has the arguments that it would have got if it had been worked out itself; every kernel was loaded
    before it was captured, and none in vain but for three small files that only some models want; what lives in VRAM is what was planned"""
    import orcd
    from orcd.engine import cuda_engine as engine, view
    from orcd.kernels import nvrtc
    with orcd.GGUF(path) as g, played(monkeypatch, sm) as gpu, engine.CudaEngine(g) as e:
        _, config, bound = engine.open_model(g)
        assert e.is_hopper == (sm == '90')
        assert sorted(map(repr, e.vram.entries)) == sorted(map(repr, view.planned(g, e.is_hopper, free=100 << 30).entries))
        files = set(engine.kernel_files(config, bound, e.is_hopper, e.plan.chunks))
        assert {(n, d) for n, _, d in nvrtc._modules} == files
        assert {n for n, _ in files - gpu.asked} <= {'elementwise', 'gemm_plain', 'gemm_thin', 'repack'}     # the loader, which is not here, wants the last
        for rows in (0, *e.plan.chunks):
            def run():
                gpu.launches.clear()
                e.ops.decode = not rows
                e._layers(e.x[:rows or 1])
                return gpu.launches.copy()
            repeated, shared_kinds = run(), e.kinds
            e.kinds = list(range(config.n_layer))
            assert len(set(shared_kinds)) < config.n_layer and len(repeated) >= 5*config.n_layer
            assert repeated == run()
            e.kinds = shared_kinds


@pytest.fixture
def made(tmp_path): return make_model(tmp_path/'m.gguf', n_layer=3, n_vocab=331, **MODELS['qwen2'])


def test_everything_comes_back(made, monkeypatch):
    import orcd
    from orcd.engine.cuda_engine import CudaEngine
    with orcd.GGUF(made) as g, played(monkeypatch) as gpu:
        e = CudaEngine(g)           # with a real loader and a file that holds weights
        assert len(gpu.alive) == 3 and sum(gpu.alive.values()) == sum(a.n_bytes for a in e.arenas)
        e.prefill([1, 2, 3]); e.close(); e.close()
        assert not gpu.alive and not gpu.pinned
        e = CudaEngine(g)
        del e
        assert not gpu.alive and not gpu.pinned


@pytest.mark.parametrize('where', ['_allocate', '_capture', '_warm_up', 'wait', 'progress'])
@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_everything_comes_back_after_an_error(made, monkeypatch, where, error):
    import orcd
    from orcd.engine import cuda_engine as engine, loader
    sys.setswitchinterval(.005)
    def fail(*a): raise error('in between')
    if where != 'progress': monkeypatch.setattr(loader.Loader if where == 'wait' else engine.CudaEngine, where, fail)
    with orcd.GGUF(made) as g, played(monkeypatch) as gpu:
        with pytest.raises(error, match='in between') as kept: engine.CudaEngine(g, progress=fail if where == 'progress' else None)
        assert not gpu.alive and not gpu.pinned and sys.getswitchinterval() == .005
        assert kept.tb      # as in a notebook: the error still holds the engine


def test_vram_that_another_program_took(made, monkeypatch):
    "It was free when the plan was made: the second allocation fails, the first is given back"
    import orcd
    from orcd.engine import cuda_engine as engine
    from orcd.errors import OutOfVRAM
    with orcd.GGUF(made) as g, played(monkeypatch, free=100 << 20) as gpu:
        planned = engine.plan
        def late(*a): p = planned(*a); gpu.alive[0] = (100 << 20) - p.weights - 1000; return p
        monkeypatch.setattr(engine, 'plan', late)
        with pytest.raises(OutOfVRAM, match='kv_cache') as kept: engine.CudaEngine(g)
        assert kept.tb and list(gpu.alive) == [0] and not gpu.pinned


@pytest.mark.parametrize('how', ['cut', 'cut and long again', 'written'])
def test_a_file_that_changes_while_it_is_loaded(made, monkeypatch, how):
    "after it was looked at: an error that names it, and everything comes back"
    import orcd
    from orcd.engine import cuda_engine as engine
    from orcd.errors import GGUFError
    with orcd.GGUF(made) as g, played(monkeypatch) as gpu:
        allocate = engine.CudaEngine._allocate
        def meanwhile(*a):
            if how == 'written': made.write_bytes(made.read_bytes()[:-1] + b'x'); os.utime(made, ns=(1, 1))
            else:
                os.truncate(made, g.data_offset + 1000)
                if 'long' in how: os.truncate(made, g.file_size); os.utime(made, ns=(1, 1))
            return allocate(*a)
        monkeypatch.setattr(engine.CudaEngine, '_allocate', meanwhile)
        with pytest.raises(GGUFError, match=f'{made}: .*(shrank|written to)'): engine.CudaEngine(g)
        assert not gpu.alive and not gpu.pinned


@pytest.mark.parametrize('file', ['repack', 'sampler', 'gemm_wgmma'])
def test_a_file_that_does_not_compile(made, monkeypatch, file):
    "Whether the loader, the step or a chunk wants it: its error comes out, and everything comes back"
    import orcd
    from orcd.engine import cuda_engine as engine
    from orcd.kernels import nvrtc
    from orcd.errors import KernelError
    with orcd.GGUF(made) as g, played(monkeypatch) as gpu:
        module = nvrtc._module
        def broken(name, *a):
            if name == file: raise KernelError(f'{name}.cu does not compile for sm_90')
            return module(name, *a)
        monkeypatch.setattr(nvrtc, '_module', broken)
        with pytest.raises(KernelError, match=file) as kept: engine.CudaEngine(g)
        assert kept.tb and not gpu.alive and not gpu.pinned
