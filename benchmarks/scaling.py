"""What does each device hold, and how long is a step, with a replicated and with a sharded state?

    python benchmarks/scaling.py                 # minutes; writes results/scaling.json
    python benchmarks/scaling.py --quick         # seconds; checks that it runs, writes nothing
    python benchmarks/scaling.py --width 8192    # a network large enough for accelerators

A step is gradients, update and apply_updates with donated buffers, of four dense layers, by rmsprop
with momentum. A batch of fixed size is split over 1, 2, 4, ... devices, as many as there are. The
arrays are placed in four ways: parameters and state on every device ("replicated"); both sharded,
with parameters gathered for use (FSDP); and only the state sharded (ZeRO-1), by zero1 under jit or
by zero1_mapped inside shard_map.

MB are 1e6 bytes on one device: of the arrays after a step, and of the temporary memory of the
compiled step. Collectives are counted in the text of that program; one of them can cover many
arrays, and a TPU's fused all-reduce-scatter counts as an all-reduce. Ratios compare the time with
that of "replicated" on as many devices, as medians over alternating pairs, with quartiles; the
ratio of "replicated" to itself shows the noise.

Without accelerators, the devices are eight virtual ones on one CPU, which share its cores and its
memory. What real devices would do in parallel, such as their updates of a replicated state, they do
one after another, so the times do not show how a step scales. Bytes and collectives are those of
separate devices, as XLA compiles for CPUs. With accelerators, the result file is named after them.
"""

import collections
from collections.abc import Callable
import functools
import os
import re
from typing import Any, NamedTuple

# Read when jax starts. Virtual devices wait for each other, and need more threads than cores.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

import _results
import _timing
from rmsprop_jax import rmsprop, sharding

WAYS = ("replicated", "FSDP", "`zero1`", "`zero1_mapped`")
COLLECTIVES = re.compile(
    r" (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\("
)
LAYERS = 4


class Step(NamedTuple):
    """A compiled step, the bytes on a device, and the collectives between devices."""

    run: Callable[[], Any]
    numbers: int  # elements in all parameters
    state: int
    params: int
    temporary: float
    collectives: str


def network(width: int) -> Any:
    draw = np.random.default_rng(0).standard_normal
    kernels = (draw((width, width), dtype=np.float32) / width**0.5 for _ in range(LAYERS))
    return [{"kernel": jnp.array(kernel), "bias": jnp.zeros(width)} for kernel in kernels]


def examples(width: int, batch: int) -> Any:
    draw = np.random.default_rng(1).standard_normal
    return [jnp.array(draw((batch, width), dtype=np.float32)) for _ in "xy"]


def loss(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    for layer in params:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x - y) ** 2)


def step_of(way: str, mesh: Mesh, width: int, batch: int) -> Step:
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    where = split if way == "FSDP" else whole
    tx: optax.GradientTransformation = rmsprop(1e-3, momentum=0.9)
    if way == "`zero1`":
        tx = sharding.zero1(tx, mesh, "data")
    if way == "`zero1_mapped`":
        tx = sharding.zero1_mapped(tx, "data")

    def loss_of(params: Any, data: Any) -> jax.Array:
        if way == "FSDP":  # otherwise XLA may move the examples to the parameters
            params = jax.lax.with_sharding_constraint(params, whole)
        return loss(params, data)

    def step(params: Any, state: Any, data: Any) -> Any:
        updates, state = tx.update(jax.grad(loss_of)(params, data), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.device_put(network(width), where)
    data = jax.device_put(examples(width, batch), split)
    placed = sharding.state_sharding(tx, params, where)
    init: Callable[..., Any] = tx.init
    if way == "`zero1_mapped`":
        everywhere, specs = whole.spec, jax.tree.map(lambda one: one.spec, placed)
        mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        init = mapped(init, in_specs=everywhere, out_specs=specs)
        step = mapped(step, in_specs=(everywhere, specs, split.spec), out_specs=(everywhere, specs))
    carry = [params, jax.jit(init, out_shardings=placed)(params)]
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(where, placed))
    compiled = jitted.lower(*carry, data).compile()

    def run() -> Any:
        carry[:] = compiled(*carry, data)
        return carry

    params, state = jax.block_until_ready(run())
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else float("nan")
    counts = collections.Counter(COLLECTIVES.findall(compiled.as_text() or ""))
    between = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    numbers = sum(param.size for param in jax.tree.leaves(params))
    return Step(run, numbers, held(state), held(params), temporary, between)


def held(tree: Any) -> int:
    """Bytes of a tree on the device that holds most of it."""
    held_by: collections.Counter[jax.Device] = collections.Counter()
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held_by[shard.device] += shard.data.nbytes
    return max(held_by.values())


def row(devices: int, way: str, step: Step, pair: _timing.Pair) -> _results.Row:
    return {
        "devices": devices,
        "way": way,
        "state (MB)": f"{step.state / 1e6:.2f}",
        "state, bytes a parameter": f"{step.state / step.numbers:.2f}",
        "parameters (MB)": f"{step.params / 1e6:.2f}",
        "temporary (MB)": f"{step.temporary / 1e6:.2f}",
        "collectives": step.collectives or "none",
        "replicated (ms)": f"{1e3 * pair.theirs:.1f}",
        "this way (ms)": f"{1e3 * pair.ours:.1f}",
        **pair.columns(),
    }


def main(argv: list[str] | None = None) -> list[_results.Row]:
    parser = _results.parser(__doc__)
    parser.add_argument("--width", type=int, help="of each layer; default 1024, or 64 if quick")
    args = _results.parse(parser, argv)

    width, batch, pairs = (64, 16, 2) if args.quick else (1024, 256, 20)
    width = args.width or width
    rows = []
    for n in (1 << i for i in range(jax.device_count().bit_length())):
        auto, devices = (AxisType.Auto,), jax.devices()
        mesh = jax.make_mesh((n,), ("data",), axis_types=auto, devices=devices[:n])
        steps = {way: step_of(way, mesh, width, batch) for way in WAYS}
        for way, step in steps.items():
            pair = _timing.compare((steps["replicated"].run, step.run), pairs)
            rows.append(row(n, way, step, pair))
            print(rows[-1], flush=True)
    return _results.finish("scaling", rows, args.quick)


if __name__ == "__main__":
    main()
