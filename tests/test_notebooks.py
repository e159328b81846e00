"""The notebooks' own test cells, run against the imported package, as users run it; and every chapter from top to bottom in a kernel of
Jupyter's, as its readers run it"""
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


def run_all(path, monkeypatch, change=str, **env):
    """The cells of a notebook after "run all", save and `nbdev-clean`, in the folder that Lab would run it in; `change` is what somebody
    types into the cells before that"""
    nbclient, nbformat, clean = map(pytest.importorskip, ('nbclient', 'nbformat', 'nbdev.clean'))
    for name, value in env.items(): monkeypatch.setenv(name, value)
    book = nbformat.read(path, 4)
    for cell in book.cells: cell.source = change(cell.source)
    where = dict(metadata=dict(path=str(path.parent)))
    nbclient.NotebookClient(book, timeout=None, kernel_name='python3', coalesce_streams=True, resources=where).execute()
    saved = json.loads(nbformat.writes(book))
    clean.clean_nb(saved)
    return saved['cells']


def source(cell): return ''.join(cell['source'])
def needs_gpu(cell): return re.search(r'^#\|\s*gpu\b', source(cell), re.M)
def is_hidden(cell): return re.search(r'^#\|\s*(hide|notest)\b', source(cell), re.M)
def card_of(cell): return [''.join(o['data']['text/plain']).removeprefix('run on: ') for o in cell['outputs'] if 'data' in o][-1]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_run_all_without_a_gpu(path, monkeypatch):
    "No cell fails, and what a GPU made is still there, bit for bit"
    before, after = json.loads(path.read_text())['cells'], run_all(path, monkeypatch, CUDA_VISIBLE_DEVICES='')
    assert [c | {'outputs': None} for c in after] == [c | {'outputs': None} for c in before]
    for a, b in zip(after, before, strict=True):
        if needs_gpu(b): assert a['outputs'] == b['outputs'], source(b)


@pytest.mark.gpu
@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if '#| gpu' in p.read_text()], ids=lambda p: p.stem)
def test_run_all_with_a_gpu(path, monkeypatch):
    from cupy.cuda import runtime
    name = runtime.getDeviceProperties(0)['name'].decode()
    cells = [c for c in run_all(path, monkeypatch) if needs_gpu(c) and not is_hidden(c)]
    assert {card_of(c) for c in cells} <= {name}


def test_kept_results_say_on_which_card():
    "And a text that two chapters of a folder share has one result, for it is found by its text"
    marked = [(p, c) for p in NOTEBOOKS for c in json.loads(p.read_text())['cells'] if c['cell_type'] == 'code' and needs_gpu(c)]
    results = {}
    for path, cell in marked:
        if not is_hidden(cell): assert re.match(r'\S.* \S', card_of(cell)), (path.name, source(cell))
        assert results.setdefault((path.parent, source(cell)), cell['outputs']) == cell['outputs'], (path.name, source(cell))
    for path in {p for p, _ in marked}: assert '%load_ext orcd.kernels.gpu_cells' in path.read_text(), path.name


FAKE_CARD = "class runtime:\n    def getDeviceProperties(self, i): return {'name': b'NVIDIA Test'}\nruntime = runtime()\n"
CELLS = ['%load_ext orcd.kernels.gpu_cells', '#| gpu\nprint("cells")\nprint("run")\n1/3', '#| gpu\n#| hide\nfrom nowhere import nothing',
    '#| gpu\n1/0']
KEPT = dict(output_type='stream', name='stdout', text='cells\nkept\n')
VALUE = dict(output_type='execute_result', execution_count=None, metadata={}, data={'text/plain': 'x', 'text/html': '<b>x</b>'})
CARD = dict(output_type='display_data', metadata={}, data={'text/html': '<small>run on: an X</small>', 'text/plain': 'run on: an X'})


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A notebook in a folder of its own"
    outputs = {1: [KEPT, VALUE, CARD], 3: [CARD]}
    cells = [dict(cell_type='code', id=f'cell{i}', metadata={}, execution_count=None, source=s, outputs=outputs.get(i, []))
        for i, s in enumerate(CELLS)]
    path = tmp_path / 'a.ipynb'
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{ROOT}')
    return path


def test_marked_cells_show_what_was_kept(small, monkeypatch):
    outputs = [c['outputs'] for c in run_all(small, monkeypatch, CUDA_VISIBLE_DEVICES='')]
    for o in (o for os in outputs for o in os):
        if 'text' in o: o['text'] = ''.join(o['text'])
        for k, v in o.get('data', {}).items(): o['data'][k] = ''.join(v)
    assert outputs == [[], [KEPT, VALUE, CARD], [], [CARD]]


def test_marked_cells_run_where_there_is_a_card(small, monkeypatch):
    (small.parent / 'cupy').mkdir()
    (small.parent / 'cupy' / '__init__.py').touch()
    (small.parent / 'cupy' / 'cuda.py').write_text(FAKE_CARD)
    (small.parent / 'nowhere.py').write_text('nothing = 0')
    text = small.read_text()
    small.write_text(text.replace('1/0', '1/4'))
    cells = run_all(small, monkeypatch)
    shown = [o.get('text') or o['data']['text/plain'] for o in cells[1]['outputs']]
    assert [''.join(s) for s in shown] == ['cells\nrun\n', str(1/3), 'run on: NVIDIA Test']
    assert not cells[2]['outputs'] and card_of(cells[3]) == 'NVIDIA Test'
    small.write_text(text)
    with pytest.raises(Exception, match='ZeroDivisionError'): run_all(small, monkeypatch)


def test_a_changed_cell_says_that_it_has_no_result(small, monkeypatch):
    from orcd.kernels.gpu_cells import NOTHING
    cells = run_all(small, monkeypatch, lambda text: text.replace('1/0', '1/9'), CUDA_VISIBLE_DEVICES='')
    assert ''.join(cells[3]['outputs'][0]['text']) == NOTHING + '\n' and cells[1]['outputs']


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
