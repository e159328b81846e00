"The reference engine against llama.cpp on the CPU, on small random models of every architecture and on our own trained ones"
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import llama_cpp_ctypes
from make_models import ARCHES, make_model
from orcd.files.gguf import GGUF
from orcd.families.reference import ReferenceEngine
from orcd.text.sampling import SamplingParams

pytestmark = pytest.mark.skipif(llama_cpp_ctypes.find() is None, reason="needs llama.cpp's library (make oracles, or ORCD_LLAMA_LIB)")
ROOT = Path(__file__).resolve().parents[2]
HEADS = {'32': dict(head_dim=32, n_embd=128), '48': dict(head_dim=48, n_head=6, n_head_kv=3, n_embd=288),
    '64': dict(head_dim=64, n_embd=256),
         '96': dict(head_dim=96, n_head=3, n_head_kv=1, n_embd=288), '128': dict(head_dim=128, n_head=2, n_head_kv=2, n_embd=256)}


def reference(g):
    """As it is, but for gpt-oss: llama.cpp rounds the ends of its ramp too, which its published configuration denies; the other oracles
    have them fractional"""
    engine = ReferenceEngine(g)
    if engine.config.arch != 'gpt-oss': return engine
    return ReferenceEngine(g, config=replace(engine.config, rope=replace(engine.config.rope, yarn_truncate=True)))


def compare(path, n=300):
    "(max |diff| / std, root mean square of diff / std) of the logits, and the greedy continuations of both"
    with GGUF(path) as g, reference(g) as ours, llama_cpp_ctypes.LlamaCpp(path) as theirs:
        ids = np.random.default_rng(7).integers(0, ours.config.n_vocab, n)
        want, got = theirs.logits(ids), ours.logits(ids)
        ours.prefill(ids[:20])
        return (abs(got - want).max()/want.std(),
            (got - want).std()/want.std()), [i for i, *_ in ours.decode(SamplingParams(temperature=0.), 30)], theirs.greedy(ids[:20], 30)


@pytest.mark.parametrize('heads', HEADS)
@pytest.mark.parametrize('arch', ARCHES)
def test_float32(tmp_path, arch, heads):
    error, ours, theirs = compare(make_model(tmp_path/'m.gguf', arch, n_layer=4, seed=int(heads), **HEADS[heads]))
    assert error[0] < 1e-3
    assert ours == theirs


@pytest.mark.parametrize('kw', [dict(arch='llama', rope_freqs=True), dict(arch='qwen2', tied=True),
    dict(arch='qwen2', leave_out=[f'blk.{i}.attn_{n}.bias' for i in range(3) for n in 'qkv']),
    dict(arch='llama', biases=['attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_gate', 'ffn_up', 'ffn_down']),
    dict(arch='llama', keys={'llama.attention.head_count': [4]*3, 'llama.attention.head_count_kv': [2]*3,
        'llama.feed_forward_length': [96]*3}),
    dict(arch='gpt-oss', n_expert=8, n_expert_used=4, window=128), dict(arch='gpt-oss', window=1)], ids=str)
def test_variants(tmp_path, kw): assert compare(make_model(tmp_path/'m.gguf', n_layer=3, **HEADS['64'], **kw))[0][0] < 1e-3


@pytest.mark.parametrize('yarn', [(4., 32), (4., 64), (8., 2048), (40., 4096), (.5, 64)], ids=str)
@pytest.mark.parametrize('arch', ARCHES)
def test_yarn(tmp_path, arch, yarn):
    "Ramps that begin at the first pair, in the middle, that end beyond the last one; and what multiplies cos and sin"
    for keys in ({}, {f'{arch}.rope.scaling.attn_factor': .75}):
        assert compare(make_model(tmp_path/'m.gguf', arch, yarn=yarn, keys=keys, **HEADS['64']), 100)[0][0] < 1e-3


@pytest.mark.parametrize('types', ['F16', 'BF16', 'Q4_0', 'Q5_0', 'Q8_0', 'Q4_K', 'Q6_K'])
def test_quantised(tmp_path, types):
    "llama.cpp rounds activations to 8 bits before it multiplies, so the logits differ by some percent; with a wrong layout it would be 100"
    assert compare(make_model(tmp_path/'m.gguf', 'qwen2', types=types, **HEADS['64'], n_ff=256))[0][1] < .08


def test_mxfp4_experts(tmp_path):
    path = make_model(tmp_path/'m.gguf', 'gpt-oss', types={'exps': 'MXFP4', '': 'Q8_0'}, **HEADS['64'], n_expert=4, n_expert_used=4)
    assert compare(path)[0][1] < .08


OURS = sorted([*(ROOT/'orcd'/'demo').glob('*.gguf'), *(ROOT/'tests'/'models').rglob('*.gguf')])

@pytest.mark.parametrize('path', OURS, ids=lambda p: p.stem)
def test_trained(path):
    "Others can read our files, and write the same haiku"
    from orcd.text.tokenizer import Tokenizer
    with GGUF(path) as g, reference(g) as ours, llama_cpp_ctypes.LlamaCpp(path) as theirs:
        tok = Tokenizer.from_gguf(g)
        ids = tok.encode_chat([{'role': 'user', 'content': 'Write a haiku about GPU computing'}])
        want, got = theirs.logits(ids), ours.logits(ids)
        assert (got - want).std()/want.std() < .08
        ours.prefill(ids)
        haiku = []
        for i, *_ in ours.decode(SamplingParams(temperature=0.), 60):
            if i in tok.stop_ids: break
            haiku.append(i)
        assert tok.decode(theirs.greedy(ids, 60, tok.stop_ids)) == tok.decode(haiku)
