"""The experts that an engine takes, and an oracle made to take the same.

FP16 roundings before a router change its scores a little. Where two of them are nearly equal the engine takes another expert than the
oracle: right, but all that follows is far off. So an oracle follows the engine's choice, which leaves the usual small differences,
and the choice is judged by itself:

with recorded(n_layer) as engine_took: got = engine.logits(ids) oracle = engine_took.follow() # called with the scores (T, n_expert)
of one router after the other, returns ids (T, k) with forced(reference_engine, oracle): want = reference_engine.logits(ids)
oracle.check(1e-2)
"""
from contextlib import contextmanager
import numpy as np


def best(scores, k): return np.argsort(-scores, axis=1, kind='stable')[:, :k]


class Recorded:
    """Scores (T, n_expert) and choice (T, k) of each layer in one prefill, from what its routers saw and took: layer by layer, chunk by
    chunk"""
    def __init__(self, n_layer): self.n_layer, self.calls = n_layer, []
    def layers(self, what): return [np.concatenate([c[what] for c in self.calls[i::self.n_layer]]) for i in range(self.n_layer)]
    @property
    def scores(self): return self.layers(0)
    @property
    def ids(self): return self.layers(1)
    def follow(self): return Follower(self.scores, self.ids)


class Follower:
    "Chooses for the routers of an oracle, in the same order but in chunks of any size, and remembers their scores"
    def __init__(self, scores, ids): self.engine_scores, self.ids, self.seen, self.calls = scores, ids, [[] for _ in ids], 0

    def __call__(self, scores):
        layer, self.calls = self.calls % len(self.ids), self.calls + 1
        at = sum(map(len, self.seen[layer]))
        self.seen[layer].append(np.array(scores))
        return self.ids[layer][at:at + len(scores)]

    def check(self,
        limit,    # of the difference between the engine's scores and the oracle's, over the standard deviation of the layer's scores
        few=.02,  # share of choices that the oracle would have made otherwise; two are allowed anyway
    ):
        """The engine took the best of its own scores, and these are the oracle's within `limit`. From that it follows that an expert
        which the oracle would not have taken lost by less than twice the limit; this is looked at as well, in the oracle's scores
        alone. Returns (share of other choices, worst loss, worst difference)."""
        swapped, lost, off = [], 0., 0.
        seen = map(np.concatenate, filter(None, self.seen))
        for layer, (a, ids, b) in enumerate(zip(self.engine_scores, self.ids, seen)):
            mine = a.shape == b.shape and (ids == best(a, ids.shape[1])).all()
            assert mine, f'layer {layer}: the engine did not take the best of its own scores'
            taken = np.zeros(b.shape, bool)
            np.put_along_axis(taken, ids, True, 1)
            # above 0 where the oracle prefers one that was left
            gap = np.where(taken, -np.inf, b).max(1) - np.where(taken, b, np.inf).min(1)
            swapped.append(gap > 0)
            lost, off = max(lost, gap.max() / b.std()), max(off, np.abs(a - b).max() / b.std())
            assert off < limit, f'layer {layer}: the scores differ by {off:.1e} standard deviations'
            assert lost < 2*limit, f'layer {layer}: an expert was taken that lost by {lost:.1e} standard deviations'
        assert np.sum(swapped) <= max(2, few*np.size(swapped)), f'{np.mean(swapped):.1%} of the choices differ'
        return float(np.mean(swapped)), float(lost), float(off)


@contextmanager
def recorded(n_layer):
    "What the routers of a CUDA engine see and take in the prefill inside"
    from orcd.engine.cuda_engine import CudaEngine
    seen = Recorded(n_layer)
    def watch(engine, launch, array):
        if launch.name != 'route': return
        seen.calls.append(tuple(array(launch.values[name]).get(stream=engine.stream) for name in ('logits', 'ids')))
    CudaEngine.replay, CudaEngine.watch = False, watch # a graph would not call it
    try: yield seen
    finally: CudaEngine.replay, CudaEngine.watch = True, None


@contextmanager
def forced(reference, follower):
    "A `ReferenceEngine` whose routers ask `follower`, unless it is None"
    from orcd.families.reference import Route, softmax
    if follower is None: yield; return
    def route(scores, k):
        ids = follower(scores)
        assert ids.shape == (len(scores), k)
        return Route(ids, softmax(np.take_along_axis(scores, ids, 1)))
    reference.model.ops.route = route
    try: yield
    finally: del reference.model.ops.route
