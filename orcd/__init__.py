"""An LLM inference worker for one NVIDIA GPU: readable as a book, runnable in production

    load             load a model: a GGUF file, the name of a pulled one, or 'demo'
    Model            what `load` returns: `generate`, `logits`, `vram`, `close`
    Generation       what `generate` returns: an iterator of `Token`, with the text so far
    Token            one step of a generation: id, text, log probability
    SamplingParams   how tokens are drawn from logits
    GGUF             a model file: its metadata, its tensors, their bytes and their numbers
    Tokenizer        text to token ids and back; messages to a prompt
    ReferenceEngine  a model on NumPy, on which the GPU's results are checked
    Ledger           what lives in VRAM, by kind and by name
    pull             fetch a model from the hub
    OrcdError        base of every error; the others are in `errors`
    errors           the errors of the package
    quants           block formats: `quantize` and `dequantize` in NumPy
"""
__version__ = "0.1.0"
__all__ = ['load', 'Model', 'Generation', 'Token', 'SamplingParams', 'GGUF', 'Tokenizer', 'ReferenceEngine', 'Ledger', 'pull',
    'OrcdError', 'errors', 'quants']

TYPE_CHECKING = False
if TYPE_CHECKING:    # what an editor sees: it takes the name for true
    from . import errors
    from .engine.generation import Generation, Model, Token, load
    from .engine.vram import Ledger
    from .errors import OrcdError
    from .families.reference import ReferenceEngine
    from .files import quants
    from .files.gguf import GGUF
    from .files.hub import pull
    from .text.sampling import SamplingParams
    from .text.tokenizer import Tokenizer
else:                # public name -> the module that defines it. Resolved on first use, so that `import orcd` stays fast and needs no GPU
    _where = {'load': 'engine.generation', 'Model': 'engine.generation', 'Generation': 'engine.generation', 'Token': 'engine.generation',
        'SamplingParams': 'text.sampling', 'GGUF': 'files.gguf', 'Tokenizer': 'text.tokenizer', 'ReferenceEngine': 'families.reference',
        'Ledger': 'engine.vram', 'pull': 'files.hub', 'OrcdError': 'errors'}
    _modules = {'errors': 'errors', 'quants': 'files.quants'}

    def __getattr__(name):
        from importlib import import_module
        if name in _where: return getattr(import_module(f'orcd.{_where[name]}'), name)
        if name in _modules: return import_module(f'orcd.{_modules[name]}')
        raise AttributeError(f"module 'orcd' has no attribute {name!r}")

    def __dir__(): return sorted({*globals(), *__all__})
