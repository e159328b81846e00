"What the engine loads and launches, and that it gives everything back, on a GPU that is only played"
import subprocess, sys
import pytest
from make_models import make_model
from played_cupy import played
pytest.importorskip('cuda.bindings.driver')

PUBLISHED = ['qwen2.5-0.5b-instruct-q4_k_m', 'phi-3-mini-4k-instruct-q4', 'gpt-oss-20b-mxfp4']
MADE = {'qwen2': dict(types={'attn_v': 'Q8_0', 'ffn_down': 'Q6_K', '': 'Q4_K'}, n_embd=256, n_ff=512, head_dim=64, n_head=4, n_head_kv=2),
    'phi3': dict(types={'attn_qkv': 'Q5_K', '': 'Q4_0'}, n_embd=192, n_ff=256, head_dim=96, n_head=4, n_head_kv=4),
    'gpt-oss': dict(types={'exps': 'MXFP4', '': 'Q8_0'}, n_embd=96, n_ff_exp=160, head_dim=64, n_head=8, n_head_kv=2, n_expert=6, n_expert_used=3, window=32),
    'llama': dict(types={'ffn': 'Q4_1', '': 'Q5_1'}, n_embd=128, n_ff=160, head_dim=128, n_head=2, n_head_kv=1, rope_freqs=True),
    'qwen3': dict(types={'ffn': 'BF16', 'attn': 'F16', '': 'Q8_0'}, n_embd=128, n_ff=96, head_dim=48, n_head=4, n_head_kv=2)}


@pytest.fixture(params=[*PUBLISHED, *MADE])
def path(request, shared, tmp_path):
    if request.param in MADE: return make_model(tmp_path/'m.gguf', request.param, n_layer=5, n_vocab=331, **MADE[request.param])
    subprocess.run([sys.executable, str(shared / 'full_shape.py'), request.param, str(tmp_path/'m.gguf'), '--header-only'], check=True, capture_output=True)
    return tmp_path/'m.gguf'


def test_bytes_of_a_step(path, monkeypatch):
    "What the published models must read for a token, and for each position of a short context"
    import orcd
    from orcd import engine, loader
    known = {'qwen2': (392e6, 12288), 'phi3': (2.34e9, 393216), 'gpt-oss': (2.57e9, 49152)}
    monkeypatch.setattr(loader.Loader, 'start', lambda *a: None)
    monkeypatch.setattr(loader.Loader, 'wait', lambda *a: None)
    with orcd.GGUF(path) as g, played(monkeypatch), engine.CudaEngine(g) as e:
        want, a_position = known.get(e.config.arch, (0, 0)) if e.config.n_layer > 5 else (0, 0)
        if want: assert abs(e.step_bytes(0)/want - 1) < .015 and e.step_bytes(100) - e.step_bytes(0) == 100*a_position
        assert e.step_bytes(64) < e.step_bytes(128) and e.step_bytes(0) <= e.plan.weights


@pytest.mark.parametrize('sm', ['90', '80'])
def test_repeated_launches(path, sm, monkeypatch):
    """A layer whose launches repeat those of another one has the arguments that it would have got if it had been worked out itself; every kernel was loaded
    before it was captured, and none in vain; what lives in VRAM is what was planned"""
    import orcd
    from orcd import engine, loader, nvrtc, view
    monkeypatch.setattr(loader.Loader, 'start', lambda *a: None)    # there are no weights
    monkeypatch.setattr(loader.Loader, 'wait', lambda *a: None)
    with orcd.GGUF(path) as g, played(monkeypatch, sm) as gpu, engine.CudaEngine(g) as e:
        _, config, bound = engine.open_model(g)
        assert e.wide == (sm == '90')
        assert sorted(map(repr, e.vram.entries)) == sorted(map(repr, view.planned(g, e.wide, free=100 << 30).entries))
        assert {(n, d) for n, _, d in nvrtc._modules} == set(engine.kernel_files(config, bound, e.wide, e.plan.chunks))
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
def made(tmp_path): return make_model(tmp_path/'m.gguf', 'qwen2', n_layer=3, n_vocab=331, **MADE['qwen2'])


def test_everything_comes_back(made, monkeypatch):
    import orcd
    from orcd.engine import CudaEngine
    with orcd.GGUF(made) as g, played(monkeypatch) as gpu:
        e = CudaEngine(g)           # with real readers and a file that holds weights
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
    from orcd import engine, loader
    patience = sys.getswitchinterval()
    def fail(*a): raise error('in between')
    if where != 'progress': monkeypatch.setattr(loader.Loader if where == 'wait' else engine.CudaEngine, where, fail)
    with orcd.GGUF(made) as g, played(monkeypatch) as gpu:
        with pytest.raises(error, match='in between'): engine.CudaEngine(g, progress=fail if where == 'progress' else None)
        assert not gpu.alive and not gpu.pinned and sys.getswitchinterval() == patience


def test_vram_that_another_program_took(made, monkeypatch):
    "It was free when the plan was made: the second allocation fails, the first is given back"
    import orcd
    from orcd import engine
    from orcd.errors import OutOfVRAM
    with orcd.GGUF(made) as g, played(monkeypatch, free=100 << 20) as gpu:
        planned = engine.plan
        def late(*a): p = planned(*a); gpu.alive[0] = (100 << 20) - p.weights - 1000; return p
        monkeypatch.setattr(engine, 'plan', late)
        with pytest.raises(OutOfVRAM, match='kv_cache'): engine.CudaEngine(g)
        assert list(gpu.alive) == [0] and not gpu.pinned


@pytest.mark.parametrize('file', ['repack', 'sampler', 'gemm_wgmma'])
def test_a_file_that_does_not_compile(made, monkeypatch, file):
    "Whether the readers, the step or a chunk wants it: its error comes out, and everything comes back"
    import orcd
    from orcd import engine, nvrtc
    from orcd.errors import KernelError
    with orcd.GGUF(made) as g, played(monkeypatch) as gpu:
        module = nvrtc._module
        def broken(name, *a):
            if name == file: raise KernelError(f'{name}.cu does not compile for sm_90')
            return module(name, *a)
        monkeypatch.setattr(nvrtc, '_module', broken)
        with pytest.raises(KernelError, match=file): engine.CudaEngine(g)
        assert not gpu.alive and not gpu.pinned
