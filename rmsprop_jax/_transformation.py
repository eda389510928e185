"""What a transformation of this library is made of, and which of its parts are in another.

Other people's programs put transformations into wrappers, copies and files. So those of equal parts
are equal and copies of one are one, and nobody has to open a wrapper to know what is in it: every
part reports itself when its ``init`` or ``update`` is called.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import functools
from typing import Any, Protocol
import weakref

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax._types import PyTree

Init = Callable[[optax.Params], optax.OptState]


class Part(Protocol):
    """The two functions of a transformation as methods; a pytree with all that they depend on."""

    def init(self, params: optax.Params) -> optax.OptState:
        """The state before the first step."""

    def update(
        self,
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        """The updates of a step, and the state after it."""


class Transformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc] # untyped
    """The two functions, and the part that they are of."""

    part: Part | None = None  # as long as nobody puts other functions in their place

    def __reduce__(self) -> tuple[Any, ...]:
        # Functions inside functions cannot be pickled.
        if self.part is None:
            return optax.GradientTransformationExtraArgs, tuple(self)
        return transformation, (self.part,)

    def __copy__(self) -> "Transformation":
        return self

    def __deepcopy__(self, memo: Any) -> "Transformation":
        return self


def transformation(part: Part) -> Transformation:
    """The transformation of a part. Equal parts have the same functions, as long as these live."""

    def init(params: optax.Params) -> optax.OptState:
        _report(part)
        return part.init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        _report(part)
        return part.update(updates, state, params, **extra_args)

    identity = _identity(part)
    functions = (_FUNCTIONS.setdefault((f.__name__, identity), f) for f in (init, update))
    tx = Transformation(*functions)
    tx.part = part
    return tx


_FUNCTIONS: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


class _Same:
    """Equal to what has the very same value: the values of arrays may not be known yet."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _identity(part: Part) -> Any:
    """What is equal for equal parts, and can be hashed."""
    leaves, structure = jax.tree.flatten(part)
    found = (type(part), structure, *map(_leaf_identity, leaves))
    try:
        hash(found)
    except TypeError:  # of what a callable pytree has in its structure
        return _Same(part)
    return found


def _leaf_identity(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return _Same(leaf)
    try:
        hash(leaf)
    except TypeError:
        return _Same(leaf)
    return type(leaf), leaf


_REPORTS: contextvars.ContextVar[list[Part] | None] = contextvars.ContextVar(
    "rmsprop_jax_reports", default=None
)


def _report(part: Part) -> None:
    reports = _REPORTS.get()
    if reports is not None:
        reports.append(part)


def is_asked() -> bool:
    """Whether init is called only to learn which parts are in a transformation."""
    return _ASKED.get()


_ASKED: contextvars.ContextVar[bool] = contextvars.ContextVar("rmsprop_jax_asked", default=False)


@contextlib.contextmanager
def reports() -> Iterator[list[Part]]:
    """The parts whose init or update is called in this context, in their order.

    Compiled functions are run as they are written: their traces may be kept, and report nothing.
    """
    found: list[Part] = []
    token = _REPORTS.set(found)
    try:
        with jax.disable_jit():
            yield found
    finally:
        _REPORTS.reset(token)


def ask(init: Init, params: optax.Params) -> tuple[list[Part], PyTree]:
    """The parts that init calls, and the shapes and dtypes of its state.

    Nothing is computed. What is known only when it is, stands as a ``jax.ShapeDtypeStruct`` in a
    part: hyperparameters that ``optax.inject_hyperparams`` has in its state.
    """
    found: list[Part] = []

    def traced(params: optax.Params) -> optax.OptState:
        with reports() as parts:
            state = init(params)
        found.extend(jax.tree.map(_without_trace, part) for part in parts)
        return state

    token = _ASKED.set(True)
    try:
        state = jax.eval_shape(traced, params)
    finally:
        _ASKED.reset(token)
    return found, state


def stand_in(init: Init) -> PyTree:
    """In the place of parameters, the tree for which init calls most parts; None if it takes none.

    With a tree of masks or labels a wrapper may take no other parameters than those like it.
    """
    found: dict[int, PyTree] = {}
    trees: list[PyTree] = [_placeholder(), {}, jax.ShapeDtypeStruct((1,), jnp.float32)]
    for tree in trees:
        with contextlib.suppress(Exception):  # whatever a wrapper raises for want of its own tree
            found.setdefault(len(ask(init, tree)[0]), tree)
    return found[max(found)] if found else None


@functools.cache
def _placeholder() -> PyTree:
    """What Optax itself gives to an init of unknown parameters; its wrappers know it."""
    found: list[PyTree] = []

    def init(params: optax.Params) -> tuple[()]:
        found.append(params)
        return ()

    optax.tree.map_params(init, lambda param: param, ())
    return found[0]


def _without_trace(leaf: Any) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf
