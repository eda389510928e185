"""What several test modules need."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def gradients(steps, shape=(40,), *, dtype=np.float64, seed=0, low=-6, high=3):
    """Gradients whose sizes span 10^low to 10^high, one in ten of them exactly zero."""
    rng = np.random.default_rng(seed)
    size = (steps, *shape)
    values = rng.standard_normal(size) * 10.0 ** rng.uniform(low, high, shape)
    if np.issubdtype(dtype, np.complexfloating):
        values = values + 1j * rng.standard_normal(size) * 10.0 ** rng.uniform(low, high, shape)
    return [g.astype(dtype) for g in np.where(rng.random(size) < 0.1, 0, values)]


def run(tx, grads, x=None, *, jit=True):
    """The updates of every step, as NumPy arrays, and the last state; params follow if given."""
    x = jnp.zeros_like(jnp.asarray(grads[0])) if x is None else jnp.asarray(x)
    update = jax.jit(tx.update) if jit else tx.update
    state, updates = tx.init(x), []
    for g in grads:
        u, state = update(jnp.asarray(g), state, x)
        x = optax.apply_updates(x, u)
        updates.append(np.asarray(u))
    return updates, state


def assert_close(got, want, rtol, atol):
    for t, (a, b) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_allclose(
            np.asarray(a, np.result_type(a, np.float64)),
            np.asarray(b, np.result_type(a, np.float64)),
            rtol,
            atol,
            err_msg=f"step {t}",
        )
