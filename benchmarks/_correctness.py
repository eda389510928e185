"""The rule in every dtype, against a loop in NumPy's float64, on the default device."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax import rmsprop

# Sums of few powers of two, which no dtype rounds.
RATE, EPS, MOMENTUM, PULL = 2.0**-7, 2.0**-27, 0.875, 2.0**-6
DECAY = 0.9
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": MOMENTUM},
    "centered, momentum": {"centered": True, "momentum": MOMENTUM},
    "nesterov, eps outside": {"momentum": MOMENTUM, "nesterov": True, "eps_in_sqrt": False},
    "decoupled decay, corrected bias": {
        "weight_decay": PULL,
        "decoupled_weight_decay": True,
        "bias_correction": True,
    },
    "cautious": {"momentum": MOMENTUM, "cautious": True},
}
# About 16 roundings in the arithmetic, and one to the 11 or 8 binary digits of the update.
ARITHMETIC = 2.0**-20
BOUNDS = {
    "float32": ARITHMETIC,
    "float16": 2.0**-11 + ARITHMETIC,
    "bfloat16": 2.0**-8 + ARITHMETIC,
    "float64": 2.0**-49,
    "complex64": ARITHMETIC,
}


def reference(
    grads: np.ndarray,
    x: np.ndarray,
    *,
    centered: bool = False,
    eps_in_sqrt: bool = True,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = True,
    bias_correction: bool = False,
    cautious: bool = False,
) -> Iterator[np.ndarray]:
    """The updates at x, in the precision of the gradients, without using the library."""
    assert decoupled_weight_decay
    square, mean, buffer, weight = 0.0, 0.0, 0.0, 0.0  # which become arrays
    for g in grads:
        square = DECAY * square + (1 - DECAY) * np.abs(g) ** 2
        mean = DECAY * mean + (1 - DECAY) * g
        weight = DECAY * weight + (1 - DECAY)
        moment = square - np.abs(mean) ** 2 if centered else square
        moment = moment / weight if bias_correction else moment
        step = RATE * g / (np.sqrt(moment + EPS) if eps_in_sqrt else np.sqrt(moment) + EPS)
        if momentum is not None:
            buffer = momentum * buffer + step
            step = step + momentum * buffer if nesterov else buffer
        if cautious:
            mask = np.real(step * np.conj(g)) > 0
            step = step * mask / max(mask.mean(), 1e-3)
        yield -(step + RATE * weight_decay * x)


def parts(dtype: str, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """What draw returns, as an array of the dtype; if complex, both its parts are drawn."""
    kind = jnp.dtype(dtype)
    if kind.kind != "c":
        return draw().astype(kind)
    pairs = np.stack([draw(), draw()], axis=-1).astype(jnp.finfo(kind).dtype)
    return pairs.view(kind)[..., 0]


def ordinary(dtype: str, steps: int, numbers: int) -> np.ndarray:
    """Gradients: a tenth of them 0, the others of a magnitude that depends on the coordinate."""
    rng = np.random.default_rng(0)
    exponents = rng.uniform(*((-6, 4) if dtype == "float16" else (-12, 6)), numbers)

    def draw() -> np.ndarray:
        values = rng.standard_normal((steps, numbers)) * 10.0**exponents
        return np.where(rng.random(values.shape) < 0.1, 0, values)

    return parts(dtype, draw)


def extreme(dtype: str, steps: int, numbers: int) -> np.ndarray:
    """Gradients at the limits of the dtype, with NaN in every seventh coordinate of step three."""
    rng, about = np.random.default_rng(1), jnp.finfo(dtype)
    values = np.array([0, 1, about.max, about.tiny, about.smallest_subnormal, np.inf], about.dtype)
    grads = parts(dtype, lambda: rng.choice([*values, *-values], (steps, numbers)))
    grads[2, ::7] = np.nan
    return grads


class Found(NamedTuple):
    """The largest error of a form; whether extremes gave finite updates, and NaN only NaN."""

    error: float
    finite: bool


def compare(dtype: str, cases: dict[str, Any], steps: int, numbers: int) -> dict[str, Found]:
    """Checks all cases in one program."""
    txs = {name: rmsprop(RATE, DECAY, EPS, **case) for name, case in cases.items()}

    @jax.jit
    def update(g: jax.Array, states: dict[str, Any], x: jax.Array) -> Any:
        return {name: tx.update(g, states[name], x) for name, tx in txs.items()}

    def run(grads: np.ndarray) -> dict[str, np.ndarray]:
        states = {name: tx.init(jnp.asarray(x)) for name, tx in txs.items()}
        updates: dict[str, list[np.ndarray]] = {name: [] for name in txs}
        for g in grads:
            found = update(jnp.asarray(g), states, jnp.asarray(x))
            states = {name: state for name, (_, state) in found.items()}
            for name, (one, _) in found.items():
                updates[name].append(np.asarray(one))
        return {name: np.stack(ones) for name, ones in updates.items()}

    *rows, x = ordinary(dtype, steps + 1, numbers)
    grads = np.stack(rows)
    hard = extreme(dtype, steps, numbers)
    updates, hard_updates = run(grads), run(hard)
    is_nan = np.logical_or.accumulate(np.isnan(hard))  # from its step on
    found = {}
    for name, case in cases.items():
        got = hard_updates[name]
        finite = np.where(is_nan, np.isnan(got), np.isfinite(got)).all()
        found[name] = Found(largest_error(updates[name], grads, x, case), bool(finite))
    return found


def largest_error(
    updates: np.ndarray, grads: np.ndarray, x: np.ndarray, case: dict[str, Any]
) -> float:
    """The largest error relative to its coordinate's largest update, or to the smallest normal."""
    assert updates.dtype == grads.dtype
    wide = np.result_type(updates, np.float64)
    want = np.stack([*reference(grads.astype(wide), x.astype(wide), **case)])
    sizes = np.maximum(np.abs(want).max(axis=0), float(jnp.finfo(updates.dtype).tiny))
    return float(np.max(np.abs(updates.astype(wide) - want) / sizes))
