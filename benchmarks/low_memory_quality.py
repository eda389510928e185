"""Does training with a small state end where it ends in float32? Test losses, paired by seed.

    python benchmarks/low_memory_quality.py            # writes results/low_memory_quality.json
    python benchmarks/low_memory_quality.py --quick    # checks that it runs, writes nothing

In each task and for each seed, every method starts from the same parameters and sees the same
batches. The comparison is between losses on the whole test set after the last step: the ratio to
float32's loss for the same seed, less 1, as the mean over the seeds with the 95% interval of
Student's t. A method trains like float32 if that interval lies within -3% to 3%. This margin is the
same for all tasks and was fixed before any method was run: a smaller difference would also come
from another seed or a slightly different learning rate. The margin has two sides, so a method with
a lower loss can fail: its steps are not those of float32. The learning rates fall linearly to 0.
They are the best of a few in float32, chosen on other seeds than the ones reported.

Three methods are not ours. Two are negative controls, which must fail somewhere; otherwise the
comparison could not tell good from bad. One rounds bfloat16 to nearest: an average then stands
still once a step changes it by less than half the distance to its neighbour. The other always
rounds 8 bits up: an average then never falls. The third method is the rule of bitsandbytes'
RMSprop8bit on a GPU, written after its source, version 0.50.2 (``functional.create_dynamic_map``,
``optim/optimizer.py``, ``csrc/kernels.cu``). It keeps only second moments in 8 bits, in leaves of
4096 elements or more. A code stands for the nearest number of a signed table, of which second
moments use half. Blocks of 256 consecutive elements each have their largest element in float32. The
step is taken before rounding. All methods have eps 1e-8 outside the root and decay 0.99, the
defaults there, except for the regression, whose decay is 0.999.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
import optax
from tqdm import tqdm

from _paired import SEEDS, columns, trained
import _results
from _tasks import Params, Task, clothes, lstm, real_data, regression, words
from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._storage import (
    FLOAT32,
    Copies,
    Draw,
    Float32,
    Lazy,
    Packed,
    Slot,
    Storage,
    full_like,
    is_packed,
    slots_of,
)

BLOCK = 256  # elements that share a scale
MIN_SIZE = 4096  # leaves of fewer elements stay in float32, as in q8


class Rounded(Float32):
    """A storage that adds in float32 and keeps the sum rounded."""

    dtypes = FLOAT32.dtypes | {jnp.dtype(jnp.bfloat16)}

    def decode(self, slot: Slot) -> jax.Array:
        """The values that a slot contains, in float32."""
        raise NotImplementedError

    def encode(self, value: jax.Array) -> Slot:
        """A slot that contains the values, rounded."""
        raise NotImplementedError

    def dtype(self, slot: Slot) -> jnp.dtype:  # noqa: ARG002
        """Float32, however the slot is stored."""
        return jnp.dtype(jnp.float32)

    def accumulate(
        self,
        slot: Slot,
        decay: jax.Array,
        term: Lazy,
        bound: float | None = None,
        *,
        low: jax.Array | None = None,
        draw: Draw | None = None,  # noqa: ARG002
    ) -> tuple[Copies, Slot]:
        """The exact sum, and the slot with the rounded one."""
        if isinstance(slot, jax.Array) and slot.dtype == jnp.float32:
            return FLOAT32.accumulate(slot, decay, term, bound, low=low)
        value, _ = FLOAT32.accumulate(self.decode(slot), decay, term, bound, low=low)
        return value, self.encode(value(0))


@dataclasses.dataclass(frozen=True)
class Nearest(Rounded):
    """Every slot in bfloat16, rounded to nearest."""

    def init(self, param: jax.Array, value: Any, **_: Any) -> jax.Array:
        """A slot filled with value."""
        return full_like(param, value, jnp.bfloat16)

    def decode(self, slot: jax.Array) -> jax.Array:
        """The values, without loss."""
        return slot.astype(jnp.float32)

    def encode(self, value: jax.Array) -> jax.Array:
        """The elements rounded to nearest, halves to even."""
        return value.astype(jnp.bfloat16)


@Packed.register
class Coded(NamedTuple):
    """Indices into a table, uint8 of the parameter's shape, and a float32 scale for each block."""

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the values."""
        return self.scales.dtype


@dataclasses.dataclass(frozen=True)
class Table(Rounded):
    """Second moments as entries of a table from 0 to 1, times a scale for each block of 256.

    Either the nearest entry, times the largest element of the block; or the next entry up, times a
    power of two, so that an element that is in the table does not change with its neighbours.
    """

    numbers: tuple[float, ...]
    up: bool

    def init(self, param: jax.Array, value: Any, *, field: str = "nu", **_: Any) -> Slot:
        """A slot filled with value; float32 for other slots than nu and for small leaves."""
        wide = FLOAT32.init(param, value)
        return self.encode(wide) if field == "nu" and param.size >= MIN_SIZE else wide

    def decode(self, slot: Coded) -> jax.Array:
        """Entry times scale."""
        values = jnp.asarray(self.numbers, jnp.float32)[_blocks(slot.codes)]
        return _unblocked(values * slot.scales[:, None], slot.shape)

    def encode(self, value: jax.Array) -> Coded:
        """The nearest entry of the table, the lower one of two equally near, or the next one up."""
        x = _blocks(value)
        scales = jnp.max(x, axis=1)
        if self.up:
            scales = jnp.ldexp(jnp.float32(1), jnp.frexp(scales)[1])
        x = x / jnp.where(scales > 0, scales, 1)[:, None]
        numbers = np.array(self.numbers, np.float32)
        edges = numbers[:-1] if self.up else (numbers[:-1] + numbers[1:]) / 2
        codes = jnp.searchsorted(jnp.asarray(edges), x, method="scan_unrolled")
        return Coded(_unblocked(codes.astype(jnp.uint8), value.shape), scales)


def _blocks(x: jax.Array) -> jax.Array:
    """The elements in memory order, in rows of 256; the last row is padded with zeros."""
    return jnp.pad(x.ravel(), (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def _unblocked(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return x.ravel()[: np.prod(shape)].reshape(shape)


def dynamic_map() -> tuple[float, ...]:
    """The 129 non-negative numbers of the 256 in bitsandbytes' table.

    The decade that ends at 10^-k has 2^(6 - k) of them: the midpoints of as many equal parts.
    """
    numbers = [0.0, 1.0]
    for k in range(7):
        ends = np.linspace(0.1, 1, 2 ** (6 - k) + 1)
        numbers += list((ends[:-1] + ends[1:]) / 2 * 10.0**-k)
    return tuple(sorted(numbers))


def four_bits() -> tuple[float, ...]:
    """All numbers of 4 significant bits in the 31 octaves below 1, and 0 and 1."""
    return (0.0, *(j / 16 * 2.0**-k for k in range(30, -1, -1) for j in range(8, 16)), 1.0)


METHODS: dict[str, Storage] = {
    "float32": FLOAT32,
    "`low_memory.q8()`": low_memory.q8(min_size=MIN_SIZE),
    "`low_memory.bfloat16()`": low_memory.bfloat16(),
    "bitsandbytes' 8 bits, emulated": Table(dynamic_map(), up=False),
    "control: bfloat16, nearest": Nearest(),
    "control: 8 bits, up": Table(four_bits(), up=True),
}


def optimizer(task: Task, storage: Storage) -> optax.GradientTransformation:
    """RMSProp with a learning rate that falls to 0 by a step count of its own."""
    return optax.chain(
        rmsprop(
            task.learning_rate,
            task.decay,
            eps_in_sqrt=False,
            momentum=task.momentum,
            storage=storage,
        ),
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, task.steps)),
    )


def train(task: Task, storage: Storage, seeds: Iterable[int], bar: tqdm) -> NDArray[np.float64]:
    """The test loss after the last step, for each seed of parameters, batches and rounding."""
    tx = optimizer(task, storage)
    test = jax.device_put(task.test)
    evaluate = jax.jit(task.loss)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, rows: Any, picked: jax.Array) -> Any:
        grads = jax.grad(task.loss)(params, *(array[picked] for array in rows))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    losses = []
    for seed in seeds:
        params = task.init(seed)
        own, *others = tx.init(params)
        # Stochastic rounding depends on the step count, so each seed starts at a count of its own.
        state = (own._replace(count=jnp.int32(seed << 20)), *others)
        params, _ = trained(task, seed, params, state, step)
        losses.append(float(evaluate(params, *test)))
        bar.update()
    return np.array(losses)


def held(task: Task, storage: Storage) -> tuple[float, float]:
    """The share of second moments in fewer than 32 bits, and bytes of state per parameter."""
    params = task.init(0)
    own, *_ = optimizer(task, storage).init(params)
    slots = jax.tree.leaves(slots_of(own.nu), is_leaf=is_packed)
    arrays = [slot.codes if is_packed(slot) else slot for slot in slots]
    small = sum(array.size for array in arrays if array.dtype.itemsize < 4)
    total = sum(param.size for param in jax.tree.leaves(params))
    return small / total, sum(array.nbytes for array in jax.tree.leaves(own)) / total


def compare(task: Task, seeds: Sequence[int], bar: tqdm) -> list[_results.Row]:
    """A row for each method."""
    rows = []
    for name, storage in METHODS.items():
        bar.set_description(f"{task.name}, {name}")
        losses = train(task, storage, seeds, bar)
        if storage is FLOAT32:
            reference = losses
        share, size = held(task, storage)
        row = {
            "task": task.name,
            "state": name,
            "second moments in 8 or 16 bits": f"{share:.1%}",
            "state bytes a parameter": f"{size:.2f}",
        }
        rows.append(row | columns(losses, reference, "float32"))
    return rows


def main(argv: list[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick

    text = real_data.tiny_shakespeare()
    tasks = [clothes(real_data.fashion_mnist()), lstm(text), words(text), regression()]
    seeds = SEEDS
    if quick:
        tasks = [task._replace(steps=3) for task in tasks]
        seeds = SEEDS[:2]
    rows = []
    with tqdm(total=len(tasks) * len(METHODS) * len(seeds), unit="run") as bar:
        for task in tasks:
            rows += compare(task, seeds, bar)
    return _results.finish("low_memory_quality", rows, quick)


if __name__ == "__main__":
    try:
        main()
    except real_data.DataError as error:
        raise SystemExit(f"low_memory_quality.py: {error}") from None
