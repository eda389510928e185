"""Records ten epochs of SimpleNet under PyTorch's RMSprop, for tests/examples/test_simplenet.py.

    python tests/compare/record_simplenet.py            # writes tests/fixtures/simplenet_torch.npz
    python tests/compare/record_simplenet.py --check    # compares a new run with that file

The file contains the data (x, y), the parameters before (initial/...) and after (final/...) under
PyTorch's names and in its layout, the losses, and the version of PyTorch.
"""

import argparse
from collections import OrderedDict
import importlib.util
from pathlib import Path

import numpy as np

FIXTURE = Path(__file__).parents[1] / "fixtures" / "simplenet_torch.npz"
TORCH_IS_HERE = importlib.util.find_spec("torch") is not None


def load():
    with np.load(FIXTURE) as file:
        return dict(file)


def fresh():
    """Random data and PyTorch's own initial weights, from a fixed seed."""
    import torch

    torch.manual_seed(0)
    start = {"x": torch.randn(100, 10).numpy(), "y": torch.randn(100, 1).numpy()}
    weights = network().state_dict()
    return start | {f"initial/{name}": weight.numpy() for name, weight in weights.items()}


def run(start):
    """A run of ten epochs from the data and initial weights in start."""
    import torch

    x, y = torch.from_numpy(start["x"]), torch.from_numpy(start["y"])
    model = network()
    model.load_state_dict({n: torch.tensor(start[f"initial/{n}"]) for n in model.state_dict()})
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, alpha=0.9, eps=1e-8)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    final = {f"final/{name}": weight.numpy() for name, weight in model.state_dict().items()}
    return start | final | {"losses": np.array(losses), "torch": np.array(torch.__version__)}


def network():
    """Linear(10, 50), ReLU, Linear(50, 1), with its layers named fc1 and fc2."""
    import torch

    layers = {
        "fc1": torch.nn.Linear(10, 50),
        "relu": torch.nn.ReLU(),
        "fc2": torch.nn.Linear(50, 1),
    }
    return torch.nn.Sequential(OrderedDict(layers))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args(argv).check
    start = load() if check else fresh()
    live = run(start)
    print("PyTorch", live["torch"], "losses", " ".join(f"{loss:.6f}" for loss in live["losses"]))
    if not check:
        FIXTURE.parent.mkdir(exist_ok=True)
        np.savez_compressed(FIXTURE, **live)
        print("written to", FIXTURE)
        return
    for name in live.keys() - {"torch"}:
        # Other versions and processors may sum in another order.
        np.testing.assert_allclose(live[name], start[name], rtol=1e-5, atol=1e-6, err_msg=name)
    print("agrees with", FIXTURE, "of PyTorch", start["torch"])


if __name__ == "__main__":
    main()
