"README.md and the sidebar are what `nbdev-export` makes of the front page and the tree, and no link is dead"
import json, re
from pathlib import Path
import yaml
from conftest import repository_files
from orcd import book

ROOT = Path(__file__).resolve().parent.parent
README, GUIDE = (ROOT / 'README.md').read_text(), (ROOT / 'CONTRIBUTING.md').read_text()
CHAPTERS = sorted((p for p in (ROOT / 'nbs').rglob('*.ipynb') if p.name != 'index.ipynb'), key=lambda p: p.name)


def markdown(path): return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown']


def test_export_changes_nothing():
    "On copies of the pages: what they are made of may lie anywhere"
    cells = book.read_cells(ROOT / 'nbs' / 'index.ipynb')
    chapters = book.read_chapters(ROOT / 'nbs')
    assert book.with_table(cells, chapters) == cells, 'nbs/index.ipynb is not in step with the chapters: run nbdev-export'
    assert book.readme(cells) == README, 'README.md is not index.ipynb as text: run nbdev-export'
    quarto, urls = (ROOT / '_quarto.yml').read_text(), book.read_urls((ROOT / 'pyproject.toml').read_text())
    assert book.with_sidebar(quarto, chapters, urls) == quarto, '_quarto.yml is not in step with the chapters: run nbdev-export'


def test_every_chapter_has_its_row():
    "Read from the notebooks without the module that writes the table"
    rows = re.findall(r'^\| (\d\d[a-z]?) \| \[(.*)\]\((\S+)\) \| (.*) \|$', README, re.M)
    want = []
    for p in CHAPTERS:
        title, summary = [l for l in markdown(p)[0].splitlines() if l.strip()][:2]
        want.append((p.name.split('_')[0], title.removeprefix('# '), str(p.relative_to(ROOT)), summary.removeprefix('> ')))
    assert [(n, t, p, s.replace(r'\|', '|')) for n, t, p, s in rows] == want


def test_links_and_commands_exist():
    for target in re.findall(r'\]\((?!http)([^)#]+)\)', README): assert (ROOT / target).exists(), target
    targets = re.findall(r'^(\w+):', (ROOT / 'Makefile').read_text(), re.M)
    for page in README, GUIDE:
        for name in re.findall(r'`make (\w+)|^make (\w+)', page, re.M): assert ''.join(name) in targets, f'make {name}'


def test_links_between_chapters_and_files_exist():
    "A relative link of any chapter leads to a file that is there"
    dead = []
    for path in [*(ROOT / 'nbs').rglob('*.ipynb'), *ROOT.glob('*.md')]:
        text = '\n'.join(markdown(path)) if path.suffix == '.ipynb' else path.read_text()
        text = re.sub(r'```.*?```', '', text, flags=re.S)
        for target in re.findall(r'\]\((?!https?:|attachment:|#)([^)\s#]+)', text):
            if not (path.parent / target).exists(): dead.append(f'{path.name}: {target}')
    assert not dead, dead


def test_what_the_guide_names_exists():
    "Files between back quotes, sections that it links to, cells, and names to search for in a chapter"
    named = re.findall(r'`((?:nbs|orcd|tests|\.ci|\.github)/[\w./-]+)`', GUIDE)
    assert named and not [n for n in named if not (ROOT / n).exists()]
    sections = {re.sub(r'[^\w -]', '', t).strip().lower().replace(' ', '-') for t in re.findall(r'^#+ (.*)', GUIDE, re.M)}
    assert set(re.findall(r'\]\(#([^)]+)\)', GUIDE)) <= sections
    for name in set(re.findall(r'%%cuda (\w+/\w+)', GUIDE)) - {'entry/name'}:
        assert (ROOT / 'orcd' / 'kernels' / 'cuda' / f'{name}.cu').exists(), name
    text = '\n'.join(p.read_text() for where, ending in (('orcd', '*.py'), ('orcd', '*.cu'), ('tests', '*.py'))
        for p in (ROOT / where).rglob(ending))
    words = set(re.findall(r'`(\w+)`', re.sub(r'```.*?```', '', GUIDE, flags=re.S))) - {'slow', 'notest', 'exports', 'hide', 'origin'}
    assert not [w for w in words if not re.search(rf'\b{w}\b', text)], 'CONTRIBUTING.md names what is gone'


def test_sidebar_lists_every_notebook():
    def leaves(entries):
        for e in entries: yield from leaves(e['contents']) if isinstance(e, dict) else [e]
    sidebar = yaml.safe_load((ROOT / '_quarto.yml').read_text())['website']['sidebar']['contents']
    assert list(leaves(sidebar)) == ['index.ipynb', *(str(p.relative_to(ROOT / 'nbs')) for p in CHAPTERS)]


def test_addresses_have_one_home():
    "While [project.urls] names no repository and no site, no page links to one of this project's"
    import tomllib
    urls = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'].get('urls', {})
    quarto = yaml.safe_load((ROOT / '_quarto.yml').read_text())['website']
    assert (quarto.get('site-url'), quarto.get('repo-url')) == (urls.get('Documentation') or None, urls.get('Repository') or None)
    if any(urls.values()): return
    written = [n for n in repository_files() if n.startswith(('orcd/', 'nbs/')) or n.endswith(('.md', '.yml', '.toml'))]
    for name in written:
        if name.endswith('.gguf'): continue
        assert not re.search(r'(github\.com|github\.io|gitlab\.com)[/:][\w.-]*/?(worker-)?orcd',
            (ROOT / name).read_text(errors='replace'), re.I), name
