"""The kernel of a decode step, gemv.cu, run on the CPU by its own launcher: lanes are fibers that meet at every shuffle, matrix instruction and barrier.
A bulk copy is there at once, so that whoever asks for a piece too early destroys what others still read."""
import re, shutil
from types import SimpleNamespace
import numpy as np, pytest
from orcd.kernels import gemv
from orcd.files.blocks import GGMLType, dequantize
from orcd.kernels.nvrtc import QTensor, read_source
from orcd.kernels.weight_layout import random_blocks, to_planes
from launched import RUN, take_launches
from test_blocks_cuda import SHIM, compiled, placed

# `SHIM` for blocks of many threads
THREADS = re.sub(r'static struct \{ int x, z; \}.*\n', '', SHIM.replace('#define __launch_bounds__(n)', '#define __launch_bounds__(...)')
    .replace('#include <cstring>', '#include <cstring>\n#include <cstdlib>\n#include <algorithm>\n#include <vector>'))
TYPES = [t for t in GGMLType if t.block_size > 1]
FIBERS = r'''
#include <cmath>
#include <csetjmp>
#include <functional>
#include <ucontext.h>
#define __CUDA_ARCH__ 900
#define __shared__
#define __align__(n)
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Index { int x, y, z; };
struct Group { int arrived; unsigned turn; };
struct Fiber { ucontext_t context; jmp_buf at; Index index; bool begun, done; };
struct Warp : Group { uint32_t a[32][4], b[32][2], slot[32]; };
static Fiber fibers[256], *now;
static Warp warps[8];
static Group block;
static long turns, moved, asleep[16];        // `moved`: the turn in which something happened
static jmp_buf scheduler;
static Index blockIdx, blockDim = {256, 1, 1};
static std::function<void()> body;
static char stacks[256][1 << 16];
alignas(16) unsigned char shared[256 << 10];
#define threadIdx now->index
// Long jumps between lanes, since a change of contexts would ask the operating system every time
static __attribute__((noinline)) void leave() { if (!_setjmp(now->at)) _longjmp(scheduler, 1); }
static __attribute__((noinline)) void go_on(Fiber& f) {
    now = &f;
    if (_setjmp(scheduler)) return;
    if (f.begun) _longjmp(f.at, 1);
    f.begun = true; setcontext(&f.context);
}
template<class F> static void leave_until(F f) { while (!f()) leave(); moved = turns; }
static void meet(Group& g, int n) {
    const unsigned turn = g.turn;
    if (++g.arrived == n) {
        g.arrived = 0; g.turn++;
        if (n == 256) for (int w = 0; w < 16; w++) if (rand() & 1) asleep[w] = turns + 1500;     // after a barrier some warps go on late
    }
    leave_until([&] { return g.turn != turn; });
}
static Warp& warp_of() { return warps[now->index.x / 32]; }
static int lane_of() { return now->index.x & 31; }
static void __syncthreads() { meet(block, 256); }
static void __syncwarp() { meet(warp_of(), 32); }
template<class T> static T from_lane(T v, int lane) {
    T r;
    memcpy(&warp_of().slot[lane_of()], &v, 4); __syncwarp();
    memcpy(&r, &warp_of().slot[lane & 31], 4); __syncwarp();
    return r;
}
template<class T> static T __shfl_xor_sync(unsigned, T v, int d) { return from_lane(v, lane_of() ^ d); }
template<class T> static T __shfl_sync(unsigned, T v, int lane) { return from_lane(v, lane); }
static unsigned __reduce_max_sync(unsigned, unsigned v) { for (int d = 16; d; d >>= 1) v = std::max(v, __shfl_xor_sync(0, v, d)); return v; }
static uint32_t __float_as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static float __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; }
static float rsqrtf(float x) { return 1 / std::sqrt(x); }
static float __fdividef(float a, float b) { return a / b; }
#define __expf(x) std::exp(x)
static uint32_t to_half_bits(float x) {
    if (x == 0) return 0;
    const int e = std::max(std::ilogb(x), -14);
    const double n = std::nearbyint(std::ldexp(std::fabs((double)x), 10 - e));
    return (x < 0 ? 0x8000 : 0) | (n < 1024 ? (uint32_t)n : (uint32_t)((e + 15) << 10) + (uint32_t)n - 1024);
}
static uint32_t pack_half2(float lo, float hi) { return to_half_bits(lo) | to_half_bits(hi) << 16; }
// c (16x8) += a (16x16) * b (16x8): where lane 4 g + t has its elements
static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Warp& w = warp_of();
    const int lane = lane_of();
    memcpy(w.a[lane], a, 16); w.b[lane][0] = b0; w.b[lane][1] = b1;
    __syncwarp();
    for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane & 3) + (e & 1);
        double sum = c[e];
        for (int k = 0; k < 16; k++) {
            const uint32_t x = w.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], y = w.b[column * 4 + k % 8 / 2][k / 8];
            sum += (double)half_bits(x >> 16 * (k & 1) & 65535) * half_bits(y >> 16 * (k & 1) & 65535);
        }
        c[e] = sum;
    }
    __syncwarp();
}
static std::vector<std::pair<unsigned long long*, int>> reading;       // barriers of pieces that a thread has waited for, without a fence since
static bool overtaken;                                  // a copy into a piece that a thread may still be reading: nothing but the thread's fence orders the two
// A barrier's word: its phase, and whether bytes are still to come
typedef unsigned long long u64;
static void barrier_init(u64* b, int) { *b = 0; }
static void barriers_ready() {}
static void fence_async() { reading.erase(std::remove_if(reading.begin(), reading.end(), [](auto& r) { return r.second == now->index.x; }), reading.end()); }
static void arrive_expecting(u64* b, int bytes) { *b |= (u64)bytes << 1; }
static void bulk_copy_once(void* to, const void* from, int bytes, u64* b) {
    if (((uintptr_t)to | (uintptr_t)from | bytes) & 15 || *b >> 1 != (u64)bytes) abort();
    for (auto& r : reading) overtaken |= r.first == b;
    memcpy(to, from, bytes);
    *b = ~*b & 1;
}
static void wait(u64* b, int phase) {
    leave_until([&] { return (*b & 1) != (u64)phase; });
    reading.push_back({b, now->index.x});
}
static void pdl_launch_dependents() {}
static void pdl_wait() {}
static void entry() { body(); now->done = true; moved = turns; leave(); }
static int run_block() {        // 0; 1 when nobody gets on; 2 when a copy overtook a read
    block = {}; reading.clear(); overtaken = false;
    memset(warps, 0, sizeof warps);
    memset(shared, 0xFF, sizeof shared);
    for (int i = 0; i < 256; i++) {
        fibers[i].index = {i, 0, 0}; fibers[i].begun = fibers[i].done = false;
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = stacks[i]; fibers[i].context.uc_stack.ss_size = sizeof stacks[i]; fibers[i].context.uc_link = nullptr;
        makecontext(&fibers[i].context, entry, 0);
    }
    memset(asleep, 0, sizeof asleep);
    long looked = 0;
    for (turns = moved = 0; turns < moved + 5000; turns++) {         // nobody is late for longer
        bool left = false;
        for (auto& f : fibers) if (!f.done) {
            left = true;
            if (turns < asleep[f.index.x / 32]) continue;
            go_on(f);
        }
        if (!left) return overtaken ? 2 : 0;
        if (turns > std::max(moved, looked) + 4) {             // all wait for those who are late: their time has come
            long next = moved + 5000;
            for (long late : asleep) if (late > turns && late < next) next = late;
            looked = next; turns = next - 1;
        }
    }
    return 1;
}
'''
ALL = "#define ALL(name) RUN(gemv_##name) RUN(gated_##name) RUN(mix_##name)\n"


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    "gemv.cu of one type, or of two, for the CPU"
    if not shutil.which('g++'): pytest.skip('needs g++ to run device code on the CPU')
    made = {}
    text = lambda name: re.sub(r'#include .*', '', read_source(name))

    def build(defines, change=('', ''), arch=900):
        defines = tuple(d for d in defines if not d.startswith('RESIDENT'))
        if (defines, change, arch) not in made:
            blocks = re.sub(r'.*(cvt\.f32\.f16|sub\.f16x2).*\n', '', text('blocks'))
            source = text('input_prologue')
            source = source[:source.index('// Programmatic dependent launch')] + source[source.index('// 1 / root mean square'):]
            parts = [blocks, text('reduce'), text('lane_fragment'), source, text('swiglu'), text('bulk_pipeline'), text('topk_router'), text('gemv')]
            names = [d.split('=')[1] for d in defines if d.startswith('ONLY_NAME')]
            whole = '\n'.join(parts)
            assert 'asm' not in whole, 'the source has changed'
            if change[0]: assert whole.count(change[0]) == 1, 'the source has changed'; whole = whole.replace(*change)
            run = 'RUN(gemv_mixed)' if names == ['mixed'] else f'ALL({names[0]})'
            text_of = '\n'.join(f'#define {d.replace("=", " ")}' for d in defines) + THREADS + FIBERS.replace('900', str(arch)) + whole + RUN + ALL + run
            made[defines, change, arch] = compiled(tmp_path_factory, text_of)
        return made[defines, change, arch]
    return build


class Array:
    "A NumPy array with as much of CuPy's as launchers want; slices are views"
    def __init__(self, a):
        a = np.asarray(a)
        self.a = placed(np.ascontiguousarray(a).reshape(-1).view(np.uint8)).view(a.dtype).reshape(a.shape)
    @property
    def data(self): return SimpleNamespace(ptr=self.a.ctypes.data)
    def __getattr__(self, name): return getattr(self.a, name)
    def __getitem__(self, i):
        part = object.__new__(Array)
        part.a = self.a[i]
        return part


@pytest.fixture
def on_cpu(library, monkeypatch):
    "Launches of gemv go to the CPU; `shapes` keeps kernel, grid and shared memory of each"
    state = SimpleNamespace(shapes=[], change=['', ''], arch=900)
    monkeypatch.setattr(gemv, 'current_limits', lambda: (227 << 10, True) if state.arch >= 900 else (64 << 10, False))
    def take(l):
        state.shapes.append((l.name, l.grid, l.shared_mem))
        assert l.block == (256,) and l.shared_mem <= 227 << 10
        wrong = l.on(library(l.defines, tuple(state.change), state.arch))
        assert not wrong, ('', 'the kernel hangs', 'a copy overtakes a read')[wrong]
    state.take = take
    take_launches(monkeypatch, take)
    return state


def tensor(blocks, t, shape): return QTensor(t, shape, Array(to_planes(blocks, t, shape[-2])))

def floats(rng, *shape): return rng.standard_normal(shape).astype(np.float32)

def errors(out, y, size): return (abs(out.a - y)/size).max()


@pytest.mark.parametrize('t', TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize('n_out, k', [(5, 1), (70, 5)])
def test_product(on_cpu, t, n_out, k):
    "A norm before it, a bias and a residual after it; rows that end in the middle of a unit"
    rng, n_in = np.random.default_rng(k), k*max(t.block_size, 32)
    blocks, x, w, bias, old = random_blocks(t, n_out, n_in, rng), floats(rng, 2, n_in), floats(rng, n_in), floats(rng, n_out), floats(rng, 2, n_out)
    W, out = tensor(blocks, t, (n_out, n_in)), Array(np.full((2, n_out), np.nan, np.float32))
    y, size = gemv.product64(blocks, t, x)
    gemv.gemv(W, Array(x), out)
    assert errors(out, y, size) < 1e-5
    v = x.astype(float)*w/np.sqrt((x.astype(float)**2).mean(1, keepdims=True) + 1e-6)
    y, size = gemv.product64(blocks, t, v)
    gemv.gemv(W, gemv.Normed(Array(x), Array(w), 1e-6), out, Array(bias), Array(old))
    assert errors(out, y + bias + old, size + abs(bias) + abs(old)) < 1e-5


@pytest.mark.parametrize('t, n_out, n_in, parts', [('Q4_K', 300, 1280, 1), ('Q6_K', 40, 4608, 8), ('MXFP4', 150, 1376, 2), ('Q8_0', 70, 1376, 4)])
def test_rings_go_round(on_cpu, monkeypatch, t, n_out, n_in, parts):
    "Several tiles a warp, several pieces a tile, few places in a ring"
    t, rng = GGMLType[t], np.random.default_rng(0)
    monkeypatch.setattr(gemv, 'partition_rows', lambda *a: (parts, [2]))
    blocks, x = random_blocks(t, n_out, n_in, rng), floats(rng, 1, n_in)
    y, size = gemv.product64(blocks, t, x)
    for depth, span in ((2, 1), (3, 2), (2, 4)):
        monkeypatch.setattr(gemv, 'pieces', lambda *a: (depth, span, 0))
        out = Array(np.full((1, n_out), np.nan, np.float32))
        gemv.gemv(tensor(blocks, t, (n_out, n_in)), Array(x), out)
        assert errors(out, y, size) < 1e-5


@pytest.mark.parametrize('t, n_out, n_in', [('Q4_K', 40, 2304), ('MXFP4', 40, 1376), ('Q5_0', 200, 160)])
def test_older_cards(on_cpu, t, n_out, n_in):
    "No rings: weights are read where they lie"
    t, rng, on_cpu.arch = GGMLType[t], np.random.default_rng(0), 800
    blocks, x = random_blocks(t, n_out, n_in, rng), floats(rng, 1, n_in)
    out = Array(np.full((1, n_out), np.nan, np.float32))
    gemv.gemv(tensor(blocks, t, (n_out, n_in)), Array(x), out)
    assert errors(out, *gemv.product64(blocks, t, x)) < 1e-5 and on_cpu.shapes[0][2] == gemv.fixed_bytes(n_in)


def test_matrices_of_two_types(on_cpu):
    rng, n_in, jobs, want = np.random.default_rng(0), 896, [], []
    x = floats(rng, 1, n_in)
    for name, n in (('Q5_0', 64), ('Q5_0', 20), ('Q8_0', 33)):
        t = GGMLType[name]
        blocks = random_blocks(t, n, n_in, rng)
        jobs.append((tensor(blocks, t, (n, n_in)), Array(np.full((1, n), np.nan, np.float32)), None)); want.append(gemv.product64(blocks, t, x))
    gemv.gemvs(jobs, Array(x))
    assert len(on_cpu.shapes) == 1 and max(errors(out, *w) for (_, out, _), w in zip(jobs, want)) < 1e-5


@pytest.mark.parametrize('t', [GGMLType.Q4_K, GGMLType.Q5_0, GGMLType.MXFP4], ids=lambda t: t.name)
@pytest.mark.parametrize('clamped', [False, True])
def test_gate_and_up(on_cpu, t, clamped):
    rng, n_out, n_in = np.random.default_rng(0), 50, 768
    b, x, bias = random_blocks(t, 2*n_out, n_in, rng), floats(rng, 1, n_in)*np.float32(.1), floats(rng, 2*n_out)
    out = Array(np.full((1, n_out), np.nan, np.float32))
    gemv.gated(*((tensor(b[i:i + n_out], t, (n_out, n_in)), Array(bias[i:i + n_out])) for i in (0, n_out)), Array(x), out, clamped)
    y, size = gemv.product64(b, t, x)
    (g, u), (sg, su) = (y[0, :n_out] + bias[:n_out], y[0, n_out:] + bias[n_out:]), (size[0, :n_out] + 1, size[0, n_out:] + 1)
    if clamped: g, u = np.minimum(g, 7), np.clip(u, -7, 7) + 1
    a = g/(1 + np.exp(-(1.702 if clamped else 1)*g))
    assert (abs(out.a[0] - a*u) <= 2e-5*(sg*abs(u) + su*abs(a)) + 1e-6).all()


def experts(rng, E, k):
    "A router's logits, two equal, and what they choose"
    logits = floats(rng, 1, E)
    logits[0, 5] = logits[0, 2] = 3
    best = np.argsort(-logits[0], kind='stable')[:k]
    p = np.exp(logits[0, best].astype(float) - logits.max())
    return logits, best, p/p.sum()


@pytest.mark.parametrize('n_out, n_in, k', [(40, 96, 4), (33, 416, 4), (48, 64, 2), (32, 32, 1)])
def test_experts(on_cpu, n_out, n_in, k):
    "gpt-oss's feed-forward for one token: the kernels choose the experts"
    t, rng, E = GGMLType.MXFP4, np.random.default_rng(0), 8
    logits, best, p = experts(rng, E, k)
    blocks, bias = [random_blocks(t, E*n, m, rng) for n, m in ((n_out, n_in), (n_out, n_in), (n_in, n_out//32*32 or 32))], floats(rng, 2, E, n_out)
    x = floats(rng, 1, n_in)*np.float32(.02)
    out, choice = Array(np.full((k, n_out), np.nan, np.float32)), gemv.Choice(Array(logits), k)
    gemv.gated(*((tensor(b, t, (E, n_out, n_in)), Array(c)) for b, c in zip(blocks[:2], bias)), Array(x), out, True, choice)
    for r, e in enumerate(best):
        g, u = (dequantize(b, t).astype(float).reshape(E, n_out, n_in)[e] @ x[0] + c[e] for b, c in zip(blocks[:2], bias))
        g = np.minimum(g, 7)
        assert abs(out.a[r] - g/(1 + np.exp(-1.702*g))*(np.clip(u, -7, 7) + 1)).max() < 1e-4
    m = n_out//32*32
    y, old, c = floats(rng, k, m), floats(rng, 1, n_in), floats(rng, E, n_in)
    out = Array(old)
    gemv.mixed(tensor(blocks[2], t, (E, n_in, m)), Array(y), out, Array(c), out, choice)
    w = dequantize(blocks[2], t).astype(float).reshape(E, n_in, m)
    want = old[0] + sum(q*(w[e] @ y[r] + c[e]) for r, (e, q) in enumerate(zip(best, p)))
    assert abs(out.a[0] - want).max() < 1e-4*max(1, abs(want).max())


@pytest.mark.parametrize('old, new', [('if (!ASK_FIRST && unit + 1 == stop) { ring.done(); ask(); }', 'if (unit == begin) ask();'),       # before all lanes have read
    ('        fence_async();\n', ''),                          # reads and the copies that follow them in no order
    ('        __syncwarp();\n#endif\n    }\n    // Ask for the next piece', '#endif\n    }\n    // Ask for the next piece'),     # the other lanes' reads
    ('turn ^= 1;', ''),                                       # sums of a tile where others still read those of the last one
    ('scale += 4 * LaneFragment<T>::GROUPS;', ''), ('begin = part * units / parts', 'begin = part * units / parts + (part > 0)')])
def test_mistakes_are_seen(on_cpu, monkeypatch, old, new):
    t, rng, n_out, n_in = GGMLType.Q4_0, np.random.default_rng(0), 300, 1280
    monkeypatch.setattr(gemv, 'partition_rows', lambda *a: (2, [2]))
    monkeypatch.setattr(gemv, 'pieces', lambda *a: (2, 2, 0))
    on_cpu.change[:] = old, new
    blocks, x = random_blocks(t, n_out, n_in, rng), floats(rng, 1, n_in)
    y, size = gemv.product64(blocks, t, x)
    out = Array(np.full((1, n_out), np.nan, np.float32))
    try: gemv.gemv(tensor(blocks, t, (n_out, n_in)), Array(x), out)
    except AssertionError as e: assert 'hangs' in str(e) or 'overtakes' in str(e)
    else: assert not errors(out, y, size) < 1e-5
