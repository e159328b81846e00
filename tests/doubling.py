"Is the time of a function linear in the size of its input? Seen by doubling the input, on a machine of any speed"
import gc, time


def cost(f, rounds):
    "CPU seconds of this thread for `rounds` calls"
    began = time.thread_time()
    for _ in range(rounds): f()
    return time.thread_time() - began


def doubling(make, n, limit=2.5, tries=8):
    """`make(n)` gives a function without arguments; its time at `n` may be at most `limit` times that at n/2. Quadratic work has a factor of 4.
    The smallest of several runs counts, for noise only ever makes one slower; the test stops as soon as it is good."""
    half, full = make(n // 2), make(n)
    gc.collect()
    once = min(cost(half, 1), cost(half, 1))
    rounds = max(1, min(1000, int(.004 / max(once, 1e-7))))     # long enough for the clock
    small, large = min(cost(half, rounds) for _ in range(3)), float('inf')
    for _ in range(tries):
        small, large = min(small, cost(half, rounds)), min(large, cost(full, rounds))
        if large <= limit * small: return
    raise AssertionError(f'{large / small:.2f} times as long for twice as much ({large / rounds * 1e3:.2f} ms for {n})')
