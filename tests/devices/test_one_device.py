"""States traced on one device, in a separate process because other tests have eight."""

import os
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).parents[2]
PROGRAM = """
import contextlib
import itertools

import jax
from jax import export, lax
from jax.extend.core import Var
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rmsprop_jax import low_memory, rmsprop

PARAMS = {
    "nan": jnp.full((4, 64), jnp.nan),
    "half": jnp.ones((8, 2), jnp.bfloat16),
    "complex": jnp.ones(4, jnp.complex64),
}
STORAGES = [None, low_memory.bfloat16(), low_memory.q8(min_size=1)]
FORM = {"initial_scale": 0.5, "centered": True, "momentum": 0.9}
TXS = [rmsprop(0.1, **FORM, storage=storage) for storage in STORAGES]


def init(params):
    return [tx.init(params) for tx in TXS]


def update(grads, states):
    return [tx.update(grads, state)[1] for tx, state in zip(TXS, states, strict=True)]


def train(params):
    # A loop takes a state only if its types are those of the next one.
    return lax.scan(lambda states, _: (update(params, states), None), init(params), None, 2)[0]


def stacked(tree):
    return jax.tree.map(lambda x: x[None], tree)


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def bits(tree):
    return [(x.dtype, x.weak_type, x.shape, x.tobytes()) for x in jax.tree.leaves(tree)]


assert jax.device_count() == 1

# As in other optimizers: what depends on them waits for them, and XLA orders it otherwise.
program = jax.make_jaxpr(init)(PARAMS).jaxpr
read = {x for equation in program.eqns for x in equation.invars if isinstance(x, Var)}
assert read.isdisjoint(program.invars)
print("traced, a state depends on no parameter")

states = init(PARAMS)
exported = export.export(jax.jit(init))(PARAMS).serialize()


@jax.jit
def ways(params):
    return {
        "jit": init(params),
        "jvp": jax.jvp(init, (params,), (params,))[0],
        "vmap": first(jax.vmap(init)(stacked(params))),
        "pmap": first(jax.pmap(init)(stacked(params))),
        "export": export.deserialize(exported).call(params),
    }


for way, found in ways(PARAMS).items():
    assert bits(found) == bits(states), way
print("traced, a state is the same")

tx = TXS[0]
for kind, is_set in itertools.product([AxisType.Explicit, AxisType.Auto], [False, True]):
    mesh = jax.make_mesh((1,), "x", axis_types=(kind,))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P("x")))
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        jax.eval_shape(train, params)
        step = jax.jit(lambda grads, state: tx.update(grads, state)[1])
        step(params, step(params, jax.jit(tx.init)(params)))
        assert step._cache_size() == 1, (kind, is_set)
for check_vma in (False, True):
    specs = {"in_specs": P("x"), "out_specs": P("x"), "check_vma": check_vma}
    mapped = jax.shard_map(lambda params: train(params)[0].nu, mesh=mesh, **specs)
    jax.eval_shape(mapped, PARAMS)
print("on a mesh, steps are compiled once and go into loops")
"""


def test_one_device():
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "PYTHONPATH": str(ROOT),
    }
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | settings,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 3
