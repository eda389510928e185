"""A PyTorch run resumes in JAX: the network of simplenet.py, trained with torch.optim.RMSprop.

    pip install torch==2.13.0
    python examples/resume_from_pytorch.py
    python examples/resume_from_pytorch.py --learning-rate 1e-3 --momentum 0.9 --centered

PyTorch trains on 100 random samples, as a full batch, and saves a checkpoint on the way. Flax NNX
imports the parameters and the optimizer's state from that file and continues the run. Prints the
losses of both, draws them, and ends with the largest difference.
"""

import argparse
from collections import OrderedDict
from collections.abc import Mapping, Sequence
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from drawing import picture
from rmsprop_jax import convert, dialects

Rows = NDArray[np.float32]
Checkpoint = Mapping[str, Any]  # {"model": state_dict, "optimizer": state_dict}

# The PyTorch name and layout of each of our parameters.
MAPPING = convert.torch_dense("fc1", "fc1") | convert.torch_dense("fc2", "fc2")


def train_in_pytorch(
    x: Rows, y: Rows, epochs: int, switch: int, file: Path, seed: int, **options: Any
) -> list[float]:
    """Trains, saves a checkpoint after `switch` epochs, and returns the loss of each epoch."""
    import torch

    torch.manual_seed(seed)
    layers = {"fc1": torch.nn.Linear(x.shape[1], 50), "relu": torch.nn.ReLU()}
    model = torch.nn.Sequential(OrderedDict(layers | {"fc2": torch.nn.Linear(50, 1)}))
    optimizer = torch.optim.RMSprop(model.parameters(), **options)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    losses = []
    for epoch in tqdm(range(epochs), desc="PyTorch", unit="epoch"):
        if epoch == switch:
            checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(checkpoint, file)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def load(file: Path) -> Checkpoint:
    """The tensors and numbers of a file, without running code from it."""
    import torch

    checkpoint: Checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    return checkpoint


class SimpleNet(nnx.Module):
    """One hidden layer of 50 units."""

    def __init__(self, inputs: int, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(inputs, 50, rngs=rngs)
        self.fc2 = nnx.Linear(50, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (rows, inputs) to (rows, 1)."""
        return self.fc2(nnx.relu(self.fc1(x)))


def resume(checkpoint: Checkpoint, inputs: int) -> tuple[SimpleNet, nnx.Optimizer]:
    """The model and optimizer as PyTorch saved them."""
    model = SimpleNet(inputs, nnx.Rngs(0))
    weights, saved = checkpoint["model"], checkpoint["optimizer"]
    params = convert.params_from(weights, nnx.state(model, nnx.Param), MAPPING)
    nnx.update(model, params)

    tx = dialects.pytorch(**convert.pytorch_options(saved["param_groups"][0]))
    state = convert.from_pytorch(saved, params, MAPPING, tx, names=list(weights))
    # An Optimizer starts with the state that init returns.
    return model, nnx.Optimizer(model, tx._replace(init=lambda _: state), wrt=nnx.Param)


def mse(model: SimpleNet, x: ArrayLike, y: ArrayLike) -> jax.Array:
    return jnp.mean(jnp.square(model(jnp.asarray(x)) - y))


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model: SimpleNet, optimizer: nnx.Optimizer, x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Makes one step, and returns the loss before it."""
    loss, grads = nnx.value_and_grad(mse)(model, x, y)
    optimizer.update(model, grads)
    return loss


def train(checkpoint: Checkpoint, x: Rows, y: Rows, epochs: int) -> list[float]:
    """The loss of each epoch after the checkpoint."""
    model, optimizer = resume(checkpoint, x.shape[1])
    steps = tqdm(range(epochs), desc="JAX", unit="epoch")
    return [float(train_step(model, optimizer, x, y)) for _ in steps]


def draw(theirs: Sequence[float], ours: Sequence[float], out: Path) -> None:
    with picture(out, height=4) as figure:
        axes = figure.subplots()
        epochs = range(1, len(theirs) + 1)
        axes.plot(epochs, theirs, color="0.7", linestyle="-", linewidth=5, label="PyTorch")
        axes.plot(epochs[-len(ours) :], ours, color="C0", marker="o", label="resumed in JAX")
        axes.set(xlabel="epoch", ylabel="mean squared error", ylim=(0, None))
        axes.locator_params(axis="x", integer=True)
        axes.legend()


def print_table(theirs: Sequence[float], ours: Sequence[float]) -> None:
    """Prints about twenty epochs; our losses begin after the switch."""
    print("epoch    PyTorch  resumed in JAX")
    every = -(-len(theirs) // 20)
    switch = len(theirs) - len(ours)
    for epoch in range(every, len(theirs) + 1, every):
        resumed = f"{ours[epoch - switch - 1]:16.7f}" if epoch > switch else ""
        print(f"{epoch:5d}  {theirs[epoch - 1]:.7f}{resumed}")


class Result(NamedTuple):
    """PyTorch's losses of all epochs, and ours of those after the switch."""

    theirs: list[float]
    ours: list[float]


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--switch", type=int, default=10, help="epochs before the checkpoint")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--decay", type=float, default=0.9)
    parser.add_argument("--eps", type=float, default=1e-8)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--centered", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=Path("out/resume_from_pytorch.pt"))
    parser.add_argument("--out", type=Path, default=Path("out/resume_from_pytorch.png"))
    args = parser.parse_args(argv)
    if not 1 <= args.switch < args.epochs:
        parser.error("--switch must be at least 1 and less than --epochs")
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "resume_from_pytorch.py: needs PyTorch: pip install torch==2.13.0, "
            "or pip install '.[compare]' for PyTorch and other frameworks"
        )

    rng = np.random.default_rng(args.seed)
    x = rng.standard_normal((100, 10), dtype=np.float32)
    y = rng.standard_normal((100, 1), dtype=np.float32)
    options = {"lr": args.learning_rate, "alpha": args.decay, "eps": args.eps}
    options |= {"momentum": args.momentum, "centered": args.centered}
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    theirs = train_in_pytorch(x, y, args.epochs, args.switch, args.checkpoint, args.seed, **options)
    ours = train(load(args.checkpoint), x, y, args.epochs - args.switch)

    draw(theirs, ours, args.out)
    print_table(theirs, ours)
    difference = np.abs(np.subtract(theirs[args.switch :], ours)).max()
    print(f"Largest difference {difference:.1e}, curves in {args.out}")
    return Result(theirs, ours)


if __name__ == "__main__":
    main()
