"The notebooks' own test cells, run against the imported package: nbdev-test runs the notebook's definitions, users run the package's"
import json, re
from importlib import import_module
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / 'nbs').rglob('*.ipynb'), key=lambda p: p.name)
SKIPPED = {'notest', 'gpu', 'slow', 'export', 'exports', 'exporti'}


def cells(path):
    "(kind, source, directives) of every code cell"
    for c in json.loads(path.read_text())['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] == 'code' and src.strip(): yield src, set(re.findall(r'^#\|\s*(\w+)', src, re.M))


def module_of(path):
    for src, _ in cells(path):
        if m := re.search(r'^#\|\s*default_exp\s+(\S+)', src, re.M): return m[1]


@pytest.fixture
def hasty(monkeypatch):
    "Templates that compute for ever are stopped after half a second instead of two"
    from orcd.text import chat
    pool = chat.Pool()
    monkeypatch.setattr(chat, '_pool', pool)
    monkeypatch.setattr(chat, 'CPU_SECONDS', .5)
    yield
    pool.close()


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, monkeypatch, hasty):
    import matplotlib
    matplotlib.use('Agg')
    monkeypatch.chdir(path.parent)
    module = module_of(path)
    names = dict(vars(import_module(f'orcd.{module}'))) if module else {}
    names |= {'__name__': '__main__', 'display': lambda *a, **k: None}
    for src, directives in cells(path):
        if directives & SKIPPED or src.startswith('%%'): continue
        src = '\n'.join(l for l in src.splitlines() if not l.startswith('%'))
        exec(compile(src, f'{path.name}', 'exec'), names)
    import matplotlib.pyplot as plt
    plt.close('all')


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_opening(path):
    "A title and a one-line summary, which becomes the module's docstring"
    md = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown']
    assert md and re.match(r'# \S.*\n+> \S', md[0]), 'the first text cell is "# Title" and "> summary"'


PAGES = {'operating'}      # chapters that make no module


def test_chapters_are_numbered_without_gaps():
    """00, 01, … through the folders in their order, errors before and the making of the book after them; a new chapter may stand behind its
    predecessor with a letter. A chapter is named after the module it exports, and lies in a folder of the module's"""
    chapters = [(re.fullmatch(r'(\d\d)([a-z]?)_(\w+)', p.stem), p) for p in NOTEBOOKS if p.name != 'index.ipynb']
    assert all(m for m, _ in chapters), chapters
    numbers = [int(m[1]) for m, _ in chapters if not m[2]]
    assert numbers == list(range(len(numbers))), 'python -m orcd.book numbers them anew'
    around = [chapters[0], *chapters[-2:]]
    assert [p for _, p in chapters if p.parent.name == 'nbs'] == [p for _, p in around]
    assert [m[3] for m, _ in around] == ['errors', 'book', 'docstrings']
    folders = [p.parent.name for _, p in chapters[1:-2]]
    assert folders == sorted(folders)
    for m, p in chapters:
        folder = '' if p.parent.name == 'nbs' else p.parent.name[2:] + '.'
        assert module_of(p) == (None if m[3] in PAGES else f'{folder}{m[3]}'), p


def test_cuda_files_match_cells():
    "A deleted cell must not leave its .cu file behind"
    from orcd.kernels.cuda_cells import cuda_source
    found = dict(cuda_source(src) for p in NOTEBOOKS for src, _ in cells(p) if src.startswith('%%cuda'))
    on_disk = {f'{p.parent.name}/{p.stem}': p.read_text() for p in (ROOT / 'orcd' / 'kernels' / 'cuda').rglob('*.cu')}
    assert found == on_disk


def test_outputs_are_small_and_repeatable():
    "No error outputs, no addresses, no figure above 50 KB"
    for p in NOTEBOOKS:
        for c in json.loads(p.read_text())['cells']:
            for o in c.get('outputs', []):
                assert o['output_type'] != 'error', p.name
                text = json.dumps(o)
                assert not re.search(r'\bat 0x[0-9a-f]{6,}', text), f'{p.name}: an address in an output'
                png = o.get('data', {}).get('image/png', '')
                assert len(png) * 3 // 4 < 50_000, f'{p.name}: a figure of {len(png) * 3 // 4} bytes'
