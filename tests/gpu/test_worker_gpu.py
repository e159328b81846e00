"The worker on a GPU: 500 mixed jobs with random cancels and disconnects on a file of the published shape; memory flat, no job slower than the first"
import os, statistics, subprocess, sys
from pathlib import Path
import pytest
from worker_tools import orcd, soak

pytestmark = pytest.mark.gpu


@pytest.fixture(scope='module')
def qwen(shared):
    path = Path(os.environ.get('ORCD_FULL_SHAPE', '/dev/shm')) / 'qwen2.5-0.5b-instruct-q4_k_m.gguf'
    if not path.exists(): subprocess.run([sys.executable, str(shared / 'full_shape.py'), 'qwen2.5-0.5b-instruct-q4_k_m', str(path)], check=True, stdout=subprocess.DEVNULL)
    return path


def vram_used():
    "Bytes in use on GPU 0, by whomever"
    return int(subprocess.run(['nvidia-smi', '-i', '0', '--query-gpu=memory.used', '--format=csv,noheader,nounits'], capture_output=True, text=True).stdout) * 2**20


def test_start_health_and_end(qwen):
    before = vram_used()
    with orcd('serve', '--model', str(qwen), '--port', '0', wait=True) as w:
        names = [e['event'] for e in w.log]
        assert names.index('startup') < names.index('model_load_start') < names.index('model_load_complete') < names.index('ready')
        assert [e['percent'] for e in w.log if e['event'] == 'model_load_progress'] == [0, 25, 50, 75, 100]
        h = w.health()
        assert h['resident'] is True and h['gpu_device'] == 0 and h['sm'] >= 75 and h['quant_kind'] == 'Q4_K_M' and h['vram_bytes_used'] > 400 << 20
        w.execute(prompt='Rain', max_tokens=8).all()
        w.signal()
        assert w.end(60) == 0
    assert vram_used() <= before + (64 << 20)


def test_soak(qwen):
    with orcd('serve', '--model', str(qwen), '--port', '0', wait=True) as w:
        seen = soak(w, 500, vram=vram_used)
        texts, speeds, host, vram = zip(*seen)
        assert len(set(texts)) == 1, 'the same seed gave different texts'
        assert max(vram[1:]) - min(vram[1:]) <= 4 << 20 and host[-1] < host[2] + (32 << 20), (vram, host)
        print(f'first {speeds[1]:.0f} tok/s, last {speeds[-1]:.0f} tok/s, host {host[2] >> 20} -> {host[-1] >> 20} MiB, VRAM {vram[1] >> 20} -> {vram[-1] >> 20} MiB')
        assert statistics.median(speeds[-5:]) > .8 * statistics.median(speeds[1:6])
        w.signal()
        assert w.end(60) == 0


def test_health_during_a_long_prefill(qwen):
    import time
    with orcd('serve', '--model', str(qwen), '--port', '0', wait=True) as w:
        s = w.execute(prompt='rain ' * 6500, max_tokens=4, timeout=120)
        times = []
        for _ in range(100):
            began = time.monotonic(); w.health(); times.append(time.monotonic() - began)
        s.all()
        assert sorted(times)[95] < .05


def test_two_workers_on_one_gpu(qwen):
    with orcd('serve', '--model', str(qwen), '--port', '0', '--context-length', '1024', wait=True) as a, orcd('serve', '--model', str(qwen), '--port', '0', '--context-length', '1024', wait=True) as b:
        texts = [''.join(e['t'] for e in w.execute(prompt='Rain', seed=3, max_tokens=16).all()[1:-1]) for w in (a, b)]
        assert texts[0] == texts[1]


def test_a_job_larger_than_its_cache(qwen):
    "A KV budget too small for the job: VRAM_OOM, unhealthy until the next job succeeds; several times in a row"
    with orcd('serve', '--model', str(qwen), '--port', '0', '--context-length', '8192', '--kv-cache-size-mb', '8', wait=True) as w:
        for _ in range(3):
            assert w.execute(prompt='rain ' * 3000, max_tokens=4).all()[-1]['code'] == 'VRAM_OOM' and w.health()['status'] == 'unhealthy'
            assert w.execute(prompt='rain', max_tokens=4).all()[-1]['type'] == 'end' and w.health()['status'] == 'healthy'


def test_too_little_memory_and_wrong_device(qwen):
    with orcd('serve', '--model', str(qwen), '--port', '0', '--gpu-device', '99') as w:
        assert w.end(60) == 1 and w.event('error')['code'] == 'CUDA_ERROR'
    import cupy
    free = cupy.cuda.runtime.memGetInfo()[0]
    ballast = cupy.cuda.runtime.malloc(free - (300 << 20))
    try:
        with orcd('serve', '--model', str(qwen), '--port', '0') as w:
            assert w.end(60) == 1
            e = w.event('error')
            assert e['code'] in ('INSUFFICIENT_VRAM', 'CUDA_ERROR') and 'Traceback' not in ''.join(w.raw)
            if e['code'] == 'INSUFFICIENT_VRAM': assert e['required_bytes'] > e['available_bytes']
    finally: cupy.cuda.runtime.free(ballast)
