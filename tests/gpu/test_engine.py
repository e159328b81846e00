"The CUDA engine against the NumPy engine on small random models, and what it does with memory"
import os, sys
from pathlib import Path
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from make_models import MODELS
from random_draws import Multiples
pytestmark = pytest.mark.gpu


@pytest.fixture(scope='module')
def model_file(tmp_path_factory):
    from make_models import make_model
    folder, made = tmp_path_factory.mktemp('models'), {}

    def make(name, **more):
        key = name, *sorted(more.items())
        if key not in made: made[key] = make_model(folder / f'{len(made)}.gguf', seed=3, n_layer=3, n_vocab=331, **(MODELS[name] | more))
        return made[key]
    return make


def cuda(path, **kw):
    import orcd
    from orcd.engine.cuda_engine import CudaEngine
    with orcd.GGUF(path) as g: return CudaEngine(g, **kw)


def free():
    import cupy as cp
    cp.cuda.runtime.deviceSynchronize()
    return cp.cuda.runtime.memGetInfo()[0]


def take_all_but(n_bytes):
    "Allocations that leave about `n_bytes` free"
    import cupy as cp
    taken, size = [], 1 << 36
    while size >= 2 << 20:
        if free() - size < n_bytes: size //= 2; continue
        try: taken.append(cp.cuda.runtime.malloc(size))
        except cp.cuda.runtime.CUDARuntimeError: size //= 2
    return taken


def give_back(taken):
    import cupy as cp
    for p in taken: cp.cuda.runtime.free(p)


def prompt(n, seed=0): return np.random.default_rng(seed).integers(0, 331, n).tolist()


@pytest.mark.parametrize('hopper', [True, False], ids=['Hopper', 'any GPU'])
@pytest.mark.parametrize('name', MODELS)
def test_against_reference(name, hopper, model_file, monkeypatch):
    """Residual stream after every layer and logits of every position, past the window: against the NumPy engine, and, closer, against the same with the
    engine's FP16 roundings. Both follow the experts that the engine takes; these choices are checked by themselves."""
    import orcd
    from orcd.families.reference import ReferenceEngine
    from rounded import Rounded
    from routing import forced, recorded
    ids, path = prompt(300), model_file(name)
    from orcd.kernels import wgmma
    if hopper and not wgmma.is_hopper(): pytest.skip('another GPU')
    monkeypatch.setattr(wgmma, 'is_hopper', lambda device=None: hopper)
    g = orcd.GGUF(path) # the NumPy engines read from it as they go along
    plain, rounded = ReferenceEngine(g), Rounded(g, is_hopper=hopper)
    moe, n_layer = name == 'gpt-oss', plain.config.n_layer
    with g, cuda(path) as engine:
        for n in (1, 2, 33, 300):
            with recorded(n_layer) as took: got = engine.residuals(ids[:n])
            with recorded(n_layer) as again: got_logits = engine.logits(ids[:n])
            assert len(took.calls) == len(again.calls) == n_layer*moe*-(-n // engine.plan.chunk)
            # Keys, values and the inputs of products are FP16, and random weights amplify that: by these roundings alone the logits move by up to
            # 1.4e-2, for gpt-oss 2.4e-2. Two engines that round but sum in another order are up to 8e-4 (residual), 6e-3 (logits), 4e-3 (scores) apart.
            # With Hopper's kernels weights are halves as well: 2.9e-3 (residual) and 2.4e-2 (logits) by these roundings alone.
            limits = ('plain', plain, 5e-3, 4e-2 if hopper else 3e-2 if moe else 2e-2, 2e-2), ('rounded', rounded, 2e-3, 2e-2 if hopper else 1e-2, 1e-2)
            for what, want, residual_limit, logit_limit, score_limit in limits:
                first, second = (t.follow() if moe else None for t in (took, again))
                with forced(want, first): ref = want.residuals(ids[:n])
                errors = [np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) for a, b in zip(got, ref)]
                with forced(want, second): ref = want.logits(ids[:n])
                worst = np.abs(got_logits - ref).max() / ref.std()
                choice = second.check(score_limit) if moe and first.check(score_limit) else ''
                print(f'{name}, {n} tokens, {what}: residual {max(errors):.1e}, logits max |diff| / std {worst:.1e}', choice)
                assert max(errors) < residual_limit, f'{what}, {n} tokens, layers from -1 on: {errors}'
                assert worst < logit_limit, f'{what}, {n} tokens'


@pytest.mark.parametrize('name', ['qwen2', 'gpt-oss', 'phi3'])
def test_bits_do_not_depend_on_chunks(name, model_file, monkeypatch):
    import orcd.engine.cuda_engine
    ids, got = prompt(200), []
    for chunks in ((512,), (64,), (16,)):
        monkeypatch.setattr(orcd.engine.cuda_engine, 'CHUNKS', chunks)
        with cuda(model_file(name)) as engine:
            assert engine.plan.chunk == chunks[0]
            got.append(engine.logits(ids))
    assert (got[0] == got[1]).all() and (got[0] == got[2]).all()


@pytest.mark.parametrize('name', MODELS)
def test_captured_chunks(name, model_file, monkeypatch):
    "Chunks from graphs, the last one filled up, against launches of just its rows; then decode, which must not see what filled it"
    from orcd.engine import cuda_engine as engine_module
    from orcd.engine.cuda_engine import CudaEngine
    from orcd.text.sampling import SamplingParams
    ids = prompt(700)
    with cuda(model_file(name)) as engine:
        assert max(engine.graphs) == engine.plan.chunk and min(engine.graphs) <= 128
        def run(n):
            out = engine.logits(ids[:n])
            engine.prefill(ids[:n])
            return out, [i for i, *_ in engine.decode(SamplingParams(temperature=0.), 20)]
        for n, cost in ((1, engine_module.LAUNCH_COST_ROWS), (40, engine_module.LAUNCH_COST_ROWS), (129, engine_module.LAUNCH_COST_ROWS), (480, engine_module.LAUNCH_COST_ROWS), (300, 0)): # a graph that costs nothing: two of them
            monkeypatch.setattr(engine_module, 'LAUNCH_COST_ROWS', cost)
            if not cost: assert len(engine._pieces(n)) == 2
            graphs = run(n)
            monkeypatch.setattr(CudaEngine, 'replay', False)
            launches = run(n)
            monkeypatch.setattr(CudaEngine, 'replay', True)
            assert (graphs[0] == launches[0]).all() and graphs[1] == launches[1]


@pytest.mark.parametrize('name', ['qwen2', 'gpt-oss'])
def test_decode_is_prefill(name, model_file):
    "The logits of each decode step against a fresh prefill of the same tokens"
    from orcd.text.sampling import SamplingParams
    with cuda(model_file(name)) as engine:
        ids = prompt(20)
        engine.prefill(ids)
        drawn = [i for i, *_ in engine.decode(SamplingParams(temperature=1., seed=5), 60)]
        want = engine.logits(ids + drawn)
        std = want.std()
        for n in (1, 2, 17, 40, 60): # the row that decode's step n-1 left
            engine.prefill(ids)
            steps = engine.decode(SamplingParams(temperature=1., seed=5), n)
            assert [i for i, *_ in steps] == drawn[:n]
            engine.prefill(ids + drawn[:n])
            assert np.abs(engine.row.get(stream=engine.stream) - want[len(ids) + n - 1]).max() == 0
        import orcd.engine.cuda_engine
        depth, orcd.engine.cuda_engine.DEPTH = orcd.engine.cuda_engine.DEPTH, 1 # nothing queued ahead: the row is that of the token just drawn
        try:
            engine.prefill(ids)
            for k, _ in enumerate(engine.decode(SamplingParams(temperature=1., seed=5), 60)):
                assert np.abs(engine.row.get() - want[len(ids) + k - 1]).max() < 4e-2 * std, f'step {k}'
        finally: orcd.engine.cuda_engine.DEPTH = depth


def test_same_bits_whatever_ran_before(model_file):
    from orcd.text.sampling import SamplingParams

    def job(engine, n, seed):
        engine.prefill(prompt(n, seed))
        return list(engine.decode(SamplingParams(temperature=.9, top_k=50, top_p=.95, repetition_penalty=1.1, seed=seed), 40))
    with cuda(model_file('gpt-oss')) as engine:
        a, b, again = job(engine, 50, 1), job(engine, 200, 2), job(engine, 50, 1)
        assert a == again and a != b
    with cuda(model_file('gpt-oss')) as engine: assert job(engine, 50, 1) == a


@pytest.mark.parametrize('kw', [dict(), dict(temperature=0, top_logprobs=20), dict(frequency_penalty=1.5, presence_penalty=.5, logit_bias={9: 4}, top_logprobs=3)], ids=str)
@pytest.mark.parametrize('constrained', [False, True])
def test_masks_bias_penalties(model_file, kw, constrained):
    "The NumPy sampler on the logits that decode left, over more tokens than the ring holds; jobs without wishes draw the same before and after, and nothing stays in VRAM"
    from orcd.text.sampling import Sampler, SamplingParams
    with cuda(model_file('gpt-oss')) as engine:
        ids, plain = prompt(20), SamplingParams(seed=4)
        def run(p, constraint=None):
            engine.prefill(ids)
            return list(engine.decode(p, 80, constraint=constraint))
        before = run(plain)
        p, s = SamplingParams(seed=4, **kw), Sampler(engine.config.n_vocab, engine.n_valid)
        first, again = [run(p, Multiples(engine.n_valid) if constrained else None) for _ in range(2)]
        left = free()
        assert first == again and run(plain) == before and free() == left
        engine.prefill(ids)
        s.reset(p); constraint = Multiples(engine.n_valid) if constrained else None
        rows = [engine.row.get(stream=engine.stream)]
        think, _ = engine._halves()
        for d in first[:-1]:                        # one token after the other, by the graph of layers and head alone
            with engine.stream: engine.state[1], engine.state[0] = d.id, len(ids) - 1 + len(rows)
            think.launch(engine.stream)
            rows.append(engine.row.get(stream=engine.stream))
        for step, (d, row) in enumerate(zip(first, rows)):
            want = s.draw(row, step, constraint.mask() if constraint else None)
            if constraint: constraint.commit(want.id)
            assert d.id == want.id and [i for i, _ in d.top] == [i for i, _ in want.top], step
            assert np.allclose([d.logprob, *(v for _, v in d.top)], [want.logprob, *(v for _, v in want.top)], atol=1e-4)
        assert [d.id for d in run(p, Multiples(engine.n_valid, 5))] == [d.id for d in run(p, Multiples(engine.n_valid))][:5]


def test_every_byte_comes_back(model_file):
    "close(), del in the middle of a generation, an error, Ctrl-C in `generate`; again and again"
    import _thread, threading
    import orcd
    from orcd.text.sampling import SamplingParams
    path, ids = model_file('qwen2'), [1, 2, 3]

    def use(engine, n=5):
        engine.prefill(ids)
        steps = engine.decode(SamplingParams(), 50)
        for _ in range(n): next(steps)
        return steps
    def closed():
        engine = cuda(path)
        assert free() < before and engine.resident
        use(engine)
        engine.close(); engine.close()
        assert engine.vram.total == 0
    def deleted():
        engine = cuda(path)
        steps = use(engine)
        del steps, engine
    def failed():
        with pytest.raises(ZeroDivisionError), cuda(path) as engine: use(engine); 1 / 0
    def write(model):
        threading.Timer(.2, _thread.interrupt_main).start()
        while True: model.generate(ids, temperature=.8).run()
    def interrupted():
        with pytest.raises(KeyboardInterrupt), orcd.load(path, progress=False) as model: write(model)
    def interrupted_then_deleted():
        model = orcd.load(path, progress=False)
        try: write(model) # not pytest.raises, which may keep the traceback
        except KeyboardInterrupt: pass
        assert free() < before
        next(model.generate(ids))
        del model
    for _ in range(3): # kernels stay loaded
        with cuda(path) as engine: use(engine)
        before = free()
    for k in range(3):
        for how in (closed, deleted, failed, interrupted, interrupted_then_deleted):
            how()
            assert free() == before, f'{how.__name__}, round {k}: {(before - free()) >> 20} MiB are missing'


def test_constant_through_100_requests(model_file):
    from orcd.text.sampling import SamplingParams
    with cuda(model_file('gpt-oss')) as engine:
        before = free()
        for k in range(100):
            engine.prefill(prompt(1 + 5*k % 200, k))
            for n, _ in enumerate(engine.decode(SamplingParams(seed=k), 20)):
                if n == k % 20: break
        assert free() == before


def test_cancel(model_file):
    from orcd.errors import Cancelled, RequestError
    from orcd.text.sampling import SamplingParams
    with cuda(model_file('qwen2')) as engine:
        with pytest.raises(Cancelled): engine.prefill(prompt(30), cancelled=lambda: True)
        with pytest.raises(RequestError): next(engine.decode(SamplingParams(), 1))
        engine.prefill(prompt(30))
        seen = []
        with pytest.raises(Cancelled):
            for i, *_ in engine.decode(SamplingParams(), 50, cancelled=lambda: len(seen) == 5): seen.append(i)
        assert len(seen) == 5


def test_kv_budget(model_file):
    "A job that outgrows the KV cache ends with OutOfVRAM, the next one is fine; several times in a row"
    from orcd.errors import OutOfVRAM, RequestError
    from orcd.text.sampling import SamplingParams
    path = model_file('qwen2', context_length=4096)
    with cuda(path, n_ctx=4096, kv_cache_mb=1) as engine: # 1.5 KiB a token
        rows = engine.n_kv
        assert 300 < rows < 1000 and engine.n_ctx == 4096
        for _ in range(3):
            with pytest.raises(OutOfVRAM, match='holds'): engine.prefill(prompt(rows + 1))
            engine.prefill(prompt(rows - 10))
            got = []
            with pytest.raises(OutOfVRAM, match='full'):
                for i, *_ in engine.decode(SamplingParams(), 100): got.append(i)
            assert len(got) == 11 # the last one is drawn from the last row
            engine.prefill(prompt(10))
            assert len(list(engine.decode(SamplingParams(), 10))) == 10
        with pytest.raises(RequestError): engine.prefill(prompt(10) * 500)
    with cuda(path, kv_cache_mb=1) as engine: assert engine.n_ctx == engine.n_kv == rows


def test_too_little_vram_is_said_before_the_load(model_file):
    from orcd.errors import InsufficientVRAM
    path = model_file('qwen2', context_length=1 << 20)
    cuda(path, n_ctx=64).close()
    ballast = take_all_but(150 << 20)
    try:
        before, asked = free(), []
        with pytest.raises(InsufficientVRAM) as e: cuda(path, n_ctx=1 << 20, progress=lambda *a: asked.append(a))
        assert not asked and free() == before
        assert e.value.required_bytes > e.value.available_bytes > 0 and 0 < e.value.max_context < 1 << 20
        with cuda(path, n_ctx=e.value.max_context) as engine: assert engine.n_kv == e.value.max_context
        with cuda(path) as engine: # auto: what fits
            assert abs(engine.n_ctx - e.value.max_context) <= 1
            engine.prefill(prompt(100))
    finally: give_back(ballast)


def test_a_full_device_does_not_disturb_a_loaded_model(model_file):
    from orcd.text.sampling import SamplingParams
    with cuda(model_file('gpt-oss')) as engine:
        engine.prefill(prompt(50))
        want = list(engine.decode(SamplingParams(seed=1), 30))
        ballast = take_all_but(0)
        try:
            for _ in range(3):
                engine.prefill(prompt(50))
                assert list(engine.decode(SamplingParams(seed=1), 30)) == want
        finally: give_back(ballast)


def test_file_that_shrinks_during_the_load(model_file, tmp_path):
    import shutil
    from orcd.errors import GGUFError
    path = model_file('qwen2')
    cuda(path).close()
    copy, before = tmp_path / 'copy.gguf', free()
    shutil.copy(path, copy)
    def shrink(done, total):
        if not done: os.truncate(copy, copy.stat().st_size // 2)
    with pytest.raises(GGUFError, match='truncated|shrank'): cuda(copy, progress=shrink)
    assert free() == before


def test_load_keeps_nothing_in_host_memory(tmp_path):
    import psutil
    from make_models import make_model
    path = make_model(tmp_path / 'big.gguf', 'qwen2', types='Q8_0', n_layer=2, n_embd=4096, n_ff=16384, n_head=32, n_head_kv=8, head_dim=128, n_vocab=20000)
    anonymous = lambda: psutil.Process().memory_full_info().uss
    cuda(path).close()
    before, peak = anonymous(), []
    with cuda(path, progress=lambda *a: peak.append(anonymous())) as engine:
        assert engine.plan.weights > 500 << 20
        assert max(peak) - before < 256 << 20 and anonymous() - before < 64 << 20


def test_device_that_is_not_there(model_file):
    from orcd.errors import DeviceError
    with pytest.raises(DeviceError, match='no GPU 99'): cuda(model_file('qwen2'), device=99)


@pytest.mark.parametrize('name', MODELS)
def test_loads_what_it_runs(name, model_file, monkeypatch):
    "Nothing is compiled or loaded while graphs are captured: what a model launches was loaded before, and nothing else was"
    from functools import lru_cache
    from orcd.kernels import nvrtc
    from orcd.text.sampling import SamplingParams
    monkeypatch.setattr(nvrtc, '_modules', {})
    monkeypatch.setattr(nvrtc, '_kernel', lru_cache(None)(nvrtc._kernel.__wrapped__))
    with cuda(model_file(name)) as e:
        loaded = set(nvrtc._modules)
        e.prefill(prompt(200))
        assert len(list(e.decode(SamplingParams(temperature=.5, top_k=5, repetition_penalty=1.1), 3))) == 3
        assert set(nvrtc._modules) == loaded
