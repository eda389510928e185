"""States saved and restored by Orbax, against what was saved and the run not interrupted.

Bit for bit, but where a run goes on in other shards than the one it is compared with.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from rmsprop_jax import RMSPropState, rmsprop

# A first step has no variance: with a small eps it would be long, and multiply what is rounded.
FULL = {
    "eps": 0.01,
    "centered": True,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "bias_correction": True,
}
SHAPES = {
    "float32": (2, 3),
    "bfloat16": (4,),
    "float16": (1, 1, 2),
    "float64": (3,),
    "complex64": (),
    "complex128": (2, 2),
}
LABELS = dict.fromkeys(SHAPES, "full") | {"float32": "plain", "complex64": "plain", "none": "plain"}
FORMS = {
    "plain": rmsprop(0.1),
    "momentum": rmsprop(0.1, momentum=0.9, nesterov=True),
    "centered": rmsprop(0.1, centered=True),
    "every slot": rmsprop(0.1, **FULL),
    "split complex": rmsprop(0.1, **FULL, split_complex=True),
    "schedules": rmsprop(optax.cosine_decay_schedule(0.1, 9), lambda t: 1 - 0.5 / (t + 1)),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), rmsprop(0.1, **FULL)),
    "partition": optax.partition({"plain": rmsprop(0.1), "full": rmsprop(0.01, **FULL)}, LABELS),
    "skipping": optax.apply_if_finite(rmsprop(0.1, **FULL), 5),
    "injected": optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(
        learning_rate=0.1, momentum=0.9
    ),
}


def values(shape, dtype):
    """Numbers that all differ."""
    numbers = np.linspace(0.5, 1.5, int(np.prod(shape))).reshape(shape)
    return jnp.asarray(numbers * (1 - 2j) if "complex" in dtype else numbers, dtype)


def start():
    """Parameters of each dtype, and none at all."""
    return {dtype: values(shape, dtype) for dtype, shape in SHAPES.items()} | {"none": None}


def go_on(tx, params, state, steps):
    """The parameters and the state after the steps of these numbers."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in steps:
        # Two multi-device steps under way at a time can hang a machine of few cores.
        grads = jax.tree.map(lambda p, t=t: p * np.sin(1.0 + t).astype(p.dtype), params)
        params, state = jax.block_until_ready(step(params, state, grads))
    return {"params": params, "state": state}


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_comes_back_and_goes_on(form, tmp_path):
    tx = FORMS[form]
    with jax.enable_x64(True):
        saved = go_on(tx, start(), tx.init(start()), range(3))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "3", saved)
        with ocp.StandardCheckpointer() as checkpointer:
            target = jax.eval_shape(lambda: {"params": start(), "state": tx.init(start())})
            restored = checkpointer.restore(tmp_path / "3", target)
        assert_same(restored, saved)
        assert_same(go_on(tx, **restored, steps=range(3, 6)), go_on(tx, **saved, steps=range(3, 6)))


def test_a_manager_resumes_from_its_latest_step(tmp_path):
    tx = FORMS["chain"]
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.bfloat16)}
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=2)
    run = {"params": params, "state": tx.init(params)}
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for t in range(7):
            run = go_on(tx, **run, steps=[t])
            manager.save(t + 1, args=ocp.args.StandardSave(run))

    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert manager.all_steps() == [4, 6]
        assert manager.latest_step() == 6
        target = jax.eval_shape(lambda: {"params": params, "state": tx.init(params)})
        for step in manager.all_steps():
            restored = manager.restore(step, args=ocp.args.StandardRestore(target))
            assert type(restored["state"][1]) is RMSPropState
            assert restored["state"][1].count == step
            assert_same(go_on(tx, **restored, steps=range(step, 7)), run)


MESHES = {"other axes": (4, 2), "fewer devices": (2, 1), "one device": (1, 1)}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_onto_another_mesh(shape, axis_type, tmp_path):
    tx = rmsprop(0.1, **FULL)

    def placed(shape):
        """Parameters in shards on a mesh of this shape, and their state."""
        devices = jax.devices()[: np.prod(shape)]
        mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(axis_type,) * 2, devices=devices)
        rows, columns = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ("x", (None, "y")))
        params = {
            "rows": jax.device_put(values((8, 4), "float32"), rows),
            "columns": jax.device_put(values((3, 2), "complex64"), columns),
        }
        return {"params": params, "state": jax.jit(tx.init)(params)}

    saved = go_on(tx, **placed((8, 1)), steps=range(3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "3", saved)
    like = placed(shape)
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = checkpointer.restore(tmp_path / "3", target)

    moved = jax.device_put(saved, jax.tree.map(lambda leaf: leaf.sharding, like))
    assert_same(restored, moved)
    assert restored["state"].nu["rows"].sharding.mesh.devices.shape == shape
    assert_same(go_on(tx, **restored, steps=range(3, 6)), go_on(tx, **moved, steps=range(3, 6)))
    # Where it was before, another program goes on: its sums may be rounded another way.
    got, want = (go_on(tx, **run, steps=range(3, 6)) for run in (restored, saved))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), got, want)


def test_an_optimizer_of_nnx(tmp_path):
    def fresh(seed):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        return model, nnx.Optimizer(model, rmsprop(0.1, **FULL), wrt=nnx.Param)

    def go_on(model, optimizer):
        for _ in range(3):
            grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 3))) ** 2))(model)
            optimizer.update(model, grads)
        return nnx.state((model, optimizer))

    run = fresh(0)
    saved = go_on(*run)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "3", saved)
    other = fresh(1)
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(other, checkpointer.restore(tmp_path / "3", nnx.state(other)))
    assert_same(nnx.state(other), nnx.state(run))
    assert_same(go_on(*other), go_on(*run))
