"""What would a GPU do? Compiles steps for an H200, without one, and counts kernels and bytes.

    make test-gpu    # its environment has jax's CUDA plugin and NVIDIA's assembler
    .venv-gpu/bin/python benchmarks/gpu_programs.py            # writes results/gpu_programs.json
    .venv-gpu/bin/python benchmarks/gpu_programs.py --quick    # one form; writes nothing

A step is update and apply_updates with donated buffers, on one leaf of 16.8 million parameters.
Bytes are per parameter: "bytes moved" counts the arguments and results of all kernels, which memory
has to deliver if they are in no cache; "temporary bytes" is the program's temporary memory.
"kernels" counts those that touch more than scalars. Gradients have the dtype of the parameters;
bits are those of master weights.
"""

from collections.abc import Sequence
import importlib.util
import itertools
import math
import os
from pathlib import Path
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
import optax
from tqdm import tqdm

import _results
from libraries import FORMS, STORAGES, train_step
from rmsprop_jax import low_memory, rmsprop

# What XLA needs to know to compile without a device. Compute capability 9.0 is Hopper; the numbers
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
BITS = (32, 24, 16)  # of master weights
ITEMSIZE = {
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "s16": 2,
    "u16": 2,
    "u8": 1,
    "s8": 1,
    "pred": 1,
}
NO_KERNEL = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
INSTRUCTION = re.compile(r"%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)[,\n]")


def gpu() -> NamedSharding:
    """The sharding of an array on a GPU that is described but absent."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # otherwise it looks for a driver
    nvidia = importlib.util.find_spec("nvidia")
    assert nvidia is not None
    assert nvidia.submodule_search_locations is not None
    compiler = Path(nvidia.submodule_search_locations[0]) / "cu13"
    os.environ["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={compiler}"
    os.environ["PATH"] = f"{compiler / 'bin'}:{os.environ['PATH']}"
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    return NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())


def compiled(tx: optax.GradientTransformation, place: NamedSharding, dtype: str = "float32") -> Any:
    """A compiled step on one large leaf, with donated buffers."""

    def struct(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

    params = struct(jax.ShapeDtypeStruct(SHAPE, dtype))
    state = jax.tree.map(struct, jax.eval_shape(tx.init, params))
    step = jax.jit(train_step(tx), donate_argnums=(0, 1), out_shardings=place)
    return step.lower(params, state, params).compile()


def moved(program: Any) -> list[float]:
    """Bytes of arguments and results per parameter, of each kernel that touches large arrays."""
    text = program.as_text()
    sizes: dict[str, int] = {}
    kernels = []
    for name, shape, operation, arguments in INSTRUCTION.findall(text[text.index("\nENTRY") :]):
        sizes[name] = sum(
            ITEMSIZE[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        )
        if operation not in NO_KERNEL:
            read = sum(sizes[argument] for argument in re.findall(r"%([\w.-]+)", arguments))
            kernels.append((sizes[name] + read) / math.prod(SHAPE))
    return [kernel for kernel in kernels if kernel > 1e-4]


def temporary(program: Any) -> float:
    """Bytes of temporary memory per parameter."""
    return program.memory_analysis().temp_size_in_bytes / math.prod(SHAPE)


def main(argv: Sequence[str] | None = None) -> list[_results.Row]:
    quick = _results.parse(_results.parser(__doc__), argv).quick
    place = gpu()
    rows = []
    for form in tqdm([*FORMS][:1] if quick else FORMS, unit="form"):
        whole = 0.0
        for bits, (name, storage) in itertools.product((None, *BITS), STORAGES.items()):
            tx = rmsprop(1e-3, **FORMS[form], storage=storage)
            if bits:
                program = compiled(low_memory.master_weights(tx, bits), place, "bfloat16")
            else:
                program = compiled(tx, place)
            kernels = moved(program)
            whole = whole or sum(kernels)  # that of the first
            rows.append(
                {
                    "form": form,
                    "parameters": f"bfloat16, {bits} bits" if bits else "float32",
                    "state": name,
                    "kernels": len(kernels),
                    "bytes moved": f"{sum(kernels):.1f}",
                    "of float32": f"{sum(kernels) / whole:.2f}",
                    "temporary bytes": f"{temporary(program):.2f}",
                }
            )
    return _results.finish("gpu_programs", rows, quick)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for this process itself
    main()
