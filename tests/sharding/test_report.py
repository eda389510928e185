"""What sharding.report predicts, compared with what devices then hold."""

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import bytes_held, mesh_of, side_by_side, wait
from rmsprop_jax import low_memory, rmsprop, sharding

SHAPES = {"kernel": (16, 24), "conv": (3, 7, 8), "bias": (24,), "odd": (7,), "scalar": ()}
PARAMS = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
PARAMS["half"] = np.ones((7, 24), jnp.bfloat16)
TXS = {
    "momentum": rmsprop(0.1, momentum=0.9),
    "q8": rmsprop(0.1, centered=True, storage=low_memory.q8(min_size=0)),
    "wrapped": low_memory.master_weights(optax.chain(rmsprop(0.1), optax.trace(0.9))),
}


@pytest.mark.parametrize("n", [8, 6])
def test_bytes_are_those_that_devices_hold(n, subtests):
    mesh = mesh_of(n)
    everywhere = NamedSharding(mesh, P())
    split = sharding.fsdp_shardings(PARAMS, mesh, "x", min_size=0)
    ways = {
        "whole": (lambda tx: tx, everywhere),
        "fsdp": (lambda tx: tx, split),
        "zero1": (lambda tx: sharding.zero1(tx, mesh, "x"), everywhere),
        "zero1_mapped": (lambda tx: sharding.zero1_mapped(tx, "x"), everywhere),
    }
    inits, params, placed, reports = {}, {}, {}, {}
    for (way, (wrap, where)), (name, plain) in itertools.product(ways.items(), TXS.items()):
        case, tx = (way, name), wrap(plain)
        reports[case] = sharding.report(tx, PARAMS, where)
        params[case] = jax.device_put(PARAMS, where)
        placed[case] = sharding.state_sharding(tx, PARAMS, where)
        inits[case] = tx.init
        if way == "zero1_mapped":
            specs = jax.tree.map(lambda place: place.spec, placed[case])
            inits[case] = jax.shard_map(
                tx.init, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False
            )
    tx = optax.GradientTransformation(lambda p: {c: inits[c](p[c]) for c in inits}, None)
    states = wait(jax.jit(tx.init, out_shardings=placed))(params)
    for case, report in reports.items():
        with subtests.test(case):
            assert bytes_held(params[case]) == dict.fromkeys(mesh.devices.flat, report.params)
            assert bytes_held(states[case]) == dict.fromkeys(mesh.devices.flat, report.state)
            assert report.devices == n
            assert report.all_params == sum(p.nbytes for p in PARAMS.values())
            if case[0] == "whole":
                assert (report.all_params, report.all_state) == (report.params, report.state)
            left = {one.name for one in report.whole}
            assert left == {*PARAMS} if case[0] == "whole" else {"odd", "scalar"} <= left
    alone = side_by_side(TXS).init(dict.fromkeys(TXS, PARAMS))
    for name, state in alone.items():
        whole = sum(array.nbytes for array in jax.tree.leaves(state))
        assert {reports[way, name].all_state for way in ways} == {whole}


def test_what_is_whole_and_why():
    mesh = AbstractMesh((12,), ("x",))
    everywhere, tx = NamedSharding(mesh, P()), rmsprop(0.1, momentum=0.9)
    params = {
        "large": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16),
        "twelve": np.ones((5, 12)),
        "odd": np.ones((7, 11)),
        "scalar": 1.0,
    }
    reasons = {
        "large": f"has the sharding {P()}, and no axis that 12 devices divide",
        "twelve": f"has the sharding {P()}",
        "odd": f"has the sharding {P()}, and no axis that 12 devices divide",
        "scalar": "is a scalar",
    }
    found = sharding.report(tx, params, everywhere).whole
    assert {one.name: one.reason for one in found} == reasons
    assert [one.name for one in found] == ["large", "odd", "twelve", "scalar"]  # by their bytes
    assert found[0].state_bytes == 2 * 4 * 4096**2
    assert found[0].shape == (4096, 4096)
    report = sharding.report(sharding.zero1(tx, mesh, "x"), params, everywhere)
    assert [one.name for one in report.whole] == ["odd", "scalar"]
    why = "has no axis that 12 devices divide, and fewer than 128 elements"
    assert report.whole[0].reason == why
    assert f"{report.state:,}" in str(report)
    assert str(report).splitlines()[-1].endswith("is a scalar")


def test_on_one_device_nothing_is_whole_and_nothing_counts_twice():
    report = sharding.report(TXS["momentum"], PARAMS, NamedSharding(mesh_of(1), P()))
    assert report.whole == ()
    assert (report.params, report.state) == (report.all_params, report.all_state)


@pytest.mark.filterwarnings("ignore:.*has no attribute")
def test_what_belongs_to_no_parameter_is_listed():
    pairs = optax.LookaheadParams.init_synced({"w": np.ones((16, 8))})
    tx = optax.lookahead(rmsprop(0.1), 3, 0.5)
    (one,) = sharding.report(tx, pairs, NamedSharding(mesh_of(8), P("x"))).whole
    assert one.name == "fast_state/nu/w"
    assert one.reason.startswith("belongs to no parameter")


def test_what_is_refused_is_what_state_sharding_refuses():
    everywhere = NamedSharding(mesh_of(8), P())
    with pytest.raises(TypeError, match="tx must be a gradient transformation, got 1"):
        sharding.report(1, PARAMS, everywhere)
    with pytest.raises(ValueError, match="'odd' has the shape"):
        sharding.report(TXS["momentum"], {"odd": PARAMS["odd"]}, NamedSharding(mesh_of(8), P("x")))
