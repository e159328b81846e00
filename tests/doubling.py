"Is the time of a function linear in the size of its input? Seen by doubling the input four times, on a machine of any speed"
from speed import processor


def cost(f, rounds):
    "Processor seconds of this thread for one call, the mean of `rounds`, without the garbage collector, which looks at everybody's objects"
    def all_of_them():
        for _ in range(rounds): f()
    return processor(all_of_them) / rounds


def doubling(make, n, limit=2.5, tries=20):
    """`make(n)` gives a function without arguments. Each doubling of `n` may cost `limit` times as much; four of them, from `n // 16`
    on, are looked at together, so that neither a neighbour on the same machine nor its caches decide: linear work has a factor of 16,
    the limit is 39, quadratic work has 256. Beside linear work, quadratic work is seen from 1.7 times as much of it at `n`.
    The large input is compared with the small one before and after it, since a machine may be slow for a while; the smallest of
    several runs counts."""
    least = n // 16
    assert least, f'{n} cannot be halved four times'
    small, large = make(least), make(16 * least)
    once = min(cost(small, 1), cost(small, 1))
    rounds = max(1, min(1000, int(.004 / max(once, 1e-7))))     # long enough for the clock
    factor, before = float('inf'), cost(small, rounds)
    for _ in range(tries):
        took, after = cost(large, max(1, rounds // 16)), cost(small, rounds)
        factor, before = min(factor, took / min(before, after)), after
        if factor <= limit**4: return
    most = f'{limit**4:.0f} at most ({took * 1e3:.2f} ms for {16 * least})'
    raise AssertionError(f'{factor:.0f} times as long for sixteen times as much, {most}')
