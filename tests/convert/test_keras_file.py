"""Keras files, without Keras: what they contain, and runs that continue from them.

tests/compare/record_keras_files.py describes what is recorded, and reads the files with h5py; here
a stand-in reads the recorded contents.
"""

import copy
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conversions import assert_same
import hdf5
import record_keras_files
from record_keras_files import CASES, FROZEN, KERAS_TOLERANCE, KINDS, PATHS, TOLERANCE, K, partition
from rmsprop_jax import convert, dialects

RECORD = record_keras_files.load()


@pytest.fixture
def read(monkeypatch, tmp_path):
    """A function that reads a recorded file, or one changed from it."""
    monkeypatch.setitem(sys.modules, "h5py", hdf5.stand_in(record_keras_files.decoded))

    def of(case, kind, change=None):
        content = RECORD["cases"][case]["files"][kind]
        if change:
            change(content := copy.deepcopy(content))
        return convert.keras_file(record_keras_files.write(tmp_path, kind, content))

    return of


def masked(tx):
    trained = {"fc1": False, "norm": True, "fc2": True}
    frozen = {name: not here for name, here in trained.items()}
    return optax.chain(optax.masked(tx, trained), optax.masked(optax.set_to_zero(), frozen))


def loss(params, x, y):
    h = jax.nn.relu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-3)
    h = h * params["norm"]["scale"] + params["norm"]["bias"]
    return jnp.mean((h @ params["fc2"]["kernel"] + params["fc2"]["bias"] - y) ** 2)


def end(params, tx, state):
    """The parameters after the other steps."""

    def step(run, batch):
        params, state = run
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    batches = RECORD["x"][K:], RECORD["y"][K:]
    (params, _), _ = jax.jit(lambda run: jax.lax.scan(step, run, batches))((params, state))
    return params


def config_of(read, case):
    return read(case, "keras").config


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on(case, read, default_promotion):
    """As in Keras, where a layer was frozen, gradients were gathered and the loss scaled."""
    half, want = RECORD["cases"][case]["half"], RECORD["cases"][case]["final"]
    with jax.enable_x64(True):
        begun = record_keras_files.begin(read(case, "h5"), "h5", config_of(read, case), case)
        ended = convert.params_to(end(*begun), record_keras_files.mapping("h5"))
        params, tx, _ = begun
        anew = np.asarray(end(params, tx, tx.init(params))["fc2"]["bias"])
    assert np.all(np.abs(anew - want["net/fc2/bias"]) > 1e-3)
    for name in PATHS:
        np.testing.assert_allclose(ended[name], want[name], 0, KERAS_TOLERANCE)
        change = np.abs(want[name] - half[name])
        assert np.all(change > 1e-4) == np.any(change) == (name in PATHS[FROZEN:])


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_file_is_the_same_state(case, read, subtests):
    config = config_of(read, case)
    with jax.enable_x64(True):
        begun = {
            kind: record_keras_files.begin(read(case, kind), kind, config, case) for kind in KINDS
        }
        for kind in KINDS[:-1]:
            with subtests.test(kind=kind):
                assert_same(begun[kind][::2], begun["h5"][::2])


def test_a_run_goes_on_with_a_mask(read, default_promotion):
    config, kind = config_of(read, "frozen"), "weights.h5"
    with jax.enable_x64(True):
        begun = [
            record_keras_files.begin(read("frozen", kind), kind, config, "frozen", freeze)
            for freeze in (masked, partition)
        ]
        a, b = (end(*one) for one in begun)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_back_to_the_variables(read):
    wanted = RECORD["cases"]["frozen"]["variables"]
    with jax.enable_x64(True):
        begun = record_keras_files.begin(
            read("frozen", "h5"), "h5", config_of(read, "frozen"), "frozen"
        )
        arrays = record_keras_files.back(*begun, learning_rate=0.01)
    for got, want in zip(arrays, wanted.values(), strict=True):
        np.testing.assert_allclose(got, want, TOLERANCE, 1e-15)


@pytest.mark.parametrize("case", CASES)
def test_what_is_in_a_file(case, read):
    recorded = RECORD["cases"][case]
    paths, numbers = read(case, "h5"), read(case, "keras")
    assert read(case, "weights.h5").config is None
    assert paths.config["config"] == numbers.config["config"]
    assert list(paths.variables) == list(recorded["variables"])
    assert list(numbers.variables) == [str(i) for i in range(len(paths.variables))]
    for a, b in zip(numbers.variables.values(), paths.variables.values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(paths.weights) == set(recorded["half"])
    for name, number in zip(PATHS, record_keras_files.NUMBERED, strict=True):
        np.testing.assert_array_equal(paths.weights[name], recorded["half"][name])
        np.testing.assert_array_equal(numbers.weights[number], recorded["half"][name])


def test_what_files_may_lack_or_have_more(read):
    def many(content):
        """Names in several attributes, as where they are long."""
        group = content["tree"]["items"]["optimizer_weights"]
        names = group["attrs"].pop("weight_names")
        group["attrs"] |= {"weight_names0": names[:5], "weight_names1": names[5:]}

    def alone(content):
        content["tree"] = content["tree"]["items"]["model_weights"]

    def metrics(content):
        one = {"attrs": {}, "items": {"vars": {"attrs": {}, "items": {"0": np.ones(())}}}}
        content["tree"]["items"]["metrics"] = {"attrs": {}, "items": {"mean": one}}

    def untrained(content):
        del content["tree"]["items"]["optimizer"]
        content["config.json"]["compile_config"] = None

    plain, numbered = read("frozen", "h5"), read("frozen", "keras")
    assert list(read("frozen", "h5", many).variables) == list(plain.variables)
    assert list(read("frozen", "h5", alone).weights) == list(plain.weights)
    assert read("frozen", "h5", alone)[1:] == ({}, None)
    assert list(read("frozen", "weights.h5", metrics).weights) == list(numbered.weights)
    assert read("frozen", "keras", untrained)[1:] == ({}, None)


def test_what_is_no_file_of_keras(read, monkeypatch, tmp_path):
    text, archive = tmp_path / "notes.txt", tmp_path / "other.keras"
    text.write_text("no HDF5")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"path must be a .keras, .weights.h5 or .h5 file, got"):
        convert.keras_file(text)
    with pytest.raises(ValueError, match=r"got '.*other.keras' without \['model.weights.h5'\]"):
        convert.keras_file(str(archive))
    with pytest.raises(FileNotFoundError, match=r"path must be a file, got '.*none.h5'"):
        convert.keras_file(tmp_path / "none.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="needs h5py: pip install h5py"):
        convert.keras_file(text)


# What is not RMSProp's.


def begin(file, kind, momentum=True, **left):
    with jax.enable_x64(True):
        weights = {name: file.weights[name] for name in record_keras_files.names(kind)}
        like = {"fc1": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}
        like |= {"norm": {"scale": jnp.zeros(4), "bias": jnp.zeros(4)}}
        like |= {"fc2": {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}}
        mapping = record_keras_files.mapping(kind)
        params = convert.params_from(weights, like, mapping)
        tx = partition(dialects.keras(momentum=0.9 if momentum else 0.0))
        trained = record_keras_files.names(kind)[FROZEN:]
        return convert.from_keras(file.variables, params, mapping, tx, names=trained, **left)


ALL = {"ignore": ("average", "loss_scale"), "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ({}, r"variables\[3\] is 'scaled/dynamic_scale', .*: ignore=\('loss_scale',\)"),
        ({"ignore": ["loss_scale"]}, r"\[5\] is 'rmsprop/net_norm_gamma_average'.*'average',\)"),
        (
            {"ignore": ["loss_scale", "average"]},
            r"is 'rmsprop/net_norm_gamma_gradient_acc.*continue .*gradient_accumulation_steps",
        ),
        (ALL | {"ignore": ["average"]}, r"'scaled/dynamic_scale'"),
        (
            ALL | {"ignore": "average"},
            r"ignore must be of \('average', 'loss_scale'\), got 'average",
        ),
        (ALL | {"ignore": ["velocity"]}, r"ignore must be of .*, got \['velocity'\]"),
        (ALL | {"gradient_accumulation_steps": 1}, "must be an int of at least 2, got 1"),
        (ALL | {"gradient_accumulation_steps": 2.0}, "must be an int of at least 2, got 2.0"),
    ],
)
def test_what_is_not_of_rmsprop_is_named(left, message, read):
    """By its path, and where there is none, by how many arrays there are."""
    with pytest.raises(ValueError, match=message):
        begin(read("wrapped", "h5"), "h5", **left)
    with pytest.raises(ValueError, match=r"variables must be|ignore must|steps must be"):
        begin(read("wrapped", "weights.h5"), "weights.h5", **left)


@pytest.mark.parametrize("kind", ["h5", "weights.h5"])
def test_what_is_asked_to_be_left_out_must_be_there(kind, read):
    message = r"variables must be .* 4 each of \[|tx needs an average|is a second moment, but"
    for left in ({"ignore": ["average"]}, {"ignore": ["loss_scale"]}, ALL):
        with pytest.raises(ValueError, match=message):
            begin(read("frozen", kind), kind, **left)
    with pytest.raises(ValueError, match=r"variables must be those of the loss scale, the number"):
        begin(read("wrapped", kind), kind, momentum=False, **ALL)


def without(file, *names):
    """As of an optimizer that keeps less: without variables whose paths end so."""
    paths = list(RECORD["cases"]["wrapped"]["variables"])
    kept = [
        a
        for path, a in zip(paths, file.variables.values(), strict=True)
        if not path.endswith(names)
    ]
    return file._replace(variables={str(i): array for i, array in enumerate(kept)})


def test_what_comes_before_is_never_taken_for_second_moments(read):
    """Where there are as many arrays, and no paths: numbers tell."""
    file = read("wrapped", "weights.h5")
    head = ("scaled/iteration", "scaled/learning_rate", "step_counter", "dynamic_scale")
    averages = without(file, *head, "_accumulator", "_momentum")
    with pytest.raises(ValueError, match=r"are below 0 where the latter are not.*'average',\)"):
        begin(averages, "weights.h5")
    sums = without(file, *head, "_average", "_momentum")
    with pytest.raises(ValueError, match=r"are 0 where the latter are not.*accumulation_steps"):
        begin(sums, "weights.h5")
    state = begin(averages, "weights.h5", momentum=False, ignore=["average"])
    same = begin(file, "weights.h5", **ALL)
    steps, of_steps = (s.inner_states["train"].inner_state for s in (state, same))
    np.testing.assert_array_equal(steps.nu["fc2"]["bias"], of_steps.nu["fc2"]["bias"])
    assert (steps.count, of_steps.count) == (K, K // 2)


def test_names_in_another_order_than_paths(read):
    file, trained = read("frozen", "h5"), PATHS[FROZEN:]
    tx = partition(dialects.keras(momentum=0.9, centered=True))
    with jax.enable_x64(True):
        params = record_keras_files.begin(file, "h5", file.config, "frozen")[0]
        rest = params, record_keras_files.mapping("h5"), tx
        with pytest.raises(
            ValueError, match=r"names must be in the order of variables, \['net_norm"
        ):
            convert.from_keras(file.variables, *rest, names=trained[::-1])
        state = convert.from_keras(file.variables, *rest, names=trained)
        by_number = {str(i): array for i, array in enumerate(file.variables.values())}
        assert_same(convert.from_keras(by_number, *rest, names=trained), state)


def test_numbers_that_are_parameters_are_told_from_those_of_a_loss_scale():
    """Where there are as many: by their dtypes."""
    tx = dialects.keras(momentum=0.9, centered=True)
    params, mapping = {"a": jnp.ones(()), "b": jnp.ones(())}, {"a": 0, "b": 1}
    steps, scale, slots = [np.int32(3), 0.1], [np.int32(0), 8.0], [1.0, 4.0]
    given = [np.int32(0), 0.0, *scale, *steps, *slots]
    with pytest.raises(ValueError, match="variables must be the number of steps"):
        convert.from_keras(given, params, mapping, tx)
    plain = dialects.keras()
    state = convert.from_keras(given, params, mapping, plain, ignore=["loss_scale"])
    assert (state.count, state.nu["b"]) == (3, 4.0)
