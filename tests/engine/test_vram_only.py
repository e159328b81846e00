"Weights, KV cache and workspace are plain device memory: no call in the package could make them anything else"
import ast, re
from pathlib import Path

ORCD = Path(__file__).resolve().parents[2] / 'orcd'
# managed memory, host memory mapped into the device, and what moves pages between the two; also CuPy's pools, which would hide an
# allocation from the ledger
FORBIDDEN = (r'(?i)malloc_?managed|managed_?mem|mem_?advise|mem_?prefetch|hostgetdevicepointer|set_allocator|memorypool|memory_pool|'
    r'malloc_?async|mapped')


def code(path):
    "Source without docstrings and comments"
    tree = ast.parse(path.read_text())
    for n in ast.walk(tree):
        if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(n) is not None: n.body[0].value.value = ''
    return ast.unparse(tree)


def test_no_call_for_another_kind_of_memory():
    found = [(p.name, m[0]) for p in [*ORCD.rglob('*.py'), *ORCD.rglob('*.cu')]
        if (m := re.search(FORBIDDEN, code(p) if p.suffix == '.py' else p.read_text()))]
    assert not found
    assert re.search(FORBIDDEN, 'runtime.mallocManaged(5)') and re.search(FORBIDDEN, 'cupy.cuda.set_allocator(None)') # the pattern works


def calls(name):
    "(module, call) of every call of that attribute"
    for p in ORCD.rglob('*.py'):
        for n in ast.walk(ast.parse(p.read_text())):
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == name: yield p.stem, n


def test_pinned_memory_is_for_copies_only():
    "Pinned memory is made in one place, unmapped: flags 0. It is copied from, and holds the words that tell a stream that it may."
    for name, at in dict(hostAlloc=1, hostRegister=2).items():
        (module, call), = calls(name)
        assert module == 'loader' and ast.literal_eval(call.args[at]) == 0


def test_device_memory_has_one_door():
    "`vram.alloc` is the one place that allocates, and the loader the one that copies from the host in bulk"
    assert [m for m, c in calls('malloc')] == ['vram']
