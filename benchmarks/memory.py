"""How many bytes does the state take, and how many does a step need on top?

    python benchmarks/memory.py             # seconds; writes results/memory.json
    python benchmarks/memory.py --quick     # two small trees; writes nothing

Bytes are per parameter: of all arrays of the state, and of the temporary memory of a compiled step
(update and apply_updates, donated) over one leaf of 16.8 million parameters. Optax's state is that
of optax.rmsprop. bitsandbytes' RMSprop has neither momentum nor a centered form; its state is
counted by the rule in its source (version 0.50.2, `optim/optimizer.py`): one byte per element and a
float32 for each 256 elements, and float32 for arrays of fewer than 4096.
"""

from collections.abc import Sequence
import math
from typing import Any

import optax
from tqdm import tqdm

import _results
import libraries
from libraries import FORMS, STORAGES
from rmsprop_jax import rmsprop
from trees import ONE_LEAF, TREES, Shapes, parameters

# Only the temporary memory of these is of interest: their state is that of momentum.
STEPS: dict[str, dict[str, Any]] = {
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "cautious": {"momentum": 0.9, "cautious": True},
    "nesterov, cautious": {"momentum": 0.9, "nesterov": True, "cautious": True},
}


def state(tx: optax.GradientTransformation, shapes: Shapes) -> float:
    """Bytes of state per parameter."""
    held = sum(array.size * array.dtype.itemsize for array in libraries.state_of(tx, shapes))
    return held / parameters(shapes)


def bitsandbytes(shapes: Shapes) -> float:
    sizes = [math.prod(shape) for shape in shapes]
    held = sum(4 * size if size < 4096 else size + 4 * -(-size // 256) for size in sizes)
    return held / sum(sizes)


def transformations(form: str) -> dict[str, optax.GradientTransformation | None]:
    """The transformations to compare; None where Optax has no such form."""
    switches: dict[str, Any] = (FORMS | STEPS)[form]
    ours = {name: rmsprop(1e-3, **switches, storage=storage) for name, storage in STORAGES.items()}
    theirs = None if "cautious" in switches else optax.rmsprop(1e-3, **switches)
    return {"optax": theirs} | ours


def main(argv: Sequence[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick
    one_leaf = ONE_LEAF
    networks = {"one leaf, 16.8M": one_leaf} | TREES
    if quick:
        one_leaf = [(64, 64)]
        networks = {"one leaf": one_leaf, "two leaves": [(64, 64), (8,)]}
    rows = []
    for form in tqdm(FORMS | STEPS, unit="form"):
        txs = transformations(form)
        for name, shapes in networks.items():
            if form in STEPS and shapes != one_leaf:
                continue
            row = {"parameters": name, "form": form}
            for which, tx in txs.items():
                row[f"state, {which}"] = f"{state(tx, shapes):.3f}" if tx else ""
            row["state, bitsandbytes"] = f"{bitsandbytes(shapes):.3f}" if form == "plain" else ""
            for which, tx in txs.items():
                temporary = ""
                if tx and shapes == one_leaf:
                    temporary = f"{libraries.of(tx, shapes).temporary / parameters(shapes):.2f}"
                row[f"temporary, {which}"] = temporary
            rows.append(row)
    return _results.finish("memory", rows, quick)


if __name__ == "__main__":
    main()
