"A real worker process around a scripted model: `python tests/fake_worker.py '{...settings...}'`; the script is in the prompt"
import json, os, sys, time
from types import SimpleNamespace as NS

from orcd.errors import Cancelled, CUDAError, InsufficientVRAM, OutOfVRAM
from orcd.engine.vram import Ledger
from orcd.text.sampling import request_error
from orcd.serve.worker import Settings, serve


class Tokenizer:
    kind, vocab_size, harmony = 'gguf-bpe', 1000, False
    def chat_source(self, tools=None): return ''
    def tool_form(self, tools=None): return NS(tools=False)
    def begun(self, after=()): return ''


class Output:
    "What `generate` returns. A prompt is a script: `prefill:2 tokens:100@0.01 oom sticky bug hang words…`"
    def __init__(self, prompt, max_tokens, cancelled, seed):
        self.prompt, self.max_tokens, self.cancelled, self.seed = prompt, max_tokens, cancelled, seed
        self.text, self.tokens_out, self.stop_reason, self.stop_sequence_matched = '', 0, None, None
        self.prefill_time_ms = self.decode_time_ms = 0.0

    def wait(self, seconds):
        "Like a chunked prefill: looks at the flag now and then"
        end = time.monotonic() + seconds
        while True:
            if self.cancelled(): raise Cancelled()
            left = end - time.monotonic()
            if left <= 0: return
            time.sleep(min(left, .01))

    def one(self, text):
        if self.cancelled(): raise Cancelled()
        self.tokens_out += 1
        return NS(id=self.tokens_out, text=text, logprob=-1.0)

    def __iter__(self):
        began = time.monotonic()
        for word in self.prompt.split(' '):
            name, _, arg = word.partition(':')
            if name == 'prefill': self.wait(float(arg))
            elif name == 'tokens':
                n, _, gap = arg.partition('@')
                for i in range(int(n)):
                    if self.tokens_out >= self.max_tokens: break
                    yield self.one(f'w{i} ')
                    if gap: time.sleep(float(gap))
            elif name == 'flood':
                n, _, gap = arg.partition('@')
                for i in range(int(n)):
                    yield self.one('x' * 4000)
                    if gap: time.sleep(float(gap))
            elif name == 'jump':
                real, by = time.time, float(os.environ['FAKE_CLOCK'])
                time.time = lambda: real() + by
            elif name == 'forget': Engine.info = None           # the next question about memory fails, after the job
            elif name == 'evict':                               # memory that is not where it was, as the driver says
                info, Engine.info = Engine.info, lambda self: info(self) | dict(resident=False)
            elif name == 'oom': raise OutOfVRAM('no room for the KV cache of this job')
            elif name == 'sticky': raise CUDAError('an illegal memory access was encountered', sticky=True)
            elif name == 'cuda': raise CUDAError('launch failure')
            elif name == 'bug': raise ZeroDivisionError('/home/secret/' + self.prompt)
            elif name == 'hang': time.sleep(float(arg or 1e6))
            elif name == 'seed': yield self.one(str(self.seed))
            elif name == 'half': yield self.one('')
            else: yield self.one(word + ' ')
            if self.tokens_out >= self.max_tokens: break
        self.decode_time_ms = (time.monotonic() - began) * 1e3
        self.stop_reason = 'MAX_TOKENS' if self.tokens_out >= self.max_tokens else 'EOS'


class Engine:
    kind, n_ctx, n_valid = 'reference', 4096, 1000
    def info(self): return dict(gpu_device=0, sm=90, name='fake', cuda_runtime_version='13.0', resident=True, vram_bytes_used=1234)


def said(message):
    "The text of a message, be it a string or a list of parts"
    c = message['content']
    return c if isinstance(c, str) else ''.join(p['text'] for p in c)


class Model:
    config, tokenizer, engine = NS(name='fake', quant_kind='Q4_K_M'), Tokenizer(), Engine()
    def generate(self, prompt, *, max_tokens=2048, seed=None, cancelled=None, stop=(), **params):
        return Output(prompt.ids[-1], max_tokens, cancelled or (lambda: False), seed)
    def count_stop(self, text): return len(text.split(' '))
    def encode(self, prompt):
        "One token a word; behind them, as if it were the last, the script"
        texts = [prompt] if isinstance(prompt, str) else [said(m) for m in prompt]
        words = [w for t in texts for w in t.split(' ')]
        n = len(words)
        if n > self.engine.n_ctx:
            raise request_error([dict(field='prompt', constraint='tokens(1..=4096)',
                message=f'the prompt has {n} tokens, the context 4096')])
        return NS(ids=[*words[1:], texts[-1]], reply=not isinstance(prompt, str))
    def close(self): print('closed', flush=True)


def load(settings, progress):
    script = os.environ.get('FAKE_LOAD', '')
    if script == 'stuck': time.sleep(1e6)           # a dead disk
    if script == 'vram': raise InsufficientVRAM('needs more', 10**12, 10**9, 512)
    n = 4000 if script == 'slow' else 8
    for i in range(n + 1):
        progress(i, n)
        if script == 'slow': time.sleep(.05)
    model = Model()
    if script == 'host': Engine.info = lambda self: dict(resident=False, vram_bytes_used=0)
    if script == 'ledger':
        model.engine.vram = Ledger()
        model.engine.vram.add('weights', 'a', 1000)
        model.engine.vram.add('KV', 'b', 234)
    if script == 'facts': model.engine = NS()            # what cannot be asked about itself
    return model


if __name__ == '__main__':
    settings = Settings(**dict(model='fake.gguf', port=0) | json.loads(sys.argv[1] if len(sys.argv) > 1 else '{}'))
    sys.exit(serve(settings, load))
