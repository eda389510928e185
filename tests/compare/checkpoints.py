"""Runs that another framework begins and we end, and the other way round.

A run trains two variables, a kernel and a bias, on given gradients for cases.STEPS steps. Half way,
after K, there is a checkpoint: a file of the framework, written and read as its users do.

RUN[framework](case, dtype, first, last) gives the parameters after the steps from first to last and
the checkpoint there; it begins with another checkpoint and other parameters if it is given them.
Frameworks are imported inside the functions. The rest is what rmsprop_jax makes of the same cases.
"""

import functools
import io
import json
from pathlib import Path
import tempfile
from typing import Any, NamedTuple
import zipfile

import numpy as np

import cases
from cases import CONSTANT, FALLING, JUMPS, RISING, STEPS
import frameworks

K = STEPS // 2
NAMES = {  # of each framework's kernel and bias
    "pytorch": ("fc.weight", "fc.bias"),
    "timm": ("fc.weight", "fc.bias"),
    "keras": ("net/fc/kernel", "net/fc/bias"),
    "tensorflow_v1": ("fc/kernel", "fc/bias"),
}


class Case(NamedTuple):
    """One run. The groups are parts with options of their own, in the framework's order.

    The learning rate of a group follows that of all in proportion.
    """

    name: str
    options: dict[str, Any]
    rates: np.ndarray = CONSTANT
    groups: dict[str, dict[str, Any]] = {}  # noqa: RUF012 # of "kernel" and "bias"
    late: bool = False  # whether the bias has no gradient before step K
    complex: bool = False
    rounded: bool = False  # see cases.Case

    @property
    def centered(self):
        return self.options.get("centered", False)

    @property
    def parts(self):
        """The options of each group, all of them."""
        return {name: self.options | options for name, options in self.groups.items()}


def _grid(decay, eps):
    plain = {decay: 0.9, eps: 1e-3}
    momentum = plain | {"momentum": 0.9}
    centered = plain | {"centered": True}
    both = momentum | centered
    return [
        Case("plain", plain),
        Case("plain, falling rate", plain, FALLING),
        Case("momentum", momentum),
        Case("momentum, falling rate", momentum, FALLING),
        Case("momentum, rate that jumps", momentum, JUMPS),
        Case("centered", centered),
        Case("centered, momentum", both),
        Case("centered, momentum, rising rate", both, RISING),
    ]


def _torch_grid():
    base = {"alpha": 0.9, "eps": 1e-3}
    pull = base | {"weight_decay": 0.1}
    groups = {"bias": {"momentum": 0.9, "lr": 0.03}, "kernel": {"weight_decay": 0.2, "lr": 0.1}}
    return [
        *_grid("alpha", "eps"),
        Case("weight decay", pull),
        Case("weight decay, momentum, falling rate", pull | {"momentum": 0.9}, FALLING),
        Case("two groups", base, groups=groups),
        Case("two groups, centered, falling rate", base | {"centered": True}, FALLING, groups),
        Case("a late bias", base | {"momentum": 0.9}, late=True),
    ]


def _pytorch():
    most = {"alpha": 0.9, "eps": 0.03, "weight_decay": 0.1, "momentum": 0.9, "centered": True}
    return [
        *_torch_grid(),
        Case("maximize, all", most | {"maximize": True}, RISING),
        Case("complex", {"alpha": 0.9, "eps": 1e-3}, complex=True),
        Case("complex, all", most, FALLING, complex=True),
    ]


def _timm():
    momentum = {"alpha": 0.9, "eps": 1e-3, "momentum": 0.9}
    decoupled = {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "decoupled_decay": True}
    corrected = decoupled | {"corrected_weight_decay": True}
    outside = momentum | {"lr_in_momentum": False}
    return [
        *_torch_grid(),
        Case("rate after momentum, falling rate", outside, FALLING),
        Case("rate after momentum, centered", outside | {"centered": True}, RISING),
        Case("decoupled, momentum, falling rate", decoupled | {"momentum": 0.9}, FALLING),
        Case("corrected, falling rate", corrected, FALLING),
        Case("caution, decoupled", momentum | decoupled | {"caution": True}),
    ]


def _keras():
    pull = {"rho": 0.9, "epsilon": 1e-3, "weight_decay": 0.1}
    most = pull | {"momentum": 0.9, "centered": True}
    excluded = {"bias": {"weight_decay": None}, "kernel": {}}
    return [
        *_grid("rho", "epsilon"),
        Case("weight decay", pull),
        Case("weight decay, centered, momentum, rising rate", most, RISING),
        Case("two groups", most, FALLING, excluded),
    ]


def _tensorflow_v1():
    """Of groups, each has an optimizer of its own."""
    base = {"decay": 0.9, "epsilon": 1e-3}
    groups = {
        "bias": {"momentum": 0.9, "learning_rate": 0.03},
        "kernel": {"learning_rate": 0.1},
    }
    return [
        *_grid("decay", "epsilon"),
        Case("two groups", base, groups=groups),
        Case("two groups, centered, falling rate", base | {"centered": True}, FALLING, groups),
    ]


CASES = {
    "pytorch": _pytorch(),
    "timm": _timm(),
    "keras": _keras(),
    "tensorflow_v1": _tensorflow_v1(),
}


def rates(case, options, name):
    """The learning rate of every step, of a group with these options."""
    own = options.get(name, case.rates[0])
    return own * (case.rates / case.rates[0])


def problem(case, dtype):
    """Gradients {part: [STEPS, ...]}, None where there is none, and the start, as ours has them."""
    gradients, start = cases.tree_problem()
    wanted = np.dtype(dtype)
    if case.complex:
        wanted = np.result_type(wanted, np.complex64)
        gradients = {name: g + 1j * np.roll(g, 1, axis=0) for name, g in gradients.items()}
        start = {name: x * (1 - 0.5j) for name, x in start.items()}
    gradients = {name: list(g.astype(wanted)) for name, g in gradients.items()}
    if case.late:
        gradients["bias"][:K] = [None] * K
    return gradients, {name: x.astype(wanted) for name, x in start.items()}


def error(case, start, got, want):
    """The largest difference of two sets of parameters, in units of the way or of a step."""
    wide = {name: np.asarray(w, np.result_type(w, np.float64)) for name, w in want.items()}
    return max(
        np.max(np.abs(got[name] - w) / (np.abs(w - start[name]) + case.rates.max()))
        for name, w in wide.items()
    )


def theirs(framework, tree):
    """Two arrays as the framework names them and lays them out."""
    kernel, bias = NAMES[framework]
    value = tree["kernel"]
    if framework in ("pytorch", "timm") and value is not None:
        value = value.T
    return {kernel: value, bias: tree["bias"]}


def at_step(framework, gradients, t):
    return theirs(framework, {name: g[t] for name, g in gradients.items()})


# Each framework, as its users train, save and load.


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


def optimizer_names(case):
    return [part.capitalize() for part in case.groups] or ["RMSProp"]


RUN = {
    "pytorch": _pytorch_run,
    "timm": _timm_run,
    "keras": _keras_run,
    "tensorflow_v1": _tensorflow_v1_run,
}


# The same in rmsprop_jax.


def mapping(framework):
    from rmsprop_jax import convert

    if framework == "keras":
        return convert.keras_dense("fc", "net/fc")
    if framework == "tensorflow_v1":
        return convert.keras_dense("fc", "fc")
    return convert.torch_dense("fc", "fc")


def params_of(tree):
    """Our tree of parameters, of a kernel and a bias."""
    import jax.numpy as jnp

    return {"fc": {name: jnp.asarray(value) for name, value in tree.items()}}


def transformation(framework, case):
    """The dialect in a case, or one of each group."""
    import jax.numpy as jnp
    import optax

    from rmsprop_jax import dialects

    name = cases.RATE_NAME[framework]

    def build(options):
        table = rates(case, options, name)
        rate = float(table[0]) if np.ptp(table) == 0 else lambda t: jnp.asarray(table)[t]
        peak = {"initial_lr": table[0]} if options.get("corrected_weight_decay") else {}
        return getattr(dialects, framework)(**options | {name: rate} | peak)

    if not case.groups:
        return build(case.options)
    return optax.partition(
        {part: build(options) for part, options in case.parts.items()},
        {"fc": {part: part for part in case.groups}},
    )


def ours(framework, listed, dtype, runs, first, last):
    """The parameters and the state of each run after the steps from first to last.

    There is a pair (params, state) for each case; all are in one jitted program, which serves for
    other steps and other pairs, too.
    """
    gradients = []
    for case in listed:
        parts, _ = problem(case, dtype)
        gradients.append({"fc": {name: _stacked(g[first:last]) for name, g in parts.items()}})
    return _program(framework, tuple(case.name for case in listed))(runs, gradients)


def _stacked(gradients):
    (absent,) = {g is None for g in gradients}
    return None if absent else np.stack(gradients)


@functools.cache
def _program(framework, names):
    import jax

    cases_of = {case.name: case for case in CASES[framework]}

    def moved(x, u):
        return x if u is None else x + u

    @jax.jit
    def program(runs, gradients):
        txs = [transformation(framework, cases_of[name]) for name in names]

        def step(runs, gradients):
            after = []
            for tx, (params, state), g in zip(txs, runs, gradients, strict=True):
                updates, state = tx.update(g, state, params)
                after.append((jax.tree.map(moved, params, updates), state))
            return after, None

        return jax.lax.scan(step, runs, gradients)[0]

    return program


def from_theirs(framework, case, checkpoint, params, tx):
    """The state that we make of a checkpoint."""
    from rmsprop_jax import convert

    if framework == "keras":
        if isinstance(checkpoint, dict):
            checkpoint = {str(number): array for number, array in checkpoint.items()}
        return convert.from_keras(
            checkpoint, params, mapping(framework), tx, names=NAMES[framework]
        )
    if framework == "tensorflow_v1":
        steps = int(checkpoint.get("global_step", K))
        slots = checkpoint if "rms" in checkpoint else slots_in(case, checkpoint)
        return convert.from_tensorflow_v1(slots, params, mapping(framework), tx, steps=steps)
    convert_from = getattr(convert, f"from_{framework}")
    return convert_from(checkpoint, params, mapping(framework), tx, names=_known(case))


def to_theirs(framework, case, state, params, tx, groups=None, tensor=np.asarray):
    """What a framework is to be given of our state; groups are those of PyTorch's optimizer."""
    from rmsprop_jax import convert

    if framework == "keras":
        rate = float(case.rates[0]) if np.ptp(case.rates) == 0 else None
        return convert.to_keras(
            state, params, mapping(framework), tx, learning_rate=rate, names=NAMES[framework]
        )
    if framework == "tensorflow_v1":
        return convert.to_tensorflow_v1(state, params, mapping(framework), tx)
    return getattr(convert, f"to_{framework}")(
        state,
        params,
        mapping(framework),
        tx,
        param_groups=groups,
        names=_known(case),
        tensor=tensor,
    )


def slots_in(case, checkpoint):
    """The slots in a checkpoint of TensorFlow 1, of all optimizers."""
    from rmsprop_jax import convert

    slots = {}
    for name in optimizer_names(case):
        found = convert.tensorflow_v1_slots(checkpoint, name)
        for slot, values in found.items():
            slots[slot] = slots.get(slot, {}) | values
    return slots


SECOND_MOMENT = ("square_avg", "velocity", "rms")


def flat(framework, case, checkpoint):
    """The arrays of a checkpoint, theirs or one that we made, as {(slot, name): array}."""
    if framework == "keras":
        slots = ["velocity", *["momentum"] * bool(case.options.get("momentum"))]
        slots += ["average_gradient"] * case.centered
        keys = [(slot, name) for slot in slots for name in NAMES[framework]]
        keys = [("iteration", ""), ("learning_rate", "")][: len(checkpoint) - len(keys)] + keys
        if isinstance(checkpoint, dict):
            checkpoint = [
                array for _, array in sorted(checkpoint.items(), key=lambda kv: int(kv[0]))
            ]
        return dict(zip(keys, checkpoint, strict=True))
    if framework == "tensorflow_v1":
        slots = checkpoint if "rms" in checkpoint else slots_in(case, checkpoint)
    else:
        slots = {}
        for number, held in checkpoint["state"].items():
            for slot, value in held.items():
                slots.setdefault(slot, {})[number] = value
    return {(slot, name): np.asarray(a) for slot, of in slots.items() for name, a in of.items()}


def comparable(framework, case, given, checkpoint):
    """What we made and what the framework has, flat, without what has no meaning there."""
    got, want = flat(framework, case, given), flat(framework, case, checkpoint)
    if case.late:  # PyTorch makes them in the first step
        got = {key: got[key] for key in want}
    assert set(got) == set(want)
    if framework == "tensorflow_v1":  # which keeps the last step where there is no momentum
        for part, name in zip(("kernel", "bias"), NAMES[framework], strict=True):
            if not case.parts.get(part, case.options).get("momentum"):
                assert not np.any(got.pop(("momentum", name)))
                del want["momentum", name]
    return got, want


def _known(case):
    """The names that the optimizer of PyTorch does not know itself."""
    return None if case.groups else NAMES["pytorch"]


# Trees with arrays in them, as few arrays: a file of many small ones is large.


def pack(tree):
    """A tree of dicts and lists, of arrays and of what JSON has, as a few arrays."""
    found = {}

    def go(value):
        if isinstance(value, dict):
            return {str(key): go(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [go(v) for v in value]
        if not isinstance(value, np.ndarray):
            return value
        arrays = found.setdefault(value.dtype.name, [])
        begin = sum(array.size for array in arrays)
        arrays.append(value.ravel())
        return {"dtype": value.dtype.name, "shape": list(value.shape), "begin": begin}

    text = json.dumps(go(tree))
    return {name: np.concatenate(arrays) for name, arrays in found.items()} | {
        "tree": np.frombuffer(text.encode(), np.uint8)
    }


def unpack(arrays):
    """The tree that was packed; the keys that were numbers are again."""

    def go(value):
        if isinstance(value, list):
            return [go(v) for v in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {"dtype", "shape", "begin"}:
            begin, shape = value["begin"], tuple(value["shape"])
            size = int(np.prod(shape))
            return arrays[value["dtype"]][begin : begin + size].reshape(shape)
        return {int(key) if key.isdigit() else key: go(v) for key, v in value.items()}

    return go(json.loads(bytes(arrays["tree"])))
