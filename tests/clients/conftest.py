"""The forms in which a client's program is run, with ours and with the same of Optax.

Each test says which difference was measured between the two, the largest in any number. That is
rounding: the two take the same sums and products in other orders.
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
