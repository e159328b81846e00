"""How long a worker takes from the start of its process until it is ready: `python tests/bench/starts.py FILE... [--n 4] [--device 0]`

Seconds until `startup` (Python and its imports), until the model is loaded, until `ready`; the first start of a file, which also
fills caches, is not counted."""
import argparse, os, sys, time
from statistics import median
from orcd.serve.cli import spawn

EVENTS = 'startup', 'model_load_complete', 'ready'


def start(path, device):
    "Seconds until each event of one worker, which is ended then"
    began, times = time.perf_counter(), {}
    worker, where = spawn('--model', path, '--device', device, seen=lambda e: times.update({e['event']: time.perf_counter() - began}))
    if worker.returncode is not None: sys.exit(f'{path}: {where}')
    worker.terminate()
    worker.communicate()
    return times


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('files', nargs='+')
    p.add_argument('--n', type=int, default=4, help='starts of each file')
    p.add_argument('--device', default='0')
    a = p.parse_args()
    for path in a.files:
        start(path, a.device)
        runs = [start(path, a.device) for _ in range(a.n)]
        print(f'{os.path.basename(path)}: ready after', *(f'{r["ready"]:.2f}' for r in runs), 's; medians:',
            ', '.join(f'{e} {median(r[e] for r in runs):.2f}' for e in EVENTS), flush=True)


if __name__ == '__main__': main()
