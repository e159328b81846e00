"What people install: wheel and sdist are built, compared with the repository, installed into an empty environment and used from there"
import json, os, re, shutil, subprocess, sys, tarfile, tomllib, venv, zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
import pytest
from conftest import ROOT, once, repository_files

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
# nothing of the checkout may be found by a program that is started here
OUTSIDE = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'ORCD_', 'COV_', 'PYTEST_'))}


def run(*command, **more):
    "Standard output; what went wrong is shown whole"
    r = subprocess.run([*map(str, command)], capture_output=True, text=True, **dict(dict(env=OUTSIDE), **more))
    assert r.returncode == 0, f'{command}\n{r.stdout[-3000:]}\n{r.stderr[-3000:]}'
    return r.stdout


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A folder with the sdist, and with the wheel that is built from the sdist. Nothing is fetched: the backend is the one installed here"
    pytest.importorskip('build')
    from packaging.requirements import Requirement
    for need in map(Requirement, PROJECT['build-system']['requires']):
        try: found = distribution(need.name).version
        except PackageNotFoundError: found = '0'
        if not need.specifier.contains(found): pytest.skip(f'needs the package {need}')
    def make(folder):
        for name in repository_files():
            (folder / 'tree' / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / 'tree' / name, follow_symlinks=False)
        run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder / 'dist', folder / 'tree')
    return once(tmp_path_factory, 'built', make) / 'dist'


@pytest.fixture(scope='module')
def wheel(built):
    found, = built.glob('*.whl')
    return found


@pytest.fixture(scope='module')
def sdist(built, tmp_path_factory):
    "The unpacked source distribution"
    found, = built.glob('*.tar.gz')
    where = tmp_path_factory.mktemp('sdist')
    with tarfile.open(found) as t: t.extractall(where, **(dict(filter='data') if hasattr(tarfile, 'data_filter') else {}))
    folder, = where.iterdir()
    return folder


def needed(requirements, extra=''):
    "Every distribution that these requirements ask for, and those that they ask for in turn"
    from packaging.requirements import Requirement
    found, todo = {}, [(Requirement(r), extra) for r in requirements]
    while todo:
        r, extra = todo.pop()
        if r.marker and not r.marker.evaluate(dict(extra=extra)): continue
        try: d = distribution(r.name)
        except PackageNotFoundError: pytest.fail(f'{r} is not installed')
        for e in ('', *r.extras):
            if (d.name, e) in found: continue
            found[d.name, e] = d
            todo += [(Requirement(s), e) for s in d.requires or ()]
    return {d.name: d for d in found.values()}.values()


@pytest.fixture(scope='module')
def clean(wheel, tmp_path_factory):
    "An environment with the wheel and, as links to what is installed here, the packages that its metadata asks for, and no others"
    pytest.importorskip('pip')
    folder = tmp_path_factory.mktemp('clean')
    venv.create(folder, symlinks=True)
    python = folder / 'bin' / 'python'
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-index', '--no-deps', '--no-compile', '--quiet', wheel)
    with zipfile.ZipFile(wheel) as z:
        text = z.read(next(n for n in z.namelist() if n.endswith('.dist-info/METADATA'))).decode()
    packages = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    for d in needed(re.findall(r'^Requires-Dist: (.*)', text, re.M)):
        for top in {f.parts[0] for f in d.files or ()} - {'..', '__pycache__'}:
            if not (packages / top).exists(): (packages / top).symlink_to(d.locate_file(top))
    return folder


def test_wheel_is_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as z: names = set(z.namelist())
    info = {n for n in names if n.split('/')[0].endswith('.dist-info')}
    assert names - info == {n for n in repository_files() if n.startswith('orcd/')}
    assert {n.split('/', 1)[1] for n in info} == {'METADATA', 'RECORD', 'WHEEL', 'entry_points.txt', 'top_level.txt', 'licenses/LICENSE'}
    assert wheel.name.endswith('-py3-none-any.whl')
    for kind in '/py.typed', '.cu', '.gguf': assert any(n.endswith(kind) for n in names), kind


def test_sdist_is_the_repository(sdist):
    found = {str(p.relative_to(sdist)) for p in sdist.rglob('*') if not p.is_dir()}
    made = {n for n in found if n in ('PKG-INFO', 'setup.cfg') or n.startswith('orcd.egg-info/')}
    assert found - made == repository_files()


def test_metadata(wheel):
    "What an index shows, and what an installer goes by"
    from packaging.metadata import Metadata
    from packaging.specifiers import SpecifierSet
    with zipfile.ZipFile(wheel) as z:
        raw = z.read(next(n for n in z.namelist() if n.endswith('.dist-info/METADATA')))
        scripts = z.read(next(n for n in z.namelist() if n.endswith('.dist-info/entry_points.txt'))).decode()
    m = Metadata.from_email(raw)           # refuses what the standards do not allow
    assert m.name == 'orcd' and m.description_content_type == 'text/markdown' and m.license_expression == 'MIT'
    said = re.findall(r'Programming Language :: Python :: (3\.\d+)', '\n'.join(m.classifiers))
    assert said == ['3.11', '3.12', '3.13']
    for version in said: assert m.requires_python.contains(version)
    assert not SpecifierSet(str(m.requires_python)).contains('3.10')
    assert set(m.provides_extra) == {'cuda12', 'cuda13', 'hub', 'notebooks', 'dev'}
    assert 'orcd = orcd.serve.start:main' in scripts and 'worker-orcd = orcd.serve.start:worker_main' in scripts


def test_every_module_imports(clean, tmp_path):
    "With the packages of a plain `pip install orcd`: what needs an extra says so when it is used, not when it is imported"
    code = '''if True:
        import importlib, json, pkgutil, sys
        import orcd
        names = [m.name for m in pkgutil.walk_packages(orcd.__path__, 'orcd.') if not m.name.endswith('__main__')]
        for n in names: importlib.import_module(n)
        print(json.dumps([orcd.__file__, names, [m for m in ('cupy', 'pytest', 'nbdev', 'huggingface_hub') if m in sys.modules]]))'''
    where, names, more = json.loads(run(clean / 'bin' / 'python', '-c', code, cwd=tmp_path))
    assert Path(where).is_relative_to(clean) and not more
    files = [n for n in repository_files() if re.fullmatch(r'orcd/.*\.py', n)]
    want = {n.removesuffix('.py').removesuffix('/__init__').replace('/', '.') for n in files}
    assert set(names) | {'orcd', 'orcd.__main__'} == want


def test_demo_and_scripts(clean, tmp_path):
    "The console scripts run outside of the checkout, and the demo finds its model among the installed files"
    home = dict(OUTSIDE, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / 'cache'))
    out = run(clean / 'bin' / 'orcd', 'demo', cwd=tmp_path, env=home)
    haiku = [l for l in out.splitlines() if l.strip()]
    assert len(haiku) >= 3, out
    text = run(clean / 'bin' / 'python', '-m', 'orcd', 'generate', 'demo', 'Write a haiku about rain', '--device', 'reference',
        '--max-tokens', '3', cwd=tmp_path, env=home)
    assert text.strip()
    for name in 'orcd', 'worker-orcd':
        r = subprocess.run([clean / 'bin' / name, '--help'], cwd=tmp_path, env=home, capture_output=True, text=True)
        assert r.returncode == 0 and '--' in r.stdout, r.stderr


def test_kernels_are_installed(clean, tmp_path):
    "The CUDA sources, found through the module that compiles them, are those of the repository"
    code = '''if True:
        import hashlib, json
        from orcd.kernels.nvrtc import CUDA_DIR
        print(json.dumps({str(p.relative_to(CUDA_DIR)): p.read_text() for p in CUDA_DIR.rglob('*.cu')}))'''
    found = json.loads(run(clean / 'bin' / 'python', '-c', code, cwd=tmp_path))
    there = ROOT / 'orcd' / 'kernels' / 'cuda'
    assert found == {str(p.relative_to(there)): p.read_text() for p in there.rglob('*.cu')}


def test_tests_of_the_sdist_run_from_it(sdist):
    "Some of every sort; they use the sdist's own package"
    import orcd
    where = run(sys.executable, '-c', 'import orcd; print(orcd.__file__)', cwd=sdist).strip()
    assert Path(where) == sdist / 'orcd' / '__init__.py' != Path(orcd.__file__)
    out = run(sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', 'tests/test_layers.py', 'tests/test_readme.py',
        'tests/files/test_quants.py', 'tests/text/test_sampling.py', 'tests/test_notebooks.py', '-k',
        'layers or readme or round_trip or sampling or 00_errors or 10_config', cwd=sdist, env=OUTSIDE | dict(PYTHONDONTWRITEBYTECODE='1'))
    assert int(re.search(r'(\d+) passed', out)[1]) > 40, out
