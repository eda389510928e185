"""States of few bits inside everything that Optax, Flax, Orbax and JAX wrap around a state."""

import copy
import functools

from flax import linen, nnx, serialization
from flax.training.train_state import TrainState
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from conversions import FRAMEWORKS, after, tree
from helpers import assert_same
from rmsprop_jax import RMSPropState, convert, describe, dialects, low_memory, rmsprop
from rmsprop_jax._storage import Joined, is_packed, split

FULL = {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "bias_correction": True}
STORAGES = {
    "q8": low_memory.q8(block=16, min_size=16),
    "bfloat16": low_memory.bfloat16(),
}
each_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
RNG = np.random.default_rng(0)
SHAPES = {"w": (4, 32), "b": (16,), "s": ()}
PARAMS = {name: jnp.asarray(RNG.standard_normal(shape), "f4") for name, shape in SHAPES.items()}
GRADS = [
    {
        name: jnp.asarray(RNG.standard_normal(shape) * 10.0 ** RNG.integers(-4, 3, shape), "f4")
        for name, shape in SHAPES.items()
    }
    for _ in range(4)
]


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def run(tx, params=PARAMS, grads=GRADS, state=None):
    """The parameters and the state after some steps, whose structure and types never change."""
    state, update = tx.init(params) if state is None else state, jax.jit(tx.update)
    for g in grads:
        before = types(state)
        updates, state = update(g, state, params)
        assert types(state) == before
        params = optax.apply_updates(params, updates)
    return params, state


def is_ours(value):
    return isinstance(value, RMSPropState)


def ours(state):
    """The only RMSPropState in a state."""
    (one,) = (leaf for leaf in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(leaf))
    return one


def slot(field, name):
    """The arrays of one leaf of a field, with its own scale."""
    held = split(field)[name]
    return (held.codes, held.exponents, held.scales[held.leaf]) if is_packed(held) else held


@functools.cache
def plain(storage, **options):
    return run(rmsprop(0.1, **(options or FULL), storage=storage))


# Optax


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("rms", tx)),
    "masked": lambda tx: optax.masked(tx, dict.fromkeys(SHAPES, True)),
    "partition": lambda tx: optax.partition({"a": tx}, dict.fromkeys(SHAPES, "a")),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    "with_extra_args_support": optax.with_extra_args_support,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "two of them": lambda tx: optax.chain(optax.apply_if_finite(optax.chain(tx), 3)),
}


@each_storage
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_that_lets_everything_through_changes_no_bit(wrap, storage):
    params, state = run(wrap(rmsprop(0.1, **FULL, storage=storage)))
    want_params, want = plain(storage)
    assert_same(ours(state), want)
    assert_same(params, want_params)


@each_storage
def test_flatten_is_one_leaf_of_another_path(storage):
    def flat(tree):
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])

    tx = rmsprop(0.1, **FULL, storage=storage)
    params, state = run(optax.flatten(tx))
    want_params, want = run(tx, flat(PARAMS), list(map(flat, GRADS)))
    assert_same(ours(state), want)
    assert_same(flat(params), want_params)


@each_storage
def test_masked_keeps_no_state_for_the_others(storage):
    tx = optax.masked(rmsprop(0.1, **FULL, storage=storage), {"w": True, "b": False, "s": False})
    params, state = run(tx)
    for field in ("nu", "mu", "trace"):
        held = getattr(ours(state), field)
        for leaves in held[:2] if isinstance(held, Joined) else [held]:
            assert isinstance(leaves["b"], optax.MaskedNode)
        assert sum(leaf.size for leaf in jax.tree.leaves(held)) <= 4 * (32 + 4) + 1
        assert_same(slot(held, "w"), slot(getattr(plain(storage)[1], field), "w"))
    assert_same(params["w"], plain(storage)[0]["w"])


def test_partition_into_several_storages():
    txs = {name: rmsprop(0.1, **FULL, storage=one) for name, one in STORAGES.items()}
    txs["none"] = rmsprop(0.1, **FULL)
    labels = {"w": "q8", "b": "bfloat16", "s": "none"}
    params, state = run(optax.partition(txs, labels))
    for leaf, label in labels.items():
        want_params, want = run(txs[label])
        inner = ours(state.inner_states[label])
        for field in ("nu", "mu", "trace"):
            assert_same(slot(getattr(inner, field), leaf), slot(getattr(want, field), leaf))
        assert_same(params[leaf], want_params[leaf])


@each_storage
def test_multi_steps_waits_for_the_mean_gradient(storage):
    tx = optax.MultiSteps(rmsprop(0.1, **FULL, storage=storage), 2)
    halves = [jax.tree.map(lambda g, s=s: s * g, grads) for grads in GRADS for s in (2.0, 0.0)]
    params, state = run(tx, grads=halves)
    want_params, want = plain(storage)
    assert_same(ours(state), want)
    assert_same(params, want_params)


@each_storage
def test_apply_if_finite_keeps_the_state_of_before(storage):
    tx = optax.apply_if_finite(rmsprop(0.1, **FULL, storage=storage), 3)
    params, state = run(tx)
    broken = GRADS[0] | {"b": GRADS[0]["b"].at[3].set(jnp.nan)}
    _, new = run(tx, params, [broken], state)
    assert_same(ours(new), ours(state))
    assert int(new.total_notfinite) == 1


FACTORIES = {
    "rmsprop": functools.partial(rmsprop, learning_rate=0.1, **FULL),
    "pytorch": functools.partial(dialects.pytorch, lr=0.1, momentum=0.9, centered=True),
    "keras": functools.partial(dialects.keras, learning_rate=0.1, momentum=0.9),
    "tensorflow_v1": functools.partial(dialects.tensorflow_v1, learning_rate=0.1, momentum=0.9),
    "timm": functools.partial(dialects.timm, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_injected_hyperparameters_change_no_bit(name):
    factory, storage = FACTORIES[name], STORAGES["q8"]
    tx = optax.inject_hyperparams(factory.func)(**factory.keywords, storage=storage)
    params, state = run(tx)
    want_params, want = run(factory(storage=storage))
    assert_same(ours(state), want)
    assert_same(params, want_params)


@each_storage
def test_an_injected_learning_rate_can_be_set(storage):
    tx = optax.inject_hyperparams(rmsprop)(learning_rate=0.1, **FULL, storage=storage)
    state = tx.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0)
    updates, new = tx.update(GRADS[0], state, PARAMS)
    assert all(bool(jnp.all(u == 0)) for u in jax.tree.leaves(updates))
    assert_same(ours(new).nu, run(rmsprop(0.1, **FULL, storage=storage), grads=GRADS[:1])[1].nu)


@each_storage
def test_map_params_reaches_every_array_of_a_leaf_and_nothing_else(storage):
    tx = optax.chain(optax.clip(1.0), rmsprop(0.1, **FULL, storage=storage))
    _, state = run(tx)
    assert_same(optax.tree.map_params(tx, lambda leaf: leaf, state), state)
    seen = []
    optax.tree.map_params(tx, lambda leaf: seen.append(leaf) or leaf, state)
    fields = [getattr(ours(state), field) for field in ("nu", "mu", "trace")]
    trees = [field[:2] if isinstance(field, Joined) else field for field in fields]
    assert {id(leaf) for leaf in seen} == {id(leaf) for leaf in jax.tree.leaves(trees)}
    halved = optax.tree.map_params(tx, lambda leaf: leaf.astype(jnp.float16), state)
    assert ours(halved).count.dtype == jnp.int32
    assert ours(halved).weight_sum.dtype == jnp.float32
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(ours(halved)._replace(count=None))}
    assert dtypes == {jnp.dtype(jnp.float16), jnp.dtype(jnp.float32)}


def test_tree_get_and_set_find_the_slots():
    tx = optax.chain(optax.clip(1.0), rmsprop(0.1, **FULL, storage=STORAGES["q8"]))
    _, state = run(tx)
    for field in ("count", "nu", "mu", "trace"):
        assert optax.tree.get(state, field) is getattr(ours(state), field)
    for part in ("codes", "exponents", "scales"):
        found = [value for _, value in optax.tree.get_all_with_path(state, part)]
        wanted = [getattr(field, part) for field in (ours(state).nu, ours(state).trace)]
        assert {id(value) for value in found} == {id(value) for value in wanted}
    fresh = tx.init(PARAMS)
    reset = optax.tree.set(state, nu=ours(fresh).nu)
    assert_same(ours(reset).nu, ours(fresh).nu)
    assert_same(ours(reset).trace, ours(state).trace)
    assert types(tx.update(GRADS[0], reset, PARAMS)[1]) == types(state)


# Flax and Orbax


X = jnp.linspace(-1, 1, 64).reshape(4, 16)


def loss_of(y):
    return jnp.mean((y - jnp.sin(X)) ** 2)


class Model(nnx.Module):
    """With parameters of every rank, of which only the gain is never in 8 bits."""

    def __init__(self, *axes):
        init, rngs = nnx.initializers.lecun_normal(), nnx.Rngs(0)
        if axes:
            init = nnx.with_partitioning(init, axes)
        self.gain = nnx.Param(jnp.float32(2))
        self.hidden = nnx.Linear(16, 64, kernel_init=init, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(64, 16, kernel_init=init, rngs=rngs)

    def __call__(self, x):
        return self.gain[...] * self.out(jnp.tanh(self.hidden(x)))


def nnx_optimizer(storage, *axes):
    model = Model(*axes)
    return model, nnx.Optimizer(model, rmsprop(0.1, **FULL, storage=storage), wrt=nnx.Param)


@each_storage
@pytest.mark.parametrize("jit", [False, True])
def test_nnx_optimizer(jit, storage):
    """As a plain loop on the bare tree, in whatever nodes NNX holds the arrays."""
    model, optimizer = nnx_optimizer(storage)
    graph, variables = nnx.split(model)
    leaves, structure = jax.tree.flatten(variables)
    params = {"gain": leaves[0], "hidden": {"kernel": leaves[1]}}
    params["out"] = dict(zip(("bias", "kernel"), leaves[2:], strict=True))
    state = optimizer.tx.init(params)

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: loss_of(model(X)))(model))

    def loss(params):
        model = nnx.merge(graph, structure.unflatten(jax.tree.leaves(params)))
        return loss_of(model(X))

    def bare(params, state):
        updates, state = optimizer.tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    if jit:
        step, bare = nnx.jit(step), jax.jit(bare)
    for _ in range(5):
        step(model, optimizer)
        params, state = bare(params, state)
        assert_same(*map(jax.tree.leaves, (optimizer.opt_state, state)))
        assert_same(*map(jax.tree.leaves, (nnx.state(model), params)))
    names = {leaf.dtype.name for leaf in jax.tree.leaves(optimizer.opt_state)}
    assert names > ({"uint8", "int8"} if storage is STORAGES["q8"] else {"bfloat16"})


@each_storage
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda a: a.name)
def test_nnx_shards_the_state_by_the_names_of_axes_of_the_parameters(axis_type, storage):
    """With the bits of one device: the gradients are the parameters, which are no sums."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.state(model, nnx.Param))

    want = nnx_optimizer(storage)
    step(*want)
    with jax.set_mesh(mesh):
        build = functools.partial(nnx_optimizer, storage, "x", "y")
        graph, shapes = nnx.split(nnx.eval_shape(build))
        places = nnx.get_named_sharding(shapes, mesh)
        init = jax.jit(lambda: nnx.state(build()), out_shardings=places)
        model, optimizer = nnx.merge(graph, jax.block_until_ready(init()))
        step(model, optimizer)
        state = jax.block_until_ready(nnx.state(optimizer.opt_state))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = P("x", "y") if "kernel" in name else P()
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), name
    assert_same(*map(jax.device_get, map(jax.tree.leaves, (state, nnx.state(want[1].opt_state)))))


@each_storage
def test_linen_train_state_and_its_bytes(storage):
    model = linen.Dense(16)
    params = model.init(jax.random.key(0), X)
    tx = rmsprop(0.1, **FULL, storage=storage)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        grads = jax.grad(lambda params: loss_of(model.apply(params, X)))(state.params)
        return state.apply_gradients(grads=grads)

    fresh = state
    for _ in range(3):
        before = types(state.opt_state)
        state = step(state)
        assert types(state.opt_state) == before
    restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
    assert_same(restored.opt_state, state.opt_state)
    assert_same(step(restored).opt_state, step(state).opt_state)


@each_storage
@pytest.mark.parametrize("form", [{}, FULL], ids=["plain", "full"])
def test_orbax_gives_back_what_was_saved(form, storage, tmp_path):
    tx = optax.chain(optax.clip(1.0), rmsprop(0.1, **form, storage=storage))
    params = PARAMS | {"none": None, "half": PARAMS["w"].astype(jnp.bfloat16)}
    grads = [g | {"none": None, "half": g["w"].astype(jnp.bfloat16)} for g in GRADS]
    _, state = run(tx, params, grads)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "4", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "4", jax.eval_shape(tx.init, params))
    assert_same(restored, state)
    assert_same(run(tx, params, grads, restored), run(tx, params, grads, state))


@each_storage
@pytest.mark.parametrize("other", [(4, 2), (2, 1), (1, 1)], ids=str)
def test_orbax_onto_another_mesh(other, storage, tmp_path):
    tx = rmsprop(0.1, **FULL, storage=storage)

    def placed(shape):
        devices = jax.devices()[: np.prod(shape)]
        mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=devices)
        params = {"w": jax.device_put(PARAMS["w"], NamedSharding(mesh, P("x", "y")))}
        return params, jax.block_until_ready(tx.init(params))

    params, state = placed((2, 4))
    grads = jax.device_put({"w": GRADS[0]["w"]}, {"w": params["w"].sharding})
    _, state = jax.block_until_ready(jax.jit(tx.update)(grads, state, params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "1", state)
    _, like = placed(other)
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = checkpointer.restore(tmp_path / "1", target)
    assert_same(jax.device_get(restored), jax.device_get(state))
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert got.sharding == want.sharding


# JAX


@each_storage
def test_loops_and_batches_have_the_same_bits(storage):
    tx = rmsprop(0.1, **FULL, storage=storage)
    want = plain(storage)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADS)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (PARAMS, tx.init(PARAMS))
    assert_same(jax.lax.scan(step, start, stacked)[0], want)

    def body(carry):
        grads = jax.tree.map(lambda g: g[carry[1].count], stacked)
        return step(carry, grads)[0]

    assert_same(jax.lax.while_loop(lambda carry: carry[1].count < 4, body, start), want)
    eager, maybe = start, start
    for grads in GRADS:
        eager, _ = step(eager, grads)
        maybe = jax.lax.cond(True, lambda c, g=grads: step(c, g)[0], lambda c: c, maybe)
    assert_same(eager, want)
    assert_same(maybe, want)

    def scaled(tree):
        return jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, 2 * leaf]), tree)

    batch = (scaled(PARAMS), jax.vmap(tx.init)(scaled(PARAMS)))
    for grads in GRADS:
        updates, state = jax.vmap(tx.update)(scaled(grads), batch[1], batch[0])
        batch = (optax.apply_updates(batch[0], updates), state)
    assert_same(jax.tree.map(lambda leaf: leaf[0], batch), want)


@each_storage
def test_export_round_trip(storage):
    tx = rmsprop(0.1, **FULL, storage=storage)
    params, state = plain(storage)
    exported = export.export(jax.jit(tx.update))(GRADS[0], state, params)
    restored = export.deserialize(exported.serialize())
    assert_same(
        restored.call(GRADS[0], state, params)[1], jax.jit(tx.update)(GRADS[0], state, params)[1]
    )


@each_storage
def test_no_two_buffers_are_shared_and_all_can_be_donated(storage):
    tx = rmsprop(0.1, **FULL, storage=storage)
    for init in (tx.init, jax.jit(tx.init)):
        leaves = jax.tree.leaves((PARAMS, init(PARAMS)))
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    carry = jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    arrays = jax.tree.leaves(carry)
    compiled = donating.lower(*carry, GRADS[0]).compile()
    wanted = sum(leaf.nbytes for leaf in arrays)
    assert compiled.memory_analysis().alias_size_in_bytes >= wanted
    for grads in GRADS:
        carry = donating(*carry, grads)
    assert all(array.is_deleted() for array in arrays)
    assert_same(carry, plain(storage))


# What is run without jit, compiled, or both.
SETTINGS = [
    ("jax_check_tracer_leaks", True, "both"),
    ("jax_numpy_dtype_promotion", "strict", "both"),
    ("jax_enable_x64", True, "both"),
    ("jax_numpy_rank_promotion", "raise", "eager"),
    ("jax_disable_jit", True, "eager"),
    ("jax_enable_checks", True, "jit"),
    ("jax_debug_nans", True, "jit"),
    ("jax_debug_infs", True, "jit"),
]


@each_storage
@pytest.mark.parametrize(("setting", "value", "how"), SETTINGS)
def test_strict_settings(setting, value, how, storage):
    before = getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        tx = rmsprop(optax.cosine_decay_schedule(0.1, 10), **FULL, storage=storage)
        params = {
            "half": jnp.ones(32, jnp.float16),
            "single": jnp.ones((2, 16), jnp.float32),
            "complex": jnp.ones(32, jnp.complex64),
            "scalar": jnp.ones((), jnp.float32),
        }
        grads = {
            "half": jnp.tile(jnp.asarray([0, 1, -300, 7], jnp.float16), 8),
            "single": jnp.tile(jnp.asarray([[0, 1e-30], [1e30, 1]], jnp.float32), 8),
            "complex": jnp.tile(jnp.asarray([0, 1j, 1, 2], jnp.complex64), 8),
            "scalar": jnp.float32(-3),
        }
        state = tx.init(params)
        eager, compiled = tx.update, jax.jit(tx.update)
        ways = {"eager": [eager] * 2, "jit": [compiled] * 2, "both": [eager, compiled]}
        for update in ways[how]:
            updates, new = update(grads, state, params)
            assert types(new) == types(state)
            state = new
        for name, leaf in updates.items():
            assert leaf.dtype == params[name].dtype
            assert bool(jnp.all(jnp.isfinite(leaf)))
    finally:
        jax.config.update(setting, before)


DTYPES = ["float16", "bfloat16", "float32", "float64"]


@each_storage
@pytest.mark.parametrize("param_dtype", DTYPES)
def test_the_form_of_the_state_depends_on_no_dtype_and_never_changes(param_dtype, storage):
    form = plain(storage)[1]
    with jax.enable_x64(True):
        tx = rmsprop(0.1, **FULL, storage=storage)
        params = {name: leaf.astype(param_dtype) for name, leaf in PARAMS.items() if name != "s"}
        state = tx.init(params)
        for field in ("nu", "mu", "trace"):
            held, wanted = getattr(state, field), getattr(form, field)
            for name in params:
                assert types(slot(held, name)) == types(slot(wanted, name))
            if isinstance(held, Joined):
                assert held.scales.dtype == wanted.scales.dtype
                assert held.scales.shape == (len(params),)
        assert state.weight_sum.dtype == jnp.float32
        for grad_dtype, jit in zip(DTYPES, (True, False, True, True), strict=True):
            grads = {name: GRADS[0][name].astype(grad_dtype) for name in params}
            updates, new = (jax.jit(tx.update) if jit else tx.update)(grads, state, params)
            assert jax.tree.structure(new) == jax.tree.structure(state)
            assert types(new) == types(state)
            assert types(updates) == types(grads)


@each_storage
def test_numpy_and_python_leaves(storage):
    numpy = jax.tree.map(np.asarray, PARAMS)
    tx = rmsprop(0.1, **FULL, storage=storage)
    state = tx.init(numpy | {"s": float(PARAMS["s"])})
    assert_same(state, tx.init(PARAMS))
    _, new = jax.jit(tx.update)(jax.tree.map(np.asarray, GRADS[0]), state, numpy)
    assert_same(new, run(tx, grads=GRADS[:1])[1])


@each_storage
def test_abstract_and_empty_trees_and_leaves(storage):
    tx = rmsprop(0.1, **FULL, storage=storage)
    wanted = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tx.init(PARAMS))
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    for shapes in (jax.eval_shape(tx.init, PARAMS), jax.eval_shape(tx.init, abstract)):
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == wanted
    assert_same(tx.init(abstract), tx.init(PARAMS))
    for empty in ({}, (), None, {"a": None}):
        free = tx if empty is not None else rmsprop(0.1, momentum=0.9, storage=storage)
        updates, state = free.update(empty, free.init(empty), empty)
        assert updates == empty
        assert int(state.count) == 1
        assert types(state) == types(free.init(empty))
    for shape in ((0, 32), (4, 0)):
        updates, state = tx.update(jnp.ones(shape), tx.init(jnp.ones(shape)), jnp.ones(shape))
        assert updates.shape == split(state.nu).shape == split(state.trace).shape == shape


@each_storage
@pytest.mark.parametrize("without", ["w", "s", "wb"])
@pytest.mark.parametrize("jit", [False, True])
def test_a_gradient_of_none_leaves_the_state_of_its_leaf(jit, without, storage):
    """Its scale too, though that is in one array with the others."""
    tx = rmsprop(0.1, **FULL, storage=storage)
    params, state = plain(storage)
    update = jax.jit(tx.update) if jit else tx.update
    updates, new = update(GRADS[0] | dict.fromkeys(without), state, params)
    _, all_new = update(GRADS[0], state, params)
    assert types(new) == types(state)
    for name in SHAPES:
        assert (updates[name] is None) == (name in without)
        for field in ("nu", "mu", "trace"):
            got, old, want = (slot(getattr(one, field), name) for one in (new, state, all_new))
            assert_same(got, old if name in without else want)


@each_storage
def test_an_update_has_a_derivative(storage):
    """Without momentum it is linear in the learning rate."""

    def total(learning_rate):
        tx = rmsprop(learning_rate, centered=True, storage=storage)
        return optax.tree.sum(tx.update(GRADS[0], tx.init(PARAMS))[0])

    np.testing.assert_allclose(0.1 * jax.grad(total)(0.1), total(0.1), rtol=1e-5)


# Which leaves, and which states


def test_q8_by_default_holds_leaves_from_4096_elements_on():
    params = {"large": jnp.ones((8, 512)), "small": jnp.ones(4095), "prime": jnp.ones((2, 2053))}
    tx = rmsprop(0.1, **FULL, storage=low_memory.q8())
    state = tx.init(params)
    for field, signed in (("nu", False), ("trace", True)):
        codes, exponents, scales = getattr(state, field)
        assert codes["small"].dtype == jnp.float32
        assert codes["large"].dtype == codes["prime"].dtype == (jnp.int8 if signed else jnp.uint8)
        assert types(exponents) == {
            "large": ((8, 8), jnp.uint8, False),
            "small": ((4095,), jnp.uint8, False),
            "prime": ((2, 1), jnp.uint8, False),
        }
        assert not np.any(exponents["small"])
        assert types(scales) == ((3,), jnp.float32, False)
    assert {name: leaf.dtype for name, leaf in state.mu.items()} == {
        "large": jnp.bfloat16,
        "small": jnp.float32,
        "prime": jnp.bfloat16,
    }


WIDE = rmsprop(0.1, **FULL)


@each_storage
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int32, jnp.uint8], ids=lambda d: d.__name__)
def test_a_state_that_was_cast_is_refused(dtype, storage):
    """All of it, or the slots alone."""
    tx = rmsprop(0.1, **FULL, storage=storage)
    params, state = plain(storage)
    for cast in (
        jax.tree.map(lambda leaf: leaf.astype(dtype), state),
        optax.tree.map_params(tx, lambda leaf: leaf.astype(dtype), state),
        state._replace(trace=jax.tree.map(lambda leaf: leaf.astype(dtype), state.trace)),
    ):
        for update in (tx.update, jax.jit(tx.update)):
            with pytest.raises((TypeError, AssertionError), match=jnp.dtype(dtype).name):
                update(GRADS[0], cast, params)


@each_storage
def test_a_state_whose_floats_were_cast_to_bfloat16_is_refused_or_goes_on(storage):
    """As by map_params of a mixed-precision policy: the scales are then no more what they were."""
    tx = rmsprop(0.1, **FULL, storage=storage)
    params, state = plain(storage)
    half = jax.tree.map(
        lambda leaf: leaf.astype("bfloat16") if leaf.dtype == jnp.float32 else leaf, state
    )._replace(weight_sum=state.weight_sum)
    if storage is STORAGES["q8"]:
        with pytest.raises((TypeError, AssertionError), match="bfloat16"):
            tx.update(GRADS[0], half, params)
    else:
        _, new = tx.update(GRADS[0], half, params)
        assert types(new) == types(half)


ANY = {"float32": None, **STORAGES, "other blocks": low_memory.q8(block=4, min_size=64)}
ARRAYS = ("float32", "bfloat16")


@pytest.mark.parametrize("other", ANY)
@pytest.mark.parametrize("name", ANY)
def test_a_state_of_another_storage_goes_on_as_it_is_held_or_is_refused(name, other):
    """In 8 bits the other is one that is not, whose arrays are for all who know their dtypes."""
    tx = rmsprop(0.1, **FULL, storage=ANY[name])
    state = rmsprop(0.1, **FULL, storage=ANY[other]).init(PARAMS)
    if (name in ARRAYS) != (other in ARRAYS):
        one = tx.init(PARAMS)._replace(trace=state.trace)
        for field, held in (("nu", state), ("trace", one)):
            kind = type(getattr(state, field)).__name__
            message = (
                rf"state\.{field} must be of this storage, got {kind}: convert\.change_storage"
            )
            for update in (tx.update, jax.jit(tx.update)):
                with pytest.raises(TypeError, match=message):
                    update(GRADS[0], held, PARAMS)
    elif (name, other) == ("float32", "bfloat16"):
        with pytest.raises(AssertionError, match=r"leaves '[bw]': gradient float32.*bfloat16"):
            tx.update(GRADS[0], state, PARAMS)
    else:
        got, want = run(tx, state=state), plain(ANY[other])
        assert types(got) == types(want)
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6 if other == "float32" else 0)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_a_plain_state_of_codes_is_refused(dtype):
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), WIDE.init(PARAMS))
    for storage, error, message in (
        (STORAGES["q8"], TypeError, "state.nu must be of this storage, got dict"),
        (STORAGES["bfloat16"], AssertionError, dtype),
    ):
        with pytest.raises(error, match=message):
            rmsprop(0.1, **FULL, storage=storage).update(GRADS[0], state, PARAMS)


@pytest.mark.parametrize("part", ["codes", "exponents", "scales"])
def test_blocks_of_which_a_part_was_cast_are_refused(part):
    tx = rmsprop(0.1, **FULL, storage=STORAGES["q8"])
    params, state = plain(STORAGES["q8"])
    for field in ("nu", "trace"):
        held = getattr(state, field)
        cast = jax.tree.map(lambda leaf: leaf.astype("float16"), getattr(held, part))
        broken = state._replace(**{field: held._replace(**{part: cast})})
        for update in (tx.update, jax.jit(tx.update)):
            with pytest.raises((TypeError, AssertionError), match="float16"):
                update(GRADS[0], broken, params)


def test_the_slots_of_other_parameters_are_refused():
    tx = rmsprop(0.1, storage=STORAGES["q8"])
    state = tx.init(PARAMS | {"w": jnp.ones((4, 64))})
    with pytest.raises(AssertionError, match=r"'w'.*\[4, 32\].*\[4, 64\]"):
        tx.update(GRADS[0], state)
    with pytest.raises(AssertionError, match=r"missing \['w'\]"):
        tx.update({"b": GRADS[0]["b"], "s": GRADS[0]["s"]}, tx.init(PARAMS))


# Arguments


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (low_memory.q8, {"block": 0}, ValueError, "block must be at least 1, got 0"),
        (low_memory.q8, {"block": 12.5}, TypeError, "block must be an integer, got 12.5"),
        (low_memory.q8, {"block": True}, TypeError, "block must be an integer, got True"),
        (low_memory.q8, {"min_size": -1}, ValueError, "min_size must be at least 0, got -1"),
        (low_memory.q8, {"min_size": None}, TypeError, "min_size must be an integer, got None"),
        *(
            (make, *rest)
            for make in (low_memory.q8, low_memory.bfloat16)
            for rest in (
                ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
                ({"seed": "1"}, TypeError, "seed must be an integer, got '1'"),
                (
                    {"exempt": "x"},
                    TypeError,
                    "exempt must be a function of a path or None, got 'x'",
                ),
                ({"axis_name": 3}, TypeError, "axis_name must be a name or a tuple of names or No"),
                ({"axis_name": ("x", 3)}, TypeError, "axis_name must be a name .* got .'x', 3."),
            )
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_refused_arguments(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    "storage",
    [low_memory.q8, low_memory, "q8", 8, jnp.bfloat16],
    ids=lambda value: repr(value)[:15],
)
def test_refused_storages(storage):
    for factory in FACTORIES.values():
        with pytest.raises(TypeError, match="storage must be a Storage, got"):
            factory(storage=storage)


def test_a_storage_that_can_be_called_is_refused():
    """Wrappers that inject would take it for a schedule."""

    class Callable(type(STORAGES["q8"])):
        def __call__(self, count):
            return count

    one = Callable(block=16, min_size=0, seed=0, exempt=None, axis_name=None)
    with pytest.raises(TypeError, match="storage must be a Storage, got"):
        rmsprop(0.1, storage=one)


@pytest.mark.parametrize("seed", [0, -1, 2**32, 2**70, np.int64(3)], ids=str)
def test_any_integer_is_a_seed(seed):
    for make in (low_memory.q8, low_memory.bfloat16):
        storage = make(seed=seed)
        assert storage == make(seed=int(seed))
        tx = rmsprop(0.1, storage=make(seed=seed))
        tx.update(PARAMS, tx.init(PARAMS))


def test_equal_storages_are_one_argument():
    """So that a transformation built anew is not compiled anew."""
    for make in (low_memory.q8, low_memory.bfloat16):
        assert make() == make()
        assert hash(make()) == hash(make())
        assert make() != make(seed=1)
    assert low_memory.q8() != low_memory.q8(block=64)
    assert low_memory.q8() != low_memory.bfloat16()


@pytest.mark.parametrize(
    "storage",
    [
        low_memory.q8(),
        low_memory.q8(64, 0, 3, axis_name=("x", "y")),
        low_memory.bfloat16(),
        low_memory.bfloat16(5, axis_name="x"),
    ],
    ids=str,
)
def test_describe_names_the_storage_as_it_is_written(storage):
    assert describe(rmsprop(0.1, storage=storage)).endswith(f"\nheld by {storage!r}")
    names = {"q8": low_memory.q8, "bfloat16": low_memory.bfloat16}
    assert eval(repr(storage), names) == storage


# Conversions


BLOCKS = {"q8": low_memory.q8(block=2, min_size=0), "bfloat16": low_memory.bfloat16()}
BUILD = {
    "pytorch": dialects.pytorch,
    "timm": dialects.timm,
    "keras": functools.partial(dialects.keras, 0.01),
    "tensorflow": functools.partial(dialects.tensorflow_v1, 0.01),
    "optax": functools.partial(rmsprop, 0.01),
}


def arrays(state):
    """The values of each slot of each leaf, by their paths, as NumPy arrays in double precision."""
    slots = {field: split(getattr(state, field)) for field in ("nu", "mu", "trace")}
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(
            held.decode() if is_packed(held) else held, np.float64
        )
        for path, held in jax.tree_util.tree_leaves_with_path(slots, is_leaf=is_packed)
    }


@pytest.mark.parametrize("framework", FRAMEWORKS[::3])
@pytest.mark.parametrize("name", BLOCKS)
def test_frameworks_get_values_in_float32_and_give_them_back(name, framework):
    """What they get is what a state in float32 of the same values gives.

    And back: in bfloat16 as it was, in 8 bits with a relative error of 1/16; but a variance, of
    what rounding leaves of the difference of float32 numbers.
    """
    small = copy.copy(framework)
    small.tx = BUILD[framework.name](**framework.options, storage=BLOCKS[name])
    params, state = after(small.tx, 4, tree())
    given = small.to(state, params)
    wide = convert.change_storage(state, params, framework.tx)
    for got, want in zip(*map(jax.tree.leaves, (given, framework.to(wide, params))), strict=True):
        np.testing.assert_array_equal(got, want)
        assert np.asarray(got).dtype == np.asarray(want).dtype
    again = small.back(given, params)
    assert types(again) == types(state)
    old, new = arrays(state), arrays(again)
    for path, value in old.items():
        loss = abs(value) * (2**-4 if name == "q8" and not path.startswith("mu") else 2**-9)
        if path.startswith("nu") and framework.options.get("centered"):
            loss = loss + 2**-22 * old[path.replace("nu", "mu", 1)] ** 2
        assert np.all(abs(new[path] - value) <= loss), path


def wide_state(shape=(64, 128), seed=0):
    """A state in float32, of values across 60 octaves and zeros."""
    rng = np.random.default_rng(seed)

    def numbers(sign):
        values = 2.0 ** rng.uniform(-60, 0, shape) * sign
        return {"w": jnp.asarray(np.where(rng.random(shape) < 0.1, 0, values), jnp.float32)}

    params = {"w": jnp.ones(shape)}
    signs = rng.choice([-1, 1], shape)
    tx = rmsprop(0.1, **FULL)
    state = tx.init(params)._replace(
        count=jnp.int32(7), nu=numbers(1), mu=numbers(signs), trace=numbers(signs)
    )
    return params, tx, state._replace(weight_sum=jnp.float32(0.5))


def test_float32_to_8_bits_and_back_loses_what_is_said():
    params, wide, state = wide_state()
    small = rmsprop(0.1, **FULL, storage=low_memory.q8())
    held = convert.change_storage(state, params, small)
    assert types(held) == types(small.init(params))
    back = convert.change_storage(held, params, wide)
    assert types(back) == types(state)
    assert int(back.count) == 7
    assert float(back.weight_sum) == 0.5
    old, new = arrays(state), arrays(back)
    largest = {
        path: np.repeat(abs(value).max(-1, keepdims=True), 128, -1) for path, value in old.items()
    }
    nu, got = old["nu/w"], new["nu/w"]
    np.testing.assert_array_equal(got == 0, nu == 0)
    floor = 2.0**-31 * largest["nu/w"]
    above = nu > 1.2 * floor
    assert np.all(abs(got - nu)[above] <= nu[above] / 16)
    low = (nu > 0) & ~above
    assert np.all(got[low] >= nu[low] * 15 / 16)
    assert np.all(got[low] <= 1.2 * floor[low])
    trace, got = old["trace/w"], new["trace/w"]
    assert np.all(abs(got - trace) <= np.maximum(abs(trace) / 16, 2.0**-15 * largest["trace/w"]))
    assert np.all(abs(new["mu/w"] - old["mu/w"]) <= abs(old["mu/w"]) * 2**-8)


def test_float32_to_bfloat16_and_back_is_rounded_to_the_nearest():
    params, wide, state = wide_state()
    small = rmsprop(0.1, **FULL, storage=low_memory.bfloat16())
    back = convert.change_storage(convert.change_storage(state, params, small), params, wide)
    for field in ("nu", "mu", "trace"):
        want = getattr(state, field)["w"].astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(getattr(back, field)["w"], want)


@each_storage
def test_to_the_same_storage_changes_no_bit(storage):
    params, state = plain(storage)
    tx = rmsprop(0.2, **FULL, storage=storage)
    assert_same(convert.change_storage(state, params, tx), state)


def test_from_one_block_to_another_is_rounded_once_more():
    params, state = plain(STORAGES["q8"])
    tx = rmsprop(0.1, **FULL, storage=low_memory.q8(block=4, min_size=16))
    new = convert.change_storage(state, params, tx)
    assert new.nu.exponents["w"].shape == new.trace.exponents["w"].shape == (4, 8)
    old, new = arrays(state), arrays(new)
    for path, value in old.items():
        bound = abs(value) / 16
        if path.startswith("trace") and value.ndim:
            blocks = abs(value).reshape(*value.shape[:-1], -1, 4)
            largest = np.repeat(blocks.max(-1), 4, -1)
            bound = np.maximum(bound, 2.0**-15 * largest)
        assert np.all(abs(new[path] - value) <= bound), path


@pytest.mark.parametrize("name", ["chain", "masked", "partition", "MultiSteps", "two of them"])
def test_a_wrapped_state_changes_its_storage(name):
    """There and back."""
    wrap, storage = WRAPPERS[name], STORAGES["q8"]
    wide, small = (wrap(rmsprop(0.1, **FULL, storage=one)) for one in (None, storage))
    params, state = run(small, grads=GRADS[:2])
    given = convert.change_storage(state, params, wide)
    assert types(given) == types(wide.init(params))
    old, new = arrays(ours(state)), arrays(ours(given))
    for path, value in old.items():
        np.testing.assert_array_equal(new[path], value)
    back = convert.change_storage(given, params, small)
    assert types(back) == types(state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert int(ours(back).count) == 2
    np.testing.assert_allclose(arrays(ours(back))["nu/w"], old["nu/w"], rtol=2**-4)


def test_a_partition_changes_one_storage_and_multi_steps_keeps_what_it_gathered():
    labels = {"w": "a", "b": "b", "s": "b"}

    def wrapped(a, b):
        txs = {"a": rmsprop(0.1, **FULL, storage=a), "b": rmsprop(0.1, **FULL, storage=b)}
        return optax.MultiSteps(optax.partition(txs, labels), 3)

    q8, bfloat16 = STORAGES.values()
    params, state = run(wrapped(None, bfloat16))
    assert int(state.mini_step) == 1
    new = convert.change_storage(state, params, wrapped(q8, bfloat16))
    assert types(new) == types(wrapped(q8, bfloat16).init(params))
    assert_same(new._replace(inner_opt_state=None), state._replace(inner_opt_state=None))
    inner = [one.inner_opt_state.inner_states for one in (new, state)]
    assert_same(inner[0]["b"], inner[1]["b"])
    run(wrapped(q8, bfloat16), params, GRADS, new)


@each_storage
def test_other_trees_are_refused(storage):
    params, state = plain(storage)
    tx = rmsprop(0.1, **FULL)
    form = {name: value for name, value in FULL.items() if name != "momentum"}
    less = {name: params[name] for name in "wb"}
    for given, leaves, to in (
        (state, less, tx),
        (state, params | {"w": jnp.ones((4, 16))}, tx),
        (state, params | {"w": jnp.ones((32, 4))}, tx),
        (state, params, rmsprop(0.1, **form)),
        (state, params, optax.chain(tx)),
        ((state, optax.EmptyState()), params, tx),
        (state.nu, params, tx),
        (None, params, tx),
    ):
        with pytest.raises(ValueError, match="state must"):
            convert.change_storage(given, leaves, to)
    with pytest.raises(TypeError, match="tx must be an RMSProp"):
        convert.change_storage(state, params, optax.sgd(0.1))


def test_a_changed_state_is_placed_like_the_parameters():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    params, _, state = wide_state((4, 64))
    small = rmsprop(0.1, **FULL, storage=STORAGES["q8"])
    want = convert.change_storage(state, params, small)
    sharded = jax.device_put(params, NamedSharding(mesh, P("x")))
    got = jax.block_until_ready(convert.change_storage(state, sharded, small))
    assert_same(jax.device_get(got), jax.device_get(want))
    for a, b in zip(*map(jax.tree.leaves, (got, small.init(sharded))), strict=True):
        assert a.sharding == b.sharding
