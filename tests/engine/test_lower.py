"Lowering: what each family's layer becomes, that nothing of it is lost, and that temporaries never meet"
from types import SimpleNamespace
import numpy as np
import pytest
import orcd
from conftest import PUBLISHED
from make_models import MODELS, make_model
from orcd.engine import lower
from orcd.engine.lower import Buffer, Layers, Lowering, Place, Program, files_of, place_temporaries, pointers
from orcd.errors import KernelError
from orcd.families.arch import Trace, open_model
from orcd.kernels import nvrtc

CARDS = {name: (card.is_hopper, card.limits) for name, card in (('hopper', nvrtc.CARDS['90']), ('older', nvrtc.CARDS['86']))}


@pytest.fixture(params=[*PUBLISHED, *MODELS])
def model(request, tmp_path):
    if request.param in PUBLISHED: path = request.getfixturevalue('headers') / f'{request.param}.gguf'
    else: path = make_model(tmp_path/'m.gguf', n_layer=5, n_vocab=331, **MODELS[request.param])
    with orcd.GGUF(path) as g: return open_model(g)


@pytest.fixture(params=CARDS)
def layers(request, model): return Layers(*model, *CARDS[request.param])


SIZES = [(1, True), (1, False), (16, False), (300, False), (512, False)]

def each(layers): return [(i, rows, decode, layers.layer(i, rows, 256, decode)) for i in sorted(layers.places) for rows, decode in SIZES]

def kind(l): return l.name.removesuffix('_' + l.name.split('_', 1)[-1]) if l.file.startswith(('gemv', 'gemm', 'expert')) else l.name


TOKEN = dict(qwen2=['gemv', 'attend_decode', 'gemv', 'gated', 'gemv'], phi3=['gemv', 'attend_decode', 'gemv', 'gated', 'gemv'],
    qwen3=['gemv', 'head_norm', 'head_norm', 'attend_decode', 'gemv', 'gated', 'gemv'],
    llama=['gemv', 'attend_decode', 'gemv', 'gated', 'gemv'])
TOKEN['gpt-oss'] = ['gemv', 'attend_decode', 'gemv', 'gemv', 'gated', 'mix']


@pytest.mark.parametrize('name', PUBLISHED)
def test_launches_of_the_published_files(headers, name):
    "Counted by hand, once"
    with orcd.GGUF(headers / f'{name}.gguf') as g: model = open_model(g)
    hopper, older = (Layers(*model, *c) for c in CARDS.values())
    kinds = lambda layers, *a: {tuple(map(kind, layers.layer(i, *a).launches)) for i in layers.places}
    arch = model[1].arch
    token = tuple(TOKEN[arch])
    assert kinds(hopper, 1, 4096, True) == kinds(older, 1, 4096, True) == {token}
    attend = ('turn_rows', 'attend_prefill')
    if arch == 'gpt-oss':
        windowed = ('turn_rows', 'stage_window', 'attend_prefill', 'store_kv')
        rest = ('to_half', 'wgmma', 'rms_norm', 'thin', 'route', 'group_slots', 'to_half', 'experts_gated', 'experts', 'expert_sum')
        name = lambda l: 'experts_gated' if l.name.startswith('experts_gated') else kind(l)
        got = {tuple(map(name, hopper.layer(i, 512, 4096).launches)) for i in hopper.places}
        assert got == {('to_half', 'wgmma', *attend, *rest), ('to_half', 'wgmma', *windowed, *rest)}
    else:
        assert kinds(hopper, 512, 4096) == {('to_half', 'wgmma', *attend, 'to_half', 'wgmma', 'to_half', 'gated', 'wgmma')}
        some = ('gemm',)*3 if arch == 'qwen2' else ('gemm',)
        assert kinds(older, 512, 4096) == {('to_half', *some, *attend, 'to_half', 'gemm', 'to_half', *some[:2], 'to_half', 'gemm')}


def test_nothing_is_lost(layers):
    "Every step is done by a launch, every tensor of the layer is read, and every launch but conversions does a step"
    for i, rows, decode, low in each(layers):
        steps = layers.steps(i)
        assert set().union(*low.does) | {j for j, s in enumerate(steps) if s.op == 'split'} >= set(range(1, len(steps)))
        read = {a.buffer.role for l in low.launches for a in pointers(l) if a is not None}
        there = {r for r, t in layers.bound.layers[i].items() if t is not None}
        assert there <= read and read <= {*layers.roles}
        assert {l.name for l, d in zip(low.launches, low.does) if not d} <= {'to_half', 'group_slots', 'route', 'copy'}


def test_temporaries_do_not_meet(layers):
    "Worked out again: two that live at the same time do not overlap, each begins at a multiple of 256 bytes, all end within `scratch`"
    for i, rows, decode, low in each(layers):
        life = {}
        for n, l in enumerate(low.launches):
            for a in pointers(l):
                if a is not None and a.buffer.role == 'scratch':
                    life.setdefault(a.buffer, set()).add(n)
                    assert a.offset + sum((n - 1)*s for n, s in zip(a.shape, a.strides)) + a.itemsize <= a.buffer.n_bytes
        some = list(life)
        for b in some: assert b.offset % 256 == 0 and b.offset + b.n_bytes <= low.scratch
        for k, a in enumerate(some):
            for b in some[:k]:
                together = min(life[a]) <= max(life[b]) and min(life[b]) <= max(life[a])
                assert not together or a.offset + a.n_bytes <= b.offset or b.offset + b.n_bytes <= a.offset


def test_overlap_is_seen():
    "A launch that reads two temporaries, whatever their sizes: neither may lie in the other"
    args = nvrtc.Args('Any', a='ptr 3')
    def launch(*bs): return nvrtc.Launch('f', 'n', (1,), 32, args, dict(a=[Place(b, (b.n_bytes,), np.uint8) for b in bs]))
    a, b, c = (Buffer('scratch', n) for n in (1000, 300, 5000))
    assert place_temporaries([a, b, c], [launch(a, b), launch(b, c)]) == 5120 + 512 and c.offset == 0 and a.offset == 0 and b.offset == 5120
    assert place_temporaries([a, b, c], [launch(a, b), launch(b, c)], 1) == 5120 + 512 + 1024 # c waits a launch longer
    assert place_temporaries([a], []) == 0


def test_programs_have_the_addresses_of_the_layer(layers, monkeypatch):
    "A packed program with a layer's addresses is the same as each launch packed with arrays at those addresses"
    monkeypatch.setattr(nvrtc, 'kernel', lambda *a: SimpleNamespace(config=lambda *a: None, handle=0))
    rng = np.random.default_rng(0)
    addresses = rng.integers(2**30, 2**46, len(layers.roles)).astype(np.uint64)*256
    def real(a):
        if isinstance(a, (list, tuple)): return [real(x) for x in a]
        a = a.data if isinstance(a, nvrtc.QTensor) else a
        if not isinstance(a, Place): return a
        return SimpleNamespace(data=SimpleNamespace(ptr=int(addresses[layers.roles[a.buffer.role]]) + a.buffer.offset + a.offset))
    for i, rows, decode, low in each(layers):
        want = b''.join(d + bytes(-len(d) % 8) for l in low.launches for d in [l.args.pack({k: real(v) for k, v in l.values.items()})])
        assert Program(low.launches, layers.roles, 0).arguments(addresses).tobytes() == want


def lowered(write, rows, decode, hopper=True, arch='qwen2'):
    "The launches of a layer that `write(ops, x, w)` writes, over the tensors of a small model"
    config = SimpleNamespace(n_embd=64, n_head=2, n_head_kv=1, head_dim=32, windows=(0,), score_scale=None,
        rope=SimpleNamespace(n_rot=32, mscale=1., style='neox'))
    shapes = dict(norm=(64,), q=(64, 64), k=(32, 64), v=(32, 64), o=(64, 64), gate=(96, 64), up=(96, 64), down=(64, 96), both=(192, 64))
    from orcd.files.blocks import GGMLType
    info = {r: SimpleNamespace(type=GGMLType.F32 if len(s) == 1 else GGMLType.Q8_0, shape=s, name=r) for r, s in shapes.items()}
    ops = Trace(config)
    write(ops, ops.start(), SimpleNamespace(**{r: SimpleNamespace(role=r, shape=s) for r, s in shapes.items()}))
    return Lowering(config, ops.steps, lower.places(info, hopper), 0, rows, decode, 64, *CARDS['hopper' if hopper else 'older']).run()


def test_who_else_reads_it():
    "Gate and up that somebody else reads as well are not made away with"
    def plain(ops, x, w):
        h = ops.rms_norm(x, w.norm, 1e-6)
        return ops.linear(ops.swiglu(ops.linear(h, w.gate), ops.linear(h, w.up)), w.down, residual=x)
    def shared(ops, x, w):
        h = ops.rms_norm(x, w.norm, 1e-6)
        gate, up = ops.linear(h, w.gate), ops.linear(h, w.up)
        x = ops.linear(ops.swiglu(gate, up), w.down, residual=x)
        return ops.linear(gate, w.down, residual=x)
    def names(*a): return [kind(l) for l in lowered(*a).launches]
    assert names(plain, 1, True) == ['gated', 'gemv'] and names(plain, 8, False) == ['to_half', 'gated', 'wgmma']
    assert names(shared, 1, True) == ['gemv', 'swiglu', 'gemv', 'gemv']
    assert names(shared, 8, False) == ['to_half', 'wgmma', 'to_half', 'wgmma', 'to_half', 'wgmma']


def test_a_vector_that_is_read_twice():
    "Products of one vector go together even when something else was written in between; those of another do not"
    def two(ops, x, w):
        h = ops.rms_norm(x, w.norm, 1e-6)
        q = ops.linear(h, w.q)
        g = ops.linear(x, w.gate)       # of x itself, not of its norm
        k, v = ops.linear(h, w.k), ops.linear(h, w.v)
        return ops.linear(g, w.down, residual=ops.linear(ops.attention(q, k, v, 0), w.o, residual=x))
    l = lowered(two, 1, True).launches
    assert [kind(a) for a in l] == ['gemv', 'attend_decode', 'gemv', 'gemv', 'gemv']
    role = lambda a: {p.buffer.role for p in pointers(a) if p is not None}
    assert {'q', 'k', 'v'} <= role(l[0]) and 'gate' in role(l[2]) and 'o' in role(l[3])     # x as it was before attention was added


def test_what_was_put_off_sees_x_as_it_was():
    def late(ops, x, w):
        h = ops.rms_norm(x, w.norm, 1e-6)
        x = ops.linear(ops.linear(h, w.gate), w.down, residual=x)
        return ops.linear(ops.linear(h, w.up), w.down, residual=x)      # the norm of x before it was added to
    for rows, decode in ((1, True), (8, False)):
        l = lowered(late, rows, decode).launches
        role = lambda a: {p.buffer.role for p in pointers(a) if p is not None}
        first = next(n for n, a in enumerate(l) if 'down' in role(a))
        assert any('norm' in role(a) for a in l[:first]) and not any('norm' in role(a) for a in l[first:])
    def apart(ops, x, w):
        h = ops.rms_norm(x, w.norm, 1e-6)
        return ops.linear(h, w.o, residual=ops.linear(h, w.q, residual=x))     # the norm itself is wanted twice, x in between changes
    assert [kind(a) for a in lowered(apart, 1, True).launches] == ['rms_norm', 'gemv', 'gemv']
    def stale(ops, x, w):
        y = ops.linear(x, w.q, residual=x)
        return ops.linear(ops.rms_norm(x, w.norm, 1e-6), w.o, residual=y)
    with pytest.raises(KernelError, match='read after step 1 has added to it'): lowered(stale, 1, True)


def test_files(layers):
    for i, rows, decode, low in each(layers):
        assert files_of(low.launches) == {(l.file, l.defines) for l in low.launches}
        assert all(any(p.stem == f for p in nvrtc.CUDA_DIR.glob('entry/*.cu')) for f, _ in files_of(low.launches))
