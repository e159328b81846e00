"""The tests of the kernels, and the trained models against the reference engine, as other cards would run them: `ORCD_CARD` (chapter 18) in a process of its own for
each. What of a card can be tried so on a Hopper GPU, and what cannot, is a table of that chapter.

All that is selected starts at once, as many processes as there are cores. A part: `-k 86`, `-k "matmul or models"`; one by hand:
`ORCD_CARD=86 python -m pytest -q -m gpu tests/gpu/test_matmul.py`."""
import os, re, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
import pytest
from conftest import ROOT
from orcd.kernels.nvrtc import CARDS

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(3600)]
PATHS = '75', '80', '86', '89', '120'
# what takes longest begins first
FILES = dict(matmul=['test_matmul.py'], models=['test_demo.py'], engine=['test_engine.py', '-k', 'against_reference or decode_is_prefill or depend_on_chunks or loads_what'],
    moe=['test_moe.py'], attention=['test_attention.py'], sampler=['test_sampler.py'], elementwise=['test_elementwise.py'])
RUNS = [(what, card) for what in FILES for card in PATHS]


def run(what, card, threads):
    "pytest on a file, after the test that says whose code is run"
    file, *select = FILES[what]
    env = dict(os.environ, ORCD_CARD=card, OPENBLAS_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads))
    files = [f'tests/gpu/{file}'] if select else ['tests/gpu/test_card_gpu.py', f'tests/gpu/{file}']
    began = time.perf_counter()
    r = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-m', 'gpu', '-p', 'no:cacheprovider', *files, *select], cwd=ROOT, env=env, capture_output=True, text=True)
    return r.returncode, r.stdout + r.stderr, time.perf_counter() - began


@pytest.fixture(scope='module')
def runs(request):
    "A future for each run that was selected"
    import cupy
    if not CARDS['90'].number == int(cupy.cuda.Device().compute_capability) or os.environ.get('ORCD_CARD'): pytest.skip('needs a Hopper GPU that behaves as itself')
    wanted = [i.callspec.params['what'] + '-' + i.callspec.params['card'] for i in request.session.items if i.function is test_as_another_card]
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        yield {(w, c): pool.submit(run, w, c, max(1, cores//max(1, len(wanted)))) for w, c in RUNS if f'{w}-{c}' in wanted}


@pytest.mark.parametrize('what, card', RUNS)
def test_as_another_card(runs, what, card):
    code, said, seconds = runs[what, card].result()
    passed, skipped = (int((re.findall(rf'(\d+) {word}', said) or ['0'])[-1]) for word in ('passed', 'skipped'))
    print(f'{what} as {card}: {passed} passed, {skipped} skipped in {seconds:.0f} s')
    assert code == 0 and passed > (2 if what in ('models', 'elementwise') else 5), said[-8000:]
