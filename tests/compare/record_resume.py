"""Records runs of SimpleNet under PyTorch's RMSprop with a checkpoint, for resume_from_pytorch.py.

    python tests/compare/record_resume.py            # writes tests/fixtures/resume_torch.npz
    python tests/compare/record_resume.py --check    # compares new runs with that file

The file contains the data (x, y); for each run the losses of all epochs and the checkpoint after
half of them, as arrays under PyTorch's names and its param_groups as JSON; and the version of
PyTorch.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np

import record_simplenet

FIXTURE = Path(__file__).parents[1] / "fixtures" / "resume_torch.npz"
EPOCHS, SWITCH = 20, 10
RUNS = {
    "plain": {"lr": 0.01, "alpha": 0.9, "eps": 1e-8},
    "full": {"lr": 0.001, "alpha": 0.9, "eps": 1e-8, "momentum": 0.9, "centered": True},
}


def load():
    with np.load(FIXTURE) as file:
        return dict(file)


def checkpoint(record, run):
    """What PyTorch saved in a run, with arrays in the place of tensors."""
    model, state = {}, {}
    for key, array in record.items():
        match key.split("/"):
            case [name, "model", weight] if name == run:
                model[weight] = array
            case [name, "state", number, slot] if name == run:
                state.setdefault(int(number), {})[slot] = array
    groups = json.loads(str(record[f"{run}/param_groups"]))
    return {"model": model, "optimizer": {"state": state, "param_groups": groups}}


def record_all():
    import torch

    torch.manual_seed(0)
    x, y = torch.randn(100, 10), torch.randn(100, 1)
    record = {"x": x.numpy(), "y": y.numpy(), "torch": np.array(torch.__version__)}
    for run, options in RUNS.items():
        model = record_simplenet.network()
        optimizer = torch.optim.RMSprop(model.parameters(), **options)
        losses = []
        for epoch in range(EPOCHS):
            if epoch == SWITCH:
                record |= arrays(run, model, optimizer)
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        record[f"{run}/losses"] = np.array(losses)
    return record


def arrays(run, model, optimizer):
    """The entries of a checkpoint, as it comes back from a file."""
    import torch

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    flat = {f"{run}/model/{name}": weight.numpy() for name, weight in saved["model"].items()}
    for number, slots in saved["optimizer"]["state"].items():
        flat |= {f"{run}/state/{number}/{slot}": value.numpy() for slot, value in slots.items()}
    groups = json.dumps(saved["optimizer"]["param_groups"])
    return flat | {f"{run}/param_groups": np.array(groups)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args(argv).check
    live = record_all()
    for run in RUNS:
        losses = " ".join(f"{loss:.6f}" for loss in live[f"{run}/losses"])
        print("PyTorch", live["torch"], run, "losses", losses)
    if not check:
        FIXTURE.parent.mkdir(exist_ok=True)
        np.savez_compressed(FIXTURE, **live)
        print("written to", FIXTURE)
        return
    recorded = load()
    assert live.keys() == recorded.keys()
    for name in live.keys() - {"torch"}:
        if name.endswith("/param_groups"):
            assert live[name] == recorded[name], name
        else:
            # Other versions and processors may sum in another order.
            np.testing.assert_allclose(live[name], recorded[name], 1e-4, 1e-6, err_msg=name)
    print("agrees with", FIXTURE, "of PyTorch", recorded["torch"])


if __name__ == "__main__":
    main()
