"""The ``state_dict()`` of ``torch.optim.RMSprop`` and of timm's ``RMSpropTF``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from rmsprop_jax._rule import Rule, rules_of
from rmsprop_jax.convert._entries import SLOTS, check_ignore, check_slots, entry_of
from rmsprop_jax.convert._flattened import flattened, is_flattened, nested
from rmsprop_jax.convert._foreign import Entry, Foreign
from rmsprop_jax.convert._groups import (
    Group,
    check_rules,
    check_state_dict,
    lr_in_momentum,
    pytorch_rule,
    timm_rule,
)
from rmsprop_jax.convert._mapping import LeafMapping, Name, as_leaf
from rmsprop_jax.convert._names import bare, of_a_kind, refuse_prefixes
from rmsprop_jax.convert._state import to_ours, to_theirs

StateDict = Mapping[str, Any]


def from_pytorch(
    state_dict: StateDict,
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
    *,
    names: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    strict: bool = True,
) -> optax.OptState:
    """Converts the state of ``torch.optim.RMSprop``, so that training continues in JAX.

    s is ``square_avg``, minus ``grad_avg`` squared if centered. b is ``momentum_buffer``, which
    does not contain the learning rate. If the buffer of tx does, b is multiplied by tx's learning
    rate after the same number of steps: the next step is then that of PyTorch, and so are later
    ones while the learning rate stays the same.

    Args:
      state_dict: that of the optimizer: ``optimizer.state_dict()``, or a file of it read with
        ``torch.load(path, weights_only=True)``. Or one keyed by names, as returned by
        ``get_optimizer_state_dict`` of ``torch.distributed.checkpoint.state_dict``, not sharded
        (``full_state_dict=True``); it may be flattened.
      params: tree of parameters, of which only the structure, shapes, dtypes and placement matter.
      mapping: for each leaf of params, by its path such as "layer/kernel", the name or number of
        PyTorch's parameter, or a :class:`Leaf` if the layouts differ.
      tx: the transformation to continue with, usually ``dialects.pytorch(...)``. It may be wrapped:
        every RMSPropState in its state is filled, schedules of ``optax.inject_hyperparams``
        continue, and everything else is as ``init`` makes it. If groups differ, use
        ``optax.partition``.
      names: PyTorch's names in the order of the optimizer's parameters, group by group. If that is
        the order of the model, ``[n for n, _ in model.named_parameters()]``; otherwise, with
        ``name = {p: n for n, p in model.named_parameters()}``, ``[name[p] for group in
        optimizer.param_groups for p in group["params"]]``. If no layers share parameters,
        ``list(model.state_dict())`` works like the first: names that end in running_mean,
        running_var or num_batches_tracked are ignored. Needed if mapping has names and state_dict
        does not.
      ignore: "momentum_buffer", "grad_avg" or both, to drop them where a group does not use them:
        PyTorch keeps them when momentum or centered is switched off in mid-run.
      strict: whether tx must follow the rule of PyTorch's groups, except for the numbers in it.

    Returns:
      The state of tx. A parameter that has not taken a step starts as in ``tx.init``.

    Raises:
      ValueError: if an entry is missing, left over, of the wrong shape or from another optimizer,
        or if tx cannot express its content. Nothing is converted then.
      TypeError: if tx is not a transformation of this library.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import convert, dialects
      >>> params, mapping, tx = {"w": jnp.ones(2)}, {"w": 0}, dialects.pytorch()
      >>> group = {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "params": [0]}
      >>> held = {0: {"step": 5, "square_avg": [4.0, 9.0]}}
      >>> state_dict = {"state": held, "param_groups": [group]}
      >>> state = convert.from_pytorch(state_dict, params, mapping, tx)
      >>> print(state.count, state.nu["w"])
      5 [4. 9.]
    """
    return _from(state_dict, params, mapping, tx, names, ignore, strict, pytorch_rule)


def to_pytorch(
    state: optax.OptState,
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
    *,
    param_groups: Sequence[Group] | StateDict,
    names: Sequence[str] | None = None,
    tensor: Callable[[np.ndarray], Any] = np.asarray,
    strict: bool = True,
) -> dict[str, Any]:
    """Converts a state to PyTorch: the inverse of :func:`from_pytorch`.

    Args:
      state: the state of tx.
      params: tree of parameters, as in :func:`from_pytorch`.
      mapping: as in :func:`from_pytorch`.
      tx: the transformation that the state belongs to.
      param_groups: those of the optimizer that is to continue,
        ``optimizer.state_dict()["param_groups"]``. Or its flattened state, of which only the groups
        matter.
      names: as in :func:`from_pytorch`.
      tensor: function that turns an array into a PyTorch tensor, ``torch.tensor``.
      strict: whether tx must follow the rule of the groups, except for the numbers in it.

    Returns:
      The argument of ``optimizer.load_state_dict``, with which ``torch.optim.RMSprop`` continues.
      If param_groups has names, that of ``set_optimizer_state_dict``, with the keys of its form.

    Raises:
      ValueError, TypeError: as in :func:`from_pytorch`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import convert, dialects
      >>> params, mapping, tx = {"w": jnp.ones(2)}, {"w": 0}, dialects.pytorch()
      >>> group = {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "params": [0]}
      >>> state = tx.init(params)
      >>> state_dict = convert.to_pytorch(state, params, mapping, tx, param_groups=[group])
      >>> print(state_dict["state"][0]["square_avg"])
      [0. 0.]
    """
    return _to(state, params, mapping, tx, param_groups, names, tensor, strict, pytorch_rule)


def from_timm(
    state_dict: StateDict,
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
    *,
    names: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    strict: bool = True,
) -> optax.OptState:
    """Converts the state of timm's ``RMSpropTF``, whose buffer may contain the learning rate.

    Args, Returns, Raises: as in :func:`from_pytorch`; tx is usually ``dialects.timm(...)``.
    """
    return _from(state_dict, params, mapping, tx, names, ignore, strict, timm_rule)


def to_timm(
    state: optax.OptState,
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
    *,
    param_groups: Sequence[Group] | StateDict,
    names: Sequence[str] | None = None,
    tensor: Callable[[np.ndarray], Any] = np.asarray,
    strict: bool = True,
) -> dict[str, Any]:
    """Converts a state to timm's ``RMSpropTF``: the inverse of :func:`from_timm`.

    Args, Returns, Raises: as in :func:`to_pytorch`.
    """
    return _to(state, params, mapping, tx, param_groups, names, tensor, strict, timm_rule)


def _from(
    state_dict: StateDict,
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
    names: Sequence[str] | None,
    ignore: Sequence[str],
    strict: bool,
    rule_of: Callable[[Group], Rule],
) -> optax.OptState:
    check_ignore(ignore)
    if is_flattened(state_dict):
        state_dict = nested(state_dict, "state_dict")
    check_state_dict(state_dict)
    held, groups = dict(state_dict["state"]), state_dict["param_groups"]
    rules = rules_of(tx, params)
    if strict:
        check_rules(groups, rules, rule_of)
    inside = lr_in_momentum(groups, rule_of)
    entries: dict[Name, Entry | None] = {}
    steps = [0]
    for number, name, group in _numbered(groups, names, mapping):
        slots = held.pop(number, None)
        entries[name] = None
        if slots is not None:
            what, rule = f"state[{number!r}]", rule_of(group)
            entries[name], step = entry_of(slots, what, rule, ignore)
            steps.append(step)
    if held:
        raise ValueError(
            f"state_dict has a state for {sorted(held, key=str)}, which is in no group"
        )
    return to_ours(Foreign(entries, max(steps), inside), params, mapping, tx)


def _to(
    state: optax.OptState,
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
    param_groups: Sequence[Group] | StateDict,
    names: Sequence[str] | None,
    tensor: Callable[[np.ndarray], Any],
    strict: bool,
    rule_of: Callable[[Group], Rule],
) -> dict[str, Any]:
    if isinstance(param_groups, Mapping):
        groups: Sequence[Group] = nested(param_groups, "param_groups")["param_groups"]
    else:
        groups = param_groups
    rules = rules_of(tx, params)
    if strict:
        check_rules(groups, rules, rule_of)
    inside = lr_in_momentum(groups, rule_of)
    foreign = to_theirs(state, params, mapping, tx, lr_in_momentum=inside)
    entries = dict(foreign.entries)
    held = {}
    for number, name, group in _numbered(groups, names, mapping):
        if name not in entries:
            raise ValueError(f"mapping has no entry for {name!r}")
        if (entry := entries.pop(name)) is None:
            continue
        slots = {
            key: getattr(entry, field)
            for field, key in SLOTS.items()
            if getattr(entry, field) is not None
        }
        check_slots({"step", *slots}, f"the state for {name!r}", rule_of(group))
        step = np.asarray(foreign.steps, np.float32)
        held[number] = {"step": tensor(step)} | {key: tensor(a) for key, a in slots.items()}
    if left := sorted((name for name, entry in entries.items() if entry is not None), key=str):
        raise ValueError(f"mapping names {left}, which is in no group")
    if isinstance(param_groups, Mapping):
        return flattened(held, groups)
    return {"state": held, "param_groups": [dict(group) for group in groups]}


def _numbered(
    groups: Sequence[Group], names: Sequence[str] | None, mapping: LeafMapping
) -> Iterator[tuple[int, Name, Group]]:
    """The number in the state, the name and the group of each parameter.

    The name is the number if the mapping has numbers. In groups keyed by names, these serve as
    numbers.
    """
    numbers = [number for group in groups for number in group["params"]]
    known = [name for group in groups for name in group.get("param_names") or ()]
    if numbers and all(isinstance(number, str) for number in numbers):
        known = numbers
    if names is not None:
        given = of_a_kind(names, mapping)
        if len(given) != len(numbers):
            raise ValueError(f"names must be those of {len(numbers)} parameters, got {len(given)}")
        if known and bare(given) != bare(known):
            raise ValueError(f"names must be those of param_groups, {known}, got {given}")
        known = given
    if all(isinstance(as_leaf(leaf).name, int) for leaf in mapping.values()):
        named = dict(zip(numbers, numbers, strict=True))
    elif known:
        refuse_prefixes(known, mapping, "names")
        named = dict(zip(numbers, known, strict=True))
    else:
        raise ValueError("names are needed: mapping has names, but the optimizer does not")
    for group in groups:
        for number in group["params"]:
            yield number, named[number], group
