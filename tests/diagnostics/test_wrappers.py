"""diagnostics where states of several storages live: wrappers, master weights, many leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import diagnostics, dialects, low_memory, rmsprop, scale_by_rms
from rmsprop_jax._storage import is_packed, slots_of
from storages import GRADS, PARAMS

G = GRADS[-1]
ALL = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(PARAMS)])
MASK = {"w": True, "b": False, "s": True}
LABELS = {"w": "a", "b": "b", "s": "a"}
RATE = functools.partial(rmsprop, 0.1)


def inject(make, *args, **kwargs):
    return optax.inject_hyperparams(make)(*args, **kwargs)


# A transformation, and for each RMSProp in it its learning rate, the leaves that it has, and how
# often it has stepped in four updates.
WRAPPED = {
    "alone": (RATE(), 0.1, "wbs", 4),
    "chain": (optax.chain(RATE(), optax.scale(0.5)), 0.1, "wbs", 4),
    "named chain": (optax.named_chain(("rms", RATE()), ("ema", optax.ema(0.9))), 0.1, "wbs", 4),
    "scaled": (optax.chain(scale_by_rms(), optax.scale_by_learning_rate(0.1)), 1.0, "wbs", 4),
    "masked": (optax.masked(RATE(), MASK), 0.1, "ws", 4),
    "partition": (optax.partition({"a": RATE(), "b": optax.sgd(0.1)}, LABELS), 0.1, "ws", 4),
    "multi steps": (optax.MultiSteps(RATE(), 4), 0.1, "wbs", 1),
    "if finite": (optax.apply_if_finite(RATE(), 3), 0.1, "wbs", 4),
    "flatten": (optax.flatten(RATE()), 0.1, "wbs", 4),
    "injected": (inject(rmsprop, 0.1), 0.1, "wbs", 4),
    "injected, chain": (
        inject(lambda lr: optax.chain(optax.clip(1e9), RATE(), rmsprop(lr)), 0.1),
        None,
        "",
        4,
    ),
    "injected timm": (inject(dialects.timm, lr=0.1, alpha=0.9), 0.1, "wbs", 4),
    "master weights": (low_memory.master_weights(RATE()), 0.1, "wbs", 4),
    "around": (optax.chain(optax.apply_if_finite(inject(rmsprop, 0.1), 3)), 0.1, "wbs", 4),
}


@functools.cache
def states():
    def run(params, grads):
        found = {}
        for name, (tx, *_) in WRAPPED.items():
            state = tx.init(params)
            for g in grads:
                _, state = tx.update(g, state, params)
            found[name] = state
        return found

    return jax.jit(run)(PARAMS, GRADS)


@functools.cache
def told():
    """Of all in one program, with params and grads."""

    def tell(states, params, g):
        return {n: diagnostics(tx, states[n], params, g) for n, (tx, *_) in WRAPPED.items()}

    return jax.device_get(jax.jit(tell)(states(), PARAMS, G))


@pytest.mark.usefixtures("default_promotion")  # of optax's own
@pytest.mark.parametrize("name", [n for n in WRAPPED if n != "injected, chain"])
def test_inside_wrappers(name):
    """The same numbers as a loop on the leaves that the RMSProp has."""
    tx, rate, leaves, steps = WRAPPED[name]
    found = []
    initial = 1.0 if "timm" in name else 0.0
    for leaf in leaves:
        s = np.full(PARAMS[leaf].shape, initial)
        gs = [np.asarray(g[leaf], float) for g in GRADS]
        for g in gs if steps > 1 else [sum(gs) / 4]:
            s = 0.9 * s + 0.1 * g**2
        found.append(s.ravel())
    s = np.concatenate(found)
    eps = 1e-10 if "timm" in name else 1e-8
    effective = np.sort(rate / np.sqrt(s + eps))
    got = told()[name]
    n = len(effective)
    for key, rank in (("p5", -(-n * 5 // 100)), ("median", -(-n // 2)), ("p95", -(-n * 95 // 100))):
        np.testing.assert_allclose(got[f"effective_lr/{key}"], effective[rank - 1], rtol=2e-5)
    np.testing.assert_allclose(got["below_eps"], np.mean(s < eps), rtol=1e-6)
    updates = jax.device_get(tx.update(G, states()[name], PARAMS)[0])
    u = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(updates)]).astype(float)
    np.testing.assert_allclose(got["update/norm"], np.linalg.norm(u), rtol=1e-5)
    relative = np.linalg.norm(u) / np.linalg.norm(ALL.astype(float))
    np.testing.assert_allclose(got["update/relative_norm"], relative, rtol=1e-5)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(states()[name]))
    assert got["state/bytes"] == held


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("name", WRAPPED)
def test_without_parameters(name):
    """What is told of a state needs no parameters, but for labels in a tree."""
    tx, want = WRAPPED[name][0], told()[name]
    got = diagnostics(tx, states()[name])
    assert got.keys() < want.keys()
    for key, value in got.items():
        np.testing.assert_allclose(value, want[key], rtol=1e-6, err_msg=key)


def test_numbers_in_a_wrappers_state_are_those_that_count():
    tx = inject(rmsprop, 0.1, eps=1e-8)
    state = tx.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(3.0)
    state.hyperparams["eps"] = jnp.float32(4.0)
    got = diagnostics(tx, state)
    np.testing.assert_allclose(got["effective_lr/median"], 1.5, rtol=1e-6)
    assert got["below_eps"] == 1
    # A schedule of the wrapper's own is as in its last step.
    tx = inject(rmsprop, optax.linear_schedule(1.0, 0.0, 10), eps=1.0)
    state = tx.init(PARAMS)
    for step in range(3):
        _, state = tx.update(jax.tree.map(jnp.zeros_like, G), state)
        got = diagnostics(tx, state)["effective_lr/median"]
        np.testing.assert_allclose(got, 1 - step / 10, rtol=1e-6)


def test_a_learning_rate_that_enters_the_program():
    def tell(rate):
        tx = optax.chain(optax.clip(1.0), rmsprop(rate, eps=1.0))
        return diagnostics(tx, tx.init(PARAMS))["effective_lr/median"]

    np.testing.assert_allclose(jax.jit(jax.vmap(tell))(jnp.array([0.5, 2.0])), [0.5, 2.0], 1e-6)


def test_several_count_together():
    """Here one has six numbers at a rate of 1, and the other two at 10."""
    txs = {"a": rmsprop(1.0, eps=1.0), "b": rmsprop(10.0, eps=1.0)}
    params = {"w": jnp.ones(6), "b": jnp.ones(2)}
    tx = optax.partition(txs, {"w": "a", "b": "b"})
    got = diagnostics(tx, tx.init(params), params)
    rates = [float(got[f"effective_lr/{n}"]) for n in ("p25", "median", "p75", "p95")]
    np.testing.assert_allclose(rates, [1, 1, 1, 10], rtol=1e-6)


def test_each_leaf():
    tx = optax.masked(rmsprop(0.1), MASK)
    params = {"layer": PARAMS, "head": (PARAMS["b"], PARAMS["s"])}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = rmsprop(0.1, decay=0.5)
    state = tx.update(grads, tx.init(params))[1]
    got = diagnostics(tx, state, params, grads, per_leaf=True)
    prefixes = {name.rsplit("/", 2)[0] for name in got if "/median" in name}
    assert prefixes == {"layer/w", "layer/b", "layer/s", "head/0", "head/1"}
    one = diagnostics(tx, tx.update(grads["layer"]["w"], tx.init(params["layer"]["w"]))[1])
    assert got["layer/w/effective_lr/p5"] == one["effective_lr/p5"]
    np.testing.assert_allclose(
        got["layer/w/update/relative_norm"],
        0.1 / np.sqrt(0.75) * np.sqrt(128) / np.linalg.norm(PARAMS["w"]),
        rtol=1e-5,
    )
    assert got["state/bytes"] == 4 * (1 + 128 + 16 + 1 + 16 + 1)
    # A tree that is a leaf has no name.
    alone = diagnostics(tx, tx.init(PARAMS["w"]), per_leaf=True)
    assert alone.keys() == diagnostics(tx, tx.init(PARAMS["w"])).keys()


@pytest.mark.parametrize(
    ("storage", "spread"),
    [(low_memory.bfloat16(), 0.01), (low_memory.q8(min_size=16), 0.2)],
    ids=["bfloat16", "q8"],
)
def test_small_states(storage, spread):
    """The numbers are those that are held, and not far from those in float32."""
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.uniform(0.5, 2, (64, 8)), jnp.float32)
    tx, wide = (rmsprop(0.1, momentum=0.9, storage=one) for one in (storage, None))
    state, want = tx.init(g), wide.init(g)
    for _ in range(3):
        _, state = tx.update(g, state)
        _, want = wide.update(g, want)
    got, exact = (jax.device_get(diagnostics(t, s, g, g)) for t, s in ((tx, state), (wide, want)))
    slot = slots_of(state.nu)
    held = np.asarray(slot.decode() if is_packed(slot) else slot, float)
    rates = np.sort(0.1 / np.sqrt(held.ravel() + 1e-8))
    np.testing.assert_allclose(got["effective_lr/median"], rates[255], rtol=1e-6)
    np.testing.assert_allclose(got["effective_lr/median"], exact["effective_lr/median"], spread)
    assert got["at_guard/second_moment"] == got["at_guard/momentum"] == 0
    assert got["not_finite/state"] == 0
    assert got["state/bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_8_bits_at_their_ends():
    """One number grows by more than 18 octaves in a step, one has almost nothing, two are 0."""
    tx = rmsprop(0.1, storage=low_memory.q8(min_size=1), momentum=0.9)
    g = jnp.full(16, 1.0).at[1].set(1e-12).at[2:4].set(0)
    _, state = tx.update(g, tx.init(g))
    _, state = tx.update(g.at[0].set(1e6), state)
    codes = np.asarray(state.nu.codes)
    want = np.mean((codes == 255) | (codes == 1))
    assert want == 2 / 16
    got = diagnostics(tx, state)
    assert got["at_guard/second_moment"] == want
    assert got["at_guard/momentum"] == np.mean(np.abs(np.asarray(state.trace.codes)) == 127)


def test_master_weights_lose_no_update():
    """An update of theirs is the difference of two bfloat16 numbers; plain ones are lost here."""
    x = jnp.asarray(np.random.default_rng(0).uniform(1.1, 1.9, 4096), jnp.bfloat16)
    g = jnp.ones(4096, jnp.bfloat16)
    lost = {}
    for name, tx in (
        ("plain", rmsprop(1e-3)),
        ("24", low_memory.master_weights(rmsprop(1e-3), bits=24)),
        ("16", low_memory.master_weights(rmsprop(1e-3), bits=16)),
    ):
        told = diagnostics(tx, tx.init(x), x, g)
        lost[name] = float(told["update/lost_in_bfloat16"])
    # The first step is 1e-3 sqrt(10), of which the distance of two neighbours, 1/128, is more than
    # twice as much.
    assert lost == {"plain": 1, "24": 0, "16": 0}
