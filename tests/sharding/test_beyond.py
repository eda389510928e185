"""Transformations that combine elements see whole arrays in zero1_mapped, or are refused."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import mesh_of, side_by_side
from rmsprop_jax import low_memory, rmsprop, sharding

DEVICES, STEPS, WRONG = 8, 20, 5
RNG = np.random.default_rng(0)
PARAMS = {"split": np.ones((16, 4), np.float32), "whole": np.ones(3, np.float32)}
# Of each device; one number of one device is wrong in the third step and the fourth.
GRADS = {
    name: RNG.standard_normal((STEPS, DEVICES, *x.shape)).astype(np.float32)
    for name, x in PARAMS.items()
}
RULE = rmsprop(0.1, momentum=0.9)
DECIDING = {
    "apply_if_finite": optax.apply_if_finite(RULE, 5),
    "apply_if_finite, accepted in the end": optax.apply_if_finite(RULE, 1),
    "MultiSteps": optax.MultiSteps(
        RULE, 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "master weights": low_memory.master_weights(optax.apply_if_finite(RULE, 5)),
    "masked": optax.masked(optax.apply_if_finite(RULE, 5), {"split": True, "whole": False}),
    "inside a chain": optax.chain(optax.clip(1.0), optax.apply_if_finite(RULE, 5)),
}
OF_EACH_NUMBER = {
    "plain": rmsprop(0.1),
    "centered": optax.chain(optax.clip(2.0), rmsprop(0.1, centered=True), optax.ema(0.5)),
    "MultiSteps, all steps": optax.MultiSteps(RULE, 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(rmsprop)(0.1, momentum=0.9),
}
ALL = DECIDING | OF_EACH_NUMBER
AROUND = {  # of what is in zero1_mapped, on gradients of which the mean was taken
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "clip_by_global_norm": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "both": lambda tx: optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), tx), 5),
}
NAMES = [*ALL, *(f"{name} around" for name in AROUND)]
ALONE = side_by_side(ALL | {f"{name} around": around(RULE) for name, around in AROUND.items()})


def averaged(tx):
    def update(grads, state, params=None):
        return tx.update(jax.lax.pmean(grads, "x"), state, params)

    return optax.GradientTransformation(tx.init, update)


def mapped():
    """All of these, for the devices of the axis x."""
    zero = {name: sharding.zero1_mapped(tx, "x") for name, tx in ALL.items()}
    rule = sharding.zero1_mapped(RULE, "x")
    around = {f"{name} around": averaged(around(rule)) for name, around in AROUND.items()}
    return side_by_side(zero | around)


def gradients(wrong):
    grads = {name: g.copy() for name, g in GRADS.items()}
    grads["split"][2:4, WRONG, 7, 1] = wrong
    return grads


def scanned(update):
    """The parameters after all steps."""

    def run(params, state, grads):
        def step(carry, grads):
            params, state = carry
            updates, state = update(dict.fromkeys(NAMES, grads), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, state), grads)
        return params, state

    return run


def in_pmap(grads):
    tx = mapped()

    def train(grads):
        params = dict.fromkeys(NAMES, PARAMS)
        return scanned(tx.update)(params, tx.init(params), grads)[0]

    grads = jax.tree.map(lambda g: np.swapaxes(g, 0, 1), grads)
    return jax.device_get(jax.pmap(train, axis_name="x")(grads))


def in_shard_map(grads):
    mesh = mesh_of(DEVICES)
    tx = mapped()

    def train(grads):
        params = dict.fromkeys(NAMES, PARAMS)
        mine = jax.tree.map(lambda g: g[:, 0], grads)
        params, _ = scanned(tx.update)(params, tx.init(params), mine)
        return jax.tree.map(lambda x: x[None], params)

    one = jax.shard_map(train, mesh=mesh, in_specs=P(None, "x"), out_specs=P("x"), check_vma=False)
    grads = jax.device_put(grads, NamedSharding(mesh, P(None, "x")))
    return jax.device_get(jax.jit(one)(grads))


@pytest.mark.parametrize("mode", [in_pmap, in_shard_map], ids=["pmap", "shard_map"])
def test_replicas_are_equal_and_go_the_way_of_one_device(mode, subtests):
    """Bit for bit equal, and to rounding where one device takes the mean; NaN where it has NaN."""
    for wrong in (np.nan, np.inf, 1e20):
        grads = gradients(np.float32(wrong))
        params = dict.fromkeys(NAMES, PARAMS)
        mean = jax.tree.map(lambda g: g.mean(axis=1), grads)
        with jax.numpy_dtype_promotion("standard"):
            want, _ = jax.jit(scanned(ALONE.update))(params, ALONE.init(params), mean)
            found = mode(grads)
        for name in NAMES:
            with subtests.test(name=name, wrong=wrong):
                for leaf in PARAMS:
                    each = found[name][leaf]
                    assert each.shape == (DEVICES, *PARAMS[leaf].shape)
                    np.testing.assert_array_equal(each, np.broadcast_to(each[:1], each.shape))
                    np.testing.assert_allclose(each[0], want[name][leaf], 2e-5, 1e-5)
                skips = name in DECIDING or name in ("apply_if_finite around", "both around")
                skips = skips and "accepted" not in name and wrong != 1e20
                assert np.isfinite(found[name]["split"]).all() or not skips


REFUSED = {
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), RULE),
    "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.1), RULE),
    "scale_by_trust_ratio": optax.chain(RULE, optax.scale_by_trust_ratio()),
    "clip_by_block_rms": optax.chain(optax.clip_by_block_rms(1.0), RULE),
    "normalize_by_update_norm": optax.chain(optax.normalize_by_update_norm(), RULE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_norms_and_means_are_refused(name):
    tx = sharding.zero1_mapped(REFUSED[name], "x")

    def step(params):
        return tx.update(params, tx.init(params), params)[0]

    params = jax.tree.map(lambda x: np.broadcast_to(x, (DEVICES, *x.shape)), PARAMS)
    with pytest.raises(ValueError, match=r"^tx must treat each element by itself.*a reduce_sum"):
        jax.eval_shape(jax.pmap(step, axis_name="x"), params)
    # Where no leaf is split, all see the whole.
    jax.eval_shape(jax.pmap(step, axis_name="x"), {"whole": params["whole"]})


def test_a_decision_inside_a_branch_is_refused():
    """There devices may take different branches, and would wait for each other."""

    def update(grads, state, params=None):
        def scaled(grads):
            finite = jnp.all(jnp.isfinite(grads["split"]))
            return jax.tree.map(lambda g: jnp.where(finite, g, jnp.zeros_like(g)), grads)

        return jax.lax.cond(state > 0, scaled, lambda grads: grads, grads), state + 1

    branching = optax.GradientTransformation(lambda _: jnp.zeros([], jnp.int32), update)
    tx = sharding.zero1_mapped(optax.chain(branching, RULE), "x")

    def step(params):
        return tx.update(params, tx.init(params))[0]

    params = jax.tree.map(lambda x: np.broadcast_to(x, (DEVICES, *x.shape)), PARAMS)
    with pytest.raises(ValueError, match=r"^tx must treat each element.*reduce_and"):
        jax.eval_shape(jax.pmap(step, axis_name="x"), params)


def test_a_mean_of_float16_does_not_overflow():
    """Of 8 gradients of 1e4, whose sum float16 has not; split and whole.

    The sum is rounded to 2^-11 a few times, and squared.
    """
    tx = sharding.zero1_mapped(rmsprop(1.0), "x")
    grads = jax.tree.map(lambda x: np.full((DEVICES, *x.shape), 1e4, np.float16), PARAMS)
    held = jax.pmap(lambda g: tx.update(g, tx.init(g))[1].nu, axis_name="x")(grads)
    for nu in jax.tree.leaves(held):
        np.testing.assert_allclose(nu, 0.1 * 1e8, rtol=2**-8)
