"""zero1 and zero1_mapped around, inside and beside other transformations."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import assert_moved, assert_placed, mesh_of, side_by_side, wait
from rmsprop_jax import describe, rmsprop, sharding
from sharded_params import PARAMS, RMS, WRAPPED, where

MESH = mesh_of(8)
ALL = NamedSharding(MESH, P())
ZERO = sharding.zero1(rmsprop(0.1), MESH, "x")


@functools.cache
def without_mesh():
    """Updates and states of all that is wrapped after three steps on one device."""
    tx = side_by_side({name: make() for name, make in WRAPPED.items()})
    params = dict.fromkeys(WRAPPED, PARAMS)
    grads, update = jax.tree.map(np.cos, params), jax.jit(tx.update)
    state = jax.jit(tx.init)(params)
    for _ in range(3):
        updates, state = update(grads, state, params)
    assert_moved(state)
    return updates, state


@pytest.mark.usefixtures("default_promotion")  # of optax's own
@pytest.mark.parametrize(
    ("axis_type", "names"),
    [
        (AxisType.Auto, list(WRAPPED)),
        (AxisType.Explicit, ["alone", "chain"]),
        pytest.param(AxisType.Explicit, [*{*WRAPPED} - {"alone", "chain"}], marks=pytest.mark.slow),
    ],
    ids=["Auto", "Explicit", "Explicit, others"],
)
def test_zero1_around_wrappers(axis_type, names, subtests):
    """The same bits, for gradients that every device has, in the places of state_sharding."""
    mesh = mesh_of(8, axis_type=axis_type)
    everywhere = NamedSharding(mesh, P())
    txs = {name: sharding.zero1(WRAPPED[name](), mesh, "x") for name in names}
    wanted = {name: sharding.state_sharding(tx, PARAMS, everywhere) for name, tx in txs.items()}
    params = jax.device_put(dict.fromkeys(names, PARAMS), everywhere)
    grads = jax.device_put(jax.tree.map(np.cos, dict.fromkeys(names, PARAMS)), everywhere)
    tx = side_by_side(txs)
    state, update = wait(jax.jit(tx.init))(params), wait(jax.jit(tx.update))
    for step in range(3):
        updates, state = update(grads, state, params)
        for name in names:
            with subtests.test(name=name, step=step):
                assert_placed(state[name], wanted[name])
                assert_placed(updates[name], jax.tree.map(lambda _: everywhere, updates[name]))
    for name in names:
        with subtests.test(name=name):
            plain = sharding.state_sharding(WRAPPED[name](), PARAMS, where(mesh))
            assert wanted[name] == plain
            got, want = (updates[name], state[name]), tuple(tree[name] for tree in without_mesh())
            assert jax.tree.structure(got) == jax.tree.structure(want)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                    np.testing.assert_allclose(a, b, 1e-6, 1e-6)


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)
def test_flax_nnx_with_zero1(axis_type):
    mesh = mesh_of(8, axis_type=axis_type)
    everywhere = NamedSharding(mesh, P())
    tx = sharding.zero1(rmsprop(0.1, momentum=0.9), mesh, "x")
    with jax.set_mesh(mesh):
        model = nnx.Linear(8, 24, rngs=nnx.Rngs(0))
        nnx.update(model, jax.device_put(nnx.state(model), everywhere))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
            optimizer.update(model, grads)

        x = jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh, P("x")))
        for _ in range(2):
            step(model, optimizer, x)
            jax.block_until_ready(nnx.state(optimizer))
    slots = [nnx.to_pure_dict(s) for s in (optimizer.opt_state.nu, optimizer.opt_state.trace)]
    assert all(np.any(value) for slot in slots for value in slot.values())
    specs = [
        {name: value.sharding.shard_shape(value.shape) for name, value in slot.items()}
        for slot in slots
    ]
    assert specs == [{"kernel": (1, 24), "bias": (3,)}] * 2
    assert all(p.is_fully_replicated for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_zero1_of_one_device_and_of_no_parameters():
    mesh = mesh_of(1)
    tx = sharding.zero1(rmsprop(0.1), mesh, "x")
    updates, _ = tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))
    np.testing.assert_allclose(updates["w"], -0.1 / np.sqrt(0.1), 1e-6)
    assert tx.update({}, tx.init({}))[0] == {}


def test_zero1_inside_a_chain():
    mesh = mesh_of(8)
    everywhere = NamedSharding(mesh, P())
    inner = sharding.zero1(rmsprop(0.1), mesh, "x")
    tx = optax.chain(optax.clip_by_global_norm(1.0), inner, optax.scale(0.5))
    plain = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(0.1), optax.scale(0.5))
    params = jax.device_put(PARAMS, everywhere)
    state = wait(jax.jit(tx.init))(params)
    updates, state = wait(jax.jit(tx.update))(params, state)
    want, of_one = jax.jit(plain.update)(PARAMS, plain.init(jax.tree.map(jnp.asarray, PARAMS)))
    assert_moved(of_one)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, 1e-6)
    assert_placed(state[1].nu, where(mesh))
    assert describe(tx) == describe(plain)


@pytest.mark.parametrize("jit", [False, True])
def test_zero1_leaves_a_parameter_out(jit, subtests):
    """A gradient of None keeps its state where and as it is."""
    params, tx = jax.device_put(PARAMS, ALL), sharding.zero1(RMS(), MESH, "x")
    _, state = wait(jax.jit(tx.update))(params, wait(tx.init)(params))
    grads = {**params, "a": {"kernel": None, "bias": params["a"]["bias"]}}

    def both(grads, state, params):
        return tx.update(grads, state, params), tx.update(grads, state)

    found = wait(jax.jit(both) if jit else both)(grads, state, params)
    for with_params, (updates, new) in zip((True, False), found, strict=True):
        with subtests.test(with_params=with_params):
            assert updates["a"]["kernel"] is None
            for old, now in ((state.nu, new.nu), (state.mu, new.mu), (state.trace, new.trace)):
                assert_placed(now, where(MESH))
                np.testing.assert_array_equal(old["a"]["kernel"], now["a"]["kernel"])
                assert np.any(np.asarray(old["kernel"]) != now["kernel"])


def test_zero1_mapped_leaves_a_parameter_out():
    tx = sharding.zero1_mapped(RMS(), "x")
    params = {"used": jnp.ones((8, 16)), "unused": jnp.ones((8, 16))}
    state = wait(jax.pmap(tx.init, axis_name="x"))(params)
    update = jax.pmap(lambda g, s: tx.update({"used": g, "unused": None}, s), axis_name="x")
    updates, new = wait(update)(params["used"], state)
    assert updates["unused"] is None
    np.testing.assert_array_equal(state.nu["unused"], new.nu["unused"])
    assert np.all(np.asarray(new.nu["used"]) != state.nu["used"])


DTYPES = ["bfloat16", "float16", "complex64"]


@pytest.mark.parametrize("mapped", [False, True])
def test_zero1_of_other_dtypes(mapped, subtests):
    """Updates keep the dtype of the gradients; the state is in float32 all the same."""
    plain = RMS()
    params = {dtype: np.arange(1, 33).astype(jnp.dtype(dtype)) for dtype in DTYPES}
    want, want_state = jax.jit(plain.update)(params, jax.jit(plain.init)(params))
    assert_moved(want_state)
    if mapped:
        tx = sharding.zero1_mapped(plain, "x")
        copies = jax.tree.map(lambda p: np.stack([p] * 8), params)
        state = wait(jax.pmap(tx.init, axis_name="x"))(copies)
        updates, got = wait(jax.pmap(tx.update, axis_name="x"))(copies, state)
        updates, got = jax.device_get((updates, got))
        updates, got = jax.tree.map(lambda u: u[3], updates), jax.tree.map(np.ravel, got)
        got = got._replace(count=got.count[0])
    else:
        tx = sharding.zero1(plain, MESH, "x")
        params = jax.device_put(params, ALL)
        updates, got = wait(jax.jit(tx.update))(params, wait(jax.jit(tx.init))(params))
    for dtype in DTYPES:
        with subtests.test(dtype=dtype):
            assert updates[dtype].dtype == want[dtype].dtype == dtype
            np.testing.assert_allclose(updates[dtype], want[dtype], 1e-6)
            for name in ("nu", "mu", "trace"):
                a, b = getattr(got, name)[dtype], getattr(want_state, name)[dtype]
                assert a.dtype == b.dtype
                np.testing.assert_allclose(a, b, 1e-6)
    assert got.count == want_state.count


def test_a_forgotten_pmean_cannot_be_noticed():
    """As the README warns: each device goes its own way, without an error."""
    tx = rmsprop(0.1)
    update = wait(jax.pmap(lambda scale, state: tx.update(scale * jnp.arange(4.0), state)))
    state = wait(jax.pmap(tx.init))(jnp.ones((8, 4)))
    _, state = update(jnp.arange(1.0, 9.0), state)
    assert len(np.unique(np.asarray(state.nu), axis=0)) == 8


def test_check_vma_is_refused_where_gradients_would_be_summed_twice():
    mesh, tx = mesh_of(8), sharding.zero1_mapped(rmsprop(0.1), "x")
    params = jnp.ones(16)
    specs = jax.tree.map(
        lambda place: place.spec, sharding.state_sharding(tx, params, NamedSharding(mesh, P()))
    )
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)
    state = wait(jax.jit(init))(params)
    update = jax.shard_map(tx.update, mesh=mesh, in_specs=(P(), specs), out_specs=(P("x"), specs))
    with pytest.raises(ValueError, match=r"needs jax.shard_map\(..., check_vma=False\)"):
        jax.jit(update)(params, state)


def test_an_axis_that_is_not_mapped_is_named_by_jax():
    tx = sharding.zero1_mapped(rmsprop(0.1), "rows")
    with pytest.raises(NameError, match="unbound axis name: rows"):
        tx.init(jnp.ones(8))


@pytest.mark.parametrize(
    ("wrap", "with_params"),
    [
        (optax.flatten, False),
        (optax.flatten, True),
        (lambda tx: optax.chain(tx, optax.adafactor(0.1, 4)), True),
    ],
)
def test_what_belongs_to_no_parameter_stays_everywhere(wrap, with_params):
    """So that a step takes what it has made: the second needs no program of its own."""
    tx = sharding.zero1(wrap(rmsprop(0.1)), MESH, "x")
    params = jax.device_put({"a": jnp.ones((16, 8)), "b": jnp.ones(8)}, ALL)
    state = wait(jax.jit(tx.init))(params)
    given = (params,) if with_params else ()
    program = jax.jit(tx.update).lower(params, state, *given).compile()
    for _ in range(2):
        _, state = wait(program)(params, state, *given)
    assert jax.tree.leaves(state)[0] == 2  # the count of steps


@pytest.mark.usefixtures("default_promotion")  # of optax's own
def test_extra_arguments_reach_those_who_take_them_and_no_others():
    tx = optax.chain(
        sharding.zero1(optax.scale_by_adam(), MESH, "x"), optax.contrib.reduce_on_plateau()
    )
    params = jax.device_put({"w": jnp.ones(8)}, ALL)
    tx.update(params, tx.init(params), params, value=1.0)
    inside = optax.chain(rmsprop(0.1), optax.contrib.reduce_on_plateau(patience=1))
    tx = sharding.zero1(inside, MESH, "x")
    _, state = tx.update(params, tx.init(params), params, value=jnp.array(1.0))
    assert state[1].best_value == 1.0
    tx = sharding.zero1(optax.MultiSteps(inside, 1), MESH, "x")
    _, state = tx.update(params, tx.init(params), params, value=jnp.array(1.0))
    assert state.inner_opt_state[1].best_value == 1.0


def test_shardings_of_zero1_may_be_spelled_in_other_ways():
    for spec in (P(), P(None), P(None, None)):
        placed = sharding.state_sharding(ZERO, jnp.ones((16, 4)), NamedSharding(MESH, spec))
        assert placed.nu.spec == P("x")


def test_empty_arrays_are_not_split():
    params = jax.device_put({"w": jnp.ones((0, 8))}, ALL)
    state = wait(jax.jit(ZERO.init))(params)
    assert_placed(state, sharding.state_sharding(ZERO, params, ALL))
