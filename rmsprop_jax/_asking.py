"""Finds which parts of this library are in a transformation, by asking it rather than parsing it.

Every part reports itself when its ``init`` or ``update`` is called, wherever it is nested. So
tracing those of a wrapper, without computing anything, reveals exactly the parts that it contains.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import functools
import itertools
from typing import Any, NamedTuple, Protocol

import jax
from jax.experimental.xla_metadata import set_xla_metadata
import jax.numpy as jnp
import optax

from rmsprop_jax._types import PyTree

Init = Callable[[optax.Params], optax.OptState]


class Part(Protocol):
    """The two functions of a transformation as methods of a pytree that holds what they use."""

    def init(self, params: optax.Params) -> Any:
        """The state before the first step."""

    def update(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        """The updates of a step, and the state after it."""


class Report(NamedTuple):
    """A part, and the state that its init returned; None if its update was called."""

    part: Part
    state: optax.OptState


_REPORTS: contextvars.ContextVar[list[Report] | None] = contextvars.ContextVar(
    "rmsprop_jax_reports", default=None
)
_ASKED: contextvars.ContextVar[bool] = contextvars.ContextVar("rmsprop_jax_asked", default=False)
_QUESTIONS = itertools.count()


def report(part: Any, state: optax.OptState = None) -> None:
    """Records that a part was called, if anybody is collecting reports."""
    found = _REPORTS.get()
    if found is not None:
        found.append(Report(part, state))


def is_asked() -> bool:
    """Whether init is called only to learn which parts a transformation has."""
    return _ASKED.get()


@contextlib.contextmanager
def reports() -> Iterator[list[Report]]:
    """Collects the reports made in this context, in which jit is disabled."""
    found: list[Report] = []
    token = _REPORTS.set(found)
    try:
        with jax.disable_jit():
            yield found
    finally:
        _REPORTS.reset(token)


def ask(init: Init, params: optax.Params) -> tuple[list[Part], PyTree]:
    """The parts whose init is called by init, and the shapes and dtypes of its state.

    Nothing is computed. Values that only a computation would yield, such as hyperparameters that
    ``optax.inject_hyperparams`` keeps in its state, appear in a part as ``jax.ShapeDtypeStruct``.
    """
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(params)
    numbers = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]
    answer: list[Any] = []

    def traced(arrays: list[jax.Array]) -> None:
        known = dict(zip(numbers, arrays, strict=True))
        params = structure.unflatten([known.get(i, leaf) for i, leaf in enumerate(leaves)])
        with reports() as found:
            state = init(params)
        answer.extend(map(untraced, ([part for part, _ in found], state)))

    token = _ASKED.set(True)
    try:
        # A cached trace reports nothing. This context is new, so no trace is cached for it.
        with set_xla_metadata(rmsprop_jax=str(next(_QUESTIONS))):
            jax.eval_shape(traced, [leaves[i] for i in numbers])
    finally:
        _ASKED.reset(token)
    parts, state = answer
    return parts, state


def ask_without_params(init: Init) -> list[Part] | None:
    """The parts that init calls for placeholder parameters; None if these reveal nothing.

    A wrapper with a tree of masks or labels accepts only trees of the same structure, or the
    placeholder that Optax itself passes to an init whose parameters are unknown.
    """
    found: list[list[Part]] = []
    trees: list[PyTree] = [_placeholder(), {}, jax.ShapeDtypeStruct((1,), jnp.float32)]
    for tree in trees:
        with contextlib.suppress(Exception):  # whatever a wrapper raises without its own tree
            found.append(ask(init, tree)[0])
    most = max(found, key=len, default=[])
    return most if most or len(found) == len(trees) else None


@functools.cache
def _placeholder() -> PyTree:
    """What Optax passes to an init whose parameters are unknown, and its wrappers recognize."""
    found: list[PyTree] = []

    def init(params: optax.Params) -> tuple[()]:
        found.append(params)
        return ()

    optax.tree.map_params(init, lambda param: param, ())
    return found[0]


def untraced(tree: PyTree) -> PyTree:
    """A tree in which each tracer is replaced by its shape and dtype."""
    return jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            if isinstance(leaf, jax.core.Tracer)
            else leaf
        ),
        tree,
    )
