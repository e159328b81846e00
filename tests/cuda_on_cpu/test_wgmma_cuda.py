"""Products of many rows on Hopper: gemm_wgmma.cu and expert_wgmma.cu run on the CPU by their own launchers, with lanes as fibers. A copy is there at once, so that whoever asks for a
stage too early destroys what others still read. Against float64 with the weights and halves that the kernel is given, and tile against tile, bit for bit."""
import re, shutil
from types import SimpleNamespace
import numpy as np, pytest
from orcd.kernels import wgmma
from orcd.files.blocks import GGMLType
from orcd.kernels.nvrtc import QTensor, read_source
from orcd.kernels.weight_layout import random_blocks, to_planes
from rounded import as_hopper
from launched import RUN, take_launches
from test_blocks_cuda import compiled
from test_gemv_cuda import FIBERS, THREADS, Array, floats
from test_wgmma_mainloop_cuda import HALVES, plain_slab, tops
from test_to_half_cuda import columns, halves

BARRIERS = r'''
#include <cassert>
// A barrier: its phase, arrivals in all, arrivals and bytes that are still to come
typedef unsigned long long u64;
struct Barrier { unsigned phase : 1, count : 15, left : 16; int bytes; };
static_assert(sizeof(Barrier) == 8, "");
static Barrier& of(u64* b) { return *(Barrier*)b; }
static void settle(u64* b) { if (!of(b).left && !of(b).bytes) { of(b).phase ^= 1; of(b).left = of(b).count; } }
static void barrier_init(u64* b, int count) { of(b) = {0, (unsigned)count, (unsigned)count, 0}; }
static void barriers_ready() {}
static void arrive(u64* b) { of(b).left--; settle(b); }
static void arrive_expecting(u64* b, int bytes) { of(b).left--; of(b).bytes += bytes; }
static void bulk_copy(void* to, const void* from, int bytes, u64* b) {
    if (((uintptr_t)to | (uintptr_t)from | bytes) & 15 || of(b).bytes < bytes) abort();
    memcpy(to, from, bytes);
    of(b).bytes -= bytes; settle(b);
}
static void wait(u64* b, int phase) { leave_until([&] { return (int)of(b).phase != phase; }); }
static void pdl_launch_dependents() {}
static void pdl_wait() {}
static uint32_t address_of(const void* p) { return (unsigned char*)p - (unsigned char*)shared; }
static u64 described(uint32_t address) { if (address & 1023) abort(); return address >> 4; }
static void wgmma_fence() {}
static void wgmma_commit() {}
template<int LEFT> static void wgmma_wait() {}
// d (64 x N) += a (64 x 16, a warp has 16 rows as `mma` takes them) * x (16 x N): 128 bytes a column of x, 16-byte chunks exchanged as the hardware does it
template<int N> static void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], u64 x) {
    Warp& w = warp_of();
    const int lane = lane_of();
    memcpy(w.a[lane], a, 16);
    __syncwarp();
    double rows[2][16];
    for (int r = 0; r < 2; r++) for (int k = 0; k < 16; k++) rows[r][k] = half_bits(w.a[lane / 4 * 4 + k % 8 / 2][r + k / 8 * 2] >> 16 * (k & 1) & 65535);
    for (int i = 0; i < N / 8; i++) for (int c = 0; c < 2; c++) {
        double sum[2] = {d[4 * i + c], d[4 * i + 2 + c]};
        for (int k = 0; k < 16; k++) {
            const uint32_t at = 16 * (uint32_t)x + (8 * i + 2 * (lane & 3) + c) * 128 + 2 * k;
            const double v = half_bits(*(uint16_t*)((unsigned char*)shared + (at ^ (at >> 7 & 7) << 4)));
            sum[0] += rows[0][k] * v; sum[1] += rows[1][k] * v;
        }
        d[4 * i + c] = sum[0]; d[4 * i + 2 + c] = sum[1];
    }
    __syncwarp();
}
'''
MORE = r'''
#define fmaf fmaf_
template<class T> static T __shfl_sync(unsigned, T v, int lane, int width) { return from_lane(v, lane_of() / width * width + lane); }
'''
TILES = [(64, 1, 4, 3, 1, 1), (128, 2, 1, 6, 1, 4), (64, 1, 2, 3, 2, 1), (128, 1, 2, 3, 1, 1), (128, 2, 1, 6, 1, 2), (256, 2, 1, 3, 1, 1), (64, 2, 1, 6, 2, 1)]


def source(file):
    "gemm_wgmma.cu or expert_wgmma.cu with all it includes, without PTX"
    text = lambda name: re.sub(r'#include .*', '', read_source(name))
    blocks = re.sub(r'.*(cvt\.f32\.f16|sub\.f16x2).*\n', '', text('blocks'))
    kernel = re.sub(r'__shared__ (u64|u16) (barriers|order)', r'static \1 \2', text(file))
    whole = '\n'.join((blocks, text('lane_fragment'), text('swiglu'), plain_slab(text('wgmma_mainloop')), kernel))
    assert 'asm' not in whole, 'the source has changed'
    return whole


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    if not shutil.which('g++'): pytest.skip('needs g++ to run device code on the CPU')
    made = {}
    def build(file, name, defines, threads, change):
        if (name, defines, change) not in made:
            whole = source(file)
            if change[0]: assert whole.count(change[0]) == 1, 'the source has changed'; whole = whole.replace(*change)
            fibers = FIBERS[:FIBERS.index("// A barrier's word")] + BARRIERS + FIBERS[FIBERS.index('static void entry()'):]
            fibers = re.sub(r'struct float2.*\nstruct float4.*\n', '', fibers)                     # `HALVES` has them, and the halves
            fibers = re.sub(r'static uint32_t to_half_bits[^}]*\}\n', '', fibers)
            fibers = re.sub(r'static uint32_t pack_half2.*\n', '', fibers)
            fibers = fibers.replace('if (turns < asleep', 'if (f.index.x > 127 && turns % 4 || turns < asleep') # one warpgroup is ahead of the others
            fibers = fibers.replace('alignas(16) unsigned char shared[256 << 10]', 'alignas(1024) unsigned short shared[128 << 10]').replace('256', str(threads)).replace('warps[8]', 'warps[16]')
            text = '\n'.join(f'#define {d.replace("=", " ")}' for d in (*defines, '__CUDA_ARCH_FEAT_SM90_ALL=1')) + THREADS + HALVES + fibers + MORE + whole + RUN + f'RUN({name})'
            made[name, defines, change] = compiled(tmp_path_factory, text)
        return made[name, defines, change]
    return build


@pytest.fixture
def on_cpu(library, monkeypatch):
    "Launches go to the CPU, with the tile and the mistake that are asked for"
    state = SimpleNamespace(tile=None, change=('', ''))
    def take(launched):
        assert launched.shared_mem <= 224 << 10
        assert not launched.on(library(launched.file, launched.name, launched.defines, launched.block[0], state.change)), 'the kernel hangs'
    take_launches(monkeypatch, take)
    monkeypatch.setattr(wgmma, 'tile', lambda *a: state.tile)
    return state


def weights(rng, t, n_out, n_in):
    blocks = random_blocks(t, n_out, n_in, rng)
    return QTensor(t, (n_out, n_in), Array(to_planes(blocks, t)), 'w', Array(tops(blocks, t))), as_hopper(blocks, t).astype(np.float64)


def activations(rng, rows, n_in):
    "Halves as `to_half` leaves them, and what they stand for"
    h = halves(rows, n_in)
    x = (rng.standard_normal((rows, n_in))*3000).astype(np.float16)
    h.half.a[:] = 0x7E00                                                    # NaNs where nobody should look
    lie = h.half.a.reshape(-1, h.padded_rows, 8, 8)                                # span, row, place, half
    whole = np.zeros((rows, h.ld), np.float16)
    whole[:, :n_in] = x
    for r in range(rows):
        for c in range(8): lie[:, r, c ^ (r & 7)] = whole[r].view(np.uint16).reshape(-1, 4, 8, 2)[:, c//2, :, c & 1]
    h.inv.a[:rows] = np.exp2(rng.integers(-14, -8, rows))
    h.ready = True
    return h, x.astype(np.float64)*h.inv.a[:rows, None]


def product(state, tile, jobs, h, residual=None):
    "Results of all matrices of a launch"
    state.tile, outs = tile, [Array(np.full((h.rows, W.shape[0]), np.nan, np.float32)) for W, _ in jobs]
    wgmma.gemms([(W, out, bias) for (W, bias), out in zip(jobs, outs)], h, residual)
    return [out.a for out in outs]


@pytest.mark.parametrize('t, n_in', [(GGMLType.Q5_0, 896), (GGMLType.Q4_0, 1248), (GGMLType.Q4_K, 768), (GGMLType.Q6_K, 1280), (GGMLType.MXFP4, 160), (GGMLType.Q8_0, 256)], ids=str)
def test_every_tile(on_cpu, t, n_in):
    "Tokens and rows that do not fill a tile; tiles that deal the columns to as many parts give the same bits, at once or in turns"
    rng, rows, n_out = np.random.default_rng(n_in), 70, 150
    (W, w), (h, x) = weights(rng, t, n_out, n_in), activations(rng, rows, n_in)
    bias, old, seen = floats(rng, n_out), floats(rng, rows, n_out), {}
    for tile in TILES:
        y, = product(on_cpu, tile, [(W, Array(bias))], h, Array(old))
        exact = x @ w.T + bias + old
        assert np.abs(y - exact).max() < 3e-6*np.sqrt((x**2).sum(1).max()*(w**2).sum(1).max()), tile
        parts = tile[2]*tile[5]
        assert np.array_equal(y, seen.setdefault(parts, y)), tile
    assert sorted(seen) == [1, 2, 4]


def test_matrices_of_two_types(on_cpu):
    rng = np.random.default_rng(0)
    h, x = activations(rng, 40, 512)
    made = [weights(rng, t, n, 512) for t, n in ((GGMLType.Q5_0, 70), (GGMLType.Q8_0, 20), (GGMLType.Q5_0, 64))]
    biases = [floats(rng, W.shape[0]) for W, _ in made]
    for tile in ((64, 1, 2, 3, 2, 1), (128, 2, 1, 6, 1, 2)):
        for y, (W, w), b in zip(product(on_cpu, tile, [(W, Array(b)) for (W, _), b in zip(made, biases)], h), made, biases):
            assert np.abs(y - (x @ w.T + b)).max() < 3e-6*np.sqrt((x**2).sum(1).max()*(w**2).sum(1).max())


def check_gated(out, rows, g, u, clamped, first=0):
    "`rows` rows of halves from `first` on, written by a launch, against float64; columns beyond the matrix are zero"
    got, n = columns(out, first + rows)[first:].astype(np.float64), g.shape[1]
    if clamped: g, u = np.minimum(g, 7), np.clip(u, -7, 7) + 1
    want = g/(1 + np.exp(np.minimum(-(1.702 if clamped else 1)*g, 700)))*u
    assert (got[:, n:] == 0).all() and (out.inv.a[first:first + rows] == (1/256 if clamped else 8)).all()
    assert np.abs(got[:, :n]*out.inv.a[first] - want).max() < 2**-10*np.abs(want).max()


@pytest.mark.parametrize('tile', [(256, 2, 1, 3, 1, 1), (64, 2, 1, 6, 2, 1)], ids=str)
def test_gate_and_up(on_cpu, tile):
    "Two matrices, and the two halves of one; biases; rows and tokens that do not fill a tile"
    rng, rows, n_out, n_in = np.random.default_rng(0), 70, 80, 256
    (W, w), (h, x), on_cpu.tile = weights(rng, GGMLType.Q5_0, 2*n_out, n_in), activations(rng, rows, n_in), tile
    bias, out = floats(rng, 2*n_out), halves(rows, n_out)
    g, u = np.split(x @ w.T + bias, 2, 1)
    wgmma.gated(wgmma.Rows(W, 0, n_out), wgmma.Rows(W, n_out), h, out, Array(bias[:n_out]), Array(bias[n_out:]))
    check_gated(out, rows, g, u, clamped=False)
    assert out.ready
    (V, v), out = weights(rng, GGMLType.Q5_0, 2*n_out, n_in), halves(rows, 2*n_out)
    wgmma.gated(W, V, h, out)
    check_gated(out, rows, x @ w.T, x @ v.T, clamped=False)


@pytest.mark.parametrize('t', [GGMLType.MXFP4, GGMLType.Q8_0], ids=str)
def test_experts(on_cpu, t):
    "Experts with no, few and many tokens, which are filled up to a multiple of 8: each takes the kernel for 32, 64, 96 or 128 of them"
    rng, counts, n_out, n_in = np.random.default_rng(0), [5, 0, 40, 130, 70], 100, 160
    n, n_slots = len(counts), sum(counts)
    offset, order, at = np.cumsum([0, *(-(-c//8)*8 for c in counts)]).astype(np.int32), rng.permutation(n_slots).astype(np.int32), 0
    slots = np.full(wgmma.Groups.room(n_slots, n), -1, np.int32)
    for e, c in enumerate(counts): slots[offset[e]:offset[e] + c] = order[at:at + c]; at += c
    groups = SimpleNamespace(n_slots=n_slots, n_expert=n, positions=len(slots), ids=order, offset=Array(offset), slots=Array(slots), tiles=n_slots//128 + n)
    h, x = activations(rng, len(slots), n_in)
    made = []
    for _ in range(2):
        blocks = random_blocks(t, n*n_out, n_in, rng)
        made.append((QTensor(t, (n, n_out, n_in), Array(to_planes(blocks, t, n_out)), 'w', Array(tops(blocks, t))), as_hopper(blocks, t).astype(np.float64).reshape(n, n_out, n_in), floats(rng, n, n_out)))
    (W, w, b), (V, v, c) = made
    out, half = Array(np.full((n_slots, n_out), np.nan, np.float32)), halves(len(slots), n_out)
    assert wgmma.experts(W, h, groups, out, Array(b)) is out
    assert wgmma.experts_gated(W, V, h, groups, half, Array(b), Array(c)) is half and half.ready
    for e, count in enumerate(counts):
        at = slice(offset[e], offset[e] + count)
        g, u = x[at] @ w[e].T + b[e], x[at] @ v[e].T + c[e]
        if not count: continue
        assert np.abs(out.a[slots[at]] - g).max() < 3e-6*np.sqrt((x[at]**2).sum(1).max()*(w[e]**2).sum(1).max())
        check_gated(half, count, g, u, clamped=True, first=offset[e])


@pytest.mark.parametrize('tile, change', [
    ((128, 2, 1, 6, 1, 2), ('total[Q > 1 ? i : 0] + acc[i];\n}', 'acc[i];\n}')),            # the last part alone
    ((128, 2, 1, 6, 1, 4), ('until += size_of<Q>(++turn, groups)', 'until += size_of<Q>(turn++, groups)')),
    ((128, 2, 1, 6, 1, 4), ('at += size_of<P>(part, groups)', 'at += size_of<P>(0, groups)')),
    ((128, 2, 1, 6, 1, 2), ('acc[i]; acc[i] = 0;', 'acc[i];')),
    ((64, 2, 1, 6, 2, 1), ('wait(s.empty + last, last_phase); ', ''))], ids=lambda c: str(c[0])[:12])
def test_mistakes_are_seen(on_cpu, tile, change):
    rng = np.random.default_rng(1)
    (W, _), (h, _) = weights(rng, GGMLType.Q5_0, 130, 1664), activations(rng, 130, 1664)     # 13 groups: the last unit has one
    want, = product(on_cpu, (64, 1, 4, 3, 1, 1) if tile[5] == 4 else (64, 1, 2, 3, 2, 1) if tile[5] == 2 else (256, 2, 1, 3, 1, 1), [(W, None)], h)
    on_cpu.change = change
    try: got, = product(on_cpu, tile, [(W, None)], h)
    except AssertionError as e: assert 'hangs' in str(e)
    else: assert not np.array_equal(got, want)


@pytest.mark.parametrize('test, of, change', [(test_gate_and_up, (64, 2, 1, 6, 2, 1), ('first = a.first[s.r]', 'first = a.first[0]')),
    (test_experts, GGMLType.MXFP4, ('up ? a.bias[1] : a.bias[0]', 'a.bias[0]'))], ids=['gate', 'experts'])
def test_mistakes_in_one_of_two_matrices_are_seen(on_cpu, test, of, change):
    on_cpu.change = change
    with pytest.raises(AssertionError) as error: test(on_cpu, of)
    assert 'the source has changed' not in str(error.value)
