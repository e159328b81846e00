"""Is each layer right by itself?

Over many layers roundings that went the other way add up, until they hide a mistake of their size. So the oracle computes one layer at a time, from the
stream that the engine had before it: what is left are the flips of that layer alone. How many there may be the oracle says itself, when its products
are off at random by what Hopper's are off by."""
import numpy as np

NOISE = 2.5e-6 # the most that a product of Hopper is off by, of its size: nbs/results/h200.json, product_of_hopper_against_float64_rms
DRAWS = 5      # of that noise, of which the largest counts: few flips make a worst case, so one draw says little about it
FACTOR = 2     # times that: the engine's sums differ elsewhere too, in norms and in attention
FLOOR = 2e-5   # an allowance for what has no noise: flips after a norm whose sum came in another order
WHAT = 'all', 'worst position', 'worst channel'


def apart(a, b, x):
    "How far two streams (T, n_embd) after a layer are apart, over what the layer added to `x`: all, worst position, worst channel"
    d, added = a.astype(float) - b, b.astype(float) - x
    return [np.linalg.norm(d)/np.linalg.norm(added)] + [(np.linalg.norm(d, axis=i)/np.linalg.norm(added, axis=i)).max() for i in (1, 0)]


def layer_errors(oracle, residuals, n_layer, follow=lambda: None):
    """`apart` of each layer, (n_layer, 3): the engine from the oracle, and the oracle with noise from itself, the largest of some draws.
    `residuals`: the engine's streams before and after each layer. `follow()`: a new `choose` for the oracle."""
    oracle.random.manual_seed(0) # whatever was drawn before
    before, after = residuals[:n_layer], residuals[1:n_layer + 1]
    def layers(noise):
        oracle.noise, oracle.choose = noise, follow()
        return oracle.layers(before)
    noisy, want = [layers(NOISE) for _ in range(DRAWS)], layers(0)
    errors, *spread = (np.array([apart(*one) for one in zip(streams, want, before)]) for streams in (after, *noisy))
    return errors, np.max(spread, 0)


def limits(spread): return FACTOR*spread + FLOOR


def too_far(errors, spread):
    "In words, what is above its limit"
    limit = limits(spread)
    return [f'layer {i} by itself, {WHAT[k]}: {errors[i, k]:.1e}, limit {limit[i, k]:.1e}' for i, k in np.argwhere(~(errors <= limit))]
