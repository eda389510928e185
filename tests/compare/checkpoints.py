"""rmsprop_jax continues the runs of checkpoint_cases.py from their checkpoints."""

import functools
import json

import numpy as np

import cases
from checkpoint_cases import CASES, NAMES, K, optimizer_names, problem, rates


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
