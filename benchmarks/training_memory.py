"""How much memory does a whole training step hold? Compiled for an H200, without one.

    .venv-gpu/bin/python benchmarks/training_memory.py    # writes results/training_memory.json
    .venv-gpu/bin/python benchmarks/training_memory.py --quick    # one form, small; writes nothing

`make test-gpu` creates that environment. The network is eight dense layers of 16.8 million
parameters each, on a batch so small that only parameters count. The step is the gradient, clipped
by its global norm so that all of it exists at once, update and apply_updates, with donated buffers.
Bytes are per parameter: those of the arrays, counted, and the peak of the compiled program, with
everything that it holds in between. Standard mixed precision has float32 parameters that are
rounded to bfloat16 for each step.
"""

from collections.abc import Sequence
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import optax
from tqdm import tqdm

import _results
import gpu_programs
from libraries import FORMS
from rmsprop_jax import low_memory, rmsprop

LAYERS, BATCH = 8, 16


class Way(NamedTuple):
    """The dtypes of parameters and computation, the storage, and the bits of master weights."""

    held: str
    computed: str
    storage: Any = None
    bits: int | None = None


WAYS = {
    "float32": Way("float32", "float32"),
    "float32, `q8`": Way("float32", "float32", low_memory.q8()),
    "standard mixed precision": Way("float32", "bfloat16"),
    "bfloat16 as it is": Way("bfloat16", "bfloat16"),
} | {
    f"master weights of {bits} bits{with_state}": Way("bfloat16", "bfloat16", storage, bits)
    for with_state, storage in (("", None), (", `q8`", low_memory.q8()))
    for bits in (32, 24, 16)
}


def loss(params: list[jax.Array], x: jax.Array, dtype: str) -> jax.Array:
    x = x.astype(dtype)
    for kernel in params:
        x = jnp.tanh(x @ kernel.astype(dtype))
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def row(way: str, form: str, width: int, place: NamedSharding) -> _results.Row:
    held, computed, storage, bits = WAYS[way]
    tx = rmsprop(1e-3, **FORMS[form], storage=storage)
    if bits:
        tx = low_memory.master_weights(tx, bits)
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)

    gradient = jax.grad(functools.partial(loss, dtype=computed))

    def struct(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        grads = gradient(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = [struct(jax.ShapeDtypeStruct((width, width), held))] * LAYERS
    state = jax.tree.map(struct, jax.eval_shape(tx.init, params))
    x = struct(jax.ShapeDtypeStruct((BATCH, width), "float32"))
    lowered = jax.jit(step, donate_argnums=(0, 1), out_shardings=place).lower(params, state, x)
    memory = lowered.compile().memory_analysis()
    assert memory

    numbers = LAYERS * width**2

    def nbytes(tree: Any) -> float:
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree)) / numbers

    (corrections,) = [state[1].corrections] if bits else [None]
    sizes = {
        "parameters": nbytes(params),
        "corrections": nbytes(corrections),
        "state": nbytes(state) - nbytes(corrections),
        "gradients": nbytes(jax.eval_shape(gradient, params, x)),
    }
    columns = {name: f"{size:.2f}" for name, size in sizes.items()}
    return {
        "training": way,
        "form": form,
        **columns,
        "sum": f"{sum(sizes.values()):.2f}",
        "peak": f"{memory.peak_memory_in_bytes / numbers:.2f}",
    }


def main(argv: Sequence[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick
    place = gpu_programs.gpu()
    width = 512 if quick else 4096
    forms = ["plain"] if quick else ["plain", "momentum"]
    cases = [(form, way) for form in forms for way in WAYS]
    rows = [row(way, form, width, place) for form, way in tqdm(cases, unit="row")]
    return _results.finish("training_memory", rows, quick)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for this process itself
    main()
