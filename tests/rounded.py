"""The reference engine with the FP16 roundings that the CUDA engine's prefill makes by design, to tell them from mistakes.

Two runs with the same roundings still differ: sums in another order move a number by 1e-7 of its size, and one that lies at the edge
between two halves then rounds the other way, by up to 5e-4. In a few layers such flips add up to about half of the error that the
roundings themselves make."""
import numpy as np
from orcd.files.blocks import GGMLType, dequantize
from orcd.kernels.gemm import PLAIN
from orcd.families.reference import NumpyOps, ReferenceEngine, visible


def as_half(x):
    "FP16 with a power of two a row that puts the largest magnitude into [2^13, 2^14): the inputs of products"
    scale = np.exp2(np.float32(14) - np.frexp(abs(x).max(-1, keepdims=True))[1]).astype(np.float32)
    return (x * scale).astype(np.float16).astype(np.float32) / scale


def as_hopper(
    blocks,     # uint8 (rows, bytes a row)
    t,          # a quantised type
):              # float32 (rows, n)
    """Weights as Hopper's kernels make them: scale and minimum of a block as halves, and their sum with the integers rounded once more.
    The integers are found by decoding the same blocks with all quants 0, and 1."""
    if t == GGMLType.MXFP4: return dequantize(blocks, t) # a power of two rounds nothing

    def filled(quants, high):
        b = blocks.copy().view(t.dtype)
        for f in {'qs', 'ql', 'qh'} & set(b.dtype.names): b[f] = high if f == 'qh' else quants
        return dequantize(b.view(np.uint8).reshape(blocks.shape), t).astype(np.float64)
    one = 1 if t == GGMLType.Q8_0 else 0x11         # a byte whose integers are all 1
    w, zero, d = dequantize(blocks, t).astype(np.float64), filled(0, 0), filled(one, 0) - filled(0, 0)
    n = np.rint(np.divide(w - zero, d, out=np.zeros_like(w), where=d != 0))
    b = blocks.view(t.dtype).reshape(len(blocks), -1)
    top = np.maximum(1, np.max([(b[f].view(np.uint16).reshape(len(b), -1) >> 10 & 31).max(1)
        for f in {'d', 'm', 'dmin'} & set(b.dtype.names)], 0))
    up = np.exp2(dict(Q4_K=23., Q5_K=23., Q6_K=22.).get(t.name, 29.) - top)[:, None]
    half = lambda x: x.astype(np.float32).astype(np.float16).astype(np.float64)
    scale = half(d*up)
    least = (half(zero*up/2**24) if t.name in ('Q4_1', 'Q5_1', 'Q4_K', 'Q5_K')
        else half(np.rint(np.divide(zero, d, out=np.zeros_like(d), where=d != 0))*scale/2**24))
    return ((n*scale/2**24 + least).astype(np.float16).astype(np.float64)*2**24/up).astype(np.float32)


class HalfWeight:
    "A quantised matrix as Hopper's kernels take it"
    def __init__(self, W): self.W, self.shape, self.type, self.kept = W, W.shape, W.type, {}
    def matrix(self, expert=0):
        rows = self.shape[-2]
        if expert not in self.kept: self.kept[expert] = as_hopper(np.ascontiguousarray(self.W.blocks(expert*rows, rows)), self.type)
        return self.kept[expert]


def half(x): return x.astype(np.float16).astype(np.float32)


class HalfOps(NumpyOps):
    is_hopper = fused = False    # with Hopper's kernels? And with the activation in the product before it?
    halves = None           # id of a weight -> HalfWeight

    def weight(self, W):
        if not self.is_hopper or W.type.block_size == 1: return W
        self.halves = self.halves or {}
        return self.halves.setdefault(id(W), HalfWeight(W))

    def swiglu(self, gate, up):
        y = super().swiglu(gate, up)
        return half(y/8)*8 if self.fused else y

    def clamped_swiglu(self, gate, up):
        y = super().clamped_swiglu(gate, up)
        return half(y*256)/256 if self.fused else y
    def linear(self, x, W, bias=None, residual=None):
        return super().linear(x if W.type in PLAIN else as_half(x), self.weight(W), bias, residual)
    def expert_linear(self, x, W, bias, route): return super().expert_linear(as_half(x), self.weight(W), bias, route)

    def attention(self, q, k, v, i, sinks=None):
        "Tiles of 64 keys with a running maximum: the exponentials are rounded where they meet V, not in their sum"
        K, V = self.cache[i].store(self.pos[0], half(self.heads(k)), half(self.heads(v)))
        (T, H, D), (G, S, _) = (q := self.heads(q)).shape, K.shape
        K, V, seen = K.repeat(H//G, 0), V.repeat(H//G, 0), visible(self.pos, 0, S, self.config.windows[i])
        z = np.where(seen, (q.transpose(1, 0, 2) * np.float32(D**-.5)) @ K.transpose(0, 2, 1), np.float32('-inf'))
        m, total, out = np.full((H, T, 1), -np.inf, np.float32), 0, 0
        for a in range(0, S, 64):
            top = np.maximum(m, z[..., a:a + 64].max(-1, keepdims=True))
            ref = np.where(np.isinf(top), np.float32(0), top)
            p, keep, m = np.exp(z[..., a:a + 64] - ref), np.exp(m - ref), top
            total, out = total*keep + p.sum(-1, keepdims=True), out*keep + half(p) @ V[:, a:a + 64]
        if sinks is not None: total = total + np.exp(sinks[:, None, None] - m)
        return (out/total).transpose(1, 0, 2).reshape(T, H*D)


class Rounded(ReferenceEngine):
    def __init__(self, g, is_hopper=False, **kw):
        super().__init__(g, **kw)
        m, exact = self.model, self.model.ops
        m.ops = HalfOps(m.config, getattr(m.w, 'rope_freqs', None))
        up = getattr(m.layers[0], 'ffn_up', None) or m.layers[0].ffn_up_exps
        m.ops.is_hopper, m.ops.fused = is_hopper, is_hopper and up.type.block_size > 1
        # rows of logits are products of one row, in FP32
        m.head = lambda x: exact.linear(exact.rms_norm(x, m.w.output_norm, m.config.rms_eps), m.w.output)
