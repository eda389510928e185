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
    """RMSProp: gradients are divided by the root of a running mean of their squares.

        s <- decay s + (1 - decay) |g|^2
        u  = learning_rate g / sqrt(s + eps)
        x <- x - u

    for a gradient g and a parameter x. The other arguments change this rule:

        maximize                g <- -g, before all else
        weight_decay            g <- g + weight_decay x, then
        centered                s is the variance: m <- decay m + (1 - decay) g, and s is the mean
                                of |g|^2 less |m|^2, computed so that it is never negative
        bias_correction         s and m are divided by the sum of the weights of the gradients in
                                them, which grows from 0 to 1
        eps_in_sqrt=False       u = learning_rate g / (sqrt(s) + eps)
        momentum                b <- momentum b + u, then x <- x - b
        nesterov                x <- x - (u + momentum b)
        cautious                the step acts only where it has the sign of learning_rate g, and
                                is divided by the share of the leaf where it has, or by 1e-3 if
                                that is less
        lr_in_momentum=False    u and b are without the learning rate: x <- x - learning_rate b
        decoupled_weight_decay  x <- x - learning_rate weight_decay x beside the step, instead of
                                adding to g
        split_complex           real and imaginary parts go their ways as two real numbers would:
                                |g|^2 is then the square of each

    The arithmetic is in float32, or float64 for float64 parameters, whatever the dtype of the
    gradients. Every gradient that is not NaN gives finite updates and a finite state: 0 / 0 is
    0, what is beyond the range of a dtype becomes its largest number, and under the root there is
    never less than 1e-38 in float32, nor less than learning_rate^2 / 3e38. An infinite gradient
    acts like a huge one: its coordinate stands still until s has decayed, for about
    86 / -log(decay) steps (820 at 0.9) if the gradients are then of size 1. A NaN stays NaN, in
    its own coordinate. To skip steps with either, wrap this in ``optax.apply_if_finite``.

    Parameters of 16 bits are rounded when an update is added, as with every optimizer, and a step
    that is less than 1/512 of a bfloat16 parameter, or 1/4096 of a float16 one, is lost. To train
    them nevertheless, wrap this in :func:`rmsprop_jax.low_memory.master_weights` (bfloat16), or
    keep float32 parameters and let the network round them.

    A centered s goes to 0 where the gradients hardly change, and the step then grows up to
    ``learning_rate |g| / sqrt(eps)``: choose eps accordingly.

    The five hyperparameters that are called a number below may each be a scalar array, or a
    schedule: a function from the number of earlier steps to a number or scalar array. All three
    give the same bits, and new values of an array compile nothing anew. A decay alone keeps, as a
    Python number, the digits that float32 has not. Near 1 they count: .9999 as an array makes the
    first updates wrong by 8e-5. Python and NumPy numbers, also those of a schedule, are checked
    and rounded to the precision of the arithmetic; the values of JAX arrays are not looked at,
    since they may not be known yet.

    Args:
      learning_rate: number, in units of the parameters per step. May be 0 or negative.
      decay: number in [0, 1], the weight of the past in s and m. In the plain form, the step at 0
        is learning_rate sign(g), where eps is small beside g^2; at 1, s stays initial_scale, and
        the rule is gradient descent with the rate learning_rate / sqrt(initial_scale + eps).
      eps: number of at least 0, in units of the gradient squared; of the gradient if outside
        the root.
      initial_scale: s before the first step, at least 0; a number or scalar array. TensorFlow 1
        starts at 1, most others at 0. With bias_correction it must be 0.
      eps_in_sqrt: whether eps is added inside the root (TensorFlow, Keras) or to it (PyTorch).
      centered: whether s is the variance of the gradient or its second moment.
      momentum: number of at least 0, the weight of the past in the buffer b; None for no buffer.
      nesterov: whether to look ahead along the buffer; needs momentum.
      bias_correction: whether to divide by the sum of the weights. Exact under a scheduled decay
        too. Needs decay below 1.
      lr_in_momentum: whether the learning rate goes into the buffer (TensorFlow, Keras, Optax)
        or is applied to it (PyTorch). The two agree while the learning rate does not change.
      weight_decay: number of at least 0, in units of gradient / parameter; of 1 / learning_rate
        if decoupled. None for no decay. ``update`` then needs the parameters.
      decoupled_weight_decay: whether the decay bypasses s and b; needs weight_decay.
      cautious: whether to drop the coordinates in which the step has not the sign that the
        gradient and the learning rate give it; needs momentum. The others grow by at most 1000.
      maximize: whether to climb. Unlike with a negative learning rate, weight decay still pulls
        towards 0.
      split_complex: whether complex parameters count as pairs of real ones (PyTorch) or by their
        modulus (Optax). nu is then complex where a parameter is. Agreement in sign, for
        cautious, is that of the complex numbers in either case: an acute angle.
      storage: how the slots of the state are held. None for one array each: float32, or float64
        for float64 parameters. :mod:`rmsprop_jax.low_memory` has those of 8 and 16 bits.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its state is an :class:`RMSPropState`.
      ``init`` takes a tree of floating or complex arrays; the state is placed like them. Leaves
      of integers, bools and random keys have None in the place of a state.
      ``update`` takes gradients of the same structure and shapes, of any floating dtype
      (complex for complex parameters), and gives updates in the gradients' dtypes, for
      ``optax.apply_updates``, which rounds the sum to the dtype of the parameter
      (``equinox.apply_updates`` does not). A gradient of None gives the update None, which that
      function of Optax does not take, and leaves its state. So does float0, which JAX gives for
      integers.
      Transformations of equal arguments are equal, as are their copies and pickles; arrays and
      schedules in them are equal if they are the same object.
      Complex gradients are, as everywhere in Optax, those that point uphill: the conjugates of
      what ``jax.grad`` gives.

    Raises:
      TypeError: if an argument is of the wrong type, a parameter no array and no number, or the
        state another transformation's.
      ValueError: if a number is out of range, an argument lacks what it needs, the state was
        made with other arguments, or the parameters are missing.
      AssertionError: by chex, from ``update``, if a gradient does not fit the state, or a
        parameter the gradient, in structure, shape, dtype or by being complex. It names the leaf,
        or the place in the tree, and what both are. ``chex.disable_asserts`` turns this off.

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

    With its first nine parameters it equals ``optax.rmsprop``, except that updates have the
    gradients' dtype, where Optax promotes to the wider of gradient and state.

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
    """Divides gradients by the root of a running mean of their squares; no learning rate.

        s <- decay s + (1 - decay) |g|^2
        u  = g / sqrt(s + eps)

    This is :func:`rmsprop` with a learning rate of -1, and has its dtypes, errors and sources.
    It equals ``optax.scale_by_rms`` and, if centered, ``optax.scale_by_stddev``.

    Args:
      decay: number in [0, 1], the weight of the past in s; an array or a schedule, too.
      eps: number of at least 0, in units of the gradient squared; of the gradient if outside
        the root. An array or a schedule, too.
      initial_scale: s before the first step, at least 0; a number or scalar array.
      eps_in_sqrt: whether eps is added inside the root or to it.
      bias_correction: whether s is divided by the sum of the weights of the gradients in it.
      centered: whether s is the variance of the gradient or its second moment.
      storage: how the slots of the state are held; None for one array each, or one of
        :mod:`rmsprop_jax.low_memory`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is an :class:`RMSPropState`.

    Raises:
      TypeError, ValueError, AssertionError: as :func:`rmsprop`.

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
