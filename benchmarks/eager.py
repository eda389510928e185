"""How fast is an update outside jit, where dispatch takes all the time?

    python benchmarks/eager.py             # a minute; writes results/eager.json
    python benchmarks/eager.py --quick     # seconds; checks that it runs, writes nothing

Times `tx.update` on small leaves, as many as ResNet-50 has. Ratios are ours / optax, medians over
alternating pairs with quartiles: below 1, ours is faster.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import optax

import _results
import _timing
from libraries import FORMS
from rmsprop_jax import rmsprop


def small_leaves(leaves: int) -> dict[str, jax.Array]:
    """Leaves of 60 shapes, so small that the time is all overhead."""
    return {f"leaf{i}": jnp.ones((3 + i % 60, 7)) for i in range(leaves)}


def row(form: str, leaves: int, pairs: int) -> _results.Row:
    tree = small_leaves(leaves)
    txs = [make(1e-3, **FORMS[form]) for make in (optax.rmsprop, rmsprop)]
    sides = [functools.partial(tx.update, tree, tx.init(tree)) for tx in txs]
    pair = _timing.compare(sides, pairs)
    return {
        "leaves": leaves,
        "form": form,
        "optax (ms)": f"{1e3 * pair.theirs:.2f}",
        "ours (ms)": f"{1e3 * pair.ours:.2f}",
        **pair.columns(),
    }


def main(argv: Sequence[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick
    leaves, pairs = (10, 2) if quick else (161, 30)
    rows = [row(form, leaves, pairs) for form in FORMS]
    return _results.finish("eager", rows, quick)


if __name__ == "__main__":
    main()
