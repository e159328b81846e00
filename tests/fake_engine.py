"""An engine that follows a script, with a byte vocabulary: for tests that need a model's behaviour but no model.

model = fake_model(say('Rain falls.') + [EOS]) model.generate('hi').run().text # 'Rain falls.'

A script is a list. Its items, in order, stand for the tokens that the engine draws:

65 the token with this id OutOfVRAM('…') any exception, instance or class, is raised there threading.Event() wait until it is set
(cancellation is still noticed) 0.25 wait that many seconds (a float; cancellation is still noticed) lambda: … called; what it returns
is the item (None: nothing)

After its end the engine goes on with the token `then` for ever. Ids 0-255 are the bytes, `EOS` ends a turn, and `PIECES` are tokens
of more than one byte, among them halves of a character."""
import codecs, threading, time
from types import SimpleNamespace
import numpy as np
from orcd.text.chat import text_of
from orcd.text.sampling import Drawn
from orcd.errors import Cancelled, OrcdError

PIECES = [b'Ha', b'ik', b'u ', b'\n\n', b'END', b'ND', b'EN', '雨'.encode()[:2], '雨'.encode()[2:], '🌧'.encode()[:1], '🌧'.encode()[1:3],
    '🌧'.encode()[3:], b' the', b'stop']
EOS, IM_START, IM_END = 256, 257, 258
FIRST_PIECE = 259
N_VALID = FIRST_PIECE + len(PIECES)
N_VOCAB = N_VALID + 5     # with padding, as real models have
_bytes = {**{i: bytes([i]) for i in range(256)}, EOS: b'', IM_START: b'', IM_END: b'', **{FIRST_PIECE + i: p for i, p in enumerate(PIECES)}}


def say(text): "Ids of the bytes of `text`"; return list(text.encode())
def piece(b): "Id of a longer token"; return FIRST_PIECE + PIECES.index(b)


class FakeStream:
    "Incremental UTF-8: bytes of a split character wait for the rest; bytes that cannot become one turn into U+FFFD"
    analysis = ''
    def __init__(self): self.decoder = codecs.getincrementaldecoder('utf-8')('replace')
    def push(self, i): return self.decoder.decode(_bytes[i])
    def flush(self): return self.decoder.decode(b'', True)


class FakeTokenizer:
    kind, vocab_size, n_valid, stop_ids = 'gguf-bpe', N_VALID, N_VALID, frozenset([EOS, IM_END])
    bos_id, eos_id, add_bos = None, EOS, False
    def encode(self, text, add_special=True, parse_special=True): return list(text.encode())
    def decode(self, ids, skip_special=False): return b''.join(_bytes[i] for i in ids).decode('utf-8', 'replace')
    harmony = False
    backend = SimpleNamespace(encode=lambda text, first=True: list(text.encode()))
    special = {}
    special_by_id = {i: SimpleNamespace(text=t, control=True) for i, t in ((EOS, '<eos>'), (IM_START, '<start>'), (IM_END, '<end>'))}
    def token_bytes(self, i): return _bytes[i]
    def chat_source(self, tools=None): return ''
    def tool_form(self, tools=None): return SimpleNamespace(tools=False)
    def begun(self, after=()): return ''
    def stream(self, skip_special=False, after=()): return FakeStream()
    def parse_reply(self, after=()): return FakeStream()
    def chat(self, messages, add_generation_prompt=True): return ''.join(f"{m['role']}: {m['content']}\n" for m in messages)
    def encode_chat(self, messages, add_generation_prompt=True, **variables):
        out = []
        for m in messages: out += [IM_START, *m['role'].encode(), 10, *text_of(m['content']).encode(), IM_END]
        return out + [IM_START] * add_generation_prompt


def fake_config(n_ctx=4096):
    return SimpleNamespace(arch='qwen2', name='fake', n_layer=2, n_embd=8, n_head=2, n_head_kv=1, head_dim=4, n_ff=16, n_vocab=N_VOCAB,
        context_length=n_ctx,
        n_expert=0, n_expert_used=0, windows=(0, 0), quant_kind='Q4_0', file_type=2, kv_bytes_per_token=32)


class FakeEngine:
    "Follows the engine protocol; counts what it is asked for"
    kind, resident, vram = 'reference', False, None

    def __init__(self, script=(), then=ord('.'), n_ctx=4096, pace=0.0, prefill=(), chunk=512, config=None):
        self.script, self.then, self.n_ctx, self.pace = list(script), then, n_ctx, pace
        self.prefill_script, self.chunk, self.config = list(prefill), chunk, config or fake_config(n_ctx)
        self.n_valid, self.closed = self.config.n_vocab, 0
        # what was asked for; tokens drawn; decodes that ended, in whatever way
        self.prompts, self.params, self.drawn, self.finished = [], [], [], 0
        self.busy = threading.Lock()

    def info(self): return dict(gpu_device=None, sm=None, name='fake', cuda_runtime_version=None, resident=False, vram_bytes_used=0)

    def _wait(self, done, cancelled):
        while not done():
            if cancelled and cancelled(): raise Cancelled()
            time.sleep(0.001)

    def _play(self, item, cancelled):
        "What an item of the script stands for: an id, or None"
        if isinstance(item, type) and issubclass(item, BaseException): raise item()
        if isinstance(item, BaseException): raise item
        if isinstance(item, threading.Event): return self._wait(item.is_set, cancelled)
        if isinstance(item, float):
            end = time.monotonic() + item
            return self._wait(lambda: time.monotonic() >= end, cancelled)
        return self._play(item(), cancelled) if callable(item) else item

    def _open(self):
        if self.closed: raise OrcdError('the model was closed')
        if not self.busy.acquire(blocking=False): raise AssertionError('two threads in one engine')

    def prefill(self, ids, cancelled=None):
        ids = [int(i) for i in ids]
        assert 0 < len(ids) <= self.n_ctx and all(0 <= i < self.config.n_vocab for i in ids), 'the caller must check the prompt'
        self._open()
        try:
            self.prompts.append(ids)
            for item in self.prefill_script: self._play(item, cancelled)
            for _ in range(0, len(ids), self.chunk):
                if cancelled and cancelled(): raise Cancelled()
            self.pos = len(ids)
        finally: self.busy.release()

    def decode(self, params, n, cancelled=None, constraint=None):
        "The script; a constraint is told of it and ends it, and its masks are not looked at"
        self.params.append(params)
        assert self.pos + n <= self.n_ctx, 'the caller must keep within the context'
        script, i = iter(self.script), 0
        try:
            while i < n and not (constraint and constraint.done):
                self._open()
                try:
                    if cancelled and cancelled(): raise Cancelled()
                    item = self._play(next(script, self.then), cancelled)
                    if self.pace: self._play(float(self.pace), cancelled)
                finally: self.busy.release()
                if item is None: continue
                i += 1; self.drawn.append(item)
                if constraint: constraint.commit(item)
                yield Drawn(item, -0.5, ((item, -0.5), (ord('?'), -1.5))[:params.n_top if params else 0])
        finally: self.finished += 1

    def logits(self, ids):
        self._open()
        try:
            for item in self.prefill_script: self._play(item, None)
            x = np.zeros((len(ids), self.config.n_vocab), np.float32); x[np.arange(len(ids)), np.asarray(ids)] = 1
            return x
        finally: self.busy.release()

    def residuals(self, ids): return np.zeros((self.config.n_layer + 1, len(ids), self.config.n_embd), np.float32)
    def close(self):
        if self.busy.locked(): raise AssertionError('closed beside a call')
        self.closed += 1
    def __enter__(self): return self
    def __exit__(self, *_): self.close()


def fake_model(script=(), tokenizer=True, **kw):
    "A `Model` on a `FakeEngine`; `tokenizer=None` gives one without vocabulary, keywords go to the engine"
    from orcd.engine.generation import Model
    return Model(FakeEngine(script, **kw), FakeTokenizer() if tokenizer is True else tokenizer)
