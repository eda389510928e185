"""RMSProp as an Optax gradient transformation: the two functions that users call."""

import optax

from rmsprop_jax import _checks, _equations
from rmsprop_jax._rule import Rule
from rmsprop_jax._storage import FLOAT32, Storage
from rmsprop_jax._transformation import transformation
from rmsprop_jax._types import Scalar, ScalarOrSchedule


def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    lr_in_momentum: bool = True,
    weight_decay: ScalarOrSchedule | None = None,
    decoupled_weight_decay: bool = False,
    cautious: bool = False,
    maximize: bool = False,
    split_complex: bool = False,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp: divides each gradient by the root of a running mean of its squares.

        s <- decay s + (1 - decay) |g|^2
        u  = learning_rate g / sqrt(s + eps)
        x <- x - u

    Here g is a gradient and x its parameter. The other arguments change this rule:

        maximize                g <- -g, before everything else
        weight_decay            g <- g + weight_decay x, before s is updated
        centered                s is the variance: m <- decay m + (1 - decay) g, and s is the mean
                                of |g|^2 minus |m|^2, computed so that it is never negative
        bias_correction         s and m are divided by the sum of the weights of the gradients in
                                them, which grows from 0 to 1
        eps_in_sqrt=False       u = learning_rate g / (sqrt(s) + eps)
        momentum                b <- momentum b + u, then x <- x - b
        nesterov                x <- x - (u + momentum b)
        cautious                the step is 0 in the elements where its sign is not that of
                                learning_rate g; elsewhere it is divided by the fraction of the
                                leaf's elements that remain, or by 1e-3 if that is larger
        lr_in_momentum=False    u and b omit the learning rate: x <- x - learning_rate b
        decoupled_weight_decay  x <- x - learning_rate weight_decay x in addition to the step;
                                nothing is added to g
        split_complex           real and imaginary parts are treated as two independent real
                                numbers: the square of each replaces |g|^2

    The arithmetic is in float32, or in float64 for float64 parameters, whatever the dtype of the
    gradients. Updates and state stay finite for every gradient that is not NaN: 0 / 0 is 0, a value
    beyond the range of its dtype becomes the largest number of that dtype, and the number under the
    root is never less than 1e-38 in float32, nor less than learning_rate^2 / 3e38.

    An infinite gradient acts like a huge one: its element does not move until s has decayed, which
    takes about 86 / -log(decay) steps (820 at 0.9) if later gradients are of size 1. A NaN stays
    NaN, in its own element only. To skip steps that contain either, wrap the transformation in
    ``optax.apply_if_finite``.

    16-bit parameters are rounded when an update is added, as with every optimizer: a step smaller
    than 1/512 of a bfloat16 parameter, or 1/4096 of a float16 one, is lost. To train them anyway,
    wrap the transformation in :func:`rmsprop_jax.low_memory.master_weights` (bfloat16), or keep the
    parameters in float32 and let the network round them.

    With an eps as small as 1e-8 a centered run can diverge, since the step grows up to
    ``learning_rate |g| / sqrt(eps)`` where the variance goes to 0; use 1e-4 to 1e-2, as Graves and
    DQN did.

    ``learning_rate``, ``decay``, ``eps``, ``momentum`` and ``weight_decay`` may each be a number, a
    scalar array, or a schedule: a function from the number of earlier steps to a number or scalar
    array. All three give bit-identical results, and a new value in an array does not cause
    recompilation. The exception is ``decay``: as a Python number it keeps digits that float32
    lacks. They matter near 1, where .9999 as an array makes the first updates wrong by 8e-5.

    Python and NumPy numbers, including those that a schedule returns, are checked and rounded to
    the precision of the arithmetic. The values of JAX arrays are not checked, since they may not be
    known yet.

    Args:
      learning_rate: number, in units of the parameters per step. May be 0 or negative.
      decay: number in [0, 1], the weight of the past in s and m. In the plain rule, decay=0 gives
        the step learning_rate sign(g), where eps is small compared to g^2; with decay=1, s stays at
        initial_scale, and the rule is gradient descent with the learning rate
        learning_rate / sqrt(initial_scale + eps).
      eps: number of at least 0, in units of the gradient squared, or of the gradient if it is added
        outside the root.
      initial_scale: s before the first step, at least 0; a number or scalar array. TensorFlow 1
        starts at 1, most others at 0. With bias_correction it must be 0.
      eps_in_sqrt: whether eps is added inside the root (TensorFlow, Keras) or outside (PyTorch).
      centered: whether s is the variance of the gradient instead of its second moment.
      momentum: number of at least 0, the weight of the past in the buffer b; None for no buffer.
      nesterov: whether to look ahead along the buffer; needs momentum.
      bias_correction: whether to divide s and m by the sum of their weights. This is exact under a
        scheduled decay, too. Needs decay below 1.
      lr_in_momentum: whether the learning rate is part of the buffer (TensorFlow, Keras, Optax)
        or multiplies it afterwards (PyTorch). The two agree while the learning rate is constant.
      weight_decay: number of at least 0, in units of gradient / parameter, or of 1 / learning_rate
        if decoupled. None for no decay. Otherwise ``update`` needs the parameters.
      decoupled_weight_decay: whether the decay bypasses s and b; needs weight_decay.
      cautious: whether to drop the elements in which the step does not have the sign that the
        gradient and the learning rate give it; needs momentum. The others grow by a factor of at
        most 1000.
      maximize: whether to maximize the objective. Unlike with a negative learning rate, weight
        decay still pulls towards 0.
      split_complex: whether a complex number counts as a pair of real ones (PyTorch) or by its
        modulus (Optax). If split, nu is complex where a parameter is. In either case, cautious
        compares complex numbers: two have the same sign if the angle between them is acute.
      storage: how the slots of the state are stored. None for one array each, in float32, or in
        float64 for float64 parameters. :mod:`rmsprop_jax.low_memory` has storages of 8 and 16 bits.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is an :class:`RMSPropState`.

      ``init`` takes a tree of floating or complex arrays and places the state like them. Leaves of
      integers, bools and random keys get None instead of a state.

      ``update`` takes gradients of the same structure and shapes, of any floating dtype (complex
      for complex parameters), and returns updates in the gradients' dtypes. Apply them with
      ``optax.apply_updates``, which rounds the sum to the dtype of the parameter;
      ``equinox.apply_updates`` does not. A gradient of None gives the update None, which
      ``optax.apply_updates`` does not accept, and leaves its state unchanged. So does a gradient of
      dtype float0, which JAX gives for integers. Complex gradients are, as everywhere in Optax,
      those that point uphill: the conjugates of what ``jax.grad`` returns.

      Transformations with equal arguments are equal, as are their copies and pickles. Arrays and
      schedules count as equal only if they are the same object.

    Raises:
      TypeError: if an argument has the wrong type, if a parameter is neither an array nor a number,
        or if the state is that of another transformation.
      ValueError: if a number is out of range, if an argument needs another one that is missing, if
        the state was made with other arguments, or if the parameters are missing.
      AssertionError: raised by chex in ``update`` if a gradient does not match the state, or a
        parameter does not match the gradient, in structure, shape, dtype, or in being real or
        complex. The message names the leaf, or the node of the tree, and describes both.
        ``chex.disable_asserts`` turns this check off.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import rmsprop
      >>> def loss(x):
      ...     return 0.1 * x[0] ** 2 + 2 * x[1] ** 2
      >>> tx = rmsprop(learning_rate=0.4, decay=0.9, eps=1e-6)
      >>> x = jnp.array([-5.0, -2.0])
      >>> state = tx.init(x)
      >>> for _ in range(20):
      ...     updates, state = tx.update(jax.grad(loss)(x), state)
      ...     x = optax.apply_updates(x, updates)
      >>> print(f"{x[0]:.4f} {abs(x[1]):.4f}")
      -0.0106 0.0000

    Called with its first nine arguments only, it equals ``optax.rmsprop``, except that updates have
    the gradients' dtype, where Optax promotes to the wider of gradient and state.

    Sources: Hinton, Srivastava and Swersky, "Neural networks for machine learning", lecture 6e,
    2012 (the rule); Graves, arXiv:1308.0850, 2013 (centered, with momentum); Loshchilov and
    Hutter, arXiv:1711.05101, 2017 (decoupled weight decay); Liang et al., arXiv:2411.16085, 2024
    (cautious).
    """
    number, flag = _checks.number, _checks.flag
    hyper = _equations.Hyper(
        learning_rate=number("learning_rate", learning_rate),
        decay=number("decay", decay),
        eps=number("eps", eps),
        momentum=None if momentum is None else number("momentum", momentum),
        weight_decay=None if weight_decay is None else number("weight_decay", weight_decay),
    )
    initial_scale = number("initial_scale", initial_scale, schedule=False)
    variant = _equations.Variant(
        eps_in_sqrt=flag("eps_in_sqrt", eps_in_sqrt),
        centered=flag("centered", centered),
        bias_correction=flag("bias_correction", bias_correction),
        nesterov=flag("nesterov", nesterov),
        lr_in_momentum=flag("lr_in_momentum", lr_in_momentum),
        decoupled_weight_decay=flag("decoupled_weight_decay", decoupled_weight_decay),
        cautious=flag("cautious", cautious),
        maximize=flag("maximize", maximize),
        split_complex=flag("split_complex", split_complex),
        storage=_checks.instance("storage", FLOAT32 if storage is None else storage, Storage),
    )
    for name, needed in (
        ("nesterov", "momentum"),
        ("cautious", "momentum"),
        ("decoupled_weight_decay", "weight_decay"),
    ):
        if getattr(variant, name) and getattr(hyper, needed) is None:
            raise ValueError(f"{name}=True needs {needed}, which is None")
    if bias_correction and isinstance(hyper.decay, float) and hyper.decay == 1:
        raise ValueError("bias_correction=True needs decay < 1, got 1: no gradient would count")
    if bias_correction and isinstance(initial_scale, float) and initial_scale != 0:
        raise ValueError(
            f"bias_correction=True removes the start value: initial_scale must be 0, "
            f"got {initial_scale}"
        )

    return transformation(Rule(hyper, variant, initial_scale))


def scale_by_rms(
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the root of a running mean of their squares, without a learning rate.

        s <- decay s + (1 - decay) |g|^2
        u  = g / sqrt(s + eps)

    This is :func:`rmsprop` with a learning rate of -1, and has the same dtypes, errors and sources.
    It equals ``optax.scale_by_rms`` and, if centered, ``optax.scale_by_stddev``.

    Args:
      decay: number in [0, 1], the weight of the past in s; or an array or a schedule.
      eps: number of at least 0, in units of the gradient squared, or of the gradient if it is added
        outside the root; or an array or a schedule.
      initial_scale: s before the first step, at least 0; a number or scalar array.
      eps_in_sqrt: whether eps is added inside the root or outside.
      bias_correction: whether s is divided by the sum of the weights of the gradients in it.
      centered: whether s is the variance of the gradient instead of its second moment. With an eps
        as small as 1e-8 a centered run can diverge, since the update grows up to
        ``|g| / sqrt(eps)`` where the variance goes to 0; use 1e-4 to 1e-2, as Graves and DQN did.
      storage: how the slots of the state are stored: None for one array each, or a storage of
        :mod:`rmsprop_jax.low_memory`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is an :class:`RMSPropState`.

    Raises:
      TypeError, ValueError, AssertionError: as in :func:`rmsprop`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import scale_by_rms
      >>> tx = optax.chain(scale_by_rms(decay=0.5), optax.scale_by_learning_rate(0.1))
      >>> g = jnp.array([3.0, -0.01])
      >>> updates, _ = tx.update(g, tx.init(g))
      >>> print(f"{updates[0]:.4f} {updates[1]:.4f}")
      -0.1414 0.1414
    """
    return rmsprop(
        -1.0,
        decay,
        eps,
        initial_scale,
        eps_in_sqrt,
        centered,
        bias_correction=bias_correction,
        storage=storage,
    )
