"""The reference engine with the FP16 roundings that the CUDA engine's prefill makes by design, to tell them from mistakes.

Two runs with the same roundings still differ: sums in another order move a number by 1e-7 of its size, and one that lies at the edge between two
halves then rounds the other way, by up to 5e-4. In a few layers such flips add up to about half of the error that the roundings themselves make."""
import numpy as np
from orcd.k_gemm import PLAIN
from orcd.reference import NumpyOps, ReferenceEngine, visible


def as_half(x):
    "FP16 with a power of two a row that puts the largest magnitude into [2^13, 2^14): the inputs of products"
    scale = np.exp2(np.float32(14) - np.frexp(abs(x).max(-1, keepdims=True))[1]).astype(np.float32)
    return (x * scale).astype(np.float16).astype(np.float32) / scale


class HalfWeight:
    "A quantised matrix as Hopper's kernels take it: weights are halves too. (They round scale and minimum of a block first; that makes a third more.)"
    def __init__(self, W): self.W, self.shape, self.type = W, W.shape, W.type
    def matrix(self, expert=0): return as_half(self.W.matrix(expert))


def half(x): return x.astype(np.float16).astype(np.float32)


class HalfOps(NumpyOps):
    wide = False    # with Hopper's kernels?
    def weight(self, W): return HalfWeight(W) if self.wide and W.type.block_size > 1 else W
    def linear(self, x, W, bias=None, residual=None): return super().linear(x if W.type in PLAIN else as_half(x), self.weight(W), bias, residual)
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
    def __init__(self, g, wide=False, **kw):
        super().__init__(g, **kw)
        m, exact = self.model, self.model.ops
        m.ops = HalfOps(m.config, getattr(m.w, 'rope_freqs', None))
        m.ops.wide = wide
        m.head = lambda x: exact.linear(exact.rms_norm(x, m.w.output_norm, m.config.rms_eps), m.w.output) # rows of logits are products of one row, in FP32
