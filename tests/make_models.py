"""Small random GGUF models of every architecture, written with gguf-py: what the tests of both engines run on.

make_model('/tmp/x.gguf', 'gpt-oss', types={'exps': 'MXFP4', '': 'Q8_0'}, head_dim=64, window=8)

Each has a `no_vocab` tokenizer (prompts are token ids). A row that is no whole number of blocks of the wanted type falls back to
Q8_0, then to F32.
"""
from pathlib import Path
import gguf
import numpy as np
from orcd.files.blocks import ggml_type
from orcd.files.quants import quantize

ARCHES = 'qwen2', 'phi3', 'gpt-oss', 'llama', 'qwen3'

# one of each family for the CUDA engine, in its formats
MODELS = {
    'qwen2': dict(arch='qwen2', types={'attn_v': 'Q8_0', 'ffn_down': 'Q6_K', 'token_embd': 'Q5_0', 'output.': 'Q8_0', '': 'Q4_K'},
        n_embd=256, n_ff=512, head_dim=64, n_head=4, n_head_kv=2),
    'qwen2 Q5_K': dict(arch='qwen2', types='Q5_K', n_embd=256, n_ff=256, head_dim=32, n_head=7, n_head_kv=1, tied=True),
    'phi3': dict(arch='phi3', types={'attn_qkv': 'Q5_K', '': 'Q4_0'}, n_embd=192, n_ff=256, head_dim=96, n_head=4, n_head_kv=4),
    'gpt-oss': dict(arch='gpt-oss', types={'exps': 'MXFP4', '': 'Q8_0'}, n_embd=96, n_ff_exp=160, head_dim=64, n_head=8, n_head_kv=2,
        n_expert=6, n_expert_used=3, window=32),
    'llama': dict(arch='llama', types={'ffn': 'Q4_1', '': 'Q5_1'}, n_embd=128, n_ff=160, head_dim=128, n_head=2, n_head_kv=1,
        rope_freqs=True),
    'qwen3': dict(arch='qwen3', types={'ffn': 'BF16', 'attn': 'F16', '': 'Q8_0'}, n_embd=128, n_ff=96, head_dim=48, n_head=4, n_head_kv=2),
}


def shapes(arch, n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab, n_expert, n_ff_exp, tied, rope_freqs, n_rot, extra):
    "Tensor name -> shape, (out, in)"
    q, kv = n_head * head_dim, n_head_kv * head_dim
    out = {'token_embd.weight': (n_vocab, n_embd), 'output_norm.weight': (n_embd,)}
    if not tied: out['output.weight'] = (n_vocab, n_embd)
    if rope_freqs: out['rope_freqs.weight'] = (n_rot // 2,)
    attn = {'attn_norm.weight': (n_embd,), 'attn_output.weight': (n_embd, q)}
    fused = {'attn_qkv.weight': (q + 2*kv, n_embd)}
    apart = {'attn_q.weight': (q, n_embd), 'attn_k.weight': (kv, n_embd), 'attn_v.weight': (kv, n_embd)}
    biases = {'attn_q.bias': (q,), 'attn_k.bias': (kv,), 'attn_v.bias': (kv,)}
    gated = {'ffn_norm.weight': (n_embd,), 'ffn_gate.weight': (n_ff, n_embd), 'ffn_up.weight': (n_ff, n_embd),
        'ffn_down.weight': (n_embd, n_ff)}
    layer = {
        'qwen2': attn | apart | biases | gated,
        'llama': attn | apart | gated,
        'qwen3': attn | apart | gated | {'attn_q_norm.weight': (head_dim,), 'attn_k_norm.weight': (head_dim,)},
        'phi3': attn | fused | {'ffn_norm.weight': (n_embd,), 'ffn_up.weight': (2*n_ff, n_embd), 'ffn_down.weight': (n_embd, n_ff)},
        'gpt-oss': attn | apart | biases | {
            'attn_output.bias': (n_embd,), 'attn_sinks.weight': (n_head,), 'post_attention_norm.weight': (n_embd,),
            'ffn_gate_inp.weight': (n_expert, n_embd), 'ffn_gate_inp.bias': (n_expert,),
            'ffn_gate_exps.weight': (n_expert, n_ff_exp, n_embd), 'ffn_gate_exps.bias': (n_expert, n_ff_exp),
            'ffn_up_exps.weight': (n_expert, n_ff_exp, n_embd), 'ffn_up_exps.bias': (n_expert, n_ff_exp),
            'ffn_down_exps.weight': (n_expert, n_embd, n_ff_exp), 'ffn_down_exps.bias': (n_expert, n_embd)},
    }[arch]
    layer |= {f'{role}.bias': layer[f'{role}.weight'][:1] for role in extra}
    for i in range(n_layer): out |= {f'blk.{i}.{k}': s for k, s in layer.items()}
    return out


def keep_f32(name): return name.endswith('.bias') or 'norm' in name or 'sinks' in name or 'gate_inp' in name or 'rope_freqs' in name


def type_of(name, shape, types):
    "The type for a tensor: of the first part of `types` that occurs in its name; falls back when rows are no whole blocks"
    if keep_f32(name): return ggml_type('F32')
    want = types if isinstance(types, str) else next((t for part, t in types.items() if part in name), 'F32')
    return next(t for t in map(ggml_type, (want, 'Q8_0', 'F32')) if shape[-1] % t.block_size == 0)


def weight(rng, name, shape, gain):
    "Random float32 weights that keep the stream at a sane scale, and everything else far from its neutral value"
    if 'rope_freqs' in name: return np.linspace(1, 8, shape[0]).astype(np.float32)
    x = rng.standard_normal(shape, dtype=np.float32)
    if 'norm' in name: return 1 + .3*x
    if 'sinks' in name: return 2*x
    if name.endswith('.bias'): return .5*x
    if 'token_embd' in name: return x
    return x * np.float32(gain / np.sqrt(shape[-1]))


def make_model(path, arch='qwen2', *, types='F32', seed=0, n_layer=2, n_embd=64, n_head=4, n_head_kv=2, head_dim=16, n_ff=96, n_vocab=160,
               context_length=512, window=None, n_expert=4, n_expert_used=2, n_ff_exp=64, tied=False, rope_freqs=False, n_rot=None,
               rms_eps=1e-5,
               rope_theta=10000., yarn=None, gain=1.5, biases=(), keys=(), change=(), leave_out=(), weights=True):
    """Write a model and return its path.
    types: one type name, or {part of a tensor's name: type}; window: sliding window (gpt-oss: 8 by default, even layers);
    yarn: (factor, original context), for gpt-oss (32, 64) by default; biases: roles that have one beside those of the family;
    keys: extra metadata {key: value};
    change: {tensor: float32 array} instead of the random one; leave_out: tensors not to write;
    weights: False for a file of the right size with nothing in it."""
    rng, path = np.random.default_rng(seed), Path(path)
    n_rot = n_rot or head_dim
    if arch == 'gpt-oss': window, yarn = 8 if window is None else window, yarn or (32., 64)
    w = gguf.GGUFWriter(str(path), arch)
    w.add_name(f'random {arch}')
    w.add_block_count(n_layer)
    w.add_embedding_length(n_embd)
    w.add_context_length(context_length)
    w.add_feed_forward_length(n_ff if arch != 'gpt-oss' else n_ff_exp)
    w.add_head_count(n_head); w.add_head_count_kv(n_head_kv); w.add_key_length(head_dim); w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(rms_eps); w.add_rope_freq_base(rope_theta); w.add_rope_dimension_count(n_rot); w.add_vocab_size(n_vocab)
    if window: w.add_sliding_window(window)
    if arch == 'gpt-oss': w.add_expert_count(n_expert); w.add_expert_used_count(n_expert_used); w.add_expert_feed_forward_length(n_ff_exp)
    if yarn:
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(float(yarn[0]))
        w.add_rope_scaling_orig_ctx_len(yarn[1])
    w.add_tokenizer_model('no_vocab')
    for k, v in dict(keys).items():
        {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}[type(v)](k, v)
    table = shapes(arch, n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab, n_expert, n_ff_exp, tied, rope_freqs, n_rot, biases)
    sizes = []
    for name, shape in table.items():
        if name in leave_out: continue
        if not weights:
            t = type_of(name, shape, types)
            size = int(np.prod(shape))//t.block_size*t.type_size
            sizes.append(size)
            w.add_tensor_info(name, shape, np.dtype(np.float32), size, gguf.GGMLQuantizationType(int(t)))
            continue
        x = np.asarray(dict(change).get(name, weight(rng, name, shape, gain)), np.float32)
        t = type_of(name, x.shape, types)
        w.add_tensor(name, quantize(x, t) if t.name != 'F32' else x, raw_dtype=gguf.GGMLQuantizationType(int(t)))
    w.write_header_to_file(); w.write_kv_data_to_file()
    if weights: w.write_tensors_to_file()
    else: w.write_ti_data_to_file()
    w.close()
    if not weights:
        with open(path, 'r+b') as f: f.truncate(sum(-(-n//32)*32 for n in (f.seek(0, 2), *sizes)))
    return path
