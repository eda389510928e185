"""Records files that Keras saves halfway through a run, for tests/convert/test_keras_file.py.

    python tests/compare/record_keras_files.py          # writes tests/fixtures/keras_files.json
    python tests/compare/record_keras_files.py --check  # compares a new run with that file, and
                                                        # continues in Keras from a state of ours

A network whose first layer is frozen is trained in float64, once by RMSProp alone and once inside
everything that Keras can wrap around it. The fixture contains the data; the model at the end; and
for each kind of file its groups, attributes and arrays, for a .keras file also the optimizer's
config.
"""

import argparse
import io
import json
from pathlib import Path
import sys
import tempfile
from unittest import mock
import zipfile

import numpy as np

import frameworks
import hdf5
from json_arrays import decoded, encoded

FIXTURE = Path(__file__).parents[1] / "fixtures" / "keras_files.json"
K = 4  # steps before the files, and after them
KINDS = ("weights.h5", "keras", "h5")
ACCUMULATED = 2
TOLERANCE = 1e-11  # in float64, of numbers of size 1
KERAS_TOLERANCE = 1e-6  # of what Keras trains: it normalizes and averages in float32 even here
OPTIONS = {"rho": 0.8, "epsilon": 1e-3, "momentum": 0.9}
RATE = {"initial_learning_rate": 0.1, "decay_steps": 16, "end_learning_rate": 0.01}
LAYERS = ("net/fc1/kernel", "net/fc1/bias", "net/norm/gamma", "net/norm/beta")
PATHS = (*LAYERS, "net/fc2/kernel", "net/fc2/bias")
# The same as a file by numbers has them: the second variable of the second Dense.
NUMBERED = tuple(
    f"layers/{layer}/vars/{i}"
    for layer in ("dense", "batch_normalization", "dense_1")
    for i in range(2)
)
FROZEN = 2  # of these


def load():
    return decoded(json.loads(FIXTURE.read_text()))


def write(folder, kind, content):
    """A file of a kind, for the stand-in of h5py."""
    path, text = Path(folder) / f"run.{kind}", json.dumps(encoded(content["tree"]))
    if kind != "keras":
        path.write_text(text)
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", json.dumps(content["config.json"]))
        archive.writestr("model.weights.h5", text)
    return path


# In Keras.


def network(keras):
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(4, activation="relu", name="fc1", trainable=False),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dense(2, name="fc2"),
    ]
    return keras.Sequential(layers, name="net")


def optimizer(keras, case):
    build = keras.optimizers.RMSprop
    if case == "frozen":
        return build(0.01, centered=True, weight_decay=0.1, name="rmsprop", **OPTIONS)
    rate = keras.optimizers.schedules.PolynomialDecay(**RATE)
    more = {"use_ema": True, "gradient_accumulation_steps": ACCUMULATED}
    inner = build(rate, name="rmsprop", **more, **OPTIONS)
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0, name="scaled")


CASES = ("frozen", "wrapped")


def compiled(keras, case):
    model = network(keras)
    model.compile(optimizer(keras, case), loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model


def values(model):
    return {v.path: v.numpy() for v in model.weights}


def train(model, x, y):
    for batch in zip(x, y, strict=True):
        model.train_on_batch(*batch)


def saved(model, kind):
    """What is in a file, and what keras_file reads from it."""
    import h5py

    from rmsprop_jax import convert

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"run.{kind}"
        (model.save_weights if kind == "weights.h5" else model.save)(path)
        found, content = convert.keras_file(path), {}
        where = path
        if kind == "keras":
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json"))["compile_config"]
                content["config.json"] = {"compile_config": {"optimizer": config["optimizer"]}}
                where = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(where, "r") as file:
            content["tree"] = hdf5.tree_of(file)
    return content, found


def run(keras):
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((2 * K, 6, 3)), rng.standard_normal((2 * K, 6, 2))
    record = {"keras": keras.__version__, "x": x, "y": y, "cases": {}}
    read = {}
    for case in CASES:
        model = compiled(keras, case)
        train(model, x[:K], y[:K])
        files = {}
        for kind in KINDS:
            files[kind], read[case, kind] = saved(model, kind)
        variables = {v.path: v.numpy() for v in model.optimizer.variables}
        half = values(model)
        train(model, x[K:], y[K:])
        found = {"files": files, "variables": variables, "half": half, "final": values(model)}
        record["cases"][case] = found
    return record, read


# In ours.


def names(kind):
    return PATHS if kind == "h5" else NUMBERED


def mapping(kind):
    ours = ("fc1/kernel", "fc1/bias", "norm/scale", "norm/bias", "fc2/kernel", "fc2/bias")
    return dict(zip(ours, names(kind), strict=True))


def transformation(config, case, freeze):
    """The rule of a config where weights are trained, and nothing elsewhere."""
    import optax

    from rmsprop_jax import convert, dialects

    if case == "wrapped":
        rate = optax.polynomial_schedule(
            RATE["initial_learning_rate"], RATE["end_learning_rate"], 1, RATE["decay_steps"]
        )
        options = convert.keras_options(
            config,
            learning_rate=lambda count: rate(ACCUMULATED * count + ACCUMULATED - 1),
            gradient_accumulation_steps=None,
            use_ema=False,
        )
    else:
        options = convert.keras_options(config)
    tx = freeze(dialects.keras(**options))
    return optax.MultiSteps(tx, ACCUMULATED) if case == "wrapped" else tx


def partition(tx):
    import optax

    parts = {"train": tx, "frozen": optax.set_to_zero()}
    return optax.partition(parts, {"fc1": "frozen", "norm": "train", "fc2": "train"})


def begin(file, kind, config, case, freeze=partition):
    """Our parameters, transformation and state from what was read of a file."""
    import jax.numpy as jnp

    from rmsprop_jax import convert

    shapes = {"fc1": {"kernel": (3, 4), "bias": 4}, "norm": {"scale": 4, "bias": 4}}
    shapes["fc2"] = {"kernel": (4, 2), "bias": 2}
    like = {layer: {n: jnp.zeros(s) for n, s in of.items()} for layer, of in shapes.items()}
    weights = {name: file.weights[name] for name in names(kind)}
    params = convert.params_from(weights, like, mapping(kind))
    tx = transformation(config, case, freeze)
    left = {}
    if case == "wrapped":
        left = {"ignore": ("average", "loss_scale"), "gradient_accumulation_steps": ACCUMULATED}
    trained = names(kind)[FROZEN:]
    state = convert.from_keras(file.variables, params, mapping(kind), tx, names=trained, **left)
    return params, tx, state


def back(params, tx, state, learning_rate):
    from rmsprop_jax import convert

    rest = {"learning_rate": learning_rate, "names": PATHS[FROZEN:]}
    return convert.to_keras(state, params, mapping("h5"), tx, **rest)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args(argv).check
    keras = frameworks.import_keras(np.dtype("float64"))
    from rmsprop_jax import convert

    live, read = run(keras)
    if not check:
        FIXTURE.write_text(json.dumps(encoded(live)) + "\n")
        print(f"{FIXTURE.stat().st_size / 1000:.0f} kB in {FIXTURE}")
        return
    recorded = load()
    assert_alike(live | {"keras": ""}, recorded | {"keras": ""})
    stand_in = {"h5py": hdf5.stand_in(decoded)}
    for (case, kind), found in read.items():
        content = live["cases"][case]["files"][kind]
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(sys.modules, stand_in):
            again = convert.keras_file(write(folder, kind, content))
        assert_alike(again._asdict(), found._asdict())
    config = read["frozen", "keras"].config
    for kind in KINDS:
        params, tx, state = begin(read["frozen", kind], kind, config, "frozen")
        model = compiled(keras, "frozen")
        for variable in model.weights:
            variable.assign(live["cases"]["frozen"]["half"][variable.path])
        arrays = back(params, tx, state, 0.01)
        for variable, value in zip(model.optimizer.variables, arrays, strict=True):
            variable.assign(value)
        train(model, live["x"][K:], live["y"][K:])
        assert_alike(values(model), recorded["cases"]["frozen"]["final"])
        print("ended in Keras, through our state:", kind)
    print("agrees with", FIXTURE, "of Keras", recorded["keras"])


def assert_alike(got, want):
    """Trees of the same keys and texts, and arrays within the tolerance."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert_alike(got[key], value)
    elif hasattr(want, "dtype"):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, TOLERANCE, TOLERANCE)
    else:
        assert got == want


if __name__ == "__main__":
    main()
