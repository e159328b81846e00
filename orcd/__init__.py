"An LLM inference worker for one NVIDIA GPU: readable as a book, runnable in production"
__version__ = "0.1.0"

# Public name -> the module that defines it. Resolved on first use, so that `import orcd` stays fast and needs no GPU.
_where = {'load': 'engine.generation', 'Model': 'engine.generation', 'GGUF': 'files.gguf', 'Tokenizer': 'text.tokenizer', 'pull': 'files.hub', 'OrcdError': 'errors'}
_modules = {'quants': 'files.quants', 'errors': 'errors'}

def __getattr__(name):
    from importlib import import_module
    if name in _where: return getattr(import_module(f'orcd.{_where[name]}'), name)
    if name in _modules: return import_module(f'orcd.{_modules[name]}')
    raise AttributeError(f"module 'orcd' has no attribute {name!r}")

def __dir__(): return sorted([*globals(), *_where, *_modules])
