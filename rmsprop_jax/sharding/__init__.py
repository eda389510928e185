"""Where the state lies on many devices: like its parameters, or one part of it on each.

:func:`fsdp_shardings` says how to split parameters, and :func:`state_sharding` where each array of
a state belongs, given that of the parameters; :func:`zero1` under ``jit``, and :func:`zero1_mapped`
inside ``pmap`` and ``shard_map``, split the state of parameters that every device holds whole;
:func:`move_state` takes a state from one number of devices to another. :func:`report` says what a
device will hold.
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
