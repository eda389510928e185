"""RMSProp for JAX as one pure Optax gradient transformation."""

from rmsprop_jax._rmsprop import RMSPropState, rmsprop, scale_by_rms

__all__ = ["RMSPropState", "rmsprop", "scale_by_rms"]
__version__ = "0.1.0"
