"""Programs for TPUs, compiled without a TPU by libtpu, if it is installed."""

import collections
import os
import re

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from rmsprop_jax import low_memory, rmsprop, sharding

pytest.importorskip("libtpu")

N = 8
SHAPE = (16384, 4096)  # 256 MiB: more than the chip has beside its main memory
LEAF = 4 * SHAPE[0] * SHAPE[1]
W = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
FORMS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "centered": {"centered": True, "momentum": 0.9},
    "weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True, "bias_correction": True},
}
STORAGES = {
    "float32": None,
    "bfloat16": low_memory.bfloat16(),
    "q8": low_memory.q8(),
}
# Fused with the slice of each device, an all-reduce is a reduce-scatter.
COLLECTIVE = re.compile(
    r"^ *(?:ROOT )?%[\w.-]+ = .* "
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
    re.M,
)
FUSED = re.compile(r"calls=%all-reduce-scatter")


@pytest.fixture(scope="module")
def devices():
    """Eight chips of a TPU v5e that is described, not there."""
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    return np.array(topologies.get_topology_desc("v5e:2x4", "tpu").devices)


def loss(w, x):
    return jnp.mean((x @ w) ** 2)


def step_of(tx):
    def step(w, state, x):
        updates, state = tx.update(jax.grad(loss)(w, x), state, w)
        return optax.apply_updates(w, updates), state

    return step


def structs(arrays, places):
    def struct(array, place):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

    return jax.tree.map(struct, arrays, places)


def compiled(step, mesh, spec, tx, placed, w=W):
    """The step of parameters of a spec, a state so placed, and data along x."""
    state = structs(jax.eval_shape(tx.init, w), placed)
    w = structs(w, NamedSharding(mesh, spec))
    x = jax.ShapeDtypeStruct((64, w.shape[0]), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(w.sharding, placed))
    return step.lower(w, state, x).compile()


def collectives(program):
    """How many of each kind."""
    text = program.as_text()
    found = collections.Counter(COLLECTIVE.findall(text))
    found["reduce-scatter"] += len(FUSED.findall(text))
    found["all-reduce"] -= len(FUSED.findall(text))
    return dict(+found)


def temporary(program):
    """The memory that it needs beside its arguments and results, in leaves."""
    return program.memory_analysis().temp_size_in_bytes / LEAF


# Three leaves, on one chip or each split over eight in one of two ways.
SPECS = {"a": P("x"), "b": P(None, "x"), "c": P("x")}
MESHES = [(1, AxisType.Auto), (N, AxisType.Auto), (N, AxisType.Explicit)]


@pytest.mark.parametrize(("chips", "axis_type"), MESHES, ids=lambda v: getattr(v, "name", str(v)))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("storage", STORAGES)
def test_an_update_needs_no_memory_to_speak_of(devices, storage, form, chips, axis_type):
    """Beside that of its arguments; in 8 bits the chips agree on the largest codes.

    That takes one all-reduce for all second moments, and two for momentum, which has signs.
    """
    mesh = Mesh(devices[:chips], ("x",), axis_types=(axis_type,))
    tx = rmsprop(0.1, **FORMS[form], storage=STORAGES[storage])
    params = dict.fromkeys(SPECS, W)
    places = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    w, placed = structs(params, places), sharding.state_sharding(tx, params, places)
    state = structs(jax.eval_shape(tx.init, params), placed)

    def update(grads, state, w):
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    program = jax.jit(update, donate_argnums=(1, 2)).lower(w, state, w).compile()
    wanted = {}
    if storage == "q8" and chips > 1:
        wanted["all-reduce"] = 3 if "momentum" in FORMS[form] else 1
    assert collectives(program) == wanted
    # In one program XLA copies the codes of one leaf.
    copied = 1 / len(SPECS) if (storage, form, chips) == ("q8", "plain", 1) else 0
    most = {"float32": 0, "bfloat16": 0.015, "q8": 0.17}[storage] + copied  # bytes a number
    numbers = len(SPECS) * SHAPE[0] * SHAPE[1] / chips
    assert program.memory_analysis().temp_size_in_bytes <= most * numbers


# XLA pipes the gradients' reduction into the product they come from, from device to device.
PIPED = {"collective-permute": 1}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("axis_type", "more", "leaves"), [(AxisType.Auto, PIPED, 1), (AxisType.Explicit, {}, 2)]
)
def test_zero1(devices, form, axis_type, more, leaves):
    """A reduce-scatter and an all-gather; the gradient or the update whole, or both."""
    mesh = Mesh(devices, ("x",), axis_types=(axis_type,))
    plain = rmsprop(0.1, **FORMS[form])
    tx = sharding.zero1(plain, mesh, "x")
    placed = sharding.state_sharding(tx, W, NamedSharding(mesh, P()))
    program = compiled(step_of(tx), mesh, P(), plain, placed)
    assert collectives(program) == {"reduce-scatter": 1, "all-gather": 1, **more}
    assert temporary(program) <= leaves + 0.01


@pytest.mark.parametrize("form", FORMS)
def test_zero1_mapped(devices, form):
    mesh = Mesh(devices, ("x",), axis_types=(AxisType.Auto,))
    plain = rmsprop(0.1, **FORMS[form])
    tx = sharding.zero1_mapped(plain, "x")
    placed = sharding.state_sharding(tx, W, NamedSharding(mesh, P()))
    specs = jax.tree.map(lambda place: place.spec, placed)
    step = jax.shard_map(
        step_of(tx),
        mesh=mesh,
        in_specs=(P(), specs, P("x")),
        out_specs=(P(), specs),
        check_vma=False,
    )
    program = compiled(step, mesh, P(), plain, placed)
    assert collectives(program) == {"reduce-scatter": 1, "all-gather": 1, **PIPED}
    assert temporary(program) <= 1.01


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_zero1_where_the_state_is_filled_up(devices, is_mapped, axis_type):
    """Under jit gradients are then reduced whole: no reduce-scatter has parts of several sizes."""
    mesh = Mesh(devices, ("x",), axis_types=(axis_type,))
    everywhere, plain = NamedSharding(mesh, P()), rmsprop(0.1, momentum=0.9)
    w = jax.ShapeDtypeStruct((SHAPE[0] - 4, SHAPE[1] - 1), jnp.float32)
    of_jit = sharding.zero1(plain, mesh, "x")
    tx = sharding.zero1_mapped(plain, "x") if is_mapped else of_jit
    placed, step = sharding.state_sharding(tx, w, everywhere), step_of(tx)
    if is_mapped:
        specs = jax.tree.map(lambda place: place.spec, placed)
        in_specs, out_specs = (P(), specs, P("x")), (P(), specs)
        step = jax.shard_map(
            step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
    program = compiled(step, mesh, P(), of_jit, placed, w)
    found = collectives(program)
    assert found.pop("all-gather") == 1
    found.pop("collective-permute", None)
    assert found == {"reduce-scatter" if is_mapped else "all-reduce": 1}
    assert temporary(program) <= 2.01


def test_fully_sharded(devices):
    mesh = Mesh(devices, ("x",), axis_types=(AxisType.Auto,))
    tx = rmsprop(0.1, momentum=0.9)
    placed = sharding.state_sharding(tx, W, NamedSharding(mesh, P("x")))
    program = compiled(step_of(tx), mesh, P("x"), tx, placed)
    assert collectives(program) == {"reduce-scatter": 1, "all-gather": 1, **PIPED}
    assert temporary(program) <= 1.01


def test_data_parallel(devices):
    mesh = Mesh(devices, ("x",), axis_types=(AxisType.Auto,))
    tx = rmsprop(0.1, momentum=0.9)
    placed = sharding.state_sharding(tx, W, NamedSharding(mesh, P()))
    program = compiled(step_of(tx), mesh, P(), tx, placed)
    assert collectives(program) == {"all-reduce": 1}
    assert temporary(program) <= 1.01
