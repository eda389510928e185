"""Which rule a transformation follows, in words and numbers."""

from typing import Any

import optax

from rmsprop_jax._rule import Rule, rules_of
from rmsprop_jax._storage import FLOAT32


def describe(tx: optax.GradientTransformation) -> str:
    """The equations that a transformation follows, and the numbers in them.

    Args:
      tx: what :func:`rmsprop_jax.rmsprop`, a dialect or a recipe returns, also inside
        ``optax.chain``, ``optax.partition`` and other wrappers that are given it ready-made.

    Returns:
      A line for each equation, in the order in which they act, then the start value and the
      hyperparameters. One such paragraph for each RMSProp that is found; what else is in a chain is
      not told.

    Raises:
      TypeError: if there is none.

    Example:
      >>> from rmsprop_jax import describe, dialects
      >>> print(describe(dialects.pytorch(lr=0.01, momentum=0.9)))
      s <- decay s + (1 - decay) g^2
      b <- momentum b + g / (sqrt(s) + eps)
      x <- x - learning_rate b
      from s = 0
      with learning_rate 0.01, decay 0.99, eps 1e-08, momentum 0.9
      >>> print(describe(dialects.tensorflow_v1(lambda count: 0.01 / (1 + count))))
      s <- decay s + (1 - decay) |g|^2
      x <- x - learning_rate g / sqrt(s + eps)
      from s = 1
      with learning_rate a schedule, decay 0.9, eps 1e-10
    """
    return "\n\n".join(map(_paragraph, rules_of(tx)))


def _paragraph(rule: Rule) -> str:
    variant, hyper = rule.variant, rule.hyper
    square = "g^2" if variant.split_complex else "|g|^2"
    average = "s" if not (rule.centered or rule.bias_correction) else "v"
    weight = " / w" if rule.bias_correction else ""
    root = "sqrt(s + eps)" if variant.eps_in_sqrt else "(sqrt(s) + eps)"
    inside, outside = ("learning_rate ", "")[:: 1 if variant.lr_in_momentum else -1]
    step = f"{inside}g / {root}"

    lines = []
    if variant.maximize:
        lines.append("g <- -g")
    if hyper.weight_decay is not None and not variant.decoupled_weight_decay:
        lines.append("g <- g + weight_decay x")
    lines.append(f"{average} <- decay {average} + (1 - decay) {square}")
    if rule.centered:
        lines.append("m <- decay m + (1 - decay) g")
    if rule.bias_correction:
        lines.append("w <- decay w + (1 - decay)")
    if average == "v":
        left, right = "||" if not variant.split_complex else "()" if weight else ("", "")
        less = f" - {left}m{weight}{right}^2" if rule.centered else ""
        lines.append(f"s = v{weight}{less}")
    if hyper.momentum is not None:
        if variant.nesterov:
            lines.append(f"u = {step}")
            step = "u"
        lines.append(f"b <- momentum b + {step}")
        step = "(u + momentum b)" if variant.nesterov else "b"
    if variant.cautious:
        lines.append(f"c = {step} where it has the sign of g, else 0; / the share where it has")
        step = "c"
    decay = " - learning_rate weight_decay x" if variant.decoupled_weight_decay else ""
    lines.append(f"x <- x - {outside}{step}{decay}")

    numbers = ", ".join(f"{n} {_value(h)}" for n, h in hyper._asdict().items() if h is not None)
    lines += [f"from {average} = {_value(rule.initial_scale)}", f"with {numbers}"]
    if variant.storage is not FLOAT32:
        lines.append(f"held by {variant.storage!r}")
    return "\n".join(lines)


def _value(hyperparameter: Any) -> str:
    if callable(hyperparameter):
        return "a schedule"
    return f"{hyperparameter:.15g}" if isinstance(hyperparameter, float) else "an array"
