"The GGUF reader against the gguf package's, against published headers and against liars"
import json, os, struct, subprocess, sys, threading
from collections import Counter
from pathlib import Path
import numpy as np, pytest
from orcd.errors import GGUFError, MissingError, OrcdError
from orcd.files import hub
from orcd.files.gguf import GGUF, GGUFType, MAX_STRINGS
from conftest import PUBLISHED
from doubling import doubling
from gguf_files import ARR, BOOL, F32, F64, I32, STR, U8, U16, U32, U64, array, pair, raw, small, string, tensor, u32, u64
from speed import cost

gguf = pytest.importorskip('gguf')


def write(folder, data, name='x.gguf'):
    p = Path(folder) / name
    p.write_bytes(data)
    return p


def refused(file, *words, path=None):
    "Opening fails with one line that says all of these words, and names the file, or another one"
    with pytest.raises(GGUFError) as e: GGUF(file)
    text, path = str(e.value), path or file
    assert '\n' not in text and all(w in text for w in words), text
    assert text.lstrip("'").startswith(str(path).replace('\0', '\\x00'))
    assert e.value.code == 'MODEL_LOAD_FAILED' and isinstance(e.value, OrcdError)
    return text


# --- beside the gguf package -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('alignment', [None, 64, 4096])
def test_same_as_gguf_py(tmp_path, alignment):
    small(tmp_path / 'x.gguf', alignment=alignment)
    theirs = gguf.GGUFReader(tmp_path / 'x.gguf')
    with GGUF(tmp_path / 'x.gguf') as g:
        keys = {k: f for k, f in theirs.fields.items() if not k.startswith('GGUF.')}
        assert list(g.metadata) == list(keys) and g.alignment == (alignment or 32) and g.data_offset == theirs.data_offset
        for k, f in keys.items():
            kind, value, want = g.metadata.kind(k), g.metadata[k], f.contents()
            assert kind[0] == int(f.types[0]) and kind[1] == (int(f.types[1]) if len(f.types) > 1 else None), k
            if isinstance(value, np.ndarray): value = value.tolist()
            assert value == want and type(value) is type(want), k
        assert list(g.tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            o = g.tensors[t.name]
            assert o.type == int(t.tensor_type) and o.type.name == t.tensor_type.name
            assert o.dims == tuple(t.shape.tolist()) and o.shape == o.dims[::-1]
            assert (o.n_bytes, o.offset, o.n_elements) == (t.n_bytes, t.data_offset, t.n_elements)
            assert g.blocks(t.name).tobytes() == t.data.tobytes()
            want = gguf.quants.dequantize(t.data, t.tensor_type).reshape(o.shape)
            got = g.dequantize(t.name)
            assert got.dtype == np.float32 and got.shape == o.shape and np.array_equal(got, want)


def test_arrays_are_lazy_and_survive_close(tmp_path):
    small(tmp_path / 'x.gguf')
    g = GGUF(tmp_path / 'x.gguf')
    assert g.metadata.kind('tokenizer.ggml.tokens') == (GGUFType.ARRAY, GGUFType.STRING, 50)
    tokens, blocks = g.metadata['tokenizer.ggml.tokens'], g.blocks('t.Q8_0')
    assert g.metadata['tokenizer.ggml.tokens'] is tokens
    assert not blocks.flags.writeable and blocks.base is not None
    copy = blocks.copy()
    g.close(); g.close()
    assert np.array_equal(blocks, copy) and tokens[7] == 'tok7'      # the view keeps the mapping
    for f in (lambda: g.metadata['a.ints'], lambda: g.blocks('t.Q8_0'), g.check_unchanged):
        with pytest.raises(GGUFError, match='closed'): f()
    with pytest.raises(KeyError): g.metadata['nothing']
    assert g.metadata.get('nothing', 5) == 5 and 'nothing' not in g.metadata and g.metadata.kind('nothing') == (None, None, None)


def test_repr_shows_no_folder(tmp_path):
    small(tmp_path / 'x.gguf')
    with GGUF(tmp_path / 'x.gguf') as g:
        assert repr(g).startswith('GGUF(x.gguf: qwen2, 14 tensors') and str(tmp_path) not in repr(g) + g._repr_html_()
        assert '<td>Q8_0</td><td>2</td>' in g._repr_html_()


# --- published headers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', PUBLISHED)
def test_published_header(shared, headers, name):
    want = json.loads((shared / f'{name}.json').read_text())
    with GGUF(headers / f'{name}.gguf') as g:
        assert len(g.tensors) == want['n_tensors'] and len(g.metadata) == want['n_kv'] == len(want['kv'])
        assert g.data_offset == want['data_offset'] == g.file_size and g.alignment == want['alignment'] and not g.has_data
        assert dict(Counter(t.type.name for t in g.tensors.values())) == want['type_counts']
        last = max(g.tensors.values(), key=lambda t: t.offset)
        assert last.offset + last.n_bytes == want['file_bytes']
        assert sum(t.n_elements for t in g.tensors.values()) == want['arch']['params']
        n_layer, rows = want['arch']['n_layer'], {}
        for t in want['tensors']:
            layers = range(n_layer) if t['layers'] == 'all' else t['layers'] or ['']
            rows |= {t['pattern'].replace('{i}', str(i)): t for i in layers}
        assert set(rows) == set(g.tensors)
        for n, t in rows.items():
            o = g.tensors[n]
            assert (list(o.dims), o.type.name, int(o.type), o.n_bytes) == (t['ne'], t['type'], t['ggml_type_id'], t['bytes_each']), n
        with pytest.raises(GGUFError, match='header without tensor data'): g.blocks('token_embd.weight')
        check_values(g, want['kv'])


NAMES = dict(str='string', bool='bool', f32='float32', f64='float64', u8='uint8', u16='uint16', u32='uint32', u64='uint64', i32='int32')


def check_values(g, pairs):
    "Type of every pair, length of every array, value of every scalar in the manifest"
    for kv in pairs:
        kind, element, n = g.metadata.kind(kv['key'])
        if kind == GGUFType.ARRAY:
            assert kv['type'] in (f'arr[{k},{n}]' for k, v in NAMES.items() if v == str(element)), kv['key']
            continue
        assert NAMES[kv['type']] == str(kind), kv['key']
        value = g.metadata[kv['key']]
        if kv['key'] == 'tokenizer.chat_template': assert kv['value'].startswith(f'{len(value.encode())} bytes')   # told in words
        elif isinstance(value, float): assert value == pytest.approx(float(kv['value']), rel=1e-6), kv['key']
        else: assert value == kv['value'], kv['key']


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_vocabulary(headers, name):
    "Vocabulary and merges, element for element, against a plain loop over the bytes"
    data = (headers / f'{name}.gguf').read_bytes()
    with GGUF(headers / f'{name}.gguf') as g:
        for key in ('tokenizer.ggml.tokens', 'tokenizer.ggml.merges'):
            if key not in g.metadata: continue
            p = data.index(string(key)) + 8 + len(key)
            assert struct.unpack_from('<II', data, p) == (ARR, STR)
            n, = struct.unpack_from('<Q', data, p + 8); p += 16
            want = []
            for _ in range(n):
                k, = struct.unpack_from('<Q', data, p)
                want.append(data[p + 8:p + 8 + k].decode()); p += 8 + k
            assert g.metadata[key] == want
        assert len(g.metadata['tokenizer.ggml.token_type']) == len(g.metadata['tokenizer.ggml.tokens'])


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_header_opens_fast(headers, name):
    "Some ten milliseconds: arrays are walked, not read"
    assert cost(lambda: GGUF(headers / f'{name}.gguf').close()) < 70


# --- what is refused -------------------------------------------------------------------------------------------------

ONE = pair('general.architecture', STR, 'qwen2')
F = lambda name='w', dims=(32,), t=0, offset=0: tensor(name, dims, t, offset)
DATA = bytes(128)
TOKENS = lambda n: pair('tokenizer.ggml.tokens', ARR, array(STR, [f't{i}' for i in range(n)]))

LIARS = {
    'empty': (b'', 'the magic needs 4 bytes'),
    'not_gguf': (b'PK\3\4' + bytes(100), 'not a GGUF file'),
    'older_format': (b'tjgg' + bytes(100), 'before GGUF'),
    'short': (b'GGUF' + u32(3) + u64(0), 'the counts', 'cut off'),
    'version_0': (raw(version=0), 'version 0', 'versions 2 and 3 are read'),
    'version_1': (raw(version=1), 'version 1', 'convert the model again'),
    'version_4': (raw(version=4), 'version 4', 'versions 2 and 3 are read'),
    'big_endian': (b'GGUF' + b'\0\0\0\3' + bytes(16), 'big-endian'),
    'many_tensors': (raw(n_tensors=1 << 62), 'tensors', 'are allowed'),
    'many_pairs': (raw(n_pairs=1 << 62), 'metadata pairs', 'are allowed'),
    'more_pairs_than_bytes': (raw([ONE], n_pairs=1000), 'a list of 1000 metadata pairs'),
    'pairs_missing': (raw([ONE], n_pairs=2), 'cut off'),
    'empty_key': (raw([pair('', U32, 1)]), 'the key of metadata entry 0', '0 bytes'),
    'long_key': (raw([pair('k' * 70_000, U32, 1)]), 'the key of metadata entry 0 is 70000 bytes'),
    'key_not_utf8': (raw([pair(b'\xff\xfe', U32, 1)]), 'not valid UTF-8'),
    'key_with_newline': (raw([pair('a\nb', U32, 1)]), 'control characters', 'a\\nb'),
    'same_key': (raw([ONE, ONE]), 'general.architecture appears twice'),
    'unknown_type': (raw([string('k') + u32(13) + bytes(8)]), 'k has unknown type 13'),
    'bool_2': (raw([pair('k', BOOL, 2)]), 'boolean with the value 2'),
    'text_too_long': (raw([string('k') + u32(STR) + u64(1 << 63)]), 'k needs'),
    'nested_array': (raw([string('k') + u32(ARR) + u32(ARR) + u64(1)]), 'array of arrays'),
    'array_unknown_type': (raw([string('k') + u32(ARR) + u32(77) + u64(1)]), 'elements of unknown type 77'),
    'array_too_long': (raw([string('k') + u32(ARR) + u32(U64) + u64(1 << 61)]), 'k needs'),
    'strings_too_many': (raw([string('k') + u32(ARR) + u32(STR) + u64(1 << 60)]), 'strings', 'are allowed'),
    'strings_more_than_bytes': (raw([string('k') + u32(ARR) + u32(STR) + u64(MAX_STRINGS)]), 'k needs'),
    'string_in_array_too_long': (raw([string('k') + u32(ARR) + u32(STR) + u64(2) + u64(1 << 64 - 1) + bytes(64)]), 'a string of k claims'),
    'alignment_0': (raw([pair('general.alignment', U32, 0)]), 'general.alignment', 'power of two'),
    'alignment_48': (raw([pair('general.alignment', U32, 48)]), 'general.alignment', 'not 48'),
    'alignment_huge': (raw([pair('general.alignment', U32, 1 << 31)]), 'general.alignment'),
    'alignment_text': (raw([pair('general.alignment', STR, '32')]), 'general.alignment must be a uint32'),
    'architecture_number': (raw([pair('general.architecture', U32, 7)]), 'general.architecture must be a string, not uint32'),
    'architecture_list': (raw([pair('general.architecture', ARR, array(I32, [1, 2]))]),
        'general.architecture must be a string, not array of int32'),
    'tokenizer_list': (raw([pair('tokenizer.ggml.model', ARR, array(STR, ['gpt2']))]),
        'tokenizer.ggml.model must be a string, not array of string'),
    'pre_empty_list': (raw([pair('tokenizer.ggml.pre', ARR, array(F32, []))]), 'tokenizer.ggml.pre must be a string'),
    'empty_name': (raw([], [F('')], DATA), 'the name of tensor 0'),
    'long_name': (raw([], [F('n' * 64)], DATA), 'the name of tensor 0 is 64 bytes'),
    'same_name': (raw([], [F(), F(offset=128)], DATA * 2), 'the tensor w appears twice'),
    'no_dims': (raw([], [F(dims=())], DATA), '0 dimensions'),
    'five_dims': (raw([], [F(dims=(2, 2, 2, 2, 2))], DATA), '5 dimensions'),
    'zero_dim': (raw([], [F(dims=(32, 0))], DATA), 'impossible dimensions'),
    'overflowing_dims': (raw([], [F(dims=(1 << 32, 1 << 32))], DATA), 'impossible dimensions'),
    'wrapping_dims': (raw([], [F(dims=(1 << 63, 2))], DATA), 'impossible dimensions'),
    'type_gone': (raw([], [F(t=4)], DATA), "w: tensor type 4 (Q4_2, or another program's own MXFP4) is not supported"),
    'type_unknown': (raw([], [F(t=250)], DATA), 'w: tensor type 250 is not supported'),
    'type_unsupported': (raw([], [F(t=10, dims=(256,))], DATA), 'Q2_K', 'supported: F32'),
    'half_block': (raw([], [F(t=2, dims=(48,))], DATA), 'no whole number of Q4_0 blocks'),
    'unaligned': (raw([], [F(offset=16)], DATA * 2), 'no multiple of the alignment 32'),
    'outside': (raw([], [F(dims=(1024,))], DATA), 'w ends at byte', 'download it again'),
    'far_outside': (raw([], [F(offset=(1 << 64) - 32)], DATA), 'w ends at byte'),
    'overlap': (raw([], [F(dims=(64,)), F('v', offset=128)], DATA * 3), 'v overlaps'),
    'table_cut': (raw([], [F()])[:-4], 'cut off'),
    'scores_short': (raw([TOKENS(3), pair('tokenizer.ggml.scores', ARR, array(F32, [1.]))]), 'scores has 1 entries for 3 tokens'),
    'types_wrong': (raw([pair('tokenizer.ggml.token_type', ARR, array(F32, [1.]))]), 'must be an array of', 'not array of float32'),
    'tokens_numbers': (raw([pair('tokenizer.ggml.tokens', ARR, array(U32, [1]))]), 'tokenizer.ggml.tokens must be an array of string'),
    'tokens_scalar': (raw([pair('tokenizer.ggml.tokens', U32, 1)]), 'tokenizer.ggml.tokens must be an array of string, not uint32'),
    'eos_outside': (raw([TOKENS(3), pair('tokenizer.ggml.eos_token_id', U32, 3)]), 'eos_token_id is 3, outside the vocabulary of 3'),
    'eos_negative': (raw([TOKENS(3), pair('tokenizer.ggml.eos_token_id', I32, -1)]), 'eos_token_id is -1'),
    'eos_text': (raw([TOKENS(3), pair('tokenizer.ggml.eos_token_id', STR, '1')]), 'eos_token_id must be an integer, not string'),
    'split_text': (raw([pair('split.count', STR, '3')]), 'split.count must be an integer'),
}


@pytest.mark.parametrize('case', LIARS)
def test_liars(tmp_path, case):
    data, *words = LIARS[case]
    write(tmp_path, data)
    assert cost(lambda: refused(tmp_path / 'x.gguf', *words)) < 10


def test_truth_beside_the_lies(tmp_path):
    "The builder's well-formed files open: what is refused above is refused for the one thing that is wrong"
    g = GGUF(write(tmp_path, raw([ONE, TOKENS(3), pair('tokenizer.ggml.eos_token_id', U32, 2)], [F(), F('v', offset=128)], DATA * 2)))
    assert list(g.tensors) == ['w', 'v'] and g.has_data and not g.dequantize('v').any()
    assert GGUF(write(tmp_path, raw())).tensors == {}
    assert GGUF(write(tmp_path, raw([pair('k', ARR, array(STR, []))]))).metadata['k'] == []
    packed = raw([pair('general.alignment', U32, 1)], [F(offset=3)], bytes(131), align=1)
    assert GGUF(write(tmp_path, packed)).dequantize('w').shape == (32,)


def test_lazy_values_are_checked_when_asked_for(tmp_path):
    g = GGUF(write(tmp_path, raw([pair('t', ARR, array(STR, [b'ok', b'\xff'])), pair('b', ARR, array(BOOL, [1, 2]))])))
    for key, words in (('t', 't holds text that is not valid UTF-8'), ('b', 'b holds a boolean')):
        with pytest.raises(GGUFError, match=words): g.metadata[key]


def test_version_2_is_version_3(tmp_path):
    "Nothing that a little-endian file uses differs"
    small(tmp_path / 'x.gguf')
    data = (tmp_path / 'x.gguf').read_bytes()
    assert data[4:8] == u32(3)
    new, old = GGUF(tmp_path / 'x.gguf'), GGUF(write(tmp_path, data[:4] + u32(2) + data[8:], 'old.gguf'))
    assert old.tensors == new.tensors and list(old.metadata) == list(new.metadata)
    assert all(np.array_equal(old.dequantize(t), new.dequantize(t)) for t in new.tensors)
    big = data[:4] + struct.pack('>I', 2) + data[8:]
    refused(write(tmp_path, big, 'big.gguf'), 'big-endian')


LATIN, UTF_16, MARK = 'Größe'.encode('latin-1'), 'Größe'.encode('utf-16'), '\ufeffGröße'.encode()


@pytest.mark.parametrize('size', [1, 20_000])
@pytest.mark.parametrize('text', [LATIN, UTF_16, MARK])
def test_descriptions_in_other_encodings(tmp_path, text, size):
    """They stop nothing; what they say is shown as well as it goes. What is needed is an error when it is asked for. Tokens keep their
    bytes."""
    needed = 'general.architecture', 'tokenizer.chat_template', 'some.key'
    keys = [pair(k, STR, text*size) for k in ('general.description', *needed)]
    keys += [pair(k, ARR, array(STR, ['a', text]*1000)) for k in ('general.tags', 'tokenizer.ggml.tokens')]
    g = GGUF(write(tmp_path, raw([*keys, pair('after', U32, 7)], [F()], DATA)))
    m = g.metadata
    assert m['after'] == 7 and not g.dequantize('w').any()
    assert m['general.description'] == text.decode(errors='replace')*size
    assert m['general.tags'] == ['a', text.decode(errors='replace')]*1000
    assert [s.encode(errors='surrogateescape') for s in m['tokenizer.ggml.tokens']] == [b'a', text]*1000
    for k in needed:
        if text == MARK: assert m[k] == text.decode()*size, k    # a mark is a character like others
        else:
            with pytest.raises(GGUFError, match=f'{k} holds text that is not valid UTF-8'): m[k]
    assert '\n' not in repr(g)


def test_ids_that_nobody_uses(tmp_path):
    "Of padding, masks and the like many files say -1 or 2^32-1"
    unused = [pair(f'tokenizer.ggml.{k}_token_id', t, v) for k, t,
        v in (('padding', U32, 0xffffffff), ('seperator', I32, -1), ('mask', STR, 'none'), ('fim_pre', F32, .5))]
    assert GGUF(write(tmp_path, raw([ONE, TOKENS(3), *unused]))).metadata['tokenizer.ggml.padding_token_id'] == 0xffffffff
    for k in ('bos', 'eot', 'eom', 'unknown'):
        refused(write(tmp_path, raw([TOKENS(3), pair(f'tokenizer.ggml.{k}_token_id', U32, 3)])), f'{k}_token_id is 3')


def test_strings_across_windows(tmp_path):
    "Strings around and across the 1 MiB window, at every phase of the length field"
    for shift in range(0, 20, 3):
        texts = ['x' * (1 << 20) , 'y' * ((1 << 20) - 60 + shift), 'z', '', 'ü' * 700_000, 'end']
        g = GGUF(write(tmp_path, raw([pair('a' * (1 + shift), ARR, array(STR, texts)), pair('after', U32, 7)])))
        assert g.metadata['a' * (1 + shift)] == texts and g.metadata['after'] == 7


# --- files that are not files, or do not stay what they were -----------------------------------------------------------

def test_not_a_regular_file(tmp_path):
    refused(tmp_path, 'directory')
    refused(tmp_path / 'missing.gguf', 'no such file')
    refused('/dev/zero', 'not a regular file')
    os.mkfifo(tmp_path / 'fifo')
    said = []
    def look(): refused(tmp_path / 'fifo', 'not a regular file'); said.append(True)
    t = threading.Thread(target=look, daemon=True)     # whoever waits for a writer waits for ever
    t.start(); t.join(60)
    assert said
    refused('a\0b', 'null byte')
    write(tmp_path, raw()).chmod(0)
    if os.geteuid(): refused(tmp_path / 'x.gguf', 'cannot be opened')


def cut(path, n=2, seed=0, first=True):
    """A model in parts of `n` tensors, and the same one whole, by gguf's writer. Returns (paths of the parts, path of the whole). `first`:
    is there a tensor in the first part?"""
    w = [gguf.GGUFWriter(path / 'm.gguf', 'qwen2', split_max_tensors=n, small_first_shard=not first),
        gguf.GGUFWriter(path / 'whole.gguf', 'qwen2')]
    for x in w:
        rng = np.random.default_rng(seed)
        x.add_block_count(3); x.add_tokenizer_model('gpt2'); x.add_token_list([f'tok{i}' for i in range(2000)])
        for i, t in enumerate(('F32', 'Q8_0', 'F16', 'Q4_0', 'BF16')):
            data = rng.standard_normal((3 + i, 64)).astype(np.float32)
            x.add_tensor(f't{i}', gguf.quants.quantize(data, gguf.GGMLQuantizationType[t]), raw_dtype=gguf.GGMLQuantizationType[t])
        x.write_header_to_file(); x.write_kv_data_to_file(); x.write_tensors_to_file(); x.close()
    return sorted(path.glob('m-*.gguf')), path / 'whole.gguf'


@pytest.mark.parametrize('n, first', [(1, True), (2, True), (4, True), (2, False)])
def test_parts_are_one_model(tmp_path, n, first):
    "By whichever part it is opened"
    parts, whole = cut(tmp_path, n, first=first)
    assert len(parts) == -(-5 // n) + (not first)
    with GGUF(whole) as want:
        for p in parts:
            with GGUF(p) as g:
                assert g.path == str(parts[0]) and g.has_data and g.file_size == sum(q.stat().st_size for q in parts)
                assert list(g.tensors) == list(want.tensors)
                assert f'5 tensors, {len(g.metadata)} metadata' in repr(g) and f'in {len(parts)} files' in repr(g)
                for name, t in want.tensors.items():
                    mine = g.tensors[name]
                    assert (mine.type, mine.dims) == (t.type, t.dims)
                    assert np.array_equal(g.read(name), want.read(name)) and np.array_equal(g.blocks(name), want.read(name))
                    assert np.array_equal(g.dequantize(name), want.dequantize(name))
                    assert os.pread(g.filenos()[mine.part], mine.n_bytes, mine.offset) == want.read(name).tobytes()
                assert {k: v for k, v in g.metadata.items() if not k.startswith('split.')} == dict(want.metadata.items())
                g.check_unchanged()
    descriptors = len(os.listdir('/proc/self/fd'))
    for p in parts:
        g = GGUF(p)
        g.blocks('t0')
        g.close()
        assert len(os.listdir('/proc/self/fd')) == descriptors
        with pytest.raises(GGUFError, match='is closed'): g.read('t4')


def broken(case, parts, tmp_path):
    "Break one thing; returns the file that the message names, and words of it"
    a, b, c = (p.read_bytes() for p in parts)
    def other(key, new, data):
        at = data.index(key) + len(key) + 4
        return data[:at] + new + data[at + len(new):]
    match case:
        case 'missing': parts[2].unlink(); return parts[0], 'missing beside it: m-00003-of-00003.gguf'
        case 'two missing': parts[1].unlink(); parts[2].unlink(); return parts[0], 'm-00002-of-00003.gguf and 1 more'
        case 'swapped': parts[1].write_bytes(c); parts[2].write_bytes(b); return parts[1], 'part 3 of 3', 'part 2 of 3 by its name'
        case 'twice': parts[2].write_bytes(b); return parts[2], 'part 2 of 3', 'part 3 of 3 by its name'
        case 'extra': (tmp_path / 'm-00004-of-00003.gguf').write_bytes(c); return parts[0], 'm-00004-of-00003.gguf lies beside it: remove'
        case 'cut off': parts[1].write_bytes(b[:-40]); return parts[1], 'cut off, download it again'
        case 'cut in the table': parts[2].write_bytes(c[:90]); return parts[2], 'cut off'
        case 'cut to its header':
            os.truncate(parts[1], GGUF(parts[0]).part_sizes()[1][1])
            return parts[1], 'ends where its tensors should begin'
        case 'empty': parts[1].write_bytes(b''); return parts[1], 'the magic needs 4 bytes'
        case 'a folder': parts[1].unlink(); parts[1].mkdir(); return parts[1], 'directory'
        case 'dangling link': parts[1].unlink(); parts[1].symlink_to('nowhere'); return parts[1], 'no such file'
        case 'version 1': parts[1].write_bytes(b[:4] + u32(1) + b[8:]); return parts[1], 'version 1'
        case 'other count':
            parts[1].write_bytes(other(b'split.count', b'\4', b))
            return parts[1], 'part 2 of 4', 'part 2 of 3 by its name'
        case 'no such part': parts[1].write_bytes(other(b'split.no', b'\7', b)); return parts[1], 'split.no is 7'
        case 'too many parts': parts[0].write_bytes(other(b'split.count', b'\xff\x7f', a)); return parts[0], 'at most 256'
        case 'tensor count':
            parts[1].write_bytes(other(b'split.tensors.count', b'\6', b))
            return parts[1], 'split.tensors.count is not what'
        case 'tensors too few':
            for p, data in zip(parts, (a, b, c)): p.write_bytes(other(b'split.tensors.count', b'\6', data))
            return parts[0], 'hold 5 tensors, split.tensors.count says 6'
        case 'tensor in two parts': parts[1].write_bytes(b.replace(b't2', b't1')); return parts[1], 'the tensor t1 is in part 1 already'
        case 'whole model': parts[1].write_bytes((tmp_path / 'whole.gguf').read_bytes()); return parts[1], 'a model by itself'
        case 'other model':
            keys = [pair('split.no', U16, 1), pair('split.count', U16, 3), pair('split.tensors.count', I32, 5)]
            data = raw([*keys, pair('qwen2.block_count', U32, 4)], [F('t2'), F('t3', offset=128)], bytes(256))
            parts[1].write_bytes(data)
            return parts[1], 'qwen2.block_count is not what the first part says'
        case 'other tokens':
            keys = [pair('split.no', U16, 1), pair('split.count', U16, 3), pair('split.tensors.count', I32, 5)]
            tokens = pair('tokenizer.ggml.tokens', ARR, array(STR, [f'tok{i}' for i in range(1999)] + ['tokX']))
            parts[1].write_bytes(raw([*keys, tokens], [F('t2'), F('t3', offset=128)], bytes(256)))
            return parts[1], 'tokenizer.ggml.tokens is not what the first part says'
        case 'a key too much':
            keys = [pair('split.no', U16, 1), pair('split.count', U16, 3), pair('split.tensors.count', I32, 5), pair('qwen2.x', U32, 1)]
            parts[1].write_bytes(raw(keys, [F('t2'), F('t3', offset=128)], bytes(256)))
            return parts[1], 'qwen2.x is not in the first part'


@pytest.mark.parametrize('case', ['missing', 'two missing', 'swapped', 'twice', 'extra', 'cut off', 'cut in the table',
    'cut to its header', 'empty', 'a folder', 'dangling link', 'version 1', 'other count', 'no such part', 'too many parts',
    'tensor count', 'tensors too few', 'tensor in two parts', 'whole model', 'other model', 'other tokens', 'a key too much'])
def test_broken_parts(tmp_path, case):
    parts, _ = cut(tmp_path)
    named, *words = broken(case, parts, tmp_path)
    files = len(os.listdir('/proc/self/fd'))
    refused(parts[0], *words, path=named)
    assert len(os.listdir('/proc/self/fd')) == files, 'files stay open'


def test_parts_that_repeat_the_metadata(tmp_path):
    "Some programs write it into every part: it must be the same"
    parts, whole = cut(tmp_path)
    keys = [pair('split.count', U32, 3), pair('split.no', U32, 1), pair('split.tensors.count', U16, 5)]     # whatever integers they are
    tokens = pair('tokenizer.ggml.tokens', ARR, array(STR, [f'tok{i}' for i in range(2000)]))
    more = [pair('general.architecture', STR, 'qwen2'), pair('general.alignment', U32, 64), pair('qwen2.block_count', U32, 3), tokens]
    parts[1].write_bytes(raw([*keys, *more], [F('t2', (64,)), F('t3', offset=256)], bytes(384), align=64))
    assert GGUF(parts[2]).tensors['t2'].shape == (64,)


def test_names_of_parts(tmp_path):
    part = lambda i: raw([pair('split.no', U16, i), pair('split.count', U16, 3), pair('split.tensors.count', I32, 0)])
    refused(write(tmp_path, part(1), 'm.gguf'), 'part 2 of 3', 'a name like model-00002-of-00003.gguf')
    refused(write(tmp_path, part(1), 'm-2-of-3.gguf'), 'a name like')
    refused(write(tmp_path, part(1), 'm' * 250 + '.gguf'), 'a name like')
    odd = 'm-00001-of-00002\n[x]-%s'                         # what stands before is anybody's
    for i in range(3): p = write(tmp_path, part(i), f'{odd}-{i + 1:05}-of-00003.gguf')
    assert GGUF(p).tensors == {} and not GGUF(p).has_data
    here = os.getcwd()
    os.chdir(tmp_path)
    try: assert GGUF(p.name).path == f'{odd}-00001-of-00003.gguf'
    finally: os.chdir(here)
    alone = raw([pair('split.count', U16, 1), pair('split.no', U16, 0)], [F()], DATA)      # joined, or never cut
    assert GGUF(write(tmp_path, alone, 'x-00001-of-00001.gguf')).metadata['split.count'] == 1
    assert not GGUF(write(tmp_path, raw([pair('split.count', U16, 0)], [F()], DATA), 'x-00001-of-00007.gguf')).dequantize('w').any()
    for keys in ([pair('split.count', U16, 3)], [pair('split.count', U16, 3), pair('split.no', U16, 0)]):
        refused(write(tmp_path, raw(keys), 'y-00001-of-00003.gguf'), 'is missing: split the model again')
    refused(write(tmp_path, raw([pair('split.count', I32, -3)]), 'y-00001-of-00003.gguf'), 'split.count is -3')


@pytest.mark.parametrize('how', ['shrunk', 'written', 'replaced', 'deleted'])
def test_a_part_changed_while_open(tmp_path, how):
    parts, _ = cut(tmp_path)
    p, g = parts[1], GGUF(parts[0])
    g.check_unchanged()
    if how == 'shrunk': os.truncate(p, p.stat().st_size - 1)
    elif how == 'written': p.write_bytes(p.read_bytes()); os.utime(p, ns=(1, 1))
    elif how == 'replaced': os.replace(write(tmp_path, p.read_bytes(), 'y'), p)
    else: p.unlink()
    words = {'shrunk': 'shrank', 'written': 'written to'}.get(how, 'replaced or deleted')
    with pytest.raises(GGUFError, match=words) as e: g.check_unchanged()
    assert str(e.value).startswith(str(p))
    if how in ('shrunk', 'written'):
        with pytest.raises(GGUFError, match='m-00002-of-00003.gguf: '): g.read('t2')
    else: g.read('t2')
    g.read('t0')


@pytest.mark.parametrize('how', ['shrunk', 'written', 'replaced', 'deleted'])
def test_changed_while_open(tmp_path, how):
    p = tmp_path / 'x.gguf'
    small(p)
    g = GGUF(p)
    g.check_unchanged(); g.blocks('t.F32')
    if how == 'shrunk': os.truncate(p, 1000)
    elif how == 'written': p.write_bytes(p.read_bytes()); os.utime(p, ns=(1, 1))
    elif how == 'replaced': small(tmp_path / 'y.gguf'); os.replace(tmp_path / 'y.gguf', p)
    else: p.unlink()
    with pytest.raises(GGUFError, match={'shrunk': 'shrank', 'written': 'written to'}.get(how, 'replaced or deleted')): g.check_unchanged()
    if how in ('shrunk', 'written'):
        for f in (lambda: g.blocks('t.F32'), lambda: g.read('t.F32'), lambda: g.dequantize('t.F32'), lambda: g.metadata['a.texts']):
            with pytest.raises(GGUFError, match='x.gguf: '): f()
    else: assert np.array_equal(g.read('t.F32'), g.blocks('t.F32'))             # the open file is what it was


def test_read(tmp_path):
    "Rows of a tensor, copied; bounds are checked"
    small(tmp_path / 'x.gguf')
    g = GGUF(tmp_path / 'x.gguf')
    for name in g.tensors:
        all_rows, there = g.blocks(name), g.tensors[name].rows
        assert np.array_equal(g.read(name), all_rows) and np.array_equal(g.read(name, there - 1), all_rows[-1:])
        assert np.array_equal(g.read(name, 0, 1), all_rows[:1]) and not g.read(name).flags.writeable
        for bad in ((-1,), (there,), (0, there + 1), (0, 0), (1, -1)):
            with pytest.raises(GGUFError, match='are not among them'): g.read(name, *bad)
    assert GGUF(write(tmp_path, raw([pair('k', ARR, array(F32, []))]))).metadata['k'].shape == (0,)


def test_decoded_piece_by_piece(tmp_path, monkeypatch):
    "A tensor of many pieces, the last of them short"
    import orcd.files.gguf
    small(tmp_path / 'x.gguf')
    with GGUF(tmp_path / 'x.gguf') as g: whole = {n: g.dequantize(n) for n in g.tensors}
    for size in (1, 1000):
        monkeypatch.setattr(orcd.files.gguf, 'PIECE', size)
        with GGUF(tmp_path / 'x.gguf') as g:
            for n in g.tensors: assert np.array_equal(g.dequantize(n), whole[n])


def test_a_disk_that_fails(tmp_path, monkeypatch):
    small(tmp_path / 'x.gguf')
    g = GGUF(tmp_path / 'x.gguf')
    def broken(*_): raise OSError(5, 'Input/output error')
    monkeypatch.setattr(os, 'pread', broken)
    for f in (lambda: g.read('t.F32'), lambda: g.metadata['a.texts'], lambda: GGUF(tmp_path / 'x.gguf')):
        with pytest.raises(GGUFError, match='cannot be read: Input/output error'): f()


def test_reads_that_fall_short(tmp_path, monkeypatch):
    "A network's file system may give less than was asked for"
    small(tmp_path / 'x.gguf')
    with GGUF(tmp_path / 'x.gguf') as g: want = {n: g.dequantize(n) for n in g.tensors} | {k: g.metadata[k] for k in g.metadata}
    pread = os.pread
    monkeypatch.setattr(os, 'pread', lambda fd, n, at: pread(fd, min(n, 1 + at % 911), at))
    with GGUF(tmp_path / 'x.gguf') as g:
        got = {n: g.dequantize(n) for n in g.tensors} | {k: g.metadata[k] for k in g.metadata}
    assert all(np.array_equal(got[k], want[k]) for k in want)


CUTTER = """
import sys
path, n = sys.argv[1], int(sys.argv[2])
print('here', flush=True)
with open(path, 'r+b') as f:
    while True: f.truncate(n//4); f.truncate(n)      # cut off, and long again with holes
"""
READER = """
import sys
from orcd.errors import GGUFError
from orcd.files.gguf import GGUF
said = set()
for _ in range(4000):
    try:
        with GGUF(sys.argv[1]) as g:
            for name in g.tensors: g.dequantize(name); g.read(name)
            dict(g.metadata)
    except GGUFError as e: said.add(e.message.split(' ')[0]); assert str(e).startswith(sys.argv[1]), e
print(sorted(said))
"""


def test_a_file_that_is_cut_off_again_and_again(tmp_path):
    "Who reads it gets errors of one line, or the weights, and is never killed"
    small(tmp_path / 'x.gguf')
    path, env = str(tmp_path / 'x.gguf'), dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[2]))
    cutter = subprocess.Popen([sys.executable, '-c', CUTTER, path, str(os.path.getsize(path))], stdout=subprocess.PIPE)
    try:
        assert cutter.stdout.readline() == b'here\n'
        reader = subprocess.run([sys.executable, '-c', READER, path], capture_output=True, env=env)
    finally: cutter.kill(); cutter.communicate()
    assert reader.returncode == 0, (reader.returncode, reader.stderr[-500:])
    assert b'the' in reader.stdout, reader.stdout                       # it was seen


def test_header_only(tmp_path):
    p = tmp_path / 'x.gguf'
    small(p)
    full = GGUF(p)
    h = GGUF(write(tmp_path, p.read_bytes()[:full.data_offset], 'h.gguf'))
    assert full.has_data and not h.has_data and h.tensors == full.tensors
    with pytest.raises(GGUFError, match='header without tensor data'): h.dequantize('t.F32')
    cut = p.read_bytes()[:full.data_offset + 1]
    refused(write(tmp_path, cut, 'c.gguf'), 'cut off')


# --- thousands of broken files -----------------------------------------------------------------------------------------

def test_fuzz(tmp_path):
    "Mutated files, in a process of its own, so that its memory can be measured: see gguf_fuzz.py"
    r = subprocess.run([sys.executable, Path(__file__).parents[1] / 'gguf_fuzz.py', tmp_path], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    said = json.loads(r.stdout)
    assert said['files'] > 5000 and said['refused'] > 1000 and said['accepted'] > 100, said
    assert said['parts_accepted'] > 500, said
    assert said['slowest'] < 20 and said['peak_mb'] < 300, said


def test_expensive_liars(tmp_path):
    "Files that are large as well as wrong: as many entries as the limits allow, and holes where data should be"
    p = tmp_path / 'x.gguf'
    def costs(*words): assert cost(lambda: refused(p, *words)) < 1500
    p.write_bytes(raw([string('k') + u32(ARR) + u32(STR) + u64(MAX_STRINGS) + bytes(8 * MAX_STRINGS)], n_pairs=2))
    costs('cut off')
    for t, n in ((U8, 1 << 30), (F64, 1 << 28)):
        p.write_bytes(raw([string('k') + u32(ARR) + u32(t) + u64(n)]))
        os.truncate(p, 1 << 33)
        costs('more than 256 MiB of metadata')
    p.write_bytes(raw([pair(f'{i}', U8, 1) for i in range(16_000)], [F(f'{i}', (1,), 0, 0) for i in range(16_000)], DATA))
    costs('overlaps')


def array_of(n, text): return pair('a', ARR, u32(STR) + u64(n) + string(text)*n)

# bytes of a file for n, and an n that takes some milliseconds: long enough for a factor to show, short enough for a busy machine
GROW = {
    'numbers': (lambda n: raw([pair(f'key.{i}', U32, i) for i in range(n)]), 2000),
    'texts': (lambda n: raw([pair(f'key.{i}', STR, 'x' * 500) for i in range(n)]), 2000),
    'long_keys': (lambda n: raw([pair(f'{i}'.rjust(3000, 'k'), U32, i) for i in range(n)]), 2000),
    'long_texts': (lambda n: raw([pair(f'{i}', STR, 'x' * 70_000) for i in range(n)]), 128),
    'arrays_of_numbers': (lambda n: raw([pair(f'{i}', ARR, array(I32, [7] * 50)) for i in range(n)]), 2000),
    'arrays_of_few_texts': (lambda n: raw([pair(f'{i}', ARR, array(STR, ['a', 'bc'])) for i in range(n)]), 2000),
    'arrays_of_many_texts': (lambda n: raw([string(f'{i}') + u32(ARR) + u32(STR) + u64(1000) + string('t')*1000 for i in range(n)]), 48),
    'short_texts': (lambda n: raw([array_of(n, 'tok')]), 60_000),
    'empty_texts': (lambda n: raw([array_of(n, '')]), 60_000),
    'texts_of_300': (lambda n: raw([array_of(n, 'x' * 300)]), 8000),
    'texts_of_zeros': (lambda n: raw([array_of(n, b'\0' * 50)]), 20_000),
    'tensors': (lambda n: raw([], [F(f'{i}'.rjust(63, 't'), (32,), 0, 128*i) for i in range(n)]), 1000),
    'tensors_backwards': (lambda n: raw([], [F(f'{i}', (32,), 0, 128*(n - 1 - i)) for i in range(n)]), 1000),
}


@pytest.mark.parametrize('case', GROW)
def test_twice_as_much_takes_twice_as_long(tmp_path, case):
    "To open a file, and to decode all that is in it"
    build, start = GROW[case]
    def make(n):
        path = write(tmp_path, build(n), f'{n}.gguf')
        def read():
            # what those cost is the allocator's business
            with GGUF(path) as g: case in ('long_texts', 'texts_of_300') or dict(g.metadata)
        return read
    doubling(make, start, tries=40)


def test_short_arrays_cost_what_they_hold(tmp_path):
    """Four thousand arrays of a thousand texts take not much longer than one array of them all: to look for strings is bounded by how
    many there are"""
    many = raw([string(f'{i}') + u32(ARR) + u32(STR) + u64(1000) + string('t')*1000 for i in range(400)])
    one = raw([array_of(400_000, 't')])
    times = {}
    for name, data in dict(many=many, one=one).items():
        path = write(tmp_path, data, f'{name}.gguf')
        times[name] = min(cost(lambda: GGUF(path).close(), 1) for _ in range(3))
    assert times['many'] < 20*times['one'], times


@pytest.mark.parametrize('seed', range(25))
def test_random_files_like_gguf_py(tmp_path, seed):
    "Random keys, values, shapes and types, written by the gguf package and read by both"
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(tmp_path / 'x.gguf', 'llama')
    word = lambda n: ''.join(chr(c) for c in rng.integers(0x61, 0x3ff, n) if chr(c).isprintable()) or 'w'
    for i in range(rng.integers(0, 30)):
        key, n = f'{i}.{word(8)}', int(rng.integers(1, 200))
        match rng.integers(0, 5):
            case 0: w.add_string(key, word(n))
            case 1: w.add_int64(key, int(rng.integers(-1 << 62, 1 << 62)))
            case 2: w.add_array(key, [word(int(k)) for k in rng.integers(1, 20, n)])
            case 3: w.add_array(key, rng.integers(-1 << 30, 1 << 30, n).tolist())
            case 4: w.add_array(key, rng.standard_normal(n).tolist())
    for i in range(rng.integers(0, 12)):
        t = gguf.GGMLQuantizationType[rng.choice(['F32', 'F16', 'Q4_0', 'Q8_0', 'Q4_K', 'Q6_K', 'MXFP4'])]
        per, size = gguf.GGML_QUANT_SIZES[t]
        lead = tuple(rng.integers(1, 4, rng.integers(0, 4)).tolist())
        data = rng.integers(0, 256, (*lead, int(rng.integers(1, 4))*size), dtype=np.uint8)
        w.add_tensor(f'{i}.weight', data, raw_dtype=t)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    theirs = gguf.GGUFReader(tmp_path / 'x.gguf')
    with GGUF(tmp_path / 'x.gguf') as g:
        assert [k for k in theirs.fields if not k.startswith('GGUF.')] == list(g.metadata)
        for k in g.metadata:
            v = g.metadata[k]
            assert (v.tolist() if isinstance(v, np.ndarray) else v) == theirs.fields[k].contents(), k
        assert {t.name: (tuple(t.shape.tolist()), int(t.tensor_type), t.data_offset) for t in theirs.tensors} == \
            {t.name: (t.dims, int(t.type), t.offset) for t in g.tensors.values()}
        for t in theirs.tensors: assert g.blocks(t.name).tobytes() == t.data.tobytes()


def test_wrong_names_and_types(tmp_path):
    "A key or tensor that is not there is the package's error and a `KeyError`; what is of another type is the package's error"
    small(tmp_path/'x.gguf')
    with GGUF(tmp_path/'x.gguf') as g:
        for wrong in ('nothing', 5, None, [], 'x'*100_000, '\x1b[31m'):
            for ask in (lambda: g.metadata[wrong], lambda: g.metadata.pairs(wrong), lambda: g.read(wrong), lambda: g.blocks(wrong),
                    lambda: g.dequantize(wrong)):
                with pytest.raises(OrcdError) as e: ask()
                assert isinstance(e.value, KeyError) and len(str(e.value)) < 300 and str(e.value).isprintable()
            assert wrong not in g.metadata and g.metadata.get(wrong, 3) == 3 and g.metadata.kind(wrong) == (None, None, None)
        for wrong in ('nothing', 5, None):
            with pytest.raises(MissingError): g.tensors[wrong]
            assert wrong not in g.tensors and g.tensors.get(wrong) is None
        for key in ('a.text', 'a.ints', 'a.uint8.low', 'tokenizer.ggml.token_type'):
            with pytest.raises(GGUFError, match='no array of strings'): g.metadata.pairs(key)
        for rows in (('a',), (1.5,), (0, 'a'), (0, 1.0), (None,)):
            with pytest.raises(GGUFError, match='whole numbers'): g.read('t.F32', *rows)
        assert g.read('t.F32', np.int64(1), np.int64(1)).shape == (1, 2048)


def test_a_file_name_steers_no_terminal(tmp_path):
    path = tmp_path/'a\x1b[31m\nb\u202e.gguf'
    small(tmp_path/'x.gguf')
    os.rename(tmp_path/'x.gguf', path)
    with GGUF(path) as g: assert repr(g).isprintable() and 'a\\x1b[31m' in repr(g) and '\x1b' not in g._repr_html_()


# --- names

def test_demo_and_pulled_names_are_files(tmp_path, monkeypatch):
    monkeypatch.setenv('ORCD_CACHE_DIR', str(tmp_path))
    with GGUF('demo') as g: assert g.metadata['general.architecture'] == 'qwen2' and os.path.isabs(g.path)
    with pytest.raises(GGUFError, match='orcd pull phi-3-mini'): GGUF('phi-3-mini')
    with pytest.raises(GGUFError, match='orcd pull me/repo/x.gguf'): GGUF('me/repo/x.gguf')
    there = hub.place(hub.remote('phi-3-mini'))
    there.parent.mkdir(parents=True)
    there.write_bytes(Path(write(tmp_path, raw([ONE]))).read_bytes())
    with GGUF('phi-3-mini') as g: assert g.path == str(there)


@pytest.mark.parametrize('asked, meant', [
    ('block_count', 'qwen2.block_count'), ('general.nam', 'general.name'), ('QWEN2.BLOCK_COUNT', 'qwen2.block_count'),
    ('tokenizer.chat_templat', 'tokenizer.chat_template'), ('zzz', None), ('', None)])
def test_a_missing_key_names_the_nearest(asked, meant):
    with GGUF('demo') as g:
        with pytest.raises(KeyError) as e: g.metadata[asked]
        assert isinstance(e.value, OrcdError) and (f'nearest: {meant}' in str(e.value) if meant else 'nearest' not in str(e.value))
        with pytest.raises(MissingError, match='nearest: .*blk.0.attn_q.weight'): g.tensors['blk.0.attn_q']
        with pytest.raises(MissingError, match='nearest: token_embd.weight'): g.blocks('token_embed.weight')
        for store in g.metadata, g.tensors:
            assert store.get(asked) is None and store.get(asked, 7) == 7 and asked not in store and [] not in store
            for odd in 5, None, []:
                with pytest.raises(MissingError, match='a name is a string'): store[odd]
            assert store._ipython_key_completions_() == list(store)


def test_jupyter_completes_keys():
    completer = pytest.importorskip('IPython.core.completer')
    with GGUF('demo') as g:
        c = completer.IPCompleter(shell=None, namespace=dict(g=g), global_namespace={})
        with completer.provisionalcompleter(): found = {x.text for x in c.completions('g.metadata["qwen2.bl', 20)}
    assert 'qwen2.block_count' in found
