"""The recipes compared with the loop of reference.py, given the published numbers separately."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import assert_close, gradients, run_all
import reference
from rmsprop_jax import describe, recipes
from rmsprop_jax.recipes._arguments import stairs

TF1 = {"initial_scale": 1.0}
TORCH = {"eps_in_sqrt": False, "lr_in_momentum": False}
STEPS = 60
T = np.arange(STEPS)
EPOCH = 7.3  # updates an epoch, so that stairs and epochs do not fall together


def efficientnet_rate(t, epoch=EPOCH, peak=0.256):
    """As tensorflow/tpu has it: the fall is counted from step 0, below the rise."""
    rise = int(5 * epoch)
    return peak * t / rise if t < rise else peak * 0.97 ** (t // (2.4 * epoch))


RECIPES = [
    ("nature_dqn", {}, {"learning_rate": 2.5e-4, "decay": 0.95, "eps": 0.01, "centered": True}),
    (
        "dqn_zoo",
        {},
        {"learning_rate": 2.5e-4, "decay": 0.95, "eps": 0.01 / 1024, "centered": True},
    ),
    (
        "impala",
        {"total_steps": 50},
        {"learning_rate": 4.8e-4 * np.maximum(1 - T / 50, 0), "decay": 0.99, "eps": 0.1, **TF1},
    ),
    (
        "torchbeast",
        {"total_steps": 50.5, "max_norm": None},
        {"learning_rate": 4.8e-4 * np.maximum(1 - T / 50.5, 0), "decay": 0.99, "eps": 0.01} | TORCH,
    ),
    (
        "a2c",
        {"total_timesteps": 4000, "batch_size": 80, "max_norm": None},
        {"learning_rate": 7e-4 * np.maximum(1 - ((T + 1) * 80 - 1) / 4000, 0), "decay": 0.99}
        | {"eps": 1e-5, **TF1},
    ),
    (
        "inception",
        {"steps_per_epoch": EPOCH, "weight_decay": 0},
        {"learning_rate": 0.045 * 0.94 ** (T // 14), "eps": 1.0, "momentum": 0.9, **TF1},
    ),
    (
        "mobilenet_v2",
        {"steps_per_epoch": EPOCH},
        {"learning_rate": 0.045 * 0.98 ** (T // 7), "eps": 1.0, "momentum": 0.9}
        | {"weight_decay": 4e-5, **TF1},
    ),
    (
        "mobilenet_v2",
        {"steps_per_epoch": EPOCH, "learning_rate": 0.36, "epochs_per_decay": 2.5},
        {"learning_rate": 0.36 * 0.98 ** (T // 18), "eps": 1.0, "momentum": 0.9}
        | {"weight_decay": 4e-5, **TF1},
    ),
    (
        "mobilenet_v3",
        {"steps_per_epoch": EPOCH},
        {"learning_rate": 0.1 * 0.99 ** (T // 21), "eps": 0.002, "momentum": 0.9}
        | {"weight_decay": 1e-5, **TF1},
    ),
    (
        "mobilenet_v3",
        {"steps_per_epoch": EPOCH, "learning_rate": 0.16, "warmup_epochs": 5},
        {"learning_rate": 0.16 * np.minimum(T / 36, 0.99 ** (T // 21)), "eps": 0.002}
        | {"momentum": 0.9, "weight_decay": 1e-5, **TF1},
    ),
    (
        "efficientnet",
        {"steps_per_epoch": EPOCH},
        {"learning_rate": np.asarray([efficientnet_rate(t) for t in T]), "eps": 0.001}
        | {"momentum": 0.9, "weight_decay": 1e-5, **TF1},
    ),
    (
        "torchvision_mobilenet_v3",
        {"steps_per_epoch": 7},
        {"learning_rate": 0.064 * 0.973 ** (T // 14), "eps": 0.0316, "momentum": 0.9}
        | {"weight_decay": 1e-5, **TORCH},
    ),
    ("wgan", {}, {"learning_rate": 5e-5, "decay": 0.99, "eps": 1e-8, **TORCH}),
]


def made():
    """All of them, by their numbers in RECIPES."""
    return {i: getattr(recipes, name)(**kwargs) for i, (name, kwargs, _) in enumerate(RECIPES)}


def test_the_published_rule(subtests):
    """In float64."""
    grads = gradients(STEPS, low=-3, high=2)
    x = np.linspace(-1, 1, 40)
    with jax.enable_x64(True):
        found, _ = run_all(made(), grads, x)
    for i, (name, kwargs, switches) in enumerate(RECIPES):
        with subtests.test(recipe=name, **kwargs):
            want = reference.run(grads, x, **switches)
            assert_close(found[i], want, 1e-11, 1e-11 * np.max(switches["learning_rate"]))


def test_all_are_tested():
    assert {name for name, _, _ in RECIPES} == set(recipes.__all__)


def test_the_drop_at_the_end_of_efficientnets_rise():
    """With the paper's batch of 4096: two stairs at once, from .2558 to .2409."""
    epoch, g = 1281167 / 4096, np.ones(1, np.float32)
    tx = recipes.efficientnet(epoch, weight_decay=0)
    state = tx.init(g)

    @jax.jit
    def step(count):
        # s = 1 and no past in the buffer: the step is the learning rate / sqrt(1.001)
        return -tx.update(g, state._replace(count=count))[0][0] * 1.001**0.5

    rise = int(5 * epoch)
    rates = [float(step(np.int32(t))) for t in (0, 1, rise - 1, rise, rise + 500)]
    want = [efficientnet_rate(t, epoch) for t in (0, 1, rise - 1, rise, rise + 500)]
    np.testing.assert_allclose(rates, want, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(rates[2:4], [0.25584, 0.24087], atol=1e-5)


@pytest.mark.parametrize("x64", [False, True])
def test_every_stair_is_where_it_should_be(x64, subtests, default_promotion):
    """Compiled, for many lengths: XLA multiplies by 1 / length where it may, and misses some."""
    # Of the lengths that are not whole, the multiples by 5 are.
    lengths = {float(n): (n, 1) for n in range(1, 130)}
    lengths |= {2.4 * epoch: (12 * epoch, 5) for epoch in (31, 62, 313)}
    tops, aside = np.repeat([1, 2, 3, 50], 2), np.tile([-1, 0], 4)
    counts = {n: (tops * whole + aside).astype(np.int32) for n, (whole, _) in lengths.items()}

    @jax.jit
    def rates(counts):
        return {n: stairs(1.0, n, 0.5)(count) for n, count in counts.items()}

    with jax.enable_x64(x64):
        got = rates(counts)
    for n, (_, times) in lengths.items():
        with subtests.test(length=n):
            want = 0.5 ** (tops * times + aside)
            np.testing.assert_array_equal(got[n], want.astype(got[n].dtype))


def test_after_the_end(subtests):
    """The learning rate stays 0, also of the last count there is."""
    txs = {
        "impala": recipes.impala(78125),
        "torchbeast": recipes.torchbeast(46875),
        "a2c": recipes.a2c(80e6, 80),
    }
    g = np.ones(2, np.float32)

    @jax.jit
    def updates(count):
        late = {n: optax.tree.set(tx.init(g), count=count) for n, tx in txs.items()}
        return {n: tx.update(g, late[n], g)[0] for n, tx in txs.items()}

    for count in (10**6, 10**9, 2**31 - 1):
        for name, u in updates(np.int32(count)).items():
            with subtests.test(recipe=name, count=count):
                assert not np.any(u)
    assert all(np.all(u < 0) for u in updates(np.int32(0)).values())


def test_the_norm_of_float16_gradients():
    """Their squares are beyond float16; clipped in it, all updates would be 0."""
    g = np.full(4, 300.0, np.float16)
    txs = recipes.torchbeast(1000), recipes.a2c(1e6, 80)
    update = jax.jit(lambda g: [tx.update(g, tx.init(g))[0] for tx in txs])
    for got, want in zip(update(g), update(np.float32(g)), strict=True):
        assert got.dtype == jnp.float16
        assert np.all(want < 0)
        np.testing.assert_allclose(got, want, rtol=2e-3)


def test_clipping_by_the_global_norm(subtests):
    txs = {
        "torchbeast": (recipes.torchbeast(1000), 40.0),
        "a2c": (recipes.a2c(1e6, 80), 0.5),
        "impala": (recipes.impala(1000, 6e-4, eps=0.01, max_norm=40.0), 40.0),
        "inception": (recipes.inception(800, max_norm=2.0, weight_decay=0), 2.0),
    }
    params = {"a": np.ones(3, np.float32), "b": np.ones(4, np.float32)}
    grads = {"a": np.full(3, 1000, np.float32), "b": np.full(4, -500, np.float32)}
    length = np.sqrt(3 * 1000.0**2 + 4 * 500.0**2)
    small = {
        name: {leaf: g * np.float32(norm / length) for leaf, g in grads.items()}
        for name, (_, norm) in txs.items()
    }

    @jax.jit
    def updates(grads):
        return {n: tx.update(grads[n], tx.init(params), params)[0] for n, (tx, _) in txs.items()}

    got, want = updates(dict.fromkeys(txs, grads)), updates(small)
    for name in txs:
        with subtests.test(recipe=name):
            assert np.all(got[name]["a"] < 0)
            for leaf in params:
                np.testing.assert_allclose(got[name][leaf], want[name][leaf], rtol=1e-5)


def test_weight_decay_is_masked_and_part_of_what_is_clipped():
    params = {"kernel": np.full((1, 1), 1e6, np.float32), "bias": np.full(1, 1e6, np.float32)}
    grads = jax.tree.map(np.zeros_like, params)
    mask = {"kernel": True, "bias": False}
    clipped = {"max_norm": 2.0, "momentum": 0.0}
    txs = [make(100.0, mask=mask) for make in (recipes.mobilenet_v2, recipes.mobilenet_v3)]
    txs += [recipes.inception(100.0, mask=mask, **rest) for rest in ({}, clipped)]
    updates = jax.jit(lambda: [tx.update(grads, tx.init(params), params)[0] for tx in txs])()
    for u in updates:
        assert u["kernel"][0, 0] < 0
        assert u["bias"][0] == 0
    # The decay alone would be 40; it is clipped to 2.
    want = 0.045 * 2 / np.sqrt(0.9 + 0.1 * 4 + 1)
    np.testing.assert_allclose(-updates[-1]["kernel"][0, 0], want, rtol=1e-5)


def test_nature_dqn_and_dqn_zoo_agree_on_sum_and_mean():
    grads = gradients(50, dtype=np.float32, low=-3, high=2)
    summed, _ = run_all({"sum": recipes.nature_dqn()}, grads)
    mean, _ = run_all({"mean": recipes.dqn_zoo()}, [g / 32 for g in grads])
    assert np.all(np.any(mean["mean"], axis=0))
    assert_close(mean["mean"], summed["sum"], 1e-5, 1e-5 * 2.5e-4)


REFUSED = [
    ("nature_dqn", {"learning_rate": lambda c: 0.1}, TypeError, "learning_rate must be a number"),
    ("dqn_zoo", {"batch_size": 0}, ValueError, "batch_size must be > 0, got 0"),
    ("impala", {"total_steps": -1}, ValueError, "total_steps must be > 0, got -1"),
    ("impala", {"total_steps": 10, "max_norm": 0}, ValueError, "max_norm must be > 0, got 0"),
    ("torchbeast", {"total_steps": "x"}, TypeError, "total_steps must be a number"),
    ("torchbeast", {"total_steps": jnp.ones(())}, TypeError, "total_steps must be a Python number"),
    ("a2c", {"total_timesteps": 0, "batch_size": 1}, ValueError, "total_timesteps must be > 0"),
    ("a2c", {"total_timesteps": 10, "batch_size": 0}, ValueError, "batch_size must be > 0"),
    ("inception", {"steps_per_epoch": 0}, ValueError, "steps_per_epoch must be > 0, got 0"),
    ("inception", {"steps_per_epoch": 9, "momentum": -1}, ValueError, "momentum must be >= 0"),
    ("mobilenet_v2", {"steps_per_epoch": 9, "weight_decay": -1}, ValueError, "weight_decay must"),
    ("mobilenet_v2", {"steps_per_epoch": 9, "epochs_per_decay": 0}, ValueError, "epochs_per_decay"),
    ("mobilenet_v3", {"steps_per_epoch": 9, "warmup_epochs": -1}, ValueError, "warmup_epochs must"),
    ("efficientnet", {"steps_per_epoch": np.nan}, ValueError, "steps_per_epoch must be finite"),
    ("torchvision_mobilenet_v3", {"learning_rate": "x"}, TypeError, "learning_rate must be"),
    ("wgan", {"learning_rate": -1.0}, ValueError, "lr must be >= 0"),
]


@pytest.mark.parametrize(("name", "kwargs", "error", "message"), REFUSED)
def test_refused(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        getattr(recipes, name)(**kwargs)


def test_each_is_ready_to_chain_and_described(subtests):
    params = {"w": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}
    txs = {i: optax.chain(optax.clip(1.0), tx) for i, tx in made().items()}

    @jax.jit
    def first():
        return {i: tx.update(params, tx.init(params), params)[0] for i, tx in txs.items()}

    for i, updates in first().items():
        with subtests.test(recipe=RECIPES[i][0]):
            assert jax.tree.structure(updates) == jax.tree.structure(params)
            assert "x <- x - " in describe(txs[i])


@pytest.mark.parametrize("name", recipes.__all__)
def test_every_docstring_names_its_source(name):
    make = getattr(recipes, name)
    for heading in ("Args:", "Returns:", "Raises:", "Example:", "Source"):
        assert heading in make.__doc__
    for parameter in inspect.signature(make).parameters:
        assert f"  {parameter}: " in make.__doc__
