"The three families in plain PyTorch float32, weights dequantised by gguf-py: shares no code with orcd"
import math
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def as_half(x):
    "Round to FP16's 11 bits with a power-of-two scale a row: what the tensor cores read"
    scale = torch.exp2(torch.floor(torch.log2(x.abs().amax(-1, keepdim=True).clamp(min=1e-30))) - 10)
    return (x / scale).half().float() * scale


class Oracle:
    """Residual streams and logits of a whole prompt. With `halves`, keys, values and the inputs of quantised products are rounded to FP16, as our
    prefill does by design: what then remains of a difference is not explained by that rounding."""
    def __init__(self, path, device='cuda', halves=False):
        r = GGUFReader(path)
        self.half = as_half if halves else lambda x: x
        self.t = {t.name: t for t in r.tensors}
        self.device, self.pool, self.ready = device, ThreadPoolExecutor(16), {}
        field = lambda k: r.fields[k].contents() if k in r.fields else None
        self.arch = field('general.architecture')
        self.key = lambda k, default=None: default if (v := field(f'{self.arch}.{k}')) is None else v
        self.n_layer, self.n_head = self.key('block_count'), self.key('attention.head_count')
        self.n_kv, self.eps = self.key('attention.head_count_kv', self.n_head), self.key('attention.layer_norm_rms_epsilon')
        self.d = self.key('attention.key_length', self.key('embedding_length') // self.n_head)

    def w(self, name, rows=None):
        "float32 weights on the device; `rows` picks some of the first axis before dequantising"
        t = self.t.get(name)
        if t is None: return None
        x = self.ready.pop(name).result() if rows is None and name in self.ready else self.numbers(t, rows)
        return torch.from_numpy(x).to(self.device)

    def numbers(self, t, rows=None): return np.ascontiguousarray(dequantize(t.data if rows is None else t.data[rows], t.tensor_type), np.float32)
    def prefetch(self, names): self.ready |= {n: self.pool.submit(self.numbers, self.t[n]) for n in names}

    def norm(self, x, w): return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * w
    def linear(self, x, name):
        if self.t[f'{name}.weight'].tensor_type.name not in ('F32', 'BF16'): x = self.half(x)
        y, b = x @ self.w(f'{name}.weight').T, self.w(f'{name}.bias')
        return y if b is None else y + b

    def angles(self, T):
        d, base = self.d, self.key('rope.freq_base', 10000.)
        f = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        m = 1.
        if self.key('rope.scaling.type') == 'yarn':
            factor, orig = self.key('rope.scaling.factor'), self.key('rope.scaling.original_context_length')
            at = lambda r: d * math.log(orig / (2*math.pi*r)) / (2*math.log(base))
            low, high = at(32), at(1)
            ramp = ((torch.arange(d//2, dtype=torch.float64) - low) / (high - low)).clip(0, 1)
            f, m = f/factor*ramp + f*(1 - ramp), .1*math.log(factor) + 1
        a = torch.arange(T, dtype=torch.float64)[:, None] * f
        return (a.cos()*m).float().to(self.device), (a.sin()*m).float().to(self.device)

    def rope(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a*cos[:, None] - b*sin[:, None], b*cos[:, None] + a*sin[:, None]], -1)

    def attention(self, q, k, v, window, sinks):
        T = len(q)
        k, v = (self.half(x).repeat_interleave(self.n_head // self.n_kv, 1) for x in (k, v))
        s = torch.einsum('qhd,khd->hqk', q, k) / math.sqrt(self.d)
        i = torch.arange(T, device=self.device)
        hidden = i[None] > i[:, None]
        if window: hidden |= i[None] <= i[:, None] - window
        s = s.masked_fill(hidden, -torch.inf)
        if sinks is not None: s = torch.cat([s, sinks[:, None, None].expand(-1, T, 1)], -1)
        return torch.einsum('hqk,khd->qhd', s.softmax(-1)[..., :T], v).reshape(T, -1)

    def experts(self, h, b):
        g = self.linear(h, b + 'ffn_gate_inp')
        top, ids = g.topk(self.key('expert_used_count'), -1)
        w, out = top.softmax(-1), torch.zeros_like(h)
        for e in ids.unique().tolist():
            t, r = (ids == e).nonzero(as_tuple=True)
            one = lambda x, n: self.half(x) @ self.w(b + f'{n}.weight', e).T + self.w(b + f'{n}.bias')[e]
            gate, up = one(h[t], 'ffn_gate_exps').clamp(max=7), one(h[t], 'ffn_up_exps').clamp(-7, 7)
            out.index_add_(0, t, one(gate * torch.sigmoid(1.702*gate) * (up + 1), 'ffn_down_exps') * w[t, r, None])
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
        return x + self.linear(torch.nn.functional.silu(gate) * up, b + 'ffn_down')

    @torch.no_grad()
    def run(self, ids, n_layer=None):
        "Residual stream after the embedding and each layer, and the logits, as float32 NumPy arrays"
        n_layer = self.n_layer if n_layer is None else n_layer
        self.prefetch([n for i in range(n_layer) for n in self.t if n.startswith(f'blk.{i}.') and 'exps.weight' not in n])
        x = self.w('token_embd.weight', np.asarray(ids))
        cos, sin = self.angles(len(ids))
        residuals = [x.cpu().numpy()]
        for i in range(n_layer):
            x = self.layer(x, i, cos, sin)
            residuals.append(x.cpu().numpy())
        return np.stack(residuals), self.head(x)

    @torch.no_grad()
    def head(self, x):
        "Logits of rows of the last residual stream"
        name = 'output.weight' if 'output.weight' in self.t else 'token_embd.weight'
        return (self.norm(torch.as_tensor(x, device=self.device), self.w('output_norm.weight')) @ self.w(name).T).cpu().numpy()
