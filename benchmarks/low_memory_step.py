"""What does small state cost and save? Steps with 8 and 16 bits, float32 state, and Optax.

    python benchmarks/low_memory_step.py            # minutes; writes results/low_memory_step.json
    python benchmarks/low_memory_step.py --quick    # seconds; checks that it runs, writes nothing

A step is update and apply_updates with donated buffers, on one leaf and on GPT-2. Ratios divide the
storage's time by that of rmsprop with float32 state, and by that of optax.rmsprop: medians over
alternating pairs, with quartiles. Bytes are per parameter: "moved" as XLA counts what its kernels
read and write, "temporary" what is needed beside arguments and results. GB/s is the bytes moved
divided by the time; a row of its own has that of a kernel that adds 1. Compilation is timed for one
program each.
"""

from collections.abc import Iterator, Sequence
import gc
from typing import Any

import optax
from tqdm import tqdm

import _results
import libraries
from libraries import FORMS, STORAGES
from rmsprop_jax import rmsprop
from trees import TREES, Shapes, parameters

SMALL = ("q8", "bfloat16")


def rows_of(name: str, shapes: Shapes, form: str, steps: int, pairs: int) -> Iterator[_results.Row]:
    """A row for each storage."""
    switches: dict[str, Any] = FORMS[form]
    n = parameters(shapes)
    float32 = libraries.of(rmsprop(1e-3, **switches), shapes)
    in_optax = libraries.of(optax.rmsprop(1e-3, **switches), shapes)
    for storage in SMALL:
        ours = libraries.of(rmsprop(1e-3, **switches, storage=STORAGES[storage]), shapes)
        against = libraries.compare(float32, ours, steps, pairs)
        both = (float32, against.theirs), (ours, against.ours)
        speed = [step.moved / seconds / 1e9 for step, seconds in both]
        yield {
            "parameters": name,
            "form": form,
            "storage": storage,
            "float32 (ms)": f"{1e3 * against.theirs:.2f}",
            "storage (ms)": f"{1e3 * against.ours:.2f}",
            **against.columns(),
            "ratio to optax": f"{libraries.compare(in_optax, ours, steps, pairs).ratio:.2f}",
            "moved, float32 / storage": f"{float32.moved / n:.0f} / {ours.moved / n:.0f}",
            "GB/s as moved": "{:.0f} / {:.0f}".format(*speed),
            "temporary bytes": f"{ours.temporary / n:.2f}",
            "compile, float32 / storage (s)": f"{float32.compiling:.2f} / {ours.compiling:.2f}",
        }
        del ours
        gc.collect()


def add_one(elements: int, steps: int, pairs: int, like: _results.Row) -> _results.Row:
    step = libraries.add_one(elements)
    seconds = libraries.compare(step, step, steps, pairs).ours
    found = {"parameters": f"{elements:,}", "form": "x + 1", "float32 (ms)": f"{1e3 * seconds:.2f}"}
    found["moved, float32 / storage"] = f"{step.moved / elements:.0f}"
    return dict.fromkeys(like, "") | found | {"GB/s as moved": f"{step.moved / seconds / 1e9:.0f}"}


def main(argv: Sequence[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick
    sizes = (1 << 16,) if quick else (2 << 20, 16 << 20)
    steps, pairs = (1, 2) if quick else (5, 12)
    trees: dict[str, Shapes] = {f"{size:,}": [(size // 1024, 1024)] for size in sizes}
    if not quick:
        trees["GPT-2"] = TREES["GPT-2"]
    rows: list[_results.Row] = []
    with tqdm(total=len(trees) * len(FORMS), unit="form") as bar:
        for name, shapes in trees.items():
            for form in FORMS:
                bar.set_description(f"{name}, {form}")
                rows += rows_of(name, shapes, form, 1 if name == "GPT-2" else steps, pairs)
                bar.update()
            if len(shapes) == 1:
                rows.append(add_one(parameters(shapes), steps, pairs, rows[0]))
    return _results.finish("low_memory_step", rows, quick)


if __name__ == "__main__":
    main()
