"""The forms in which a client's program is run, with our RMSProp and with Optax's.

Each test states the largest difference that was measured between the two, in any element. It is
rounding: the two compute the same sums and products in different orders.
"""

import pytest

FORMS = {
    "plain": {},
    "full": {
        "decay": 0.95,
        "eps": 1e-3,
        "initial_scale": 0.1,
        "centered": True,
        "momentum": 0.5,
        "nesterov": True,
    },
}


@pytest.fixture(params=FORMS)
def form(request):
    """Arguments that rmsprop_jax.rmsprop and optax.rmsprop both take."""
    return FORMS[request.param]
