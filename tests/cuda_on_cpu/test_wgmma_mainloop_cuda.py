"The weights that Hopper's tensor cores are given, made on the CPU by the kernel's own source: those of the NumPy oracle, and near the exact ones"
import re, shutil
from types import SimpleNamespace
import numpy as np, pytest
from orcd.files.blocks import GGMLType, dequantize
from orcd.kernels import wgmma
from orcd.kernels.nvrtc import QTensor, read_source
from orcd.kernels.weight_layout import random_blocks, to_planes
from rounded import as_hopper
from launched import take_launches
from test_blocks_cuda import SHIM, compiled, placed, pointer

# What lane_fragment.cu and wgmma_mainloop.cu need beyond that; halves are rounded from double, once
HALVES = r'''
#include <cmath>
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static float fmaf_(float a, float b, float c) { return std::fma(a, b, c); }
static uint32_t rounded_half(double x) {
    if (x == 0) return 0;
    const int e = std::max(std::ilogb(x), -14);
    const double n = std::nearbyint(std::ldexp(std::fabs(x), 10 - e));          // in units of the last place
    return (x < 0 ? 0x8000 : 0) | (n < 1024 ? (uint32_t)n : (uint32_t)((e + 15) << 10) + (uint32_t)n - 1024);
}
static double low(uint32_t v) { return half_bits(v & 65535); }
static double high(uint32_t v) { return half_bits(v >> 16); }
static uint32_t to_half_bits(float x) { return rounded_half(x); }
static uint32_t pack_half2(float lo, float hi) { return rounded_half(lo) | rounded_half(hi) << 16; }
static uint32_t times(uint32_t a, uint32_t b) { return rounded_half(low(a) * low(b)) | rounded_half(high(a) * high(b)) << 16; }
static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) { return rounded_half(low(a) * low(b) + low(c)) | rounded_half(high(a) * high(b) + high(c)) << 16; }
'''
# All lanes of a warp, one after the other; a lane's scales come from the lane of its four that has them
CALLS = r'''
template<int T> void slab(const u8* w, const u8* top, float* y, int rows, int n) {
    const Planes<T> p(w, n);
    const Masks c(pair_bits<T>());
    for (int tile = 0; 16 * tile < rows; tile++) for (int unit = 0; unit < p.units(); unit++) {
        LaneFragment<T> b[32];
        for (int lane = 0; lane < 32; lane++) b[lane].load(p.at(tile, unit), p.left(unit), lane);
        for (int lane = 0; lane < 32; lane++) for (int g = 0; g < LaneFragment<T>::GROUPS; g++) for (int e = 0; e < 2; e++) for (int j = 0; j < 4; j++) {
            const int row = 16 * tile + 8 * e + lane / 4, at = (is_k<T>() ? 256 : 128) * unit + 128 * g + 32 * j + 4 * (lane & 3);
            if (row >= rows || at >= n) continue;
            const ScaleShift<T> lift = {top[row]};
            u32 v[4];
            weights<T>(v, b[lane], c, g, e, j, lift.halves(b[lane / 4 * 4 + j], g, e, j));
            for (int r = 0; r < 4; r++) for (int k = 0; k < 2; k++)
                y[(long)row * n + at + 16 * (r / 2) + (r & 1) + 2 * k] = half_bits(k ? v[r] >> 16 : v[r] & 65535) * lift.factor();
        }
    }
}
#define CALL(name, T) extern "C" void slab_##name(const u8* w, const u8* top, float* y, int rows, int n) { slab<T>(w, top, y, rows, n); }
EACH_QUANT(CALL)
#define TOPS(name, T) extern "C" int run_row_max_exponent_##name(int blocks, int, int, const void* args) { \
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) \
        for (threadIdx.x = 0; threadIdx.x < 256; threadIdx.x += 32) row_max_exponent_##name(*(const BatchedLaunch<Rows>*)args); \
    return 0; }
EACH_QUANT(TOPS)
'''


def plain_slab(slab):
    "wgmma_mainloop.cu without its PTX"
    slab = re.sub(r'.*u32 times\(.*\n', '', slab)
    slab = re.sub(r'u32 h;\s*asm\("cvt\.rn\.f16x2\.f32 .*?"f"\((\w+)\), "f"\((\w+)\)\);\s*return h;', r'return pack_half2(\2, \1);', slab)
    slab, n = re.subn(r'asm\("fma\.rn\.f16x2 .*?" : "=r"\((.*?)\) : "r"\((.*)\), "r"\((.*)\), "r"\((.*)\)\);', r'\1 = fma2(\2, \3, \4);', slab)
    assert n == 1, 'the source has changed'
    return slab


def device_source():
    "The sources without their PTX, which the shim has in C"
    blocks = re.sub(r'.*(cvt\.f32\.f16|sub\.f16x2).*\n', '', read_source('blocks'))
    share = re.sub(r'#include .*', '', read_source('lane_fragment'))
    slab = read_source('wgmma_mainloop')
    slab = plain_slab(slab[slab.index('template<int T> struct ScaleShift'):slab.index('// D stages of 128 columns')])
    assert 'asm' not in slab + share, 'the source has changed'
    tops, n = re.subn(r'for \(int o = 16; .*|#include .*', '', read_source('row_max_exponent'))   # one lane looks at all blocks
    assert tops.count('b += 32') == 1
    return blocks + share.replace('fmaf(', 'fmaf_(') + slab + read_source('batched_launch') + tops.replace('b += 32', 'b++')


@pytest.fixture(scope='module')
def build(tmp_path_factory):
    "Compile (with one mistake) into a shared library"
    if not shutil.which('g++'): pytest.skip('needs g++ to run device code on the CPU')
    source = SHIM.replace('#include <cstring>', '#include <cstring>\n#include <algorithm>') + HALVES + device_source() + CALLS
    def make(old='', new=''):
        assert not old or source.count(old) == 1, 'the source has changed'
        return compiled(tmp_path_factory, source.replace(old, new) if old else source)
    return make


def tops(blocks, t):
    "What row_max_exponent.cu finds"
    b = blocks.view(t.dtype).reshape(len(blocks), -1)
    if t == GGMLType.MXFP4: return b['e'].max(1).astype(np.uint8)
    return np.maximum(1, np.max([(b[f].view(np.uint16).reshape(len(b), -1) >> 10 & 31).max(1) for f in {'d', 'm', 'dmin'} & set(b.dtype.names)], 0)).astype(np.uint8)


def made(lib, blocks, t):
    "Weights as the kernel makes them"
    rows, n = len(blocks), blocks.shape[1]//t.type_size*t.block_size
    w, top, y = placed(to_planes(blocks, t)), tops(blocks, t), np.full((rows, n), np.nan, np.float32)
    getattr(lib, f'slab_{t.name.lower()}')(pointer(w), pointer(top), pointer(y), rows, n)
    return y


@pytest.mark.parametrize('t', [t for t in GGMLType if t.block_size > 1], ids=lambda t: t.name)
def test_weights(build, t):
    lib, rng = build(), np.random.default_rng(0)
    for k in (1, 2, 3, 4, 7, 10):
        blocks = random_blocks(t, 21, k * t.block_size, rng)
        y, exact = made(lib, blocks, t), dequantize(blocks, t)
        assert np.linalg.norm(y - exact) < 5e-4*np.linalg.norm(exact)
        assert np.mean(y != as_hopper(blocks, t)) < 1e-3 # where the oracle finds a scale that is an ulp off


def test_tops(build, monkeypatch):
    "Stacks of 1, 3 and 21 matrices, whose last tile may have fewer than 16 rows, all found by one call"
    lib, rng, matrices, wanted = build(), np.random.default_rng(0), [], []
    class Array(np.ndarray): # as far as a launch looks at one
        data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))
    take_launches(monkeypatch, lambda launched: launched.on(lib))
    for t in (t for t in GGMLType if t.block_size > 1):
        for k, n_out in ((1, 21), (3, 7), (6, 1))*(30 if t.name == 'Q4_K' else 1):
            n, blocks = k*t.block_size, random_blocks(t, 21, k*t.block_size, rng)
            matrices.append(QTensor(t, (21//n_out, n_out, n), placed(to_planes(blocks, t, n_out)).view(Array), row_max_exponent=np.zeros(21, np.uint8).view(Array)))
            wanted.append(tops(blocks, t))
    wgmma.find_row_max_exponents(matrices)
    for W, want in zip(matrices, wanted): assert np.array_equal(W.row_max_exponent, want), W.type.name


def test_mistakes_are_seen(build):
    rng = np.random.default_rng(0)
    for name, old, new in (('MXFP4', '.5f * mxfp4_scale', '1.f * mxfp4_scale'), ('Q6_K', '0x80208020', '0x80108010'), ('Q5_0', '0x2C002C00', '0x30003000')):
        t = GGMLType[name]
        blocks = random_blocks(t, 21, 512, rng)
        exact = dequantize(blocks, t)
        assert not np.linalg.norm(made(build(old, new), blocks, t) - exact) < .01*np.linalg.norm(exact), name
