"""Mutate small GGUF files and open every one. Prints how it went as JSON; exit 1 with the case when something else happens than

- a `GGUFError` of one line, or
- a file that is consistent: tensors inside the file, no overlap, metadata that decodes (or says why not), weights that dequantise.

Run by test_gguf.py in a process of its own. Deterministic: the seed of a case is its number.
"""
import json, random, re, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from orcd.errors import GGUFError
from orcd.files.gguf import GGUF
import gguf_files as gf
from speed import cost, processor, unit

UNIT = min(processor(unit) for _ in range(5))
VALUES = [0, 1, 2, 7, 255, 256, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 48, (1 << 63) - 1, 1 << 63,
    (1 << 64) - 8, (1 << 64) - 1]


def mutate(data, rng, header):
    "One to three random changes, most of them in the header"
    d = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(min(header, len(d)) if rng.random() < .9 else len(d)) if d else 0
        kind = rng.randrange(7)
        if kind == 0: d[at:at + 1] = bytes([d[at] ^ 1 << rng.randrange(8)])
        elif kind == 1: d[at:at + 1] = bytes([rng.randrange(256)])
        elif kind == 2: d[at:at + 8] = (rng.choice(VALUES) + rng.randrange(3)).to_bytes(9, 'little')[:8]
        elif kind == 3: d[at:at + 4] = (rng.choice(VALUES) & 0xffffffff).to_bytes(4, 'little')
        elif kind == 4: del d[at:]
        elif kind == 5: del d[at:at + rng.randrange(1, 40)]
        else:
            src = rng.randrange(len(d))
            d[at:at] = d[src:src + rng.randrange(1, 200)]
        if not d: break
    return bytes(d)


def consistent(g):
    "Is what an accepted file says true?"
    assert sum(size for size, _ in g.part_sizes()) == g.file_size and len(g.filenos()) == len(g.part_sizes())
    ends = [start for _, start in g.part_sizes()]
    alone = len(ends) == 1
    for t in sorted(g.tensors.values(), key=lambda t: t.position):
        assert t.offset >= ends[t.part] and (not alone or t.offset % g.alignment == g.data_offset % g.alignment == 0), t
        assert t.n_bytes > 0 and t.dims[0] % t.type.block_size == 0, t
        ends[t.part] = end = t.offset + t.n_bytes
        if g.has_data:
            assert end <= g.part_sizes()[t.part][0], t
            assert g.blocks(t.name).nbytes == t.n_bytes and g.dequantize(t.name).shape == t.shape, t
    for k in g.metadata:
        try: v = g.metadata[k]
        except GGUFError as e: assert '\n' not in str(e); continue
        kind = g.metadata.kind(k)
        if kind[2] is not None: assert len(v) == kind[2], k
    repr(g); g._repr_html_(); g.check_unchanged()


def attempt(path, data, count, opened):
    "Write one file, open it or another part of it"
    path.write_bytes(data)
    def look():
        try:
            with GGUF(opened) as g: consistent(g)
            return 'accepted'
        except GGUFError as e:
            assert '\n' not in str(e) and len(str(e)) < 1000, str(e)
            return 'refused'
    began = time.thread_time()
    count[look()] += 1
    # a slow one is looked at again: was it the file?
    if time.thread_time() - began > count['slowest'] * UNIT: count['slowest'] = max(count['slowest'], cost(look))
    count['files'] += 1


def main(folder):
    folder, count = Path(folder), dict(files=0, accepted=0, refused=0, slowest=0.)
    gf.small(folder / 'good.gguf', long=100)
    with GGUF(folder / 'good.gguf') as g: header = g.data_offset
    tiny = gf.raw([gf.pair('general.architecture', gf.STR, 'x'), gf.pair('general.alignment', gf.U32, 32),
        gf.pair('tokenizer.ggml.tokens', gf.ARR, gf.array(gf.STR, 'abc')),
        gf.pair('tokenizer.ggml.scores', gf.ARR, gf.array(gf.F32, [1, 2, 3])), gf.pair('tokenizer.ggml.eos_token_id', gf.U32, 2)],
        [gf.tensor('a', (32, 2), 2, 0), gf.tensor('b', (4, 2, 2), 0, 64)], bytes(128))
    good = (folder / 'good.gguf').read_bytes()
    path = folder / 'x.gguf'
    def cases():
        for at in range(len(tiny)):                                # every length field, count and type is hit by some of these
            for v in VALUES: yield tiny[:at] + v.to_bytes(9, 'little')[:8] + tiny[at + 8:]
            yield tiny[:at]
        for seed in range(4000):
            rng = random.Random(seed)
            yield mutate(tiny, rng, len(tiny) - 128) if seed % 4 else mutate(good, rng, header)
    parts = [folder / f'p-{i + 1:05}-of-00002.gguf' for i in range(2)]
    split = lambda i: [gf.pair('split.count', gf.U16, 2), gf.pair('split.no', gf.U16, i), gf.pair('split.tensors.count', gf.I32, 2)]
    own = [gf.raw([gf.pair('general.architecture', gf.STR, 'x'), *split(0)], [gf.tensor('a', (32, 2), 2, 0)], bytes(64)),
        gf.raw(split(1), [gf.tensor('b', (4, 2, 2), 0, 0)], bytes(64))]
    def cases_of_parts():
        for i in range(2):
            for at in range(len(own[i])):
                for v in VALUES: yield parts[i], own[i], own[i][:at] + v.to_bytes(9, 'little')[:8] + own[i][at + 8:]
                yield parts[i], own[i], own[i][:at]
            for seed in range(500): yield parts[i], own[i], mutate(own[i], random.Random(seed), len(own[i]) - 64)
    def one(i, path, data, opened):
        try: attempt(path, data, count, opened)
        except BaseException:
            (folder / 'culprit.gguf').write_bytes(data)
            print(f'case {i}', file=sys.stderr)
            raise
    for i, data in enumerate(cases()): one(i, path, data, path)
    for p, data in zip(parts, own): p.write_bytes(data)
    with GGUF(parts[1]) as g: consistent(g)
    before = dict(count)
    for i, (p, good, data) in enumerate(cases_of_parts()):
        one(i, p, data, parts[i % 2])
        p.write_bytes(good)
    count['parts_accepted'] = count['accepted'] - before['accepted']
    status = Path('/proc/self/status').read_text() # ru_maxrss would count what the parent had when it forked
    count['peak_mb'] = int(re.search(r'VmHWM:\s+(\d+)', status)[1])/1024
    print(json.dumps(count))


if __name__ == '__main__': main(sys.argv[1])
