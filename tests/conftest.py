"Fixtures every test may use"
import os, subprocess, sys
from pathlib import Path
import pytest

try: # the gate's runs repeat themselves; a person's explore
    from hypothesis import settings
    settings.register_profile('ci', derandomize=True)
    if os.environ.get('CI'): settings.load_profile('ci')
except ImportError: pass

ROOT = Path(__file__).resolve().parent.parent


def has_gpu():
    "True when cupy is installed and sees a device"
    try:
        import cupy
        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception: return False


def pytest_collection_modifyitems(config, items):
    gpu = [i for i in items if i.get_closest_marker('gpu')] # not `i.keywords`: the folder is called gpu too
    if not gpu or has_gpu(): return
    for i in gpu: i.add_marker(pytest.mark.skip(reason='needs an NVIDIA GPU and cupy'))


@pytest.fixture(scope='session')
def shared():
    "The folder of published headers and golden vectors (ORCD_SHARED, else ../shared), which is not part of the repository"
    p = Path(os.environ.get('ORCD_SHARED', ROOT.parent / 'shared')) / 'models'
    if not p.is_dir(): pytest.skip(f'{p.name}: the published headers and golden vectors are not here (set ORCD_SHARED)')
    return p


PUBLISHED = 'qwen2.5-0.5b-instruct-q4_k_m', 'phi-3-mini-4k-instruct-q4', 'gpt-oss-20b-mxfp4'

@pytest.fixture(scope='session')
def headers(shared, tmp_path_factory):
    "A folder of header-only files of the published models"
    folder = tmp_path_factory.mktemp('headers')
    for n in PUBLISHED: subprocess.run([sys.executable, shared / 'full_shape.py', n, folder / f'{n}.gguf', '--header-only'], check=True, capture_output=True)
    return folder
