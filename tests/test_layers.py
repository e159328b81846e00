"Imports point one way, and importing orcd costs nothing"
import ast, subprocess, sys
from pathlib import Path
import pytest

PKG = Path(__file__).resolve().parent.parent / 'orcd'
# from the file format to the command line; a module may import only from the lines above its own
LAYERS = """errors blocks gguf quants hub spm sandbox chat tokenizer sampling config arch arch_qwen2 arch_phi3 arch_gptoss arch_llama arch_qwen3 reference
magic nvrtc planes k_elementwise k_gemv k_gemm k_moe k_hopper k_attention k_sampler vram loader ops engine generation view haiku train start
protocol logs jobs worker cli""".split()
# `arch.resolve` fills its registry from the families below it when it is called
LATE = {('arch', f'arch_{f}') for f in ('qwen2', 'phi3', 'gptoss', 'llama', 'qwen3')} | {('magic', 'nvrtc'), ('start', 'cli')}
GPU_SIDE = {'nvrtc', 'planes', 'vram', 'loader', 'ops', 'engine', *(m for m in LAYERS if m.startswith('k_'))}


def imports(tree):
    "Every (module, inside a function?) that a module's syntax tree imports"
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) for n in ast.walk(f)}
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from ((a.name, id(n) in inside) for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            module = '.'.join(filter(None, ['orcd' if n.level else '', n.module])) # nbdev writes `from orcd.x` as `from .x`
            names = [f'{module}.{a.name}' for a in n.names] if module == 'orcd' else [module]
            yield from ((m, id(n) in inside) for m in names)


MODULES = sorted(p.stem for p in PKG.glob('*.py') if not p.stem.startswith('_'))


def test_every_module_has_a_layer(): assert set(MODULES) <= set(LAYERS), f'no layer for {sorted(set(MODULES) - set(LAYERS))}'


@pytest.mark.parametrize('module', MODULES)
def test_direction(module):
    for name, late in imports(ast.parse((PKG / f'{module}.py').read_text())):
        head, _, rest = name.partition('.')
        if head == 'cupy':
            assert late, f'{module} imports cupy at the top: machines without a GPU import it too'
            assert module in GPU_SIDE or module == 'cli', f'{module} imports cupy; only the GPU side may'
        if head != 'orcd' or not rest: continue
        target = rest.split('.')[0]
        if target in LAYERS and not (late and (module, target) in LATE):
            assert LAYERS.index(target) < LAYERS.index(module), f'{module} imports {target}, which lies above it'


def fresh(code): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    "What is imported is counted: a time would be the machine's"
    new = fresh('import sys; before = set(sys.modules); import orcd; print(*sorted(set(sys.modules) - before))').split()
    assert 'orcd' in new and len(new) < 20, new


def test_http_side_never_imports_cupy():
    out = fresh('import sys; import orcd.worker, orcd.cli; print("cupy" in sys.modules)')
    assert out.strip() == 'False'


def test_unknown_name():
    import orcd
    with pytest.raises(AttributeError, match='nothing_here'): orcd.nothing_here
    assert 'load' in dir(orcd)
