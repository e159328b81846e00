"The device code that unpacks blocks, compiled for the CPU with g++: bit-equal to the reference decoder, and a mistake is seen"
import ctypes, re, shutil, subprocess
import numpy as np, pytest
from orcd.blocks import GGMLType, dequantize
from orcd.k_gemv import random_blocks
from orcd.nvrtc import read_source

# As much of CUDA as blocks.cu needs
SHIM = r'''
#include <cstdint>
#include <cstring>
#define __device__
#define __forceinline__ inline
struct uint4 { uint32_t x, y, z, w; };
static uint32_t __funnelshift_rc(uint32_t lo, uint32_t hi, uint32_t s) {
    return s > 31 ? hi : (uint32_t)((((uint64_t)hi << 32) | lo) >> s);
}
static float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t s) {
    uint64_t v = ((uint64_t)y << 32) | x; uint32_t r = 0;
    for (int i = 0; i < 4; i++) r |= (uint32_t)((v >> 8 * ((s >> 4 * i) & 7)) & 255) << 8 * i;
    return r;
}
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float half_bits(uint32_t h) {
    uint32_t e = h >> 10 & 31, m = h & 1023; float s = h & 0x8000 ? -1.f : 1.f;
    return e ? s * __uint_as_float((e + 112) << 23 | m << 13) : s * m * 0x1p-24f;
}
'''
CALLS = r'''
#define CALL(name, T) \
    extern "C" void one_##name(const u8* w, float* y, int rows, int n) { \
        for (int r = 0; r < rows; r++) for (int i = 0; i < n; i++) y[(long)r * n + i] = dequant_one<T>(w + r * row_bytes<T>(n), i); } \
    extern "C" void eight_##name(const u8* w, float* y, int rows, int n) { \
        for (int r = 0; r < rows; r++) for (int s = 0; 64 * s < n; s++) for (int u = 0; u < 8; u++) { \
            int i = 64 * s + octet_start<T>(u); if (i >= n) continue; \
            Eight e = eight<T>(w + r * row_bytes<T>(n), s, u, n); \
            for (int j = 0; j < 4; j++) { int k = i + Type<T>::delta + j; \
                if (i + j < n) y[(long)r * n + i + j] = e.da * e.a[j] + e.ma; \
                if (k < n) y[(long)r * n + k] = e.db * e.b[j] + e.mb; } } }
EACH_TYPE(CALL)
'''
MUTATIONS = dict(   # name -> (what the source says, what a mistake would say)
    nibbles=('__byte_perm(lo, hi, 0x6420), __byte_perm(lo, hi, 0x7531)', '__byte_perm(lo, hi, 0x7531), __byte_perm(lo, hi, 0x6420)'),
    scale_at=('r.q.load(p + 1 + 4 * (u & 3))', 'r.q.load(p + 4 * (u & 3))'),
    table=('0x18141210', '0x18161210'),
    exponent=('(e - 1) << 23', 'e << 23'))



@pytest.fixture(scope='module')
def build(tmp_path_factory):
    "Compile blocks.cu (with one mistake) into a shared library"
    if not shutil.which('g++'): pytest.skip('needs g++ to run device code on the CPU')
    folder = tmp_path_factory.mktemp('blocks')
    def make(mutation=None):
        source = re.sub(r'.*cvt\.f32\.f16.*\n', '', read_source('blocks'))      # one line of PTX; the shim has the same in C
        if mutation:
            old, new = MUTATIONS[mutation]
            assert source.count(old) == 1
            source = source.replace(old, new)
        cpp, lib = folder/f'{mutation}.cpp', folder/f'{mutation}.so'
        cpp.write_text(SHIM + source + CALLS)
        subprocess.run(['g++', '-std=c++17', '-O1', '-ffp-contract=off', '-shared', '-fPIC', '-o', lib, cpp], check=True)
        return ctypes.CDLL(str(lib))
    return make


def decode(lib, function, t, blocks, n):
    "Run one decoder on rows that start at a 16-byte boundary, as tensors do in VRAM"
    buf = np.zeros(blocks.size + 64, np.uint8)
    at = -buf.ctypes.data % 16
    buf[at:at+blocks.size] = blocks.ravel()
    y = np.full((len(blocks), n), np.nan, np.float32)
    getattr(lib, f'{function}_{t.name.lower()}')(ctypes.c_void_p(buf.ctypes.data + at), ctypes.c_void_p(y.ctypes.data), len(blocks), n)
    return y


@pytest.mark.timeout(120)
def test_bit_equal(build):
    lib, rng = build(), np.random.default_rng(0)
    for t in GGMLType:
        for k in (1, 2, 3, 4, 7):
            n = k * t.block_size if t.block_size > 1 else 31 * k
            blocks = random_blocks(t, 5, n, rng)
            if t == GGMLType.MXFP4: blocks.reshape(5, -1, 17)[..., 0] = rng.choice([0, 1, 2, 126, 128, 250], (5, k))
            for f in ('one', 'eight'): assert np.array_equal(decode(lib, f, t, blocks, n), dequantize(blocks, t)), (t.name, n, f)


@pytest.mark.timeout(240)
def test_mistakes_are_seen(build):
    blocks = random_blocks(GGMLType.MXFP4, 5, 256, np.random.default_rng(0))
    w = dequantize(blocks, GGMLType.MXFP4)
    for m in MUTATIONS:
        y = decode(build(m), 'eight', GGMLType.MXFP4, blocks, 256)
        assert not np.linalg.norm(y - w) < 0.01 * np.linalg.norm(w), m
