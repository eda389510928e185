"""How many digits of an update are correct in float32, at decays near 1?

    python benchmarks/accuracy.py             # a minute; writes results/accuracy.json
    python benchmarks/accuracy.py --quick     # seconds; checks that it runs, writes nothing

Prints the relative error of the last update, root mean square over 1000 elements, compared with the
same rule in long double. Gradients are normal. In the first steps the rounding of 1 - decay
dominates; in the last, the weights of 10,000 gradients, whose sum is not 1.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import _results
from rmsprop_jax import rmsprop

DECAYS = (0.9, 0.99, 0.999, 0.9999, 0.99999)
STEPS = (1, 10, 100, 1000, 10_000)
NUMBERS = 1000
EPS = 0.0  # inside the root and outside

Updates = dict[int, np.ndarray]  # by the number of steps


def exact(decay: float, grads: np.ndarray) -> Updates:
    found, s, gamma = {}, np.longdouble(0), np.longdouble(decay)
    for step, g in enumerate(grads.astype(np.longdouble), 1):
        s = gamma * s + (1 - gamma) * g * g
        if step in STEPS:
            found[step] = -g / np.sqrt(s)
    return found


def of_optax(tx: optax.GradientTransformation, grads: np.ndarray) -> Updates:
    def step(state: optax.OptState, g: jax.Array) -> tuple[optax.OptState, jax.Array]:
        updates, state = tx.update(g, state)
        return state, updates

    _, updates = jax.lax.scan(step, tx.init(jnp.zeros(NUMBERS)), jnp.asarray(grads))
    return {step: np.asarray(updates[step - 1]) for step in STEPS if step <= len(grads)}


def of_torch(decay: float, grads: np.ndarray) -> Updates:
    import torch

    x = torch.nn.Parameter(torch.zeros(NUMBERS))
    optimizer, found = torch.optim.RMSprop([x], lr=1.0, alpha=decay, eps=EPS), {}
    for step, g in enumerate(grads, 1):
        with torch.no_grad():
            x.zero_()  # so that only the update remains, and nothing is rounded
        x.grad = torch.from_numpy(g)
        optimizer.step()
        if step in STEPS:
            found[step] = x.detach().numpy().copy()
    return found


def libraries() -> dict[str, Callable[[float, np.ndarray], Updates]]:
    """The libraries that are installed."""
    found = {
        "ours": lambda decay, grads: of_optax(rmsprop(1.0, decay, EPS), grads),
        "optax": lambda decay, grads: of_optax(optax.rmsprop(1.0, decay, EPS), grads),
    }
    try:
        import torch  # noqa: F401
    except ImportError:
        return found
    return found | {"torch": of_torch}


def main(argv: Sequence[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick
    decays, steps = (DECAYS[-1:], STEPS[:2]) if quick else (DECAYS, STEPS)
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((steps[-1], NUMBERS)).astype(np.float32)
    rows = []
    for decay in tqdm(decays, unit="decay"):
        want = exact(decay, grads)
        updates = {name: run(decay, grads) for name, run in libraries().items()}
        for step in steps:
            errors = {name: error(found[step], want[step]) for name, found in updates.items()}
            ours, *others = errors.values()
            rows.append(
                {"decay": decay, "step": step}
                | {name: f"{value:.1e}" for name, value in errors.items()}
                | {"ours / the best other": f"{ours / min(others):.2f}"}
            )
    return _results.finish("accuracy", rows, quick)


def error(found: np.ndarray, want: np.ndarray) -> float:
    """The relative error, root mean square."""
    return float(np.sqrt(np.mean(np.square((found - want) / want))))


if __name__ == "__main__":
    main()
