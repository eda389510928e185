"""What do many small arrays cost, and would packing them into one pay off?

    python benchmarks/many_leaves.py             # minutes; writes results/many_leaves.json
    python benchmarks/many_leaves.py --quick     # seconds; checks that it runs, writes nothing

Times a jitted training step (gradients of a sum of squares, update, apply_updates; donated) over
leaves of 60 small shapes. Its time goes into passing arrays into and out of the program and into
starting kernels. Packed, the state is one array per slot: gradients are concatenated, 32 at a time
or, by `optax.flatten`, all at once, and the updates are cut apart again.

Ratios are packed / plain, medians over alternating pairs with quartiles. Seconds of compilation are
for one program, including its trace.
"""

from collections.abc import Callable, Sequence
import time
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import _results
import _timing
from eager import small_leaves
from libraries import train_step
from rmsprop_jax import rmsprop


def joined(tree: Any) -> jax.Array:
    """All elements of a tree in one array, concatenated 32 leaves at a time."""
    parts = [leaf.ravel() for leaf in jax.tree.leaves(tree)]
    while len(parts) > 1:
        parts = [jnp.concatenate(parts[i : i + 32]) for i in range(0, len(parts), 32)]
        parts = lax.optimization_barrier(parts)
    return parts[0]


def packed(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation, with a state of one array per slot."""

    def init(params: Any) -> Any:
        return tx.init(joined(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        leaves, tree = jax.tree.flatten(grads)
        updates, state = tx.update(joined(grads), state)
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = jnp.split(lax.optimization_barrier(updates), ends[:-1])
        shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(tree, shaped), state

    return optax.GradientTransformation(init, update)


WAYS: dict[str, Callable[[Any], Any]] = {"by 32": packed, "optax.flatten": optax.flatten}


def program(tx: optax.GradientTransformation, leaves: int) -> tuple[Callable[[], Any], float]:
    """A function that makes five steps, and the seconds until it was ready."""

    def loss(params: Any) -> jax.Array:
        return optax.tree.sum(jax.tree.map(lambda leaf: jnp.square(leaf - 0.5), params))

    def step(params: Any, state: Any) -> Any:
        return train_step(tx)(params, state, jax.grad(loss)(params))

    params = small_leaves(leaves)
    carry = [params, jax.jit(tx.init)(params)]
    start = time.perf_counter()
    # Called as users do, because how arrays enter a program is part of what is timed.
    jitted = jax.jit(step, donate_argnums=(0, 1))
    carry[:] = jax.block_until_ready(jitted(*carry))
    seconds = time.perf_counter() - start

    def run() -> Any:
        for _ in range(5):
            carry[:] = jitted(*carry)
        return carry

    return run, seconds


def rows_of(leaves: int, momentum: float | None, pairs: int) -> list[_results.Row]:
    plain, compilation = program(rmsprop(1e-3, momentum=momentum), leaves)
    rows = []
    for name, wrap in WAYS.items():
        run, seconds = program(wrap(rmsprop(1e-3, momentum=momentum)), leaves)
        pair = _timing.compare((plain, run), pairs).per(5)
        rows.append(
            {
                "leaves": leaves,
                "form": "momentum" if momentum else "plain",
                "packed": name,
                "plain tree (ms)": f"{1e3 * pair.theirs:.2f}",
                "packed (ms)": f"{1e3 * pair.ours:.2f}",
                **pair.columns(),
                "compile, plain tree (s)": f"{compilation:.1f}",
                "compile, packed (s)": f"{seconds:.1f}",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick
    counts, pairs = ((10,), 2) if quick else ((700, 2000), 20)
    rows = []
    for leaves in tqdm(counts, unit="tree"):
        for momentum in (None, 0.9):
            rows += rows_of(leaves, momentum, pairs)
    return _results.finish("many_leaves", rows, quick)


if __name__ == "__main__":
    main()
