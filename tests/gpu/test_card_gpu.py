"What the driver says of a kernel: it is this card's code, or that of the card that ORCD_CARD names; and no block gets more shared memory than it has"
import os
import numpy as np
import pytest

cp = pytest.importorskip('cupy')
pytestmark = pytest.mark.gpu

from orcd.errors import KernelError
from orcd.kernels import nvrtc
from orcd.kernels.nvrtc import CARDS, card_of


@pytest.fixture
def small():
    "A small kernel"
    from orcd.kernels import elementwise
    x = cp.arange(64, dtype=np.float32).reshape(1, 64)
    out = cp.empty_like(x)
    elementwise.copy(x, out)
    assert (out == x).all()
    l = elementwise.copy.plan(x, out)
    return nvrtc.kernel(l.file, l.name, l.defines)


def test_whose_code_it_is(small):
    from cuda.bindings import driver as cu
    ask = lambda what: nvrtc._driver(cu.cuFuncGetAttribute(getattr(cu.CUfunction_attribute, f'CU_FUNC_ATTRIBUTE_{what}'), small.handle))
    card, real = card_of(), int(cp.cuda.Device().compute_capability)
    wanted = int(os.environ.get('ORCD_CARD') or real)
    print(f'as {card}: made from PTX {ask("PTX_VERSION")}, machine code {ask("BINARY_VERSION")}')
    assert card.number == wanted and ask('BINARY_VERSION') == real
    assert ask('PTX_VERSION') == (wanted if card.code.startswith('compute_') else real)
    assert small.early == (wanted >= 90) and card.is_hopper == (wanted == 90)


def test_shared_memory(small):
    card = card_of()
    assert card.shared == CARDS[str(card.number)].shared
    stream = cp.cuda.get_current_stream()
    small.config((1,), (32,), card.shared, stream)
    with pytest.raises((KernelError, cp.cuda.driver.CUDADriverError)): small.config((1,), (32,), card.shared + 1, stream)
