"The mistakes that tests on a GPU plant in kernels are found in the sources, so that a change of a kernel which hides one is seen here"
import importlib.util, pathlib
from orcd.kernels import nvrtc

GPU = pathlib.Path(__file__).parents[1]/'gpu'


def module(name):
    spec = importlib.util.spec_from_file_location(f'gpu_{name}', GPU/f'{name}.py')
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m


def test_order():
    m = module('test_order')
    for name, changes in (m.MISTAKES | m.MIX).items():
        for file, old, _ in changes: assert nvrtc.read_source(file).count(old) == 1, f'{name}: {file} has {old!r} {nvrtc.read_source(file).count(old)} times'


def test_mxfp4():
    m = module('test_matmul')
    for name, changes in m.MUTATIONS.items():
        for file, (old, _) in zip(('gemv', 'gemm'), changes): assert m.inlined(file).count(old) == 1, f'{name}: {file} with its includes has {old!r} {m.inlined(file).count(old)} times'
