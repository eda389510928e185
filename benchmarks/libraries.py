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
    """A function that makes this many steps, and what is known of their program: bytes of
    temporary memory, bytes that its kernels move, and seconds of compilation.
    """

    run: Callable[[int], Any]
    temporary: float = np.nan
    moved: float = np.nan
    compiling: float = np.nan


def gradients(shapes: Shapes) -> list[np.ndarray]:
    """A million random numbers, repeated: drawing all takes longer than what is timed."""
    numbers = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
    return [np.resize(numbers, shape) for shape in shapes]


def state_of(tx: optax.GradientTransformation, shapes: Shapes) -> list[jax.ShapeDtypeStruct]:
    """The arrays of the state as shapes; nothing is allocated."""
    params = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    return jax.tree.leaves(jax.eval_shape(tx.init, params))


def train_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """A training step as users write it."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled(step: Callable[..., Any], params: Any, state: Any, grads: Any) -> Step:
    """Compiles a step from (params, state, grads) to (params, state), with both donated."""
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
    """The jitted step of any transformation."""
    params = [jnp.ones(shape, dtype) for shape in shapes]
    grads = [jnp.asarray(grad, dtype) for grad in gradients(shapes)]
    return compiled(train_step(tx), params, tx.init(params), grads)


def ours(form: dict[str, Any], shapes: Shapes) -> Step:
    return of(rmsprop(1e-3, **form), shapes)


def master_weights(storage: str, shapes: Shapes) -> Step:
    """Ours with bfloat16 parameters and master weights of 24 bits."""
    tx = rmsprop(1e-3, storage=STORAGES[storage])
    return of(low_memory.master_weights(tx, 24), shapes, "bfloat16")


def theirs(form: dict[str, Any], shapes: Shapes) -> Step:
    """Optax's."""
    return of(optax.rmsprop(1e-3, **form), shapes)


def keras(form: dict[str, Any], shapes: Shapes) -> Step:
    """Keras 3 on JAX, with its stateless form jitted."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    variables = [keras.Variable(np.ones(shape, np.float32)) for shape in shapes]
    optimizer = keras.optimizers.RMSprop(1e-3, **form)
    optimizer.build(variables)

    def step(params: Any, state: Any, grads: Any) -> Any:
        return optimizer.stateless_apply(state, grads, params)

    # Copies, because the variables outlive the donated buffers.
    params = [jnp.copy(variable.value) for variable in variables]
    state = [jnp.copy(variable.value) for variable in optimizer.variables]
    grads = [jnp.asarray(grad) for grad in gradients(shapes)]
    return compiled(step, params, state, grads)


def torch(form: dict[str, Any], shapes: Shapes, foreach: bool) -> Step:
    """PyTorch's, over all arrays at once (foreach) or one by one; on a GPU capturable."""
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
    """The installed libraries to compare with; torch only if it supports this device."""
    found: dict[str, Make] = {"optax": theirs}
    if importlib.util.find_spec("keras"):
        found["keras"] = keras
    if importlib.util.find_spec("torch"):
        import torch

        if jax.devices()[0].platform == "cpu" or torch.cuda.is_available():
            found |= {"torch foreach": torch_foreach, "torch single": torch_single}
    return found


def compare(theirs: Step, ours: Step, steps: int, pairs: int) -> _timing.Pair:
    """Seconds and ratio per step; each measurement makes several steps."""
    sides = [functools.partial(step.run, steps) for step in (theirs, ours)]
    return _timing.compare(sides, pairs).per(steps)


def add_one(elements: int) -> Step:
    """Reads and writes an array once, in place, which shows what bandwidth memory has."""
    return compiled(lambda x, state, _: (x + 1, state), jnp.ones(elements), None, None)
