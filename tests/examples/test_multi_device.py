"""The example on many devices: each way against one device, and that against NNX and Optax."""

import math
import os
from pathlib import Path
import re
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

import multi_device
from pictures import assert_picture
import real_data
from rmsprop_jax import rmsprop

DEVICES = jax.devices()  # before main asks for any
WAYS = ["one", "pmap", "data", "fsdp", "zero1", "shard_map"]
SPLIT_PARAMS, SPLIT_STATE = {"fsdp"}, {"fsdp", "zero1", "shard_map"}
STEPS, BATCH = 9, 64
FLAGS = ["--data", "random", "--steps", str(STEPS), "--batch", str(BATCH)]
# A loss is a mean in float32, whose terms each way adds in its own order: 2.3e-7 was measured.
RTOL = 1e-6


def held(n):
    """The numbers that one of n devices has of the network, split where an axis divides."""
    shapes = [(784, 256), (256,), (256, 128), (128,), (128, 10), (10,)]
    return sum(
        math.prod(shape) // (n if any(size % n == 0 for size in shape) else 1) for shape in shapes
    )


def assert_alike_in_losses_but_not_in_memory(results, n):
    """In float32 are held parameters; and as state two averages of each, with a count of steps."""
    one = results["one"]
    for way, result in results.items():
        np.testing.assert_allclose(result.losses, one.losses, rtol=RTOL, atol=0, err_msg=way)
        assert abs(result.accuracy - one.accuracy) < 0.003, way  # a picture on the fence
        assert result.param_bytes == 4 * held(n if way in SPLIT_PARAMS else 1), way
        assert result.state_bytes == 2 * 4 * held(n if way in SPLIT_STATE else 1) + 4, way


@pytest.mark.slow
def test_all_ways_have_the_losses_of_one_device_and_each_its_memory(tmp_path):
    results = multi_device.main([*FLAGS, "--out", str(tmp_path / "picture.png")])
    assert list(results) == WAYS
    assert_alike_in_losses_but_not_in_memory(results, 8)


@pytest.mark.slow
def test_one_device_trains_as_nnx_does_under_optax(tmp_path):
    """Which know nothing of splitting a model, or of our update."""
    out = str(tmp_path / "picture.png")
    one = multi_device.main([*FLAGS, "--mode", "one", "--out", out])["one"]
    model = multi_device.Net(nnx.Rngs(0))
    tx = optax.rmsprop(3e-4, decay=0.9, eps=1e-8, momentum=0.9)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    images, labels, test_images, test_labels = multi_device.random_pictures(0)

    def loss(model, x, y):
        logits = model(x)
        of_labels = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - of_labels)

    @nnx.jit
    def train_step(model, optimizer, x, y):
        value, grads = nnx.value_and_grad(loss)(model, x, y)
        optimizer.update(model, grads)
        return value

    batches = np.random.default_rng(0).integers(len(images), size=(STEPS, BATCH))
    losses = [float(train_step(model, optimizer, images[rows], labels[rows])) for rows in batches]
    np.testing.assert_allclose(one.losses, losses, rtol=RTOL, atol=0)
    right = np.asarray(model(jnp.asarray(test_images))).argmax(axis=1) == test_labels
    assert abs(one.accuracy - right.mean()) < 0.003
    assert one.accuracy > 0.9
    assert one.losses[-1] < 0.5 * one.losses[0]


@pytest.mark.slow
def test_one_always_runs_and_two_devices_split_in_halves(tmp_path, capsys):
    """The last bias, of ten numbers, too, which eight devices do not divide."""
    flags = ["--devices", "2", "--mode", "shard_map", "fsdp", "--out", str(tmp_path / "p.png")]
    results = multi_device.main([*FLAGS, *flags])
    assert list(results) == ["one", "shard_map", "fsdp"]
    assert_alike_in_losses_but_not_in_memory(results, 2)
    assert capsys.readouterr().out.startswith("2 devices (cpu), 9 steps of 64 pictures\n")


def test_main_prints_what_it_measured(tmp_path, capsys):
    out = tmp_path / "new" / "picture.png"
    results = multi_device.main([*FLAGS, "--mode", "one", "zero1", "--out", str(out)])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[3].split() == ["way", "parameters", "state", "1", "5", "9", "accuracy"]
    losses = np.array([result.losses for result in results.values()])
    away = losses[1] - losses[0]
    cells = [f"{losses[0, i]:.7f}" for i in (0, 4, 8)], [f"{away[i]:+.1e}" for i in (0, 4, 8)]
    for line, (way, result), figures in zip(lines[4:6], results.items(), cells, strict=True):
        sizes = [f"{result.param_bytes:,}", f"{result.state_bytes:,}"]
        assert line.split() == [way, *sizes, *figures, f"{result.accuracy:.2%}"]
    assert all(result.losses[-1] < result.losses[0] for result in results.values())
    most = f"{np.abs(away).max():.1e}"
    last = f"Losses differ from those of one device by at most {most}, picture in {out}"
    assert lines[6:] == ["", last]
    assert_picture(out)
    assert "9/9" in printed.err  # the progress bar


# A small problem, in shapes and in parts of eight.
SHAPES = {"rows": (16, 3), "columns": (3, 24), "neither": (5,)}
PARTS = {"rows": (2, 3), "columns": (3, 3), "neither": (5,)}


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["rows"])
    return jnp.mean((jnp.sum(hidden @ params["columns"], 1) + jnp.sum(params["neither"]) - y) ** 2)


@pytest.fixture
def start():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def batches():
    rng = np.random.default_rng(1)
    return [[rng.standard_normal(s, np.float32) for s in ((32, 16), (32,))] for _ in range(4)]


def make(way, start):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=DEVICES[:8])
    return multi_device.WAYS[way](mesh, rmsprop(0.01, momentum=0.9), loss, start)


def wait_for(step, *args):
    return jax.block_until_ready(step(*args))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_steps_leave_all_where_it_was_and_copies_alike(way, start, batches):
    """Copies that each device updates by itself would drift apart unnoticed."""
    params, state, step = make(way, start)
    for i in range(len(batches) + 1):
        trees = [(params, SPLIT_PARAMS), (state.nu, SPLIT_STATE), (state.trace, SPLIT_STATE)]
        for tree, split in trees:
            for name, array in tree.items():
                shards = [np.asarray(shard.data) for shard in array.addressable_shards]
                assert len(shards) == (1 if way == "one" else 8)
                if way == "pmap":
                    assert all(len(shard) == 1 for shard in shards)
                    shards = [shard[0] for shard in shards]
                shape = (PARTS if way in split else SHAPES)[name]
                assert all(shard.shape == shape for shard in shards), (i, name)
                if shape == SHAPES[name]:
                    assert all((shard == shards[0]).all() for shard in shards), (i, name)
        if i < len(batches):
            params, state, _ = wait_for(step, params, state, *batches[i])


@pytest.fixture
def compilations():
    """Grows by one where XLA compiles a program."""
    seen = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("way", WAYS)
def test_the_step_compiles_once_and_reuses_the_memory_of_what_it_replaces(
    way, start, batches, compilations
):
    unchanged = {name: array.copy() for name, array in start.items()}
    params, state, step = make(way, start)
    before = len(compilations)
    for batch in batches:
        old = jax.tree.leaves((params, state))
        assert len(old) == 10  # three parameters, two averages of each, the count of steps
        params, state, _ = wait_for(step, params, state, *batch)
        assert all(array.is_deleted() for array in old)
        assert len(compilations) == before + 1
    # The next way starts from there.
    jax.tree.map(np.testing.assert_array_equal, start, unchanged)


@pytest.mark.parametrize(
    "flags",
    [
        ["--steps", "0"],
        ["--batch", "0"],
        ["--batch", "12"],
        ["--devices", "0"],
        ["--devices", "99"],
        ["--mode", "ddp"],
        ["--data", "x"],
    ],
    ids=" ".join,
)
def test_main_refuses_what_it_cannot_do(flags, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        multi_device.main([*flags, "--out", str(tmp_path / "picture.png")])
    assert flags[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def clothes(monkeypatch):
    """The accuracy to reach: on the real pictures where they are, else on others in their place."""
    if os.environ.get("RMSPROP_JAX_DATA"):
        return 0.6
    pictures = multi_device.random_pictures(1)
    monkeypatch.setattr(real_data, "fashion_mnist", lambda: pictures)
    return 0.9


@pytest.mark.slow
def test_main_on_fashion_mnist(clothes, tmp_path):
    flags = ["--steps", "20", "--batch", "256", "--out", str(tmp_path / "picture.png")]
    results = multi_device.main([*flags, "--mode", "pmap", "fsdp", "zero1"])
    assert_alike_in_losses_but_not_in_memory(results, 8)
    assert results["one"].accuracy > clothes


@pytest.mark.slow
def test_from_the_command_line_it_makes_its_devices(tmp_path):
    """Without what conftest.py sets, in particular more threads than cores."""
    script = Path(multi_device.__file__)
    ours = ("NPROC", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    ran = subprocess.run(
        [sys.executable, script, *FLAGS, "--devices", "4", "--mode", "data", "zero1"],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("4 devices (cpu), ")
    assert re.search(rf"^zero1 .* {2 * 4 * held(4) + 4:,} ", ran.stdout, re.MULTILINE)
    assert (tmp_path / "out" / "multi_device.png").is_file()
