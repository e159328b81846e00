"An LLM inference worker for one NVIDIA GPU: readable as a book, runnable in production"
__version__ = "0.1.0"

# Public name -> the module that defines it. Resolved on first use, so that `import orcd` stays fast and needs no GPU.
_where = {'load': 'generation', 'Model': 'generation', 'GGUF': 'gguf', 'Tokenizer': 'tokenizer', 'pull': 'hub', 'OrcdError': 'errors'}

def __getattr__(name):
    from importlib import import_module
    if name in _where: return getattr(import_module(f'orcd.{_where[name]}'), name)
    if name in ('quants', 'errors'): return import_module(f'orcd.{name}')
    raise AttributeError(f"module 'orcd' has no attribute {name!r}")

def __dir__(): return sorted([*globals(), *_where, 'quants', 'errors'])
