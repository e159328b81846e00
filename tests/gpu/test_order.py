"""Who waits for whom: the same bits beside other kernels and with random waits wherever two parties meet, and not when one rule is broken.

Each run is a process of its own, `draws.py`: the kernels are compiled with the waits or with the mistake."""
import json, os, subprocess, sys
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytestmark = [pytest.mark.gpu, pytest.mark.slow]
HERE = Path(__file__).resolve().parent
# one rule each: the file, what stands there, what the mistake makes of it
MISTAKES = {
    'a piece is overwritten while its reads are under way': [('bulk_pipeline', '        fence_async();\n', ''), ('gemv', 'ASK_FIRST = T == MXFP4', 'ASK_FIRST = true')],
    'a piece is read before it is there': [('bulk_pipeline', '        wait(full + got, parity);\n', '')],
    'a product does not wait for the launch before it': [('gemv', '    pdl_wait();\n    pdl_launch_dependents();           // so', '    pdl_launch_dependents();           // so')],
    'attention does not wait for q, k and v': [('attention', '        if (waiting) {\n            pdl_wait();\n', '        if (waiting) {\n')],
    'activations are made before they are there': [('to_half', '    pdl_launch_dependents();\n    pdl_wait();\n', '    pdl_launch_dependents();\n')],
    'the vector is used before all threads have made it': [('gemv', '    __syncthreads();\n    const float factor', '    const float factor')],
    'splits are added up without a ticket': [('attention', 'last = atomicAdd(ticket, 1) == min(splits, (int)gridDim.x) - 1;', 'last = blockIdx.x == 0;')],
    'a token is drawn without a ticket': [('sampler', 'last = atomicAdd(&h->ticket, 1) == gridDim.x - 1;', 'last = blockIdx.x == 0;')],
    'a stage is read before it is there': [('wgmma_mainloop', '        wait(s.full + slot, phase);\n', '')],
}
MIX = {'experts are chosen before the router has spoken': [('gemv', 'if (!a.settled) pdl_wait();', '')],
    'a stage is overwritten before all have read it': [('wgmma_mainloop', 'wait(s.empty + last, last_phase); copy(', 'copy(')]}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Few layers of true width, so that launches fill the card as they do in use"
    from make_models import make_model
    folder, made = tmp_path_factory.mktemp('order'), {}
    types = {'attn_v': 'Q8_0', 'ffn_down': 'Q6_K', 'token_embd': 'Q5_0', 'output.': 'Q8_0', '': 'Q5_0'}
    shapes = {'qwen2': dict(types=types, n_embd=896, n_ff=4864, n_head=14, n_head_kv=2, head_dim=64),
        'gpt-oss': dict(types={'exps': 'MXFP4', '': 'Q8_0'}, n_embd=1024, n_ff_exp=1024, n_head=16, n_head_kv=2, head_dim=64, n_expert=16, n_expert_used=4, window=128)}

    def make(arch):
        if arch not in made: made[arch] = make_model(folder / f'{arch}.gguf', arch, seed=3, n_layer=3, n_vocab=4096, **shapes[arch])
        return made[arch]
    return make


def draws(file, *args, delays=0, changes=()):
    "What `draws.py` says; None when it died, which a planted mistake may well bring about"
    import orcd
    root = str(Path(orcd.__file__).resolve().parent.parent)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([root, os.environ.get('PYTHONPATH', '')]), ORCD_NVRTC_OPTIONS=f'-DDELAYS={delays}' if delays else '')
    command = [sys.executable, str(HERE / 'draws.py'), str(file), *map(str, args)]
    for c in changes: command += ['--change', *c]
    try: r = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    except subprocess.TimeoutExpired: return None
    assert changes or r.stdout, r.stderr[-2000:]
    return json.loads(r.stdout) if r.stdout.strip() else None


@pytest.fixture(scope='module')
def right(files):
    made = {}
    def hash_of(arch):
        if arch not in made: made[arch] = draws(files(arch), '--draws', 20)['hash']
        return made[arch]
    return hash_of


@pytest.mark.parametrize('arch', ['qwen2', 'gpt-oss'])
@pytest.mark.parametrize('delays', [0, 2048, 16384])
@pytest.mark.parametrize('beside', ['', 'lds', 'sts,memory', 'gemm'])
def test_every_draw_has_the_same_bits(files, right, arch, delays, beside):
    got = draws(files(arch), '--draws', 200, '--seconds', 8, '--beside', beside, delays=delays)
    assert got['differ'] == 0 and got['hash'] == right(arch), got


def noticed(files, right, arch, changes):
    "Is the mistake seen, with waits or beside kernels that keep shared memory busy?"
    for delays, beside in (2048, ''), (0, 'lds'), (16384, 'sts'):
        got = draws(files(arch), '--draws', 2000, '--seconds', 6, '--until', 1, '--beside', beside, delays=delays, changes=changes)
        if got is None or got['differ'] or got['hash'] != right(arch): return True
    return False


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_seen(files, right, mistake):
    import cupy
    if int(cupy.cuda.Device().compute_capability) < 90: pytest.skip('these rules are for cards with bulk copies and dependent launches')
    assert noticed(files, right, 'qwen2', MISTAKES[mistake])


@pytest.mark.parametrize('mistake', MIX)
def test_mistakes_with_experts_are_seen(files, right, mistake):
    import cupy
    if int(cupy.cuda.Device().compute_capability) < 90: pytest.skip('these rules are for cards with bulk copies and dependent launches')
    assert noticed(files, right, 'gpt-oss', MIX[mistake])
