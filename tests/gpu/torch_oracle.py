"The three families in plain PyTorch float32, weights dequantised by gguf-py: shares no code with orcd, but for the weights of `is_hopper`"
import math
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from rounded import as_hopper
from orcd.files.blocks import GGMLType

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def as_half(x):
    "Round to FP16 with a power of two a row that puts the largest magnitude into [2^13, 2^14): what the tensor cores read"
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent
    scale = ((127 + 14 - exponent).clamp(1, 253).int() << 23).view(torch.float32)
    return (x * scale).half().float() / scale


class Oracle:
    """Residual streams and logits of a whole prompt. With `halves`, what our prefill rounds to FP16 by design is rounded: the inputs of products with
    quantised weights, keys, values and, in tiles of 64 keys, the probabilities. What then remains of a difference is not explained by that rounding.
    With `is_hopper` as well, what Hopper's kernels round beyond that: the weights, and the activation between two products.
    With `noise`, every product with quantised weights is off by that share of itself, at random: what another order of summation may do.
    `choose`, when given, picks the experts: it gets the scores (T, n_expert) of one router after the other and returns ids (T, k)."""
    def __init__(self, path, device='cuda', halves=False, keep=False):
        r = GGUFReader(path)
        self.halves, self.is_hopper, self.noise, self.choose = halves, False, 0, None
        self.random = torch.Generator(device).manual_seed(0)
        self.t = {t.name: t for t in r.tensors}
        self.device, self.pool, self.keep, self.ready, self.kept = device, ThreadPoolExecutor(16), keep, {}, {}
        field = lambda k: r.fields[k].contents() if k in r.fields else None
        self.arch = field('general.architecture')
        self.key = lambda k, default=None: default if (v := field(f'{self.arch}.{k}')) is None else v
        self.n_layer, self.n_head, self.n_expert = self.key('block_count'), self.key('attention.head_count'), self.key('expert_count', 0)
        self.n_kv, self.eps = self.key('attention.head_count_kv', self.n_head), self.key('attention.layer_norm_rms_epsilon')
        self.d = self.key('attention.key_length', self.key('embedding_length') // self.n_head)

    def w(self, name, part=None):
        "float32 weights on the device, of one expert alone when `part` is given. With `keep` they are there the next time."
        if name not in self.t: return None
        key = name, part, self.rounds(name)
        if key in self.kept: return self.kept[key]
        x = torch.from_numpy(self.ready.pop(key).result() if key in self.ready else self.numbers(name, part)).to(self.device)
        if self.keep: self.kept[key] = x
        return x

    def numbers(self, name, part=None):
        "`part`: an expert, or rows"
        t = self.t[name]
        blocks = t.data if part is None else t.data[part]
        if not self.rounds(name): return np.require(dequantize(blocks, t.tensor_type), np.float32, ['C', 'W'])
        return np.concatenate([as_hopper(blocks[i:i + 256], GGMLType(t.tensor_type)) for i in range(0, len(blocks), 256)]) # what fits into a core's cache

    def rounds(self, name):
        "Are these weights rounded? Not the head's, which is a product of one row, and a power of two rounds nothing."
        return self.halves and self.is_hopper and name.startswith('blk.') and self.t[name].tensor_type.name not in ('F32', 'F16', 'BF16', 'MXFP4')

    def prefetch(self, n_layer):
        "Dequantise the weights of some layers in threads"
        for name in (n for i in range(n_layer) for n in self.t if n.startswith(f'blk.{i}.')):
            for part in range(self.n_expert) if name.endswith('exps.weight') else [None]:
                key = name, part, self.rounds(name)
                if key not in self.kept: self.ready[key] = self.pool.submit(self.numbers, name, part)

    def half(self, x): return as_half(x) if self.halves else x
    def between(self, y, scale): return (y*scale).half().float()/scale if self.halves and self.is_hopper else y
    def norm(self, x, w): return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * w

    def product(self, x, name, part=None):
        W = self.w(name, part).T
        if self.t[name].tensor_type.name in ('F32', 'BF16'): return x @ W
        y = self.half(x) @ W
        return y * (1 + self.noise*torch.randn(y.shape, generator=self.random, device=self.device)) if self.noise else y

    def linear(self, x, name):
        y, b = self.product(x, f'{name}.weight'), self.w(f'{name}.bias')
        return y if b is None else y + b

    def angles(self, T):
        d, base = self.d, self.key('rope.freq_base', 10000.)
        f = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        m = 1.
        if self.key('rope.scaling.type') == 'yarn':
            factor, orig = self.key('rope.scaling.factor'), self.key('rope.scaling.original_context_length')
            at = lambda r: d * math.log(orig / (2*math.pi*r)) / (2*math.log(base))
            low, high = at(32), at(1)
            if self.arch != 'gpt-oss': low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, d - 1)
            ramp = ((torch.arange(d//2, dtype=torch.float64) - low) / (high - low)).clip(0, 1)
            f, m = f/factor*ramp + f*(1 - ramp), .1*math.log(factor) + 1
        a = torch.arange(T, dtype=torch.float64)[:, None] * f
        return (a.cos()*m).float().to(self.device), (a.sin()*m).float().to(self.device)

    def rope(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a*cos[:, None] - b*sin[:, None], b*cos[:, None] + a*sin[:, None]], -1)

    def attention(self, q, k, v, window, sinks):
        T = len(q)
        if self.halves: k, v = k.half().float(), v.half().float()
        q, k, v = q.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(self.n_head // self.n_kv, 0) for x in (k, v)) # (heads, T, d)
        s, i = q @ k.transpose(1, 2) / math.sqrt(self.d), torch.arange(T, device=self.device)
        hidden = i[None] > i[:, None]
        if window: hidden |= i[None] <= i[:, None] - window
        s = s.masked_fill(hidden, -torch.inf)
        out, total = self.tiles(s, v) if self.halves else self.whole(s, v)
        if sinks is not None: total = total + (sinks[:, None, None] - s.amax(-1, keepdim=True)).exp()
        return (out / total).transpose(0, 1).reshape(T, -1)

    def whole(self, s, v):
        "exp(s - largest s) V, and the sum of the exponentials"
        p = (s - s.amax(-1, keepdim=True)).exp()
        return p @ v, p.sum(-1, keepdim=True)

    def tiles(self, s, v):
        "The same with a running maximum, as flash attention does it: FP16 exponentials meet V, their sum keeps all its bits"
        m, total, out = torch.full_like(s[..., :1], -torch.inf), 0, 0
        for a in range(0, s.shape[-1], 64):
            x = s[..., a:a + 64]
            top = torch.maximum(m, x.amax(-1, keepdim=True))
            ref = top.masked_fill(top == -torch.inf, 0)
            p, keep, m = (x - ref).exp(), (m - ref).exp(), top
            total, out = total*keep + p.sum(-1, keepdim=True), out*keep + p.half().float() @ v[:, a:a + 64]
        return out, total

    def experts(self, h, b):
        g = self.linear(h, b + 'ffn_gate_inp')
        ids = g.topk(self.key('expert_used_count'), -1).indices if self.choose is None else \
            torch.as_tensor(self.choose(g.cpu().numpy()), device=self.device).long()
        w, out = g.gather(1, ids).softmax(-1), torch.zeros_like(h)
        for e in ids.unique().tolist():
            t, r = (ids == e).nonzero(as_tuple=True)
            one = lambda x, n: self.product(x, b + f'{n}.weight', e) + self.w(b + f'{n}.bias')[e]
            gate, up = one(h[t], 'ffn_gate_exps').clamp(max=7), one(h[t], 'ffn_up_exps').clamp(-7, 7)
            out.index_add_(0, t, one(self.between(gate * torch.sigmoid(1.702*gate) * (up + 1), 256), 'ffn_down_exps') * w[t, r, None])
        return out

    def layer(self, x, i, cos, sin):
        b, T = f'blk.{i}.', len(x)
        h = self.norm(x, self.w(b + 'attn_norm.weight'))
        if self.arch == 'phi3':
            n, m = self.n_head*self.d, self.n_kv*self.d
            q, k, v = self.linear(h, b + 'attn_qkv').split([n, m, m], -1)
        else: q, k, v = (self.linear(h, b + f'attn_{c}') for c in 'qkv')
        q, k, v = q.view(T, self.n_head, -1), k.view(T, self.n_kv, -1), v.view(T, self.n_kv, -1)
        window = self.key('attention.sliding_window', 0) if self.arch == 'gpt-oss' and i % 2 == 0 else 0
        o = self.attention(self.rope(q, cos, sin), self.rope(k, cos, sin), v, window, self.w(b + 'attn_sinks.weight'))
        x = x + self.linear(o, b + 'attn_output')
        if self.arch == 'gpt-oss': return x + self.experts(self.norm(x, self.w(b + 'post_attention_norm.weight')), b)
        h = self.norm(x, self.w(b + 'ffn_norm.weight'))
        if self.arch == 'phi3': gate, up = self.linear(h, b + 'ffn_up').chunk(2, -1)
        else: gate, up = self.linear(h, b + 'ffn_gate'), self.linear(h, b + 'ffn_up')
        return x + self.linear(self.between(torch.nn.functional.silu(gate) * up, 1/8), b + 'ffn_down')

    @torch.no_grad()
    def run(self, ids, n_layer=None):
        "Residual stream after the embedding and each layer, and the logits, as float32 NumPy arrays"
        n_layer = self.n_layer if n_layer is None else n_layer
        self.prefetch(n_layer)
        x = torch.from_numpy(self.numbers('token_embd.weight', np.asarray(ids))).to(self.device)
        cos, sin = self.angles(len(ids))
        residuals = [x.cpu().numpy()]
        for i in range(n_layer):
            x = self.layer(x, i, cos, sin)
            residuals.append(x.cpu().numpy())
        return np.stack(residuals), self.head(x)

    @torch.no_grad()
    def layers(self, streams):
        "What layer i by itself makes of `streams[i]` (T, n_embd), for each of them"
        self.prefetch(len(streams))
        cos, sin = self.angles(streams.shape[1])
        return np.stack([self.layer(torch.as_tensor(x, device=self.device), i, cos, sin).cpu().numpy() for i, x in enumerate(streams)])

    @torch.no_grad()
    def head(self, x):
        "Logits of rows of the last residual stream"
        name = 'output.weight' if 'output.weight' in self.t else 'token_embd.weight'
        return (self.norm(torch.as_tensor(x, device=self.device), self.w('output_norm.weight')) @ self.w(name).T).cpu().numpy()
