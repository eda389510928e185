"""What does small state cost and save? Steps with state in 8 and 16 bits beside float32 and Optax.

    python benchmarks/low_memory_step.py            # minutes; writes results/low_memory_step.json
    python benchmarks/low_memory_step.py --quick    # seconds; only shows that it runs

A step is update and apply_updates with donated buffers, of one leaf. Ratios are of the storage's
time to that of rmsprop with float32 state, and to that of optax.rmsprop: medians over alternating
pairs, with quartiles. Bytes are a parameter, moved as XLA counts what its kernels read and write;
GB/s is the latter over the time, beside that of a kernel that adds 1.
"""

from collections.abc import Sequence

import optax
from tqdm import tqdm

import _results
import libraries
from libraries import FORMS
from memory import STORAGES
from rmsprop_jax import rmsprop
from trees import Shapes

SMALL = ("q8", "bfloat16")


def row(form: str, name: str, elements: int, steps: int, pairs: int) -> _results.Row:
    shapes: Shapes = [(elements // 1024, 1024)]
    switches = FORMS[form]
    ours = libraries.of(rmsprop(1e-3, **switches, storage=STORAGES[name]), shapes)
    float32 = libraries.of(rmsprop(1e-3, **switches), shapes)
    against = libraries.compare(float32, ours, steps, pairs)
    in_optax = libraries.of(optax.rmsprop(1e-3, **switches), shapes)
    moved = [step.moved / elements for step in (float32, ours)]
    speed = [
        step.moved / seconds / 1e9
        for step, seconds in ((float32, against.theirs), (ours, against.ours))
    ]
    return {
        "elements": f"{elements:,}",
        "form": form,
        "storage": name,
        "float32 (ms)": f"{1e3 * against.theirs:.2f}",
        "storage (ms)": f"{1e3 * against.ours:.2f}",
        **against.columns(),
        "ratio to optax": f"{libraries.compare(in_optax, ours, steps, pairs).ratio:.2f}",
        "moved, float32 / storage": "{:.0f} / {:.0f}".format(*moved),
        "GB/s as moved": "{:.0f} / {:.0f}".format(*speed),
    }


def add_one(elements: int, steps: int, pairs: int, like: _results.Row) -> _results.Row:
    step = libraries.add_one(elements)
    seconds = libraries.compare(step, step, steps, pairs).ours
    found = {"elements": f"{elements:,}", "form": "x + 1", "float32 (ms)": f"{1e3 * seconds:.2f}"}
    found["moved, float32 / storage"] = f"{step.moved / elements:.0f}"
    return dict.fromkeys(like, "") | found | {"GB/s as moved": f"{step.moved / seconds / 1e9:.0f}"}


def main(argv: Sequence[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick
    sizes = (1 << 16,) if quick else (2 << 20, 16 << 20)
    steps, pairs = (1, 2) if quick else (5, 12)
    rows = []
    with tqdm(total=len(sizes) * (len(FORMS) * len(SMALL) + 1), unit="row") as bar:
        for elements in sizes:
            for form in FORMS:
                for name in SMALL:
                    bar.set_description(f"{elements:,}, {form}, {name}")
                    rows.append(row(form, name, elements, steps, pairs))
                    bar.update()
            rows.append(add_one(elements, steps, pairs, rows[0]))
            bar.update()
    return _results.finish("low_memory_step", rows, quick)


if __name__ == "__main__":
    main()
