"""Do bfloat16 parameters train like float32 ones? Test losses, paired by seed.

    python benchmarks/low_precision_quality.py          # writes results/low_precision_quality.json
    python benchmarks/low_precision_quality.py --quick  # checks that it runs, writes nothing

All networks compute in bfloat16, forward and backward, so gradients are in bfloat16. For each seed,
all methods start from the same parameters, rounded to bfloat16, and see the same batches. The
reference has float32 parameters, which are rounded to bfloat16 for each step: standard mixed
precision. A method trains like the reference if the 95% interval of the relative difference between
their test losses lies within -3% to 3%. This margin was fixed before any method was run, and the
learning rates were chosen in float32; they fall linearly to 0. The rule has eps 1e-8 outside the
root and decay 0.99, except for the regression, whose decay is 0.999; the CNN has momentum 0.9.

The negative control has plain bfloat16 parameters, and must fail somewhere. Another row computes
everything in float32, which shows what computing in bfloat16 costs. After
`pip install flashoptim-jax`, its Adam without a first moment, which is the same rule, is added
where there is no momentum; its count starts late, so that its bias correction is 1.
"""

from collections.abc import Callable, Sequence
import functools
import importlib.util
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
import optax
from tqdm import tqdm

from _paired import SEEDS, columns, trained
import _results
from _tasks import (
    Dtype,
    Params,
    Task,
    clothes,
    lstm,
    real_data,
    regression,
    transformer,
    words,
)
from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._arrays import unfused

STEPS = 1 << 20  # more than any run has
STORAGES = {"float32": None, "`q8`": low_memory.q8()}


class Optimizer(NamedTuple):
    """A transformation that applies its own updates."""

    init: Callable[[Params, int], Any]  # takes parameters, and the seed of the rounding
    step: Callable[[Params, Any, Params], tuple[Params, Any]]  # takes parameters, state, gradients


class Method(NamedTuple):
    """How parameters and state are held, and how they are trained."""

    parameters: str
    state: str
    optimizer: Callable[[Task], Optimizer | None]  # None if it has no such rule
    held: Dtype = jnp.bfloat16  # of the parameters
    computed: Dtype = jnp.bfloat16


def falling(task: Task) -> Callable[[jax.Array], jax.Array]:
    """The learning rate, from the task's to 0; the count may begin at any multiple of STEPS."""
    schedule = optax.linear_schedule(task.learning_rate, 0.0, task.steps)
    return lambda count: schedule(count % STEPS)


def ours(task: Task, storage: Any = None, bits: int | None = None) -> Optimizer:
    """RMSProp, with master weights if bits are given."""
    rule = rmsprop(
        falling(task), task.decay, eps_in_sqrt=False, momentum=task.momentum, storage=storage
    )
    tx = low_memory.master_weights(rule, bits) if bits else rule

    def init(params: Params, seed: int) -> Any:
        # Stochastic rounding depends on the step count, so each seed starts at a count of its own.
        count, state = jnp.int32(seed * STEPS), tx.init(params)
        if bits:
            state = state._replace(inner_state=state.inner_state._replace(count=count))
        return state._replace(count=jnp.copy(count))

    def step(params: Params, state: Any, grads: Params) -> tuple[Params, Any]:
        zero = state.count >> 31
        updates, state = tx.update(grads, state, params)
        # All programs round the updates before adding them.
        updates = jax.tree.map(lambda u: unfused(u, zero), updates)
        return optax.apply_updates(params, updates), state

    return Optimizer(init, step)


def flashoptim(task: Task, quantize: bool) -> Optimizer | None:
    """FlashOptim's Adam without a first moment, with weights of 24 bits."""
    if task.momentum:
        return None
    from flashoptim_jax import flash_adam

    tx = flash_adam(
        falling(task),
        b1=0.0,
        b2=task.decay,
        master_weight_bits=24,
        quantize=quantize,
        fused=False,  # its fused form needs a GPU
    )

    def init(params: Params, seed: int) -> Any:  # noqa: ARG001
        # Some of its arrays are the same buffer, which cannot be donated twice.
        return jax.tree.map(jnp.copy, tx.init(params)._replace(count=jnp.int32(STEPS)))

    return Optimizer(init, tx.step)


def methods() -> list[Method]:
    """All methods, with the reference first."""
    found = [
        Method("float32", "float32", ours, held=jnp.float32),
        Method("float32, computed in it", "float32", ours, jnp.float32, jnp.float32),
        Method("control: bfloat16 as it is", "float32", ours),
    ]
    for bits in (32, 24, 16):
        for name, storage in STORAGES.items():
            master = functools.partial(ours, storage=storage, bits=bits)
            found.append(Method(f"bfloat16, {bits} bits", name, master))
    if importlib.util.find_spec("flashoptim_jax"):
        for name, quantize in (("float32", False), ("its 8 bits", True)):
            port = functools.partial(flashoptim, quantize=quantize)
            found.append(Method("FlashOptim's port, 24 bits", name, port))
    return found


def rounded(tree: Params, dtype: Dtype) -> Params:
    """Rounds to nearest, halves up as master weights do; on bits, as XLA may skip conversions."""

    def cut(x: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
        bits = (bits + (0x8000 - (bits < 0))) >> 16
        return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)

    return tree if dtype == jnp.float32 else jax.tree.map(cut, tree)


def train(
    task: Task, method: Method, seeds: Sequence[int], bar: tqdm
) -> tuple[NDArray[np.float64], float] | None:
    """Test losses after the last step, one per seed, and bytes per parameter held in all."""
    optimizer = method.optimizer(task)
    if not optimizer:
        bar.update(len(seeds))
        return None
    test = jax.device_put(task.test)

    @jax.jit
    def evaluate(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        return task.loss(rounded(params, method.computed), x, y)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, rows: Any, picked: jax.Array) -> Any:
        low = rounded(params, method.computed)
        grads = rounded(
            jax.grad(task.loss)(low, *(array[picked] for array in rows)), method.computed
        )
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        return optimizer.step(params, state, grads)

    losses = []
    for seed in seeds:
        start = rounded(task.init(seed), jnp.bfloat16)
        params = jax.tree.map(lambda x: x.astype(method.held), start)
        state = optimizer.init(params, seed)
        params, state = trained(task, seed, params, state, step)
        losses.append(float(evaluate(params, *test)))
        bar.update()
    numbers = sum(x.size for x in jax.tree.leaves(params))
    held = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    return np.array(losses), held / numbers


def compare(tasks: dict[Dtype, Task], seeds: Sequence[int], bar: tqdm) -> list[_results.Row]:
    """A row for each method; tasks has one task for each dtype to compute in."""
    rows, reference = [], None
    for method in methods():
        task = tasks[method.computed]
        bar.set_description(f"{task.name}, {method.parameters}, {method.state}")
        found = train(task, method, seeds, bar)
        if not found:
            continue
        losses, size = found
        if reference is None:
            reference = losses
        row = {
            "task": task.name,
            "parameters": method.parameters,
            "state": method.state,
            "bytes a parameter": f"{size:.2f}",
        }
        rows.append(row | columns(losses, reference, "float32 parameters"))
    return rows


def main(argv: Sequence[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick

    text, images = real_data.tiny_shakespeare(), real_data.fashion_mnist()
    makes: list[Callable[[Dtype], Task]] = [
        lambda dtype: clothes(images, dtype),
        lambda dtype: lstm(text, dtype),
        lambda dtype: transformer(text, dtype),
        lambda dtype: words(text, dtype),
        regression,
    ]
    seeds = SEEDS[:2] if quick else SEEDS[:10]
    rows = []
    with tqdm(total=len(makes) * len(methods()) * len(seeds), unit="run") as bar:
        for make in makes:
            tasks = {dtype: make(dtype) for dtype in (jnp.float32, jnp.bfloat16)}
            if quick:
                tasks = {dtype: task._replace(steps=3) for dtype, task in tasks.items()}
            rows += compare(tasks, seeds, bar)
    return _results.finish("low_precision_quality", rows, quick)


if __name__ == "__main__":
    try:
        main()
    except real_data.DataError as error:
        raise SystemExit(f"low_precision_quality.py: {error}") from None
