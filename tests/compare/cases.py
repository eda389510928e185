"""The runs in which the dialects of rmsprop_jax are compared with their frameworks.

A case gives the arguments of one optimizer by its framework's names, and the learning rate of every
step. All cases of a kind have the same gradients and the same start, from a fixed seed. This module
needs only NumPy: tests read the recorded results of the cases listed here.
"""

import hashlib
from typing import Any, NamedTuple

import numpy as np

STEPS = 50
KEPT = (1, 2, 3, 5, 10, 20, 35, 50)  # after these steps the parameters are kept in the fixtures
SIZES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 10.0, 100.0, 1000.0)  # of gradients

RATE_NAME = {
    "pytorch": "lr",
    "keras": "learning_rate",
    "keras_legacy": "learning_rate",
    "tensorflow_v1": "learning_rate",
    "timm": "lr",
    "stable_baselines3": "lr",
    "sonnet": "learning_rate",
    "mlx": "learning_rate",
    "paddle": "learning_rate",
    "jax_example": "step_size",
}
DEFAULT_RATE = {
    "pytorch": 1e-2,
    "keras": 1e-3,
    "keras_legacy": 1e-3,
    "timm": 1e-2,
    "stable_baselines3": 1e-2,
}
TOLERANCE = {"float64": 1e-11, "float32": 5e-5}  # of error()

T = np.arange(STEPS)
CONSTANT = np.full(STEPS, 0.1)
FALLING = 0.1 * 0.9**T
RISING = 0.01 * (1 + T / 5)
JUMPS = np.where(T < 15, 0.1, np.where(T < 30, 0.01, 0.05))


class Case(NamedTuple):
    """One run. Its name is unique among those of its framework."""

    name: str
    options: dict[str, Any]
    rates: np.ndarray | None = CONSTANT  # learning rate of each step; None: the default
    ignored: str = ""  # the case that must come out the same, as what differs has no effect
    rounded: bool = False  # whether the framework rounds these options to float32 in float64, too
    constant: bool = False  # whether the gradient is the same in all steps

    @property
    def centered(self):
        return self.options.get("centered", False)


def largest_rate(framework, case):
    return DEFAULT_RATE[framework] if case.rates is None else case.rates.max()


def problem(framework, case, dtype):
    """Gradients [STEPS, n] and start [n]. They are float32 numbers in either dtype.

    The start is ten learning rates in size: large enough for weight decay to show, and small
    enough for float32 to resolve the steps.
    """
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((STEPS, len(SIZES))) * SIZES
    gradients[rng.random(gradients.shape) < 0.1] = 0
    start = 10 * largest_rate(framework, case) * rng.standard_normal(len(SIZES))
    if case.constant:
        gradients[:] = 10.6 * np.arange(1, len(SIZES) + 1)
    if 0 in (case.options.get("eps"), case.options.get("epsilon")):
        gradients[0] = SIZES  # 0 / 0 is NaN in the frameworks, and 0 here
    return gradients.astype(np.float32).astype(dtype), start.astype(np.float32).astype(dtype)


def error(framework, case, start, got, want):
    """The largest difference between two paths [steps, n], in units of the way or of a step."""
    way = np.abs(want.astype(float) - start)
    return np.max(np.abs(got.astype(float) - want) / (way + largest_rate(framework, case)))


def _grid(
    decay,
    eps,
    *,
    default_rate=False,
    rounded=False,
    momentum=True,
    centered=True,
    outside=False,
    coupled=False,
):
    """What most frameworks have, under the names of one; weight decay only if it is coupled."""
    cases = [
        Case("defaults", {}, None if default_rate else CONSTANT, rounded=rounded),
        Case("plain", {decay: 0.9, eps: 1e-8}),
        Case("decay 0", {decay: 0.0, eps: 1e-2}),
        Case("decay .5", {decay: 0.5, eps: 1e-8}),
        Case("decay .99", {decay: 0.99, eps: 1e-8}),
        Case("decay 1", {decay: 1.0, eps: 1e-2}),
        Case("eps 1e-2", {decay: 0.9, eps: 1e-2}),
        Case("eps 0", {decay: 0.9, eps: 0.0}),
        Case("falling rate", {decay: 0.9, eps: 1e-8}, FALLING),
        Case("rising rate", {decay: 0.9, eps: 1e-8}, RISING),
    ]
    if momentum:
        with_momentum = {decay: 0.9, eps: 1e-3, "momentum": 0.9}
        cases += [
            Case("momentum", with_momentum),
            Case("momentum 0", {decay: 0.9, eps: 1e-8, "momentum": 0.0}, ignored="plain"),
            Case("momentum, falling rate", with_momentum, FALLING),
            Case("momentum, rising rate", with_momentum, RISING),
            Case("momentum, rate that jumps", with_momentum, JUMPS),
        ]
    if centered:
        alone = {decay: 0.9, eps: 1e-6, "centered": True}
        # Of eps outside the root, the deviation has to be known to a part of it: in float32 it
        # may be off by the last digit of the gradient.
        steady = {decay: 0.5, eps: 1.0 if outside else 1e-4, "centered": True}
        cases += [
            Case("centered", alone),
            Case("centered, decay .5", alone | {decay: 0.5}),
            Case("centered, decay .99", alone | {decay: 0.99}),
            Case("centered, falling rate", alone, FALLING),
            Case("constant gradients", steady, constant=True),
        ]
    if centered and momentum:
        cases += [
            Case("centered, momentum", alone | {"momentum": 0.9}),
            Case("centered, momentum, rising rate", alone | {"momentum": 0.9}, RISING),
        ]
    if coupled:
        pull = {decay: 0.9, eps: 1e-3, "weight_decay": 0.1}
        cases += [
            Case("weight decay", pull),
            Case("weight decay 0", {decay: 0.9, eps: 1e-8, "weight_decay": 0.0}, ignored="plain"),
            Case("weight decay, falling rate", pull, FALLING),
            Case("weight decay, momentum", pull | {"momentum": 0.9}),
            Case("weight decay, momentum, rising rate", pull | {"momentum": 0.9}, RISING),
            # Where the pull outweighs the gradient it hardly varies, which takes a large eps.
            Case("weight decay, centered", pull | {"centered": True, eps: 0.03}),
        ]
    return cases


def _pytorch():
    base = {"alpha": 0.9, "eps": 1e-3, "maximize": True}
    return [
        *_grid("alpha", "eps", default_rate=True, outside=True, coupled=True),
        Case("maximize", base),
        Case("maximize, momentum, falling rate", base | {"momentum": 0.9}, FALLING),
        Case("maximize, weight decay", base | {"weight_decay": 0.1}),
        Case(
            "maximize, weight decay, momentum, centered",
            base | {"weight_decay": 0.1, "momentum": 0.9, "centered": True, "eps": 0.03},
        ),
    ]


def _keras():
    pull = {"rho": 0.9, "epsilon": 1e-3, "weight_decay": 0.1}
    return [
        *_grid("rho", "epsilon", default_rate=True),
        Case("weight decay", pull),
        Case("weight decay 0", pull | {"weight_decay": 0.0, "epsilon": 1e-8}, ignored="plain"),
        Case("weight decay, falling rate", pull, FALLING),
        Case("weight decay, momentum, rising rate", pull | {"momentum": 0.9}, RISING),
        Case("weight decay, centered, momentum", pull | {"momentum": 0.9, "centered": True}),
    ]


def _keras_legacy():
    base = {"rho": 0.9, "epsilon": 1e-3, "decay": 0.05}
    return [
        # Epsilon 0 means 1e-7.
        *_grid("rho", "epsilon", default_rate=True, rounded=True, outside=True),
        Case("momentum, small eps", {"rho": 0.9, "epsilon": 1e-8, "momentum": 0.9}),
        Case("decay of the rate", base),
        Case("decay of the rate, rate that jumps", base, JUMPS),
        Case("decay of the rate, momentum", base | {"momentum": 0.9}),
        Case("decay of the rate, momentum, centered", base | {"momentum": 0.9, "centered": True}),
    ]


def _timm():
    plain = {"alpha": 0.9, "eps": 1e-8}
    momentum = {"alpha": 0.9, "eps": 1e-3, "momentum": 0.9}
    outside = momentum | {"lr_in_momentum": False}
    decoupled = {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "decoupled_decay": True}
    corrected = decoupled | {"corrected_weight_decay": True}
    cautious = momentum | {"caution": True}
    return [
        *_grid("alpha", "eps", default_rate=True, coupled=True),
        Case("rate after momentum", outside, ignored="momentum"),  # while it is constant
        Case("rate after momentum, falling rate", outside, FALLING),
        Case("rate after momentum, rising rate", outside, RISING),
        Case("rate after momentum, centered, falling rate", outside | {"centered": True}, FALLING),
        Case("decoupled", decoupled),
        Case("decoupled, falling rate", decoupled, FALLING),
        Case("decoupled, momentum, rising rate", decoupled | {"momentum": 0.9}, RISING),
        Case("decoupled, centered", decoupled | {"centered": True}),
        Case("corrected", corrected, ignored="decoupled"),  # while the rate is constant
        Case("corrected, default rate", corrected, None),
        Case("corrected, falling rate", corrected, FALLING),
        Case("corrected, rising rate", corrected, RISING),
        Case("corrected, momentum, rate that jumps", corrected | {"momentum": 0.9}, JUMPS),
        Case(
            "corrected without decoupled",
            corrected | {"decoupled_decay": False},
            FALLING,
            ignored="weight decay, falling rate",
        ),
        Case("caution", cautious),
        Case("caution, falling rate", cautious, FALLING),
        Case("caution, rate after momentum", cautious | {"lr_in_momentum": False}, RISING),
        Case("caution, weight decay", cautious | {"weight_decay": 0.1}),
        Case("caution, decoupled", cautious | decoupled),
        Case("caution, centered", cautious | {"centered": True}),
        Case("caution without momentum", plain | {"caution": True}, ignored="plain"),
    ]


def _paddle():
    """PaddlePaddle rounds all options to float32; but for its defaults, they are so already."""

    def rounded(value):
        return value if isinstance(value, bool) else float(np.float32(value))

    return [
        case._replace(options={name: rounded(value) for name, value in case.options.items()})
        for case in _grid("rho", "epsilon", rounded=True, coupled=True)
    ]


def _mlx():
    grid = _grid("alpha", "eps", momentum=False, centered=False)
    return [case for case in grid if case.name != "eps 0"]  # which it refuses


CASES = {
    "pytorch": _pytorch(),
    "keras": _keras(),
    "keras_legacy": _keras_legacy(),
    "tensorflow_v1": _grid("decay", "epsilon", rounded=True),
    "timm": _timm(),
    "stable_baselines3": _grid("alpha", "eps", default_rate=True, coupled=True),
    "sonnet": _grid("decay", "epsilon", rounded=True),
    "mlx": _mlx(),
    "paddle": _paddle(),
    "jax_example": _grid("gamma", "eps", centered=False),
}


def tolerance(case, dtype):
    """Of the error of a case, see error()."""
    return TOLERANCE["float32" if case.rounded else dtype]


# What frameworks have around their rule, on a tree of two variables, in float64.

TREE = {"kernel": (3, 2), "bias": (2,)}
KERAS_BASE = {
    "rho": 0.9,
    "momentum": 0.5,
    "epsilon": 1e-3,
    "weight_decay": 0.1,
}
KERAS_FEATURES = {
    "clipnorm": {"clipnorm": 1.0},
    "clipvalue": {"clipvalue": 0.5},
    "global_clipnorm": {"global_clipnorm": 1.0},
    "use_ema": {"use_ema": True, "ema_momentum": 0.8},
    "use_ema, overwriting": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 7},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 4, "clipvalue": 0.5},
    "exclude_from_weight_decay": {},  # of the bias
    "PiecewiseConstantDecay": {},
    "None": {},  # as in MISSING
}
PIECES = {"boundaries": [10, 30], "values": [0.1, 0.02, 0.05]}
PYTORCH_BASE = {"alpha": 0.9, "eps": 1e-3, "momentum": 0.5, "weight_decay": 0.1}
PYTORCH_FEATURES = {
    "maximize": {"maximize": True},
    "parameter groups": {},  # PYTORCH_GROUPS
    "None": {},  # as in MISSING
}
PYTORCH_GROUPS = {
    "kernel": {"weight_decay": 0.2},
    "bias": {"lr": 0.01, "weight_decay": 0.0, "momentum": 0.9},
}
MISSING = T % 3 == 1  # the steps in which the bias has no gradient
COMPLEX = {
    "complex": {"alpha": 0.9, "eps": 1e-3},
    "complex, centered": {"alpha": 0.9, "eps": 1e-3, "centered": True},
    "complex, momentum": {"alpha": 0.9, "eps": 1e-3, "momentum": 0.9},
    "complex, weight decay": {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1},
    "complex, all": PYTORCH_BASE | {"centered": True, "maximize": True},
}


def tree_problem():
    """Gradients {name: [STEPS, ...]}, some below any clipping and some far above, and the start."""
    rng = np.random.default_rng(1)
    scale = np.resize([0.03, 1.0, 10.0, 0.3, 3.0], STEPS)
    gradients, start = {}, {}
    for name, shape in TREE.items():
        steps = rng.standard_normal((STEPS, *shape)) * scale.reshape(-1, *[1] * len(shape))
        steps[rng.random(steps.shape) < 0.1] = 0
        gradients[name] = steps.astype(np.float32).astype(np.float64)
        start[name] = rng.standard_normal(shape).astype(np.float32).astype(np.float64)
    for steps in gradients.values():
        steps[6] = 0  # norms are 0, too
    return gradients, start


def complex_problem():
    rng = np.random.default_rng(2)
    size = (STEPS + 1, len(SIZES))
    values = rng.standard_normal(size) + 1j * rng.standard_normal(size) * np.resize(
        [0.1, 3.0], len(SIZES)
    )
    values = values.astype(np.complex64).astype(np.complex128)
    return values[1:] * np.float32(SIZES), values[0]


def checksum():
    """Of all that is random here."""
    arrays = [
        *problem("mlx", Case("", {}), np.float64),
        *(array for tree in tree_problem() for array in tree.values()),
        *complex_problem(),
    ]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
