"""A ground state in NetKet, with complex parameters in double precision, as it requires."""

import chex
import jax
import optax
import pytest

import rmsprop_jax

with pytest.MonkeyPatch.context() as patch:
    # Imported, it would turn on double precision and a mesh of all devices for every test.
    patch.setenv("NETKET_ENABLE_X64", "0")
    patch.setenv("NETKET_SHARDING", "0")
    nk = pytest.importorskip("netket")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_promotion")]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def minimise(tx):
    """Parameters and energies; the sum over all states has no noise."""
    hilbert = nk.hilbert.Spin(0.5, 6)
    hamiltonian = nk.operator.IsingJax(hilbert, nk.graph.Chain(6), h=1.0)
    model = nk.models.RBM(alpha=1, param_dtype=complex)
    state = nk.vqs.FullSumState(hilbert, model, seed=0)
    log = nk.logging.RuntimeLog()
    driver = nk.driver.VMC(hamiltonian, tx, variational_state=state)
    driver.run(30, out=log, show_progress=False)
    return state.parameters, log.data["Energy"]["Mean"]


def test_the_ground_state_is_that_with_optax(form):
    """Measured: 1e-14."""
    ours, theirs = (minimise(rms(0.02, **form)) for rms in (rmsprop_jax.rmsprop, optax.rmsprop))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ours[0])} == {"complex128"}
    assert ours[1][-1] < ours[1][0] - 1.5  # of -7.73
    chex.assert_trees_all_close(ours, theirs, rtol=1e-12, atol=1e-12)
