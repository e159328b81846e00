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
def test_launches_of_every_layer(path, sm, no_weights, monkeypatch):
    """A layer that runs another one's launches gets the arguments that it would have got if it had been worked out itself, with arrays of its own; every kernel
    was loaded before it was captured, and none in vain; what lives in VRAM is what was planned"""
    import orcd
    from orcd.engine import cuda_engine as engine, lower, view
    from orcd.kernels import gemv, nvrtc
    with orcd.GGUF(path) as g, played(monkeypatch, sm) as gpu, engine.CudaEngine(g) as e:
        assert e.is_hopper == (sm == '90')
        assert sorted(map(repr, e.vram.entries)) == sorted(map(repr, view.planned(g, e.is_hopper, free=100 << 30).entries))
        assert {n for n, _ in {(n, d) for n, _, d in nvrtc._modules} - gpu.asked} <= {'repack'}     # the loader is not here
        alone = engine.layers_of(g, None, e.is_hopper, gemv.device_limits(0))
        alone.kinds = list(range(e.config.n_layer))         # no layer is another one's kind
        alone.places = {i: lower.places(alone.bound.layers[i], e.is_hopper) for i in alone.kinds}
        scratch = min(a.ptr for a in e.arenas if a.kind == 'workspace')     # the first thing in it

        def real(place, i):
            "Where the engine keeps what a place of layer i stands for"
            if isinstance(place, (list, tuple)): return [real(x, i) for x in place]
            place = place.data if isinstance(place, nvrtc.QTensor) else place
            if not isinstance(place, lower.Place): return place
            role, own = place.buffer.role, vars(e.layers[i])
            if role in own: a = own[role]
            elif role.endswith(lower.EXPONENTS): a = own[role.removesuffix(lower.EXPONENTS)].row_max_exponent
            elif role in lower.CACHE: a = e.cache[i][lower.CACHE.index(role)]
            else: a = None if role == 'scratch' else getattr(e, role)
            address = scratch if a is None else nvrtc.address(a)
            return type('Real', (), dict(ptr=address + place.ptr))()

        assert len(set(e.lowered.kinds)) < e.config.n_layer
        for rows in (0, *e.plan.chunks):
            gpu.launches.clear()
            e._layers(rows or 1, not rows)
            want = [(l.name, l.args.pack({k: real(v, i) for k, v in l.values.items()})) for i in range(e.config.n_layer)
                for l in alone.layer(i, rows or 1, e.n_kv, not rows).launches]
            assert [(name, args) for _, name, _, args in gpu.launches] == want and len(want) >= 5*e.config.n_layer


@pytest.mark.parametrize('card', ['75', '80', '86', '89', '100', '120'])
@pytest.mark.parametrize('name', ['qwen2', 'gpt-oss'])
def test_as_another_card(name, card, tmp_path, no_weights, monkeypatch):
    "A Hopper GPU that is told to behave as another card launches what that card does, to the last argument, with its shared memory, and early where it does"
    import orcd
    from orcd.engine import cuda_engine as engine
    path = make_model(tmp_path/'m.gguf', n_layer=5, n_vocab=331, **MODELS[name])
    def run(sm):
        with orcd.GGUF(path) as g, played(monkeypatch, sm) as gpu, engine.CudaEngine(g) as e:
            gpu.launches.clear(), gpu.configs.clear()
            for rows in (0, *e.plan.chunks): e._layers(rows or 1, not rows)
            return [l[1:] for l in gpu.launches], gpu.configs, gpu.asked, e.plan
    real, hopper = run(card), run('90')
    monkeypatch.setenv('ORCD_CARD', card)
    launches, configs, *_ = played_so = run('90')
    assert played_so == real != hopper
    assert {early for _, _, early in configs} == ({0, 1} if int(card) >= 90 else {0})
    assert not {n for n, *_ in launches if n.startswith('wgmma')} and {n for n, *_ in hopper[0] if n.startswith('wgmma')}


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


def test_a_model_in_parts_is_loaded_from_all_of_them(made, monkeypatch):
    "What the loader is told to copy is the tensors of the whole file, and it reads all of them"
    import orcd
    from gguf_files import split
    from orcd.engine.cuda_engine import CudaEngine
    from orcd.engine.loader import Loader, PART_SPAN
    parts, asked, start = split(made, made.with_name('cut.gguf'), 7), [], Loader.start
    monkeypatch.setattr(Loader, 'start', lambda self, files, copies, *a: (asked.append((files, copies)), start(self, files, copies, *a))[1])
    with orcd.GGUF(made) as whole, orcd.GGUF(parts[1]) as g, played(monkeypatch) as gpu:
        said = []
        with CudaEngine(g, progress=lambda *a: said.append(a)) as e: e.prefill([1, 2, 3])
        (files, copies), = asked
        got = sorted(os.pread(files[c.offset // PART_SPAN], c.n_bytes, c.offset % PART_SPAN) for c in copies)
        assert len(parts) > 4 and len(files) == len(parts) and got == sorted(whole.read(n).tobytes() for n in whole.tensors)
        assert said[-1] == (sum(map(len, got)),)*2 and not gpu.alive and not gpu.pinned


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
        def late(*a, **kw): p = planned(*a, **kw); gpu.alive[0] = (100 << 20) - p.weights - 1000; return p
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
