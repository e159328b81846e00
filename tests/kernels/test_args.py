"Every struct of arguments: as C lays it out, so NVRTC says, and as Python packs it"
import importlib, pkgutil, re
import numpy as np, pytest
import orcd.engine, orcd.kernels
from orcd.kernels import nvrtc

pytest.importorskip('cuda.bindings.nvrtc')
MODULES = [m.name for package in (orcd.kernels, orcd.engine) for m in pkgutil.iter_modules(package.__path__, f'{package.__name__}.')]
ARGS = {a.name: a for m in MODULES for a in vars(importlib.import_module(m)).values() if isinstance(a, nvrtc.Args)}
CTYPE = dict(i32='int', i64='long long', f32='float')
FILES = {p.stem: p.read_text() for p in nvrtc.CUDA_DIR.glob('*/*.cu')}


def where(name):
    "The file that declares the struct"
    found = [f for f, text in FILES.items() if re.search(rf'^struct {name}\b', text, re.M)]
    assert len(found) == 1, f'struct {name} is declared in {found}'
    return found[0]


def compiles(name, lines):
    "Does the file that declares the struct compile with these lines at its end? Raises `KernelError` otherwise."
    file = where(name)
    from orcd.files.blocks import GGMLType
    defines = nvrtc.type_defines(GGMLType.F32 if 'EACH_PLAIN(' in FILES[file] else GGMLType.MXFP4) if 'ONLY_TYPE' in ''.join(nvrtc.with_includes(FILES[file]).values()) + FILES[file] else ()
    nvrtc.compile_text(file, FILES[file] + '\n'.join(lines), nvrtc.target(FILES[file], 'sm_90'), (*defines, 'LAYOUT'))


def lines(a):
    n = a.name
    out = [f'static_assert(sizeof({n}) == {a.code.size}, "size of {n}");']
    for f, (kind, count) in a.fields.items():
        element = f'Element<Member<decltype(&{n}::{f})>::type>'
        out.append(f'static_assert(__builtin_offsetof({n}, {f}) == {a.dtype.fields[f][1]}, "offset of {n}.{f}");')
        out.append(f'static_assert({element}::count == {count or 1}, "how many of {n}.{f}");')
        out.append(f'static_assert({f"Pointer<{element}::type>::is" if kind == "ptr" else f"Same<{element}::type, {CTYPE[kind]}>::is"}, "type of {n}.{f}");')
    return out


HELPERS = '''
template<class M> struct Member; template<class M, class S> struct Member<M S::*> { typedef M type; };
template<class A> struct Element { typedef A type; enum { count = 1 }; }; template<class A, int N> struct Element<A[N]> { typedef A type; enum { count = N }; };
template<class A> struct Pointer { enum { is = false }; }; template<class A> struct Pointer<A*> { enum { is = true }; };
template<class A, class B> struct Same { enum { is = false }; }; template<class A> struct Same<A, A> { enum { is = true }; };'''


@pytest.mark.parametrize('name', ARGS)
def test_layout(name):
    a = ARGS[name]
    assert a.code.size == a.dtype.itemsize
    compiles(name, [HELPERS, *lines(a)])


@pytest.mark.parametrize('old, new', [(dict(eps='f32'), dict(eps='i32')), (dict(n='i32'), dict(n='i64')), (dict(x_stride='i64'), dict(x_stride='ptr')), (dict(n_rows='i32'), dict(rows='i32'))])
def test_a_mistake_is_seen(old, new):
    "A type that C has otherwise, a width, a name"
    a = ARGS['RmsNormArgs']
    fields = {n: kind for n, (kind, _) in a.fields.items()}
    (n, kind), = old.items()
    assert fields[n] == kind
    wrong = {k if k != n else next(iter(new)): v if k != n else next(iter(new.values())) for k, v in fields.items()}
    with pytest.raises(nvrtc.KernelError): compiles('RmsNormArgs', [HELPERS, *lines(nvrtc.Args('RmsNormArgs', **wrong))])


@pytest.mark.parametrize('name', ['Run', 'Rows'])
def test_layout_of_batched_launches(name):
    "The array of structs, and the number behind it; each thing says where its blocks begin"
    from orcd.kernels.weight_layout import AT_ONCE, BatchedArgs
    a, item = BatchedArgs(ARGS[name]), ARGS[name]
    assert [*item.fields][-1] == 'begin' and a.dtype['at'].shape == (AT_ONCE,)
    compiles(name, [f'typedef {a.name} Batched;', f'static_assert(sizeof(Batched) == {a.dtype.itemsize}, "");',
        *(f'static_assert(__builtin_offsetof(Batched, {f}) == {a.dtype.fields[f][1]}, "");' for f in a.dtype.names), f'static_assert(sizeof(Batched::at[0]) == {item.code.size}, "");'])
    values = [tuple(10*i + j for j in range(len(item.fields))) for i in range(3)]
    packed = np.frombuffer(a.pack(dict(at=values)), a.dtype)[0]
    assert packed['count'] == 3 and packed['at'][:3].tolist() == values and not packed['at'][3:].view(np.uint8).any()
    words = np.frombuffer(a.pack(dict(at=[(7, 7, *v[2:]) for v in values])), np.uint64)
    assert all(words[p//8] in (0, 7) for p in a.pointers) and len(a.pointers) == 2*AT_ONCE and sum(words[p//8] == 7 for p in a.pointers) == 6


def macro(text, name):
    "What a macro stands for, on one line"
    return ' '.join(re.search(rf'#define {name}\b((?:.*\\\n)*.*)', text)[1].replace('\\\n', ' ').split())


def apart(a):
    "The parameters that a kernel takes instead of its struct, the initialiser that makes the struct of them, both as the struct's declaration has them"
    body = re.sub(r'//.*', '', re.search(rf'struct {a.name} {{(.*?)}};', FILES[where(a.name)], re.S)[1])
    types = {}
    for declared in body.split(';'):
        if not declared.strip(): continue
        base, first, rest = re.fullmatch(r'\s*((?:const )?\w+)\s*(.*?)(,.*)?\s*', declared, re.S).groups()
        for one in [first, *(rest or '').split(',')[1:]]:
            star, name = re.fullmatch(r'\s*(\*?)\s*(\w+)(?:\[\d\])?\s*', one).groups()
            types[name] = base + star
    assert [*types] == [*a.fields]
    names = {f: [f'{f}{i}' for i in range(count)] if count else [f] for f, (_, count) in a.fields.items()}
    init = ', '.join(f'{{{", ".join(n)}}}' if a.fields[f][1] else n[0] for f, n in names.items())
    return ', '.join(f'{types[f]} {n}' for f in names for n in names[f]), f'{{{init}}}'


def macro_name(a): return re.sub(r'(?<=[a-z])(?=[A-Z])', '_', a.name.removesuffix('Args')).upper()


APART = [a for a in ARGS.values() if len(a.starts) > 1]


@pytest.mark.parametrize('a', APART, ids=lambda a: a.name)
def test_structs_in_parts(a):
    "Parameters have the struct's types, names and order, and lie where its numbers lie"
    text = FILES[where(a.name)]
    parameters, init = apart(a)
    assert macro(text, f'{macro_name(a)}_PARAMETERS') == parameters and macro(text, f'{macro_name(a)}_ARGS') == init
    flat = [(kind, a.dtype.fields[f][1] + i*(8 if kind in ('ptr', 'i64') else 4)) for f, (kind, count) in a.fields.items() for i in range(count or 1)]
    assert a.starts.tolist() == [at for _, at in flat] and [at for kind, at in flat if kind == 'ptr'] == [*a.pointers]
    at = 0
    for kind, start in flat:    # as C lays parameters out
        size = 8 if kind in ('ptr', 'i64') else 4
        at = -(-at//size)*size
        assert at == start
        at += size


def test_every_kernel_takes_one_struct():
    "Whole, or in parts where `Args` says so"
    parts = [(f'{macro_name(a)}_PARAMETERS', where(a.name)) for a in APART]
    for file, text in FILES.items():
        for m in re.finditer(r'__global__[^(;]*?(?:__launch_bounds__\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)\s*)?([\w#]+)\(([^)]*)\)', re.sub(r'//.*', '', text)):
            takes = m[2].replace('\\\n', '').strip()
            assert re.fullmatch(r'const __grid_constant__ [\w<>]+ \w+', takes) or (takes, file) in parts, f'{file}: {m[1]}({m[2]})'
