"""RMSProp on a tree of parameters, as an Optax gradient transformation."""

from collections.abc import Callable
import itertools
from typing import Any, NamedTuple

import jax
from jax import export
import jax.numpy as jnp
import optax

from rmsprop_jax import _checks, _equations
from rmsprop_jax._storage import FLOAT32, Storage

Scalar = float | jax.Array
ScalarOrSchedule = Scalar | Callable[[jax.Array], Any]


class RMSPropState(NamedTuple):
    """What RMSProp remembers from step to step; what is not in use is None as a whole.

    Attributes:
      count: steps taken, an int32 scalar that stops at its largest value.
      nu: second moment of the gradient, or its variance if centered. A tree like the
        parameters, placed like them; real; float32, or float64 for float64 parameters.
      mu: mean of the gradient, if centered. Like nu, but complex where a parameter is.
      trace: momentum buffer, if there is momentum. Like mu; the parameters move against it.
      weight_sum: sum of the weights of the gradients in nu, if the bias is corrected. A scalar
        of the widest dtype in nu.
    """

    count: jax.Array
    nu: Any
    mu: Any
    trace: Any
    weight_sum: jax.Array | None


export.register_namedtuple_serialization(RMSPropState, serialized_name="rmsprop_jax.RMSPropState")


def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    lr_in_momentum: bool = True,
    weight_decay: ScalarOrSchedule | None = None,
    decoupled_weight_decay: bool = False,
    cautious: bool = False,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp, in every form that a framework or paper gives it."""
    hyper = _equations.Hyper(learning_rate, decay, eps, momentum, weight_decay)
    hyper = _equations.Hyper(
        *(
            None if h is None and name in _OPTIONAL else _checked(name, h)
            for name, h in hyper._asdict().items()
        )
    )
    initial_scale = _checks.number("initial_scale", initial_scale, 0, schedule=False)
    centered = _checks.flag("centered", centered)
    bias_correction = _checks.flag("bias_correction", bias_correction)
    variant = _equations.Variant(
        eps_in_sqrt=_checks.flag("eps_in_sqrt", eps_in_sqrt),
        nesterov=_checks.flag("nesterov", nesterov),
        lr_in_momentum=_checks.flag("lr_in_momentum", lr_in_momentum),
        decoupled_weight_decay=_checks.flag("decoupled_weight_decay", decoupled_weight_decay),
        cautious=_checks.flag("cautious", cautious),
        storage=_checks.instance("storage", FLOAT32 if storage is None else storage, Storage),
    )
    for needed, given, name in (
        (nesterov, momentum, "nesterov=True needs momentum"),
        (cautious, momentum, "cautious=True needs momentum"),
        (decoupled_weight_decay, weight_decay, "decoupled_weight_decay=True needs weight_decay"),
    ):
        if needed and given is None:
            raise ValueError(f"{name}, which is None")
    if bias_correction and isinstance(hyper.decay, float) and hyper.decay == 1:
        raise ValueError("bias_correction=True needs decay < 1, got 1: no gradient would count")
    if bias_correction and isinstance(initial_scale, float) and initial_scale != 0:
        raise ValueError(
            f"bias_correction=True removes the start value: initial_scale must be 0, "
            f"got {initial_scale}"
        )

    def init(params: optax.Params) -> RMSPropState:
        jax.tree_util.tree_map_with_path(_checks.parameter, params)

        def slots(value: Scalar, *, signed: bool) -> Any:
            return jax.tree.map(lambda p: variant.storage.init(p, value, signed=signed), params)

        nu = slots(initial_scale, signed=False)
        widest = jnp.result_type(jnp.float32, *map(variant.storage.dtype, jax.tree.leaves(nu)))
        return RMSPropState(
            count=jnp.zeros([], jnp.int32),
            nu=nu,
            mu=slots(0.0, signed=True) if centered else None,
            trace=slots(0.0, signed=True) if momentum is not None else None,
            weight_sum=jnp.zeros([], widest) if bias_correction else None,
        )

    def update(
        updates: optax.Updates,
        state: RMSPropState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RMSPropState]:
        del extra_args
        in_use = {"mu": centered, "trace": momentum is not None, "weight_sum": bias_correction}
        _checks.state(state, RMSPropState, in_use)
        if weight_decay is None:
            params = None
        elif params is None:
            raise ValueError("weight_decay needs the parameters: call update(grads, state, params)")

        trees = {"params": params, "nu": state.nu, "mu": state.mu, "trace": state.trace}
        columns = (
            itertools.repeat(None)
            if tree is None
            else _checks.beside(updates, tree, name, real=name == "nu")
            for name, tree in trees.items()
        )
        grads, structure = jax.tree.flatten(updates, is_leaf=lambda leaf: leaf is None)
        # A schedule may mix dtypes as it likes, whatever the user asks of his own code.
        with jax.numpy_dtype_promotion("standard"):
            scalars = _equations.Hyper(
                *(_at(state.count, name, h) for name, h in hyper._asdict().items())
            )
            weight_sum = state.weight_sum
            if weight_sum is not None:
                scalars, weight_sum = _equations.correct_bias(scalars, weight_sum)
            steps, slots = [], []
            for g, x, *old in zip(grads, *columns, strict=False):
                if g is None:
                    u, new = None, _equations.Slots(*old)
                else:
                    u, new = _equations.step(g, x, _equations.Slots(*old), scalars, variant)
                steps.append(u)
                slots.append(new)

        def tree_of(field: str) -> Any:
            return structure.unflatten([getattr(slot, field) for slot in slots])

        return structure.unflatten(steps), RMSPropState(
            count=_increment(state.count),
            nu=tree_of("nu"),
            mu=tree_of("mu") if centered else None,
            trace=tree_of("trace") if momentum is not None else None,
            weight_sum=weight_sum,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_rms(
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The root mean square scaling of rmsprop, without a learning rate."""
    return rmsprop(
        -1.0,
        decay,
        eps,
        initial_scale,
        eps_in_sqrt,
        centered,
        bias_correction=bias_correction,
        storage=storage,
    )


_increment = jax.jit(optax.safe_increment)
_BOUNDS = {"decay": (0, 1), "eps": (0,), "momentum": (0,), "weight_decay": (0,)}
_OPTIONAL = ("momentum", "weight_decay")


def _checked(name: str, value: Any, *, schedule: bool = True) -> Any:
    return _checks.number(name, value, *_BOUNDS.get(name, ()), schedule=schedule)


def _at(count: jax.Array, name: str, value: Any) -> jax.Array | None:
    """A hyperparameter in the step after count others, as an array."""
    if callable(value):
        value = _checked(name, value(count), schedule=False)
    return jnp.asarray(value, float) if isinstance(value, float) else value
