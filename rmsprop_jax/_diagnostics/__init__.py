"""Scalars to log: what the state and the next step say about a run."""

from rmsprop_jax._diagnostics._diagnostics import diagnostics as diagnostics
