"""How even the shares of devices are, for any number of them, by arithmetic alone."""

import collections
import itertools
import math
from pathlib import Path
import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from rmsprop_jax import rmsprop, sharding
from rmsprop_jax.sharding._division import division
import trees

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "many-devices.md"
TREES = trees.TREES | {"Llama-7B": trees.llama_7b()}
# Up to how many devices each has at most 1.1 of an equal share, and the most that one has on up to
# 512: the axes of ResNet-50's kernels have 64 to 2048 numbers, those of Llama 4096 and more.
SHARES = {
    "ResNet-50": (82, 1.72),
    "EfficientNet-B7": (251, 1.21),
    "ViT-B/16": (253, 1.17),
    "GPT-2": (376, 1.12),
    "Llama-7B": (512, 1.061),
}


def least(shape, n):
    """What one of n devices has of an array that is cut along one axis, if it is large enough."""
    whole = math.prod(shape)
    cuts = [whole // size * math.ceil(size / n) for size in shape if whole > 127 or size % n == 0]
    return min(cuts, default=whole)


def of_one_device(shape, sizes, pad=True):
    parts = [math.prod(sizes[name] for name in names) for names in division(shape, sizes, pad=pad)]
    return math.prod(-(-size // n) for size, n in zip(shape, parts, strict=True))


def share(name, sizes):
    """How many equal shares of a network's state one device of a mesh has."""
    shapes = collections.Counter(TREES[name])
    held = sum(times * of_one_device(shape, sizes) for shape, times in shapes.items())
    return math.prod(sizes.values()) * held / trees.parameters(TREES[name])


@pytest.mark.parametrize("name", TREES)
def test_no_device_has_much_more_than_its_share(name):
    shapes, whole = collections.Counter(TREES[name]), trees.parameters(TREES[name])
    shares = {}
    for n in range(2, 513):
        held = {shape: of_one_device(shape, {"x": n}) for shape in shapes}
        assert held == {shape: least(shape, n) for shape in shapes}
        shares[n] = n * sum(times * held[shape] for shape, times in shapes.items()) / whole
    up_to, largest = SHARES[name]
    assert max(share for n, share in shares.items() if n <= up_to) <= 1.1
    assert max(shares.values()) <= largest


@pytest.mark.parametrize("name", TREES)
def test_shares_on_meshes_of_two_axes(name):
    """As clusters have them: the devices of a machine, and machines."""
    for x, y in itertools.product((4, 8, 12, 16), (3, 8, 12, 32)):
        assert share(name, {"x": x, "y": y}) <= 1.1


def test_the_table_of_shares_is_computed():
    """Of one axis, or two, and the number of devices up to which none has more than 1.1."""
    section = PAGE.read_text().split("## How even the shares are\n")[1].split("\n## ")[0]
    lines = [line.strip("| ") for line in section.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    sizes_of = [map(int, re.findall(r"\d+", cell)) for cell in header[1:-1]]
    meshes = [dict(zip("xy", sizes, strict=False)) for sizes in sizes_of]
    assert {row[0] for row in rows} == {*TREES}
    for name, *shares, up_to in rows:
        assert shares == [f"{share(name, sizes):.3f}" for sizes in meshes]
        assert int(up_to) == SHARES[name][0]


def test_several_axes_of_a_mesh():
    """They divide one axis of an array or one each, all or some, whichever leaves the least."""
    x4_y2 = {"x": 4, "y": 2}
    assert division((16, 24), x4_y2, pad=False) == (("x", "y"), ())
    assert division((12, 12), x4_y2, pad=False) == (("x",), ("y",))
    assert division((6, 12), x4_y2, pad=False) == (("y",), ("x",))
    assert division((12,), x4_y2, pad=False) == (("x",),)
    assert division((12,), x4_y2, pad=True) == ((),)
    assert division((129,), x4_y2, pad=True) == (("x", "y"),)
    assert division((7, 5), x4_y2, pad=True) == ((), ())
    assert division((16, 8), {"x": 8, "y": 1}, pad=False) == (("x", "y"), ())
    assert division((0, 8), x4_y2, pad=True) == division((3, 8), {"x": 1}, pad=True) == ((), ())
    for shape, (a, b) in itertools.product([(4096, 4096), (3, 5, 77), (130,)], [(4, 3), (5, 7)]):
        assert of_one_device(shape, {"x": a, "y": b}) <= least(shape, a * b)


@pytest.mark.parametrize(("n", "share"), [(12, 1.002), (96, 1.005), (384, 1.019)])
def test_shares_of_a_state(n, share):
    """By the public functions, which compile nothing and have no devices."""
    mesh = AbstractMesh((n,), ("x",), axis_types=(AxisType.Auto,))
    whole, kinds = NamedSharding(mesh, P()), {*trees.llama_7b()}
    params = {str(kind): jax.ShapeDtypeStruct(kind, jnp.float32) for kind in kinds}
    plain = rmsprop(0.1, momentum=0.9)
    for tx in (sharding.zero1(plain, mesh, "x"), sharding.zero1_mapped(plain, "x")):
        placed = sharding.state_sharding(tx, params, whole)
        held = 0
        for slot in (placed.nu, placed.trace):
            for name, place in slot.items():
                (axis,) = [axis for axis, entry in enumerate(place.spec) if entry == "x"]
                shape = list(params[name].shape)
                shape[axis] = math.ceil(shape[axis] / n)
                held += math.prod(shape)
        assert held <= share * 2 * trees.parameters(kinds) / n
