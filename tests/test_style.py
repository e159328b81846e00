"ruff finds nothing in the package and the tests; [tool.ruff] in pyproject.toml says what it looks for, and why not for more"
import subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip('ruff')


def ruff(*args, **more):
    return subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'concise', *args], cwd=ROOT,
        capture_output=True,
        text=True, **more)


def test_package_and_tests_are_clean():
    out = ruff('orcd', 'tests')
    assert out.returncode == 0, \
        f'{out.stdout}{out.stderr}\nA finding in orcd/ is mended in its chapter, which the head of the file names; then nbdev-export'


def test_what_the_house_wants_is_found():
    "One statement a line and 140 characters in the package; an unused import anywhere; a one-line `if` is allowed"
    def codes(name, text):
        out = ruff('--stdin-filename', name, '-', input=text)
        assert not out.stderr, out.stderr
        return [l.split()[1] for l in out.stdout.splitlines() if l.startswith(name)]
    assert codes('orcd/book.py', 'x = 1; y = 2\n') == ['E702']
    assert codes('orcd/book.py', f'x = "{"a" * 140}"\n') == ['E501']
    assert codes('tests/test_style.py', 'import json\n') == ['F401']
    assert codes('orcd/book.py', 'import json, re\nf = lambda x: json.dumps(x)\nif f(1): re.purge()\n') == []
