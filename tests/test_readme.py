"README.md is index.ipynb as text; `python tests/test_readme.py` writes it"
import json, re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme():
    "The front page: its text cells, its code cells as blocks, what they printed below them"
    out = []
    for c in json.loads((ROOT / 'nbs' / 'index.ipynb').read_text())['cells']:
        src = ''.join(c['source'])
        if c['cell_type'] == 'markdown': out.append(src.replace('](images/', '](nbs/images/'))
        elif c['cell_type'] == 'code':
            out.append(f'```python\n{src}\n```')
            for o in c['outputs']:
                if text := ''.join(o.get('text', [])).rstrip(): out.append(f'```text\n{text}\n```')
    return '\n\n'.join(out) + '\n'


def test_readme_is_the_front_page(): assert (ROOT / 'README.md').read_text() == readme()


def test_links_and_commands_exist():
    text = readme()
    for target in re.findall(r'\]\((?!http)([^)#]+)\)', text): assert (ROOT / target).exists(), target
    targets = re.findall(r'^(\w+):', (ROOT / 'Makefile').read_text(), re.M)
    for name in re.findall(r'\bmake (\w+)', text): assert name in targets or name == 'and', f'make {name}'


def test_links_between_chapters_and_files_exist():
    "A relative link of any chapter leads to a file that is there"
    dead = []
    for nb in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        text = '\n'.join(''.join(c['source']) for c in json.loads(nb.read_text())['cells'] if c['cell_type'] == 'markdown')
        for target in re.findall(r'\]\((?!https?:|attachment:|#)([^)\s#]+)', text):
            if not (nb.parent / target).exists(): dead.append(f'{nb.name}: {target}')
    assert not dead, dead


def test_sidebar_lists_every_notebook():
    listed = re.findall(r'[\w/]+\.ipynb', (ROOT / '_quarto.yml').read_text())
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / 'nbs')) for p in (ROOT / 'nbs').rglob('*.ipynb'))


if __name__ == '__main__': (ROOT / 'README.md').write_text(readme())
