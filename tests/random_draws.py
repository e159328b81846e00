"What the sampler is given, on the CPU and on a GPU: logits with all that may be in them, a constraint that any engine can follow"
import numpy as np


def some(rng, *values): return values[rng.integers(len(values))]


def random_logits(rng, n, nothing=(-np.inf,)):
    "Of some size, with ties, infinities and not-a-numbers now and then; `nothing`: what all of them may be"
    x = (rng.normal(size=n) * rng.choice([1e-7, .5, 3, 12])).astype('f4')
    kind = rng.integers(9)
    if kind == 0: x = np.round(x)
    if kind == 1: x[rng.random(n) < .5] = -np.inf
    if kind == 2: x[rng.integers(n, size=3)] = np.nan
    if kind == 3: x[rng.integers(n)] = 80
    if kind == 4: x[:] = x[0]
    if kind == 5: x[:] = some(rng, *nothing)
    if kind == 6: x[rng.integers(n, size=2)] = np.inf
    if kind == 7: x = np.where(rng.random(n) < .5, np.float32(0), np.float32(-0.))
    return x


class Multiples:
    "A constraint: the next token is a multiple of a number that depends on the last; anything now and then"
    def __init__(self, n, length=10**6): self.n, self.length, self.told = n, length, []
    @property
    def done(self): return len(self.told) == self.length
    def mask(self):
        if len(self.told) % 4 == 3: return None
        may = np.zeros(-(-self.n // 32) * 32, bool)
        may[::3 + (self.told[-1] % 5 if self.told else 0)] = True
        return np.packbits(may, bitorder='little').view(np.uint32)
    def commit(self, id): self.told.append(id)
