"What files and clients say reaches people without power over their terminal or their log"
import io, json, sys, unicodedata
from types import SimpleNamespace as NS
import pytest
from hypothesis import given, strategies as st
import orcd
from orcd.serve import cli
from orcd.errors import PROSE, GGUFError, OrcdError, for_output, printable
from orcd.serve.logs import as_json, as_text
from worker_tools import worker

EVIL = '\x1b]0;owned\x07\x1b[2J\n12:00:00   shutdown  exit_code=0\r\x9b31m\u2028\u202e\x7f'
ANY = st.text(st.characters(exclude_categories=()), max_size=40)


def harmless(text):
    "No controls, no line ends, no directions, no halves of pairs, by Unicode's own tables"
    return all(unicodedata.category(c) not in ('Cc', 'Zl', 'Zp', 'Cs')
        and unicodedata.bidirectional(c) not in ('LRE', 'RLE', 'LRO', 'RLO', 'PDF', 'LRI', 'RLI', 'FSI', 'PDI')
        and c not in '\u200e\u200f\u061c' for c in text)


@given(ANY)
def test_printable(text):
    out = printable(text)
    assert harmless(out) and len(out.splitlines()) <= 1
    assert out == text or not harmless(text)
    assert harmless(printable(text, keep=PROSE).translate(dict.fromkeys(map(ord, PROSE))))


@given(ANY, st.integers(0, 40_000))
def test_messages_have_an_end(text, n):
    "What a file or a client wrote may be a megabyte long: what is said of it begins and ends as it would"
    whole = text + 'x'*n + '; it must be a word'
    for e in OrcdError(whole), GGUFError(whole, 'm.gguf', 7):
        said, full = str(e), printable(('m.gguf: ' if isinstance(e, GGUFError) else '') + whole
            + (' (byte 7)' if isinstance(e, GGUFError) else ''), keep='\n\t')
        assert said == full if len(full) <= 8000 else len(said) < 8000 and full.startswith(said[:1000]) and full.endswith(said[-1000:])


def test_every_character():
    for i in range(sys.maxunicode + 1): assert harmless(printable(chr(i))) and (printable(chr(i)) == chr(i)) == harmless(chr(i)), hex(i)


@given(ANY, ANY)
def test_a_log_line_is_one_line(path, key):
    e = dict(event='request', timestamp='2026-01-01T12:00:00.000Z', level='info', path=path, job_id=key)
    text = as_text(None, 'info', dict(e))
    assert text.endswith('\n') and harmless(text[:-1])
    line = as_json(None, 'info', dict(e))
    assert line.isascii() and harmless(line[:-1]) and json.loads(line) | {} == e


def test_a_traceback_cannot_begin_a_line():
    text = as_text(None, 'error',
        dict(event='error', level='error', timestamp='2026-01-01T12:00:00.000Z', exception=f'ValueError: {EVIL}\n'))
    first, *below = text[:-1].split('\n')
    assert below and all(l.startswith('    ') for l in below) and harmless(first + ''.join(below))


def test_errors_print_themselves_so():
    class Missing(OrcdError, KeyError): pass
    for e in OrcdError(EVIL), GGUFError(EVIL, EVIL, 7), Missing(EVIL): assert harmless(str(e).replace('\n', ''))
    assert str(GGUFError('bad', 'x.gguf', 7)) == 'x.gguf: bad (byte 7)' and str(OrcdError('two\nlines\tof\tit')) == 'two\nlines\tof\tit'


class Terminal(io.StringIO):
    def isatty(self): return True


def test_generated_text_on_a_terminal(monkeypatch):
    "On a terminal nothing but text, in a pipe every character as it is"
    parts = ['雨 a\n\tb ', 'مرحبا\u200f ', '\x1b[31m', '\x9b2J\x07\r', '\x1b', ']52;c;aGk=\x07']
    out = lambda: type('Out', (list,), dict(text=''.join(parts)))(NS(text=t) for t in parts)
    for stream in Terminal(), io.StringIO():
        monkeypatch.setattr(sys, 'stdout', stream)
        assert cli.stream(out()) == ''.join(parts)
        said = stream.getvalue()
        if stream.isatty():
            assert (said.startswith('雨 a\n\tb مرحبا\u200f ') and harmless(said.translate(dict.fromkeys(map(ord, PROSE))))
                and r'\x1b[31m' in said)
        else: assert said == ''.join(parts)
    assert for_output('\x1b', io.StringIO()) == '\x1b'


def test_info_of_a_file_with_a_wicked_name(tmp_path, capsys):
    with orcd.GGUF(str(cli.find_model('demo'))) as g: name = g.metadata['general.name'].encode()
    wicked = b'o\x1b[1m\x07\nx\x7f'.ljust(len(name), b'!')
    (tmp_path / 'x.gguf').write_bytes(cli.find_model('demo').read_bytes().replace(name, wicked, 1))
    assert len(wicked) == len(name)
    assert cli.run(['info', str(tmp_path / 'x.gguf')]) == 0
    out = capsys.readouterr().out
    assert r'o\x1b[1m\x07 x\x7f' in out.splitlines()[0] and harmless(out.replace('\n', ''))


def test_messages_of_the_command_line(capsys):
    assert cli.run(['info', f'{EVIL}.gguf']) == 1 and cli.run(['generate', 'demo', 'x', '--device', EVIL]) == 2 and cli.run([EVIL]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 3 and harmless(err.replace('\n', ''))


@pytest.mark.parametrize('form', ['json', 'pretty'])
def test_clients_cannot_write_into_the_log(form):
    with worker(log_format=form, wait=False, port=0) as w:
        while not any('ready' in l for l in w.raw): assert w.p.poll() is None
        w.address = next(l for l in w.raw if 'ready' in l).split('http://')[1].split('"')[0].split()[0]
        w.post('/cancel/%1b%5d0;owned%07%0a12:00:00%20%20%20shutdown%20%20exit_code=0%e2%80%ae')
        w.execute(EVIL, prompt='a').all()
        w.post('/execute', dict(job_id=EVIL * 9, prompt='a'))
        w.signal()
        assert w.end() == 0
        lines = [l for l in w.raw if 'loading' not in l]
        assert sum('shutdown' in l for l in lines) >= 3 and all(harmless(l[:-1]) for l in lines)
        assert not any(l.startswith('12:00:00   shutdown') for l in lines)
