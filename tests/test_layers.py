"Imports point one way, and importing orcd costs nothing"
import ast, subprocess, sys
from pathlib import Path
import pytest

PKG = Path(__file__).resolve().parent.parent / 'orcd'
# a folder may import from those before it, and its modules from each other as long as no circle comes of it
FOLDERS = 'errors files text families kernels engine serve demo book docstrings'.split()  # nothing imports the last two: they make the book
# `arch.resolve` fills its registry from the families when it is called; what a script starts with is light, and calls the command line late
LATE = {('families.arch', f'families.{f}') for f in ('qwen2', 'phi3', 'gptoss', 'llama', 'qwen3')} | {('serve.start', 'serve.cli')}


def imports(tree, module):
    "Every (module, inside a function?) that a module's syntax tree imports"
    package = ['orcd', *module.split('.')[:-1]]
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) for n in ast.walk(f)}
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from ((a.name, id(n) in inside) for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            # nbdev writes `from orcd.x` as `from .x`
            base = '.'.join([*package[:len(package) + 1 - n.level], *([n.module] if n.module else [])]) if n.level else n.module
            names = ([f'{base}.{a.name}' for a in n.names] if base.startswith('orcd') and base.count('.') < 2
                and f'{base[5:]}' not in MODULES else [base])
            yield from ((m, id(n) in inside) for m in names)


MODULES = {'.'.join(p.relative_to(PKG).with_suffix('').parts): p for p in sorted(PKG.rglob('*.py')) if not p.stem.startswith('_')}


def targets(module):
    "(name of a module of ours, inside a function?) of each import"
    for name, late in imports(ast.parse(MODULES[module].read_text()), module):
        if not name.startswith('orcd.'): continue
        parts = name.split('.')[1:]
        found = next((m for m in ('.'.join(parts[:2]), parts[0]) if m in MODULES), None)
        assert found or parts[0].startswith('__'), f'{module} imports {name}: no such module'
        if found and not (late and (module, found) in LATE): yield found, late


def test_every_module_is_in_a_folder(): assert {m.split('.')[0] for m in MODULES} == set(FOLDERS)


@pytest.mark.parametrize('module', MODULES)
def test_direction(module):
    folder = module.split('.')[0]
    for name, late in imports(ast.parse(MODULES[module].read_text()), module):
        if name.split('.')[0] == 'cupy':
            assert late, f'{module} imports cupy at the top: machines without a GPU import it too'
            assert folder in ('kernels', 'engine') or module == 'serve.cli', f'{module} imports cupy; only the GPU side may'
    for target, _ in targets(module):
        assert FOLDERS.index(target.split('.')[0]) <= FOLDERS.index(folder), f'{module} imports {target}, which lies above it'


def test_no_circles():
    left = {m: {t for t, _ in targets(m)} for m in MODULES}
    while free := [m for m, of in left.items() if not of & left.keys()]:
        for m in free: del left[m]
    assert not left, f'these import each other: {sorted(left)}'


def fresh(code): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    "What is imported is counted: a time would be the machine's"
    new = fresh('import sys; before = set(sys.modules); import orcd; print(*sorted(set(sys.modules) - before))').split()
    assert 'orcd' in new and len(new) < 20, new


def test_http_side_never_imports_cupy():
    out = fresh('import sys; import orcd.serve.worker, orcd.serve.cli; print("cupy" in sys.modules)')
    assert out.strip() == 'False'


def test_unknown_name():
    import orcd
    with pytest.raises(AttributeError, match='nothing_here'): orcd.nothing_here
    assert 'load' in dir(orcd)
