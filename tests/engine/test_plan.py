"What a model will take in VRAM, from its header alone: no GPU is needed to know"
import pytest
from make_models import make_model


@pytest.fixture(scope='module')
def plan_of(tmp_path_factory):
    import orcd
    from orcd.engine.cuda_engine import plan
    folder = tmp_path_factory.mktemp('plan')

    def run(arch='qwen2', limits=None, **model):
        with orcd.GGUF(make_model(folder / f'{arch}.gguf', arch, **({'head_dim': 32, 'n_embd': 64} | model))) as g:
            return plan(g, **limits or {})
    return run


def test_kv_cache(plan_of):
    "Two FP16 rows of every key head a token and layer; a layer with a window keeps that many"
    p = plan_of('qwen2', dict(n_ctx=256), n_layer=3, n_head_kv=2)
    assert p.kv_cache == 2*2*256*3*2*32 and p.n_ctx == p.n_kv == 256
    p = plan_of('gpt-oss', dict(n_ctx=256), n_layer=4, n_head_kv=2, window=16)
    assert p.kv_cache == 2*2*2*32*(2*256 + 2*16)


def test_largest_context_is_exact(plan_of):
    from orcd.errors import InsufficientVRAM
    whole = plan_of(limits=dict(n_ctx=65536), context_length=65536)
    with pytest.raises(InsufficientVRAM) as e: plan_of(limits=dict(n_ctx=65536, free=whole.total - 1), context_length=65536)
    best = e.value.max_context
    assert e.value.required_bytes == whole.total and e.value.available_bytes == whole.total - 1 and 0 < best < 65536
    assert plan_of(limits=dict(n_ctx=best, free=whole.total - 1), context_length=65536).n_ctx == best
    with pytest.raises(InsufficientVRAM): plan_of(limits=dict(n_ctx=best + 1, free=whole.total - 1), context_length=65536)
    assert plan_of(limits=dict(free=whole.total - 1), context_length=65536).n_ctx == best       # auto takes what fits
    with pytest.raises(InsufficientVRAM, match='not even') as e: plan_of(limits=dict(free=1 << 20), context_length=65536)
    assert e.value.max_context == 0


def test_kv_budget(plan_of):
    p = plan_of(limits=dict(kv_cache_mb=1), context_length=65536)
    assert p.kv_cache <= 1 << 20 < plan_of(limits=dict(n_ctx=p.n_ctx + 1), context_length=65536).kv_cache
    q = plan_of(limits=dict(kv_cache_mb=1, n_ctx=60000), context_length=65536)
    assert q.n_ctx == 60000 and q.n_kv == p.n_kv


def test_bad_limits(plan_of):
    from orcd.errors import RequestError
    with pytest.raises(RequestError, match='trained for 512'): plan_of(limits=dict(n_ctx=513))
    with pytest.raises(RequestError, match='one token'):
        plan_of(limits=dict(kv_cache_mb=1), n_layer=40, n_head=64, n_head_kv=64, head_dim=128, n_embd=32, n_ff=32)


# What no kernel is made for, and a word of the sentence that says so. The reference engine runs all of them.
REFUSED = [(dict(head_dim=80, n_embd=160), 'heads of 80 numbers'), (dict(head_dim=16), 'heads of 16 numbers'),
    (dict(head_dim=256), 'heads of 256 numbers'),
    (dict(n_head=256, n_head_kv=256), '256 key heads'), (dict(n_ff=1 << 16, types='Q4_0', n_layer=1), '65536 columns'),
    (dict(arch='gpt-oss', n_expert=40, n_expert_used=33, n_layer=1), '33 of 40 experts')]

@pytest.mark.parametrize('model, said', REFUSED, ids=lambda v: str(v) if isinstance(v, str) else '')
def test_no_kernel(plan_of, model, said):
    "Refused before anything is copied, in one sentence with the way out"
    from orcd.errors import ModelError
    with pytest.raises(ModelError, match=said) as e: plan_of(**model)
    assert '\n' not in str(e.value) and '--device reference' in str(e.value)


def test_limit_of_the_card(plan_of):
    "The same model on a card with less shared memory; where it does not fit is where the launch itself says so"
    from orcd.kernels import gemv
    from orcd.files.blocks import GGMLType
    from orcd.errors import KernelError, ModelError
    model = dict(n_ff=28672, types='Q4_0', n_layer=1)
    plan_of(**model)
    plan_of(limits=dict(limits=(227 << 10, True)), **model)
    with pytest.raises(ModelError, match='28672 columns .*99 KiB'): plan_of(limits=dict(limits=(99 << 10, True)), **model)
    with pytest.raises(KernelError, match='28672 columns .*99 KiB'): gemv.pieces([GGMLType.Q4_0], 28672, 8, 1, 99 << 10, False)


def test_no_kernel_at_a_load(tmp_path, monkeypatch):
    "Nothing was copied, nothing stays in VRAM; on the other engine the same file runs"
    pytest.importorskip('cuda.bindings.driver')
    import orcd
    from orcd.errors import ModelError
    from fake_gpu import played
    path, copied = make_model(tmp_path / 'm.gguf', 'llama', head_dim=80, n_embd=160), []
    with played(monkeypatch) as gpu, pytest.raises(ModelError, match='heads of 80 numbers'):
        orcd.load(path, progress=lambda done, total: copied.append(done))
    assert not gpu.alive and not gpu.pinned and not any(copied)
    with orcd.load(path, device='reference', progress=False) as m: assert m.logits([1, 2]).shape == (2, 160)


def test_no_kernel_in_a_terminal(tmp_path):
    "`orcd info` describes the file and then says what `load` and the worker would: they all ask the plan"
    import subprocess, sys
    path = make_model(tmp_path / 'm.gguf', 'llama', head_dim=80, n_embd=160)
    r = subprocess.run([sys.executable, '-m', 'orcd.serve.cli', 'info', path], capture_output=True, text=True)
    assert r.returncode == 1 and 'heads of 80 numbers' in r.stderr and 'Traceback' not in r.stderr and 'VRAM at a context' not in r.stdout


@pytest.mark.parametrize('name, weights, kv', [('qwen2.5-0.5b-instruct-q4_k_m', 491.4e6 - 5.9e6, 12288),
    ('phi-3-mini-4k-instruct-q4', 2393e6, 393216), ('gpt-oss-20b-mxfp4', 12.0966e9, 24576)])
def test_published_files(name, weights, kv, headers):
    "Weights are the file's tensor bytes, the cache grows by the published bytes a token, the workspace stays below 96 MB"
    import orcd
    from orcd.engine.cuda_engine import plan
    with orcd.GGUF(headers / f'{name}.gguf') as g:
        a, b = plan(g, n_ctx=2048), plan(g, n_ctx=4096)
        assert abs(a.weights - weights) < .002*weights and b.kv_cache - a.kv_cache == 2048*kv and b.workspace < 96e6
