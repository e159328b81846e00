"Hyper-parameters and tensor maps: published headers, broken files"
import lzma, math
import numpy as np
import pytest
import make_models
from make_models import ARCHES, make_model
from orcd.families import arch
from orcd.families.config import RopeConfig
from orcd.errors import ModelError
from orcd.files.gguf import GGUF

PUBLISHED = {
    'qwen2.5-0.5b-instruct-q4_k_m': dict(arch='qwen2', n_layer=24, n_embd=896, n_head=14, n_head_kv=2, head_dim=64, n_ff=4864,
        n_vocab=151936, context_length=32768,
        rms_eps=1e-6, windows=(0,)*24, quant_kind='Q4_K_M', kv_bytes_per_token=12288),
    'phi-3-mini-4k-instruct-q4': dict(arch='phi3', n_layer=32, n_embd=3072, n_head=32, n_head_kv=32, head_dim=96, n_ff=8192, n_vocab=32064,
        context_length=4096,
        rms_eps=1e-5, windows=(0,)*32, quant_kind='Q4_K_M', kv_bytes_per_token=393216),
    'gpt-oss-20b-mxfp4': dict(arch='gpt-oss', n_layer=24, n_embd=2880, n_head=64, n_head_kv=8, head_dim=64, n_ff_exp=2880, n_vocab=201088,
        context_length=131072,
        rms_eps=1e-5, windows=(128, 0)*12, n_expert=32, n_expert_used=4, quant_kind='MXFP4', kv_bytes_per_token=49152)}
ROPE = {'qwen2': RopeConfig(64, 1e6), 'phi3': RopeConfig(96, 1e4),
        'gpt-oss': RopeConfig(64, 150000., scaling='yarn', factor=32., original_context=4096, yarn_truncate=False)}


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


@pytest.mark.parametrize('key, value', [('block_count', 0), ('block_count', 100_000), ('attention.head_count', 3),
    ('attention.head_count_kv', 3), ('attention.key_length', 15),
    ('attention.value_length', 8), ('embedding_length', 65), ('context_length', 0), ('feed_forward_length', 95),
    ('attention.layer_norm_rms_epsilon', math.nan),
    ('attention.layer_norm_rms_epsilon', 2.), ('attention.layer_norm_rms_epsilon', 1), ('rope.freq_base', -1.),
    ('rope.freq_base', math.inf), ('rope.dimension_count', 18),
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
    for name, said in (('mamba', r'known: .*gpt-oss, llama, .*qwen3'), ('gptoss', "another program's own"),
            (None, 'general.architecture')):
        with pytest.raises(ModelError, match=said): arch.resolve(SimpleNamespace(metadata={'general.architecture': name}, tensors={}))


def test_gptoss_needs_its_keys(tmp_path):
    for key, value in (('expert_used_count', 5), ('expert_count', 0), ('attention.sliding_window', 0), ('expert_feed_forward_length', 0)):
        assert f'gpt-oss.{key}' in broken(tmp_path, arch='gpt-oss', keys={f'gpt-oss.{key}': value})


def test_longrope_is_refused(tmp_path):
    assert 'rope.scaling.type' in broken(tmp_path, arch='phi3',
        keys={'phi3.rope.scaling.type': 'longrope', 'phi3.rope.scaling.factor': 32.})


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


def paper(d, base, s, length, alpha=1., beta=32.):
    """YaRN as its paper has it: pair i turns length / wavelength times over the original context; gamma is 0 below alpha turns and 1
    above beta, and between them the ramp is over the pairs, whose ends the published code rounds outwards. Returns radians a position
    and what the paper calls sqrt(1/t)."""
    wavelength = [2*math.pi*base**(2*i/d) for i in range(d//2)]
    def pair_of(turns): return d*math.log(length/(turns*2*math.pi))/(2*math.log(base)) # where wavelength = length / turns
    first, last = max(math.floor(pair_of(beta)), 0), min(math.ceil(pair_of(alpha)), d - 1)
    out = []
    for i, w in enumerate(wavelength):
        gamma = 1. if i <= first else 0. if i >= last else 1 - (i - first)/(last - first)
        out.append((1 - gamma)*2*math.pi/w/s + gamma*2*math.pi/w)
    return out, .1*math.log(s) + 1


@pytest.mark.parametrize('family', ['qwen2', 'llama', 'qwen3', 'phi3'])
@pytest.mark.parametrize('d, base, s, length', [(128, 1e6, 4., 32768), (64, 10000., 16., 4096), (32, 10000., 4., 32), (96, 10000., 8., 7)])
def test_yarn_of_the_paper(tmp_path, family, d, base, s, length):
    "Every family but gpt-oss, from a file's keys to speeds"
    with GGUF(make_model(tmp_path/'m.gguf', family, head_dim=d, yarn=(s, length), rope_theta=base)) as g: r = arch.resolve(g)[1].rope
    speeds, scale = paper(d, base, s, length)
    np.testing.assert_allclose(r.inv_freq(), speeds, rtol=1e-6)
    assert r.mscale == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize('name', ARCHES)
def test_yarn_keys(tmp_path, name):
    "Keys that change what YaRN computes are used, or refused by name"
    def rope(**keys):
        with GGUF(make_model(tmp_path/'m.gguf', name, head_dim=64, yarn=(4., 2048),
                keys={f'{name}.rope.scaling.{k}': v for k, v in keys.items()})) as g:
            return arch.resolve(g)[1].rope
    plain = rope()
    assert (rope(yarn_beta_fast=16.).beta_fast, rope(yarn_beta_slow=2.).beta_slow) == (16., 2.)
    assert rope(attn_factor=.5).mscale == pytest.approx(plain.mscale/2)
    # what YaRN says by itself
    assert rope(yarn_attn_factor=.1*math.log(4) + 1, yarn_ext_factor=1., yarn_log_multiplier=0., finetuned=True) == plain
    for key, value in (('yarn_attn_factor', 1.), ('yarn_attn_factor', 2.), ('yarn_ext_factor', 0.), ('yarn_ext_factor', .5),
            ('yarn_log_multiplier', 1.), ('yarn_beta_slow', 40.),
                       ('original_context_length', 6)):
        with pytest.raises(ModelError, match=f'{name}.rope.scaling.{key}'): rope(**{key: value})


# What converters write for these families beside the keys that `make_model` writes
CONVERTED = [
    ('llama', {'rope.scaling.type': 'linear', 'rope.scaling.factor': 4., 'rope.scaling.finetuned': True}), # long LLaMA 2
    ('llama', {'tensor_data_layout': 'Meta AI original pth', 'use_parallel_residual': False}),
    ('llama', {'expert_count': 0, 'expert_used_count': 0, 'attention.layer_norm_epsilon': 1e-5}),
    ('llama', {'attention.sliding_window': 4096}),
    ('llama', {'logit_scale': 1., 'residual_scale': 1., 'embedding_scale': 1., 'attention.causal': True}),
    ('llama', {'rope.scale_linear': 1.}), ('phi3', {'attention.sliding_window': 2047, 'rope.scaling.original_context_length': 4096}),
    ('phi3', {'attention.sliding_window': 0, 'rope.scaling.original_context_length': 16384}), # Phi-4
    ('qwen2', {'rope.scaling.type': 'none'}),
    ('qwen2', {'attn_logit_softcapping': 0., 'final_logit_softcapping': 0., 'pooling_type': 0, 'attention.clamp_kqv': 0.}),
    ('qwen2', {'attention.sliding_window': 0, 'attention.max_alibi_bias': 0.}), ('qwen3', {'rope.dimension_sections': [0, 0, 0, 0]}),
    ('gpt-oss', {'rope.scaling.yarn_beta_fast': 32., 'rope.scaling.yarn_beta_slow': 1.}),
    ('gpt-oss', {'expert_weights_scale': 1., 'expert_group_count': 1, 'expert_group_used_count': 1})]

@pytest.mark.parametrize('name, keys', CONVERTED, ids=str)
def test_keys_of_converters(tmp_path, name, keys):
    with GGUF(make_model(tmp_path/'m.gguf', name, keys={f'{name}.{k}': v for k, v in keys.items()})) as g:
        assert arch.resolve(g)[1].arch == name


# of a norm that they lack; a remark; older than `scaling.factor`; padding
WITHOUT_EFFECT = {'attention.layer_norm_epsilon', 'rope.scaling.finetuned', 'rope.scale_linear', 'vocab_size'}
YARN_ALONE = {'rope.scaling.original_context_length', 'rope.scaling.yarn_beta_fast', 'rope.scaling.yarn_beta_slow',
    'rope.scaling.yarn_attn_factor'}

@pytest.mark.parametrize('name', ARCHES)
def test_no_key_is_ignored(tmp_path, name):
    "Every key that gguf-py knows of, with a value that no file of the family has: it changes the hyper-parameters or is refused by name"
    import gguf
    def numbers(of):
        return [v for k, v in vars(of).items() if isinstance(v, str)
            and k.isupper()] + [n for v in vars(of).values() if isinstance(v, type) for n in numbers(v)]
    every = {k.removeprefix('{arch}.') for k in numbers(gguf.Keys) if k.startswith('{arch}.')}
    assert len(every) > 90
    def outcome(keys):
        with GGUF(make_model(tmp_path/'m.gguf', name, keys=keys)) as g:
            try: return arch.resolve(g)[1]
            except ModelError as e: return str(e)
    plain, words = outcome({}), {'rope.scaling.type': 'dynamic', 'tensor_data_layout': 'mine'}
    for key in sorted(every | {'rope.scale_linear', 'a.key.of.tomorrow'}):
        for value in ([words[key]] if key in words else [3., 3, False if key == 'attention.causal' else True]):
            got = outcome({f'{name}.{key}': value})
            if isinstance(got, str):
                assert f'{name}.{key}' in got or 'by the hyper-parameters' in got or key == 'block_count', (key, value, got)
            elif got == plain:
                assert key in WITHOUT_EFFECT or key in YARN_ALONE and name != 'gpt-oss', f'{name}.{key} = {value!r} is ignored'


@pytest.mark.parametrize('key, value', [('logit_scale', .5), ('residual_scale', .25), ('embedding_scale', 12.),
    ('attn_logit_softcapping', 50.), ('final_logit_softcapping', 30.),
    ('attention.temperature_scale', .1), ('attention.causal', False), ('expert_count', 8), ('attention.clamp_kqv', 8.),
    ('attention.max_alibi_bias', 8.), ('pooling_type', 3),
    ('use_parallel_residual', True), ('rope.dimension_sections', [16, 24, 24, 0]), ('attention.sliding_window_pattern', [True, False])])
@pytest.mark.parametrize('name', ARCHES)
def test_refused_by_name(tmp_path, name, key, value):
    if (name, key) == ('gpt-oss', 'expert_count'): return
    said = broken(tmp_path, arch=name, keys={f'{name}.{key}': value})
    assert f'{name}.{key} is {value!r}' in said and '\n' not in said


@pytest.mark.parametrize('key', ['attention.head_count', 'attention.head_count_kv', 'feed_forward_length'])
def test_layers_that_differ(tmp_path, key):
    assert f'llama.{key} is [2, 4]' in broken(tmp_path, arch='llama', keys={f'llama.{key}': [2, 4]})
    assert f'llama.{key} is an array of 3' in broken(tmp_path, arch='llama', keys={f'llama.{key}': [4, 4, 4]})


def test_control_characters(tmp_path):
    assert '\x1b' not in broken(tmp_path, keys={'qwen2.colour': '\x1b[31m\n'})


@pytest.mark.parametrize('name', [[1, 2], [1.], ['a', 'b'], 7, True, '', ' \n', 'x'*1000, 'named', 'two\n12:00 shutdown\u2028lines'])
def test_a_name_is_for_people(tmp_path, name):
    "Whatever `general.name` is, it stands in no way; it is shown where it is a text, cut where it is long"
    class Writer(make_models.gguf.GGUFWriter):
        def add_name(self, _): pass
    with pytest.MonkeyPatch.context() as m:
        m.setattr(make_models.gguf, 'GGUFWriter', Writer)
        with GGUF(make_model(tmp_path/'m.gguf', keys={'general.name': name})) as g: c = arch.resolve(g)[1]
    assert c.name == (' '.join(name.split())[:80] if isinstance(name, str) and name.strip() else 'qwen2') and len(c.name.splitlines()) == 1


def test_long_words(tmp_path):
    "A word or key of a megabyte is cut where it is quoted"
    assert len(broken(tmp_path, keys={'qwen2.' + 'x'*60_000: 'y'*1_000_000})) < 400
    with GGUF(make_model(tmp_path/'m.gguf')) as g:
        g.metadata._values['general.architecture'] = 'x'*1_000_000
        with pytest.raises(ModelError, match='known: .*gpt-oss, llama') as e: arch.resolve(g)
    assert len(str(e.value)) < 400


@pytest.mark.parametrize('tokens', [159, 160, 161])
def test_tokens_and_rows(tmp_path, tokens):
    "More tokens than rows: prompts would hold ids of which the model has nothing"
    with GGUF(make_model(tmp_path/'m.gguf', n_vocab=160, keys={'tokenizer.ggml.tokens': [f't{i}' for i in range(tokens)]})) as g:
        if tokens <= 160: assert arch.resolve(g)[1].n_vocab == 160
        else:
            with pytest.raises(ModelError, match='161 tokens, but token_embd.weight has only 160 rows'): arch.resolve(g)


@pytest.mark.parametrize('wrong', [0., -1., math.nan, math.inf, 1e-30])
def test_frequency_factors(tmp_path, wrong):
    "Speeds are divided by them: one that is nothing makes every logit nothing"
    factors = np.ones(8)
    file = make_model(tmp_path/'m.gguf', 'llama', rope_freqs=True, change={'rope_freqs.weight': factors})
    with GGUF(file) as g: assert arch.open_model(g)[2].model['rope_freqs']
    factors[3] = wrong
    assert 'rope_freqs.weight holds' in broken(tmp_path, arch='llama', rope_freqs=True, change={'rope_freqs.weight': factors})


@pytest.mark.parametrize('key', ['rope.scaling.factor', 'rope.scale_linear'])
def test_factors_that_stretch_nothing(tmp_path, key):
    "Speeds are divided by the factor as well: next to nothing turns every pair at random"
    with GGUF(make_model(tmp_path/'m.gguf', keys={f'qwen2.{key}': .5})) as g: assert arch.resolve(g)[1].rope.factor == .5
    with GGUF(make_model(tmp_path/'m.gguf', keys={f'qwen2.{key}': 0.})) as g: assert arch.resolve(g)[1].rope.scaling == 'none'
    assert 'rope.scaling.factor is 1e-30; it must be 0' in broken(tmp_path, keys={f'qwen2.{key}': 1e-30})
