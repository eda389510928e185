"""Conversion from and to optax.rmsprop, in all its forms, tested against Optax itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conversions import assert_same, begun, going_on, tree
import helpers
from rmsprop_jax import convert, rmsprop

# Optax mixes dtypes.
pytestmark = pytest.mark.usefixtures("default_promotion")

OPTAX = {
    "plain": {},
    "eps outside": {"eps_in_sqrt": False},
    "from 1": {"initial_scale": 1.0},
    "centered": {"centered": True},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "bias correction": {"bias_correction": True},
    "schedule": {"learning_rate": optax.exponential_decay(0.01, 1, 0.9)},
    "schedule, momentum": {"learning_rate": optax.exponential_decay(0.01, 1, 0.9), "momentum": 0.9},
    "most": {"centered": True, "bias_correction": True, "momentum": 0.9, "nesterov": True},
    "all": {
        "learning_rate": optax.exponential_decay(0.01, 1, 0.9),
        "centered": True,
        "bias_correction": True,
        "momentum": 0.9,
    },
}


def both(form):
    # What is centered cancels in Optax, most of all in its first steps: a large eps hides that.
    eps = 0.1 if OPTAX[form].get("centered") else 1e-4
    options = {"learning_rate": 0.01, "eps": eps} | OPTAX[form]
    return optax.rmsprop(**options), rmsprop(**options)


def trained(*forms, dtype):
    """{form: (params, state)} of Optax after seven steps."""
    theirs, params = {form: both(form)[0] for form in forms}, tree(dtype=dtype)
    begin = {form: (params, tx.init(params)) for form, tx in theirs.items()}
    return going_on(theirs)(begin, [tree(t + 1, dtype) for t in range(7)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
def test_optax_goes_on_and_is_gone_on_with(dtype, subtests):
    """k steps there and k here are 2 k there, and the other way round; and so is the state."""
    k, x = 7, np.linspace(-1, 1, 40).astype(dtype)
    grads = [{"w": g} for g in helpers.gradients(2 * k, dtype=dtype, low=-2, high=0)]
    wide = np.finfo(dtype).bits == 64
    rtol, atol = (1e-11, 1e-13) if wide else (5e-5, 5e-7)
    with jax.enable_x64(wide):
        made = {form: dict(zip(("theirs", "ours"), both(form), strict=True)) for form in OPTAX}
        txs = {(form, who): tx for form, two in made.items() for who, tx in two.items()}
        go_on, params = going_on(txs), {"w": jnp.asarray(x)}
        begin = {name: (params, tx.init(params)) for name, tx in txs.items()}
        middle = go_on(begin, grads[:k])
        want = go_on(middle, grads[k:])

        exchanged = {}
        for form in OPTAX:
            theirs, ours = txs[form, "theirs"], txs[form, "ours"]
            there, here = middle[form, "theirs"], middle[form, "ours"]
            state = convert.from_optax(there[1], params, ours, steps=k)
            given = convert.to_optax(here[1], params, ours, theirs.init(params))
            exchanged |= {(form, "ours"): (there[0], state), (form, "theirs"): (here[0], given)}
        got = go_on(exchanged, grads[k:])

        for form in OPTAX:
            with subtests.test(form=form):
                end = np.asarray(want[form, "theirs"][0]["w"])
                for who in ("ours", "theirs"):
                    helpers.assert_close([np.asarray(got[form, who][0]["w"])], [end], rtol, atol)
                there, state = middle[form, "theirs"][1], exchanged[form, "ours"][1]
                assert int(state.count) == k
                again = convert.to_optax(state, params, txs[form, "ours"], there)
                assert_comes_back(form, again, there)


def assert_comes_back(form, again, there):
    assert jax.tree.structure(again) == jax.tree.structure(there)
    rounded = OPTAX[form].get("centered") or OPTAX[form].get("bias_correction")
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(there), strict=True):
        assert a.dtype == b.dtype
        if rounded:  # s and v, and the division by 1 - decay^k: of each a rounding
            assert np.all(np.abs(a - b) <= 2 * np.spacing(np.abs(b)))
        else:
            np.testing.assert_array_equal(a, b)


def test_optax_in_bfloat16(subtests):
    """Its state has the dtype of the parameters; ours is as good as exact, and comes back."""
    runs = trained("plain", "momentum", "all", dtype=jnp.bfloat16)
    for form, (params, there) in runs.items():
        with subtests.test(form=form):
            theirs, ours = both(form)
            state = convert.from_optax(there, params, ours, steps=7)
            slots = jax.tree.leaves((state.nu, state.mu, state.trace))
            assert slots
            assert all(a.dtype == jnp.float32 for a in slots)
            again = convert.to_optax(state, params, ours, theirs.init(params))
            for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(there), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def runs():
    with jax.numpy_dtype_promotion("standard"):
        return trained("plain", "bias correction", "schedule", "all", dtype=np.float32)


def test_optax_says_how_many_steps_it_took_if_it_knows(runs):
    for form, knows in {"plain": False, "bias correction": True, "schedule": True}.items():
        _, ours = both(form)
        params, there = runs[form]
        assert int(convert.from_optax(there, params, ours).count) == 7 * knows
        assert int(convert.from_optax(there, params, ours, steps=3).count) == 3


def test_optax_may_be_wrapped(runs):
    theirs, ours = both("all")
    params, there = runs["all"]
    steps = optax.MultiSteps(theirs, 2).init(params)._replace(inner_opt_state=there)
    wrapped = (optax.EmptyState(), steps)
    found = convert.from_optax(wrapped, params, ours)
    assert int(found.count) == 7
    assert_same(found, convert.from_optax(there, params, ours))


def test_a_decay_in_an_array_counts(runs):
    """As an argument of a jitted step, it is an array."""
    _, ours = both("bias correction")
    params, there = runs["bias correction"]
    want = convert.from_optax(there, params, ours)
    assert int(want.count) == 7
    tx = rmsprop(0.01, jnp.asarray(0.9), bias_correction=True)
    for a, b in zip(
        *map(jax.tree.leaves, (convert.from_optax(there, params, tx), want)), strict=True
    ):
        np.testing.assert_allclose(a, b, 1e-6)


def test_refuses_states_of_optax_that_are_others(runs):
    theirs, ours = both("all")
    params, there = runs["all"]
    less = {name: leaf for name, leaf in params.items() if name != "flat"}
    with pytest.raises(ValueError, match=r"name every parameter.*flat|mapping names.*flat"):
        convert.from_optax(theirs.init(less), params, ours)
    with pytest.raises(ValueError, match=r"mapping has no entry for \['flat'\]"):
        convert.from_optax(there, less, ours)
    with pytest.raises(ValueError, match="nu of 'flat' has shape"):
        convert.from_optax(there, params | {"flat": jnp.zeros((2, 2))}, ours)
    for state in (optax.adam(0.1).init(params), (there, there), optax.EmptyState()):
        with pytest.raises(ValueError, match=r"opt_state must be of one optax.rmsprop"):
            convert.from_optax(state, params, ours)
    with pytest.raises(ValueError, match=r"bias_correction=False in tx, but not in the source"):
        convert.from_optax(there, params, both("momentum")[1])
    tx = rmsprop(0.1, lambda count: 0.9, centered=True, momentum=0.9, bias_correction=True)
    with pytest.raises(ValueError, match="one constant decay"):
        convert.from_optax(there, params, tx)
    broken = jax.tree.map(lambda x: x, there)
    broken[0].mu.pop("flat")
    with pytest.raises(ValueError, match=r"nu or mu of \['flat'\], but not both"):
        convert.from_optax(broken, params, ours)
    uneven = (there[0], there[1]._replace(count=jnp.asarray(5)), *there[2:])
    with pytest.raises(ValueError, match=r"counts \[5, 7\]: pass steps"):
        convert.from_optax(uneven, params, ours)


def test_refuses_to_fill_states_of_optax_that_are_others():
    theirs, ours = both("centered")
    params, state = begun(ours, tree())
    less = {name: leaf for name, leaf in params.items() if name != "flat"}
    more = params | {"more": jnp.zeros(2)}
    for like, message in (
        (theirs.init(less), r"like has no (nu|mu) of \['flat'\]"),
        (theirs.init(more), "like has 'more', but params does not"),
        (theirs.init(params | {"flat": jnp.zeros((2, 2))}), "(nu|mu) of 'flat' has shape"),
        (both("plain")[0].init(params), r"tx has \['mu'\], but like does not"),
        (both("most")[0].init(params), "like has trace, but tx does not"),
        (both("all")[0].init(params), "like has trace, but tx does not"),
        (optax.EmptyState(), r"tx has \['mu', 'nu'\], but like does not"),
        (optax.rmsprop(0.1, centered=True, bias_correction=True).init(params), "bias_correction"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.to_optax(state, params, ours, like)


@pytest.mark.parametrize("placed", [False, True])
def test_what_was_free_to_move_stays_so(placed):
    """Parameters on no device in particular may meet a batch on eight."""
    params = {"w": jnp.ones(8)}
    if placed:
        params = jax.device_put(params, jax.devices()[1])
    new = convert.params_from({"w": np.arange(8.0)}, params, {"w": "w"})
    assert new["w"].committed == placed
    assert new["w"].sharding == params["w"].sharding
