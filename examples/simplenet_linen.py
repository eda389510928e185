"""The network and step of simplenet.py in Flax linen, with its TrainState.

    python examples/simplenet_linen.py

Prints the loss of each epoch, as `Epoch [1/10], Loss: 1.5012`, and ends with the first and last.
"""

import argparse
from collections.abc import Sequence
import functools

from flax import linen as nn
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from rmsprop_jax import rmsprop


class SimpleNet(nn.Module):
    """One hidden layer of 50 units."""

    @nn.compact
    def __call__(self, x: ArrayLike) -> jax.Array:
        """From (rows, inputs) to (rows, 1)."""
        return nn.Dense(1, name="fc2")(nn.relu(nn.Dense(50, name="fc1")(x)))


@functools.partial(jax.jit, donate_argnames="state")
def train_step(state: TrainState, x: ArrayLike, y: ArrayLike) -> tuple[TrainState, jax.Array]:
    """The state after one step, and the loss before it."""

    def mse(params: dict) -> jax.Array:
        return jnp.mean(jnp.square(state.apply_fn({"params": params}, x) - y))

    loss, grads = jax.value_and_grad(mse)(state.params)
    return state.apply_gradients(grads=grads), loss


def create(params: dict, learning_rate: float) -> TrainState:
    """A new TrainState that counts steps in an array, since jit would trace twice with an int."""
    tx = rmsprop(learning_rate, 0.9, 1e-8, eps_in_sqrt=False)
    state = TrainState.create(apply_fn=SimpleNet().apply, params=params, tx=tx)
    return state.replace(step=jnp.zeros([], jnp.int32))


def train(state: TrainState, x: ArrayLike, y: ArrayLike, epochs: int) -> list[float]:
    """The loss of each epoch, which is one full batch."""
    losses = []
    for epoch in range(epochs):
        state, loss = train_step(state, x, y)
        losses.append(float(loss))
        print(f"Epoch [{epoch + 1}/{epochs}], Loss: {losses[-1]:.4f}")
    return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")

    rng = np.random.default_rng(args.seed)
    x = rng.standard_normal((100, 10), dtype=np.float32)
    y = rng.standard_normal((100, 1), dtype=np.float32)
    params = SimpleNet().init(jax.random.key(args.seed), x)["params"]

    losses = train(create(params, args.learning_rate), x, y, args.epochs)
    print(f"Loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
