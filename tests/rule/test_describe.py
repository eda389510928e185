"""What describe prints, and where it finds a rule."""

import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import gradients, run
from rmsprop_jax import describe, dialects, recipes, rmsprop, scale_by_rms

PLAIN = """\
s <- decay s + (1 - decay) |g|^2
x <- x - learning_rate g / sqrt(s + eps)
from s = 0
with learning_rate 0.1, decay 0.9, eps 1e-08"""


@pytest.mark.parametrize(
    ("kwargs", "want"),
    [
        ({}, PLAIN),
        (
            {"centered": True, "bias_correction": True, "eps_in_sqrt": False},
            """\
v <- decay v + (1 - decay) |g|^2
m <- decay m + (1 - decay) g
w <- decay w + (1 - decay)
s = v / w - |m / w|^2
x <- x - learning_rate g / (sqrt(s) + eps)
from v = 0
with learning_rate 0.1, decay 0.9, eps 1e-08""",
        ),
        (
            {"maximize": True, "weight_decay": 0.01, "momentum": 0.9, "nesterov": True}
            | {"lr_in_momentum": False, "initial_scale": 1.0},
            """\
g <- -g
g <- g + weight_decay x
s <- decay s + (1 - decay) |g|^2
u = g / sqrt(s + eps)
b <- momentum b + u
x <- x - learning_rate (u + momentum b)
from s = 1
with learning_rate 0.1, decay 0.9, eps 1e-08, momentum 0.9, weight_decay 0.01""",
        ),
        (
            {"momentum": lambda count: 0.5, "cautious": True, "weight_decay": jnp.float32(0)}
            | {"decoupled_weight_decay": True, "split_complex": True, "centered": True},
            """\
v <- decay v + (1 - decay) g^2
m <- decay m + (1 - decay) g
s = v - m^2
b <- momentum b + learning_rate g / sqrt(s + eps)
c = b where it has the sign of g, else 0; / the share where it has
x <- x - c - learning_rate weight_decay x
from v = 0
with learning_rate 0.1, decay 0.9, eps 1e-08, momentum a schedule, weight_decay an array""",
        ),
    ],
)
def test_the_words(kwargs, want):
    assert describe(rmsprop(0.1, **kwargs)) == want


def follow(text, grads, x):
    """Does what the text says, line by line, in float64."""
    *lines, start, numbers = text.splitlines()
    names = {"b": 0.0, "m": 0.0, "w": 0.0, "sqrt": np.sqrt, "x": np.asarray(x, np.float64)}
    name, _, value = start.removeprefix("from ").partition(" = ")
    names[name] = float(value)
    for pair in numbers.removeprefix("with ").split(", "):
        name, value = pair.split(" ")
        names[name] = float(value)
    moves = []
    for g in grads:
        names["g"], before = np.asarray(g, np.float64), names["x"]
        for line in lines:
            left, _, right = line.replace("<-", "=").replace("^", "**").partition(" = ")
            right = re.sub(r"([\w)]) (?=[\w(|])", r"\1 * ", right)  # a space is a product
            names[left] = eval(right.replace("|g|", "g").replace("|m|", "m"), names)
        moves.append(names["x"] - before)
    return moves


@pytest.mark.parametrize(
    "tx",
    [
        rmsprop(0.1),
        dialects.pytorch(0.01, momentum=0.9, centered=True, weight_decay=0.1, eps=1e-3),
        dialects.pytorch(0.01, maximize=True, weight_decay=0.1),
        dialects.keras(0.01, momentum=0.9, weight_decay=0.1),
        dialects.tensorflow_v1(0.01, momentum=0.5),
        dialects.graves(),
        rmsprop(0.1, momentum=0.9, nesterov=True, lr_in_momentum=False),
    ],
    ids=range(7),
)
def test_the_words_are_true(tx):
    """Whoever follows the lines arrives where the transformation does."""
    grads, x = gradients(20, low=-2, high=2, dtype=np.float32), np.ones(40, np.float32)
    got, _ = run(tx, grads, x)
    want = follow(describe(tx), grads, x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_inside_the_wrappers_of_optax():
    tx = rmsprop(0.1)
    for wrapped in (
        optax.chain(optax.chain(optax.chain(tx))),
        optax.named_chain(("rms", tx)),
        optax.masked(tx, {"w": True}),
        optax.apply_if_finite(tx, 3),
        optax.MultiSteps(tx, 2),
        optax.MultiSteps(tx, 2).gradient_transformation(),
        optax.with_extra_args_support(tx),
        optax.flatten(tx),
    ):
        assert describe(wrapped) == PLAIN
    two = optax.partition({"a": tx, "b": rmsprop(0.2)}, {"w": "a", "v": "b"})
    assert describe(two) == PLAIN + "\n\n" + PLAIN.replace("0.1", "0.2")
    assert "with learning_rate -1," in describe(scale_by_rms())


def test_the_other_links_of_a_chain_are_counted():
    clip, tx = optax.clip(1.0), rmsprop(0.1)
    before = PLAIN + "\nand 1 other transformation before it, not described"
    for chain in (
        optax.chain(clip, tx),
        optax.named_chain(("clip", clip), ("rms", tx)),
        optax.chain(clip, optax.chain(tx)),
        optax.chain(optax.chain(clip, clip), tx),
        optax.MultiSteps(optax.chain(clip, optax.masked(tx, {"w": True})), 2),
        optax.chain(clip, optax.partition({"a": tx, "b": clip}, {"w": "a", "v": "b"})),
    ):
        assert describe(chain) == before
    around = optax.chain(clip, optax.chain(clip, tx), optax.scale(2.0))
    assert describe(around) == PLAIN + (
        "\nand 2 other transformations before it and 1 other transformation after it, not described"
    )
    for recipe in (recipes.torchbeast(100), recipes.a2c(100, 10), recipes.impala(9, max_norm=1.0)):
        assert describe(recipe).endswith("and 1 other transformation before it, not described")
    # Of several, each is told what is beside it.
    parts = {"b": optax.chain(clip, tx), "a": rmsprop(0.2)}
    two = describe(optax.partition(parts, {"w": "a", "v": "b"}))
    assert two == before + "\n\n" + PLAIN.replace("0.1", "0.2")


def test_hyperparameters_that_a_wrapper_has_in_its_state_are_arrays():
    make = optax.inject_hyperparams(dialects.pytorch, static_args=("weight_decay", "momentum"))
    text = describe(make(lr=1e-2, momentum=0.9))
    assert text.startswith("s <- decay s + (1 - decay) g^2\nb <- momentum b + g / (sqrt(s) + eps)")
    assert text.endswith("with learning_rate an array, decay an array, eps an array, momentum 0.9")


def test_parameters_are_asked_for_where_a_wrapper_needs_them():
    def first_alone(tx):
        def init(params):
            return tx.init(params["first"])

        return optax.GradientTransformation(init, tx.update)

    tx, params = first_alone(rmsprop(0.1)), {"first": jnp.ones(2), "second": jnp.ones(3)}
    with pytest.raises(ValueError, match="params must be given: a wrapper in tx does not work"):
        describe(tx)
    assert describe(tx, params) == PLAIN
    with pytest.raises(TypeError, match="tx must be an RMSProp of rmsprop_jax or contain one"):
        describe(first_alone(optax.sgd(0.1)), params)


@pytest.mark.parametrize("tx", [optax.rmsprop(0.1), None, 3, optax.chain(optax.clip(1.0))])
def test_nothing_to_describe(tx):
    with pytest.raises(TypeError, match="tx must be an RMSProp of rmsprop_jax or contain one"):
        describe(tx)


def test_numbers_are_not_rounded():
    text = describe(rmsprop(0.1234567891, decay=0.9999999, initial_scale=jnp.float32(1)))
    assert "learning_rate 0.1234567891, decay 0.9999999," in text
    assert "from s = an array" in text


def test_a_storage_of_ones_own_is_named():
    from rmsprop_jax._storage import Float32

    class Mine(Float32):
        def __repr__(self):
            return "Mine()"

    assert describe(rmsprop(0.1, storage=Mine())) == PLAIN + "\nheld by Mine()"
