"""Runs of the cases in checkpoint_cases.py by the frameworks themselves.

RUN[framework](case, dtype, first, last) returns the parameters after the steps from first to last,
and the checkpoint at that point: a file of the framework, written and read as its users do. If
given another checkpoint and other parameters, it starts from those. Frameworks are imported inside
the functions.
"""

import io
from pathlib import Path
import tempfile
import zipfile

import numpy as np

from checkpoint_cases import at_step, optimizer_names, problem, rates, theirs
import frameworks


def _pytorch_run(case, dtype, first, last, checkpoint=None, params=None):
    """torch.optim.RMSprop; torch.save of state_dict(), torch.load of weights only"""
    import torch

    return _in_torch(torch.optim.RMSprop, "pytorch", case, dtype, first, last, checkpoint, params)


def _timm_run(case, dtype, first, last, checkpoint=None, params=None):
    """timm.optim.RMSpropTF; likewise"""
    timm = frameworks.import_timm()
    return _in_torch(timm, "timm", case, dtype, first, last, checkpoint, params)


def _in_torch(optimizer_class, framework, case, dtype, first, last, checkpoint, params):
    import torch

    gradients, start = problem(case, dtype)
    x = {
        name: torch.nn.Parameter(torch.tensor(value))
        for name, value in (params or theirs(framework, start)).items()
    }
    parts = dict(zip(("kernel", "bias"), x.items(), strict=True))
    # Of two groups the optimizer knows the names, as the users of new versions may tell it.
    groups = [options | {"params": [parts[part]]} for part, options in case.groups.items()] or list(
        x.values()
    )
    optimizer = optimizer_class(groups, lr=float(case.rates[0]), **case.options)
    tables = [rates(case, options, "lr") for options in case.groups.values()] or [case.rates]
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint)
    for t in range(first, last):
        for name, g in at_step(framework, gradients, t).items():
            x[name].grad = None if g is None else torch.tensor(g)
        for group, table in zip(optimizer.param_groups, tables, strict=True):
            group["lr"] = float(table[t])
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    saved["state"] = {
        number: {slot: tensor.numpy() for slot, tensor in slots.items()}
        for number, slots in saved["state"].items()
    }
    return saved, {name: value.detach().numpy().copy() for name, value in x.items()}


def _keras_run(case, dtype, first, last, checkpoint=None, params=None):
    """keras.optimizers.RMSprop; save_weights and, at a constant rate, save, read by h5py"""
    keras = frameworks.import_keras(np.dtype(dtype))

    gradients, start = problem(case, dtype)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="fc")],
        name="net",
    )
    weights = {v.path: v for v in model.trainable_variables}
    for name, value in (params or theirs("keras", start)).items():
        weights[name].assign(value)
    rate = frameworks.keras_rate(keras, case.rates)
    optimizer = keras.optimizers.RMSprop(rate, **case.options)
    if case.groups:
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.build(model.trainable_variables)
    if checkpoint is not None:
        for variable, value in zip(optimizer.variables, checkpoint, strict=True):
            variable.assign(value)
    for t in range(first, last):
        g = at_step("keras", gradients, t)
        optimizer.apply(
            [keras.ops.convert_to_tensor(g[v.path]) for v in model.trainable_variables],
            model.trainable_variables,
        )
    model.compile(optimizer)
    saved = _keras_file(model, whole=np.ptp(case.rates) == 0)
    return saved, {name: np.array(value) for name, value in weights.items()}


def _keras_file(model, *, whole):
    """What is in optimizer/vars of a file of weights, checked against that in a .keras file"""
    import h5py

    def read(file):
        with h5py.File(file) as file:
            return {name: np.asarray(array) for name, array in file["optimizer/vars"].items()}

    with tempfile.TemporaryDirectory() as folder:
        weights, model_file = Path(folder) / "m.weights.h5", Path(folder) / "m.keras"
        model.save_weights(weights)
        saved = read(weights)
        if whole:
            model.save(model_file)
            with zipfile.ZipFile(model_file) as archive:
                other = read(io.BytesIO(archive.read("model.weights.h5")))
            assert set(saved) == set(other)
            for name, array in saved.items():
                np.testing.assert_array_equal(other[name], array)
    return saved


def _tensorflow_v1_run(case, dtype, first, last, checkpoint=None, params=None):
    """tf.compat.v1.train.RMSPropOptimizer in a graph; Saver, read by tf.train.load_checkpoint"""
    import tensorflow as tf

    v1 = tf.compat.v1
    gradients, start = problem(case, dtype)
    with tf.Graph().as_default(), v1.Session() as session, tempfile.TemporaryDirectory() as folder:
        x = {
            name: v1.get_variable(name, initializer=value)
            for name, value in (params or theirs("tensorflow_v1", start)).items()
        }
        parts = dict(zip(("kernel", "bias"), x, strict=True))
        now = {name: v1.placeholder(value.dtype, value.shape) for name, value in x.items()}
        step = v1.train.get_or_create_global_step()
        operations, optimizers, feeds = [], {}, []
        for index, (part, options) in enumerate((case.parts or {"": case.options}).items()):
            names = [parts[part]] if part else list(x)
            rate = v1.placeholder(x[names[0]].dtype, [])
            feeds.append((rate, rates(case, options, "learning_rate")))
            others = {n: value for n, value in options.items() if n != "learning_rate"}
            optimizer = v1.train.RMSPropOptimizer(
                rate,
                **frameworks.tensors(others, x[names[0]].dtype.base_dtype, {"centered"}),
                name=optimizer_names(case)[index],
            )
            pairs = [(now[name], x[name]) for name in names]
            counted = None if index else step
            operations.append(optimizer.apply_gradients(pairs, global_step=counted))
            optimizers |= dict.fromkeys(names, optimizer)
        session.run(v1.global_variables_initializer())
        for slot, values in (checkpoint or {}).items():
            for name, value in values.items():
                session.run(optimizers[name].get_slot(x[name], slot).assign(value))
        for t in range(first, last):
            given = {now[n]: g for n, g in at_step("tensorflow_v1", gradients, t).items()}
            session.run(operations, given | {rate: table[t] for rate, table in feeds})
        path = v1.train.Saver().save(session, f"{folder}/model")
        reader = tf.train.load_checkpoint(path)
        saved = {n: np.asarray(reader.get_tensor(n)) for n in reader.get_variable_to_shape_map()}
        return saved, {name: saved[name] for name in x}


def tensorflow_v1_objects():
    """The variables of a tf.train.Checkpoint, by their names there, and the slots themselves."""
    import tensorflow as tf

    x = {name: tf.Variable(np.arange(6.0) + i, name=name) for i, name in enumerate("ab")}
    optimizer = tf.compat.v1.train.RMSPropOptimizer(0.1, momentum=0.9, centered=True)
    optimizer.apply_gradients([(tf.constant(np.linspace(0, 1, 6)), v) for v in x.values()])
    with tempfile.TemporaryDirectory() as folder:
        whole = tf.train.Checkpoint(model=tf.train.Checkpoint(**x), optimizer=optimizer)
        reader = tf.train.load_checkpoint(whole.save(f"{folder}/model"))
        names = [n for n in reader.get_variable_to_shape_map() if n.endswith("VALUE")]
        variables = {name: np.asarray(reader.get_tensor(name)) for name in names}
    slots = {
        slot: {f"model/{name}": optimizer.get_slot(v, slot).numpy() for name, v in x.items()}
        for slot in optimizer.get_slot_names()
    }
    return {"variables": variables, "slots": slots}


RUN = {
    "pytorch": _pytorch_run,
    "timm": _timm_run,
    "keras": _keras_run,
    "tensorflow_v1": _tensorflow_v1_run,
}
