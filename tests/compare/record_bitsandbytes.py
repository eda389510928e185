"""Records checkpoints of bitsandbytes' RMSprop, for tests/convert/test_bitsandbytes.py.

    python tests/compare/record_bitsandbytes.py             # writes the file in tests/fixtures
    python tests/compare/record_bitsandbytes.py --check     # compares a new run with that file

Two arrays take 2 K steps in 32 bits, and K in 8. The file contains the gradients, the arrays
halfway and at the end, both state_dicts halfway, and bitsandbytes' own decoding of its 8 bits.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from json_arrays import by_numbers, decoded, encoded, mapped

FIXTURE = Path(__file__).parents[1] / "fixtures" / "bitsandbytes.json"
K = 4  # steps before the checkpoint, and after it
OPTIONS = {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}
SHAPES = {"weight": (12, 25), "bias": (12,)}  # 300 numbers are a block of 8 bits and a part of one
TOLERANCE = 5e-6  # in float32, of numbers of size 1


def load():
    return by_numbers(decoded(json.loads(FIXTURE.read_text())))


def run():
    import bitsandbytes
    import torch

    rng = np.random.default_rng(5)
    start = {name: rng.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}
    grads = {
        name: (rng.standard_normal((2 * K, *shape)) * 10 ** rng.uniform(-2, 1, shape)).astype("f4")
        for name, shape in SHAPES.items()
    }
    record = {"bitsandbytes": bitsandbytes.__version__, "start": start, "grads": grads}
    for bits in (32, 8):
        params = {name: torch.nn.Parameter(torch.tensor(a)) for name, a in start.items()}
        make = {32: bitsandbytes.optim.RMSprop32bit, 8: bitsandbytes.optim.RMSprop8bit}[bits]
        optimizer = make(params.values(), min_8bit_size=256, **OPTIONS)
        for step in range(2 * K if bits == 32 else K):
            if step == K:
                record["middle"] = {name: _copy(p) for name, p in params.items()}
                record["state 32"] = mapped(optimizer.state_dict(), _copy)
            for name, p in params.items():
                p.grad = torch.tensor(grads[name][step])
            optimizer.step()
        record[f"end {bits}"] = {name: _copy(p) for name, p in params.items()}
    record["state 8"] = mapped(optimizer.state_dict(), _copy)
    held = optimizer.state[params["weight"]]
    functional = bitsandbytes.functional
    record["dequantized"] = _copy(
        functional.dequantize_blockwise(
            held["state1"],
            functional.QuantState(
                absmax=held["absmax1"], code=held["qmap1"], blocksize=256, dtype=torch.float32
            ),
        )
    )
    return record


def _copy(value):
    return value.detach().numpy().copy() if hasattr(value, "detach") else value


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args(argv).check
    live = json.loads(json.dumps(encoded(run())))
    if not check:
        FIXTURE.write_text(json.dumps(live) + "\n")
        print("written to", FIXTURE)
        return
    recorded = json.loads(FIXTURE.read_text())
    assert live.keys() == recorded.keys()
    for name in ("middle", "end 32", "end 8"):
        for one, array in recorded[name].items():
            np.testing.assert_allclose(live[name][one]["values"], array["values"], 0, TOLERANCE)
    print("agrees with", FIXTURE, "of bitsandbytes", recorded["bitsandbytes"])


if __name__ == "__main__":
    main()
