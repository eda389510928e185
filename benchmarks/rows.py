"""What does a step cost that touches some rows of a table, compared with Optax's dense step?

    python benchmarks/rows.py             # minutes; writes results/rows.json
    python benchmarks/rows.py --quick     # seconds; checks that it runs, writes nothing

A table has 64 columns; a batch is a number of random indices, with repetitions. Table and state are
donated. The dense step scatters the gradients of the batch into one of the whole table, as
`jax.grad` with respect to a table does, and applies `optax.rmsprop`'s update to it. Ours is
`rows.update`, after `rows.advance` if there is momentum. Times are medians over alternating pairs;
temporary memory is that of the compiled step. The two largest tables need 13 GB together.
"""

from collections.abc import Callable, Iterator, Sequence
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import _results
import _timing
from rmsprop_jax import rmsprop, rows

WIDTH = 64
FORMS: dict[str, dict[str, Any]] = {"plain": {}, "momentum": {"momentum": 0.9}}
Batch = tuple[jax.Array, jax.Array]  # indices of rows, and a gradient for each


def sparse(form: dict[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Init and step of ours."""
    tx = rmsprop(1e-3, **form)

    def step(table: jax.Array, state: Any, indices: jax.Array, grads: jax.Array) -> Any:
        if form:
            table, state = rows.advance(tx, indices, table, state)
        return rows.update(tx, indices, grads, table, state)

    return lambda table: rows.init(tx, table), step


def dense(form: dict[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Init and step of Optax's."""
    tx = optax.rmsprop(1e-3, **form)

    def step(table: jax.Array, state: Any, indices: jax.Array, grads: jax.Array) -> Any:
        whole = jnp.zeros_like(table).at[indices].add(grads)
        updates, state = tx.update(whole, state, table)
        return optax.apply_updates(table, updates), state

    return tx.init, step


def compiled(
    functions: tuple[Callable[..., Any], Callable[..., Any]], size: int, batch: Batch
) -> tuple[Callable[[], Any], int]:
    """A function that makes one step more, and the bytes of its temporary memory."""
    init, step = functions
    table = jnp.ones((size, WIDTH))
    carry = [table, init(table)]
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, *batch).compile()
    memory = program.memory_analysis()
    assert memory

    def run() -> Any:
        carry[:] = program(*carry, *batch)
        return carry

    return run, memory.temp_size_in_bytes


def cases(quick: bool) -> Iterator[tuple[int, int, str]]:
    """Numbers of rows and indices, and the form: first the table grows, then the batch."""
    for form in FORMS:
        if quick:
            yield 1000, 16, form
            continue
        yield from ((10**k, 4096, form) for k in range(4, 7))
        if form == "plain":  # with momentum, two such tables would need too much memory
            yield 10**7, 4096, form
        yield from ((10**6, batch, form) for batch in (256, 1024, 16384))


def row(size: int, indices: int, form: str, pairs: int) -> _results.Row:
    rng = np.random.default_rng(0)
    batch = (
        jnp.asarray(rng.integers(size, size=indices)),
        jnp.asarray(rng.standard_normal((indices, WIDTH), dtype=np.float32)),
    )
    ours, temporary = compiled(sparse(FORMS[form]), size, batch)
    theirs, theirs_temporary = compiled(dense(FORMS[form]), size, batch)
    pair = _timing.compare((theirs, ours), pairs)
    del ours, theirs
    gc.collect()
    return {
        "rows": f"{size:,}",
        "indices": f"{indices:,}",
        "form": form,
        "rows (ms)": f"{1e3 * pair.ours:.2f}",
        "optax, dense (ms)": f"{1e3 * pair.theirs:.2f}",
        "times as fast": f"{1 / pair.ratio:.3g}",
        "quartiles": f"{1 / pair.quartiles[1]:.3g} to {1 / pair.quartiles[0]:.3g}",
        "temporary, rows (MB)": f"{temporary / 1e6:.2f}",
        "temporary, dense (MB)": f"{theirs_temporary / 1e6:.2f}",
    }


def main(argv: Sequence[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick
    pairs = 2 if quick else 9
    each = tqdm([*cases(quick)], unit="row")
    found = [row(size, indices, form, pairs) for size, indices, form in each]
    return _results.finish("rows", found, quick)


if __name__ == "__main__":
    main()
