"What the driver says of a device's memory, asked through NVML's package: with a driver that is played, and without one"
import sys
from types import SimpleNamespace as NS
import pytest
from orcd.engine import view
from orcd.errors import DeviceError


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    "Handles are kept for the life of a process; these are of drivers that tests made up"
    view._nvml.cache_clear()
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    yield
    view._nvml.cache_clear()


@pytest.fixture
def nvml(monkeypatch):
    "The real package over a driver with two cards, of which the second has half of its memory in use"
    pynvml = pytest.importorskip('pynvml')
    def handle(name):
        if name not in (0, 1, 'GPU-b'): raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return 1 if name == 'GPU-b' else name
    monkeypatch.setattr(pynvml, 'nvmlInit', lambda: None)
    for f in 'nvmlDeviceGetHandleByIndex', 'nvmlDeviceGetHandleByUUID': monkeypatch.setattr(pynvml, f, handle)
    monkeypatch.setattr(pynvml, 'nvmlDeviceGetMemoryInfo', lambda h: NS(total=80 << 30, used=h * 40 << 30, free=(80 - h * 40) << 30))
    return pynvml


def test_devices_are_counted_as_cuda_counts(nvml, monkeypatch):
    assert view.device_memory(0) == (0, 80 << 30) and view.device_memory(1) == (40 << 30, 80 << 30)
    for visible in '1', 'GPU-b':
        view._nvml.cache_clear()
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
        assert view.device_memory(0)[0] == 40 << 30
    with pytest.raises(DeviceError, match='CUDA_VISIBLE_DEVICES is GPU-b'): view.device_memory(1)


def test_what_nvml_refuses_is_an_error_of_the_device(nvml, monkeypatch):
    with pytest.raises(DeviceError, match='NVML knows no GPU 7: '): view.device_memory(7)
    def refuse(*a): raise nvml.NVMLError(nvml.NVML_ERROR_NO_PERMISSION)
    monkeypatch.setattr(nvml, 'nvmlDeviceGetMemoryInfo', refuse)
    with pytest.raises(DeviceError, match='does not tell the memory of GPU 0: '): view.device_memory(0)
    view._nvml.cache_clear()
    monkeypatch.setattr(nvml, 'nvmlInit', refuse)
    with pytest.raises(DeviceError, match='NVML does not begin: '): view.device_memory(0)


def test_without_a_driver(monkeypatch):
    pynvml = pytest.importorskip('pynvml')
    def nothing(*a, **k): raise OSError('libnvidia-ml.so.1: cannot open shared object file')
    monkeypatch.setattr(pynvml, 'CDLL', nothing)
    monkeypatch.setattr(pynvml, 'nvmlLib', None)
    with pytest.raises(DeviceError, match='there is no NVIDIA driver on this machine'): view.device_memory(0)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    with pytest.raises(DeviceError, match='pip install nvidia-ml-py'): view.device_memory(0)
