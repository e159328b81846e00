"""Everything that `lower` can name compiles with NVRTC, without a GPU, for the cards in ORCD_ARCHS, and spills next to nothing.

Without ORCD_ARCHS that is sm_90 and some small models; the gate compiles all: every family, type, size class and pair of types (`lowered.py`).

What no published file has, two types that are not mixed there, is compiled with few optimisations, which takes a third of the time. So is an
architecture where the sources ask nothing that tells it from an earlier one in the list. That happens in a process of its own: after one
`--Ofast-compile`, NVRTC 13.5 compiles everything that comes later in the same process so, and the registers of sm_90 would be said to spill."""
import multiprocessing, os, re
from concurrent.futures import ProcessPoolExecutor
import pytest
from lowered import is_published, lowered
from orcd.kernels import nvrtc
from orcd.kernels.nvrtc import CARDS

EVERYTHING = 'ORCD_ARCHS' in os.environ
ARCHS = os.environ.get('ORCD_ARCHS', '90').split()
ENTRY = sorted(p.stem for p in (nvrtc.CUDA_DIR/'entry').glob('*.cu'))
OTHERS = sorted(p.stem for p in nvrtc.CUDA_DIR.glob('*/*.cu') if p.stem not in ENTRY)     # what they include, by itself
ASKED = sorted({int(n) for name in (*ENTRY, *OTHERS) for n in re.findall(r'__CUDA_ARCH__ \S+ (\d+)', nvrtc.read_source(name))})
# what the preprocessor may see
CODE = {a: (*(10*int(a) >= n for n in ASKED), CARDS[a].is_hopper) for a in ARCHS}
FAST = {a for i, a in enumerate(ARCHS) if CODE[a] in [CODE[b] for b in ARCHS[:i]]}
SPILLS = {'90': 64}     # bytes a thread, at most; the tensor-core tiles spill up to 40


def parts(arch, name):
    "Tests that share a file's variants, so that they run side by side"
    if not EVERYTHING: return 1
    return dict(gemv=4, gemm_wgmma=24 if CARDS[arch].is_hopper else 1, expert_wgmma=9 if CARDS[arch].is_hopper else 1).get(name, 1)


def compiled_fast(jobs):
    "Does NVRTC make machine code of all? Runs in a process whose NVRTC compiles fast alone."
    if '--Ofast-compile=max' not in nvrtc.OPTIONS: nvrtc.OPTIONS = (*nvrtc.OPTIONS, '--Ofast-compile=max')
    return all(nvrtc.compile_text(*job).cubin[:4] == b'\x7fELF' for job in jobs)


@pytest.fixture(scope='module')
def fast():
    "A process that compiles fast; it starts with the first job"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool: yield lambda jobs: pool.submit(compiled_fast, jobs).result()


@pytest.mark.parametrize('arch, name, part', [(a, n, i) for a in ARCHS for n in (*ENTRY, *OTHERS) for i in range(parts(a, n))])
def test_compiles(fast, arch, name, part):
    source = nvrtc.read_source(name)
    variants = lowered(arch, EVERYTHING).get(name, [()])     # as it is what no model launches there: benchmarks do, and other files include it
    jobs = [(name, source, nvrtc.target(source, f'sm_{arch}'), v) for v in variants[part::parts(arch, name)]]
    quick = [j for j in jobs if arch in FAST or not is_published(j[-1])]
    assert not quick or fast(quick)
    for job in jobs:
        if job in quick: continue
        c = nvrtc.compile_text(*job)
        assert c.cubin[:4] == b'\x7fELF' and (c.resources or not c.log.count('Compiling entry'))
        spilling = {k: r['spills'] for k, r in c.resources.items() if r['spills'] > SPILLS.get(arch, 128)}
        assert not spilling, f'{name} {job[-1]}: registers spilled to memory: {spilling}'


def test_every_question_about_the_architecture_is_known():
    "Sources ask in one way only, which `ASKED` finds"
    for name in (*ENTRY, *OTHERS):
        source = nvrtc.read_source(name)
        assert len(re.findall(r'__CUDA_ARCH(?!_FEAT_SM90_ALL)', source)) == len(re.findall(r'__CUDA_ARCH__ (?:>=|<) \d+', source)), name


@pytest.mark.skipif(not EVERYTHING, reason='needs ORCD_ARCHS')
def test_every_kernel_is_launched_somewhere():
    "`lowered` reaches all that is there but what measures bandwidth"
    assert {*ENTRY} - {file for arch in ('80', '90') for file in lowered(arch)} == {'read'}
