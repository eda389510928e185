"""Records the forms in which PyTorch saves a checkpoint, for tests/convert/test_forms.py.

    python tests/compare/record_forms.py             # writes tests/fixtures/forms_pytorch.json
    python tests/compare/record_forms.py --check     # compares a new run with that file, and
                                                     # continues in PyTorch from a state of ours

A network with batch norm is trained in float64, with each of its layers in a group of its own, and
checkpointed halfway. The file contains the data; the model's state_dict halfway and at the end; the
optimizer's state_dict halfway in each form; the names in the state_dicts of wrapped models; the
model at the end of a run in which the norm is frozen halfway; and, for runs in which momentum or
centered is switched off halfway, the checkpoint and the model at the end.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import pytest

from json_arrays import by_numbers, decoded, encoded, mapped

FIXTURE = Path(__file__).parents[1] / "fixtures" / "forms_pytorch.json"
K = 3  # steps before the checkpoint, and after it
NORM_MOMENTUM = 0.2
OPTIONS = {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "momentum": 0.9, "centered": True}
NORM_LR = 0.03
OFF = {"momentum": 0, "centered": False}
FORMS = ("plain", "named", "distributed", "flattened")
TOLERANCE = 1e-11  # in float64, of numbers of size 1


def load():
    return by_numbers(decoded(json.loads(FIXTURE.read_text())))


def _array(value):
    return np.asarray(value).copy()


# In PyTorch.


def network():
    from torch import nn

    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(3, 4))
    model.add_module("norm", nn.BatchNorm1d(4, momentum=NORM_MOMENTUM))
    model.add_module("fc2", nn.Linear(4, 2))
    return model.double()


def optimizer_of(model, form):
    import torch

    groups = [
        {"params": list(layer.named_parameters(name) if form == "named" else layer.parameters())}
        for name, layer in model.named_children()
    ]
    groups[1]["lr"] = NORM_LR
    return torch.optim.RMSprop(groups, **OPTIONS)


def train(model, optimizer, x, y):
    import torch

    for inputs, outputs in zip(x, y, strict=True):
        optimizer.zero_grad()
        torch.mean((model(torch.tensor(inputs)) - torch.tensor(outputs)) ** 2).backward()
        optimizer.step()


def _distributed(form):
    from torch.distributed.checkpoint import state_dict

    flat = form == "flattened"
    return state_dict, state_dict.StateDictOptions(flatten_optimizer_state_dict=flat)


def state_of(form, model, optimizer):
    if form in ("plain", "named"):
        return copy.deepcopy(optimizer.state_dict())
    module, options = _distributed(form)
    return copy.deepcopy(module.get_optimizer_state_dict(model, optimizer, options=options))


def resumed(record, form, state_dict):
    """The model half way, and an optimizer that was given a state in a form."""
    import torch

    model = network()
    model.load_state_dict({n: torch.as_tensor(a) for n, a in record["model"].items()})
    optimizer = optimizer_of(model, form)
    state_dict = mapped(state_dict, lambda a: torch.tensor(_array(a)) if hasattr(a, "dtype") else a)
    if form in ("plain", "named"):
        optimizer.load_state_dict(state_dict)
    else:
        module, options = _distributed(form)
        module.set_optimizer_state_dict(model, optimizer, state_dict, options=options)
    return model, optimizer


def run():
    import torch

    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((2 * K, 5, 3)), rng.standard_normal((2 * K, 5, 2))
    record = {"torch": torch.__version__, "x": x, "y": y, "forms": {}, "off": {}}
    for form in FORMS:
        torch.manual_seed(0)
        model = network()
        optimizer = optimizer_of(model, form)
        train(model, optimizer, x[:K], y[:K])
        record["forms"][form] = state_of(form, model, optimizer)
    record["model"] = copy.deepcopy(model.state_dict())
    train(model, optimizer, x[K:], y[K:])
    record["final"] = model.state_dict()
    wrapped = {"compiled": torch.compile(model), "parallel": torch.nn.DataParallel(model)}
    wrapped["both"] = torch.nn.DataParallel(wrapped["compiled"])
    record["wrapped"] = {name: list(of.state_dict()) for name, of in wrapped.items()}
    model, optimizer = resumed(record, "plain", record["forms"]["plain"])
    model.norm.requires_grad_(False)
    train(model, optimizer, x[K:], y[K:])
    record["frozen"] = model.state_dict()
    for option, value in OFF.items():
        model, optimizer = resumed(record, "plain", record["forms"]["plain"])
        for group in optimizer.param_groups:
            group[option] = value
        checkpoint = state_of("plain", model, optimizer)
        train(model, optimizer, x[K:], y[K:])
        record["off"][option] = {"checkpoint": checkpoint, "final": model.state_dict()}
    return mapped(record, lambda a: _array(a) if hasattr(a, "dtype") else a)


# In ours.


def mapping():
    from rmsprop_jax import convert

    dense = convert.torch_dense
    return dense("fc1", "fc1") | convert.torch_norm("norm", "norm") | dense("fc2", "fc2")


def begin(record, form, frozen=False, **off):
    """Our parameters, transformation and state half way, from files alone."""
    import jax.numpy as jnp
    import optax

    from rmsprop_jax import convert, dialects

    shapes = {"fc1": {"kernel": (3, 4), "bias": 4}, "fc2": {"kernel": (4, 2), "bias": 2}}
    shapes["norm"] = {"scale": 4, "bias": 4}
    like = {layer: {n: jnp.zeros(s) for n, s in of.items()} for layer, of in shapes.items()}
    params = convert.params_from(record["model"], like, mapping())
    options = OPTIONS | off
    norm = dialects.pytorch(**options | {"lr": NORM_LR})
    parts = {
        "norm": optax.set_to_zero() if frozen else norm,
        "rest": dialects.pytorch(**options),
    }
    tx = optax.partition(parts, {"fc1": "rest", "norm": "norm", "fc2": "rest"})
    saved = record["off"][next(iter(off))]["checkpoint"] if off else record["forms"][form]
    state = convert.from_pytorch(
        saved,
        params,
        mapping(),
        tx,
        names=list(record["model"]) if form == "plain" else None,
        ignore=[{"momentum": "momentum_buffer", "centered": "grad_avg"}[name] for name in off],
    )
    return params, tx, state


def back(record, form, params, tx, state):
    """PyTorch's state of ours, in a form."""
    from rmsprop_jax import convert

    saved = record["forms"][form]
    return convert.to_pytorch(
        state,
        params,
        mapping(),
        tx,
        param_groups=saved if form == "flattened" else saved["param_groups"],
        names=list(record["model"]) if form == "plain" else None,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args(argv).check
    live = run()
    if not check:
        FIXTURE.write_text(json.dumps(encoded(live)) + "\n")
        print("written to", FIXTURE)
        return
    import jax

    recorded = load()
    assert_alike(live | {"torch": ""}, recorded | {"torch": ""})
    with jax.enable_x64(True):
        for form in FORMS:
            given = back(recorded, form, *begin(recorded, form))
            model, optimizer = resumed(recorded, form, given)
            train(model, optimizer, recorded["x"][K:], recorded["y"][K:])
            assert_alike(dict(model.state_dict()), recorded["final"])
            print("ended in PyTorch, through our state:", form)
    refuse_tensors_without_numbers()
    print("agrees with", FIXTURE, "of PyTorch", recorded["torch"])


def refuse_tensors_without_numbers():
    import torch

    from rmsprop_jax import convert

    with pytest.raises(ValueError, match="'w' is on PyTorch's meta device"):
        convert.params_from({"w": torch.ones(3, device="meta")}, {"w": np.ones(3)}, {"w": "w"})


def assert_alike(got, want):
    """Trees of the same keys and options, and arrays within the tolerance."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert_alike(got[key], value)
    elif isinstance(want, list):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_alike(a, b)
    elif hasattr(want, "dtype"):
        np.testing.assert_allclose(got, want, 0, TOLERANCE)
    else:
        assert got == want


if __name__ == "__main__":
    main()
