"""The description of a transformation: its equations and hyperparameters, as text."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax

from rmsprop_jax._asking import ask, ask_without_params, report, reports
from rmsprop_jax._rule import Rule, is_ours, some_rules
from rmsprop_jax._storage import FLOAT32


def describe(tx: optax.GradientTransformation, params: optax.Params | None = None) -> str:
    """Describes the RMSProp inside a transformation: its equations and hyperparameters, as text.

    Args:
      tx: what :func:`rmsprop_jax.rmsprop`, a dialect or a recipe returns, also inside
        ``optax.chain``, ``optax.partition``, ``optax.inject_hyperparams`` or any other wrapper.
      params: tree of parameters, of which only the structure, shapes and dtypes matter. Needed only
        if a wrapper does not work without its own tree, for instance one with a tree of labels.

    Returns:
      One line for each equation, in the order of computation, then the start value and the
      hyperparameters. There is one such paragraph for each distinct RMSProp in tx. The other
      transformations in a chain are counted but not described, nor is what a wrapper does, except
      :func:`rmsprop_jax.low_memory.master_weights`, whose number of bits is given.

    Raises:
      TypeError: if tx contains no RMSProp of this library.
      ValueError: if params are needed but missing.

    Example:
      >>> import optax
      >>> from rmsprop_jax import describe, dialects, rmsprop
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
      >>> print(describe(optax.chain(optax.clip(1.0), rmsprop(0.1))))
      s <- decay s + (1 - decay) |g|^2
      x <- x - learning_rate g / sqrt(s + eps)
      from s = 0
      with learning_rate 0.1, decay 0.9, eps 1e-08
      and 1 other transformation before it, not described
    """
    if not callable(getattr(tx, "init", None)):
        some_rules(tx, [])

    def init(params: optax.Params) -> optax.OptState:
        with reports() as found:
            state = tx.init(params)
        words = {
            id(made): f"\n{part.in_words()}" for part, made in found if hasattr(part, "in_words")
        }
        others = dict(_others(words, state))
        for part, made in found:
            if isinstance(part, Rule):
                report(_Told(part, others.get(id(made), "")))
        return state

    told: Any = ask_without_params(init) if params is None else ask(init, params)[0]
    if told is None:
        raise ValueError(
            "params must be given: a wrapper in tx does not work without its tree of parameters"
        )
    some_rules(tx, [part for part, _ in told])
    return "\n\n".join(dict.fromkeys(_paragraph(rule) + others for rule, others in told))


class _Told(NamedTuple):
    """A rule, and the text about what surrounds it."""

    part: Rule
    others: str


def _others(
    words: dict[int, str], state: Any, before: int = 0, after: int = 0
) -> Iterator[tuple[int, str]]:
    """The id of each RMSProp state inside another state, and the text about what surrounds it.

    That text is what the wrappers say of themselves, found by the ids of their states, and the
    number of other transformations in the chain.
    """
    if is_ours(state):
        counts = [(n, where) for n, where in ((before, "before"), (after, "after")) if n]
        links = [f"{n} other transformation{'s' * (n > 1)} {where} it" for n, where in counts]
        yield id(state), f"\nand {' and '.join(links)}, not described" if links else ""
    elif isinstance(state, optax.transforms.PartitionState):  # of transformations side by side
        for link in state.inner_states.values():
            yield from _others(words, link, before, after)
    elif type(state) is tuple or isinstance(state, dict):  # of optax.chain and optax.named_chain
        all_links = list(state.values() if isinstance(state, dict) else state)
        ours = [any(map(is_ours, jax.tree.leaves(link, is_leaf=is_ours))) for link in all_links]
        for i, link in enumerate(all_links):
            yield from _others(
                words, link, before + ours[:i].count(False), after + ours[i + 1 :].count(False)
            )
    else:
        for part in jax.tree.leaves(state, is_leaf=lambda node: node is not state):
            if part is not state:
                for held, around in _others(words, part, before, after):
                    yield held, words.get(id(state), "") + around


def _paragraph(rule: Rule) -> str:
    variant, hyper = rule.variant, rule.hyper
    square = "g^2" if variant.split_complex else "|g|^2"
    average = "s" if not (variant.centered or variant.bias_correction) else "v"
    weight = " / w" if variant.bias_correction else ""
    root = "sqrt(s + eps)" if variant.eps_in_sqrt else "(sqrt(s) + eps)"
    inside, outside = ("learning_rate ", "")[:: 1 if variant.lr_in_momentum else -1]
    step = f"{inside}g / {root}"

    lines = []
    if variant.maximize:
        lines.append("g <- -g")
    if hyper.weight_decay is not None and not variant.decoupled_weight_decay:
        lines.append("g <- g + weight_decay x")
    lines.append(f"{average} <- decay {average} + (1 - decay) {square}")
    if variant.centered:
        lines.append("m <- decay m + (1 - decay) g")
    if variant.bias_correction:
        lines.append("w <- decay w + (1 - decay)")
    if average == "v":
        left, right = "||" if not variant.split_complex else "()" if weight else ("", "")
        less = f" - {left}m{weight}{right}^2" if variant.centered else ""
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
    if variant.storage != FLOAT32:
        lines.append(f"held by {variant.storage!r}")
    return "\n".join(lines)


def _value(hyperparameter: Any) -> str:
    if callable(hyperparameter):
        return "a schedule"
    return f"{hyperparameter:.15g}" if isinstance(hyperparameter, float) else "an array"
