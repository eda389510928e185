"""States saved and restored by Orbax, compared with what was saved and with an uninterrupted run.

They are bit-identical, except where a run resumes with other shards than the one it is compared
with.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from helpers import assert_moved
from rmsprop_jax import RMSPropState, rmsprop
from storages import STORAGES

pytestmark = pytest.mark.usefixtures("default_promotion")  # for Optax and Flax

# A first step has no variance: with a small eps it would be long, and multiply what is rounded.
FULL = {
    "eps": 0.01,
    "centered": True,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "bias_correction": True,
}
SHAPES = {
    "float32": (2, 16),
    "bfloat16": (16,),
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
    "q8": rmsprop(0.1, storage=STORAGES["q8"]),
    "q8, every slot": optax.chain(
        optax.clip_by_global_norm(9.0), rmsprop(0.1, **FULL, storage=STORAGES["q8"])
    ),
    "bfloat16": rmsprop(0.1, storage=STORAGES["bfloat16"]),
    "bfloat16, every slot": rmsprop(0.1, **FULL, storage=STORAGES["bfloat16"]),
}


def values(shape, dtype):
    """Numbers that all differ."""
    numbers = np.linspace(0.5, 1.5, int(np.prod(shape))).reshape(shape)
    return jnp.asarray(numbers * (1 - 2j) if "complex" in dtype else numbers, dtype)


def start():
    """Parameters of each dtype, and none at all."""
    return {dtype: values(shape, dtype) for dtype, shape in SHAPES.items()} | {"none": None}


def first(txs, params):
    return {name: {"params": params, "state": tx.init(params)} for name, tx in txs.items()}


def go_on(txs, runs, steps):
    """The parameters and states after the steps of these numbers, in one program."""

    def one(tx, run, factor):
        grads = jax.tree.map(lambda p: p * factor.astype(p.dtype), run["params"])
        updates, state = tx.update(grads, run["state"], run["params"])
        return {"params": optax.apply_updates(run["params"], updates), "state": state}

    step = jax.jit(lambda runs, f: {name: one(txs[name], run, f) for name, run in runs.items()})
    for t in steps:
        # Two multi-device steps under way at a time can hang a machine of few cores.
        runs = jax.block_until_ready(step(runs, np.sin(1.0 + t)))
    return runs


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding)
        np.testing.assert_array_equal(a, b)


def save_and_restore(path, saved, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, saved)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def test_what_is_saved_comes_back_and_goes_on(tmp_path, subtests):
    """Every form in one checkpoint; all fields return with their types, None included."""
    with jax.enable_x64(True):
        saved = go_on(FORMS, first(FORMS, start()), range(3))
        assert_moved(saved)
        target = jax.eval_shape(lambda: first(FORMS, start()))
        restored = save_and_restore(tmp_path / "3", saved, target)
        runs = [go_on(FORMS, run, range(3, 6)) for run in (restored, saved)]
    for name in FORMS:
        with subtests.test(form=name):
            assert_same(restored[name], saved[name])
            assert_same(runs[0][name], runs[1][name])
            moved = zip(*map(jax.tree.leaves, (runs[0][name], saved[name])), strict=True)
            assert any(np.any(a != b) for a, b in moved)


@pytest.mark.slow
def test_a_manager_resumes_from_its_latest_step(tmp_path):
    txs = {"chain": FORMS["chain"]}
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.bfloat16)}
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=2)
    run = first(txs, params)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for t in range(7):
            run = go_on(txs, run, [t])
            manager.save(t + 1, args=ocp.args.StandardSave(run))

    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert manager.all_steps() == [4, 6]
        assert manager.latest_step() == 6
        target = jax.eval_shape(lambda: first(txs, params))
        for step in manager.all_steps():
            restored = manager.restore(step, args=ocp.args.StandardRestore(target))
            state = restored["chain"]["state"][1]
            assert type(state) is RMSPropState
            assert state.count == step
            assert_same(go_on(txs, restored, range(step, 7)), run)


MESHES = {"other axes": (4, 2), "fewer devices": (2, 1), "one device": (1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_onto_another_mesh(shape, axis_type, tmp_path):
    txs = {name: rmsprop(0.1, **FULL, storage=storage) for name, storage in STORAGES.items()}

    def placed(shape):
        """Parameters in shards on a mesh of this shape, and their states."""
        devices = jax.devices()[: np.prod(shape)]
        mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(axis_type,) * 2, devices=devices)
        places = {
            "rows": NamedSharding(mesh, PartitionSpec("x")),
            "columns": NamedSharding(mesh, PartitionSpec(None, "y")),
            "both": NamedSharding(mesh, PartitionSpec("x", "y")),
        }
        params = {
            "rows": values((8, 4), "float32"),
            "columns": values((3, 2), "complex64"),
            "both": values((8, 32), "float32"),
        }
        params = jax.device_put(params, places)
        return jax.block_until_ready(jax.jit(lambda params: first(txs, params))(params))

    saved = go_on(txs, placed((8, 1)), range(3))
    like = placed(shape)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restored = save_and_restore(tmp_path / "3", saved, target)

    moved = jax.device_put(saved, jax.tree.map(lambda leaf: leaf.sharding, like))
    assert_same(restored, moved)
    state = restored["float32"]["state"]
    assert state.nu["rows"].sharding.mesh.devices.shape == shape
    runs = [go_on(txs, run, range(3, 6)) for run in (restored, moved, saved)]
    assert_same(runs[0], runs[1])
    # Where it was before, another program goes on: its sums may be rounded another way.
    got, want = (run["float32"] for run in runs[::2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), got, want)


@pytest.mark.slow
def test_an_optimizer_of_nnx(tmp_path):
    def fresh(seed):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
        return model, nnx.Optimizer(model, rmsprop(0.1, **FULL), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 3))) ** 2))(model)
        optimizer.update(model, grads)

    def train(model, optimizer):
        for _ in range(3):
            step(model, optimizer)
        return nnx.state((model, optimizer))

    run, other = fresh(0), fresh(1)
    saved = train(*run)
    nnx.update(other, save_and_restore(tmp_path / "3", saved, nnx.state(other)))
    assert_same(nnx.state(other), nnx.state(run))
    assert_same(train(*other), train(*run))
