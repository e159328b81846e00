"""Every .cu file compiles with NVRTC, without a GPU, for the architectures in ORCD_ARCHS, and spills next to nothing.

Without ORCD_ARCHS that is sm_90 alone, and of the file that takes longest the one type that published files have; the gate compiles all."""
import os
from pathlib import Path
import pytest
from orcd import nvrtc
from orcd.blocks import GGMLType

CUDA = sorted(p.stem for p in (Path(__file__).resolve().parent.parent / 'orcd' / 'cuda').glob('*.cu'))
ARCHS = os.environ.get('ORCD_ARCHS', '90').split()
SLOW = 'expert_wgmma'       # a minute for all types on Hopper, which is as long as all other files together: a test for each of them
QUANTS = [t for t in GGMLType if t.block_size > 1] if 'ORCD_ARCHS' in os.environ else [GGMLType.MXFP4]
JOBS = [(name, arch, t) for name in CUDA for arch in ARCHS for t in (QUANTS if (name, arch) == (SLOW, '90') else [None])]


@pytest.mark.parametrize('name, arch, only', JOBS, ids=[f'{n}-{a}' + (f'-{t.name}' if t is not None else '') for n, a, t in JOBS])
def test_compiles(name, arch, only):
    source = nvrtc.read_source(name)
    c = nvrtc.compile_text(name, source, nvrtc.target(source, f'sm_{arch}'), nvrtc.only(only) if only is not None else ())
    assert c.cubin[:4] == b'\x7fELF'
    if arch == '90':
        assert c.resources or not c.log.count('Compiling entry')
        spilling = {k: r['spills'] for k, r in c.resources.items() if r['spills'] > 64} # bytes a thread; the tensor-core tiles spill up to 40
        assert not spilling, f'{name}: registers spilled to memory: {spilling}'
