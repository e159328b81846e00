"""What `lower` can name: models of every family with every type of weights, and mixtures of two, as files without weights, lowered for a card.

Widths are chosen so that launches of every size occur: one wave of blocks and many, rows that one, two and four warpgroups share."""
import itertools, tempfile
from functools import lru_cache
from pathlib import Path
import orcd
from make_models import ARCHES, MODELS, make_model
from orcd.engine.cuda_engine import CHUNKS, sorting_files
from orcd.engine.lower import Layers, files_of
from orcd.errors import KernelError
from orcd.families.arch import open_model
from orcd.files.blocks import GGMLType
from orcd.kernels import attention, nvrtc
from orcd.kernels.nvrtc import CARDS

TYPES = list(GGMLType)
QUANTS = [t for t in TYPES if t.block_size > 1]
PAIRS = [*itertools.combinations(QUANTS, 2)]
# mixtures of published files: Q4_K_M and Q5_K_M, and what their rows of other lengths fall back to
PUBLISHED = {frozenset(p) for p in (('Q4_K', 'Q6_K'), ('Q5_K', 'Q6_K'), ('Q5_0', 'Q8_0'), ('Q4_K', 'Q8_0'), ('Q5_1', 'Q8_0'))}
WIDTHS = (256, 1024, 2048, 4096, 8192)


def models(folder, card, everything):
    "Files without weights: every family, type and head size, and pairs of types; of a few widths, or one each of `MODELS`"
    def model(arch, n_embd, types, **more):
        head_dim = 128 if n_embd > 256 else 64
        sizes = dict(arch=arch, n_layer=2, n_embd=n_embd, head_dim=head_dim, n_head=n_embd//head_dim, n_head_kv=max(1, n_embd//head_dim//4),
            n_ff=4*n_embd, n_ff_exp=n_embd, n_expert=32, n_expert_used=4, n_vocab=32000, types=types)
        return make_model(Path(folder)/'m.gguf', weights=False, **sizes | more)
    if not everything:
        for m in MODELS.values(): yield make_model(Path(folder)/'m.gguf', **m)
        return
    for arch in ARCHES:
        for d in attention.HEAD_DIMS: yield model(arch, 256, 'Q8_0', head_dim=d, n_head=4, n_head_kv=2)
        for t, width in itertools.product(TYPES, WIDTHS): yield model(arch, width, t.name)
    # Hopper's tiles follow from the sizes; elsewhere a launch is large or not
    for (a, b), width in itertools.product(PAIRS, WIDTHS if card.is_hopper else WIDTHS[::4]):
        yield model('llama', width, {'attn_v': b.name, 'ffn_up': b.name, '': a.name})
        yield model('llama', width, {'attn_q': b.name, '': a.name})


@lru_cache(None)
def lowered(arch, everything=True):
    "file -> defines, of all that such models launch on a card, from the load to the last token"
    card, found = CARDS[arch], {('sampler', ()), ('shape', ()), ('state', ())}
    with tempfile.TemporaryDirectory() as folder:
        for path in models(folder, card, everything):
            with orcd.GGUF(path) as g: family, config, bound = open_model(g)
            layers = Layers(family, config, bound, card.is_hopper, card.limits)
            found |= sorting_files(bound) | {('embed', nvrtc.type_defines(bound.model['token_embd'].type))}
            if card.is_hopper: found |= {('row_max_exponent', nvrtc.type_defines(t.type)) for t in bound.unique if t.type.block_size > 1}
            for rows, decode in [(1, True), *((n, False) for n in CHUNKS)]:
                try: found |= {f for some in layers.each(rows, 4096, decode) for f in files_of(some.launches)}
                except KernelError: pass        # rows too long for this card, which is said before a load
    out = {}
    for file, defines in sorted(found): out.setdefault(file, []).append(defines)
    return out


def is_published(defines):
    "Of one type, or of two that published files mix?"
    types = frozenset(d.split('=')[1] for d in defines if d.startswith(('ONLY_TYPE', 'SECOND_TYPE')))
    return len(types) < 2 or types in PUBLISHED
