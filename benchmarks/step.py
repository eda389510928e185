"""How fast is a step compared with other libraries, and with what the memory allows?

    python benchmarks/step.py             # minutes; writes results/step.json
    python benchmarks/step.py --quick     # seconds; checks that it runs, writes nothing

A step is update and apply_updates, jitted, with donated buffers. Keras runs on JAX, also jitted and
donated; PyTorch runs eagerly, over all arrays at once (foreach) or one by one (single). Libraries
that are not installed are left out.

Ratios are ours / theirs, medians over alternating pairs, for Optax with quartiles: below 1, ours is
faster. GB/s counts the bytes that any implementation has to move, once: gradients read, parameters
and state read and written. "of x + 1" is this speed as a share of that of a kernel that adds 1 in
place to an array as large as all parameters, timed in alternation with ours. Bytes are per
parameter: "moved" as XLA counts what its kernels read and write, "temporary" what the compiled step
needs beside its arguments. With master weights of 24 bits, our parameters and gradients are in
bfloat16, and theirs still in float32.
"""

from collections.abc import Callable, Sequence
import functools
import gc
from typing import Any, NamedTuple

from tqdm import tqdm

import _results
import libraries
from libraries import FORMS, Step, compare
from trees import ONE_LEAF, TREES, Shapes, parameters


class Form(NamedTuple):
    """A form of the rule, the bytes per parameter that our step has to move, and our step."""

    theirs: dict[str, Any]
    needed: int
    ours: Callable[[Shapes], Step]


def float32(form: str, slots: int) -> Form:
    """A float32 form: gradients are read, parameters and slots read and written."""
    return Form(FORMS[form], 4 + 8 * (1 + slots), functools.partial(libraries.ours, FORMS[form]))


def master_weights(storage: str, slot: int) -> Form:
    """Gradients of 2 bytes, parameters of 2, corrections of 1, and a slot of `slot` bytes."""
    ours = functools.partial(libraries.master_weights, storage)
    return Form(FORMS["plain"], 2 + 2 * (2 + 1 + slot), ours)


ROWS = {
    "plain": float32("plain", 1),
    "momentum": float32("momentum", 2),
    "centered, momentum": float32("centered, momentum", 3),
    "plain, master weights": master_weights("float32", 4),
    "plain, master weights, `q8`": master_weights("q8", 1),
}


def row(name: str, form: str, shapes: Shapes, steps: int, pairs: int) -> _results.Row:
    switches, needed, make_ours = ROWS[form]
    ours = make_ours(shapes)
    numbers = parameters(shapes)

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
        theirs = make(switches, shapes)
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
    with tqdm(total=len(networks) * len(ROWS), unit="row") as bar:
        for name, shapes in networks.items():
            steps = 1 if quick else max(1, 10**8 // parameters(shapes))
            pairs = 2 if quick else 10 if len(shapes) == 1 else 5
            for form in ROWS:
                bar.set_description(f"{name}, {form}")
                rows.append(row(name, form, shapes, steps, pairs))
                bar.update()
    return _results.finish("step", rows, quick)


if __name__ == "__main__":
    main()
