"""Shares, quantiles and norms over many arrays: what is counted of each, and what is made of it."""

from collections.abc import Iterable
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax import _equations
from rmsprop_jax._diagnostics._quantiles import count, quantiles
from rmsprop_jax._storage import Slot, is_packed
from rmsprop_jax.low_memory._eight_bit import EightBit

PERCENTILES = {"p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95}
Shape = tuple[int, ...]


class Tally:
    """What has been counted under one prefix. A complex number counts as two."""

    def __init__(self) -> None:
        self.rates: list[jax.Array] = []
        self.counts: dict[str, list[tuple[jax.Array, int]]] = {}
        self.squares: dict[str, list[jax.Array]] = {}

    def share(
        self,
        name: str,
        flags: jax.Array,
        shape: Shape,
        axes: tuple[str, ...] = (),
        also: jax.Array | None = None,
    ) -> None:
        """Counts true flags, of an array that is filled up from a shape, mean of mapped axes.

        What else must be true is a scalar: with it among the flags these could be constants, whose
        sum XLA computes when it compiles, in minutes.
        """
        true = count(flags & _within(flags, shape)).astype(jnp.float32)
        true = true if also is None else jnp.where(also, true, 0)
        true = lax.pmean(true, axes) if axes else true
        self.counts.setdefault(name, []).append((true, math.prod(shape)))

    def second_moment(
        self, s: Slot, scalars: _equations.Scalars, eps: jax.Array, in_sqrt: bool, shape: Shape
    ) -> None:
        """Adds a second moment or variance."""
        for part in reals(s.decode() if is_packed(s) else s):
            part = part.astype(eps.dtype)
            root = lax.sqrt(part + scalars.inner)
            root = root if scalars.outer is None else root + scalars.outer
            rate = lax.abs(scalars.eta) / root
            self.rates.append(jnp.where(_within(rate, shape), rate, np.nan))
            below = (part if in_sqrt else lax.sqrt(part)) < eps
            self.share("below_eps", below, shape)
            least = scalars.inner if in_sqrt else lax.sqrt(scalars.inner)
            self.share("at_guard/root", part < scalars.inner, shape, also=least > eps)
            if isinstance(s, EightBit):
                ends = (s.codes == 1) | (s.codes == np.iinfo(s.codes.dtype).max)
                self.share("at_guard/second_moment", ends, shape)
            else:
                half = scalars.rest * eps.dtype.type(float(jnp.finfo(eps.dtype).max) / 32)
                self.share("at_guard/second_moment", part >= half, shape, also=half > 0)

    def momentum(self, b: Slot, shape: Shape) -> None:
        """Adds a momentum buffer."""
        if isinstance(b, EightBit):
            self.share("at_guard/momentum", abs(b.codes) == 127, shape)
            return
        bound = float(jnp.finfo(b.dtype).max) / 4
        for part in reals(b):
            self.share("at_guard/momentum", abs(part) >= part.dtype.type(bound), shape)

    def not_finite(self, of: str, x: Slot, shape: Shape, axes: tuple[str, ...] = ()) -> None:
        for part in reals(x.decode() if is_packed(x) else x):
            self.share(f"not_finite/{of}", ~jnp.isfinite(part), shape, axes)

    def clipped(self, g: jax.Array, shape: Shape, axes: tuple[str, ...]) -> None:
        """Adds a gradient that a step would clip before it is squared."""
        for part in reals(g):
            real = jnp.result_type(part, jnp.float32)
            bound = real.type(_equations.largest_gradient(real))
            self.share("at_guard/grads", abs(part.astype(real)) > bound, shape, axes)

    def update(self, u: jax.Array, x: jax.Array) -> None:
        """Adds an update and its parameter."""
        for part in reals(u):
            largest = part.dtype.type(float(jnp.finfo(part.dtype).max))
            self.share("at_guard/update", abs(part) >= largest, u.shape)
        real = jnp.result_type(jnp.float32, jnp.finfo(u.dtype).dtype, jnp.finfo(x.dtype).dtype)
        us, xs = ([part.astype(real) for part in reals(array)] for array in (u, x))
        for part, of in zip(us, xs, strict=False):
            # Not by dtypes: a compiler may leave out the rounding of one that it widens again.
            rounded = lax.reduce_precision(of, exponent_bits=8, mantissa_bits=7)
            after = lax.reduce_precision(rounded + part, exponent_bits=8, mantissa_bits=7)
            self.share("lost", (part != 0) & (after == rounded), u.shape)
            self.share("moved", part != 0, u.shape)
        for name, parts in (("update", us), ("params", xs)):
            self.squares.setdefault(name, []).extend(jnp.sum(lax.square(part)) for part in parts)

    def scalars(self) -> dict[str, jax.Array]:
        """What is to be logged."""
        found: dict[str, jax.Array] = {}
        if any(rate.size for rate in self.rates):
            of_rates = quantiles(self.rates, list(PERCENTILES.values()))
            found |= {f"effective_lr/{n}": of_rates[i] for i, n in enumerate(PERCENTILES)}
        totals = {name: _sum(true for true, _ in of) for name, of in self.counts.items()}
        sizes = {name: sum(size for _, size in of) for name, of in self.counts.items()}
        for name, size in sizes.items():
            if size and name not in ("lost", "moved"):
                found[name] = _share(totals[name], np.float32(size))
        if self.squares:
            norm, of_params = (_root(_sum(self.squares[name])) for name in ("update", "params"))
            found["update/norm"] = norm
            found["update/relative_norm"] = norm / jnp.where(norm == 0, 1, of_params)
            moved = lax.max(totals["moved"], np.float32(1))
            found["update/lost_in_bfloat16"] = _share(totals["lost"], moved)
        return found


def reals(x: jax.Array) -> list[jax.Array]:
    """The parts of an array that are real."""
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _within(x: jax.Array, shape: Shape) -> jax.Array:
    """Where an array that is filled up from a shape has numbers of its own."""
    inside = jnp.asarray(True)
    for axis, (have, size) in enumerate(zip(x.shape, shape, strict=True)):
        if have != size:
            sharding = jax.typeof(x).sharding
            place = lax.broadcasted_iota(jnp.int32, x.shape, axis, out_sharding=sharding)
            inside = inside & (place < size)
    return inside


def _sum(scalars: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(lambda a, b: a + b, scalars)


def _share(some: jax.Array, of_all: Any) -> jax.Array:
    """Their quotient; 1 for all, which a compiler that multiplies by the inverse may miss."""
    return jnp.where(some == of_all, 1, some / of_all)


def _root(x: jax.Array) -> jax.Array:
    """The square root, with a derivative of 0 at 0."""
    return jnp.where(x == 0, 0, lax.sqrt(jnp.where(x == 0, 1, x)))
