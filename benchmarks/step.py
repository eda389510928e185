"""How long is a step beside the same step of other libraries, and beside what the memory allows?

    python benchmarks/step.py             # minutes; writes results/step.json
    python benchmarks/step.py --quick     # seconds; only shows that it runs, and writes nothing

A step is update and apply_updates, jitted, with donated buffers. Keras runs on JAX, jitted and
donated too; PyTorch eagerly, over all arrays at once (foreach) or one after the other (single).
Those that are not installed are left out.

Ratios are ours / theirs, medians over alternating pairs, that of Optax with its quartiles: below 1,
we are faster. GB/s counts what any implementation has to move, once: gradients read, parameters and
state read and written; its share is of what a kernel that adds 1 in place, to an array as large as
all parameters, reads and writes in the same seconds, timed in alternation with ours. Bytes are a
parameter: moved as XLA counts what its kernels read and write, temporary what the compiled step
needs beside its arguments.
"""

from collections.abc import Sequence
import gc

from tqdm import tqdm

import _results
import libraries
from libraries import FORMS, compare
from trees import ONE_LEAF, TREES, Shapes, parameters

SLOTS = {"plain": 1, "momentum": 2, "centered, momentum": 3}


def row(name: str, form: str, shapes: Shapes, steps: int, pairs: int) -> _results.Row:
    ours = libraries.ours(FORMS[form], shapes)
    numbers = parameters(shapes)
    needed = 4 + 8 * (1 + SLOTS[form])  # bytes a parameter

    in_place = compare(libraries.add_one(numbers), ours, steps, pairs)
    row = {
        "parameters": name,
        "form": form,
        "ours (ms)": f"{1e3 * in_place.ours:.2f}",
        "GB/s": f"{needed * numbers / in_place.ours / 1e9:.0f}",
        "of x + 1": f"{needed / 8 / in_place.ratio:.0%}",
        "temporary, ours": f"{ours.temporary / numbers:.2f}",
    }
    for library, make in libraries.others().items():
        theirs = make(FORMS[form], shapes)
        pair = compare(theirs, ours, steps, pairs)
        row[f"ours / {library}"] = f"{pair.ratio:.2f}"
        if library == "optax":
            row["quartiles"] = pair.columns()["quartiles"]
            row["moved, ours / optax"] = (
                f"{ours.moved / numbers:.0f} / {theirs.moved / numbers:.0f}"
            )
            row["temporary, optax"] = f"{theirs.temporary / numbers:.2f}"
        del theirs
        gc.collect()
    return row


def main(argv: Sequence[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick
    networks = {"one leaf, 16.8M": ONE_LEAF} | TREES
    if quick:
        networks = {"one leaf": [(64, 64)], "two leaves": [(8, 8), (8,)]}
    rows = []
    with tqdm(total=len(networks) * len(FORMS), unit="row") as bar:
        for name, shapes in networks.items():
            steps = 1 if quick else max(1, 10**8 // parameters(shapes))
            pairs = 2 if quick else 10 if len(shapes) == 1 else 5
            for form in FORMS:
                bar.set_description(f"{name}, {form}")
                rows.append(row(name, form, shapes, steps, pairs))
                bar.update()
    return _results.finish("step", rows, quick)


if __name__ == "__main__":
    main()
