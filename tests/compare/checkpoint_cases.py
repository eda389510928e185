"""The runs that begin in one framework and end in another.

A run trains two variables, a kernel and a bias, on given gradients for cases.STEPS steps. Its
checkpoint is taken halfway, after K steps.
"""

from typing import Any, NamedTuple

import numpy as np

import cases
from cases import CONSTANT, FALLING, JUMPS, RISING, STEPS

K = STEPS // 2
NAMES = {  # of each framework's kernel and bias
    "pytorch": ("fc.weight", "fc.bias"),
    "timm": ("fc.weight", "fc.bias"),
    "keras": ("net/fc/kernel", "net/fc/bias"),
    "tensorflow_v1": ("fc/kernel", "fc/bias"),
}


class Case(NamedTuple):
    """One run. The groups are parts with options of their own, in the framework's order.

    The learning rate of a group follows that of all in proportion.
    """

    name: str
    options: dict[str, Any]
    rates: np.ndarray = CONSTANT
    groups: dict[str, dict[str, Any]] = {}  # noqa: RUF012 # of "kernel" and "bias"
    late: bool = False  # whether the bias has no gradient before step K
    complex: bool = False
    rounded: bool = False  # see cases.Case

    @property
    def centered(self):
        return self.options.get("centered", False)

    @property
    def parts(self):
        """The options of each group, all of them."""
        return {name: self.options | options for name, options in self.groups.items()}


def _grid(decay, eps):
    plain = {decay: 0.9, eps: 1e-3}
    momentum = plain | {"momentum": 0.9}
    centered = plain | {"centered": True}
    both = momentum | centered
    return [
        Case("plain", plain),
        Case("plain, falling rate", plain, FALLING),
        Case("momentum", momentum),
        Case("momentum, falling rate", momentum, FALLING),
        Case("momentum, rate that jumps", momentum, JUMPS),
        Case("centered", centered),
        Case("centered, momentum", both),
        Case("centered, momentum, rising rate", both, RISING),
    ]


def _torch_grid():
    base = {"alpha": 0.9, "eps": 1e-3}
    pull = base | {"weight_decay": 0.1}
    groups = {"bias": {"momentum": 0.9, "lr": 0.03}, "kernel": {"weight_decay": 0.2, "lr": 0.1}}
    return [
        *_grid("alpha", "eps"),
        Case("weight decay", pull),
        Case("weight decay, momentum, falling rate", pull | {"momentum": 0.9}, FALLING),
        Case("two groups", base, groups=groups),
        Case("two groups, centered, falling rate", base | {"centered": True}, FALLING, groups),
        Case("a late bias", base | {"momentum": 0.9}, late=True),
    ]


def _pytorch():
    most = {"alpha": 0.9, "eps": 0.03, "weight_decay": 0.1, "momentum": 0.9, "centered": True}
    return [
        *_torch_grid(),
        Case("maximize, all", most | {"maximize": True}, RISING),
        Case("complex", {"alpha": 0.9, "eps": 1e-3}, complex=True),
        Case("complex, all", most, FALLING, complex=True),
    ]


def _timm():
    momentum = {"alpha": 0.9, "eps": 1e-3, "momentum": 0.9}
    decoupled = {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "decoupled_decay": True}
    corrected = decoupled | {"corrected_weight_decay": True}
    outside = momentum | {"lr_in_momentum": False}
    return [
        *_torch_grid(),
        Case("rate after momentum, falling rate", outside, FALLING),
        Case("rate after momentum, centered", outside | {"centered": True}, RISING),
        Case("decoupled, momentum, falling rate", decoupled | {"momentum": 0.9}, FALLING),
        Case("corrected, falling rate", corrected, FALLING),
        Case("caution, decoupled", momentum | decoupled | {"caution": True}),
    ]


def _keras():
    pull = {"rho": 0.9, "epsilon": 1e-3, "weight_decay": 0.1}
    most = pull | {"momentum": 0.9, "centered": True}
    excluded = {"bias": {"weight_decay": None}, "kernel": {}}
    return [
        *_grid("rho", "epsilon"),
        Case("weight decay", pull),
        Case("weight decay, centered, momentum, rising rate", most, RISING),
        Case("two groups", most, FALLING, excluded),
    ]


def _tensorflow_v1():
    """Of groups, each has an optimizer of its own."""
    base = {"decay": 0.9, "epsilon": 1e-3}
    groups = {
        "bias": {"momentum": 0.9, "learning_rate": 0.03},
        "kernel": {"learning_rate": 0.1},
    }
    return [
        *_grid("decay", "epsilon"),
        Case("two groups", base, groups=groups),
        Case("two groups, centered, falling rate", base | {"centered": True}, FALLING, groups),
    ]


CASES = {
    "pytorch": _pytorch(),
    "timm": _timm(),
    "keras": _keras(),
    "tensorflow_v1": _tensorflow_v1(),
}


def rates(case, options, name):
    """The learning rate of every step, of a group with these options."""
    own = options.get(name, case.rates[0])
    return own * (case.rates / case.rates[0])


def problem(case, dtype):
    """Gradients {part: [STEPS, ...]}, None where there is none, and the start, as ours has them."""
    gradients, start = cases.tree_problem()
    wanted = np.dtype(dtype)
    if case.complex:
        wanted = np.result_type(wanted, np.complex64)
        gradients = {name: g + 1j * np.roll(g, 1, axis=0) for name, g in gradients.items()}
        start = {name: x * (1 - 0.5j) for name, x in start.items()}
    gradients = {name: list(g.astype(wanted)) for name, g in gradients.items()}
    if case.late:
        gradients["bias"][:K] = [None] * K
    return gradients, {name: x.astype(wanted) for name, x in start.items()}


def error(case, start, got, want):
    """The largest difference of two sets of parameters, in units of the way or of a step."""
    wide = {name: np.asarray(w, np.result_type(w, np.float64)) for name, w in want.items()}
    return max(
        np.max(np.abs(got[name] - w) / (np.abs(w - start[name]) + case.rates.max()))
        for name, w in wide.items()
    )


def theirs(framework, tree):
    """Two arrays as the framework names them and lays them out."""
    kernel, bias = NAMES[framework]
    value = tree["kernel"]
    if framework in ("pytorch", "timm") and value is not None:
        value = value.T
    return {kernel: value, bias: tree["bias"]}


def at_step(framework, gradients, t):
    return theirs(framework, {name: g[t] for name, g in gradients.items()})


def optimizer_names(case):
    return [part.capitalize() for part in case.groups] or ["RMSProp"]
