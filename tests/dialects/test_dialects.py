"""The dialects compared with the loop of reference.py, and the arguments they refuse.

Recorded runs of the frameworks themselves are in test_frameworks.py.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import assert_close, assert_moved, gradients, run, run_all
import reference
from rmsprop_jax import RMSPropState, dialects
from rmsprop_jax._storage import Float32

REQUIRED = inspect.Parameter.empty
SIGNATURES = {
    "pytorch": {
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0,
        "momentum": 0,
        "centered": False,
        "maximize": False,
    },
    "timm": {
        "lr": 1e-2,
        "alpha": 0.9,
        "eps": 1e-10,
        "weight_decay": 0,
        "momentum": 0.0,
        "centered": False,
        "decoupled_decay": False,
        "corrected_weight_decay": False,
        "lr_in_momentum": True,
        "caution": False,
        "initial_lr": None,
    },
    "stable_baselines3": {
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0,
        "momentum": 0,
        "centered": False,
    },
    "tensorflow_v1": {
        "learning_rate": REQUIRED,
        "decay": 0.9,
        "momentum": 0.0,
        "epsilon": 1e-10,
        "centered": False,
    },
    "keras": {
        "learning_rate": 1e-3,
        "rho": 0.9,
        "momentum": 0.0,
        "epsilon": 1e-7,
        "centered": False,
        "weight_decay": None,
    },
    "keras_legacy": {
        "learning_rate": 1e-3,
        "rho": 0.9,
        "momentum": 0.0,
        "epsilon": 1e-7,
        "centered": False,
        "decay": 0.0,
    },
    "sonnet": {
        "learning_rate": REQUIRED,
        "decay": 0.9,
        "momentum": 0.0,
        "epsilon": 1e-10,
        "centered": False,
    },
    "paddle": {
        "learning_rate": REQUIRED,
        "rho": 0.95,
        "epsilon": 1e-6,
        "momentum": 0.0,
        "centered": False,
        "weight_decay": None,
    },
    "jax_example": {"step_size": REQUIRED, "gamma": 0.9, "eps": 1e-8, "momentum": None},
    "mlx": {"learning_rate": REQUIRED, "alpha": 0.99, "eps": 1e-8},
    "graves": {"learning_rate": 1e-4, "decay": 0.95, "momentum": 0.9, "eps": 1e-4},
    "d2l": {"lr": 0.01, "gamma": 0.9, "eps": 1e-6},
}


@pytest.mark.parametrize("name", dialects.__all__)
def test_names_order_and_defaults(name):
    parameters = dict(inspect.signature(getattr(dialects, name)).parameters)
    assert parameters.pop("storage").default is None
    assert list(parameters) == list(SIGNATURES[name])
    assert {n: p.default for n, p in parameters.items()} == SIGNATURES[name]


STEPS = 40
RATES = 0.01 * np.where(np.arange(STEPS) < 15, 1, np.where(np.arange(STEPS) < 25, 0.1, 0.5))
BOTH = {"centered": True, "momentum": 0.9}
OUTSIDE = {"eps_in_sqrt": False, "lr_in_momentum": False}
# The dialect, its arguments, and the switches of the reference that it stands for.
RUNS = [
    ("pytorch", {"eps": 1e-2}, {"decay": 0.99, "eps": 1e-2, **OUTSIDE}),
    ("pytorch", {"eps": 1e-2, **BOTH}, {"decay": 0.99, "eps": 1e-2, **OUTSIDE, **BOTH}),
    (
        "pytorch",
        {"alpha": 0.5, "weight_decay": 0.1, "maximize": True, "momentum": 0.5},
        {"decay": 0.5, "eps": 1e-8, "weight_decay": 0.1, "maximize": True, "momentum": 0.5}
        | OUTSIDE,
    ),
    ("timm", {}, {"eps": 1e-10, "initial_scale": 1.0}),
    (
        "timm",
        {"momentum": 0.9, "lr_in_momentum": False, "weight_decay": 0.1},
        {"eps": 1e-10, "initial_scale": 1.0, "momentum": 0.9, "lr_in_momentum": False}
        | {"weight_decay": 0.1},
    ),
    (
        "timm",
        {"weight_decay": 0.1, "decoupled_decay": True, "corrected_weight_decay": True}
        | {"initial_lr": 0.01, "momentum": 0.9, "caution": True},
        {"eps": 1e-10, "initial_scale": 1.0, "momentum": 0.9, "cautious": True}
        | {"weight_decay": 0.1 * RATES / 0.01, "decoupled_weight_decay": True},
    ),
    (
        "timm",
        {"caution": True, "decoupled_decay": True, "corrected_weight_decay": True}
        | {"initial_lr": 0.01},
        {"eps": 1e-10, "initial_scale": 1.0},
    ),
    (
        "stable_baselines3",
        {"momentum": 0.9, "weight_decay": 0.1},
        {"decay": 0.99, "initial_scale": 1.0, "momentum": 0.9, "lr_in_momentum": False}
        | {"weight_decay": 0.1},
    ),
    ("tensorflow_v1", {"momentum": 0.9}, {"eps": 1e-10, "initial_scale": 1.0, "momentum": 0.9}),
    ("tensorflow_v1", {"epsilon": 1e-2, **BOTH}, {"eps": 1e-2, "initial_scale": 1.0, **BOTH}),
    ("sonnet", {"momentum": 0.9}, {"eps": 1e-10, "momentum": 0.9}),
    (
        "keras",
        {"momentum": 0.9, "weight_decay": 0.1},
        {"eps": 1e-7, "momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    ("keras_legacy", {}, {"eps": 1e-7, "eps_in_sqrt": False}),
    ("keras_legacy", {"epsilon": 0}, {"eps": 1e-7, "eps_in_sqrt": False}),
    ("keras_legacy", {"epsilon": None, "momentum": 0.9}, {"eps": 1e-7, "momentum": 0.9}),
    (
        "paddle",
        {"momentum": 0.9, "weight_decay": 0.1},
        {"decay": 0.95, "eps": 1e-6, "momentum": 0.9, "weight_decay": 0.1},
    ),
    ("jax_example", {}, {"eps": 1e-8}),
    ("jax_example", {"momentum": 0.9}, {"eps": 1e-8, "momentum": 0.9}),
    ("mlx", {}, {"decay": 0.99, "eps": 1e-8, "eps_in_sqrt": False}),
    ("graves", {}, {"decay": 0.95, "eps": 1e-4, **BOTH}),
    ("d2l", {}, {"eps": 1e-6}),
]


def test_the_rule(subtests):
    """In float64, with a learning rate that is constant or jumps down and up."""
    grads = gradients(STEPS)
    x = np.linspace(-1, 1, 40)
    rates = {"constant": np.full(STEPS, 0.01), "jumps": RATES}
    with jax.enable_x64(True):
        given = {"constant": 0.01, "jumps": lambda count: jnp.asarray(RATES)[count]}
        txs = {
            (i, rate): getattr(dialects, name)(given[rate], **kwargs)
            for i, (name, kwargs, _) in enumerate(RUNS)
            for rate in rates
        }
        found, _ = run_all(txs, grads, x)
    for (i, rate), got in found.items():
        name, kwargs, switches = RUNS[i]
        if rate == "constant" and isinstance(switches.get("weight_decay"), np.ndarray):
            switches = switches | {"weight_decay": 0.1}
        with subtests.test(dialect=name, **kwargs, rate=rate):
            want = reference.run(grads, x, learning_rate=rates[rate], **switches)
            assert_close(got, want, 1e-11, 1e-13)


def test_the_decay_of_legacy_keras():
    grads = gradients(STEPS)
    rates = 0.01 / (1 + 2.5 * np.arange(STEPS))
    txs = {
        1.0: dialects.keras_legacy(0.01, decay=2.5),
        0.5: dialects.keras_legacy(lambda count: 0.005, decay=2.5),
    }
    with jax.enable_x64(True):
        found, _ = run_all(txs, grads)
    for factor, got in found.items():
        want = reference.run(grads, learning_rate=rates * factor, eps=1e-7, eps_in_sqrt=False)
        assert_close(got, want, 1e-11, 1e-13)


def test_a_complex_parameter_of_pytorch_is_a_pair_of_real_ones():
    grads = gradients(30, dtype=np.complex64, low=-3, high=3)
    kwargs = {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "momentum": 0.9, "weight_decay": 0.1}
    got, state = run(dialects.pytorch(**kwargs, centered=True), grads)
    assert state.nu.dtype == jnp.complex64
    assert_moved(state)
    assert np.all(np.any(got, axis=0))
    for part in (np.real, np.imag):
        alone, _ = run(dialects.pytorch(**kwargs, centered=True), [part(g) for g in grads])
        assert_close(map(part, got), alone, 5e-5, 5e-7)


@pytest.mark.parametrize("name", ["pytorch", "timm", "stable_baselines3", "tensorflow_v1", "keras"])
def test_zero_is_absent(name):
    """No buffer, and no parameters needed."""
    make = getattr(dialects, name)
    decay = {} if name == "tensorflow_v1" else {"weight_decay": 0.0}
    for zero in (0, 0.0, np.float32(0)):
        tx = make(0.1, momentum=zero, **decay)
        state = tx.init(jnp.ones(3))
        assert state.trace is None
        tx.update(jnp.ones(3), state)
    assert make(0.1, momentum=jnp.float32(0)).init(jnp.ones(3)).trace is not None
    if decay:
        tx = make(0.1, weight_decay=0.1)
        with pytest.raises(ValueError, match="weight_decay needs the parameters"):
            tx.update(jnp.ones(3), tx.init(jnp.ones(3)))


def test_timm_ignores_what_has_nothing_to_act_on():
    dialects.timm(lambda count: 0.1, corrected_weight_decay=True, decoupled_decay=True)
    dialects.timm(lambda count: 0.1, corrected_weight_decay=True, weight_decay=0.1)
    dialects.timm(0.1, caution=True, initial_lr=0.2)


REFUSED = [
    ("pytorch", {"lr": -0.1}, ValueError, "lr must be >= 0 .*got -0.1"),
    ("pytorch", {"lr": np.nan}, ValueError, "lr must be >= 0 .*got nan"),
    ("pytorch", {"alpha": -0.1}, ValueError, "alpha must be >= 0 and <= 1, got -0.1"),
    ("pytorch", {"alpha": 1.5}, ValueError, "alpha must be >= 0 and <= 1, got 1.5"),
    ("pytorch", {"eps": -1}, ValueError, "eps must be >= 0"),
    ("pytorch", {"momentum": -0.9}, ValueError, "momentum must be >= 0"),
    ("pytorch", {"weight_decay": -1e-4}, ValueError, "weight_decay must be >= 0"),
    ("pytorch", {"lr": jnp.ones(2)}, ValueError, r"lr must be a scalar.*\(2,\)"),
    ("pytorch", {"lr": None}, TypeError, "lr must be a number.*None"),
    ("pytorch", {"momentum": None}, TypeError, "momentum must be a number.*None"),
    ("pytorch", {"centered": 1}, TypeError, "centered must be True or False"),
    ("pytorch", {"maximize": 1}, TypeError, "maximize must be True or False"),
    ("pytorch", {"storage": "q8"}, TypeError, "storage must be a Storage"),
    ("stable_baselines3", {"lr": -0.1}, ValueError, "lr must be >= 0"),
    ("stable_baselines3", {"alpha": -0.1}, ValueError, "alpha must be >= 0"),
    ("timm", {"lr": -0.1}, ValueError, "lr must be >= 0"),
    ("timm", {"eps": -1}, ValueError, "eps must be >= 0"),
    ("timm", {"caution": 1}, TypeError, "caution must be True or False"),
    ("timm", {"decoupled_decay": 1}, TypeError, "decoupled_decay must be True or False"),
    ("timm", {"corrected_weight_decay": 1}, TypeError, "corrected_weight_decay must be True or"),
    ("timm", {"lr_in_momentum": 0}, TypeError, "lr_in_momentum must be True or False"),
    ("timm", {"initial_lr": "x"}, TypeError, "initial_lr must be a number or scalar array"),
    (
        "timm",
        {"lr": 0.0, "corrected_weight_decay": True},
        ValueError,
        "corrected_weight_decay=True needs lr > 0, got 0.0",
    ),
    (
        "timm",
        {"initial_lr": 0.0, "corrected_weight_decay": True},
        ValueError,
        "corrected_weight_decay=True needs initial_lr > 0, got 0.0",
    ),
    (
        "timm",
        {"lr": lambda count: 0.1, "weight_decay": 0.1, "decoupled_decay": True}
        | {"corrected_weight_decay": True},
        ValueError,
        "corrected_weight_decay=True needs initial_lr",
    ),
    ("tensorflow_v1", {"decay": 2}, ValueError, "decay must be >= 0 and <= 1, got 2"),
    ("tensorflow_v1", {"epsilon": -1}, ValueError, "epsilon must be >= 0"),
    ("tensorflow_v1", {"momentum": -1}, ValueError, "momentum must be >= 0"),
    ("keras", {"rho": 2}, ValueError, "rho must be >= 0 and <= 1, got 2"),
    ("keras", {"learning_rate": 1}, TypeError, "learning_rate must be a float, not an int, got 1"),
    ("keras", {"weight_decay": -0.1}, ValueError, "weight_decay must be >= 0"),
    ("keras_legacy", {"momentum": 1.5}, ValueError, "momentum must be >= 0 and <= 1, got 1.5"),
    ("keras_legacy", {"momentum": -0.5}, ValueError, "momentum must be >= 0 .*got -0.5"),
    (
        "keras_legacy",
        {"momentum": jnp.float32(0.9)},
        TypeError,
        "momentum must be a number or a",
    ),
    ("keras_legacy", {"epsilon": False}, TypeError, "epsilon must be a number.*got False"),
    ("keras_legacy", {"decay": -1.0}, ValueError, "decay must be >= 0 .*got -1.0"),
    ("sonnet", {"epsilon": -1}, ValueError, "epsilon must be >= 0"),
    ("paddle", {"learning_rate": None}, TypeError, "learning_rate must be a number"),
    ("paddle", {"learning_rate": 1}, TypeError, "learning_rate must be a float, not an int, got 1"),
    ("paddle", {"rho": -0.1}, ValueError, "rho must be >= 0"),
    ("jax_example", {"gamma": -0.1}, ValueError, "gamma must be >= 0"),
    ("mlx", {"eps": 0.0}, ValueError, "eps must be > 0, got 0.0"),
    ("mlx", {"eps": None}, TypeError, "eps must be a number.*None"),
    ("mlx", {"eps": -1e-8}, ValueError, "eps must be >= 0"),
    ("mlx", {"alpha": -0.1}, ValueError, "alpha must be >= 0"),
    ("graves", {"decay": -0.1}, ValueError, "decay must be >= 0"),
    ("d2l", {"gamma": 2}, ValueError, "gamma must be >= 0 and <= 1, got 2"),
]


@pytest.mark.parametrize(("name", "kwargs", "error", "message"), REFUSED)
def test_refused(name, kwargs, error, message):
    make = getattr(dialects, name)
    first = next(iter(SIGNATURES[name]))
    with pytest.raises(error, match=message):
        make(**{first: 0.1} | kwargs)


def test_a_schedule_is_checked_under_the_name_of_the_dialect():
    tx = dialects.pytorch(0.1, alpha=lambda count: 1.5)
    with pytest.raises(ValueError, match=r"alpha must be >= 0 and <= 1, got 1\.5"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize("name", dialects.__all__)
def test_each_lives_with_optax_and_passes_its_storage_on(name):
    make = getattr(dialects, name)
    params, grads = {"w": jnp.ones(3), "b": jnp.ones(2)}, {"w": jnp.ones(3), "b": None}
    storage = Float32()
    plain = make(0.1, storage=storage)
    assert plain.part.variant.storage == storage
    state = plain.init(params)
    assert type(state) is RMSPropState
    updates, new = jax.jit(plain.update)(grads, state, params)
    assert updates["b"] is None
    assert np.all(updates["w"] < 0)
    np.testing.assert_array_equal(new.nu["b"], state.nu["b"])

    first = next(iter(SIGNATURES[name]))
    absent = ("momentum", "weight_decay", "epsilon", "decay")
    static = [n for n in absent if n in inspect.signature(make).parameters and n != first]
    injected = optax.inject_hyperparams(make, static_args=static)(**{first: 0.1})
    chained = optax.chain(optax.clip(1e9), injected)
    alone = {"w": params["w"]}
    got, _ = jax.jit(chained.update)({"w": grads["w"]}, chained.init(alone), alone)
    np.testing.assert_allclose(got["w"], updates["w"], rtol=1e-6)


def test_a_learning_rate_changed_by_hand():
    """As one writes to param_groups in PyTorch; what static_args names stays absent."""
    tx = optax.inject_hyperparams(dialects.pytorch, static_args=("weight_decay", "momentum"))(
        lr=0.1
    )
    update = jax.jit(tx.update)
    g = jnp.asarray([1.0, -3.0])
    state = tx.init(g)
    assert state.inner_state.trace is None
    updates = []
    for lr in (0.1, 0.01):
        state.hyperparams["lr"] = jnp.asarray(lr)
        u, state = update(g, state)
        updates.append(np.asarray(u))
    want = reference.run(
        [np.asarray(g)] * 2, learning_rate=[0.1, 0.01], decay=0.99, eps=1e-8, **OUTSIDE
    )
    assert_close(updates, want, 5e-5, 5e-6)


@pytest.mark.parametrize("name", dialects.__all__)
def test_every_docstring_says_what_it_is(name):
    doc = getattr(dialects, name).__doc__
    for heading in ("Args:", "Returns:", "Raises:", "Example:", "Source"):
        assert heading in doc
    assert "<- " in doc
    for parameter in [*SIGNATURES[name], "storage"]:
        assert f"  {parameter}: " in doc
