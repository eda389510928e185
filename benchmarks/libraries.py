"""A step of RMSProp over arrays of given shapes, in each library that has one."""

from collections.abc import Callable
import functools
import importlib.util
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import _timing
from rmsprop_jax import low_memory, rmsprop
from trees import Shapes

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered, momentum": {"centered": True, "momentum": 0.9},
}
STORAGES = {"float32": None, "bfloat16": low_memory.bfloat16(), "q8": low_memory.q8()}


class Step(NamedTuple):
    """Makes the step so many times; bytes of its temporary memory; bytes its kernels move; seconds
    that it took to compile.
    """

    run: Callable[[int], Any]
    temporary: float = np.nan
    moved: float = np.nan
    compiling: float = np.nan


def gradients(shapes: Shapes) -> list[np.ndarray]:
    """Of a million random numbers, repeated: to draw all takes longer than what is timed."""
    numbers = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
    return [np.resize(numbers, shape) for shape in shapes]


def state_of(tx: optax.GradientTransformation, shapes: Shapes) -> list[jax.ShapeDtypeStruct]:
    """The arrays of its state; nothing is allocated."""
    params = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    return jax.tree.leaves(jax.eval_shape(tx.init, params))


def train_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """As users write it."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled(step: Callable[..., Any], params: Any, state: Any, grads: Any) -> Step:
    """A step from (params, state, grads) to (params, state), with both donated."""
    carry = [params, state]
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, grads)
    start = time.perf_counter()
    program = lowered.compile()
    compiling = time.perf_counter() - start
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}

    def run(steps: int) -> Any:
        for _ in range(steps):
            carry[:] = program(*carry, grads)
        return carry

    temporary = memory.temp_size_in_bytes if memory else np.nan
    return Step(run, temporary, cost.get("bytes accessed", np.nan), compiling)


def of(tx: optax.GradientTransformation, shapes: Shapes, dtype: str = "float32") -> Step:
    """Any transformation's, jitted."""
    params = [jnp.ones(shape, dtype) for shape in shapes]
    grads = [jnp.asarray(grad, dtype) for grad in gradients(shapes)]
    return compiled(train_step(tx), params, tx.init(params), grads)


def ours(form: dict[str, Any], shapes: Shapes) -> Step:
    return of(rmsprop(1e-3, **form), shapes)


def master_weights(storage: str, shapes: Shapes) -> Step:
    """Ours of parameters in bfloat16, with 24 bits."""
    tx = rmsprop(1e-3, storage=STORAGES[storage])
    return of(low_memory.master_weights(tx, 24), shapes, "bfloat16")


def theirs(form: dict[str, Any], shapes: Shapes) -> Step:
    """Optax's."""
    return of(optax.rmsprop(1e-3, **form), shapes)


def keras(form: dict[str, Any], shapes: Shapes) -> Step:
    """Keras 3 on JAX, its stateless form jitted."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    variables = [keras.Variable(np.ones(shape, np.float32)) for shape in shapes]
    optimizer = keras.optimizers.RMSprop(1e-3, **form)
    optimizer.build(variables)

    def step(params: Any, state: Any, grads: Any) -> Any:
        return optimizer.stateless_apply(state, grads, params)

    # Copies, since what is donated is gone, and the variables live on.
    params = [jnp.copy(variable.value) for variable in variables]
    state = [jnp.copy(variable.value) for variable in optimizer.variables]
    grads = [jnp.asarray(grad) for grad in gradients(shapes)]
    return compiled(step, params, state, grads)


def torch(form: dict[str, Any], shapes: Shapes, foreach: bool) -> Step:
    """PyTorch's, of all arrays at once (foreach) or of one after the other; on a GPU capturable."""
    import torch

    gpu = jax.devices()[0].platform == "gpu"
    device = "cuda" if gpu else "cpu"
    params = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
    for param, grad in zip(params, gradients(shapes), strict=True):
        param.grad = torch.from_numpy(grad).to(device)
    optimizer = torch.optim.RMSprop(params, lr=1e-3, foreach=foreach, capturable=gpu, **form)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.step()
        if gpu:
            torch.cuda.synchronize()

    return Step(run)


def torch_foreach(form: dict[str, Any], shapes: Shapes) -> Step:
    return torch(form, shapes, foreach=True)


def torch_single(form: dict[str, Any], shapes: Shapes) -> Step:
    return torch(form, shapes, foreach=False)


Make = Callable[[dict[str, Any], Shapes], Step]


def others() -> dict[str, Make]:
    """The libraries to compare with, as far as they are installed (torch for this device)."""
    found: dict[str, Make] = {"optax": theirs}
    if importlib.util.find_spec("keras"):
        found["keras"] = keras
    if importlib.util.find_spec("torch"):
        import torch

        if jax.devices()[0].platform == "cpu" or torch.cuda.is_available():
            found |= {"torch foreach": torch_foreach, "torch single": torch_single}
    return found


def compare(theirs: Step, ours: Step, steps: int, pairs: int) -> _timing.Pair:
    """Seconds and ratio of a step; each time so many are made at once."""
    sides = [functools.partial(step.run, steps) for step in (theirs, ours)]
    return _timing.compare(sides, pairs).per(steps)


def add_one(elements: int) -> Step:
    """What the memory gives to a kernel that reads and writes an array once, in place."""
    return compiled(lambda x, state, _: (x + 1, state), jnp.ones(elements), None, None)
