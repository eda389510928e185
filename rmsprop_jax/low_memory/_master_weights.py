"""Master weights: parameters in bfloat16 that train like float32."""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import export, lax
import jax.numpy as jnp
from jax.tree_util import KeyPath, tree_leaves_with_path, tree_map_with_path
import optax

from rmsprop_jax import _checks
from rmsprop_jax._gradients import counterparts, gradients
from rmsprop_jax._leaves import describe, leaf_name, leaf_numbers, leaf_type
from rmsprop_jax._storage import beside, full_like
from rmsprop_jax._transformation import transformation
from rmsprop_jax._types import PyTree
from rmsprop_jax.low_memory._parts import CORRECTIONS, joined, moved


class MasterWeightsState(NamedTuple):
    """The state of master weights; the parameters hold the rest.

    Attributes:
      count: number of steps taken, an int32 scalar that stops at its largest value.
      corrections: a tree with the structure and placement of the parameters: int16 for 32 bits,
        int8 for 24, and ``optax.MaskedNode()`` for each leaf that is not bfloat16. None for 16
        bits.
      inner_state: the state of the wrapped transformation, for the master weights.
    """

    count: jax.Array  # type: ignore[assignment] # hides tuple's method, as Optax's states do
    corrections: PyTree
    inner_state: optax.OptState


for _kind, _name in (
    (MasterWeightsState, "rmsprop_jax.MasterWeightsState"),
    (optax.MaskedNode, "optax.MaskedNode"),
):
    with contextlib.suppress(ValueError):  # registered already, e.g. if this module is reloaded
        export.register_namedtuple_serialization(_kind, serialized_name=_name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MasterWeights:
    """The wrapped transformation, and how it is wrapped. Has the two functions of the wrapper."""

    tx: optax.GradientTransformation
    bits: int = dataclasses.field(metadata={"static": True})
    seed: int = dataclasses.field(metadata={"static": True})

    def init(self, params: optax.Params) -> MasterWeightsState:
        dtype = CORRECTIONS[self.bits]

        def correction(path: KeyPath, param: Any) -> Any:
            return full_like(param, 0, dtype) if _is_split(path, param) else optax.MaskedNode()

        return MasterWeightsState(
            count=beside(jnp.zeros([], jnp.int32), params),
            corrections=tree_map_with_path(correction, params) if dtype else None,
            inner_state=self.tx.init(tree_map_with_path(_widened, params)),
        )

    def update(
        self,
        updates: optax.Updates,
        state: MasterWeightsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MasterWeightsState]:
        if not isinstance(state, MasterWeightsState):
            raise TypeError(f"state must be a MasterWeightsState, got {type(state).__name__}")
        if params is None:
            raise ValueError(
                "master_weights needs the parameters: call update(grads, state, params)"
            )
        grads = gradients(updates)
        tree, leaves = grads.structure.unflatten, grads.structure.flatten_up_to
        xs = counterparts(grads, "params", params)
        held = [None] * len(xs) if state.corrections is None else leaves(state.corrections)
        self._check(params, xs, held)

        split = list(map(is_bfloat16, xs))
        masters = [joined(x, c) if s else x for s, x, c in zip(split, xs, held, strict=True)]
        gs = [
            jnp.asarray(g, jnp.float32) if s and g is not None else g
            for s, g in zip(split, grads.leaves, strict=True)
        ]
        tx = self.tx  # optax.MultiSteps is not one, and takes extra arguments
        if isinstance(tx, optax.GradientTransformation):
            tx = optax.with_extra_args_support(tx)
        steps, inner_state = tx.update(tree(gs), state.inner_state, tree(masters), **extra_args)

        us, numbers = leaves(steps), leaf_numbers(grads.structure)
        for i, u in enumerate(us):
            if split[i] and u is not None:
                us[i], held[i] = moved(
                    xs[i], held[i], masters[i], u, state.count, numbers[i], self.bits, self.seed
                )
        return tree(us), MasterWeightsState(
            count=optax.safe_increment(state.count),
            corrections=None if state.corrections is None else tree(held),
            inner_state=inner_state,
        )

    def in_words(self) -> str:
        """What describe adds to the rules inside."""
        return f"with master weights of {self.bits} bits"

    def _check(self, params: optax.Params, xs: list[Any], held: list[Any]) -> None:
        """Refuses corrections of other parameters, or of another number of bits."""
        for i, (x, correction) in enumerate(zip(xs, held, strict=True)):
            wanted = CORRECTIONS[self.bits] if is_bfloat16(x) else None
            form = (x.shape, jnp.dtype(wanted)) if wanted else None
            if form != _form(correction):
                path = tree_leaves_with_path(params, is_leaf=lambda leaf: leaf is None)[i][0]
                got = "none" if _form(correction) is None else describe(correction)
                raise ValueError(
                    f"state.corrections of parameter {leaf_name(path)!r}, {describe(x)}, must be "
                    f"{f'{form[1]}{list(form[0])}' if form else 'none'} for bits={self.bits}, got "
                    f"{got}: this state was made for other parameters, or with other bits"
                )


def _form(correction: Any) -> tuple[tuple[int, ...], Any] | None:
    return (correction.shape, correction.dtype) if hasattr(correction, "dtype") else None


def is_bfloat16(param: Any) -> bool:
    return getattr(param, "dtype", None) == jnp.bfloat16


def _is_split(path: KeyPath, param: Any) -> bool:
    """Whether a parameter is part of a master weight; otherwise it is one itself, or has none."""
    kind = leaf_type(param)
    if kind.kind is float and jnp.finfo(kind.dtype).bits < 32 and not is_bfloat16(param):
        raise TypeError(
            f"parameter {leaf_name(path)!r} must be bfloat16, or have 32 bits or more, got "
            f"{describe(param)}, whose range is narrower than that of a float32 master weight: "
            "make it bfloat16, or leave it out with optax.masked or optax.partition"
        )
    return is_bfloat16(param)


def _widened(path: KeyPath, param: Any) -> Any:
    """The master weight of a parameter without its correction."""
    if not _is_split(path, param):
        return param
    if isinstance(param, jax.ShapeDtypeStruct):
        return param.update(dtype=jnp.float32)
    return lax.convert_element_type(param, jnp.float32)


def master_weights(
    tx: optax.GradientTransformation, bits: int = 24, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Trains bfloat16 parameters as if they were float32.

        w = p + c                       the master weight, float32
        u = what tx adds to w, for float32 gradients
        p' = w + u, rounded to bfloat16, and c' = w + u - p', held in bits - 16 bits
        p' - p, in float32, is the update

    Here p is a bfloat16 parameter. Its neighbouring numbers are 1/256 to 1/128 of p away, so
    without master weights a step of less than half that distance does not move p at all. Nothing is
    stored twice: p holds the upper 16 bits of w, and c the others.

    ====  ==========  =======================================================================
    bits  bytes of c  w'
    ====  ==========  =======================================================================
    32    2           w + u, as ``optax.apply_updates`` adds to float32 parameters
    24    1           w + u, rounded stochastically to 16 significant bits; its mean is exact
    16    0           w + u, rounded stochastically to the 8 significant bits of p
    ====  ==========  =======================================================================

    ``optax.apply_updates(params, updates)`` is exactly p', unless p' - p is not a float32 number.
    That requires a p' at least 2^15 times smaller than p. Then p' and w' are both off by up to
    2^-24 of the update, as if it had been rounded once more. With 32 bits this is rare: p must be a
    power of two, w below it, and w' about 2^16 times smaller and of the opposite sign. CPUs treat
    numbers below 1.2e-38 as 0, differences included; there, p' and w' may be off by 5e-38. Beyond
    3.39e38, where the range of bfloat16 ends, w' saturates.

    Leaves of float32, float64, complex numbers and integers pass to tx unchanged, as do their
    gradients and updates. float16 and float8 are refused, since their range is narrower than that
    of w. If parameters are changed between steps, for instance clipped or averaged, the new values
    count: w is p + c for the new p. The random bits of the rounding are the same in every program,
    as in :func:`q8`, and independent of those used for states.

    If an update is not finite, or w + u is not, the parameter becomes NaN or infinite in that
    element only, as with float32 parameters, and c is unchanged.

    Transformations that change updates must be *inside*, where everything is float32; those that
    change gradients may also come before it in ``optax.chain``:

    - ``optax.apply_if_finite``: to skip steps that are not finite, use
      ``master_weights(optax.apply_if_finite(tx, 5))``. Around master_weights it raises a TypeError
      of ``jax.lax.cond``, and so do ``optax.conditionally_mask`` and
      ``optax.conditionally_transform``: they have a branch whose updates have the dtype of the
      gradients, which cannot hold p' - p.
    - ``optax.MultiSteps`` works inside and around, but around it rounds the mean of the gradients
      to bfloat16.
    - ``optax.flatten`` works inside. Around, it turns leaves of several dtypes into one float32
      leaf, and bfloat16 leaves stall as before.
    - Transformations of gradients, such as ``optax.clip_by_global_norm``, are computed in bfloat16
      if they come before it.
    - :func:`rmsprop_jax.sharding.zero1` and ``zero1_mapped`` belong around it, where they shard the
      corrections, too. They gather the updates, 4 bytes per parameter.

    On a GPU, a jitted step with ``optax.apply_updates`` reads and writes everything in one kernel.
    XLA:CPU uses the updates twice with 24 and 32 bits, and stores them: 4 bytes per parameter.

    ``optax.apply_updates`` adds float32 to bfloat16, which needs
    ``jax_numpy_dtype_promotion="standard"``, JAX's default. Do not use ``equinox.apply_updates``,
    which leaves the sum in float32.

    Args:
      tx: any gradient transformation of this library or of Optax.
      bits: number of bits of a master weight: 16, 24 or 32.
      seed: seed of the stochastic rounding; any integer.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its state is a NamedTuple of ``count``;
      ``corrections``, a tree of int16 or int8 with the structure and placement of the parameters
      and ``optax.MaskedNode()`` for leaves that are not bfloat16, or None if bits is 16; and
      ``inner_state``.

      ``update`` needs params, and takes gradients of any floating dtype. A gradient of None gives
      the update that tx returns for it, and leaves the correction unchanged. Derivatives ignore the
      rounding.

    Raises:
      TypeError: if an argument has the wrong type, or a parameter a narrow floating dtype.
      ValueError: if bits is another number, if params are missing, or if the state belongs to other
        parameters or another number of bits.
      AssertionError: raised by chex if a gradient does not match its parameter.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import low_memory, rmsprop
      >>> def trained(tx, dtype):
      ...     x, g = jnp.ones((), dtype), jnp.full((), 0.01, dtype)
      ...     state = tx.init(x)
      ...     for _ in range(100):
      ...         updates, state = tx.update(g, state, x)
      ...         with jax.numpy_dtype_promotion("standard"):  # JAX's default
      ...             x = optax.apply_updates(x, updates)
      ...     return f"{x:.4f}"
      >>> tx = rmsprop(1e-3)
      >>> trained(tx, "float32"), trained(tx, "bfloat16")
      ('0.8909', '0.9922')
      >>> trained(low_memory.master_weights(tx), "bfloat16")
      '0.8906'

    Sources: a master weight as a bfloat16 parameter and a correction in units of its last place,
    FlashOptim, arXiv:2602.23349, 2026; float32 master weights, Micikevicius et al.,
    arXiv:1710.03740, 2018; stochastic rounding, Gupta et al., arXiv:1502.02551, 2015. The code is
    our own.
    """
    if not callable(getattr(tx, "init", None)) or not callable(getattr(tx, "update", None)):
        raise TypeError(f"tx must be a gradient transformation, got {tx!r}")
    bits, seed = _checks.integer("bits", bits), _checks.integer("seed", seed)
    if bits not in CORRECTIONS:
        raise ValueError(f"bits must be 16, 24 or 32, got {bits}")
    return transformation(MasterWeights(tx, bits, seed))
