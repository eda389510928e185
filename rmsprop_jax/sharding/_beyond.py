"""Updates of parts of leaves that give the same result as on whole leaves, or are refused.

If a wrapper of the rule decides something by many elements, for example whether all are finite,
each device would decide by its own parts, and replicas would diverge permanently. So the update is
traced, and its program is analyzed:

* If it asks whether all or any elements of a part satisfy a condition, or how many do, or for the
  largest or smallest of integers, the question is put to all devices.
* Everything else computed from several elements of a part, such as a norm or a mean, has to go into
  a collective, as the scales of ``q8`` do. If it reaches an update or the state directly, it is
  refused.
"""

from collections.abc import Callable, Iterator, Sequence
import enum
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
import jax.numpy as jnp

from rmsprop_jax._leaves import leaf_name
from rmsprop_jax._types import PyTree

_COLLECTIVES = ("psum", "pmax", "pmin", "all_gather", "psum_invariant", "all_gather_invariant")
_MIXING = (
    *("sort", "top_k", "fft", "dot_general", "conv_general_dilated", "reduce"),
    *("cholesky", "eig", "eigh", "lu", "geqrf", "qr", "householder_product", "svd", "schur"),
    *("hessenberg", "triangular_solve", "tridiagonal", "tridiagonal_solve"),
)
_DECISIONS = ("reduce_and", "reduce_or", "reduce_sum", "reduce_max", "reduce_min")


class Seen(enum.IntEnum):
    """What a value depends on."""

    WHOLE = 0  # only on what all devices have
    PART = 1  # on one element of a part each
    BEYOND = 2  # on several elements of a part


def update_of_parts(
    update: Callable[..., Any], args: tuple[Any, ...], is_part: PyTree, axes: Sequence[str]
) -> Any:
    """The value of update(*args), where some of the arrays are this device's parts."""
    if not any(jax.tree.leaves(is_part)):
        return update(*args)
    closed, shapes = jax.make_jaxpr(update, return_shape=True)(*args)
    seen = [Seen.PART if part else Seen.WHOLE for part in jax.tree.leaves(is_part)]
    follow = _Following(frozenset(axes))
    found = follow.levels(closed.jaxpr, seen)
    if Seen.BEYOND in found:
        (first, *path), _ = jax.tree_util.tree_leaves_with_path(shapes)[found.index(Seen.BEYOND)]
        what = ("the update", "the state")[first.idx]
        raise ValueError(
            "tx must treat each element by itself, or ask whether all are finite: zero1_mapped "
            f"gives it parts of leaves, and {what} {leaf_name(tuple(path))!r} depends on a "
            f"{follow.mixed} of them. Clip averaged gradients by norm before zero1_mapped, or use "
            "zero1"
        )
    if not follow.decisions:
        return update(*args)
    values = follow.values(closed, jax.tree.leaves(args), seen)
    return jax.tree.unflatten(jax.tree.structure(shapes), values)


class _Following:
    """Follows parts of leaves through a program."""

    def __init__(self, axes: frozenset[str]) -> None:
        self.axes = axes
        self.decisions = False  # whether any have to be made by all devices together
        self.mixed = ""  # otherwise, the first operation that mixed elements

    def levels(self, jaxpr: Jaxpr, seen: Sequence[Seen], *, inlined: bool = True) -> list[Seen]:
        """What the results depend on. Decisions can be shared only if the operation is inlined."""
        known: dict[Any, Seen] = dict(zip(jaxpr.invars, seen, strict=True))

        def read(values: Sequence[Any]) -> list[Seen]:  # literals and constants are WHOLE
            return [
                Seen.WHOLE if isinstance(v, Literal) else known.get(v, Seen.WHOLE) for v in values
            ]

        for eqn in jaxpr.eqns:
            known |= zip(eqn.outvars, self._after(eqn, read(eqn.invars), inlined), strict=True)
        return read(jaxpr.outvars)

    def values(self, closed: ClosedJaxpr, args: Sequence[Any], seen: Sequence[Seen]) -> list[Any]:
        """The results, with decisions made by all devices together."""
        jaxpr = closed.jaxpr
        known = dict(zip(jaxpr.constvars, ((c, Seen.WHOLE) for c in closed.consts), strict=True))
        known |= zip(jaxpr.invars, zip(args, seen, strict=True), strict=True)

        def read(v: Any) -> tuple[Any, Seen]:
            return (v.val, Seen.WHOLE) if isinstance(v, Literal) else known[v]

        for eqn in jaxpr.eqns:
            ins, of = [read(v)[0] for v in eqn.invars], [read(v)[1] for v in eqn.invars]
            after = self._after(eqn, of, inlined=True)
            if eqn.primitive.name == "jit" and Seen.PART in of:
                outs = self.values(eqn.params["jaxpr"], ins, of)
            else:
                bound = eqn.primitive.get_bind_params(eqn.params)  # functions only before jax 0.10
                functions, params = bound if isinstance(bound, tuple) else ((), bound)
                outs = eqn.primitive.bind(*functions, *ins, **params)
                outs = outs if eqn.primitive.multiple_results else [outs]
                if Seen.PART in of and _is_decision(eqn):
                    outs = [self._together(eqn, outs[0])]
            known |= zip(eqn.outvars, zip(outs, after, strict=True), strict=True)
        return [read(v)[0] for v in jaxpr.outvars]

    def _after(self, eqn: JaxprEqn, of: Sequence[Seen], inlined: bool) -> list[Seen]:
        """What the results of an operation depend on."""
        name, most, size = eqn.primitive.name, max(of, default=Seen.WHOLE), len(eqn.outvars)
        if most == Seen.WHOLE or (name in _COLLECTIVES and self.axes <= _axes(eqn)):
            return [Seen.WHOLE] * size
        inside = [*_jaxprs(eqn.params)]
        if name == "jit":
            return self.levels(inside[0], of, inlined=inlined)
        if name == "cond":
            each = [self.levels(branch, of[1:], inlined=False) for branch in inside]
            return [max(of[0], *outs) for outs in zip(*each, strict=True)]
        for jaxpr in inside:  # loops, and functions with custom derivatives
            same = len(jaxpr.invars) == len(of) and name not in ("scan", "while")
            outs = self.levels(jaxpr, of if same else [most] * len(jaxpr.invars), inlined=False)
            most = max(most, *outs, Seen.WHOLE)
        if inside:
            return [most] * size
        if _mixes(name):
            if inlined and most == Seen.PART and _is_decision(eqn):
                self.decisions = True
                return [Seen.WHOLE]
            self.mixed = self.mixed or name
            return [Seen.BEYOND] * size
        return [most] * size

    def _together(self, eqn: JaxprEqn, x: jax.Array) -> jax.Array:
        """Combines what each device found in its part."""
        axes, name = tuple(self.axes), eqn.primitive.name
        if name == "reduce_sum":
            return lax.psum(x, axes)
        of_all = lax.pmin if name in ("reduce_and", "reduce_min") else lax.pmax
        return of_all(x.astype(jnp.int32), axes).astype(x.dtype)


def _mixes(name: str) -> bool:
    """Whether an operation computes one number from several."""
    reduces = name.startswith(("reduce_", "arg", "cum")) and name != "reduce_precision"
    return reduces or name in _MIXING


def _is_decision(eqn: JaxprEqn) -> bool:
    """Whether it tells if all or any elements are true, how many, or the extreme of integers."""
    if eqn.primitive.name not in (
        "reduce_and",
        "reduce_or",
        "reduce_sum",
        "reduce_max",
        "reduce_min",
    ):
        return False
    x: Any = eqn.invars[0].aval
    is_exact = x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer)
    return is_exact and len(eqn.params["axes"]) == x.ndim


def _axes(eqn: JaxprEqn) -> frozenset[Any]:
    """The axes of a collective."""
    axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    return frozenset(axes if isinstance(axes, tuple) else (axes,))


def _jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs inside an operation."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr | Jaxpr):
                yield one.jaxpr if isinstance(one, ClosedJaxpr) else one
