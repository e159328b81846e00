"Hyper-parameters and tensor maps: published headers, broken files"
import lzma, math
import numpy as np
import pytest
from make_models import ARCHES, make_model
from orcd import arch
from orcd.config import RopeConfig
from orcd.errors import ModelError
from orcd.gguf import GGUF

PUBLISHED = {
    'qwen2.5-0.5b-instruct-q4_k_m': dict(arch='qwen2', n_layer=24, n_embd=896, n_head=14, n_head_kv=2, head_dim=64, n_ff=4864, n_vocab=151936, context_length=32768,
        rms_eps=1e-6, windows=(0,)*24, quant_kind='Q4_K_M', kv_bytes_per_token=12288),
    'phi-3-mini-4k-instruct-q4': dict(arch='phi3', n_layer=32, n_embd=3072, n_head=32, n_head_kv=32, head_dim=96, n_ff=8192, n_vocab=32064, context_length=4096,
        rms_eps=1e-5, windows=(0,)*32, quant_kind='Q4_K_M', kv_bytes_per_token=393216),
    'gpt-oss-20b-mxfp4': dict(arch='gpt-oss', n_layer=24, n_embd=2880, n_head=64, n_head_kv=8, head_dim=64, n_ff_exp=2880, n_vocab=201088, context_length=131072,
        rms_eps=1e-5, windows=(128, 0)*12, n_expert=32, n_expert_used=4, quant_kind='MXFP4', kv_bytes_per_token=49152)}
ROPE = {'qwen2': RopeConfig(64, 1e6), 'phi3': RopeConfig(96, 1e4),
        'gpt-oss': RopeConfig(64, 150000., scaling='yarn', factor=32., original_context=4096)}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_headers(shared, tmp_path, name):
    (tmp_path/'h.gguf').write_bytes(lzma.decompress((shared/'headers'/f'{name}.header.xz').read_bytes()))
    with GGUF(tmp_path/'h.gguf') as g:
        family, c = arch.resolve(g)
        for k, v in PUBLISHED[name].items(): assert getattr(c, k) == (pytest.approx(v) if isinstance(v, float) else v), k
        assert c.rope == ROPE[c.arch]
        bound = arch.bind(family, g, c)
        assert {t.name for t in bound.unique} == set(g.tensors)
        assert bound.model['output'].name == 'output.weight'


def broken(tmp_path, **kw):
    with GGUF(make_model(tmp_path/'m.gguf', **kw)) as g:
        with pytest.raises(ModelError) as e: arch.resolve(g)
    return str(e.value)


@pytest.mark.parametrize('key, value', [('block_count', 0), ('block_count', 100_000), ('attention.head_count', 3), ('attention.head_count_kv', 3), ('attention.key_length', 15),
    ('attention.value_length', 8), ('embedding_length', 65), ('context_length', 0), ('feed_forward_length', 95), ('attention.layer_norm_rms_epsilon', math.nan),
    ('attention.layer_norm_rms_epsilon', 2.), ('attention.layer_norm_rms_epsilon', 1), ('rope.freq_base', -1.), ('rope.freq_base', math.inf), ('rope.dimension_count', 18),
    ('rope.dimension_count', 7), ('rope.scaling.type', 'magic'), ('vocab_size', 161), ('block_count', True), ('block_count', '2')])
def test_bad_values(tmp_path, key, value):
    "The message names the key, or the tensor whose shape does not follow"
    said = broken(tmp_path, keys={f'qwen2.{key}': value})
    assert f'qwen2.{key}' in said or 'by the hyper-parameters' in said or key.split('.')[-1] in said


@pytest.mark.parametrize('name', ARCHES)
def test_every_tensor_is_needed(tmp_path, name):
    with GGUF(make_model(tmp_path/'a.gguf', name)) as g: names = list(g.tensors)
    for t in names:
        if t == 'output.weight': continue
        assert t in broken(tmp_path, arch=name, leave_out=[t])


def test_other_tensors_are_refused(tmp_path):
    from gguf import GGUFReader, GGUFWriter
    r, w = GGUFReader(make_model(tmp_path/'a.gguf', 'qwen2')), GGUFWriter(str(tmp_path/'b.gguf'), 'qwen2')
    for f in r.fields.values():
        if f.name.startswith(('qwen2', 'tokenizer')): w.add_key_value(f.name, f.contents(), f.types[0])
    for t in r.tensors: w.add_tensor(t.name, t.data)
    w.add_tensor('blk.0.attn_output.bias', np.zeros(64, np.float32))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    with GGUF(tmp_path/'b.gguf') as g, pytest.raises(ModelError, match='blk.0.attn_output.bias'): arch.resolve(g)


def test_wrong_shape_and_type(tmp_path):
    assert 'blk.1.ffn_up.weight' in broken(tmp_path, change={'blk.1.ffn_up.weight': np.zeros((96, 63))})
    with GGUF(make_model(tmp_path/'m.gguf', tied=True)) as g:
        family, c = arch.resolve(g)
        assert arch.bind(family, g, c).model['output'].name == 'token_embd.weight'


def test_unknown_architectures(tmp_path):
    from types import SimpleNamespace
    for name, said in (('mamba', 'known: gpt-oss, llama, phi3, qwen2, qwen3'), ('gptoss', "another program's own"), (None, 'general.architecture')):
        with pytest.raises(ModelError, match=said): arch.resolve(SimpleNamespace(metadata={'general.architecture': name}, tensors={}))


def test_gptoss_needs_its_keys(tmp_path):
    for key, value in (('expert_used_count', 5), ('expert_count', 0), ('attention.sliding_window', 0), ('expert_feed_forward_length', 0)):
        assert f'gpt-oss.{key}' in broken(tmp_path, arch='gpt-oss', keys={f'gpt-oss.{key}': value})


def test_longrope_is_refused(tmp_path):
    assert 'rope.scaling.type' in broken(tmp_path, arch='phi3', keys={'phi3.rope.scaling.type': 'longrope', 'phi3.rope.scaling.factor': 32.})


def test_inv_freq_in_double():
    "The definition, in plain Python"
    for r in (RopeConfig(96), RopeConfig(64, 1e6), ROPE['gpt-oss']):
        for i, got in enumerate(r.inv_freq()):
            want = r.theta ** (-2*i/r.n_rot)
            if r.scaling == 'yarn':
                low, high = (r.n_rot*math.log(4096/(2*math.pi*b))/(2*math.log(r.theta)) for b in (32, 1))
                ramp = min(max((i - low)/(high - low), 0), 1)
                want = want/32*ramp + want*(1 - ramp)
            assert got == pytest.approx(want, rel=1e-6)
