"""Hugging Face transformers as an oracle: its model classes in float32 with the weights of a GGUF file, read and dequantised by gguf-py"""
import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

LAYER = {'attn_norm': 'input_layernorm', 'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
    'attn_qkv': 'self_attn.qkv_proj',
    'attn_output': 'self_attn.o_proj', 'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm',
    'ffn_norm': 'post_attention_layernorm',
    'post_attention_norm': 'post_attention_layernorm', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj',
    'ffn_gate_inp': 'mlp.router'}
MODEL = {'token_embd.weight': 'model.embed_tokens.weight', 'output_norm.weight': 'model.norm.weight', 'output.weight': 'lm_head.weight'}


def read(path):
    "Metadata and float32 tensors"
    r = gguf.GGUFReader(path)
    keys = {f.name: f.contents() for f in r.fields.values()}
    return keys, {t.name: np.array(dequantize(t.data, t.tensor_type) if t.tensor_type.name != 'F32' else t.data, np.float32)
        for t in r.tensors}


def config(keys, tensors):
    arch = keys['general.architecture']
    k = lambda name, default=None: keys.get(f'{arch}.{name}', default)
    rope = dict(rope_type='default', rope_theta=k('rope.freq_base', 10000.))
    if k('rope.scaling.type') == 'yarn':
        rope |= dict(rope_type='yarn', factor=k('rope.scaling.factor'),
            original_max_position_embeddings=k('rope.scaling.original_context_length'),
            beta_fast=k('rope.scaling.yarn_beta_fast', 32.), beta_slow=k('rope.scaling.yarn_beta_slow', 1.))
        if arch == 'gpt-oss': rope |= dict(truncate=False) # as its published configuration; what others have is the default
    common = dict(vocab_size=tensors['token_embd.weight'].shape[0], hidden_size=k('embedding_length'),
        intermediate_size=k('feed_forward_length'), num_hidden_layers=k('block_count'),
        num_attention_heads=k('attention.head_count'), num_key_value_heads=k('attention.head_count_kv'),
        head_dim=k('attention.key_length'), max_position_embeddings=k('context_length'),
        rms_norm_eps=k('attention.layer_norm_rms_epsilon'), rope_parameters=rope, tie_word_embeddings='output.weight' not in tensors,
        pad_token_id=None, bos_token_id=None, eos_token_id=None)
    if arch == 'gpt-oss':
        common |= dict(intermediate_size=k('expert_feed_forward_length'), num_local_experts=k('expert_count'),
            num_experts_per_tok=k('expert_used_count'), sliding_window=k('attention.sliding_window'),
            layer_types=['full_attention' if i % 2 else 'sliding_attention' for i in range(k('block_count'))])
    if arch == 'llama': common |= dict(attention_bias='blk.0.attn_output.bias' in tensors, mlp_bias='blk.0.ffn_down.bias' in tensors)
    if arch == 'phi3': common |= dict(sliding_window=k('attention.sliding_window'))
    return {'qwen2': Qwen2Config, 'qwen3': Qwen3Config, 'llama': LlamaConfig, 'phi3': Phi3Config, 'gpt-oss': GptOssConfig}[arch](**common)


def state(keys, tensors):
    "GGUF's tensors under Hugging Face's names and layouts"
    arch, out = keys['general.architecture'], {}
    for name, x in tensors.items():
        if name == 'rope_freqs.weight': continue
        if not name.startswith('blk.'): out[MODEL[name]] = x; continue
        _, i, role, kind = name.split('.')
        to = f'model.layers.{i}.'
        if role == 'attn_sinks': out[to + 'self_attn.sinks'] = x
        elif arch == 'phi3' and role == 'ffn_up': out[to + 'mlp.gate_up_proj.weight'] = x
        elif role.endswith('_exps'): out[to + role + '.' + kind] = x
        else:
            if arch == 'llama' and role in ('attn_q', 'attn_k'): # neighbours back to halves
                d = keys['llama.attention.key_length']
                x = x.reshape(-1, d//2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
            out[to + LAYER[role] + '.' + kind] = x
    if arch == 'gpt-oss':
        for i in range(keys['gpt-oss.block_count']):
            p, e = f'model.layers.{i}.', f'model.layers.{i}.mlp.experts.'
            # (E, ff, 2, ...): gate and up rows alternate
            def pair(kind): return np.stack([out.pop(f'{p}ffn_gate_exps.{kind}'), out.pop(f'{p}ffn_up_exps.{kind}')], 2)
            w, b = pair('weight'), pair('bias')
            out[e + 'gate_up_proj'] = w.reshape(w.shape[0], -1, w.shape[-1]).swapaxes(1, 2)
            out[e + 'gate_up_proj_bias'] = b.reshape(b.shape[0], -1)
            out[e + 'down_proj'], out[e
                + 'down_proj_bias'] = out.pop(p + 'ffn_down_exps.weight').swapaxes(1, 2), out.pop(p + 'ffn_down_exps.bias')
    if 'lm_head.weight' not in out: out['lm_head.weight'] = out['model.embed_tokens.weight']
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in out.items()}


class HuggingFace:
    """`run(ids)` gives logits (T, n_vocab) and residual streams (n_layer+1, T, n_embd).
    `choose` picks the experts: it gets the scores (T, n_expert) of one router after the other and returns ids (T, k)."""
    def __init__(self, path, device='cpu'):
        keys, tensors = read(path)
        self.model = AutoModelForCausalLM.from_config(config(keys, tensors), attn_implementation='eager', dtype=torch.float32).eval()
        self.model.load_state_dict(state(keys, tensors), strict=True)
        self.model.to(device)
        if 'rope_freqs.weight' in tensors: self.model.model.rotary_emb.inv_freq /= torch.from_numpy(tensors['rope_freqs.weight']).to(device)
        self.device, self.streams, self.choose = device, [], None
        take = lambda x: self.streams.append((x[0] if isinstance(x, tuple) else x)[0].detach().float().cpu().numpy())
        self.model.model.embed_tokens.register_forward_hook(lambda m, a, out: self.streams.append(out[0].detach().float().cpu().numpy()))
        for layer in self.model.model.layers:
            layer.register_forward_hook(lambda m, a, out: take(out))
            if router := getattr(layer.mlp, 'router', None): router.register_forward_hook(self.route)

    def route(self, router, args, out):
        "Take the experts that `choose` names; weights are the softmax over the model's own scores of them"
        if self.choose is None: return out
        scores, _, own = out
        ids = torch.as_tensor(self.choose(scores.cpu().numpy()), device=scores.device).long()
        assert ids.shape == own.shape
        return scores, scores.gather(1, ids).softmax(1), ids

    @torch.no_grad()
    def run(self, ids, choose=None):
        self.choose = choose
        self.streams.clear()
        logits = self.model(torch.tensor(np.asarray(ids)[None], device=self.device), use_cache=False).logits[0].float().cpu().numpy()
        return logits, np.stack(self.streams)
