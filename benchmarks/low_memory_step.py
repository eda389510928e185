"""What does small state cost and save? Steps with state in 8 and 16 bits beside float32 and Optax.

    python benchmarks/low_memory_step.py            # minutes; writes results/low_memory_step.json
    python benchmarks/low_memory_step.py --quick    # seconds; only shows that it runs

A step is update and apply_updates with donated buffers, of one leaf. Ratios are of the storage's
time to that of rmsprop with float32 state, and to that of optax.rmsprop: medians over alternating
pairs, with quartiles. Bytes are a parameter: of the state, of the temporary memory of the compiled
step, and moved, as XLA counts what its kernels read and write; GB/s is the latter over the time,
beside that of a kernel that adds 1.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import _timing
from rmsprop_jax import low_memory, rmsprop
from step import FORMS

STORAGES = {"q8": low_memory.q8(), "bfloat16": low_memory.bfloat16()}
Row = dict[str, Any]


class Step(NamedTuple):
    """A compiled step, and what it holds and moves a parameter."""

    run: Callable[[], Any]
    state: float
    temporary: float
    moved: float


def step_of(tx: optax.GradientTransformation, elements: int, steps: int) -> Step:
    shape = (elements // 1024, 1024)
    grads = jnp.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    params = jnp.ones(shape)
    carry = [params, tx.init(params)]

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, grads).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    temporary = memory.temp_size_in_bytes if memory else np.nan
    held = sum(array.nbytes for array in jax.tree.leaves(carry[1]))

    def run() -> Any:
        for _ in range(steps):
            carry[:] = compiled(*carry, grads)
        return carry

    per = 1 / params.size
    return Step(run, held * per, temporary * per, cost.get("bytes accessed", np.nan) * per)


def compare(form: str, name: str, elements: int, steps: int, pairs: int) -> Row:
    ours = step_of(rmsprop(1e-3, **FORMS[form], storage=STORAGES[name]), elements, steps)
    float32 = step_of(rmsprop(1e-3, **FORMS[form]), elements, steps)
    against = _timing.compare((float32.run, ours.run), pairs)
    theirs = step_of(optax.rmsprop(1e-3, **FORMS[form]), elements, steps)
    optax_ratio = _timing.compare((theirs.run, ours.run), pairs).ratio
    milliseconds = [1e3 * seconds / steps for seconds in (against.theirs, against.ours)]
    return {
        "elements": f"{elements:,}",
        "form": form,
        "storage": name,
        "float32 (ms)": f"{milliseconds[0]:.2f}",
        "storage (ms)": f"{milliseconds[1]:.2f}",
        "ratio": f"{against.ratio:.2f}",
        "quartiles": "{:.2f} to {:.2f}".format(*against.quartiles),
        "ratio to optax": f"{optax_ratio:.2f}",
        "state, float32 / storage": f"{float32.state:.2f} / {ours.state:.2f}",
        "temporary": f"{float32.temporary:.2f} / {ours.temporary:.2f}",
        "moved": f"{float32.moved:.0f} / {ours.moved:.0f}",
        "GB/s": f"{float32.moved * elements / milliseconds[0] / 1e6:.0f} / "
        f"{ours.moved * elements / milliseconds[1] / 1e6:.0f}",
    }


def copy(elements: int, steps: int, pairs: int, like: Row) -> Row:
    """What the memory gives to a kernel that reads and writes an array once."""
    compiled = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.ones(elements)).compile()
    carry = [jnp.ones(elements)]

    def run() -> Any:
        for _ in range(steps):
            carry[0] = compiled(carry[0])
        return carry

    seconds = _timing.compare((run, run), pairs).ours / steps
    found = {"elements": f"{elements:,}", "form": "x + 1", "float32 (ms)": f"{1e3 * seconds:.2f}"}
    found |= {"moved": "8", "GB/s": f"{8 * elements / seconds / 1e9:.0f}"}
    return dict.fromkeys(like, "") | found


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args(argv).quick

    sizes = (1 << 16,) if quick else (2 << 20, 16 << 20)
    steps, pairs = (1, 2) if quick else (5, 20)
    rows = []
    for elements in sizes:
        for form in FORMS:
            for name in STORAGES:
                rows.append(compare(form, name, elements, steps, pairs))
                print(rows[-1], flush=True)
        rows.append(copy(elements, steps, pairs, rows[0]))
    if not quick:
        print(f"wrote {_timing.save('low_memory_step', rows)}\n")
    print(_timing.table(rows, _timing.machine()))
    return rows


if __name__ == "__main__":
    main()
