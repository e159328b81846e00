"The device code that sorts and unpacks blocks, compiled for the CPU with g++: bit-equal to the reference decoder, and a mistake is seen"
import ctypes, hashlib, re, shutil, subprocess
import numpy as np, pytest
from conftest import once
from orcd.files.blocks import GGMLType, dequantize
from orcd.kernels import weight_layout as planes
from orcd.errors import KernelError
from orcd.kernels.nvrtc import type_defines, padded_bytes, read_source
from orcd.kernels.weight_layout import random_blocks, to_planes
from launched import take_launches

# As much of CUDA as blocks.cu and repack.cu need
SHIM = r'''
#include <cstdint>
#include <cstring>
#define __device__
#define __global__
#define __launch_bounds__(n)
#define __grid_constant__
static struct { int x, z; } blockIdx, blockDim = {256, 1}, threadIdx;
template<class A> static A min(A a, A b) { return a < b ? a : b; }
template<class A> static A max(A a, A b) { return a > b ? a : b; }
#define __forceinline__ inline
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
static float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t s) {
    uint64_t v = ((uint64_t)y << 32) | x; uint32_t r = 0;
    for (int i = 0; i < 4; i++) r |= (uint32_t)((v >> 8 * ((s >> 4 * i) & 7)) & 255) << 8 * i;
    return r;
}
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static struct Halves {
    float of[65536];
    Halves() {
        for (uint32_t h = 0; h < 65536; h++) {
            uint32_t e = h >> 10 & 31, m = h & 1023; float s = h & 0x8000 ? -1.f : 1.f;
            of[h] = e ? s * __uint_as_float((e + 112) << 23 | m << 13) : s * m * 0x1p-24f;
        }
    }
} table_of_halves;
static float half_bits(uint32_t h) { return table_of_halves.of[h & 65535]; }
static uint32_t half_of(float x) {      // of an integer below 2048
    uint32_t u; memcpy(&u, &x, 4);
    return (u >> 16 & 0x8000) | (x == 0 ? 0 : (u >> 23 & 255) - 112) << 10 | (x == 0 ? 0 : u >> 13 & 1023);
}
static uint32_t minus_half2(uint32_t v, uint32_t b) {
    return half_of(half_bits(v & 65535) - half_bits(b & 65535)) | half_of(half_bits(v >> 16) - half_bits(b >> 16)) << 16;
}
'''
CALLS = r'''
#define CALL(name, T) extern "C" void decode_##name(const u8* w, float* y, int rows, int n) { \
    for (int r = 0; r < rows; r++) for (int i = 0; i < n; i++) y[(long)r * n + i] = dequant_one<T>(w, r, n, i); }
EACH_TYPE(CALL)
#define SORT(name, T) extern "C" int run_repack_##name(int blocks, int, int, const void* runs) { \
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) for (threadIdx.x = 0; threadIdx.x < 256; threadIdx.x++) repack_##name(*(const BatchedLaunch<Run>*)runs); \
    return 0; }
EACH_QUANT(SORT)
'''
MUTATIONS = dict(   # name -> (what the source says, what a mistake would say)
    nibbles=('if (r == 1) return w << 8 & 0x8E008E00;', 'if (r == 1) return w & 0x8E008E00;'),
    scale_at=('Y::s * (left * (row & 15) + j);', 'Y::s * (left * (row & 15) + (j ^ 1));'),
    table=('(w << 5 & 0x0E000E00)', '(w << 5 & 0x06000600)'),
    exponent=('e ? e << 23', 'e ? (e + 1) << 23'))


HEADERS = 'algorithm cassert cmath csetjmp cstdint cstdlib cstring functional vector ucontext.h'


def compiled(factory, text):
    "A library of C++, made once a run. The headers, which take as long to read as all else, are read once"
    def cc(folder, *args):
        subprocess.run(['g++', '-std=c++17', '-O1', '-ffp-contract=off', '-fno-gnu-unique', '-w', '-fPIC', *args], check=True, cwd=folder)
    def headers(folder):
        (folder/'all.h').write_text(''.join(f'#include <{name}>\n' for name in HEADERS.split()))
        cc(folder, '-x', 'c++-header', '-o', 'all.h.gch', 'all.h')
    def make(folder):
        (folder/'x.cpp').write_text(text)
        cc(folder, '-include', once(factory, 'headers-of-c', headers)/'all.h', '-shared', '-o', 'x.so', 'x.cpp')
    return ctypes.CDLL(str(once(factory, f'c-{hashlib.sha256(text.encode()).hexdigest()[:24]}', make)/'x.so'))


@pytest.fixture(scope='module')
def build(tmp_path_factory):
    "Compile blocks.cu (with one mistake) into a shared library"
    if not shutil.which('g++'): pytest.skip('needs g++ to run device code on the CPU')
    def make(mutation=None):
        source = re.sub(r'.*(cvt\.f32\.f16|sub\.f16x2).*\n', '', read_source('blocks')) + read_source('batched_launch') + re.sub('#include .*', '', read_source('repack'))      # two lines of PTX; the shim has the same in C
        if mutation:
            old, new = MUTATIONS[mutation]
            assert source.count(old) == 1
            source = source.replace(old, new)
        return compiled(tmp_path_factory, SHIM + source + CALLS)
    return make


def placed(a):
    "A copy that starts at a 16-byte boundary, as tensors do in VRAM, with room behind it"
    buf = np.zeros(a.size + 64, np.uint8)
    at = -buf.ctypes.data % 16
    buf[at:at + a.size] = a.ravel()
    return buf[at:at + a.size]

def pointer(a): return ctypes.c_void_p(a.ctypes.data)

def decode(lib, t, blocks, n):
    "Sort, then decode every weight"
    w, y = placed(to_planes(blocks, t)), np.full((len(blocks), n), np.nan, np.float32)
    getattr(lib, f'decode_{t.name.lower()}')(pointer(w), pointer(y), len(blocks), n)
    return y


def test_bit_equal(build):
    lib, rng = build(), np.random.default_rng(0)
    for t in GGMLType:
        for k in (1, 2, 3, 4, 7, 10):
            n = k * t.block_size if t.block_size > 1 else 31 * k
            blocks = random_blocks(t, 5, n, rng)
            if t == GGMLType.MXFP4: blocks.reshape(5, -1, 17)[..., 0] = rng.choice([0, 1, 2, 126, 128, 250], (5, k))
            assert np.array_equal(decode(lib, t, blocks, n), dequantize(blocks, t)), (t.name, n)


def test_sorting_in_pieces(build, monkeypatch):
    "The kernel that sorts, as it is launched, with rows from any address and of many tensors, against NumPy"
    lib, rng, launches = build(), np.random.default_rng(1), []
    def take(l):
        assert l.file == 'repack' and l.defines == type_defines(GGMLType[l.name.removeprefix('repack_').upper()]) and l.block == (256,)
        launches.append(l.grid[0])
        l.on(lib)
    take_launches(monkeypatch, take)
    for t in GGMLType:
        if t.block_size == 1: continue
        runs, wanted = [], []
        for k, n_out in ((1, 5), (2, 20), (3, 10), (4, 1), (7, 4), (10, 20))*4:     # stacks of 4, 1, 2 … matrices
            n, blocks = k * t.block_size, random_blocks(t, 20, k * t.block_size, rng)
            out = placed(to_planes(np.zeros_like(blocks), t, n_out))       # padding stays as it is
            assert len(out) == padded_bytes((20 // n_out, n_out, n), t)
            for first, count, shift in ((0, 7, 1), (7, 0, 0), (7, 13, 3)):
                src = np.concatenate([np.zeros(shift, np.uint8), blocks[first:first + count].ravel()])[shift:]
                runs.append((src, out, (20 // n_out, n_out, n), first, count))
            wanted.append((out, to_planes(blocks, t, n_out)))
        planes.repack(t, [(src.ctypes.data, out.ctypes.data, *rest) for src, out, *rest in runs])
        assert len(runs) > planes.AT_ONCE and all((out == w).all() for out, w in wanted), t.name
        with pytest.raises(KernelError, match='cannot be sorted'): planes.repack(t, [(0, 0, (4, n), 3, 2)])
    assert max(launches) > 64 and len(launches) == 2*sum(t.block_size > 1 for t in GGMLType)


def test_mistakes_are_seen(build):
    blocks = random_blocks(GGMLType.MXFP4, 5, 256, np.random.default_rng(0))
    w = dequantize(blocks, GGMLType.MXFP4)
    for m in MUTATIONS:
        y = decode(build(m), GGMLType.MXFP4, blocks, 256)
        assert not np.linalg.norm(y - w) < 0.01 * np.linalg.norm(w), m
