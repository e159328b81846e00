"""Every .cu file compiles with NVRTC, without a GPU, for the architectures in ORCD_ARCHS, and spills next to nothing.

Without ORCD_ARCHS that is sm_90 alone, and of the file that takes longest the one type that published files have; the gate compiles all.

Where the sources ask nothing that tells an architecture from an earlier one in the list, the same text has been compiled for that one with all
optimisations; this one is compiled in a fifth of the time, with few of them. That happens in a process of its own: after one `--Ofast-compile`, NVRTC 13.5 compiles
everything that comes later in the same process with few optimisations too, and the registers of sm_90 would be said to spill."""
import multiprocessing, os, re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import pytest
from orcd.kernels import attention, nvrtc
from orcd.files.blocks import GGMLType

CUDA = sorted(p.stem for p in (Path(__file__).resolve().parents[2] / 'orcd' / 'kernels' / 'cuda').glob('*/*.cu'))
ARCHS = os.environ.get('ORCD_ARCHS', '90').split()
SLOW = 'expert_wgmma'       # a minute for all types on Hopper, which is as long as all other files together: a test for each of them
QUANTS = [t for t in GGMLType if t.block_size > 1] if 'ORCD_ARCHS' in os.environ else [GGMLType.MXFP4]
ASKED = sorted({int(n) for name in CUDA for n in re.findall(r'__CUDA_ARCH__ \S+ (\d+)', nvrtc.read_source(name))})
# what the preprocessor may see
CODE = {a: (*(10*int(a) >= n for n in ASKED), nvrtc.target('#include "math/wgmma.cu"', f'sm_{a}').endswith('a')) for a in ARCHS}
FAST = {a for i, a in enumerate(ARCHS) if CODE[a] in [CODE[b] for b in ARCHS[:i]]}


def variants(name, arch):
    "Label and defines of each time that a file is compiled"
    if (name, arch) == (SLOW, '90'): return [(f'-{t.name}', nvrtc.type_defines(t)) for t in QUANTS]
    return [(f'-{d}', attention.head_defines(d)) for d in attention.HEAD_DIMS] if name == 'attention' else [('', ())]


JOBS = [(name, arch, *v) for name in CUDA for arch in ARCHS for v in variants(name, arch)]


def compiled_fast(*job):
    "Does NVRTC make machine code of it? Runs in a process whose NVRTC compiles fast alone."
    if '--Ofast-compile=max' not in nvrtc.OPTIONS: nvrtc.OPTIONS = (*nvrtc.OPTIONS, '--Ofast-compile=max')
    return nvrtc.compile_text(*job).cubin[:4] == b'\x7fELF'


@pytest.fixture(scope='module')
def fast():
    "A process that compiles fast; it starts with the first job"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool: yield lambda *job: pool.submit(compiled_fast, *job).result()


@pytest.mark.parametrize('name, arch, defines', [(n, a, d) for n, a, _, d in JOBS], ids=[f'{n}-{a}{label}' for n, a, label, _ in JOBS])
def test_compiles(fast, name, arch, defines):
    source = nvrtc.read_source(name)
    job = name, source, nvrtc.target(source, f'sm_{arch}'), defines
    if arch in FAST:
        assert fast(*job)
        return
    c = nvrtc.compile_text(*job)
    assert c.cubin[:4] == b'\x7fELF'
    if arch == '90':
        assert c.resources or not c.log.count('Compiling entry')
        spilling = {k: r['spills'] for k, r in c.resources.items() if r['spills'] > 64} # bytes a thread; the tensor-core tiles spill up to 40
        assert not spilling, f'{name}: registers spilled to memory: {spilling}'


def test_every_question_about_the_architecture_is_known():
    "Sources ask in one way only, which `ASKED` finds"
    for name in CUDA:
        source = nvrtc.read_source(name)
        assert len(re.findall(r'__CUDA_ARCH(?!_FEAT_SM90_ALL)', source)) == len(re.findall(r'__CUDA_ARCH__ (?:>=|<) \d+', source)), name
