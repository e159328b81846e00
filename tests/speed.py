"""Costs measured against the machine they are measured on, since no test may know how fast that is.

`cost(f)` is the processor time of `f` in units of a fixed piece of Python, timed in turn with it: the best of several tries of this
thread's time, with the garbage collector off. Other work on the machine weighs on unit and subject alike. A bound in a test is some
ten times what was seen. How time grows with size: doubling.py."""
import gc, time


def processor(f, clock=time.thread_time):
    "Seconds of one call"
    was = gc.isenabled()
    gc.disable()
    try:
        began = clock()
        f()
        return clock() - began
    finally:
        if was: gc.enable()


def unit():
    "Some 5 ms of what Python does all day: integers, a dictionary, slices of bytes"
    seen, data = {}, bytes(range(256)) * 4
    for i in range(20_000):
        seen[i & 1023] = seen.get(i & 511, 0) + i
        data[i & 1023:(i & 1023) + 8]


def cost(f, tries=3):
    "Units that f() takes, the best of the tries"
    best = float('inf')
    for _ in range(tries):
        before = processor(unit)
        taken = processor(f)
        best = min(best, taken / max(before, processor(unit)))
    return best
