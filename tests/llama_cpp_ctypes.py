"""llama.cpp's shared library through ctypes, on the CPU: an independent program to compare logits with.

`find()` looks for the library in ORCD_LLAMA_LIB (libllama*.so or its folder), where `make oracles` puts it, and in an installed
`llama_cpp` package.

The parameter structs differ between versions. They are treated as bytes: the library fills in its defaults, and the few fields that
we set are found among them by their default values, so that no header of a certain version is needed.
"""
import ctypes, importlib.util, os, sys
from pathlib import Path
import numpy as np

Opaque = type('Opaque', (ctypes.Structure,), {'_fields_': [('bytes', ctypes.c_uint8 * 512)]}) # larger than any version's struct


class Batch(ctypes.Structure):
    _fields_ = [('n_tokens', ctypes.c_int32), ('token', ctypes.POINTER(ctypes.c_int32)), ('embd', ctypes.c_void_p),
        ('pos', ctypes.POINTER(ctypes.c_int32)),
                ('n_seq_id', ctypes.POINTER(ctypes.c_int32)), ('seq_id', ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
                ('logits', ctypes.POINTER(ctypes.c_int8))]


def find():
    "Path of libllama, or None"
    places = [Path(os.environ['ORCD_LLAMA_LIB'])] if os.environ.get('ORCD_LLAMA_LIB') else []
    places += Path(sys.prefix).glob('llama/package/bins/*')
    if spec := importlib.util.find_spec('llama_cpp'): places += [Path(d) / 'lib' for d in spec.submodule_search_locations]
    for p in places:
        if p.is_file(): return p
        if found := [f for f in sorted(p.glob('libllama*.so*')) if 'common' not in f.name]: return found[0]


def base():
    "Path of libggml-base (ORCD_LIBGGML, else the one beside libllama), or None"
    if os.environ.get('ORCD_LIBGGML'): return os.environ['ORCD_LIBGGML']
    return next((str(f) for f in sorted(find().parent.glob('libggml-base*.so*'))), None) if find() else None


class Library:
    "The loaded library with the prototypes that we use"
    def __init__(self, path):
        folder = Path(path).parent
        for part in ('libggml-base', 'libggml'):
            for f in sorted(folder.glob(part + '*.so*')):
                if f.name.startswith((part + '.so', part + '.v')): ctypes.CDLL(str(f), mode=ctypes.RTLD_GLOBAL); break
        self.lib = L = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        ptr, i32 = ctypes.c_void_p, ctypes.c_int32
        for name, result, args in (('llama_model_default_params', Opaque, []), ('llama_context_default_params', Opaque, []),
                ('llama_model_load_from_file', ptr, [ctypes.c_char_p, Opaque]),
            ('llama_init_from_model', ptr, [ptr, Opaque]), ('llama_batch_init', Batch, [i32, i32, i32]),
            ('llama_decode', i32, [ptr, Batch]), ('llama_batch_free', None, [Batch]),
            ('llama_get_logits_ith', ctypes.POINTER(ctypes.c_float), [ptr, i32]), ('llama_free', None, [ptr]),
            ('llama_model_free', None, [ptr]), ('llama_log_set', None, [ptr, ptr]),
            ('llama_backend_init', None, []), ('llama_model_get_vocab', ptr, [ptr]), ('llama_vocab_n_tokens', i32, [ptr])):
            f = getattr(L, name); f.restype, f.argtypes = result, args
        self.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *a: None) # kept: the library calls it
        if not os.environ.get('ORCD_LLAMA_LOG'): L.llama_log_set(ctypes.cast(self.quiet, ptr), None)
        if (load := getattr(L, 'ggml_backend_load_all_from_path', None)) is not None:
            load.argtypes = [ctypes.c_char_p]
            load(str(folder).encode())
        L.llama_backend_init()

    def context_params(self, n_ctx):
        "Defaults, but float32 keys and values, no flash attention, `n_ctx` positions in one batch"
        p = self.lib.llama_context_default_params()
        a = np.frombuffer(p, np.int32)
        # the last of rope scaling, pooling, attention, flash: all "automatic"
        flash = next(i for i in range(4, 30) if (a[i-3:i+1] == -1).all())
        k = next(i for i in range(flash + 1, 60) if a[i] == a[i+1] == 1)                       # type_k, type_v: F16
        a[0:3], a[flash], a[k:k+2] = n_ctx, 0, 0
        threads = next(i for i in range(3, flash) if a[i] == a[i+1] > 1)
        # small models; more threads only wait for each other
        a[threads:threads+2] = 1
        return p


_library = None


class LlamaCpp:
    "A model in llama.cpp. A context manager."
    def __init__(self, path, n_ctx=512):
        global _library
        _library = _library or Library(find())
        self.L, self.n_ctx, self.context, self.model = _library.lib, n_ctx, None, None
        self.model = self.L.llama_model_load_from_file(str(path).encode(), self.L.llama_model_default_params())
        if not self.model: raise ValueError(f'llama.cpp does not load {path}')
        self.n_vocab = self.L.llama_vocab_n_tokens(self.L.llama_model_get_vocab(self.model))

    def _run(self, batch, ids, pos, every):
        batch.n_tokens = len(ids)
        for i, t in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(t), pos + i, 1, every or i == len(ids) - 1
            batch.seq_id[i][0] = 0
        if self.L.llama_decode(self.context, batch): raise RuntimeError('llama_decode failed')
        rows = range(len(ids)) if every else [len(ids) - 1]
        return np.stack([np.ctypeslib.as_array(self.L.llama_get_logits_ith(self.context, i), (self.n_vocab,)).copy() for i in rows])

    def _fresh(self):
        if self.context: self.L.llama_free(self.context)
        self.context = self.L.llama_init_from_model(self.model, _library.context_params(self.n_ctx))
        if not self.context: raise RuntimeError('llama.cpp makes no context')

    def logits(self, ids):
        "float32 (len(ids), n_vocab) from a fresh context"
        self._fresh()
        batch = self.L.llama_batch_init(self.n_ctx, 0, 1)
        try: return self._run(batch, ids, 0, True)
        finally: self.L.llama_batch_free(batch)

    def greedy(self, ids, n, stop=()):
        "The `n` most likely tokens after a prompt, one after the other; ends at a stop id"
        self._fresh()
        batch, out, pos = self.L.llama_batch_init(self.n_ctx, 0, 1), [], len(ids)
        try:
            row = self._run(batch, ids, 0, False)[0]
            while len(out) < n:
                token = int(row.argmax())
                if token in stop: break
                out.append(token)
                row = self._run(batch, [token], pos, False)[0]
                pos += 1
            return out
        finally: self.L.llama_batch_free(batch)

    def close(self):
        if self.context: self.L.llama_free(self.context)
        if self.model: self.L.llama_model_free(self.model)
        self.context = self.model = None

    def __enter__(self): return self
    def __exit__(self, *args): self.close()
