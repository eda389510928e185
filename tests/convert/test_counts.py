"""The number of updates, wherever an Optax state keeps it; schedules continue from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conversions import assert_same
from rmsprop_jax import convert, rmsprop, scale_by_rms
from rmsprop_jax._rule import is_ours

pytestmark = pytest.mark.usefixtures("default_promotion")  # Optax mixes dtypes

PARAMS = {"w": jnp.asarray([1.0, -2.0, 3.0]), "b": jnp.asarray([0.5])}
SCHEDULE = optax.exponential_decay(0.01, 1, 0.8)
TRAINED = {"w": True, "b": False}
UPDATES = 7


def inject(make):
    return optax.inject_hyperparams(make)(SCHEDULE)


def grads(i):
    return jax.tree.map(lambda x: jnp.cos((i + 1) * x), PARAMS)


# Each of a function that makes an RMSProp with a schedule; and the gradients that an update takes.
WRAPPERS = {
    "schedule": lambda make: make(SCHEDULE),
    "inject": inject,
    "chain": lambda make: optax.chain(optax.clip(1.0), inject(make)),
    "MultiSteps": lambda make: optax.MultiSteps(inject(make), 2),
    "apply_if_finite": lambda make: optax.apply_if_finite(inject(make), 3),
    "partition": lambda make: optax.partition(
        {True: inject(make), False: optax.set_to_zero()}, TRAINED
    ),
    "partition, also": lambda make: optax.partition(
        {True: inject(make), False: optax.adam(SCHEDULE)}, TRAINED
    ),
    "masked": lambda make: optax.masked(inject(make), TRAINED),
}
SMALL = {"MultiSteps": 2}


def trained(tx, steps, state=None, first=0):
    state = tx.init(PARAMS) if state is None else state
    updates = None
    for i in range(first, first + steps):
        updates, state = tx.update(grads(i), state, PARAMS)
    return updates, state


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_next_update_is_that_of_optax(name):
    """In the same wrapper, and back; and in no wrapper but a schedule of its own."""
    wrap, small = WRAPPERS[name], SMALL.get(name, 1)
    theirs, ours = (wrap(make) for make in (optax.rmsprop, rmsprop))
    steps = UPDATES * small
    _, there = trained(theirs, steps)
    want, after = trained(theirs, small, there, steps)
    state = convert.from_optax(there, PARAMS, ours)
    found = filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours))
    assert [int(one.count) for one in found] == [UPDATES]
    got, ahead = trained(ours, small, state, steps)
    np.testing.assert_allclose(got["w"], want["w"], rtol=2e-6)
    if "also" in name:  # whose moments start anew
        return
    again = convert.to_optax(ahead, PARAMS, ours, theirs.init(PARAMS))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(again), jax.tree.leaves(after), strict=True
    ):
        if "hyperparams" not in str(path[-2:]) and "last_finite" not in str(path):
            np.testing.assert_allclose(a, b, rtol=2e-6, err_msg=str(path))


def test_what_is_around_a_state_counts_where_nothing_in_it_does():
    tx = optax.MultiSteps(optax.rmsprop(0.1), 2)
    _, there = trained(tx, 2 * UPDATES)
    assert int(convert.from_optax(there, PARAMS, rmsprop(SCHEDULE)).count) == UPDATES


def test_a_schedule_beside_a_state_goes_on():
    tx = optax.chain(scale_by_rms(), optax.scale_by_learning_rate(SCHEDULE))
    theirs = optax.rmsprop(SCHEDULE)
    _, there = trained(theirs, UPDATES)
    want, _ = trained(theirs, 1, there, UPDATES)
    got, _ = trained(tx, 1, convert.from_optax(there, PARAMS, tx), UPDATES)
    np.testing.assert_allclose(got["w"], want["w"], rtol=2e-6)


def test_counts_that_differ_are_named_and_may_be_given():
    theirs, ours = inject(functools.partial(optax.rmsprop, bias_correction=True)), rmsprop(0.1)
    _, there = trained(theirs, UPDATES)
    uneven = there._replace(count=jnp.asarray(9))
    bias = rmsprop(0.1, bias_correction=True)
    message = r"counts \[7, 9\]: pass steps.*'InjectStatefulHyperparamsState', 9.*Count.*, 7"
    with pytest.raises(ValueError, match=message):
        convert.from_optax(uneven, PARAMS, bias)
    assert_same(
        convert.from_optax(uneven, PARAMS, bias, steps=UPDATES),
        convert.from_optax(there, PARAMS, bias),
    )
    _, other = trained(optax.inject_hyperparams(optax.adam)(SCHEDULE), 3)
    _, plain = trained(optax.rmsprop(SCHEDULE), UPDATES)
    assert int(convert.from_optax((other, plain), PARAMS, ours).count) == UPDATES
