"""Which mesh axes divide which axes of an array, and what part a device then has of it."""

from collections.abc import Mapping, Sequence
import functools
import itertools
import math

from jax.sharding import NamedSharding

Shape = tuple[int, ...]
Division = tuple[tuple[str, ...], ...]  # for each axis of an array, the mesh axes that divide it

WORTH_PADDING = 128  # elements of an array


def division(shape: Sequence[int], sizes: Mapping[str, int], *, pad: bool) -> Division:
    """The division that leaves the least of an array on a device.

    Each axis of the mesh, whose sizes are given, divides one axis of the array, or none. Among
    several ways that leave equally little, the first one that divides the fewest axes is taken.

    With pad, either all axes of the mesh divide an array or none does, so that no part is held
    twice; and an array of 128 elements or more need not be divided evenly: its last parts may be
    padded.
    """
    return _division(tuple(shape), tuple(sizes.items()), pad)


def part_of(sharding: NamedSharding, shape: Shape) -> Shape:
    """The shape of the part of an array that a device has, padded if necessary."""
    return _part_shape(shape, _parts(sharding, len(shape)))


def whole_of(sharding: NamedSharding, part: Shape) -> Shape:
    """The shape of an array of which each device has a part of this shape."""
    return tuple(size * n for size, n in zip(part, _parts(sharding, len(part)), strict=True))


def is_even(sharding: NamedSharding, shape: Shape) -> bool:
    """Whether a sharding has no more axes than a shape, and all shards have the same size."""
    return len(sharding.spec) <= len(shape) and _divides(shape, _parts(sharding, len(shape)))


def filled_shape(sharding: NamedSharding, shape: Shape) -> Shape:
    """The shape of an array that is padded so that a sharding divides it."""
    return whole_of(sharding, part_of(sharding, shape))


def mesh_axes(sharding: NamedSharding, rank: int) -> list[tuple[str, ...]]:
    """The axes of the mesh for each axis of an array."""
    spec = [
        entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        for entry in sharding.spec
    ]
    return spec + [()] * (rank - len(spec))


@functools.lru_cache(maxsize=4096)
def _division(shape: tuple[int, ...], sizes: tuple[tuple[str, int], ...], pad: bool) -> Division:
    nowhere = len(shape)
    fill = pad and math.prod(shape) >= WORTH_PADDING

    def cost(choice: tuple[int, ...]) -> tuple[float, bool, int, tuple[int, ...]]:
        parts = [1] * nowhere
        for axis, (_, n) in zip(choice, sizes, strict=True):
            if axis != nowhere:
                parts[axis] *= n
        even, some = _divides(shape, parts), pad and len({*choice}) > 1 and nowhere in choice
        allowed = (even or fill) and not some
        numbers = math.prod(_part_shape(shape, parts)) if allowed else math.inf
        return numbers, not even, len({*choice}), choice

    if 0 in shape or math.prod(n for _, n in sizes) == 1:
        return ((),) * nowhere
    best = min(itertools.product(range(nowhere + 1), repeat=len(sizes)), key=cost)
    return tuple(
        tuple(name for at, (name, _) in zip(best, sizes, strict=True) if at == axis)
        for axis in range(nowhere)
    )


def _parts(sharding: NamedSharding, rank: int) -> list[int]:
    """The number of parts into which a sharding divides each axis of an array."""
    sizes = sharding.mesh.shape
    return [math.prod(sizes[name] for name in names) for names in mesh_axes(sharding, rank)][:rank]


def _part_shape(shape: Sequence[int], parts: Sequence[int]) -> tuple[int, ...]:
    """The shape of a part of an array, the last of which may be padded."""
    return tuple(-(-size // n) for size, n in zip(shape, parts, strict=True))


def _divides(shape: Sequence[int], parts: Sequence[int]) -> bool:
    """Whether no padding is needed."""
    return all(size % n == 0 for size, n in zip(shape, parts, strict=True))
