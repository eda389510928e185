"""RMSProp on ONE array; everything else in this package lifts, stores or translates it.

s <- gamma s + (1 - gamma) |g|^2
u  = eta g / sqrt(s + eps)
x <- x - u

symbol  argument         meaning                                   unit
g                        gradient                                  loss / parameter
x                        parameter                                 parameter
s       (nu)             second moment of g; centered: variance    gradient squared
m       (mu)             mean of g, centered only                  gradient
b       (trace)          momentum buffer                           parameter, or 1 (*)
u                        step                                      parameter
eta     learning_rate    size of a step                            parameter
gamma   decay            weight of the past in s and m             1
eps     eps              keeps the root away from 0                gradient squared inside
                                                                   the root, gradient outside
mu      momentum         weight of the past in b                   1
lam     weight_decay     pull towards 0                            gradient / parameter;
                                                                   1 / parameter if decoupled

(*) 1 if the learning rate is applied after the buffer.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from rmsprop_jax._arrays import abs2, by_parts, clip, narrow, share_of, unfused, widen
from rmsprop_jax._storage import Draw, Slot, Storage
from rmsprop_jax._types import Hyperparameter


class Variant(NamedTuple):
    """Which RMSProp: the structure of the rule, which is static under tracing."""

    eps_in_sqrt: bool
    centered: bool
    bias_correction: bool
    nesterov: bool
    lr_in_momentum: bool
    decoupled_weight_decay: bool
    cautious: bool
    maximize: bool
    split_complex: bool
    storage: Storage


class Decay(NamedTuple):
    """gamma and 1 - gamma of a decay given as a number: each has digits that the other lacks."""

    gamma: Hyperparameter
    rest: Hyperparameter


class Hyper(NamedTuple):
    """The hyperparameters, named like the arguments; None for a term that is absent."""

    learning_rate: Hyperparameter
    decay: Hyperparameter
    eps: Hyperparameter
    momentum: Hyperparameter
    weight_decay: Hyperparameter


class Scalars(NamedTuple):
    """The hyperparameters of one step, in the dtype of its arithmetic; None for an absent term."""

    eta: jax.Array
    gamma: jax.Array
    rest: jax.Array  # 1 - gamma
    low: jax.Array  # the digits of gamma that its dtype lacks
    inner: jax.Array  # added inside the root
    outer: Hyperparameter  # added outside
    mu: Hyperparameter
    lam: Hyperparameter


class Slots(NamedTuple):
    """The state of one array, with fields named as in RMSPropState; None for those not in use."""

    nu: Slot
    mu: Slot | None
    trace: Slot | None


class Turn(NamedTuple):
    """The step (int32) and the leaf (uint32), on which stochastic rounding depends."""

    step: jax.Array
    leaf: jax.Array


def largest_gradient(real: jnp.dtype) -> float:
    """The size at which gradients are clipped: even the difference of two can be squared."""
    return float(jnp.finfo(real).max) ** 0.5 / 4


@functools.partial(jax.jit, static_argnums=(1, 2))
def scalars(hyper: Hyper, variant: Variant, real: jnp.dtype) -> Scalars:
    """The scalars of a step whose arithmetic is in the dtype real, made once for all leaves.

    What is added to s is at least the smallest normal number. So 0 / 0 is 0, its derivative is
    finite, and where |g|^2 underflows, u stays within 1 / sqrt(1 - gamma). If |eta| is above 2,
    more is added, so that eta g / root stays within a quarter of the largest number.
    """

    def number(h: Hyperparameter) -> Hyperparameter:
        return None if h is None else jnp.asarray(h, real)

    eta, _, eps, mu, lam = map(number, hyper._replace(decay=None))
    least = real.type(float(jnp.finfo(real).tiny) ** 0.5)
    if mu is None or variant.lr_in_momentum:
        least = lax.max(least, lax.abs(eta) * real.type(float(jnp.finfo(real).max) ** -0.5))
    # Squared last: XLA turns the square of a product into a product of squares, which overflow.
    least = lax.stop_gradient(lax.square(least))
    inner, outer = (lax.max(eps, least), None) if variant.eps_in_sqrt else (least, eps)
    return Scalars(eta, *_weights(hyper.decay, real), inner, outer, mu, lam)


def _weights(decay: Decay | jax.Array, real: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """gamma, 1 - gamma, and the digits of gamma that its dtype lacks."""
    if isinstance(decay, Decay):
        gamma, rest = (jnp.asarray(number, real) for number in decay)
    else:
        gamma = jnp.asarray(decay, real)
        rest = 1 - gamma
    return gamma, rest, (1 - gamma) - rest


@functools.partial(jax.jit, static_argnums=5)
def step(
    g: jax.Array,
    x: jax.Array | None,
    slots: Slots,
    scalars: Scalars,
    turn: Turn | None,
    variant: Variant,
) -> tuple[jax.Array, Slots]:
    """-u, in the shape and dtype of g, and the new slots; finite for every g that is not NaN.

    Jitted at module level: outside jit, an update costs one dispatch per array; inside jit, each
    shape is traced once, however often the transformation is rebuilt.
    """
    # Converts numbers and NumPy arrays as jit does, in case jit is disabled.
    g, x, slots, turn = jax.tree.map(jnp.asarray, (g, x, slots, turn))
    with jax.disable_jit():  # operators are jitted too, and trace faster if inlined
        return _step(g, x, slots, scalars, turn, variant)


def _step(
    g: jax.Array,
    x: jax.Array | None,
    slots: Slots,
    scalars: Scalars,
    turn: Turn | None,
    variant: Variant,
) -> tuple[jax.Array, Slots]:
    s, m, b = slots
    eta, gamma, rest, low, inner, outer, mu, lam = scalars
    storage = variant.storage
    real = storage.dtype(s)
    tiny, largest = real.type(jnp.finfo(real).tiny), float(jnp.finfo(real).max)
    square = functools.partial(by_parts, lax.square) if variant.split_complex else abs2

    def pull() -> jax.Array:
        return clip(lam * widen(x, real), largest)

    decays = lam is not None
    coupled = decays and not variant.decoupled_weight_decay

    def unbounded() -> jax.Array:
        h = widen(-g if variant.maximize else g, real)
        return h + pull() if coupled else h

    def grad() -> jax.Array:
        return clip(unbounded(), largest_gradient(real))

    if not storage.draws:
        grad = functools.cache(grad)  # for a float32 state, computing it once is enough
    draws = Slots(None, None, None)
    if turn is not None:
        infinite = Draw(*turn, 0, lambda: 0 * unbounded())
        draws = Slots(infinite, infinite._replace(slot=1), None)
        if b is not None:  # where the bounded u is NaN; and its bound, unless centered
            size = None if variant.centered else lax.rsqrt(lax.max(rest, tiny))
            if size is not None and variant.lr_in_momentum:
                size = lax.min(lax.abs(eta) * size, real.type(largest**0.5))
            nan = Draw(*turn, 2, lambda: 0 * grad() + (0 * eta + 0 * mu), size)
            draws = draws._replace(trace=nan)

    # accumulate(s, gamma, r) is gamma s + r, as a value and as the slot that holds it. Each slot is
    # a sum of new terms, with the addition last. Of anything else XLA:CPU would keep a copy and
    # compute the slot again inside the loop that uses it.
    if m is None:
        # s <- gamma s + (1 - gamma) |g|^2
        v, s = storage.accumulate(s, gamma, lambda: rest * square(grad()), low=low, draw=draws.nu)
    else:
        # m <- gamma m + (1 - gamma) g,  s <- gamma s + (1 - gamma) / gamma |g - m|^2:
        # this is E|g|^2 - |m|^2 as a sum of squares. As g - mean = gamma (g - m), the last term is
        # gamma (1 - gamma) |g - m|^2. It vanishes with gamma, where a rounded mean is not g.
        mean, m = storage.accumulate(m, gamma, lambda: rest * grad(), low=low, draw=draws.mu)
        least = real.type(jnp.finfo(real).eps)
        ratio = jnp.where(gamma > least, rest / lax.max(gamma, least), 0)

        def term() -> jax.Array:
            return ratio * square(grad() - mean(0))

        v, s = storage.accumulate(s, gamma, term, low=low, draw=draws.nu)

    def scaled(copy: int) -> jax.Array:
        """The gradient over its root; all copies are equal.

        XLA:CPU computes a root that two loops need in a loop of its own, and stores it. It does not
        notice that the roots of two copies are equal, so each loop computes its own.
        """

        def over_root(part: jax.Array, v: jax.Array) -> jax.Array:
            if copy:
                v = lax.max(v, real.type(-copy))  # changes nothing, as v >= 0
            if variant.centered:  # v may be 0 where g is not; a derivative would be 0 * inf
                v = jnp.where(v < tiny, tiny, v)
            root = lax.sqrt(v + inner)
            return part / (root if outer is None else root + outer)

        return by_parts(over_root, grad(), v(copy))

    # From here |u| stays within largest / 2, and within largest once the buffer is added.
    if b is None:
        move = -eta * scaled(0)
    else:

        def new(copy: int) -> jax.Array:
            return eta * scaled(copy) if variant.lr_in_momentum else scaled(copy)

        # b <- mu b + u
        trace, b = storage.accumulate(b, mu, lambda: new(0), largest / 2, draw=draws.trace)

        def moved(copy: int) -> jax.Array:
            if not variant.nesterov:
                return trace(copy)
            return clip(new(copy) + mu * trace(copy), largest)

        u = moved(1)
        if variant.cautious:
            # The direction of descent; of ascent if a negative learning rate is in the buffer.
            down = jnp.where(eta < 0, -grad(), grad()) if variant.lr_in_momentum else grad()
            share = share_of(_agrees(moved(2), down), real)
            mask = _agrees(u, down).astype(real)
            u = clip(u * (mask / lax.max(share, real.type(1e-3))), largest)
        move = -u if variant.lr_in_momentum else clip(-eta * u, largest / 2)
    if decays and not coupled:
        move = clip(move, largest / 2) - clip(eta * pull(), largest / 2)
    return narrow(move, g.dtype), Slots(s, m, b)


@jax.jit
def correct_bias(hyper: Hyper, weight_sum: jax.Array, count: jax.Array) -> tuple[Hyper, jax.Array]:
    """The hyperparameters of the step that keeps s (and m) divided by the sum w of the weights.

        w <- gamma w + (1 - gamma),  1 - gamma_hat = (1 - gamma) / w

    This is exact under a scheduled decay, where dividing by 1 - gamma^t is not. While w = 0 no
    gradient has counted yet, and an infinite eps makes the step 0.
    """
    gamma, rest, low = _weights(hyper.decay, weight_sum.dtype)
    zero = count >> 31  # count is never negative
    w = unfused(gamma * weight_sum, zero) + (rest + unfused(low * weight_sum, zero))
    # Otherwise XLA might divide by w and another number at once, in one program but not in another.
    rest = unfused(rest / lax.max(w, jnp.finfo(w.dtype).tiny), zero)
    eps = jnp.where(w > 0, hyper.eps, jnp.inf)
    return hyper._replace(eps=eps, decay=Decay(1 - rest, rest)), w


def _agrees(u: jax.Array, g: jax.Array) -> jax.Array:
    """Where the step u descends. NaN counts as descending, so that it changes nothing elsewhere."""
    if jnp.iscomplexobj(g):
        product = (jnp.sign(u) * jnp.conj(jnp.sign(g))).real
    else:
        product = jnp.sign(u) * jnp.sign(g)
    return ~(product <= 0)
