"""Is what the pages say about GPUs true on this one? Correctness, bits, speed and memory.

    python benchmarks/on_gpu.py                # minutes; writes results/on_gpu_*.json
    python benchmarks/on_gpu.py --out FOLDER   # writes them there
    python benchmarks/on_gpu.py --quick        # seconds, on any device; writes only with --out

Run from a checkout, with PYTHONPATH set to it, this needs only the library's dependencies and jax
with CUDA. PyTorch is timed as well if it is installed for CUDA. Files are written row by row. The
exit status is 1 if a row exceeds its bound or a section fails; the other sections still run.

correctness  The rule in each dtype compared with a loop in NumPy's float64: twenty steps over
             numbers of 18 orders of magnitude (10 in float16). Errors are relative to the largest
             update of their coordinate, or to the smallest normal number. Extremes are the largest
             numbers, the smallest, and infinities, which must give finite updates; a NaN in every
             seventh coordinate must stay in its own.
bits         The elements of small state that differ from those that this machine's CPU computes
             from the same gradients.
step         Times of update and apply_updates, jitted and donated; ratios are medians over
             alternating pairs, with quartiles. GB/s is what `x + 1` in place reads and writes, for
             as many elements. "of x + 1" is the share of that speed at which a step moves the bytes
             that have to move: gradients read, parameters and state read and written, and 8-bit
             codes read once more, for their largest element.
memory       Bytes per parameter, of the state and of a compiled step beside its arguments.
"""

from collections.abc import Iterator, Sequence
import functools
import gc
import math
import os
from pathlib import Path
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import _correctness
import _results
import _timing
import libraries
from libraries import FORMS, STORAGES
from rmsprop_jax import rmsprop
from trees import ONE_LEAF, TREES, Shapes, parameters

Found = Iterator[tuple[str, _results.Row]]  # rows, each with the name of its table


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def correctness(quick: bool) -> Found:
    cases = {name: _correctness.CASES[name] for name in [*_correctness.CASES][:: 3 if quick else 1]}
    steps, numbers = (5, 64) if quick else (20, 4096)
    for dtype, bound in _correctness.BOUNDS.items():
        with jax.enable_x64(dtype == "float64"):
            found = _correctness.compare(dtype, cases, steps, numbers)
        for form, (error, finite) in found.items():
            row = {
                "dtype": dtype,
                "form": form,
                "largest error": f"{error:.2e}",
                "bound": f"{bound:.2e}",
                "extremes": "finite" if finite else "not finite, or NaN spreads",
                "holds": yes(error <= bound and finite),
            }
            yield "correctness", row


def bits(quick: bool) -> Found:
    """Compares states of leaves that are large enough for 8 bits."""
    shapes = {"matrix": (64, 128), "tall": (1031, 7), "vector": (5000,), "kernel": (3, 3, 32, 48)}
    steps = 3 if quick else 20
    rng = np.random.default_rng(0)
    grads = [
        {
            name: rng.standard_normal(shape, np.float32) * 10.0 ** rng.integers(-4, 3, shape[-1:])
            for name, shape in shapes.items()
        }
        for _ in range(steps)
    ]
    grads = jax.tree.map(np.float32, grads)
    devices = jax.devices()[0], jax.devices("cpu")[0]
    for storage in ("q8", "bfloat16"):
        for form, switches in FORMS.items():
            tx = rmsprop(1e-3, **switches, storage=STORAGES[storage])
            update = jax.jit(tx.update)
            here, there = (state_after(tx, update, grads, device) for device in devices)
            for field, name in (("nu", "second moments"), ("mu", "means"), ("trace", "momentum")):
                numbers, different = differing(getattr(here, field), getattr(there, field))
                if not numbers:
                    continue
                bound = 0 if (form, field) == ("plain", "nu") else None
                yield (
                    "bits",
                    {
                        "storage": storage,
                        "form": form,
                        "slots": name,
                        "steps": steps,
                        "numbers": numbers,
                        "different": different,
                        "share": f"{different / numbers:.1e}",
                        "bound": "" if bound is None else bound,
                        "holds": "" if bound is None else yes(different <= bound),
                    },
                )


def state_after(tx: optax.GradientTransformation, update: Any, grads: Any, device: Any) -> Any:
    """The state after an update with each of the gradients."""
    with jax.default_device(device):
        state = tx.init(jax.tree.map(jnp.ones_like, grads[0]))
        for g in grads:
            _, state = update(jax.device_put(g, device), state)
    return jax.device_get(state)


def differing(here: Any, there: Any) -> tuple[int, int]:
    """How many elements two trees of arrays have, and how many are not bit-identical."""
    numbers = different = 0
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(one).view(f"u{one.dtype.itemsize}") for one in (a, b))
        numbers += a.size
        different += int(np.sum(a != b))
    return numbers, different


def speed(quick: bool) -> Found:
    """Times of steps, and the memory that they need."""
    networks = {"one leaf, 16.8M": ONE_LEAF, "GPT-2": TREES["GPT-2"]}
    large: Shapes = [(16384, 16384)]
    available = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    if available > 64 * parameters(large):
        networks["one leaf, 268M"] = large
    if quick:
        networks = {"two leaves": [(64, 96), (8,)]}
    for name, shapes in networks.items():
        # So many that they keep a device of 2 TB/s busy for about 50 ms.
        steps, pairs = (1, 2) if quick else (5 * 10**9 // parameters(shapes), 8)
        for form in FORMS:
            yield from of_form(name, shapes, form, functools.partial(timed, steps, pairs))


def timed(steps: int, pairs: int, theirs: libraries.Step, ours: libraries.Step) -> _timing.Pair:
    return libraries.compare(theirs, ours, steps, pairs)


def of_form(name: str, shapes: Shapes, form: str, compare: Any) -> Found:
    """A row for the table of steps, and one for the table of memory."""
    numbers = parameters(shapes)
    txs = {"optax": optax.rmsprop(1e-3, **FORMS[form])}
    for storage, held in STORAGES.items():
        txs[storage] = rmsprop(1e-3, **FORMS[form], storage=held)
    ours = libraries.of(txs["float32"], shapes)
    copied = compare(libraries.add_one(numbers), ours)
    bandwidth = 8 * numbers / copied.theirs
    temporary = {"float32": ours.temporary}

    def share(which: str, seconds: float) -> str:
        return f"{needed(txs[which], shapes) / seconds / bandwidth:.0%}"

    row = {
        "parameters": name,
        "form": form,
        "x + 1 (GB/s)": f"{bandwidth / 1e9:.0f}",
        "ours (ms)": f"{1e3 * copied.ours:.3f}",
        "of x + 1": share("float32", copied.ours),
    }
    for which in ("optax", "torch foreach", "bfloat16", "q8"):
        small = which in STORAGES
        ratio = f"{which} / ours" if small else f"ours / {which}"
        row |= {ratio: "", f"{ratio}, quartiles": ""}
        step = libraries.of(txs[which], shapes) if which in txs else torch(form, shapes)
        if step is None:
            continue
        pair = compare(ours, step) if small else compare(step, ours)
        row[ratio], row[f"{ratio}, quartiles"] = pair.columns().values()
        if small:
            row[f"{which}, of x + 1"] = share(which, pair.ours)
        temporary[which] = step.temporary
        del step
        gc.collect()
    yield "step", row
    state = {which: nbytes(libraries.state_of(tx, shapes)) / numbers for which, tx in txs.items()}
    yield (
        "memory",
        {"parameters": name, "form": form}
        | {f"state, {which}": f"{held:.3f}" for which, held in state.items()}
        | {f"temporary, {which}": f"{temporary[which] / numbers:.3f}" for which in txs},
    )


def torch(form: str, shapes: Shapes) -> libraries.Step | None:
    """PyTorch's step, if it is installed for this device."""
    make = libraries.others().get("torch foreach")
    return make(FORMS[form], shapes) if make else None


def needed(tx: optax.GradientTransformation, shapes: Shapes) -> int:
    """The bytes that a step has to move."""
    state = libraries.state_of(tx, shapes)
    codes = [array for array in state if array.dtype.itemsize == 1]
    return 3 * 4 * parameters(shapes) + 2 * nbytes(state) + nbytes(codes)


def nbytes(arrays: Sequence[jax.ShapeDtypeStruct]) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)


# Each with the tables that it fills.
SECTIONS = {("correctness",): correctness, ("bits",): bits, ("step", "memory"): speed}


def main(argv: Sequence[str] | None = None) -> int:
    """The number of rows that exceed their bounds plus that of sections that failed."""
    parser = _results.parser(__doc__)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: benchmarks/results")
    args = _results.parse(parser, argv)
    if not args.quick and jax.devices()[0].platform != "gpu":
        parser.error("there is no GPU here: jax finds none. --quick runs on any device")
    folder = args.out or (None if args.quick else _results.RESULTS)
    start, failures = time.perf_counter(), 0

    def say(*what: Any) -> None:
        print(f"{time.perf_counter() - start:.1f} s", *what, sep=" | ", flush=True)

    for names, section in SECTIONS.items():
        tables: dict[str, list[_results.Row]] = {name: [] for name in names}
        try:
            for name, row in section(args.quick):
                tables[name].append(row)
                failures += row.get("holds") == "no"
                if folder:
                    _results.write(folder / f"on_gpu_{name}.json", tables[name])
                say(name, *row.values())
        except Exception:  # whatever it is, the other sections are still useful
            traceback.print_exc()
            failures += 1
        say(f"done: {' and '.join(names)}")
        for rows in filter(None, tables.values()):
            print(f"\n{_results.table(rows, _results.machine())}\n", flush=True)
    print(f"failures: {failures}")
    return failures


if __name__ == "__main__":
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.6")  # PyTorch needs the rest
    raise SystemExit(main() > 0)
