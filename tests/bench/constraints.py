"""What a constraint costs the host: a vocabulary of 151,646 tokens made at random, the masks of one answer again and again

    python tests/bench/constraints.py"""
import random, time
from types import SimpleNamespace
import numpy as np
from orcd.text import constraint
from orcd.text.tokenizer import ALPHABET, Tokenizer

TEMPLATE = '{% for m in messages %}{{ m.content }}{% endfor %}{% for t in tools %}<tool_call>{{ t.function.name }}{% endfor %}'
TEXT = '{"city": "Bern", "n": 12, "tags": ["red and green", "a longer sentence, of some words"]}'
PROPERTIES = dict(city=dict(type='string'), n=dict(type='integer'), tags=dict(type='array', items=dict(type='string')))
SCHEMA = dict(type='object', properties=PROPERTIES, required=[*PROPERTIES], additionalProperties=False)


def tokenizer(n=151_643):
    "Byte-level BPE whose tokens are pairs of others, short ones for the most part"
    rng, tokens, merges = random.Random(0), dict.fromkeys(ALPHABET.values()), []
    pool = [ALPHABET[b] for b in b' etaoinshrdlucmfwypvbgkjqxz0123456789{}":,.[]_-'] + list(tokens)
    while len(tokens) < n:
        a, b = rng.choice(pool[:40_000]), rng.choice(pool[:3000])
        if a + b in tokens or len(a + b) > 16: continue
        tokens[a + b] = None
        merges.append(f'{a} {b}')
        pool.append(a + b)
    m = dict(model='gpt2', pre='gpt-2', tokens=[*tokens, '<|im_end|>', '<tool_call>', '</tool_call>'], merges=merges, eos_token_id=n,
        token_type=[1] * n + [3, 4, 4])
    m = {'tokenizer.ggml.' + k: v for k, v in m.items()} | {'tokenizer.chat_template': TEMPLATE}
    return Tokenizer.from_gguf(SimpleNamespace(path=None, metadata=m))


def timed(f, *args):
    began = time.perf_counter()
    return f(*args), time.perf_counter() - began


def main(n=151_643, rounds=40):
    tok, masks = tokenizer(n), []
    print(f'vocabulary {min(timed(constraint.Vocabulary, tok)[1] for _ in range(3)):.2f} s')
    asked = dict(type='json_schema', json_schema=dict(schema=SCHEMA))
    constraint.compile(tok, asked)
    ids = tok.encode(TEXT, add_special=False, parse_special=False)
    for _ in range(rounds):
        guide = constraint.compile(tok, asked)
        for i in ids:
            bits, took = timed(guide.mask)
            assert bits[i // 32] >> i % 32 & 1
            masks.append(took)
            guide.commit(i)
    shares = ', '.join(f'{share}%: {np.percentile(masks, share) * 1e6:.0f}' for share in (10, 50, 90, 99))
    print(f'a mask {np.mean(masks) * 1e6:.0f} µs ({shares})')


if __name__ == '__main__': main()
