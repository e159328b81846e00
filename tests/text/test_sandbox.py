"The process that renders chat templates: bombs, limits, its life and death"
import json, os, re, resource, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
import pytest

from orcd.text import chat, sandbox
from orcd.text.chat import CHATML, ChatTemplate, Pool, Renderer
from orcd.errors import ChatTemplateError
from worker_tools import gone

TALK = [dict(role='user', content='Where is the rain?')]
PROMPT = '<|im_start|>user\nWhere is the rain?<|im_end|>\n<|im_start|>assistant\n'


@pytest.fixture
def pool(monkeypatch):
    "A pool of this test's own"
    p = Pool()
    monkeypatch.setattr(chat, '_pool', p)
    yield p
    p.close()


def memory_peak(pid):
    "MiB that a process took at the most"
    return int(re.search(r'VmHWM:\s+(\d+) kB', Path(f'/proc/{pid}/status').read_text())[1]) >> 10


# --- bombs ----------------------------------------------------------------------------------------

DOUBLE = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
BOMBS = {
    'format width': "{{ '{:>%d}' | format }}{{ '{:>9999999999}'.format(1) }}",
    'format precision': "{{ '{:.999999999f}'.format(1.5) }}",
    'format nested': "{{ '{:{w}}'.format(1, w=10**10) }}",
    'format_map': "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    'percent': "{{ '%*d' % (10**9, 1) }}",
    'percent filter': "{{ '%9999999999d' | format(1) }}",
    'center': "{{ 'a' | center(10**10) }}",
    'batch': "{{ range(100000) | batch(10**9, 'x') | list }}",
    'slice': "{{ [1] | slice(10**9) | list | length }}",
    'join of joins': "{% set a = range(9999) | join('a' * 999) %}{{ a | list | join(a) }}",
    'tilde': DOUBLE + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    'macro twice': "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    'set blocks': DOUBLE + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    'dict doubling': DOUBLE + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | string | length }}",
    'range product': "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    'range product filter': "{% for a in range(99999) %}{% set b = range(99999) | sum %}{% endfor %}",
    'lipsum': "{{ lipsum(n=10**7) }}",
    'lipsum words': "{{ lipsum(n=1, min=10**8, max=10**8+1) }}",
    'map': "{% for i in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    'groupby': "{% set s = ('ab,' * 300000).split(',') %}{% for i in range(99) %}{% set x = s | groupby('real') | list %}{% endfor %}",
    'unique of colliding ints': "{{ range(0, 50000*2305843009213693951, 2305843009213693951) | unique | list | length }}",
    'sort': "{% set s = ('ab,' * 900000).split(',') %}{% for i in range(99) %}{% set x = s | sort %}{% endfor %}",
    'wordwrap': "{% for i in range(99) %}{% set x = ('a ' * 1000000) | wordwrap(1) %}{% endfor %}",
    'pprint': "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | pprint }}",
    'xmlattr': DOUBLE + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | xmlattr }}",
    'tojson cycle': "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x | tojson }}",
    'tojson tree': "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    'tojson indent': "{% set ns = namespace(l=[]) %}{% for i in range(250) %}{% set ns.l = [ns.l, 1] %}"
        "{% endfor %}{{ ns.l | tojson(indent=10**7) }}",
    'tojson separators': "{{ range(20000) | list | tojson(separators=('b' * 100000, ':')) }}",
    'cycler': "{% set c = cycler(*range(99999)) %}{% for i in range(99999) %}{% for j in range(99999) %}{% set x = c.next() %}"
        "{% endfor %}{% endfor %}",
    'joiner': "{% set j = joiner('a' * 10**6) %}{% for i in range(99999) %}{{ j() }}{% endfor %}",
    'namespaces': "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [namespace(a=ns.l)] %}"
        "{% endfor %}{{ ns.l | length }}",
    'zfill': "{{ 'a'.zfill(10**10) }}",
    'ljust': "{{ 'a'.ljust(10**10) }}",
    'expandtabs': "{{ '\t\t'.expandtabs(10**9) }}",
    'translate': "{% set t = {97: 'a' * 10**6} %}{{ ('a' * 10**6).translate(t) }}",
    'power': "{{ 10 ** (10 ** 10) }}",
    'power chain': "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x % 7 }}",
    'int to str': "{{ (7 ** 40000000) | string | length }}",
    'rfind': "{% set a = 'a' * 2000000 %}{{ a.rfind('ab' + 'a' * 1000000) }}",
    'rsplit': "{% set a = 'a' * 2000000 %}{{ a.rsplit('ab' + 'a' * 1000000) | length }}",
    'strip': "{% set a = 'a' * 2000000 %}{{ a.strip('b' * 2000000 ~ 'a') }}",
    'trim': "{% set a = 'a' * 2000000 %}{{ a | trim('b' * 2000000 ~ 'a') }}",
    'replace': "{% set a = 'a' * 20000 %}{{ a | replace('a', a, -1) }}",
    'indent': "{{ ('a\n' * 1000000) | indent(1000) }}",
    'recursive loop': "{% for x in [[[1]]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    'blocks': "{% block a %}{{ self.a() }}{% endblock %}",
    'compile nots': '{{ ' + 'not '*50000 + 'x }}',
    'compile filters': '{{ a' + '|e'*80000 + ' }}',
    'compile elifs': '{% if a %}' + '{% elif a %}'*20000 + '{% endif %}',
    'compile fors': '{% for a in b %}'*9000 + '{% endfor %}'*9000,
    'compile constant': "{{ 'a' * 10**10 }}{{ ('a' * 2000000) | trim('b' * 2000000 ~ 'a') }}",
    'compile text': '{{ a }}b'*32000,
    'compile plus': '{{ ' + '1+'*120000 + '1 }}',
    'lexer': '{#' * 130000,
    'lexer string': '{{ "' + '\\"' * 120000,
    'lexer number': '{{ ' + '9' * 200000 + ' }}',
}
MORE = [
    "{{ 'a' * 10**10 }}",
    "{{ [1] * 10**9 }}",
    "{{ (1,) * 10**9 }}",
    "{{ 2.0 ** 5000 }}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(50) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(50) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(50) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}"
        "{% endfor %}{{ n.x == n.y }}",
    "{% set n = namespace(x={}) %}{% for i in range(50) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='a') %}{% for i in range(50) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "{{ range(10**12) | list }}",
    "{% for a in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}{% endmacro %}{{ m(60, 'x') }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a\t'.expandtabs(10**10) }}",
    "{{ 'a' | indent(10**10, true) }}",
    "{{ [1] | tojson(indent=10**10) }}",
    "{{ range(99999) | join('a' * 99999) }}",
    "{% set a = 'a' * 9999 %}{{ a | replace('a', a) }}",
    "{% macro m() %}{% set a = 'a' * 4000000 %}{% for i in range(9999) %}{{ a[:-1] }}{% endfor %}{% endmacro %}{{ m() }}",
    "{{ 1.5 | round(10**10, 'ceil') }}{{ nope() }}",
    "{{ 1 .to_bytes(10**9) }}",
    "{{ ''.__class__.__mro__ }}{{ ''.__class__() }}",
    "{{ messages.append(1) }}",
    "{{ self.__init__.__globals__ }}{{ self._x() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% if %}",
    "{{ " + "[" * 9999 + "]" * 9999 + " }}",
    "{{ " + "-" * 99999 + "1 }}",
    "{{ 1 / 0 }}",
    "{{ missing.x }}",
    "x" * 300_000,
]


def outcome(source):
    "(what a bomb says, is it a ChatTemplateError, what the next template says)"
    try: said = ChatTemplate(source).render(TALK)[:50], False
    except ChatTemplateError as e: said = str(e), True
    except BaseException as e: said = repr(e), False
    return *said, ChatTemplate(CHATML).render(TALK)


def explode():
    """In a process of its own, where a child may compute for 0.1 s: all bombs, in two threads; MiB at the most, in this process and in a
    child"""
    chat.CPU_SECONDS = .1
    with ThreadPoolExecutor(2) as threads: said = list(threads.map(outcome, [*BOMBS.values(), *MORE]))
    peak = [memory_peak('self'), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10]
    print(json.dumps(dict(said=said, peak=peak, left=[len(chat._pool.free), len(chat._pool.busy)])))


def test_bombs():
    "Each ends within its CPU time and its memory, says so in one clean sentence, and leaves a working pool to the next"
    p = subprocess.run([sys.executable, '-c', 'import test_sandbox; test_sandbox.explode()'],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)), capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-2000:]
    result = json.loads(p.stdout)
    for name, (said, error, after) in zip([*BOMBS, *MORE], result['said']):
        assert error and said.startswith('the chat template ') and len(said) < 400 and said.isprintable(), (name[:80], said)
        assert not re.search(r'Traceback|\.py\b|MemoryError', said), (name[:80], said)
        assert after == PROMPT, name[:80]
    own, child = result['peak']
    assert own < 150 and child < 400, result['peak']
    assert result['left'][0] <= 2 and result['left'][1] == 0


def test_memory_limit(pool):
    "The kernel's own account: what a child may have at the most, and what is left for files"
    ChatTemplate(CHATML)
    pid = pool.free[0].process.pid
    limits = {line[:26].strip(): line[26:].split()[0] for line in Path(f'/proc/{pid}/limits').read_text().splitlines()[1:]}
    assert int(limits['Max address space']) < sandbox.MEMORY + (200 << 20)
    assert {limits[k] for k in ('Max open files', 'Max file size', 'Max processes', 'Max core file size')} == {'0'}
    assert memory_peak(pid) < 100      # before anything was rendered


@pytest.mark.parametrize('name', sorted(sandbox.environment().filters))
def test_every_filter_works_without_files(name):
    "A child can open no file, so a filter that imports something late would fail there, and only there"
    source = f'{{{{ x | {name} }}}}'
    def plain(x):
        try: return sandbox.render(sandbox.environment().from_string(source), dict(x=x), datetime(2025, 10, 10))
        except Exception as e: return type(e).__name__
    def confined(x):
        try: return ChatTemplate(source).render(TALK, x=x)
        except ChatTemplateError as e: return str(e)
    for x in 'a <b>&amp; www.a.bc', [3, 1, 2], {'a': 'b'}, 1.5:
        want, got = plain(x), confined(x)
        want, got = (re.sub(' at 0x[0-9a-f]+', '', y) for y in (want, got))
        if name == 'random' and 'Error' not in want: assert len(got) == len(want)
        elif re.fullmatch(r'\w+Error', want): assert 'the chat template fails' in got and 'file' not in got
        else: assert got == want


@pytest.mark.parametrize('expression, value', [
    ("lipsum(n=1, html=false) | length > 10", 'True'), ("strftime_now('%j %A %B')", '283 Friday October'), ("'%05.1f' % 2.25", '002.2'),
    ("'{:>5}'.format('ü')", '    ü'), (r"'\N{SNOWMAN}\u00e9'", '☃é'),
    ("(5 | filesizeformat) ~ ('x y' | wordwrap(1))", '5 Bytesx\ny'), ("strftime_now('%d日')", '10日')])
def test_what_is_loaded_late(expression, value):
    assert ChatTemplate('{{ ' + expression + ' }}').render(TALK, now=datetime(2025, 10, 10)) == value


def test_no_file_can_be_opened():
    with pytest.raises(ChatTemplateError, match='it needs a file, and no template may open one'):
        ChatTemplate("{{ 'a'.encode('cp273') }}").render(TALK)


def test_output_is_bounded(pool):
    big = "{% for i in range(4) %}{{ 'a' * 1048576 }}{% endfor %}"
    assert len(ChatTemplate(big).render(TALK)) == sandbox.MAX_OUTPUT
    with pytest.raises(ChatTemplateError, match='writes more than'): ChatTemplate(big + 'b').render(TALK)
    assert len(ChatTemplate("{% for i in range(4) %}{{ '🌧' * 1048576 }}{% endfor %}").render(TALK)) == sandbox.MAX_OUTPUT


@pytest.mark.parametrize('said, heard',
    [('no', 'no'), ('a\x1b]0;b\x07\u202e\nc', 'a ]0;b c'), ('x' * 9999, 'x' * 300 + '…'), (r'\ud800', '?')])
def test_what_a_template_says(said, heard):
    with pytest.raises(ChatTemplateError) as e: ChatTemplate("{{ raise_exception('" + said + "') }}").render(TALK)
    assert str(e.value) == 'the chat template refuses these messages: ' + heard


# --- life and death -------------------------------------------------------------------------------

def test_compiled_once(pool, monkeypatch):
    sent, ask = [], Renderer.ask
    monkeypatch.setattr(Renderer, 'ask', lambda self, request: sent.append(json.loads(request)) or ask(self, request))
    t = ChatTemplate(CHATML)
    for _ in range(5): assert t.render(TALK) == PROMPT
    assert ['source' in q for q in sent] == [False, True] + [False] * 5
    others = [ChatTemplate(f'{i}') for i in range(sandbox.KEPT + 1)]      # more than a child keeps
    assert t.render(TALK) == PROMPT and [o.render(TALK) for o in others] == [str(i) for i in range(sandbox.KEPT + 1)]


def test_a_child_has_nothing_of_ours(pool, monkeypatch):
    monkeypatch.setenv('ORCD_TOKEN', 'secret')
    with open(__file__) as f:
        os.set_inheritable(f.fileno(), True)
        ChatTemplate(CHATML)
    r = pool.free[0]
    where = Path(f'/proc/{r.process.pid}')
    assert {p.name for p in (where / 'fd').iterdir()} == {'0', '1', '2'} and os.readlink(where / 'fd' / '1') == '/dev/null'
    assert b'secret' not in (where / 'environ').read_bytes() and os.getsid(r.process.pid) == r.process.pid != os.getsid(0)
    assert 'NoNewPrivs:\t1' in (where / 'status').read_text()


def test_signals_are_for_the_worker(pool):
    "Ctrl-C, a service manager's SIGTERM, and the death of the thread that started the child leave it alone"
    made = []
    t = threading.Thread(target=lambda: made.append(ChatTemplate(CHATML)))
    t.start(); t.join()
    pid = pool.free[0].process.pid
    for s in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT: os.kill(pid, s)
    assert made[0].render(TALK) == PROMPT and pool.free[0].process.pid == pid


def test_killed_child_is_replaced(pool):
    t = ChatTemplate(CHATML)
    before = pool.free[0].process
    before.kill()
    assert gone(before.pid) and t.render(TALK) == PROMPT and pool.free[0].process.pid != before.pid


def test_stopped_child_holds_up_nobody(pool, monkeypatch):
    "One that is stopped from outside uses no CPU time: it is given up, and others are served meanwhile"
    monkeypatch.setattr(chat, 'WALL_SECONDS', 3)
    t, said = ChatTemplate(CHATML), []
    stopped = pool.free[0].process
    os.kill(stopped.pid, signal.SIGSTOP)
    def work():
        with pytest.raises(ChatTemplateError, match='does not answer within 3 s'): t.render(TALK)
        said.append('given up')
    thread = threading.Thread(target=work); thread.start()
    while not pool.busy: time.sleep(.01)
    said.append(t.render(TALK))
    thread.join()
    assert said == [PROMPT, 'given up'] and gone(stopped.pid) and t.render(TALK) == PROMPT


def test_many_threads(pool, monkeypatch):
    monkeypatch.setattr(chat, 'CPU_SECONDS', .1)
    t = ChatTemplate(CHATML)
    hang = ChatTemplate("{% if messages[0].content == 'hang' %}{% set s = 'a' * 1000000 %}{{ s.rfind('ab' ~ s[:500000]) }}{% endif %}"
        "{{ messages[0].content }}")
    def work(i):
        if i % 20 == 7:
            with pytest.raises(ChatTemplateError, match='takes more than 0.1 s'): hang.render([dict(role='user', content='hang')])
        return f'n{i}<' in t.render([dict(role='user', content=f'n{i}')]) and hang.render([dict(role='user', content=f'm{i}')]) == f'm{i}'
    with ThreadPoolExecutor(8) as threads: assert all(threads.map(work, range(100)))
    assert len(pool.free) <= 2 and not pool.busy


def script(code):
    return subprocess.run([sys.executable, '-c', 'from orcd.text import chat\nimport os, signal, time\n'
        "t = chat.ChatTemplate('{{ messages }}')\npid = chat._pool.free[0].process.pid\n" + code], capture_output=True, text=True,
        timeout=300)


@pytest.mark.parametrize('end', ['pass', 'os._exit(0)', 'os.kill(os.getpid(), signal.SIGKILL)', '1/0'])
def test_dies_with_its_parent(end):
    assert gone(int(script('print(pid, flush=True)\n' + end).stdout))


def test_dies_with_its_parent_although_a_fork_lives():
    "A fork in C runs no hooks of Python's: it keeps the other end of the connection open, so it is not the end of the input that tells"
    p = script('''if True:
        ours = os.dup(chat._pool.free[0].socket.fileno())     # what the hook does not let go of
        fork = os.fork()
        if fork == 0:
            os.dup2(os.open('/dev/null', os.O_WRONLY), 1)
            os.dup2(1, 2)
            time.sleep(3600)
        print(pid, fork, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)''')
    child, fork = map(int, p.stdout.split())
    try: assert gone(child)
    finally: os.kill(fork, signal.SIGKILL)


def test_fork_has_its_own_children():
    code = '''if True:
        here = os.fork()
        for i in range(50): assert t.render(i) == str(i), i
        other = chat._pool.free[0].process.pid != pid
        if here == 0: os._exit(10 if other else 11)
        print(os.waitstatus_to_exitcode(os.waitpid(here, 0)[1]), other)'''
    p = script(code)
    assert p.stdout.split() == ['10', 'False'], p.stderr


def test_a_parent_that_ignores_the_signal_of_the_limit():
    "A program inherits what is ignored; the limit holds all the same"
    p = subprocess.run([sys.executable, '-c', """if True:
        import signal
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        from orcd.text import chat
        chat.CPU_SECONDS = .1
        try: chat.ChatTemplate('{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}').render([])
        except chat.ChatTemplateError as e: print(e)"""], capture_output=True, text=True, timeout=300)
    assert 'takes more than 0.1 s' in p.stdout, p.stdout + p.stderr


def test_a_lower_limit_stays():
    "Who has no right to raise a limit of the address space (`ulimit -v`) renders templates with what there is"
    p = script("""if True:
        import ctypes, resource
        ctypes.CDLL(None).prctl(24, 24, 0, 0, 0)        # PR_CAPBSET_DROP, CAP_SYS_RESOURCE: also root's children cannot raise it
        space = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (space + (200 << 20),)*2)
        chat._pool.free.pop().close()
        print(t.render('rain'))
        try: print(len(chat.ChatTemplate("{{ ('a' * (250 * 2**20))|length }}").render([])))
        except chat.ChatTemplateError as e: print(e.kind)""")
    assert p.stdout.split() == ['rain', 'limit'], p.stdout + p.stderr


def test_interrupted_twice(pool):
    "Ctrl-C while a child is ended: the pool has room again"
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), pool.renderer() as r:
            end = r.close
            def close(): end(); raise KeyboardInterrupt
            r.close = close
            1/0
        assert not pool.busy and not pool.free


@pytest.mark.parametrize('executable', ['/nonexistent/python', '/bin/false'])
def test_cannot_start(pool, monkeypatch, executable):
    t = ChatTemplate(CHATML)
    pool.free.pop().close()
    with monkeypatch.context() as m:
        m.setattr(sys, 'executable', executable)
        with pytest.raises(ChatTemplateError, match='does not start'): t.render(TALK)
    assert t.render(TALK) == PROMPT


def test_an_answer_in_drops(pool, monkeypatch):
    "One byte now and one then is no answer either: the time is that of all of it"
    code = ("import os, time; os.write(0, b'+\\0\\0\\0\\0'); os.read(0, 5); os.read(0, 99); os.write(0, b'+\\0\\1\\0\\0')\nwhile "
        "os.write(0, b'a'): time.sleep(.02)")
    monkeypatch.setattr(chat, 'WALL_SECONDS', 1)
    monkeypatch.setattr(chat, '_start', lambda end: subprocess.Popen([sys.executable, '-c', code], stdin=end, stderr=subprocess.DEVNULL))
    with pytest.raises(ChatTemplateError, match='does not answer within 1 s'): ChatTemplate(CHATML)


@pytest.mark.parametrize('answer', [b'', b'+', b'+\xff\xff\xff\xff', b'+\0\0\0\1\xff', b'x\0\0\0\1a', b'+\0\0\1\0abc'])
def test_a_child_is_not_trusted(pool, monkeypatch, answer):
    "Whoever got out of Jinja's sandbox can still only lie"
    code = f"import os; os.write(0, b'+\\0\\0\\0\\0'); os.read(0, 5); os.read(0, 99); os.write(0, {answer!r})"
    def start(end): return subprocess.Popen([sys.executable, '-c', code], stdin=end)
    with monkeypatch.context() as m:
        m.setattr(chat, '_start', start)
        with pytest.raises(ChatTemplateError): ChatTemplate(CHATML)
    while pool.free: pool.free.pop().close()
    assert ChatTemplate(CHATML).render(TALK) == PROMPT
