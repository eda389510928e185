"""RMSProp for JAX as one pure Optax gradient transformation."""

from rmsprop_jax import convert, dialects, low_memory, recipes, rows, sharding
from rmsprop_jax._describe import describe
from rmsprop_jax._diagnostics import diagnostics
from rmsprop_jax._rmsprop import rmsprop, scale_by_rms
from rmsprop_jax._rule import RMSPropState

__all__ = [
    "RMSPropState",
    "convert",
    "describe",
    "diagnostics",
    "dialects",
    "low_memory",
    "recipes",
    "rmsprop",
    "rows",
    "scale_by_rms",
    "sharding",
]
__version__ = "0.1.0"
