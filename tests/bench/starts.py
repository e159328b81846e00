"""How long a worker takes from the start of its process until it is ready: `python tests/bench/starts.py FILE... [--n 4] [--device 0]`

Seconds until `startup` (Python and its imports), until the model is loaded, until `ready`; the first start of a file, which also fills caches, is not counted."""
import argparse, json, os, subprocess, sys, time
from statistics import median

EVENTS = 'startup', 'model_load_complete', 'ready'


def start(path, device):
    "Seconds until each event of one worker, which is ended then"
    command = [sys.executable, '-m', 'orcd.cli', 'serve', '--model', path, '--device', device, '--port', '0', '--log-format', 'json']
    began, seen = time.perf_counter(), {}
    worker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in worker.stderr:
        event = json.loads(line)
        if event['event'] == 'error': sys.exit(f"{path}: {event['message']}")
        if event['event'] in EVENTS: seen[event['event']] = time.perf_counter() - began
        if event['event'] == 'ready': break
    worker.terminate()
    worker.communicate()
    return seen


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('files', nargs='+')
    p.add_argument('--n', type=int, default=4, help='starts of each file')
    p.add_argument('--device', default='0')
    a = p.parse_args()
    for path in a.files:
        start(path, a.device)
        runs = [start(path, a.device) for _ in range(a.n)]
        print(f'{os.path.basename(path)}: ready after', *(f'{r["ready"]:.2f}' for r in runs), 's; medians:', ', '.join(f'{e} {median(r[e] for r in runs):.2f}' for e in EVENTS), flush=True)


if __name__ == '__main__': main()
