"""The options in ``get_config()`` of Keras's RMSprop, as arguments of its dialect."""

from collections.abc import Mapping
from typing import Any

# What tx needs besides the rule, for what Keras does within the optimizer.
_WRAPPERS = {
    "clipnorm": "optax.chain(optax.stateless_with_tree_map(lambda g, _: "
    "optax.projections.projection_l2_ball(g, {})), tx)",
    "clipvalue": "optax.chain(optax.clip({}), tx)",
    "global_clipnorm": "optax.chain(optax.clip_by_global_norm({}), tx)",
    "gradient_accumulation_steps": "optax.MultiSteps(tx, {}), and pass the same to from_keras",
    "use_ema": "optax.incremental_update(params, average, 1 - ema_momentum) after each step, and "
    "pass ignore=('average',) to from_keras",
}
_RULE = ("rho", "momentum", "epsilon", "centered", "weight_decay")


def keras_options(config: Mapping[str, Any], **instead: Any) -> dict[str, Any]:
    """Returns the arguments of ``dialects.keras`` for an ``optimizer.get_config()``.

    The learning rate is the one that the optimizer had then. Variables passed to
    ``exclude_from_weight_decay`` are not in a config. ``loss_scale_factor`` does not change the
    rule.

    Args:
      config: that of ``keras.optimizers.RMSprop``, or of a ``LossScaleOptimizer`` around one; as
        Keras serializes an optimizer, with "class_name" and "config", or only the latter's content.
      **instead: values that replace those of config, such as ``learning_rate=schedule`` if config
        has a Keras schedule, or ``clipnorm=None`` if tx clips in another way.

    Returns:
      learning_rate, rho, momentum, epsilon, centered and weight_decay.

    Raises:
      ValueError: if the config is from another optimizer, or has a schedule, clipping, averages of
        weights or accumulated gradients, which are not arguments of ``dialects.keras``. The error
        says what to use instead, and how to get the other options.
      TypeError: if instead has a name that is not in a config of RMSprop.

    Example:
      >>> import optax
      >>> from rmsprop_jax import convert, dialects
      >>> config = {"learning_rate": 0.01, "rho": 0.9, "momentum": 0.5, "epsilon": 1e-7}
      >>> config |= {"centered": False, "weight_decay": None, "clipvalue": 0.5}
      >>> options = convert.keras_options(config, clipvalue=None)
      >>> tx = optax.chain(optax.clip(0.5), dialects.keras(**options))
      >>> options["momentum"]
      0.5
    """
    config = _flat(config)
    if unknown := sorted(set(instead) - {"learning_rate", *_RULE, *_WRAPPERS}):
        raise TypeError(f"{unknown[0]} is in no config of keras.optimizers.RMSprop")
    config |= instead
    if missing := sorted({"learning_rate", *_RULE} - set(config)):
        raise ValueError(
            f"config has no {missing[0]!r}, which Keras 3's RMSprop has: it is from another "
            f"optimizer or version; it has {sorted(config)}"
        )
    for name, wrapper in _WRAPPERS.items():
        if (value := config.get(name)) is not None and value is not False:
            raise ValueError(
                f"config has {name}={value}, which is not an argument of dialects.keras. Use "
                f"{wrapper.format(value)}; for the other options, keras_options(config, "
                f"{name}=None)"
            )
    rate = config["learning_rate"]
    if isinstance(rate, Mapping):
        raise ValueError(
            f"config has the schedule {rate.get('class_name')!r} as learning_rate, with "
            f"{rate.get('config')}: pass it as a function of the number of steps, like those of "
            "optax, by keras_options(config, learning_rate=schedule)"
        )
    options = {name: config[name] for name in _RULE}
    numbers = {n: v if v is None or isinstance(v, bool) else float(v) for n, v in options.items()}
    return {"learning_rate": rate if callable(rate) else float(rate), **numbers}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat config of the RMSprop in what Keras serializes."""
    while True:
        name = config.get("class_name", "RMSprop")
        if name not in ("RMSprop", "LossScaleOptimizer"):
            raise ValueError(f"config must be of an RMSprop, got one of {name!r}")
        inner = config.get("config", config.get("inner_optimizer"))
        if not isinstance(inner, Mapping):
            return dict(config)
        config = inner
