"""Is it as fast as optax.rmsprop? Jitted steps, eager updates, tracing and memory, side by side.

    python benchmarks/step.py             # a few minutes; writes benchmarks/results/step.json
    python benchmarks/step.py --quick     # seconds; only shows that it runs, and writes nothing

Ratios are ours / theirs, medians over alternating pairs, with their quartiles: below 1, we are
faster. A step is update and apply_updates with donated buffers; temporary memory is what its
compiled form needs beside them.
"""

import argparse
from collections.abc import Callable
import functools
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import _timing
from rmsprop_jax import rmsprop

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered, momentum": {"centered": True, "momentum": 0.9},
}
Make = Callable[..., optax.GradientTransformation]
Row = dict[str, Any]


def small_leaves(leaves: int, shapes: int) -> dict[str, jax.Array]:
    """A tree of leaves so small that the time is all overhead."""
    return {f"leaf{i}": jnp.ones((3 + i % shapes, 7)) for i in range(leaves)}


def step_of(make: Make, form: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
    tx = make(1e-3, **form)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def jitted(form: str, elements: int, steps: int, pairs: int) -> Row:
    """One large leaf, where the memory bus sets the pace."""
    grads = jnp.asarray(np.random.default_rng(0).standard_normal(elements, dtype=np.float32))
    sides: list[Callable[[], Any]] = []
    temporary = []
    for make in (optax.rmsprop, rmsprop):
        tx, step = step_of(make, FORMS[form])
        params = jnp.ones(elements)
        carry = [params, tx.init(params)]
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, grads).compile()
        memory = compiled.memory_analysis()
        temporary.append(memory.temp_size_in_bytes if memory else "unknown")

        def run(compiled: Any = compiled, carry: list[Any] = carry) -> Any:
            for _ in range(steps):
                carry[:] = compiled(*carry, grads)
            return carry

        sides.append(run)
    pair = _timing.compare(sides, pairs)
    what = f"jitted step, {elements:,} elements"
    per_step = pair._replace(theirs=pair.theirs / steps, ours=pair.ours / steps)
    return row(what, form, per_step, f"{temporary[0]} / {temporary[1]}")


def eager(form: str, leaves: int, pairs: int) -> Row:
    """An update outside jit: the time of dispatch."""
    tree = small_leaves(leaves, 60)
    sides: list[Callable[[], Any]] = []
    for make in (optax.rmsprop, rmsprop):
        tx = make(1e-3, **FORMS[form])
        sides.append(functools.partial(tx.update, tree, tx.init(tree)))
    return row(f"eager update, {leaves} leaves", form, _timing.compare(sides, pairs))


def traced(form: str, leaves: int, shapes: int, pairs: int) -> Row:
    """Tracing and lowering of a step, with nothing cached."""
    tree = small_leaves(leaves, shapes)
    sides: list[Callable[[], Any]] = []
    for make in (optax.rmsprop, rmsprop):
        tx, step = step_of(make, FORMS[form])
        state = tx.init(tree)

        def run(step: Callable[..., Any] = step, state: Any = state) -> None:
            jax.clear_caches()
            gc.collect()
            jax.jit(lambda *args: step(*args)).trace(tree, state, tree).lower()

        sides.append(run)
    return row(
        f"trace and lower, {leaves} leaves of {shapes} shapes", form, _timing.compare(sides, pairs)
    )


def row(what: str, form: str, pair: _timing.Pair, temporary: str = "") -> Row:
    low, high = pair.quartiles
    return {
        "what": what,
        "form": form,
        "optax (ms)": f"{1e3 * pair.theirs:.2f}",
        "ours (ms)": f"{1e3 * pair.ours:.2f}",
        "ratio": f"{pair.ratio:.2f}",
        "quartiles": f"{low:.2f} to {high:.2f}",
        "temporary bytes, optax / ours": temporary,
    }


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args(argv).quick

    elements, pairs = (100_000, 2) if quick else (16_000_000, 30)
    eager_leaves = 10 if quick else 161
    rows = []
    for form in FORMS:
        rows.append(jitted(form, elements, 5, pairs))
        print(rows[-1], flush=True)
    for form in FORMS:
        rows.append(eager(form, eager_leaves, pairs))
        print(rows[-1], flush=True)
    for leaves, shapes in ((20, 6),) if quick else ((700, 60), (100, 100)):
        for form in FORMS:
            rows.append(traced(form, leaves, shapes, 2 if quick else 9))
            print(rows[-1], flush=True)
    if not quick:
        print(f"wrote {_timing.save('step', rows)}\n")
    print(_timing.table(rows, _timing.machine()))
    return rows


if __name__ == "__main__":
    main()
