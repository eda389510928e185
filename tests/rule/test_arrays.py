"""Operations on one array, compared with NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import rmsprop
from rmsprop_jax._arrays import abs2, clip, narrow, share_of, unfused


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_unfused_product_is_rounded_before_it_is_added(dtype):
    """Else compilers contract the two: on CPUs a fifth of the sums have another last digit."""
    a, b, c = np.random.default_rng(0).standard_normal((3, 10_000)).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        got = jax.jit(lambda zero: unfused(a * jnp.asarray(b), zero) + c)(np.int32(0))
    np.testing.assert_array_equal(got, a * b + c)


def test_what_is_not_fused_keeps_the_sign_of_zero_and_what_is_not_finite():
    x = np.float32([-0.0, 0, np.nan, np.inf, -np.inf, 3])
    got = np.asarray(jax.jit(unfused)(x, np.int32(0)))
    np.testing.assert_array_equal(got.view(np.int32), x.view(np.int32))


def test_what_is_not_fused_keeps_its_derivatives():
    of_product = jax.jit(jax.grad(lambda x: unfused(x * x, jnp.int32(0))))
    assert of_product(np.float32(3)) == 6


def test_the_sum_of_the_weights_has_the_same_bits_in_every_program():
    decay = np.float32(0.9)
    tx = rmsprop(0.1, decay, bias_correction=True)
    g = np.ones(3, np.float32)
    states = jax.lax.scan(lambda s, _: (tx.update(g, s)[1],) * 2, tx.init(g), length=60)[1]
    want = [np.float32(0)]
    for _ in range(60):
        want.append(decay * want[-1] + (1 - decay))
    np.testing.assert_array_equal(states.weight_sum, want[1:])


@pytest.mark.parametrize("shape", [(4,), (4, 1, 3), (4, 2**28), (4, 2**30)])
def test_a_share(shape):
    """Also of more than int32 can count."""
    some = np.reshape([True, False, True, True], (4, *[1] * len(shape[1:])))
    share = jax.jit(lambda some: share_of(jnp.broadcast_to(some, shape), jnp.dtype(np.float32)))
    assert share(some) == 0.75


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_the_share_of_one_and_of_none(shape):
    flags = np.ones(shape, bool)
    assert share_of(jnp.asarray(flags), jnp.dtype(np.float32)) == flags.size


def test_a_squared_modulus_is_real():
    z = np.asarray([3 - 4j, 1j, 0], np.complex64)
    assert abs2(jnp.asarray(z)).dtype == np.float32
    np.testing.assert_array_equal(abs2(jnp.asarray(z)), [25, 1, 0])
    np.testing.assert_array_equal(abs2(jnp.asarray(z.real)), [9, 0, 0])


def test_clip_acts_on_each_part_and_leaves_nan():
    z = jnp.asarray([3 - 4j, complex(np.nan, 1), complex(np.inf, -np.inf)], np.complex64)
    want = np.asarray([2 - 2j, complex(np.nan, 1), 2 - 2j], np.complex64)
    np.testing.assert_array_equal(clip(z, 2.0), want)


def test_narrow_saturates():
    x = jnp.asarray([1e30, -np.inf, 0.5, np.nan], np.float32)
    np.testing.assert_array_equal(
        narrow(x, jnp.dtype(np.float16)), np.asarray([65504, -65504, 0.5, np.nan], np.float16)
    )
