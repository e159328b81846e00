"Small GGUF files for tests: well-formed ones from the gguf package, malformed ones byte by byte"
import struct
import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
_code = {U8: 'B', I8: 'b', U16: 'H', I16: 'h', U32: 'I', I32: 'i', F32: 'f', BOOL: 'B', U64: 'Q', I64: 'q', F64: 'd'}


def u32(x): return struct.pack('<I', x)
def u64(x): return struct.pack('<Q', x)
def string(s):
    s = s.encode() if isinstance(s, str) else s
    return u64(len(s)) + s
def number(t, x): return struct.pack('<' + _code[t], x)
def array(t, xs): return u32(t) + u64(len(xs)) + b''.join(string(x) if t == STR else number(t, x) for x in xs)
def pair(key, t, v): return string(key) + u32(t) + (string(v) if t == STR else v if t == ARR else number(t, v))
def tensor(name, dims, t, offset): return string(name) + u32(len(dims)) + b''.join(map(u64, dims)) + u32(t) + u64(offset)


def raw(pairs=(), tensors=(), data=b'', align=32, version=3, n_tensors=None, n_pairs=None, magic=b'GGUF'):
    "The bytes of a file from encoded pairs and table entries"
    head = magic + u32(version) + u64(len(tensors) if n_tensors is None else n_tensors) + u64(len(pairs) if n_pairs is None else n_pairs)
    head += b''.join(pairs) + b''.join(tensors)
    return head + b'\0' * (-len(head) % align if data else 0) + data


def small(path, seed=0, alignment=None, long=100_000):
    "A file with every metadata type and tensors of every type, by gguf's writer. Returns {name: (type name, float32 weights or None)}"
    import gguf
    from orcd.files.quants import quantize
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, 'qwen2')
    for t in ('uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'uint64', 'int64'):
        info = np.iinfo(t)
        getattr(w, f'add_{t}')(f'a.{t}.low', int(info.min)); getattr(w, f'add_{t}')(f'a.{t}.high', int(info.max))
    w.add_float32('a.float32', 1.5); w.add_float64('a.float64', -1e300); w.add_bool('a.true', True); w.add_bool('a.false', False)
    w.add_string('a.text', 'Grüße, 世界 🙂'); w.add_string('a.long', 'x' * long)
    w.add_array('a.ints', [-3, 0, 7]); w.add_array('a.floats', [.5, -2.25]); w.add_array('a.bools', [True, False, True])
    w.add_array('a.texts', ['', 'a', 'ü', '🙂' * 5])
    n = 50
    w.add_tokenizer_model('gpt2'); w.add_token_list([f'tok{i}' for i in range(n)]); w.add_token_scores([float(-i) for i in range(n)])
    w.add_token_types([1] * n); w.add_token_merges(['a b', 'c d']); w.add_bos_token_id(n - 1); w.add_add_bos_token(True)
    if alignment: w.add_custom_alignment(alignment)
    out = {}
    for t in gguf.GGMLQuantizationType:
        if t.name not in ('F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q4_K', 'Q5_K', 'Q6_K', 'MXFP4'): continue
        x = rng.standard_normal((3, 512)).astype(np.float32)
        if t.name == 'F32': w.add_tensor('t.F32', x)
        elif t.name == 'F16': w.add_tensor('t.F16', x.astype(np.float16))
        else: w.add_tensor(f't.{t.name}', quantize(x, t.name), raw_dtype=t)
        out[f't.{t.name}'] = (t.name, x)
    x = rng.standard_normal((2, 3, 64)).astype(np.float32)
    w.add_tensor('experts', quantize(x, 'Q8_0'), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    w.add_tensor('odd', rng.standard_normal(7).astype(np.float32))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return out


def split(path, out, n, **more):
    "The same model in parts of n tensors, by gguf's reader and writer. Returns their paths in order."
    import gguf
    r = gguf.GGUFReader(path)
    w = gguf.GGUFWriter(out, r.fields['general.architecture'].contents(), split_max_tensors=n, **more)
    for f in r.fields.values():
        if f.name.startswith('GGUF.') or f.name == 'general.architecture': continue
        w.add_key_value(f.name, f.contents(), f.types[0], sub_type=f.types[-1] if f.types[0] == gguf.GGUFValueType.ARRAY else None)
    for t in r.tensors: w.add_tensor(t.name, t.data, raw_shape=t.data.shape, raw_dtype=t.tensor_type)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return sorted(out.parent.glob(f'{out.stem}-*-of-*.gguf'))
