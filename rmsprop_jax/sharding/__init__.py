"""Placement of optimizer state on many devices: like the parameters, or one part on each device.

- :func:`fsdp_shardings` decides how to split parameters.
- :func:`state_sharding` returns the sharding of each array of a state, given those of the
  parameters.
- :func:`zero1` under ``jit``, and :func:`zero1_mapped` inside ``pmap`` and ``shard_map``, split the
  state of replicated parameters.
- :func:`move_state` converts a state from one number of devices to another.
- :func:`report` computes what each device will hold.
"""

from rmsprop_jax.sharding._fsdp import fsdp_shardings
from rmsprop_jax.sharding._report import Report, Whole, report
from rmsprop_jax.sharding._state import move_state, state_sharding
from rmsprop_jax.sharding._zero1 import zero1
from rmsprop_jax.sharding._zero1_mapped import zero1_mapped

__all__ = [
    "Report",
    "Whole",
    "fsdp_shardings",
    "move_state",
    "report",
    "state_sharding",
    "zero1",
    "zero1_mapped",
]
