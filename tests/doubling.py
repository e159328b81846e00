"Is the time of a function linear in the size of its input? Seen by doubling the input, on a machine of any speed"
import gc, time


def cost(f, rounds):
    "CPU seconds of this thread for `rounds` calls"
    began = time.thread_time()
    for _ in range(rounds): f()
    return time.thread_time() - began


def doubling(make, n, limit=2.5, tries=20):
    """`make(n)` gives a function without arguments. Each doubling of `n` may cost `limit` times as much; the last two, up to `n`, are
    looked at together, so that a neighbour on the same machine does not decide: linear work has a factor of 4, the limit is 6.25,
    quadratic work has 16. The smallest of several runs counts."""
    small, large = make(n // 4), make(n)
    gc.collect()
    once = min(cost(small, 1), cost(small, 1))
    rounds = max(1, min(1000, int(.004 / max(once, 1e-7))))     # long enough for the clock
    a, b = min(cost(small, rounds) for _ in range(3)), float('inf')
    for _ in range(tries):
        a, b = min(a, cost(small, rounds)), min(b, cost(large, rounds))
        if b <= limit * limit * a: return
    raise AssertionError(f'{b / a:.1f} times as long for four times as much ({b / rounds * 1e3:.2f} ms for {n})')
