"""Programs for GPUs, compiled ahead of time by jax's CUDA plugin where it is: no GPU is needed."""

import importlib.util
import math
import os
from pathlib import Path
import re

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax
import pytest

from rmsprop_jax import low_memory, rmsprop

pytest.importorskip("jax_cuda13_plugin")

# What XLA asks of a device when there is none. Compute capability 9.0 is that of Hopper; numbers
# are those of an H200, from NVIDIA's data sheet and the CUDA programming guide.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
SHAPE = (16384, 1024)
FORMS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True, "momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "eps_in_sqrt": False},
    "weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True, "bias_correction": True},
}
SLOTS = {"plain": 1, "momentum": 2, "centered": 3, "nesterov": 2, "weight decay": 1}
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "u16": 2, "u8": 1}
NO_KERNEL = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}


@pytest.fixture(scope="module")
def gpu():
    """A sharding on a GPU that is described, not there."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # or it looks for a driver
    compiler = Path(importlib.util.find_spec("nvidia").submodule_search_locations[0]) / "cu13"
    os.environ["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={compiler}"
    os.environ["PATH"] = f"{compiler / 'bin'}:{os.environ['PATH']}"
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    return NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), P())


def compiled(tx, gpu):
    """A donated step of one large leaf."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def struct(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=gpu)

    params = struct(jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    state = jax.tree.map(struct, jax.eval_shape(tx.init, params))
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=gpu)
    return step.lower(params, state, params).compile()


def moved(program):
    """Of each kernel that touches large arrays, the bytes of its arguments and results a number."""
    text = program.as_text()
    sizes, kernels = {}, []
    for name, shape, operation, arguments in re.findall(
        r"%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)[,\n]", text[text.index("\nENTRY") :]
    ):
        sizes[name] = sum(
            BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        )
        if operation not in NO_KERNEL:
            read = sum(sizes[argument] for argument in re.findall(r"%([\w.-]+)", arguments))
            kernels.append((sizes[name] + read) / math.prod(SHAPE))
    return [kernel for kernel in kernels if kernel > 0.01]


@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_one_kernel(gpu, form):
    """Which reads the gradient, reads and writes parameter and slots, once, and needs no more."""
    program = compiled(rmsprop(0.1, **FORMS[form]), gpu)
    assert moved(program) == pytest.approx([4 + 8 * (1 + SLOTS[form])])
    assert program.memory_analysis().temp_size_in_bytes < 4096  # scalars


@pytest.mark.parametrize("form", FORMS)
def test_a_step_with_state_in_16_bits_is_one_kernel(gpu, form):
    program = compiled(rmsprop(0.1, **FORMS[form], storage=low_memory.bfloat16()), gpu)
    assert moved(program) == pytest.approx([4 + 8 + 4 * SLOTS[form]])
    assert program.memory_analysis().temp_size_in_bytes < 4096


def test_a_step_with_state_in_8_bits_moves_less_than_in_32(gpu):
    """Two maxima over blocks, of codes and of gradients, come before the pass that writes."""
    program = compiled(rmsprop(0.1, storage=low_memory.q8()), gpu)
    *maxima, step = sorted(moved(program))
    exponents = 3 / 128
    assert step == pytest.approx(4 + 8 + 2, abs=2 * exponents)
    assert sum(maxima) == pytest.approx(4 + 1, abs=8 * exponents)
    assert program.memory_analysis().temp_size_in_bytes < 0.05 * math.prod(SHAPE)
