"""Master weights on eight devices: bit-identical to one device, placed like the parameters."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import assert_placed, assert_same, bytes_held, mesh_of, side_by_side, wait
from rmsprop_jax import low_memory, rmsprop, sharding

pytestmark = pytest.mark.usefixtures("default_promotion")  # for optax.apply_updates

BITS = (16, 24, 32)
SHAPES = {"kernel": (16, 8), "bias": (8,), "scale": (), "odd": (5, 8), "f": (16,)}
SPECS = {"kernel": P("x"), "bias": P("x"), "scale": P(), "odd": P(None, "x"), "f": P("x")}
RNG = np.random.default_rng(0)
PARAMS = {
    name: np.asarray(RNG.standard_normal(shape), jnp.float32 if name == "f" else jnp.bfloat16)
    for name, shape in SHAPES.items()
}
GRADS = jax.tree.map(lambda p: (np.float32(p) / 9).astype(p.dtype), PARAMS)
# Whatever a program fuses: a product with a half is exact.
EXACT = optax.chain(optax.trace(0.5), optax.scale(-0.5))
TXS = {f"{bits}": low_memory.master_weights(EXACT, bits) for bits in BITS}
RULES = {f"{bits}": low_memory.master_weights(rmsprop(0.1), bits) for bits in BITS}
each_axis_type = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)


def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def trained(txs, params, grads, **places):
    """Parameters and states after three steps."""
    tx, params, grads = side_by_side(txs), dict.fromkeys(txs, params), dict.fromkeys(txs, grads)
    state = wait(jax.jit(tx.init, **places))(params)
    update = wait(jax.jit(functools.partial(step, tx)))
    for _ in range(3):
        params, state = update(params, state, grads)
    return params, state


@functools.cache
def alone():
    params, state = trained(TXS, PARAMS, GRADS)
    assert all(np.any(params[name]["kernel"] != PARAMS["kernel"]) for name in TXS)
    return jax.device_get((params, state))


def shardings(mesh, specs=SPECS):
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


@each_axis_type
def test_sharded_parameters_are_trained_as_on_one_device(axis_type, subtests):
    """Each array of the state like its parameter, by state_sharding and from birth."""
    mesh = mesh_of(8, axis_type=axis_type)
    where = shardings(mesh)
    wanted = {name: sharding.state_sharding(tx, PARAMS, where) for name, tx in TXS.items()}
    params, grads = jax.device_put((PARAMS, GRADS), (where, where))
    got = trained(TXS, params, grads, out_shardings=wanted)
    assert_same(jax.device_get(got), alone())
    # Without a word, as it is born: that of our own RMSProp, which ties it to the parameters.
    with jax.set_mesh(mesh):
        born = wait(jax.jit(side_by_side(RULES).init))(dict.fromkeys(RULES, params))
    for name in TXS:
        with subtests.test(bits=name):
            assert_placed(got[0][name], where)
            assert_placed(got[1][name], wanted[name])
            assert_placed(born[name], sharding.state_sharding(RULES[name], PARAMS, where))
            eager = RULES[name].init(params)
            assert_placed(eager.inner_state.nu, where)
            if name != "16":
                assert_placed(
                    eager.corrections,
                    {n: where[n] for n in ("kernel", "bias", "odd")}
                    | {"scale": where["scale"], "f": optax.MaskedNode()},
                )


@each_axis_type
@pytest.mark.parametrize("where", ["around", "inside"])
def test_zero1(where, axis_type, subtests):
    """Around, corrections are split with the state; inside, every device has them whole."""
    mesh = mesh_of(8, axis_type=axis_type)
    everywhere = NamedSharding(mesh, P())
    if where == "around":
        txs = {name: sharding.zero1(tx, mesh, "x") for name, tx in TXS.items()}
    else:
        inner = sharding.zero1(EXACT, mesh, "x")
        txs = {f"{bits}": low_memory.master_weights(inner, bits) for bits in BITS}
    params, grads = jax.device_put((PARAMS, GRADS), everywhere)
    got = trained(txs, params, grads)
    assert_same(jax.device_get(got), alone())
    for name in txs:
        with subtests.test(bits=name):
            assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(got[0][name]))
            state = got[1][name]
            assert state.inner_state[0].trace["kernel"].sharding.shard_shape((16, 8)) == (2, 8)
            if where == "around":
                assert_placed(state, sharding.state_sharding(txs[name], PARAMS, everywhere))
            if where == "around" and name != "16":
                shards = state.corrections["kernel"].sharding.shard_shape((16, 8))
                assert shards == (2, 8)
                whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.corrections))
                held = bytes_held(state.corrections)
                assert max(held.values()) < whole / 3  # that of "scale" is not split


def mapped(txs, mesh):
    specs = {
        name: jax.tree.map(
            lambda place: place.spec, sharding.state_sharding(tx, PARAMS, NamedSharding(mesh, P()))
        )
        for name, tx in txs.items()
    }
    tx = side_by_side(txs)
    shard_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    init = shard_map(tx.init, in_specs=P(), out_specs=specs)
    update = shard_map(
        functools.partial(step, tx), in_specs=(P(), specs, P()), out_specs=(P(), specs)
    )
    return jax.jit(init), jax.jit(update)


def test_zero1_mapped_gathers_float32_updates():
    """The state and corrections are split, replicas stay equal; what is gathered has 4 bytes."""
    mesh = mesh_of(8)
    txs = {name: sharding.zero1_mapped(tx, "x") for name, tx in RULES.items()}
    init, update = mapped(txs, mesh)
    everywhere = NamedSharding(mesh, P())
    params = jax.device_put(dict.fromkeys(txs, PARAMS), everywhere)
    grads = jax.device_put(dict.fromkeys(txs, GRADS), everywhere)
    state = wait(init)(params)
    want = trained(RULES, PARAMS, GRADS)
    for _ in range(3):
        params, state = wait(update)(params, state, grads)
    for leaf in jax.tree.leaves(params):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all(np.array_equal(copies[0], copy) for copy in copies)
    assert state["24"].corrections["kernel"].sharding.shard_shape((16, 8)) == (2, 8)
    exact = low_memory.join_weights(params["32"], state["32"])
    plain = low_memory.join_weights(want[0]["32"], want[1]["32"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), exact, plain)
    text = update.lower(params, state, grads).as_text()
    gathers = [line for line in text.splitlines() if "stablehlo.all_gather" in line]
    assert len(gathers) == 3 * 4  # of all that eight devices can split
    assert all(re.search(r"-> tensor<[0-9x]+xf32>", line) for line in gathers)


@pytest.mark.parametrize("check_vma", [False, True])
def test_shards_of_shard_map_round_alike_and_as_each_would_alone(check_vma, subtests):
    mesh, part = mesh_of(8), jnp.asarray(RNG.standard_normal((2, 32)), jnp.bfloat16)
    tx, spec = side_by_side(TXS), P("x")
    params = jax.device_put(
        dict.fromkeys(TXS, np.broadcast_to(part, (8, 2, 32))), NamedSharding(mesh, spec)
    )
    specs = {
        name: optax.tree.map_params(
            one,
            lambda _: spec,
            jax.eval_shape(one.init, params[name]),
            transform_non_params=lambda _: P(),
        )
        for name, one in TXS.items()
    }
    shard_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    init = shard_map(tx.init, in_specs=(spec,), out_specs=specs)
    update = shard_map(
        functools.partial(step, tx), in_specs=(spec, specs, spec), out_specs=(spec, specs)
    )
    grads, one = params, dict.fromkeys(TXS, part[None])
    carry, of_one = (params, wait(jax.jit(init))(params)), (one, tx.init(one))
    for _ in range(3):
        carry = wait(jax.jit(update))(*carry, grads)
        of_one = jax.jit(functools.partial(step, tx))(*of_one, one)
    for got, want in zip(*map(jax.tree.leaves, (carry, of_one)), strict=True):
        np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape))


def test_replicas_of_pmap_stay_equal():
    tx = side_by_side(RULES)

    def advance(params, state, weight):
        grads = jax.tree.map(lambda g: jax.lax.pmean((weight * g).astype(g.dtype), "x"), GRADS)
        return step(tx, params, state, dict.fromkeys(RULES, grads))

    copies = jax.tree.map(lambda p: np.stack([p] * 8), dict.fromkeys(RULES, PARAMS))
    carry = copies, wait(jax.pmap(tx.init))(copies)
    for _ in range(3):
        carry = wait(jax.pmap(advance, axis_name="x"))(*carry, np.arange(1, 9, dtype=np.float32))
    for leaf in map(np.asarray, jax.tree.leaves(carry)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
    assert np.any(carry[0]["24"]["kernel"] != copies["24"]["kernel"])
