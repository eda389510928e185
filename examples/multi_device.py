"""One network trained on many devices in several ways: equal losses, different memory.

    python examples/multi_device.py                                   # Fashion-MNIST, 8 devices
    python examples/multi_device.py --mode fsdp zero1 --data random   # two ways, made-up pictures

The devices are the accelerators of this machine or, if it has none, virtual devices on the CPU;
with JAX_PLATFORMS=cpu they are always virtual. Each way trains the same network in Flax NNX, from
the same start and over the same batches. Prints how many bytes one device holds, some losses on one
device and how far those of each way are from them, and the accuracy on test pictures; ends with the
largest difference of all. Draws the bytes and the differences. Several devices add in a different
order than one, so the losses differ by rounding: about 4e-7 with the default flags. The differences
grow over runs of a thousand steps.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

# Read when jax is imported. Virtual devices wait for each other, each in its own thread. By default
# jax starts no more threads than there are cores, and a step on more devices can hang.
os.environ.setdefault("NPROC", "32")

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from tqdm import tqdm

from drawing import picture
import real_data
from rmsprop_jax import rmsprop, sharding

Params = Any
State = Any
Loss = Callable[..., jax.Array]  # of parameters, pictures and labels
Grad = Callable[..., tuple[jax.Array, Params]]  # of the same; returns the loss first


class Net(nnx.Module):
    """Hidden layers of 256 and 128; smooth, because rounding differences can grow at a kink."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(28 * 28, 256, rngs=rngs)
        self.fc2 = nnx.Linear(256, 128, rngs=rngs)
        self.fc3 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (pictures, 28, 28), 0 to 255, to (pictures, 10)."""
        x = x.reshape(len(x), -1) / 255
        return self.fc3(nnx.tanh(self.fc2(nnx.tanh(self.fc1(x)))))


def step(
    tx: optax.GradientTransformation, grad: Grad, params: Params, state: State, *batch: jax.Array
) -> tuple[Params, State, jax.Array]:
    """The step that every way makes; also returns the loss before it."""
    loss, grads = grad(params, *batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


class Way(NamedTuple):
    """Parameters and state, placed on their devices, and the step, which keeps them there."""

    params: Params
    state: State
    step: Callable[..., tuple[Params, State, jax.Array]]


def one(mesh: Mesh, tx: optax.GradientTransformation, loss: Loss, params: Params) -> Way:
    """The first device does everything."""
    train_step = functools.partial(step, tx, jax.value_and_grad(loss))
    params = jax.device_put(params, mesh.devices.flat[0])
    return Way(params, jax.jit(tx.init)(params), jax.jit(train_step, donate_argnums=(0, 1)))


def pmap(mesh: Mesh, tx: optax.GradientTransformation, loss: Loss, params: Params) -> Way:
    """Each device runs the program on its own entry of the first axis of every array."""
    mapped = functools.partial(jax.pmap, axis_name="data", devices=list(mesh.devices.flat))

    def grad(params: Params, *batch: jax.Array) -> tuple[jax.Array, Params]:
        return lax.pmean(jax.value_and_grad(loss)(params, *batch), "data")

    def train_step(params: Params, state: State, *batch: jax.Array) -> Any:
        return all_step(params, state, *(a.reshape(mesh.size, -1, *a.shape[1:]) for a in batch))

    all_step = mapped(
        functools.partial(step, tx, grad), out_axes=(0, 0, None), donate_argnums=(0, 1)
    )
    init = mapped(lambda _: (params, tx.init(params)))
    params, state = init(np.arange(mesh.size))
    return Way(params, state, train_step)


def in_jit(
    mesh: Mesh, tx: optax.GradientTransformation, loss: Loss, params: Params, placed: Any
) -> Way:
    """The program of one device; the placement of arrays decides which device computes what."""
    state_placed = sharding.state_sharding(tx, params, placed)
    rows = NamedSharding(mesh, P("data"))
    train_step = jax.jit(
        functools.partial(step, tx, jax.value_and_grad(loss)),
        in_shardings=(placed, state_placed, rows, rows),
        out_shardings=(placed, state_placed, None),
        donate_argnums=(0, 1),
    )
    params = jax.device_put(params, placed)
    return Way(params, jax.jit(tx.init, out_shardings=state_placed)(params), train_step)


def data(mesh: Mesh, tx: optax.GradientTransformation, loss: Loss, params: Params) -> Way:
    """Batches are sharded; parameters and state are replicated."""
    return in_jit(mesh, tx, loss, params, NamedSharding(mesh, P()))


def fsdp(mesh: Mesh, tx: optax.GradientTransformation, loss: Loss, params: Params) -> Way:
    """Parameters and state are sharded, too."""
    return in_jit(mesh, tx, loss, params, sharding.fsdp_shardings(params, mesh, "data", min_size=0))


def zero1(mesh: Mesh, tx: optax.GradientTransformation, loss: Loss, params: Params) -> Way:
    """The state is sharded, but the parameters are replicated."""
    return in_jit(mesh, sharding.zero1(tx, mesh, "data"), loss, params, NamedSharding(mesh, P()))


def shard_map(mesh: Mesh, tx: optax.GradientTransformation, loss: Loss, params: Params) -> Way:
    """Like zero1, but each device runs the program on its own part of every array, as in pmap."""
    tx = sharding.zero1_mapped(tx, "data")
    everywhere = NamedSharding(mesh, P())
    state_placed = sharding.state_sharding(tx, params, everywhere)
    specs = jax.tree.map(lambda placed: placed.spec, state_placed)

    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

    def grad(params: Params, *batch: jax.Array) -> tuple[jax.Array, Params]:
        value, grads = jax.value_and_grad(loss)(params, *batch)
        return lax.pmean(value, "data"), grads  # zero1_mapped averages them

    init = mapped(tx.init, in_specs=P(), out_specs=specs)
    train_step = mapped(
        functools.partial(step, tx, grad),
        in_specs=(P(), specs, P("data"), P("data")),
        out_specs=(P(), specs, P()),
    )
    params = jax.device_put(params, everywhere)
    return Way(params, jax.jit(init)(params), jax.jit(train_step, donate_argnums=(0, 1)))


WAYS = {way.__name__: way for way in (one, pmap, data, fsdp, zero1, shard_map)}


def random_pictures(seed: int) -> real_data.FashionMNIST:
    """One picture per class, with noise of the same size added."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=2560, dtype=np.uint8)
    images = rng.integers(128, size=(10, 28, 28), dtype=np.uint8)[labels]
    images += rng.integers(128, size=images.shape, dtype=np.uint8)
    return real_data.FashionMNIST(images[:2048], labels[:2048], images[2048:], labels[2048:])


def bytes_on(device: jax.Device, tree: Any) -> int:
    shards = [shard for array in jax.tree.leaves(tree) for shard in array.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


class Result(NamedTuple):
    """The bytes on the first device after the last step, the loss at each step, the accuracy."""

    param_bytes: int
    state_bytes: int
    losses: list[float]
    accuracy: float


def differences(results: Mapping[str, Result]) -> dict[str, np.ndarray]:
    """How far the loss at each step is above that on one device."""
    one = results["one"].losses
    return {name: np.subtract(result.losses, one) for name, result in results.items()}


def print_table(results: Mapping[str, Result], steps: int) -> None:
    at = sorted({1, (steps + 1) // 2, steps})
    print(f"{'':9}  {'bytes on one device':>22}  loss at step; for other ways, its difference")
    columns = "".join(f"{step:11}" for step in at)
    print(f"{'way':9}  {'parameters':>10}  {'state':>10}{columns}  accuracy")
    away = differences(results)
    for name, result in results.items():
        held = f"{result.param_bytes:10,}  {result.state_bytes:10,}"
        if name == "one":
            losses = "".join(f"{result.losses[step - 1]:11.7f}" for step in at)
        else:
            losses = "".join(f"{away[name][step - 1]:+11.1e}" for step in at)
        print(f"{name:9}  {held}{losses}{result.accuracy:10.2%}")


def draw(results: Mapping[str, Result], out: Path) -> None:
    with picture(out, height=4) as figure:
        axes = figure.subplot_mosaic([["memory", "loss"], ["memory", "away"]])
        memory, loss, away = axes.values()
        params, state = (np.array([result[i] for result in results.values()]) / 1e6 for i in (0, 1))
        memory.barh(list(results), params, label="parameters")
        bars = memory.barh(list(results), state, left=params, label="state")
        memory.bar_label(bars, [f"{total:.2f}" for total in params + state], padding=3)
        memory.set(xlabel="megabytes on one device", xlim=(0, 1.2 * (params + state).max()))
        memory.invert_yaxis()
        memory.grid(visible=False, axis="y")
        memory.legend(loc="lower right")
        steps = np.arange(1, len(results["one"].losses) + 1)
        loss.plot(steps, results["one"].losses, "k-")
        loss.set(ylabel="loss on one device", ylim=(0, None))
        alike: dict[tuple[float, ...], list[str]] = {}
        for name, difference in differences(results).items():
            if name != "one":
                alike.setdefault(tuple(difference), []).append(name)
        for values, ways in alike.items():
            away.plot(steps, 1e7 * np.array(values), ".", markersize=3, label=", ".join(ways))
        away.set(xlabel="step", ylabel="difference / 10⁻⁷")
        if alike:  # else there is only one
            away.legend(loc="lower left", bbox_to_anchor=(0, 1), markerscale=3)


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mode", nargs="+", choices=WAYS, default=list(WAYS), help="ways besides one; default: all"
    )
    parser.add_argument("--devices", type=int, help="default: all accelerators, or 8 virtual")
    parser.add_argument("--data", choices=["random", "fashion-mnist"], default="fashion-mnist")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=512, help="pictures, on all devices together")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/multi_device.png"))
    args = parser.parse_args(argv)

    with contextlib.suppress(RuntimeError):  # JAX is already running, with fixed devices
        jax.config.update("jax_num_cpu_devices", args.devices or 8)
    devices = jax.devices()
    if args.devices is not None and not 1 <= args.devices <= len(devices):
        parser.error(f"--devices must be from 1 to {len(devices)}")
    devices = devices[: args.devices]
    n = len(devices)
    if args.steps < 1 or args.batch < 1 or args.batch % n:
        parser.error(f"--steps must be at least 1, --batch a multiple of the {n} devices")
    mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=devices)

    pictures = random_pictures(args.seed) if args.data == "random" else real_data.fashion_mnist()
    rng = np.random.default_rng(args.seed)
    batches = rng.integers(len(pictures.images), size=(args.steps, args.batch))
    tx = rmsprop(args.learning_rate, momentum=args.momentum)
    graphdef, start = nnx.split(Net(nnx.Rngs(args.seed)), nnx.Param)
    # In NumPy: JAX's copies on several devices may share memory with the original, and the step
    # reuses the memory of its parameters.
    start = jax.device_get(start)

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    results = {}
    for name in dict.fromkeys(["one", *args.mode]):
        params, state, train_step = WAYS[name](mesh, tx, loss, start)
        losses = []
        for rows in tqdm(batches, desc=f"{name:9}", unit="step"):
            batch = pictures.images[rows], pictures.labels[rows]
            # Without waiting, steps overlap, and virtual devices on few cores can deadlock, as they
            # do with too few threads.
            params, state, value = jax.block_until_ready(train_step(params, state, *batch))
            losses.append(float(value))
        # Parameters of pmap have a leading axis of devices.
        whole = jax.tree.map(lambda p, s: np.asarray(p).reshape(-1, *s.shape)[0], params, start)
        guesses = nnx.merge(graphdef, whole)(jnp.asarray(pictures.test_images)).argmax(axis=1)
        held = bytes_on(devices[0], params), bytes_on(devices[0], state)
        accuracy = float(np.mean(guesses == pictures.test_labels))
        results[name] = Result(*held, losses, accuracy)

    draw(results, args.out)
    print(f"{n} devices ({devices[0].device_kind}), {args.steps} steps of {args.batch} pictures\n")
    print_table(results, args.steps)
    away = np.abs(list(differences(results).values())).max()
    print(f"\nLosses differ from those of one device by at most {away:.1e}, picture in {args.out}")
    return results


if __name__ == "__main__":
    try:
        main()
    except real_data.DataError as error:
        raise SystemExit(f"multi_device.py: {error}") from None
