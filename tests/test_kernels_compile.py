"Every .cu file compiles with NVRTC, without a GPU, for the architectures in ORCD_ARCHS (default: 90), and spills next to nothing"
import os
from pathlib import Path
import pytest

CUDA = sorted(p.stem for p in (Path(__file__).resolve().parent.parent / 'orcd' / 'cuda').glob('*.cu'))
ARCHS = os.environ.get('ORCD_ARCHS', '90').split()


@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('name', CUDA)
def test_compiles(name, arch):
    from orcd import nvrtc
    source = nvrtc.read_source(name)
    c = nvrtc.compile_text(name, source, nvrtc.target(source, f'sm_{arch}'))
    assert c.cubin[:4] == b'\x7fELF'
    if arch == '90':
        assert c.resources or not c.log.count('Compiling entry')
        spilling = {k: r['spills'] for k, r in c.resources.items() if r['spills'] > 64} # bytes a thread; the tensor-core tiles spill up to 40
        assert not spilling, f'{name}: registers spilled to memory: {spilling}'
