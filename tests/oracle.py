"""A forward pass in float64, one position and one head at a time, from gguf-py's reader and dequantiser: the slow second opinion of the
tests"""
import gguf
import numpy as np
from gguf.quants import dequantize


class Float64:
    "All five architectures. `run(ids)` gives logits (T, n_vocab) and residual streams [n_layer+1] of (T, n_embd)."
    def __init__(self, path):
        r = gguf.GGUFReader(path)
        self.key = {f.name: f.contents() for f in r.fields.values()}
        self.w = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) if t.tensor_type.name != 'F32'
            else t.data.astype(np.float64) for t in r.tensors}
        self.arch = self.key['general.architecture']

    def get(self, key, default=None): return self.key.get(f'{self.arch}.{key}', default)

    def norm(self, x, name):
        return x/np.sqrt((x**2).mean(-1, keepdims=True) + self.get('attention.layer_norm_rms_epsilon'))*self.w[name + '.weight']

    def mul(self, x, name): return x @ self.w[name + '.weight'].T + self.w.get(name + '.bias', 0)

    def speeds(self):
        n, base = self.get('rope.dimension_count'), self.get('rope.freq_base', 10000.)
        out = np.array([base**(-2*i/n) for i in range(n//2)])/self.w.get('rope_freqs.weight', 1)
        scale = self.get('rope.scaling.attn_factor', 1.)
        if self.get('rope.scaling.type') != 'yarn': return out, scale
        factor, length = self.get('rope.scaling.factor'), self.get('rope.scaling.original_context_length')
        beta = self.get('rope.scaling.yarn_beta_fast', 32), self.get('rope.scaling.yarn_beta_slow', 1)
        low, high = (n*np.log(length/(2*np.pi*turns))/(2*np.log(base)) for turns in beta)
        if self.arch != 'gpt-oss': low, high = np.floor(low), np.ceil(high) # the reference code of gpt-oss alone keeps fractions
        low, high = max(low, 0), min(high, n - 1)
        slow = np.clip((np.arange(n//2) - low)/(high - low), 0, 1)
        return out*(slow/factor + 1 - slow), scale*(.1*np.log(factor) + 1)

    def turn(self, x, p):
        "x (heads, head_dim) at position p"
        speed, scale = self.speeds()
        out, i = x.copy(), np.arange(len(speed))
        a, b = (2*i, 2*i + 1) if self.arch == 'llama' else (i, i + len(i))
        turned = (x[:, a] + 1j*x[:, b])*scale*np.exp(1j*p*speed) # a pair is a complex number
        out[:, a], out[:, b] = turned.real, turned.imag
        return out

    def attention(self, h, b, i):
        H, G, D = self.get('attention.head_count'), self.get('attention.head_count_kv'), self.get('attention.key_length')
        window = self.get('attention.sliding_window', 0)
        if self.arch == 'gpt-oss' and i % 2: window = 0
        if self.arch == 'phi3': parts = np.split(self.mul(h, b + 'attn_qkv'), [H*D, H*D + G*D], axis=1)
        else: parts = [self.mul(h, b + 'attn_' + n) for n in 'qkv']
        q, k, v = (x.reshape(len(h), -1, D) for x in parts)
        if self.arch == 'qwen3': q, k = self.norm(q, b + 'attn_q_norm'), self.norm(k, b + 'attn_k_norm')
        q, k = (np.stack([self.turn(row, p) for p, row in enumerate(x)]) for x in (q, k))
        out = np.empty(q.shape)
        for t in range(len(h)):
            first = max(0, t - window + 1) if window else 0
            for head in range(H):
                z = k[first:t + 1, head//(H//G)] @ q[t, head]*(self.get('attention.scale') or 1/np.sqrt(D))
                if self.arch == 'gpt-oss': z = np.append(z, self.w[b + 'attn_sinks.weight'][head])
                p = np.exp(z - z.max())
                p = (p/p.sum())[:t + 1 - first]
                out[t, head] = p @ v[first:t + 1, head//(H//G)]
        return self.mul(out.reshape(len(h), -1), b + 'attn_output')

    def feed_forward(self, h, b):
        if self.arch != 'gpt-oss':
            if self.arch == 'phi3': gate, up = np.split(self.mul(h, b + 'ffn_up'), 2, axis=1)
            else: gate, up = self.mul(h, b + 'ffn_gate'), self.mul(h, b + 'ffn_up')
            return self.mul(gate/(1 + np.exp(-gate))*up, b + 'ffn_down')
        out, scores = np.zeros(h.shape), self.mul(h, b + 'ffn_gate_inp')
        def expert(n, x, e): return self.w[f'{b}ffn_{n}_exps.weight'][e] @ x + self.w[f'{b}ffn_{n}_exps.bias'][e]
        for t, z in enumerate(scores):
            best = sorted(range(len(z)), key=lambda e: -z[e])[:self.get('expert_used_count')]
            p = np.exp(z[best] - z[best].max())
            for e, weight in zip(best, p/p.sum()):
                gate, up = np.minimum(expert('gate', h[t], e), 7), np.clip(expert('up', h[t], e), -7, 7)
                out[t] += weight*expert('down', gate/(1 + np.exp(-1.702*gate))*(up + 1), e)
        return out

    def run(self, ids):
        x = self.w['token_embd.weight'][ids]
        streams = [x]
        for i in range(self.get('block_count')):
            b = f'blk.{i}.'
            x = x + self.attention(self.norm(x, b + 'attn_norm'), b, i)
            x = x + self.feed_forward(self.norm(x, b + ('post_attention_norm' if self.arch == 'gpt-oss' else 'ffn_norm')), b)
            streams.append(x)
        return self.norm(x, 'output_norm') @ self.w.get('output.weight', self.w['token_embd.weight']).T, streams
