"""RMSProp implemented again from its definitions, as a loop over NumPy arrays.

It imports nothing from the library and shares none of its tricks. Averages are sums over the whole
history with explicit weights, the variance takes a second pass over that history, and the
arithmetic is in NumPy's long double.
"""

import numpy as np


def run(
    gradients,
    x=None,
    *,
    learning_rate,
    decay=0.9,
    eps=1e-8,
    initial_scale=0.0,
    eps_in_sqrt=True,
    centered=False,
    momentum=None,
    nesterov=False,
    bias_correction=False,
    lr_in_momentum=True,
    weight_decay=None,
    decoupled_weight_decay=False,
    cautious=False,
    maximize=False,
    split_complex=False,
    dtype=np.longdouble,
):
    """The updates of every step; a hyperparameter is a number or one number a step."""
    if split_complex and np.iscomplexobj(gradients[0]):
        options = {k: v for k, v in locals().items() if k not in ("gradients", "x")}
        parts = [
            run([part(g) for g in gradients], None if x is None else part(x), **options)
            for part in (np.real, np.imag)
        ]
        return [real + 1j * imaginary for real, imaginary in zip(*parts, strict=True)]
    wide = np.result_type(dtype, np.complex64) if np.iscomplexobj(gradients[0]) else dtype
    gradients = [np.asarray(g, wide) for g in gradients]
    x = np.zeros_like(gradients[0]) if x is None else np.asarray(x, wide)
    buffer = np.zeros_like(gradients[0])
    weights, history, updates = [], [], []
    start = 1.0  # the weight that is left of initial_scale

    def at(value, t):
        return dtype(value[t] if isinstance(value, list | np.ndarray) else value)

    for t, g in enumerate(gradients):
        eta, gamma, epsilon = at(learning_rate, t), at(decay, t), at(eps, t)
        if maximize:
            g = -g
        if weight_decay is not None and not decoupled_weight_decay:
            g = g + at(weight_decay, t) * x
        history.append(g)
        weights = [w * gamma for w in weights] + [1 - gamma]
        start *= gamma
        total = sum(weights) if bias_correction else dtype(1)
        shares = [w / total for w in weights]
        mean = sum(w * h for w, h in zip(shares, history, strict=True)) if centered else 0
        # In two passes, so that nothing cancels: E|g|^2 - |m|^2 = E|g - m|^2 + (1 - E 1) |m|^2.
        second = sum(w * np.abs(h - mean) ** 2 for w, h in zip(shares, history, strict=True))
        second = second + (1 - sum(shares)) * np.abs(mean) ** 2 + start * initial_scale
        root = np.sqrt(second + epsilon) if eps_in_sqrt else np.sqrt(second) + epsilon
        step = g / root
        if lr_in_momentum:
            step = eta * step
        if momentum is not None:
            buffer = at(momentum, t) * buffer + step
            step = step + at(momentum, t) * buffer if nesterov else buffer
            if cautious:
                down = -g if lr_in_momentum and eta < 0 else g
                mask = (np.real(step * np.conj(down)) > 0).astype(dtype)
                step = step * mask / max(mask.mean(), 1e-3)
        if not lr_in_momentum:
            step = eta * step
        if weight_decay is not None and decoupled_weight_decay:
            step = step + eta * at(weight_decay, t) * x
        updates.append(-step)
        x = x - step
    return updates
