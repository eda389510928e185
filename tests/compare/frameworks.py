"""Each framework's RMSProp, run on given gradients as its users run it.

RUN[framework](gradients [steps, n], start [n], rates, options) returns the parameters after every
step, [steps, n], in the dtype of the gradients. rates is the learning rate of each step, or None
for the default; options are arguments by the framework's names. Frameworks are imported inside the
functions, so each process needs only its own.

Most frameworks convert a plain number to float32. In float64, numbers are passed in the form that
the framework keeps in double precision, if it has one.
"""

from collections.abc import Callable
import importlib.metadata
import importlib.util
import os
import sys
from typing import Any, NamedTuple

import numpy as np

import cases

# The optimizer, and the packages that it depends on.
OPTIMIZER = {
    "pytorch": ("torch.optim.RMSprop", "torch"),
    "keras": ("keras.optimizers.RMSprop", "keras", "jax"),
    "keras_legacy": ("tf_keras.optimizers.legacy.RMSprop", "tf_keras", "tensorflow"),
    "tensorflow_v1": ("tf.compat.v1.train.RMSPropOptimizer", "tensorflow"),
    "timm": ("timm.optim.RMSpropTF", "timm", "torch"),
    "stable_baselines3": (
        "stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike",
        "stable-baselines3",
        "torch",
    ),
    "sonnet": ("sonnet.optimizers.RMSProp", "dm-sonnet", "tensorflow"),
    "mlx": ("mlx.optimizers.RMSprop", "mlx"),
    "paddle": ("paddle.optimizer.RMSProp", "paddlepaddle"),
    "jax_example": ("jax.example_libraries.optimizers.rmsprop, rmsprop_momentum", "jax"),
}


def version(framework):
    """Its packages with their versions, as "timm 1.0.31, torch 2.13.0"."""
    versions = {name: importlib.metadata.version(name) for name in OPTIMIZER[framework][1:]}
    return ", ".join(f"{name} {number.split('+')[0]}" for name, number in versions.items())


class Run(NamedTuple):
    """What ours needs of a run; the dtype is that of the start."""

    framework: str
    gradients: np.ndarray
    start: np.ndarray
    rates: np.ndarray | None
    options: dict[str, Any]


def ours(runs):
    """As RUN, of rmsprop_jax: the paths of runs of one dtype, all in one jitted program."""
    import jax
    import optax

    (wide,) = {np.finfo(run.start.dtype).bits == 64 for run in runs}
    with jax.enable_x64(wide):
        txs = [dialect(run) for run in runs]

        @jax.jit
        def paths(gradients, starts):
            def step(carry, gradients):
                xs, states = carry
                for i, (tx, g) in enumerate(zip(txs, gradients, strict=True)):
                    updates, states[i] = tx.update(g, states[i], xs[i])
                    xs[i] = optax.apply_updates(xs[i], updates)
                return (xs, states), xs

            states = [tx.init(x) for tx, x in zip(txs, starts, strict=True)]
            return jax.lax.scan(step, (starts, states), gradients)[1]

        return jax.device_get(paths([run.gradients for run in runs], [run.start for run in runs]))


def dialect(run):
    """The dialect that has the framework's name, with the options and rates of a run."""
    import jax.numpy as jnp

    from rmsprop_jax import dialects

    rates = run.rates
    if rates is None:
        rate = {}
    elif np.ptp(rates) == 0:
        rate = {cases.RATE_NAME[run.framework]: rates[0]}
    else:
        rate = {cases.RATE_NAME[run.framework]: lambda count: jnp.asarray(rates)[count]}
        if run.options.get("corrected_weight_decay"):
            rate["initial_lr"] = rates[0]
    return getattr(dialects, run.framework)(**rate, **run.options)


def _pytorch(gradients, start, rates, options):
    """torch.optim.RMSprop; the learning rate is set in param_groups, as in the next two"""
    import torch

    return _in_torch(torch.optim.RMSprop, gradients, start, rates, options)


def _timm(gradients, start, rates, options):
    """timm.optim.RMSpropTF, constructed with the first learning rate"""
    return _in_torch(import_timm(), gradients, start, rates, options)


def import_timm():
    # Unexecuted packages: what they import besides, models and torchvision, is not needed.
    for name in ("timm", "timm.optim"):
        package = importlib.util.module_from_spec(importlib.util.find_spec(name))
        sys.modules.setdefault(name, package)
    from timm.optim.rmsprop_tf import RMSpropTF

    return RMSpropTF


def _stable_baselines3(gradients, start, rates, options):
    """stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike"""
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

    return _in_torch(RMSpropTFLike, gradients, start, rates, options)


def _in_torch(optimizer_class, gradients, start, rates, options):
    import torch

    x = torch.nn.Parameter(torch.tensor(start))
    rate = {} if rates is None else {"lr": float(rates[0])}
    optimizer = optimizer_class([x], **rate, **options)
    path = []
    for t, g in enumerate(gradients):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = float(rates[t])
        x.grad = torch.tensor(g)
        optimizer.step()
        path.append(x.detach().numpy().copy())
    return np.stack(path)


def _keras(gradients, start, rates, options):
    """keras.optimizers.RMSprop of Keras 3, on JAX; a LearningRateSchedule if the rate changes"""
    keras = import_keras(start.dtype)
    x = keras.Variable(start, dtype=start.dtype.name)
    rate = {} if rates is None else {"learning_rate": keras_rate(keras, rates)}
    optimizer = keras.optimizers.RMSprop(**rate, **options)
    path = []
    for g in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(g)], [x])
        path.append(np.array(x))
    return np.stack(path)


def import_keras(dtype):
    os.environ["KERAS_BACKEND"] = "jax"
    import jax

    jax.config.update("jax_enable_x64", True)
    import keras

    keras.config.set_floatx(dtype.name)
    keras.config.set_dtype_policy(dtype.name)
    return keras


def keras_rate(keras, rates):
    if np.ptp(rates) == 0:
        return float(rates[0])

    class Table(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return keras.ops.take(keras.ops.convert_to_tensor(rates), step)

    return Table()


def _keras_legacy(gradients, start, rates, options):
    """tf_keras.optimizers.legacy.RMSprop; the learning rate is a callable, read in every step"""
    import tf_keras

    # A momentum that is a tensor would choose the rule with momentum even where it is 0.
    plain = {"epsilon", "centered"} | ({"momentum"} if options.get("momentum") == 0 else set())

    def build(options, rate):
        return tf_keras.optimizers.legacy.RMSprop(**rate, **options)

    return _in_tensorflow(build, gradients, start, rates, options, plain)


def _tensorflow_v1(gradients, start, rates, options):
    """tf.compat.v1.train.RMSPropOptimizer; the learning rate is a callable, read in every step"""
    import tensorflow as tf

    def build(options, rate):
        return tf.compat.v1.train.RMSPropOptimizer(**rate, **options)

    return _in_tensorflow(build, gradients, start, rates, options, {"centered"})


def _in_tensorflow(build, gradients, start, rates, options, plain):
    import tensorflow as tf

    x = tf.Variable(start)
    now = tf.Variable(0.0, dtype=x.dtype)
    rate = {} if rates is None else {"learning_rate": now.read_value}
    optimizer = build(tensors(options, x.dtype, plain), rate)
    path = []
    for t, g in enumerate(gradients):
        if rates is not None:
            now.assign(rates[t])
        optimizer.apply_gradients([(tf.constant(g), x)])
        path.append(x.numpy())
    return np.stack(path)


def tensors(options, dtype, plain):
    """The options as tensors if dtype is float64, but for the names in plain."""
    import tensorflow as tf

    if dtype != tf.float64:
        return options
    return {
        name: value if name in plain else tf.constant(value, dtype)
        for name, value in options.items()
    }


def _sonnet(gradients, start, rates, options):
    """sonnet.optimizers.RMSProp; the learning rate is a tf.Variable"""
    import sonnet
    import tensorflow as tf

    x = tf.Variable(start)
    rate = tf.Variable(0.0, dtype=x.dtype)
    optimizer = sonnet.optimizers.RMSProp(rate, **tensors(options, x.dtype, {"centered"}))
    path = []
    for t, g in enumerate(gradients):
        rate.assign(rates[t])
        optimizer.apply([tf.constant(g)], [x])
        path.append(x.numpy())
    return np.stack(path)


def _mlx(gradients, start, rates, options):
    """mlx.optimizers.RMSprop, on the CPU; the learning rate is a schedule"""
    import mlx.core as mx
    import mlx.optimizers

    mx.set_default_device(mx.cpu)
    dtype = getattr(mx, start.dtype.name)
    table = mx.array(rates, dtype)
    optimizer = mlx.optimizers.RMSprop(lambda step: table[step], **options)
    x = {"x": mx.array(start, dtype)}
    path = []
    for g in gradients:
        x = optimizer.apply_gradients({"x": mx.array(g, dtype)}, x)
        path.append(np.array(x["x"]))
    return np.stack(path)


def _paddle(gradients, start, rates, options):
    """paddle.optimizer.RMSProp; the learning rate by set_lr, the other numbers always float32"""
    import paddle

    x = paddle.to_tensor(start, stop_gradient=False)
    optimizer = paddle.optimizer.RMSProp(float(rates[0]), parameters=[x], **options)
    path = []
    for t, g in enumerate(gradients):
        optimizer.set_lr(float(rates[t]))
        x.grad = paddle.to_tensor(g)
        optimizer.step()
        path.append(x.numpy().copy())
    return np.stack(path)


def _jax_example(gradients, start, rates, options):
    """jax.example_libraries.optimizers.rmsprop, or rmsprop_momentum if options have a momentum"""
    import jax
    from jax.example_libraries import optimizers
    import jax.numpy as jnp

    with jax.enable_x64(np.finfo(start.dtype).bits == 64):
        table = jnp.asarray(rates)
        build = optimizers.rmsprop_momentum if "momentum" in options else optimizers.rmsprop
        init, update, get = build(lambda step: table[step], **options)
        update = jax.jit(update)
        state = init(jnp.asarray(start))
        path = []
        for t, g in enumerate(gradients):
            state = update(t, jnp.asarray(g), state)
            path.append(np.asarray(get(state)))
    return np.stack(path)


RUN: dict[str, Callable] = {
    "pytorch": _pytorch,
    "keras": _keras,
    "keras_legacy": _keras_legacy,
    "tensorflow_v1": _tensorflow_v1,
    "timm": _timm,
    "stable_baselines3": _stable_baselines3,
    "sonnet": _sonnet,
    "mlx": _mlx,
    "paddle": _paddle,
    "jax_example": _jax_example,
}


def pytorch_features():
    """What torch.optim.RMSprop does on a tree and with complex numbers, {feature/name: path}."""
    import torch

    gradients, start = cases.tree_problem()
    paths = {}
    for feature, options in cases.PYTORCH_FEATURES.items():
        x = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
        groups = [{"params": [x[name]]} for name in x]
        if feature == "parameter groups":
            groups = [{"params": [x[name]]} | cases.PYTORCH_GROUPS[name] for name in x]
        optimizer = torch.optim.RMSprop(groups, **({"lr": 0.1} | cases.PYTORCH_BASE | options))
        found = {name: [] for name in x}
        for t in range(cases.STEPS):
            for name in x:
                absent = feature == "None" and name == "bias" and cases.MISSING[t]
                x[name].grad = None if absent else torch.tensor(gradients[name][t])
            optimizer.step()
            for name in x:
                found[name].append(x[name].detach().numpy().copy())
        paths |= {f"{feature}/{name}": np.stack(path) for name, path in found.items()}
    gradients, start = cases.complex_problem()
    for feature, options in cases.COMPLEX.items():
        paths[f"{feature}/x"] = _pytorch(gradients, start, cases.CONSTANT, options)
    return paths


def keras_features():
    """What keras.optimizers.RMSprop has around its rule, {feature/name: path}."""
    keras = import_keras(np.dtype(np.float64))
    schedules = keras.optimizers.schedules
    gradients, start = cases.tree_problem()
    paths = {}
    for feature, options in cases.KERAS_FEATURES.items():
        x = {name: keras.Variable(value, name=name) for name, value in start.items()}
        rate = keras_rate(keras, cases.FALLING)
        if feature == "PiecewiseConstantDecay":
            rate = schedules.PiecewiseConstantDecay(**cases.PIECES)
        optimizer = keras.optimizers.RMSprop(rate, **cases.KERAS_BASE, **options)
        if feature == "exclude_from_weight_decay":
            optimizer.exclude_from_weight_decay(var_names=["bias"])
        optimizer.build(list(x.values()))
        watched = dict(x)
        if options.get("use_ema"):
            averages = optimizer._model_variables_moving_average
            watched |= {f"average {n}": a for n, a in zip(x, averages, strict=True)}
        found = {name: [] for name in watched}
        for t in range(cases.STEPS):
            used = {name: keras.ops.convert_to_tensor(gradients[name][t]) for name in x}
            if feature == "None" and cases.MISSING[t]:
                used["bias"] = None
            optimizer.apply(list(used.values()), list(x.values()))
            for name, variable in watched.items():
                found[name].append(np.array(variable))
        paths |= {f"{feature}/{name}": np.stack(path) for name, path in found.items()}
    return paths


FEATURES: dict[str, Callable] = {"pytorch": pytorch_features, "keras": keras_features}
