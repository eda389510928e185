"""The names in a PyTorch model's ``state_dict()``: running statistics, and prefixes of wrappers."""

from collections.abc import Iterable

from rmsprop_jax.convert._mapping import LeafMapping, Name, as_leaf, names_of

_BATCHES = "num_batches_tracked"
_STATISTICS = ("running_mean", "running_var", _BATCHES)


def of_a_kind(names: Iterable[Name], mapping: LeafMapping) -> list[Name]:
    """The names of parameters, of running statistics, or of both, whichever a mapping has.

    Names of a number of batches, which has no counterpart in Flax, are left out.
    """
    wanted = _wanted(mapping)
    kinds = {_last(name) in _STATISTICS for name in wanted}
    return [
        name
        for name in names
        if name in wanted
        or not wanted
        or (_last(name) != _BATCHES and (_last(name) in _STATISTICS) in kinds)
    ]


def bare(names: Iterable[Name]) -> list[Name]:
    """Names without the prefixes of wrappers.

    ``torch.compile`` may wrap a part of a model; ``DataParallel``, distributed or not, wraps the
    whole model.
    """
    return [_whole(_compiled(name)) for name in names]


def refuse_prefixes(names: Iterable[Name], mapping: LeafMapping, argument: str) -> None:
    """Refuses names that a mapping has only without the prefixes of wrappers."""
    names = list(names)
    missing = _wanted(mapping) - set(names)
    if not missing or not missing <= set(bare(names)):
        return
    found, how = [], "name"
    if any(_compiled(name) != name for name in names):
        found, how = ["'_orig_mod.' of torch.compile"], how + ".replace('_orig_mod.', '')"
    if any(_whole(_compiled(name)) != _compiled(name) for name in names):
        found, how = [*found, "'module.' of DataParallel"], how + ".removeprefix('module.')"
    raise ValueError(
        f"{argument} must be those of mapping, without {' and '.join(found)}, got "
        f"{names[0]!r}: use {how} for each name"
    )


def _compiled(name: Name) -> Name:
    return name.replace("_orig_mod.", "") if isinstance(name, str) else name


def _whole(name: Name) -> Name:
    return name.removeprefix("module.") if isinstance(name, str) else name


def _wanted(mapping: LeafMapping) -> set[Name]:
    return set(names_of(map(as_leaf, mapping.values())))


def _last(name: Name) -> str:
    return str(name).rpartition(".")[2]
