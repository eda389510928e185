"""Where zero1 may be called: on Explicit meshes, inside shard_map, under a mesh that is set."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from optax import contrib
import pytest

from helpers import mesh_of, side_by_side, wait
from rmsprop_jax import low_memory, rmsprop, sharding

KINDS = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)
RNG = np.random.default_rng(0)
PARAMS = {
    "w": RNG.uniform(0.5, 1.5, (16, 24)).astype(np.float32),
    "b": RNG.uniform(0.5, 1.5, 24).astype(np.float32),
    "filled up": RNG.uniform(0.5, 1.5, (15, 13)).astype(np.float32),
    "small": RNG.uniform(0.5, 1.5, 3).astype(np.float32),
}
OTHERS = {  # most of which look at whole arrays
    "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.1), rmsprop(0.1)),
    "clip_by_block_rms": optax.chain(optax.clip_by_block_rms(1.0), rmsprop(0.1)),
    "centralize": optax.chain(optax.centralize(), rmsprop(0.1)),
    "trust ratio": optax.chain(rmsprop(0.01), optax.scale_by_trust_ratio(0.1)),
    "master weights": low_memory.master_weights(rmsprop(0.1)),
    "adam": optax.adam(0.1),
    "adafactor": optax.adafactor(0.1, 8),
    "lamb": optax.lamb(0.1),
    "muon": contrib.muon(0.1),
    "prodigy": contrib.prodigy(1.0),
    "mechanize": contrib.mechanize(rmsprop(0.1), 0.01),
    "dadapt": contrib.dadapt_adamw(1.0),
}


@pytest.mark.usefixtures("default_promotion")  # of optax's own
@pytest.mark.filterwarnings("ignore:.*shapes of parameters:UserWarning")  # muon's masks
def test_explicit_meshes_take_what_looks_at_whole_arrays(subtests):
    """Without zero1, several of these need a mesh that is set, and some are refused."""
    mesh = mesh_of(8, axis_type=AxisType.Explicit)

    def train(txs, params):
        tx, params = side_by_side(txs), dict.fromkeys(txs, params)
        state, update = wait(jax.jit(tx.init))(params), wait(jax.jit(tx.update))
        for _ in range(3):
            updates, state = update(jax.tree.map(np.cos, params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    want = train(OTHERS, PARAMS)
    zero = {name: sharding.zero1(tx, mesh, "x") for name, tx in OTHERS.items()}
    got = train(zero, jax.device_put(PARAMS, NamedSharding(mesh, P())))
    for name in OTHERS:
        for leaf in PARAMS:
            with subtests.test(name=name, leaf=leaf):
                assert not np.array_equal(want[name][leaf], PARAMS[leaf])
                np.testing.assert_allclose(got[name][leaf], want[name][leaf], 1e-5, 1e-6)


def test_outside_jit_an_explicit_mesh_refuses_some_and_jit_is_named():
    mesh = mesh_of(8, axis_type=AxisType.Explicit)
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    tx = sharding.zero1(OTHERS["adaptive_grad_clip"], mesh, "x")
    with pytest.raises(Exception, match="must be scalar or have the same sharding") as caught:
        tx.update(params, tx.init(params), params)
    assert "On a mesh with Explicit axes, call zero1 inside jax.jit." in caught.value.__notes__


@KINDS
def test_zero1_is_not_for_shard_map_over_its_axis(kind):
    mesh = mesh_of(8, axis_type=kind)
    params = jax.device_put({"w": jnp.ones((16, 24))}, NamedSharding(mesh, P()))
    tx = sharding.zero1(rmsprop(0.1), mesh, "x")
    state = wait(jax.jit(tx.init))(params)
    message = r"zero1 must not split over \('x',\) inside jax.shard_map .*: use zero1_mapped there"
    for f, args in ((tx.init, (params,)), (tx.update, (params, state))):
        specs = jax.tree.map(lambda x: x.sharding.spec, args)
        mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        with pytest.raises(ValueError, match=message):
            jax.jit(mapped)(*args)


@KINDS
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eagerly"])
def test_zero1_is_for_the_mesh_it_was_made_for(kind, jit):
    mesh = mesh_of(8, axis_type=kind)
    params = jax.device_put({"w": jnp.ones((16, 24))}, NamedSharding(mesh, P()))
    tx = sharding.zero1(rmsprop(0.1), mesh, "x")
    state = wait(jit(tx.init))(params)
    other_kind = AxisType.Explicit if kind is AxisType.Auto else AxisType.Auto
    others = ((4,), kind), ((4, 2), kind), ((8,), other_kind)
    for other in (mesh_of(*shape, axis_type=type_) for shape, type_ in others):
        message = rf"made for the mesh 'x' of 8 \({kind.name}\), and must .* got 'x' of [48] "
        with jax.set_mesh(other):
            with pytest.raises(ValueError, match=message):
                jit(tx.init)(params)
            with pytest.raises(ValueError, match=message):
                jit(tx.update)(params, state)
    with jax.set_mesh(mesh):
        updates, _ = wait(jit(tx.update))(params, wait(jit(tx.init))(params))
    np.testing.assert_allclose(updates["w"], -0.1 / np.sqrt(0.1), 1e-6)
