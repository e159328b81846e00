"What a card decides, and a GPU that behaves as another one: code for the other's instructions, and nothing that it could not run"
import re
import pytest
from orcd.errors import DeviceError
from orcd.kernels import nvrtc
from orcd.kernels.nvrtc import CARDS, Card, pretended

H200, RTX_4090, RTX_5090 = Card(90, 227 << 10), Card(89, 99 << 10), Card(120, 99 << 10)


@pytest.mark.parametrize('name', CARDS)
def test_a_card_of_its_own(name):
    card = CARDS[name]
    assert card.arch == f'sm_{name}' and card.is_hopper == (name == '90') and card.bulk == (int(name) >= 90)
    assert pretended(name, card) is card


def test_what_another_card_compiles():
    "PTX of an earlier card; of a later one its decisions alone"
    as_h200 = {name: pretended(name, H200) for name in CARDS if name != '90'}
    assert {name: c.arch for name, c in as_h200.items()} == {**{n: f'compute_{n}' for n in ('75', '80', '86', '89')}, '100': 'sm_90', '120': 'sm_90'}
    for name, c in as_h200.items(): assert (c.number, c.shared, c.is_hopper, c.limits) == (int(name), CARDS[name].shared, False, CARDS[name].limits)
    assert pretended('75', RTX_4090).arch == 'compute_75' and pretended('86', RTX_5090).arch == 'compute_86'


@pytest.mark.parametrize('name, real', [('90', RTX_4090), ('90', RTX_5090), ('80', RTX_4090), ('100', RTX_5090), ('120', RTX_4090), ('86', CARDS['75']), ('81', H200), ('sm_80', H200)])
def test_what_it_cannot_be(name, real):
    "Hopper's own instructions, more shared memory, instructions that are not there, an unknown card"
    with pytest.raises(DeviceError, match=f'^ORCD_CARD is {name}[,;]'): pretended(name, real)


# what the code of a card has, and what it must not have
INSTRUCTIONS = {'75': (['mma.sync.aligned.m16n8k8.'], ['m16n8k16', 'cp.async', 'redux', 'griddepcontrol', 'mbarrier']),
    '80': (['mma.sync.aligned.m16n8k16.', 'cp.async.cg'], ['m16n8k8.', 'cp.async.bulk', 'griddepcontrol', 'mbarrier']), '90': (['m16n8k16', 'cp.async.cg', 'griddepcontrol.wait'], ['wgmma'])}
INSTRUCTIONS |= {'86': INSTRUCTIONS['80'], '89': INSTRUCTIONS['80']}


@pytest.mark.parametrize('name', INSTRUCTIONS)
def test_ptx(name, monkeypatch, tmp_path):
    "The code is that card's, ends as the driver wants it, and is kept apart from machine code"
    monkeypatch.setenv('ORCD_CACHE_DIR', str(tmp_path))
    defines, arch = ('HEAD_DIM=64',), f'compute_{name}'
    nvrtc.cubin.cache_clear()
    code = nvrtc.cubin('attention', arch, defines)
    text = code.rstrip(b'\0').decode()
    assert code.endswith(b'\0') and f'.target sm_{name}' in text and len(re.findall(r'\.entry attend_', text)) == 2
    there, absent = INSTRUCTIONS[name]
    assert all(i in text for i in there) and not [i for i in absent if i in text]
    nvrtc.cubin.cache_clear()
    monkeypatch.setattr(nvrtc, 'compile_text', None)        # it comes from the cache
    assert nvrtc.cubin('attention', arch, defines) == code
    nvrtc.cubin.cache_clear()
    names = [nvrtc._cache_path('attention', nvrtc.read_source('attention'), a, defines) for a in (arch, f'sm_{name}')]
    assert [p.exists() for p in names] == [True, False]
