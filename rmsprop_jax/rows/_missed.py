"""The steps that rows missed without a gradient: k steps of the rule for g = 0 at once, on one
array.

s <- r s,                  r = gamma^k
b <- mu^k b
x <- q^k x - eta b (q^(k-1) mu + q^(k-2) mu^2 + ... + mu^k),    q = 1 - eta lam

The symbols are those of _equations. Without decoupled decay q is 1. eta is omitted if it is part of
the buffer, and nesterov adds one more factor mu. If centered, s is a variance:

m <- r m,  s <- r (s + (1 - r) |m|^2)

With bias correction, s and m are divided by the sum w of their weights, which is 1 - gamma^t after
t steps. Then r = gamma^k w / w', with w before and w' after the missed steps.
"""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp

from rmsprop_jax._arrays import abs2, by_parts, unfused
from rmsprop_jax._equations import Slots
from rmsprop_jax._rule import Rule
from rmsprop_jax._types import Scalar


def refuse(rule: Rule) -> None:
    """Refuses a rule whose missed steps have no closed form."""
    rate, decay, _, mu, lam = rule.hyper
    for name, value in (("decay", decay), ("momentum", mu)):
        if callable(value):
            raise ValueError(f"{name} must be the same in all steps, got the schedule {value!r}")
    if mu is not None and not rule.variant.lr_in_momentum and callable(rate):
        raise ValueError(
            "learning_rate must be the same in all steps if lr_in_momentum is False, got the "
            f"schedule {rate!r}"
        )
    if lam is None:
        return
    if not rule.variant.decoupled_weight_decay:
        raise ValueError(
            f"weight_decay must be None or decoupled, got {lam!r}: coupled with the gradient, it "
            "makes each missed step depend on the one before"
        )
    if not isinstance(rate, float) or not isinstance(lam, float) or rate * lam >= 1:
        raise ValueError(
            "learning_rate and weight_decay must be numbers whose product is below 1, if the "
            f"decay is decoupled, got {rate!r} and {lam!r}"
        )


def caught_up(
    x: jax.Array, slots: Slots, last: jax.Array, count: jax.Array, rule: Rule
) -> tuple[jax.Array, Slots]:
    """Rows and slots that had taken last steps (one number per row), brought forward to count."""
    variant, (rate, decay, _, mu, lam) = rule.variant, rule.hyper
    real = jnp.finfo(x.dtype).dtype
    last = last.reshape(-1, *[1] * (x.ndim - 1))
    k = (count - last).astype(real)
    product = functools.partial(_product, zero=count >> 31)  # count is never negative

    s, m, b = slots
    r, rest = _power(decay, k), _rest(decay, k)  # rest is 1 - r
    if variant.bias_correction:
        then, after = (_rest(decay, t.astype(real)) for t in (last, count))
        after = jnp.where(after > 0, after, 1)
        r, rest = r * (then / after), rest / after
    if m is not None:
        square = functools.partial(by_parts, lax.square) if variant.split_complex else abs2
        s, m = s + product(rest, square(m)), product(r, m)
    s = product(r, s)

    q = 1.0
    if lam is not None:
        q = 1 - rate * lam
        x = product(_power(q, k), x)
    if b is not None:
        way = _powers(q, mu, k) * jnp.asarray(mu, real)
        if variant.nesterov:
            way = way * jnp.asarray(mu, real)
        if not variant.lr_in_momentum:
            way = way * jnp.asarray(rate, real)
        x, b = x - product(way, b), product(_power(mu, k), b)
    return x, Slots(s, m, b)


def _powers(a: Scalar, b: Scalar, k: jax.Array) -> jax.Array:
    """The sum of a^i b^j over all i and j whose sum is k - 1, which is (a^k - b^k) / (a - b)."""
    arrays = isinstance(a, jax.Array) or isinstance(b, jax.Array)
    high, low = (jnp.maximum(a, b), jnp.minimum(a, b)) if arrays else (max(a, b), min(a, b))
    difference = jnp.asarray(high - low, k.dtype)
    # The greater one is factored out; what remains is 1 - (low / high)^k.
    rest = -jnp.expm1(_times(k, _log(low) - _log(high)))
    equal = k / jnp.asarray(high, k.dtype)
    sum_ = jnp.where(difference > 0, rest / jnp.where(difference > 0, difference, 1), equal)
    return _power(high, k) * sum_


def _power(base: Scalar, k: jax.Array) -> jax.Array:
    """The number base^k."""
    return jnp.exp(_times(k, _log(base)))


def _rest(base: Scalar, k: jax.Array) -> jax.Array:
    """The number 1 - base^k, with the digits that it has where base is near 1."""
    return -jnp.expm1(_times(k, _log(base)))


def _log(base: Scalar) -> Scalar:
    """The logarithm, in float64 for a Python number."""
    if isinstance(base, jax.Array):
        return jnp.log(base)
    return math.log(base) if base > 0 else -math.inf


def _times(k: jax.Array, log: Scalar) -> jax.Array:
    """The logarithm of base^k, which is 0 for k = 0 even if the base is 0."""
    return jnp.where(k > 0, k * jnp.asarray(log, k.dtype), 0)


def _product(a: jax.Array, b: jax.Array, zero: jax.Array) -> jax.Array:
    """Rounded, so that a sum that follows is bit-identical in every program."""
    with jax.numpy_dtype_promotion("standard"):  # of real and complex numbers
        return unfused(a * b, zero)
